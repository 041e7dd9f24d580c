"""What a classifier answers when cells of an image are hidden (Naseer et al. 2021, A2MIM's figure 1)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from util.analysis.features import exact
from util.analysis.interactions import hide


def kept_cells(order: Tensor, ratios: Sequence[float]) -> Tensor:
    """bool [ratios, N, n]: all cells but the first round(ratio * n) of each image's `order` [N, n]."""
    place = order.argsort(1)
    return torch.stack([place >= round(ratio * order.shape[1]) for ratio in ratios])


def occluded(model: nn.Module, imgs: Tensor, keep: Tensor) -> Tensor:
    """Logits [ratios, N, C] of normalised images [N, 3, H, W] with only these cells, `keep` bool [ratios, N, n].

    One forward for all ratios, as `exact` has it.
    """
    sets = keep.to(imgs.device).flatten(0, 1)
    with exact(model):
        return model(hide(imgs.repeat(len(keep), 1, 1, 1), sets)).unflatten(0, keep.shape[:2])
