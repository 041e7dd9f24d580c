"""Draw what a pretraining model reconstructs, or what a detector has found, as one labelled PNG.

Examples:
    python scripts/visualize.py --model mirl_vit_base --checkpoint runs/NAME/checkpoint-last.pth photo.jpg
    python scripts/visualize.py --model mirl_vit_tiny --input_size 32 --checkpoint ... --count 8 runs/digits/val
    python scripts/visualize.py --detections runs/NAME/predictions.json --annotations instances_val2017.json val2017
"""

import argparse
import functools
import json
import operator
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import main_pretrain
from util import checkpoint, config, console, detecting, dist, pictures, resources
from util.data import coco, named
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
        metavar='PATH',
        help='own or published, with its decoders: a path, or a URL#sha256=...',
    )
    found = functools.partial(add, heading='Detections', type=config.path, metavar='JSON')
    found('--detections', help='draw what scripts/finetune_detection.py --eval has found, without a checkpoint')
    found('--annotations', help='what is annotated in these images, a folder: of COCO')
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
    if not args.output.parent.is_dir():
        raise UserError(f'cannot write {args.output}: there is no folder {args.output.parent}')
    if bool(args.checkpoint) == bool(args.detections):
        raise UserError('give --checkpoint PATH, for what it reconstructs, or --detections JSON, for what was found')
    picture, drawn, count = detections(args) if args.detections else reconstructions(args)
    try:
        Image.fromarray(picture).save(args.output)
    except (OSError, ValueError) as error:
        raise UserError(f'cannot write {args.output}: {error}') from error
    console.say(f'{drawn} of {count} images drawn in {args.output}')


def reconstructions(args: argparse.Namespace) -> tuple[np.ndarray, int, int]:
    """The picture [height, width, 3] uint8, how many images are in it, and of how many."""
    device = dist.own_device(args.device)
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
    return picture, min(len(files), args.count), len(files)


def detections(args: argparse.Namespace) -> tuple[np.ndarray, int, int]:
    """The same of images with what is annotated, and with what a list of COCO's results says."""
    if not args.annotations or len(args.images) > 1:
        raise UserError('--detections needs one folder of images, and what is annotated: --annotations JSON')
    results = results_in(args.detections)
    masks = bool(results) and all('segmentation' in result for result in results)
    images = coco.CocoFolder(args.images[0], args.annotations, train=False, masks=masks, reader=Reader(args.max_pixels))
    split = images.split
    if unknown := sorted({result['image_id'] for result in results} - {*split.ids.tolist()}):
        raise UserError(f'{args.detections} is of other images: {args.annotations} has no image {unknown[0]}')
    if unknown := sorted({result['category_id'] for result in results} - {*split.categories}):
        raise UserError(f'{args.detections} is of other classes: {args.annotations} has no category {unknown[0]}')

    def find(image: Tensor, about: dict) -> pictures.Objects:
        number = about['image_id']
        likely = [r for r in results if r['image_id'] == number and r['score'] >= detecting.DRAWN]
        try:
            return objects_of(likely, split.categories, about['size'], masks)
        except ValueError as error:
            raise UserError(f'{args.detections}: what was found in the image {number} {error}') from error

    return pictures.some_detected(find, images, args.count), min(args.count, len(images)), len(images)


def results_in(file: Path) -> list[dict]:
    """COCO's results, as far as they can be drawn. Raises UserError for another file."""
    try:
        results = json.loads(file.read_bytes())
        numbers = [(*r['bbox'], r['score'], r['image_id'], r['category_id']) for r in results]
        if not isinstance(results, list) or not all(len(row) == 7 and np.isfinite(row).all() for row in numbers):
            raise ValueError
    except OSError as error:
        raise UserError(f'{file} cannot be read: {error.strerror or error}') from error
    except (ValueError, TypeError, LookupError) as error:
        raise UserError(f'{file} is no list of results with image_id, category_id, bbox and score') from error
    return results


def objects_of(results: list[dict], categories: list[int], size: tuple[int, int], masks: bool) -> pictures.Objects:
    """Results of an image of this height and width, to be drawn."""
    boxes = torch.tensor([result['bbox'] for result in results], dtype=torch.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    labels = torch.tensor([1 + categories.index(result['category_id']) for result in results], dtype=torch.int64)
    found = {'boxes': boxes, 'labels': labels, 'scores': torch.tensor([result['score'] for result in results])}
    if masks:
        drawn = [coco.mask_of(result['segmentation'], *size) for result in results]
        found['masks'] = torch.from_numpy(np.array(drawn, bool).reshape(-1, *size))
    return found


if __name__ == '__main__':
    run_main(lambda: main(get_args_parser().parse(stage='pretrain')))
