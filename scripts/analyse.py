"""Study what networks have learnt: one analysis of up to eight of them, as numbers, a table and figures.

Examples:
    python scripts/analyse.py knn --data_path /data/imagenet --checkpoint ours=runs/a/checkpoint-last.pth random
    python scripts/analyse.py knn --layers all --data_path ... --checkpoint a.pth mae=mae.pth,model=mirl_vit_base
    python scripts/analyse.py fourier --data_path ... --checkpoint a.pth b.pth random --output_dir runs/analysis
    python scripts/analyse.py fourier --from_json runs/a/fourier.json runs/b/fourier.json --output_dir runs/both
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from util import start  # noqa: F401

# isort: split
import argparse
import json
import re
from functools import partial
from types import ModuleType

from torch import nn

import main_finetune
from util import agreement, build, checkpoint, config, digests, dist, resources
from util.data import datasets, named
from util.errors import CheckpointError, UserError, run_main
from util.log import info
from util.studies import attention, cka, fourier, interactions, knn, occlusion
from util.studies.common import OF_FILE, Job, Network, writing
from util.weights import Report, check_finite, file_of, load_published

STUDIES = {
    module.__name__.rpartition('.')[2]: module for module in (knn, interactions, fourier, cka, attention, occlusion)
}
MOST = 8  # networks in a table
COUNTS = {'images', 'pairs', 'contexts'}  # of results, that their titles tell
RANDOM = 'random'
TAKEN = (  # of fine-tuning's flags
    *('model', 'model_kwargs', 'input_size', 'crop_pct', 'mean', 'std', 'max_pixels', 'device', 'seed', 'batch_size'),
    *('data_path', 'dataset', 'download', 'val_share', 'num_workers', 'pin_mem', 'bad_images', 'max_bad_images'),
    *('data_retries', 'output_dir', 'dist_url', 'dist_timeout'),
)
FIXED = dict(  # fine-tuning's other arguments
    eval=True, eval_size=None, eval_logits='all', nb_classes=None, drop_path=0.0, amp_dtype='none', channels_last=False
)
PLACES = {'what', 'given', 'from_json', 'save_features', 'output_dir', 'download', 'device', 'num_workers', 'pin_mem'}
PLACES |= {'data_retries', 'dist_url', 'dist_timeout', *FIXED}  # arguments on which no number depends


def get_args_parser(what: str | None = None) -> config.Parser:
    """Flags that all studies share, and those of the study `what`."""
    finetune = main_finetune.get_args_parser()
    parser = config.Parser(__doc__, other='main_finetune', usage='%(prog)s WHAT --checkpoint ... [--FLAG VALUE ...]')
    about = '; '.join(study.HELP for study in STUDIES.values())
    parser.add_argument('what', choices=STUDIES, metavar='WHAT', help=f'{about}; WHAT --help has the flags of each')
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
    sizes = ', '.join(f'{count or "all"} of {name}/' for name, count in STUDIES[what].SPLITS.items()) if what else ''
    add(
        '--images',
        type=config.number(int, 2),
        help='most images of each split, evenly from all classes, drawn from --seed; default: ' + (sizes or 'by WHAT'),
    )
    add('--from_json', nargs='+', type=config.path, default=[], metavar='JSON', help='draw these results, compute none')
    parser.take(finetune, *TAKEN)
    if what:
        STUDIES[what].add_flags(partial(parser.add_argument, heading=what))
        parser.set_defaults(**getattr(STUDIES[what], 'DEFAULTS', {}))
    if '--feature' not in parser.flags:  # which takes its place
        parser.take(finetune, 'global_pool')
    return parser


def parsed(argv: list[str]) -> argparse.Namespace:
    """The arguments. WHAT comes first, since it decides which flags there are."""
    what = argv[0] if argv and argv[0] in STUDIES else None
    parser = get_args_parser(what)
    flags = [config.underscored(word).partition('=')[0] for word in argv if what and word.startswith('--')]
    for flag in [flag for flag in flags if flag not in parser.flags]:
        if others := [name for name in STUDIES if flag in get_args_parser(name).flags]:
            raise UserError(f'{flag} is a flag of {" and ".join(others)}, not of {what}')
    args = parser.parse(argv, stage='finetune')
    if not what:
        raise UserError(f'{args.what} comes first: analyse.py {args.what} --checkpoint ...')
    if args.from_json and args.checkpoint:
        raise UserError('--from_json draws what was computed, --checkpoint computes: give one of them')
    if not args.from_json:
        check_names(args)
    return args


def check_names(args: argparse.Namespace) -> None:
    """Raise UserError for no checkpoints, too many, or two of one name."""
    if not 1 <= len(args.checkpoint) <= MOST:
        raise UserError(f'--checkpoint takes 1 to {MOST} checkpoints, got {len(args.checkpoint)}')
    names = [parts(text)[0] for text in args.checkpoint]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f'--checkpoint: there are two named {twice[0]}; --checkpoint NAME=PATH names them')


# --------------------------------------------------------------------------
# networks and images


def networks(args: argparse.Namespace, classes: int) -> list[Network]:
    """Those of --checkpoint. Raises UserError before anything is computed."""
    found, before, of_before = [], checkpoint.Source('', {}), {}
    for text in args.checkpoint:
        name, path, options = parts(text)
        if path != RANDOM:
            before, of_before = checkpoint.Source.read(path), options
        elif 'model' not in options:
            options = of_before | options
        own = with_options(args, options, text)
        found.append(network(name, path, before, own, classes))
    if STUDIES[args.what].NEEDS_HEAD:
        for of_file in found:
            check_head(of_file, args.what)
    return found


def check_head(network: Network, what: str) -> None:
    """Raise UserError where the answers of a file's network would be those of random weights."""
    if network.path != RANDOM and not network.trained_head:
        raise UserError(
            f'{what} needs a classifier: {network.name} has no trained head; fine-tune it, or train a linear probe '
            f'on it: main_finetune.py --finetune {network.path}'
        )


def described_checkpoint(text: str) -> str:
    """The type of --checkpoint: a text of which `parts` can make something."""
    name, equals, path = parts(text)[1].partition('=')
    if equals and Path(path).exists() and not Path(f'{name}={path}').exists():
        raise UserError(f'--checkpoint {text}: a name is without / , : and #')
    return text


def parts(text: str) -> tuple[str, str, dict[str, str]]:
    """The name, the path and the options of `[NAME=]PATH[,KEY=VALUE ...]`."""
    name, path, options = re.fullmatch(r'(?:([^=/,:#]+)=)?(.*?)((?:,\w+=[^,]*)*)', text, re.DOTALL).groups()
    path = config.source(path)
    name = name or '/'.join(Path(path.partition('#')[0]).with_suffix('').parts[-2:])
    return name, path, dict(option.split('=', 1) for option in options.split(',')[1:])


def with_options(args: argparse.Namespace, options: dict[str, str], text: str) -> argparse.Namespace:
    """The arguments with what one checkpoint has of its own: flags of the network, and options of its model."""
    parser, given, words = get_args_parser(args.what), {}, []
    for key, value in options.items():
        flag = parser.flags.get(f'--{key}')
        if flag and flag.dest in parser.of_network:
            given[flag.dest] = config.converted(flag, key, in_yaml(flag, value), f'--checkpoint {text}: {key}')
        else:
            words.append(f'{key}={value}')
    own = argparse.Namespace(**vars(args) | given | {'given': sorted({*args.given, *given})})
    parser.of_network['model_kwargs'](None, own, words, f'--checkpoint {text}')
    return own


def in_yaml(flag: argparse.Action, value: str) -> str | bool | list[str]:
    """A value as a recipe would have it: `cls_token=true`, `mean=0.5 0.5 0.5`."""
    if isinstance(flag, config.Switch):
        return {'true': True, 'false': False}.get(value, value)
    return value.split() if flag.nargs else value


def network(name: str, path: str, source: checkpoint.Source, args: argparse.Namespace, classes: int) -> Network:
    """A network of a file; or with random weights, and then as the file before it for all that no flag gives."""
    if path == RANDOM and not (args.model or source.origin):
        raise UserError(f'--checkpoint {RANDOM}: of which network? give --model NAME, or {RANDOM},model=NAME')
    source.notices.clear()
    args = settings(source, args)
    classes_of_file = (source.origin and source.origin.classes) or None
    outputs = len(classes_of_file or []) or classes
    if path == RANDOM:
        args.probe = None
        core, digest, trained = main_finetune.checked_classifier(args, outputs), None, False
        told = [f'{args.model}, random weights of --seed {args.seed}']
    else:
        with source.expected(args):
            core, report = loaded(source, args, outputs)
        digest = path.partition('#sha256=')[2] or digests.sum_of(file_of(path))
        trained = not main_finetune.lacks_head(core, report)
        told = [str(report), *source.notices]
    for line in told:
        info(f'{name}: {line}')
    core.eval().requires_grad_(False)  # with parameters that a network hands on, FLOPs could not be counted
    return Network(name, path.partition('#')[0], digest, args, core, told[0], classes_of_file, trained)


def settings(source: checkpoint.Source, args: argparse.Namespace) -> argparse.Namespace:
    """The arguments of a network, completed by its file."""
    given = args.model_kwargs
    if source.path:
        args = source.complete(args, get_args_parser(args.what), (*OF_FILE, 'global_pool'))
    if source.origin and source.origin.stage in ('pretrain', 'segment', 'detect'):
        method = main_finetune.find_method(args.model)
        args.model_kwargs = build.encoder_kwargs(method, args.model, args.model_kwargs, source.origin.stage) | given
    if 'feature' in args:
        args.global_pool = args.feature == 'pooled'
    args.probe = source.origin.args.get('probe') if source.origin else None  # fine-tuning's flag
    return args


def loaded(source: checkpoint.Source, args: argparse.Namespace, outputs: int) -> tuple[nn.Module, Report]:
    """The classifier with the weights of a file; where its answers count, with as many outputs as the file has.

    Raises UserError for a file that has a head, but lacks other weights that lead to it.
    """
    load = partial(load_published, source=source.container, ema=args.use_ema, label=source.path)
    core = main_finetune.checked_classifier(args, outputs)
    report = load(core)
    needs_head = STUDIES[args.what].NEEDS_HEAD
    if needs_head and (other := main_finetune.other_head(core, report)):
        core = main_finetune.checked_classifier(args, other)
        report = load(core)
    finite(core, source.path)
    if needs_head and report.missing and not main_finetune.lacks_head(core, report):
        of_token = any(key.startswith('fc_norm.') for key in report.missing)
        hint = '; is its head that of the class token? then cls_token=true behind its path' if of_token else ''
        raise UserError(f'{args.what} needs all weights of a classifier: {report}{hint}')
    return core, report


def finite(core: nn.Module, path: str) -> None:
    """Raise CheckpointError for weights from which no number can be computed."""
    try:
        check_finite(core.state_dict())
    except CheckpointError as error:
        raise CheckpointError(f'{path}: {error}') from error


def images(args: argparse.Namespace) -> dict[str, datasets.Split]:
    """The images of each split that the study reads, as --images and --max_per_class have them."""
    sizes = STUDIES[args.what].SPLITS
    found = {}
    for name, whole in zip(sizes, named.labelled_splits(args, tuple(sizes)), strict=True):
        per_class = vars(args).get('max_per_class') if name == 'train' else None
        choose = getattr(STUDIES[args.what], 'choose', None)  # a study may have its own way
        most = args.images or sizes[name]
        alone = len(sizes) == 1  # else training and validation images are of the same classes
        split = choose(whole, args) if choose else named.some(whole, args.seed, most, per_class, draw_classes=alone)
        if len(split.images) < len(whole.images):
            notes = '; '.join([*split.notes, f'{len(split.images)} of these images are taken'])
            split = split._replace(notes=[notes])
        found[name] = split
    return found


def ready(args: argparse.Namespace) -> Job:
    """The device, the networks and the images, once all is checked and the ranks have met."""
    dist.own_device(args.device)
    splits = images(args)
    found = networks(args, len(next(iter(splits.values())).classes))
    device = dist.init(args.device, args.dist_url, args.dist_timeout)
    agreement.check(args, device, **splits)
    for split in splits.values():
        for line in split.notes:
            info(line)
    return Job(args, device, found, splits)


# --------------------------------------------------------------------------
# results


def joined(what: str, files: list[Path]) -> dict:
    """The results of several files in one; names that they share get that of their folder."""
    results, headers = [], []
    for file in files:
        try:
            results.append(json.loads(file.read_bytes()))
            if results[-1]['what'] != what:
                raise UserError(f'--from_json {file} has results of {results[-1]["what"]}, not of {what}')
            if not results[-1]['checkpoints']:
                raise ValueError
            headers.append(STUDIES[what].table(results[-1])[0])
        except OSError as error:
            raise UserError(f'--from_json {file}: {error.strerror}') from error
        except (ValueError, LookupError, TypeError) as error:
            raise UserError(f'--from_json {file}: not a file that this program wrote') from error
    if len(files) == 1:
        return results[0]
    if what == 'cka':
        raise UserError('--from_json: cka compares the networks of one file; give one')
    for file, header in zip(files, headers, strict=True):
        if header != headers[0]:
            differing = ' and '.join(', '.join(columns) for columns in (headers[0], header))
            raise UserError(f'--from_json: {files[0]} and {file} have other columns: {differing}')
    names = [of['name'] for result in results for of in result['checkpoints']]
    if len(names) > MOST:
        raise UserError(f'--from_json: {len(names)} networks; a figure takes {MOST}')
    for result, folder in zip(results, told_apart(files), strict=True):
        for of in result['checkpoints']:
            of['name'] += f' ({folder})' if names.count(of['name']) > 1 else ''
    numbers = {key: either([result.get(key) for result in results]) for key in results[0].keys() & COUNTS}
    return results[0] | numbers | {'checkpoints': [of for result in results for of in result['checkpoints']]}


def told_apart(files: list[Path]) -> list[str]:
    """The files by the names of their folders, or by as much more as they need."""
    for name in (lambda file: file.parent.name, lambda file: str(file.parent), str):
        if len(set(names := [name(file) for file in files])) == len(files):
            return names
    raise UserError('--from_json: a file is given twice')


def either(values: list) -> object:
    """Numbers of several results as a title tells them: those that differ are `120 or 500`."""
    if isinstance(values[0], dict):
        return {key: either([value[key] for value in values]) for key in values[0]}
    different = list(dict.fromkeys(values))
    return ' or '.join(map(str, different)) if len(different) > 1 else different[0]


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
    study = STUDIES[args.what]
    if not args.from_json:
        config.check_apart('output_dir', args.output_dir, args.data_path, args.dataset)
    with writing(args.output_dir):
        args.output_dir.mkdir(parents=True, exist_ok=True)
    if args.from_json:
        result = joined(args.what, args.from_json)
    else:
        args = argparse.Namespace(**vars(args) | FIXED)
        arguments = {name: value for name, value in config.plain(args).items() if name not in PLACES}
        result = rounded({'what': args.what, 'arguments': arguments} | study.compute(ready(args)))
        dist.cleanup()
    if dist.is_main():
        show(study, result, args.output_dir / args.what, again=bool(args.from_json))


def show(study: ModuleType, result: dict, path: Path, again: bool) -> None:
    """Write the numbers, unless they are shown again, print the table, and draw."""
    with writing(path.parent):
        if not again:
            digests.replace(path.with_suffix('.json'), json.dumps(result, indent=1).encode())
            info(f'numbers in {path}.json')
        tell(study.table(result))
        try:
            study.draw(result, path.with_suffix('.png'))
            info(f'figure in {path}.png')
        except (LookupError, TypeError, ValueError) as error:
            if not again:
                raise
            raise UserError('--from_json: numbers are missing there; no figure can be drawn') from error
        except ImportError:
            info('no figure: matplotlib is not installed; pip install matplotlib, then --from_json draws one')


if __name__ == '__main__':
    run_main(lambda: main(parsed(sys.argv[1:])))
