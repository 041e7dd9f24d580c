"""A2MIM and SimMIM against the numbers of the published code: losses, maps, gradients, BatchNorm, masks, options."""

import hashlib

import fill
import numpy as np
import pytest
import torch
from golden import filled_state, golden, relative, summary_difference

import models_a2mim
from util.nn.losses import pixel_loss
from util.nn.patches import patch_mask_to_pixels
from util.nn.spectrum import focal_frequency_loss
from util.weights import load_published

PRETRAINING = [
    'tiny_vit',
    'tiny_vit_l2',
    'tiny_vit_simmim',
    'tiny_resnet',
    'tiny_resnet_fftl1',
    'tiny_convnext',
    'tiny_convnext_fft',
]
STANDALONE = golden('a2mim/standalone_losses.json')
FAMILY = {'SimMIMViT': 'vit_small', 'MIMResNet': 'resnet50', 'MIMConvNeXt': 'convnext_tiny'}
LOSS_NAMES = {'l1_loss': 'l1', 'focal_l1_loss': 'focal_l1'}


def encoder_sizes(backbone: dict) -> dict:
    """The reference's architecture in our (timm's) words."""
    arch = backbone.get('arch')
    if backbone['type'] == 'SimMIMViT':
        width = arch['embed_dims']
        mlp_ratio = arch['feedforward_channels'] / width
        return dict(embed_dim=width, depth=arch['num_layers'], num_heads=arch['num_heads'], mlp_ratio=mlp_ratio)
    if backbone['type'] == 'MIMConvNeXt':
        return dict(depths=arch['depths'], dims=arch['channels'])
    return dict(layers=(1, 1, 1, 1))


def reference_model(data: dict) -> models_a2mim.A2MIM:
    backbone, head = data['model_cfg']['backbone'], data['model_cfg']['head']
    method = 'a2mim' if head['type'] == 'A2MIMHead' else 'simmim'
    options = dict(
        img_size=data['mask_generator']['input_size'],
        mask_layer=backbone['mask_layer'],
        replace=backbone['replace'],
        mask_init=backbone.get('mask_init', 0.0),
        mask_ratio=data['mask_generator']['mask_ratio'],
        drop_path_rate=0.0,
    )
    if method == 'a2mim':
        options |= {key: head[key] for key in head if key.startswith('fft_')}
        loss = head['loss']
        options |= dict(loss=LOSS_NAMES[loss['mode']], unmask_weight=head['unmask_weight'])
        options |= {key: loss[key] for key in ('alpha', 'gamma', 'activate', 'residual') if key in loss}
    name = f'{method}_{FAMILY[backbone["type"]]}'
    model = getattr(models_a2mim, name)(**encoder_sizes(backbone), **options)
    buffers = [[name, shape] for name, shape, kind in data['buffers'] if 'float' in kind]
    report = load_published(model, filled_state(data['params'] + buffers))
    assert not report.ignored
    assert all(key.endswith('num_batches_tracked') for key in report.missing)
    return model


def by_reference_names(data: dict, model) -> dict[str, str]:
    """{the reference's name of a tensor: ours}, found by its filled values, for the tensors of a file."""
    own = {k: v.flatten() for k, v in model.state_dict().items()}
    named = {}
    for name, value in filled_state([p for p in data['params'] if p[0] in data['grad_l2']]).items():
        [named[name]] = [k for k, v in own.items() if v.shape == value.flatten().shape and v.equal(value.flatten())]
    return named


@pytest.mark.parametrize('name', PRETRAINING)
def test_pretraining(name, measured):
    data = golden(f'a2mim/{name}.json')
    model = reference_model(data)
    size = data['mask_generator']['input_size']
    imgs = torch.from_numpy(fill.images(2, size))
    plan = model.plan_from_noise(torch.from_numpy(fill.uniform('a2mim', model.noise_shape(2))))
    side = data['mask']['shape'][-1]
    mask = patch_mask_to_pixels(plan.mask, side // model.cells).squeeze(1).numpy().astype(np.uint8)
    assert hashlib.sha256(mask.tobytes()).hexdigest() == data['mask']['sha256']
    assert side == model.site.side

    names = by_reference_names(data, model)
    loss, terms = model(imgs, plan)
    theirs = {'total_loss': loss, 'spatial_loss': terms['spatial_loss']}
    if data['fft_weight']:
        theirs['fourier_loss_unweighted'] = terms['fourier_loss']
    losses = max(relative(value, data[key]) for key, value in theirs.items())

    loss.backward()
    params = dict(model.named_parameters())
    gradients = max(relative(params[names[k]].grad.double().norm(), norm) for k, norm in data['grad_l2'].items())
    total = torch.stack([p.grad.double().norm() for p in params.values()]).norm()
    gradients = max(gradients, relative(total, data['grad_l2_global']))
    statistics = data.get('bn_running_after_l2') or {}
    buffers = dict(model.named_buffers())
    running = max(
        (relative(buffers[k.replace('backbone.', 'encoder.')].double().norm(), l2) for k, l2 in statistics.items()),
        default=0.0,
    )
    assert sum(p.numel() for p in params.values()) == data['num_params']['total']

    masked = model.fill(imgs, patch_mask_to_pixels(plan.mask, size // model.cells))
    latent = model.forward_encoder(masked, plan.mask)
    tensors = [
        (masked, data['masked_input']),
        (latent, data['latent']),
        (model.forward_decoder(latent), data['prediction']),
    ]
    values = max(summary_difference(x, summary, ddof=1) for x, summary in tensors)
    measured(
        f'a2mim/{name}: losses {losses:.1e}, maps {values:.1e}, gradient norms {gradients:.1e}, BatchNorm {running:.1e}'
    )
    assert max(losses, values) < 1e-5
    assert gradients < 1e-4
    assert running < 1e-6


# --------------------------------------------------------------------------
# losses alone


def filled(name: str, side: int) -> torch.Tensor:
    return torch.from_numpy(fill._generator(name).standard_normal((2, 3, side, side)).astype(np.float32))


def value_and_gradient(loss, pred) -> tuple[float, float]:
    loss.backward()
    return loss.item(), pred.grad.double().norm().item()


@pytest.mark.parametrize('case', STANDALONE['focal_frequency_loss'], ids=lambda case: '')
def test_focal_frequency(case):
    """Every option set; those with batch_matrix=False crash in the published code, and work here."""
    pred = filled('ffl/pred', 8).requires_grad_()
    options = {key: case[key] for key in ('alpha', 'ave_spectrum', 'log_matrix', 'batch_matrix')}
    loss, gradient = value_and_gradient(focal_frequency_loss(pred - filled('ffl/target', 8), **options), pred)
    if 'error' in case:
        assert not case['batch_matrix']
        assert 0 < loss < 10
    else:
        assert loss == pytest.approx(case['loss'], rel=1e-6)
        assert gradient == pytest.approx(case['grad_l2'], rel=1e-5)
        assert pred.grad.flatten()[:4].tolist() == pytest.approx(case['grad_first4'], abs=1e-8)


def test_equal_images_have_no_frequency_loss():
    assert focal_frequency_loss(torch.zeros(2, 3, 8, 8)).item() == STANDALONE['focal_frequency_identical_inputs']


MODES = {'balanced_l1_loss': 'balanced_l1', 'focal_mse_loss': 'focal_mse', 'mse_loss': 'mse', 'huber_loss': 'huber'}
MODES |= LOSS_NAMES | {'charbonnier_loss': 'charbonnier'}


@pytest.mark.parametrize('case', STANDALONE['regression_loss'], ids=lambda case: case['mode'])
def test_pixel_losses(case):
    if 'error' in case:
        with pytest.raises(ValueError, match="loss 'smooth_l1' is not one of l1, mse"):
            models_a2mim.a2mim_vit_tiny(img_size=32, loss='smooth_l1')
        return
    pred = filled('ffl/pred', 8).requires_grad_()
    options = dict(alpha=0.2, gamma=1.0, activate='sigmoid', residual=False) | case['kwargs']
    loss = pixel_loss((pred - filled('ffl/target', 8)).abs(), MODES[case['mode']], **options)
    value, gradient = value_and_gradient(loss.mean(), pred)
    assert value == pytest.approx(case['mean'], rel=1e-6)
    assert gradient == pytest.approx(case['grad_l2'], rel=1e-5)


def test_head_options(measured):
    """102 combinations of pixel loss, Fourier form, what stands for visible pixels, and weights."""
    imgs = filled('head/target', 64)
    model = models_a2mim.a2mim_vit_tiny(img_size=64, mask_patch_size=16)
    plan = model.plan_from_noise(torch.from_numpy(fill.uniform('a2mim', (2, 16))))
    assert plan.mask.view(2, 4, 4).tolist() == STANDALONE['a2mim_head']['mask']
    differences = []
    for case in STANDALONE['a2mim_head']['cases']:
        model.loss['mode'] = case['loss']
        for key in case:
            if key.startswith('fft_') or key == 'unmask_weight':
                assert hasattr(model, key)
                setattr(model, key, case[key])
        pred = filled('head/pred', 64).requires_grad_()
        loss, _ = model.forward_loss(imgs, pred, patch_mask_to_pixels(plan.mask, 16))
        value, gradient = value_and_gradient(loss, pred)
        differences += [relative(value, case['total']), relative(gradient, case['grad_l2'])]
    assert len(differences) == 204
    measured(f'a2mim/standalone head options: losses and gradient norms {max(differences):.1e}')
    assert max(differences) < 1e-6


def test_simmim_head():
    model = models_a2mim.simmim_vit_small(img_size=64, mask_patch_size=16, depth=1)
    plan = model.plan_from_noise(torch.from_numpy(fill.uniform('a2mim', (2, 16))))
    pred = filled('head/pred', 64).requires_grad_()
    loss, _ = model.forward_loss(filled('head/target', 64), pred, patch_mask_to_pixels(plan.mask, 16))
    value, gradient = value_and_gradient(loss, pred)
    assert value == pytest.approx(STANDALONE['simmim_head']['total'], rel=1e-6)
    assert gradient == pytest.approx(STANDALONE['simmim_head']['grad_l2'], rel=1e-6)


@pytest.mark.parametrize('geometry', STANDALONE['masks'])
def test_masks(geometry):
    """Masks and mean colours at five sizes; the mask at every stride is the cells' mask, enlarged."""
    data, (size, stride) = STANDALONE['masks'][geometry], map(int, geometry.split('/'))
    model = models_a2mim.a2mim_resnet50(img_size=size, layers=(1, 1, 1, 1), fft_weight=0)
    assert model.noise_shape(2) == (2, data['token_count'])
    plan = model.plan_from_noise(torch.from_numpy(fill.uniform('a2mim', model.noise_shape(2))))
    assert model.num_hidden == data['mask_count']
    cells = plan.mask.view(2, model.cells, model.cells)
    assert cells[0].tolist() == data['cell_grid_sample0']
    assert cells[1].tolist() == data['cell_grid_sample1']
    mask = patch_mask_to_pixels(plan.mask, size // stride // model.cells).squeeze(1).numpy().astype(np.uint8)
    assert list(mask.shape) == data['shape']
    assert hashlib.sha256(mask.tobytes()).hexdigest() == data['sha256']
    imgs = torch.from_numpy(fill.images(2, size))
    masked = model.fill(imgs, patch_mask_to_pixels(plan.mask, 32))
    assert masked.mean().item() == pytest.approx(data['masked_input_mean'], abs=1e-6)
    assert masked.std().item() == pytest.approx(data['masked_input_std'], abs=1e-6)
    assert imgs[0].mean(dim=(1, 2)).tolist() == pytest.approx(data['fill_value_sample0'], abs=1e-6)
