"""Detection: the same bytes when resumed, the same AP over one or two ranks, and what it leaves to look at."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training import arguments, command, equal_states, load, make_images, read_until, run, start, train, with_moments

from scripts import finetune_detection, make_shapes, replay_step
from util import detecting, dist, dry_run, signals, steps
from util.data import coco
from util.data.datasets import to_device
from util.errors import STOPPED, DivergedError, UserError, run_main
from util.nn.detector import Detector
from util.run import Run

SIDE = 48
SIZES = ['--input_size', '48', '--test_size', '48', '--max_size', '48', '--pretrain_size', '32']
TINY = [
    *('--model', 'a2mim_resnet_tiny', *SIZES, '--width', 16, '--detector_kwargs', 'anchor_sizes=8,16,32,64,128'),
    *('rpn_samples=32', 'proposals=60,30,40,20', 'roi_samples=16', 'fc_width=16', 'conv_width=16', 'mask_convs=1'),
]
SHORT = [*TINY, '--steps', '6', '--eval_freq', '3', '--batch_size', '4', '--lr', '1e-3']  # 2 steps a pass
FIGURES = r'^\* (box|mask) (AP .*)$'

pytestmark = pytest.mark.xdist_group('detect')  # one test process, so that `whole` is made once


@pytest.fixture(scope='module')
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp('shapes')
    make_shapes.coco(folder, SIDE, 13, 5, seed=0)
    return folder


@pytest.fixture(scope='module', autouse=True)
def plain():
    """No pictures are drawn after a round; processes of their own draw them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(detecting, 'drawing', lambda finder, images: np.full((4, 4, 3), len(images), np.uint8))
        yield


@pytest.fixture(scope='module')
def whole(shapes, tmp_path_factory, plain):
    """The folder of a finished run, with every state that it saved on the way, by (round, step, closed)."""
    return with_moments('detect', shapes, tmp_path_factory.mktemp('whole'), *SHORT, '--use_ema')


def parsed(data, output, *flags):
    return finetune_detection.get_args_parser().parse(arguments(data, output, *flags), stage='detect')


def detect(data, output, *flags):
    return finetune_detection.main(parsed(data, output, *flags))


def figures(text: str) -> dict[str, str]:
    """The last ones of boxes and of masks."""
    return dict(re.findall(FIGURES, text, re.MULTILINE))


def test_what_a_run_leaves(whole, shapes, tmp_path, capsys):
    """Lines of its log, points and pictures of TensorBoard, the table of classes; --eval gives the figures again."""
    folder, _ = whole
    lines = [json.loads(text) for text in (folder / 'log.txt').read_text().splitlines()]
    assert [line['epoch'] for line in lines] == [0, 1]
    assert {'train_loss', 'train_objectness', 'train_mask', 'test_box_AP', 'test_ema_mask_AP50'} <= lines[0].keys()
    assert lines[0]['AP_of_classes']['box'].keys() == {'disk', 'square', 'triangle'}
    events = EventAccumulator(str(folder), size_guidance={'images': 0})
    events.Reload()
    assert [event.step for event in events.Scalars('test_mask_AP')] == [1000, 2000]
    assert len(events.Images('detections')) == 2
    best = load(folder, 'checkpoint-best.pth')
    assert (best['run'], best['classes']) == ({'stage': 'detect'}, ['disk', 'square', 'triangle'])
    assert best['args']['categories'] == [2, 5, 9]
    assert best['best_box_AP'] == max(line[f'{name}_box_AP'] for line in lines for name in ('test', 'test_ema'))
    table = [row.split(',') for row in (folder / 'classes.csv').read_text().splitlines()]
    assert [row[:2] for row in table[1:]] == [['2', 'disk'], ['5', 'square'], ['9', 'triangle']]

    detect(shapes, tmp_path, '--eval', '--resume', folder / 'checkpoint-last.pth', '--model', 'a2mim_resnet_tiny')
    told = figures(capsys.readouterr().out)
    assert told['box'].startswith(f'AP {lines[-1]["test_box_AP"]:.2f} AP50 {lines[-1]["test_box_AP50"]:.2f}')
    assert told['mask'].startswith(f'AP {lines[-1]["test_mask_AP"]:.2f}')
    truth = json.loads((shapes / 'annotations' / 'instances_val2017.json').read_text())
    found = json.loads((tmp_path / 'predictions.json').read_text())
    masks = json.loads((tmp_path / 'predictions_masks.json').read_text())
    assert found[0].keys() == {'image_id', 'category_id', 'bbox', 'score', 'segmentation'}
    assert masks[0].keys() == found[0].keys() - {'bbox'}
    for kind, name, results in (('bbox', 'box', found), ('segm', 'mask', masks)):
        assert 100 * coco.evaluate(truth, results, [kind])[kind]['AP'] == pytest.approx(lines[-1][f'test_{name}_AP'])


def test_detections_lie_where_their_objects_are(shapes, tmp_path):
    """Of a network that knows the truth at test scale: boxes and masks are enlarged to the image's own pixels."""
    args = parsed(shapes, tmp_path, *TINY, '--test_size', '24')
    [val] = coco.splits(args, ['val'])
    truth, device = coco.CocoFolder(val, train=True, transform=coco.Augment('none', hflip=0)), torch.device('cpu')
    known = iter([truth[0, i][1] for i in range(len(val.images))])

    class Oracle(torch.nn.Conv2d):
        size_divisible = 32

        def forward(self, imgs, sizes):
            assert (imgs.shape[2:], sizes) == ((32, 32), [(24, 24)])
            target = next(known)
            boxes = target['boxes'] / 2
            cut = [
                mask[y0:y1, x0:x1]
                for mask, (x0, y0, x1, y1) in zip(target['masks'], target['boxes'].int().tolist(), strict=True)
            ]
            small = [torch.nn.functional.interpolate(m[None, None].float(), (28, 28), mode='area')[0, 0] for m in cut]
            masks = torch.stack(small) if small else torch.zeros(0, 28, 28)
            return [dict(boxes=boxes, labels=target['labels'], scores=torch.ones(len(boxes)), masks=masks)]

    finder = detecting.Finder(Oracle(3, 3, 1), args, device)
    batches = detecting.test_loader(val, args, device)
    stats = detecting.evaluate(finder, batches, val, box_only=False)
    assert (stats['box_AP'], stats['box_AR_100']) == (pytest.approx(100), pytest.approx(100))
    assert stats['mask_AP50'] == pytest.approx(100)
    assert stats['mask_AP'] > 60


def test_resumed_equals_uninterrupted(whole, shapes, tmp_path):
    """In the middle of a pass, and where only an evaluation is left."""
    folder, moments = whole
    assert sorted(moments) == [(r, s, c) for r in (0, 1) for s, c in ((1, True), (2, True), (3, False), (3, True))]
    for moment in ((1, 1, True), (1, 3, False)):
        flags = [*SHORT, '--save_freq_steps', '1', '--use_ema', '--resume', moments[moment]]
        assert equal_states(train('detect', shapes, tmp_path / f'{moment}', *flags), load(folder))
    assert not torch.backends.cudnn.benchmark  # regions are of another number in each step, and each would be tried


def test_detections_in_other_pictures(whole, shapes, tmp_path, capsys, monkeypatch):
    """Of a folder in a folder, in the pictures' own sizes, without annotations; listed with their names, and drawn."""
    monkeypatch.setattr(detecting, 'DRAWN', 0.1)
    (tmp_path / 'photos' / 'a').mkdir(parents=True)
    shutil.copy(shapes / 'val2017' / '0003.png', tmp_path / 'photos' / 'a' / 'x.png')
    Image.new('RGB', (90, 20), 'red').save(tmp_path / 'photos' / 'y.jpg')
    (tmp_path / 'photos' / 'z.png').write_bytes(b'no picture')
    flags = ['--model', 'a2mim_resnet_tiny', '--resume', whole[0] / 'checkpoint-last.pth', '--bad_images', 'skip']
    flags += ['--max_bad_images', '0.5', '--predict']
    detect(tmp_path / 'none', tmp_path / 'out', *flags, tmp_path / 'photos')
    told = capsys.readouterr().out
    assert 'bad images skipped: 1, listed in' in told
    assert 'the detections of 2 images are in' in told
    found = json.loads((tmp_path / 'out' / 'predictions' / 'detections.json').read_text())
    assert [(image['id'], image['height'], image['width']) for image in found['images']] == [
        (0, SIDE, SIDE),
        (1, 20, 90),
    ]
    assert found['images'][0]['file_name'].endswith('photos/a/x.png')
    assert [category['id'] for category in found['categories']] == [2, 5, 9]
    assert {result['image_id'] for result in found['annotations']} <= {0, 1}
    assert {tuple(result['segmentation']['size']) for result in found['annotations']} <= {(SIDE, SIDE), (20, 90)}
    drawings = tmp_path / 'out' / 'predictions' / 'drawings'
    assert {path.relative_to(drawings).as_posix() for path in drawings.rglob('*.png')} == {'a/x.png', 'y.png'}


def test_crowds_and_empty_images(shapes, tmp_path, capsys):
    """They train with --keep_empty, as do boxes alone; a rate belongs to its batch."""
    flags = [*TINY, '--steps', '1', '--batch_size', '13', '--keep_empty', '--box_only', '--augment', 'none']
    state = train('detect', shapes, tmp_path, *flags, '--lr', '1e-3', '--lr_batch', '26')
    assert not [name for name in state['model'] if 'mask' in name]
    told = capsys.readouterr().out
    assert '13 training images, 1 step a pass' in told
    assert 'batch 13 x accum 1 x ranks 1 = 13, lr = 0.001 x 13 / 26 = 0.0005' in told
    assert 'effective batch: 13; the statistics of BatchNorm are those of 13 images, one forward' in told
    assert figures(told).keys() == {'box'}


def test_dry_run(shapes, tmp_path, monkeypatch, capsys):
    """Nothing is written; images that have not the size in the JSON are named."""
    for name, value in (('WARM_UP', 0), ('STEPS', 2), ('FEWEST', 1), ('LOADER_S', 0)):
        monkeypatch.setattr(dry_run, name, value)
    data = shutil.copytree(shapes, tmp_path / 'data')
    Image.new('RGB', (SIDE, SIDE - 1)).save(data / 'val2017' / '0003.png')
    monkeypatch.setattr('util.data.objects.LOOKED_AT', 1)
    estimate = detect(data, tmp_path / 'out', *SHORT, '--dry_run', '--check_data')
    assert (estimate.steps, estimate.tests, estimate.batch) == (6, 10, 4)
    told = capsys.readouterr().out
    assert 'val: 1 of 5 images, or their annotations, are wrong' in told
    assert re.search(r'0003\.png: .* is 48 x 47 pixels, in the JSON 48 x 48', told)
    assert not (tmp_path / 'out').exists()


def test_lengths(tmp_path):
    """--epochs in steps, milestones and rounds; a recipe's milestones keep their share where --steps or --epochs is
    given; what is given stays."""
    recipe = tmp_path / 'a.yaml'
    recipe.write_text('steps: 90000\ndecay_steps: [60000, 80000]\nwarmup_steps: 1000\neval_freq: 9000\nlr_batch: 16\n')

    def parse(*flags: str):
        return finetune_detection.get_args_parser().parse(['--config', str(recipe), *flags])

    args = parse()
    assert (args.decay_steps, args.lr_decay_epochs, args.epochs) == ([60000, 80000], [6 + 2 / 3, 8 + 8 / 9], 10)
    assert parse('--steps', '900').decay_steps == [600, 800]
    assert parse('--steps', '900').lr_batch == 16
    assert parse('--steps', '900', '--decay_steps', '7').decay_steps == [7]
    assert parse('--lr', '1').lr_batch is None
    args = steps.in_passes(parse('--epochs', '12'), 7000)
    assert (args.steps, args.eval_freq, args.epochs, args.warmup_steps) == (84000, 14000, 6, 1000)
    assert args.decay_steps == [56000, 74667]
    assert args.lr_decay_epochs[0] == 4
    args = steps.in_passes(parse('--epochs', '2'), 100)
    assert (args.steps, args.eval_freq, args.warmup_steps, args.decay_steps) == (200, 100, 20, [133, 178])
    for flags, words in (
        (['--epochs', '2', '--steps', '5'], '--steps 5 and --epochs 2 both say how long the run is: give one'),
        (['--epochs', '2', '--decay_steps', '5'], '--decay_steps counts steps, and --epochs passes over the data'),
        (['--epochs', '2', '--eval_freq', '150'], '--eval_freq 150 must divide the 200 steps of --epochs 2, 100 each'),
    ):
        with pytest.raises(UserError, match=words):
            steps.in_passes(parse(*flags), 100)


def test_targets_on_the_device():
    """Lists and dicts keep their form; what is no tensor stays as it is."""
    batch = [[torch.ones(1)], [{'boxes': torch.zeros(0, 4), 'size': (3, 4), 'image_id': 7}]]
    moved = to_device(batch, torch.device('meta'))
    assert moved[0][0].device.type == moved[1][0]['boxes'].device.type == 'meta'
    assert moved[1][0]['size'] == (3, 4)
    assert moved[1][0]['image_id'] == 7


@pytest.mark.faults
@pytest.mark.parametrize('at', ['step', 'evaluation'])
def test_stop_on_request(at, whole, shapes, tmp_path, monkeypatch, capsys):
    """After the step, or where the evaluation would begin; resumed, the same bytes."""
    after_step = Run.after_step

    def stop(self, epoch, step, lr):
        if (epoch.number, step) == (0, 0 if at == 'step' else 2):
            monkeypatch.setattr(signals, 'requested', lambda: signals.STOP)
        after_step(self, epoch, step, lr)

    monkeypatch.setattr(Run, 'after_step', stop)
    flags = [*SHORT, '--use_ema', '--print_freq', '1']
    with pytest.raises(SystemExit) as end:
        detect(shapes, tmp_path, *flags)
    assert end.value.code == STOPPED
    done = 1 if at == 'step' else 3
    assert f'stopped on request at round 0, step {done} of 3; state saved' in capsys.readouterr().out
    monkeypatch.undo()
    assert equal_states(train('detect', shapes, tmp_path, *flags, '--resume', 'auto'), load(whole[0]))


@pytest.mark.faults
def test_a_step_that_diverged(shapes, tmp_path, monkeypatch, capsys):
    """Its line speaks of the round; replay_step.py repeats the step with the very images and objects."""
    forward = Detector.forward
    with monkeypatch.context() as patch:
        spoilt = lambda *args: {name: loss * float('nan') for name, loss in forward(*args).items()}  # noqa: E731
        patch.setattr(Detector, 'forward', spoilt)
        with pytest.raises(DivergedError, match=r'^round 0, step 1 of 3: loss or gradient was not finite'):
            detect(shapes, tmp_path, *SHORT, '--max_bad_steps', '0', '--drop_path', '0', '--lr_batch', '8')
    replay_step.main(replay_step.get_args_parser().parse([str(tmp_path / 'diagnosis.json')]))
    assert re.search(r'rank 0, micro-step 0: loss \d.*\n  finite in float32', capsys.readouterr().out)


def test_no_relative_positions():
    for flags, count in ((['--rel_pos'], 8), (['--no_rel_pos'], 0)):
        args = parsed('coco', 'out', '--model', 'mirl_vit_tiny', '--input_size', '32', '--width', '8', *flags)
        names = [name for name, _ in finetune_detection.create_detector(args, 3).named_parameters()]
        assert sum('.rel_pos_' in name for name in names) == count


# --------------------------------------------------------------------------
# mistakes


@pytest.mark.parametrize(
    ('flags', 'words'),
    [
        (['--decay_steps', '5', '3'], '--decay_steps must rise, to below --steps 6, got 5 3'),
        (['--decay_steps', '6'], '--decay_steps must rise, to below --steps 6, got 6'),
        (['--warmup_steps', '6'], '--warmup_steps 6 must be less than --steps 6; without it'),
        (['--scale_range', '2', '1'], '--scale_range takes the smaller factor first'),
        (['--batch_size', '12'], '11 training images in .* are fewer than one step takes: .*--batch_size 11'),
        (['--neck', 'simple'], "detector of a2mim_resnet_tiny: neck 'simple' is for the one map of a ViT"),
        (['--detector_kwargs', 'fc_widht=3'], 'has no option fc_widht; did you mean fc_width'),
        (['--detector_kwargs', 'width=3'], '--detector_kwargs width=3: it has a flag of its own'),
        (['--config', 'mirl_vit_base_finetune'], 'main_finetune.py, not for scripts/finetune_detection.py'),
        (['--no_rel_pos'], '--no_rel_pos is for plain ViTs: a2mim_resnet_tiny is none'),
        (['--nb_classes', '3'], 'unknown argument --nb_classes: it belongs to main_finetune.py'),
        (['--eval'], '--eval needs a checkpoint: --resume PATH'),
        (['--predict', 'x'], '--predict needs a checkpoint: --resume PATH'),
        (['--val_json', 'no.json'], 'no such file: no.json'),
    ],
)
def test_mistakes(flags, words, shapes, tmp_path, monkeypatch, capsys):
    """One line, exit code 2, before other processes are waited for."""
    monkeypatch.setattr(dist, 'init', lambda *args: pytest.fail('other processes were waited for'))
    with pytest.raises(SystemExit) as end:
        run_main(lambda: detect(shapes, tmp_path / 'out', *SHORT, *flags))
    assert end.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert re.search(words, line), line


@pytest.mark.faults
def test_mistakes_with_a_checkpoint(whole, shapes, tmp_path):
    last = whole[0] / 'checkpoint-last.pth'
    for flags, words in (
        (
            [*SHORT, '--resume', last, '--eval_freq', '2'],
            r'eval_freq: 3 then, 2 now; to start a new run .*: --finetune',
        ),
        ([*SHORT, '--resume', last, '--width', '8'], r'width: 16 then, 8 now'),
        ([*SHORT, '--max_size', '40'], '--test_size 48 is a short side, and --max_size 40 a long one: it is too small'),
        ([*SHORT, '--augment', 'crop'], '--train_sizes 800 is a short side, and --max_size 48'),
        (['--eval', '--resume', last, '--finetune', last], r'--eval does not use --finetune'),
        (['--eval', '--resume', last, '--box_only'], 'was trained with masks: without --box_only'),
        (['--resume', last, '--predict', tmp_path / 'none'], 'no such file or folder'),
        (['--resume', last, '--predict', shapes, '--output_dir', shapes / 'out'], 'is among the images of --predict'),
    ):
        with pytest.raises(UserError, match=words):
            detect(shapes, tmp_path / 'out', '--model', 'a2mim_resnet_tiny', *flags)
    other = shutil.copytree(shapes, tmp_path / 'other')
    for listing in (other / 'annotations').iterdir():
        listing.write_text(listing.read_text().replace('"disk"', '"circle"'))
    with pytest.raises(UserError, match=r"trained for other classes: .* alone has 'disk'; .* alone has 'circle'"):
        detect(other, tmp_path / 'out', '--eval', '--resume', last)
    train('pretrain', make_images(tmp_path / 'images'), tmp_path / 'pretrain', '--batch_size', '16', '--epochs', '1')
    pretrained = tmp_path / 'pretrain' / 'checkpoint-last.pth'
    with pytest.raises(UserError, match='has no detector: train it, with --finetune'):
        detect(shapes, tmp_path / 'out', '--eval', '--resume', pretrained)
    with pytest.raises(UserError, match=r'is a checkpoint of main_pretrain\.py; use --finetune'):
        detect(shapes, tmp_path / 'out', *SHORT, '--resume', pretrained)


# --------------------------------------------------------------------------
# processes


@pytest.mark.faults
def test_the_same_figures_over_ranks(shapes, tmp_path):
    """Trained by two, tested by one and by two: the very figures and predictions, and the same of other pictures."""
    flags = [*SHORT, '--batch_size', '2', '--num_workers', '1']
    trained = run('detect', shapes, tmp_path / 'run', *flags, ranks=2)
    assert trained.returncode == 0, trained.stderr
    assert Image.open(tmp_path / 'run' / 'pictures-1.png').width > 600  # truth and prediction
    for ranks in (0, 2):
        last, out = [*SHORT[:2], '--resume', tmp_path / 'run' / 'checkpoint-last.pth'], tmp_path / f'{ranks}'
        tested = run('detect', shapes, out, '--eval', *last, ranks=ranks)
        assert tested.returncode == 0, tested.stderr
        assert figures(tested.stdout) == figures(trained.stdout)
        done = run('detect', shapes, out, '--predict', shapes / 'val2017', *last, ranks=ranks)
        assert 'the detections of 5 images are in' in done.stdout, done.stderr
    for name in ('predictions.json', 'predictions_masks.json', 'predictions/detections.json'):
        assert (tmp_path / '0' / name).read_bytes() == (tmp_path / '2' / name).read_bytes()


@pytest.mark.faults
def test_killed_in_a_round(shapes, tmp_path):
    """SIGKILL, `--resume auto`, and the same bytes; with loader processes."""
    flags = [*SHORT, '--steps', '20', '--eval_freq', '10', '--save_freq_steps', '1', '--num_workers', '1']
    process = start(command('detect', shapes, tmp_path / 'killed', *flags))
    read_until(process, '[ 5/10]')
    process.kill()
    process.communicate(timeout=90)
    killed = load(tmp_path / 'killed')
    assert (killed['epoch'], killed['steps']) == (0, 10)
    assert 4 <= killed['step'] <= 9
    done = run('detect', shapes, tmp_path / 'killed', *flags, '--resume', 'auto')
    assert done.returncode == 0, done.stderr
    assert equal_states(load(tmp_path / 'killed'), train('detect', shapes, tmp_path / 'whole', *flags))
