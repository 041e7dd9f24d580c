"""Every function of every method file, through everything that a pretraining model promises."""

import copy
import functools
import math
import re
from pathlib import Path

import pytest
import torch
from timm.layers import DropPath
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from training import HostReads, draw_plan, shapes, without_initialisation

import main_pretrain
from main_pretrain import METHODS
from util.data.datasets import to_device
from util.nn.grad_checkpoint import blocks, checkpoint_blocks
from util.nn.losses import explained
from util.nn.models import eval_mode
from util.nn.patches import gather_tokens, normalise_patches, patch_mask_to_pixels, patchify
from util.optim import GuardedOptimizer, adamw, param_groups

MODELS = [(module, name) for module in METHODS for name in module.__all__]
# models for quick trials, one of each architecture, and the image side that suits them
QUICK = {
    'mirl_vit_tiny': 32,
    'a2mim_vit_tiny': 32,
    'a2mim_resnet_tiny': 32,
    'a2mim_convnext_pico': 64,
    'a2mim_timm': 64,
    'simmim_swin_pico': 64,
    'localmim_vit_tiny': 32,
    'localmim_swin_pico': 64,
    'mixmae_tiny': 32,
}
COMPILED_LATER = QUICK.keys() - {'mirl_vit_tiny', 'localmim_swin_pico'}  # the delicate one: windows by the plan
QUICK |= {module.__all__[0]: 32 for module in METHODS if not QUICK.keys() & set(module.__all__)}  # of a new method
TINY = [(module, name) for module, name in MODELS if name in QUICK]
# a published size of each architecture, whose others differ from it in numbers alone
PUBLISHED = {
    'mirl_vit_base',
    'a2mim_vit_base',
    'a2mim_resnet50',
    'simmim_swin_base',
    'localmim_vit_base',
    'localmim_swin_base',
    'mixmae_base',
}
N = 2


def size_of(name: str) -> int:
    """A small image for the model: few tokens, whatever its depth."""
    windowed = name.startswith('localmim_swin')  # whose windows divide every stage
    return QUICK.get(name, 224 if windowed else 64)


def without_drop_path(model):
    """Stochastic depth, where a recipe has it, is the one thing that is random in a forward."""
    for module in model.modules():
        if isinstance(module, DropPath):
            module.drop_prob = 0.0
    return model


def without_zeros(model):
    """Gains that start at zero, like those of the last BatchNorms of residual branches, stop gradients behind them."""
    for param in model.parameters():
        if not param.any():
            torch.nn.init.normal_(param, std=0.1)
    return model


def make(module, name):
    """A copy of what was made once, with the initial values of seed 0."""
    torch.manual_seed(0)
    return copy.deepcopy(template(module, name))


@functools.cache
def template(module, name):
    torch.manual_seed(0)
    return getattr(module, name)(img_size=size_of(name))


def batch(model, name):
    return torch.randn(N, 3, size_of(name), size_of(name)), draw_plan(model, N)


def ids(models):
    return [name for _, name in models]


FIRST = ('mirl_vit_tiny', 'a2mim_resnet_tiny')  # without those that take seconds


def first(names, models):
    """Those of these names by default, the others with `--faults`: they take seconds."""
    return [
        pytest.param(*model, id=model[1], marks=() if model[1] in names else pytest.mark.faults) for model in models
    ]


def test_every_method_file_is_listed():
    files = {path.stem for path in Path(__file__).parents[2].glob('models_*.py')}
    assert files == {module.__name__ for module in METHODS}
    names = ids(MODELS)
    assert len(names) == len(set(names))


def without_storage(model, mode):
    """Its parameters and buffers become shapes, for a forward and backward that compute nothing."""
    for module in model.modules():
        for key, param in module._parameters.items():
            if param is not None:
                module._parameters[key] = torch.nn.Parameter(mode.from_tensor(param), param.requires_grad)
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = mode.from_tensor(buffer)
    return model


@pytest.mark.parametrize(('module', 'name'), MODELS, ids=ids(MODELS))
def test_contract(module, name):
    """Of every size, in shapes: plan, optimiser rules, and the classifier that the encoder belongs to."""
    with shapes():
        model = getattr(module, name)(img_size=size_of(name))
        classifier = module.create_classifier(name, num_classes=5, img_size=size_of(name))

    # the plan: tensors on the host, a function of the noise
    assert model.mask_scope in ('sample', 'batch')
    for drawn, once_more in zip(draw_plan(model, N), draw_plan(model, N), strict=True):
        assert torch.equal(drawn, once_more)
        assert drawn.device.type == 'cpu'
    if model.mask_scope == 'sample':
        assert model.noise_shape(N)[0] == N

    # the encoder's names are its classifier's, and sharing its storage costs a checkpoint nothing
    weights = model.encoder_state_dict()
    shared = {value.untyped_storage()._cdata for value in model.state_dict().values()}
    assert all(value.untyped_storage()._cdata in shared for value in weights.values())
    own = {key: value.shape for key, value in classifier.state_dict().items()}
    assert all(own[key] == value.shape for key, value in weights.items() if key in own)
    assert all(key.startswith('norm.') for key in weights.keys() - own.keys())
    rules = module.param_rules(classifier)
    last = max(layer_id for layer_id, _, _ in rules.values())
    assert rules.keys() == {key for key, param in classifier.named_parameters() if param.requires_grad}
    assert all(rules[key][0] == last for key in own.keys() - weights.keys())
    assert module.param_rules(model).keys() == {key for key, p in model.named_parameters() if p.requires_grad}


def assert_scalars(loss, terms):
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    assert terms
    assert all(term.shape == () and not term.requires_grad for term in terms.values())


@pytest.mark.parametrize(('module', 'name'), first(PUBLISHED, MODELS))
def test_loss_and_gradients(module, name, monkeypatch):
    """In shapes: a float32 scalar, detached scalars; every trainable parameter gets a gradient."""
    without_initialisation(monkeypatch)
    deep = name not in QUICK and re.search('swin|mixmae', name)
    options = {'img_size': size_of(name), **({'depths': (2, 2, 2, 2)} if deep else {})}
    model = getattr(module, name)(**options)
    imgs, plan = batch(model, name)
    classifier = module.create_classifier(name, num_classes=5, **options)
    with FakeTensorMode() as mode:
        model, classifier = without_storage(model, mode), without_storage(classifier, mode)
        imgs, plan = mode.from_tensor(imgs), type(plan)(*map(mode.from_tensor, plan))
        loss, terms = model(imgs, plan)
        assert classifier(imgs).shape == (N, 5)
        loss.backward()
    assert_scalars(loss, terms)
    assert not [key for key, param in model.named_parameters() if param.requires_grad and param.grad is None]


@pytest.mark.parametrize(('module', 'name'), TINY, ids=ids(TINY))
def test_forward_is_pure(module, name):
    """No randomness but drop path, no state but BatchNorm's, finite gradients that reach every parameter."""
    model = without_zeros(without_drop_path(make(module, name)))
    imgs, plan = batch(model, name)
    random_state = torch.get_rng_state()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    loss, terms = model(imgs, plan)
    assert_scalars(loss, terms)
    assert loss.isfinite()
    assert torch.equal(torch.get_rng_state(), random_state)
    changed = [key for key, value in model.state_dict().items() if not torch.equal(value, before[key])]
    assert all(key.endswith(('running_mean', 'running_var', 'num_batches_tracked')) for key in changed)
    loss.backward()
    trainable = {key: param.grad for key, param in model.named_parameters() if param.requires_grad}
    assert not [key for key, grad in trainable.items() if not grad.isfinite().all() or not grad.any()]
    classifier = module.create_classifier(name, num_classes=5, img_size=size_of(name))
    assert classifier(imgs).shape == (N, 5)


@pytest.mark.parametrize(('module', 'name'), TINY, ids=ids(TINY))
def test_checkpointing_changes_nothing(module, name):
    """Loss, gradients, running statistics and random draws are the same to the bit; fewer activations are kept."""
    model = make(module, name)
    again = copy.deepcopy(model)
    assert checkpoint_blocks(again) >= 2
    imgs, plan = batch(model, name)
    kept = []
    for network in (model, again):
        sizes = []
        torch.manual_seed(0)
        with torch.autograd.graph.saved_tensors_hooks(lambda x, s=sizes: s.append(x.numel()) or x, lambda x: x):
            loss, _ = network(imgs, plan)
        loss.backward()
        kept.append(sum(sizes))
    assert kept[1] < kept[0]
    for ours, theirs in zip(again.parameters(), model.parameters(), strict=True):
        assert ours.grad is None if theirs.grad is None else torch.equal(ours.grad, theirs.grad)
    for ours, theirs in zip(again.buffers(), model.buffers(), strict=True):
        assert torch.equal(ours, theirs)
    copied = copy.deepcopy(again)  # has blocks of its own
    for param in next(iter(blocks(again))).parameters():
        torch.nn.init.zeros_(param)
    assert torch.equal(copied.eval()(imgs, plan)[0], model.eval()(imgs, plan)[0])


@pytest.mark.parametrize(('module', 'name'), first(FIRST[1:], [model for model in TINY if model[1] in FIRST]))
def test_checkpointing_compiles_whole(module, name):
    model = without_drop_path(make(module, name))
    again = copy.deepcopy(model)
    checkpoint_blocks(again)
    imgs, plan = batch(model, name)
    torch.compiler.reset()
    torch.compile(again, fullgraph=True, backend='aot_eager')(imgs, plan)[0].backward()
    model(imgs, plan)[0].backward()
    for ours, theirs in zip(again.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    for ours, theirs in zip(again.buffers(), model.buffers(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(('module', 'name'), TINY, ids=ids(TINY))
def test_reconstruct(module, name):
    """Nothing untrained is drawn: where the image was visible, another network has the same pictures."""
    model = make(module, name)
    imgs, plan = batch(model, name)
    for mode in (True, False):
        panels = model.train(mode).reconstruct(imgs, plan)
        assert model.training is mode
    assert list(panels)[:3] == ['composite', 'masked', 'original']
    assert torch.equal(panels['original'], imgs)
    assert all(panel.shape == imgs.shape and not panel.requires_grad for panel in panels.values())
    visible = patch_mask_to_pixels(plan.mask, size_of(name) // math.isqrt(plan.mask.shape[1])).expand_as(imgs) == 0
    assert torch.equal(panels['masked'][visible], imgs[visible])
    assert (panels['masked'] != imgs)[~visible].all()
    for key in panels.keys() & {'composite', 'composite (oracle)', 'composite (true edges)'}:
        assert torch.equal(panels[key][visible], imgs[visible])
        assert (panels[key] != imgs)[~visible].float().mean() > 0.99
    for key, panel in getattr(module, name)(img_size=size_of(name)).reconstruct(imgs, plan).items():
        if not re.search('spectrum|of partner|scale 3', key):  # scale 3: patches larger than the mask's
            assert torch.equal(panel[visible], panels[key][visible]), key


# of an architecture of each method: its targets [..., P]; the weights of their places; what `forward_loss` takes
SCORED = {
    'mirl_vit_tiny': lambda model, imgs, plan: (
        [normalise_patches(gather_tokens(patchify(imgs, model.patch_size), plan.ids_hidden))],
        [torch.ones(1)],
        lambda preds: (imgs, [0.3 * preds[0], 0.7 * preds[0]], plan),  # main and residual
    ),
    'localmim_vit_tiny': lambda model, imgs, plan: (
        targets := model.forward_targets(imgs),
        [model.loss_weights(plan.mask, target.shape[1]).unsqueeze(-1) for target in targets],
        lambda preds: (imgs, preds, plan),
    ),
    'mixmae_tiny': lambda model, imgs, plan: (
        [model.target(imgs)],
        [torch.ones(1)],
        lambda preds: (imgs, preds[0], plan.mask),
    ),
    'a2mim_resnet_tiny': lambda model, imgs, plan: (
        [imgs.movedim(1, -1)],
        [(hidden := patch_mask_to_pixels(plan.mask, model.cell_size)).movedim(1, -1)],
        lambda preds: (imgs, preds[0].movedim(-1, 1), hidden),
    ),
}


@pytest.mark.parametrize('name', SCORED)
def test_explained(name):
    """Of what is hidden alone: 0 for the mean, 1 for the target, between them in between."""
    model = make(main_pretrain.find_method(name), name)
    imgs, plan = batch(model, name)
    targets, weights, given = SCORED[name](model, imgs + torch.tensor([3.0, 0, -3]).view(3, 1, 1), plan)
    weights = [weight.expand_as(target) for target, weight in zip(targets, weights, strict=True)]
    places = [tuple(range(target.ndim - 1)) for target in targets]
    means = [(t * w).sum(at) / w.sum(at) for t, w, at in zip(targets, weights, places, strict=True)]
    for share, expected in ((0.0, 0.0), (1.0, 1.0), (0.5, 0.75), (-1.0, -3.0)):
        preds = [m + share * (t - m) for t, m in zip(targets, means, strict=True)]
        preds = [torch.where(w > 0, pred, 9.0) for pred, w in zip(preds, weights, strict=True)]  # where it is visible
        _, terms = model.forward_loss(*given(preds))
        found = [term for key, term in terms.items() if key.startswith('explained')]
        assert len(found) == len(targets)
        assert torch.allclose(torch.stack(found), torch.tensor(expected), atol=1e-5)
        assert not any(term.requires_grad for term in found)


@pytest.mark.parametrize('value', [0.0, 7.3, -1e-6, 1e6])
def test_nothing_to_explain(value):
    target = torch.full((3, 50, 4), value)
    assert explained(torch.tensor([0.0, 5.0]), target).tolist() == [0, 0]


def test_evaluation_mode_ends_with_an_exception():
    model = torch.nn.Sequential(torch.nn.Dropout())

    def fail():
        with eval_mode(model):
            assert not model[0].training
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert model[0].training


@pytest.mark.parametrize(('module', 'name'), TINY, ids=ids(TINY))
def test_draws_its_own_plan(module, name):
    model = make(module, name)
    imgs, _ = batch(model, name)
    assert model(imgs)[0].isfinite()


@pytest.mark.parametrize(('module', 'name'), MODELS, ids=ids(MODELS))
def test_options(module, name):
    make = getattr(module, name)
    assert make.__name__ == name
    with pytest.raises(TypeError, match='no_such_option'):
        make(no_such_option=1)
    with pytest.raises(TypeError):
        make(224)  # keywords only
    with torch.device('meta'), pytest.raises(ValueError, match='63'):
        make(img_size=63)


@pytest.mark.parametrize(('module', 'name'), first(QUICK.keys() - COMPILED_LATER, TINY))
def test_compiles_whole_without_recompiling(module, name):
    """`fullgraph=True` raises at a graph break; a second plan must not trace again."""
    model = without_drop_path(make(module, name)).eval()  # in training, running statistics move between the two
    traces = []

    def backend(graph, example_inputs):
        traces.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for seed in range(3):
        imgs = torch.randn(N, 3, size_of(name), size_of(name))
        plan = draw_plan(model, N, seed)
        loss, _ = compiled(imgs, plan)
        assert torch.allclose(loss, model(imgs, plan)[0], rtol=1e-6)
    assert len(traces) == 1


@pytest.mark.parametrize(('module', 'name'), TINY, ids=ids(TINY))
def test_a_step_never_waits(module, name):
    model = make(module, name)
    imgs, plan = to_device(batch(model, name), torch.device('cpu'))
    groups = param_groups(model, module.param_rules(model), 0.05)
    guard = GuardedOptimizer(model, adamw(groups, 1e-3, (0.9, 0.95)), torch.device('cpu'), fp16=False, clip_grad=1.0)
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


class Crossings(TorchDispatchMode):
    """Records operations on a GPU's tensors that also have one of the host: most make it wait."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
        if len({x.device.type for x in tensors}) > 1:
            self.found.append(func.name())
        return result


@pytest.mark.parametrize(('module', 'name'), first(FIRST, TINY))
def test_a_forward_stays_on_its_gpu(module, name):
    """In shapes alone, which needs no GPU."""
    model, gpu = make(module, name), torch.device('cuda', 0)
    imgs, plan = batch(model, name)
    with FakeTensorMode() as mode:
        for part in model.modules():
            for key, param in part._parameters.items():
                if param is not None:
                    part._parameters[key] = torch.nn.Parameter(torch.empty(param.shape, device=gpu))
            for key, buffer in part._buffers.items():
                if buffer is not None:
                    part._buffers[key] = torch.empty(buffer.shape, dtype=buffer.dtype, device=gpu)
        there = [torch.empty(tensor.shape, dtype=tensor.dtype, device=gpu) for tensor in (imgs, *plan)]
        with Crossings() as crossings:
            model(there[0], type(plan)(*there[1:]))
    assert crossings.found == []
    with mode, Crossings() as crossings:  # it would notice
        there[0][0, 0, 0, 0] = 1.0
    assert crossings.found


@pytest.mark.parametrize(('module', 'name'), TINY, ids=ids(TINY))
def test_class_token_or_a_clear_word(module, name):
    """`--cls_token` classifies it, or says that there is none."""
    options = dict(num_classes=5, img_size=size_of(name), global_pool='token')
    if 'vit' in name:
        assert module.create_classifier(name, **options).global_pool == 'token'
    else:
        with pytest.raises(ValueError, match=f'{name} has no class token to classify'):
            module.create_classifier(name, **options)


# --------------------------------------------------------------------------
# segmenters, which a method may have

SEGMENTERS = [(module, name) for module, name in TINY if hasattr(module, 'create_segmenter')]


def make_segmenter(module, name, drop_path_rate=0.0):
    torch.manual_seed(0)
    size = size_of(name)
    model = module.create_segmenter(name, num_classes=5, drop_path_rate=drop_path_rate, img_size=size)
    return model, torch.randn(N, 3, size, size), torch.randint(5, (N, size, size)).index_fill_(1, torch.arange(9), 255)


@pytest.mark.parametrize(('module', 'name'), first(QUICK.keys() - {'a2mim_timm'}, SEGMENTERS))
def test_segmenter(module, name):
    """A step that never waits, gradients for all, rules for all; logits of a copy; what heads count on."""
    model, imgs, labels = make_segmenter(module, name)
    rules = module.param_rules(model)
    assert rules.keys() == {key for key, _ in model.named_parameters()}
    last = max(layer_id for layer_id, _, _ in rules.values())
    assert all(rules[key][0] == last for key in rules if not key.startswith('encoder.'))
    assert {layer_id for layer_id, _, _ in rules.values()} == set(range(last + 1))
    classifier = module.create_classifier(name, num_classes=5, img_size=imgs.shape[-1])
    own = {key.removeprefix('encoder.') for key in model.state_dict() if key.startswith('encoder.')}
    assert all(re.search(r'^norm\d|gamma|bias_table|[qv]_bias', key) for key in own - classifier.state_dict().keys())
    assert model.encoder.widths == [x.shape[1] for x in model.eval().encoder(imgs)]
    assert model.encoder.strides == [imgs.shape[-1] // x.shape[-1] for x in model.encoder(imgs)]

    guard = GuardedOptimizer(
        model.train(),
        adamw(param_groups(model, rules, 0.05), 1e-3, (0.9, 0.95)),
        torch.device('cpu'),
        fp16=False,
        clip_grad=1.0,
    )
    with HostReads() as reads:
        guard.set_lr(1e-3)
        loss, terms = model(imgs, labels)
        guard.backward(loss)
    assert_scalars(loss, terms)
    assert terms.keys() == {'decode', 'aux'}
    assert torch.allclose(sum(terms.values()), loss)
    assert not [key for key, param in model.named_parameters() if param.grad is None or not param.grad.isfinite().all()]
    with reads:
        guard.step()
    assert reads.found == []
    copied = copy.deepcopy(model).eval()
    logits = model.eval()(imgs)
    assert logits.shape == (N, 5, *imgs.shape[2:])
    assert torch.equal(copied(imgs), logits)


@pytest.mark.parametrize(('module', 'name'), first(FIRST, SEGMENTERS))
def test_checkpointing_a_segmenter_changes_nothing(module, name):
    model, imgs, labels = make_segmenter(module, name, drop_path_rate=0.2)
    again = copy.deepcopy(model)
    assert checkpoint_blocks(again) >= 4
    for network in (model, again):
        torch.manual_seed(0)
        network(imgs, labels)[0].backward()
    for ours, theirs in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    for ours, theirs in zip(again.buffers(), model.buffers(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(('module', 'name'), first(FIRST[:1], SEGMENTERS))
def test_a_segmenter_compiles_whole(module, name):
    model, imgs, labels = make_segmenter(module, name)
    model.eval()  # in training whole channels drop out
    traces = []

    def backend(graph, example_inputs):
        traces.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for seed in range(2):
        torch.manual_seed(seed)
        imgs = torch.randn_like(imgs)
        assert torch.allclose(compiled(imgs, labels)[0], model(imgs, labels)[0], rtol=1e-6)
    assert len(traces) == 1
