"""Spectra of feature maps: the published numbers, the points of every kind of network, and what the figures say."""

import math
from argparse import Namespace
from functools import partial

import fill
import pytest
import torch
from golden import golden
from timm.models import beit, resnet, swin_transformer, swin_transformer_v2, vision_transformer
from torch import nn

from main_pretrain import find_method
from util.analysis import features, spectra
from util.errors import UserError
from util.studies import fourier
from util.studies.common import Network


def filled(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """With the weights of the goldens."""
    state = network.state_dict()
    for name, value in state.items():
        if value.is_floating_point():
            weight = torch.from_numpy(fill.weight(name, value.shape))
            state[name] = 2 * weight if weight.ndim > 1 else weight
    network.load_state_dict(state)
    return network.to(dtype)


def with_more_attention(network: nn.Module) -> nn.Module:
    for block in network.blocks:
        block.attn.qkv.weight.data *= 3
    return network


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ('file', 'size', 'create'),
    [
        ('spectra_vit', 64, vision_transformer.VisionTransformer),
        ('spectra_resnet', 96, partial(resnet.ResNet, resnet.BasicBlock)),
        ('attention_beit', 64, partial(beit.Beit, norm_layer=partial(nn.LayerNorm, eps=1e-6))),
    ],
)
def test_as_published(file, size, create, dtype):
    """The curves and variances of A2MIM's functions; of Beit, of the network itself, LayerScale and all."""
    published, imgs = golden(f'analysis/{file}.json'), torch.from_numpy(fill.images(3, size)).to(dtype)
    network = filled(create(**published['kwargs']), dtype)
    found = features.collect(with_more_attention(network) if file == 'attention_beit' else network, imgs)
    assert list(found) == published['layers']
    exact = dtype == torch.float64
    theirs = zip(found.values(), published['relative_log_amplitude'], published['variance'], strict=True)
    for maps, curve, variance in theirs:
        ours = spectra.log_amplitude(maps)
        assert ours.dtype == torch.float64
        assert (ours - ours[0]).tolist() == pytest.approx(curve, rel=0, abs=1e-10 if exact else 3e-5)
        assert spectra.variance(maps).item() == pytest.approx(variance, rel=0, abs=1e-10 if exact else 1e-5)


@pytest.mark.parametrize('side', [1, 2, 3, 7, 8, 14])
def test_half_diagonal(side):
    """It is that of a plain transform, for odd and even sides, of the middle of a map, and of half precision."""
    numbers = torch.Generator().manual_seed(side)
    maps = torch.randn(2, 5, side + 4, side, generator=numbers, dtype=torch.float64) + 3
    whole = torch.fft.fft2(maps[:, :, 2:-2]).diagonal(dim1=2, dim2=3)[..., : math.ceil(side / 2)]
    plain = (whole.abs() + 1e-6).log().mean((0, 1))
    assert torch.allclose(spectra.log_amplitude(maps), plain, rtol=0, atol=1e-11)
    assert torch.allclose(spectra.log_amplitude(maps.mT), plain, rtol=0, atol=1e-11)
    assert torch.equal(spectra.log_amplitude(maps.half()), spectra.log_amplitude(maps.half().float()))
    assert spectra.log_amplitudes(maps).mean(0).tolist() == pytest.approx(plain.tolist())
    assert len(spectra.frequencies(side)) == len(plain)
    angles = torch.tensor(spectra.frequencies(side)[-1:]).double() * math.pi * torch.arange(side)
    wave = torch.cos(angles.unsqueeze(1) + angles)  # of the last frequency
    if side > 2:
        assert spectra.log_amplitude(wave[None, None]).argmax() == len(plain) - 1


def test_variance_of_few_positions():
    assert spectra.variance(torch.tensor([[[[1.0, 3.0]]], [[[2.0, 2.0]]]])) == 1
    assert spectra.variances(torch.zeros(2, 3, 1, 1)).isnan().all()


# --------------------------------------------------------------------------
# points


def halves(*blocks: str) -> list[str]:
    return [f'{block}.{half}' for block in blocks for half in ('attn', 'mlp')]


STAGES = {  # of networks with a stem
    'a2mim_resnet_tiny': ['stem', 'layer1.0', 'layer2.0', 'layer3.0', 'layer4.0'],
    'a2mim_convnext_pico': ['stem', *(f'stages.{s}.blocks.{b}' for s, b in ((0, 0), (1, 0), (2, 0), (2, 1), (3, 0)))],
}


def small(network: type, **more) -> nn.Module:
    return network(img_size=64, patch_size=8, embed_dim=16, num_classes=3, **more)


NETWORKS = {
    'registers': (
        lambda: small(vision_transformer.VisionTransformer, depth=2, num_heads=2, reg_tokens=3, init_values=0.1),
        ['embed', *halves('blocks.0', 'blocks.1')],
    ),
    'mixmim': (
        lambda: find_method('mixmae_tiny').create_classifier('mixmae_tiny', num_classes=3, img_size=64),
        [
            *('patch_embed', *halves('layers.0.blocks.0'), 'layers.0.downsample'),
            *(*halves('layers.1.blocks.0', 'layers.1.blocks.1'), 'layers.1.downsample', *halves('layers.2.blocks.0')),
        ],
    ),
    'swin': (
        lambda: small(swin_transformer.SwinTransformer, depths=(1, 2), num_heads=(2, 2), window_size=4),
        [
            *('patch_embed', *halves('layers.0.blocks.0')),
            *('layers.1.downsample', *halves('layers.1.blocks.0', 'layers.1.blocks.1')),
        ],
    ),
}


@pytest.mark.parametrize('kind', NETWORKS)
def test_half_blocks(kind):
    """After attention: what the block adds, LayerScale too, to what it is given. After the MLP: what it gives."""
    torch.manual_seed(0)
    create, names = NETWORKS[kind]
    network, imgs, seen = create().train(), torch.randn(2, 3, 64, 64), {}
    blocks = features.block_names(network)
    for name, block in blocks.items():
        block.register_forward_hook(lambda module, inputs, output, name=name: seen.update({name: (inputs[0], output)}))
    found = features.collect(network, imgs)
    assert list(found) == names
    assert all(network.training == module.training for module in network.modules())
    assert not any(module._forward_pre_hooks for module in network.modules())
    network.eval()
    for name, block in blocks.items():
        given, end = seen[name]
        attention = getattr(block, 'ls1', nn.Identity())(getattr(block, '_attn', block.attn)(block.norm1(given)))
        for half, state in (('attn', given + attention), ('mlp', end)):
            assert found[f'{name}.{half}'].ndim == 4
            maps = found[f'{name}.{half}'].flatten(2).transpose(1, 2)
            tokens = state.flatten(1, -2)[:, getattr(network, 'num_prefix_tokens', 0) :]
            assert torch.allclose(maps, tokens, atol=1e-5)
    whole = [name.removesuffix('.mlp') for name in names if not name.endswith('.attn')]
    assert list(features.collect(network, imgs, halves=False)) == whole


def test_the_two_kinds_of_swin_agree():
    """That which the project has of its own, and timm's with its weights: at every point, under other merging names."""
    torch.manual_seed(0)
    ours = find_method('localmim_swin_pico').create_classifier('localmim_swin_pico', num_classes=3, img_size=64)
    sizes = dict(patch_size=2, embed_dim=24, depths=(2, 2, 2, 2), num_heads=(2, 2, 4, 4), window_size=4)
    theirs = swin_transformer.SwinTransformer(
        img_size=64, num_classes=3, norm_layer=partial(nn.LayerNorm, eps=1e-6), **sizes
    )
    theirs.load_state_dict(ours.timm_state_dict())
    imgs = torch.randn(2, 3, 64, 64)
    found, expected = features.collect(ours, imgs), features.collect(theirs, imgs)
    assert len(found) == len(expected) == 1 + 16 + 3
    for name, maps in found.items():
        stage = int(name[7]) if name.endswith('.downsample') else None
        assert torch.allclose(maps, expected[name if stage is None else f'layers.{stage + 1}.downsample'], atol=1e-4)


@pytest.mark.parametrize('name', STAGES)
def test_convolutions(name):
    size = 64 if name.endswith('pico') else 32
    network = find_method(name).create_classifier(name, num_classes=3, img_size=size).eval()
    imgs = torch.randn(2, 3, size, size)
    found = features.collect(network, imgs)
    assert list(found) == STAGES[name]
    stem = (
        network.stem(imgs) if name.endswith('pico') else network.maxpool(network.act1(network.bn1(network.conv1(imgs))))
    )
    assert torch.equal(found['stem'], stem)
    with features.captured(features.block_names(network), lambda name, output: output) as blocks, torch.no_grad():
        network(imgs)
    assert all(torch.equal(found[block], output) for block, output in blocks.items())


def test_in_float32_under_autocast():
    create, _ = NETWORKS['registers']
    network, imgs = create().eval(), torch.randn(2, 3, 64, 64)
    plain = features.collect(network, imgs)
    with torch.autocast('cpu', torch.bfloat16):
        found = features.collect(network, imgs)
    assert all(torch.equal(maps, plain[name]) for name, maps in found.items())


def test_blocks_that_norm_what_they_add():
    sizes = dict(img_size=32, patch_size=4, embed_dim=16, depths=(1, 1), num_heads=(2, 2), window_size=4)
    network = swin_transformer_v2.SwinTransformerV2(**sizes)
    found = features.collect(network, torch.randn(1, 3, 32, 32))
    assert list(found) == ['patch_embed', 'layers.0.blocks.0', 'layers.1.downsample', 'layers.1.blocks.0']


def test_maps_that_are_not_square():
    sizes = dict(img_size=(72, 100), patch_size=4, embed_dim=16, depths=(1, 2), num_heads=(2, 2), window_size=5)
    shapes = [
        list(maps.shape)
        for maps in features.collect(swin_transformer.SwinTransformer(**sizes), torch.randn(1, 3, 72, 100)).values()
    ]
    assert shapes == 3 * [[1, 16, 18, 25]] + 5 * [[1, 32, 9, 13]]
    for shape in ((2, 5, 3, 3), (2, 3, 3, 5)):  # where a network does not say which layout it has
        assert features.as_map(nn.Identity(), 'block', torch.zeros(shape), (2, 3, 9, 9)).shape == (2, 5, 3, 3)
    with pytest.raises(UserError, match=r'block of a Identity gives \[2, 7, 5\]: neither a map'):
        features.as_map(nn.Identity(), 'block', torch.zeros(2, 7, 5), (2, 3, 9, 9))
    with pytest.raises(UserError, match='a Sequential has no residual blocks'):
        features.collect(nn.Sequential(nn.Conv2d(3, 4, 3)), torch.randn(1, 3, 8, 8))


# --------------------------------------------------------------------------
# the study


def network_of(name: str, core: nn.Module, size: int) -> Network:
    return Network(name, '', None, Namespace(input_size=size), core, '', None, False)


def test_numbers_of_the_figures():
    """Means over images that come in batches are those of all images; small maps have no number that means nothing."""
    torch.manual_seed(0)
    core = find_method('simmim_swin_pico').create_classifier('simmim_swin_pico', num_classes=3, img_size=64)
    imgs, shapes = torch.randn(5, 3, 64, 64), fourier.points(network_of('swin', core, 64))
    values = torch.cat([fourier.of_images(core, batch) for batch in imgs.split(2)])
    result = fourier.judged(shapes, values)
    maps = features.collect(core, imgs)
    assert [point['point'] for point in result['points']] == list(maps)
    for point, expected in zip(result['points'], maps.values(), strict=True):
        curve = spectra.log_amplitude(expected)
        assert point['map'] == list(expected.shape[1:])
        assert point['log_amplitude'] == pytest.approx(curve.tolist(), abs=1e-5)
        assert point['relative_log_amplitude'] == pytest.approx((curve - curve[0]).tolist(), abs=1e-5)
        assert point['variance'] == pytest.approx(spectra.variance(expected).item(), rel=1e-5)
        each = torch.stack([spectra.log_amplitude(image[None]) for image in expected])
        spread = (each - each[:, :1]).std(0, correction=0)
        assert point['relative_spread'] == pytest.approx(spread.tolist(), abs=1e-5)
        high = point['relative_log_amplitude'][-1] if point['map'][1] > 2 else None
        assert point['high_frequency'] == high
    kinds = ['stem', 'attn', 'mlp', 'down', 'attn', 'mlp', 'down', *2 * ['attn', 'mlp'], 'down', 'attn', 'mlp']
    assert [point['kind'] for point in result['points']] == kinds
    assert [point['depth'] for point in result['points']] == pytest.approx([i / 13 for i in range(14)])
    single = fourier.judged({'stem': [2, 1, 1]}, torch.tensor([[0.5, math.nan], [1.5, math.nan]]).double())
    assert [single['points'][0][key] for key in ('high_frequency', 'variance', 'variance_spread')] == [None] * 3


def test_table():
    """What a half-block changes, on average: not across another kind of step, nor where there is no number."""
    highs = [
        ('stem', -1.0),
        ('attn', -3.0),
        ('mlp', -2.5),
        ('down', -1.0),
        ('attn', -2.0),
        ('mlp', None),
        ('attn', -2.0),
    ]
    points = [{'kind': kind, 'high_frequency': high, 'variance': 2.0} for kind, high in highs]
    _, row = fourier.table({'checkpoints': [{'name': 'a', 'points': points}]})
    assert row == ['a', '7', '-1.000', '-2.000', '-1.500', '+0.500', '2.000', '2.000']


def test_what_is_said_of_a_network():
    sizes = dict(img_size=(32, 48), patch_size=4, embed_dim=16, depths=(1, 1, 1), num_heads=(2, 2, 2), window_size=4)
    network = swin_transformer_v2.SwinTransformerV2(**sizes)
    shapes = {name: list(maps.shape[1:]) for name, maps in features.collect(network, torch.randn(1, 3, 32, 48)).items()}
    whole, square, small = fourier.notes(network, shapes)
    assert 'no state between attention and MLP' in whole
    assert 'largest centred square' in square
    assert small.endswith('layers.2.downsample, layers.2.blocks.0')
    core = find_method('mixmae_tiny').create_classifier('mixmae_tiny', num_classes=3, img_size=32)
    assert not fourier.notes(core, fourier.points(network_of('mix', core, 32)))
    with pytest.raises(UserError, match=r'plain: a Sequential has no residual .*; leave it out of --checkpoint'):
        fourier.points(network_of('plain', nn.Sequential(nn.Conv2d(3, 4, 3)), 8))
