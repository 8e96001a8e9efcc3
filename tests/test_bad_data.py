"""What a user hands in: each case works, or ends in one line and exit code 2."""

import argparse
import dataclasses
import io
import itertools
import json
import re
import shutil
import signal

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as mask_api
from test_coco import PLAIN, annotation, truth_as_results
from test_train import TINY, TINY_PVT, TINY_SIMMIM, TINY_YOLOS, same_weights
from torchvision.ops import box_convert, generalized_box_iou

import coco
import mimdet
import train
import yolos

MODELS = {
    "mimdet": ["mimdet", *TINY],
    "yolos": ["yolos", *TINY_YOLOS],
    "retinanet": ["pvt", *TINY_PVT, "head_depth=1"],
    "detr": ["pvt", *TINY_PVT, "head_depth=1", "head=detr"],
    "classifier": ["pvt", *TINY_PVT, "head=classifier"],
    "semantic": ["pvt", *TINY_PVT, "head=semantic"],
    "simmim": ["simmim", *TINY_SIMMIM],
}
SQUARE = [5, 6, 20, 6, 20, 26, 5, 26]
LENGTHS = [206, *[20, 20] * 14, 20, 1614]  # the same as run lengths
WHOLE = mask_api.frPyObjects(dict(counts=[0, 2400], size=[40, 60]), 40, 60)["counts"].decode()


def run(root, model="yolos", *words):
    """Train for a step, or as words say, and evaluate; returns the exit code."""
    name, *fields = MODELS[model]
    args = ["--model", name, "--device", "cpu", "--amp", "off", "--batch-size", "2", "--workers=0"]
    args += ["--data", root, "--out", root.parent / "run", "--steps=1", *words, "--set", *fields]
    return train.main([str(arg) for arg in args])


def one_line(capsys):
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and error.endswith("\n")
    return error


@pytest.fixture
def data_set(write_coco):
    """Write four pictures with two objects each as both splits; change the json on the way."""

    def write(change=None, size=(40, 60)):
        h, w = size
        noise = torch.randint(256, (4, 3, h, w), generator=torch.Generator().manual_seed(0))
        images = {f"{i}.png": picture for i, picture in enumerate(noise.byte())}
        rows = []
        for i, x in itertools.product(range(4), (0, 20)):
            bbox, polygon = [5 + x, 6, 15, 20], [v + x * (k % 2 == 0) for k, v in enumerate(SQUARE)]
            if size != (40, 60):
                bbox, polygon = [0, 0, w, h], [0, 0, w, 0, w, h, 0, h]
            rows.append(annotation(len(rows) + 1, bbox, 9 if x else 7, i, segmentation=[polygon]))
        for split in ("train", "valid"):
            root = write_coco(rows, images, split=split)
            file = root / split / "_annotations.coco.json"
            data = json.loads(file.read_text())
            changed = change(data) if change else None
            file.write_bytes(changed if isinstance(changed, bytes) else json.dumps(data).encode())
        return root

    return write


def put(**lists):
    return lambda data: data.update(lists)


def first(kind, **fields):
    return lambda data: data[kind][0].update(fields)


# --- The json -------------------------------------------------------------------------------------

NUMBERLESS = "annotation 1: a bbox has not four numbers x, y, width, height in pixels"
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: b"", "not a COCO annotation file: Expecting value"),
        (lambda data: b"\xff", "not a COCO annotation file: .* codec can't decode"),
        (lambda data: b"[" * 10**5, "not a COCO annotation file: maximum recursion depth"),
        (lambda data: b"5", '"images" is no list of entries'),
        (put(images=None), '"images" is no list of entries'),
        (put(categories={}), '"categories" is no list of entries'),
        (put(annotations=[5]), '"annotations" is no list of entries'),
        (lambda data: data.pop("images"), "lists no images"),
        (put(categories=[]), "lists no categories"),
        (first("images", id="0"), r"image 0 has no whole number as id \(id: '0'\)"),
        (first("images", id=1), "two of its images have the same id"),
        (first("images", width="60"), r"image 0 has no width or height .*\(width: '60'\)"),
        (first("images", height=NAN), "image 0 has no width or height in whole pixels"),
        (first("images", width=10**400), "image 0 has no width or height in whole pixels"),
        (lambda data: data["images"][0].pop("file_name"), "image 0 has no file name inside"),
        (first("images", file_name=5), "image 0 has no file name inside the folder of images"),
        (first("images", file_name=""), "cannot read image .*s a directory"),
        (first("images", file_name="x" * 5000), "cannot read image .no such file"),
        (first("images", file_name="a\0b\nc"), "cannot read image .no such file"),
        (first("categories", id="7"), "category 7 has no whole number as id"),
        (first("categories", id=7), "two of its categories have the same id"),
        (first("categories", name=5), "category 9 has no text as name"),
        (first("annotations", image_id="0"), "annotation 1 has no whole number as image_id"),
        (first("annotations", category_id=[7]), "annotation 1 has no whole number as category_id"),
        (first("annotations", bbox=None), NUMBERLESS),
        (first("annotations", bbox=["5", 5, 9, 9]), NUMBERLESS),
        (first("annotations", bbox=[5, 5, NAN, 9]), NUMBERLESS),
        (first("annotations", bbox=[5, 5, INF, 9]), NUMBERLESS),
        (first("annotations", bbox=[5, 5, 10**400, 9]), NUMBERLESS),
        (first("annotations", bbox=[5, 5, 9]), NUMBERLESS),
        (first("annotations", area="300"), "annotation 1 has no number of pixels as area"),
        (first("annotations", area=NAN), "annotation 1 has no number of pixels as area"),
        (first("annotations", iscrowd="0"), "annotation 1 has neither 0 nor 1 as iscrowd"),
    ],
)
def test_a_broken_entry_is_named_in_one_line(data_set, capsys, change, message):
    root = data_set(change)
    assert run(root) == 2
    error = one_line(capsys)
    assert re.search(message, error) and str(root) in error


def lengths(counts, size=(40, 60)):
    return dict(counts=counts, size=list(size))


@pytest.mark.parametrize(
    "segmentation",
    [
        [[5, 5, 20, 20]],
        [SQUARE[:7]],
        SQUARE,
        [SQUARE, 5],
        [[str(v) for v in SQUARE]],
        [[NAN, *SQUARE[1:]]],
        [[1e9, *SQUARE[1:]]],
        "polygon",
        {},
        lengths([2399]),
        lengths([2401]),
        lengths([10, -20, 2410]),
        lengths(["2400"]),
        lengths(None),
        lengths([2400], ["40", "60"]),
        lengths([2400], [2400]),
        lengths("zzz"),
        lengths("\u00e9~!"),
        lengths(WHOLE[:-1]),
        lengths(WHOLE + "P"),  # the beginning of another number
        lengths(WHOLE.replace("P", "p")),  # the same 5 bits
        lengths([0, 600], [20, 30]),
    ],
)
@pytest.mark.parametrize("iscrowd", [0, 1])
def test_masks_that_cannot_be_drawn_are_named_in_one_line(data_set, capsys, segmentation, iscrowd):
    """pycocotools crashes on some, and on others never ends."""
    root = data_set(first("annotations", segmentation=segmentation, iscrowd=iscrowd))
    assert run(root, "mimdet") == 2
    message = r"the mask of annotation 1 has size \[20, 30\], image 0 \[40, 60\]"
    if segmentation != lengths([0, 600], [20, 30]):
        message = "annotation 1 has neither polygons of three points or more nor run lengths of as"
    assert re.search(message, one_line(capsys))


def test_files_and_folders_that_are_missing_are_said(data_set, tmp_path, capsys):
    for folder in (tmp_path / "nowhere", tmp_path):
        assert run(folder) == 2
        assert f"{folder}: no train split; expected " in one_line(capsys)
    root = data_set()
    shutil.rmtree(root / "valid")
    assert run(root) == 2
    assert f"{root}: no val split; expected " in one_line(capsys)


@pytest.mark.parametrize("name", ["../../secret.png", "a/../../../secret.png", "/secret.png"])
def test_file_names_cannot_lead_out_of_the_folder(data_set, tmp_path, capsys, name):
    outside = f"{tmp_path}{name}" if name[0] == "/" else name
    root = data_set(first("images", file_name=outside))
    shutil.copy(root / "train/0.png", tmp_path / "secret.png")
    (root / "train/a").mkdir()
    assert run(root, "yolos", "--skip-bad-images") == 2
    message = "image 0 has no file name inside the folder of images (file_name: "
    assert message in one_line(capsys)


def test_images_may_lie_in_folders_below(data_set):
    root = data_set(first("images", file_name="more/0.png"))
    for split in ("train", "valid"):
        (root / split / "more").mkdir()
        (root / split / "0.png").rename(root / split / "more/0.png")
    assert run(root) == 0


def no_extras(data):
    for a in data["annotations"]:
        del a["segmentation"]


def extras_are_null(data):
    for a in data["annotations"]:
        a |= dict(segmentation=None, area=None, iscrowd=None)


def gaps(data):
    data["categories"] = [dict(id=i, name=str(i)) for i in (7, 90000, 9, 0, -4)]


def lvis(data):
    data["categories"] = [dict(id=i, name=f"kind {i}") for i in range(1, 1204)]
    data["annotations"][0]["category_id"] = 1203


def one_category(data):
    data["categories"] = data["categories"][1:]
    for a in data["annotations"]:
        a["category_id"] = 7


def crowded(data):
    places = [[x, y, 4, 4] for x, y in itertools.product(range(25), range(20))]
    data["annotations"] += [annotation(100 + i, box) for i, box in enumerate(places)]
    assert len(data["annotations"]) == 508


@pytest.mark.parametrize(
    ("change", "note"),
    [
        (lambda data: b"\xef\xbb\xbf" + json.dumps(data).encode(), "8 objects, 2 classes"),
        (lambda data: json.dumps(data).encode("utf-16"), "8 objects, 2 classes"),
        (no_extras, "8 objects, 2 classes"),
        (extras_are_null, "8 objects, 2 classes"),
        (gaps, "8 objects, 5 classes"),
        (lvis, "8 objects, 1203 classes"),
        (one_category, "8 objects, 1 classes"),
        (crowded, "508 objects, 2 classes; 500 objects have no segmentation"),
        (lambda data: data.pop("annotations"), "0 objects, 2 classes"),
        (put(annotations=[annotation(1, [5, 5, 9, 9])]), "1 objects, 2 classes"),
        (
            first("annotations", image_id=9),
            "7 objects, 2 classes; 1 annotations of unknown images or categories dropped",
        ),
        (
            first("annotations", category_id=3),
            "7 objects, 2 classes; 1 annotations of unknown images or categories dropped",
        ),
    ],
)
@pytest.mark.parametrize("model", ["yolos", "mimdet"])  # yolos: 9 [DET] tokens
def test_odd_data_sets_train(data_set, capsys, change, note, model):
    root = data_set(change)
    assert run(root, model) == 0
    assert f"train: 4 images, {note}" in (out := capsys.readouterr().out)
    empty = note.startswith("0 objects")
    assert ("AP n/a" in out) == empty
    result = json.loads((root.parent / "run/result.json").read_text())
    assert (result["AP"] == -1) == empty


@pytest.mark.parametrize("model", ["retinanet", "detr", "semantic"])
@pytest.mark.parametrize("count", [0, 1])
def test_images_without_objects_train_every_head(data_set, model, count):
    rows = [annotation(1, [5, 6, 15, 20], segmentation=[SQUARE])]
    assert run(data_set(put(annotations=rows[:count])), model) == 0


def test_pictures_need_no_categories(data_set):
    root = data_set(put(annotations=[], categories=[]))
    assert run(root, "simmim") == run(root, "simmim", "--resume") == 0


def test_a_classifier_needs_objects(data_set, capsys):
    assert run(data_set(put(annotations=[])), "classifier") == 2
    assert "no objects to classify" in one_line(capsys)


# --- Boxes and masks ------------------------------------------------------------------------------

NOWHERE = [
    [5, 5, 0, 10],
    [5, 5, 10, 0],
    [25, 25, -20, -20],
    [70, 5, 5, 5],
    [-50, -50, 20, 20],
    [0, 0, 1e-30, 1e-30],  # whose overlap with every anchor is 0
]


def test_boxes_without_area_count_neither_in_training_nor_in_evaluation(data_set, capsys):
    def add(data):
        data["annotations"] += [annotation(20 + i, box) for i, box in enumerate(NOWHERE)]
        data["annotations"][0]["bbox"] = [-5, -5, 20, 20]

    root = data_set(add)
    dataset = coco.CocoDataset(root, "val")
    assert "6 boxes without area inside their image dropped" in dataset.notes
    assert dataset.has_masks and dataset[0][1]["boxes"].tolist()[0] == [0, 0, 15, 15]
    metrics = coco.evaluate(dataset, truth_as_results(dataset))
    assert [metrics["AP"], metrics["mask_AP"]] == pytest.approx([1, 1])
    assert run(root, "mimdet") == run(root, "classifier", "--out", root / "run") == 0


def test_run_lengths_and_polygons_of_every_writing_are_one_mask(data_set):
    packed = mask_api.frPyObjects(lengths(LENGTHS), 40, 60)["counts"].decode()
    writings = [[[5, 5, 9, 9], SQUARE, []], lengths(LENGTHS), lengths(packed)]
    expected = torch.zeros(40, 60, dtype=torch.bool)
    expected[6:26, 5:20] = True
    for segmentation in writings:
        dataset = coco.CocoDataset(data_set(first("annotations", segmentation=segmentation)), "val")
        assert torch.equal(dataset[0][1]["masks"][0], expected)


def test_run_lengths_written_longer_than_needed_are_refused(data_set, capsys):
    """pycocotools reads other numbers than they say, or never ends."""
    counts = "Xo0le0hb0X]oooooO"
    assert not coco.is_mask(dict(size=[40, 60], counts=counts))
    segmentation = dict(size=[40, 60], counts=counts)
    assert run(data_set(first("annotations", segmentation=segmentation)), "mimdet") == 2
    assert "annotation 1" in one_line(capsys)


def test_a_polygon_outside_its_image_is_no_object(data_set):
    away = [[100, 100, 120, 100, 120, 120]]
    root = data_set(first("annotations", segmentation=away))
    assert len(coco.CocoDataset(root, "val")[0][1]["labels"]) == 1
    assert run(root, "mimdet") == 0


def test_a_corner_far_away_ends_no_process():
    """As many pixels away as an enlarged image makes of a million pycocotools crashes."""
    far = np.array([[10, 10], [1e9, 10], [1e9, 1e9], [10, 1e9]])
    boxes = torch.tensor([[10.0, 10, 60, 40]])
    _, target = coco.finish(torch.zeros(3, 40, 60), dict(boxes=boxes, polygons=[[far]]))
    assert target["masks"].sum() == 50 * 30


# --- Images ---------------------------------------------------------------------------------------


def saved(format, **kwargs):
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    PIL.Image.fromarray(noise).save(file, format, **kwargs)
    return file.getvalue()


def damaged_exif():
    """A rotation, and a tag of another type than Pillow can write back."""
    exif = PIL.Image.Exif()
    exif[274], exif[256] = 6, 7
    content = saved("JPEG", exif=exif)
    place = content.index(b"\x01\x00\x00", 30)
    return content[: place + 2] + b"\x00\x02" + content[place + 4 :]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<svg/>",
        None,  # a folder
        *(saved(kind)[: part // 10] for kind in ("PNG", "JPEG") for part in (9, 9000)),
        saved("WEBP")[:500],
        saved("BMP")[:500],
        saved("PNG")[:16] + b"\x7f\xff\xff\xff" * 2 + saved("PNG")[24:],  # side of 2^31 - 1
        damaged_exif(),
    ],
)
def test_files_that_are_no_images_are_said(tmp_path, content):
    path = tmp_path / "a.png"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(coco.DataError, match="a.png: cannot read image .*; replace or remove it"):
        coco.read_image(path)


def test_a_picture_that_is_a_program_is_not_run(tmp_path):
    """Pillow hands EPS over to Ghostscript, whatever the file's name is."""
    (tmp_path / "a.png").write_bytes(saved("EPS"))
    with pytest.raises(coco.DataError, match="cannot identify image file"):
        coco.read_image(tmp_path / "a.png")


def test_one_tiny_picture_at_a_time_is_too_little_for_batchnorm(data_set, capsys):
    assert run(data_set(size=(32, 32)), "mimdet", "--batch-size", "1") == 2
    assert "too little for BatchNorm; give a larger --batch-size or --set sizes" in one_line(capsys)


def test_messages_hold_nothing_that_a_screen_obeys(data_set, capsys):
    root = data_set(first("images", file_name="\x1b[2Ja.png"))
    assert run(root) == 2
    assert r"/\x1b[2Ja.png: cannot read" in one_line(capsys)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1", "CMYK", "I;16"])
def test_pictures_of_every_kind_train(data_set, mode):
    root = data_set()
    for path in root.glob("*/*.png"):
        picture = PIL.Image.open(path).convert("L" if mode == "I;16" else mode)
        if mode == "I;16":
            picture = PIL.Image.fromarray(np.asarray(picture).astype(np.uint16) * 257)
        picture.save(path, "JPEG" if mode == "CMYK" else "PNG")
    assert run(root) == 0


@pytest.mark.parametrize("size", [(1, 1), (4000, 1), (1, 4000)])
@pytest.mark.parametrize("model", MODELS)
def test_the_smallest_and_thinnest_pictures_train(data_set, model, size):
    assert run(data_set(size=size), model) == 0


# --- Skipping -------------------------------------------------------------------------------------


def spoil(root, *names):
    for name in names:
        (root / name).write_bytes(saved("PNG")[:900])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("model", ["yolos", "simmim"])
def test_bad_images_are_skipped_and_listed(data_set, capsys, model, workers):
    root = data_set()
    spoil(root, "train/1.png", "train/2.png", "valid/0.png")
    words = ("--epochs", 2, "--steps", 4, "--workers", workers)
    assert run(root, model, *words, "--skip-bad-images") == 0
    out = capsys.readouterr().out
    listed = re.findall(r"^  .*/(.*/.*png): cannot read image .*; replace or remove it$", out, re.M)
    assert listed == ["train/1.png", "train/2.png", "valid/0.png"]
    assert "3 bad images skipped (in AP their objects count as missed, other" in out
    assert json.loads((root.parent / "run/result.json").read_text())["images_seen"] == 8


@pytest.mark.parametrize("image", ["train/1.png", "valid/0.png"])
def test_without_the_option_a_bad_image_ends_the_run(data_set, capsys, image):
    root = data_set()
    spoil(root, image)
    assert run(root, "yolos", "--epochs", 1, "--steps", 2) == 2
    assert f"{root / image}: cannot read image (image file is truncated" in one_line(capsys)


def test_skipping_is_repeatable_and_resumes_exactly(data_set):
    root = data_set()
    spoil(root, "train/3.png", "train/1.png")
    for name, *words in (["whole"], ["parts", "--steps", 3], ["parts", "--resume"]):
        words = ("--epochs", 2, "--skip-bad-images", "--out", root.parent / name, *words)
        assert run(root, "yolos", "--steps", 4, *words) == 0
    same_weights(root.parent / "whole", root.parent / "parts")


def test_the_next_image_stands_in_and_the_skipped_one_finds_nothing(data_set, capsys):
    root = data_set()
    spoil(root, "valid/3.png", "valid/0.png")
    dataset = coco.CocoDataset(root, "val", coco.Transform(PLAIN, True))
    dataset.skip_bad = True
    (image, target), (other, _) = dataset[3, 5], dataset[1, 5]
    assert torch.equal(image, other) and target["image_id"] == 1
    assert ["3.png" in target["skipped"][0], "0.png" in target["skipped"][1]] == [True, True]
    assert run(root, "yolos", "--skip-bad-images") == 0
    found = json.loads((root.parent / "run/detections.json").read_text())
    assert sorted(result["image_id"] for result in found) == [1] * 9 + [2] * 9  # [DET] tokens
    spoil(root, "valid/1.png", "valid/2.png")
    capsys.readouterr()
    assert run(root, "yolos", "--skip-bad-images", "--out", root.parent / "none") == 2
    assert "cannot read image" in one_line(capsys)


def test_an_evaluation_without_a_picture_to_draw(data_set, write_coco):
    """The pictures to draw are the first eight."""
    images = {f"{i}.png": torch.zeros(3, 40, 60).byte() for i in range(9)}
    write_coco([], images, split="valid")
    root = write_coco([], images)
    spoil(root, *(f"valid/{i}.png" for i in range(8)))
    assert run(root, "yolos", "--skip-bad-images") == 0


def test_an_interrupted_run_lists_what_it_skipped(data_set, capsys, monkeypatch):
    root = data_set()
    spoil(root, *(f"train/{i}.png" for i in range(3)))
    check = train.check_finite
    interrupt = lambda *args: (signal.raise_signal(signal.SIGINT), check(*args))  # noqa: E731
    monkeypatch.setattr(train, "check_finite", interrupt)
    with pytest.raises(SystemExit) as leaving:
        run(root, "yolos", "--steps", 9, "--skip-bad-images")
    assert leaving.value.code == 130 and "bad images skipped" in capsys.readouterr().out


# --- Settings -------------------------------------------------------------------------------------


def odd_values(old):
    if isinstance(old, tuple):
        return ["", "1", "1.5,2", *(",".join([x] * len(old)) for x in "013")]
    return {bool: ["true"], int: ["0", "1", "3"], float: ["0", "1.5"], str: ["x"]}[type(old)]


STAGES = "patch=4 mask_patch=16 depths=1,1 num_heads=1,2".split()
FIELDS = MODELS | {
    "trans2seg": ["pvt", *TINY_PVT, "head=trans2seg"],
    "v2": ["pvt", *TINY_PVT, "head=classifier", "design=v2_li"],
    "plain": ["yolos", *TINY_YOLOS, "stem=patch", "reference_points=false"],
    "patches": ["mimdet", *TINY, "stem=patch", "fill=mask"],
    "beit": ["simmim", *TINY_SIMMIM, "encoder=beit", "target=bins8"],
    "swin": ["simmim", *TINY_SIMMIM, "encoder=swin", "window=4", *STAGES, "img_size=96"],
    "swin_v2": ["simmim", *TINY_SIMMIM, "encoder=swin_v2", "window=4", "task=classify", *STAGES],
}


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize("name", FIELDS)
def test_any_value_of_a_field_makes_a_model_that_learns_or_is_refused(name):
    model, *fields = FIELDS[name]
    usual, learned = dataclasses.asdict(train.MODELS[model].CONFIGS["nano"]), 0
    train.override(fields, usual)
    for field, text in ((f, text) for f, old in usual.items() for text in odd_values(old)):
        config, given = dict(usual), [f"{field}={text}"]
        about = dict(model=model, seed=0, world=1, device=torch.device("cpu"), set=given)
        try:
            train.override(given, config)
            train.check_numbers(config)
            net = train.make_net(argparse.Namespace(**about), config, 2)
        except coco.DataError as error:
            assert str(error).startswith(f"--set {field}")
            continue
        h, w = [config["img_size"]] * 2 if model == "simmim" else (48, 64)
        masks = torch.zeros(1, h, w, dtype=torch.bool)
        masks[0, 6:30, 5:25] = True
        target = dict(boxes=torch.tensor([[5.0, 6, 25, 30]]), labels=torch.tensor([1]), image_id=1)
        target |= dict(masks=masks, semantic=masks[0].long())
        images = [torch.rand(3, h, w), torch.rand(3, h, w)]
        if getattr(net, "wants_pictures", False):
            net.prepare(images)
        loss = sum(net(images, [target, target]).values())
        loss.backward()
        grads = [p.grad for p in net.parameters() if p.grad is not None]
        assert loss.isfinite() and all(g.isfinite().all() for g in grads), given
        assert any(g.any() for g in grads), given
        with torch.inference_mode():
            answers = [value for answer in net.eval()(images) for value in answer.values()]
        assert all(value.isfinite().all() for value in answers), given
        learned += 1
    assert learned >= 14


# --- Properties -----------------------------------------------------------------------------------

quick = settings(derandomize=True, deadline=None, max_examples=60, database=None)
place, side = st.floats(-300, 300, width=32), st.floats(0.0625, 300, width=32)


def boxes(low=1, high=6, place=place, side=side):
    """Boxes (M, 4) xyxy."""
    rows = st.lists(st.tuples(place, place, side, side), min_size=low, max_size=high)
    return rows.map(lambda rows: box_convert(torch.tensor(rows).reshape(-1, 4), "xywh", "xyxy"))


@quick
@given(boxes(3, 3), boxes(3, 3, side=st.floats(8, 300, width=32)))
def test_boxes_come_back_from_their_offsets(wanted, anchors):
    for weights in ((1.0, 1.0), mimdet.BOX_WEIGHTS):
        offsets = mimdet.encode_boxes(wanted, anchors, weights)
        found = mimdet.decode_boxes(offsets, anchors, weights)
        torch.testing.assert_close(found, wanted, atol=2e-3, rtol=1e-4)


@quick
@given(boxes(0), st.integers(1, 90), st.integers(1, 90))
def test_what_is_left_of_objects_lies_in_the_image_and_has_area(corners, h, w):
    labels = torch.arange(len(corners))
    image = coco.tv_tensors.Image(torch.zeros(3, h, w, dtype=torch.uint8))
    _, target = coco.finish(image, dict(boxes=corners, labels=labels))
    left = target["boxes"]
    assert (left >= 0).all() and (left[:, ::2] <= w).all() and (left[:, 1::2] <= h).all()
    assert (left[:, 2:] > left[:, :2]).all()
    x0, y0, x1, y1 = corners.unbind(1)
    inside = (x1.clamp(max=w) > x0.clamp(min=0)) & (y1.clamp(max=h) > y0.clamp(min=0))
    assert target["labels"].tolist() == labels[inside].tolist()


@quick
@given(st.data(), st.integers(1, 40), st.integers(1, 40))
def test_run_lengths_are_read_as_pycocotools_writes_them(data, h, w):
    bits = data.draw(st.integers(0, 2 ** (h * w) - 1))
    mask = np.array([bits >> i & 1 for i in range(h * w)], dtype=np.uint8).reshape(h, w, order="F")
    text = mask_api.encode(np.asfortranarray(mask))["counts"].decode()
    runs = [len([*group]) for _, group in itertools.groupby(mask.flatten(order="F"))]
    assert coco.run_lengths(text) == [0] * int(mask[0, 0]) + runs
    assert coco.is_mask(dict(counts=text, size=[h, w]))
    place = data.draw(st.integers(0, len(text) - 1))
    changed = text[:place] + data.draw(st.characters(max_codepoint=200)) + text[place + 1 :]
    damaged = dict(counts=changed, size=[h, w])
    if coco.is_mask(damaged):  # what passes can be drawn
        assert mask_api.decode(damaged).max() <= 1 and mask_api.iou([damaged], [damaged], [0]).any()


cells = st.integers(1, 60)


@quick
@given(cells, cells, cells, cells, st.integers(0, 2**16))
def test_masks_survive_cropping_and_pasting(x0, y0, w, h, seed):
    """Of a box cut by a line, whatever their sizes."""
    size, box = (130, 130), torch.tensor([[x0, y0, x0 + w, y0 + h]]).float()
    random = torch.Generator().manual_seed(seed)
    cx, cy = torch.rand(2, generator=random)
    y, x = torch.meshgrid(torch.arange(130) + 0.5, torch.arange(130) + 0.5, indexing="ij")
    inside = (x > x0) & (x < x0 + w) & (y > y0) & (y < y0 + h)
    whole = inside & ((x - x0) / w - cx + ((y - y0) / h - cy) * 0.7 < 0.3)
    crop = mimdet.crop_masks(whole[None], torch.tensor([0]), box)  # (1, 28, 28)
    pasted = mimdet.paste_masks(crop.float(), box, size)[0]
    assert not (pasted & ~inside).any()
    assert (pasted != whole).sum() <= (w + h) / 4 * max(1, w / 28, h / 28)  # along its edge


@quick
@given(
    boxes(0, 5, st.integers(0, 40).map(float), st.integers(1, 40).map(float)),
    boxes(1, 12, st.integers(0, 40).map(float), st.integers(1, 40).map(float)),
    st.booleans(),
)
def test_matching_is_what_the_rule_says(targets, anchors, rescue):
    matched, label = mimdet.match(anchors, targets, 0.3, 0.7, rescue)

    def iou(a, b):
        w = min(a[2], b[2]) - max(a[0], b[0])
        h = min(a[3], b[3]) - max(a[1], b[1])
        both = max(0, w) * max(0, h)
        return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)

    table = [[iou(a, t) for t in targets.tolist()] for a in anchors.tolist()]
    for i, row in enumerate(table):
        best = max(row, default=0)
        rescued = rescue and any(row[t] >= max(r[t] for r in table) - 1e-6 for t in range(len(row)))
        unsure = min(abs(best - 0.3), abs(best - 0.7)) < 1e-6
        expected = 1 if rescued or best >= 0.7 else -1 if best >= 0.3 else 0
        assert unsure or label[i] == expected
        assert not row or row[matched[i]] >= best - 1e-6


@quick
@given(st.integers(1, 5), st.integers(0, 5), st.booleans(), st.integers(0, 2**16))
def test_hungarian_matching_is_one_to_one_and_the_cheapest(queries, objects, standing, seed):
    random = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.rand(*shape, generator=random)  # noqa: E731
    logits, found, wanted = draw(1, queries, 4) * 9, draw(1, queries, 4), draw(objects, 4)
    labels = (draw(objects) * 3).long()
    points = draw(queries, 2) if standing else None
    target = dict(labels=labels, boxes_norm=wanted)
    ((query, item),) = yolos.hungarian_match(logits, found, [target], points)
    assert len({*query.tolist()}) == len({*item.tolist()}) == len(query) == min(queries, objects)
    corners = (box_convert(x, "cxcywh", "xyxy") for x in (found[0], wanted))
    cost = 5 * torch.cdist(found[0], wanted, p=1) - 2 * generalized_box_iou(*corners)
    cost = cost - logits[0].softmax(dim=1)[:, labels]
    if standing:
        cost = cost + 20 * torch.cdist(points, wanted[:, :2])
    few, many = sorted((cost, cost.T), key=len)[:2]
    cheapest = min(
        sum(few[i, j].item() for i, j in enumerate(order))
        for order in itertools.permutations(range(few.shape[1]), len(few))
    )
    assert cost[query, item].sum().item() == pytest.approx(cheapest, abs=1e-3)
