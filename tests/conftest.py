"""Shared by all tests: one thread, a folder of images, and lines to read at the end."""

import os
import signal

import pytest

from util import signals

os.environ['OMP_NUM_THREADS'] = '1'  # before torch is imported, which pytest-xdist's first process never needs
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) == signal.SIG_IGN:  # a shell's background, nohup: the tests and their runs obey
        signal.signal(number, handler)
        signals.IGNORED.remove(number)


@pytest.fixture(scope='session')
def images(tmp_path_factory):
    """66 training images and 15 others of three classes. Tests that change files take a copy."""
    from training import make_images

    return make_images(tmp_path_factory.mktemp('images'))


@pytest.fixture
def measured(request):
    """Call it with a line; all lines are printed after the test run, whichever process the test ran in."""
    promises = [f'promise {", ".join(map(str, mark.args))}: ' for mark in request.node.iter_markers('promise')]
    return lambda line: request.node.user_properties.append(('measured', ''.join([*promises, line])))


def pytest_terminal_summary(terminalreporter, config):
    if hasattr(config, 'workerinput'):  # a process of pytest-xdist; the first one has all reports
        return
    reports = [report for kind in ('passed', 'failed') for report in terminalreporter.stats.get(kind, [])]
    lines = [line for report in reports if report.when == 'call' for _, line in report.user_properties]
    if lines:
        terminalreporter.section('measured')
        for line in lines:
            terminalreporter.write_line(line)
