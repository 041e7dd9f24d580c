"""Window attention over any tokens of a grid: who attends to whom, and in which groups that is computed.

A shifted window is a plain one of a grid that is cut elsewhere. It does not wrap around the border, where windows are
simply smaller; that equals the masked cyclic shift.

Windows of which only some tokens are there are packed into groups of one window's size, the emptier ones together, and
attention within a group is masked to windows. How many groups are filled depends on the tokens; how many there are, and
so every shape, does not.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Windows(NamedTuple):
    """L tokens in G groups of S slots; slots may stay empty."""

    bias_index: Tensor  # [G or 1, S, S] int64, which of the (2 * window - 1)^2 relative positions a pair has
    mask: Tensor  # [G, S, S] float32, 0 within a window, -inf elsewhere
    slots: Tensor | None  # [L] int64, the slot of each token; None: one group of all tokens, in their order


def grid_coords(side: int) -> Tensor:
    """(row, column) of all tokens of a grid in raster order, [side * side, 2]."""
    return torch.cartesian_prod(torch.arange(side), torch.arange(side))


def unit_major(side: int, units: int) -> Tensor:
    """Raster places of all tokens of a grid, mask unit by mask unit: [units * units, r * r], r = side / units."""
    r = side // units
    return torch.arange(side * side).view(units, r, units, r).transpose(1, 2).reshape(-1, r * r)


def window_ids(coords: Tensor, window: int, shift: int) -> Tensor:
    """(row, column) of tokens [..., 2] -> that of their windows [..., 2]."""
    return (coords + (window - shift) % window) // window


def group_shape(num_tokens: int, window: int) -> tuple[int, int]:
    """(G, S) that any `num_tokens` tokens of a grid fit into.

    A few tokens make one group. Otherwise a group is a window's size, and first fit leaves no two groups that would fit
    into one: any two hold more than S, so all G hold at least G * (S + 1) / 2 tokens.
    """
    size = window * window
    return (1, num_tokens) if num_tokens <= 2 * size else (2 * num_tokens // (size + 1), size)


def group_slots(coords: Tensor, window: int, shift: int) -> Tensor:
    """Slots [L] of tokens at distinct (row, column) [L, 2]: fullest windows first, into the first group with room."""
    groups, size = group_shape(len(coords), window)
    if groups == 1:
        return torch.arange(len(coords))
    row, col = window_ids(coords, window, shift).unbind(-1)
    _, members, counts = (row * len(coords) + col).unique(return_inverse=True, return_counts=True)
    sizes, filled, starts = counts.tolist(), [0] * groups, [0] * len(counts)
    for i in sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True):
        group = next(g for g, used in enumerate(filled) if used + sizes[i] <= size)
        starts[i] = group * size + filled[group]
        filled[group] += sizes[i]
    order = members.argsort(stable=True)  # tokens, window after window
    firsts = counts.cumsum(0) - counts
    slots = torch.empty_like(order)
    slots[order] = torch.arange(len(order)) + (torch.tensor(starts) - firsts)[members[order]]
    return slots


def make_windows(coords: Tensor, slots: Tensor, groups: int, size: int, window: int, shift: int) -> Windows:
    """Tokens at (row, column) [L, 2], in slots [L] of G groups of S -> Windows. Arithmetic only, on any device."""
    if groups == 1:
        slots = None
    else:  # empty slots lie outside of the grid, in a window of their own, and attend to each other
        coords = coords.new_full((groups * size, 2), -window).index_copy(0, slots, coords)
    coords = coords.view(groups, size, 2)
    ids = window_ids(coords, window, shift)
    same = (ids.unsqueeze(2) == ids.unsqueeze(1)).all(dim=-1)  # [G, S, S]
    row, col = (coords.unsqueeze(2) - coords.unsqueeze(1) + window - 1).unbind(-1)
    # tokens of different windows may be further apart than the table reaches
    bias_index = torch.where(same, row * (2 * window - 1) + col, 0)
    mask = torch.zeros(same.shape, device=same.device).masked_fill(~same, -torch.inf)
    return Windows(bias_index, mask, slots)


def grid_windows(side: int, window: int, shift: int) -> Windows:
    """All tokens of a grid, which the window divides: a group is a window of the cyclically shifted grid."""
    coords, per_side, size = grid_coords(side), side // window, window * window
    row, col = ((coords - shift) % side).unbind(-1)
    slots = (row // window * per_side + col // window) * size + row % window * window + col % window
    windows = make_windows(coords, slots, per_side**2, size, window, shift)
    # a pair's slots tell its relative position, in all groups alike
    return windows._replace(bias_index=make_windows(grid_coords(window), slots, 1, size, window, 0).bias_index)
