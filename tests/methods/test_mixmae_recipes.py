"""MixMAE's recipes: the published values, written down a second time, and the published learning rates."""

import pytest
import torch
from golden import golden
from recipes import learning_rates, published, resolve, resolved_values, stage_of

import main_finetune
import main_pretrain
from util.recipes import RECIPES, load_recipe

PRETRAIN = dict(
    effective_batch_size=2048,
    batch_size=128,
    lr=1.2e-3,
    warmup_epochs=40,
    min_lr=0,
    weight_decay=0.05,
    betas=[0.9, 0.95],
    clip_grad=None,
    mask_ratio=0.5,
    norm_pix_loss=True,
    crop_scale=[0.2, 1],
    hflip=0.5,
    input_size=224,
    model_kwargs={},
    lr_sched='cosine',
    sched_per_epoch=False,
    seed=0,
    amp_dtype=None,
)
FINETUNE = dict(
    effective_batch_size=1024,
    batch_size=128,
    lr=2e-3,
    epochs=100,
    warmup_epochs=5,
    min_lr=1e-6,
    layer_decay=0.7,
    drop_path=0.1,
    weight_decay=0.05,
    betas=[0.9, 0.999],
    clip_grad=None,
    use_ema=False,
    crop_scale=[0.08, 1],
    crop_pct=0.875,
    hflip=0.5,
    input_size=224,
    model_kwargs={},
    aa='rand-m9-mstd0.5-inc1',
    reprob=0.25,
    remode='pixel',
    recount=1,
    smoothing=0.1,
    mixup=0.8,
    cutmix=1,
    cutmix_minmax=None,
    mixup_prob=1,
    mixup_switch_prob=0.5,
    mixup_mode='batch',
    lr_sched='cosine',
    sched_per_epoch=False,
    seed=0,
    amp_dtype=None,
)
TABLE = {
    'mixmae_base_pretrain_600ep': PRETRAIN | dict(epochs=600, accuracy='85.1 (86.3 at 384 pixels)'),
    'mixmae_base_pretrain_300ep': PRETRAIN | dict(epochs=300, accuracy='84.63 (by mmpretrain)'),
    'mixmae_large_pretrain_600ep': PRETRAIN | dict(epochs=600, accuracy='85.9 (86.9 at 384 pixels)'),
    'mixmae_base_finetune': FINETUNE
    | dict(accuracy='85.1 / 84.63 (pretrained 600 / 300 epochs, the latter by mmpretrain)'),
    'mixmae_base_finetune_384': FINETUNE
    | dict(input_size=384, crop_pct=1, batch_size=64, accuracy='86.3 (pretrained 600 epochs)'),
    'mixmae_large_finetune': FINETUNE | dict(accuracy='85.9 (pretrained 600 epochs)'),
}
ASSUMED = {'mixmae_large_pretrain_600ep', 'mixmae_base_finetune_384', 'mixmae_large_finetune'}


def test_all_recipes_are_in_the_table():
    assert published('mixmae_') == set(TABLE)


@pytest.mark.parametrize('name', TABLE)
def test_resolved_values(name):
    path = RECIPES / f'{name}.yaml'
    about, _ = load_recipe(path)
    got, expected = resolved_values(name), TABLE[name]
    assert {key: got[key] for key in expected} == expected | {'lr': pytest.approx(expected['lr'], rel=1e-12)}
    assert ('assumed' in about['source'], '# Assumed' in path.read_text()) == (name in ASSUMED,) * 2


@pytest.mark.parametrize('name', TABLE)
def test_models(name):
    """Each recipe's model can be made, with its published windows and size."""
    args = resolve(name)
    make = {'pretrain': main_pretrain.create_model, 'finetune': lambda args: main_finetune.create_classifier(args, 10)}
    with torch.device('meta'):
        model = make[stage_of(name)](args)
    windows = [stage.window_size for stage in model.layers]
    assert windows == ([16, 16, 24, 12] if args.input_size == 384 else [14, 14, 14, 7])
    assert model.num_features == (1024 if 'base' in name else 1536)


@pytest.mark.parametrize(
    ('name', 'curve'),
    [('mixmae_base_pretrain_600ep', 'pretrain_lr_base'), ('mixmae_base_finetune', 'finetune_lr_base')],
)
def test_learning_rates(name, curve):
    at = learning_rates(resolve(name))
    for epoch, expected in golden('mixmae/optim_and_sizes.json')[curve].items():
        assert at(float(epoch))[1.0] == pytest.approx(expected, rel=1e-12, abs=0), epoch
