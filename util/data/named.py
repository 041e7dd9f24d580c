"""Named data sets as labelled images: torchvision's classes where they list files or hold pixels, else official lists.

Each loader returns (images, labels, classes) of a split: files or pixels; each image's index in `classes`; and names or
numbers of the classes, in every split the same. What is wrong with the data it says in a `Misfit`, OSError or
RuntimeError, which `labelled_images` completes to one line.
"""

import argparse
import contextlib
import http.client
import json
import os
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from torchvision.datasets import CIFAR10, CIFAR100, INaturalist, Places365

from util import digests
from util.data.datasets import Images, labelled_files
from util.errors import UserError

Labelled = tuple[Images, list[int], list[str]]


class Misfit(Exception):
    """What is wrong with the files of a data set."""


def folders(folder: Path, split: str, download: bool) -> Labelled:
    """`split/<class>/`."""
    return labelled_files(folder, split)


def cifar(folder: Path, split: str, download: bool, dataset: type[CIFAR10]) -> Labelled:
    """The pickled batches, which torchvision opens only if their checksums are right; the test images are `val`."""
    data = dataset(folder, train=split == 'train', download=download)
    return data.data, data.targets, data.classes


def inaturalist(folder: Path, split: str, download: bool, year: int) -> Labelled:
    """The official splits, lists in COCO's JSON. torchvision's class knows no splits, but where to get the images."""
    listing = folder / f'{split}{year}.json'
    try:
        content = json.loads(listing.read_bytes())
        classes = sorted({int(category['id']) for category in content['categories']})
        label = {category: number for number, category in enumerate(classes)}
        label_of = {entry['image_id']: label[entry['category_id']] for entry in content['annotations']}
        labels = [label_of[image['id']] for image in content['images']]
        names = [str(image['file_name']) for image in content['images']]
    except (LookupError, TypeError, ValueError, RecursionError) as error:
        raise Misfit(
            f'{listing} is damaged, or its images, annotations and categories do not fit together: {error!r:.200}'
        ) from error
    if len(content['annotations']) != len(label_of):
        raise Misfit(f'{listing} is damaged: {len(content["annotations"])} annotations of {len(label_of)} images')
    archive, renamed = f'train_val{year}', str(year)  # torchvision unpacks to the first and renames it to the second
    if download and not ((folder / archive).is_dir() or (folder / renamed).is_dir()):
        INaturalist(folder, renamed, download=True)
    if (folder / renamed).is_dir():
        names = [name.replace(f'{archive}/', f'{renamed}/', 1) for name in names]
    return files_below(folder, names, listing), labels, [str(category) for category in classes]


def places205(folder: Path, split: str, download: bool) -> Labelled:
    """The official lists, lines of `path label`."""
    listing = folder / 'trainvalsplit_places205' / f'{split}_places205.csv'
    names, labels = [], []
    for number, line in enumerate(listing.read_text('utf-8', 'surrogateescape').splitlines(), 1):
        match line.rsplit(maxsplit=1):
            case [name, label] if label.isdecimal() and len(label) < 10:
                names.append(name)
                labels.append(int(label))
            case _:
                raise Misfit(f'{listing} is damaged: line {number} should be `path label`, not {line[:80]!r}')
    classes = sorted(set(labels))
    if classes != list(range(len(classes))):
        raise Misfit(f'{listing} is damaged: its labels are {len(classes)} numbers from {classes[0]} to {classes[-1]}')
    inside = ('images256', 'data/vision/torralba/deeplearning/images256')  # the second: as the archive unpacks
    images = next((folder / name for name in inside if (folder / name).is_dir()), folder)
    return files_below(images, names, listing), labels, [str(label) for label in classes]


def places365(folder: Path, split: str, download: bool) -> Labelled:
    """Places365-Standard: the 256 x 256 images, else the large ones. torchvision checks the checksums of its lists."""
    split = {'train': 'train-standard'}.get(split, split)
    small = (folder / 'val_256').is_dir() or not (folder / 'val_large').is_dir()
    data = Places365(folder, split, small, download)
    names = [file.removeprefix(f'{folder}/') for file, _ in data.imgs]
    files = files_below(folder, names, folder / f'places365_{split.replace("-", "_")}.txt')
    return files, data.targets, sorted(data.class_to_idx, key=data.class_to_idx.get)


def files_below(folder: Path, names: list[str], listing: Path) -> list[str]:
    """The files of these names, relative to the folder, of which the first and the last are known to be there.

    Raises Misfit if they are not, or for a name that leads out of the folder.
    """
    if not names:
        raise Misfit(f'{listing} lists no images')
    for name in names:
        if name.startswith('/') or '..' in name.split('/') or not name.isprintable():
            raise Misfit(f'{listing} is damaged: {name[:200]!r} is no name of a file below {folder}')
    files = [f'{folder}/{name}' for name in names]
    for file in (files[0], files[-1]):  # to look at all of them takes minutes on a network disk
        if not os.path.isfile(file):
            raise Misfit(f'no such file: {file}, listed in {listing}')
    return files


# --------------------------------------------------------------------------
# by name


class Source(NamedTuple):
    """How a data set is read, what its folder holds, where that comes from, and how much of it torchvision can get."""

    load: Callable[[Path, str, bool], Labelled]
    layout: str
    origin: str = ''
    downloads: str = ''


CLASS_FOLDERS = 'train/ and val/, one folder per class in each'
SOURCES = {
    'folder': Source(folders, CLASS_FOLDERS),
    'imagenet': Source(folders, CLASS_FOLDERS, 'https://image-net.org/download-images'),
    'inat2018': Source(
        partial(inaturalist, year=2018),
        '{train,val}2018.json and the images in train_val2018/ or 2018/',
        'https://github.com/visipedia/inat_comp',
        downloads='the images',
    ),
    'inat2019': Source(
        partial(inaturalist, year=2019),
        '{train,val}2019.json and the images in train_val2019/ or 2019/',
        'https://github.com/visipedia/inat_comp',
        downloads='the images',
    ),
    'places365': Source(
        places365,
        'categories_places365.txt, places365_{train_standard,val}.txt and the images in data_256_standard/ and '
        'val_256/, or data_large_standard/ and val_large/',
        'http://places2.csail.mit.edu',
        downloads='all of it',
    ),
    'places205': Source(
        places205,
        'trainvalsplit_places205/{train,val}_places205.csv and the images in images256/',
        'http://places.csail.mit.edu',
    ),
    'cifar10': Source(
        partial(cifar, dataset=CIFAR10),
        'cifar-10-batches-py/ of data_batch_1 to 5, test_batch and batches.meta',
        'https://www.cs.toronto.edu/~kriz/cifar.html',
        downloads='all of it',
    ),
    'cifar100': Source(
        partial(cifar, dataset=CIFAR100),
        'cifar-100-python/ of train, test and meta',
        'https://www.cs.toronto.edu/~kriz/cifar.html',
        downloads='all of it',
    ),
}
# what a broken download, archive or disk raises, beside what the loaders and torchvision do
FAULTS = (Misfit, OSError, RuntimeError, EOFError, http.client.HTTPException, tarfile.TarError)


def labelled_images(name: str, folder: Path, split: str, download: bool = False) -> Labelled:
    """A split, 'train' or 'val', of the data set of this name in `folder`; with `download`, first get what is missing.

    Raises UserError saying what is missing or damaged, what the folder should hold, and where that comes from.
    """
    source = SOURCES[name]
    needed = f'{folder}, which should hold {source.layout}' + (f', from {source.origin}' if source.origin else '')
    if download and not source.downloads:
        raise UserError(f'--dataset {name}: --download cannot get it into {needed}')
    try:
        # of the processes of a run, one downloads; each of the others then finds its files
        with digests.alone(folder / '.download.lock') if download else contextlib.nullcontext():
            return source.load(folder, split, download)
    except FAULTS as error:
        wrong = str(error).partition(' You can')[0].rstrip('.')  # torchvision goes on with its own arguments
        hint = f' (--download gets {source.downloads})' if source.downloads and not download else ''
        raise UserError(f'--dataset {name}: {wrong}; looked in {needed}{hint}') from error


def labelled_splits(args: argparse.Namespace, splits: tuple[str, ...]) -> tuple[list[tuple], int]:
    """(images, labels) of each split, and the number of classes. Raises UserError where they differ or do not fit."""
    found = [labelled_images(args.dataset, args.data_path, split, args.download) for split in splits]
    classes = found[0][2]
    for split, (_, _, others) in zip(splits, found, strict=True):
        if others != classes:
            differing = sorted(set(classes) ^ set(others))
            raise UserError(f'the classes of {splits[0]}/ and {split}/ in {args.data_path} differ: {differing[:5]}')
    if args.nb_classes is not None and args.nb_classes < len(classes):
        raise UserError(f'--nb_classes {args.nb_classes}, but {args.data_path} has {len(classes)} classes')
    return [(images, labels) for images, labels, _ in found], args.nb_classes or len(classes)
