"""What a detector finds: held against COCO's annotations, its figures; in other pictures, boxes to look at."""

import argparse
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from util import build, dist, pictures
from util.data import coco, datasets, named
from util.data.images import Reader
from util.data.objects import CocoSplit
from util.data.stores import Names
from util.errors import UserError, printable
from util.labelling import put, put_bytes
from util.log import counted, info
from util.nn.detector import batch_images, paste_masks
from util.nn.models import testing
from util.training import amp_dtype, memory_format

KINDS = {'bbox': 'box', 'segm': 'mask'}  # COCO's names of what is evaluated, and ours
MASKS_AT_ONCE = 10  # in the size of the image, a byte for each pixel
WORST = 5  # classes in a line
DRAWN = 0.5  # the least score of what is drawn

Found = dict[str, Tensor]  # of an image: boxes [n, 4] in its own pixels, labels [n] from 1, scores [n], masks [n, s, s]


def test_loader(split: CocoSplit, args: argparse.Namespace, device: torch.device) -> datasets.Loader:
    """This rank's share of the images to test, one at a time, every image on exactly one rank."""
    reader, here = Reader.of(args, 'bad_images_val.txt'), dist.place()
    if here.rank == 0:
        reader.clear_list()  # each evaluation meets all of them
    images = coco.test_images(split, args, reader)
    return build.loader(images, datasets.eval_batches(len(images), 1, here.rank, here.world_size), args, device)


class Finder:
    """Finds objects in images with a network; while that is in `testing` alone."""

    def __init__(self, core: nn.Module, args: argparse.Namespace, device: torch.device):
        self.core, self.device, self.amp_dtype = core, device, amp_dtype(args, device)
        self.normalise = datasets.Normalisation.of(args.mean, args.std, device, memory_format(args, core))

    def __call__(self, image: Tensor, size: tuple[int, int]) -> Found:
        """What is in an image, uint8 [3, h, w] at test scale, whose own size (height, width) is `size`."""
        [image] = datasets.to_device([image], self.device)
        imgs, sizes = batch_images([image], self.normalise, self.core.size_divisible)
        with torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype is not None):
            [found] = self.core(imgs, sizes)
        height, width = (own / tested for own, tested in zip(size, sizes[0], strict=True))
        return found | {'boxes': found['boxes'] * found['boxes'].new_tensor([width, height, width, height])}


def drawable(found: Found, size: tuple[int, int]) -> Found:
    """What is likely an object, with its masks in the size of the image, bool [n, H, W]."""
    likely = {name: values[found['scores'] >= DRAWN] for name, values in found.items()}
    return likely | ({'masks': paste_masks(likely['masks'], likely['boxes'], size)} if 'masks' in likely else {})


def drawing(finder: Finder, images: coco.CocoFolder) -> np.ndarray:
    """A few images with what is annotated and what was found: [height, width, 3] uint8."""

    def find(image: Tensor, about: dict) -> Found:
        return drawable(finder(image, about['size']), about['size'])

    with testing(finder.core):
        return pictures.some_detected(find, images)


def whole_masks(found: Found, size: tuple[int, int]) -> Iterator[np.ndarray]:
    """The masks in the size of the image, bool [n, H, W], a few at a time."""
    for first in range(0, len(found['boxes']), MASKS_AT_ONCE):
        some = slice(first, first + MASKS_AT_ONCE)
        yield paste_masks(found['masks'][some], found['boxes'][some], size).cpu().numpy()


def as_results(found: Found, about: dict, split: CocoSplit) -> list[dict]:
    """COCO's list of results: boxes x, y, width, height, masks as RLE, ids of categories."""
    results = coco.results(about['image_id'], split.categories, found['boxes'], found['labels'], found['scores'])
    if 'masks' in found:
        rles = itertools.chain(*(coco.packed(masks) for masks in whole_masks(found, about['size'])))
        results = [result | {'segmentation': rle} for result, rle in zip(results, rles, strict=True)]
    return results


def results(finder: Finder, batches: datasets.Loader, split: CocoSplit) -> list[dict]:
    """Those of the images of all ranks, in the order of their ids, on rank 0; an empty list on others."""
    own = []
    dist.share_running_statistics(finder.core)
    with testing(finder.core):
        for [image], [about] in batches:
            if about['image_id'] != datasets.SKIPPED:
                own.append((about['image_id'], as_results(finder(image, about['size']), about, split)))
    dist.barrier()  # hosts notice a lost rank, before any of them waits for a GPU
    every = sorted(itertools.chain(*dist.gather_to_main(own)), key=lambda of_image: of_image[0])
    return list(itertools.chain(*(of_image for _, of_image in every)))


def evaluate(
    finder: Finder, batches: datasets.Loader, split: CocoSplit, box_only: bool, into: Path | None = None
) -> dict[str, Any]:
    """COCO's figures: 'box_AP', 'box_AP50' and so on, with masks 'mask_AP' and so on, in per cent; -1: nothing counts.

    Of all ranks' images, each exactly once. 'box_per_category_AP' is a dict by the categories' ids. The results are
    written `into` a file, which pycocotools reads, and beside it those of masks without their boxes. Raises UserError
    where no image can be read.
    """
    found, skipped = results(finder, batches, split), batches.dataset.reader.skipped()

    def figures() -> dict[str, dict]:
        if len(skipped) >= len(split.images):
            raise UserError('none of the images can be read')
        if into:
            put_bytes(into, json.dumps(found).encode())
        if into and not box_only:  # with boxes, pycocotools would take the boxes' areas for the masks'
            put_bytes(into.with_name('predictions_masks.json'), json.dumps(coco.of_kind(found, 'segm')).encode())
        return coco.evaluate(split.truth(skipped), found, ['bbox'] if box_only else list(KINDS))

    return {
        f'{KINDS[kind]}_{name}': per_cent(value)
        for kind, numbers in dist.from_main(figures).items()
        for name, value in numbers.items()
    }


def per_cent(value: float | dict) -> Any:
    if isinstance(value, dict):
        return {key: per_cent(part) for key, part in value.items()}
    return 100 * value if value >= 0 else value


def report(stats: dict[str, Any], split: CocoSplit, reader: Reader) -> None:
    """The figures of an evaluation, the worst classes, and how many images were skipped."""
    if skipped := reader.skipped():
        info(f'bad images skipped: {len(skipped)}, listed in {reader.listing}')
    for kind in filter(lambda kind: f'{kind}_AP' in stats, KINDS.values()):
        of = {name: stats[f'{kind}_{name}'] for name in coco.NUMBERS}
        info(f'* {kind} ' + ' '.join(f'{name} {value:.2f}' for name, value in of.items()))
    known = {name: ap for name, ap in class_figures(stats, split)['box'].items() if ap >= 0}
    worst = sorted(known, key=known.get)[:WORST]
    listed = ', '.join(f'{printable(name, 40)} {known[name]:.2f}' for name in worst)
    info(f'lowest box AP of {len(known)} classes that are annotated: {listed}')


def class_figures(stats: dict[str, Any], split: CocoSplit) -> dict[str, dict[str, float]]:
    """AP of each class by its name, of boxes and of masks."""
    names = {str(number): name for number, name in zip(split.categories, split.classes, strict=True)}
    return {
        kind: {names[str(number)]: ap for number, ap in stats[f'{kind}_per_category_AP'].items()}
        for kind in KINDS.values()
        if f'{kind}_AP' in stats
    }


def class_table(stats: dict[str, Any], split: CocoSplit) -> list[list]:
    """A row for each class; empty where nothing is annotated."""
    figures = class_figures(stats, split)
    rows = [
        [number, name, *(f'{of[name]:.2f}' if of[name] >= 0 else '' for of in figures.values())]
        for number, name in zip(split.categories, split.classes, strict=True)
    ]
    return [['category', 'name', *(f'{kind} AP' for kind in figures)], *rows]


def numbers(stats: dict[str, Any]) -> list[str]:
    """The names of the figures that are not of single classes."""
    return [name for name, value in stats.items() if not isinstance(value, dict)]


def pixels(split: CocoSplit, args: argparse.Namespace) -> float:
    """How many pixels of an image the network is given in a test: a mean, without padding."""
    tested = (coco.shortest_edge(*size, args.test_size, args.max_size) for size in split.sizes.tolist())
    return float(np.mean([*map(math.prod, tested)]))


# --------------------------------------------------------------------------
# pictures without annotations


def pictures_of(args: argparse.Namespace, classes: list[str], categories: list[int] | None) -> CocoSplit:
    """The pictures of --predict; without known ids of its categories, they are counted from 1."""
    images = named.images_at(args.predict)
    ids, sizes = np.arange(len(images)), np.zeros((len(images), 2), int)  # 0: not told
    categories = categories or list(range(1, len(classes) + 1))
    return CocoSplit(images, Names.of([]), ids, sizes, classes, categories, [])


def write(finder: Finder, batches: datasets.Loader, files: list[Path], split: CocoSplit, folder: Path) -> None:
    """Draw what is found on each image, and list it in one JSON, laid out as COCO's annotations, with scores."""
    images, found = batches.dataset, []
    for [image], [about] in batches:
        if (index := about['image_id']) == datasets.SKIPPED:
            continue
        with testing(finder.core):
            objects = finder(image, about['size'])
            of_image, likely = as_results(objects, about, split), drawable(objects, about['size'])
        drawn = pictures.detected(np.asarray(images.image(index)), likely, split.classes)
        put(files[index], Image.fromarray(drawn))
        height, width = about['size']
        found.append(({'id': index, 'file_name': images.name(index), 'height': height, 'width': width}, of_image))
    every = sorted(itertools.chain(*dist.gather_to_main(found)), key=lambda pair: pair[0]['id'])
    if dist.is_main():
        results = [result for _, of_image in every for result in of_image]
        content = {'images': [image for image, _ in every], 'annotations': results}
        content |= {'categories': split.truth()['categories']}
        put_bytes(folder / 'detections.json', json.dumps(content).encode())
    dist.barrier()
    skipped = images.reader.skipped()
    if skipped:
        info(f'bad images skipped: {len(skipped)}, listed in {images.reader.listing}')
    many = counted(len(files) - len(skipped), 'image')
    info(f'the detections of {many} are in {folder / "detections.json"}, and drawn in {folder / "drawings"}')
