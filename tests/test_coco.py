"""Reading, transforming, batching, evaluating and generating COCO-format data."""

import argparse
import pickle
import shutil

import numpy as np
import PIL.Image
import PIL.ImageColor
import pytest
import torch
from torchvision import tv_tensors

import coco
from coco import DataError
from train import make_loader

PLAIN = dict(sizes=(), max_size=1000, multiple=1, crop=())
GREY = torch.full((3, 40, 60), 128, dtype=torch.uint8)
SQUARE = [10, 10, 30, 10, 30, 30, 10, 30]


def annotation(i, bbox, category_id=7, image_id=0, **more):
    return dict(id=i, image_id=image_id, category_id=category_id, bbox=bbox) | more


# --- Read -----------------------------------------------------------------------------------------


def test_labels_are_contiguous_boxes_clipped_and_bad_ones_counted(write_coco):
    root = write_coco(
        [
            annotation(0, [10, 10, 20, 20], 7),
            annotation(1, [50, 30, 20, 20], 9),
            annotation(2, [5, 5, 0, 10]),
            annotation(3, [70, 5, 5, 5]),
            annotation(
                4, [0, 0, 40, 40], iscrowd=1, segmentation={"counts": [0, 2400], "size": [40, 60]}
            ),
        ],
        {"a.png": GREY},
    )
    dataset = coco.CocoDataset(root, "train")
    image, target = dataset[0]
    assert image.shape == (3, 40, 60) and image.max() == 128 / 255
    assert target["labels"].tolist() == [0, 1]
    assert target["boxes"].tolist() == [[10, 10, 30, 30], [50, 30, 60, 40]]
    assert not dataset.has_masks and "masks" not in target
    assert dataset.notes == [
        "1 images, 2 objects, 2 classes",
        "1 crowd regions count in evaluation only",
        "2 boxes without area inside their image dropped",
    ]


def test_polygons_and_run_lengths_give_the_same_mask(write_coco):
    counts = [10 * 40 + 10] + [20, 20] * 19 + [20, 40 * 60 - (29 * 40 + 30)]
    root = write_coco(
        [
            annotation(0, [10, 10, 20, 20], segmentation=[SQUARE]),
            annotation(1, [10, 10, 20, 20], segmentation={"counts": counts, "size": [40, 60]}),
        ],
        {"a.png": GREY},
    )
    masks = coco.CocoDataset(root, "train")[0][1]["masks"]
    expected = torch.zeros(40, 60, dtype=torch.bool)
    expected[10:30, 10:30] = True
    assert (masks == expected).all() and masks.dtype == torch.bool


@pytest.mark.parametrize(
    "recipe",
    [
        dict(),
        dict(sizes=(97,), max_size=200),
        dict(sizes=(30, 60), crop=(20, 50)),
        dict(crop=(25,)),
    ],
)
def test_polygons_follow_the_image_as_their_masks_would(write_coco, recipe):
    angles = np.linspace(0, 2 * np.pi, 12, endpoint=False)
    radii = 160 * np.array([1, 0.5] * 6)[:, None]
    star = np.stack([np.cos(angles), np.sin(angles)], 1) * radii + [303.4, 196.2]
    polygons = [star.flatten().tolist(), [20, 30, 125.5, 40, 80, 150]]  # one object of two parts
    objects = [annotation(0, [20, 30, 450, 330], segmentation=polygons)]
    root = write_coco(objects, {"a.png": torch.zeros(3, 400, 600, dtype=torch.uint8)})
    drawn, cut = coco.CocoDataset(root, "train"), coco.CocoDataset(root, "train")
    truth = torch.from_numpy(cut.truth.annToMask(cut.objects[0][0]))
    for a in cut.objects[0]:  # the same object by its run lengths, which are resized as pictures
        a["segmentation"] = cut.truth.annToRLE(a)
    assert torch.equal(drawn[0][1]["masks"][0], truth.bool())
    task = "segment" if len(recipe.get("crop", ())) == 1 else "detect"
    for dataset in (drawn, cut):
        dataset.transform = coco.Transform(PLAIN | recipe, True, task)
    for seed in range(12):
        (image, found), (_, expected) = drawn[0, seed], cut[0, seed]
        assert found["masks"].shape[1:] == image.shape[1:]
        assert torch.equal(found["boxes"], expected["boxes"])
        for mask, other in zip(found["masks"], expected["masks"], strict=True):
            thick, thin = (
                -pad * torch.nn.functional.max_pool2d(-pad * other[None].float(), 5, 1, 2)[0]
                for pad in (-1, 1)
            )
            assert ((mask == other) | (thick != thin)).all()  # they differ at outlines alone


def test_some_missing_segmentations_turn_masks_off_aloud(write_coco):
    root = write_coco(
        [
            annotation(0, [10, 10, 20, 20], segmentation=[SQUARE]),
            annotation(1, [0, 0, 5, 5], segmentation=[]),
        ],
        {"a.png": GREY},
    )
    dataset = coco.CocoDataset(root, "train")
    assert (
        not dataset.has_masks
        and "1 objects have no segmentation: masks are not used" in dataset.notes
    )


def test_an_image_without_objects_has_empty_targets(write_coco):
    root = write_coco(
        [annotation(0, [10, 10, 20, 20], segmentation=[SQUARE])], {"a.png": GREY, "b.png": GREY}
    )
    target = coco.CocoDataset(root, "train", coco.Transform(PLAIN, True))[1][1]
    assert target["boxes"].shape == (0, 4) and target["labels"].shape == (0,)
    assert target["masks"].shape == (0, 40, 60) and target["image_id"] == 1


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda root: shutil.rmtree(root / "train"), "no train split; expected"),
        (
            lambda root: (root / "train/_annotations.coco.json").write_text("{"),
            "not a COCO annotation file",
        ),
        (
            lambda root: (root / "train/_annotations.coco.json").write_text("[]"),
            "not a COCO annotation file",
        ),
        (lambda root: (root / "train/a.png").unlink(), "no such file"),
        (lambda root: (root / "train/a.png").write_bytes(b"no image"), "cannot read image"),
        (lambda root: shutil.copy(root / "wide.png", root / "train/a.png"), "60x40"),
    ],
)
def test_what_is_wrong_with_the_data_is_said(write_coco, break_it, message):
    root = write_coco([], {"a.png": GREY})
    PIL.Image.new("RGB", (80, 40)).save(root / "wide.png")
    break_it(root)
    with pytest.raises(DataError, match=message):
        coco.CocoDataset(root, "train")[0]


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1", "CMYK"])
def test_every_kind_of_image_becomes_rgb(tmp_path, mode):
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    PIL.Image.new("RGB", (60, 40), (200, 200, 200)).convert(
        mode, palette=PIL.Image.Palette.ADAPTIVE
    ).save(path)
    image = coco.read_image(path, (40, 60))
    assert image.shape == (3, 40, 60) and image.dtype == torch.uint8
    if mode != "1":
        assert (image.float() - 200).abs().max() < 5


def test_sixteen_bits_are_scaled_to_eight(tmp_path):
    PIL.Image.fromarray(np.full((40, 60), 0.5, dtype=np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match="its pixels are fractions"):
        coco.read_image(tmp_path / "a.tif")
    PIL.Image.fromarray(np.full((40, 60), 200 * 256, dtype=np.uint16)).save(tmp_path / "a.png")
    assert (coco.read_image(tmp_path / "a.png", (40, 60)) == 200).all()


def test_rotation_tag_is_followed_when_the_annotations_agree(tmp_path):
    image, exif = PIL.Image.new("RGB", (60, 40)), PIL.Image.Exif()
    exif[274] = 6  # shown turned by 90 degrees
    image.save(tmp_path / "a.jpg", exif=exif)
    assert coco.read_image(tmp_path / "a.jpg").shape == (3, 60, 40)
    assert coco.read_image(tmp_path / "a.jpg", (60, 40)).shape == (3, 60, 40)
    assert coco.read_image(tmp_path / "a.jpg", (40, 60)).shape == (3, 40, 60)


# --- Transform and batch --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "recipe",
    [
        PLAIN,
        dict(sizes=(48, 80), max_size=100, multiple=1, crop=()),
        dict(sizes=(), max_size=1000, multiple=16, crop=()),
        dict(sizes=(300,), max_size=400, multiple=1, crop=(384, 600)),
    ],
)
def test_boxes_and_masks_follow_the_image(shapes, recipe):
    dataset = coco.CocoDataset(shapes, "train", coco.Transform(recipe, train=True))
    for i in range(12):
        image, target = dataset[i, i]
        H, W = image.shape[1:]
        assert max(H, W) <= recipe["max_size"] and target["masks"].shape[1:] == (H, W)
        assert len(target["boxes"]) == len(target["labels"]) == len(target["masks"])
        for mask, box in zip(target["masks"], target["boxes"].tolist(), strict=True):
            rows, columns = mask.nonzero().unbind(1)
            tight = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            if not recipe["crop"]:  # a crop may cut off the part of a shape that gave it its box
                assert box == pytest.approx([float(x) for x in tight], abs=4)
            assert box[0] <= tight[0] + 4 and box[2] >= tight[2] - 4


def test_flip_moves_boxes_with_the_image(write_coco):
    image = torch.zeros_like(GREY)
    image[:, 10:30, 5:15] = 255
    root = write_coco([annotation(0, [5, 10, 10, 20])], {"a.png": image})
    dataset = coco.CocoDataset(root, "train", coco.Transform(PLAIN, True))
    starts = set()
    for seed in range(8):
        image, target = dataset[0, seed]
        x0, y0, x1, y1 = target["boxes"][0].int().tolist()
        assert image[:, y0:y1, x0:x1].min() == 1 and image.sum() == 3 * 200
        starts.add(x0)
    assert starts == {5, 45}


def test_sizes_are_detectron2s():
    assert coco.resized(427, 640, 800, 1333) == (800, 1199)
    assert coco.resized(480, 640, 800, 1333) == (800, 1067)
    assert coco.resized(333, 1000, 800, 1333) == (444, 1333)


def test_with_a_multiple_sizes_are_those_of_released_yolos():
    cases = {  # (width, height) -> what the authors' transform gives for short side 800
        (640, 480): (1056, 800),
        (640, 427): (1184, 800),
        (640, 360): (1328, 736),
        (1000, 200): (1328, 256),
    }
    for (w, h), (new_w, new_h) in cases.items():
        assert coco.resized(h, w, 800, 1333, 16) == (new_h, new_w)
        assert coco.resized(w, h, 800, 1333, 16) == (new_w, new_h)
    assert coco.resized(480, 640, 512, 853, 16) == (512, 672)
    assert coco.resized(128, 160, 128, 320, 16) == (128, 160)
    assert coco.resized(5, 40, 5, 320, 16) == (16, 32)


def test_before_a_crop_sides_are_cut_to_the_multiple_too(monkeypatch):
    seen = set()
    monkeypatch.setattr(coco, "crop", lambda image, *a: (seen.add(image.shape[1:]), image, {})[1:])
    recipe = dict(sizes=(512,), max_size=1013, multiple=16, crop=(384, 600))
    transform = coco.Transform(recipe, train=True)
    for _ in range(40):
        transform(tv_tensors.Image(torch.zeros(3, 48, 64, dtype=torch.uint8)), {})
    assert seen == {(400, 528), (496, 656), (592, 800)}


def test_evaluation_of_a_smaller_size_has_a_smaller_limit():
    recipe = dict(sizes=(256, 608, 512), max_size=1013, multiple=16, crop=())
    image = torch.zeros(3, 200, 1000)
    target = {
        "boxes": coco.tv_tensors.BoundingBoxes(
            torch.zeros(0, 4), format="XYXY", canvas_size=(200, 1000)
        )
    }
    shown, _ = coco.Transform(recipe, train=False)(coco.tv_tensors.Image(image), target)
    assert shown.shape == (3, 160, 848)  # 853 = 512 * 1333 // 800 for the long side


def batches(dataset, start=0, stop=12, **kwargs):
    return list(coco.batches(dataset, 4, start, stop, **kwargs))


def test_batches_go_on_where_they_stopped_and_cover_each_epoch(shapes):
    dataset = coco.CocoDataset(shapes, "train")
    whole = batches(dataset)
    assert whole == batches(dataset, 0, 5) + batches(dataset, 5, 12)
    assert sorted(i for batch in whole[:6] for i, _ in batch) == list(range(24))
    assert whole[:6] != whole[6:] and whole != batches(dataset, seed=1)
    assert len({seed for batch in whole for _, seed in batch}) == 48


def test_processes_share_the_global_batch(shapes):
    dataset = coco.CocoDataset(shapes, "train")
    shares = [coco.batches(dataset, 2, 0, 6, rank=rank, world=2) for rank in (0, 1)]
    assert [a + b for a, b in zip(*shares, strict=True)] == batches(dataset, 0, 6)


def test_batches_hold_similar_aspect_ratios(shapes):
    dataset = coco.CocoDataset(shapes, "train")
    aspect = [image["width"] / image["height"] for image in dataset.images]
    spread = [
        max(aspect[i] for i, _ in b) / min(aspect[i] for i, _ in b) for b in batches(dataset, 0, 6)
    ]
    assert sum(s < 1.2 for s in spread) >= 2 and sum(spread) / 6 < 1.6


def test_fewer_images_than_a_batch_are_repeated(write_coco):
    root = write_coco([annotation(0, [5, 10, 10, 20])], {"a.png": GREY})
    assert [i for i, _ in batches(coco.CocoDataset(root, "train"), 0, 1)[0]] == [0] * 4


def test_loader_parts_can_be_sent_to_other_processes(shapes):
    dataset = coco.CocoDataset(shapes, "train", coco.Transform(PLAIN, True))
    again = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(again[3, 5][0], dataset[3, 5][0])
    assert pickle.loads(pickle.dumps(coco.collate)) is coco.collate
    args = argparse.Namespace(workers=1, batch_size=1, device=torch.device("cpu"))
    loader = make_loader(args, dataset, [(3, 5)], multiprocessing_context="spawn")  # as on Windows
    ((image,), _), *none = loader
    assert torch.equal(image, dataset[3, 5][0]) and not none


# --- Evaluate -------------------------------------------------------------------------------------


def truth_as_results(dataset):
    results = []
    for i in range(len(dataset)):
        _, target = dataset[i]
        output = target | {"scores": torch.ones(len(target["labels"]))}
        results += coco.to_results(dataset, target, output)
    return results


def test_the_truth_scores_one_and_nothing_scores_zero(shapes, capsys):
    dataset = coco.CocoDataset(shapes, "val")
    perfect = coco.evaluate(dataset, truth_as_results(dataset))
    assert [perfect[m] for m in ("AP", "mask_AP", "AP50")] == pytest.approx([1, 1, 1])
    nothing = coco.evaluate(dataset, [])
    assert nothing["AP"] == nothing["mask_AP"] == 0
    assert capsys.readouterr().out == ""


def test_evaluation_needs_no_info_area_or_iscrowd_and_ids_may_start_at_zero(write_coco):
    root = write_coco(
        [annotation(0, [5, 10, 10, 20]), annotation(1, [30, 5, 20, 20], 9)], {"a.png": GREY}
    )
    dataset = coco.CocoDataset(root, "train")
    results = truth_as_results(dataset)
    assert [r["category_id"] for r in results] == [7, 9]
    metrics = coco.evaluate(dataset, results)
    assert metrics["AP"] == pytest.approx(1) and metrics["APl"] == -1 and "mask_AP" not in metrics
    half = coco.evaluate(dataset, results[:1])
    assert half["AP"] == pytest.approx(0.5)


def test_limit_evaluates_on_those_images_only(shapes):
    dataset = coco.CocoDataset(shapes, "val", limit=2)
    assert len(dataset) == 2 and coco.evaluate(dataset, truth_as_results(dataset))["AP"] > 0.999


def test_classes_of_training_fix_the_labels_of_evaluation(write_coco):
    write_coco([annotation(0, [5, 10, 10, 20])], {"a.png": GREY})
    root = write_coco([annotation(0, [5, 10, 10, 20], 9)], {"a.png": GREY}, [(9, "dog")], "valid")
    train = coco.CocoDataset(root, "train")
    assert train.classes == [dict(id=7, name="cat"), dict(id=9, name="dog")]  # sorted by id
    assert coco.CocoDataset(root, "val", classes=train.classes)[0][1]["labels"].tolist() == [1]
    horses = [dict(id=7, name="horse")]
    with pytest.raises(DataError, match="category 7 is cat, but horse where the model was trained"):
        coco.CocoDataset(root, "train", classes=horses)


def test_broken_annotations_are_said(write_coco):
    for bad, message in (
        (dict(bbox=[]), "a bbox has not four numbers"),
        (dict(bbox="5, 5, 9, 9"), "not a COCO annotation file"),
    ):
        with pytest.raises(DataError, match=message):
            coco.CocoDataset(write_coco([annotation(0, [0]) | bad], {"a.png": GREY}), "train")
    with pytest.raises(DataError, match="image 0 has no width or height"):
        coco.CocoDataset(write_coco([], {"a.png": (0, 40)}), "train")
    bare = write_coco([annotation(0, [0, 0, 9, 9], segmentation=[[]])], {"a.png": GREY})
    assert not coco.CocoDataset(bare, "train").has_masks


# --- Draw and shapes ------------------------------------------------------------------------------


def test_token_panels_have_room_for_every_class(shapes, tmp_path):
    dataset = coco.CocoDataset(shapes, "val")
    dataset.classes = [{"id": i, "name": str(i)} for i in range(80)]
    dataset.label_of = {i: i for i in range(80)}
    about = dict(bbox=[10, 10, 50, 50], image_id=dataset.images[0]["id"], token=4)
    coco.draw_tokens(tmp_path / "a.png", dataset, [about | dict(category_id=79)])
    bars = np.array(PIL.Image.open(tmp_path / "a.png"))[120:164, 124:244]  # of the second panel
    green = (bars == PIL.ImageColor.getrgb(coco.COLORS[79 % 10])).all(axis=2).nonzero()
    assert green[1].min() == 118 and len(set(green[1])) <= 2  # one narrow bar at the right end


def test_pictures_show_what_is_sure(tmp_path):
    found = dict(
        boxes=torch.tensor([[5.0, 5, 30, 30]] * 2),
        labels=torch.tensor([0, 1]),
        scores=torch.tensor([0.9, 0.3]),
    )
    picture = coco.draw(torch.zeros(3, 40, 60), found, [dict(name="cat"), dict(name="dog")])
    assert picture.shape == (3, 200, 300) and picture.dtype == torch.uint8
    red, lime, white = (
        (picture == picture.new_tensor(rgb)[:, None, None]).all(dim=0).sum()
        for rgb in ([255, 0, 0], [0, 255, 0], [255, 255, 255])
    )
    assert red > 0 and lime == 0, "the sure one is red, the other not drawn"
    assert white > 0, "its name can be read"
    coco.save_pictures(tmp_path / "a.png", [[picture, picture[:, :50]], [picture]])
    assert coco.read_image(tmp_path / "a.png").shape == (3, 408, 608)


def test_shapes_are_the_same_for_the_same_seed_and_complete_or_absent(tmp_path, monkeypatch):
    a, b, c = (
        coco.make_shapes(tmp_path / name, 6, 2, seed)
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    files = sorted(path.relative_to(a) for path in a.rglob("*.*"))
    assert len(files) == 10 and all((a / f).read_bytes() == (b / f).read_bytes() for f in files)
    assert (a / files[-1]).read_bytes() != (c / files[-1]).read_bytes()
    write = coco.write_shapes

    def be_late(*args):
        write(*args)
        shutil.copytree(a, tmp_path / "c", dirs_exist_ok=True)  # by another run

    with monkeypatch.context() as patch:
        patch.setattr(coco, "write_shapes", be_late)
        shutil.rmtree(c)
        coco.make_shapes(c, 6, 2, seed=1)
    assert all((a / f).read_bytes() == (c / f).read_bytes() for f in files)
    monkeypatch.setattr(coco, "background", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        coco.make_shapes(tmp_path / "d", 6, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]


def test_shapes_are_what_they_promise():
    pictures = [coco.draw_shapes(np.random.default_rng([0, i])) for i in range(200)]
    areas = [mask.sum() for _, objects in pictures for _, mask in objects]
    labels = {label for _, objects in pictures for label, _ in objects}
    counts = {len(objects) for _, objects in pictures}
    assert len(labels) == len(coco.SHAPES) == 6
    assert min(counts) == 1 and 6 <= max(counts) <= 8
    small, large = (np.array(areas) < 32**2).mean(), (np.array(areas) > 96**2).mean()
    assert 0.3 < small < 0.6 and 0 < large < 0.1
    assert len({pixels.shape for pixels, _ in pictures}) == len(coco.SHAPES_SIZES)
    for _, objects in pictures:
        masks = np.stack([mask for _, mask in objects])
        assert masks.any(axis=(1, 2)).all() and masks.sum(axis=0).max() == 1, (
            "no pixel has two owners"
        )


# --- Classes of objects, classes of pixels --------------------------------------------------------


def box_mask(x0, y0, x1, y1):
    """Uncompressed run lengths of a filled box in GREY."""
    mask = np.zeros((40, 60), dtype=np.uint8)
    mask[y0:y1, x0:x1] = 1
    flat = np.flatnonzero(np.diff(np.r_[0, mask.flatten(order="F"), 0]))
    return {"counts": np.diff(np.r_[0, flat, 2400]).tolist(), "size": [40, 60]}


def square_annotation(i, x0, y0, x1, y1, category_id=7, **more):
    box = [x0, y0, x1 - x0, y1 - y0]
    mask = box_mask(x0, y0, x1, y1)
    return annotation(i, box, category_id, segmentation=mask, area=box[2] * box[3], **more)


def test_objects_become_square_pictures(write_coco):
    picture = torch.arange(2400, dtype=torch.int32).reshape(40, 60) % 251
    picture = picture.to(torch.uint8).expand(3, 40, 60)
    boxes = [[10, 10, 20, 20], [20, 5, 10, 30], [50, 2, 10, 4], [5.5, 3.5, 3, 3], [0, 10, 60, 10]]
    rows = [annotation(i, box, 9 if i else 7) for i, box in enumerate(boxes)]
    dataset = coco.ObjectCrops(write_coco(rows, {"a.png": picture}), "train")
    assert len(dataset) == 5 and dataset[0][1]["labels"].tolist() == [0]
    windows = [(10, 30, 10, 30), (5, 35, 10, 40), (0, 10, 50, 60), (3, 7, 5, 9), (0, 40, 0, 60)]
    for i, (top, bottom, left, right) in enumerate(windows):
        image, target = dataset[i]
        assert torch.equal(image, picture[:, top:bottom, left:right] / 255), i
        assert target["size"] == (bottom - top, right - left)
    assert dataset[4][1]["labels"].tolist() == [1]


def test_pictures_of_objects_get_one_size(write_coco):
    rows = [annotation(0, [10, 10, 20, 20]), annotation(1, [0, 0, 60, 40])]
    root = write_coco(rows, {"a.png": GREY})
    for train, crop in ((True, (0.5, 1.0)), (True, ()), (False, (0.5, 1.0))):
        transform = coco.Transform(PLAIN | dict(sizes=(24,), crop=crop), train, "classify")
        dataset = coco.ObjectCrops(root, "train", transform)
        assert [dataset[i, 0][0].shape for i in range(2)] == [(3, 24, 24)] * 2


def test_a_classifier_is_judged_by_the_share_it_names_rightly(write_coco):
    rows = [annotation(i, [10, 10, 20, 20], c) for i, c in enumerate((7, 7, 9))]
    dataset = coco.ObjectCrops(write_coco(rows, {"a.png": GREY}), "train")
    logits = torch.tensor([[2.0, 0], [0, 2], [0, 2]])  # the second is wrong
    results = [
        result
        for i in range(3)
        for result in coco.to_results(dataset, dataset[i][1], dict(logits=logits[i]))
    ]
    assert [r["category_id"] for r in results] == [7, 9, 9]
    assert coco.evaluate(dataset, results) == {"top1": pytest.approx(2 / 3)}


def test_pixels_have_the_class_of_the_smallest_object(write_coco):
    rows = [
        square_annotation(0, 20, 10, 30, 20, 9),
        square_annotation(1, 10, 5, 40, 35, 7),
        square_annotation(2, 0, 0, 15, 40, 7, iscrowd=1),
    ]
    dataset = coco.SemanticMaps(write_coco(rows, {"a.png": GREY}), "train")
    wanted = torch.full((40, 60), 2)
    wanted[:, :15] = -1
    wanted[5:35, 10:40] = 0
    wanted[10:20, 20:30] = 1
    image, target = dataset[0]
    assert torch.equal(target["semantic"], wanted) and target["semantic"].dtype == torch.int64
    dataset.transform = coco.Transform(PLAIN | dict(sizes=(80,), crop=(30,)), True)
    image, target = dataset[0, 1]
    assert image.shape == (3, 30, 30) and target["semantic"].shape == (30, 30)
    dataset.transform = coco.Transform(PLAIN | dict(sizes=(80,)), False)
    enlarged = wanted.repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert torch.equal(dataset[0][1]["semantic"], enlarged)


def test_boxes_alone_cannot_be_segmented(write_coco):
    root = write_coco([annotation(0, [10, 10, 20, 20])], {"a.png": GREY})
    with pytest.raises(DataError, match="no masks to segment by"):
        coco.SemanticMaps(root, "train")


def test_a_segmenter_is_judged_by_overlap(write_coco):
    rows = [
        square_annotation(0, 0, 0, 20, 40, 7),
        square_annotation(1, 40, 0, 60, 10, 7, iscrowd=1),
    ]
    dataset = coco.SemanticMaps(write_coco(rows, {"a.png": GREY}), "train")
    truth = dataset[0][1]["semantic"]
    found = torch.full((40, 60), 2)
    found[:, 10:30] = 0  # half of the object, and as much beside it
    results = coco.to_results(dataset, dataset[0][1], dict(semantic=found))
    metrics = coco.evaluate(dataset, results)
    judged = truth >= 0
    iou = [
        ((truth == k) & (found == k))[judged].sum() / ((truth == k) | (found == k))[judged].sum()
        for k in (0, 2)  # nobody has or finds class 1
    ]
    assert metrics["mIoU"] == pytest.approx((sum(iou) / 2).item())
    right = (truth == found)[judged].float().mean().item()
    assert metrics["pixel_accuracy"] == pytest.approx(right)
    perfect = coco.to_results(dataset, dataset[0][1], dict(semantic=truth.clamp(min=0)))
    assert coco.evaluate(dataset, perfect) == {"mIoU": 1, "pixel_accuracy": 1}


def test_answers_of_every_kind_are_drawn_and_described():
    image, classes = torch.full((3, 40, 60), 0.5), [{"name": "cat"}, {"name": "dog"}]
    semantic = torch.full((40, 60), 2)
    semantic[:, :15] = 1
    plain = coco.draw(image, dict(boxes=torch.zeros(0, 4)), classes)
    drawn = coco.draw(image, dict(semantic=semantic), classes)
    changed = (drawn != plain).any(dim=0)
    edge = changed.shape[1] // 4
    assert changed[:, :edge].all() and not changed[:, edge:].any()
    assert coco.describe(dict(semantic=semantic), classes) == "background 75%, dog 25%"
    logits = dict(logits=torch.tensor([0.0, 9]))
    assert (coco.draw(image, logits, classes) != plain).any()
    assert coco.describe(logits, classes) == "dog 1.00"
    found = dict(scores=torch.tensor([0.9, 0.5, 0.4]), labels=torch.tensor([1, 0, 1]))
    assert coco.describe(found, classes).endswith(
        "2 objects with a score of 0.5 or more: dog 0.90, cat 0.50"
    )
    assert (coco.draw(image, dict(labels=torch.tensor([1])), classes) != plain).any()


# --- Pictures alone -------------------------------------------------------------------------------


def test_any_folder_of_images_serves_for_pre_training(tmp_path):
    (tmp_path / "more").mkdir()
    for i in range(21):
        folder = tmp_path / "more" if i % 2 else tmp_path
        pixels = np.full((20 + i, 30, 3), i, dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(folder / f"{i:02}.png")
    (tmp_path / "notes.txt").write_text("no image")
    transform = coco.Transform(PLAIN | dict(sizes=(16,), crop=(0.67, 1.0)), True, "pretrain")
    train, val = (coco.Pictures(tmp_path, split, transform) for split in ("train", "val"))
    assert len(train) == 19 and len(val) == 2
    image, target = train[0, 5]
    assert image.shape == (3, 16, 16) and set(target) == {"image_id", "size"}
    names = [i["file_name"] for d in (train, val) for i in d.images]
    assert len(set(names)) == 21
    (tmp_path / "more/01.png").write_bytes(b"not an image")
    broken = coco.Pictures(tmp_path, "train")
    with pytest.raises(DataError, match="cannot read image"):
        _ = [broken[i] for i in range(len(broken))]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no annotations, and 0 images"):
        coco.Pictures(tmp_path / "empty", "train")


def test_annotated_data_gives_its_pictures_too(shapes):
    dataset = coco.Pictures(shapes, "val")
    image, target = dataset[0]
    assert len(dataset) == 6 and set(target) == {"image_id", "size"} and image.ndim == 3


def test_pre_training_is_judged_against_the_mean_visible_colour(shapes):
    dataset = coco.Pictures(shapes, "val")
    results = []
    for i, (l1, baseline) in enumerate([(0.1, 0.4), (0.3, 0.4)]):
        answer = dict(reconstruction=None, l1=torch.tensor(l1), baseline=torch.tensor(baseline))
        results += coco.to_results(dataset, dataset[i][1], answer)
    expected = {"explained": 0.5, "masked_L1": 0.2, "baseline_L1": 0.4}
    assert coco.evaluate(dataset, results) == pytest.approx(expected)
    assert "L1 0.300 where hidden" in coco.describe(answer, [])
    plain = [dict(image_id=0, l1=0.5, baseline=0.0)]  # nothing to explain
    assert coco.evaluate(dataset, plain)["explained"] == -1


# --- Real images ----------------------------------------------------------------------------------


def test_real_coco_loads(real_coco):
    for split in ("train", "val"):
        dataset = coco.CocoDataset(real_coco, split, coco.Transform(PLAIN, True), limit=12)
        assert dataset.has_masks and len(dataset.classes) == 80
        for i in range(len(dataset)):
            image, target = dataset[i, 0]
            assert (
                image.shape[1:] == target["masks"].shape[1:]
                and 0 <= image.min() <= image.max() <= 1
            )
    plain = coco.CocoDataset(real_coco, "val", limit=12)
    metrics = coco.evaluate(plain, truth_as_results(plain))
    assert (
        metrics["AP"] > 0.95 and metrics["mask_AP"] > 0.95
    )  # clipped boxes differ by fractions of a pixel
