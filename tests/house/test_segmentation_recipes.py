"""The recipes for ADE20K: the published values, written down a second time, and the networks that they make."""

import pytest
import torch
from recipes import ADE20K, resolve, resolved_values

import main_pretrain
from util import optim
from util.recipes import RECIPES, load_recipe

UPER = dict(
    input_size=512,
    dataset='ade20k',
    batch_size=2,
    effective_batch_size=16,
    steps=160_000,
    eval_freq=16_000,
    warmup_steps=1500,
    warmup_lr_ratio=1e-6,
    warmup_shape='scaled',
    lr=1e-4,
    min_lr=0,
    lr_sched='poly',
    lr_power=1,
    opt='adamw',
    betas=[0.9, 0.999],
    weight_decay=0.05,
    layer_decay=0.65,
    clip_grad=None,
    use_ema=False,
    drop_path=0.1,
    short_side=512,
    scale_range=[0.5, 2],
    hflip=0.5,
    photometric=True,
    loss_mean='all',
    test_mode='slide',
    stride=341,
)
FCN = dict(lr=0.01, min_lr=1e-4, lr_power=0.9, warmup_steps=0, opt='sgd', weight_decay=5e-4, layer_decay=1, drop_path=0)
WHOLE = dict(test_mode='whole', stride=None)
MAE = dict(abs_pos_embed=True, rel_pos_bias=True, init_values=1)
BEIT = dict(abs_pos_embed=False, rel_pos_bias=True, init_values=0.1)
OURS, UNKNOWN, NONE = 'ours; not published', 'not known here', 'not published'
TABLE = {  # values, and what the recipe states of the mIoU
    'localmim_vit_base_ade20k_upernet': (dict(lr=4e-4), "49.5 mIoU; a user's rerun 48.65"),
    'localmim_swin_base_ade20k_upernet': (
        dict(lr=6e-5, weight_decay=0.01, layer_decay=1, drop_path=0.3) | WHOLE,
        UNKNOWN,
    ),
    'a2mim_vit_base_ade20k_upernet_mae': (dict(model_kwargs=MAE), '49.0 mIoU (of this or the BEiT form)'),
    'a2mim_vit_base_ade20k_upernet_beit': (dict(lr=4e-4, model_kwargs=BEIT), '49.0 mIoU (of this or the MAE form)'),
    'a2mim_vit_base_ade20k_upernet_640': (
        dict(lr=3e-5, layer_decay=0.9, input_size=640, short_side=640, stride=426, model_kwargs=BEIT),
        NONE,
    ),
    'a2mim_resnet50_ade20k_fcn': (FCN | WHOLE | dict(batch_size=4, model_kwargs={'head': 'fcn'}), '38.3 mIoU'),
    'mixmae_base_ade20k_upernet': (dict(layer_decay=0.85, drop_path=0.3), '50.3 mIoU, with other settings'),
    'mixmae_large_ade20k_upernet': (dict(layer_decay=0.85, drop_path=0.3), '53.8 mIoU, with other settings'),
    'mirl_vit_base_ade20k_upernet': ({}, UNKNOWN),
    'mirl_vit_base_depth24_ade20k_upernet': (dict(drop_path=0.2), UNKNOWN),
    'mirl_vit_base_depth48_ade20k_upernet': (dict(drop_path=0.2), UNKNOWN),
    'mirl_vit_small_depth54_ade20k_upernet': (dict(drop_path=0.2), UNKNOWN),
}
K_BIASES = 12 * 768  # of the published ViTs; they change nothing, and timm's Beit has none
PARAMETERS = {
    'localmim_vit_base_ade20k_upernet': 163_877_228 - K_BIASES,
    'localmim_swin_base_ade20k_upernet': 121_279_716,
    'a2mim_vit_base_ade20k_upernet_mae': 163_877_228 - K_BIASES,
    'a2mim_vit_base_ade20k_upernet_beit': 163_080_812,
    'a2mim_resnet50_ade20k_fcn': 49_579_372,
}


def test_all_are_in_the_table():
    assert {path.stem for path in RECIPES.glob(f'*{ADE20K}*.yaml')} == set(TABLE)


@pytest.mark.parametrize('name', TABLE)
def test_resolved_values(name):
    values, miou = TABLE[name]
    got, expected = resolved_values(name), UPER | values
    assert {key: got[key] for key in expected} == expected
    assert got['accuracy'] == miou
    assert optim.accumulation(resolve(name)) * got['batch_size'] == 16


@pytest.mark.parametrize('name', TABLE)
def test_ours_say_so(name):
    path = RECIPES / f'{name}.yaml'
    ours = name.startswith(('mirl', 'mixmae'))
    assert path.read_text().startswith('# Our settings; not published. ') is ours
    assert (load_recipe(path)[0]['source'] == OURS) is ours


@pytest.mark.parametrize('name', PARAMETERS)
def test_networks(name):
    args = resolve(name)
    method = main_pretrain.find_method(args.model)
    with torch.device('meta'):
        network = method.create_segmenter(args.model, img_size=args.input_size, **args.model_kwargs)
    assert sum(p.numel() for p in network.parameters()) == PARAMETERS[name]
