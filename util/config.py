"""Command lines: argparse with recipes under the flags, and mistakes told in one line.

A flag is declared once, in one `add_argument`: its type with its range, its heading in --help, and `at_resume`, whether
it may change when a run is resumed.
"""

import argparse
import ast
import contextlib
import importlib
import itertools
import math
import operator
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from util import dist, optim
from util.data import decoders, named
from util.errors import UserError, closest
from util.log import info
from util.recipes import find_recipe, of_recipe, read_recipe

HEADINGS = (  # of --help, in this order
    *('Model', 'Batch', 'Learning rate', 'Optimiser', 'Weight average', 'Data', 'Augmentation', 'Loss', 'Evaluation'),
    *('Output and resume', 'Hardware and precision', 'Distributed'),
)
USAGE = '%(prog)s [--FLAG VALUE ...]'  # of the mains, instead of a page of brackets
DASHES = '\u2010\u2011\u2012\u2013\u2014\u2015\u2212'  # no hyphens: of text that a word processor has set
LONGEST_NAME = 255  # bytes of a file's name
MOST_WORKERS = 10  # loader processes of a rank, if not more are asked for
README = Path(__file__).resolve().parent.parent / 'README.md'
MODELS_BEGIN, TABLE_END = '<!-- models -->\n', '<!-- end -->'
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
WARMUP_SHAPE = dict(
    choices=('flat', 'scaled'),
    default='flat',
    help='warm-up to the peak rate (flat, as MAE), or as a factor of the scheduled rate (scaled, as mmcv)',
)
# same: a resumed run must have the same value; warn: a change prints a warning; free: a flag that only says where and
# how a run works, or that is checked elsewhere
AtResume = Literal['same', 'warn', 'free']


class Switch(argparse.BooleanOptionalAction):
    """`--flag` and `--no_flag`, spelled as all flags are; `off` are other names of the second."""

    def __init__(self, option_strings, dest, default=False, off=(), help='', **kwargs):
        super().__init__(option_strings, dest, default=default, **kwargs)
        self.on, self.help = option_strings, help  # some versions of argparse add the default to a help that they get
        self.option_strings = [*option_strings, *(f'--no_{name[2:]}' for name in option_strings), *off]

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, option_string in self.on)


class Model(argparse.Action):
    """`--model NAME`; `--model list` prints the table of models and ends, as --help does."""

    def __call__(self, parser, namespace, name, option_string=None):
        if name == 'list':
            info(models_table())
            parser.exit()
        setattr(namespace, self.dest, name)


class KeyValues(argparse.Action):
    """`key=value ...` -> {key: literal}, added to those of a recipe."""

    def __init__(self, option_strings, dest, **kwargs):
        super().__init__(option_strings, dest, nargs='+', default={}, metavar='KEY=VALUE', **kwargs)

    def __call__(self, parser, namespace, words, option_string=None):
        pairs = {}
        for word in words:
            key, equals, text = word.partition('=')
            if not equals or not key.isidentifier():
                others = [action.dest for action in parser._get_positional_actions()]
                hint = f'; write {others[0]} before {option_string}' if others else ''
                raise UserError(f'{option_string} expects key=value, got {word!r}{hint}')
            try:
                pairs[key] = ast.literal_eval(text)
            except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):  # no literal, or one too deep
                pairs[key] = text
        setattr(namespace, self.dest, getattr(namespace, self.dest) | pairs)


def number(
    kind: type[int] | type[float],
    least: float | None = None,
    most: float | None = None,
    *,
    above: float | None = None,
    below: float | None = None,
) -> Callable[[str], float]:
    """The type of a flag that takes a number in a range, which its error names; never nan or infinite."""
    ends = (
        (least, operator.ge, 'at least'),
        (above, operator.gt, 'more than'),
        (most, operator.le, 'at most'),
        (below, operator.lt, 'less than'),
    )
    ends = [end for end in ends if end[0] is not None]
    words = [f'{words} {limit:g}' for limit, _, words in ends]
    if kind is float and most is None and below is None:
        words.append('finite')

    def convert(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            noun = 'a whole number' if kind is int else 'a number'
            raise argparse.ArgumentTypeError(f'must be {noun}, got {text}') from None
        if not abs(value) <= sys.float_info.max or not all(holds(value, limit) for limit, holds, _ in ends):
            raise argparse.ArgumentTypeError(f'must be {" and ".join(words)}, got {text}')
        return value

    convert.__name__ = kind.__name__  # what --help shows
    return convert


AT_LEAST_0, AT_LEAST_1 = number(int, 0), number(int, 1)
ABOVE_0, SHARE = number(float, above=0), number(float, 0, 1)


def path(text: str) -> Path:
    """The type of a flag that is a path: `~` is expanded, which no shell does in `--flag=~/x` or in YAML.

    A flag that was not given is None, or has its default: an empty path is an unset variable.
    """
    if not text.strip() or '\0' in text or any(len(name) > LONGEST_NAME for name in os.fsencode(text).split(b'/')):
        raise argparse.ArgumentTypeError(f'must be a path, got {text!r}')
    try:
        return Path(text).expanduser()
    except RuntimeError:  # ~nobody
        raise argparse.ArgumentTypeError(f'must be a path, got {text}: no such home; ./{text} is a name') from None


def source(text: str) -> str:
    """The type of a flag that names a checkpoint: a path, as `path` has it, or a URL or the word auto as they are."""
    return text if '://' in text else str(path(text))


class Help(argparse.HelpFormatter):
    """Values are shown by their types, defaults in words."""

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return (action.type or str).__name__

    def _get_help_string(self, action: argparse.Action) -> str:
        purpose, default = purpose_and_default(action)
        text = f'{purpose} (default: {default})' if default else purpose
        return text.replace('%', '%%')  # argparse's own templates are not used


def purpose_and_default(action: argparse.Action) -> tuple[str, str]:
    """A flag's help in two: what it is, and its default, where the help does not say it as `; default: ...`."""
    purpose, _, words = (action.help or '').partition('; default: ')
    return purpose, words or in_words(action.default)


def in_words(default: Any) -> str:
    if isinstance(default, bool):
        return 'on' if default else 'off'
    if isinstance(default, float):
        return f'{default:g}'
    if isinstance(default, list):
        return ' '.join(map(in_words, default))
    return '' if default in (None, '', {}, argparse.SUPPRESS) else str(default)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UserError and takes `--some-flag` for `--some_flag`.

    It takes the recipes of `main`, if that is given, as far as it knows their keys. `other` is the module whose parser
    has what this one lacks: a flag that is unknown here is looked up there.
    """

    def __init__(
        self, description: str | None, main: 'Parser | None' = None, other: str = '', usage: str | None = None
    ):
        self.flags: dict[str, argparse.Action] = {}  # by each of their names
        self.roles: dict[str, AtResume] = {'given': 'free'}  # by the names of their values
        self.of_network: dict[str, argparse.Action] = {}
        self.of_file: dict[str, str] = {}
        self.instead_of: dict[str, str] = {}
        self.settle: dict[str, Callable[[argparse.Namespace, bool], Any]] = {}  # by the names of their values
        self.presets: dict[str, dict[str, dict]] = {}  # by the names of their values
        super().__init__(
            description=(description or '').partition('\n')[0],  # of a docstring, which python -OO takes away
            usage=usage,
            formatter_class=partial(Help, max_help_position=32),
            allow_abbrev=False,
        )
        self.headings = {heading: self.add_argument_group(heading) for heading in HEADINGS}
        self.main, self.other = main, other

    def add_argument(
        self,
        *names: str,
        heading: str = '',
        at_resume: AtResume = 'warn',
        instead_of: str = '',
        of_network: bool = False,
        of_file: str = '',
        settle: Callable[[argparse.Namespace, bool], Any] | None = None,
        presets: dict[str, dict] | None = None,
        **kwargs,
    ) -> argparse.Action:
        """argparse's, under a heading of --help.

        `instead_of` are other flags' values, which are not taken from a recipe where this flag is given. `of_network`:
        it decides what a network is, or how that sees an image, and is known to its checkpoint (checkpoint.Source);
        `of_file` is what tells it in a checkpoint of a program without this flag, also to a run that begins with it.
        `settle(args, given)` makes the value from all that was parsed, the flag's own None where it has none; `given`:
        on the command line. `presets` are, for each value of the flag, the defaults that other flags then have.
        """
        if heading and heading not in self.headings:
            self.headings[heading] = self.add_argument_group(heading)
        add = self.headings[heading].add_argument if heading else super().add_argument
        action = add(*names, **kwargs)
        action.heading = heading
        self.flags |= dict.fromkeys(action.option_strings, action)
        self.roles[action.dest] = at_resume
        if instead_of:
            self.instead_of[names[0]] = instead_of
        if of_network:
            self.of_network[action.dest] = action
        if of_file:
            self.of_file[action.dest] = of_file
        if settle:
            self.settle[action.dest] = settle
        if presets:
            self.presets[action.dest] = presets
        return action

    def take(self, other: 'Parser', *names: str) -> None:
        """Flags as another parser has them."""
        for name in names:
            action = other.flags[f'--{name}']
            self.headings[action.heading]._add_action(action)  # as argparse itself takes those of `parents`
            self.flags |= dict.fromkeys(action.option_strings, action)
            for ours, theirs in (
                (self.roles, other.roles),
                (self.of_network, other.of_network),
                (self.settle, other.settle),
            ):
                ours |= {name: theirs[name]} if name in theirs else {}

    def without(self, **values: Any) -> None:
        """What the code reads of flags that this program has not: values, or functions of what was parsed."""
        for name, value in values.items():
            if callable(value):
                self.settle[name] = lambda args, given, value=value: value(args)
            else:
                self.set_defaults(**{name: value})
            self.roles[name] = 'free'

    def error(self, message: str):
        # argparse's 'argument --lr: must be more than 0' as a sentence
        raise UserError(message.removeprefix('argument ').replace(': must be', ' must be', 1))

    def parse(self, argv: list[str] | None = None, stage: str = '') -> argparse.Namespace:
        """Flags over recipe over defaults; `given` names those that are no defaults.

        Raises UserError naming the closest flag or key for one that is unknown.
        """
        argv = [underscored(word) for word in (sys.argv[1:] if argv is None else argv)]
        first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        first.add_argument('--config', nargs='?', type=path)
        for name in self.presets:
            first.add_argument(f'--{name}', nargs='?')
        first.error = self.error
        early = first.parse_known_args(argv)[0]
        config, flags, defaults = early.config, {word.partition('=')[0] for word in argv}, {}
        if config and 'config' in self.roles:
            values = (self.main or self).recipe(find_recipe(config), stage)
            dropped = {other for flag, others in self.instead_of.items() if flag in flags for other in others.split()}
            defaults = {dest: values[dest] for dest in values.keys() & self.roles.keys() - dropped}
        for name, presets in self.presets.items():
            self.set_defaults(**presets.get(getattr(early, name) or defaults.get(name), {}))
        self.set_defaults(**defaults)
        args = self.parse_args(argv)
        typed = {self.flags[flag].dest for flag in flags & self.flags.keys()}
        args.given = sorted(defaults.keys() | typed)
        for name, settle in self.settle.items():
            setattr(args, name, settle(args, name in typed))
        return args

    def parse_args(self, argv: list[str]) -> argparse.Namespace:
        args, unknown = self.parse_known_args(argv)
        if unknown:
            self.check_single_values(argv, unknown[0])
            raise UserError(f'unknown argument {unknown[0]}{self.hint(unknown[0])}')
        return args

    def check_single_values(self, argv: list[str], unknown: str) -> None:
        """Raise UserError for a word too many behind a flag that takes one: it is not an argument of its own."""
        before = list(itertools.takewhile(lambda word: word != unknown, argv))
        flag = next((word for word in reversed(before) if word.startswith('--')), '').partition('=')[0]
        if flag in self.flags and not unknown.startswith(('--', *DASHES)):
            square = ': images are square, one number is both sides' if flag in ('--input_size', '--eval_size') else ''
            many = self.flags[flag].nargs
            takes = 'one value' if many is None else 'no value' if many == 0 else f'{many} values'
            raise UserError(f'{flag} takes {takes}, {unknown} is too many{square}')

    def hint(self, flag: str) -> str:
        """Who takes a flag that this parser does not know, or its closest ones."""
        if flag[0] in DASHES:
            return f': it begins with a dash that is no hyphen: --{flag.lstrip(flag[0]).lstrip("-")}'
        if self.other and flag.partition('=')[0] in importlib.import_module(self.other).get_args_parser().flags:
            return f': it belongs to {self.other}.py'
        return closest(flag, self.flags)

    def recipe(self, path: Path, stage: str) -> dict[str, Any]:
        """What a recipe sets, checked and converted as the command line's flags are."""
        known = {name[2:]: action for name, action in self.flags.items() if action.dest not in ('help', 'config')}
        values = {}
        for key, value in read_recipe(path, stage).items():
            name = str(key).replace('-', '_')
            if name not in known:
                raise UserError(f'{path}: unknown key {key!r}{closest(name, known)}')
            if known[name].dest in values:
                raise UserError(f'{path}: {name} is given twice')
            values[known[name].dest] = converted(known[name], name, value, f'{path}: {key}')
        return values


def converted(action: argparse.Action, name: str, value: Any, where: str) -> Any:
    """A YAML value as the flag of this name would have it."""
    if isinstance(action, KeyValues):
        if not isinstance(value, dict):
            raise UserError(f'{where}: expected key: value pairs, got {value!r}')
        return value
    if value is None and action.default is None:
        return None
    if isinstance(action, Switch):
        if not isinstance(value, bool):
            raise UserError(f'{where}: expected true or false, got {value!r}')
        return value == (f'--{name}' in action.on)  # `cls_token: true` is `global_pool: false`
    count = action.nargs if isinstance(action.nargs, int) else None
    many = count is not None or action.nargs in ('+', '*')
    items = value if isinstance(value, list) else [value]
    if many != isinstance(value, list) or count not in (None, len(items)):
        expected = f'a list of {count}' if count else 'a list' if many else 'one value'
        raise UserError(f'{where}: expected {expected}, got {value!r}')
    if any(item is None or isinstance(item, bool | list | dict) for item in items):
        raise UserError(f'{where}: invalid value {value!r}')
    try:
        items = [(action.type or str)(str(item)) for item in items]
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise UserError(f'{where} {error}') from error
    if action.choices and not set(items) <= set(action.choices):
        raise UserError(f'{where}: {value!r} is not one of {", ".join(map(str, action.choices))}')
    return items if many else items[0]


def as_flags(values: dict[str, Any]) -> str:
    """'--input_size 32 --no_global_pool --mean 0.5 0.5 0.5 --model_kwargs depth=4', to be read or typed."""
    return ' '.join(as_words(values))


def as_words(values: dict[str, Any]) -> list[str]:
    """The same as the words of a command."""
    words = []
    for name, value in values.items():
        words.append(f'--no_{name}' if value is False else f'--{name}')
        if isinstance(value, dict):
            words += [f'{key}={item}'.replace(' ', '') for key, item in value.items()]
        elif not isinstance(value, bool):
            words += map(str, value) if isinstance(value, list) else [str(value)]
    return words


def warm_up(most: int, args: argparse.Namespace, given: bool) -> float:
    """The value of --warmup_epochs: a default and a recipe's give way to a short run, one on the command line does not.

    The run says so in its first lines.
    """
    fits = args.warmup_epochs is not None and args.warmup_epochs < args.epochs
    return args.warmup_epochs if given or fits else min(most, args.epochs / 10)


def decoder(args: argparse.Namespace, given: bool) -> str:
    """The name of a decoder. `auto` is no name: as if it had not been given, a resumed run keeps its own."""
    if args.decoder == decoders.AUTO:
        args.given = [name for name in args.given if name != 'decoder']
    return decoders.resolved(args.decoder)


def default_workers(cores: int) -> int:
    """Loader processes of a rank with so many cores."""
    return max(1, min(MOST_WORKERS, cores))


def usable_cores() -> int:
    """The cores of the machine, less what affinity (taskset, SLURM) or a container's CPU quota takes away."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # no cgroup, or no quota: 'max'
        quota, period = Path('/sys/fs/cgroup/cpu.max').read_text().split()
        cores = min(cores, math.ceil(int(quota) / int(period)))
    return cores


def models_table() -> str:
    """The table of models in README.md, which scripts/models.py writes, with its columns aligned."""
    _, _, rest = README.read_text(encoding='utf-8').partition(MODELS_BEGIN)
    lines = rest.partition(TABLE_END)[0].replace('`', '').splitlines()
    rows = [[cell.strip() for cell in line.strip('|').split('|')] for line in lines if not line.startswith('|--')]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return '\n'.join('  '.join(map(str.ljust, row, widths)).rstrip() for row in rows)


def underscored(word: str) -> str:
    """`--some-flag=a-b` -> `--some_flag=a-b`"""
    if not word.startswith('--'):
        return word
    flag, equals, value = word.partition('=')
    return '--' + flag[2:].replace('-', '_') + equals + value


# --------------------------------------------------------------------------
# arguments of both mains


def add_common_args(
    parser: Parser, *, batch_size: int, epochs: int, blr: float, warmup_epochs: float, min_lr: float, betas: list[float]
) -> None:
    """Everything that pretraining and fine-tuning share; the defaults that differ are the parameters."""
    add = parser.add_argument
    add('--config', type=path, metavar='YAML', at_resume='free', help='recipe, or its name: sets defaults')
    add_model_args(parser)
    add_batch_args(parser, batch_size)
    add_schedule_args(parser, epochs=epochs, blr=blr, warmup_epochs=warmup_epochs, min_lr=min_lr)
    add_optimiser_args(parser, betas)
    add_data_args(parser)
    add_output_args(parser)
    add_hardware_args(parser)


def add_model_args(parser: Parser, input_size: int = 224, *other_names: str) -> None:
    """The model, its input, and where it runs. `other_names` are those of --input_size, the first ones."""
    add = partial(parser.add_argument, heading='Model', at_resume='same', of_network=True)
    add('--model', action=Model, metavar='NAME', help='the network and its method; list: print them all')
    add('--model_kwargs', action=KeyValues, help='more arguments of the model')
    sizes = (*other_names, '--input_size')
    add(*sizes, dest='input_size', type=AT_LEAST_1, default=input_size, help='image side in pixels')

    add = partial(parser.add_argument, heading='Data')
    add('--max_pixels', type=AT_LEAST_1, default=50_000_000, help='larger images are not decoded')
    add = partial(add, of_network=True)
    add('--mean', type=SHARE, nargs=3, default=list(IMAGENET_MEAN), help='channel means of values in 0..1')
    add(
        '--std',
        type=number(float, above=0, most=1),
        nargs=3,
        default=list(IMAGENET_STD),
        help='channel standard deviations',
    )

    add = partial(parser.add_argument, heading='Hardware and precision')
    gpu_or_cpu = 'cuda' if torch.cuda.is_available() else 'cpu'
    add(
        '--device',
        default=gpu_or_cpu,
        at_resume='free',
        help='cuda, cuda:N or cpu; default: cuda if there is a GPU, else cpu',
    )
    add('--seed', type=AT_LEAST_0, default=0, at_resume='same', help='seed of everything random')


def add_batch_args(parser: Parser, batch_size: int) -> None:
    add = partial(parser.add_argument, heading='Batch', at_resume='free')  # their product is checked
    add('--batch_size', type=AT_LEAST_1, default=batch_size, help='images per process and forward')
    add(
        '--accum_iter',
        type=AT_LEAST_1,
        default=1,
        instead_of='effective_batch_size',
        help='forwards per optimiser step',
    )
    add('--effective_batch_size', type=AT_LEAST_1, help='images per optimiser step; solves for accum_iter')


def add_schedule_args(parser: Parser, *, epochs: int, blr: float, warmup_epochs: float, min_lr: float) -> None:
    add = partial(parser.add_argument, heading='Learning rate')
    add('--epochs', type=AT_LEAST_1, default=epochs, help='passes over the data')
    add('--lr', type=ABOVE_0, help='learning rate; default: from --blr')
    add('--blr', type=ABOVE_0, default=blr, instead_of='lr', help='base rate: lr = blr * images per step / 256')
    add('--min_lr', type=number(float, 0), default=min_lr, help='where the cosine ends')
    add('--min_lr_absolute', action=Switch, help='the final rate is --min_lr for all parameters, whatever their scale')
    add(
        '--warmup_epochs',
        type=number(float, 0),
        settle=partial(warm_up, warmup_epochs),
        help=f'epochs of linear warm-up; default: {warmup_epochs}, at most a tenth of --epochs',
    )
    add('--warmup_lr_ratio', type=SHARE, default=0.0, help='share of the rate that the warm-up starts from')
    add('--warmup_shape', **WARMUP_SHAPE)
    add('--lr_sched', choices=('cosine', 'step'), default='cosine', help='schedule after the warm-up')
    add(
        '--cosine_start',
        choices=('warmup', 'zero'),
        default='warmup',
        help="the cosine starts at the warm-up's end, or at epoch 0",
    )
    add('--lr_decay_epochs', type=AT_LEAST_1, nargs='+', default=[], help='boundaries of --lr_sched step')
    add('--lr_decay_rate', type=number(float, above=0, most=1), default=0.1, help='factor at each boundary')
    add('--sched_per_epoch', action=Switch, help='after the warm-up, change the rate at epochs only')


def add_optimiser_args(parser: Parser, betas: list[float]) -> None:
    add = partial(parser.add_argument, heading='Optimiser')
    choices = tuple(optim.OPTIMIZERS)
    add('--opt', choices=choices, default='adamw', at_resume='same', help="optimiser; LAMB and LARS are timm's")
    add('--opt_eps', type=ABOVE_0, help="the optimiser's epsilon; default: adamw and lars 1e-8, lamb 1e-6")
    help = 'decay of the two moments; LARS and SGD have the first'
    add('--betas', type=number(float, 0, below=1), nargs=2, default=betas, help=help)
    add('--weight_decay', type=number(float, 0), default=0.05, help='weight decay, in SGD as part of the gradient')
    add('--rule_kwargs', action=KeyValues, help="options of the model's parameter rules")
    add('--clip_grad', type=number(float, 0), help='largest gradient norm; default: not clipped, as with 0')
    add('--max_bad_steps', type=AT_LEAST_0, at_resume='free', help='most steps in a row to skip; default: 3, fp16: 20')


def add_data_args(parser: Parser) -> None:
    add = partial(parser.add_argument, heading='Data')
    add(
        '--data_path',
        type=path,
        default=Path('data'),
        at_resume='free',
        help='train/ and val/ with a folder per class; for pretraining any folder of images; or tar shards',
    )
    add('--dataset', choices=named.SOURCES, default='folder', at_resume='same', help='layout of --data_path')
    add('--download', action=Switch, at_resume='free', help='get what is missing in --data_path, where torchvision can')
    add(
        '--num_workers',
        type=AT_LEAST_0,
        at_resume='free',
        settle=lambda args, given: (
            default_workers(dist.share_of_cores(usable_cores())) if args.num_workers is None else args.num_workers
        ),
        help=f"loader processes per rank; default: the rank's share of the cores, at most {MOST_WORKERS}",
    )
    add(
        '--decoder',
        choices=(decoders.AUTO, *decoders.DECODERS),
        default=decoders.AUTO,
        at_resume='same',
        settle=decoder,
        help='what decodes the JPEGs that train; default: auto, the fastest that is installed',
    )
    add('--pin_mem', action=Switch, default=True, at_resume='free', help='pinned batches, for faster copies to a GPU')
    add('--bad_images', choices=('raise', 'skip'), default='raise', help='what to do with an image that cannot be read')
    add(
        '--max_bad_images',
        type=number(float, 0, below=1),
        at_resume='free',
        help='largest share of images to skip; default: 0.001, or 10 images',
    )
    add(
        '--data_retries',
        type=AT_LEAST_0,
        default=5,
        at_resume='free',
        help='how often reading is tried again if storage is gone',
    )
    augment = partial(parser.add_argument, heading='Augmentation')
    augment('--hflip', type=SHARE, default=0.5, help='probability of a horizontal flip')


def add_output_args(parser: Parser, unit: str = 'epoch') -> None:
    """`unit` is what an evaluation ends: an epoch or a round."""
    add = partial(parser.add_argument, heading='Output and resume', at_resume='free')
    add('--output_dir', type=path, default=Path('output_dir'), help='checkpoints, log.txt, args.json')
    add('--log_dir', type=path, help='TensorBoard events; default: --output_dir')
    add('--print_freq', type=AT_LEAST_1, default=20, help='optimiser steps between progress lines')
    add('--save_freq', type=AT_LEAST_1, default=20, help=f'{unit}s between numbered checkpoints')
    add(
        '--save_freq_steps',
        type=AT_LEAST_0,
        default=0,
        help=f'steps between writes of checkpoint-last.pth; 0: {unit}s only',
    )
    add('--keep_last', type=AT_LEAST_0, default=0, help='newest numbered checkpoints to keep; 0: all')
    add(
        '--resume', type=source, metavar='PATH', help="checkpoint to resume; 'auto': the newest of --output_dir, if any"
    )
    if unit == 'epoch':
        add('--start_epoch', type=AT_LEAST_0, default=0, help='first epoch of a run that is not resumed')
    add('--dry_run', action=Switch, help='write nothing: try some steps, and say what the run would need')
    add('--check_data', action=Switch, help='with --dry_run: read every image, and name those that cannot be read')


def add_hardware_args(parser: Parser) -> None:
    add = partial(parser.add_argument, heading='Hardware and precision')
    add('--amp_dtype', choices=('bf16', 'fp16', 'none'), help='autocast; default: bf16 if the GPU has it, else none')
    add('--deterministic', action=Switch, help='deterministic kernels, for exact repeats on a GPU')
    add = partial(add, at_resume='free')
    add('--channels_last', action=Switch, default=None, help='NHWC in memory; default: on for networks that convolve')
    add('--grad_checkpoint', action=Switch, help='save memory: recompute activations in the backward pass')
    add('--compile', action=Switch, help='torch.compile the model')
    add(
        '--compile_mode',
        choices=('default', 'max-autotune'),
        default='default',
        help='max-autotune tries kernels first, for minutes; without CUDA graphs',
    )

    add = partial(parser.add_argument, heading='Distributed', at_resume='free')
    add('--dist_url', default='env://', help='rendezvous of the processes')
    add('--dist_timeout', type=number(float, above=0, most=1e9), default=600, help='seconds to wait for a lost rank')
    add(
        '--bf16_gradients',
        action=Switch,
        at_resume='warn',
        help='ranks exchange gradients in bfloat16: half the bytes, other numbers',
    )
    add('--world_size', type=AT_LEAST_1, help='number of processes, checked against those launched')
    # old launch scripts pass these; ranks come from the environment
    add('--local_rank', type=number(int, -1), help=argparse.SUPPRESS)
    add('--dist_on_itp', action=Switch, help=argparse.SUPPRESS)


def check_common_args(args: argparse.Namespace) -> None:
    """Raise UserError for flags that contradict each other or what is there, before anything is started."""
    for name in ('crop_scale', 'cutmix_minmax', 'scale_range'):
        pair = getattr(args, name, None)
        if pair and pair[0] > pair[1]:
            what = 'factor' if name == 'scale_range' else 'share'
            raise UserError(f'--{name} takes the smaller {what} first, got {pair}')
    check_dry_run(args)
    if args.resume and '://' in args.resume and not getattr(args, 'eval', False):
        raise UserError(f'--resume {args.resume}: a run resumes from a local file of its own; --finetune takes URLs')
    for name in ('output_dir', 'log_dir'):
        if (folder := getattr(args, name)) and not getattr(args, 'eval', False):
            check_apart(name, folder, args.data_path, getattr(args, 'dataset', 'folder'))
    optim.check_decay(args.opt, args.weight_decay)
    if args.compile_mode != 'default' and not args.compile:
        raise UserError(f'--compile_mode {args.compile_mode} belongs to --compile: give both')
    dist.own_device(args.device)
    world_size = dist.place().world_size
    if args.bf16_gradients and world_size == 1 and not getattr(args, 'eval', False):
        raise UserError('--bf16_gradients: one process exchanges no gradients; leave it out, or launch several')
    if args.world_size not in (None, world_size):
        raise UserError(
            f'--world_size {args.world_size}, but {world_size} process(es) were launched (by torchrun or srun)'
        )


def check_dry_run(args: argparse.Namespace) -> None:
    """Raise UserError for flags that contradict --dry_run, or need it."""
    if args.check_data and not args.dry_run:
        raise UserError('--check_data belongs to --dry_run: give both')
    if args.dry_run and getattr(args, 'eval', False):
        raise UserError('--dry_run tries training steps, and --eval has none: leave one of them out')
    if args.dry_run and args.download:
        raise UserError('--dry_run writes nothing, so --download cannot get the data: leave one of them out')


def check_apart(name: str, folder: Path, data_path: Path, dataset: str, of: str = '--data_path') -> None:
    """Raise UserError if what a run writes would lie among the images that it reads."""
    folder, data = folder.resolve(), data_path.resolve()
    images = [data / split for split in ('train', 'val') if (data / split).is_dir()]
    if not images and dataset == 'folder':  # images nested at will; other data sets are read from their lists
        images = [data]
    if folder == data or any(folder.is_relative_to(split) for split in images):
        raise UserError(f'--{name} {folder} is among the images of {of} {data_path}; keep them apart')


def check_schedule(args: argparse.Namespace) -> None:
    """Raise UserError for a schedule that cannot be."""
    if args.warmup_epochs >= args.epochs:
        unit = 'steps' if hasattr(args, 'steps') else 'epochs'
        raise UserError(
            f'--warmup_{unit} {getattr(args, f"warmup_{unit}"):g} must be less than --{unit} {getattr(args, unit)}; '
            f'without it, the warm-up takes a tenth'
        )
    if args.start_epoch >= args.epochs:
        raise UserError(f'--start_epoch {args.start_epoch} leaves nothing of --epochs {args.epochs}')
    check_boundaries(args)
    lr, arithmetic = optim.scaled_lr(args, optim.accumulation(args))
    if args.lr_sched != 'step' and args.min_lr > lr:
        raise UserError(f'--min_lr {args.min_lr:g}, where the {args.lr_sched} ends, is above its peak: {arithmetic}')


def check_boundaries(args: argparse.Namespace) -> None:
    """Raise UserError for steps of the learning rate that would never come, or in no order."""
    epochs = args.lr_decay_epochs
    if hasattr(args, 'decay_steps'):
        steps = args.decay_steps
        if args.lr_sched == 'step' and not all(a < b for a, b in itertools.pairwise([*steps, args.steps])):
            told = ' '.join(map(str, steps))
            raise UserError(f'--decay_steps must rise, to below --steps {args.steps}, got {told}')
        return
    if args.lr_sched == 'step' and not epochs:
        raise UserError('--lr_sched step needs --lr_decay_epochs')
    rising = all(a < b for a, b in itertools.pairwise(epochs))
    if args.lr_sched == 'step' and not (rising and epochs[-1] < args.epochs):
        raise UserError(
            f'--lr_decay_epochs must rise, to below --epochs {args.epochs}, got {" ".join(map(str, epochs))}'
            f'{of_recipe(args, "lr_decay_epochs")}; or take --lr_sched cosine'
        )


def plain(args: argparse.Namespace) -> dict:
    """`vars(args)` with paths as strings: what is saved with a run."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
