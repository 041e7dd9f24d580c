"""Flags and lengths of programs that count steps: a round, between two evaluations, is to a run what an epoch is."""

import argparse
from functools import partial

from util.config import ABOVE_0, AT_LEAST_0, AT_LEAST_1, SHARE, WARMUP_SHAPE, Parser, number
from util.errors import UserError
from util.recipes import recipe_value

DECAY_SHARES = 8 / 9, 26 / 27  # of a run's steps: where the rate falls in ViTDet's recipes
IN_ROUNDS = {  # what the code for epochs reads of a program that counts steps
    'epochs': lambda args: args.steps // args.eval_freq,
    'warmup_epochs': lambda args: args.warmup_steps / args.eval_freq,
    'lr_decay_epochs': lambda args: [
        step // args.eval_freq + step % args.eval_freq / args.eval_freq  # as `Epoch.at`, to the bit
        for step in getattr(args, 'decay_steps', ())
    ],
    'lr_decay_rate': lambda args: getattr(args, 'decay_rate', 1.0),
}


def add_step_args(
    parser: Parser,
    *,
    steps: int,
    lr: float,
    warmup_steps: int,
    warmup_lr_ratio: float = 1e-6,
    schedules: tuple[str, ...] = ('poly', 'cosine'),
) -> None:
    """The schedule of a program that counts steps, the first of `schedules` by default, with what the code for epochs
    reads.

    A round is what lies between two evaluations, --eval_freq steps: to a run it is what an epoch is to others.
    """
    add = partial(parser.add_argument, heading='Learning rate')
    add('--steps', type=AT_LEAST_1, default=steps, instead_of='eval_freq passes', help='optimiser steps of the run')
    add(
        '--eval_freq',
        type=AT_LEAST_1,
        at_resume='same',
        settle=round_steps,
        help='steps of a round, which ends with an evaluation; must divide --steps; default: a tenth of them',
    )
    add('--lr', type=ABOVE_0, default=lr, instead_of='lr_batch', help='learning rate')
    add('--min_lr', type=number(float, 0), default=0.0, help='where the schedule ends, for all parameters')
    add(
        '--warmup_steps',
        type=AT_LEAST_0,
        settle=partial(warm_up_steps, warmup_steps),
        help=f'steps of linear warm-up; default: {warmup_steps}, at most a tenth of --steps',
    )
    help = 'share of the rate that the warm-up starts from'
    add('--warmup_lr_ratio', type=SHARE, default=warmup_lr_ratio, help=help)
    add('--warmup_shape', **WARMUP_SHAPE | {'default': 'scaled'})
    add('--lr_sched', choices=schedules, default=schedules[0], help='schedule, which the warm-up multiplies')
    add('--lr_power', type=ABOVE_0, default=1.0, help='of --lr_sched poly: (1 - step / steps) ** power')
    parser.without(start_epoch=0, blr=None, min_lr_absolute=True, cosine_start='zero', sched_per_epoch=False)
    if 'step' in schedules:
        add_decay_args(parser)
    parser.without(**IN_ROUNDS)


def add_decay_args(parser: Parser) -> None:
    """The step schedule of a program that counts steps, and its length in passes over the data."""
    add = partial(parser.add_argument, heading='Learning rate')
    add(
        *('--epochs', '--passes'),
        dest='passes',
        type=AT_LEAST_1,
        instead_of='steps eval_freq',
        settle=passes,
        help='passes over the data, instead of --steps; what counts steps keeps its share of the run',
    )
    add(
        '--decay_steps',
        type=AT_LEAST_1,
        nargs='+',
        settle=decay_at,
        help="of --lr_sched step; default: a recipe's in proportion to --steps, else 8/9 and 26/27 of them",
    )
    add('--lr_batch', type=AT_LEAST_1, help='images of a step that --lr is for: it grows with their number')
    add('--decay_rate', type=number(float, above=0, most=1), default=0.1, help='factor at each of --decay_steps')


def round_steps(args: argparse.Namespace, given: bool) -> int:
    """The value of --eval_freq: by default the least that divides --steps into ten rounds at most."""
    if args.eval_freq and args.steps % args.eval_freq and not getattr(args, 'passes', None):
        raise UserError(f'--eval_freq {args.eval_freq} must divide --steps {args.steps}')
    return args.eval_freq or tenth(args.steps)


def passes(args: argparse.Namespace, given: bool) -> int | None:
    """The value of --epochs where steps are counted: not beside --steps."""
    if args.passes and 'steps' in args.given:
        raise UserError(f'--steps {args.steps} and --epochs {args.passes} both say how long the run is: give one')
    return args.passes


def tenth(whole: int) -> int:
    """The least number that divides a whole into ten parts at most."""
    return next(n for n in range(-(-whole // 10), whole + 1) if whole % n == 0)


def in_passes(args: argparse.Namespace, pass_steps: int) -> argparse.Namespace:
    """The arguments, once it is known how many steps a pass over the data takes: those of --epochs, in steps.

    What counts steps keeps its share of the run; a round is of whole passes, ten rounds at most.
    """
    if not args.passes:
        return args
    found = argparse.Namespace(**vars(args) | {'steps': args.passes * pass_steps})
    if 'eval_freq' not in args.given:
        found.eval_freq = tenth(args.passes) * pass_steps
    elif found.steps % args.eval_freq:
        raise UserError(
            f'--eval_freq {args.eval_freq} must divide the {found.steps} steps of --epochs {args.passes}, '
            f'{pass_steps} each; leave it out, or take a multiple of {pass_steps}'
        )
    found.decay_steps = decay_at(found, False)
    fits = 'warmup_steps' in args.given and recipe_value(args, 'warmup_steps') is None
    found.warmup_steps = warm_up_steps(args.warmup_steps, found, fits)
    vars(found).update({name: of(found) for name, of in IN_ROUNDS.items()})
    return found


def decay_at(args: argparse.Namespace, given: bool) -> list[int]:
    """The value of --decay_steps: a recipe's, and those of the default, keep their shares of the run."""
    if given and args.passes:
        raise UserError('--decay_steps counts steps, and --epochs passes over the data: give --steps instead of it')
    whole = recipe_value(args, 'steps')
    if given or (recipe_value(args, 'decay_steps') and not whole):
        return args.decay_steps
    shares = [step / whole for step in recipe_value(args, 'decay_steps') or ()] or DECAY_SHARES
    return sorted({round(share * args.steps) for share in shares} & {*range(1, args.steps)})


def warm_up_steps(most: int, args: argparse.Namespace, given: bool) -> int:
    """The value of --warmup_steps; as with --warmup_epochs, one that was not given gives way to a short run."""
    fits = args.warmup_steps is not None and args.warmup_steps < args.steps
    return args.warmup_steps if given or fits else min(most, args.steps // 10)
