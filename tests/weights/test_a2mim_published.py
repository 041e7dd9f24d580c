"""Checkpoints of A2MIM and SimMIM: OpenMixup's, Microsoft's, timm's and our own, key by key and number by number.

What a file holds is written down here by hand, layer by layer, each name of the file's beside timm's.
"""

import functools
import sys
import types

import fill
import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from golden import golden
from timm.layers import resize_rel_pos_bias_table
from timm.models.swin_transformer import PatchMerging

import models_a2mim
from models_a2mim import create_classifier
from util import checkpoint
from util.errors import CheckpointError
from util.weights import load_published

Rows = list[tuple[str, str | None, tuple]]  # a name in the file, ours (None: nothing here has use for it), its shape

# --------------------------------------------------------------------------
# what the files hold


def layer(theirs: str, ours: str, shape: tuple, bias: bool = True) -> Rows:
    """A weight and its bias."""
    rows = [(f'{theirs}.weight', f'{ours}.weight', shape)]
    return rows + [(f'{theirs}.bias', f'{ours}.bias', shape[:1])] * bias


def vit(width, depth, heads, hidden, grid, last='ln1') -> Rows:
    """OpenMixup's BEiT-like ViT. `last`: ln1 after pretraining, fc_norm after fine-tuning."""
    rows = [('cls_token', 'cls_token', (1, 1, width)), ('pos_embed', 'pos_embed', (1, 1 + grid**2, width))]
    rows += layer('patch_embed.projection', 'patch_embed.proj', (width, 3, 16, 16))
    for i in range(depth):
        a, b = f'layers.{i}', f'blocks.{i}'
        rows += [(f'{a}.gamma_1', f'{b}.gamma_1', (width,)), (f'{a}.gamma_2', f'{b}.gamma_2', (width,))]
        rows += layer(f'{a}.ln1', f'{b}.norm1', (width,))
        rows += [(f'{a}.attn.q_bias', f'{b}.attn.q_bias', (width,)), (f'{a}.attn.v_bias', f'{b}.attn.v_bias', (width,))]
        table = 'attn.relative_position_bias_table'
        rows += [(f'{a}.{table}', f'{b}.{table}', ((2 * grid - 1) ** 2 + 3, heads))]
        rows += [(f'{a}.attn.relative_position_index', None, (1 + grid**2, 1 + grid**2))]
        rows += layer(f'{a}.attn.qkv', f'{b}.attn.qkv', (3 * width, width), bias=False)
        rows += layer(f'{a}.attn.proj', f'{b}.attn.proj', (width, width))
        rows += layer(f'{a}.ln2', f'{b}.norm2', (width,))
        rows += layer(f'{a}.ffn.layers.0.0', f'{b}.mlp.fc1', (hidden, width))
        rows += layer(f'{a}.ffn.layers.1', f'{b}.mlp.fc2', (width, hidden))
    return rows + layer(last, {'ln1': 'norm', 'fc_norm': 'fc_norm'}[last], (width,))


def resnet(blocks, bottleneck=True) -> Rows:
    """torchvision's names, which are OpenMixup's and timm's."""

    def conv_norm(conv: str, norm: str, out: int, into: int, kernel: int) -> Rows:
        rows = layer(conv, conv, (out, into, kernel, kernel), bias=False) + layer(norm, norm, (out,))
        rows += [(f'{norm}.{k}', f'{norm}.{k}', (out,)) for k in ('running_mean', 'running_var')]
        rows += [(f'{norm}.num_batches_tracked', f'{norm}.num_batches_tracked', ())]
        return rows

    rows, into = conv_norm('conv1', 'bn1', 64, 3, 7), 64
    for stage, count in enumerate(blocks):
        width = 64 * 2**stage
        out = 4 * width if bottleneck else width
        for j in range(count):
            name = f'layer{stage + 1}.{j}'
            sizes = [(width, into, 1), (width, width, 3), (out, width, 1)]
            for k, size in enumerate(sizes if bottleneck else [(width, into, 3), (width, width, 3)], start=1):
                rows += conv_norm(f'{name}.conv{k}', f'{name}.bn{k}', *size)
            if into != out:
                rows += conv_norm(f'{name}.downsample.0', f'{name}.downsample.1', out, into, 1)
            into = out
    return rows


def convnext(depths, widths) -> Rows:
    """OpenMixup's ConvNeXt: all down-sampling layers in one list, their norm first but in the stem."""
    rows = layer('downsample_layers.0.0', 'stem.0', (widths[0], 3, 4, 4))
    rows += layer('downsample_layers.0.1', 'stem.1', (widths[0],))
    for i, (depth, width) in enumerate(zip(depths, widths, strict=True)):
        if i:
            rows += layer(f'downsample_layers.{i}.0', f'stages.{i}.downsample.0', (widths[i - 1],))
            rows += layer(f'downsample_layers.{i}.1', f'stages.{i}.downsample.1', (width, widths[i - 1], 2, 2))
        for j in range(depth):
            a, b = f'stages.{i}.{j}', f'stages.{i}.blocks.{j}'
            rows += [(f'{a}.gamma', f'{b}.gamma', (width,))]
            rows += layer(f'{a}.depthwise_conv', f'{b}.conv_dw', (width, 1, 7, 7))
            rows += layer(f'{a}.norm', f'{b}.norm', (width,))
            rows += layer(f'{a}.pointwise_conv1', f'{b}.mlp.fc1', (4 * width, width))
            rows += layer(f'{a}.pointwise_conv2', f'{b}.mlp.fc2', (width, 4 * width))
    return rows + layer('norm3', 'head.norm', (widths[-1],))


def swin(width, depths, heads, window, names='openmixup', shifted=()) -> Rows:
    """Swin with merging at the end of a stage. `names`: openmixup's, or microsoft's, which are timm's otherwise.

    `shifted`: stages whose odd blocks keep their attention mask, in Microsoft's files.
    """
    openmixup = names == 'openmixup'
    rows = layer('patch_embed.projection' if openmixup else 'patch_embed.proj', 'patch_embed.proj', (width, 3, 4, 4))
    rows += layer('patch_embed.norm', 'patch_embed.norm', (width,))
    stages, attn = ('stages', 'attn.w_msa') if openmixup else ('layers', 'attn')
    fc1, fc2 = ('ffn.layers.0.0', 'ffn.layers.1') if openmixup else ('mlp.fc1', 'mlp.fc2')
    for i, depth in enumerate(depths):
        dim = width * 2**i
        for j in range(depth):
            a, b = f'{stages}.{i}.blocks.{j}', f'layers.{i}.blocks.{j}'
            rows += layer(f'{a}.norm1', f'{b}.norm1', (dim,))
            table = 'relative_position_bias_table'
            rows += [(f'{a}.{attn}.{table}', f'{b}.attn.{table}', ((2 * window - 1) ** 2, heads[i]))]
            rows += [(f'{a}.{attn}.relative_position_index', None, (window**2, window**2))]
            rows += layer(f'{a}.{attn}.qkv', f'{b}.attn.qkv', (3 * dim, dim))
            rows += layer(f'{a}.{attn}.proj', f'{b}.attn.proj', (dim, dim))
            rows += layer(f'{a}.norm2', f'{b}.norm2', (dim,))
            rows += layer(f'{a}.{fc1}', f'{b}.mlp.fc1', (4 * dim, dim)) + layer(
                f'{a}.{fc2}', f'{b}.mlp.fc2', (dim, 4 * dim)
            )
            rows += [(f'{a}.attn_mask', None, (4, window**2, window**2))] * (j % 2 == 1 and i in shifted)
        if i < 3:
            a, b = f'{stages}.{i}.downsample', f'layers.{i + 1}.downsample'
            rows += layer(f'{a}.norm', f'{b}.norm', (4 * dim,))
            rows += layer(f'{a}.reduction', f'{b}.reduction', (2 * dim, 4 * dim), bias=False)
    return rows + layer('norm3' if openmixup else 'norm', 'norm', (8 * width,))


def microsoft_vit(width, depth, heads, grid, shared: bool) -> Rows:
    """SimMIM's ViT: no absolute positions, and in pretraining one table of relative ones `shared` by all blocks."""
    table, size = 'relative_position_bias_table', ((2 * grid - 1) ** 2 + 3, heads)
    rows = layer('patch_embed.proj', 'patch_embed.proj', (width, 3, 16, 16))
    rows += [('cls_token', 'cls_token', (1, 1, width))]
    rows += [(f'rel_pos_bias.{table}', f'blocks.0.attn.{table}', size)] * shared
    rows += [('rel_pos_bias.relative_position_index', None, (1 + grid**2, 1 + grid**2))] * shared
    for i in range(depth):
        name = f'blocks.{i}'
        rows += [(f'{name}.{k}', f'{name}.{k}', (width,)) for k in ('gamma_1', 'gamma_2', 'attn.q_bias', 'attn.v_bias')]
        if not shared:
            rows += [(f'{name}.attn.{table}', f'{name}.attn.{table}', size)]
            rows += [(f'{name}.attn.relative_position_index', None, (1 + grid**2, 1 + grid**2))]
        rows += layer(f'{name}.attn.qkv', f'{name}.attn.qkv', (3 * width, width), bias=False)
        rows += layer(f'{name}.attn.proj', f'{name}.attn.proj', (width, width))
        rows += layer(f'{name}.norm1', f'{name}.norm1', (width,)) + layer(f'{name}.norm2', f'{name}.norm2', (width,))
        rows += layer(f'{name}.mlp.fc1', f'{name}.mlp.fc1', (4 * width, width))
        rows += layer(f'{name}.mlp.fc2', f'{name}.mlp.fc2', (width, 4 * width))
    last = 'norm' if shared else 'fc_norm'
    return rows + layer(last, last, (width,))


def inside(prefix: str, into: str, rows: Rows) -> Rows:
    return [(prefix + theirs, ours and into + ours, shape) for theirs, ours, shape in rows]


def pretraining(backbone: Rows, token: tuple, width: int, stride=32, *, gamma=False, neck='decoder_pred') -> Rows:
    """A whole model of OpenMixup's: backbone, mask token, decoder."""
    rows = [('backbone.mask_token', 'mask_token', token)]
    rows += [('backbone.mask_gamma', 'mask_gamma', token if len(token) == 4 else token[2:])] * gamma
    rows += inside('backbone.', 'encoder.', backbone)
    return rows + layer(f'neck.{neck}.0', 'decoder', (3 * stride**2, width, 1, 1))


def fine_tuned(backbone: Rows, head: str, width: int, classes=1000) -> Rows:
    return inside('backbone.', '', backbone) + layer('head.fc', head, (classes, width))


def microsoft(backbone: Rows, token: int, width: int, stride: int) -> Rows:
    """A whole model of Microsoft's SimMIM."""
    rows = [('encoder.mask_token', 'mask_token', (1, 1, token))]
    rows += inside('encoder.', 'encoder.', backbone)
    return rows + layer('decoder.0', 'decoder', (3 * stride**2, width, 1, 1))


def filled(rows: Rows) -> dict[str, torch.Tensor]:
    """The file's state dict; integers as BatchNorm and relative positions have them."""

    def value(name, shape):
        if name.endswith('relative_position_index'):
            return torch.arange(int(np.prod(shape))).view(shape)
        return torch.tensor(12345) if name.endswith('tracked') else torch.from_numpy(fill.weight(name, shape))

    return {name: value(name, shape) for name, _, shape in rows}


def merged(value: torch.Tensor) -> torch.Tensor:
    """Channels of merged pixels from OpenMixup's order, c * 4 + dy * 2 + dx, to timm's, (dx * 2 + dy) * C + c."""
    channels = value.shape[-1] // 4
    order = torch.empty(4 * channels, dtype=torch.long)
    for c in range(channels):
        for dy in range(2):
            for dx in range(2):
                order[(dx * 2 + dy) * channels + c] = c * 4 + dy * 2 + dx
    return value[..., order]


def expected(rows: Rows, state: dict, openmixup=True) -> dict[str, torch.Tensor]:
    """What our model must hold: {our name: value}."""
    ours = {ours: state[theirs] for theirs, ours, _ in rows if ours}
    return {
        name: value.flatten()
        if name.startswith('mask_')
        else merged(value)
        if openmixup and 'layers.' in name and '.downsample.' in name
        else value
        for name, value in ours.items()
    }


def assert_holds(model, values: dict) -> None:
    """Every tensor of the model, and no other."""
    state = model.state_dict()
    assert state.keys() == values.keys()
    differing = [name for name, value in state.items() if not torch.equal(value, values[name])]
    assert not differing


def encoder_of(values: dict) -> dict:
    return {name.removeprefix('encoder.'): value for name, value in values.items() if name.startswith('encoder.')}


def bare(make, *args, **kwargs):
    """A model of any size at once, without storage; older timm needs some for making it."""
    try:
        with torch.device('meta'):
            return make(*args, **kwargs)
    except RuntimeError:
        return make(*args, **kwargs).to('meta')


def empty(make, *args, **kwargs):
    """A model whose weights are yet to come."""
    model = bare(make, *args, **kwargs).to_empty(device='cpu')
    for value in model.state_dict().values():
        value.zero_()
    return model


def error(model, source) -> str:
    """The line; the model must be as it was."""
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_published(model, source)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert '\n' not in str(caught.value)
    return str(caught.value).removeprefix('state dict: ')


# --------------------------------------------------------------------------
# whole models of the published sizes

R50 = resnet((3, 4, 6, 3))
CONVNEXT_S = convnext((3, 3, 27, 3), (96, 192, 384, 768))
SWIN_T = swin(96, (2, 2, 6, 2), (3, 6, 12, 24), window=6)
WHOLE = {  # name of a run: our model, its options, what its file holds
    'a2mim_vit_base': ('a2mim_vit_base', {}, pretraining(vit(768, 12, 12, 3072, 14), (1, 1, 768), 768, 16)),
    'a2mim_vit_small': ('a2mim_vit_small', {}, pretraining(vit(768, 8, 8, 2304, 14), (1, 1, 768), 768, 16)),
    'a2mim_resnet50': ('a2mim_resnet50', {}, pretraining(R50, (1, 1024, 1, 1), 2048, gamma=True)),
    'a2mim_convnext_s': ('a2mim_convnext_small', {}, pretraining(CONVNEXT_S, (1, 768, 1, 1), 768, gamma=True)),
    'a2mim_convnext_t': (
        'a2mim_convnext_tiny',
        {},
        pretraining(convnext((3, 3, 9, 3), (96, 192, 384, 768)), (1, 768, 1, 1), 768, gamma=True),
    ),
    'simmim_vit_base': (
        'simmim_vit_base',
        {},
        pretraining(vit(768, 12, 12, 3072, 14), (1, 1, 768), 768, 16, neck='decoder'),
    ),
    'simmim_resnet50': ('simmim_resnet50', {}, pretraining(R50, (1, 64, 1, 1), 2048, neck='decoder')),
    'simmim_convnext_s': ('simmim_convnext_small', {}, pretraining(CONVNEXT_S, (1, 96, 1, 1), 768, neck='decoder')),
    'simmim_swin_tiny': ('simmim_swin_tiny', {}, pretraining(SWIN_T, (1, 1, 96), 768, neck='decoder')),
    'resnet18_simmim': (
        'simmim_resnet50',
        dict(name='resnet18'),
        pretraining(resnet((2, 2, 2, 2), bottleneck=False), (1, 64, 1, 1), 512, neck='decoder'),
    ),
    'tiny_vit_l2_detach': (
        'a2mim_vit_small',
        dict(img_size=96, embed_dim=64, depth=3, num_heads=4, mlp_ratio=2.5, mask_layer=2, mask_init=0.01, detach=True),
        pretraining(vit(64, 3, 4, 160, 6), (1, 1, 64), 64, 16, gamma=True),
    ),
    'tiny_resnet_l0': (
        'a2mim_resnet50',
        dict(img_size=96, layers=(1, 1, 1, 1), mask_layer=0),
        pretraining(resnet((1, 1, 1, 1)), (1, 64, 1, 1), 2048, gamma=True),
    ),
}
TUNED = {  # and of fine-tuned ones; with its millions of parameters
    'ft_vit_base': ('a2mim_vit_base', {}, fine_tuned(vit(768, 12, 12, 3072, 14, 'fc_norm'), 'head', 768), 86.7),
    'ft_vit_small': ('a2mim_vit_small', {}, fine_tuned(vit(768, 8, 8, 2304, 14, 'fc_norm'), 'head', 768), 48.8),
    'ft_resnet50': ('a2mim_resnet50', {}, fine_tuned(R50, 'fc', 2048), 25.557),
    'ft_resnet50_160': ('a2mim_resnet50', dict(img_size=160), fine_tuned(R50, 'fc', 2048), 25.557),
    'ft_convnext_s': ('a2mim_convnext_small', {}, fine_tuned(CONVNEXT_S, 'head.fc', 768), 50.22),
    'ft_swin_t': ('simmim_swin_tiny', dict(img_size=192), fine_tuned(SWIN_T, 'head.fc', 768), 28.3),
}


def test_names_are_the_published_ones():
    """The lists above against those that the published code gave: names of eight, names and shapes of two."""
    groups = golden('a2mim/optim_and_lr.json')['param_groups']
    runs = {'a2mim_r50_ep300': 'a2mim_resnet50', 'simmim_r50': 'simmim_resnet50', 'ft_r50_a2': 'ft_resnet50'}
    runs |= {'ft_convnext_t_ld': None, 'a2mim_r50_ep100': None}  # as ft_convnext_s and ep300
    buffers = ('running_mean', 'running_var', 'tracked', 'relative_position_index')
    for run, data in groups.items():
        if name := runs.get(run, run):
            rows = (WHOLE | TUNED)[name][2]
            assert {name for name, _, _ in rows if not name.endswith(buffers)} == data['params'].keys()
    tiny_resnet = pretraining(resnet((1, 1, 1, 1)), (1, 1024, 1, 1), 2048, gamma=True)
    for case, rows in (('tiny_vit_l2', WHOLE['tiny_vit_l2_detach'][2]), ('tiny_resnet', tiny_resnet)):
        data = golden(f'a2mim/{case}.json')
        theirs = {(name, tuple(shape)) for name, shape, *_ in data['params'] + data['buffers']}
        assert {(name, shape) for name, _, shape in rows} == theirs


def on_meta(rows: Rows) -> dict:
    """The file's state dict without numbers."""
    integer = ('relative_position_index', 'tracked')
    return {
        name: torch.empty(shape, dtype=torch.int64 if name.endswith(integer) else torch.float32, device='meta')
        for name, _, shape in rows
    }


@pytest.mark.filterwarnings('ignore:.*copying from a non-meta')
@pytest.mark.parametrize('run', WHOLE | TUNED)
def test_every_published_size(run):
    """Every name and shape, with the integer buffers and without."""
    name, options, rows = (WHOLE | TUNED)[run][:3]
    if run in TUNED:
        model = bare(create_classifier, name, **options)
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(TUNED[run][3], abs=0.06)
    else:
        model = bare(getattr(models_a2mim, name), **options)
    counted = [key for key in model.state_dict() if key.endswith('tracked')]
    state = on_meta(rows)
    report = load_published(model, state)
    assert report.ignored == [theirs for theirs, ours, _ in rows if ours is None]
    assert not report.missing + report.resized
    assert len(report.loaded) == len(model.state_dict())
    report = load_published(model, {key: value for key, value in state.items() if value.is_floating_point()})
    assert not report.ignored + report.resized
    assert report.missing == counted


@pytest.mark.parametrize('run', ['a2mim_vit_base', 'a2mim_resnet50', 'a2mim_convnext_s', 'simmim_swin_tiny'])
def test_published_values(run, measured):
    """A whole file into the pretraining model, and its encoder into the classifier."""
    name, _, rows = WHOLE[run]
    state = filled(rows)
    values = expected(rows, state)
    model = empty(getattr(models_a2mim, name))
    report = load_published(model, {'state_dict': state, 'meta': {'epoch': 300}, 'optimizer': {}})
    assert_holds(model, values)
    assert len(report.loaded) == len(values)
    assert not report.missing

    net = empty(create_classifier, name, img_size=model.img_size)
    result = load_published(net, {'state_dict': state})
    weights = encoder_of(values)
    lacking = {'head.weight', 'head.bias', 'fc_norm.weight', 'fc_norm.bias', 'fc.weight', 'fc.bias'}
    lacking |= {'head.fc.weight', 'head.fc.bias'}
    own = net.state_dict()
    assert set(result.missing) == lacking & own.keys()
    assert all(torch.equal(own[key], weights[key]) for key in own if key not in lacking)
    assert set(weights) - set(own) <= {'norm.weight', 'norm.bias'}
    measured(f'{run}: {len(rows)} keys; {str(report)[:110]}')


# --------------------------------------------------------------------------
# files of small models: OpenMixup's

SMALL = {  # family: model, options of the encoder, what its file holds, last layer, width, image side
    'vit': (
        'a2mim_vit_small',
        dict(embed_dim=32, depth=2, num_heads=2, mlp_ratio=2),
        lambda last='ln1': vit(32, 2, 2, 64, 4, last),
        'head',
        32,
    ),
    'resnet': (
        'simmim_resnet50',
        dict(name='resnet18', layers=(1, 1, 1, 1)),
        lambda: resnet((1, 1, 1, 1), False),
        'fc',
        512,
    ),
    'convnext': (
        'simmim_convnext_tiny',
        dict(depths=(1, 1, 2, 1), dims=(8, 16, 24, 32)),
        lambda: convnext((1, 1, 2, 1), (8, 16, 24, 32)),
        'head.fc',
        32,
    ),
    'swin': (
        'simmim_swin_tiny',
        dict(embed_dim=8, depths=(2, 2, 2, 2), num_heads=(1, 2, 2, 4), window_size=2),
        lambda: swin(8, (2, 2, 2, 2), (1, 2, 2, 4), 2),
        'head.fc',
        64,
    ),
}
TOKENS = {'vit': (1, 1, 32), 'resnet': (1, 64, 1, 1), 'convnext': (1, 8, 1, 1), 'swin': (1, 1, 8)}


def small(family, classes=None, **kwargs):
    """The small pretraining model of a family, or its classifier of so many classes, at 64 pixels."""
    name, options = SMALL[family][:2]
    torch.manual_seed(0)
    if classes is None:
        return getattr(models_a2mim, name)(**{'img_size': 64} | options | kwargs)
    return create_classifier(name, classes, **{'img_size': 64} | options | kwargs).eval()


def images(size=64):
    return torch.from_numpy(fill.images(2, size))


def whole(family) -> Rows:
    name, _, backbone, _, width = SMALL[family]
    neck = 'decoder_pred' if name.startswith('a2mim') else 'decoder'
    return pretraining(backbone(), TOKENS[family], width, 16 if family == 'vit' else 32, neck=neck)


def tuned(family, classes=5) -> Rows:
    _, _, backbone, head, width = SMALL[family]
    return fine_tuned(backbone('fc_norm') if family == 'vit' else backbone(), head, width, classes)


META = {
    'mmcv_version': '1.7.2',
    'config': 'model = dict(\n    type="A2MIM")',
    'CLASSES': None,
    'hook_msgs': {},
    'epoch': 800,
    'iter': 5,
}
OPTIMIZER = {
    'state': {0: {'step': 5, 'exp_avg': torch.ones(2)}},
    'param_groups': [{'lr': 1e-3, 'betas': (0.9, 0.999), 'params': [0]}],
}


@pytest.mark.parametrize('family', SMALL)
def test_openmixup_pretraining(tmp_path, family):
    """`*_full.pth`, with an average's buffers beside it: into the same model, and its encoder into the classifier."""
    rows = whole(family)
    state = filled(rows)
    averages = {'ema_' + name.replace('.', '_'): torch.zeros(shape) for name, ours, shape in rows if ours}
    torch.save({'meta': META, 'state_dict': state | averages, 'optimizer': OPTIMIZER}, tmp_path / 'a_full.pth')
    values = expected(rows, state)

    model = small(family)
    report = load_published(model, tmp_path / 'a_full.pth')
    assert_holds(model, values)
    assert sorted(report.ignored) == sorted([*averages, *(theirs for theirs, ours, _ in rows if not ours)])
    assert not report.missing + report.resized
    loss, _ = model(images(), model.plan_from_noise(torch.rand(model.noise_shape(2))))
    assert loss.isfinite()

    net = small(family, 5)
    twin = small(family, 5)
    report = load_published(net, tmp_path / 'a_full.pth')
    twin.load_state_dict(encoder_of(values), strict=False)
    assert torch.equal(net(images()), twin(images()))
    assert {key.rpartition('.')[0] for key in report.missing} == {SMALL[family][3]} | (
        {'fc_norm'} if family == 'vit' else set()
    )


def test_openmixup_class_token():
    """A classifier of the class token has the pretraining's last norm."""
    rows = whole('vit')
    state = filled(rows)
    net = small('vit', 5, global_pool='token')
    assert load_published(net, state).missing == ['head.weight', 'head.bias']
    assert torch.equal(net.norm.weight, state['backbone.ln1.weight'])


@pytest.mark.parametrize('family', SMALL)
def test_openmixup_fine_tuned(tmp_path, family):
    rows = tuned(family)
    state = filled(rows)
    torch.save({'meta': META, 'state_dict': state}, tmp_path / 'a.pth')
    twin, net = small(family, 5), small(family, 5)
    twin.load_state_dict(expected(rows, state), strict=True)
    report = load_published(net, tmp_path / 'a.pth')
    assert_holds(net, expected(rows, state))
    assert not report.missing + report.resized
    assert torch.equal(net(images()), twin(images()))

    other = small(family, 7)  # a head for other classes starts anew
    report = load_published(other, tmp_path / 'a.pth')
    head = SMALL[family][3]
    assert report.missing == [f'{head}.weight', f'{head}.bias']
    assert f'{head}.weight [5, {SMALL[family][4]}]' in report.ignored


@pytest.mark.parametrize('family', SMALL)
def test_openmixup_extracted(tmp_path, family):
    """What is left of a file when a backbone is taken out of it: no prefixes, and the mask token."""
    rows = whole(family)
    state = filled(rows)
    kept = {name.removeprefix('backbone.'): value for name, value in state.items() if name.startswith('backbone.')}
    torch.save({'state_dict': kept | {'mask_gamma': torch.ones(8)}, 'author': 'openmixup'}, tmp_path / 'a.pth')
    net, same = small(family, 5), small(family, 5)
    report = load_published(net, tmp_path / 'a.pth')
    load_published(same, {'state_dict': state})
    assert torch.equal(net(images()), same(images()))
    assert {'mask_token', 'mask_gamma'} <= set(report.ignored)
    assert error(small(family), tmp_path / 'a.pth').count(': ') >= 1  # it holds no decoder


# --------------------------------------------------------------------------
# Swin's merging


def unfolded(state: dict, name: str, x: torch.Tensor) -> torch.Tensor:
    """OpenMixup's merging, [N, H, W, C] -> [N, H / 2, W / 2, 2 C]: the pixels as nn.Unfold lays them out."""
    side = x.shape[1] // 2
    x = torch.nn.Unfold(kernel_size=2, stride=2)(x.permute(0, 3, 1, 2)).transpose(1, 2)
    x = F.layer_norm(x, x.shape[-1:], state[f'{name}.norm.weight'], state[f'{name}.norm.bias'])
    return (x @ state[f'{name}.reduction.weight'].t()).unflatten(1, (side, side))


def test_merging(measured):
    """One merging layer, with weights of another order than timm's."""
    state = filled(layer('m.norm', '', (32,)) + layer('m.reduction', '', (16, 32), bias=False))
    ours = PatchMerging(8)
    ours.load_state_dict({name.removeprefix('m.'): merged(value) for name, value in state.items()})
    x = torch.from_numpy(fill._generator('x').standard_normal((2, 6, 6, 8)).astype(np.float32))
    difference = (ours(x) - unfolded(state, 'm', x)).abs().max().item()
    assert difference < 2e-6
    ours.load_state_dict({name.removeprefix('m.'): value for name, value in state.items()})
    assert (ours(x) - unfolded(state, 'm', x)).abs().max() > 0.1  # the same names and shapes, and wrong
    measured(f"Swin's merging: {difference:.1e} between OpenMixup's layout and timm's")


def swin_latent(state: dict, imgs, mask, depths, heads, window) -> torch.Tensor:
    """Swin as OpenMixup's names and layout have it, window by window: [N, 3, S, S] -> [N, S / 32, S / 32, C].

    `mask` [N, S / 4, S / 4]: where the mask token replaces the patches.
    """

    def norm(name, x):
        return F.layer_norm(x, x.shape[-1:], state[f'{name}.weight'], state[f'{name}.bias'])

    def linear(name, x):
        return F.linear(x, state[f'{name}.weight'], state[f'{name}.bias'])

    def attention(name, x, heads, bias, apart):  # x [N, w * w, C]
        q, k, v = linear(f'{name}.qkv', x).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        logits = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1) + bias - 100.0 * apart
        return linear(f'{name}.proj', (logits.softmax(-1) @ v).transpose(1, 2).flatten(2))

    patch = 'patch_embed.projection'
    x = F.conv2d(imgs, state[f'{patch}.weight'], state[f'{patch}.bias'], stride=4).permute(0, 2, 3, 1)
    x = norm('patch_embed.norm', x)
    x = x * (1 - mask.unsqueeze(-1)) + state['mask_token'] * mask.unsqueeze(-1)
    place = [(row, col) for row in range(window) for col in range(window)]
    index = torch.tensor(
        [[(a - c + window - 1) * (2 * window - 1) + b - d + window - 1 for c, d in place] for a, b in place]
    )
    for i, depth in enumerate(depths):
        for j in range(depth):
            name, side = f'stages.{i}.blocks.{j}', x.shape[1]
            shift = window // 2 if j % 2 and side > window else 0
            bias = state[f'{name}.attn.w_msa.relative_position_bias_table'][index].permute(2, 0, 1)
            y = norm(f'{name}.norm1', x).roll((-shift, -shift), (1, 2))
            wrapped = torch.arange(side) + shift >= side
            region = 2 * wrapped[:, None] + wrapped[None, :] * 1  # where a pixel has come from over the edge
            out = torch.empty_like(y)
            for row in range(0, side, window):
                for col in range(0, side, window):
                    at = (slice(row, row + window), slice(col, col + window))
                    labels = region[at].flatten()
                    tile = y[:, *at].flatten(1, 2)
                    tile = attention(f'{name}.attn.w_msa', tile, heads[i], bias, labels[:, None] != labels[None, :])
                    out[:, *at] = tile.unflatten(1, (window, window))
            x = x + out.roll((shift, shift), (1, 2))
            y = F.gelu(linear(f'{name}.ffn.layers.0.0', norm(f'{name}.norm2', x)))
            x = x + linear(f'{name}.ffn.layers.1', y)
        if i < 3:
            x = unfolded(state, f'stages.{i}.downsample', x)
    return norm('norm3', x)


def test_swin(measured):
    """The whole network against one written in the file's own names and layout; and with merging left as it lies."""
    rows = whole('swin')
    state = filled(rows)
    model = small('swin', drop_path_rate=0.0).eval()
    load_published(model, state)
    plan = model.plan_from_noise(torch.from_numpy(fill.uniform('a2mim', model.noise_shape(2))))
    mask = plan.mask.view(2, 2, 2).repeat_interleave(8, 1).repeat_interleave(8, 2)
    theirs = {name.removeprefix('backbone.'): value for name, value in state.items()}
    latent = swin_latent(theirs, images(), mask, (2, 2, 2, 2), (1, 2, 2, 4), 2)

    def difference():
        return (model.forward_encoder(images(), plan.mask).permute(0, 2, 3, 1) - latent).abs().max().item()

    found = difference()
    measured(f"Swin: {found:.1e} between the latents of OpenMixup's layout and timm's")
    assert found < 1e-5
    names = ('norm.weight', 'norm.bias', 'reduction.weight')
    for i in range(3):
        merging = model.encoder.layers[i + 1].downsample
        merging.load_state_dict({name: theirs[f'stages.{i}.downsample.{name}'] for name in names})
    assert difference() > 0.01


# --------------------------------------------------------------------------
# Microsoft's SimMIM


@pytest.fixture
def microsoft_run(monkeypatch):
    """What their runs save beside the weights: a configuration of yacs, which need not be installed to read it."""
    config = types.ModuleType('yacs.config')
    config.CfgNode = type('CfgNode', (dict,), {'__module__': 'yacs.config'})
    monkeypatch.setitem(sys.modules, 'yacs', types.ModuleType('yacs'))
    monkeypatch.setitem(sys.modules, 'yacs.config', config)
    node = config.CfgNode(MODEL=config.CfgNode(TYPE='vit', DROP_RATE=0.0), DATA=(1, None))
    node.__dict__.update({'__immutable__': True, '__deprecated_keys__': {'OLD'}, '__renamed_keys__': {}})
    return {'optimizer': OPTIMIZER, 'lr_scheduler': {'t': 1}, 'max_accuracy': 0.0, 'epoch': 799, 'config': node}


def test_microsoft_vit_pretraining(tmp_path, microsoft_run, monkeypatch):
    """No absolute positions, one table of relative ones for all blocks."""
    rows = microsoft(microsoft_vit(32, 2, 2, 4, shared=True), 32, 32, 16)
    state = filled(rows)
    torch.save({'model': state, **microsoft_run}, tmp_path / 'a.pth')
    monkeypatch.undo()
    assert 'yacs' not in sys.modules
    values = expected(rows, state, openmixup=False)
    table = state['encoder.rel_pos_bias.relative_position_bias_table']
    values |= {f'encoder.blocks.{i}.attn.relative_position_bias_table': table for i in range(2)}
    values['encoder.pos_embed'] = torch.zeros(1, 17, 32)

    model = small('vit', mlp_ratio=4)
    report = load_published(model, tmp_path / 'a.pth')
    assert_holds(model, values)
    assert report.ignored == ['encoder.rel_pos_bias.relative_position_index']
    tables = [block.attn.relative_position_bias_table for block in model.encoder.blocks]
    assert tables[0].data_ptr() != tables[1].data_ptr()

    net, twin = small('vit', 5, mlp_ratio=4), small('vit', 5, mlp_ratio=4)
    report = load_published(net, tmp_path / 'a.pth')
    twin.load_state_dict(encoder_of(values), strict=False)
    assert sorted(report.missing) == ['fc_norm.bias', 'fc_norm.weight', 'head.bias', 'head.weight']
    assert torch.equal(net(images()), twin(images()))

    # the network as theirs is: one table that stays shared
    sizes = dict(use_abs_pos_emb=False, use_rel_pos_bias=False, use_shared_rel_pos_bias=True, mlp_ratio=4)
    shared = small('vit', 5, **sizes)
    load_published(shared, tmp_path / 'a.pth')
    load_published(net, {'model': state})
    shared.fc_norm, shared.head = net.fc_norm, net.head
    assert torch.allclose(shared(images()), net(images()), atol=1e-6)


def test_microsoft_vit_fine_tuned(tmp_path, microsoft_run):
    rows = microsoft_vit(32, 2, 2, 4, shared=False) + layer('head', 'head', (5, 32))
    state = filled(rows)
    torch.save({'model': state, **microsoft_run}, tmp_path / 'a.pth')
    net = small('vit', 5, mlp_ratio=4)
    report = load_published(net, tmp_path / 'a.pth')
    assert_holds(net, expected(rows, state, openmixup=False) | {'pos_embed': torch.zeros(1, 17, 32)})
    assert len(report.ignored) == 2
    stock = small('vit', 5, mlp_ratio=4, use_abs_pos_emb=False)  # BEiT as it is in timm, which has these names
    stock.load_state_dict({name: value for name, value in state.items() if not name.endswith('_index')}, strict=True)
    assert torch.equal(net(images()), stock(images()))


def test_microsoft_swin(tmp_path, microsoft_run):
    """Merging ends a stage in their files, in timm's order of channels."""
    backbone = swin(8, (2, 2, 2, 2), (1, 2, 2, 4), 2, names='microsoft', shifted=(0, 1, 2))
    rows = microsoft(backbone, 8, 64, 32)
    state = filled(rows)
    assert sum(name.endswith('attn_mask') for name in state) == 3
    torch.save({'model': state, **microsoft_run}, tmp_path / 'pretrained.pth')
    model = small('swin')
    report = load_published(model, tmp_path / 'pretrained.pth')
    values = expected(rows, state, openmixup=False)
    assert_holds(model, values)
    assert len(report.ignored) == 8 + 3
    net = small('swin', 5)
    report = load_published(net, tmp_path / 'pretrained.pth')
    assert report.missing == ['head.fc.weight', 'head.fc.bias']
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in encoder_of(values).items())

    rows = backbone + layer('head', 'head.fc', (5, 64))
    state = filled(rows)
    torch.save({'model': state, **microsoft_run}, tmp_path / 'tuned.pth')
    net = small('swin', 5)
    report = load_published(net, tmp_path / 'tuned.pth')
    assert_holds(net, expected(rows, state, openmixup=False))
    assert report.format == 'Microsoft Swin'
    assert net(images()).isfinite().all()
    net = small('swin', 7)
    assert load_published(net, state).missing == ['head.fc.weight', 'head.fc.bias']


def test_openmmlab_run(tmp_path, monkeypatch):
    """What MMEngine saves beside the weights: histories of the logs."""
    module = types.ModuleType('mmengine.logging.history_buffer')
    module.HistoryBuffer = type('HistoryBuffer', (), {'__module__': module.__name__})
    for name in ('mmengine', 'mmengine.logging'):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    buffer = module.HistoryBuffer()
    buffer.__dict__.update(max_length=1000, _log_history=np.array([0.5, 0.25]), _count_history=np.array([1, 1]))
    hub = {'log_scalars': {'train/loss': buffer}, 'runtime_info': {'iter': 5}, 'resumed_keys': {}}
    rows = tuned('swin')
    torch.save({'meta': META, 'state_dict': filled(rows), 'message_hub': hub}, tmp_path / 'a.pth')
    monkeypatch.undo()
    net = small('swin', 5)
    load_published(net, tmp_path / 'a.pth')
    assert_holds(net, expected(rows, filled(rows)))


# --------------------------------------------------------------------------
# timm's files, and our own


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
@pytest.mark.parametrize('family', SMALL)
def test_timm_files(tmp_path, family, suffix):
    """Stock networks; timm's BEiT has no absolute positions."""
    stock = small(family, 5, **({'use_abs_pos_emb': False} if family == 'vit' else {}))
    state = {
        name: torch.randn_like(value) * 0.1 for name, value in stock.state_dict().items() if value.is_floating_point()
    }
    state |= {name: value.abs() + 0.5 for name, value in state.items() if name.endswith('running_var')}
    stock.load_state_dict(state, strict=False)
    save = {'.pth': torch.save, '.safetensors': safetensors.torch.save_file}[suffix]
    save(stock.state_dict(), tmp_path / f'a{suffix}')
    net = small(family, 5)
    report = load_published(net, tmp_path / f'a{suffix}')
    assert not report.missing + report.ignored + report.resized
    assert torch.allclose(net(images()), stock(images()), atol=1e-6)
    assert 'OpenMixup' not in report.format
    if family == 'vit':
        other = small(family, 5, use_abs_pos_emb=False)
        load_published(other, tmp_path / f'a{suffix}')
        assert torch.equal(other(images()), stock(images()))
    else:
        assert torch.equal(net(images()), stock(images()))


def own_checkpoint(path, model):
    checkpoint.save(path, {'model': model.state_dict(), 'encoder': model.encoder_state_dict(), 'args': {'lr': 1e-3}})


@pytest.mark.parametrize('family', SMALL)
def test_own_checkpoints(tmp_path, family):
    rows = whole(family)
    source, model = small(family), small(family)
    load_published(source, filled(rows))
    own_checkpoint(tmp_path / 'a.pth', source)
    report = load_published(model, tmp_path / 'a.pth')
    assert len(report.loaded) == len(model.state_dict())
    assert_holds(model, source.state_dict())
    for content in (tmp_path / 'a.pth', {'model': source.state_dict()}):
        net, twin = small(family, 5), small(family, 5)
        report = load_published(net, content)
        twin.load_state_dict(source.encoder_state_dict(), strict=False)
        assert torch.equal(net(images()), twin(images()))
        assert all(name.startswith((SMALL[family][3], 'fc_norm')) for name in report.missing)
    net = small(family, 5)  # and the classifier's own
    load_published(net, {'model': twin.state_dict()})
    assert_holds(net, twin.state_dict())


TIMM = {  # name: a key from the depth of the network
    'regnety_002': 's2.b1.se.fc1.weight',
    'efficientnet_b0': 'conv_head.weight',
    'mobilenetv3_small_050': 'blocks.0.0.se.conv_reduce.weight',
    'vit_tiny_patch16_224': 'blocks.0.mlp.fc1.weight',
}


@pytest.mark.parametrize('name', TIMM)
def test_any_network(tmp_path, name):
    """Our own checkpoints and timm's of networks that this file knows nothing of: no key less, no key more."""
    sizes = dict(depth=1, class_token=False, global_pool='avg') if name.startswith('vit') else {}
    options = {'name': name, 'img_size': 64} | sizes
    torch.manual_seed(0)
    source = models_a2mim.a2mim_timm(**options)
    own_checkpoint(tmp_path / 'a.pth', source)
    model = models_a2mim.a2mim_timm(**options)
    load_published(model, tmp_path / 'a.pth')
    assert_holds(model, source.state_dict())
    net = create_classifier('a2mim_timm', 5, **options).eval()
    report = load_published(net, tmp_path / 'a.pth')
    weights = source.encoder_state_dict()
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in weights.items())
    classifier = net.pretrained_cfg['classifier']
    assert report.missing == [f'{classifier}.weight', f'{classifier}.bias']

    stock = timm.create_model(name, num_classes=5, **({'img_size': 64} | sizes if sizes else {}))
    state = stock.state_dict()
    assert not load_published(net, state).missing
    assert torch.equal(net(images()), stock.eval()(images()))
    key = TIMM[name]
    line = error(net, {k: v for k, v in state.items() if k != key})
    assert f'differing keys (1): {key}: file absent, model {list(state[key].shape)}' in line
    assert 'differing keys (1): extra: file [2], model absent' in error(net, state | {'extra': torch.ones(2)})
    half = {key: state[key][: len(state[key]) // 2]}
    assert f'differing keys (1): {key}: file' in error(net, state | half)


def test_named_as_a_timm_network():
    """A BEiT by timm's name has no absolute positions; nobody asks for them."""
    net = create_classifier('a2mim_timm', 5, img_size=64, name='beit_base_patch16_224', depth=1).eval()
    stock = timm.create_model('beit_base_patch16_224', num_classes=5, img_size=64, depth=1).eval()
    assert not load_published(net, stock.state_dict()).missing
    assert torch.equal(net(images()), stock(images()))


# --------------------------------------------------------------------------
# another image size


def wider(table: torch.Tensor, new: int) -> torch.Tensor:
    """Swin's rule for tables [(2 w - 1)^2, heads]: bicubic."""
    old = int(len(table) ** 0.5)
    grid = F.interpolate(table.t().view(1, -1, old, old), size=(new, new), mode='bicubic')
    return grid.view(-1, new * new).t()


@pytest.mark.filterwarnings('ignore::UserWarning')  # timm's of torch's indexing
def test_vit_of_another_size():
    """Positions from 64 pixels (4 x 4 patches) to 128 (8 x 8): in classifiers and in pretraining models."""
    rows = whole('vit')
    state = filled(rows)
    model, net = small('vit', img_size=128), small('vit', 5, img_size=128)
    for network, prefix in ((model, 'encoder.'), (net, '')):
        report = load_published(network, state)
        assert sorted(report.resized) == [
            *(
                f'{prefix}blocks.{i}.attn.relative_position_bias_table [52, 2] -> [228, 2]' for i in range(2)
            ),
            f'{prefix}pos_embed [1, 17, 32] -> [1, 65, 32]',
        ]  # fmt: skip
        own = network.state_dict()
        for i in range(2):
            old = state[f'backbone.layers.{i}.attn.relative_position_bias_table']
            new = own[f'{prefix}blocks.{i}.attn.relative_position_bias_table']
            assert torch.equal(new, resize_rel_pos_bias_table(old, (8, 8), (228, 2)))
            assert torch.equal(new[-3:], old[-3:])  # of the class token
            middle = [(row, col) for row in (-1, 0, 1) for col in (-1, 0, 1)]  # neighbours stay neighbours
            before = torch.stack([old[(3 + row) * 7 + 3 + col] for row, col in middle])
            after = torch.stack([new[(7 + row) * 15 + 7 + col] for row, col in middle])
            assert torch.allclose(before, after, atol=1e-6)
        old = state['backbone.pos_embed']
        grid = F.interpolate(old[:, 1:].transpose(1, 2).view(1, 32, 4, 4), size=(8, 8), mode='bicubic')
        assert torch.equal(own[f'{prefix}pos_embed'][:, :1], old[:, :1])
        assert torch.allclose(own[f'{prefix}pos_embed'][:, 1:], grid.flatten(2).transpose(1, 2), atol=1e-6)
    assert net(images(128)).isfinite().all()
    assert model(images(128), model.plan_from_noise(torch.rand(model.noise_shape(2))))[0].isfinite()


@pytest.mark.filterwarnings('ignore::UserWarning')
def test_microsoft_vit_of_another_size():
    """The shared table is resized for each block."""
    state = filled(microsoft(microsoft_vit(32, 2, 2, 4, shared=True), 32, 32, 16))
    net = small('vit', 5, img_size=96, mlp_ratio=4)
    assert len(load_published(net, state).resized) == 2
    table = resize_rel_pos_bias_table(state['encoder.rel_pos_bias.relative_position_bias_table'], (6, 6), (124, 2))
    assert all(torch.equal(block.attn.relative_position_bias_table, table) for block in net.blocks)
    assert net(images(96)).isfinite().all()


@pytest.mark.parametrize('names', ['openmixup', 'microsoft'])
def test_swin_of_another_window(names):
    rows = swin(8, (2, 2, 2, 2), (1, 2, 2, 4), 2, names)
    rows = fine_tuned(rows, 'head.fc', 64, 5) if names == 'openmixup' else rows + layer('head', 'head.fc', (5, 64))
    state = filled(rows)
    net = small('swin', 5, img_size=96, window_size=3)
    report = load_published(net, state)
    assert len(report.resized) == 8
    assert report.resized[0] == 'layers.0.blocks.0.attn.relative_position_bias_table [9, 1] -> [25, 1]'
    values = expected(rows, state, openmixup=names == 'openmixup')
    tables = {name: wider(value, 5) for name, value in values.items() if name.endswith('bias_table')}
    own = net.state_dict()
    assert all(torch.allclose(own[name], value, atol=1e-6) for name, value in tables.items())
    assert all(torch.equal(own[name], value) for name, value in values.items() if name not in tables)
    assert net(images(96)).isfinite().all()
    line = error(small('swin', 5, img_size=96, window_size=3, num_heads=(2, 2, 2, 4)), state)
    assert 'differing keys (2): layers.0.blocks.0.attn.relative_position_bias_table: file [9, 1], model [25, 2]' in line


# --------------------------------------------------------------------------
# mistakes


def test_mistaken_files(measured):
    plain = timm.create_model('vit_tiny_patch16_224', depth=1, num_classes=5).state_dict()
    pretrained = {family: filled(whole(family)) for family in SMALL}
    r50 = filled(inside('backbone.', '', R50))
    cases = {
        'a plain ViT': (
            small('vit', 5),
            plain,
            "ViT: lacks BEiT's relative positions and LayerScale, which this model",
        ),
        "MAE's ViT": (small('vit', 5), {'model': plain}, "ViT: lacks BEiT's relative positions"),
        'a plain ViT, pretraining': (small('vit'), plain, 'not a checkpoint for this model: its keys are cls_token, '),
        'ResNet-50 into 101': (
            empty(create_classifier, 'a2mim_resnet101', 5),
            r50,
            'OpenMixup ResNet, but of another architecture; differing keys (255): '
            'layer3.6.conv1.weight: file absent, model [256, 1024, 1, 1]; '
            'layer3.6.bn1.weight: file absent, model [256]; layer3.6.bn1.bias: file absent, model [256]; '
            'layer3.6.bn1.running_mean: file absent, model [256]; '
            'layer3.6.bn1.running_var: file absent, model [256]; ...',
        ),
        'another decoder': (
            small('vit'),
            pretrained['vit'] | {'neck.decoder_pred.0.bias': torch.ones(3072)},
            'OpenMixup ViT pretraining, but of another architecture; differing keys (1): '
            'decoder.bias: file [3072], model [768]',
        ),
        'odd merging': (
            small('swin'),
            pretrained['swin'] | {'backbone.stages.0.downsample.norm.bias': torch.ones(33)},
            'OpenMixup Swin pretraining, but of another architecture; differing keys (1): '
            'encoder.layers.1.downsample.norm.bias: file [33], model [32]',
        ),
        'a key more': (
            small('resnet'),
            pretrained['resnet'] | {'backbone.layer9.weight': torch.ones(3), 'queue': torch.ones(2)},
            'OpenMixup ResNet pretraining, but of another architecture; differing keys (2): '
            'backbone.layer9.weight: file [3], model absent; queue: file [2], model absent',
        ),
        'no norm': (
            small('convnext', 5),
            {k: v for k, v in pretrained['convnext'].items() if 'norm3' not in k},
            'OpenMixup ConvNeXt, but of another architecture; differing keys (2): '
            'head.norm.weight: file absent, model [32]; head.norm.bias: file absent, model [32]',
        ),
    }
    for kind, (model, source, start) in cases.items():
        line = error(model, source)
        assert line.startswith(start)
        measured(f'{kind}: {line}')


@functools.cache
def every_file(family) -> list[dict]:
    model, net = small(family), small(family, 5)
    own = [{'model': model.state_dict()}, {'encoder': model.encoder_state_dict()}, net.state_dict()]
    return [filled(whole(family)), filled(tuned(family)), *own]


@pytest.mark.parametrize('family', SMALL)
def test_wrong_families(family):
    """Every file of another family is refused in a line, for pretraining models and classifiers."""
    sources = [file for name in SMALL if name != family for file in every_file(name)]
    sources += [filled(microsoft(microsoft_vit(32, 2, 2, 4, shared=True), 32, 32, 16))] * (family != 'vit')
    sources += [filled(microsoft(swin(8, (1, 1, 1, 1), (1, 2, 2, 4), 2, 'microsoft'), 8, 64, 32))] * (family != 'swin')
    for model in (small(family), small(family, 5)):
        for source in sources:
            line = error(model, source)
            assert (
                line.startswith(('not a checkpoint for this model', 'no weights in it')) or 'differing keys (' in line
            )
