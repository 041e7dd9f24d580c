"""Which objects are in which image, as COCO's JSON says it, and what is wrong with one.

Boxes are x, y, width, height in pixels here. A segmentation is polygons whose union is the object, or a mask in runs
down the columns (RLE), compressed or not.
"""

import argparse
import json
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from util.data import datasets, node
from util.data.annotations import LOOKED_AT, size_of
from util.data.images import Reader
from util.data.named import Misfit, files_below, names_of
from util.data.stores import Files, Names
from util.errors import RunError, UserError, listed, printable
from util.log import counted

LAYOUT = 'annotations/instances_train2017.json and instances_val2017.json, train2017/ and val2017/'
THINNEST = 1e-5  # pixels of a side of a box that is an object
NUMBERS = {int, float}
HUGE = 1e9  # pixels, beyond which no box is
FAR = 100  # times an image's longer side: how far polygons may reach


class CocoObject(NamedTuple):
    """An annotation, as the JSON has it, but for its label, 1 to K, and what the JSON may leave out."""

    label: int
    bbox: list[float]  # x, y, width, height
    area: float
    crowd: int
    segmentation: Any  # None: it has none


class CocoSplit(NamedTuple):
    """Images, and the objects in each as JSON: of all images one block of bytes, which loader processes share."""

    images: Files
    objects: Names
    ids: np.ndarray  # int64 [N], of the images
    sizes: np.ndarray  # int64 [N, 2], height and width; 0: not known
    classes: list[str]  # of labels 1 to K
    categories: list[int]  # their ids
    notes: list[str]

    @property
    def labels(self) -> np.ndarray:
        """What ranks compare beside the names of files and classes."""
        return self.objects.block

    @property
    def wide(self) -> np.ndarray:
        """bool [N]: images that are wider than high. Batches of like images need less padding."""
        return self.sizes[:, 1] > self.sizes[:, 0]

    def of(self, index: int) -> list[CocoObject]:
        """Those of an image; none where nothing is annotated."""
        if not len(self.objects):
            return []
        return [CocoObject(*columns) for columns in json.loads(self.objects[index])]

    def take(self, indices: np.ndarray) -> 'CocoSplit':
        arrays = {name: getattr(self, name).take(indices) for name in ('images', 'objects')}
        return self._replace(**arrays, ids=self.ids[indices], sizes=self.sizes[indices])

    def truth(self, skipped: Collection[str] = ()) -> dict[str, list[dict]]:
        """What `evaluate` takes, without images that were skipped."""
        images, annotations = [], []
        for index, (image_id, (height, width)) in enumerate(zip(self.ids.tolist(), self.sizes.tolist(), strict=True)):
            if printable(self.images.name(index)) in skipped:
                continue
            images.append({'id': image_id, 'height': height, 'width': width})
            for label, bbox, area, crowd, segmentation in self.of(index):
                annotation = {'image_id': image_id, 'category_id': self.categories[label - 1], 'bbox': bbox}
                annotations.append(annotation | {'area': area, 'iscrowd': crowd, 'segmentation': segmentation})
        categories = [{'id': number, 'name': name} for number, name in zip(self.categories, self.classes, strict=True)]
        return {'images': images, 'annotations': annotations, 'categories': categories}


def read(images: Path, listing: Path, train: bool, masks: bool = True, keep_empty: bool = False) -> CocoSplit:
    """The images in a folder, and what a JSON, checked as a whole, says of them.

    For training, images without an object that can be learnt are left out, unless `keep_empty`. Without `masks`
    segmentations are not looked at. Raises UserError for whatever is wrong with the JSON, and for images that are not
    there, as far as the first and the last one tell.
    """
    content = parsed(listing)
    entries, categories = (by_id(content[part], part, listing) for part in ('images', 'categories'))
    for number, entry in entries.items():
        match entry:
            case {'file_name': str(), 'height': int(height), 'width': int(width)} if min(height, width) > 0:
                continue
        raise UserError(f'{listing}: the image {number} needs a file_name, and a height and width in pixels')
    known = sorted(categories)
    objects, counts = gathered(content['annotations'], entries, known, masks, listing)
    total, learnt = sum(map(len, objects.values())), {number for number in entries if counts[number]}
    ids = [number for number in entries if not train or keep_empty or number in learnt]
    if not ids:
        raise UserError(f'{listing} has no image with an object to learn, crowd regions apart')
    try:
        files = files_below(images, [entries[number]['file_name'] for number in ids], listing)
    except Misfit as error:
        raise UserError(f'{error}') from error
    left_out = [(len(entries) - len(ids), 'image', ' without objects')]
    if train:
        left_out += [
            (counts['crowds'], 'crowd region', ''),
            (counts['without'], 'object', ' without area in its image'),
        ]
    words = ', '.join(f'{counted(number, what)}{more}' for number, what, more in left_out if number)
    note = f'{counted(len(ids), "image")}, {counted(total, "annotation")}, {len(known)} classes'
    return CocoSplit(
        files,
        Names.of(json.dumps(objects[number], separators=(',', ':')) for number in ids),
        np.array(ids),
        np.array([(entries[number]['height'], entries[number]['width']) for number in ids]),
        names_of(content['categories'], known),
        known,
        [f'{note}; left out: {words}' if words else note],
    )


def parsed(listing: Path) -> dict[str, list[dict]]:
    """Images, annotations and categories in a JSON."""
    parts = ('images', 'annotations', 'categories')
    try:
        content = json.loads(listing.read_bytes(), parse_constant=refuse)
    except OSError as error:
        raise UserError(f'cannot read {listing}: {error.strerror}') from error
    except (ValueError, RecursionError) as error:
        raise UserError(f'{listing} is not JSON, or damaged: {error}') from error
    for part in parts:
        rows = content.get(part) if isinstance(content, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            holds = listed(list(content), 5) if isinstance(content, dict) else f'a {type(content).__name__}'
            raise UserError(
                f'{listing} has no list of {part}: it should hold {listed(parts)}, not {holds or "nothing"}'
            )
    return content


def refuse(word: str) -> None:
    """Of NaN and Infinity, which Python's JSON would take."""
    raise ValueError(f'it holds {word}')


def by_id(rows: list[dict], what: str, listing: Path) -> dict[int, dict]:
    """Raises UserError for ids that are no whole numbers, or occur twice."""
    found = {}
    for row in rows:
        number = row.get('id')
        if type(number) is not int or found.setdefault(number, row) is not row:
            fault = 'occurs twice' if type(number) is int else 'is not a whole number'
            raise UserError(f'{listing}: the id {printable(number, 40)} of its {what} {fault}')
    return found


def gathered(
    annotations: list[dict], entries: dict[int, dict], known: list[int], masks: bool, listing: Path
) -> tuple[dict[int, list[CocoObject]], Counter]:
    """The objects in each image, and counts: of `crowds`, of objects `without` area, and by image of those to learn."""
    label_of = {number: label for label, number in enumerate(known, 1)}
    objects, counts = {number: [] for number in entries}, Counter()
    for row in annotations:
        if fault := annotation_fault(row, entries, label_of, masks):
            raise UserError(f'{listing}: the annotation {printable(row.get("id"), 40)} {fault}')
        bbox, crowd, image = row['bbox'], int(bool(row.get('iscrowd'))), row['image_id']
        area = row.get('area', bbox[2] * bbox[3])
        segmentation = row['segmentation'] if masks else None
        objects[image].append(CocoObject(label_of[row['category_id']], bbox, area, crowd, segmentation))
        there = has_area(corners(bbox, entries[image]['height'], entries[image]['width']))
        counts['crowds' if crowd else image if there else 'without'] += 1
    return objects, counts


def annotation_fault(row: dict, entries: dict[int, dict], label_of: dict[int, int], masks: bool) -> str:
    """Why an annotation cannot be taken; '' if it can."""
    match row:
        case {'image_id': int(image), 'category_id': int(category), 'bbox': [x, y, width, height]}:
            numbers = [x, y, width, height, row.get('area', 0)]
        case _:
            return 'needs an image_id, a category_id and a bbox of x, y, width and height: is it of another task?'
    if image not in entries:
        return f'is of the image {image}, which is not among its images'
    if category not in label_of:
        return f'is of the category {category}, which is not among its categories'
    if not set(map(type, numbers)) <= NUMBERS or not all(-HUGE < number < HUGE for number in numbers):
        return 'has a bbox or an area that is not of numbers'
    if row.get('iscrowd') not in (None, 0, 1):
        return f'has an iscrowd of {row["iscrowd"]!r:.40}: it is 0 or 1'
    if not masks:
        return ''
    fault = segmentation_fault(row.get('segmentation'), entries[image]['height'], entries[image]['width'])
    return fault and f'{fault}; --box_only needs none'


def corners(bbox: list[float], height: int, width: int) -> list[float]:
    """x0, y0, x1, y1 of x, y, width and height, clipped to an image."""
    x, y, across, down = bbox
    ends = (x, width), (y, height), (x + across, width), (y + down, height)
    return [min(max(float(end), 0.0), limit) for end, limit in ends]


def has_area(box: Sequence[float]) -> bool:
    return min(box[2] - box[0], box[3] - box[1]) > THINNEST


# --------------------------------------------------------------------------
# segmentations


def segmentation_fault(segmentation: Any, height: int, width: int) -> str:
    """Why something is no segmentation of an image of this size; '' if it is. pycocotools would take much of it."""
    match segmentation:
        case [_, *_]:
            far = FAR * max(height, width)
            for part in segmentation:
                if not isinstance(part, list) or len(part) % 2 or not set(map(type, part)) <= NUMBERS:
                    return 'has a polygon that is not a list x, y, x, y, ... of numbers'
                if len(part) < 6:
                    return f'has a polygon of {counted(len(part) // 2, "point")}: it takes three'
                if not -far < min(part) <= max(part) < far:
                    return 'has a polygon far outside of its image'
            return ''
        case {'size': [int(rows), int(columns)], 'counts': list() | str() | bytes() as counts}:
            if (rows, columns) != (height, width):
                return f'has a mask of {columns} x {rows} pixels, its image {width} x {height}'
            try:
                runs = counts if isinstance(counts, list) else unpacked(counts)
                fits = min(runs, default=0) >= 0 and sum(runs) == height * width
            except (TypeError, IndexError):
                fits = False
            return '' if fits else f'has a damaged mask: its runs are not those of {width} x {height} pixels'
    return 'has no segmentation'


def unpacked(counts: str | bytes) -> list[int]:
    """The runs in compressed RLE: numbers of 5 bits a letter, from the third on differences to the last but one."""
    runs, value, shift = [], 0, 0
    for letter in counts.encode() if isinstance(counts, str) else counts:
        value |= (letter - 48 & 31) << shift
        shift += 5
        if not letter - 48 & 32:
            value -= (letter - 48 & 16) and 1 << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return runs if not shift else [*runs, -1]


# --------------------------------------------------------------------------
# folders


def check_alike(splits: dict[str, CocoSplit], args: argparse.Namespace) -> None:
    """Raise UserError for splits whose JSONs list different categories."""
    (first, ours), *others = splits.items()
    for name, theirs in others:
        known, wanted = (dict(zip(split.categories, split.classes, strict=True)) for split in (ours, theirs))
        if known != wanted:
            number = min(n for n in known | wanted if known.get(n) != wanted.get(n))
            named = (printable(names.get(number, 'not there'), 40) for names in (known, wanted))
            raise UserError(
                f'{listing_of(args, first)} and {listing_of(args, name)} do not list the same categories: '
                f'{number} is {" and ".join(named)}'
            )


def split_of(args: argparse.Namespace, name: str) -> CocoSplit:
    """The images to train with ('train') or to test on ('val'), as the arguments say where they are."""
    listing, images = listing_of(args, name), folder_of(args, name)
    for path, there, flag in (
        (listing, listing.is_file(), f'{name}_json'),
        (images, images.is_dir(), f'{name}_images'),
    ):
        if not there:
            raise UserError(f'no such {"file" if flag.endswith("json") else "folder"}: {path}{advice(args, flag)}')
    how = name == 'train', not args.box_only, args.keep_empty
    key = ('coco', listing, images, *how)
    split = node.once_a_node(key, lambda: looked_at(read(images, listing, *how), rooted(Reader.of(args), args, name)))
    if all(thing.crowd for index in range(len(split.ids)) for thing in split.of(index)):
        what = 'learn' if name == 'train' else 'find'
        raise UserError(f'{listing} has no image with an object to {what}, crowd regions apart')
    return split._replace(notes=[f'{name}: {note}' for note in split.notes])


def advice(args: argparse.Namespace, flag: str) -> str:
    """What to do where the file or folder of a flag is missing."""
    if given := getattr(args, flag):
        inside = args.data_path / given
        fits = inside.is_file() if flag.endswith('json') else inside.is_dir()
        return f'; did you mean --{flag} {inside}?' if fits else ''
    folder = args.data_path / 'annotations'
    hint = datasets.nearby(args.data_path, ('annotations', 'val2017'))
    if folder.is_dir() and not hint:
        hint = f'; {folder} holds {listed(sorted(path.name for path in folder.iterdir()), 5) or "nothing"}'
    return f'; {args.data_path} should hold {LAYOUT}, or --{flag} says where it is{hint}'


def listing_of(args: argparse.Namespace, name: str) -> Path:
    return getattr(args, f'{name}_json') or args.data_path / 'annotations' / f'instances_{name}2017.json'


def folder_of(args: argparse.Namespace, name: str) -> Path:
    return getattr(args, f'{name}_images') or args.data_path / f'{name}2017'


def rooted(reader: Reader, args: argparse.Namespace, name: str) -> Reader:
    """A reader that knows where the images of a split are: if that folder is gone, so is the storage."""
    return reader._replace(root=folder_of(args, name))


def looked_at(split: CocoSplit, reader: Reader) -> CocoSplit:
    """The split. Raises UserError where one of a hundred images, evenly from all, is not of the size in the JSON.

    One that cannot be read is left for the run to meet.
    """
    total = len(split.images)
    for index in np.unique(np.linspace(0, total - 1, min(total, LOOKED_AT)).astype(int)).tolist():
        try:
            size = reader.content(split.images, index, size_of)
        except RunError:
            raise
        except Exception:
            continue
        check_size(split, index, size)
    return split


def check_size(split: CocoSplit, index: int, size: tuple[int, int]) -> None:
    """Raise UserError for an image that is not of the (height, width) which the JSON gives it."""
    height, width = split.sizes[index].tolist()
    if size == (height, width) or not height:
        return
    turned = " (turned? EXIF's rotation is ignored)" if size == (width, height) else ''
    name = printable(split.images.name(index))
    raise UserError(f'{name} is {size[1]} x {size[0]} pixels, in the JSON {width} x {height}{turned}')
