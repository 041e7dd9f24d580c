"""Folders of images and their annotations: which belong together, what their labels say, and what is wrong with them.

An annotation is a PNG of 8 bits whose pixels are the numbers of classes, in gray or as places in a palette; 255 is
ignored. Mistakes in annotations train without a complaint, and badly: each of them ends in one line, or in a fact for
the log.
"""

import argparse
import os
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from util.data import datasets, node
from util.data.datasets import LeftOut
from util.data.images import FORMATS, Reader
from util.data.stores import Files, folder_of
from util.errors import RunError, UserError, listed, printable
from util.log import counted

IGNORED = 255  # the label of ignored pixels
LOOKED_AT = 100  # annotations of each split, before a run
ADE20K, ADE20K_CLASSES, ADE20K_NAMES = 'ade20k', 150, 'objectInfo150.txt'
CLASSES = 'classes.txt'
FOLDERS = ('images', 'annotations')
SPLITS = {'train': ('training', 'train'), 'val': ('validation', 'val')}
LAYOUT = 'images/ and annotations/, with training/ and validation/ (or train/ and val/) in each'


class PairSplit(NamedTuple):
    """Images and their annotations (None where there are none), the names of the classes, and what to say of them."""

    images: Files
    annotations: Files | None
    classes: list[str]  # '0', '1', ... where they have no names
    notes: list[str]


def reduces(args: argparse.Namespace) -> bool:
    """Whether label 0 is ignored and class k is label k + 1: by default ADE20K's alone."""
    return args.dataset == ADE20K if args.reduce_zero_label is None else args.reduce_zero_label


def reduce_zero_label(label: np.ndarray) -> np.ndarray:
    """uint8 labels: 0 becomes 255, which is ignored, as 255 is; all others are one less."""
    reduced = label - np.uint8(1)
    reduced[label == IGNORED] = IGNORED
    return reduced


def known_labels(num_classes: int, reduce_zero: bool = False) -> str:
    first = int(reduce_zero)
    zero = f'0 and {IGNORED}' if reduce_zero else f'{IGNORED}'
    return f'{first} to {num_classes - 1 + first}, and {zero}, ignored'


# --------------------------------------------------------------------------
# one annotation


def stored(file: BinaryIO, name: str, size: tuple[int, int], image: str) -> np.ndarray:
    """The numbers in an annotation, uint8 of the image's size (height, width).

    Raises UserError if they are no labels, or not of that size; for damage, what Pillow raises.
    """
    try:
        picture = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        empty = not file.seek(0, os.SEEK_END)
        raise ValueError('the file is empty' if empty else 'not a PNG') from None
    with picture:
        if fault := unlike_size(picture.size[::-1], size, image) or unlike_labels(picture):
            raise UserError(f'the annotation {printable(name)} {fault}')
        picture.load()
        return np.array(picture, np.uint8)


def unlike_labels(picture: Image.Image) -> str:
    """Why the pixels of a picture are no labels; '' if they may be."""
    if picture.format == 'JPEG':
        return 'is a JPEG, which does not keep numbers as they are: save it as PNG, from the original labels'
    if picture.format != 'PNG':
        return f'is a {picture.format}, not a PNG'
    if picture.mode in ('1', 'L', 'P'):
        return ''
    if picture.mode.startswith('I'):
        return 'has 16 bits a pixel: labels have 8, the class of each pixel, so 255 classes at most'
    bands = ''.join(picture.getbands())
    has = f'has {len(bands)} channels ({bands})'
    channels = np.asarray(picture)
    if bands == 'LA' or (channels[..., :3] == channels[..., :1]).all():
        return f'{has}, of which one alone is needed: PIL.Image.open(FILE).getchannel({bands[0]!r}).save(FILE)'
    number = 'each pixel must be the number of its class, in gray or as a place in a palette'
    return f'{has}, colours instead of labels: {number}'


def unlike_size(ours: tuple[int, int], size: tuple[int, int], image: str) -> str:
    """What to say where an annotation is not of the size of its image, both (height, width); '' if it is."""
    if ours == tuple(size):
        return ''
    turned = " (turned? EXIF's rotation is ignored in both)" if ours == tuple(size)[::-1] else ''
    (height, width), (of_image, by) = ours, size
    return f'is {width} x {height} pixels, its image {printable(image)} {by} x {of_image}{turned}: they must be alike'


def checked(label: np.ndarray, num_classes: int, reduce_zero: bool, name: str) -> np.ndarray:
    """The labels in what is stored. Raises UserError for one beyond the classes."""
    if reduce_zero:
        label = reduce_zero_label(label)
    beyond = (label >= num_classes) & (label != IGNORED)
    if not beyond.any():
        return label
    worst = int(label[beyond].max())
    hint = '; if 0 stands for no class and 1 for the first: --reduce_zero_label' if worst == num_classes else ''
    hint = hint if not reduce_zero else ''
    raise UserError(
        f'the annotation {printable(name)} has the label {worst + reduce_zero}, beyond the {num_classes} classes: '
        f'{known_labels(num_classes, reduce_zero)}{hint}'
    )


def stored_of(split: PairSplit, index: int, size: tuple[int, int], reader: Reader) -> np.ndarray:
    """`stored`, of the annotation of an image of this size."""
    name, image = split.annotations.name(index), split.images.name(index)
    return reader.content(split.annotations, index, lambda file: stored(file, name, size, image))


# --------------------------------------------------------------------------
# names of classes


def listing_of(args: argparse.Namespace) -> Path:
    return args.data_path / (ADE20K_NAMES if args.dataset == ADE20K else CLASSES)


def class_names(args: argparse.Namespace) -> list[str]:
    """Those of `classes.txt` or of ADE20K's list, else '0', '1', ... up to --nb_classes.

    Raises UserError where the file and --nb_classes differ, and where there is neither.
    """
    given, listing = args.nb_classes, listing_of(args)
    if args.dataset == ADE20K:
        names = ade20k_names(listing) if listing.is_file() else list(map(str, range(ADE20K_CLASSES)))
        source = 'ADE20K'
    else:
        names, source = (names_in(listing) if listing.is_file() else []), str(listing)
    if names and given not in (None, len(names)):
        raise UserError(f'--nb_classes {given}, but {source} has {len(names)}: leave the flag out')
    number = given or len(names)
    if not number:
        raise UserError(f'how many classes? Give --nb_classes, or write {listing}, the name of a class in each line')
    if number < 2:
        raise UserError('a single class: there is nothing to tell it from; what is not of it is a class too')
    if number > IGNORED:
        raise UserError(f'{number} classes, but labels have 8 bits and {IGNORED} is ignored: {IGNORED} at most')
    return names or list(map(str, range(number)))


def text_of(listing: Path) -> str:
    try:
        return listing.read_bytes().decode('utf-8-sig')
    except UnicodeDecodeError:
        raise UserError(f'{listing} is not text in UTF-8: save it as that') from None


def names_in(listing: Path) -> list[str]:
    """A name in each line; empty ones may follow. Raises UserError for an empty line between names, or no name."""
    names = [line.strip() for line in text_of(listing).rstrip().splitlines()]
    if not names:
        raise UserError(f'{listing} is empty: it should have the name of a class in each line')
    if '' in names:
        raise UserError(
            f'line {names.index("") + 1} of {listing} is empty: line k names class k - 1, so take it out, or name it'
        )
    return names


def ade20k_names(listing: Path) -> list[str]:
    """The first name of each of the 150 classes in ADE20K's own list: columns between tabs, the last has names."""
    rows = [line.split('\t') for line in text_of(listing).splitlines()]
    names = {row[0].strip(): row[-1].partition(',')[0].strip() for row in rows}
    found = [names.get(str(number), '') for number in range(1, ADE20K_CLASSES + 1)]
    if '' in found:
        lacking = found.index('') + 1
        raise UserError(f'{listing} is damaged: it should name 1 to {ADE20K_CLASSES}, but {lacking} has no line')
    return found


# --------------------------------------------------------------------------
# folders


def pairs(args: argparse.Namespace, splits: Iterable[str] = ('train', 'val')) -> tuple[PairSplit, ...]:
    """The pairs of --data_path, of each of these splits, with notes of what their labels are like.

    Raises UserError for whatever is wrong with folders, names, and the annotations that are looked at.
    """
    splits = tuple(splits)
    key = ('pairs', args.dataset, args.data_path, args.nb_classes, reduces(args), splits)
    return node.once_a_node(key, lambda: tuple(looked_at(split_of(args, split), args, split) for split in splits))


def split_of(args: argparse.Namespace, split: str) -> PairSplit:
    data_path = args.data_path
    check_layout(args)
    classes = class_names(args)
    images, annotations = (folder_of_split(data_path, name, split) for name in FOLDERS)
    left = LeftOut()
    files = datasets.list_images(images, left)
    if args.dataset == ADE20K and not any('ADE_' in os.path.basename(path) for path in files):
        raise UserError(
            f'--dataset ade20k: no file in {images} is named ADE_..., as all of ADE20K are; if {data_path} is laid out '
            f'as it: --dataset folder --reduce_zero_label --nb_classes {ADE20K_CLASSES}'
        )
    found, alone = annotations_of(files, images, annotations)
    notes = left.notes()
    if alone:
        notes.append(f'{counted(len(alone), "annotation")} without an image ({listed(alone)})')
    return PairSplit(files, found, classes, notes)


def check_layout(args: argparse.Namespace) -> None:
    """Raise UserError where there are no folders of pairs, and for ADE20K that is taken for another or the reverse."""
    path = args.data_path
    if not os.path.isdir(path):
        raise UserError(f'{path} is a file, not a folder' if os.path.isfile(path) else f'no such folder: {path}')
    missing = [name for name in FOLDERS if not os.path.isdir(path / name)]
    if missing:
        above = next((p for p in path.parents[:3] if all(os.path.isdir(p / name) for name in FOLDERS)), None)
        hint = f'; did you mean --data_path {above}?' if above else datasets.nearby(path, FOLDERS)
        holds = listed([os.path.basename(folder) for folder in datasets.folders_in(path)])
        hint = hint or (f'; it holds {holds}' if holds else '')
        raise UserError(f'no such folder: {path / missing[0]}; {path} should hold {LAYOUT}{hint}')
    own, ade = (os.path.isfile(path / name) for name in (CLASSES, ADE20K_NAMES))
    if args.dataset == ADE20K and own and not ade:
        raise UserError(f'--dataset ade20k, but {path} has a {CLASSES}: --dataset folder is right')
    if args.dataset != ADE20K and ade and not own and not reduces(args):
        raise UserError(
            f'{path} has an {ADE20K_NAMES}, so it is ADE20K, where 0 stands for no class: --dataset ade20k is right'
        )


def folder_of_split(data_path: Path, inside: str, split: str) -> Path:
    """data_path/images/training, or whatever the split is called there."""
    folder = data_path / inside
    names = SPLITS[split]
    found = [folder / name for name in names if os.path.isdir(folder / name)]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f'{folder} has both {names[0]}/ and {names[1]}/: leave one of them there')
    holds = listed([os.path.basename(path) for path in datasets.folders_in(folder)])
    there = f'; there is {holds}' if holds else ''
    raise UserError(f'no such folder: {folder / names[0]} (or {names[1]}){there}; {data_path} should hold {LAYOUT}')


def stem_below(path: str, folder: Path) -> str:
    return os.path.splitext(path[len(f'{folder}/') :])[0]


def annotations_of(images: Files, folder: Path, annotations: Path) -> tuple[Files, list[str]]:
    """The annotation of each image, and those that no image has, below their folder.

    Raises UserError for images without one, and for two images that would share one.
    """
    png, others = {}, {}
    for path in datasets.images_below(annotations, LeftOut()):
        (png if path.lower().endswith('.png') else others)[stem_below(path, annotations)] = path
    first, found, lacking = {}, [], []
    for path in images:
        stem = stem_below(path, folder)
        if (other := first.setdefault(stem, path)) is not path:
            raise UserError(
                f'{printable(other)} and {printable(path)} would share the annotation '
                f'{printable(annotations / stem)}.png: rename one of them and its annotation'
            )
        (found if stem in png else lacking).append(png.get(stem, stem))
    if lacking:
        stem = lacking[0]
        there = ', but annotations are PNGs' if stem in others else ''
        example = others.get(stem) or next(iter((png | others).values()), 'none at all')
        raise UserError(
            f'{len(lacking)} of {len(images)} images in {folder} have no annotation: for the first, '
            f'{printable(annotations / stem)}.png should be there; there is {printable(example)}{there}'
        )
    return Files(found), sorted(os.path.relpath(png[stem], annotations) for stem in png.keys() - first.keys())


# --------------------------------------------------------------------------
# what the labels are like


def size_of(file: BinaryIO) -> tuple[int, int]:
    """Height and width of an image, from its header."""
    return Image.open(file, formats=FORMATS).size[::-1]


def looked_at(split: PairSplit, args: argparse.Namespace, name: str) -> PairSplit:
    """The split, with a line on what it holds and another on what at most a hundred annotations, evenly from all, say.

    Evenly, since the first ones by name are often of one folder, scene or day. Raises UserError for what is wrong with
    these, and where all of their pixels are ignored; one that cannot be read is left for the run to meet.
    """
    reader = Reader(args.max_pixels, args.data_retries, folder_of(args.data_path))
    total, reduce_zero = len(split.images), reduces(args)
    chosen = np.unique(np.linspace(0, total - 1, min(total, LOOKED_AT)).astype(int)).tolist()
    raw, empty, read = np.zeros(256, np.int64), 0, 0
    for index in chosen:
        path = split.annotations.name(index)
        try:
            size = reader.content(split.images, index, size_of)
            label = stored_of(split, index, size, reader)
        except RunError:
            raise
        except Exception:
            continue
        label_counts = np.bincount(label.ravel(), minlength=256)
        checked(np.flatnonzero(label_counts).astype(np.uint8), len(split.classes), reduce_zero, path)
        empty += int(label_counts[[0, IGNORED] if reduce_zero else [IGNORED]].sum() == label.size)
        raw, read = raw + label_counts, read + 1
    first = f'{name}: {total} images, {len(split.classes)} classes'
    notes = ['; '.join([first, *split.notes])]
    if read:
        notes.append(facts(raw, split.classes, reduce_zero, f'{name}: of {read} annotations, evenly from all', empty))
    return split._replace(notes=notes)


def facts(raw: np.ndarray, classes: list[str], reduce_zero: bool, where: str, empty: int) -> str:
    """A line on how often which number is stored in annotations, int64 [256]. Raises UserError if all is ignored."""
    first = int(reduce_zero)
    counts, pixels = raw[first : first + len(classes)], raw.sum()
    zero = f'0 and {IGNORED}' if reduce_zero else f'{IGNORED}'
    if not counts.any():
        drop = '; without --reduce_zero_label, 0 is a class' if reduce_zero and raw[0] else ''
        raise UserError(f'{where}, every pixel is {zero}, ignored{drop}')
    unseen = [name for name, count in zip(classes, counts, strict=True) if not count]
    parts = [f'{where}: {len(classes) - len(unseen)} of {len(classes)} classes seen']
    if unseen:
        parts.append(f'never {listed(unseen, 8)}')
    parts.append(f'{100 * (1 - counts.sum() / pixels):.1f}% of the pixels ignored ({zero})')
    if empty:
        parts.append(f'{counted(empty, "annotation")} ignored as a whole')
    if not reduce_zero and set(np.flatnonzero(raw)) == {0, IGNORED}:
        parts.append(f'they hold 0 and {IGNORED} alone: if {IGNORED} is to be a class, write 1 for it')
    if reduce_zero and raw[0] and not counts[-1]:
        parts.append('if 0 is a class, leave out --reduce_zero_label')
    return '; '.join(parts)
