"""Pairs of images and annotations: mistakes in them, crops, inference and mIoU, by mmsegmentation's numbers."""

import hashlib
import re
from argparse import Namespace
from pathlib import Path

import fill
import numpy as np
import pytest
import segmented
import torch
from golden import golden
from PIL import Image

import models_localmim
from util import pictures
from util.data import datasets
from util.data import segmentation as seg
from util.data.annotations import LOOKED_AT
from util.data.images import Reader
from util.data.segmentation import Confusion, TestPairs, TrainPairs, pairs
from util.errors import UserError

RNG = np.random.default_rng(0)


def u8(text: str) -> np.ndarray:
    """u8('tag', H, W), an image."""
    tag, h, w = re.match(r"u8\('(\w+)', (\d+), (\d+)\)", text).groups()
    h, w = int(h), int(w)
    low = np.kron(fill.uniform(f'segmentation/u8/{tag}', (-(-h // 8), -(-w // 8), 3)), np.ones((8, 8, 1)))[:h, :w]
    noise = fill.uniform(f'segmentation/u8noise/{tag}', (h, w, 3))
    return np.clip(np.floor(256 * (0.8 * low + 0.2 * noise)), 0, 255).astype(np.uint8)


def label_named(text: str) -> np.ndarray:
    return segmented.labels(text)[0].numpy().astype(np.uint8)


def digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array)).hexdigest()


# --------------------------------------------------------------------------
# transforms


def test_sizes_and_resizing():
    """Images too are OpenCV's to the bit."""
    reference = golden('segmentation/transforms.json')
    for height, width, scale, size in reference['sizes']['rows']:
        assert seg.rescaled_size(height, width, scale) == tuple(size)
    for case in reference['resize']:
        image, label = u8(case['image']), label_named(case['label'])
        size = seg.rescaled_size(*label.shape, case['scale'])
        assert digest(seg.resize_image(image, size)) == case['image_out']['sha256']
        assert digest(seg.resize_label(label, size)) == case['label_out']['sha256']


def test_colours():
    """To the bit but for one value of 2,376 in one case that goes through HSV."""
    exact = 0
    for case in golden('segmentation/transforms.json')['photometric']:
        ours = seg.distort(u8(case['image']), **case['draws'])
        alike = digest(ours) == case['out']['sha256']
        assert alike or {'saturation', 'hue'} & case['draws'].keys()
        assert abs(int(ours.sum()) - case['out']['sum']) <= 1
        exact += alike
    assert exact == 9
    whole = RNG.integers(0, 256, (70, 50, 3), dtype=np.uint8)  # more than one band of rows
    for steps in ({'saturation': 0.7}, {'hue': -9}):
        rows = [seg.distort(whole[i : i + 1], **steps) for i in range(len(whole))]
        assert np.array_equal(seg.distort(whole, **steps), np.concatenate(rows))


def test_category_check():
    for case in golden('segmentation/transforms.json')['category_check']:
        top, left, bottom, right = case['box_y1x1y2x2']
        assert seg.acceptable(label_named(case['label'])[top:bottom, left:right]) == case['accepted']
    assert not seg.acceptable(np.full((4, 4), 255, np.uint8))
    assert not seg.acceptable(np.array([[0, 0, 0, 1]], np.uint8))  # three quarters are too much
    assert seg.acceptable(np.array([[0, 0, 0, 1, 2]], np.uint8))


def test_normalised_and_padded():
    [case] = golden('segmentation/transforms.json')['normalise_and_pad']
    image, label, valid = seg.pad(u8(case['image']), label_named(case['label']), case['crop'])
    ours = seg.normalise(torch.from_numpy(image).movedim(-1, 0)[None], torch.tensor([valid]))
    assert segmented.difference(ours[0], case['out']) < 1e-6
    assert digest(label) == case['label_out']['sha256']
    assert valid == (40, 33)
    assert (ours[0, :, 40:] == 0).all()
    assert (ours[0, :, :, 33:] == 0).all()


def test_a_box_is_what_is_cut_from_the_whole():
    """No number of a crop depends on how much is computed around it; sizes smaller and larger than an image's."""
    for _ in range(20):
        h, w, new_h, new_w = map(int, RNG.integers(1, 150, 4))
        image, label = RNG.integers(0, 256, (h, w, 3), dtype=np.uint8), RNG.integers(0, 9, (h, w), dtype=np.uint8)
        top, left = int(RNG.integers(new_h)), int(RNG.integers(new_w))
        extent = int(RNG.integers(1, new_h - top + 1)), int(RNG.integers(1, new_w - left + 1))
        box = (new_h, new_w), (top, left), extent
        cut = np.s_[top : top + extent[0], left : left + extent[1]]
        assert np.array_equal(seg.resized_box(image, *box), seg.resize_image(image, (new_h, new_w))[cut])
        assert np.array_equal(seg.label_box(label, *box), seg.resize_label(label, (new_h, new_w))[cut])


# --------------------------------------------------------------------------
# data sets


def write(path: Path, pixels: np.ndarray, mode: str | None = None, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


def make_pairs(folder: Path, count: int = 6, names: str = '{}'):
    """`folder/{images,annotations}/{training,validation}`: the red of a pixel is its label, 0, 1 or 2."""
    numbers = np.random.default_rng(0)
    for split, images in (('training', count), ('validation', 3)):
        for i in range(images):
            label = np.kron(numbers.integers(0, 3, (5, 5)), np.ones((8, 12), int)).astype(np.uint8)
            write(folder / 'images' / split / f'{names.format(i)}.png', np.stack([label, label * 0 + i, label], -1))
            write(folder / 'annotations' / split / f'{names.format(i)}.png', label)
    return folder


def given(folder: Path, **values) -> Namespace:
    defaults = dict(dataset='folder', nb_classes=3, reduce_zero_label=None, max_pixels=1e9, data_retries=0)
    return Namespace(data_path=folder, **defaults | values)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Six pairs and three of three classes. Tests that change files make their own."""
    return make_pairs(tmp_path_factory.mktemp('pairs'))


def test_a_crop_and_its_label_stay_together(folder):
    """Flipped and padded too; a function of the seed and the item alone."""
    train, _ = pairs(given(folder))
    plain = dict(crop=(30, 70), short_side=40, scale_range=(1.0, 1.0), photometric=False)
    items = {item: TrainPairs(train, seed=5, **plain)[item] for item in [(e, i) for e in range(5) for i in range(6)]}
    for (_, index), (image, label, valid) in items.items():
        assert (image.dtype, label.dtype, valid.tolist()) == (torch.uint8, torch.uint8, [30, 60])
        assert torch.equal(image[0, :, :60], label[:, :60])
        assert (image[1, :, :60] == index).all()
        assert (label[:, 60:] == 255).all()
        assert (image[:, :, 60:] == 0).all()
    again = TrainPairs(train, seed=5, **plain)
    for item in reversed(items):
        assert all(map(torch.equal, again[item], items[item]))
    different = TrainPairs(train, seed=6, **plain)
    assert not all(torch.equal(different[item][0], items[item][0]) for item in items)
    unflipped = TrainPairs(train, seed=5, hflip=0.0, **plain)
    flips = [not torch.equal(unflipped[item][1], items[item][1]) for item in items]
    assert 5 < sum(flips) < 25


def test_resizing_colours_and_crops_are_drawn(folder, monkeypatch):
    train, _ = pairs(given(folder))
    scales, drawn = [], []
    monkeypatch.setattr(
        seg, 'rescaled_size', lambda h, w, scale, of=seg.rescaled_size: scales.append(scale) or of(h, w, scale)
    )
    monkeypatch.setattr(seg, 'distort', lambda image, **steps: drawn.append(steps) or image)
    data = TrainPairs(train, 32, short_side=100)
    for epoch in range(50):
        data[epoch, 0]
    assert min(scales)[1] >= 50
    assert max(scales)[1] < 200
    assert all(abs(long - 4 * short) <= 4 for long, short in scales)
    assert len(set(scales)) > 40
    for name, low, high in (('brightness', -32, 32), ('saturation', 0.5, 1.5), ('hue', -18, 17)):
        values = [steps[name] for steps in drawn if name in steps]
        assert 12 < len(values) < 38
        assert low <= min(values) < max(values) <= high
    assert all(not {'contrast_before', 'contrast_after'} <= steps.keys() for steps in drawn)
    assert {name for steps in drawn for name in steps} >= {'contrast_before', 'contrast_after'}


def test_crops_of_one_class_are_drawn_again(monkeypatch):
    """Ten times at most; the eleventh is taken unseen."""
    label, tried = np.zeros((100, 100), np.uint8), []
    label[:, :8] = 1
    monkeypatch.setattr(seg, 'acceptable', lambda part, of=seg.acceptable: tried.append(of(part)) or tried[-1])
    image = np.zeros((100, 100, 3), np.uint8)
    for seed in range(40):
        tried.clear()
        _, part = seg.random_crop(image, label, (100, 100), (16, 16), np.random.default_rng(seed))
        assert len(tried) <= 10
        assert not any(tried[:-1])
        assert tried[-1] or len(tried) == 10
        assert part.shape == (16, 16)
    assert not seg.random_crop(image, label * 0, (100, 100), (16, 16), np.random.default_rng(0))[1].any()


def test_batches(folder):
    """Lists of tensors; an image at several scales alone."""
    train, val = pairs(given(folder))
    batches = datasets.EpochBatches(6, 2, 1, 0, 1, 0)
    loaded = list(datasets.loader(TrainPairs(train, 16), batches, 0, False))
    assert [[list(part.shape) for part in batch] for batch in loaded] == 3 * [[[2, 3, 16, 16], [2, 16, 16], [2, 2]]]
    assert [part.dtype for part in loaded[0]] == [torch.uint8, torch.uint8, torch.int64]
    tests = TestPairs(val, 20, [0.5, 1.0], least=15)
    for imgs, label in datasets.loader(tests, datasets.eval_batches(3, 1, 0, 1), 0, False):
        assert [list(image.shape) for image in imgs] == [[1, 3, 15, 23], [1, 3, 20, 30]]
        assert list(label.shape) == [1, 40, 60]
    by_scales = {scales: TestPairs(val, 20, scales, least=20) for scales in [(1.0,), (0.5,), (0.5, 1.0)]}
    assert [pairs.size(10, 100, scales[-1]) for scales, pairs in by_scales.items()] == [(8, 80), (20, 200), (20, 200)]
    unlabelled = TestPairs(val._replace(annotations=None), 20)
    assert (unlabelled[0, 1][1] == 255).all()


def test_a_pair_that_cannot_be_read(tmp_path):
    """It is a bad image, for whichever of its files; what is wrong with labels is not to be skipped."""
    train, val = pairs(given(make_pairs(tmp_path)))
    broken = Path(train.annotations.name(2))
    broken.write_bytes(broken.read_bytes()[:60])
    with pytest.raises(
        UserError, match=r'cannot read the image .*/2.png: its annotation .*/annotations/.*2.png: .*trunc'
    ):
        TrainPairs(train, 16)[0, 2]
    reader = Reader(listing=tmp_path / 'bad.txt', max_share=1.0)
    image, _, valid = TrainPairs(train, 16, reader=reader)[0, 2]
    assert image[1].unique().tolist() != [2]
    assert valid.tolist() == [16, 16]
    Path(val.images.name(1)).write_bytes(b'')
    imgs, label = TestPairs(val, 20, [1.0, 2.0], reader=reader)[0, 1]
    assert len(imgs) == 2
    assert (label == 255).all()
    assert len(reader.skipped()) == 2
    write(Path(train.annotations.name(3)), np.full((40, 60), 7, np.uint8))
    with pytest.raises(UserError, match='has the label 7'):
        TrainPairs(train, 16, reader=reader)[0, 3]


# --------------------------------------------------------------------------
# mistakes


ZEROS = np.zeros((40, 60), np.uint8)
FAULTS = {  # what is done to the folder, what it is given as, and the line
    'beyond': (
        lambda f, a: write(a / '4.png', ZEROS + 3),
        {},
        r'the annotation .*/training/4.png has the label 3, beyond the 3 classes: 0 to 2, and 255, ignored; if 0 '
        r'stands for no class and 1 for the first: --reduce_zero_label',
    ),
    'far beyond': (
        lambda f, a: write(a / '4.png', ZEROS + 9),
        {},
        r'has the label 9, beyond the 3 classes: 0 to 2, and 255, ignored$',
    ),
    'beyond, reduced': (
        lambda f, a: write(a / '4.png', ZEROS + 4),
        {'reduce_zero_label': True},
        r'has the label 4, beyond the 3 classes: 1 to 3, and 0 and 255, ignored$',
    ),
    'colours': (
        lambda f, a: write(a / '1.png', np.stack([ZEROS, ZEROS + 9, ZEROS], -1)),
        {},
        r'1.png has 3 channels \(RGB\), colours instead of labels: each pixel must be the number of its class, in gray '
        r'or as a place in a palette',
    ),
    'gray in colours': (
        lambda f, a: write(a / '1.png', ZEROS, 'RGBA'),
        {},
        r'has 4 channels \(RGBA\), of which one alone is needed: PIL.Image.open\(FILE\).getchannel\(.R.\).save\(FILE\)',
    ),
    'gray and alpha': (lambda f, a: write(a / '1.png', ZEROS, 'LA'), {}, r'\(LA\), of which one .*getchannel\(.L.\)'),
    '16 bits': (
        lambda f, a: write(a / '1.png', ZEROS.astype(np.uint16)),
        {},
        r'1.png has 16 bits a pixel: labels have 8, the class of each pixel, so 255 classes at most',
    ),
    'size': (
        lambda f, a: write(a / '1.png', ZEROS[:30]),
        {},
        r'1.png is 60 x 30 pixels, its image .*/1.png 60 x 40: they must be alike',
    ),
    'turned': (
        lambda f, a: write(a / '1.png', ZEROS.T),
        {},
        r"60 x 40 \(turned\? EXIF's rotation is ignored in both\)",
    ),
    'named PNG': (
        lambda f, a: write(a / '1.png', ZEROS, format='JPEG'),
        {},
        r'1.png is a JPEG, which does not keep numbers as they are: save it as PNG, from the original labels',
    ),
    'JPEG': (
        lambda f, a: (a / '1.png').rename(a / '1.jpg'),
        {},
        r'1 of 6 images in .*/images/training have no annotation: for the first, .*training/1.png should be '
        r'there; there is .*/1.jpg, but annotations are PNGs',
    ),
    'missing': (lambda f, a: (a / '1.png').unlink(), {}, r'training/1.png should be there; there is .*/0.png$'),
    'none at all': (
        lambda f, a: [path.unlink() for path in a.iterdir()],
        {},
        r'6 of 6 images .* there is none at all',
    ),
    'two images': (
        lambda f, a: write(f / 'images/training/3.jpg', np.stack([ZEROS] * 3, -1)),
        {},
        r'training/3.jpg and .*/training/3.png would share the annotation .*/training/3.png: rename one of them',
    ),
    'all ignored': (
        lambda f, a: [write(path, ZEROS + 255) for path in a.iterdir()],
        {},
        r'train: of 6 annotations, evenly from all, every pixel is 255, ignored$',
    ),
    'zeros reduced': (
        lambda f, a: [write(path, ZEROS) for path in a.iterdir()],
        {'reduce_zero_label': True},
        r'every pixel is 0 and 255, ignored; without --reduce_zero_label, 0 is a class',
    ),
    'no classes': (
        None,
        {'nb_classes': None},
        r'how many classes\? Give --nb_classes, or write .*/classes.txt, the name of a class in each line',
    ),
    'one class': (None, {'nb_classes': 1}, r'a single class: there is nothing to tell it from'),
    'many classes': (
        None,
        {'nb_classes': 300},
        r'300 classes, but labels have 8 bits and 255 is ignored: 255 at most',
    ),
    'names and number': (
        lambda f, a: (f / 'classes.txt').write_text('sky\nsea\n'),
        {},
        r'--nb_classes 3, but .*/classes.txt has 2: leave the flag out',
    ),
    'empty line': (
        lambda f, a: (f / 'classes.txt').write_text('sky\n\nsea\nsand'),
        {},
        r'line 2 of .*classes.txt is empty: line k names class k - 1, so take it out, or name it',
    ),
    'no name': (lambda f, a: (f / 'classes.txt').write_text('\n'), {}, r'is empty: it should have the name of a class'),
    'UTF-16': (
        lambda f, a: (f / 'classes.txt').write_bytes('sky\nsea\n'.encode('utf-16')),
        {},
        r'is not text in UTF-8',
    ),
    'ADE20K as generic': (
        lambda f, a: (f / 'objectInfo150.txt').touch(),
        {'nb_classes': 150},
        r'has an objectInfo150.txt, so it is ADE20K, where 0 stands for no class: --dataset ade20k is right',
    ),
    'generic as ADE20K': (
        lambda f, a: (f / 'classes.txt').write_text('sky\nsea\nsand'),
        {'dataset': 'ade20k', 'nb_classes': None},
        r'--dataset ade20k, but .* has a classes.txt: --dataset folder is right',
    ),
    'names that are not its': (
        None,
        {'dataset': 'ade20k', 'nb_classes': None},
        r'no file in .*/training is named ADE_.*: --dataset folder --reduce_zero_label --nb_classes 150',
    ),
    'other number': (None, {'dataset': 'ade20k'}, r'--nb_classes 3, but ADE20K has 150: leave the flag out'),
    'both names': (
        lambda f, a: (f / 'images/train').mkdir(),
        {},
        r'images has both training/ and train/: leave one of them there',
    ),
    'no validation': (
        lambda f, a: (f / 'images/validation').rename(f / 'images/test'),
        {},
        r'no such folder: .*/images/validation \(or val\); there is test, training; .* should hold images/ and annot',
    ),
    'other folders': (
        lambda f, a: (f / 'annotations').rename(f / 'labels'),
        {},
        r'no such folder: .*/annotations; .* should hold images/ and annotations/, with .*; it holds images, labels',
    ),
}


@pytest.mark.parametrize('name', FAULTS)
def test_mistakes(name, tmp_path):
    fault, flags, line = FAULTS[name]
    make_pairs(tmp_path)
    if fault:
        fault(tmp_path, tmp_path / 'annotations/training')
    with pytest.raises(UserError, match=line) as error:
        pairs(given(tmp_path, **flags))
    assert '\n' not in str(error.value)
    print(error.value)


def test_pairs_are_no_classes(tmp_path):
    """Folders of pairs that are given to fine-tuning: their annotations are not to be advised."""
    make_pairs(tmp_path)
    assert datasets.advice(tmp_path, 'train') == '; it is laid out for scripts/finetune_segmentation.py'


def test_levels(tmp_path):
    """A folder too high or too low."""
    make_pairs(tmp_path / 'data/ade')
    for wrong in ('', 'data', 'data/ade/images', 'data/ade/annotations/training'):
        with pytest.raises(UserError, match=r'; did you mean --data_path .*/data/ade\?$'):
            pairs(given(tmp_path / wrong))
    with pytest.raises(UserError, match=r'^no such folder: .*/missing$'):
        pairs(given(tmp_path / 'missing'))


def test_what_is_accepted(tmp_path):
    """Other names of splits, folders in them, palettes, bits, a BOM; and a log that tells what the labels are like."""
    make_pairs(tmp_path)
    for inside in ('images', 'annotations'):
        (tmp_path / inside / 'training').rename(tmp_path / inside / 'train')
        (tmp_path / inside / 'validation').rename(tmp_path / inside / 'val')
        (tmp_path / inside / 'train/scene').mkdir()
        (tmp_path / inside / 'train/0.png').rename(tmp_path / inside / 'train/scene/0.png')
    folder = tmp_path / 'annotations/train'
    palette = Image.fromarray(np.asarray(Image.open(folder / '1.png')))
    palette.putpalette(RNG.integers(0, 256, 768, dtype=np.uint8).tobytes())
    palette.save(folder / '1.png')
    write(folder / '2.png', np.kron([[0, 1]], np.ones((40, 30))).astype(bool))
    write(folder / '3.png', ZEROS + 255)
    write(folder / 'alone.png', ZEROS)
    (tmp_path / 'images/train/notes.txt').touch()
    (tmp_path / 'classes.txt').write_bytes(b'\xef\xbb\xbfsky\r\nsea \r\nsand\r\nsun\r\n\r\n')
    before = np.asarray(Image.open(folder / '1.png'))

    train, val = pairs(given(tmp_path, nb_classes=None))
    assert train.classes == val.classes == ['sky', 'sea', 'sand', 'sun']
    whole = TestPairs(train, 40)
    assert [Path(name).stem for name in train.images] == [Path(name).stem for name in train.annotations]
    at = {Path(name).stem: index for index, name in enumerate(train.images)}
    assert np.array_equal(whole[0, at['1']][1], before)
    assert whole[0, at['2']][1].unique().tolist() == [0, 1]
    first, facts = train.notes
    assert first.startswith('train: 6 images, 4 classes; not taken as images: by ending 1 (.txt)')
    assert first.endswith('1 annotation without an image (alone.png)')
    assert facts == (
        'train: of 6 annotations, evenly from all: 3 of 4 classes seen; never sun; '
        '16.7% of the pixels ignored (255); 1 annotation ignored as a whole'
    )
    [alone] = pairs(given(tmp_path, nb_classes=None), ['val'])
    assert list(alone.images) == list(val.images)


def test_facts_that_tell_of_a_mistake(tmp_path):
    make_pairs(tmp_path)
    train = pairs(given(tmp_path, reduce_zero_label=True))[0]  # 0 is a class
    assert train.notes[1].endswith('; if 0 is a class, leave out --reduce_zero_label')
    for path in (tmp_path / 'annotations/training').iterdir():
        write(path, np.kron([[0, 255]], np.ones((40, 30))).astype(np.uint8))
    [train] = pairs(given(tmp_path, nb_classes=2), ['train'])
    assert train.notes[1].endswith('; they hold 0 and 255 alone: if 255 is to be a class, write 1 for it')


def test_looks_evenly_at_a_hundred(tmp_path, monkeypatch):
    folder = tmp_path / 'annotations/training'
    for i in range(250):
        write(folder / f'{i:03}.png', ZEROS[:2, :2] + i // 100)
        write(tmp_path / f'images/training/{i:03}.png', ZEROS[:2, :2])
    [train] = pairs(given(tmp_path, nb_classes=3), ['train'])
    assert f'of {LOOKED_AT} annotations, evenly from all: 3 of 3 classes seen' in train.notes[1]


def test_ade20k(tmp_path):
    make_pairs(tmp_path, names='ADE_train_{:08}')
    [train] = pairs(given(tmp_path, dataset='ade20k', nb_classes=None), ['train'])
    assert train.classes == [str(number) for number in range(150)]
    lines = [f'{k}\t0.1\t11\t22\tname {k}, another' for k in range(1, 151)]
    (tmp_path / 'objectInfo150.txt').write_text('\n'.join(['Idx\tRatio\tTrain\tVal\tName', *lines]))
    [train] = pairs(given(tmp_path, dataset='ade20k', nb_classes=150), ['train'])
    assert train.classes[0] == 'name 1'
    assert train.classes[149] == 'name 150'
    label = TestPairs(train, 40, reduce_zero=True)[0, 0][1]
    assert label.unique().tolist() == [0, 1, 255]
    (tmp_path / 'objectInfo150.txt').write_text('\n'.join(lines[:149]))
    with pytest.raises(UserError, match='is damaged: it should name 1 to 150, but 150 has no line'):
        pairs(given(tmp_path, dataset='ade20k', nb_classes=None), ['train'])


# --------------------------------------------------------------------------
# inference and metric


def test_windows():
    for case in golden('segmentation/windows.json')['cases']:
        height, width, crop, stride = case['size']
        rows, columns = (seg.windows(side, crop, stride) for side in (height, width))
        assert [[top, left, bottom, right] for top, bottom in rows for left, right in columns] == case['windows']


class Pointwise(torch.nn.Conv2d):
    """A network of which a pixel's logits depend on that pixel alone."""

    def __init__(self, fixed_size=None):
        super().__init__(3, 5, 1)
        self.fixed_size, self.seen = fixed_size, set()

    def forward(self, imgs):
        self.seen.add(tuple(imgs.shape[2:]))
        return super().forward(imgs)


def test_slide_equals_whole():
    """For windows of any size and distance; a network of a fixed size is never given less."""
    imgs = torch.rand(1, 3, 50, 70)
    for fixed_size, crop, stride in ((None, 32, 20), (64, 64, 42), (None, (20, 90), (7, 30))):
        model = Pointwise(fixed_size)
        whole = model(imgs)
        model.seen.clear()
        assert torch.allclose(seg.slide_logits(model, imgs, crop, stride), whole, atol=1e-6)
        assert not fixed_size or model.seen == {(64, 64)}
        slid = seg.predict(model, imgs, (25, 35), 'slide', crop, stride)
        assert torch.allclose(slid, seg.predict(model, imgs, (25, 35)), atol=1e-6)
    assert seg.predict(Pointwise(30), imgs, (25, 35), 'slide').sum(1).allclose(torch.ones(1, 25, 35))
    for mode, message in (('slides', "mode 'slides' is not one of whole, slide"), ('slide', 'needs a crop')):
        with pytest.raises(ValueError, match=message):
            seg.predict(Pointwise(), imgs, (25, 35), mode)


def test_mirrored_and_several_scales():
    imgs, model = [torch.rand(1, 3, 20, 30), torch.rand(1, 3, 40, 60)], Pointwise()
    alone = [seg.predict(model, x, (20, 30)) for x in imgs]
    assert torch.allclose(seg.predict(model, imgs, (20, 30)), sum(alone) / 2, atol=1e-6)
    assert torch.allclose(seg.predict(model, imgs, (20, 30), flip=True), sum(alone) / 2, atol=1e-6)
    sideways = torch.nn.Conv2d(3, 5, (1, 3), padding=(0, 1))  # what it sees is not symmetrical
    mirrored = seg.predict(sideways, imgs[0].flip(-1), (20, 30)).flip(-1)
    both = seg.predict(sideways, imgs[0], (20, 30), flip=True)
    assert torch.allclose(both, (seg.predict(sideways, imgs[0], (20, 30)) + mirrored) / 2, atol=1e-6)
    assert not torch.allclose(both, mirrored, atol=1e-3)


def test_inference_parity():
    """Slide, whole, mirrored and at several scales, by a network that pads everywhere."""
    reference = golden('segmentation/inference.json')
    model = models_localmim.create_segmenter('localmim_swin_tiny', **reference['config']).eval()
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            value.copy_(torch.from_numpy(fill.weight(name.replace('encoder.', 'backbone.', 1), value.shape)))
    imgs, size, crop, stride = (
        segmented.images(reference['input']),
        *map(reference.get, ('ori_shape', 'crop', 'stride')),
    )
    with torch.no_grad():
        found = {'slide_logits': seg.slide_logits(model, imgs, crop, stride)}
    found['slide_probabilities'] = seg.predict(model, imgs, size, 'slide', crop, stride)
    found['whole_probabilities'] = whole = seg.predict(model, imgs, size)
    found['whole_probabilities_flipped_back'] = 2 * seg.predict(model, imgs, size, flip=True) - whole
    several = reference['multi_scale']
    scales = [segmented.images(text.partition(', plain')[0]) for text in several['inputs']]
    found['mean_probabilities'] = seg.predict(model, scales, size, flip=True)
    differences = {name: segmented.difference(value, (reference | several)[name]) for name, value in found.items()}
    assert max(differences.values()) < 1e-5, differences
    for name, case in (('slide', reference), ('whole', reference), ('mean', several)):
        counts = found[f'{name}_probabilities'].argmax(1).flatten().bincount(minlength=7)
        assert counts.tolist() == case['prediction_counts' if name == 'mean' else f'{name}_prediction_counts']


def judged(case: dict) -> tuple[np.ndarray, np.ndarray]:
    """Predictions and labels of a case."""
    tag, n, h, w = (case[key] for key in ('tag', 'n', 'height', 'width'))

    def drawn(kind, shape=(n, h, w)):
        return fill.uniform(f'segmentation/{kind}/{tag}', shape)

    coarse = np.floor(drawn('raw', (n, -(-h // 4), -(-w // 4))) * (case['largest_raw_label'] + 1))
    raw = np.kron(coarse, np.ones((4, 4)))[:, :h, :w].astype(np.uint8)
    raw[drawn('void') < 0.07] = 255
    label, prediction = raw.astype(int) - 1, np.floor(drawn('pred') * case['prediction_classes']).astype(int)
    agree = (drawn('agree') < 0.6) & (label >= 0) & (label < case['num_classes'])
    return np.where(agree, label, prediction), seg.reduce_zero_label(raw)


@pytest.mark.parametrize('case', golden('segmentation/miou.json')['cases'], ids=lambda case: case['tag'])
def test_miou(case):
    prediction, label = (torch.from_numpy(x) for x in judged(case))
    found, theirs = Confusion(case['num_classes']), case['mmseg_0.11']
    if case['tag'] == 'beyond':
        with pytest.raises(UserError, match='a label is 6, beyond the 6 classes: 0 to 5, and 255, ignored'):
            found.update(prediction, label)
        return
    for one in zip(prediction, label, strict=True):
        found.update(*one)
    matrix = found.matrix
    areas = {'intersect': matrix.diagonal(), 'label': matrix.sum(1), 'pred': matrix.sum(0)}
    assert {name: area.tolist() for name, area in areas.items()} == {name: theirs[f'area_{name}'] for name in areas}
    for name, ours in found.miou().items():
        assert np.allclose(ours, np.array(theirs[name], float), atol=1e-9, equal_nan=True)


def test_nothing_is_judged():
    found = Confusion(4)
    found.update(torch.zeros(2, 2), torch.full((2, 2), 255))
    assert np.isnan(found.miou()['mIoU'])
    with pytest.raises(UserError, match='a prediction is 4, beyond the 4 classes'):
        found.update(torch.full((2, 2), 4), torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r'predictions \[2, 2\] of labels \[4\]'):
        found.update(torch.zeros(2, 2), torch.zeros(4))


# --------------------------------------------------------------------------
# pictures


def test_labels_drawn_over_images(folder, tmp_path):
    colours = pictures.palette(255)
    assert len(np.unique(colours, axis=0)) == 255
    image, label = np.full((30, 400, 3), 200, np.uint8), np.full((30, 400), 255, np.uint8)
    label[:, 100:200], label[:, 200:] = 1, 2
    drawn = pictures.overlay(image, label, ['sky', 'sea', 'sand'])
    assert drawn.shape[1] == 400 + 2 * pictures.MARGIN
    row = drawn[pictures.MARGIN + pictures.LINE + 15, pictures.MARGIN : -pictures.MARGIN]
    assert (row[:100] == 200).all()
    for part, k in ((row[100:200], 1), (row[200:], 2)):
        assert np.abs(part - (0.4 * 200 + 0.6 * colours[k])).max() <= 0.5
    below = drawn[pictures.MARGIN + pictures.LINE + 30 + pictures.MARGIN :]
    assert [bool((below == colours[k]).all(-1).any()) for k in range(3)] == [False, True, True]

    pictures.label_png(label).save(tmp_path / 'label.png')
    assert np.array_equal(np.asarray(Image.open(tmp_path / 'label.png')), label)

    [val] = pairs(given(folder), ['val'])
    asked = []

    def label_of(imgs, size):
        asked.append((len(imgs), imgs[0].shape, size))
        return torch.ones(1, *size, dtype=torch.int64)

    drawn = pictures.some_labelled(label_of, TestPairs(val, 20, [1.0, 2.0]), 2)
    assert asked == [(2, (1, 3, 20, 30), (20, 30))] * 2
    assert drawn.shape[1] == pictures.MARGIN + 3 * (320 + pictures.MARGIN)
    long = np.zeros((2000, 1, 3), np.uint8), np.zeros((2000, 1), np.uint8)
    assert pictures.overlay(*long, ['sky']).shape[0] < 2100
    assert pictures.labelled([long[0]], {'truth': [long[1]]}, ['sky'], width=320).shape[0] < 4 * 320 + 100


def test_a_long_legend_is_cut():
    label = np.arange(100, dtype=np.uint8)[None].repeat(10, 0)
    entries, height = pictures.legend(
        np.bincount(label.ravel(), minlength=256), [f'class {k}' * 9 for k in range(100)], 300
    )
    assert [text for *_, text, colour in entries if colour is None] == ['and 60 more']
    assert height == 41 * pictures.LINE
    assert all(left + pictures.font().getlength(text) < 300 for left, _, text, _ in entries)
