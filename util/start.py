"""What a program does first: the mains import it before torch, which takes seconds."""

import os
import sys

from util import console

if sys.platform == 'win32':  # before anything is imported that Windows lacks
    console.say('Windows is not supported: use WSL2, where this runs as on Linux', error=True)
    raise SystemExit(2)

from util import signals

LAUNCHER = os.getppid()

console.settle()
if 'TORCHELASTIC_RUN_ID' in os.environ:  # torchrun
    signals.end_with_launcher(LAUNCHER)
