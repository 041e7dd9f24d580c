"""How many dimensions a representation uses."""

import torch
from torch import Tensor

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

    def __init__(self):
        self.count, self.products = 0, None

    def update(self, Z: Tensor) -> None:
        """Add features [N, D]."""
        Z = Z.double()
        self.products = Z.T @ Z if self.products is None else self.products.addmm_(Z.T, Z)
        self.count += len(Z)

    def rankme(self, eps: float = EPS) -> float:
        """What `rankme` gives for all features at once."""
        squares = torch.linalg.eigvalsh(self.products)[-self.count :]  # D - N of them are 0 but for rounding
        return rank_of(squares.clamp(min=0).sqrt(), eps)
