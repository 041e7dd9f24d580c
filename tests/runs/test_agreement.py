"""Ranks agree before the first step: what they compare, what the line says, and that nothing is written before."""

import argparse
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from training import SHORT, train

from util import agreement
from util.data.datasets import Split
from util.data.stores import Files, Pixels
from util.errors import DisagreementError

CPU = torch.device('cpu')
DATA = 'what --data_path holds (images)'
ARGS = {'lr': 0.001, 'data_path': Path('/a/data'), 'num_workers': 2, 'amp_dtype': None, 'device': 'cpu', 'resume': ''}
FILES, LABELS = [f'/a/data/train/x/{i}.png' for i in range(3)], [0, 0, 1]


def facts(files=FILES, labels=LABELS, classes=(), **args) -> dict[str, str]:
    images = Pixels(files) if isinstance(files, np.ndarray) else Files(files)
    split = Split(images, np.array(labels), classes, [])
    return agreement.facts(argparse.Namespace(**ARGS | args), CPU, images=split)


def meet(monkeypatch, change) -> None:
    """Have this process meet seven others; `change` is what is other on the last one."""
    ranks = SimpleNamespace(active=lambda: True, barrier=lambda: None, gather=lambda mine: [mine] * 7 + [mine | change])
    monkeypatch.setattr(agreement, 'dist', ranks)


@pytest.mark.fault(41)
@pytest.mark.parametrize(
    ('other', 'names'),
    [
        ({'lr': 0.002}, ['--lr']),
        ({'added': 1}, ['--added']),
        ({'resume': 'a.pth'}, ['--resume']),
        ({'files': FILES[:2], 'labels': LABELS[:2]}, [DATA]),
        ({'files': [*FILES[:2], '/a/data/train/x/8.png']}, [DATA]),
        ({'files': FILES[::-1]}, [DATA]),
        ({'labels': [0, 1, 1]}, [DATA]),
        ({'labels': None}, [DATA]),
        ({'classes': ['x']}, [DATA]),
        # a disk of each machine, and what no number depends on
        ({'data_path': Path('/b'), 'files': [f.replace('/a/data', '/b') for f in FILES], 'num_workers': 0}, []),
        ({'device': 'cuda:3', 'given': ['lr']}, []),
    ],
)
def test_what_is_compared(other, names):
    mine, theirs = facts(), facts(**other)
    assert [name for name in mine | theirs if mine.get(name) != theirs.get(name)] == names


def test_pixels_in_memory_are_compared():
    pixels = np.zeros((2, 4, 4, 3), np.uint8)
    assert facts(pixels) == facts(pixels.copy()) != facts(pixels + 1)


def test_versions_and_code_are_compared():
    assert 'simplejpeg' in facts(decoder='simplejpeg')
    assert {'Python', 'torch', 'torchvision', 'timm', 'numpy', 'PIL', 'the code in util/agreement.py'} <= facts().keys()


@pytest.mark.fault(41)
@pytest.mark.parametrize('stage', ['pretrain', 'finetune'])
def test_nothing_is_overwritten(stage, images, tmp_path, monkeypatch):
    """And `--eval` compares too."""
    train(stage, images, tmp_path, *SHORT, '--epochs', '1', '--warmup_epochs', '0', '--batch_size', '32')
    before = {
        path.name: path.read_bytes() for path in tmp_path.glob('*.*t*') if path.name[:7] not in ('status.', 'console')
    }
    assert {'checkpoint-last.pth', 'log.txt'} <= before.keys()
    meet(monkeypatch, {'--lr': '0.002'})
    line = '^the ranks do not agree: --lr is 0.001 on ranks 0-6, 0.002 on rank 7$'
    with pytest.raises(DisagreementError, match=line):
        train(stage, images, tmp_path, *SHORT, '--batch_size', '32', '--resume', 'auto')
    if stage == 'finetune':
        with pytest.raises(DisagreementError, match=line):
            train(stage, images, tmp_path, '--lr', '1e-3', '--eval', '--resume', tmp_path / 'checkpoint-best.pth')
    assert all((tmp_path / name).read_bytes() == content for name, content in before.items())


def test_a_long_list_is_cut(monkeypatch):
    meet(monkeypatch, {f'fact {number}': 'x' * 200 for number in range(9)})
    with pytest.raises(DisagreementError) as caught:
        agreement.check(argparse.Namespace(**ARGS), CPU)
    assert str(caught.value).endswith('; and 4 more')
    assert len(str(caught.value)) < 1000


def test_ranges_of_ranks():
    assert agreement.spans([7]) == 'rank 7'
    assert agreement.spans([0, 1, 2, 5, 7, 8]) == 'ranks 0-2, 5, 7-8'
