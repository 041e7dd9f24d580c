"""What the tests on a GPU share: the GPU, without which they end in one line; exact arithmetic; errors told at once."""

import contextlib
import platform
import subprocess
from pathlib import Path

import pytest
import timm
import torch
from gpu.ready import lacking

DEVICE = 'cuda:0'
HERE = Path(__file__).parent
PLUGINS = []  # pytest's


def pytest_configure(config):
    PLUGINS[:] = [config.pluginmanager]


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent == HERE:
            item.add_marker(pytest.mark.gpu)


def pytest_collection_finish(session):
    """Of the tests that are left when the others are deselected."""
    if any(item.path.parent == HERE for item in session.items) and not torch.cuda.is_available():
        pytest.exit('\n'.join(lacking()), returncode=2)


@pytest.fixture
def device():
    return torch.device(DEVICE)


@pytest.fixture(autouse=True)
def settings():
    """Float32 products are float32's (TF32 has 10 bits); what a test or a run sets does not reach the next test."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False
    torch.compiler.reset()
    yield
    torch.cuda.set_sync_debug_mode('default')
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report):
    """Why a test failed, in one line as soon as it has: also in a log that is cut, or of tests that were stopped."""
    terminal = PLUGINS[0].get_plugin('terminalreporter')  # none in processes of pytest-xdist
    if report.failed and terminal and of_gpu(report):
        terminal.ensure_newline()
        terminal.write_line(f'FAILED {report.nodeid}: {why(report)}')


def why(report) -> str:
    """The error's first line."""
    crash = getattr(report.longrepr, 'reprcrash', None)
    return (crash.message if crash else str(report.longrepr)).strip().partition('\n')[0][:300]


def of_gpu(report) -> bool:
    return '/gpu/' in f'/{report.nodeid}'


def pytest_terminal_summary(terminalreporter, config):
    """Which GPU it was, and whether it works."""
    stats = terminalreporter.stats
    ours = [r for kind in ('passed', 'failed', 'error') for r in stats.get(kind, []) if of_gpu(r)]
    if hasattr(config, 'workerinput') or not ours:
        return
    failed = sorted({report.nodeid for report in ours if report.failed})
    gpu = torch.cuda.get_device_properties(DEVICE)
    terminalreporter.section('GPU')
    lines = [
        f'{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, capability {gpu.major}.{gpu.minor}, driver {driver()}',
        f'Python {platform.python_version()}, torch {torch.__version__}, CUDA {torch.version.cuda}, '
        f'cuDNN {torch.backends.cudnn.version()}, timm {timm.__version__}',
        f'{len({report.nodeid for report in ours}) - len(failed)} tests passed, {len(failed)} failed: '
        + ('this project does not work as it should here' if failed else 'this project works on this GPU'),
    ]
    for line in lines:
        terminalreporter.write_line(line)


def driver() -> str:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        query = ['nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader']
        return subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout.split()[0]
    return 'not known'
