"""Named data sets: what lies in a folder of each layout, training on it, and what is said of one that is not right."""

import hashlib
import itertools
import json
import pickle
import shutil
import threading
import time
import urllib.request

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100, Places365
from training import arguments, train

import main_finetune
from util import dist
from util.data import augment, datasets, named
from util.data.stores import Files
from util.errors import UserError, run_main

SPLITS = {'train': 6, 'val': 4}  # images
LABELS = {split: [i % 2 for i in range(count)] for split, count in SPLITS.items()}
PLACES365_CLASSES = ['/a/airfield', '/z/zen_garden']


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    monkeypatch.setattr(urllib.request, 'urlopen', lambda *args, **kwargs: pytest.fail('something was downloaded'))


def pixels(split: str, side: int = 32) -> np.ndarray:
    """[N, side, side, 3], another for each split."""
    return np.random.default_rng(len(split)).integers(0, 256, (SPLITS[split], side, side, 3), dtype=np.uint8)


def write_images(folder, names, split):
    for name, image in zip(names, pixels(split, 40), strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / name)


def make_folders(folder, monkeypatch):
    for split, labels in LABELS.items():
        write_images(folder, [f'{split}/class{label}/{i}.png' for i, label in enumerate(labels)], split)


def make_inaturalist(year):
    def make(folder, monkeypatch):
        for split, labels in LABELS.items():
            names = [f'train_val{year}/Aves/{label}/{split}{i}.jpg' for i, label in enumerate(labels)]
            write_images(folder, names, split)
            content = {
                'images': [{'id': 90 - i, 'file_name': name} for i, name in enumerate(names)],
                # neither in the order of the images, nor are categories numbered from 0, nor in order
                'annotations': [
                    {'image_id': 90 - i, 'category_id': labels[i] + 7} for i in reversed(range(len(names)))
                ],
                'categories': [{'id': 8, 'name': 'Parus major'}, {'id': 7, 'name': 'Pica pica'}],
            }
            (folder / f'{split}{year}.json').write_text(json.dumps(content))

    return make


def make_places205(folder, monkeypatch):
    (folder / 'trainvalsplit_places205').mkdir()
    for split, labels in LABELS.items():
        names = [f'a/abbey{label}/{split}{i}.jpg' for i, label in enumerate(labels)]
        write_images(folder / 'images256', names, split)
        lines = [f'{name} {label}\n' for name, label in zip(names, labels, strict=True)]
        (folder / 'trainvalsplit_places205' / f'{split}_places205.csv').write_text(''.join(lines))


def make_places365(folder, monkeypatch):
    lists = {}
    for split, labels in LABELS.items():
        if split == 'train':
            names = [f'{PLACES365_CLASSES[label]}/{i}.jpg' for i, label in enumerate(labels)]
        else:
            names = [f'Places365_val_{i}.jpg' for i in range(len(labels))]
        images = folder / {'train': 'data_256_standard', 'val': 'val_256'}[split]
        write_images(images, [name.lstrip('/') for name in names], split)
        lists[split] = ''.join(f'{name} {label}\n' for name, label in zip(names, labels, strict=True))
    categories = ''.join(f'{name} {label}\n' for label, name in reversed(list(enumerate(PLACES365_CLASSES))))
    meta = {
        'train-standard': checksummed(folder, 'places365_train_standard.txt', lists['train'].encode()),
        'val': checksummed(folder, 'places365_val.txt', lists['val'].encode()),
    }
    monkeypatch.setattr(Places365, '_FILE_LIST_META', meta)
    monkeypatch.setattr(
        Places365, '_CATEGORIES_META', checksummed(folder, 'categories_places365.txt', categories.encode())
    )


def make_cifar10(folder, monkeypatch):
    """Pickles as the original ones: rows of 3072 bytes, channel by channel."""
    inner = folder / 'cifar-10-batches-py'
    inner.mkdir()
    halves = zip(np.split(pixels('train'), 2), np.split(np.array(LABELS['train']), 2), strict=True)
    train_list = [
        checksummed(inner, f'data_batch_{i}', pickle.dumps({'data': rows(images), 'labels': labels.tolist()}))
        for i, (images, labels) in enumerate(halves, 1)
    ]
    test = pickle.dumps({'data': rows(pixels('val')), 'labels': LABELS['val']})
    install_cifar(monkeypatch, CIFAR10, inner, train_list, [checksummed(inner, 'test_batch', test)])


def make_cifar100(folder, monkeypatch):
    inner = folder / 'cifar-100-python'
    inner.mkdir()
    lists = []
    for split, name in (('train', 'train'), ('val', 'test')):
        content = {'data': rows(pixels(split)), 'fine_labels': LABELS[split], 'coarse_labels': [9] * SPLITS[split]}
        lists.append([checksummed(inner, name, pickle.dumps(content))])
    install_cifar(monkeypatch, CIFAR100, inner, *lists)


def install_cifar(monkeypatch, dataset, inner, train_list, test_list):
    monkeypatch.setattr(dataset, 'train_list', train_list)
    monkeypatch.setattr(dataset, 'test_list', test_list)
    meta = dataset.meta
    _, md5 = checksummed(inner, meta['filename'], pickle.dumps({meta['key']: ['cat', 'dog']}))
    monkeypatch.setattr(dataset, 'meta', meta | {'md5': md5})


def rows(images: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)).reshape(len(images), -1)


def checksummed(folder, name: str, content: bytes) -> tuple[str, str]:
    """Write a file; its entry in torchvision's tables of checksums."""
    (folder / name).write_bytes(content)
    return name, hashlib.md5(content).hexdigest()


MAKE = {
    'folder': make_folders,
    'imagenet': make_folders,
    'inat2018': make_inaturalist(2018),
    'inat2019': make_inaturalist(2019),
    'places365': make_places365,
    'places205': make_places205,
    'cifar10': make_cifar10,
    'cifar100': make_cifar100,
}
CLASSES = {
    'folder': ['class0', 'class1'],
    'imagenet': ['class0', 'class1'],
    'inat2018': ['Pica pica', 'Parus major'],
    'inat2019': ['Pica pica', 'Parus major'],
    'places365': PLACES365_CLASSES,
    'places205': ['0', '1'],
    'cifar10': ['cat', 'dog'],
    'cifar100': ['cat', 'dog'],
}


@pytest.fixture
def make(tmp_path, monkeypatch):
    """make(name) -> a new folder that holds the data set of this name."""
    numbers = itertools.count()

    def made(name: str):
        folder = tmp_path / f'{name}-{next(numbers)}'
        folder.mkdir()
        MAKE[name](folder, monkeypatch)
        return folder

    return made


def test_every_name_has_a_layout_here():
    assert named.SOURCES.keys() == MAKE.keys() == CLASSES.keys()


@pytest.mark.parametrize('split', SPLITS)
@pytest.mark.parametrize('name', MAKE)
def test_images_labels_and_classes(make, name, split):
    """Every image that was written, beside its label: colours of JPEGs are near, all others exact."""
    images, labels, classes, _ = named.labelled_images(name, make(name), split)
    assert classes == CLASSES[name]
    assert sorted(labels) == sorted(LABELS[split])
    dataset = datasets.ImageFiles(images, labels, np.asarray, seed=0)
    written = pixels(split, 32 if name.startswith('cifar') else 40)
    for i in range(len(labels)):
        found, label = dataset[0, i]
        distances = np.abs(written.astype(int) - found).mean((1, 2, 3))
        assert LABELS[split][distances.argmin()] == label
        assert distances.min() < (60 if name[:4] in ('inat', 'plac') else 1e-9)
        assert np.sort(distances)[1] > distances.min() + 10


@pytest.mark.parametrize('num_workers', [0, 2])
def test_pixels_in_memory_are_augmented_as_files_are(make, tmp_path, num_workers):
    """The same bytes from an array and from PNGs of it, whichever worker makes them, for seed, epoch and index."""
    images, labels, *_ = named.labelled_images('cifar10', make('cifar10'), 'train')
    pixels = images.images
    assert (pixels.shape, pixels.dtype) == ((6, 32, 32, 3), np.uint8)
    files = [str(tmp_path / f'{i}.png') for i in range(len(images))]
    for file, image in zip(files, pixels, strict=True):
        Image.fromarray(image).save(file)
    transform = augment.finetune_transform(48, (0.08, 1.0), 0.5, None, 'rand-m9-mstd0.5-inc1', (0.5, 0.5, 0.5))
    batches = [[(3, 4), (3, 0)], [(3, 2), (3, 5)], [(4, 4), (3, 4)]]
    loaded = [
        list(datasets.loader(datasets.ImageFiles(source, labels, transform, 1), batches, workers, False))
        for source, workers in ((images, num_workers), (Files(files), 0))
    ]
    for (ours, our_labels), (theirs, their_labels) in zip(*loaded, strict=True):
        assert ours.shape == (2, 3, 48, 48)
        assert torch.equal(ours, theirs)
        assert torch.equal(our_labels, their_labels)
    assert torch.equal(loaded[0][2][0][1], loaded[0][0][0][0])
    assert not torch.equal(loaded[0][2][0][0], loaded[0][0][0][0])


@pytest.mark.parametrize('name', ['inat2018', 'cifar10', 'places205'])
def test_training_and_evaluation(make, tmp_path, capsys, measured, name):
    """An epoch, evaluated again from its checkpoint; another data set does not resume it."""
    data, output = make(name), tmp_path / 'out'
    flags = ['--dataset', name, '--batch_size', '2', '--epochs', '1', '--warmup_epochs', '0', '--lr', '0.01']
    saved = train('finetune', data, output, *flags)
    assert saved['model']['head.weight'].shape[0] == 2
    assert saved['run']['dataset'] == name
    line = capsys.readouterr().out.partition('* Acc@1')[2].partition('\n')[0]
    argv = arguments(data, output, '--dataset', name, '--eval', '--resume', output / 'checkpoint-last.pth')
    main_finetune.main(main_finetune.get_args_parser().parse(argv, stage='finetune'))
    evaluated = capsys.readouterr().out
    assert f'* Acc@1{line}\n' in evaluated
    assert 'on the 4 test images' in evaluated
    measured(f'{name}: an epoch and its evaluation in a new run: Acc@1{line}')
    with pytest.raises(UserError, match=f'dataset: {name} then, folder now'):
        train('finetune', make('folder'), output, *flags, '--dataset', 'folder', '--resume', 'auto')


@pytest.mark.parametrize('name', ['cifar10', 'places205'])
def test_pretraining(make, tmp_path, capsys, name):
    """Without labels, pictures too, from pixels in memory as from files; another data set does not resume it."""
    data, output = make(name), tmp_path / 'out'
    flags = ['--batch_size', '2', '--epochs', '1', '--warmup_epochs', '0', '--vis_freq', '1']
    train('pretrain', data, output, *flags, '--dataset', name)
    assert f'{name}, train: 6 images of 2 classes; no label is used\n' in capsys.readouterr().out
    assert (output / 'pictures-0.png').is_file()
    with pytest.raises(UserError, match=f'dataset: {name} then, folder now'):
        train('pretrain', make('folder'), output, *flags, '--resume', 'auto')


def test_layouts_that_differ_by_where_the_images_are(make):
    """What torchvision's download of iNaturalist leaves; Places205 as its archive unpacks, or flat; large Places365."""

    def found(name, folder, old, new):
        before = named.labelled_images(name, folder, 'val')
        (folder / new).parent.mkdir(parents=True, exist_ok=True)
        (folder / old).rename(folder / new)
        if not any((folder / old).parent.iterdir()):
            (folder / old).parent.rmdir()
        after = named.labelled_images(name, folder, 'val')
        assert (after.labels.tolist(), *after[2:]) == (before.labels.tolist(), *before[2:])
        return after.images.name(1)

    folder = make('inat2019')
    assert found('inat2019', folder, 'train_val2019', '2019') == f'{folder}/2019/Aves/1/val1.jpg'
    folder = make('places205')
    unpacked = 'data/vision/torralba/deeplearning/images256'
    assert found('places205', folder, 'images256', unpacked) == f'{folder}/{unpacked}/a/abbey1/val1.jpg'
    assert found('places205', folder, f'{unpacked}/a', 'a') == f'{folder}/a/abbey1/val1.jpg'
    folder = make('places365')
    assert found('places365', folder, 'val_256', 'val_large') == f'{folder}/val_large/Places365_val_1.jpg'


# --------------------------------------------------------------------------
# mistakes


@pytest.fixture
def said(tmp_path, capsys, monkeypatch, measured):
    """said(name, folder, flags...) -> the line that a mistaken run prints."""
    monkeypatch.setattr(dist, 'init', lambda *args: pytest.fail('a process group or training was started'))

    def run(name, folder, *flags) -> str:
        argv = arguments(folder, tmp_path / 'out', '--dataset', name, '--batch_size', '2', *flags)
        with pytest.raises(SystemExit) as end:
            run_main(lambda: main_finetune.main(main_finetune.get_args_parser().parse(argv, stage='finetune')))
        assert end.value.code == 2
        line = capsys.readouterr().err
        assert line.count('\n') == 1
        assert 'Traceback' not in line
        assert str(folder) in line
        line = line.partition('error: ')[2].strip()
        measured(line.replace(str(tmp_path), '...'))
        return line

    return run


@pytest.mark.parametrize('name', [name for name in MAKE if name not in ('folder', 'imagenet')])
def test_nothing_there(said, tmp_path, name):
    """The folder that was looked in, what it should hold, where that comes from; nothing is made there."""
    line = said(name, tmp_path / 'none')
    assert f'looked in {tmp_path / "none"}, which should hold {named.SOURCES[name].layout}, from http' in line
    assert ('(--download gets ' in line) == bool(named.SOURCES[name].downloads)
    if not name.startswith('inat'):
        (tmp_path / 'none').mkdir()
        (tmp_path / 'none' / 'a_file').touch()
        assert said(name, tmp_path / 'none') == line


def test_an_unknown_name(tmp_path, capsys):
    with pytest.raises(UserError, match='inat2018'):
        main_finetune.get_args_parser().parse(['--dataset', 'inat2017'])
    (tmp_path / 'recipe.yaml').write_text('dataset: cifar\n')
    with pytest.raises(UserError, match=r"dataset: 'cifar' is not one of folder, imagenet, inat2018"):
        main_finetune.get_args_parser().parse(['--config', str(tmp_path / 'recipe.yaml')])


@pytest.mark.parametrize(
    ('name', 'missing', 'words'),
    [
        ('imagenet', 'val', 'no such folder: FOLDER/val; FOLDER should hold train/ and val/'),
        ('inat2018', 'val2018.json', "No such file or directory: 'FOLDER/val2018.json'"),
        (
            'inat2019',
            'train_val2019',
            'no such file: FOLDER/train_val2019/Aves/0/train0.jpg, listed in FOLDER/train2019',
        ),
        ('places365', 'categories_places365.txt', 'The file FOLDER/categories_places365.txt does not exist'),
        ('places365', 'places365_train_standard.txt', 'The file FOLDER/places365_train_standard.txt does not exist'),
        (
            'places365',
            'val_256',
            'no such file: FOLDER/val_256/Places365_val_0.jpg, listed in FOLDER/places365_val.txt',
        ),
        ('places205', 'trainvalsplit_places205', 'No such file or directory: .FOLDER/trainvalsplit_places205/train_'),
        (
            'places205',
            'images256',
            'no such file: FOLDER/a/abbey0/train0.jpg, listed in FOLDER/trainvalsplit_places205',
        ),
        ('cifar10', 'cifar-10-batches-py/data_batch_2', 'Dataset not found or corrupted; looked in FOLDER, which'),
        ('cifar100', 'cifar-100-python/test', 'Dataset not found or corrupted; looked in FOLDER, which'),
        ('cifar100', 'cifar-100-python/meta', 'Dataset metadata file not found or corrupted; looked in FOLDER, which'),
    ],
)
def test_something_is_missing(make, said, name, missing, words):
    folder = make(name)
    shutil.rmtree(folder / missing) if (folder / missing).is_dir() else (folder / missing).unlink()
    line = said(name, folder).replace(str(folder), 'FOLDER')
    before, _, after = words.partition('.FOLDER')
    assert before in line and after in line  # noqa: PT018


def edited(content: dict, **changes) -> dict:
    """A copy of an iNaturalist list with some entries of some parts changed: images={index: {...}}"""
    content = json.loads(json.dumps(content))
    for part, entries in changes.items():
        for index, entry in entries.items():
            content[part][index] |= entry
    return content


@pytest.mark.parametrize(
    ('damage', 'words'),
    [
        (lambda text, content: text[: len(text) // 2], 'train2018.json is damaged, or its images'),
        (lambda text, content: '', "JSONDecodeError('Expecting value"),
        (lambda text, content: '[' * 200_000, 'RecursionError'),
        (lambda text, content: b'\xff\xfe\x00', 'UnicodeDecodeError'),
        (lambda text, content: [], 'TypeError'),
        (lambda text, content: content | {'images': []}, 'train2018.json lists no images'),
        (lambda text, content: {k: v for k, v in content.items() if k != 'annotations'}, "KeyError('annotations')"),
        (lambda text, content: content | {'annotations': content['annotations'][1:]}, 'KeyError(85)'),
        (lambda text, content: content | {'annotations': content['annotations'] * 2}, '12 annotations of 6 images'),
        (lambda text, content: edited(content, annotations={0: {'category_id': 9}}), 'KeyError(9)'),
        (lambda text, content: edited(content, annotations={0: {'category_id': []}}), 'TypeError'),
        (
            lambda text, content: edited(content, images={3: {'file_name': '/etc/passwd'}}),
            "'/etc/passwd' is no name of",
        ),
        (lambda text, content: edited(content, images={3: {'file_name': 'a/../../b'}}), "'a/../../b' is no name of a"),
        (lambda text, content: edited(content, images={3: {'file_name': '\ud800'}}), r"'\ud800' is no name of a file"),
        (lambda text, content: edited(content, images={3: {'file_name': 'a\0b'}}), r"'a\x00b' is no name of a file"),
        (lambda text, content: edited(content, categories={0: {'id': 9}}), 'KeyError(8)'),
    ],
)
def test_damaged_lists_of_inaturalist(make, said, damage, words):
    folder = make('inat2018')
    path = folder / 'train2018.json'
    damaged = damage(path.read_text(), json.loads(path.read_text()))
    if isinstance(damaged, bytes):
        path.write_bytes(damaged)
    else:
        path.write_text(damaged if isinstance(damaged, str) else json.dumps(damaged))
    assert words in said('inat2018', folder)


@pytest.mark.parametrize(
    ('damage', 'words'),
    [
        (lambda lines: [], 'train_places205.csv lists no images'),
        (lambda lines: [lines[0], 'a/abbey1/1.jpg', *lines[2:]], "line 2 should be `path label`, not 'a/abbey1/1.jpg'"),
        (lambda lines: [lines[0], '', *lines[2:]], "line 2 should be `path label`, not ''"),
        (lambda lines: [*lines[:5], lines[5].replace(' 1', ' one')], 'line 6 should be `path label`'),
        (lambda lines: [*lines[:5], lines[5].replace(' 1', ' -1')], 'line 6 should be `path label`'),
        (lambda lines: [*lines[:5], 'x.jpg ' + '9' * 5000], 'line 6 should be `path label`'),
        (lambda lines: [line.replace(' 1', ' 999999999') for line in lines], '2 numbers from 0 to 999999999'),
        (lambda lines: [lines[0], '/etc/passwd 1', *lines[2:]], "'/etc/passwd' is no name of a file below"),
        (lambda lines: [lines[0], '../../b.jpg 1', *lines[2:]], "'../../b.jpg' is no name of a file below"),
        (lambda lines: [lines[0], '\udcff\udcfe.jpg 1', *lines[2:]], r"'\udcff\udcfe.jpg' is no name of a file below"),
    ],
)
def test_damaged_lists_of_places205(make, said, damage, words):
    folder = make('places205')
    path = folder / 'trainvalsplit_places205' / 'train_places205.csv'
    path.write_bytes('\n'.join(damage(path.read_text().splitlines())).encode('utf-8', 'surrogateescape'))
    assert words in said('places205', folder)


def test_damaged_lists_and_pickles_that_have_checksums(make, said):
    """No changed byte of what torchvision unpickles or splits is looked at."""
    folder = make('places365')
    with open(folder / 'places365_val.txt', 'a') as file:
        file.write('../../secret.jpg 0\n')
    assert 'places365_val.txt does not exist or is corrupted; looked in' in said('places365', folder)
    folder = make('cifar10')
    (folder / 'cifar-10-batches-py/test_batch').write_bytes(b'cposix\nsystem\n(S"touch pwned"\ntR.')
    assert 'corrupted; looked in' in said('cifar10', folder)


def test_a_place_outside_in_a_list_with_the_right_checksum(make, said, monkeypatch):
    folder = make('places365')
    entry = checksummed(folder, 'places365_val.txt', b'../../secret.jpg 0\n')
    monkeypatch.setattr(Places365, '_FILE_LIST_META', Places365._FILE_LIST_META | {'val': entry})
    assert "'val_256/../../secret.jpg' is no name of a file below" in said('places365', folder)


def test_classes(make, said):
    folder = make('cifar10')
    assert '--nb_classes 1, but' in said('cifar10', folder, '--nb_classes', '1')
    folder = make('inat2018')
    path = folder / 'val2018.json'
    content = json.loads(path.read_text())
    content['categories'].append({'id': 11, 'name': 'Pinus'})
    path.write_text(json.dumps(content))
    assert "of train/ differ: val/ alone has 'Pinus'" in said('inat2018', folder)
    folder = make('places205')
    path = folder / 'trainvalsplit_places205' / 'val_places205.csv'
    path.write_text(path.read_text().replace(' 1', ' 2') + 'a/abbey1/val1.jpg 1\n')
    assert "differ: val/ alone has '2'" in said('places205', folder)


def test_an_image_in_the_middle_that_is_not_there_is_named(make):
    folder = make('inat2018')
    images, labels, *_ = named.labelled_images('inat2018', folder, 'train')
    (folder / 'train_val2018/Aves/1/train3.jpg').unlink()
    with pytest.raises(UserError, match=r'cannot read the image \S+Aves/1/train3\.jpg'):
        datasets.ImageFiles(images, labels, None, 0)[0, 3]


# --------------------------------------------------------------------------
# downloads: torchvision's functions, with something in the place of the network


def test_what_cannot_be_downloaded(make, said):
    for name in ('folder', 'imagenet', 'places205'):
        assert f'--dataset {name}: --download cannot get it into' in said(name, make(name), '--download')


@pytest.mark.parametrize('name', ['cifar10', 'cifar100', 'places365', 'inat2018'])
def test_a_download_that_fails(make, said, monkeypatch, name):
    def offline(*args, **kwargs):
        raise urllib.error.URLError('Name or service not known')

    monkeypatch.setattr(urllib.request, 'urlopen', offline)
    folder = make(name)
    for entry in folder.iterdir():  # all but iNaturalist's lists, which are asked for before their 120 GB
        if entry.suffix != '.json':
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    line = said(name, folder, '--download')
    assert 'Name or service not known' in line
    assert '(--download gets ' not in line
    for entry in folder.glob('*.json'):
        entry.unlink()
        assert "json'; looked in" in said(name, folder, '--download')


@pytest.mark.parametrize('name', ['cifar10', 'places365', 'inat2018'])
def test_one_process_downloads(make, monkeypatch, name):
    """Two at once: one takes the network, and both have the data; a third later needs none."""
    complete = make(name)
    folder = complete.with_name('target')
    if name == 'inat2018':
        folder.mkdir()
        for split in SPLITS:
            shutil.copy(complete / f'{split}2018.json', folder)
    calls = []

    def download(url, root, *args, **kwargs):
        calls.append(url)
        time.sleep(0.1)
        shutil.copytree(complete, root, dirs_exist_ok=True)

    module = {'cifar10': 'cifar', 'places365': 'places365', 'inat2018': 'inaturalist'}[name]
    monkeypatch.setattr(f'torchvision.datasets.{module}.download_and_extract_archive', download)
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(named.labelled_images(name, folder, 'val', download=True)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    monkeypatch.setattr(named, 'INaturalist', None)  # which would list half a million files on every rank
    named.labelled_images(name, folder, 'val', download=True)
    assert len(calls) == 1
    assert [labels.tolist() for _, labels, *_ in found] == [LABELS['val']] * 2
