"""What a user can do wrong, told in one line. The entry points print it and end with exit code 2."""

import os
import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake in arguments, data or files; the message says what is wrong and what would be right."""


class CheckpointError(UserError):
    """A checkpoint file that is missing, damaged, unsafe, or of another architecture."""


AT_THE_END: list[Callable[[int], None]] = []  # called with the exit code, after everything else


def run_main(main: Callable[[], None]) -> None:
    """Run an entry point: a `UserError` becomes one line on stderr, once on each machine, and exit code 2."""
    try:
        main()
        end(0)
    except SystemExit as stop:
        end(stop.code)
        raise
    except UserError as error:
        if os.environ.get('LOCAL_RANK', os.environ.get('SLURM_LOCALID', '0')) == '0':
            print(f'{os.path.basename(sys.argv[0])}: error: {" ".join(str(error).split())}', file=sys.stderr)
        raise SystemExit(2) from None


def end(code: int) -> None:
    for function in AT_THE_END:
        function(code)
