"""Whole programs on the GPU: killed and resumed, evaluated, out of memory, on two ranks, compiled, judged, tried."""

import csv
import gc
import json
import re
import subprocess
import sys

import pytest
import torch
from methods.test_contract import QUICK, size_of
from training import MAINS, MIXED, ROOT, SHORT, arguments, command, environment, equal_states, places, train

from util import build
from util.data import augment, datasets, named
from util.errors import DivergedError, ResourceError
from util.weights import read_checkpoint

LAST = 'checkpoint-last.pth'
KILLED = {f'pretrain {name}': ('pretrain', ['--model', name, '--input_size', size_of(name)]) for name in QUICK}
KILLED |= {'fine-tuning': ('finetune', MIXED), 'LAMB': ('pretrain', ['--opt', 'lamb', '--accum_iter', '2'])}


def begin(line, **variables):
    """A process of its own: one that is forked cannot use a GPU that its parent has used."""
    env = environment() | variables
    return subprocess.Popen(map(str, line), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)


def ended_well(*processes):
    said = [process.communicate(timeout=300)[0] for process in processes]
    assert not any(process.returncode for process in processes), '\n'.join(said)
    return said


def main(stage, data, output, *more):
    program = MAINS[stage]
    return program.main(program.get_args_parser().parse(arguments(data, output, *more), stage=stage))


def losses(folder):
    return [json.loads(line)['train_loss'] for line in (folder / 'log.txt').read_text().splitlines()]


@pytest.mark.parametrize(('stage', 'flags'), KILLED.values(), ids=KILLED)
def test_deterministic_run_repeats_to_the_bit_after_a_kill(stage, flags, images, tmp_path, device):
    flags = [*SHORT, '--device', device, '--deterministic', '--save_freq_steps', 1, *flags]
    whole = begin(command(stage, images, tmp_path / 'whole', *flags))
    killed = begin(command(stage, images, tmp_path / 'killed', *flags))
    for line in killed.stdout:
        if re.search(r'\[3/\d\]', line):
            killed.kill()
    assert killed.wait() == -9
    ended_well(whole, begin(command(stage, images, tmp_path / 'killed', *flags, '--resume', 'auto')))
    assert equal_states(*(read_checkpoint(tmp_path / name / LAST) for name in ('whole', 'killed')))


@pytest.mark.parametrize('name', ['mirl_vit_tiny', 'a2mim_resnet_tiny'])
def test_evaluation_is_that_of_the_cpu(name, images, tmp_path, device):
    """A network that the GPU has trained: the same answers to all images, and probabilities to 1e-4."""
    train('finetune', images, tmp_path / 'run', '--device', device, '--model', name, *SHORT, *MIXED)
    tables = []
    for where in (device, 'cpu'):
        table = tmp_path / f'{torch.device(where).type}.csv'
        flags = ['--eval', '--resume', tmp_path / 'run' / LAST, '--predictions', table, '--amp_dtype', 'none']
        main('finetune', images, tmp_path / 'none', '--model', name, '--device', where, *flags)
        tables.append(list(csv.DictReader(table.open())))
    for ours, theirs in zip(*tables, strict=True):
        assert [ours['file'], ours['top1']] == [theirs['file'], theirs['top1']]
        assert float(ours['top1_p']) == pytest.approx(float(theirs['top1_p']), abs=1e-4)


@pytest.mark.parametrize('first', ['gpu', 'cpu'])
def test_a_run_goes_on_on_the_other_device(first, images, tmp_path, device):
    """Its checkpoint holds tensors of no device."""
    there, then = (device, 'cpu') if first == 'gpu' else ('cpu', device)
    flags = [*SHORT, '--model', 'a2mim_resnet_tiny', '--amp_dtype', 'none']
    train('pretrain', images, tmp_path, '--device', there, *flags)
    state = read_checkpoint(tmp_path / LAST)
    assert all(value.device.type == 'cpu' for value in state['model'].values())
    train('pretrain', images, tmp_path, '--device', then, *flags, '--epochs', 3, '--resume', 'auto')
    assert len(losses(tmp_path)) == 3


def test_out_of_memory_is_told_and_mended(images, tmp_path, device):
    """With less memory than it needs, a run ends in one line, whose advice is followed until it fits."""
    flags = ['--device', device, '--input_size', 224, '--epochs', 1, '--lr', 1e-3, '--amp_dtype', 'none']
    total, less = torch.cuda.get_device_properties(device).total_memory, '--batch_size 64'
    trials = []
    while less:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**28) / total)
        trials.append(less)
        less = advised(lambda: train('pretrain', images, tmp_path / f'{len(trials)}', *flags, *trials[-1].split()))
    assert len(trials) > 1


def advised(run):
    """What a run that has too little memory says would take less; nothing of one that ends well."""
    try:
        run()
    except ResourceError as error:
        said = str(error)
    else:
        return None
    told = re.search(
        r'out of GPU memory in a training step at --batch_size \d+; [\d.]+ \w+ more were asked for, [\d.]+ \w+ '
        r'of [\d.]+ \w+ are free; the same batch of a step in less memory: (.*); --grad_checkpoint$',
        said,
    )
    assert told, said
    return told[1]


@pytest.mark.parametrize('backend', ['gloo', 'nccl'])
def test_two_ranks_train_as_one(backend, images, tmp_path, device):
    """On one GPU over gloo, on two over NCCL: the losses of one rank with twice the batch."""
    if backend == 'nccl' and torch.cuda.device_count() < 2:
        pytest.skip('NCCL needs two GPUs')
    flags = [*SHORT, '--amp_dtype', 'none', '--save_freq_steps', 2, '--device', device]
    script = 'tests/gpu/two_ranks.py' if backend == 'gloo' else ''
    line = command('pretrain', images, tmp_path / 'two', *flags, '--batch_size', 4, script=script)
    ended_well(*(begin(line, **place) for place in places(2)))
    train('pretrain', images, tmp_path / 'one', *flags)
    assert losses(tmp_path / 'two') == pytest.approx(losses(tmp_path / 'one'), rel=1e-3)


@pytest.mark.parametrize(('stage', 'flags'), [('pretrain', []), ('finetune', MIXED)], ids=['pretrain', 'finetune'])
def test_compiled_run(stage, flags, images, tmp_path, device):
    """Its losses are those of the other, to 1 % in bf16: a compiled network rounds less often."""
    for name, more in (('eager', []), ('compiled', ['--compile'])):
        train(stage, images, tmp_path / name, *SHORT, '--device', device, *flags, *more)
    assert losses(tmp_path / 'compiled') == pytest.approx(losses(tmp_path / 'eager'), rel=0.01)


@pytest.mark.parametrize('workers', [0, 2])
def test_batches_are_pinned_by_loader_processes(workers, images, tmp_path, device):
    flags = ['--num_workers', workers, '--batch_size', 8, '--device', device]
    args = MAINS['pretrain'].get_args_parser().parse(arguments(images, tmp_path, *flags), stage='pretrain')
    found = named.training_images(args).images
    files = datasets.ImageFiles(found, None, augment.pretrain_transform(32, (0.2, 1), 0.5), args.seed)
    for imgs, labels in build.loader(files, build.epoch_batches(args, len(found)), args, device):
        assert imgs.is_pinned()
        assert labels.is_pinned()
        moved = datasets.to_device(imgs, device)
        assert torch.equal(moved.cpu(), imgs)


def test_pictures_and_neighbours(images, tmp_path, device):
    """What a pretraining tells of itself meanwhile."""
    flags = [*SHORT, '--device', device, '--vis_freq', 1, '--knn_freq', 1, '--model', 'a2mim_resnet_tiny']
    train('pretrain', images, tmp_path, *flags)
    last = json.loads((tmp_path / 'log.txt').read_text().splitlines()[-1])
    assert 0 <= last['knn_top1'] <= 100
    assert last['rank'] >= 1
    assert (tmp_path / 'pictures-1.png').exists()


def test_analysis_is_that_of_the_cpu(images, tmp_path, device):
    train('pretrain', images, tmp_path / 'run', *SHORT, '--device', device)
    numbers = []
    for where in (device, 'cpu'):
        what = ['knn', '--layers', 'all', '--probe', 'ridge', '--data_path', images, '--num_workers', 0]
        what += ['--device', where, '--output_dir', tmp_path / str(where), '--checkpoint', tmp_path / 'run' / LAST]
        ended_well(begin([sys.executable, ROOT / 'scripts/analyse.py', *what]))
        numbers.append(accuracies(json.loads((tmp_path / str(where) / 'knn.json').read_text())))
    assert numbers[0]
    assert numbers[0] == pytest.approx(numbers[1], abs=100 / 15 + 0.01)  # of 15 images one may lie between two


def accuracies(thing, name=''):
    """{path: number} of all that is measured in a JSON."""
    if isinstance(thing, dict | list):
        items = thing.items() if isinstance(thing, dict) else enumerate(thing)
        return {k: v for key, value in items for k, v in accuracies(value, f'{name}/{key}').items()}
    return {name: thing} if re.search('top|rank|probe', name) and isinstance(thing, float) else {}


def test_dry_run(images, tmp_path, device, capsys):
    torch.cuda.set_per_process_memory_fraction(0.1)
    main('pretrain', images, tmp_path / 'none', *SHORT, '--device', device, '--dry_run')
    said = capsys.readouterr().out
    assert re.search(r'largest batch in the [\d.]+ \w+ of GPU memory: [\d,]+( or more)? images \(tried\)', said)
    assert not (tmp_path / 'none').exists()


def test_a_diverged_run_is_diagnosed(images, tmp_path, device, monkeypatch):
    """What the host learns late is told as the step in which it was; the weights are those from before it."""

    def forward_with_nan(training, batch, global_step, micro, forward=sys.modules['engine_pretrain'].forward):
        loss, terms = forward(training, batch, global_step, micro)
        return loss * (float('nan') if global_step >= 2 else 1.0), terms

    monkeypatch.setattr('engine_pretrain.forward', forward_with_nan)
    with pytest.raises(DivergedError, match='epoch 0, step 4 of 8'):
        train('pretrain', images, tmp_path, *SHORT, '--device', device, '--print_freq', 8, '--max_bad_steps', 1)
    assert all(value.isfinite().all() for value in read_checkpoint(tmp_path / 'diagnosis.pth')['model'].values())
