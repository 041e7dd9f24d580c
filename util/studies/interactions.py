"""How cells of an image act together on a classifier's answer, by how many other cells are shown.

What an image gives is kept beside the results as soon as it is there: the same command goes on after it.
"""

import argparse
import glob
import hashlib
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from util import config, digests, dist
from util.analysis import interactions
from util.data import named
from util.data.datasets import Split
from util.errors import UserError
from util.log import counted, info
from util.studies.common import (
    Job,
    Network,
    add_grid,
    batches,
    check_read,
    described,
    evaluated,
    grid_of,
    head_labels,
    tell_cost,
    writing,
)

HELP = 'interactions: how cells of an image act together on the answer, by how many others are shown'
SPLITS = {'val': 500}
NEEDS_HEAD = True
QUICK = dict(images=100, pairs=20, contexts=20)
OF_ROWS = ('use_ema', 'seed', 'pairs', 'contexts', 'orders', 'radius', 'reward')  # arguments that a row depends on
SEEDS = 2**32  # of numpy's legacy generator


def add_flags(add: Callable) -> None:
    add_grid(add)
    add('--pairs', type=config.AT_LEAST_1, default=50, help='pairs of cells of each image')
    add('--contexts', type=config.AT_LEAST_1, default=50, help='sets of other cells for each pair and order')
    shares = [*interactions.RATIOS]
    add('--orders', type=config.SHARE, nargs='+', default=shares, help='sizes of these sets, as shares of all others')
    add('--radius', type=config.AT_LEAST_1, default=2, help='most rows and columns between the cells of a pair')
    add('--reward', choices=[*interactions.REWARDS], default='log_odds', help='what the answer is worth')
    add('--only_correct', action=config.Switch, help='of each network only images that it classifies correctly')
    quick = ', '.join(f'{number} {what}' for what, number in QUICK.items())
    add('--quick', action=config.Switch, help=f'{quick}, where no flag gives another number: 3% of the cost')


def settled(args: argparse.Namespace) -> argparse.Namespace:
    """The arguments, with the numbers of --quick where it is given."""
    quick = {name: number for name, number in QUICK.items() if args.quick and name not in args.given}
    return argparse.Namespace(**vars(args) | quick)


def choose(split: Split, args: argparse.Namespace) -> Split:
    """The first image of each class, then the second: a run with more of them goes on after one with fewer."""
    return named.some(split, args.seed, settled(args).images or SPLITS['val'], first=True, draw_classes=True)


# --------------------------------------------------------------------------
# numbers


def compute(job: Job) -> dict:
    """The interactions in each image, and from them the strength of each order."""
    args, count = settled(job.args), len(job.splits['val'].images)
    if args.seed + 1000 * count >= SEEDS:
        raise UserError(f'--seed {args.seed}: the generators of pairs take none above {SEEDS - 1000 * count}')
    given = [(network, grid_of(network), head_labels(job, network)) for network in job.networks]
    forwards = {grid: sum(len(sets) for _, sets, _ in samples(args, grid, 0)) for _, grid, _ in given}
    for network, grid, _ in given:
        tell_cost(network, count, forwards[grid])
    results = [of_network(job, args, *each) for each in given]
    return {'images': count, 'pairs': args.pairs, 'contexts': args.contexts, 'checkpoints': results}


def samples(args: argparse.Namespace, grid: int, k: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Of image k, for each different order: the order, and what `distinct_sets` gives."""
    pairs = interactions.sample_pairs(grid, args.pairs, args.radius, 1000 * k + args.seed)
    for order in dict.fromkeys(interactions.order_of(share, grid) for share in args.orders):
        contexts = interactions.sample_contexts(pairs, grid, order, args.contexts, 1000 * k + order + 1 + args.seed)
        yield order, *interactions.distinct_sets(pairs, contexts, grid)


def of_network(job: Job, args: argparse.Namespace, network: Network, grid: int, outputs: Tensor) -> dict:
    """The results of a network; `outputs` are those of its head, class by class."""
    own = {name: value for name, value in described(network).items() if name not in ('name', 'path', 'weights')}
    own |= {name: getattr(args, name) for name in OF_ROWS}
    own |= {'grid': grid, 'global_pool': network.args.global_pool}
    own |= {} if network.sha256 else {'weights': network.report}
    kept, mine = Kept(args.output_dir, network.name), {}
    with evaluated(job, network) as core:
        for [img], [place], [k] in batches(job, network, batch_size=1):
            if place < 0:
                continue
            label = outputs[place].item()
            key = key_of(own | {'image': k, 'label': label}, img)
            if args.only_correct and core(img.unsqueeze(0)).argmax() != label:
                mine[k] = None
                continue
            if key not in kept.rows:
                kept.add(key, of_image(core, img, label, args, grid, k))
            mine[k] = key, kept.rows[key]
    dist.barrier()  # hosts notice a lost rank
    every = dict(sorted(pair for of_rank in dist.gather(mine) for pair in of_rank.items()))
    check_read(job, 'val', torch.tensor([k in every for k in range(len(job.splits['val'].images))]))
    every = {k: pair for k, pair in every.items() if pair}
    if not every:
        raise UserError(f'--only_correct: {network.name} classifies none of the images correctly')
    if dist.is_main():
        kept.finish(dict(every.values()), [job.splits['val'].images.name(k) for k in every])
        info(f'{network.name}: interactions of {counted(len(every), "image")} in {kept.path}')
    values = torch.stack([torch.from_numpy(row.values) for _, row in every.values()], 1)
    forwards = sum(row.forwards for _, row in every.values())
    counts = {'images': len(every), 'forwards': forwards}
    return described(network) | counts | strengths(args, grid, values)


def of_image(core: nn.Module, img: Tensor, label: int, args: argparse.Namespace, grid: int, k: int) -> 'Row':
    """The interactions in one image. While a GPU works on an order, the samples of the next are drawn."""
    found, forwards = {}, 0
    batch_size = args.batch_size if 'batch_size' in args.given else interactions.BATCH
    for order, sets, places in samples(args, grid, k):
        found[order] = interactions.of_sets(core, img, label, sets, places, args.reward, batch_size)
        forwards += len(sets)
    of_ratios = torch.stack([found[interactions.order_of(share, grid)] for share in args.orders])
    return Row(of_ratios.cpu().numpy(), forwards)


def strengths(args: argparse.Namespace, grid: int, values: Tensor) -> dict:
    """What is drawn, and what each image gives to it, of interactions [ratios, images, pairs]."""
    of_images, error = values.abs().mean(2), interactions.strength_error(values)
    return {
        'grid': grid,
        'orders': [interactions.order_of(share, grid) for share in args.orders],
        'strength': interactions.strength(values).tolist(),
        'error': None if error is None else error.tolist(),
        'absolute': of_images.mean(1).tolist(),
        'absolute_of_images': of_images.T.tolist(),
    }


# --------------------------------------------------------------------------
# rows that are kept


class Row(NamedTuple):
    """What an image gives: interactions [ratios, pairs], and how many forwards they took."""

    values: np.ndarray
    forwards: int


def key_of(own: dict, img: Tensor) -> str:
    """The SHA-256 of all that a row depends on, the pixels too."""
    total = hashlib.sha256(json.dumps(own, sort_keys=True).encode())
    total.update(img.cpu().numpy().tobytes())
    return total.hexdigest()


class Kept:
    """The rows of a network by their keys, in interactions-NAME.npz: what a process that is killed leaves to the next.

    While rows are made, each further rank has a file of its own. A file is whole at any moment.
    """

    def __init__(self, folder: Path, name: str):
        stem = f'interactions-{name.replace("/", "-")}'
        self.path, self.of_ranks, self.rows = folder / f'{stem}.npz', f'{glob.escape(stem)}.rank*.npz', {}
        self.own = self.path if dist.is_main() else folder / f'{stem}.rank{dist.rank()}.npz'
        for path in (self.path, *folder.glob(self.of_ranks)):
            if path.exists():
                self.rows |= self.read(path)
        if self.rows:
            info(f'{self.path}: {counted(len(self.rows), "image")} there; those of this network and command are taken')

    def read(self, path: Path) -> dict[str, Row]:
        try:
            with np.load(path) as file:
                columns = zip(file['keys'].tolist(), file['interactions'].swapaxes(0, 1), file['forwards'], strict=True)
                return {key: Row(values, int(forwards)) for key, values, forwards in columns}
        except Exception as error:  # numpy, zip files and their compression have kinds of their own
            raise UserError(f'{path} is damaged, or not of this program: move it away') from error

    def add(self, key: str, row: Row) -> None:
        """Keep one more, and those before it that have its shape."""
        shape = row.values.shape
        self.rows = {key: old for key, old in self.rows.items() if old.values.shape == shape} | {key: row}
        self.write(self.own, self.rows)

    def finish(self, rows: dict[str, Row], files: list[str]) -> None:
        """Keep these alone, those of all ranks, with the names of the images."""
        self.write(self.path, rows, files=np.array(files))
        for path in self.path.parent.glob(self.of_ranks):
            path.unlink()

    def write(self, path: Path, rows: dict[str, Row], **more: np.ndarray) -> None:
        buffer = io.BytesIO()
        values, forwards = zip(*rows.values(), strict=True)
        np.savez(buffer, keys=[*rows], interactions=np.stack(values, 1), forwards=forwards, **more)
        with writing(path.parent):
            digests.replace(path, buffer.getvalue())


# --------------------------------------------------------------------------
# what is shown


def table(result: dict) -> list[list[str]]:
    """A row for each network: J of each order."""
    rows = []
    for network in result['checkpoints']:
        strength = [f'{value:.2f}' for value in network['strength']]
        each = network['forwards'] / network['images']
        rows.append([network['name'], str(network['images']), f'{each:,.0f}', *strength])
    shares = [f'J {share:g}' for share in result['arguments']['orders']]
    return [['network', 'images', 'forwards each', *shares], *rows]


def draw(result: dict, path: Path) -> None:
    """J over the order, with the standard error over the images."""
    from util.analysis import figures

    lines = {}
    for network in result['checkpoints']:
        shares = [order / network['grid'] ** 2 for order in network['orders']]
        lines[network['name']] = shares, network['strength'], network['error']
    title = f'{result["images"]} images, {result["pairs"]} pairs, {result["contexts"]} contexts of each order'
    ticks = {tenth / 10: f'{tenth / 10:.1f}n' for tenth in range(0, 11, 2)}
    figures.curves(path, title, 'order: other cells that are shown, of n', 'interaction strength J', lines, ticks)
