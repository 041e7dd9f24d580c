"""Weights in names of any origin into a model: recognise the format, rename, resize, and account for every key.

A format is a row of a table: the keys that tell it, what its keys are called here, which of them nothing here has use
for, and a function where names alone do not do. An intake says which formats a model takes and what a file may lack.
Whatever is neither loaded nor allowed for is an error. The tables are in `published.py`.
"""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from util.errors import CheckpointError, printable
from util.nn.pos_embed import resize_bias_table, resize_pos_embed

State = dict[str, Tensor]


@dataclass(frozen=True)
class Origin:
    """The run that wrote a checkpoint of our own, as the file tells it."""

    stage: str
    args: dict
    classes: list[str] | None = None

    def __str__(self) -> str:
        return f'main_{self.stage}.py --model {printable(self.args["model"], 80)}'


def find_origin(container: dict) -> Origin | None:
    """None for files of others."""
    args, run = container.get('args'), container.get('run', {'stage': 'finetune'})  # checkpoint-best.pth has no `run`
    ours = isinstance(args, dict) and isinstance(args.get('model_kwargs'), dict) and isinstance(run, dict)
    return Origin(printable(run.get('stage'), 80), args, class_names(container)) if ours and 'model' in args else None


def class_names(container: dict) -> list[str] | None:
    """The classes that a fine-tuned network of our own knows, in their order; None if the file does not tell."""
    names = container.get('classes')
    plain = isinstance(names, list) and 0 < len(names) <= 1_000_000
    return list(names) if plain and all(isinstance(name, str) and len(name) <= 1000 for name in names) else None


@dataclass
class Report:
    """What became of every key: of the file (loaded, resized, ignored) and of the model (missing)."""

    source: str
    format: str
    origin: Origin | None = None
    loaded: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)  # 'pos_embed [1, 197, 768] -> [1, 577, 768]'
    ignored: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)  # stay as initialised

    def __str__(self) -> str:
        parts = [f'{len(self.loaded)} loaded']
        rest = {'resized': self.resized, 'ignored': self.ignored, 'missing, stay as initialised': self.missing}
        parts += [f'{len(keys)} {what} ({shortened(keys)})' for what, keys in rest.items() if keys]
        return f'{self.source}: {self.format}: ' + ', '.join(parts)


@dataclass(frozen=True)
class Format:
    """A published layout. `renames` and `ignorable` are regular expressions, tried in order on the whole key."""

    name: str
    marks: set[str]  # keys that together tell the format
    renames: tuple[tuple[str, str], ...] = ()
    ignorable: tuple[str, ...] = ()
    adapt: Callable[[State, nn.Module], State] = lambda state, model: state  # after renaming: what depends on the model
    refusal: str = ''  # why a format that is known cannot be loaded into this model

    def rename(self, key: str) -> str | None:
        """The key's name here, or None if the format's files may hold it and nothing here has use for it."""
        if any(re.fullmatch(pattern, key) for pattern in self.ignorable):
            return None
        for pattern, replacement in self.renames:
            if re.fullmatch(pattern, key):
                return re.sub(pattern, replacement, key)
        return key


@dataclass(frozen=True)
class Intake:
    """What a class of models takes: formats, first match first, and patterns of its own keys."""

    wrappers: tuple[str, ...]  # where a file may keep the weights, besides COMMON_WRAPPERS
    formats: tuple[Format, ...]
    may_lack: tuple[str, ...] = ()  # keys that a file may lack
    may_drop: tuple[str, ...] = ()  # keys that a file may have in another shape, or in vain


COMMON_WRAPPERS = ('model', 'state_dict', 'module')
# a classifier's last layer, as timm's networks call it
HEADS = r'(heads?(_dist)?|classif(ier)?|fc|last_linear)\..*'

# --------------------------------------------------------------------------
# loading


def load(model: nn.Module, container: dict, intake: Intake | None, label: str, ema: bool) -> Report:
    """Fill the model from what the checkpoint `label` holds; without an intake, from our own checkpoint of it.

    Raises CheckpointError, and changes nothing then.
    """
    averaged = ema and isinstance(container.get('ema'), dict)
    if ema and not averaged and 'weights' not in container:  # checkpoint-best.pth holds the better of the two networks
        raise CheckpointError('no averaged weights in it: drop --use_ema, or give --no_use_ema if a recipe turns it on')
    own = () if hasattr(model, 'encoder_state_dict') else ('encoder',)
    wrappers = ('ema',) if averaged else (*(intake.wrappers if intake else own), *COMMON_WRAPPERS)
    found = find_weights(container, wrappers)
    weights = join_parts(found)
    from_paddle = any(isinstance(value, np.ndarray | tuple) for value in weights.values())
    state = torch_state(weights)
    intake = intake or own_names(model, state, found is container.get('encoder'))
    layout = recognise(state, intake.formats)

    name = layout.name + (' (Paddle)' if from_paddle else '') + (', averaged weights' if averaged else '')
    report = Report(label, name, find_origin(container))
    report.ignored = [str(key) for key, value in weights.items() if not isinstance(value, Tensor | np.ndarray | tuple)]
    report.ignored += [key for key in state if layout.rename(key) is None]
    renamed = unique((name, value) for key, value in state.items() if (name := layout.rename(key)))
    renamed, target = layout.adapt(renamed, model), model.state_dict()
    fit(renamed, target, intake, report)
    if not renamed:
        raise CheckpointError(f'none of its weights is for this model: its keys are {shortened(list(state))}')
    check(renamed, target, intake, report)

    model.load_state_dict(renamed, strict=False)
    report.loaded = sorted(renamed)
    report.missing = [name for name in target if name not in renamed]
    return report


def own_names(model: nn.Module, state: State, is_encoder: bool) -> Intake:
    """For a class that no table knows: our own checkpoints, in the names of the model.

    All of them strictly. But a classifier gets its head, and whatever else it has that an encoder has nothing of, not
    from an encoder; and a head for other classes is dropped and stays as initialised.
    """
    formats, target = (Format(f'own names of {type(model).__name__}', set()),), model.state_dict()
    if hasattr(model, 'encoder_state_dict'):
        return Intake((), formats)
    heads = [name for name in target if name in state and re.fullmatch(HEADS, name)]
    known = {name.partition('.')[0] for name in state}  # blocks.11 is no whole of its own: blocks is
    lacking = [name for name in target if is_encoder and name.partition('.')[0] not in known]
    return Intake((), formats, tuple(map(re.escape, heads + lacking)), tuple(map(re.escape, heads)))


def find_weights(container: dict, wrappers: tuple[str, ...]) -> dict:
    """The first dict under one of these names, or else the container itself."""
    for name in wrappers:
        if isinstance(container.get(name), dict):
            return container[name]
    return container


def join_parts(weights: dict) -> dict:
    """Paddle cuts arrays beyond 1 GiB into flat `NAME@@.0`, `NAME@@.1`, ..."""
    weights = dict(weights)
    try:
        for name, parts in weights.pop('UnpackBigParamInfor@@', {}).items():
            pieces = [weights.pop(piece) for piece in parts['slices']]
            weights[name] = np.concatenate(pieces).reshape(parts['OriginShape'])
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError('damaged: the parts of its large arrays do not fit together') from error
    return weights


def torch_state(weights: dict) -> State:
    """The tensors, without the prefixes of DDP and torch.compile; Paddle's linear layers are transposed."""
    tensors = {str(key): as_tensor(str(key), value) for key, value in weights.items()}
    tensors = {key: value for key, value in tensors.items() if isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(f'no weights in it; its keys are {shortened(list(weights))}')
    return unique((re.sub(r'^(module\.|_orig_mod\.)+', '', key), value) for key, value in tensors.items())


def as_tensor(key: str, value):
    if isinstance(value, tuple) and value:  # paddle.save of a whole run: (a name inside Paddle, array)
        value = value[-1]
    if not isinstance(value, np.ndarray):
        return value
    value = torch.from_numpy(value.astype(value.dtype.newbyteorder('='), copy=False))
    # linear layers are recognised by name, never by shape: many are square
    return value.t() if value.ndim == 2 and key.endswith(('.weight', '.weight_v')) else value


def unique(items: Iterable[tuple[str, Tensor]]) -> State:
    state = {}
    for name, value in items:
        if name in state:
            raise CheckpointError(f'two of its keys stand for {printable(name, 80)}')
        state[name] = value
    return state


def recognise(state: State, formats: tuple[Format, ...]) -> Format:
    """The first of the formats that the keys fit."""
    for layout in formats:
        if state.keys() >= layout.marks:
            if layout.refusal:
                raise CheckpointError(f'{layout.name}: {layout.refusal}')
            return layout
    known = ', '.join(dict.fromkeys(layout.name for layout in formats if not layout.refusal))
    raise CheckpointError(f'not a checkpoint for this model: its keys are {shortened(list(state))}; known are {known}')


def fit(renamed: State, target: State, intake: Intake, report: Report) -> None:
    """Resize tables of positions and drop what may be dropped. Changes `renamed`."""
    for name, value in list(renamed.items()):
        if not same(name, renamed, target):
            table = resized(name, value, target[name]) if name in target else None
            if table is not None:
                renamed[name] = table
                report.resized.append(f'{name} {list(value.shape)} -> {list(table.shape)}')
            elif any(re.fullmatch(pattern, name) for pattern in intake.may_drop):
                del renamed[name]
                report.ignored.append(f'{name} {list(value.shape)}')


# how names of tables of positions end, along which axis these go, and how many rows there may be beside a square grid's
POSITIONS = (
    ('pos_embed', 1, (0, 1), resize_pos_embed),  # [1, L, D]; a class token's
    ('relative_position_bias_table', 0, (0, 3), resize_bias_table),  # [L, heads]; of BEiT's class token
)


def resized(name: str, value: Tensor, wanted: Tensor) -> Tensor | None:
    """A table of positions in the model's size; None for all else."""
    for ending, axis, choices, resize in POSITIONS:
        if name.endswith(ending) and value.ndim == wanted.ndim == axis + 2 and value.is_floating_point():
            old, new = value.shape[axis], wanted.shape[axis]
            extra = extra_rows(new, choices)
            others_equal = value.shape == (*wanted.shape[:axis], old, *wanted.shape[axis + 1 :])
            if others_equal and extra is not None and extra == extra_rows(old, choices):
                return resize(value, new, extra)
    return None


def extra_rows(length: int, choices: tuple[int, ...]) -> int | None:
    """How many of `length` rows do not belong to a square grid: the first of the choices that can be, or None."""
    return next((n for n in choices if length > n and math.isqrt(length - n) ** 2 == length - n), None)


def same(name: str, renamed: State, target: State) -> bool:
    """Whether both have the key, in one shape, and as the same kind of number."""
    if name not in renamed or name not in target:
        return False
    value, wanted = renamed[name], target[name]
    return value.shape == wanted.shape and value.is_floating_point() == wanted.is_floating_point()


def check(renamed: State, target: State, intake: Intake, report: Report) -> None:
    """Raise CheckpointError if a key is left over, lacking, or of another shape."""

    def shape(state: State, name: str) -> str:
        if name not in state:
            return 'absent'
        return f'{list(state[name].shape)}' + ('' if state[name].is_floating_point() else f' {state[name].dtype}')

    differing = [
        name
        for name in (target | renamed)
        if not same(name, renamed, target)
        and not (name not in renamed and any(re.fullmatch(pattern, name) for pattern in intake.may_lack))
    ]
    if differing:
        first = '; '.join(
            f'{printable(n, 80)}: file {shape(renamed, n)}, model {shape(target, n)}' for n in differing[:5]
        )
        raise CheckpointError(
            f'{report.format}, but of another architecture; differing keys ({len(differing)}): {first}'
            + ('; ...' if len(differing) > 5 else '')
        )


def shortened(keys: list, most: int = 4) -> str:
    """'a, b, c, d, ...'"""
    return ', '.join(printable(key, 80) for key in keys[:most]) + (', ...' if len(keys) > most else '')
