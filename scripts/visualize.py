"""Draw what a pretraining model reconstructs, as one labelled PNG.

Examples:
    python scripts/visualize.py --model mirl_vit_base --checkpoint runs/NAME/checkpoint-last.pth photo.jpg
    python scripts/visualize.py --model mirl_vit_tiny --input_size 32 --checkpoint ... --count 8 runs/digits/val
"""

import argparse
import functools
import operator
import sys
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import main_pretrain
from util import checkpoint, config, console, dist, resources
from util.data import named
from util.data.images import Reader
from util.errors import UserError, run_main
from util.pictures import Pictures
from util.weights import load_published


def get_args_parser() -> config.Parser:
    parser = config.Parser(__doc__, main=main_pretrain.get_args_parser())
    add = parser.add_argument
    add('images', nargs='+', type=config.path, help='image files, or folders or tar shards of them')
    add(
        '--checkpoint',
        type=config.source,
        required=True,
        metavar='PATH',
        help='own or published, with its decoders: a path, or a URL#sha256=...',
    )
    add('--use_ema', action=config.Switch, heading='Weight average', help='take its averaged weights')
    add('--output', type=config.path, default=Path('reconstruction.png'), help='the PNG to write')
    add('--count', type=config.AT_LEAST_1, default=6, help='most images to draw, taken evenly from all')
    add('--config', type=config.path, metavar='YAML', help="pretraining's recipe, for the model and its input")
    config.add_model_args(parser)
    main_pretrain.add_target_args(parser)
    return parser


@resources.program
def main(args: argparse.Namespace) -> None:
    """Load, reconstruct, draw."""
    device = dist.own_device(args.device)
    if not args.output.parent.is_dir():
        raise UserError(f'cannot write {args.output}: there is no folder {args.output.parent}')
    stores = [named.images_at(path) for path in args.images]
    if len({*map(type, stores)}) > 1:
        raise UserError('the images are files and folders, or shards, not both')
    files = functools.reduce(operator.add, stores)
    source = checkpoint.Source.read(args.checkpoint)
    source.expect('pretrain', 'is without the decoders that pictures need')
    args = source.complete(args, get_args_parser())
    with source.expected(args):
        core = main_pretrain.checked_model(args)
        loaded = load_published(core, source.container, ema=args.use_ema, label=source.path)
    for line in (loaded, *source.notices):
        console.say(str(line))
    picture = Pictures(core, files, args, Reader(args.max_pixels), args.count).draw(core.to(device), device)
    try:
        Image.fromarray(picture).save(args.output)
    except (OSError, ValueError) as error:
        raise UserError(f'cannot write {args.output}: {error}') from error
    console.say(f'{min(len(files), args.count)} of {len(files)} images drawn in {args.output}')


if __name__ == '__main__':
    run_main(lambda: main(get_args_parser().parse(stage='pretrain')))
