"""Shared by all tests: the repository on the path, one thread, and lines that a test wants to be read at the end."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]
torch.set_num_threads(1)


@pytest.fixture
def measured(request):
    """Call it with a line; all lines are printed after the test run, whichever process the test ran in."""
    return lambda line: request.node.user_properties.append(('measured', line))


def pytest_terminal_summary(terminalreporter):
    reports = [report for kind in ('passed', 'failed') for report in terminalreporter.stats.get(kind, [])]
    lines = [line for report in reports if report.when == 'call' for _, line in report.user_properties]
    if lines:
        terminalreporter.section('measured')
        for line in lines:
            terminalreporter.write_line(line)
