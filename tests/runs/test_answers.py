"""What a checkpoint knows is not asked again, and what a network answers to each picture is written to a table."""

import csv
import io
import re
import shutil
from contextlib import redirect_stdout

import pytest
import torch
from training import MAINS, load, train

from scripts import visualize
from util.errors import UserError

SHORT = ['--batch_size', '16', '--epochs', '1', '--warmup_epochs', '0', '--lr', '1e-3']
HALF = ['--mean', '0.5', '0.5', '0.5', '--std', '0.5', '0.5', '0.5']
BARE = ['--device', 'cpu', '--num_workers', '0']

pytestmark = pytest.mark.xdist_group('answers')  # one test process, so that `tuned` is made once


@pytest.fixture(scope='module')
def pretrained(images, tmp_path_factory):
    """A checkpoint that is in nothing as the defaults are."""
    folder = tmp_path_factory.mktemp('pretrained')
    train('pretrain', images, folder, *SHORT, *HALF, '--model_kwargs', 'decoder_dim=24', '--vis_freq', '1')
    return folder / 'checkpoint-last.pth'


@pytest.fixture(scope='module')
def tuned(images, pretrained, tmp_path_factory):
    folder = tmp_path_factory.mktemp('tuned')
    train('finetune', images, folder, *SHORT, '--finetune', pretrained, '--cls_token', '--crop_pct', '1')
    return folder / 'checkpoint-best.pth'


def told(module, *flags) -> str:
    """What a program prints with these flags alone, device and workers aside."""
    out = io.StringIO()
    with redirect_stdout(out):
        module.main(module.get_args_parser().parse([*BARE[:2], *map(str, flags)], stage='finetune'))
    return out.getvalue()


def evaluated(source, data, *more) -> str:
    return told(MAINS['finetune'], *BARE[2:], '--eval', '--resume', source, '--data_path', data, *more)


def rows_of(path) -> list[dict]:
    with open(path, encoding='utf-8', newline='') as file:
        return list(csv.DictReader(file))


# --------------------------------------------------------------------------
# what a file knows


def test_evaluation_takes_the_network_from_its_file(images, tuned):
    text = evaluated(tuned, images)
    line = 'checkpoint-best.pth: --model mirl_vit_tiny --input_size 32 --mean 0.5 0.5 0.5 --std 0.5 0.5 0.5'
    assert f'{line} --no_global_pool --crop_pct 1.0\n' in text
    assert f'* Acc@1 {load(tuned.parent, tuned.name)["best_acc1"]:.3f}' in text
    assert 'not as it was' not in text


def test_flags_and_recipes_come_before_the_file(images, tuned, tmp_path):
    recipe = tmp_path / 'a.yaml'
    recipe.write_text('crop_pct: 0.9\neval_size: 64\n')
    text = evaluated(tuned, images, '--config', recipe, '--eval_size', '32', '--mean', '0', '0', '0')
    assert 'taken from' in text
    assert '--crop_pct' not in text
    assert '; crop_pct: 1.0 then, 0.9 now' in text
    assert 'mean: [0.5, 0.5, 0.5] then, [0.0, 0.0, 0.0] now; std: [0.5, 0.5, 0.5] then, [0.229' in text  # a pair


def test_files_of_others_know_nothing(images, tuned, tmp_path):
    torch.save(load(tuned.parent, tuned.name)['model'], tmp_path / 'a.pth')
    with pytest.raises(UserError, match=r'a\.pth is not of this program and names no model: give --model NAME$'):
        evaluated(tmp_path / 'a.pth', images)
    flags = ['--model', 'mirl_vit_tiny', '--cls_token', '--input_size', 232, '--nb_classes', 3]
    one, table = images / 'val/class0/0.png', ['--predictions', tmp_path / 'a.csv']
    assert 'the default; the scripts of MAE' in evaluated(tmp_path / 'a.pth', one, *flags, *table)


NESTED = ()
for _ in range(60):
    NESTED = (NESTED, NESTED)


@pytest.mark.parametrize(
    ('args', 'words'),
    [
        ({'mean': 'abc'}, r"its mean: expected a list of 3, got 'abc'"),
        ({'input_size': -4}, 'its input_size must be at least 1, got -4'),
        ({'std': NESTED}, 'names no model'),
        ({'model': NESTED}, 'names no model'),
        ({'model_kwargs': {'depth': '__import__("os")'}}, 'mirl_vit_tiny: '),
        ({'model_kwargs': NESTED}, 'names no model'),
        ({'model_kwargs': {'depth': [10**6]}}, 'its model_kwargs is beyond all sizes'),
        ({'nb_classes': 21_841}, 'cannot be evaluated as mirl_vit_tiny with 21841 classes'),  # not too many
    ],
)
def test_what_a_file_says_is_checked(images, tuned, tmp_path, args, words):
    state = load(tuned.parent, tuned.name)
    torch.save(state | {'args': state['args'] | args}, tmp_path / 'a.pth')
    with pytest.raises(UserError, match=words):
        evaluated(tmp_path / 'a.pth', images)


def test_fine_tuning_keeps_the_normalisation(images, pretrained, tmp_path, capsys):
    """Where no flag and no recipe says another, in resumed runs too; what is otherwise is said."""
    flags = [*SHORT, '--batch_size', '32', '--input_size', '48', '--finetune', pretrained]
    train('finetune', images, tmp_path, *flags)
    text = capsys.readouterr().out
    assert 'taken from' in text
    assert 'not as it was pretrained: input_size: 32 then, 48 now\n' in text
    resumed = train('finetune', images, tmp_path, *flags, '--epochs', '2', '--resume', 'auto')
    assert resumed['args']['mean'] == resumed['args']['std'] == [0.5] * 3
    assert '--mean' not in capsys.readouterr().out


def test_pictures_take_the_network_from_its_file(images, pretrained, tuned, tmp_path):
    def drawn(*flags) -> str:
        return told(visualize, '--output', tmp_path / 'a.png', *flags)

    val = images / 'val'
    text = drawn('--checkpoint', pretrained, val, '--count', '2')
    assert '--model mirl_vit_tiny --input_size 32 --mean 0.5 0.5 0.5 --std 0.5 0.5 0.5 --model_kwargs decoder' in text
    assert 'not as it was pretrained: input_size: 32 then, 64 now' in drawn(
        '--checkpoint', pretrained, val, '--input_size', '64'
    )
    was = r'written by main_pretrain\.py --model mirl_vit_tiny --model_kwargs decoder_dim=24, not for --model '
    for flags, words in (
        (['--checkpoint', pretrained, val, '--model', 'mixmae_tiny'], rf'^\S+ was {was}mixmae_tiny, which cannot'),
        (['--checkpoint', tuned, val], r'without the decoders .*written by main_finetune\.py --model mirl_vit_tiny$'),
        (['--checkpoint', pretrained, 'photo.jpg'], r'^no such file or folder: photo\.jpg$'),
        (['--checkpoint', pretrained, '--model_kwargs', 'a=1', val], r'got .*val.; write images before --model_kwargs'),
    ):
        with pytest.raises(UserError, match=words):
            drawn(*flags)


# --------------------------------------------------------------------------
# which checkpoint is meant, and runs that are at their end


def test_what_cannot_be_resumed(images, pretrained, tuned, tmp_path):
    for stage, flags, words in (
        ('finetune', ['--resume', pretrained], rf'is a checkpoint of main_pretrain\.py; use --finetune {pretrained}$'),
        ('pretrain', ['--resume', tuned.with_name('checkpoint-last.pth')], r'of main_finetune\.py; use --init '),
        ('finetune', ['--resume', tuned], r'no state of a run; .*, such as \S+/checkpoint-last\.pth; to start'),
        ('finetune', ['--resume', tuned.parent], r'is a folder, not a checkpoint; .* checkpoint-last\.pth'),
        ('finetune', ['--finetune', pretrained.parent], r'is a folder, not a checkpoint; .* checkpoint-last\.pth'),
        ('finetune', ['--eval', '--resume', tuned.parent], r'is a folder, not a checkpoint; .* checkpoint-best\.pth'),
    ):
        with pytest.raises(UserError, match=words):
            train(stage, images, tmp_path, *SHORT, *flags)
    for resume, words in ((tuned.parent, 'is a folder'), (tuned.with_name('chekpoint.pth'), 'does not exist')):
        with pytest.raises(UserError, match=words):  # and not that the folder is another run's
            train('finetune', images, tuned.parent, *SHORT, '--resume', resume)


def test_nothing_is_left_to_train(images, pretrained, tmp_path, capsys):
    folder = shutil.copytree(pretrained.parent, tmp_path / 'run')
    flags = [*SHORT, *HALF, '--model_kwargs', 'decoder_dim=24', '--save_freq', '1', '--vis_freq', '1', '--resume']
    train('pretrain', images, folder, *flags, 'auto', '--epochs', '2')

    def files() -> dict:
        kept = [*folder.glob('*.pth*'), *folder.glob('*.png'), folder / 'log.txt', folder / 'args.json']
        return {path.name: path.read_bytes() for path in kept}

    before = files()
    capsys.readouterr()
    for resume, epochs in (('auto', '2'), (folder / 'checkpoint-0.pth', '1')):
        train('pretrain', images, folder, *flags, resume, '--epochs', epochs)
        line = rf'nothing is left to train: \S+\.pth has done all of --epochs {epochs}\n'
        assert re.fullmatch(line, capsys.readouterr().out)
    with pytest.raises(UserError, match=r'checkpoint-last\.pth has done 2 epochs, more than --epochs 1$'):
        train('pretrain', images, folder, *flags, 'auto', '--epochs', '1')
    assert files() == before
    train('pretrain', images, folder, *flags, folder / 'checkpoint-0.pth', '--epochs', '2', '--vis_freq', '0')
    assert (folder / 'pictures-1.png.abandoned').exists()
    assert (folder / 'pictures-0.png').exists()


@pytest.mark.parametrize('method', MAINS['pretrain'].METHODS, ids=lambda module: module.__name__)
def test_classifiers_that_are_not_there(method):
    name = method.__all__[0] if method.__all__[0].islower() else next(n for n in method.__all__ if n.islower())
    with pytest.raises(ValueError, match=rf'^no model {name[:-1]}; did you mean .*{name}'):
        method.create_classifier(name[:-1])


# --------------------------------------------------------------------------
# answers


def test_a_row_for_each_image(images, tuned, tmp_path):
    """The accuracies follow from the rows."""
    table = tmp_path / 'one.csv'
    text = evaluated(tuned, images, '--predictions', table, '--batch_size', '4')
    rows, classes = rows_of(table), rows_of(tmp_path / 'one.classes.csv')
    assert [row['file'] for row in rows] == [f'{images}/val/class{i // 5}/{i % 5}.png' for i in range(15)]
    assert [(int(row['label']), row['label_name']) for row in rows] == [(i // 5, f'class{i // 5}') for i in range(15)]
    for row in rows:
        chances = [float(row[f'top{i}_p']) for i in (1, 2, 3)]
        assert chances == sorted(chances, reverse=True)
        assert sum(chances) == pytest.approx(1, abs=1e-5)
        assert {row[f'top{i}_name'] for i in (1, 2, 3)} == {'class0', 'class1', 'class2'}
        assert row['top1_name'] == f'class{row["top1"]}'
    hits = [row['label'] == row['top1'] for row in rows]
    assert f'* Acc@1 {100 * sum(hits) / 15:.3f} ' in text
    assert [float(row['acc1']) for row in classes] == [20.0 * sum(hits[i : i + 5]) for i in (0, 5, 10)]
    assert [(row['name'], row['images']) for row in classes] == [(f'class{i}', '5') for i in range(3)]
    worst = min(classes, key=lambda row: float(row['acc1']))
    assert f'least accurate classes: {worst["name"]} {float(worst["acc1"]):.1f}% of 5, ' in text
    assert not list(tmp_path.glob('.*.tmp'))


def test_images_without_labels(images, tuned, tmp_path):
    """A folder without val/, or a single file, with a bad image among them."""
    flat = tmp_path / 'flat'
    flat.mkdir()
    for name in ('a', 'b'):
        shutil.copy(images / 'val/class1/0.png', flat / f'{name}.png')
    (flat / 'c.png').write_text('no image')
    table = tmp_path / 'a.csv'
    skip = ['--bad_images', 'skip', '--max_bad_images', '0.5', '--output_dir', tmp_path / 'out']
    text = evaluated(tuned, flat, '--predictions', table, *skip)
    assert f'{flat}: 3 images, taken without labels, as there is no folder {flat}/val' in text
    assert 'the answers to 2 of 3 images are in' in text
    assert 'Acc' not in text
    first, second, bad = rows_of(table)
    assert {**first, 'file': ''} == {**second, 'file': ''}
    assert (first['label'], first['note'], bool(first['top1_name'])) == ('', '', True)
    assert (bad['top1'], bad['note']) == ('', 'skipped: cannot be read')
    assert not table.with_suffix('.classes.csv').exists()
    evaluated(tuned, flat / 'a.png', '--predictions', table)
    assert [row['top1_p'] for row in rows_of(table)] == [first['top1_p']]
    with pytest.raises(UserError, match='no such folder'):
        evaluated(tuned, flat, '--output_dir', tmp_path / 'out')


def test_binary_criterion(images, pretrained, tmp_path):
    """Then each class has a probability of its own."""
    train('finetune', images, tmp_path, *SHORT, '--finetune', pretrained, '--criterion', 'bce')
    evaluated(tmp_path / 'checkpoint-last.pth', images, '--predictions', tmp_path / 'a.csv')
    sums = [sum(float(row[f'top{i}_p']) for i in (1, 2, 3)) for row in rows_of(tmp_path / 'a.csv')]
    assert not any(total == pytest.approx(1, abs=1e-3) for total in sums)


def test_tables_that_cannot_be_written(images, tuned, tmp_path):
    """Said before anything is read."""
    for path, words in (
        (tmp_path / 'none/a.csv', r'the folder \S+/none does not exist'),
        (tmp_path / 'a.png', r'must end with \.csv'),
    ):
        with pytest.raises(UserError, match=words):
            evaluated(tmp_path / 'none.pth', images, '--predictions', path)
    with pytest.raises(UserError, match='--predictions needs --eval'):
        train('finetune', images, tmp_path, '--predictions', tmp_path / 'a.csv')
    (tmp_path / 'a.csv').write_text('before')
    with pytest.raises(UserError, match='no such file or folder'):
        evaluated(tuned, tmp_path / 'none.jpg', '--predictions', tmp_path / 'a.csv')
    assert (tmp_path / 'a.csv').read_text() == 'before'
