"""SimMIM against the authors' released code: recorded numbers, from filled weights."""

import functools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from golden import assert_close, checkpoint, image, load

import simmim

VARIANTS = {"simmim_vit": "vit_base", "simmim_swin": "swin_base"}


@functools.cache
def loaded(name, variant):
    golden = load(name)
    model = simmim.build(VARIANTS[name], num_classes=1)
    assert sum(p.numel() for p in model.parameters()) == golden["params"]
    state = simmim.from_official({"model": checkpoint(golden, variant)}, model.config)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and all(key.endswith("relative_position_index") for key in missing)
    coarse = torch.tensor(golden["input"]["mask_coarse"]).bool()
    scale = golden["input"]["mask_shape"][1] // coarse.shape[1]
    mask = coarse.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    assert mask.sum() == golden["input"]["mask_sum"]
    x = image(301, 2, 224, 224) if name == "simmim_vit" else image(302, 2, 192, 192)
    return model.eval(), golden, x, mask


@pytest.mark.parametrize("variant", ["base", "wide"])
@pytest.mark.parametrize("name", list(VARIANTS))
def test_encoder_reconstruction_loss_and_gradients_equal_the_released_ones(name, variant):
    model, golden, x, mask = loaded(name, variant)
    model.zero_grad()
    maps = model.encoder(x, mask)
    found = model.decoder(maps)
    for key, value in (("encoder", maps), ("x_rec", found)):
        assert_close(golden["expected"][f"{variant}/{key}"], f"{variant}/{key}", value)
    loss = model.masked_loss(found, x, mask)
    assert loss.item() == pytest.approx(golden["scalars"][f"{variant}/loss"], rel=1e-5)
    loss.backward()
    gradients = [key for key in golden["expected"] if key.startswith(f"{variant}/grad/")]
    assert len(gradients) >= 6
    for key in gradients:
        name = key.removeprefix(f"{variant}/grad/")
        wanted = golden["expected"][key]
        assert_close(wanted, key, model.get_parameter(name).grad, scale=wanted["std"])


@pytest.mark.parametrize("variant", ["base", "wide"])
@torch.no_grad()
def test_fine_tuned_swin_equals_the_released_one(variant):
    golden = load("simmim_swin_finetune")
    config = replace(simmim.CONFIGS["swin_base"], task="classify", img_size=224, window=7)
    model = simmim.build(config, 1000).eval()
    assert sum(p.numel() for p in model.parameters()) == golden["params"]
    state = simmim.from_official({"model": checkpoint(golden, variant)}, config)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and all(key.endswith("relative_position_index") for key in missing)
    features = model.encoder(image(303, 2, 224, 224)).mean(dim=(2, 3))
    key = f"{variant}/features"
    assert_close(golden["expected"][key], key, features)
    key = f"{variant}/logits"
    assert_close(golden["expected"][key], key, model.head(model.fc_norm(features)))


REMAP = {
    "swin_w6_to_w7": ("simmim_swin", dict(img_size=224, window=7)),
    "vit_same_size": ("simmim_vit", {}),
    "vit_224_to_384": ("simmim_vit", dict(img_size=384)),
}


@pytest.mark.parametrize("case", list(REMAP))
def test_tables_are_remapped_for_fine_tuning_as_released(case):
    name, fields = REMAP[case]
    config = replace(simmim.CONFIGS[VARIANTS[name]], task="classify", **fields)
    state = simmim.from_official({"model": checkpoint(load(name), "wide")}, config)
    with torch.device("meta"):
        model = simmim.build(config, 10)
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    assert not unexpected
    heads = {"head.weight", "head.bias", "fc_norm.weight", "fc_norm.bias"}
    assert {key for key in missing if not key.endswith("relative_position_index")} <= heads
    tables = load("simmim_remap")["cases"][case]["tables"]
    assert tables
    for key, expected in tables.items():
        ours = "encoder." + key
        ours = ours if name == "simmim_swin" else ours.replace("attn.", "attn.bias.")
        assert_close(expected, f"{case}/{key}", state[ours], 1e-6)


@pytest.mark.parametrize("case", list(load("simmim_masks")["cases"]))
def test_masks_hide_as_many_patches_as_released_and_whole_squares(case):
    golden = load("simmim_masks")["cases"][case]
    size, mask_patch, patch = (int(x) for x in case.split("/")[0].split(",")[:3])
    ratio = float(case.split("/")[0].split(",")[3])
    base = simmim.CONFIGS["vit_base" if patch == 16 else "swin_base"]
    config = replace(base, depths=base.depths[:1], num_heads=base.num_heads[:1], embed_dim=32)
    config = replace(config, num_heads=(1,), depths=(1,), mask_ratio=ratio)
    model = simmim.build(config, 1)
    masks = model.draw_masks([torch.rand(3, size, size)] * 2, fixed=False).cpu()
    assert masks.shape[1:] == tuple(golden["shape"])
    assert masks.flatten(1).sum(dim=1).tolist() == golden["sum"]
    scale = mask_patch // patch
    assert scale == golden["scale"] and not torch.equal(*masks)
    cells = masks[:, ::scale, ::scale]
    assert cells[0].sum() == golden["mask_count"] == math.ceil(cells[0].numel() * ratio)
    again = np.asarray(cells).repeat(scale, 1).repeat(scale, 2)
    assert np.array_equal(again, np.asarray(masks))
