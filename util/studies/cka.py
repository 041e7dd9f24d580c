"""cka: how similar the blocks of networks are, within each network and between any two."""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from util import rng
from util.analysis.features import block_names, captured
from util.analysis.similarity import FEWEST, centred_gram, cka
from util.errors import UserError
from util.log import counted, info
from util.studies.common import Job, Network, batches, described, evaluated, gathered, tell_cost

HELP = 'cka: similarity of the blocks of networks, each with each'
SPLITS = {'val': 2560}
NEEDS_HEAD = False
DEFAULTS = {'batch_size': 256}  # CKA is of the images of a batch: with other batches it is another number
VIEW = ('input_size', 'crop_pct', 'max_pixels', 'mean', 'std')  # arguments that say how a network sees an image


def add_flags(add: Callable) -> None:
    """None of its own."""


def compute(job: Job) -> dict:
    """CKA of all blocks of all networks, over batches of the same images for all of them."""
    batch, count = job.args.batch_size, whole_batches(job)
    layers = {network.name: list(block_names(network.core)) for network in job.networks}
    for network in job.networks:
        if not layers[network.name]:
            raise UserError(f'{network.name}: a {type(network.core).__name__} has no blocks to compare')
        tell_cost(network, count * batch)
    found = list(gathered(dict(of_batches(shuffled(job)))).values())
    if missing := count - len(found):
        info(f'batches left out, since they hold images that cannot be read: {missing} of {count}')
    if not found:
        raise UserError('no batch is left')
    products = torch.stack(found)
    check(products.sum(0), layers)
    return {
        'images': len(found) * batch,
        'batches': len(found),
        'checkpoints': [described(network) | {'layers': layers[network.name]} for network in job.networks],
        'pairs': pairs_of(products, layers),
    }


def whole_batches(job: Job) -> int:
    """How many batches there are. Raises UserError if there is none."""
    batch = job.args.batch_size
    count, left = divmod(len(job.splits['val'].images), batch)
    if min(batch, count * batch + left) < FEWEST:
        raise UserError(f'--batch_size {batch}, {count * batch + left} images: CKA needs batches of {FEWEST} or more')
    if not count:
        raise UserError(f'{left} images make no batch of --batch_size {batch}; --batch_size {left} takes them all')
    if left:
        info(f'batches of {batch} images: {count}; {counted(left, "image")} of an incomplete one are left out')
    return count


def shuffled(job: Job) -> Job:
    """With the images in an order drawn from the seed: a batch is of many classes."""
    split = job.splits['val']
    order = rng.generator(job.args.seed, rng.ORDER).permutation(len(split.images))
    return job._replace(splits={'val': split._replace(images=split.images.take(order), labels=split.labels[order])})


def of_batches(job: Job) -> Iterator[tuple[int, Tensor]]:
    """For each of this rank's batches that could be read, its number, and the dot products [L, L] of the centred Grams
    of the L blocks of all networks. Images are read once for all networks that see them alike.
    """
    views: dict[str, list[Network]] = {}
    for network in job.networks:
        views.setdefault(str([getattr(network.args, name) for name in VIEW]), []).append(network)
    blocks = [block_names(network.core) for network in job.networks]
    with contextlib.ExitStack() as stack:
        found = []
        for network, modules in zip(job.networks, blocks, strict=True):
            stack.enter_context(evaluated(job, network))
            found.append(stack.enter_context(captured(modules, of_block(network))))
        streams = [batches(job, networks[0], drop_last=True) for networks in views.values()]
        for seen in zip(*streams, strict=True):
            for networks, (imgs, *_) in zip(views.values(), seen, strict=True):
                for network in networks:
                    network.core(imgs)
            _, labels, places = seen[0]
            if (labels >= 0).all():
                grams = torch.stack([kept[name] for kept, names in zip(found, blocks, strict=True) for name in names])
                yield places[0] // job.args.batch_size, (grams @ grams.T).cpu()


def of_block(network: Network) -> Callable[[str, Tensor], Tensor]:
    """What is kept of a block's output, all of its tokens and channels: the centred Gram."""

    def gram(name: str, output: Tensor) -> Tensor:
        if not isinstance(output, Tensor):
            raise UserError(f'{network.name}: {name} of a {type(network.core).__name__} gives no single tensor')
        return centred_gram(output)

    return gram


def pairs_of(products: Tensor, layers: dict[str, list[str]]) -> list[dict]:
    """CKA of each network with itself and those before it, by the products [batches, L, L] of all blocks.

    With the deviation over the batches, if there are several.
    """
    numbers = {'cka': cka_of(products.sum(0))}
    if len(products) > 1:
        numbers['deviation_over_batches'] = cka_of(products).std(0)
    ends = [0, *itertools.accumulate(map(len, layers.values()))]
    places = {name: slice(*of) for name, of in zip(layers, itertools.pairwise(ends), strict=True)}
    return [
        {'rows': row, 'columns': column}
        | {name: values[places[row], places[column]].tolist() for name, values in numbers.items()}
        for number, row in enumerate(layers)
        for column in list(layers)[: number + 1]
    ]


def cka_of(products: Tensor) -> Tensor:
    """CKA [..., L, L] by dot products of all centred Grams with each other."""
    squares = products.diagonal(dim1=-2, dim2=-1)
    return cka(products, squares, squares)


def check(products: Tensor, layers: dict[str, list[str]]) -> None:
    """Raise UserError where a block is not finite, or gives the same for every image."""
    names = [f'{layer} of {name}' for name, of_network in layers.items() for layer in of_network]
    for name, square in zip(names, products.diagonal(), strict=True):
        if not 0 < square < float('inf'):
            raise UserError(f'features of {name} are not finite, or the same for every image')


def table(result: dict) -> list[list[str]]:
    """CKA of the last block of each network with its own first, and with the last of the networks before it."""
    layers = {of['name']: of['layers'] for of in result['checkpoints']}
    names = list(layers)
    found = {(pair['rows'], pair['columns']): f'{pair["cka"][-1][-1]:.3f}' for pair in result['pairs']}
    within = {pair['rows']: f'{pair["cka"][-1][0]:.3f}' for pair in result['pairs'] if pair['rows'] == pair['columns']}
    header = ['last block of', 'blocks', 'with its first', *(f'with {name}' for name in names[:-1])]
    rows = []
    for number, name in enumerate(names):
        others = [found[name, other] if place < number else '-' for place, other in enumerate(names[:-1])]
        rows.append([name, str(len(layers[name])), within[name], *others])
    return [header, *rows]


def draw(result: dict, path: Path) -> None:
    """A heat map for each two networks."""
    from util.analysis import figures

    layers = {of['name']: of['layers'] for of in result['checkpoints']}
    panels = [
        (pair['rows'], layers[pair['rows']], pair['columns'], layers[pair['columns']], pair['cka'])
        for pair in result['pairs']
    ]
    figures.heat_maps(path, f'similarity of blocks, {result["images"]} images', panels)
