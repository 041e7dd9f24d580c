"""The shapes that the examples of segmentation and detection train on."""

import json

import numpy as np
import pytest
from PIL import Image

from scripts import make_shapes


def test_shapes(tmp_path):
    """The same bytes from the same seed; four classes, in masks that fit what is drawn; most crops have two of them."""
    folders = [tmp_path / name for name in ('a', 'b', 'c')]
    for folder, seed in zip(folders, (0, 0, 1), strict=True):
        make_shapes.main(folder, 64, 12, 4, seed)
    a, b, c = ({path.relative_to(f): path.read_bytes() for path in f.rglob('*.*')} for f in folders)
    assert a == b
    assert len(a) == 2 * (12 + 4) + 1
    assert not {path for path in a if path.suffix == '.png' and a[path] == c[path]}
    assert (folders[0] / 'classes.txt').read_text().split() == ['background', 'disk', 'square', 'triangle']
    labels = np.stack([np.asarray(Image.open(path)) for path in sorted((folders[0] / 'annotations').rglob('*.png'))])
    assert labels.shape == (16, 64, 64)
    assert set(np.unique(labels)) == {0, 1, 2, 3}
    assert np.mean((labels == 0).mean(axis=(1, 2)) < 0.75) > 0.5


def test_sizes_do_not_tell_classes():
    """A disk, a square and a triangle of the same draws have the same area, but for what the border cuts."""
    areas = [make_shapes.shape(np.random.default_rng(0), 400, label).sum() for label in (1, 2, 3)]
    assert max(areas) < 1.02 * min(areas)


def test_shapes_for_detection(tmp_path):
    """What COCO's folders have: gaps in ids, polygons, runs, an image without objects, a crowd; masks that fit."""
    from pycocotools import mask as mask_of

    folders = [tmp_path / name for name in ('a', 'b')]
    for folder in folders:
        make_shapes.coco(folder, 96, 12, 4, 0)
    a, b = ({path.relative_to(f): path.read_bytes() for path in f.rglob('*.*')} for f in folders)
    assert a == b
    assert len(a) == 12 + 4 + 2
    truth = json.loads((tmp_path / 'a/annotations/instances_train2017.json').read_text())
    names = {category['id']: category['name'] for category in truth['categories']}
    assert names == {2: 'disk', 5: 'square', 9: 'triangle'}
    ids = [image['id'] for image in truth['images']]
    assert np.diff(ids).min() > 1
    found = truth['annotations']
    assert len({each['id'] for each in found}) == len(found)
    of_image = {id: [each for each in found if each['image_id'] == id] for id in ids}
    assert [len(of_image[id]) for id in ids[:2]] == [0, 1]
    assert [each['iscrowd'] for each in found] == [1] + [0] * (len(found) - 1)
    assert {names[each['category_id']] for each in found[1:]} == set(names.values())
    for each in found:
        shapes = each['segmentation']
        if isinstance(shapes, list):
            runs = mask_of.frPyObjects(shapes, 96, 96)[0]
        else:
            runs = mask_of.frPyObjects(shapes, *shapes['size'])
            assert each['iscrowd'] or names[each['category_id']] == 'disk'
        assert int(mask_of.area(runs)) == pytest.approx(each['area'], rel=0.05)
        assert np.allclose(mask_of.toBbox(runs), each['bbox'], atol=2)
        assert min(each['bbox']) >= 0
    for objects in of_image.values():
        masks = [mask_of.decode(mask_of.frPyObjects(o['segmentation'], 96, 96)).reshape(96, 96) for o in objects]
        assert not masks or np.max(sum(masks)) == 1
