"""Checkpoint files: plain data, written so that a kill at any instant, a full disk or a bad sector loses nothing.

A checkpoint is a dict: schema, model, optimizer, scaler, guard (its count of bad steps), epoch, step (optimiser steps
done in that epoch), steps (those of a whole epoch), closed (whether the epoch has been evaluated, too), logger (running
averages), record (the best accuracy), run (what must not change when it is resumed), args; with --use_ema also ema; in
pretraining also encoder, the weights that fine-tuning loads (they share the model's storage: the file holds them once).

A run keeps `checkpoint-last.pth` and the one before it, `checkpoint-previous.pth`; a numbered one every `--save_freq`
epochs; and `checkpoint-best.pth`, weights alone. Beside each lies its SHA-256, which is checked before a file is used.
"""

import argparse
import contextlib
import copy
import itertools
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from util import config, digests, resources
from util.errors import CheckpointError, DamagedError, NoCheckpointError, StorageError, UserError, printable, program
from util.resources import size
from util.weights import Origin, check_finite, class_names, find_origin, plain_field, read_checkpoint, read_source

SCHEMA = 1  # raised when what a checkpoint holds changes its meaning
LAST, PREVIOUS, BEST = 'checkpoint-last.pth', 'checkpoint-previous.pth', 'checkpoint-best.pth'
DAMAGED, ABANDONED = '.damaged', '.abandoned'  # put behind the names of files that are kept, but not used any more


def save(path: Path, state: dict) -> None:
    """Write `state` beside `path`, bring it to the disk, and rename it. Raises StorageError; the old file is intact."""
    with stored(path) as temporary:
        with digests.flushed(temporary) as file:
            hashing = digests.Hashing(file)
            write(state, hashing)
        put(temporary, hashing.sum.hexdigest(), path)


def save_again(path: Path, other: Path) -> None:
    """As `save`, of what `path` holds: on sectors of its own, which a link would not have."""
    with stored(other) as temporary:
        copy_file(path, temporary)
        put(temporary, digests.good_sum(path), other)


@contextlib.contextmanager
def stored(path: Path) -> Iterator[Path]:
    """A file to be written in place of another. Raises StorageError; what is there is intact."""
    try:
        with digests.temporary_for(path) as temporary:
            yield temporary
    except OSError as error:
        why = (error.strerror or error) if path.parent.is_dir() else f'there is no folder {path.parent}'
        raise StorageError(f'cannot write {path}: {why}{what_is_left(path)}') from error


def write(state: dict, file: digests.Hashing) -> None:
    try:
        torch.save(state, file)
    except RuntimeError as error:  # torch closes its archive after a failed write, fails at that, and says only so
        raise file.error or error from None


def put(temporary: Path, digest: str, path: Path) -> None:
    if path.name == LAST:
        keep_previous(path)
    digests.put(temporary, digest, path)


def copy_file(path: Path, other: Path) -> None:
    with open(path, 'rb') as file, digests.flushed(other) as copy_of_it:
        shutil.copyfileobj(file, copy_of_it, digests.CHUNK)


def what_is_left(path: Path) -> str:
    left = [name for name in (path.name, LAST) if (path.parent / name).is_file()]
    return f'; {left[0]} of before is intact' if left else ''


def keep_previous(last: Path) -> None:
    """Keep the last checkpoint, under another name, when it is about to be replaced; a damaged one is not worth it."""
    if last.is_file() and digests.good_sum(last):
        link(last, last.with_name(PREVIOUS))


def link(path: Path, other: Path) -> None:
    """Give a good checkpoint a second name, in place of what had it; each stays when the other is replaced."""
    with digests.temporary_for(other) as temporary:
        try:
            os.link(path, temporary)
        except OSError:  # a file system without hard links
            copy_file(path, temporary)
        digests.put(temporary, digests.good_sum(path), other)


def numbered(folder: Path) -> list[Path]:
    """`checkpoint-<epoch>.pth`, the latest epoch first."""
    return sorted((f for f in folder.glob('checkpoint-*.pth') if number_of(f) >= 0), key=number_of, reverse=True)


def number_of(path: Path) -> int:
    """The epoch in `checkpoint-<epoch>.pth` and `pictures-<epoch>.png`; -1 in other names."""
    match = re.search(r'-(\d+)$', path.stem)
    return int(match[1]) if match else -1


def prune(folder: Path, keep: int, in_use: Collection[Path | None]) -> None:
    """Remove numbered checkpoints that are older than the `keep` newest good ones, but none that is in use."""
    kept, protected = 0, {path.resolve() for path in in_use if path}
    for path in numbered(folder):
        if kept < keep:
            kept += bool(digests.good_sum(path))
        elif path.resolve() not in protected:
            digests.remove(path)


def clean(folder: Path, damaged: Collection[Path]) -> int:
    """Remove what a kill in the middle of `save` has left, and put damaged files aside; how many were removed."""
    leftovers = [*folder.glob('.*.tmp'), *(f for f in folder.glob('*.pth.sha256') if not f.with_suffix('').exists())]
    for file in leftovers:
        file.unlink(missing_ok=True)
    for path in damaged:
        put_aside(path, DAMAGED)
    return len(leftovers)


def put_aside(path: Path, why: str) -> None:
    """Rename a checkpoint and its sum: to a free name, which no resume looks at."""
    names = (path.with_name(f'{path.name}{why}{number or ""}') for number in itertools.count())
    aside = next(name for name in names if not name.exists())
    path.rename(aside)
    if digests.beside(path).exists():
        digests.beside(path).rename(digests.beside(aside))


def abandon_later(folder: Path, first_epoch: int, resumed_from: Path) -> list[Path]:
    """Put aside what a run had written after the checkpoint that a branch starts from."""
    if resumed_from.name == LAST:
        return []
    later = [path for path in numbered(folder) if number_of(path) >= first_epoch]
    later += [path for path in folder.glob('pictures-*.png') if number_of(path) >= first_epoch]
    later += [path for path in (folder / LAST, folder / PREVIOUS) if path.is_file()]
    later = [path for path in later if path.name != resumed_from.name]
    for path in later:
        put_aside(path, ABANDONED)
    return later


# --------------------------------------------------------------------------
# while training goes on

SMALL = 2**27  # bytes of a state that is written in less time than a thread is worth


class Writer:
    """Writes checkpoints one after the other: large ones on a thread, from a copy in memory, if there is room for it.

    What goes wrong there is raised by the next call of any method.
    """

    def __init__(self):
        self.pool, self.pending = ThreadPoolExecutor(1, 'checkpoint'), None
        self.copies: dict[int, Tensor] = {}  # of storages, by their address: new memory costs more than a copy

    def start(self, write: Callable[[dict], None], state: dict, size: int, wait: bool = False) -> None:
        """Have `write` write a state of `size` bytes; with `wait`, it is written when this returns."""
        self.wait()
        if not wait and in_background(size, sum(own.nbytes for own in self.copies.values())):
            with contextlib.suppress(MemoryError, RuntimeError):  # if there is no room after all
                self.pending = self.pool.submit(write, on_host(state, self.copies, set()))
                return
        write(state)

    def check(self) -> None:
        """Raise what has gone wrong, if it is known already."""
        if self.pending and self.pending.done():
            self.wait()

    def wait(self) -> None:
        """Return when everything is written."""
        pending, self.pending = self.pending, None
        if pending:
            pending.result()


def in_background(size: int, taken: int = 0) -> bool:
    """Whether a state of so many bytes is large enough for a thread, and memory, less what is taken, for two copies."""
    return size >= SMALL and resources.free_memory() + taken >= 2 * size


def on_host(part, copies: dict[int, Tensor], made: set[int]):
    """A copy of a nested state in the host's memory. Tensors that share their storage still do: it is written once.

    `copies` of storages are used again, by the addresses of these; `made` collects those that this copy has filled.
    """
    match part:
        case Tensor():
            storage = part.untyped_storage()
            address, flat = storage.data_ptr(), torch.empty(0, dtype=torch.uint8, device=part.device).set_(storage)
            if address not in made:
                if address not in copies or copies[address].shape != flat.shape:
                    copies[address] = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=flat.is_cuda)
                copies[address].copy_(flat)
                made.add(address)
            own = copies[address].untyped_storage()
            return torch.empty(0, dtype=part.dtype).set_(own, part.storage_offset(), part.shape, part.stride())
        case dict():
            whole = copy.copy(part)  # with what torch keeps in a state dict besides tensors
            whole.update({key: on_host(value, copies, made) for key, value in part.items()})
            return whole
        case list() | tuple():
            return type(part)(on_host(value, copies, made) for value in part)
    return part


# --------------------------------------------------------------------------
# what to resume


def find_newest(folder: Path) -> tuple[Path | None, dict | None, dict[Path, str]]:
    """The newest good checkpoint of a folder, what it holds, and the damaged ones that are skipped, with reasons.

    None, None if there is no checkpoint at all. Raises NoCheckpointError if there are, but none of them can be read.
    """
    good, damaged = [], {}
    for path in (folder / LAST, folder / PREVIOUS, *numbered(folder)):
        if path.is_file():
            try:
                state = read_checkpoint(path)
            except DamagedError as error:
                damaged[path] = str(error)
                continue
            position = [state.get(key) for key in ('epoch', 'step')]
            good.append(([p if isinstance(p, int) else -1 for p in position], path, state))
            if path.name != PREVIOUS:  # which a numbered one may be newer than
                break
    if damaged and not good:
        reasons = '; '.join(damaged.values())
        raise NoCheckpointError(f'none of the checkpoints in {folder} can be read, so none can be resumed: {reasons}')
    _, path, state = max(good, key=lambda found: found[0], default=(None, None, None))
    return path, state, damaged


def outline(part):
    """A nested state without its numbers: tensors of its shapes that are zero, and take no memory."""
    match part:
        case Tensor():
            return torch.zeros((), dtype=part.dtype).expand(part.shape)
        case dict():
            return {key: outline(value) for key, value in part.items()}
        case list() | tuple():
            return type(part)(map(outline, part))
    return part


def any_in(folder: Path) -> list[Path]:
    """The checkpoints of a folder, of whatever kind."""
    return sorted(folder.glob('checkpoint-*.pth'))


def check_unused(folder: Path) -> None:
    """Raise UserError if a new run's output folder holds the checkpoints of another."""
    if found := any_in(folder):
        raise UserError(
            f'{found[0]} belongs to an earlier run: resume it with --resume auto, or choose another --output_dir'
        )


def check_space(folder: Path, needed: int, count: int) -> str:
    """Say what `count` checkpoints of so many bytes take. Raises StorageError if a folder has no room for one."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise StorageError(f'{folder} has {free / 1e6:.0f} MB of free space, a checkpoint takes {needed / 1e6:.0f} MB')
    told = (
        f'a checkpoint takes {size(needed)}, the run keeps up to {count}: {size(count * needed)} of {size(free)} free'
    )
    told += f'; written while training goes on, from a copy of {size(needed)} in memory' * in_background(needed)
    return f'WARNING: {told}; --keep_last N keeps fewer' if count * needed > free else told


def check_same_weights(saved: dict, current: dict, path: Path) -> None:
    """Raise CheckpointError naming the first five weights that differ in shape, or that only one side has."""

    def shape(state: dict, name: str) -> str:
        return str(list(state[name].shape)) if isinstance(state.get(name), Tensor) else 'absent'

    differing = [name for name in current | saved if shape(saved, name) != shape(current, name)]
    if differing:
        listed = '; '.join(
            f'{printable(name, 80)}: file {shape(saved, name)}, model {shape(current, name)}' for name in differing[:5]
        )
        raise CheckpointError(f'{path} is of another architecture; {len(differing)} weights differ: {listed}')


def check_healthy(saved: dict, path: Path) -> None:
    """Raise CheckpointError if a run's weights, or their average, are not finite."""
    for name in ('model', 'ema'):
        try:
            check_finite(saved.get(name, {}))
        except CheckpointError as error:
            raise CheckpointError(f'{path}: {error}; resume an earlier checkpoint') from error


STATE = {  # of a run, at least
    **dict.fromkeys(('model', 'optimizer', 'scaler', 'logger', 'record'), dict),
    **dict.fromkeys(('epoch', 'step', 'steps'), int),
}
FROM_WEIGHTS = {'pretrain': '--init', **dict.fromkeys(('finetune', 'segment', 'detect'), '--finetune')}


def check_same_run(state: dict, current: dict, path: Path) -> None:
    """Raise CheckpointError naming what differs between the run that wrote a checkpoint and the one that resumes it."""
    schema, saved = state.get('schema', SCHEMA), state.get('run')
    if isinstance(schema, int) and schema > SCHEMA:
        raise CheckpointError(
            f'{path} is of a newer version of this program (schema {plain_field(schema)}; this one knows {SCHEMA}): '
            f'update it'
        )
    instead = f'{FROM_WEIGHTS[current["stage"]]} {path}'
    whole = all(isinstance(state.get(name), kind) for name, kind in STATE.items())
    whole = (
        whole and state['epoch'] >= 0 <= state['step'] <= state['steps'] > 0 and 'param_groups' in state['optimizer']
    )
    if not isinstance(saved, dict) or 'stage' not in saved or not whole:
        last = Path(path).with_name(LAST)
        such = f', such as {last}' if last.is_file() and last != Path(path) else ''
        raise CheckpointError(
            f'{path} holds weights but no state of a run; --resume needs one that this program wrote{such}; '
            f'to start a new run from its weights: {instead}'
        )
    saved = {key: plain_field(saved[key]) for key in current if key in saved}  # older versions wrote fewer
    if saved['stage'] != current['stage']:
        raise CheckpointError(f'{path} is a checkpoint of {program(saved["stage"])}; use {instead}')
    differing = [k for k in saved if saved[k] != current[k]]
    if differing:
        listed = '; '.join(f'{k}: {printable(saved[k], 200)} then, {current[k]} now' for k in differing)
        new_run = f'; to start a new run from its weights: {instead}' if saved.get('model') == current['model'] else ''
        raise CheckpointError(f'{path} cannot be resumed with other settings: {listed}{new_run}')


def changed_settings(state: dict, current: dict, roles: dict[str, str]) -> list[str]:
    """A warning where a run is resumed with other settings that it may have, such as another learning rate."""
    args = state.get('args')
    saved = {key: plain_field(value) for key, value in args.items()} if isinstance(args, dict) else {}
    known = [name for name in saved.keys() & current.keys() if roles.get(name) == 'warn']
    differing = sorted(name for name in known if saved[name] != current[name])
    if not differing:
        return []
    listed = '; '.join(f'--{name} {printable(saved[name], 200)} then, {current[name]} now' for name in differing)
    return [f'WARNING: resumed with other settings, which hold from here on: {listed}']


# --------------------------------------------------------------------------
# what a file knows

LARGEST = 100_000  # of a file's sizes and classes (ImageNet-21K has 21,841): more would never be made


@dataclass
class Source:
    """A checkpoint of any origin, read once. Where our own program wrote it, it knows how its network was made."""

    path: str
    container: dict
    origin: Origin | None = None
    classes: list[str] | None = None  # whose names the file tells
    notices: list[str] = field(default_factory=list)  # what `complete` has found, to be printed

    @classmethod
    def read(cls, source: str | None) -> 'Source':
        """From a path or a URL; None has nothing in it. Raises CheckpointError."""
        return cls.of(source.partition('#')[0], read_source(source)) if source else cls('', {})

    @classmethod
    def of(cls, path: str | Path, container: dict) -> 'Source':
        return cls(str(path), container, find_origin(container), class_names(container))

    def outline(self) -> 'Source':
        """What there is to tell of it, without its weights."""
        return replace(self, container={})

    def complete(
        self, args: argparse.Namespace, parser: config.Parser, take: Collection[str] = ()
    ) -> argparse.Namespace:
        """The arguments, with those of `take`, by default all, as the file has them where no flag or recipe gives them.

        What was taken, and what stays otherwise than in the file, becomes a notice. Raises UserError where no model is
        named.
        """
        if not self.origin:
            if not args.model:
                raise UserError(f'{self.path} is not of this program and names no model: give --model NAME')
            return args
        take = take or parser.of_network
        then, kept = self.values(args, parser), {'model_kwargs', *args.given}
        if 'input_size' in kept:
            kept.add('eval_size')  # which would win over it
        if kept & {'mean', 'std'}:
            kept |= {'mean', 'std'}  # they belong together
        taken = {name: then[name] for name in then.keys() & set(take) - kept}
        options = then.pop('model_kwargs')  # each is given for itself, as over a recipe's, but not to another model
        if 'model_kwargs' in take and taken.get('model', args.model) == then['model']:
            then['model_kwargs'], taken['model_kwargs'] = options, options | args.model_kwargs
        completed = argparse.Namespace(**vars(args) | taken)
        told = {name: taken[name] for name in then if name in taken and taken[name] != getattr(args, name)}
        differing = [name for name in then if then[name] != getattr(completed, name)]
        if told:
            self.notices.append(f'taken from {self.path}: {printable(config.as_flags(told))}')
        if differing:
            listed = '; '.join(
                f'{name}: {shown(then[name])} then, {shown(getattr(completed, name))} now' for name in differing
            )
            trained = 'pretrained' if self.origin.stage == 'pretrain' else 'fine-tuned'
            self.notices.append(f'not as it was {trained}: {listed}')
        return completed

    def values(self, args: argparse.Namespace, parser: config.Parser) -> dict:
        """What the file says of the flags that describe a network, converted and checked as a recipe's values are."""
        found = {}
        for name, action in parser.of_network.items():
            told = name if name in self.origin.args else parser.of_file.get(name)
            if told in self.origin.args:
                # what is given is not needed from the file
                with contextlib.suppress(*[UserError] if name in args.given else []):
                    value, where = self.origin.args[told], f'{self.path}: its {told}'
                    if any(isinstance(number, int) and abs(number) > LARGEST for number in scalars(value)):
                        raise UserError(f'{where} is beyond all sizes: {printable(value, 200)}')
                    found[name] = config.converted(action, name, value, where)
        return found

    @contextlib.contextmanager
    def expected(self, args: argparse.Namespace) -> Iterator[None]:
        """What fails in the block with another model than the file's is told as that."""
        try:
            yield
        except UserError as error:
            if not self.origin or self.origin.args['model'] == args.model:
                raise
            reason = str(error).removeprefix(f'{self.path}: ').partition('; it was written by')[0]
            whose = f'{self.path} was written by {self.origin}'
            raise UserError(f'{whose}, not for --model {args.model}, which cannot take it: {reason}') from error

    def expect(self, stage: str, lacking: str) -> None:
        """Raise UserError for a file of our own of another stage, and say what it lacks."""
        if self.origin and self.origin.stage != stage:
            raise UserError(f'{self.path} {lacking}; it was written by {self.origin}')


def scalars(value: object) -> list:
    """What is in nested containers, less the keys."""
    if isinstance(value, dict | list | tuple):
        return [inner for part in (value.values() if isinstance(value, dict) else value) for inner in scalars(part)]
    return [value]


def shown(value: object) -> str:
    return 'default' if value is None else printable(value)
