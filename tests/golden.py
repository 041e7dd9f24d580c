"""Compare our tensors with the summaries that the papers' own code left in `tests/parity/`."""

import json
from pathlib import Path

import fill
import numpy as np
import torch

FOLDER = Path(__file__).parent / 'parity'


def golden(path: str) -> dict:
    return json.loads((FOLDER / path).read_text())


def filled_state(params: list, not_filled: list = ()) -> dict[str, torch.Tensor]:
    """The reference's parameters [[name, shape], ...] under its own names."""
    return {name: torch.from_numpy(fill.weight(name, shape)) for name, shape in params if name not in not_filled}


def summary_difference(ours: torch.Tensor, summary: dict, ddof: int = 0) -> float:
    """Largest absolute difference of the first eight values, mean and std, and relative one of the l2 norm.

    `ddof` 1 is the unbiased std.
    """
    x = ours.detach().double().numpy()
    assert list(x.shape) == summary['shape']
    return max(
        np.abs(x.reshape(-1)[:8] - summary['first8']).max(),
        abs(x.mean() - summary['mean']),
        abs(x.std(ddof=ddof) - summary['std']),
        relative(np.sqrt((x**2).sum()), summary['l2']),
    )


def relative(ours: float, theirs: float) -> float:
    return abs(float(torch.as_tensor(ours).detach()) - theirs) / abs(theirs)
