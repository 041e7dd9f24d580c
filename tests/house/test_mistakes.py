"""A user's mistake ends in one line with exit code 2, before any training, and says what would be right."""

import os
import re
import shutil
import subprocess
import sys
import time

import pytest
import torch
from torch._subclasses import FakeTensor
from training import MAINS, ROOT, Forked, arguments, environment, same, start, train

import main_pretrain
from scripts import visualize
from util import agreement, build, checkpoint, dist
from util.errors import UserError, run_main

NEVER = pytest.fail


@pytest.fixture(scope='module')
def trained(images, tmp_path_factory):
    """A folder with one finished pretraining run."""
    folder = tmp_path_factory.mktemp('trained')
    train('pretrain', images, folder, '--batch_size', '16', '--epochs', '1', '--warmup_epochs', '0')
    return folder


@pytest.fixture
def said(images, tmp_path, capsys, monkeypatch):
    """said(stage, flags...) -> the line that a mistaken run prints."""
    monkeypatch.setattr(agreement, 'check', lambda *args, **data: NEVER('training was started'))
    init = dist.init

    def run(stage: str, *flags, data=images) -> str:
        module, reads = MAINS[stage], {'--resume', '--init', '--finetune'} & {*flags}
        monkeypatch.setattr(dist, 'init', init if reads else lambda *args: NEVER('other processes were waited for'))
        argv = arguments(data, tmp_path / 'out', *flags)
        with pytest.raises(SystemExit) as end:
            run_main(lambda: module.main(module.get_args_parser().parse(argv, stage=stage)))
        assert end.value.code == 2
        line = capsys.readouterr().err
        assert line.count('\n') == 1
        assert 'Traceback' not in line
        print(line, end='')  # pytest -rP shows them all
        return line

    return run


BOTH = ('pretrain', 'finetune')
STEPS = ['--epochs', '9', '--warmup_epochs', '1', '--lr_sched', 'step', '--lr_decay_epochs']


@pytest.mark.parametrize('stage', BOTH)
@pytest.mark.parametrize(
    ('flags', 'words'),
    [
        (['--model', 'mirl_vit_bas'], r'unknown --model mirl_vit_bas; did you mean mirl_vit_base'),
        (['--model', 'MIRL_ViT_Tiny'], r'unknown --model MIRL_ViT_Tiny; did you mean mirl_vit_tiny'),
        (['--model', 'xyz'], r'unknown --model xyz; known: mirl_vit_tiny'),
        (['--epoch', '3'], r'unknown argument --epoch; did you mean --epochs'),
        (['--input_size', '32', '64'], r'--input_size takes one value, 64 is too many: images are square, one number'),
        (['--device', 'mps'], r"--device mps: cuda, cuda:N or cpu; Apple's GPUs are not supported: --device cpu"),
        (['--epochs', 'many'], r'--epochs must be a whole number, got many'),
        (['--epochs', '0'], r'--epochs must be at least 1, got 0'),
        (['--batch_size', '-4'], r'--batch_size must be at least 1, got -4'),
        (['--warmup_epochs', '60', '--epochs', '60'], r'--warmup_epochs 60 must be less than --epochs 60'),
        (['--effective_batch_size', '100', '--batch_size', '16'], r'100 is not a multiple of batch 16 x ranks 1 = 16'),
        (['--effective_batch_size', '64', '--accum_iter', '3', '--batch_size', '16'], r'--accum_iter 3 contradicts'),
        (['--batch_size', '128'], r'66 training images in .* are fewer than one step takes: batch 128 x accum 1'),
        (['--input_size', '33'], r'33 is not a multiple of patch_size 8'),
        (['--lr_sched', 'step'], r'--lr_sched step needs --lr_decay_epochs'),
        (['--std', '0', '1', '1'], r'--std must be more than 0 and at most 1, got 0'),
        (['--mean', '123', '117', '104'], r'--mean must be at least 0 and at most 1, got 123'),
        (['--epochs', '9' * 400], r'--epochs must be at least 1, got 99'),
        (['\u2013epochs', '3'], r'unknown argument .*: it begins with a dash that is no hyphen: --epochs'),
        (['--output_dir', 'x' * 300], r'--output_dir must be a path, got .xxx'),
        (['--lr', 'nan'], r'--lr must be more than 0 and finite, got nan'),
        (['--betas', '0.9', '1'], r'--betas must be at least 0 and less than 1, got 1'),
        (['--clip_grad', '-1'], r'--clip_grad must be at least 0'),
        (['--start_epoch', '99', '--epochs', '9', '--warmup_epochs', '1'], r'--start_epoch 99 leaves nothing of'),
        (['--crop_scale', '0.9', '0.2'], r'--crop_scale takes the smaller share first'),
        (['--model_kwargs', 'img_size=64'], r'--model_kwargs img_size=64: it has a flag of its own'),
        (['--device', 'cuda'], r'no GPU is visible; use --device cpu'),
        (['--device', 'meta'], r'--device meta: cuda, cuda:N or cpu'),
        (['--lr', 'inf'], r'--lr must be more than 0 and finite, got inf'),
        (['--dist_timeout', 'inf'], r'--dist_timeout must be more than 0 and at most 1e\+09, got inf'),
        (['--model_kwargs', 'num_heads=5'], r'mirl_vit_tiny'),
        (['--model', 'localmim_vit_tiny', '--model_kwargs', 'dept=3'], r'has no option dept; did you mean depth'),
        (['--model', 'a2mim_vit_tiny', '--model_kwargs', 'num_heads=5'], r'embed_dim 96 is not a multiple of its 5'),
        (['--model', 'a2mim_resnet_tiny', '--model_kwargs', 'pretrained=True'], r'pretrained is set by this program'),
        (['--model', 'a2mim_resnet_tiny', '--model_kwargs', 'output_stride=7'], r'with --model_kwargs output_stride=7'),
        (['--device', 'gpu'], r'--device gpu: not a device'),
        (['--compile_mode', 'max-autotune'], r'--compile_mode max-autotune belongs to --compile: give both'),
        (
            ['--compile_mode', 'fast'],
            r"--compile_mode: invalid choice: 'fast' \(choose from '?default'?, '?max-autotune",
        ),
        (
            ['--bf16_gradients'],
            r'--bf16_gradients: one process exchanges no gradients; leave it out, or launch several',
        ),
        (['--world_size', '8'], r'--world_size 8, but 1 process\(es\) were launched'),
        (['--seed', '-1'], r'--seed must be at least 0, got -1'),
        (['--model_kwargs', 'depth'], r'expects key=value, got .depth.'),
        (['--model_kwargs', 'dept=3'], r'has no option dept; did you mean depth'),
        (['--config', 'no_such.yaml'], r'no recipe no_such'),
        (['--resume', 'no/such.pth'], r'no/such\.pth does not exist'),
        (['--amp_dtype', 'fp8'], r'invalid choice: .?fp8'),
        (['--warmup_lr_ratio', '2'], r'--warmup_lr_ratio must be at least 0 and at most 1, got 2'),
        (['--warmup_shape', 'cosine'], r'invalid choice: .?cosine'),
        (['--cosine_start', 'one'], r'invalid choice: .?one'),
        (['--opt', 'rmsprop'], r'invalid choice: .?rmsprop'),
        (['--opt_eps', '0'], r'--opt_eps must be more than 0 and finite, got 0'),
        (['--rule_kwargs', 'decay=1'], r'param_rules has no option decay; known: none'),
        (['--lr', '0'], r'--lr must be more than 0 and finite, got 0'),
        (['--blr', '0'], r'--blr must be more than 0 and finite, got 0'),
        (
            ['--lr', '1e-4', '--min_lr', '1e-3'],
            r'--min_lr 0\.001, where the cosine ends, is above its peak: batch 64 x',
        ),
        ([*STEPS, '-4'], r'--lr_decay_epochs must be at least 1, got -4'),
        ([*STEPS, '3', '3'], r'--lr_decay_epochs must rise, .* got 3 3'),
        ([*STEPS, '4', '2'], r'--lr_decay_epochs must rise, .* got 4 2'),
        ([*STEPS, '9'], r'--lr_decay_epochs must rise, .* below --epochs 9, got 9'),
        (
            ['--resume', 'https://host/a.pth'],
            r'--resume https://host/a\.pth: a run resumes from a local file of its own',
        ),
        (['--model_kwargs', 'mlp_ratio=abc'], r'mirl_vit_tiny: invalid literal'),
        (['--model', 'a2mim_convnext_pico', '--input_size', '8'], r'a2mim_convnext_pico'),
        (['--model', 'a2mim_resnet_tiny', '--input_size', '8', '--batch_size', '1'], r'a2mim_resnet_tiny'),
    ],
)
def test_flags(said, stage, flags, words):
    assert_matches(said(stage, *flags), words)


def assert_matches(line, words):
    assert re.search(words, line), line


CANNOT = 'a2mim_vit_tiny cannot take 2 images of 32 pixels with --model_kwargs '


@pytest.mark.parametrize(
    ('flags', 'words'),
    [
        (['--mask_ratio', '1'], r'mask_ratio 1\.0 hides 16 of 16 patches'),
        (['--mask_ratio', '0'], r'mask_ratio 0\.0 hides 0 of 16 patches'),
        (['--model_kwargs', 'num_segments=3'], r'3 segments .* must be even'),
        (['--model', 'mixmae_tiny', '--model_kwargs', 'range_mask_ratio=-0.1'], r'range_mask_ratio -0\.1 is negative'),
        (['--model', 'a2mim_vit_tiny', '--model_kwargs', 'fft_weight=abc'], CANNOT + 'fft_weight=abc: '),
        (
            ['--model', 'a2mim_vit_tiny', '--model_kwargs', 'mask_patch_size=-16'],
            CANNOT + 'mask_patch_size=-16: Repeats',
        ),
        (['--mixup', '0.8'], r'unknown argument --mixup: it belongs to main_finetune\.py'),
        (['--no-use-ema'], r'unknown argument --no_use_ema: it belongs to main_finetune\.py'),
        (['--use-ema'], r'unknown argument --use_ema: it belongs to main_finetune\.py'),
        (['--eval'], r'unknown argument --eval: it belongs to main_finetune\.py'),
    ],
)
def test_pretraining_flags(said, flags, words):
    assert_matches(said('pretrain', *flags), words)


POLICIES = (
    'random',
    'rand-foo',
    'rand-m',
    'rand-m9-mstdx',
    'rand-n-1',
    'rand-m9-tfoo',
    'xyz-m9',
    'v0-foo',
)


@pytest.mark.parametrize(
    ('flags', 'words'),
    [
        (['--mixup', '0.8', '--batch_size', '15'], r'--batch_size must be even, got 15'),
        (['--nb_classes', '2'], r'--nb_classes 2, but .* has 3 classes'),
        (['--eval'], r'--eval needs the checkpoint to evaluate: --resume PATH'),
        (['--finetune', 'no/such.pth'], r'no/such\.pth does not exist'),
        (['--drop_path', '1'], r'--drop_path must be at least 0 and less than 1, got 1'),
        (['--layer_decay', '-1'], r'--layer_decay must be at least 0 and at most 1'),
        (['--crop_pct', '0'], r'--crop_pct must be more than 0'),
        *[(['--aa', policy], rf"--aa {policy}: not a policy of timm's") for policy in POLICIES],
        (['--criterion', 'mse'], r'invalid choice: .?mse'),
        (['--ema_warmup_ratio', '1.5'], r'--ema_warmup_ratio must be at least 0 and at most 1'),
        (['--ema_warmup_epochs', '-1'], r'--ema_warmup_epochs must be at least 0'),
        (['--blr', '1e-9'], r'--min_lr 1e-06, .*, lr = blr 1e-09 x 64 / 256 = 2\.5e-10'),
        (['--mask_ratio=0.5'], r'unknown argument --mask_ratio=0\.5: it belongs to main_pretrain\.py'),
        (['--eval', '--resume', 'a.pth', '--finetune', 'b.pth'], r'--eval does not use --finetune b\.pth'),
        (
            ['--finetune', 'ftp://host/a.pth'],
            r'a checkpoint is a local path, or https://host/path/file\.pth#sha256=<64',
        ),
        (['--eval', '--resume', 'http://host/a.pth'], r'http://host/a\.pth: a checkpoint is a local path, or https://'),
        (['--eval_size', '40'], r'mirl_vit_tiny cannot take 2 images of 40 pixels: '),
        (['--model', 'a2mim_convnext_pico', '--input_size', '8'], r'cannot take 2 images of 8 pixels: .*Kernel size'),
        (
            ['--model', 'a2mim_resnet_tiny', '--input_size', '8', '--batch_size', '1'],
            r'a2mim_resnet_tiny cannot take 1 image of 8 pixels: Expected more than 1 value per channel',
        ),
    ],
)
def test_finetuning_flags(said, flags, words):
    assert_matches(said('finetune', *flags), words)


@pytest.mark.parametrize('stage', BOTH)
def test_data_folder(said, stage, tmp_path):
    assert_matches(said(stage, data=tmp_path / 'none'), r'no such folder: \S+none')
    (tmp_path / 'empty' / 'train').mkdir(parents=True)
    assert_matches(said(stage, data=tmp_path / 'empty'), r'no images in|no class folders')


def test_classes_of_train_and_val(said, images, tmp_path):
    shutil.copytree(images, tmp_path / 'copy')
    (tmp_path / 'copy/val/class1').rename(tmp_path / 'copy/val/klass1')
    assert_matches(said('finetune', data=tmp_path / 'copy'), r"val/ in .* and of train/ differ: .*'klass1'; .*'class1'")
    shutil.rmtree(tmp_path / 'copy/val')
    assert_matches(said('finetune', data=tmp_path / 'copy'), r'no such folder: \S+val; .* should hold train/ and val/')


def test_an_empty_class(said, images, tmp_path):
    shutil.copytree(images, tmp_path / 'copy')
    for file in (tmp_path / 'copy/train/class2').iterdir():
        file.unlink()
    assert_matches(said('finetune', data=tmp_path / 'copy'), r'no images in \S+train/class2')


@pytest.mark.parametrize('stage', BOTH)
def test_output_folder(said, stage, tmp_path):
    (tmp_path / 'out').write_text('a file')
    assert_matches(said(stage), r'cannot write to the output folder \S+out')


def test_checkpoints(said, trained, tmp_path):
    """Files that cannot be resumed or fine-tuned from; tests/weights/test_published.py has every kind of damage."""
    good = trained / 'checkpoint-last.pth'
    bad = tmp_path / 'bad.pth'
    for content, words in (
        (b'', 'empty'),
        (good.read_bytes()[:1000], 'not a checkpoint|damaged|truncated'),
        (b'<!DOCTYPE html><html>404</html>', 'web page'),
    ):
        bad.write_bytes(content)
        assert_matches(said('pretrain', '--resume', bad), words)
        assert_matches(said('finetune', '--finetune', bad), words)
    torch.save({'weights': torch.ones(3)}, bad)
    assert_matches(said('pretrain', '--resume', bad), 'no state of a run')
    assert_matches(said('finetune', '--finetune', bad), 'its keys are weights')


def test_gpus(monkeypatch):
    """Which GPU a process takes: of its local rank, or the only one that SLURM shows it."""
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    assert dist.own_device('cuda') == torch.device('cuda', 0)
    assert dist.own_device('cuda:1') == torch.device('cuda', 1)
    monkeypatch.setattr(dist, 'place', lambda: dist.Place(rank=3, world_size=4, local_rank=1))
    assert dist.own_device('cuda') == torch.device('cuda', 1)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    with pytest.raises(UserError, match='process 1 would take GPU 1, but 1 are visible'):
        dist.own_device('cuda')
    monkeypatch.setenv('SLURM_STEP_ID', '0')
    assert dist.own_device('cuda') == torch.device('cuda', 0)


def test_resuming_another_run(said, trained):
    good = trained / 'checkpoint-last.pth'
    assert_matches(said('pretrain', '--resume', good, '--batch_size', '8'), 'effective_batch: 16 then, 8 now')
    assert_matches(said('pretrain', '--resume', good, '--batch_size', '16', '--seed', '3'), 'seed: 0 then, 3 now')
    assert_matches(
        said('pretrain', '--resume', good, '--batch_size', '16', '--opt', 'lamb'), 'opt: adamw then, lamb now'
    )
    assert_matches(
        said('finetune', '--resume', good, '--batch_size', '16'),
        rf'checkpoint-last\.pth is a checkpoint of main_pretrain\.py; use --finetune {good}$',
    )
    deeper = ['--batch_size', '16', '--model_kwargs', 'depth=6']
    assert_matches(said('pretrain', '--resume', good, *deeper), r"model_kwargs: {} then, {'depth': 6} now")
    state = torch.load(good, weights_only=True)
    for change in ({'optimizer': {}}, {'logger': None}, {'steps': 0}, {'epoch': -1}):
        torch.save(state | change, trained / 'not-whole.pth')
        line = said('pretrain', '--resume', trained / 'not-whole.pth', '--batch_size', '16')
        assert_matches(line, 'holds weights but no state of a run')
    saved, own = {'head': torch.ones(3, 2), 'old': torch.ones(1)}, {'head': torch.ones(5, 2)}
    with pytest.raises(UserError, match=r'2 weights differ: head: file \[3, 2\], model \[5, 2\]; old: .* model absent'):
        checkpoint.check_same_weights(saved, own, good)


def test_finetuning_another_architecture(said, trained):
    line = said('finetune', '--finetune', trained / 'checkpoint-last.pth', '--model_kwargs', 'embed_dim=48')
    assert_matches(line, r'another architecture; .*cls_token: file \[1, 1, 96\], model \[1, 1, 48\]')


def test_evaluating_other_checkpoints(said, trained):
    """What a checkpoint of our own is, the line tells."""
    last = trained / 'checkpoint-last.pth'
    written = r'; it was written by main_pretrain\.py --model mirl_vit_tiny$'
    assert_matches(
        said('finetune', '--eval', '--resume', last), f'no classifier to evaluate: .* --finetune {last}{written}'
    )
    assert_matches(said('finetune', '--eval', '--resume', last, '--model', 'a2mim_vit_tiny'), written)
    line = said('finetune', '--finetune', last, '--model', 'mixmae_tiny')
    assert_matches(
        line, r'written by main_pretrain\.py --model mirl_vit_tiny, not for --model mixmae_tiny, which cannot'
    )


def test_evaluating_otherwise_than_trained(images, tmp_path, capsys):
    """One notice with the differences, and none without."""
    flags = ['--batch_size', '32', '--epochs', '1', '--warmup_epochs', '0', '--use_ema']
    train('finetune', images, tmp_path, *flags)
    for name in ('checkpoint-last.pth', 'checkpoint-best.pth'):  # the second holds the better of network and average
        for use_ema in ([], ['--use_ema']):
            capsys.readouterr()
            train('finetune', images, tmp_path, '--eval', '--resume', tmp_path / name, *use_ema)
            assert 'not as it was fine-tuned' not in capsys.readouterr().out
    other = ['--mean', '0', '0', '0', '--crop_pct', '1', '--input_size', '40']
    train('finetune', images, tmp_path, '--eval', '--resume', tmp_path / name, *other)
    [line] = [line for line in capsys.readouterr().out.splitlines() if 'not as it was' in line]
    assert line == (
        'not as it was fine-tuned: input_size: 32 then, 40 now; mean: [0.485, 0.456, 0.406] then, [0.0, 0.0, 0.0] now; '
        'crop_pct: 0.875 then, 1.0 now'
    )


@pytest.mark.parametrize('stage', BOTH)
@pytest.mark.parametrize('name', ['output_dir', 'log_dir'])
def test_writing_among_the_images(said, stage, name, images, tmp_path, monkeypatch):
    before = sorted(images.rglob('*'))
    monkeypatch.chdir(images)
    (tmp_path / 'link').symlink_to(images / 'train')
    for folder in (images, '.', images / 'train', 'train/runs', images / 'val/class0', tmp_path / 'link/runs'):
        assert_matches(
            said(stage, f'--{name}', folder), rf'--{name} \S+ is among the images of --data_path .*keep them'
        )
    flat = [f'--{name}', images / 'train/class0/runs']
    assert_matches(said('pretrain', *flat, data=images / 'train/class0'), 'is among the images')
    assert sorted(images.rglob('*')) == before


@pytest.mark.fault(9)
def test_resuming_from_what_is_no_file(said, tmp_path):
    """Before any process group: `said` sees to it."""
    paths = [tmp_path / 'none.pth', tmp_path, tmp_path / 'a/b.pth']
    if os.geteuid():  # root reads all
        paths.append(tmp_path / 'locked.pth')
        paths[-1].touch(0o000)
    for path in paths:
        line = said('pretrain', '--resume', path)
        assert_matches(line, 'does not exist|is a folder, not a checkpoint|cannot be read: Permission denied')


def test_recipes_with_a_key_twice(said, tmp_path):
    recipe = tmp_path / 'a.yaml'
    for text in ('lr: 1e-3\nopt: lamb\nlr: 1e-4\n', 'model_kwargs:\n  lr: 1\n  lr: 2\n'):
        recipe.write_text(text)
        assert_matches(said('pretrain', '--config', recipe), r'a\.yaml cannot be read as a recipe: lr is given twice')


@pytest.mark.parametrize(
    ('text', 'words'),
    [
        ('recipe:\n  date: 2023-02-30\n', 'cannot be read as a recipe: day is out of range for month'),
        ('recipe:\n  stage: [a]\n', r"recipe: stage should be text or a number, got \['a'\]"),
        ('batch-size: 2\nbatch_size: 3\n', 'batch_size is given twice'),
        ('model: mirl\n\tlr: 1\n', 'cannot be read as a recipe: .* tab'),
        ('\ufeffmodel: list\r\n', 'unknown --model mirl_vit_tinny'),
        ('effective_batch_size: 100\n', '100 of the recipe a is not a multiple of .* replaces it'),
    ],
)
def test_recipes_with_faults(said, tmp_path, text, words):
    (tmp_path / 'a.yaml').write_bytes(text.encode())
    assert_matches(
        said(
            'pretrain',
            '--config',
            tmp_path / 'a.yaml',
            '--model',
            'mirl_vit_tinny' if 'list' in text else 'mirl_vit_tiny',
        ),
        words,
    )


def test_too_few_cells_name_the_option(said):
    for model, advice in (('mixmae_base', 'patch_size=2'), ('a2mim_convnext_pico', 'mask_patch_size=16')):
        words = rf'1 of the cells .* in an image of this size: too few to hide some; try --model_kwargs {advice}'
        assert_matches(said('pretrain', '--model', model), words)


def test_a_trial_changes_nothing_and_takes_little_time(measured):
    """In shapes alone: no weight, no statistic and no random number is drawn, and a large model takes no second."""
    args = MAINS['pretrain'].get_args_parser().parse(['--model', 'a2mim_resnet50', '--device', 'cpu'])
    before, drawn = main_pretrain.create_model(args).state_dict(), torch.get_rng_state()
    began = time.monotonic()
    core = main_pretrain.checked_model(args)
    measured(f'a2mim_resnet50: the model and its trial step took {time.monotonic() - began:.2f} s')
    assert same(before, core.state_dict())
    assert torch.equal(drawn, torch.get_rng_state())
    assert not any(isinstance(t, FakeTensor) for m in core.modules() for t in vars(m).values())


def test_a_process_ends_like_this(images, tmp_path):
    """The same in a process of its own: nothing but the line on stderr. A rank says its own if the first has not."""
    argv = [str(ROOT / 'main_pretrain.py'), *arguments(images, tmp_path / 'out', '--epoch', '3')]
    alone = subprocess.run([sys.executable, *argv], capture_output=True, text=True, timeout=180, env=environment())
    assert alone.returncode == 2
    assert alone.stderr.startswith('main_pretrain.py: error: unknown argument --epoch; did you mean --epochs')
    assert alone.stderr.count('\n') == 1
    assert alone.stdout == ''
    second = start([sys.executable, *argv], RANK='9', WORLD_SIZE='16', LOCAL_RANK='1')
    _, said = second.communicate(timeout=180)
    assert second.returncode == 2
    assert said == alone.stderr.replace('error: ', 'error: rank 9: ')
    assert not (tmp_path / 'out').exists()


def test_an_earlier_run_is_not_lost(images, tmp_path):
    """A new run in the folder of another ends before it has written anything there."""
    train('pretrain', images, tmp_path, '--batch_size', 32, '--epochs', 1, '--warmup_epochs', 0)
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    for stage in BOTH:
        with pytest.raises(
            UserError, match=r'checkpoint-0\.pth belongs to an earlier run: resume it with --resume auto'
        ):
            train(stage, images, tmp_path, '--batch_size', 32, '--epochs', 1, '--warmup_epochs', 0)
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_pictures_from_the_command_line(trained, images, tmp_path):
    line = [str(ROOT / 'scripts/visualize.py'), '--model', 'mirl_vit_tiny', '--input_size', '32']
    line += ['--checkpoint', str(trained / 'checkpoint-last.pth'), '--device', 'cpu']
    line += ['--output', str(tmp_path / 'a.png')]
    for more, code in (([], 0), (['--seed', '-1'], 2)):
        process = Forked([*line, *more, str(images / 'val')], environment())
        _, said = process.communicate(timeout=180)
        assert process.returncode == code, said
        assert 'Traceback' not in said
    assert (tmp_path / 'a.png').stat().st_size > 1000


def test_pictures_take_a_recipe(trained, images, tmp_path):
    """What it has no use for is left aside; a key that pretraining does not know is a mistake here too."""
    recipe, picture = tmp_path / 'a.yaml', tmp_path / 'a.png'
    line = ['--config', recipe, '--checkpoint', trained / 'checkpoint-last.pth', '--device', 'cpu', '--output', picture]

    def parse(text: str):
        recipe.write_text(text)
        return visualize.get_args_parser().parse([str(word) for word in (*line, images / 'val')], stage='pretrain')

    args = parse('model: mirl_vit_tiny\nmask_ratio: 0.5\nbatch_size: 16\nmodel_kwargs: {depth: 4}\n')
    assert (args.mask_ratio, args.model_kwargs, hasattr(args, 'batch_size')) == (0.5, {'depth': 4}, False)
    visualize.main(parse('model: mirl_vit_tiny\ninput_size: 32\nblr: 1e-3\n'))
    assert picture.stat().st_size > 1000
    for text, words in (
        ('modell: a', "unknown key 'modell'; did you mean model"),
        ('blr: x', 'blr must be a number, got x'),
    ):
        with pytest.raises(UserError, match=words):
            parse(text)


def test_functions_without_annotations():
    """Of a new method, perhaps: an unknown option is a line there too."""

    def make(*, img_size):
        return None

    with pytest.raises(UserError, match=r'^make has no option foo$'):
        build.construct(make, img_size=32, model_kwargs={'foo': 1})
