"""How many images a classifier still knows when ever more of their cells are hidden."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from util import config, rng
from util.analysis import occlusion
from util.studies.common import Job, Network, add_grid, described, grid_of, head_labels, rows, tell_cost

HELP = 'occlusion: accuracy with a growing share of hidden cells'
SPLITS = {'val': None}
NEEDS_HEAD = True
RATIOS = tuple(tenth / 10 for tenth in range(10))


def add_flags(add: Callable) -> None:
    add_grid(add)
    add('--ratios', type=config.SHARE, nargs='+', default=[*RATIOS], help='shares of the cells that are hidden')


def compute(job: Job) -> dict:
    """The accuracy of each network at each ratio."""
    split = job.splits['val']
    given = [(network, head_labels(job, network)[split.labels]) for network in job.networks]
    for network, _ in given:
        tell_cost(network, len(split.images), len(job.args.ratios))
    numbered = job._replace(splits={'val': split._replace(labels=np.arange(len(split.images)))})
    results = [of_network(numbered, *each) for each in given]
    return {'images': len(split.images), 'ratios': job.args.ratios, 'checkpoints': results}


def of_network(job: Job, network: Network, labels: Tensor) -> dict:
    """The results of a network; `labels` [N] are outputs of its head. The job's images have their numbers as labels."""
    ratios, grid = job.args.ratios, grid_of(network)

    def answers(imgs: Tensor, numbers: Tensor) -> Tensor:
        # of an image that could not be read, -1, the answer is not taken
        order = torch.stack([hidden_first(grid, job.args.seed, number) for number in numbers.clamp(min=0).tolist()])
        return occlusion.occluded(network.core, imgs, occlusion.kept_cells(order, ratios)).argmax(2).T

    answered, read = rows(job, network, answers, batch_size=max(1, job.args.batch_size // len(ratios)))
    share = (answered == labels.unsqueeze(1))[read].double().mean(0)
    error = 100 * (share * (1 - share) / read.sum()).sqrt()
    found = {'grid': grid, 'top1': (100 * share).tolist(), 'error': error.tolist()}
    return described(network) | found | {'images': int(read.sum())}


def hidden_first(grid: int, seed: int, image: int) -> Tensor:
    """The order in which the cells of an image are hidden, [n]: those of a smaller share are among those of a larger.

    A function of the seed and the image's number, so that no batch matters.
    """
    return torch.from_numpy(rng.generator(seed, rng.OCCLUSION, image).permutation(grid**2))


def table(result: dict) -> list[list[str]]:
    """A row for each network: top-1 at each ratio, in percent."""
    tops = [[network['name'], *(f'{top:.1f}' for top in network['top1'])] for network in result['checkpoints']]
    return [['network', *(f'{100 * ratio:g}% hidden' for ratio in result['ratios'])], *tops]


def draw(result: dict, path: Path) -> None:
    """Top-1 over the share of hidden cells, with its standard error."""
    from util.analysis import figures

    lines = {of['name']: (result['ratios'], of['top1'], of['error']) for of in result['checkpoints']}
    figures.curves(
        path, f'accuracy under occlusion, {result["images"]} images', 'share of hidden cells', 'top-1 (%)', lines
    )
