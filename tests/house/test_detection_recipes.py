"""The recipes for COCO: the published values, written down a second time, and the networks that they make."""

import pytest
import torch
from recipes import COCO, resolve, resolved_values

from scripts import finetune_detection
from util import optim
from util.recipes import RECIPES, load_recipe

SCHEDULE = dict(
    warmup_lr_ratio=1e-3, lr_sched='step', decay_rate=0.1, betas=[0.9, 0.999], clip_grad=None, use_ema=False, hflip=0.5
)
LSJ = dict(augment='lsj', scale_range=[0.1, 2], input_size=1024, test_size=1024, max_size=1024)
VITDET = (
    SCHEDULE
    | LSJ
    | dict(
        effective_batch_size=64, steps=184_375, decay_steps=[163_889, 177_546], warmup_steps=250, lr=1e-4, opt='adamw'
    )
    | dict(weight_decay=0.1, layer_decay=0.7, drop_path=0.1, neck='simple', box_head='4conv1fc', norm='ln', rpn_depth=2)
)
FPN = dict(neck='fpn', box_head='2fc', norm='none', rpn_depth=1, layer_decay=1, opt='adamw')
LSJ_50 = VITDET | FPN | dict(steps=92_187, decay_steps=[81_944, 88_773], lr=4e-5, weight_decay=0.05, drop_path=0.4)
LONGEST = dict(test_size=800, max_size=1333, effective_batch_size=16, warmup_steps=1000)
THREE = (
    SCHEDULE
    | FPN
    | LONGEST
    | dict(
        augment='crop', steps=36 * 7330, decay_steps=[27 * 7330, 33 * 7330], lr=1e-4, weight_decay=0.05, drop_path=0.2
    )
)
C4 = (
    SCHEDULE
    | LONGEST
    | dict(augment='shortest_edge', train_sizes=[640, 672, 704, 736, 768, 800], neck='c4', norm='sync', layer_decay=1)
    | dict(steps=180_000, decay_steps=[120_000, 160_000], lr=0.02, opt='sgd', weight_decay=1e-4, drop_path=0)
)
R50_FPN = dict(neck='fpn', box_head='4conv1fc', rpn_depth=1, steps=90_000, decay_steps=[60_000, 80_000])
DEEP, LARGE = dict(drop_path=0.2, layer_decay=0.88), dict(drop_path=0.4, layer_decay=0.8)
OURS, UNKNOWN, NONE = 'ours; not published', 'not known here', 'not published'
TABLE = {  # values, and what the recipe states of box and mask AP
    'mirl_vit_base_coco_vitdet_100ep': (VITDET, UNKNOWN),
    'mirl_vit_base_depth24_coco_vitdet_100ep': (VITDET | DEEP, UNKNOWN),
    'mirl_vit_base_depth48_coco_vitdet_100ep': (VITDET | DEEP, UNKNOWN),
    'mirl_vit_small_depth54_coco_vitdet_100ep': (VITDET | DEEP, UNKNOWN),
    'localmim_vit_base_coco_vitdet_100ep': (VITDET, UNKNOWN),
    'localmim_vit_large_coco_vitdet_100ep': (VITDET | LARGE, UNKNOWN),
    'a2mim_vit_base_coco_vitdet_100ep': (VITDET, '49.4 / 43.5 box / mask AP, with other settings'),
    'a2mim_vit_large_coco_vitdet_100ep': (VITDET | LARGE, UNKNOWN),
    'localmim_swin_tiny_coco_3x': (THREE, UNKNOWN),
    'simmim_swin_tiny_coco_3x': (THREE, UNKNOWN),
    'localmim_swin_base_coco_lsj_50ep': (LSJ_50, UNKNOWN),
    'simmim_swin_base_coco_lsj_50ep': (LSJ_50, UNKNOWN),
    'mixmae_base_coco_lsj_50ep': (LSJ_50 | dict(drop_path=0.3), UNKNOWN),
    'mixmae_large_coco_lsj_50ep': (LSJ_50 | dict(drop_path=0.3), UNKNOWN),
    'a2mim_convnext_tiny_coco_3x': (THREE | dict(layer_decay=0.95, drop_path=0.4), NONE),
    'a2mim_convnext_small_coco_3x': (THREE | dict(layer_decay=0.95, drop_path=0.6), NONE),
    'a2mim_resnet50_coco_c4_2x': (C4, '39.8 / 34.9 box / mask AP'),
    'a2mim_resnet50_coco_fpn_1x': (C4 | R50_FPN, UNKNOWN),
}
PARAMETERS = {  # those of Swin-T, ConvNeXt-T and ViTDet's ViT-B are published: 48, 48 and 111 M
    'mirl_vit_base_coco_vitdet_100ep': 110_900_149,
    'a2mim_vit_base_coco_vitdet_100ep': 110_922_101,
    'localmim_swin_tiny_coco_3x': 47_798_959,
    'mixmae_base_coco_lsj_50ep': 107_320_877,
    'a2mim_convnext_tiny_coco_3x': 48_099_733,
    'a2mim_resnet50_coco_c4_2x': 35_975_281,
    'a2mim_resnet50_coco_fpn_1x': 45_715_509,
}


def test_all_are_in_the_table():
    assert {path.stem for path in RECIPES.glob(f'*{COCO}*.yaml')} == set(TABLE)


@pytest.mark.parametrize('name', TABLE)
def test_resolved_values(name):
    expected, ap = TABLE[name]
    got = resolved_values(name)
    assert {key: got[key] for key in expected} == expected
    assert got['accuracy'] == ap
    assert optim.accumulation(resolve(name)) * got['batch_size'] == expected['effective_batch_size']


def test_rates_belong_to_their_batches():
    """Half of the images, half of the rate, whose product is told."""
    args = resolve('mirl_vit_base_coco_vitdet_100ep', '--effective_batch_size', '32')
    lr, told = optim.scaled_lr(args, optim.accumulation(args))
    assert lr == 5e-5
    assert told.endswith('lr = 0.0001 x 32 / 64 = 5e-05')


@pytest.mark.parametrize('name', TABLE)
def test_ours_say_so(name):
    path = RECIPES / f'{name}.yaml'
    ours = 'resnet50' not in name
    assert path.read_text().startswith('# Our settings; not published. ') is ours
    assert (load_recipe(path)[0]['source'] == OURS) is ours


@pytest.mark.parametrize('name', PARAMETERS)
def test_networks(name):
    with torch.device('meta'):
        network = finetune_detection.create_detector(resolve(name), 80)
    assert sum(p.numel() for p in network.parameters()) == PARAMETERS[name]
