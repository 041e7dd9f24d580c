"""Segmenters of ViTs and of A2MIM's convolutions: the numbers of mmsegmentation, and what every segmenter promises."""

import re

import pytest
import torch
from golden import filled_state, golden
from segmented import (
    assert_close,
    difference,
    gradient_difference,
    images,
    labels,
    network_differences,
    without_dropout,
)

import models_a2mim
import models_localmim
import models_mirl
from util.nn.upernet import FCNHead, Segmenter, UPerHead

VIT_NAMES = {
    r'^backbone\.fpn1\.|^neck\.upsample_4x\.': 'pyramid.up4.',
    r'^backbone\.fpn2\.|^neck\.upsample_2x\.': 'pyramid.up2.',
    r'^backbone\.(layers|blocks)': 'encoder.blocks',
    r'\.ffn\.layers\.0\.0\.': '.mlp.fc1.',
    r'\.ffn\.layers\.1\.': '.mlp.fc2.',
    r'\.ln(\d)\.': r'.norm\1.',
    r'\.projection\.': '.proj.',
}
CONVNEXT_NAMES = {
    r'downsample_layers\.0\.': 'stem.',
    r'downsample_layers\.(\d)\.': r'stages.\1.downsample.',
    r'(stages\.\d)\.(\d)': r'\1.blocks.\2',
    'depthwise_conv': 'conv_dw',
    r'pointwise_conv(\d)': r'mlp.fc\1',
}
SIZES = dict(num_classes=7, channels=32, aux_channels=16)
TINY = dict(SIZES, img_size=128, embed_dim=32, num_heads=4)
CASES = {
    'plain_vit_tiny': lambda: models_mirl.create_segmenter(
        'mirl_vit_base',
        **dict(SIZES, img_size=96, embed_dim=48, depth=9, num_heads=3),
        **dict(out_indices=[1, 4, 6, 8], rel_pos_bias=False, init_values=None, pool='avg'),
    ),
    'localmim_vit_tiny': lambda: models_localmim.create_segmenter(
        'localmim_vit_base', **TINY, depth=6, out_indices=[0, 2, 3, 5]
    ),
    'a2mim_vit_mae_tiny': lambda: models_a2mim.create_segmenter('a2mim_vit_base', **TINY, depth=4),
    'a2mim_vit_beit_tiny': lambda: models_a2mim.create_segmenter(
        'a2mim_vit_base', **TINY, depth=4, abs_pos_embed=False, init_values=0.1
    ),
    'a2mim_resnet50_fcn_64': lambda: models_a2mim.create_segmenter(
        'a2mim_resnet50', num_classes=7, channels=48, aux_channels=24
    ),
    'convnext_tiny': lambda: models_a2mim.create_segmenter(
        'a2mim_convnext_tiny', **SIZES, depths=(2, 1, 3, 1), dims=(16, 24, 32, 48)
    ),
}


def ours_of(name: str, own: dict) -> list[str]:
    """The reference's name of a parameter -> ours; a bias of q, k and v becomes two, where k has none."""
    for pattern, ours in (CONVNEXT_NAMES if any('conv_dw' in key for key in own) else VIT_NAMES).items():
        name = re.sub(pattern, ours, name)
    name = name.replace('backbone.', 'encoder.')
    return [name] if name in own else [name.replace('qkv.bias', part) for part in ('q_bias', 'v_bias')]


def load(model: Segmenter, params: list) -> dict[str, list[str]]:
    """Fill a model as the reference was; returns which of our parameters each of its parameters became."""
    own, state, names = model.state_dict(), {}, {}
    for name, value in filled_state(params).items():
        names[name] = ours_of(name, own)
        parts = [value] if len(names[name]) == 1 else value.chunk(3)[::2]
        state |= dict(zip(names[name], parts, strict=True))
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(key.endswith('num_batches_tracked') for key in missing)
    return names


@pytest.mark.parametrize('name', CASES)
def test_parity(name):
    model, reference = CASES[name](), golden(f'segmentation/{name}.json')
    names = load(model, reference['params'])
    if name == 'convnext_tiny':  # the reference's; pretraining, and so ours, has 1e-6 everywhere
        for stage in list(model.encoder.stages)[1:]:
            stage.downsample[0].eps = 1e-5
    found = network_differences(model, reference, names)
    print(name, {key: f'{value:.1e}' for key, value in found.items()})
    assert_close(found)


@pytest.mark.parametrize('name', ['heads', 'heads_odd'])
def test_heads(name):
    reference = golden(f'segmentation/{name}.json')
    sizes = reference['config']
    dims, num_classes = sizes['in_channels'], sizes['num_classes']
    heads = UPerHead(dims, sizes['channels'], num_classes), FCNHead(dims[2], sizes['aux_channels'], num_classes)
    model = without_dropout(Segmenter(torch.nn.Identity(), None, *heads)).eval()
    names = load(model, reference['params'])
    maps, label = [images(text) for text in reference['input']], labels(reference['labels'])

    seen = {}
    uper = model.decode_head
    watched = {'psp': uper.bottleneck} | {f'ppm{i}': module for i, module in enumerate(uper.psp_modules)}
    hooks = [
        m.register_forward_hook(lambda m, args, out, key=key: seen.update({key: out})) for key, m in watched.items()
    ]
    found = {
        'decode logits': difference(uper(maps), reference['decode_logits']),
        'aux logits': difference(model.auxiliary_head(maps[-2]), reference['aux_logits']),
        'pooled': difference(seen['psp'], reference['psp']),
    }
    for hook in hooks:
        hook.remove()
    model = model.double()
    for mode in ('eval', 'train'):
        case = reference[mode]
        inputs = [x.double().requires_grad_() for x in maps]
        model.zero_grad()
        loss, terms = model.train(mode == 'train')(inputs, label)
        loss.backward()
        pairs = [(loss, case['loss']), (terms['decode'], case['decode_loss']), (terms['aux'], case['aux_loss'])]
        found[f'{mode} loss'] = max(abs(ours.item() / theirs - 1) for ours, theirs in pairs)
        total = sum(value**2 for value in case['grad_l2'].values()) ** 0.5
        found[f'{mode} gradients'] = gradient_difference(model, {'grad_l2_global': total, **case}, names)
        norms = zip(inputs, case['input_grad_l2'], strict=True)
        found[f'{mode} input gradients'] = max(abs(x.grad.norm().item() / norm - 1) for x, norm in norms)
        if mode == 'eval':
            model.loss_mean = 'counted'
            decode = model(inputs, label)[1]['decode'].item()
            found['counted mean'] = abs(decode / case['wrong_mean_over_valid_pixels_only'] - 1)
            model.loss_mean = 'all'
    state = model.state_dict()
    stats = reference['train']['running_after']
    found['running statistics'] = max(difference(state[key], value) for key, value in stats.items())
    print(name, {key: f'{value:.1e}' for key, value in found.items()})
    assert_close(found)
