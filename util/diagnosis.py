"""What a run that has diverged leaves behind: the position, values and samples of the step, and the weights before it.

`diagnosis.json` is to be read, and `scripts/replay_step.py` repeats the step from it. `diagnosis.pth`, beside it,
holds the weights, which no bad step has changed.
"""

import copy
import itertools
import json
import math
from pathlib import Path

from util import checkpoint, config, digests, dist
from util.data.datasets import ImageFiles
from util.errors import DivergedError, StorageError, UserError
from util.training import Epoch, Training
from util.weights import plain_field, read_checkpoint

NAME, WEIGHTS = 'diagnosis.json', 'diagnosis.pth'
POSITION = ('epoch', 'step')
KEYS = {  # without which no step can be repeated
    *POSITION,
    *('stage', 'global_step', 'loss_scale', 'device', 'world_size', 'accum_iter', 'args', 'bad_ranks', 'ranks'),
}


def diverged(
    training: Training, stage: str, images: ImageFiles, epoch: Epoch, step: int, counts: dict[str, int]
) -> DivergedError:
    """Write the diagnosis, and return the error that ends the run. Every rank must call it; rank 0 writes.

    `counts` are the optimiser's after `step` steps of the epoch. The host may have noticed late: diagnosed is the first
    step that was one bad step too many. All later steps were skipped too.
    """
    args, allowed = training.args, training.optimizer.allowed
    late = counts['streak'] - allowed - 1
    step -= late
    ranks = dist.gather(observed(training, images, epoch, step, epoch.meters.observed(step + late, late)))
    bad_ranks = [rank for rank, seen in enumerate(ranks) if bad_micro_steps(seen)]
    record = {'stage': stage, **describe(training, epoch, step), 'bad_steps': counts['bad_steps'] - late}
    record |= {'bad_ranks': bad_ranks, 'ranks': ranks}
    failed = None
    if dist.is_main():
        try:
            write(training, record)
        except (OSError, StorageError) as error:
            failed = str(error)
    failed = dist.gather(failed)[0]  # and no rank ends before the files are written
    file = args.output_dir / NAME
    where = f'see {file}, and scripts/replay_step.py {file} finds the first module'
    return DivergedError(f'{summary(record)}; {f"{file} could not be written: {failed}" if failed else where}')


def describe(training: Training, epoch: Epoch, step: int) -> dict:
    """What all ranks have in common. `step` counts from 1, as progress lines do; `global_step`, which seeds, from 0."""
    args, sampler, optimizer = training.args, training.sampler, training.optimizer
    return {
        'unit': sampler.unit,  # what is called an epoch here
        'epoch': epoch.number,
        'step': step,
        'steps': epoch.steps,
        'global_step': epoch.global_step(step - 1),
        'lr': training.schedule(epoch.at(step - 1)),
        'loss_scale': optimizer.loss_scale(),
        'bad_steps_in_a_row': optimizer.allowed + 1,
        'max_bad_steps': optimizer.allowed,
        'precision': str(training.amp_dtype or 'float32').removeprefix('torch.'),
        'device': training.device.type,
        'world_size': sampler.world_size,
        'accum_iter': sampler.accum_iter,
        'images': sampler.num_samples,
        'seed': args.seed,
        'args': config.plain(args) | {'lr': training.lr, 'accum_iter': sampler.accum_iter},
    }


def observed(training: Training, images: ImageFiles, epoch: Epoch, step: int, values: dict[str, list[float]]) -> dict:
    """What this rank saw in the step: gradient norm, and of each micro-step loss, terms and samples."""
    values = {name: [value if math.isfinite(value) else str(value) for value in seen] for name, seen in values.items()}
    [norm], losses = values.pop('grad_norm'), values.pop('loss')
    sampler = copy.copy(training.sampler)
    sampler.start(epoch.number, step - 1)
    micro_steps = [
        {
            'loss': losses[micro],
            'terms': {name: seen[micro] for name, seen in values.items()},
            'samples': [{'item': list(item), 'path': images.name(item[1])} for item in items],
        }
        for micro, items in enumerate(itertools.islice(sampler, sampler.accum_iter))
    ]
    return {'grad_norm': norm, 'micro_steps': micro_steps}


def bad_micro_steps(seen: dict) -> list[int]:
    """Those of one rank whose loss was not finite, which JSON has as a string."""
    return [micro for micro, step in enumerate(seen['micro_steps']) if isinstance(step['loss'], str)]


def summary(record: dict) -> str:
    """One line."""
    ranks, row, unit = record['bad_ranks'], record['bad_steps_in_a_row'], record.get('unit', 'epoch')
    if len(ranks) > 1:
        whose = f'the losses of ranks {", ".join(map(str, ranks))} were not finite'
    else:
        whose = f"rank {ranks[0]}'s loss was not finite" if ranks else 'every loss was finite, a gradient was not'
    scale = '' if record['loss_scale'] is None else f', at a loss scale of {record["loss_scale"]:g}'
    return (
        f'{unit} {record["epoch"]}, step {record["step"]} of {record["steps"]}: loss or gradient was not finite in '
        f'{row} step{"s" if row > 1 else ""} in a row (--max_bad_steps {record["max_bad_steps"]}); '
        f'no such step changed a weight; {whose}{scale}'
    )


def write(training: Training, record: dict) -> None:
    """The weights first: what names them is there only when they are."""
    position = {key: record[key] for key in POSITION}
    folder = training.args.output_dir
    checkpoint.save(folder / WEIGHTS, {'model': training.core.state_dict(), **position})
    digests.replace(folder / NAME, (json.dumps(record, indent=2) + '\n').encode())


def read(file: Path) -> tuple[dict, dict]:
    """The record and the weights of a diagnosis. Raises UserError for what is none, or for weights of another."""
    try:
        record = json.loads(file.read_text(encoding='utf-8'))
        if not record.keys() >= KEYS or not all(seen['micro_steps'][0]['samples'] for seen in record['ranks']):
            raise ValueError
    except OSError as error:
        raise UserError(f'cannot read {file}: {error.strerror}') from error
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(f'{file} is not a diagnosis that a run has written') from error
    weights = read_checkpoint(file.with_name(WEIGHTS))
    if any(plain_field(weights.get(key)) != record[key] for key in POSITION) or 'model' not in weights:
        raise UserError(f'{file.with_name(WEIGHTS)} is not of the step that {file} describes')
    return record, weights['model']
