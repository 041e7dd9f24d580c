"""Figures show all that they are given, and nothing is cut off."""

import math

import pytest
from matplotlib.figure import Figure

from util.analysis import figures

NAMES = ['first', 'runs/with-a-long-name/checkpoint-last']


def wave(count: int, phase: float = 0) -> list[float]:
    return [1 + math.sin(phase + number) for number in range(count)]


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """The figure that a function wrote. Titles, labels and legend are inside it."""
    kept, save = [], Figure.savefig
    monkeypatch.setattr(Figure, 'savefig', lambda fig, *args, **more: (save(fig, *args, **more), kept.append(fig)))

    def draw(function, *args) -> Figure:
        path = tmp_path / 'figure.png'
        function(path, 'what is seen, of which images of which data set, and how many there are of them', *args)
        assert path.read_bytes()[:4] == b'\x89PNG'
        [fig] = kept
        box, (width, height) = fig.get_tightbbox(), fig.get_size_inches()
        assert min(box.x0, box.y0, width - box.x1, height - box.y1) > -0.02
        return fig

    return draw


def labels(fig: Figure) -> list[str]:
    return [text.get_text().replace('\n', '') for legend in fig.legends for text in legend.get_texts()]


def test_depth_and_its_bands(drawn):
    """Behind what leads to a point; whose they are is told where the networks differ."""
    kinds = {NAMES[0]: ['embed', 'attn', 'mlp', 'down', 'attn', 'mlp'], NAMES[1]: ['stem', 'block']}
    lines = {name: ([i / (len(of) - 1) for i in range(len(of))], wave(len(of))) for name, of in kinds.items()}
    fig = drawn(figures.over_depth, {'amplitude at the highest frequency': lines, 'variance': lines}, kinds)
    assert [len(ax.lines) for ax in fig.axes] == [2, 2]
    bands = [(round(patch.get_x(), 3), round(patch.get_width(), 3)) for patch in fig.axes[0].patches]
    assert bands == [(0, 0.2), (0.4, 0.2), (0.6, 0.2)]
    assert labels(fig) == [*NAMES, 'attention (first)', 'down-sampling (first)']


def test_bands_of_all(drawn):
    lines = {name: ([0, 1], wave(2)) for name in NAMES}
    fig = drawn(figures.over_depth, {'variance': lines}, {name: ['embed', 'attn'] for name in NAMES})
    assert labels(fig) == [*NAMES, 'attention']


def test_eight_long_names(drawn):
    """The legend takes as much height as it needs, and leaves the curves theirs."""
    names = [f'{number}_of_a_network_with_a_name_that_does_not_end_before_the_figure_does' for number in range(8)]
    fig = drawn(figures.curves, 'order', 'strength', {name: ([1, 0], [2, 3], [1, 0]) for name in names})
    assert labels(fig) == names
    [ax] = fig.axes
    assert ax.get_position().height * fig.get_figheight() > 2
    assert [list(line.get_ydata()) for line in ax.lines] == 8 * [[3, 2]]


def test_curves(drawn):
    lines = {NAMES[0]: ([0, 0.5, 1], wave(3), [0.1, 0.2, 0.3]), NAMES[1]: ([0, 1], wave(2), None)}
    [ax] = drawn(figures.curves, 'order', 'strength', lines, {0: '0n', 1: '1n'}).axes
    assert [list(line.get_ydata()) for line in ax.lines] == [wave(3), wave(2)]
    [band] = ax.collections
    highest = max(y + error for y, error in zip(wave(3), (0.1, 0.2, 0.3), strict=True))
    assert band.get_paths()[0].vertices[:, 1].max() == pytest.approx(highest)
    assert [text.get_text() for text in ax.get_xticklabels()] == ['0n', '1n']
    assert ax.get_ylim()[0] == 0


def test_spectra(drawn):
    """A panel for each network, of one range."""
    networks = {name: {f'p{i}': ([0, 0.5], wave(2, i + 3 * n)) for i in range(3)} for n, name in enumerate(NAMES)}
    fig = drawn(figures.spectra, networks)
    *panels, bar = fig.axes
    assert [len(ax.lines) for ax in panels] == [3, 3]
    assert panels[0].get_ylim() == panels[1].get_ylim()
    assert len({line.get_color() for line in panels[0].lines}) == 3
    assert bar.get_ylabel() == 'normalised depth'


def test_heat_maps(drawn):
    """In the row and the column of their names."""
    a, b = ['x', 'y'], ['x', 'y', 'z']
    cells = {(0, 0): [[1, 0.5]] * 2, (1, 0): [[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]], (1, 1): [[1, 0, 0]] * 3}
    panels = [(NAMES[i], (a, b)[i], NAMES[j], (a, b)[j], values) for (i, j), values in cells.items()]
    *maps, _ = drawn(figures.heat_maps, panels).axes
    for ax, (place, values) in zip(maps, cells.items(), strict=True):
        [image] = ax.images
        assert image.get_array().tolist() == values
        assert (image.get_clim(), image.origin) == ((0, 1), 'lower')
        spec = ax.get_subplotspec()
        assert (spec.rowspan.start, spec.colspan.start) == place


def test_heads(drawn):
    """For each quantity a row, in it a panel for each network: its heads, their mean, and what uniform ones give."""
    values = [wave(4, 0.5), wave(4, 1)]
    both = {name: (values, [2, 2] if name == NAMES[1] else None) for name in NAMES}
    fig = drawn(figures.heads, {'attention distance (px)': both, 'normalised mutual information': both})
    assert [len(ax.lines) for ax in fig.axes] == [1, 2, 1, 2]
    assert [ax.get_subplotspec().rowspan.start for ax in fig.axes] == [0, 0, 1, 1]
    for ax in fig.axes:
        dots = [tuple(dot) for layer in ax.collections for dot in layer.get_offsets()]
        assert dots == [(layer, value) for layer, heads in enumerate(values, 1) for value in heads]
        assert ax.lines[0].get_ydata() == pytest.approx([sum(heads) / 4 for heads in values])
    assert labels(fig) == ['mean of the heads', 'uniform attention']


def test_small_multiples(drawn):
    """A network without points keeps its colour; bars and bands; thin lines below; powers of x."""
    line = ([0, 1, 2], wave(3), [0.1] * 3)
    lines = {NAMES[0]: ([], [], []), NAMES[1]: line}
    bars = figures.Panel('minutes', 'top-1', lines)
    powers = figures.Panel('share', 'top-1', lines, bars=False, base={NAMES[1]: line}, ticks={1: '1 %', 10: '10 %'})
    fig = drawn(figures.small_multiples, [[bars, powers], [bars]])
    assert len(fig.axes) == 3
    of_bars, of_powers, _ = fig.axes
    assert of_bars.containers[1].lines[0] is None  # bars alone
    assert [len(ax.collections) for ax in (of_bars, of_powers)] == [2, 1]
    assert [drawn_line.get_color() for drawn_line in of_powers.lines if len(drawn_line.get_xdata())] == [
        *2 * [figures.COLOURS[1]]
    ]
    assert (of_powers.get_xscale(), [text.get_text() for text in of_powers.get_xticklabels()]) == (
        'log',
        ['1 %', '10 %'],
    )
    assert labels(fig) == NAMES


def test_gains(drawn):
    """Strokes of the seeds, a mark of their mean, and exactly the range of the random weights."""
    rows = {NAMES[0]: ([], [1.0]), NAMES[1]: ([2.0, 5.0], [-1.0, 0.5, 0.25])}
    [ax] = drawn(figures.gains, {'gain': rows}).axes
    _, strokes, mean = ax.lines
    assert (list(strokes.get_xdata()), list(mean.get_xdata())) == ([2, 5], [3.5])
    assert {*strokes.get_ydata(), *mean.get_ydata()} == {-1}
    [bar] = ax.patches
    assert (bar.get_x(), bar.get_width()) == (-1, 1.5)
    assert [text.get_text().replace('\n', '') for text in ax.get_yticklabels()] == NAMES


def test_svg_is_the_same_again(tmp_path):
    """Its texts are texts, and nothing in it depends on the time."""
    panel = figures.Panel('epochs', 'top-1', {'<b>': ([1], [2], [0])})
    for folder in (tmp_path / 'a', tmp_path / 'b'):
        folder.mkdir()
        figures.small_multiples(folder / 'x.svg', '', [[panel]])
    svg = (tmp_path / 'a/x.svg').read_text()
    assert svg == (tmp_path / 'b/x.svg').read_text()
    assert '>&lt;b&gt;<' in svg
