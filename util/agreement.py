"""Ranks agree before the first step. Those that were started differently would train apart, or wait for one another.

Each rank lists facts, by name; what differs is one line on all of them.
"""

import argparse
import contextlib
import hashlib
import itertools
import platform
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import PIL
import timm
import torch
import torchvision

from util import digests, dist
from util.data import decoders
from util.data.datasets import Split
from util.errors import DisagreementError, printable
from util.training import amp_dtype

MAY_DIFFER = {  # arguments, and why
    'data_path': 'a disk of each machine; the names below it are compared',
    'knn_data': 'as --data_path',
    'config': 'a path; what it sets is compared',
    'given': 'which flags; what they set is compared',
    'num_workers': 'no number depends on it',
    'pin_mem': 'no number depends on it',
    'data_retries': 'no number depends on it',
    'device': 'its number; its kind is compared',
    'local_rank': 'the number of a process',
    'dist_url': 'one meeting place can have several names',
}
SHOWN = 5  # differences in the line


def check(args: argparse.Namespace, device: torch.device, **data: Split) -> None:
    """Raise DisagreementError on all ranks if they differ.

    `data` are the splits by name. Every rank must call it.
    """
    if not dist.active():
        return
    mine = facts(args, device, **data)
    found = dist.gather(mine)
    names = dict.fromkeys(name for facts in found for name in facts)
    differing = [name for name in names if any(facts.get(name) != mine.get(name) for facts in found)]
    if differing:
        with contextlib.suppress(RuntimeError):  # who ends first breaks the connections of who still listens
            dist.barrier()
        listed = [f'{name} is {on_which([facts.get(name) for facts in found])}' for name in differing]
        more = f'; and {len(listed) - SHOWN} more' if len(listed) > SHOWN else ''
        raise DisagreementError(f'the ranks do not agree: {"; ".join(listed[:SHOWN])}{more}')


def facts(args: argparse.Namespace, device: torch.device, **data: Split) -> dict[str, str]:
    """What must be the same on all ranks, by name."""
    return {
        **{f'--{name}': in_words(value) for name, value in vars(args).items() if name not in MAY_DIFFER},
        **{f'the SHA-256 of --{name}': sums(vars(args).get(name)) for name in ('finetune', 'init', 'resume')},
        'the kind of --device': device.type,
        'the precision': str(amp_dtype(args, device)),
        **{f'what --data_path holds ({split})': contents(args.data_path, of) for split, of in data.items()},
        'Python': platform.python_version(),
        **{module.__name__: module.__version__ for module in (torch, torchvision, timm, np, PIL)},
        **decoders.version(vars(args).get('decoder', decoders.PIL)),
        **{f'the code in {name}': digest for name, digest in code()},
    }


def in_words(value: object) -> str:
    return 'not set' if value is None else str(value) or 'empty'


def sums(file: str | None) -> str:
    """What is written beside a file, if something is."""
    with contextlib.suppress(OSError):
        return ' or '.join(digests.read_sums(Path(file))) if file else ''
    return ''


def code() -> Iterator[tuple[str, str]]:
    """This program's own files, and the beginning of the SHA-256 of each."""
    root = Path(__file__).parents[1]
    for path in sorted([*root.glob('*.py'), *root.glob('util/**/*.py')]):
        yield str(path.relative_to(root)), shortened(path.read_bytes())


def contents(data_path: Path, split: Split) -> str:
    """How many images, and the digest of their names below `data_path`, or of their pixels, of labels and classes."""
    labelled = b'' if split.labels is None else split.labels.tobytes()
    content = split.images.digest(data_path).encode() + labelled + repr(split.classes).encode()
    return f'{len(split.images)} images, digest {shortened(content)}'


def shortened(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]


def on_which(values: list[str | None]) -> str:
    """'0.001 on ranks 0-6, 0.002 on rank 7', of a value of each rank."""
    ranks: dict[str | None, list[int]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(value, []).append(rank)
    return ', '.join(f'{printable(value or "not set", 80)} on {spans(numbers)}' for value, numbers in ranks.items())


def spans(numbers: Iterable[int]) -> str:
    """'ranks 0-2, 5', of rising numbers."""
    rows = itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])
    parts = [[number for _, number in row] for _, row in rows]
    words = ', '.join('-'.join(map(str, dict.fromkeys((part[0], part[-1])))) for part in parts)
    return f'rank {words}' if words.isdecimal() else f'ranks {words}'
