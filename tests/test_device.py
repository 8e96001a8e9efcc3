"""A GPU's path without a GPU: tensors that say they are elsewhere never meet those that are here.

What is not tried: the GPU's own kernels, their rounding, autocast and compilation.
"""

import pytest
import torch
from test_runs import SETTINGS, one_thread, run, same  # noqa: F401
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
    """Holds a tensor `inner` of the CPU, computes with it, and refuses company that is not so."""

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
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if (
            func is not aten.copy_.default
        ):  # the GPU too reads numbers, copies and indices from here
            strangers = tensors[:1] if func in INDEXING else [x for x in tensors if x.ndim]
            if not all(isinstance(x, Elsewhere) for x in strangers):
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
            args, kwargs = tree_map_only(torch.device, lambda _: "cpu", (args, kwargs))
            return to_there(func(*args, **kwargs))
        return func(*args, **kwargs)


@pytest.fixture
def machine(monkeypatch):
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    for name in ("evaluate", "predict"):  # inference tensors cannot be wrapped
        monkeypatch.setattr(train, name, torch.no_grad()(getattr(train, name).__wrapped__))
    overwrite = torch.__future__.set_overwrite_module_params_on_conversion
    overwrite(True)  # else parameters keep their type
    with Machine():
        yield
    overwrite(False)


def test_the_machine_tells_devices_apart(machine):
    there, here = torch.ones(3, device=ELSEWHERE), torch.arange(3)
    assert there.device == (there + 1).device == ELSEWHERE and here.device.type == "cpu"
    assert (there * torch.tensor(2.0)).tolist() == [2, 2, 2] and there[here].device == ELSEWHERE
    assert (here.to(ELSEWHERE) + there).cpu().tolist() == [1, 2, 3]
    for mistake in (lambda: here + there, lambda: here[there.long()], lambda: there.numpy()):
        with pytest.raises((RuntimeError, TypeError)):
            mistake()


@pytest.mark.parametrize(
    "words",
    ["simmim", "simmim task=classify", "simmim target=tokens clusters=8", "mimdet"]
    + ["mimdet fill=mask stem=patch", "yolos", "yolos depth=2 mid_pos_grid=4,4"]
    + [f"pvt head={h}" for h in ("retinanet", "classifier", "detr", "semantic", "trans2seg")],
)
def test_a_run_elsewhere_is_the_run_here(words, shapes, tmp_path, machine):
    """Trained, evaluated, resumed and drawn on either, every weight is the same."""
    model, *settings = words.split()
    picture = shapes / "val2017" / "000000000001.jpg"
    for device in ("cpu", "cuda"):
        args = ["--out", tmp_path / device, "--device", device, "--workers", 0, "--batch-size", 4]
        trains = [*args, "--data", shapes, "--epochs", 0.5, "--set", *SETTINGS[model], *settings]
        assert run(model, *trains, "--steps", 2) == 0  # of 3
        assert run(model, *trains, "--resume") == 0
        looks = ["--attention"] if model == "yolos" else []
        assert run(model, *args, "--predict", picture, *looks, tiny=False) == 0
    assert same(tmp_path / "cpu", tmp_path / "cuda")


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
