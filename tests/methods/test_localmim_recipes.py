"""LocalMIM's recipes: the published values, written down a second time, and the learning rates that follow."""

import re
from functools import cache

import pytest
import torch
from recipes import launch_on, learning_rates, network, published, resolve, resolved_values, stage_of
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from training import draw_plan

import main_pretrain
from util import optim
from util.errors import UserError
from util.recipes import RECIPES, load_recipe

PRETRAIN = dict(
    effective_batch_size=2048,
    batch_size=256,
    warmup_epochs=40,
    weight_decay=0.05,
    betas=[0.9, 0.95],
    clip_grad=None,
    mask_ratio=0.75,
    crop_scale=[0.2, 1],
    interpolation='bicubic',
    hflip=0.5,
    input_size=224,
    lr_sched='cosine',
    sched_per_epoch=False,
    opt='adamw',
    opt_eps=None,
    seed=0,
    amp_dtype=None,
)
LARGE = dict(batch_size=128, effective_batch_size=4096)
FINETUNE = dict(
    effective_batch_size=1024,
    batch_size=128,
    epochs=100,
    warmup_epochs=20,
    drop_path=0.1,
    weight_decay=0.05,
    betas=[0.9, 0.999],
    clip_grad=None,
    use_ema=False,
    global_pool=True,
    crop_scale=[0.08, 1],
    crop_pct=0.875,
    hflip=0.5,
    color_jitter=None,
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
    min_lr_absolute=False,
    sched_per_epoch=False,
    opt='adamw',
    opt_eps=None,
    seed=0,
    amp_dtype=None,
)
HOG_9 = dict(model_kwargs=dict(target='hog', hog_bins=9, hog_bias=False), norm_pix_loss=None)
HOG_18 = dict(model_kwargs=dict(target='hog', hog_bins=18, hog_bias=True), norm_pix_loss=None)
PIXEL = dict(model_kwargs=dict(target='pixel'), norm_pix_loss=True)
BRIEF = dict(epochs=100, warmup_epochs=10, accuracy='not in the README')

VIT_BASE = PRETRAIN | HOG_9 | dict(lr=1.6e-3, min_lr=1e-6, gpu_hours=0.7)
SWIN_BASE = PRETRAIN | dict(lr=8e-4, min_lr=0)
SWIN_PIXEL = SWIN_BASE | PIXEL | dict(gpu_hours=1.0)
SWIN_HOG = SWIN_BASE | HOG_18 | dict(gpu_hours=1.1)
FT_VIT_BASE = FINETUNE | dict(lr=2e-3, min_lr=1e-5, layer_decay=0.65)
FT_SWIN = FINETUNE | dict(lr=4e-3, min_lr=2.5e-7, layer_decay=0.9)
FT_SWIN_HOG = FT_SWIN | dict(effective_batch_size=2048)
FT_SWIN_AFTER_100 = dict(lr=5e-3, accuracy='not in the README')
TABLE = {
    'localmim_vit_base_pretrain_1600ep': VIT_BASE | dict(epochs=1600, accuracy=84.0),
    'localmim_vit_base_pretrain_100ep': VIT_BASE | BRIEF,
    'localmim_vit_large_pretrain_800ep': PRETRAIN
    | LARGE
    | HOG_18
    | dict(lr=2.4e-3, min_lr=1e-6, gpu_hours=1.0, epochs=800, accuracy=85.8),
    'localmim_swin_base_pixel_pretrain_400ep': SWIN_PIXEL | dict(epochs=400, accuracy=84.0),
    'localmim_swin_base_pixel_pretrain_100ep': SWIN_PIXEL | BRIEF,
    'localmim_swin_base_hog_pretrain_400ep': SWIN_HOG | dict(epochs=400, accuracy=84.1),
    'localmim_swin_base_hog_pretrain_100ep': SWIN_HOG | BRIEF,
    'localmim_swin_large_pretrain_800ep': PRETRAIN
    | LARGE
    | HOG_18
    | dict(lr=1.6e-3, min_lr=0, gpu_hours=1.6, epochs=800, accuracy=85.6),
    'localmim_vit_base_finetune': FT_VIT_BASE | dict(accuracy=84.0),
    'localmim_vit_base_finetune_after_100ep': FINETUNE
    | dict(lr=4e-3, min_lr=1e-6, layer_decay=0.75, accuracy='not in the README'),
    'localmim_vit_large_finetune': FINETUNE
    | dict(batch_size=64, epochs=50, warmup_epochs=5, drop_path=0.2)
    | dict(lr=3e-3, min_lr=1e-6, layer_decay=0.75, accuracy=85.8),
    'localmim_swin_base_pixel_finetune': FT_SWIN | dict(accuracy=84.0),
    'localmim_swin_base_pixel_finetune_after_100ep': FT_SWIN | FT_SWIN_AFTER_100,
    'localmim_swin_base_hog_finetune': FT_SWIN_HOG | dict(accuracy=84.1),
    'localmim_swin_base_hog_finetune_after_100ep': FT_SWIN_HOG | FT_SWIN_AFTER_100,
    'localmim_swin_large_finetune': FINETUNE
    | dict(batch_size=32, effective_batch_size=2048, drop_path=0.3)
    | dict(lr=2e-3, min_lr=2.5e-7, layer_decay=0.8, accuracy=85.6),
}
# trainable parameters of pretraining models, and of classifiers of 1000 classes
PARAMETERS = {
    'localmim_vit_base_pretrain': 89_916_140,
    'localmim_vit_large_pretrain': 307_651_480,
    'localmim_swin_base_pixel_pretrain': 88_641_592,
    'localmim_swin_base_hog_pretrain': 87_761_872,
    'localmim_swin_large_pretrain': 196_450_028,
    'localmim_vit_base_finetune': 86_567_656,
    'localmim_vit_large_finetune': 304_326_632,
    'localmim_swin_base_pixel_finetune': 87_768_224,
    'localmim_swin_base_hog_finetune': 87_768_224,
    'localmim_swin_large_finetune': 196_794_556,
}


def read(name: str) -> str:
    return (RECIPES / f'{name}.yaml').read_text()


def test_all_recipes_are_in_the_table():
    assert published('localmim_') == set(TABLE)


@pytest.mark.parametrize('name', TABLE)
def test_resolved_values(name):
    about, _ = load_recipe(RECIPES / f'{name}.yaml')
    got = resolved_values(name)
    expected = {key: value for key, value in TABLE[name].items() if key != 'gpu_hours'}
    assert {key: got[key] for key in expected} == expected | {'lr': pytest.approx(expected['lr'], rel=1e-12)}
    assert ('# Assumed' in read(name)) == (stage_of(name) == 'finetune')
    # the README names the GPU-hours of an epoch, and those of pretraining alone
    hours = TABLE[name].get('gpu_hours', 0) * got['epochs']
    assert ('GPU-hours' in about['cost'], f'; {hours:.0f} GPU-hours;' in about['cost']) == (bool(hours),) * 2


@pytest.mark.parametrize('name', TABLE)
def test_models(name):
    """Each recipe's model can be made, with its published windows and size."""
    model = network(name)
    size = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert size == PARAMETERS[re.sub('(pretrain|finetune)_.*', r'\1', name)]
    if 'swin' in name:
        tables = [layer.blocks[1].attn.relative_position_bias_table for layer in model.layers]
        assert [len(table) for table in tables] == ([169] * 4 if 'base' in name else [729, 729, 729, 169])


@cache
def flop_of(model: nn.Module) -> int:
    """Of a forward and backward of one image, without those of the targets."""
    imgs = torch.empty(1, 3, 224, 224, device='meta')
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        if hasattr(model, 'plan_from_noise'):
            plan = draw_plan(model, 1, 0)
            plan = type(plan)(*(tensor.to('meta') for tensor in plan))
            outputs = model.forward_decoders(model.forward_encoder(imgs, plan), plan)
        else:
            outputs = [model(imgs)]
        sum(output.sum() for output in outputs).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize('name', TABLE)
def test_costs(name):
    """GFLOP an image: what a forward and backward counts to, targets aside. Cost: that many for all whole steps."""
    args, flop = resolve(name), flop_of(network(name))
    assert args.input_size == 224
    [gflop] = re.findall(r'products: ([\d.]+) GFLOP', re.sub(r'\n# +', ' ', read(name)))
    assert float(gflop) == pytest.approx(flop / 1e9, rel=5e-3)

    images = 1_281_167 // args.effective_batch_size * args.effective_batch_size * args.epochs
    totals = re.findall(r'(\d\.\de\d+) FLOP', re.sub(r'\n# +', ' ', read(name)))
    assert [float(total) for total in totals] == [pytest.approx(flop * images, rel=0.05)] * 2


@pytest.mark.parametrize('name', [name for name in TABLE if 'swin' in name])
def test_options_that_headers_name(name):
    """`--model_kwargs` replaces what the recipe has: what the header tells one to give must repeat it."""
    [options] = re.findall(r'`--model_kwargs ([^`]*)`', re.sub(r'\n# +', ' ', read(name)))
    args = resolve(name, '--model_kwargs', *options.split())
    if stage_of(name) == 'pretrain':
        with torch.device('meta'):
            plain, mended = main_pretrain.create_model(resolve(name)), main_pretrain.create_model(args)
        assert (plain.coords, mended.coords) == ('published', 'correct')
        assert all(getattr(plain, key) == getattr(mended, key) for key in ('target', 'hog_bins', 'norm_pix_loss'))
        assert (plain.hog_bias is None) == (mended.hog_bias is None)
    else:
        assert args.model_kwargs == {'coords': 'correct'}


@pytest.mark.parametrize('name', TABLE)
def test_effective_batch_on_any_number_of_gpus(name, monkeypatch):
    """The step and its learning rate stay; where the batch of a GPU is too large for it, a smaller one serves."""
    for world_size in (1, 2, 4, 8, 16, 32, 64):
        launch_on(world_size, monkeypatch)
        args = resolve(name)
        if args.batch_size * world_size > args.effective_batch_size:
            with pytest.raises(UserError, match='is not a multiple of'):
                optim.accumulation(args)
            args = resolve(name, f'--batch_size={args.effective_batch_size // world_size}')
        accum_iter = optim.accumulation(args)
        assert args.batch_size * world_size * accum_iter == TABLE[name]['effective_batch_size']
        assert optim.scaled_lr(args, accum_iter)[0] == pytest.approx(TABLE[name]['lr'], rel=1e-12)


@pytest.mark.parametrize('name', TABLE)
def test_learning_rates(name):
    """Linear to the peak, half a cosine to the least; a layer's scale multiplies both ends."""
    at = learning_rates(resolve(name))
    peak, least, warm, end = (TABLE[name][key] for key in ('lr', 'min_lr', 'warmup_epochs', 'epochs'))
    middle = (warm + end) / 2
    for epoch, expected in ((0, 0), (warm / 4, peak / 4), (warm, peak), (middle, (peak + least) / 2), (end, least)):
        assert at(epoch) == {scale: pytest.approx(scale * expected, rel=1e-12, abs=1e-18) for scale in (1.0, 0.5)}, (
            epoch
        )
