import json
import os
import sys
from pathlib import Path

import PIL.Image
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="of tests/test_parity_[!t]*.py, say cuda")


def pytest_configure(config):
    if config.option.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # else PyTorch starts it, and forks cannot go on
    else:
        torch.set_default_device(config.option.device)
        torch.backends.cudnn.allow_tf32 = False  # or convolutions are good to 1e-3


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    """A small copy of the generated data set."""
    import coco

    return coco.make_shapes(tmp_path_factory.mktemp("data") / "shapes", num_train=24, num_val=6)


@pytest.fixture(scope="session")
def real_coco():
    folder = os.environ.get("COCO_DIR")
    if not folder:
        pytest.skip("set COCO_DIR to a folder with COCO 2017 images to run this")
    return Path(folder)


@pytest.fixture
def write_coco(tmp_path):
    """Write a data set in the export layout: annotations, and images (3, H, W) by file name."""

    def write(annotations, images, categories=((9, "dog"), (7, "cat")), split="train"):
        folder = tmp_path / "set" / split
        folder.mkdir(parents=True, exist_ok=True)
        rows = []
        for i, (name, image) in enumerate(images.items()):
            if isinstance(image, torch.Tensor):
                PIL.Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / name)
                height, width = image.shape[1:]
            else:
                height, width = image
            rows.append(dict(id=i, file_name=name, height=height, width=width))
        data = dict(
            images=rows,
            annotations=annotations,
            categories=[dict(id=i, name=name) for i, name in categories],
        )
        (folder / "_annotations.coco.json").write_text(json.dumps(data))
        return folder.parent

    return write
