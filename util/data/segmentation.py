"""Pairs of an image and its annotation: to crops for training, and from logits to a prediction and its mIoU.

Training's transforms, inference and metric are those of mmsegmentation 0.11, which the papers' code was written for, in
numbers; none of its libraries is needed. Images and labels are numpy arrays up to the batch, uint8 [H, W, 3] and
[H, W]; pixels labelled 255 are ignored. Sizes are (height, width).
"""

import argparse
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from util import dist, resources, rng
from util.data.annotations import (  # noqa: F401
    IGNORED,
    PairSplit,
    checked,
    known_labels,
    pairs,
    reduce_zero_label,
    reduces,
    stored_of,
)
from util.data.datasets import ImageFiles, Normalisation
from util.data.images import Reader, reason
from util.errors import RunError, UserError

MEAN, STD = (123.675 / 255, 116.28 / 255, 103.53 / 255), (58.395 / 255, 57.12 / 255, 57.375 / 255)
LONGEST = 4  # times the short side: how long an image at test scale may be
CROPS_TRIED = 10
LARGEST_SHARE = 0.75  # of one class in a crop

Side = int | tuple[int, int]  # of a square, or height and width


def both(side: Side) -> tuple[int, int]:
    return (side, side) if isinstance(side, int) else tuple(side)


# --------------------------------------------------------------------------
# sizes


def rescaled_size(height: int, width: int, scale: tuple[int, int]) -> tuple[int, int]:
    """The largest size of the same shape whose sides are within `scale`, the longer side with the larger number."""
    factor = min(max(scale) / max(height, width), min(scale) / min(height, width))
    return max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))


def scale_of(short_side: int, ratio: float) -> tuple[int, int]:
    return int(LONGEST * short_side * ratio), int(short_side * ratio)


class Taps(NamedTuple):
    """Of which two pixels each pixel of a resized side is made, and how much of each, in 2048ths: bilinear."""

    low: np.ndarray
    high: np.ndarray
    of_low: np.ndarray
    of_high: np.ndarray

    @classmethod
    def of(cls, old: int, new: int, first: int, count: int) -> 'Taps':
        """Of `count` pixels from `first` on. Half-pixel centres, weights in float32, as OpenCV computes them."""
        centre = ((np.arange(first, first + count) + 0.5) * (1 / (new / old)) - 0.5).astype(np.float32)
        low = np.floor(centre)
        share = centre - low
        ends = (np.clip(low + step, 0, old - 1).astype(np.intp) for step in (0, 1))
        return cls(*ends, *(np.rint(part * np.float32(2048)).astype(np.int32) for part in (1 - share, share)))


def resize_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear without antialiasing: OpenCV's, to the bit."""
    return resized_box(image, size, (0, 0), size)


def resized_box(
    image: np.ndarray, size: tuple[int, int], corner: tuple[int, int], extent: tuple[int, int]
) -> np.ndarray:
    """The box of `extent` at `corner` (top, left) of the resized image: no other pixel is computed.

    In fixed point: 11 bits of weight, columns first; what is left of them after the rows is rounded.
    """
    rows, columns = (Taps.of(*axis) for axis in zip(image.shape[:2], size, corner, extent, strict=True))
    top, left = rows.low[0], columns.low[0]
    part = image[top : rows.high[-1] + 1, left : columns.high[-1] + 1]
    wide = np.empty((len(part), extent[1], 3), np.int32)
    for band in bands(len(part)):
        values = part[band].astype(np.int32)
        made = values.take(columns.low - left, 1) * columns.of_low[:, None]
        made += values.take(columns.high - left, 1) * columns.of_high[:, None]
        np.right_shift(made, 4, out=wide[band])
    out = np.empty((*extent, 3), np.uint8)
    for band in bands(len(out)):
        made = wide.take(rows.low[band] - top, 0) * rows.of_low[band, None, None] >> 16
        made += wide.take(rows.high[band] - top, 0) * rows.of_high[band, None, None] >> 16
        out[band] = made + 2 >> 2
    return out


def bands(rows: int, count: int = 32) -> list[slice]:
    """A few rows at a time, whose intermediate values stay in a processor's cache: it is several times as fast."""
    return [slice(start, start + count) for start in range(0, rows, count)]


def nearest(old: int, new: int, first: int, count: int) -> np.ndarray:
    """Of which pixel each of `count` pixels from `first` on of a resized side is a copy: OpenCV's nearest."""
    return np.minimum(np.floor(np.arange(first, first + count) * (1 / (new / old))), old - 1).astype(np.intp)


def resize_label(label: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return label_box(label, size, (0, 0), size)


def label_box(label: np.ndarray, size: tuple[int, int], corner: tuple[int, int], extent: tuple[int, int]) -> np.ndarray:
    """The box of `extent` at `corner` of the resized label."""
    rows, columns = (nearest(*axis) for axis in zip(label.shape, size, corner, extent, strict=True))
    return label[rows][:, columns]


# --------------------------------------------------------------------------
# training's crop and colours


def acceptable(label: np.ndarray) -> bool:
    """Whether no class has three quarters or more of a crop's pixels, ignored ones apart: it has two at least."""
    counts = np.bincount(label.ravel(), minlength=IGNORED + 1)[:IGNORED]
    return bool(counts.max() < LARGEST_SHARE * counts.sum())


def random_crop(
    image: np.ndarray, label: np.ndarray, size: tuple[int, int], crop: tuple[int, int], draws: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """A crop of both, resized to `size`; smaller where a side is.

    Up to ten crops that are not acceptable are drawn again; the eleventh is taken as it is.
    """
    extent = tuple(map(min, size, crop))
    for attempt in range(CROPS_TRIED + 1):
        corner = tuple(int(draws.integers(side - cut + 1)) for side, cut in zip(size, extent, strict=True))
        part = label_box(label, size, corner, extent)
        if attempt == CROPS_TRIED or acceptable(part):
            break
    return resized_box(image, size, corner, extent), part


def scaled(levels: np.ndarray, factor: float = 1.0, shift: float = 0.0) -> np.ndarray:
    """uint8 levels, multiplied, shifted and cut off; in float32, and truncated."""
    return np.clip(levels.astype(np.float32) * np.float32(factor) + np.float32(shift), 0, 255).astype(np.uint8)


LEVELS = np.arange(256, dtype=np.uint8)
# OpenCV's HSV of 8 bits: hue in 0..179; saturation by the largest channel (rows) and how far the channels are apart
DIVISORS = np.maximum(np.arange(256), 1)
SATURATION = (np.arange(256) * np.rint(2**12 * 255 / DIVISORS).astype(int)[:, None] + 2**11 >> 12).astype(np.uint8)
HUE_STEP = np.where(np.arange(256) > 0, np.rint(2**12 * 30 / DIVISORS), 0).astype(np.int32)
UNIT = np.float32(1 / 255)


def fading() -> np.ndarray:
    """float32 [3, 180]: by hue, how much of the saturation R, G and B lose of the largest channel."""
    hue = np.arange(180, dtype=np.float32) * np.float32(6 / 180)
    sector, rest = np.floor(hue).astype(int), hue - np.floor(hue)
    kinds = np.stack([np.zeros_like(rest), np.ones_like(rest), rest, 1 - rest])  # nothing, all, falling, rising
    of_sectors = np.array([[0, 2, 1, 1, 3, 0], [3, 0, 0, 2, 1, 1], [1, 1, 3, 0, 0, 2]])
    return kinds[of_sectors[:, sector], np.arange(180)]


FADING = fading()


def in_hsv(image: np.ndarray, saturation: float = 1.0, hue: int = 0) -> np.ndarray:
    """The image with its saturation multiplied, or its hue shifted by 2-degree steps, through 8-bit HSV and back.

    As OpenCV does it, which on the way back truncates a row in blocks of 32 pixels, and rounds those that are left.
    """
    saturations = scaled(LEVELS, saturation).take(SATURATION).ravel() * UNIT
    losses = np.roll(FADING, -hue, 1)
    out, rounded = np.empty(image.shape, np.uint8), slice(image.shape[1] // 32 * 32, None)
    for band in bands(len(image)):
        r, g, b = (image[band, :, channel].astype(np.int16) for channel in range(3))
        largest = np.maximum(np.maximum(r, g), b)
        apart = largest - np.minimum(np.minimum(r, g), b)
        h = r - g + 4 * apart
        h += (largest == g) * (b - r + 2 * apart - h)
        h += (largest == r) * (g - b - h)
        places = apart.astype(np.intp)
        h = h * HUE_STEP.take(places) + 2**11 >> 12
        h += (h < 0) * np.int32(180)
        s = saturations.take((largest.astype(np.intp) << 8) + places)
        value, h = largest * UNIT, h.astype(np.intp)
        for channel, loss in enumerate(losses):
            made = value * (1 - s * loss.take(h)) * np.float32(255)
            np.rint(made[:, rounded], out=made[:, rounded])
            out[band, :, channel] = made.astype(np.uint8)
    return out


def distort(
    image: np.ndarray,
    brightness: float | None = None,
    contrast_before: float | None = None,
    saturation: float | None = None,
    hue: int | None = None,
    contrast_after: float | None = None,
) -> np.ndarray:
    """mmsegmentation's photometric distortion, in the order of the arguments; None: a step that was not drawn."""
    before = LEVELS
    if brightness is not None:
        before = scaled(before, shift=brightness)
    if contrast_before is not None:
        before = scaled(before, contrast_before)
    image = image if before is LEVELS else before.take(image)
    if saturation is not None:
        image = in_hsv(image, saturation=saturation)
    if hue is not None:
        image = in_hsv(image, hue=hue)
    return image if contrast_after is None else scaled(LEVELS, contrast_after).take(image)


def distortion(draws: np.random.Generator) -> dict[str, float | None]:
    """Arguments of `distort`: each step with probability 1/2, contrast before or after the others."""
    contrast = 'contrast_before' if draws.random() < 0.5 else 'contrast_after'
    steps = {
        'brightness': draws.uniform(-32, 32),
        contrast: draws.uniform(0.5, 1.5),
        'saturation': draws.uniform(0.5, 1.5),
        'hue': int(draws.integers(-18, 18)),
    }
    return {name: value for name, value in steps.items() if draws.random() < 0.5}


def pad(image: np.ndarray, label: np.ndarray, crop: Side) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    """Both filled up to the crop, right and below; and the size that is valid: the rest `normalise` makes 0."""
    height, width = label.shape
    if (height, width) == both(crop):
        return image, label, (height, width)
    padded, labels = np.zeros((*both(crop), 3), np.uint8), np.full(both(crop), IGNORED, np.uint8)
    padded[:height, :width], labels[:height, :width] = image, label
    return padded, labels, (height, width)


def normalise(imgs: Tensor, valid: Tensor, normalisation: Normalisation | None = None) -> Tensor:
    """uint8 [N, 3, H, W] and the valid sizes, int64 [N, 2], to normalised float32, 0 outside of them."""
    if normalisation is None:
        normalisation = Normalisation.of(MEAN, STD, imgs.device)
    rows, columns = (torch.arange(side, device=imgs.device) for side in imgs.shape[2:])
    inside = (rows < valid[:, :1])[:, None, :, None] & (columns < valid[:, 1:])[:, None, None]
    return normalisation(imgs).masked_fill(~inside, 0)


# --------------------------------------------------------------------------
# data sets


class PairFiles(ImageFiles):
    """Images and their annotations. EXIF's rotation is ignored in both.

    A pair one of whose files cannot be read is a bad image. What is wrong with labels raises UserError.
    """

    def __init__(
        self, split: PairSplit, reduce_zero: bool, seed: int = 0, reader: Reader | None = None, replace: bool = True
    ):
        super().__init__(split.images, None, None, seed, reader, replace)
        self.split, self.reduce_zero = split, reduce_zero

    def pair(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Image and label, in full size; without annotations all of the label is ignored."""
        image = np.asarray(self.image(index))
        if self.split.annotations is None:
            return image, np.full(image.shape[:2], IGNORED, np.uint8)
        name = self.split.annotations.name(index)
        try:
            label = stored_of(self.split, index, image.shape[:2], self.reader)
        except Exception as error:
            if isinstance(error, RunError) or resources.starved(error):
                raise
            raise ValueError(f'its annotation {name}: {reason(error)}') from error
        return image, checked(label, len(self.split.classes), self.reduce_zero, name)


class TrainPairs(PairFiles):
    """For training; an item is (uint8 image [3, c, c], uint8 label [c, c], int64 [2], the size that is not padding).

    Resized at random (a short side of `short_side` times a ratio in `scale_range`, a long one of at most four times
    that), cropped, flipped, distorted in its colours, padded. All draws are functions of the seed and the item.
    """

    def __init__(
        self,
        split: PairSplit,
        crop: Side,
        short_side: int | None = None,
        scale_range: Sequence[float] = (0.5, 2.0),
        hflip: float = 0.5,
        photometric: bool = True,
        reduce_zero: bool = False,
        seed: int = 0,
        reader: Reader | None = None,
    ):
        super().__init__(split, reduce_zero, seed, reader)
        self.crop, self.short_side = both(crop), short_side or min(both(crop))
        self.scale_range, self.hflip, self.photometric = scale_range, hflip, photometric

    def sample(self, index: int, item: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
        image, label = self.pair(index)
        draws = rng.generator(self.seed, rng.SAMPLE, *item)
        size = rescaled_size(*label.shape, scale_of(self.short_side, draws.uniform(*self.scale_range)))
        image, label = random_crop(image, label, size, self.crop, draws)
        if draws.random() < self.hflip:
            image, label = image[:, ::-1], label[:, ::-1]
        if self.photometric:
            image = distort(image, **distortion(draws))
        image, label, valid = pad(image, label, self.crop)
        image, label = (torch.from_numpy(np.ascontiguousarray(x)) for x in (image, label))
        return image.movedim(-1, 0), label, torch.tensor(valid)


class TestPairs(PairFiles):
    """For evaluation; an item is (uint8 images [3, h, w], one for each test scale; uint8 label of the original size).

    At other scales than 1 alone, an image whose short side would be less than `least` is resized to that instead: where
    a network of a fixed size is tested at several scales.
    """

    __test__ = False  # pytest would take it for tests

    def __init__(
        self,
        split: PairSplit,
        short_side: int,
        scales: Sequence[float] = (1.0,),
        least: int | None = None,
        reduce_zero: bool = False,
        reader: Reader | None = None,
    ):
        super().__init__(split, reduce_zero, reader=reader, replace=False)
        self.short_side, self.scales, self.least = short_side, scales, least

    def size(self, height: int, width: int, ratio: float) -> tuple[int, int]:
        """At test scale."""
        size = rescaled_size(height, width, scale_of(self.short_side, ratio))
        if not self.least or list(self.scales) == [1] or min(size) >= self.least:
            return size
        factor = self.least / min(height, width)
        return int(height * factor + 0.5), int(width * factor + 0.5)

    def sample(self, index: int, item: tuple[int, ...]) -> tuple[list[Tensor], Tensor]:
        image, label = self.pair(index)
        sizes = [self.size(*label.shape, ratio) for ratio in self.scales]
        images = [torch.from_numpy(resize_image(image, size)).movedim(-1, 0) for size in sizes]
        return images, torch.from_numpy(np.ascontiguousarray(label))

    def blank(self) -> tuple[list[Tensor], Tensor]:
        """All of its label is ignored."""
        images = [torch.zeros(3, self.short_side, self.short_side, dtype=torch.uint8) for _ in self.scales]
        return images, torch.full((1, 1), IGNORED, dtype=torch.uint8)


def training_pairs(split: PairSplit, args: argparse.Namespace, reader: Reader) -> TrainPairs:
    """As the arguments ask for."""
    return TrainPairs(
        split,
        args.input_size,
        args.short_side,
        args.scale_range,
        args.hflip,
        args.photometric,
        reduces(args),
        args.seed,
        reader,
    )


def test_pairs(split: PairSplit, args: argparse.Namespace, reader: Reader, fixed_size: int | None) -> TestPairs:
    """As the arguments ask for, for a network of a fixed size or of none."""
    short_side = args.short_side or args.input_size
    return TestPairs(split, short_side, args.test_scales, fixed_size, reduces(args), reader)


# --------------------------------------------------------------------------
# inference


def windows(length: int, crop: int, stride: int) -> list[tuple[int, int]]:
    """Where the windows of one side begin and end: the last one ends with the side, a shorter side has one of its own.

    mmsegmentation's."""
    count = max(length - crop + stride - 1, 0) // stride + 1
    ends = [min(i * stride + crop, length) for i in range(count)]
    return [(max(end - crop, 0), end) for end in ends]


def slide_logits(model: nn.Module, imgs: Tensor, crop: Side, stride: Side) -> Tensor:
    """Logits [N, K, H, W] of images [N, 3, H, W], the mean of those of overlapping windows.

    A window that is shorter than the crop is filled up with 0 for a network that has a fixed size.
    """
    (height, width), (rows, columns) = both(crop), both(stride)
    total, count = None, imgs.new_zeros(1, 1, *imgs.shape[2:])
    for top, bottom in windows(imgs.shape[2], height, rows):
        for left, right in windows(imgs.shape[3], width, columns):
            window = imgs[:, :, top:bottom, left:right]
            if getattr(model, 'fixed_size', None):
                window = F.pad(window, (0, width - (right - left), 0, height - (bottom - top)))
            logits = exact(model(window))[:, :, : bottom - top, : right - left]
            if total is None:
                total = logits.new_zeros(*logits.shape[:2], *imgs.shape[2:])
            total[:, :, top:bottom, left:right] += logits
            count[:, :, top:bottom, left:right] += 1
    return total / count


def exact(logits: Tensor) -> Tensor:
    """In float32, but float64 where they are."""
    return logits if logits.dtype == torch.float64 else logits.float()


@torch.no_grad()
def predict(
    model: nn.Module,
    imgs: Tensor | Sequence[Tensor],
    size: tuple[int, int],
    mode: str = 'whole',
    crop: Side | None = None,
    stride: Side | None = None,
    flip: bool = False,
) -> Tensor:
    """Probabilities [N, K, *size] of images [N, 3, H, W], normalised and at test scale, or of a list of several scales.

    'whole': the network takes the whole image; 'slide': windows of it, by default of the network's fixed size and two
    thirds of it apart. The logits are resized to `size`, and probabilities averaged over scales and, with `flip`, the
    mirrored images. Raises ValueError for another mode, and for a crop that nothing tells.
    """
    if mode not in ('whole', 'slide'):
        raise ValueError(f'mode {mode!r} is not one of whole, slide')
    imgs = [imgs] if isinstance(imgs, Tensor) else imgs
    if mode == 'slide':
        crop = crop or getattr(model, 'fixed_size', None)
        if crop is None:
            raise ValueError("mode 'slide' of a network that takes any size needs a crop")
        stride = stride or tuple(2 * side // 3 for side in both(crop))
    views = [(scale, mirrored) for scale in imgs for mirrored in ((False, True) if flip else (False,))]
    total = None
    for scale, mirrored in views:
        view = scale.flip(-1) if mirrored else scale
        logits = slide_logits(model, view, crop, stride) if mode == 'slide' else exact(model(view))
        found = F.interpolate(logits, tuple(size), mode='bilinear', align_corners=False).softmax(1)
        found = found.flip(-1) if mirrored else found
        total = found if total is None else total.add_(found)
    return total.div_(len(views))


# --------------------------------------------------------------------------
# the metric


class Confusion:
    """Pixels by their label and prediction, [K, K]; those labelled 255 are ignored."""

    def __init__(self, num_classes: int, device: torch.device | str = 'cpu'):
        self.num_classes = num_classes
        self.matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)

    def update(self, prediction: Tensor, label: Tensor) -> None:
        """Count predicted classes and labels of the same shape. Raises UserError for a label beyond the classes."""
        prediction, label = (torch.as_tensor(x, device=self.matrix.device) for x in (prediction, label))
        if prediction.shape != label.shape:
            raise ValueError(f'predictions {[*prediction.shape]} of labels {[*label.shape]}')
        counted = label != IGNORED
        label, prediction = label[counted].long(), prediction[counted].long()
        k = self.num_classes
        for name, numbers in (('label', label), ('prediction', prediction)):
            if len(beyond := numbers[(numbers < 0) | (numbers >= k)]):
                raise UserError(f'a {name} is {int(beyond[0])}, beyond the {k} classes: {known_labels(k)}')
        self.matrix += torch.bincount(k * label + prediction, minlength=k * k).view(k, k)

    def reduce(self) -> None:
        """Add up those of all ranks."""
        dist.all_reduce_sum(self.matrix)

    def miou(self) -> dict[str, float | np.ndarray]:
        """Fractions: mIoU, mAcc and aAcc, and IoU and Acc of each class, float64 [K].

        nan is 0/0, which means leave out; a class that is predicted, but never labelled, has IoU 0 and counts.
        """
        matrix = self.matrix.cpu().numpy().astype(np.float64)
        right, labelled, predicted = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
        with np.errstate(invalid='ignore'):
            iou, acc, total = right / (labelled + predicted - right), right / labelled, right.sum() / labelled.sum()
        return {'mIoU': mean(iou), 'mAcc': mean(acc), 'aAcc': float(total), 'IoU': iou, 'Acc': acc}


def mean(fractions: np.ndarray) -> float:
    """Of those that are numbers; nan if none is."""
    known = fractions[~np.isnan(fractions)]
    return float(known.mean()) if len(known) else float('nan')
