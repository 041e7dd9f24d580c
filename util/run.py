"""The life of a run: its output folder, what it resumes from, what it saves, how it stops, what it tells.

A `Run` is made from the arguments, and finds the user's mistakes first. The processes meet before one of them reads a
checkpoint for all, or else in `join`, which compares them. `resume` takes a training to the position of the checkpoint,
`epochs` leads it to its end. What a step needs is in `util/training.py`.
"""

import argparse
import contextlib
import errno
import json
import math
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from util import agreement, checkpoint, config, console, diagnosis, digests, dist, optim, resources, rng, signals
from util.checkpoint import Source
from util.data import decoders, named
from util.data.datasets import EpochBatches, ImageFiles, Split
from util.errors import STOPPED, LostError, ResourceError, RunError, StorageError, UserError, exit_code, tell
from util.log import MetricLogger, RunLog, counted, health, info
from util.optim import WeightAverage
from util.recipes import recipe_value, recipes_for
from util.run_folder import NoFolder, RunFolder, prepare
from util.training import Epoch, Training
from util.weights import Origin, check_file, find_origin, load_published, plain_field, read_checkpoint

STORAGE = {getattr(errno, name) for name in ('ENOSPC', 'EDQUOT', 'EFBIG', 'EROFS', 'EIO', 'ESTALE', 'ENOTCONN')}
TURN_S = 10  # for the main thread to notice a lost rank, before another one ends the process


class Run:
    """A run of `stage` ('pretrain', 'finetune', 'segment', 'detect') over the samples of a sampler.

    Where the sampler has rounds, which lie between two evaluations, those are what is called an epoch here.

    In a `with` statement, it holds the output folder, records in `status.json` how it ended, and names faults that a
    disk or another process has caused. What belongs to the loop (training, images, log) is there after `resume`.
    With --dry_run it has no folder and no log, and writes nothing.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        stage: str,
        sampler: EpochBatches,
        roles: dict[str, config.AtResume],
        classes: list[str] | None = None,
    ):
        self.args, self.stage, self.sampler, self.roles = args, stage, sampler, roles
        self.classes = classes  # their names, where there are labels
        if args.resume not in (None, 'auto'):
            check_file(args.resume)  # or a wrong path would be told as something else
        log_dir = args.log_dir or args.output_dir
        if any('\ud800' <= letter <= '\udfff' for letter in str(log_dir)):
            raise UserError(f'TensorBoard cannot write to {log_dir}, whose name is not UTF-8: give another --log_dir')
        if args.resume != 'auto' and not self.branches():
            checkpoint.check_unused(args.output_dir)
        self.folder = NoFolder(dist.place()) if args.dry_run else RunFolder(args.output_dir, dist.place(), sampler.unit)
        if args.log_dir and not args.dry_run:
            with contextlib.suppress(StorageError):  # the run can go on without events, which `RunLog` says
                prepare(args.log_dir)
        self.notices: list[str] = []  # printed when training begins
        self.damaged: dict[Path, str] = {}  # checkpoints that were skipped, and why
        self.resumed_from: Path | None = None
        self.saved: dict | None = None  # what it holds, until it is restored
        self.weights = f'weights: random, from seed {args.seed}'  # where a new run's come from
        self.device: torch.device | None = None  # once the processes have met
        self.loaded = False  # whether rank 0 has weights from a file, to be shared
        self.agreed = False  # whether the ranks are known to have been started alike
        self.writer = checkpoint.Writer()
        self.record: dict[str, float] = {}  # what a stage wants kept across resumes (best accuracy)

    def __enter__(self) -> 'Run':
        signals.install_early()
        try:
            if self.folder.place.rank == 0:
                self.folder.write_status('running')
            if self.args.resume:
                self.meet()
                self.resumed_from, self.saved = dist.from_main(self.find_saved, checkpoint.outline)
            self.keep_decoder()
            if self.saved:
                checkpoint.check_same_run(self.saved, self.identity(), self.resumed_from)
                if differing := self.other_classes(find_origin(self.saved), 'it', str(self.args.data_path)):
                    raise UserError(f'{self.resumed_from} was trained for other classes: {differing}')
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def __exit__(self, kind, raised: BaseException | None, traceback) -> None:
        """Record the end. Raises a clearer error where storage or another process caused the fault."""
        error = raised
        try:
            self.writer.wait()
        except Exception as of_writer:
            if raised:  # the fault that ends the run; this one is told before it
                info(str(of_writer))
            error = raised or of_writer
        named = self.named(error)
        message = str(named) if isinstance(named, RunError) else f'{type(named).__name__}: {named}'
        self.folder.close(exit_code(named), message, noticed=named is not error and isinstance(named, LostError))
        signals.restore()
        if named is not raised:
            raise named from (error if named is not error else error.__cause__)

    def named(self, error: BaseException | None) -> BaseException | None:
        """What storage or another process has caused, with the position of the run; other faults as they are."""
        position = f'{self.sampler.unit} {self.folder.epoch}, after {self.folder.step} of {self.sampler.steps} steps'
        if (line := resources.named(error, self.args)) is not error:
            error = ResourceError(f'{position}: {line}')
        elif dist.is_lost(error):
            error = LostError(f'{position}: {self.folder.lost(error)}')
        elif isinstance(error, OSError) and (error.errno in STORAGE or not self.args.output_dir.is_dir()):
            error = StorageError(f'{position}: {error}')
        alone = self.agreed or isinstance(error, LostError)  # before, a mistake may be every rank's
        if isinstance(error, RunError) and dist.active() and alone and not error.common:
            error.rank = dist.rank()
        return error

    def end_for_lost(self, error: BaseException) -> None:
        """Name a lost rank and end this process, if the main thread gets no further in a step: it waits for a GPU.

        Elsewhere that thread notices for itself, or has something to bring to its end.
        """
        before = None
        while not (self.stepping and before == self.folder.step):
            before = self.folder.step
            time.sleep(TURN_S)
        with contextlib.suppress(Exception):  # told is the lost rank
            self.writer.wait()
        named = self.named(error)
        self.folder.close(named.code, str(named), noticed=True)
        tell(named)
        console.flush()
        os._exit(named.code)

    def identity(self) -> dict:
        """What decides which sample and which mask comes when, and the optimiser: what a resumed run must share."""
        return {
            **{name: getattr(self.args, name) for name, role in self.roles.items() if role == 'same'},
            'stage': self.stage,
            'images': self.sampler.num_samples,
            'effective_batch': self.sampler.global_batch,
        }

    # --------------------------------------------------------------------------
    # resuming

    def branches(self) -> bool:
        """Whether the run resumes from a checkpoint of its own folder that was named: a branch begins there."""
        resume = self.args.resume
        return resume not in (None, 'auto') and Path(resume).resolve().parent == self.args.output_dir.resolve()

    def find_saved(self) -> tuple[Path | None, dict | None]:
        """The checkpoint that --resume means, and what it holds. A damaged one is skipped, with a warning."""
        args = self.args
        if not args.resume:
            return None, None
        if args.resume != 'auto':
            return Path(args.resume), read_checkpoint(args.resume)
        path, saved, self.damaged = checkpoint.find_newest(args.output_dir)
        self.notices += [f'WARNING: {why}; it is put aside, and {path} taken' for why in self.damaged.values()]
        if not path:
            checkpoint.check_unused(args.output_dir)  # the best one of an earlier run may be there
            self.notices.append(f'no checkpoint in {args.output_dir} to resume: this is a new run')
        elif not digests.beside(path).exists():
            self.notices.append(f'{path} has no SHA-256 beside it; only the checksums within it were checked')
        return path, saved

    def keep_decoder(self) -> None:
        """Let a resumed run decode as it did, where no flag says how. Raises UserError if the decoder is missing here.

        Runs of older versions had Pillow.
        """
        run = self.saved and self.saved.get('run')
        if isinstance(run, dict):  # else `check_same_run` refuses it
            decoder = plain_field(run.setdefault('decoder', decoders.PIL))
            if 'decoder' not in self.args.given and decoder != self.args.decoder:
                self.args = argparse.Namespace(**vars(self.args) | {'decoder': decoder})
                self.notices.append(f'taken from {self.resumed_from}: --decoder {decoder}')
        try:
            decoders.resolved(self.args.decoder)
        except UserError as error:
            whose = f'{self.resumed_from} was trained with a decoder that is missing here: ' if self.saved else ''
            raise UserError(f'{whose}{error}') from error

    def other_classes(self, origin: Origin | None, theirs: str, ours: str) -> str:
        """How the classes of a checkpoint's network differ from this run's; '' if they are equal, or not known."""
        then, now = origin and origin.classes, self.classes
        return named.difference(then, now, theirs, ours) if then and now and then != now else ''

    def first_network(
        self,
        make: Callable[[argparse.Namespace], nn.Module],
        check: Callable[[nn.Module, argparse.Namespace], None],
        parser: config.Parser,
        name: str,
        **options,
    ) -> tuple[argparse.Namespace, nn.Module]:
        """The arguments, and the network, on rank 0 with the weights of the flag `name` unless the run is resumed.

        Images are normalised as in the file, unless flag or recipe says how. `check` tries the network, unless it has
        trained already.
        """
        path, ema = getattr(self.args, name), getattr(self.args, f'{name}_ema')
        if ema and not path:
            raise UserError(f'--{name}_ema needs --{name} PATH')
        if self.saved:
            source = Source.of(self.resumed_from, self.saved)
        elif path:
            self.meet()
            source = dist.from_main(lambda: Source.read(path), Source.outline)
        else:
            source = Source.read(None)
        args = self.args = source.complete(self.args, parser, take=('mean', 'std', *parser.of_file))
        self.loaded = bool(path or self.saved)
        replaced = self.saved or (path and not dist.is_main())  # by what is saved, or rank 0 shares
        with source.expected(args):
            with rng.undrawn() if replaced else contextlib.nullcontext():
                core = make(args)
            changed = checkpoint.changed_settings(self.saved, config.plain(args), self.roles) if self.saved else []
            if not self.saved or changed or args.batch_size == 1:  # which BatchNorm may refuse
                check(core, args)
            if path and not self.saved:
                given = {'label': source.path, 'ema': ema, 'flag': f'--{name}_ema', **options}
                dist.from_main(lambda: self.load(core, source.container, **given))
        self.notices += changed if self.saved else source.notices
        return args, core

    def load(self, core: nn.Module, container: dict, **options) -> None:
        """Fill the network of a new run from what a file holds."""
        report = load_published(core, container, **options)
        self.weights = f'weights from {report}'
        if not report.missing and (differing := self.other_classes(report.origin, report.source, 'train/')):
            self.notices.append(f'the head that was loaded was trained for other classes: {differing}')

    def meet(self) -> torch.device:
        """Wait for the other processes, the first time; returns this process's device.

        As late as can be, since a mistake needs no others to be told: before one reads a checkpoint for all, or trains.
        """
        if not self.device:
            signals.restore()  # while it waits for them, Python could not obey
            self.device = dist.init(self.args.device, self.args.dist_url, self.args.dist_timeout)
            signals.install_early()
            self.folder.run = dist.gather(self.folder.run)[0]
        return self.device

    def join(self, core: nn.Module, ema: WeightAverage | None = None, **data: Split) -> torch.device:
        """Check the network against the checkpoint, and that the ranks agree; returns this process's device.

        `data` are the splits by name, on which the ranks must agree.
        """
        if self.saved:
            if ema and 'ema' not in self.saved:
                raise UserError(f'{self.resumed_from} has no averaged weights: it cannot be resumed with --use_ema')
            for name in ('model', 'ema') if ema else ('model',):
                checkpoint.check_same_weights(self.saved[name], core.state_dict(), self.resumed_from)
            dist.from_main(lambda: checkpoint.check_healthy(self.saved, self.resumed_from))
        device = self.meet()
        agreement.check(self.args, device, **data)
        self.agreed = True
        rng.settle_kernels(self.args.deterministic, sizes_vary=self.stage == 'detect')
        return device

    def resume(self, training: Training, images: ImageFiles) -> None:
        """Take the training to the position that was saved, if one was; then open the logs and tell what will run.

        `images` are those of the sampler: a run that diverges names them.
        """
        args = self.args
        self.training, self.images = training, images
        self.first_epoch, self.first_step, self.sums = args.start_epoch, 0, None
        if self.saved:
            training.restore(self.saved)
            self.record = self.saved['record']
            self.first_epoch, self.first_step = position(self.saved)
            self.sums = self.saved['logger'] if self.first_epoch == self.saved['epoch'] else None
            self.saved = None
        if self.loaded:
            training.share()
        if args.dry_run:
            info('dry run: nothing is written to --output_dir')
            self.notices.append(self.room_on_disk())
            self.announce()
            return
        if dist.is_main():
            self.tidy_folder()
            if not self.resumed_from:  # no rank trains before all are past this
                images.reader.clear_list()
        first = self.axis(self.first_epoch, self.first_step)
        self.log = RunLog(args.output_dir, args.log_dir or args.output_dir, self.first_epoch, first)
        signals.install()
        self.announce()
        self.keep_arguments()

    def nothing_left(self) -> bool:
        """Whether the run was at its end already, which is said; then it must not go on, for it would change files.

        Raises UserError if it is beyond the end that --epochs or --steps asks for.
        """
        if not self.saved:
            return False
        (epoch, step), epochs = position(self.saved), self.args.epochs
        done = f'{epoch} {self.sampler.unit}s' + (f' and {step} steps' if step else '')
        whole = f'--epochs {epochs}' if self.sampler.unit == 'epoch' else f'--steps {self.args.steps}'
        if (epoch, step) > (epochs, 0):
            raise UserError(f'{self.resumed_from} has done {done}, more than {whole}')
        if epoch == epochs:
            info(f'nothing is left to train: {self.resumed_from} has done all of {whole}')
            dist.cleanup()
        return epoch == epochs

    def tidy_folder(self) -> None:
        """Make the output folder as a save leaves it, whatever a kill has left. Raises StorageError without room."""
        folder = self.args.output_dir
        self.notices.append(self.room_on_disk())
        if removed := checkpoint.clean(folder, self.damaged):
            self.notices.append(f'removed {removed} unfinished files of a run that was killed')
        if self.branches():
            later = checkpoint.abandon_later(folder, self.first_epoch, self.resumed_from)
            self.notices += [f'put aside, as later than {self.resumed_from}: {path}' for path in later]
        last = folder / checkpoint.LAST
        if self.resumed_from and self.resumed_from.parent.samefile(folder) and not last.exists():
            checkpoint.link(self.resumed_from, last)

    def room_on_disk(self) -> str:
        """What the run's checkpoints take, and what is free. Raises StorageError without room for one."""
        folder = self.args.output_dir.absolute()
        there = next(path for path in (folder, *folder.parents) if path.exists())
        if not (there.is_dir() and os.access(there, os.W_OK)):  # a dry run has not tried it
            raise StorageError(f'cannot write to the output folder {folder}: {there} cannot be written to')
        return checkpoint.check_space(there, self.training.sizes(), self.kept_checkpoints())

    def kept_checkpoints(self) -> int:
        """How many checkpoints the run will leave: numbered ones, the last and the one before it."""
        args = self.args
        ends = range(self.first_epoch + 1, args.epochs + 1)
        count = sum(end % args.save_freq == 0 or end == args.epochs for end in ends)
        return min(count, args.keep_last or count) + 2

    def warm_up(self) -> str:
        """What the arithmetic line says of the warm-up."""
        args, unit = self.args, 'epoch' if self.sampler.unit == 'epoch' else 'step'
        warm_up, whole = getattr(args, f'warmup_{unit}s'), getattr(args, f'{unit}s')
        recipes = recipe_value(args, f'warmup_{unit}s') or 0
        too_long = f' (the {recipes:g} of the recipe do not fit)' * (recipes >= whole > warm_up)
        return f'warm-up {warm_up:g} of {counted(whole, unit)}{too_long}'

    def announce(self) -> None:
        """Tell what is about to run."""
        args, training, sampler = self.args, self.training, self.sampler
        _, arithmetic = optim.scaled_lr(args, sampler.accum_iter)
        dropped, unit = sampler.num_samples % sampler.global_batch, sampler.unit
        params = sum(p.numel() for p in training.core.parameters() if p.requires_grad)
        dtype = str(training.amp_dtype or torch.float32).removeprefix('torch.')
        if notice := getattr(training.core, 'notice', ''):
            info(notice)
        side, where = args.input_size, f'{dtype} on {dist.world_size()} x {training.device.type}'
        info(f'{args.model}: {params:,} trainable parameters, {side} x {side} pixels, {where}')
        info(f'{arithmetic}, {self.warm_up()}')
        for notice in self.notices:
            info(notice)
        each = 'epoch' if unit == 'epoch' else 'pass'
        dropped = f'; {counted(dropped, "image")} of each {each} fill no step and are dropped' if dropped else ''
        steps = f'{counted(sampler.pass_steps, "step")} {"an epoch" if each == "epoch" else "a pass"}'
        info(f'{counted(sampler.num_samples, "training image")}, {steps}{dropped}')
        if unit == 'round':
            passes = args.steps / sampler.pass_steps
            info(f'{counted(args.epochs, unit)} of {counted(sampler.steps, "step")}: {passes:.1f} passes over the data')
        apart = training.device.type == 'cpu' or getattr(args, 'probe', None)  # else it is SyncBatchNorm
        if dist.has_batchnorm(training.core) and dist.world_size() > 1 and apart:
            info("BatchNorm keeps its running statistics per process; rank 0's are saved and evaluated")
        if not args.config and (recipes := recipes_for(args.model, self.stage)):
            info(f'no --config given; recipes for this model: {", ".join(recipes)}')
        position = f'{unit} {self.first_epoch}, step {self.first_step} of {sampler.steps}'
        info(f'resumed from {self.resumed_from} at {position}' if self.resumed_from else self.weights)

    def keep_arguments(self) -> None:
        """Keep what runs in `args.json`, and in TensorBoard."""
        if dist.is_main():
            resolved = config.plain(self.args) | {'lr': self.training.lr, 'accum_iter': self.sampler.accum_iter}
            resolved |= {'classes': self.classes} if self.classes else {}
            digests.replace(self.args.output_dir / 'args.json', (json.dumps(resolved, indent=2) + '\n').encode())
            self.log.arguments(resolved, self.axis(self.first_epoch, self.first_step))

    # --------------------------------------------------------------------------
    # the loop

    def epochs(self) -> Iterator[Epoch]:
        """The epochs that are left; the first may begin in its middle.

        A request to stop ends the process after the step, or else before the epoch, that it falls into.
        """
        self.meetings, self.stepping = dist.Meetings(), False
        dist.watch(self.end_for_lost)
        self.began, self.began_at = time.monotonic(), self.first_epoch + self.first_step / self.sampler.steps
        for number in range(self.first_epoch, self.args.epochs):
            sampler = self.sampler
            meters = MetricLogger(
                f'{sampler.unit.capitalize()}: [{number}]',
                self.first_step,
                sampler.steps,
                sampler.global_batch,
                self.args.print_freq,
                self.training.device,
            )
            if self.sums:
                meters.load_sums(self.sums)
            epoch = Epoch(number, self.first_step, sampler.steps, meters)
            self.first_step, self.sums = 0, None
            self.folder.beat(epoch.number, epoch.first_step)
            self.stop_if_asked(epoch, epoch.first_step)
            self.stepping = True
            yield epoch

    def after_step(self, epoch: Epoch, step: int, lr: float) -> None:
        """After optimiser step `step` (from 0): when due, a line with the check for bad steps, and a checkpoint."""
        self.stepping = False
        done, every = step + 1, self.args.save_freq_steps
        self.folder.beat(epoch.number, done)
        self.writer.check()
        line, save = epoch.meters.due(step), every and done % every == 0 and done < epoch.steps
        # also before any wait for a GPU: here hosts notice that a rank is lost
        meet = self.meetings.due() or line or save
        asked = self.meetings.largest(signals.requested()) if meet else 0
        if line:
            bad_steps = self.bad_steps(epoch, done)
            counts = {'bad_steps': bad_steps, **self.images.reader.counted()}
            values = epoch.meters.line(step, lr, self.seconds_left(epoch.at(done)), **counts)
            self.log.scalars(self.axis(epoch.number, done), lr=lr, **values)
        if save:
            self.save(checkpoint.LAST, epoch, done)
        if asked and done < epoch.steps:  # else the epoch is to be closed first: log.txt, numbered checkpoint
            self.stop(asked, epoch, done)
        self.stepping = done < epoch.steps

    def seconds_left(self, epoch: float) -> float:
        """An estimate at this fractional epoch, by what this process has done so far, evaluations included."""
        return (time.monotonic() - self.began) * (self.args.epochs - epoch) / (epoch - self.began_at)

    def save_before_evaluation(self, epoch: Epoch) -> None:
        """An evaluation takes long: a kill, or a request to stop, in it shall not cost the epoch."""
        self.save(checkpoint.LAST, epoch, epoch.steps, closed=False)
        self.stop_if_asked(epoch, epoch.steps)

    def after_epoch(self, epoch: Epoch, **values) -> None:
        """The epoch's line in log.txt, TensorBoard's points of its tests, its checkpoints; health, once warmed up."""
        args, number = self.args, epoch.number
        counts = {'bad_steps': self.bad_steps(epoch, epoch.steps), **self.images.reader.counted()}
        tests = {name: value for name, value in values.items() if name.startswith(('test', 'knn', 'rank'))}
        timing = epoch.meters.timing()
        self.folder.check_lock()
        self.log.scalars(self.axis(number + 1, 0), **tests)
        self.log.epoch(**values, **counts, **timing, epoch=number)
        if self.stage == 'pretrain' and number == max(0, math.ceil(args.warmup_epochs) - 1):
            skipped = counts['bad_steps'] / ((number + 1) * epoch.steps)
            info(f'after the warm-up: {health({**epoch.meters.latest, **values, **timing, "skipped": skipped})}')
        at_end = number + 1 == args.epochs
        numbered = f'checkpoint-{number}.pth' if (number + 1) % args.save_freq == 0 or at_end else ''
        # the last thing: a run that is killed before this does all of the above again
        self.save(checkpoint.LAST, epoch, epoch.steps, numbered=numbered, wait=at_end)

    def add_picture(self, epoch: Epoch, picture: np.ndarray, name: str = 'reconstruction') -> None:
        """Keep a [height, width, 3] uint8 picture as PNG, and by its name in TensorBoard."""
        Image.fromarray(picture).save(self.args.output_dir / f'pictures-{epoch.number}.png')
        self.log.image(name, picture, self.axis(epoch.number + 1, 0))

    def axis(self, epoch: int, step: int) -> int:
        """MAE's TensorBoard axis, `epoch_1000x`: thousandths of an epoch."""
        return int(1000 * (epoch + step / self.sampler.steps))

    def bad_steps(self, epoch: Epoch, step: int) -> int:
        """How many steps of the run were skipped, after `step` steps of the epoch; too many in a row end it. Syncs.

        Every rank must call it. To be called before a line is printed, which drops the values of its steps.
        """
        counts = self.training.optimizer.counts()
        if counts['streak'] > self.training.optimizer.allowed:
            raise diagnosis.diverged(self.training, self.stage, self.images, epoch, step, counts)
        return counts['bad_steps']

    # --------------------------------------------------------------------------
    # stopping and saving

    def stop_if_asked(self, epoch: Epoch, step: int) -> None:
        """Where any rank was asked to stop, end all of them at this position."""
        if asked := dist.largest(signals.requested()):
            self.stop(asked, epoch, step)

    def stop(self, request: int, epoch: Epoch, step: int) -> None:
        """Save after `step` steps of the epoch, and end as stopped; queued again, where that was the request."""
        self.save(checkpoint.LAST, epoch, step, closed=False, wait=True)
        dist.barrier()  # no rank says that the state is saved before it is
        signals.ignore()
        self.folder.close(STOPPED, '')  # before it is queued again: its next process takes the folder over
        where = f'{self.sampler.unit} {epoch.number}, step {step} of {epoch.steps}'
        info(f'stopped on request at {where}; state saved: resume with --resume auto')
        signals.end_workers()
        requeue = signals.requeue_handler()
        if request == signals.REQUEUE and requeue:
            if dist.is_main():
                try:
                    requeue(signal.SIGUSR2, None)  # does not return
                except (OSError, subprocess.SubprocessError) as error:  # scontrol is missing, fails or does not answer
                    again = f'submit it with --output_dir {self.args.output_dir} --resume auto'
                    info(f'the job was not queued again: {error}; if nobody else has done it, {again}')
            dist.wait_for_main_to_end()
        else:
            dist.cleanup()
        raise SystemExit(STOPPED)

    def save(
        self, name: str, epoch: Epoch, step: int, closed: bool = True, numbered: str = '', wait: bool = False
    ) -> None:
        """Write the state after `step` optimiser steps of the epoch; every rank must call it, rank 0 writes.

        `closed` is False after the last step of an epoch whose evaluation is still to come. A `numbered` file gets the
        same state, before that. With `wait`, all is written when this returns; else it may be written while training
        goes on. After too many bad steps in a row nothing is written: they end the run, and what was written before
        stays.
        """
        self.folder.check_lock()
        self.bad_steps(epoch, step)
        position = {'epoch': epoch.number, 'step': step, 'steps': epoch.steps, 'closed': closed}
        sums = epoch.meters.sums()
        if dist.is_main():
            self.log.flush()
            state = {
                'schema': checkpoint.SCHEMA,
                **self.training.state(),
                **position,
                'logger': sums,
                'record': self.record,
                'run': self.identity(),
                'args': config.plain(self.args),
                **({'classes': self.classes} if self.classes else {}),
            }
            self.writer.start(partial(self.write, name, numbered), state, self.training.sizes(), wait)
            if not self.folder.has_failed():
                self.folder.write_status('running')

    def keep_best(self, epoch: Epoch, networks: dict[str, nn.Module], tests: dict[str, dict], by: str) -> None:
        """Write `checkpoint-best.pth`, weights alone, when the best of the networks beats all before in `by`."""
        name = max(tests, key=lambda key: tests[key][by])
        if tests[name][by] <= self.record.get(f'best_{by}', -math.inf):
            return
        self.record |= {f'best_{by}': tests[name][by], 'best_epoch': epoch.number}
        if dist.is_main():
            self.folder.check_lock()
            state = {
                'model': networks[name].state_dict(),
                'weights': name,
                'classes': self.classes,
                'args': config.plain(self.args),
                **({} if self.stage == 'finetune' else {'run': {'stage': self.stage}}),  # whose files never said it
                **self.record,
            }
            write = partial(checkpoint.save, self.args.output_dir / checkpoint.BEST)
            self.writer.start(write, state, self.training.sizes())

    def write(self, name: str, numbered: str, state: dict) -> None:
        """Write a state to one file, or to two of the same bytes; then what --keep_last does not keep is removed."""
        folder, keep = self.args.output_dir, self.args.keep_last
        checkpoint.save(folder / (numbered or name), state)
        if numbered and keep:
            checkpoint.prune(folder, keep, in_use=[self.resumed_from])
        if numbered:
            checkpoint.save_again(folder / numbered, folder / name)


def position(saved: dict) -> tuple[int, int]:
    """The epoch that a checkpoint's run goes on with, and the steps done in it."""
    if saved['step'] == saved['steps'] and saved.get('closed', True):
        return saved['epoch'] + 1, 0
    return saved['epoch'], saved['step']
