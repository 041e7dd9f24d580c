"""Losses of a distance between prediction and target, element by element: pure tensor functions, no state."""

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
    power = 2 if mode in ('mse', 'focal_mse') else 1
    if mode in ('l1', 'mse'):
        return distance**power
    if mode in ('focal_l1', 'focal_mse'):
        focus = (alpha * distance).tanh() if activate == 'tanh' else 2 * (alpha * distance).sigmoid() - 1
        return distance**power * (focus**gamma + residual)
    if mode == 'huber':
        return torch.where(distance < 1, 0.5 * distance**2, distance - 0.5)
    if mode == 'charbonnier':
        return (distance**2 + 1e-12).sqrt()
    # balanced L1 (Libra R-CNN), with alpha 0.5, gamma 1.5, beta 1
    b = math.e**3 - 1
    near = 0.5 / b * (b * distance + 1) * (b * distance).log1p() - 0.5 * distance
    return torch.where(distance < 1, near, 1.5 * distance + 1.5 / b - 0.5)
