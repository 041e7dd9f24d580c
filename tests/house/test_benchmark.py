"""The benchmark: both arms train alike, it measures what it says, and what it counts is what the page says."""

import itertools
import json
import math
import shutil

import pytest
import torch
from training import HostReads

from scripts import benchmark
from util.errors import UserError

CPU = torch.device('cpu')
SMALL = ['--device', 'cpu', '--batch_size', '2', '--num_workers', '0', '--rounds', '1', '--steps', '2']
TINY = 'mirl_vit_tiny,input_size=32'


def parse(*words):
    return benchmark.get_args_parser().parse([*map(str, words)], stage='pretrain')


def run(output, *words):
    benchmark.main(parse(*words, *SMALL, '--output', output))
    return json.loads(output.read_text())


def arms(model):
    args = benchmark.pretraining_args(parse('step', *SMALL), model)
    return benchmark.synthetic(args, CPU), {name: make(args, CPU, 12) for name, make in benchmark.ARMS.items()}


@pytest.mark.parametrize('model', [TINY, 'a2mim_resnet_tiny,input_size=32', 'mixmae_tiny,input_size=32,clip_grad=1'])
def test_both_arms_train_alike(model):
    """So that they are compared for the same work."""
    data, made = arms(f'{model},lr=1e-3,warmup_epochs=0')
    losses = {name: [arm.run(data[name], 1) for _ in range(4)] for name, arm in made.items()}
    assert losses['plain'] == pytest.approx(losses['ours'], rel=1e-4)
    assert losses['ours'][-1] != pytest.approx(losses['ours'][0], rel=5e-3)  # they learn


def test_our_steps_never_wait():
    """No more than the averages at the end, in one transfer; the plain loop reads a loss at each step."""
    data, made = arms(TINY)
    reads = {}
    for name, steps in itertools.product(made, (1, 3)):
        with HostReads() as mode:
            made[name].run(data[name], steps)
        reads[name, steps] = len(mode.found)
    assert reads['ours', 1] == reads['ours', 3] == 0
    assert reads['plain', 3] >= reads['plain', 1] + 2 > 2


def test_results_are_kept_and_shown(tmp_path, monkeypatch):
    output, page = tmp_path / 'results.json', tmp_path / 'performance.md'
    [record] = run(output, 'step', '--model', TINY)
    ours, plain = record['rows']
    assert (ours['arm'], plain['arm']) == ('ours', 'plain')
    assert ours['plain / ours'] is None  # of one round
    assert ours['images/s'] == pytest.approx(2000 / ours['ms a step'])
    assert record['machine']['versions']['torch'] == torch.__version__

    monkeypatch.setattr(benchmark, 'step', None)  # it would fail
    assert run(output, 'step', '--model', TINY) == [record]

    shutil.copy(benchmark.PAGE, page)
    record |= {'model': 'mixmae_base'}
    output.write_text(json.dumps([record]))
    benchmark.report([output], page)
    [line] = [line for line in page.read_text().splitlines() if line.startswith('| `mixmae_base')]
    assert line.endswith(f'| not measured | {benchmark.measured(record)} |')
    assert page.read_text().count('<!-- end -->') == benchmark.PAGE.read_text().count('<!-- end -->')


@pytest.mark.parametrize('what', ['data', 'train', 'checkpoint', 'targets'])
def test_what_else_is_measured(what, images, tmp_path):
    words = ['--model', TINY] if benchmark.WHATS[what].of_model else ['--images', '6', '--workers', '0', '1']
    [record] = run(tmp_path / 'results.json', what, *words, '--data_path', images, '--feed', '1000')
    values = [value for row in record['rows'] for value in row.values() if isinstance(value, float)]
    assert values
    assert all(map(math.isfinite, values))
    if what == 'targets':
        assert all(float(row['relative difference']) < 1e-5 for row in record['rows'])


def test_an_arm_without_memory_is_a_row(tmp_path, monkeypatch):
    def run_out(*_):
        raise RuntimeError('CUDA out of memory. Tried to allocate 2.00 GiB')

    monkeypatch.setattr(benchmark.Plain, 'run', run_out)
    monkeypatch.setattr(benchmark, 'costs', lambda _: benchmark.Costs(1, 1))
    ours, plain = run(tmp_path / 'results.json', 'step', '--model', TINY)[0]['rows']
    assert plain['images/s'] == 'out of memory'
    assert ours['images/s'] > 0


def test_a_ratio_needs_rounds():
    assert benchmark.ratio([2.0] * 4, [1.0] * 4) is None
    assert benchmark.ratio([2.0, 2.0, 2.0, 1.0, 4.0], [1.0] * 5) == [2.0, 1.0, 4.0]


@pytest.mark.parametrize(
    ('words', 'line'),
    [
        (['step'], 'step needs --model NAME'),
        (['step', '--model', 'mixmae_bas'], 'unknown --model mixmae_bas; did you mean mixmae_base'),
        (['step', '--model', f'{TINY},lr'], "behind a comma, FLAG=VALUE is expected, got 'lr'"),
        (['report'], 'report needs --from_json FILE.json'),
        (['report', '--from_json', 'README.md'], 'README.md: not a file of this program'),
        (['report', '--from_json', 'none.json'], 'none.json: No such file or directory'),
    ],
)
def test_mistakes(words, line):
    with pytest.raises(UserError, match=line.replace('.', r'\.')):
        benchmark.main(parse(*words, '--device', 'cpu'))


@pytest.mark.faults  # seconds each
@pytest.mark.parametrize('model', benchmark.MODELS)
def test_nothing_is_computed_in_vain(model):
    """Parameters and FLOPs of an image are those of the page, which others have counted too."""
    params, gflops = benchmark.MODELS[model]
    cost = benchmark.costs(benchmark.pretraining_args(parse('step', *SMALL), model))
    assert cost.params / 1e6 == pytest.approx(params, rel=0.002)
    assert cost.step / 1e9 == pytest.approx(gflops, rel=0.02)
