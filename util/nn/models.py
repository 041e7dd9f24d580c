"""What every models_*.py does with its models: make them by name, for timm too, and look at one in evaluation mode."""

import contextlib
import difflib
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LayerNorm(nn.LayerNorm):
    """torch's, but features that are in bf16 stay in it on a GPU, and only weights are cast, as a linear layer's are.

    Autocast there would have features in float32 before and after, for linear layers that take bf16. Inside of the
    kernel all sums are float32; those of a CPU's are not, but it takes float32 weights with bf16 features.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype is not torch.bfloat16 or x.device.type == 'cpu':
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


norm_layer = partial(LayerNorm, eps=1e-6)  # of MAE and what follows it; torch's own default is 1e-5


def fuse_attention(network: nn.Module) -> None:
    """Let every attention of timm's use torch's fused kernels, its Swin's too, which by default does not.

    On a CPU these kernels gain nothing there, and round another way.
    """
    for module in network.modules():
        if hasattr(module, 'fused_attn'):
            module.fused_attn = True


def factory(cls: type[nn.Module], name: str, /, **sizes) -> Callable[..., nn.Module]:
    """The function behind `--model NAME`: `cls` with these sizes, which keyword arguments override."""

    def make(**options) -> nn.Module:
        return cls(**{**sizes, **options})

    make.__name__ = make.__qualname__ = name
    make.__module__ = cls.__module__
    make.__annotations__['return'] = cls
    return make


def factories(cls: type[nn.Module], encoders: dict[str, dict], others: dict[str, dict]) -> dict[str, Callable]:
    """{name: function} for each name of `encoders`, with the sizes of both tables."""
    return {name: factory(cls, name, **sizes, **others.get(name, {})) for name, sizes in encoders.items()}


def sizes_of(encoders: dict[str, dict], name: str) -> dict:
    """What a table has for this name. Raises ValueError with the closest names."""
    if name in encoders:
        return encoders[name]
    close = difflib.get_close_matches(name, encoders, n=3) or list(encoders)
    raise ValueError(f'no model {name}; did you mean {" or ".join(close)}?')


NOT_IN_TIMM = ('norm_layer', 'weight_init', 'num_classes', 'drop_path_rate')  # of training, or timm's own by default


def as_timm(model: nn.Module, architecture: str, **options) -> nn.Module:
    """The network, with a note of how `timm.create_model(architecture, **options)` makes it again, without weights."""
    model.timm_recipe = architecture, {name: value for name, value in options.items() if name not in NOT_IN_TIMM}
    return model


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the `with` block; afterwards, also after an exception, the mode from before."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextlib.contextmanager
def testing(model: nn.Module) -> Iterator[None]:
    """The same, and without gradients."""
    with eval_mode(model), torch.inference_mode():
        yield
