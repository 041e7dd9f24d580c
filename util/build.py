"""From arguments to the parts of a training: what the programs share, for whichever method."""

import argparse
import inspect
import itertools
import re
from collections.abc import Callable, Collection
from types import ModuleType
from typing import get_args, get_type_hints

import numpy as np
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.func import functional_call

from util import dist, optim, resources, training
from util.data import augment, datasets
from util.data.images import Reader
from util.data.stores import Store
from util.errors import UserError, closest
from util.log import counted
from util.nn.grad_checkpoint import checkpoint_blocks
from util.nn.models import fuse_attention
from util.nn.upernet import HEAD_OPTIONS, MAP_OPTIONS
from util.optim import OPTIMIZERS, GuardedOptimizer, Rules, param_groups
from util.recipes import of_recipe

KEYWORD = inspect.Parameter.KEYWORD_ONLY
COMPILE_MODES = {'default': 'default', 'max-autotune': 'max-autotune-no-cudagraphs'}  # torch's names of ours

# --------------------------------------------------------------------------
# networks


def construct(
    make: Callable[..., nn.Module], *args, model_kwargs: dict, name: str = '', flag: str = '--model_kwargs', **kwargs
) -> nn.Module:
    """Call a model function with the flags' values and --model_kwargs; what it refuses becomes a UserError.

    `name`, or the function's first argument, is what the user knows the network by; `flag` has its options.
    """
    name = name or (args[0] if args else make.__name__)
    if twice := sorted(kwargs.keys() & model_kwargs.keys()):
        raise UserError(f'{flag} {twice[0]}={model_kwargs[twice[0]]}: it has a flag of its own')
    try:
        return make(*args, **kwargs, **model_kwargs)
    except (ValueError, TypeError) as error:
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if not unknown:
            raise UserError(f'{name}: {error!s:.300}') from error
        raise UserError(f'{name} has no option {unknown[1]}{closest(unknown[1], options_of(make))}') from error
    except Exception as error:  # what networks raise that do not check their options
        if not model_kwargs:
            raise
        raise UserError(f'{name} cannot be made{options_and_reason(model_kwargs, error, flag)}') from error


def options_of(make: Callable[..., nn.Module]) -> set[str]:
    """The options of a model function, and of the classes that it may return, as far as they name them."""
    own = {option for option, parameter in inspect.signature(make).parameters.items() if parameter.kind == KEYWORD}
    result = get_type_hints(make).get('return', object)
    classes = {base for cls in get_args(result) or (result,) for base in cls.__mro__}
    return own.union(*(inspect.signature(cls.__init__).parameters for cls in classes))


def encoder_kwargs(method: ModuleType, name: str, model_kwargs: dict, stage: str) -> dict:
    """Of the options of a stage, pretrain, segment or detect, those that its encoder and the classifier have too."""
    heads = HEAD_OPTIONS if stage == 'segment' else ()  # `channels` of a ResNet that is no segmenter are its own
    others = {*heads, *MAP_OPTIONS, *options_of(getattr(method, name))} - options_of(method.create_classifier)
    others |= {'window_size'} if '_vit_' in name else set()  # a ViT has windows in a detector alone
    return {option: value for option, value in model_kwargs.items() if option not in others}


def options_and_reason(model_kwargs: dict, error: Exception, flag: str = '--model_kwargs') -> str:
    """' with --model_kwargs KEY=VALUE ...: why not'"""
    given = ' '.join(f'{key}={value}' for key, value in model_kwargs.items())
    options = f' with {flag} {given:.300}' if given else ''
    return f'{options}: {str(error) or type(error).__name__:.300}'


@torch.no_grad()
def check_forward(
    core: nn.Module, args: argparse.Namespace, size: int, extra: Callable[[int], tuple] = lambda n: ()
) -> None:
    """Try a forward in shapes alone, which computes no number. Raises UserError for what the model cannot do.

    One or two images of `size` pixels stand for the batch; `extra` gives what else the model takes with n of them.
    """
    two = getattr(args, 'batch_size', 2) > 1 or synchronises(core, args)  # BatchNorm needs two values
    n, fake = 2 if two else 1, FakeTensorMode(allow_non_fake_inputs=True)
    try:
        inputs = (torch.zeros(n, 3, size, size), *extra(n))
        with fake:
            tensors = itertools.chain(core.named_parameters(), core.named_buffers())
            functional_call(core, {name: fake.from_tensor(tensor) for name, tensor in tensors}, inputs)
    except Exception as error:  # whatever an operation raises
        images = '2 images' if two else '1 image'
        what = f'{args.model} cannot take {images} of {size} pixels'
        raise UserError(what + options_and_reason(args.model_kwargs, error)) from error


def apply_options(core: nn.Module, args: argparse.Namespace) -> None:
    """Apply --grad_checkpoint. Raises UserError where this network cannot have it, or --compile."""
    if args.compile and synchronises(core, args):
        raise UserError('--compile: torch cannot compile SyncBatchNorm, with which several GPUs train this model')
    if args.grad_checkpoint and not checkpoint_blocks(core):
        raise UserError(f'--grad_checkpoint: {args.model} has no blocks to recompute')


def on_device(core: nn.Module, args: argparse.Namespace, device: torch.device) -> nn.Module:
    """The network on the device, in its memory format; with SyncBatchNorm where several GPUs train it."""
    core = core.to(device, memory_format=training.memory_format(args, core))
    if device.type == 'cuda':
        fuse_attention(core)
    return dist.sync_batchnorm(core, device) if synchronises(core, args) else core


def in_parallel(core: nn.Module, args: argparse.Namespace, device: torch.device) -> nn.Module:
    """What is called for the loss: the network compiled and distributed, as the arguments say."""
    return dist.parallel(core, device, args.compile, COMPILE_MODES[args.compile_mode], args.bf16_gradients)


def synchronises(core: nn.Module, args: argparse.Namespace) -> bool:
    """Whether several GPUs train it with SyncBatchNorm; not with --norm bn, and not a linear probe, as MAE's is not."""
    alone = getattr(args, 'probe', None) or getattr(args, 'norm', None) == 'bn'
    return not alone and dist.will_synchronise(core, args.device)


# --------------------------------------------------------------------------
# what trains them


def param_rules(method: ModuleType, core: nn.Module, rule_kwargs: dict) -> Rules:
    """How the method groups a model's parameters; what it refuses of --rule_kwargs becomes a UserError."""
    known = list(inspect.signature(method.param_rules).parameters)[1:]
    if unknown := sorted(rule_kwargs.keys() - set(known)):
        hint = closest(unknown[0], known) or f'; known: {", ".join(known) or "none"}'
        raise UserError(f'--rule_kwargs: {method.__name__}.param_rules has no option {unknown[0]}{hint}')
    try:
        return method.param_rules(core, **rule_kwargs)
    except ValueError as error:
        raise UserError(f'--rule_kwargs: {error}') from error


def statistics_notices(args: argparse.Namespace, core: nn.Module, sampler: datasets.EpochBatches) -> list[str]:
    """What of a step BatchNorm sees, on which a dense task depends more than one would think; nothing without one."""
    if not dist.has_batchnorm(core):
        return []
    seen = args.batch_size * (sampler.world_size if synchronises(core, args) else 1)
    return [
        f'effective batch: {sampler.global_batch}; the statistics of BatchNorm are those of {counted(seen, "image")}, '
        f'one forward, which --accum_iter does not widen'
    ]


def epoch_batches(args: argparse.Namespace, num_images: int, kinds: np.ndarray | None = None) -> datasets.EpochBatches:
    """This rank's share of every epoch, or round; `kinds` are those of images which batches are to keep apart.

    Raises UserError for fewer images than one step takes.
    """
    here, accum_iter = dist.place(), optim.accumulation(args)
    copies = getattr(args, 'repeated_aug', 1)
    sampler = datasets.EpochBatches(
        *(num_images, args.batch_size, accum_iter, here.rank, here.world_size, args.seed, copies),
        steps=getattr(args, 'eval_freq', None),
        kinds=kinds,
    )
    if not sampler.pass_steps:
        _, arithmetic = optim.scaled_lr(args, accum_iter)
        most = num_images // (accum_iter * here.world_size)
        hint = f'; --batch_size {most} is the most' if most else '; fewer ranks, or a smaller --accum_iter'
        if recipe := of_recipe(args, 'effective_batch_size'):
            hint = f'; --effective_batch_size N replaces the {args.effective_batch_size}{recipe}'
        raise UserError(
            f'{num_images} training images in {args.data_path} are fewer than one step takes: {arithmetic}{hint}'
        )
    return sampler


def loader(
    images: datasets.ImageFiles, batches: Collection, args: argparse.Namespace, device: torch.device
) -> datasets.Loader:
    """Batches of images as the arguments have them. Raises ResourceError where shared memory is too small for them."""
    resources.check_shm(args, len(batches))
    pin_memory = args.pin_mem and device.type == 'cuda'
    return datasets.loader(images, batches, args.num_workers, pin_memory, args.dist_timeout)


def val_loader(
    args: argparse.Namespace,
    images: Store,
    labels: np.ndarray,
    device: torch.device,
    listing: str = 'bad_images_val.txt',
) -> datasets.Loader:
    """This rank's share of the validation images, every image on exactly one rank; `listing`: of bad images."""
    here = dist.place()
    transform = augment.eval_transform(args.eval_size or args.input_size, args.crop_pct, args.max_pixels)
    reader = Reader.of(args, listing)
    if here.rank == 0:
        reader.clear_list()  # each evaluation meets all of them
    images = datasets.ImageFiles(images, labels, transform, args.seed, reader, replace=False)
    batches = datasets.eval_batches(len(images), args.batch_size, here.rank, here.world_size)
    return loader(images, batches, args, device)


def guarded_optimizer(
    core: nn.Module, rules: Rules, args: argparse.Namespace, device: torch.device
) -> GuardedOptimizer:
    """The optimiser of a network that is on its device."""
    groups = param_groups(core, rules, args.weight_decay, getattr(args, 'layer_decay', 1.0))
    lr, _ = optim.scaled_lr(args, optim.accumulation(args))
    optimizer = OPTIMIZERS[args.opt](groups, lr, args.betas, args.opt_eps)
    fp16 = training.amp_dtype(args, device) is torch.float16
    return GuardedOptimizer(core, optimizer, device, fp16, args.clip_grad, args.max_bad_steps)
