"""LocalMIM against the numbers of the published code: losses, latents, predictions, targets, gradients, classifiers."""

import hashlib
import re

import fill
import pytest
import torch
import torch.nn.functional as F
from golden import filled_state, golden, relative, summary_difference

import models_localmim
from util.nn.swin import make_windows, window_ids
from util.weights import load_published
from util.weights.published import INTO_LOCALMIM_SWIN, INTO_LOCALMIM_VIT


def target_options(config: dict) -> dict:
    """What both backbones take from the reference's configuration."""
    hog = {'hog_bins': config['hog_nbins'], 'hog_bias': config['hog_bias']} if 'hog_nbins' in config else {}
    return dict(
        target='hog' if config.get('target', 'HOG' if hog else '') == 'HOG' else 'pixel',
        norm_pix_loss=config.get('norm_pix_loss', True),
        img_size=config['img_size'],
        patch_size=config['patch_size'],
        embed_dim=config['embed_dim'],
        num_heads=config['num_heads'],
        mlp_ratio=config['mlp_ratio'],
        decoder_dim=config['decoder_embed_dim'],
        decoder_depth=config['decoder_depth'],
        decoder_num_heads=config['decoder_num_heads'],
        mask_ratio=config['mask_ratio'],
        **hog,
    )


def reference_state(data: dict) -> dict[str, torch.Tensor]:
    return filled_state([entry[:2] for entry in data['state_dict']], [entry[0] for entry in data['not_filled']])


def compare(name: str, data: dict, model, renamed, measured) -> None:
    """One step of a filled model beside everything that its golden file holds."""
    imgs = torch.from_numpy(fill.images(2, data['config']['img_size']))
    plan = model.plan_from_noise(torch.from_numpy(fill.uniform('localmim', model.noise_shape(2))))
    assert plan.mask[0].tolist() == data['mask']['row0']

    loss, terms = model(imgs, plan)
    losses = max(map(relative, [loss, *terms.values()], [data['loss_total'], *data['loss_per_scale']]))

    latents = model.forward_encoder(imgs, plan)
    preds = model.forward_decoders(latents, plan)
    targets = model.forward_targets(imgs)
    weights = [model.loss_weights(plan.mask, pred.shape[1]).expand(2, -1) for pred in preds]
    assert [w.sum().item() for w in weights] == [w['sum'] for w in data['mask_weights_per_scale']]
    values = max(
        summary_difference(x, summary)
        for ours, key in ((latents, 'latents'), (preds, 'preds'), (targets, 'targets'))
        for x, summary in zip(ours, data[key], strict=True)
    )

    loss.backward()
    trainable = {key: param for key, param in model.named_parameters() if param.requires_grad}
    assert {renamed(key) for key in data['grad_l2']} == trainable.keys()
    gradients = max(relative(trainable[renamed(key)].grad.norm(), norm) for key, norm in data['grad_l2'].items())
    measured(
        f'localmim/{name}: losses {losses:.1e}, latents, predictions, targets {values:.1e}, '
        f'gradient norms {gradients:.1e}'
    )
    assert max(losses, values) < 1e-5
    assert gradients < 1e-4
    assert sum(param.numel() for param in trainable.values()) == data['n_params_trainable']


@pytest.mark.parametrize('name', ['tiny_vit_hog', 'tiny_vit_hog_bias18', 'tiny_vit_pixel'])
def test_vit(name, measured):
    data = golden(f'localmim/{name}.json')
    model = models_localmim.LocalMIMViT(depth=data['config']['depth'], **target_options(data['config']))
    load_published(model, reference_state(data))
    compare(name, data, model, INTO_LOCALMIM_VIT[1].rename, measured)


SWIN = ['tiny_swin_hog', 'tiny_swin_pixel', 'tiny_swin_hog_FIXEDCOORDS', 'tiny_swin_hog_FIXEDCOORDS_FIXEDMERGE']


def reference_swin(data: dict, coords: str) -> models_localmim.LocalMIMSwin:
    config = data['config']
    return models_localmim.LocalMIMSwin(
        depths=config['depths'], window_size=config['window_size'], coords=coords, **target_options(config)
    )


@pytest.mark.parametrize('name', SWIN)
def test_swin(name, measured):
    """Of the variants, one was filled in the corrected order, one has to be put into it as published files are."""
    data = golden(f'localmim/{name}.json')
    model = reference_swin(data, 'correct' if 'FIXED' in name else 'published')
    state, rename = reference_state(data), INTO_LOCALMIM_SWIN[1].rename
    if 'FIXEDMERGE' in name:
        model.load_state_dict({renamed: value for key, value in state.items() if (renamed := rename(key))})
    else:
        load_published(model, state)
    compare(name, data, model, rename, measured)


@pytest.mark.parametrize('name', SWIN)
def test_windows(name):
    """Coordinates, windows and relative positions of every stage, plain and shifted."""
    data = golden(f'localmim/{name}.json')
    model = reference_swin(data, 'correct' if 'FIXED' in name else 'published')
    plan = model.plan_from_noise(torch.from_numpy(fill.uniform('localmim', (2, 49))))
    found = []
    for coords, (side, window, shift) in zip(plan.coords.split([768, 192, 48, 12]), model.grids, strict=True):
        for s in (0, shift) if window < side else (0,):
            windows = make_windows(coords, None, 1, len(coords), window, s)
            counts = window_ids(coords, window, s).unique(dim=0, return_counts=True)[1]
            sums = windows.bias_index.sum().item(), (windows.mask == 0).sum().item()
            found.append((hashlib.sha256(coords.numpy().tobytes()).hexdigest(), sums[0], window, s))
            assert (counts**2).sum() == sums[1]
            if (theirs := data['grouping'][len(found) - 1])['mode'] == 'grouping':
                assert counts.tolist() == theirs['window_counts']
            assert sums[1] == theirs['attn_mask']['n_zero']
    keys = ('coords_sha256_int64', 'window_size', 'shift_size')
    wanted = [[g[key] for key in keys] for g in data['grouping']]
    assert [[sha, window, s] for sha, _, window, s in found] == wanted
    sums = [g['rel_pos_idx']['sum_where_attendable'] for g in data['grouping']]
    assert [total for _, total, _, _ in found] == sums


# what the published code gives for models whose files are not here: the loss of each scale
TINY_SWIN = dict(embed_dim=24, depths=(2, 2, 2, 2), num_heads=(2, 2, 4, 4), decoder_dim=32)
LOSSES = {
    'vit_base_hog': ('localmim_vit_base', {}, (0.1246471, 0.1598453, 0.4220069, 0.3049193)),
    'swin_base_hog': ('localmim_swin_base', {}, (0.3663964, 0.3457933, 0.3953286, 0.3723552)),
    'tiny_swin_pixel_nonorm': (
        'LocalMIMSwin',
        dict(TINY_SWIN, target='pixel', norm_pix_loss=False),
        (1.2765877, 1.4510148, 1.4255967, 1.4367654),
    ),
    'tiny_swin_win14_hog_bias18': (
        'LocalMIMSwin',
        dict(TINY_SWIN, window_size=14),
        (0.1948502, 0.3574173, 0.3720941, 0.4730059),
    ),
}


def published_names(model) -> dict[str, torch.Tensor]:
    """A model's weights and the published files' computed buffers, under the published names."""
    state, prefix = {}, '' if 'cls_token' in model.state_dict() else 'encoder.'
    for key, value in model.state_dict().items():
        first, _, rest = key.partition('.')
        if first == 'decoders':
            state[f'decoder.{rest}'] = value
        elif first == 'norms':
            state[f'{prefix}norm.{rest}'] = value
        elif first == 'hog_bias':
            state[f'hog_enc.{rest}.conv.bias'] = value
            state[f'hog_enc.{rest}.conv.weight'] = torch.zeros(2, 1, 3, 3)
        else:
            state[prefix + key] = value
            if key.endswith('relative_position_bias_table'):
                name = key.replace('bias_table', 'index')
                state[prefix + name] = torch.zeros(16, 16, dtype=torch.int64)
    return state | {f'decoder.{k}.pos_embed': decoder.pos_embed for k, decoder in enumerate(model.decoders)}


@pytest.mark.parametrize('name', LOSSES)
def test_losses(name, measured):
    make, options, wanted = LOSSES[name]
    model = getattr(models_localmim, make)(**options)
    computed = r'.*(pos_embed|position_index|conv\.weight)'
    shapes = [[key, value.shape] for key, value in published_names(model).items() if not re.fullmatch(computed, key)]
    load_published(model, filled_state(shapes))
    plan = model.plan_from_noise(torch.from_numpy(fill.uniform('localmim', model.noise_shape(2))))
    with torch.no_grad():
        loss, terms = model(torch.from_numpy(fill.images(2, 224)), plan)
    losses = max(map(relative, [loss, *terms.values()], [sum(wanted), *wanted]))
    measured(f'localmim/{name}: losses {losses:.1e}')
    assert losses < 1e-5


@pytest.mark.parametrize('name', ['ft_tiny_vit', 'ft_tiny_swin'])
def test_classifier(name, measured):
    data = golden(f'localmim/{name}.json')
    config = data['config']
    keys = ['img_size', 'patch_size', 'embed_dim', 'num_heads', 'mlp_ratio', 'num_classes']
    keys += ['depths', 'window_size'] if 'depths' in config else ['depth']
    model = models_localmim.create_classifier(
        'localmim_swin_base' if 'depths' in config else 'localmim_vit_base', **{key: config[key] for key in keys}
    )
    report = load_published(model, reference_state(data))
    assert not report.missing + report.ignored
    model.eval()
    imgs = torch.from_numpy(fill.images(2, config['img_size']))
    features = model.forward_head(model.forward_features(imgs), pre_logits=True)
    logits = model(imgs)
    values = max(summary_difference(features, data['features']), summary_difference(logits, data['logits']))
    assert logits.argmax(dim=1).tolist() == data['argmax']

    loss = F.cross_entropy(logits, torch.tensor([1, 3]))
    loss.backward()
    params = dict(model.named_parameters())
    gradients = max(relative(params[key].grad.norm(), norm) for key, norm in data['grad_l2'].items())
    losses = relative(loss, data['loss_ce'])
    measured(f'localmim/{name}: loss {losses:.1e}, features and logits {values:.1e}, gradient norms {gradients:.1e}')
    assert max(losses, values) < 1e-5
    assert gradients < 1e-4
    assert sum(param.numel() for param in params.values()) == data['n_params_trainable']
