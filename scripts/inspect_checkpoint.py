"""Tell what a checkpoint is, whoever wrote it, and the commands that use it.

Examples:
    python scripts/inspect_checkpoint.py runs/NAME/checkpoint-last.pth
    python scripts/inspect_checkpoint.py https://host/mae_pretrain_vit_base.pth#sha256=...
    python scripts/inspect_checkpoint.py --json exported
"""

import argparse
import itertools
import json
import math
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import main_finetune
import main_pretrain
from scripts import finetune_detection, finetune_segmentation
from util import checkpoint, config, console, digests, resources
from util.errors import PROGRAMS, CheckpointError, UserError, listed, printable, program, run_main
from util.log import counted
from util.recipes import recipes_for
from util.resources import size
from util.weights import OtherFormatError, Report, file_of, is_detection, is_paddle, is_segmentation, load_published

SIZES = (224, 192, 384, 64, 32)  # image sides to try where no table of positions tells
MANY_HEADS = (12, 8, 6, 4, 3, 2, 1)  # numbers of attention heads to guess from
DATA = '/data/imagenet'
MAINS = {
    'pretrain': main_pretrain,
    'finetune': main_finetune,
    'segment': finetune_segmentation,
    'detect': finetune_detection,
}
DENSE = {'segment': (512, '/data/ade20k'), 'detect': (1024, '/data/coco')}  # usual image side, and where data may lie


def get_args_parser() -> config.Parser:
    parser = config.Parser(__doc__)
    parser.add_argument('checkpoint', type=config.source, help='a file of any origin, an export, or a URL#sha256=...')
    parser.add_argument('--json', action=config.Switch, help='print one JSON object')
    return parser


@resources.program
def main(args: argparse.Namespace) -> None:
    """Read, try our models, print."""
    source, file = checkpoint.Source.read(args.checkpoint), file_of(args.checkpoint)
    weights, error = tensors_of(source.container), None
    matches = []
    if weights:
        matches, error = own_match(source) if source.origin else matches_of(source, weights)
    facts = {'file': about_file(file, source, weights), **about(source, matches), 'holds': contents(source.container)}
    if not matches:
        facts['weights'] = [f'{printable(key, 80)} {list(value.shape)}' for key, value in list(weights.items())[:20]]
    commands = {}
    if matches:
        commands = commands_for(args.checkpoint, source, matches[0])
    if args.json:
        console.say(json.dumps({'checkpoint': args.checkpoint} | facts | {'commands': commands}, indent=2))
    else:
        console.say('\n'.join(text(args.checkpoint, facts, commands)))
    if not matches:
        reason = str(error).removeprefix(f'{source.path}: ') if error else 'there are no weights in it'
        if isinstance(error, OtherFormatError):
            reason = 'its keys are of no format that is known'
        raise UserError(f'{source.path} is for no model of this program: {reason}')


def text(path: str, facts: dict, commands: dict[str, str]) -> Iterator[str]:
    """The lines to print."""
    yield printable(path)
    for name, fact in facts.items():
        first, *others = fact if isinstance(fact, list) else [fact]
        yield f'  {name:<10} {first}'
        yield from (f'  {"":<10} {other}' for other in others)
    for what, command in commands.items():
        yield f'\n# {what}\n{command}'


# --------------------------------------------------------------------------
# what is in a file


def is_tensor(value: object) -> bool:
    return isinstance(value, Tensor | np.ndarray) and bool(value.shape)


def dicts_of(container: dict, depth: int = 3) -> Iterator[tuple[str, dict]]:
    """The container and the dicts in it, with their names."""
    yield '', container
    if depth:
        for key, value in container.items():
            if isinstance(value, dict):
                yield from (
                    ('.'.join(filter(None, (str(key), name))), inner) for name, inner in dicts_of(value, depth - 1)
                )


def tensors_of(container: dict) -> dict[str, Tensor | np.ndarray]:
    """Of all the dicts in a file, the one with most tensors."""
    found = [{str(key): x for key, x in inner.items() if is_tensor(x)} for _, inner in dicts_of(container)]
    return max(found, key=len)


def contents(container: dict) -> list[str]:
    """A line for every part that has numbers, and one that names the others."""
    parts = {printable(key, 80): tensors_in(value) for key, value in container.items() if isinstance(value, dict)}
    parts[''] = [x for x in container.values() if is_tensor(x)]
    counts = {
        name: (counted(len(part), 'tensor'), sum(math.prod(x.shape) for x in part))
        for name, part in parts.items()
        if part
    }
    lines = [f'{name}{": " * bool(name)}{tensors}, {numbers:,} numbers' for name, (tensors, numbers) in counts.items()]
    others = [key for key, x in container.items() if not isinstance(x, dict) and not is_tensor(x) and key != 'classes']
    return lines + ([f'and {listed(others, 12, 80)}'] if others else [])


def tensors_in(container: dict) -> list[Tensor | np.ndarray]:
    return [x for _, inner in dicts_of(container) for x in inner.values() if is_tensor(x)]


def about_file(file: Path, source: checkpoint.Source, weights: dict) -> str:
    """Kind, size and SHA-256. A file that does not agree with the sum beside it has not been read."""
    kind = 'safetensors' if file.suffix == '.safetensors' else 'torch'
    if any(isinstance(value, np.ndarray) for value in weights.values()):
        kind = 'Paddle' if is_paddle(weights) else 'pickled arrays'
    beside = digests.beside(file)
    agrees = f', as in {printable(beside.name)}' if beside.exists() else ', with no sum beside it'
    return f'{kind}, {size(file.stat().st_size)}, SHA-256 {digests.sum_of(file)}{agrees}'


# --------------------------------------------------------------------------
# which of our models it is for


class Match(NamedTuple):
    """A model that a checkpoint fills, in every weight that it is to have from a file."""

    args: argparse.Namespace  # model, model_kwargs, input_size, global_pool, use_ema and all defaults
    model_kwargs: dict  # of the classifier
    report: Report
    num_classes: int  # 0: neither classifier nor segmenter nor detector
    decoder: bool  # whether it fills the pretraining model, too
    parameters: int  # of the network without decoder
    note: str = ''
    task: str = ''  # of DENSE


def task_of(container: dict) -> str:
    """Which of DENSE a file's network is for, or ''."""
    if is_segmentation(container):
        return 'segment'
    return 'detect' if is_detection(container) else ''


def defaults(task: str = '', **given) -> argparse.Namespace:
    """The arguments of both mains, or of a dense task's, as if nothing but this was given."""
    mains = (MAINS[task],) if task in DENSE else (main_pretrain, main_finetune)
    known = [vars(main.get_args_parser().parse([])) for main in mains]
    return argparse.Namespace(**known[0] | known[-1] | given)


def own_match(source: checkpoint.Source) -> tuple[list[Match], UserError | None]:
    """The model that a checkpoint of ours names."""
    parser = MAINS[source.origin.stage].get_args_parser()
    try:
        return [match(source, source.complete(defaults(source.origin.stage), parser))], None
    except UserError as error:
        return [], error


def matches_of(source: checkpoint.Source, weights: dict) -> tuple[list[Match], UserError | None]:
    """All models by name that a file of others fills; where there is none, what its shapes tell of a ViT's sizes.

    The error is of the model that differs in the fewest keys. Models are built without storage; where the first of a
    family is of another format, the others are not tried.
    """
    names = [name for method in main_pretrain.METHODS for name in method.__all__]
    families = [list(group) for _, group in itertools.groupby(names, lambda n: re.match(r'[a-z0-9]+_[a-z]+', n)[0])]
    found, errors, known = [], [], sizes_of_positions(weights) or SIZES
    options, heads, task = [{}], {}, task_of(source.container)
    if task == 'segment':
        known, options = sizes_of_positions(weights) or (512,), [{}, heads_of(weights)]
    elif task == 'detect':
        known, heads = (1024,), detector_heads(weights)
    rounds = [[defaults(task, input_size=size, model_kwargs=kwargs, **heads) for size in known] for kwargs in options]
    for family in families:
        for name in family:
            for choices in rounds:
                choices = [argparse.Namespace(**vars(args) | {'model': name}) for args in choices]
                fitting, error = first_fit(source, choices)
                if fitting or 'encoder.' in str(error):  # where the heads alone differ, their options are tried
                    break
            found += fitting
            errors += [error] if error else []
            if isinstance(error, OtherFormatError):
                break
    if not found and task != 'segment' and (options := vit_options(weights)):
        for family in families:
            if '_vit' in family[0]:
                args = defaults(task, model=family[0], input_size=known[0], model_kwargs=options, **heads)
                found += [
                    m._replace(note='num_heads is a guess, which no file tells') for m in first_fit(source, [args])[0]
                ]
    found.sort(key=lambda m: (bool(m.report.resized), not m.decoder))
    return found, min(errors, key=differing, default=None)


def first_fit(source: checkpoint.Source, choices: list[argparse.Namespace]) -> tuple[list[Match], UserError | None]:
    """The first of the choices of size that fits, one that resizes nothing if there is one; or why none does."""
    fitting, refused = [], None
    for args in choices:
        try:
            fitting.append(match(source, args))
        except CheckpointError as error:  # at another size as well
            return fitting[:1], error
        except UserError as error:  # the model cannot have this size
            refused = refused or error
        if fitting and not fitting[-1].report.resized:
            return fitting[-1:], None
    return fitting[:1], None if fitting else refused


def differing(error: UserError) -> int:
    """How many keys an error says to differ."""
    count = re.search(r'differing keys \((\d+)\)', str(error))
    return int(count[1]) if count else 10**9


def match(source: checkpoint.Source, args: argparse.Namespace) -> Match:
    """Raises CheckpointError if the file does not fill this model, another UserError if there is no such model."""
    if task := task_of(source.container):
        return segmenter_match(source, args) if task == 'segment' else detector_match(source, args)
    try:
        with torch.device('meta'):
            network, report, kwargs, num_classes = main_finetune.network_of(source, args)
    except UserError as error:
        options = {'averaged weights alone': {'use_ema': True}, 'has no classifier': {'global_pool': False}}
        other = next((flag for words, flag in options.items() if words in str(error)), {})
        if not other or vars(args) == vars(args) | other:
            raise
        return match(source, argparse.Namespace(**vars(args) | other))
    parameters = sum(p.numel() for p in network.parameters())
    with_decoder = None if num_classes else pretraining_args(source, args)
    return Match(with_decoder or args, kwargs, report, num_classes, bool(with_decoder), parameters)


def segmenter_match(source: checkpoint.Source, args: argparse.Namespace) -> Match:
    """The same of a segmenter."""
    classes = next(
        len(x) for key, x in tensors_of(source.container).items() if key.endswith('decode_head.conv_seg.bias')
    )
    with torch.device('meta'), source.expected(args):
        network = finetune_segmentation.create_segmenter(args, classes)
        report = load_published(network, source.container, ema=args.use_ema, label=source.path)
    parameters = sum(p.numel() for p in network.parameters())
    unknown = network.pyramid is not None and not source.origin
    note = 'which blocks give maps, and how the last is pooled, no file tells' * unknown
    return Match(args, args.model_kwargs, report, classes, False, parameters, note, 'segment')


def detector_match(source: checkpoint.Source, args: argparse.Namespace) -> Match:
    """The same of a detector."""
    scores = next((x for key, x in tensors_of(source.container).items() if key.endswith('cls_score.bias')), [0, 0])
    with torch.device('meta'), source.expected(args):
        network = finetune_detection.create_detector(args, len(scores) - 1)
        report = load_published(network, source.container, ema=args.use_ema, label=source.path)
    parameters = sum(p.numel() for p in network.parameters())
    return Match(args, args.model_kwargs, report, len(scores) - 1, False, parameters, task='detect')


def detector_heads(weights: dict) -> dict[str, str | int]:
    """A detector's flags by the names of its heads' weights, detectron2's or ours."""

    def count(pattern: str) -> int:
        return len([key for key in weights if re.search(pattern, key)])

    sizes, theirs = sizes_of_positions(weights), count(r'(^|\.)backbone\.net\.')
    return {
        'box_head': '4conv1fc' if count(r'box_head\.(conv4|3\.0)\.weight$') else '2fc',
        'norm': 'ln' if count(r'box_head\.(conv4\.norm|3\.1)\.weight$') else 'none',
        'rpn_depth': max(1, count(r'rpn_head\.conv\.conv\d\.weight$|rpn\.head\.conv\.\d\.0\.weight$')),
        'box_only': not count(r'roi_heads\.mask_'),
        **({'pretrain_size': sizes[0]} if sizes else {}),
        **({'test_size': 1024, 'max_size': 1024} if theirs else {}),  # as ViTDet is tested
    }


def heads_of(weights: dict) -> dict[str, str | int | bool]:
    """A segmenter's options by the shapes of its heads' weights."""

    def width(pattern: str) -> int | None:
        return next((len(x) for key, x in weights.items() if re.search(pattern, key)), None)

    uper = width(r'decode_head\.fpn_bottleneck\.conv\.weight')
    channels = {'channels': uper or width(r'decode_head\.conv_cat\.conv\.weight')}
    channels['aux_channels'] = width(r'auxiliary_head\.convs\.0\.conv\.weight')
    kwargs = {'head': 'uper' if uper else 'fcn'} | {name: value for name, value in channels.items() if value}
    return kwargs | ({'deep_stem': True} if width(r'\.stem\.7\.weight') else {})


def pretraining_args(source: checkpoint.Source, args: argparse.Namespace) -> argparse.Namespace | None:
    """The arguments with which the file fills the pretraining model; None if it does not, as if it has no decoder."""
    for _ in range(2):
        try:
            with torch.device('meta'):
                load_published(main_pretrain.create_model(args), source.container, ema=args.use_ema)
            return args
        except UserError as error:
            advice = re.search(r'pass --model_kwargs (\w+)=(\d+)', str(error))
            if not advice:
                return None
            options = args.model_kwargs | {advice[1]: int(advice[2])}
            args = argparse.Namespace(**vars(args) | {'model_kwargs': options})
    return None


def sizes_of_positions(weights: dict) -> tuple[int, ...]:
    """The image side that a table of positions is for, if there is one beside a patch projection."""
    patch = next((x.shape[-1] for key, x in weights.items() if 'patch' in key and len(x.shape) == 4), 0)
    tables = [
        x.shape[1]
        for key, x in weights.items()
        if key.endswith(('pos_embed', 'position_embeddings')) and len(x.shape) == 3
    ]
    sides = [math.isqrt(length) for length in tables]
    return tuple(
        {side * patch: None for side, length in zip(sides, tables, strict=True) if length - side**2 < 2 and patch}
    )


def vit_options(weights: dict) -> dict[str, int | float]:
    """Sizes of a ViT by the shapes of its weights."""
    mark = next((key for key in weights if key.endswith('patch_embed.proj.weight')), '')
    prefix = mark.removesuffix('patch_embed.proj.weight')
    depth = len({m[1] for key in weights if (m := re.match(re.escape(prefix) + r'blocks\.(\d+)\.', key))})
    hidden = weights.get(f'{prefix}blocks.0.mlp.fc1.bias')
    if not mark or not depth or hidden is None:
        return {}
    width, ratio = weights[mark].shape[0], hidden.shape[0] / weights[mark].shape[0]
    heads = next(count for count in MANY_HEADS if width % count == 0)
    return dict(patch_size=weights[mark].shape[-1], embed_dim=width, depth=depth, num_heads=heads, mlp_ratio=ratio)


# --------------------------------------------------------------------------
# what to tell, and the commands


def about(source: checkpoint.Source, matches: list[Match]) -> dict[str, str | list[str]]:
    """Whose it is, and the networks that it fills."""
    facts, origin, known = {}, source.origin, source.container
    if origin:
        tuning = 'linear probe' if origin.args.get('probe') else 'fine-tuning'
        kinds = {'pretrain': 'pretraining', 'segment': 'segmentation', 'detect': 'detection'}
        kind = kinds.get(origin.stage, tuning)
        facts['origin'] = f'{kind} of this program: {origin}'
        if isinstance(known.get('epoch'), int) and isinstance(known.get('step'), int):
            done = f'{known["step"]} of {known.get("steps")} steps of it done'
            facts['position'] = f'epoch {known["epoch"]}, counted from 0, of {origin.args.get("epochs")}; {done}'
    if not matches:
        return facts
    first, several = matches[0], ['any of these; the commands are for the first'] if len(matches) > 1 else []
    method = main_pretrain.find_method(first.args.model)
    facts['format'] = f'{first.report.format}' + (', with a decoder' if first.decoder else '')
    facts['method'] = (method.__doc__ or method.__name__).partition('\n')[0]
    facts['network'] = several + [network(match) for match in matches]
    if origin:
        scale = {name: getattr(first.args, name) for name in ('mean', 'std')}
        facts['images'] = config.as_flags(scale)
    if first.num_classes:
        names = source.classes or []
        facts['classes'] = f'{first.num_classes}: {listed(names, 10) or "without names"}'
    if recipes := [r for stage in PROGRAMS for r in recipes_for(first.args.model, stage)]:
        facts['recipes'] = [Path(recipe).stem for recipe in recipes]
    return facts


def network(match: Match) -> str:
    """A line: name, options, sizes."""
    flags = config.as_flags(model_flags(match, match.args.model_kwargs, False)).removeprefix('--model ')
    note = match.note or (f'{counted(len(match.report.resized), "table")} resized' if match.report.resized else '')
    return f'{flags}, {match.parameters / 1e6:.1f} M parameters, {match.args.input_size} pixels' + f' ({note})' * bool(
        note
    )


def model_flags(match: Match, model_kwargs: dict, with_size: bool = True) -> dict:
    """The flags that make a network, less those that have their default."""
    flags = {'model': match.args.model} | ({'model_kwargs': model_kwargs} if model_kwargs else {})
    usual, _ = DENSE.get(match.task, (224, ''))
    if match.task == 'detect':
        parser = finetune_detection.get_args_parser()
        names = sorted(parser.of_network.keys() - {'model', 'model_kwargs', 'input_size', 'mean', 'std'})
        flags |= {n: value for n in names if (value := getattr(match.args, n)) != getattr(parser.parse([]), n)}
    return flags | ({'input_size': match.args.input_size} if with_size and match.args.input_size != usual else {})


def commands_for(path: str, source: checkpoint.Source, match: Match) -> dict[str, str]:
    """{what for: command}, of those that this file is for."""
    own, args = source.origin, match.args
    _, usual = DENSE.get(match.task, (224, DATA))
    data = data_of(own.args) if own else {'data_path': usual}
    where = Path(source.path).resolve()
    name = where.parent.name if own and where.is_file() else where.stem
    fresh = model_flags(match, match.model_kwargs)  # no model is taken from a file by a training
    pool = {} if own or getattr(args, 'global_pool', True) else {'global_pool': False}
    known = {} if own else fresh | ({'use_ema': True} if args.use_ema else {})
    answers = {} if own or not match.num_classes else pool | {'nb_classes': match.num_classes}

    def line(program: str, output: str = '', *words: str, **flags) -> str:
        flags |= {'output_dir': f'runs/{name}_{output}'} if output else {}
        return shlex.join(['python', *program.split(), *words, *config.as_words(flags)])

    if match.task == 'detect':
        words = 'scripts/finetune_detection.py'
        predict = line(words, 'found', predict='photo.jpg', resume=path, **known)
        return {
            'evaluate it': line(f'{words} --eval', 'eval', resume=path, **known, **data),
            **({'find objects in pictures with it': predict} if source.classes else {}),  # which it draws by name
            'train it for other classes': line(words, 'detect', **fresh, finetune=path, **data),
        } | going_on(path, source)
    if match.task == 'segment':
        words, whole = 'scripts/finetune_segmentation.py', known | answers
        return {
            'evaluate it': line(f'{words} --eval', resume=path, **whole, **data),
            'label pictures with it': line(words, 'labels', predict='photo.jpg', resume=path, **whole),
            'train it for other classes': line(words, 'segment', **fresh, finetune=path, **data),
        } | going_on(path, source)
    tune = fresh | pool | {'finetune': path} | ({'finetune_ema': True} if args.use_ema else {}) | data
    commands = {
        'fine-tune it': line('main_finetune.py', 'finetune', **tune),
        'train a linear layer on it, frozen': line('main_finetune.py --probe linear', 'probe', **tune),
        'look at nearest neighbours': line('scripts/analyse.py knn', 'knn', checkpoint=path, **known, **data),
        'hand it on': line('scripts/export.py', '', path, f'runs/{name}_export', **known, **answers),
    }
    if match.num_classes:
        evaluate = line('main_finetune.py --eval', resume=path, **known, **answers, **data)
        commands = {'evaluate it': evaluate} | commands
    if match.decoder:
        whole = model_flags(match, args.model_kwargs)
        pictures = str(data['data_path']) if 'dataset' not in data else 'photo.jpg'
        drawn = {} if own else known | whole
        begin = whole | {'init': path} | ({'init_ema': True} if args.use_ema else {}) | data
        commands['draw what it reconstructs'] = line('scripts/visualize.py', '', pictures, checkpoint=path, **drawn)
        commands['start a new pretraining from it'] = line('main_pretrain.py', 'pretrain', **begin)
    return commands | going_on(path, source)


def data_of(args: dict) -> dict[str, str]:
    """The flags of a run's data."""
    names = ('data_path', 'dataset', 'val_share', 'train_json', 'train_images', 'val_json', 'val_images')
    given = {name: args.get(name) for name in names}
    known = {name: str(value) for name, value in given.items() if value not in (None, 'folder', 'coco')}
    return known or {'data_path': DATA}


def going_on(path: str, source: checkpoint.Source) -> dict[str, str]:
    """The command that resumes a run of our own that is not done, with the flags and recipe's values that it had."""
    known, origin = source.container, source.origin
    if not origin or not all(isinstance(known.get(key), kind) for key, kind in checkpoint.STATE.items()):
        return {}
    if known['step'] == known['steps'] and known['epoch'] + 1 == origin.args.get('epochs') and known.get('closed'):
        return {}
    names = MAINS[origin.stage].get_args_parser().roles.keys() & {*origin.args.get('given', ())} - {'config', 'given'}
    then = {name: origin.args[name] for name in sorted(names) if origin.args.get(name) is not None}
    then |= {'output_dir': str(Path(source.path).parent), 'resume': path}
    return {'go on with the run': shlex.join(['python', program(origin.stage), *config.as_words(then)])}


if __name__ == '__main__':
    run_main(lambda: main(get_args_parser().parse()))
