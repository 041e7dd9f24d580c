"""Activation checkpointing for any network: each block's inside is recomputed in the backward pass instead of kept."""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def checkpoint_blocks(core: nn.Module) -> int:
    """Checkpoint every block of a network, and return how many there are.

    Only the blocks' `forward` is wrapped: names, hooks and weights stay as they are. timm's own switch would bypass
    the hooks of a ResNet's stages, and count each batch twice in BatchNorm's running statistics.
    """
    found = list(blocks(core))
    for block in found:  # a partial of bound methods, not a closure: a copy of the network gets its own blocks
        block.forward = partial(checkpointed, block.forward)
    return len(found)


def checkpointed(forward: Callable, *args, **kwargs):
    """A block's forward, whose inside is not kept. Compiled, buffers change once by themselves."""
    options = {}
    if not torch.compiler.is_compiling():
        norms = [module for module in forward.__self__.modules() if isinstance(module, _BatchNorm)]
        options = {'context_fn': partial(running_statistics_once, norms)} if norms else {}
    return checkpoint(forward, *args, use_reentrant=False, **options, **kwargs)


def blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The innermost repeated parts that have parts themselves: residual blocks, in all networks of the field."""
    children = list(module.children())
    alike = len(children) > 1 and len({type(child) for child in children}) == 1
    listed = alike or isinstance(module, nn.Sequential | nn.ModuleList)
    for child in children:
        inside = list(blocks(child))
        if inside:
            yield from inside
        elif listed and any(True for _ in child.children()):
            yield child


def running_statistics_once(norms: list[_BatchNorm]) -> tuple[AbstractContextManager, AbstractContextManager]:
    """Contexts of the forward and of its repetition, after which BatchNorm's running statistics are as before it."""

    @contextlib.contextmanager
    def repetition():
        tracking = [norm for norm in norms if norm.track_running_stats]
        tracked = [(norm, norm.momentum, norm.num_batches_tracked.clone()) for norm in tracking]
        for norm, _, _ in tracked:
            norm.momentum = 0.0
        try:
            yield  # left by an exception as soon as all is there that the backward pass needs
        finally:
            for norm, momentum, count in tracked:
                norm.momentum = momentum
                norm.num_batches_tracked.copy_(count)

    return contextlib.nullcontext(), repetition()
