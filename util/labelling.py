"""What a segmentation network answers: held against annotations, its figures; of other pictures, labels to look at."""

import argparse
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from util import build, digests, dist, pictures
from util.data import datasets, segmentation
from util.data.images import Reader
from util.data.segmentation import Confusion, PairSplit, TestPairs
from util.data.stores import Store
from util.errors import StorageError, UserError, printable
from util.log import counted, info
from util.nn.models import testing
from util.training import amp_dtype, memory_format

WORST = 5  # classes in a line


def test_loader(split: PairSplit, args: argparse.Namespace, core: nn.Module, device: torch.device) -> datasets.Loader:
    """This rank's share of the images to test, one at a time, every image on exactly one rank."""
    reader, here = Reader.of(args, 'bad_images_val.txt'), dist.place()
    if here.rank == 0:
        reader.clear_list()  # each evaluation meets all of them
    images = segmentation.test_pairs(split, args, reader, core.fixed_size)
    return build.loader(images, datasets.eval_batches(len(images), 1, here.rank, here.world_size), args, device)


class Labeller:
    """Labels images with a network, as the arguments say; while that is in `testing` alone."""

    def __init__(self, core: nn.Module, args: argparse.Namespace, device: torch.device):
        self.core, self.args, self.device, self.amp_dtype = core, args, device, amp_dtype(args, device)
        self.mode = args.test_mode or ('slide' if core.fixed_size else 'whole')
        self.normalise = datasets.Normalisation.of(args.mean, args.std, device, memory_format(args, core))

    def __call__(self, imgs: list[Tensor], size: tuple[int, int]) -> Tensor:
        """The likeliest class of every pixel, int64 [1, *size], of an image, uint8 [1, 3, h, w] at each test scale."""
        imgs = [self.normalise(image) for image in datasets.to_device(imgs, self.device)]
        how = self.mode, self.args.input_size, self.args.stride, self.args.test_flip
        with torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype is not None):
            return segmentation.predict(self.core, imgs, size, *how).argmax(1)

    def pixels(self, images: TestPairs, most: int = 20) -> float:
        """How many pixels of an image the network is given, all windows, scales and flips of it: a mean over some."""
        total, indices = 0, range(0, len(images), -(-len(images) // most))
        for index in indices:
            height, width = images.image(index).size[::-1]
            for ratio in self.args.test_scales:
                total += (1 + self.args.test_flip) * self.pixels_of(images.size(height, width, ratio))
        return total / len(indices)

    def pixels_of(self, size: tuple[int, int]) -> int:
        crop = self.args.input_size
        if self.mode == 'whole':
            return math.prod(size)
        return crop**2 * math.prod(len(segmentation.windows(n, crop, self.args.stride or 2 * crop // 3)) for n in size)


def evaluate(labeller: Labeller, batches: datasets.Loader, num_classes: int) -> dict[str, Any]:
    """mIoU, mAcc and aAcc, and IoU and Acc of each class, [K], in per cent; of all ranks' images, each exactly once.

    Raises UserError if no pixel is counted.
    """
    confusion = Confusion(num_classes, labeller.device)
    dist.share_running_statistics(labeller.core)
    with testing(labeller.core):
        for imgs, labels in batches:
            confusion.update(labeller(imgs, labels.shape[1:]), labels.to(labeller.device))
    dist.barrier()  # hosts notice a lost rank, before any of them waits for a GPU
    confusion.reduce()
    if not confusion.matrix.any():
        raise UserError('no pixel of any annotation counts: images cannot be read, or all of their labels are ignored')
    return {name: 100 * value for name, value in confusion.miou().items()}


def report(stats: dict[str, Any], classes: list[str], reader: Reader) -> None:
    """The figures of an evaluation, the worst classes, and how many images were skipped."""
    if skipped := reader.skipped():
        info(f'bad images skipped: {len(skipped)}, listed in {reader.listing}')
    info(f'* mIoU {stats["mIoU"]:.2f} mAcc {stats["mAcc"]:.2f} aAcc {stats["aAcc"]:.2f}')
    known = [k for k in np.argsort(stats['IoU'], kind='stable') if not math.isnan(stats['IoU'][k])]
    worst = ', '.join(f'{printable(classes[k], 40)} {stats["IoU"][k]:.2f}' for k in known[:WORST])
    info(f'lowest IoU of {len(known)} classes that are labelled or predicted: {worst}')


def class_table(stats: dict[str, Any], classes: list[str]) -> list[list]:
    """A row for each class; empty where nothing is labelled so."""
    shares = ((f'{x:.2f}' if not math.isnan(x) else '' for x in stats[name]) for name in ('IoU', 'Acc'))
    return [['label', 'name', 'IoU', 'Acc'], *map(list, zip(range(len(classes)), classes, *shares, strict=True))]


def drawing(labeller: Labeller, pairs: TestPairs) -> np.ndarray:
    """A few images, their labels and the network's: [height, width, 3] uint8."""
    with testing(labeller.core):
        return pictures.some_labelled(labeller, pairs)


# --------------------------------------------------------------------------
# pictures without labels


def files_of(args: argparse.Namespace, images: Store, kind: str = 'labels') -> list[Path]:
    """Where what --predict makes of images goes, by their paths below it: PNGs in a folder of that name.

    Raises UserError if two would be one file, or lie among the images.
    """
    folder = args.output_dir / 'predictions'
    if args.predict.is_dir() and folder.resolve().is_relative_to(args.predict.resolve()):
        raise UserError(
            f'--output_dir {args.output_dir} is among the images of --predict {args.predict}; keep them apart'
        )
    files: dict[Path, str] = {}
    for name in images:
        below = Path(name).relative_to(args.predict) if args.predict.is_dir() else Path(Path(name).name)
        other = files.setdefault(folder / kind / below.with_suffix('.png'), name)
        if other != name:
            raise UserError(f'the {kind} of {printable(other)} and {printable(name)} would be one file: rename one')
    return list(files)


def put(path: Path, picture: Image.Image) -> None:
    """Write a picture: whole, or not at all. Raises StorageError."""
    content = io.BytesIO()
    picture.save(content, 'PNG')
    put_bytes(path, content.getvalue())


def put_bytes(path: Path, content: bytes) -> None:
    """The same of any file, in a folder that need not be there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        digests.replace(path, content)
    except OSError as error:
        raise StorageError(f'cannot write {path}: {error.strerror or error}') from error


def write_labels(
    labeller: Labeller, batches: datasets.Loader, files: list[Path], classes: list[str], folder: Path
) -> None:
    """Write each image's label, and the image with it drawn over and a legend; each rank writes those of its images."""
    images = batches.dataset
    for ((_, index),), (imgs, labels) in zip(batches.batch_sampler, batches, strict=True):
        if printable(images.name(index)) in images.reader.skipped():
            continue
        with testing(labeller.core):
            label = labeller(imgs, labels.shape[1:])[0].byte().cpu().numpy()
        drawn = pictures.overlay(np.asarray(images.image(index)), label, classes)
        put(files[index], pictures.label_png(label))
        put(folder / 'overlays' / files[index].relative_to(folder / 'labels'), Image.fromarray(drawn))
    dist.barrier()
    skipped = images.reader.skipped()
    if skipped:
        info(f'bad images skipped: {len(skipped)}, listed in {images.reader.listing}')
    info(f'the labels of {counted(len(files) - len(skipped), "image")} are in {folder}, with overlays to look at')
