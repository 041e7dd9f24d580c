"""Every function of every method file, through everything that a pretraining model promises."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from main_pretrain import METHODS
from util.datasets import to_device
from util.optim import GuardedStep, adamw, param_groups

MODELS = [(module, name) for module in METHODS for name in module.__all__]
TINY = [(module, name) for module, name in MODELS if 'tiny' in name or 'pico' in name]
N = 2


def size_of(name: str) -> int:
    """A small image for the model: few tokens, whatever its depth."""
    if name.startswith('localmim_swin'):  # windows divide every stage
        return 64 if 'pico' in name else 224
    return 32 if 'tiny' in name else 64


def make(module, name):
    torch.manual_seed(0)
    return getattr(module, name)(img_size=size_of(name))


def batch(model, name):
    rng = np.random.default_rng(0)
    return torch.randn(N, 3, size_of(name), size_of(name)), model.draw_plan(N, rng)


def ids(models):
    return [name for _, name in models]


def test_every_method_file_is_listed():
    files = {path.stem for path in Path(__file__).parent.parent.glob('models_*.py')}
    assert files == {module.__name__ for module in METHODS}
    names = ids(MODELS)
    assert len(names) == len(set(names))


@pytest.mark.parametrize(('module', 'name'), MODELS, ids=ids(MODELS))
def test_contract(module, name):
    model = make(module, name)
    imgs, plan = batch(model, name)

    # the plan: tensors on the host, a function of the noise
    assert model.mask_scope in ('sample', 'batch')
    noise = torch.from_numpy(np.random.default_rng(0).random(model.noise_shape(N), dtype='float32'))
    for drawn, given in zip(plan, model.plan_from_noise(noise), strict=True):
        assert torch.equal(drawn, given)
        assert drawn.device.type == 'cpu'
    if model.mask_scope == 'sample':
        assert model.noise_shape(N)[0] == N

    # forward: a float32 scalar, detached scalars, no randomness, no state
    random_state = torch.get_rng_state()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    loss, terms = model(imgs, plan)
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    assert loss.isfinite()
    assert terms
    assert all(term.shape == () and not term.requires_grad for term in terms.values())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items() if 'running' not in key)

    # every trainable parameter gets a gradient, and the optimiser has a rule for each
    loss.backward()
    trainable = {key: param for key, param in model.named_parameters() if param.requires_grad}
    without = [key for key, param in trainable.items() if param.grad is None or not param.grad.isfinite().all()]
    assert not without
    zero = [key for key, param in trainable.items() if not param.grad.any()]
    assert not zero
    assert module.param_rules(model).keys() == trainable.keys()

    # the encoder's names are its classifier's, and sharing its storage costs a checkpoint nothing
    weights = model.encoder_state_dict()
    shared = {value.data_ptr() for value in model.state_dict().values()}
    assert all(value.data_ptr() in shared for value in weights.values())
    classifier = module.create_classifier(name, num_classes=5, img_size=size_of(name))
    result = classifier.load_state_dict(weights, strict=False)
    rules = module.param_rules(classifier)
    last = max(layer_id for layer_id, _, _ in rules.values())
    assert rules.keys() == {key for key, param in classifier.named_parameters() if param.requires_grad}
    assert all(rules[key][0] == last for key in result.missing_keys)
    assert all(key.startswith('norm.') for key in result.unexpected_keys)
    assert classifier(imgs).shape == (N, 5)


@pytest.mark.parametrize(('module', 'name'), TINY, ids=ids(TINY))
def test_reconstruct(module, name):
    model = make(module, name)
    imgs, plan = batch(model, name)
    for mode in (True, False):
        panels = model.train(mode).reconstruct(imgs, plan)
        assert model.training is mode
    assert torch.equal(panels['original'], imgs)
    assert all(panel.shape == imgs.shape and not panel.requires_grad for panel in panels.values())


@pytest.mark.parametrize(('module', 'name'), TINY, ids=ids(TINY))
def test_draws_its_own_plan(module, name):
    model = make(module, name)
    imgs, _ = batch(model, name)
    assert model(imgs)[0].isfinite()


@pytest.mark.parametrize(('module', 'name'), MODELS, ids=ids(MODELS))
def test_options(module, name):
    make = getattr(module, name)
    with pytest.raises(TypeError, match='no_such_option'):
        make(no_such_option=1)
    with pytest.raises(TypeError):
        make(224)  # keywords only
    with torch.device('meta'), pytest.raises(ValueError, match='63'):
        make(img_size=63)


@pytest.mark.parametrize(('module', 'name'), TINY, ids=ids(TINY))
def test_compiles_whole_without_recompiling(module, name):
    """`fullgraph=True` raises at a graph break; a second plan must not trace again."""
    model = make(module, name)
    traces = []

    def backend(graph, example_inputs):
        traces.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for seed in range(3):
        imgs = torch.randn(N, 3, size_of(name), size_of(name))
        plan = model.draw_plan(N, np.random.default_rng(seed))
        loss, _ = compiled(imgs, plan)
        assert torch.allclose(loss, model(imgs, plan)[0], rtol=1e-6)
    assert len(traces) == 1


class HostReads(TorchDispatchMode):
    """Records every operation that would make the host wait for a GPU."""

    WAITING = ('_local_scalar_dense', 'nonzero', 'masked_select', 'equal', 'is_nonzero', '_unique2')

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in self.WAITING:
            self.found.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(('module', 'name'), TINY, ids=ids(TINY))
def test_a_step_never_waits(module, name):
    model = make(module, name)
    imgs, plan = to_device(batch(model, name), torch.device('cpu'))
    groups = param_groups(model, module.param_rules(model), 0.05)
    guard = GuardedStep(model, adamw(groups, 1e-3, (0.9, 0.95)), torch.device('cpu'), fp16=False, clip_grad=1.0)
    with HostReads() as reads:
        for _ in range(2):
            guard.set_lr(1e-3)
            loss, _ = model(imgs, plan)
            guard.backward(loss)
            norm = guard.step()
    assert reads.found == []
    with HostReads() as reads:  # it would notice
        assert math.isfinite(norm.item())
    assert reads.found
