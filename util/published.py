"""Checkpoints of any origin into our models: recognise the format, rename, resize, and account for every key.

This is the one file of `util` that knows the methods by name. A format is a row of a table: the keys that tell it, what
its keys are called here, which of them nothing here has use for, and a function where names alone do not do. `INTAKES`
says which formats a model takes and what a file may lack. Whatever is neither loaded nor allowed for is an error.

What no file can tell: the number of attention heads (12 in MIRL's small models, not timm's 6), and where segments of
unequal length end. Both are the model's to get right.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from util.errors import CheckpointError
from util.pos_embed import resize_pos_embed, sincos_2d
from util.unpickle import printable
from util.weight_files import read_checkpoint

State = dict[str, Tensor]


@dataclass
class Report:
    """What became of every key: of the file (loaded, resized, ignored) and of the model (missing)."""

    source: str
    format: str
    loaded: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)  # 'pos_embed [1, 197, 768] -> [1, 577, 768]'
    ignored: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)  # stay as initialised

    def __str__(self) -> str:
        parts = [f'{len(self.loaded)} loaded']
        for keys, what in ((self.resized, 'resized'), (self.ignored, 'ignored'), (self.missing, 'missing, start anew')):
            if keys:
                parts.append(f'{len(keys)} {what} ({shortened(keys)})')
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

# --------------------------------------------------------------------------
# MIRL


def mirl_decoders(state: State, model: nn.Module) -> State:
    """Check the number of segments, number the deepest one's norm, and give fixed gains torch's shape [1, E]."""
    found = 1 + max((int(m[1]) for key in state if (m := re.match(r'decoders\.(\d+)\.', key))), default=-1)
    own = len(model.decoders)
    if found != own:
        raise CheckpointError(f'has {found} segments, the model {own}: pass --model_kwargs num_segments={found}')
    return unique(
        (
            re.sub(r'^norms\.-1\.', f'norms.{own - 1}.', key),
            value.reshape(1, -1) if key.endswith('.original0') else value,
        )
        for key, value in state.items()
    )


def sincos_table(state: State, model: nn.Module) -> State:
    """A pretraining file may lack its fixed position embedding, which fine-tuning starts from."""
    _, length, dim = model.pos_embed.shape
    return state if 'pos_embed' in state else state | {'pos_embed': sincos_2d(dim, round((length - 1) ** 0.5))}


VIT_MARKS = {'cls_token', 'patch_embed.proj.weight', 'blocks.0.attn.qkv.weight'}
MIRL_MARKS = {'decoder_embed0_1.weight'}
OUR_MIRL_MARKS = {'memory_embed.weight'}
MAE_MARKS = {'mask_token', 'decoder_embed.weight', 'decoder_pred.weight'}

INTO_MIRL = (
    Format('our MIRL pretraining', OUR_MIRL_MARKS, adapt=mirl_decoders),
    Format(
        'published MIRL pretraining',
        MIRL_MARKS,
        renames=(
            (r'decoder_embed0_1\.(.*)', r'memory_embed.\1'),
            (r'mask_token(\d+)', r'decoders.\1.mask_token'),
            (r'decoder_embed(\d+)\.(.*)', r'decoders.\1.embed.\2'),
            (r'decoder_blocks(\d+)\.(.*)', r'decoders.\1.blocks.\2'),
            (r'decoder_norm(\d+)\.(.*)', r'decoders.\1.norm.\2'),
            (r'decoder_pred(\d+)\.weight_g', r'decoders.\1.pred.parametrizations.weight.original0'),
            (r'decoder_pred(\d+)\.weight_v', r'decoders.\1.pred.parametrizations.weight.original1'),
            (r'decoder_pred(\d+)\.(.*)', r'decoders.\1.pred.\2'),
            (r'norm(\d+)\.(.*)', r'norms.\1.\2'),
            (r'norm\.(.*)', r'norms.-1.\1'),
        ),
        ignorable=(r'decoder_pos_embed\d+',),
        adapt=mirl_decoders,
    ),
    Format('MAE pretraining', MAE_MARKS, refusal="holds MAE's decoder, not MIRL's"),
    Format(
        'ViT',
        VIT_MARKS,
        refusal='holds no decoders: main_finetune.py --finetune takes it, pretraining cannot go on from it',
    ),
)

# --------------------------------------------------------------------------
# LocalMIM: a ViT and a Swin, pretrained, and a fine-tuned Swin whose merging layers end a stage

LOCALMIM_MARKS = {'cls_token', 'decoder.0.pred.4.weight'}
LOCALMIM_SWIN_MARKS = {'encoder.norm.0.weight', 'decoder.0.pred.weight'}
OUR_LOCALMIM_MARKS = {'cls_token', 'decoders.0.pred.4.weight'}
OUR_LOCALMIM_SWIN_MARKS = {'layers.0.downsample.norm.weight', 'decoders.0.pred.weight'}
SWIN_MARKS = {'layers.0.blocks.0.attn.relative_position_bias_table', 'layers.0.downsample.norm.weight'}
LOCALMIM_RENAMES = (
    (r'(?:encoder\.)?norm\.(\d.*)', r'norms.\1'),
    (r'encoder\.(.*)', r'\1'),
    (r'decoder\.(.*)', r'decoders.\1'),
    (r'hog_enc\.(\d)\.conv\.bias', r'hog_bias.\1'),
)
LOCALMIM_BUFFERS = (r'decoder\.\d\.pos_embed', r'hog_enc\.\d\.conv\.weight')
SWIN_BUFFERS = (r'.*\.relative_position_index', r'.*\.attn_mask')


def merging_order(state: State, model: nn.Module) -> State:
    """The published Swin was pretrained with neighbours merged row by row; other Swins merge them column by column.

    A model that is to be correct gets the weights in its order: the middle two of four parts change places.
    """
    if model.coords != 'correct':
        return state
    return {
        key: value[..., torch.arange(value.shape[-1]).view(4, -1)[[0, 2, 1, 3]].flatten()]
        if re.fullmatch(r'layers\.\d\.downsample\.(norm\.weight|norm\.bias|reduction\.weight)', key)
        else value
        for key, value in state.items()
    }


INTO_LOCALMIM_VIT = (
    Format('our LocalMIM pretraining', OUR_LOCALMIM_MARKS),
    Format('published LocalMIM pretraining', LOCALMIM_MARKS, LOCALMIM_RENAMES, LOCALMIM_BUFFERS),
)

INTO_LOCALMIM_SWIN = (
    Format('our LocalMIM pretraining', OUR_LOCALMIM_SWIN_MARKS),
    Format(
        'published LocalMIM pretraining',
        LOCALMIM_SWIN_MARKS,
        LOCALMIM_RENAMES,
        (*LOCALMIM_BUFFERS, *SWIN_BUFFERS),
        adapt=merging_order,
    ),
)

INTO_LOCALMIM_SWIN_CLASSIFIER = (
    Format('our LocalMIM pretraining', OUR_LOCALMIM_SWIN_MARKS, ignorable=(r'(decoders|norms|hog_bias)\..*',)),
    Format(
        'published LocalMIM pretraining',
        LOCALMIM_SWIN_MARKS,
        LOCALMIM_RENAMES,
        (*SWIN_BUFFERS, r'decoder\..*', r'hog_enc\..*', r'encoder\.norm\..*'),
        adapt=merging_order,
    ),
    Format('Swin', SWIN_MARKS, ignorable=SWIN_BUFFERS),  # fine-tuned, published or our own, and our encoders
)

INTO_VIT = (
    Format(
        'our MIRL pretraining',
        OUR_MIRL_MARKS,
        ignorable=(r'(memory_embed|decoders|norm_low)\..*', r'norms\.\d+\..*'),
        adapt=sincos_table,
    ),
    Format(
        'published MIRL pretraining',
        MIRL_MARKS,
        ignorable=(r'mask_token\d+', r'decoder_.*', r'norm_low\..*', r'norm\d+\..*'),
        adapt=sincos_table,
    ),
    Format(
        'our LocalMIM pretraining',
        OUR_LOCALMIM_MARKS,
        ignorable=(r'(decoders|norms|hog_bias)\..*',),
        adapt=sincos_table,
    ),
    Format(
        'published LocalMIM pretraining',
        LOCALMIM_MARKS,
        ignorable=(r'decoder\..*', r'hog_enc\..*', r'norm\.\d\..*'),
        adapt=sincos_table,
    ),
    Format('MAE pretraining', MAE_MARKS, ignorable=('mask_token', 'decoder_.*'), adapt=sincos_table),
    Format('ViT', VIT_MARKS),  # MAE's and MIRL's encoders, fine-tuned ones, timm's, our own
)

INTAKES = {
    'MIRL': Intake(
        wrappers=(),
        formats=INTO_MIRL,
        may_lack=('pos_embed', r'decoders\.\d+\.pred\.parametrizations\.weight\.original0'),  # a table, fixed gains
    ),
    'LocalMIMViT': Intake(wrappers=(), formats=INTO_LOCALMIM_VIT, may_lack=('pos_embed',)),
    'LocalMIMSwin': Intake(wrappers=(), formats=INTO_LOCALMIM_SWIN),
    'LocalMIMSwinClassifier': Intake(
        wrappers=('encoder',),
        formats=INTO_LOCALMIM_SWIN_CLASSIFIER,
        may_lack=(r'(head|norm)\..*',),
        may_drop=(r'(head|norm)\..*',),
    ),
    'VisionTransformer': Intake(
        wrappers=('encoder',),
        formats=INTO_VIT,
        # a head for other classes starts anew, as does the norm that the pooling asks for
        may_lack=(r'(head|fc_norm|norm)\..*',),
        may_drop=(r'(head|fc_norm|norm)\..*',),
    ),
}

# --------------------------------------------------------------------------
# loading


def load_published(model: nn.Module, source: str | Path | dict, *, ema: bool = False) -> Report:
    """Fill a pretraining model or a classifier from a published or own checkpoint.

    `source` is a path, or a state dict in the paper's own names: torch tensors in torch's layout, or numpy arrays in
    Paddle's. Position embeddings of another size are resized bicubically. `ema` prefers the averaged weights of our own
    checkpoint, if it has them. Raises CheckpointError when the source is not for this model, naming the first five keys
    that differ with both shapes; the model is then unchanged.
    """
    label = 'state dict' if isinstance(source, dict) else str(source)
    container = source if isinstance(source, dict) else read_checkpoint(source)
    try:
        return load(model, container, label, ema)
    except CheckpointError as error:
        raise CheckpointError(f'{label}: {error}') from error


def load(model: nn.Module, container: dict, label: str, ema: bool) -> Report:
    if type(model).__name__ not in INTAKES:
        raise CheckpointError(f'no checkpoint format is known for a {type(model).__name__}')
    intake = INTAKES[type(model).__name__]
    averaged = ema and isinstance(container.get('ema'), dict)
    wrappers = ('ema',) if averaged else (*intake.wrappers, *COMMON_WRAPPERS)
    weights = join_parts(find_weights(container, wrappers))
    from_paddle = any(isinstance(value, np.ndarray | tuple) for value in weights.values())
    state = torch_state(weights)
    layout = recognise(state, intake.formats)

    report = Report(label, layout.name + ' (Paddle)' * from_paddle + ', averaged weights' * averaged)
    report.ignored = [str(key) for key, value in weights.items() if not isinstance(value, Tensor | np.ndarray | tuple)]
    report.ignored += [key for key in state if layout.rename(key) is None]
    renamed = unique((name, value) for key, value in state.items() if (name := layout.rename(key)))
    renamed, target = layout.adapt(renamed, model), model.state_dict()
    fit(renamed, target, intake, report)
    check(renamed, target, intake, report)

    model.load_state_dict(renamed, strict=False)
    report.loaded = sorted(renamed)
    report.missing = [name for name in target if name not in renamed]
    return report


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
    # linear layers are told by their names, never by their shapes: many are square
    return value.t() if value.ndim == 2 and key.endswith(('.weight', '.weight_v')) else value


def unique(items: Iterable[tuple[str, Tensor]]) -> State:
    state = {}
    for name, value in items:
        if name in state:
            raise CheckpointError(f'two of its keys stand for {printable(name)}')
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
    """Resize position embeddings and drop what may be dropped. Changes `renamed`."""
    for name, value in list(renamed.items()):
        if not same(name, renamed, target):
            wanted = target.get(name)
            if name == 'pos_embed' and wanted is not None and resizable(value, wanted):
                renamed[name] = resize_pos_embed(value, wanted.shape[1])
                report.resized.append(f'{name} {list(value.shape)} -> {list(wanted.shape)}')
            elif any(re.fullmatch(pattern, name) for pattern in intake.may_drop):
                del renamed[name]
                report.ignored.append(f'{name} {list(value.shape)}')


def resizable(value: Tensor, wanted: Tensor) -> bool:
    """Both [1, 1 + side * side, D]."""
    squares = all(t.ndim == 3 and round((t.shape[1] - 1) ** 0.5) ** 2 == t.shape[1] - 1 > 0 for t in (value, wanted))
    return squares and value.shape[::2] == wanted.shape[::2] and value.is_floating_point()


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
        first = '; '.join(f'{printable(n)}: file {shape(renamed, n)}, model {shape(target, n)}' for n in differing[:5])
        raise CheckpointError(
            f'{report.format}, but of another architecture; differing keys ({len(differing)}): {first}'
            + '; ...' * (len(differing) > 5)
        )


def shortened(keys: list, most: int = 4) -> str:
    """'a, b, c, d, ...'"""
    return ', '.join(map(printable, keys[:most])) + ', ...' * (len(keys) > most)
