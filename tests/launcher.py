"""Stands in for torchrun: `launcher.py RANKS PORT PROGRAM ...` forks the ranks, which need to import nothing then.

With one rank it does no more than wait for it.
"""

import atexit
import importlib
import os
import runpy
import sys

import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from util import start


def program(*argv: str) -> None:
    sys.argv[:] = argv
    torch.set_num_threads(1)  # in one thread: of a pool that was forked, several at once might find none
    importlib.reload(start)  # what a program does first
    try:
        runpy.run_path(argv[0], run_name='__main__')
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves them out


if __name__ == '__main__':
    ranks, port, *argv = sys.argv[1:]
    if ranks == '1':
        if os.fork():
            os.wait()
        else:
            program(*argv)
    else:  # torchrun's own agent
        static = dict(rdzv_backend='static', rdzv_endpoint=f'127.0.0.1:{port}', rdzv_configs={'rank': 0, 'timeout': 60})
        config = LaunchConfig(1, 1, int(ranks), max_restarts=0, start_method='fork', **static)
        elastic_launch(config, program)(*argv)
