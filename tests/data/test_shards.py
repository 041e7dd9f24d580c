"""Data larger than a folder: tar shards, names as one block, what the processes of a machine share, the keyed order."""

import argparse
import io
import multiprocessing
import os
import shutil
import tarfile
import time
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
from training import MAINS, SHORT, arguments, equal_states, load, make_images, run, train

from util import dist
from util.data import augment, datasets, named, node, order, shards, stores
from util.data.images import Reader
from util.data.stores import Files, Names
from util.errors import RunError, UserError


def write_tar(path: Path, members: dict[str, bytes], **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, 'w', **options) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def members(folder: Path, root: Path) -> dict[str, bytes]:
    return {str(Path(file).relative_to(root)): Path(file).read_bytes() for file in datasets.list_images(folder)}


@pytest.fixture
def data(tmp_path):
    return make_images(tmp_path / 'data', 22, 3, 5)


@pytest.fixture
def packed(data):
    """The same images in shards, as `tar` makes them: 4 of train, 2 of val."""
    folder = data.with_name('shards')
    for split, each in (('train', 17), ('val', 8)):
        found = list(members(data / split, data).items())
        for number, first in enumerate(range(0, len(found), each)):
            write_tar(folder / f'{split}-{number:03}.tar', dict(found[first : first + each]))
    return folder


def parsed(stage: str, data_path: Path, *flags: str) -> argparse.Namespace:
    return MAINS[stage].get_args_parser().parse(arguments(data_path, data_path.parent / 'out', *flags), stage=stage)


# --------------------------------------------------------------------------
# what is in them


def test_a_run_on_shards_is_one_on_their_folder(data, packed, tmp_path):
    """The same weights, whatever the name of the shards, and how many loader processes there are."""
    flags = [*SHORT, '--epochs', '1', '--warmup_epochs', '0']
    plain = train('pretrain', data, tmp_path / 'plain', *flags)
    path = packed / 'train-{000..003}.tar'
    assert equal_states(train('pretrain', path, tmp_path / 'out', *flags, '--num_workers', '2'), plain)


def test_few_shards_are_open(packed, monkeypatch):
    monkeypatch.setattr(stores, 'MOST_OPEN', 2)
    monkeypatch.setattr(stores, 'opened', {})
    images = shards.unlabelled(packed).images
    for i in [*range(66), *range(66)]:
        assert images.open(i).read(4) == b'\x89PNG'
        assert len(stores.opened) <= 2
    for path in list(stores.opened):
        stores.forget(path)


def test_members_of_every_kind_of_tar(tmp_path, data):
    """Long names, in GNU's and pax headers, names that are no UTF-8, and what is no image."""
    deep = 'train/' + 'd' * 200 + '/'
    found = {name.replace('train/', deep): content for name, content in members(data / 'train', data).items()}
    odd = os.fsdecode(b'train/x/caf\xe9\xff.PNG')
    found |= {odd: next(iter(found.values())), './train/x/a.png': b'', 'train/x/._b.png': b'', 'train/notes.txt': b''}
    for number, kind in enumerate((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)):
        path = write_tar(tmp_path / f'{number}.tar', found, format=kind)
        with tarfile.open(path, 'a') as tar:
            for how in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE):
                link = tarfile.TarInfo(f'{deep}link{how.decode()}.png')
                link.type, link.linkname = how, odd
                tar.addfile(link)
        split = shards.unlabelled(path)
        names = [name.removeprefix('./') for name in found if name.lower().endswith('.png') and '._' not in name]
        assert list(split.images.names) == sorted(names)
        for i, name in enumerate(split.images.names):
            assert split.images.open(i).read() == found.get(name, b'')
        assert split.notes[0] == (
            f'{path}: 68 images in 1 shards; not taken as images: by ending 1 (.txt), hidden 1 (train/x/._b.png), '
            f'links and special files 2 ({deep[:200]}, {deep[:200]})'
        )


def webdataset(content: bytes) -> dict[str, bytes]:
    """Images of two classes, labelled by .cls and .json, some by keys that end at the first dot."""
    found = {}
    for i in range(6):
        found[f'{i:04}.{("jpg", "png", "rgb.jpeg")[i % 3]}'] = content
        found |= {f'{i:04}.cls': f'{i % 2}\n'.encode()} if i < 4 else {f'{i:04}.json': b'{"label": %d}' % (i % 2)}
    return found


def test_labels(tmp_path, data):
    content = (data / 'val/class0/0.png').read_bytes()
    for split in ('train', 'val'):
        write_tar(tmp_path / f'set/my-{split}-0.tar', webdataset(content))
    train_split, val = named.labelled_splits(parsed('finetune', tmp_path / 'set'), ('train', 'val'))
    assert train_split.labels.tolist() == val.labels.tolist() == [0, 1, 0, 1, 0, 1]
    assert val.classes == ['0', '1']
    assert (shards.class_of('images/train/cat/more/1.jpg'), shards.class_of('cat/1.jpg')) == ('cat', 'cat')
    assert shards.class_of('train/1.jpg') == shards.class_of('1.jpg') == ''


def test_parts_of_classes(data, packed):
    """--val_share and a choice of images take the same of shards as of folders."""
    shutil.rmtree(data / 'val')
    for tar in packed.glob('val*'):
        tar.unlink()
    flags = ['--val_share', '0.3']
    ours = named.labelled_splits(parsed('finetune', packed, *flags), ('train', 'val'))
    theirs = named.labelled_splits(parsed('finetune', data, *flags), ('train', 'val'))
    for our, their in zip(ours, theirs, strict=True):
        for a, b in ((our, their), (named.some(our, 0, 9), named.some(their, 0, 9))):
            assert a.labels.tolist() == b.labels.tolist()
            assert [f'{data}/{name}' for name in a.images.names] == list(b.images)
    both = ours[0].images + ours[1].images
    assert list(both) == [*ours[0].images, *ours[1].images]
    assert both.open(len(both) - 1).read() == ours[1].images.open(len(ours[1].images) - 1).read()
    assert both.digest(packed) != ours[0].images.digest(packed)


# --------------------------------------------------------------------------
# the index


def test_the_index(packed, tmp_path, capsys, monkeypatch):
    """It is made once; a changed shard is indexed anew, alone; it is kept elsewhere where nothing can be written."""
    before = shards.unlabelled(packed)
    [index] = packed.glob('index-*.npz')
    assert capsys.readouterr().out == (
        f'indexing 4 shards, once: {packed}/train-000.tar, ...\nthe index of 66 images is kept as {index}\n'
    )
    scanned, calls = shards.scanned, []
    monkeypatch.setattr(shards, 'scanned', lambda tar: calls.append(tar.path) or scanned(tar))
    moved = packed.rename(tmp_path / 'moved')
    again = shards.unlabelled(moved)
    assert [a.replace('/moved/', '/shards/') for a in again.images] == list(before.images)
    assert (calls, capsys.readouterr().out) == ([], '')
    write_tar(moved / 'train-001.tar', {'train/class0/7.png': b'', 'train/class0/60.png': b''})
    assert len(shards.unlabelled(moved).images) == 66 - 17 + 2
    assert calls == [str(moved / 'train-001.tar')]
    assert f'indexing 1 of 4 shards, which changed: {calls[0]}\n' in capsys.readouterr().out
    index = moved / index.name
    index.write_bytes(index.read_bytes()[:-100])
    assert len(shards.unlabelled(moved).images) == 51
    assert f'{index} cannot be read: the index of the shards is made anew\n' in capsys.readouterr().out
    index.unlink()
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    write, fail = shards.Index.write, OSError(30, 'Read-only file system')

    def refuse(self, path):
        if path.parent == moved:
            raise fail
        write(self, path)

    monkeypatch.setattr(shards.Index, 'write', refuse)
    for made in (9, 9):
        assert len(shards.unlabelled(moved).images) == 51
        assert len(calls) == made
    said = capsys.readouterr().out
    assert f'cannot be kept as {index}: Read-only file system\n' in said
    assert said.count('is kept as ') == 1


# --------------------------------------------------------------------------
# mistakes


def cut(path: Path, size: int) -> None:
    os.truncate(path, size)


def cut_behind(path: Path, images: int) -> None:
    """Where the header of the next image would begin: tarfile takes that for the end."""
    with tarfile.open(path) as tar:
        start = tar.getmembers()[images].offset
    cut(path, start)


def spoil_header(path: Path, image: int) -> None:
    with tarfile.open(path) as tar:
        start = tar.getmembers()[image].offset
    with open(path, 'r+b') as file:
        file.seek(start)
        file.write(b'?' * 512)


MISTAKES = {
    'cut in an image': (lambda p: cut(p / 'train-001.tar', 3000), r'train-001.tar is (damaged|cut off)'),
    'cut behind an image': (
        lambda p: cut_behind(p / 'train-001.tar', 9),
        'train-001.tar is cut off or damaged: it does',
    ),
    'a damaged header': (lambda p: spoil_header(p / 'train-001.tar', 9), 'train-001.tar is cut off or damaged'),
    'empty': (lambda p: cut(p / 'train-001.tar', 0), 'train-001.tar is damaged, or no tar file: empty file'),
    'no tar': (lambda p: (p / 'train-001.tar').write_bytes(b'hello' * 999), 'is damaged, or no tar file: '),
    'gzip': (
        lambda p: (p / 'train-001.tar').rename(p / 'train-001.tar.gz'),
        'train-001.tar.gz is compressed: its images cannot be read by position; make it a plain .tar$',
    ),
    'gzip inside': (lambda p: (p / 'train-001.tar').write_bytes(b'\x1f\x8b' * 999), 'train-001.tar is compressed'),
    'no images': (
        lambda p: [write_tar(tar, {'a.txt': b''}) for tar in p.glob('*.tar')],
        r'no images in the 4 shards of \S+ \(looked for .*\); not taken as images: by ending 4 \(.txt\)$',
    ),
    'no labels': (
        lambda p: write_tar(p / 'train-001.tar', {'a.png': b'', 'b.png': b'', 'c/d.png': b''}),
        r'2 of 52 images of train in \S+ have no label, such as \S+train-001.tar: a.png: a number in key.cls, a ',
    ),
    'some labels': (
        lambda p: write_tar(p / 'train-001.tar', {'a.png': b'', 'a.cls': b'1', 'b.png': b'', 'b.cls': b'dog'}),
        r'50 of 51 images of train in \S+ have no label, such as ',
    ),
    'no val': (
        lambda p: [tar.unlink() for tar in p.glob('val*')],
        r'has no shards of val: they are named so, as val-000.tar, or lie in val/; without them, --val_share 0.1 takes',
    ),
}


@pytest.mark.parametrize('case', MISTAKES)
def test_mistakes(case, packed):
    """Each is one line."""
    spoil, line = MISTAKES[case]
    spoil(packed)
    with pytest.raises(UserError, match=line) as error:
        named.labelled_splits(parsed('finetune', packed), ('train', 'val'))
    assert '\n' not in str(error.value)


def test_ranges(packed, monkeypatch):
    assert shards.expanded('a{08..10}b{x,y}') == ['a08bx', 'a08by', 'a09bx', 'a09by', 'a10bx', 'a10by']
    for pattern, line in (
        ('train-{000..005}.tar', r'2 of 6 shards are missing: \S+train-004.tar, \S+train-005.tar$'),
        ('train-{3..1}.tar', r'\{3..1\} is no range of shards, such as \{000000..001023\}$'),
        ('train-{0..99999999}.tar', 'is no range of shards'),
    ):
        with pytest.raises(UserError, match=line):
            named.training_images(parsed('pretrain', packed / pattern))
    for number in (2, 3):
        shutil.copy(packed / 'val-000.tar', packed / f'val-00{number}.tar')
    both = named.labelled_splits(parsed('finetune', packed / '{train,val}-{000..003}.tar'), ('train', 'val'))
    assert [len(split.images) for split in both] == [66, 31]
    with pytest.raises(UserError, match=r'--val_share 0.1, but shards of val are in \S+ there'):
        named.labelled_splits(parsed('finetune', packed, '--val_share', '0.1'), ('train', 'val'))


def test_bad_images_and_a_shard_that_is_replaced(packed, tmp_path):
    whole = members(packed.with_name('data') / 'train/class0', packed.with_name('data'))
    tar = write_tar(packed / 'train-000.tar', whole | {'train/class0/0.png': b'broken'})
    images = shards.unlabelled(packed).images
    assert images.name(0) == f'{tar}: train/class0/0.png'
    reader = Reader(listing=tmp_path / 'list.txt', max_share=0.5, root=stores.folder_of(packed / 'a{0..1}.tar'))
    assert reader.root == packed
    data = datasets.ImageFiles(images, None, augment.eval_transform(32, 1.0), 0, reader)
    assert data[0, 0][0].shape == (3, 32, 32)
    assert (tmp_path / 'list.txt').read_text().startswith(f'{tar}: train/class0/0.png\tnot a file of JPEG, PNG')
    write_tar(tar, whole)
    with pytest.raises(UserError, match=f'^{tar} has changed since this run began; --resume auto indexes it anew$'):
        data[0, 0]
    shutil.rmtree(packed)
    assert len(stores.opened) > 0
    assert not (tmp_path / 'list.txt').read_text().count('changed')


def test_a_read_that_fails_opens_the_shard_again(packed, monkeypatch):
    images, pread, calls = shards.unlabelled(packed).images, os.pread, []
    images.open(0)
    opened_again = []
    monkeypatch.setattr(stores, 'forget', lambda path, forget=stores.forget: opened_again.append(path) or forget(path))

    def fail_once(*args):
        calls.append(args)
        if len(calls) == 1:
            raise OSError(116, 'Stale file handle')
        return pread(*args)

    monkeypatch.setattr(os, 'pread', fail_once)
    monkeypatch.setattr('util.data.images.PAUSE_S', 0)
    assert Reader(retries=1).read(images, 0).size == (40, 40)
    assert len(calls) == 2
    assert opened_again == [images.tars[0].path]


# --------------------------------------------------------------------------
# what processes share


def test_names_are_one_block():
    names = [f'{"x" * (i % 50)}é{i}' for i in range(200)] + [os.fsdecode(b'\xff'), '']
    block = Names.of(names)
    assert list(block) == names == [block[i] for i in range(len(names))]
    assert block.block.nbytes == sum(len(os.fsencode(name)) for name in names)
    places = np.random.default_rng(0).permutation(len(names))[:90]
    assert list(block.take(places)) == [names[i] for i in places]
    assert list(block.take(places[:0])) == []
    stores.CHUNK, before = 7, stores.CHUNK
    try:
        assert list(block.take(places)) == [names[i] for i in places]
    finally:
        stores.CHUNK = before
    assert list(Names.joined([block, block.take(places)])) == names + [names[i] for i in places]


def rank(number: int, ranks: int, folder: Path, results, fail: bool) -> None:
    """One of the ranks of a machine: what it finds, and whether it made it."""
    os.environ.update(WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks), RANK=str(number), LOCAL_RANK=str(number))
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT='1', TMPDIR=str(folder))
    node.tempfile.tempdir = None
    made = []

    def make():
        made.append(number)
        time.sleep(0.2)
        if fail:
            raise UserError('nothing there')
        return datasets.Split(Files(f'/data/{i}.png' for i in range(10_000)), None, [], ['a note'])

    try:
        found = node.once_a_node(('a key', folder), make)
        results.put((number, made, list(found.images)[-1], type(found.images.paths.block).__name__, found.notes))
        results.join()
    except RunError as error:
        results.put((number, made, str(error)))


@pytest.mark.parametrize('fail', [False, True])
def test_the_ranks_of_a_machine_list_once(fail, tmp_path):
    """One of three; if it fails, each does, with the same words. No file is left."""
    context = multiprocessing.get_context('fork')
    results = context.JoinableQueue()
    ranks = [context.Process(target=rank, args=(i, 3, tmp_path, results, fail)) for i in range(3)]
    for process in ranks:
        process.start()
    found = [results.get(timeout=30) for _ in ranks]
    for _ in ranks:
        results.task_done()
    for process in ranks:
        process.join()
    if fail:
        assert sorted(found) == [(i, [i], 'nothing there') for i in range(3)]
    else:
        assert sum(len(made) for _, made, *_ in found) == 1
        assert {line[2:4] for line in found} == {('/data/9999.png', 'Shared')}
    assert list(tmp_path.iterdir()) == []


def test_an_array_is_handed_over_without_its_content():
    """To a spawned process too; one process that forks shares nothing."""
    paths = Files(f'/data/{i}.png' for i in range(20_000))
    pickled = node.in_shared_memory(paths)
    found = ForkingPickler.loads(pickled)
    assert list(found) == list(paths)
    again = bytes(ForkingPickler.dumps(found))
    assert max(len(pickled), len(again)) < 2000 < paths.paths.block.nbytes
    assert list(ForkingPickler.loads(again)) == list(paths)
    assert list(ForkingPickler.loads(bytes(ForkingPickler.dumps(found.take(np.arange(5)))))) == list(paths)[:5]
    with pytest.raises(OSError, match='another file'):
        node.attached(found.paths.block.filename, 'other', np.dtype(np.uint8), (5,))
    assert node.once_a_node(('x',), lambda: paths) is paths
    assert dist.local_ranks() == 1


# --------------------------------------------------------------------------
# the order


def test_the_keyed_order_is_a_permutation():
    for n in [*range(2, 200), 255, 256, 257, 1000, 4097]:
        for seed in range(3):
            found = order.KeyedOrder(n, np.random.default_rng(seed))[np.arange(n)]
            assert np.array_equal(np.sort(found), np.arange(n))


def test_the_keyed_order_shows_no_order():
    """Means of places and of epochs, neighbours, fixed points: within 5 standard errors of chance."""
    n, keys = 4001, 400
    rows = np.stack([order.KeyedOrder(n, np.random.default_rng(seed))[np.arange(n)] for seed in range(keys)])
    middle, deviation = (n - 1) / 2, n / 12**0.5
    for axis, count in ((0, keys), (1, n)):
        if axis == 0:
            assert np.abs(rows.mean(0) - middle).max() < 5 * deviation / count**0.5
    scaled = (rows - middle) / deviation
    for lag in (1, 2, 64, 2048):
        assert abs((scaled[:, lag:] * scaled[:, :-lag]).mean()) < 5 / (keys * (n - lag)) ** 0.5
    assert abs((scaled[1:] * scaled[:-1]).mean()) < 5 / ((keys - 1) * n) ** 0.5
    assert abs((rows == np.arange(n)).sum() / keys - 1) < 5 / keys**0.5
    assert abs(np.corrcoef(rows.ravel(), np.tile(np.arange(n), keys))[0, 1]) < 5 / (keys * n) ** 0.5


def test_an_epoch_of_a_billion(monkeypatch):
    """Its batches are there at once, in mid-epoch too; ranks share it as they do a short one."""
    big = 10**9
    batches = datasets.EpochBatches(big, 4, 2, 1, 2, seed=3)
    batches.start(5)
    first = next(iter(batches))
    batches.start(5, step=batches.steps - 2)
    rest = list(batches)
    assert (len(rest), len(first)) == (4, 4)
    batches.start(5, step=batches.steps - 1)
    assert list(batches) == rest[2:]
    batches.start(6)
    assert next(iter(batches)) != first
    monkeypatch.setattr(datasets, 'MOST_PERMUTED', 100)
    for copies in (1, 2):
        seen = []
        for number in range(2):
            sampler = datasets.EpochBatches(1001, 4, 2, number, 2, 3, copies)
            seen += [item for batch in sampler for item in batch]
        assert len(set(seen)) == len(seen) == 1001 // 16 * 16
        assert len({item[1] for item in seen}) == len(seen) // copies
    monkeypatch.undo()
    assert datasets.MOST_PERMUTED == 50_000_000
    assert isinstance(datasets.epoch_order(1_281_167, 0, 0), np.ndarray)


# --------------------------------------------------------------------------
# killed


@pytest.mark.faults
@pytest.mark.parametrize('ranks', [0, 2])
def test_killed_on_shards_resumed_as_on_the_folder(ranks, data, packed, tmp_path):
    """The same bytes: killed in mid-epoch and resumed from shards, never killed on the folder."""
    flags = [*SHORT, '--num_workers', '2', '--save_freq_steps', '3']
    whole = run('pretrain', data, tmp_path / 'whole', *flags, ranks=ranks)
    assert whole.returncode == 0, whole.stderr
    killed = run('pretrain', packed, tmp_path / 'out', *flags, ranks=ranks, fault='exit:1:3')
    assert killed.returncode == 9
    done = run('pretrain', packed, tmp_path / 'out', *flags, '--resume', 'auto', ranks=ranks)
    assert done.returncode == 0, done.stderr
    assert 'resumed' in done.stdout
    assert equal_states(load(tmp_path / 'out'), load(tmp_path / 'whole'))
