"""SimMIM: a Simple Framework for Masked Image Modeling (Xie et al., CVPR 2022, arXiv:2111.09886).

Hide large squares of a picture behind one learned vector, send all patches through an ordinary
encoder, and predict the hidden pixels with one linear layer and an L1 loss. Nothing else is needed
to pre-train a ViT or a Swin, and each choice (mask, head, target, loss) is a field of Config.
Flow: image (B, 3, H, W), mask (B, H/p, W/p) -> patches, the hidden ones replaced (B, N, C)
      -> encoder (B, C, H/s, W/s) -> head -> pixels (B, 3, H, W)
Mask: `hide` exchanges embeddings, before positions are added (True: hidden; in Attention: seen).
Positions: fixed sine-cosine in "vit", relative tables inside the attention of "beit" and "swin".
Loss: mean over the hidden pixels of the batch. Padding: none, images are squares of one size.
Compare: mimdet.py and yolos.py begin with the encoder that is trained here; mimdet.py drops tokens
where this file replaces them.
"""

import math
import re
import zlib
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from scipy.cluster.vq import kmeans2
from scipy.interpolate import RectBivariateSpline
from scipy.ndimage import distance_transform_edt
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.swin_transformer import (
    PatchMerging,
    PatchMergingV2,
    SwinTransformerBlock,
    SwinTransformerBlockV2,
)
from torchvision.ops import StochasticDepth

# --- 1. Config ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    encoder: str = "beit"  # the paper's ViT; "vit": mimdet.py's and yolos.py's; "swin", "swin_v2"
    img_size: int = 224  # side of the images; tables and windows are made for it
    patch: int = 16  # side of the encoder's patches
    embed_dim: int = 768  # width C of the first stage
    depths: tuple = (12,)  # blocks of each stage
    num_heads: tuple = (12,)
    window: int = 7  # Swin: side of the windows, no larger than a stage's map
    drop_path: float = 0.1  # of the last block, growing linearly from 0
    mask: str = "random"  # "random" squares, one "square", BEiT's "block"s (Sec. 3.2, Fig. 2)
    mask_patch: int = 32  # side of the squares (Table 1)
    mask_ratio: float = 0.6  # share that is hidden (Table 1)
    head: str = "linear"  # "mlp2", "inverse_swin_t", "inverse_swin_b" (Table 2)
    target: str = "pixels"  # "bins8", "bins256", "color_cluster", "tokens" (Table 5)
    resolution: int = 1  # targets are images shrunk so many times (Table 3)
    loss: str = "l1"  # "l2", "smooth_l1": for pixels (Table 5)
    predict: str = "masked"  # or "all" pixels (Table 4)
    clusters: int = 512  # of "color_cluster" and "tokens"
    task: str = "pretrain"  # or "classify": the encoder with a linear classifier
    freeze: bool = False  # classify: train the classifier alone (linear probe)
    checkpoint: bool = False  # recompute blocks in the backward pass, to save memory


# fmt: off
SWIN = dict(encoder="swin", img_size=192, patch=4, depths=(2, 2, 18, 2), drop_path=0.0)
CONFIGS = {  # with the parameters in pre-training
    # Differs: a plain ViT on small patches, with squares no larger than they, so that hidden shapes
    # can be told apart after minutes. Its blocks are those of mimdet.py's nano.
    "nano": Config(encoder="vit", img_size=128, patch=8, embed_dim=192, depths=(4,), num_heads=(3,),
                   mask_patch=8, drop_path=0.0),  # 1,903,680
    "vit_base": Config(),  # 86,256,720
    "swin_base": Config(embed_dim=128, num_heads=(4, 8, 16, 32), window=6, **SWIN),  # 89,874,104
    "swin_large": Config(embed_dim=192, num_heads=(6, 12, 24, 48), window=12,
                         **SWIN),  # 199,881,204
    "swinv2_h": Config(embed_dim=352, num_heads=(11, 22, 44, 88), window=12,
                       **SWIN | dict(encoder="swin_v2")),  # 663,898,186
    "swinv2_g": Config(embed_dim=512, num_heads=(16, 32, 64, 128), window=12,
                       **SWIN | dict(encoder="swin_v2", depths=(2, 2, 42, 4))),  # 3,010,506,976
}
PAPER = dict(
    lr=4e-4, batch_size=2048, layer_decay=1.0, weight_decay=0.05, clip=5.0, epochs=800,
    # sizes is always the config's img_size
    warmup=6255,  # Differs: steps of 2048 ImageNet images; the warm-up starts at 0
    schedule=(0.875,), sizes=(224,), max_size=224, multiple=1, crop=(0.67, 1.0),
)  # the paper's ablations: lr=8e-4 epochs=100 schedule=cosine, then layer_decay=0.9 to fine-tune
# Differs: no mixup, cutmix, RandAugment, erasing and label smoothing; pictures become squares in
# evaluation too; the cosine begins after the warm-up and ends at 0, released: 1e-6.
CLASSIFY = PAPER | dict(
    lr=5e-3, layer_decay=0.65, epochs=100, schedule="cosine", crop=(0.08, 1.0),
    warmup=12510,  # Differs: at most a tenth of the run, here half of the released 20 epochs
)
NANO = dict(
    lr=1e-3, batch_size=8, layer_decay=1.0, weight_decay=0.05, clip=5.0, epochs=1.5, warmup=100,
    schedule="cosine", sizes=(128,), max_size=128, multiple=1, crop=(0.67, 1.0),
)
RECIPES = {  # by variant-task, variant, task or head; the others train by "paper"
    "nano": NANO,
    "nano-classify": NANO | dict(batch_size=32, epochs=3, crop=(0.5, 1.0), layer_decay=0.75),
    "paper": PAPER,
    "classify": CLASSIFY,
    # As classifiers the paper's Swins have drop_path 0.1 and 0.2: give it by --set.
    "swin_base-classify": CLASSIFY | dict(layer_decay=0.8),
    "swin_large-classify": CLASSIFY | dict(layer_decay=0.7),
    "swinv2_h-classify": CLASSIFY | dict(layer_decay=0.7),
    "swinv2_g-classify": CLASSIFY | dict(layer_decay=0.7),
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


def trunc_normal(*shape):
    return nn.init.trunc_normal_(torch.empty(shape), std=0.02)


# --- 3. This paper --------------------------------------------------------------------------------


def draw_mask(kind, cells, ratio, generator, side=16):
    """Which cells of a grid (h, w) are hidden: (h, w) bool, ceil(ratio * h * w) of them.

    "random": any cells; "square": one square at a random place, of about that many; "block": BEiT's
    rectangles of at least 64 x 64 pixels, one after another (arXiv:2106.08254, Alg. 1). side: of a
    cell, in pixels.
    Differs: where no rectangle fits in ten tries a part of the last one fills up what is wanted.
    """
    h, w = cells
    wanted = math.ceil(h * w * ratio)
    mask = torch.zeros(h, w, dtype=torch.bool)

    def draw(low, high):  # a whole number, both ends included
        return int(torch.randint(low, high + 1, (), generator=generator))

    if kind == "random":
        mask.view(-1)[torch.randperm(h * w, generator=generator)[:wanted]] = True
    elif kind == "square":
        most = min(h, w) - (h == w > 1 and ratio < 1)  # or nothing would be left to see
        length = min(most, max(1, round(math.sqrt(wanted))))
        y, x = draw(0, h - length), draw(0, w - length)
        mask[y : y + length, x : x + length] = True
    elif kind == "block":
        least, tries = min(wanted, (64 / side) ** 2), 0
        while (left := wanted - int(mask.sum())) > 0:
            area, aspect = torch.rand(2, generator=generator).tolist()
            area = least + area * (max(least, left) - least)
            aspect = 0.3 ** (1 - 2 * aspect)
            rows, columns = (max(1, round(math.sqrt(s))) for s in (area * aspect, area / aspect))
            y, x = draw(0, max(0, h - rows)), draw(0, max(0, w - columns))
            block = mask[y : y + rows, x : x + columns]
            fresh, tries = (~block).nonzero(), tries + 1
            if tries == 10 or (rows < h and columns < w and len(fresh) <= left):
                fresh, tries = fresh[:left], 0
                block[fresh[:, 0], fresh[:, 1]] = True
    else:
        raise ValueError(f'mask must be "random", "square" or "block", not "{kind}"')
    return mask


def avg_dist(mask, patch):
    """Mean distance in pixels from a hidden pixel to the nearest visible one (Sec. 4.1.2, Fig. 3).

    mask: (h, w) bool of patches with a side of `patch` pixels. NaN if all or none are hidden.
    """
    pixels = np.asarray(mask).repeat(patch, 0).repeat(patch, 1)
    if pixels.all() or not pixels.any():
        return math.nan
    return float(distance_transform_edt(pixels)[pixels].mean())


def hide(tokens, mask, mask_token):
    """Tokens (B, N, C) of which those with mask (B, h, w) are replaced by the token (1, 1, C)."""
    return tokens if mask is None else torch.where(mask.flatten(1)[..., None], mask_token, tokens)


class ViT(nn.Module):
    """A plain ViT of the detectors' blocks, with fixed sine-cosine positions and a class token."""

    def __init__(self, c):
        super().__init__()
        self.stride, self.width, self.recompute = c.patch, c.embed_dim, c.checkpoint
        self.grid = c.img_size // c.patch
        self.patch_embed = PatchEmbed(c.embed_dim, c.patch)
        self.cls_token = nn.Parameter(trunc_normal(1, 1, c.embed_dim))
        if c.task == "pretrain":
            self.mask_token = nn.Parameter(trunc_normal(1, 1, c.embed_dim))
        self.pos_embed = nn.Parameter(sincos_pos_embed(c.embed_dim, self.grid), requires_grad=False)
        (depth,), (heads,) = c.depths, c.num_heads
        rates = [c.drop_path * i / max(1, depth - 1) for i in range(depth)]
        self.blocks = nn.ModuleList(Block(c.embed_dim, heads, drop_path=rate) for rate in rates)
        self.norm = nn.LayerNorm(c.embed_dim, eps=1e-6)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, x, mask=None):
        """Normalised images (B, 3, H, W), mask (B, H/p, W/p) bool -> (B, C, H/p, W/p)."""
        x = self.patch_embed(x)  # (B, C, H/p, W/p)
        grid = x.shape[2:]
        x = x.flatten(2).transpose(1, 2)  # (B, N, C)
        x = hide(x, mask, getattr(self, "mask_token", None))
        first, table = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        x = x + resize_grid(table, (self.grid, self.grid), grid)
        x = torch.cat([(self.cls_token + first).expand(len(x), -1, -1), x], dim=1)
        x = self.norm(run_blocks(self.blocks, x, self.recompute))  # (B, 1 + N, C)
        return x[:, 1:].transpose(1, 2).unflatten(2, grid)


class RelativePositionBias(nn.Module):
    """What is added to the attention of each pair of patches, or class token, of a grid (BEiT)."""

    def __init__(self, grid, num_heads):
        super().__init__()
        rows = (2 * grid - 1) ** 2
        self.relative_position_bias_table = nn.Parameter(torch.zeros(rows + 3, num_heads))
        y, x = torch.arange(grid * grid) // grid, torch.arange(grid * grid) % grid
        index = (y[:, None] - y + grid - 1) * (2 * grid - 1) + x[:, None] - x + grid - 1
        index = F.pad(index, (1, 0, 1, 0), value=rows)  # from the class token
        index[1:, 0], index[0, 0] = rows + 1, rows + 2  # to it; to itself
        self.register_buffer("relative_position_index", index, persistent=False)

    def forward(self):
        bias = self.relative_position_bias_table[self.relative_position_index]  # (N, N, h)
        return bias.permute(2, 0, 1).contiguous()  # or a GPU's attention is not the fused one


class BEiTAttention(nn.Module):
    """Attention with a bias for each pair of places, and none for the keys."""

    def __init__(self, dim, num_heads, grid):
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"width {dim} cannot be shared by {num_heads} heads")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias, self.v_bias = (nn.Parameter(torch.zeros(dim)) for _ in range(2))
        self.proj = nn.Linear(dim, dim)
        self.bias = RelativePositionBias(grid, num_heads) if grid else None

    def forward(self, x, bias):
        B, N, C = x.shape
        bias = self.bias() if self.bias else bias  # (h, N, N)
        qkv_bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, qkv_bias).reshape(B, N, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, h, N, d)
        bias = bias[None].to(q.dtype)  # with four dimensions prediction gets the fused kernel
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)  # (B, h, N, d)
        return self.proj(x.transpose(1, 2).reshape(B, N, C))  # (B, N, C)


class BEiTBlock(nn.Module):
    """Pre-norm block whose residuals are scaled by learned vectors, at first 0.1 (BEiT)."""

    def __init__(self, dim, num_heads, drop_path, grid):
        super().__init__()
        self.gamma_1, self.gamma_2 = (nn.Parameter(torch.full((dim,), 0.1)) for _ in range(2))
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = BEiTAttention(dim, num_heads, grid)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)
        self.drop_path = StochasticDepth(drop_path, "row")

    def forward(self, x, bias):
        x = x + self.drop_path(self.gamma_1 * self.attn(self.norm1(x), bias))
        return x + self.drop_path(self.gamma_2 * self.mlp(self.norm2(x)))


class BEiT(nn.Module):
    """The paper's ViT: relative positions alone, in one table while pre-training (Sec. 4.2).

    For classification each block has a table, and the norm comes after the mean over patches.
    Initial weights are cut off at one standard deviation in pre-training alone, as released.
    """

    def __init__(self, c):
        super().__init__()
        self.stride, self.width, self.recompute = c.patch, c.embed_dim, c.checkpoint
        self.grid, pretrains = c.img_size // c.patch, c.task == "pretrain"
        self.patch_embed = PatchEmbed(c.embed_dim, c.patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, c.embed_dim))
        (depth,), (heads,) = c.depths, c.num_heads
        if pretrains:
            self.mask_token = nn.Parameter(torch.zeros(1, 1, c.embed_dim))
            self.rel_pos_bias = RelativePositionBias(self.grid, heads)
            self.norm = nn.LayerNorm(c.embed_dim, eps=1e-6)
        rates = [c.drop_path * i / max(1, depth - 1) for i in range(depth)]
        grid = None if pretrains else self.grid  # of the tables that the blocks have themselves
        self.blocks = nn.ModuleList(BEiTBlock(c.embed_dim, heads, rate, grid) for rate in rates)
        cut = 0.02 if pretrains else 2.0
        for name, p in self.named_parameters():
            if p.ndim > 1 and not name.endswith("bias_table"):
                nn.init.trunc_normal_(p, std=0.02, a=-cut, b=cut)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        for i, block in enumerate(self.blocks, start=1):
            for layer in (block.attn.proj, block.mlp.fc2):
                layer.weight.data /= math.sqrt(2 * i)

    def forward(self, x, mask=None):
        """As ViT's; without its last norm when it classifies."""
        x = self.patch_embed(x)  # (B, C, H/p, W/p)
        if x.shape[2:] != (self.grid, self.grid):
            side = self.grid * self.stride
            raise ValueError(f"this encoder's tables are made for images of {side} x {side} pixels")
        x = x.flatten(2).transpose(1, 2)  # (B, N, C)
        x = hide(x, mask, getattr(self, "mask_token", None))
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        pretrains = hasattr(self, "norm")
        bias = self.rel_pos_bias() if pretrains else None  # (h, 1 + N, 1 + N)
        x = run_blocks([partial(block, bias=bias) for block in self.blocks], x, self.recompute)
        x = (self.norm(x) if pretrains else x)[:, 1:]
        return x.transpose(1, 2).unflatten(2, (self.grid, self.grid))


class SwinEmbed(PatchEmbed):
    """Patches, 4x4 in the paper, and a LayerNorm, channels last: (B, H/p, W/p, C)."""

    def __init__(self, dim, patch):
        super().__init__(dim, patch)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x):
        return self.norm(super().forward(x).permute(0, 2, 3, 1))


class Swin(nn.Module):
    """Swin transformer, v1 or v2, of torchvision's blocks (arXiv:2103.14030, 2111.09883).

    Positions are relative tables of each window, added in its attention. A window is no larger than
    its stage's map, which then needs no shift (released code).
    """

    def __init__(self, c):
        super().__init__()
        self.stride = c.patch * 2 ** (len(c.depths) - 1)
        self.width, self.recompute = c.embed_dim * 2 ** (len(c.depths) - 1), c.checkpoint
        v2 = c.encoder == "swin_v2"
        merging = PatchMergingV2 if v2 else PatchMerging
        if v2 and (c.img_size <= self.stride or c.window < 2):
            raise ValueError(f"swin_v2: img_size from {2 * self.stride} on, window from 2 on")
        self.patch_embed = SwinEmbed(c.embed_dim, c.patch)
        if c.task == "pretrain":
            self.mask_token = nn.Parameter(trunc_normal(1, 1, c.embed_dim))
        self.layers, index, total = nn.ModuleList(), 0, max(1, sum(c.depths) - 1)
        for s, (depth, heads) in enumerate(zip(c.depths, c.num_heads, strict=True)):
            dim, side = c.embed_dim * 2**s, c.img_size // (c.patch * 2**s)
            if heads < 1 or dim % heads:
                raise ValueError(f"width {dim} cannot be shared by {heads} heads")
            window = min(c.window, side)
            if side % window:  # torchvision would pad the map and attend to the padding
                raise ValueError(f"a map of {side} x {side} is no multiple of window={window}")
            rates = [c.drop_path * (index + j) / total for j in range(depth)]
            index += depth
            stage = swin_stage(dim, heads, window, rates, v2)
            downsample = merging(dim) if s < len(c.depths) - 1 else nn.Identity()
            self.layers.append(nn.ModuleDict({"blocks": stage, "downsample": downsample}))
        self.norm = nn.LayerNorm(self.width)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x, mask=None):
        """As ViT's, at a quarter of the patches a stage: (B, 8 * C, H/32, W/32)."""
        x = self.patch_embed(x)  # (B, H/4, W/4, C)
        grid = x.shape[1:3]
        x = hide(x.flatten(1, 2), mask, getattr(self, "mask_token", None)).unflatten(1, grid)
        for layer in self.layers:
            x = layer["downsample"](run_blocks(layer["blocks"], x, self.recompute))
        return self.norm(x).permute(0, 3, 1, 2)  # (B, 8 * C, H/32, W/32)


def swin_stage(dim, num_heads, window, rates, v2=False):
    """Blocks of a stage, every second one with shifted windows (if there is more than one)."""
    block = SwinTransformerBlockV2 if v2 else SwinTransformerBlock
    return nn.ModuleList(
        block(dim, num_heads, [window] * 2, [window // 2 * (j % 2)] * 2, stochastic_depth_prob=rate)
        for j, rate in enumerate(rates)
    )


ENCODERS = {"vit": ViT, "beit": BEiT, "swin": Swin, "swin_v2": Swin}

# --- 4. Boxes -------------------------------------------------------------------------------------
# None: pixels alone.

# --- 5. Heads and losses --------------------------------------------------------------------------


class InverseSwin(nn.Module):
    """Swin's stages backwards, from stride 32 up to 4: a decoder that is too good (Table 2).

    Differs: 0.2 and 0.3 M parameters fewer than told (115.2, 174.8); no code of it is released.
    """

    def __init__(self, width, stride, dim, depths, out, up):
        super().__init__()
        steps = int(math.log2(stride // 4))  # doublings
        dims = [dim * 2**s for s in range(steps, -1, -1)]
        self.proj = nn.Conv2d(width, dims[0], 1)
        self.stages = nn.ModuleList(
            swin_stage(d, d // 32, 6, [0.0] * depth)
            for d, depth in zip(dims, depths[::-1][: steps + 1], strict=True)
        )
        self.expand = nn.ModuleList(nn.Linear(d, 2 * d, bias=False) for d in dims[:-1])
        self.norm = nn.LayerNorm(dim)
        self.out = pixel_layers(dim, out, up * 4 // stride)

    def forward(self, x):
        x = self.proj(x).permute(0, 2, 3, 1)  # (B, H/s, W/s, C)
        for i, stage in enumerate(self.stages):
            x = run_blocks(stage, x)
            if i < len(self.expand):
                x = F.pixel_shuffle(self.expand[i](x).permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
        return self.out(self.norm(x).permute(0, 3, 1, 2))


def pixel_layers(width, out, up):
    """A linear layer that makes up * up places of each place: (B, width, h, w) -> (B, out, ...)."""
    return nn.Sequential(nn.Conv2d(width, out * up * up, 1), nn.PixelShuffle(up))


def make_head(kind, width, stride, out, resolution):
    """The prediction head: maps (B, width, H/s, W/s) -> (B, out, H/r, W/r)."""
    if resolution < 1 or stride % resolution:
        raise ValueError(f"resolution must divide the encoder's stride {stride}")
    up = stride // resolution
    if kind == "linear":
        return pixel_layers(width, out, up)
    if kind == "mlp2":
        hidden = [nn.Conv2d(width, width, 1), nn.GELU()]
        return nn.Sequential(*hidden, *pixel_layers(width, out, up))
    doubles = stride in (4, 8, 16, 32)
    if kind in ("inverse_swin_t", "inverse_swin_b") and resolution <= 4 and doubles:
        dim, depths = {"t": (96, (2, 2, 6, 2)), "b": (128, (2, 2, 18, 2))}[kind[-1]]
        return InverseSwin(width, stride, dim, depths, out, up)
    raise ValueError('head: "linear", "mlp2" or, up to a resolution of 4, "inverse_swin_t/b"')


def check_choices(c):
    """Raises ValueError for values of Config's fields that do not exist."""
    if min(c.img_size, c.patch, c.mask_patch, c.embed_dim, c.clusters, c.window) < 1:
        names = "img_size, patch, mask_patch, embed_dim, clusters and window"
        raise ValueError(f"{names}: 1 or more")
    choices = {
        "encoder": ENCODERS,
        "mask": ("random", "square", "block"),
        "predict": ("masked", "all"),
        "task": ("pretrain", "classify"),
    }
    for field, known in choices.items():
        if getattr(c, field) not in known:
            raise ValueError(f"{field} is one of {', '.join(known)}, not {getattr(c, field)}")
    if c.task == "pretrain" and (c.img_size % c.mask_patch or c.mask_patch % c.patch):
        raise ValueError("mask_patch must divide img_size, and patch mask_patch")
    if not 0 < c.mask_ratio <= 1 or len(c.depths) != len(c.num_heads):
        raise ValueError("mask_ratio is a share, and each stage has depths and num_heads")
    if c.freeze and c.task != "classify":
        raise ValueError("freeze goes with task=classify")


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def normalise(x):
    """Pixels (..., 3, H, W) in [0, 1] -> ImageNet's mean 0 and standard deviation 1."""
    mean, std = (x.new_tensor(v)[:, None, None] for v in (MEAN, STD))
    return (x - mean) / std


def denormalise(x):
    mean, std = (x.new_tensor(v)[:, None, None] for v in (MEAN, STD))
    return x * std + mean


PIXEL_LOSSES = {"l1": F.l1_loss, "l2": F.mse_loss, "smooth_l1": F.smooth_l1_loss}


class Target(nn.Module):
    """What a masked place should be answered with, and how far an answer is from it (Table 5).

    `out` numbers are predicted for each place of images shrunk `resolution` times.
    Differs: "tokens" are the nearest of `clusters` patches found by k-means, where the paper takes
    BEiT's trained dVAE; "color_cluster" has a palette of the data at hand, not iGPT's.
    """

    def __init__(self, c, stride):
        super().__init__()
        self.kind, self.loss = c.target, c.loss
        if c.loss not in PIXEL_LOSSES:
            raise ValueError(f"loss must be one of {', '.join(PIXEL_LOSSES)}, not {c.loss}")
        self.resolution = stride if c.target == "tokens" else c.resolution
        self.side = stride if c.target == "tokens" else 1  # of what a code stands for
        sizes = {"pixels": 3, "bins8": 3 * 8, "bins256": 3 * 256}
        self.out = sizes.get(c.target, c.clusters)
        if c.target in ("color_cluster", "tokens"):
            self.register_buffer("codes", torch.zeros(c.clusters, 3 * self.side**2))
        elif c.target not in sizes:
            raise ValueError(f"target must be one of {', '.join(sizes)}, color_cluster, tokens")

    def shrink(self, x):
        return F.avg_pool2d(x, self.resolution) if self.side == 1 else x

    def pieces(self, x):
        """Pixels or patches, as rows (B, h * w, 3 * side * side)."""
        return F.unfold(self.shrink(x), self.side, stride=self.side).transpose(1, 2)

    def fit(self, images):
        """Find the codes by k-means over normalised pictures (n, 3, H, W)."""
        rows = self.pieces(images).flatten(0, 1)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
        rows = rows[order[: 64 * len(self.codes)]].double().numpy()
        # From different pieces, drawn; k-means++ would take minutes to draw 512 better ones.
        start = np.random.default_rng(0).permutation(np.unique(rows, axis=0))
        found, _ = kmeans2(rows, np.resize(start, self.codes.shape), minit="matrix")
        self.codes.copy_(torch.from_numpy(found))

    def error(self, found, x):
        """Error (B, h, w) of predictions (B, out, h, w) for normalised images (B, 3, H, W)."""
        if self.kind == "pixels":
            loss = PIXEL_LOSSES[self.loss]
            return loss(found, self.shrink(x), reduction="none").mean(dim=1)
        if hasattr(self, "codes"):
            wanted = torch.cdist(self.pieces(x), self.codes[None]).argmin(dim=2)  # (B, h * w)
            return F.cross_entropy(found, wanted.unflatten(1, found.shape[2:]), reduction="none")
        bins = self.out // 3
        wanted = (denormalise(self.shrink(x)) * bins).long().clamp(0, bins - 1)  # (B, 3, h, w)
        found = found.unflatten(1, (bins, 3))  # (B, bins, 3, h, w)
        return F.cross_entropy(found, wanted, reduction="none").mean(dim=1)

    def picture(self, found):
        """Predictions (B, out, h, w) as normalised images (B, 3, H, W)."""
        if self.kind == "pixels":
            x = found
        elif hasattr(self, "codes"):
            rows = self.codes[found.argmax(dim=1)].flatten(1, 2).transpose(1, 2)  # (B, 3 s s, n)
            size = [self.side * n for n in found.shape[2:]]
            x = F.fold(rows, size, self.side, stride=self.side)  # (B, 3, H, W)
        else:
            bins = self.out // 3
            share = (found.unflatten(1, (bins, 3)).argmax(dim=1) + 0.5) / bins  # (B, 3, h, w)
            x = normalise(share)
        return x if self.side > 1 else F.interpolate(x, scale_factor=float(self.resolution))


# --- 6. Model -------------------------------------------------------------------------------------


class SimMIM(nn.Module):
    """Encoder and a light head that predicts what is hidden (Fig. 1); or encoder and classifier."""

    def __init__(self, config, num_classes):
        super().__init__()
        c = self.config = config
        check_choices(c)
        self.encoder = ENCODERS[c.encoder](replace(c, drop_path=0.0) if c.freeze else c)
        width, stride = self.encoder.width, self.encoder.stride
        if c.img_size % stride:
            raise ValueError(f"img_size must be a multiple of the stride, {stride}")
        if c.task == "classify":
            after = c.encoder == "beit"  # its norm comes after the mean over patches
            self.fc_norm = nn.LayerNorm(width, eps=1e-6) if after else nn.Identity()
            self.head = nn.Linear(width, num_classes)
            nn.init.zeros_(self.head.bias)
            nn.init.trunc_normal_(self.head.weight, std=0.02)
            self.head.weight.data *= 0.001 if after else 1  # as released
            if c.freeze:
                self.encoder.requires_grad_(False)
                self.fc_norm.requires_grad_(False)
        else:
            self.target = Target(c, stride)
            self.decoder = make_head(c.head, width, stride, self.target.out, self.target.resolution)

    def forward(self, images, targets=None, sizes=None, mask=None):
        """Loss if there are targets, else answers.

        images: list of (3, h, w) floats in [0, 1], all of one size that mask_patch divides.
        targets: list of dicts, of which "classify" reads labels (1,). mask: (B, H/p, W/p) bool, in
        training drawn at random by default, else from the pictures themselves; B may be 1. Returns
        dict(loss_name=scalar), or a list of dict(reconstruction (3, h, w) with the visible patches
        pasted back, masked (3, h, w), mask (h, w) bool, l1: mean error of the hidden pixels in
        units of the normalised image, baseline: the same for the mean visible colour); of
        dict(logits (K,)) for "classify". sizes is not used.
        """
        x = normalise(torch.stack(images))  # (B, 3, H, W)
        if self.config.task == "classify":
            logits = self.head(self.fc_norm(self.encoder(x).mean(dim=(2, 3)))).float()  # (B, K)
            if targets is None:
                return [dict(logits=row) for row in logits]
            labels = torch.cat([t["labels"] for t in targets])  # (B,)
            return {"loss_cls": F.cross_entropy(logits, labels)}
        if mask is None:
            mask = self.draw_masks(images, targets is None).to(x.device)  # (B, H/p, W/p)
        mask = mask.expand(len(x), -1, -1)  # or one for all
        found = self.decoder(self.encoder(x, mask)).float()  # (B, out, H/r, W/r)
        if targets is not None:
            return {"loss_mim": self.masked_loss(found, x, mask)}
        return self.answers(found, x, mask)

    def draw_masks(self, images, fixed):
        """Masks (B, H/p, W/p); fixed: each decided by its picture, whatever its company.

        Differs: drawn by PyTorch's generator, by NumPy's in the released code.
        """
        c, masks = self.config, []
        for image in images:
            generator = None
            if fixed:
                content = (image * 255).byte().cpu().numpy().tobytes()
                generator = torch.Generator().manual_seed(zlib.crc32(content))
            cells = [side // c.mask_patch for side in image.shape[1:]]
            masks.append(draw_mask(c.mask, cells, c.mask_ratio, generator, c.mask_patch))
        scale = c.mask_patch // c.patch
        return torch.stack(masks).repeat_interleave(scale, 1).repeat_interleave(scale, 2)

    def masked_loss(self, found, x, mask):
        """Error summed over the hidden places of the whole batch, by their number (Sec. 3.4)."""
        error = self.target.error(found, x)  # (B, h, w)
        if self.config.predict == "all":
            return error.mean()
        weight = F.interpolate(mask[:, None].float(), size=error.shape[1:], mode="area")[:, 0]
        return (error * weight).sum() / (weight.sum() + 1e-5)

    def answers(self, found, x, mask):
        hidden = F.interpolate(mask[:, None].float(), size=x.shape[2:]).bool()  # (B, 1, H, W)
        guess = self.target.picture(found)  # (B, 3, H, W)
        visible = (x * ~hidden).sum(dim=(2, 3)) / (~hidden).sum(dim=(2, 3)).clamp(min=1)  # (B, 3)
        count = 3 * hidden.sum(dim=(1, 2, 3)).clamp(min=1)
        errors = [
            ((x - other).abs() * hidden).sum(dim=(1, 2, 3)) / count
            for other in (guess, visible[:, :, None, None])
        ]
        pictures = [denormalise(torch.where(hidden, y, x)) for y in (guess, torch.zeros_like(x))]
        parts = zip(*pictures, hidden[:, 0], *errors, strict=True)
        names = ("reconstruction", "masked", "mask", "l1", "baseline")
        return [dict(zip(names, part, strict=True)) for part in parts]

    @property
    def wants_pictures(self):
        """Whether training has to begin with `prepare`."""
        codes = getattr(getattr(self, "target", None), "codes", None)
        return codes is not None and not codes.any()

    @torch.no_grad()
    def prepare(self, images):
        """Look at some pictures, a list of (3, H, W) in [0, 1], and find the target's codes."""
        self.target.fit(normalise(torch.stack(images)))

    def every_layer(self, images):
        """Every layer once: what --summary counts."""
        x = self.encoder(torch.stack(images))  # (B, C, H/s, W/s)
        return self.head(x.mean(dim=(2, 3))) if self.config.task == "classify" else self.decoder(x)


def param_groups(model, recipe):
    """AdamW's groups, `lr_scale` a factor on the learning rate (released code's layer decay).

    Each block learns at layer_decay times the rate of the next, the head at 1. No weight decay for
    1-D parameters and the class token; with Swin for the mask token, and in classifying for the
    relative tables.
    """
    groups, depths = {}, model.config.depths
    exempt = ["cls_token"]
    if model.config.encoder.startswith("swin"):
        exempt += ["mask_token"]
        exempt += ["bias_table"] if model.config.task == "classify" else []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        layer = sum(depths) + 1
        if found := re.match(r"encoder\.(?:layers\.(\d)\.)?(?:blocks\.(\d+)|downsample)", name):
            stage = int(found[1] or 0)
            block = int(found[2] or depths[stage] - 1)  # downsampling: with its stage's last block
            layer = 1 + sum(depths[:stage]) + block
        elif name.startswith("encoder.") and not name.startswith("encoder.norm"):
            layer = 0
        scale = recipe["layer_decay"] ** (sum(depths) + 1 - layer)
        decays = p.ndim > 1 and not name.endswith(tuple(exempt))
        group = dict(params=[], lr_scale=scale, weight_decay=recipe["weight_decay"] * decays)
        groups.setdefault((scale, decays), group)["params"].append(p)
    return [*groups.values()]


def resize_bias_table(table, rows):
    """Relative table (a * a [+ 3], h) -> (rows, h) by BEiT's scheme: near places keep their detail.

    Steps between the old places grow geometrically outwards, so that they span the new, and a
    bicubic spline is read at whole numbers. As released, they grow by 1.01 to 1.5 each: of a larger
    table the middle is taken. The class token's three rows are kept.
    """
    extra = 3 if math.isqrt(len(table)) ** 2 != len(table) else 0
    old, new = math.isqrt(len(table) - extra), math.isqrt(rows - extra)
    if old == new:
        return table
    half, reach = old // 2, new // 2
    grids = table[: old * old].double().T.reshape(-1, old, old)
    if half < 2:  # too small for a spline
        grids = F.interpolate(grids[None], size=new, mode="bilinear", align_corners=True)[0]
    else:
        low, high = 1.01, 1.5
        while high - low > 1e-6:  # no closer than released
            q = (low + high) / 2
            low, high = (low, q) if sum(q**i for i in range(half)) > reach else (q, high)
        steps = np.cumsum([q**i for i in range(half)])
        places, wanted = np.r_[-steps[::-1], 0, steps], np.arange(-reach, reach + 1)
        splines = (RectBivariateSpline(places, places, z) for z in grids.numpy())
        grids = torch.from_numpy(np.stack([spline(wanted, wanted) for spline in splines]))
    return torch.cat([grids.flatten(1).T.to(table), table[old * old :]])


RENAMES = [
    (r"^(patch_embed|blocks|layers|cls_token|norm)", r"encoder.\1"),
    (r"(layers\.\d\.blocks\.\d+\.mlp)\.fc1", r"\1.0"),
    (r"(layers\.\d\.blocks\.\d+\.mlp)\.fc2", r"\1.3"),
    (r"(?<!\.layers\.\d)(\.blocks\.\d+\.attn)\.relative", r"\1.bias.relative"),
]


def from_official(state_dict, config=CONFIGS["vit_base"]):
    """Checkpoint of the authors, or of this file, in the names of a model of this config.

    Reads pre-training and fine-tuning files, ViT and Swin. To fine-tune what was pre-trained, the
    head for pixels is left out, the shared table copied into every block, and tables are resized to
    the config's windows (released code's remapping). To go on pre-training they are not resized.
    """
    state, classify = {}, config.task == "classify"
    for key, value in state_dict.get("model", state_dict).items():
        for pattern, name in RENAMES:
            key = re.sub(pattern, name, key)
        if not key.endswith(("relative_position_index", "attn_mask")):
            state[key] = value
    if not classify:
        return state
    shared = state.pop("encoder.rel_pos_bias.relative_position_bias_table", None)
    if shared is not None:
        name = "encoder.blocks.{}.attn.bias.relative_position_bias_table"
        state |= {name.format(i): shared for i in range(config.depths[0])}
    no_place = ["decoder.", "target.", "encoder.mask_token"]
    no_place += ["encoder.norm."] if config.encoder == "beit" else []
    state = {k: v for k, v in state.items() if not k.startswith(tuple(no_place))}
    with torch.device("meta"):
        wanted = SimMIM(config, 1).state_dict()
    for key in state:
        if key.endswith("relative_position_bias_table") and key in wanted:
            state[key] = resize_bias_table(state[key], len(wanted[key]))
    return state


def build(config, num_classes):
    """Model with random weights; config: a Config or a name in CONFIGS."""
    return SimMIM(CONFIGS[config] if isinstance(config, str) else config, num_classes)


# --- 7. Try it ------------------------------------------------------------------------------------

if __name__ == "__main__":
    torch.manual_seed(0)
    model, image = build("nano", num_classes=6).eval(), torch.full((3, 128, 128), 0.2)
    y, x = torch.meshgrid(torch.arange(128), torch.arange(128), indexing="ij")
    image[0, (y - 64) ** 2 + (x - 64) ** 2 < 40**2] = 0.9  # a red disc
    print(f"SimMIM nano: {sum(p.numel() for p in model.parameters()):,} parameters, not trained")
    with torch.no_grad():
        mask = model.draw_masks([image], fixed=True)  # (1, 16, 16)
        tokens = model.encoder(image[None], mask)
        answer = model([image])[0]
        rows = [
            ("image", image[None], ""),
            ("encoder", tokens, "a vector for every patch, also where a mask token stood in"),
            ("head", model.decoder(tokens), "one linear layer"),
        ]
    print("\n".join("".join("##" if cell else " ." for cell in row) for row in mask[0]))
    print(f"mask      {int(mask.sum())} of {mask.numel()} patches hidden")
    for name, x, words in rows:
        print(f"{name:10}{str(tuple(x.shape)):18}{words}")
    l1, baseline = answer["l1"], answer["baseline"]
    print(f"L1        {l1:.2f} where hidden; {baseline:.2f} for the mean colour")
    for kind, side in (("random", 8), ("random", 32), ("block", 8), ("square", 8)):
        drawn = draw_mask(kind, (128 // side,) * 2, 0.6, torch.Generator().manual_seed(0), side)
        print(f"AvgDist   {avg_dist(drawn, side):4.1f} px to a visible one: {kind}, {side} px")
