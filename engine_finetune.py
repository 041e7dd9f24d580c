"""One epoch of any labelled task, and evaluation that counts every image once over the ranks. Names no method."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from util import dist
from util.data.datasets import SKIPPED, Normalisation, to_device
from util.errors import UserError
from util.run import Run
from util.training import Epoch, Training

LossOf = Callable[[Any], tuple[Tensor, dict[str, Tensor]]]


def train_one_epoch(
    training: Training, run: Run, batches: DataLoader, epoch: Epoch, loss_of: LossOf
) -> dict[str, float]:
    """Train to the end of the epoch; returns its averages over all ranks.

    `loss_of(batch)` is the task: it takes a batch of the loader on the device, and returns the loss, a float32 scalar,
    and named scalars to log.
    """
    training.train_mode()
    training.sampler.start(epoch.number, epoch.first_step)
    data = epoch.meters.timed(batches)
    for step in range(epoch.first_step, epoch.steps):
        lr = training.set_lr(epoch.at(step))
        for micro in range(training.sampler.accum_iter):
            batch = next(data)
            with dist.no_sync(training.model, last=micro + 1 == training.sampler.accum_iter):
                loss, terms = forward(training, batch, epoch.global_step(step), micro, loss_of)
                training.optimizer.backward(loss / training.sampler.accum_iter)
            epoch.meters.update(loss=loss, **terms)
        grad_norm = training.optimizer.step()
        epoch.meters.update(grad_norm=grad_norm)
        if training.ema:
            training.ema.update(training.core, epoch.global_step(step), training.optimizer.skipped)
        run.after_step(epoch, step, lr)
    return {'lr': training.schedule(epoch.at(epoch.steps - 1)), **epoch.meters.averages()}


def forward(
    training: Training, batch: Any, global_step: int, micro: int, loss_of: LossOf
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and terms of a micro-batch from the loader: a function of the batch and of its position."""
    batch = to_device(batch, training.device)
    training.seed(global_step, micro)
    return loss_of(batch)


@torch.inference_mode()
def evaluate(
    core: nn.Module,
    batches: Iterable,
    normalise: Normalisation,
    amp_dtype: torch.dtype | None,
    absent: Sequence[int] = (),
    answers: Callable[[Tensor, Tensor], None] | None = None,
) -> dict[str, float]:
    """Top-1 and top-5 accuracy in percent, and mean cross-entropy, over every image of all ranks exactly once.

    Skipped images (label -1) do not count. Shares of ranks may differ in length, so nothing is exchanged before the
    sums at the end. `core` is the bare model; `absent` are the classes that no answer may be.
    `answers` is called with the logits and labels of each batch. Raises UserError if no image could be read.
    """
    was_training = core.training
    core.eval()
    dist.share_running_statistics(core)
    device = normalise.mean.device
    totals = torch.zeros(4, dtype=torch.float64, device=device)  # images, top-1, top-5, loss
    absent = torch.tensor(absent, dtype=torch.long, device=device)
    for imgs, labels in batches:
        imgs, labels = to_device((imgs, labels), device)
        with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
            logits = core(normalise(imgs))
        logits = logits.float().index_fill(1, absent, -math.inf)
        hits = logits.topk(min(5, logits.shape[1])).indices == labels.unsqueeze(1)
        loss = F.cross_entropy(logits, labels, ignore_index=SKIPPED, reduction='sum')
        if answers:
            answers(logits, labels)
        totals += torch.stack([(labels != SKIPPED).sum(), hits[:, 0].sum(), hits.sum(), loss]).double()
    core.train(was_training)
    dist.barrier()  # hosts notice a lost rank, before any of them waits for a GPU
    count, top1, top5, loss = dist.all_reduce_sum(totals).tolist()
    if not count:
        raise UserError('none of the images can be read')
    return {'acc1': 100 * top1 / count, 'acc5': 100 * top5 / count, 'loss': loss / count, 'images': int(count)}
