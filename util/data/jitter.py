"""Where the pixels of an image go in detection: sizes, flips and crops, of images, masks, boxes and polygons alike.

Sizes and offsets are (rows, columns), boxes x0, y0, x1, y1, polygons flat lists x, y, x, y, ..., all in pixels. The
numbers are detectron2's (`ResizeScale`, `FixedSizeCrop`, `ResizeShortestEdge`), and for the crop of the 3x recipes
those of mmdetection's configs of Swin and ConvNeXt.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

CROPPED = (384, 600)  # least and most rows, and columns, of the 3x recipes' crop
BEFORE_CROP, LONGEST_BEFORE_CROP = (400, 500, 600), 4200  # the short sides, and the longest side, of what is cropped


class Geometry(NamedTuple):
    """An image of `original` size is flipped, resized as a whole, and cut to `size` at `offset`."""

    flip: bool
    resized: tuple[int, int]
    offset: tuple[int, int]
    size: tuple[int, int]
    original: tuple[int, int]

    def points(self, points: Sequence[float]) -> np.ndarray:
        """Where points of the original go, [n, 2]; some may be outside of `size`."""
        points = np.array(points, np.float64).reshape(-1, 2)
        if self.flip:
            points[:, 0] = self.original[1] - points[:, 0]
        return points * np.divide(self.resized, self.original)[::-1] - self.offset[::-1]

    def boxes(self, boxes: np.ndarray) -> np.ndarray:
        """Boxes of the original, [n, 4], clipped to `size`: one outside has no area left."""
        corners = self.points(boxes).reshape(-1, 2, 2)
        return np.concatenate([corners.min(1), corners.max(1)], 1).clip(0, [*self.size[::-1]] * 2)

    def polygons(self, polygons: Sequence[Sequence[float]]) -> list[list[float]]:
        """The polygons of one object, clipped to `size`; [] where nothing is left."""
        return [part.ravel().tolist() for polygon in polygons for part in clipped(self.points(polygon), self.size)]

    def image(self, image: Image.Image) -> Image.Image:
        """Bilinear and antialiased; no pixel beside the crop is made."""
        corner, size = np.array(self.offset[::-1]), self.size[::-1]  # columns first, as Pillow has it
        if self.flip:
            corner[0] = self.resized[1] - corner[0] - size[0]  # of the crop before the flip
        scale, whole = np.divide(self.original, self.resized)[::-1], self.original[::-1]
        box = np.concatenate([corner * scale, (corner + size) * scale]).clip(0, [*whole, *whole])
        made = image.resize(size, Image.Resampling.BILINEAR, box.tolist())
        return made.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.flip else made

    def mask(self, mask: np.ndarray) -> np.ndarray:
        """A mask [H, W] that is no polygons: the pixels that are nearest to the centres of the new ones."""
        rows, columns = map(nearest, self.original, self.resized, self.offset, self.size)
        return mask[rows[:, None], self.original[1] - 1 - columns if self.flip else columns]


def nearest(old: int, new: int, first: int, count: int) -> np.ndarray:
    """Of which pixel each of `count` pixels from `first` on of a resized side is a copy: torch's `nearest-exact`."""
    return ((np.arange(first, first + count) + 0.5) * (old / new)).astype(np.intp).clip(0, old - 1)


# --------------------------------------------------------------------------
# which geometry


def jitter(
    height: int,
    width: int,
    target: int,
    u_flip: float,
    u_scale: float,
    u_crop: float,
    scale_range: Sequence[float] = (0.1, 2.0),
    hflip: float = 0.5,
) -> Geometry:
    """Large-scale jitter (Ghiasi et al. 2021) as ViTDet's, of three numbers in [0, 1).

    The image is made to fit a square of `target` times a factor in `scale_range`, and cut to `target`; one number
    places the crop on both axes.
    """
    side = target * (scale_range[0] + (scale_range[1] - scale_range[0]) * u_scale)
    factor = min(side / height, side / width)
    resized = tuple(max(1, round(x * factor)) for x in (height, width))
    offset = tuple(round(u_crop * max(0, x - target)) for x in resized)
    size = tuple(min(target, x) for x in resized)
    return Geometry(bool(u_flip < hflip), resized, offset, size, (height, width))


def shortest_edge(height: int, width: int, short: int, longest: int) -> tuple[int, int]:
    """The size whose short side is `short`, or whose long one is `longest` where that would be longer."""
    factor = short / min(height, width)
    sides = [short if x == min(height, width) else factor * x for x in (height, width)]
    factor = min(1.0, longest / max(sides))
    return tuple(max(1, int(x * factor + 0.5)) for x in sides)


def resizing(height: int, width: int, size: tuple[int, int], flip: bool = False) -> Geometry:
    """To this size, without a crop."""
    return Geometry(flip, size, (0, 0), size, (height, width))


class Augment(NamedTuple):
    """How an image is made another at random; `kind` is one of KINDS. Called, it gives geometries, to be done in turn.

    `lsj`: `jitter` to `target`; `shortest_edge`: one of the short sides `sizes`, at most `longest` long; `crop`: that,
    or half of the time first a crop of an image with another short side; `none`: flips alone.
    """

    kind: str
    target: int = 1024
    scale_range: Sequence[float] = (0.1, 2.0)
    sizes: Sequence[int] = (800,)
    longest: int = 1333
    hflip: float = 0.5

    @property
    def crops(self) -> bool:
        """Whether objects may be cut: their boxes are to be taken anew from what is left of their masks."""
        return self.kind in ('lsj', 'crop')

    def __call__(self, height: int, width: int, draws: np.random.Generator) -> list[Geometry]:
        if self.kind == 'lsj':
            return [jitter(height, width, self.target, *draws.random(3), self.scale_range, self.hflip)]
        steps = [resizing(height, width, (height, width), bool(draws.random() < self.hflip))]
        if self.kind == 'crop' and draws.random() < 0.5:
            steps.append(random_crop(height, width, draws))
        if self.kind != 'none':
            size = steps[-1].size
            steps.append(resizing(*size, shortest_edge(*size, int(draws.choice(self.sizes)), self.longest)))
        return steps


KINDS = ('lsj', 'shortest_edge', 'crop', 'none')


def random_crop(height: int, width: int, draws: np.random.Generator) -> Geometry:
    """A crop of an image that is resized first; it may hold no object."""
    resized = shortest_edge(height, width, int(draws.choice(BEFORE_CROP)), LONGEST_BEFORE_CROP)
    size = tuple(int(draws.integers(min(x, CROPPED[0]), min(x, CROPPED[1]) + 1)) for x in resized)
    offset = tuple(int(draws.integers(x - cut + 1)) for x, cut in zip(resized, size, strict=True))
    return Geometry(False, resized, offset, size, (height, width))


# --------------------------------------------------------------------------
# polygons


def clipped(polygon: np.ndarray, size: tuple[int, int]) -> list[np.ndarray]:
    """What of a polygon [n, 2] is within (height, width): polygons [m, 2], none if nothing is."""
    parts = [polygon]
    for axis, limit in enumerate(size[::-1]):
        for sign, border in ((1, 0), (-1, limit)):
            parts = [piece for part in parts for piece in beyond(part, axis, border, sign)]
    return parts


def beyond(polygon: np.ndarray, axis: int, border: float, sign: int) -> list[np.ndarray]:
    """The pieces of a polygon [n, 2] beyond a border of one axis, on the side of greater (1) or smaller (-1) numbers.

    Pieces are not joined along the border, as Sutherland and Hodgman's would be: their bounds are the object's.
    """
    depth = sign * (polygon[:, axis] - border)
    inside = depth > 0
    if not inside.any():
        return []
    if (depth >= 0).all():
        return [polygon]
    chains, first = [], int(np.flatnonzero(~inside)[0])
    order = [*range(first, len(polygon)), *range(first + 1)]
    for a, b in itertools.pairwise(order):
        if inside[a] != inside[b]:
            crossing = polygon[a] + (polygon[b] - polygon[a]) * (depth[a] / (depth[a] - depth[b]))
            crossing[axis] = border
            if inside[b]:
                chains.append([])
            chains[-1].append(crossing)
        if inside[b]:
            chains[-1].append(polygon[b])
    after = followers(chains, 1 - axis)
    pieces = []
    while after:
        chain, points = next(iter(after)), []
        while chain in after:
            points += chains[chain]
            chain = after.pop(chain)
        pieces.append(np.array(points))
    return pieces


def followers(chains: list[list[np.ndarray]], axis: int) -> dict[int, int]:
    """Which chain of points begins where another ends, by numbers: along the border from it, that is inside between.

    Ends and beginnings take turns along the border; where a polygon crosses itself, the nearest ones belong together.
    """
    ends = [(points[0][axis], True, i) for i, points in enumerate(chains)]
    ends += [(points[-1][axis], False, i) for i, points in enumerate(chains)]
    after, waiting = {}, []
    for _, begins, chain in sorted(ends):
        if waiting and waiting[-1][0] != begins:
            other = waiting.pop()[1]
            after.update([(other, chain) if begins else (chain, other)])
        else:
            waiting.append((begins, chain))
    return after
