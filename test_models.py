"""What a class runs: do the models do what their files say? CPU, no data, no network."""

import ast
import itertools
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import box_convert, box_iou, generalized_box_iou

import mimdet
import pvt
import simmim
import yolos

ROOT = Path(__file__).parent
FILES = [ROOT / f"{name}.py" for name in ("simmim", "mimdet", "yolos", "pvt")]
FILES = [file for file in FILES if file.exists()]
TINY = replace(
    mimdet.CONFIGS["nano"],
    embed_dim=64,
    depth=2,
    num_heads=2,
    decoder_dim=64,
    fpn_dim=16,
    proposals=20,
    rpn_batch=8,
    roi_batch=16,
)
TINY_YOLOS = replace(
    yolos.CONFIGS["nano"], embed_dim=32, depth=2, num_heads=2, det_tokens=7, pos_grid=(4, 4)
)

TINY_PVT = replace(
    pvt.CONFIGS["nano"],
    embed_dims=(16, 32, 32, 64),
    depths=(1, 1, 1, 1),
    num_heads=(1, 2, 2, 4),
    pos_size=64,
    head_dim=32,
    head_depth=2,
    queries=7,
)

TINY_SIMMIM = replace(
    simmim.CONFIGS["nano"], img_size=64, embed_dim=32, depths=(2,), num_heads=(2,), clusters=5
)


def example(*sizes, objects=2, num_classes=3):
    """Random images of these sizes, each with some square objects."""
    images = [torch.rand(3, *size) for size in sizes]
    targets = []
    for i, (h, w) in enumerate(sizes):
        start = torch.rand(objects, 2) * torch.tensor([w, h]) * 0.6
        boxes = torch.cat([start, start + min(h, w) * 0.35], dim=1)
        masks = torch.zeros(objects, h, w, dtype=torch.bool)
        for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist(), strict=True):
            mask[y0:y1, x0:x1] = True
        labels = torch.randint(num_classes, (objects,))
        targets.append(dict(boxes=boxes, labels=labels, masks=masks, image_id=i))
    return images, targets


def losses_of_training(model, images, targets, steps, lr):
    """Total loss of each step on one batch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    totals = []
    for _ in range(steps):
        loss = sum(model.train()(images, targets).values())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        totals.append(loss.item())
    return totals


@pytest.fixture
def model():
    torch.manual_seed(0)
    return mimdet.build(TINY, num_classes=3)


@pytest.fixture
def calibrated(model):
    """Model in evaluation mode whose BatchNorms have seen data, so that it finds something."""
    with torch.no_grad():
        for _ in range(3):
            model.train()(*example((64, 96), (96, 64)))
        model.box_head.cls_score.weight.mul_(100)
    return model.eval()


# --- Oracles --------------------------------------------------------------------------------------


def test_attention_is_softmax_of_qk_times_v():
    attention, x = mimdet.Attention(8, num_heads=2), torch.randn(3, 5, 8)
    q, k, v = attention.qkv(x).reshape(3, 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
    written_out = (q @ k.transpose(-2, -1) / math.sqrt(4)).softmax(dim=-1) @ v
    expected = attention.proj(written_out.transpose(1, 2).reshape(3, 5, 8))
    torch.testing.assert_close(attention(x), expected)
    mask = torch.tensor([[True, True, True, False, False]])
    torch.testing.assert_close(attention(x, mask)[:, :3], attention(x[:, :3]))


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    drop, x = mimdet.Block(8, 2, drop_path=0.25).drop_path.train(), torch.ones(10000, 2)
    y = drop(x)
    assert y.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert (y[:, 0] == y[:, 1]).all() and abs(y.mean() - 1) < 0.05
    assert drop.eval()(x) is x


@pytest.mark.parametrize("spread", [1.0, 400.0])  # nearly all overlap; hardly any do
def test_proposals_are_the_first_survivors_of_all(spread):
    corners = spread * torch.rand(300, 2)
    anchors = [torch.cat([corners, corners + 20 + 10 * torch.rand(300, 2)], dim=1) for _ in "ab"]
    logits = [torch.randn(2, 300) for _ in anchors]
    deltas = [torch.zeros(2, 300, 4) for _ in anchors]
    found = mimdet.select_proposals(logits, deltas, anchors, [(500, 500)] * 2, 250, 40)
    for i, boxes in enumerate(found):
        best = [level[i].topk(250) for level in logits]
        every = torch.cat([a[top.indices] for a, top in zip(anchors, best, strict=True)])
        scores = torch.cat([top.values for top in best])
        levels = torch.arange(2).repeat_interleave(250)
        keep = mimdet.batched_nms(every, scores, levels, 0.7)
        torch.testing.assert_close(boxes, every[keep][:40], atol=1e-4, rtol=0)
        assert len(boxes) == 40 or spread == 1


@pytest.mark.parametrize("batch", [1, 3])
def test_a_norm_in_parts_is_the_norm(batch):
    norm, x = mimdet.ImageNorm(6, eps=1e-6), 2 + 3 * torch.randn(batch, 6, 9, 5)
    torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
    weight, results = torch.randn_like(x), []
    for forward in (norm, norm.in_parts):
        leaf = x.clone().requires_grad_()
        out = forward(leaf)
        grads = torch.autograd.grad((out * weight).sum(), [leaf, norm.weight, norm.bias])
        results.append([out, *grads])
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)
    assert norm.in_parts(x.bfloat16()).dtype == torch.float32  # as under autocast


def test_a_norm_is_computed_in_parts_on_gpus_alone(monkeypatch):
    class OnGpu(torch.Tensor):
        is_cuda = True

    monkeypatch.setattr(mimdet.ImageNorm, "in_parts", lambda self, x: "in parts")
    norm, x = mimdet.ImageNorm(6), torch.randn(1, 6, 4, 4)
    assert norm(x.as_subclass(OnGpu)) == "in parts"
    assert norm(x).shape == x.shape


def test_boxes_survive_encoding_and_decoding():
    anchors = torch.tensor([[0.0, 0, 10, 20], [5, 5, 50, 30]])
    boxes = torch.tensor([[3.0, 2, 9, 40], [0, 0, 60, 60]])
    for weights in ((1.0, 1.0), mimdet.BOX_WEIGHTS):
        deltas = mimdet.encode_boxes(boxes, anchors, weights)
        torch.testing.assert_close(mimdet.decode_boxes(deltas, anchors, weights), boxes)
    grown = mimdet.decode_boxes(torch.tensor([[0.0, 0, 99, 99]]), anchors[:1])
    assert (grown[0, 2] - grown[0, 0]).item() == pytest.approx(10 * 1000 / 16)


def test_matching_equals_brute_force():
    torch.manual_seed(1)
    corner = torch.rand(40, 2) * 50
    boxes = torch.cat([corner, corner + 5 + torch.rand(40, 2) * 40], dim=1)
    targets, boxes = boxes[:4], boxes[4:]
    matched, label = mimdet.match(boxes, targets, 0.3, 0.7, rescue=True)
    iou = box_iou(boxes, targets)
    rescued = {max(range(len(boxes)), key=lambda i: iou[i, t].item()) for t in range(4)}
    for i in range(len(boxes)):
        best = iou[i].max().item()
        assert iou[i, matched[i]] == best
        expected = 1 if i in rescued or best >= 0.7 else -1 if best >= 0.3 else 0
        assert label[i] == expected
    assert mimdet.match(boxes, torch.zeros(0, 4), 0.3, 0.7)[1].tolist() == [0] * len(boxes)


def test_subsampling_fills_up_with_background():
    label = torch.tensor([1] * 10 + [0] * 50 + [-1] * 5)
    objects, background = mimdet.subsample(label, 16, 0.25)
    assert len(objects) == 4 and len(background) == 12
    assert (label[objects] == 1).all() and (label[background] == 0).all()
    assert len({*objects.tolist(), *background.tolist()}) == 16


def test_pasted_masks_equal_grid_sample():
    torch.manual_seed(0)
    probs, boxes = (
        torch.rand(3, 28, 28),
        torch.tensor([[3.2, 4, 30, 25], [-5, 10, 20, 50], [0, 0, 40, 60]]),
    )
    pasted = mimdet.paste_masks(probs, boxes, (60, 40))
    for p, (x0, y0, x1, y1), mask in zip(probs, boxes.tolist(), pasted, strict=True):
        y = ((torch.arange(60) + 0.5 - y0) / (y1 - y0) * 2 - 1)[:, None].expand(60, 40)
        x = ((torch.arange(40) + 0.5 - x0) / (x1 - x0) * 2 - 1).expand(60, 40)
        grid = torch.stack([x, y], dim=-1)[None]
        sampled = F.grid_sample(p[None, None], grid, align_corners=False)[0, 0]
        sure = (sampled - 0.5).abs() > 1e-4
        assert (mask == (sampled >= 0.5))[sure].all()


def test_cropped_target_masks_are_what_lies_in_the_box():
    mask = torch.zeros(2, 40, 40, dtype=torch.bool)
    mask[1, 10:20, 10:30] = True
    crop = mimdet.crop_masks(mask, torch.tensor([1, 0]), torch.tensor([[10.0, 10, 30, 30]] * 2))
    assert crop[0, :14].all() and not crop[0, 14:].any() and not crop[1].any()


def test_anchors_sit_on_multiples_of_the_stride_and_are_not_rounded():
    maps = [torch.zeros(1, 1, -(-800 // s), -(-1344 // s)) for s in (4, 8, 16, 32, 64)]
    anchors = mimdet.make_anchors(maps, scale=8)
    assert [len(a) for a in anchors] == [3 * m.shape[2] * m.shape[3] for m in maps]
    side = 32 * math.sqrt(2)
    torch.testing.assert_close(
        anchors[0][0], torch.tensor([-side / 2, -side / 4, side / 2, side / 4])
    )
    step = anchors[4][3 * 21] - anchors[4][0]  # one row further down on p6
    assert step.tolist() == [0, 64, 0, 64]


def test_levels_of_crops_follow_the_size_of_the_box():
    maps = [
        torch.full((1, 1, 256 // s, 256 // s), float(level))
        for level, s in enumerate((4, 8, 16, 32), 2)
    ]
    boxes = torch.tensor([[0.0, 0, side, side] for side in (20, 111, 113, 223, 225, 250)])
    levels = mimdet.pool_rois(maps, [boxes], 7, anchor_scale=8)[:, 0, 3, 3].round().tolist()
    assert levels == [2, 2, 3, 3, 4, 4]


# --- MIMDet ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "num_classes", "parameters", "trainable"),
    [
        ("nano", 6, 3_917_964, 3_854_924),
        ("base", 80, 127_954_768, 124_753_488),
        ("large", 80, 349_332_080, 345_490_544),
    ],
)
def test_parameters_are_as_many_as_published(variant, num_classes, parameters, trainable):
    with torch.device("meta"):
        net = mimdet.build(variant, num_classes)
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert sum(p.numel() for p in net.parameters() if p.requires_grad) == trainable
    norms = [
        m
        for part in (net.encoder, net.decoder)
        for m in part.modules()
        if isinstance(m, torch.nn.LayerNorm)
    ]
    assert {m.eps for m in norms} == {1e-5}


def test_learning_rate_groups_are_the_released_ones():
    with torch.device("meta"):
        groups = mimdet.param_groups(mimdet.build("base", 80), mimdet.RECIPES["paper"])
    count = {}
    for group in groups:
        count[group["lr_scale"]] = count.get(group["lr_scale"], 0) + sum(
            p.numel() for p in group["params"]
        )
        assert all((p.ndim > 1) == (group["weight_decay"] > 0) for p in group["params"])
    assert count == {0.5: 85_056_000, 1.0: 4_079_712, 2.0: 35_617_776}


def test_a_plain_stem_learns_as_slowly_as_the_blocks():
    model = mimdet.build(replace(TINY, stem="patch"), 3)
    groups = mimdet.param_groups(model, mimdet.RECIPES["nano"])
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert scale[id(model.encoder.patch_embed.proj.weight)] == 0.5
    assert scale[id(model.scales[0][0].weight)] == 2


def test_every_parameter_gets_a_finite_gradient(model):
    losses = model.train()(*example((64, 96), (96, 64)))
    assert list(losses) == ["loss_rpn_cls", "loss_rpn_box", "loss_cls", "loss_box", "loss_mask"]
    sum(losses.values()).backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert p.grad is not None and torch.isfinite(p.grad).all(), name
        else:
            assert name.endswith("pos_embed")


@pytest.mark.parametrize("fill", ["conv", "mask"])
@pytest.mark.parametrize("ratio", [0.25, 1.0])
def test_both_fills_train_at_every_ratio(fill, ratio):
    model = mimdet.build(replace(TINY, fill=fill, sample_ratio=ratio, checkpoint=True), 3).train()
    sum(model(*example((64, 64))).values()).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_images_without_objects_have_losses(model):
    images, targets = example((64, 64), (64, 64))
    nothing = example((64, 64), (64, 64), objects=0)[1]
    for mixed in (nothing, [targets[0], nothing[1]]):
        losses = model.train()(images, mixed)
        sum(losses.values()).backward()
        assert all(torch.isfinite(loss) for loss in losses.values())
    assert model(images, nothing)["loss_mask"] == 0


def test_boxes_alone_train_without_a_mask_head():
    model = mimdet.build(replace(TINY, masks=False), 3)
    images, targets = example((64, 64))
    del targets[0]["masks"]
    assert "loss_mask" not in model.train()(images, targets)
    assert "masks" not in model.eval()(images)[0]


@pytest.mark.parametrize("size", [(64, 96), (96, 64), (33, 47), (112, 112), (1, 70)])
@torch.no_grad()
def test_any_size_gives_sorted_detections_inside_the_image(calibrated, size):
    found = calibrated(example(size)[0])[0]
    D = len(found["scores"])
    assert found["boxes"].shape == (D, 4) and found["labels"].shape == (D,)
    assert found["masks"].shape == (D, *size) and found["masks"].dtype == torch.bool
    assert (found["scores"].diff() <= 0).all() and (found["labels"] < 3).all()
    assert (found["boxes"] >= 0).all() and (found["boxes"][:, 2] <= size[1]).all()
    assert (found["boxes"][:, 3] <= size[0]).all()


def same(a, b):
    for key in a:
        torch.testing.assert_close(a[key].float(), b[key].float(), rtol=1e-4, atol=1e-3)


@torch.no_grad()
def test_company_does_not_change_a_prediction(calibrated):
    images, _ = example((64, 96), (128, 64), (60, 90))
    together = calibrated(images)
    assert sum(len(found["boxes"]) for found in together) > 0
    for image, found in zip(images, together, strict=True):
        same(calibrated([image])[0], found)
        same(calibrated([image])[0], calibrated([image])[0])


@pytest.mark.parametrize("model", [mimdet, yolos, pvt])
@pytest.mark.parametrize(
    "images",
    [
        [],
        torch.rand(3, 32, 32),
        [torch.rand(1, 32, 32)],
        [torch.rand(1, 3, 32, 32)],
        [torch.zeros(3, 32, 32).byte()],
    ],
)
def test_images_of_another_kind_are_refused(model, images):
    with pytest.raises(ValueError, match=r"images: give a list of tensors \(3, h, w\), floats"):
        model.pad_batch(images, 32)


@torch.no_grad()
def test_sizes_scale_the_answer(calibrated):
    image = example((64, 96))[0]
    small, large = calibrated(image)[0], calibrated(image, sizes=[(128, 192)])[0]
    assert len(small["boxes"]) > 0
    torch.testing.assert_close(small["boxes"] * 2, large["boxes"])
    assert large["masks"].shape[1:] == (128, 192)


def test_sampling_keeps_the_share_and_never_padding_while_there_are_real_tokens():
    sizes, grid = [(64, 96), (33, 50)], (4, 6)  # the second image has 3 x 4 real tokens
    ids = mimdet.sample_tokens(torch.rand(2, 24), sizes, grid, 0.5)
    assert ids.shape == (2, 12)
    assert all(i // 6 < 3 and i % 6 < 4 for i in ids[1].tolist())
    assert len(mimdet.sample_tokens(torch.rand(2, 24), sizes, grid, 0.75)[1].unique()) == 18


@torch.no_grad()
def test_full_ratio_equals_no_shuffling_and_dropped_places_are_filled_from_the_stem(model):
    x, sizes = mimdet.pad_batch(example((64, 96))[0], 32)
    plain = model.eval().backbone(x, sizes, 1.0)
    model.encoder.train()  # shuffles, with every token kept
    for a, b in zip(plain, model.backbone(x, sizes, 1.0), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    seen = []
    model.decoder.decoder_blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    tokens, ids, (_, _, stem) = model.encoder(x, sizes, 0.5)
    model.decoder(tokens, ids, stem)
    x = seen[0] - mimdet.pos_embed_for(model.decoder.decoder_pos_embed, stem.shape[-2:])
    dropped = [i for i in range(24) if i not in ids[0].tolist()]
    fill = model.decoder.conv_feat_proj(stem.flatten(2).transpose(1, 2))
    torch.testing.assert_close(x[0, dropped], fill[0, dropped], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        x[0, ids[0]], model.decoder.decoder_embed(tokens)[0], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("patch", [4, 8, 16, 32])
def test_plain_patches_make_the_pyramid_from_one_map(patch):
    torch.manual_seed(0)
    model = mimdet.build(replace(TINY, stem="patch", patch=patch), 3).train()
    images, targets = example((64, 96), (96, 64))
    sum(model(images, targets).values()).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None or not p.requires_grad, name
    x, sizes = mimdet.pad_batch(images[:1], 32)
    maps = model.backbone(x, sizes, 0.5)
    assert [tuple(m.shape[2:]) for m in maps] == [(64 // s, 96 // s) for s in (4, 8, 16, 32)]
    images = example((64, 96), (33, 47))[0]
    with torch.no_grad():
        for image, found in zip(images, model.eval()(images), strict=True):
            same(model([image])[0], found)


def test_small_patches_in_padding_are_not_sampled():
    ids = mimdet.sample_tokens(torch.rand(1, 96), [(33, 50)], (8, 12), 0.36, stride=8)
    assert all(i // 12 < 5 and i % 12 < 7 for i in ids[0].tolist())  # 34 of the 35 real ones
    model = mimdet.build(replace(TINY, stem="patch", patch=8, eval_ratio=0.5), 3).eval()
    ids = model.encoder(torch.rand(1, 3, 64, 96), [(33, 96)], 0.5)[1]
    assert all(i // 12 < 5 for i in ids[0].tolist())


@torch.no_grad()
def test_portrait_and_landscape_have_different_position_tables(model):
    landscape = mimdet.pos_embed_for(model.encoder.pos_embed, (4, 6))
    portrait = mimdet.pos_embed_for(model.encoder.pos_embed, (6, 4))
    swapped = portrait.unflatten(1, (6, 4)).transpose(1, 2).flatten(1, 2)
    half = landscape.shape[2] // 2  # the halves for x and y change places
    torch.testing.assert_close(
        landscape, torch.cat([swapped[..., half:], swapped[..., :half]], dim=2)
    )
    assert not torch.equal(landscape, portrait)


def test_overfits_one_batch(model):
    """40 steps bring the loss below 0.6 of where it began."""
    torch.manual_seed(0)
    images, targets = example((64, 64), (64, 96), objects=1)
    totals = losses_of_training(model, images, targets, steps=40, lr=2e-3)
    assert sum(totals[-5:]) / 5 < 0.6 * totals[0], totals


# --- YOLOS ----------------------------------------------------------------------------------------


def yolos_model(seed=0, **fields):
    torch.manual_seed(seed)
    return yolos.build(replace(TINY_YOLOS, **fields), num_classes=3)


PLAIN = dict(
    stem="patch", reference_points=False, patch_loss=0.0, xavier=False, mid_pos_grid=(4, 6)
)
YOLOS_DESIGNS = [
    pytest.param({}, id="nano"),
    pytest.param(PLAIN, id="plain"),
    pytest.param(dict(stem="patch", patch=8), id="patch8"),
]


@pytest.mark.parametrize(
    ("variant", "with_91_classes", "with_80"),
    [
        ("nano", 807_152, 805_733),
        ("tiny", 6_488_736, 6_486_613),
        ("small", 30_684_768, 30_680_533),
        ("small_dwr", 27_561_696, 27_558_055),
        ("base", 127_798_368, 127_789_909),
    ],
)
def test_yolos_has_as_many_parameters_as_published(variant, with_91_classes, with_80):
    for num_classes, parameters in ((91, with_91_classes), (80, with_80)):
        with torch.device("meta"):
            net = yolos.build(variant, num_classes)
        assert sum(p.numel() for p in net.parameters()) == parameters
    assert {m.eps for m in net.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-6}


def test_yolos_decays_what_the_released_code_decays():
    with torch.device("meta"):
        model = yolos.build("small", 91)
    names = {id(p): name for name, p in model.named_parameters()}
    exempt = set()
    for group in yolos.param_groups(model, yolos.RECIPES["paper"]):
        assert group["lr_scale"] == 1 and group["weight_decay"] in (0, 1e-4)
        if group["weight_decay"] == 0:
            exempt |= {names[id(p)] for p in group["params"]}
    tokens = {f"backbone.{name}" for name in ("pos_embed", "cls_token", "det_token")}
    assert tokens <= exempt and "backbone.mid_pos_embed" not in exempt
    assert {"bbox_embed.layers.0.bias", "class_embed.layers.2.bias"} & exempt == set()
    assert {"backbone.blocks.3.norm1.weight", "backbone.blocks.3.attn.qkv.bias"} <= exempt
    assert all(model.get_parameter(name).ndim == 1 or name in tokens for name in exempt)


def test_hungarian_matching_equals_brute_force():
    torch.manual_seed(0)
    logits, boxes = torch.randn(2, 5, 4), torch.rand(2, 5, 4) * 0.4 + 0.2
    targets = [
        dict(labels=torch.randint(3, (m,)), boxes_norm=torch.rand(m, 4) * 0.4 + 0.2) for m in (3, 0)
    ]
    pairs = yolos.hungarian_match(logits, boxes, targets)

    def cost(query, item):
        box, wanted = boxes[0, query], targets[0]["boxes_norm"][item]
        corners = (box_convert(b[None], "cxcywh", "xyxy") for b in (box, wanted))
        probability = logits[0, query].softmax(dim=0)[targets[0]["labels"][item]]
        giou = generalized_box_iou(*corners)
        return (5 * (box - wanted).abs().sum() - probability - 2 * giou).item()

    best = min(
        sum(cost(query, item) for item, query in enumerate(queries))
        for queries in itertools.permutations(range(5), 3)
    )
    assert sum(cost(query, item) for query, item in zip(*pairs[0], strict=True)) == pytest.approx(
        best
    )
    assert [len(side) for side in pairs[1]] == [0, 0]


@pytest.mark.parametrize("side", [0.3, 0.01])
def test_giou_of_pairs_has_nothing_added(side):
    torch.manual_seed(0)
    a = box_convert(torch.rand(50, 4) * side + 0.01, "cxcywh", "xyxy")
    b = a + torch.randn(50, 4) * side / 10
    b = torch.cat([torch.minimum(b[:, :2], b[:, 2:]), torch.maximum(b[:, :2], b[:, 2:])], dim=1)
    expected = generalized_box_iou(a, b).diag()
    assert torch.equal(yolos.paired_giou(a, b), expected)
    assert torch.equal(yolos.paired_giou(a, a), torch.ones(50))
    assert yolos.paired_giou(a[:0], b[:0]).shape == (0,)


def test_more_objects_than_det_tokens_are_matched_as_far_as_the_tokens_go():
    images, targets = example((64, 64), objects=9)
    losses = yolos_model()(images, targets)
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())


@pytest.mark.parametrize("fields", YOLOS_DESIGNS)
def test_every_parameter_of_yolos_gets_a_finite_gradient(fields):
    model = yolos_model(**fields, checkpoint=True).train()
    losses = model(*example((64, 96), (96, 64)))
    names = ["loss_cls", "loss_box", "loss_giou"]
    names += [] if fields is PLAIN else ["loss_patch_cls", "loss_patch_box", "loss_patch_giou"]
    assert list(losses) == names
    sum(losses.values()).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all() and p.grad.any(), name


def test_yolos_has_losses_without_any_object():
    images, targets = example((64, 64), (64, 96), objects=0)
    model = yolos_model()
    losses = model(images, targets)
    sum(losses.values()).backward()
    assert losses["loss_box"] == losses["loss_giou"] == 0 < losses["loss_cls"]
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("fields", YOLOS_DESIGNS)
@pytest.mark.parametrize("size", [(64, 96), (96, 64), (33, 47), (112, 112), (1, 70)])
@torch.no_grad()
def test_yolos_answers_for_any_size_alone_as_in_company(fields, size):
    model = yolos_model(**fields).eval()
    images, _ = example(size, (64, 80), (80, 64), (70, 90))
    for image, found in zip(images, model(images), strict=True):
        alone = model([image])[0]
        same(alone, found)
        assert found["boxes"].shape == (7, 4) and sorted(found["tokens"].tolist()) == list(range(7))
        assert (found["scores"].diff() <= 0).all() and (found["labels"] < 3).all()
        larger = model([image], sizes=[(2 * image.shape[1], 3 * image.shape[2])])[0]
        scaled = found["boxes"] * torch.tensor([3, 2, 3, 2])
        torch.testing.assert_close(larger["boxes"], scaled, rtol=1e-4, atol=1e-3)


def test_points_make_the_nearest_query_responsible():
    points = yolos.spread_points(9)
    first = torch.tensor([[1, 1], [3, 1], [5, 1], [1, 3]]) / 6
    torch.testing.assert_close(points[:4], first)
    boxes = torch.tensor([0.5, 0.5, 0.3, 0.3]).expand(1, 9, 4)  # predictions say nothing yet
    wanted = torch.cat([points[[7, 2]] + 0.04, torch.tensor([[0.3, 0.2]]).expand(2, 2)], dim=1)
    targets = [dict(labels=torch.tensor([0, 1]), boxes_norm=wanted)]
    ((query, item),) = yolos.hungarian_match(torch.zeros(1, 9, 4), boxes, targets, points)
    assert query.tolist() == [2, 7] and item.tolist() == [1, 0]


def test_patches_answer_for_the_smallest_object_over_them():
    boxes = torch.tensor([[0.5, 0.5, 1.0, 1.0], [0.25, 0.25, 0.4, 0.4]])
    item = yolos.smallest_cover(yolos.grid_points(4, 4), boxes)
    assert item.tolist() == [1, 1, 0, 0, 1, 1, *[0] * 10]
    assert yolos.smallest_cover(yolos.grid_points(4, 4), boxes[1:]).tolist()[2:4] == [-1, -1]
    assert yolos.smallest_cover(yolos.grid_points(2, 2), boxes[:0]).tolist() == [-1] * 4


def test_patches_have_their_places_in_images_they_do_not_fill():
    target = dict(labels=torch.tensor([0]), boxes_norm=torch.tensor([[0.8, 0.6, 0.2, 0.2]]))
    for grid, found in ((2, 3), [5]), ((3, 4), [6]):  # of 40 x 50 pixels: too few patches, too many
        points, (patch, item) = yolos.cover_pairs([grid], [(40, 50)], 16, [target], "cpu")
        centres = [
            (min(0.999, x / 50), min(0.999, y / 40)) for y in (8, 24, 40) for x in (8, 24, 40, 56)
        ]
        inside = [i for i in range(12) if i // 4 < grid[0] and i % 4 < grid[1]]
        assert torch.allclose(points, torch.tensor([centres[i] for i in inside]))
        assert patch.tolist() == found and item.tolist() == [0]


@torch.no_grad()
def test_padding_changes_no_loss_of_plain_yolos():
    model = yolos_model(**PLAIN | dict(patch_loss=1.0))
    images, targets = example((64, 96), (32, 48), objects=1)
    together = model(images, targets)
    alone = [model([i], [t]) for i, t in zip(images, targets, strict=True)]
    for name in ("loss_box", "loss_giou"):  # one object each: the mean of the two
        mean = sum(losses[name] for losses in alone) / 2
        torch.testing.assert_close(together[name], mean, rtol=1e-4, atol=1e-5)
    patches = [4 * 6, 2 * 3]
    mean = sum(n * losses["loss_patch_cls"] for n, losses in zip(patches, alone, strict=True)) / 30
    torch.testing.assert_close(together["loss_patch_cls"], mean, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_position_tables_are_resized_by_grid_and_not_by_count():
    table = torch.randn(2, 1 + 4 * 6 + 7, 8)
    assert torch.equal(yolos.positions_for(table, (4, 6), [(4, 6)])[:, 0], table)
    turned = yolos.positions_for(table, (4, 6), [(6, 4)])[:, 0]  # as many patches
    grid = table[:, 1:25].transpose(1, 2).unflatten(2, (4, 6))
    grid = F.interpolate(grid, size=(6, 4), mode="bicubic", align_corners=False)
    torch.testing.assert_close(turned[:, 1:25], grid.flatten(2).transpose(1, 2))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(yolos.positions_for(table, (4, 6), [(6, 4)])[:, 0], turned)
    assert torch.equal(turned[:, 0], table[:, 0]) and torch.equal(turned[:, 25:], table[:, 25:])


@pytest.mark.parametrize("count", [1, 2, 25, 100])
def test_any_number_of_det_tokens(count):
    points = yolos.spread_points(count)
    assert points.shape == (count, 2) and len(points.unique(dim=0)) == count
    assert ((points > 0) & (points < 1)).all()
    for fields in ({}, PLAIN, dict(stem="patch", patch=8)):
        model = yolos_model(det_tokens=count, **fields)
        assert len(model(example((64, 64))[0])[0]["boxes"]) == count


@torch.no_grad()
def test_attention_maps_are_the_ones_the_last_block_uses():
    """Values weighted by the maps, plus those of the other tokens, give the block's own output."""
    model = yolos_model(**PLAIN).eval()
    seen, last = [], model.backbone.blocks[-1].attn
    last.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    image = torch.rand(3, 64, 96)
    model([image])
    maps = model.attention(image)
    assert maps.shape == (7, 2, 4, 6) and (maps.sum(dim=(2, 3)) < 1).all()
    x, output = seen[0]
    q, k, v = last.qkv(x)[0].unflatten(1, (3, 2, 16)).permute(1, 2, 0, 3)
    weights = (q @ k.transpose(1, 2) / 4).softmax(dim=2)  # (h, N, N)
    torch.testing.assert_close(weights[:, -7:, 1:-7], maps.flatten(2).transpose(0, 1))
    written_out = last.proj((weights @ v).transpose(0, 1).flatten(1))
    torch.testing.assert_close(written_out, output[0], rtol=1e-4, atol=1e-5)


def test_specialisation_is_one_for_what_the_token_tells_and_none_for_the_rest():
    torch.manual_seed(0)
    tokens = torch.arange(9).repeat(200)  # one token for each of 3 x 3 places
    center = torch.stack([tokens % 3, tokens // 3], dim=1) / 3 + 1 / 6
    boxes = torch.cat([center, torch.rand(1800, 2)], dim=1)
    told = yolos.specialisation(tokens, boxes, torch.randint(6, (1800,)))
    assert told["place"][0] == pytest.approx(1) and told["place"][1] < 0.05
    for name in ("size", "category"):
        assert told[name][0] < 0.05 and told[name][1] < 0.05


def test_yolos_overfits_one_batch():
    """60 steps halve the loss."""
    model, (images, targets) = yolos_model(), example((64, 64), (64, 96), objects=1)
    totals = losses_of_training(model, images, targets, steps=60, lr=2e-3)
    assert sum(totals[-5:]) / 5 < 0.5 * totals[0], totals


# --- PVT ------------------------------------------------------------------------------------------


def pvt_model(head="retinanet", seed=0, **fields):
    torch.manual_seed(seed)
    return pvt.build(replace(TINY_PVT, head=head, **fields), num_classes=3)


def pvt_example(head, *sizes, objects=2):
    """Random images with targets as this head wants them."""
    images, targets = example(*sizes, objects=objects)
    if head == "classifier":
        targets = [dict(labels=t["labels"][:1]) for t in targets]
    if head in ("semantic", "trans2seg"):
        maps = [torch.full(size, 3) for size in sizes]
        for canvas, t in zip(maps, targets, strict=True):
            for mask, label in zip(t["masks"], t["labels"], strict=True):
                canvas[mask] = label
        targets = [dict(semantic=canvas) for canvas in maps]
    return images, targets


@pytest.mark.parametrize(
    ("variant", "head", "num_classes", "parameters"),
    [
        ("nano", "retinanet", 6, 1_272_602),
        ("tiny", "retinanet", 80, 22_964_724),
        ("small", "retinanet", 80, 34_221_300),
        ("medium", "retinanet", 80, 53_943_540),
        ("large", "retinanet", 80, 71_104_756),
        ("tiny", "classifier", 1000, 13_229_288),
        ("small", "classifier", 1000, 24_485_864),
        ("medium", "classifier", 1000, 44_208_104),
        ("large", "classifier", 1000, 61_369_320),
        ("v2_b0", "classifier", 1000, 3_666_760),
        ("v2_b1", "classifier", 1000, 14_009_000),
        ("v2_b2", "classifier", 1000, 25_362_856),
        ("v2_b2_li", "classifier", 1000, 22_553_512),
        ("v2_b3", "classifier", 1000, 45_238_696),
        ("v2_b4", "classifier", 1000, 62_556_072),
        ("v2_b5", "classifier", 1000, 81_956_008),
        ("small", "detr", 80, 41_645_141),
        ("tiny", "semantic", 149, 16_981_398),  # 150 classes: ADE20K has no background
        ("large", "semantic", 149, 65_121_430),
    ],
)
def test_pvt_has_as_many_parameters_as_published(variant, head, num_classes, parameters):
    with torch.device("meta"):
        model = pvt.build(replace(pvt.CONFIGS[variant], head=head), num_classes)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_pvt_costs_as_much_as_published():
    """1.93 billion multiplications with attention, for a classifier at 224 x 224."""
    config = replace(pvt.CONFIGS["tiny"], head="classifier")
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        pvt.build(config, 1000).eval().every_layer([torch.rand(3, 224, 224)])
    assert counter.get_total_flops() / 2e9 == pytest.approx(1.93, abs=0.01)


def test_pvt_mixes_two_epsilons_as_released():
    for name, module in pvt_model("classifier").backbone.named_modules():
        if isinstance(module, torch.nn.LayerNorm):
            inner = name.startswith("patch_embed") or ".attn." in name
            assert module.eps == (1e-5 if inner else 1e-6), name


def test_spatial_reduction_attention_is_attention_to_shrunk_tokens():
    attention, x = pvt.SpatialReductionAttention(8, num_heads=2, sr_ratio=2), torch.randn(3, 24, 8)
    keys = attention.norm(attention.sr(x.transpose(1, 2).reshape(3, 8, 4, 6)).flatten(2).mT)
    assert keys.shape == (3, 6, 8)
    q = attention.q(x).reshape(3, 24, 2, 4).transpose(1, 2)
    k, v = attention.kv(keys).reshape(3, 6, 2, 2, 4).permute(2, 0, 3, 1, 4)
    written_out = (q @ k.mT / 2).softmax(dim=-1) @ v
    expected = attention.proj(written_out.transpose(1, 2).reshape(3, 24, 8))
    torch.testing.assert_close(attention(x, (4, 6)), expected)


def test_linear_attention_reads_7_x_7_means():
    attention, x = pvt.LinearSpatialReductionAttention(8, 2), torch.randn(3, 24 * 20, 8)
    grid = F.adaptive_avg_pool2d(x.mT.reshape(3, 8, 24, 20), 7)
    keys = F.gelu(attention.norm(attention.sr(grid).flatten(2).mT))
    q = attention.q(x).reshape(3, -1, 2, 4).transpose(1, 2)
    k, v = attention.kv(keys).reshape(3, 49, 2, 2, 4).permute(2, 0, 3, 1, 4)
    written_out = ((q @ k.mT / 2).softmax(dim=-1) @ v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attention(x, (24, 20)), attention.proj(written_out))


@pytest.mark.parametrize("relu", [False, True])
def test_mlp_of_v2_convolves_each_channel(relu):
    mlp, x = pvt.DepthwiseMlp(4, 6, relu), torch.randn(2, 12, 4)
    y = mlp.fc1(x)
    y = (y.relu() if relu else y).mT.reshape(2, 6, 3, 4)
    y = F.conv2d(y, mlp.dwconv.weight, mlp.dwconv.bias, padding=1, groups=6)
    torch.testing.assert_close(mlp(x, (3, 4)), mlp.fc2(F.gelu(y.flatten(2).mT)))


def test_boxes_are_selected_level_by_level_and_thinned():
    logits = torch.full((6, 2), -9.0)
    logits[0, 0], logits[1, 0], logits[2, 1], logits[3, 0], logits[4, 0] = 3, 2, 1, 0.5, 0
    boxes = torch.tensor([[0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 10], [20, 20, 40, 60]])
    anchors = torch.cat([boxes, torch.tensor([[0, 15, 10, 21], [0, 15, 10, 20]])]).float()
    levels = [
        (logits, torch.zeros(6, 4), anchors),
        (logits[:1] - 1, torch.zeros(1, 4), anchors[4:5]),
    ]
    found = pvt.select_boxes(levels, (50, 30))
    # The second overlaps the first, in its class; the fourth is clipped; the last level's is best
    # of those at its place.
    assert found["boxes"].tolist() == [
        [0, 0, 10, 10],
        [0, 15, 10, 21],
        [0, 0, 10, 10],
        [20, 20, 30, 50],
    ]
    assert found["labels"].tolist() == [0, 0, 1, 0]
    torch.testing.assert_close(found["scores"], torch.tensor([3, 2, 1, 0.5]).sigmoid())
    assert len(pvt.select_boxes(levels, (50, 30), top=2)["boxes"]) == 2
    assert len(pvt.select_boxes(levels, (50, 30), per_level=1)["boxes"]) == 2


def test_assignment_of_anchors_equals_brute_force():
    torch.manual_seed(1)
    corner = torch.rand(300, 2) * 50
    anchors = torch.cat([corner, corner + 5 + torch.rand(300, 2) * 40], dim=1)
    boxes, anchors = anchors[:4].clone(), anchors[4:]
    boxes[3] = boxes[2]  # the later of two equal boxes gets the anchors they share
    boxes[1] = torch.tensor([40.0, 40, 42, 41])  # small: no anchor overlaps it by half
    iou = box_iou(boxes, anchors)
    expected = []
    for n in range(len(anchors)):
        best = max(range(4), key=lambda m: (iou[m, n].item(), -m))
        item = best if iou[best, n] >= 0.5 else -1 if iou[best, n] < 0.4 else -2
        for m in range(4):
            item = m if iou[m, n] == iou[m].max() else item
        expected.append(item)
    assert pvt.assign_anchors(anchors, boxes).tolist() == expected
    assert {-2, -1, 0, 1, 3} <= set(expected)
    assert pvt.assign_anchors(anchors, boxes[:0]).tolist() == [-1] * len(anchors)


def test_small_pictures_have_gradients_in_bfloat16_too():
    """PyTorch leaves some unwritten for maps one pixel wide, which here are P6 and P7."""
    model = pvt_model()
    images, targets = example((64, 64), (64, 48))
    with torch.autocast("cpu", torch.bfloat16):
        loss = sum(model(images, targets).values())
    weights = model.head.p6.weight, model.head.p7.weight
    for weight in weights:  # memory that will be given out once more
        [torch.full((weight.numel(),), torch.nan) for _ in range(50)]
    loss.backward()
    assert all(weight.grad.isfinite().all() for weight in weights)


def test_retinanet_losses_equal_brute_force():
    torch.manual_seed(2)
    anchors, K = torch.tensor([[0.0, 0, 8, 8], [4, 4, 20, 20], [0, 0, 9, 10]]), 2
    head = pvt_model().head
    target = dict(boxes=torch.tensor([[0.0, 0, 8, 8]]), labels=torch.tensor([1]))
    nothing = dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))
    logits, deltas = torch.randn(2, 3, K), torch.randn(2, 3, 4)
    losses = head.loss(([logits], [deltas], [anchors]), [target, nothing], None)
    wanted = torch.zeros(2, 3, K)
    wanted[0, 0, 1] = wanted[0, 2, 1] = 1  # IoU 1 and 64 / 90
    p = logits.sigmoid()
    focal = -wanted * 0.25 * (1 - p) ** 2 * p.log() - (1 - wanted) * 0.75 * p**2 * (1 - p).log()
    assert losses["loss_cls"].item() == pytest.approx(focal.sum().item() / 3, rel=1e-5)  # 2 + 1
    offsets = torch.tensor([[0.0, 0, 0, 0], [-0.5 / 9, -1 / 10, math.log(8 / 9), math.log(0.8)]])
    error = (deltas[0, [0, 2]] - offsets).abs().sum().item()
    assert losses["loss_box"].item() == pytest.approx(error / 3, rel=1e-5)


DESIGNS = ["v1", "v2", "v2_li"]


@pytest.mark.parametrize("head", list(pvt.HEADS))
@pytest.mark.parametrize("design", DESIGNS)
def test_every_parameter_of_pvt_gets_a_finite_gradient(head, design):
    model = pvt_model(head, design=design, checkpoint=True).train()
    losses = model(*pvt_example(head, (64, 96), (96, 64)))
    sum(losses.values()).backward()
    for name, p in model.named_parameters():
        # DETR's decoder begins with zeros: its first self-attention has nothing to mix.
        unused = name.startswith(("head.decoder.0.self_attn.", "head.decoder.0.norms.0."))
        assert p.grad is not None and torch.isfinite(p.grad).all(), name
        assert p.grad.any() or unused and head == "detr", name


@pytest.mark.parametrize("head", ["retinanet", "detr", "semantic", "trans2seg"])
def test_pvt_has_losses_without_any_object(head):
    losses = pvt_model(head)(*pvt_example(head, (64, 64), (64, 96), objects=0))
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())


@pytest.mark.parametrize("head", list(pvt.HEADS))
@pytest.mark.parametrize("size", [(64, 96), (33, 47), (112, 112), (1, 70)])
@torch.no_grad()
def test_pvt_answers_for_any_size_alone_as_in_company(head, size):
    model = pvt_model(head).eval()
    if head == "retinanet":
        model.head.retina_cls.bias.zero_()  # finds something
    images, _ = example(size, (64, 80), (80, 64), (70, 90))
    for image, found in zip(images, model(images), strict=True):
        alone, (h, w) = model([image])[0], image.shape[1:]
        if "semantic" in found:  # two classes may tie
            assert (alone["semantic"] != found["semantic"]).sum() <= 0.01 * h * w
        else:
            same(alone, found)
        larger = model([image], sizes=[(2 * h, 3 * w)])[0]
        if head == "classifier":
            assert found["logits"].shape == (3,)
        elif head in ("semantic", "trans2seg"):
            assert found["semantic"].shape == (h, w) and found["semantic"].max() <= 3
            assert larger["semantic"].shape == (2 * h, 3 * w)
        else:
            assert len(found["boxes"]) and found["labels"].max() < 3
            assert (found["scores"].diff() <= 0).all()
            scaled = found["boxes"] * torch.tensor([3, 2, 3, 2])
            torch.testing.assert_close(larger["boxes"], scaled, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("design", DESIGNS)
@torch.no_grad()
def test_pyramid_has_strides_4_to_32_for_any_size(design):
    backbone = pvt_model(design=design).backbone.eval()
    for h, w in ((64, 96), (96, 32), (70, 101)):
        for s, x in enumerate(backbone(torch.rand(1, 3, h, w))):
            stride = 4 * 2**s
            least = (h // stride, w // stride)
            most = (-(-h // stride), -(-w // stride))
            assert x.shape[1] == TINY_PVT.embed_dims[s]
            assert x.shape[2:] == (least if design == "v1" else most)


@pytest.mark.parametrize("head", ["detr", "trans2seg"])
@torch.no_grad()
def test_queries_do_not_look_at_padding(head):
    model, images = pvt_model(head).eval(), example((64, 64), (64, 128))[0]
    x, sizes = pvt.pad_batch(images, 32)
    maps = model.backbone(x)
    maps[3][0, :, :, 2:] = 0
    other = [m.clone() for m in maps]
    other[3][0, :, :, 2:] = 99
    found, again = model.head(maps, sizes), model.head(other, sizes)
    if head == "detr":
        torch.testing.assert_close(found[0], again[0])
    else:  # its convolutions spread padding, but not to the left end
        torch.testing.assert_close(found[0, :, :, :2], again[0, :, :, :2])


def test_semantic_loss_is_a_mean_over_all_pixels():
    torch.manual_seed(0)
    logits, wanted = torch.randn(2, 4, 2, 3), torch.randint(-1, 4, (2, 8, 12))
    targets = [dict(semantic=wanted[0]), dict(semantic=wanted[1, :7, :9])]
    full = F.interpolate(logits, scale_factor=4, mode="bilinear").log_softmax(dim=1)
    total = 0.0
    for image, (h, w) in enumerate([(8, 12), (7, 9)]):
        for y, x in itertools.product(range(h), range(w)):
            k = wanted[image, y, x]
            total -= full[image, k, y, x].item() if k >= 0 else 0
    found = pvt.Segmenter().loss(logits, targets, None)["loss_semantic"].item()
    assert found == pytest.approx(total / (2 * 8 * 12), rel=1e-5)


def test_pvt_decays_and_slows_what_the_released_recipes_do():
    model = pvt_model()
    (group,) = pvt.param_groups(model, pvt.RECIPES["paper"])
    assert group["weight_decay"] == 1e-4 and len(group["params"]) == len([*model.parameters()])
    model = pvt_model("detr")
    scales = {g["lr_scale"]: g["params"] for g in pvt.param_groups(model, pvt.RECIPES["detr"])}
    assert len(scales[0.1]) == len([*model.backbone.parameters()])
    model = pvt_model("classifier")
    names = {id(p): name for name, p in model.named_parameters()}
    for group in pvt.param_groups(model, pvt.RECIPES["classifier"]):
        for name in (names[id(p)] for p in group["params"]):
            exempt = name.endswith(("bias", "cls_token")) or "norm" in name
            assert (group["weight_decay"] == 0) == exempt, name


@pytest.mark.parametrize("head", list(pvt.HEADS))
def test_pvt_overfits_one_batch(head):
    """40 steps bring the loss below 0.6 of where it began."""
    model, (images, targets) = pvt_model(head), pvt_example(head, (64, 64), (64, 96), objects=1)
    totals = losses_of_training(model, images, targets, steps=40, lr=2e-3)
    assert sum(totals[-5:]) / 5 < 0.6 * totals[0], totals


# --- SimMIM ---------------------------------------------------------------------------------------

ENCODERS = {
    "vit": {},
    "beit": dict(encoder="beit"),
    "swin": dict(encoder="swin", patch=4, depths=(2, 2, 2), num_heads=(1, 2, 4), window=4),
    "swin_v2": dict(encoder="swin_v2", patch=4, depths=(2, 2), num_heads=(1, 2), window=4),
}
TARGETS = ["pixels", "bins8", "bins256", "color_cluster", "tokens"]


def simmim_model(encoder="vit", seed=0, **fields):
    torch.manual_seed(seed)
    return simmim.build(replace(TINY_SIMMIM, **ENCODERS[encoder] | fields), num_classes=3)


@pytest.mark.parametrize(
    ("variant", "fields", "parameters"),
    [
        ("nano", {}, 1_903_680),
        ("vit_base", {}, 86_256_720),
        ("swin_base", {}, 89_874_104),
        ("swin_large", {}, 199_881_204),
        ("swin_base", dict(head="mlp2"), 90_923_704),  # paper: 90.9 million, 115.2 and 174.8
        ("swin_base", dict(head="inverse_swin_t"), 115_018_274),
        ("swin_base", dict(head="inverse_swin_b"), 174_490_784),
        ("swinv2_h", {}, 663_898_186),
        ("swinv2_g", {}, 3_010_506_976),
    ],
)
def test_simmim_has_as_many_parameters_as_published(variant, fields, parameters):
    with torch.device("meta"):
        model = simmim.build(replace(simmim.CONFIGS[variant], **fields), 1)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("kind", ["random", "square", "block"])
@pytest.mark.parametrize("ratio", [0.11, 0.4, 0.6, 0.8])
@pytest.mark.parametrize("cells", [(6, 6), (14, 14), (5, 9)])
def test_masks_hide_their_share(kind, ratio, cells):
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        mask = simmim.draw_mask(kind, cells, ratio, generator)
        wanted = math.ceil(ratio * cells[0] * cells[1])
        if kind == "square":
            rows, columns = mask.any(dim=1).sum(), mask.any(dim=0).sum()
            assert rows == columns == min(*cells, round(math.sqrt(wanted)))
            assert mask.sum() == rows * columns
        else:
            assert mask.sum() == wanted


@pytest.mark.parametrize("side", [2, 4, 7])
def test_a_large_square_leaves_something_to_see(side):
    assert simmim.draw_mask("square", (side, side), 0.9, None).sum() == (side - 1) ** 2
    assert simmim.draw_mask("square", (side, side), 1.0, None).all()


def test_windows_have_to_divide_their_maps():
    with torch.device("meta"):
        simmim.build(replace(simmim.CONFIGS["swin_base"], img_size=96), 1)  # maps 24 12 6 3
        with pytest.raises(ValueError, match="a map of 56 x 56 is no multiple of window=6"):
            simmim.build(replace(simmim.CONFIGS["swin_base"], img_size=224), 1)


def test_a_classifier_has_no_mask_to_divide_its_pictures():
    with torch.device("meta"):
        simmim.build(replace(simmim.CONFIGS["vit_base"], task="classify", img_size=336), 3)
        with pytest.raises(ValueError, match="mask_patch must divide img_size"):
            simmim.build(replace(simmim.CONFIGS["vit_base"], img_size=336), 3)


def test_avg_dist_equals_brute_force():
    mask = simmim.draw_mask("random", (4, 5), 0.6, torch.Generator().manual_seed(0))
    pixels = mask.repeat_interleave(3, 0).repeat_interleave(3, 1)
    hidden, visible = pixels.nonzero().double(), (~pixels).nonzero().double()
    expected = torch.cdist(hidden, visible).amin(dim=1).mean().item()
    assert simmim.avg_dist(mask, 3) == pytest.approx(expected)
    assert all(math.isnan(simmim.avg_dist(torch.full((4, 5), same), 3)) for same in (True, False))


@pytest.mark.parametrize(
    ("kind", "patch", "ratio", "published"),
    [("random", 4, 0.6, 2.1), ("random", 16, 0.4, 5.2), ("random", 32, 0.6, 15.2)]
    + [("random", 64, 0.5, 29.8), ("square", 32, 0.11, 14.3), ("square", 32, 0.44, 33.4)]
    + [("block", 16, 0.8, 38.7), ("block", 32, 0.6, 31.7)],
)
def test_avg_dist_is_the_papers(kind, patch, ratio, published):
    generator, side = torch.Generator().manual_seed(0), 192 // patch
    draws = {4: 10}.get(patch, 250)  # small squares vary little
    masks = [simmim.draw_mask(kind, (side, side), ratio, generator, patch) for _ in range(draws)]
    mean = sum(simmim.avg_dist(mask, patch) for mask in masks) / len(masks)
    assert mean == pytest.approx(published, rel=0.03)


@pytest.mark.parametrize("encoder", list(ENCODERS))
def test_every_parameter_of_simmim_gets_a_finite_gradient(encoder):
    for task in ("pretrain", "classify"):
        model = simmim_model(encoder, task=task, checkpoint=True).train()
        targets = [dict(labels=torch.tensor([k])) for k in (0, 2)]
        sum(model(list(torch.rand(2, 3, 64, 64)), targets).values()).backward()
        for name, p in model.named_parameters():
            if p.requires_grad:
                assert p.grad is not None and torch.isfinite(p.grad).all(), name
            else:
                assert name == "encoder.pos_embed"
        if task == "pretrain":
            assert model.encoder.mask_token.grad.any()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("head", ["linear", "mlp2", "inverse_swin_t"])
def test_every_target_and_head_learns_and_draws(target, head):
    if target == "tokens" and head == "inverse_swin_t":
        with pytest.raises(ValueError, match="resolution of 4"):  # tokens are coarser
            simmim_model(target=target, head=head)
        return
    model = simmim_model(target=target, head=head)
    images = list(torch.rand(2, 3, 64, 64))
    assert model.wants_pictures == (target in ("color_cluster", "tokens"))
    if model.wants_pictures:
        model.prepare(images)
        assert not model.wants_pictures
    loss = model(images, [{}] * 2)["loss_mim"]
    loss.backward()
    assert torch.isfinite(loss) and model.encoder.mask_token.grad.any()
    answer = model.eval()(images)[0]
    assert answer["reconstruction"].shape == answer["masked"].shape == (3, 64, 64)
    seen = ~answer["mask"]
    for key in ("reconstruction", "masked"):
        torch.testing.assert_close(answer[key][:, seen], images[0][:, seen], rtol=1e-4, atol=1e-5)
    assert 0 < answer["baseline"] < 2 and torch.isfinite(answer["l1"])


@pytest.mark.parametrize("resolution", [1, 4, 8])
@pytest.mark.parametrize("loss", ["l1", "l2", "smooth_l1"])
@torch.no_grad()
def test_the_loss_is_the_mean_error_of_what_is_hidden(resolution, loss):
    model = simmim_model(resolution=resolution, loss=loss)
    x, mask = torch.randn(2, 3, 64, 64), torch.zeros(2, 8, 8, dtype=torch.bool)
    mask[0, 1, 2] = mask[1, 3:5] = True
    found = torch.randn(2, 3, 64 // resolution, 64 // resolution)
    small = F.avg_pool2d(x, resolution)
    d = (found - small).abs()
    error = {"l1": d, "l2": d**2, "smooth_l1": torch.where(d < 1, d**2 / 2, d - 0.5)}[loss]
    side = 8 // resolution
    hidden = (
        mask.repeat_interleave(side, 1).repeat_interleave(side, 2)[:, None].expand(-1, 3, -1, -1)
    )
    expected = error[hidden].mean().item()
    assert model.masked_loss(found, x, mask).item() == pytest.approx(expected, rel=1e-4)
    everything = simmim_model(resolution=resolution, loss=loss, predict="all")
    assert everything.masked_loss(found, x, mask).item() == pytest.approx(error.mean().item())


@torch.no_grad()
def test_colours_are_classed_by_bin_and_by_nearest_code():
    x = torch.rand(1, 3, 64, 64)
    mean, std = (torch.tensor(v)[:, None, None] for v in (simmim.MEAN, simmim.STD))
    bins = simmim_model(target="bins8", resolution=8).target
    small = F.avg_pool2d(x, 8)
    right = F.one_hot((small * 8).long(), 8).permute(0, 4, 1, 2, 3).flatten(1, 2) * 99.0
    assert bins.error(right, (x - mean) / std).abs().max() < 1e-6
    torch.testing.assert_close(
        F.avg_pool2d(bins.picture(right) * std + mean, 8), ((small * 8).long() + 0.5) / 8
    )
    codes = simmim_model(target="tokens").target
    codes.codes.copy_(torch.randn_like(codes.codes))
    tiles = codes.codes.reshape(5, 3, 8, 8)
    image = torch.cat([tiles[i] for i in (2, 0, 4)], dim=2)[None]
    right = F.one_hot(torch.tensor([[[2, 0, 4]]]), 5).permute(0, 3, 1, 2) * 99.0
    assert codes.error(right, image).max() < 1e-6
    torch.testing.assert_close(codes.picture(right), image)


@torch.no_grad()
def test_hidden_patches_do_not_reach_the_encoder():
    for encoder in ENCODERS:
        model = simmim_model(encoder).eval()
        x = torch.randn(1, 3, 64, 64)
        mask = model.draw_masks(list(x), fixed=True)
        patch = model.config.patch
        hidden = mask.repeat_interleave(patch, 1).repeat_interleave(patch, 2)[:, None]
        other = torch.where(hidden, torch.randn_like(x), x)
        torch.testing.assert_close(model.encoder(x, mask), model.encoder(other, mask))
        assert not torch.allclose(model.encoder(x), model.encoder(other))


@torch.no_grad()
def test_answers_of_simmim_are_the_same_each_time_and_in_company():
    model, images = simmim_model().eval(), list(torch.rand(3, 3, 64, 64))
    for image, found in zip(images, model(images), strict=True):
        same(model([image])[0], found)
    masks = [answer["mask"] for answer in model(images)]
    assert not torch.equal(masks[0], masks[1])
    given = torch.zeros(1, 8, 8, dtype=torch.bool)
    given[0, :4] = True
    assert torch.equal(
        model(images[:1], mask=given)[0]["mask"],
        given[0].repeat_interleave(8, 0).repeat_interleave(8, 1),
    )


def test_one_mask_serves_a_batch():
    model, images = simmim_model().eval(), list(torch.rand(3, 3, 64, 64))
    mask = torch.rand(1, 8, 8) < 0.5
    one, three = (model(images, [{}] * 3, mask=m)["loss_mim"] for m in (mask, mask.repeat(3, 1, 1)))
    assert one == three


@pytest.mark.parametrize("encoder", ["vit", "beit"])
def test_a_linear_probe_trains_the_classifier_alone(encoder):
    model = simmim_model(encoder, task="classify", freeze=True)
    groups = simmim.param_groups(model, simmim.RECIPES["classify"])
    assert {id(p) for g in groups for p in g["params"]} == {id(p) for p in model.head.parameters()}


@pytest.mark.parametrize("task", ["pretrain", "classify"])
def test_the_bias_of_beit_is_one_that_fused_attention_takes(task, monkeypatch):
    masks, attend = [], F.scaled_dot_product_attention

    def look(q, k, v, attn_mask):
        masks.append(attn_mask)
        return attend(q, k, v, attn_mask)

    monkeypatch.setattr(F, "scaled_dot_product_attention", look)
    net = simmim_model("beit", task=task)
    net.encoder(torch.rand(1, 3, 64, 64))
    assert masks and all(mask.ndim == 4 and mask.stride(3) == 1 for mask in masks)


def test_initial_weights_of_beit_are_the_released_ones():
    torch.manual_seed(0)
    for task, cut in (("pretrain", 0.02), ("classify", 0.2)):
        model = simmim_model("beit", task=task)
        for name, p in model.encoder.named_parameters():
            assert p.abs().max() <= (cut if p.ndim > 1 else 1), name
            if name.endswith(("bias", "bias_table")):
                assert not p.any(), name
        spread = model.encoder.blocks[0].attn.qkv.weight.std().item()
        assert spread == pytest.approx(0.0108 if task == "pretrain" else 0.02, rel=0.05)
    assert 0 < model.head.weight.abs().max() < 1e-4 and not model.head.bias.any()


def test_simmim_decays_what_the_released_code_decays():
    for encoder, task, exempt in (
        ("beit", "pretrain", {"cls_token"}),
        ("beit", "classify", {"cls_token"}),
        ("swin", "pretrain", {"mask_token"}),
        ("swin", "classify", {"relative_position_bias_table"}),
    ):
        model = simmim_model(encoder, task=task)
        names = {id(p): name for name, p in model.named_parameters()}
        groups = simmim.param_groups(model, simmim.RECIPES["paper"])
        free = {names[id(p)] for g in groups if g["weight_decay"] == 0 for p in g["params"]}
        wide = {name.rpartition(".")[2] for name in free if model.get_parameter(name).ndim > 1}
        assert wide == exempt and all(n in free for n, p in model.named_parameters() if p.ndim < 2)


def test_layers_learn_the_slower_the_deeper_they_lie():
    model = simmim_model("swin", task="classify")
    names = {id(p): name for name, p in model.named_parameters()}
    scale = {}
    for group in simmim.param_groups(model, dict(layer_decay=0.5, weight_decay=0.05)):
        scale |= {names[id(p)]: math.log2(group["lr_scale"]) for p in group["params"]}
    assert scale["encoder.patch_embed.proj.weight"] == -7
    assert scale["encoder.layers.0.blocks.0.norm1.weight"] == -6
    assert scale["encoder.layers.1.blocks.1.norm1.weight"] == -3
    assert scale["encoder.layers.1.downsample.norm.weight"] == -3
    assert scale["encoder.norm.weight"] == scale["head.weight"] == 0


def test_simmim_overfits_one_batch():
    """150 steps on one picture of 4 x 4 colours halve the loss."""
    picture = torch.rand(3, 4, 4).repeat_interleave(16, 1).repeat_interleave(16, 2)
    model = simmim_model()
    totals = losses_of_training(model, [picture] * 2, [{}] * 2, steps=150, lr=3e-3)
    assert sum(totals[-10:]) / 10 < 0.5 * totals[0], totals


# --- Checkpoints ----------------------------------------------------------------------------------


def mae_file(c):
    """State dict as MAE releases it, for a ViT of this config with 8 decoder blocks."""
    tables = mimdet.build(replace(c, grid=14, decoder_depth=8, fill="mask"), 3)
    state = {
        k.partition(".")[2]: v
        for k, v in tables.state_dict().items()
        if k.startswith(("enc", "dec"))
    }
    state = {k: v for k, v in state.items() if not k.startswith("patch_embed")}
    state["cls_token"] = torch.zeros(1, 1, c.embed_dim)
    state["patch_embed.proj.weight"] = torch.zeros(c.embed_dim, 3, 16, 16)
    return state | {"decoder_pred.weight": torch.zeros(768, c.decoder_dim)}


@pytest.mark.parametrize("fill", ["conv", "mask"])
def test_mae_weights_arrive(fill):
    config = replace(TINY, grid=10, fill=fill)
    source = mae_file(config)
    model = mimdet.build(config, 3)
    state = mimdet.from_official({"model": source}, config)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    left = {
        key
        for key in missing
        if key.startswith(("encoder.", "decoder.")) and "patch_embed" not in key
    }
    assert left == (
        {"decoder.conv_feat_proj.weight", "decoder.conv_feat_proj.bias"}
        if fill == "conv"
        else set()
    )
    torch.testing.assert_close(
        model.encoder.blocks[1].mlp.fc1.weight, source["blocks.1.mlp.fc1.weight"]
    )
    grid = source["pos_embed"][0, 1:].T.reshape(1, -1, 14, 14)
    resized = F.interpolate(grid, size=(10, 10), mode="bicubic", align_corners=False)
    torch.testing.assert_close(model.encoder.pos_embed[0, 1:], resized[0].flatten(1).T)


def deit_file(dim, rows):
    """State dict as DeiT names it: 2 blocks, `rows` rows before the 14 x 14 grid of positions."""
    net = yolos.build(
        replace(TINY_YOLOS, embed_dim=dim, stem="patch", reference_points=False), 3
    ).backbone
    state = {k: torch.randn_like(v) for k, v in net.state_dict().items() if k != "det_token"}
    state |= {"head.weight": torch.zeros(1000, dim), "head.bias": torch.zeros(1000)}
    if rows == 2:
        state["dist_token"] = torch.zeros(1, 1, dim)
    return state | {"pos_embed": torch.randn(1, rows + 196, dim)}


@pytest.mark.parametrize("rows", [1, 2], ids=["deit", "distilled"])
def test_deit_weights_arrive_in_yolos(rows):
    config = replace(TINY_YOLOS, **PLAIN)
    source, model = deit_file(32, rows), yolos.build(config, 3)
    state = yolos.from_official({"model": source}, config)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    heads = {
        f"{head}.layers.{i}.{kind}"
        for head in ("class_embed", "bbox_embed")
        for i in range(3)
        for kind in ("weight", "bias")
    }
    assert set(missing) == heads | {"backbone.det_token", "backbone.mid_pos_embed"}
    torch.testing.assert_close(
        model.backbone.blocks[1].attn.qkv.weight, source["blocks.1.attn.qkv.weight"]
    )
    table = model.backbone.pos_embed[0]
    assert torch.equal(table[0], source["pos_embed"][0, rows - 1])  # of two, row 0 is dropped
    grid = source["pos_embed"][0, rows:].T.reshape(1, -1, 14, 14)
    resized = F.interpolate(grid, size=(4, 4), mode="bicubic", align_corners=False)
    torch.testing.assert_close(table[1:17], resized[0].flatten(1).T)


def test_released_class_rows_are_reduced_to_the_80_categories():
    weight = torch.arange(92.0)[:, None].expand(92, 4)
    source = {"backbone.det_token": torch.zeros(1, 100, 4), "class_embed.layers.2.weight": weight}
    source["class_embed.layers.2.bias"] = torch.arange(92.0)
    rows = yolos.from_official({"model": source})["class_embed.layers.2.weight"][:, 0].tolist()
    assert len(rows) == 81 and rows[:12] == [*range(1, 12), 13] and rows[-2:] == [90, 91]
    assert not {0, 12, 26, 29, 30, 45, 66, 68, 69, 71, 83} & set(rows)
    assert len(yolos.from_official(source, num_classes=91)["class_embed.layers.2.bias"]) == 92


@pytest.mark.parametrize("number", [4, 30])
def test_another_number_of_tokens_keeps_the_places_of_the_patches(number):
    config = replace(TINY_YOLOS, **PLAIN)
    source, model = yolos.build(config, 80), yolos.build(replace(config, det_tokens=number), 80)
    state = yolos.from_official(source.state_dict(), model.config)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert missing == ["backbone.det_token"] and not unexpected
    for name in ("pos_embed", "mid_pos_embed"):
        kept, table = getattr(model.backbone, name), getattr(source.backbone, name)
        assert kept.shape[-2] == table.shape[-2] - config.det_tokens + number
        assert torch.equal(kept[..., :-number, :], table[..., : -config.det_tokens, :])


def test_another_position_grid_is_resized_the_tokens_kept():
    config = replace(TINY_YOLOS, **PLAIN)  # grids of 4 x 4 and, between the blocks, 4 x 6
    source = yolos.build(replace(config, mid_pos_grid=(32, 54)), 3).state_dict()
    state = yolos.from_official(source, replace(config, pos_grid=(6, 8), mid_pos_grid=(5, 5)))
    assert state.keys() == source.keys()
    for name, old, new in (("pos_embed", (4, 4), (6, 8)), ("mid_pos_embed", (32, 54), (5, 5))):
        was, now = source[f"backbone.{name}"][-1], state[f"backbone.{name}"][-1]
        was, now = was.view(-1, config.embed_dim), now.view(-1, config.embed_dim)
        assert torch.equal(now[0], was[0]) and torch.equal(now[-7:], was[-7:])
        patches = was[1:-7].T.unflatten(1, old)[None]
        patches = torch.nn.functional.interpolate(patches, new, mode="bicubic")[0].flatten(1).T
        torch.testing.assert_close(now[1:-7], patches)


def test_an_encoder_goes_from_mimdet_to_yolos(model):
    config = replace(TINY_YOLOS, embed_dim=64)
    detector = yolos.build(config, 3)
    state = yolos.from_official(model.state_dict(), config)
    missing, unexpected = detector.load_state_dict(state, strict=False)
    assert not unexpected
    assert {k for k in missing if k.startswith("backbone")} == {
        "backbone.cls_token",
        "backbone.det_token",
    }
    torch.testing.assert_close(
        detector.backbone.patch_embed.proj[2][0].weight, model.encoder.patch_embed.proj[2][0].weight
    )


def test_stages_of_a_classifier_arrive_under_another_head():
    classifier = pvt_model("classifier", seed=1)
    released = {
        re.sub(r"^(backbone\.|head\.fc\.)", lambda m: "head." if m[1] != "backbone." else "", k): v
        for k, v in classifier.state_dict().items()
    }
    assert {"cls_token", "norm.weight", "head.weight", "pos_embed1"} <= set(released)
    model = pvt_model()
    state = pvt.from_official({"model": released}, model.config)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and all(name.startswith("head.") for name in missing)
    torch.testing.assert_close(
        model.backbone.block3[0].attn.kv.weight, classifier.backbone.block3[0].attn.kv.weight
    )
    again = pvt.from_official(released, classifier.config)
    assert set(again) == set(classifier.state_dict())


def test_released_segmenters_have_a_place_for_every_weight():
    model = pvt_model("semantic")
    released = {}
    for key, value in model.state_dict().items():
        key = re.sub(r"^head\.fpn\.inner_blocks\.(\d)\.0", r"neck.lateral_convs.\1.conv", key)
        key = re.sub(r"^head\.fpn\.layer_blocks\.(\d)\.0", r"neck.fpn_convs.\1.conv", key)
        key = re.sub(r"^head\.(scale_heads\.\d\.\d)\.0", r"decode_head.\1.conv", key)
        key = re.sub(r"^head\.(scale_heads\.\d\.\d)\.1", r"decode_head.\1.bn", key)
        released[re.sub(r"^head\.", "decode_head.", key)] = value
    assert "decode_head.scale_heads.3.4.bn.running_mean" in released
    model.load_state_dict(pvt.from_official({"state_dict": released}, model.config))
    for head in ("retinanet", "detr"):  # the same names, but maps of other strides
        stages = pvt.from_official({"state_dict": released}, replace(model.config, head=head))
        assert stages and all(key.startswith("backbone.") for key in stages)


def test_another_heads_pyramid_is_not_taken():
    """RetinaNet's begins at the second stage, Semantic FPN's at the first, under the same names."""
    source = pvt_model().state_dict()
    for prefix in ("head.", "bbox_head."):  # a run of ours, a released file
        file = {key.replace("head.", prefix): value for key, value in source.items()}
        stages = pvt.from_official(file, pvt_model("semantic").config)
        assert stages and all(key.startswith("backbone.") for key in stages)


@pytest.mark.parametrize(("old", "new"), [(6, 7), (12, 14), (4, 8), (7, 6), (2, 3), (3, 2)])
def test_bias_tables_of_any_window_are_resized(old, new):
    """What is the same everywhere, or grows along an axis, still does so, by about 1 a step."""
    side, wanted = 2 * old - 1, 2 * new - 1
    ramp = torch.linspace(-1, 1, side).expand(side, side)
    table = torch.stack([torch.ones(side, side), ramp, ramp.T], dim=-1).flatten(0, 1)
    flat, x, y = simmim.resize_bias_table(table, wanted**2).T.reshape(3, wanted, wanted)
    torch.testing.assert_close(flat, torch.ones(wanted, wanted))
    torch.testing.assert_close(x, y.T)
    if new > old:  # all of the table is there, in the largest of these steps with its edge twice
        assert (x.diff(dim=1) >= 0).all() and x[0, 0].item() == pytest.approx(-1, abs=1e-3)
    else:  # its middle
        steps = 1 / 1.01 ** torch.arange(new - 1) / (old - 1)
        torch.testing.assert_close(x[0, new - 1 :].diff(), steps, rtol=0.01, atol=0)


def test_an_encoder_goes_from_simmim_to_the_detectors():
    config = replace(TINY_SIMMIM, embed_dim=64)
    source = simmim.build(config, 3)
    torch.manual_seed(1)
    plain = replace(TINY, stem="patch", patch=config.patch)
    for module, tiny, prefix in (
        (mimdet, TINY, "encoder."),
        (mimdet, plain, "encoder."),
        (yolos, TINY_YOLOS, "backbone."),
    ):
        detector_config = replace(tiny, embed_dim=64, depth=2, num_heads=2)
        detector = module.build(detector_config, 3)
        state = module.from_official(source.state_dict(), detector_config)
        fits = {k: v for k, v in state.items() if k in detector.state_dict()}
        detector.load_state_dict(fits, strict=False)
        for name, p in source.encoder.blocks.named_parameters():
            assert torch.equal(detector.get_parameter(f"{prefix}blocks.{name}"), p), name
        assert torch.equal(
            detector.get_parameter(f"{prefix}norm.weight"), source.encoder.norm.weight
        )
        if tiny is plain:
            proj = detector.encoder.patch_embed.proj.weight
            assert torch.equal(proj, source.encoder.patch_embed.proj.weight)


@pytest.mark.parametrize("task", ["pretrain", "classify"])
@torch.no_grad()
def test_simmims_own_vit_works_in_the_detectors_as_it_did(task):
    """Its blocks have layer scale and no bias of k; relative positions, here 0, are lost."""
    config = replace(TINY_SIMMIM, encoder="beit", embed_dim=64, task=task)
    source = simmim.build(config, 3)
    for name, p in source.encoder.named_parameters():
        p.copy_(torch.zeros_like(p) if "relative_position" in name else torch.randn_like(p) / 5)
    x = torch.randn(2, 65, 64)
    for module, tiny in ((mimdet, TINY), (yolos, TINY_YOLOS)):
        detector_config = replace(tiny, embed_dim=64, depth=2, num_heads=2)
        detector = module.build(detector_config, 3)
        state = module.from_official({"model": source.state_dict()}, detector_config)
        _, unexpected = detector.load_state_dict(state, strict=False)
        assert all("patch_embed" in key or "relative" in key for key in unexpected)
        found = wanted = x
        ours = detector.encoder if module is mimdet else detector.backbone
        for block, released in zip(ours.blocks, source.encoder.blocks, strict=True):
            bias = torch.zeros(2, 65, 65) if task == "pretrain" else None
            found, wanted = block(found), released(wanted, bias)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_an_encoder_goes_from_yolos_to_mimdet():
    config = replace(TINY, embed_dim=64, depth=2, num_heads=2)
    source = yolos.build(replace(TINY_YOLOS, embed_dim=64, depth=2, num_heads=2), 3)
    detector = mimdet.build(config, 3)
    table = detector.encoder.pos_embed.clone()
    _, unexpected = detector.load_state_dict(
        mimdet.from_official(source.state_dict(), config), strict=False
    )
    assert not unexpected and torch.equal(detector.encoder.pos_embed, table)
    for name, p in source.backbone.blocks.named_parameters():
        assert torch.equal(detector.get_parameter(f"encoder.blocks.{name}"), p), name


# --- The files as texts ---------------------------------------------------------------------------


def top_level(file):
    text = file.read_text()
    for node in ast.parse(text).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):  # whole lines, with their comments
            yield node.name, "\n".join(text.splitlines()[node.lineno - 1 : node.end_lineno])


def test_one_name_one_text():
    texts = {}
    for file in FILES:
        for name, text in top_level(file):
            if name not in ("Config", "build", "from_official", "param_groups"):
                assert texts.setdefault(name, text) == text, f"{name} in {file.name} differs"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_sections_stand_in_order(file):
    banners = re.findall(r"^# --- (\d\. [\w ]+) -+$", file.read_text(), re.M)
    assert banners == [
        "1. Config",
        "2. Shared blocks",
        "3. This paper",
        "4. Boxes",
        "5. Heads and losses",
        "6. Model",
        "7. Try it",
    ]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_files_import_no_other_file_of_the_project(file):
    allowed = {
        "math",
        "re",
        "zlib",
        "dataclasses",
        "functools",
        "torch",
        "torchvision",
        "scipy",
        "numpy",
    }
    for node in ast.walk(ast.parse(file.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        assert {name.partition(".")[0] for name in names} <= allowed


def shapes_under_trace(file, comments, run):
    """Run, watching the commented lines of a file; the lines seen, and those with a wrong shape.

    comments: line -> name assigned to, or "return", and the axes as told. An axis told by a letter
    alone has one size in each call, and in each round of a loop.
    """
    checked, wrong = set(), []

    def look(line, value, sizes):
        _, axes = comments[line]
        if not isinstance(value, torch.Tensor):
            return
        checked.add(line)
        if line in sizes:
            sizes.clear()
        sizes[line] = True
        letters = [(a, n) for a, n in zip(axes, value.shape, strict=False) if a.isalpha()]
        odd = {a: n for a, n in letters if sizes.setdefault(a, n) != n}
        if value.ndim != len(axes) or odd:
            wrong.append(f"line {line}: {tuple(value.shape)} is not {axes}, {sizes}")

    def trace(frame, event, _):
        if frame.f_code.co_filename != file:
            return None
        last, sizes = [None], {}

        def local(frame, event, result):
            name, _ = comments.get(last[0], (None, None))
            left = event == "return" or frame.f_lineno != last[0]  # comprehensions come back to it
            if event in ("line", "return") and left and name not in (None, "return"):
                look(last[0], frame.f_locals.get(name), sizes)
            if event == "return" and comments.get(frame.f_lineno, ("",))[0] == "return":
                look(frame.f_lineno, result, sizes)
            last[0] = frame.f_lineno
            return local

        return local

    sys.settrace(trace)
    try:
        run()
    finally:
        sys.settrace(None)
    return checked, wrong


@pytest.mark.parametrize("module", [simmim, mimdet, yolos, pvt], ids=lambda module: module.__name__)
def test_shape_comments_are_true(module, model):
    """Trains and predicts under a tracer: every `x = ...  # (B, N, C)`, `return ...  # (B, C)`."""
    comments, shape = {}, r"  # \(([^()]*(?:\([^()]*\)[^()]*)*)\)"
    for number, line in enumerate(Path(module.__file__).read_text().splitlines(), start=1):
        found = re.match(rf"\s+(?:(\w+)(?:, .*?)? =|return) .*{shape}(?:[:,;]| |$)", line)
        if found:
            comments[number] = (found[1] or "return", found[2].rstrip(",").split(", "))
    heads = [(pvt_model(head), head) for head in pvt.HEADS]
    heads += [(pvt_model(design=design), "") for design in DESIGNS]
    models = {mimdet: [(model, "")], yolos: [(yolos_model(mid_pos_grid=(4, 6)), "")], pvt: heads}
    models[simmim] = [(simmim_model(encoder), "") for encoder in ENCODERS]
    models[simmim] += [(simmim_model(target=target), "") for target in TARGETS]
    models[simmim] += [(simmim_model(head="inverse_swin_t"), "")]
    models[simmim] += [(simmim_model(task="classify"), "classifier")]
    size = (64, 64) if module is simmim else (64, 96)

    def run():
        module.build("nano", 3)
        for model, head in models[module]:
            model.train()(*pvt_example(head, size))
            with torch.no_grad():
                model.eval()(example(size)[0])
                if module is yolos:
                    model.attention(example((64, 96))[0][0])
                if module is simmim and model.config.encoder == "vit":
                    model.encoder(torch.rand(1, 3, 64, 96))  # another grid than the table's

    checked, wrong = shapes_under_trace(module.__file__, comments, run)
    assert not wrong, wrong
    assert len(checked) >= 0.9 * len(comments), (
        f"only lines {sorted(checked)} of {sorted(comments)} were reached"
    )
