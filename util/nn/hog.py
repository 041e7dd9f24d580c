"""Histograms of oriented gradients, as targets and as pictures: pure tensor functions, no state.

Orientation is unsigned: pi is cut into `bins` parts, and every pixel gives its gradient's magnitude to one of them,
without interpolation. A cell's histogram has unit length per colour; there is no block normalisation across cells.
"""

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def hog(imgs: Tensor, cells: Sequence[int], bins: int, biases: Sequence[Tensor] | None = None) -> list[Tensor]:
    """[N, C, H, W] -> per cell side in pixels, finest first, [N, L, C * bins]; cells in raster order, bins innermost.

    The gradient is taken once for all colours and scales, and binned into the finest cells alone; the others, multiples
    of it, are pooled from those, which is exact. `biases`, one [2] per cell side, are added to both components of the
    gradient first; then every scale has to be binned for itself.
    """
    across, down = sobel(imgs)
    if biases is None:
        hists = [histogram(across, down, cells[0], bins)]
        for finer, cell in itertools.pairwise(cells):
            hists.append(pooled(hists[-1], cell // finer))
    else:
        hists = [histogram(across + b[0], down + b[1], cell, bins) for cell, b in zip(cells, biases, strict=True)]
    return [F.normalize(hist, dim=2).flatten(1, 2).flatten(2).transpose(1, 2) for hist in hists]


def sobel(imgs: Tensor) -> tuple[Tensor, Tensor]:
    """Left minus right and upper minus lower Sobel responses, two [N, C, H, W]; borders are reflected.

    Sums of slices rather than a convolution, which a GPU may round to TF32.
    """
    x = F.pad(imgs, (1, 1, 1, 1), mode='reflect')
    rows = torch.add(x[..., :-2, :], x[..., 1:-1, :], alpha=2) + x[..., 2:, :]  # [N, C, H, W + 2]
    cols = torch.add(x[..., :-2], x[..., 1:-1], alpha=2) + x[..., 2:]  # [N, C, H + 2, W]
    return rows[..., :-2] - rows[..., 2:], cols[..., :-2, :] - cols[..., 2:, :]


def histogram(across: Tensor, down: Tensor, cell: int, bins: int) -> Tensor:
    """Gradients, two [N, C, H, W] -> mean magnitude per cell and orientation, [N, C, bins, H / cell, W / cell]."""
    n, c, height, width = across.shape
    h, w = height // cell, width // cell
    magnitude = torch.hypot(across, down)
    index = (torch.atan2(across, down) / math.pi * bins).floor().remainder(bins)
    row = torch.arange(height, device=across.device).unsqueeze(1) // cell
    col = torch.arange(width, device=across.device) // cell
    # in [bins, h, w]; float32 counts to 2 ** 24 exactly and takes half of int64's memory
    index = torch.add((row * w + col).to(index.dtype), index, alpha=h * w).long()
    sums = magnitude.new_zeros(n, c, bins * h * w).scatter_add_(2, index.flatten(2), magnitude.flatten(2))
    return sums.view(n, c, bins, h, w) / cell**2


def pooled(hist: Tensor, factor: int) -> Tensor:
    """[N, C, bins, h, w] -> [N, C, bins, h / factor, w / factor], by averaging."""
    return F.avg_pool2d(hist.flatten(1, 2), factor).unflatten(1, hist.shape[1:3])


def draw_hog(hist: Tensor, bins: int, cell: int) -> Tensor:
    """Histograms [N, L, 3 * bins] of a square image -> strokes along the edges, [N, 3, H, W] in 0..1.

    Every cell shows one stroke per orientation in its three colours, as bright as its share of the cell's energy.
    Strokes of cells below 8 pixels reach into the neighbours, so that their direction can be seen.
    """
    n, length, _ = hist.shape
    side = round(length**0.5)
    size = max(cell, 8 + cell % 2)
    centre = torch.arange(size, device=hist.device) - (size - 1) / 2
    angle = ((torch.arange(bins, device=hist.device) + 0.5) * math.pi / bins).view(-1, 1, 1)
    # an angle is that of (across, down) = (sin, cos); the edge runs at right angles to it
    distance = (angle.sin() * centre + angle.cos() * centre.unsqueeze(1)).abs()
    radius = torch.hypot(centre, centre.unsqueeze(1))
    strokes = (1 - distance).clamp(0, 1) * (radius < size / 2) * cell / size  # [bins, size, size]

    energy = F.normalize(hist.clamp(min=0).unflatten(2, (3, bins)), dim=-1).square()  # [N, L, 3, bins]
    maps = energy.permute(0, 2, 3, 1).reshape(n * 3, bins, side, side)
    picture = F.conv_transpose2d(maps, strokes.unsqueeze(1), stride=cell, padding=(size - cell) // 2)
    return picture.view(n, 3, side * cell, side * cell).clamp(max=1)
