"""Losses of a distance, element by element, and what a squared error explains: pure tensor functions, no state."""

import math

import torch
from torch import Tensor

PIXEL_LOSSES = ('l1', 'mse', 'huber', 'charbonnier', 'balanced_l1', 'focal_l1', 'focal_mse')


def pixel_loss(
    distance: Tensor,
    mode: str,
    *,
    alpha: float = 0.2,
    gamma: float = 1.0,
    activate: str = 'sigmoid',
    residual: bool = False,
) -> Tensor:
    """|prediction - target|, of any shape -> the loss of each element. `mode` is one of PIXEL_LOSSES.

    The focal modes weigh each element by its own distance d, through which gradients pass too: by
    (2 * sigmoid(alpha * d) - 1) ** gamma, or tanh(alpha * d) ** gamma with `activate='tanh'`. `residual` adds 1 to this
    weight. Source: `regression_loss.py` of OpenMixup.
    """
    error = distance**2 if mode in ('mse', 'focal_mse') else distance
    if mode in ('l1', 'mse'):
        return error
    if mode in ('focal_l1', 'focal_mse'):
        focus = (alpha * distance).tanh() if activate == 'tanh' else 2 * (alpha * distance).sigmoid() - 1
        # what changes no number is left out: each is a pass over all pixels
        weight = focus if gamma == 1 else focus**gamma
        return error * (weight + 1 if residual else weight)
    if mode == 'huber':
        return torch.where(distance < 1, 0.5 * distance**2, distance - 0.5)
    if mode == 'charbonnier':
        return (distance**2 + 1e-12).sqrt()
    # balanced L1 (Libra R-CNN), with alpha 0.5, gamma 1.5, beta 1
    b = math.e**3 - 1
    near = 0.5 / b * (b * distance + 1) * (b * distance).log1p() - 0.5 * distance
    return torch.where(distance < 1, near, 1.5 * distance + 1.5 / b - 0.5)


@torch.no_grad()
def explained(error: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean squared errors of any shape -> the share of the target's spread that each explains, in float32.

    1: perfect; 0: no better than the best constant vector, the target's mean; negative: worse. `target` [..., P] and
    the weights of its places [..., 1], both of the error's own mean; without weights, all count alike. A target that
    is constant leaves nothing to explain: 0.
    """
    target = target.float()
    weight = torch.ones_like(target[..., :1]) if weight is None else weight.float()
    places, total = tuple(range(target.ndim - 1)), weight.sum()
    mean = (target * weight).sum(dim=places) / total  # [P]
    spread = ((target - mean).square() * weight).sum() / total / target.shape[-1]
    # what rounding leaves of a constant's spread is less than 1e-10 of its square
    constant = spread <= 1e-10 * mean.square().mean()
    return torch.where(constant, 0.0, 1 - error / torch.where(constant, 1.0, spread))
