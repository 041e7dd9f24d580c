"""Self-supervised pretraining.

python main_pretrain.py --config scripts/recipes/NAME.yaml --data_path /data/imagenet --output_dir runs/NAME
torchrun --nproc_per_node=8 main_pretrain.py --model mirl_vit_base_depth48 --batch_size 64 --data_path ...
"""

import argparse
import inspect
import itertools
import re
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import get_args, get_type_hints

import torch
from PIL import Image
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.func import functional_call

import models_a2mim
import models_localmim
import models_mirl
import models_mixmae
from engine_pretrain import train_one_epoch
from util import config, dist, rng
from util.config import AT_LEAST_0, SHARE, Switch, number
from util.data import datasets
from util.errors import UserError, run_main
from util.log import info
from util.optim import Rules
from util.pictures import Pictures
from util.run import Run

# a method is one file; a new one is added here
METHODS = (models_mirl, models_a2mim, models_localmim, models_mixmae)


def find_method(name: str) -> ModuleType:
    """The models_*.py module whose `__all__` holds this name. Raises UserError with the closest ones."""
    for module in METHODS:
        if name in module.__all__:
            return module
    known = [n for module in METHODS for n in module.__all__]
    raise UserError(f'unknown --model {name}{config.closest(name, known) or "; known: " + ", ".join(known)}')


def construct(make: Callable[..., nn.Module], *args, model_kwargs: dict, **kwargs) -> nn.Module:
    """Call a model function with the flags' values and --model_kwargs; what it refuses becomes a UserError."""
    name = args[0] if args else make.__name__
    if twice := sorted(kwargs.keys() & model_kwargs.keys()):
        raise UserError(f'--model_kwargs {twice[0]}={model_kwargs[twice[0]]}: it has a flag of its own')
    try:
        return make(*args, **kwargs, **model_kwargs)
    except (ValueError, TypeError) as error:
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if not unknown:
            raise UserError(f'{name}: {error!s:.300}') from error
        result = get_type_hints(make)['return']
        classes = {base for cls in get_args(result) or (result,) for base in cls.__mro__}
        known = {option for cls in classes for option in inspect.signature(cls.__init__).parameters}
        raise UserError(f'{name} has no option {unknown[1]}{config.closest(unknown[1], known)}') from error
    except Exception as error:  # what networks raise that do not check their options
        if not model_kwargs:
            raise
        raise UserError(f'{name} cannot be made{options_and_reason(model_kwargs, error)}') from error


def options_and_reason(model_kwargs: dict, error: Exception) -> str:
    """' with --model_kwargs KEY=VALUE ...: why not'"""
    given = ' '.join(f'{key}={value}' for key, value in model_kwargs.items())
    return f' with --model_kwargs {given:.300}' * bool(given) + f': {str(error) or type(error).__name__:.300}'


def check_step(core: nn.Module, args: argparse.Namespace) -> None:
    """Raise UserError for a pretraining model that would fail in its first step."""
    check_forward(core, args, args.input_size, lambda n: (core.plan_from_noise(rng.picture_noise(core, args.seed, n)),))


@torch.no_grad()
def check_forward(
    core: nn.Module, args: argparse.Namespace, size: int, extra: Callable[[int], tuple] = lambda n: ()
) -> None:
    """Try a forward in shapes alone, which computes no number. Raises UserError for what the model cannot do.

    One or two images of `size` pixels stand for the batch; `extra` gives what else the model takes with n of them.
    """
    pairs = getattr(args, 'batch_size', 2) > 1 or dist.will_synchronise(core, args.device)  # BatchNorm needs two values
    n, fake = 1 + pairs, FakeTensorMode(allow_non_fake_inputs=True)
    try:
        inputs = (torch.zeros(n, 3, size, size), *extra(n))
        with fake:
            tensors = itertools.chain(core.named_parameters(), core.named_buffers())
            functional_call(core, {name: fake.from_tensor(tensor) for name, tensor in tensors}, inputs)
    except Exception as error:  # whatever an operation raises
        what = f'{args.model} cannot take {n} image{"s" * pairs} of {size} pixels'
        raise UserError(what + options_and_reason(args.model_kwargs, error)) from error


def create_model(args: argparse.Namespace) -> nn.Module:
    """The pretraining model that the arguments describe, with weights that depend on the seed alone."""
    rng.seed_all(args.seed, rng.INIT)
    make = getattr(find_method(args.model), args.model)
    given = {'mask_ratio': args.mask_ratio, 'norm_pix_loss': args.norm_pix_loss}
    options = {name: value for name, value in given.items() if value is not None}
    return construct(make, img_size=args.input_size, **options, model_kwargs=args.model_kwargs)


def param_rules(method: ModuleType, core: nn.Module, rule_kwargs: dict) -> Rules:
    """How the method groups a model's parameters; what it refuses of --rule_kwargs becomes a UserError."""
    known = list(inspect.signature(method.param_rules).parameters)[1:]
    if unknown := sorted(rule_kwargs.keys() - set(known)):
        hint = config.closest(unknown[0], known) or f'; known: {", ".join(known) or "none"}'
        raise UserError(f'--rule_kwargs: {method.__name__}.param_rules has no option {unknown[0]}{hint}')
    try:
        return method.param_rules(core, **rule_kwargs)
    except ValueError as error:
        raise UserError(f'--rule_kwargs: {error}') from error


def add_target_args(parser: config.Parser) -> None:
    """The model options that have flags of their own, in MAE's names."""
    add = partial(parser.add_argument, heading='Model', at_resume='same')
    add('--mask_ratio', type=SHARE, help="share of patches that is hidden; default: the model's")
    add('--norm_pix_loss', action=Switch, default=None, help="per-patch normalised target; default: the model's")


def get_args_parser() -> config.Parser:
    parser = config.Parser(__doc__.partition('\n')[0], other='main_finetune', usage=config.USAGE)
    config.add_common_args(
        parser,
        model='mirl_vit_base_depth48',
        batch_size=64,
        epochs=400,
        blr=1.5e-4,
        warmup_epochs=40,
        min_lr=0.0,
        betas=[0.9, 0.95],
    )
    add_target_args(parser)
    add = partial(parser.add_argument, heading='Augmentation')
    some = number(float, above=0, most=1)
    add('--crop_scale', type=some, nargs=2, default=[0.2, 1.0], help="smallest and largest share of the image's area")
    add('--interpolation', choices=('bicubic', 'bilinear'), default='bicubic', help='how the crop is resized')
    add = partial(parser.add_argument, heading='Output and resume', at_resume='free')
    add('--vis_freq', type=AT_LEAST_0, default=0, help='epochs between pictures of the same images; 0: none')
    return parser


def main(args: argparse.Namespace) -> None:
    """Pretrain as the arguments say."""
    method = find_method(args.model)
    files = datasets.pretraining_files(args.data_path)
    with Run(args, 'pretrain', len(files), get_args_parser().roles) as run:
        core = create_model(args)
        check_step(core, args)
        run.start(core, param_rules(method, core, args.rule_kwargs))

        crop = datasets.pretrain_transform(args.input_size, args.crop_scale, args.hflip, args.interpolation)
        batches = run.loader(files, None, crop)
        pictures = Pictures(core, files, args, run.reader) if args.vis_freq and dist.is_main() else None
        for epoch, logger in run.epochs():
            stats = train_one_epoch(run, batches, epoch, logger)
            if pictures and ((epoch + 1) % args.vis_freq == 0 or epoch + 1 == args.epochs):
                picture = pictures.draw(run.core, run.device)
                Image.fromarray(picture).save(args.output_dir / f'pictures-{epoch}.png')
                run.log.image('reconstruction', picture, run.axis(epoch + 1, 0))
            run.after_epoch(epoch, logger, **{f'train_{name}': value for name, value in stats.items()})
        info(f'done; checkpoints, log.txt and TensorBoard events are in {args.output_dir}')
        dist.cleanup()


if __name__ == '__main__':
    run_main(lambda: main(get_args_parser().parse(stage='pretrain')))
