"""Figures as PNG files. The one file that imports matplotlib: import it late, and do without where it is missing."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

WIDTH, HEIGHT, DPI = 4.6, 3.6, 130  # inches of a panel, pixels of an inch
Lines = Mapping[str, tuple[Sequence[float], Sequence[float]]]  # {network: (depths from 0 to 1, values)}


def over_depth(path: Path, title: str, panels: Mapping[str, Lines]) -> None:
    """A panel for each quantity, in it a line for each network over its depth; for single points a chart of dots."""
    fig = Figure(figsize=(WIDTH * len(panels), HEIGHT), layout='constrained')
    axes = fig.subplots(1, len(panels), squeeze=False)[0]
    single = all(len(values) == 1 for lines in panels.values() for _, values in lines.values())
    for ax, (quantity, lines) in zip(axes, panels.items(), strict=True):
        (draw_dots if single else draw_lines)(ax, lines)
        (ax.set_xlabel if single else ax.set_ylabel)(quantity)
        ax.grid(alpha=0.3)
    if single:
        for ax in axes[1:]:
            ax.tick_params(labelleft=False)
    else:
        fig.legend(*axes[0].get_legend_handles_labels(), loc='outside lower center', ncols=4, frameon=False)
    fig.suptitle(title)
    fig.savefig(path, dpi=DPI)


def draw_lines(ax: Axes, lines: Lines) -> None:
    for number, (name, (depths, values)) in enumerate(lines.items()):
        ax.plot(depths, values, marker='os^Dv<>P'[number % 8], markersize=4, label=name, color=f'C{number}')
    ax.set_xlabel('depth: 0 the first block, 1 what the head is given')


def draw_dots(ax: Axes, lines: Lines) -> None:
    """A row for each network, the first on top, its value beside the dot."""
    for number, (_, values) in enumerate(lines.values()):
        ax.plot(values, [-number], 'o', color=f'C{number}')
        ax.annotate(f'{values[0]:.4g}', (values[0], -number), (0, 7), textcoords='offset points', ha='center')
    ax.set_yticks([-number for number in range(len(lines))], list(lines))
    ax.set_ylim(0.6 - len(lines), 0.8)
    ax.margins(x=0.2)
    ax.xaxis.set_major_locator(MaxNLocator(5))
