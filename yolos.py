"""YOLOS: a plain ViT as an object detector (Fang et al., NeurIPS 2021, arXiv:2106.00666).

Take a ViT trained on ImageNet, exchange its class token's job for 100 learnable [DET] tokens, and
read one object, or none, from each of them at the end: no pyramid, no anchors, no region of
interest, no non-maximum suppression, nothing two-dimensional but the patches. How far that goes
says how much of a detector is in the pre-trained sequence model itself.
Flow: image (B, 3, H, W) -> patches (B, N, C) -> [class, patches, DET] (B, 1 + N + Q, C) -> blocks
      -> last Q tokens (B, Q, C) -> logits (B, Q, K + 1), boxes (B, Q, 4)
Positions: a learned table, resized to each image; in -S and -B more between the blocks.
Loss: class by the weights of all tokens, "no object" 0.1; boxes by the objects of the batch.
Padding: no token attends to it; in training nano's conv stem has it in its GroupNorm. In prediction
      only images of equal padded size share a batch.
Compare: mimdet.py puts the same blocks under a pyramid and Mask R-CNN; pvt.py's DETR head has the
same matching and losses, but a decoder of its own.
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import StochasticDepth, box_area, box_convert, generalized_box_iou

# --- 1. Config ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    embed_dim: int = 768  # width C of the sequence
    depth: int = 12  # blocks
    num_heads: int = 12
    patch: int = 16  # side of the patches; 16 with stem="conv"
    det_tokens: int = 100  # Q: at most so many objects are found in an image (Sec. 3.1)
    pos_grid: tuple = (50, 84)  # patches (h, w) in the stored position table: 800 x 1344 px
    mid_pos_grid: tuple = (50, 84)  # of the tables added between the blocks; () has none (Table 9)
    no_object_weight: float = 0.1  # of the tokens without an object in the classification loss
    checkpoint: bool = False  # recompute blocks in the backward pass, to save memory
    # The departures of nano, which learns from scratch in minutes; off in the paper's variants.
    stem: str = "patch"  # "patch": one convolution; "conv": MIMDet's four 3x3 ones
    reference_points: bool = False  # [DET] tokens stand on a grid: positions, boxes and matching
    patch_loss: float = 0.0  # weight of the same losses on patches, matched to what covers them
    xavier: bool = False  # initial weights of the blocks: Xavier instead of normal with std 0.02


# fmt: off
CONFIGS = {  # with the parameters for 80 classes, and for the authors' 91
    # Differs: stem, reference_points, patch_loss and xavier, because plain YOLOS learns next to
    # nothing from scratch in minutes (Table 2: 19.7 AP after 600 epochs).
    "nano": Config(embed_dim=128, depth=3, num_heads=2, det_tokens=25, pos_grid=(10, 10),
                   mid_pos_grid=(), stem="conv", reference_points=True, patch_loss=1.0,
                   xavier=True),  # 805,733
    "tiny": Config(embed_dim=192, num_heads=3, pos_grid=(50, 83),
                   mid_pos_grid=()),  # 6,486,613; 6,488,736
    "small": Config(embed_dim=384, num_heads=6, pos_grid=(32, 54),
                    mid_pos_grid=(32, 54)),  # 30,680,533; 30,684,768
    "small_dwr": Config(embed_dim=330, depth=14, num_heads=6, pos_grid=(32, 54),
                        mid_pos_grid=(32, 54)),  # 27,558,055; 27,561,696
    "base": Config(),  # 127,789,909; 127,798,368
}
PAPER = dict(
    lr=2.5e-5, batch_size=8, weight_decay=1e-4, clip=0.1, epochs=150, warmup=0,
    schedule="cosine",  # Differs: falls with every step, to 0; released: every epoch, to 1e-7
    sizes=tuple(range(480, 801, 16)), max_size=1333, multiple=16,  # sides are cut to multiples
    crop=(384, 600),  # every second image: resized to 400, 500 or 600, then cropped to such sides
)
RECIPES = {  # by variant-task, variant, task or head; the others train by "paper"
    # nano: images keep their own size (sizes=()) up to a long side of 320.
    "nano": dict(lr=8e-4, batch_size=8, weight_decay=0.05, clip=1.0, epochs=11, warmup=100,
                 schedule="cosine", sizes=(), max_size=320, multiple=16, crop=()),
    "paper": PAPER,
    "tiny": PAPER | dict(lr=5e-5, batch_size=16, epochs=300, max_size=1013,
                         sizes=(*range(256, 512, 16), *range(528, 609, 16), 512)),
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


class Backbone(nn.Module):
    """ViT over the sequence [class token, patches, [DET] tokens] (Sec. 3.1, Eq. 1 and 2)."""

    def __init__(self, c):
        super().__init__()
        self.config = c
        if c.patch < 1 or c.stem != "patch" and (c.stem, c.patch) != ("conv", 16):
            raise ValueError('give stem="patch" and a patch, or stem="conv" and patch=16')
        grids = [c.pos_grid, c.mid_pos_grid or c.pos_grid]
        if c.det_tokens < 1 or any(len(grid) != 2 or min(grid) < 1 for grid in grids):
            raise ValueError("give det_tokens of 1 or more, and position grids like 50,84")
        if c.reference_points and c.pos_grid[0] != c.pos_grid[1]:
            raise ValueError("reference_points need a square pos_grid")
        conv = c.stem == "conv"
        self.patch_embed = ConvStem(c.embed_dim) if conv else PatchEmbed(c.embed_dim, c.patch)
        self.cls_token = nn.Parameter(trunc_normal(1, 1, c.embed_dim))
        self.det_token = nn.Parameter(trunc_normal(1, c.det_tokens, c.embed_dim))
        self.pos_embed = nn.Parameter(initial_positions(c))
        if c.mid_pos_grid:
            tokens = 1 + math.prod(c.mid_pos_grid) + c.det_tokens
            self.mid_pos_embed = nn.Parameter(trunc_normal(c.depth - 1, 1, tokens, c.embed_dim))
        self.blocks = nn.ModuleList(Block(c.embed_dim, c.num_heads) for _ in range(c.depth))
        self.norm = nn.LayerNorm(c.embed_dim, eps=1e-6)
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
                if c.xavier:
                    nn.init.xavier_uniform_(module.weight)
                else:
                    nn.init.trunc_normal_(module.weight, std=0.02)

    def forward(self, x, grids):
        """Padded images (B, 3, H, W), of which grids[b] patches (h, w) are real.

        Returns the encoded [DET] tokens (B, Q, C) and patches (B, H/p, W/p, C).
        """
        c, B = self.config, len(x)
        rows, columns = map(max, zip(*grids, strict=True))
        x = self.patch_embed(x)
        x = (x[-1] if c.stem == "conv" else x)[:, :, :rows, :columns]  # (B, C, H/p, W/p)
        x = x.flatten(2).transpose(1, 2)  # (B, N, C)
        x = torch.cat([self.cls_token.expand(B, -1, -1), x, self.det_token.expand(B, -1, -1)], 1)
        x = x + positions_for(self.pos_embed, c.pos_grid, grids)[0]  # (B, 1 + N + Q, C)
        between = [0] * c.depth
        if c.mid_pos_grid:  # after every block but the last
            table = self.mid_pos_embed[:, 0]  # (L - 1, 1 + n + Q, C)
            between = [*positions_for(table, c.mid_pos_grid, grids), 0]
        mask = real_tokens(grids, c.det_tokens, x.device)
        for block, position in zip(self.blocks, between, strict=True):
            run = partial(checkpoint, block, use_reentrant=False) if c.checkpoint else block
            x = run(x, mask) + position
        x = self.norm(x)
        return x[:, -c.det_tokens :], x[:, 1 : -c.det_tokens].unflatten(1, (rows, columns))


def token_grids(sizes, patch=16):
    """Patches (h, w) of images of these sizes; what fills no whole patch is not looked at."""
    return [(max(1, h // patch), max(1, w // patch)) for h, w in sizes]


def real_tokens(grids, det_tokens, device):
    """Attention mask (B, 1, 1, 1 + N + Q), False on padding; None if there is no padding.

    Differs: the released code attends to padding, so that an answer depends on the other images of
    the batch; alone, an image gets the same answer, but for what positions_for says.
    """
    if len(set(grids)) == 1:
        return None
    rows, columns = map(max, zip(*grids, strict=True))
    mask = torch.zeros(len(grids), rows, columns, dtype=torch.bool, device=device)
    for image_mask, (h, w) in zip(mask, grids, strict=True):
        image_mask[:h, :w] = True
    return F.pad(mask.flatten(1), (1, det_tokens), value=True)[:, None, None]


def positions_for(table, old_hw, grids):
    """Tables (L, 1 + h * w + Q, C) of grid old_hw, resized to each image: (L, B, 1 + N + Q, C).

    Where all images have one grid, B is 1.
    Differs: the released code resizes once, to the grid of the padded batch, and not at all if that
    has as many patches as the table, whatever its shape; here each image has its own grid.
    """
    n = math.prod(old_hw)
    first, patches, det = table[:, :1], table[:, 1 : 1 + n], table[:, 1 + n :]
    rows, columns = map(max, zip(*grids, strict=True))
    tables = []
    for h, w in set(grids) if len(set(grids)) == 1 else grids:
        grid = resize_grid(patches, old_hw, (h, w)).unflatten(1, (h, w))  # (L, h, w, C)
        grid = F.pad(grid, (0, 0, 0, columns - w, 0, rows - h)).flatten(1, 2)  # (L, N, C)
        tables.append(torch.cat([first, grid, det], dim=1))
    return torch.stack(tables, dim=1)


def initial_positions(c):
    """Position table (1, 1 + h * w + Q, C) before training: class token, patches, [DET] tokens."""
    if not c.reference_points:
        return trunc_normal(1, 1 + math.prod(c.pos_grid) + c.det_tokens, c.embed_dim)
    side = c.pos_grid[0]
    table = sincos_pos_embed(c.embed_dim, side)  # (1, 1 + side * side, C)
    x, y = (spread_points(c.det_tokens) * side).long().T  # (Q,)
    return torch.cat([table, table[:, 1 + y * side + x]], dim=1)  # where its point lies


def trunc_normal(*shape):
    return nn.init.trunc_normal_(torch.empty(shape), std=0.02)


# --- 4. Boxes -------------------------------------------------------------------------------------


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


def over_processes(counts):
    """Mean of counts over all processes, which average their gradients.

    So sums divided by it make the step of one process with all the images.
    Differs: released code divides some losses by what one process alone has counted.
    """
    if dist.is_initialized():
        dist.all_reduce(counts)
        counts /= dist.get_world_size()
    return counts


class ThreeLayerMlp(nn.Module):
    """Three linear layers with ReLU between (DETR, arXiv:2005.12872, Sec. 3.2)."""

    def __init__(self, dim, out):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, out)])

    def forward(self, x):
        first, second, last = self.layers
        return last(F.relu(second(F.relu(first(x)))))


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


# --- 6. Model -------------------------------------------------------------------------------------


class YOLOS(nn.Module):
    """ViT with [DET] tokens, and two small heads that read them (Fig. 1)."""

    def __init__(self, config, num_classes):
        super().__init__()
        c = self.config = config
        self.backbone = Backbone(c)
        self.class_embed = ThreeLayerMlp(c.embed_dim, num_classes + 1)  # the last class: no object
        self.bbox_embed = ThreeLayerMlp(c.embed_dim, 4)

    def forward(self, images, targets=None, sizes=None):
        """Losses if there are targets, else detections.

        images: list of (3, h, w) floats in [0, 1]. targets: list of dict(boxes (M, 4) xyxy pixels,
        labels (M,)). sizes: the (height, width) in which each image's boxes are wanted, its own by
        default. Returns dict(loss_name=scalar) or a list of dict(boxes (Q, 4) xyxy, scores (Q,),
        labels (Q,), tokens (Q,): the [DET] token that answered), best first.
        """
        if targets is not None:
            return self.loss(*pad_batch(images, self.config.patch), targets)
        sizes = sizes or [image.shape[-2:] for image in images]
        results = [None] * len(images)
        patch = self.config.patch
        for group in group_by_padded_size(images, patch):
            x, true_sizes = pad_batch([images[i] for i in group], patch)
            found = self.detect(x, token_grids(true_sizes, patch))
            for i, logits, boxes_norm in zip(group, *found, strict=True):
                results[i] = select_best(logits, boxes_norm, sizes[i])
        return results

    def detect(self, x, grids):
        """Logits (B, Q, K + 1) and boxes (B, Q, 4) cxcywh as shares of the image.

        x: normalised images (B, 3, H, W); grids: the (h, w) real patches of each.
        """
        tokens, _ = self.backbone(x, grids)
        return self.heads(tokens, self.points(x))

    def points(self, x):
        """Where the [DET] tokens stand in the image, (Q, 2), or None: anywhere."""
        c = self.config
        return spread_points(c.det_tokens).to(x.device) if c.reference_points else None

    def heads(self, tokens, points=None):
        """Logits (B, Q, K + 1) and boxes (B, Q, 4) of tokens (B, Q, C), around points (Q, 2)."""
        with torch.autocast(tokens.device.type, enabled=False):  # bf16 would round to pixels
            boxes = self.bbox_embed(tokens.float())  # (B, Q, 4)
        if points is not None:
            boxes = boxes + F.pad(points.logit(), (0, 2))
        return self.class_embed(tokens), boxes.sigmoid()

    def loss(self, x, sizes, targets):
        c = self.config
        grids, points = token_grids(sizes, c.patch), self.points(x)
        tokens, patches = self.backbone(x, grids)
        found = self.heads(tokens, points)
        targets = [
            {"labels": t["labels"], "boxes_norm": normalise_boxes(t["boxes"], size)}
            for t, size in zip(targets, sizes, strict=True)
        ]
        pairs = hungarian_match(*found, targets, points)
        objects = sum(len(t["labels"]) for t in targets)
        losses = set_losses(*found, targets, pairs, c.no_object_weight, objects)
        if c.patch_loss:
            for name, loss in self.patch_losses(patches, grids, sizes, targets).items():
                losses[name.replace("loss_", "loss_patch_")] = c.patch_loss * loss
        return losses

    def patch_losses(self, patches, grids, sizes, targets):
        """The same losses for each patch, which should find the smallest object that covers it."""
        real = zip(patches, grids, strict=True)  # without padding, as if they were one image
        tokens = torch.cat([image_patches[:h, :w].flatten(0, 1) for image_patches, (h, w) in real])
        points, pairs = cover_pairs(grids, sizes, self.config.patch, targets, tokens.device)
        targets = {key: torch.cat([t[key] for t in targets]) for key in targets[0]}
        found = self.heads(tokens[None], points if self.config.reference_points else None)
        return set_losses(*found, [targets], [pairs], 1.0, len(pairs[0]))

    def every_layer(self, images):
        """Every layer once, on fixed shapes: what --summary counts."""
        x, sizes = pad_batch(images, self.config.patch)
        tokens, _ = self.backbone(x, token_grids(sizes, self.config.patch))
        self.class_embed(tokens), self.bbox_embed(tokens)

    @torch.no_grad()
    def attention(self, image):
        """Where each [DET] token looks in the last block: (Q, h, H/p, W/p), each head's softmax.

        A map sums to less than one: tokens attend to each other and to the class token too.
        """
        x, sizes = pad_batch([image], self.config.patch)
        (grid,) = token_grids(sizes, self.config.patch)
        last, seen = self.backbone.blocks[-1], []
        hook = last.norm1.register_forward_hook(lambda *args: seen.append(args[-1]))
        self.backbone(x, [grid])
        hook.remove()
        heads, Q = last.attn.num_heads, self.config.det_tokens
        q, k, _ = last.attn.qkv(seen[0])[0].unflatten(1, (3, heads, -1)).permute(1, 2, 0, 3)
        weights = q[:, -Q:] @ k.transpose(1, 2) / math.sqrt(q.shape[2])  # (h, Q, 1 + N + Q)
        weights = weights.softmax(dim=2)[:, :, 1:-Q]  # (h, Q, N)
        return weights.transpose(0, 1).unflatten(2, grid)


def select_best(logits, boxes_norm, size):
    """Each query's likeliest class, as detections in pixels of an image (h, w), best first."""
    h, w = size
    scores, labels = logits.float().softmax(dim=1)[:, :-1].max(dim=1)
    order = scores.argsort(descending=True, stable=True)
    boxes = box_convert(boxes_norm, "cxcywh", "xyxy") * boxes_norm.new_tensor([w, h, w, h])
    return dict(boxes=boxes[order], scores=scores[order], labels=labels[order], tokens=order)


def specialisation(tokens, boxes_norm, labels):
    """What a [DET] token tells of the boxes it finds (Fig. 2 and 3: place and size, not category).

    tokens (D,), boxes_norm (D, 4) cxcywh, labels (D,) of detections over a data set. Returns for
    each of "place" (3x3 cells), "size" (thirds by area) and "category" the share of its entropy
    that knowing the token removes, I(x; token) / H(x), and the same for shuffled tokens. The three
    are not independent: where a box is also limits how large it can be.
    """
    cell, area = (boxes_norm[:, :2] * 3).long().clamp(0, 2), boxes_norm[:, 2:].prod(dim=1)
    thirds = torch.bucketize(area, area.quantile(area.new_tensor([1 / 3, 2 / 3])))
    shuffled = tokens[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0))]

    def share(x, tokens):
        joint = torch.zeros(int(x.max()) + 1, int(tokens.max()) + 1, dtype=torch.float64)
        joint.index_put_((x, tokens), joint.new_tensor(1 / len(x)), accumulate=True)
        entropies = (torch.special.entr(p).sum() for p in (joint.sum(1), joint.sum(0), joint))
        h_x, h_token, h_both = entropies
        return ((h_x + h_token - h_both) / h_x.clamp(min=1e-9)).item()

    kinds = {"place": cell[:, 1] * 3 + cell[:, 0], "size": thirds, "category": labels}
    return {name: (share(x, tokens), share(x, shuffled)) for name, x in kinds.items()}


def param_groups(model, recipe):
    """AdamW's groups, `lr_scale` a factor on the learning rate (released code: the same for all).

    In the backbone 1-D parameters, first position table, class and [DET] tokens have no weight
    decay; the tables between the blocks have it, and so have the heads with their biases.
    """
    exempt, groups = ("pos_embed", "cls_token", "det_token"), {}
    for name, p in model.named_parameters():
        last = name.rpartition(".")[2]
        decays = name.startswith(("class_embed", "bbox_embed")) or p.ndim > 1 and last not in exempt
        group = dict(params=[], lr_scale=1.0, weight_decay=recipe["weight_decay"] * decays)
        groups.setdefault(decays, group)["params"].append(p)
    return [*groups.values()]


# COCO's 80 category ids among 1..90, in the order of labels 0..79.
# Differs: rows no category uses are dropped, so they have no part in the softmax of the scores.
COCO_IDS = [i for i in range(1, 91) if i not in {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}]


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


def resize_stored(patches, grid):
    """Positions (..., n, C) that a file holds for patches, on this grid (h, w).

    n tells the file's own grid: this one, a variant's or a square; for another nothing is changed.
    """
    n, side = patches.shape[-2], math.isqrt(patches.shape[-2])
    known = [hw for c in CONFIGS.values() for hw in (c.pos_grid, c.mid_pos_grid) if hw]
    old = next((hw for hw in (grid, *known, (side, side)) if math.prod(hw) == n), grid)
    if old == grid:
        return patches
    tables = resize_grid(patches.flatten(0, -3), old, grid)
    return tables.unflatten(0, patches.shape[:-2])


def from_official(state_dict, config=CONFIGS["base"], num_classes=80):
    """Checkpoint of the authors, or any plain ViT, in this file's names.

    Reads YOLOS's releases, whose class layer has a row for each of COCO's ids 0..90 and one for "no
    object": num_classes=80 keeps those of its 80 categories, 91 all. Reads ViTs named as in timm:
    DeiT, also distilled, MAE, SimMIM's and this project's encoders. Their position table is resized
    to config.pos_grid, and so are a YOLOS's; what has no place here (classifiers, distillation
    token, decoders) is left out, and [DET] tokens begin as if untrained, as they do in a YOLOS that
    had another number of them.
    """
    state = state_dict.get("model", state_dict)
    if "backbone.det_token" in state:
        state = dict(state)
        for key in ("class_embed.layers.2.weight", "class_embed.layers.2.bias"):
            if num_classes == 80 and len(state.get(key, ())) == 92:
                state[key] = state[key][[*COCO_IDS, 91]]
        number, (_, known, width) = config.det_tokens, state["backbone.det_token"].shape
        if width == config.embed_dim:
            start = dict(pos_embed=initial_positions(config)[:, -number:])
            start |= dict(mid_pos_embed=trunc_normal(config.depth - 1, 1, number, width))
            grids = dict(pos_embed=config.pos_grid, mid_pos_embed=config.mid_pos_grid)
            for name, grid in grids.items():
                if grid and (table := state.get(f"backbone.{name}")) is not None:
                    first, patches, det = table.split((1, table.shape[-2] - 1 - known, known), -2)
                    det = det if number == known else start[name]
                    parts = [first, resize_stored(patches, grid), det]
                    state[f"backbone.{name}"] = torch.cat(parts, dim=-2)
            if number != known:
                del state["backbone.det_token"]
        return state
    vit = {key.removeprefix("encoder."): value for key, value in plain_blocks(state).items()}
    wanted = ("cls_token", "pos_embed", "patch_embed.", "blocks.", "norm.")
    vit = {"backbone." + key: value for key, value in vit.items() if key.startswith(wanted)}
    table = vit.get("backbone.pos_embed", torch.zeros(0, 0, 0))
    if table.shape[2] == config.embed_dim:  # else no part of it can be used
        side = math.isqrt(table.shape[1])
        # The row before the patches: in distilled DeiTs the distillation token's, as released.
        first = F.pad(table[:, : -side * side], (0, 0, 1, 0))[:, -1:]
        grid = resize_grid(table[:, -side * side :], (side, side), config.pos_grid)
        det = initial_positions(config)[:, -config.det_tokens :]
        vit["backbone.pos_embed"] = torch.cat([first, grid, det], dim=1)
    return vit


def build(config, num_classes):
    """Model with random weights; config: a Config or a name in CONFIGS."""
    return YOLOS(CONFIGS[config] if isinstance(config, str) else config, num_classes)


# --- 7. Try it ------------------------------------------------------------------------------------

if __name__ == "__main__":
    torch.manual_seed(0)
    model, image = build("nano", num_classes=6).eval(), torch.rand(3, 128, 160)
    boxes = torch.tensor([[20.0, 30, 60, 80], [90, 40, 150, 110]])
    target = dict(boxes=boxes, labels=torch.tensor([0, 3]))
    with torch.no_grad():
        x, sizes = pad_batch([image], 16)
        grids = token_grids(sizes)
        tokens, patches = model.backbone(x, grids)
        logits, boxes_norm = model.heads(tokens, model.points(x))
        rows = [
            ("image", x, ""),
            ("patches", patches, "squares of 16 pixels, to be read row by row"),
            ("[DET]", tokens, "all look at all, patches and tokens; then only these are read"),
            ("logits", logits, 'of 6 classes and "no object"'),
            ("boxes", boxes_norm, "centre, width and height as shares of the image"),
            ("attention", model.attention(image), "token, head: where they look in the last block"),
        ]
        wanted = [target | dict(boxes_norm=normalise_boxes(boxes, sizes[0]))]
        ((query, _),) = hungarian_match(logits, boxes_norm, wanted, model.points(x))
        losses = model([image], [target])
    print(f"YOLOS nano: {sum(p.numel() for p in model.parameters()):,} parameters, not trained")
    for name, x, words in rows:
        print(f"{name:10}{str(tuple(x.shape)):18}{words}")
    rest = logits.shape[1] - len(query)
    print(f"matching  2 objects go to tokens {query.tolist()}, the other {rest} learn: no object")
    print("losses    " + "  ".join(f"{name[5:]} {loss:.2f}" for name, loss in losses.items()))
