"""Swin layers that run on all tokens of a grid or on some of them, in any order: `Windows` tells who attends to whom.

Names are those of the original Swin, where merging ends a stage.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp
from torch import Tensor, nn

from util.nn.windows import Windows, grid_windows

LayerNorm = partial(nn.LayerNorm, eps=1e-6)


class WindowAttention(nn.Module):
    """Multi-head attention within windows, with a learned bias per relative position."""

    def __init__(self, dim: int, window_size: int, num_heads: int):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f'a stage of width {dim} cannot have {num_heads} heads')
        self.num_heads = num_heads
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window_size - 1) ** 2, num_heads))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, windows: Windows) -> Tensor:
        """Tokens x [N, L, D] in any order -> the same; computed in the windows' G groups of S slots."""
        (n, _, dim), (groups, size, _) = x.shape, windows.mask.shape
        qkv = self.qkv(x)
        if windows.slots is not None:
            qkv = qkv.new_zeros(n, groups * size, 3 * dim).index_copy(1, windows.slots, qkv)
        qkv = qkv.view(n, groups, size, 3, self.num_heads, -1).permute(3, 0, 1, 4, 2, 5)
        q, k, v = qkv.flatten(2, 3)  # each [N, G * heads, S, D / heads]: groups beside heads, so that N shares the mask
        bias = self.relative_position_bias_table[windows.bias_index].permute(0, 3, 1, 2)  # [G or 1, heads, S, S]
        bias = (bias + windows.mask.unsqueeze(1)).flatten(0, 1).unsqueeze(0)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        x = x.unflatten(1, (groups, self.num_heads)).transpose(2, 3).reshape(n, groups * size, dim)
        if windows.slots is not None:
            x = x.index_select(1, windows.slots)
        return self.proj(x)


class SwinBlock(nn.Module):
    """Pre-norm block: window attention, MLP."""

    def __init__(
        self, dim: int, window_size: int, num_heads: int, mlp_ratio: float, drop_path: float, norm2_eps: float
    ):
        super().__init__()
        self.norm1 = LayerNorm(dim)
        self.attn = WindowAttention(dim, window_size, num_heads)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=norm2_eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, windows: Windows) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), windows))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchMerging(nn.Module):
    """Each 2 x 2 neighbours become one token of twice the width.

    `by_column`: the upper left, lower left, upper right, lower right, as every Swin has it; else row by row, which the
    published pretraining does.
    """

    def __init__(self, dim: int, by_column: bool):
        super().__init__()
        self.by_column = by_column
        self.norm = LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor, units: int) -> Tensor:
        """x [N, units * r * r, D], each unit an r x r raster -> [N, units * r/2 * r/2, 2 D]."""
        n, length, dim = x.shape
        half = round((length // units) ** 0.5) // 2
        x = x.view(n, units, half, 2, half, 2, dim)  # N, unit, row, child row, column, child column, D
        x = x.permute(0, 1, 2, 4, 5, 3, 6) if self.by_column else x.permute(0, 1, 2, 4, 3, 5, 6)
        return self.reduction(self.norm(x.reshape(n, length // 4, 4 * dim)))


class SwinStage(nn.Module):
    """Blocks of one width, with windows shifted in every second one, and the merging after them."""

    def __init__(self, blocks: list[SwinBlock], downsample: PatchMerging | None):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample

    def forward(self, x: Tensor, windows: Sequence[Windows], units: int = 1) -> Tensor:
        """x [N, L, D], windows unshifted and shifted -> [N, L / 4, 2 D]; in the last stage [N, L, D]."""
        for i, block in enumerate(self.blocks):
            x = block(x, windows[i % 2])
        return x if self.downsample is None else self.downsample(x, units)


class Grid(NamedTuple):
    """The tokens of one stage, in their number to the side, and the windows over them."""

    side: int
    window: int
    shift: int  # of every second block


def stage_grids(img_size: int, patch_size: int, window_size: int) -> list[Grid]:
    """Of the four stages. Raises ValueError where something does not divide."""
    unit = 8 * patch_size
    if img_size % unit:
        raise ValueError(
            f'img_size {img_size} is not a multiple of {unit}: 8 patches of {patch_size}, one token of the last stage'
        )
    sides = [img_size // patch_size >> stage for stage in range(4)]
    # a window no smaller than the grid is the grid, and is not shifted
    grids = [Grid(side, min(window_size, side), window_size // 2 * (window_size < side)) for side in sides]
    for side, window, _ in grids:
        if side % window:
            raise ValueError(
                f'img_size {img_size} makes stages of {sides} tokens to the side, '
                f'of which {side} is not a multiple of window_size {window}'
            )
    return grids


def swin_stages(
    grids: list[Grid],
    embed_dim: int,
    depths: Sequence[int],
    num_heads: Sequence[int],
    mlp_ratio: float,
    *,
    by_column: bool = True,
    drop_path_rate: float = 0.0,
    norm2_eps: float = 1e-6,
) -> nn.ModuleList:
    """Four stages of doubling width; the rate of dropped paths grows linearly over all blocks."""
    rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device='cpu').tolist())
    stages = []
    for i, (grid, depth, heads) in enumerate(zip(grids, depths, num_heads, strict=True)):
        dim = embed_dim << i
        blocks = [SwinBlock(dim, grid.window, heads, mlp_ratio, next(rates), norm2_eps) for _ in range(depth)]
        stages.append(SwinStage(blocks, PatchMerging(dim, by_column) if i < 3 else None))
    return nn.ModuleList(stages)


class GridWindows(nn.Module):
    """`Windows` over a whole grid, as buffers that follow the model and are not saved."""

    def __init__(self, side: int, window: int, shift: int):
        super().__init__()
        for name, tensor in grid_windows(side, window, shift)._asdict().items():
            self.register_buffer(name, tensor, persistent=False)
