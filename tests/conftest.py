"""Shared by all tests: the repository on the path, one thread, and what tests want to be read at the end."""

import json
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


@pytest.fixture
def promise(request, measured):
    """`promise(number, figure)`: what was measured of a promise in docs/reliability.md."""

    def record(number: int, figure: str) -> None:
        request.node.user_properties.append(('promise', {'number': number, 'figure': figure}))
        measured(f'promise {number}: {figure}')

    return record


@pytest.fixture
def fault(request):
    """`fault(number, case, line, code, left)`: how a fault in docs/reliability.md showed, and what the disk kept."""

    def record(number: int, case: str, line: str, code: int, left: str) -> None:
        shown = {'number': number, 'case': case, 'line': line, 'code': code, 'left': left}
        request.node.user_properties.append(('fault', shown))

    return record


def pytest_addoption(parser):
    parser.addoption('--records', type=Path, help='append what promises and faults showed to this file, as JSON lines')


def pytest_terminal_summary(terminalreporter, config):
    if hasattr(config, 'workerinput'):  # a process of pytest-xdist; the first one has all reports
        return
    reports = [report for kind in ('passed', 'failed') for report in terminalreporter.stats.get(kind, [])]
    shown = [(*pair, report) for report in reports if report.when == 'call' for pair in report.user_properties]
    if any(kind == 'measured' for kind, _, _ in shown):
        terminalreporter.section('measured')
        for line in (value for kind, value, _ in shown if kind == 'measured'):
            terminalreporter.write_line(line)
    if config.option.records:
        with open(config.option.records, 'a', encoding='utf-8') as file:
            for kind, value, report in shown:
                if kind != 'measured':
                    file.write(json.dumps({kind: value, 'test': report.nodeid, 'passed': report.passed}) + '\n')
