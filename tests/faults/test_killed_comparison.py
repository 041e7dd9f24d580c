"""A comparison that is killed, and then stopped, finds what one finds that nobody disturbed."""

import json
import signal
import subprocess
import sys
import time

import pytest
from training import ROOT, environment

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]
FLAGS = (
    '--methods a=mirl:depth=4,num_segments=2 --budget epochs 40 --points 2 --finetune_points 1 --seeds 0 --labels 0.5 '
    '--finetune_epochs 20 --num_workers 0 --device cpu'
)
TIMES = {'minutes', 'images_per_s', 'memory', 'commands'}  # and what has the folder's name


def begun(images, folder):
    argv = [sys.executable, 'scripts/compare.py', '--data_path', images, '--output_dir', folder, *FLAGS.split()]
    return subprocess.Popen([str(word) for word in argv], cwd=ROOT, env=environment())


def wait_for(process, log, lines):
    """Until a run has ended so many epochs."""
    while not log.exists() or len(log.read_text().splitlines()) < lines:
        assert process.poll() is None
        time.sleep(0.02)


def without_times(value):
    match value:
        case dict():
            return {key: without_times(inner) for key, inner in value.items() if key not in TIMES}
        case list():
            return [without_times(inner) for inner in value]
    return value


def test_killed_and_stopped(images, tmp_path):
    assert begun(images, tmp_path / 'undisturbed').wait() == 0
    folder = tmp_path / 'disturbed'
    pretrain = folder / 'runs/a/seed-0/pretrain'

    killed = begun(images, folder)
    wait_for(killed, pretrain / 'log.txt', 3)
    killed.kill()
    killed.wait()
    stopped = begun(images, folder)  # at once, while the killed one's program still saves
    wait_for(stopped, pretrain.parent / 'epoch-40/labels-0.5/log.txt', 2)
    stopped.send_signal(signal.SIGTERM)
    assert stopped.wait() == 75
    assert not json.loads((folder / 'results.json').read_text())['finished']
    assert begun(images, folder).wait() == 0

    begun_runs = [line for line in (pretrain / 'console.txt').read_text().splitlines() if line.startswith('# ')]
    assert len(begun_runs) == 2
    found = [json.loads((tmp_path / name / 'results.json').read_text()) for name in ('undisturbed', 'disturbed')]
    assert all(result['finished'] for result in found)
    assert without_times(found[0]['methods']) == without_times(found[1]['methods'])
