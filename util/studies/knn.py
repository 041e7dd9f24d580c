"""knn: nearest neighbours, a linear probe and the rank of features, before the head or after every block."""

import argparse
import itertools
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from util import config, digests, dist, rng
from util.analysis import features, probes, similarity
from util.data.datasets import Split
from util.log import counted, info
from util.resources import size
from util.studies.common import Job, Network, check_read, described, share, tell_cost, writing

HELP = 'knn: nearest neighbours, linear probe, effective rank'
SPLITS = {'train': None, 'val': None}
NEEDS_HEAD = False
HELD_BACK = 0.1  # share of the training images on which a probe's lambda is chosen


def add_flags(add: Callable) -> None:
    add('--max_per_class', type=config.AT_LEAST_1, help='most training images of a class, drawn from --seed')
    add('--layers', choices=features.LAYERS, default='last', help='after every block too, or before the head only')
    add('--feature', choices=features.FEATURES, default='pooled', help='what the head is given, or the class token')
    add('--k', nargs='+', type=config.AT_LEAST_1, default=[10, 20, 100, 200], help='neighbours that vote')
    add('--temperature', type=config.ABOVE_0, default=probes.TEMPERATURE, help='of their weights')
    add('--probe', choices=('logistic', 'ridge', 'none'), default='logistic', help='linear classifier of the features')
    add('--save_features', action=config.Switch, help='write them, with files and labels, to features-NAME.npz')


def compute(job: Job) -> dict:
    """Nearest neighbours, linear probe and rank of the features of each network, from one extraction."""
    args, device, found, splits = job.args, job.device, job.networks, job.splits
    for network in found:
        tell_cost(network, sum(len(split.images) for split in splits.values()))
        info(memory(args, network, splits))
    if max(args.k) > len(splits['train'].images):
        info(f'--k {max(args.k)}: of {len(splits["train"].images)} training images all vote')
    results = []
    for network in found:
        began = time.perf_counter()
        train, val = (kept_features(job, network, name) for name in SPLITS)
        network.core.to('cpu')
        if args.save_features and dist.is_main():
            with writing(args.output_dir):
                save_features(args.output_dir, network, dict(train=train, val=val), splits)
        extracted = time.perf_counter()
        labels = [
            torch.from_numpy(splits[name].labels)[kept.read].to(device)
            for name, kept in zip(SPLITS, (train, val), strict=True)
        ]
        layers = []
        for number, (layer, gram) in enumerate(train.grams.items()):
            X, X_val = (kept.features[layer][kept.read].to(device) for kept in (train, val))
            depth = number / max(1, len(train.grams) - 1)
            scores = judged(args, X, labels[0], X_val, labels[1], len(splits['train'].classes))
            layers.append(dict(layer=layer, depth=depth, width=X.shape[1], **scores, **ranks(gram)))
        seconds = f'{extracted - began:.1f} s, judged in {time.perf_counter() - extracted:.1f} s'
        info(f'{network.name}: features of {sum(map(len, labels))} images in {seconds}')
        results.append(described(network) | {'layers': layers})
    return {
        'images': dict(zip(SPLITS, map(len, labels), strict=True)),
        'classes': len(splits['train'].classes),
        'checkpoints': results,
    }


def memory(args: argparse.Namespace, network: Network, splits: dict[str, Split]) -> str:
    """What the features of a network take."""
    widths = features.widths(network.core, network.args.input_size, args.layers, args.feature)
    count, width = sum(len(split.images) for split in splits.values()), sum(widths.values())
    layers = counted(len(widths), 'layer')
    return f'{network.name}: {count} images x {width} features of {layers} x 2 bytes: {size(2 * count * width)} a rank'


def kept_features(job: Job, network: Network, name: str) -> features.Kept:
    """The features of a split, on every rank."""
    loader, places, normalise = share(job, network, name)
    how = dict(layers=job.args.layers, feature=job.args.feature, normalise=normalise)
    core, count = network.core.to(job.device), len(job.splits[name].images)
    kept = features.keep(core, loader, places, count, network.args.input_size, **how)
    check_read(job, name, kept.read)
    return kept


def judged(args: argparse.Namespace, train: Tensor, y: Tensor, val: Tensor, y_val: Tensor, classes: int) -> dict:
    """The scores of the features of one layer, in percent of the validation images."""
    ks = sorted({min(k, len(train)) for k in args.k})
    tops = {k: (1, min(5, k, classes)) for k in ks}
    right = torch.zeros(len(ks), 2, dtype=torch.long, device=train.device)
    rank, ranks = dist.rank(), dist.world_size()
    blocks = zip(val.split(probes.QUERIES), y_val.split(probes.QUERIES), strict=True)
    # whole blocks, the same for any number of ranks
    for queries, labels in itertools.islice(blocks, rank, None, ranks):
        scores = probes.knn_scores(train, y, queries, ks, args.temperature, classes)
        right += torch.stack([torch.stack([probes.hits(scores[k], labels, top).sum() for top in tops[k]]) for k in ks])
    dist.barrier()
    shares = (100 * dist.all_reduce_sum(right).double() / len(val)).tolist()
    found = {
        k: {f'top{top}': share for top, share in zip(tops[k], of_k, strict=True)}
        for k, of_k in zip(ks, shares, strict=True)
    }
    return {'knn': found} | ({} if args.probe == 'none' else {'probe': probed(args, train, y, val, y_val, classes)})


def probed(args: argparse.Namespace, train: Tensor, y: Tensor, val: Tensor, y_val: Tensor, classes: int) -> dict:
    """A linear classifier of the features as they are. Every rank makes the same one."""
    train, val = probes.standardised(train, val)
    held_back = torch.zeros(len(train), dtype=torch.bool, device=train.device)
    order = rng.generator(args.seed, rng.CHOICE, 0).permutation(len(train))
    held_back[order[: max(1, round(HELD_BACK * len(train)))]] = True
    lam, weight, bias = probes.tuned(args.probe, train, y, classes, held_back)
    right = (val @ weight.T + bias).argmax(1) == y_val
    return {'kind': f'{args.probe}, no augmentation', 'lambda': lam, 'top1': 100 * right.double().mean().item()}


def ranks(gram: similarity.Gram) -> dict:
    effective = gram.rankme(eps=0)
    return dict(rankme=gram.rankme(), effective_rank=effective, share_of_width=effective / len(gram.products))


def save_features(folder: Path, network: Network, kept: dict[str, features.Kept], splits: dict[str, Split]) -> None:
    """Features, files and labels of the images that could be read; `classes` are the names of the labels."""
    arrays = {'classes': np.array(splits['train'].classes)}
    for name, of_split in kept.items():
        read, split = of_split.read.numpy(), splits[name]
        files = np.array(list(split.images))
        arrays |= {f'{name}/labels': split.labels[read], f'{name}/files': files[read]}
        arrays |= {f'{name}/{layer}': vectors.numpy()[read] for layer, vectors in of_split.features.items()}
    path = folder / f'features-{network.name.replace("/", "-")}.npz'
    with digests.temporary_for(path) as temporary:
        with digests.flushed(temporary) as file:
            np.savez(file, **arrays)
        temporary.replace(path)
    info(f'{network.name}: features in {path}')


def table(result: dict) -> list[list[str]]:
    """A row for each network: its last layer, and where there are more, the one with the best neighbours."""
    rows = []
    for network in result['checkpoints']:
        layers = network['layers']
        k = main_k(layers[0])
        best = max(layers, key=lambda layer: layer['knn'][k]['top1'])
        for layer in dict.fromkeys((len(layers) - 1, layers.index(best))):
            rows.append(row(network['name'], layers[layer]))
    header = ['network', 'layer', *(f'{k}-NN' for k in layers[0]['knn'])]
    header += [layers[0]['probe']['kind']] if 'probe' in layers[0] else []
    return [[*header, 'RankMe', 'effective rank'], *rows]


def row(name: str, layer: dict) -> list[str]:
    probe = [f'{layer["probe"]["top1"]:.1f}'] if 'probe' in layer else []
    scores = [f'{score["top1"]:.1f}' for score in layer['knn'].values()]
    rank = [f'{layer["rankme"]:.1f}', f'{layer["effective_rank"]:.1f} of {layer["width"]}']
    return [name, layer['layer'], *scores, *probe, *rank]


def main_k(layer: dict) -> str:
    """The number of neighbours that a figure shows: 20, or the first."""
    return '20' if '20' in layer['knn'] else next(iter(layer['knn']))


def draw(result: dict, path: Path) -> None:
    """Scores and rank over depth."""
    from util.analysis import figures

    def lines(value: Callable[[dict], float]) -> dict:
        return {
            network['name']: (
                [layer['depth'] for layer in network['layers']],
                [value(layer) for layer in network['layers']],
            )
            for network in result['checkpoints']
        }

    layers = [layer for network in result['checkpoints'] for layer in network['layers']]
    k = main_k(layers[0])
    panels = {f'{k}-NN, top-1 (%)': lines(lambda layer: layer['knn'][k]['top1'])}
    if 'probe' in layers[0]:
        panels[f'{layers[0]["probe"]["kind"]}, top-1 (%)'] = lines(lambda layer: layer['probe']['top1'])
    panels['RankMe'] = lines(lambda layer: layer['rankme'])
    figures.over_depth(
        path, f'{result["images"]["train"]} training, {result["images"]["val"]} validation images', panels
    )
