"""COCO folders: mistakes in them, geometry and masks by detectron2's and pycocotools' numbers, and AP."""

import copy
import hashlib
import json
import re
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden import golden
from PIL import Image
from torch.nn import functional

from scripts import visualize
from util import build, pictures
from util.data import coco, datasets
from util.data.coco import Augment, CocoFolder, evaluate, jitter, mask_of, packed, shortest_edge
from util.data.images import Reader
from util.data.jitter import clipped, nearest
from util.data.stores import Names
from util.errors import UserError

# --------------------------------------------------------------------------
# geometry and masks


def test_large_scale_jitter():
    """Sizes, offsets and areas are detectron2's, boxes its within 1e-4 pixels."""
    for case in golden('detection/lsj.json')['cases']:
        draws = (case[name] for name in ('u_flip', 'u_scale', 'u_crop'))
        geometry = jitter(*case['image'], case['target'], *draws, case['scale_range'])
        expected = (case['flipped'], *(tuple(case[name]) for name in ('resized_to', 'crop_top_left', 'size')))
        assert geometry[:4] == expected
        boxes = [[x, y, x + w, y + h] for x, y, w, h in (row['bbox'] for row in case['annotations'])]
        assert np.abs(geometry.boxes(boxes) - case['boxes_of_annotation']).max() < 1e-4
        for row, box, kept, area in zip(
            case['annotations'], case['boxes_of_mask'], case['kept'], case['mask_area'], strict=True
        ):
            polygons = geometry.polygons(row['segmentation'])
            assert bool(polygons) == kept
            if kept:
                points = np.concatenate([np.reshape(part, (-1, 2)) for part in polygons])
                assert np.abs([*points.min(0), *points.max(0)] - np.array(box)).max() < 1e-4
                assert mask_of(polygons, *geometry.size).sum() == area


def test_shortest_edge():
    for *given, height, width in golden('detection/shortest_edge.json')['rows']:
        assert shortest_edge(*given) == (height, width)


def test_masks():
    for case in golden('detection/masks.json')['cases']:
        mask = mask_of(case['segmentation'], case['height'], case['width'])
        assert hashlib.sha256(mask.tobytes()).hexdigest() == case['mask_sha256'], case['name']
        assert packed(mask[None]) == [{'size': [case['height'], case['width']], 'counts': case['rle']}]
    rng = np.random.default_rng(0)
    for _ in range(20):  # what compressed runs say is checked by code of our own
        mask = (rng.random((37, 23)) < rng.random()).astype(np.uint8)
        [rle] = packed(mask[None])
        for counts in (rle['counts'], rle['counts'].encode()):  # as pycocotools has them
            assert np.array_equal(mask_of(rle | {'counts': counts}, 37, 23), mask)


@pytest.mark.parametrize(
    ('segmentation', 'fault'),
    [
        ([[1, 1, 5, 5]], 'a polygon of 2 points'),
        ([[1, 1, 5, 5, 3, 9], [1, 1, 5]], 'not a list x, y, x, y'),
        ([1, 1, 5, 5, 3, 9], 'not a list x, y, x, y'),
        ([[1, 1, 5, 5, 3, 1e9]], 'far outside'),
        ([[1, 1, 5, 5, 3, '9']], 'not a list x, y, x, y'),
        ([], 'no segmentation'),
        (None, 'no segmentation'),
        ({'size': [8, 10], 'counts': [80]}, 'a mask of 10 x 8 pixels, its image 8 x 10'),
        ({'size': [10, 8], 'counts': [3, 4]}, 'a damaged mask'),
        ({'size': [10, 8], 'counts': [-3, 83]}, 'a damaged mask'),
        ({'size': [10, 8], 'counts': 'W1'}, 'a damaged mask'),  # pycocotools would show what lay in memory
        ({'size': [10, 8], 'counts': ''}, 'a damaged mask'),
        ({'size': [10, 8], 'counts': 'W11>4N0O20NHN32L05LM4801Nh'}, 'a damaged mask'),
    ],
)
def test_what_is_no_mask(segmentation, fault):
    with pytest.raises(ValueError, match=fault):
        mask_of(segmentation, 10, 8)


def test_a_clipped_polygon_has_no_bridges():
    """A U whose ends alone are inside is two pieces, and its bounds are theirs, whatever else is cut."""
    u = np.array([[1, 9], [1, -5], [9, -5], [9, 9], [7, 9], [7, -2], [3, -2], [3, 9]], float)
    pieces = clipped(u, (20, 20))
    assert sorted([*piece.min(0), *piece.max(0)] for piece in pieces) == [[1, 0, 3, 9], [7, 0, 9, 9]]
    [piece] = clipped(u, (20, 5))
    assert [*piece.min(0), *piece.max(0)] == [1, 0, 3, 9]
    assert len(clipped(np.add(u, [0, 5]), (20, 20))) == 1  # it touches the border
    assert clipped(u - [0, 9], (20, 20)) == []
    crossing = np.array([[-4, 2], [6, 8], [6, 2], [-4, 8]], float)  # two triangles
    area = sum(mask_of([part.ravel().tolist()], 10, 10).sum() for part in clipped(crossing, (10, 10)))
    assert area == mask_of([crossing.ravel().tolist()], 10, 10).sum()


def test_masks_are_resized_by_centres():
    """As `nearest-exact`; of a crop the same pixels."""
    for old, new in ((9, 20), (20, 9), (37, 14), (8, 8)):
        expected = functional.interpolate(torch.arange(old)[None, None].double(), new, mode='nearest-exact')[0, 0]
        assert nearest(old, new, 0, new).tolist() == expected.tolist()
        assert nearest(old, new, 3, 4).tolist() == expected[3:7].tolist()


# --------------------------------------------------------------------------
# data set

SQUARE = [[10, 10, 30, 10, 30, 26, 10, 26]]


def annotation(image: int, category: int, segmentation, bbox: list | None = None, **more) -> dict:
    if bbox is None:
        points = np.reshape(segmentation[0], (-1, 2))
        bbox = [*points.min(0).tolist(), *np.ptp(points, 0).tolist()]
    return {'image_id': image, 'category_id': category, 'segmentation': segmentation, 'bbox': bbox, **more}


def make_coco(folder: Path, change=lambda content: None) -> Path:
    """`change` may spoil the training JSON.

    Image 7 is wide, 300 high; 12 has a crowd and a mask of runs; 31 a crowd alone, and a box outside; 44 nothing.
    """
    runs = np.zeros((64, 48), np.uint8)
    runs[5:20, 30:40] = 1
    rows = [
        annotation(7, 3, SQUARE),
        annotation(7, 90, [[40, 5, 60, 5, 60, 15, 40, 15], [45, 20, 60, 20, 60, 30, 45, 30]], [40, 5, 20, 25]),
        annotation(12, 90, packed(runs[None])[0], [30, 5, 10, 15]),
        annotation(12, 3, {'size': [64, 48], 'counts': [0, 640, 2432]}, [0, 0, 10, 64], iscrowd=1),
        annotation(300, 3, SQUARE),
        annotation(31, 3, {'size': [48, 64], 'counts': [0, 480, 2592]}, [0, 0, 10, 48], iscrowd=1),
        annotation(31, 3, [[70, 1, 80, 1, 80, 9]], [70, 1, 10, 8]),
    ]
    sizes = {7: (48, 64), 12: (64, 48), 300: (64, 48), 31: (48, 64), 44: (48, 64)}
    categories = [{'id': 90, 'name': 'ninety'}, {'id': 3, 'name': 'three'}]
    (folder / 'annotations').mkdir(parents=True)
    for name in ('train', 'val'):
        (folder / f'{name}2017').mkdir()
        images = []
        for number, (height, width) in sizes.items():
            things = [row for row in rows if row['image_id'] == number and not row.get('iscrowd')]
            red = sum(mask_of(row['segmentation'], height, width) for row in things) + np.zeros((height, width))
            pixels = np.stack([255 * red, np.full_like(red, number % 256), 0 * red], -1).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f'{name}2017' / f'{number}.png')
            images.append({'id': number, 'file_name': f'{number}.png', 'height': height, 'width': width})
        annotations = [row | {'id': 10 * k} for k, row in enumerate(rows)]
        content = copy.deepcopy({'images': images, 'annotations': annotations, 'categories': categories})
        if name == 'train':
            change(content)
        (folder / 'annotations' / f'instances_{name}2017.json').write_text(json.dumps(content))
    return folder


def given(folder: Path, **values) -> Namespace:
    paths = {f'{name}_{what}': None for name in ('train', 'val') for what in ('json', 'images')}
    defaults = dict(box_only=False, keep_empty=False, max_pixels=1e9, data_retries=0, bad_images='stop')
    more = dict(max_bad_images=None, output_dir=folder / 'out', test_size=32, max_size=64)
    return Namespace(**{'data_path': folder} | paths | defaults | more | values)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Tests that change files make their own."""
    return make_coco(tmp_path_factory.mktemp('coco'))


def test_what_is_read(folder):
    train, val = coco.splits(given(folder))
    assert (train.classes, train.categories, train.ids.tolist()) == (['three', 'ninety'], [3, 90], [7, 12, 300])
    assert train.notes == [
        'train: 3 images, 7 annotations, 2 classes; left out: 2 images without objects, 2 crowd regions, '
        '1 object without area in its image'
    ]
    assert val.notes == ['val: 5 images, 7 annotations, 2 classes']
    [kept] = coco.splits(given(folder, keep_empty=True), ['train'])
    assert kept.ids.tolist() == val.ids.tolist() == [7, 12, 300, 31, 44]
    truth = json.loads((folder / 'annotations/instances_val2017.json').read_text())
    assert sorted(row['bbox'] for row in val.truth()['annotations']) == sorted(
        row['bbox'] for row in truth['annotations']
    )
    left = val.truth({f'{folder}/val2017/7.png'})
    assert [image['id'] for image in left['images']] == [12, 300, 31, 44]
    assert len(left['annotations']) == 5


@pytest.mark.parametrize('kind', ['lsj', 'shortest_edge', 'crop', 'none'])
def test_an_image_and_its_objects_stay_together(folder, kind, monkeypatch):
    """Masks are where the image is red, boxes where masks are; a function of the seed and the item alone."""
    monkeypatch.setattr('util.data.jitter.CROPPED', (24, 40))
    monkeypatch.setattr('util.data.jitter.BEFORE_CROP', (50, 60))
    augment = Augment(kind, 64, (0.5, 3.0), (40, 96), 128)
    [train] = coco.splits(given(folder, keep_empty=True), ['train'])
    data = CocoFolder(train, train=True, transform=augment, seed=5)
    counts, shapes, items = set(), set(), [(epoch, index) for epoch in range(12) for index in range(5)]
    for item in items:
        image, target = data[item]
        assert (image.dtype, target['masks'].dtype, target['boxes'].dtype) == (torch.uint8, torch.uint8, torch.float32)
        assert target['masks'].shape == (len(target['boxes']), *image.shape[1:])
        counts.add(len(target['labels']))
        shapes.add((item[1], image.shape[1:]))
        red = image[0] > 127
        covered = target['masks'].any(0)
        wide, narrow = (functional.max_pool2d(sign * red[None].float(), 5, 1, 2)[0] * sign for sign in (1, -1))
        assert ((covered != red) & (wide == narrow)).sum() <= 2  # slivers at the border
        for box, mask in zip(target['boxes'], target['masks'], strict=True):
            rows, columns = (mask.any(axis).nonzero() for axis in (1, 0))
            bounds = torch.stack([columns[0, 0], rows[0, 0], columns[-1, 0] + 1, rows[-1, 0] + 1])
            assert (box - bounds).abs().max() < 1.5
    assert {0, 1, 2} <= counts
    assert len(shapes) > (20 if kind in ('lsj', 'crop') else 4)
    again = CocoFolder(train, train=True, transform=augment, seed=5)[items[-5]]
    assert torch.equal(again[0], data[items[-5]][0])
    assert all(torch.equal(again[1][name], value) for name, value in data[items[-5]][1].items())


def test_flips(folder):
    [train] = coco.splits(given(folder), ['train'])
    plain, flipped = (CocoFolder(train, train=True, transform=Augment('none', hflip=hflip)) for hflip in (0.0, 1.0))
    for index in range(3):
        (image, target), (other, mirrored) = plain[0, index], flipped[0, index]
        assert torch.equal(other, image.flip(-1))
        assert torch.equal(mirrored['masks'], target['masks'].flip(-1))
        x0, y0, x1, y1 = target['boxes'].unbind(1)
        assert torch.equal(mirrored['boxes'], torch.stack([image.shape[2] - x1, y0, image.shape[2] - x0, y1], 1))
    drawn = CocoFolder(train, train=True, transform=Augment('none'))
    assert 3 < sum(torch.equal(drawn[epoch, 0][0], plain[0, 0][0]) for epoch in range(20)) < 17


@pytest.mark.parametrize('kind', ['lsj', 'none'])
def test_less_than_a_pixel_is_no_object(tmp_path, kind):
    """Nor is what has no width in float32, in which 3900 and 3900.0001 are the same."""
    wide = 3900.0001 if kind == 'lsj' else 3910  # a box of its own, of an object that is drawn
    things = [
        [1, [5, 2, 0.1, 0.1], 1, 0, [[5.1, 2.1, 5.2, 2.1, 5.2, 2.2]]],
        [1, [3900, 1, 0.0001, 6], 1, 0, [[3900, 1, wide, 1, wide, 7, 3900, 7]]],
        [2, [10, 1, 20, 6], 120, 0, [[10, 1, 30, 1, 30, 7, 10, 7]]],
    ]
    Image.new('RGB', (4000, 8)).save(tmp_path / 'a.png')
    listing = tmp_path / 'a.json'
    rows = [annotation(1, label, polygon, box) for label, box, _, _, polygon in things]
    entry = {'id': 1, 'file_name': 'a.png', 'height': 8, 'width': 4000}
    listing.write_text(json.dumps({'images': [entry], 'annotations': rows, 'categories': [{'id': 1}, {'id': 2}]}))
    augment = Augment(kind, 4000, (1, 1), hflip=0)
    target = CocoFolder(tmp_path, listing, train=True, transform=augment)[0, 0][1]
    assert target['labels'].tolist() == [2]
    assert target['boxes'].tolist() == [[10, 1, 30, 7]]
    assert target['masks'].sum() == 120


def test_boxes_alone(folder):
    """They need no segmentation; without one they cannot be taken anew from what is left."""
    args = given(folder, box_only=True)
    data = coco.CocoFolder(*coco.splits(args, ['train']), train=True, masks=False, transform=Augment('none', hflip=0))
    assert data[0, 0][1].keys() == {'boxes', 'labels'}
    assert data[0, 0][1]['boxes'].tolist() == [[10, 10, 30, 26], [40, 5, 60, 30]]
    assert data.split.of(0)[0].segmentation is None


def test_images_to_test(folder):
    [val] = coco.splits(given(folder), ['val'])
    images = coco.test_images(val, given(folder), Reader())
    for index, (number, size, tested) in enumerate([(7, (48, 64), (32, 43)), (12, (64, 48), (43, 32))]):
        image, about = images[0, index]
        assert (image.shape[1:], about) == (tested, {'image_id': number, 'size': size})
    assert coco.test_images(val, given(folder, max_size=40), Reader())[0, 0][0].shape == (3, 30, 40)
    image, objects = images.original(0)
    unknown = val._replace(objects=Names.of([]), sizes=0 * val.sizes)  # pictures without annotations
    assert torch.equal(coco.test_images(unknown, given(folder), Reader())[0, 0][0], images[0, 0][0])
    assert unknown.truth()['annotations'] == []
    assert image.shape == (48, 64, 3)
    unflipped = coco.resizing(48, 64, (32, 43)).image(Image.fromarray(image))
    assert np.array_equal(images[0, 0][0].movedim(0, -1), unflipped)
    assert objects['masks'].sum((1, 2)).tolist() == [mask_of(row.segmentation, 48, 64).sum() for row in val.of(0)]


def test_batches_of_like_images(folder):
    """Two queues of the seeded order, whatever the ranks; a batch is lists, also from loader processes."""
    rng = np.random.default_rng(0)
    order, kinds = rng.permutation(41), rng.random(41) < 0.3
    alike = datasets.alike(order, kinds, 4)
    assert sorted(alike.tolist()) == list(range(41))
    batches = alike[:40].reshape(-1, 4)
    uniform = [len(set(kinds[batch])) == 1 for batch in batches]
    full = sum((kinds == kind).sum() // 4 for kind in (False, True))
    assert all(uniform[:full])
    place = order.argsort()
    ends = [place[batch].max() for batch in batches[:full]]
    assert ends == sorted(ends)  # each as soon as it is full
    for kind in (False, True):
        queue = [i for batch in batches[:full] for i in batch if kinds[i] == kind]
        assert queue == [i for i in order if kinds[i] == kind][: len(queue)]
    [val] = coco.splits(given(folder, keep_empty=True), ['train'])
    assert val.wide.tolist() == [True, False, False, True, True]
    args = Namespace(batch_size=2, seed=0, accum_iter=1, effective_batch_size=None)
    sampler = build.epoch_batches(args, 5, val.wide)
    data = CocoFolder(val, train=True, transform=Augment('none'))
    for imgs, targets in datasets.loader(data, sampler, 1, False):
        assert [type(part) for part in (imgs, targets)] == [list, list]
        assert imgs[0].shape == imgs[1].shape
        assert [target['masks'].shape[1:] for target in targets] == [image.shape[1:] for image in imgs]


def test_a_bad_image(tmp_path):
    make_coco(tmp_path)
    apart = {f'{name}_json': tmp_path / f'annotations/instances_{name}2017.json' for name in ('train', 'val')}
    apart |= {f'{name}_images': tmp_path / f'{name}2017' for name in ('train', 'val')}
    nowhere = dict(data_path=tmp_path / 'data', data_retries=1)  # the images are there all the same
    args = given(tmp_path, bad_images='skip', max_bad_images=1.0, **apart, **nowhere)
    train, val = coco.splits(args)
    Path(train.images.name(1)).write_bytes(b'')
    Path(val.images.name(1)).unlink()
    with pytest.raises(UserError, match=r'cannot read the image .*/12.png: the file is empty'):
        CocoFolder(train, train=True)[0, 1]
    data = CocoFolder(train, train=True, transform=Augment('none'), reader=Reader.of(args))
    assert len(data[0, 1][1]['boxes']) > 0  # another one
    tests = coco.test_images(val, args, Reader.of(args))
    assert tests[0, 1][1]['image_id'] == datasets.SKIPPED
    assert val.truth(tests.reader.skipped())['images'] == [row for row in val.truth()['images'] if row['id'] != 12]


# --------------------------------------------------------------------------
# mistakes


def spoil(place: int, **values):
    """Of an annotation."""
    return lambda content: content['annotations'][place].update(values)


FAULTS = {  # what is done to the training JSON, and the line
    'unknown image': (spoil(1, image_id=8), r'the annotation 10 is of the image 8, which is not among its images'),
    'unknown category': (
        spoil(1, category_id=4),
        r'the annotation 10 is of the category 4, which is not among its categories',
    ),
    'no box': (
        lambda c: c['annotations'][1].pop('bbox'),
        r'the annotation 10 needs an image_id, a category_id and a bbox of .*: is it of another task\?',
    ),
    'box of words': (spoil(1, bbox=['a', 1, 2, 3]), r'the annotation 10 has a bbox or an area that is not of numbers'),
    'huge box': (spoil(1, bbox=[10**400, 1, 2, 3]), r'the annotation 10 has a bbox or an area that is not of numbers'),
    'crowd of words': (spoil(1, iscrowd='0'), r"the annotation 10 has an iscrowd of '0': it is 0 or 1"),
    'nan': (spoil(1, bbox=[float('nan'), 1, 2, 3]), r'instances_train2017.json is not JSON, or damaged: it holds NaN'),
    'two points': (
        spoil(1, segmentation=[[1, 1, 5, 5]]),
        r'the annotation 10 has a polygon of 2 points: it takes three; --box_only needs none',
    ),
    'no segmentation': (
        lambda c: c['annotations'][1].pop('segmentation'),
        r'the annotation 10 has no segmentation; --box_only needs none',
    ),
    'mask of another size': (
        spoil(2, segmentation={'size': [48, 64], 'counts': [3072]}),
        r'the annotation 20 has a mask of 64 x 48 pixels, its image 48 x 64',
    ),
    'id twice': (lambda c: c['images'][1].update(id=7), r'the id 7 of its images occurs twice'),
    'id of letters': (lambda c: c['images'][1].update(id='b'), r'the id b of its images is not a whole number'),
    'no size': (lambda c: c['images'][1].pop('width'), r'the image 12 needs a file_name, and a height and width in'),
    'name that leads out': (
        lambda c: c['images'][1].update(file_name='../x.png'),
        r"is damaged: '../x.png' is no name of a file below .*/train2017",
    ),
    'no such image': (
        lambda c: c['images'][0].update(file_name='8.png'),
        r'no such file: .*/train2017/8.png, listed in .*/instances_train2017.json',
    ),
    'no annotations': (
        lambda c: c.pop('annotations'),
        r'instances_train2017.json has no list of annotations: it should hold images, annotations, categories, not '
        r'images, categories',
    ),
    'nothing to learn': (
        lambda c: c.update(annotations=c['annotations'][5:]),
        r'has no image with an object to learn, crowd regions apart',
    ),
    'other categories': (
        lambda c: c['categories'][0].update(name='dog'),
        r'instances_train2017.json and .*val2017.json do not list the same categories: 90 is dog and ninety',
    ),
    'other size': (
        lambda c: c['images'][4].update(height=64, width=48) or c['annotations'].append(annotation(44, 3, SQUARE)),
        r"/train2017/44.png is 64 x 48 pixels, in the JSON 48 x 64 \(turned\? EXIF's rotation is ignored\)",
    ),
}


@pytest.mark.parametrize('fault', FAULTS)
def test_mistakes_in_the_json(tmp_path, fault):
    change, line = FAULTS[fault]
    with pytest.raises(UserError, match=line):
        coco.splits(given(make_coco(tmp_path, change)))
    if '--box_only' in line:
        coco.splits(given(tmp_path, box_only=True))


def test_mistakes_in_folders(tmp_path, monkeypatch):
    folder = make_coco(tmp_path / 'coco')
    listing = folder / 'annotations/instances_train2017.json'
    for values, line in (
        ({'data_path': tmp_path}, f'no such file: .*; did you mean --data_path {re.escape(str(folder))}\\?'),
        ({'data_path': folder / 'annotations'}, f'did you mean --data_path {re.escape(str(folder))}\\?'),
        ({'train_json': Path('annotations/instances_val2017.json')}, f'did you mean --train_json {folder}/annot'),
        ({'train_images': tmp_path / 'none'}, 'no such folder: .*/none$'),
        ({'train_json': folder / 'annotations'}, 'no such file: .*/annotations$'),
    ):
        with pytest.raises(UserError, match=line):
            coco.splits(given(folder, **values))
    text = listing.read_text()
    for content, line in (
        (text[:-9], 'instances_train2017.json is not JSON, or damaged: '),
        ('[1]', 'has no list of images: it should hold images, annotations, categories, not a list'),
        ('[' * 100_000, 'is not JSON, or damaged'),
    ):
        listing.write_text(content)
        with pytest.raises(UserError, match=line):
            coco.splits(given(folder))
    listing.write_text(text)
    empty = tmp_path / 'empty.json'
    empty.write_text(json.dumps(json.loads(text) | {'annotations': []}))
    for values, word in ((dict(train_json=empty, keep_empty=True), 'learn'), (dict(val_json=empty), 'find')):
        values |= dict(val_images=folder / 'train2017')
        with pytest.raises(UserError, match=f'empty.json has no image with an object to {word}, crowd regions apart'):
            coco.splits(given(folder, **values))
    listing.unlink()
    with pytest.raises(UserError, match=r'no such file: .*; .*/annotations holds instances_val2017.json'):
        coco.splits(given(folder))
    monkeypatch.setitem(sys.modules, 'pycocotools', None)
    with pytest.raises(UserError, match=r'detection needs pycocotools, .*: pip install pycocotools$'):
        coco.splits(given(folder))


# --------------------------------------------------------------------------
# AP


@pytest.mark.parametrize('name', ['coco_small', 'coco_ties'])
def test_ap(name, capfd):
    case = golden(f'detection/{name}.json')
    before = copy.deepcopy(case)
    found = evaluate(case['truth'], case['predictions'])
    assert found.keys() == case['expected'].keys()
    for kind, numbers in case['expected'].items():
        each = numbers.pop('per_category_AP')
        assert found[kind].pop('per_category_AP') == pytest.approx(each, abs=1e-9)
        assert found[kind] == pytest.approx(numbers, abs=1e-9)
    assert case['truth'] == before['truth']  # it may be evaluated again
    assert case['predictions'] == before['predictions']
    assert capfd.readouterr() == ('', '')


def test_ap_of_little(folder):
    """No prediction, none but of one image; an object whose id is 0 counts; boxes without masks."""
    [val] = coco.splits(given(folder), ['val'])
    truth = val.truth()
    nothing = evaluate(truth, [])
    assert [(numbers['AP'], numbers['AR_100'], numbers['AP_large']) for numbers in nothing.values()] == [(0, 0, -1)] * 2
    perfect = []
    for index, image_id in enumerate(val.ids.tolist()):
        things = [thing for thing in val.of(index) if not thing.crowd]
        boxes = torch.tensor([thing.bbox for thing in things]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        labels = torch.tensor([thing.label for thing in things])
        perfect += coco.results(image_id, val.categories, boxes, labels, torch.full((len(things),), 0.9))
    [(kind, numbers)] = evaluate(truth, perfect, ['bbox']).items()
    assert kind == 'bbox'
    assert numbers['AP'] == pytest.approx(1)
    assert numbers['per_category_AP'] == {'3': pytest.approx(1), '90': pytest.approx(1)}
    assert 0 < evaluate(truth, perfect[:1], ['bbox'])['bbox']['AP'] < 1


# --------------------------------------------------------------------------
# pictures


def test_detections_are_drawn(folder):
    """Boxes in the colour of the class, masks below them, names and scores; truth beside it."""
    [val] = coco.splits(given(folder), ['val'])
    images = coco.test_images(val, given(folder), Reader())
    image, truth = images.original(0)
    plain = pictures.detected(image, {name: values[:0] for name, values in truth.items()}, val.classes)
    assert plain.shape == (48 * 6, 64 * 6, 3)
    drawn = pictures.detected(image, truth | {'scores': torch.tensor([0.9, 0.4])}, val.classes)
    colours = pictures.palette(2)
    for label, (x0, y0, x1, y1) in zip([1, 2], (6 * truth['boxes']).int().tolist(), strict=True):
        assert (drawn[y1, x0:x1] == colours[label - 1]).all()
        assert (drawn[(y0 + y1) // 2, x0] == colours[label - 1]).all()
    inside = drawn[6 * 18, 6 * 20].astype(int)
    assert np.abs(inside - (plain[6 * 18, 6 * 20].astype(int) + colours[0]) // 2).max() <= 1
    assert (drawn[6 * 40 :, : 6 * 30] == plain[6 * 40 :, : 6 * 30]).all()
    seen = []
    both = pictures.some_detected(lambda tested, about: seen.append((tested.shape, about)) or truth, images, 2)
    first, third = {'image_id': 7, 'size': (48, 64)}, {'image_id': 300, 'size': (64, 48)}
    assert seen == [((3, 32, 43), first), ((3, 43, 32), third)]
    assert both.shape[1] >= 2 * 320
    tall, nothing = np.zeros((3000, 20, 3), np.uint8), {name: values[:0] for name, values in truth.items()}
    assert pictures.detected(tall, nothing, val.classes).shape == (3000, 20, 3)
    assert pictures.detected(tall, nothing, val.classes, 320).shape == (4 * 320, 9, 3)


def test_results_are_drawn(folder, tmp_path, capsys):
    """scripts/visualize.py: those of a JSON beside the truth; what cannot be drawn is one line."""
    [val] = coco.splits(given(folder), ['val'])
    truth = [row for row in val.truth()['annotations'] if row['image_id'] in (7, 12) and not row['iscrowd']]
    keys = ('image_id', 'category_id', 'bbox', 'segmentation')
    results = [{key: row[key] for key in keys} | {'score': 0.8} for row in truth]

    def draw(content: Any) -> np.ndarray:
        (tmp_path / 'found.json').write_text(json.dumps(content))
        flags = ['--annotations', folder / 'annotations/instances_val2017.json', '--output', tmp_path / 'a.png']
        flags += ['--detections', tmp_path / 'found.json', folder / 'val2017']
        visualize.main(visualize.get_args_parser().parse(list(map(str, flags))))
        return np.asarray(Image.open(tmp_path / 'a.png')).astype(int)

    whole, nothing = draw(results), draw([])
    boxes = draw([{key: row[key] for key in row.keys() - {'segmentation'}} for row in results])
    assert '5 of 5 images drawn' in capsys.readouterr().out
    truth = whole[24:, 6:326]
    alike = [(picture[24:, 332:652] == truth).mean() for picture in (whole, boxes, nothing)]
    assert alike[0] > 0.95 > alike[1] > alike[2]
    for content, words in (
        ({}, 'is no list of results'),
        ([results[0] | {'score': None}], 'is no list of results'),
        ([results[0] | {'image_id': 8}], 'has no image 8'),
        ([results[0] | {'category_id': 4}], 'has no category 4'),
        ([results[0] | {'segmentation': {'size': [3, 3], 'counts': [9]}}], 'image 7 has a mask of 3 x 3 pixels'),
    ):
        with pytest.raises(UserError, match=words):
            draw(content)
