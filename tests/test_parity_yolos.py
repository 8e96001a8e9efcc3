"""YOLOS against the authors' released code: every recorded number, from filled weights."""

import functools

import numpy as np
import pytest
import torch
from golden import assert_close, checkpoint, image, load

import yolos


@functools.cache
def loaded(name, variant):
    golden = load(name)
    model = yolos.build({"yolos_ti": "tiny", "yolos_s_dwr": "small_dwr"}[name], num_classes=91)
    assert sum(p.numel() for p in model.parameters()) == golden["params"]
    state = yolos.from_official({"model": checkpoint(golden, variant)}, num_classes=91)
    model.load_state_dict(state)
    return model.eval()


def whole(x):
    return [(x.shape[2] // 16, x.shape[3] // 16)] * len(x)


CASES = {
    "256x320": lambda: image(101, 2, 256, 320),
    "480x608": lambda: image(102, 1, 480, 608),
    "odd_513x870": lambda: image(105, 1, 513, 870),
    "padded": lambda: padded(image(106, 1, 224, 320), image(107, 1, 256, 272)),
}


def padded(a, b):
    x = torch.zeros(2, 3, 256, 320)
    x[0, :, :224, :320], x[1, :, :256, :272] = a[0], b[0]
    return x


@pytest.mark.parametrize("variant", ["base", "wide"])
@pytest.mark.parametrize(
    ("name", "case"), [*(("yolos_ti", case) for case in CASES), ("yolos_s_dwr", "256x320")]
)
@torch.no_grad()
def test_logits_and_boxes_equal_the_released_ones(name, case, variant):
    x, expected = CASES[case](), load(name)["expected"]
    logits, boxes = loaded(name, variant).detect(x, whole(x))  # padding is seen, as released
    for output, found in (("pred_logits", logits), ("pred_boxes", boxes)):
        key = f"{variant}/{case}/{output}"
        assert_close(expected[key], key, found)


@torch.no_grad()
def test_an_odd_image_through_the_front_door_equals_the_released_answer():
    x, model = image(105, 1, 513, 870)[0], loaded("yolos_ti", "wide")
    mean, std = (
        torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    small = torch.rand(3, 64, 64)  # company of another size
    found = model([small, x * std + mean])[1]
    logits, boxes = model.detect(x[None], [(32, 54)])
    expected = yolos.select_best(logits[0], boxes[0], (513, 870))
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=1e-3)


def criterion_input():
    r = np.random.RandomState(7)
    logits = torch.as_tensor((2 * r.standard_normal((2, 100, 92))).astype(np.float32))
    boxes = r.rand(2, 100, 4) * [0.8, 0.8, 0.38, 0.38] + [0.1, 0.1, 0.02, 0.02]
    targets = []
    for n in (5, 3):
        labels = torch.as_tensor(r.randint(1, 91, n))
        wanted = r.rand(n, 4) * [0.6, 0.6, 0.35, 0.35] + [0.2, 0.2, 0.05, 0.05]
        targets.append(dict(labels=labels, boxes_norm=torch.as_tensor(wanted.astype(np.float32))))
    return logits, torch.as_tensor(boxes.astype(np.float32)), targets


@pytest.mark.parametrize("case", ["two_images", "second_image_empty"])
def test_matching_losses_and_gradients_equal_the_released_ones(case):
    logits, boxes, targets = criterion_input()
    if case == "second_image_empty":
        targets[1] = {key: value[:0] for key, value in targets[1].items()}
    expected = load("yolos_criterion")["cases"][case]
    pairs = yolos.hungarian_match(logits, boxes, targets)
    assert [[side.tolist() for side in pair] for pair in pairs] == expected["indices"]
    logits.requires_grad_(), boxes.requires_grad_()
    losses = yolos.set_losses(
        logits, boxes, targets, pairs, 0.1, number=sum(len(t["labels"]) for t in targets)
    )
    names = {
        "loss_cls": ("loss_ce", 1),
        "loss_box": ("loss_bbox", 5),
        "loss_giou": ("loss_giou", 2),
    }
    for name, (released, weight) in names.items():
        wanted = weight * expected["losses"][released]
        assert losses[name].item() == pytest.approx(wanted, rel=1e-5)
    sum(losses.values()).backward()
    for name, x in (("pred_logits", logits), ("pred_boxes", boxes)):
        wanted = expected[f"grad_{name}"]
        assert_close(wanted, f"{case}/grad_{name}", x.grad, 1e-5, scale=wanted["std"])


def test_post_processing_equals_the_released_one():
    logits, boxes, _ = criterion_input()
    golden = load("yolos_criterion")
    for i, size in enumerate(golden["input"]["postprocess_target_sizes_hw"]):
        found = yolos.select_best(logits[i], boxes[i], size)
        unsorted = found["tokens"].argsort()  # the released code leaves the order of the tokens
        for name in ("scores", "labels", "boxes"):
            key = f"postprocess/image{i}/{name}"
            assert_close(golden["cases"][key], key, found[name][unsorted], tolerance=1e-5)
