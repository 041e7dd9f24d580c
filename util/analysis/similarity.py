"""How many dimensions a representation uses."""

import torch
from torch import Tensor

from util import dist

EPS = 1e-7  # of RankMe


def rankme(Z: Tensor, eps: float = EPS) -> float:
    """RankMe (Garrido et al. 2023, eq. 1 and 2) of features Z [N, D], neither centred nor normalised: 1 to min(N, D).

    exp(-sum p log p) with p = s / sum(s) + eps over the singular values s, in float64. With `eps` 0 it is the effective
    rank (Roy and Vetterli 2007). It is at most N: give more images than dimensions.
    """
    return rank_of(torch.linalg.svdvals(Z.double()), eps)


def rank_of(singular_values: Tensor, eps: float = EPS) -> float:
    """`rankme` by the singular values; nan if all are 0."""
    return torch.special.entr(singular_values / singular_values.sum() + eps).sum().exp().item()


class Gram:
    """Z'Z of features that come in batches, in float64: gives their singular values, and no feature is kept."""

    def __init__(self, width: int, device: torch.device | str = 'cpu'):
        self.products = torch.zeros(width, width, dtype=torch.float64, device=device)
        self.count = torch.zeros((), dtype=torch.long, device=device)

    def update(self, Z: Tensor) -> None:
        """Add features [N, D]."""
        self.products.addmm_(Z.double().T, Z.double())
        self.count += len(Z)

    def over_ranks(self) -> 'Gram':
        """Those of all ranks together, on each of them; every rank must call it."""
        dist.all_reduce_sum(self.products)
        dist.all_reduce_sum(self.count)
        return self

    def rankme(self, eps: float = EPS) -> float:
        """What `rankme` gives for all features at once."""
        squares = torch.linalg.eigvalsh(self.products)[-int(self.count) :]  # the others are 0, but for rounding
        return rank_of(squares.clamp(min=0).sqrt(), eps)
