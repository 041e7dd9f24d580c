"""Plain ViTs as encoders of any image (Li et al., Exploring Plain Vision Transformer Backbones for Object Detection,
ECCV 2022): most blocks attend in windows, a few over the whole map.

Shapes: N batch, h x w the map, L = h * w, D width, d a head's width, G windows.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from functools import cache

import torch
import torch.nn.functional as F
from timm.layers import Attention, Format, resample_abs_pos_embed
from timm.models import beit, vision_transformer
from timm.models.swin_transformer import window_partition, window_reverse
from torch import Tensor, nn

from util.nn.checks import check_divides
from util.nn.pos_embed import resize_bias_table


def in_windows(attend: Callable[[Tensor], Tensor], x: Tensor, window: int, shift: int = 0) -> Tensor:
    """Map [N, h, w, C] -> the same, by `attend` in windows [G, window, window, C] of the map, which zeros make whole.

    They are added below and on the right, and before the map is rolled by `shift`.
    """
    _, rows, cols, _ = x.shape
    x = F.pad(x, (0, 0, 0, -cols % window, 0, -rows % window))
    x = x.roll((-shift, -shift), dims=(1, 2)) if shift else x
    _, padded_rows, padded_cols, _ = x.shape
    x = attend(window_partition(x, (window, window)))
    x = window_reverse(x, (window, window), padded_rows, padded_cols)
    x = x.roll((shift, shift), dims=(1, 2)) if shift else x
    return x[:, :rows, :cols]


class WindowedViT(nn.Module):
    """A plain ViT as ViTDet's encoder: most blocks attend in windows, a few over the whole map; one map of any image.

    `vit` is a ViT or BEiT of timm's, whose parameters it takes and whose names it keeps; class token and last norm are
    dropped, but not the class token's row of `pos_embed`, so that files fit. Positions are stretched to each image's
    grid. `global_blocks` are numbers from 0, by default the last block of each quarter. With `rel_pos` a ViT gets
    decomposed relative positions that start at zero, in global blocks made for images of `img_size`; a BEiT goes on
    with its own tables, which global blocks stretch. Raises ValueError for blocks of another kind or number, and for
    what other ViTs have beside.
    """

    fixed_size = None

    def __init__(
        self,
        vit: vision_transformer.VisionTransformer | beit.Beit,
        window_size: int = 14,
        global_blocks: Sequence[int] | None = None,
        rel_pos: bool = True,
        img_size: int = 1024,
    ):
        super().__init__()
        for name in ('norm_pre', 'rel_pos_bias'):
            if not isinstance(getattr(vit, name, None), nn.Identity | None):
                raise ValueError(f'{type(vit).__name__} with {name} is no plain ViT')
        depth, [patch_size, _] = len(vit.blocks), vit.patch_embed.patch_size
        check_divides(img_size, patch_size, 'patch_size')
        if global_blocks is None:
            global_blocks = [math.ceil(depth * k / 4) - 1 for k in range(1, 5)]
        if not set(global_blocks) <= set(range(depth)):
            raise ValueError(f'global_blocks {list(global_blocks)} must be from 0 to {depth - 1}')
        if window_size < 1:
            raise ValueError(f'window_size {window_size} must be at least 1')
        self.patch_embed, self.pos_embed, self.blocks = vit.patch_embed, vit.pos_embed, vit.blocks
        self.prefix = 0 if self.pos_embed is None else self.pos_embed.shape[1] - self.patch_embed.num_patches
        self.patch_embed.strict_img_size, self.patch_embed.dynamic_img_pad = False, True
        self.patch_embed.flatten, self.patch_embed.output_fmt = False, Format.NHWC
        self.widths, self.strides = [vit.embed_dim], [patch_size]
        for i, block in enumerate(self.blocks):
            kinds = type(block), type(block.attn)
            if kinds not in WINDOWED:
                raise ValueError(f'{" with ".join(kind.__name__ for kind in kinds)} is no block of a plain ViT')
            block.__class__, block.attn.__class__ = WINDOWED[kinds]
            block.window = 0 if i in global_blocks else window_size
            block.attn.set_positions(rel_pos, block.window or img_size // patch_size)

    def forward(self, imgs: Tensor) -> list[Tensor]:
        """imgs [N, 3, H, W] -> one map [N, D, H / p, W / p], rounded up."""
        x = self.patch_embed(imgs)  # [N, h, w, D]
        if self.pos_embed is not None:
            x = x + self.positions(*x.shape[1:3])
        for block in self.blocks:
            x = block(x)
        return [x.permute(0, 3, 1, 2).contiguous()]

    def positions(self, rows: int, cols: int) -> Tensor:
        """[1, rows, cols, D], bicubic."""
        grid = self.pos_embed[:, self.prefix :]
        grid = resample_abs_pos_embed(grid, [rows, cols], num_prefix_tokens=0, antialias=False)
        return grid.unflatten(1, (rows, cols))


class WindowedBlock(vision_transformer.Block):
    """timm's on maps [N, h, w, D], with attention in windows or, where `window` is 0, over the whole map."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.ls1(attend(self, self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class WindowedBeitBlock(beit.Block):
    """BEiT's, the same."""

    def forward(self, x: Tensor) -> Tensor:
        scales = (1, 1) if self.gamma_1 is None else (self.gamma_1, self.gamma_2)
        x = x + self.drop_path1(scales[0] * attend(self, self.norm1(x)))
        return x + self.drop_path2(scales[1] * self.mlp(self.norm2(x)))


def attend(block: WindowedBlock | WindowedBeitBlock, x: Tensor) -> Tensor:
    return in_windows(block.attn, x, block.window) if block.window else block.attn(x)


class DecomposedAttention(Attention):
    """timm's on maps, whose logits may know relative positions: + q_i . R_h[y_i - y_j] + q_i . R_w[x_i - x_j]."""

    def set_positions(self, rel_pos: bool, side: int) -> None:
        """Tables for windows or maps of `side` x `side`, which start at zero; other maps stretch them."""
        for name in ('rel_pos_h', 'rel_pos_w'):
            table = nn.Parameter(torch.zeros(2 * side - 1, self.head_dim)) if rel_pos else None
            self.register_parameter(name, table)

    def forward(self, x: Tensor) -> Tensor:
        """[N, h, w, D] -> the same."""
        n, rows, cols, _ = x.shape
        q, k, v = self.qkv(x).view(n, rows * cols, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.rel_pos_h is not None:
            q, k, v = self.with_positions(q, k, v, rows, cols)
        drop = self.attn_drop.p if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=drop, scale=self.scale)[..., : self.head_dim]
        return self.proj_drop(self.proj(x.transpose(1, 2).reshape(n, rows, cols, -1)))

    def with_positions(self, q: Tensor, k: Tensor, v: Tensor, rows: int, cols: int) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v [N, heads, L, d] -> the same with d + h + w entries, the further of k one-hot, those of v zero.

        So q . k has the terms of positions in it, and no [L, L] table is made for each image and head.
        """
        grid = q.unflatten(2, (rows, cols))
        by_row = torch.einsum('nhyxd,kdy->nhyxk', grid, differences(stretched(self.rel_pos_h, rows), rows))
        by_col = torch.einsum('nhyxd,kdx->nhyxk', grid, differences(stretched(self.rel_pos_w, cols), cols))
        q = torch.cat([grid, by_row / self.scale, by_col / self.scale], dim=-1).flatten(2, 3)
        row, col = (torch.eye(side, dtype=k.dtype, device=k.device) for side in (rows, cols))
        places = torch.cat([row.repeat_interleave(cols, dim=0), col.repeat(rows, 1)], dim=-1)  # [L, h + w]
        return q, torch.cat([k, places.expand(*k.shape[:2], -1, -1)], dim=-1), F.pad(v, (0, rows + cols))


def stretched(table: Tensor, side: int) -> Tensor:
    """[2 side' - 1, d] -> [2 side - 1, d], linear."""
    if len(table) == 2 * side - 1:
        return table
    return F.interpolate(table.t().unsqueeze(0), size=2 * side - 1, mode='linear')[0].t()


def differences(table: Tensor, side: int) -> Tensor:
    """[2 side - 1, d] -> [side, d, side]: at (b, ., a) the row of a - b."""
    return table.unfold(0, side, 1).flip(0)


class TableAttention(beit.Attention):
    """BEiT's on maps, whose table has a bias for every pair of a row's and a column's difference."""

    def set_positions(self, rel_pos: bool, side: int) -> None:
        """The table is the pretrained one, whatever the side."""
        if not rel_pos:
            self.relative_position_bias_table = None
        self.relative_position_index = None

    def forward(self, x: Tensor) -> Tensor:
        """[N, h, w, D] -> the same."""
        n, rows, cols, _ = x.shape
        bias = None if self.q_bias is None else torch.cat((self.q_bias, self.k_bias, self.v_bias))
        qkv = F.linear(x, self.qkv.weight, bias).view(n, rows * cols, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        drop = self.attn_drop.p if self.training else 0.0
        mask = None if self.relative_position_bias_table is None else self.bias(rows, cols).to(q.dtype)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=drop)
        return self.proj_drop(self.proj(x.transpose(1, 2).reshape(n, rows, cols, -1)))

    def bias(self, rows: int, cols: int) -> Tensor:
        """[1, heads, L, L], without the class token's three rows of the table. Each axis is stretched by itself."""
        old, _ = self.window_size
        table = self.relative_position_bias_table[:-3].view(2 * old - 1, 2 * old - 1, -1)
        if rows != old:
            table = torch.einsum('yxh,ay->axh', table, beit_stretch(old, rows, table.device))
        if cols != old:
            table = torch.einsum('yxh,ax->yah', table, beit_stretch(old, cols, table.device))
        pairs = table.unfold(0, rows, 1).flip(0).unfold(1, cols, 1).flip(1)  # [y_j, x_j, heads, y_i, x_i]
        return pairs.permute(2, 3, 4, 0, 1).reshape(1, -1, rows * cols, rows * cols)


@torch.compiler.disable
@cache  # on the device, once
def beit_stretch(old: int, new: int, device: torch.device) -> Tensor:
    """[2 new - 1, 2 old - 1]: what BEiT's rule makes of one axis of a table, which is linear in its values."""
    size = 2 * old - 1
    table = torch.eye(size).repeat_interleave(size, dim=0)  # head i is 1 in row i of the axis, whatever the column
    with warnings.catch_warnings():  # of what timm does with torch
        warnings.simplefilter('ignore')
        table = resize_bias_table(F.pad(table, (0, 0, 0, 3)), (2 * new - 1) ** 2 + 3, num_extra_rows=3)
    return table[:-3].view(2 * new - 1, 2 * new - 1, size)[:, 0].to(device, copy=True)


WINDOWED = {
    (vision_transformer.Block, Attention): (WindowedBlock, DecomposedAttention),
    (beit.Block, beit.Attention): (WindowedBeitBlock, TableAttention),
}
