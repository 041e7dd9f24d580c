"""Training under a real SLURM: preempted, requeued, out of time, cancelled or stuck, and the same bytes in the end.

`scripts/test.sh --slurm` brings up a cluster of eight virtual nodes on this machine (slurm_up.sh: Debian packages, as
root), takes it down again unless it was up before, and runs several of these tests at a time: they mostly wait.
"""

import contextlib
import json
import re
import signal
import time
from pathlib import Path

import pytest
from cluster import TWO_BY_TWO, Job
from training import equal_states, load, train

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(240)]
STOPPED = 'stopped on request at'
ONE_RANK = ['--batch_size', '16']  # which takes the steps of the four together
HERE = [*ONE_RANK, '--num_workers', '1', '--epochs', '3', '--warmup_epochs', '1', '--lr', '1e-3']


# --------------------------------------------------------------------------
# jobs that are interrupted


def test_undisturbed(undisturbed):
    last = undisturbed.result()
    assert (last['epoch'], last['step']) == (2, 12)
    assert 'on 4 x cpu' in undisturbed.log()
    assert undisturbed.places() == []
    assert (undisturbed.folder.stat().st_mode & 0o777) == 0o700


@pytest.mark.promise(8)
@pytest.mark.fault(38, 39)
def test_requeued_once_and_preempted_twice(slurm, undisturbed, measured):
    """Once in each epoch, with two loader workers per rank. That of the administrator bypasses submitit."""
    job = slurm.submit('headline', *TWO_BY_TWO, '--num_workers', '2')
    seconds = []
    for epoch, interrupt in enumerate([job.requeue, job.preempt, job.preempt]):
        life = epoch + 1
        job.hold(epoch, life)
        (job.folder / f'{job.id}_submitted.pkl.save_tmp').touch()  # of an earlier kill; submitit stumbles over it
        interrupt()
        began = time.monotonic()
        job.wait_for(STOPPED, life)
        seconds.append(time.monotonic() - began)
    assert equal_states(job.result(), undisturbed.result())
    log, places = job.log(), job.places()
    assert [place.partition(',')[0] for place in places] == ['epoch 0', 'epoch 1', 'epoch 2']
    assert log.count(f'Requeued job {job.id}') == 2
    assert job.field('Restarts') == '3'
    measured(
        f'2 nodes x 2 tasks with 2 loader workers each, requeued by the administrator once and preempted twice, in one '
        f'real SLURM job: stopped {max(seconds):.1f} s after the order at the latest, at {"; ".join(places)}, and '
        f'resumed there: 0 of 36 steps lost, 0 done twice; weights, optimizer and running averages the same bytes'
    )


@pytest.mark.fault(22)
def test_some_ranks_are_asked_for_another_thing(slurm, undisturbed, measured):
    """SIGUSR2 to rank 1 only; SIGUSR2 to rank 3, SIGTERM to the others; SIGTERM while the job queues itself again."""
    job = slurm.submit('one-rank', *TWO_BY_TWO)
    job.hold(epoch=0)
    job.signal(signal.SIGUSR2, rank=1)
    job.signal(signal.SIGCONT)
    job.wait_for(STOPPED)
    job.hold(epoch=1, life=2)
    job.signal(signal.SIGUSR2, rank=3)
    for rank in (0, 1, 2):
        job.signal(signal.SIGTERM, rank)
    job.signal(signal.SIGCONT)
    job.wait_for(STOPPED, life=2)
    job.signal(signal.SIGTERM)
    assert equal_states(job.result(), undisturbed.result())
    places = job.places()
    assert len(places) == 2
    assert job.log().count(f'Requeued job {job.id}') == 2
    measured(f'SIGUSR2 to one rank of four: stopped at {places[0]}; with SIGTERM to the others at {places[1]}')


def test_requeued_by_the_administrator_while_it_queues_itself(slurm, undisturbed):
    """SLURM then refuses the second of the two requests, and the job goes on nevertheless."""
    job = slurm.submit('both', *TWO_BY_TWO)
    job.hold(epoch=1)
    job.signal(signal.SIGUSR2)
    job.requeue()
    assert equal_states(job.result(), undisturbed.result())
    assert len(job.places()) == 1
    assert 'Traceback' not in job.log()


@pytest.mark.promise(8)
@pytest.mark.timeout(360)
def test_time_limit(slurm, undisturbed, measured):
    # SLURM looks every 30 s whether a limit will be near before it looks again: this is a signal after 85 to 115 s,
    # when four tasks have started on the busiest machine
    job = slurm.submit('limit', *TWO_BY_TWO, '--timeout', '2', '--signal_delay_s', '5')
    job.hold(epoch=0)
    job.wait_for(STOPPED, seconds=150)
    assert equal_states(job.result(), undisturbed.result())
    assert f'Requeued job {job.id} (999 remaining timeouts)' in job.log()
    [place] = job.places()
    measured(f'a real time limit on the same job: stopped at {place}, resumed there; the same bytes')


@pytest.mark.fault(38)
def test_out_of_requeues(slurm):
    """submitit counts SIGUSR2 as a time limit in the last ten minutes of a job: here always."""
    job = slurm.submit('often', '--timeout', '10', '--max_requeues', '1', *ONE_RANK)
    for life in (1, 2):
        job.hold(epoch=life - 1, life=life)
        job.signal(signal.SIGUSR2)
        job.signal(signal.SIGCONT)
        job.wait_for(STOPPED, life)
    job.wait_for_state('FAILED')
    assert job.field('ExitCode') == '75:0'
    [line] = [line for line in job.log().splitlines() if line.startswith(f'job {job.id} ')]
    assert f'job {job.id} is not queued again: its --max_requeues 1 are used up; to resume, ' in line
    assert 'Traceback' not in job.log()
    go_on = line.partition('submit it with ')[2].split()
    again = slurm.submit('often-again', *go_on, *ONE_RANK)
    again.wait_for_state('COMPLETED')
    assert equal_states(load(job.folder), train('pretrain', slurm.data, slurm.folder / 'often-whole', *HERE))


def test_array_of_seeds_one_of_them_preempted(slurm, measured):
    flags = ['--seeds', '0', '1', '--job_dir', slurm.folder / 'seeds', *ONE_RANK, '--cpus_per_task', '2']
    done = slurm.launch(*flags)
    assert done.returncode == 0, done.stderr
    ids = re.findall(r'^job (\d+_\d): pretrain seed\d$', done.stdout, re.MULTILINE)
    jobs = [Job(slurm, number, slurm.folder / 'seeds' / number) for number in ids]
    assert [f'  folder {job.folder}' in done.stdout for job in jobs] == [True, True]
    jobs[1].hold(epoch=1)
    (jobs[1].folder / f'{ids[1]}_0_result.pkl.save_tmp').touch()  # of an earlier kill; submitit stumbles over it
    jobs[1].preempt()
    for seed, job in enumerate(jobs):
        whole = train('pretrain', slurm.data, slurm.folder / f'seed{seed}', *HERE, '--seed', seed)
        assert equal_states(job.result(), whole)
        assert job.field('Restarts') == str(seed)
        assert len(job.places()) == seed
    assert not equal_states(*(job.result() for job in jobs))
    measured(f'job {ids[1]} of an array preempted: stopped at {jobs[1].places()[0]}; both end with the same bytes')


def test_cancelled_then_submitted_again(slurm, undisturbed, measured):
    job = slurm.submit('cancelled', *TWO_BY_TWO)
    job.hold(epoch=1)
    slurm.ask('scancel', job.id)
    job.wait_for_state('CANCELLED')
    job.wait_for(STOPPED)
    job.wait_for_end()
    saved = load(job.folder)
    assert saved['epoch'] == 1
    assert 3 <= saved['step'] <= 5
    again = slurm.submit('cancelled', *TWO_BY_TWO, '--resume', 'auto')
    assert equal_states(again.result(), undisturbed.result())
    assert f'at epoch 1, step {saved["step"]} of 12' in again.log()
    measured(f'cancelled: saved at step {saved["step"]} of epoch 1; submitted again; same bytes')


# --------------------------------------------------------------------------
# ranks that are lost


@pytest.mark.promise(9)
@pytest.mark.fault(17)
def test_killed_rank_ends_the_job(slurm, undisturbed, measured):
    """The job is over within seconds; requeued, it goes on from the last checkpoint."""
    job = slurm.submit('killed', *TWO_BY_TWO, '--save_freq_steps', '2')
    job.wait_for('Epoch: [1] [ 3/12]')
    began = time.monotonic()
    job.signal(signal.SIGKILL, rank=1)
    job.wait_for_state('FAILED', seconds=30)
    seconds = time.monotonic() - began
    job.wait_for_end()
    saved = load(job.folder)
    check_last_words(job)
    assert saved['epoch'] == 1
    job.requeue()
    assert equal_states(job.result(), undisturbed.result())
    assert f'checkpoint-last.pth at epoch 1, step {saved["step"]} of 12' in job.life(2)
    measured(f'rank 1 of 4 gets SIGKILL under SLURM: the job has failed after {seconds:.1f} s')


@pytest.mark.promise(9)
@pytest.mark.fault(18)
def test_stuck_rank_ends_the_job(slurm, measured):
    job = slurm.submit('stuck', '--ngpus', '2', '--dist_timeout', '5', '--epochs', '50')
    job.wait_for('Epoch: [1] [ 3/24]')
    began = time.monotonic()
    job.signal(signal.SIGSTOP, rank=1)
    job.wait_for_state('FAILED', seconds=5 + 30)
    seconds = time.monotonic() - began
    job.wait_for_end()
    measured(f'rank 1 of 2 hangs under SLURM, --dist_timeout 5: the job has failed after {seconds:.1f} s')
    check_last_words(job)


def check_last_words(job: Job) -> None:
    """A line names the lost rank, and status.json has the exit code; that of the job is srun's."""
    [line] = [line for line in job.log().splitlines() if 'error: rank 0: ' in line]
    assert ' rank 1 (host ' in line
    assert json.loads((job.folder / 'status.json').read_text())['exit_code'] == 6


# --------------------------------------------------------------------------
# mistakes


@pytest.mark.fault(36, 37)
def test_impossible_requests(slurm):
    """SLURM's own words where it refuses them; its reason where it only lets the job wait."""
    for flags, words in (
        (['--nodes', '9'], 'Node count specification invalid'),
        (['--timeout', '100800'], 'Requested time limit is invalid (missing or exceeds some limit)'),
        (['--partition', 'nowhere'], 'invalid partition specified: nowhere'),
        (['--ngpus', '9', '--device', 'cuda'], 'Requested node configuration is not available'),
    ):
        done = slurm.launch('--job_dir', 'impossible', *flags)
        assert (done.returncode, done.stdout) == (2, '')
        [line] = done.stderr.splitlines()
        assert 'error: SLURM refused: sbatch: error: ' in line
        assert words in line

    with limits_not_enforced(slurm):
        for flags, reason in (['--nodes', '9'], 'PartitionNodeLimit'), (['--timeout', '100800'], 'PartitionTimeLimit'):
            done = slurm.launch('--job_dir', 'impossible', *flags)
            number = re.match(r'job (\d+):', done.stdout)[1]
            assert slurm.ask('squeue', '-h', '-j', number, '-o', '%T') == 'PENDING\n'
            [line] = done.stderr.splitlines()
            assert line == f'run_with_submitit.py: error: job {number} will not start: {reason}; scancel {number}'
            assert done.returncode == 2
            slurm.ask(*line.rpartition('; ')[2].split())


@contextlib.contextmanager
def limits_not_enforced(slurm):
    file = Path(slurm.environment['SLURM_CONF'])
    text = file.read_text()
    file.write_text(text.replace('EnforcePartLimits=ALL', 'EnforcePartLimits=NO'))
    slurm.ask('scontrol', 'reconfigure')
    yield
    file.write_text(text)
    slurm.ask('scontrol', 'reconfigure')


def test_gpus_are_asked_for_and_missed_in_one_line(slurm):
    """The cluster's GPUs are only numbers: the job gets two, and finds none."""
    job = slurm.submit('gpus', '--ngpus', '2', '--device', 'cuda')
    assert job.field('TresPerNode').endswith('gpu:2')
    job.wait_for_state('FAILED')
    assert 'main_pretrain.py: error: --device cuda: no GPU is visible; use --device cpu' in job.log().splitlines()
    assert 'Traceback' not in job.log()
