"""What a model reconstructs, how one labels the pixels of an image, and what one detects, drawn as one picture."""

import argparse
import re
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from util import rng
from util.data import augment, datasets, segmentation
from util.data.coco import CocoFolder
from util.data.images import Reader
from util.data.stores import Store
from util.errors import printable

MARGIN, LINE = 6, 18  # pixels
NARROWEST = 360  # pixels, so that the notes can be read below a single small panel
NOTES = {  # written below the picture, if the word is in a panel's name
    'composite': 'the image where it was visible, the prediction where it was hidden',
    'masked': 'what was visible; plain parts were hidden',
    'mixed': 'what the network saw: the image, and its partner where the image was hidden',
    'prediction': 'plain gray parts were visible, so nothing is predicted there',
    'part': 'main and residual add up to the prediction of the same number',
    'scale': 'the prediction for cells of one size, 0 the smallest; plain gray parts were visible',
    'edges': "predicted instead of pixels and drawn as strokes; 'true': those of the original",
    'oracle': "with each hidden patch's true brightness and contrast, which the network does not predict",
    'spectrum': 'log amplitudes, low frequencies in the middle',
}


class Pictures:
    """A few images, reconstructed under masks that depend on the seed alone: the same every time.

    At most `count` images are taken, evenly from all; the reader says what becomes of bad ones.
    """

    def __init__(self, core: nn.Module, images: Store, args: argparse.Namespace, reader: Reader, count: int = 6):
        count, total = min(count, len(images)), len(images)
        transform = augment.eval_transform(args.input_size, 1.0, args.max_pixels)
        images = datasets.ImageFiles(images, None, transform, args.seed, reader)
        self.imgs = torch.stack([images[0, i * total // count][0] for i in range(count)])
        self.plan = core.plan_from_noise(rng.picture_noise(core, args.seed, count))
        self.mean, self.std = args.mean, args.std

    def draw(self, core: nn.Module, device: torch.device) -> np.ndarray:
        """[height, width, 3] uint8."""
        imgs, plan = datasets.to_device((self.imgs, self.plan), device)
        imgs = datasets.Normalisation.of(self.mean, self.std, device)(imgs)
        return grid(core.reconstruct(imgs, plan), self.mean, self.std)


def grid(panels: dict[str, Tensor], mean: list[float], std: list[float], tile: int = 112) -> np.ndarray:
    """{name: [N, 3, H, W]} in normalised space -> [height, width, 3] uint8: a column per panel, a row per image.

    `mean` and `std` are the normalisation's; small images are enlarged to at least `tile` pixels without smoothing.
    Names stand above their columns, and below the picture what they mean.
    """
    mean, std = (torch.as_tensor(x, dtype=torch.float32).view(1, 3, 1, 1) for x in (mean, std))
    rows, _, _, side = next(iter(panels.values())).shape
    side *= max(1, -(-tile // side))
    step = side + MARGIN
    width = max(NARROWEST, MARGIN + step * len(panels))
    titles = [wrapped(name, side - MARGIN) for name in panels]
    notes = [
        line
        for word, note in NOTES.items()
        if any(re.search(rf'\b{word}\b', name) for name in panels)
        for line in wrapped(f'{word}: {note}', width - 2 * MARGIN)
    ]
    header = MARGIN + LINE * max(map(len, titles))
    below = header + step * rows
    canvas = Image.new('RGB', (width, below + LINE * len(notes) + MARGIN), 'white')
    draw = ImageDraw.Draw(canvas)
    for column, (lines, images) in enumerate(zip(titles, panels.values(), strict=True)):
        left = MARGIN + column * step
        write(draw, lines, left, header - LINE * len(lines) - MARGIN // 2)
        pixels = (images.detach().float().cpu() * std + mean).clamp(0, 1).mul(255).round().byte()
        for row, image in enumerate(pixels.permute(0, 2, 3, 1).numpy()):
            enlarged = Image.fromarray(image).resize((side, side), Image.Resampling.NEAREST)
            canvas.paste(enlarged, (left, header + row * step))
    write(draw, notes, MARGIN, below)
    return np.asarray(canvas)


@cache
def font() -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(14)


def write(draw: ImageDraw.ImageDraw, lines: list[str], left: int, top: int) -> None:
    """Lines of text below each other."""
    for i, line in enumerate(lines):
        draw.text((left, top + i * LINE), line, fill='black', font=font())


def wrapped(text: str, width: int) -> list[str]:
    """The text in lines of at most `width` pixels, broken between words, and inside a word that is wider alone."""
    lines = ['']
    for word in text.split(' '):
        if lines[-1] and font().getlength(f'{lines[-1]} {word}') > width:
            lines.append('')
        lines[-1] = f'{lines[-1]} {word}'.lstrip()
        while font().getlength(lines[-1]) > width:
            fits = max(1, sum(font().getlength(lines[-1][: n + 1]) <= width for n in range(len(lines[-1]))))
            lines[-1:] = [lines[-1][:fits], lines[-1][fits:]]
    return lines


# --------------------------------------------------------------------------
# labels

MOST_NAMED = 40  # classes in a legend


def some_labelled(
    label_of: Callable[[list[Tensor], tuple[int, int]], Tensor], pairs: segmentation.TestPairs, count: int = 4
) -> np.ndarray:
    """A few images, evenly from all, beside their labels and those of a network: [height, width, 3] uint8.

    `label_of(imgs, size)` labels what evaluation loads, a list of one uint8 image [1, 3, h, w] for each test scale, in
    a size: [1, *size].
    """
    images, truth, prediction = [], [], []
    for number in range(min(count, len(pairs))):
        scales, label = pairs[0, number * len(pairs) // min(count, len(pairs))]
        size = tuple(scales[0].shape[1:])
        images.append(scales[0].movedim(0, -1).numpy())
        truth.append(segmentation.resize_label(label.numpy(), size))
        prediction.append(label_of([scale[None] for scale in scales], size)[0].byte().cpu().numpy())
    columns = {'image': None, 'truth': truth, 'prediction': prediction}
    return labelled(images, columns, pairs.split.classes, width=320)


def overlay(image: np.ndarray, label: np.ndarray, classes: list[str]) -> np.ndarray:
    """An image, uint8 [H, W, 3], under the colours of its label [H, W], and a legend: [height, width, 3] uint8."""
    return labelled([image], {'prediction': [label]}, classes)


def label_png(label: np.ndarray) -> Image.Image:
    """A label, uint8 [H, W], as places in the palette: an annotation, which a viewer shows in colours."""
    picture = Image.fromarray(label)
    picture.putpalette(palette(256).tobytes())
    return picture


@cache
def palette(num_classes: int) -> np.ndarray:
    """Colours that are far apart, uint8 [K, 3]: those of PASCAL VOC, brighter, without its black of the background.

    The bits of the number, from the lowest, go to red, green and blue in turn, the first to the highest bit of each.
    """
    bits = np.arange(1, num_classes + 1)[:, None] >> np.arange(24) & 1
    of_voc = (bits.reshape(-1, 8, 3) << np.arange(7, -1, -1)[:, None]).sum(1)
    return (of_voc * 255 // 224).astype(np.uint8)


def painted(image: np.ndarray, label: np.ndarray, num_classes: int, strength: float = 0.6) -> np.ndarray:
    """The image, uint8 [H, W, 3], under the colours of its label [H, W]; what is ignored stays as it is."""
    colours = np.zeros((256, 3))
    colours[:num_classes] = palette(num_classes)
    share = np.where(np.arange(256) < num_classes, strength, 0)[label][..., None]
    return (image * (1 - share) + colours[label] * share).round().astype(np.uint8)


def labelled(
    images: list[np.ndarray], labels: dict[str, list[np.ndarray] | None], classes: list[str], width: int | None = None
) -> np.ndarray:
    """A row per image, uint8 [H, W, 3], a column per name: its label [H, W] as colours, or without labels the image.

    Panels are `width` pixels wide, but narrower where they would be more than four times as high; by default as wide as
    the widest image. The legend below names the classes in the labels, those with the most pixels first.
    """
    tallest = segmentation.LONGEST * width if width else max(image.shape[0] for image in images)
    width = width or max(image.shape[1] for image in images)
    whole = max(NARROWEST, MARGIN + (width + MARGIN) * len(labels))
    counts = sum(np.bincount(np.ravel(label), minlength=256) for column in labels.values() for label in column or ())
    factors = [min(width / image.shape[1], tallest / image.shape[0]) for image in images]
    drawn = [
        [
            Image.fromarray(painted(image, column[row], len(classes)) if column else image).resize(
                [max(1, round(factors[row] * side)) for side in image.shape[1::-1]]
            )
            for column in labels.values()
        ]
        for row, image in enumerate(images)
    ]
    entries, height = legend(counts, classes, whole)
    canvas, below = arranged(drawn, list(labels), width, height)
    draw = ImageDraw.Draw(canvas)
    for left, line, text, colour in entries:
        if colour:
            corner = left, below + line * LINE + 3
            draw.rectangle([*corner, corner[0] + LINE - 6, corner[1] + LINE - 6], fill=colour, outline='black')
        write(draw, [text], left + LINE * bool(colour), below + line * LINE)
    return np.asarray(canvas)


def arranged(rows: list[list[Image.Image]], names: list[str], width: int, space: int = 0) -> tuple[Image.Image, int]:
    """Rows of panels, `width` wide, on a canvas, below the names of their columns, and where they end.

    Below them `space` is left.
    """
    bottom = MARGIN + LINE + sum(panels[0].height + MARGIN for panels in rows)
    canvas = Image.new(
        'RGB', (max(NARROWEST, MARGIN + (width + MARGIN) * len(names)), bottom + space + MARGIN), 'white'
    )
    lefts = [MARGIN + column * (width + MARGIN) for column in range(len(names))]
    for name, left in zip(names, lefts, strict=True):
        write(ImageDraw.Draw(canvas), [name], left, MARGIN // 2)
    top = MARGIN + LINE
    for panels in rows:
        for panel, left in zip(panels, lefts, strict=True):
            canvas.paste(panel, (left, top))
        top += panels[0].height + MARGIN
    return canvas, bottom


def legend(counts: np.ndarray, classes: list[str], width: int) -> tuple[list[tuple], int]:
    """Entries (left, line, text, colour) of the classes that have pixels, in a box of `width` pixels, and its height.

    `counts` are pixels by label, [256].
    """
    shown = [label for label in np.argsort(-counts[: len(classes)], kind='stable') if counts[label]]
    texts = [(classes[label], tuple(map(int, palette(len(classes))[label]))) for label in shown[:MOST_NAMED]]
    if shown[MOST_NAMED:]:
        texts.append((f'and {len(shown) - MOST_NAMED} more', None))
    entries, left, line = [], MARGIN, 0
    for text, colour in texts:
        text = wrapped(text, width - 2 * MARGIN - LINE)[0]
        taken = LINE + round(font().getlength(text)) + 2 * MARGIN
        if left + taken > width and left > MARGIN:
            left, line = MARGIN, line + 1
        entries.append((left, line, text, colour))
        left += taken
    return entries, LINE * (line + 1) if texts else 0


# --------------------------------------------------------------------------
# detections

Objects = dict[str, Tensor]  # boxes [n, 4], labels [n] from 1, and where there are, scores [n], masks bool [n, H, W]


def some_detected(
    find: Callable[[Tensor, dict], Objects], images: CocoFolder, count: int = 4, width: int = 320
) -> np.ndarray:
    """A few images, evenly from all, with the annotated objects and the detections: [height, width, 3] uint8.

    `find(image, about)` gives what is in an image to test, uint8 [3, h, w], in pixels of its own `size`.
    """
    rows = []
    for number in range(min(count, len(images))):
        index = number * len(images) // min(count, len(images))
        tested, about = images[0, index]
        if about['image_id'] != datasets.SKIPPED:
            image, truth = images.original(index)
            found = truth, find(tested, about)
            rows.append([Image.fromarray(detected(image, of, images.split.classes, width)) for of in found])
    return np.asarray(arranged(rows, ['truth', 'prediction'], width)[0])


def detected(image: np.ndarray, objects: Objects, classes: list[str], width: int | None = None) -> np.ndarray:
    """An image, uint8 [H, W, 3], with the boxes of objects, their masks, names and scores: [height, width, 3] uint8.

    Small images are enlarged, so that names can be read, and with a `width` all are made that wide. The objects with
    the highest scores are drawn last. Colours are those of the classes.
    """
    height, own = image.shape[:2]
    tallest = segmentation.LONGEST * (width or NARROWEST)
    factor = min(width / own, tallest / height) if width else max(1, min(-(-NARROWEST // own), tallest // height))
    size = tuple(max(1, round(factor * side)) for side in (own, height))
    canvas = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR)).copy()
    found = {name: np.asarray(values.cpu()) for name, values in objects.items()}
    order = found['scores'].argsort(kind='stable') if 'scores' in found else np.arange(len(found['boxes']))
    colours = palette(max(len(classes), 1))
    for i in order if 'masks' in found else ():
        mask = np.asarray(Image.fromarray(found['masks'][i].astype(np.uint8)).resize(size, Image.Resampling.NEAREST))
        canvas[mask > 0] = canvas[mask > 0] * 0.5 + colours[found['labels'][i] - 1] * 0.5
    drawn = Image.fromarray(canvas)
    draw = ImageDraw.Draw(drawn)
    for i in order:
        colour = tuple(map(int, colours[found['labels'][i] - 1]))
        box = (found['boxes'][i] * factor).tolist()
        draw.rectangle(box, outline=colour, width=2)
        score = f' {found["scores"][i]:.2f}' if 'scores' in found else ''
        tag(draw, f'{printable(classes[found["labels"][i] - 1], 30)}{score}', box[:2], size, colour)
    return np.asarray(drawn)


def tag(
    draw: ImageDraw.ImageDraw, text: str, corner: list[float], size: tuple[int, int], colour: tuple[int, ...]
) -> None:
    """Text on a ground of a colour, above a corner of a box, or wherever of that is within the picture."""
    across = round(font().getlength(text)) + 4
    left = max(0, min(round(corner[0]), size[0] - across))
    top = max(0, round(corner[1]) - LINE)
    draw.rectangle([left, top, left + across, top + LINE - 1], fill=colour)
    draw.text((left + 2, top), text, fill='black' if sum(colour) > 3 * 110 else 'white', font=font())
