"""Checkpoints of any origin into our models: recognise the format, rename, resize, and account for every key.

This is the one file of `util` that knows the methods by name. A format is a row of `FORMATS`: how to tell it by its
keys, and what its keys are called here. Whatever is neither loaded nor listed as ignorable is an error, and so is
whatever the model needs and neither the file nor the list of keys that may be missing provides.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from util.errors import CheckpointError
from util.pos_embed import resize_pos_embed
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
        for what in ('resized', 'ignored', 'missing'):
            keys = getattr(self, what)
            if keys:
                parts.append(f'{len(keys)} {what} ({shortened(keys)})')
        return f'{self.source}: {self.format}: ' + ', '.join(parts)


@dataclass(frozen=True)
class Format:
    """A published layout. `renames` and `ignorable` are regular expressions, tried in order on the whole key."""

    name: str
    recognise: Callable[[State], bool]
    renames: tuple[tuple[str, str], ...] = ()
    ignorable: tuple[str, ...] = ()

    def rename(self, key: str) -> str | None:
        """The key's name here, or None if the format's files may hold it and nothing here has use for it."""
        if any(re.fullmatch(pattern, key) for pattern in self.ignorable):
            return None
        for pattern, replacement in self.renames:
            if re.fullmatch(pattern, key):
                return re.sub(pattern, replacement, key)
        return key


# --------------------------------------------------------------------------
# formats, by the model that is to be filled

MIRL_KEYS = {'decoder_embed0_1.weight'}
MAE_KEYS = {'mask_token', 'decoder_embed.weight', 'decoder_pred.weight'}
VIT_KEYS = {'cls_token', 'patch_embed.proj.weight', 'blocks.0.attn.qkv.weight'}

INTO_MIRL = (
    Format('our MIRL pretraining', lambda state: 'memory_embed.weight' in state),
    Format(
        'published MIRL pretraining',
        lambda state: state.keys() >= MIRL_KEYS,
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
    ),
)

INTO_VIT = (
    Format(
        'published MIRL pretraining',
        lambda state: state.keys() >= MIRL_KEYS,
        ignorable=(r'mask_token\d+', r'decoder_.*', r'norm_low\..*', r'norm\d+\..*'),
    ),
    Format(
        'MAE pretraining, with its decoder',
        lambda state: state.keys() >= MAE_KEYS,
        ignorable=('mask_token', 'decoder_.*'),
    ),
    Format('ViT', lambda state: state.keys() >= VIT_KEYS),
)

# the model's keys that a file may lack: computed tables, fixed gains, and what fine-tuning starts anew
MAY_BE_MISSING = {
    'MIRL': (r'pos_embed', r'decoders\.\d+\.pred\.parametrizations\.weight\.original0'),
    'VisionTransformer': (r'(head|fc_norm|norm)\..*',),
}
# a classifier's head for another number of classes starts anew, and a pretraining norm that it has no place for goes
MAY_BE_DROPPED = {'MIRL': (), 'VisionTransformer': (r'(head|fc_norm|norm)\..*',)}


# --------------------------------------------------------------------------


def load_published(model: nn.Module, source: str | Path | State, *, ema: bool = False) -> Report:
    """Fill a pretraining model or a classifier from a published or own checkpoint.

    `source` is a path, or a state dict of torch tensors in the paper's own names and torch's layout. Position
    embeddings of another size are resized bicubically. `ema` takes the averaged weights of our own checkpoint. Raises
    CheckpointError when the source is not for this model, naming the first five keys that differ with both shapes; the
    model is then unchanged.
    """
    kind = type(model).__name__
    if kind not in MAY_BE_MISSING:
        raise CheckpointError(f'no checkpoint format is known for a {kind}')
    pretraining = hasattr(model, 'encoder_state_dict')
    label = 'state dict' if isinstance(source, dict) else str(source)
    container = source if isinstance(source, dict) else read_checkpoint(source)
    state = plain_state(container, ('ema',) if ema else ('model',) if pretraining else ('encoder', 'model'), label)
    layout = recognise(state, INTO_MIRL if pretraining else INTO_VIT, label)

    report = Report(label, layout.name)
    target = model.state_dict()
    renamed: State = {}
    for key, value in state.items():
        name = layout.rename(key)
        if name is None:
            report.ignored.append(key)
        else:
            renamed[last_norm(name, model)] = value
    fit(renamed, target, kind, report)
    complain(renamed, target, kind, report)

    model.load_state_dict(renamed, strict=False)
    report.loaded = sorted(renamed)
    report.missing = sorted(target.keys() - renamed.keys())
    return report


def plain_state(container: dict, names: tuple[str, ...], label: str) -> State:
    """The first state dict of these names, or of those that others use, or the container itself."""
    if names == ('ema',) and 'ema' not in container:
        raise CheckpointError(f'{label}: has no averaged weights (it was trained without --use_ema)')
    for name in (*names, 'state_dict', 'module'):
        if isinstance(container.get(name), dict):
            container = container[name]
            break
    state = {re.sub(r'^(module\.|_orig_mod\.)+', '', k): v for k, v in container.items() if isinstance(v, Tensor)}
    if not state:
        raise CheckpointError(f'{label}: no weights in it (its keys: {shortened(list(container))})')
    return state


def recognise(state: State, formats: tuple[Format, ...], label: str) -> Format:
    """The first of the formats that the keys fit."""
    for layout in formats:
        if layout.recognise(state):
            return layout
    known = ', '.join(layout.name for layout in formats)
    raise CheckpointError(
        f'{label}: not a checkpoint for this model; its keys begin {shortened(list(state))}, known: {known}'
    )


def last_norm(name: str, model: nn.Module) -> str:
    """MIRL's `norm` belongs to the deepest segment, whose number only the model knows."""
    return name.replace('norms.-1.', f'norms.{len(model.norms) - 1}.') if name.startswith('norms.-1.') else name


def fit(renamed: State, target: State, kind: str, report: Report) -> None:
    """Resize position embeddings, give fixed gains torch's shape, drop what may be dropped. Changes `renamed`."""
    for name in list(renamed):
        if name not in target or renamed[name].shape != target[name].shape:
            value, wanted = renamed[name], target.get(name)
            if name == 'pos_embed' and value.ndim == 3 and wanted is not None and value.shape[-1] == wanted.shape[-1]:
                renamed[name] = resize_pos_embed(value, wanted.shape[1])
                report.resized.append(f'{name} {list(value.shape)} -> {list(wanted.shape)}')
            elif wanted is not None and name.endswith('original0') and value.numel() == wanted.numel():
                renamed[name] = value.reshape(wanted.shape)
            elif any(re.fullmatch(pattern, name) for pattern in MAY_BE_DROPPED[kind]):
                del renamed[name]
                report.ignored.append(f'{name} {list(value.shape)}')


def complain(renamed: State, target: State, kind: str, report: Report) -> None:
    """Raise CheckpointError if a key is left over, lacking, or of another shape."""
    lacking = [
        name
        for name in target.keys() - renamed.keys()
        if not any(re.fullmatch(pattern, name) for pattern in MAY_BE_MISSING[kind])
    ]
    leftover = renamed.keys() - target.keys()
    reshaped = [name for name in renamed.keys() & target.keys() if renamed[name].shape != target[name].shape]
    differing = sorted({*lacking, *leftover, *reshaped})
    if differing:

        def shape(state: State, name: str) -> str:
            return str(list(state[name].shape)) if name in state else 'absent'

        first = '; '.join(f'{n}: file {shape(renamed, n)}, model {shape(target, n)}' for n in differing[:5])
        raise CheckpointError(
            f'{report.source}: {report.format}, but of another architecture; {len(differing)} keys differ: {first}'
        )


def shortened(keys: list[str], most: int = 4) -> str:
    """'a, b, c, d, ...'"""
    return ', '.join(map(str, keys[:most])) + (', ...' if len(keys) > most else '')
