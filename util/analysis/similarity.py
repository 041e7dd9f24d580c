"""How many dimensions a representation uses, and how much two of them have in common."""

from collections.abc import Sequence

import torch
from torch import Tensor

from util import dist
from util.errors import UserError

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
        squares = torch.linalg.eigvalsh(self.products)
        rounding = len(squares) * torch.finfo(squares.dtype).eps * squares[-1]  # what should be 0 is up to this
        return rank_of(squares.where(squares > rounding, 0)[-int(self.count) :].sqrt(), eps)


# --------------------------------------------------------------------------
# CKA

FEWEST = 4  # images of a batch: the unbiased estimate divides by n - 3
COLUMNS = 65_536  # of features that are there in float64 at once


class MinibatchCKA:
    """CKA of each layer of one network with each of another (or of the same), over batches of images.

    The unbiased HSIC of each batch is summed over the batches, and divided once, at the end (Nguyen, Raghu, Kornblith
    2021, eq. 1 to 3). Values are from -1 to 1. All batches must have as many images.
    """

    def __init__(self):
        self.images = None  # of a batch
        self.sums = None  # <K, L>, <K, K>, <L, L>: [A, B], [A], [B]

    def update(self, list_a: Sequence[Tensor], list_b: Sequence[Tensor]) -> None:
        """Add a batch: features [n, ...] of each layer of both networks, of the same n images, 4 or more.

        Layers may differ in all dimensions but the first. Computed in float64. Raises UserError if n does not fit.
        """
        counts = {len(features) for features in (*list_a, *list_b)} | ({self.images} - {None})
        if len(counts) != 1:
            raise UserError(f'CKA takes batches of the same images, equally many in each, got {sorted(counts)}')
        [self.images] = counts
        a, b = (torch.stack([centred_gram(features) for features in layers]) for layers in (list_a, list_b))
        sums = (a @ b.T, a.square().sum(1), b.square().sum(1))
        self.sums = sums if self.sums is None else [old + new for old, new in zip(self.sums, sums, strict=True)]

    def result(self) -> Tensor:
        """CKA [A, B], float64. It means nothing for a layer that gives the same for every image."""
        if self.sums is None:
            raise UserError('CKA of no batch')
        return cka(*self.sums)


def cka(products: Tensor, of_a: Tensor, of_b: Tensor) -> Tensor:
    """CKA [..., A, B] by the dot products of `centred_gram`s, of pairs [..., A, B], with themselves [..., A], [..., B].

    Products are of a batch, or sums over batches.
    """
    return products / (of_a.sqrt().unsqueeze(-1) * of_b.sqrt().unsqueeze(-2))


def centred_gram(features: Tensor) -> Tensor:
    """The dot products of all pairs of images, by features [n, ...], centred: [n * n] in float64.

    The dot product of two of them is n (n - 3) times the unbiased HSIC (Song et al. 2012). Raises UserError for n < 4.
    """
    n = len(features)
    if n < FEWEST:
        raise UserError(f'CKA needs {FEWEST} images or more in a batch, got {n}')
    parts = (part.double() for part in features.flatten(1).split(COLUMNS, 1))
    gram = sum(part @ part.T for part in parts).fill_diagonal_(0)
    means = gram.sum(1) / (n - 2)
    means -= means.sum() / (2 * (n - 1))
    return (gram - means.unsqueeze(1) - means).fill_diagonal_(0).flatten()
