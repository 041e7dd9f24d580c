"""Fine-tuning of a pretrained encoder, training from random weights (no `--finetune`), and evaluation (`--eval`).

Examples:
    python main_finetune.py --config scripts/recipes/NAME.yaml --finetune runs/NAME/checkpoint-last.pth --data_path ...
    torchrun --nproc_per_node=8 main_finetune.py --eval --resume runs/NAME/checkpoint-best.pth --data_path ...
"""

from util import start  # noqa: F401

# isort: split
import argparse
import re
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from torch import Tensor, nn

from engine_finetune import LossOf, evaluate, forward, train_one_epoch
from main_pretrain import due, find_method
from util import agreement, build, checkpoint, config, dist, dry_run, predictions, resources, rng
from util.config import AT_LEAST_1, SHARE, Switch, number
from util.data import augment, datasets, named
from util.data.images import Reader
from util.errors import UserError, run_main
from util.log import info
from util.nn.linear_probe import last_layer, make_probe
from util.optim import WeightAverage
from util.recipes import recipe_value, recipes_for
from util.run import Run
from util.training import Training, amp_dtype, memory_format
from util.weights import Report, fold_probe, load_published, take_head_off

# what --probe linear sets, as in MAE's appendix A.1 and its code: what may be changed, and what may not
PROBE = dict(epochs=90, blr=0.1, warmup_epochs=10, min_lr=0.0, opt='lars', weight_decay=0.0, smoothing=0.0)
PROBE_WITHOUT = dict(
    **dict(drop_path=0.0, layer_decay=1.0, rule_kwargs={}, grad_checkpoint=False),  # of what is frozen
    **dict(color_jitter=None, aa='none', reprob=0.0, mixup=0.0, cutmix=0.0, cutmix_minmax=None),
)


def get_args_parser() -> config.Parser:
    parser = config.Parser(__doc__, other='main_pretrain', usage=config.USAGE)
    config.add_common_args(parser, batch_size=64, epochs=50, blr=1e-3, warmup_epochs=5, min_lr=1e-6, betas=[0.9, 0.999])
    add_augmentation_args(parser)
    below_1 = number(float, 0, below=1)
    add = partial(parser.add_argument, heading='Model')
    add('--nb_classes', type=AT_LEAST_1, of_network=True, help="number of classes; default: the data's")
    add(
        '--global_pool',
        action=Switch,
        default=True,
        of_network=True,
        off=['--cls_token'],
        help='classify the mean of the patch tokens, or the class token',
    )
    add(
        '--probe',
        choices=('linear',),
        at_resume='same',
        of_network=True,
        presets={'linear': PROBE | PROBE_WITHOUT},
        help="train a linear layer on the frozen encoder, by MAE's protocol, which sets other defaults",
    )
    add('--drop_path', type=below_1, default=0.1, help='stochastic depth of the last block; earlier ones in proportion')

    add = partial(parser.add_argument, heading='Optimiser')
    add('--layer_decay', type=SHARE, default=0.75, help='factor of the learning rate from each layer to the one below')

    add = partial(parser.add_argument, heading='Weight average')
    add('--use_ema', action=Switch, help='also keep and evaluate an average of the weights; with --eval: prefer it')
    add('--ema_decay', type=SHARE, default=0.9998, help='decay, approached as (1 + t) / (10 + t) at step t')
    add(
        '--ema_warmup_epochs',
        type=number(float, 0),
        default=0.0,
        help='epochs of a linear warm-up of the decay instead',
    )
    add('--ema_warmup_ratio', type=SHARE, default=0.9, help='share of the decay that this warm-up starts from')

    add = partial(parser.add_argument, heading='Data')
    add(
        '--val_share',
        type=number(float, above=0, below=1),
        at_resume='same',
        help='share of every class that validates, where there is no val/; drawn from --seed',
    )
    add(
        '--label_share',
        type=number(float, above=0, most=1),
        default=1.0,
        at_resume='same',
        help='share of the training images that is used, evenly from all classes; drawn from --seed',
    )

    add = partial(parser.add_argument, heading='Loss')
    add(
        '--criterion',
        choices=('ce', 'bce'),
        default='ce',
        of_network=True,
        help='cross-entropy, or binary ones summed over classes',
    )
    add('--smoothing', type=below_1, default=0.1, help='label smoothing')

    add = partial(parser.add_argument, heading='Evaluation')
    add('--eval', action=Switch, help='only evaluate the checkpoint of --resume')
    add(
        '--test_freq',
        type=AT_LEAST_1,
        default=1,
        at_resume='free',
        help='epochs between evaluations; the last epoch has one',
    )
    add('--eval_size', type=AT_LEAST_1, of_network=True, help='image side in pixels; default: --input_size')
    add(
        '--crop_pct',
        type=number(float, above=0, most=1),
        default=0.875,
        of_network=True,
        help='centre crop, as a share of the resized side',
    )
    add(
        '--eval_logits',
        choices=('all', 'present'),
        default='all',
        help='which classes an answer may be: all of the network, or those that the validation images have',
    )
    add(
        '--predictions',
        type=config.path,
        metavar='CSV',
        at_resume='free',
        help='with --eval: the table to write of the answers to each image; --data_path may have no labels then',
    )

    add = partial(parser.add_argument, heading='Output and resume', at_resume='free')
    add(
        '--finetune',
        type=config.source,
        metavar='PATH',
        help='pretrained weights, a path or URL#sha256=...; default: none, random weights',
    )
    add('--finetune_ema', action=Switch, help='start from the averaged weights in that file')
    # MAE's scripts pass these: evaluation is always distributed, and --resplit has no effect there either
    add('--dist_eval', action=Switch, help=argparse.SUPPRESS)
    add('--resplit', action=Switch, help=argparse.SUPPRESS)
    return parser


def add_augmentation_args(parser: config.Parser) -> None:
    some = number(float, above=0, most=1)
    add = partial(parser.add_argument, heading='Augmentation')
    add('--crop_scale', type=some, nargs=2, default=[0.08, 1.0], help="smallest and largest share of the image's area")
    add(
        '--repeated_aug',
        type=AT_LEAST_1,
        default=1,
        at_resume='same',
        help='how often an image is repeated, augmented apart; epochs keep their number of steps',
    )
    add('--color_jitter', type=number(float, 0), help='strength, used without --aa only; default: off')
    add('--aa', default='rand-m9-mstd0.5-inc1', help="timm's auto-augment policy, or 'none'")
    add('--reprob', type=number(float, 0, below=1), default=0.25, help='probability of random erasing')
    add('--remode', choices=('const', 'rand', 'pixel'), default='pixel', help='what erased pixels become')
    add('--recount', type=AT_LEAST_1, default=1, help='largest number of erased boxes')
    add('--mixup', type=number(float, 0), default=0.0, help='mixup alpha; 0: off')
    add('--cutmix', type=number(float, 0), default=0.0, help='cutmix alpha; 0: off')
    add('--cutmix_minmax', type=some, nargs=2, help='smallest and largest share of a side; replaces --cutmix')
    add('--mixup_prob', type=SHARE, default=1.0, help='share of batches that are mixed')
    add('--mixup_switch_prob', type=SHARE, default=0.5, help='share of cutmix where both are on')
    add(
        '--mixup_mode',
        choices=('batch', 'pair', 'elem'),
        default='batch',
        help='what shares one mixing ratio; pair and elem wait for a GPU',
    )


def create_classifier(args: argparse.Namespace, num_classes: int) -> nn.Module:
    """The classifier, or the probe, that the arguments describe, with weights that depend on the seed alone."""
    method = find_method(args.model)
    rng.seed_all(args.seed, rng.INIT)
    options = {} if args.global_pool else {'global_pool': 'token'}
    network = build.construct(
        method.create_classifier,
        args.model,
        num_classes=num_classes,
        drop_path_rate=args.drop_path,
        img_size=args.input_size,
        **options,
        model_kwargs=args.model_kwargs,
    )
    if args.probe != 'linear':  # scripts may have another flag of this name
        return network
    try:
        return make_probe(network)
    except ValueError as error:
        raise UserError(f'--probe linear: {args.model}: {error}') from error


def check_probe(args: argparse.Namespace) -> None:
    """Raise UserError for flags that a linear probe has no use for."""
    values = {name: getattr(args, name) for name, without in PROBE_WITHOUT.items() if getattr(args, name) != without}
    if not args.probe or not values:
        return
    of_recipe = any(recipe_value(args, name) is not None for name in values)
    others = [path for path in recipes_for(args.model, 'finetune') if path.endswith('_linprobe.yaml')]
    hint = f'; --config {args.config} is for fine-tuning: {" or ".join(others) or "leave it out"}' if of_recipe else ''
    raise UserError(
        f'--probe linear trains one layer on a frozen encoder, with a crop and a flip as only augmentation; it does '
        f'not take {config.as_flags(values)}{hint}'
    )


def check_classifier(core: nn.Module, args: argparse.Namespace) -> None:
    """Raise UserError for a classifier that would fail in its first step, or in its evaluation."""
    if not args.eval:
        build.check_forward(core, args, args.input_size)
    if args.eval or args.eval_size not in (None, args.input_size):
        build.check_forward(core.eval(), args, args.eval_size or args.input_size)
        core.train()


def checked_classifier(args: argparse.Namespace, num_classes: int) -> nn.Module:
    """`create_classifier`, and `check_classifier`."""
    core = create_classifier(args, num_classes)
    check_classifier(core, args)
    return core


def report(stats: dict[str, float], reader: Reader, labelled: bool = True) -> None:
    """How many images the reader has skipped, and where they have labels, MAE's closing lines."""
    if skipped := reader.skipped():
        info(f'bad images skipped: {len(skipped)}, listed in {reader.listing}')
    if not labelled:
        return
    info(f'* Acc@1 {stats["acc1"]:.3f} Acc@5 {stats["acc5"]:.3f} loss {stats["loss"]:.3f}')
    info(f'Accuracy of the network on the {stats["images"]} test images: {stats["acc1"]:.1f}%')


def absent_classes(args: argparse.Namespace, val: named.Split) -> list[int]:
    """The classes that no answer may be in an evaluation: with --eval_logits present, those without an image."""
    if args.eval_logits == 'all':
        return []
    return sorted(set(range(args.nb_classes or len(val.classes))) - set(val.labels))


def classification_loss(
    training: Training, augmentation: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], criterion: nn.Module
) -> LossOf:
    """What the engine calls for the loss of a batch: normalise, mix, forward, criterion in float32.

    `augmentation(imgs, labels)` is what happens to a normalised batch on the device (random erasing, mixup, cutmix); it
    may turn labels into soft targets, which `criterion(logits, targets)` then takes.
    """

    def loss_of(batch: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        imgs, labels = batch  # uint8 [N, 3, H, W], int64 [N]
        imgs, targets = augmentation(training.normalise(imgs), labels)
        with training.autocast():
            logits = training.model(imgs)
        return criterion(logits.float(), targets), {}

    return loss_of


def evaluate_checkpoint(args: argparse.Namespace) -> None:
    """`--eval`: load `--resume`, every weight of it, and evaluate it on the validation images, or answer others."""
    if not args.resume or args.resume == 'auto':
        raise UserError('--eval needs the checkpoint to evaluate: --resume PATH')
    if args.finetune:
        raise UserError(f'--eval does not use --finetune {args.finetune}; to evaluate that file, give it to --resume')
    config.check_common_args(args)
    device = dist.init(args.device, args.dist_url, args.dist_timeout)
    args, core, val, told = evaluated_network(args)
    agreement.check(args, device, val=val)
    batches = build.val_loader(args, val.images, val.labels, device)
    for line in told:
        info(line)
    layout = memory_format(args, core)
    normalise = datasets.Normalisation.of(args.mean, args.std, device, layout)
    core = core.to(device, memory_format=layout)
    dist.share(core.state_dict().values())
    absent = absent_classes(args, val)
    outputs = (args.nb_classes or len(val.classes)) - len(absent)
    answers = predictions.Answers(batches, outputs, independent=args.criterion == 'bce')
    stats = evaluate(core, batches, normalise, amp_dtype(args, device), absent, answers if args.predictions else None)
    if args.predictions:
        for line in predictions.write(args.predictions, val, answers, device):
            info(line)
    report(stats, batches.dataset.reader, labelled=val.labels is not None)
    dist.cleanup()


def evaluated_network(args: argparse.Namespace) -> tuple[argparse.Namespace, nn.Module, named.Split, list[str]]:
    """The arguments, completed by the checkpoint of --resume, its network, the images, and lines that tell of them.

    Rank 0 alone reads the file, and has its weights.
    """
    source = dist.from_main(lambda: checkpoint.Source.read(args.resume), checkpoint.Source.outline)
    source.expect('finetune', f'has no classifier to evaluate: fine-tune it, with --finetune {args.resume}')
    args = source.complete(args, get_args_parser())
    named.check_same_share(args, source.origin.args if source.origin else {})
    val = predictions.images_to_answer(args, source.origin and source.origin.classes)
    num_classes = args.nb_classes or len(val.classes)
    if not num_classes:
        raise UserError(f'{source.path} does not say how many classes it knows: --nb_classes is needed')
    with source.expected(args):
        with rng.undrawn():
            core = checked_classifier(args, num_classes)
        loaded = dist.from_main(lambda: load_published(core, source.container, ema=args.use_ema, label=source.path))
    if loaded.missing:
        origin = f'; it was written by {loaded.origin}' if loaded.origin else ''
        raise UserError(
            f'{source.path} cannot be evaluated as {args.model} with {num_classes} classes: {loaded}{origin}'
        )
    told = [str(loaded), *source.notices, *val.notes]
    if not source.origin and (args.eval_size or args.input_size) > 224 and 'crop_pct' not in args.given:
        told.append(
            f'centre crop: --crop_pct {args.crop_pct}, the default; the scripts of MAE and MixMIM evaluate the whole '
            f'image above 224 pixels, as --crop_pct 1 does'
        )
    return args, core, val, told


class Loaded(NamedTuple):
    """A network and how it came to be."""

    network: nn.Module
    report: Report
    model_kwargs: dict  # of the classifier
    num_classes: int  # 0: an encoder, which gives what a head is given, [N, D]


def network_of(source: checkpoint.Source, args: argparse.Namespace, head: bool | None = None) -> Loaded:
    """The network that a checkpoint of any origin holds, for arguments that the source has completed.

    A classifier if it has a head and `head` is not False, else an encoder: what fine-tuning starts from. Raises
    UserError for a file of another network, and where it lacks a head that `head` or --nb_classes asks for.
    """
    method, kwargs, stage = find_method(args.model), args.model_kwargs, source.origin and source.origin.stage
    if stage in ('pretrain', 'segment', 'detect'):
        kwargs = build.encoder_kwargs(method, args.model, kwargs, stage)
    options = {'img_size': args.input_size} | ({} if args.global_pool else {'global_pool': 'token'})
    container = fold_probe(source.container)
    wanted = args.nb_classes or len((source.origin and source.origin.classes) or []) or None
    if stage in ('segment', 'detect') and 'nb_classes' not in args.given:
        wanted = None  # they are those of pixels or objects

    def load(num_classes: int) -> tuple[nn.Module, Report]:
        make, sizes = method.create_classifier, {'num_classes': num_classes, **options}
        core = build.construct(make, args.model, **sizes, model_kwargs=kwargs)
        return core, load_published(core, container, ema=args.use_ema, label=source.path)

    with source.expected(args):
        num_classes = wanted or 1
        core, report = load(num_classes)
        if not wanted and (other := other_head(core, report)):
            num_classes = other
            core, report = load(num_classes)
    headless = lacks_head(core, report)
    if report.missing and (head or wanted or not headless) and head is not False:
        what = f'classifier{f" of {wanted} classes" if wanted else ""}' + ' of the class token' * (not args.global_pool)
        raise UserError(f'{source.path} has no {what}: {report}')
    if headless or head is False:
        take_head_off(core)
        num_classes = 0
    return Loaded(core, report, kwargs, num_classes)


def lacks_head(core: nn.Module, report: Report) -> bool:
    """Whether the head, or a part of it, stays as initialised."""
    return any(name.startswith(f'{last_layer(core)}.') for name in report.missing)


def other_head(core: nn.Module, report: Report) -> int:
    """How many classes the head in a file has, where it was not loaded since the network's has others; else 0."""
    of_file = re.compile(re.escape(f'{last_layer(core)}.weight [') + r'(\d+),')
    return next((int(found[1]) for found in map(of_file.match, report.ignored) if found), 0)


@resources.program
def main(args: argparse.Namespace) -> dry_run.Estimate | None:
    """Fine-tune, or evaluate, as the arguments say; with --dry_run, only try the fine-tuning."""
    predictions.check(args)
    if args.eval:
        return evaluate_checkpoint(args)
    method = find_method(args.model)
    check_probe(args)
    config.check_common_args(args)
    config.check_schedule(args)
    train, val = named.labelled_splits(args, ('train', 'val'))
    train = named.label_share(train, args.label_share, args.seed)
    num_classes = args.nb_classes or len(train.classes)
    if augment.mixes(args) and args.batch_size % 2:
        raise UserError(
            f'mixup and cutmix pair the images of a batch: --batch_size must be even, got {args.batch_size}'
        )
    sampler = build.epoch_batches(args, len(train.images))
    with Run(args, 'finetune', sampler, get_args_parser().roles, train.classes) as run:
        if run.nothing_left():
            return
        run.notices += [*train.notes, *val.notes]
        make = partial(create_classifier, num_classes=num_classes)
        args, core = run.first_network(make, check_classifier, get_args_parser(), 'finetune')
        crop = augment.training_transform(args)
        rules = build.param_rules(method, core, args.rule_kwargs)
        ema_steps = args.ema_warmup_epochs * sampler.steps
        ema = WeightAverage(core, args.ema_decay, ema_steps, args.ema_warmup_ratio) if args.use_ema else None
        build.apply_options(core, args)

        device = run.join(core, ema, train=train, val=val)
        core = build.on_device(core, args, device)
        optimizer = build.guarded_optimizer(core, rules, args, device)
        model = build.in_parallel(core, args, device)
        training = Training(args, core, model, optimizer, sampler, device, ema)

        images = datasets.ImageFiles(train.images, train.labels, crop, args.seed, Reader.of(args))
        run.resume(training, images)
        batches = build.loader(images, sampler, args, device)
        augmentation = augment.batch_augmentation(args, num_classes, device)
        loss_of = classification_loss(training, augmentation, augment.criterion(args))
        if args.dry_run:
            return dry_run.report(run, batches, partial(forward, training, loss_of=loss_of), train=train, val=val)
        val_batches = build.val_loader(args, val.images, val.labels, device)
        absent = absent_classes(args, val)

        for epoch in run.epochs():
            stats = train_one_epoch(training, run, batches, epoch, loss_of)
            values = {f'train_{name}': value for name, value in stats.items()}
            if due(epoch, args.test_freq, args.epochs):
                run.save_before_evaluation(epoch)
                networks = {'test': core} | ({'test_ema': ema.module} if ema else {})
                tests = {
                    name: evaluate(network, val_batches, training.normalise, training.amp_dtype, absent)
                    for name, network in networks.items()
                }
                report(tests['test'], val_batches.dataset.reader)
                run.keep_best(epoch, networks, tests, 'acc1')
                info(f'Max accuracy: {run.record["best_acc1"]:.2f}%')
                values |= {f'{name}_{key}': value for name, test in tests.items() for key, value in test.items()}
            params = sum(p.numel() for p in core.parameters() if p.requires_grad)
            run.after_epoch(epoch, **values, n_parameters=params)
        info(f'done; best accuracy {run.record["best_acc1"]:.2f}%; checkpoints and logs are in {args.output_dir}')
        dist.cleanup()


if __name__ == '__main__':
    run_main(lambda: main(get_args_parser().parse(stage='finetune')))
