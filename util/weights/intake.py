"""Weights in names of any origin into a model: recognise the format, rename, resize, and account for every key.

A format is a row of a table: the keys that tell it, what its keys are called here, which of them nothing here has use
for, and a function where names alone do not do. An intake says which formats a model takes and what a file may lack.
Whatever is neither loaded nor allowed for is an error. The tables are in `published.py`.
"""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from util.errors import PROGRAMS, CheckpointError, listed, printable, program
from util.nn.pos_embed import resize_bias_table, resize_pos_embed
from util.weights.files import plain_field

State = dict[str, Tensor]
shortened = partial(listed, most=4, letters=80)  # keys


@dataclass(frozen=True)
class Origin:
    """The run that wrote a checkpoint of our own, as the file tells it: its arguments as `plain_field` has them."""

    stage: str
    args: dict
    classes: list[str] | None = None

    def __str__(self) -> str:
        options = ' '.join(f'{key}={value}' for key, value in self.args['model_kwargs'].items())
        model = printable(self.args['model'], 80) + (f' --model_kwargs {printable(options, 200)}' if options else '')
        return f'{program(self.stage)} --model {model}'


def find_origin(container: dict) -> Origin | None:
    """None for files of others."""
    args, run = container.get('args'), container.get('run', {'stage': 'finetune'})  # checkpoint-best.pth has no `run`
    if not isinstance(args, dict) or not isinstance(run, dict):
        return None
    args = {key: plain_field(args[key]) for key in args}
    if not isinstance(args.get('model'), str) or not isinstance(args.get('model_kwargs'), dict):
        return None
    stage = next((stage for stage in PROGRAMS if stage == run.get('stage')), 'finetune')
    return Origin(stage, args, class_names(container))


def class_names(container: dict) -> list[str] | None:
    """The classes that a network knows, in their order, by our files and mmsegmentation's; None if not told."""
    meta = container.get('meta')
    meta = meta if isinstance(meta, dict) else {}
    inner = meta.get('dataset_meta')
    names = container.get('classes') or meta.get('CLASSES') or (isinstance(inner, dict) and inner.get('classes'))
    plain = isinstance(names, list | tuple) and 0 < len(names) <= 1_000_000
    return list(names) if plain and all(isinstance(name, str) and len(name) <= 1000 for name in names) else None


class OtherFormatError(CheckpointError):
    """A checkpoint that is none of a model's formats: another's, or an encoder alone for a model with a decoder."""


@dataclass
class Report:
    """What became of every key: of the file (loaded, resized, ignored) and of the model (missing)."""

    source: str = ''
    format: str = ''
    origin: Origin | None = None
    loaded: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)  # 'pos_embed [1, 197, 768] -> [1, 577, 768]'
    resizing: set[str] = field(default_factory=set)  # how
    ignored: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)  # stay as initialised
    hint: str = ''  # what else the file holds

    def __str__(self) -> str:
        parts = [f'{len(self.loaded)} loaded']
        rest = {'resized': self.resized, 'ignored': self.ignored, 'missing, stay as initialised': self.missing}
        how = {'resized': ' ' + ' and '.join(sorted(self.resizing))}
        parts += [f'{len(keys)} {what} ({shortened(keys)}){how.get(what, "")}' for what, keys in rest.items() if keys]
        return f'{self.source}: {self.format}: ' + ', '.join(parts) + self.hint


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
        if matches(key, self.ignorable):
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
    part: str = ''  # pattern of the prefix of what counts, where a file holds more
    computed: tuple[str, ...] = ()  # what the model has without a file, in its own size
    moved: tuple[str, str] = ('', '')  # a prefix of keys that belong to `part`, and the part's


COMMON_WRAPPERS = ('model', 'state_dict', 'model_state_dict', 'module', 'student')
# a classifier's last layer, as timm's networks call it
HEADS = r'(heads?(_dist)?|classif(ier)?|fc|last_linear)\..*'
AVERAGED = re.compile(r'(.*[._-])?(ema|swa|averag\w*)([._-].*)?', re.IGNORECASE)
# what trainers call the network that they train, where a file holds others beside it
TRAINED = {'model', 'module', 'backbone', 'encoder', 'student', 'net', 'network', '_orig_mod', 'base_encoder', 'online'}

# --------------------------------------------------------------------------
# loading


def load(
    model: nn.Module, container: dict, intake: Intake | None, ema: bool, flag: str, target: State | None = None
) -> Report:
    """Fill the model from what a checkpoint holds; without an intake, from our own checkpoint of it.

    `flag` is how a user asks for averaged weights (`ema`). `target` are the weights to fill, if not all of the model:
    those of a pretraining model's encoder. Raises CheckpointError, and changes nothing then.
    """
    whole = hasattr(model, 'encoder_state_dict') and target is None
    target, own = target or model.state_dict(), () if whole else ('encoder',)
    report = Report(origin=find_origin(container))
    found = find_weights(container, (*(intake.wrappers if intake else own), *COMMON_WRAPPERS))
    weights = join_parts(plain_or_averaged(container, found, ema, flag, report))
    report.ignored += [str(key) for key, value in weights.items() if not isinstance(value, Tensor | np.ndarray | tuple)]
    paddle = is_paddle(weights)
    state = torch_state(weights, paddle)
    if intake and intake.part:
        away, part = intake.moved
        state = unique((part + key.removeprefix(away) if key.startswith(away) else key, x) for key, x in state.items())
    if intake and intake.part and (found_part := next(filter(None, map(re.compile(intake.part).match, state)), None)):
        state = take_off(found_part[0], state, report)
    formats = intake.formats if intake else (Format(f'own names of {type(model).__name__}', set()),)
    layout, prefix = recognise(state, formats, list(target))
    report.format = layout.name + (' (Paddle)' if paddle else '') + report.format
    state = take_off(prefix, state, report) if prefix else state
    if not intake:
        intake = Intake((), formats) if whole else own_names(target, state, formats, found is container.get('encoder'))

    report.ignored += [key for key in state if layout.rename(key) is None]
    renamed = unique((name, value) for key, value in state.items() if (name := layout.rename(key)))
    renamed = layout.adapt(renamed, model)
    fit(renamed, target, intake, report)
    if not renamed:
        raise CheckpointError(f'none of its weights is for this model: its keys are {shortened(list(state))}')
    check(renamed, target, intake, report)
    check_finite(renamed)

    with torch.no_grad():
        for name, value in renamed.items():
            target[name].copy_(value)
    report.loaded = sorted(renamed)
    report.missing = [name for name in target if name not in renamed and not matches(name, intake.computed)]
    return report


def own_names(target: State, state: State, formats: tuple[Format, ...], is_encoder: bool) -> Intake:
    """For a classifier that no table knows: our own checkpoints of it, strictly, in the names of `target`.

    But it gets its head, and whatever else it has that an encoder has nothing of, not from an encoder; and a head for
    other classes is dropped and stays as initialised.
    """
    heads = [name for name in target if name in state and re.fullmatch(HEADS, name)]
    known = {name.partition('.')[0] for name in state}  # blocks.11 is no whole of its own: blocks is
    lacking = [name for name in target if is_encoder and name.partition('.')[0] not in known]
    return Intake((), formats, tuple(map(re.escape, heads + lacking)), tuple(map(re.escape, heads)))


def find_weights(container: dict, wrappers: tuple[str, ...]) -> dict:
    """The first dict under one of these names, and in that one again, or else the container itself."""
    for _ in range(3):
        container = next((container[name] for name in wrappers if isinstance(container.get(name), dict)), container)
    return container


def is_segmentation(container: dict) -> bool:
    """Whether it holds a segmenter, in the names of ours or of mmsegmentation."""
    return any('decode_head.' in str(key) for key in find_weights(container, COMMON_WRAPPERS))


def is_detection(container: dict) -> bool:
    """Whether it holds a detector, in the names of ours or of detectron2."""
    return any('roi_heads.' in str(key) for key in find_weights(container, COMMON_WRAPPERS))


def plain_or_averaged(container: dict, found: dict, ema: bool, flag: str, report: Report) -> dict:
    """Of the weights that were found, or of averages in the file, what was asked for. Raises CheckpointError."""
    twins = {twin: key for key in found if (twin := f'ema_{key}'.replace('.', '_')) in found}  # of mmcv's hook
    where, average = find_average(container, found, twins)
    if not ema:
        report.ignored += twins
        if average and not any(isinstance(value, Tensor | np.ndarray | tuple) for value in found.values()):
            raise CheckpointError(f'holds averaged weights alone ({printable(where, 80)}): {flag} takes them')
        if average and average is not found:
            report.hint = f'; the file also holds averaged weights ({printable(where, 80)}): {flag} takes them'
        return {key: value for key, value in found.items() if key not in twins} if twins else found
    if average:
        report.format = f', averaged weights ({printable(where, 80)})'
    elif 'weights' not in container:  # checkpoint-best.pth holds the better of the two networks
        off = f'--no_{flag[2:]}'
        raise CheckpointError(f'no averaged weights in it: drop {flag}, or give {off} if a recipe turns it on')
    return average or found


def find_average(container: dict, found: dict, twins: dict[str, str]) -> tuple[str, dict | None]:
    """Averaged weights, and where they are: beside those that were found, or among them."""
    if {'ema_state_dict', 'message_hub'} <= container.keys():  # OpenMMLab's runs, where the two have changed places
        return 'state_dict', found
    for key, value in container.items():
        if isinstance(value, dict) and AVERAGED.fullmatch(str(key)):
            inner = find_weights(value, (*COMMON_WRAPPERS, 'shadow'))
            if any(isinstance(weight, Tensor | np.ndarray) for weight in inner.values()):
                return str(key), inner
    if twins:
        plain = {key: value for key, value in found.items() if key not in twins}
        return 'ema_*', plain | {key: found[twin] for twin, key in twins.items()}
    parts = (key.partition('.')[0] for key in map(str, found) if '.' in key)
    if part := next(filter(AVERAGED.fullmatch, parts), None):
        return f'{part}.*', {key: value for key, value in found.items() if str(key).startswith(f'{part}.')}
    return '', None


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


def is_paddle(weights: dict) -> bool:
    """Whether arrays are Paddle's. Those of detectron2 are in torch's layout."""
    arrays = any(isinstance(value, np.ndarray | tuple) for value in weights.values())
    return arrays and not any(str(key).startswith('proposal_generator.') for key in weights)


def torch_state(weights: dict, paddle: bool) -> State:
    """The tensors, without what wrappers put into the names of blocks; Paddle's linear layers are transposed."""
    tensors = {str(key): as_tensor(str(key), value, paddle) for key, value in weights.items()}
    tensors = {key: value for key, value in tensors.items() if isinstance(value, Tensor)}
    if not tensors:
        raise OtherFormatError(f'no weights in it; its keys are {shortened(list(weights))}')
    wrapped = re.compile(r'(?<=\d\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.')
    return unique((wrapped.sub('', key), value) for key, value in tensors.items())


def as_tensor(key: str, value, paddle: bool):
    if isinstance(value, tuple) and value:  # paddle.save of a whole run: (a name inside Paddle, array)
        value = value[-1]
    if not isinstance(value, np.ndarray):
        return value
    value = torch.from_numpy(value.astype(value.dtype.newbyteorder('='), copy=False))
    # linear layers are recognised by name, never by shape: many are square
    return value.t() if paddle and value.ndim == 2 and key.endswith(('.weight', '.weight_v')) else value


def unique(items: Iterable[tuple[str, Tensor]]) -> State:
    state = {}
    for name, value in items:
        if name in state:
            raise CheckpointError(f'two of its keys stand for {printable(name, 80)}')
        state[name] = value
    return state


def recognise(state: State, formats: tuple[Format, ...], own: list[str]) -> tuple[Format, str]:
    """The first of the formats that the keys fit, and the prefix under which they do.

    `own` are the model's keys; some of them tell a format that has no marks: the model's own names.
    """
    layouts = [(layout, layout.marks or set(own[:5])) for layout in formats]
    whole = ((layout, '') for layout, marks in layouts if state.keys() >= marks)
    under = ((layout, prefix) for layout, marks in layouts if (prefix := find_prefix(state, marks, own)))
    layout, prefix = next(whole, None) or next(under, None) or (formats[-1], None)
    if prefix is None and layout.marks:
        known = ', '.join(dict.fromkeys(layout.name for layout in formats if not layout.refusal))
        keys = shortened(list(state))
        raise OtherFormatError(f'not a checkpoint for this model: its keys are {keys}; known are {known}')
    if layout.refusal:
        raise OtherFormatError(f'{layout.name}: {layout.refusal}')
    return layout, prefix or ''


def take_off(prefix: str, state: State, report: Report) -> State:
    """What stands under a prefix, without it; the rest is ignored, and named by its parts."""
    outside = [key for key in state if not key.startswith(prefix)]
    parts = list(dict.fromkeys(key.partition('.')[0] for key in outside))
    report.ignored += outside
    beside = f' beside {listed(parts, 8, 80)}' if parts else ''
    report.format += f', prefix {printable(prefix, 80)} taken off{beside}'
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def find_prefix(state: State, marks: set[str], own: list[str]) -> str:
    """The prefix under which keys stand in a file, of the trained network if there are several; '' if under none.

    Raises CheckpointError where that is not clear.
    """
    mark, parts = min(marks), {name.partition('.')[0] for name in own}
    found = [key.removesuffix(mark) for key in state if key.endswith(f'.{mark}') and key.partition('.')[0] not in parts]
    found = sorted((prefix for prefix in found if all(prefix + other in state for other in marks)), key=prefix_rank)
    if len(found) > 1 and prefix_rank(found[0]) == prefix_rank(found[1]):
        raise CheckpointError(f'holds several networks for this model, under {shortened(found)}: keep one of them')
    return found[0] if found else ''


def prefix_rank(prefix: str) -> tuple:
    """What the trained network stands under comes before averages and others, and the outer before the inner one."""
    parts = prefix.split('.')[:-1]
    return any(map(AVERAGED.fullmatch, parts)), len(set(parts) - TRAINED), len(parts)


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def fit(renamed: State, target: State, intake: Intake, report: Report) -> None:
    """Resize tables of positions and drop what may be dropped. Changes `renamed`."""
    for name, value in list(renamed.items()):
        if not same(name, renamed, target):
            computed = matches(name, intake.computed)
            if name in target and not computed and (found := resized(name, value, target[name])):
                table, how = found
                renamed[name] = table
                report.resizing |= {how}
                report.resized.append(f'{name} {list(value.shape)} -> {list(table.shape)}')
            elif computed or matches(name, intake.may_drop):
                del renamed[name]
                report.ignored.append(f'{name} {list(value.shape)}')


# how names of tables of positions end, along which axis these go, and how many rows there may be beside a square grid's
POSITIONS = (
    ('pos_embed', 1, (0, 1), resize_pos_embed),  # [1, L, D]; a class token's
    ('relative_position_bias_table', 0, (0, 3), resize_bias_table),  # [L, heads]; of BEiT's class token
)


def resized(name: str, value: Tensor, wanted: Tensor) -> tuple[Tensor, str] | None:
    """A table of positions in the model's size, and how that was done; None for all else."""
    if re.search(r'\.rel_pos_[hw]$', name) and value.ndim == 2 and value.shape[1] == wanted.shape[1]:
        return F.interpolate(value.t()[None].float(), len(wanted), mode='linear')[0].t().to(value.dtype), 'linearly'
    for ending, axis, choices, resize in POSITIONS:
        if name.endswith(ending) and value.ndim == wanted.ndim == axis + 2 and value.is_floating_point():
            old, new = value.shape[axis], wanted.shape[axis]
            extra = extra_rows(new, choices)
            others_equal = value.shape == (*wanted.shape[:axis], old, *wanted.shape[axis + 1 :])
            if others_equal and extra is not None and extra == extra_rows(old, choices):
                spaced = "linearly between points at BEiT's distances"
                return resize(value, new, extra), spaced if extra == 3 else 'bicubically'
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
        and not (name not in renamed and matches(name, intake.may_lack + intake.computed))
    ]
    if differing:
        first = '; '.join(
            f'{printable(n, 80)}: file {shape(renamed, n)}, model {shape(target, n)}' for n in differing[:5]
        )
        raise CheckpointError(
            f'{report.format}, but of another architecture; differing keys ({len(differing)}): {first}'
            + ('; ...' if len(differing) > 5 else '')
        )


def check_finite(state: State) -> None:
    """Raise CheckpointError naming the first tensor that holds nan or infinite values."""
    bad = [
        name
        for name, value in state.items()
        if value.is_floating_point() and not value.is_meta and not value.isfinite().all()
    ]
    if bad:
        raise CheckpointError(
            f'its weights are not finite (nan or infinite); first such key: {printable(bad[0], 80)}, '
            f'{len(bad)} of {len(state)} tensors'
        )
