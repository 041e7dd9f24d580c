"""Fine-tuning of a pretrained encoder, training from random weights (no `--finetune`), and evaluation (`--eval`).

Examples:
    python main_finetune.py --config scripts/recipes/NAME.yaml --finetune runs/NAME/checkpoint-last.pth --data_path ...
    torchrun --nproc_per_node=8 main_finetune.py --eval --resume runs/NAME/checkpoint-best.pth --model ...
"""

import argparse
import math
import re
from collections.abc import Callable

import torch
from PIL import Image
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from engine_finetune import evaluate, train_one_epoch
from main_pretrain import check_forward, construct, find_method, param_rules
from util import checkpoint, config, dist, rng
from util.data import datasets, named
from util.data.images import Reader
from util.errors import UserError, run_main
from util.log import info
from util.optim import WeightAverage
from util.run import Run
from util.weights import Origin, download, load_published, printable


def get_args_parser() -> config.Parser:
    parser = config.Parser(__doc__.partition('\n')[0], other='main_pretrain')
    config.add_common_args(
        parser,
        model='mirl_vit_base_depth48',
        batch_size=64,
        epochs=50,
        blr=1e-3,
        warmup_epochs=5,
        min_lr=1e-6,
        betas=[0.9, 0.999],
    )
    add = parser.add_argument
    add(
        '--finetune',
        default='',
        metavar='PATH',
        help=f'pretrained checkpoint, own or published; default: random weights. A path, or {download.FORM}',
    )
    add('--eval', action='store_true', help='only evaluate the checkpoint given by --resume')
    add('--dataset', choices=named.SOURCES, default='folder', help='what --data_path holds, and in which layout')
    add('--download', action='store_true', help='get what is missing there, where torchvision can')
    add('--nb_classes', type=int, help="number of classes; default: the data's")
    add('--global_pool', action='store_true', default=True, help='classify the average of the patch tokens')
    add('--cls_token', action='store_false', dest='global_pool', help='classify the class token')
    add('--drop_path', type=float, default=0.1, help='stochastic depth of the last block; earlier ones in proportion')
    add('--layer_decay', type=float, default=0.75, help='factor of the learning rate from each layer to the one below')
    add('--use_ema', action='store_true', help='also keep and evaluate an average of the weights; --eval: prefer it')
    add('--ema_decay', type=float, default=0.9998, help='its decay, reached from below: (1 + t) / (10 + t) at step t')
    add('--ema_warmup_epochs', type=float, default=0.0, help='epochs in which the decay is reached linearly instead')
    add('--ema_warmup_ratio', type=float, default=0.9, help='share of the decay that such a warm-up starts from')

    add('--crop_scale', type=float, nargs=2, default=[0.08, 1.0], help="smallest and largest share of the image's area")
    add('--eval_size', type=int, help='evaluation: image side in pixels; default: --input_size')
    add('--crop_pct', type=float, default=0.875, help='evaluation: the centre crop as a share of the resized side')
    add(
        '--repeated_aug', type=int, default=1, help='copies of an image, augmented apart, in a row; epochs stay as long'
    )
    add('--color_jitter', type=float, help='strength; used without --aa only')
    add('--aa', default='rand-m9-mstd0.5-inc1', help="timm's auto-augment policy, or 'none'")
    add('--criterion', choices=('ce', 'bce'), default='ce', help='cross-entropy, or binary ones summed over classes')
    add('--smoothing', type=float, default=0.1, help='label smoothing')
    add('--reprob', type=float, default=0.25, help='probability of random erasing')
    add('--remode', choices=('const', 'rand', 'pixel'), default='pixel', help='what erased pixels become')
    add('--recount', type=int, default=1, help='largest number of erased boxes')
    add('--mixup', type=float, default=0.0, help='alpha; 0: off')
    add('--cutmix', type=float, default=0.0, help='alpha; 0: off')
    add('--cutmix_minmax', type=float, nargs=2, help='smallest and largest share of a side; overrides --cutmix')
    add('--mixup_prob', type=float, default=1.0, help='share of batches that are mixed')
    add('--mixup_switch_prob', type=float, default=0.5, help='share of cutmix where both are on')
    add('--mixup_mode', choices=('batch', 'pair', 'elem'), default='batch', help='what shares one mixing ratio')
    # MAE's scripts pass these: evaluation is always distributed, and --resplit has no effect there either
    add('--dist_eval', action='store_true', help=argparse.SUPPRESS)
    add('--resplit', action='store_true', help=argparse.SUPPRESS)
    return parser


def create_classifier(args: argparse.Namespace, num_classes: int) -> nn.Module:
    """The classifier that the arguments describe, with weights that depend on the seed alone."""
    method = find_method(args.model)
    rng.seed_all(args.seed, rng.INIT)
    options = {} if args.global_pool else {'global_pool': 'token'}
    return construct(
        method.create_classifier,
        args.model,
        num_classes=num_classes,
        drop_path_rate=args.drop_path,
        img_size=args.input_size,
        **options,
        model_kwargs=args.model_kwargs,
    )


def check_steps(core: nn.Module, args: argparse.Namespace) -> None:
    """Raise UserError for a classifier that would fail in its first step, or in its evaluation."""
    if not args.eval:
        check_forward(core, args, args.input_size)
    if args.eval or args.eval_size not in (None, args.input_size):
        check_forward(core.eval(), args, args.eval_size or args.input_size)
        core.train()


def labelled_splits(args: argparse.Namespace, splits: tuple[str, ...]) -> tuple[list[tuple], int]:
    """(images, labels) of each split, and the number of classes. Raises UserError where they differ or do not fit."""
    found = [named.labelled_images(args.dataset, args.data_path, split, args.download) for split in splits]
    classes = found[0][2]
    for split, (_, _, others) in zip(splits, found, strict=True):
        if others != classes:
            differing = sorted(set(classes) ^ set(others))
            raise UserError(f'the classes of {splits[0]}/ and {split}/ in {args.data_path} differ: {differing[:5]}')
    if args.nb_classes is not None and args.nb_classes < len(classes):
        raise UserError(f'--nb_classes {args.nb_classes}, but {args.data_path} has {len(classes)} classes')
    return [(images, labels) for images, labels, _ in found], args.nb_classes or len(classes)


def batch_augmentation(args: argparse.Namespace, num_classes: int, device: torch.device) -> Callable:
    """Random erasing, then mixup or cutmix, of a normalised batch on the device: timm's."""
    erase = RandomErasing(args.reprob, mode=args.remode, max_count=args.recount, device=device)
    mix = None
    if mixes(args):
        mix = Mixup(
            mixup_alpha=args.mixup,
            cutmix_alpha=args.cutmix,
            cutmix_minmax=args.cutmix_minmax,
            prob=args.mixup_prob,
            switch_prob=args.mixup_switch_prob,
            mode=args.mixup_mode,
            label_smoothing=args.smoothing,
            num_classes=num_classes,
        )

    def augment(imgs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        imgs = erase(imgs)
        return mix(imgs, labels) if mix else (imgs, labels)

    return augment


def train_transform(args: argparse.Namespace) -> Callable:
    """timm's training transform. Raises UserError for a policy that timm does not know."""
    aa = None if args.aa == 'none' else args.aa
    try:
        if aa and not all(re.fullmatch(r'[a-z]+\d[\d.]*|tweights|t3aw', part) for part in aa.split('-')[1:]):
            raise ValueError  # timm passes over what it does not understand
        transform = datasets.finetune_transform(
            args.input_size, args.crop_scale, args.hflip, args.color_jitter, aa, args.mean
        )
        transform(Image.new('RGB', (args.input_size, args.input_size)))
    except (AssertionError, KeyError, ValueError) as error:
        raise UserError(f"--aa {args.aa}: not a policy of timm's, like rand-m9-mstd0.5-inc1, or 'none'") from error
    return transform


def mixes(args: argparse.Namespace) -> bool:
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None


def criterion(args: argparse.Namespace) -> nn.Module:
    """Cross-entropy: with soft targets under mixup (which smooths them itself), smoothed, or plain. Or binary ones."""
    if args.criterion == 'bce':
        return BinaryCrossEntropy(args.smoothing, sum_classes=True)
    if mixes(args):
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(args.smoothing) if args.smoothing else nn.CrossEntropyLoss()


def val_loader(args: argparse.Namespace, images: datasets.Images, labels: list[int], pin_memory: bool) -> DataLoader:
    """This rank's share of the validation images, every image on exactly one rank."""
    here = dist.place()
    transform = datasets.eval_transform(args.eval_size or args.input_size, args.crop_pct, args.max_pixels)
    reader = Reader.of(args, 'bad_images_val.txt')
    if here.rank == 0:
        reader.start_anew()  # each evaluation meets all of them
    images = datasets.ImageFiles(images, labels, transform, args.seed, reader, replace=False)
    batches = datasets.eval_batches(len(images), args.batch_size, here.rank, here.world_size)
    return datasets.loader(images, batches, args.num_workers, pin_memory, args.dist_timeout)


def report(stats: dict[str, float]) -> None:
    """MAE's closing lines."""
    info(f'* Acc@1 {stats["acc1"]:.3f} Acc@5 {stats["acc5"]:.3f} loss {stats["loss"]:.3f}')
    info(f'Accuracy of the network on the {stats["images"]} test images: {stats["acc1"]:.1f}%')


def evaluate_checkpoint(args: argparse.Namespace) -> None:
    """`--eval`: load `--resume`, every weight of it, and evaluate it on the validation images."""
    if not args.resume or args.resume == 'auto':
        raise UserError('--eval needs the checkpoint to evaluate: --resume PATH')
    if args.finetune:
        raise UserError(f'--eval trains nothing from --finetune {args.finetune}: to evaluate it, --resume PATH')
    config.check_common_args(args)
    [val], num_classes = labelled_splits(args, ('val',))
    core = create_classifier(args, num_classes)
    check_steps(core, args)
    loaded = load_published(core, args.resume, ema=args.use_ema)
    if loaded.missing:
        origin = f'; it was written by {loaded.origin}' if loaded.origin else ''
        raise UserError(
            f'{args.resume} cannot be evaluated as {args.model} with {num_classes} classes: {loaded}{origin}'
        )
    batches = val_loader(args, *val, args.pin_mem and torch.device(args.device).type == 'cuda')
    device = dist.init(args.device, args.dist_url, args.dist_timeout)
    info(str(loaded))
    if loaded.origin:
        notice_differences(args, loaded.origin)
    memory_format = config.memory_format(args, core)
    statistics = datasets.statistics(args.mean, args.std, device, memory_format)
    core = core.to(device, memory_format=memory_format)
    report(evaluate(core, batches, statistics, config.amp_dtype(args, device)))
    dist.cleanup()


def notice_differences(args: argparse.Namespace, origin: Origin) -> None:
    """Say, in a line, what decides how a network sees an image and was otherwise when it was fine-tuned."""
    names = ('input_size', 'eval_size', 'crop_pct', 'mean', 'std', 'model_kwargs', 'global_pool')
    then, now = origin.args, vars(args)
    differing = [name for name in names if name in then and then[name] != now[name]]
    if differing:
        listed = '; '.join(f'{name}: {printable(then[name])} then, {now[name]} now' for name in differing)
        info(f'not as it was fine-tuned: {listed}')


def main(args: argparse.Namespace) -> None:
    """Fine-tune, or evaluate, as the arguments say."""
    method = find_method(args.model)
    if args.eval:
        return evaluate_checkpoint(args)
    (train, val), num_classes = labelled_splits(args, ('train', 'val'))
    if mixes(args) and args.batch_size % 2:
        raise UserError(
            f'mixup and cutmix pair the images of a batch: --batch_size must be even, got {args.batch_size}'
        )
    transform = train_transform(args)
    with Run(args, 'finetune', len(train[0])) as run:
        core = create_classifier(args, num_classes)
        check_steps(core, args)
        loaded = load_published(core, args.finetune) if args.finetune and not run.saved else None
        ema_steps = args.ema_warmup_epochs * run.sampler.steps
        ema = WeightAverage(core, args.ema_decay, ema_steps, args.ema_warmup_ratio) if args.use_ema else None
        run.start(core, param_rules(method, core, args.rule_kwargs), args.layer_decay, ema)
        if loaded:
            info(str(loaded))

        batches = run.loader(*train, transform)
        val_batches = val_loader(args, *val, run.pin_memory)
        augment, loss = batch_augmentation(args, num_classes, run.device), criterion(args)
        for epoch, logger in run.epochs():
            stats = train_one_epoch(run, batches, epoch, logger, augment, loss)
            run.save(checkpoint.LAST, epoch, logger.steps, logger, closed=False)  # an evaluation takes long
            run.stop_if_asked(epoch, logger.steps, logger)
            networks = {'test': run.core} | ({'test_ema': run.ema.module} if run.ema else {})
            tests = {name: evaluate(net, val_batches, run.statistics, run.amp_dtype) for name, net in networks.items()}
            report(tests['test'])
            keep_best(run, epoch, networks, tests)
            values = {f'train_{name}': value for name, value in stats.items()}
            values |= {f'{name}_{key}': value for name, test in tests.items() for key, value in test.items()}
            run.log.scalars(run.axis(epoch + 1, 0), **{k: v for k, v in values.items() if k.startswith('test')})
            params = sum(p.numel() for p in core.parameters() if p.requires_grad)
            run.after_epoch(epoch, logger, **values, n_parameters=params)
        info(f'done; best accuracy {run.record["best_acc1"]:.2f}%; checkpoints and logs are in {args.output_dir}')
        dist.cleanup()


def keep_best(run: Run, epoch: int, networks: dict[str, nn.Module], tests: dict[str, dict]) -> None:
    """Write `checkpoint-best.pth`, weights alone, when the best of the networks beats all before."""
    name = max(tests, key=lambda key: tests[key]['acc1'])
    acc1 = tests[name]['acc1']
    if acc1 > run.record.get('best_acc1', -math.inf):
        run.record |= {'best_acc1': acc1, 'best_epoch': epoch}
        if dist.is_main():
            state = {
                'model': networks[name].state_dict(),
                'weights': name,
                'args': config.plain(run.args),
                **run.record,
            }
            checkpoint.save(run.args.output_dir / checkpoint.BEST, state)
    info(f'Max accuracy: {run.record["best_acc1"]:.2f}%')


if __name__ == '__main__':
    run_main(lambda: main(get_args_parser().parse(stage='finetune')))
