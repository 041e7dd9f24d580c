"""Flags: every old command line still works, ranges are checked wherever a value comes from, and roles at resume."""

import argparse
import pickle
import re

import pytest
import torch
from torch import _inductor
from training import MAINS, PROGRAMS

from scripts import replay_step, run_with_submitit, visualize
from util import build, config
from util.errors import UserError

# What command lines were written with before: MAE's flags, and those that this project added; `=` has the value.
MAE = """
    batch_size=2 epochs=60 accum_iter=2 model=mirl_vit_tiny input_size=32 weight_decay=0.1 lr=1e-3 blr=1e-3 min_lr=0
    warmup_epochs=1 data_path=data output_dir=out log_dir=logs device=cpu seed=1 resume=a.pth start_epoch=1
    num_workers=0 pin_mem no_pin_mem world_size=1 local_rank=-1 dist_on_itp dist_url=env://
"""
MAE_PRETRAIN = 'mask_ratio=0.6 norm_pix_loss'
MAE_FINETUNE = """
    drop_path=0 clip_grad=1 layer_decay=0.5 color_jitter=0.4 aa=none smoothing=0 reprob=0 remode=const recount=2 resplit
    mixup=0.8 cutmix=1 cutmix_minmax=0.2,0.8 mixup_prob=0.5 mixup_switch_prob=0.4 mixup_mode=elem finetune=a.pth
    global_pool cls_token nb_classes=1000 eval dist_eval
"""
OURS = """
    config=mirl_vit_base_STAGE model_kwargs=depth=2 max_pixels=100 mean=0,0,0 std=1,1,1 effective_batch_size=64
    min_lr_absolute warmup_lr_ratio=0.1 warmup_shape=scaled lr_sched=step cosine_start=zero lr_decay_epochs=3,6
    lr_decay_rate=0.5 sched_per_epoch opt=lamb opt_eps=1e-7 betas=0.9,0.9 rule_kwargs=a=1 clip_grad=0 max_bad_steps=2
    hflip=0 bad_images=skip max_bad_images=0.1 data_retries=1 print_freq=5 save_freq=5 save_freq_steps=5 keep_last=1
    amp_dtype=none channels_last no_channels_last grad_checkpoint compile deterministic dist_timeout=60 crop_scale=0.5,1
    dataset=cifar10 download
"""
OURS_PRETRAIN = 'no_norm_pix_loss interpolation=bilinear vis_freq=5 knn_freq=5 knn_data=a knn_images=9,9'
OURS_FINETUNE = """
    val_share=0.1 eval_logits=present use_ema no_use_ema ema_decay=0.9 ema_warmup_epochs=1 ema_warmup_ratio=0.5
    eval_size=40 crop_pct=0.9 repeated_aug=2 criterion=bce predictions=a.csv label_share=0.5 test_freq=2
"""
OLD = [('pretrain', word) for word in f'{MAE} {MAE_PRETRAIN} {OURS} {OURS_PRETRAIN}'.split()]
OLD += [('finetune', word) for word in f'{MAE} {MAE_FINETUNE} {OURS} {OURS_FINETUNE}'.split()]
# where a flag without a value is not `flag: true`
MEANING = {f'no_{name}': (name, False) for name in ('pin_mem', 'norm_pix_loss', 'channels_last', 'use_ema')}
MEANING['cls_token'] = ('global_pool', False)


@pytest.mark.parametrize('dashes', [False, True])
@pytest.mark.parametrize(('stage', 'word'), OLD)
def test_old_command_lines(stage, word, dashes):
    name, _, text = word.replace('STAGE', {'pretrain': 'pretrain_300ep', 'finetune': 'finetune'}[stage]).partition('=')
    flag = f'--{name.replace("_", "-") if dashes else name}'
    args = vars(MAINS[stage].get_args_parser().parse([flag, *filter(None, text.split(','))], stage=stage))
    if not text:
        dest, value = MEANING.get(name, (name, True))
        assert args[dest] is value
    elif '=' not in text:  # as it was written, up to the type
        found = args[name] if isinstance(args[name], list) else [args[name]]
        assert [type(value)(part) for value, part in zip(found, text.split(','), strict=True)] == found
    else:
        assert args[name] == {text[0] if text[1] == '=' else 'depth': int(text[-1])}


def test_switches_have_two_names_and_the_last_one_holds():
    parser = MAINS['finetune'].get_args_parser()
    switches = {name: action for name, action in parser.flags.items() if isinstance(action, config.Switch)}
    assert len({action.dest for action in switches.values()}) > 10
    for action in switches.values():
        on, *off = action.option_strings
        for name in off:
            assert getattr(parser.parse([on, name]), action.dest) is False
            assert getattr(parser.parse([name, on]), action.dest) is True


# --------------------------------------------------------------------------
# ranges


def numbers(parser: config.Parser) -> dict[str, argparse.Action]:
    return {
        action.dest: action
        for action in parser.flags.values()
        if action.type and action.type.__name__ in ('int', 'float')
    }


@pytest.mark.parametrize('stage', PROGRAMS)
def test_no_number_is_nan_or_infinite(stage, tmp_path):
    """From the command line or from a recipe; and every default is within its own range."""
    parser = PROGRAMS[stage].get_args_parser()
    assert len(numbers(parser)) > 30
    for name, action in numbers(parser).items():
        count = action.nargs if isinstance(action.nargs, int) else 1
        for text in ('nan', 'inf', '1e999', 'x', ''):
            with pytest.raises(UserError, match=rf'^(--\w+/)?--{name} must be .*, got {text}$'):
                parser.parse([f'--{name}', *[text] * count])
            (tmp_path / 'a.yaml').write_text(f'{name}: {[text] * count if action.nargs else repr(text)}\n')
            with pytest.raises(UserError, match=rf'a\.yaml: {name} must be .*, got {text}$'):
                parser.parse(['--config', str(tmp_path / 'a.yaml')])
        for value in action.default if isinstance(action.default, list) else [action.default]:
            assert value is None or action.type(str(value)) == value, name


@pytest.mark.parametrize(
    ('kind', 'range', 'inside', 'outside', 'words'),
    [
        (int, dict(least=1), ['1', '9' * 300], ['0', '-1', '9' * 400], 'at least 1'),
        (float, dict(least=0), ['0', '-0', '1e300'], ['-1e-9', 'nan', 'inf'], 'at least 0 and finite'),
        (float, dict(above=0), ['5e-324'], ['0', 'nan', 'inf'], 'more than 0 and finite'),
        (float, dict(least=0, most=1), ['0', '1'], ['1.0000000000000002', '-0.1', 'nan'], 'at least 0 and at most 1'),
        (float, dict(least=0, below=1), ['0', '0.9999999999999999'], ['1', 'nan'], 'at least 0 and less than 1'),
        (float, dict(above=0, most=1), ['5e-324', '1'], ['0', '1.1', 'nan'], 'more than 0 and at most 1'),
        (float, {}, ['-1e300'], ['nan', 'inf', '-inf'], 'finite'),
    ],
)
def test_ranges(kind, range, inside, outside, words):
    convert = config.number(kind, **range)
    assert [convert(text) for text in inside] == [kind(text) for text in inside]
    for text in outside:
        with pytest.raises(argparse.ArgumentTypeError, match=f'^must be {words}, got {text}$'):
            convert(text)


# --------------------------------------------------------------------------
# paths

PARSERS = {module.__name__: module.get_args_parser for module in (*PROGRAMS.values(), visualize, replay_step)}
PARSERS['run_with_submitit'] = run_with_submitit.get_args_parser
PATHS = {
    'main_pretrain': '--config --data_path --output_dir --log_dir --resume',
    'main_finetune': '--config --data_path --output_dir --log_dir --resume --finetune',
    'scripts.finetune_segmentation': '--config --data_path --output_dir --log_dir --resume --finetune --predict',
    'scripts.finetune_detection': (
        '--config --data_path --train_json --train_images --val_json --val_images --output_dir --log_dir --resume '
        '--finetune --predict'
    ),
    'scripts.visualize': '--config --checkpoint --output --detections --annotations images',
    'scripts.replay_step': 'diagnosis',
    'run_with_submitit': '--job_dir --array',
}


def test_every_path_is_one():
    """A flag that names files is a path to its parser, and no default is an empty one."""
    for name, get_args_parser in PARSERS.items():
        actions = get_args_parser()._actions
        found = [
            (*action.option_strings, action.dest)[0]
            for action in actions
            if action.type in (config.path, config.source)
        ]
        assert {*PATHS[name].split()} <= {*found}, name
        for action in actions:
            if re.search('_dir$|^data_path$', action.dest) or action.metavar in ('PATH', 'YAML', 'RECIPE'):
                assert action.type in (config.path, config.source), action.dest
        assert not [action.dest for action in actions if action.default == '']


@pytest.mark.parametrize('kind', [config.path, config.source])
def test_paths(kind, monkeypatch, tmp_path):
    monkeypatch.setenv('HOME', str(tmp_path))
    assert kind('~/runs/x') == kind(str(tmp_path / 'runs/x'))
    assert kind('~') == kind(str(tmp_path))
    assert str(kind('a~/~b')) == 'a~/~b'
    for text in ('', ' ', 'a\0b', '~nobody-of-this-name/x'):
        with pytest.raises(argparse.ArgumentTypeError, match=r'^must be a path, got '):
            kind(text)
    assert config.source('https://host/~me/a.pth#sha256=0') == 'https://host/~me/a.pth#sha256=0'


@pytest.mark.parametrize('stage', PROGRAMS)
def test_paths_on_the_command_line_and_in_recipes(stage, monkeypatch, tmp_path):
    """With a word of its own or behind `=`; an unset variable is a mistake, not a flag that was not given."""
    monkeypatch.setenv('HOME', str(tmp_path))
    parser, recipe = PROGRAMS[stage].get_args_parser(), tmp_path / 'a.yaml'
    for flag in PATHS[PROGRAMS[stage].__name__].split():
        name = flag[2:]
        with pytest.raises(UserError, match=rf"^{flag} must be a path, got ''$"):
            parser.parse([flag, ''])
        if name == 'config':
            continue
        assert str(vars(parser.parse([f'{flag}=~/x']))[name]) == str(tmp_path / 'x')
        recipe.write_text(f'{name}: ~/y\n')
        assert str(vars(parser.parse(['--config=~/a.yaml']))[name]) == str(tmp_path / 'y')
        recipe.write_text(f"{name}: ''\n")
        with pytest.raises(UserError, match=rf"a\.yaml: {name} must be a path, got ''$"):
            PROGRAMS[stage].get_args_parser().parse(['--config', str(recipe)])


# --------------------------------------------------------------------------
# defaults that follow from other values, or from the machine


@pytest.mark.parametrize(('stage', 'most'), [('pretrain', 40), ('finetune', 5)])
def test_the_warm_up_gives_way_to_a_short_run(stage, most, tmp_path):
    """A default and a recipe's; what was given stays, and is refused where it does not fit."""
    recipe = tmp_path / 'a.yaml'
    recipe.write_text('warmup_epochs: 20\nepochs: 100\n')

    def parse(*flags: str) -> argparse.Namespace:
        return MAINS[stage].get_args_parser().parse(list(flags))

    assert [parse('--epochs', str(n)).warmup_epochs for n in (1000, 3)] == [most, 0.3]
    assert parse(f'--config={recipe}').warmup_epochs == 20
    assert parse(f'--config={recipe}', '--epochs', '3').warmup_epochs == 0.3
    with pytest.raises(UserError, match='--warmup_epochs 40 must be less than --epochs 3;'):
        config.check_schedule(parse(f'--config={recipe}', '--epochs', '3', '--warmup_epochs', '40'))


def test_the_loader_follows_the_machine(monkeypatch):
    for cores, launcher, workers in (
        (2, {}, 2),
        (64, {}, 10),
        (64, {'RANK': '0', 'WORLD_SIZE': '8', 'LOCAL_RANK': '0', 'LOCAL_WORLD_SIZE': '8'}, 8),
        (4, {'RANK': '0', 'WORLD_SIZE': '8', 'LOCAL_RANK': '0', 'LOCAL_WORLD_SIZE': '8'}, 1),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(config, 'usable_cores', lambda cores=cores: cores)
            for name, value in launcher.items():
                patch.setenv(name, value)
            assert MAINS['pretrain'].get_args_parser().parse([]).num_workers == workers
            assert MAINS['pretrain'].get_args_parser().parse(['--num_workers', '0']).num_workers == 0


@pytest.mark.parametrize('module', [*PROGRAMS.values(), visualize])
def test_list_of_models(module, capsys):
    with pytest.raises(SystemExit) as end:
        module.get_args_parser().parse(['--model', 'list'])
    assert not end.value.code
    assert 'localmim_swin_base' in capsys.readouterr().out


# --------------------------------------------------------------------------
# what becomes of a flag when a run is resumed


FREE = """
    config data_path output_dir log_dir device dist_url dist_timeout world_size local_rank num_workers pin_mem
    data_retries print_freq save_freq save_freq_steps keep_last vis_freq resume finetune download start_epoch
    batch_size accum_iter effective_batch_size compile grad_checkpoint channels_last max_bad_steps dist_on_itp
    dist_eval resplit max_bad_images given predictions init init_ema finetune_ema knn_freq knn_data knn_images
    dry_run check_data compile_mode test_freq
"""


def roles(stage: str) -> dict[str, set[str]]:
    found = PROGRAMS[stage].get_args_parser().roles
    return {role: {name for name, own in found.items() if own == role} for role in set(found.values())}


def test_roles_at_resume():
    """What decides which sample and which mask comes when must be the same; what decides numbers is told."""
    both = {'model', 'model_kwargs', 'input_size', 'opt', 'seed', 'dataset', 'decoder'}
    pretrain, finetune = roles('pretrain'), roles('finetune')
    assert pretrain.keys() == finetune.keys() == {'same', 'warn', 'free'}
    assert pretrain['same'] == both | {'mask_ratio', 'norm_pix_loss'}
    assert finetune['same'] == both | {'val_share', 'label_share', 'repeated_aug', 'probe'}
    assert pretrain['free'] | finetune['free'] == set(FREE.split())
    assert roles('segment')['same'] == both - {'decoder'} | {'eval_freq', 'reduce_zero_label'}
    network = 'rel_pos neck box_head norm rpn_depth width box_only detector_kwargs'
    free = {'decoder', 'dataset'}  # that it has not
    assert roles('detect')['same'] == both - free | {'eval_freq', 'keep_empty', 'augment', *network.split()}


@pytest.mark.parametrize('stage', PROGRAMS)
def test_arguments_are_plain(stage):
    """They are pickled by the launcher and kept in checkpoints; every one has its role."""
    parser = PROGRAMS[stage].get_args_parser()
    args = parser.parse([])
    assert pickle.loads(pickle.dumps(args)) == args
    assert vars(args).keys() <= parser.roles.keys()
    plain = str | int | float | bool | list | dict | None
    assert all(isinstance(value, plain) for value in config.plain(args).values())


# --------------------------------------------------------------------------
# --help


def test_help_with_a_recipe(capsys):
    """It shows the recipe's values, and flags beside it change nothing."""
    for argv in (['--config', 'mirl_vit_base_finetune', '--help'], ['--help', '--config=mirl_vit_base_finetune']):
        with pytest.raises(SystemExit):
            MAINS['finetune'].get_args_parser().parse(argv, stage='finetune')
        [line] = re.findall(r'--layer_decay float .*\n.*', capsys.readouterr().out)
        assert '(default: 0.6)' in line


@pytest.mark.parametrize('module', [*PROGRAMS.values(), visualize, run_with_submitit])
def test_help(module):
    """Every flag under a heading, with a purpose, and no default that says nothing."""
    parser = module.get_args_parser()
    text = parser.format_help()
    assert max(map(len, text.splitlines())) < 120
    for action in parser.flags.values():
        assert action.help
        assert (action.option_strings[0] in text) == (action.help != argparse.SUPPRESS)
        assert action.heading or action.dest in ('help', 'config', 'checkpoint', 'output', 'count', 'use_ema')
    assert 'None' not in text
    assert 'SUPPRESS' not in text
    assert '[]' not in text
    assert '{}' not in text


def test_compile_mode_reaches_torch(monkeypatch):
    given = {}
    monkeypatch.setattr(torch, 'compile', lambda core, **options: given.update(options) or core)
    parser, core = MAINS['pretrain'].get_args_parser(), torch.nn.Linear(2, 2)
    for flags, mode in ([], 'default'), (['--compile_mode', 'max-autotune'], 'max-autotune-no-cudagraphs'):
        build.in_parallel(core, parser.parse(['--compile', *flags]), torch.device('cpu'))
        assert given == {'fullgraph': True, 'mode': mode}
        assert mode in _inductor.list_mode_options()
