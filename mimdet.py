"""MIMDet: a masked-image-modelling ViT as detector (Fang et al., ICCV 2023, arXiv:2204.02964).

A ViT that learned to fill in masked images understands a random half of the patches well, so
detection training shows it only that half, which is far cheaper and costs little accuracy. A small
convolutional stem gives the fine maps a plain ViT lacks, the pre-trained decoder puts the sequence
back together, and the hybrid is the backbone of an ordinary Mask R-CNN.
Flow: image (B, 3, H, W) -> stem maps of strides 4, 8, 16 -> half of the N tokens (B, N/2, C)
      -> encoder -> all tokens (B, N, C') -> decoder -> FPN p2..p6 -> proposals
      -> boxes (D, 4), scores (D,), labels (D,), masks (D, H, W)
Positions: fixed sine-cosine, before tokens are dropped in `Encoder` and again in the decoder.
Loss: RPN by `rpn_batch` an image, boxes by the regions drawn, masks by those of objects.
Padding: seen by the stem's GroupNorm, attention and RPN, as released; its tokens are sampled only
      where real ones run out. In prediction only images of equal padded size share a batch.
Compare: yolos.py has no pyramid, anchors or proposals; pvt.py builds the pyramid inside the
transformer; simmim.py trains the encoder that is put to work here.
"""

import math
import re
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
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
    roi_align,
)
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

# --- 1. Config ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    embed_dim: int = 768  # encoder width C; the stem is C/8, C/4, C/2, C wide (Sec. 3.2)
    depth: int = 12  # encoder blocks
    num_heads: int = 12
    drop_path: float = 0.1  # of the last encoder block, growing linearly from 0
    decoder_dim: int = 512  # decoder width C'; its heads are 32 wide, as MAE's
    decoder_depth: int = 4  # the first 4 of MAE's 8 blocks (Sec. 3.2)
    # Differs: "patch" is not the paper's; it shows what the stem is for, and takes a ViT whole.
    stem: str = "conv"  # "conv": four 3x3 convolutions; "patch": plain patches, one map for all
    patch: int = 16  # side of the patches; with "patch" also 4, 8 or 32
    grid: int = 50  # side of the stored position tables: 800 px / 16
    sample_ratio: float = 0.5  # share of the tokens the encoder sees in training (Table 1)
    # Differs: the released code samples at sample_ratio in prediction too, unless overridden.
    eval_ratio: float = 1.0  # the same for predictions: 1.0 sees everything and is deterministic
    fill: str = "conv"  # dropped tokens become "conv": stem features, or "mask": a mask token (v1)
    fpn_dim: int = 256  # pyramid and head width; the box head's fc layer is 4 times as wide
    anchor_scale: int = 8  # anchor side / stride: 32, 64, 128, 256, 512 px on p2..p6
    proposals: int = 1000  # kept after the proposals' NMS, per image
    rpn_batch: int = 256  # anchors sampled per image for the RPN's losses
    roi_batch: int = 512  # boxes sampled per image for the heads' losses
    masks: bool = True  # predict masks; train.py turns it off for data that has none
    checkpoint: bool = True  # recompute blocks in the backward pass, to save memory


# fmt: off
CONFIGS = {
    "nano": Config(embed_dim=192, depth=4, num_heads=3, drop_path=0.0, decoder_dim=128,
                   decoder_depth=2, grid=14, fpn_dim=64, anchor_scale=4, proposals=50,
                   rpn_batch=64, roi_batch=32, checkpoint=False),  # 3,917,964, with 6 classes
    "base": Config(),  # 127,954,768 parameters with 80 classes
    "large": Config(embed_dim=1024, depth=24, num_heads=16, drop_path=0.4),  # 349,332,080
}
PAPER = dict(
    lr=8e-5, batch_size=64,  # the stem's rate for this batch
    lr_spread=2.0,  # encoder blocks: lr / 2; decoder, FPN and heads: lr * 2
    weight_decay=0.1, clip=0.0,  # no gradient clipping
    epochs=36, warmup=469,  # steps
    schedule=(0.75, 11 / 12),  # lr x 0.1 at these parts of the run; "cosine" is the other choice
    sizes=(480, 512, 544, 576, 608, 640, 736, 768, 800),  # short sides; no 672, 704, as released
    max_size=1333, multiple=1,  # long sides; sides are not cut to a multiple
    crop=(384, 600),  # every second image: resized to 400, 500 or 600, then cropped to such sides
)
RECIPES = {  # by variant-task, variant, task or head; the others train by "paper"
    # nano: images keep their own size (sizes=()) up to a long side of 320.
    "nano": dict(lr=1e-3, batch_size=4, lr_spread=2.0, weight_decay=0.05, clip=1.0, epochs=0.85,
                 warmup=50, schedule="cosine", sizes=(), max_size=320, multiple=1, crop=()),
    "paper": PAPER,
    "large": PAPER | dict(lr_spread=3.5),
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


class PatchEmbed(nn.Module):
    """Image (B, 3, H, W) -> one vector for every p x p patch, (B, C, H/p, W/p)."""

    def __init__(self, dim, patch=16):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch, stride=patch)

    def forward(self, x):
        return self.proj(x)


def run_blocks(blocks, x, recompute=False):
    """Apply the blocks in turn; recompute trades time for memory (activation checkpointing)."""
    for block in blocks:
        x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
    return x


def sincos_pos_embed(dim, grid):
    """Fixed sine-cosine table (1, 1 + grid * grid, dim), the class token's row of zeros first.

    The first half of the channels encodes x (the column), the second y; each is [sin | cos].
    """
    if dim % 4:
        raise ValueError(f"width {dim} is no multiple of 4, which sine-cosine positions need")
    omega = 10000 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angle = torch.arange(grid, dtype=torch.float64)[:, None] * omega  # (grid, dim/4)
    axis = torch.cat([angle.sin(), angle.cos()], dim=1).float()  # (grid, dim/2)
    x, y = axis.expand(grid, grid, -1), axis[:, None].expand(grid, grid, -1)  # (grid, grid, dim/2)
    table = torch.cat([x, y], dim=-1).flatten(0, 1)  # (grid * grid, dim)
    return torch.cat([torch.zeros(1, dim), table])[None]  # (1, 1 + grid * grid, dim)


def resize_grid(table, old_hw, new_hw):
    """Bicubic resize of position tables (L, h * w, C) from grid old_hw to new_hw.

    As two matrix products: torch's own resize of so many channels is slow, on GPUs most of all.
    """
    if tuple(old_hw) == tuple(new_hw):
        return table
    weights = []
    for old, new in zip(old_hw, new_hw, strict=True):
        eye = torch.eye(old, dtype=table.dtype, device=table.device)[None, None]
        weight = F.interpolate(eye, (new, old), mode="bicubic", align_corners=False)
        weights.append(weight[0, 0])  # (H, h), (W, w)
    device = "cpu" if table.is_meta else table.device.type  # no autocast is known of "meta"
    with torch.autocast(device, enabled=False):  # bf16 would round positions
        x = weights[1] @ table.unflatten(1, old_hw)  # (L, h, W, C)
        x = weights[0] @ x.flatten(2)  # (L, H, W * C)
    return x.unflatten(2, (new_hw[1], -1)).flatten(1, 2)  # (L, H * W, C)


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


class ImageNorm(nn.GroupNorm):
    """GroupNorm of one group: all of an image has one mean and one variance (arXiv:1803.08494)."""

    def __init__(self, dim, eps=1e-5):
        super().__init__(1, dim, eps)

    def forward(self, x):
        return self.in_parts(x) if x.is_cuda else super().forward(x)

    def in_parts(self, x):
        """The same for x (B, C, H, W) by all of a GPU, where torch's takes one core an image."""
        x = x.float()
        var, mean = torch.var_mean(x, (1, 2, 3), correction=0, keepdim=True)
        scale = self.weight[:, None, None] * (var + self.eps).rsqrt()
        return torch.addcmul(self.bias[:, None, None] - mean * scale, x, scale)


class ConvStem(nn.Module):
    """Four 3x3 convolutions of stride 2 in place of 16x16 patches (MIMDet, Sec. 3.2)."""

    def __init__(self, dim):
        super().__init__()
        if dim < 8:
            raise ValueError(f"stem=conv needs a width of 8 or more, not {dim}")
        widths = [3, dim // 8, dim // 4, dim // 2, dim]
        self.proj = nn.ModuleList()
        for c_in, c_out in zip(widths[:-1], widths[1:], strict=True):
            conv = nn.Conv2d(c_in, c_out, 3, stride=2, padding=1, bias=False)
            self.proj.append(nn.Sequential(conv, ImageNorm(c_out, eps=1e-6), nn.GELU()))
        self.proj[3].append(nn.Conv2d(dim, dim, 1))

    def forward(self, x):
        maps = []
        for stage in self.proj:
            x = stage(x)
            maps.append(x)
        return maps[1:]  # (B, C/4, H/4, W/4), (B, C/2, H/8, W/8), (B, C, H/16, W/16)


def sample_tokens(noise, sizes, grid, ratio, stride=16):
    """Ids (B, int(N * ratio)) of the tokens to keep: those of the smallest noise (B, N) (Sec. 3.1).

    Tokens that lie wholly in padding come last, so they are kept only where an image has too few
    real ones. N counts the padded grid, as in the released code: every image of a batch keeps
    equally many.
    """
    noise = noise.unflatten(1, grid).clone()  # (B, H/stride, W/stride)
    for image_noise, (h, w) in zip(noise, sizes, strict=True):
        image_noise[math.ceil(h / stride) :] = 100
        image_noise[:, math.ceil(w / stride) :] = 100
    keep = max(1, int(grid[0] * grid[1] * ratio))
    return noise.flatten(1).argsort(dim=1)[:, :keep]


class Encoder(nn.Module):
    """ConvStem or patches, and a ViT that sees only the kept tokens; no class token (Sec. 3.1)."""

    def __init__(self, c):
        super().__init__()
        if c.patch not in {"conv": (16,), "patch": (4, 8, 16, 32)}.get(c.stem, ()):
            raise ValueError('give stem="conv" and patch=16, or stem="patch" and 4, 8, 16 or 32')
        self.recompute, self.stride = c.checkpoint, c.patch
        conv = c.stem == "conv"
        self.patch_embed = ConvStem(c.embed_dim) if conv else PatchEmbed(c.embed_dim, c.patch)
        # Frozen, and stored with the row of MAE's class token, as in the released files.
        self.pos_embed = nn.Parameter(sincos_pos_embed(c.embed_dim, c.grid), requires_grad=False)
        self.blocks = nn.ModuleList(
            Block(c.embed_dim, c.num_heads, 4.0, c.drop_path * i / max(1, c.depth - 1), eps=1e-5)
            for i in range(c.depth)
        )
        self.norm = nn.LayerNorm(c.embed_dim, eps=1e-5)

    def forward(self, x, sizes, ratio, noise=None):
        maps = self.patch_embed(x)
        *fine, stem = maps if isinstance(maps, list) else [maps]  # stem (B, C, H/p, W/p)
        tokens = stem.flatten(2).transpose(1, 2)  # (B, N, C)
        tokens = tokens + pos_embed_for(self.pos_embed, stem.shape[-2:])
        ids = None
        if ratio < 1 or self.training:  # at 1 too: then conv_feat_proj has a gradient, of zeros
            if noise is None:
                noise = torch.rand(*tokens.shape[:2], device=x.device)  # (B, N)
            ids = sample_tokens(noise, sizes, stem.shape[-2:], ratio, self.stride)  # (B, N_kept)
            tokens = tokens.take_along_dim(ids[:, :, None], dim=1)  # (B, N_kept, C), others dropped
        tokens = self.norm(run_blocks(self.blocks, tokens, self.recompute))  # (B, N_kept, C)
        return tokens, ids, (*fine, stem)


class Decoder(nn.Module):
    """Puts encoded and dropped tokens back on the grid, for a few pre-trained blocks (Sec. 3.2)."""

    def __init__(self, c):
        super().__init__()
        self.recompute, dim = c.checkpoint, c.decoder_dim
        self.decoder_embed = nn.Linear(c.embed_dim, dim)
        if c.fill == "conv":
            self.conv_feat_proj = nn.Linear(c.embed_dim, dim)
        elif c.fill == "mask":
            self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        else:
            raise ValueError(f'fill must be "conv" or "mask", not "{c.fill}"')
        self.decoder_pos_embed = nn.Parameter(sincos_pos_embed(dim, c.grid), requires_grad=False)
        blocks = (Block(dim, dim // 32, eps=1e-5) for _ in range(c.decoder_depth))
        self.decoder_blocks = nn.ModuleList(blocks)
        self.decoder_norm = nn.LayerNorm(dim, eps=1e-5)

    def forward(self, tokens, ids, stem):
        B, _, H, W = stem.shape
        x = self.decoder_embed(tokens)  # (B, N_kept, C')
        if ids is not None:
            if hasattr(self, "mask_token"):
                full = self.mask_token.to(x.dtype).expand(B, H * W, -1)  # (B, N, C')
            else:  # without the encoder's position embedding, as in the released code
                full = self.conv_feat_proj(stem.flatten(2).transpose(1, 2))  # (B, N, C')
            x = full.scatter(1, ids[:, :, None].expand_as(x), x)  # (B, N, C')
        x = x + pos_embed_for(self.decoder_pos_embed, (H, W))
        x = self.decoder_norm(run_blocks(self.decoder_blocks, x, self.recompute))
        return x.transpose(1, 2).unflatten(2, (H, W))  # (B, C', H/p, W/p)


class ScaleMap(nn.Sequential):
    """Map of stride `old` -> stride `new`: deconvolutions up, pooling down (arXiv:2111.11429).

    Differs: each deconvolution is followed by GroupNorm and GELU; in ViTDet only the first of two.
    """

    def __init__(self, dim, old, new):
        layers = [nn.MaxPool2d(new // old)] if new > old else []
        while old > new:
            layers += [nn.ConvTranspose2d(dim, dim, 2, 2), ImageNorm(dim), nn.GELU()]
            old //= 2
        super().__init__(*layers)


def pos_embed_for(table, grid):
    """The stored square table without its class-token row, for a padded batch's grid: (1, N, C)."""
    side = math.isqrt(table.shape[1] - 1)
    return resize_grid(table[:, 1:], (side, side), grid)


# --- 4. Boxes -------------------------------------------------------------------------------------


def make_anchors(maps, scale):
    """Anchors (H_l * W_l * 3, 4) xyxy of each map: side scale * stride, height / width 1/2, 1, 2.

    Centred on multiples of the stride (offset 0) and not rounded, as in detectron2.
    """
    anchors = []
    for level, x in enumerate(maps):
        stride, (H, W) = 4 * 2**level, x.shape[-2:]
        ratio = torch.tensor([0.5, 1.0, 2.0], device=x.device)
        half = torch.stack([1 / ratio.sqrt(), ratio.sqrt()], dim=1) * (scale * stride / 2)  # (3, 2)
        ys, xs = (torch.arange(side, device=x.device) * stride for side in (H, W))
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


def match(boxes_xyxy, targets_xyxy, low, high, rescue=False):
    """Best target (N,) of each box, and label (N,): 1 object, 0 background, -1 neither.

    Objects have an IoU of at least `high` with their target, background less than `low`. rescue:
    the box that overlaps a target most is an object whatever its IoU.
    """
    if len(targets_xyxy) == 0:
        nothing = torch.zeros(len(boxes_xyxy), dtype=torch.long, device=boxes_xyxy.device)
        return nothing, nothing
    iou = box_iou(targets_xyxy, boxes_xyxy)  # (M, N)
    best, matched = iou.max(dim=0)
    label = torch.where(best >= high, 1, torch.where(best >= low, -1, 0))
    if rescue:
        label[(iou == iou.amax(dim=1, keepdim=True)).any(dim=0)] = 1
    return matched, label


def subsample(label, total, fraction):
    """Indices of at most total * fraction random objects, and of background to fill up to total."""
    objects, background = (label == 1).nonzero()[:, 0], (label == 0).nonzero()[:, 0]
    order = torch.randperm(len(objects), device=label.device)
    objects = objects[order[: int(total * fraction)]]
    order = torch.randperm(len(background), device=label.device)
    return objects, background[order[: total - len(objects)]]


def pool_rois(maps, boxes_per_image, size, anchor_scale):
    """Crops (R, C, size, size) from p2..p5 (FPN, arXiv:1612.03144, Eq. 1).

    A box of side 28 * anchor_scale, the paper's 224 px, comes from p4.
    Aligned RoIAlign with as many samples per bin as the box needs (Detectron2's ROIAlignV2).
    """
    rois = torch.cat([F.pad(b, (1, 0), value=i) for i, b in enumerate(boxes_per_image)])  # (R, 5)
    side = box_area(rois[:, 1:]).sqrt()
    level = (4 + (side / (28 * anchor_scale) + 1e-8).log2()).floor().clamp(2, 5)  # (R,)
    pooled = rois.new_zeros(len(rois), maps[0].shape[1], size, size)
    for i, x in enumerate(maps[:4], start=2):
        index = (level == i).nonzero()[:, 0]
        # In float32 under autocast too: a bfloat16 coordinate of 200 is only good to a pixel.
        pooled[index] = roi_align(x.float(), rois[index], size, 1 / 2**i, 0, aligned=True)
    return pooled


def paste_masks(probs, boxes_xyxy, size):
    """Mask probabilities (D, 28, 28) of boxes (D, 4) as bool masks (D, H, W) of the image.

    Bilinear interpolation at pixel centres, written as two small matrix products per mask.
    """

    def weights(low, high, length):  # (D, length, 28)
        pixel = torch.arange(length, device=probs.device) + 0.5
        cell = (pixel - low[:, None]) / (high - low)[:, None] * probs.shape[-1] - 0.5
        index = torch.arange(probs.shape[-1], device=probs.device)
        return (1 - (cell[:, :, None] - index).abs()).clamp(min=0)

    x0, y0, x1, y1 = boxes_xyxy.unbind(1)
    masks = torch.zeros(len(probs), *size, dtype=torch.bool, device=probs.device)
    rows, columns = weights(y0, y1, size[0]), weights(x0, x1, size[1])
    with torch.autocast(probs.device.type, enabled=False):
        for mask, row, p, column in zip(masks, rows, probs.float(), columns, strict=True):
            mask.copy_(row @ p @ column.T >= 0.5)
    return masks


# --- 5. Heads and losses --------------------------------------------------------------------------


def over_processes(counts):
    """Mean of counts over all processes, which average their gradients.

    So sums divided by it make the step of one process with all the images.
    Differs: released code divides some losses by what one process alone has counted.
    """
    if dist.is_initialized():
        dist.all_reduce(counts)
        counts /= dist.get_world_size()
    return counts


class RPN(nn.Module):
    """Objectness and box deltas of 3 anchors a place (Faster R-CNN, arXiv:1506.01497, Sec. 3.1)."""

    def __init__(self, dim):
        super().__init__()
        self.conv0 = nn.Conv2d(dim, dim, 3, padding=1)
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1)
        self.objectness_logits = nn.Conv2d(dim, 3, 1)
        self.anchor_deltas = nn.Conv2d(dim, 12, 1)

    def forward(self, maps):
        logits, deltas = [], []
        for x in maps:
            x = F.relu(self.conv1(F.relu(self.conv0(x))))
            logits.append(self.objectness_logits(x).permute(0, 2, 3, 1).flatten(1).float())
            deltas.append(self.anchor_deltas(x).permute(0, 2, 3, 1).reshape(len(x), -1, 4).float())
        return logits, deltas  # per level (B, H_l * W_l * 3), (B, H_l * W_l * 3, 4)


class BoxHead(nn.Module):
    """4conv1fc head: K+1 class logits, background last, and one box per class from a 7x7 crop."""

    def __init__(self, dim, num_classes):
        super().__init__()
        for i in range(1, 5):
            self.add_module(f"conv{i}", Conv2dNormActivation(dim, dim, 3))  # with BatchNorm, ReLU
        self.fc1 = nn.Linear(dim * 7 * 7, 4 * dim)
        self.cls_score = nn.Linear(4 * dim, num_classes + 1)
        self.bbox_pred = nn.Linear(4 * dim, num_classes * 4)

    def forward(self, x):
        x = self.conv4(self.conv3(self.conv2(self.conv1(x))))
        x = F.relu(self.fc1(x.flatten(1)))  # (R, 4 * dim)
        return self.cls_score(x).float(), self.bbox_pred(x).unflatten(1, (-1, 4)).float()


class MaskHead(nn.Module):
    """One 28x28 mask per class from a 14x14 crop (Mask R-CNN, arXiv:1703.06870, Fig. 4)."""

    def __init__(self, dim, num_classes):
        super().__init__()
        for i in range(1, 5):
            self.add_module(f"mask_fcn{i}", Conv2dNormActivation(dim, dim, 3))
        self.deconv = nn.ConvTranspose2d(dim, dim, 2, stride=2)
        self.predictor = nn.Conv2d(dim, num_classes, 1)

    def forward(self, x):
        x = self.mask_fcn4(self.mask_fcn3(self.mask_fcn2(self.mask_fcn1(x))))
        return self.predictor(F.relu(self.deconv(x))).float()  # (R, K, 28, 28)


BOX_WEIGHTS = (10.0, 5.0)


def rpn_losses(logits, deltas, anchors, targets, batch):
    """Objectness cross-entropy and L1 of deltas, over `batch` x images however few are drawn."""
    logits, deltas, anchors = torch.cat(logits, 1), torch.cat(deltas, 1), torch.cat(anchors)
    loss_cls = loss_box = 0.0
    for logit, delta, target in zip(logits, deltas, targets, strict=True):
        matched, label = match(anchors, target["boxes"], 0.3, 0.7, rescue=True)
        objects, background = subsample(label, batch, 0.5)
        index = torch.cat([objects, background])
        wanted = label[index].float()
        loss_cls += F.binary_cross_entropy_with_logits(logit[index], wanted, reduction="sum")
        wanted = encode_boxes(target["boxes"][matched[objects]], anchors[objects])
        loss_box += (delta[objects] - wanted).abs().sum()
    total = batch * len(targets)
    return {"loss_rpn_cls": loss_cls / total, "loss_rpn_box": loss_box / total}


@torch.no_grad()
def select_proposals(logits, deltas, anchors, sizes, per_level, total):
    """Top anchors of each level, decoded, clipped, thinned by NMS: (<= total, 4) an image."""
    boxes, scores, levels, proposals = [], [], [], []
    for level, anchor in enumerate(anchors):
        score, index = logits[level].topk(min(per_level, len(anchor)))  # (B, k)
        boxes.append(decode_boxes(deltas[level].take_along_dim(index[..., None], 1), anchor[index]))
        scores.append(score)
        levels.append(torch.full_like(index, level))
    parts = (torch.cat(part, dim=1) for part in (boxes, scores, levels))
    for boxes, scores, levels, size in zip(*parts, sizes, strict=True):  # (n, 4), (n,), (n,)
        boxes = clip_boxes_to_image(boxes, size)
        valid = (boxes[:, 2:] > boxes[:, :2]).all(dim=1).nonzero()[:, 0]
        boxes, scores, levels = boxes[valid], scores[valid], levels[valid]
        # Who survives depends on better boxes alone: mostly the best 3 * total leave enough.
        for best in sorted({min(3 * total, len(scores)), len(scores)}):
            keep = scores.topk(best).indices
            keep = keep[batched_nms(boxes[keep], scores[keep], levels[keep], 0.7)[:total]]
            if len(keep) == total:
                break
        proposals.append(boxes[keep])
    return proposals


@torch.no_grad()
def crop_masks(masks, matched, boxes_xyxy):
    """Binary target masks (R, 28, 28): each box's crop of its target's mask (M, H, W).

    Differs: the authors rasterise polygons inside each box; here masks of the whole image are
    cropped, Detectron2's rule for bitmasks, so that any annotation (polygon, RLE, drawn) is read
    the same way.
    """
    rois = torch.cat([matched[:, None].to(boxes_xyxy.dtype), boxes_xyxy], dim=1)
    masks = masks[:, None].to(boxes_xyxy.dtype)
    return roi_align(masks, rois, 28, sampling_ratio=0, aligned=True)[:, 0] >= 0.5


def select_detections(rois, logits, deltas, size):
    """Class-wise NMS at 0.5 over all that scores above 0.05; the 100 best are kept."""
    scores = logits.softmax(dim=1)[:, :-1]  # (R, K)
    roi, labels = (scores > 0.05).nonzero().unbind(1)  # (D,)
    scores = scores[roi, labels]
    boxes = decode_boxes(deltas[roi, labels], rois[roi], BOX_WEIGHTS)  # (D, 4)
    boxes = clip_boxes_to_image(boxes, size)
    keep = batched_nms(boxes, scores, labels, 0.5)[:100]
    return {"boxes": boxes[keep], "scores": scores[keep], "labels": labels[keep]}


def rescale(result, old_hw, new_hw):
    """Detections in pixels of size new_hw; boxes without area are left out, masks pasted."""
    scale = [new_hw[1] / old_hw[1], new_hw[0] / old_hw[0]] * 2
    boxes = clip_boxes_to_image(result["boxes"] * result["boxes"].new_tensor(scale), new_hw)
    keep = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
    result = {key: value[keep] for key, value in (result | {"boxes": boxes}).items()}
    if "masks" in result:
        result["masks"] = paste_masks(result["masks"], result["boxes"], new_hw)
    return result


# --- 6. Model -------------------------------------------------------------------------------------


class MIMDet(nn.Module):
    """ConvStem, ViT encoder and decoder, FPN, and Mask R-CNN heads (Fig. 2)."""

    def __init__(self, config, num_classes):
        super().__init__()
        c = self.config = config
        if not (0 < c.sample_ratio <= 1 and 0 < c.eval_ratio <= 1):
            raise ValueError("sample_ratio and eval_ratio are shares of the tokens: 0.5, at most 1")
        if min(c.proposals, c.rpn_batch, c.roi_batch, c.anchor_scale, c.grid, c.fpn_dim) < 1:
            names = "proposals, rpn_batch, roi_batch, anchor_scale, grid and fpn_dim"
            raise ValueError(f"{names}: 1 or more")
        self.num_classes = num_classes
        self.encoder = Encoder(c)
        self.decoder = Decoder(c)
        widths = [c.embed_dim // 4, c.embed_dim // 2, c.decoder_dim, c.decoder_dim]
        if c.stem == "patch":  # the decoder's map alone makes the pyramid
            widths = [c.decoder_dim] * 4
            self.scales = nn.ModuleList(ScaleMap(c.decoder_dim, c.patch, s) for s in (4, 8, 16, 32))
        self.fpn = FeaturePyramidNetwork(widths, c.fpn_dim, LastLevelMaxPool(), nn.BatchNorm2d)
        self.rpn = RPN(c.fpn_dim)
        self.box_head = BoxHead(c.fpn_dim, num_classes)
        self.mask_head = MaskHead(c.fpn_dim, num_classes) if c.masks else None
        self.init_weights()

    def init_weights(self):
        c = self.config
        for module in [*self.encoder.modules(), *self.decoder.modules()]:
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        if c.fill == "mask":
            nn.init.normal_(self.decoder.mask_token, std=0.02)
        for layer in nn.ModuleList([self.rpn, self.box_head, self.mask_head]).modules():
            if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        nn.init.kaiming_uniform_(self.box_head.fc1.weight, a=1)
        # Differs: Detectron2 begins the RPN's hidden layers at std 0.01 too.
        for layer in [self.rpn.objectness_logits, self.rpn.anchor_deltas, self.box_head.cls_score]:
            nn.init.normal_(layer.weight, std=0.01)
        for layer in [self.box_head.bbox_pred, *([self.mask_head.predictor] if c.masks else [])]:
            nn.init.normal_(layer.weight, std=0.001)

    def forward(self, images, targets=None, sizes=None):
        """Losses if there are targets, else detections.

        images: list of (3, h, w) floats in [0, 1]. targets: list of dict(boxes (M, 4) xyxy pixels,
        labels (M,), masks (M, h, w) bool unless config.masks is off). sizes: the (height, width) in
        which each image's boxes and masks are wanted, its own by default. Returns
        dict(loss_name=scalar) or a list of dict(boxes (D, 4), scores (D,), labels (D,), masks (D,
        height, width) bool), best first.
        """
        if targets is not None:
            return self.loss(*pad_batch(images, 32), targets)
        # Differs: the released code pads a batch to one size, and GroupNorm and attention see the
        # padding. Here only images of equal padded size share one: company changes no prediction.
        sizes = sizes or [image.shape[-2:] for image in images]
        results = [None] * len(images)
        for group in group_by_padded_size(images, 32):
            batch = pad_batch([images[i] for i in group], 32)
            for i, found in zip(group, self.detect(*batch, [sizes[i] for i in group]), strict=True):
                results[i] = found
        return results

    def backbone(self, x, sizes, ratio, noise=None):
        """Maps c2..c5, strides 4 to 32, of a padded batch; noise (B, N) decides what is kept."""
        tokens, ids, (*fine, stem) = self.encoder(x, sizes, ratio, noise)
        c4 = self.decoder(tokens, ids, stem)
        if self.config.stem == "patch":
            return [scale(c4) for scale in self.scales]
        return [*fine, c4, F.max_pool2d(c4, 2)]

    def pyramid(self, x, sizes, ratio, noise=None):
        """Maps p2..p6 (B, fpn_dim, H/4, W/4) ... (B, fpn_dim, H/64, W/64)."""
        maps = self.backbone(x, sizes, ratio, noise)
        return list(self.fpn({str(level): c for level, c in enumerate(maps)}).values())

    def loss(self, x, sizes, targets, noise=None):
        c = self.config
        maps = self.pyramid(x, sizes, c.sample_ratio if self.training else c.eval_ratio, noise)
        anchors = make_anchors(maps, c.anchor_scale)
        logits, deltas = self.rpn(maps)
        losses = rpn_losses(logits, deltas, anchors, targets, c.rpn_batch)
        proposals = select_proposals(logits, deltas, anchors, sizes, 2 * c.proposals, c.proposals)
        return losses | self.roi_losses(maps, proposals, targets)

    def roi_losses(self, maps, proposals, targets):
        """Cross-entropy and L1 of sampled boxes, binary cross-entropy of the objects' masks.

        The first two are divided by all R boxes, background too, the last by the objects' 28 x 28
        cells.
        """
        c, K = self.config, self.num_classes
        rois, labels, wanted_boxes, mask_rois, wanted_masks = [], [], [], [], []
        for boxes, target in zip(proposals, targets, strict=True):
            boxes = torch.cat([boxes, target["boxes"]])  # targets are proposals too
            matched, label = match(boxes, target["boxes"], 0.5, 0.5)
            objects, background = subsample(label, c.roi_batch, 0.25)
            matched = matched[objects]
            rois.append(boxes[torch.cat([objects, background])])
            labels += [target["labels"][matched], torch.full_like(background, K)]
            wanted_boxes.append(encode_boxes(target["boxes"][matched], boxes[objects], BOX_WEIGHTS))
            if c.masks:
                mask_rois.append(boxes[objects])
                wanted_masks.append(crop_masks(target["masks"], matched, boxes[objects]))
        labels = torch.cat(labels)  # (R,)
        logits, deltas = self.box_head(pool_rois(maps, rois, 7, c.anchor_scale))
        objects = (labels < K).nonzero()[:, 0]
        labels_of_objects = labels[objects]
        box_error = deltas[objects, labels_of_objects] - torch.cat(wanted_boxes)
        counts = logits.new_tensor([len(labels), len(objects)])
        num_boxes, num_masks = over_processes(counts).clamp(min=1e-6)  # without any: no 0/0
        losses = {
            "loss_cls": F.cross_entropy(logits, labels, reduction="sum") / num_boxes,
            "loss_box": box_error.abs().sum() / num_boxes,
        }
        if c.masks:
            # Differs: without any object the head sees a background crop: all processes call it.
            crops = mask_rois if len(objects) else [rois[0][:1]]
            mask_logits = self.mask_head(pool_rois(maps, crops, 14, c.anchor_scale))
            mask_logits = mask_logits[torch.arange(len(objects)), labels_of_objects]
            wanted = torch.cat(wanted_masks).float()  # (objects, 28, 28)
            error = F.binary_cross_entropy_with_logits(mask_logits, wanted, reduction="sum")
            losses["loss_mask"] = error / (num_masks * 28**2)
        return losses

    def detect(self, x, sizes, out_sizes, noise=None):
        """Detections of one padded batch (B, 3, H, W) of true sizes (h, w), scaled to out_sizes."""
        c = self.config
        maps = self.pyramid(x, sizes, c.eval_ratio, noise)
        anchors = make_anchors(maps, c.anchor_scale)
        logits, deltas = self.rpn(maps)
        rois = select_proposals(logits, deltas, anchors, sizes, c.proposals, c.proposals)
        logits, deltas = self.box_head(pool_rois(maps, rois, 7, c.anchor_scale))
        counts = [len(r) for r in rois]
        heads = zip(rois, logits.split(counts), deltas.split(counts), sizes, strict=True)
        results = [select_detections(*head) for head in heads]
        if c.masks:
            labels = torch.cat([r["labels"] for r in results])
            crops = pool_rois(maps, [r["boxes"] for r in results], 14, c.anchor_scale)
            masks = self.mask_head(crops)[torch.arange(len(labels)), labels].sigmoid()
            counts = [len(r["labels"]) for r in results]
            for result, m in zip(results, masks.split(counts), strict=True):
                result["masks"] = m  # (D, 28, 28)
        return [rescale(*each) for each in zip(results, sizes, out_sizes, strict=True)]

    def every_layer(self, images):
        """Every layer once, on fixed shapes, selecting nothing: what --summary counts."""
        c = self.config
        x, sizes = pad_batch(images, 32)
        maps = self.pyramid(x, sizes, c.eval_ratio)
        rois = c.proposals * len(x)
        self.rpn(maps)
        self.box_head(x.new_zeros(rois, c.fpn_dim, 7, 7))
        if c.masks:
            self.mask_head(x.new_zeros(100 * len(x), c.fpn_dim, 14, 14))


def param_groups(model, recipe):
    """AdamW's groups, `lr_scale` a factor on the learning rate (released config; no layer decay).

    The pre-trained ViT learns slowest, the ConvStem at the recipe's rate, decoder, FPN and heads
    fastest. Biases and norms, all 1-D, have no weight decay. Frozen position tables are in no
    group.
    """
    spread, groups = recipe["lr_spread"], {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            stem = model.config.stem == "conv" and name.startswith("encoder.patch_embed.")
            scale = 1.0 if stem else 1 / spread if name.startswith("encoder.") else spread
            decays = p.ndim > 1
            group = dict(params=[], lr_scale=scale, weight_decay=recipe["weight_decay"] * decays)
            groups.setdefault((scale, decays), group)["params"].append(p)
    return [*groups.values()]


RENAMES = [
    (r"^backbone\.bottom_up\.", ""),
    (r"^backbone\.fpn_", "fpn_"),
    (r"^proposal_generator\.rpn_head\.(conv\.)?", "rpn."),
    (r"^roi_heads\.box_(head|predictor)\.", "box_head."),
    (r"^roi_heads\.", ""),
    (r"(fpn_\w+\d|head\.conv\d|mask_fcn\d)\.weight", r"\1.0.weight"),
    (r"(fpn_\w+\d|head\.conv\d|mask_fcn\d)\.norm\.", r"\1.1."),
    (r"^fpn_lateral(\d)", lambda m: f"fpn.inner_blocks.{int(m[1]) - 2}"),
    (r"^fpn_output(\d)", lambda m: f"fpn.layer_blocks.{int(m[1]) - 2}"),
]


def plain_blocks(state):
    """State dict in which the blocks of a BeiT (SimMIM's ViT) have become those of a plain ViT.

    Layer scale goes into the layers before it, the biases of q and v (k has none) into one. Tables
    of relative positions have no place here.
    """
    state = dict(state)
    for key in [key for key in state if key.endswith(("gamma_1", "gamma_2"))]:
        scale = state.pop(key)
        name = key.replace("gamma_1", "attn.proj").replace("gamma_2", "mlp.fc2")
        state[f"{name}.weight"] = state[f"{name}.weight"] * scale[:, None]
        state[f"{name}.bias"] = state[f"{name}.bias"] * scale
    for key in [key for key in state if key.endswith("attn.q_bias")]:
        q, v = state.pop(key), state.pop(key.replace("q_bias", "v_bias"))
        state[key.replace("q_bias", "qkv.bias")] = torch.cat([q, torch.zeros_like(q), v])
    return state


def from_official(state_dict, config=CONFIGS["base"]):
    """Checkpoint of the authors, or any plain ViT, in this file's names.

    Reads MIMDet's releases, whole or backbone alone (v2: fill="conv"; v1: fill="mask", and grid=14
    if its tables have 197 rows), MAE with its decoder, and ViTs: SimMIM's, YOLOS's, those named as
    in timm, whose table is resized to config.grid, as the authors do. What has no place here (class
    and [DET] tokens, MAE's later decoder blocks, the patch embedding unless config.stem is "patch")
    is left out.
    """
    state = {}
    for key, value in state_dict.get("model", state_dict).items():
        for pattern, name in RENAMES:
            key = re.sub(pattern, name, key)
        state[key] = value
    if any(key.startswith("encoder.patch_embed.proj.3.") for key in state):
        return state
    blocks = [f"decoder_blocks.{i}." for i in range(config.decoder_depth)]
    wanted = ["blocks.", "norm.", "pos_embed", *blocks]
    wanted += ["decoder_embed.", "decoder_norm.", "decoder_pos_embed"]
    wanted += ["patch_embed."] if config.stem == "patch" else []
    wanted += ["mask_token"] if config.fill == "mask" and "decoder_embed.weight" in state else []
    state.pop("backbone.pos_embed", None)  # YOLOS's, with rows of its [DET] tokens
    vit = {}
    for key, value in plain_blocks(state).items():
        key = key.removeprefix("encoder.").removeprefix("backbone.")
        if key.startswith(tuple(wanted)):
            vit[("decoder." if key.startswith(("decoder_", "mask_")) else "encoder.") + key] = value
    for key in [key for key in vit if key.endswith("pos_embed")]:
        table, side = vit[key], math.isqrt(vit[key].shape[1])
        row = F.pad(table[:, : -side * side], (0, 0, 0, 1))[:, :1]  # the class token's, or zeros
        table = resize_grid(table[:, -side * side :], (side, side), (config.grid, config.grid))
        vit[key] = torch.cat([row, table], dim=1)
    return vit


def build(config, num_classes):
    """Model with random weights; config: a Config or a name in CONFIGS."""
    return MIMDet(CONFIGS[config] if isinstance(config, str) else config, num_classes)


# --- 7. Try it ------------------------------------------------------------------------------------

if __name__ == "__main__":
    torch.manual_seed(0)
    model, image = build("nano", num_classes=6).eval(), torch.rand(3, 128, 160)
    boxes = torch.tensor([[20.0, 30, 60, 80], [90, 40, 150, 110]])
    masks = torch.zeros(2, 128, 160, dtype=torch.bool)
    masks[0, 30:80, 20:60] = masks[1, 40:110, 90:150] = True
    target = dict(boxes=boxes, labels=torch.tensor([0, 3]), masks=masks)
    with torch.no_grad():
        x, sizes = pad_batch([image], 32)
        tokens, ids, stem = model.encoder(x, sizes, 0.5)
        maps = model.pyramid(x, sizes, 0.5)
        (logits, deltas), anchors = model.rpn(maps), make_anchors(maps, model.config.anchor_scale)
        rois = select_proposals(logits, deltas, anchors, sizes, 50, 50)
        rows = [
            ("image", x, ""),
            *((f"stem /{4 * 2**i}", m, "") for i, m in enumerate(stem)),
            ("kept", ids, "of 80 tokens, drawn at random for this step"),
            ("encoder", tokens, "sees nothing else"),
            ("decoder", model.decoder(tokens, ids, stem[-1]), "all 80: encoded, or from the stem"),
            *((f"p{i + 2}", p, f"{len(anchors[i])} anchors") for i, p in enumerate(maps)),
            ("proposals", rois[0], "what the RPN takes for objects"),
            ("crops", pool_rois(maps, rois, 7, model.config.anchor_scale), "for classes and boxes"),
        ]
        losses = model([image], [target])
    print(f"MIMDet nano: {sum(p.numel() for p in model.parameters()):,} parameters, not trained")
    for name, x, words in rows:
        print(f"{name:10}{str(tuple(x.shape)):18}{words}")
    kept = torch.zeros(80, dtype=torch.bool).scatter(0, ids[0], True).view(8, 10)
    print("\n".join("".join("##" if cell else " ." for cell in row) for row in kept))
    print("losses    " + "  ".join(f"{name[5:]} {loss:.2f}" for name, loss in losses.items()))
