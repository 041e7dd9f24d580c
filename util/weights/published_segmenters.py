"""Files of any origin into the networks of dense tasks: tables, in addition to those of `published.py`.

An encoder takes what its classifier takes (pretraining of all methods, classifiers, encoders alone); what a classifier
alone has, such as the norm of its last tokens, is dropped. A segmenter takes segmentation checkpoints: our own, and
those in the layouts of mmsegmentation and of the papers, whose heads have the names of ours.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from util.errors import CheckpointError
from util.weights.intake import Format, Intake, State
from util.weights.published import (
    COMPUTED,
    INTAKES,
    INTO_BEIT,
    INTO_VIT,
    OPENMIXUP_CONVNEXT,
    OPENMIXUP_SWIN,
    OPENMIXUP_VIT,
    OUR_A2MIM_ENCODER,
    RELEASED_CONVNEXT,
    SWIN_DOWNSAMPLE,
    inside,
    mmcv_mergings,
)

Adapt = Callable[[State, nn.Module], State]

# --------------------------------------------------------------------------
# what depends on the model


def biases_apart(state: State, model: nn.Module) -> State:
    """BEiT has biases of queries and values. One of keys (`K_BIAS`, dropped) adds one number to all logits of a query:
    it changes nothing."""
    own, found = model.state_dict(), {}
    for key, value in state.items():
        block = key.removesuffix('qkv.bias')
        apart = block != key and f'{block}q_bias' in own
        found |= (
            {f'{block}{name}_bias': x for name, x in zip('qkv', value.chunk(3), strict=True)} if apart else {key: value}
        )
    return found


def as_beit(state: State, model: nn.Module) -> State:
    """A plain ViT is a BEiT whose LayerScale is 1 and whose relative positions are 0."""
    own, plain = model.state_dict(), {}
    for pattern, fill in ((r'gamma_[12]', torch.ones_like), (r'attn\.relative_position_bias_table', torch.zeros_like)):
        names = re.compile(rf'blocks\.\d+\.{pattern}')
        if not any(map(names.fullmatch, state)):
            plain |= {name: fill(own[name]) for name in own if names.fullmatch(name)}
    return plain | biases_apart(state, model)


def last_norm(state: State, model: nn.Module) -> State:
    """The last of the four maps has the norm that a classifier's head begins with."""
    return {re.sub(r'head\.norm\.', 'norm3.', key): value for key, value in state.items()}


def adapted(formats: tuple[Format, ...], further: Adapt) -> tuple[Format, ...]:
    """The same formats, with something more to do after renaming."""

    def both(first: Adapt, state: State, model: nn.Module) -> State:
        return further(first(state, model), model)

    return tuple(replace(row, adapt=partial(both, row.adapt)) for row in formats)


# --------------------------------------------------------------------------
# pretrained and classifiers' files into encoders

K_BIAS = r'(encoder\.)?blocks\.\d+\.attn\.k_bias'
OWN_NORMS = r'norm[0-3]\..*'  # of each map, which no file of another task has


def encoder_of(classifier: str, **changes) -> Intake:
    """The intake of a classifier for its encoder. `changes`: what else it may lack or drop, or other formats."""
    known = INTAKES[classifier]
    added = {name: getattr(known, name) + changes.pop(name, ()) for name in ('may_lack', 'may_drop')}
    return replace(known, **added, **changes)


ENCODER_INTAKES = {  # by the encoder's class
    'VisionTransformer': encoder_of('VisionTransformer'),
    'Beit': encoder_of(
        'Beit',
        formats=adapted(tuple(row for row in (*INTO_BEIT, *INTO_VIT) if not row.refusal), as_beit),
        may_drop=('pos_embed', K_BIAS),
    ),
    'ResNet': encoder_of('ResNet', may_drop=(r'.*num_batches_tracked',)),  # of a BatchNorm that may be frozen
    'ConvNeXt': encoder_of('ConvNeXt', formats=adapted(INTAKES['ConvNeXt'].formats, last_norm), may_lack=(OWN_NORMS,)),
    'SwinTransformer': encoder_of('SwinTransformer', may_lack=(OWN_NORMS,), may_drop=(r'norm\..*',)),
    'SwinBackbone': encoder_of('LocalMIMSwinClassifier', may_lack=(OWN_NORMS,)),
    'MixMIMBackbone': encoder_of(
        'MixMIMClassifier', may_lack=(OWN_NORMS,), may_drop=(r'norm\..*',), computed=('absolute_pos_embed',)
    ),
}


def encoder_intake(encoder: nn.Module) -> Intake:
    """Of an encoder's class; for one that no table has, its own names, less the parts that it has not."""
    if known := ENCODER_INTAKES.get(type(encoder).__name__):
        depth = len(getattr(encoder, 'feature_info', ()))  # blocks after the last map are not in the encoder
        beyond = [rf'blocks\.{i}\..*' for i in range(len(getattr(encoder, 'blocks', ())), depth)]
        return replace(known, may_drop=(*known.may_drop, *beyond))
    parts = '|'.join(sorted({re.escape(name.partition('.')[0]) for name in encoder.state_dict()}))
    own = Format(f'own names of {type(encoder).__name__}', set(), ignorable=COMPUTED)
    return Intake(
        ('encoder',), (OUR_A2MIM_ENCODER, own), (r'.*num_batches_tracked', OWN_NORMS), (rf'(?!(?:{parts})(?:\.|$)).*',)
    )


# --------------------------------------------------------------------------
# segmentation files into segmenters

PYRAMID = (
    (r'(?:backbone\.fpn1|neck\.upsample_4x)\.(.*)', r'pyramid.up4.\1'),
    (r'(?:backbone\.fpn2|neck\.upsample_2x)\.(.*)', r'pyramid.up2.\1'),
)
DEEP_STEM = ((r'stem\.7\.(.*)', r'bn1.\1'), (r'stem\.(.*)', r'conv1.\1'))
MM_SWIN = (*OPENMIXUP_SWIN[3:-1], (r'stages\.(\d)\.downsample\.(.*)', r'layers.\1.downsample.\2'))  # at a stage's end
NEW_HEADS = (r'(decode|auxiliary)_head\.conv_seg\..*',)


def published(name: str, mark: str, renames: tuple[tuple[str, str], ...] = (), adapt: Adapt = biases_apart) -> Format:
    """A layout in which the encoder's keys stand under `backbone.`, and `mark` is one of them."""
    names = (*PYRAMID, *inside(r'backbone\.', 'encoder.', renames), (r'backbone\.(.*)', r'encoder.\1'))
    ignorable = (*COMPUTED, r'data_preprocessor\..*')
    marks = {f'backbone.{mark}', 'decode_head.conv_seg.weight'}
    return Format(f'{name} segmentation', marks, names, ignorable, adapt)


VITS = (
    published('mmsegmentation ViT', 'layers.0.attn.qkv.weight', OPENMIXUP_VIT),
    published('ViT', 'blocks.0.attn.qkv.weight'),
)
SEGMENTERS = {  # by the encoder's class
    'VisionTransformer': VITS,
    'Beit': VITS,
    'ResNet': (published('mmsegmentation ResNet', 'layer1.0.conv1.weight', DEEP_STEM),),
    'ConvNeXt': (
        published('mmsegmentation ConvNeXt', 'stages.0.0.depthwise_conv.weight', OPENMIXUP_CONVNEXT[:-1]),
        published('ConvNeXt', 'stages.0.0.dwconv.weight', RELEASED_CONVNEXT[:-2]),
    ),
    'SwinTransformer': (
        published(
            'mmsegmentation Swin',
            FIRST_W_MSA := 'stages.0.blocks.0.attn.w_msa.qkv.weight',
            OPENMIXUP_SWIN[:-1],
            mmcv_mergings,
        ),
        published('Swin', FIRST_SWIN := 'layers.0.blocks.0.attn.qkv.weight', SWIN_DOWNSAMPLE),
    ),
    'SwinBackbone': (
        published('mmsegmentation Swin', FIRST_W_MSA, MM_SWIN, mmcv_mergings),
        published('Swin', FIRST_SWIN),
    ),
    'MixMIMBackbone': (published('MixMIM', FIRST_SWIN),),
}


def without_heads(intake: Intake) -> Intake:
    """The intake of another network for the encoder in a segmentation file, which has no norm of its last tokens."""
    return replace(
        intake,
        part=r'(?:\w+\.)*?(?:encoder|backbone)\.',
        formats=tuple(replace(row, marks=row.marks - {'norm.weight'}) for row in intake.formats),
        may_lack=(*intake.may_lack, r'(head\.norm|fc_norm|norm)\..*'),
        may_drop=(*intake.may_drop, r'fpn[12]\..*', OWN_NORMS),
    )


def segmenter_intake(model: nn.Module, new_classes: bool) -> Intake:
    """Of a segmentation file, strictly; with `new_classes` the layers that classify may be for others, and are new."""
    first, _ = next(model.encoder.named_parameters())
    own = {f'encoder.{first}', 'decode_head.conv_seg.weight'}
    formats = (Format('our segmentation', own), *SEGMENTERS.get(type(model.encoder).__name__, ()))
    heads = NEW_HEADS if new_classes else ()
    return Intake(
        wrappers=(),
        formats=formats if new_classes else adapted(formats, same_classes),
        may_lack=heads,
        may_drop=(K_BIAS, *heads),
        computed=(*COMPUTED, r'.*num_batches_tracked', r'encoder\.absolute_pos_embed'),
    )


def same_classes(state: State, model: nn.Module) -> State:
    own, found = model.state_dict(), state.get('decode_head.conv_seg.bias')
    if found is not None and (known := len(found)) != (wanted := len(own['decode_head.conv_seg.bias'])):
        raise CheckpointError(f'knows {known} classes, the model {wanted}: pass --nb_classes {known}')
    return state
