"""One epoch of pretraining: move, draw the plan, autocast, forward, backward, step, log. Knows no method by name."""

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from util import dist, rng
from util.data.datasets import to_device, to_float
from util.log import MetricLogger
from util.run import Run


def train_one_epoch(run: Run, batches: DataLoader, epoch: int, logger: MetricLogger) -> dict[str, float]:
    """Train from step `logger.start` to the end of the epoch; returns its averages over all ranks.

    `run.model` is called for the loss (it may be compiled and distributed), `run.core` is the bare model.
    """
    run.model.train()
    sampler = run.sampler
    sampler.start(epoch, logger.start)
    data = iter(batches)
    for step in range(logger.start, sampler.steps):
        global_step = epoch * sampler.steps + step
        lr = run.set_lr(epoch + step / sampler.steps)
        for micro in range(sampler.accum_iter):
            batch = logger.wait_for(data)
            with dist.no_sync(run.model, last=micro + 1 == sampler.accum_iter):
                loss, terms = forward(run, batch, global_step, micro)
                run.guard.backward(loss / sampler.accum_iter)
            logger.update(loss=loss, **terms)
        logger.update(grad_norm=run.guard.step())
        run.after_step(epoch, step, lr, logger)
    return {'lr': run.schedule(epoch + (sampler.steps - 1) / sampler.steps), **logger.averages()}


def forward(run: Run, batch: list[Tensor], global_step: int, micro: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and terms of a micro-batch from the loader, uint8 [N, 3, H, W] first: a function of it and of its place."""
    imgs, _ = batch
    seed, sampler = run.args.seed, run.sampler
    noise = rng.mask_noise(run.core, seed, global_step, micro, sampler.rank, len(imgs), sampler.world_size)
    imgs, plan = to_device((imgs, run.core.plan_from_noise(noise)), run.device)
    imgs = to_float(imgs, *run.statistics)
    rng.seed_all(seed, rng.STEP, global_step, micro, sampler.rank)
    with torch.autocast(run.device.type, run.amp_dtype, enabled=run.amp_dtype is not None):
        return run.model(imgs, plan)
