"""attention: how far each head of each layer looks, and whether what it looks at depends on the query."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from util.analysis.attention import Looks, look
from util.errors import UserError
from util.log import info
from util.studies.common import Job, Network, described, rows, tell_cost

HELP = 'attention: distance and mutual information of every head'
SPLITS = {'val': 256}
NEEDS_HEAD = False


def add_flags(add: Callable) -> None:
    """None of its own."""


def compute(job: Job) -> dict:
    """Mean and deviation over images of each head of each layer; a network without attention is told and left out."""
    found, blank = {}, {}
    for network in job.networks:
        side = network.args.input_size
        try:
            blank[network.name] = look(network.core, torch.zeros(1, 3, side, side))
        except UserError as error:
            found[network.name] = {'images': 0, 'layers': [], 'notice': str(error)}
    lines = [f'{name}: {of["notice"]}' for name, of in found.items()]
    if not blank:
        raise UserError('; '.join(lines))
    for line in lines:
        info(f'{line}; the others go on')
    able = [network for network in job.networks if network.name in blank]
    for network in able:
        tell_cost(network, len(job.splits['val'].images))
    found |= {network.name: seen(job, network, blank[network.name]) for network in able}
    return {'checkpoints': [described(network) | found[network.name] for network in job.networks]}


def seen(job: Job, network: Network, blank: dict[str, Looks]) -> dict:
    """What the results have of a network, of which `blank` gives names, numbers of heads and uniform distances."""

    def of_batch(imgs: Tensor, labels: Tensor) -> Tensor:
        looks = look(network.core, imgs).values()
        return torch.stack([torch.cat(values, 1) for values in list(zip(*looks, strict=True))[:2]], 1)

    values, read = rows(job, network, of_batch)  # [N, 2, heads of all layers]
    heads = [len(looks.distance[0]) for looks in blank.values()]
    means, deviations = (x.split(heads, dim=1) for x in (values[read].mean(0), values[read].std(0, correction=0)))
    layers = []
    for (name, looks), mean, deviation in zip(blank.items(), means, deviations, strict=True):
        of_heads = dict(distance=mean[0], distance_deviation=deviation[0])
        of_heads |= dict(mutual_information=mean[1], mutual_information_deviation=deviation[1])
        of_heads = {quantity: numbers.tolist() for quantity, numbers in of_heads.items()}
        layers.append({'layer': name, 'uniform': looks.uniform, **of_heads})
    return {'images': int(read.sum()), 'layers': layers}


def table(result: dict) -> list[list[str]]:
    """A row for each network: means over the heads of its first and last layers."""
    rows = [['network', 'layers', 'heads', 'distance (px): first', 'last', 'mutual information: first', 'last']]
    for network in result['checkpoints']:
        layers = network['layers']
        cells = [f'{len(layers)}', f'{sum(len(layer["distance"]) for layer in layers)}']
        for quantity, form in (('distance', '.1f'), ('mutual_information', '.3f')):
            ends = [sum(layer[quantity]) / len(layer[quantity]) for layer in layers[:1] + layers[-1:]]
            cells += [format(end, form) for end in ends] or ['-', '-']
        rows.append([network['name'], *cells])
    return rows


def draw(result: dict, path: Path) -> None:
    """A dot for each head over depth: distance, with that of uniform attention, and mutual information."""
    from util.analysis import figures

    def panel(quantity: str, uniform: bool) -> dict:
        return {
            network['name']: (
                [layer[quantity] for layer in network['layers']],
                [layer['uniform'] for layer in network['layers']] if uniform else None,
            )
            for network in result['checkpoints']
        }

    panels = {
        'attention distance (px)': panel('distance', uniform=True),
        'normalised mutual information': panel('mutual_information', uniform=False),
    }
    counts = sorted({network['images'] for network in result['checkpoints'] if network['layers']})
    figures.heads(path, f'where heads look, {" or ".join(map(str, counts))} images', panels)
