"""Runs that are killed, interrupted, spoilt or shared out still end as promised, or in one line.

torchrun starts this file too: see `job`.
"""

import argparse
import errno
import json
import math
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import conftest  # noqa: F401  (finds the project when torchrun starts this file)
import pytest
import torch
from test_train import TINY, TINY_PVT, TINY_SIMMIM, TINY_YOLOS, log_of

import mimdet
import simmim
import train

SETTINGS = {"simmim": TINY_SIMMIM, "mimdet": TINY, "yolos": TINY_YOLOS, "pvt": TINY_PVT}


def run(model, *args, tiny=True):
    words = ["--model", model, "--device", "cpu", "--amp", "off", *map(str, args)]
    return train.main(words + (["--set", *SETTINGS[model]] if tiny and "--set" not in args else []))


def states(folder):
    data = torch.load(folder / "last.pt", weights_only=True)
    return data["model"] | {
        f"{i} {name}": value
        for i, values in data["optimizer"]["state"].items()
        for name, value in values.items()
    }


def same(a, b, tolerance=0.0):
    a, b = states(a), states(b)
    assert a.keys() == b.keys()
    worst = max(a, key=lambda name: (a[name].double() - b[name].double()).abs().max())
    assert (a[worst].double() - b[worst].double()).abs().max() <= tolerance, worst
    return True


def one_line(capsys):
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Forked processes have no more, and sums depend on how many share them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def finished(shapes, tmp_path_factory):
    """A run of 6 steps."""
    out = tmp_path_factory.mktemp("runs") / "yolos"
    assert run("yolos", "--data", shapes, "--out", out, "--steps", 6, "--batch-size", 4) == 0
    return out


# --- Devices --------------------------------------------------------------------------------------


def test_an_old_torch_that_tells_nothing_of_the_cpu_computes_in_float32(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert not train.bf16_pays(torch.device("cpu"))


def test_apples_gpu_is_taken_where_it_works_and_said_where_not(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with monkeypatch.context() as works:
        works.setattr(torch, "empty", lambda *shape, device: torch.zeros(shape))
        device = train.choose_device(None, 0)
    assert device.type == "mps" and not train.bf16_pays(device)
    if not torch.backends.mps.is_built():
        assert train.main(["--model", "yolos"]) == 2
        assert one_line(capsys).startswith("error: --device mps: ")


# --- Killed, and no room --------------------------------------------------------------------------


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def in_the_middle(file, data, write=torch.save):
    """Half of a checkpoint is written when the process is killed."""

    class Half:
        def write(self, piece):
            file.write(piece[: len(piece) // 2])
            file.flush()
            die()

        def flush(self):
            pass

    write(data, Half())


def log_without_speed(folder):
    return [{k: v for k, v in line.items() if "per_second" not in k} for line in log_of(folder)]


def fork(work, *args):
    """The id of a copy of this process that does the work and ends, also by an exception."""
    if child := os.fork():
        return child
    try:
        os._exit(work(*args))
    finally:
        os._exit(1)


def killed(monkeypatch, where, *args):
    """Run in a process that is killed at a certain moment."""

    def work():
        for target, replacement in where:
            monkeypatch.setattr(target, replacement)
        return run(*args)

    return os.WTERMSIG(os.waitpid(fork(work), 0)[1])


@pytest.mark.parametrize("model", SETTINGS)
def test_a_run_killed_at_any_moment_goes_on_bit_for_bit(model, shapes, tmp_path, monkeypatch):
    whole, out = tmp_path / "whole", tmp_path / "killed"
    step, judge, batches = train.train_step, train.judge, "--batch-size 4".split()

    def in_step(number):
        return lambda *args: die() if args[-1] == number else step(*args)

    moments = [  # and the step that is then saved
        ([("train.evaluate", die)], 2),
        ([("train.train_step", in_step(3))], 3),
        ([("train.os.replace", die)], 3),
        ([("train.torch.save", lambda data, file: in_the_middle(file, data))], 3),
        ([("train.judge", lambda *args: (judge(*args), die()))], 4),
    ]
    args = (model, "--data", shapes, "--limit", 24, "--steps", 6, *batches)
    assert run(*args, "--out", whole) == 0
    monkeypatch.setattr(train, "SAVE_SECONDS", 0)
    for where, step_saved in moments:
        resume = ["--resume"] if (out / "last.pt").exists() else []
        assert killed(monkeypatch, where, *args, "--out", out, *resume) == signal.SIGKILL
        assert torch.load(out / "last.pt", weights_only=True)["step"] == step_saved
    with (out / "log.jsonl").open("a") as log:
        log.write('{"step": 4, "lr"')  # a full disk leaves half a line
    assert run(*args, "--out", out, "--resume") == 0
    assert same(whole, out) and log_without_speed(whole) == log_without_speed(out)
    assert not list(out.glob("*.partial"))


@pytest.mark.parametrize("model", SETTINGS)
def test_a_run_killed_five_times_at_random_goes_on_bit_for_bit(
    model, shapes, tmp_path, monkeypatch
):
    whole, out, kills = tmp_path / "whole", tmp_path / "killed", 0
    monkeypatch.setattr(train, "SAVE_SECONDS", 0)  # a checkpoint is written after every step
    args = (model, "--data", shapes, "--limit", 24, "--steps", 8, "--batch-size", 4, "--out")
    began = time.time()
    assert run(*args, whole) == 0
    seconds = time.time() - began

    def resume():
        return ["--resume"] if (out / "last.pt").exists() else []

    while kills < 5:
        child = fork(run, *args, out, *resume())
        time.sleep(random.uniform(0, seconds))
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        if os.WIFSIGNALED(status):
            kills += 1
        else:  # it was faster: begin again
            assert status == 0 and same(whole, out)
            shutil.rmtree(out)
    assert run(*args, out, *resume()) == 0
    assert same(whole, out) and log_without_speed(whole) == log_without_speed(out)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_said_and_leaves_the_old_checkpoint(
    finished, shapes, tmp_path, monkeypatch, capsys
):
    out, plain = shutil.copytree(finished, tmp_path / "run"), Path.open
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.suffix != ".jsonl"}

    def full(self, mode="r", *args, **kwargs):
        file = plain(self, mode, *args, **kwargs)
        return open("/dev/full", mode) if self.suffix == ".partial" and mode == "wb" else file

    monkeypatch.setattr(Path, "open", full)
    for name in ("last.pt", "result.json"):
        with pytest.raises(train.DataError, match=f"{name}: cannot be written .*No space"):
            train.write_whole(out / name, lambda file: torch.save(torch.zeros(10**5), file))

    def half(file):
        """torch.save tells of a disk that fills up later by an error of its own."""
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        finally:
            raise RuntimeError("unexpected pos 1095936 vs 1095824")

    with pytest.raises(train.DataError, match="last.pt: cannot be written .*No space"):
        train.write_whole(out / "last.pt", half)
    args = ("--data", shapes, "--out", out, "--steps", 6, "--batch-size", 4, "--resume")
    assert run("yolos", *args) == 2
    assert "No space left on device); what was there is kept" in one_line(capsys)
    assert before.items() <= {path.name: path.read_bytes() for path in out.iterdir()}.items()
    assert not list(out.glob("*.partial"))
    monkeypatch.undo()
    monkeypatch.setattr(
        train, "log_line", lambda *_, **__: open("/dev/full", "w").write("x" * 9999)
    )
    assert run("yolos", *args, "--steps", 7) == 2
    assert "No space left on device: make room, then start again" in one_line(capsys)


def test_a_folder_that_cannot_be_is_said(shapes, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run("yolos", "--data", shapes, "--out", tmp_path / "file/run", "--steps", 1) == 2
    assert "file" in one_line(capsys)


# --- Files of unknown origin ----------------------------------------------------------------------


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("owned"),))


def changed(**parts):
    def change(data):
        for name, value in parts.items():
            data[name] = data[name] | value if isinstance(value, dict) else value
        return data

    return change


def without(name):
    return lambda data: {key: value for key, value in data.items() if key != name}


def moments(change):
    def change_first(data):
        state = data["optimizer"]["state"][0]
        state["exp_avg"] = change(state["exp_avg"])
        return data

    return change_first


def weights(value):
    return lambda data: data | {"model": {k: x * value for k, x in data["model"].items()}}


# What is wrong with the file -> where that is noticed, what is said.
EVERYWHERE, RUNS = ("--init", "--resume", "--eval-only", "--predict"), ("--resume", "--eval-only")
SPOILT = {
    "evil": (changed(classes=[Evil()]), EVERYWHERE, "not a checkpoint of plain tensors"),
    "a list": (lambda data: [data], EVERYWHERE, "holds a list"),
    "other model": (changed(name="pvt"), ("--resume",), "not a run of yolos; give --model pvt"),
    "no classes": (without("classes"), EVERYWHERE, "'classes'"),
    "classes": (changed(classes=[1, 2]), EVERYWHERE, "damaged"),
    "one class": (changed(classes=5), EVERYWHERE, "damaged"),
    "class ids": (changed(classes=[{"id": "1", "name": "a"}]), EVERYWHERE, "id is a str"),
    "class names": (changed(classes=[{"id": 1, "name": None}]), EVERYWHERE, "name is a NoneType"),
    "seed": (changed(seed="1"), EVERYWHERE, "seed is a str"),
    "step": (changed(step=1.5), EVERYWHERE, "step is a float"),
    "early": (changed(step=-1), EVERYWHERE, "its step, seed, seconds or lr is out"),
    "late": (changed(step=10**400), EVERYWHERE, "its step, seed, seconds or lr is out"),
    "large seed": (changed(seed=2**64), EVERYWHERE, "its step, seed, seconds or lr is out"),
    "no time": (changed(seconds=math.nan), EVERYWHERE, "its step, seed, seconds or lr is out"),
    "no rate": (changed(plan={"lr": math.nan}), EVERYWHERE, "its step, seed, seconds or lr is"),
    "deep": (changed(config={"depth": 10**9}), RUNS, "file.pt: depth: 1000000000 is too large"),
    "rate": (changed(recipe={"lr": -1.0}), RUNS, "file.pt: lr: -1.0 is too small"),
    "nan": (weights(torch.nan), EVERYWHERE, "of its tensors are not finite, the first is backbone"),
    "huge": (weights(1e38), ("--eval-only", "--predict"), "are not finite; take other weights"),
    "variant": (changed(variant="huge"), RUNS, "--variant huge: yolos has nano"),
    "field": (changed(config={"evil": 1}), RUNS, "evil=1: give FIELD=VALUE; "),
    "config": (changed(config={"depth": [1]}), RUNS, "depth is now 3, give a value like it"),
    "heads": (changed(config={"num_heads": 5}), RUNS, "cannot be shared by 5 heads"),
    "recipe": (changed(recipe={"lr": "high"}), RUNS, "lr is now 0.0008, give a value like it"),
    "plan": (changed(plan={"schedule": None}), EVERYWHERE, "schedule is a NoneType"),
    "weights": (changed(model=[]), EVERYWHERE, "model is a list"),
    "shape": (changed(model={"class_embed.layers.2.bias": torch.zeros(3)}), RUNS, "fit whole"),
    "kind": (changed(model={"class_embed.layers.2.bias": "0"}), RUNS, "does not fit whole"),
    "names": (changed(model={1: torch.zeros(3)}), (), ""),
    "no moments": (changed(optimizer={"state": 1}), ("--resume",), "damaged"),
    "moments": (
        moments(lambda x: x.flatten()[:-1]),
        ("--resume",),
        "the optimizer's state is of other weights",
    ),
    "sparse": (moments(torch.Tensor.to_sparse), ("--resume",), "damaged"),
    "nested": (
        changed(model={"backbone.det_token": torch.nested.nested_tensor([torch.zeros(9, 32)])}),
        RUNS,
        "",
    ),
    "one number": (moments(lambda x: torch.zeros(()).expand(x.shape)), (), ""),
}


@pytest.mark.parametrize("what", SPOILT)
def test_a_spoilt_checkpoint_is_refused_in_one_line(
    what, finished, shapes, tmp_path, monkeypatch, capsys
):
    spoil, noticed, message = SPOILT[what]
    monkeypatch.chdir(tmp_path)
    torch.save(spoil(torch.load(finished / "last.pt", weights_only=True)), "file.pt")
    picture = next((shapes / "val2017").iterdir())
    modes = {
        "--resume": ["--resume", "file.pt", "--data", shapes],
        "--eval-only": ["--eval-only", "--init", "file.pt", "--data", shapes],
        "--predict": ["--predict", picture, "--init", "file.pt"],
        "--init": ["--init", "file.pt", "--data", shapes, "--steps", 1, "--batch-size", 2],
    }
    for mode in noticed or EVERYWHERE:
        code = run("yolos", *modes[mode], "--out", f"run{mode}", tiny=mode == "--init")
        if noticed:
            assert code == 2 and message in one_line(capsys)
        else:
            assert code == 0
    assert not Path("owned").exists()


def test_every_config_and_recipe_survives_the_way_through_a_file():
    for module in train.MODELS.values():
        tables = [*map(train.dataclasses.asdict, module.CONFIGS.values()), *module.RECIPES.values()]
        for table in tables:
            read = dict(table)
            train.override(train.as_settings(table), read)
            assert read == table and list(map(type, read.values())) == [
                type(value) for value in table.values()
            ]


def test_a_truncated_checkpoint_is_refused_in_one_line(finished, tmp_path, capsys):
    whole = (finished / "last.pt").read_bytes()
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "last.pt").write_bytes(whole[:length])
        assert run("yolos", "--out", tmp_path, "--resume", tiny=False) == 2
        assert "not a checkpoint of plain tensors, or damaged" in one_line(capsys)


def test_names_in_a_checkpoint_and_of_pictures_obey_no_screen(finished, shapes, tmp_path, capsys):
    data = torch.load(finished / "last.pt", weights_only=True)
    data["classes"][0]["name"] = "a\x1b[2Jclass"
    data["model"]["a\x1b[2Jtensor"] = torch.zeros(1)
    data["model"]["class_embed.layers.2.bias"][0] = 99  # every token is sure of class 0
    torch.save(data, tmp_path / "file.pt")
    picture = shutil.copy(next((shapes / "val2017").iterdir()), tmp_path / "a\x1b[2Jfile.jpg")
    args = ("--init", tmp_path / "file.pt", "--out", tmp_path / "run", "--predict", picture)
    assert run("yolos", *args, tiny=False) == 0
    shown = capsys.readouterr().out
    assert {"tensor", "class", "file"} == set(re.findall(r"a\\x1b\[2J(\w+)", shown))
    assert "\x1b" not in shown


@pytest.mark.parametrize("model", ["simmim", "mimdet", "yolos", "pvt"])
def test_foreign_weights_of_any_shape_are_refused_in_one_line(model, tmp_path, shapes, capsys):
    """Renaming and resizing happen before shapes can be compared."""
    names = ["pos_embed", "backbone.det_token", "encoder.pos_embed", "pos_embed1", "mask_token"]
    names += ["blocks.0.attn.relative_position_bias_table", "class_embed.layers.2.weight"]
    for value in (torch.zeros(()), torch.zeros(2, 3, 5, 7), torch.zeros(1, 0, 4)):
        torch.save(dict.fromkeys(names, value), tmp_path / "file.pt")
        args = ("--data", shapes, "--init", tmp_path / "file.pt", "--out", tmp_path / "run")
        assert run(model, *args, "--steps", 1) == 2
        one_line(capsys)


def test_nothing_is_written_outside_out(finished, shapes, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    picture = next((shapes / "val2017").iterdir())
    names = ["...jpg", "a\nb.jpg", "~.jpg", "%2e%2e%2fx.jpg", "..\\x.jpg", "$(touch x).jpg"]
    for name in names:
        shutil.copy(picture, name)
    out = shutil.copytree(finished, tmp_path / "run")
    before = {path for path in tmp_path.rglob("*") if out not in path.parents}
    odd = [*names, "../here/~.jpg", tmp_path / "run/../here/~.jpg"]
    assert run("yolos", "--out", out, "--predict", *odd, tiny=False) == 0
    assert len(list(out.glob("predict-*"))) == len(odd)
    assert {path for path in tmp_path.rglob("*") if out not in path.parents} == before


# --- Not a number, no memory ----------------------------------------------------------------------


@pytest.mark.parametrize(("clip", "value"), [(0.0, math.nan), (1.0, math.inf)])
def test_a_gradient_that_is_not_finite_stops_the_run(
    clip, value, shapes, tmp_path, monkeypatch, capsys
):
    build, calls = train.make_net, []

    def poisoned(*args):
        net = build(*args)
        calls.append(0)

        def hook(grad):
            calls[0] += 1
            return grad * value if calls[0] == 2 else grad

        net.backbone.det_token.register_hook(hook)
        return net

    monkeypatch.setattr(train, "make_net", poisoned)
    monkeypatch.setattr(train, "SAVE_SECONDS", 0)
    args = ("--data", shapes, "--out", tmp_path, "--steps", 4, "--batch-size", 2)
    assert run("yolos", *args, "--set", *TINY_YOLOS, f"clip={clip}") == 2
    message = "step 2: the gradient of backbone.det_token is not finite; what was saved is kept"
    assert message in one_line(capsys)
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == 1


def test_parameters_are_named_without_what_wraps_them():
    with pytest.raises(train.DataError, match="the gradient of head.bias is not finite"):
        grads = {"module.head.bias": torch.tensor(torch.nan)}
        train.check_finite(1, torch.tensor(torch.nan), [], grads)


def test_an_overflow_is_named_in_bf16(finished, shapes, tmp_path, capsys):
    data = torch.load(finished / "last.pt", weights_only=True)
    data["model"]["class_embed.layers.2.weight"].fill_(3e38)
    torch.save(data, tmp_path / "huge.pt")
    args = ("--data", shapes, "--out", tmp_path, "--init", tmp_path / "huge.pt", "--amp", "bf16")
    assert run("yolos", *args, "--steps", 1, "--batch-size", 2) == 2
    assert re.search("step 1: loss_cls.* is not finite on images", one_line(capsys))


def cuda_is_full():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nmore")


def numpy_is_full():
    raise MemoryError


@pytest.mark.parametrize("fill", [lambda: torch.empty(2**55), cuda_is_full, numpy_is_full])
def test_too_little_memory_names_the_knobs(fill, shapes, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "train_step", lambda *_: fill())
    args = ("--data", shapes, "--out", tmp_path, "--steps", 1, "--batch-size", 2)
    assert run("yolos", *args) == 2
    error = one_line(capsys)
    for knob in ("--batch-size", "--set max_size=", "sizes=", "--set checkpoint=true"):
        assert knob in error


def test_a_model_too_large_to_be_built_names_the_knobs(shapes, tmp_path, capsys):
    args = ("--data", shapes, "--out", tmp_path, "--set", "pos_grid=1000000,1000000")
    assert run("yolos", *args) == 2
    assert "not enough memory; give a smaller --batch-size" in one_line(capsys)


def test_a_measure_that_is_not_a_number_spoils_no_best(shapes, tmp_path, monkeypatch):
    measures = iter([0.5, math.nan, 0.6, 0.6])
    monkeypatch.setattr(train, "evaluate", lambda *_: dict(AP=next(measures)))
    args = ("--data", shapes, "--out", tmp_path, "--batch-size", 4)
    for steps in (1, 2, 3, 4):  # of equal ones the longest trained is kept
        more = ["--resume"] if steps > 1 else []
        assert run("yolos", *args, "--epochs", 1, "--steps", steps, *more) == 0
        best = torch.load(tmp_path / "best.pt", weights_only=True)
        assert (best["step"], best["best"]) == [(1, 0.5), (1, 0.5), (3, 0.6), (4, 0.6)][steps - 1]


@pytest.mark.parametrize(
    ("said", "hint"),
    [
        ("Expected more than 1 value per channel when training, got", "a larger --batch-size"),
        ("DataLoader worker (pid 7) is killed by signal: Killed.", "give fewer --workers"),
        ("InvalidCxxCompiler: No working C++ compiler found in", "leave it out"),
        ("Compiler: cl is not found.", "leave it out"),
        ("[pair.cc:547] Connection closed by peer [127.0.0.1]", "another process ended"),
    ],
)
def test_what_torch_says_of_the_users_machine_is_explained(
    said, hint, shapes, tmp_path, monkeypatch, capsys
):
    def fail(*_):
        raise RuntimeError(said)

    monkeypatch.setattr(train, "train_step", fail)
    assert run("yolos", "--data", shapes, "--out", tmp_path, "--steps", 1) == 2
    assert hint in (error := one_line(capsys)) and said in error


def test_half_of_a_torchrun_environment_is_explained(shapes, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run("yolos", "--data", shapes, "--out", tmp_path, "--steps", 1) == 2
    assert "started by torchrun" in one_line(capsys)


@pytest.mark.parametrize("said", ["shapes do not match", "Caught KeyError in DataLoader worker"])
def test_a_bug_keeps_its_traceback(said, shapes, tmp_path, monkeypatch):
    def bug(*_):
        raise RuntimeError(said)

    monkeypatch.setattr(train, "train_step", bug)
    with pytest.raises(RuntimeError, match=said):
        run("yolos", "--data", shapes, "--out", tmp_path, "--steps", 1)


def test_the_seed_decides_the_first_weights():
    args = argparse.Namespace(model="yolos", device=torch.device("cpu"), world=1, set=[], seed=3)
    first, same, other = (
        train.make_net(argparse.Namespace(**vars(args) | dict(seed=seed)), {}, 2).state_dict()
        for seed in (3, 3, 4)
    )
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["backbone.det_token"], other["backbone.det_token"])


def test_processes_and_steps_draw_different_numbers():
    drawn = []

    class Model(torch.nn.Linear):
        def forward(self, images, targets):
            drawn.append(torch.rand(()).item())
            return {"loss": self.weight.sum()}

    model = Model(1, 1)
    optimizer = torch.optim.AdamW([dict(params=model.parameters(), lr_scale=1.0)])
    args = dict(seed=0, lr=0.1, total_steps=9, accumulate=1, world=1, amp="off", skipped=set())
    args |= dict(device=torch.device("cpu"), recipe=dict(warmup=0, schedule="cosine", clip=0))
    for rank, step in ((0, 0), (1, 0), (0, 1), (0, 0)):
        given = argparse.Namespace(**args, rank=rank)
        train.train_step(given, model, optimizer, iter([([], [])]), step)
    assert drawn[0] == drawn[3] and len(set(drawn)) == 3


@pytest.mark.parametrize("amp", ["bf16", "off"])
def test_precision_of_training_is_what_amp_says(amp, shapes, tmp_path, monkeypatch):
    seen, loss = [], simmim.SimMIM.masked_loss

    def watched(*args):
        seen.append(torch.is_autocast_enabled("cpu"))
        return loss(*args)

    monkeypatch.setattr(simmim.SimMIM, "masked_loss", watched)
    args = ("--data", shapes, "--out", tmp_path, "--steps", 1, "--limit", 8, "--amp", amp)
    assert run("simmim", *args) == 0
    assert seen == [amp == "bf16"]


@pytest.mark.parametrize(
    ("given", "rate"), [((), 1e-3), (("--batch-size", 2), 5e-4), (("--lr", 0.3), 0.3)]
)
def test_the_rate_grows_with_the_batch_unless_given(given, rate, shapes, tmp_path):
    assert mimdet.RECIPES["nano"]["lr"] == 1e-3 and mimdet.RECIPES["nano"]["batch_size"] == 4
    assert run("mimdet", "--data", shapes, "--out", tmp_path, "--steps", 1, *given) == 0
    first = log_of(tmp_path)[0]
    assert first["lr"] == pytest.approx(rate) == torch.load(tmp_path / "last.pt")["plan"]["lr"]


def test_compile_is_asked_for(shapes, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda part, **kwargs: compiled.append(type(part))
    )
    args = ("--data", shapes, "--steps", 1, "--limit", 8)
    assert run("simmim", *args, "--out", tmp_path / "a") == 0 and not compiled
    assert run("simmim", *args, "--out", tmp_path / "b", "--compile") == 0
    assert compiled == [simmim.Block] * 2


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ("mimdet", ["drop_path=0.2", "checkpoint=true", "decoder_depth=1"]),
        ("yolos", []),
        ("pvt", []),
        ("pvt", ["head=detr", "design=v2_li"]),
    ],
)
def test_blocks_are_compiled_for_all_sizes_of_images(model, settings, monkeypatch):
    graphs = graphs_of_compiled(monkeypatch)
    net, few = nano(model, settings), [(64, 96), (96, 64), (128, 96)]
    plain = [loss_of_step(net, size) for size in few]
    train.compile_blocks(net)
    assert [loss_of_step(net, size) for size in few] == pytest.approx(plain, abs=1e-4)
    before = len(graphs)
    for size in [(64, 64), (160, 128), (192, 256)]:
        loss_of_step(net, size)
    for_all = model != "pvt" or torch.__version__ >= "2.14"
    assert (len(graphs) == before) == for_all and before > 0


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ("simmim", ["encoder=swin", "img_size=64", "window=4", "depths=1,2", "num_heads=3,6"]),
        ("pvt", ["head=classifier"]),
    ],
)
def test_stages_are_compiled_for_their_size_where_images_have_one(model, settings, monkeypatch):
    if model == "simmim" and torch.__version__ < "2.14":
        pytest.skip("refused before torch 2.14")
    graphs, size = graphs_of_compiled(monkeypatch), (64, 64)
    net = nano(model, settings)
    plain = loss_of_step(net, size)
    train.compile_blocks(net)
    assert loss_of_step(net, size) == pytest.approx(plain, abs=1e-4)
    values = [node.meta.get("example_value") for graph in graphs for node in graph.graph.nodes]
    sides = [side for x in values for side in (x.shape if torch.is_tensor(x) else [x])]
    assert sides and not any(isinstance(side, torch.SymInt) for side in sides)


def test_swin_is_compiled_from_torch_2_14_on(shapes, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch, "__version__", "2.11.0")
    args = ("--data", shapes, "--out", tmp_path, "--set", "encoder=swin", "window=4")
    assert run("simmim", *args, "--compile") == 2
    assert capsys.readouterr().err.endswith(
        "--compile: Swin needs torch 2.14 for it; leave it out\n"
    )


def nano(model, settings):
    module = train.MODELS[model]
    config = train.dataclasses.asdict(module.CONFIGS["nano"])
    train.override(settings, config)
    torch.manual_seed(0)
    return module.build(module.Config(**config), 6)


def graphs_of_compiled(monkeypatch):
    """A list that every module compiled from now on puts its graphs into."""
    graphs, original = [], torch.nn.Module.compile

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    def compile_whole(part, **kwargs):  # what breaks a block into two graphs is an error
        original(part, backend=count, fullgraph=True, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_whole)
    return graphs


def test_compiled_blocks_of_several_processes_train(monkeypatch):
    original = torch.nn.Module.compile
    monkeypatch.setattr(  # traces both passes, as the real compiler does
        torch.nn.Module,
        "compile",
        lambda part, **kwargs: original(part, backend="aot_eager", **kwargs),
    )
    config = replace(mimdet.CONFIGS["nano"], drop_path=0.2)
    train.dist.init_process_group("gloo", store=train.dist.HashStore(), rank=0, world_size=1)
    try:
        net = mimdet.build(config, 6)
        train.compile_blocks(net)
        model = torch.nn.parallel.DistributedDataParallel(net)
        for size in [(64, 96), (96, 64), (128, 96)]:
            assert math.isfinite(loss_of_step(model, size))
    finally:
        train.dist.destroy_process_group()


def loss_of_step(net, size):
    """The sum of the losses of two pictures of this size with an object each."""
    torch.manual_seed(0)
    side = getattr(getattr(net, "config", None), "img_size", None)
    size = (side, side) if side else size
    images = [torch.rand(3, *size) for _ in range(2)]
    masks = torch.rand(1, *size) < 0.5
    target = dict(boxes=torch.tensor([[4.0, 4, 30, 24]]), labels=torch.tensor([2]), masks=masks)
    loss = sum(net(images, [target, target]).values())
    loss.backward()
    return loss.item()


def test_loader_processes_leave_ctrl_c_to_the_main_one(monkeypatch):
    handlers = {}
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    args = argparse.Namespace(workers=1, batch_size=2, device=torch.device("cpu"))
    train.make_loader(args, [0, 1], None).worker_init_fn(0)
    assert handlers == {signal.SIGINT: signal.SIG_IGN}


def test_a_second_ctrl_c_leaves_at_once(monkeypatch, capfd):
    handlers = {}
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    interrupted = train.listen(argparse.Namespace(rank=0))
    handlers[signal.SIGINT]()
    assert interrupted and "Ctrl-C again leaves at once" in capfd.readouterr().err
    with pytest.raises(SystemExit, match="130"):
        handlers[signal.SIGINT]()


def test_images_skipped_by_other_processes_are_listed(monkeypatch, capsys):
    monkeypatch.setattr(train, "gather", lambda args, items: [*items, "b.jpg: broken"])
    train.list_skipped(argparse.Namespace(rank=0, skipped={"a.jpg: broken"}))
    out = capsys.readouterr().out
    assert "2 bad images" in out and "a.jpg" in out and "b.jpg" in out


def end_process(*_):
    os._exit(1)


def test_a_measurement_that_is_ended_ends_in_one_line(shapes, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "measure", end_process)
    monkeypatch.setattr(train, "timings", lambda *_: [1.0])
    args = ("--data", shapes, "--out", tmp_path, "--benchmark")
    assert run("yolos", *args) == 2
    assert "give a smaller --batch-size" in one_line(capsys)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's alone")
def test_memory_of_freed_tensors_is_kept():
    code = """if True:
        import resource, torch, train
        def resident():
            return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
        train.keep_freed_memory()
        before = resident()
        torch.ones(50_000_000)
        assert resident() - before > 100_000_000
    """
    subprocess.run([sys.executable, "-c", code], cwd=Path(train.__file__).parent, check=True)


# --- Seeds, and the same run again ----------------------------------------------------------------


def test_the_seed_decides_the_run(shapes, tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        args = ("--data", shapes, "--steps", 2, "--batch-size", 2, "--out", tmp_path / name)
        assert run("simmim", *args, "--seed", seed) == 0
    assert same(tmp_path / "a", tmp_path / "b")
    a, c = states(tmp_path / "a"), states(tmp_path / "c")
    assert not torch.equal(
        a["encoder.blocks.0.attn.qkv.weight"], c["encoder.blocks.0.attn.qkv.weight"]
    )


@pytest.mark.parametrize(
    "other", [["--epochs", 2], ["--batch-size", 2], ["--limit", 12], ["--accumulate", 3]]
)
def test_another_schedule_is_not_the_same_run(other, finished, shapes, tmp_path, capsys):
    out = shutil.copytree(finished, tmp_path / "run")
    assert run("yolos", "--data", shapes, "--out", out, "--resume", *other, tiny=False) == 2
    error = one_line(capsys)
    assert "6 steps of 4 of 24 images of circle" in error and "give the same --data" in error


@pytest.mark.parametrize("setting", ["lr=0.5", "batch_size=2", "epochs=3"])
def test_what_a_resumed_run_keeps_is_not_set(setting, finished, shapes, tmp_path, capsys):
    out = shutil.copytree(finished, tmp_path / "run")
    args = ("yolos", "--data", shapes, "--out", out, "--resume", "--batch-size", 4, "--steps", 6)
    assert run(*args, "--set", setting) == 2
    assert f"--set {setting.partition('=')[0]}: a resumed run keeps" in one_line(capsys)


def test_the_same_command_goes_on(finished, shapes, tmp_path, capsys):
    args = ["yolos", "--data", shapes, "--out", tmp_path, "--init", finished / "last.pt"]
    args += ["--batch-size", 4, "--epochs", 1, "--set", *TINY_YOLOS, "lr=0.002", "epochs=2.5"]
    args += ["--steps"]
    assert run(*args, 2) == 0 and run(*args, 3, "--resume") == 0
    assert "resuming after step 2" in capsys.readouterr().out


def test_a_resumed_run_keeps_its_schedule_without_being_told(finished, shapes, tmp_path, capsys):
    args = ("--data", shapes, "--out", tmp_path, "--steps", 3)
    first = ("--batch-size", 4, "--epochs", 1, "--lr", 2e-4)
    assert run("yolos", *args, *first) == 0
    capsys.readouterr()
    assert run("yolos", "--data", shapes, "--out", tmp_path, "--resume", tiny=False) == 0
    assert "6 steps of 4 images, 1 epochs; lr 0.0002 (as before)" in capsys.readouterr().out
    assert run("yolos", *args, "--resume", "--lr", 1e-5, tiny=False) == 0
    assert "lr 1e-05 (as given)" in capsys.readouterr().out


def test_what_ended_says_how_it_goes_on(finished, shapes, tmp_path, capsys):
    out = shutil.copytree(finished, tmp_path / "whole")
    assert run("yolos", "--data", shapes, "--out", out, "--resume", tiny=False) == 0
    told = "nothing is left to train; go on "
    assert told + "with --init and another --out" in capsys.readouterr().out
    assert same(out, finished)
    stopped = ("--data", shapes, "--out", tmp_path / "half", "--epochs", 1, "--steps", 1)
    assert run("yolos", *stopped) == 0
    assert run("yolos", *stopped, "--resume") == 0
    assert told + "by more --steps" in capsys.readouterr().out


def test_ctrl_c_is_answered_at_once(finished, shapes, tmp_path, monkeypatch, capfd):
    """In training by a notice before it saves; elsewhere it ends in one line."""

    def interrupted(*_):
        signal.raise_signal(signal.SIGINT)
        assert "saving after this step or evaluation; Ctrl-C again" in capfd.readouterr().err

    monkeypatch.setattr(train, "check_finite", interrupted)
    with pytest.raises(SystemExit, match="130"):
        run("yolos", "--data", shapes, "--out", tmp_path, "--steps", 2, "--batch-size", 4)
    assert (tmp_path / "last.pt").exists()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the run above left its own
    monkeypatch.setattr(train, "evaluate", lambda *_: signal.raise_signal(signal.SIGINT))
    args = ("--data", shapes, "--out", finished, "--eval-only")
    assert run("yolos", *args, tiny=False) == 130
    assert capfd.readouterr().err == "interrupted\n"


# --- Many processes -------------------------------------------------------------------------------


def test_one_process_draws_the_predictions():
    assert train.predict(argparse.Namespace(rank=1), None) is None


def torchrun(*args, processes=2, **kwargs):
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", __file__, *map(str, args)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, **pipes, start_new_session=True)


def without_chance(replace):
    """Take out what differs between one and several processes by design: draws, and BatchNorm.

    SimMIM's masks are those of the pictures, MIMDet's samples the first ones.
    """
    draw = simmim.SimMIM.draw_masks
    replace(simmim.SimMIM, "draw_masks", lambda net, images, _: draw(net, images, True))

    def first(label, total, fraction):
        objects = (label == 1).nonzero()[:, 0][: int(total * fraction)]
        return objects, (label == 0).nonzero()[:, 0][: total - len(objects)]

    replace(mimdet, "subsample", first)
    replace(torch.nn.BatchNorm2d, "train", lambda norm, _=True: torch.nn.Module.train(norm, False))
    replace(train, "evaluate", lambda args, *_: None if args.rank else dict(AP=0.0))


def equal_run(model, data, out, *batches):
    args = ["--data", data, "--out", out, "--steps", 3, "--lr", 1e-4, *batches]
    more = ["sample_ratio=1.0"] if model == "mimdet" else []
    return run(model, *args, "--set", *SETTINGS[model], *more)


@pytest.fixture
def one_size(shapes, tmp_path):
    """The shapes of one size, because RetinaNet and MIMDet see padding; nine images."""
    data = shutil.copytree(shapes, tmp_path / "one size")
    for file in data.glob("annotations/*.json"):
        split = json.loads(file.read_text())
        split["images"] = [x for x in split["images"] if (x["width"], x["height"]) == (128, 160)]
        file.write_text(json.dumps(split))
    return data


def job(data, folder):
    """What each of two processes does: all models in one process group, which starts once."""
    without_chance(setattr)
    if os.environ["RANK"] == "1":
        train.write_whole = die  # rank 0 alone writes
    train.dist.init_process_group("gloo")
    train.dist.init_process_group = train.dist.destroy_process_group = lambda *_: None
    for model in SETTINGS:
        assert equal_run(model, data, Path(folder) / model, "--batch-size", 2) == 0
    parts = ("--batch-size", 1, "--accumulate", 2)
    assert equal_run("simmim", data, Path(folder) / "parts", *parts) == 0
    die() if os.environ["RANK"] == "1" else time.sleep(600)


@pytest.mark.slow
def test_two_processes_equal_one_with_the_larger_batch(one_size, tmp_path, monkeypatch):
    """And one that dies ends the job, though the other one would wait."""
    without_chance(monkeypatch.setattr)
    began, process = time.time(), torchrun("job", one_size, tmp_path)
    output = process.communicate(timeout=300)
    assert process.returncode == 1 and "exitcode  : -9" in output[1], output
    assert time.time() - began < 200
    for model in SETTINGS:
        assert equal_run(model, one_size, tmp_path / "one" / model, "--batch-size", 4) == 0
        assert same(tmp_path / "one" / model, tmp_path / model, 1e-5)
        logs = zip(log_of(tmp_path / model), log_of(tmp_path / "one" / model), strict=True)
        for two, one in logs:
            losses = {name: value for name, value in one.items() if name.startswith("loss")}
            assert losses == pytest.approx({name: two[name] for name in losses}, abs=1e-5)
    assert same(tmp_path / "one/simmim", tmp_path / "parts", 1e-5)


def long_run(shapes, out):
    """A run that says who is rank 1 and takes its time to save."""
    if os.environ["RANK"] == "1":
        print("rank 1 is", os.getpid(), flush=True)
    save = torch.save
    train.torch.save = lambda *args: (time.sleep(2), save(*args))
    args = ("--data", shapes, "--out", out, "--steps", 10**6, "--batch-size", 2)
    sys.exit(run("simmim", *args))


@pytest.mark.slow
def test_an_interrupted_rank_makes_all_save_and_any_number_go_on(shapes, tmp_path, capsys):
    process = torchrun("long_run", shapes, tmp_path)
    lines = iter(process.stdout.readline, "")
    rank_1 = next(int(line.split()[-1]) for line in lines if line.startswith("rank 1 is"))
    next(line for line in lines if line.startswith("step "))
    os.kill(rank_1, signal.SIGINT)
    output = process.communicate(timeout=100)
    done = int(re.search(r"interrupted after step (\d+)", output[0])[1])
    assert process.returncode == 1 and "exitcode  : 130" in output[1]
    assert run("simmim", "--data", shapes, "--out", tmp_path, "--resume", "--steps", done + 2) == 0
    assert f"{done + 2} steps of 4 images" in capsys.readouterr().out


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
