"""Every recipe: resolves through its own main, says where it comes from, and holds the published values."""

import re
from functools import cache
from pathlib import Path

import pytest
import torch
from golden import golden
from recipes import OWN, PROGRAMS, launch_on, learning_rates, network, published, resolve, resolved_values, stage_of
from torch import nn
from training import MAINS

import main_finetune
import main_pretrain
import models_mirl
from util import build, config, optim
from util.config import README
from util.errors import UserError, run_main
from util.recipes import RECIPES, load_recipe, recipes_for
from util.weights import load_published
from util.weights.published import INTO_MIRL

# What the paper's code and table say, written down a second time: a recipe that is edited must disagree with this.
PRETRAIN = dict(
    effective_batch_size=4096,
    batch_size=64,
    lr=2.4e-3,
    warmup_epochs=40,
    min_lr=0,
    weight_decay=0.05,
    betas=[0.9, 0.95],
    clip_grad=None,
    mask_ratio=0.75,
    norm_pix_loss=True,
    crop_scale=[0.2, 1],
    hflip=0.5,
    input_size=224,
    lr_sched='cosine',
    sched_per_epoch=False,
    seed=0,
    amp_dtype=None,
)
FINETUNE = dict(
    effective_batch_size=2048,
    lr=6e-3,
    epochs=100,
    warmup_epochs=20,
    drop_path=0.1,
    min_lr=1e-6,
    weight_decay=0.05,
    betas=[0.9, 0.999],
    clip_grad=None,
    use_ema=True,
    ema_decay=0.9998,
    global_pool=True,
    crop_scale=[0.08, 1],
    crop_pct=0.875,
    hflip=0.5,
    input_size=224,
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
    seed=888,
    amp_dtype=None,
)
EPOCHS = {'300ep': 300, '800ep': 801}
FOUR_SEGMENTS = {'num_segments': 4}
TABLE = {
    'mirl_vit_base_depth24_finetune': FINETUNE | dict(batch_size=64, layer_decay=0.88),
    'mirl_vit_base_depth24_pretrain_300ep': PRETRAIN | dict(model_kwargs=FOUR_SEGMENTS),
    'mirl_vit_base_depth48_finetune': FINETUNE
    | dict(batch_size=16, layer_decay=0.88, epochs=60, warmup_epochs=30, drop_path=0),
    'mirl_vit_base_depth48_pretrain_300ep': PRETRAIN | dict(model_kwargs={}),
    'mirl_vit_base_depth48_pretrain_800ep': PRETRAIN | dict(model_kwargs={}),
    'mirl_vit_base_finetune': FINETUNE | dict(batch_size=128, layer_decay=0.6),
    'mirl_vit_base_pretrain_300ep': PRETRAIN | dict(model_kwargs=FOUR_SEGMENTS),
    'mirl_vit_base_pretrain_800ep': PRETRAIN | dict(model_kwargs=FOUR_SEGMENTS),
    'mirl_vit_small_depth54_finetune': FINETUNE | dict(batch_size=64, layer_decay=0.88),
    'mirl_vit_small_depth54_pretrain_300ep': PRETRAIN | dict(model_kwargs={}),
    'mirl_vit_small_depth54_pretrain_800ep': PRETRAIN | dict(model_kwargs={}),
    'mirl_vit_small_finetune': FINETUNE
    | dict(
        effective_batch_size=1024,
        batch_size=128,
        lr=2e-3,
        layer_decay=0.75,
        epochs=200,
        warmup_epochs=5,
        use_ema=False,
    ),
}
ACCURACY = {
    'mirl_vit_base_depth24': (84.4, 84.7),
    'mirl_vit_base_depth48': (85.3, 86.2),
    'mirl_vit_base': (83.5, 84.1),
    'mirl_vit_small_depth54': (84.4, 84.8),
}
# trainable parameters in pretraining with 6 segments
PARAMETERS = {
    'mirl_vit_base_depth24': 226_300_928,
    'mirl_vit_base_depth48': 396_409_856,
    'mirl_vit_base': 141_246_464,
    'mirl_vit_small_depth54': 113_142_144,
}


def test_all_recipes_are_in_the_table():
    assert published('mirl_') == set(TABLE)


def test_every_recipe_of_any_method():
    listed = cache(recipes_for)
    for path in RECIPES.glob('*.yaml'):
        about, flags = load_recipe(path)
        assert set(about) == {'stage', 'source', 'cost', 'accuracy'}, path
        assert all(isinstance(value, str | int | float) and value for value in about.values()), path
        assert path.read_text().startswith('# '), path
        args = PROGRAMS[about['stage']].get_args_parser().parse(['--config', str(path)], stage=about['stage'])
        assert args.model == flags['model'], path
        assert path.stem.startswith(args.model), path
        main_pretrain.find_method(args.model)
        config.check_common_args(args)
        path_from_root = f'scripts/recipes/{path.name}'
        assert path_from_root in listed(args.model, about['stage'])


@pytest.mark.parametrize('name', TABLE)
def test_resolved_values(name):
    args = resolve(name)
    expected = TABLE[name] | ({'epochs': EPOCHS[name[-5:]]} if stage_of(name) == 'pretrain' else {})
    got = resolved_values(name)
    assert {key: got[key] for key in expected} == expected | {'lr': pytest.approx(expected['lr'], rel=1e-12)}
    assert args.batch_size * optim.accumulation(args) == expected['effective_batch_size']
    if stage_of(name) == 'finetune':
        assert args.batch_size % 2 == 0

    accuracy, published = got['accuracy'], ACCURACY.get(args.model)
    if published is None:
        assert accuracy == 'not published'
    elif stage_of(name) == 'pretrain':
        assert accuracy == published[args.epochs > 300]
    else:
        assert accuracy.startswith(f'{published[0]} / {published[1]} ')


@pytest.mark.parametrize('name', ['mirl_vit_base_pretrain_800ep', 'mirl_vit_base_depth48_finetune'])
def test_effective_batch_on_any_number_of_gpus(name, monkeypatch):
    for world_size in (1, 2, 4, 8, 16, 32, 64):
        launch_on(world_size, monkeypatch)
        args = resolve(name)
        accum_iter = optim.accumulation(args)
        assert args.batch_size * world_size * accum_iter == args.effective_batch_size
        assert optim.scaled_lr(args, accum_iter)[0] == pytest.approx(TABLE[name]['lr'], rel=1e-12)


@pytest.mark.parametrize('model', PARAMETERS)
def test_sizes_of_the_recipes_models(model):
    """Parameter counts of the published pretraining models, as the recipes make them; test_mirl.py has classifiers'."""
    args = resolve(f'{model}_pretrain_300ep')
    with torch.device('meta'):  # without storage
        main_pretrain.create_model(args)  # as it stands
        args.model_kwargs = {'num_segments': 6}
        model = main_pretrain.create_model(args)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == PARAMETERS[args.model]


# --------------------------------------------------------------------------
# our own, for one GPU and a small data set


def test_every_method_has_recipes_for_cifar10():
    names = {path.stem for path in RECIPES.glob(f'*{OWN}*.yaml')}
    models = {name.partition(OWN)[0] for name in names}
    assert names == {f'{model}{OWN}{stage}' for model in models for stage in (*MAINS, 'linprobe')}
    assert {main_pretrain.find_method(model) for model in models} == {*main_pretrain.METHODS}


@pytest.mark.parametrize('path', sorted(RECIPES.glob(f'*{OWN}pretrain.yaml')), ids=lambda path: path.stem)
def test_recipes_for_cifar10(path):
    """Each says that its figures are ours. What suits ImageNet alone is off. One's encoder is the other's."""
    networks, kwargs = {}, {}
    for stage in MAINS:
        name = path.stem.replace('pretrain', stage)
        got = resolved_values(name)
        assert got['accuracy'].startswith('not published; ')
        assert load_recipe(RECIPES / f'{name}.yaml')[0]['source'] == 'ours'
        assert (got['batch_size'], got['mean']) == (64, [0.4914, 0.4822, 0.4465])
        assert got['warmup_epochs'] == got['epochs'] / 10
        assert resolve(name, '--epochs', '8').warmup_epochs == 0.8
        if stage == 'finetune':
            assert (got['aa'], got['reprob'], got['crop_pct']) == ('none', 0, 1)
        args = resolve(name)
        kwargs[stage] = args.model_kwargs
        networks[stage] = (
            main_pretrain.create_model(args) if stage == 'pretrain' else main_finetune.create_classifier(args, 10)
        )
    assert not load_published(networks['finetune'], networks['pretrain'].encoder_state_dict()).resized
    method = main_pretrain.find_method(args.model)
    assert kwargs['finetune'] == build.encoder_kwargs(method, args.model, kwargs['pretrain'], 'pretrain')


def test_small_networks_are_of_one_size():
    """What is trained with labels: the four ViTs are the same but for positions and patches, the others as large."""
    names = [path.stem for path in RECIPES.glob(f'*{OWN}finetune.yaml')]
    networks = {name.partition(OWN)[0]: network(name) for name in names}
    vits = [vit for name, vit in networks.items() if '_vit_' in name]
    assert len(vits) == 4
    for vit in vits:
        assert (len(vit.blocks), vit.embed_dim, vit.patch_embed.num_patches) == (8, 64, 64)
        assert vit.blocks[0].attn.num_heads == 2
    sizes = [sum(p.numel() for p in core.parameters()) - core.num_features * 1000 for core in networks.values()]
    assert max(sizes) < 1.5 * min(sizes)


ROWS = re.findall(r'^\| `(\w+)_cifar10_\*` \|(.*)\|(.*)\|.*\|$', README.read_text(encoding='utf-8'), re.MULTILINE)


@pytest.mark.parametrize('column', range(2), ids=['64 pixels', '96 pixels'])
@pytest.mark.parametrize('row', ROWS, ids=lambda row: row[0])
def test_small_sizes(row, column):
    """The README's flags for images of 64 and 96 pixels: the model takes a step, the classifier its encoder."""
    name, flags = row[0] + OWN, row[1 + column].strip(' `').split()
    args = resolve(f'{name}pretrain', *flags)
    assert args.input_size == (64, 96)[column]
    model = main_pretrain.create_model(args)
    loss, _ = model(torch.randn(2, 3, args.input_size, args.input_size))
    loss.backward()
    assert loss.isfinite()
    of_finetuning = [flag for flag in flags if not flag.startswith('mask_patch_size')]
    classifier = main_finetune.create_classifier(resolve(f'{name}finetune', *of_finetuning), 10)
    assert not load_published(classifier, model.encoder_state_dict()).resized


# --------------------------------------------------------------------------
# schedules, groups and averages against the published code's numbers


@pytest.mark.parametrize(
    ('name', 'curve'),
    [
        ('mirl_vit_base_depth48_pretrain_800ep', 'lr_pretrain'),
        ('mirl_vit_small_depth54_pretrain_800ep', 'lr_pretrain'),
        ('mirl_vit_base_pretrain_800ep', 'lr_pretrain'),
        ('mirl_vit_base_depth48_finetune', 'lr_finetune_b48'),
        ('mirl_vit_small_depth54_finetune', 'lr_finetune_s54'),
        ('mirl_vit_base_finetune', 'lr_finetune_s54'),
    ],
)
def test_learning_rates(name, curve):
    """At the published code's points; the second column is that of a parameter with lr_scale 0.5."""
    extras = golden('mirl/extras_optim.json')
    [points] = [value for key, value in extras.items() if key.startswith(f'{curve}[')]
    at = learning_rates(resolve(name))
    for epoch, full, half in points:
        assert at(epoch) == {1.0: pytest.approx(full, rel=1e-12, abs=0), 0.5: pytest.approx(half, rel=1e-12, abs=0)}, (
            epoch
        )


@pytest.mark.parametrize(('case', 'pool'), [('ft_tiny_avgpool', 'avg'), ('ft_tiny_cls', 'token')])
def test_layer_scales_and_decay_of_fine_tuning(case, pool):
    data = golden(f'mirl/{case}.json')
    size = {key: data['config'][key] for key in ('patch_size', 'embed_dim', 'depth', 'num_heads', 'mlp_ratio')}
    model = models_mirl.create_classifier(
        'mirl_vit_small_depth54', num_classes=10, img_size=data['config']['img_size'], global_pool=pool, **size
    )
    args = resolve('mirl_vit_small_depth54_finetune')
    groups = optim.param_groups(model, models_mirl.param_rules(model), args.weight_decay, args.layer_decay)
    ours = {name: [group['lr_scale'], group['weight_decay']] for group in groups for name in group['names']}
    theirs = {name: pytest.approx(pair, rel=1e-12) for name, pair in data['layer_decay_0.88_wd_0.05'].items()}
    assert ours == theirs


def test_decay_of_pretraining():
    extras = golden('mirl/extras_optim.json')
    sizes = golden(f'mirl/{extras["groups_model"]}.json')['config']
    model = models_mirl.MIRL(
        img_size=sizes['img_size'],
        patch_size=sizes['patch_size'],
        embed_dim=48,
        depth=sizes['depth'],
        num_heads=3,
        out_indices=tuple(sizes['out_indices']),
        decoder_dim=48,
        decoder_depth=sizes['decoder_depth'],
        decoder_num_heads=3,
        weight_norm_pred=sizes['weight_norm_pred'],
    )
    weight_decay = resolve('mirl_vit_base_depth48_pretrain_800ep').weight_decay
    groups = optim.param_groups(model, models_mirl.param_rules(model), weight_decay)
    assert {group['lr_scale'] for group in groups} == {1.0}
    ours = {group['weight_decay']: sorted(group['names']) for group in groups}

    def renamed(keys):
        return sorted(INTO_MIRL[1].rename(key).replace('norms.-1', f'norms.{len(model.norms) - 1}') for key in keys)

    assert ours == {0.05: renamed(extras['pretrain_decay']), 0.0: renamed(extras['pretrain_no_decay'])}


def test_average_of_the_weights():
    """Its decay is the published schedule; its start is the weights (the published one's was zero, and corrected)."""
    extras = golden('mirl/extras_optim.json')
    [trace] = [value for key, value in extras.items() if key.startswith('ema_trace')]
    decays = {step: decay for step, decay, *_ in trace}
    decays |= {step: min(0.9998, (1 + step) / (10 + step)) for step in (6, 1000, 44_988, 44_990, 44_992, 10**6)}
    ema_decay = resolve('mirl_vit_base_finetune').ema_decay
    model = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    for step, decay in decays.items():
        nn.init.ones_(model.weight)
        ema = optim.WeightAverage(model, ema_decay)
        assert ema.module.weight.item() == 1
        nn.init.zeros_(model.weight)
        ema.update(model, step, skipped=torch.zeros((), dtype=torch.float64))
        assert ema.module.weight.item() == pytest.approx(decay, rel=1e-12), step
    assert max(decays.values()) == 0.9998


# --------------------------------------------------------------------------
# what can be wrong with a recipe


def parse_text(tmp_path, text: str, *flags: str, stage: str = 'pretrain'):
    path = tmp_path / 'mine.yaml'
    path.write_text(text)
    return MAINS[stage].get_args_parser().parse(['--config', str(path), *flags], stage=stage)


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('epoch: 5', "unknown key 'epoch'; did you mean epochs"),
        ('drop_path: 0.1', "unknown key 'drop_path'"),
        ('config: other.yaml', "unknown key 'config'"),
        ('help: true', "unknown key 'help'"),
        ('7: 5', 'unknown key 7'),
        ('epochs: many', 'epochs must be a whole number, got many'),
        ('epochs: 5.5', 'epochs must be a whole number, got 5.5'),
        ('epochs: true', 'epochs: invalid value True'),
        ('epochs:', 'epochs: invalid value None'),
        ('epochs: [5, 6]', r'epochs: expected one value, got \[5, 6\]'),
        ('blr: fast', 'blr must be a number, got fast'),
        ('betas: 0.9', 'betas: expected a list of 2, got 0.9'),
        ('betas: [0.9, 0.95, 1]', r'betas: expected a list of 2, got \[0.9, 0.95, 1\]'),
        ('betas: [0.9, high]', 'betas must be a number, got high'),
        ('lr_decay_epochs: 3', 'lr_decay_epochs: expected a list, got 3'),
        ('compile: 1', 'compile: expected true or false, got 1'),
        ('amp_dtype: fp8', "amp_dtype: 'fp8' is not one of bf16, fp16, none"),
        ('model_kwargs: [num_segments=6]', 'model_kwargs: expected key: value pairs'),
        ('model: {name: mirl}', "model: invalid value {'name': 'mirl'}"),
        ('- epochs', 'is not a recipe'),
        ('recipe: mine', 'is not a recipe'),
        ('', 'is not a recipe'),
        ('epochs: [1', 'cannot be read as a recipe'),
        ('recipe: {stage: finetune}\nepochs: 5', r'is a recipe for main_finetune.py, not for main_pretrain.py'),
    ],
)
def test_mistakes_name_the_key(tmp_path, text, message, capsys):
    with pytest.raises(UserError, match=message):
        parse_text(tmp_path, text)
    with pytest.raises(SystemExit) as stop:
        run_main(lambda: parse_text(tmp_path, text))
    assert stop.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert 'mine.yaml' in line


def test_recipe_for_the_other_main():
    for name, stage in (('mirl_vit_base_finetune', 'pretrain'), ('mirl_vit_base_pretrain_300ep', 'finetune')):
        with pytest.raises(UserError, match=f'is a recipe for main_{stage_of(name)}.py, not for main_{stage}.py'):
            MAINS[stage].get_args_parser().parse(['--config', name], stage=stage)


def test_names_and_paths(tmp_path, monkeypatch):
    name = 'mirl_vit_base_finetune'
    by_name = vars(resolve(name))
    for other in (f'{name}.yaml', str(RECIPES / f'{name}.yaml')):
        assert vars(resolve(other)) | {'config': Path(name)} == by_name
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()  # a run's folder of that name is no recipe
    assert vars(resolve(name)) == by_name

    for wrong in ('mirl_vit_base_fintune', 'scripts/recipes/mirl_vit_base_fintune.yaml'):
        with pytest.raises(
            UserError, match=f'there is no recipe {wrong}; did you mean mirl_vit_base_finetune or '
        ) as e:
            resolve(wrong)
        assert '\n' not in str(e.value)
    with pytest.raises(UserError, match=r'there is no recipe zzz; those in .*recipes go by their names'):
        resolve('zzz')


def test_config_without_a_name():
    with pytest.raises(UserError, match='--config: expected one argument'):
        main_pretrain.get_args_parser().parse(['--config'])


def test_values_as_yaml_writes_them(tmp_path):
    """YAML takes 1e-3 for a string and 1 for an integer; flags have types of their own. Dashes are underscores."""
    args = parse_text(tmp_path, 'blr: 1e-3\nmin-lr: 1\nbetas: [0, 9e-1]\nmodel_kwargs: {num_segments: 2}\nmask_ratio:')
    assert (args.blr, args.min_lr, args.betas, args.mask_ratio) == (1e-3, 1.0, [0.0, 0.9], None)
    assert all(isinstance(value, float) for value in (args.min_lr, *args.betas))
    assert args.model_kwargs == {'num_segments': 2}
    for text, pool in (('cls_token: true', False), ('cls_token: false', True), ('global_pool: false', False)):
        assert parse_text(tmp_path, text, stage='finetune').global_pool is pool
    for text, norm in (
        ('norm_pix_loss: true', True),
        ('norm_pix_loss: false', False),
        ('no_norm_pix_loss: true', False),
    ):
        assert parse_text(tmp_path, text).norm_pix_loss is norm


def test_flags_over_recipe():
    name = 'mirl_vit_base_pretrain_800ep'
    args = resolve(name, '--epochs', '10', '--no-norm-pix-loss', '--model-kwargs', 'num_segments=6')
    assert (args.epochs, args.norm_pix_loss, args.model_kwargs) == (10, False, {'num_segments': 6})
    assert (args.blr, args.effective_batch_size) == (1.5e-4, 4096)

    # a switch of a recipe can be put off, and clipping too
    tuned = resolve('mirl_vit_base_depth48_finetune', '--no_use_ema', '--clip-grad', '0')
    assert (tuned.use_ema, tuned.clip_grad) == (False, 0)
    with pytest.raises(UserError, match='unknown argument --no_epochs'):
        resolve(name, '--no_epochs')

    # options are added to the recipe's
    assert resolve(name, '--model_kwargs', 'decoder_depth=1').model_kwargs == {'num_segments': 4, 'decoder_depth': 1}

    # either of two flags for one thing displaces what the recipe says with the other
    assert optim.accumulation(resolve(name, '--accum_iter', '3')) == 3
    assert optim.scaled_lr(resolve(name, '--lr', '0.1'), 1)[0] == 0.1
    assert optim.accumulation(resolve(name, '--batch_size', '32')) == 128


def test_blr_flag_displaces_a_recipes_lr(tmp_path):
    assert parse_text(tmp_path, 'lr: 0.1').lr == 0.1
    assert parse_text(tmp_path, 'lr: 0.1', '--blr=1e-3').lr is None
