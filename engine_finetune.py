"""One epoch of fine-tuning, and evaluation that counts every image once over the ranks. Knows no method by name."""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from util import dist, rng
from util.data.datasets import LEFT_OUT, Statistics, to_device, to_float
from util.log import MetricLogger
from util.run import Run

Augment = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
Criterion = Callable[[Tensor, Tensor], Tensor]


def train_one_epoch(
    run: Run,
    batches: DataLoader,
    epoch: int,
    logger: MetricLogger,
    augment: Augment,
    criterion: Criterion,
) -> dict[str, float]:
    """Train from step `logger.start` to the end of the epoch; returns its averages over all ranks.

    `augment(imgs, labels)` is what happens to a normalised batch on the device (random erasing, mixup, cutmix); it may
    turn labels into soft targets, which `criterion(logits, targets)` then takes.
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
                loss = forward(run, batch, global_step, micro, augment, criterion)
                run.guard.backward(loss / sampler.accum_iter)
            logger.update(loss=loss)
        logger.update(grad_norm=run.guard.step())
        if run.ema:
            run.ema.update(run.core, global_step, run.guard.left_out)
        run.after_step(epoch, step, lr, logger)
    return {'lr': run.schedule(epoch + (sampler.steps - 1) / sampler.steps), **logger.averages()}


def forward(
    run: Run, batch: list[Tensor], global_step: int, micro: int, augment: Augment, criterion: Criterion
) -> Tensor:
    """The loss of a micro-batch from the loader, uint8 [N, 3, H, W] and labels: a function of it and of its place."""
    imgs, labels = to_device(batch, run.device)
    rng.seed_all(run.args.seed, rng.STEP, global_step, micro, run.sampler.rank)
    imgs, targets = augment(to_float(imgs, *run.statistics), labels)
    with torch.autocast(run.device.type, run.amp_dtype, enabled=run.amp_dtype is not None):
        logits = run.model(imgs)
    return criterion(logits.float(), targets)


@torch.inference_mode()
def evaluate(
    core: nn.Module, batches: Iterable, statistics: Statistics, amp_dtype: torch.dtype | None
) -> dict[str, float]:
    """Top-1 and top-5 accuracy in percent, and mean cross-entropy, over every image of all ranks exactly once.

    Images that are left out (label -1) count nowhere. Shares of ranks may differ in length, so nothing is exchanged
    before the sums at the end. `core` is the bare model.
    """
    was_training = core.training
    core.eval()
    dist.share_statistics(core)
    device = statistics[0].device
    totals = torch.zeros(4, dtype=torch.float64, device=device)  # images, top-1, top-5, loss
    for imgs, labels in batches:
        imgs, labels = to_device((imgs, labels), device)
        with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
            logits = core(to_float(imgs, *statistics))
        logits = logits.float()
        hits = logits.topk(min(5, logits.shape[1])).indices == labels.unsqueeze(1)
        loss = F.cross_entropy(logits, labels, ignore_index=LEFT_OUT, reduction='sum')
        totals += torch.stack([(labels != LEFT_OUT).sum(), hits[:, 0].sum(), hits.sum(), loss]).double()
    core.train(was_training)
    dist.barrier()  # hosts notice a lost rank, before any of them waits for a GPU
    count, top1, top5, loss = dist.all_reduce_sum(totals).tolist()
    return {'acc1': 100 * top1 / count, 'acc5': 100 * top5 / count, 'loss': loss / count, 'images': int(count)}
