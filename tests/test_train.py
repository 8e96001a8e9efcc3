"""The training loop, run as a user runs it."""

import argparse
import dataclasses
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import PIL.Image
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import coco
import mimdet
import pvt
import train
import yolos

ROOT = Path(__file__).parent.parent
TINY = "embed_dim=64 depth=1 num_heads=1 decoder_dim=32 decoder_depth=1 fpn_dim=16".split()
TINY += "proposals=20 roi_batch=16".split()


def run(*args, tiny=True):
    words = [str(a) for a in args] + (["--set", *TINY] if tiny and "--set" not in args else [])
    return train.main(
        ["--model", "mimdet", "--device", "cpu", "--amp", "off", "--batch-size", "4", *words]
    )


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module", autouse=True)
def few_evaluations():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "EVALUATIONS", 2)
        yield


@pytest.fixture(scope="module")
def finished(shapes, tmp_path_factory):
    """A run of 2 epochs of 6 steps."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    assert run("--data", shapes, "--out", out, "--epochs", 2) == 0
    return out


def test_a_run_leaves_everything_it_promises(finished):
    names = {path.name for path in finished.iterdir()}
    assert {"log.jsonl", "result.json", "last.pt", "best.pt", "detections.json"} <= names
    assert sum(name.startswith("epoch-") and name.endswith(".png") for name in names) == 2
    assert not any(name.endswith(".partial") for name in names)
    result = json.loads((finished / "result.json").read_text())
    assert set(coco.METRICS) | {f"mask_{m}" for m in coco.METRICS} <= set(result)
    assert (
        result["images_seen"] == 48
        and result["steps"] == 12
        and result["config"]["embed_dim"] == 64
    )
    lines = log_of(finished)
    assert (
        sum("AP" in line for line in lines) == 2 and sum("loss_cls" in line for line in lines) == 12
    )
    checkpoint = torch.load(finished / "last.pt", weights_only=True)
    assert checkpoint["step"] == 12 and len(checkpoint["classes"]) == 6


def same_weights(a, b):
    a, b = (torch.load(path / "last.pt", weights_only=True) for path in (a, b))
    assert all(torch.equal(a["model"][key], b["model"][key]) for key in a["model"])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(finished, shapes, tmp_path, workers):
    out = tmp_path / "run"
    args = ("--data", shapes, "--out", out, "--epochs", 2, "--workers", workers)
    assert run(*args, "--steps", 5) == 0
    assert run(*args, "--resume") == 0
    same_weights(finished, out)
    losses = [{k: v for k, v in x.items() if "loss" in k} for x in log_of(finished) if "lr" in x]
    assert losses == [{k: v for k, v in x.items() if "loss" in k} for x in log_of(out) if "lr" in x]


def test_interrupt_saves_and_leaves(finished, shapes, tmp_path, monkeypatch):
    out, steps = tmp_path / "run", []

    def interrupt_in_step_3(*args):
        steps.append(1)
        if len(steps) == 4:
            signal.raise_signal(signal.SIGINT)

    check = train.check_finite
    monkeypatch.setattr(train, "check_finite", lambda *args: (interrupt_in_step_3(), check(*args)))
    with pytest.raises(SystemExit) as leaving:
        run("--data", shapes, "--out", out, "--epochs", 2)
    assert leaving.value.code == 130
    monkeypatch.undo()
    assert torch.load(out / "last.pt", weights_only=True)["step"] == 4
    assert run("--data", shapes, "--out", out, "--epochs", 2, "--resume") == 0
    same_weights(finished, out)


def test_accumulation_sees_the_same_number_of_images(shapes, tmp_path, capsys):
    assert run("--data", shapes, "--out", tmp_path / "a", "--steps", 1, "--accumulate", 2) == 0
    assert "1 steps of 8 images" in capsys.readouterr().out
    assert json.loads((tmp_path / "a/result.json").read_text())["images_seen"] == 8


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(
    accumulate, shapes, tmp_path, monkeypatch, capsys
):
    out, steps = tmp_path / "run", []
    losses = mimdet.rpn_losses

    def poisoned(*args):
        steps.append(1)
        bad = len(steps) == 1 + 2 * accumulate
        return losses(*args) | ({"loss_rpn_box": torch.tensor(torch.nan)} if bad else {})

    monkeypatch.setattr(mimdet, "rpn_losses", poisoned)
    args = ("--steps", 4, "--accumulate", accumulate)
    assert run("--data", shapes, "--out", out, *args) == 2
    message = capsys.readouterr().err
    images = r"images \d+, \d+, \d+, \d+;"
    assert re.search(rf"error: step 3: loss_rpn_box is not finite on {images}", message)
    assert torch.load(out / "last.pt", weights_only=True)["step"] == 2


def test_evaluation_alone_repeats_the_last_one(finished, shapes, tmp_path, capsys):
    args = ("--data", shapes, "--out", tmp_path, "--eval-only", "--init", finished / "last.pt")
    assert run(*args, tiny=False) == 0
    before, after = (
        json.loads((path / "detections.json").read_text()) for path in (finished, tmp_path)
    )
    assert after == before and len(after) > 0
    result = json.loads((finished / "result.json").read_text())
    assert f"{result['AP']:.3f}" in capsys.readouterr().out
    out = shutil.copytree(finished, tmp_path / "run")
    assert run("--data", shapes, "--out", out, "--eval-only", "--limit", 1, tiny=False) == 0
    assert json.loads((out / "detections.json").read_text()) == before  # not those of one image
    assert len(json.loads((out / "eval-only-detections.json").read_text())) < len(before)


def test_a_run_evaluates_as_often_as_promised(shapes, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "EVALUATIONS", 4)
    assert run("--data", shapes, "--out", tmp_path / "run", "--steps", 11) == 0
    steps = [line["step"] for line in log_of(tmp_path / "run") if "AP" in line]
    assert steps == [3, 6, 9, 11]
    # after the last step --resume evaluates once more
    capsys.readouterr()
    assert run("--data", shapes, "--out", tmp_path / "run", "--steps", 11, "--resume") == 0
    assert "boxes" in capsys.readouterr().out


def test_predict_draws_on_any_picture(finished, shapes, tmp_path, capsys):
    picture = next((shapes / "val2017").iterdir())
    assert run("--out", finished, "--predict", picture, picture, tiny=False) == 0
    out = capsys.readouterr().out
    assert out.count("objects with a score of 0.5 or more") == 2
    assert (finished / f"predict-2-{picture.stem}.png").exists()


def test_predict_takes_a_folder_and_needs_no_data_to_train_on(finished, shapes, tmp_path, capsys):
    (tmp_path / "photos" / "more").mkdir(parents=True)
    (tmp_path / "photos" / "notes.txt").write_text("no picture")
    for name in ("photos/b.png", "photos/more/a.JPG"):
        shutil.copy(next((shapes / "val2017").iterdir()), tmp_path / name)
    shutil.copytree(shapes / "val2017", tmp_path / "data" / "val2017")
    (tmp_path / "data" / "annotations").mkdir()
    for file in (shapes / "annotations").glob("instances_val*"):
        shutil.copy(file, tmp_path / "data" / "annotations")
    # Weights that do not say what their classes are called take the names of the data.
    state = torch.load(finished / "best.pt", weights_only=True)["model"]
    torch.save({"model": state}, tmp_path / "bare.pth")
    bare = ("--init", tmp_path / "bare.pth", "--data", tmp_path / "data", "--set", *TINY)
    assert run(*bare, "--out", tmp_path / "bare", "--predict", tmp_path / "photos") == 0
    # A run knows them.
    args = ("--out", tmp_path / "run", "--init", finished / "best.pt", "--data", tmp_path / "none")
    assert run(*args, "--predict", tmp_path / "photos", tiny=False) == 0
    for folder in ("bare", "run"):
        drawn = sorted(file.name for file in (tmp_path / folder).iterdir())
        assert drawn == ["predict-1-b.png", "predict-2-a.png"]
    (tmp_path / "photos" / "a.png").write_bytes(b"")
    assert run(*args, "--predict", tmp_path / "photos", tiny=False) == 2
    assert "a.png: cannot read image" in capsys.readouterr().err
    more = ("--predict", tmp_path / "photos", "--skip-bad-images")
    assert run(*args, *more, tiny=False) == 0
    assert "a.png: cannot read image" in (told := capsys.readouterr().out) and "3-a.png" in told
    (tmp_path / "empty").mkdir()
    assert run(*args, "--predict", tmp_path / "photos", tmp_path / "empty", tiny=False) == 2
    error = capsys.readouterr().err
    assert f"--predict {tmp_path / 'empty'}: a folder without images" in error


def test_released_weights_are_known_to_be_of_cocos_categories(shapes, tmp_path, capsys):
    assert [category["id"] for category in coco.CLASSES] == yolos.COCO_IDS
    state = yolos.build("nano", 80).state_dict()
    layer = "class_embed.layers.2."
    state[layer + "weight"], state[layer + "bias"] = torch.zeros(92, 128), torch.zeros(92)
    state[layer + "bias"][90] = 9  # the row of COCO's last id
    torch.save({"model": state}, tmp_path / "released.pth")
    args = ("--model", "yolos", "--out", tmp_path, "--init", tmp_path / "released.pth")
    assert run(*args, "--predict", next((shapes / "val2017").iterdir()), tiny=False) == 0
    assert "toothbrush" in capsys.readouterr().out


def test_summary_prints_every_variant(capsys):
    assert run("--summary", tiny=False) == 0
    out = capsys.readouterr().out
    assert "127,954,768" in out and "349,332,080" in out and "nano" in out
    # 12 encoder blocks on 50 x 84 tokens alone: 2 x (12 N d^2 + 2 N^2 d)
    base = float(
        next(line for line in out.splitlines() if " base " in line).split()[-1].replace(",", "")
    )
    n, d = 50 * 84, 768
    assert base > 12 * 2 * (12 * n * d**2 + 2 * n**2 * d) / 1e9


@pytest.mark.parametrize("which", ["one", "all"])
def test_benchmark_prints_speed_memory_and_share_of_peak(shapes, capsys, monkeypatch, which):
    monkeypatch.setattr(train, "SIZES", (128,))
    args = ("--data", shapes, "--steps", 1, "--batch-size", 1, "--workers", 0)
    assert run(*args, "--benchmark", which, tiny=which == "one") == 0
    *_, line = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    rows, names = found["rows"], list(train.MODELS) if which == "all" else ["mimdet"]
    assert list(dict.fromkeys(row["model"] for row in rows)) == names
    assert len(rows) == (12 if which == "all" else 3)
    for row in rows:
        assert row["images_per_second"] == pytest.approx(1000 / row["ms"])
        if row["work"] == "load":
            assert 0 < row["waits"] < 1
        else:
            share = row["gflop"] / (row["ms"] / 1000) / found["peak_gflops"]
            assert row["of_peak"] == pytest.approx(share) and 0.05 < row["gib"] < 50
    if which == "all":
        cost = {row["model"]: row["gflop"] for row in rows if row["work"] == "forward"}
        c = train.MODELS["yolos"].CONFIGS["nano"]
        n, d = 1 + 8 * 8 + c.det_tokens, c.embed_dim
        blocks = c.depth * 2 * (12 * n * d**2 + 2 * n**2 * d)  # fused attention is counted too
        assert cost["yolos"] > blocks / 1e9


@pytest.mark.parametrize("head", pvt.HEADS)
def test_the_work_of_every_head_can_be_counted(head):
    net = pvt.build(dataclasses.replace(pvt.CONFIGS["nano"], head=head), 3).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net([torch.rand(3, 64, 64)])
    assert counter.get_total_flops() > 1e6


def test_benchmark_counts_images_that_batchnorm_does_not_take_alone(shapes, capsys):
    args = ("--data", shapes, "--steps", 1, "--workers", 0, "--batch-size", 3, "--benchmark")
    assert run(*args, "--set", *TINY, "sizes=30", "max_size=30") == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [row["batch"] for row in rows] == [3, 3, 3] and rows[1]["gflop"] > 0


def test_init_says_what_became_of_every_tensor(finished, shapes, tmp_path, capsys):
    args = ("--data", shapes, "--steps", 1)
    assert run(*args, "--out", tmp_path / "a", "--init", finished / "best.pt") == 0
    count, total = re.search(
        r"(\d+) of (\d+) tensors loaded, 0 of them resized", capsys.readouterr().out
    ).groups()
    assert count == total
    # a plain ViT, as MAE releases it
    state = torch.load(finished / "best.pt", weights_only=True)["model"]
    vit = {
        k.removeprefix("encoder."): v
        for k, v in state.items()
        if k.startswith(("encoder.b", "encoder.n"))
    }
    vit["pos_embed"] = mimdet.sincos_pos_embed(64, 7)
    vit["cls_token"] = torch.zeros(1, 1, 64)
    torch.save({"model": vit}, tmp_path / "vit.pth")
    assert run(*args, "--out", tmp_path / "b", "--init", tmp_path / "vit.pth", "--eval-only") == 0
    assert (
        "15 of" in (out := capsys.readouterr().out)
        and "1 of them resized" in out
        and "missing: " in out
    )


def test_a_malicious_or_foreign_file_is_refused(finished, shapes, tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "owned",))

    torch.save({"model": Evil()}, tmp_path / "evil.pt")
    (tmp_path / "text.pt").write_text("hello")
    torch.save({"model": {"a": torch.zeros(3)}}, tmp_path / "foreign.pt")
    messages = {
        "evil.pt": "not a checkpoint of plain tensors",
        "text.pt": "not a checkpoint of plain tensors",
        "foreign.pt": "almost nothing fits mimdet nano",
        "absent.pt": "no such file",
    }
    for name, message in messages.items():
        assert run("--data", shapes, "--out", tmp_path / "x", "--init", tmp_path / name) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--set", "depht=3"], "--set depht=3: give FIELD=VALUE; did you mean depth?"),
        (["--set", "wings=3"], "--set wings=3: give FIELD=VALUE; the fields are embed_dim"),
        (["--set", "depth=many"], "depth is now 4, give a value like it"),
        (["--set", "depth"], "give FIELD=VALUE"),
        (
            ["--set", "schedule=cosin"],
            "--set schedule=cosin: give cosine, poly, or parts like 0.75,0.9",
        ),
        (["--set", "crop=none"], "crop is now (), give a value like it"),
        (["--set", "sizes=cosine"], "sizes is now (), give a value like it"),
        (["--set", "depth=2", "--set", "num_heads=5"], "width 192 cannot be shared by 5 heads"),
        (["--set", "fill=foam"], 'fill must be "conv" or "mask", not "foam"'),
        (["--set", "sample_ratio=25"], "sample_ratio and eval_ratio are shares of the tokens"),
        (["--set", "proposals=0"], "proposals, rpn_batch, roi_batch, anchor_scale, grid and"),
        (["--set", "warmup=-1"], "--set warmup: -1 is too small"),
        (["--set", "max_size=0"], "--set max_size: 0 is too small"),
        (["--set", "lr_spread=0"], "--set lr_spread: 0.0 is too small"),
        (["--set", "epochs=nan"], "--set epochs: nan is too large, or no number"),
        (["--set", "drop_path=1.5"], "--set drop_path: 1.5 is too large"),
        (["--set", "depth=100000"], "--set depth: 100000 is too large"),
        (["--set", f"batch_size=1{'0' * 400}"], "--set batch_size: 1000"),
        (["--set", "sizes=96.5"], "--set sizes: (96.5,): give whole numbers"),
        (["--set", "crop=600,384"], "--set crop: give the least before the most"),
        (["--set", "crop=0.5,1.0"], "--set crop: give the least before the most; pixels for a det"),
        (["--variant", "huge"], "--variant huge: mimdet has nano, base, large"),
        (["--data", "nowhere"], "nowhere: no train split"),
        (["--resume"], "last.pt: no such file"),
        (["--device", "tpu"], "--device tpu: "),
        (["--device", "hpu"], "--device hpu: "),
        (["--device", "meta"], "--device meta: "),
        (["--predict", "a.jpg"], "last.pt: no such file; train first or give weights with --init"),
    ],
)
def test_mistakes_are_answered_in_one_line(args, message, shapes, tmp_path, capsys):
    data = [] if "--data" in args or "--predict" in args else ["--data", shapes]
    assert run(*args, *data, "--out", tmp_path / "run", tiny=False) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize("flag", ["epochs", "steps", "batch-size", "accumulate", "lr", "limit"])
def test_numbers_below_the_least_are_answered_in_one_line(flag, capsys):
    for value in ("0", "-1", "nan", "inf", "1e+300") if flag in ("epochs", "lr") else ("0", "-1"):
        with pytest.raises(SystemExit) as leaves:
            run(f"--{flag}={value}")
        error = capsys.readouterr().err
        assert f"--{flag} {value}" in error.replace(".0", "") and error.count("\n") == 1
        assert leaves.value.code == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data="], "--data has an empty value"),
        (["--init="], "--init has an empty value"),
        (["--resume="], "--resume has an empty value"),
        (["--predict", "a.jpg", "--eval-only"], "--eval-only: not allowed with argument --predict"),
        (["--predict", "a.jpg", "--benchmark"], "--benchmark: not allowed with argument --predict"),
    ],
)
def test_options_that_make_no_sense_are_answered_in_one_line(words, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(*words)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_names_that_cannot_be_shown_end_no_run(finished, shapes):
    """A file name in Latin-1, on a screen of UTF-8."""
    name = b"caf\xe9.jpg"
    shutil.copy(next((shapes / "val2017").iterdir()), bytes(finished) + b"/" + name)
    words = [sys.executable, "train.py", "--model", "mimdet", "--out", finished]
    words += ["--predict", bytes(finished) + b"/" + name]
    shown = subprocess.run(
        words, cwd=ROOT, capture_output=True, env=os.environ | {"PYTHONIOENCODING": "utf-8"}
    )
    assert shown.returncode == 0 and b"caf\\udce9.jpg" in shown.stdout, shown


@pytest.mark.parametrize("name", train.MODELS)
def test_every_variant_and_kind_has_a_recipe_that_fits_it(name):
    module = train.MODELS[name]
    kinds = {"simmim": [dict(task=t) for t in ("pretrain", "classify")]}
    kinds["pvt"] = [dict(head=head) for head in train.pvt.HEADS]
    for variant, kind in itertools.product(module.CONFIGS, kinds.get(name, [{}])):
        config = dataclasses.replace(module.CONFIGS[variant], **kind)
        recipe = train.recipe_of(module, variant, dataclasses.asdict(config))
        train.check_numbers(recipe | dataclasses.asdict(config))
        again = dict.fromkeys(recipe) | recipe
        train.override(train.as_settings(recipe), again)
        assert again == recipe
        for training in (True, False):
            coco.Transform(recipe, training, getattr(config, "task", "detect"))
    if name == "pvt":
        large = dataclasses.asdict(dataclasses.replace(module.CONFIGS["large"], head="classifier"))
        assert train.recipe_of(module, "large", large)["clip"] == 1
        b5 = dataclasses.asdict(module.CONFIGS["v2_b5"])
        assert train.recipe_of(module, "v2_b5", b5)["batch_size"] == 8


def test_a_run_goes_on_in_its_own_folder_alone(finished, shapes, tmp_path, capsys):
    other, source = shutil.copytree(finished, tmp_path / "other"), finished / "best.pt"
    before = (other / "last.pt").read_bytes()
    args = ("--data", shapes, "--out", other, "--epochs", 2, "--resume", source)
    assert run(*args) == 2
    assert f"{other} holds a run" in capsys.readouterr().err
    assert (other / "last.pt").read_bytes() == before
    for kept in ("best.pt", "result.json"):  # what is finished is protected without last.pt too
        folder = tmp_path / kept.partition(".")[0]
        folder.mkdir()
        shutil.copy(finished / kept, folder)
        assert run("--data", shapes, "--out", folder, "--steps", 1) == 2
        assert f"{folder} holds a run" in capsys.readouterr().err
    # best.pt is older than last.pt, which would be lost.
    args = ("--data", shapes, "--epochs", 2, "--resume", other / "best.pt")
    assert run(*args) == 2 and run(*args, "--out", tmp_path / "beside") == 0
    assert (other / "last.pt").read_bytes() == before


def test_the_newest_run_is_read_and_a_free_folder_written(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = "mimdet-nano-2", "mimdet-nano", "mimdet-nano-x", "mimdet-nano-3epochs"
    for number, name in enumerate(names, start=1):
        (tmp_path / "runs" / name).mkdir(parents=True)
        shutil.copy(finished / "last.pt", tmp_path / "runs" / name)
        os.utime(tmp_path / "runs" / name / "last.pt", (number, number))

    def chosen(*words):
        return str(train.choose_out(train.parse_args(words)))

    assert chosen("--eval-only") == chosen("--resume") == str(Path("runs/mimdet-nano"))
    assert chosen() == chosen("--eval-only", "--init", "a.pt") == str(Path("runs/mimdet-nano-3"))
    shutil.rmtree(tmp_path / "runs/mimdet-nano")
    assert chosen("--predict", "a.jpg") == str(Path("runs/mimdet-nano-2"))
    assert chosen() == str(Path("runs/mimdet-nano"))


def test_two_runs_do_not_write_into_one_folder(shapes, tmp_path, capsys):
    fcntl = pytest.importorskip("fcntl")
    args = ("--data", shapes, "--out", tmp_path, "--steps", 1)
    reader, writer = os.pipe()
    if not (child := os.fork()):  # as a run does, until the pipe is closed
        os.close(writer)
        with (tmp_path / "lock").open("w") as file:
            fcntl.lockf(file, fcntl.LOCK_EX)
            (tmp_path / "held").touch()
            os.read(reader, 1)
            os._exit(0)
    os.close(reader)
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    code, error = run(*args), capsys.readouterr().err
    os.close(writer)
    os.waitpid(child, 0)
    assert code == 2 and f"{tmp_path}: another run is writing here" in error
    assert run(*args) == 0 and not (tmp_path / "lock").exists()
    with train.claimed(argparse.Namespace(rank=0, out=tmp_path)):
        (tmp_path / "lock").unlink()  # by somebody who takes it for a leftover


def test_a_resumed_run_keeps_the_labels_of_its_classes(finished, shapes, tmp_path, capsys):
    """Though the json of the training split lists the categories in another order."""
    out, data = tmp_path / "run", shutil.copytree(shapes, tmp_path / "reversed")
    file = data / "annotations/instances_train2017.json"
    split = json.loads(file.read_text())
    split["categories"].reverse()
    file.write_text(json.dumps(split))
    assert run("--data", shapes, "--out", out, "--epochs", 2, "--steps", 5) == 0
    assert run("--data", data, "--out", out, "--epochs", 2, "--resume") == 0
    same_weights(finished, out)
    split["categories"].append(dict(id=77, name="star"))
    file.write_text(json.dumps(split))
    assert run("--data", data, "--out", out, "--epochs", 2, "--resume") == 2
    assert "other categories than those of the run; give the same" in capsys.readouterr().err


def test_weights_that_are_not_finite_are_not_saved(shapes, tmp_path, monkeypatch, capsys):
    step = train.train_step

    def diverge(args, model, *rest):
        mean = step(args, model, *rest)
        next(model.parameters()).data.fill_(torch.nan)
        return mean

    monkeypatch.setattr(train, "train_step", diverge)
    assert run("--data", shapes, "--out", tmp_path, "--steps", 1) == 2
    assert "step 1: encoder.pos_embed of the model is not finite" in capsys.readouterr().err
    assert not (tmp_path / "last.pt").exists()


def test_curves_of_runs_are_drawn(finished, tmp_path, capsys):
    assert train.main(["--plot", str(finished), "--out", str(tmp_path / "new")]) == 0
    picture = coco.read_image(tmp_path / "new" / "curves.png")
    loss, measure = picture.split(picture.shape[2] // 2, dim=2)[:2]
    for panel in (loss, measure):  # the only run is red
        red = (panel[0] > 150) & (panel[1] < 60) & (panel[2] < 60)
        assert red.any(dim=0).sum() > panel.shape[2] / 4  # columns
    below = coco.draw_panel("measure", {"run": [(1, -5.0), (2, -0.1)]})  # drawn at 0, on the axis
    at_zero = coco.draw_panel("measure", {"run": [(1, 0), (2, 0)]})
    assert below.equal(at_zero)
    for log in ("[1]", "[" * 100_000):
        (tmp_path / "log.jsonl").write_text(log)
        for folder in (tmp_path / "nowhere", tmp_path):
            assert train.main(["--plot", str(folder)]) == 2
            assert capsys.readouterr().err.count("\n") == 1


TINY_YOLOS = "embed_dim=32 depth=1 num_heads=1 det_tokens=9".split()


def run_yolos(*args):
    return train.main(["--model", "yolos", "--device", "cpu", *map(str, args)])


@pytest.fixture(scope="session")
def finished_yolos(shapes, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "yolos"
    args = ("--data", shapes, "--out", out, "--steps", 2, "--batch-size", 8)
    assert run_yolos(*args, "--set", *TINY_YOLOS) == 0
    return out


def test_yolos_trains_and_evaluates_boxes(finished_yolos):
    result = json.loads((finished_yolos / "result.json").read_text())
    assert "AP" in result and "mask_AP" not in result
    found = json.loads((finished_yolos / "detections.json").read_text())
    assert len(found) == 6 * 9 and {r["token"] for r in found} == set(range(9))


def test_evaluation_of_yolos_shows_what_its_tokens_find(finished_yolos, shapes, tmp_path, capsys):
    out = shutil.copytree(finished_yolos, tmp_path / "run")
    state = torch.load(out / "best.pt", weights_only=True)
    state["model"]["class_embed.layers.2.bias"][2] += 100  # every token is sure of a triangle
    torch.save(state, out / "best.pt")
    assert run_yolos("--data", shapes, "--out", out, "--eval-only") == 0
    numbers = re.search(
        r"place (\S+) \(by chance .*\), size (\S+) .*, category (\S+) ", capsys.readouterr().out
    )
    assert 0.9 < float(numbers[1]) <= 1 and float(numbers[3]) == 0
    assert (out / "tokens.png").stat().st_size > 1000


def test_attention_is_drawn_beside_predictions(finished_yolos, shapes, capsys):
    picture = next((shapes / "val2017").iterdir())
    args = ("--out", finished_yolos, "--predict", picture, "--attention")
    assert run_yolos(*args, 0, 8) == 0 and run_yolos(*args) == 0
    assert capsys.readouterr().out.count("box and one map a head ->") == 2
    assert (finished_yolos / f"predict-1-{picture.stem}-attention.png").exists()
    assert run_yolos(*args, 9) == 2
    assert "--attention: yolos has tokens 0 to 8" in capsys.readouterr().err
    assert run_yolos("--attention") == 2
    assert "--attention goes with --predict" in capsys.readouterr().err


@pytest.mark.parametrize(
    "setting",
    ["det_tokens=0", "pos_grid=10", "pos_grid=10,5", "mid_pos_grid=4", "embed_dim=4", "stem=x"],
)
def test_impossible_settings_of_yolos_are_answered_in_one_line(setting, shapes, tmp_path, capsys):
    args = ("--data", shapes, "--out", tmp_path / "run", "--set", setting)
    assert run_yolos(*args) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --set {setting}: no such model: ") and error.count("\n") == 1


def test_attention_is_refused_where_there_is_none(finished, shapes, capsys):
    picture = next((shapes / "val2017").iterdir())
    assert run("--out", finished, "--predict", picture, "--attention", tiny=False) == 2
    assert "--attention: mimdet has no [DET] tokens: give --model yolos" in capsys.readouterr().err


def test_tokens_of_another_number_keep_the_places_of_the_patches(finished_yolos, shapes, capsys):
    tiny = [x for x in TINY_YOLOS if not x.startswith("det_tokens")]
    args = ("--data", shapes, "--init", finished_yolos / "last.pt", "--out", finished_yolos / "x")
    assert run_yolos(*args, "--eval-only", "--set", *tiny, "det_tokens=4") == 2
    assert run_yolos(*args, "--steps", 1, "--set", *tiny, "det_tokens=4") == 0
    assert "42 of 43 tensors loaded, 1 of them resized" in capsys.readouterr().out


def test_a_run_goes_on_with_another_position_grid(finished_yolos, shapes, capsys):
    args = ("--data", shapes, "--init", finished_yolos / "last.pt", "--out", finished_yolos / "y")
    assert run_yolos(*args, "--steps", 1, "--set", *TINY_YOLOS, "pos_grid=6,6") == 0
    assert "43 of 43 tensors loaded, 1 of them resized" in capsys.readouterr().out


def test_files_with_the_authors_arguments_inside_are_read(finished_yolos, shapes, tmp_path, capsys):
    state = torch.load(finished_yolos / "last.pt", weights_only=True)["model"]
    state["class_embed.layers.2.weight"] = torch.zeros(92, 32)
    state["class_embed.layers.2.bias"] = torch.zeros(92)
    released = dict(model=state, args=argparse.Namespace(lr=1e-4, device="cuda"), epoch=299)
    torch.save(released, tmp_path / "yolos.pth")
    args = ("--data", shapes, "--out", tmp_path / "run", "--init", tmp_path / "yolos.pth")
    assert run_yolos(*args, "--eval-only", "--set", *TINY_YOLOS) == 0
    out = capsys.readouterr().out
    assert "41 of 43 tensors loaded" in out and "other shape, not loaded: 2: class_embed" in out
    assert "authors' arguments (a Namespace) were let in as plain values" in out

    class Evil(argparse.Namespace):
        def __reduce__(self):
            return (Path.touch, (tmp_path / "owned",))

    torch.save(released | dict(args=argparse.Namespace(x=Evil())), tmp_path / "yolos.pth")
    assert run_yolos(*args, "--eval-only", "--set", *TINY_YOLOS) == 2
    assert "not a checkpoint of plain tensors" in capsys.readouterr().err
    assert not (tmp_path / "owned").exists()


def test_an_encoder_trained_by_mimdet_goes_on_in_yolos(finished, shapes, tmp_path, capsys):
    args = ("--data", shapes, "--out", tmp_path / "run", "--steps", 1, "--batch-size", 8)
    init = ("--init", finished / "best.pt", "--set", "embed_dim=64", "depth=1", "num_heads=1")
    assert run_yolos(*args, *init) == 0
    assert re.search(
        r"best.pt: 29 of 43 tensors loaded, 1 of them resized", capsys.readouterr().out
    )


# --- PVT ------------------------------------------------------------------------------------------

TINY_PVT = "embed_dims=16,16,32,32 depths=1,1,1,1 num_heads=1,1,2,2 pos_size=64 head_dim=32".split()


@pytest.mark.parametrize(
    ("head", "metric", "answer"),
    [
        ("retinanet", "AP", "objects with a score"),
        ("detr", "AP", "objects with a score"),
        ("classifier", "top1", r": \w+ 0\.\d\d ->"),
        ("semantic", "mIoU", r"\w+ \d+%"),
        ("trans2seg", "mIoU", r"\w+ \d+%"),
    ],
)
def test_every_head_of_pvt_trains_evaluates_and_predicts(
    head, metric, answer, shapes, tmp_path, capsys
):
    out, settings = tmp_path / "run", ["--set", f"head={head}", *TINY_PVT]
    data = ["--model", "pvt", "--data", shapes]
    assert run(*data, "--out", out, "--steps", 3, *settings, "head_depth=1") == 0
    result = json.loads((out / "result.json").read_text())
    assert 0 <= result[metric] <= 1 and result["config"]["head"] == head
    assert (out / "detections.json").exists() == (metric == "AP")
    assert list(out.glob("epoch-*.png"))
    assert run("--model", "pvt", "--data", shapes, "--out", out, "--eval-only", tiny=False) == 0
    picture = next((shapes / "val2017").iterdir())
    capsys.readouterr()
    assert run("--model", "pvt", "--out", out, "--predict", picture, tiny=False) == 0
    assert re.search(answer, capsys.readouterr().out) and list(out.glob("predict-1-*.png"))


def test_the_head_decides_the_recipe():
    import pvt

    config = dict(head="detr")
    assert train.recipe_of(pvt, "small", config) == pvt.RECIPES["detr"]
    assert train.recipe_of(pvt, "small", dict(head="retinanet")) == pvt.RECIPES["paper"]
    assert train.recipe_of(pvt, "nano", dict(head="retinanet")) == pvt.RECIPES["nano"]
    assert train.recipe_of(pvt, "nano", dict(head="classifier")) == pvt.RECIPES["nano-classifier"]
    assert train.recipe_of(mimdet, "base", {}) == mimdet.RECIPES["paper"]


@pytest.mark.parametrize(
    "setting", ["head=yolo", "embed_dims=8,8", "design=v3", "num_heads=1,2,3,4"]
)
def test_impossible_settings_of_pvt_are_answered_in_one_line(setting, shapes, tmp_path, capsys):
    args = ["--model", "pvt", "--data", shapes, "--out", tmp_path / "run", "--set"]
    assert run(*args, *TINY_PVT, setting) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: --set ") and f" {setting}: no such model: " in message
    assert message.count("\n") == 1


def test_weights_of_the_authors_segmenters_and_detectors_are_found(shapes, tmp_path, capsys):
    """They lie under "state_dict"."""
    import pvt

    settings = train.parse_args(["--set", *TINY_PVT]).set
    config = train.dataclasses.asdict(pvt.CONFIGS["nano"])
    train.override(settings, config)
    state = pvt.build(pvt.Config(**config), 6).state_dict()
    state = {k: v for k, v in state.items() if k.startswith("backbone.")}
    torch.save({"meta": {"epoch": 12}, "state_dict": state}, tmp_path / "theirs.pth")
    args = ["--model", "pvt", "--data", shapes, "--out", tmp_path / "run", "--steps", 1]
    assert run(*args, "--init", tmp_path / "theirs.pth", "--set", *TINY_PVT) == 0
    assert f"{len(state)} of" in capsys.readouterr().out


# --- SimMIM ---------------------------------------------------------------------------------------

TINY_SIMMIM = "img_size=64 embed_dim=32 depths=2 num_heads=2".split()


@pytest.fixture(scope="session")
def pretrained(shapes, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "simmim"
    args = ("--model", "simmim", "--data", shapes, "--out", out, "--steps", 4)
    assert run(*args, "--set", *TINY_SIMMIM) == 0
    return out


def test_simmim_trains_and_shows_reconstructions(pretrained, shapes, tmp_path, capsys):
    result = json.loads((pretrained / "result.json").read_text())
    assert {"explained", "masked_L1", "baseline_L1"} <= set(result)
    assert len(list(pretrained.glob("epoch-*.png"))) == 2
    assert not (pretrained / "detections.json").exists()
    args = ("--model", "simmim", "--out", pretrained)
    assert run(*args, "--data", shapes, "--eval-only", tiny=False) == 0
    assert f"masked_L1 {result['masked_L1']:.3f}" in capsys.readouterr().out
    assert run(*args, "--predict", next((shapes / "val2017").iterdir()), tiny=False) == 0
    assert "where hidden" in capsys.readouterr().out
    with PIL.Image.open(next(pretrained.glob("predict-1-*.png"))) as picture:
        assert picture.width == 3 * (320 + 4)  # image, masked, reconstruction


def test_a_plain_folder_of_pictures_is_enough(shapes, tmp_path):
    args = ("--model", "simmim", "--data", shapes / "train2017", "--out", tmp_path / "run")
    assert run(*args, "--steps", 2, "--set", *TINY_SIMMIM) == 0


@pytest.mark.parametrize("out", [".", "run"])
def test_pictures_drawn_by_a_run_are_not_learned_from(out, tmp_path):
    for i in range(5):
        PIL.Image.new("RGB", (70, 50), (40 * i, 100, 0)).save(tmp_path / f"{i}.png")
    args = ("--model", "simmim", "--data", tmp_path, "--out", tmp_path / out)
    size = ("--epochs", 2, "--set", *TINY_SIMMIM)
    assert run(*args, *size, "--steps", 1) == 0
    assert run(*args, "--predict", tmp_path / "0.png", tiny=False) == 0
    assert train.main(["--plot", str(tmp_path / out)]) == 0
    drawn = {file.name[:5] for file in (tmp_path / out).glob("[!0-9]*.png")}
    assert drawn == {"epoch", "predi", "curve"}
    PIL.Image.new("RGB", (9, 9)).save(tmp_path / "tokens.png")  # YOLOS's
    assert run(*args, *size, "--resume") == 0
    assert len(coco.find_images(tmp_path)) == 5


@pytest.mark.parametrize("setting", ["sizes=64", "max_size=64", "img_size=64"])
def test_sizes_that_change_nothing_are_told(setting, shapes, tmp_path, capsys):
    args = ("--model", "simmim", "--data", shapes, "--out", tmp_path, "--steps", 1, "--limit", 8)
    assert run(*args, "--set", setting) == 0
    told = "simmim has one size, img_size" in capsys.readouterr().out
    assert told == (setting != "img_size=64")


@pytest.mark.parametrize("target", ["color_cluster", "tokens"])
def test_codes_are_found_before_training_and_kept(target, shapes, tmp_path):
    out, settings = tmp_path / "run", [*TINY_SIMMIM, f"target={target}", "clusters=8"]
    args = ("--model", "simmim", "--data", shapes, "--out", out)
    assert run(*args, "--steps", 2, "--epochs", 1, "--set", *settings) == 0
    first = torch.load(out / "last.pt", weights_only=True)["model"]["target.codes"]
    assert len(first.unique(dim=0)) == 8
    assert run(*args, "--epochs", 1, "--resume", tiny=False) == 0
    assert torch.equal(
        torch.load(out / "last.pt", weights_only=True)["model"]["target.codes"], first
    )


def test_what_was_pre_trained_is_fine_tuned(pretrained, shapes, tmp_path, capsys):
    args = ["--model", "simmim", "--data", shapes, "--init", pretrained / "last.pt"]
    for name, more in (("tuned", []), ("probe", ["freeze=true"])):
        out = tmp_path / name
        settings = ["--set", "task=classify", *TINY_SIMMIM, *more]
        assert run(*args, "--out", out, "--steps", 2, *settings) == 0
        assert "30 of 32 tensors loaded" in capsys.readouterr().out
        assert 0 <= json.loads((out / "result.json").read_text())["top1"] <= 1
        trained = torch.load(out / "last.pt", weights_only=True)["model"]
        before = torch.load(pretrained / "last.pt", weights_only=True)["model"]
        key = "encoder.blocks.1.mlp.fc1.weight"
        assert torch.equal(trained[key], before[key]) == (name == "probe")


def test_a_pre_trained_encoder_goes_on_in_the_detectors(pretrained, shapes, tmp_path, capsys):
    size = "embed_dim=32 depth=2 num_heads=2".split()
    start = ("--data", shapes, "--init", pretrained / "last.pt", "--steps", 1)
    assert run(*start, "--out", tmp_path / "mimdet", "--set", *TINY, *size) == 0
    assert ": 27 of " in capsys.readouterr().out
    assert run_yolos(*start, "--out", tmp_path / "yolos", "--set", *TINY_YOLOS, *size) == 0
    assert ": 28 of " in capsys.readouterr().out
    wide = ["embed_dim=64", *size[1:]]
    assert run(*start, "--out", tmp_path / "a", "--set", *TINY, *wide) == 2
    assert run_yolos(*start, "--out", tmp_path / "b", "--set", *TINY_YOLOS, *wide) == 2
    assert capsys.readouterr().err.count("nano; are --variant and --set right?") == 2


def test_swin_files_lack_its_index_tables_and_change_windows(shapes, tmp_path, capsys):
    swin = "encoder=swin img_size=64 patch=4 depths=1,2 num_heads=1,2 embed_dim=16 window=4".split()
    first = ("--model", "simmim", "--data", shapes, "--out", tmp_path / "first", "--steps", 1)
    assert run(*first, "--set", *swin) == 0
    state = torch.load(tmp_path / "first/last.pt", weights_only=True)["model"]
    state = {k: v for k, v in state.items() if not k.endswith("relative_position_index")}
    torch.save({"model": state}, tmp_path / "theirs.pth")
    args = ("--model", "simmim", "--out", tmp_path / "drawn", "--init", tmp_path / "theirs.pth")
    picture = next((shapes / "val2017").iterdir())
    assert run(*args, "--predict", picture, "--set", *swin) == 0
    capsys.readouterr()
    tuned = ("--model", "simmim", "--data", shapes, "--out", tmp_path / "tuned", "--steps", 1)
    settings = ["--set", *swin, "task=classify", "window=8"]
    assert run(*tuned, "--init", tmp_path / "first/last.pt", *settings) == 0
    assert ", 3 of them resized" in capsys.readouterr().out


@pytest.mark.parametrize(
    "setting",
    ["mask=typo", "task=typo", "predict=typo", "mask_ratio=1.5", "resolution=0", "patch=12"]
    + ["encoder=swin_v2 depths=1,1,1,1,1 num_heads=1,1,1,1,1"],
)
def test_impossible_settings_of_simmim_are_answered_in_one_line(setting, shapes, tmp_path, capsys):
    args = ["--model", "simmim", "--data", shapes, "--out", tmp_path / "run", "--set"]
    assert run(*args, *TINY_SIMMIM, *setting.split()) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: --set") and message.count("\n") == 1


@pytest.mark.parametrize(
    ("model", "setting", "why"),
    [
        ("mimdet", "decoder_dim=130", "width 130 is no multiple of 4"),
        ("mimdet", "embed_dim=4", "stem=conv needs a width of 8 or more, not 4"),
        ("yolos", "embed_dim=130", "width 130 is no multiple of 4"),
        ("simmim", "embed_dim=130", "width 130 is no multiple of 4"),
        ("simmim", "mask_patch=0", "clusters and window: 1 or more"),
    ],
)
def test_impossible_sizes_are_named(model, setting, why):
    net = train.MODELS[model]
    config = dataclasses.asdict(net.CONFIGS["nano"])
    train.override([setting], config)
    with pytest.raises(ValueError, match=why):
        net.build(net.Config(**config), 2)


def test_a_finished_run_is_not_overwritten(finished, shapes, capsys):
    assert run("--data", shapes, "--out", finished, "--steps", 1) == 2
    assert "holds a run; give --resume" in capsys.readouterr().err


def test_set_changes_config_and_recipe_by_type():
    config, recipe = (
        {"ratio": 0.5, "depth": 4, "on": True, "fill": "conv"},
        {"sizes": (), "schedule": "cosine"},
    )
    words = ["ratio=1", "depth=6", "on=false", "fill=mask", "sizes=320,352", "schedule=1e-05,0.9"]
    train.override(words, config, recipe)
    assert config == {"ratio": 1.0, "depth": 6, "on": False, "fill": "mask"}
    assert recipe == {"sizes": (320, 352), "schedule": (1e-05, 0.9)}
    assert train.parse_args(["--set", "a=1", "b=2", "--set", "c=3"]).set == ["a=1", "b=2", "c=3"]


def test_schedules():
    paper, nano = mimdet.RECIPES["paper"], mimdet.RECIPES["nano"]
    at = lambda step: train.lr_factor(step, 67500, paper)  # noqa: E731
    assert at(0) == 1 / 469 and at(469) == at(50624) == 1
    assert at(50625) == pytest.approx(0.1) and at(61880) == pytest.approx(0.01)
    curve = [train.lr_factor(step, 1000, nano) for step in range(1000)]
    assert max(curve) == 1 and curve[-1] < 1e-4 and curve[:50] == sorted(curve[:50])
    poly = dict(schedule="poly", warmup=0)
    assert train.lr_factor(0, 100, poly) == 1
    assert train.lr_factor(75, 100, poly) == pytest.approx(0.25**0.9)


def test_a_broken_image_is_named_in_one_line_by_loader_processes_too(shapes, tmp_path, capsys):
    root = shutil.copytree(shapes, tmp_path / "shapes")
    for path in (root / "train2017").iterdir():
        path.write_bytes(b"broken")
    assert run("--data", root, "--out", tmp_path / "run", "--steps", 1, "--workers", 1) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(r"error: .*jpg: cannot read image .*; replace or remove it\n", error)


def test_boxes_alone_can_be_learned_from_data_with_masks(shapes, tmp_path):
    args = ("--data", shapes, "--out", tmp_path / "run", "--steps", 1)
    assert run(*args, "--set", *TINY, "masks=false") == 0
    assert "AP" in json.loads((tmp_path / "run/result.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("model", ["simmim", "mimdet", "yolos", "pvt"])
def test_two_processes_train_together(model, shapes, tmp_path, capsys):
    settings = {"simmim": TINY_SIMMIM, "mimdet": TINY, "yolos": TINY_YOLOS, "pvt": TINY_PVT}[model]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += [ROOT / "train.py", "--model", model, "--device", "cpu", "--data", shapes]
    command += ["--amp", "off", "--out", tmp_path / "run", "--steps", "2", "--set", *settings]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 2/2") == 1 and (tmp_path / "run/result.json").exists()
    assert [line["step"] for line in log_of(tmp_path / "run") if "lr" in line] == [1, 2]
    # What they answered together, one process answers alone.
    args = ("--model", model, "--data", shapes, "--out", tmp_path / "alone", "--eval-only")
    assert run(*args, "--init", tmp_path / "run/last.pt", tiny=False) == 0
    together, alone = (
        re.findall(r"^(?:epoch|eval)\S*  (.*)  \(6 images", text, re.M)[-1]
        for text in (done.stdout, capsys.readouterr().out)
    )
    assert together == alone
    if (tmp_path / "run/detections.json").exists():
        together, alone = (
            json.loads((tmp_path / name / "detections.json").read_text())
            for name in ("run", "alone")
        )
        assert [r["image_id"] for r in together] == [r["image_id"] for r in alone]
        scores = [r["score"] for r in alone]
        assert [r["score"] for r in together] == pytest.approx(scores, abs=1e-5)


@pytest.mark.parametrize(
    ("model", "settings", "measures"),
    [
        ("mimdet", TINY, ("AP", "mask_AP")),
        ("yolos", TINY_YOLOS, ("AP",)),
        ("pvt", TINY_PVT, ("AP",)),
        ("pvt", [*TINY_PVT, "head=detr"], ("AP",)),
        ("pvt", [*TINY_PVT, "head=classifier"], ("top1",)),
        ("pvt", [*TINY_PVT, "head=semantic"], ("mIoU", "pixel_accuracy")),
        ("pvt", [*TINY_PVT, "head=trans2seg"], ("mIoU", "pixel_accuracy")),
        ("simmim", TINY_SIMMIM, ("masked_L1",)),
    ],
)
def test_real_coco_trains_and_evaluates(real_coco, tmp_path, model, settings, measures):
    args = ["--model", model, "--device", "cpu", "--data", real_coco, "--out", tmp_path / "run"]
    args += ["--limit", 4, "--steps", 2, "--batch-size", 4, "--eval-on", "train", "--set"]
    assert train.main([*map(str, args), *settings, "max_size=128"]) == 0
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert all(0 <= result[name] <= 1 or model == "simmim" for name in measures)


@pytest.mark.parametrize("page", ["README.md", "docs/labs.md"])
def test_commands_of_the_pages_parse(page):
    text = (ROOT / page).read_text()
    assert "@@" not in text
    commands = re.findall(r"^(?:python|torchrun .*) ?train\.py (.*?)(?:#.*)?$", text, re.M)
    commands += re.findall(r"`(--model .*?)`", text)  # options in a table or sentence
    assert len(commands) >= 6
    for command in commands:
        args = train.parse_args(command.split())
        module = train.MODELS[args.model]
        config = vars(module.CONFIGS[args.variant])
        train.override(
            args.set, dict(config), dict(module.RECIPES.get(args.variant, module.RECIPES["paper"]))
        )


def test_readme_says_how_long_the_files_are():
    rows = re.findall(r"^\| `(\w+\.py)` \|.*?\| (\d+) \|", (ROOT / "README.md").read_text(), re.M)
    assert len(rows) == 6
    for name, lines in rows:
        assert len((ROOT / name).read_text().splitlines()) == pytest.approx(int(lines), abs=25)


def test_the_lines_of_python_in_the_readme_run(finished_yolos, shapes, tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    (tmp_path / "runs").mkdir()
    shutil.copytree(finished_yolos, tmp_path / "runs" / "yolos-nano")
    shutil.copy(next((shapes / "val2017").iterdir()), tmp_path / "photo.jpg")
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    told = subprocess.run(command, cwd=tmp_path, env=env, check=True, capture_output=True).stdout
    assert any(name.encode() in told for name in coco.SHAPES) and b"tensor" in told
