"""Where heads look: the published numbers, true coordinates in windows, every kind of network, and what has none."""

import math
from functools import partial

import fill
import pytest
import timm
import torch
from golden import golden
from timm.models.beit import Beit
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import models_localmim
from main_pretrain import find_method
from util.analysis import attention, features
from util.errors import UserError

SWIN = dict(embed_dim=12, depths=(2, 2), num_heads=(2, 3), num_classes=3, mlp_ratio=1)


def noisy(network: nn.Module, scale: float = 0.3) -> nn.Module:
    """In float64, with attention that is far from uniform."""
    numbers = torch.Generator().manual_seed(0)
    for param in network.double().parameters():
        param.data += scale * torch.randn(param.shape, generator=numbers, dtype=torch.float64)
    return network


def pictures(count: int, size: int) -> torch.Tensor:
    return torch.from_numpy(fill.images(count, size)).double()


def stacked(statistics: dict, key: str) -> list[list[float]]:
    return [layer[key].tolist() for layer in statistics.values()]


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
@pytest.mark.parametrize(('name', 'cls', 'count'), [('vit', VisionTransformer, 2), ('beit', Beit, 3)])
def test_as_published(name, cls, count, dtype):
    """Of each head and layer, as means over images in batches of two sizes; in float32, within 1e-6."""
    published = golden(f'analysis/attention_{name}.json')
    network = cls(**published['kwargs'], norm_layer=partial(nn.LayerNorm, eps=1e-6)).double()
    for key, x in network.state_dict().items():
        if x.is_floating_point():
            x.copy_(torch.from_numpy(fill.weight(key, x.shape)) * (2 if x.ndim >= 2 else 1))
            x *= 3 if key.endswith('attn.qkv.weight') else 1
    imgs = pictures(count, published['kwargs']['img_size']).to(dtype)
    found = attention.attention_statistics(network.to(dtype), [imgs[:1], (imgs[1:], torch.zeros(count - 1))])
    assert list(found) == ['blocks.0.attn', 'blocks.1.attn']
    for key, theirs in (
        ('distance', 'attention_distance_pixels'),
        ('mutual_information', 'normalised_mutual_information'),
    ):
        assert found['blocks.0.attn'][key].dtype == torch.float64
        torch.testing.assert_close(stacked(found, key), published[theirs], rtol=1e-6, atol=0)
    if name == 'beit':
        assert abs(found['blocks.1.attn']['uniform'] - published['distance_of_uniform_attention']) < 1e-9


@pytest.mark.parametrize(('size', 'window'), [(32, 4), (44, 4)])
def test_windows_by_true_coordinates(size, window):
    """Of timm's Swin, whose weights its own softmax gives: distances of where tokens are, shifted windows too.

    44 pixels are 11 x 11 cells, which are padded to 12 x 12, and then 6 x 6, padded to 8 x 8.
    """
    network = noisy(SwinTransformer(img_size=size, window_size=window, **SWIN)).eval()
    imgs, weights = pictures(2, size), []
    for module in network.modules():
        if isinstance(module, nn.Softmax):
            module.register_forward_hook(lambda module, inputs, output: weights.append(output))
    with torch.no_grad():
        network(imgs)
    found = attention.attention_statistics(network, [imgs])
    assert len(weights) == 4 == len(found)  # none more: the fused form was asked for
    for number, (theirs, ours) in enumerate(zip(weights, found.values(), strict=True)):
        stage, side = number // 2, -(-size // 4) // 2 ** (number // 2)
        side += -side % window
        shift = number % 2 * window // 2 * (side > window)
        places = torch.stack(torch.meshgrid(*2 * [torch.arange(side)], indexing='ij'), -1).roll(
            (-shift, -shift), (0, 1)
        )
        places = places.unflatten(0, (-1, window)).unflatten(2, (-1, window)).transpose(1, 2).reshape(-1, window**2, 2)
        apart = 4 * 2**stage * (places.unsqueeze(2) - places.unsqueeze(1)).double().norm(dim=-1)  # [windows, T, T]
        theirs = theirs.unflatten(0, (2, -1))
        distance = (theirs * apart.unsqueeze(1)).sum(-1).mean((0, 1, 3))
        torch.testing.assert_close(ours['distance'], distance, rtol=1e-6, atol=0)  # a masked weight is exp(-100)
        joint = (theirs + 1e-8) / (theirs + 1e-8).sum(-1, keepdim=True) / window**2  # sums to 1 over query and key
        keys = joint.sum(-2)
        information = (joint * (joint * window**2 / keys.unsqueeze(-2)).log()).sum((-2, -1))
        limit = math.log(window**2) * -(keys * keys.log()).sum(-1)
        torch.testing.assert_close(ours['mutual_information'], (information / limit.sqrt()).mean((0, 1)))
        assert math.isclose(ours['uniform'], apart[0].mean())


def test_strides():
    """Of maps of odd sides, which mergings pad; of a patch that does not divide the image."""
    assert [attention.stride(36, 9, side) for side in (9, 5, 3, 2)] == [4, 8, 16, 32]
    assert attention.stride(50, 13, 13) == 4


def test_own_swin_as_timms():
    """The same weights in an own Swin and in timm's: the same numbers, by the same names, in shifted windows too."""
    sizes = dict(img_size=64, patch_size=4, embed_dim=16, depths=(2, 2, 1, 1), num_heads=(2, 4, 4, 4), num_classes=3)
    ours = noisy(models_localmim.LocalMIMSwinClassifier(**sizes, window_size=4))
    theirs = SwinTransformer(**sizes, window_size=4).double()
    theirs.load_state_dict(ours.timm_state_dict())
    for name, module in theirs.named_modules():
        if name.endswith(('norm', 'norm1')):
            module.eps = 1e-6
    found, same = (attention.attention_statistics(network, [pictures(2, 64)]) for network in (ours, theirs))
    torch.testing.assert_close(found, same, rtol=1e-9, atol=1e-9)
    assert len(found) == 6


@pytest.mark.parametrize(
    ('name', 'strides', 'windows', 'shifted'),
    [
        ('mixmae_tiny', [2, 4, 4, 8], [8, 8, 8, 4], []),
        ('simmim_swin_pico', [4, 8, 16, 16, 32], [4, 4, 4, 4, 2], []),
        ('localmim_swin_pico', [2, 2, 4, 4, 8, 8, 16, 16], [4] * 8, [1, 3, 5]),
    ],
)
def test_heads_of_windows(name, strides, windows, shifted):
    """Of planted weights: the first head looks at its own cell, all others at every cell of the window alike."""
    network = find_method(name).create_classifier(name, num_classes=3, img_size=64)
    for key, param in network.named_parameters():
        param.data *= 'qkv' not in key
        if key.endswith('relative_position_bias_table'):
            param.data.zero_()[len(param) // 2, 0] = 1000
    found = attention.attention_statistics(network, [pictures(2, 64).float()])
    for number, (stride, window, ours) in enumerate(zip(strides, windows, found.values(), strict=True)):
        places = torch.cartesian_prod(*2 * [torch.arange(window) * stride]).double()
        uniform = torch.cdist(places, places).mean().item()
        assert math.isclose(ours['uniform'], uniform)
        distance, information = ours['distance'].tolist(), ours['mutual_information'].tolist()
        assert (distance[0], information[0]) == pytest.approx((0, 1), abs=1e-5)
        if number in shifted:
            assert all(x < 0.95 * uniform for x in distance[1:])
            assert all(x > 0.05 for x in information[1:])
        else:
            assert distance[1:] == pytest.approx([uniform] * len(distance[1:]))
            assert information[1:] == pytest.approx([0] * len(distance[1:]), abs=1e-9)


def test_tokens_that_are_no_patches():
    """Those of a class and registers are left out, and a block whose one query pools the map is no layer."""
    sizes = dict(img_size=40, patch_size=10, embed_dim=24, depth=2, num_heads=3, num_classes=3)
    imgs, found = pictures(2, 40), []
    for more in (dict(global_pool='avg', class_token=False), dict(reg_tokens=4), dict(global_pool='map')):
        network = noisy(VisionTransformer(**sizes, **more))
        with torch.no_grad():
            for block in network.blocks:
                block.attn.qkv.weight.zero_()
        network.pos_embed.data.normal_()
        statistics = attention.attention_statistics(network, [imgs])
        assert list(statistics) == ['blocks.0.attn', 'blocks.1.attn']
        found.append(statistics['blocks.0.attn'])
    for statistics in found:
        assert statistics['distance'].tolist() == pytest.approx([statistics['uniform']] * 3)
        assert statistics['uniform'] == pytest.approx(10 * 2.0080149694)


def test_of_other_networks():
    """EVA's, and MaxViT's, whose grid attention takes cells from all over the map."""
    eva = timm.create_model('eva02_tiny_patch14_224', img_size=56, depth=1)
    [statistics] = attention.attention_statistics(eva, torch.zeros(1, 1, 3, 56, 56)).values()
    assert statistics['uniform'] == pytest.approx(14 * 2.0080149694)
    maxvit = timm.create_model('maxvit_rmlp_pico_rw_256', img_size=64, depths=(1, 1, 1, 1))
    found = attention.attention_statistics(maxvit, torch.zeros(1, 1, 3, 64, 64))
    cells = (1 + 1 + 2**0.5) / 4
    assert [x['uniform'] for x in found.values()] == pytest.approx([x * cells for x in (4, 32, 8, 32, 16, 32, 32, 32)])


def test_the_network_is_as_before():
    """Its logits have the same bits under observation; modes, hooks and ways of attending are what they were."""
    network = SwinTransformer(img_size=32, window_size=4, **SWIN).train()
    attention_modules = [module for module in network.modules() if hasattr(module, 'fused_attn')]
    attention_modules[0].fused_attn = True
    network.head.eval()
    modes = [module.training for module in network.modules()]
    imgs, seen = pictures(2, 32).float(), []
    with torch.no_grad(), attention.fused(network), features.evaluating(network):
        plain = network(imgs)
    handle = network.register_forward_hook(lambda module, inputs, logits: seen.append(logits))
    attention.look(network, imgs)
    handle.remove()
    assert torch.equal(seen[0], plain)
    assert [module.fused_attn for module in attention_modules] == [True, False, False, False]
    assert modes == [module.training for module in network.modules()]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


def test_in_float32_under_autocast():
    """Of a network in training mode, with dropout, too."""
    network = VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, pos_drop_rate=0.5)
    imgs = pictures(2, 32).float()
    plain = attention.attention_statistics(network.eval(), [imgs])
    with torch.autocast('cpu', torch.bfloat16):
        found = attention.attention_statistics(network.train(), [imgs])
    assert all(torch.equal(of[key], plain[name][key]) for name, of in found.items() for key in of if key != 'uniform')


@pytest.mark.parametrize(
    ('network', 'words'),
    [
        (
            partial(SwinTransformerV2, img_size=32, window_size=4, **SWIN),
            'SwinTransformerV2 has an attention of its own, not scaled_dot_product_attention: none to see',
        ),
        (
            partial(find_method('a2mim_resnet_tiny').create_classifier, 'a2mim_resnet_tiny'),
            'ResNet has no attention',
        ),
        (
            partial(timm.create_model, 'pvt_v2_b0'),
            r'stages\.0\.blocks\.0\.attn: attention of 64 queries to 1 keys in 1 windows: distances',
        ),
    ],
)
def test_what_cannot_be_seen(network, words):
    with pytest.raises(UserError, match=words):
        attention.look(network(), torch.zeros(1, 3, 32, 32))
