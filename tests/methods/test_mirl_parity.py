"""MIRL against the numbers of the published code: losses, features, predictions, gradients, classifier."""

import fill
import pytest
import torch
import torch.nn.functional as F
from golden import filled_state, golden, relative, summary_difference

import models_mirl
from util.nn.patches import gather_tokens, patch_stats, patchify
from util.weights import load_published
from util.weights.published import INTO_MIRL

PUBLISHED = INTO_MIRL[1]
PRETRAINING = ['tiny_a_wn', 'tiny_a_wn_gfilled', 'tiny_b_nown', 'tiny_seg2_derived', 'tiny_seg4_derived']


def reference_model(data: dict) -> models_mirl.MIRL:
    config = data['config']
    model = models_mirl.MIRL(
        img_size=config['img_size'],
        patch_size=config['patch_size'],
        embed_dim=config['embed_dim'],
        depth=config['depth'],
        num_heads=config['num_heads'],
        mlp_ratio=config['mlp_ratio'],
        out_indices=tuple(config['out_indices']),
        decoder_dim=config['decoder_embed_dims'][0],
        decoder_depth=config['decoder_depth'],
        decoder_num_heads=config['decoder_num_heads'],
        weight_norm_pred=config['weight_norm_pred'],
        mask_ratio=data['mask_ratio'],
    )
    load_published(model, filled_state(data['params'], data['not_filled']))
    return model


def ours(key: str, model) -> str:
    return PUBLISHED.rename(key).replace('norms.-1', f'norms.{len(model.norms) - 1}')


@pytest.mark.parametrize('name', PRETRAINING)
def test_pretraining(name, measured):
    data = golden(f'mirl/{name}.json')
    model = reference_model(data)
    imgs = torch.from_numpy(fill.images(2, data['config']['img_size']))
    plan = model.plan_from_noise(torch.from_numpy(fill.uniform('mirl', model.noise_shape(2))))
    assert plan.mask.tolist() == data['mask']
    assert plan.ids_keep[0].tolist() == data['ids_keep_row0']
    restore = torch.cat([plan.ids_keep, plan.ids_hidden], dim=1).argsort(dim=1)
    assert restore[0].tolist() == data['ids_restore_row0']

    loss, terms = model(imgs, plan)
    losses = max(map(relative, [loss, *terms.values()], [data['loss'], *data['loss_terms']]))

    low, features = model.forward_encoder(imgs, plan)
    preds = [gather_tokens(p, restore) for p in model.forward_decoders(low, features, plan, model.num_patches)]
    patches = patchify(imgs, model.patch_size)
    mean, std = patch_stats(patches)
    main, residual = models_mirl.pairs(preds)[0]
    picture = data['visualisation_pair0']
    tensors = [
        (low, data['low_feat']),
        *zip(features, [*data['feats'][: len(features) - 1], data['latent']], strict=True),
        *zip(preds, data['preds'], strict=True),
        *zip(map(sum, models_mirl.pairs(preds)), data['pair_sums'], strict=True),
        ((patches - mean) / std, data['target_normalised']),
        ((main + residual) * std + mean, picture['pred']),
        (main * std + mean, picture['main']),
        (residual * std + mean, picture['residual']),
    ]
    values = max(summary_difference(x, summary) for x, summary in tensors)

    loss.backward()
    params = dict(model.named_parameters())
    gradients = max(
        relative(params[ours(key, model)].grad.double().norm(), norm) for key, norm in data['grad_l2'].items()
    )
    measured(f'mirl/{name}: losses {losses:.1e}, features and predictions {values:.1e}, gradient norms {gradients:.1e}')
    assert max(losses, values) < 1e-5
    assert gradients < 1e-4
    assert sum(p.numel() for p in params.values() if p.requires_grad) == data['n_params_trainable']


@pytest.mark.parametrize(('name', 'pool'), [('ft_tiny_avgpool', 'avg'), ('ft_tiny_cls', 'token')])
def test_classifier(name, pool, measured):
    data = golden(f'mirl/{name}.json')
    config = data['config']
    size = {k: config[k] for k in ('patch_size', 'embed_dim', 'depth', 'num_heads', 'mlp_ratio')}
    model = models_mirl.create_classifier(
        'mirl_vit_small', num_classes=10, img_size=config['img_size'], global_pool=pool, **size
    )
    report = load_published(model, filled_state(data['params']))
    assert not report.missing + report.ignored
    model.eval()
    imgs = torch.from_numpy(fill.images(2, 64))
    features = model.forward_head(model.forward_features(imgs), pre_logits=True)
    logits = model(imgs)
    values = max(summary_difference(features, data['pre_head_features']), summary_difference(logits, data['logits']))
    assert logits.argmax(dim=1).tolist() == data['argmax']

    one_hot = F.one_hot(torch.tensor([1, 3]), 10) * 0.9 + 0.1 / 10
    target = 0.3 * one_hot + 0.7 * one_hot.flip(0)
    loss = -(target * logits.log_softmax(dim=1)).sum(dim=1).mean()
    loss.backward()
    params = dict(model.named_parameters())
    gradients = max(relative(params[key].grad.double().norm(), norm) for key, norm in data['grad_l2'].items())
    losses = relative(loss, data['soft_target_loss'])
    measured(f'mirl/{name}: loss {losses:.1e}, features and logits {values:.1e}, gradient norms {gradients:.1e}')
    assert max(losses, values) < 1e-5
    assert gradients < 1e-4
