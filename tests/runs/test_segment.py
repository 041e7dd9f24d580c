"""Segmentation: the same bytes when resumed, the same figures over one or two ranks, and what it leaves to look at."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from pairs import CLASSES, make_pairs
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training import arguments, command, equal_states, load, make_images, read_until, run, start, train, with_moments

from scripts import finetune_segmentation, replay_step
from util import dist, labelling, signals
from util.data import annotations, segmentation
from util.data.images import Reader
from util.errors import STOPPED, DivergedError, UserError, run_main
from util.labelling import Labeller
from util.nn.upernet import Segmenter
from util.run import Run

TINY = ['--model_kwargs', 'embed_dim=24', 'num_heads=2', 'channels=16', 'aux_channels=8']
SHORT = [*TINY, '--steps', '6', '--eval_freq', '3', '--batch_size', '4', '--lr', '1e-3']  # 2 steps a pass

pytestmark = pytest.mark.xdist_group('segment')  # one test process, so that `whole` is made once


@pytest.fixture(scope='module')
def pairs(tmp_path_factory):
    return make_pairs(tmp_path_factory.mktemp('pairs'))


@pytest.fixture(scope='module', autouse=True)
def plain():
    """No pictures are drawn, which takes as long as all else; processes of their own draw them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(labelling, 'drawing', lambda labeller, pairs: np.full((4, 4, 3), len(pairs), np.uint8))
        yield


@pytest.fixture(scope='module')
def whole(pairs, tmp_path_factory, plain):
    """The folder of a finished run, with every state that it saved on the way, by (round, step, closed)."""
    return with_moments('segment', pairs, tmp_path_factory.mktemp('whole'), *SHORT, '--use_ema')


def parsed(pairs, output, *flags):
    return finetune_segmentation.get_args_parser().parse(arguments(pairs, output, *flags), stage='segment')


def segment(pairs, output, *flags):
    finetune_segmentation.main(parsed(pairs, output, *flags))


def figures(text: str) -> str:
    return re.findall(r'^\* mIoU .*$', text, re.MULTILINE)[-1]


def test_what_a_run_leaves(whole, pairs, tmp_path, capsys):
    """Lines of its log, points and pictures of TensorBoard, the table of classes; --eval gives the figures again."""
    folder, _ = whole
    lines = [json.loads(text) for text in (folder / 'log.txt').read_text().splitlines()]
    assert [line['epoch'] for line in lines] == [0, 1]
    assert {'train_loss', 'train_decode', 'train_aux', 'test_mIoU', 'test_ema_mIoU', 'test_aAcc'} <= lines[0].keys()
    events = EventAccumulator(str(folder), size_guidance={'images': 0})
    events.Reload()
    assert [event.step for event in events.Scalars('test_mIoU')] == [1000, 2000]
    assert len(events.Images('segmentation')) == 2
    assert (np.asarray(Image.open(folder / 'pictures-1.png')) == 3).all()  # of the validation images
    best = load(folder, 'checkpoint-best.pth')
    assert (best['run'], best['classes']) == ({'stage': 'segment'}, CLASSES)
    assert best['best_mIoU'] == max(line[f'{name}_mIoU'] for line in lines for name in ('test', 'test_ema'))
    table = [row.split(',') for row in (folder / 'classes.csv').read_text().splitlines()]
    assert [row[:2] for row in table[1:]] == [[str(i), name] for i, name in enumerate(CLASSES)]
    assert np.mean([float(row[2]) for row in table[1:]]) == pytest.approx(lines[-1]['test_mIoU'], abs=0.01)

    segment(pairs, tmp_path, '--eval', '--resume', folder / 'checkpoint-last.pth', '--model', 'mirl_vit_tiny')
    told = capsys.readouterr().out
    assert figures(told) == '* ' + ' '.join(f'{key} {lines[-1][f"test_{key}"]:.2f}' for key in ('mIoU', 'mAcc', 'aAcc'))
    assert re.search(r'square +IoU +\d', told)
    assert not list(tmp_path.iterdir())
    others = {figures(told)}
    larger = ['--short_side', '40']
    for flags in (['--test_flip'], ['--test_scales', '1', '2'], larger, [*larger, '--stride', '1']):
        segment(pairs, tmp_path, '--eval', '--resume', folder / 'checkpoint-last.pth', *flags)
        others.add(figures(capsys.readouterr().out))
    assert len(others) == 5


def test_resumed_equals_uninterrupted(whole, pairs, tmp_path):
    """In the middle of a pass, and where only an evaluation is left."""
    folder, moments = whole
    assert sorted(moments) == [(r, s, c) for r in (0, 1) for s, c in ((1, True), (2, True), (3, False), (3, True))]
    for moment in ((0, 1, True), (0, 3, False)):
        flags = [*SHORT, '--save_freq_steps', '1', '--use_ema', '--resume', moments[moment]]
        assert equal_states(train('segment', pairs, tmp_path / f'{moment}', *flags), load(folder))


def test_labels_of_other_pictures(whole, pairs, tmp_path, capsys):
    """Of a folder in a folder, in the pictures' own sizes, without labels and --data_path; of one picture."""
    folder, _ = whole
    (tmp_path / 'photos' / 'a').mkdir(parents=True)
    shutil.copy(pairs / 'images' / 'val' / '0.png', tmp_path / 'photos' / 'a' / 'x.png')
    Image.new('RGB', (90, 20), 'red').save(tmp_path / 'photos' / 'y.jpg')
    flags = ['--resume', folder / 'checkpoint-last.pth', '--predict']
    segment(tmp_path / 'none', tmp_path / 'out', *flags, tmp_path / 'photos')
    assert 'the labels of 2 images are in' in capsys.readouterr().out
    labels, overlays = (tmp_path / 'out' / 'predictions' / name for name in ('labels', 'overlays'))
    for name, size in {'a/x.png': Image.open(pairs / 'images' / 'val' / '0.png').size, 'y.png': (90, 20)}.items():
        label = Image.open(labels / name)
        assert (label.mode, label.size) == ('P', size)
        assert set(np.unique(label)) <= {0, 1, 2}
        assert Image.open(overlays / name).size > size
    segment(tmp_path, tmp_path / 'one', *flags, tmp_path / 'photos' / 'y.jpg')
    assert (tmp_path / 'one' / 'predictions' / 'labels' / 'y.png').read_bytes() == (labels / 'y.png').read_bytes()


@pytest.mark.faults
def test_a_file_of_the_published_layout(whole, pairs, tmp_path, capsys):
    """Evaluated as it stands: the figures of the checkpoint that it was made of."""
    state = load(whole[0])['model']
    names = {'encoder.': 'backbone.', 'pyramid.up4.': 'neck.upsample_4x.', 'pyramid.up2.': 'neck.upsample_2x.'}
    names |= {'blocks.': 'layers.', 'norm1.': 'ln1.', 'norm2.': 'ln2.', '.mlp.fc1.': '.ffn.layers.0.0.'}
    names |= {'.mlp.fc2.': '.ffn.layers.1.', 'patch_embed.proj.': 'patch_embed.projection.'}
    published = {}
    for name, value in state.items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        published[name] = value
    for name in [name for name in published if name.endswith('q_bias')]:
        bias = [published.pop(name), torch.zeros_like(state['encoder.blocks.0.attn.v_bias'])]
        bias.append(published.pop(name.replace('q_bias', 'v_bias')))
        published[name.replace('q_bias', 'qkv.bias')] = torch.cat(bias)
    torch.save({'meta': {'mmseg_version': '0.30.0', 'iter': 6}, 'state_dict': published}, tmp_path / 'iter_6.pth')
    told = []
    for source in (whole[0] / 'checkpoint-last.pth', tmp_path / 'iter_6.pth'):
        segment(pairs, tmp_path, *TINY, '--model', 'a2mim_vit_tiny', '--eval', '--resume', source)
        told.append(figures(capsys.readouterr().out))
    assert told[0] == told[1]


@pytest.mark.faults
def test_bf16_sgd_and_a_network_that_convolves(pairs, tmp_path, capsys):
    """And the first lines, of what BatchNorm sees."""
    flags = ['--model', 'a2mim_resnet_tiny', '--opt', 'sgd', '--lr', '0.01', '--amp_dtype', 'bf16', '--steps', '2']
    saved = train('segment', pairs, tmp_path, *flags, '--batch_size', '2', '--accum_iter', '2', '--min_lr', '1e-4')
    assert 'effective batch: 4; the statistics of BatchNorm are those of 2 images' in capsys.readouterr().out
    assert all(value.isfinite().all() for value in saved['model'].values())
    assert all(state.keys() == {'momentum_buffer'} for state in saved['optimizer']['state'].values())


@pytest.mark.faults
def test_dry_run(pairs, tmp_path, monkeypatch, capsys):
    """Nothing is written; wrong labels are named; a test costs what the network sees of an image."""
    data = shutil.copytree(pairs, tmp_path / 'data')
    for name, label in (('1', 7), ('2', 9)):  # of the middle: the first hundred are looked at before anyhow
        wrong = np.asarray(Image.open(data / 'annotations' / 'train' / f'{name}.png')).copy()
        wrong[9] = label
        Image.fromarray(wrong).save(data / 'annotations' / 'train' / f'{name}.png')
    monkeypatch.setattr(annotations, 'LOOKED_AT', 1)
    with pytest.raises(UserError, match='beyond the 3 classes'):  # its own steps meet one, too
        segment(data, tmp_path / 'out', *SHORT, '--dry_run', '--check_data')
    told = capsys.readouterr().out
    assert 'train: 2 of 11 images, or their annotations, are wrong' in told
    assert re.search(r'1\.png: .* has the label 7, beyond the 3 classes', told)
    estimate = finetune_segmentation.main(parsed(pairs, tmp_path / 'out', *SHORT, '--dry_run'))
    assert (estimate.steps, estimate.tests) == (6, 6)
    assert not (tmp_path / 'out').exists()
    sliding = parsed(pairs, tmp_path, '--test_mode', 'slide', '--test_scales', '1', '2', '--test_flip')
    labeller = Labeller(torch.nn.Identity(), sliding, torch.device('cpu'))
    images = segmentation.test_pairs(segmentation.pairs(sliding)[1], sliding, Reader(), None)
    at_scales = [images.size(*Image.open(images.name(i)).size[::-1], ratio) for i in range(3) for ratio in (1, 2)]
    windows = [len(segmentation.windows(h, 32, 21)) * len(segmentation.windows(w, 32, 21)) for h, w in at_scales]
    assert labeller.pixels(images) == 2 * 32**2 * sum(windows) / 3


@pytest.mark.parametrize('at', ['step', pytest.param('evaluation', marks=pytest.mark.faults)])
def test_stop_on_request(at, whole, pairs, tmp_path, monkeypatch, capsys):
    """After the step, or where the evaluation would begin; resumed, the same bytes."""
    after_step = Run.after_step

    def stop(self, epoch, step, lr):
        if (epoch.number, step) == (0, 0 if at == 'step' else 2):
            monkeypatch.setattr(signals, 'requested', lambda: signals.STOP)
        after_step(self, epoch, step, lr)

    monkeypatch.setattr(Run, 'after_step', stop)
    flags = [*SHORT, '--use_ema', '--print_freq', '1']
    with pytest.raises(SystemExit) as end:
        segment(pairs, tmp_path, *flags)
    assert end.value.code == STOPPED
    done = 1 if at == 'step' else 3
    assert f'stopped on request at round 0, step {done} of 3; state saved' in capsys.readouterr().out
    monkeypatch.undo()
    assert equal_states(train('segment', pairs, tmp_path, *flags, '--resume', 'auto'), load(whole[0]))


@pytest.mark.faults
def test_a_step_that_diverged(pairs, tmp_path, monkeypatch, capsys):
    """Its line speaks of the round; replay_step.py repeats the step with the very crops."""
    loss_of = Segmenter.loss_of
    with monkeypatch.context() as patch:
        patch.setattr(Segmenter, 'loss_of', lambda *args: loss_of(*args) * float('nan'))
        with pytest.raises(DivergedError, match=r'^round 0, step 1 of 3: loss or gradient was not finite'):
            segment(pairs, tmp_path, *SHORT, '--max_bad_steps', '0', '--drop_path', '0')
    record = json.loads((tmp_path / 'diagnosis.json').read_text())
    samples = record['ranks'][0]['micro_steps'][0]['samples']
    assert len(samples) == 4
    replay_step.main(replay_step.get_args_parser().parse([str(tmp_path / 'diagnosis.json')]))
    assert re.search(r'rank 0, micro-step 0: loss \d.*\n  finite in float32', capsys.readouterr().out)


def test_channels_last():
    """Off on a CPU, where it takes longer; elsewhere up to the network, and always to the flag."""
    parser = finetune_segmentation.get_args_parser()
    for flags, value in ((['cpu'], False), (['cuda'], None), (['cpu', '--channels_last'], True)):
        assert parser.parse(['--device', *flags]).channels_last is value


# --------------------------------------------------------------------------
# mistakes


@pytest.mark.parametrize(
    ('flags', 'words'),
    [
        (['--steps', '10', '--eval_freq', '3'], '--eval_freq 3 must divide --steps 10'),
        (['--steps', '10', '--warmup_steps', '10'], '--warmup_steps 10 must be less than --steps 10; without it'),
        (['--min_lr', '1'], '--min_lr 1, where the poly ends, is above its peak'),
        (['--test_mode', 'whole'], '--test_mode whole: mirl_vit_tiny takes 32 pixels alone; --test_mode slide'),
        (['--stride', '33'], '--stride 33 is more than --crop_size 32'),
        (['--scale_range', '2', '1'], '--scale_range takes the smaller factor first'),
        (['--batch_size', '1'], '--batch_size 1: BatchNorm needs more than one image: --batch_size 2'),
        (
            ['--batch_size', '12'],
            '11 training images in .* are fewer than one step takes: .*--batch_size 11',
        ),
        (['--epochs', '3'], 'unknown argument --epochs: it belongs to main_finetune.py'),
        (['--config', 'mirl_vit_base_finetune'], 'main_finetune.py, not for scripts/finetune_segmentation.py'),
        (['--eval'], '--eval needs a checkpoint: --resume PATH'),
        (['--predict', 'x'], '--predict needs a checkpoint: --resume PATH'),
        (['--nb_classes', '4'], '--nb_classes 4, but .* has 3'),
    ],
)
def test_mistakes(flags, words, pairs, tmp_path, monkeypatch, capsys):
    """One line, exit code 2, before other processes are waited for."""
    monkeypatch.setattr(dist, 'init', lambda *args: pytest.fail('other processes were waited for'))
    flags = [*SHORT, *flags]
    if '--steps' in flags[len(SHORT) :]:
        flags = flags[: SHORT.index('--steps')] + flags[SHORT.index('--batch_size') :]
    with pytest.raises(SystemExit) as end:
        run_main(lambda: segment(pairs, tmp_path / 'out', *flags))
    assert end.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert re.search(words, line), line


@pytest.mark.faults
def test_mistakes_with_a_checkpoint(whole, pairs, tmp_path):
    last = whole[0] / 'checkpoint-last.pth'
    for flags, words in (
        (['--resume', last, '--eval_freq', '2'], r'eval_freq: 3 then, 2 now; to start a new run from .*: --finetune'),
        (['--resume', last, '--steps', '3'], r'checkpoint-last.pth has done 2 rounds, more than --steps 3'),
        (['--eval', '--resume', last, '--finetune', last], r'--eval does not use --finetune'),
        (['--resume', last, '--predict', tmp_path / 'none'], 'no such file or folder'),
        (['--resume', last, '--predict', pairs, '--output_dir', pairs / 'out'], 'is among the images of --predict'),
    ):
        with pytest.raises(UserError, match=words):
            segment(pairs, tmp_path / 'out', *SHORT, '--eval_freq', '3', *flags)
    other = make_pairs(tmp_path / 'other')
    (other / 'classes.txt').write_text('background\nsquare\ncircle')
    with pytest.raises(UserError, match=r"trained for other classes: .* alone has 'disk'; .* alone has 'circle'"):
        segment(other, tmp_path / 'out', '--eval', '--resume', last)
    (other / 'classes.txt').write_text('background\nsquare\ndisk\nstar')
    with pytest.raises(UserError, match=r"trained for other classes: .* alone has 'star'"):
        segment(other, tmp_path / 'out', '--eval', '--resume', last)
    train('pretrain', make_images(tmp_path / 'images'), tmp_path / 'pretrain', '--batch_size', '16', '--epochs', '1')
    pretrained = tmp_path / 'pretrain' / 'checkpoint-last.pth'
    with pytest.raises(UserError, match='has no segmentation heads: train them, with --finetune'):
        segment(pairs, tmp_path / 'out', '--eval', '--resume', pretrained)
    with pytest.raises(UserError, match=r'is a checkpoint of main_pretrain\.py; use --finetune'):
        segment(pairs, tmp_path / 'out', *SHORT, '--resume', pretrained)


def test_annotations_are_not_pretrained_on(pairs, tmp_path):
    with pytest.raises(UserError, match=rf'annotations holds images, too: .*--data_path {pairs}/images/train$'):
        train('pretrain', pairs, tmp_path, '--epochs', '1')


# --------------------------------------------------------------------------
# processes


@pytest.mark.faults
@pytest.mark.parametrize('model', ['mirl_vit_tiny', 'a2mim_resnet_tiny'])
def test_the_same_figures_over_ranks(model, pairs, tmp_path):
    """Trained by two, tested by one and by two: the very figures, and the same labels of other pictures."""
    flags = ['--model', model, '--steps', '6', '--eval_freq', '3', '--batch_size', '2', '--lr', '1e-3']
    trained = run('segment', pairs, tmp_path / 'run', *flags, ranks=2)
    assert trained.returncode == 0, trained.stderr
    assert Image.open(tmp_path / 'run' / 'pictures-1.png').width > 900  # image, truth and prediction
    for ranks in (0, 2):
        last, out = ['--resume', tmp_path / 'run' / 'checkpoint-last.pth', '--model', model], tmp_path / f'{ranks}'
        tested = run('segment', pairs, out, '--eval', *last, '--num_workers', ranks, ranks=ranks)
        assert tested.returncode == 0, tested.stderr
        assert figures(tested.stdout) == figures(trained.stdout)
        done = run('segment', pairs, out, '--predict', pairs / 'images', *last, ranks=ranks)
        assert 'the labels of 14 images are in' in done.stdout, done.stderr
    labels = [
        {path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob('*.png')}
        for name in ('0', '2')
    ]
    assert len(labels[0]) == 28
    assert labels[0] == labels[1]


@pytest.mark.faults
def test_killed_in_a_round(pairs, tmp_path):
    """SIGKILL, `--resume auto`, and the same bytes; with loader processes."""
    flags = [*SHORT, '--steps', '20', '--eval_freq', '10', '--save_freq_steps', '1', '--num_workers', '1']
    process = start(command('segment', pairs, tmp_path / 'killed', *flags))
    read_until(process, '[ 5/10]')
    process.kill()
    process.communicate(timeout=90)
    killed = load(tmp_path / 'killed')
    assert (killed['epoch'], killed['steps']) == (0, 10)
    assert 4 <= killed['step'] <= 9
    done = run('segment', pairs, tmp_path / 'killed', *flags, '--resume', 'auto')
    assert done.returncode == 0, done.stderr
    assert equal_states(load(tmp_path / 'killed'), train('segment', pairs, tmp_path / 'whole', *flags))
