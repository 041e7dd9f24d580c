"""Which frequencies the maps of a network have, from its first block to its last."""

import itertools
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from util.analysis import features, spectra
from util.errors import UserError
from util.log import info
from util.studies.common import Job, Network, described, rows, tell_cost

HELP = 'fourier: frequencies and variance of the feature maps after every half-block'
SPLITS = {'val': 1024}
NEEDS_HEAD = False
QUANTITIES = {'high_frequency': 'high frequency (Δ log amplitude)', 'variance': 'variance over positions'}


def add_flags(add: Callable) -> None:
    """It has none of its own."""


def compute(job: Job) -> dict:
    """Spectra and variance at each point. Raises UserError for a network without maps before any image is read."""
    every = [points(network) for network in job.networks]
    for network, shapes in zip(job.networks, every, strict=True):
        tell_cost(network, len(job.splits['val'].images))
        for note in notes(network.core, shapes):
            info(f'{network.name}: {note}')
    results = []
    for network, shapes in zip(job.networks, every, strict=True):
        began = time.perf_counter()
        values, read = rows(job, network, lambda imgs, labels, core=network.core: of_images(core, imgs))
        info(f'{network.name}: {int(read.sum())} images at {len(shapes)} points in {time.perf_counter() - began:.1f} s')
        results.append(described(network) | judged(shapes, values[read]))
    return {'checkpoints': results}


def points(network: Network) -> dict[str, list[int]]:
    """{point: [C, h, w]} of the network's maps. Raises UserError where it has none."""
    size = network.args.input_size
    try:
        maps = features.collect(network.core, torch.zeros(1, 3, size, size))
    except UserError as error:
        raise UserError(f'{network.name}: {error}; leave it out of --checkpoint') from error
    return {point: list(of_point.shape[1:]) for point, of_point in maps.items()}


def notes(core: nn.Module, shapes: dict[str, list[int]]) -> list[str]:
    """What of these points is not as a reader of the figures expects."""
    found, small = [], [point for point, shape in shapes.items() if side(shape) < 3]
    if any(hasattr(block, 'attn') and name in shapes for name, block in features.block_names(core).items()):
        found.append('its blocks have no state between attention and MLP: whole blocks')
    if any(shape[1] != shape[2] for shape in shapes.values()):
        found.append('its maps are not square: spectra are of the largest centred square')
    if small:
        found.append(f'maps below 3 x 3 have no frequency but 0, and no spectrum is drawn of {", ".join(small)}')
    return found


def side(shape: list[int]) -> int:
    """Of the largest square in a map [C, h, w]."""
    return min(shape[1:])


def of_images(core: nn.Module, imgs: Tensor) -> Tensor:
    """[N, values]: of each image the log amplitudes at all points, and behind them the variances."""

    def both(maps: Tensor) -> tuple[Tensor, Tensor]:
        return spectra.log_amplitudes(maps), spectra.variances(maps).unsqueeze(1)

    curves, variances = zip(*features.collect(core, imgs, reduce=both).values(), strict=True)
    return torch.cat([*curves, *variances], dim=1)


def judged(shapes: dict[str, list[int]], values: Tensor) -> dict:
    """What the figures show, by `values` [images, values]. A spread is the standard deviation over images."""
    counts = [len(spectra.frequencies(side(shape))) for shape in shapes.values()]
    curves, variances = values[:, : sum(counts)].split(counts, dim=1), values[:, sum(counts) :].unbind(1)
    sides = [side(shape) for shape in shapes.values()]
    found = []
    for number, (point, shape) in enumerate(shapes.items()):
        numbers = dict(
            point=point,
            kind='stem' if not number else 'down' if sides[number] < sides[number - 1] else kind(point),
            depth=number / max(1, len(shapes) - 1),
            map=shape,
        )
        found.append(numbers | curve_of(curves[number], sides[number]) | variance_of(variances[number]))
    return {'images': len(values), 'points': found}


def kind(point: str) -> str:
    """Of what changed the state: 'attn', 'mlp', or a whole 'block'."""
    last = point.rpartition('.')[2]
    return last if last in ('attn', 'mlp') else 'block'


def curve_of(curve: Tensor, side: int) -> dict:
    """Of log amplitudes [images, frequencies]; the high frequency is the last value of the relative curve."""
    relative = curve - curve[:, :1]
    return dict(
        frequencies=spectra.frequencies(side),  # in units of pi
        log_amplitude=curve.mean(0).tolist(),
        relative_log_amplitude=relative.mean(0).tolist(),
        relative_spread=relative.std(0, correction=0).tolist(),
        high_frequency=relative[:, -1].mean().item() if side > 2 else None,
    )


def variance_of(variance: Tensor) -> dict:
    """Of the variances [images]; a map of one position has none."""
    known = not variance.isnan().all()
    return dict(
        variance=variance.mean().item() if known else None,
        variance_spread=variance.std(correction=0).item() if known else None,
    )


def table(result: dict) -> list[list[str]]:
    header = ['network', 'points', 'high frequency: first', 'last', 'by attention', 'by MLP', 'variance: first', 'last']
    return [header, *map(row, result['checkpoints'])]


def row(network: dict) -> list[str]:
    """First and last values, and by how much a half-block of each kind changes the high frequency, on average."""
    of_points = network['points']
    high, variances = ([p[key] for p in of_points if p[key] is not None] for key in ('high_frequency', 'variance'))
    steps = [
        (after['kind'], after['high_frequency'] - before['high_frequency'])
        for before, after in itertools.pairwise(of_points)
        if None not in (before['high_frequency'], after['high_frequency'])
    ]
    of_kind = ([step for kind, step in steps if kind == which] for which in ('attn', 'mlp'))
    changes = [f'{sum(some) / len(some):+.3f}' if some else '-' for some in of_kind]
    ends = [[f'{some[0]:.3f}', f'{some[-1]:.3f}'] if some else ['-', '-'] for some in (high, variances)]
    return [network['name'], str(len(of_points)), *ends[0], *changes, *ends[1]]


def draw(result: dict, path: Path) -> None:
    """The spectra; and beside them, in fourier-depth.png, high frequency and variance over depth."""
    from util.analysis import figures

    networks = {network['name']: network['points'] for network in result['checkpoints']}
    curves = {
        name: {point['point']: (point['frequencies'], point['relative_log_amplitude']) for point in of_points}
        for name, of_points in networks.items()
    }
    images = ' or '.join(map(str, sorted({network['images'] for network in result['checkpoints']})))
    figures.spectra(path, f'relative log amplitude of feature maps, {images} images', curves)
    panels = {
        label: {
            name: ([p['depth'] for p in of_points], [math.nan if p[key] is None else p[key] for p in of_points])
            for name, of_points in networks.items()
        }
        for key, label in QUANTITIES.items()
    }
    bands = {name: [p['kind'] for p in of_points] for name, of_points in networks.items()}
    depth = path.with_stem(f'{path.stem}-depth')
    figures.over_depth(depth, f'high frequencies and variance of feature maps, {images} images', panels, bands)
    info(f'figure in {depth}')
