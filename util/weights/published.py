"""Checkpoints of any origin into our models: which formats there are, and which of them each model takes.

This is the one file of `util` that knows the methods by name: tables of keys, read by `intake.py`. A class that
no table lists needs none for our own checkpoints (`intake.own_names`).

What no file can tell: the number of attention heads (12 in MIRL's small models, not timm's 6), and where segments of
unequal length end. Both are the model's to get right.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from util.errors import CheckpointError
from util.nn.pos_embed import sincos_2d
from util.weights.intake import HEADS, Format, Intake, State, unique

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
    if 'pos_embed' in state or model.pos_embed is None:
        return state
    _, length, dim = model.pos_embed.shape
    return state | {'pos_embed': sincos_2d(dim, round((length - 1) ** 0.5))}


COMPUTED = (r'.*relative_position_index', r'.*attn_mask')  # from the window's size alone
VIT_MARKS = {'patch_embed.proj.weight', 'blocks.0.attn.qkv.weight'}
BEIT_MARKS = VIT_MARKS | {'blocks.0.attn.q_bias'}
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
        'ViT', VIT_MARKS, refusal='holds no decoders: main_finetune.py --finetune and main_pretrain.py --init take it'
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

    A model that is to be correct gets the weights in its order: the middle two of four parts are swapped.
    """
    if getattr(model, 'coords', 'published') != 'correct':
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

# the transformers library's ViT, ViTMAE, DeiT and BEiT
HF_MARKS = {'embeddings.patch_embeddings.projection.weight', 'encoder.layer.0.attention.attention.query.weight'}
HF_LAYER = r'encoder\.layer\.(\d+)\.'
HF_RENAMES = (
    (r'embeddings\.(cls_token|mask_token)', r'\1'),
    (r'embeddings\.position_embeddings', 'pos_embed'),
    (r'embeddings\.patch_embeddings\.projection\.(.*)', r'patch_embed.proj.\1'),
    (HF_LAYER + r'attention\.attention\.(query|key|value)\.(.*)', r'blocks.\1.attn.\2.\3'),
    (HF_LAYER + r'attention\.attention\.relative_position_bias\.(.*)', r'blocks.\1.attn.\2'),
    (HF_LAYER + r'attention\.output\.dense\.(.*)', r'blocks.\1.attn.proj.\2'),
    (HF_LAYER + r'intermediate\.dense\.(.*)', r'blocks.\1.mlp.fc1.\2'),
    (HF_LAYER + r'output\.dense\.(.*)', r'blocks.\1.mlp.fc2.\2'),
    (HF_LAYER + r'layernorm_before\.(.*)', r'blocks.\1.norm1.\2'),
    (HF_LAYER + r'layernorm_after\.(.*)', r'blocks.\1.norm2.\2'),
    (HF_LAYER + r'lambda_([12])', r'blocks.\1.gamma_\2'),
    (r'layernorm\.(.*)', r'norm.\1'),
    (r'pooler\.layernorm\.(.*)', r'fc_norm.\1'),
)


def joined_qkv(state: State, model: nn.Module) -> State:
    """Query, key and value are one layer here; BEiT has biases of query and value, by names of their own."""
    state = dict(state)
    for query in [key for key in state if re.fullmatch(r'blocks\.\d+\.attn\.query\.(weight|bias)', key)]:
        block, _, part = query.rpartition('.query.')
        thirds = {name: state.pop(f'{block}.{name}.{part}', None) for name in ('query', 'key', 'value')}
        if f'{block}.q_bias' in model.state_dict() and part == 'bias':
            state |= {f'{block}.{name[0]}_bias': third for name, third in thirds.items() if third is not None}
        elif any(third is None for third in thirds.values()):
            raise CheckpointError(f'{query} is without its key or value')
        else:
            state[f'{block}.qkv.{part}'] = torch.cat(list(thirds.values()))
    return state


def hugging_face(adapt: Callable[[State, nn.Module], State]) -> tuple[Format, ...]:
    """Of the transformers library: with a prefix and a classifier or MAE's decoder beside it, and the network alone."""
    ignorable = (*COMPUTED, r'pooler\.dense\..*', r'embeddings\.mask_token')
    beside = ((r'classifier\.(.*)', r'head.\1'),)
    return tuple(
        Format(
            f'Hugging Face {name}',
            {prefix + mark for mark in HF_MARKS},
            beside + tuple((re.escape(prefix) + pattern, into) for pattern, into in HF_RENAMES),
            (r'decoder\..*', *(f'(?:{re.escape(prefix)})?{pattern}' for pattern in ignorable)),
            adapt,
        )
        for name, prefix in (('ViT', 'vit.'), ('DeiT', 'deit.'), ('BEiT', 'beit.'), ('ViT', ''))
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
    Format(
        'BEiT',
        BEIT_MARKS,
        refusal='has relative positions and LayerScale, for which this ViT has no place; the a2mim_vit models have one',
    ),
    Format('ViT', VIT_MARKS),  # MAE's and MIRL's encoders, fine-tuned ones, timm's, our own
    *hugging_face(joined_qkv),
)

# --------------------------------------------------------------------------
# A2MIM and SimMIM: OpenMixup's names, one table for each family of encoders

OPENMIXUP_VIT = (
    (r'layers\.(\d+)\.ln([12])\.(.*)', r'blocks.\1.norm\2.\3'),
    (r'layers\.(\d+)\.ffn\.layers\.0\.0\.(.*)', r'blocks.\1.mlp.fc1.\2'),
    (r'layers\.(\d+)\.ffn\.layers\.1\.(.*)', r'blocks.\1.mlp.fc2.\2'),
    (r'layers\.(\d+)\.(attn\..*|gamma_[12])', r'blocks.\1.\2'),
    (r'patch_embed\.projection\.(.*)', r'patch_embed.proj.\1'),
    (r'ln1\.(.*)', r'norm.\1'),
    (r'((?:cls_token|pos_embed|fc_norm).*)', r'\1'),
)
OPENMIXUP_RESNET = ((r'((?:conv1|bn1|layer[1-4])\..*)', r'\1'),)
OPENMIXUP_CONVNEXT = (
    (r'downsample_layers\.0\.(.*)', r'stem.\1'),
    (r'downsample_layers\.([1-3])\.(.*)', r'stages.\1.downsample.\2'),
    (r'stages\.(\d)\.(\d+)\.depthwise_conv\.(.*)', r'stages.\1.blocks.\2.conv_dw.\3'),
    (r'stages\.(\d)\.(\d+)\.pointwise_conv([12])\.(.*)', r'stages.\1.blocks.\2.mlp.fc\3.\4'),
    (r'stages\.(\d)\.(\d+)\.(norm\..*|gamma)', r'stages.\1.blocks.\2.\3'),
    (r'norm3\.(.*)', r'head.norm.\1'),
)
RELEASED_CONVNEXT = (  # of ConvNeXt's authors, and of SparK's
    *OPENMIXUP_CONVNEXT[:2],
    (r'stages\.(\d)\.(\d+)\.dwconv\.(.*)', r'stages.\1.blocks.\2.conv_dw.\3'),
    (r'stages\.(\d)\.(\d+)\.pwconv([12])\.(.*)', r'stages.\1.blocks.\2.mlp.fc\3.\4'),
    (r'stages\.(\d)\.(\d+)\.grn\.gamma', r'stages.\1.blocks.\2.mlp.grn.weight'),
    (r'stages\.(\d)\.(\d+)\.grn\.beta', r'stages.\1.blocks.\2.mlp.grn.bias'),
    (r'stages\.(\d)\.(\d+)\.(norm\..*|gamma)', r'stages.\1.blocks.\2.\3'),
    (r'norm\.(.*)', r'head.norm.\1'),
    (r'head\.(weight|bias)', r'head.fc.\1'),
)
SWIN_DOWNSAMPLE = tuple((rf'layers\.{i}\.downsample\.(.*)', rf'layers.{i + 1}.downsample.\1') for i in range(3))
OPENMIXUP_SWIN = (
    *((pattern.replace('layers', 'stages', 1), name) for pattern, name in SWIN_DOWNSAMPLE),
    (r'stages\.(\d)\.blocks\.(\d+)\.attn\.w_msa\.(.*)', r'layers.\1.blocks.\2.attn.\3'),
    (r'stages\.(\d)\.blocks\.(\d+)\.ffn\.layers\.0\.0\.(.*)', r'layers.\1.blocks.\2.mlp.fc1.\3'),
    (r'stages\.(\d)\.blocks\.(\d+)\.ffn\.layers\.1\.(.*)', r'layers.\1.blocks.\2.mlp.fc2.\3'),
    (r'stages\.(\d)\.blocks\.(\d+)\.(norm[12]\..*)', r'layers.\1.blocks.\2.\3'),
    (r'patch_embed\.projection\.(.*)', r'patch_embed.proj.\1'),
    (r'patch_embed\.norm\.(.*)', r'patch_embed.norm.\1'),
    (r'norm3\.(.*)', r'norm.\1'),
)
# Microsoft's SimMIM and Swin: timm's names, but that merging stands at the end of a stage
MICROSOFT_SWIN = (*SWIN_DOWNSAMPLE, (r'((?:patch_embed|layers|norm)\..*)', r'\1'))
MICROSOFT_VIT = ((r'((?:cls_token|pos_embed|patch_embed|blocks|norm|fc_norm|rel_pos_bias).*)', r'\1'),)


def convnext_version(state: State, model: nn.Module) -> State:
    """ConvNeXt V2 has global response normalisation (GRN) in place of V1's layer scale; its vectors are [C] here."""
    v2 = any('.grn.' in name for name in model.state_dict())
    if v2 != any('.grn.' in key for key in state):
        raise CheckpointError(f'ConvNeXt {"V1" if v2 else "V2 (it has GRN)"}, the model is {"V2" if v2 else "V1"}')
    return {key: value.flatten() if '.grn.' in key else value for key, value in state.items()}


def flat_tokens(state: State, model: nn.Module) -> State:
    """Tokens and gammas are vectors here, there [1, 1, D] or [1, C, 1, 1]."""
    return {key: value.flatten() if key in ('mask_token', 'mask_gamma') else value for key, value in state.items()}


def openmixup_swin(state: State, model: nn.Module) -> State:
    return mmcv_mergings(flat_tokens(state, model), model)


def mmcv_mergings(state: State, model: nn.Module) -> State:
    """Patch merging takes the channels of 2 x 2 pixels in mmcv's order (channel, row, column); here (column, row,
    channel)."""

    def reorder(x: Tensor) -> Tensor:  # [..., C * 4] -> [..., 4 * C]
        return x.unflatten(-1, (-1, 2, 2)).movedim(-3, -1).transpose(-3, -2).flatten(-3)

    merging = re.compile(r'.*downsample\.(norm\.weight|norm\.bias|reduction\.weight)')
    fits = {key for key, x in state.items() if merging.fullmatch(key) and x.ndim and x.shape[-1] % 4 == 0}
    return {key: reorder(x) if key in fits else x for key, x in state.items()}


def microsoft_vit(state: State, model: nn.Module) -> State:
    """One table of relative positions for all blocks becomes one for each; no absolute positions are positions of 0."""
    state, own = flat_tokens(state, model), model.state_dict()
    tables = [name for name in own if name.endswith('attn.relative_position_bias_table')]
    for key in [key for key in state if key.endswith('rel_pos_bias.relative_position_bias_table') and key not in own]:
        if tables:
            state |= dict.fromkeys(tables, state.pop(key))
    return {name: torch.zeros_like(own[name]) for name in ('pos_embed', 'encoder.pos_embed') if name in own} | state


class Family(NamedTuple):
    """One family of encoders in OpenMixup's files."""

    name: str
    mark: str  # a key that only this family has
    renames: tuple[tuple[str, str], ...]
    head: str  # what its classifier's last layer is called here
    adapt: Callable[[State, nn.Module], State] = flat_tokens


FAMILIES = {
    'Beit': Family('ViT', 'layers.0.attn.qkv.weight', OPENMIXUP_VIT, 'head'),
    'ResNet': Family('ResNet', 'layer1.0.conv1.weight', OPENMIXUP_RESNET, 'fc'),
    'ConvNeXt': Family('ConvNeXt', 'downsample_layers.0.0.weight', OPENMIXUP_CONVNEXT, 'head.fc'),
    'SwinTransformer': Family(
        'Swin', 'stages.0.blocks.0.attn.w_msa.qkv.weight', OPENMIXUP_SWIN, 'head.fc', openmixup_swin
    ),
}
PRETRAINING_ONLY = (r'(?:backbone\.|encoder\.)?mask_(?:token|gamma)', r'(?:neck|decoder)\..*')
MIM_DECODERS = ((r'neck\.decoder(?:_pred)?\.0\.(.*)', r'decoder.\1'), (r'decoder\.0\.(.*)', r'decoder.\1'))


def inside(prefix: str, into: str, renames: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
    """The same renames for names that have a prefix in the file, and another one here."""
    return tuple((prefix + pattern, into + target) for pattern, target in renames)


def into_a2mim(family: Family) -> Format:
    tokens = ((r'backbone\.(mask_token|mask_gamma)', r'\1'),)
    renames = tokens + MIM_DECODERS + inside(r'backbone\.', 'encoder.', family.renames)
    ignorable = (*COMPUTED, r'ema_.*')
    return Format(f'OpenMixup {family.name} pretraining', {f'backbone.{family.mark}'}, renames, ignorable, family.adapt)


def into_classifier(family: Family) -> tuple[Format, ...]:
    """Of OpenMixup's files: pretraining or fine-tuned ones as they are, and extracted backbones."""
    head, ignorable = ((r'head\.fc\.(.*)', rf'{family.head}.\1'),), (*COMPUTED, *PRETRAINING_ONLY, r'ema_.*')
    whole, extracted = inside(r'backbone\.', '', family.renames), family.renames
    name = f'OpenMixup {family.name}'
    return (
        Format(name, {f'backbone.{family.mark}'}, head + whole, ignorable, family.adapt),
        Format(f'{name}, extracted', {family.mark}, head + extracted, ignorable, family.adapt),
    )


OUR_A2MIM = Format('our A2MIM pretraining', {'decoder.weight'})
MICROSOFT_VIT_MARKS = {'encoder.blocks.0.attn.qkv.weight', 'decoder.0.weight'}
MICROSOFT_SWIN_MARKS = {'encoder.layers.0.blocks.0.attn.qkv.weight', 'decoder.0.weight'}
MICROSOFT_TOKEN = ((r'encoder\.mask_token', 'mask_token'), *MIM_DECODERS)

INTO_A2MIM = (
    OUR_A2MIM,
    *map(into_a2mim, FAMILIES.values()),
    Format(
        'Microsoft SimMIM ViT',
        MICROSOFT_VIT_MARKS,
        MICROSOFT_TOKEN + inside(r'encoder\.', 'encoder.', MICROSOFT_VIT),
        COMPUTED,
        microsoft_vit,
    ),
    Format(
        'Microsoft SimMIM Swin',
        MICROSOFT_SWIN_MARKS,
        MICROSOFT_TOKEN + inside(r'encoder\.', 'encoder.', MICROSOFT_SWIN),
        COMPUTED,
        flat_tokens,
    ),
)
OUR_A2MIM_ENCODER = Format(
    'our A2MIM pretraining',
    {'decoder.weight'},
    ((r'encoder\.(.*)', r'\1'),),
    ('mask_token', 'mask_gamma', r'decoder\..*'),
)
INTO_BEIT = (
    OUR_A2MIM_ENCODER,
    *into_classifier(FAMILIES['Beit']),
    Format(
        'Microsoft SimMIM ViT',
        MICROSOFT_VIT_MARKS,
        inside(r'encoder\.', '', MICROSOFT_VIT),
        (*COMPUTED, *PRETRAINING_ONLY),
        microsoft_vit,
    ),
    *hugging_face(lambda state, model: microsoft_vit(joined_qkv(state, model), model)),
    # timm's, our own, Microsoft's
    Format('BEiT', BEIT_MARKS, ignorable=(*COMPUTED, 'mask_token'), adapt=microsoft_vit),
    Format('ViT', VIT_MARKS, refusal="lacks BEiT's relative positions and LayerScale, which this model is made of"),
)
INTO_SWIN = (
    OUR_A2MIM_ENCODER,
    *into_classifier(FAMILIES['SwinTransformer']),
    Format(
        'Microsoft SimMIM Swin',
        MICROSOFT_SWIN_MARKS,
        inside(r'encoder\.', '', MICROSOFT_SWIN),
        (*COMPUTED, *PRETRAINING_ONLY),
    ),
    Format(
        'Microsoft Swin',
        {'layers.0.downsample.reduction.weight'},
        (*SWIN_DOWNSAMPLE, (r'head\.(weight|bias)', r'head.fc.\1')),
        COMPUTED,
    ),
    Format('Swin', {'layers.1.downsample.reduction.weight'}, ignorable=COMPUTED),  # timm's, our own
)

# --------------------------------------------------------------------------
# MixMAE


MIXMIM_MARKS = {'patch_embed.norm.weight', 'layers.0.blocks.0.attn.relative_position_bias_table', 'norm.weight'}
MIXMAE_MARKS = MIXMIM_MARKS | MAE_MARKS
MM_MIXMIM_MARKS = {'backbone.patch_embed.norm.weight', 'backbone.layers.0.blocks.0.ffn.layers.1.weight'}
MM_MIXMAE_MARKS = MM_MIXMIM_MARKS | {'neck.mask_token', 'neck.decoder_embed.weight'}
MM_IGNORABLE = (*COMPUTED, r'(backbone\.)?(data_preprocessor|avgpool)\..*')
MM_BLOCK = r'(?:backbone|neck)\.((?:layers\.\d+\.|decoder_)blocks\.\d+)'
MM_RENAMES = (
    (MM_BLOCK + r'\.ln(\d)\.(.*)', r'\1.norm\2.\3'),
    (MM_BLOCK + r'\.ffn\.layers\.0\.0\.(.*)', r'\1.mlp.fc1.\2'),
    (MM_BLOCK + r'\.ffn\.layers\.1\.(.*)', r'\1.mlp.fc2.\2'),
    (r'backbone\.patch_embed\.projection\.(.*)', r'patch_embed.proj.\1'),
    (r'neck\.ln1\.(.*)', r'decoder_norm.\1'),
    (r'head\.fc\.(.*)', r'head.\1'),
    (r'(?:backbone|neck)\.(.*)', r'\1'),
)
MIXMAE_DECODER = ('mask_token', r'decoder_.*')

INTO_MIXMAE = (
    Format('MixMAE pretraining', MIXMAE_MARKS, ignorable=COMPUTED),  # the published one and our own
    Format('mmpretrain MixMIM pretraining', MM_MIXMAE_MARKS, MM_RENAMES, MM_IGNORABLE, adapt=mmcv_mergings),
    *(
        Format(
            f'{origin}MixMIM classifier',
            marks,
            refusal='holds no decoder: main_finetune.py --finetune and main_pretrain.py --init take it',
        )
        for origin, marks in (('', MIXMIM_MARKS), ('mmpretrain ', MM_MIXMIM_MARKS))
    ),
)
INTO_MIXMIM_CLASSIFIER = (
    Format('MixMAE pretraining', MIXMAE_MARKS, ignorable=(*COMPUTED, *MIXMAE_DECODER)),
    Format('MixMIM', MIXMIM_MARKS, ignorable=COMPUTED),  # classifiers, published and our own, and our encoder alone
    Format('mmpretrain MixMIM', MM_MIXMIM_MARKS, MM_RENAMES, (*MM_IGNORABLE, r'neck\..*'), adapt=mmcv_mergings),
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
        # a head for other classes stays as initialised, and so does the norm that the pooling needs
        may_lack=(r'(head|fc_norm|norm)\..*',),
        may_drop=(r'(head|fc_norm|norm)\..*',),
    ),
    'A2MIM': Intake(wrappers=(), formats=INTO_A2MIM, may_lack=(*COMPUTED, r'.*num_batches_tracked')),
    'Beit': Intake(
        wrappers=('encoder',),
        formats=INTO_BEIT,
        may_lack=(*COMPUTED, r'(head|fc_norm|norm)\..*'),
        may_drop=(r'(head|fc_norm|norm)\..*',),
    ),
    'ResNet': Intake(
        wrappers=('encoder',),
        formats=(
            OUR_A2MIM_ENCODER,
            into_classifier(FAMILIES['ResNet'])[0],
            # one naming: timm's and torchvision's files, and OpenMixup's extracted backbones
            Format('ResNet', {'layer1.0.conv1.weight'}, ignorable=('mask_token', 'mask_gamma')),
        ),
        may_lack=(r'fc\..*', r'.*num_batches_tracked'),
        may_drop=(r'fc\..*',),
    ),
    'ConvNeXt': Intake(
        wrappers=('encoder',),
        formats=(
            OUR_A2MIM_ENCODER,
            Format(
                'ConvNeXt as released',
                {'downsample_layers.0.0.weight', 'stages.0.0.dwconv.weight'},
                RELEASED_CONVNEXT,
                adapt=convnext_version,
            ),
            *into_classifier(FAMILIES['ConvNeXt']),
            Format('ConvNeXt', {'stem.0.weight'}, ((r'norm3\.(.*)', r'head.norm.\1'),), adapt=convnext_version),
        ),
        may_lack=(r'head\.fc\..*',),
        may_drop=(r'head\.fc\..*',),
    ),
    'SwinTransformer': Intake(
        wrappers=('encoder',), formats=INTO_SWIN, may_lack=(r'head\..*',), may_drop=(r'head\..*',)
    ),
    'MixMAE': Intake(wrappers=(), formats=INTO_MIXMAE, may_lack=('absolute_pos_embed', 'decoder_pos_embed')),
    'MixMIMClassifier': Intake(
        wrappers=('encoder',),
        formats=INTO_MIXMIM_CLASSIFIER,
        may_lack=('absolute_pos_embed', r'head\..*'),
        may_drop=(r'head\..*',),
    ),
}
# any other network of timm's: its own names, or our pretraining's around them
ANY_INTAKE = Intake(
    wrappers=('encoder',),
    formats=(OUR_A2MIM_ENCODER, Format("timm's names", set(), ignorable=COMPUTED)),
    may_lack=(HEADS, r'.*num_batches_tracked'),
    may_drop=(HEADS,),
)


# which intake the encoder of a pretraining model has; A2MIM's is a network of its own
ENCODERS = {
    'MIRL': 'VisionTransformer',
    'LocalMIMViT': 'VisionTransformer',
    'LocalMIMSwin': 'LocalMIMSwinClassifier',
    'MixMAE': 'MixMIMClassifier',
}
