"""Named data sets as labelled images: torchvision's classes where they list files or hold pixels, else official lists.

Each loader returns a `Split`: files or pixels; each image's place in `classes`; and the classes, by their published
names or else by numbers, in every split the same. What is wrong with the data it says in a `Misfit`, OSError or
RuntimeError, which `labelled_images` completes to one line.
"""

import argparse
import contextlib
import http.client
import json
import os
import tarfile
import unicodedata
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from timm.data import ImageNetInfo
from torchvision.datasets import CIFAR10, CIFAR100, INaturalist, Places365

from util import digests, rng
from util.data import datasets, node, shards
from util.data.datasets import CLASS_FOLDERS, Split, labelled_files
from util.data.stores import Files, Pixels, Store
from util.errors import UserError, listed, printable
from util.log import info


class Misfit(Exception):
    """What is wrong with the files of a data set."""


def cifar(folder: Path, split: str, download: bool, dataset: type[CIFAR10]) -> Split:
    """The pickled batches, which torchvision opens only if their checksums are right; the test images are `val`."""
    data = dataset(folder, train=split == 'train', download=download)
    return Split(Pixels(data.data), np.array(data.targets), data.classes, [])


def inaturalist(folder: Path, split: str, download: bool, year: int) -> Split:
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
    files = files_below(folder, names, listing)
    return Split(files, np.array(labels), names_of(content['categories'], classes), [])


def names_of(categories: list[dict], numbers: list[int]) -> list[str]:
    """The names of these categories, or their numbers where some have no name of their own."""
    names = {int(category['id']): category.get('name') for category in categories}
    found = [names[number] for number in numbers]
    apart = all(isinstance(name, str) and name for name in found) and len(set(found)) == len(found)
    return found if apart else list(map(str, numbers))


def places205(folder: Path, split: str, download: bool) -> Split:
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
    return Split(files_below(images, names, listing), np.array(labels), [str(label) for label in classes], [])


def places365(folder: Path, split: str, download: bool) -> Split:
    """Places365-Standard: the 256 x 256 images, else the large ones. torchvision checks the checksums of its lists."""
    split = {'train': 'train-standard'}.get(split, split)
    small = (folder / 'val_256').is_dir() or not (folder / 'val_large').is_dir()
    data = Places365(folder, split, small, download)
    names = [file.removeprefix(f'{folder}/') for file, _ in data.imgs]
    files = files_below(folder, names, folder / f'places365_{split.replace("-", "_")}.txt')
    return Split(files, np.array(data.targets), sorted(data.class_to_idx, key=data.class_to_idx.get), [])


def files_below(folder: Path, names: list[str], listing: Path) -> Files:
    """The files of these names, relative to the folder, of which the first and the last are known to be there.

    Raises Misfit if they are not, or for a name that leads out of the folder.
    """
    if not names:
        raise Misfit(f'{listing} lists no images')
    for name in names:
        if name.startswith('/') or '..' in name.split('/') or not name.isprintable():
            raise Misfit(f'{listing} is damaged: {name[:200]!r} is no name of a file below {folder}')
    files = Files(f'{folder}/{name}' for name in names)
    for file in (files.name(0), files.name(len(files) - 1)):  # to look at all of them takes minutes on a network disk
        if not os.path.isfile(file):
            raise Misfit(f'no such file: {file}, listed in {listing}')
    return files


# --------------------------------------------------------------------------
# by name


class Source(NamedTuple):
    """How a data set is read, what its folder holds, where that comes from, and how much of it torchvision can get."""

    load: Callable[[Path, str, bool], Split]
    layout: str
    origin: str = ''
    downloads: str = ''


def class_folders(folder: Path, split: str, download: bool = False) -> Split:
    """Of shards too."""
    return shards.labelled(folder, split) if shards.holds(folder, split) else labelled_files(folder, split)


SOURCES = {
    'folder': Source(class_folders, CLASS_FOLDERS),
    'imagenet': Source(class_folders, CLASS_FOLDERS, 'https://image-net.org/download-images'),
    **{
        f'inat{year}': Source(
            partial(inaturalist, year=year),
            f'{{train,val}}{year}.json and the images in train_val{year}/ or {year}/',
            'https://github.com/visipedia/inat_comp',
            downloads='the images',
        )
        for year in (2018, 2019)
    },
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


def labelled_images(name: str, folder: Path, split: str, download: bool = False) -> Split:
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


# --------------------------------------------------------------------------
# splits of a run

FOLDERS = ('folder', 'imagenet')


def training_images(args: argparse.Namespace) -> Split:
    """The images of pretraining, without labels: those of a folder, or of a data set's training split."""
    return node.once_a_node((args.dataset, args.data_path), lambda: images_to_train_on(args))


def images_to_train_on(args: argparse.Namespace) -> Split:
    if args.dataset in FOLDERS and not args.download:
        if shards.holds(args.data_path, 'train'):
            return shards.unlabelled(args.data_path)
        folder, left = datasets.pretraining_folder(args.data_path), datasets.LeftOut()
        files = datasets.list_images(folder, left)
        check_not_pairs(folder, files)
        return Split(files, None, [], ['; '.join([f'{folder}: {len(files)} images', *left.notes()])])
    found = labelled_images(args.dataset, args.data_path, 'train', args.download)
    line = f'{args.dataset}, train: {len(found.images)} images of {len(found.classes)} classes; no label is used'
    return Split(found.images, None, [], [line])


def check_not_pairs(folder: Path, files: Files) -> None:
    """Raise UserError for the folder of a segmentation, whose annotations would be pretrained on as if pictures."""
    images, annotations = folder / 'images', folder / 'annotations'
    if os.path.isdir(images) and any(name.startswith(f'{annotations}/') for name in files):
        inner = next((images / name for name in ('train', 'training') if os.path.isdir(images / name)), images)
        raise UserError(f'{annotations} holds images, too: are they annotations of {images}? --data_path {inner}')


def labelled_splits(args: argparse.Namespace, splits: tuple[str, ...], classes: list[str] | None = None) -> list[Split]:
    """Splits whose labels are places in `classes`, by default those of the first split, each with a line of notes.

    `classes` are a checkpoint's. A split may lack some. Raises UserError for one that has others; for a training split
    of one class; and for data that is not as its layout has it.
    """
    key = (args.dataset, args.data_path, args.val_share, args.seed, splits)
    found = node.once_a_node(key, lambda: labelled_or_shared_out(args, splits))
    if not classes:
        check_learnable(args, splits[0], found[splits[0]].classes)
    owner = 'the checkpoint' if classes else f'{splits[0]}/'
    classes = classes or found[splits[0]].classes
    if args.nb_classes is not None and args.nb_classes < len(classes):
        where = owner if owner == 'the checkpoint' else args.data_path
        raise UserError(f'--nb_classes {args.nb_classes}, but {where} has {len(classes)} classes')
    return [settled(args, split, found[split], classes, owner) for split in splits]


def labelled_or_shared_out(args: argparse.Namespace, splits: tuple[str, ...]) -> dict[str, Split]:
    if args.val_share is not None:
        return shared_out(args)
    return {split: labelled_images(args.dataset, args.data_path, split, args.download) for split in splits}


def has_val(data_path: Path) -> bool:
    """Whether there are images to validate on, in a folder or in shards."""
    return os.path.isdir(data_path / 'val') or bool(shards.find(data_path, 'val'))


def images_at(path: Path) -> Store:
    """An image file, or those below a folder or in shards. Raises UserError if there is neither."""
    if shards.holds(path, ''):
        return shards.unlabelled(path, '').images
    if not os.path.exists(path):
        raise UserError(f'no such file or folder: {path}')
    return datasets.list_images(path) if os.path.isdir(path) else Files([str(path)])


def shared_out(args: argparse.Namespace) -> dict[str, Split]:
    """Training and validation from class folders without a `val/`: --val_share of every class is for validation.

    At least one image of a class that has two, never all; drawn from the seed, by the order of its files.
    """
    share, path = args.val_share, args.data_path
    if args.dataset not in FOLDERS:
        raise UserError(f'--val_share {share:g}: --dataset {args.dataset} has a validation split of its own')
    if has_val(path):
        there = f'{path / "val"} is' if os.path.isdir(path / 'val') else f'shards of val are in {path},'
        raise UserError(f'--val_share {share:g}, but {there} there to validate on; drop the flag')
    whole = labelled_images(args.dataset, path, 'train' if os.path.isdir(path / 'train') else '', args.download)
    labels, for_val = whole.labels, np.zeros(len(whole.labels), bool)
    of_class = labels.argsort(kind='stable')
    of_classes = np.split(of_class, np.flatnonzero(np.diff(labels[of_class])) + 1)
    for label, places in enumerate(of_classes):
        count = min(max(1, round(share * len(places))), len(places) - 1)
        for_val[rng.generator(args.seed, rng.VAL_SHARE, label).permutation(places)[:count]] = True

    def part(chosen: np.ndarray, notes: list[str]) -> Split:
        return Split(whole.images.take(np.flatnonzero(chosen)), labels[chosen], whole.classes, notes)

    note = f'taken from the training images by --val_share {share:g} and --seed {args.seed}'
    return {'train': part(~for_val, whole.notes), 'val': part(for_val, [note])}


def check_same_share(args: argparse.Namespace, then: dict) -> None:
    """Raise UserError if an evaluation would take images that were trained on, with the arguments `then`."""
    now, then = ((given.get('val_share'), given.get('seed')) for given in (vars(args), then))
    if None not in (now[0], then[0]) and now != then:
        share, seed = (printable(value, 40) for value in then)
        raise UserError(
            f'--val_share {now[0]} --seed {now[1]} takes other images for validation than the training did, with '
            f'--val_share {share} --seed {seed}'
        )


def check_learnable(args: argparse.Namespace, split: str, classes: list[str]) -> None:
    """Raise UserError for a single class in training, and for folders of a wrong level that are taken for classes."""
    if len(classes) > 1 and not {'train', 'val'} <= set(classes):
        return
    hint = hint_on_levels(args, split, classes)
    if split == 'train' or hint:
        one = f'a single class, {classes[0]!r}: there is nothing to tell it from'
        raise UserError(f'{args.data_path} has {one if len(classes) == 1 else "classes named train and val"}{hint}')


def hint_on_levels(args: argparse.Namespace, split: str, classes: list[str]) -> str:
    """Where a folder level is too many, and what to do; nothing where it is not."""
    if args.dataset not in FOLDERS or shards.holds(args.data_path, split):
        return ''
    folder = args.data_path / split if os.path.isdir(args.data_path / split) else args.data_path
    inner, images = datasets.scan(folder / classes[0], datasets.LeftOut())
    hint = datasets.nearby(args.data_path)
    if len(classes) > 1 or images or not inner:
        return hint
    up = f'did you mean --data_path {folder / classes[0]}?' if args.val_share and len(inner) > 1 else ''
    hint = hint or f'; {up or f"move them up, into {folder}"}'
    names = listed([os.path.basename(path) for path in inner])
    return f'; that folder holds only folders ({names}): one folder level too many{hint}'


def settled(args: argparse.Namespace, name: str, split: Split, classes: list[str], owner: str) -> Split:
    """A split whose labels are places in `classes`, those of `owner`; the line of notes tells what it has and lacks."""
    if not len(split.labels):
        raise UserError(f'no images for {name}/ in {args.data_path}')
    place = {of_owner: number for number, of_owner in enumerate(classes)}
    if not place.keys() >= set(split.classes):
        differing = difference(split.classes, classes, f'{name}/', owner) + hint_on_levels(args, name, split.classes)
        raise UserError(f'the classes of {name}/ in {args.data_path} and of {owner} differ: {differing}')
    labels = np.array([place[of_split] for of_split in split.classes])[split.labels]
    first = owner in (f'{name}/', 'the checkpoint')  # to speak of the classes
    lacking = np.setdiff1d(np.arange(len(classes)), labels)
    present, outputs = len(classes) - len(lacking), args.nb_classes or len(classes)
    held = f'{len(classes)} classes'
    if len(lacking):
        held = f'{present} of {held}, none of {listed([classes[label] for label in lacking])}'
    parts = [f'{name}: {len(split.images)} images, {held}']
    if name == 'val' and (present < outputs or args.eval_logits == 'present'):
        over = {'all': f'all {outputs} logits', 'present': f'the {present} logits of its classes'}[args.eval_logits]
        parts.append(f'evaluated over {over}')
    if outputs > len(classes) and owner == 'val/':
        parts.append(
            f'the checkpoint names no classes: folder k of these {len(classes)} is taken for class k of {outputs}'
        )
    elif outputs > len(classes) and first:
        parts.append(f'{outputs - len(classes)} of {outputs} outputs of the network have no class')
    return Split(split.images, labels, classes, ['; '.join([*parts, *(twins(classes) if first else ()), *split.notes])])


def folded(name: str) -> str:
    return ''.join(unicodedata.normalize('NFC', name).casefold().split())


def twins(classes: list[str]) -> list[str]:
    """A note on classes that look alike, or nothing."""
    first: dict[str, str] = {}
    pairs = [(other, name) for name in classes if (other := first.setdefault(folded(name), name)) != name]
    alike = '; '.join(f'{a!a} and {b!a}' for a, b in pairs[:3])
    return [f'classes that differ in case or blanks alone: {alike}'] if pairs else []


def difference(ours: list[str], theirs: list[str], us: str, them: str) -> str:
    """The first of the names that one side lacks: train/ alone has 'cat' (val/ has 'Cat'); val/ alone has 'Cat'."""
    if set(ours) == set(theirs):
        number = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), 0)
        return (
            f'the same names in another order: class {number} is {ours[number]!r} in {us}, {theirs[number]!r} in {them}'
        )
    parts = []
    for names, others, who, whom in ((ours, theirs, us, them), (theirs, ours, them, us)):
        known, alike = set(others), {folded(other): other for other in others}
        alone = [name for name in names if name not in known]
        shown = [
            f'{name!a} ({whom} has {alike[folded(name)]!a})' if folded(name) in alike else repr(name)
            for name in alone[:3]
        ]
        if alone:
            parts.append(f'{who} alone has {", ".join(shown)}{", ..." if len(alone) > 3 else ""}')
    return '; '.join(parts)


def outputs_of(classes: list[str], known: list[str] | None, outputs: int, owner: str) -> np.ndarray:
    """Which of the outputs of a head stands for each of the classes: int64 [classes].

    By their names: those that the checkpoint tells, `known`, or ImageNet's for wnids and a head of 1000. Else there
    must be as many, and the order is taken to be the same. Raises UserError.
    """
    imagenet = ImageNetInfo('imagenet-1k').label_names()
    if not known and outputs == len(imagenet) and set(classes) <= set(imagenet):
        known = imagenet
    if not known:
        if outputs != len(classes):
            raise UserError(
                f'{owner} has a head for {outputs} classes whose names it does not tell, the data have {len(classes)}: '
                f'give the data that it was trained on'
            )
        info(f'{owner}: the names of its classes are not known; class k of the data is taken for output k')
        known = classes
    place = {name: number for number, name in enumerate(known)}
    if not place.keys() >= set(classes):
        raise UserError(f'the head of {owner} has other classes: {difference(classes, known, "the data", "the head")}')
    return np.array([place[name] for name in classes])


def some(
    split: Split,
    seed: int,
    most: int | None = None,
    per_class: int | None = None,
    first: bool = False,
    draw_classes: bool = False,
) -> Split:
    """At most `per_class` images of each class, and `most` in all, as evenly from the classes as can be.

    Drawn from the seed, in the order of the split; or, with `first`, the first image of each class, then the second, in
    that order, so that fewer are the beginning of more. Where some classes have one more, or fewer images than classes
    are taken, it is those that come first, or with `draw_classes` any.
    """
    labels, classes = split.labels, np.arange(len(split.classes))
    order = np.arange(len(labels)) if first else rng.generator(seed, rng.CHOICE).permutation(len(labels))
    if draw_classes:
        classes = rng.generator(seed, rng.CHOICE, 1).permutation(classes)
    order = order[labels[order].argsort(kind='stable')]  # class by class
    number = np.arange(len(order)) - np.searchsorted(labels[order], labels[order])  # of each image within its class
    turns = np.lexsort((classes[labels[order]], number))  # one of each class in turn
    chosen = order[turns[: (number < (per_class or len(order))).sum()][:most]]
    chosen = chosen if first else np.sort(chosen)
    return split._replace(images=split.images.take(chosen), labels=labels[chosen])


def label_share(train: Split, share: float, seed: int) -> Split:
    """A share of the training images, at least one of each class, and a note of how many."""
    if share == 1:
        return train
    most = max(len(np.unique(train.labels)), round(share * len(train.labels)))
    found = some(train, seed, most)
    note = f'--label_share {share:g} takes {len(found.images)} of these images'
    return found._replace(notes=['; '.join([*train.notes, note])])
