"""What a classifier answers, picture by picture and class by class: tables in CSV."""

import argparse
import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from util import digests, dist
from util.data import named
from util.data.datasets import SKIPPED, Split
from util.data.loader import Loader
from util.errors import StorageError, UserError

TOP = 5  # answers to a picture
WORST = 3  # classes in a line


def check(args: argparse.Namespace) -> None:
    """Raise UserError for a --predictions that could not be written after an evaluation."""
    path = args.predictions
    if not path:
        return
    if not args.eval:
        raise UserError('--predictions needs --eval')
    if path.suffix != '.csv' or path.is_dir():
        raise UserError(f'--predictions {path}: the name of a table must end with .csv')
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        what = 'cannot be written to' if path.parent.is_dir() else 'does not exist'
        raise UserError(f'--predictions {path}: the folder {path.parent} {what}')


def images_to_answer(args: argparse.Namespace, classes: list[str] | None) -> Split:
    """The validation images; with --predictions also a picture or a folder without `val/`, and then no labels.

    `classes` are the network's, if their names are known.
    """
    path = args.data_path
    laid_out = named.has_val(path) or args.val_share
    if not args.predictions or args.dataset not in named.FOLDERS or laid_out:
        return named.labelled_splits(args, ('val',), classes)[0]
    if args.eval_logits == 'present':
        raise UserError(f'--eval_logits present, but the images in {path} have no labels')
    files = named.images_at(path)
    why = 'it is a file' if path.is_file() else f'there is no folder {path / "val"}'
    return Split(files, None, classes or [], [f'{path}: {len(files)} images, taken without labels, as {why}'])


class Answers:
    """The likeliest classes of every image of all ranks, from the batches of an evaluation in turn.

    `independent`: every class has a probability of its own, as trained by binary cross-entropy; else they sum to 1.
    """

    def __init__(self, batches: Loader, outputs: int, independent: bool):
        self.batches, self.top, self.independent = batches, min(TOP, outputs), independent
        self.rows: list[Tensor] = []

    def __call__(self, logits: Tensor, labels: Tensor) -> None:
        """Logits [N, C] float32; labels [N], of which those of skipped images count."""
        chances = logits.sigmoid() if self.independent else logits.softmax(1)
        order = logits.topk(self.top).indices
        self.rows.append(torch.cat([(labels != SKIPPED).unsqueeze(1), order, chances.gather(1, order)], 1).double())

    def table(self, device: torch.device) -> tuple[list[bool], list[list[int]], list[list[float]]]:
        """Whether each image was read, its classes, and their probabilities. Every rank must call it."""
        table = torch.zeros(len(self.batches.dataset), 1 + 2 * self.top, dtype=torch.float64, device=device)
        places = [index for batch in self.batches.batch_sampler for _, index in batch]
        if self.rows:
            table[places] = torch.cat(self.rows)
        read, order, chances = dist.all_reduce_sum(table).cpu().split([1, self.top, self.top], 1)
        return read.flatten().bool().tolist(), order.long().tolist(), chances.tolist()


def write(path: Path, split: Split, answers: Answers, device: torch.device) -> list[str]:
    """Write the table of images and, where they have labels, that of classes; returns lines that tell of them.

    Every rank must call it, rank 0 writes. Raises StorageError.
    """
    read, order, chances = answers.table(device)
    if not dist.is_main():
        return []
    numbers = range(1, answers.top + 1)
    rows = [
        ['file', 'label', 'label_name', *(f'top{i}{what}' for i in numbers for what in ('', '_name', '_p')), 'note']
    ]
    for index, (good, classes, shares) in enumerate(zip(read, order, chances, strict=True)):
        row = [answers.batches.dataset.name(index)]
        row += ['', ''] if split.labels is None else [split.labels[index], name(split, split.labels[index])]
        for label, share in zip(classes, shares, strict=True):
            row += [label, name(split, label), f'{share:.6f}'] if good else ['', '', '']
        rows.append([*row, '' if good else 'skipped: cannot be read'])
    put(path, rows)
    told = [f'the answers to {sum(read)} of {len(read)} images are in {path}']
    if split.labels is None:
        return told
    hits = [classes[0] == label for classes, label in zip(order, split.labels, strict=True)]
    return [*told, write_classes(path.with_suffix('.classes.csv'), split, read, hits)]


def write_classes(path: Path, split: Split, read: Sequence[bool], hits: Sequence[bool]) -> str:
    """Write the accuracy of each class over the images that were read; returns a line with the lowest."""
    images, right = [0] * len(split.classes), [0] * len(split.classes)
    for label, good, hit in zip(split.labels, read, hits, strict=True):
        images[label] += good
        right[label] += good and hit
    shares = {label: 100 * right[label] / count for label, count in enumerate(images) if count}
    rows = [
        [label, name(split, label), count, f'{shares[label]:.3f}' if count else '']
        for label, count in enumerate(images)
    ]
    put(path, [['label', 'name', 'images', 'acc1'], *rows])
    worst = sorted(shares, key=shares.get)[:WORST]
    listed = ', '.join(f'{name(split, label)} {shares[label]:.1f}% of {images[label]}' for label in worst)
    return f'least accurate classes: {listed}; all are in {path}'


def name(split: Split, label: int) -> str:
    """The name of a class; nothing where it is not known."""
    return split.classes[label] if label < len(split.classes) else ''


def put(path: Path, rows: list[list]) -> None:
    """Write a table: whole, or not at all. Bytes of a name that are no UTF-8 are escaped."""
    text = io.StringIO()
    csv.writer(text, lineterminator='\n').writerows(rows)
    try:
        digests.replace(path, text.getvalue().encode('utf-8', 'backslashreplace'))
    except OSError as error:
        raise StorageError(f'cannot write {path}: {error.strerror or error}') from error
