"""Compare methods on your own pictures at equal cost: pretrain each, judge each in three ways, and write a report.

Examples:
    python scripts/compare.py --data_path photos --val_share 0.2 --budget epochs 100 --output_dir runs/compare
    python scripts/compare.py --dataset cifar10 --download --data_path data/cifar10 --budget flops 1e15 --labels 0.01 1
    python scripts/compare.py --data_path photos --methods mirl deep=mirl:depth=16 mixmae:lr=2e-3 random
    python scripts/compare.py --output_dir runs/compare --seeds 3 4   # goes on with two more seeds
    python scripts/compare.py --output_dir runs/compare --report      # draws what is there

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
from argparse import ArgumentTypeError, Namespace
from typing import NamedTuple

import numpy as np
import torch

import main_finetune
import main_pretrain
from scripts.analyse import MOST, tell
from scripts.benchmark import machine
from util import build, config, digests, dist, optim, resources, rng
from util.comparison import jobs, report, results, scores
from util.comparison.plan import RANDOM, Comparison, Method, step_images, step_words
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
SMALL = 'cifar10'  # in the names of the recipes for small pictures
GROWING = ('patch_size', 'mask_patch_size')  # options that --enlarge multiplies
KINDS = ('epochs', 'flops', 'minutes')  # of a budget
COMMON = ('dataset', 'bad_images', 'max_bad_images', 'max_pixels', 'mean', 'std')  # flags of all programs
HOW = ('device', 'num_workers')  # those that decide no number
SAME = (  # flags that every call for an output folder has alike; a later call takes them from the first one
    *('data_path', 'val_share', *COMMON, 'budget', 'points', 'finetune_epochs', 'judge_images', 'enlarge'),
    *('pretrain', 'finetune'),
)
OURS = {  # flags of the mains that this program sets
    *('data_path', 'output_dir', 'dataset', 'val_share', *HOW, 'epochs', 'seed', 'resume', 'save_freq', 'keep_last'),
    *('vis_freq', 'finetune', 'label_share', 'test_freq', 'eval', 'probe', 'dry_run'),
}
MAINS = {'pretrain': main_pretrain, 'finetune': main_finetune}


def get_args_parser() -> config.Parser:
    finetune = main_finetune.get_args_parser()
    parser = config.Parser(__doc__, other='main_finetune', usage='%(prog)s --data_path FOLDER [--FLAG VALUE ...]')
    add = parser.add_argument
    names = ' '.join([*SHORT, RANDOM])
    add('--methods', nargs='+', default=[*SHORT, RANDOM], metavar='METHOD', help=f'default: {names}')
    help = 'of each pretraining: epochs N, flops N or minutes N; in whole epochs, as many as come nearest'
    add('--budget', nargs='+', default=['epochs', '100'], metavar='KIND N', help=help)
    add('--seeds', nargs='+', type=config.AT_LEAST_0, default=[0, 1, 2], help='of all runs')
    share, points = config.number(float, above=0, most=1), config.number(int, 1, MOST)
    help = 'shares of the labels to fine-tune with; no share: no fine-tuning'
    add('--labels', nargs='*', type=share, default=[1.0], help=help)
    add('--points', type=points, default=2, help='how often a pretraining is judged, the last time at its end')
    help = 'at how many of these, the last ones, it is fine-tuned, too; default: all'
    add('--finetune_points', type=points, default=MOST, help=help)
    add('--finetune_epochs', type=config.AT_LEAST_1, help="with all labels; default: the recipe's")
    help = 'most images of a split for k-NN and linear probe'
    add('--judge_images', type=config.number(int, 2), default=10_000, help=help)
    add('--enlarge', type=config.AT_LEAST_1, default=1, help="times the recipes' image and patch sizes")
    add('--pretrain', nargs='+', default=[], metavar='KEY=VALUE', help='flags of main_pretrain.py for all methods')
    add('--finetune', nargs='+', default=[], metavar='KEY=VALUE', help='flags of main_finetune.py for all methods')
    help = 'programs at a time; default: one for each GPU, or each core without one'
    add('--jobs', type=config.AT_LEAST_1, help=help)
    add('--report', action=config.Switch, help='run nothing: write the report of what is there')
    parser.take(finetune, 'data_path', 'download', 'val_share', *COMMON, *HOW, 'output_dir')
    parser.set_defaults(output_dir=Path('runs/compare'))
    return parser


# --------------------------------------------------------------------------
# methods


class Spec(NamedTuple):
    """A method as it was written."""

    label: str
    model: str
    options: dict[str, str]


def parse_method(text: str) -> Spec:
    """The parts of [LABEL=]NAME[:KEY=VALUE,...]. Raises UserError."""
    parts = re.fullmatch(r'(?:([^=:,]+)=)?([^=:,]+)(?::(.*))?', text, re.DOTALL)
    if not parts:
        raise UserError(f'--methods {text}: expected [LABEL=]NAME[:KEY=VALUE,...], and blanks between methods')
    label, name, options = parts.groups()
    pairs = [pair.partition('=') for pair in re.split(r',(?=[\w.]+=)', options)] if options else []
    if wrong := next((key for key, equals, _ in pairs if not equals or not key), None):
        raise UserError(f'--methods {text}: expected KEY=VALUE behind the colon, got {wrong!r}')
    if name not in SHORT and not any(name in module.__all__ for module in main_pretrain.METHODS):
        known = [*SHORT, RANDOM]
        raise UserError(f'--methods {text}: unknown {name}{closest(name, known) or "; known: " + ", ".join(known)}')
    label = re.sub(r'[^\w.=-]+', '-', label or text)  # a folder's name, which no other program takes apart
    if label in (RANDOM, '.', '..'):
        raise UserError(f'--methods {text}: another LABEL than {label}')
    return Spec(label, SHORT.get(name, name), {key: value for key, _, value in pairs})


def flags_of(options: dict[str, str], stage: str) -> list[str]:
    """Options as words of a main: its flags, and the rest as --model_kwargs. Raises UserError for what is not free."""
    known, words, others = MAINS[stage].get_args_parser().flags, [], []
    for key, value in options.items():
        flag = known.get(f'--{key}')
        if key in OURS:
            raise UserError(f'{key}={value}: compare.py sets --{key} of {program(stage)} itself')
        if isinstance(flag, config.Switch) and value.lower() in ('true', 'false'):
            words.append(f'--{key}' if value.lower() == 'true' else f'--no_{key}')
        elif flag:
            words += [f'--{key}', *(value.split() if flag.nargs else [value])]
        else:
            others.append(f'{key}={value}')
    return words + (['--model_kwargs', *others] if others else [])


def recipe(model: str, stage: str) -> str:
    """The name of a model's recipe: that for small pictures, or else the first. Raises UserError if it has none."""
    found = [Path(path).stem for path in recipes_for(model, stage) if not path.endswith('_linprobe.yaml')]
    if not found:
        key = 'config' if stage == 'pretrain' else 'finetune.config'
        raise UserError(f'--methods: {model} has no recipe for {program(stage)}; {model}:{key}=RECIPE names another')
    return min(found, key=lambda name: SMALL not in name)


def pairs_of(given: list[str], flag: str) -> dict[str, str]:
    if wrong := next((pair for pair in given if not re.match(r'\w+=', pair)), None):
        raise UserError(f'{flag} expects KEY=VALUE, got {wrong!r}')
    return dict(pair.split('=', 1) for pair in given)


def common(args: Namespace) -> list[str]:
    """The flags of all programs, those that were given; they may run in another folder than this one."""
    given = {key: value for key, value in config.plain(args).items() if key in COMMON and key in args.given}
    return ['--data_path', str(args.data_path.resolve()), *config.as_words(given)]


def labelled(args: Namespace) -> list[str]:
    """Those of the programs that read labels."""
    return ['--val_share', f'{args.val_share:g}'] if args.val_share else []


def parsed(stage: str, words: list[str], args: Namespace) -> Namespace:
    """What words of a main mean together with the flags of all."""
    more = labelled(args) if stage == 'finetune' else []
    return MAINS[stage].get_args_parser().parse([*words, *common(args), *more, '--device', args.device], stage=stage)


def recipe_words(stage: str, name: str, options: dict[str, str], args: Namespace) -> list[str]:
    """The words of a main for a recipe with these options, and its images enlarged."""
    if args.enlarge > 1:
        plain = MAINS[stage].get_args_parser().parse(['--config', name], stage=stage)
        grown = {key: str(args.enlarge * plain.model_kwargs[key]) for key in GROWING if key in plain.model_kwargs}
        options = {'input_size': str(args.enlarge * plain.input_size)} | grown | options
    return ['--config', name, *flags_of(options, stage)]


def batch_of(args: Namespace) -> int:
    """Images of a step."""
    return args.batch_size * optim.accumulation(args)


def with_fitting_step(label: str, stage: str, words: list[str], images: int, args: Namespace) -> list[str]:
    """The words, with a step of at most a quarter of the images: an epoch of one step would teach little."""
    now = parsed(stage, words, args)
    batch = step_images(batch_of(now), now.batch_size, max(2, images // 4))
    if batch == batch_of(now):
        return words
    info(f'{label}: {batch} instead of {batch_of(now)} images a step in {program(stage)}, since there are {images}')
    return [*words, *step_words(batch, now.batch_size)]


def training_images(args: Namespace) -> int:
    """How many images are pretrained on."""
    return len(named.training_images(args).images)


def words_of(spec: Spec, args: Namespace, data: dict) -> tuple[list[str], list[str], list[str]]:
    """The names of a method's two recipes, and the words of its two programs."""
    before = {key: value for key, value in spec.options.items() if not key.startswith('finetune.')}
    after = {key.partition('.')[2]: value for key, value in spec.options.items() if key not in before}
    recipes = [before.pop('config', '') or recipe(spec.model, 'pretrain')]
    recipes.append(after.pop('config', '') or recipe(spec.model, 'finetune'))

    pretrain = recipe_words('pretrain', recipes[0], pairs_of(args.pretrain, '--pretrain') | before, args)
    now = parsed('pretrain', pretrain, args)
    pretrain = with_fitting_step(spec.label, 'pretrain', pretrain, training_images(now), args)
    method = main_pretrain.find_method(spec.model)
    network = build.encoder_kwargs(method, spec.model, now.model_kwargs, 'pretrain')
    network = {key: str(value).replace(' ', '') for key, value in network.items()}
    finetune = recipe_words('finetune', recipes[1], network | pairs_of(args.finetune, '--finetune') | after, args)
    return recipes, pretrain, with_fitting_step(spec.label, 'finetune', finetune, data['train'], args)


def described(spec: Spec, args: Namespace, data: dict) -> Method:
    """A method with what the budget gives it. Raises UserError for what cannot be."""
    recipes, pretrain, finetune = words_of(spec, args, data)
    before, after = parsed('pretrain', pretrain, args), parsed('finetune', finetune, args)
    steps, step_flops = build.epoch_batches(before, training_images(before)).steps, pretrain_flops(before)
    tuning_flops, parameters = finetune_flops(after, data['classes'])
    network = {'model': spec.model} | ({'model_kwargs': after.model_kwargs} if after.model_kwargs else {})
    network |= {key: getattr(before, key) for key in ('input_size', 'mean', 'std')}
    return Method(
        name=spec.label,
        model=spec.model,
        options=spec.options,
        recipes=recipes,
        pretrain=pretrain,
        finetune=finetune,
        network=config.as_words(network),
        crop_pct=after.crop_pct,
        parameters=parameters,
        image_flops=step_flops,
        finetune_flops=tuning_flops,
        epoch_images=steps * batch_of(before),
        epochs=epochs_of(spec.label, args, before, steps, step_flops * steps * batch_of(before)),
        finetune_epochs=args.finetune_epochs or after.epochs,
        batch=batch_of(after),
        micro=after.batch_size,
    )


# --------------------------------------------------------------------------
# cost


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


def budget_of(given: list[str]) -> tuple[str, float]:
    """--budget. Raises UserError."""
    if len(given) != 2 or given[0] not in KINDS:
        raise UserError(f'--budget {" ".join(given)}: expected epochs N, flops N or minutes N')
    kind, amount = given
    try:
        return kind, (config.AT_LEAST_1 if kind == 'epochs' else config.ABOVE_0)(amount)
    except ArgumentTypeError as error:
        raise UserError(f'--budget {kind} {error}') from error


def epochs_of(label: str, args: Namespace, pretrain: Namespace, steps: int, flops: float) -> int:
    """Whole epochs of a pretraining that come nearest to the budget; `steps` and `flops` are those of one."""
    kind, amount = budget_of(args.budget)
    if kind == 'epochs':
        return int(amount)
    one = flops
    if kind == 'minutes':
        torch.set_num_threads(threads(programs(args)))
        trial = {'dry_run': True, 'output_dir': args.output_dir / 'trial'}  # which writes nothing
        estimate = main_pretrain.main(Namespace(**vars(pretrain) | trial))
        one = steps * estimate.step_s(estimate.batch, estimate.accum_iter) / 60
    if round(amount / one) < 1:
        raise UserError(f'--budget {kind} {amount:g}: a single epoch of {label} takes {one:.3g}')
    return round(amount / one)


# --------------------------------------------------------------------------
# the comparison, and what plan.json keeps of it


def as_asked(args: Namespace, plan: dict) -> Namespace:
    """The arguments, with what an earlier call had. Raises UserError where this call has another value."""
    if not plan:
        return args
    now, then = plain(args), plan['flags']
    if differing := next((key for key in SAME if key in args.given and now[key] != then[key]), None):
        was, new = (config.as_flags({differing: flags[differing]}) for flags in (then, now))
        raise UserError(
            f'{args.output_dir} holds a comparison with {was}, not {new}: only methods, seeds, labels and '
            f'--finetune_points may be added; take another --output_dir'
        )
    kept = {key: then[key] for key in SAME} | {'data_path': Path(then['data_path'])}
    kept['given'] = sorted({*args.given, *then['given']})
    if 'finetune_points' not in args.given:
        kept['finetune_points'] = plan['finetune_points']
    for key in ('methods', 'seeds', 'labels'):
        kept[key] = list(dict.fromkeys([*plan[key], *(getattr(args, key) if key in args.given else ())]))
    return Namespace(**vars(args) | kept)


def plain(args: Namespace) -> dict:
    """What plan.json keeps of the arguments."""
    values = config.plain(args) | {'data_path': str(args.data_path.resolve())}
    return json.loads(json.dumps({key: values[key] for key in (*SAME, 'given')}))


def data_of(args: Namespace) -> dict:
    """What the images are, and how many."""
    flags = main_finetune.get_args_parser().parse([*common(args), *labelled(args)], stage='finetune')
    flags.download = args.download
    train, val = named.labelled_splits(flags, ('train', 'val'))
    what = args.data_path.resolve().name if args.dataset in named.FOLDERS else args.dataset
    largest = 100 * float(np.bincount(val.labels).max()) / len(val.labels)  # top-1 of always naming the same class
    counts = dict(train=len(train.images), val=len(val.images), classes=len(train.classes))
    return dict(what=what, val_share=args.val_share, **counts, largest=largest)


def methods_of(args: Namespace, plan: dict, data: dict) -> list[Method]:
    """Those of --methods; of an earlier call as they were then, since its runs are. Raises UserError."""
    specs = {text: parse_method(text) for text in args.methods if text != RANDOM}
    if not specs:
        raise UserError(f'--methods {RANDOM}: random weights of which networks? name a method, too')
    by_label: dict[str, str] = {}
    for text, spec in specs.items():
        if by_label.setdefault(spec.label, text) != text:
            raise UserError(f'--methods: {by_label[spec.label]} and {text} have one name; LABEL=NAME tells them apart')
    then = plan.get('described', {})
    return [
        Method(**then[spec.label]) if spec.label in then else described(spec, args, data) for spec in specs.values()
    ]


def asked(args: Namespace, plan: dict) -> Comparison:
    """The comparison that the arguments describe; `plan` has what an earlier call has settled."""
    kind, amount = budget_of(args.budget)
    data = plan['data'] if args.report else data_of(args)
    if plan and data != plan['data']:
        now, then = (config.as_flags(of).replace('--', '') for of in (data, plan['data']))
        raise UserError(
            f'the images are not those of the runs in {args.output_dir}: {now}; then: {then}; take another --output_dir'
        )
    workers = args.num_workers if 'num_workers' in args.given else config.default_workers(threads(programs(args)))
    return Comparison(
        data=data,
        budget={'kind': kind, 'amount': amount},
        points=args.points,
        finetune_points=args.finetune_points,
        judge_images=args.judge_images,
        common=common(args),
        labelled=labelled(args),
        how=plan['how'] if args.report else ['--device', args.device, '--num_workers', str(workers)],
        labels=sorted({float(f'{share:g}') for share in args.labels}),
        seeds=list(dict.fromkeys(args.seeds)),
        random=RANDOM in args.methods,
        methods=methods_of(args, plan, data),
        runs=(args.output_dir / 'runs').resolve(),
    )


def visible_gpus(args: Namespace) -> list[str]:
    """The GPUs that programs may have, as CUDA_VISIBLE_DEVICES names them; none with --device cpu."""
    if not args.device.startswith('cuda'):
        return []
    given = os.environ.get('CUDA_VISIBLE_DEVICES')
    return given.split(',') if given else [str(number) for number in range(torch.cuda.device_count())]


def programs(args: Namespace) -> int:
    """How many run at a time."""
    return args.jobs or len(visible_gpus(args)) or config.usable_cores()


def threads(at_once: int) -> int:
    """Of each of so many programs."""
    return max(1, config.usable_cores() // at_once)


def environment(args: Namespace, slot: int) -> dict[str, str]:
    """Of the programs in a slot: their share of the cores, and their GPU."""
    gpus = visible_gpus(args)
    gpu = {'CUDA_VISIBLE_DEVICES': gpus[slot % len(gpus)]} if gpus else {}
    return {'OMP_NUM_THREADS': str(threads(programs(args)))} | gpu


def where(args: Namespace) -> dict:
    """The machine, the versions, and the command."""
    found, at_once = machine(torch.device(args.device)), programs(args)
    return {
        'machine': {
            'processor': None if found['gpu'] else found['device'],
            'gpu': found['device'] if found['gpu'] else None,
            'cores': found['cores'],
            'jobs': at_once,
            'threads': threads(at_once),
        },
        'versions': found['versions'] | {'project': found['git']},
        'command': shlex.join(['python', 'scripts/compare.py', *sys.argv[1:]]),
        'time': time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime()),
    }


def check(args: Namespace, plan: dict) -> None:
    """Raise UserError for what no program could run with."""
    config.check_apart('output_dir', args.output_dir, args.data_path, args.dataset)
    folder = args.output_dir.resolve()
    if re.search(r',\w+=|#', str(folder)):
        raise UserError(f'--output_dir {folder}: analyse.py reads a , with a = behind it, and #, as more than a path')
    if args.report and not plan:
        raise UserError(f'--report: there is no comparison in {args.output_dir}')
    dist.own_device(args.device)
    if args.device.startswith('cuda:'):
        raise UserError(
            f'--device {args.device}: CUDA_VISIBLE_DEVICES={args.device[5:]} with --device cuda chooses a GPU'
        )


def keep(args: Namespace, plan: dict) -> None:
    digests.replace(args.output_dir / 'plan.json', json.dumps(plan, indent=1).encode())


@resources.program
def main(args: Namespace) -> None:
    """Run what is not done yet, and write the report."""
    plan = read_json(args.output_dir / 'plan.json')
    args = as_asked(args, plan)
    check(args, plan)
    comparison = asked(args, plan)
    listed = comparison.jobs()
    for method in comparison.methods:
        cost = f'{counted(method.epochs, "epoch")}, {method.flops(method.epochs):.3g} FLOPs'
        info(f'{method.name}: {method.model}, {method.parameters:,} parameters; pretraining: {cost}')
    stopped = None
    if not args.report:
        prepare(args.output_dir)
        plan = {'wall_s': 0.0, 'flags': plain(args), 'data': comparison.data} | plan
        plan |= {'methods': args.methods, 'seeds': comparison.seeds, 'labels': comparison.labels}
        plan |= {'finetune_points': args.finetune_points, 'how': comparison.how, 'where': where(args)}
        plan['described'] = {method.name: method._asdict() for method in comparison.methods}
        keep(args, plan)
        began = time.monotonic()
        try:
            jobs.run(listed, comparison.runs, programs(args), lambda slot: environment(args, slot))
        except SystemExit as stop:  # asked to
            stopped = stop
        plan['wall_s'] += time.monotonic() - began
        keep(args, plan)
    ended = jobs.outcomes(listed, comparison.runs)
    show(results.collected(comparison, ended) | plan['where'] | {'wall_h': plan['wall_s'] / 3600}, args.output_dir)
    if stopped:
        raise stopped
    if failed := [name for name, outcome in ended.items() if outcome.state == 'failed']:
        raise UserError(f'{counted(len(failed), "program")} failed, the first: {failed[0]}: {ended[failed[0]].why}')


def show(found: dict, folder: Path) -> None:
    """Write the numbers and the report, and print the table."""
    digests.replace(folder / 'results.json', json.dumps(found, indent=1).encode())
    report.write(found, folder)
    tell(scores.table(found))
    info(f'report in {folder}/report.html, numbers in {folder}/results.json')


if __name__ == '__main__':
    run_main(lambda: main(get_args_parser().parse(stage='finetune')))
