"""torchrun's own restarts (`--max-restarts`) after a rank was killed, with another rank that is late."""

import json
import os
import signal
import subprocess

import pytest
from training import SHORT, command, environment, equal_states, load, processes_of, read_until, run

RESTARTS = 10
FLAGS = [*SHORT, '--batch_size', '4', '--save_freq_steps', '1']
pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]


@pytest.mark.fault(24)
@pytest.mark.skipif(os.environ.get('KILLS', '200') == '10', reason='a series of ten restarts is for releases')
def test_elastic_restarts(images, tmp_path):
    assert run('pretrain', images, tmp_path / 'whole', *FLAGS, ranks=2).returncode == 0
    whole, worked = load(tmp_path / 'whole'), 0
    for i in range(RESTARTS):
        folder = tmp_path / f'run {i}'
        flags, script = [*FLAGS, '--resume', 'auto'], 'tests/faults/slow_rank.py'
        line = command('pretrain', images, folder, *flags, ranks=2, script=script, torchrun=True)
        line[line.index('--nproc_per_node=2') + 1] = '--standalone'  # in place of a fixed port
        line.insert(line.index('--standalone'), '--max_restarts=1')
        process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment())
        read_until(process, '[5/8]')
        os.kill(json.loads((folder / '.ranks' / '0.json').read_text())['pid'], signal.SIGKILL)
        out, _ = process.communicate(timeout=80)
        assert process.returncode == 0, out[-3000:]
        assert 'resumed from ' in out
        worked += equal_states(load(folder), whole)
        assert not processes_of(folder)
    assert worked == RESTARTS
