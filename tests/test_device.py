"""A GPU's path without a GPU: tensors that say they are elsewhere never meet those that are here.

What is not tried: the GPU's own kernels, their rounding, autocast and compilation.
"""

import argparse

import pytest
import torch
from test_runs import SETTINGS, log_without_speed, one_thread, run, same  # noqa: F401
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

import coco
import train

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument")
ELSEWHERE = torch.device("cuda", 0)
aten = torch.ops.aten
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
INDEXING |= {aten._index_put_impl_.default}


class Elsewhere(torch.Tensor):
    """Holds a tensor `inner` of the CPU, computes with it, and refuses company that is not so.

    As on a GPU only copies, indices and single numbers, where each place counts for itself, may
    come from here.
    """

    calls = 0

    @staticmethod
    def __new__(cls, inner):
        if inner.dtype == torch.float64:
            raise TypeError("Apple's GPUs have no float64")
        about = dict(strides=inner.stride(), storage_offset=inner.storage_offset())
        return cls._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, **about)

    def __init__(self, inner):
        self.inner = inner

    def __repr__(self):
        return f"Elsewhere({self.inner})"

    def __format__(self, spec):
        return format(self.inner, spec)

    def __reduce_ex__(self, protocol):
        return self.inner.__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        cls.calls, kwargs = cls.calls + 1, kwargs or {}
        company = (args[0], *args[2:]) if func in INDEXING else (args, kwargs)
        if func is aten.index_put.default:  # autograd's, which makes its zeros where `inner` is
            company = args[0]
        tensors = [x for x in tree_leaves(company) if isinstance(x, torch.Tensor)]
        strangers = [x for x in tensors if not isinstance(x, Elsewhere)]
        if torch.Tag.pointwise in func.tags or func in {aten.fill_.Tensor, *INDEXING}:
            strangers = [x for x in strangers if x.ndim]
        if strangers and func is not aten.copy_.default:
            raise RuntimeError(f"{func}: tensors of two devices")
        out = func(*to_here(args), **to_here(kwargs))
        return return_and_correct_aliasing(func, args, kwargs, to_there(out))


def to_here(tree):
    return tree_map_only(Elsewhere, lambda x: x.inner, tree)


def to_there(tree):
    return tree_map_only(
        torch.Tensor, lambda x: x if isinstance(x, Elsewhere) else Elsewhere(x), tree
    )


class Machine(TorchFunctionMode):
    """A machine with such a device: what is made or moved there is Elsewhere."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, there = dict(kwargs or {}), args and isinstance(args[0], Elsewhere)
        if there and func == torch.Tensor.device.__get__:
            return ELSEWHERE
        if there and func in (torch.Tensor.cpu, torch.Tensor.tolist):
            return func(args[0].inner)
        if there and func is torch.Tensor.new_tensor:
            return Elsewhere(func(args[0].inner, *args[1:], **kwargs))
        if func is torch.Tensor.to and "cpu" in args[1:2]:
            return to_here(args[0]).to(*args[1:], **kwargs)
        devices = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.device)]
        if devices == [ELSEWHERE] and func is not torch._C._nn._parse_to:
            if any(isinstance(x, torch.Generator) for x in kwargs.values()):
                raise RuntimeError(f"{func}: a generator of the CPU")
            args, kwargs = tree_map_only(torch.device, lambda _: "cpu", (args, kwargs))
            return to_there(func(*args, **kwargs))
        return func(*args, **kwargs)


@pytest.fixture
def machine(monkeypatch):
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    for name in ("evaluate", "predict"):  # inference tensors cannot be wrapped
        monkeypatch.setattr(train, name, torch.no_grad()(getattr(train, name).__wrapped__))
    future, was = torch.__future__, torch.__future__.get_overwrite_module_params_on_conversion()
    future.set_overwrite_module_params_on_conversion(True)  # else parameters keep their type
    with Machine():
        yield
    future.set_overwrite_module_params_on_conversion(was)


def test_the_machine_tells_devices_apart(machine):
    there, here = torch.ones(3, device=ELSEWHERE), torch.arange(3)
    assert there.device == (there + 1).device == ELSEWHERE and here.device.type == "cpu"
    assert (there * torch.tensor(2.0)).tolist() == [2, 2, 2] and there[here].device == ELSEWHERE
    assert (here.to(ELSEWHERE) + there).cpu().tolist() == [1, 2, 3]
    generator = torch.Generator()
    mistakes = [
        lambda: here + there,
        lambda: here[there.long()],
        lambda: there.numpy(),
        lambda: there.double(),
        lambda: torch.stack([there.sum(), torch.tensor(0.0)]),
        lambda: there.index_put_((here,), torch.zeros(3)),
        lambda: torch.rand(3, generator=generator, device=ELSEWHERE),
    ]
    for mistake in mistakes:
        with pytest.raises((RuntimeError, TypeError)):
            mistake()


SWIN = "window=4 patch=4 mask_patch=16 depths=1,1 num_heads=1,2"


@pytest.mark.parametrize(
    "words",
    ["simmim", "simmim task=classify", "simmim target=tokens clusters=8", "mimdet"]
    + ["simmim encoder=beit target=bins8", f"simmim encoder=swin head=inverse_swin_t {SWIN}"]
    + [f"simmim encoder=swin_v2 target=color_cluster clusters=8 {SWIN}"]
    + ["mimdet fill=mask stem=patch", "yolos", "yolos depth=2 mid_pos_grid=4,4"]
    + ["yolos stem=patch reference_points=false", "pvt design=v2", "pvt head=classifier"]
    + [f"pvt head={head}" for head in ("retinanet", "detr", "semantic design=v2_li", "trans2seg")],
)
def test_a_run_elsewhere_is_the_run_here(words, shapes, tmp_path, machine):
    """Trained, resumed, evaluated and drawn on either, weights, answers and pictures are equal."""
    model, *settings = words.split()
    picture, calls = shapes / "val2017" / "000000000001.jpg", []
    for device in ("cpu", "cuda"):
        args = ["--out", tmp_path / device, "--device", device, "--workers", 0, "--batch-size", 4]
        trains = [*args, "--data", shapes, "--epochs", 0.5, "--set", *SETTINGS[model], *settings]
        Elsewhere.calls = 0
        assert run(model, *trains, "--steps", 2) == 0  # a part of the epochs
        assert run(model, *trains, "--resume") == 0
        looks = ["--attention"] if model == "yolos" else []
        assert run(model, *args, "--predict", picture, *looks, tiny=False) == 0
        calls.append(Elsewhere.calls)
    assert calls[0] == 0 < calls[1]
    here, there = tmp_path / "cpu", tmp_path / "cuda"
    assert same(here, there) and log_without_speed(here) == log_without_speed(there)
    for file in [*here.glob("*.png"), *here.glob("detections.json")]:
        assert file.read_bytes() == (there / file.name).read_bytes(), file.name


def test_what_was_found_elsewhere_is_drawn_told_and_written_here(shapes, machine):
    dataset = coco.CocoDataset(shapes, "val")
    image, target = dataset[0]
    image = image.to(ELSEWHERE)
    found = {k: v.to(ELSEWHERE) for k, v in target.items() if k in ("boxes", "labels", "masks")}
    found |= {"scores": torch.linspace(0.9, 0.6, len(target["labels"]), device=ELSEWHERE)}
    found |= {"tokens": torch.arange(len(target["labels"]), device=ELSEWHERE)}
    assert coco.draw(image, found, dataset.classes).device.type == "cpu"
    assert dataset.classes[target["labels"][0]]["name"] in coco.describe(found, dataset.classes)
    results = coco.to_results(dataset, target, found)
    assert len(results) == len(target["labels"]) and results[0]["bbox"] and results[0]["score"] > 0
    maps = torch.rand(2, 4, 5, device=ELSEWHERE)
    coco.draw_attention(image, found["boxes"][0], maps)
    logits = torch.tensor([0.0, 9, 0, 0, 0, 0], device=ELSEWHERE)
    assert coco.draw(image, {"logits": logits}, dataset.classes).device.type == "cpu"
    assert coco.describe({"logits": logits}, dataset.classes).startswith("square")
    semantic = torch.ones(target["size"], dtype=torch.long, device=ELSEWHERE)
    assert coco.draw(image, {"semantic": semantic}, dataset.classes).device.type == "cpu"
    assert coco.describe({"semantic": semantic}, dataset.classes) == "square 100%"


def test_batches_reach_a_gpu_from_pinned_memory_while_the_cpu_goes_on(shapes):
    """`pin_memory` and `non_blocking` change nothing but time: here they are looked at."""
    dataset = coco.CocoDataset(shapes, "val")
    args = argparse.Namespace(device=ELSEWHERE, workers=0, batch_size=2)
    assert train.make_loader(args, dataset, [0, 1]).pin_memory
    args.device = torch.device("cpu")
    (batch,) = loader = train.make_loader(args, dataset, [0, 1])
    assert not loader.pin_memory
    moved = []

    class Moves(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is torch.Tensor.to and ELSEWHERE in args:
                moved.append(kwargs["non_blocking"])
                return args[0]
            return func(*args, **kwargs or {})

    with Moves():
        train.to_device(batch, ELSEWHERE)
    assert moved == 8 * [True]  # of two pictures: pixels, boxes, labels, masks
