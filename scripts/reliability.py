"""Print docs/reliability.md: what the tests measured of each promise, and how each fault showed itself.

bash scripts/test.sh --records records.jsonl
bash scripts/test.sh --slurm --records records.jsonl
bash scripts/test.sh --faults --records records.jsonl
python scripts/reliability.py records.jsonl > docs/reliability.md
"""

import argparse
import json
import re
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from util.errors import MEANING, UserError, run_main

PROMISES = {
    1: ('A resumed run equals an uninterrupted one', 'nothing random depends on history: `util/rng.py`'),
    2: ('No sample is lost or doubled', "a sample's place follows from seed and epoch: `util/datasets.py`"),
    3: ('The number of ranks may change', 'one global batch, solved for accumulation: `--effective_batch_size`'),
    4: ('A kill at any instant leaves a checkpoint that loads', 'temporary file, flush, rename: `util/digests.py`'),
    5: ('Damage is noticed, and the run falls back', 'SHA-256 beside each file; the newest good one is taken'),
    6: ('A full disk loses nothing', 'old files go when new ones are whole; `checkpoint-previous.pth`'),
    7: ('`--keep_last` never removes the last good file', 'good ones are counted, the best and the resumed-from kept'),
    8: ('Preemption and time limit lose no step', 'signals set a flag; ranks agree on the step: `util/signals.py`'),
    9: ('A dead or stuck rank ends the job and is named', 'signs of life in `.ranks/`: `util/run_folder.py`'),
    10: (
        'Steps that are not finite are left out, then stop it',
        'decided on the device: `GuardedStep`; `--max_bad_steps`',
    ),
    11: ('Bad images are named, or left out and counted', '`--bad_images`, `--max_bad_images`, `--max_pixels`'),
    12: ('Loading a checkpoint runs no code', 'a reader for plain data alone: `util/unpickle.py`'),
    13: ('One writer per folder', 'a lock that ends with its process: `.lock`'),
    14: ('Logs stay readable after restarts', 'what the run goes over again is dropped: `util/log.py`'),
}
FAULTS = {
    'Checkpoint files': {
        1: 'empty file',
        2: 'cut short',
        3: 'one flipped bit',
        4: 'a web page, or noise, under .pth',
        5: 'a pickle that calls functions',
        6: 'a checkpoint with objects (Namespace, PosixPath)',
        7: 'another architecture',
        8: 'missing or unexpected keys',
        9: '--resume: no such file, a folder, unreadable',
        10: 'a folder with unfinished files only',
        11: 'a newer schema than the code',
        12: 'resumed with other settings',
    },
    'Storage': {
        13: 'disk full, file too large',
        14: 'read-only folder',
        15: 'SIGKILL in the middle of a save',
        16: 'two runs in one folder',
    },
    'Processes': {
        17: 'SIGKILL of a rank',
        18: 'a stuck rank',
        19: 'an exception on one rank',
        20: 'a request to stop, anywhere',
        21: 'a second SIGTERM during the save',
        22: 'SIGTERM during SIGUSR2; SIGUSR2 to one rank',
        23: 'a loader process killed, stuck, or gone',
        24: 'elastic restart with a slow rank',
        25: 'port in use',
    },
    'Numbers': {26: 'not a number, infinity', 27: 'a learning rate of 1e9'},
    'Data': {
        28: 'truncated, empty, no image at all',
        29: 'unusual formats, modes and shapes',
        30: '16-bit images',
        31: 'EXIF: broken, rotated',
        32: 'decompression bombs',
        33: 'empty classes, too few images, other classes',
        34: 'links in a circle, odd names, no permission',
        35: 'a path that vanishes',
    },
    'SLURM': {
        36: 'impossible requests',
        37: 'a job that will never start',
        38: 'preempted, requeued, out of time limits',
        39: "leftovers of submitit's",
    },
}

HEAD = """# What is promised of a run, and what was measured

Printed by `scripts/reliability.py` from what the tests recorded; not written by hand. Everything was run on CPU, with
gloo, on one machine of two cores; NCCL and CUDA were not.
"""
CODES = """
## How a run ends

The exit code says what kind of end it was. torchrun ends with 1 whatever its processes return, so `status.json` in the
output folder says the same: `state` (running, done, stopped, failed), `exit_code`, `message`, rank, epoch, step, host.

| code | meaning |
|---|---|
"""
FAULTS_HEAD = """
## Faults

The line that the user sees, the exit code of the process that meets the fault, and what is on the disk afterwards.
Lines are shortened where they end in `...`; cases of one fault that showed themselves alike share a row.
"""
REST = """
## Limits

- Sockets of torch (its store, gloo, NCCL) know no authentication and listen on all interfaces: trusted networks only.
- A job's folder holds pickles that the job executes: the launcher makes it private and refuses one that others can
  write to. Checkpoints and images may come from anywhere; recipes and job folders may not.
- Where a file system has no locks, two runs in one folder are not noticed; the run says so when it begins.
- A stuck rank is killed by the others on its own machine only; on others, the launcher's own patience holds.
- A request to stop that comes during an evaluation is obeyed after it. The epoch's training is saved before it.
- BatchNorm across processes on CPU keeps each process's own statistics; rank 0's are saved.

## Where the tests are

| layer | command | what |
|---|---|---|
| unit and process | `bash scripts/test.sh` | everything but what follows |
| SLURM | `bash scripts/test.sh --slurm` | a real SLURM on this machine: preempted, requeued, out of time, stuck |
| faults | `bash scripts/test.sh --faults` | 200 random kills (`KILLS=10` for ten), elastic restarts; before a release |
"""


def read(files: list[Path]) -> tuple[dict[int, list[str]], dict[int, list[dict]]]:
    """Figures of each promise and records of each fault, each once, the latest run of a test alone."""
    by_test: dict[str, list[dict]] = {}
    for file in files:
        try:
            records = [json.loads(line) for line in file.read_text(encoding='utf-8').splitlines()]
        except (OSError, ValueError) as error:
            raise UserError(f'{file}: not the records of a test run: {error}') from error
        fresh = defaultdict(list)
        for record in records:
            fresh[record['test']].append(record)
        by_test |= fresh
    promises, faults = defaultdict(list), defaultdict(list)
    for record in (record for records in by_test.values() for record in records):
        if not record['passed']:
            raise UserError(f'{record["test"]} has failed: no figures without it')
        if 'promise' in record:
            promises[record['promise']['number']].append(record['promise']['figure'])
        else:
            faults[record['fault']['number']].append(record['fault'])
    return promises, faults


def cell(text: object) -> str:
    return ' '.join(str(text).replace('|', '\\|').split())


def table(head: str, rows: list[tuple]) -> str:
    names = head.split(', ')
    lines = [names, ['---'] * len(names), *rows]
    return '\n'.join(f'| {" | ".join(map(cell, line))} |' for line in lines) + '\n'


def page(promises: dict[int, list[str]], faults: dict[int, list[dict]]) -> str:
    rows = [
        (number, promise, how, '; '.join(dict.fromkeys(promises[number])) or '**not measured**')
        for number, (promise, how) in PROMISES.items()
    ]
    text = HEAD + '\n' + table('#, promise, how, measured', rows)
    text += CODES + '\n'.join(f'| {code} | {meaning} |' for code, meaning in MEANING.items()) + '\n' + FAULTS_HEAD
    for group, members in FAULTS.items():
        rows = [row for number, name in members.items() for row in fault_rows(number, name, faults[number])]
        text += f'\n### {group}\n\n' + table('#, fault, the line, code, on the disk', rows)
    return text + REST


def fault_rows(number: int, name: str, records: list[dict]) -> list[tuple]:
    """A row for all cases of a fault that showed themselves alike."""
    if not records:
        return [(number, name, '**not tried**', '', '')]
    alike = defaultdict(list)
    for record in records:
        alike[shown(record['line']), record['code'], record['left']].append(record['case'])
    return [
        (number, f'**{name}**: {"; ".join(dict.fromkeys(cases))}', f'`{line}`', code, left)
        for (line, code, left), cases in alike.items()
    ]


def shown(line: str) -> str:
    """Without the program's name, the folders of the tests, and what is beyond 300 letters."""
    line = re.sub(r'^\S+: error: ', '', line)
    line = re.sub(r'/\S*/pytest-\d+/(popen-gw\d+/)?[^/\s]+/', '', line)
    return line if len(line) <= 300 else f'{line[:300]}...'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('records', nargs='+', type=Path, help='what --records of the tests has written')
    print(page(*read(parser.parse_args().records)), end='')


if __name__ == '__main__':
    run_main(main)
