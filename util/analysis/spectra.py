"""Which frequencies a feature map has: the diagonal of its Fourier transform, and its variance over positions.

Source: Park and Kim, How do vision transformers work?, ICLR 2022, figures 2, 8 and 9; A2MIM draws the same.
"""

import math

import torch
from torch import Tensor

EPS = 1e-6  # added to an amplitude before its logarithm


def log_amplitude(maps: Tensor) -> Tensor:
    """Maps [N, C, h, h] -> [ceil(h / 2)] float64: mean over N and C of log(|F(k, k)| + 1e-6), F the plain 2-D DFT.

    k = 0 ... ceil(h / 2) - 1 are the frequencies `frequencies(h)`; an even h has the Nyquist frequency too, which the
    original leaves out. Of maps that are not square, the largest centred square is taken.
    """
    return log_amplitudes(maps).mean(0)


def log_amplitudes(maps: Tensor) -> Tensor:
    """The same of each image, a mean over C alone: [N, ceil(h / 2)] float64.

    On the diagonal both frequencies are k, so F(k, k) = sum of f(y, x) exp(-2 pi i k (y + x) / h): one product of
    matrices with a table of cosines and sines, and no transform of which one line is kept.
    """
    maps = centred_square(maps if maps.dtype == torch.float64 else maps.float())
    with torch.autocast(maps.device.type, enabled=False):
        products = maps.flatten(2) @ diagonal(maps.shape[-1], maps)
    cosines, sines = products.chunk(2, dim=-1)  # [N, C, ceil(h / 2)]
    return (torch.hypot(cosines, sines) + EPS).log().mean(dim=1, dtype=torch.float64)


def diagonal(side: int, like: Tensor) -> Tensor:
    """[h * h, 2 ceil(h / 2)]: cos and sin of 2 pi k (y + x) / h, with the type and on the device of `like`."""
    places = torch.arange(side, device=like.device)
    turns = (places.unsqueeze(1) + places).view(-1, 1) * places[: -(-side // 2)] % side  # whole, so exact for any h
    angles = turns.double() * (2 * math.pi / side)
    return torch.cat([angles.cos(), angles.sin()], dim=1).to(like.dtype)


def frequencies(side: int) -> list[float]:
    """Of `log_amplitude`, in units of pi: 2 k / h. The original draws its last one at 1."""
    return [2 * k / side for k in range(-(-side // 2))]


def centred_square(maps: Tensor) -> Tensor:
    """[N, C, h, w] -> its largest centred square."""
    rows, cols = maps.shape[-2:]
    side = min(rows, cols)
    top, left = (rows - side) // 2, (cols - side) // 2
    return maps[..., top : top + side, left : left + side]


def variance(maps: Tensor) -> Tensor:
    """Maps [N, C, h, w] -> mean over N and C of the unbiased variance over positions, a float64 scalar."""
    return variances(maps).mean()


def variances(maps: Tensor) -> Tensor:
    """The same of each image, a mean over C alone: [N] float64; nan for maps of a single position."""
    maps = maps if maps.dtype == torch.float64 else maps.float()
    values = maps.flatten(2)
    squares = (values - values.mean(dim=2, keepdim=True)).square().sum(dim=2)
    return (squares / (values.shape[2] - 1)).mean(dim=1, dtype=torch.float64)
