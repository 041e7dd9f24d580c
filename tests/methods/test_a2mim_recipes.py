"""Recipes of A2MIM and SimMIM: the published values, learning rates and groups, resolved as a run resolves them."""

import pytest
import torch
from golden import golden
from recipes import launch_on, network, published, resolve, resolved_values, stage_of
from timm.layers import DropPath
from training import MAINS

import main_pretrain
from util import build, config, optim
from util.data import augment
from util.recipes import RECIPES, load_recipe
from util.weights.published import FAMILIES, into_a2mim, into_classifier

# What the published configurations say, written down a second time: a recipe that is edited must disagree with this.
PRETRAIN = dict(
    effective_batch_size=2048,
    batch_size=256,
    opt='adamw',
    opt_eps=None,
    betas=[0.9, 0.999],
    weight_decay=0.05,
    warmup_epochs=10,
    warmup_shape='scaled',
    warmup_lr_ratio=0,
    lr_sched='cosine',
    cosine_start='warmup',
    sched_per_epoch=False,
    min_lr=1e-5,
    min_lr_absolute=True,
    clip_grad=None,
    rule_kwargs={},
    model_kwargs={},
    mask_ratio=0.6,
    norm_pix_loss=None,
    input_size=224,
    interpolation='bilinear',
    hflip=0.5,
    seed=0,
)
STEP = dict(
    batch_size=128,
    lr=4e-4,
    epochs=800,
    lr_sched='step',
    lr_decay_epochs=[700],
    lr_decay_rate=0.1,
    warmup_lr_ratio=2e-6,
    min_lr=0,
    min_lr_absolute=False,
    clip_grad=5,
    crop_scale=[0.67, 1],
)
A2MIM_VIT = PRETRAIN | STEP | dict(amp_dtype='none')
A2MIM_RESNET = PRETRAIN | dict(lr=1.2e-3, epochs=300, crop_scale=[0.8, 1], amp_dtype='none')
A2MIM_CONVNEXT = A2MIM_RESNET | dict(amp_dtype=None)
SIMMIM_VIT = PRETRAIN | STEP | dict(amp_dtype=None)
SIMMIM_CNN = PRETRAIN | dict(lr=8e-4, epochs=300, crop_scale=[0.67, 1], amp_dtype=None)
SIMMIM_SWIN = SIMMIM_CNN | dict(lr=8e-4, min_lr=4e-5, clip_grad=5, input_size=192, amp_dtype='none')

FINETUNE = dict(
    eval_size=None,
    opt_eps=None,
    betas=[0.9, 0.999],
    warmup_shape='scaled',
    lr_sched='cosine',
    min_lr=1e-6,
    min_lr_absolute=True,
    rule_kwargs={},
    model_kwargs={},
    input_size=224,
    crop_scale=[0.08, 1],
    hflip=0.5,
    color_jitter=None,
    cutmix=1,
    cutmix_minmax=None,
    mixup_prob=1,
    mixup_switch_prob=0.5,
    mixup_mode='batch',
    global_pool=True,
    ema_warmup_ratio=0.9,
    amp_dtype=None,
    seed=0,
)
BEIT = FINETUNE | dict(
    opt='adamw',
    weight_decay=0.05,
    criterion='ce',
    aa='rand-m9-mstd0.5-inc1',
    reprob=0.25,
    remode='pixel',
    recount=1,
    smoothing=0.1,
    mixup=0.8,
    crop_pct=0.875,
    repeated_aug=1,
    sched_per_epoch=False,
)
EMA = dict(use_ema=True, ema_warmup_epochs=20)
VIT_SMALL = BEIT | dict(
    effective_batch_size=1024,
    batch_size=128,
    lr=1e-2,
    epochs=100,
    warmup_epochs=20,
    warmup_lr_ratio=0,
    cosine_start='warmup',
    layer_decay=0.65,
    clip_grad=5,
    drop_path=0.1,
    use_ema=False,
)
VIT_BASE = VIT_SMALL | EMA | dict(ema_decay=0.99996)
VIT_LARGE = VIT_BASE | dict(batch_size=64)
CONVNEXT = (
    BEIT
    | EMA
    | dict(
        effective_batch_size=4096,
        batch_size=256,
        lr=4e-3,
        epochs=300,
        warmup_epochs=5,
        warmup_lr_ratio=1e-5,
        cosine_start='zero',
        layer_decay=1,
        clip_grad=None,
        ema_decay=0.9999,
    )
)
RSB_A2 = FINETUNE | dict(
    effective_batch_size=2048,
    batch_size=256,
    lr=5e-3,
    epochs=300,
    warmup_epochs=5,
    warmup_lr_ratio=1e-5,
    cosine_start='zero',
    sched_per_epoch=True,
    opt='lamb',
    weight_decay=0.02,
    layer_decay=1,
    clip_grad=1,
    criterion='bce',
    aa='rand-m7-mstd0.5-inc1',
    reprob=0,
    smoothing=0,
    mixup=0.1,
    repeated_aug=3,
    drop_path=0.05,
    use_ema=False,
    crop_pct=0.949,
)
RSB_A3 = RSB_A2 | dict(
    batch_size=512,
    lr=8e-3,
    epochs=100,
    input_size=160,
    eval_size=224,
    aa='rand-m6-mstd0.5-inc1',
    repeated_aug=1,
    drop_path=0,
)
RSB_A2_EMA = RSB_A2 | EMA | dict(ema_decay=0.9999)

TABLE = {
    'a2mim_vit_small_pretrain_800ep': A2MIM_VIT,
    'a2mim_vit_base_pretrain_800ep': A2MIM_VIT,
    'a2mim_vit_large_pretrain_800ep': A2MIM_VIT,
    'a2mim_resnet50_pretrain_100ep': A2MIM_RESNET | dict(epochs=100, rule_kwargs={'gamma_as_weight': False}),
    'a2mim_resnet50_pretrain_300ep': A2MIM_RESNET,
    'a2mim_resnet101_pretrain_300ep': A2MIM_RESNET,
    'a2mim_resnet101_pretrain_800ep': A2MIM_RESNET | dict(epochs=800),
    'a2mim_resnet152_pretrain_300ep': A2MIM_RESNET | dict(model_kwargs={'fft_weight': 0.1}),
    'a2mim_resnet152_pretrain_800ep': A2MIM_RESNET | dict(model_kwargs={'fft_weight': 0.1}, epochs=800),
    'a2mim_resnet200_pretrain_300ep': A2MIM_RESNET,
    'a2mim_convnext_tiny_pretrain_300ep': A2MIM_CONVNEXT,
    'a2mim_convnext_small_pretrain_300ep': A2MIM_CONVNEXT,
    'a2mim_convnext_base_pretrain_300ep': A2MIM_CONVNEXT,
    'simmim_vit_small_pretrain_800ep': SIMMIM_VIT,
    'simmim_vit_base_pretrain_800ep': SIMMIM_VIT | dict(amp_dtype='none'),
    'simmim_vit_large_pretrain_800ep': SIMMIM_VIT,
    'simmim_resnet50_pretrain_300ep': SIMMIM_CNN,
    'simmim_resnet101_pretrain_300ep': SIMMIM_CNN,
    'simmim_resnet152_pretrain_300ep': SIMMIM_CNN,
    'simmim_resnet200_pretrain_300ep': SIMMIM_CNN,
    'simmim_convnext_small_pretrain_300ep': SIMMIM_CNN,
    'simmim_convnext_base_pretrain_300ep': SIMMIM_CNN | dict(effective_batch_size=4096),
    'simmim_swin_base_pretrain_100ep': SIMMIM_SWIN | dict(batch_size=128, epochs=100),
    'simmim_swin_base_pretrain_800ep': SIMMIM_SWIN | STEP,
    'simmim_swin_tiny_pretrain_in100_800ep': SIMMIM_SWIN | dict(epochs=800),
    'a2mim_vit_small_finetune': VIT_SMALL | dict(epochs=200),
    'a2mim_vit_base_finetune': VIT_BASE,
    'a2mim_vit_large_finetune': VIT_LARGE | dict(epochs=150),
    'simmim_vit_small_finetune': VIT_SMALL,
    'simmim_vit_base_finetune': VIT_BASE,
    'simmim_vit_large_finetune': VIT_LARGE,
    'a2mim_resnet50_finetune_rsb_a2': RSB_A2_EMA,
    'a2mim_resnet101_finetune_rsb_a2': RSB_A2,
    'a2mim_resnet152_finetune_rsb_a2': RSB_A2,
    'a2mim_resnet200_finetune_rsb_a2': RSB_A2 | dict(drop_path=0.2),
    'simmim_resnet50_finetune_rsb_a2': RSB_A2_EMA,
    'simmim_resnet101_finetune_rsb_a2': RSB_A2,
    'simmim_resnet152_finetune_rsb_a2': RSB_A2,
    'simmim_resnet200_finetune_rsb_a2': RSB_A2 | dict(drop_path=0.2),
    'a2mim_resnet50_finetune_rsb_a3': RSB_A3,
    'a2mim_resnet101_finetune_rsb_a3': RSB_A3,
    'a2mim_resnet152_finetune_rsb_a3': RSB_A3,
    'a2mim_resnet200_finetune_rsb_a3': RSB_A3,
    'a2mim_convnext_tiny_finetune': CONVNEXT
    | dict(lr=4e-4, epochs=400, weight_decay=0.01, drop_path=0.1, layer_decay=0.7),
    'a2mim_convnext_small_finetune': CONVNEXT | dict(drop_path=0.4),
    'a2mim_convnext_base_finetune': CONVNEXT | dict(drop_path=0.5),
    'simmim_convnext_small_finetune': CONVNEXT | dict(drop_path=0.4),
    'simmim_convnext_base_finetune': CONVNEXT | dict(drop_path=0.5),
}
PRETRAINING = [name for name in TABLE if '_pretrain' in name]
FINETUNING = [name for name in TABLE if '_finetune' in name]

ACCURACY = {  # the published table: what both recipes of a row begin with
    'a2mim_vit_small': '82.1',
    'a2mim_vit_base': '84.2 or 84.3',
    'a2mim_vit_large': '86.1 (86.0 in OpenMixup)',
    'a2mim_resnet50': '80.4',
    'a2mim_resnet101': '81.9',
    'a2mim_resnet152': '82.5',
    'a2mim_resnet200': '83.0',
    'a2mim_convnext_small': '83.7',
    'a2mim_convnext_base': '84.1',
    'simmim_vit_small': '81.7',
    'simmim_vit_base': '83.8',
    'simmim_vit_large': '85.6',
    'simmim_resnet50': '79.9',
    'simmim_resnet101': '81.3',
    'simmim_resnet152': '81.9',
    'simmim_resnet200': '82.2',
    'simmim_convnext_small': '83.2',
    'simmim_convnext_base': '83.6',
}
NOT_PUBLISHED = [name for name in TABLE if 'swin' in name or 'convnext_tiny' in name] + [
    'a2mim_resnet101_pretrain_800ep',
    'a2mim_resnet152_pretrain_800ep',
    'a2mim_resnet200_finetune_rsb_a3',
]
OTHER_ACCURACY = dict.fromkeys(NOT_PUBLISHED, 'not published') | {
    'a2mim_resnet50_pretrain_100ep': '78.8 (RSB A3)',
    'a2mim_resnet50_finetune_rsb_a3': '78.8 / 78.9 (pretrained 100 / 300 epochs)',
    'a2mim_resnet101_finetune_rsb_a3': '80.3',
    'a2mim_resnet152_finetune_rsb_a3': '80.9',
}

# the networks: pixels a side of what a mask token stands for and of what one position of the decoder paints, and losses
VIT = dict(patch=16, stride=16, loss='l1', fft_weight=0.1, fft_focal=True, fft_unmask=0, damped=False, drop_path=0.1)
CNN = dict(patch=16, stride=32, loss='focal_l1', fft_unmask=1e-3, damped=True, drop_path=0)
FILLED = dict(color='mean', replace=False)
BARE = dict(color='none', replace=True, loss='l1', fft_weight=0, damped=False)
NETWORKS = {
    'a2mim_vit': FILLED | VIT,
    'a2mim_resnet50': FILLED | CNN | dict(fft_weight=0.5, fft_focal=True),
    'a2mim_resnet101': FILLED | CNN | dict(fft_weight=0.1, fft_focal=False),
    'a2mim_resnet152': FILLED | CNN | dict(fft_weight=0.1, fft_focal=False),
    'a2mim_resnet200': FILLED | CNN | dict(fft_weight=0),
    'a2mim_convnext': FILLED | CNN | dict(patch=32, fft_weight=0),
    'simmim_vit': BARE | dict(patch=16, stride=16, drop_path=0.1),
    'simmim_resnet': BARE | dict(patch=4, stride=32, drop_path=0),
    'simmim_convnext': BARE | dict(patch=4, stride=32, drop_path=0, replace=False),
    'simmim_swin': BARE | dict(patch=4, stride=32, drop_path=0),
}


def drop_path_of(network: torch.nn.Module) -> float:
    """Of the last block; timm spaces them in float32."""
    return round(max((m.drop_prob for m in network.modules() if isinstance(m, DropPath)), default=0), 6)


def test_all_recipes_are_in_the_table():
    assert published('a2mim_', 'simmim_') == set(TABLE)


@pytest.mark.parametrize('name', TABLE)
def test_resolved_values(name):
    args, expected = resolve(name), TABLE[name]
    assert name.startswith(f'{args.model}_{stage_of(name)}')
    got = resolved_values(name)
    assert {key: got[key] for key in expected} == expected | {'lr': pytest.approx(expected['lr'], rel=1e-12)}
    config.check_schedule(args)


@pytest.mark.parametrize('name', TABLE)
def test_accuracy(name):
    about, _ = load_recipe(RECIPES / f'{name}.yaml')
    if name in OTHER_ACCURACY:
        assert str(about['accuracy']) == OTHER_ACCURACY[name]
    else:
        assert str(about['accuracy']).startswith(ACCURACY[resolve(name).model])


def test_every_published_row_has_its_recipes():
    models = {(resolve(name).model, stage_of(name)) for name in TABLE}
    assert {(model, stage) for model in ACCURACY for stage in MAINS} <= models


@pytest.mark.parametrize('name', TABLE)
def test_effective_batch_on_any_number_of_gpus(name, monkeypatch):
    """Up to the original's number of GPUs as it stands; on more, batch_size is what has to follow."""
    args, effective = resolve(name), TABLE[name]['effective_batch_size']
    for world_size in (1, 2, 4, 8, 16, 32, 64):
        launch_on(world_size, monkeypatch)
        args.batch_size = min(TABLE[name]['batch_size'], effective // world_size)
        accum_iter = optim.accumulation(args)
        assert args.batch_size * world_size * accum_iter == effective
        assert args.batch_size % 2 == 0  # for mixup
        assert optim.scaled_lr(args, accum_iter)[0] == pytest.approx(TABLE[name]['lr'], rel=1e-12)


# --------------------------------------------------------------------------
# the networks that recipes make


@pytest.mark.parametrize('name', PRETRAINING)
def test_pretraining_networks(name):
    args = resolve(name)
    core = network(name)
    got = dict(
        color=core.mask_color,
        replace=core.replace,
        damped=core.mask_gamma is not None,
        patch=args.input_size // core.site.side,
        stride=core.stride,
        loss=core.loss['mode'],
        fft_weight=core.fft_weight,
        fft_focal=core.fft_focal,
        fft_unmask=core.fft_unmask_weight,
        drop_path=drop_path_of(core),
    )
    [expected] = [values for prefix, values in NETWORKS.items() if args.model.startswith(prefix)]
    assert {key: got[key] for key in expected} == expected


@pytest.mark.parametrize('name', FINETUNING)
def test_fine_tuned_networks(name):
    args = resolve(name)
    assert drop_path_of(network(name)) == TABLE[name]['drop_path']
    augment.finetune_transform(args.input_size, args.crop_scale, args.hflip, args.color_jitter, args.aa, args.mean)
    resize, crop, _ = augment.eval_transform(args.eval_size or args.input_size, args.crop_pct).transforms
    assert (resize.size, crop.size) == (236 if 'rsb' in name else 256, (224, 224))


# --------------------------------------------------------------------------
# learning rates and groups against the published code's numbers

GOLDEN = golden('a2mim/optim_and_lr.json')
CURVES = {
    'a2mim_vit_small_ep800': [name for name in TABLE if 'vit' in name and '800ep' in name]
    + ['simmim_swin_base_pretrain_800ep'],
    'a2mim_r50_ep300': [name for name in TABLE if name.startswith(('a2mim_resnet', 'a2mim_conv')) and '300ep' in name],
    'ft_vit_small_ep100': [f'simmim_vit_{size}_finetune' for size in ('small', 'base', 'large')]
    + ['a2mim_vit_base_finetune'],
    'ft_r50_a2_ep300': [name for name in TABLE if name.endswith('rsb_a2')],
}


@pytest.mark.parametrize(('curve', 'name'), [(curve, name) for curve, names in CURVES.items() for name in names])
def test_learning_rates(curve, name):
    """At every point of the published code's schedules, which have 100 iterations an epoch."""
    case, args = GOLDEN['lr'][curve], resolve(name)
    assert (args.epochs, case['iters_per_epoch']) == (case['epochs'], 100)
    schedule = optim.schedule(args, optim.scaled_lr(args, optim.accumulation(args))[0])
    for iteration, theirs in case['lr_at_iter'].items():
        # the absolute bound is for their own rounding of 1 - (1 - ratio) at the very first step
        assert schedule(int(iteration) / 100) == pytest.approx(theirs, rel=1e-12, abs=1e-18), iteration


GROUPS = {
    'a2mim_vit_small_pretrain_800ep': ('a2mim_vit_small', 'Beit'),
    'a2mim_resnet50_pretrain_100ep': ('a2mim_r50_ep100', 'ResNet'),
    'a2mim_resnet50_pretrain_300ep': ('a2mim_r50_ep300', 'ResNet'),
    'a2mim_convnext_tiny_pretrain_300ep': ('a2mim_convnext_t', 'ConvNeXt'),
    'simmim_resnet50_pretrain_300ep': ('simmim_r50', 'ResNet'),
    'a2mim_vit_small_finetune': ('ft_vit_small', 'Beit'),
    'a2mim_vit_base_finetune': ('ft_vit_base', 'Beit'),
    'simmim_vit_small_finetune': ('ft_vit_small', 'Beit'),
    'simmim_vit_base_finetune': ('ft_vit_base', 'Beit'),
    'a2mim_resnet50_finetune_rsb_a2': ('ft_r50_a2', 'ResNet'),
    'simmim_resnet50_finetune_rsb_a2': ('ft_r50_a2', 'ResNet'),
    'a2mim_convnext_tiny_finetune': ('ft_convnext_t_ld', 'ConvNeXt'),
    'a2mim_convnext_small_finetune': ('ft_convnext_s', 'ConvNeXt'),
    'simmim_convnext_small_finetune': ('ft_convnext_s', 'ConvNeXt'),
}


def test_every_golden_of_groups_is_used():
    assert {case for case, _ in GROUPS.values()} == GOLDEN['param_groups'].keys()


@pytest.mark.parametrize('name', GROUPS)
def test_groups(name):
    """Optimiser, learning rate and weight decay of every parameter, as the recipe's flags give them."""
    case, family = GROUPS[name]
    data, family, args = GOLDEN['param_groups'][case], FAMILIES[family], resolve(name)
    core = network(name)
    rules = build.param_rules(main_pretrain.find_method(args.model), core, args.rule_kwargs)
    groups = optim.param_groups(core, rules, args.weight_decay, getattr(args, 'layer_decay', 1.0))
    lr, _ = optim.scaled_lr(args, optim.accumulation(args))
    layout = into_a2mim(family) if name in PRETRAINING else into_classifier(family)[0]
    ours = {key: (lr * group['lr_scale'], group['weight_decay']) for group in groups for key in group['names']}
    assert ours == {layout.rename(key): pytest.approx(pair, rel=1e-12) for key, pair in data['params'].items()}

    defaults = optim.OPTIMIZERS[args.opt](groups, lr, args.betas, args.opt_eps).defaults
    assert args.opt == data['optimizer'].lower()
    assert (str(tuple(defaults['betas'])), str(defaults['eps'])) == (data['defaults']['betas'], data['defaults']['eps'])
    if args.opt == 'lamb':  # which clips by itself there
        assert args.clip_grad == float(data['defaults']['max_grad_norm'])
