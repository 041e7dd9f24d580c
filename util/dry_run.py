"""`--dry_run`: what a run would need, from some steps of its own on this device. Nothing is written.

The mains call `report` where the first epoch would begin. What is measured is the run's own: its loader, the engine's
forward, its optimiser. The weights are thrown away. A network that is too slow for whole batches here is measured with
fewer images, and its times are scaled; the report says so.
"""

import argparse
import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from util import dist, resources
from util.data import datasets
from util.data.images import Reader, reason
from util.data.objects import CocoSplit, check_size
from util.data.segmentation import PairFiles, PairSplit, reduces
from util.errors import RunError, UserError, printable
from util.log import counted, info
from util.resources import size
from util.run import Run
from util.training import Training

WARM_UP, STEPS, FEWEST = 2, 12, 3  # steps that do not count, and the most and fewest in all
STEPS_S, STEP_S, LOADER_S = 30, 4, 3  # seconds that all steps, one step, and the loader alone may take, about
SMALL, LARGEST = 4, 4096  # images that a step is measured with at least, and a GPU is tried with at most
RANKS = (1, 8, 16, 64)  # of the table
READ = 64  # images that a loader process checks in one go

Batch = list[Tensor]  # uint8 [N, 3, H, W] first
Forward = Callable[[Batch, int, int], tuple[Tensor, dict]]  # the engine's: of a batch, a global step, a micro-step


# --------------------------------------------------------------------------
# data


class Forgiving(Reader):
    """A reader that lists no bad image."""

    def skip(self, path: str, why: str, images: int) -> None:
        pass


class Faults(datasets.ImageFiles):
    """Item (epoch, index) is why an image cannot be read, or ''."""

    def read(self, index: int) -> None:
        self.image(index)

    def __getitem__(self, item: tuple[int, ...]) -> str:
        try:
            self.read(item[1])
        except UserError as error:
            return str(error)
        except RunError:
            raise
        except Exception as error:  # Pillow raises of every kind
            if resources.starved(error):
                raise
            return reason(error)
        return ''


class PairFaults(Faults, PairFiles):
    """Item (epoch, index) is what is wrong with an image or its annotation, or ''."""

    def read(self, index: int) -> None:
        self.pair(index)


class SizeFaults(Faults):
    """Item (epoch, index) is why an image cannot be read, or that it has not the size that COCO's JSON gives it."""

    def __init__(self, split: CocoSplit, seed: int, reader: Reader):
        super().__init__(split.images, None, None, seed, reader)
        self.split = split

    def read(self, index: int) -> None:
        check_size(self.split, index, self.image(index).size[::-1])


def check_images(run: Run, name: str, split: datasets.Split | PairSplit | CocoSplit) -> None:
    """Read every image of a split, each on one rank, and name those that cannot be read, or whose labels are wrong."""
    args, reader, images = run.args, run.images.reader, len(split.images)
    info(f'{name}: reading {images:,} images')
    if isinstance(split, PairSplit):
        faults = PairFaults(split, reduces(args), args.seed, reader)
    elif isinstance(split, CocoSplit):
        faults = SizeFaults(split, args.seed, reader)
    else:
        faults = Faults(split.images, None, None, args.seed, reader)
    batches = datasets.eval_batches(images, READ, dist.rank(), dist.world_size())
    loader = datasets.loader(faults, batches, args.num_workers, False, args.dist_timeout)
    found = [
        (faults.name(index), why)
        for items, reasons in zip(batches, loader, strict=True)
        for (_, index), why in zip(items, reasons, strict=True)
        if why
    ]
    bad = sorted(fault for of_rank in dist.gather(found) for fault in of_rank)
    pairs, then = not isinstance(split, datasets.Split), ''
    if bad and not reader.listing:
        them = 'those that cannot be read' if pairs else 'them'
        then = f': the first one will end the run; --bad_images skip skips {them}'
    elif len(bad) > reader.most(images):
        then = f': more than the {reader.most(images)} that --max_bad_images allows'
    what = 'images, or their annotations, are wrong' if pairs else 'images cannot be read'
    info(f'{name}: {len(bad):,} of {images:,} {what}{then}')
    for path, why in bad:
        info(f'  {printable(path)}: {why}')


def loader_speed(batches: datasets.Loader) -> tuple[float, Batch]:
    """Images a second of this rank's loader alone, and a batch of it."""
    began, first, images = time.perf_counter(), 0, 0
    for batch in batches:
        if not images and batches.num_workers:
            began, first = time.perf_counter(), len(batch[0])  # only now its processes have started
        images += len(batch[0])
        if time.perf_counter() - began > LOADER_S:
            break
    return max(images - first, 1) / (time.perf_counter() - began), batch


def endless(batches: datasets.Loader) -> Iterator[Batch]:
    while True:
        yield from batches


def of_size(batch: Batch, n: int) -> Batch:
    """The first n images of a batch, or more than it has, repeated."""
    return [
        [part[i % len(part)] for i in range(n)]
        if isinstance(part, list)
        else part[:n]
        if n <= len(part)
        else part[torch.arange(n) % len(part)]
        for part in batch
    ]


# --------------------------------------------------------------------------
# one image's share


class Costs(NamedTuple):
    """Of the network, for an image. FLOPs of matrix products, convolutions and attention: a multiply-add is 2."""

    forward: float
    step: float  # forward and backward
    kept: float  # bytes, from the forward to the backward


@contextlib.contextmanager
def alone(training: Training) -> Iterator[None]:
    """The bare network in place of the compiled and distributed one; without gradients afterwards."""
    model, training.model = training.model, training.core
    eager = torch.compiler.set_stance('force_eager') if training.args.compile else contextlib.nullcontext()
    try:
        with eager:  # a part of it may be compiled
            yield
    finally:
        training.model = model
        training.optimizer.inner.zero_grad(set_to_none=True)


def measured_costs(training: Training, forward: Forward, batch: Batch) -> Costs:
    """By a few images of the batch, on this rank alone."""
    n = min(2, len(batch[0]))
    few, more = of_size(batch, n), of_size(batch, 2 * n)
    with alone(training):
        ahead, whole = counted_flops(lambda: forward(few, 0, 0)[0])
        kept = (kept_bytes(training, forward, more) - kept_bytes(training, forward, few)) / n
        training.optimizer.backward(forward(few, 0, 0)[0])
        training.optimizer.step()  # makes the moments
    return Costs(ahead / n, whole / n, kept)


def counted_flops(loss_of: Callable[[], Tensor]) -> tuple[int, int]:
    """Those of a forward, and with the backward. The plain attention is counted: not all kernels that fuse it are."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        loss = loss_of()
        ahead = counter.get_total_flops()
        loss.backward()
    return ahead, counter.get_total_flops()


def kept_bytes(training: Training, forward: Forward, batch: Batch) -> int:
    """The storage, other than weights, that a forward keeps for its backward."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor.detach()  # the tensor itself could hold itself alive

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        _graph = forward(batch, 0, 0)  # it holds what is counted
    own = {tensor.untyped_storage().data_ptr() for tensor in (*training.core.parameters(), *training.core.buffers())}
    return sum(nbytes for pointer, nbytes in kept.items() if pointer not in own)


def clock(device: torch.device) -> float:
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    return time.perf_counter()


# --------------------------------------------------------------------------
# memory


def free_on_gpu() -> int:
    """The bytes of GPU memory that this process has or can get."""
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()


def gpu_peak(training: Training, forward: Forward, batch: Batch, n: int) -> int:
    """The most bytes of GPU memory while n images go forward and backward."""
    with alone(training):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        forward(of_size(batch, n), 0, 0)[0].backward()
        return torch.cuda.max_memory_allocated()


def measured_batch(training: Training, forward: Forward, batch: Batch, costs: Costs, fits: float) -> int:
    """How many images of a micro-step to measure with: all, or as many as time and memory allow."""
    whole, n = len(batch[0]), min(SMALL, len(batch[0]))
    if training.device.type == 'cpu':
        room = resources.memory_limit()[0] / dist.local_ranks() - resources.peak_memory()
        fits = room / (2 * max(costs.kept, 1))  # the backward has its own needs
    while n < whole and min(2 * n, whole) <= fits:
        began = clock(training.device)
        with alone(training):
            forward(of_size(batch, n), 0, 0)[0].backward()
        if 2 * (clock(training.device) - began) * min(2, training.sampler.accum_iter) > STEP_S:
            break
        n = min(2 * n, whole)
    return -dist.largest(-n)


def largest_batch(peak: Callable[[int], float], room: float, batch: int) -> int:
    """How many images fit into `room`: by a line through two trials, and tried. 0: not even the fewest.

    `peak(n)` is the memory that n images take; it raises torch.OutOfMemoryError where they do not fit.
    """
    unit = 2 if batch % 2 == 0 else 1  # mixup pairs images
    fits = 0
    while batch and not fits:
        with contextlib.suppress(torch.OutOfMemoryError):
            most, fits = peak(batch), batch
        batch = batch // 2 // unit * unit
    if not batch:
        return fits
    slope = (most - peak(batch)) / (fits - batch)
    guess = min(fits + int((room - most) / max(slope, 1)), max(fits, LARGEST)) // unit * unit
    while guess > fits:
        try:
            peak(guess)
            return guess
        except torch.OutOfMemoryError:
            guess = int(0.95 * guess) // unit * unit
    return fits


# --------------------------------------------------------------------------
# time


class Times(NamedTuple):
    """Seconds, medians of some steps: of a micro-step, with its wait for data; and of what ends a step."""

    wait: float
    early: float  # forward and backward
    last: float  # the same of a step's last micro-step, in which ranks sum their gradients
    update: float

    def scaled(self, factor: float, waits: bool) -> 'Times':
        """Of so many times the images; without waits where loader processes had more time than they will have."""
        return Times(self.wait if waits else 0.0, self.early * factor, self.last * factor, self.update)


def timed_steps(training: Training, forward: Forward, data: Iterator[Batch], n: int) -> Times:
    """Some steps with n images of each batch; of a step's micro-steps two stand for all."""
    accum_iter, device, rows = training.sampler.accum_iter, training.device, []
    micro_steps = min(2, accum_iter)
    for number in range(STEPS):
        waits, works = [], []
        for micro in range(micro_steps):
            asked = clock(device)
            batch = of_size(next(data), n)
            got = clock(device)
            with dist.no_sync(training.model, last=micro + 1 == micro_steps):
                loss, _ = forward(batch, number, micro)
                training.optimizer.backward(loss / accum_iter)
            waits.append(got - asked)
            works.append(clock(device) - got)
        ended = clock(device)
        training.optimizer.step()
        if training.ema:
            training.ema.update(training.core, number, training.optimizer.skipped)
        rows.append((statistics.mean(waits), works[0], works[-1], clock(device) - ended))
        if number == 0:
            began = clock(device)  # the first step may compile
        if dist.largest(int(len(rows) >= FEWEST and clock(device) - began > STEPS_S)):
            break
    return Times(*map(statistics.median, zip(*rows[min(WARM_UP, len(rows) - FEWEST + 1) :], strict=True)))


class Estimate(NamedTuple):
    """A run's time, from that of `batch` images in a micro-step, on any number of ranks: as if each were as fast."""

    batch: int
    accum_iter: int
    ranks: int
    times: Times
    loader: float  # images a second of a rank's loader alone
    steps: int  # that are left
    tests: int  # images to evaluate in them, in all
    test_s: float  # for each

    def split(self, ranks: int) -> tuple[int, int] | None:
        """Images of a micro-step, and micro-steps, that keep the images of a step; None where they cannot be split."""
        share, rest = divmod(self.batch * self.accum_iter * self.ranks, ranks)
        batch = min(self.batch, share)
        return None if rest or not batch or share % batch else (batch, share // batch)

    def compute_s(self, batch: int, accum_iter: int) -> float:
        """A step without its waits."""
        times = self.times
        return ((accum_iter - 1) * times.early + times.last) * batch / self.batch + times.update

    def step_s(self, batch: int, accum_iter: int) -> float:
        """A step, whose images the loader must have made."""
        images = batch * accum_iter
        waits = self.times.wait * images / self.batch
        return max(self.compute_s(batch, accum_iter) + waits, images / self.loader)

    def hours(self, ranks: int) -> float | None:
        if not (split := self.split(ranks)):
            return None
        return (self.steps * self.step_s(*split) + self.tests * self.test_s / ranks) / 3600


# --------------------------------------------------------------------------
# what it says


def report(
    run: Run,
    batches: datasets.Loader,
    forward: Forward,
    pixels: float | None = None,
    **data: datasets.Split | PairSplit | CocoSplit,
) -> Estimate:
    """Try the run and say what it would need. `data` are its splits by name; every rank must call it.

    `pixels`, of an image that is evaluated, are what the network sees of it; default: a square of --eval_size.
    """
    args, training = run.args, run.training
    if args.check_data:
        for name, split in data.items():
            check_images(run, name, split)
    if args.check_data or args.bad_images == 'skip':
        run.images.reader = Forgiving(*run.images.reader)
    training.sampler.start(run.first_epoch)
    training.train_mode()
    training.set_lr(run.first_epoch)
    speed, batch = loader_speed(batches)
    costs = measured_costs(training, forward, batch)
    tell_network(training, costs)
    fits = 0
    if training.device.type == 'cuda':
        fits = largest_batch(partial(gpu_peak, training, forward, batch), free_on_gpu(), args.batch_size)
        torch.cuda.reset_peak_memory_stats()
    n = measured_batch(training, forward, batch, costs, fits)
    times = timed_steps(training, forward, endless(batches), n)
    tell_memory(training, costs, n, fits)
    estimate = Estimate(
        batch=args.batch_size,
        accum_iter=training.sampler.accum_iter,
        ranks=dist.world_size(),
        times=times.scaled(args.batch_size / n, waits=n == args.batch_size or not args.num_workers),
        loader=min(dist.gather(speed)),
        steps=(args.epochs - run.first_epoch) * training.sampler.steps - run.first_step,
        tests=evaluations(args, run.first_epoch) * (len(data['val'].images) if 'val' in data else 0),
        test_s=times.last / n * test_share(training, costs, pixels),
    )
    tell_speed(training, estimate, costs, n)
    tell_data(args, training, estimate)
    tell_hours(training, estimate)
    dist.cleanup()
    return estimate


def evaluations(args: argparse.Namespace, first_epoch: int) -> int:
    """How many are left: one every --test_freq epochs, where there is such a flag, and one after the last."""
    every = getattr(args, 'test_freq', 1)
    return math.ceil(args.epochs / every) - first_epoch // every


def test_share(training: Training, costs: Costs, pixels: float | None) -> float:
    """What evaluating an image takes of what training with it takes, by their FLOPs."""
    args, networks = training.args, 2 if training.ema else 1
    pixels = pixels or (getattr(args, 'eval_size', None) or args.input_size) ** 2
    return networks * pixels / args.input_size**2 * costs.forward / costs.step


def tell_network(training: Training, costs: Costs) -> None:
    params = list(training.core.parameters())
    trained = sum(param.numel() for param in params if param.requires_grad)
    info(
        f'network: {sum(param.numel() for param in params):,} parameters, {trained:,} of them trained; an image takes '
        f'{giga(costs.forward)}FLOPs forward and {giga(costs.step)}FLOPs with the backward, or '
        f'{giga(costs.forward / 2)}MACs and {giga(costs.step / 2)}MACs (matrix products, convolutions and attention; '
        f'nothing else is counted)'
    )


def giga(number: float) -> str:
    return f'{figure(number / 1e9)} G'


def figure(number: float) -> str:
    """Three digits, or all before the point: '0.461', '45.3', '12,345'."""
    return f'{number:.3g}' if abs(number) < 999.5 else f'{number:,.0f}'


def tell_memory(training: Training, costs: Costs, n: int, fits: int) -> None:
    """What a rank has in memory: by arithmetic, by what was measured with n images, and how many images fit."""
    batch, core = training.args.batch_size, training.core
    trained = sum(param.nbytes for param in core.parameters() if param.requires_grad)
    parts = {'weights': sum(tensor.nbytes for tensor in core.state_dict().values())}
    parts |= {'gradients': trained, 'moments': training.optimizer.moments * trained}
    if training.ema:
        parts['average'] = sum(tensor.nbytes for tensor in training.ema.module.state_dict().values())
    listed = ', '.join(f'{name} {size(nbytes)}' for name, nbytes in parts.items())
    info(f'memory of a rank: {listed}; from forward to backward {size(costs.kept)} of an image')
    if training.device.type == 'cuda':
        most = f'{fits:,}' + ' or more' * (fits >= LARGEST)
        told = 'tried, without --compile' if training.args.compile else 'tried'
        peak, where = torch.cuda.max_memory_allocated(), f'the {size(free_on_gpu())} of GPU memory'
    else:
        room, whose = resources.memory_limit()
        shared = f' for {dist.local_ranks()} ranks' if dist.local_ranks() > 1 else ''
        peak, where, told = resources.peak_memory(), f'the {size(room)} that {whose}{shared}', 'by arithmetic'
        fits = n + int((room / dist.local_ranks() - peak) / max(costs.kept, 1))
        most = f'at most {fits:,}'
    scaled = f', by arithmetic {size(peak + (batch - n) * costs.kept)} with {batch}' if n < batch else ''
    info(f'memory in a step: up to {size(peak)} with {counted(n, "image")}{scaled}')
    if training.device.type == 'cpu' and costs.step < 2 * costs.forward:
        return  # most of it is frozen: what the forward keeps says nothing
    warning = f'WARNING: --batch_size {batch} is too large; ' if fits < batch else ''
    info(f'{warning}largest batch in {where}: {most} images ({told})')


def tell_speed(training: Training, estimate: Estimate, costs: Costs, n: int) -> None:
    """A step's seconds, and what they are spent on."""
    batch, accum_iter = estimate.batch, estimate.accum_iter
    images, seconds = batch * accum_iter, estimate.step_s(batch, accum_iter)
    compute = estimate.compute_s(batch, accum_iter)
    measured = f'; measured with {counted(n, "image")} at a time, scaled to {batch}' if n < batch else ''
    speed = images / seconds
    info(
        f'speed: {figure(seconds)} s a step of {images * estimate.ranks} images, {100 * (1 - compute / seconds):.0f} % '
        f'of it waiting for data; {figure(speed * estimate.ranks)} images/s, '
        f'{figure(speed * costs.step / 1e12)} TFLOP/s a rank{measured}'
    )


def tell_data(args: argparse.Namespace, training: Training, estimate: Estimate) -> None:
    """What the loader makes, what the network takes, and so how many processes a machine needs to feed its ranks."""
    takes = estimate.batch * estimate.accum_iter / estimate.compute_s(estimate.batch, estimate.accum_iter)
    processes, here = max(1, args.num_workers), dist.local_ranks()
    needed = math.ceil(processes * takes / estimate.loader)
    info(
        f'data: the loader of a rank alone makes {figure(estimate.loader)} images/s with --num_workers '
        f'{args.num_workers}, and the network takes {figure(takes)}: --num_workers {needed} would feed it, with '
        f'{counted(needed * here, "core")} for the {counted(here, "rank")} of this machine'
    )


def tell_hours(training: Training, estimate: Estimate) -> None:
    """The run's hours on this many ranks and on others."""
    gpu = 'GPU' if training.device.type == 'cuda' else 'process'
    tests = f', and {estimate.tests:,} evaluated images' if estimate.tests else ''
    info(f'the whole run: {counted(estimate.steps, "step")}{tests}; on more ranks if each is as fast as here')
    for ranks in sorted({*RANKS, estimate.ranks}):
        if split := estimate.split(ranks):
            hours, here = estimate.hours(ranks), ', here' * (ranks == estimate.ranks)
            info(
                f'  ranks {ranks}{here}: batch {split[0]} x accum {split[1]}, {figure(estimate.step_s(*split))} s a '
                f'step, {figure(hours)} hours, {figure(hours * ranks)} {gpu}-hours'
            )
