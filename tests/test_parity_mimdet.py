"""MIMDet against the authors' released code: recorded numbers, from filled weights."""

import copy
import functools
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from golden import assert_close, checkpoint, image, load

import mimdet

NOISE = torch.as_tensor(np.random.RandomState(411).rand(2, 320).astype(np.float32))
SIZES = [(256, 320), (200, 272)]


@functools.cache
def filled_weights(name, variant="base"):
    return checkpoint(load(name), variant)


def loaded(name, config, variant="base"):
    model = mimdet.build(config, num_classes=80)
    state = mimdet.from_official({"model": filled_weights(name, variant)}, config)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    frozen = {"encoder.pos_embed", "decoder.decoder_pos_embed"}
    assert {key for key in missing if key.startswith(("encoder.", "decoder."))} == frozen
    return model.eval()


def input_batch():
    x = image(401, 2, 256, 320)
    x[1, :, 200:], x[1, :, :, 272:] = 0, 0
    return x


@pytest.mark.parametrize(
    ("name", "config", "variant"),
    [
        ("mimdet_backbone", mimdet.CONFIGS["base"], "base"),
        ("mimdet_v1_backbone", replace(mimdet.CONFIGS["base"], fill="mask", grid=14), "base"),
        ("mimdet_v1_backbone", replace(mimdet.CONFIGS["base"], fill="mask", grid=14), "wide"),
    ],
)
@torch.no_grad()
def test_backbone_equals_the_released_one(name, config, variant):
    golden = load(name)
    model = loaded(name, config, variant)
    parameters = [*model.encoder.parameters(), *model.decoder.parameters()]
    assert sum(p.numel() for p in parameters) == golden["params"]
    for kept in golden["kept"]:  # the frozen tables, built by us
        assert_close(kept, kept["key"], model.get_parameter(kept["key"]))
    x = input_batch()
    for ratio, noise in (("1", None), ("0.5", NOISE)):
        maps = model.backbone(x, SIZES, float(ratio), noise)
        for level, c in enumerate(maps, start=2):
            key = f"{variant}/sr{ratio}/c{level}"
            assert_close(golden["expected"][key], key, c)
    tokens, ids, _ = model.encoder(x, SIZES, 0.5, NOISE)
    key = f"{variant}/sr0.5/encoder_kept_tokens"
    assert_close(golden["expected"][key], key, tokens)
    if "masking_sr0.5" in golden["input"]:
        assert ids.tolist() == golden["input"]["masking_sr0.5"]["ids_keep"]


@pytest.fixture(scope="module")
def detector():
    return loaded("mimdet_full_state", mimdet.CONFIGS["base"])


def raw_images():
    r = np.random.RandomState(421)
    return [
        torch.as_tensor(r.randint(0, 256, (3, *size)).astype(np.float32)) / 255 for size in SIZES
    ]


def same_set(found, expected, tolerance=1e-2):
    """Each expected row has a found row whose every number is within tolerance."""
    expected = torch.tensor(expected)
    distance = (expected[:, None] - found[None]).abs().amax(dim=2)
    worst = distance.amin(dim=1).max()
    assert worst <= tolerance, f"off by {worst:.2e}"


@torch.no_grad()
def test_detector_equals_the_released_one(detector):
    model = copy.deepcopy(detector)
    state = mimdet.from_official({"model": filled_weights("mimdet_full_state")})
    missing = set(model.state_dict()) - set(state)
    assert missing <= {"encoder.pos_embed", "decoder.decoder_pos_embed"} | {
        key for key in missing if key.endswith("num_batches_tracked")
    }
    golden = load("mimdet_full_eval")
    expected = golden["expected"]
    x, sizes = mimdet.pad_batch(raw_images(), 32)
    assert_close(expected["sr1/images"], "sr1/images", x)
    r, fixed = np.random.RandomState(431), []
    for h, w in SIZES:
        a = r.rand(16, 4)
        x0, y0 = a[:, 0] * 0.7 * w, a[:, 1] * 0.7 * h
        x1, y1 = np.minimum(x0 + 6 + a[:, 2] * w, w), np.minimum(y0 + 6 + a[:, 3] * h, h)
        fixed.append(torch.as_tensor(np.stack([x0, y0, x1, y1], axis=1).astype(np.float32)))
    for ratio, noise in (("1", None), ("0.5", NOISE)):
        maps = model.pyramid(x, sizes, float(ratio), noise)
        logits, deltas = model.rpn(maps)
        anchors = mimdet.make_anchors(maps, 8)
        pooled7 = mimdet.pool_rois(maps, fixed, 7, 8)
        pooled14 = mimdet.pool_rois(maps, fixed, 14, 8)
        cls_logits, box_deltas = model.box_head(pooled7)
        found = {
            "anchors/concat": torch.cat(anchors),
            "fixed_boxes/pooled7": pooled7,
            "fixed_boxes/pooled14": pooled14,
            "fixed_boxes/cls_logits": cls_logits,
            "fixed_boxes/box_deltas": box_deltas.flatten(1),
            "fixed_boxes/mask_logits": model.mask_head(pooled14),
        }
        for level, p in enumerate(maps):
            found[f"fpn/p{level + 2}"] = p
            objectness = logits[level].unflatten(1, (*p.shape[-2:], 3)).permute(0, 3, 1, 2)
            delta = deltas[level].flatten(1).unflatten(1, (*p.shape[-2:], 12)).permute(0, 3, 1, 2)
            found[f"rpn/objectness/p{level + 2}"] = objectness
            found[f"rpn/deltas/p{level + 2}"] = delta
        compared = [key for key in found if f"sr{ratio}/{key}" in expected]
        assert len(compared) >= 3
        for key in compared:
            assert_close(expected[f"sr{ratio}/{key}"], f"sr{ratio}/{key}", found[key])
        check_detections(model, golden, f"sr{ratio}", x, sizes, float(ratio), noise)


def check_detections(model, golden, key, x, sizes, ratio, noise):
    model.config = replace(model.config, eval_ratio=ratio)
    maps = model.pyramid(x, sizes, ratio, noise)
    logits, deltas = model.rpn(maps)
    anchors = mimdet.make_anchors(maps, 8)
    proposals = mimdet.select_proposals(logits, deltas, anchors, sizes, 1000, 1000)
    in_model_space = model.detect(x, sizes, sizes, noise)
    scaled = model.detect(x, sizes, golden["input"]["output_hw"], noise)
    for i in range(2):
        case = golden["cases"][f"{key}/image{i}"]
        assert len(proposals[i]) == case["proposals"]["count"]
        same_set(proposals[i], case["proposals"]["boxes_first"])
        expected, found = case["detections_model_space"], in_model_space[i]
        assert len(found["boxes"]) == expected["count"]
        rows = torch.cat(
            [found["boxes"], found["scores"][:, None], found["labels"][:, None]], dim=1
        )
        scores, classes = expected["scores_first"], expected["classes_first"]
        n = min(len(expected["boxes_first"]), len(scores))
        boxes = expected["boxes_first"][:n]
        same_set(rows, [[*b, s, c] for b, s, c in zip(boxes, scores[:n], classes[:n], strict=True)])
        torch.testing.assert_close(
            found["scores"][: len(scores)], torch.tensor(scores), rtol=0, atol=1e-4
        )
        expected, found = case["postprocessed"], scaled[i]
        assert list(found["masks"].shape[1:]) == expected["output_hw"]
        same_set(found["boxes"], expected["boxes_first"])
        pixels = found["masks"].sum(dim=(1, 2))[: len(expected["mask_pixels_first"])]
        wanted = torch.tensor(expected["mask_pixels_first"])
        assert (pixels - wanted).abs().max() <= 2, "pixels on the edge of a mask may flip"


@pytest.mark.parametrize("case", ["all", "first"])
def test_losses_and_gradients_equal_the_released_ones(detector, case, monkeypatch):
    golden = load("mimdet_full_train")
    expected = golden["cases"][f"{case}/bitmask"]["losses"]
    model = copy.deepcopy(detector).train()
    model.encoder.eval(), model.decoder.eval()
    # "all": nothing is subsampled; "first": random choices take the first ones.
    if case == "all":
        model.config = replace(model.config, rpn_batch=40920, roi_batch=81840)
    monkeypatch.setattr(torch, "randperm", lambda n, device=None: torch.arange(n, device=device))
    images = raw_images()
    targets = []
    for target, (h, w) in zip(golden["input"]["targets"], SIZES, strict=True):
        boxes = torch.tensor(target["boxes_xyxy"])
        masks = torch.stack([diamond(box, h, w) for box in boxes])
        targets.append(dict(boxes=boxes, labels=torch.tensor(target["classes"]), masks=masks))
    losses = model.loss(*mimdet.pad_batch(images, 32), targets, NOISE)
    names = {"loss_box": "loss_box_reg", "loss_rpn_box": "loss_rpn_loc"}
    for name, loss in losses.items():
        wanted = expected[names.get(name, name)]
        assert loss.item() == pytest.approx(wanted, rel=1e-4), name
    sum(losses.values()).backward()
    recorded = golden["cases"][f"{case}/polygon"]
    for key, wanted in recorded["grad"].items():
        # Through BatchNorm's statistics the released gradients carry noise; their mask targets are
        # cut from polygons, where the losses above are of bitmasks, as here.
        mask, head = "mask_head" in key, key.startswith(("proposal_generator", "roi_heads"))
        tolerance = 0.5 if mask else 1e-4 if head else 0.05
        gradient = model.get_parameter(our_name(key)).grad
        assert_close(wanted, key, gradient, tolerance=1e-3)
        assert_close(wanted, key, gradient, tolerance, scale=wanted["std"])
    for key, wanted in recorded["bn_after_step"].items():
        assert_close(wanted, key, model.get_buffer(our_name(key)))


def our_name(key):
    for pattern, name in mimdet.RENAMES:
        key = re.sub(pattern, name, key)
    return key


def diamond(box, h, w):
    """Bool mask (h, w) of the polygon through the midpoints of the box's edges."""
    from pycocotools import mask as mask_api

    x0, y0, x1, y1 = box.tolist()
    xm, ym = (x0 + x1) / 2, (y0 + y1) / 2
    rle = mask_api.frPyObjects([[xm, y0, x1, ym, xm, y1, x0, ym]], h, w)
    return torch.as_tensor(mask_api.decode(mask_api.merge(rle))).bool()
