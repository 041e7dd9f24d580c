"""What all studies share: the networks, the images, and one row of numbers for each image, from all ranks.

A study is a module of this room with
    HELP                     its line in --help
    SPLITS                   {split that it reads: how many images of it by default, or None for all}
    NEEDS_HEAD               whether it asks for answers, so that a head must be trained
    add_flags(add)           declares flags of its own
    compute(job) -> dict     plain data: {'checkpoints': [described(network) | ..., ...], ...}
    table(result)            header and rows, from that data alone
    draw(result, path)       the figure in `path`, and others beside it
and where it differs from the others, `DEFAULTS` of common flags, and `choose(split, args)`, which images it takes.
"""

import argparse
import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from util import build, config, dist
from util.analysis.features import evaluating, exact
from util.data import datasets, named
from util.data.datasets import Split
from util.errors import StorageError, UserError
from util.log import clock, counted, info
from util.nn.linear_probe import last_layer

OF_FILE = ('model', 'model_kwargs', 'input_size', 'mean', 'std')  # arguments that a checkpoint gives
TOLD_EVERY = 30  # seconds between two lines on progress


class Network(NamedTuple):
    """A network to study."""

    name: str
    path: str
    sha256: str | None
    args: argparse.Namespace  # completed by its file
    core: nn.Module
    report: str
    classes: list[str] | None  # of its head, where the file names them
    trained_head: bool


class Job(NamedTuple):
    """What a study works on."""

    args: argparse.Namespace
    device: torch.device
    networks: list[Network]
    splits: dict[str, Split]


def described(network: Network) -> dict:
    """What the results say of a network."""
    settings = {name: getattr(network.args, name) for name in (*OF_FILE, 'crop_pct')}
    return dict(name=network.name, path=network.path, sha256=network.sha256, **settings, weights=network.report)


# --------------------------------------------------------------------------
# images


class Share(NamedTuple):
    """This rank's images of a split, in batches that are the same for any number of ranks."""

    loader: datasets.Loader
    places: list[list[int]]  # in the split, batch by batch
    normalise: datasets.Normalisation


def share(job: Job, network: Network, name: str = 'val', batch_size: int | None = None) -> Share:
    """Images of the split `name` as the network sees them, by default --batch_size at a time."""
    args = argparse.Namespace(**vars(network.args) | {'batch_size': batch_size or job.args.batch_size})
    split = job.splits[name]
    loader = build.val_loader(args, split.images, split.labels, job.device, f'bad_images_{name}.txt')
    places = [[index for _, index in batch] for batch in loader.batch_sampler]
    return Share(loader, places, datasets.Normalisation.of(args.mean, args.std, job.device))


def batches(
    job: Job, network: Network, name: str = 'val', batch_size: int | None = None, drop_last: bool = False
) -> Iterator[tuple[Tensor, Tensor, list[int]]]:
    """This rank's batches: images [B, 3, S, S], normalised, on the device; labels [B], on the CPU; places in the split.

    The label of an image that could not be read, with --bad_images skip, is -1. `drop_last`: without an incomplete
    batch.
    """
    loader, places, normalise = share(job, network, name, batch_size)
    whole = batch_size or job.args.batch_size
    for (imgs, labels, *_), of_batch in zip(progress(loader, len(places), network.name), places, strict=True):
        if len(of_batch) == whole or not drop_last:
            yield normalise(imgs.to(job.device, non_blocking=True)), labels, of_batch


def check_read(job: Job, name: str, read: Tensor) -> None:
    """Tell how many images of a split were skipped. Raises UserError where none could be read, `read` [N]."""
    if not read.any():
        raise UserError('none of the images can be read')
    if missing := int((~read).sum()):
        info(f'bad images skipped: {missing}, listed in {job.args.output_dir / f"bad_images_{name}.txt"}')


def add_grid(add: Callable) -> None:
    add(
        '--grid',
        type=config.number(int, 2),
        help='cells of each side; default: cells of 16 pixels, of images below 128 pixels 16 x 16 cells',
    )


def grid_of(network: Network) -> int:
    """How many cells each side of a network's images has, by --grid or its default."""
    side, given = network.args.input_size, network.args.grid
    if given and given > side:
        raise UserError(f'--grid {given}: the images of {network.name} have {side} rows of pixels')
    return given or (side // 16 if side >= 128 else min(16, side))


def head_labels(job: Job, network: Network, name: str = 'val') -> Tensor:
    """Which output of its head stands for each class of a split: int64 [classes]. Raises UserError."""
    head = network.core.get_submodule(last_layer(network.core))
    outputs = [module for module in head.modules() if isinstance(module, nn.Linear)][-1].out_features
    return torch.from_numpy(named.outputs_of(job.splits[name].classes, network.classes, outputs, network.name))


# --------------------------------------------------------------------------
# numbers


def rows(
    job: Job,
    network: Network,
    of_batch: Callable[[Tensor, Tensor], Tensor],
    name: str = 'val',
    batch_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """A row of numbers for each image of a split: [N, ...] in float64, on the CPU; and which could be read, bool [N].

    `of_batch(imgs [B, 3, S, S], labels [B])` gives [B, ...], in evaluation mode, without gradients, in plain float32.
    Every rank must call it, and gets all rows, in the order of the split: what is made of them has the same bytes for
    any number of ranks. Rows of images that could not be read are 0.
    """
    found = {}
    with evaluated(job, network):
        for imgs, labels, places in batches(job, network, name, batch_size):
            values = of_batch(imgs, labels).double().cpu()
            found |= {place: row for place, row, label in zip(places, values, labels, strict=True) if label >= 0}
    found = gathered(found)
    read = torch.zeros(len(job.splits[name].images), dtype=torch.bool)
    read[list(found)] = True
    check_read(job, name, read)
    values = torch.zeros(len(read), *next(iter(found.values())).shape, dtype=torch.float64)
    values[read] = torch.stack(list(found.values()))
    return values, read


def gathered(parts: dict[int, Tensor]) -> dict[int, Tensor]:
    """What all ranks have of numbered things, such as batches, by their numbers. Every rank must call it."""
    mine = {number: part.numpy() for number, part in parts.items()}  # of a view, tensors would send the whole storage
    dist.barrier()  # hosts notice a lost rank
    every = sorted((pair for of_rank in dist.gather(mine) for pair in of_rank.items()), key=lambda pair: pair[0])
    return {number: torch.from_numpy(part) for number, part in every}


@contextlib.contextmanager
def evaluated(job: Job, network: Network) -> Iterator[nn.Module]:
    """The network on the device, in evaluation mode, without gradients, in float32: no autocast, no TF32."""
    core = network.core.to(job.device)
    try:
        with exact(core):
            yield core
    finally:
        core.to('cpu')


# --------------------------------------------------------------------------
# what it costs


def flops(network: Network) -> float:
    """Of one image's forward: matrix products, convolutions and attention; a multiply-add is 2."""
    side = network.args.input_size
    counter = FlopCounterMode(display=False)
    with evaluating(network.core), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        network.core(torch.zeros(1, 3, side, side))
    return counter.get_total_flops()


def tell_cost(network: Network, images: int, forwards: int = 1) -> None:
    """A line before a study starts: the forwards that each image takes, and their FLOPs."""
    each = flops(network)
    info(
        f'{network.name}: {counted(images, "image")} x {counted(forwards, "forward")} of {each / 1e9:.3g} GFLOPs, '
        f'{images * forwards * each / 1e12:.3g} TFLOPs in all'
    )


def progress(things: Iterable, count: int, name: str) -> Iterator:
    """The things, while a line now and then tells how many are done, and how long the others take."""
    began = told = time.perf_counter()
    for number, thing in enumerate(things):
        yield thing
        now = time.perf_counter()
        if now - told > TOLD_EVERY:
            left = (now - began) / (number + 1) * (count - number - 1)
            info(f'{name}: {number + 1} of {count} done on this rank, {clock(left)} left')
            told = now


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Raise UserError for what is no folder, and StorageError for what cannot be written to one."""
    try:
        yield
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f'--output_dir {folder}: a file is in its place') from error
    except OSError as error:
        raise StorageError(f'cannot write to {folder}: {error.strerror or error}') from error
