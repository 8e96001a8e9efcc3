"""Reads tests/golden/*.json: what the authors' released code answers for weights filled by rule.

A weight's values depend only on its key and shape, so no weights travel: `checkpoint` rebuilds the
released layout, `assert_close` compares a tensor with the recorded samples and with a checksum over
all its elements.
"""

import json
import math
import zlib
from pathlib import Path

import numpy as np
import torch


def load(name):
    return json.loads((Path(__file__).parent / "golden" / f"{name}.json").read_text())


def filled(key, shape, rule, variant="base"):
    """Float32 tensor of one entry: standard normal numbers seeded by the key, scaled by rule."""
    n = np.random.RandomState(zlib.crc32(key.encode()) & 0x7FFFFFFF).standard_normal(tuple(shape))
    wide = variant == "wide" and not key.endswith("bias")
    scale = {"norm": 0.1, "mean": 0.1, "var": 0.1, "small": 0.5 if wide else 0.02, "gamma": 0.02}
    if rule == "gamma" and wide:
        rule = "norm"
    if rule == "fan":
        n = n / math.sqrt(math.prod(shape[1:]))
    else:
        n = scale[rule] * (np.abs(n) if rule == "var" else n) + (rule in ("norm", "var"))
    return torch.from_numpy(np.asarray(n, dtype=np.float32))


def checkpoint(golden, variant="base"):
    """State dict in the released layout, without the tables that a model builds by itself."""
    factor = golden.get("fill_override", {}).get("multiply after filling", {})
    return {
        key: filled(key, shape, rule, variant) * factor.get(key, 1.0)
        for key, shape, rule in golden["state"]
        if rule != "keep"
    }


def image(seed, n, h, w):
    """Normalised images (n, 3, h, w) of uniform noise."""
    x = np.random.RandomState(seed).rand(n, 3, h, w)
    mean, std = (
        np.reshape(v, (1, 3, 1, 1)) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    )
    return torch.as_tensor(((x - mean) / std).astype(np.float32))


def assert_close(expected, name, tensor, tolerance=1e-4, scale=1.0):
    """Recorded values, checksum, mean and std within tolerance of themselves or, if small, scale.

    For gradients the scale is their recorded standard deviation: all are far below 1.
    """
    assert list(tensor.shape) == expected["shape"], (name, tensor.shape, expected["shape"])
    a = tensor.detach().cpu().double().reshape(-1).numpy()
    r = np.random.RandomState(zlib.crc32(name.encode()) & 0x7FFFFFFF).standard_normal(a.size)
    found = np.array([*a[expected["index"]], a @ r / math.sqrt(a.size), a.mean(), a.std()])
    wanted = np.array([*expected["value"], expected["proj"], expected["mean"], expected["std"]])
    error = np.abs(found - wanted) / np.maximum(scale, np.abs(wanted))
    assert error.max() <= tolerance, f"{name}: off by {error.max():.2e}"
