"""Comparisons: what methods and budgets mean, which commands they become, and what is read of their runs."""

import json
import re
import time
from pathlib import Path

import pytest
from training import MAINS

import main_pretrain
from scripts import analyse, compare
from util import digests, dry_run
from util.comparison import jobs
from util.errors import UserError
from util.recipes import find_recipe

SMALL = ['--num_workers', '0', '--finetune_epochs', '2', '--budget', 'epochs', '2', '--seeds', '0']


def parsed(images, output, *more):
    argv = ['--data_path', images, '--output_dir', output, *SMALL, *more]
    return compare.get_args_parser().parse([str(word) for word in argv], stage='finetune')


def asked(images, output, *more):
    args = parsed(images, output, *more)
    args.budget = compare.budget(args.budget)
    return compare.asked(args, {'epochs': {}})


def said(images, output, *more) -> str:
    with pytest.raises(UserError) as error:
        compare.main(parsed(images, output, *more))
    return str(error.value)


def in_this_process(listed, folder, at_once, environment):
    """`jobs.run` without its seconds for each program's imports; a program that fails is one that failed."""
    for job in listed:
        name, *argv = job.command
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


def test_a_comparison(images, tmp_path, capsys, monkeypatch):
    """Of two methods, one of which cannot be pretrained: the numbers are those of the runs, the failure is a row."""
    monkeypatch.setattr(jobs, 'run', in_this_process)
    methods = ['--methods', 'ours=mirl:depth=4,lr=1e-3', 'mirl:depth=4,init=nowhere.pth', 'random', '--labels', '0.3']
    flags = [*methods, '--points', '2', '--finetune_points', '1']
    name = 'mirl-depth=4,init=nowhere.pth'
    assert f'programs failed, the first: {name}/seed-0/pretrain: ' in said(images, tmp_path, *flags)
    output = capsys.readouterr().out
    assert '16 instead of 64 images a step in main_pretrain.py, since there are 66' in output

    found = json.loads((tmp_path / 'results.json').read_text())
    ours, other = found['methods']
    assert (ours['epochs'], ours['options'], ours['random']) == (2, {'depth': '4', 'lr': '1e-3'}, 'ours')
    assert found['data'] == {'what': images.name, 'train': 66, 'val': 15, 'classes': 3}
    [run] = ours['runs']
    assert run['state'] == 'done'
    assert [point['epoch'] for point in run['curve']] == [1, 2]
    assert all({'knn', 'probe', 'rank'} < point.keys() for point in run['points'])
    assert [[*point['finetune']] for point in run['points']] == [[], ['0.3']]
    log = (tmp_path / 'runs/ours/seed-0/epoch-2/labels-0.3/log.txt').read_text().splitlines()
    assert run['points'][1]['finetune']['0.3'] == json.loads(log[-1])['test_acc1']
    assert ours['flops']['pretrain'] == run['points'][1]['flops'] == 2 * run['points'][0]['flops']
    assert (tmp_path / run['pictures']).is_file()
    [failed] = other['runs']
    assert failed['state'] == 'failed'
    assert 'nowhere.pth' in failed['why']
    assert found['random'].keys() == {'ours'}  # both have the same
    assert found['random']['ours']['runs'][0].keys() >= {'knn', 'probe', 'finetune'}
    page = (tmp_path / 'report.html').read_text()
    assert 'ours' in page
    assert 'nowhere.pth' in page

    # the same comparison has the same commands; another one is refused
    again = [job.command for job in asked(images, tmp_path, *flags).jobs()]
    assert {tuple(command) for command in again} >= {
        tuple(json.loads(file.read_text())['argv']) for file in tmp_path.glob('runs/**/job.json')
    }
    assert 'holds a comparison with --points 2, not 3' in said(images, tmp_path, *flags, '--points', '3')


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
        *('--methods', 'a=mirl:depth=4,num_segments=2,mask_ratio=0.5,finetune.mixup=0.8', 'localmim_swin', 'random'),
        *('--enlarge', '2', '--pretrain', 'weight_decay=0.1', '--finetune', 'smoothing=0'),
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
    assert compare.meaning('pretrain', swin.pretrain, parsed(images, tmp_path)).input_size == 128


def test_equal_networks_share_their_random_weights(images, tmp_path):
    comparison = asked(images, tmp_path, '--methods', 'mirl', 'b=mirl:mask_ratio=0.5', 'c=mirl:depth=4', 'random')
    shared = comparison.random_of()
    assert [shared[name].name for name in ('mirl', 'b', 'c')] == ['mirl', 'mirl', 'c']
    assert not asked(images, tmp_path, '--methods', 'mirl').random_of()


def test_mistakes(images, tmp_path):
    for words, line in (
        (['--methods', 'mirk'], 'unknown mirk; did you mean mirl'),
        (['--methods', 'mirl:depth'], "expected KEY=VALUE behind the colon, got 'depth'"),
        (['--methods', 'mirl', 'mirl'], None),
        (['--methods', 'mirl', 'mirl=mixmae'], 'two are called mirl'),
        (['--methods', 'random'], 'random weights of which networks'),
        (['--methods', 'mirl:dept=3'], 'has no option dept; did you mean depth'),
        (['--methods', 'mirl', '--budget', 'hours', '3'], 'hours is none of epochs, flops, minutes'),
        (['--methods', 'mirl', '--budget', 'epochs', '0.5'], 'must be a whole number'),
        (['--methods', 'mirl', '--budget', 'flops', '1e6'], 'an epoch of mirl takes'),
        (['--methods', 'mirl', '--finetune', 'mixup'], "--finetune expects KEY=VALUE, got 'mixup'"),
        (['--methods', 'mixmae_huge'], 'mixmae_huge has no recipe for main_pretrain.py; mixmae_huge:config=RECIPE'),
        (['--methods', 'mirl', '--data_path', tmp_path / 'none'], 'no such folder'),
    ):
        if line:
            assert line in said(images, tmp_path / 'out', *words)
            assert not (tmp_path / 'out').exists()
        else:
            asked(images, tmp_path, *words)


# --------------------------------------------------------------------------
# budgets


@pytest.mark.parametrize(
    ('epochs', 'points', 'after', 'saved'),
    [(10, 4, [2, 4, 6, 10], 5), (5, 2, [2, 5], 3), (1, 3, [1], 1), (8, 1, [8], 1), (3, 8, [1, 2, 3], 3)],
)
def test_points(images, tmp_path, epochs, points, after, saved):
    [method] = asked(images, tmp_path, '--methods', 'mirl', '--budget', 'epochs', str(epochs)).methods
    assert method.points(points) == after
    assert method.saved(points) == saved  # none that is needed is removed
    assert all(point % method.save_freq(points) == 0 for point in after[:-1])


def test_equal_flops(images, tmp_path):
    """As many whole epochs as come nearest; a share of the labels has as many steps as all of them."""
    comparison = asked(images, tmp_path, '--methods', 'mirl', 'mixmae', '--budget', 'flops', '1e11', '--labels', '0.1')
    for method in comparison.methods:
        one = method.flops(1)
        assert abs(method.flops(method.epochs) - 1e11) <= one / 2
        assert one == 64 * method.image_flops  # of 66 images, 4 steps of 16
        assert comparison.passes(method, 1) == (2, 16)
        assert comparison.passes(method, 0.1) == (8, 7)  # one step of 7 images each
        assert comparison.passes(method, 0.001) == (8, 3)  # an image of each class
    words = next(job.command for job in comparison.jobs() if job.name.endswith('labels-0.1'))
    assert re.search(r'--epochs 8 .*--batch_size 7 --label_share 0.1 --test_freq 8', ' '.join(words))


def test_minutes_are_settled_once(images, tmp_path, monkeypatch):
    """A second call keeps the epochs of the first, whatever the machine does now; an epoch has 4 steps of 16 images."""
    calls = []
    monkeypatch.setattr(jobs, 'run', lambda *given: calls.append(given[0]))
    times = dry_run.Times(wait=0.0, early=0.0, last=1.0, update=0.5)
    estimate = dry_run.Estimate(16, accum_iter=1, ranks=1, times=times, loader=1e9, steps=0, tests=0, test_s=0.0)
    flags = ['--methods', 'mirl', '--budget', 'minutes', '1']
    for estimated in (estimate, None):
        monkeypatch.setattr(main_pretrain, 'main', lambda args, estimated=estimated: estimated)
        compare.main(parsed(images, tmp_path, *flags))
    assert [job.command for job in calls[0]] == [job.command for job in calls[1]]
    assert json.loads((tmp_path / 'plan.json').read_text())['epochs'] == {'mirl': 10}
