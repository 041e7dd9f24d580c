"""What a model reconstructs, drawn as one labelled picture."""

import argparse

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from util import rng
from util.data import augment, datasets
from util.data.images import Reader

MARGIN, FONT_SIZE = 4, 14


class Pictures:
    """A few images, reconstructed under masks that depend on the seed alone: the same every time.

    At most `count` images are taken, evenly from all; the reader says what becomes of bad ones.
    """

    def __init__(
        self, core: nn.Module, images: datasets.Images, args: argparse.Namespace, reader: Reader, count: int = 6
    ):
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
    """
    mean, std = (torch.as_tensor(x, dtype=torch.float32).view(1, 3, 1, 1) for x in (mean, std))
    rows = len(next(iter(panels.values())))
    side = next(iter(panels.values())).shape[-1]
    side *= max(1, -(-tile // side))
    font = ImageFont.load_default(FONT_SIZE)
    widest = max(side, *(int(font.getlength(name)) for name in panels))
    header = FONT_SIZE + 2 * MARGIN
    size = ((widest + MARGIN) * len(panels) + MARGIN, header + (side + MARGIN) * rows)
    canvas = Image.new('RGB', size, 'white')
    draw = ImageDraw.Draw(canvas)
    for column, (name, images) in enumerate(panels.items()):
        left = MARGIN + column * (widest + MARGIN)
        draw.text((left, MARGIN), name, fill='black', font=font)
        pixels = (images.detach().float().cpu() * std + mean).clamp(0, 1).mul(255).round().byte()
        for row, image in enumerate(pixels.permute(0, 2, 3, 1).numpy()):
            enlarged = Image.fromarray(image).resize((side, side), Image.Resampling.NEAREST)
            canvas.paste(enlarged, (left, header + row * (side + MARGIN)))
    return np.asarray(canvas)
