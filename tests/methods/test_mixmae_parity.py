"""MixMAE against the numbers of the published code: features, predictions, gradients, classifier, groups, sizes."""

import hashlib

import fill
import numpy as np
import pytest
import torch
from golden import filled_state, golden, relative, summary_difference
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import models_mixmae
from util import optim
from util.nn import patches
from util.weights import load_published

PRETRAINING = ['tiny_a', 'tiny_b', 'tiny_b_normpix']
CLASSIFIERS = ['tiny_a_ft', 'tiny_b_ft', 'tiny_b_ft_interp']
SIZES = golden('mixmae/optim_and_sizes.json')


def shapes(data: dict) -> list:
    return [(name, shape) for name, shape, _ in data['param_names_shapes_requires_grad']]


def state_of(data: dict) -> dict[str, Tensor]:
    """The reference's state dict, its index buffers included, but for the fixed position embeddings."""
    index = {name: torch.zeros(shape, dtype=torch.int64) for name, shape, _ in data['buffers']}
    return filled_state(shapes(data), data['not_filled']) | index


def difference(ours: Tensor, summary: dict) -> float:
    """The largest of: the first and last eight values, mean and std, l2 norm, and a checksum that sees the order."""
    x = ours.detach().double().numpy()
    probe = (x * (fill.uniform('probe', x.shape).astype('float64') - 0.5)).sum()
    return max(
        summary_difference(ours, summary),
        np.abs(x.reshape(-1)[-8:] - summary['last8']).max(),
        abs(probe - summary['probe']) / summary['l2'],  # the sum of signed terms may vanish; its scale is the norm
    )


def recorded(model: nn.Module, names: list[str]) -> dict[str, Tensor]:
    """What these modules return from now on, as [N, L, D]."""
    outputs = {}
    for name in names:

        def keep(module, args, output, name=name):
            outputs[name] = output.reshape(len(output), -1, output.shape[-1])

        model.get_submodule(name).register_forward_hook(keep)
    return outputs


def reference_model(data: dict) -> models_mixmae.MixMAE:
    options = dict(mask_ratio=data['mask_ratio'], range_mask_ratio=data['resolved']['range_mask_ratio'])
    model = models_mixmae.MixMAE(**data['args'] | options)
    report = load_published(model, state_of(data))
    assert report.missing == ['absolute_pos_embed', 'decoder_pos_embed']
    return model


def run(model: models_mixmae.MixMAE, data: dict) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Loss, mask, and the other tensors that the reference recorded."""
    imgs = torch.from_numpy(fill.images(data['batch'], data['size']))
    mask = model.plan_from_noise(torch.from_numpy(fill.uniform('mixmae', model.noise_shape(data['batch'])))).mask
    modules = {f'layers.{s}': f'layers.{s}.downsample' for s in range(4)} | {
        'norm': 'norm',
        'decoder_embed': 'decoder_embed',
    }
    features = recorded(model, list(modules.values()))
    loss, _ = model(imgs, models_mixmae.MixPlan(mask))

    # every cell as both passes predict it, those that enter no loss included
    halves = model.forward_decoder(model.forward_features(model.mix(imgs, mask), mask), mask)
    preds = [model.forward_pred(half) for half in halves]
    return (
        loss,
        mask,
        {key: features[name] for key, name in modules.items()}
        | {
            'patch_embed': model.patch_embed(imgs).flatten(1, 2),
            'decoder_norm': model.decoder_norm(torch.cat(halves)),
            'absolute_pos_embed': model.absolute_pos_embed,
            'decoder_pos_embed': model.decoder_pos_embed,
            'pred': torch.cat(preds),
            'target': model.target(imgs),
            'unmixed_pred': model.assemble(*preds, mask),
        },
    )


def differences(model: models_mixmae.MixMAE, data: dict) -> dict[str, float]:
    """How far the model is from the reference, by kind."""
    loss, mask, ours = run(model, data)
    loss.backward()
    norms = {name: param.grad.double().norm() for name, param in model.named_parameters()}
    total = torch.stack(list(norms.values())).norm()
    errors = (ours['unmixed_pred'] - ours['target']).square().mean(dim=-1)
    per_image = zip(errors.mean(dim=1), data['loss_per_image'], strict=True)
    per_cell = zip(errors[0], data['loss_per_token_first_image'], strict=True)
    theirs = data['encoder'] | data['pos_embed'] | {key: data[key] for key in ('pred', 'target', 'unmixed_pred')}
    assert ours.keys() == theirs.keys()
    gradients = [(total, data['grad_total_l2']), *((norms[key], norm) for key, norm in data['grad_l2'].items())]
    return {
        'mask': float(hashlib.sha256(mask.numpy().tobytes()).hexdigest() != data['mask']['sha256_float32']),
        'loss': relative(loss, data['loss']),
        'losses of images and cells': max(relative(a, b) for a, b in (*per_image, *per_cell)),
        'features and predictions': max(difference(ours[key], theirs[key]) for key in theirs),
        'gradient norms': max(relative(a, b) for a, b in gradients),
    }


LIMITS = {
    'mask': 0,
    'loss': 5e-7,
    'losses of images and cells': 2e-6,
    'features and predictions': 2e-6,
    'gradient norms': 1e-5,
}


def exceeded(found: dict[str, float]) -> list[str]:
    return [what for what, limit in LIMITS.items() if not found[what] <= limit]


@pytest.mark.parametrize('name', PRETRAINING)
def test_pretraining(name, measured):
    data = golden(f'mixmae/{name}.json')
    model = reference_model(data)
    found = differences(model, data)
    measured(f'mixmae/{name}: ' + ', '.join(f'{what} {value:.1e}' for what, value in found.items()))
    assert not exceeded(found)
    assert total(model) == data['num_params']


def test_drawn_ratio_and_odd_batch(measured):
    """The reference's loss of three images (the middle one is its own partner), the ratio drawn as 0.4 + 0.5 * 0.3."""
    data = golden('mixmae/tiny_b_normpix.json')
    model = models_mixmae.MixMAE(**data['args'], mask_ratio=0.4, range_mask_ratio=0.3)
    load_published(model, state_of(data))
    noise = torch.cat([torch.from_numpy(fill.uniform('mixmae', (1, 9))), torch.tensor([[0.5]])], dim=1)
    plan = model.plan_from_noise(noise)
    assert plan.mask.sum() == 4  # of 9: 0.55 * 9 = 4.95
    loss, _ = model(torch.from_numpy(fill.images(3, 96)), plan)
    measured(f'mixmae/tiny_c_range_oddbatch: loss {relative(loss, 1.3137146235):.1e}')
    assert relative(loss, 1.3137146235) <= 5e-7


# --------------------------------------------------------------------------
# mistakes: each changes loss and predictions as it changes the reference's, and no test above would miss it


def without_mask(model, patch):
    patch.setattr(models_mixmae, 'separating_mask', lambda *sizes: None)


def transposed_bias(model, patch):
    bias = models_mixmae.WindowAttention.relative_position_bias
    patch.setattr(models_mixmae.WindowAttention, 'relative_position_bias', lambda attn: bias(attn).transpose(1, 2))


def without_bias(model, patch):
    bias = models_mixmae.WindowAttention.relative_position_bias
    patch.setattr(models_mixmae.WindowAttention, 'relative_position_bias', lambda attn: 0 * bias(attn))


def smaller_eps(model, patch):
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-6


def row_major_merging(model, patch):
    def forward(merging, x):
        n, h, w, _ = x.shape
        x = x.reshape(n, h // 2, 2, w // 2, 2, -1).permute(0, 1, 3, 2, 4, 5).flatten(3)
        return merging.reduction(merging.norm(x))

    patch.setattr(models_mixmae.PatchMerging, 'forward', forward)


def without_encoder_positions(model, patch):
    model.absolute_pos_embed.zero_()


def without_decoder_positions(model, patch):
    model.decoder_pos_embed.zero_()


def transposed_positions(model, patch):
    model.absolute_pos_embed.copy_(torch.cat(model.absolute_pos_embed.chunk(2, dim=-1)[::-1], dim=-1))


def biased_variance(model, patch):
    def stats(patches):
        var, mean = torch.var_mean(patches, dim=-1, keepdim=True, correction=0)
        return mean, (var + 1e-6).sqrt()

    patch.setattr(patches, 'patch_stats', stats)


def without_flip_back(model, patch):
    assemble = model.assemble
    patch.setattr(model, 'assemble', lambda own, partner, mask: assemble(own, partner.flip(0), mask))


def scored_where_visible(model, patch):
    assemble = model.assemble
    patch.setattr(model, 'assemble', lambda own, partner, mask: assemble(own, partner, 1 - mask))


def channel_major_target(model, patch):
    patchify = models_mixmae.patchify
    patch.setattr(models_mixmae, 'patchify', lambda x, p: patchify(x, p).unflatten(-1, (p * p, 3)).mT.flatten(-2))


def inverted_mask(model, patch):
    plan = model.plan_from_noise
    patch.setattr(model, 'plan_from_noise', lambda noise: models_mixmae.MixPlan(1 - plan(noise).mask))


def rolled_partner(model, patch):
    cell_mask = models_mixmae.patch_mask_to_pixels

    def mix(imgs, mask):
        return torch.where(cell_mask(mask, 32).bool(), imgs.roll(1, 0), imgs)

    patch.setattr(model, 'mix', mix)
    assemble = model.assemble
    patch.setattr(model, 'assemble', lambda own, partner, mask: assemble(own, partner.roll(-1, 0).flip(0), mask))


MISTAKES = {
    'attention not masked': without_mask,
    'relative_position_index transposed': transposed_bias,
    'relative position bias dropped': without_bias,
    'LayerNorm eps 1e-6': smaller_eps,
    'patch merging in row-major order': row_major_merging,
    'encoder pos embed dropped': without_encoder_positions,
    'decoder pos embed dropped': without_decoder_positions,
    'encoder pos embed transposed (h first)': transposed_positions,
    'target var biased': biased_variance,
    'second half not flipped back': without_flip_back,
    'visible instead of masked positions': scored_where_visible,
    'target channel-major (c,p,q)': channel_major_target,
    'mask inverted (largest noise replaced)': inverted_mask,
    'partner = roll by one instead of flip': rolled_partner,
}


def test_all_mistakes_are_tried():
    assert MISTAKES.keys() | {'reference'} == golden('mixmae/mutations.json')['tiny'].keys()


@pytest.mark.parametrize('mistake', MISTAKES)
def test_mistakes_are_noticed(mistake, monkeypatch, measured):
    data, theirs = golden('mixmae/tiny_b_normpix.json'), golden('mixmae/mutations.json')['tiny'][mistake]
    model = reference_model(data)
    right, _, before = run(model, data)
    MISTAKES[mistake](model, monkeypatch)
    wrong, _, after = run(model, data)
    assert ((wrong - right) / right).item() == pytest.approx(theirs['rel_loss'], rel=1e-2, abs=3e-7)
    change = (after['pred'] - before['pred']).norm() / before['pred'].norm()
    assert change.item() == pytest.approx(theirs['rel_l2_pred'] or 0, rel=1e-2)
    found = differences(model, data)
    measured(f'mixmae, {mistake}: noticed in ' + ', '.join(f'{what} {found[what]:.1e}' for what in exceeded(found)))
    assert exceeded(found)


# --------------------------------------------------------------------------
# classifier


def classifier(data: dict) -> models_mixmae.MixMIMClassifier:
    return models_mixmae.MixMIMClassifier(**data['args']).eval()


def classifier_differences(model: nn.Module, data: dict) -> float:
    imgs = torch.from_numpy(fill.images(data['batch'], data['size']))
    logits, pooled = model(imgs), model.forward_features(imgs).mean(dim=1)
    assert logits.argmax(dim=1).tolist() == data['logits']['argmax']
    return max(difference(logits, data['logits']), difference(pooled, data['pooled']))


@pytest.mark.parametrize('name', ['tiny_a_ft', 'tiny_b_ft'])
def test_classifier(name, measured):
    data = golden(f'mixmae/{name}.json')
    model = classifier(data)
    assert load_published(model, state_of(data)).missing == ['absolute_pos_embed']
    found = classifier_differences(model, data)
    measured(f'mixmae/{name}: features and logits {found:.1e}')
    assert found <= 2e-6
    assert sum(p.numel() for p in model.parameters()) == data['num_params']['trainable']
    assert sum(t.numel() for t in model.state_dict().values()) == data['num_params']['total']
    rates = [getattr(block.drop_path, 'drop_prob', 0) for stage in model.layers for block in stage.blocks]
    assert rates == pytest.approx(data['resolved']['drop_path'])


def test_classifier_of_another_size(measured):
    """Pretraining weights of 96 pixels in a classifier of 192, with other windows: tables are resized as published."""
    data, source = golden('mixmae/tiny_b_ft_interp.json'), golden('mixmae/tiny_b.json')
    pretrained = reference_model(source).state_dict() | state_of(source)
    model = classifier(data)
    load_published(model, filled_state(shapes(data)))  # the head's values, which stay
    report = load_published(model, {'model': pretrained})
    assert report.missing == ['head.weight', 'head.bias']
    assert {line.split()[0] for line in report.resized} == data['interpolated'].keys()
    state = model.state_dict()
    tables = max(difference(state[key], summary) for key, summary in data['interpolated'].items())
    found = classifier_differences(model, data)
    measured(f'mixmae/tiny_b_ft_interp: resized tables {tables:.1e}, features and logits {found:.1e}')
    assert max(tables, found) <= 2e-6
    assert set(data['unexpected']) <= set(report.ignored)
    assert sum(p.numel() for p in model.parameters()) == data['num_params']['trainable']


# --------------------------------------------------------------------------
# sizes, groups, learning rates


def macs(call) -> int:
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        call()
    return counter.get_total_flops() // 2


def total(model: nn.Module) -> dict[str, int]:
    """Trainable parameters, and all that is saved; the reference counts fixed position embeddings in."""
    return dict(
        trainable=sum(p.numel() for p in model.parameters()), total=sum(t.numel() for t in model.state_dict().values())
    )


@pytest.mark.parametrize('size', ['base', 'large', 'huge'])
def test_published_pretraining_sizes(size, measured):
    """Ours predicts each cell in one of the two passes, not in both: half the products of the last projection."""
    published = SIZES['params_and_macs'][f'mixmim_{size}_pretrain']
    with torch.device('meta'):
        model = getattr(models_mixmae, f'mixmae_{size}')().to('meta')
        imgs, mask = torch.empty(2, 3, 224, 224), torch.empty(1, 49)
        encoder = macs(lambda: model.forward_features(imgs, mask)) / 2
        both = macs(lambda: model.forward_pred(model.forward_decoder(model.forward_features(imgs, mask), mask)[0])) / 2
    assert total(model) == {key: published[key] for key in ('trainable', 'total')}
    assert encoder == published['macs_encoder']
    assert both == published['macs_per_image'] - 49 * 512 * 3072
    modules: dict[str, int] = {}
    for name, tensor in model.state_dict().items():
        first = name.split('.')[0]
        modules[first] = modules.get(first, 0) + tensor.numel()
    assert modules == published['params_by_top_module']
    measured(f'mixmae_{size}: {both / 1e9:.2f} GMAC an image, published {published["macs_per_image"] / 1e9:.2f}')


@pytest.mark.parametrize(
    ('size', 'img_size'), [('base', 224), ('base', 384), ('large', 224), ('large', 384), ('huge', 224)]
)
def test_published_classifier_sizes(size, img_size):
    published = SIZES['params_and_macs'][f'mixmim_{size}{"_384" * (img_size == 384)}_ft']
    with torch.device('meta'):
        model = models_mixmae.create_classifier(f'mixmae_{size}', img_size=img_size).to('meta')
        found = macs(lambda: model(torch.empty(1, 3, img_size, img_size)))
    assert total(model) | {'macs': found} == published


def test_groups_of_fine_tuning():
    with torch.device('meta'):
        model = models_mixmae.create_classifier('mixmae_base').to('meta')
    rules = models_mixmae.param_rules(model)
    frozen = {'absolute_pos_embed': 0}
    assert {name: layer_id for name, (layer_id, _, _) in rules.items()} | frozen == SIZES['finetune_base_layer_ids']
    groups = optim.param_groups(model, rules, 0.05, 0.7)
    ours = {name: (group['lr_scale'], group['weight_decay']) for group in groups for name in group['names']}
    theirs = {
        name: (pytest.approx(group['lr_scale'], rel=1e-12), group['weight_decay'])
        for group in SIZES['finetune_base_layer_decay_0.7']
        for name in group['params']
    }
    assert ours == theirs

    # with its own layer the head learns at the full rate, and all else as before
    own = optim.param_groups(model, models_mixmae.param_rules(model, head_layer='own'), 0.05, 0.7)
    scales = {name: (group['lr_scale'], group['weight_decay']) for group in own for name in group['names']}
    assert scales == theirs | {'head.weight': (1, 0.05), 'head.bias': (1, 0)}


def test_groups_of_pretraining():
    published = SIZES['pretrain_base_groups']
    with torch.device('meta'):
        model = models_mixmae.mixmae_base().to('meta')
    decayed, others = optim.param_groups(model, models_mixmae.param_rules(model), 0.05)
    assert (decayed['weight_decay'], others['weight_decay']) == (0.05, 0)
    assert decayed['lr_scale'] == others['lr_scale'] == 1
    assert (len(decayed['names']), len(others['names'])) == (published['decay'], published['no_decay'])
    sizes = [sum(p.numel() for p in group['params']) for group in (decayed, others)]
    assert sizes == [published['decay_numel'], published['no_decay_numel']]
    assert set(published['decay_3d_or_tables']) <= set(decayed['names'])
    assert set(published['no_decay_first']) <= set(others['names'])


def test_drop_path_rates():
    with torch.device('meta'):
        model = models_mixmae.create_classifier('mixmae_base', drop_path_rate=0.1)
    rates = [getattr(block.drop_path, 'drop_prob', 0.0) for stage in model.layers for block in stage.blocks]
    assert rates == pytest.approx(SIZES['finetune_base_dpr_0.1'], rel=1e-6)
