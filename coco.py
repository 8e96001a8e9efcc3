"""COCO-format data: read, transform, batch, evaluate, draw; and generated shapes in that format.

Flow: folder -> CocoDataset -> Transform -> batches -> collate -> images, targets -> model
      -> to_results -> evaluate (average precision) and draw (pictures)
Labels are 0..K-1 in the order of the json's category ids; to_results maps them back to the ids.
"""

import contextlib
import io
import itertools
import json
import math
import os
import re
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import PIL.ImageOps
import torch
from pycocotools import mask as mask_api
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.datasets.folder import is_image_file
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights
from torchvision.ops import box_convert, clip_boxes_to_image
from torchvision.transforms import v2
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks, make_grid

PIL.Image.init()
FORMATS = [name for name in PIL.Image.ID if name != "EPS"]  # programs, which Ghostscript would run

# COCO's 80 categories, for released weights, which do not bring their names; ids have gaps.
CLASSES = [
    {"id": i, "name": name}
    for i, name in enumerate(FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"])
    if name not in ("__background__", "N/A")
]


def printable(text):
    """In one line, without what a screen obeys: names in files may hold anything."""
    text = " ".join(str(text).splitlines())
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class DataError(Exception):
    """Something the user handed in is wrong; one line says what, where and what to do."""

    def __init__(self, message):
        super().__init__(printable(message))


# --- 1. Read --------------------------------------------------------------------------------------


def find_split(root, split, required=True):
    """Json and image folder of split "train" or "val" in COCO's or the common export layout."""
    root, other = Path(root), {"train": "train", "val": "valid"}[split]
    layouts = [
        (root / "annotations" / f"instances_{split}2017.json", root / f"{split}2017"),
        (root / other / "_annotations.coco.json", root / other),
    ]
    for annotations, folder in layouts:
        if annotations.is_file():
            return annotations, folder
    if required:
        raise DataError(f"{root}: no {split} split; expected {layouts[0][0]} or {layouts[1][0]}")


def is_whole(x):
    return isinstance(x, int)


def is_size(x):
    return isinstance(x, int) and 0 < x < 10**6


def is_inside(x):
    """A file name that does not lead out of its folder."""
    return isinstance(x, str) and not Path(x).anchor and ".." not in Path(x).parts


def are_pixels(x):
    """Coordinates that can be drawn: pycocotools crashes on NaN and on very large numbers."""
    numbers = isinstance(x, list) and {*map(type, x)} <= {int, float}
    return numbers and all(map((1e6).__gt__, map(abs, x)))  # millions of them: quickly


def is_mask(x):
    """Nothing, polygons, or run lengths that fill their size: else pycocotools may never end."""
    if isinstance(x, dict):
        size, counts = x.get("size"), x.get("counts")
        counts = run_lengths(counts) if isinstance(counts, str) else counts
        whole = isinstance(size, list) and isinstance(counts, list)
        whole = whole and all(isinstance(n, int) and n >= 0 for n in size + counts)
        return whole and len(size) == 2 and sum(counts) == math.prod(size)
    pairs = isinstance(x, list) and all(are_pixels(p) and len(p) % 2 == 0 for p in x)
    return x is None or pairs and (not any(x) or max(map(len, x)) >= 6)


def run_lengths(text):
    """Compressed run lengths as numbers, none of them if the text is damaged.

    A character is 6 bits from "0" on: 5 of a number, lowest first, the last one's 16 its sign, and
    whether more follow. From the fourth on a number is the difference to the last but one.
    """
    counts, value, shift = [], 0, 0
    for bits in (byte - 48 for byte in text.encode()):
        if not 0 <= bits < 64 or shift == 30:  # pycocotools reads longer numbers in another way
            return []
        value, shift = value | (bits & 31) << shift, shift + 5
        if bits < 32:
            value -= (bits & 16) << shift - 4
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    return [] if shift else counts


# fmt: off
RULES = {  # list in the json -> field -> test, and what to say of an entry that fails it
    "images": {
        "id": (is_whole, "image {id} has no whole number as id"),
        "file_name": (is_inside, "image {id} has no file name inside the folder of images"),
        "width": (is_size, "image {id} has no width or height in whole pixels"),
        "height": (is_size, "image {id} has no width or height in whole pixels"),
    },
    "categories": {
        "id": (is_whole, "category {id} has no whole number as id"),
        "name": (lambda x: isinstance(x, str), "category {id} has no text as name"),
    },
    "annotations": {
        "image_id": (is_whole, "annotation {id} has no whole number as image_id"),
        "category_id": (is_whole, "annotation {id} has no whole number as category_id"),
        "bbox": (lambda x: are_pixels(x) and len(x) == 4,
                 "annotation {id}: a bbox has not four numbers x, y, width, height in pixels"),
        "segmentation": (is_mask, "annotation {id} has neither polygons of three points or more "
                                  "nor run lengths of as many pixels as their size"),
        "area": (lambda x: x is None or isinstance(x, int | float) and 0 <= x < math.inf,
                 "annotation {id} has no number of pixels as area"),
        "iscrowd": (lambda x: x in (None, 0, 1), "annotation {id} has neither 0 nor 1 as iscrowd"),
    },
}
# fmt: on


def check_entries(kind, rows):
    if not isinstance(rows, list) or {*map(type, rows)} - {dict}:
        raise ValueError(f'"{kind}" is no list of entries')
    for row, (field, (test, problem)) in itertools.product(rows, RULES[kind].items()):
        if not test(row.get(field)):
            problem = problem.format(id=row.get("id", "without id"))
            raise ValueError(f"{problem} ({field}: {row.get(field)!r:.80})")
    if kind != "annotations" and len({row["id"] for row in rows}) < len(rows):
        raise ValueError(f"two of its {kind} have the same id")


def read_annotations(file):
    """Images, categories and annotations of a json in COCO's format, every entry checked."""
    try:
        data = json.loads(file.read_bytes())
        tables = [data.get(kind, []) if isinstance(data, dict) else None for kind in RULES]
        for kind, rows in zip(RULES, tables, strict=True):
            check_entries(kind, rows)
        size_of = {x["id"]: [x["height"], x["width"]] for x in tables[0]}
        for a in tables[2]:
            mask, size = a.get("segmentation"), size_of.get(a["image_id"])
            if isinstance(mask, dict) and size and mask["size"] != size:
                which = f"the mask of annotation {a.get('id', 'without id')}"
                raise ValueError(f"{which} has size {mask['size']}, image {a['image_id']} {size}")
    except (OSError, ValueError, RecursionError) as error:
        how = "correct it, remove the entry or export it again"
        raise DataError(f"{file}: not a COCO annotation file: {error}; {how}") from None
    return tables


def find_images(folder):
    """Paths of the pictures in a folder and those below it, but not of what train.py has drawn."""
    files = (file for file in Path(folder).rglob("*") if is_image_file(file.name))
    drawn = re.compile(r"(predict-\d+-.*|epoch-\d+\.\d+|eval-only|tokens|curves)\.png")
    return sorted(file for file in files if not drawn.fullmatch(file.name))


def read_image(path, size=None):
    """RGB tv_tensors.Image (3, H, W) uint8 as a viewer shows it; size (H, W): the annotations'.

    A camera's rotation tag is followed unless only the unrotated image has that size; what is
    transparent is shown.
    """
    try:
        with PIL.Image.open(path, formats=FORMATS) as file:
            image = PIL.ImageOps.exif_transpose(file)
            if size and image.size != (size[1], size[0]):
                image = file
            if image.mode == "F":
                raise ValueError("its pixels are fractions, of which nobody says how large")
            if image.mode.startswith("I"):  # 16 bits
                image = PIL.Image.fromarray((np.asarray(image) // 256).clip(0, 255).astype("uint8"))
            image = v2.functional.to_image(image.convert("RGB"))
    except Exception as error:  # damaged files have brought up many kinds
        reason = error if os.path.exists(path) else "no such file"
        raise DataError(f"{path}: cannot read image ({reason}); replace or remove it") from None
    _, h, w = image.shape
    if size and (h, w) != tuple(size):
        told = f"{path}: {w}x{h} pixels, but the annotations say {size[1]}x{size[0]}"
        raise DataError(f"{told}; correct width and height in the json or replace the image")
    return image


def usable(annotations, image_of):
    """Those whose box, clipped to their image, has an area; with what the json may leave out."""
    rows = []
    for annotation in annotations:
        image, (x, y, w, h) = image_of[annotation["image_id"]], annotation["bbox"]
        left, top = max(x, 0), max(y, 0)
        w, h = min(x + w, image["width"]) - left, min(y + h, image["height"]) - top
        if min(w, h) > 1e-3:  # more than rounding leaves
            a = {"iscrowd": 0, "segmentation": [], "area": w * h}
            a |= {key: value for key, value in annotation.items() if value is not None}
            a["bbox"] = [left, top, w, h]
            if isinstance(a["segmentation"], list):  # without polygons that enclose nothing
                a["segmentation"] = [polygon for polygon in a["segmentation"] if len(polygon) >= 6]
            rows.append(a | {"id": len(rows) + 1})  # COCOeval takes 0 for "no match"
    return rows


class CocoDataset(Dataset):
    """Images with their objects, from a folder in COCO format.

    root: see find_split. classes: category dicts that fix the labels (those of the training split),
    the json's own by default. limit: use the first so many images. dataset[i] -> image (3, H, W)
    float in [0, 1], target dict(boxes (M, 4) float xyxy pixels, labels (M,) int64, masks (M, H, W)
    bool if every annotation has a segmentation, image_id int, size (H, W) of the file). dataset[i,
    seed]: the transform's random choices are fixed by seed. Raises DataError; with skip_bad the
    next image stands in for one that cannot be read, and target["skipped"] says what was wrong.
    """

    task, skip_bad, has_masks, same_classes = "detect", False, False, True

    def __init__(self, root, split, transform=None, limit=None, classes=None):
        self.file, self.folder = find_split(root, split)
        self.transform = transform
        images, categories, annotations = read_annotations(self.file)
        self.images = images[:limit]
        categories = sorted(categories, key=lambda c: c["id"])  # as in released weights
        self.classes = classes or [{"id": c["id"], "name": c["name"]} for c in categories]
        names = {c["id"]: c["name"] for c in self.classes}
        for c in categories:
            if names.get(c["id"], c["name"]) != c["name"]:
                was = f"{names[c['id']]} where the model was trained"
                raise DataError(f"{self.file}: category {c['id']} is {c['name']}, but {was}")
        self.label_of = {c["id"]: label for label, c in enumerate(self.classes)}
        self.same_classes = {c["id"] for c in categories} == {*names}
        if not self.images or not self.classes and self.task != "pretrain":
            raise DataError(f"{self.file}: lists no {'categories' if self.images else 'images'}")
        listed, image_of = {x["id"] for x in images}, {x["id"]: x for x in self.images}
        known = [a for a in annotations if a["image_id"] in listed and a["category_id"] in names]
        here = [a for a in known if a["image_id"] in image_of]
        sound = usable(here, image_of)
        self.truth = COCO()  # for evaluation: crowds too
        self.truth.dataset = dict(images=self.images, annotations=sound, categories=self.classes)
        with contextlib.redirect_stdout(io.StringIO()):
            self.truth.createIndex()
        rows = [self.truth.imgToAnns[x["id"]] for x in self.images]
        self.objects = [[a for a in row if not a["iscrowd"]] for row in rows]
        used, bare = sum(map(len, self.objects)), sum(not a["segmentation"] for a in sound)
        masked = any(a["segmentation"] for a in itertools.chain(*self.objects))
        self.has_masks = used > 0 and not bare
        self.notes = [f"{len(self.images)} images, {used} objects, {len(self.classes)} classes"]
        counts = {
            "crowd regions count in evaluation only": len(sound) - used,
            "boxes without area inside their image dropped": len(here) - len(sound),
            "annotations of unknown images or categories dropped": len(annotations) - len(known),
            "objects have no segmentation: masks are not used": bare if masked else 0,
        }
        self.notes += [f"{count} {what}" for what, count in counts.items() if count]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, item):
        index, seed = item if isinstance(item, tuple) else (item, None)
        image, skipped = None, []
        while image is None:
            try:
                image, target = self.read(index)
            except DataError as error:
                skipped.append(str(error))
                if not self.skip_bad or len(skipped) == len(self):
                    raise
                index = (index + 1) % len(self)
        if self.transform:
            with torch.random.fork_rng(devices=[], enabled=seed is not None):
                if seed is not None:
                    torch.default_generator.manual_seed(seed)
                image, target = self.transform(image, target)
        image, target = finish(image, target)
        info = self.images[index]
        target |= {"image_id": info["id"], "size": (info["height"], info["width"])}
        return image, target | ({"skipped": skipped} if skipped else {})

    def read_file(self, info):
        return read_image(self.folder / info["file_name"], (info["height"], info["width"]))

    def read(self, index):
        """Image and target as they lie in the file, as torchvision's tv_tensors."""
        image, objects = self.read_file(self.images[index]), self.objects[index]
        size = image.shape[-2:]
        boxes = torch.tensor([a["bbox"] for a in objects], dtype=torch.float32).reshape(-1, 4)
        boxes = box_convert(boxes, "xywh", "xyxy")
        target = {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size),
            "labels": torch.tensor([self.label_of[a["category_id"]] for a in objects]).long(),
        }
        kinds = {type(a["segmentation"]) for a in objects}
        if self.has_masks and kinds == {list}:
            # Drawn once, at the image's final size: far quicker than masks that are resized.
            polygons = [[np.reshape(p, (-1, 2)) for p in a["segmentation"]] for a in objects]
            target["polygons"] = polygons  # of each object: list of (P, 2) xy
        elif self.has_masks:
            masks = np.array([self.truth.annToMask(a) for a in objects], dtype=np.uint8)
            target["masks"] = tv_tensors.Mask(masks.reshape(-1, *size))
        return image, target


class ObjectCrops(CocoDataset):
    """The objects one by one, for a classifier: square pieces of images, target dict(labels (1,)).

    The square around a box is moved into the image, and cut where it is larger than the image.
    """

    task = "classify"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.crops = []
        for image, objects in zip(self.images, self.objects, strict=True):
            for a in objects:
                x, y, w, h = a["bbox"]
                left, right = piece(x, w, max(w, h), image["width"])
                top, bottom = piece(y, h, max(w, h), image["height"])
                crop = dict(top=top, left=left, height=bottom - top, width=right - left)
                self.crops.append((image, a, crop))
        if not self.crops:
            raise DataError(f"{self.file}: no objects to classify")
        self.images = [crop | {"id": a["id"]} for _, a, crop in self.crops]
        self.notes.append("each object a picture of its own")

    def read(self, index):
        info, annotation, crop = self.crops[index]
        label = self.label_of[annotation["category_id"]]
        image = v2.functional.crop(self.read_file(info), **crop)
        return image, {"labels": torch.tensor([label])}


def piece(start, length, side, limit):
    """Whole pixels from..to of `side` around start..start + length, inside 0..limit."""
    start = min(max(0, start + (length - side) / 2), max(0, limit - side))
    return int(start), min(limit, math.ceil(start + side))


class SemanticMaps(CocoDataset):
    """For a segmenter: target dict(semantic (H, W) int64), the class of every pixel.

    0..K-1 where an object is (the smallest, if several are), K elsewhere, -1 on crowd regions.
    """

    task = "segment"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if not self.has_masks and self.truth.dataset["annotations"]:
            raise DataError(f"{self.file}: no masks to segment by; take a detector or a classifier")

    def read(self, index):
        info = self.images[index]
        return self.read_file(info), {"semantic": tv_tensors.Mask(self.paint(info["id"]))}

    def paint(self, image_id):
        """Classes (H, W) int64 of a whole image."""
        info = self.truth.imgs[image_id]
        canvas = torch.full((info["height"], info["width"]), len(self.classes))
        annotations = self.truth.imgToAnns[image_id]
        for a in sorted(annotations, key=lambda a: (not a["iscrowd"], -a["area"])):
            mask = torch.from_numpy(self.truth.annToMask(a)).bool()
            canvas[mask] = -1 if a["iscrowd"] else self.label_of[a["category_id"]]
        return canvas


class Pictures(CocoDataset):
    """For pre-training: pictures alone, from a folder in COCO format or any folder of images.

    Without annotations every tenth file, in order of its name, is kept for evaluation.
    """

    task = "pretrain"

    def __init__(self, root, split, transform=None, limit=None, classes=None):
        if any(find_split(root, part, required=False) for part in ("train", "val")):
            super().__init__(root, split, transform, limit)
        else:
            self.folder, self.transform = Path(), transform
            files = find_images(root)
            found, held = len(files), files[9::10] or files[-1:]
            files = (held if split == "val" else sorted({*files} - {*held}))[:limit]
            if not files:
                raise DataError(f"{root}: no annotations, and {found} images; give two or more")
            # Every picture becomes a square: its own shape does not matter.
            self.images = [dict(id=i, file_name=f, width=1, height=1) for i, f in enumerate(files)]
            self.classes = [{"id": 0, "name": "picture"}]
        self.classes = classes or self.classes
        self.notes = [f"{len(self.images)} images"]

    def read(self, index):
        return read_image(self.folder / self.images[index]["file_name"]), {}


DATASETS = {kind.task: kind for kind in (CocoDataset, ObjectCrops, SemanticMaps, Pictures)}


def finish(image, target):
    """Plain tensors, floats in [0, 1]; boxes clipped, objects of which nothing is left dropped."""
    image, target = v2.ToPureTensor()(image, target)
    size, image = image.shape[-2:], image.float() / 255
    if "boxes" not in target:
        return image, target
    boxes = target["boxes"] = clip_boxes_to_image(target["boxes"], size)
    keep = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
    if "polygons" in target:
        # Not too far outside, where pycocotools crashes.
        polygons = [[p.flatten().clip(-1e6, 1e6) for p in each] for each in target.pop("polygons")]
        masks = [mask_api.merge(mask_api.frPyObjects(each, *size)) for each in polygons]
        target["masks"] = torch.from_numpy(mask_api.decode(masks)).permute(2, 0, 1)
    if "masks" in target:
        keep &= target["masks"].amax(dim=(1, 2)) > 0  # uint8: far quicker than bool's any
        target["masks"] = target["masks"].view(torch.bool)
    return image, {name: value[keep] for name, value in target.items()}


# --- 2. Transform ---------------------------------------------------------------------------------


def resized(h, w, short, longest, multiple=1):
    """Size with short side `short`, or long side `longest` if smaller.

    Rounded as in mmdetection (Detectron2 may differ by a pixel, where exactly half a one is left),
    or with a multiple as in DETR, then cut to multiples as in YOLOS.
    """
    low, high = min(h, w), max(h, w)
    if multiple == 1:
        scale = min(short / low, longest / high)
        return max(1, int(h * scale + 0.5)), max(1, int(w * scale + 0.5))
    if short * high / low > longest:
        short = round(longest * low / high)
    return tuple(max(multiple, int(short * s / low) // multiple * multiple) for s in (h, w))


class Transform:
    """A recipe's resizing and, in training, random flip and crop; masks and boxes follow.

    recipe: sizes: short sides in pixels, one is drawn in training, the last serves evaluation;
    empty: the image's own. max_size: of the long side, at the largest short side; in evaluation and
    for segmenters in proportion. multiple: to which both sides are cut. crop, by task: "detect"
    (least, most) pixels of a side, every second image; "segment" (most,); "classify" and "pretrain"
    (least, most) share of the area, and images become squares; empty: none.
    """

    def __init__(self, recipe, train, task="detect"):
        self.recipe, self.train, self.task = recipe, train, task
        crop, share = recipe["crop"], task in ("classify", "pretrain")
        if share and not (recipe["sizes"] and len(crop) in (0, 2) and max(crop, default=1) <= 1):
            raise DataError("--set: give sizes=128, and crop=0.5,1.0 or crop=")
        if [*crop] != sorted(crop) or not share and (len(crop) > 2 or {*map(type, crop)} - {int}):
            raise DataError("--set crop: give the least before the most; pixels for a detector")

    def __call__(self, image, target):
        r, train = self.recipe, self.train
        if train and torch.rand(1) < 0.5:
            flip, width = v2.functional.horizontal_flip, image.shape[-1]
            image, target = follow(flip, image, target, (-1, 1), (width, 0))
        if self.task in ("classify", "pretrain"):
            side = [r["sizes"][-1]] * 2
            how = v2.InterpolationMode("bicubic" if self.task == "classify" else "bilinear")
            if train and r["crop"]:
                return v2.RandomResizedCrop(side, r["crop"], interpolation=how)(image, target)
            return v2.Resize(side, how)(image, target)
        if train and len(r["crop"]) == 2 and torch.rand(()) < 0.5:
            image, target = resize(image, target, choice((400, 500, 600)), math.inf, r["multiple"])
            image, target = crop(image, target, *r["crop"])
        sizes, longest = r["sizes"] or [min(image.shape[-2:])], r["max_size"]
        short = choice(sizes) if train else sizes[-1]
        if not train or self.task == "segment":
            longest = longest * short // max(sizes)
        image, target = resize(image, target, short, longest, r["multiple"])
        if train and len(r["crop"]) == 1:
            image, target = crop(image, target, *r["crop"], *r["crop"])
        return image, target


def choice(values):
    return values[int(torch.randint(len(values), ()))]


def resize(image, target, short, longest, multiple):
    h, w = image.shape[-2:]
    size = resized(h, w, short, longest, multiple)
    operation = partial(v2.functional.resize, size=size)
    return follow(operation, image, target, (size[1] / w, size[0] / h))


def crop(image, target, low, high):
    """A random place of the image, its sides drawn from low..high where it is so large."""
    sides = image.shape[-2:]
    h, w = (int(torch.randint(min(s, low), min(s, high) + 1, ())) for s in sides)
    top, left = (int(torch.randint(s - x + 1, ())) for s, x in zip(sides, (h, w), strict=True))
    operation = partial(v2.functional.crop, top=top, left=left, height=h, width=w)
    return follow(operation, image, target, shift=(-left, -top))


def follow(operation, image, target, scale=(1, 1), shift=(0, 0)):
    """Image, boxes and masks after the operation; polygons' corners become scale * xy + shift."""
    changed = {k: operation(v) for k, v in target.items() if isinstance(v, tv_tensors.TVTensor)}
    if "polygons" in target:
        polygons = target["polygons"]
        changed["polygons"] = [[np.multiply(p, scale) + shift for p in each] for each in polygons]
    return operation(image), target | changed


# --- 3. Batch -------------------------------------------------------------------------------------


def batches(dataset, batch_size, start, stop, seed=0, rank=0, world=1):
    """Batches of (index, seed) for steps start..stop, images of similar aspect ratio together.

    Step t is the same whatever came before and however many workers load it, so a resumed run goes
    on exactly. Of each global batch of `world` processes, process `rank` gets its share.
    """
    aspect = torch.tensor([image["width"] / image["height"] for image in dataset.images])
    size, first, shown = batch_size * world, batch_size * rank, None
    for step in range(start, stop):
        number, place = divmod(step, steps_per_epoch(dataset, size))
        if number != shown:
            order, shown = epoch(aspect, size, random_seed(seed, number)), number
        mine = order[place, first : first + batch_size].tolist()
        yield [(i, random_seed(seed, step, k)) for k, i in enumerate(mine, first)]


def epoch(aspect, size, seed):
    """Global batches (steps, size) of an epoch over images of these aspect ratios."""
    generator = torch.Generator().manual_seed(seed)
    steps = steps_per_epoch(aspect, size)
    order = torch.randperm(len(aspect), generator=generator)
    order = order.repeat(math.ceil(size / len(order)))[: steps * size]
    for window in order.split(16 * size):  # sorting within windows alone keeps batches random
        window.copy_(window[aspect[window].argsort()])
    return order.reshape(steps, size)[torch.randperm(steps, generator=generator)]


def steps_per_epoch(dataset, global_batch):
    return max(1, len(dataset) // global_batch)


def random_seed(*numbers):
    """One seed from several whole numbers, the same in every process."""
    return hash(numbers) % 2**63


def collate(samples):
    """(image, target) pairs -> images, targets: they stay apart, for their sizes differ."""
    return tuple(zip(*samples, strict=True))


# --- 4. Evaluate ----------------------------------------------------------------------------------

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def to_results(dataset, target, output):
    """One image's answer as json: detections in COCO's result format (category ids, xywh boxes, RLE
    masks); of a classifier the category found and the true one; of a segmenter how many pixels of
    each class it called what, [truth, found, pixels]; of a reconstruction its errors.
    """
    about = dict(image_id=target["image_id"])
    if "logits" in output:
        score, label = output["logits"].softmax(dim=0).max(dim=0)
        ids = [dataset.classes[int(x)]["id"] for x in (label, target["labels"])]
        return [about | dict(category_id=ids[0], score=score.item(), true_id=ids[1])]
    if "reconstruction" in output:
        return [about | {name: output[name].item() for name in ("l1", "baseline")}]
    if "semantic" in output:
        truth, found = dataset.paint(target["image_id"]), output["semantic"].cpu()
        n = len(dataset.classes) + 1
        counts = torch.bincount((truth * n + found)[truth >= 0], minlength=n * n).reshape(n, n)
        pairs = [[t, f, int(counts[t, f])] for t, f in counts.nonzero().tolist()]
        return [about | dict(pixels=pairs)]
    columns = dict(
        category_id=[dataset.classes[label]["id"] for label in output["labels"].tolist()],
        bbox=box_convert(output["boxes"].float(), "xyxy", "xywh").tolist(),
        score=output["scores"].tolist(),
    )
    if "tokens" in output:  # which [DET] token answered
        columns["token"] = output["tokens"].tolist()
    if "masks" in output:
        columns["segmentation"] = encode(output["masks"].permute(1, 2, 0).cpu().numpy())
    rows = zip(*columns.values(), strict=True)
    return [about | dict(zip(columns, row, strict=True)) for row in rows]


def encode(masks):
    """Masks (H, W, M) as compressed run lengths that json can hold."""
    rles = mask_api.encode(np.asfortranarray(masks, dtype=np.uint8))
    return [rle | {"counts": rle["counts"].decode()} for rle in rles]


def evaluate(dataset, results):
    """What a data set's results (see to_results) are worth: numbers by name, the main one first.

    Detectors: METRICS of boxes and "mask_"... of masks; 0 without detections, -1 where there is
    nothing to find. Segmenters: mIoU over the classes, background too, that are there or were
    found. Pre-training: the share of the baseline's error that is gone, and both errors.
    """
    if dataset.task == "pretrain":
        l1, baseline = (sum(r[name] for r in results) / len(results) for name in ("l1", "baseline"))
        explained = 1 - l1 / baseline if baseline > 1e-6 else -1.0  # pictures of one colour: n/a
        return {"explained": explained, "masked_L1": l1, "baseline_L1": baseline}
    if dataset.task == "classify":
        right = [r["category_id"] == r["true_id"] for r in results]
        return {"top1": sum(right) / len(right)}
    if dataset.task == "segment":
        counts = torch.zeros([len(dataset.classes) + 1] * 2, dtype=torch.double)  # (truth, found)
        for truth, found, pixels in itertools.chain(*(r["pixels"] for r in results)):
            counts[truth, found] += pixels
        right, union = counts.diag(), counts.sum(0) + counts.sum(1) - counts.diag()
        iou = (right / union)[union > 0]
        return {"mIoU": iou.mean().item(), "pixel_accuracy": (right.sum() / counts.sum()).item()}
    metrics, prefixes = {}, {"bbox": ""}
    if dataset.has_masks and all("segmentation" in r for r in results):
        prefixes["segm"] = "mask_"
    for kind, prefix in prefixes.items():
        # Objects are small, medium or large by what is judged: loadRes takes a mask's area only
        # where there is no box. It writes into what it is given.
        found = [{k: v for k, v in r.items() if k != "bbox" or kind == "bbox"} for r in results]
        with contextlib.redirect_stdout(io.StringIO()):
            judge = COCOeval(dataset.truth, dataset.truth.loadRes(found) if found else COCO(), kind)
            judge.evaluate()
            judge.accumulate()
            judge.summarize()
        values = judge.stats[: len(METRICS)].tolist()
        metrics |= {prefix + name: v for name, v in zip(METRICS, values, strict=True)}
    return metrics


# --- 5. Draw --------------------------------------------------------------------------------------

COLORS = ["red", "lime", "blue", "yellow", "magenta", "cyan", "orange", "white", "purple", "green"]


def enlarge(image):
    """Image (3, H, W), each pixel repeated zoom times if that is needed to see it; and zoom."""
    zoom = max(1, round(320 / max(image.shape[-2:])))
    return image.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2), zoom


def draw(image, found, classes):
    """Image (3, H, W) in [0, 1] with boxes, masks and names drawn on it: (3, H', W') uint8.

    found: a target, or what a model answered. Small images are enlarged, so that names can be read.
    """
    canvas = (image.clamp(0, 1) * 255).to("cpu", torch.uint8)
    if "semantic" in found:
        semantic = found["semantic"].cpu()
        for k in {*semantic.unique().tolist()} & {*range(len(classes))}:
            canvas = draw_segmentation_masks(canvas, semantic == k, 0.6, COLORS[k % len(COLORS)])
    threshold = 0.5
    if "logits" in found:  # the best class, however sure
        score, label = found["logits"].softmax(dim=0).max(dim=0)
        found, threshold = {"labels": label[None], "scores": score[None]}, 0
    labels = found.get("labels", torch.zeros(0)).cpu()
    scores = found.get("scores", torch.ones(len(labels))).cpu()
    keep = scores >= threshold
    if not keep.any():
        return enlarge(canvas)[0]
    colors = [COLORS[i % len(COLORS)] for i in labels[keep].tolist()]
    names = [classes[i]["name"] for i in labels[keep].tolist()]
    if "scores" in found:
        pairs = zip(names, scores[keep].tolist(), strict=True)
        names = [f"{name} {score:.2f}" for name, score in pairs]
    if "masks" in found:
        masks = found["masks"].cpu()[keep]
        canvas = draw_segmentation_masks(canvas, masks, alpha=0.4, colors=colors)
    h, w = image.shape[1:]
    boxes = found.get("boxes", torch.tensor([[0, 0, w - 1, h - 1]]))  # of a class: the whole image
    canvas, zoom = enlarge(canvas)
    boxes = boxes.cpu()[keep] * zoom
    canvas = draw_bounding_boxes(canvas, boxes, colors=colors, width=2)
    picture, font = v2.functional.to_pil_image(canvas), PIL.ImageFont.load_default(13)
    pen = PIL.ImageDraw.Draw(picture)
    for (x, y, _, _), name in zip(boxes.tolist(), names, strict=True):
        corner = max(x, 0) + 4, max(y, 0) + 2
        # Readable on any colour.
        pen.text(corner, name, "white", font, stroke_width=2, stroke_fill="black")
    return v2.functional.pil_to_tensor(picture)


def describe(found, classes):
    """What a model answered, in words."""
    if "logits" in found:
        score, label = found["logits"].softmax(dim=0).max(dim=0)
        return f"{classes[label]['name']} {score:.2f}"
    if "reconstruction" in found:
        l1, baseline = found["l1"], found["baseline"]
        return f"L1 {l1:.3f} where hidden, {baseline:.3f} for the mean visible colour"
    if "semantic" in found:
        shares = torch.bincount(found["semantic"].flatten(), minlength=len(classes) + 1)
        names = [*(c["name"] for c in classes), "background"]
        order = [k for k in shares.argsort(descending=True).tolist() if shares[k]]
        return ", ".join(f"{names[k]} {shares[k] / shares.sum():.0%}" for k in order[:6])
    pairs = zip(found["scores"], found["labels"], strict=True)
    sure = [f"{classes[label]['name']} {score:.2f}" for score, label in pairs if score >= 0.5]
    return f"{len(sure)} objects with a score of 0.5 or more: {', '.join(sure[:8]) or 'none'}"


def save_pictures(path, rows):
    """Write rows of pictures (3, H, W) uint8, the last perhaps shorter, as one PNG."""
    height, width = (max(p.shape[d] for row in rows for p in row) + 4 for d in (1, 2))
    cells = []
    for picture in itertools.chain(*rows):
        right, bottom = width - picture.shape[2], height - picture.shape[1]
        cells.append(v2.functional.pad(picture, [0, 0, right, bottom], fill=255))
    grid = make_grid(cells, nrow=max(map(len, rows)), padding=0, pad_value=255)
    v2.functional.to_pil_image(grid).save(path)


def draw_curves(path, runs):
    """Two panels, training loss and first measure against epochs, with a line for each run.

    runs: name -> the lines of its log.jsonl, as dicts.
    """
    losses, measures = {}, {}
    for name, lines in runs.items():
        steps = [x for x in lines if "lr" in x]
        losses[name] = [
            (x["epoch"], sum(v for k, v in x.items() if k.startswith("loss_"))) for x in steps
        ]
        measures[name] = [(x["epoch"], [*x.values()][2]) for x in lines if "lr" not in x]
    save_pictures(path, [[draw_panel("loss", losses), draw_panel("measure", measures)]])


def draw_panel(title, curves, width=480, height=320):
    """Lines through the points (x, y) of each curve, from 0 to their largest: (3, H, W) uint8.

    What is below 0 (SimMIM's measure at first) is drawn at 0.
    """
    panel = PIL.Image.new("RGB", (width, height), "white")
    pen, font = PIL.ImageDraw.Draw(panel), PIL.ImageFont.load_default(14)
    points = [(0, 0), *itertools.chain(*curves.values())]
    right, top = (max(values) or 1 for values in zip(*points, strict=True))

    def place(x, y):
        return 50 + x / right * (width - 70), height - 30 - max(0, y) / top * (height - 60)

    pen.line([place(0, top), place(0, 0), place(right, 0)], "black")
    for share in (0.25, 0.5, 0.75, 1):
        pen.text(place(0, share * top), f"{share * top:.2g} ", "black", font, "rm")
        pen.text(place(share * right, 0), f"\n{share * right:.3g}", "black", font, "mm")
    pen.text((width / 2, 4), f"{title} against epochs", "black", font, "mt")
    names = 24 if title == "loss" else height - 36 - 16 * len(curves)  # where no curve ends
    for i, (name, curve) in enumerate(curves.items()):
        color = f"hsl({137 * i % 360}, 80%, 40%)"
        places = [place(x, y) for x, y in curve]
        pen.line(places, color, 2)
        for x, y in places:
            pen.ellipse([x - 2, y - 2, x + 2, y + 2], color)
        pen.text((width - 20, names + 16 * i), name, color, font, "rt")
    return v2.functional.pil_to_tensor(panel)


def draw_attention(image, box_xyxy, maps):
    """Image (3, H, W) in [0, 1] with a box, then the image lit by each attention map (h, w)."""
    image, zoom = enlarge(image.cpu())
    light = maps.cpu() / maps.cpu().amax(dim=(1, 2), keepdim=True).clamp(min=1e-9)
    light = v2.functional.resize(light, image.shape[1:])
    box = box_xyxy.cpu()[None] * zoom
    first = draw_bounding_boxes((image * 255).byte(), box, colors="red", width=2)
    return [first, *((image * (0.15 + 0.85 * m) * 255).byte() for m in light)]


def relative_boxes(dataset, results):
    """Boxes (D, 4) of detections, or annotations, as cxcywh in shares of their images."""
    size_of = {image["id"]: [image["width"], image["height"]] * 2 for image in dataset.images}
    boxes = torch.tensor([r["bbox"] for r in results]).float().reshape(-1, 4)
    sizes = torch.tensor([size_of[r["image_id"]] for r in results]).reshape(-1, 4)
    return box_convert(boxes, "xywh", "cxcywh") / sizes


def draw_tokens(path, dataset, results, side=120):
    """One panel a [DET] token: centres of its boxes, and below how often it named each class.

    Small boxes are blue, medium ones green, large ones red. The first panel: the ground truth.
    """
    panels = {"truth": [a for a in dataset.truth.dataset["annotations"] if not a["iscrowd"]]}
    for result in sorted(results, key=lambda r: r["token"]):
        panels.setdefault(f"token {result['token']}", []).append(result)
    pictures = []
    for name, found in panels.items():
        panel = PIL.Image.new("RGB", (side, side + 60), "white")
        pen = PIL.ImageDraw.Draw(panel)
        pen.rectangle([0, 0, side - 1, side - 1], outline="black")
        for result, (x, y, _, _) in zip(found, relative_boxes(dataset, found) * side, strict=True):
            area = math.prod(result["bbox"][2:])
            color = ("blue", "green", "red")[(area >= 32**2) + (area >= 96**2)]
            pen.ellipse([x - 1, y - 1, x + 1, y + 1], color)
        labels = [dataset.label_of[result["category_id"]] for result in found]
        counts = np.bincount(labels, minlength=len(dataset.classes))
        width, bottom = side / len(counts), side + 44
        for label in counts.nonzero()[0].tolist():
            left, top = width * label, bottom - 40 * counts[label] / counts.max()
            right, color = max(left, left + width - 2), COLORS[label % len(COLORS)]
            pen.rectangle([left, top, right, bottom], color)
        pen.text((2, side + 46), f"{name}: {len(found)}", "black")
        pictures.append(v2.functional.pil_to_tensor(panel))
    columns = math.ceil(math.sqrt(1.6 * len(pictures)))
    save_pictures(path, [pictures[i : i + columns] for i in range(0, len(pictures), columns)])


# --- 6. Shapes ------------------------------------------------------------------------------------

SHAPES = {  # name -> inside? u, v: coordinates turned with the shape, in radii
    "circle": lambda u, v: u**2 + v**2 < 0.8,
    "square": lambda u, v: np.maximum(abs(u), abs(v)) < 0.75,
    "triangle": lambda u, v: np.maximum(v, abs(u) * 0.866 - v / 2) < 0.5,
    "flower": lambda u, v: np.hypot(u, v) < 0.55 + 0.42 * np.cos(5 * np.arctan2(v, u)),
    "cross": lambda u, v: (np.minimum(abs(u), abs(v)) < 0.28) & (np.maximum(abs(u), abs(v)) < 0.95),
    "ring": lambda u, v: abs(np.hypot(u, v) - 0.76) < 0.22,
}
SHAPES_SIZES = [(128, 128), (128, 160), (160, 128), (96, 160), (160, 96)]  # (H, W)


def make_shapes(root, num_train=4000, num_val=500, seed=0):
    """Write the generated data set into folder root unless it is there; seed decides every file.

    1-8 shapes of 12 to 77 pixels' radius, slightly turned, bright, at least 60 % of each visible,
    on dim textured backgrounds. The folder appears only when complete.
    """
    root = Path(root)
    if root.exists():
        return root
    root.parent.mkdir(parents=True, exist_ok=True)
    print(f"writing {num_train + num_val} generated images to {root}, once", flush=True)
    with tempfile.TemporaryDirectory(prefix=f"{root.name}-", dir=root.parent) as folder:
        unfinished = Path(folder, root.name)
        (unfinished / "annotations").mkdir(parents=True)
        for split, count in (("train", num_train), ("val", num_val)):
            write_shapes(unfinished, split, count, seed)
        if not root.exists():  # another run may have been faster
            os.replace(unfinished, root)
    return root


def write_shapes(root, split, count, seed):
    folder = root / f"{split}2017"
    folder.mkdir()
    images, annotations = [], []
    for i in range(1, count + 1):
        pixels, objects = draw_shapes(np.random.default_rng([seed, split == "val", i]))
        name = f"{i:012}.jpg"
        PIL.Image.fromarray(pixels).save(folder / name, quality=95)
        images.append(dict(id=i, file_name=name, height=pixels.shape[0], width=pixels.shape[1]))
        for label, mask in objects:
            (rle,) = encode(mask[:, :, None])
            about = dict(id=len(annotations) + 1, image_id=i, category_id=label + 1, iscrowd=0)
            about |= dict(bbox=mask_api.toBbox(rle).tolist(), area=int(mask.sum()))
            annotations.append(about | dict(segmentation=rle))
    categories = [dict(id=label + 1, name=name) for label, name in enumerate(SHAPES)]
    data = dict(info={}, images=images, annotations=annotations, categories=categories)
    (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(data))


def draw_shapes(random):
    """One picture (H, W, 3) uint8 and its objects: list of (label, visible mask (H, W) bool)."""
    H, W = SHAPES_SIZES[random.integers(len(SHAPES_SIZES))]
    pixels = background(random, H, W)
    objects, areas = [], []  # areas: of the whole shapes
    wanted = min(8, random.geometric(0.5))
    for _ in range(4 * wanted):
        if len(objects) == wanted:
            break
        label = int(random.integers(len(SHAPES)))
        radius = min(12 + 66 * random.uniform(), 0.6 * min(H, W))
        cy, cx = random.uniform(0.8 * radius, [H - 0.8 * radius, W - 0.8 * radius])
        y, x = np.indices((H, W))
        y, x = (y - cy) / radius, (x - cx) / radius
        angle = random.uniform(-0.4, 0.4)
        u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
        inside = list(SHAPES.values())[label](u, v)
        left = [(mask & ~inside).sum() for _, mask in objects]
        if any(n < 0.6 * area for n, area in zip(left, areas, strict=True)):
            continue  # would hide too much of an earlier object
        for _, mask in objects:
            mask &= ~inside
        objects.append((label, inside))
        areas.append(inside.sum())
        behind = pixels[inside].mean(axis=0)
        color = random.uniform(90, 255, 3)
        while abs(color - behind).max() < 70:  # can be told from what is behind it
            color = random.uniform(90, 255, 3)
        pixels[inside] = color * (1 + random.choice([-0.15, 0.15]) * u[inside])[:, None]
    pixels += 6 * random.standard_normal(pixels.shape, dtype=np.float32)
    return pixels.clip(0, 255).astype(np.uint8), objects


def background(random, H, W):
    """Colour gradient, stripes or waves (H, W, 3), float32 in about 0..255."""
    y, x = np.indices((H, W), dtype=np.float32) / max(H, W)
    angle, frequency = random.uniform(0, 2 * np.pi), random.uniform(3, 15)
    along = x * np.cos(angle) + y * np.sin(angle)
    kind = random.integers(3)
    if kind == 1:
        along = np.sin(2 * np.pi * frequency * along) / 2
    elif kind == 2:
        along = np.sin(frequency * x + 3 * np.sin(frequency * y)) / 2
    first, second = random.uniform(20, 90, 3), random.uniform(-50, 50, 3)
    return (first + along[:, :, None] * second).astype(np.float32)
