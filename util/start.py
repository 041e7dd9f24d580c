"""What a program does first: the mains import it before torch, which takes seconds."""

import os

from util import console, signals

LAUNCHER = os.getppid()

console.settle()
if 'TORCHELASTIC_RUN_ID' in os.environ:  # torchrun
    signals.end_with_launcher(LAUNCHER)
