"""--dry_run: what it says is right, it writes nothing, and the run after it is the same."""

import os
import re
from pathlib import Path

import pytest
import torch
from training import MAINS, SHORT, arguments, equal_states, make_images, run, train

from scripts import run_with_submitit as launcher
from util import console, dry_run
from util.errors import UserError

LINES = ('network: ', 'memory of ', 'memory in ', 'largest batch in ', 'speed: ', 'data: ', 'the whole run: ')


def tree(*folders: Path) -> dict:
    """Every file and folder, with its content and time."""
    paths = [path for folder in folders for path in folder.rglob('*')]
    return {path: (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b'') for path in paths}


def tried(stage: str, data: Path, output: Path, *more: str) -> dry_run.Estimate:
    main = MAINS[stage]
    return main.main(main.get_args_parser().parse([*arguments(data, output, *more), '--dry_run'], stage=stage))


def line(out: str, begin: str) -> str:
    [found] = [line for line in out.splitlines() if line.startswith(begin)]
    return found


def test_nothing_is_written_and_the_run_stays_the_same(images, tmp_path, monkeypatch, capsys):
    """Fine-tuning, in the folder of a run that can go on; a run that comes after it ends with the same bytes."""
    monkeypatch.chdir(tmp_path)
    folder, flags = tmp_path / 'run', [*SHORT, '--accum_iter', '2', '--use_ema', '--resume', 'auto']
    after = train('finetune', images, folder, *flags)
    monkeypatch.setattr(console, 'file', None)  # what a process says is kept in the folder of its run
    before = tree(tmp_path, images)
    estimate = tried('finetune', images, folder, *flags, '--epochs', '3')
    out = capsys.readouterr().out
    assert (estimate.steps, estimate.tests) == (4, 15)
    assert 'batch 8 x accum 2 x ranks 1 = 16, lr = 0.001 as given, warm-up 1 of 3 epochs' in out
    assert f'resumed from {folder}/checkpoint-last.pth at epoch 2, step 0 of 4' in out
    assert tried('finetune', images, folder, *flags) is None  # nothing is left
    assert tree(tmp_path, images) == before
    assert equal_states(train('finetune', images, tmp_path / 'other', *flags), after)


def test_numbers_of_a_small_vit(images, tmp_path, monkeypatch, capsys):
    """FLOPs as counted by hand; moments twice the weights; what the forward keeps grows with the images."""
    costs, measured = [], dry_run.measured_costs
    monkeypatch.setattr(dry_run, 'measured_costs', lambda *args: costs.append(measured(*args)) or costs[0])
    flags = [*SHORT, '--model_kwargs', 'patch_size=8', '--use_ema', '--bad_images', 'skip']
    tried('finetune', images, tmp_path / 'run', *flags)
    args = MAINS['finetune'].get_args_parser().parse([*arguments(images, tmp_path), *flags], stage='finetune')
    core = MAINS['finetune'].create_classifier(args, 3)
    width, depth, patches = core.embed_dim, len(core.blocks), 16
    tokens, hidden = patches + 1, core.blocks[0].mlp.fc1.out_features
    block = tokens * width * (3 * width + width + 2 * hidden) + 2 * tokens**2 * width
    embed, head = patches * width * 3 * 8**2, 3 * width
    assert costs[0].forward == 2 * (embed + depth * block + head)
    assert costs[0].step == 3 * costs[0].forward - 2 * embed  # pixels have no gradient
    params = sum(param.nbytes for param in core.parameters())
    weights = sum(tensor.nbytes for tensor in core.state_dict().values())
    least = 4 * tokens * depth * (4 * width + 2 * hidden)  # float32: inputs of the linear layers, q, k and v
    assert least < costs[0].kept < 4 * least
    mb = [f'{number / 1e6:.1f} MB' for number in (weights, params, 2 * params, weights)]
    told = 'memory of a rank: weights {}, gradients {}, moments {}, average {};'.format(*mb)
    assert line(capsys.readouterr().out, 'memory of a rank').startswith(told)
    assert not (tmp_path / 'run').exists()


def test_two_ranks_and_broken_images(tmp_path):
    """Each image is read by one rank; rank 0 names the bad ones, and the trial goes on without them."""
    data = make_images(tmp_path / 'data', per_class=8, classes=2, val_per_class=2)
    broken = [data / 'train' / 'class0' / '3.png', data / 'train' / 'class1' / '5.png']
    broken[0].write_bytes(b'')
    broken[1].write_bytes(broken[1].read_bytes()[:100])
    before = tree(tmp_path)
    flags = ['--batch_size', '2', '--epochs', '2', '--accum_iter', '2', '--dry_run', '--check_data']
    done = run('finetune', data, tmp_path / 'run', *flags, ranks=2)
    assert done.returncode == 0, done.stderr
    assert tree(tmp_path) == before
    lines = done.stdout.splitlines()
    bad = lines.index(
        'train: 2 of 16 images cannot be read: the first one will end the run; --bad_images skip skips them'
    )
    assert lines[bad + 1] == f'  {broken[0]}: the file is empty'
    assert lines[bad + 2].startswith(f'  {broken[1]}: ')
    assert 'val: 0 of 4 images cannot be read' in lines
    assert [text.partition(':')[0] for text in lines if '-hours' in text] == [
        '  ranks 1',
        '  ranks 2, here',
        '  ranks 8',
    ]


@pytest.mark.parametrize(('most', 'found'), [(100, 100), (8, 8), (7, 6), (3, 2), (1, 0), (9999, 112)])
def test_the_largest_batch_is_tried(most, found):
    """Memory of 10 and 3 for an image, more above 50; the line overshoots, and trials come back."""

    def peak(n: int) -> int:
        assert n > 0
        if n > most:
            raise torch.OutOfMemoryError('CUDA out of memory')
        return 10 + 3 * n + max(0, n - 50)

    assert dry_run.largest_batch(peak, 350, 8) == found


@pytest.mark.parametrize(
    ('number', 'text'), [(0.4612, '0.461'), (45.34, '45.3'), (999.6, '1,000'), (12345.6, '12,346')]
)
def test_figures_are_read_at_a_glance(number, text):
    assert dry_run.figure(number) == text


def test_a_run_on_other_numbers_of_ranks():
    """The images of a step are kept; a step takes what the network takes, or the loader."""
    times = dry_run.Times(wait=0.0, early=0.5, last=1.0, update=0.25)
    estimate = dry_run.Estimate(64, 4, 2, times, loader=1000, steps=3600, tests=0, test_s=0)
    assert [estimate.split(ranks) for ranks in (1, 2, 3, 8, 16, 1024)] == [
        *((64, 8), (64, 4), None, (64, 1), (32, 1), None),
    ]
    assert (estimate.hours(2), estimate.hours(8), estimate.hours(16)) == (2.75, 1.25, 0.75)
    assert estimate.hours(3) is None
    assert estimate._replace(loader=64).hours(2) == 4
    assert estimate._replace(tests=7200, test_s=1).hours(2) == 3.75


@pytest.mark.parametrize(
    ('stage', 'flags', 'words'),
    [
        ('pretrain', ['--check_data'], '--check_data belongs to --dry_run'),
        ('pretrain', ['--dry_run', '--download', '--dataset', 'cifar10'], 'writes nothing, so --download cannot'),
        ('finetune', ['--dry_run', '--eval', '--resume', 'a.pth'], 'tries training steps, and --eval has none'),
    ],
)
def test_mistakes(stage, flags, words, images, tmp_path):
    with pytest.raises(UserError, match=words):
        MAINS[stage].main(MAINS[stage].get_args_parser().parse(arguments(images, tmp_path / 'run', *flags)))
    assert not os.listdir(tmp_path)


def test_the_launcher_submits_nothing(images, tmp_path, monkeypatch, capsys):
    """The step is the job's, on one rank; a recipe may be a bare name, from any folder. Nothing is written there."""
    monkeypatch.chdir(tmp_path)
    flags = ['--config', 'mirl_vit_tiny_cifar10_pretrain', '--data_path', str(images), '--num_workers', '0']
    flags += ['--batch_size', '4', '--epochs', '3', '--device', 'cpu', '--dry_run']
    launcher.main(['pretrain', '--nodes', '2', '--ngpus', '4', '--timeout', '60', '--partition', 'gpu', *flags])
    out = capsys.readouterr().out
    assert out.startswith('not submitted: pretrain on 2 x 4 cpu, partition gpu, 60 min a time, up to 1000 times again;')
    assert all(re.search(r'\d', line(out, begin)) for begin in LINES)
    assert 'batch 4 x accum 1 x ranks 8 = 32, lr = blr 0.01 x 32 / 256 = 0.00125\n' in out
    assert 'batch 4 x accum 8 x ranks 1 = 32, lr = blr 0.01 x 32 / 256 = 0.00125, ' in out
    assert re.search(r'^the job: \S+ h on 8 ranks as fast as here, within its 1,001 h$', out, re.M)
    assert not os.listdir(tmp_path)
