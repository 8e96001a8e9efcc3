"""PVT: a Pyramid Vision Transformer for dense tasks (Wang et al., ICCV 2021, arXiv:2102.12122).

A ViT keeps one coarse map from first block to last. PVT begins with 4x4 patches and halves the map
three times, like a CNN, so that any dense head can stand on it. What makes so many tokens
affordable: keys and values come from a map that a strided convolution has shrunk (SRA).
Flow: image (B, 3, H, W) -> four stages (B, C, H/4, W/4) ... (B, C, H/32, W/32) -> one head:
      classes, RetinaNet's boxes on five levels, DETR's set of boxes, or a map of classes
Positions: a learned table a stage; v2 has none; DETR and Trans2Seg add sine waves.
Loss: RetinaNet by the anchors with an object, DETR as in yolos.py, the others a mean.
Padding: the four stages (as released), RetinaNet and Semantic FPN see it; in the attention of DETR
      and Trans2Seg it is masked. In prediction only images of equal padded size share a batch.
Compare: mimdet.py builds a pyramid around a plain ViT; yolos.py needs none; the DETR head's
matching and losses are yolos.py's.
"""

import math
import re
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import (
    Conv2dNormActivation,
    FeaturePyramidNetwork,
    StochasticDepth,
    batched_nms,
    box_area,
    box_convert,
    box_iou,
    clip_boxes_to_image,
    generalized_box_iou,
    sigmoid_focal_loss,
)

# --- 1. Config ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    embed_dims: tuple = (64, 128, 320, 512)  # width C of each stage (Table 1)
    depths: tuple = (2, 2, 2, 2)  # blocks of each stage
    num_heads: tuple = (1, 2, 5, 8)
    mlp_ratios: tuple = (8, 8, 4, 4)
    sr_ratios: tuple = (8, 4, 2, 1)  # R: keys and values are R x R times fewer (Eq. 2-4); 1: all
    drop_path: float = 0.1  # of the last block, growing linearly from 0
    pos_size: int = 224  # side of the image that the stored position tables belong to
    design: str = "v1"  # "v2": arXiv:2106.13797; "v2_li": its linear attention
    checkpoint: bool = False  # recompute blocks in the backward pass, to save memory
    head: str = "retinanet"  # or "classifier", "detr", "semantic", "trans2seg"
    head_dim: int = 256  # width of the head
    head_depth: int = 0  # its layers; 0: the published number
    anchor_scale: float = 4.0  # RetinaNet: sides of the anchors in strides (1, 1.26, 1.59 times)
    queries: int = 100  # DETR: at most so many objects are found in an image
    # The departures of nano, which learns from scratch in minutes; off in the paper's variants.
    group_norm: bool = False  # RetinaNet: GroupNorm in pyramid and towers
    reference_points: bool = False  # DETR: queries stand on a grid: positions, boxes and matching
    patch_loss: float = 0.0  # DETR: weight of the same losses on what the encoder makes of patches

    @property
    def task(self):
        tasks = {"classifier": "classify", "semantic": "segment", "trans2seg": "segment"}
        return tasks.get(self.head, "detect")


# fmt: off
CONFIGS = {  # with the parameters as RetinaNet for 80 classes, and as classifier for 1000
    # Differs: group_norm, and for head=detr reference_points and patch_loss, because training from
    # scratch takes the published heads far longer than minutes.
    "nano": Config(embed_dims=(32, 64, 96, 128), depths=(1, 1, 2, 1), num_heads=(1, 2, 3, 4),
                   mlp_ratios=(4, 4, 4, 4), drop_path=0.0, pos_size=128, head_dim=64, head_depth=2,
                   queries=25, group_norm=True, reference_points=True, patch_loss=1.0),
    # As classifiers medium and large have drop_path 0.3, as segmenters 0.1: give it by --set.
    "tiny": Config(),  # 22,964,724; 13,229,288
    "small": Config(depths=(3, 4, 6, 3)),  # 34,221,300; 24,485,864
    "medium": Config(depths=(3, 4, 18, 3), drop_path=0.0),  # 53,943,540; 44,208,104
    "large": Config(depths=(3, 8, 27, 3), drop_path=0.0),  # 71,104,756; 61,369,320
    # PVT v2 (arXiv:2106.13797, Table 1). As classifiers b3, b4 and b5 have drop_path 0.3.
    "v2_b0": Config(embed_dims=(32, 64, 160, 256), design="v2"),  # classifier: 3,666,760
    "v2_b1": Config(design="v2"),  # 14,009,000
    "v2_b2": Config(depths=(3, 4, 6, 3), design="v2"),  # 25,362,856
    "v2_b2_li": Config(depths=(3, 4, 6, 3), design="v2_li"),  # 22,553,512
    "v2_b3": Config(depths=(3, 4, 18, 3), design="v2"),  # 45,238,696
    "v2_b4": Config(depths=(3, 8, 27, 3), design="v2"),  # 62,556,072
    "v2_b5": Config(depths=(3, 6, 40, 3), mlp_ratios=(4, 4, 4, 4), design="v2"),  # 81,956,008
}
PAPER = dict(
    lr=1e-4, batch_size=16, backbone_lr=1.0, weight_decay=1e-4, clip=0.0, epochs=12, warmup=500,
    schedule=(8 / 12, 11 / 12), sizes=(800,), max_size=1333, multiple=1, crop=(),
)
SEGMENTER = PAPER | dict(  # Differs: no colour jitter; a crop may be of one class alone
    lr=2e-4, batch_size=32, epochs=63, warmup=0, schedule="poly",  # 40,000 steps on ADE20K
    sizes=(*range(256, 1025, 32), 512), max_size=4096, crop=(512,),
)
CLASSIFIER = PAPER | dict(
    # Differs: no mixup, cutmix, RandAugment, random erasing and repeated augmentation; falls to 0.
    lr=1e-3, batch_size=1024, weight_decay=0.05, epochs=300, schedule="cosine",
    warmup=6255,  # Differs: steps of 1024 ImageNet images; the warm-up starts at 0
    sizes=(224,), crop=(0.08, 1.0),
)
CLIPPED = CLASSIFIER | dict(clip=1.0)
NANO = dict(
    lr=1e-3, batch_size=8, backbone_lr=1.0, weight_decay=0.05, clip=1.0, epochs=3, warmup=100,
    schedule="cosine", sizes=(), max_size=320, multiple=1, crop=(),
)
RECIPES = {  # by variant-task, variant, task or head; the others train by "paper"
    # nano: images keep their own size (sizes=()) up to a long side of 320.
    "nano": NANO,
    "nano-classifier": NANO | dict(batch_size=32, sizes=(64,), crop=(0.5, 1.0)),
    "nano-detr": NANO | dict(epochs=12),
    "paper": PAPER,
    "detr": PAPER | dict(backbone_lr=0.1, clip=0.1, epochs=50, warmup=0, schedule=(33 / 50,),
                         sizes=tuple(range(640, 801, 32))),
    "semantic": SEGMENTER,
    "trans2seg": SEGMENTER,
    "classifier": CLASSIFIER,
    **{f"{v}-classifier": CLIPPED for v in ("medium", "large", "v2_b3", "v2_b4", "v2_b5")},
    **{f"{v}-retinanet": PAPER | dict(lr=1e-4 / 1.4, batch_size=8) for v in ("v2_b4", "v2_b5")},
}
# fmt: on

# --- 2. Shared blocks -----------------------------------------------------------------------------


class Mlp(nn.Module):
    """Two linear layers with a GELU between (ViT, arXiv:2010.11929, Sec. 3.1)."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Attention(nn.Module):
    """Multi-head self-attention: softmax(q k^T / sqrt(d)) v (arXiv:1706.03762, Eq. 1).

    x: (B, N, C); mask: bool, broadcastable to (B, h, N, N), False where a key must not be seen.
    """

    def __init__(self, dim, num_heads):
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"width {dim} cannot be shared by {num_heads} heads")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, mask=None):
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, h, N, d)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, h, N, d)
        return self.proj(x.transpose(1, 2).reshape(B, N, C))  # (B, N, C)


class Block(nn.Module):
    """Pre-norm transformer block (arXiv:2010.11929, Eq. 2 and 3)."""

    def __init__(self, dim, num_heads, mlp_ratio=4.0, drop_path=0.0, eps=1e-6):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = StochasticDepth(drop_path, "row")  # arXiv:1603.09382

    def forward(self, x, mask=None):
        x = x + self.drop_path(self.attn(self.norm1(x), mask))
        return x + self.drop_path(self.mlp(self.norm2(x)))


def run_blocks(blocks, x, recompute=False):
    """Apply the blocks in turn; recompute trades time for memory (activation checkpointing)."""
    for block in blocks:
        x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
    return x


def pad_batch(images, multiple):
    """Normalise images (3, h, w) in [0, 1] and zero-pad them at the bottom and right to one size.

    Returns the batch (B, 3, H, W), its sides multiples of `multiple`, and the true sizes (h, w).
    Anything but such images is a ValueError: it would be broadcast, or normalised to nonsense.
    """
    if not len(images) or not all(x.is_floating_point() and x.shape[:-2] == (3,) for x in images):
        raise ValueError("images: give a list of tensors (3, h, w), floats in [0, 1]")
    sizes = [tuple(image.shape[-2:]) for image in images]
    H, W = (math.ceil(max(sides) / multiple) * multiple for sides in zip(*sizes, strict=True))
    mean = images[0].new_tensor([0.485, 0.456, 0.406])[:, None, None]
    std = images[0].new_tensor([0.229, 0.224, 0.225])[:, None, None]
    batch = images[0].new_zeros(len(images), 3, H, W)
    for padded, image, (h, w) in zip(batch, images, sizes, strict=True):
        padded[:, :h, :w] = (image - mean) / std
    return batch, sizes


def group_by_padded_size(images, multiple):
    """Lists of indices of the images that are equally large once each is padded by itself."""
    groups = {}
    for index, image in enumerate(images):
        size = tuple(math.ceil(side / multiple) for side in image.shape[-2:])
        groups.setdefault(size, []).append(index)
    return groups.values()


# --- 3. This paper --------------------------------------------------------------------------------


def to_map(x, grid):
    """Tokens (B, N, C) of a grid (H, W), row by row -> map (B, C, H, W)."""
    x = x.transpose(1, 2).unflatten(2, grid)  # (B, C, H, W)
    # Copied for torch.compile, which cannot order the strides of a view of unknown sizes.
    return x.contiguous() if torch.compiler.is_compiling() else x


class StageEmbed(nn.Module):
    """Patches of a stage: a convolution without overlap, and a LayerNorm (Sec. 3.2)."""

    def __init__(self, dim_in, dim, patch):
        super().__init__()
        self.proj = nn.Conv2d(dim_in, dim, patch, stride=patch)
        self.norm = nn.LayerNorm(dim)  # eps 1e-5, here and in the attention; else 1e-6

    def forward(self, x):
        x = self.proj(x)  # (B, C, H, W)
        return self.norm(x.flatten(2).transpose(1, 2)), x.shape[2:]


class OverlapStageEmbed(StageEmbed):
    """The same with windows that overlap by about half (PVT v2: overlapping patch embedding)."""

    def __init__(self, dim_in, dim, patch):
        super().__init__(dim_in, dim, patch)
        size = 2 * patch - 1
        self.proj = nn.Conv2d(dim_in, dim, size, stride=patch, padding=size // 2)


class SpatialReductionAttention(nn.Module):
    """Attention to a map shrunk by R in height and width: R * R times cheaper (Eq. 2-4).

    x: (B, N, C), the tokens of a grid (H, W), row by row. With R = 1 there may be a class token.
    """

    def __init__(self, dim, num_heads, sr_ratio):
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"width {dim} cannot be shared by {num_heads} heads")
        self.num_heads, self.sr_ratio = num_heads, sr_ratio
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        if sr_ratio > 1:
            self.sr = nn.Conv2d(dim, dim, sr_ratio, stride=sr_ratio)
            self.norm = nn.LayerNorm(dim)

    def forward(self, x, grid):
        heads = (self.num_heads, x.shape[2] // self.num_heads)
        q = self.q(x).unflatten(2, heads).transpose(1, 2)  # (B, h, N, d)
        kv = self.kv(self.reduce(x, grid)).unflatten(2, (2, *heads))  # (B, n, 2, h, d)
        k, v = kv.permute(2, 0, 3, 1, 4)  # (B, h, n, d)
        x = F.scaled_dot_product_attention(q, k, v)  # (B, h, N, d)
        return self.proj(x.transpose(1, 2).flatten(2))  # (B, N, C)

    def reduce(self, x, grid):
        if self.sr_ratio == 1:
            return x
        x = self.sr(to_map(x, grid))  # (B, C, H/R, W/R), a remainder cut off
        return self.norm(x.flatten(2).transpose(1, 2))  # (B, n, C)


class LinearSpatialReductionAttention(SpatialReductionAttention):
    """Attention to 7 x 7 averages of the map, however large it is (PVT v2: linear SRA)."""

    def __init__(self, dim, num_heads):
        super().__init__(dim, num_heads, 1)
        self.sr = nn.Conv2d(dim, dim, 1)
        self.norm = nn.LayerNorm(dim)

    def reduce(self, x, grid):
        x = F.adaptive_avg_pool2d(to_map(x, grid), 7)  # (B, C, 7, 7)
        return F.gelu(self.norm(self.sr(x).flatten(2).transpose(1, 2)))  # (B, 49, C)


class DepthwiseMlp(Mlp):
    """Mlp with a depth-wise 3x3 convolution, which also tells positions (PVT v2)."""

    def __init__(self, dim, hidden, relu):
        super().__init__(dim, hidden)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.relu = nn.ReLU() if relu else nn.Identity()

    def forward(self, x, grid):
        x = to_map(self.relu(self.fc1(x)), grid)  # (B, hidden, H, W)
        return self.fc2(F.gelu(self.dwconv(x).flatten(2).transpose(1, 2)))  # (B, N, C)


class PyramidBlock(nn.Module):
    """Pre-norm transformer block of a stage (Fig. 3)."""

    def __init__(self, dim, num_heads, mlp_ratio, sr_ratio, drop_path, design):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        if design == "v2_li":
            self.attn = LinearSpatialReductionAttention(dim, num_heads)
        else:
            self.attn = SpatialReductionAttention(dim, num_heads, sr_ratio)
        hidden = int(dim * mlp_ratio)
        plain = design == "v1"
        self.mlp = Mlp(dim, hidden) if plain else DepthwiseMlp(dim, hidden, design == "v2_li")
        self.drop_path = StochasticDepth(drop_path, "row")

    def compile(self, dynamic=None):
        """Before torch 2.14 for each size anew: there maps of unknown sizes have wrong strides."""
        super().compile(dynamic=dynamic if torch.__version__ >= "2.14" else False)

    def forward(self, x, grid):
        x = x + self.drop_path(self.attn(self.norm1(x), grid))
        y = self.norm2(x)
        y = self.mlp(y, grid) if isinstance(self.mlp, DepthwiseMlp) else self.mlp(y)
        return x + self.drop_path(y)


class PyramidVisionTransformer(nn.Module):
    """Four stages: embed patches, add positions, transform, fold back into a map (Sec. 3.1).

    v2 adds none: its padded convolutions tell positions.
    """

    def __init__(self, c):
        super().__init__()
        self.config = c
        stages = check_stages(c)
        v1, self.has_token = c.design == "v1", c.design == "v1" and c.head == "classifier"
        # Smaller images are padded to this: else the last stage has no cell, or a stage no key.
        self.min_side = max(32, *(4 * 2**s * r for s, r in enumerate(c.sr_ratios)))
        total, index = max(1, sum(c.depths) - 1), 0
        dims = (3, *c.embed_dims)
        for s, (dim, depth, heads, ratio, sr) in enumerate(zip(*stages, strict=True)):
            embed = StageEmbed if v1 else OverlapStageEmbed
            self.add_module(f"patch_embed{s + 1}", embed(dims[s], dim, 4 if s == 0 else 2))
            if v1:
                rows = (c.pos_size // (4 * 2**s)) ** 2 + (s == 3)
                table = nn.Parameter(trunc_normal(1, rows, dim))
                self.register_parameter(f"pos_embed{s + 1}", table)
            rates = [c.drop_path * (index + j) / total for j in range(depth)]
            index += depth
            blocks = (PyramidBlock(dim, heads, ratio, sr, rate, c.design) for rate in rates)
            self.add_module(f"block{s + 1}", nn.ModuleList(blocks))
            if not v1:
                self.add_module(f"norm{s + 1}", nn.LayerNorm(dim, eps=1e-6))
        if self.has_token:
            self.cls_token = nn.Parameter(trunc_normal(1, 1, c.embed_dims[3]))
            self.norm = nn.LayerNorm(c.embed_dims[3], eps=1e-6)
        self.init_weights()

    def init_weights(self):
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Conv2d) and self.config.design != "v1":  # v1: PyTorch's own
                fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
                nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
                nn.init.zeros_(module.bias)

    def forward(self, x):
        """Padded images (B, 3, H, W) -> maps (B, C, H/4, W/4) ... (B, C, H/32, W/32).

        With a class token a fifth entry holds its vector (B, C).
        """
        c, maps = self.config, []
        if min(x.shape[2:]) < self.min_side:
            right, bottom = (max(0, self.min_side - side) for side in (x.shape[3], x.shape[2]))
            x = F.pad(x, (0, right, 0, bottom))
        for s in range(1, 5):
            x, grid = getattr(self, f"patch_embed{s}")(x)  # (B, N, C)
            if c.design == "v1":
                position, first = resize_positions(getattr(self, f"pos_embed{s}"), grid)
                if s == 4 and self.has_token:
                    x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
                    position = torch.cat([first, position], dim=1)
                x = x + position  # (B, [1 +] N, C)
            blocks = [partial(block, grid=grid) for block in getattr(self, f"block{s}")]
            x = run_blocks(blocks, x, c.checkpoint)  # (B, [1 +] N, C)
            if c.design != "v1":  # v1's maps are not normalised
                x = getattr(self, f"norm{s}")(x)  # (B, N, C)
            if s == 4 and self.has_token:
                token, x = x[:, 0], x[:, 1:]
            x = to_map(x, grid)  # (B, C, H, W)
            maps.append(x)
        return [*maps, self.norm(token)] if self.has_token else maps


def check_stages(c):
    """The numbers of the four stages, as columns; raises ValueError if they cannot be built."""
    stages = (c.embed_dims, c.depths, c.num_heads, c.mlp_ratios, c.sr_ratios)
    if c.design not in ("v1", "v2", "v2_li") or {len(values) for values in stages} != {4}:
        raise ValueError("give four values, one a stage, and a design of v1, v2 or v2_li")
    if not all(isinstance(n, int) and n > 0 for n in (*c.embed_dims, *c.sr_ratios)):
        raise ValueError("embed_dims and sr_ratios are whole numbers from 1 on")
    if c.pos_size < 32 or c.head_dim < 2 or min(c.head_depth, c.queries - 1) < 0:
        raise ValueError("pos_size is at least 32, head_dim 2, head_depth 0, queries 1")
    if c.anchor_scale <= 0:
        raise ValueError("anchor_scale is above 0")
    if c.design == "v1" and c.head == "classifier" and c.sr_ratios[3] != 1:
        raise ValueError("the class token needs sr_ratios that end in 1")
    return stages


def resize_positions(table, grid):
    """Position table (1, [1 +] h * h, C) -> rows for a grid (H, W): (1, H * W, C), and the first.

    Bilinear, as released, where the plain ViTs' `resize_grid` is bicubic.
    Differs: the released code leaves a table alone wherever the image has as many patches as the
    first stage's table, whatever their arrangement; with another table that crashes (448 x 448).
    """
    side = math.isqrt(table.shape[1])
    first, table = table[:, : -side * side], table[:, -side * side :]
    if tuple(grid) != (side, side):
        table = table.transpose(1, 2).unflatten(2, (side, side))
        table = F.interpolate(table, size=tuple(grid), mode="bilinear", align_corners=False)
        table = table.flatten(2).transpose(1, 2)  # (1, H * W, C)
    return table, first


def trunc_normal(*shape):
    return nn.init.trunc_normal_(torch.empty(shape), std=0.02)


# --- 4. Boxes -------------------------------------------------------------------------------------


def retina_anchors(maps, scale):
    """Anchors (H_l * W_l * 9, 4) xyxy of each map: strides 8 to 128, three sides, three ratios.

    Centred on multiples of the stride and not rounded (torchvision rounds); ratio outside, side
    inside.
    """
    anchors = []
    for level, x in enumerate(maps):
        stride, (H, W) = 8 * 2**level, x.shape[-2:]
        ratio = torch.tensor([0.5, 1.0, 2.0], device=x.device).sqrt()[:, None]
        side = stride * scale * 2 ** (torch.arange(3, device=x.device) / 3)  # (3,)
        half = torch.stack([side * (1 / ratio), side * ratio], dim=-1).reshape(-1, 2) / 2  # (9, 2)
        ys, xs = (torch.arange(length, device=x.device) * stride for length in (H, W))
        centers = torch.cartesian_prod(ys, xs).flip(1)[:, None]  # (H * W, 1, 2)
        anchors.append(torch.cat([centers - half, centers + half], dim=-1).reshape(-1, 4))
    return anchors


def encode_boxes(boxes_xyxy, anchors_xyxy, weights=(1.0, 1.0)):
    """Boxes as offsets (dx, dy, dw, dh) from anchors (R-CNN, arXiv:1311.2524, App. C).

    weights: by which (dx, dy) and (dw, dh) are multiplied.
    """
    box, anchor = (box_convert(b, "xyxy", "cxcywh") for b in (boxes_xyxy, anchors_xyxy))
    shift = (box[:, :2] - anchor[:, :2]) / anchor[:, 2:]
    growth = (box[:, 2:] / anchor[:, 2:]).log()
    return torch.cat([shift * weights[0], growth * weights[1]], dim=1)


def decode_boxes(deltas, anchors_xyxy, weights=(1.0, 1.0)):
    """Inverse of encode_boxes, deltas (..., 4); a box is at most 1000/16 times its anchor."""
    anchor, deltas = box_convert(anchors_xyxy, "xyxy", "cxcywh"), deltas.float()
    center = anchor[..., :2] + deltas[..., :2] / weights[0] * anchor[..., 2:]
    growth = (deltas[..., 2:] / weights[1]).clamp(max=math.log(1000 / 16))
    half = anchor[..., 2:] * growth.exp() / 2
    return torch.cat([center - half, center + half], dim=-1)


def assign_anchors(anchors_xyxy, boxes_xyxy, low=0.4, high=0.5):
    """Object (N,) of each anchor: an index into boxes (M, 4), -1 for background, -2 for neither.

    The best box if their IoU is at least `high`; background below `low`. Each box also takes the
    anchors that overlap it most; where two boxes want one, the later gets it (MMDetection).
    """
    if len(boxes_xyxy) == 0:
        return torch.full((len(anchors_xyxy),), -1, device=anchors_xyxy.device)
    iou = box_iou(boxes_xyxy, anchors_xyxy)  # (M, N)
    best, item = iou.max(dim=0)
    item = torch.where(best >= high, item, torch.where(best < low, -1, -2))
    number = torch.arange(len(iou), device=iou.device)[:, None]
    wanted = torch.where(iou == iou.amax(dim=1, keepdim=True), number, -1).amax(dim=0)  # (N,)
    return torch.where(wanted >= 0, wanted, item)


def grid_points(rows, columns):
    """Centres (rows * columns, 2) of the cells of a grid over an image, x and y as shares of it."""
    y = (torch.arange(rows) + 0.5) / rows
    x = (torch.arange(columns) + 0.5) / columns
    return torch.cartesian_prod(y, x).flip(1)  # row by row


def spread_points(count):
    """The first `count` points of the squarest grid that has so many: (count, 2), x and y."""
    columns = math.ceil(count**0.5)
    return grid_points(math.ceil(count / columns), columns)[:count]


def normalise_boxes(boxes_xyxy, size):
    """Boxes (M, 4) xyxy in pixels of an image (h, w) -> cxcywh as shares of it."""
    h, w = size
    return box_convert(boxes_xyxy / boxes_xyxy.new_tensor([w, h, w, h]), "xyxy", "cxcywh")


def paired_giou(a_xyxy, b_xyxy):
    """Generalised IoU (N,) of boxes (N, 4) pair by pair (arXiv:1902.09630, Alg. 1).

    As released, nothing is added to the divisors: torchvision's loss is 1e-3 off on boxes of 8 px.
    """
    low, high = torch.minimum(a_xyxy, b_xyxy), torch.maximum(a_xyxy, b_xyxy)
    sides = (low[:, 2:] - high[:, :2]).clamp(min=0)
    inner = sides[:, 0] * sides[:, 1]
    hull = box_area(torch.cat([low[:, :2], high[:, 2:]], dim=1))
    union = box_area(a_xyxy) + box_area(b_xyxy) - inner
    return inner / union - (hull - union) / hull


def smallest_cover(points_norm, boxes_norm):
    """Index (N,) of the smallest box (M, 4) cxcywh over each point (N, 2), -1 where none is."""
    inside = (points_norm[:, None] - boxes_norm[:, :2]).abs() < boxes_norm[:, 2:] / 2  # (N, M, 2)
    area = torch.where(inside.all(dim=2), boxes_norm[:, 2:].prod(dim=1), torch.inf)  # (N, M)
    area, index = F.pad(area, (0, 1), value=2.0).min(dim=1)  # (N,); no box is larger than 1
    return index.masked_fill(area == 2, -1)


def cover_pairs(grids, sizes, patch, targets, device):
    """Which patch should find what: the smallest object over its centre.

    grids: (h, w) patches of each image; sizes: its (h, w) pixels, which they may not cover whole,
    or reach beyond. Returns the patches' points (N, 2), those of all images in one row, and (patch
    ids, object ids) of those under an object; both count through the batch.
    """
    points, items, count = [], [], 0
    for (h, w), (height, width), target in zip(grids, sizes, targets, strict=True):
        reach = torch.tensor([w * patch / width, h * patch / height])  # of the grid, in images
        points.append((grid_points(h, w) * reach).clamp(max=0.999).to(device))
        item = smallest_cover(points[-1], target["boxes_norm"])
        items.append(torch.where(item < 0, item, item + count))
        count += len(target["labels"])
    item = torch.cat(items)  # (N,)
    patch = (item >= 0).nonzero()[:, 0]
    return torch.cat(points), (patch, item[patch])


@torch.no_grad()
def hungarian_match(logits, boxes_norm, targets, points=None):
    """The cheapest one-to-one matching of an image's queries and objects (arXiv:2005.12872, Eq. 1).

    logits: (B, Q, K + 1); boxes_norm: (B, Q, 4) cxcywh as shares of the image; targets: list of
    dict(labels (M,), boxes_norm (M, 4)). Returns a list of (query ids, object ids), two int64
    tensors of min(Q, M) entries. The cost: 5 L1 - probability of the object's class - 2 GIoU.
    points: (Q, 2), where queries stand; then 20 times the distance of the object's centre is added,
    so that an object keeps its query early in training, when predictions say little yet.
    """
    labels, wanted = (torch.cat([t[key] for t in targets]) for key in ("labels", "boxes_norm"))
    scores, found = logits.flatten(0, 1).float().softmax(dim=1), boxes_norm.flatten(0, 1)
    l1 = torch.cdist(found, wanted, p=1)  # (B * Q, all M)
    giou = generalized_box_iou(*(box_convert(b, "cxcywh", "xyxy") for b in (found, wanted)))
    cost = (5 * l1 - scores[:, labels] - 2 * giou).nan_to_num()
    cost = cost.unflatten(0, logits.shape[:2])  # (B, Q, all M)
    if points is not None:
        cost = cost + 20 * (points[:, None] - wanted[:, :2]).norm(dim=2)
    parts = cost.cpu().split([len(t["labels"]) for t in targets], dim=2)  # one transfer for all
    pairs = [linear_sum_assignment(part[i]) for i, part in enumerate(parts)]
    return [tuple(torch.from_numpy(side).to(logits.device) for side in pair) for pair in pairs]


# --- 5. Heads and losses --------------------------------------------------------------------------
# head(maps, sizes) -> outputs; head.loss(outputs, targets, sizes) -> dict of losses;
# head.answers(outputs, sizes, out_sizes) -> list of dicts, one an image, in pixels of out_sizes.
# sizes: the true (h, w) of each image of the padded batch.


def over_processes(counts):
    """Mean of counts over all processes, which average their gradients.

    So sums divided by it make the step of one process with all the images.
    Differs: released code divides some losses by what one process alone has counted.
    """
    if dist.is_initialized():
        dist.all_reduce(counts)
        counts /= dist.get_world_size()
    return counts


class Classifier(nn.Module):
    """Linear layer on the class token, or on the mean of v2's last map.

    Differs: pictures are resized to a square; released: the centre of a slightly larger one.
    """

    def __init__(self, c, num_classes):
        super().__init__()
        self.fc = nn.Linear(c.embed_dims[3], num_classes)
        nn.init.trunc_normal_(self.fc.weight, std=0.02)
        nn.init.zeros_(self.fc.bias)

    def forward(self, maps, sizes):
        return self.fc(maps[4] if len(maps) == 5 else maps[3].mean(dim=(2, 3)))  # (B, K)

    def loss(self, logits, targets, sizes):
        labels = torch.cat([t["labels"] for t in targets])  # (B,)
        return {"loss_cls": F.cross_entropy(logits.float(), labels, label_smoothing=0.1)}

    def answers(self, logits, sizes, out_sizes):
        return [dict(logits=row) for row in logits.float()]


class RetinaNet(nn.Module):
    """FPN on stages 2 to 4 and two towers of convolutions for all its levels (arXiv:1708.02002)."""

    def __init__(self, c, num_classes):
        super().__init__()
        dim, self.scale, self.num_classes = c.head_dim, c.anchor_scale, num_classes
        if c.group_norm and (dim < 16 or dim % 8):
            raise ValueError("group_norm needs a head_dim of 16, 24, 32 ...")
        norm = partial(nn.GroupNorm, 8) if c.group_norm else None
        self.fpn = FeaturePyramidNetwork(c.embed_dims[1:], dim, norm_layer=norm)
        self.p6 = nn.Conv2d(c.embed_dims[3], dim, 3, stride=2, padding=1)
        self.p7 = nn.Conv2d(dim, dim, 3, stride=2, padding=1)
        layers = range(c.head_depth or 4)
        self.cls_convs, self.reg_convs = (
            nn.Sequential(*(Conv2dNormActivation(dim, dim, 3, norm_layer=norm) for _ in layers))
            for _ in range(2)
        )
        self.retina_cls = nn.Conv2d(dim, 9 * num_classes, 3, padding=1)
        self.retina_reg = nn.Conv2d(dim, 9 * 4, 3, padding=1)
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv2d):
                if name.startswith(("fpn", "p6", "p7")):
                    nn.init.xavier_uniform_(module.weight)
                else:
                    nn.init.normal_(module.weight, std=0.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.constant_(self.retina_cls.bias, -math.log(99))  # sigmoid 0.01

    def forward(self, maps, sizes):
        """Per level logits (B, N_l, K), deltas (B, N_l, 4) and anchors (N_l, 4)."""
        levels = self.pyramid(maps)
        logits = [self.retina_cls(self.cls_convs(x)) for x in levels]
        deltas = [self.retina_reg(self.reg_convs(x)) for x in levels]
        flat = [
            [x.permute(0, 2, 3, 1).reshape(len(x), -1, n).float() for x in outputs]
            for outputs, n in ((logits, self.num_classes), (deltas, 4))
        ]
        return *flat, retina_anchors(levels, self.scale)

    def pyramid(self, maps):
        """Maps p3..p7 (B, dim, H/8, W/8) ... (B, dim, H/128, W/128); p6 comes from stage 4."""
        levels = list(self.fpn({str(s): x for s, x in enumerate(maps[1:4])}).values())
        # In bfloat16 a CPU leaves their gradient unwritten where the map is one pixel wide.
        with torch.autocast("cpu", enabled=False):
            p6 = self.p6(maps[3].float())
            return [*levels, p6, self.p7(p6)]

    def loss(self, outputs, targets, sizes):
        """Focal loss of anchors, not of those in between (-2), and L1 of those with an object.

        Both are divided by the number of the latter, at least 1 an image.
        Differs: mmdetection has no anchors where a smaller image is padded past multiples of 32.
        """
        logits, deltas = (torch.cat(levels, dim=1) for levels in outputs[:2])
        anchors = torch.cat(outputs[2])
        loss_cls = loss_box = count = 0
        for logit, delta, target in zip(logits, deltas, targets, strict=True):
            item = assign_anchors(anchors, target["boxes"])  # (N,)
            positive = (item >= 0).nonzero()[:, 0]
            item, judged = item[positive], (item > -2).nonzero()[:, 0]
            wanted = torch.zeros_like(logit)  # (N, K)
            wanted[positive, target["labels"][item]] = 1
            loss_cls += sigmoid_focal_loss(logit[judged], wanted[judged], reduction="sum")
            offsets = encode_boxes(target["boxes"][item], anchors[positive])
            loss_box += (delta[positive] - offsets).abs().sum()
            count += max(1, len(positive))
        count = over_processes(anchors.new_tensor(count))
        return {"loss_cls": loss_cls / count, "loss_box": loss_box / count}

    def answers(self, outputs, sizes, out_sizes):
        results = []
        for i, (size, out) in enumerate(zip(sizes, out_sizes, strict=True)):
            levels = [(x[i], deltas[i], boxes) for x, deltas, boxes in zip(*outputs, strict=True)]
            result = select_boxes(levels, size)
            scale = result["boxes"].new_tensor([out[1] / size[1], out[0] / size[0]] * 2)
            results.append(result | {"boxes": result["boxes"] * scale})
        return results


def select_boxes(levels, size, per_level=1000, top=100):
    """Best anchors of each level, decoded and clipped; class-wise NMS at 0.5; the `top` best."""
    boxes, scores = [], []
    for logits, deltas, anchors in levels:
        score = logits.sigmoid()  # (N_l, K)
        _, best = score.amax(dim=1).topk(min(per_level, len(score)))
        delta = torch.cat([deltas[best, :2], deltas[best, 2:].clamp(min=-math.log(1000 / 16))], 1)
        boxes.append(decode_boxes(delta, anchors[best]))
        scores.append(score[best])
    boxes, scores = clip_boxes_to_image(torch.cat(boxes), size), torch.cat(scores)
    anchor, labels = (scores > 0.05).nonzero().unbind(1)
    boxes, scores = boxes[anchor], scores[anchor, labels]
    keep = batched_nms(boxes, scores, labels, 0.5)[:top]
    return {"boxes": boxes[keep], "scores": scores[keep], "labels": labels[keep]}


class DETRLayer(nn.Module):
    """Post-norm transformer layer; with cross-attention in the decoder (arXiv:2005.12872, A.3)."""

    def __init__(self, dim, num_heads, cross):
        super().__init__()
        attention = partial(nn.MultiheadAttention, dim, num_heads, 0.1, batch_first=True)
        self.self_attn = attention()
        self.cross_attn = attention() if cross else None
        self.linear1, self.linear2 = nn.Linear(dim, 8 * dim), nn.Linear(8 * dim, dim)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2 + cross))
        self.dropout = nn.Dropout(0.1)

    def forward(self, x, position, memory=None, memory_position=None, padding=None):
        """x, position: (B, Q, C); memory and its position: (B, N, C); padding: (B, N), True there.

        Positions are added to queries and keys, not to values.
        """
        own = padding if memory is None else None
        y = x + position
        y = self.self_attn(y, y, x, key_padding_mask=own, need_weights=False)[0]
        x = self.norms[0](x + self.dropout(y))
        if memory is not None:
            query, key = x + position, memory + memory_position
            y = self.cross_attn(query, key, memory, key_padding_mask=padding, need_weights=False)[0]
            x = self.norms[1](x + self.dropout(y))
        y = self.linear2(self.dropout(F.relu(self.linear1(x))))
        return self.norms[-1](x + self.dropout(y))


class ThreeLayerMlp(nn.Module):
    """Three linear layers with ReLU between (DETR, arXiv:2005.12872, Sec. 3.2)."""

    def __init__(self, dim, out):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, out)])

    def forward(self, x):
        first, second, last = self.layers
        return last(F.relu(second(F.relu(first(x)))))


def sine_positions(real, dim):
    """Position code (B, H, W, dim): sine and cosine of y, then of x, from 0 to 2 pi over an image.

    real: (B, H, W) bool, False on padding (DETR's normalised sine encoding).
    """
    frequency = 10000 ** -(torch.arange(dim // 4, device=real.device) / (dim // 4))
    codes = []
    for axis in (1, 2):
        place = real.cumsum(axis).float()
        place = 2 * math.pi * place / (place.amax(axis, keepdim=True) + 1e-6)
        angle = place[..., None] * frequency  # (B, H, W, dim / 4)
        codes.append(torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(3))
    return torch.cat(codes, dim=3)


def real_cells(sizes, grid, stride, device):
    """Which cells of a padded map are covered by their image: (B, H, W) bool."""
    real = torch.zeros(len(sizes), *grid, dtype=torch.bool, device=device)
    for cells, (h, w) in zip(real, sizes, strict=True):
        cells[: math.ceil(h / stride), : math.ceil(w / stride)] = True
    return real


class DETR(nn.Module):
    """DETR's encoder and decoder on the last map: no convolution but patches (Sec. 5.4)."""

    def __init__(self, c, num_classes):
        super().__init__()
        dim, layers = c.head_dim, range(c.head_depth or 6)
        if dim % 32:
            raise ValueError("head=detr needs a head_dim divisible by 32")
        self.has_points, self.queries, self.patch_loss = c.reference_points, c.queries, c.patch_loss
        self.input_proj = nn.Conv2d(c.embed_dims[3], dim, 1)
        self.encoder = nn.ModuleList(DETRLayer(dim, dim // 32, False) for _ in layers)
        self.decoder = nn.ModuleList(DETRLayer(dim, dim // 32, True) for _ in layers)
        self.norm = nn.LayerNorm(dim)
        self.query_embed = nn.Parameter(torch.randn(c.queries, dim))
        if c.reference_points:
            columns = math.ceil(c.queries**0.5)
            real = torch.ones(1, math.ceil(c.queries / columns), columns, dtype=torch.bool)
            self.query_embed.data = sine_positions(real, dim).flatten(0, 2)[: c.queries]
        self.class_embed = nn.Linear(dim, num_classes + 1)  # the last class: no object
        self.bbox_embed = ThreeLayerMlp(dim, 4)
        for p in [*self.encoder.parameters(), *self.decoder.parameters()]:
            if p.ndim > 1:
                nn.init.xavier_uniform_(p)

    def points(self, device):
        """Where queries stand in the image, (Q, 2), or None: anywhere."""
        return spread_points(self.queries).to(device) if self.has_points else None

    def forward(self, maps, sizes):
        """Of each layer logits (B, Q, K + 1) and boxes (B, Q, 4) cxcywh as shares of the image.

        And what the encoder made of the patches, (B, H/32, W/32, C).
        """
        x = self.input_proj(maps[3])  # (B, C, H, W)
        real = real_cells(sizes, x.shape[2:], 32, x.device)
        position = sine_positions(real, x.shape[1]).flatten(1, 2)  # (B, N, C)
        padding = None if real.all() else ~real.flatten(1)
        memory = x.flatten(2).transpose(1, 2)  # (B, N, C)
        for layer in self.encoder:
            memory = layer(memory, position, padding=padding)
        query = self.query_embed.repeat(len(x), 1, 1)  # (B, Q, C)
        patches = memory.unflatten(1, x.shape[2:])  # (B, H, W, C)
        x, outputs = torch.zeros_like(query), []
        for layer in self.decoder:
            x = layer(x, query, memory, position, padding)  # (B, Q, C)
            outputs.append(self.heads(self.norm(x), self.points(x.device)))
        return outputs, patches

    def heads(self, tokens, points=None):
        """Logits (B, Q, K + 1) and boxes (B, Q, 4) of tokens (B, Q, C), around points (Q, 2)."""
        with torch.autocast(tokens.device.type, enabled=False):  # bf16 would round to pixels
            boxes = self.bbox_embed(tokens.float())  # (B, Q, 4)
        if points is not None:
            boxes = boxes + F.pad(points.logit(), (0, 2))
        return self.class_embed(tokens), boxes.sigmoid()

    def loss(self, outputs, targets, sizes):
        """Set losses of the last layer, and those of the others, and of patches, in sum."""
        targets = [
            {"labels": t["labels"], "boxes_norm": normalise_boxes(t["boxes"], size)}
            for t, size in zip(targets, sizes, strict=True)
        ]
        number = sum(len(t["labels"]) for t in targets)
        (outputs, patches), layers = outputs, []
        points = self.points(patches.device)
        for found in outputs:
            pairs = hungarian_match(*found, targets, points)
            layers.append(set_losses(*found, targets, pairs, 0.1, number))
        losses = layers.pop()
        if layers:
            losses["loss_layers"] = sum(sum(layer.values()) for layer in layers)
        if self.patch_loss:
            parts = self.patch_losses(patches, sizes, targets)
            losses["loss_patch"] = self.patch_loss * sum(parts.values())
        return losses

    def patch_losses(self, patches, sizes, targets):
        """The same losses for each patch, which should find the smallest object that covers it."""
        grids = [(math.ceil(h / 32), math.ceil(w / 32)) for h, w in sizes]
        real = zip(patches, grids, strict=True)  # without padding, as if they were one image
        tokens = torch.cat([image_patches[:h, :w].flatten(0, 1) for image_patches, (h, w) in real])
        points, pairs = cover_pairs(grids, sizes, 32, targets, tokens.device)
        targets = {key: torch.cat([t[key] for t in targets]) for key in targets[0]}
        found = self.heads(self.norm(tokens[None]), points if self.has_points else None)
        return set_losses(*found, [targets], [pairs], 1.0, len(pairs[0]))

    def answers(self, outputs, sizes, out_sizes):
        return [select_best(*found) for found in zip(*outputs[0][-1], out_sizes, strict=True)]


def set_losses(logits, boxes_norm, targets, pairs, no_object_weight, number):
    """DETR's losses of matched queries (arXiv:2005.12872, Sec. 3.1): class, 5 x L1, 2 x (1 - GIoU).

    Arguments and pairs as in hungarian_match. Queries without an object should answer the last
    class. The class loss is a mean weighted by class, over all processes (released: over one); the
    box losses are divided by `number`, its mean over the processes and at least 1.
    """
    wanted = torch.full(logits.shape[:2], logits.shape[2] - 1, device=logits.device)  # (B, Q)
    for row, target, (query, item) in zip(wanted, targets, pairs, strict=True):
        row[query] = target["labels"][item]
    weight = logits.new_ones(logits.shape[2], dtype=torch.float32)  # (K + 1,)
    weight[-1] = no_object_weight
    found = torch.cat([b[query] for b, (query, _) in zip(boxes_norm, pairs, strict=True)])
    truth = torch.cat([t["boxes_norm"][item] for t, (_, item) in zip(targets, pairs, strict=True)])
    counts = torch.stack([weight[wanted].sum(), weight.new_tensor(number)])
    total_weight, number = over_processes(counts)
    total_weight, number = total_weight.clamp(min=1e-6), number.clamp(min=1)
    giou = paired_giou(*(box_convert(b, "cxcywh", "xyxy") for b in (found, truth)))
    logits, wanted = logits.flatten(0, 1).float(), wanted.flatten()
    error = F.cross_entropy(logits, wanted, weight, reduction="sum")
    return {
        "loss_cls": error / total_weight,
        "loss_box": 5 * (found - truth).abs().sum() / number,
        "loss_giou": 2 * (1 - giou).sum() / number,
    }


def select_best(logits, boxes_norm, size):
    """Each query's likeliest class, as detections in pixels of an image (h, w), best first."""
    h, w = size
    scores, labels = logits.float().softmax(dim=1)[:, :-1].max(dim=1)
    order = scores.argsort(descending=True, stable=True)
    boxes = box_convert(boxes_norm, "cxcywh", "xyxy") * boxes_norm.new_tensor([w, h, w, h])
    return dict(boxes=boxes[order], scores=scores[order], labels=labels[order], tokens=order)


class Segmenter(nn.Module):
    """Logits (B, K + 1, H/4, W/4) of every pixel: the data's classes, then background.

    Differs: ADE20K has no background class (a released file has 150 rows: one for each), and the
    released code stretches images to multiples of 32 where this file pads them.
    """

    def loss(self, logits, targets, sizes):
        """Cross-entropy at full size, a mean over all pixels; unlabelled ones, -1, count as 0."""
        logits = resize_map(logits.float(), [4 * side for side in logits.shape[2:]])
        wanted = torch.full_like(logits[:, 0], -1, dtype=torch.long)  # (B, H, W), with padding
        for row, target in zip(wanted, targets, strict=True):
            h, w = target["semantic"].shape
            row[:h, :w] = target["semantic"]
        total = F.cross_entropy(logits, wanted, ignore_index=-1, reduction="sum")
        return {"loss_semantic": total / wanted.numel()}

    def answers(self, logits, sizes, out_sizes):
        results = []
        for x, (h, w), out_size in zip(logits.float(), sizes, out_sizes, strict=True):
            x = resize_map(x[None], [4 * side for side in x.shape[1:]])  # (1, K + 1, H, W)
            x = resize_map(x[:, :, :h, :w], out_size)  # (1, K + 1, height, width)
            results.append(dict(semantic=x[0].argmax(dim=0)))
        return results


def resize_map(x, size):
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


class SemanticFPN(Segmenter):
    """FPN of all stages, each level upsampled in steps to stride 4, and their sum (Sec. 5.3)."""

    def __init__(self, c, num_classes):
        super().__init__()
        dim = c.head_dim
        self.fpn = FeaturePyramidNetwork(c.embed_dims, dim)
        for module in self.fpn.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
        self.scale_heads = nn.ModuleList()
        for level in range(4):
            branch = []
            for i in range(max(1, level)):
                branch.append(Conv2dNormActivation(dim if i == 0 else dim // 2, dim // 2, 3))
                if level:
                    branch.append(nn.Upsample(scale_factor=2, mode="bilinear"))
            self.scale_heads.append(nn.Sequential(*branch))
        self.dropout = nn.Dropout2d(0.1)
        self.conv_seg = nn.Conv2d(dim // 2, num_classes + 1, 1)
        nn.init.normal_(self.conv_seg.weight, std=0.01)
        nn.init.zeros_(self.conv_seg.bias)

    def forward(self, maps, sizes):
        levels = self.fpn({str(s): x for s, x in enumerate(maps[:4])}).values()
        parts = [head(x) for head, x in zip(self.scale_heads, levels, strict=True)]
        x = sum(resize_map(part, maps[0].shape[2:]) for part in parts)  # (B, dim / 2, H/4, W/4)
        return self.conv_seg(self.dropout(x))  # (B, K + 1, H/4, W/4)


class ClassDecoderBlock(nn.Module):
    """Queries read tokens; their scores before the softmax, (B, h, Q, N), are returned too."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.mlp = Mlp(dim, 3 * dim)

    def forward(self, x, memory, mask=None):
        heads = (self.num_heads, x.shape[2] // self.num_heads)
        q = self.q(self.norm1(x)).unflatten(2, heads).transpose(1, 2)  # (B, h, Q, d)
        k, v = self.kv(memory).unflatten(2, (2, *heads)).permute(2, 0, 3, 1, 4)  # (B, h, N, d)
        scores = q @ k.transpose(2, 3) / math.sqrt(heads[1])  # (B, h, Q, N)
        seen = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
        x = x + self.proj((seen.softmax(dim=3) @ v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x)), scores


class Trans2Seg(Segmenter):
    """A query for each class, whose attention maps grow into its mask (Sec. 5.4, arXiv:2101.08461).

    Differs: sine positions and no layer across all places, so that any image size will do; no class
    token, plain convolutions (29.6 M parameters with PVT-S, the paper tells 32.1); the
    features are convolved once and not for each class, and then weighted by the class's query.
    """

    def __init__(self, c, num_classes):
        super().__init__()
        dim, layers, width = c.head_dim, range(c.head_depth or 4), c.head_dim // 4
        if dim % 32:
            raise ValueError("head=trans2seg needs a head_dim divisible by 32")
        heads = dim // 32
        self.proj = nn.Conv2d(c.embed_dims[3], dim, 1)
        self.encoder = nn.ModuleList(Block(dim, heads, 3.0) for _ in layers)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.queries = nn.Parameter(trunc_normal(1, num_classes + 1, dim))
        self.decoder = nn.ModuleList(ClassDecoderBlock(dim, heads) for _ in layers)
        self.features = nn.Conv2d(dim, width, 3, padding=1)
        self.attention = nn.Conv2d(heads, width, 3, padding=1)
        self.name = nn.Linear(dim, width)
        self.skip = nn.Conv2d(c.embed_dims[0], width, 1)
        self.fuse = Conv2dNormActivation(width, width, 3)
        self.out = nn.Conv2d(width, 1, 1)

    def forward(self, maps, sizes):
        x = self.proj(maps[3])  # (B, C, H, W)
        grid = x.shape[2:]
        real = real_cells(sizes, grid, 32, x.device)
        mask = None if real.all() else real.flatten(1)[:, None, None]
        x = (x + sine_positions(real, x.shape[1]).permute(0, 3, 1, 2)).flatten(2).transpose(1, 2)
        for block in self.encoder:
            x = block(x, mask)  # (B, N, C)
        memory, x = self.norm(x), self.queries.repeat(len(x), 1, 1)
        for block in self.decoder:
            x, scores = block(x, memory, mask)  # (B, K+1, C), (B, h, K+1, N)
        scores = scores.transpose(1, 2).flatten(0, 1).unflatten(2, grid)  # (B * (K+1), h, H, W)
        features = self.features(to_map(memory, grid))  # (B, C / 4, H, W)
        maps_of_classes = self.attention(scores).unflatten(0, x.shape[:2])  # (B, K+1, C / 4, H, W)
        x = features[:, None] * self.name(x)[..., None, None] + maps_of_classes
        x = resize_map(F.relu(x.flatten(0, 1)), maps[0].shape[2:]).unflatten(0, x.shape[:2])
        x = (x + self.skip(maps[0])[:, None]).flatten(0, 1)  # (B * (K+1), C / 4, H/4, W/4)
        return self.out(self.fuse(x)).view(len(features), -1, *maps[0].shape[2:])


HEADS = dict(
    retinanet=RetinaNet, classifier=Classifier, detr=DETR, semantic=SemanticFPN, trans2seg=Trans2Seg
)

# --- 6. Model -------------------------------------------------------------------------------------


class PVT(nn.Module):
    """The pyramid and one of HEADS."""

    def __init__(self, config, num_classes):
        super().__init__()
        c = self.config = config
        if c.head not in HEADS:
            raise ValueError(f"head must be one of {', '.join(HEADS)}, not {c.head}")
        self.backbone = PyramidVisionTransformer(c)
        self.head = HEADS[c.head](c, num_classes)
        self.multiple = 1 if c.head == "classifier" else 32  # sides that images are padded to

    def forward(self, images, targets=None, sizes=None):
        """Losses if there are targets, else answers.

        images: list of (3, h, w) floats in [0, 1]. targets: list of dict(boxes (M, 4) xyxy pixels,
        labels (M,)); for a classifier dict(labels (1,)), for a segmenter dict(semantic (h, w) int64
        in 0..K, K background, -1 ignored). sizes: the (height, width) in which each image's boxes
        or classes are wanted, its own by default. Returns dict(loss_name=scalar) or a list of
        dict(boxes (D, 4) xyxy, scores (D,), labels (D,)), best first; of dict(logits (K,)); or of
        dict(semantic (height, width)).
        """
        if targets is not None:
            x, true_sizes = pad_batch(images, self.multiple)
            return self.head.loss(self.head(self.backbone(x), true_sizes), targets, true_sizes)
        # Differs: the released code pads a batch to one size, and attention sees the padding. Here
        # only images of equal padded size share one: company changes no prediction.
        sizes = sizes or [image.shape[-2:] for image in images]
        results = [None] * len(images)
        for group in group_by_padded_size(images, self.multiple):
            x, true_sizes = pad_batch([images[i] for i in group], self.multiple)
            outputs = self.head(self.backbone(x), true_sizes)
            answers = self.head.answers(outputs, true_sizes, [sizes[i] for i in group])
            for i, answer in zip(group, answers, strict=True):
                results[i] = answer
        return results

    def every_layer(self, images):
        """Every layer once, on fixed shapes: what --summary counts."""
        x, sizes = pad_batch(images, self.multiple)
        self.head(self.backbone(x), sizes)


def param_groups(model, recipe):
    """AdamW's groups, `lr_scale` a factor on the learning rate (recipe's backbone_lr, or 1).

    All has weight decay, norms, biases and positions too, as in the released detectors; but in a
    classifier neither biases, norms nor the class token.
    """
    groups, all_decay = {}, model.config.head != "classifier"
    for name, p in model.named_parameters():
        scale = recipe["backbone_lr"] if name.startswith("backbone.") else 1.0
        decays = all_decay or p.ndim > 1 and not name.endswith("cls_token")
        group = dict(params=[], lr_scale=scale, weight_decay=recipe["weight_decay"] * decays)
        groups.setdefault((scale, decays), group)["params"].append(p)
    return [*groups.values()]


RENAMES = [
    (r"^(pos_embed|patch_embed|block|norm|cls_token)", r"backbone.\1"),
    (r"\.dwconv\.dwconv\.", ".dwconv."),
    (r"^head\.", "head.fc."),
    (r"^neck\.lateral_convs\.(\d)\.conv\.", r"head.fpn.inner_blocks.\1.0."),
    (r"^neck\.fpn_convs\.(\d)\.conv\.", r"head.fpn.layer_blocks.\1.0."),
    (r"^bbox_head\.(\w+)_convs\.(\d)\.conv\.", r"head.\1_convs.\2.0."),
    (r"^decode_head\.scale_heads\.(\d)\.(\d)\.conv\.", r"head.scale_heads.\1.\2.0."),
    (r"^decode_head\.scale_heads\.(\d)\.(\d)\.bn\.", r"head.scale_heads.\1.\2.1."),
    (r"^(bbox|decode)_head\.", "head."),
]


def from_official(state_dict, config=CONFIGS["tiny"]):
    """Checkpoint of the authors in this file's names.

    Reads classifiers of PVT and PVT v2, and the RetinaNet and Semantic FPN files trained with
    MMDetection and MMSegmentation; with another head than the file's only its stages are kept.
    """
    state = {}
    for key in ("state_dict", "model"):
        state_dict = state_dict.get(key, state_dict)
    others = dict(retinanet="bbox_head.", semantic="decode_head.")
    others.pop(config.head, None)
    if any(key.startswith(tuple(others.values())) for key in state_dict):  # of other levels
        state_dict = {k: v for k, v in state_dict.items() if k.startswith("backbone.")}
    for key, value in state_dict.items():
        for pattern, name in RENAMES:
            key = re.sub(pattern, name, key)
        if config.head == "retinanet":  # its two extra levels are in the same list
            key = key.replace("fpn.layer_blocks.3.0", "p6").replace("fpn.layer_blocks.4.0", "p7")
        no_place = ("backbone.cls_token", "backbone.norm.", "head.fc.")
        if config.head == "classifier" or not key.startswith(no_place):
            state[key] = value
    return state


def build(config, num_classes):
    """Model with random weights; config: a Config or a name in CONFIGS."""
    return PVT(CONFIGS[config] if isinstance(config, str) else config, num_classes)


# --- 7. Try it ------------------------------------------------------------------------------------

if __name__ == "__main__":
    torch.manual_seed(0)
    model, image = build("nano", num_classes=6).eval(), torch.rand(3, 128, 160)
    boxes = torch.tensor([[20.0, 30, 60, 80], [90, 40, 150, 110]])
    print(f"PVT nano: {sum(p.numel() for p in model.parameters()):,} parameters, not trained")
    with torch.no_grad():
        x, sizes = pad_batch([image], 32)
        maps = model.backbone(x)
        levels = model.head.pyramid(maps)
        losses = model([image], [dict(boxes=boxes, labels=torch.tensor([0, 3]))])
    print(f"image     {tuple(x.shape)}")
    for s, (x, ratio) in enumerate(zip(maps, model.config.sr_ratios, strict=True), start=1):
        queries, keys = x[0, 0].numel(), x[0, 0].numel() // ratio**2
        cost = f"{queries} queries x {keys} keys, {queries // keys} times fewer than all to all"
        print(f"stage {s}   {str(tuple(x.shape)):18}{cost}")
    for level, (x, a) in enumerate(zip(levels, retina_anchors(levels, 4.0), strict=True), start=3):
        print(f"p{level}        {str(tuple(x.shape)):18}{len(a)} anchors")
    print("losses    " + "  ".join(f"{name[5:]} {loss:.2f}" for name, loss in losses.items()))
