"""Position embeddings: the fixed 2-D sin-cos table of MAE, and the resizing of learned or fixed tables."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed, resize_rel_pos_bias_table
from torch import Tensor


def sincos_2d(dim: int, grid_size: int, cls_token: bool = True) -> Tensor:
    """[1, grid*grid (+ 1), dim] float32, computed in float64; the class token's row, if any, comes first and is zero.

    The first half of the channels encodes the column, the second half the row; each half is sin, then cos, of the
    position times 10000^(-i / (dim / 4)).
    """
    if dim % 4:
        raise ValueError(f'a 2-D sin-cos position embedding needs a width divisible by 4, got {dim}')
    omega = 10000.0 ** (-np.arange(dim // 4, dtype=np.float64) / (dim / 4))
    row, col = np.meshgrid(np.arange(grid_size), np.arange(grid_size), indexing='ij')
    angles = [position.reshape(-1, 1) * omega for position in (col, row)]  # 2 x [L, dim / 4]
    table = np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], axis=1)
    if cls_token:
        table = np.concatenate([np.zeros((1, dim)), table])
    return torch.from_numpy(table).float().unsqueeze(0)


def resize_pos_embed(pos_embed: Tensor, length: int, num_prefix_tokens: int = 1) -> Tensor:
    """[1, L0, D] -> [1, length, D], bicubic on the (square) grid; the prefix rows are kept as they are."""
    side = round((length - num_prefix_tokens) ** 0.5)
    return resample_abs_pos_embed(pos_embed, [side, side], num_prefix_tokens=num_prefix_tokens, antialias=False)


def resize_bias_table(table: Tensor, rows: int, num_extra_rows: int = 0) -> Tensor:
    """Relative positions [(2 w0 - 1)^2 + extra, heads] -> [rows, heads] of another window; extra rows are kept.

    Swin's tables, which have no extra rows, are resized bicubically. BEiT's, with three for the class token, by timm's
    and BEiT's own rule: near offsets stay where they are, far ones are drawn apart.
    """
    old, new = (math.isqrt(n - num_extra_rows) for n in (table.shape[0], rows))
    if num_extra_rows:
        window = ((new + 1) // 2,) * 2
        return resize_rel_pos_bias_table(table, window, (rows, table.shape[1])).to(table.dtype)
    grid = table.t().reshape(1, -1, old, old)
    grid = F.interpolate(grid.float(), size=(new, new), mode='bicubic', align_corners=False)
    return grid.reshape(-1, rows).t().to(table.dtype).contiguous()
