"""Checkpoint files: plain data, written so that a kill at any instant leaves the old file or the new one.

A checkpoint is a dict: model, optimizer, scaler, epoch, step (optimiser steps done in that epoch), logger (running
averages), run (what must not change when it is resumed), args; in pretraining also encoder, the weights that
fine-tuning loads (it shares the model's storage, so the file holds them once).
"""

import os
import re
import tempfile
from pathlib import Path

import torch

from util.errors import CheckpointError, UserError

LAST, BEST = 'checkpoint-last.pth', 'checkpoint-best.pth'


def save(path: Path, state: dict) -> None:
    """Write `state` to a temporary file beside `path`, flush it to the disk, and rename it."""
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        with open(temporary, 'wb') as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        flush_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def clean(folder: Path) -> None:
    """Remove what a kill in the middle of `save` has left."""
    for temporary in folder.glob('.checkpoint-*.tmp'):
        temporary.unlink(missing_ok=True)


def flush_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def find_resume(resume: str, output_dir: Path) -> Path | None:
    """`auto` is the last checkpoint of `output_dir`, if there is one; anything else is a path."""
    if resume != 'auto':
        return Path(resume) if resume else None
    if (output_dir / LAST).is_file():
        return output_dir / LAST
    numbered = [
        (int(m[1]), f) for f in output_dir.glob('checkpoint-*.pth') if (m := re.search(r'-(\d+)\.pth$', f.name))
    ]
    return max(numbered)[1] if numbered else None


def check_unused(folder: Path) -> None:
    """Raise UserError if another run's checkpoints lie in the output folder of one that begins anew."""
    if found := sorted(folder.glob('checkpoint-*.pth')):
        raise UserError(
            f'{found[0]} is of an earlier run and would be lost: --resume auto goes on with that run, '
            f'another --output_dir keeps it'
        )


def prepare_folder(folder: Path) -> None:
    """Make the output folder. Raises UserError if nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f'cannot write to the output folder {folder}: {error.strerror}') from error


def check_same_weights(saved: dict, current: dict, path: Path) -> None:
    """Raise CheckpointError naming the first five weights that differ in shape, or that only one side has."""

    def shape(state: dict, name: str) -> str:
        return str(list(state[name].shape)) if name in state else 'absent'

    differing = [name for name in current | saved if shape(saved, name) != shape(current, name)]
    if differing:
        listed = '; '.join(f'{name}: file {shape(saved, name)}, model {shape(current, name)}' for name in differing[:5])
        raise CheckpointError(f'{path} is of another architecture; {len(differing)} weights differ: {listed}')


def check_same_run(state: dict, current: dict, path: Path) -> None:
    """Raise CheckpointError naming what differs between the run that wrote a checkpoint and the one that resumes it."""
    saved = state.get('run')
    if not isinstance(saved, dict) or not {'model', 'optimizer', 'record', 'epoch', 'step', 'steps'} <= state.keys():
        raise CheckpointError(f'{path} holds weights but no state of a run; --resume needs one that this program wrote')
    differing = [k for k in current if saved.get(k) != current[k]]
    if differing:
        listed = '; '.join(f'{k}: {saved.get(k)} then, {current[k]} now' for k in differing)
        raise CheckpointError(f'{path} cannot be resumed with other settings: {listed}')
