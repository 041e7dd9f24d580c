"""LocalMIM against the numbers of the published code: losses, latents, predictions, targets, gradients, classifiers."""

import fill
import pytest
import torch
import torch.nn.functional as F
from parity import filled_state, golden, relative, summary_difference

import models_localmim
from util.published import INTO_LOCALMIM_SWIN, INTO_LOCALMIM_VIT, load_published


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
