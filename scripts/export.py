"""Hand a network on: write it as a folder that timm opens, or as plain torch weights.

Examples:
    python scripts/export.py runs/NAME/checkpoint-last.pth exported
    python scripts/export.py --model mirl_vit_base_depth48 vit_b48_800.pd exported
    python -c "import timm; timm.create_model('local-dir:exported', pretrained=True)"
"""

import argparse
import sys
from functools import partial
from pathlib import Path

from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import main_finetune
import main_pretrain
from util import build, checkpoint, config, console, digests, resources
from util.errors import UserError, listed, printable, run_main
from util.weights import Report, check_free, export, file_of, load_published

OPENING_TIMM = """
timm 1.0.26 or newer opens this folder, without any other code:

```python
import timm

network = timm.create_model('local-dir:FOLDER', pretrained=True).eval()  # num_classes=10: with a new head
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(network))
```
"""
OPENING_TORCH = """
```python
import torch

weights = torch.load('FOLDER/model.pth', weights_only=True)
```

The names are those of the models of the project that wrote this.
"""
MERGING = """
Patch merging is in the order of the original Swin and of timm: the four neighbours column by column. A pretraining with
`coords=published`, the default of the method's code, had merged them row by row; as in the published fine-tuning, its
weights are taken as they are. The norms have two epsilons, timm's have one. For features that agree to 1e-6:

```python
for name, module in network.named_modules():
    if isinstance(module, torch.nn.LayerNorm):
        module.eps = 1e-5 if name.endswith('norm2') else 1e-6
```
"""
LICENCE = """
The weights have the licence of what they come from, which was not looked up. The licence of the project that wrote this
folder covers its code alone.
"""


def get_args_parser() -> config.Parser:
    parser = config.Parser(__doc__, other='main_finetune')
    add = parser.add_argument
    add('checkpoint', type=config.source, help='own or published, or an export: a path, or a URL#sha256=...')
    add('out', type=config.path, help='the folder to write; an earlier export in it is replaced')
    add = partial(add, heading='Export')
    add('--format', choices=('timm', 'torch'), help="timm's folder, or plain torch weights; default: timm if it has it")
    add(
        '--head',
        action=config.Switch,
        default=None,
        help="the classifier's last layer; default: on if the file has one",
    )
    add('--with_decoder', action=config.Switch, help='the whole pretraining model, as torch weights')
    add('--use_ema', action=config.Switch, heading='Weight average', help='take the averaged weights of the file')
    config.add_model_args(parser)
    main_pretrain.add_target_args(parser)
    parser.take(main_finetune.get_args_parser(), 'nb_classes', 'global_pool', 'eval_size', 'crop_pct')
    return parser


@resources.program
def main(args: argparse.Namespace) -> None:
    """Load, write, compare."""
    if args.with_decoder and (args.format == 'timm' or args.head):
        raise UserError('--with_decoder writes a pretraining model, which timm has none of and which has no head')
    check_free(args.out)
    source = checkpoint.Source.read(args.checkpoint)
    if args.with_decoder:
        source.expect('pretrain', 'is without decoders')
    args = source.complete(args, get_args_parser())
    if args.with_decoder:
        with source.expected(args):
            network = main_pretrain.checked_model(args)
            report = load_published(network, source.container, ema=args.use_ema, label=source.path)
        kwargs, num_classes = args.model_kwargs, 0
    else:
        network, report, kwargs, num_classes = main_finetune.network_of(source, args, args.head)
        build.check_forward(network.eval(), args, args.eval_size or args.input_size)
    for line in (report, *source.notices):
        console.say(str(line))

    size = args.eval_size or args.input_size
    names = source.origin and source.origin.classes
    classes = {'classes': names} if num_classes and names else {}
    whole = f'classifier of {num_classes} classes' if num_classes else 'encoder'
    title = f'{args.model}, {"pretraining model" if args.with_decoder else whole}'
    facts = rows(args, source, report, network, num_classes)
    found = export(
        network,
        args.out,
        for_timm=for_timm(args, network, num_classes),
        num_classes=num_classes,
        images=dict(input_size=size, mean=args.mean, std=args.std, crop_pct=args.crop_pct),
        origin=origin_of(args, kwargs, num_classes) | classes,
        card=partial(card, title, facts, MERGING if hasattr(network, 'timm_state_dict') else ''),
    )
    how = 'torch weights' if found is None else f"timm's features differ by {found:.1e} of their size"
    console.say(f'{title}: written to {args.out}; {how}')


def for_timm(args: argparse.Namespace, network: nn.Module, num_classes: int) -> bool:
    """Whether timm's folder is written. Raises UserError where it is asked for and cannot be."""
    reason, instead = '', ''
    if not hasattr(network, 'timm_recipe'):
        reason = f'timm has no network like {args.model}'
    elif num_classes and hasattr(network, 'timm_state_dict'):
        reason = (
            f"{args.model} norms the mean of its tokens, timm's Swin averages normed ones: its answers would differ"
        )
        instead = ', or --no_head for its encoder'
    if reason and args.format == 'timm':
        raise UserError(f'{reason}; give --format torch{instead}')
    if reason and args.format is None and not args.with_decoder:
        console.say(f'{reason}; so these are torch weights' + '; --no_head writes its encoder for timm' * bool(instead))
    return not reason and args.format != 'torch' and not args.with_decoder


def origin_of(args: argparse.Namespace, model_kwargs: dict, num_classes: int) -> dict:
    """What a later reader of the folder learns, in the form of a checkpoint of our own."""
    known = {name: getattr(args, name) for name in sorted(get_args_parser().of_network)}
    known |= {'model_kwargs': model_kwargs, 'nb_classes': num_classes or None}
    stage, weights = ('finetune', 'model') if num_classes else ('pretrain', 'encoder')
    return {'args': known, 'run': {'stage': stage}, 'weights': 'model' if args.with_decoder else weights}


# --------------------------------------------------------------------------
# the folder's README


def rows(
    args: argparse.Namespace, source: checkpoint.Source, report: Report, network: nn.Module, num_classes: int
) -> dict[str, str]:
    """Where the weights come from, and what they are."""
    method, names = main_pretrain.find_method(args.model), (source.origin and source.origin.classes) or []
    options = config.as_flags({'model_kwargs': args.model_kwargs}) if args.model_kwargs else ''
    size = f'{args.eval_size or args.input_size} pixels'
    crop = f', centre crop {args.crop_pct:g}, bicubic' if num_classes else ''
    scale = f'mean {config.in_words(args.mean)}, deviation {config.in_words(args.std)} of values in 0..1'
    fresh = [f'`{name}`' for name in report.missing if name in network.state_dict()]
    parameters = sum(p.numel() for p in network.parameters())
    return {
        'weights from': f'`{printable(Path(source.path).name)}`, SHA-256 `{digests.sum_of(file_of(args.checkpoint))}`',
        'which holds': report.format + (f', written by `{source.origin}`' if source.origin else ''),
        'trained for': position(source.container),
        'method': (method.__doc__ or method.__name__).partition('\n')[0],
        'network': f'`{args.model}`, {parameters / 1e6:.1f} M parameters' + f', `{options}`' * bool(options),
        'images': f'{size}{crop}, {scale}',
        'classes': f'{num_classes}: {listed(names, 10) or "without names"}' if num_classes else '',
        'as initialised': ', '.join(fresh),
    }


def position(container: dict) -> str:
    """How long a run of our own had trained; '' for other files."""
    epoch, step, steps = (container.get(name) for name in ('epoch', 'step', 'steps'))
    if not all(isinstance(number, int) for number in (epoch, step, steps)):
        return ''
    return f'{epoch + (step == steps)} epochs' + f' and {step} steps' * (0 < step < steps)


def card(title: str, rows: dict[str, str], notes: str, difference: float | None) -> str:
    """The text. `difference`: between timm's features and ours, where the folder is timm's."""
    if difference is not None:
        rows |= {'compared with timm': f'features differ by {difference:.1e} of their size'}
    table = ''.join(f'| {name} | {value} |\n' for name, value in rows.items() if value)
    opening = OPENING_TORCH if difference is None else OPENING_TIMM + notes
    return f'# {title}\n\n| | |\n|---|---|\n{table}{opening}{LICENCE}'


if __name__ == '__main__':
    run_main(lambda: main(get_args_parser().parse(stage='finetune')))
