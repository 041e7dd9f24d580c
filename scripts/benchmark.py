"""Measure this code beside a plain loop, in turn in one process; and renew the tables of docs/performance.md.

Examples:
    python scripts/benchmark.py step --model mixmae_base simmim_swin_base,input_size=192 --batch_size 128 --compile
    python scripts/benchmark.py data --data_path /data/imagenet --workers 0 1 16
    python scripts/benchmark.py train --model mixmae_base --data_path /data/imagenet --batch_size 128
    python scripts/benchmark.py targets; python scripts/benchmark.py checkpoint --model mirl_vit_base
    python scripts/benchmark.py report --from_json docs/performance/*.json
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from util import start  # noqa: F401

# isort: split
import argparse
import contextlib
import ctypes
import gc
import itertools
import json
import math
import os
import platform
import random
import re
import resource
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any, NamedTuple
from unittest import mock

import PIL
import timm
import torch
import torch.nn.functional as F
import torchvision
from timm.data import create_transform
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import DeviceType
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms
from torchvision.datasets.folder import default_loader

import main_finetune
import main_pretrain
from engine_pretrain import train_one_epoch
from util import build, checkpoint, config, digests, dist, optim, resources, rng, training
from util.data import augment, datasets, decoders, named
from util.data.images import Reader
from util.dry_run import figure
from util.errors import UserError, printable, run_main
from util.log import MetricLogger, counted, info
from util.nn.hog import hog
from util.nn.spectrum import focal_frequency_loss
from util.training import Epoch, Training
from util.weights import read_checkpoint

PAGE = Path(__file__).resolve().parent.parent / 'docs' / 'performance.md'
Row = dict[str, Any]  # of a table
Batches = Iterable[list[Tensor]]
FEWEST = 5  # rounds from which on a ratio is told
PROFILED = 3  # steps whose kernels are counted, after they were timed without a profiler
TAKEN = (
    'data_path',
    'device',
    'amp_dtype',
    'channels_last',
    'grad_checkpoint',
    'compile',
    'compile_mode',
    'batch_size',
    'num_workers',
)
PLACES = {'what', 'model', 'output', 'from_json', 'data_path'}  # what a result is not of
STATUS, CLEAR = Path('/proc/self/status'), Path('/proc/self/clear_refs')  # Linux
MODELS = {  # of the page: millions of parameters, and GFLOPs of forward and backward of an image; tests count them anew
    'mirl_vit_base_depth48': (396.4, 170.5),
    'mirl_vit_small_depth54': (113.1, 49.9),
    'localmim_vit_base': (89.9, 31.2),
    'localmim_vit_large': (307.7, 97.0),
    'localmim_swin_base': (87.8, 24.0),
    'mixmae_base': (114.2, 113.5),
    'a2mim_vit_base': (86.5, 105.8),
    'a2mim_resnet50': (29.8, 26.1),
    'simmim_swin_base,input_size=192': (89.9, 68.3),
}
ANY_MODEL = 'mirl_vit_base'  # where a model is asked for and does not matter
H200_TFLOPS = 790  # bf16, what a large matrix product reaches on an H200


def get_args_parser() -> config.Parser:
    parser = config.Parser(__doc__, other='main_pretrain', usage='%(prog)s WHAT [--FLAG VALUE ...]')
    told = '; '.join(f'{name}: {what.help}' for name, what in WHATS.items()) + '; report: renew docs/performance.md'
    parser.add_argument('what', choices=[*WHATS, 'report'], metavar='WHAT', help=told)
    parser.take(main_pretrain.get_args_parser(), *TAKEN)
    add = partial(parser.add_argument, heading='Benchmark')
    add(
        '--model',
        nargs='+',
        default=[],
        metavar='NAME[,FLAG=VALUE ...]',
        help='of step, train and checkpoint; behind commas, any flag of main_pretrain.py for this one: input_size=192, '
        'config=RECIPE',
    )
    add(
        '--rounds',
        type=config.AT_LEAST_1,
        default=FEWEST,
        help=f'of all arms, in random order; below {FEWEST} no ratio',
    )
    add('--steps', type=config.AT_LEAST_1, help='of an arm in a round; default: 20 on a GPU, 1 on a CPU')
    add('--kernels', type=config.AT_LEAST_0, default=0, help='of step on a GPU: print so many that take the most time')
    add('--images', type=config.AT_LEAST_1, default=64, help='of data: how many an arm reads in a round')
    add('--decoders', nargs='+', help='of data; default: all that are installed')
    add('--workers', nargs='+', type=config.AT_LEAST_0, default=[0], help='of data: loader processes to try; 0: none')
    add('--feed', type=config.ABOVE_0, help='of data: images/s that a step takes; says how many cores would feed it')
    add('--peak_tflops', type=config.ABOVE_0, help='of a datasheet; MFU is told by the measured peak all the same')
    add(
        '--output', type=config.path, metavar='JSON', help='add the results to this file; what is in it is not repeated'
    )
    add('--from_json', nargs='+', type=config.path, default=[], help='of report: the results to show')
    return parser


# --------------------------------------------------------------------------
# measuring


def timed(device: torch.device, work: Callable[[], Any]) -> float:
    """Seconds that `work` takes: on a GPU between two events, on a CPU of the processor's time."""
    if device.type == 'cpu':
        began = time.process_time()
        work()
        return time.process_time() - began
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    first.record()
    work()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1000


def interleaved(arms: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each arm measures in each round; in random order. An arm that needs too much memory ends."""
    measured: dict[str, list[float]] = {name: [] for name in arms}
    order = random.Random(0)  # a step seeds the global one
    for number in range(rounds):
        for name in order.sample(sorted(measured), len(measured)):
            value = unless_out_of_memory(arms[name])
            measured[name].append(value) if value is not None else measured.pop(name)
        told = ', '.join(f'{name} {figure(values[-1])}' for name, values in measured.items())
        info(f'round {number + 1} of {rounds}: {told} s')
    return measured


def unless_out_of_memory(work: Callable[[], Any]) -> Any:
    """What `work` returns; None where memory is not enough for it."""
    try:
        return work()
    except (RuntimeError, MemoryError) as error:
        if not resources.kind(error).endswith('memory'):
            raise
        info(f'out of memory: {printable(str(error))[:120]}')
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def ratio(slow: list[float] | None, fast: list[float] | None) -> list[float] | None:
    """How many times as long the first took: median, least and most of the rounds."""
    if not slow or not fast or len(slow) < FEWEST:
        return None
    ratios = sorted(a / b for a, b in zip(slow, fast, strict=True))
    return [statistics.median(ratios), ratios[0], ratios[-1]]


def memory(device: torch.device, peak: bool = False) -> int:
    """Bytes that this process has on the device, or the most since `reset_peak`; 0 where that is not known."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device) if peak else torch.cuda.memory_allocated(device)
    found = STATUS.exists() and re.search(r'VmHWM:\s+(\d+)' if peak else r'VmRSS:\s+(\d+)', STATUS.read_text())
    return int(found[1]) * 1024 if found else 0


def reset_peak(device: torch.device) -> int:
    """Forget the peak; returns the bytes that are in use now."""
    gc.collect()
    if device.type == 'cuda':
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError, AttributeError):  # no glibc
        ctypes.CDLL(None).malloc_trim(0)  # what was freed would be used again and not seen as new
        CLEAR.write_text('5')
    return memory(device)


@cache
def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product: the best of ten."""
    side = 8192 if device.type == 'cuda' else 1024
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / min(timed(device, lambda: a @ b) for _ in range(10))


class Costs(NamedTuple):
    """Of a model: its parameters, and FLOPs of an image (a multiply-add is 2) as in `util.dry_run.Costs`."""

    params: int
    step: float  # forward and backward


def costs(args: argparse.Namespace) -> Costs:
    """By shapes alone: nothing is computed, and no weight is made."""
    with torch.device('meta'):
        model = main_pretrain.create_model(args).train()
    plan = model.plan_from_noise(rng.picture_noise(model, args.seed, n := 2))
    # the plain attention is counted: kernels that fuse it are not known to the counter everywhere
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        FlopCounterMode(display=False) as counter,
        sdpa_kernel(SDPBackend.MATH),
    ):
        state = {
            name: torch.empty(tensor.shape, dtype=tensor.dtype, requires_grad=tensor.requires_grad)
            for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers())
        }
        loss, _ = functional_call(model, state, (torch.empty(n, 3, args.input_size, args.input_size), plan))
        loss.backward()
    return Costs(sum(p.numel() for p in model.parameters()), counter.get_total_flops() / n)


def kernels(work: Callable[[], Any], device: torch.device) -> dict[str, tuple[float, int]]:
    """What runs on the GPU in `work`, copies included: {name: (seconds, launches)}."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize(device)
    found: dict[str, tuple[float, int]] = {}
    for event in profiler.events():
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            seconds, launches = found.get(event.name, (0.0, 0))
            found[event.name] = seconds + event.time_range.elapsed_us() / 1e6, launches + 1
    return found


# --------------------------------------------------------------------------
# the two arms of a step


class NoRun:
    """Stands for the run in the engine."""

    def after_step(self, epoch: Epoch, step: int, lr: float) -> None:
        pass


class Ours:
    """What the engine does, in a `Training` as `main_pretrain.py` makes it."""

    def __init__(self, args: argparse.Namespace, device: torch.device, images: int):
        self.device, self.dtype = device, training.amp_dtype(args, device)
        core = main_pretrain.create_model(args)
        rules = build.param_rules(main_pretrain.find_method(args.model), core, args.rule_kwargs)
        build.apply_options(core, args)
        core = build.on_device(core, args, device)
        optimizer = build.guarded_optimizer(core, rules, args, device)
        sampler = datasets.EpochBatches(images, args.batch_size, 1, 0, 1, args.seed)
        self.training = Training(args, core, build.in_parallel(core, args, device), optimizer, sampler, device)
        self.number, self.waited = itertools.count(), 0.0

    def run(self, batches: Batches, steps: int) -> float:
        """Train so many steps; returns the mean loss."""
        sampler = self.training.sampler
        meters = MetricLogger('', 0, steps, sampler.global_batch, steps + 1, self.device)
        stats = train_one_epoch(self.training, NoRun(), batches, Epoch(next(self.number), 0, steps, meters))
        self.waited = meters.waited
        return stats['loss']


def explicit_attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p=0.0, is_causal=False
):
    """Attention with the matrix of all pairs in memory, as it was before kernels fused it."""
    attention = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if attn_mask is not None:
        attention = attention + attn_mask
    return attention.softmax(dim=-1) @ v  # these networks have no dropout, and nothing is causal


class Plain:
    """A loop in the style of MAE's, around the same network.

    Float32 batches, explicit attention, fp16 with a scaler on a GPU, AdamW that is not fused, a norm of each gradient,
    and the loss read at every step. Nothing is compiled.
    """

    def __init__(self, args: argparse.Namespace, device: torch.device, images: int):
        self.args, self.device, self.number, self.waited = args, device, itertools.count(), 0.0
        self.model = main_pretrain.create_model(args)
        rules = build.param_rules(main_pretrain.find_method(args.model), self.model, args.rule_kwargs)
        self.model.to(device).train()
        self.schedule = optim.schedule(args, optim.scaled_lr(args, 1)[0])
        groups = optim.param_groups(self.model, rules, args.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, betas=args.betas, foreach=True)
        self.dtype = torch.float16 if device.type == 'cuda' else training.amp_dtype(args, device)
        if args.amp_dtype == 'none':
            self.dtype = None
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype is torch.float16)

    def run(self, batches: Batches, steps: int) -> float:
        epoch, data, total = next(self.number), iter(batches), 0.0
        self.waited = 0.0
        for step in range(steps):
            began = time.perf_counter()
            imgs, _ = next(data)
            self.waited += time.perf_counter() - began
            total += self.step(imgs, epoch * steps + step, epoch + step / steps)
        return total / steps

    def step(self, imgs: Tensor, number: int, epoch: float) -> float:
        args, params = self.args, [p for p in self.model.parameters() if p.requires_grad]
        for group in self.optimizer.param_groups:
            group['lr'] = self.schedule(epoch) * group['lr_scale']
        noise = rng.mask_noise(self.model, args.seed, number, 0, 0, len(imgs), 1)
        plan = self.model.plan_from_noise(noise)
        plan = type(plan)(*(tensor.to(self.device) for tensor in plan))
        imgs = imgs.to(self.device, non_blocking=True)
        with (
            torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None),
            mock.patch.object(F, 'scaled_dot_product_attention', explicit_attention),
        ):
            loss, _ = self.model(imgs, plan)
        value = loss.item()
        if not math.isfinite(value):
            raise UserError(f'the plain loop of {args.model}: its loss is {value}; --amp_dtype none is more robust')
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        if args.clip_grad:
            torch.nn.utils.clip_grad_norm_(params, args.clip_grad)
        else:
            torch.norm(torch.stack([torch.norm(p.grad.detach(), 2.0) for p in params if p.grad is not None]), 2.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.device.type == 'cuda':
            torch.cuda.synchronize(self.device)
        return value


ARMS = {'ours': Ours, 'plain': Plain}


def synthetic(args: argparse.Namespace, device: torch.device) -> dict[str, Batches]:
    """The same batch again and again, as the loader of each arm would hand it over."""
    imgs = torch.randint(0, 256, (args.batch_size, 3, args.input_size, args.input_size), dtype=torch.uint8)
    normalised = datasets.Normalisation.of(args.mean, args.std, torch.device('cpu'))(imgs)
    pairs = {'ours': imgs, 'plain': normalised}
    if device.type == 'cuda':
        pairs = {name: batch.pin_memory() for name, batch in pairs.items()}
    return {name: itertools.repeat([batch, torch.zeros(len(batch))]) for name, batch in pairs.items()}


def pretraining_args(args: argparse.Namespace, model: str) -> argparse.Namespace:
    """What `main_pretrain.py` would be given for `NAME[,FLAG=VALUE ...]`."""
    name, *options = model.split(',')
    words = ['--model', name, *config.as_words({key: getattr(args, key) for key in TAKEN if key in args.given})]
    for option in options:
        flag, equals, value = option.partition('=')
        if not equals:
            raise UserError(f'--model: behind a comma, FLAG=VALUE is expected, got {option!r}')
        words += [f'--{flag}', value]
    return main_pretrain.get_args_parser().parse(words, stage='pretrain')


def step(args: argparse.Namespace, device: torch.device, model: str) -> list[Row]:
    """Training steps of a model on a synthetic batch."""
    own = pretraining_args(args, model)
    torch.compiler.reset()  # what was compiled for the model before would count as a change of shapes
    cost, steps = costs(own), args.steps or (20 if device.type == 'cuda' else 1)
    data, arms, rows = synthetic(own, device), {}, {}
    for name in ARMS:
        rows[name] = {'model': model, 'batch': own.batch_size, 'arm': name}
        before = reset_peak(device)
        if warm := unless_out_of_memory(partial(warmed, name, own, device, data[name], steps)):
            arms[name], first = warm
            rows[name] |= first | {'peak memory': memory(device, peak=True) - before}
        else:
            rows[name]['images/s'] = 'out of memory'
    work = {name: partial(arm.run, data[name], steps) for name, arm in arms.items()}
    times = interleaved({name: partial(timed, device, work[name]) for name in arms}, args.rounds)
    peak = matmul_peak(device, training.amp_dtype(own, device) or torch.float32)
    for name, values in times.items():
        seconds = statistics.median(values) / steps
        speed = own.batch_size / seconds
        rows[name] |= {'images/s': speed, 'ms a step': 1000 * seconds, 'MFU': share(speed * cost.step / peak)}
        if args.peak_tflops:
            rows[name]['MFU of the datasheet'] = share(speed * cost.step / args.peak_tflops / 1e12)
        if device.type == 'cuda':
            ran = kernels(partial(arms[name].run, data[name], PROFILED), device)
            busy, launches = (sum(column) / PROFILED for column in zip(*ran.values(), strict=True))
            rows[name] |= {'GPU busy': share(busy / seconds), 'launches a step': round(launches)}
            for kernel, (took, count) in sorted(ran.items(), key=lambda item: -item[1][0])[: args.kernels]:
                each = f'{figure(1000 * took / PROFILED)} ms a step, {figure(count / PROFILED)} launches'
                info(f'{name}: {each}: {printable(kernel)[:150]}')
    if times.keys() == ARMS.keys():
        rows['ours']['plain / ours'] = ratio(times['plain'], times['ours'])
    return list(rows.values())


def warmed(name: str, own: argparse.Namespace, device: torch.device, data: Batches, steps: int) -> tuple[Any, Row]:
    """An arm that is warm, and what its first step told; with --compile, most of its time is compiling."""
    arm, began = ARMS[name](own, device, own.batch_size * steps), time.perf_counter()
    loss = arm.run(data, 1)
    first = time.perf_counter() - began
    info(f'{own.model}, {name}: the first step took {figure(first)} s, loss {loss:.6g}')
    if device.type == 'cuda':
        arm.run(data, 10)
    precision = str(arm.dtype or torch.float32).removeprefix('torch.') + ', compiled' * (own.compile and name == 'ours')
    return arm, {'precision': precision, 'first step, s': first, 'loss': loss}


# --------------------------------------------------------------------------
# data


class PlainImages(Dataset):
    """As torchvision's `ImageFolder` reads them: Pillow, then a transform to normalised float32."""

    def __init__(self, files: list[str], transform: Callable):
        self.files, self.transform = files, transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, item: tuple[int, int] | int) -> tuple[Tensor, int]:
        return self.transform(default_loader(self.files[item[1] if isinstance(item, tuple) else item])), 0


def plain_transforms(args: argparse.Namespace) -> dict[str, Callable]:
    """MAE's, of pretraining and of fine-tuning."""
    crop = transforms.RandomResizedCrop(
        args.input_size, args.crop_scale, interpolation=transforms.InterpolationMode.BICUBIC
    )
    end = [transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize(args.mean, args.std)]
    finetune = create_transform(
        args.input_size,
        is_training=True,
        color_jitter=None,
        auto_augment='rand-m9-mstd0.5-inc1',
        interpolation='bicubic',
        re_prob=0.25,
        mean=args.mean,
        std=args.std,
    )
    return {'pretrain': transforms.Compose([crop, *end]), 'finetune': finetune}


def our_images(args: argparse.Namespace, split: datasets.Split) -> dict[str, datasets.ImageFiles]:
    """The images of a run with these arguments, of pretraining and of fine-tuning."""
    words = ['--model', args.model, '--input_size', str(args.input_size), '--decoder', args.decoder]
    crop = (args.input_size, args.crop_scale, args.hflip, args.interpolation, args.decoder)
    transform = {
        'pretrain': augment.pretrain_transform(*crop),
        'finetune': augment.training_transform(main_finetune.get_args_parser().parse(words, stage='finetune')),
    }
    return {
        stage: datasets.ImageFiles(split.images, None, transform[stage], args.seed, Reader.of(args))
        for stage in transform
    }


def data(args: argparse.Namespace, device: torch.device) -> list[Row]:
    """Decoding and augmenting, by each decoder, beside MAE's path; without loader processes, or with some."""
    own = {
        name: pretraining_args(args, f'{ANY_MODEL},decoder={name}') for name in args.decoders or decoders.installed()
    }
    first = next(iter(own.values()))
    split = named.training_images(first)
    ours = {f'ours, {name}': our_images(args, split) for name, args in own.items()}
    count = min(args.images, len(split.images))
    exact = our_images(pretraining_args(args, f'{ANY_MODEL},decoder={decoders.PIL}'), split)['pretrain']
    files = [exact.name(i) for i in range(count)]
    rows = []
    for (stage, transform), workers in itertools.product(plain_transforms(first).items(), args.workers):
        info(f'{stage}, {workers} loader processes: {", ".join(ours)}, plain')
        arms = {name: images[stage] for name, images in ours.items()} | {'plain': PlainImages(files, transform)}
        walls: dict[str, list[float]] = {name: [] for name in arms}
        read = {name: partial(read_all, images, count, workers, first) for name, images in arms.items()}
        times = interleaved({name: partial(cpu_and_wall, read[name], walls[name]) for name in read}, args.rounds)
        for name, values in times.items():
            speed = count / statistics.median(values)
            row = {'transform': stage, 'workers': workers, 'path': name, 'CPU ms an image': 1000 / speed}
            row |= {'images/s a core': speed, 'images/s, wall': count / statistics.median(walls[name])}
            if name in ours:
                row['plain / ours'] = ratio(times['plain'], values)
            if args.feed:
                row[f'cores for {args.feed:g} images/s'] = math.ceil(args.feed / speed)
            if name in ours and stage == 'pretrain':
                row['difference to Pillow, of 255'] = difference(ours[name][stage], exact, count)
            rows.append(row)
    return rows


def difference(images: datasets.ImageFiles, others: datasets.ImageFiles, count: int) -> float:
    """Mean absolute difference of the pixels of the first images."""
    pairs = ((images[0, i][0].float(), others[0, i][0].float()) for i in range(count))
    return statistics.fmean((a - b).abs().mean().item() for a, b in pairs)


def read_all(images: Dataset, count: int, workers: int, own: argparse.Namespace) -> None:
    """Make so many samples, in this process or in batches by loader processes, which end afterwards."""
    items = [(0, i) for i in range(count)]
    if not workers:
        for item in items:
            images[item]
        return
    batches = [items[i : i + own.batch_size] for i in range(0, count, own.batch_size)]
    if isinstance(images, PlainImages):
        loader = DataLoader(images, batch_sampler=batches, num_workers=workers)
    else:
        loader = datasets.loader(images, batches, workers, False)
    for _ in loader:
        pass
    del loader
    gc.collect()  # joins its processes, whose time is known only then


def cpu_and_wall(work: Callable[[], None], walls: list[float]) -> float:
    """Seconds of processor time of this process and of those that ended in it; wall time is put to the list."""

    def processor() -> float:
        return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))

    began = time.perf_counter(), processor()
    work()
    walls.append(time.perf_counter() - began[0])
    return processor() - began[1]


# --------------------------------------------------------------------------
# targets


def plain_hog(imgs: Tensor, cells: tuple[int, ...], bins: int, biases: list[Tensor] | None = None) -> list[Tensor]:
    """`util.nn.hog.hog` in its published form: each scale and colour for itself, one dense histogram image each."""
    kernel = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]], device=imgs.device)
    kernels = torch.stack([kernel, kernel.T]).unsqueeze(1)
    targets = []
    for k, cell in enumerate(cells):
        colours = []
        for c in range(3):
            padded = F.pad(imgs[:, c : c + 1], (1, 1, 1, 1), mode='reflect')
            gradient = F.conv2d(padded, kernels, None if biases is None else biases[k])
            angle = torch.atan2(gradient[:, 0], gradient[:, 1])
            index = ((angle / math.pi * bins).floor() % bins).long().unsqueeze(1)
            dense = torch.zeros(len(imgs), bins, *imgs.shape[2:], device=imgs.device)
            dense.scatter_(1, index, gradient.norm(dim=1, keepdim=True))
            colours.append(F.normalize(F.avg_pool2d(dense, cell), dim=1))
        targets.append(torch.cat(colours, dim=1).flatten(2).transpose(1, 2))
    return targets


def two_transforms(pred: Tensor, imgs: Tensor) -> Tensor:
    """`focal_frequency_loss` as it is written down: two full spectra of the whole batch, then their means."""
    spectra = [torch.fft.fft2(x, norm='ortho') for x in (pred, imgs)]
    y, x = (torch.stack([s.real, s.imag], dim=-1).mean(dim=0, keepdim=True) for s in spectra)
    squares = ((y - x) ** 2).sum(dim=-1)
    weights = squares.sqrt().log1p()
    weights = (weights / weights.max()).nan_to_num(0.0).clamp(0.0, 1.0).detach()
    return (weights * squares).mean()


def smooth_images(n: int, side: int, device: torch.device) -> Tensor:
    """Random images without the equal neighbours whose gradient has no direction."""
    numbers = torch.Generator().manual_seed(0)
    coarse = torch.randn(n, 3, side // 8, side // 8, generator=numbers)
    fine = torch.randn(n, 3, side, side, generator=numbers)
    return (F.interpolate(coarse, side, mode='bicubic') + 0.1 * fine).to(device)


def targets(args: argparse.Namespace, device: torch.device) -> list[Row]:
    """What LocalMIM predicts and A2MIM's frequency loss, forward and backward, beside their published forms."""
    imgs, others = smooth_images(2 * args.batch_size, 224, device).chunk(2)
    pred = others.clone().requires_grad_()
    works = {
        'HOG': (lambda: hog(imgs, (4, 8, 16, 32), 9), lambda: plain_hog(imgs, (4, 8, 16, 32), 9)),
        'frequency loss': (
            lambda: backward(focal_frequency_loss(pred - imgs), pred),
            lambda: backward(two_transforms(pred, imgs), pred),
        ),
    }
    rows = []
    for name, pair in works.items():
        results = zip(*(work() for work in pair), strict=True)
        differs = max(((a - b).abs().mean() / b.abs().mean()).item() for a, b in results)
        times = interleaved({arm: partial(timed, device, w) for arm, w in zip(ARMS, pair, strict=True)}, args.rounds)
        row = {'target': name, 'batch': args.batch_size, 'relative difference': f'{differs:.0e}'}
        row |= {f'{arm}, ms an image': 1000 * statistics.median(values) / len(imgs) for arm, values in times.items()}
        rows.append(row | {'plain / ours': ratio(times['plain'], times['ours'])})
    return rows


def backward(loss: Tensor, pred: Tensor) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, pred)]


# --------------------------------------------------------------------------
# checkpoint


def checkpoints(args: argparse.Namespace, device: torch.device, model: str) -> list[Row]:
    """Saving and reading a checkpoint with its moments, beside `torch.save` and `torch.load`.

    Also the pause of training: a run that saves goes on when the state is copied, where there is memory for a copy.
    """
    own, cpu, rows = pretraining_args(args, model), torch.device('cpu'), []
    arm, writer = Ours(own, device, own.batch_size), checkpoint.Writer()
    arm.run(synthetic(own, device)['ours'], 1)  # makes the moments
    with tempfile.TemporaryDirectory(dir=args.output and args.output.parent) as folder:
        ours, plain = Path(folder, checkpoint.LAST), Path(folder, 'plain.pth')
        save, save_plain = partial(checkpoint.save, ours), partial(torch.save, f=plain)
        read_plain = partial(torch.load, plain, map_location='cpu', weights_only=True)
        works = {
            'save': (lambda: save(arm.training.state()), lambda: save_plain(arm.training.state())),
            'pause of training': (
                lambda: writer.start(save, arm.training.state(), arm.training.sizes()),
                lambda: save_plain(arm.training.state()),
            ),
            'read': (partial(read_checkpoint, ours), read_plain),
        }

        def lap(work: Callable[[], Any], walls: list[float]) -> float:
            seconds = cpu_and_wall(work, walls)
            writer.wait()
            return seconds

        for what, pair in works.items():
            peaks, walls = {}, {name: [] for name in ARMS}
            for name, work in zip(ARMS, pair, strict=True):  # it warms up, too
                before = reset_peak(cpu)
                lap(work, [])
                peaks[name] = memory(cpu, peak=True) - before
            arms = {name: partial(lap, w, walls[name]) for name, w in zip(ARMS, pair, strict=True)}
            times = interleaved(arms, args.rounds)
            row = {'model': model, 'bytes': ours.stat().st_size, 'what': what}
            for name, values in times.items():
                told = {'CPU s': statistics.median(values), 'wall s': statistics.median(walls[name])}
                row |= {f'{name}, {key}': value for key, value in (told | {'peak memory': peaks[name]}).items()}
            rows.append(row | {'plain / ours': ratio(times['plain'], times['ours'])})
    return rows


# --------------------------------------------------------------------------
# train


def train(args: argparse.Namespace, device: torch.device, model: str) -> list[Row]:
    """Loader and step together, each arm with its own loader; every round begins with the loader's first batch."""
    own = pretraining_args(args, model)
    split = named.training_images(own)
    arms = {name: make(own, device, len(split.images)) for name, make in ARMS.items()}
    sampler = arms['ours'].training.sampler
    if not sampler.steps:
        raise UserError(f'{len(split.images)} images in {own.data_path} are fewer than --batch_size {own.batch_size}')
    steps, images = min(args.steps or 20, sampler.steps), our_images(own, split)['pretrain']
    files = PlainImages([images.name(i) for i in range(len(images))], plain_transforms(own)['pretrain'])
    options = dict(num_workers=own.num_workers, pin_memory=device.type == 'cuda', drop_last=True)
    loaders = {
        'ours': build.loader(images, sampler, own, device),
        'plain': DataLoader(files, own.batch_size, sampler=RandomSampler(files), **options),
    }
    waiting: dict[str, list[float]] = {name: [] for name in ARMS}

    def lap(name: str) -> float:
        began = time.perf_counter()
        arms[name].run(loaders[name], steps)
        wall = time.perf_counter() - began
        waiting[name].append(arms[name].waited / wall)
        return wall

    interleaved({name: partial(lap, name) for name in ARMS}, 1)  # they warm up
    times = interleaved({name: partial(lap, name) for name in ARMS}, args.rounds)
    rows = []
    for name, values in times.items():
        row = {'model': model, 'batch': own.batch_size, 'workers': own.num_workers, 'steps': steps, 'arm': name}
        row['images/s, wall'] = steps * own.batch_size / statistics.median(values)
        rows.append(row | {'waiting for data': share(statistics.median(waiting[name][1:]))})
    rows[0]['plain / ours'] = ratio(times['plain'], times['ours'])
    return rows


# --------------------------------------------------------------------------
# results


def machine(device: torch.device) -> dict:
    """Where and with what it was measured."""
    cpu = (
        re.search(r'model name\s*: (.*)', Path('/proc/cpuinfo').read_text()) if Path('/proc/cpuinfo').exists() else None
    )
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else (cpu[1] if cpu else platform.processor())
    commit = 'not known'
    with contextlib.suppress(OSError, subprocess.SubprocessError):  # no git, or no repository
        git = ['git', 'rev-parse', '--short', 'HEAD']
        commit = subprocess.run(git, cwd=PAGE.parent, capture_output=True, text=True, check=True).stdout.strip()
    versions = {module.__name__: module.__version__ for module in (torch, torchvision, timm, PIL)}
    return {
        'device': name,
        'gpu': device.type == 'cuda',
        'cores': config.usable_cores(),
        'threads': torch.get_num_threads(),
        'load': round(os.getloadavg()[0], 1),
        'versions': versions | {'python': platform.python_version()},
        'git': commit,
        'date': time.strftime('%Y-%m-%d'),
    }


def share(number: float) -> str:
    return f'{100 * number:.0f} %'


def cell(name: str, value: Any) -> str:
    """A number as the tables show it; a ratio as its median, and its least and most."""
    if isinstance(value, list):
        return f'**{value[0]:.2f}** [{value[1]:.2f}-{value[2]:.2f}]'
    if name == 'bytes' or name.endswith('memory'):
        return resources.size(value) if value else '-'
    return '-' if value is None else figure(value) if isinstance(value, int | float) else value


def table(rows: list[Row]) -> str:
    """A table of Markdown, with all columns that any row has."""
    columns = list(dict.fromkeys(itertools.chain(*rows)))
    lines = [columns, ['---'] * len(columns), *([cell(name, row.get(name, '')) for name in columns] for row in rows)]
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def tables(records: list[dict]) -> str:
    """A table for each machine, below what it is."""
    of_machine: dict[str, list[Row]] = {}
    for record in records:
        load = {'rounds': record['rounds'], 'load': record['machine']['load']}
        of_machine.setdefault(where(record['machine']), []).extend(row | load for row in record['rows'])
    return '\n\n'.join(f'{line}:\n\n{table(rows)}' for line, rows in of_machine.items())


def where(machine: dict) -> str:
    """'AMD EPYC, 1 thread, torch 2.14, ..., 2026-11-25, commit 1a2b3c'"""
    threads = '' if machine['gpu'] else f', {counted(machine["threads"], "thread")} of {machine["cores"]} cores'
    versions = ', '.join(f'{name} {version}' for name, version in machine['versions'].items())
    return f'{machine["device"]}{threads}, {versions}, {machine["date"]}, commit {machine["git"]}'


class What(NamedTuple):
    help: str
    measure: Callable[..., list[Row]]
    of_model: bool


WHATS = {
    'step': What('training steps on a synthetic batch', step, True),
    'data': What('decoding and augmenting', data, False),
    'targets': What('HOG and the frequency loss', targets, False),
    'checkpoint': What('saving and reading', checkpoints, True),
    'train': What('loader and step', train, True),
}


# --------------------------------------------------------------------------
# page and program


def models_table(records: list[dict]) -> str:
    """What each model computes, what that allows on a GPU by arithmetic, and what was measured."""
    rates, steps = loader_rates(records), [record for record in records if record['what'] == 'step']
    rows = []
    for model, (params, gflops) in MODELS.items():
        most = H200_TFLOPS * 1000 / gflops
        row = {'model': f'`{model}`', 'parameters': f'{params} M', 'GFLOP a step and image': f'{gflops}'}
        row |= {'floor, us an image': 1e6 / most, 'most images/s': most, '8 GPUs at 40 %, images/s': 3.2 * most}
        row |= {f'cores for them: {path}': math.ceil(3.2 * most / rate) for path, rate in rates.items()}
        for kind in ('GPU', 'CPU'):
            found = [
                r
                for r in steps
                if r['model'].split(',')[0] == model.split(',')[0] and r['machine']['gpu'] == (kind == 'GPU')
            ]
            row[f'measured, {kind}'] = '; '.join(map(measured, found)) or 'not measured'
        rows.append(row)
    return table(rows)


def measured(record: dict) -> str:
    row = record['rows'][0]
    told = [cell(name, row.get(name, '')) + unit for name, unit in (('images/s', ' images/s'), ('MFU', ' MFU'))]
    if row.get('plain / ours'):
        told.append(f'{cell("", row["plain / ours"])} x plain')
    return f'{record["machine"]["device"]}, batch {row["batch"]}: {", ".join(told)}'


def loader_rates(records: list[dict]) -> dict[str, float]:
    """Images/s of a core by each path of pretraining, of the last result that has it."""
    rows = itertools.chain(*(record['rows'] for record in records if record['what'] == 'data'))
    return {
        row['path']: row['images/s a core'] for row in rows if (row['transform'], row['workers']) == ('pretrain', 0)
    }


def report(files: list[Path], page: Path = PAGE) -> None:
    """Renew the tables of the page, each between `<!-- its name -->` and `<!-- end -->`."""
    records = list(itertools.chain(*map(read_records, files)))
    text = page.read_text(encoding='utf-8')
    of_what = {name: [record for record in records if record['what'] == name] for name in WHATS}
    contents = {'models': models_table(records)} | {name: tables(found) for name, found in of_what.items()}
    for name, content in contents.items():
        before, begin, rest = text.partition(f'<!-- {name} -->\n')
        if begin:
            text = before + begin + (content or 'not measured') + '\n<!-- end -->' + rest.partition('<!-- end -->')[2]
    digests.replace(page, text.encode())
    info(f'renewed from {counted(len(records), "result")}: {page}')


def read_records(path: Path) -> list[dict]:
    try:
        records = json.loads(path.read_text(encoding='utf-8'))
        if all(record['what'] in WHATS for record in records):
            return records
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f'{path}: {getattr(error, "strerror", None) or "not a file of this program"}') from error
    raise UserError(f'{path}: not a file of this program')


@resources.program
def main(args: argparse.Namespace) -> None:
    if args.what == 'report':
        if not args.from_json:
            raise UserError('report needs --from_json FILE.json ...')
        return report(args.from_json)
    what = WHATS[args.what]
    if what.of_model and not args.model:
        raise UserError(f'{args.what} needs --model NAME ...; main_pretrain.py --model list shows them')
    device = dist.own_device(args.device)
    if device.type == 'cuda':
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    rng.settle_kernels(False)
    for model in args.model:
        pretraining_args(args, model)  # a mistake in the last one is told now
    records = read_records(args.output) if args.output and args.output.exists() else []
    given = {name: value for name, value in config.plain(args).items() if name in args.given and name not in PLACES}
    shown = []
    for model in args.model if what.of_model else ['']:
        now = machine(torch.device('cpu') if args.what == 'data' else device)  # no GPU decodes
        record = {'what': args.what, 'model': model, 'arguments': given, 'rounds': args.rounds, 'machine': now}
        if same := [found for found in records if is_of(found, record)]:
            info(f'{args.what} {model}: it is in {args.output} already')
            shown += same
            continue
        info(f'{args.what} {model}: {where(now)}, load {now["load"]}')
        shown.append(record | {'rows': what.measure(args, device, *[model] * what.of_model)})
        records.append(shown[-1])
        if args.output:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            digests.replace(args.output, json.dumps(records, indent=1).encode())
    info(tables(shown))


def is_of(found: dict, record: dict) -> bool:
    """Whether a result is that of the same measurement, on such a device."""
    same = all(found[key] == record[key] for key in ('what', 'model', 'arguments', 'rounds'))
    return same and found['machine']['device'] == record['machine']['device']


if __name__ == '__main__':
    run_main(lambda: main(get_args_parser().parse(stage='pretrain')))
