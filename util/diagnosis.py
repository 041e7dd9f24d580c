"""What a run that has diverged leaves behind: where, with which values, of which samples, and the weights of that time.

`diagnosis.json` is to be read, and `scripts/replay_step.py` makes the step again from it. `diagnosis.pth`, beside it,
holds the weights, which no bad step has changed.
"""

import copy
import itertools
import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

from util import checkpoint, config, digests, dist
from util.errors import DivergedError, StorageError, UserError
from util.log import MetricLogger
from util.weights import read_checkpoint

if TYPE_CHECKING:
    from util.run import Run

NAME, WEIGHTS = 'diagnosis.json', 'diagnosis.pth'
PLACE = ('epoch', 'step')
KEYS = {  # without which no step can be made again
    *PLACE,
    *('stage', 'global_step', 'loss_scale', 'device', 'world_size', 'accum_iter', 'args', 'bad_ranks', 'ranks'),
}


def diverged(run: 'Run', epoch: int, step: int, logger: MetricLogger, counts: dict[str, int]) -> DivergedError:
    """Write the diagnosis, and return the error that ends the run. Every rank must call it; rank 0 writes.

    `counts` is the guard's state after `step` steps of `epoch`. All later steps were left out too, but it is the first
    step that was bad once too often which is diagnosed.
    """
    late = counts['streak'] - run.guard.allowed - 1
    step -= late
    ranks = dist.gather(observed(run, epoch, step, logger.observed(step + late, late)))
    bad_ranks = [rank for rank, seen in enumerate(ranks) if bad_micro_steps(seen)]
    record = describe(run, epoch, step, late, counts) | {'bad_ranks': bad_ranks, 'ranks': ranks}
    failed = None
    if dist.is_main():
        try:
            write(run, record)
        except (OSError, StorageError) as error:
            failed = str(error)
    failed = dist.gather(failed)[0]  # and no rank ends before the files are written
    file = run.args.output_dir / NAME
    where = f'see {file}, and scripts/replay_step.py {file} finds the first module'
    return DivergedError(f'{summary(record)}; {f"{file} could not be written: {failed}" if failed else where}')


def describe(run: 'Run', epoch: int, step: int, late: int, counts: dict[str, int]) -> dict:
    """What all ranks have in common. `step` counts from 1, as progress lines do; `global_step`, which seeds, from 0."""
    steps = run.sampler.steps
    return {
        'stage': run.stage,
        'epoch': epoch,
        'step': step,
        'steps': steps,
        'global_step': epoch * steps + step - 1,
        'lr': run.schedule(epoch + (step - 1) / steps),
        'loss_scale': run.guard.loss_scale(),
        'bad_steps_in_a_row': run.guard.allowed + 1,
        'max_bad_steps': run.guard.allowed,
        'bad_steps': counts['bad_steps'] - late,
        'precision': str(run.amp_dtype or 'float32').removeprefix('torch.'),
        'device': run.device.type,
        'world_size': run.sampler.world_size,
        'accum_iter': run.sampler.accum_iter,
        'images': run.num_images,
        'seed': run.args.seed,
        'args': config.plain(run.args) | {'lr': run.lr, 'accum_iter': run.sampler.accum_iter},
    }


def observed(run: 'Run', epoch: int, step: int, values: dict[str, list[float]]) -> dict:
    """What this rank saw in the step: gradient norm, and of each micro-step loss, terms and samples."""
    values = {name: [value if math.isfinite(value) else str(value) for value in seen] for name, seen in values.items()}
    [norm], losses = values.pop('grad_norm'), values.pop('loss')
    sampler = copy.copy(run.sampler)
    sampler.start(epoch, step - 1)
    micro_steps = [
        {
            'loss': losses[micro],
            'terms': {name: seen[micro] for name, seen in values.items()},
            'samples': [{'item': list(item), 'path': path(run.images.images, item[1])} for item in items],
        }
        for micro, items in enumerate(itertools.islice(sampler, sampler.accum_iter))
    ]
    return {'grad_norm': norm, 'micro_steps': micro_steps}


def path(images, index: int) -> str | None:
    """The file of an image; None for one that is in memory."""
    return os.fsdecode(images[index]) if images.ndim == 1 else None


def bad_micro_steps(seen: dict) -> list[int]:
    """Those of one rank whose loss was not finite, which JSON has as a string."""
    return [micro for micro, step in enumerate(seen['micro_steps']) if isinstance(step['loss'], str)]


def summary(record: dict) -> str:
    """One line."""
    ranks, row = record['bad_ranks'], record['bad_steps_in_a_row']
    if len(ranks) > 1:
        whose = f'the losses of ranks {", ".join(map(str, ranks))} were not finite'
    else:
        whose = f"rank {ranks[0]}'s loss was not finite" if ranks else 'every loss was finite, a gradient was not'
    scale = '' if record['loss_scale'] is None else f', at a loss scale of {record["loss_scale"]:g}'
    return (
        f'epoch {record["epoch"]}, step {record["step"]} of {record["steps"]}: loss or gradient was not finite in '
        f'{row} step{"s" if row > 1 else ""} in a row (--max_bad_steps {record["max_bad_steps"]}); '
        f'no such step changed a weight; {whose}{scale}'
    )


def write(run: 'Run', record: dict) -> None:
    """The weights first: what names them is there only when they are."""
    place = {key: record[key] for key in PLACE}
    checkpoint.save(run.args.output_dir / WEIGHTS, {'model': run.core.state_dict(), **place})
    digests.replace(run.args.output_dir / NAME, (json.dumps(record, indent=2) + '\n').encode())


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
    if any(weights.get(key) != record[key] for key in PLACE) or 'model' not in weights:
        raise UserError(f'{file.with_name(WEIGHTS)} is not of the step that {file} describes')
    return record, weights['model']
