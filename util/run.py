"""What pretraining and fine-tuning do alike around their epochs: set up, resume, save, log."""

import argparse
import json
import signal
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.utils.data import DataLoader

from util import checkpoint, config, datasets, dist, rng, signals
from util.errors import STOPPED, UserError
from util.grad_checkpoint import checkpoint_blocks
from util.images import Reader
from util.log import MetricLogger, RunLog, info
from util.optim import OPTIMIZERS, GuardedStep, Rules, learning_rate, load_optimizer_state, param_groups
from util.weight_files import read_checkpoint


class Run:
    """A training run: made from its arguments, started with a model, resumed and saved by the optimiser step.

    `Run(...)` finds the user's mistakes and starts nothing; `start` joins the process group and builds the optimiser.
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
        if not args.resume:
            checkpoint.check_unused(args.output_dir)
        for folder in (args.output_dir, args.log_dir or args.output_dir):
            checkpoint.prepare_folder(folder)
        resume_from = checkpoint.find_resume(args.resume, args.output_dir)
        self.saved = read_checkpoint(resume_from) if resume_from else None
        if self.saved:
            checkpoint.check_same_run(self.saved, self.identity(), resume_from)
        self.resumed_from = resume_from
        self.record: dict[str, float] = {}  # what a stage wants kept across resumes (best accuracy)
        self.ema: nn.Module | None = None

    def identity(self) -> dict:
        """What decides which sample and which mask comes when, and the optimiser: what a resumed run must share."""
        args = self.args
        names = (
            'model',
            'model_kwargs',
            'dataset',
            'input_size',
            'mask_ratio',
            'norm_pix_loss',
            'repeated_aug',
            'opt',
            'seed',
        )
        return {
            **{name: getattr(args, name) for name in names if hasattr(args, name)},
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
        self.device = dist.init(args.device, args.dist_url, args.dist_timeout)
        rng.settle_kernels(args.deterministic)
        self.amp_dtype = config.amp_dtype(args, self.device)
        memory_format = config.memory_format(args, core)
        self.statistics = datasets.statistics(args.mean, args.std, self.device, memory_format)
        self.core = dist.sync_batchnorm(core.to(self.device, memory_format=memory_format), self.device)
        self.ema = ema.to(self.device, memory_format=memory_format) if ema else None
        groups = param_groups(self.core, rules, args.weight_decay, layer_decay)
        optimizer = OPTIMIZERS[args.opt](groups, self.lr, args.betas, args.opt_eps)
        fp16 = self.amp_dtype is torch.float16
        self.guard = GuardedStep(self.core, optimizer, self.device, fp16, args.clip_grad)
        self.first_epoch, self.first_step, self.averages = args.start_epoch, 0, None
        if self.saved:
            self.restore(self.saved)
        self.model = dist.parallel(self.core, self.device, args.compile)
        if dist.is_main():
            checkpoint.clean(args.output_dir)
        first = self.axis(self.first_epoch, self.first_step)
        self.log = RunLog(args.output_dir, args.log_dir or args.output_dir, first)
        self.announce()

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
        info(f'{self.num_images} training images, {steps} steps an epoch; {left_out} images are left out of each epoch')
        if dist.has_batchnorm(self.core) and dist.world_size() > 1 and self.device.type == 'cpu':
            info("BatchNorm keeps its statistics per process on CPU; rank 0's are saved and evaluated")
        if not args.config and (recipes := config.recipes_for(args.model, self.stage)):
            info(f'no --config given; recipes for this model: {", ".join(recipes)}')
        if self.resumed_from:
            info(f'resumed from {self.resumed_from} at epoch {self.first_epoch}, step {self.first_step} of {steps}')
        if dist.is_main():
            resolved = config.plain(args) | {'lr': self.lr, 'accum_iter': self.sampler.accum_iter}
            (args.output_dir / 'args.json').write_text(json.dumps(resolved, indent=2) + '\n', encoding='utf-8')

    # --------------------------------------------------------------------------
    # what the engines ask for

    def loader(self, images: datasets.Images, labels: list[int] | None, transform: Callable) -> DataLoader:
        """Training batches in the run's order."""
        args = self.args
        if dist.is_main() and not self.resumed_from:  # no rank trains before all are past this
            self.reader.start_anew()
        images = datasets.ImageFiles(images, labels, transform, args.seed, self.reader)
        return datasets.loader(images, self.sampler, args.num_workers, self.pin_memory, args.dist_timeout)

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
        signals.install()
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
            self.stop_if_asked(epoch, logger.start, logger)
            yield epoch, logger
        signals.restore()

    def after_step(self, epoch: int, step: int, lr: float, logger: MetricLogger) -> None:
        """After optimiser step `step` (from 0): when due, a line with the check for bad steps, and a checkpoint."""
        if logger.due(step):
            values = logger.line(step, lr, **self.reader.counted())
            self.log.scalars(self.axis(epoch, step + 1), lr=lr, **values)
            self.guard.check(epoch, step + 1, logger.steps)
        every = self.args.save_freq_steps
        if every and (step + 1) % every == 0 and step + 1 < logger.steps:
            self.save(checkpoint.LAST, epoch, step + 1, logger)
        if step + 1 < logger.steps:  # else the epoch is to be closed first: evaluation, log.txt, numbered checkpoint
            self.stop_if_asked(epoch, step + 1, logger)

    def after_epoch(self, epoch: int, logger: MetricLogger, **values) -> None:
        """The epoch's line in log.txt and its checkpoints."""
        self.log.epoch(**values, **self.reader.counted(), epoch=epoch)
        names = [checkpoint.LAST]
        if (epoch + 1) % self.args.save_freq == 0 or epoch + 1 == self.args.epochs:
            names.append(f'checkpoint-{epoch}.pth')
        for name in names:
            self.save(name, epoch, logger.steps, logger)

    def stop_if_asked(self, epoch: int, step: int, logger: MetricLogger) -> None:
        """Where any rank was asked to stop, save after `step` steps of `epoch` and end all of them at this place."""
        request = dist.largest(signals.requested())
        if not request:
            return
        self.save(checkpoint.LAST, epoch, step, logger)
        dist.barrier()  # a rank that ends makes launchers end the others
        where = f'epoch {epoch}, step {step} of {logger.steps}'
        info(f'stopped on request at {where}; state saved: resume with --resume auto')
        signals.end_workers()
        signals.ignore()
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

    def save(self, name: str, epoch: int, step: int, logger: MetricLogger) -> None:
        """Write the state after `step` optimiser steps of `epoch`; every rank must call it, rank 0 writes.

        Then bad steps end the run: none of them has changed what was written, but their count is not kept across runs.
        """
        sums = logger.sums()
        if dist.is_main():
            self.log.flush()
            checkpoint.save(self.args.output_dir / name, self.state(epoch, step, sums))
        self.guard.check(epoch, step, logger.steps)

    def state(self, epoch: int, step: int, sums: dict) -> dict:
        """What a checkpoint holds."""
        state = {
            'model': self.core.state_dict(),
            'optimizer': self.guard.optimizer.state_dict(),
            'scaler': self.guard.scaler.state_dict(),
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
        self.record = saved['record']
        if self.ema:
            self.ema.module.load_state_dict(saved['ema'])
        if saved['step'] == saved['steps']:
            self.first_epoch = saved['epoch'] + 1
        else:
            self.first_epoch, self.first_step, self.averages = saved['epoch'], saved['step'], saved['logger']
        self.saved = None
