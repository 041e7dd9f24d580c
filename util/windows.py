"""Window attention over any set of tokens of a grid: who attends to whom, and in which groups that is computed.

A shifted window is a plain one of a grid whose cuts lie elsewhere; it does not wrap around the border, where windows are
simply smaller. That equals the masked cyclic shift.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Windows(NamedTuple):
    """Tokens in G groups of S slots. Attention is computed per group and masked to windows."""

    bias_index: Tensor  # [G, S, S] int64, row of the (2 * window - 1)^2 relative positions for each pair
    mask: Tensor  # [G, S, S] float32, 0 within a window, -inf elsewhere
    slots: Tensor | None  # [L] int64, the slot of each token; None: one group, tokens in their own order


def make_windows(coords: Tensor, window: int, shift: int, slots: Tensor | None = None, groups: int = 1, size: int = 0):
    """Tokens' (row, column) [L, 2] -> Windows."""
    if slots is not None:
        # empty slots lie outside of the grid, in a window of their own, and attend to each other
        coords = coords.new_full((groups * size, 2), -window).index_copy(0, slots, coords)
    coords = coords.view(groups, -1, 2)
    ids = (coords + (window - shift) % window) // window
    same = (ids.unsqueeze(2) == ids.unsqueeze(1)).all(dim=-1)  # [G, S, S]
    row, col = (coords.unsqueeze(2) - coords.unsqueeze(1) + window - 1).unbind(-1)
    # between windows a difference may lie outside of the table
    bias_index = torch.where(same, row * (2 * window - 1) + col, 0)
    return Windows(bias_index, torch.zeros_like(same, dtype=torch.float32).masked_fill(~same, -torch.inf), slots)
