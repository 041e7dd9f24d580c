"""Segmentation checkpoints into segmenters, and pretrained files of any origin into their encoders, key by key."""

import copy
import functools
import re

import pytest
import test_a2mim_published as a2mim
import test_published as mirl
import timm
import torch
from golden import golden
from test_foreign import hugging_face, released, under
from torch import nn

from main_pretrain import find_method
from util import checkpoint
from util.errors import CheckpointError
from util.nn.pos_embed import resize_bias_table, resize_pos_embed
from util.weights import class_names, find_origin, load_published

KEYS = golden('segmentation/keys.json')
FULL_SIZE = {  # the list of a file's keys: its model, options
    'localmim_vit_base': ('localmim_vit_base', {}),
    'localmim_swin_base': ('localmim_swin_base', {}),
    'a2mim_vit_mae_base': ('a2mim_vit_base', {}),
    'a2mim_resnet50_fcn_v1c': ('a2mim_resnet50', dict(deep_stem=True)),
}
HEADS = dict(num_classes=5, channels=8, aux_channels=8)
TINY = {  # model: its image side in pretraining; in segmentation it is 64
    'mirl_vit_tiny': 32,
    'localmim_vit_tiny': 32,
    'a2mim_vit_tiny': 32,
    'a2mim_resnet_tiny': 32,
    'a2mim_convnext_pico': 64,
    'localmim_swin_pico': 64,
    'simmim_swin_pico': 64,
    'mixmae_tiny': 32,
}
OWN = {'args': {'model': 'mirl_vit_tiny', 'model_kwargs': {}}, 'run': {'stage': 'segment'}, 'classes': list('abcde')}


def drawn(model: nn.Module) -> nn.Module:
    """With weights that no two models share by chance."""
    for value in model.state_dict().values():
        value.copy_(torch.rand(value.shape) + 0.5 if value.is_floating_point() else torch.tensor(3))
    return model.eval()


@functools.cache
def template(make, *args, **options) -> nn.Module:
    return make(*args, **options)


def segmenter(model: str, **options) -> nn.Module:
    options = {'img_size': 64, **HEADS, **options}
    return drawn(copy.deepcopy(template(find_method(model).create_segmenter, model, **options)))


def pretraining(name: str) -> nn.Module:
    return drawn(copy.deepcopy(template(getattr(find_method(name), name), img_size=TINY[name])))


def classifier(name: str, **options) -> nn.Module:
    create = find_method(name).create_classifier
    return drawn(copy.deepcopy(template(create, name, num_classes=3, img_size=TINY[name], **options)))


def assert_accounted(report, model: nn.Module, file: dict, both: int = 0) -> None:
    """Every key of the model is loaded or missing; each of the file loaded or ignored. `both`: keys that became two."""
    assert sorted(report.loaded + report.missing) == sorted(model.state_dict())
    assert len(report.loaded) + len(report.ignored) == len(file) + both


def assert_holds(model: nn.Module, values: dict) -> None:
    state = model.state_dict()
    assert values
    differing = [name for name, value in values.items() if not torch.equal(state[name], value)]
    assert not differing


def refused(model: nn.Module, file: dict, words: str, **options) -> str:
    """With these words in one line, and the model as it was."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=words) as raised:
        load_published(model, file, **options)
    assert '\n' not in str(raised.value)
    assert_holds(model, before)
    return str(raised.value)


# --------------------------------------------------------------------------
# segmentation files


@pytest.mark.parametrize('name', FULL_SIZE)
def test_every_key_of_a_published_file(name):
    """As the published code writes them, at full size; also from several GPUs, whose names begin with `module.`"""
    model, options = FULL_SIZE[name]
    with torch.device('meta'):
        net = find_method(model).create_segmenter(model, **options)
        state = {k: torch.empty(shape, dtype=torch.long if 'tracked' in k else None) for k, shape in KEYS[name]}
    k_biases = sum(value.numel() // 3 for key, value in state.items() if key.endswith('qkv.bias') and 'vit' in name)
    assert sum(p.numel() for p in net.parameters()) == KEYS['num_params'][name] - k_biases
    file = {'meta': {'CLASSES': ('wall', 'sky'), 'iter': 160000}, 'state_dict': state, 'optimizer': {'state': {}}}
    report = load_published(net, file)
    assert not report.missing + report.resized
    assert sorted(report.loaded) == sorted(net.state_dict())
    index = [key for key in state if key.endswith('relative_position_index')]
    assert report.ignored[: len(index)] == index
    assert len(report.ignored) == len(index) + sum(key.endswith('qkv.bias') for key in state if 'vit' in name)
    assert class_names(file) == ['wall', 'sky']
    assert load_published(net, {'state_dict': under('module.', state)}).loaded == report.loaded

    last = 'auxiliary_head.convs.0.conv.weight'
    with pytest.raises(CheckpointError, match=rf'differing keys \(1\): {last}: file absent'):
        load_published(net, {key: value for key, value in state.items() if key != last})
    with pytest.raises(CheckpointError, match=r'encoder\.surprise: file \[1\], model absent'):
        load_published(net, state | {'backbone.surprise': torch.empty(1)})


MM_VIT = (  # ours -> mmsegmentation's
    (r'encoder\.blocks\.(\d+)\.norm([12])\.', r'backbone.layers.\1.ln\2.'),
    (r'encoder\.blocks\.(\d+)\.mlp\.fc1\.', r'backbone.layers.\1.ffn.layers.0.0.'),
    (r'encoder\.blocks\.(\d+)\.mlp\.fc2\.', r'backbone.layers.\1.ffn.layers.1.'),
    (r'encoder\.blocks\.', 'backbone.layers.'),
    (r'encoder\.patch_embed\.proj\.', 'backbone.patch_embed.projection.'),
    (r'pyramid\.up4\.', 'neck.upsample_4x.'),
    (r'pyramid\.up2\.', 'neck.upsample_2x.'),
)
LOCALMIM_VIT = ((r'pyramid\.up4\.', 'backbone.fpn1.'), (r'pyramid\.up2\.', 'backbone.fpn2.'))
MM_CONVNEXT = (
    (r'encoder\.stem\.', 'backbone.downsample_layers.0.'),
    (r'encoder\.stages\.(\d)\.downsample\.', r'backbone.downsample_layers.\1.'),
    (r'encoder\.stages\.(\d)\.blocks\.(\d+)\.conv_dw\.', r'backbone.stages.\1.\2.depthwise_conv.'),
    (r'encoder\.stages\.(\d)\.blocks\.(\d+)\.mlp\.fc([12])\.', r'backbone.stages.\1.\2.pointwise_conv\3.'),
    (r'encoder\.stages\.(\d)\.blocks\.', r'backbone.stages.\1.'),
)
TIMM_SWIN = tuple((rf'encoder\.layers\.{i + 1}\.downsample', f'backbone.layers.{i}.downsample') for i in range(3))
LAYOUTS = {  # model: how its segmentation files name it, and what then tells the layout
    'mirl_vit_tiny': (LOCALMIM_VIT, 'ViT segmentation'),
    'a2mim_vit_tiny': (MM_VIT, 'mmsegmentation ViT segmentation'),
    'a2mim_resnet_tiny': ((), 'mmsegmentation ResNet segmentation'),
    'a2mim_convnext_pico': (MM_CONVNEXT, 'mmsegmentation ConvNeXt segmentation'),
    'localmim_swin_pico': ((), 'Swin segmentation'),
    'simmim_swin_pico': (TIMM_SWIN, 'Swin segmentation'),
    'mixmae_tiny': ((), 'MixMIM segmentation'),
}


def in_layout(state: dict, renames: tuple) -> dict:
    def rename(key: str) -> str:
        for pattern, name in (*renames, (r'encoder\.', 'backbone.')):
            if re.match(pattern, key):
                return re.sub(f'^{pattern}', name, key)
        return key

    return {rename(key): value for key, value in state.items()}


def with_key_biases(state: dict) -> dict:
    """One bias of queries, keys and values, as most ViTs have it, where BEiT has two."""
    state = dict(state)
    for key in [key for key in state if key.endswith('attn.q_bias')]:
        q, v = state.pop(key), state.pop(key.replace('q_bias', 'v_bias'))
        state[key.replace('q_bias', 'qkv.bias')] = torch.cat([q, torch.rand(len(q)), v])
    return state


@pytest.mark.parametrize('name', LAYOUTS)
def test_values_of_a_published_file(name):
    source, target = segmenter(name), segmenter(name)
    renames, words = LAYOUTS[name]
    state = in_layout(source.state_dict(), renames)
    files = [state, with_key_biases(state)] if 'vit' in name else [state]
    for file in files:
        report = load_published(target, {'state_dict': file})
        assert report.format == words
        assert not report.missing + report.resized
        assert all(re.match(r'encoder\.blocks\.\d\.attn\.k_bias ', line) for line in report.ignored)
        assert_holds(target, source.state_dict())
        drawn(target)


def mm_swin(state: dict, first: int) -> dict:
    """mmsegmentation's own Swin, which merges pixels in another order. `first`: the stage here that merges first."""
    found = {}
    for key, value in state.items():
        key = re.sub(r'^encoder\.', 'backbone.', key)
        if merging := re.match(r'backbone\.layers\.(\d)\.downsample\.(.*)', key):
            key = f'backbone.stages.{int(merging[1]) - first}.downsample.{merging[2]}'
            order = [
                (dx * 2 + dy) * (value.shape[-1] // 4) + c
                for c in range(value.shape[-1] // 4)
                for dy in (0, 1)
                for dx in (0, 1)
            ]
            value = value[..., order]
        key = re.sub(r'layers\.(\d)\.blocks\.(\d)\.attn', r'stages.\1.blocks.\2.attn.w_msa', key)
        key = re.sub(r'layers\.(\d)\.blocks\.(\d)\.mlp\.fc1', r'stages.\1.blocks.\2.ffn.layers.0.0', key)
        key = re.sub(r'layers\.(\d)\.blocks\.(\d)\.mlp\.fc2', r'stages.\1.blocks.\2.ffn.layers.1', key)
        key = re.sub(r'backbone\.layers', 'backbone.stages', key).replace(
            'patch_embed.proj.', 'patch_embed.projection.'
        )
        found[key] = value
    return found


@pytest.mark.parametrize(('name', 'first'), [('localmim_swin_pico', 0), ('simmim_swin_pico', 1)])
def test_swin_of_mmsegmentation(name, first):
    source, target = segmenter(name), segmenter(name)
    report = load_published(target, {'state_dict': mm_swin(source.state_dict(), first)})
    assert report.format == 'mmsegmentation Swin segmentation'
    assert not report.missing + report.ignored
    assert_holds(target, source.state_dict())


@pytest.mark.parametrize('name', TINY)
def test_own_checkpoints(name, tmp_path):
    """Plain or averaged weights, strictly; other classes only where they may be new; another crop resizes positions."""
    source, averaged, target = (segmenter(name) for _ in range(3))
    file = {'model': source.state_dict(), 'ema': averaged.state_dict(), **OWN}
    checkpoint.save(tmp_path / 'a.pth', file)
    for given, ema, expected in ((file, False, source), (tmp_path / 'a.pth', True, averaged)):
        report = load_published(target, given, ema=ema)
        assert not report.missing + report.ignored + report.resized
        assert report.format.startswith('our segmentation')
        assert report.origin.stage == 'segment'
        assert_holds(target, expected.state_dict())

    other = segmenter(name, num_classes=7)
    refused(other, file, r'knows 5 classes, the model 7: pass --nb_classes 5')
    before = {key: value.clone() for key, value in other.state_dict().items() if 'conv_seg' in key}
    report = load_published(other, file, new_classes=True)
    assert sorted(report.missing) == sorted(before)
    assert sorted(line.partition(' ')[0] for line in report.ignored) == sorted(before)
    assert_holds(other, before | {k: v for k, v in source.state_dict().items() if k not in before})
    whole = source.state_dict()
    *_, (last, _) = source.encoder.named_parameters()
    for key in ('auxiliary_head.convs.0.bn.running_mean', 'decode_head.conv_seg.bias', f'encoder.{last}'):
        refused(target, {'model': {k: v for k, v in whole.items() if k != key}}, rf'{re.escape(key)}: file absent')

    if name in ('mirl_vit_tiny', 'a2mim_vit_tiny', 'mixmae_tiny'):
        larger = segmenter(name, img_size=128)
        computed = getattr(larger.encoder, 'absolute_pos_embed', torch.zeros(0)).clone()
        report = load_published(larger, file)
        assert not report.missing
        if name == 'mixmae_tiny':  # fixed positions are those of the size
            assert report.ignored == ['encoder.absolute_pos_embed [1, 1024, 32]']
            assert torch.equal(larger.encoder.absolute_pos_embed, computed)
        else:
            assert 'encoder.pos_embed [1, 65, 96] -> [1, 257, 96]' in report.resized
            wanted = resize_pos_embed(source.encoder.pos_embed, 257)
            assert torch.equal(larger.encoder.pos_embed, wanted)


def test_origin():
    file = {'model': {}, **OWN}
    assert str(find_origin(file)) == 'scripts/finetune_segmentation.py --model mirl_vit_tiny'
    assert find_origin(file).classes == list('abcde')
    assert find_origin(file | {'run': {'stage': 'other'}}).stage == 'finetune'
    assert class_names({'meta': {'dataset_meta': {'classes': ['a', 'b']}}}) == ['a', 'b']
    assert class_names({'meta': {'CLASSES': ('a', 3)}}) is None


# --------------------------------------------------------------------------
# pretrained files into encoders


def assert_started(model: nn.Module, report, values: dict, resized: int = 0) -> None:
    """The encoder holds these values, unless of another size, and all but norms of its maps, pyramid and heads."""
    assert 'encoder alone: the heads are new' in str(report)
    assert sorted(report.loaded + report.missing) == sorted(
        key for key in model.state_dict() if not key.endswith('absolute_pos_embed') or key in report.loaded
    )
    assert all(re.match(r'encoder\.norm\d|(pyramid|decode_head|auxiliary_head)\.', key) for key in report.missing)
    assert len(report.resized) == resized
    own = model.encoder.state_dict()
    same = {key: value for key, value in values.items() if key in own and value.shape == own[key].shape}
    assert len(same) > 20
    assert_holds(model.encoder, same)


RESIZED = {'mirl_vit_tiny': 1, 'localmim_vit_tiny': 1, 'a2mim_vit_tiny': 5, 'simmim_swin_pico': 1}


@pytest.mark.parametrize('name', TINY)
def test_own_pretraining_and_classifiers(name):
    """All of the encoder; what is beyond it is named."""
    source, target = pretraining(name), segmenter(name)
    encoder = source.encoder_state_dict()
    for file in ({'model': source.state_dict(), 'encoder': encoder}, {'model': source.state_dict()}, encoder):
        if name != 'mirl_vit_tiny' or 'model' not in file or 'encoder' in file:
            assert_started(target, load_published(target, file), encoder, RESIZED.get(name, 0))
        drawn(target)
    tuned = classifier(name)
    report = load_published(target, {'model': tuned.state_dict()})
    assert_started(target, report, tuned.state_dict(), RESIZED.get(name, 0))
    dropped = {line.partition(' ')[0] for line in report.ignored if 'k_bias' not in line and 'absolute' not in line}
    assert dropped == {key for key in tuned.state_dict() if re.match(r'(head\.(?!norm)|fc\.|fc_norm|norm\.)', key)}


OPENMIXUP = {'vit': 5, 'resnet': 0, 'convnext': 0, 'swin': 0}  # family: tables that are resized
FOUR_BLOCKS = dict(a2mim.SMALL['vit'][1], depth=4)


@pytest.mark.parametrize('family', OPENMIXUP)
def test_openmixup_pretraining(family):
    """Biases of queries and values, and positions, are loaded, which the published segmentation code drops."""
    name, options = a2mim.SMALL[family][:2]
    rows = a2mim.whole(family)
    if family == 'vit':
        options, rows = FOUR_BLOCKS, a2mim.pretraining(a2mim.vit(32, 4, 2, 64, 4), (1, 1, 32), 32, 16)
    state = a2mim.filled(rows)
    values = a2mim.encoder_of(a2mim.expected(rows, state))
    target = segmenter(name, img_size=128, **options)
    report = load_published(target, {'state_dict': state})
    assert_started(target, report, values, OPENMIXUP[family])
    if family == 'vit':
        tables = [key for key in values if key.endswith('table')]
        wanted = {key: resize_bias_table(values[key], 15 * 15 + 3, 3) for key in tables}
        wanted['pos_embed'] = resize_pos_embed(values['pos_embed'], 65)
        assert_holds(target.encoder, wanted | {'blocks.0.attn.q_bias': values['blocks.0.attn.q_bias']})
        assert "bicubically and linearly between points at BEiT's distances" in str(report)
        assert 'backbone.mask_token' in report.ignored
        without = segmenter(name, img_size=128, abs_pos_embed=False, init_values=0.1, **options)
        assert 'pos_embed [1, 17, 32]' in load_published(without, {'state_dict': state}).ignored
    if family == 'convnext':
        assert torch.equal(target.encoder.norm3.weight, state['backbone.norm3.weight'])


@pytest.mark.parametrize('name', ['localmim_vit_tiny', 'localmim_swin_pico'])
def test_localmim_pretraining(name):
    source, target = pretraining(name), segmenter(name)
    prefix = 'encoder.' * ('swin' in name)
    renames = ((r'decoders\.', 'decoder.'), (r'norms\.', f'{prefix}norm.'), (r'(?!hog)', prefix))
    pairs = (
        (next((re.sub(f'^{a}', b, key) for a, b in renames if re.match(a, key)), key), value)
        for key, value in source.state_dict().items()
    )
    file = {re.sub(r'hog_bias\.(\d)', r'hog_enc.\1.conv.bias', key): value for key, value in pairs}
    report = load_published(target, {'model': file, 'epoch': 1599})
    assert report.format.startswith('published LocalMIM pretraining')
    assert_started(target, report, source.encoder_state_dict(), RESIZED.get(name, 0))
    made = [key for key in report.loaded if re.search(r'gamma|bias_table|v_bias', key) and 'vit' in name]
    keys = [line for line in report.ignored if 'k_bias' in line]
    assert len(report.loaded) - len(made) + len(report.ignored) - len(keys) == len(file)


def test_mirl_of_paddle():
    """Numpy arrays in Paddle's layout."""
    state = mirl.published_state()
    target = segmenter('mirl_vit_small', **{**mirl.ENCODER, 'img_size': 16})
    report = load_published(target, mirl.paddle(state))
    assert '(Paddle)' in report.format
    assert_started(target, report, state, 1)


def test_microsoft_pretraining():
    """No absolute positions, and one table of relative ones: each block has its own, resized."""
    rows = a2mim.microsoft(a2mim.microsoft_vit(32, 4, 2, 4, shared=True), 32, 32, 16)
    state, options = a2mim.filled(rows), dict(FOUR_BLOCKS, mlp_ratio=4)
    target = segmenter('simmim_vit_small', **options)
    assert_started(target, load_published(target, {'model': state}), a2mim.encoder_of(a2mim.expected(rows, state)))
    assert not target.encoder.pos_embed.any()
    table = state['encoder.rel_pos_bias.relative_position_bias_table']
    assert_holds(target.encoder, {f'blocks.{i}.attn.relative_position_bias_table': table for i in range(4)})
    bare = segmenter('simmim_vit_small', rel_pos_bias=False, **options)
    refused(bare, {'model': state}, r'differing keys \(1\): rel_pos_bias\.relative_position_bias_table')

    rows = a2mim.microsoft(a2mim.swin(8, (2, 2, 2, 2), (1, 2, 2, 4), 2, 'microsoft', (0, 1, 2)), 8, 64, 32)
    state = a2mim.filled(rows)
    target = segmenter('simmim_swin_tiny', **a2mim.SMALL['swin'][1])
    values = a2mim.encoder_of(a2mim.expected(rows, state, openmixup=False))
    assert_started(target, load_published(target, {'model': state}), values)


def plain_vits() -> dict[str, dict]:
    """A ViT as MAE, timm and the transformers library have it, and with another network's key."""
    source = drawn(timm.create_model('vit_tiny_patch16_224', depth=4, embed_dim=32, num_heads=2, img_size=64))
    encoder = {key: value for key, value in source.state_dict().items() if not key.startswith('head')}
    decoder = {'mask_token': torch.ones(1, 1, 8), 'decoder_embed.weight': torch.ones(8, 32)}
    return {
        'timm': source.state_dict(),
        'MAE': {'model': encoder | decoder | {'decoder_pred.weight': torch.ones(768, 8)}},
        'Hugging Face': hugging_face(source, 'vit.'),
        'classifier of ours': {'model': source.state_dict(), **OWN, 'run': {'stage': 'finetune'}},
    }, source


def test_a_plain_vit_computes_the_same():
    """With a LayerScale of 1 and relative positions of 0, and less the biases of keys."""
    files, source = plain_vits()
    sizes = dict(embed_dim=32, depth=4, num_heads=2, out_indices=(0, 1, 2, 3))
    imgs = torch.randn(2, 3, 64, 64)
    source.norm_pre = nn.Identity()
    plain = dict(rel_pos_bias=False, init_values=None)
    for name, file, model, options in (
        *((name, file, 'mirl_vit_base', {}) for name, file in files.items()),
        ('MAE', files['MAE'], 'localmim_vit_base', plain),
        ('Hugging Face', files['Hugging Face'], 'a2mim_vit_base', plain),
        ('timm', files['timm'], 'a2mim_vit_base', dict(init_values=0.1)),
        ('MAE', files['MAE'], 'mirl_vit_base', dict(init_values=0.1)),
    ):
        target = segmenter(model, **sizes, **options)
        report = load_published(target, file)
        assert not [key for key in report.missing if key.startswith('encoder.')]
        beit = type(target.encoder).__name__ == 'Beit'
        assert any('k_bias' in line for line in report.ignored) == beit
        with torch.no_grad():
            ours = target.encoder(imgs)
            theirs = source.forward_intermediates(imgs, norm=False, intermediates_only=True)
        worst = max((a - b).abs().max() / b.abs().max() for a, b in zip(ours, theirs, strict=True))
        assert worst < 1e-5, (name, model, options)


def test_fewer_blocks():
    """Blocks after the last map are not in the encoder; a ViT that is too deep is refused."""
    _, source = plain_vits()
    sizes = dict(embed_dim=32, num_heads=2)
    target = segmenter('mirl_vit_base', depth=4, **sizes)
    maps = segmenter('mirl_vit_base', depth=6, out_indices=(0, 1, 2, 3), **sizes)
    assert len(target.encoder.blocks) == len(maps.encoder.blocks) == 4
    refused(maps, {'model': {k: v for k, v in source.state_dict().items() if 'blocks.3' not in k}}, r'blocks\.3\.')
    deeper = drawn(timm.create_model('vit_tiny_patch16_224', depth=6, embed_dim=32, num_heads=2, img_size=64))
    report = load_published(maps, deeper.state_dict())
    assert any(line.startswith('blocks.5.') for line in report.ignored)
    refused(target, deeper.state_dict(), r'blocks\.4\.norm1\.weight: file \[32\], model absent')


def test_released_convnext_and_networks_of_timm():
    source, target = classifier('a2mim_convnext_pico'), segmenter('a2mim_convnext_pico')
    report = load_published(target, {'model': released(source)})
    assert_started(target, report, source.state_dict())
    assert torch.equal(target.encoder.norm3.bias, source.head.norm.bias)

    net = drawn(timm.create_model('regnety_002', num_classes=3))
    target = segmenter('a2mim_timm', name='regnety_002')
    report = load_published(target, net.state_dict())
    assert_started(target, report, net.state_dict())
    assert {line.partition(' ')[0] for line in report.ignored} == {'head.fc.weight', 'head.fc.bias'}


def test_segmentation_files_into_other_networks():
    """Their encoder is a start for classifiers and pretraining, and for other heads; what is beside it is dropped."""
    for name, (renames, _) in LAYOUTS.items():
        source = segmenter(name)
        encoder = source.encoder.state_dict()
        others = [
            (classifier(name), {}),
            (pretraining(name), {'new_decoder': True}),
            (drawn(find_method(name).create_backbone(name, img_size=64)), {}),
        ]
        for file in ({'model': source.state_dict(), **OWN}, {'state_dict': in_layout(source.state_dict(), renames)}):
            for model, options in others:
                if name == 'mirl_vit_tiny':
                    refused(model, file, 'LayerScale, for which this ViT has no place', **options)
                    continue
                report = load_published(model, file, **options)
                assert 'taken off beside' in report.format
                own = model.encoder_state_dict() if options else model.state_dict()
                same = [key for key, value in own.items() if key in encoder and value.shape == encoder[key].shape]
                assert all(torch.equal(own[key], encoder[key]) for key in same)
                assert len(same) > 20
                assert {key.partition('.')[0] for key in own if key not in encoder} <= {'head', 'fc', 'fc_norm', 'norm'}


def test_mistaken_files(measured):
    """Other families and sizes, each in one line; nothing is loaded."""
    vit, swin = segmenter('mirl_vit_tiny'), segmenter('mixmae_tiny')
    lines = [
        refused(
            vit, {'model': swin.state_dict(), **OWN}, r'not a checkpoint for this model.*scripts/finetune_seg.*_vit'
        ),
        refused(
            vit, {'state_dict': in_layout(swin.state_dict(), ())}, 'known are our segmentation, mmsegmentation ViT'
        ),
        refused(swin, pretraining('mirl_vit_tiny').state_dict(), 'not a checkpoint for this model'),
        refused(
            vit, segmenter('mirl_vit_tiny', channels=16).state_dict(), r'decode_head\.conv_seg\.weight: file \[5, 16'
        ),
        refused(vit, {'decode_head.conv_seg.weight': torch.ones(5, 8, 1, 1)}, 'not a checkpoint for this model'),
    ]
    for line in lines:
        measured(line)
