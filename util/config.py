"""Command lines: argparse with `_` and `-` alike, recipes under the flags, and mistakes told in one line."""

import argparse
import ast
import difflib
import importlib
import itertools
import math
import sys
from pathlib import Path

import torch
import yaml
from torch import nn

from util import dist
from util.data.images import MAX_PIXELS
from util.errors import UserError

RECIPES = Path(__file__).resolve().parent.parent / 'scripts' / 'recipes'
INSTEAD_OF = {'accum_iter': 'effective_batch_size', 'blr': 'lr'}  # given as a flag, the first drops a recipe's second
LARGEST = 1e9  # of what may be large, but not infinite
ABOVE_ZERO, BELOW_ONE = math.nextafter(0, 1), math.nextafter(1, 0)  # ends of open ranges
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class RecipeLoader(getattr(yaml, 'CSafeLoader', yaml.SafeLoader)):  # many times faster where it is in C
    """YAML of plain data, in which no key is given twice."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := next((key for key in keys if keys.count(key) > 1), ''):
            raise yaml.constructor.ConstructorError(None, None, f'{twice} is given twice', node.start_mark)
        return super().construct_mapping(node, deep)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UserError and takes `--some-flag` for `--some_flag`.

    It takes the recipes of `main`, if that is given, as far as it knows their keys. `other` is the module whose parser
    has what this one lacks: a flag that is unknown here is looked up there.
    """

    def __init__(self, description: str, main: 'Parser | None' = None, other: str = ''):
        super().__init__(
            description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
        )
        self.main, self.other = main, other

    def error(self, message: str):
        raise UserError(message)

    def parse(self, argv: list[str] | None = None, stage: str = '') -> argparse.Namespace:
        """Flags over recipe over defaults. Raises UserError naming the closest flag or key for one that is unknown."""
        argv = [underscored(word) for word in (sys.argv[1:] if argv is None else argv)]
        path = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        path.add_argument('--config', nargs='?', default='')
        config = path.parse_known_args(argv)[0].config
        if config and '--config' in self._option_string_actions:
            values = (self.main or self).recipe(find_recipe(config), stage)
            own = {action.dest for action in self._actions}
            values = {dest: value for dest, value in values.items() if dest in own}
            for flag, other in INSTEAD_OF.items():
                if any(word.partition('=')[0] == f'--{flag}' for word in argv):
                    values.pop(other, None)
            self.set_defaults(**values)
        argv = [word for word in argv if not self.switch_off(word)]
        args, unknown = self.parse_known_args(argv)
        if unknown:
            raise UserError(f'unknown argument {unknown[0]}{self.hint(unknown[0])}')
        return args

    def hint(self, flag: str) -> str:
        """Who takes a flag that this parser does not know, or its closest ones."""
        if self.other:
            other = importlib.import_module(self.other).get_args_parser()
            if flag.partition('=')[0] in other._option_string_actions:
                return f' here: {self.other}.py takes it'
        return closest(flag, self._option_string_actions)

    def switch_off(self, word: str) -> bool:
        """Take `--no_FLAG` for any switch that a recipe may have turned on."""
        action = self._option_string_actions.get(word.replace('--no_', '--', 1))
        if (
            word in self._option_string_actions
            or not word.startswith('--no_')
            or getattr(action, 'const', None) is not True
        ):
            return False
        self.set_defaults(**{action.dest: False})
        return True

    def recipe(self, path: Path, stage: str) -> dict:
        """The flags that a recipe sets, checked and converted as the command line's would be."""
        flags = {name[2:]: action for name, action in self._option_string_actions.items() if name.startswith('--')}
        known = {name: action for name, action in flags.items() if name not in ('help', 'config')}
        values = {}
        for key, value in read_recipe(path, stage).items():
            name = str(key).replace('-', '_')
            if name not in known:
                raise UserError(f'{path}: unknown key {key!r}{closest(name, known)}')
            values[known[name].dest] = self.converted(known[name], value, f'{path}: {key}')
        return values

    @staticmethod
    def converted(action: argparse.Action, value, where: str):
        """A YAML value as this action's flag would have it."""
        if isinstance(action, KeyValues):
            if not isinstance(value, dict):
                raise UserError(f'{where}: expected key: value pairs, got {value!r}')
            return value
        if value is None and action.default is None:
            return None
        if action.nargs == 0:
            if not isinstance(value, bool):
                raise UserError(f'{where}: expected true or false, got {value!r}')
            return value == action.const  # `cls_token: true` is `global_pool: false`
        count = action.nargs if isinstance(action.nargs, int) else None
        many = count is not None or action.nargs in ('+', '*')
        items = value if isinstance(value, list) else [value]
        if many != isinstance(value, list) or count not in (None, len(items)):
            expected = f'a list of {count}' if count else 'a list' if many else 'one value'
            raise UserError(f'{where}: expected {expected}, got {value!r}')
        try:
            if any(item is None or isinstance(item, bool | list | dict) for item in items):
                raise ValueError(value)
            items = [(action.type or str)(str(item)) for item in items]
        except (ValueError, argparse.ArgumentTypeError) as error:
            raise UserError(f'{where}: invalid value {value!r}') from error
        if action.choices and not set(items) <= set(action.choices):
            raise UserError(f'{where}: {value!r} is not one of {", ".join(map(str, action.choices))}')
        return items if many else items[0]


def underscored(word: str) -> str:
    """`--some-flag=a-b` -> `--some_flag=a-b`"""
    if not word.startswith('--'):
        return word
    flag, equals, value = word.partition('=')
    return '--' + flag[2:].replace('-', '_') + equals + value


def closest(word: str, known) -> str:
    """'; did you mean --epochs?' or nothing."""
    found = difflib.get_close_matches(word.partition('=')[0], list(known), n=3)
    return f'; did you mean {" or ".join(found)}?' if found else ''


def find_recipe(name: str) -> Path:
    """The file at a path, or the one in scripts/recipes of that bare name. Raises UserError with the closest names."""
    path = Path(name)
    if path.exists() and not path.is_dir():
        return path
    ours = {file.stem: file for file in sorted(RECIPES.glob('*.yaml'))}
    stem = path.name.removesuffix('.yaml')
    if stem in ours and path.parent == Path('.'):
        return ours[stem]
    raise UserError(f'there is no recipe {name}{closest(stem, ours) or f"; those in {RECIPES} go by their names"}')


def read_recipe(path: Path, stage: str = '') -> dict:
    """The flags of a recipe file, less its `recipe` entry of provenance. Raises UserError for what is not a recipe."""
    about, flags = load_recipe(path)
    if stage and about and about.get('stage') != stage:
        raise UserError(f'{path} is a recipe for main_{about.get("stage")}.py, not for main_{stage}.py')
    return flags


def load_recipe(path: Path) -> tuple[dict, dict]:
    """The `recipe` entry of a file, and the rest."""
    try:
        text = path.read_text(encoding='utf-8')
        check_events(text)
        content = yaml.load(text, Loader=RecipeLoader)
    except OSError as error:
        raise UserError(f'cannot read the recipe {path}: {error.strerror}') from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f'{path} cannot be read as a recipe: {error}') from error
    if not isinstance(content, dict) or not isinstance(content.get('recipe', {}), dict):
        raise UserError(f'{path} is not a recipe: it should hold flag: value lines, and recipe: its stage, source, ...')
    return content.pop('recipe', {}), content


def check_events(text: str, deepest: int = 10) -> None:
    """Raise YAMLError for aliases, of which few bytes can make more than any memory holds, and for deep nesting."""
    depth = 0
    for event in yaml.parse(text, Loader=RecipeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent) or depth > deepest:
            what = f'*{event.anchor}, an alias' if isinstance(event, yaml.AliasEvent) else 'nesting too deep'
            raise yaml.YAMLError(f'{what} in line {event.start_mark.line + 1}: a recipe has none')


def recipes_for(model: str, stage: str) -> list[str]:
    """Paths of the recipes of a model, relative to the repository."""
    found = []
    for path in sorted(RECIPES.glob('*.yaml')):
        about, flags = load_recipe(path)
        if flags.get('model') == model and about.get('stage') == stage:
            found.append(str(path.relative_to(RECIPES.parent.parent)))
    return found


class KeyValues(argparse.Action):
    """`key=value ...` -> {key: literal}, added to those of a recipe."""

    def __call__(self, parser, namespace, words, option_string=None):
        pairs = {}
        for word in words:
            key, equals, text = word.partition('=')
            if not equals or not key.isidentifier():
                raise UserError(f'{option_string} expects key=value, got {word!r}')
            try:
                pairs[key] = ast.literal_eval(text)
            except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):  # no literal, or one too deep
                pairs[key] = text
        setattr(namespace, self.dest, getattr(namespace, self.dest) | pairs)


# --------------------------------------------------------------------------
# arguments of both mains


def add_common_args(
    parser: Parser,
    *,
    model: str,
    batch_size: int,
    epochs: int,
    blr: float,
    warmup_epochs: float,
    min_lr: float,
    betas: list[float],
) -> None:
    """Everything that pretraining and fine-tuning share; the defaults that differ are the parameters."""
    add = parser.add_argument
    add('--config', default='', metavar='YAML', help='recipe that sets defaults, or its name; flags override it')
    add_model_args(parser, model)

    add('--batch_size', type=int, default=batch_size, help='images per process and forward')
    add('--epochs', type=int, default=epochs, help='passes over the data')
    add('--accum_iter', type=int, default=1, help='forwards per optimiser step')
    add('--effective_batch_size', type=int, help='images per optimiser step; solves for accum_iter')

    add('--lr', type=float, help='absolute learning rate; default: from --blr')
    add('--blr', type=float, default=blr, help='base learning rate: lr = blr * effective batch / 256')
    add('--min_lr', type=float, default=min_lr, help='where the cosine ends')
    add('--min_lr_absolute', action='store_true', help='it holds for all parameters; default: times their own scale')
    add('--warmup_epochs', type=float, default=warmup_epochs, help='epochs of linear warm-up, per iteration')
    add('--warmup_lr_ratio', type=float, default=0.0, help='share of the learning rate that the warm-up starts from')
    add(
        '--warmup_shape',
        choices=('flat', 'scaled'),
        default='flat',
        help="what it multiplies: the peak (MAE's) or the scheduled rate of the moment (mmcv's)",
    )
    add('--lr_sched', choices=('cosine', 'step'), default='cosine', help='schedule after the warm-up')
    add('--cosine_start', choices=('warmup', 'zero'), default='warmup', help="where it begins: the warm-up's end, or 0")
    add('--lr_decay_epochs', type=int, nargs='+', default=[], help='boundaries of --lr_sched step')
    add('--lr_decay_rate', type=float, default=0.1, help='factor at each boundary')
    add('--sched_per_epoch', action='store_true', help='change the learning rate at epochs only, after the warm-up')
    add('--opt', choices=('adamw', 'lamb'), default='adamw', help="optimiser; LAMB is timm's")
    add('--opt_eps', type=float, help='its epsilon; default: 1e-8 for adamw, 1e-6 for lamb')
    add('--betas', type=float, nargs=2, default=betas, help='decay of its two moments')
    add('--weight_decay', type=float, default=0.05, help='decoupled from the gradient')
    add(
        '--rule_kwargs',
        nargs='+',
        action=KeyValues,
        default={},
        metavar='KEY=VALUE',
        help="options of the model's parameter rules",
    )
    add('--clip_grad', type=float, help='largest gradient norm; default, and 0: not clipped')
    add(
        '--max_bad_steps',
        type=int,
        help='steps in a row that may be left out, their loss or gradient not being finite; default: 3, fp16: 20',
    )

    add(
        '--data_path', type=Path, default=Path('data'), help='folder with train/ and val/, one folder per class in each'
    )
    add('--hflip', type=float, default=0.5, help='probability of a horizontal flip')
    add('--num_workers', type=int, default=10, help='loader processes per process')
    add('--bad_images', choices=('raise', 'skip'), default='raise', help='what becomes of images that cannot be read')
    add('--max_bad_images', type=float, default=0.001, help='largest share of the images that --bad_images skip skips')
    add('--data_retries', type=int, default=5, help='attempts to read from storage that is gone, after the first')
    add('--pin_mem', action='store_true', default=True, help='pinned batches, for faster copies to a GPU')
    add('--no_pin_mem', action='store_false', dest='pin_mem', help='no pinned batches')

    add('--output_dir', type=Path, default=Path('output_dir'), help='checkpoints, log.txt, args.json')
    add('--log_dir', type=Path, help='TensorBoard events; default: output_dir')
    add('--print_freq', type=int, default=20, help='optimiser steps between progress lines')
    add(
        '--save_freq',
        type=int,
        default=20,
        help='epochs between numbered checkpoints; the last one is written every epoch',
    )
    add(
        '--save_freq_steps',
        type=int,
        default=0,
        help='optimiser steps between writes of the last one; 0: at epochs only',
    )
    add('--keep_last', type=int, default=0, help='numbered checkpoints to keep, the newest good ones; 0: all')
    add('--resume', default='', metavar='PATH', help="checkpoint to go on from; 'auto': the last of output_dir, if any")
    add('--start_epoch', type=int, default=0, help='first epoch of a run that is not resumed')

    add('--amp_dtype', choices=('bf16', 'fp16', 'none'), help='autocast; default: bf16 on a GPU that has it, else none')
    layout = dict(dest='channels_last', default=None)
    add('--channels_last', action='store_true', help='NHWC in memory; default: for networks that convolve', **layout)
    add('--no_channels_last', action='store_false', help='NCHW in memory, whatever the network', **layout)
    add('--grad_checkpoint', action='store_true', help='keep fewer activations, and make them again for the gradients')
    add('--compile', action='store_true', help='torch.compile the model')
    add('--deterministic', action='store_true', help='only deterministic kernels, for bit-exact repeats on a GPU')
    add('--dist_url', default='env://', help='rendezvous of the processes')
    add('--dist_timeout', type=float, default=600, help='seconds until a silent rank ends the run')
    add('--world_size', type=int, help='checked against the processes that were launched')
    # old launch scripts pass these; ranks come from the environment
    add('--local_rank', type=int, help=argparse.SUPPRESS)
    add('--dist_on_itp', action='store_true', help=argparse.SUPPRESS)


def add_model_args(parser: Parser, model: str) -> None:
    """The model, its input, and where it runs."""
    add = parser.add_argument
    add('--model', default=model, help='name of a function in a models_*.py')
    add('--model_kwargs', nargs='+', action=KeyValues, default={}, metavar='KEY=VALUE', help='more of its arguments')
    add('--input_size', type=int, default=224, help='image side in pixels')
    add('--max_pixels', type=int, default=MAX_PIXELS, help='images of more are not decoded')
    add('--mean', type=float, nargs=3, default=list(IMAGENET_MEAN), help='channel means of values in 0..1')
    add('--std', type=float, nargs=3, default=list(IMAGENET_STD), help='channel standard deviations')
    add('--device', default='cuda' if torch.cuda.is_available() else 'cpu', help='cuda, cuda:N or cpu')
    add('--seed', type=int, default=0, help='of everything random')


RANGES = {  # of flags that either main may have; none may be nan
    'batch_size epochs accum_iter input_size eval_size print_freq save_freq recount repeated_aug': (1, math.inf),
    'max_pixels': (1, math.inf),
    'warmup_epochs weight_decay min_lr clip_grad': (0, LARGEST),
    'num_workers save_freq_steps keep_last max_bad_steps vis_freq seed start_epoch': (0, math.inf),
    'mixup cutmix color_jitter ema_warmup_epochs data_retries': (0, math.inf),
    'hflip mixup_prob mixup_switch_prob ema_decay ema_warmup_ratio layer_decay warmup_lr_ratio': (0, 1),
    'drop_path smoothing reprob betas max_bad_images': (0, BELOW_ONE),
    'lr blr dist_timeout opt_eps std': (ABOVE_ZERO, LARGEST),
    'mask_ratio': (0, 1),
    'crop_scale crop_pct cutmix_minmax lr_decay_rate': (ABOVE_ZERO, 1),
}


def check_common_args(args: argparse.Namespace) -> None:
    """Raise UserError for numbers that cannot be, before anything is started."""
    for names, (low, high) in RANGES.items():
        for name in names.split():
            value = getattr(args, name, None)
            for number in value if isinstance(value, list) else [value]:
                if number is not None and not low <= number <= high:
                    raise UserError(f'--{name} must be {range_in_words(low, high)}, got {number}')
    for name in ('crop_scale', 'cutmix_minmax'):
        pair = getattr(args, name, None)
        if pair and pair[0] > pair[1]:
            raise UserError(f'--{name} takes the smaller share first, got {pair}')
    if '://' in getattr(args, 'resume', '') and not getattr(args, 'eval', False):
        raise UserError(f'--resume {args.resume}: a run goes on from a file of its own; --finetune takes URLs')
    for name in ('output_dir', 'log_dir'):
        if folder := getattr(args, name, None):
            check_apart(name, folder, args.data_path, getattr(args, 'dataset', 'folder'))
    dist.own_device(args.device)
    world_size = dist.place().world_size
    if getattr(args, 'world_size', None) not in (None, world_size):
        raise UserError(
            f'--world_size {args.world_size}, but {world_size} process(es) were launched (by torchrun or srun)'
        )


def check_apart(name: str, folder: Path, data_path: Path, dataset: str) -> None:
    """Raise UserError if what a run writes would lie among the images that it reads."""
    folder, data = folder.resolve(), data_path.resolve()
    images = [data / split for split in ('train', 'val') if (data / split).is_dir()]
    if not images and dataset == 'folder':  # images nested at will; other data sets are read from their lists
        images = [data]
    if folder == data or any(folder.is_relative_to(split) for split in images):
        raise UserError(f'--{name} {folder} is among the images of --data_path {data_path}; keep them apart')


def range_in_words(low: float, high: float) -> str:
    least = 'more than 0' if low == ABOVE_ZERO else f'at least {low}'
    return least + {math.inf: '', LARGEST: ' and finite', 1: ' and at most 1', BELOW_ONE: ' and less than 1'}[high]


def check_schedule(args: argparse.Namespace) -> None:
    """Raise UserError for a schedule that cannot be."""
    if args.warmup_epochs >= args.epochs:
        raise UserError(f'--warmup_epochs {args.warmup_epochs:g} must be less than --epochs {args.epochs}')
    if args.start_epoch >= args.epochs:
        raise UserError(f'--start_epoch {args.start_epoch} leaves nothing of --epochs {args.epochs}')
    check_boundaries(args)
    lr, arithmetic = scaled_lr(args, accumulation(args))
    if args.lr_sched == 'cosine' and args.min_lr > lr:
        raise UserError(f'--min_lr {args.min_lr:g}, where the cosine ends, is above its peak: {arithmetic}')


def check_boundaries(args: argparse.Namespace) -> None:
    """Raise UserError for steps of the learning rate that would never come, or in no order."""
    epochs = args.lr_decay_epochs
    if args.lr_sched == 'step' and not epochs:
        raise UserError('--lr_sched step needs --lr_decay_epochs')
    rising = all(a < b for a, b in itertools.pairwise(epochs))
    if args.lr_sched == 'step' and not (rising and epochs[0] > 0 and epochs[-1] < args.epochs):
        raise UserError(
            f'--lr_decay_epochs must rise, from 1 at least to below --epochs {args.epochs}, '
            f'got {" ".join(map(str, epochs))}'
        )


def accumulation(args: argparse.Namespace) -> int:
    """Forwards per optimiser step, from --accum_iter or solved from --effective_batch_size."""
    per_forward = args.batch_size * dist.place().world_size
    if args.effective_batch_size is None:
        return args.accum_iter
    if args.effective_batch_size < 1 or args.effective_batch_size % per_forward:
        raise UserError(
            f'--effective_batch_size {args.effective_batch_size} is not a multiple of '
            f'batch {args.batch_size} x ranks {dist.place().world_size} = {per_forward}'
        )
    solved = args.effective_batch_size // per_forward
    if args.accum_iter not in (1, solved):
        raise UserError(
            f'--accum_iter {args.accum_iter} contradicts --effective_batch_size {args.effective_batch_size}, '
            f'which at {per_forward} images a forward needs {solved}'
        )
    return solved


def scaled_lr(args: argparse.Namespace, accum_iter: int) -> tuple[float, str]:
    """The learning rate, and the line that says where it comes from."""
    ranks = dist.place().world_size
    batch = args.batch_size * accum_iter * ranks
    batches = f'batch {args.batch_size} x accum {accum_iter} x ranks {ranks} = {batch}'
    if args.lr is not None:
        return args.lr, f'{batches}, lr = {args.lr:g} as given'
    lr = args.blr * batch / 256
    return lr, f'{batches}, lr = blr {args.blr:g} x {batch} / 256 = {lr:g}'


def amp_dtype(args: argparse.Namespace, device: torch.device) -> torch.dtype | None:
    """The autocast type, or None for float32."""
    if args.amp_dtype is None:
        return torch.bfloat16 if device.type == 'cuda' and torch.cuda.is_bf16_supported(False) else None
    return {'bf16': torch.bfloat16, 'fp16': torch.float16, 'none': None}[args.amp_dtype]


def memory_format(args: argparse.Namespace, core: nn.Module) -> torch.memory_format:
    """NHWC if asked, or if the network convolves: it has a convolution over more than patches that do not overlap."""
    convolves = any(m.kernel_size > m.stride for m in core.modules() if isinstance(m, nn.Conv2d))
    last = convolves if args.channels_last is None else args.channels_last
    return torch.channels_last if last else torch.contiguous_format


def plain(args: argparse.Namespace) -> dict:
    """`vars(args)` with paths as strings: what is saved with a run."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
