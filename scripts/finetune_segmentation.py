"""Semantic segmentation: training of a pretrained encoder with its heads, evaluation (`--eval`), and `--predict`.

Examples:
    python scripts/finetune_segmentation.py --config NAME --finetune runs/NAME/checkpoint-last.pth --data_path ade
    torchrun --nproc_per_node=8 scripts/finetune_segmentation.py --eval --resume runs/NAME/checkpoint-best.pth ...
    python scripts/finetune_segmentation.py --predict photos --resume runs/NAME/checkpoint-best.pth --output_dir out
"""

import argparse
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from util import start  # noqa: F401

# isort: split
import torch
from torch import Tensor, nn

import main_finetune
from engine_finetune import LossOf, forward, train_one_epoch
from main_pretrain import find_method
from util import agreement, build, checkpoint, config, dist, dry_run, labelling, predictions, resources, rng, steps
from util.config import AT_LEAST_1, Switch, number
from util.data import datasets, decoders, named, segmentation
from util.data.annotations import listing_of
from util.data.images import Reader
from util.data.segmentation import PairSplit
from util.errors import UserError, printable, run_main
from util.labelling import Labeller
from util.log import info
from util.optim import WeightAverage
from util.run import Run
from util.training import Training, memory_format
from util.weights import load_published

TAKEN = (  # flags that are fine-tuning's
    *('nb_classes', 'drop_path', 'layer_decay', 'use_ema', 'ema_decay', 'finetune', 'finetune_ema', 'hflip'),
    *('num_workers', 'pin_mem', 'bad_images', 'max_bad_images', 'data_retries'),
)


def get_args_parser() -> config.Parser:
    parser = config.Parser(__doc__, other='main_finetune', usage=config.USAGE)
    parser.add_argument('--config', type=config.path, metavar='YAML', at_resume='free', help='recipe, or its name')
    config.add_model_args(parser, 512, '--crop_size')
    config.add_batch_args(parser, batch_size=2)
    steps.add_step_args(parser, steps=160_000, lr=1e-4, warmup_steps=1500)
    config.add_optimiser_args(parser, betas=[0.9, 0.999])
    config.add_output_args(parser, unit='round')
    config.add_hardware_args(parser)
    parser.flags['--channels_last'].help = 'NHWC in memory; default: on, on a CPU off'
    parser.settle['channels_last'] = channels_last
    parser.take(main_finetune.get_args_parser(), *TAKEN)
    parser.set_defaults(layer_decay=1.0, save_freq_steps=1000)  # a round takes hours
    parser.without(decoder=decoders.PIL, download=False)

    add = partial(parser.add_argument, heading='Data')
    add(
        '--data_path',
        type=config.path,
        default=Path('data'),
        at_resume='free',
        help='images/ and annotations/ with the same splits and names in both, classes.txt; or ADEChallengeData2016',
    )
    add('--dataset', choices=('folder', 'ade20k'), default='folder', at_resume='same', help='layout of --data_path')
    add(
        '--reduce_zero_label',
        action=Switch,
        default=None,
        at_resume='same',
        of_network=True,
        help='0 in an annotation is ignored, and 1 the first class; default: on for ade20k',
    )
    add = partial(parser.add_argument, heading='Augmentation')
    add(
        '--scale_range',
        type=number(float, above=0),
        nargs=2,
        default=[0.5, 2.0],
        help='smallest and largest factor of --short_side to which an image is resized, before it is cropped',
    )
    add('--photometric', action=Switch, default=True, help='distort brightness, contrast, saturation and hue')
    parser.add_argument(
        '--loss_mean',
        choices=('all', 'counted'),
        default='all',
        heading='Loss',
        of_network=True,
        help='divide by all pixels, as published recipes were tuned, or by those that are not ignored',
    )
    add_test_args(parser)
    return parser


def channels_last(args: argparse.Namespace, given: bool) -> bool | None:
    """The value of --channels_last: on a CPU the backward of UPerNet's convolutions takes 1.5 times as long with it."""
    return args.channels_last if args.channels_last is not None or args.device != 'cpu' else False


def add_test_args(parser: config.Parser) -> None:
    """How an image is tested, with or without labels."""
    add = partial(parser.add_argument, heading='Evaluation')
    add(
        '--eval',
        action=Switch,
        settle=lambda args, given: args.eval or args.predict is not None,
        help='only evaluate the checkpoint of --resume',
    )
    add(
        '--predict',
        type=config.path,
        metavar='PATH',
        at_resume='free',
        help='only label pictures, a file or a folder, by the checkpoint of --resume, in --output_dir/predictions',
    )
    add = partial(add, of_network=True)
    add(
        '--short_side',
        type=AT_LEAST_1,
        help='pixels of an image to be tested, at most four times as long; default: --crop_size',
    )
    add(
        '--test_mode',
        choices=('whole', 'slide'),
        help='the image, or crops of it; default: slide where the network has a fixed size',
    )
    add(
        '--stride',
        type=AT_LEAST_1,
        help='pixels between crops of --test_mode slide; default: two thirds of --crop_size',
    )
    add(
        '--test_scales',
        type=number(float, above=0),
        nargs='+',
        default=[1.0],
        help='factors of --short_side, over which probabilities are averaged',
    )
    add('--test_flip', action=Switch, help='average over the image and its mirror image, too')


# --------------------------------------------------------------------------
# parts


def create_segmenter(args: argparse.Namespace, num_classes: int) -> nn.Module:
    """The network that the arguments describe, with weights that depend on the seed alone."""
    method = find_method(args.model)
    if not hasattr(method, 'create_segmenter'):
        raise UserError(f'{method.__name__}.py has no create_segmenter: {args.model} cannot learn to segment')
    rng.seed_all(args.seed, rng.INIT)
    return build.construct(
        method.create_segmenter,
        args.model,
        num_classes=num_classes,
        drop_path_rate=args.drop_path,
        img_size=args.input_size,
        loss_mean=args.loss_mean,
        model_kwargs=args.model_kwargs,
    )


def check_segmenter(core: nn.Module, args: argparse.Namespace) -> None:
    """Raise UserError for a network that would fail in its first step, or in its evaluation."""
    side = args.input_size
    if not args.eval:
        try:
            build.check_forward(core, args, side, lambda n: (torch.zeros(n, side, side, dtype=torch.long),))
        except UserError as error:
            if args.batch_size > 1 or 'more than 1 value' not in str(error):
                raise
            raise UserError('--batch_size 1: BatchNorm needs more than one image: --batch_size 2') from error
    build.check_forward(core.eval(), args, side)
    core.train()
    if core.fixed_size and args.test_mode == 'whole':
        raise UserError(f'--test_mode whole: {args.model} takes {core.fixed_size} pixels alone; --test_mode slide')
    if args.stride and args.stride > side:
        raise UserError(f'--stride {args.stride} is more than --crop_size {side}: it would leave pixels out')


def segmentation_loss(training: Training) -> LossOf:
    """What the engine calls for the loss of a batch: normalise, zero the padding, forward."""

    def loss_of(batch: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        imgs, labels, valid = batch  # uint8 [N, 3, c, c], uint8 [N, c, c], int64 [N, 2]
        imgs = segmentation.normalise(imgs, valid, training.normalise)
        with training.autocast():
            return training.model(imgs, labels.long())

    return loss_of


def by_name(**pairs: PairSplit) -> dict[str, datasets.Split]:
    """Images and annotations as splits of their own: what ranks must agree on."""
    splits = {}
    for name, pair in pairs.items():
        splits[name] = datasets.Split(pair.images, None, pair.classes, pair.notes)
        if pair.annotations is not None:
            splits[f'{name}, annotations'] = datasets.Split(pair.annotations, None, [], [])
    return splits


# --------------------------------------------------------------------------
# evaluation and prediction


def trained_network(args: argparse.Namespace) -> tuple[argparse.Namespace, nn.Module, PairSplit, list[str]]:
    """The arguments, completed by the checkpoint of --resume, its network, what to test it on, and lines to tell.

    Rank 0 alone reads the file, and has its weights.
    """
    source = dist.from_main(lambda: checkpoint.Source.read(args.resume), checkpoint.Source.outline)
    source.expect('segment', f'has no segmentation heads: train them, with --finetune {args.resume}')
    args = source.complete(args, get_args_parser())
    names = source.classes
    if names and not args.nb_classes and (args.predict or not listing_of(args).is_file()):
        args = argparse.Namespace(**vars(args) | {'nb_classes': len(names)})
    if args.predict and not args.nb_classes:
        raise UserError(f'{source.path} does not say how many classes it knows: --nb_classes is needed')
    if args.predict:
        split = PairSplit(named.images_at(args.predict), None, names or list(map(str, range(args.nb_classes))), [])
    else:
        [split] = segmentation.pairs(args, ['val'])
        unnamed = list(map(str, range(len(split.classes))))
        if names and split.classes == unnamed:
            split = split._replace(classes=names)
        elif source.origin and names not in (None, unnamed, split.classes):  # others name ADE20K's classes otherwise
            differing = named.difference(names, split.classes, source.path, str(args.data_path))
            raise UserError(f'{source.path} was trained for other classes: {differing}')
    with source.expected(args):
        with rng.undrawn():
            core = create_segmenter(args, len(split.classes))
            check_segmenter(core, args)
        loaded = dist.from_main(lambda: load_published(core, source.container, ema=args.use_ema, label=source.path))
    if loaded.missing:
        raise UserError(f'{source.path} cannot be taken as {args.model} with {len(split.classes)} classes: {loaded}')
    return args, core, split, [str(loaded), *source.notices, *split.notes]


def test_checkpoint(args: argparse.Namespace) -> None:
    """`--eval` and `--predict`: load `--resume`, every weight of it, and test it on the validation or other images."""
    if not args.resume or args.resume == 'auto':
        raise UserError(f'{"--predict" if args.predict else "--eval"} needs a checkpoint: --resume PATH')
    if args.finetune:
        raise UserError(f'--eval does not use --finetune {args.finetune}; to evaluate that file, give it to --resume')
    if args.predict:
        args = argparse.Namespace(**vars(args) | {'data_path': args.predict})
    config.check_common_args(args)
    device = dist.init(args.device, args.dist_url, args.dist_timeout)
    args, core, split, told = trained_network(args)
    files = labelling.files_of(args, split.images) if args.predict else []
    agreement.check(args, device, **by_name(val=split))
    for line in told:
        info(line)
    core = core.to(device, memory_format=memory_format(args, core))
    dist.share(core.state_dict().values())
    batches, labeller = labelling.test_loader(split, args, core, device), Labeller(core, args, device)
    if args.predict:
        labelling.write_labels(labeller, batches, files, split.classes, args.output_dir / 'predictions')
    else:
        stats = labelling.evaluate(labeller, batches, len(split.classes))
        for _, name, iou, acc in labelling.class_table(stats, split.classes)[1:]:
            info(f'  {printable(name, 40):40}  IoU {iou or "-":>6}  Acc {acc or "-":>6}')
        labelling.report(stats, split.classes, batches.dataset.reader)
    dist.cleanup()


# --------------------------------------------------------------------------
# training


@resources.program
def main(args: argparse.Namespace) -> dry_run.Estimate | None:
    """Train, test or label, as the arguments say; with --dry_run, only try the training."""
    if args.eval:
        return test_checkpoint(args)
    method = find_method(args.model)
    config.check_common_args(args)
    config.check_schedule(args)
    train, val = segmentation.pairs(args)
    sampler = build.epoch_batches(args, len(train.images))
    with Run(args, 'segment', sampler, get_args_parser().roles, train.classes) as run:
        if run.nothing_left():
            return
        run.notices += [*train.notes, *val.notes]
        make = partial(create_segmenter, num_classes=len(train.classes))
        args, core = run.first_network(make, check_segmenter, get_args_parser(), 'finetune', new_classes=True)
        rules = build.param_rules(method, core, args.rule_kwargs)
        ema = WeightAverage(core, args.ema_decay) if args.use_ema else None
        build.apply_options(core, args)
        run.notices += build.statistics_notices(args, core, sampler)

        device = run.join(core, ema, **by_name(train=train, val=val))
        core = build.on_device(core, args, device)
        optimizer = build.guarded_optimizer(core, rules, args, device)
        model = build.in_parallel(core, args, device)
        training = Training(args, core, model, optimizer, sampler, device, ema)

        images = segmentation.training_pairs(train, args, Reader.of(args))
        run.resume(training, images)
        batches = build.loader(images, sampler, args, device)
        loss_of = segmentation_loss(training)
        networks = {'test': core} | ({'test_ema': ema.module} if ema else {})
        labellers = {name: Labeller(network, args, device) for name, network in networks.items()}
        val_batches = labelling.test_loader(val, args, core, device)
        if args.dry_run:
            pixels = labellers['test'].pixels(val_batches.dataset)
            trial = partial(forward, training, loss_of=loss_of)
            return dry_run.report(run, batches, trial, pixels, train=train, val=val)

        for epoch in run.epochs():
            stats = train_one_epoch(training, run, batches, epoch, loss_of)
            run.save_before_evaluation(epoch)
            tests = {
                name: labelling.evaluate(labeller, val_batches, len(val.classes))
                for name, labeller in labellers.items()
            }
            labelling.report(tests['test'], val.classes, val_batches.dataset.reader)
            run.keep_best(epoch, networks, tests, 'mIoU')
            info(f'best mIoU: {run.record["best_mIoU"]:.2f}')
            if dist.is_main():
                predictions.put(args.output_dir / 'classes.csv', labelling.class_table(tests['test'], val.classes))
                run.add_picture(epoch, labelling.drawing(labellers['test'], val_batches.dataset), 'segmentation')
            values = {f'train_{name}': value for name, value in stats.items()}
            values |= {f'{name}_{key}': test[key] for name, test in tests.items() for key in ('mIoU', 'mAcc', 'aAcc')}
            params = sum(p.numel() for p in core.parameters() if p.requires_grad)
            run.after_epoch(epoch, **values, n_parameters=params)
        info(f'done; best mIoU {run.record["best_mIoU"]:.2f}; checkpoints and logs are in {args.output_dir}')
        dist.cleanup()


if __name__ == '__main__':
    run_main(lambda: main(get_args_parser().parse(stage='segment')))
