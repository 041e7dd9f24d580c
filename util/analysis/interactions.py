"""How parts of an image act together on an answer, order by order: multi-order interactions (Deng et al. 2022).

The players are the cells of a grid over the image. A player who does not take part is hidden: its pixels are 0 in
normalised space, the mean colour of the data set.
"""

import random
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from util.analysis.features import exact
from util.errors import UserError

RATIOS = (0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1)  # of the orders; the ends weigh more in J
BATCH = 400  # cell sets in a forward


# --------------------------------------------------------------------------
# samples: functions of (seed, place), bit for bit those of Deng et al.'s code, which has global generators


def sample_pairs(grid: int, count: int, radius: int, seed: int) -> np.ndarray:
    """`count` pairs of different cells at most `radius` rows and columns apart, none of them twice: int64 [P, 2].

    Neighbours beyond the border count as those at the border. Raises UserError where there are not so many pairs.
    """
    near = sum(max(0, grid - abs(step)) for step in range(-radius, radius + 1))
    if (there := (near**2 - grid**2) // 2) < count:
        raise UserError(f'a grid of {grid} x {grid} cells has {there} pairs within radius {radius}, not {count}')
    firsts, neighbours = np.random.RandomState(seed), random.Random(seed)
    reach = range(-radius, radius + 1)
    steps = [(down, right) for down in reach for right in reach if (down, right) != (0, 0)]
    found = {}
    while len(found) < count:
        row, column = firsts.randint(0, grid), firsts.randint(0, grid)
        down, right = neighbours.choice(steps)
        i = row * grid + column
        j = min(max(row + down, 0), grid - 1) * grid + min(max(column + right, 0), grid - 1)
        if i != j:
            found.setdefault(frozenset((i, j)), (i, j))
    return np.array(list(found.values()), np.int64).reshape(-1, 2)


def sample_contexts(pairs: np.ndarray, grid: int, order: int, count: int, seed: int) -> np.ndarray:
    """`count` sets of `order` other cells for each of the pairs [P, 2]: int64 [P, count, order]."""
    draw, cells = np.random.RandomState(seed), np.arange(grid**2)
    contexts = np.empty((len(pairs), count, order), np.int64)
    for pair, of_pair in zip(np.asarray(pairs), contexts, strict=True):
        others = np.delete(cells, pair)
        for context in of_pair:
            context[:] = others[draw.permutation(len(others))[:order]]
    return contexts


def order_of(ratio: float, grid: int) -> int:
    """How many cells the contexts have: a share of those that are not of the pair."""
    return int((grid**2 - 2) * ratio)


def distinct_sets(pairs: np.ndarray, contexts: np.ndarray, grid: int) -> tuple[np.ndarray, np.ndarray]:
    """The different cell sets, bool [U, n], and where S+i+j, S+i, S+j and S of each context are among them, [P, S, 4].

    Without a context, or with all cells in it, those of a pair coincide: few are left to forward.
    """
    pairs, contexts = np.asarray(pairs), np.asarray(contexts)
    sets = np.zeros((*contexts.shape[:2], 4, grid**2), bool)
    np.put_along_axis(sets, contexts[:, :, None], True, axis=3)
    number = np.arange(len(pairs))
    for variant, players in enumerate(((0, 1), (0,), (1,), ())):
        for player in players:
            sets[number, :, variant, pairs[:, player]] = True
    packed, places = np.unique(np.packbits(sets.reshape(-1, grid**2), axis=1), axis=0, return_inverse=True)
    return np.unpackbits(packed, axis=1, count=grid**2).astype(bool), places.reshape(sets.shape[:3])


# --------------------------------------------------------------------------
# hidden cells


def hide(imgs: Tensor, keep: Tensor) -> Tensor:
    """Images [N, 3, H, W], or one [3, H, W] for all, with 0 in all cells but those kept: [N, 3, H, W].

    `keep`: bool [N, n], the cells of a square grid, row by row. Pixel row p is in cell row floor(p * grid / H).
    """
    grid = round(keep.shape[-1] ** 0.5)
    rows, columns = (torch.arange(side, device=keep.device) * grid // side for side in imgs.shape[-2:])
    shown = keep.unflatten(-1, (grid, grid))[:, rows][:, :, columns]
    return torch.where(shown.unsqueeze(1), imgs, 0)


# --------------------------------------------------------------------------
# interactions


def log_odds(logits: Tensor, label: int) -> Tensor:
    others = torch.cat([logits[:, :label], logits[:, label + 1 :]], 1)
    return logits[:, label] - others.logsumexp(1)


REWARDS: dict[str, Callable[[Tensor, int], Tensor]] = {  # of logits [B, C] float64: [B]
    'log_odds': log_odds,
    'log_probability': lambda logits, label: logits.log_softmax(1)[:, label],
    'logit': lambda logits, label: logits[:, label],
}


def interactions(
    model: nn.Module,
    img: Tensor,
    label: int,
    pairs: np.ndarray,
    contexts: np.ndarray,
    grid: int,
    reward: str = 'log_odds',
    batch_size: int = BATCH,
) -> Tensor:
    """I(i, j) of an image [3, H, W], normalised, for each of the pairs [P, 2]: float64 [P], on the network's device.

    The mean over the pair's contexts S [P, S, m] of v(S+i+j) - v(S+i) - v(S+j) + v(S), where v is the reward that
    the network gives to the label when only these cells are shown. Each different cell set is forwarded once,
    `batch_size` of them at a time. As `exact` has it; the reward is in float64. Raises UserError for weights of 16
    bits.
    """
    sets, places = distinct_sets(pairs, contexts, grid)
    return of_sets(model, img, label, sets, places, reward, batch_size)


def of_sets(
    model: nn.Module, img: Tensor, label: int, sets: np.ndarray, places: np.ndarray, reward: str, batch_size: int
) -> Tensor:
    """`interactions` by what `distinct_sets` gives. The host does not wait for the device."""
    weight = next(model.parameters())
    if weight.dtype not in (torch.float32, torch.float64):
        kind = str(weight.dtype).removeprefix('torch.')
        raise UserError(f'interactions need a network in float32, not in {kind}: its rounding is larger than they are')
    device = weight.device
    kept, places, img = uploaded(sets, device), uploaded(places, device), img.to(weight)
    with exact(model):
        rewards = [REWARDS[reward](model(hide(img, keep)).double(), int(label)) for keep in kept.split(batch_size)]
    both, with_i, with_j, neither = torch.cat(rewards)[places].unbind(2)
    return (both - with_i - with_j + neither).mean(1)


def uploaded(array: np.ndarray, device: torch.device) -> Tensor:
    """On the device, without waiting for what that is doing."""
    tensor = torch.from_numpy(array)
    return (tensor.pin_memory() if device.type == 'cuda' else tensor).to(device, non_blocking=True)


def strength(found: Tensor) -> Tensor:
    """J of I [ratios, images, pairs]: [ratios], 1 on average. Absolute values are of what is averaged over contexts."""
    A = torch.as_tensor(found).double().abs().mean((1, 2))
    return A / A.mean()


def strength_error(found: Tensor) -> Tensor | None:
    """The standard error of J over the images, [ratios], to first order; None for a single image."""
    of_image = torch.as_tensor(found).double().abs().mean(2)
    A, count = of_image.mean(1), of_image.shape[1]
    if count < 2:
        return None
    apart = of_image - (A / A.mean()).unsqueeze(1) * of_image.mean(0)  # J is a ratio, both parts of which vary
    return apart.std(1) / A.mean() / count**0.5
