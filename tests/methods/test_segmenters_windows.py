"""Segmenters of encoders with windows: the numbers of mmsegmentation, any image size, padding, groups."""

import copy
import re

import pytest
import torch
from golden import filled_state, golden
from segmented import assert_close, difference, images, network_differences
from timm.models.swin_transformer import SwinTransformer

import models_a2mim
import models_localmim
import models_mixmae
from util.data.segmentation import predict, slide_logits
from util.nn.grad_checkpoint import checkpoint_blocks
from util.nn.pyramid import StageMaps
from util.nn.swin import SwinBackbone
from util.optim import param_groups
from util.weights import load_published

SIZES = dict(num_classes=7, channels=32, aux_channels=16, embed_dim=16)
TINY_SWIN = dict(SIZES, depths=(2, 2, 3, 2), num_heads=(2, 4, 4, 8), window_size=7)
CASES = {  # timm's Swin has to meet the numbers of the other, which is the same network under other names
    'localmim_swin_tiny': (models_localmim, 'localmim_swin_tiny', TINY_SWIN),
    'simmim_swin_tiny': (models_a2mim, 'simmim_swin_tiny', TINY_SWIN),
    'mixmae_tiny': (
        models_mixmae,
        'mixmae_base',
        dict(SIZES, img_size=128, depths=(1, 1, 2, 1), num_heads=(2, 2, 4, 4), window_size=(8, 8, 8, 4)),
    ),
}


def reference_of(case: str) -> dict:
    return golden(f'segmentation/{case.replace("simmim", "localmim")}.json')


def segmenter(case: str) -> torch.nn.Module:
    module, name, options = CASES[case]
    return module.create_segmenter(name, **options)


def ours_of(case: str, name: str) -> str:
    """The reference's name of a parameter -> ours: in timm's Swin merging begins a stage."""
    if case.startswith('simmim'):
        name = re.sub(r'layers\.(\d)\.downsample', lambda found: f'layers.{int(found[1]) + 1}.downsample', name)
    return name.replace('backbone.', 'encoder.')


def filled(case: str) -> tuple[torch.nn.Module, dict]:
    """A segmenter with the reference's weights, as from a published file, and the reference."""
    reference, model = reference_of(case), segmenter(case)
    unfilled = [text.partition(':')[0] for text in reference.get('not_filled', [])]
    load_published(model, {'state_dict': filled_state(reference['params'], unfilled)})
    return model, reference


@pytest.mark.parametrize('case', CASES)
def test_parity(case):
    model, reference = filled(case)
    names = {name: [ours_of(case, name)] for name, _ in reference['params'] if 'absolute' not in name}
    for mode in ('eval', 'train'):
        reference[mode]['grad_l2'].pop('backbone.absolute_pos_embed', None)
    found = network_differences(model, reference, names)
    print(case, {key: f'{value:.1e}' for key, value in found.items()})
    assert_close(found)


def test_inference():
    """Slide and whole, flipped and of several scales."""
    model, reference = filled('localmim_swin_tiny')[0].eval(), golden('segmentation/inference.json')
    size, windows = reference['ori_shape'], dict(crop=reference['crop'], stride=reference['stride'])
    imgs = images(reference['input'])
    scales = [images(text.partition(',')[0] + text[text.index(',') :]) for text in reference['multi_scale']['inputs']]
    with torch.no_grad():
        whole = predict(model, imgs, size)
        flipped = predict(model, imgs.flip(-1), size).flip(-1)
        slide = predict(model, imgs, size, 'slide', **windows)
        several = predict(model, scales, size, flip=True)
        found = {'slide logits': difference(slide_logits(model, imgs, **windows), reference['slide_logits'])}
    for key, ours, theirs in (
        ('slide', slide, reference['slide_probabilities']),
        ('whole', whole, reference['whole_probabilities']),
        ('flipped', flipped, reference['whole_probabilities_flipped_back']),
        ('several', several, reference['multi_scale']['mean_probabilities']),
    ):
        found[key] = difference(ours, theirs)
    predictions = [
        (slide, reference['slide_prediction_counts']),
        (whole, reference['whole_prediction_counts']),
        (several, reference['multi_scale']['prediction_counts']),
    ]
    found['counts'] = max(
        (ours.argmax(dim=1).flatten().bincount(minlength=7) - torch.tensor(counts)).abs().max().item() / (200 * 281)
        for ours, counts in predictions
    )
    print({key: f'{value:.1e}' for key, value in found.items()})
    assert_close(found)


# --------------------------------------------------------------------------
# any size


def swins(**sizes) -> tuple[SwinBackbone, SwinTransformer]:
    """A dense Swin and timm's with its weights, in evaluation mode."""
    own = models_localmim.create_segmenter('localmim_swin_pico', **sizes).encoder.eval()
    timms = models_a2mim.create_backbone('simmim_swin_tiny', patch_size=2, **{**PICO, **sizes}).eval()
    for param in own.parameters():
        torch.nn.init.normal_(param, std=0.2)
    timms.load_state_dict({ours_of('simmim', name): value for name, value in own.state_dict().items()})
    return own, timms


PICO = dict(embed_dim=24, depths=(2, 2, 2, 2), num_heads=(2, 2, 4, 4), window_size=4)


@pytest.mark.parametrize('size', [(64, 64), (37, 50), (5, 130), (1, 1)])
def test_any_size(size):
    """Whole windows, padding everywhere, maps of a single window; parts of a batch do not meet."""
    own, timms = swins()
    imgs = torch.randn(2, 3, *size)
    with torch.no_grad():
        maps, same, single = own(imgs), timms(imgs), own(imgs[1:])
    for i, (x, y, z) in enumerate(zip(maps, same, single, strict=True)):
        assert list(x.shape[2:]) == [-(-side // (2 << i)) for side in size]
        assert x.shape[1] == own.widths[i] == timms.widths[i]
        assert own.strides[i] == timms.strides[i] == 2 << i
        assert torch.allclose(x, y, atol=2e-5)
        assert torch.allclose(x[1:], z, atol=2e-5)


@pytest.mark.parametrize('case', [0, 1], ids=['own', "timm's"])
def test_copied_checkpointed(case):
    """Each as the network is, and close to it in bfloat16."""
    encoder = swins(depths=(1, 2, 1, 1))[case]
    imgs = torch.randn(1, 3, 37, 50)
    maps = encoder(imgs)
    again = copy.deepcopy(encoder)
    assert type(again) is type(encoder)
    assert checkpoint_blocks(again) == 5
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert all(torch.allclose(x.float(), y, atol=0.3) for x, y in zip(encoder(imgs), maps, strict=True))
    repeated = again(imgs)
    assert all(map(torch.equal, repeated, maps))
    for outputs in (maps, repeated):
        sum(x.square().sum() for x in outputs).backward()
    grads = [[param.grad for param in network.parameters()] for network in (encoder, again)]
    assert all(map(torch.equal, *grads))


@pytest.mark.faults
@pytest.mark.parametrize('case', [0, 1], ids=['own', "timm's"])
def test_compiled(case):
    """Without a break, in training and evaluation of one image size."""
    encoder = swins(depths=(1, 2, 1, 1))[case]
    torch.compiler.reset()
    compiled = torch.compile(encoder, fullgraph=True, backend='aot_eager')
    imgs = torch.randn(1, 3, 37, 50)
    maps = compiled(imgs)
    sum(x.sum() for x in maps).backward()
    assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(maps, encoder(imgs), strict=True))


def test_mixmim_has_the_classifiers_tokens():
    """Of the last stage, but for the norm; another window than the pretrained one where the size is another."""
    classifier = models_mixmae.create_classifier('mixmae_tiny', 5, img_size=64).eval()
    encoder = models_mixmae.create_backbone('mixmae_tiny', img_size=64).eval()
    state = {k: v for k, v in classifier.state_dict().items() if k.split('.')[0] not in ('head', 'norm')}
    missing, unexpected = encoder.load_state_dict(state, strict=False)
    assert not unexpected
    assert {name.split('.')[0] for name in missing} == {'norm0', 'norm1', 'norm2'}
    imgs = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        last = encoder(imgs)[-1].flatten(2).transpose(1, 2)
        assert torch.allclose(last, classifier.forward_features(imgs), atol=1e-6)
    assert encoder.strides == [2, 4, 8]
    assert encoder.widths == [32, 64, 128]
    with torch.device('meta'):
        model = models_mixmae.create_segmenter('mixmae_base')
    assert [stage.window_size for stage in model.encoder.layers] == [16, 16, 16, 16]
    assert model.fixed_size == 512


# --------------------------------------------------------------------------
# parameters


def test_number_of_parameters():
    with torch.device('meta'):
        models = [models_localmim.create_segmenter('localmim_swin_base')]
        models.append(models_a2mim.create_segmenter('simmim_swin_base', window_size=7))
    for model in models:
        assert sum(param.numel() for param in model.parameters()) == 121_279_716
        assert model.fixed_size is None


@pytest.mark.parametrize('case', ['localmim_swin_tiny', 'simmim_swin_tiny'])
def test_groups(case):
    reference = golden('segmentation/groups.json')['cases']['localmim_swin_tiny']['parameters']
    with torch.device('meta'):
        model = segmenter(case)
    groups = param_groups(model, CASES[case][0].param_rules(model), 0.01)
    ours = {name: (group['lr_scale'], group['weight_decay']) for group in groups for name in group['names']}
    assert ours == {ours_of(case, name): (scale, decay) for name, scale, decay in reference}


def test_groups_of_mixmim():
    """A Swin's decay; layers by blocks, where the heads and the maps' norms learn at the full rate."""
    model = segmenter('mixmae_tiny')
    groups = param_groups(model, models_mixmae.param_rules(model), 0.05, 0.85)
    ours = {name: (group['lr_scale'], group['weight_decay']) for group in groups for name in group['names']}
    assert ours['decode_head.conv_seg.bias'] == (1, 0.05)
    assert ours['encoder.norm0.weight'] == (1, 0)
    assert ours['encoder.layers.3.blocks.0.attn.proj.bias'] == (pytest.approx(0.85), 0.05)
    assert ours['encoder.layers.2.downsample.reduction.weight'] == (pytest.approx(0.85), 0.05)
    assert ours['encoder.layers.0.blocks.0.attn.relative_position_bias_table'] == (pytest.approx(0.85**5), 0)
    assert ours['encoder.patch_embed.proj.weight'] == (pytest.approx(0.85**6), 0.05)


def test_what_does_not_fit():
    for create, options, message in (
        (models_localmim.create_backbone, dict(name='localmim_swin_pico', out_indices=[1]), 'out_indices'),
        (models_localmim.create_backbone, dict(name='localmim_swin_pico', coords='right'), "coords 'right'"),
        (models_mixmae.create_backbone, dict(name='mixmae_tiny', img_size=36), 'img_size 36 is not a multiple of 4 x'),
        (models_mixmae.create_segmenter, dict(name='mixmae_tiny', pool='avg'), 'only the maps of a ViT'),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            create(**options)
    with pytest.raises(TypeError, match='out_indices'):
        models_a2mim.create_backbone('simmim_swin_pico', out_indices=[1])
    with pytest.raises(ValueError, match='not square'):
        StageMaps(SwinTransformer(img_size=32, **{**PICO, 'window_size': (4, 2)}))
