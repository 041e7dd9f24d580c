"""What a simple classifier reads out of frozen features: nearest neighbours, logistic regression, ridge regression."""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

QUERIES, REFERENCES = 1024, 65_536  # rows of similarities that are there at once, and columns
TEMPERATURE = 0.07

# --------------------------------------------------------------------------
# nearest neighbours


def knn_scores(
    train: Tensor, labels: Tensor, test: Tensor, ks: Sequence[int], temperature: float, classes: int
) -> dict[int, Tensor]:
    """{k: [M, classes]}: weighted votes of the k nearest of `train` [N, D] for each of `test` [M, D] (DINO's protocol).

    Votes are exp((similarity - largest similarity) / temperature), similarities are cosines; the rows are not
    normalised. A k above N is N. Labels [N] are 0 to classes - 1; some may be missing. Features of 16 bits are
    compared in float32, others in what they are. No [M, N] matrix is made.
    """
    blocks = [block_scores(train, labels, queries, ks, temperature, classes) for queries in test.split(QUERIES)]
    return {k: torch.cat([scores[k] for scores in blocks]) for k in ks}


def block_scores(
    train: Tensor, labels: Tensor, queries: Tensor, ks: Sequence[int], temperature: float, classes: int
) -> dict[int, Tensor]:
    similarity, places = neighbours(train, unit(queries), max(ks))
    votes = ((similarity - similarity[:, :1]) / temperature).exp()
    names = labels.to(places.device)[places]
    return {k: votes.new_zeros(len(queries), classes).scatter_add_(1, names[:, :k], votes[:, :k]) for k in ks}


def neighbours(train: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The similarities, from the largest, and places [M, k] of the nearest of `train` to normalised queries [M, D]."""
    similarity = queries.new_empty(len(queries), 0)
    places = torch.empty(len(queries), 0, dtype=torch.long, device=queries.device)
    for first in range(0, len(train), REFERENCES):
        block = queries @ unit(train[first : first + REFERENCES]).T
        best, order = block.topk(min(k, block.shape[1]))
        similarity, places = torch.cat([similarity, best], 1), torch.cat([places, order + first], 1)
        similarity, order = similarity.topk(min(k, similarity.shape[1]))
        places = places.gather(1, order)
    return similarity, places


def unit(features: Tensor) -> Tensor:
    """Features [N, D] of length 1."""
    wide = features.float() if features.dtype in (torch.float16, torch.bfloat16) else features
    return F.normalize(wide, dim=1)


def hits(scores: Tensor, labels: Tensor, top: int) -> Tensor:
    """Whether the label [M] is among the `top` classes with the highest scores [M, C]; a class without a vote never."""
    best, order = scores.topk(min(top, scores.shape[1]))
    return ((order == labels.unsqueeze(1)) & (best > 0)).any(1)


# --------------------------------------------------------------------------
# linear classifiers of features that are kept: no augmentation, so no numbers of a probe that is trained on images

LAMBDAS = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)  # from which `tuned` chooses
TOLERANCE = 1e-5  # of gradients: nearer to the minimum, hardly an answer changes


def standardised(train: Tensor, *others: Tensor) -> list[Tensor]:
    """Features [., D] less the mean of `train` over its population deviation, as BatchNorm without affine: in float32
    or, if they are given so, float64. A constant feature becomes 0."""
    wide = [x if x.dtype == torch.float64 else x.float() for x in (train, *others)]
    std, mean = torch.std_mean(wide[0], 0, correction=0)
    return [(x - mean) / std.where(std > 0, 1) for x in wide]


def logistic(
    X: Tensor,
    y: Tensor,
    classes: int,
    lam: float,
    start: tuple[Tensor, Tensor] | None = None,
    tolerance: float = 1e-8,
) -> tuple[Tensor, Tensor]:
    """W [C, D] and b [C] that minimise mean cross-entropy + lam / 2 |W|^2 over features X [N, D] with labels y [N].

    The bias is free. By L-BFGS from `start` or 0, until no gradient is above `tolerance`, in at most 1,000 steps; in
    float64, since its line search fails early in float32. The result has the precision of X.
    """
    zeros = X.new_zeros(classes, X.shape[1]), X.new_zeros(classes)
    W, b = (start.double().clone().requires_grad_() for start in start or zeros)
    options = dict(history_size=20, line_search_fn='strong_wolfe', tolerance_grad=tolerance, tolerance_change=0)
    optimizer = torch.optim.LBFGS([W, b], max_iter=1000, max_eval=2000, **options)

    def loss_and_gradient() -> Tensor:
        optimizer.zero_grad()
        parts = [lam / 2 * W.square().sum()]
        parts[0].backward()
        for rows, labels in zip(X.split(REFERENCES), y.split(REFERENCES), strict=True):
            parts.append(F.cross_entropy(F.linear(rows.double(), W, b), labels, reduction='sum') / len(X))
            parts[-1].backward()
        return torch.stack([part.detach() for part in parts]).sum()

    with torch.enable_grad():
        optimizer.step(loss_and_gradient)
    return W.detach().to(X.dtype), b.detach().to(X.dtype)


def ridge(X: Tensor, y: Tensor, classes: int, lam: float) -> tuple[Tensor, Tensor]:
    """W [C, D] and b [C] that minimise the mean squared error to one-hot labels, summed over classes, + lam |W|^2.

    The bias is free. In closed form, in float64; the result has the precision of X.
    """
    return ridge_of(moments(X, y, classes), lam, X.dtype)


def moments(X: Tensor, y: Tensor, classes: int) -> tuple[Tensor, ...]:
    """What ridge regression needs of its data: X'X / n and X'Y / n, centred, and the means; float64."""
    x_mean, shares = X.double().mean(0), torch.bincount(y, minlength=classes).double() / len(y)
    squares, products = x_mean.new_zeros(len(x_mean), len(x_mean)), x_mean.new_zeros(len(x_mean), classes)
    for rows, labels in zip(X.split(REFERENCES), y.split(REFERENCES), strict=True):
        rows = rows.double() - x_mean
        squares.addmm_(rows.T, rows, alpha=1 / len(X))
        products.T.index_add_(0, labels, rows, alpha=1 / len(X))
    return squares, products, x_mean, shares


def ridge_of(found: tuple[Tensor, ...], lam: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    squares, products, x_mean, shares = found
    W = torch.linalg.solve(squares + lam * torch.eye(len(squares)).to(squares), products).T
    return W.to(dtype), (shares - W @ x_mean).to(dtype)


def fits(
    kind: str, X: Tensor, y: Tensor, classes: int, lambdas: Sequence[float]
) -> Iterator[tuple[float, Tensor, Tensor]]:
    """(lam, W, b) of each lambda in turn, of 'logistic' or 'ridge'; each logistic one starts from the one before."""
    if kind == 'ridge':
        found = moments(X, y, classes)
        for lam in lambdas:
            yield lam, *ridge_of(found, lam, X.dtype)
        return
    start = None
    for lam in lambdas:
        start = logistic(X, y, classes, lam, start, TOLERANCE)
        yield lam, *start


def tuned(kind: str, X: Tensor, y: Tensor, classes: int, held_back: Tensor) -> tuple[float, Tensor, Tensor]:
    """(lam, W, b) fitted to all, with the lambda that is best on the rows `held_back` (bool [N]) for the others' fit.

    Of equally good ones the largest.
    """

    def right(fit: tuple[float, Tensor, Tensor]) -> float:
        _, W, b = fit
        return (F.linear(X[held_back], W, b).argmax(1) == y[held_back]).sum().item()

    lam, *_ = max(fits(kind, X[~held_back], y[~held_back], classes, LAMBDAS), key=right)
    [fit] = fits(kind, X, y, classes, [lam])
    return fit
