"""Images of every kind and damage, what becomes of those that cannot be read, and of loader processes that are lost."""

import contextlib
import errno
import io
import json
import math
import os
import re
import shutil
import signal
import struct
import subprocess
import time
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data._utils import signal_handling
from torchvision.datasets.folder import IMG_EXTENSIONS
from training import MAINS, SHORT, arguments, command, equal_states, load, make_images, read_until, run, start, train

from scripts import visualize
from util import run_folder, signals
from util.data import augment, datasets, images
from util.data.datasets import ImageFiles
from util.data.images import Reader
from util.data.loader import deadline
from util.data.stores import Files
from util.errors import LostError, StorageError, UserError, run_main

RNG = np.random.default_rng(0)
PICTURE = Image.fromarray(RNG.integers(0, 256, (30, 40, 3), dtype=np.uint8))


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(color: int, samples: np.ndarray, **more: bytes) -> bytes:
    """A 16-bit PNG by hand, of a colour type and [H, W] or [H, W, C] samples, with more chunks."""
    rows = b''.join(b'\0' + row.astype('>u2').tobytes() for row in samples)
    chunks = {'IHDR': struct.pack('>IIBBBBB', *samples.shape[1::-1], 16, color, 0, 0, 0), **more}
    chunks |= {'IDAT': zlib.compress(rows), 'IEND': b''}
    packed = [(len(data), kind.encode() + data) for kind, data in chunks.items()]
    content = [struct.pack('>I', n) + data + struct.pack('>I', zlib.crc32(data)) for n, data in packed]
    return b'\x89PNG\r\n\x1a\n' + b''.join(content)


@pytest.fixture
def write(tmp_path):
    """write(content, name) -> path"""

    def to_file(content: bytes, name: str = 'image.png') -> str:
        (tmp_path / name).write_bytes(content)
        return str(tmp_path / name)

    return to_file


@pytest.fixture(autouse=True)
def quick_pauses(monkeypatch):
    monkeypatch.setattr(images, 'PAUSE_S', 0.001)


@pytest.fixture
def workers(monkeypatch):
    """Loader processes as a new process would have them, and none left."""
    monkeypatch.setattr(signal_handling, '_SIGCHLD_handler_set', False)
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    yield
    signals.end_workers()
    signal.signal(signal.SIGCHLD, before)


@pytest.fixture
def said(tmp_path, capsys, workers):
    """said(stage, data, flags...) -> the exit code and the line of a run in this process."""

    def end(stage, data, *flags) -> tuple[int, str]:
        main = MAINS[stage]
        argv = arguments(data, tmp_path / 'out', *flags)
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            run_main(lambda: main.main(main.get_args_parser().parse(argv, stage=stage)))
        line = capsys.readouterr().err
        assert line.count('\n') == 1, line
        return stop.value.code, line.replace(str(tmp_path), '...').strip()

    return end


def decode_at(path: str, max_pixels: int) -> Image.Image:
    return Reader(max_pixels).read(Files([path]), 0)


def message(path: str, reader: Reader | None = None, **limit: int) -> str:
    """What a data set of this one file says of it."""
    with pytest.raises(UserError) as error:
        ImageFiles(Files([path]), None, augment.eval_transform(32, 1.0, **limit), 0, reader)[0, 0]
    assert error.value.__cause__ is None
    assert '\n' not in str(error.value)
    return str(error.value)


# --------------------------------------------------------------------------
# one file


NOISE = encoded(PICTURE, 'JPEG', quality=95)
DAMAGED = {
    'a truncated JPEG': (NOISE[: len(NOISE) // 2], 'image file is truncated'),
    'zero bytes': (b'', 'the file is empty'),
    'text as .jpg': (b'It is not here\n', 'not a file of JPEG, PNG, PPM, BMP, TIFF, WEBP'),
    'a JPEG cut in its header': (NOISE[:100], '.'),
    'a PNG cut in its header': (encoded(PICTURE, 'PNG')[:20], '.'),
    'a truncated PNG': (encoded(PICTURE, 'PNG')[:-2000], '.'),
    'a truncated TIFF': (encoded(PICTURE, 'TIFF')[:-2000], '.'),
    'a truncated WebP': (encoded(PICTURE, 'WEBP')[:-200], '.'),
    'a truncated BMP': (encoded(PICTURE, 'BMP')[:-200], '.'),
    'a truncated PPM': (encoded(PICTURE, 'PPM')[:-200], '.'),
    'random bytes after a PNG signature': (b'\x89PNG\r\n\x1a\n' + RNG.bytes(500), '.'),
}


@pytest.mark.fault(28)
@pytest.mark.parametrize('case', DAMAGED)
def test_damaged_files_are_named(case, write):
    content, why = DAMAGED[case]
    path = write(content, 'bad.jpg')
    line = message(path)
    assert re.match(rf'cannot read the image {re.escape(path)}: .*{why}', line), line


@pytest.mark.parametrize(
    'error',
    [
        *(OSError('x'), SyntaxError('x'), ValueError('x'), struct.error('x'), zlib.error('x'), EOFError(), KeyError(1)),
        *(MemoryError(), IndexError(), TypeError('a\nb'), OverflowError('x'), AttributeError('x'), RuntimeError('x')),
        *(OSError(errno.EACCES, 'Permission denied'), Image.DecompressionBombError('x'), UserWarning('x')),
    ],
    ids=repr,
)
def test_whatever_pillow_or_a_transform_raises_is_named(error, write, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    path = write(encoded(PICTURE, 'PNG'))
    with pytest.raises(UserError, match=r'cannot read the image .*: .') as raised:
        ImageFiles(Files([path]), None, fail, 0)[0, 0]
    assert '\n' not in str(raised.value)
    monkeypatch.setattr(Image, 'open', fail)
    with pytest.raises(UserError, match=r'cannot read the image .*: .'):
        ImageFiles(Files([path]), None, None, 0)[0, 0]


def frames(kind: str) -> bytes:
    return encoded(PICTURE, kind, save_all=True, append_images=[Image.new('RGB', PICTURE.size)], lossless=True)


ALPHA = PICTURE.copy()
ALPHA.putalpha(Image.new('L', PICTURE.size, 7))
KINDS = {  # name: (content, what is to be seen in it)
    'a PNG named .jpg': (encoded(PICTURE, 'PNG'), PICTURE),
    'CMYK': (encoded(PICTURE.convert('CMYK'), 'TIFF'), PICTURE.convert('CMYK').convert('RGB')),
    'gray': (encoded(PICTURE.convert('L'), 'PNG'), PICTURE.convert('L').convert('RGB')),
    '1 bit': (encoded(PICTURE.convert('1'), 'PNG'), PICTURE.convert('1').convert('RGB')),
    'alpha, which is dropped': (encoded(ALPHA, 'PNG'), PICTURE),
    'gray with alpha': (encoded(ALPHA.convert('LA'), 'PNG'), PICTURE.convert('L').convert('RGB')),
    'a palette': (encoded(PICTURE.quantize(16), 'PNG'), PICTURE.quantize(16).convert('RGB')),
    'a palette with alpha': (
        encoded(PICTURE.quantize(16), 'PNG', transparency=bytes(range(16))),
        PICTURE.quantize(16).convert('RGB'),
    ),
    'an animated PNG: its first frame': (frames('PNG'), PICTURE),
    'an animated WebP: its first frame': (frames('WEBP'), PICTURE),
    'a TIFF of two pages: the first': (
        encoded(PICTURE, 'TIFF', save_all=True, append_images=[Image.new('L', (9, 9))]),
        PICTURE,
    ),
    '16 bits in each colour': (png(2, np.asarray(PICTURE).astype(np.uint16) * 257), PICTURE),
    '1x1': (encoded(PICTURE.crop((0, 0, 1, 1)), 'PNG'), PICTURE.crop((0, 0, 1, 1))),
    '4000x2': (encoded(PICTURE.resize((4000, 2)), 'PNG'), PICTURE.resize((4000, 2))),
}


@pytest.mark.fault(29)
@pytest.mark.parametrize('case', KINDS)
def test_kinds_of_images(case, write):
    content, expected = KINDS[case]
    path = write(content, 'image.jpg')
    decoded = decode_at(path, 50_000_000)
    assert decoded.mode == 'RGB'
    assert np.array_equal(np.asarray(decoded), np.asarray(expected))
    aa = 'rand-m9-mstd0.5-inc1'
    for transform in (
        augment.pretrain_transform(32, (0.2, 1.0), 0.5),
        augment.finetune_transform(32, (0.08, 1.0), 0.5, None, aa, (0.5, 0.5, 0.5)),
        augment.eval_transform(32, 0.875),
    ):
        sample, _ = ImageFiles(Files([path]), None, transform, 0)[0, 0]
        assert (sample.shape, sample.dtype) == ((3, 32, 32), torch.uint8)


def test_cmyk_jpegs_as_in_imagenet(write):
    """The inverted ones that Photoshop writes; near, for JPEG."""
    smooth = Image.radial_gradient('L').resize((64, 64)).convert('RGB').convert('CMYK')
    found = decode_at(write(encoded(smooth, 'JPEG', quality=95)), 10**6)
    assert np.abs(np.asarray(found).astype(int) - np.asarray(smooth.convert('RGB'))).mean() < 3


def test_formats():
    """Those of the extensions that folders are searched for, and no other: a GIF is refused under any name."""
    extensions = Image.registered_extensions()
    assert {extensions[name] for name in IMG_EXTENSIONS} == set(images.FORMATS)


@pytest.mark.fault(29)
@pytest.mark.parametrize('kind', ['GIF', 'ICO', 'TGA', 'PDF', 'EPS'])
def test_other_formats_are_refused(kind, write):
    path = write(encoded(PICTURE, kind))
    line = message(path)
    assert 'not a file of JPEG, PNG, PPM, BMP, TIFF, WEBP' in line


@pytest.mark.fault(29)
def test_an_extreme_shape_in_evaluation(write):
    """224 pixels of 4000x2 would be cut out of 512000x256, which is not made."""
    path = write(KINDS['4000x2'][0])
    with pytest.raises(UserError, match='4000 x 2 pixels, its shorter side resized to 256, are more than'):
        ImageFiles(Files([path]), None, augment.eval_transform(224, 0.875, 50_000_000), 0)[0, 0]
    just = augment.eval_transform(32, 1.0, 64000 * 32)
    assert ImageFiles(Files([path]), None, just, 0)[0, 0][0].shape == (3, 32, 32)
    assert 'more than --max_pixels 2047999' in message(path, max_pixels=64000 * 32 - 1)


def tiff(order: str, depth: int, data: bytes) -> bytes:
    """A TIFF by hand, of 64 x 64 pixels of gray."""
    tags = {256: 64, 257: 64, 258: depth, 259: 1, 262: 1, 273: 122, 277: 1, 278: 64, 279: len(data)}
    header = struct.pack(f'{order}2sHIH', b'MM' if order == '>' else b'II', 42, 8, len(tags))
    return header + b''.join(struct.pack(f'{order}HHII', tag, 4, 1, n) for tag, n in tags.items()) + bytes(4) + data


GRADIENT = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)


@pytest.mark.fault(30)
@pytest.mark.parametrize(
    ('case', 'content'),
    [
        ('PNG', png(0, GRADIENT)),
        ('PNG with a transparent gray', png(0, GRADIENT, tRNS=b'\0\7')),
        ('PNG of gray and alpha', png(4, np.stack([GRADIENT] * 2, axis=-1))),
        ('PNG of colours', png(2, np.stack([GRADIENT] * 3, axis=-1))),
        ('PNG of colours and alpha', png(6, np.stack([GRADIENT] * 4, axis=-1))),
        ('TIFF', encoded(Image.fromarray(GRADIENT), 'TIFF')),
        ('TIFF, big-endian', tiff('>', 16, GRADIENT.astype('>u2').tobytes())),
        ('PGM', b'P5 64 64 65535\n' + GRADIENT.astype('>u2').tobytes()),
        ('PGM of 10 bits', b'P5 64 64 1023\n' + (GRADIENT >> 6).astype('>u2').tobytes()),
    ],
)
def test_sixteen_bits_are_not_clipped(case, content, write):
    path = write(content)
    if 'transparent' in case:
        assert Image.open(path).info['transparency'] == 7
    means = np.asarray(decode_at(path, 10**6), dtype=float).mean((0, 1))
    assert means == pytest.approx([GRADIENT.mean() / 257] * 3, abs=0.6)


def test_twelve_bits(write):
    """TIFF's, which Pillow calls I;16 too."""
    first, second = (GRADIENT >> 4).reshape(-1, 2).T  # two in three bytes
    triples = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], axis=1)
    data = triples.astype(np.uint8).tobytes()
    path = write(tiff('<', 12, data))
    assert Image.open(path).mode == 'I;16'
    assert np.asarray(decode_at(path, 10**6), dtype=float).mean() == pytest.approx(127, abs=0.6)


@pytest.mark.fault(30)
@pytest.mark.parametrize(('dtype', 'words'), [(np.int32, 'signed or 32-bit integers'), (np.float32, 'floating-point')])
def test_ranges_that_are_not_known_are_refused(dtype, words, write):
    path = write(encoded(Image.fromarray(GRADIENT.astype(dtype) * 100), 'TIFF'))
    line = message(path)
    assert f'its pixels are {words}' in line
    assert 'whose black and white are not known' in line


@pytest.mark.fault(31)
def test_exif(write):
    """Rotation is ignored, as in the papers; what is broken is nobody's loss."""
    exif = Image.Exif()
    exif[0x0112] = 6
    rotated = write(encoded(PICTURE, 'PNG', exif=exif), 'rotated.png')
    assert Image.open(rotated).getexif()[0x0112] == 6
    assert np.array_equal(np.asarray(decode_at(rotated, 10**6)), np.asarray(PICTURE))
    plain = np.asarray(decode_at(write(NOISE, 'a.jpg'), 10**6))
    for broken in (b'Exif\0\0' + RNG.bytes(60), b'Exif\0\0MM\0*\xff\xff\xff\xff', b'Exif\0\0'):
        path = write(encoded(PICTURE, 'JPEG', quality=95, exif=broken), 'b.jpg')
        assert np.array_equal(np.asarray(decode_at(path, 10**6)), plain)


@pytest.mark.fault(32)
def test_bombs(write, recwarn):
    side = 10_000
    bomb = write(encoded(Image.new('1', (side, side)), 'PNG'))
    assert os.path.getsize(bomb) < 20_000
    began = time.perf_counter()
    line = message(bomb, Reader(50_000_000))
    seconds = time.perf_counter() - began
    assert '10000 x 10000 pixels are more than --max_pixels 50000000' in line
    assert seconds < 0.2  # decoding takes seconds
    assert decode_at(bomb, side**2).size == (side, side)
    assert not recwarn.list  # no limit but ours


# --------------------------------------------------------------------------
# folders


@pytest.mark.fault(33)
def test_folders_that_cannot_train(said, tmp_path):
    data = make_images(tmp_path / 'data', per_class=4)

    def check(words: str, stage: str, folder, *flags) -> None:
        code, line = said(stage, folder, *flags)
        assert (code, bool(re.search(words, line))) == (2, True), line
        assert not (tmp_path / 'out').exists()

    (tmp_path / 'empty').mkdir()
    check('no images in', 'pretrain', tmp_path / 'empty')
    make_images(tmp_path / 'one', 1, 1, 1)
    batch = ['--batch_size', '16']
    check('1 training images in .* are fewer than one step', 'pretrain', tmp_path / 'one', *batch)
    check("one has a single class, 'class0': there is nothing to tell it from$", 'finetune', tmp_path / 'one', *batch)
    for stage in MAINS:
        check('12 training images in .* are fewer', stage, data, *batch)
    shutil.copytree(data, tmp_path / 'other')
    (tmp_path / 'other/val/class1').rename(tmp_path / 'other/val/klass1')
    check("of train/ differ: val/ alone has 'klass1'; train/ alone has 'class1'", 'finetune', tmp_path / 'other')
    for image in (data / 'val').glob('*/*'):
        image.unlink()
    check('no images in .*val/class0, .*val/class1, .*val/class2 ', 'finetune', data)
    shutil.rmtree(data / 'train/class2')
    (data / 'train/class2').mkdir()
    check(r'no images in \S+train/class2 .*: fill its folder, or remove it$', 'finetune', data)


@pytest.mark.fault(34)
def test_links_in_a_circle(tmp_path):
    data = make_images(tmp_path / 'data', 2, 2, 1)
    before = datasets.list_images(data)
    (data / 'train/class0/up').symlink_to(data)
    (data / 'train/class1/self').symlink_to('self')
    (data / 'train/class1/across').symlink_to(data / 'train/class0')
    assert list(datasets.list_images(data)) == list(before)
    elsewhere = make_images(tmp_path / 'elsewhere', 1, 1, 1)
    (data / 'more').symlink_to(elsewhere)
    assert len(datasets.list_images(data)) == len(before) + 2


STRANGE = {
    'a newline': b'new\nline.png',
    'not UTF-8': b'caf\xe9\xff.png',
    '255 bytes': b'x' * 251 + b'.png',
    'a tab and an escape': b'a\tb\x1b[31m.png',
}


@pytest.mark.fault(34)
@pytest.mark.parametrize('case', STRANGE)
def test_strange_names(case, tmp_path):
    """They are read, and where they cannot be, are named in one line of UTF-8, on the list too."""
    path = os.path.join(os.fsencode(tmp_path), STRANGE[case])
    with open(path, 'wb') as file:
        file.write(encoded(PICTURE, 'PNG'))
    [found] = datasets.list_images(tmp_path)
    assert ImageFiles(Files([found]), None, np.asarray, 0)[0, 0][0].shape == (30, 40, 3)
    os.truncate(path, 9)
    line = message(found)
    assert line.isprintable()
    line.encode()
    reader = Reader(listing=tmp_path / 'list.txt', max_share=0.5)
    for _ in range(2):
        reader.skip(found, 'why', 2)
    assert len((tmp_path / 'list.txt').read_bytes().splitlines()) == 1


@pytest.fixture
def nobody():
    """No permissions but those that files give."""
    if os.geteuid():
        yield
    else:
        os.seteuid(65534)
        yield
        os.seteuid(0)


@pytest.mark.fault(34)
def test_no_permission(tmp_path, request):
    data = make_images(tmp_path / 'data', 2, 2, 1)
    for folder in (tmp_path, *tmp_path.parents):
        if folder.name.startswith(('test_', 'pytest-', 'popen-')):
            folder.chmod(0o755)
    (data / 'train/class1').chmod(0)
    (data / 'train/class0/0.png').chmod(0)
    request.getfixturevalue('nobody')
    line = message(str(data / 'train/class0/0.png'))
    assert 'Permission denied' in line
    with pytest.raises(UserError, match=r'cannot list the folder \S+class1: Permission denied'):
        datasets.list_images(data)


# --------------------------------------------------------------------------
# a data set with bad images in it


def spoil(data, *places: str) -> list[str]:
    """Overwrite images with text."""
    for place in places:
        (data / place).write_text('nothing to see')
    return [str(data / place) for place in places]


@pytest.fixture
def data(images, tmp_path):
    """A copy, to be changed."""
    return shutil.copytree(images, tmp_path / 'data')


@pytest.mark.fault(28)
@pytest.mark.parametrize('workers_per_process', [0, 2])
@pytest.mark.parametrize('stage', MAINS)
def test_the_first_bad_image_ends_the_run(stage, workers_per_process, data, said):
    spoil(data, 'train/class1/7.png')
    code, line = said(stage, data, *SHORT, '--num_workers', workers_per_process)
    why = 'not a file of JPEG, PNG, PPM, BMP, TIFF, WEBP; --bad_images skip skips such images'
    assert line.endswith(f'error: cannot read the image .../data/train/class1/7.png: {why}')
    assert code == 2


def test_a_bad_image_in_evaluation_and_in_pictures(data, said, tmp_path):
    trained = [*SHORT, '--epochs', '1', '--warmup_epochs', '0']
    train('finetune', data, tmp_path / 'trained', *trained)
    train('pretrain', data, tmp_path / 'pretrained', *trained)
    spoil(data, 'val/class0/3.png', 'train/class0/0.png')
    line = 'error: cannot read the image .../data/{}: not a file'
    best = tmp_path / 'trained/checkpoint-best.pth'
    ends = run('finetune', data, tmp_path / 'out', '--eval', '--resume', best, '--num_workers', '2', timeout=180)
    assert (ends.returncode, ends.stderr.count('\n')) == (2, 1), ends.stderr  # and no loader process holds it up
    assert line.format('val/class0/3.png') in ends.stderr.replace(str(tmp_path), '...')
    code, found = said('pretrain', data, *SHORT, '--vis_freq', '1')
    assert (code, line.format('train/class0/0.png') in found) == (2, True), found
    argv = ['--model', 'mirl_vit_tiny', '--input_size', '32', '--device', 'cpu', str(data / 'val/class0/3.png')]
    argv += ['--checkpoint', str(tmp_path / 'pretrained/checkpoint-last.pth'), '--output', str(tmp_path / 'a.png')]
    with pytest.raises(UserError, match=r'cannot read the image \S+/val/class0/3\.png: not a file of [A-Z, ]+$'):
        visualize.main(visualize.get_args_parser().parse(argv))


def test_skipped_images_do_not_count_in_evaluation(data, said, tmp_path, capsys):
    """Accuracy and loss are those over the others."""
    train('finetune', data, tmp_path / 'run', *SHORT, '--epochs', '1', '--warmup_epochs', '0')
    flags = ['--batch_size', '4', '--eval', '--resume', tmp_path / 'run/checkpoint-best.pth']

    def lines(folder, *more) -> list[str]:
        capsys.readouterr()
        main = MAINS['finetune']
        main.main(main.get_args_parser().parse(arguments(folder, tmp_path / 'eval', *flags, *more)))
        return capsys.readouterr().out.splitlines()[-3:]

    without = shutil.copytree(data, tmp_path / 'without')
    bad = spoil(data, 'val/class0/3.png', 'val/class2/0.png')
    for path in bad:
        (without / path.removeprefix(f'{data}/')).unlink()
    skip = ['--bad_images', 'skip', '--max_bad_images', '0.2']
    found = lines(data, *skip, '--num_workers', '2')
    assert found == lines(data, *skip)
    assert found[1:] == lines(without)[1:]
    assert found[0] == f'bad images skipped: 2, listed in {tmp_path}/eval/bad_images_val.txt'
    assert 'on the 13 test images' in found[2]
    listed = (tmp_path / 'eval/bad_images_val.txt').read_text().splitlines()
    assert sorted(line.partition('\t')[0] for line in listed) == sorted(bad)
    code, line = said('finetune', data, *flags, '--bad_images', 'skip', '--max_bad_images', '0.1')
    assert code == 2
    assert re.search(
        r'2 of 15 images cannot be read, more than --max_bad_images 0\.1; they are listed in \S+; th', line
    )


@pytest.mark.promise(11)
def test_skipping_depends_on_nothing_but_the_seed(data, tmp_path, measured):
    """Any number of workers, resumed or not: the same bytes. Counted once, on the list, in the logs."""
    bad = spoil(data, 'train/class1/7.png', 'train/class0/2.png', 'train/class2/2.png')
    flags = [*SHORT, '--save_freq', '1', '--vis_freq', '1', '--bad_images', 'skip', '--max_bad_images', '0.05']
    whole = train('pretrain', data, tmp_path / 'whole', *flags)
    helped = train('pretrain', data, tmp_path / 'helped', *flags, '--num_workers', '2')
    first = torch.load(tmp_path / 'whole/checkpoint-0.pth', weights_only=True)
    (tmp_path / 'resumed').mkdir()
    for name in ('checkpoint-0.pth', 'bad_images.txt'):
        shutil.copy(tmp_path / 'whole' / name, tmp_path / 'resumed')
    resumed = train('pretrain', data, tmp_path / 'resumed', *flags, '--resume', 'auto')
    assert first['epoch'] == 0
    assert equal_states(helped, whole)
    assert equal_states(resumed, whole)
    for name in ('whole', 'helped', 'resumed'):
        listed = (tmp_path / name / 'bad_images.txt').read_text().splitlines()
        assert sorted(line.partition('\t')[0] for line in listed) == sorted(bad)
        last = json.loads((tmp_path / name / 'log.txt').read_text().splitlines()[-1])
        assert last['bad_images'] == 3
    measured(
        f'{len(bad)} of 66 images cannot be read: replaced, listed once each; weights with 0 and 2 loader '
        f'processes, and resumed, differ by 0'
    )


@pytest.mark.promise(11)
def test_more_than_the_share_end_the_run(data, said, tmp_path, measured):
    spoil(data, *(f'train/class1/{i}.png' for i in range(5)))
    share = ['--bad_images', 'skip', '--max_bad_images', '0.05']
    code, line = said('pretrain', data, *SHORT, *share, '--num_workers', '2')
    assert code == 2
    listing = '.../out/bad_images.txt'
    words = (
        rf'[45] of 66 images cannot be read, more than --max_bad_images 0\.05; they are listed in {listing}; the last: '
    )
    assert re.search(words + r'\.\.\./data/train/class1/\d\.png: not a file', line), line
    listed = (tmp_path / 'out/bad_images.txt').read_text().splitlines()
    assert len(set(listed)) == len(listed) >= 4
    measured(f'more than the share: {line.partition("error: ")[2][:70]}..., exit code {code}')
    # a new run counts from zero, a resumed one continues
    (tmp_path / 'out/bad_images.txt').write_text(''.join(f'mended{i}.png\twhy\n' for i in range(9)))
    spoil(data, *(f'val/class1/{i}.png' for i in range(5)))
    for i in range(5):
        shutil.copy(data / 'train/class0/0.png', data / f'train/class1/{i}.png')
    train('pretrain', data, tmp_path / 'out', *SHORT, *share)
    assert not (tmp_path / 'out/bad_images.txt').exists()
    spoil(data, 'train/class1/0.png')
    (tmp_path / 'out/bad_images.txt').write_text(''.join(f'before{i}.png\twhy\n' for i in range(3)))
    code, line = said('pretrain', data, *SHORT, *share, '--epochs', '3', '--resume', 'auto')
    assert (code, '4 of 66 images cannot be read' in line) == (2, True), line


@pytest.mark.parametrize(
    ('share', 'images', 'most'),
    [(None, 65, 10), (None, 50_000, 50), (None, 12, 6), (None, 2, 1), (None, 1, 0), (0.05, 66, 3), (0.0, 66, 0)],
)
def test_how_many_may_be_bad(share, images, most, tmp_path):
    """Without --max_bad_images a small data set may have some; a share that is given is kept to."""
    reader = Reader(listing=tmp_path / 'list.txt', max_share=share)
    for i in range(most):
        reader.skip(f'{i}.png', 'why', images)
    limit = rf'allows by default \({most}\)' if share is None else f'{share:g}'
    with pytest.raises(UserError, match=f'^{most + 1} of {images} images .* --max_bad_images {limit}; they are listed'):
        reader.skip('last.png', 'why', images)


def test_replacements(data, tmp_path):
    """Another image with its own label, drawn from (seed, epoch, index, attempt) alone."""
    spoil(data, *(f'train/class0/{i}.png' for i in range(22)))
    files, labels, *_ = datasets.labelled_files(data, 'train')
    reader = Reader(listing=tmp_path / 'list.txt', max_share=0.9)
    transform = augment.eval_transform(32, 1.0)
    forward, backward = ({} for _ in range(2))
    for found, order in ((forward, range(22)), (backward, reversed(range(22)))):
        skipping = ImageFiles(files, labels, transform, 3, reader)
        found |= {i: skipping[1, i] for i in order}
    assert all(torch.equal(forward[i][0], backward[i][0]) for i in range(22))
    good = {ImageFiles(files, labels, transform, 3)[1, i][0].numpy().tobytes(): labels[i] for i in range(22, 66)}
    assert all(good[image.numpy().tobytes()] == label for image, label in forward.values())
    assert len({image.numpy().tobytes() for image, _ in forward.values()}) > 10
    other = ImageFiles(files, labels, transform, 3, reader)
    assert any(not torch.equal(other[2, i][0], forward[i][0]) for i in range(22))
    copies = [other[1, 0, copy][1] for copy in range(3)]
    assert copies == [forward[0][1]] * 3
    assert len(reader.skipped()) == 22


@pytest.mark.promise(11)
def test_two_ranks_keep_one_list(data, tmp_path, measured):
    bad = spoil(data, *(f'train/class1/{i}.png' for i in range(6)))
    share = ['--bad_images', 'skip', '--max_bad_images', '0.2', '--num_workers', '2']
    done = run('finetune', data, tmp_path / 'out', *SHORT, *share, ranks=2, timeout=180)
    assert done.returncode == 0, done.stderr
    listed = (tmp_path / 'out/bad_images.txt').read_text().splitlines()
    assert sorted(line.partition('\t')[0] for line in listed) == sorted(bad)
    assert 'bad_images: 6' in done.stdout
    measured(f'2 ranks x 2 loader processes, 2 epochs: {len(listed)} lines for {len(bad)} bad images')


# --------------------------------------------------------------------------
# storage that goes away


def test_storage_that_comes_back(data, tmp_path, monkeypatch, capsys):
    pauses = []

    def pause(seconds):
        pauses.append(seconds / images.PAUSE_S)
        if len(pauses) == 3:
            (tmp_path / 'away').rename(data)

    path = str(data / 'train/class0/0.png')
    before = np.asarray(decode_at(path, 10**6))
    data.rename(tmp_path / 'away')
    monkeypatch.setattr(images, 'time', SimpleNamespace(sleep=pause, monotonic=time.monotonic))
    assert np.array_equal(np.asarray(Reader(root=data).read(Files([path]), 0)), before)
    assert pauses == [1, 2, 4]
    assert capsys.readouterr().err == f'waiting for {path}: No such file or directory\n'


@pytest.mark.parametrize('number', [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EAGAIN])
def test_errors_that_may_pass_are_tried_again(number, data, monkeypatch, capsys):
    calls = []

    def fail(*args, **kwargs):
        calls.append(args)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Image, 'open', fail)
    path = str(data / 'train/class0/0.png')
    with pytest.raises(StorageError, match=rf'{path} is gone: 4 attempts over 0\.\d s; {os.strerror(number)}'):
        ImageFiles(Files([path]), None, None, 0, Reader(retries=3, listing=data / 'list.txt', max_share=0.9))[0, 0]
    assert len(calls) == 4
    assert not (data / 'list.txt').exists()


def test_a_file_alone_is_not_waited_for(data, monkeypatch):
    monkeypatch.setattr(images, 'PAUSE_S', math.inf)  # time.sleep refuses it
    reader = Reader(root=data)
    assert message(str(data / 'train/class0/none.png'), reader).endswith('No such file or directory')
    assert message(str(data / 'train/class0/0.png/none.png'), reader).endswith('Not a directory')
    assert message(str(data / 'train'), reader).endswith('Is a directory')


def test_an_empty_mount_point_is_gone(tmp_path):
    with pytest.raises(StorageError, match='is gone: 1 attempts'):
        Reader(root=tmp_path, retries=0).read(Files([str(tmp_path / 'a.png')]), 0)


def started(stage: str, data, output, *flags) -> subprocess.Popen:
    """A run that has trained for a step."""
    process = start(command(stage, data, output, *flags))
    read_until(process, '[1/')
    return process


def ended(process: subprocess.Popen) -> tuple[int, str]:
    """Its exit code, and the one line that says why."""
    try:
        _, errors = process.communicate(timeout=180)
    finally:
        process.kill()
    assert 'Traceback' not in errors, errors
    [line] = [line for line in errors.splitlines() if 'error:' in line]
    return process.returncode, line


LONG = [*SHORT, '--epochs', '10000', '--save_freq_steps', '1', '--num_workers', '2']


@pytest.mark.fault(35)
def test_data_that_vanish_in_a_run(data, tmp_path):
    process = started('pretrain', data, tmp_path / 'out', *LONG, '--data_retries', '1')
    data.rename(tmp_path / 'away')
    code, line = ended(process)
    line = line.replace(str(tmp_path), '...')
    assert code == StorageError.code, line
    assert re.search(
        r'error: \.\.\./data/train/\S+\.png is gone: 2 attempts over 0\.\d s; No such file or directory', line
    )
    assert load(tmp_path / 'out')['step'] >= 1


# --------------------------------------------------------------------------
# loader processes


def children(process: subprocess.Popen) -> list[int]:
    with open(f'/proc/{process.pid}/task/{process.pid}/children') as file:
        return [int(pid) for pid in file.read().split()]


@pytest.mark.fault(23)
@pytest.mark.parametrize(
    ('number', 'words'),
    [
        (signal.SIGKILL, r'loader process {pid} was killed by SIGKILL \(by the system, if memory is used up: [^;]+\)'),
        (signal.SIGSTOP, r'no loader process has answered for 3\.6 seconds'),
    ],
)
def test_a_lost_loader_process_ends_the_run(number, words, data, tmp_path):
    process = started('pretrain', data, tmp_path / 'out', *LONG, '--dist_timeout', '4')
    pids = children(process)
    os.kill(pids[0], number)
    began = time.monotonic()
    code, line = ended(process)
    seconds = time.monotonic() - began
    line = line.replace(str(tmp_path), '...')
    assert code == LostError.code, line
    named = r'; loader worker \d was to bring the next 8 images: (\.\.\./data/train/class\d/\d+\.png, ){3}\.\.\.'
    assert re.search(words.format(pid=pids[0]) + named, line), line
    assert seconds < 20
    assert not any(os.path.exists(f'/proc/{pid}') for pid in pids)
    assert load(tmp_path / 'out')['step'] >= 1


class Faulty(ImageFiles):
    """Image 13 does something to the process that reads it."""

    def __init__(self, deed, *args):
        super().__init__(*args)
        self.deed = deed

    def image(self, index):
        if index == 13:
            self.deed()
        return super().image(index)


@pytest.mark.fault(23)
@pytest.mark.timeout(90)
def test_loader_processes_that_end_or_hang(data, workers):
    files = datasets.list_images(data / 'train')
    transform = augment.eval_transform(32, 1.0)
    plan = datasets.eval_batches(len(files), 4, 0, 1)
    for deed, words in (
        (lambda: os._exit(0), r'loader process \d+ exited with code 0'),
        (lambda: os.kill(os.getpid(), signal.SIGSTOP), r'no loader process has answered for 1\.8 seconds'),
    ):
        patience = 2 if 'answered' in words else 20
        batches = iter(datasets.loader(Faulty(deed, files, None, transform, 0), plan, 2, False, patience))
        received = []
        with pytest.raises(LostError) as error:
            received.extend(batches)
        line = str(error.value)
        count = len(received)
        assert count <= 3  # what a process has sent may be lost with it
        expected = ', '.join(map(files.name, range(4 * count, 4 * count + 3)))
        worker = f'loader worker {count % 2} was to bring the next 4 images: {expected}, ...'
        assert re.match(f'{words}; {worker}', line), line


@pytest.mark.timeout(90)
def test_a_pause_does_not_count():
    """Ctrl-Z and fg: of 2.5 seconds, all but half a one pass while the process is stopped."""
    child = os.fork()
    if not child:
        code = 6
        with contextlib.suppress(LostError), deadline(2):
            for _ in range(50):
                time.sleep(0.01)
            code = 0
        os._exit(code)
    time.sleep(0.1)
    os.kill(child, signal.SIGSTOP)
    time.sleep(2.5)
    os.kill(child, signal.SIGCONT)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_deadline_ends_what_takes_longer():
    began = time.monotonic()
    with pytest.raises(LostError, match=r'for 0\.3 seconds'), deadline(0.3):
        time.sleep(30)
    assert 0.25 < time.monotonic() - began < 5


def test_a_step_is_finished_before_a_lost_process_is_reported(data, workers):
    """Torch would raise in the middle of whatever the main process is at: a save, for example."""
    files = datasets.list_images(data / 'train')
    dataset = ImageFiles(files, None, augment.eval_transform(32, 1.0), 0)
    batches = iter(datasets.loader(dataset, datasets.eval_batches(len(files), 4, 0, 1), 1, False, dist_timeout_s=20))
    next(batches)
    [worker] = signals.multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGKILL)
    while run_folder.alive(worker.pid):  # here torch's handler would raise
        time.sleep(0.01)
    time.sleep(0.1)
    with pytest.raises(
        LostError, match=f'loader process {worker.pid} was killed by SIGKILL .*; loader worker 0 was to'
    ):
        next(batches)


def test_mistakes_of_the_program_keep_their_traceback(data, workers, monkeypatch):
    def fail(samples):
        raise RuntimeError('a mistake')

    monkeypatch.setattr('util.data.loader.default_collate', fail)
    dataset = ImageFiles(datasets.list_images(data / 'train'), None, augment.eval_transform(32, 1.0), 0)
    with pytest.raises(RuntimeError, match='Original Traceback'):
        next(iter(datasets.loader(dataset, [[(0, 0)]], 1, False)))
