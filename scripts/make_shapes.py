"""Write small pictures of disks, squares and triangles, as a data set for segmentation or for detection.

For segmentation: FOLDER/images/{train,val}/*.png, FOLDER/annotations/{train,val}/*.png (0 background, 1 disk, 2 square,
3 triangle) and FOLDER/classes.txt. With --coco, for detection: FOLDER/{train,val}2017/*.png and
FOLDER/annotations/instances_{train,val}2017.json, as COCO has them. The same seed gives the same bytes.

Examples:
    python scripts/make_shapes.py runs/shapes --train 400 --val 100
    python scripts/make_shapes.py runs/detected --coco
"""

import argparse
import itertools
import json
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ('background', 'disk', 'square', 'triangle')
SIDES = {2: 4, 3: 3}
CATEGORY_IDS = {1: 2, 2: 5, 3: 9}  # with gaps, as COCO's are
EMPTY, CROWD = 0, 1  # numbers of the image without objects, and of the one that is a crowd


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
    if label > 1:
        sides = SIDES[label]
        radius *= np.sqrt(np.pi / sides / np.tan(np.pi / sides))  # of the circle inside, at a disk's area
    return within(row, column, label, radius, turn)


def within(row: np.ndarray, column: np.ndarray, label: int, inner: float, turn: float) -> np.ndarray:
    """[size, size]: the pixels, given their places from the centre, of a shape around a circle of radius `inner`."""
    if label == 1:
        return np.hypot(row, column) < inner
    angles = turn + 2 * np.pi * np.arange(SIDES[label])[:, None, None] / SIDES[label]
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
    """The data set for segmentation."""
    for split, count in enumerate((train, val)):
        images, annotations = (folder / kind / ('train', 'val')[split] for kind in ('images', 'annotations'))
        for where in (images, annotations):
            where.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            image, labels = picture(np.random.default_rng([seed, split, number]), size)
            Image.fromarray(image).save(images / f'{number:04d}.png')
            Image.fromarray(labels).save(annotations / f'{number:04d}.png')
    (folder / 'classes.txt').write_text('\n'.join(CLASSES) + '\n')


# --------------------------------------------------------------------------
# objects, for detection


def scene(numbers: np.random.Generator, size: int, labels: np.ndarray) -> tuple[np.ndarray, list[dict]]:
    """A noisy image, uint8 [size, size, 3], and its objects: label, mask [size, size] and, but for disks, polygon.

    They lie apart, each in a circle of 9 to 22 % of the side, and differ from the background by 0.35 in a channel.
    """
    background, circles, objects = numbers.random(3), [], []
    image = np.tile(background, (size, size, 1))
    for label in labels:
        while True:
            radius = numbers.uniform(0.09, 0.22) * size
            center = numbers.uniform(radius, size - radius, 2)  # row, column
            if all(np.hypot(*(center - other)) > radius + outer + 1 for other, outer in circles):
                break
        circles.append((center, radius))
        color = background
        while np.abs(color - background).max() < 0.35:
            color = numbers.random(3)
        turn = np.pi / 2 + numbers.uniform(-0.2, 0.2)
        inner, polygon = radius, None
        if label > 1:
            inner *= np.cos(np.pi / SIDES[label])
            corners = turn + np.pi * (2 * np.arange(SIDES[label]) + 1) / SIDES[label]
            polygon = center[::-1] + radius * np.stack((np.cos(corners), np.sin(corners)), axis=1)  # x, y
        row, column = np.mgrid[:size, :size] + 0.5 - center[:, None, None]
        mask = within(row, column, label, inner, turn)
        image[mask] = color
        objects.append(dict(label=int(label), mask=mask, polygon=polygon))
    image += numbers.normal(0, 0.08, image.shape)
    return (255 * image).clip(0, 255).astype(np.uint8), objects


def run_lengths(mask: np.ndarray) -> dict:
    """A mask in COCO's uncompressed form: pixels in a row of background, of object, ..., down the columns."""
    runs = [(value, len(list(group))) for value, group in itertools.groupby(mask.T.ravel().tolist())]
    return {'size': list(mask.shape), 'counts': [0] * runs[0][0] + [length for _, length in runs]}


def annotation(label: int, mask: np.ndarray, polygon: np.ndarray | None = None, iscrowd: int = 0) -> dict:
    """What COCO has of an object, but for its ids: squares and triangles as polygons, disks and crowds as runs."""
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    first, last = np.array((columns[0], rows[0])), np.array((columns[-1], rows[-1])) + 1
    if polygon is not None:
        first, last = polygon.min(axis=0), polygon.max(axis=0)
    return {
        'category_id': CATEGORY_IDS[label],
        'iscrowd': iscrowd,
        'bbox': np.round([*first, *(last - first)], 2).tolist(),
        'area': int(mask.sum()),
        'segmentation': run_lengths(mask) if polygon is None else [np.round(polygon.ravel(), 2).tolist()],
    }


def coco(folder: Path, size: int, train: int, val: int, seed: int) -> None:
    """The data set for detection: 1 to 3 shapes an image. Of each split an image has none, and one has a crowd."""
    (folder / 'annotations').mkdir(parents=True, exist_ok=True)
    categories = [{'id': CATEGORY_IDS[label], 'name': CLASSES[label]} for label in CATEGORY_IDS]
    for split, (name, count) in enumerate({'train2017': train, 'val2017': val}.items()):
        (folder / name).mkdir(exist_ok=True)
        images, annotations = [], []
        for number in range(count):
            numbers = np.random.default_rng([seed, split, number])
            labels = numbers.integers(1, len(CLASSES), numbers.integers(1, 4))
            if number in (EMPTY, CROWD):
                labels = np.full({EMPTY: 0, CROWD: 3}[number], labels[0])
            image, objects = scene(numbers, size, labels)
            found = [annotation(**object) for object in objects]
            if number == CROWD:
                found = [annotation(labels[0], np.any([object['mask'] for object in objects], axis=0), iscrowd=1)]
            about = {'id': 7 * number + 3, 'file_name': f'{number:04d}.png', 'height': size, 'width': size}
            Image.fromarray(image).save(folder / name / about['file_name'])
            images.append(about)
            annotations += [{'id': 5 * number + k, 'image_id': about['id'], **each} for k, each in enumerate(found, 1)]
        content = {'images': images, 'annotations': annotations, 'categories': categories}
        (folder / 'annotations' / f'instances_{name}.json').write_text(json.dumps(content) + '\n', encoding='utf-8')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=(__doc__ or '').partition('\n')[0])
    parser.add_argument('folder', type=Path)
    parser.add_argument('--coco', action='store_true', help='for detection')
    parser.add_argument('--size', type=int, help='side in pixels; default: 64, with --coco 96')
    parser.add_argument('--train', type=int, default=400)
    parser.add_argument('--val', type=int, help='default: 100, with --coco 60')
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    make, size, val = (coco, 96, 60) if args.coco else (main, 64, 100)
    make(args.folder, args.size or size, args.train, args.val or val, args.seed)
