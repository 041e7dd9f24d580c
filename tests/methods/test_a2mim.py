"""A2MIM and SimMIM: the token's place in any encoder, the Fourier loss's fast form."""

import time

import numpy as np
import pytest
import timm
import torch
from timm.layers import LayerNorm2d
from training import draw_plan, shapes

import models_a2mim
from models_a2mim import create_classifier, param_rules
from scripts.benchmark import two_transforms
from util.nn.patches import patch_mask_to_pixels
from util.nn.spectrum import focal_frequency_loss


def cells(model, n=2, seed=0):
    return draw_plan(model, n, seed)


# --------------------------------------------------------------------------
# the Fourier loss


def test_one_transform_is_enough(measured):
    """Value and gradient equal the two-transform form's; times interleaved in one process, for the record."""
    torch.manual_seed(0)
    imgs, start = torch.randn(32, 3, 224, 224), torch.randn(32, 3, 224, 224)

    def step(loss):
        pred = start.clone().requires_grad_()
        began = time.process_time()
        value = loss(pred)
        value.backward()
        return time.process_time() - began, value.item(), pred.grad

    times = []
    for _ in range(5):
        slow, fast = step(lambda pred: two_transforms(pred, imgs)), step(lambda pred: focal_frequency_loss(pred - imgs))
        times.append((slow[0], fast[0]))
        assert fast[1] == pytest.approx(slow[1], rel=1e-6)
        assert (fast[2] - slow[2]).norm() < 1e-5 * slow[2].norm()
    slow_s, fast_s = np.min(times, axis=0)  # what noise has added least to
    assert slow_s / fast_s > 8
    measured(f'a2mim: Fourier loss at batch 32, two transforms of the batch / one of its mean: {slow_s / fast_s:.0f} x')


def test_options_of_the_fourier_loss_reach_it():
    options = dict(alpha=0.5, ave_spectrum=False, log_matrix=False, batch_matrix=False)
    model = models_a2mim.a2mim_vit_tiny(img_size=32, **{f'fft_{key}': value for key, value in options.items()})
    imgs, pred, hidden = torch.randn(2, 3, 32, 32), torch.randn(2, 3, 32, 32), torch.ones(2, 1, 32, 32)
    expected = focal_frequency_loss(pred - imgs, **options)
    assert model.fourier_loss(imgs, pred - imgs, hidden).item() == pytest.approx(expected.item(), rel=1e-6)
    assert focal_frequency_loss(pred - imgs).item() != pytest.approx(expected.item(), rel=1e-2)


VARIANTS = [  # what makes a difference to the loss, and around which other options
    (dict(alpha=0.4), dict(loss='focal_l1')),
    (dict(gamma=2.0), dict(loss='focal_l1')),
    (dict(activate='tanh'), dict(loss='focal_mse')),
    (dict(residual=True), dict(loss='focal_mse')),
    (dict(unmask_weight=0.1), {}),
    (dict(fft_weight=0.2), {}),
    (dict(fft_focal=False), {}),
    (dict(fft_unmask_weight=0.5), {}),
    (dict(fft_reweight=True), dict(fft_focal=False)),
    *[(dict(fft_unmask_replace=kind), {}) for kind in ('target', 'prediction', 'mean')],
]


@pytest.mark.parametrize(
    ('variant', 'others'), VARIANTS, ids=lambda value: '-'.join(f'{key}={v}' for key, v in value.items())
)
def test_options_of_the_loss_reach_it(variant, others):
    generator = torch.Generator().manual_seed(0)
    imgs, pred = (torch.randn(2, 3, 32, 32, generator=generator) for _ in range(2))
    hidden = torch.ones(2, 1, 32, 32).triu()
    losses = [
        models_a2mim.a2mim_vit_tiny(img_size=32, **others, **options).forward_loss(imgs, pred, hidden)[0].item()
        for options in ({}, variant)
    ]
    assert losses[1] != pytest.approx(losses[0], rel=1e-4)


def test_functions_are_called_like_their_models():
    for name in models_a2mim.__all__:
        assert getattr(models_a2mim, name).__name__ == name


# --------------------------------------------------------------------------
# the mask token's place

HIDDEN_FROM = ['a2mim_vit_tiny', 'a2mim_resnet_tiny', 'a2mim_convnext_pico', 'a2mim_timm']


@pytest.mark.parametrize('name', HIDDEN_FROM)
def test_hidden_pixels_never_reach_the_encoder(name):
    """But for the mean colour: images that differ in hidden pixels alone, with equal means, are one input to it."""
    torch.manual_seed(0)
    model = getattr(models_a2mim, name)(img_size=64).eval()
    imgs, plan = torch.randn(2, 3, 64, 64), cells(model)
    hidden = patch_mask_to_pixels(plan.mask, 64 // model.cells)
    other = torch.where(hidden > 0, imgs + torch.randn_like(imgs), imgs)
    shift = (other - imgs).sum(dim=(2, 3), keepdim=True) / hidden.sum(dim=(2, 3), keepdim=True)
    other = torch.where(hidden > 0, other - shift, other)
    assert (other - imgs).abs().max() > 1
    inputs = []
    first = next(module for module in model.encoder.modules() if isinstance(module, torch.nn.Conv2d))
    first.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    for x in (imgs, other):
        model(x, plan)
    assert (inputs[0] - inputs[1]).abs().max() < 1e-6
    assert not torch.equal(inputs[0], imgs)


FAMILY_NAMES = [
    'resnet18',
    'resnext50_32x4d',
    'regnety_002',
    'efficientnet_b0',
    'mobilenetv3_small_050',
    'mobilenetv4_conv_small',
    'convnext_atto',
    'convnextv2_atto',
    'swin_tiny_patch4_window7_224',
    'swinv2_cr_tiny_224',
    'vit_tiny_patch16_224',
    'pvt_v2_b0',
    'poolformerv2_s12',
    'mambaout_femto',
    'edgenext_xx_small',
    'densenet121',
]


@pytest.mark.parametrize('name', FAMILY_NAMES)
def test_any_encoder(name):
    """The token lands on hidden positions alone, all that trains gets a gradient, stock timm takes the encoder."""
    size = 64
    model = models_a2mim.a2mim_timm(name=name, img_size=size, mask_token='zero', mask_init=1.0)
    site = model.site
    assert (size // site.side, size // model.end.side) in {(16, 32), (16, 16)}
    imgs, plan = torch.randn(2, 3, size, size), cells(model)
    loss, _ = model(imgs, plan)
    loss.backward()
    assert not [key for key, p in model.named_parameters() if p.requires_grad and p.grad is None]

    # with `replace`, features of hidden positions, and only these, no longer depend on the image
    model.replace, model.mask_gamma = True, None
    seen = []
    model.encoder.get_submodule(site_name(model)).register_forward_hook(lambda module, args, x: seen.append(x))
    with torch.no_grad():
        for _ in range(2):
            model.eval().forward_encoder(torch.randn(2, 3, size, size), plan.mask)
    same = (site.to_map(seen[0]) == site.to_map(seen[1])).all(dim=1, keepdim=True)
    assert torch.equal(same.float(), patch_mask_to_pixels(plan.mask, site.side // model.cells))

    with shapes():
        stock = timm.create_model(name, num_classes=0, **({'img_size': size} if takes_img_size(name) else {}))
        rules = param_rules(create_classifier('a2mim_timm', name=name, num_classes=5, img_size=size))
    stock.load_state_dict(model.encoder_state_dict(), strict=True, assign=True)
    assert min(rules.values())[0] == 0
    assert len({layer_id for layer_id, _, _ in rules.values()}) > 3


def takes_img_size(name: str) -> bool:
    try:
        timm.create_model(name, img_size=64)
    except TypeError:
        return False
    return True


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(name='hiera_tiny_224', img_size=224), 'may be in another order than the image'),
        (dict(name='xception41', img_size=224), 'the image goes round it'),
        (dict(name='pit_ti_224', img_size=224), 'a list or tuple of maps'),
        (dict(name='densenet121', mask_layer=0), 'features.norm0, a BatchNorm'),
        (dict(name='resnet5'), 'timm has no model resnet5; did you mean resnet50'),
        (dict(name='levit_128s', img_size=224), 'may be in another order than the image'),
        (dict(name='eva02_tiny_patch14_224', img_size=224), 'do not fit the 16 positions'),
        (dict(name='resnet18', mask_layer=7), 'mask_layer 7: ResNet has 5 feature maps'),
        (dict(name='vit_tiny_patch16_224', img_size=80, mask_patch_size=40), 'do not fit'),
    ],
    ids=lambda value: value.get('name') if isinstance(value, dict) else '',
)
def test_what_has_no_place_for_the_token_is_refused(options, message):
    with shapes(), pytest.raises(ValueError, match=message):
        models_a2mim.a2mim_timm(**{'img_size': 64, **options})


@pytest.mark.parametrize(
    ('make', 'options', 'message'),
    [
        ('a2mim_resnet50', dict(img_size=100), 'img_size 100 is not a multiple of mask_patch_size 32'),
        (
            'a2mim_resnet50',
            dict(img_size=32),
            '1 of the cells of the mask in an image of this size: too few to hide some',
        ),
        ('a2mim_resnet50', dict(mask_ratio=1.0), 'mask_ratio 1.0 hides 49 of 49 cells'),
        ('a2mim_resnet50', dict(mask_ratio=0.0), 'mask_ratio 0.0 hides 0 of 49 cells'),
        ('a2mim_resnet50', dict(mask_layer=4), 'mask_layer 4 of 4'),
        ('a2mim_vit_small', dict(mask_layer=8), 'mask_layer 8 of 8 blocks'),
        ('a2mim_vit_small', dict(mask_layer=-1), 'mask_layer -1 of 8 blocks'),
        ('a2mim_convnext_tiny', dict(mask_patch_size=16), '14 cells of 16 pixels a side do not fit the 7 positions'),
        ('a2mim_convnext_tiny', dict(loss='l3'), "loss 'l3' is not one of l1, mse"),
        ('a2mim_convnext_tiny', dict(mask_color='red'), "mask_color 'red' is not one of mean, none"),
        ('simmim_vit_small', dict(mask_init=0.1), 'mask_init 0.1 damps features that replace=True drops'),
        (
            'simmim_swin_tiny',
            dict(img_size=208, mask_patch_size=16),
            "img_size 208 is not a multiple of the last map's stride 32",
        ),
    ],
)
def test_what_cannot_be(make, options, message):
    with shapes(), pytest.raises(ValueError, match=message):
        getattr(models_a2mim, make)(**options)


@pytest.mark.parametrize('layer', range(4))
@pytest.mark.parametrize('name', ['a2mim_vit_tiny', 'a2mim_resnet_tiny', 'a2mim_convnext_pico', 'simmim_swin_pico'])
def test_every_place(name, layer):
    """At every mask layer: with `replace`, features of hidden positions stop depending on the image there."""
    model = getattr(models_a2mim, name)(
        img_size=64, mask_patch_size=32, mask_layer=layer, replace=True, mask_init=0.0
    ).eval()
    plan = cells(model)
    seen = []
    module = model.encoder.get_submodule(site_name(model))
    module.register_forward_hook(lambda module, args, output: seen.append(model.site.to_map(output)))
    with torch.no_grad():
        for _ in range(2):
            model.forward_encoder(torch.randn(2, 3, 64, 64), plan.mask)
    mask = patch_mask_to_pixels(plan.mask, model.site.side // model.cells)
    same = (seen[0] == seen[1]).all(dim=1, keepdim=True).float()
    assert torch.equal(same, mask)


def site_name(model) -> str:
    """The module that carries the model's own hook."""
    [name] = [
        name
        for name, module in model.encoder.named_modules()
        if any(getattr(hook, '__self__', None) is model for hook in module._forward_hooks.values())
    ]
    return name


def test_drop_path_where_there_is_none():
    with pytest.raises(ValueError, match='densenet121 has no drop path; --drop_path 0 goes without'):
        create_classifier('a2mim_timm', name='densenet121', drop_path_rate=0.1)
    create_classifier('a2mim_timm', name='densenet121')


@pytest.mark.parametrize('kind', ['learnable', 'zero', 'randn', 'mean', 'instance_mean', 'none'])
@pytest.mark.parametrize('name', ['a2mim_vit_tiny', 'a2mim_resnet_tiny', 'simmim_swin_pico'])
def test_kinds_of_tokens(name, kind):
    model = getattr(models_a2mim, name)(img_size=64, mask_token=kind, mask_init=0.0)
    learned = {key for key, p in model.named_parameters() if p.requires_grad and not key.startswith(('enc', 'dec'))}
    assert learned == ({'mask_token'} if kind == 'learnable' else set())
    imgs, plan = torch.randn(2, 3, 64, 64), cells(model)
    loss, _ = model(imgs, plan)
    loss.backward()
    assert loss.isfinite()

    seen = []
    module = model.encoder.get_submodule(site_name(model))
    module._forward_hooks.clear()
    module.register_forward_hook(lambda module, args, x: seen.append(x))  # before the model's own
    module.register_forward_hook(model.insert_token)
    module.register_forward_hook(lambda module, args, x: seen.append(x))
    with torch.no_grad():
        model.eval().forward_encoder(imgs, plan.mask)
    before, after = map(model.site.to_map, seen)
    added = torch.where(patch_mask_to_pixels(plan.mask, model.site.side // model.cells) > 0, 1.0, 0.0)
    token = {
        'mean': before.mean(dim=(0, 2, 3), keepdim=True),
        'instance_mean': before.mean(dim=(2, 3), keepdim=True),
        'none': torch.zeros(()),
    }.get(kind, None if model.mask_token is None else model.mask_token.detach().view(1, -1, 1, 1))
    torch.testing.assert_close(after, before * (1 - added * model.replace * (kind != 'none')) + added * token)


def test_damping_and_detaching():
    """replace=False: (1 - m) f + m (gamma f + t); `detach` stops gradients of hidden features alone."""
    model = models_a2mim.a2mim_resnet_tiny(img_size=64, mask_init=0.25, detach=True)
    plan = cells(model)
    x = torch.randn(2, model.site.width, model.site.side, model.site.side, requires_grad=True)
    with model.token_at(plan.mask):
        y = model.insert_token(None, (), x)
    mask = patch_mask_to_pixels(plan.mask, model.site.side // model.cells)
    token = model.mask_token.view(-1, 1, 1)
    torch.testing.assert_close(y, x * (1 - mask) + mask * (0.25 * x + token))
    y.sum().backward()
    assert torch.equal(x.grad, (1 - mask).expand_as(x))


def test_the_encoder_is_stock_outside_of_a_forward():
    """After a forward that fails too: no token joins its features."""
    model = models_a2mim.a2mim_vit_tiny(img_size=32).eval()
    imgs, plan = torch.randn(2, 3, 32, 32), cells(model)
    with torch.no_grad():
        stock = model.encoder.forward_features(imgs)
        with pytest.raises(AssertionError):
            model.forward_encoder(torch.randn(2, 3, 16, 16), plan.mask)
        assert torch.equal(model.encoder.forward_features(imgs), stock)
        with model.token_at(plan.mask):
            assert not torch.equal(model.encoder.forward_features(imgs), stock)


@pytest.mark.parametrize(('name', 'agrees'), [('simmim_vit_small', True), ('a2mim_vit_small', False)])
def test_split_of_the_batch(name, agrees):
    """SimMIM's loss is a mean over samples; A2MIM's sees the spectrum of each forward's mean error."""
    model = getattr(models_a2mim, name)(img_size=64, depth=1, drop_path_rate=0.0)
    imgs, plan = torch.randn(4, 3, 64, 64), cells(model, 4)
    whole, _ = model(imgs, plan)
    halves = [model(imgs[i : i + 2], type(plan)(plan.mask[i : i + 2]))[0] for i in (0, 2)]
    assert (whole.item() == pytest.approx(sum(halves).item() / 2, rel=1e-6)) is agrees


# --------------------------------------------------------------------------
# encoders stay stock


@pytest.mark.parametrize(
    ('name', 'stock', 'sizes'),
    [
        ('a2mim_resnet50', 'resnet50', {}),
        ('a2mim_convnext_tiny', 'convnext_tiny', {}),
        ('simmim_swin_tiny', 'swin_tiny_patch4_window7_224', dict(img_size=64, window_size=6)),
    ],
)
def test_stock_timm_takes_the_encoder(name, stock, sizes):
    """`strict=True`, and the features of the unmasked image are the same."""
    model = getattr(models_a2mim, name)(img_size=64)
    other = timm.create_model(stock, num_classes=0, **sizes)
    other.load_state_dict(model.encoder_state_dict(), strict=True)
    imgs = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        ours, theirs = model.eval().encoder.forward_features(imgs), other.eval().forward_features(imgs)
    assert torch.equal(ours, theirs)


PARAMETERS = {  # millions, with a head of 1000 classes
    'a2mim_vit_small': 48.8,
    'a2mim_vit_base': 86.7,
    'a2mim_vit_large': 304.6,
    'a2mim_resnet50': 25.557,
    'a2mim_resnet101': 44.549,
    'a2mim_resnet152': 60.193,
    'a2mim_resnet200': 64.674,
    'a2mim_convnext_tiny': 28.59,
    'a2mim_convnext_small': 50.22,
    'a2mim_convnext_base': 88.59,
}


@pytest.mark.parametrize('name', PARAMETERS)
def test_sizes(name):
    with shapes():
        count = sum(p.numel() for p in create_classifier(name).parameters()) / 1e6
    assert count == pytest.approx(PARAMETERS[name], abs=0.06 if 'vit' in name else 0.006)


def test_initial_values():
    model = models_a2mim.a2mim_vit_small(img_size=64)
    for module in model.encoder.modules():
        if isinstance(module, torch.nn.Linear):
            assert 0.018 < module.weight.std() < 0.022  # not scaled down with depth, as timm's Beit is
    assert 0.015 < model.mask_token.std() < 0.025
    assert 0.018 < model.decoder.weight.std() < 0.022
    convnext = models_a2mim.a2mim_convnext_tiny(img_size=64)
    assert not convnext.mask_token.any()
    assert (convnext.mask_gamma == 1e-6).all()
    assert isinstance(convnext.encoder.head.norm, LayerNorm2d)
    resnet = models_a2mim.a2mim_resnet50(img_size=64)
    assert not resnet.encoder.layer1[0].bn3.weight.any()
