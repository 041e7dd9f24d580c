"""Pairs of pictures and labels to segment, and what a short run of it takes."""

from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ['background', 'square', 'disk']


def make_pairs(folder: Path, train: int = 11, val: int = 3, side: int = 40) -> Path:
    """Squares and disks of a colour per class on noise, in several sizes; three rows of each are not counted."""
    numbers = np.random.default_rng(0)
    for split, count in (('train', train), ('val', val)):
        for kind in ('images', 'annotations'):
            (folder / kind / split).mkdir(parents=True)
        for i in range(count):
            height, width = side + numbers.integers(0, 12, 2)
            y, x = np.mgrid[:height, :width]
            label = np.zeros((height, width), np.uint8)
            for kind in (1, 2):
                dy, dx = y - numbers.integers(8, height - 8), x - numbers.integers(8, width - 8)
                radius = numbers.integers(6, 14)
                label[np.maximum(abs(dy), abs(dx)) < radius if kind == 1 else dy**2 + dx**2 < radius**2] = kind
            colours = np.array([[90, 90, 90], [200, 60, 60], [60, 60, 200]])[label]
            image = (colours + numbers.integers(-30, 30, colours.shape)).astype(np.uint8)
            label[:3] = 255
            Image.fromarray(image).save(folder / 'images' / split / f'{i}.png')
            Image.fromarray(label).save(folder / 'annotations' / split / f'{i}.png')
    (folder / 'classes.txt').write_text('\n'.join(CLASSES))
    return folder
