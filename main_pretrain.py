"""Self-supervised pretraining.

python main_pretrain.py --config scripts/recipes/NAME.yaml --data_path /data/imagenet --output_dir runs/NAME
torchrun --nproc_per_node=8 main_pretrain.py --model mirl_vit_base_depth48 --batch_size 64 --data_path ...
"""

from util import start  # noqa: F401

# isort: split
import argparse
import itertools
from functools import partial
from types import ModuleType

from torch import nn

import models_a2mim
import models_localmim
import models_mirl
import models_mixmae
from engine_pretrain import forward, train_one_epoch
from util import build, config, dist, dry_run, resources, rng
from util.config import AT_LEAST_0, AT_LEAST_1, SHARE, Switch, number
from util.data import augment, datasets, named
from util.data.images import Reader
from util.errors import UserError, closest, run_main
from util.log import info
from util.neighbours import Neighbours, labelled_images
from util.pictures import Pictures
from util.run import Run
from util.training import Epoch, Training

# a method is one file; a new one is added here
METHODS = (models_mirl, models_a2mim, models_localmim, models_mixmae)


def find_method(name: str | None) -> ModuleType:
    """The models_*.py module whose `__all__` holds this name. Raises UserError with the closest ones."""
    if not name:
        raise UserError('--model NAME is needed; --model list shows them')
    for module in METHODS:
        if name in module.__all__:
            return module
    known = [n for module in METHODS for n in module.__all__]
    raise UserError(f'unknown --model {name}{closest(name, known) or "; known: " + ", ".join(known)}')


def create_model(args: argparse.Namespace) -> nn.Module:
    """The pretraining model that the arguments describe, with weights that depend on the seed alone."""
    rng.seed_all(args.seed, rng.INIT)
    make = getattr(find_method(args.model), args.model)
    given = {'mask_ratio': args.mask_ratio, 'norm_pix_loss': args.norm_pix_loss}
    options = {name: value for name, value in given.items() if value is not None}
    return build.construct(make, img_size=args.input_size, **options, model_kwargs=args.model_kwargs)


def create_classifier(args: argparse.Namespace) -> nn.Module:
    """The classifier that the pretraining model becomes, of two classes; its weights are to be replaced."""
    method = find_method(args.model)
    options = build.encoder_kwargs(method, args.model, args.model_kwargs, 'pretrain')
    make = method.create_classifier
    return build.construct(make, args.model, num_classes=2, img_size=args.input_size, model_kwargs=options)


def check_model(core: nn.Module, args: argparse.Namespace) -> None:
    """Raise UserError for a model that would fail in its first step."""
    build.check_forward(
        core, args, args.input_size, lambda n: (core.plan_from_noise(rng.picture_noise(core, args.seed, n)),)
    )


def checked_model(args: argparse.Namespace) -> nn.Module:
    """`create_model`, and `check_model`."""
    core = create_model(args)
    check_model(core, args)
    return core


def add_target_args(parser: config.Parser) -> None:
    """The model options that have flags of their own, in MAE's names."""
    add = partial(parser.add_argument, heading='Model', at_resume='same', of_network=True)
    add('--mask_ratio', type=SHARE, help="share of patches that is hidden; default: the model's")
    add('--norm_pix_loss', action=Switch, default=None, help="per-patch normalised target; default: the model's")


def get_args_parser() -> config.Parser:
    parser = config.Parser(__doc__, other='main_finetune', usage=config.USAGE)
    config.add_common_args(
        parser, batch_size=64, epochs=400, blr=1.5e-4, warmup_epochs=40, min_lr=0.0, betas=[0.9, 0.95]
    )
    add_target_args(parser)
    add = partial(parser.add_argument, heading='Augmentation')
    some = number(float, above=0, most=1)
    add('--crop_scale', type=some, nargs=2, default=[0.2, 1.0], help="smallest and largest share of the image's area")
    add('--interpolation', choices=('bicubic', 'bilinear'), default='bicubic', help='how the crop is resized')
    add = partial(parser.add_argument, heading='Output and resume', at_resume='free')
    add(
        '--init',
        type=config.source,
        metavar='PATH',
        help='weights to start from, with or without decoder: a path or URL#sha256=...; default: none, random weights',
    )
    add('--init_ema', action=Switch, help='start from the averaged weights in that file')
    add('--vis_freq', type=AT_LEAST_0, default=0, help='epochs between pictures of the same images; 0: none')
    add_knn_args(parser)
    return parser


def add_knn_args(parser: config.Parser) -> None:
    add = partial(parser.add_argument, heading='Evaluation', at_resume='free')
    add('--knn_freq', type=AT_LEAST_0, default=0, help="epochs between measures of the encoder's features; 0: none")
    add(
        '--knn_data',
        type=config.path,
        metavar='PATH',
        help='labelled images for them, laid out as --dataset says; default: --data_path',
    )
    sizes = 'how many images of training and validation they take, evenly from all classes'
    add('--knn_images', type=AT_LEAST_1, nargs=2, default=[5000, 1000], help=sizes)


def due(epoch: Epoch, every: int, epochs: int) -> bool:
    """Whether what comes every so many epochs, and after the last one, comes after this one."""
    return (epoch.number + 1) % every == 0 or epoch.number + 1 == epochs


@resources.program
def main(args: argparse.Namespace) -> dry_run.Estimate | None:
    """Pretrain as the arguments say; with --dry_run, only try it."""
    method = find_method(args.model)
    config.check_common_args(args)
    config.check_schedule(args)
    train = named.training_images(args)
    labelled = labelled_images(args)
    sampler = build.epoch_batches(args, len(train.images))
    with Run(args, 'pretrain', sampler, get_args_parser().roles) as run:
        if run.nothing_left():
            return
        run.notices += itertools.chain(*(split.notes for split in (train, *labelled.values())))
        args, core = run.first_network(create_model, check_model, get_args_parser(), 'init', new_decoder=True)
        rules = build.param_rules(method, core, args.rule_kwargs)
        build.apply_options(core, args)

        device = run.join(core, train=train, **labelled)
        core = build.on_device(core, args, device)
        optimizer = build.guarded_optimizer(core, rules, args, device)
        model = build.in_parallel(core, args, device)
        training = Training(args, core, model, optimizer, sampler, device)

        how = args.interpolation, args.decoder
        crop = augment.pretrain_transform(args.input_size, args.crop_scale, args.hflip, *how)
        images = datasets.ImageFiles(train.images, None, crop, args.seed, Reader.of(args))
        run.resume(training, images)
        batches = build.loader(images, sampler, args, device)
        if args.dry_run:
            return dry_run.report(run, batches, partial(forward, training), train=train)
        pictures = Pictures(core, train.images, args, images.reader) if args.vis_freq and dist.is_main() else None
        neighbours = Neighbours(create_classifier(args), labelled, args, device) if args.knn_freq else None

        for epoch in run.epochs():
            stats = train_one_epoch(training, run, batches, epoch)
            values = {f'train_{name}': value for name, value in stats.items()}
            if pictures and due(epoch, args.vis_freq, args.epochs):
                run.add_picture(epoch, pictures.draw(core, device))
            if neighbours and due(epoch, args.knn_freq, args.epochs):
                run.save_before_evaluation(epoch)
                values |= neighbours.measure(core)
            run.after_epoch(epoch, **values)
        info(f'done; checkpoints, log.txt and TensorBoard events are in {args.output_dir}')
        dist.cleanup()


if __name__ == '__main__':
    run_main(lambda: main(get_args_parser().parse(stage='pretrain')))
