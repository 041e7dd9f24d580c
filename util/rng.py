"""Randomness as a function of (seed, position), not of history: nothing of it is saved, any split of the work agrees.

The streams: initial weights, the epoch's order, each sample's augmentation, each micro-step (drop path, mixup), the
masks, the pictures' masks, the images that replace skipped ones, those that validate, those that are analysed, and
their hidden cells.
"""

import contextlib
import math
import os
import random
import re
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import init
from torch.overrides import TorchFunctionMode

INIT, ORDER, SAMPLE, STEP, MASK, PICTURE, REPLACEMENT, VAL_SHARE, CHOICE, OCCLUSION = range(10)


def generator(seed: int, stream: int, *position: int) -> np.random.Generator:
    """A counter-based generator for one position of one stream."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, stream, *position))))


def seed_all(seed: int, stream: int, *position: int) -> None:
    """Seed torch (CPU and GPUs), numpy and `random` for one position of one stream.

    As `torch.manual_seed`, which takes milliseconds: for each kind of device not in use it formats a stack trace.
    """
    a, b = np.random.SeedSequence((seed, stream, *position)).generate_state(2).tolist()
    torch.default_generator.manual_seed((a << 32) | b)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all((a << 32) | b)
    np.random.seed(a)
    random.seed(b)


DRAWS = [name for name in vars(init) if re.fullmatch('((kaiming|xavier|trunc)_)?(uniform|normal)_', name)]


@contextlib.contextmanager
def undrawn() -> Iterator[None]:
    """Networks that are made in a `with` block of it draw no initial weights: what these hold is to be replaced.

    What is computed (positions, constants) is made as ever.
    """
    before = {name: getattr(init, name) for name in DRAWS}
    try:
        for name in DRAWS:
            setattr(init, name, untouched)
        with NoUniform():
            yield
    finally:
        for name, draw in before.items():
            setattr(init, name, draw)


def untouched(tensor: Tensor, *args, **kwargs) -> Tensor:
    return tensor


class NoUniform(TorchFunctionMode):
    """Fills where timm draws, which is faster. It does not leave memory as it is: torch may wait for a good draw."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        match function, args:
            case Tensor.uniform_, [tensor, low, _]:
                return tensor.fill_(low)
            case Tensor.erfinv_, [tensor]:
                return tensor
        return function(*args, **(kwargs or {}))


def uniform(rng: np.random.Generator, shape: tuple[int, ...]) -> Tensor:
    """U[0, 1) noise in float32, on the CPU."""
    return torch.from_numpy(rng.random(shape, dtype=np.float32))


def mask_noise(
    core: nn.Module, seed: int, step: int, micro: int, rank: int, batch_size: int, world_size: int
) -> Tensor:
    """What `core.plan_from_noise` is given at optimiser step `step`, micro-step `micro`, on this rank.

    With `mask_scope == 'sample'`, sample j of the global batch gets row j of the step's noise, however it is split
    over ranks and micro-steps. With 'batch', every forward has its own noise.
    """
    shape = core.noise_shape(batch_size)
    if core.mask_scope == 'batch':
        return uniform(generator(seed, MASK, step, micro, rank), shape)
    rng = generator(seed, MASK, step)
    first_row = (micro * world_size + rank) * batch_size
    skip_float32(rng, first_row * math.prod(core.noise_shape(1)))
    return uniform(rng, shape)


def picture_noise(core: nn.Module, seed: int, count: int) -> Tensor:
    """What the masks of `count` pictures are made from: the same at every drawing."""
    return uniform(generator(seed, PICTURE), core.noise_shape(count))


def skip_float32(rng: np.random.Generator, count: int) -> None:
    """Jump over `count` float32 draws of a fresh Philox generator; 8 of them come from one 256-bit block."""
    rng.bit_generator.advance(count // 8)
    rng.random(count % 8, dtype=np.float32)


def settle_kernels(deterministic: bool, sizes_vary: bool = False) -> None:
    """Let cuDNN pick its fastest kernels, or allow only those that repeat to the bit.

    It tries them all at each new size: not where sizes vary, as the number of a detector's regions does.
    """
    if deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not (deterministic or sizes_vary)
