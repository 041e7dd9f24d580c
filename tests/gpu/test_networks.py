"""Every architecture on the GPU: the CPU's loss and gradients, bf16, compiled, channels-last, checkpointed, drawn."""

import argparse
import copy

import pytest
import torch
from methods.test_contract import PUBLISHED, QUICK, TINY, ids, size_of, without_drop_path, without_zeros
from torch._dynamo.utils import counters
from training import draw_plan

from main_pretrain import METHODS, find_method
from util import dist
from util.data.datasets import to_device
from util.nn.grad_checkpoint import checkpoint_blocks
from util.nn.models import LayerNorm, fuse_attention
from util.optim import GuardedOptimizer, adamw, param_groups
from util.training import memory_format

LARGE = sorted(PUBLISHED) + [m.__all__[-1] for m in METHODS if not PUBLISHED & set(m.__all__)]  # of a new method, one
SIDES = {'simmim_swin_base': 192}  # of full-size networks, other than 224
quick = pytest.mark.parametrize(('module', 'name'), TINY, ids=ids(TINY))


def network(name, side):
    """On the CPU, without the one thing that is random in a forward, and without gains that stop gradients."""
    torch.manual_seed(0)
    return without_zeros(without_drop_path(getattr(find_method(name), name)(img_size=side)))


def inputs(model, side, n, seed=0):
    """Smooth images with some noise, and a plan."""
    torch.manual_seed(seed)
    smooth = torch.nn.functional.interpolate(torch.randn(n, 3, 8, 8), side, mode='bicubic')
    return smooth + 0.3 * torch.randn(n, 3, side, side), draw_plan(model, n, seed)


def layout(model):
    return memory_format(argparse.Namespace(channels_last=None), model)


def on(model, device):
    """A copy there, laid out and with the kernels that a run would have."""
    model = copy.deepcopy(model).to(device, memory_format=layout(model))
    fuse_attention(model)
    return model


def step(model, imgs, plan, dtype=None):
    """Loss and gradients, on the CPU."""
    device = next(model.parameters()).device
    imgs, plan = to_device((imgs, plan), device)
    model.zero_grad(set_to_none=True)
    with torch.autocast(device.type, dtype, enabled=dtype is not None):
        loss, terms = model(imgs.contiguous(memory_format=layout(model)), plan)
    loss.backward()
    assert all(term.device.type == device.type for term in terms.values())
    return loss.item(), {name: p.grad.float().cpu() for name, p in model.named_parameters() if p.grad is not None}


def norm(tensors):
    return torch.stack([tensor.double().norm() for tensor in tensors]).norm().item()


def difference(grads, others):
    """Of all gradients together, relative."""
    return norm([grads[name] - others[name] for name in others]) / norm(others.values())


@quick
def test_float32_equals_the_cpu(module, name, device, measured):
    """1e-4, a hundred times the rounding of float32: sums have another order. Gradients of ResNets jump where rounding
    moves a number over a ReLU's kink: on a CPU, those of float64 differ by up to 1e-2.
    """
    compare_float32(name, size_of(name), 8, device, measured)


@pytest.mark.xdist_group('large')
@pytest.mark.parametrize('name', LARGE)
def test_full_size(name, device, measured):
    compare_float32(name, SIDES.get(name, 224), 2, device, measured)


def compare_float32(name, side, n, device, measured):
    model = network(name, side)
    imgs, plan = inputs(model, side, n)
    loss, grads = step(model, imgs, plan)
    ours, theirs = step(on(model, device), imgs, plan)
    assert grads.keys() == theirs.keys()
    off = abs(ours - loss) / abs(loss), difference(theirs, grads)
    measured(f'{name}: float32 differs from the CPU by {off[0]:.1e} in the loss, by {off[1]:.1e} in the gradients')
    assert off[0] < 1e-4
    assert off[1] < (2e-2 if dist.has_batchnorm(model) else 1e-4)


@quick
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=['bf16', 'fp16'])
def test_half_precision(module, name, dtype, device, measured):
    """bf16 keeps 8 bits of a number and fp16 11, an error of up to 0.4 %, which averages out in the loss, a mean of
    thousands; less so in gradients of 8 images, most with BatchNorm: within 1 % and 30 % (on CPUs up to 16 % is seen).
    """
    side = size_of(name)
    model = on(network(name, side), device)
    imgs, plan = inputs(model, side, 8)
    loss, grads = step(model, imgs, plan)
    ours, theirs = step(model, imgs, plan, dtype)
    off = abs(ours - loss) / abs(loss), difference(theirs, grads)
    measured(f'{name}: {dtype} differs from float32 by {off[0]:.1e} in the loss, by {off[1]:.1e} in the gradients')
    assert off[0] < 0.01
    assert off[1] < 0.3


def test_norm_stays_in_bf16(device, measured):
    """As near to float64 as rounding what comes out to bf16, 2 ** -9 of a number, and weights."""
    torch.manual_seed(0)
    layer, x = LayerNorm(512), 3 * torch.randn(4096, 512) + 1
    torch.nn.init.normal_(layer.weight, 1, 0.3)
    torch.nn.init.normal_(layer.bias)
    results = []
    for own, features in ((copy.deepcopy(layer).to(device), x.to(device).bfloat16()), (layer.double(), x.bfloat16())):
        features = features.requires_grad_() if own is not layer else features.double().requires_grad_()
        with torch.autocast(device.type, torch.bfloat16):
            result = own(features)
        result.backward(torch.sin(features.detach()).to(result.dtype))
        results.append([result, features.grad, own.weight.grad, own.bias.grad])
    assert [value.dtype for value in results[0]] == [torch.bfloat16] * 2 + [torch.float32] * 2
    off = [norm([ours.cpu() - exact]) / norm([exact]) for ours, exact in zip(*results, strict=True)]
    measured(f'LayerNorm in bf16: off float64 by {max(off):.1e}')
    assert max(off) < 2**-7


@quick
def test_compiles_to_one_graph(module, name, device, measured):
    """`--compile`: one graph for all plans and steps, and eager's losses to 1e-3 (rounding grows with each step)."""
    side = size_of(name)
    core = on(network(name, side), device)
    losses = []
    for compiled in (False, True):
        counters.clear()
        own = copy.deepcopy(core)
        model = dist.parallel(own, device, compiled)
        guard = guarded(module, own, device)
        try:
            losses.append([trained(model, guard, inputs(own, side, 8, seed)) for seed in range(4)])
        except RuntimeError as error:
            if compiled and '(*bias): last dimension must be contiguous' in str(error):
                pytest.xfail(f'torch {torch.__version__} compiles float32 attention with a bias to what it refuses')
            raise
    graphs, breaks = counters['stats']['unique_graphs'], sum(counters['graph_break'].values())
    off = max(abs(a - b) / abs(b) for a, b in zip(*losses, strict=True))
    measured(f'{name}: compiled to {graphs} graph, losses differ from eager by {off:.1e}')
    assert (graphs, breaks) == (1, 0)
    assert off < 1e-3


def guarded(module, core, device, fp16=False, make=adamw, lr=1e-4):
    groups = param_groups(core, module.param_rules(core), 0.0)
    guard = GuardedOptimizer(core, make(groups, lr, (0.9, 0.95)), device, fp16, clip_grad=1.0)
    guard.set_lr(lr)
    return guard


def trained(model, guard, batch, dtype=None):
    """Make a step; returns the loss before it."""
    device = guard.streak.device
    imgs, plan = to_device(batch, device)
    with torch.autocast(device.type, dtype, enabled=dtype is not None):
        loss, _ = model(imgs, plan)
    guard.backward(loss)
    guard.step()
    return loss.item()


@pytest.mark.parametrize('name', [name for name in QUICK if 'resnet' in name or 'convnext' in name])
def test_channels_last(name, device):
    """The layout of convolutions: weights, gradients and moments have it, and the numbers are those of the other."""
    side = size_of(name)
    model = network(name, side)
    assert layout(model) is torch.channels_last
    imgs, plan = inputs(model, side, 8)
    ours, others = on(model, device), copy.deepcopy(model).to(device)
    loss, grads = step(ours, imgs, plan)
    theirs, plain = step(others, imgs, plan)
    assert abs(loss - theirs) / abs(theirs) < 1e-4
    assert difference(grads, plain) < 1e-4
    guard = guarded(find_method(name), ours, device)
    trained(ours, guard, (imgs, plan))
    spread = [param for param in guard.params if param.ndim == 4 and min(param.shape[1:]) > 1]
    assert spread
    for param in spread:
        for tensor in (param, *(value for value in guard.inner.state[param].values() if value.ndim == 4)):
            assert tensor.is_contiguous(memory_format=torch.channels_last)


@quick
def test_grad_checkpoint(module, name, device, measured):
    """Less memory at its peak, and the same gradients and running statistics."""
    side = size_of(name)
    model = on(network(name, side), device)
    again = copy.deepcopy(model)
    checkpoint_blocks(again)
    batch = inputs(model, side, 64)
    found, peaks = [], []
    for each in (model, again):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        found.append(step(each, *batch))
        peaks.append(torch.cuda.max_memory_allocated() - before)
    (loss, grads), (ours, theirs) = found
    measured(f'{name}: --grad_checkpoint takes {100 * peaks[1] / peaks[0]:.0f} % of the memory of a step')
    assert peaks[1] < peaks[0]
    assert abs(ours - loss) / abs(loss) < 1e-5
    assert difference(theirs, grads) < 1e-4
    for own, other in zip(model.buffers(), again.buffers(), strict=True):
        torch.testing.assert_close(own, other, equal_nan=True)


@quick
def test_memory_does_not_grow(module, name, device):
    """Over 20 steps; averages of weights and values that are to be printed would show."""
    side = size_of(name)
    model = on(network(name, side), device)
    guard = guarded(module, model, device)
    held = []
    for seed in range(23):
        trained(model, guard, inputs(model, side, 8, seed), torch.bfloat16)
        held.append(torch.cuda.memory_allocated())
    assert held[-1] == held[2]


@quick
def test_reconstruct(module, name, device):
    """The pictures of the CPU."""
    side = size_of(name)
    model = network(name, side)
    imgs, plan = inputs(model, side, 4)
    there = to_device((imgs, plan), device)
    ours = on(model, device).reconstruct(*there)
    for key, panel in model.reconstruct(imgs, plan).items():
        assert (ours[key].cpu() - panel).abs().mean() < 1e-3, key
