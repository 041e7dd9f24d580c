"""One epoch of pretraining: batch, plan, forward, backward, optimiser step, log. Names no method."""

from torch import Tensor
from torch.utils.data import DataLoader

from util import dist
from util.data.datasets import to_device
from util.run import Run
from util.training import Epoch, Training


def train_one_epoch(training: Training, run: Run, batches: DataLoader, epoch: Epoch) -> dict[str, float]:
    """Train to the end of the epoch; returns its averages over all ranks."""
    training.model.train()
    training.sampler.start(epoch.number, epoch.first_step)
    data = epoch.meters.timed(batches)
    for step in range(epoch.first_step, epoch.steps):
        lr = training.set_lr(epoch.at(step))
        for micro in range(training.sampler.accum_iter):
            batch = next(data)
            with dist.no_sync(training.model, last=micro + 1 == training.sampler.accum_iter):
                loss, terms = forward(training, batch, epoch.global_step(step), micro)
                training.optimizer.backward(loss / training.sampler.accum_iter)
            epoch.meters.update(loss=loss, **terms)
        grad_norm = training.optimizer.step()
        epoch.meters.update(grad_norm=grad_norm)
        run.after_step(epoch, step, lr)
    return {'lr': training.schedule(epoch.at(epoch.steps - 1)), **epoch.meters.averages()}


def forward(training: Training, batch: list[Tensor], global_step: int, micro: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and terms of a micro-batch, uint8 [N, 3, H, W] first: a function of the batch and of its position."""
    imgs, _ = batch
    plan = training.core.plan_from_noise(training.mask_noise(global_step, micro, len(imgs)))
    imgs, plan = to_device((imgs, plan), training.device)
    imgs = training.normalise(imgs)
    training.seed(global_step, micro)
    with training.autocast():
        return training.model(imgs, plan)
