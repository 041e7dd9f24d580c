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
import models_mixmae
from scripts import finetune_segmentation
from util.errors import UserError
from util.nn.upernet import FCNHead, Segmenter, UPerHead
from util.nn.vit import quarters
from util.optim import param_groups
from util.weights import load_published

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
SLOW = ('a2mim_resnet50_fcn_64', 'a2mim_vit_mae_tiny')  # their gradients: the second's network is LocalMIM's


def ours_of(name: str, own: dict) -> list[str]:
    """The reference's name of a parameter -> ours; a bias of q, k and v becomes two, where k has none."""
    for pattern, ours in (CONVNEXT_NAMES if any('conv_dw' in key for key in own) else VIT_NAMES).items():
        name = re.sub(pattern, ours, name)
    name = name.replace('backbone.', 'encoder.')
    return [name] if name in own else [name.replace('qkv.bias', part) for part in ('q_bias', 'v_bias')]


def load(model: Segmenter, params: list) -> dict[str, list[str]]:
    """Fill a model as the reference was; returns which of our parameters each of its parameters became."""
    load_published(model, {'state_dict': filled_state(params)})
    own = model.state_dict()
    return {name: ours_of(name, own) for name, _ in params}


@pytest.mark.parametrize(
    ('name', 'modes'),
    [
        *((name, ('eval', 'train')) for name in CASES if name not in SLOW),
        *((name, ()) for name in SLOW),
        *(pytest.param(name, ('eval', 'train'), marks=pytest.mark.faults) for name in SLOW),
    ],
)
def test_parity(name, modes):
    model, reference = CASES[name](), golden(f'segmentation/{name}.json')
    names = load(model, reference['params'])
    if name == 'convnext_tiny':  # the reference's; pretraining, and so ours, has 1e-6 everywhere
        for stage in list(model.encoder.stages)[1:]:
            stage.downsample[0].eps = 1e-5
    found = network_differences(model, reference, names, modes)
    print(name, {key: f'{value:.1e}' for key, value in found.items()})
    assert_close(found)


@pytest.mark.parametrize('name', ['heads', 'heads_odd'])
def test_heads(name):
    reference = golden(f'segmentation/{name}.json')
    sizes = reference['config']
    dims, num_classes = sizes['in_channels'], sizes['num_classes']
    heads = UPerHead(dims, sizes['channels'], num_classes), FCNHead(dims[2], sizes['aux_channels'], num_classes)
    model = without_dropout(Segmenter(torch.nn.Identity(), None, *heads)).eval()
    model.load_state_dict(filled_state(reference['params']), strict=False)
    names = {name: [name] for name, _ in reference['params']}
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


# --------------------------------------------------------------------------
# parameters: how many, what they start from, how the optimiser groups them


@pytest.mark.parametrize(
    ('module', 'name', 'options', 'published'),
    [
        # a bias for k, which is in the published count and changes nothing, is left out
        (models_localmim, 'localmim_vit_base', {}, 163_877_228 - 12 * 768),
        (models_a2mim, 'a2mim_vit_base', dict(abs_pos_embed=False, init_values=0.1), 163_080_812),
        (models_a2mim, 'a2mim_resnet50', {}, 49_579_372),
        (models_a2mim, 'a2mim_resnet50', dict(deep_stem=True), 49_598_604),
    ],
)
def test_number_of_parameters(module, name, options, published):
    with torch.device('meta'):
        model = module.create_segmenter(name, **options)
    assert sum(param.numel() for param in model.parameters()) == published


@pytest.mark.parametrize(
    ('name', 'layer_decay', 'weight_decay'),
    [('localmim_vit_tiny', 0.65, 0.05), ('a2mim_vit_mae_tiny', 0.65, 0.05), ('a2mim_resnet50_fcn_64', 1.0, 5e-4)],
)
def test_groups(name, layer_decay, weight_decay):
    module = models_localmim if 'localmim' in name else models_a2mim
    with torch.device('meta'):
        model = CASES[name]()
    groups = param_groups(model, module.param_rules(model), weight_decay, layer_decay)
    ours = {name: (group['lr_scale'], group['weight_decay']) for group in groups for name in group['names']}
    reference = golden('segmentation/groups.json')['cases'][name].get('parameters')
    if reference is None:  # one group
        assert set(ours.values()) == {(1.0, weight_decay)}
        return
    seen = set()
    for theirs, scale, decay in reference:
        for own in ours_of(theirs, model.state_dict()):
            assert ours[own] == (pytest.approx(scale, rel=1e-8), decay), theirs
            seen.add(own)
    assert seen == ours.keys()


def test_groups_of_convnext():
    """BEiT's layers for ConvNeXt; the new norms learn as the heads do."""
    model = models_a2mim.create_segmenter('a2mim_convnext_pico', 5)
    rules = models_a2mim.param_rules(model)
    layers = {name: layer for name, (layer, _, _) in rules.items()}
    assert layers['encoder.stem.0.weight'] == 0
    assert layers['encoder.stages.3.blocks.0.gamma'] == 4
    assert {layer for name, layer in layers.items() if 'encoder.norm' in name or 'head' in name} == {5}
    assert all(
        decays == (param.ndim > 1) for param, (_, _, decays) in zip(model.parameters(), rules.values(), strict=True)
    )


def test_initial_values():
    torch.manual_seed(0)
    model = models_mirl.create_segmenter('mirl_vit_tiny', 50, img_size=64)
    head = model.decode_head
    assert not head.conv_seg.bias.any()
    assert head.conv_seg.weight.std().item() == pytest.approx(0.01, rel=0.05)
    conv = head.fpn_bottleneck.conv.weight
    assert conv.std().item() == pytest.approx((2 / (conv.shape[0] * 9)) ** 0.5, rel=0.02)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d | torch.nn.LayerNorm):
            assert (module.weight == 1).all()
            assert not module.bias.any()
    tables = [value for name, value in model.named_parameters() if 'bias_table' in name]
    assert len(tables) == 4
    assert not any(table.any() for table in tables)
    assert all((block.gamma_1 == 1).all() for block in model.encoder.blocks)
    beit = models_a2mim.create_segmenter('a2mim_vit_tiny', 5, img_size=64, abs_pos_embed=False, init_values=0.1)
    assert beit.encoder.pos_embed is None
    tables = [value for name, value in beit.named_parameters() if 'bias_table' in name]
    assert torch.cat(tables).std().item() == pytest.approx(0.02, rel=0.05)


# --------------------------------------------------------------------------
# options


def test_which_maps():
    """The published blocks; at other depths the ends of quarters."""
    blocks = {12: [3, 5, 7, 11], 24: [7, 11, 15, 23], 48: [11, 23, 35, 47], 54: [13, 26, 39, 53], 4: [0, 1, 2, 3]}
    for depth, taken in blocks.items():
        assert list(quarters(depth)) == taken
    local = {12: [1, 3, 9, 11], 24: [1, 3, 21, 23], 8: [1, 3, 5, 7], 6: quarters(6)}
    for depth, taken in local.items():
        assert list(models_localmim.local_layers(depth)) == taken
    vit = models_a2mim.create_backbone('a2mim_vit_tiny', img_size=32)
    assert (vit.widths, vit.strides) == ([96], [8])
    resnet = models_a2mim.create_backbone('a2mim_resnet_tiny')
    assert resnet.strides == [4, 8, 16, 32]
    fcn = models_a2mim.create_segmenter('a2mim_resnet_tiny', 5)
    assert fcn.encoder.strides == [4, 8, 8, 8]
    assert isinstance(fcn.decode_head, FCNHead)
    uper = models_a2mim.create_segmenter('a2mim_resnet_tiny', 5, head='uper')
    assert uper.encoder.strides == [4, 8, 16, 32]
    assert isinstance(uper.decode_head, UPerHead)


@pytest.mark.parametrize(
    ('name', 'fixed_size'),
    [
        ('regnetx_002', None),
        *(
            pytest.param(*case, marks=pytest.mark.faults)
            for case in [
                ('vit_tiny_patch16_224', 64),
                ('beit_base_patch16_224', 64),
                ('convnext_atto', None),
                ('efficientnet_b0', None),
                ('pvt_v2_b0', None),
                ('maxvit_rmlp_pico_rw_256', 64),
            ]
        ),
    ],
)
def test_any_network_of_timm(name, fixed_size):
    """Its maps are what it says that they are; a ViT gets the pyramid."""
    model = models_a2mim.create_segmenter('a2mim_timm', 5, img_size=64, name=name).eval()
    imgs = torch.randn(1, 3, 64, 64)
    maps = model.encoder(imgs)
    assert [x.shape[1] for x in maps] == model.encoder.widths
    assert [64 // x.shape[-1] for x in maps] == model.encoder.strides
    assert len(maps) == 4
    assert model.fixed_size == fixed_size
    assert (model.pyramid is not None) == name.startswith(('vit', 'beit'))
    assert model(imgs).shape == (1, 5, 64, 64)
    assert models_a2mim.param_rules(model).keys() == {key for key, _ in model.named_parameters()}


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(img_size=65), 'img_size 65 is not a multiple of patch_size 8'),
        (dict(img_size=8), 'img_size 8 has fewer than 2 x 2 patches'),
        (dict(num_classes=256), 'num_classes 256 must be from 1 to 255'),
        (dict(head='deeplab'), "head 'deeplab' is not one of uper, fcn"),
        (dict(pool='sum'), "pool 'sum' is not one of max, avg"),
        (dict(loss_mean='mean'), "loss_mean 'mean' is not one of all, counted"),
        (dict(out_indices=[0, 2, 1, 3]), 'must rise and be from 0 to 3'),
        (dict(out_indices=[0, 1, 2, 4]), 'must rise and be from 0 to 3'),
        (dict(out_indices=[1, 2, 3]), '3 maps of one stride: the pyramid needs four'),
        (dict(depth=3), 'depth 3 is below 4'),
        (dict(deep_stem=True), 'deep_stem'),
        (dict(no_such_option=1), 'no_such_option'),
    ],
)
def test_what_does_not_fit(options, message):
    for module, name in ((models_mirl, 'mirl_vit_tiny'), (models_a2mim, 'a2mim_vit_tiny')):
        with pytest.raises((ValueError, TypeError), match=re.escape(message)):
            module.create_segmenter(name, **{'num_classes': 5, 'img_size': 32, **options})


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(pool='avg'), 'only the maps of a ViT'),
        (dict(rel_pos_bias=True), 'rel_pos_bias'),
        (dict(pretrained=True), 'pretrained is set by this program'),
    ],
)
def test_what_does_not_fit_convolutions(options, message):
    for name in ('a2mim_resnet_tiny', 'a2mim_convnext_pico'):
        with pytest.raises((ValueError, TypeError), match=message):
            models_a2mim.create_segmenter(name, 5, **options)


def test_a_method_without_segmenters(monkeypatch):
    monkeypatch.delattr(models_mirl, 'create_segmenter')
    args = finetune_segmentation.get_args_parser().parse_args(['--model', 'mirl_vit_tiny'])
    with pytest.raises(
        UserError, match=r'models_mirl.py has no create_segmenter: mirl_vit_tiny cannot learn to segment'
    ):
        finetune_segmentation.create_segmenter(args, 5)


@pytest.mark.parametrize('head', ['uper', 'fcn'])
@pytest.mark.parametrize(
    ('module', 'name'),
    [
        (models_mirl, 'mirl_vit_tiny'),
        (models_localmim, 'localmim_swin_pico'),
        (models_mixmae, 'mixmae_tiny'),
        (models_a2mim, 'simmim_swin_pico'),
        (models_a2mim, 'a2mim_convnext_pico'),
        (models_a2mim, 'a2mim_resnet_tiny'),
    ],
)
def test_every_trainable_parameter_has_a_gradient(module, name, head):
    """Several processes wait for each other's, and would for ever."""
    model = module.create_segmenter(name, 5, img_size=32, head=head)
    imgs, label = torch.randn(2, 3, 32, 32), torch.zeros(2, 32, 32, dtype=torch.long)
    model(imgs, label)[0].backward()
    assert [name for name, param in model.named_parameters() if param.requires_grad and param.grad is None] == []


@pytest.mark.parametrize('mean', ['all', 'counted'])
def test_loss(mean):
    """In float32 also under autocast; zero by either mean where all labels are ignored."""
    model = Segmenter(torch.nn.Identity(), None, UPerHead([8, 8], 8, 3), FCNHead(8, 8, 3), loss_mean=mean)
    maps = [torch.randn(2, 8, 4, 4)] * 2
    with torch.autocast('cpu', torch.bfloat16):
        loss, terms = model(maps, torch.zeros(2, 8, 8, dtype=torch.long))
    assert {value.dtype for value in (loss, *terms.values())} == {torch.float32}
    assert loss > 0
    assert model(maps, torch.full((2, 8, 8), 255))[0] == 0
