"""Judge networks by what they make of images: nearest neighbours, a linear probe and the rank of their features.

Examples:
    python scripts/analyse.py knn --data_path /data/imagenet --checkpoint ours=runs/a/checkpoint-last.pth random
    python scripts/analyse.py knn --layers all --data_path ... --checkpoint a.pth mae=mae.pth,model=mirl_vit_base
    python scripts/analyse.py knn --from_json runs/a/knn.json runs/b/knn.json --output_dir runs/both
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from util import start  # noqa: F401

# isort: split
import argparse
import contextlib
import itertools
import json
import re
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import main_finetune
from util import agreement, build, checkpoint, config, digests, dist, resources, rng
from util.analysis import features, probes, similarity
from util.data import datasets, named
from util.errors import StorageError, UserError, run_main
from util.log import counted, info
from util.resources import size
from util.weights import file_of, load_published

MOST = 8  # networks in a table
HELD_BACK = 0.1  # share of the training images on which a probe's lambda is chosen
RANDOM = 'random'
SPLITS = ('train', 'val')
TAKEN = (  # of fine-tuning's flags
    *('model', 'model_kwargs', 'input_size', 'crop_pct', 'mean', 'std', 'max_pixels', 'device', 'seed', 'batch_size'),
    *('data_path', 'dataset', 'download', 'val_share', 'num_workers', 'pin_mem', 'bad_images', 'max_bad_images'),
    *('data_retries', 'output_dir', 'dist_url', 'dist_timeout'),
)
OF_FILE = ('model', 'model_kwargs', 'input_size', 'mean', 'std')  # what a checkpoint gives
FIXED = dict(  # fine-tuning's other arguments
    eval=True, eval_size=None, eval_logits='all', nb_classes=None, drop_path=0.0, amp_dtype='none', channels_last=False
)
PLACES = {'what', 'given', 'from_json', 'save_features', 'output_dir', 'download', 'device', 'num_workers', 'pin_mem'}
PLACES |= {'data_retries', 'dist_url', 'dist_timeout', *FIXED}  # arguments on which no number depends


def get_args_parser() -> config.Parser:
    finetune = main_finetune.get_args_parser()
    parser = config.Parser(__doc__, other='main_finetune', usage='%(prog)s WHAT --checkpoint ... [--FLAG VALUE ...]')
    parser.add_argument('what', choices=WHATS, metavar='WHAT', help='; '.join(w.help for w in WHATS.values()))
    add = parser.add_argument
    add(
        '--checkpoint',
        type=described_checkpoint,
        nargs='+',
        action='extend',
        default=[],
        metavar='[NAME=]PATH[,model=...]',
        help=f'1 to {MOST}, of any origin: path or URL#sha256=..., or {RANDOM}, for random weights; behind a comma, '
        'what differs from the flags of the same name, or options of the model',
    )
    add('--use_ema', action=config.Switch, heading='Weight average', help='take the averaged weights of the files')
    add(
        '--images',
        type=config.number(int, 2),
        help='most images of each split, evenly from all classes, drawn from --seed; default: all',
    )
    add('--max_per_class', type=config.AT_LEAST_1, help='most training images of a class, drawn from --seed')
    add('--from_json', nargs='+', type=config.path, default=[], metavar='JSON', help='draw these results, compute none')
    parser.take(finetune, *TAKEN)
    add = partial(parser.add_argument, heading='knn')
    add('--layers', choices=features.LAYERS, default='last', help='after every block too, or before the head only')
    add('--feature', choices=features.FEATURES, default='pooled', help='what the head is given, or the class token')
    add('--k', nargs='+', type=config.AT_LEAST_1, default=[10, 20, 100, 200], help='neighbours that vote')
    add('--temperature', type=config.ABOVE_0, default=probes.TEMPERATURE, help='of their weights')
    add('--probe', choices=('logistic', 'ridge', 'none'), default='logistic', help='linear classifier of the features')
    add('--save_features', action=config.Switch, help='write them, with files and labels, to features-NAME.npz')
    return parser


# --------------------------------------------------------------------------
# networks and images


class Network(NamedTuple):
    """A network to judge."""

    name: str
    path: str
    sha256: str | None
    args: argparse.Namespace  # completed by its file
    core: nn.Module
    report: str


def networks(args: argparse.Namespace, classes: int) -> list[Network]:
    """Those of --checkpoint. Raises UserError before anything is computed."""
    if not 1 <= len(args.checkpoint) <= MOST:
        raise UserError(f'--checkpoint takes 1 to {MOST} checkpoints, got {len(args.checkpoint)}')
    names = [parts(text)[0] for text in args.checkpoint]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f'--checkpoint: there are two named {twice[0]}; --checkpoint NAME=PATH names them')
    found, before = [], checkpoint.Source('', {})
    for text in args.checkpoint:
        name, path, options = parts(text)
        own = with_options(args, options, text)
        if path != RANDOM:
            before = checkpoint.Source.read(path)
        found.append(network(name, path, before, own, classes))
    return found


def described_checkpoint(text: str) -> str:
    """The type of --checkpoint: a text of which `parts` can make something."""
    parts(text)
    return text


def parts(text: str) -> tuple[str, str, dict[str, str]]:
    """The name, the path and the options of `[NAME=]PATH[,KEY=VALUE ...]`."""
    name, path, options = re.fullmatch(r'(?:([^=/,:#]+)=)?(.*?)((?:,\w+=[^,]*)*)', text, re.DOTALL).groups()
    path = config.source(path)
    name = name or '/'.join(Path(path.partition('#')[0]).with_suffix('').parts[-2:])
    return name, path, dict(option.split('=', 1) for option in options.split(',')[1:])


def with_options(args: argparse.Namespace, options: dict[str, str], text: str) -> argparse.Namespace:
    """The arguments with what one checkpoint has of its own: flags of the network, and options of its model."""
    known = get_args_parser().of_network
    flags = {key: value for key, value in options.items() if key in known}
    given = {
        key: config.converted(known[key], key, value, f'--checkpoint {text}: {key}') for key, value in flags.items()
    }
    own = argparse.Namespace(**vars(args) | given | {'given': sorted({*args.given, *given})})
    words = [f'{key}={value}' for key, value in options.items() if key not in known]
    known['model_kwargs'](None, own, words, f'--checkpoint {text}')
    return own


def network(name: str, path: str, source: checkpoint.Source, args: argparse.Namespace, classes: int) -> Network:
    """A network of a file; or with random weights, and then as the file before it for all that no flag gives."""
    if path == RANDOM and not (args.model or source.origin):
        raise UserError(f'--checkpoint {RANDOM}: of which network? give --model NAME, or {RANDOM},model=NAME')
    source.notices.clear()
    given = args.model_kwargs
    if source.path:
        args = source.complete(args, get_args_parser(), OF_FILE)
    method = main_finetune.find_method(args.model)
    if source.origin and source.origin.stage in ('pretrain', 'segment', 'detect'):
        args.model_kwargs = build.encoder_kwargs(method, args.model, args.model_kwargs) | given
    args.global_pool = args.feature == 'pooled'
    args.probe = source.origin.args.get('probe') if source.origin and path != RANDOM else None  # fine-tuning's flag
    with source.expected(args):
        core = main_finetune.checked_classifier(args, len((source.origin and source.origin.classes) or []) or classes)
        if path == RANDOM:
            report, digest = f'{args.model}, random weights of --seed {args.seed}', None
        else:
            report = load_published(core, source.container, ema=args.use_ema, label=source.path)
            digest = path.partition('#sha256=')[2] or digests.sum_of(file_of(path))
    for line in (report, *source.notices):
        info(f'{name}: {line}')
    return Network(name, path.partition('#')[0], digest, args, core, str(report))


def images(args: argparse.Namespace) -> list[datasets.Split]:
    """Training and validation images, as --images and --max_per_class have them."""
    splits = named.labelled_splits(args, SPLITS)
    chosen = [
        named.some(split, args.seed, args.images, per_class)
        for split, per_class in zip(splits, (args.max_per_class, None), strict=True)
    ]
    return [
        split._replace(notes=['; '.join([*split.notes, f'{len(split.images)} of these images are taken'])])
        if len(split.images) < len(whole.images)
        else split
        for split, whole in zip(chosen, splits, strict=True)
    ]


def ready(args: argparse.Namespace) -> tuple[torch.device, list[datasets.Split], list[Network]]:
    """This process's device, the splits and the networks, once all is checked and the ranks have met."""
    dist.own_device(args.device)
    splits = images(args)
    found = networks(args, len(splits[0].classes))
    device = dist.init(args.device, args.dist_url, args.dist_timeout)
    agreement.check(args, device, train=splits[0], val=splits[1])
    for line in [*splits[0].notes, *splits[1].notes, *(memory(network, splits) for network in found)]:
        info(line)
    return device, splits, found


# --------------------------------------------------------------------------
# knn


def knn(args: argparse.Namespace) -> dict:
    """Nearest neighbours, linear probe and rank of the features of each network, from one extraction."""
    device, splits, found = ready(args)
    if max(args.k) > len(splits[0].images):
        info(f'--k {max(args.k)}: of {len(splits[0].images)} training images all vote')
    results = []
    for network in found:
        began = time.perf_counter()
        train, val = (kept_features(network, *named_split, device) for named_split in zip(SPLITS, splits, strict=True))
        network.core.to('cpu')
        if args.save_features and dist.is_main():
            with writing(args.output_dir):
                save_features(args.output_dir, network, dict(train=train, val=val), splits)
        extracted = time.perf_counter()
        labels = [
            torch.from_numpy(split.labels)[kept.read].to(device)
            for split, kept in zip(splits, (train, val), strict=True)
        ]
        layers = []
        for number, (layer, gram) in enumerate(train.grams.items()):
            X, X_val = (kept.features[layer][kept.read].to(device) for kept in (train, val))
            depth = number / max(1, len(train.grams) - 1)
            scores = judged(args, X, labels[0], X_val, labels[1], len(splits[0].classes))
            layers.append(dict(layer=layer, depth=depth, width=X.shape[1], **scores, **ranks(gram)))
        seconds = f'{extracted - began:.1f} s, judged in {time.perf_counter() - extracted:.1f} s'
        info(f'{network.name}: features of {sum(map(len, labels))} images in {seconds}')
        results.append(described(network) | {'layers': layers})
    dist.cleanup()
    return {
        'images': dict(zip(SPLITS, map(len, labels), strict=True)),
        'classes': len(splits[0].classes),
        'checkpoints': results,
    }


def described(network: Network) -> dict:
    settings = {name: getattr(network.args, name) for name in (*OF_FILE, 'crop_pct')}
    return dict(name=network.name, path=network.path, sha256=network.sha256, **settings, weights=network.report)


def memory(network: Network, splits: list[datasets.Split]) -> str:
    """What the features of a network take."""
    widths = features.widths(network.core, network.args.input_size, network.args.layers, network.args.feature)
    count, width = sum(len(split.images) for split in splits), sum(widths.values())
    layers = counted(len(widths), 'layer')
    return f'{network.name}: {count} images x {width} features of {layers} x 2 bytes: {size(2 * count * width)} a rank'


def kept_features(network: Network, name: str, split: datasets.Split, device: torch.device) -> features.Kept:
    """The features of a split, on every rank."""
    args, core = network.args, network.core.to(device)
    loader = build.val_loader(args, split.images, split.labels, device, f'bad_images_{name}.txt')
    rows = [[index for _, index in batch] for batch in loader.batch_sampler]
    how = dict(layers=args.layers, feature=args.feature)
    how['normalise'] = datasets.Normalisation.of(args.mean, args.std, device)
    kept = features.keep(core, loader, rows, len(split.images), args.input_size, **how)
    if not kept.read.any():
        raise UserError('none of the images can be read')
    if skipped := loader.dataset.reader.skipped():
        info(f'bad images skipped: {len(skipped)}, listed in {loader.dataset.reader.listing}')
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


def save_features(folder: Path, network: Network, kept: dict[str, features.Kept], splits: list[datasets.Split]) -> None:
    """Features, files and labels of the images that could be read; `classes` are the names of the labels."""
    arrays = {'classes': np.array(splits[0].classes)}
    for (name, of_split), split in zip(kept.items(), splits, strict=True):
        read = of_split.read.numpy()
        files = np.array(list(split.images))
        arrays |= {f'{name}/labels': split.labels[read], f'{name}/files': files[read]}
        arrays |= {f'{name}/{layer}': vectors.numpy()[read] for layer, vectors in of_split.features.items()}
    path = folder / f'features-{network.name.replace("/", "-")}.npz'
    with digests.temporary_for(path) as temporary:
        with digests.flushed(temporary) as file:
            np.savez(file, **arrays)
        temporary.replace(path)
    info(f'{network.name}: features in {path}')


def knn_table(result: dict) -> list[list[str]]:
    """A row for each network: its last layer, and where there are more, the one with the best neighbours."""
    rows = []
    for network in result['checkpoints']:
        layers = network['layers']
        k = main_k(layers[0])
        best = max(layers, key=lambda layer: layer['knn'][k]['top1'])
        for layer in dict.fromkeys((len(layers) - 1, layers.index(best))):
            rows.append(knn_row(network['name'], layers[layer]))
    header = ['network', 'layer', *(f'{k}-NN' for k in layers[0]['knn'])]
    header += [layers[0]['probe']['kind']] if 'probe' in layers[0] else []
    return [[*header, 'RankMe', 'effective rank'], *rows]


def knn_row(name: str, layer: dict) -> list[str]:
    probe = [f'{layer["probe"]["top1"]:.1f}'] if 'probe' in layer else []
    scores = [f'{score["top1"]:.1f}' for score in layer['knn'].values()]
    rank = [f'{layer["rankme"]:.1f}', f'{layer["effective_rank"]:.1f} of {layer["width"]}']
    return [name, layer['layer'], *scores, *probe, *rank]


def main_k(layer: dict) -> str:
    """The number of neighbours that a figure shows: 20, or the first."""
    return '20' if '20' in layer['knn'] else next(iter(layer['knn']))


def knn_figure(result: dict, path: Path) -> None:
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


# --------------------------------------------------------------------------
# results


class What(NamedTuple):
    """An analysis: what it computes, and how that is shown. Its results have `checkpoints`, each with a `name`."""

    help: str
    compute: Callable[[argparse.Namespace], dict]
    table: Callable[[dict], list[list[str]]]
    figure: Callable[[dict, Path], None]


WHATS = {'knn': What('knn: nearest neighbours, linear probe, effective rank', knn, knn_table, knn_figure)}


def joined(what: str, files: list[Path]) -> dict:
    """The results of several files in one; names that they share get that of their folder."""
    results = []
    for file in files:
        try:
            results.append(json.loads(file.read_bytes()))
            if results[-1]['what'] != what:
                raise UserError(f'--from_json {file} has results of {results[-1]["what"]}, not of {what}')
        except OSError as error:
            raise UserError(f'--from_json {file}: {error.strerror}') from error
        except (ValueError, LookupError, TypeError) as error:
            raise UserError(f'--from_json {file}: not a file that this program wrote') from error
    names = [of['name'] for result in results for of in result['checkpoints']]
    for file, result in zip(files, results, strict=True):
        for of in result['checkpoints']:
            of['name'] += f' ({file.parent.name})' if names.count(of['name']) > 1 else ''
    return results[0] | {'checkpoints': [of for result in results for of in result['checkpoints']]}


def rounded(value: object) -> object:
    """Plain data with numbers of six digits: the order of a sum over ranks shows in the last of a double's."""
    match value:
        case float():
            return float(f'{value:.6g}')
        case dict():
            return {str(key): rounded(inner) for key, inner in value.items()}
        case list() | tuple():
            return [rounded(inner) for inner in value]
    return value


def tell(rows: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        info('  '.join(map(str.ljust, row, widths)).rstrip())


@resources.program
def main(args: argparse.Namespace) -> None:
    """Compute, or read, and show."""
    what = WHATS[args.what]
    if not args.from_json:
        config.check_apart('output_dir', args.output_dir, args.data_path, args.dataset)
    with writing(args.output_dir):
        args.output_dir.mkdir(parents=True, exist_ok=True)
    if args.from_json:
        result = joined(args.what, args.from_json)
    else:
        args = argparse.Namespace(**vars(args) | FIXED)
        arguments = {name: value for name, value in config.plain(args).items() if name not in PLACES}
        result = rounded({'what': args.what, 'arguments': arguments} | what.compute(args))
    if dist.is_main():
        show(what, result, args.output_dir / args.what, again=bool(args.from_json))


def show(what: What, result: dict, path: Path, again: bool) -> None:
    """Write the numbers, unless they are shown again, print the table, and draw."""
    with writing(path.parent):
        if not again:
            digests.replace(path.with_suffix('.json'), json.dumps(result, indent=1).encode())
            info(f'numbers in {path}.json')
        tell(what.table(result))
        try:
            what.figure(result, path.with_suffix('.png'))
            info(f'figure in {path}.png')
        except ImportError:
            info('no figure: matplotlib is not installed; pip install matplotlib, then --from_json draws one')


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Raise UserError for what is no folder, and StorageError for what cannot be written to one."""
    try:
        yield
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f'--output_dir {folder}: a file is in its place') from error
    except OSError as error:
        raise StorageError(f'cannot write to {folder}: {error.strerror or error}') from error


if __name__ == '__main__':
    run_main(lambda: main(get_args_parser().parse(stage='finetune')))
