"""PVT against the authors' released code: recorded numbers, from filled weights."""

import functools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from golden import assert_close, checkpoint, image, load

import pvt


@functools.cache
def loaded(name, variant="base"):
    """Model and golden; classifiers have 1000 classes, RetinaNet 80, the bare backbone no head."""
    golden = load(name)
    config, num_classes = pvt.CONFIGS["v2_b0" if "v2" in name else "tiny"], 80
    state = checkpoint(golden, variant)
    if name in ("pvt_tiny", "pvt_v2_b0"):
        config, num_classes = replace(config, head="classifier"), 1000
    model = pvt.build(config, num_classes)
    net = model.backbone if name == "pvt_det_tiny" else model
    assert sum(p.numel() for p in net.parameters()) == golden["params"]
    wrapped = {"state_dict": state} if name == "pvt_retinanet_tiny" else state
    missing, unexpected = model.load_state_dict(
        pvt.from_official(wrapped, config), strict=name != "pvt_det_tiny"
    )
    assert not unexpected and all(key.startswith("head.") for key in missing)
    return model.eval(), golden["expected"]


@pytest.mark.parametrize("variant", ["base", "wide"])
@pytest.mark.parametrize(
    ("case", "images"), [("224", (201, 2, 224, 224)), ("256x320", (202, 1, 256, 320))]
)
@torch.no_grad()
def test_logits_equal_the_released_ones(variant, case, images):
    model, expected = loaded("pvt_tiny", variant)
    key = f"{variant}/{case}/logits"
    assert_close(expected[key], key, model.head(model.backbone(image(*images)), None))


@torch.no_grad()
def test_logits_of_v2_equal_the_released_ones():
    model, expected = loaded("pvt_v2_b0")
    logits = model.head(model.backbone(image(201, 2, 224, 224)), None)
    assert_close(expected["base/224/logits"], "base/224/logits", logits)


@pytest.mark.parametrize("variant", ["base", "wide"])
@torch.no_grad()
def test_maps_equal_the_released_ones(variant):
    model, expected = loaded("pvt_det_tiny", variant)
    for s, x in enumerate(model.backbone(image(211, 2, 256, 320)), start=1):
        key = f"{variant}/256x320/stage{s}"
        assert_close(expected[key], key, x)


@pytest.mark.parametrize("variant", ["base", "wide"])
@torch.no_grad()
def test_where_the_released_code_leaves_a_table_alone_the_rest_is_equal(variant, monkeypatch):
    """112 x 448 has as many patches as the first table: with its rows as they lie, all is equal."""
    model, expected = loaded("pvt_det_tiny", variant)
    x = image(203, 1, 112, 448)
    ours = model.backbone(x)
    resize = pvt.resize_positions

    def as_released(table, grid):
        alone = tuple(grid) == (28, 112)
        return (table, table[:, :0]) if alone else resize(table, grid)

    monkeypatch.setattr(pvt, "resize_positions", as_released)
    for s, theirs in enumerate(model.backbone(x), start=1):
        key = f"{variant}/112x448/stage{s}"
        assert_close(expected[key], key, theirs)
    assert (ours[0] - model.backbone(x)[0]).abs().max() > 0.01


# --- RetinaNet ------------------------------------------------------------------------------------

SIZES = [(256, 320), (200, 272)]


@functools.cache
@torch.no_grad()
def retinanet():
    x = image(501, 2, 256, 320)
    x[1, :, 200:], x[1, :, :, 272:] = 0, 0
    model, expected = loaded("pvt_retinanet_tiny")
    maps = model.backbone(x)
    return model.head, model.head.pyramid(maps), model.head(maps, SIZES), expected


def test_pyramid_classes_and_boxes_equal_the_released_ones():
    head, pyramid, (logits, deltas, _), expected = retinanet()
    for level, x in enumerate(pyramid):
        found = {"fpn": x}
        for kind, values in (("cls", logits[level]), ("reg", deltas[level])):
            maps = values.unflatten(1, (*x.shape[2:], 9)).flatten(3)  # (B, H, W, 9 * n)
            found[kind] = maps.permute(0, 3, 1, 2)
        for kind, values in found.items():
            key = f"base/{kind}/p{level + 3}"
            assert_close(expected[key], key, values)


def test_anchors_equal_the_released_ones():
    anchors, golden = retinanet()[2][2], load("pvt_retinanet_tiny")["anchors"]
    for level, boxes in enumerate(anchors, start=3):
        wanted = golden[f"p{level}"]
        assert list(boxes.shape) == wanted["shape"]
        rtol = 0 if boxes.device.type == "cpu" else 1e-6  # a GPU rounds roots otherwise
        torch.testing.assert_close(boxes[:9], torch.tensor(wanted["first9"]), rtol=rtol, atol=0)
        torch.testing.assert_close(boxes[-1], torch.tensor(wanted["last"]), rtol=rtol, atol=0)


@pytest.mark.parametrize("case", ["losses", "losses_second_image_empty"])
def test_losses_equal_the_released_ones(case):
    head, _, outputs, _ = retinanet()
    golden = load("pvt_retinanet_tiny")
    targets = [
        dict(boxes=torch.tensor(t["boxes_xyxy"]), labels=torch.tensor(t["labels"]))
        for t in golden["input"]["targets"]
    ]
    if case == "losses_second_image_empty":
        targets[1] = {key: value[:0] for key, value in targets[1].items()}
    losses = head.loss(outputs, targets, SIZES)
    assert losses["loss_cls"].item() == pytest.approx(golden[case]["loss_cls"], rel=1e-5)
    assert losses["loss_box"].item() == pytest.approx(golden[case]["loss_bbox"], rel=1e-5)


def test_detections_equal_the_released_ones():
    head, _, outputs, _ = retinanet()
    golden = load("pvt_retinanet_tiny")["detections"]
    for found, wanted in zip(head.answers(outputs, SIZES, SIZES), golden, strict=True):
        assert len(found["boxes"]) == wanted["n"]
        for box, score, label in zip(
            wanted["boxes"], wanted["scores"], wanted["labels"], strict=True
        ):
            distance = (found["boxes"] - torch.tensor(box)).abs().amax(dim=1)
            same = (distance < 0.01) & (found["labels"] == label)
            assert ((found["scores"] - score).abs() < 1e-4)[same].any(), (box, label)


@torch.no_grad()
def test_sizes_that_crash_the_released_code_equal_an_explicit_resize():
    """448 x 448: the second stage has as many patches as the first table."""
    table = torch.randn(1, 28 * 28, 8)
    grid = table.transpose(1, 2).unflatten(2, (28, 28))
    grid = F.interpolate(grid, size=(56, 56), mode="bilinear", align_corners=False)
    found, _ = pvt.resize_positions(table, (56, 56))
    torch.testing.assert_close(found, grid.flatten(2).transpose(1, 2))
    model, _ = loaded("pvt_det_tiny")
    for size in ((448, 448), (224, 896)):
        assert model.backbone(torch.zeros(1, 3, *size))[3].shape[2:] == (
            size[0] // 32,
            size[1] // 32,
        )
