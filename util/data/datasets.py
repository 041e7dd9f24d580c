"""From folders to uint8 batches: which files there are, which rank gets which sample when, and the way to the device.

Workers hand over uint8 [N, 3, H, W]; `Normalisation` makes floats of a whole batch on the device.
"""

import errno
import functools
import itertools
import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from util import resources, rng, signals
from util.data import decoders
from util.data.images import Reader, reason
from util.data.loader import Loader
from util.data.order import KeyedOrder
from util.data.stores import Files, Store
from util.errors import RunError, UserError, listed, printable

SKIPPED = -1  # the label of the blank that stands for a bad image in evaluation
MOST_PERMUTED = 50_000_000  # samples: 400 MB in every rank; the order of more takes no memory
PATIENCE_SHARE = 0.9  # of what a silent rank is given: a stuck loader is to be named before its rank is


class ImageFiles(Dataset):
    """Images, with or without labels; item (epoch, index) or (epoch, index, copy) is (uint8 [3, H, W], label).

    Before a sample is augmented, all random generators are seeded from the seed and its item: its augmentation depends
    on nothing else, whichever worker of whichever rank makes it. The same holds for the image that replaces a skipped
    bad image; without `replace`, a skipped image is blank and labelled -1.
    """

    def __init__(
        self,
        images: Store,
        labels: np.ndarray | None,
        transform: Callable,
        seed: int,
        reader: Reader | None = None,
        replace: bool = True,
    ):
        self.images, self.labels = images, labels
        self.transform, self.seed = transform, seed
        self.decoder = getattr(transform, 'decoder', decoders.PIL)  # a transform that has one takes JPEGs of it
        self.reader, self.replace = reader or Reader(), replace

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        return self.images.name(index)

    def image(self, index: int) -> Image.Image | decoders.Jpeg:
        """In RGB, not augmented."""
        pixels = self.images.pixels(index)
        return self.reader.read(self.images, index, self.decoder) if pixels is None else Image.fromarray(pixels)

    def augmented(self, index: int, item: tuple[int, ...]) -> Tensor:
        """An image, augmented as this item."""
        image = self.image(index)
        rng.seed_all(self.seed, rng.SAMPLE, *item)
        return self.transform(image)

    def sample(self, index: int, item: tuple[int, ...]) -> tuple[Tensor, int]:
        """Of an image what this item is."""
        return self.augmented(index, item), 0 if self.labels is None else int(self.labels[index])

    def blank(self) -> tuple[Tensor, int]:
        """What stands for a skipped image that is not replaced."""
        return self.transform(Image.new('RGB', (1, 1))), SKIPPED

    def __getitem__(self, item: tuple[int, ...]) -> tuple[Tensor, int]:
        """Raises UserError naming an image that cannot be read, and StorageError."""
        epoch, index, *_ = item
        for attempt in itertools.count():
            try:
                return self.sample(index, item)
            except RunError:
                raise
            except Exception as error:  # Pillow raises of every kind
                if resources.starved(error):  # no image is to blame
                    raise
                self.reader.skip(self.name(index), reason(error), len(self))
            if not self.replace:
                return self.blank()
            index = int(rng.generator(self.seed, rng.REPLACEMENT, epoch, item[1], attempt).integers(len(self)))

    def __getitems__(self, items: list[tuple[int, ...]]) -> list[tuple[Tensor, int]] | RunError:
        """A batch, or why there is none: what `Loader` takes."""
        try:
            return [self[item] for item in items]
        except RunError as error:
            return error


class EpochBatches:
    """A batch sampler: this rank's micro-batches of one epoch, each a list of `ImageFiles` items.

    Optimiser step s takes samples [s G, (s + 1) G) of the epoch's seeded order, G = batch size B * ranks W *
    accum_iter; micro-step m of rank r takes B of those, from number m W B + r B on. The incomplete last G is dropped.

    With `copies` > 1 (repeated augmentation, Hoffer et al. 2020), each image is taken that many times in a row, each
    time with an augmentation of its own, and an epoch, as long as before, sees so many times fewer images. Rank r then
    takes every W-th of the micro-step's W B samples, from its r-th on, so that copies fall to different ranks.

    Given `kinds`, one of two for each sample, a micro-batch has samples of one kind: see `alike`.

    Given `steps`, these are a round, which is to a run of steps what an epoch is to others: the passes over the data,
    each in its own order, follow each other in it, and items (pass, index) have the number of the pass.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        accum_iter: int,
        rank: int,
        world_size: int,
        seed: int,
        copies: int = 1,
        steps: int | None = None,
        kinds: np.ndarray | None = None,
    ):
        self.num_samples, self.batch_size, self.accum_iter = num_samples, batch_size, accum_iter
        self.kinds = kinds
        self.rank, self.world_size, self.seed, self.copies = rank, world_size, seed, copies
        self.global_batch = batch_size * accum_iter * world_size
        self.pass_steps = num_samples // self.global_batch  # optimiser steps of a pass over the data
        self.steps = steps or self.pass_steps  # of an epoch, or of a round
        self.unit = 'round' if steps else 'epoch'
        self.start(0)

    def start(self, epoch: int, step: int = 0) -> None:
        """The next iteration is over this epoch, from this optimiser step on."""
        self.epoch, self.first_step = epoch, step

    def __len__(self) -> int:
        return (self.steps - self.first_step) * self.accum_iter

    def __iter__(self) -> Iterator[list[tuple[int, ...]]]:
        before = None
        for step in range(self.first_step, self.steps):
            number, step = divmod(self.epoch * self.steps + step, self.pass_steps)
            if number != before:
                before, order = number, epoch_order(self.num_samples, self.seed, number)
                if self.kinds is not None:
                    order = alike(order, self.kinds, self.batch_size)
            for micro in range(self.accum_iter):
                first = step * self.global_batch + micro * self.world_size * self.batch_size
                if self.copies == 1:
                    first += self.rank * self.batch_size
                    yield [(number, i) for i in order[np.arange(first, first + self.batch_size)].tolist()]
                else:
                    numbers = np.arange(first + self.rank, first + self.world_size * self.batch_size, self.world_size)
                    indices, copies = order[numbers // self.copies], numbers % self.copies
                    yield [(number, *item) for item in zip(indices.tolist(), copies.tolist(), strict=True)]


def epoch_order(num_samples: int, seed: int, epoch: int) -> np.ndarray | KeyedOrder:
    """The seeded order of an epoch's samples: `order[places]`."""
    generator = rng.generator(seed, rng.ORDER, epoch)
    return KeyedOrder(num_samples, generator) if num_samples > MOST_PERMUTED else generator.permutation(num_samples)


def alike(order: np.ndarray, kinds: np.ndarray, batch_size: int) -> np.ndarray:
    """The order, as batches leave two queues, of kind True and of kind False, each as soon as it is full.

    What is left in the queues comes last.
    """
    full_at = np.full(len(order), len(order))  # the place at which a sample's batch is full
    for kind in (False, True):
        places = np.flatnonzero(kinds[order] == kind)
        ends = places[batch_size - 1 :: batch_size]
        full_at[places[: len(ends) * batch_size]] = ends.repeat(batch_size)
    return order[full_at.argsort(kind='stable')]


def eval_batches(num_samples: int, batch_size: int, rank: int, world_size: int) -> list[list[tuple[int, int]]]:
    """Every sample exactly once over the ranks, in order; the last batch may be shorter.

    Ranks take whole batches in turn, the same ones for any number of ranks: what a network makes of a sample may differ
    in the last bit with the batch around it.
    """
    starts = range(rank * batch_size, num_samples, world_size * batch_size)
    return [[(0, i) for i in range(start, min(start + batch_size, num_samples))] for start in starts]


def mae_crop(width: int, height: int, scale: Sequence[float], ratio: Sequence[float]) -> tuple[int, int, int, int]:
    """Top, left, height and width of a random crop of an image, in pixels, as MAE's linear probe draws it.

    One draw of the share of the area, in `scale`, and of width / height, in `ratio` and even in its logarithm; sides
    beyond the image are cut to its own. torchvision tries again instead. From torch's global generator, in the order
    area, ratio, top, left.
    """
    area = width * height * torch.empty(1).uniform_(*scale).item()
    shape = torch.empty(1).uniform_(*torch.tensor(ratio).log().tolist()).exp().item()
    crop_width = min(max(1, round(math.sqrt(area * shape))), width)
    crop_height = min(max(1, round(math.sqrt(area / shape))), height)
    top = int(torch.randint(height - crop_height + 1, (1,)))
    left = int(torch.randint(width - crop_width + 1, (1,)))
    return top, left, crop_height, crop_width


def loader(
    dataset: Dataset, batches: Iterable, num_workers: int, pin_memory: bool, dist_timeout_s: float = 600
) -> Loader:
    """A Loader whose workers live as long as it does."""
    return Loader(
        dataset,
        batch_sampler=batches,
        num_workers=num_workers,
        pin_memory=pin_memory,
        patience_s=PATIENCE_SHARE * dist_timeout_s,
        persistent_workers=num_workers > 0,
        prefetch_factor=resources.PREFETCH if num_workers else None,
        worker_init_fn=signals.ignore,
    )


def to_device(item: Any, device: torch.device) -> Any:
    """A tensor, or (named) tuples, lists and dicts of them, on the device.

    From pinned memory, so that the host does not wait, and on a stream of its own: the host is ahead of the GPU, which
    takes the next batch beside the step that it is at.
    """
    if device.type != 'cuda':
        return each(lambda tensor: tensor.to(device), item)
    compute, copies = torch.cuda.current_stream(device), copy_stream(device)

    def upload(tensor: Tensor) -> Tensor:
        pinned = tensor if tensor.is_pinned() else tensor.pin_memory()
        uploaded = pinned.to(device, non_blocking=True)
        uploaded.record_stream(compute)  # or its memory might be given away while the step still uses it
        return uploaded

    with torch.cuda.stream(copies):
        uploaded = each(upload, item)
    compute.wait_stream(copies)
    return uploaded


@functools.cache
def copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def each(function: Callable[[Tensor], Tensor], item: Any) -> Any:
    """The item with a function's results in place of its tensors; other leaves, such as numbers, as they are."""
    if isinstance(item, Tensor):
        return function(item)
    if isinstance(item, dict):
        return {key: each(function, part) for key, part in item.items()}
    if not isinstance(item, list | tuple):
        return item
    parts = [each(function, part) for part in item]
    return type(item)(*parts) if hasattr(item, '_fields') else type(item)(parts)


class Normalisation(NamedTuple):
    """A batch of images, uint8 [N, 3, H, W], to normalised float32 in a memory format, on the device."""

    mean: Tensor  # [3, 1, 1], of values in 0..1
    std: Tensor
    memory_format: torch.memory_format

    @classmethod
    def of(
        cls,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> 'Normalisation':
        return cls(*(torch.tensor(x, device=device).view(3, 1, 1) for x in (mean, std)), memory_format)

    def __call__(self, imgs: Tensor) -> Tensor:
        return (imgs.to(torch.float32, memory_format=self.memory_format) / 255 - self.mean) / self.std


# --------------------------------------------------------------------------
# folders

# what systems leave among images, beside names that begin with a dot
LEFT_BY_SYSTEMS = {
    *('__MACOSX', '@eaDir', '@Recycle', '#recycle', 'lost+found', '$RECYCLE.BIN', 'System Volume Information'),
    '__pycache__',
}


CLASS_FOLDERS = 'train/ and val/, one folder per class in each'


class Split(NamedTuple):
    """A split of a data set, and what to say of it."""

    images: Store
    labels: np.ndarray | None  # int64 [N], places in `classes`; None in pretraining
    classes: list[str]
    notes: list[str]


class LeftOut:
    """What lies among images and is none: {kind: {name or ending: how many}}."""

    def __init__(self):
        self.kinds: dict[str, Counter] = defaultdict(Counter)

    def notes(self) -> list[str]:
        """['not taken as images: by ending 3 (.txt, .gif), hidden 1 (.ipynb_checkpoints)'], or nothing."""
        counted = []
        for kind, names in sorted(self.kinds.items()):
            commonest = sorted(names, key=lambda name, of=names: (-of[name], name))
            counted.append(f'{kind} {names.total()} ({listed(commonest)})')
        return [f'not taken as images: {", ".join(counted)}'] if counted else []


def scan(folder: str | Path, left: LeftOut) -> tuple[list[str], list[str]]:
    """The folders in a folder, sorted, and its image files, but none that is hidden; all else is left out.

    Raises UserError for a folder that cannot be listed.
    """
    folders, files = [], []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                name, kind = entry.name, kind_of(entry)
                of_image = name.lower().endswith(IMG_EXTENSIONS)
                if kind == 'file' and of_image:
                    files.append(entry.path)
                elif kind == 'file':
                    left.kinds['by ending'][os.path.splitext(name)[1].lower() or name] += 1
                elif kind == 'folder':
                    folders.append(entry.path)
                    if of_image:
                        left.kinds['folders named like images'][name] += 1
                else:
                    left.kinds[kind][name] += 1
    except OSError as error:
        raise cannot_list(error) from error
    return sorted(folders), files


def cannot_list(error: OSError) -> UserError:
    return UserError(f'cannot list the folder {printable(str(error.filename))}: {error.strerror}')


def encloses(folder: Path, path: str) -> bool:
    """Whether a path lies in a folder: a link from there to the folder would give it all images, of any class."""
    return Path(os.path.realpath(os.path.dirname(path))).is_relative_to(folder)


def kind_of(entry: os.DirEntry) -> str:
    """From what listing the folder has told: only of a link it is looked up what it leads to."""
    if entry.name[0] == '.' or entry.name in LEFT_BY_SYSTEMS:
        return 'hidden'
    try:
        if entry.is_file():
            return 'file'
        if entry.is_dir():
            around = entry.is_symlink() and Path(os.path.realpath(entry.path))
            return 'links to a folder that holds them' if around and encloses(around, entry.path) else 'folder'
    except OSError as error:
        if error.errno != errno.ELOOP:  # reading it will tell what is wrong
            return 'file'
    return 'broken links' if entry.is_symlink() else 'special files'


def images_below(folder: str | Path, left: LeftOut) -> Iterator[str]:
    """All image files below a folder, sorted; those of a folder that several links lead to once."""
    inside, seen, ahead = {}, set(), [str(folder)]  # what is in each folder, as one string
    while ahead:
        where = ahead.pop()
        try:
            status = os.stat(where)
        except OSError as error:
            raise cannot_list(error) from error
        if (status.st_dev, status.st_ino) in seen:  # a link to a folder above would be followed for ever
            continue
        seen.add((status.st_dev, status.st_ino))
        folders, images = scan(where, left)
        ahead += reversed(folders)  # so that all machines enter a folder of several names by the same one
        inside[f'{where}/'] = '\0'.join(sorted([*images, *(f'{path}/' for path in folders)], reverse=True))
    ahead = [f'{folder}/']
    while ahead:
        path = ahead.pop()
        if path.endswith('/'):  # a folder, which may have been entered by another name
            ahead += filter(None, inside.pop(path, '').split('\0'))
        else:
            yield path


def list_images(folder: Path, left: LeftOut | None = None) -> Files:
    """All image files below `folder`, sorted; class folders or a flat one; what is passed over is counted in `left`.

    Raises UserError if there are none, or for a folder that cannot be listed.
    """
    if not os.path.isdir(folder):
        raise UserError(f'{folder} is a file, not a folder' if os.path.isfile(folder) else f'no such folder: {folder}')
    left = left or LeftOut()
    if files := Files(images_below(folder, left)):
        return files
    raise UserError(no_images(str(folder), left))


def no_images(where: str, left: LeftOut) -> str:
    return '; '.join([f'no images in {where} (looked for {", ".join(IMG_EXTENSIONS)})', *left.notes()])


def pretraining_folder(data_path: Path) -> Path:
    """`data_path/train` if there is such a folder, else `data_path`; labels are not needed."""
    train = data_path / 'train'
    return train if os.path.isdir(train) else data_path


def folders_in(folder: Path) -> list[Path]:
    return list(map(Path, scan(folder, LeftOut())[0])) if os.path.isdir(folder) else []


def nearby(data_path: Path, inside: Sequence[str] = ('train', 'val')) -> str:
    """'; did you mean --data_path ...?' where a folder above, or a few levels below, has these folders in it.

    Whose pairs of images and annotations are given as classes is told the program for them.
    """
    if 'images' not in inside and all(os.path.isdir(data_path / name) for name in ('images', 'annotations')):
        return '; it is laid out for scripts/finetune_segmentation.py'
    ahead = [data_path.parent] if data_path.name in inside else []
    below = [data_path]
    for _ in range(3):
        below = [inner for folder in below for inner in folders_in(folder)][:20]
        ahead += below
    for folder in ahead:
        if all(os.path.isdir(folder / name) for name in inside):
            return f'; did you mean --data_path {folder}?'
    return ''


def advice(data_path: Path, split: str) -> str:
    """What to do where there is no `train/` or `val/`, a split."""
    if hint := nearby(data_path):
        return hint
    whole = 'train/' if os.path.isdir(data_path / 'train') else f'the class folders in {data_path}'
    for name in ('valid', 'validation'):
        if os.path.isdir(data_path / name) and split == 'val':
            return f'; there is {name}/: rename it, or link val to it'
    if os.path.isdir(data_path / 'val') or (whole != 'train/' and len(folders_in(data_path)) < 2):
        return ''
    return f'; without val/, --val_share 0.1 takes a tenth of {whole} for validation'


def labelled_files(data_path: Path, split: str, download: bool = False) -> Split:
    """The images of `data_path/split/<class>/`, which nothing downloads.

    Raises UserError where there are no class folders, or none of them holds an image; in training, where one does not.
    """
    folder, left = data_path / split, LeftOut()
    if not os.path.isdir(folder):
        missing = folder if os.path.isdir(data_path) else data_path
        raise UserError(f'no such folder: {missing}; {data_path} should hold {CLASS_FOLDERS}{advice(data_path, split)}')
    folders, loose = scan(folder, left)
    if not folders:
        found = f'{len(loose)} images, but no class folders' if loose else 'no class folders'
        raise UserError(
            f'{folder} has {found} in it: each image must be in a folder of its class, such as {folder}/cat/1.jpg'
            + ('; or move val/ away, and --val_share 0.1 takes a tenth of train/' if split == 'val' else '')
        )
    counts = []
    files = Files(path for folder in folders for path in counting(images_below(folder, left), counts))
    empty = [path for path, count in zip(folders, counts, strict=True) if not count]
    if empty and (split != 'val' or len(empty) == len(folders)):
        hint = '' if split == 'val' else '; a class without images cannot be learnt: fill its folder, or remove it'
        raise UserError(no_images(listed(empty), left) + hint)
    notes = left.notes()
    if loose:
        notes.append(f'not used, as they lie beside the class folders: {len(loose)} ({listed(loose, 1)})')
    return Split(files, np.repeat(np.arange(len(counts)), counts), list(map(os.path.basename, folders)), notes)


def counting(paths: Iterable[str], counts: list[int]) -> Iterator[str]:
    """The paths; then how many they were is put on the list."""
    number = 0
    for number, path in enumerate(paths, 1):  # noqa: B007
        yield path
    counts.append(number)
