"""Shared by all tests: the repository on the path, one thread, and lines that a test wants to be read at the end."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]
torch.set_num_threads(1)

MEASURED: list[str] = []


@pytest.fixture
def measured():
    """Call it with a line; all lines are printed after the test run."""
    return MEASURED.append


def pytest_terminal_summary(terminalreporter):
    if MEASURED:
        terminalreporter.section('measured')
        for line in MEASURED:
            terminalreporter.write_line(line)
