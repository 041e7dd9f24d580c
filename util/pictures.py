"""What a model reconstructs, drawn as one labelled picture."""

import argparse
import re
from functools import cache

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from util import rng
from util.data import augment, datasets
from util.data.images import Reader
from util.data.stores import Store

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
