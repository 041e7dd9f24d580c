"""Write small pictures of disks, squares and triangles, with their masks, as a segmentation data set.

FOLDER/images/{train,val}/*.png, FOLDER/annotations/{train,val}/*.png (0 background, 1 disk, 2 square, 3 triangle) and
FOLDER/classes.txt. The same seed gives the same bytes.

Example:
    python scripts/make_shapes.py runs/shapes --train 400 --val 100
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ('background', 'disk', 'square', 'triangle')


def texture(numbers: np.random.Generator, size: int) -> np.ndarray:
    """[size, size, 3] in 0..255: two dark colours in random spots."""
    spots = numbers.random((numbers.integers(6, 13),) * 2, dtype=np.float32)
    mix = np.asarray(Image.fromarray(spots).resize((size, size), Image.Resampling.BICUBIC)).clip(0, 1)[..., None]
    first, second = numbers.uniform(0, 120, (2, 3))
    return mix * first + (1 - mix) * second


def shape(numbers: np.random.Generator, size: int, label: int) -> np.ndarray:
    """[size, size]: the pixels of a shape of this class, slightly turned; its size does not tell its class."""
    row, column = np.mgrid[:size, :size] - numbers.uniform(0.1 * size, 0.9 * size, (2, 1, 1))
    radius, turn = numbers.uniform(0.14, 0.26) * size, np.pi / 2 + numbers.uniform(-0.2, 0.2)
    if label == 1:
        return np.hypot(row, column) < radius
    sides = {2: 4, 3: 3}[label]
    inner = radius * np.sqrt(np.pi / sides / np.tan(np.pi / sides))  # of the circle inside, at a disk's area
    angles = turn + 2 * np.pi * np.arange(sides)[:, None, None] / sides
    return (row * np.sin(angles) + column * np.cos(angles)).max(axis=0) < inner


def picture(numbers: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """An image, uint8 [size, size, 3], and its labels, uint8 [size, size]; later shapes hide earlier ones.

    Shapes are of one bright colour, which does not tell their class.
    """
    image, labels = texture(numbers, size), np.zeros((size, size), np.uint8)
    for label in numbers.integers(1, len(CLASSES), numbers.integers(1, 5)):
        inside = shape(numbers, size, label)
        image[inside], labels[inside] = numbers.uniform(100, 255, 3), label
    image += numbers.normal(0, 8, image.shape)
    return image.clip(0, 255).astype(np.uint8), labels


def main(folder: Path, size: int, train: int, val: int, seed: int) -> None:
    for split, count in enumerate((train, val)):
        images, annotations = (folder / kind / ('train', 'val')[split] for kind in ('images', 'annotations'))
        for where in (images, annotations):
            where.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            image, labels = picture(np.random.default_rng([seed, split, number]), size)
            Image.fromarray(image).save(images / f'{number:04d}.png')
            Image.fromarray(labels).save(annotations / f'{number:04d}.png')
    (folder / 'classes.txt').write_text('\n'.join(CLASSES) + '\n')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=(__doc__ or '').partition('\n')[0])
    parser.add_argument('folder', type=Path)
    parser.add_argument('--size', type=int, default=64)
    parser.add_argument('--train', type=int, default=400)
    parser.add_argument('--val', type=int, default=100)
    parser.add_argument('--seed', type=int, default=0)
    main(**vars(parser.parse_args()))
