"""What a training step needs: network, optimiser, schedule, order of the samples, precision, normalisation.

A `Training` is whole when it is constructed. The engines use it, and so does `scripts/replay_step.py`. `util/run.py`
keeps the life of a run around it.
"""

import argparse
import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from util import dist, optim, rng
from util.data.datasets import EpochBatches, Normalisation
from util.log import MetricLogger
from util.nn.linear_probe import set_train_mode
from util.optim import GuardedOptimizer, WeightAverage


@dataclass
class Epoch:
    """An epoch of the run. Its steps before `first_step` are done already, where a run was resumed in its middle."""

    number: int  # from 0
    first_step: int
    steps: int  # optimiser steps of the whole epoch
    meters: MetricLogger

    def at(self, step: int) -> float:
        """The fractional epoch before optimiser step `step`, what schedules go by."""
        return self.number + step / self.steps

    def global_step(self, step: int) -> int:
        """The number of optimiser step `step` in the whole run, from 0."""
        return self.number * self.steps + step


class Training:
    """Everything that a step needs.

    `model` is called for the loss: it may be compiled and distributed. `core` is the bare network in it, for plans,
    pictures, evaluation and saving.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        core: nn.Module,
        model: nn.Module,
        optimizer: GuardedOptimizer,
        sampler: EpochBatches,
        device: torch.device,
        ema: WeightAverage | None = None,
    ):
        self.args, self.core, self.model = args, core, model
        self.optimizer, self.sampler, self.device = optimizer, sampler, device
        self.lr, _ = optim.scaled_lr(args, sampler.accum_iter)
        self.schedule = optim.schedule(args, self.lr)
        self.amp_dtype = amp_dtype(args, device)
        layout = memory_format(args, core)
        self.normalise = Normalisation.of(args.mean, args.std, device, layout)
        self.ema = ema.to(device, memory_format=layout) if ema else None

    def train_mode(self) -> None:
        """Train mode of what learns: the network, or in a linear probe its head alone."""
        self.model.train()
        set_train_mode(self.core)

    def set_lr(self, epoch: float) -> float:
        """Set every group's learning rate at a fractional epoch; returns that of scale 1."""
        lr = self.schedule(epoch)
        # the rate of a group whose scale is 0: with an absolute minimum, no group ends below it
        floor = self.schedule(epoch, lr=0.0) if self.args.min_lr_absolute else 0.0
        self.optimizer.set_lr(lr, floor)
        return lr

    def mask_noise(self, global_step: int, micro: int, batch_size: int) -> Tensor:
        """What a pretraining model makes this rank's plan of micro-step `micro` from."""
        sampler = self.sampler
        return rng.mask_noise(
            self.core, self.args.seed, global_step, micro, sampler.rank, batch_size, sampler.world_size
        )

    def seed(self, global_step: int, micro: int) -> None:
        """Seed all random generators for a micro-step of this rank: drop path, mixup, random erasing."""
        rng.seed_all(self.args.seed, rng.STEP, global_step, micro, self.sampler.rank)

    def autocast(self) -> torch.autocast:
        """The precision of a forward."""
        return torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype is not None)

    def state(self) -> dict:
        """What a checkpoint holds of it. Waits for the device."""
        state = {'model': self.core.state_dict(), **self.optimizer.state()}
        if hasattr(self.core, 'encoder_state_dict'):
            state['encoder'] = self.core.encoder_state_dict()
        if self.ema:
            state['ema'] = self.ema.module.state_dict()
        return state

    def sizes(self) -> int:
        """The bytes of the tensors in `state` and of what the optimiser will hold, its moments."""
        core = self.core
        moments = [param for param in core.parameters() if param.requires_grad] * self.optimizer.moments
        average = self.ema.module.state_dict().values() if self.ema else ()
        return sum(tensor.nbytes for tensor in (*core.state_dict().values(), *moments, *average))

    def restore(self, saved: dict) -> None:
        """Take over the `state` in a checkpoint. Learning rates, decay, betas and precision stay this run's own.

        `saved` is used up, so that no tensor is there twice.
        """
        saved.pop('encoder', None)  # another name for parts of the model
        move(saved.pop('model'), self.core)
        if self.ema:
            move(saved.pop('ema'), self.ema.module)
        self.optimizer.restore(saved)
        if made := saved['epoch'] * saved['steps'] + saved['step']:
            # the rate of the last step: where only an evaluation is left, it is saved again
            epoch, step = divmod(made - 1, saved['steps'])
            self.set_lr(epoch + step / saved['steps'])

    def share(self) -> None:
        """Give every rank the weights and moments of rank 0, which alone has read a checkpoint."""
        networks = [self.core, *([self.ema.module] if self.ema else [])]
        moments = [self.optimizer.inner.state.get(param, {}) for param in self.optimizer.params]  # none before a step
        values = itertools.chain(*(part.values() for part in (*(net.state_dict() for net in networks), *moments)))
        dist.share(value for value in values if isinstance(value, Tensor))
        self.optimizer.keep_running()


@torch.no_grad()
def move(weights: dict[str, Tensor], network: nn.Module) -> None:
    """Fill a network with weights, of its own names and shapes, and take each out of the dict."""
    for name, value in network.state_dict().items():
        value.copy_(weights.pop(name))


def amp_dtype(args: argparse.Namespace, device: torch.device) -> torch.dtype | None:
    """The autocast type, or None for float32."""
    if args.amp_dtype is None:
        return torch.bfloat16 if device.type == 'cuda' and torch.cuda.is_bf16_supported(False) else None
    return {'bf16': torch.bfloat16, 'fp16': torch.float16, 'none': None}[args.amp_dtype]


def memory_format(args: argparse.Namespace, core: nn.Module) -> torch.memory_format:
    """NHWC if asked, or if the network convolves: it has a convolution over more than patches that do not overlap."""
    convolves = any(m.kernel_size > m.stride for m in core.modules() if isinstance(m, nn.Conv2d))
    last = convolves if args.channels_last is None else args.channels_last
    return torch.channels_last if last else torch.contiguous_format
