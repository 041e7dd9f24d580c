"""Compare methods on your own pictures at equal cost: pretrain each, judge each in three ways, and write a report.

Examples:
    python scripts/compare.py --data_path photos --val_share 0.2 --budget epochs 100 --output_dir runs/compare
    python scripts/compare.py --dataset cifar10 --download --data_path data/cifar10 --budget flops 1e15 --labels 0.01 1
    python scripts/compare.py --data_path photos --methods mirl deep=mirl:depth=16 mixmae:lr=2e-3 random --seeds 0 1 2
    python scripts/compare.py --output_dir runs/compare --data_path photos --report   # draw what is there

A method is [LABEL=]NAME[:KEY=VALUE,...]. NAME is one of the short names below or a --model that has recipes. A KEY is
an option of the model or a flag of main_pretrain.py; finetune.KEY is one of main_finetune.py. `random` stands for the
networks of all methods with random weights. Call it again to go on, or to add methods, seeds and shares of labels.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from util import start  # noqa: F401

# isort: split
import json
import os
import re
import shlex
import time
from argparse import Namespace
from typing import NamedTuple

import torch

import main_finetune
import main_pretrain
from scripts.analyse import MOST, tell
from scripts.benchmark import machine
from util import build, config, digests, optim, resources, rng
from util.comparison import jobs, report, results, scores
from util.comparison.plan import Comparison, Method
from util.data import named
from util.dry_run import counted_flops
from util.errors import UserError, closest, program, run_main
from util.log import counted, info
from util.recipes import recipes_for
from util.run_folder import prepare, read_json

SHORT = {  # names of methods, and their networks for small pictures
    'mirl': 'mirl_vit_tiny',
    'localmim_vit': 'localmim_vit_tiny',
    'localmim_swin': 'localmim_swin_pico',
    'mixmae': 'mixmae_tiny',
    'a2mim_vit': 'a2mim_vit_tiny',
    'a2mim_resnet': 'a2mim_resnet_tiny',
    'simmim_vit': 'simmim_vit_tiny',
}
RANDOM = 'random'
SMALL = 'cifar10'  # in the names of the recipes for small pictures
GROWING = ('patch_size', 'mask_patch_size')  # options that --enlarge multiplies
COMMON = ('data_path', 'dataset', 'num_workers', 'device', 'bad_images', 'max_bad_images', 'max_pixels', 'mean', 'std')
NETWORK = ('model', 'model_kwargs', 'input_size', 'mean', 'std')  # flags of a network without a checkpoint
KINDS = ('epochs', 'flops', 'minutes')  # of a budget
SAME = (  # flags that every call for an output folder must have alike
    *('dataset', 'val_share', 'budget', 'points', 'finetune_epochs', 'judge_images'),
    *('enlarge', 'pretrain', 'finetune'),
)
MAINS = {'pretrain': main_pretrain, 'finetune': main_finetune}


def get_args_parser() -> config.Parser:
    finetune = main_finetune.get_args_parser()
    parser = config.Parser(__doc__, other='main_finetune', usage='%(prog)s --data_path FOLDER [--FLAG VALUE ...]')
    add = parser.add_argument
    names = ' '.join([*SHORT, RANDOM])
    add('--methods', nargs='+', default=[*SHORT, RANDOM], metavar='METHOD', help=f'default: {names}')
    add(
        '--budget',
        nargs=2,
        default=['epochs', '100'],
        metavar=('KIND', 'N'),
        help='of each pretraining: epochs N, flops N or minutes N; in whole epochs, as many as come nearest',
    )
    add('--seeds', nargs='+', type=config.AT_LEAST_0, default=[0, 1, 2], help='of all runs')
    share = config.number(float, above=0, most=1)
    add(
        '--labels',
        nargs='*',
        type=share,
        default=[1.0],
        help='shares of the labels to fine-tune with; none: no fine-tuning',
    )
    points = config.number(int, 1, MOST)
    add('--points', type=points, default=2, help='how often a pretraining is judged, the last time at its end')
    help = 'at how many of these, the last ones, it is fine-tuned, too; default: all'
    add('--finetune_points', type=points, default=MOST, help=help)
    add('--finetune_epochs', type=config.AT_LEAST_1, help="with all labels; default: the recipe's")
    add(
        '--judge_images',
        type=config.AT_LEAST_1,
        default=10_000,
        help='most images of a split for k-NN and linear probe',
    )
    add('--enlarge', type=config.AT_LEAST_1, default=1, help="times the recipes' image and patch sizes")
    add('--pretrain', nargs='+', default=[], metavar='KEY=VALUE', help='flags of main_pretrain.py for all methods')
    add('--finetune', nargs='+', default=[], metavar='KEY=VALUE', help='flags of main_finetune.py for all methods')
    add(
        '--jobs', type=config.AT_LEAST_1, help='programs at a time; default: one for each GPU, or each core without one'
    )
    add('--report', action=config.Switch, help='run nothing: write the report of what is there')
    parser.take(finetune, *COMMON, 'download', 'val_share', 'output_dir')
    parser.set_defaults(output_dir=Path('runs/compare'))
    return parser


# --------------------------------------------------------------------------
# methods


class Words(NamedTuple):
    """A method as it was written."""

    label: str
    model: str
    options: dict[str, str]


def words(text: str) -> Words:
    """The parts of [LABEL=]NAME[:KEY=VALUE,...]."""
    label, name, options = re.fullmatch(r'(?:([^=:,]+)=)?([^=:,]*)(?::(.*))?', text, re.DOTALL).groups()
    pairs = [pair.partition('=') for pair in re.split(r',(?=[\w.]+=)', options)] if options else []
    if wrong := next((key for key, equals, _ in pairs if not equals or not key), None):
        raise UserError(f'--methods {text}: expected KEY=VALUE behind the colon, got {wrong!r}')
    if name not in SHORT and not any(name in module.__all__ for module in main_pretrain.METHODS):
        known = [*SHORT, RANDOM]
        raise UserError(f'--methods {text}: unknown {name}{closest(name, known) or "; known: " + ", ".join(known)}')
    label = re.sub(r'[^\w.=,-]', '-', label or text)
    return Words(label, SHORT.get(name, name), {key: value for key, _, value in pairs})


def flags(options: dict[str, str], stage: str) -> list[str]:
    """Options as words of a main: its flags, and the rest as --model_kwargs."""
    known, found, others = MAINS[stage].get_args_parser().flags, [], []
    for key, value in options.items():
        switch = isinstance(known.get(f'--{key}'), config.Switch)
        if switch and value in ('true', 'false'):
            found.append(f'--{key}' if value == 'true' else f'--no_{key}')
        elif f'--{key}' in known:
            found += [f'--{key}', *value.split()]
        else:
            others.append(f'{key}={value}')
    return found + (['--model_kwargs', *others] if others else [])


def recipe(model: str, stage: str) -> str:
    """The name of a model's recipe: that for small pictures, or else the first."""
    found = [Path(path).stem for path in recipes_for(model, stage) if not path.endswith('_linprobe.yaml')]
    if not found:
        raise UserError(f'--methods: {model} has no recipe for {program(stage)}; {model}:config=RECIPE names another')
    return min(found, key=lambda name: SMALL not in name)


def pairs_of(given: list[str], flag: str) -> dict[str, str]:
    if wrong := next((pair for pair in given if not re.match(r'[\w]+=', pair)), None):
        raise UserError(f'{flag} expects KEY=VALUE, got {wrong!r}')
    return dict(pair.split('=', 1) for pair in given)


def settled(stage: str, name: str, options: dict[str, str], args: Namespace) -> list[str]:
    """The words of a main for a recipe with these options."""
    if args.enlarge > 1:
        plain = MAINS[stage].get_args_parser().parse(['--config', name], stage=stage)
        grown = {key: str(args.enlarge * plain.model_kwargs[key]) for key in GROWING if key in plain.model_kwargs}
        options = {'input_size': str(args.enlarge * plain.input_size)} | grown | options
    return ['--config', name, *flags(options, stage)]


def common(args: Namespace) -> list[str]:
    """The flags of all programs that were given."""
    return config.as_words(
        {key: value for key, value in config.plain(args).items() if key in {*COMMON} & {*args.given}}
    )


def labelled(args: Namespace) -> list[str]:
    """Those of the programs that read labels."""
    return ['--val_share', f'{args.val_share:g}'] if args.val_share else []


def meaning(stage: str, found: list[str], args: Namespace) -> Namespace:
    """What words of a main mean together with the flags of all."""
    more = labelled(args) if stage == 'finetune' else []
    return MAINS[stage].get_args_parser().parse([*found, *common(args), *more], stage=stage)


def step_images(args: Namespace) -> int:
    return args.batch_size * optim.accumulation(args)


def smaller_batch(label: str, stage: str, found: list[str], images: int, args: Namespace) -> list[str]:
    """The words, with a step that is at most a quarter of the images: an epoch of one step would teach little."""
    now = meaning(stage, found, args)
    if 4 * step_images(now) <= images:
        return found
    batch = 1 << max(1, images // 4).bit_length() - 1  # a power of two
    info(f'{label}: {batch} instead of {step_images(now)} images a step in {program(stage)}, since there are {images}')
    more = ['--effective_batch_size', str(batch)] if now.effective_batch_size else []
    return [*found, '--batch_size', str(min(batch, now.batch_size)), *more]


def method(text: str, args: Namespace, data: dict, epochs: int | None) -> Method:
    """What a word of --methods stands for, and what the budget gives it, if not `epochs`, settled in an earlier call.

    Raises UserError for what cannot be.
    """
    label, model, options = words(text)
    tuned = {key.removeprefix('finetune.'): value for key, value in options.items() if key.startswith('finetune.')}
    own = {key: value for key, value in options.items() if not key.startswith('finetune.')}
    recipes = [own.pop('config', '') or recipe(model, 'pretrain'), tuned.pop('config', '') or recipe(model, 'finetune')]

    pretrain = settled('pretrain', recipes[0], pairs_of(args.pretrain, '--pretrain') | own, args)
    images = len(named.training_images(before := meaning('pretrain', pretrain, args)).images)
    pretrain = smaller_batch(label, 'pretrain', pretrain, images, args)
    encoder = build.encoder_kwargs(main_pretrain.find_method(model), model, before.model_kwargs, 'pretrain')
    encoder = {key: str(value).replace(' ', '') for key, value in encoder.items()}
    finetune = settled('finetune', recipes[1], encoder | pairs_of(args.finetune, '--finetune') | tuned, args)
    finetune = smaller_batch(label, 'finetune', finetune, data['train'], args)

    before, after = meaning('pretrain', pretrain, args), meaning('finetune', finetune, args)
    steps = build.epoch_batches(before, images).steps
    image_flops, (tuning_flops, parameters) = pretrain_flops(before), finetune_flops(after, data['classes'])
    epoch = image_flops * steps * step_images(before)
    return Method(
        name=label,
        model=model,
        options=options,
        recipes=recipes,
        pretrain=pretrain,
        finetune=finetune,
        network=config.as_words({key: getattr(after, key) for key in NETWORK if getattr(after, key)}),
        crop_pct=after.crop_pct,
        parameters=parameters,
        image_flops=image_flops,
        finetune_flops=tuning_flops,
        epoch_images=steps * step_images(before),
        epochs=epochs or epochs_of(label, args.budget, epoch, steps, before),
        finetune_epochs=args.finetune_epochs or after.epochs,
        batch=step_images(after),
        micro=after.batch_size,
    )


def pretrain_flops(args: Namespace) -> float:
    """Of a step of pretraining, for an image."""
    core = main_pretrain.create_model(args).train()
    plan = core.plan_from_noise(rng.picture_noise(core, args.seed, 2))
    return counted_flops(lambda: core(torch.zeros(2, 3, args.input_size, args.input_size), plan)[0])[1] / 2


def finetune_flops(args: Namespace, classes: int) -> tuple[float, int]:
    """Of a step of fine-tuning, for an image; and the network's parameters."""
    core = main_finetune.create_classifier(args, classes).train()
    flops = counted_flops(lambda: core(torch.zeros(2, 3, args.input_size, args.input_size)).sum())[1] / 2
    return flops, sum(param.numel() for param in core.parameters())


def epochs_of(label: str, budget: tuple[str, float], epoch: float, steps: int, args: Namespace) -> int:
    """Whole epochs of a pretraining that come nearest to the budget; `epoch` is the FLOPs of one."""
    kind, amount = budget
    if kind == 'epochs':
        return round(amount)
    if kind == 'flops':
        one = epoch
    else:
        estimate = main_pretrain.main(Namespace(**vars(args) | {'dry_run': True, 'output_dir': Path('runs/compare')}))
        one = steps * estimate.step_s(estimate.batch, estimate.accum_iter) / 60
    if round(amount / one) < 1:
        raise UserError(f'--budget {kind} {amount:g}: an epoch of {label} takes {one:.3g}, more than twice as much')
    return round(amount / one)


# --------------------------------------------------------------------------
# the comparison


def budget(given: list[str]) -> tuple[str, float]:
    kind, amount = given
    if kind not in KINDS:
        raise UserError(f'--budget: {kind} is none of {", ".join(KINDS)}; --budget epochs 100')
    least = config.AT_LEAST_1 if kind == 'epochs' else config.ABOVE_0
    try:
        return kind, least(amount)
    except config.argparse.ArgumentTypeError as error:
        raise UserError(f'--budget {kind} {error}') from error


def data_of(args: Namespace) -> dict:
    """What the images are, and how many."""
    of_labels = main_finetune.get_args_parser().parse([*common(args), *labelled(args)], stage='finetune')
    of_labels.download = args.download
    train, val = named.labelled_splits(of_labels, ('train', 'val'))
    what = args.data_path.resolve().name if args.dataset in named.FOLDERS else args.dataset
    return dict(what=what, train=len(train.images), val=len(val.images), classes=len(train.classes))


def asked(args: Namespace, plan: dict) -> Comparison:
    """The comparison that the arguments describe; `plan` has what an earlier call has settled."""
    texts = [text for text in dict.fromkeys(args.methods) if text != RANDOM]
    labels = [words(text).label for text in texts]
    if twice := next((label for label in labels if labels.count(label) > 1), None):
        raise UserError(f'--methods: two are called {twice}; LABEL=NAME names them')
    if not texts:
        raise UserError(f'--methods {RANDOM}: random weights of which networks? name a method, too')
    data = data_of(args)
    return Comparison(
        data=data,
        budget=dict(zip(('kind', 'amount'), args.budget, strict=True)),
        points=args.points,
        finetune_points=args.finetune_points,
        judge_images=args.judge_images,
        common=common(args),
        labelled=labelled(args),
        labels=sorted(set(args.labels)),
        seeds=list(dict.fromkeys(args.seeds)),
        random=RANDOM in args.methods,
        methods=[
            method(text, args, data, plan['epochs'].get(label)) for text, label in zip(texts, labels, strict=True)
        ],
        runs=(args.output_dir / 'runs').resolve(),
    )


def earlier(args: Namespace) -> dict:
    """What plan.json of the output folder says, or that of a new comparison. Raises UserError for another one."""
    now = {key: value for key, value in config.plain(args).items() if key in SAME}
    now = json.loads(json.dumps(now | {'data_path': str(args.data_path.resolve())}))
    plan = read_json(args.output_dir / 'plan.json') or {'same': now, 'epochs': {}, 'wall_s': 0.0}
    if differing := [key for key in now if plan['same'].get(key) != now[key]]:
        key = differing[0]
        raise UserError(
            f'{args.output_dir} holds a comparison with --{key} {plan["same"].get(key)}, not {now[key]}: '
            f'only methods, seeds and labels may be added; take another --output_dir'
        )
    return plan


def environment(args: Namespace, at_once: int, slot: int) -> dict[str, str]:
    """Of the programs in a slot: their GPU, or their share of the cores."""
    threads = {'OMP_NUM_THREADS': str(max(1, config.usable_cores() // at_once))}
    gpus = visible_gpus() if args.device.startswith('cuda') else []
    return threads | ({'CUDA_VISIBLE_DEVICES': gpus[slot % len(gpus)]} if gpus else {})


def visible_gpus() -> list[str]:
    given = os.environ.get('CUDA_VISIBLE_DEVICES')
    return given.split(',') if given else [str(number) for number in range(torch.cuda.device_count())]


def where(args: Namespace, at_once: int) -> dict:
    """The machine and the versions."""
    device = torch.device(args.device)
    found = machine(device)
    return {
        'machine': {
            'processor': None if found['gpu'] else found['device'],
            'gpu': found['device'] if found['gpu'] else None,
            'cores': found['cores'],
            'jobs': at_once,
            'threads': max(1, found['cores'] // at_once),
        },
        'versions': found['versions'] | {'project': found['git']},
        'command': shlex.join(['python', 'scripts/compare.py', *sys.argv[1:]]),
        'time': time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime()),
    }


def keep(args: Namespace, plan: dict) -> None:
    digests.replace(args.output_dir / 'plan.json', json.dumps(plan, indent=1).encode())


@resources.program
def main(args: Namespace) -> None:
    """Run what is not done yet, and write the report."""
    args.budget = budget(args.budget)
    config.check_apart('output_dir', args.output_dir, args.data_path, args.dataset)
    plan = earlier(args)
    comparison = asked(args, plan)
    at_once = args.jobs or (len(visible_gpus()) if args.device.startswith('cuda') else config.usable_cores())
    for one in comparison.methods:
        flops = f'{one.epochs} epochs, {one.flops(one.epochs):.3g} FLOPs'
        info(f'{one.name}: {one.model}, {one.parameters:,} parameters; pretraining: {flops}')
    prepare(args.output_dir)
    plan['epochs'] |= {one.name: one.epochs for one in comparison.methods}
    keep(args, plan)
    began, listed, stopped = time.monotonic(), comparison.jobs(), None
    try:
        if not args.report:
            jobs.run(listed, comparison.runs, at_once, lambda slot: environment(args, at_once, slot))
    except SystemExit as stop:  # asked to
        stopped = stop
    plan['wall_s'] += time.monotonic() - began
    keep(args, plan)
    ended = jobs.outcomes(listed, comparison.runs)
    found = results.collected(comparison, ended) | where(args, at_once) | {'wall_h': plan['wall_s'] / 3600}
    digests.replace(args.output_dir / 'results.json', json.dumps(found, indent=1).encode())
    report.write(found, args.output_dir)
    tell(scores.table(found))
    info(f'report in {args.output_dir}/report.html, numbers in {args.output_dir}/results.json')
    if stopped:
        raise stopped
    if failed := [name for name, outcome in ended.items() if outcome.state == 'failed']:
        raise UserError(f'{counted(len(failed), "program")} failed, the first: {failed[0]}: {ended[failed[0]].why}')


if __name__ == '__main__':
    run_main(lambda: main(get_args_parser().parse(stage='finetune')))
