"""Repeat the step in which a run diverged, in float32, and name the first module that was not finite.

Examples:
    python scripts/replay_step.py runs/NAME/diagnosis.json
    python scripts/replay_step.py runs/NAME/diagnosis.json --rank 3 --amp_dtype fp16 --device cuda
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from util import start  # noqa: F401

# isort: split
import engine_finetune
import engine_pretrain
import main_finetune
import main_pretrain
from scripts import finetune_detection, finetune_segmentation
from util import build, checkpoint, config, console, diagnosis, dist, resources
from util.data import augment, coco, datasets, decoders, named, segmentation
from util.data.images import Reader
from util.data.loader import collate
from util.errors import UserError, run_main
from util.training import Training

SHOWN = 5  # modules with the largest outputs


def get_args_parser() -> config.Parser:
    parser = config.Parser(__doc__)
    add = parser.add_argument
    add('diagnosis', type=config.path, help='the diagnosis.json of a run')
    add('--rank', type=int, help='of which rank; default: those whose loss was not finite, or else all')
    add('--amp_dtype', choices=('bf16', 'fp16', 'none'), default='none', help='autocast; none: all in float32')
    add('--device', default='cpu', help='cuda, cuda:N or cpu')
    return parser


# --------------------------------------------------------------------------
# what happens in a step


class Call(NamedTuple):
    """A module's forward, with the largest absolute values that went in and came out; nan or inf if any was that."""

    name: str
    went_in: float
    came_out: float


class Gradient(NamedTuple):
    """A gradient's largest absolute value. `of` is what of the module it belongs to, `edge` where in the graph."""

    name: str
    of: str
    largest: float
    edge: tuple = ()


class Watch:
    """Notes every module's forward in the order of completion, innermost first, and the gradients as they come.

    torch's `detect_anomaly` would name an operation, not the module, and nothing where the forward is at fault.
    """

    def __init__(self, core: nn.Module):
        self.core = core
        self.kinds = {name: f'{name} ({type(module).__name__})' for name, module in core.named_modules()}
        self.kinds[''] = f'{type(core).__name__} itself, outside of its modules'
        self.begin()
        for name, module in core.named_modules():
            module.register_forward_pre_hook(partial(self.before, name), with_kwargs=True)
            module.register_forward_hook(partial(self.after, name))
            for key, param in module.named_parameters(recurse=False):
                if param.requires_grad:
                    param.register_hook(partial(self.note, name, key, ()))

    def begin(self) -> None:
        """Forget the step before."""
        self.calls: list[Call] = []
        self.gradients: list[Gradient] = []
        self.inputs: dict[str, float] = {}
        self.core.zero_grad()

    def before(self, name: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.inputs[name] = largest((args, kwargs))  # now: it may be overwritten in place
        self.listen(name, module, 'input', (args, kwargs))

    def after(self, name: str, module: nn.Module, args: tuple, output: Any) -> None:
        self.calls.append(Call(name, self.inputs[name], largest(output)))
        self.listen(name, module, 'output', output)

    def listen(self, name: str, module: nn.Module, of: str, value: Any) -> None:
        """A hook on the tensors, since one on the module forbids what works in place."""
        if not {name for name, _ in module.named_children()} - {'parametrizations'}:
            for tensor in tensors(value):
                if tensor.grad_fn:
                    tensor.register_hook(partial(self.note, name, of, (tensor.grad_fn, tensor.output_nr)))

    def note(self, name: str, of: str, edge: tuple, gradient: Tensor) -> None:
        self.gradients.append(Gradient(name, of, largest(gradient), edge))


def tensors(value: Any) -> Iterator[Tensor]:
    """The floating-point tensors in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        if value.is_floating_point() and value.numel():
            yield value
    elif isinstance(value, dict | tuple | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors(part)


def largest(value: Any) -> float:
    """Absolute value, 0 where there is no tensor; nan or inf if any is that."""
    return torch.stack([torch.zeros(()), *(t.detach().abs().max().float().cpu() for t in tensors(value))]).max().item()


# --------------------------------------------------------------------------
# what it shows


def forward_findings(watch: Watch, loss: float) -> str:
    """Where the forward was not finite first; '' if it was."""
    first = next((i for i, call in enumerate(watch.calls) if not math.isfinite(call.came_out)), None)
    if first is None:
        reach = f'it is up to {watch.calls[-1].came_out:.3g}'
        return '' if math.isfinite(loss) else f'the output of the network is finite, its loss is not: {reach}'
    call = watch.calls[first]
    text = f'first module whose output is not finite: {watch.kinds[call.name]}'
    own = watch.core.get_submodule(call.name).named_parameters(recurse=False)
    if spoilt := [key for key, param in own if not math.isfinite(largest(param))]:
        text += f', whose {spoilt[0]} itself is not'
    if math.isfinite(call.went_in):
        return f'{text}; the largest absolute value that went in is {call.went_in:.3g}'
    if not first:
        return f'{text}; the images that went in were not finite either'
    last = watch.calls[first - 1]
    return (
        f'{text}; what went in was not finite either: '
        f'it began after {watch.kinds[last.name]}, whose output is up to {last.came_out:.3g}'
    )


def backward_findings(watch: Watch) -> str:
    """Where the backward was not finite first; '' if it was."""
    bad = [gradient for gradient in watch.gradients if not math.isfinite(gradient.largest)]
    if not bad:
        return ''
    first = bad[0]
    if first.of == 'output':  # it is the gradient of the next module's input, if one took this output as it was
        takers = [g for g in bad if g.of == 'input' and g.edge == first.edge]
        if not takers:
            return f'first gradient that is not finite: behind the output of {watch.kinds[first.name]}'
        first = takers[-1]
    text = f'first module whose gradient is not finite: {watch.kinds[first.name]}, that of its {first.of}'
    came_in = [g.largest for g in watch.gradients if (g.name, g.of) == (first.name, 'output')]
    return text + (f'; the largest absolute gradient that came in is {max(came_in):.3g}' if came_in else '')


def finite_findings(watch: Watch, precision: str) -> str:
    """The largest numbers, held against what 16 bits hold."""
    peaks: dict[str, float] = {}
    for call in watch.calls:
        peaks[call.name] = max(call.came_out, peaks.get(call.name, 0.0))
    peaks.pop('')
    top = sorted(peaks, key=peaks.get, reverse=True)[:SHOWN]
    return (
        f'finite in {precision}: the largest gradient is {max(g.largest for g in watch.gradients):.3g}, the largest '
        f'outputs are (fp16 holds 6.55e+04, bf16 3.39e+38) {", ".join(f"{watch.kinds[n]} {peaks[n]:.3g}" for n in top)}'
    )


# --------------------------------------------------------------------------
# the step


class Replay:
    """The training of a diagnosis, on one device and as one of its ranks at a time."""

    def __init__(self, record: dict, weights: dict, device: torch.device, amp_dtype: str):
        self.record = record
        main, make = {
            'pretrain': (main_pretrain, self.prepare_pretrain),
            'finetune': (main_finetune, self.prepare_finetune),
            'segment': (finetune_segmentation, self.prepare_segment),
            'detect': (finetune_detection, self.prepare_detect),
        }[record['stage']]
        self.args = args = main.get_args_parser().parse([])
        record['args'].setdefault('decoder', decoders.PIL)  # that of older versions
        vars(args).update(
            record['args'] | {'download': False, 'effective_batch_size': None, 'lr_batch': None, 'amp_dtype': amp_dtype}
        )
        args.data_path, args.decoder = Path(args.data_path), decoders.resolved(args.decoder)
        core, self.images, forward_of = make(device)
        checkpoint.check_same_weights(weights, core.state_dict(), diagnosis.WEIGHTS)
        core.load_state_dict(weights)
        core = build.on_device(core, args, device)
        rules = build.param_rules(main_pretrain.find_method(args.model), core, args.rule_kwargs)
        optimizer = build.guarded_optimizer(core, rules, args, device)
        kinds = coco.kinds(self.images.split, args) if record['stage'] == 'detect' else None
        sampler = build.epoch_batches(args, len(self.images), kinds)
        sampler.world_size = record['world_size']
        self.training = Training(args, core, core, optimizer, sampler, device)
        self.training.train_mode()
        self.forward = forward_of(self.training)
        self.watch = Watch(core)

    def prepare_pretrain(self, device: torch.device) -> tuple[nn.Module, datasets.ImageFiles, Callable]:
        """Network, images, and from a `Training` the engine's forward."""
        args = self.args
        how = args.interpolation, args.decoder
        crop = augment.pretrain_transform(args.input_size, args.crop_scale, args.hflip, *how)
        images = datasets.ImageFiles(named.training_images(args).images, None, crop, args.seed)
        return main_pretrain.create_model(args), images, lambda training: partial(engine_pretrain.forward, training)

    def prepare_finetune(self, device: torch.device) -> tuple[nn.Module, datasets.ImageFiles, Callable]:
        """The same of fine-tuning."""
        args = self.args
        [train] = named.labelled_splits(args, ('train',))
        num_classes = args.nb_classes or len(train.classes)
        crop = augment.training_transform(args)
        images = datasets.ImageFiles(train.images, train.labels, crop, args.seed)
        augmentation, criterion = augment.batch_augmentation(args, num_classes, device), augment.criterion(args)

        def forward_of(training: Training) -> Callable:
            loss_of = main_finetune.classification_loss(training, augmentation, criterion)
            return lambda *micro_step: engine_finetune.forward(training, *micro_step, loss_of)

        return main_finetune.create_classifier(args, num_classes), images, forward_of

    def prepare_segment(self, device: torch.device) -> tuple[nn.Module, datasets.ImageFiles, Callable]:
        """The same of segmentation."""
        train, _ = segmentation.pairs(self.args)
        images = segmentation.training_pairs(train, self.args, Reader())

        def forward_of(training: Training) -> Callable:
            loss_of = finetune_segmentation.segmentation_loss(training)
            return lambda *micro_step: engine_finetune.forward(training, *micro_step, loss_of)

        return finetune_segmentation.create_segmenter(self.args, len(train.classes)), images, forward_of

    def prepare_detect(self, device: torch.device) -> tuple[nn.Module, datasets.ImageFiles, Callable]:
        """The same of detection."""
        [train] = coco.splits(self.args, ['train'])
        images = coco.training_images(train, self.args, Reader())

        def forward_of(training: Training) -> Callable:
            loss_of = finetune_detection.detection_loss(training)
            return lambda *micro_step: engine_finetune.forward(training, *micro_step, loss_of)

        return finetune_detection.create_detector(self.args, len(train.classes)), images, forward_of

    def batch(self, samples: list[dict]) -> list[Tensor]:
        """The very images. Raises UserError if they are not there any more."""
        for sample in samples:
            index, file = sample['item'][1], sample['path']
            # pixels in memory had no name in older files
            if index >= len(self.images) or file not in (None, self.images.name(index)):
                raise UserError(f'{file or "the data"}, image {index} of the run, is no longer where it was')
        try:
            return collate([self.images[tuple(sample['item'])] for sample in samples])
        except RuntimeError as error:
            raise UserError(str(error)) from error

    def micro_step(self, rank: int, micro: int) -> str:
        """Repeat it; returns what it showed."""
        record, amp_dtype = self.record, self.training.amp_dtype
        self.training.sampler.rank = rank
        batch = self.batch(record['ranks'][rank]['micro_steps'][micro]['samples'])
        self.watch.begin()
        loss, terms = self.forward(batch, record['global_step'], micro)
        numbers = {'loss': loss.item(), **{name: term.item() for name, term in terms.items()}}
        found = forward_findings(self.watch, numbers['loss'])
        if not found:
            scaled = amp_dtype is torch.float16 and record['loss_scale'] is not None
            (loss * (record['loss_scale'] if scaled else 1.0) / record['accum_iter']).backward()
            found = backward_findings(self.watch)
        precision = str(amp_dtype or torch.float32).removeprefix('torch.')
        listed = ', '.join(f'{name} {value:.6g}' for name, value in numbers.items())
        return f'rank {rank}, micro-step {micro}: {listed}\n  {found or finite_findings(self.watch, precision)}'


@resources.program
def main(args: argparse.Namespace) -> None:
    """Every bad micro-step of every bad rank, or if no loss was bad, all of them."""
    device = dist.own_device(args.device)
    record, weights = diagnosis.read(args.diagnosis)
    if args.rank is not None and not 0 <= args.rank < len(record['ranks']):
        raise UserError(f'--rank {args.rank}: the run had ranks 0 to {len(record["ranks"]) - 1}')
    replay = Replay(record, weights, device, args.amp_dtype)
    console.say(diagnosis.summary(record))
    if device.type != record['device']:
        console.say(f'on {device.type} now, on {record["device"]} then: drop path, erasing and rounding fall otherwise')
    ranks = (record['bad_ranks'] or range(len(record['ranks']))) if args.rank is None else [args.rank]
    for rank in ranks:
        seen = record['ranks'][rank]
        for micro in diagnosis.bad_micro_steps(seen) or range(len(seen['micro_steps'])):
            console.say(replay.micro_step(rank, micro))


if __name__ == '__main__':
    run_main(lambda: main(get_args_parser().parse()))
