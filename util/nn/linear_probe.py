"""A linear probe, as MAE has it: BatchNorm and a linear layer learn on the features of a network that is frozen."""

from torch import nn


class ProbeHead(nn.Sequential):
    """Features [N, D] -> logits [N, classes]: BatchNorm without affine, and a linear layer."""

    def __init__(self, width: int, num_classes: int):
        super().__init__(nn.BatchNorm1d(width, affine=False, eps=1e-6), nn.Linear(width, num_classes))
        nn.init.trunc_normal_(self[1].weight, std=0.01)
        nn.init.zeros_(self[1].bias)


def last_layer(network: nn.Module) -> str:
    """The name of a classifier's last layer: what timm's networks call their classifier, or `head`."""
    last = network.get_classifier() if hasattr(network, 'get_classifier') else network.head
    return next((name for name, module in network.named_modules() if module is last), '')


def make_probe(network: nn.Module) -> nn.Module:
    """Put a `ProbeHead` in the place of a classifier's last layer, and freeze all else.

    Raises ValueError if that layer is not linear.
    """
    name = last_layer(network)
    last = network.get_submodule(name)
    if not isinstance(last, nn.Linear):
        raise ValueError(f'its last layer, {name or "which has no name"}, is {type(last).__name__}, not linear')
    network.requires_grad_(False)
    network.set_submodule(name, ProbeHead(last.in_features, last.out_features))
    set_train_mode(network)
    return network


def set_train_mode(network: nn.Module) -> None:
    """Train mode; but of a probe for the head alone.

    In eval mode the frozen part has no drop path, and the running statistics of its BatchNorm do not move.
    """
    head = next((module for module in network.modules() if isinstance(module, ProbeHead)), None)
    network.train(head is None)
    if head:
        head.train()
