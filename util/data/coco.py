"""Objects in images, as COCO has them: from its JSON to boxes and masks for training, and from detections to AP.

Boxes are x0, y0, x1, y1 in pixels but in the JSON and in results, where they are x, y, width, height. A segmentation is
polygons whose union is the object, or a mask in runs down the columns (RLE), compressed or not. pycocotools draws the
polygons, packs the masks and computes the AP; it is imported here alone, where it is needed.
"""

import argparse
import contextlib
import io
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from util.data import objects
from util.data.datasets import SKIPPED, ImageFiles
from util.data.images import Reader
from util.data.jitter import KINDS, Augment, Geometry, jitter, resizing, shortest_edge  # noqa: F401
from util.data.objects import CocoSplit, check_size, corners, has_area, read, segmentation_fault
from util.errors import UserError
from util.rng import SAMPLE, generator

NUMBERS = (
    *('AP', 'AP50', 'AP75', 'AP_small', 'AP_medium', 'AP_large'),
    *('AR_1', 'AR_10', 'AR_100', 'AR_small', 'AR_medium', 'AR_large'),
)


def tools() -> ModuleType:
    """pycocotools.mask. Raises UserError where it is not installed."""
    try:
        from pycocotools import mask
    except ImportError as error:
        raise UserError('detection needs pycocotools, which draws and packs masks: pip install pycocotools') from error
    return mask


# --------------------------------------------------------------------------
# masks


def rle_of(segmentation: list | dict, height: int, width: int) -> dict:
    """A segmentation as compressed RLE. Raises ValueError if it is none of this size."""
    if fault := segmentation_fault(segmentation, height, width):
        raise ValueError(fault)
    if isinstance(segmentation, list):
        return tools().merge(tools().frPyObjects(segmentation, height, width))
    if isinstance(segmentation['counts'], list):
        return tools().frPyObjects(segmentation, height, width)
    return segmentation


def mask_of(segmentation: list | dict, height: int, width: int) -> np.ndarray:
    """The pixels of a segmentation: uint8 [height, width], 1 inside. Raises ValueError if it is none of this size."""
    return np.ascontiguousarray(tools().decode(rle_of(segmentation, height, width)))


def packed(masks: np.ndarray) -> list[dict]:
    """Masks [n, H, W] as compressed RLE, which JSON can hold."""
    found = tools().encode(np.asfortranarray(np.moveaxis(np.asarray(masks, np.uint8), 0, -1)))
    return [rle | {'counts': rle['counts'].decode()} for rle in found]


# --------------------------------------------------------------------------
# data set


def splits(args: argparse.Namespace, names: Sequence[str] = ('train', 'val')) -> tuple[CocoSplit, ...]:
    """Those of --data_path, or of --train_json, --train_images, --val_json and --val_images.

    Raises UserError for whatever is wrong with folders, JSONs and the sizes of the images that are looked at, for
    splits of different categories, and where pycocotools is missing.
    """
    tools()
    found = [objects.split_of(args, name) for name in names]
    objects.check_alike(dict(zip(names, found, strict=True)), args)
    return tuple(found)


class CocoFolder(ImageFiles):
    """Images of a folder, augmented, and what a JSON says of them.

    An item for training is (uint8 image [3, h, w], {'boxes': float32 [n, 4], 'labels': int64 [n], 1 to K, 'masks':
    uint8 [n, h, w]}), without crowds and what is cut off; one for testing (uint8 image [3, h, w], {'image_id', 'size':
    height and width of the original}). The image_id of a skipped image is SKIPPED. All draws are functions of the seed
    and the item. EXIF's rotation is ignored.

    `images` are a folder and `listing` its JSON; or they are a split that was read.
    """

    def __init__(
        self,
        images: CocoSplit | str | Path,
        listing: str | Path | None = None,
        *,
        train: bool,
        transform: Augment | None = None,
        masks: bool = True,
        keep_empty: bool = False,
        seed: int = 0,
        reader: Reader | None = None,
    ):
        ours = isinstance(images, CocoSplit)
        self.split = images if ours else read(Path(images), Path(listing), train, masks, keep_empty)
        transform = transform or (Augment('lsj') if train else Augment('shortest_edge', hflip=0.0))
        super().__init__(self.split.images, None, transform, seed, reader, replace=train)
        self.train, self.masks = train, masks

    def sample(self, index: int, item: tuple[int, ...]) -> tuple[Tensor, dict[str, Any]]:
        image = self.image(index)
        size = image.size[::-1]
        check_size(self.split, index, size)
        steps = self.transform(*size, generator(self.seed, SAMPLE, *item))
        for step in steps:
            image = step.image(image)
        pixels = torch.from_numpy(np.array(image)).movedim(-1, 0)
        if self.train:
            return pixels, self.target(index, steps)
        return pixels, {'image_id': int(self.split.ids[index]), 'size': size}

    def target(self, index: int, steps: list[Geometry]) -> dict[str, Tensor]:
        """The objects of an image after these steps, of which something is left."""
        boxes, labels, masks = [], [], []
        for thing in self.split.of(index):
            box = corners(thing.bbox, *steps[0].original)
            if thing.crowd or not has_area(box):
                continue
            for step in steps:
                [box] = step.boxes([box])
            if self.masks:
                mask, bounds = drawn(thing.segmentation, steps)
                box = bounds if self.transform.crops else box
            box = np.float32(box)  # in which it must have an area: a detector stops at a box without one
            if has_area(box) and (not self.masks or mask.any()):
                boxes.append(box)
                labels.append(thing.label)
                masks += [mask] if self.masks else []
        target = {
            'boxes': torch.from_numpy(np.array(boxes, np.float32).reshape(-1, 4)),
            'labels': torch.tensor(labels, dtype=torch.int64),
        }
        if self.masks:
            target['masks'] = torch.from_numpy(np.array(masks, np.uint8).reshape(-1, *steps[-1].size))
        return target

    def original(self, index: int) -> tuple[np.ndarray, dict[str, Tensor]]:
        """An image as it is, uint8 [H, W, 3], and its objects, but crowds."""
        image = np.asarray(self.image(index))
        return image, self.target(index, [resizing(*image.shape[:2], image.shape[:2])])

    def blank(self) -> tuple[Tensor, dict[str, Any]]:
        """Evaluation leaves it out."""
        return torch.zeros(3, 32, 32, dtype=torch.uint8), {'image_id': SKIPPED, 'size': (32, 32)}


def drawn(segmentation: list | dict, steps: list[Geometry]) -> tuple[np.ndarray, np.ndarray]:
    """The mask of an object after these steps, uint8 [h, w], and its bounds: of polygons, not of pixels, where it can.

    Polygons are moved and clipped before they are drawn.
    """
    if isinstance(segmentation, list):
        for step in steps:
            segmentation = step.polygons(segmentation)
        if not segmentation:
            return np.zeros(steps[-1].size, np.uint8), np.zeros(4)
        points = np.concatenate([np.reshape(part, (-1, 2)) for part in segmentation])
        return mask_of(segmentation, *steps[-1].size), np.concatenate([points.min(0), points.max(0)])
    mask = mask_of(segmentation, *steps[0].original)
    for step in steps:
        mask = step.mask(mask)
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    return mask, np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1] if len(rows) else [0.0] * 4)


def training_images(split: CocoSplit, args: argparse.Namespace, reader: Reader) -> CocoFolder:
    """As the arguments ask for."""
    augment = Augment(args.augment, args.input_size, args.scale_range, args.train_sizes, args.max_size, args.hflip)
    how = dict(masks=not args.box_only, seed=args.seed, reader=objects.rooted(reader, args, 'train'))
    return CocoFolder(split, train=True, transform=augment, **how)


def kinds(split: CocoSplit, args: argparse.Namespace) -> np.ndarray | None:
    """What images of a batch for training have in common, bool [N]; None: nothing, since all crops are padded alike."""
    return None if args.augment == 'lsj' else split.wide


def test_images(split: CocoSplit, args: argparse.Namespace, reader: Reader) -> CocoFolder:
    """As the arguments ask for."""
    size = Augment('shortest_edge', sizes=[args.test_size], longest=args.max_size, hflip=0.0)
    how = dict(masks=not args.box_only, reader=objects.rooted(reader, args, 'val'))
    return CocoFolder(split, train=False, transform=size, **how)


# --------------------------------------------------------------------------
# results


def results(image_id: int, categories: Sequence[int], boxes: Tensor, labels: Tensor, scores: Tensor) -> list[dict]:
    """Detections in an image, boxes [n, 4] in its original pixels and labels [n] from 1, as COCO's JSON holds them.

    `categories` are the ids of labels; `packed` masks are to be added as `segmentation`.
    """
    columns = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1).tolist(), labels.tolist(), scores.tolist()
    return [
        {'image_id': image_id, 'category_id': categories[label - 1], 'bbox': box, 'score': score}
        for box, label, score in zip(*columns, strict=True)
    ]


def of_kind(predictions: list[dict], kind: str) -> list[dict]:
    """Results for boxes or for masks alone: pycocotools takes the area of a box, if there is one, for the mask's."""
    other = {'bbox': 'segmentation', 'segm': 'bbox'}[kind]
    return [{name: value for name, value in result.items() if name != other} for result in predictions]


def evaluate(
    truth: dict[str, list[dict]], predictions: list[dict], kinds: Sequence[str] = ('bbox', 'segm')
) -> dict[str, dict[str, Any]]:
    """{kind: {name: number}} of predictions by what a JSON says (`CocoSplit.truth`).

    A prediction has an `image_id`, a `category_id`, a `score`, and of `bbox` and `segmentation` what is evaluated.
    COCO's twelve numbers in 0..1, -1 where nothing counts, and `per_category_AP` by category id, as text. Where scores
    tie, the order of predictions of an image matters; images are taken by their ids.
    """
    tools()
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def indexed(annotations: list[dict]) -> COCO:
        index = COCO()
        index.dataset = truth | {'annotations': annotations}
        index.createIndex()
        return index

    # ids of our own: pycocotools takes the object 0 for none, and two of one id for the same
    rows = [row | {'id': number} for number, row in enumerate(truth['annotations'], 1)]
    found = {}
    for kind in kinds:
        with contextlib.redirect_stdout(io.StringIO()):
            true, results = indexed([*map(dict, rows)]), of_kind(predictions, kind)
            task = COCOeval(true, true.loadRes(results) if results else indexed([]), kind)
            task.evaluate()
            task.accumulate()
            task.summarize()
        precision = task.eval['precision'][:, :, :, 0, -1]  # [thresholds, recalls, categories]
        each = {str(number): mean(precision[:, :, k]) for k, number in enumerate(task.params.catIds)}
        found[kind] = dict(zip(NUMBERS, task.stats.tolist(), strict=True)) | {'per_category_AP': each}
    return found


def mean(values: np.ndarray) -> float:
    """Of those that count; -1 if none does."""
    counting = values[values > -1]
    return float(counting.mean()) if counting.size else -1.0
