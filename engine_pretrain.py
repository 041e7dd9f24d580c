"""One epoch of pretraining: move, draw the plan, autocast, forward, backward, step, log. Knows no method by name."""

import torch
from torch.utils.data import DataLoader

from util import dist, rng
from util.datasets import to_device, to_float
from util.log import MetricLogger
from util.run import Run


def train_one_epoch(run: Run, batches: DataLoader, epoch: int, logger: MetricLogger) -> dict[str, float]:
    """Train from step `logger.start` to the end of the epoch; returns its averages over all ranks.

    `run.model` is called for the loss (it may be compiled and distributed), `run.core` is the bare model.
    """
    run.model.train()
    seed, rank, sampler = run.args.seed, dist.rank(), run.sampler
    sampler.start(epoch, logger.start)
    data = iter(batches)
    for step in range(logger.start, sampler.steps):
        global_step = epoch * sampler.steps + step
        lr = run.set_lr(epoch + step / sampler.steps)
        for micro in range(sampler.accum_iter):
            imgs, _ = logger.wait_for(data)
            masks = rng.mask_generator(run.core, seed, global_step, micro, rank, len(imgs), dist.world_size())
            imgs, plan = to_device((imgs, run.core.draw_plan(len(imgs), masks)), run.device)
            imgs = to_float(imgs, *run.statistics)
            rng.seed_all(seed, rng.STEP, global_step, micro, rank)
            with dist.no_sync(run.model, last=micro + 1 == sampler.accum_iter):
                with torch.autocast(run.device.type, run.amp_dtype, enabled=run.amp_dtype is not None):
                    loss, terms = run.model(imgs, plan)
                run.guard.backward(loss / sampler.accum_iter)
            logger.update(loss=loss, **terms)
        logger.update(grad_norm=run.guard.step())
        run.after_step(epoch, step, lr, logger)
    return {'lr': run.schedule(epoch + (sampler.steps - 1) / sampler.steps), **logger.averages()}
