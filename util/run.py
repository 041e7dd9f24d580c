"""What pretraining and fine-tuning do alike around their epochs: set up, resume, save, log."""

import argparse
import errno
import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader

from util import checkpoint, config, diagnosis, digests, dist, rng, signals
from util.data import datasets
from util.data.images import Reader
from util.errors import STOPPED, DivergedError, LostError, RunError, StorageError, UserError, exit_code
from util.log import MetricLogger, RunLog, info
from util.nn.grad_checkpoint import checkpoint_blocks
from util.optim import OPTIMIZERS, GuardedStep, Rules, learning_rate, load_optimizer_state, param_groups
from util.run_folder import RunFolder, prepare
from util.weights import read_checkpoint

IDENTITY = [
    'model',
    'model_kwargs',
    'dataset',
    'input_size',
    'mask_ratio',
    'norm_pix_loss',
    'repeated_aug',
    'opt',
    'seed',
]
STORAGE = {getattr(errno, name) for name in ('ENOSPC', 'EDQUOT', 'EFBIG', 'EROFS', 'EIO', 'ESTALE', 'ENOTCONN')}


class Run:
    """A training run: made from its arguments, started with a model, resumed and saved by the optimiser step.

    `Run(...)` finds the user's mistakes and starts nothing but its hold on the output folder; `start` joins the process
    group and builds the optimiser. In a `with` statement, it leaves word of its end, whatever it is, and names faults
    that a disk or another process has caused.
    """

    def __init__(self, args: argparse.Namespace, stage: str, num_images: int):
        config.check_common_args(args)
        config.check_schedule(args)
        here = dist.place()
        self.args, self.stage, self.num_images = args, stage, num_images
        self.reader = Reader.of(args)
        accum_iter = config.accumulation(args)
        self.lr, self.arithmetic = config.scaled_lr(args, accum_iter)
        copies = getattr(args, 'repeated_aug', 1)
        self.sampler = datasets.EpochBatches(
            num_images, args.batch_size, accum_iter, here.rank, here.world_size, args.seed, copies
        )
        if not self.sampler.steps:
            raise UserError(
                f'{num_images} training images in {args.data_path} are fewer than one step takes: {self.arithmetic}'
            )
        if args.resume != 'auto' and not self.rewinds():
            checkpoint.check_unused(args.output_dir)
        self.folder = RunFolder(args.output_dir, here)
        prepare(args.log_dir or args.output_dir)
        self.notices: list[str] = []  # to be told when the run is announced
        self.damaged: dict[Path, str] = {}  # checkpoints that were passed over, and why
        self.resumed_from: Path | None = None
        self.saved: dict | None = None  # what it holds, until it is restored
        self.record: dict[str, float] = {}  # what a stage wants kept across resumes (best accuracy)
        self.ema: nn.Module | None = None

    def rewinds(self) -> bool:
        """Whether the run takes another way from a checkpoint of its own folder."""
        resume = self.args.resume
        return resume not in ('', 'auto') and Path(resume).resolve().parent == self.args.output_dir.resolve()

    def find_saved(self) -> tuple[Path | None, dict | None]:
        """The checkpoint that --resume means, and what it holds. A damaged one is passed over, with a warning."""
        args = self.args
        if not args.resume:
            return None, None
        if args.resume != 'auto':
            return Path(args.resume), read_checkpoint(args.resume)
        path, saved, self.damaged = checkpoint.find_newest(args.output_dir)
        self.notices += [f'WARNING: {why}; it is put aside, and {path} taken' for why in self.damaged.values()]
        if not path:
            checkpoint.check_unused(args.output_dir)  # the best one of an earlier run may be there
            self.notices.append(f'no checkpoint in {args.output_dir} to resume: this run begins anew')
        elif not digests.beside(path).exists():
            self.notices.append(f'{path} has no SHA-256 beside it; only the checksums within it were checked')
        return path, saved

    def __enter__(self) -> 'Run':
        signals.install_early()
        try:
            if self.folder.place.rank == 0:
                self.folder.write_status('running')
            self.resumed_from, self.saved = self.find_saved()
            if self.saved:
                checkpoint.check_same_run(self.saved, self.identity(), self.resumed_from)
                self.notices += checkpoint.changed_settings(self.saved, config.plain(self.args))
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def __exit__(self, kind, error: BaseException | None, traceback) -> None:
        """Leave word of the end. Raises what the fault is to be called, if that is not how it came."""
        named = self.named(error)
        message = str(named) if isinstance(named, RunError) else f'{type(named).__name__}: {named}'
        self.folder.close(exit_code(named), message, noticed=named is not error and isinstance(named, LostError))
        signals.restore()
        if named is not error:
            raise named from error

    def named(self, error: BaseException | None) -> BaseException | None:
        """What storage or another process has caused, with its place; other faults as they are."""
        place = f'epoch {self.folder.epoch}, after {self.folder.step} of {self.sampler.steps} steps'
        if dist.is_lost(error):
            error = LostError(f'{place}: {self.folder.lost(error)}')
        elif isinstance(error, OSError) and (error.errno in STORAGE or not self.args.output_dir.is_dir()):
            error = StorageError(f'{place}: {error}')
        if isinstance(error, RunError) and dist.active() and not isinstance(error, DivergedError):
            error.rank = dist.rank()
        return error

    def identity(self) -> dict:
        """What decides which sample and which mask comes when, and the optimiser: what a resumed run must share."""
        return {
            **{name: getattr(self.args, name) for name in IDENTITY if hasattr(self.args, name)},
            'stage': self.stage,
            'images': self.num_images,
            'effective_batch': self.sampler.global_batch,
        }

    def start(self, core: nn.Module, rules: Rules, layer_decay: float = 1.0, ema: nn.Module | None = None) -> None:
        """Join the process group, move the model, build its optimiser, and load the checkpoint that is resumed."""
        args = self.args
        if args.compile and dist.will_synchronise(core, args.device):
            raise UserError('--compile: torch cannot compile SyncBatchNorm, with which several GPUs train this model')
        if args.grad_checkpoint and not checkpoint_blocks(core):
            raise UserError(f'--grad_checkpoint: {args.model} has no blocks to make again')
        if self.saved:
            checkpoint.check_same_weights(self.saved['model'], core.state_dict(), self.resumed_from)
            if ema and 'ema' not in self.saved:
                raise UserError(f'{self.resumed_from} has no averaged weights: it cannot be resumed with --use_ema')
        signals.restore()  # while it waits for other processes, Python could not obey
        self.device = dist.init(args.device, args.dist_url, args.dist_timeout)
        signals.install_early()
        self.agree_on_saved()
        rng.settle_kernels(args.deterministic)
        self.amp_dtype = config.amp_dtype(args, self.device)
        memory_format = config.memory_format(args, core)
        self.statistics = datasets.statistics(args.mean, args.std, self.device, memory_format)
        self.core = dist.sync_batchnorm(core.to(self.device, memory_format=memory_format), self.device)
        self.ema = ema.to(self.device, memory_format=memory_format) if ema else None
        groups = param_groups(self.core, rules, args.weight_decay, layer_decay)
        optimizer = OPTIMIZERS[args.opt](groups, self.lr, args.betas, args.opt_eps)
        fp16 = self.amp_dtype is torch.float16
        self.guard = GuardedStep(self.core, optimizer, self.device, fp16, args.clip_grad, args.max_bad_steps)
        self.first_epoch, self.first_step, self.averages = args.start_epoch, 0, None
        if self.saved:
            self.restore(self.saved)
        self.model = dist.parallel(self.core, self.device, args.compile)
        if dist.is_main():
            self.tidy_folder()
        first = self.axis(self.first_epoch, self.first_step)
        self.log = RunLog(args.output_dir, args.log_dir or args.output_dir, self.first_epoch, first)
        signals.install()
        self.announce()

    def agree_on_saved(self) -> None:
        """Raise StorageError unless all ranks have read one checkpoint: a disk can show them different ones."""
        saved = self.saved or {}
        mine = (str(self.resumed_from), *(saved.get(key) for key in ('epoch', 'step', 'closed')))
        runs, found = zip(*dist.gather((self.folder.run, mine)), strict=True)
        self.folder.run = runs[0]
        if len(set(found)) > 1:
            raise StorageError(f'the ranks see different checkpoints in {self.args.output_dir}: {found}')

    def tidy_folder(self) -> None:
        """Make the output folder as a save leaves it, whatever a kill has left. Raises StorageError without room."""
        folder = self.args.output_dir
        moments = [param for param in self.core.parameters() if param.requires_grad] * 2
        checkpoint.check_space(folder, [*self.core.state_dict().values(), *moments])
        if removed := checkpoint.clean(folder, self.damaged):
            self.notices.append(f'removed {removed} unfinished files of a run that was killed')
        if self.rewinds():
            later = checkpoint.abandon_later(folder, self.first_epoch, self.resumed_from)
            self.notices += [f'put aside, as later than {self.resumed_from}: {path}' for path in later]
        last = folder / checkpoint.LAST
        if self.resumed_from and self.resumed_from.parent.samefile(folder) and not last.exists():
            checkpoint.link(self.resumed_from, last)

    def announce(self) -> None:
        """Say what is about to run, and keep it beside the checkpoints."""
        args, steps = self.args, self.sampler.steps
        left_out = self.num_images % self.sampler.global_batch
        params = sum(p.numel() for p in self.core.parameters() if p.requires_grad)
        dtype = str(self.amp_dtype or torch.float32).removeprefix('torch.')
        if notice := getattr(self.core, 'notice', ''):
            info(notice)
        info(f'{args.model}: {params:,} trainable parameters, {dtype} on {dist.world_size()} x {self.device.type}')
        info(self.arithmetic)
        for notice in self.notices:
            info(notice)
        info(f'{self.num_images} training images, {steps} steps an epoch; {left_out} images are left out of each epoch')
        if dist.has_batchnorm(self.core) and dist.world_size() > 1 and self.device.type == 'cpu':
            info("BatchNorm keeps its statistics per process on CPU; rank 0's are saved and evaluated")
        if not args.config and (recipes := config.recipes_for(args.model, self.stage)):
            info(f'no --config given; recipes for this model: {", ".join(recipes)}')
        if self.resumed_from:
            info(f'resumed from {self.resumed_from} at epoch {self.first_epoch}, step {self.first_step} of {steps}')
        if dist.is_main():
            resolved = config.plain(args) | {'lr': self.lr, 'accum_iter': self.sampler.accum_iter}
            digests.replace(args.output_dir / 'args.json', (json.dumps(resolved, indent=2) + '\n').encode())

    # --------------------------------------------------------------------------
    # what the engines ask for

    def loader(self, images: datasets.Images, labels: list[int] | None, transform: Callable) -> DataLoader:
        """Training batches in the run's order."""
        args = self.args
        if dist.is_main() and not self.resumed_from:  # no rank trains before all are past this
            self.reader.start_anew()
        self.images = datasets.ImageFiles(images, labels, transform, args.seed, self.reader)
        return datasets.loader(self.images, self.sampler, args.num_workers, self.pin_memory, args.dist_timeout)

    @property
    def pin_memory(self) -> bool:
        return self.args.pin_mem and self.device.type == 'cuda'

    def set_lr(self, epoch: float) -> float:
        """Set every group's learning rate at a fractional epoch; returns that of scale 1."""
        lr = self.schedule(epoch)
        # the rate of a group whose scale is 0: with an absolute minimum, no group ends below it
        floor = self.schedule(epoch, 0.0) if self.args.min_lr_absolute else 0.0
        self.guard.set_lr(lr, floor)
        return lr

    def schedule(self, epoch: float, peak: float | None = None) -> float:
        """The learning rate at a fractional epoch; `peak` takes the place of the run's own."""
        args = self.args
        return learning_rate(
            epoch,
            lr=self.lr if peak is None else peak,
            epochs=args.epochs,
            warmup_epochs=args.warmup_epochs,
            warmup_lr_ratio=args.warmup_lr_ratio,
            warmup_shape=args.warmup_shape,
            min_lr=args.min_lr,
            sched=args.lr_sched,
            cosine_start=args.cosine_start,
            decay_epochs=tuple(args.lr_decay_epochs),
            decay_rate=args.lr_decay_rate,
            per_epoch=args.sched_per_epoch,
        )

    def epochs(self) -> Iterator[tuple[int, MetricLogger]]:
        """The epochs that are left, each with its logger; the first may begin in its middle.

        A request to stop ends the process after the step, or else before the epoch, that it falls into.
        """
        for epoch in range(self.first_epoch, self.args.epochs):
            logger = MetricLogger(
                f'Epoch: [{epoch}]',
                self.first_step,
                self.sampler.steps,
                self.sampler.global_batch,
                self.args.print_freq,
                self.device,
            )
            if self.averages:
                logger.load_sums(self.averages)
            self.first_step, self.averages = 0, None
            self.folder.beat(epoch, logger.start)
            self.stop_if_asked(epoch, logger.start, logger)
            yield epoch, logger

    def after_step(self, epoch: int, step: int, lr: float, logger: MetricLogger) -> None:
        """After optimiser step `step` (from 0): when due, a line with the check for bad steps, and a checkpoint."""
        self.folder.beat(epoch, step + 1)
        asked = dist.largest(signals.requested())  # before any wait for a GPU: here hosts notice that a rank is lost
        if logger.due(step):
            bad_steps = self.bad_steps(epoch, step + 1, logger)
            values = logger.line(step, lr, bad_steps=bad_steps, **self.reader.counted())
            self.log.scalars(self.axis(epoch, step + 1), lr=lr, **values)
        every = self.args.save_freq_steps
        if every and (step + 1) % every == 0 and step + 1 < logger.steps:
            self.save(checkpoint.LAST, epoch, step + 1, logger)
        if asked and step + 1 < logger.steps:  # else the epoch is to be closed first: log.txt, numbered checkpoint
            self.stop(asked, epoch, step + 1, logger)

    def after_epoch(self, epoch: int, logger: MetricLogger, **values) -> None:
        """The epoch's line in log.txt and its checkpoints."""
        counts = {'bad_steps': self.bad_steps(epoch, logger.steps, logger), **self.reader.counted()}
        self.log.epoch(**values, **counts, epoch=epoch)
        if (epoch + 1) % self.args.save_freq == 0 or epoch + 1 == self.args.epochs:
            self.save(f'checkpoint-{epoch}.pth', epoch, logger.steps, logger)
            if self.args.keep_last and dist.is_main():
                checkpoint.prune(self.args.output_dir, self.args.keep_last, in_use=[self.resumed_from])
        # the last thing: a run that is killed before this does all of the above again
        self.save(checkpoint.LAST, epoch, logger.steps, logger)

    def bad_steps(self, epoch: int, step: int, logger: MetricLogger) -> int:
        """How many steps of the run were left out, after `step` steps of `epoch`; too many in a row end it. Syncs.

        Every rank must call it. To be called before a line is printed, which drops what its steps have given.
        """
        counts = self.guard.state_dict()
        if counts['streak'] > self.guard.allowed:
            raise diagnosis.diverged(self, epoch, step, logger, counts)
        return counts['bad_steps']

    def stop_if_asked(self, epoch: int, step: int, logger: MetricLogger) -> None:
        """Where any rank was asked to stop, end all of them at this place."""
        if asked := dist.largest(signals.requested()):
            self.stop(asked, epoch, step, logger)

    def stop(self, request: int, epoch: int, step: int, logger: MetricLogger) -> None:
        """Save after `step` steps of `epoch`, and end as stopped; queued again, where that was the request."""
        self.save(checkpoint.LAST, epoch, step, logger, closed=False)
        dist.barrier()  # no rank says that the state is saved before it is
        signals.ignore()
        self.folder.close(STOPPED, '')  # before it is queued again: its next process takes the folder over
        where = f'epoch {epoch}, step {step} of {logger.steps}'
        info(f'stopped on request at {where}; state saved: resume with --resume auto')
        signals.end_workers()
        requeue = signals.requeue_handler()
        if request == signals.REQUEUE and requeue:
            if dist.is_main():
                requeue(signal.SIGUSR2, None)  # does not return
            dist.wait_for_main_to_end()
        else:
            dist.cleanup()
        raise SystemExit(STOPPED)

    def axis(self, epoch: int, step: int) -> int:
        """MAE's TensorBoard axis, `epoch_1000x`: thousandths of an epoch."""
        return int(1000 * (epoch + step / self.sampler.steps))

    # --------------------------------------------------------------------------
    # checkpoints

    def save(self, name: str, epoch: int, step: int, logger: MetricLogger, closed: bool = True) -> None:
        """Write the state after `step` optimiser steps of `epoch`; every rank must call it, rank 0 writes.

        `closed` is False after the last step of an epoch whose evaluation is still to come. After too many bad steps in
        a row nothing is written: they end the run, and what was written before stays.
        """
        self.bad_steps(epoch, step, logger)
        sums = logger.sums()
        if dist.is_main():
            self.log.flush()
            checkpoint.save(self.args.output_dir / name, self.state(epoch, step, sums) | {'closed': closed})
            if not self.folder.has_failed():
                self.folder.write_status('running')

    def state(self, epoch: int, step: int, sums: dict) -> dict:
        """What a checkpoint holds."""
        state = {
            'schema': checkpoint.SCHEMA,
            'model': self.core.state_dict(),
            'optimizer': self.guard.optimizer.state_dict(),
            'scaler': self.guard.scaler.state_dict(),
            'guard': self.guard.state_dict(),
            'epoch': epoch,
            'step': step,
            'steps': self.sampler.steps,
            'logger': sums,
            'record': self.record,
            'run': self.identity(),
            'args': config.plain(self.args),
        }
        if hasattr(self.core, 'encoder_state_dict'):
            state['encoder'] = self.core.encoder_state_dict()
        if self.ema:
            state['ema'] = self.ema.module.state_dict()
        return state

    def restore(self, saved: dict) -> None:
        """Take up where a checkpoint was written. Learning rates, decay, betas and precision are this run's own."""
        self.core.load_state_dict(saved['model'])
        self.guard.keep_statistics()
        load_optimizer_state(self.guard.optimizer, saved['optimizer'])
        if saved['scaler']:
            self.guard.scaler.load_state_dict(saved['scaler'])
        if 'guard' in saved:
            self.guard.load_state_dict(saved['guard'])
        self.record = saved['record']
        if self.ema:
            self.ema.module.load_state_dict(saved['ema'])
        if saved['step'] == saved['steps'] and saved.get('closed', True):
            self.first_epoch = saved['epoch'] + 1
        else:
            self.first_epoch, self.first_step, self.averages = saved['epoch'], saved['step'], saved['logger']
        self.saved = None
