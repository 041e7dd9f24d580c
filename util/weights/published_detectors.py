"""Files of any origin into detectors: tables, in addition to those of `published.py` and `published_segmenters.py`.

A detector takes detection checkpoints whole: our own, and those of detectron2's ViTDet. Of all others it takes what is
for its encoder. Networks of other tasks take the encoder of a detection checkpoint.
"""

import re
from dataclasses import replace

import torch
from torch import nn

from util.errors import CheckpointError
from util.weights.intake import Format, Intake, State, extra_rows
from util.weights.published import COMPUTED, SWIN_DOWNSAMPLE, inside
from util.weights.published_segmenters import ENCODER_INTAKES, OWN_NORMS, adapted

Renames = tuple[tuple[str, str], ...]

# --------------------------------------------------------------------------
# detectron2's names


def convolution(theirs: str, ours: str) -> Renames:
    """Of a convolution and of its norm, if it has one; here they are a sequence."""
    return (rf'{theirs}\.norm\.(.*)', rf'{ours}.1.\1'), (rf'{theirs}\.(.*)', rf'{ours}.0.\1')


def convolutions(theirs: str, ours: str, count: int, first: int) -> Renames:
    """Of several, which they number from `first`."""
    parts = [convolution(f'{theirs}{i + first}', f'{ours}{i}') for i in range(count)]
    return tuple(rename for part in parts for rename in part)


def pyramid_level(number: int, lateral: int) -> Renames:
    """Of a level of the simple pyramid, of stride 2 ** number; `lateral`: how many modules come before that one."""
    theirs, ours = rf'simfp_{number}\.', f'levels.{number - 2}.'
    return (
        *convolution(f'{theirs}{lateral}', f'{ours}lateral'),
        *convolution(f'{theirs}{lateral + 1}', f'{ours}output'),
        (rf'{theirs}(.*)', rf'{ours}scale.\1'),
    )


SIMPLE_PYRAMID = (*pyramid_level(2, 4), *pyramid_level(3, 1), *pyramid_level(4, 0), *pyramid_level(5, 1))
SWIN_FPN = (
    *convolutions('fpn_lateral', 'fpn.inner_blocks.', 4, 2),
    *convolutions('fpn_output', 'fpn.layer_blocks.', 4, 2),
    *inside(r'bottom_up\.', 'encoder.', (*SWIN_DOWNSAMPLE, (r'(.*)', r'\1'))),
)
VITDET = (
    *inside(r'backbone\.', 'backbone.pyramid.', SIMPLE_PYRAMID),
    (r'backbone\.net\.(.*)', r'backbone.encoder.\1'),
    (r'proposal_generator\.rpn_head\.conv\.(weight|bias)', r'rpn.head.conv.0.0.\1'),
    *convolutions(r'proposal_generator\.rpn_head\.conv\.conv', 'rpn.head.conv.', 2, 0),
    (r'proposal_generator\.rpn_head\.objectness_logits\.(.*)', r'rpn.head.cls_logits.\1'),
    (r'proposal_generator\.rpn_head\.anchor_deltas\.(.*)', r'rpn.head.bbox_pred.\1'),
    *convolutions(r'roi_heads\.box_head\.conv', 'roi_heads.box_head.', 4, 1),
    (r'roi_heads\.box_head\.fc1\.(.*)', r'roi_heads.box_head.5.\1'),
    *convolutions(r'roi_heads\.mask_head\.mask_fcn', 'roi_heads.mask_head.', 4, 1),
    (r'roi_heads\.mask_head\.deconv\.(.*)', r'roi_heads.mask_predictor.conv5_mask.\1'),
    (r'roi_heads\.mask_head\.predictor\.(.*)', r'roi_heads.mask_predictor.mask_fcn_logits.\1'),
)
CLASSES = 'roi_heads.box_predictor.cls_score.'
BOXES = 'roi_heads.box_predictor.bbox_pred.'
MASKS = 'roi_heads.mask_predictor.mask_fcn_logits.'


def background_first(state: State, model: nn.Module) -> State:
    """There the background is the last class, without box and mask; here it is class 0, whose box and mask are idle."""
    found = dict(state)
    for name, value in state.items():
        if name.startswith(CLASSES):
            found[name] = value.roll(1, dims=0)
        elif name.startswith((BOXES, MASKS)):
            idle = value.new_zeros(4 if name.startswith(BOXES) else 1, *value.shape[1:])
            found[name] = torch.cat([idle, value])
    return found


# --------------------------------------------------------------------------
# encoders and necks

REL_POS = r'blocks\.\d+\.attn\.rel_pos_[hw]'
TABLES = r'blocks\.\d+\.attn\.relative_position_bias_table'


def same_prefix(state: State, model: nn.Module) -> State:
    """Positions of a file without a class token begin with the model's row of it, and the other way round without."""
    own, found = model.state_dict(), dict(state)
    for name, value in state.items():
        wanted = own.get(name)
        if name.endswith('pos_embed') and wanted is not None and value.ndim == wanted.ndim == 3:
            there, here = (extra_rows(table.shape[1], (0, 1)) or 0 for table in (value, wanted))
            if there != here and value.shape[2] == wanted.shape[2]:
                found[name] = torch.cat([wanted[:, :here].to(value), value[:, there:]], dim=1)
    return found


def windowed_intake(encoder: nn.Module) -> Intake:
    """Of a ViT or BEiT in windows: its own relative positions are new; BEiT's go where it is to be without."""
    own = encoder.state_dict()
    known = ENCODER_INTAKES['Beit' if 'blocks.0.attn.q_bias' in own else 'VisionTransformer']
    without = () if any(re.fullmatch(TABLES, name) for name in own) else (TABLES,)
    return replace(
        known,
        formats=adapted(known.formats, same_prefix),
        may_lack=(*known.may_lack, REL_POS),
        may_drop=(*known.may_drop, 'cls_token', *without),
    )


OUR_NECK = Format('own names of a neck', set())
NECKS = {  # by class: parts of a detector, by themselves
    'SimpleFeaturePyramid': Intake(
        (), (Format("detectron2's simple pyramid", {'simfp_2.0.weight'}, SIMPLE_PYRAMID, (r'net\..*',)), OUR_NECK)
    ),
    'ViTPyramid': Intake(
        (),
        (
            Format(
                "detectron2's ViT and simple pyramid",
                {'net.patch_embed.proj.weight', 'simfp_2.0.weight'},
                (*inside('', 'pyramid.', SIMPLE_PYRAMID), (r'net\.(.*)', r'encoder.\1')),
                adapt=same_prefix,
            ),
            OUR_NECK,
        ),
    ),
    'FPN': Intake(
        (),
        (
            Format("detectron2's Swin and FPN", {'bottom_up.norm0.weight', 'fpn_lateral2.weight'}, SWIN_FPN, COMPUTED),
            OUR_NECK,
        ),
    ),
}


def of_detector(intake: Intake) -> Intake:
    """The intake of another network for the encoder in a detection file, which has no class token and no last norm."""
    marks = {'cls_token', 'norm.weight'}
    formats = tuple(replace(row, marks=row.marks - marks) for row in intake.formats)
    return replace(
        intake,
        part=r'(?:\w+\.)*?backbone\.(?:encoder|net)\.',
        moved=('roi_heads.layer4.', 'backbone.encoder.layer4.'),
        formats=adapted(formats, same_prefix),
        may_lack=(*intake.may_lack, r'cls_token|(head\.norm|fc_norm|norm)\..*'),
        may_drop=(*intake.may_drop, REL_POS, OWN_NORMS),
    )


# --------------------------------------------------------------------------
# detection files into detectors

FORMATS = (
    Format('our detection', {'rpn.head.cls_logits.weight', f'{CLASSES}weight'}),
    Format(
        'detectron2 Cascade R-CNN',
        {'roi_heads.box_predictor.0.cls_score.weight'},
        refusal='has three box heads, one after another; ours, as those of plain Mask R-CNN, have one',
    ),
    Format(
        'detectron2 ViTDet',
        {'backbone.net.patch_embed.proj.weight', 'proposal_generator.rpn_head.objectness_logits.weight'},
        VITDET,
        (r'pixel_(mean|std)', r'.*\.cell_anchors\..*'),
        lambda state, model: same_prefix(background_first(state, model), model),
    ),
)


def detector_intake(model: nn.Module, new_classes: bool) -> Intake:
    """Of a detection file, strictly; with `new_classes` the layers that tell classes may be for others, and are new."""
    predictors = tuple(re.escape(part) + '.*' for part in (CLASSES, BOXES, MASKS)) if new_classes else ()
    masked = any(name.startswith(MASKS) for name in model.state_dict())
    return Intake(
        wrappers=(),
        formats=FORMATS if new_classes else adapted(FORMATS, same_classes),
        may_lack=predictors,
        may_drop=predictors if masked or not new_classes else (*predictors, r'roi_heads\.mask_.*'),
        computed=(*COMPUTED, r'.*num_batches_tracked', r'.*\.absolute_pos_embed'),
    )


def same_classes(state: State, model: nn.Module) -> State:
    name = f'{CLASSES}bias'
    known, wanted = (len(found[name]) - 1 for found in (state, model.state_dict())) if name in state else (0, 0)
    if known != wanted:
        others = '--finetune takes it for others, whose layers are new'
        raise CheckpointError(f'knows {known} classes, the model {wanted}; {others}')
    return state
