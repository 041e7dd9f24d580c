"""A training step on the GPU: the host never waits, bad steps change nothing, fp16 finds its scale."""

import copy

import pytest
import torch
from gpu.test_networks import guarded, inputs, network, on, trained
from methods.test_contract import QUICK, size_of
from training import MIXED, train

from main_pretrain import find_method
from util.data.datasets import to_device
from util.optim import OPTIMIZERS, WeightAverage
from util.run import Run

WARM_UP = 3  # steps in which kernels are chosen and memory is got
RUNS = {  # what a step can have beside the network
    'loader processes': ('pretrain', ['--num_workers', '2']),
    'fp16, accumulation': ('pretrain', ['--amp_dtype', 'fp16', '--batch_size', '4', '--accum_iter', '2']),
    'LAMB': ('pretrain', ['--opt', 'lamb']),
    'recomputed': ('pretrain', ['--grad_checkpoint', '--model', 'a2mim_resnet_tiny']),
    'fine-tuning': ('finetune', [*MIXED, '--reprob', '0.9']),
    'fine-tuning with BatchNorm': ('finetune', [*MIXED, '--drop_path', '0', '--model', 'a2mim_resnet_tiny']),
    'fine-tuning, binary': ('finetune', [*MIXED, '--criterion', 'bce', '--remode', 'const']),
    'fine-tuning, not mixed': ('finetune', ['--smoothing', '0.1', '--remode', 'rand', '--recount', '3']),
    'linear probe': ('finetune', ['--probe', 'linear', '--lr', '1']),
}


@pytest.fixture
def watched(monkeypatch):
    """From now on, steps of a run raise where the host waits for the GPU; those that were watched.

    Not before `WARM_UP`, and not in the last step, after which a line is printed.
    """
    steps = []

    def after_step(self, epoch, step, lr, after=Run.after_step):
        after(self, epoch, step, lr)
        watching = WARM_UP <= step + 1 < epoch.steps - 1
        torch.cuda.set_sync_debug_mode('error' if watching else 'default')
        steps.extend([step + 1] * watching)

    monkeypatch.setattr(Run, 'after_step', after_step)
    return steps


@pytest.mark.parametrize('name', QUICK)
def test_pretraining_never_waits(name, images, tmp_path, device, watched):
    never_waits('pretrain', images, tmp_path, device, '--model', name, '--input_size', size_of(name), '--clip_grad', 1)
    assert len(watched) == 4


@pytest.mark.parametrize(('stage', 'flags'), RUNS.values(), ids=RUNS)
def test_training_never_waits(stage, flags, images, tmp_path, device, watched):
    never_waits(stage, images, tmp_path, device, *flags)
    assert len(watched) == 4


def never_waits(stage, images, tmp_path, device, *flags):
    flags = ['--batch_size', 8, '--epochs', 1, '--lr', 1e-3, '--print_freq', 1000, *flags]
    train(stage, images, tmp_path / 'run', '--device', device, *flags)


def test_waiting_is_noticed(images, tmp_path, device, watched, monkeypatch):
    """The trial of the trial."""
    monkeypatch.setattr('engine_pretrain.forward', waiting_forward)
    with pytest.raises(RuntimeError, match='synchroniz'):
        never_waits('pretrain', images, tmp_path, device)


def waiting_forward(training, batch, global_step, micro):
    imgs, plan = to_device((batch[0], training.core.plan_from_noise(training.mask_noise(0, 0, 8))), training.device)
    loss, terms = training.model(training.normalise(imgs), plan)
    return loss * float(loss.isfinite()), terms


@pytest.mark.parametrize('name', ['mirl_vit_tiny', 'a2mim_resnet_tiny'])
@pytest.mark.parametrize('make', OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_bad_step_changes_nothing(make, name, device):
    """Weights, moments, running statistics and the average are those from before it. It is counted."""
    model = on(network(name, size_of(name)), device)
    guard = guarded(find_method(name), model, device, make=make)
    average = WeightAverage(model, 0.9)
    batch = inputs(model, size_of(name), 8)

    def state():
        moments = [value for values in guard.inner.state.values() for value in values.values()]
        tensors = [value for key, value in model.state_dict().items() if not key.endswith('num_batches_tracked')]
        return [tensor.clone() for tensor in (*tensors, *moments, *average.module.parameters())]

    trained(model, guard, batch)  # AdamW makes its moments
    for bad in (True, True, False):
        before = state()
        imgs, plan = to_device((batch[0] * (float('nan') if bad else 1.0), batch[1]), device)
        torch.cuda.set_sync_debug_mode('error')
        loss, _ = model(imgs, plan)
        guard.backward(loss)
        guard.step()
        average.update(model, 5, guard.skipped)
        torch.cuda.set_sync_debug_mode('default')
        same = [torch.equal(old, new) for old, new in zip(before, state(), strict=True)]
        assert all(same) if bad else not all(same)
    assert guard.counts() == {'streak': 0, 'bad_steps': 2}


def test_fp16_finds_its_scale(device):
    """Steps that overflow are skipped and halve the loss scale, until one fits."""
    name = 'mirl_vit_tiny'
    model = on(network(name, 32), device)
    guard = guarded(find_method(name), model, device, fp16=True)
    guard.scaler = torch.amp.GradScaler(device.type, init_scale=2.0**36)
    batch = inputs(model, 32, 8)
    before = copy.deepcopy(model.state_dict())
    bad = 0
    while bad <= guard.allowed:
        trained(model, guard, batch, torch.float16)
        if not guard.skipped:
            break
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        bad += 1
    assert 1 <= bad <= guard.allowed
    assert guard.counts() == {'streak': 0, 'bad_steps': bad}
    assert guard.loss_scale() == 2.0 ** (36 - bad)
    assert not all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_average_of_weights(device):
    """That of the CPU, for the same weights."""
    model = network('a2mim_resnet_tiny', 32)
    ours, theirs = WeightAverage(model, 0.9).to(device), WeightAverage(model, 0.9)
    for step in range(5):
        for param in model.parameters():
            param.data += 0.1 * torch.randn_like(param)
        for average, where in ((ours, device), (theirs, torch.device('cpu'))):
            average.update(on(model, where), step, torch.tensor(float(step == 3), device=where))
    for own, other in zip(ours.module.parameters(), theirs.module.parameters(), strict=True):
        torch.testing.assert_close(own.cpu(), other)
