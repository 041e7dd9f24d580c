"""Shared by all tests: the repository on the path, one thread, and what tests want to be read at the end."""

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
    promises = ''.join(f'promise {mark.args[0]}: ' for mark in request.node.iter_markers('promise'))
    return lambda line: request.node.user_properties.append(('measured', f'{promises}{line}'))


def pytest_terminal_summary(terminalreporter, config):
    if hasattr(config, 'workerinput'):  # a process of pytest-xdist; the first one has all reports
        return
    reports = [report for kind in ('passed', 'failed') for report in terminalreporter.stats.get(kind, [])]
    lines = [line for report in reports if report.when == 'call' for _, line in report.user_properties]
    if lines:
        terminalreporter.section('measured')
        for line in lines:
            terminalreporter.write_line(line)
