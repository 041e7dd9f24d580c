"""Comparisons: what methods and budgets mean, which commands they become, and what is read of their runs."""

import json
import re
import shutil
import time
from pathlib import Path

import pytest
from training import MAINS

import main_pretrain
from scripts import analyse, compare
from util import digests, dry_run
from util.comparison import charts, jobs, report
from util.comparison.plan import Method
from util.errors import UserError
from util.recipes import find_recipe

SMALL = ['--num_workers', '0', '--finetune_epochs', '2', '--budget', 'epochs', '2', '--seeds', '0']


@pytest.fixture(autouse=True)
def uncounted(request, monkeypatch):
    """FLOPs and parameters that take no time, where a test does not ask for `counted`."""
    if 'counted' not in request.fixturenames:
        monkeypatch.setattr(compare, 'pretrain_flops', lambda args: 1e8)
        monkeypatch.setattr(compare, 'finetune_flops', lambda args, classes: (2e8, 1000))


@pytest.fixture
def counted():
    """FLOPs as they are."""


def parsed(images, output, *more):
    argv = ['--data_path', images, '--output_dir', output, *SMALL, *more]
    return compare.get_args_parser().parse([str(word) for word in argv], stage='finetune')


def asked(images, output, *more):
    return compare.asked(parsed(images, output, *more), {})


def said(images, output, *more) -> str:
    with pytest.raises(UserError) as error:
        compare.main(parsed(images, output, *more))
    return str(error.value)


def in_this_process(listed, folder, at_once, environment):
    """`jobs.run` without its seconds for each program's imports; a program that fails is one that failed."""
    for job in listed:
        name, *argv = [*job.command, *job.how]
        done = {'state': 'done', 'why': '', 'seconds': 0.0, 'cpu_s': 1.0, 'peak_bytes': 1}
        began = time.perf_counter()
        try:
            if name == 'scripts/analyse.py':
                analyse.main(analyse.parsed(argv))
            else:
                stage = name.removeprefix('main_').removesuffix('.py')
                MAINS[stage].main(MAINS[stage].get_args_parser().parse(argv, stage=stage))
        except UserError as error:
            done |= {'state': 'failed', 'why': str(error)}
        record = {'argv': job.command, **done, 'seconds': time.perf_counter() - began}
        digests.replace(folder / job.name / 'job.json', json.dumps(record).encode())


def test_a_comparison(images, tmp_path, capsys, monkeypatch, counted):
    """Of two methods, one of which cannot be pretrained: the numbers are those of the runs, the failure is a row."""
    monkeypatch.setattr(jobs, 'run', in_this_process)
    monkeypatch.setattr(charts, 'draw', lambda found, folder: [])  # seconds, which a test of the page takes
    methods = ['--methods', 'mirl:depth=4,lr=1e-3', 'broken=mirl:depth=4,init=nowhere.pth', 'random']
    flags = [*methods, '--labels', '0.3', '--points', '2', '--finetune_points', '1']
    assert 'programs failed, the first: broken/seed-0/pretrain: ' in said(images, tmp_path, *flags)
    output = capsys.readouterr().out
    assert '16 instead of 64 images a step in main_pretrain.py, since there are 66' in output

    found = json.loads((tmp_path / 'results.json').read_text())
    ours, broken = found['methods']
    assert (ours['name'], ours['epochs'], ours['options']) == ('mirl-depth=4-lr=1e-3', 2, {'depth': '4', 'lr': '1e-3'})
    assert found['data'] == {'what': images.name, 'val_share': None, 'train': 66, 'val': 15, 'classes': 3} | {
        'largest': pytest.approx(100 / 3)
    }
    [run] = ours['runs']
    assert run['state'] == 'done'
    assert [point['epoch'] for point in run['curve']] == [1, 2]
    assert all({'knn', 'probe', 'rank'} < point.keys() for point in run['points'])
    assert [[*point['finetune']] for point in run['points']] == [[], ['0.3']]
    log = (tmp_path / f'runs/{ours["name"]}/seed-0/epoch-2/labels-0.3/log.txt').read_text().splitlines()
    assert run['points'][1]['finetune']['0.3'] == json.loads(log[-1])['test_acc1']
    assert ours['flops']['pretrain'] == run['points'][1]['flops'] == 2 * run['points'][0]['flops']
    assert run['minutes'] == pytest.approx(2 * 64 / run['images_per_s'] / 60)
    assert (tmp_path / run['pictures']).is_file()
    [failed] = broken['runs']
    assert failed['state'] == 'failed'
    assert 'nowhere.pth' in failed['why']
    assert found['random'].keys() == {ours['name']}  # both have the same
    assert found['random'][ours['name']]['runs'][0].keys() >= {'knn', 'probe', 'finetune'}
    assert 'nowhere.pth' in (tmp_path / 'report.html').read_text()
    assert run['commands'][0].endswith('--device cpu --num_workers 0')
    flops, top1, _ = charts.over(found, ours, ('finetune', '0.3'), 'flops', 1)
    assert flops == [0, ours['flops']['pretrain']]
    assert top1[1] == run['points'][1]['finetune']['0.3']
    assert charts.curve(ours, 'explained')[0] == [1, 2]

    monkeypatch.setattr(jobs, 'run', None)  # --report runs nothing, and keeps what was said of the machine
    monkeypatch.setattr(report, 'write', lambda found, folder: None)
    with pytest.raises(UserError, match='failed, the first: broken'):
        compare.main(compare.get_args_parser().parse(['--output_dir', str(tmp_path), '--report']))
    assert json.loads((tmp_path / 'results.json').read_text()) == found


def test_later_calls(images, tmp_path, monkeypatch):
    """They have what the first one had, and may add methods, seeds and labels; its commands stay the same."""
    calls = []
    monkeypatch.setattr(jobs, 'run', lambda *given: calls.append({job.name: job.command for job in given[0]}))
    monkeypatch.setattr(compare, 'show', lambda found, folder: None)
    compare.main(parsed(images, tmp_path, '--methods', 'mirl', '--mean', '0.5', '0.5', '0.5'))
    monkeypatch.setattr(compare, 'described', None)  # what is known is not counted again

    def again(*flags):
        compare.main(compare.get_args_parser().parse(['--output_dir', str(tmp_path), *flags]))

    again('--seeds', '1', '--labels', '0.5', '--num_workers', '3')
    assert calls[0].items() < calls[1].items()
    assert {name.split('/')[1] for name in calls[1]} == {'seed-0', 'seed-1'}
    assert 'mirl/seed-0/epoch-1/labels-0.5' in calls[1]
    assert all('0.5' in command for command in calls[1].values())  # --mean
    for flags, line in (
        (['--budget', 'epochs', '3'], 'holds a comparison with --budget epochs 2, not --budget epochs 3'),
        (['--methods', 'mirl=mirl:lr=1e-3'], 'mirl and mirl=mirl:lr=1e-3 have one name'),
    ):
        with pytest.raises(UserError, match=re.escape(line)):
            again(*flags)
    data = shutil.copytree(images, tmp_path / 'data')
    plan = json.loads((tmp_path / 'plan.json').read_text())
    plan['flags']['data_path'] = str(data)
    (tmp_path / 'plan.json').write_text(json.dumps(plan))
    next(data.glob('train/*/*')).unlink()
    with pytest.raises(UserError, match='the images are not those of the runs'):
        again()


# --------------------------------------------------------------------------
# methods


def test_every_method_has_its_recipes(images, tmp_path):
    """For pretraining, fine-tuning and a linear probe; their commands are what the programs take."""
    comparison = asked(images, tmp_path, '--labels', '0.2', '1')
    assert [method.name for method in comparison.methods] == [*compare.SHORT]
    for method in comparison.methods:
        assert all('_cifar10_' in name for name in method.recipes)
        assert find_recipe(Path(f'{method.model}_cifar10_linprobe'))
    for job in comparison.jobs():
        name, *argv = job.command
        if name == 'scripts/analyse.py':
            assert analyse.parsed(argv).crop_pct == 1
        else:
            stage = name.removeprefix('main_').removesuffix('.py')
            args = MAINS[stage].get_args_parser().parse(argv, stage=stage)
            assert args.output_dir == comparison.runs / job.name
            assert args.warmup_epochs == args.epochs / 10
        assert job.cost > 0
    assert len({job.name for job in comparison.jobs()}) == len(comparison.jobs()) == 7 * (1 + 1 + 2 * 2) + 7 * 3


def test_what_a_method_means(images, tmp_path):
    comparison = asked(
        images,
        tmp_path,
        *('--methods', 'a=mirl:depth=4,num_segments=2,mask_ratio=0.5,warmup_epochs=0.5,finetune.mixup=0.8'),
        *('localmim_swin', '--enlarge', '2', '--pretrain', 'weight_decay=0.1', '--finetune', 'smoothing=0'),
    )
    mirl, swin = comparison.methods
    before = MAINS['pretrain'].get_args_parser().parse(mirl.pretrain, stage='pretrain')
    after = MAINS['finetune'].get_args_parser().parse(mirl.finetune, stage='finetune')
    assert (before.mask_ratio, before.weight_decay, before.input_size, after.input_size) == (0.5, 0.1, 64, 64)
    assert before.model_kwargs | {'depth': 4, 'num_segments': 2, 'patch_size': 8} == before.model_kwargs
    assert (after.mixup, after.smoothing, after.model_kwargs['depth'], after.model_kwargs['patch_size']) == (
        0.8,
        0,
        4,
        8,
    )
    assert 'num_segments' not in after.model_kwargs
    [first, *_] = comparison.jobs()
    assert MAINS['pretrain'].get_args_parser().parse(first.command[1:], stage='pretrain').warmup_epochs == 0.5
    assert compare.parsed('pretrain', swin.pretrain, parsed(images, tmp_path)).input_size == 128


def test_programs_share_cores_and_gpus(images, tmp_path, monkeypatch):
    monkeypatch.setattr(compare.config, 'usable_cores', lambda: 8)
    args = parsed(images, tmp_path, '--device', 'cpu')
    assert (compare.programs(args), compare.environment(args, 3)) == (8, {'OMP_NUM_THREADS': '1'})
    args.device = 'cuda'
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '2,5')
    slots = [compare.environment(args, slot) for slot in range(3)]
    assert slots == [{'OMP_NUM_THREADS': '4', 'CUDA_VISIBLE_DEVICES': gpu} for gpu in '252']


def test_equal_networks_share_their_random_weights(images, tmp_path):
    comparison = asked(images, tmp_path, '--methods', 'mirl', 'b=mirl:mask_ratio=0.5', 'c=mirl:depth=4', 'random')
    shared = comparison.random_of()
    assert [shared[name].name for name in ('mirl', 'b', 'c')] == ['mirl', 'mirl', 'c']
    assert not asked(images, tmp_path, '--methods', 'mirl').random_of()


def test_mistakes(images, tmp_path, counted):
    for words, line in (
        (['--methods', 'mirk'], 'unknown mirk; did you mean mirl'),
        (['--methods', 'mirl:depth'], "expected KEY=VALUE behind the colon, got 'depth'"),
        (['--methods', 'mirl', 'mirl=mixmae'], 'mirl and mirl=mixmae have one name'),
        (['--methods', 'mirl,mixmae'], 'expected [LABEL=]NAME[:KEY=VALUE,...], and blanks between methods'),
        (['--methods', 'random=mirl'], 'another LABEL than random'),
        (['--methods', 'mirl:seed=3'], 'compare.py sets --seed of main_pretrain.py itself'),
        (['--methods', 'mirl', '--device', 'cuda:1'], 'cuda'),
        (['--report'], 'there is no comparison in'),
        (['--methods', 'mirl', '--output_dir', tmp_path / 'a,b=c'], 'as more than a path'),
        (['--methods', 'random'], 'random weights of which networks'),
        (['--methods', 'mirl:dept=3'], 'has no option dept; did you mean depth'),
        (['--methods', 'mirl', '--budget', 'hours', '3'], '--budget hours 3: expected epochs N, flops N or minutes N'),
        (['--methods', 'mirl', '--budget', 'epochs', '0.5'], 'must be a whole number'),
        (['--methods', 'mirl', '--budget', 'flops', '1e6'], 'a single epoch of mirl takes'),
        (['--methods', 'mirl', '--finetune', 'mixup'], "--finetune expects KEY=VALUE, got 'mixup'"),
        (['--methods', 'mixmae_huge'], 'mixmae_huge has no recipe for main_pretrain.py; mixmae_huge:config=RECIPE'),
        (['--methods', 'mirl', '--data_path', tmp_path / 'none'], 'no such folder'),
    ):
        assert line in said(images, tmp_path / 'out', *words)
        assert not (tmp_path / 'out').exists()
    assert len(asked(images, tmp_path, '--methods', 'mirl', 'mirl').methods) == 1


# --------------------------------------------------------------------------
# budgets


@pytest.mark.parametrize(
    ('epochs', 'points', 'after'),
    [(10, 4, [3, 6, 9, 10]), (6, 4, [2, 4, 6]), (5, 2, [3, 5]), (1, 3, [1]), (8, 1, [8]), (3, 8, [1, 2, 3])],
)
def test_points(epochs, points, after):
    method = Method(*[None] * len(Method._fields))._replace(epochs=epochs)
    assert method.points(points) == after
    assert all(point % method.save_freq(points) == 0 for point in after[:-1])


def test_equal_flops(images, tmp_path, counted):
    """As many whole epochs as come nearest; a share of the labels has as many steps as all of them."""
    comparison = asked(images, tmp_path, '--methods', 'mirl', 'mixmae', '--budget', 'flops', '1e11', '--labels', '0.1')
    for method in comparison.methods:
        one = method.flops(1)
        assert abs(method.flops(method.epochs) - 1e11) <= one / 2
        assert one == 64 * method.image_flops  # of 66 images, 4 steps of 16
        assert comparison.passes(method, 1) == (2, 16)
        assert comparison.passes(method, 0.1) == (8, 6)  # one step each, of an even number of 7 images
        assert comparison.passes(method, 0.001) == (8, 2)


@pytest.mark.parametrize(
    ('options', 'batch', 'micro'),
    [
        ('mixup=0.8', 16, 16),
        ('accum_iter=4', 16, 16),
        ('batch_size=4,accum_iter=4', 16, 4),
        ('batch_size=6,effective_batch_size=960', 12, 6),
    ],
)
def test_the_step_is_what_was_meant(images, tmp_path, options, batch, micro):
    """Whatever a recipe accumulates, with few images and with a share of them; mixup needs an even number."""
    name = 'mirl:' + ','.join(f'finetune.{option}' for option in options.split(','))
    comparison = asked(images, tmp_path, '--methods', name, '--labels', '0.11', '1')
    [method] = comparison.methods
    assert (method.batch, method.micro) == (batch, micro)
    for job in comparison.jobs():
        if job.command[0] == 'main_finetune.py':
            args = MAINS['finetune'].get_args_parser().parse(job.command[1:], stage='finetune')
            few = 7 // micro * micro if micro < 6 else 6
            assert compare.batch_of(args) == (batch if args.label_share == 1 else few)


def test_minutes_are_settled_once(images, tmp_path, monkeypatch):
    """A second call keeps the epochs of the first, whatever the machine does now; an epoch has 4 steps of 16 images."""
    calls = []
    monkeypatch.setattr(jobs, 'run', lambda *given: calls.append(given[0]))
    times = dry_run.Times(wait=0.0, early=0.0, last=1.0, update=0.5)
    estimate = dry_run.Estimate(16, accum_iter=1, ranks=1, times=times, loader=1e9, steps=0, tests=0, test_s=0.0)
    flags = ['--methods', 'mirl', '--budget', 'minutes', '1']
    for estimated in (estimate, None):
        monkeypatch.setattr(main_pretrain, 'main', lambda args, estimated=estimated: estimated)
        monkeypatch.setattr(compare, 'show', lambda found, folder: None)
        compare.main(parsed(images, tmp_path, *flags))
    assert [job.command for job in calls[0]] == [job.command for job in calls[1]]
    assert calls[0][0].command[calls[0][0].command.index('--epochs') + 1] == '10'
