"""Detection and instance segmentation on COCO: training of a pretrained encoder, `--eval`, and `--predict`.

Examples:
    python scripts/finetune_detection.py --config NAME --finetune runs/NAME/checkpoint-last.pth --data_path coco
    torchrun --nproc_per_node=8 scripts/finetune_detection.py --eval --resume runs/NAME/checkpoint-best.pth ...
    python scripts/finetune_detection.py --predict photos --resume runs/NAME/checkpoint-best.pth --output_dir out
"""

import argparse
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from util import start  # noqa: F401

# isort: split
from torch import Tensor, nn

import main_finetune
from engine_finetune import LossOf, forward, train_one_epoch
from main_pretrain import find_method
from util import (
    agreement,
    build,
    checkpoint,
    config,
    detecting,
    dist,
    dry_run,
    labelling,
    predictions,
    resources,
    rng,
    steps,
)
from util.config import ABOVE_0, AT_LEAST_1, KeyValues, Switch
from util.data import coco, decoders, named
from util.data.images import Reader
from util.data.objects import CocoSplit, folder_of
from util.detecting import Finder
from util.errors import UserError, printable, run_main
from util.log import info
from util.nn import detector
from util.optim import WeightAverage
from util.run import Run
from util.training import Training, memory_format
from util.weights import load_published

TAKEN = (  # flags that are fine-tuning's
    *('drop_path', 'layer_decay', 'use_ema', 'ema_decay', 'finetune', 'finetune_ema', 'hflip'),
    *('num_workers', 'pin_mem', 'bad_images', 'max_bad_images', 'data_retries'),
)


def get_args_parser() -> config.Parser:
    parser = config.Parser(__doc__, other='main_finetune', usage=config.USAGE)
    parser.add_argument('--config', type=config.path, metavar='YAML', at_resume='free', help='recipe, or its name')
    config.add_model_args(parser, 1024)
    config.add_batch_args(parser, batch_size=2)
    schedule = dict(steps=184_375, lr=1e-4, warmup_steps=250, warmup_lr_ratio=1e-3)
    steps.add_step_args(parser, **schedule, schedules=('step', 'cosine', 'poly'))
    config.add_optimiser_args(parser, betas=[0.9, 0.999])
    config.add_output_args(parser, unit='round')
    config.add_hardware_args(parser)
    parser.take(main_finetune.get_args_parser(), *TAKEN)
    parser.set_defaults(weight_decay=0.1, layer_decay=0.7, save_freq_steps=1000)  # a round takes hours
    parser.without(decoder=decoders.PIL, download=False, dataset='coco', categories=[])
    add_network_args(parser)
    add_data_args(parser)
    add = partial(parser.add_argument, heading='Evaluation')
    add(
        '--eval',
        action=Switch,
        settle=lambda args, given: args.eval or args.predict is not None,
        help='only evaluate the checkpoint of --resume, and write predictions.json in --output_dir',
    )
    add(
        '--predict',
        type=config.path,
        metavar='PATH',
        at_resume='free',
        help='only find objects in pictures, a file or a folder, by the checkpoint of --resume, and draw them',
    )
    return parser


def add_network_args(parser: config.Parser) -> None:
    """The neck and the heads."""
    parser.flags['--input_size'].help = 'image side in pixels: of crops for training, and for relative positions'
    add = partial(parser.add_argument, heading='Model', of_network=True)
    add(
        '--pretrain_size',
        type=AT_LEAST_1,
        default=224,
        at_resume='warn',  # it is taken from what is resumed
        of_file='input_size',
        help='image side that the encoder has positions for; default: that of --finetune, else 224',
    )
    add = partial(add, at_resume='same')
    add('--rel_pos', action=Switch, default=True, help="relative positions in a ViT's attention")
    add('--neck', choices=('simple', 'fpn', 'c4'), help='default: simple for a plain ViT, else fpn')
    add('--box_head', choices=('2fc', '4conv1fc'), default='2fc', help='linear layers alone, or behind convolutions')
    add(
        '--norm',
        choices=('none', 'ln', 'bn', 'sync', 'frozen'),
        default='none',
        help='norm of neck and heads: of channels, of a process, of all; frozen: none, and fixed in the encoder',
    )
    add('--rpn_depth', type=AT_LEAST_1, default=1, help='convolutions of the region proposal network')
    add('--width', type=AT_LEAST_1, default=256, help='channels of the pyramid')
    add('--box_only', action=Switch, help='boxes alone, without masks')
    add('--detector_kwargs', action=KeyValues, help='more arguments of the detector')


def add_data_args(parser: config.Parser) -> None:
    """Where COCO lies, and how its images are resized."""
    add = partial(parser.add_argument, heading='Data', at_resume='free', type=config.path)
    add('--data_path', default=Path('data'), help='annotations/instances_{train,val}2017.json, train2017/, val2017/')
    for split in ('train', 'val'):
        add(f'--{split}_json', metavar='PATH', help='annotations; default: those of --data_path')
        add(f'--{split}_images', metavar='PATH', help='folder of the images; default: that of --data_path')
    add = partial(parser.add_argument, heading='Data')
    add('--keep_empty', action=Switch, at_resume='same', help='train with images that have no object, too')
    add = partial(parser.add_argument, heading='Augmentation')
    add(
        '--augment',
        choices=('lsj', 'shortest_edge', 'crop', 'none'),
        default='lsj',
        at_resume='same',
        help="large-scale jitter, one of --train_sizes, or the same with Swin's crop half of the time",
    )
    add(
        '--scale_range',
        type=ABOVE_0,
        nargs=2,
        default=[0.1, 2.0],
        help='smallest and largest factor of --input_size that --augment lsj makes an image fit',
    )
    sides = [640, 672, 704, 736, 768, 800]
    add('--train_sizes', type=AT_LEAST_1, nargs='+', default=sides, help='short sides of an image, to draw from')
    add = partial(parser.add_argument, heading='Evaluation', of_network=True)
    add('--test_size', type=AT_LEAST_1, default=800, help='pixels of the short side of an image to be tested')
    add('--max_size', type=AT_LEAST_1, default=1333, help='most pixels of its long side, in training too')


# --------------------------------------------------------------------------
# parts


def create_detector(args: argparse.Namespace, num_classes: int) -> nn.Module:
    """The network that the arguments describe, with weights that depend on the seed alone."""
    method = find_method(args.model)
    if not hasattr(method, 'create_backbone'):
        raise UserError(f'{method.__name__}.py has no create_backbone: {args.model} cannot learn to detect')
    vit = '_vit_' in args.model
    if not (vit or args.rel_pos):
        raise UserError(f'--no_rel_pos is for plain ViTs: {args.model} is none')
    rng.seed_all(args.seed, rng.INIT)
    encoder = build.construct(
        method.create_backbone,
        args.model,
        drop_path_rate=args.drop_path,
        img_size=args.pretrain_size,
        **(dict(rel_pos=args.rel_pos, rel_pos_size=args.input_size) if vit else {}),
        model_kwargs=args.model_kwargs,
    )
    names = dict(none=None, sync='bn')
    return build.construct(
        detector.create_detector,
        encoder,
        name=f'the detector of {args.model}',
        num_classes=num_classes,
        neck=args.neck,
        box_head=args.box_head,
        norm=names.get(args.norm, args.norm),
        rpn_depth=args.rpn_depth,
        width=args.width,
        masks=not args.box_only,
        model_kwargs=args.detector_kwargs,
        flag='--detector_kwargs',
    )


def check_detector(core: nn.Module, args: argparse.Namespace) -> None:
    """Raise UserError for a network whose maps would fail in the first step, or in an evaluation; and for its sizes."""
    short = {'test_size': args.test_size}
    if args.augment in ('shortest_edge', 'crop') and not args.eval:
        short['train_sizes'] = max(args.train_sizes)
    for name, size in short.items():
        if size > args.max_size:
            line = f'--{name} {size} is a short side, and --max_size {args.max_size} a long one: it is too small'
            raise UserError(line)
    if not args.eval:
        build.check_forward(core.backbone, args, args.input_size)
    build.check_forward(core.backbone.eval(), args, args.test_size)
    core.backbone.train()


def detection_loss(training: Training) -> LossOf:
    """What the engine calls for the loss of a batch: normalise, pad, forward, and add up."""

    def loss_of(batch: tuple[list[Tensor], list[dict]]) -> tuple[Tensor, dict[str, Tensor]]:
        imgs, targets = batch  # uint8 [3, h, w] each; boxes, labels and masks of each
        imgs, sizes = detector.batch_images(imgs, training.normalise, training.core.size_divisible)
        targets = [target | {'size': size} for target, size in zip(targets, sizes, strict=True)]
        with training.autocast():
            losses = training.model(imgs, targets)
        return sum(losses.values()), {name.removeprefix('loss_'): loss for name, loss in losses.items()}

    return loss_of


# --------------------------------------------------------------------------
# evaluation and prediction


def trained_network(args: argparse.Namespace) -> tuple[argparse.Namespace, nn.Module, CocoSplit, list[str]]:
    """The arguments, completed by the checkpoint of --resume, its network, what to test it on, and lines to tell.

    Rank 0 alone reads the file, and has its weights.
    """
    source = dist.from_main(lambda: checkpoint.Source.read(args.resume), checkpoint.Source.outline)
    source.expect('detect', f'has no detector: train it, with --finetune {args.resume}')
    args = source.complete(args, get_args_parser())
    classes = source.classes
    if args.predict:
        if not classes:
            raise UserError(f'{source.path} does not name its classes, which --predict needs: --eval can do without')
        split = detecting.pictures_of(args, classes, source.origin.args.get('categories') if source.origin else None)
    else:
        [split] = coco.splits(args, ['val'])
        if classes not in (None, split.classes):
            differing = named.difference(classes, split.classes, source.path, str(args.data_path))
            raise UserError(f'{source.path} was trained for other classes: {differing}')
    if args.box_only and source.origin and not source.origin.args.get('box_only'):
        raise UserError(f'{source.path} was trained with masks: without --box_only')
    with source.expected(args):
        with rng.undrawn():
            core = create_detector(args, len(split.classes))
            check_detector(core, args)
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
    files = labelling.files_of(args, split.images, 'drawings') if args.predict else []
    agreement.check(args, device, val=split)
    for line in told:
        info(line)
    core = core.to(device, memory_format=memory_format(args, core))
    dist.share(core.state_dict().values())
    finder, batches = Finder(core, args, device), detecting.test_loader(split, args, device)
    if args.predict:
        detecting.write(finder, batches, files, split, args.output_dir / 'predictions')
    else:
        file = args.output_dir / 'predictions.json'
        stats = detecting.evaluate(finder, batches, split, args.box_only, into=file)
        [_, _, *kinds], *rows = detecting.class_table(stats, split)
        for _, name, *figures in rows:
            of_kinds = (f'{kind} {figure or "-":>6}' for kind, figure in zip(kinds, figures, strict=True))
            info(f'  {printable(name, 40):40}  {"  ".join(of_kinds)}')
        detecting.report(stats, split, batches.dataset.reader)
        alone = '' if args.box_only else '; predictions_masks.json, beside it, is for the AP of masks'
        info(f'the detections are in {file}, as pycocotools reads them{alone}')
    dist.cleanup()


# --------------------------------------------------------------------------
# training


@resources.program
def main(args: argparse.Namespace) -> dry_run.Estimate | None:
    """Train, test or find, as the arguments say; with --dry_run, only try the training."""
    if args.eval:
        return test_checkpoint(args)
    method = find_method(args.model)
    config.check_common_args(args)
    for name in ('train', 'val'):
        config.check_apart('output_dir', args.output_dir, folder_of(args, name), 'folder', f'--{name}_images')
    train, val = coco.splits(args)
    args = steps.in_passes(args, build.epoch_batches(args, len(train.images)).pass_steps)
    config.check_schedule(args)
    args = argparse.Namespace(**vars(args) | {'categories': train.categories})
    sampler = build.epoch_batches(args, len(train.images), coco.kinds(train, args))
    with Run(args, 'detect', sampler, get_args_parser().roles, train.classes) as run:
        if run.nothing_left():
            return
        run.notices += [*train.notes, *val.notes]
        make = partial(create_detector, num_classes=len(train.classes))
        args, core = run.first_network(make, check_detector, get_args_parser(), 'finetune', new_classes=True)
        rules = build.param_rules(method, core, args.rule_kwargs)
        ema = WeightAverage(core, args.ema_decay) if args.use_ema else None
        build.apply_options(core, args)
        run.notices += build.statistics_notices(args, core, sampler)

        device = run.join(core, ema, train=train, val=val)
        core = build.on_device(core, args, device)
        optimizer = build.guarded_optimizer(core, rules, args, device)
        model = build.in_parallel(core, args, device)
        training = Training(args, core, model, optimizer, sampler, device, ema)

        images = coco.training_images(train, args, Reader.of(args))
        run.resume(training, images)
        batches = build.loader(images, sampler, args, device)
        loss_of = detection_loss(training)
        networks = {'test': core} | ({'test_ema': ema.module} if ema else {})
        finders = {name: Finder(network, args, device) for name, network in networks.items()}
        val_batches = detecting.test_loader(val, args, device)
        if args.dry_run:
            trial = partial(forward, training, loss_of=loss_of)
            return dry_run.report(run, batches, trial, detecting.pixels(val, args), train=train, val=val)

        for epoch in run.epochs():
            stats = train_one_epoch(training, run, batches, epoch, loss_of)
            run.save_before_evaluation(epoch)
            tests = {
                name: detecting.evaluate(finder, val_batches, val, args.box_only) for name, finder in finders.items()
            }
            detecting.report(tests['test'], val, val_batches.dataset.reader)
            run.keep_best(epoch, networks, tests, 'box_AP')
            info(f'best box AP: {run.record["best_box_AP"]:.2f}')
            if dist.is_main():
                predictions.put(args.output_dir / 'classes.csv', detecting.class_table(tests['test'], val))
                run.add_picture(epoch, detecting.drawing(finders['test'], val_batches.dataset), 'detections')
            values = {f'train_{name}': value for name, value in stats.items()}
            values |= {f'{name}_{key}': test[key] for name, test in tests.items() for key in detecting.numbers(test)}
            values |= {'AP_of_classes': detecting.class_figures(tests['test'], val)}
            params = sum(p.numel() for p in core.parameters() if p.requires_grad)
            run.after_epoch(epoch, **values, n_parameters=params)
        info(f'done; best box AP {run.record["best_box_AP"]:.2f}; checkpoints and logs are in {args.output_dir}')
        dist.cleanup()


if __name__ == '__main__':
    run_main(lambda: main(get_args_parser().parse(stage='detect')))
