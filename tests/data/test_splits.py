"""What is taken from a folder and what is left out, splits and their classes, and the names that a network keeps."""

import argparse
import json
import os
import shutil
import socket

import pytest
import torch
from PIL import Image
from training import MAINS, SHORT, arguments, load, make_images, train

from util.data import datasets, named
from util.errors import UserError
from util.weights import find_origin


def splits_of(data, *flags, splits=('train', 'val'), classes=None):
    args = MAINS['finetune'].get_args_parser().parse(['--data_path', str(data), *flags])
    return named.labelled_splits(args, splits, classes)


def said(data, *flags, **options) -> str:
    with pytest.raises(UserError) as error:
        splits_of(data, *flags, **options)
    return str(error.value).replace(str(data), 'DATA')


@pytest.fixture
def data(tmp_path):
    return make_images(tmp_path / 'data', per_class=10, val_per_class=2, side=8)


# --------------------------------------------------------------------------
# files


def test_what_is_no_image_is_left_out_and_said(data):
    where = data / 'train/class1'
    before = list(datasets.list_images(data))
    (where / 'a.txt').touch()
    (where / 'LICENSE').touch()
    shutil.copy(where / '0.png', where / '._0.png')
    for name in ('.ipynb_checkpoints', '__MACOSX', '@eaDir', '$RECYCLE.BIN', 'lost+found'):
        shutil.copytree(data / 'train/class0', data / 'train' / name)
        shutil.copytree(data / 'train/class0', where / name)
    os.mkfifo(where / 'x.jpg')
    (where / 'y.jpg').symlink_to('nowhere')
    (where / 'self.jpg').symlink_to('self.jpg')
    (where / 'z.jpg').mkdir()
    (where / 'loop').symlink_to('..')
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(os.path.relpath(where / 's.png'))
    left = datasets.LeftOut()
    assert list(datasets.list_images(data, left)) == before
    assert {kind: names.total() for kind, names in left.kinds.items()} == {
        'by ending': 2,
        'hidden': 11,
        'special files': 2,
        'broken links': 2,
        'folders named like images': 1,
        'links to a folder that holds them': 1,
    }
    (data / 'train/loose.png').touch()
    [train] = splits_of(data, splits=('train',))
    assert train.classes == ['class0', 'class1', 'class2']
    assert list(train.images) == [file for file in before if '/train/' in file]
    [line] = train.notes
    assert line.startswith('train: 30 images, 3 classes; not taken as images: broken links 2 (')
    for words in ('by ending 2 (', 'hidden 11 ($RECYCLE.BIN, ', 'special files 2 (', 'like images 1 (z.jpg)'):
        assert words in line
    assert line.endswith(f'; not used, as they lie beside the class folders: 1 ({data}/train/loose.png)')


def test_files_are_those_of_os_walk(data):
    """In its order, links to folders and files included: numbers of a run depend on it."""
    (data / 'train/class0/deep').mkdir()
    (data / 'train/class0/deep/9.JPEG').symlink_to(data / 'val/class1/1.png')
    (data / 'more').symlink_to(data / 'train/class2')
    Image.new('RGB', (8, 8)).save(data / 'train/class1/a-b.png')
    listed = list(datasets.list_images(data))
    walked = [os.path.join(folder, name) for folder, _, names in os.walk(data) for name in names]
    linked = [str(data / f'more/{i}.png') for i in range(10)]
    assert set(listed) - set(walked) == set(linked)  # by the first of the folder's names
    assert listed == sorted(listed)
    assert len(listed) == len(walked) == 38


def test_pretraining_says_its_images(data):
    (data / 'train/notes.txt').touch()
    args = MAINS['pretrain'].get_args_parser().parse(['--data_path', str(data)])
    found = named.training_images(args)
    assert (len(found.images), found.labels) == (30, None)
    assert found.notes == [f'{data}/train: 30 images; not taken as images: by ending 1 (.txt)']


# --------------------------------------------------------------------------
# classes


def test_a_folder_level_too_many(data):
    """One class is a mistake; where another --data_path is advised, it works."""
    move = (
        'that folder holds only folders (class0, class1, class2): one folder level too many; move them up, into DATA/'
    )
    for split in ('train', 'val'):
        (data / split).rename(data / 'images')
        (data / split).mkdir()
        (data / 'images').rename(data / split / 'images')
    assert said(data) == f"DATA has a single class, 'images': there is nothing to tell it from; {move}train"
    for classes in (['a', 'b'], None):
        assert said(data, splits=('val',), classes=classes).endswith(move + 'val')
    shutil.rmtree(data / 'val')
    advised = said(data, '--val_share', '0.5').rpartition('did you mean --data_path DATA/')[2].removesuffix('?')
    assert len(splits_of(data / advised, '--val_share', '0.5')[0].classes) == 3


@pytest.mark.parametrize('below', ['imagenet', 'ILSVRC/Data/CLS-LOC', 'train', 'train/imagenet'])
def test_the_folder_that_is_meant(tmp_path, below):
    data = make_images(tmp_path / 'data' / below, 2, 2, 1, side=8)
    assert said(tmp_path / 'data').endswith(f'; did you mean --data_path DATA/{below}?')
    assert said(data / 'train').endswith(f'; did you mean --data_path {data}?')


def test_flat_splits(data):
    shutil.rmtree(data / 'val/class2')
    for number, file in enumerate(datasets.list_images(data / 'val')):
        os.rename(file, data / f'val/{number}.png')
    for folder in (data / 'val').glob('class*'):
        folder.rmdir()
    line = said(data)
    assert line.startswith('DATA/val has 4 images, but no class folders in it: each image must be in a folder of its')
    (data / 'val').rename(data / 'later')
    assert '--val_share 0.1' in line
    splits_of(data, '--val_share', '0.1')


def test_classes_that_only_one_split_has(data):
    shutil.rmtree(data / 'val/class0')
    for image in (data / 'val/class1').iterdir():
        image.unlink()
    train, val = splits_of(data)
    assert val.labels.tolist() == [2, 2]
    assert val.classes == train.classes
    assert val.notes == ['val: 2 images, 1 of 3 classes, none of class0, class1; evaluated over all 3 logits']
    (data / 'val/class2').rename(data / 'val/Class 2')
    line = "val/ alone has 'Class 2' (train/ has 'class2'); train/ alone has 'class0', 'class2' (val/ has 'Class 2')"
    assert said(data).endswith(line)
    (data / 'train/class0').rename(data / 'train/CLASS1')
    [train] = splits_of(data, splits=('train',))
    assert train.notes[0].endswith("; classes that differ in case or blanks alone: 'CLASS1' and 'class1'")


def test_more_outputs_than_classes(data):
    train, val = splits_of(data, '--nb_classes', '10')
    assert train.notes == ['train: 30 images, 3 classes; 7 of 10 outputs of the network have no class']
    assert val.notes == ['val: 6 images, 3 classes; evaluated over all 10 logits']
    [val] = splits_of(data, '--nb_classes', '10', splits=('val',))
    assert val.notes[0].endswith('names no classes: folder k of these 3 is taken for class k of 10')
    assert '--nb_classes 2, but the checkpoint has 4' in said(data, '--nb_classes', '2', classes=['a', 'b', 'c', 'd'])


# --------------------------------------------------------------------------
# --val_share


@pytest.mark.parametrize('below', ['train', ''])
def test_a_share_of_every_class_validates(data, below):
    shutil.rmtree(data / 'val')
    assert '; without val/, --val_share 0.1 takes a tenth of ' in said(data / ('' if below else 'train'))
    for i in range(1, 10):
        (data / f'train/class1/{i}.png').unlink()
    for i in range(2, 10):
        (data / f'train/class2/{i}.png').unlink()
    folder = data if below else data / 'train'
    train, val = splits_of(folder, '--val_share', '0.34')
    assert [train.labels.tolist().count(label) for label in range(3)] == [7, 1, 1]
    assert [val.labels.tolist().count(label) for label in range(3)] == [3, 0, 1]
    assert sorted(train.images + val.images) == list(datasets.list_images(data))
    assert all(f'class{label}/' in file for split in (train, val) for file, label in zip(*split[:2], strict=True))
    assert 'none of class1' in val.notes[0]
    assert val.notes[0].endswith('by --val_share 0.34 and --seed 0')
    assert list(splits_of(folder, '--val_share', '0.34', splits=('val',))[0].images) == list(val.images)
    assert list(splits_of(folder, '--val_share', '0.34', '--seed', '1')[1].images) != list(val.images)


def test_shares_that_cannot_be(data):
    assert '--val_share 0.1, but DATA/val is there' in said(data, '--val_share', '0.1')
    assert 'cifar10 has a validation split' in said(data, '--val_share', '0.1', '--dataset', 'cifar10')
    args, then = argparse.Namespace(val_share=0.1, seed=0), {'val_share': 0.1, 'seed': 1}
    with pytest.raises(UserError, match=r'--val_share 0\.1 --seed 0 takes other images .* --val_share 0\.1 --seed 1'):
        named.check_same_share(args, then)
    named.check_same_share(args, then | {'seed': 0})
    named.check_same_share(args, {'seed': 1})


def test_a_share_of_the_labels(data):
    """Evenly from all classes, one of each at least, the same for a seed."""
    whole = splits_of(data)[0]
    assert named.label_share(whole, 1, 0) is whole
    for share, each in ((0.2, 2), (0.01, 1)):
        some = named.label_share(whole, share, 0)
        assert [some.labels.tolist().count(label) for label in range(3)] == [each] * 3
        assert all(f'class{label}/' in file for file, label in zip(*some[:2], strict=True))
        assert some.notes[0].endswith(f'; --label_share {share} takes {3 * each} of these images')
    assert list(some.images) == list(named.label_share(whole, 0.01, 0).images)
    assert list(some.images) != list(named.label_share(whole, 0.01, 1).images)


# --------------------------------------------------------------------------
# names that are kept


def test_class_names_are_kept_and_compared(images, tmp_path, capsys):
    """In every checkpoint; an evaluation finds its classes by name, also where some of them are missing."""
    names, out = ['class0', 'class1', 'class2'], tmp_path / 'out'
    flags = [*SHORT, '--batch_size', '32', '--epochs', '1', '--warmup_epochs', '0']
    saved = train('finetune', images, out, *flags)
    for name in ('checkpoint-last.pth', 'checkpoint-0.pth', 'checkpoint-best.pth'):
        assert load(out, name)['classes'] == names
    assert json.loads((out / 'args.json').read_text())['classes'] == names
    assert 'train: 66 images, 3 classes\nval: 15 images, 3 classes\n' in capsys.readouterr().out

    def evaluated(data, *more) -> tuple[str, str]:
        capsys.readouterr()
        argv = arguments(data, tmp_path / 'eval', '--eval', '--resume', out / 'checkpoint-best.pth', *more)
        MAINS['finetune'].main(MAINS['finetune'].get_args_parser().parse(argv))
        lines = capsys.readouterr().out.splitlines()
        return next(line for line in lines if line.startswith('val: ')), lines[-2]

    part = tmp_path / 'part'
    shutil.copytree(images / 'val/class1', part / 'val/class1')
    line, all_logits = evaluated(part)
    assert line == 'val: 5 images, 1 of 3 classes, none of class0, class2; evaluated over all 3 logits'
    line, present = evaluated(part, '--eval_logits', 'present')
    assert line.endswith('; evaluated over the 1 logits of its classes')
    assert present == '* Acc@1 100.000 Acc@5 100.000 loss 0.000' != all_logits

    other = shutil.copytree(images, tmp_path / 'other')
    for split in ('train', 'val'):
        (other / split / 'class0').rename(other / split / 'zero')
    differing = "zero'; .*class0'"
    with pytest.raises(UserError, match=f'of the checkpoint differ: val/ alone has .{differing}'):
        evaluated(other)
    with pytest.raises(UserError, match=r"checkpoint-last\.pth was trained for other classes: it alone has 'class0'"):
        train('finetune', other, out, *flags, '--epochs', '2', '--resume', 'auto')
    train('finetune', other, tmp_path / 'tuned', *flags, '--finetune', out / 'checkpoint-best.pth')
    assert 'the head that was loaded was trained for other classes: ' in capsys.readouterr().out
    del saved['classes']  # as older versions wrote it
    torch.save(saved, tmp_path / 'old.pth')
    train('finetune', other, tmp_path / 'resumed', *flags, '--epochs', '2', '--resume', tmp_path / 'old.pth')


@pytest.mark.parametrize('classes', [[1, 2], 'ab', [], ['a' * 2000], [['a']], {'a': 1}, None])
def test_names_of_foreign_files_are_plain(classes):
    container = {'args': {'model': 'm', 'model_kwargs': {}}, 'classes': classes}
    assert find_origin(container).classes is None
    assert find_origin(container | {'classes': ['a', 'b']}).classes == ['a', 'b']
