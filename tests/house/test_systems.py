"""Where the programs start: no module level needs what Linux alone has, and Windows ends in one line."""

import subprocess
import sys

from training import ROOT, environment

# what CPython documents as Linux's alone, or as missing on macOS, of the modules that the project imports
TAKE_AWAY = """
import ctypes, errno, os, signal, socket, sys, torch, torchvision, timm, submitit
from torch.utils.tensorboard import SummaryWriter
LINUX = {
    errno: 'EREMOTEIO EUCLEAN ENOTNAM ENAVAIL EISNAM EMEDIUMTYPE ENOMEDIUM EKEYEXPIRED EBADFD ERESTART ESTRPIPE ECOMM',
    signal: 'SIGPWR SIGSTKFLT SIGCLD SIGPOLL SIGRTMIN SIGRTMAX pthread_getcpuclockid sigtimedwait sigwaitinfo',
    os: 'sched_getaffinity sched_setaffinity posix_fallocate posix_fadvise O_TMPFILE O_DIRECT O_PATH O_NOATIME '
        'memfd_create getxattr setxattr splice eventfd pidfd_open copy_file_range fdatasync sendfile getrandom',
    socket: 'AF_NETLINK AF_VSOCK AF_ALG SO_BINDTODEVICE SOCK_CLOEXEC SOCK_NONBLOCK SO_PEERCRED TCP_USER_TIMEOUT',
}
for module, names in LINUX.items():
    for name in names.split():
        if hasattr(module, name):
            delattr(module, name)
"""


def python(program: str) -> subprocess.CompletedProcess:
    line = [sys.executable, '-c', f'import sys; sys.path.insert(0, {str(ROOT)!r})\n{program}']
    return subprocess.run(line, capture_output=True, text=True, timeout=300, env=environment(), cwd='/')


# in a child of the process, which has torch already: `import torch` is not what is tried
WINDOWS = """
if os.fork() == 0:
    sys.platform, sys.modules['fcntl'] = 'win32', None
    import main_finetune
print(os.waitstatus_to_exitcode(os.wait()[1]))
"""


def test_every_module_imports_without_what_linux_alone_has_and_windows_ends_in_one_line():
    files = [*ROOT.glob('*.py'), *ROOT.glob('util/**/*.py'), *ROOT.glob('scripts/*.py')]
    names = ['.'.join(f.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__') for f in files]
    names = sorted(name for name in names if name != 'scripts.make_digits')  # it needs what the tests alone do
    assert len(names) > 40
    program = f"sys.platform = 'darwin'\nimport importlib\nfor name in {names}: importlib.import_module(name)\n"
    program += 'from util import config; print(config.usable_cores() > 0)\n'
    program += 'from util.run_folder import alive; print(alive(1), alive(2**22 + 1))'
    done = python(TAKE_AWAY + WINDOWS + program)
    assert (done.returncode, done.stdout) == (0, '2\nTrue\nTrue False\n'), done.stderr
    assert done.stderr == 'Windows is not supported: use WSL2, where this runs as on Linux\n'
