"""The labelled grid: a title above each column that keeps to it, and what the words mean below."""

import numpy as np
import pytest
import torch

from util.pictures import NOTES, grid, wrapped

NAMES = [
    'composite',
    'masked',
    'original',
    'composite (oracle)',
    'composite (oracle) of partner',
    'WWWWWWWWWWWWWWWWWWWW',
]
NAMES += [f'prediction {i} (oracle)' for i in range(4)] + ['spectrum (composite)', 'spectrum (original)']


def draw(names, side, rows):
    """Red pictures, and where in the result they are, and where text is."""
    panels = {name: torch.tensor([1.0, -1, -1]).view(1, 3, 1, 1).expand(rows, 3, side, side) for name in names}
    picture = grid(panels, [0.5] * 3, [0.5] * 3)
    assert picture.dtype == np.uint8
    tiles = (picture == [255, 0, 0]).all(axis=2)
    return tiles, (picture < 250).any(axis=2) & ~tiles


@pytest.mark.parametrize(('side', 'rows'), [(32, 1), (224, 1), (100, 2), (32, 20)])
@pytest.mark.parametrize('columns', [1, 3, 12])
def test_titles_keep_to_their_columns(side, rows, columns):
    tiles, text = draw(NAMES[:columns], side, rows)
    width = side * -(-112 // side)
    assert tiles.sum() == columns * rows * width**2
    top = tiles.any(axis=1).argmax()
    assert not text[: top - 1, ~tiles[top]].any()  # no letter between two columns
    assert not text[top - 1 :][: np.flatnonzero(tiles.any(axis=1))[-1] - top + 1].any()
    lefts = np.flatnonzero(np.diff(tiles[top].astype(int)) == 1) + 1
    assert len(lefts) == columns
    assert all(text[:top, left : left + width].any() for left in lefts)


def test_text_is_wrapped_whole():
    for name in (*NAMES, *NOTES.values()):
        assert ''.join(wrapped(name, 112)).replace(' ', '') == name.replace(' ', '')


def test_words_are_explained():
    """Those that occur."""
    for names, explained in ((['original'], False), (['original', 'composite'], True)):
        tiles, text = draw(names, 32, 1)
        assert text[np.flatnonzero(tiles.any(axis=1))[-1] :].any() == explained
