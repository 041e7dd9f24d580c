"""The shapes that the example of segmentation trains on."""

import numpy as np
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
