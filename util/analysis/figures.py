"""Figures as PNG or SVG files. The one importer of matplotlib: import it late, and do without where it lacks."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

WIDTH, HEIGHT, DPI = 4.6, 3.6, 130  # inches of a panel, pixels of an inch
SMALL = 2.7  # inches of a panel where there is one for each network
COLOURS = ('#0072B2', '#D55E00', '#009E73', '#000000', '#CC79A7', '#56B4E9', '#E69F00', '#7F7F7F')  # for all eyes
MARKERS, DASHES = 'os^Dv<>P', ('-', '--', '-.', ':')  # of networks: without colour they still differ
DEPTHS = ListedColormap(colormaps['plasma'](range(0, 230)))  # without its last, which is too light for a line
BANDS = {'attn': ('attention', '0.88'), 'down': ('down-sampling', '#c9dff2')}  # kinds of points: label, colour

Lines = Mapping[str, tuple[Sequence[float], Sequence[float]]]  # {network: (depths from 0 to 1, values)}
Curves = Mapping[str, tuple[Sequence[float], Sequence[float], Sequence[float] | None]]  # {network: (x, y, error)}
Spectra = Mapping[str, tuple[Sequence[float], Sequence[float]]]  # {point: (frequencies in units of pi, values)}
Heads = tuple[Sequence[Sequence[float]], Sequence[float] | None]  # values [layers][heads], and of a uniform head
Gains = Mapping[str, tuple[Sequence[float], Sequence[float]]]  # {network: (of each seed, of each of random weights)}
HeatMap = tuple[str, Sequence[str], str, Sequence[str], Sequence[Sequence[float]]]  # (name, layers) twice, cells

# --------------------------------------------------------------------------
# a line for each network


def over_depth(
    path: Path,
    title: str,
    panels: Mapping[str, Lines],
    bands: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """A panel for each quantity, in it a line for each network over its depth; for single points a chart of dots.

    `bands`: {network: the kind of each of its points}, such as 'attn', 'mlp', 'down', 'block'. A band lies behind the
    piece of the line that leads to a point of attention (grey) or of down-sampling (blue): of all networks if they
    agree, else of the first.
    """
    fig = Figure(figsize=(WIDTH * len(panels), HEIGHT), layout='constrained')
    axes = fig.subplots(1, len(panels), squeeze=False)[0]
    single = all(len(values) == 1 for lines in panels.values() for _, values in lines.values())
    for ax, (quantity, lines) in zip(axes, panels.items(), strict=True):
        (draw_dots if single else draw_lines)(ax, lines)
        (ax.set_xlabel if single else ax.set_ylabel)(wrapped(quantity, 34))
        ax.grid(alpha=0.3)
    if single:
        for ax in axes[1:]:
            ax.tick_params(labelleft=False)
    else:
        for ax, lines in zip(axes, panels.values(), strict=True):
            ax.set_xlabel('normalised depth' if bands else 'depth: 0 the first block, 1 what the head is given')
            draw_bands(ax, lines, bands or {})
        legend(fig, 2 * len(panels))
    finish(fig, path, title)


def curves(
    path: Path, title: str, xlabel: str, ylabel: str, lines: Curves, ticks: Mapping[float, str] | None = None
) -> None:
    """A line for each network, with a band of its error (of y, to both sides) where it is given; y from 0.

    `ticks`: {x: its label}.
    """
    fig = Figure(figsize=(1.3 * WIDTH, 1.2 * HEIGHT), layout='constrained')
    ax = fig.subplots()
    lines = {name: ordered(*line) for name, line in lines.items()}
    draw_lines(ax, {name: line[:2] for name, line in lines.items()})
    for number, (x, y, error) in enumerate(lines.values()):
        draw_band(ax, x, y, error, COLOURS[number % 8])
    if ticks:
        ax.set_xticks(list(ticks), list(ticks.values()))
    ax.set(xlabel=xlabel, ylabel=ylabel, ylim=(0, None))
    ax.grid(alpha=0.3)
    legend(fig, 3)
    finish(fig, path, title)


def ordered(x: Sequence[float], *columns: Sequence[float] | None) -> list[Sequence[float] | None]:
    """The points of a line from the smallest x to the largest."""
    places = sorted(range(len(x)), key=x.__getitem__)
    return [column and [column[place] for place in places] for column in (x, *columns)]


def draw_lines(ax: Axes, lines: Lines) -> None:
    """Of many points 25 at most have a marker, other ones for each network."""
    for number, (name, (depths, values)) in enumerate(lines.items()):
        every = math.ceil(len(values) / 25) or 1
        style = marker(number) | dict(color=COLOURS[number % 8], linestyle=DASHES[number % 4])
        ax.plot(depths, values, markersize=4, linewidth=1.3, markevery=(number % every, every), label=name, **style)


def marker(number: int) -> dict[str, str]:
    """From the ninth network on other ones, hollow, as colours come again."""
    turns, place = divmod(number, 8)
    return dict(marker=MARKERS[(place + turns) % 8], markerfacecolor='white' if turns else COLOURS[place])


def draw_band(ax: Axes, x: Sequence[float], y: Sequence[float], error: Sequence[float] | None, colour: str) -> None:
    if error:
        low, high = ([value + sign * e for value, e in zip(y, error, strict=True)] for sign in (-1, 1))
        ax.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)


def draw_dots(ax: Axes, lines: Lines) -> None:
    """A row for each network, the first on top, its value beside the dot."""
    for number, (_, values) in enumerate(lines.values()):
        ax.plot(values, [-number], 'o', color=COLOURS[number % 8])
        ax.annotate(f'{values[0]:.4g}', (values[0], -number), (0, 7), textcoords='offset points', ha='center')
    ax.set_yticks([-number for number in range(len(lines))], list(lines))
    ax.set_ylim(0.6 - len(lines), 0.8)
    ax.margins(x=0.2)
    ax.xaxis.set_major_locator(MaxNLocator(5))


def draw_bands(ax: Axes, lines: Lines, bands: Mapping[str, Sequence[str]]) -> None:
    named = [(name, list(bands[name])) for name in lines if name in bands]
    if not named:
        return
    first, kinds = named[0]
    whose = '' if all(others == kinds for _, others in named) else f' ({first})'
    depths, told = lines[first][0], set()
    for start, end, kind in zip(depths, depths[1:], kinds[1:], strict=False):
        if kind in BANDS:
            label, colour = BANDS[kind]
            ax.axvspan(start, end, color=colour, linewidth=0, zorder=0, label=None if kind in told else label + whose)
            told.add(kind)


# --------------------------------------------------------------------------
# a panel for each network, or for two


def spectra(path: Path, title: str, networks: Mapping[str, Spectra]) -> None:
    """A panel for each network, in it a curve for each point, coloured by its depth."""
    fig, [axes] = grid([len(networks)], 1.1 * SMALL, SMALL)
    for ax, (name, points) in zip(axes, networks.items(), strict=True):
        for number, (frequencies, values) in enumerate(points.values()):
            ax.plot(frequencies, values, color=DEPTHS(number / max(1, len(points) - 1)), linewidth=1)
        ax.set(title=wrapped(name, 26), xlabel='frequency', ylabel='Δ log amplitude', xlim=(0, 1))
        ax.set_xticks([0, 0.25, 0.5, 0.75, 1], ['0', '0.25π', '0.5π', '0.75π', 'π'])
        ax.grid(alpha=0.3)
    share_range(axes)
    fig.colorbar(ScalarMappable(cmap=DEPTHS), ax=axes, label='normalised depth', aspect=25)
    finish(fig, path, title)


def heat_maps(path: Path, title: str, panels: Sequence[HeatMap]) -> None:
    """A map for each two networks: layers of the one upwards, of the other to the right; colours from 0 to 1.

    A panel is (name and layers of the rows, name and layers of the columns, cells [rows][columns]). It lies in the row
    and the column of its names.
    """
    rows, columns = (list(dict.fromkeys(panel[place] for panel in panels)) for place in (0, 2))
    fig = Figure(figsize=(2.1 * len(columns) + 1.4, 2.1 * len(rows) + 0.7), layout='constrained')
    places = fig.add_gridspec(len(rows), len(columns))
    for row, row_layers, column, column_layers, cells in panels:
        ax = fig.add_subplot(places[rows.index(row), columns.index(column)])
        image = ax.imshow(cells, cmap='magma', vmin=0, vmax=1, origin='lower', aspect='auto', interpolation='nearest')
        ax.set_box_aspect(1)
        for axis, name, layers in ((ax.yaxis, row, row_layers), (ax.xaxis, column, column_layers)):
            axis.set_major_locator(MaxNLocator(min(5, len(layers)), integer=True))
            axis.set_label_text(wrapped(f'block of {name}', 22))
        ax.label_outer()
    fig.colorbar(image, ax=fig.axes, label='CKA', aspect=25, shrink=max(0.6, 1 / len(rows)))
    finish(fig, path, title)


def heads(path: Path, title: str, panels: Mapping[str, Mapping[str, Heads]]) -> None:
    """For each quantity a row of panels, one for each network: a dot for each head, a line for their mean.

    What uniform attention would give is dashed. A network without layers has no panel, but keeps its colour.
    """
    shown = {
        quantity: [(number, name, *of) for number, (name, of) in enumerate(networks.items()) if of[0]]
        for quantity, networks in panels.items()
    }
    fig, axes = grid([*map(len, shown.values())], 1.1 * SMALL, SMALL)
    for of_quantity, (quantity, networks) in zip(axes, shown.items(), strict=True):
        for ax, (number, name, values, uniform) in zip(of_quantity, networks, strict=True):
            colour, layers = COLOURS[number % 8], range(1, len(values) + 1)
            for layer, of_heads in zip(layers, values, strict=True):
                ax.scatter([layer] * len(of_heads), of_heads, s=9, color=colour, alpha=0.4, linewidths=0)
            means = [sum(of_heads) / len(of_heads) for of_heads in values]
            ax.plot(layers, means, color=colour, linewidth=1.5, label='mean of the heads')
            if uniform is not None:
                ax.plot(layers, uniform, '--', color='0.3', linewidth=1, label='uniform attention')
            ax.set(title=wrapped(name, 26), xlabel='layer', ylabel=wrapped(quantity, 26), xlim=(0.5, len(values) + 0.5))
            ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
            ax.grid(alpha=0.3)
        share_range(of_quantity, 0)
    legend(fig, 2)
    finish(fig, path, title)


def grid(counts: Sequence[int], width: float, height: float) -> tuple[Figure, list[list[Axes]]]:
    """A figure with groups of so many panels of this size in inches; each group begins a row.

    A row has at most four panels; five are three and two.
    """
    columns = math.ceil(max(counts) / math.ceil(max(counts) / 4))
    rows = [math.ceil(count / columns) for count in counts]
    fig = Figure(figsize=(width * columns + 0.8, height * sum(rows) + 0.4), layout='constrained')
    cells = fig.add_gridspec(sum(rows), columns)
    axes = [
        [fig.add_subplot(cells[sum(rows[:group]) + number // columns, number % columns]) for number in range(count)]
        for group, count in enumerate(counts)
    ]
    return fig, axes


def share_range(axes: Sequence[Axes], low: float | None = None) -> None:
    """Give panels one range of y, so that they can be compared; from `low` if it is given."""
    lowest, highest = (of(ax.get_ylim()[end] for ax in axes) for end, of in ((0, min), (1, max)))
    for ax in axes:
        ax.set_ylim(lowest if low is None else low, highest)


# --------------------------------------------------------------------------
# a line or a row for each method of a comparison


class Panel(NamedTuple):
    """Lines with the spread of y to both sides, as bars or as a band; `base`: thin, in the colour of its network.

    All panels name all networks, in the same order: one without points keeps its colour.
    """

    xlabel: str
    ylabel: str
    lines: Curves
    bars: bool = True
    base: Curves | None = None
    ticks: Mapping[float, str] | None = None  # {x: its label}, for an axis of x in powers


def small_multiples(path: Path, title: str, rows: Sequence[Sequence[Panel]], key: bool = True) -> None:
    """Rows of panels, with a legend below them if `key`."""
    columns = max(map(len, rows))
    fig = Figure(figsize=(WIDTH * columns, 0.9 * HEIGHT * len(rows)), layout='constrained')
    for axes, panels in zip(fig.subplots(len(rows), columns, squeeze=False), rows, strict=True):
        for ax, panel in zip(axes, panels, strict=False):
            draw_panel(ax, panel)
        for ax in axes[len(panels) :]:
            ax.remove()
    if key:
        legend(fig, 2 * columns)
    finish(fig, path, title)


def draw_panel(ax: Axes, panel: Panel) -> None:
    lines = {name: ordered(*line) for name, line in panel.lines.items()}
    draw_lines(ax, {name: line[:2] for name, line in lines.items()})
    for number, (name, (x, y, error)) in enumerate(lines.items()):
        colour = COLOURS[number % 8]
        if panel.bars:
            ax.errorbar(x, y, error, fmt='none', ecolor=colour, elinewidth=1, capsize=2.5, alpha=0.7)
        else:
            draw_band(ax, x, y, error, colour)
        if panel.base and name in panel.base:
            ax.plot(*panel.base[name][:2], color=colour, linewidth=1, alpha=0.45)
    if panel.ticks:
        ax.set_xscale('log')
        ax.set_xticks(list(panel.ticks), list(panel.ticks.values()))
        ax.minorticks_off()
    ax.set(xlabel=panel.xlabel, ylabel=wrapped(panel.ylabel, 40))
    ax.grid(alpha=0.3)


def gains(path: Path, title: str, panels: Mapping[str, Gains]) -> None:
    """A panel for each quantity, in it a row for each network, the first on top.

    A mark for the mean, a stroke for each seed; the range of the random weights is grey. All are what is
    gained over the mean of the random weights.
    """
    names = {name: wrapped(name, 24) for rows in panels.values() for name in rows}
    row = max(0.32, 0.23 + 0.17 * max(label.count('\n') for label in names.values()))
    fig = Figure(figsize=(WIDTH * (0.45 + 0.55 * len(panels)), row * len(names) + 0.7), layout='constrained')
    for ax, (quantity, rows) in zip(fig.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        ax.axvline(0, color='0.4', linewidth=0.8)
        ax.use_sticky_edges = False  # a margin beside bars, too
        for number, (of_seeds, of_random) in enumerate(rows.values()):
            if of_seeds and of_random:
                low, high = min(of_random), max(of_random)
                ax.barh(-number, high - low, 0.4, left=low, color='0.8', edgecolor='0.8', linewidth=0.8, zorder=0)
                colour = dict(color=COLOURS[number % 8], linestyle='')
                ax.plot(of_seeds, [-number] * len(of_seeds), '|', markersize=14, **colour)
                ax.plot(sum(of_seeds) / len(of_seeds), -number, markersize=7, **marker(number) | colour)
        ax.set_yticks([-number for number in range(len(rows))], [names[name] for name in rows], ma='right')
        ax.set(xlabel=wrapped(quantity, 46), ylim=(0.4 - len(rows), 0.6))
        ax.grid(alpha=0.3, axis='x')
        ax.label_outer()
    finish(fig, path, title)


# --------------------------------------------------------------------------
# all figures


def legend(fig: Figure, columns: int) -> None:
    """What the lines of all panels are, each once, in so many columns, or fewer where names are long."""
    found = {}
    for ax in fig.axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            found.setdefault(wrapped(label, 26), handle)
    lines = [line for label in found for line in label.splitlines()]
    columns = max(1, min(columns, int(11 * fig.get_figwidth()) // (max(map(len, lines)) + 6)))
    fig.set_figheight(fig.get_figheight() + 0.2 * max(0, math.ceil(len(lines) / columns) - 2))
    fig.legend(found.values(), found.keys(), loc='outside lower center', ncols=columns, frameon=False)


def finish(fig: Figure, path: Path, title: str) -> None:
    """The title, if there is one, and the file: PNG or SVG by its name. An SVG is light, as its texts are texts."""
    if title:
        fig.suptitle(wrapped(title, int(9 * fig.get_figwidth())))
    with rc_context({'svg.fonttype': 'none', 'svg.hashsalt': path.name}):
        fig.savefig(path, dpi=DPI, metadata={'Date': None} if path.suffix == '.svg' else None)


def wrapped(text: str, width: int) -> str:
    """A text in lines of at most so many characters."""
    return textwrap.fill(text, width)
