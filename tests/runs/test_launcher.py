"""The launcher: what it refuses, what it says of a new job, folders of jobs, and local jobs from start to end."""

import argparse
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import cloudpickle
import pytest
from pairs import make_pairs
from submitit.core.utils import UncompletedJobError
from training import ROOT, SHORT, arguments, environment, equal_states, load, start, train

from scripts import run_with_submitit as launcher
from util.errors import UserError, run_main

LOCAL = [sys.executable, str(ROOT / 'scripts' / 'run_with_submitit.py'), 'pretrain', '--local', '--ngpus']


@pytest.mark.parametrize(
    ('line', 'words'),
    [
        ('', 'the following arguments are required: stage'),
        ('train', 'invalid choice'),
        ('pretrain --nodess 2', 'unknown argument --nodess; did you mean --nodes'),
        ('pretrain --epoch 2', 'unknown argument --epoch; did you mean --epochs'),
        ('pretrain --epochs many', '--epochs must be a whole number, got many'),
        ('pretrain --model mirl_vit_tinny', 'unknown --model mirl_vit_tinny; did you mean'),
        ('pretrain --config nowhere.yaml', 'there is no recipe nowhere.yaml'),
        ('finetune --array nowhere.yaml', 'there is no recipe nowhere.yaml'),
        ('pretrain --batch_size 0', '--batch_size must be at least 1'),
        ('pretrain', '--model NAME is needed; --model list shows them'),
        ('pretrain --model mirl_vit_tiny --nodes 2 --ngpus 4 --effective-batch-size 100', '= 512'),
        ('pretrain --model mirl_vit_tiny --device cuda:1', 'cuda or cpu'),
        ('pretrain --nodes 0', '--nodes must be at least 1'),
        ('pretrain --max_requeues -1', '--max_requeues must be at least 0'),
        ('pretrain --mem_gb -1', '--mem_gb must be more than 0'),
        ('pretrain --name a;b', '--name is made of letters'),
        ('pretrain --comment two\nlines', '--comment must be one line'),
        ('pretrain --timeout 2', 'not longer than --signal_delay_s 120'),
        ('pretrain --local --nodes 2', '--local is this machine alone'),
        ('pretrain --job_dir jobs/%u', '%j, the job id, is all'),
        ('pretrain --seeds 0 --seed 1', '--seeds sets --seed of each job'),
        ('pretrain --seeds 0 0', 'one name'),
        ('pretrain --array ....yaml', 'become folders'),
        ('pretrain --job_dir a\nb', '--job_dir must be one line'),
        ('segment --epochs 3', 'unknown argument --epochs'),
        (
            'detect --model mirl_vit_tiny --steps 9 --decay_steps 9',
            '--decay_steps must rise, to below --steps 9, got 9',
        ),
        ('segment --model mirl_vit_tiny --steps 9 --eval_freq 2', '--eval_freq 2 must divide --steps 9'),
        ('segment --model mirl_vit_tiny --steps 9 --warmup_steps 9', '--warmup_steps 9 must be less than --steps 9'),
    ],
)
def test_mistakes_end_before_anything_is_submitted(line, words):
    with pytest.raises(UserError) as caught:
        launcher.parse(line.split(' ') if line else [])
    assert words in str(caught.value)


@pytest.mark.fault(36)
def test_no_slurm_here(monkeypatch, capsys):
    monkeypatch.setenv('PATH', '')
    with pytest.raises(SystemExit) as caught:
        run_main(lambda: launcher.main(['pretrain', '--model', 'mirl_vit_tiny']))
    assert caught.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert 'error: no sbatch on PATH' in line


@pytest.mark.parametrize(
    ('shown', 'said'),
    [
        ('RUNNING None', 'RUNNING'),
        ('PENDING Resources', 'PENDING (Resources)'),
        ('PENDING AssocMaxJobsLimit', 'PENDING (AssocMaxJobsLimit)'),
        ('PENDING Priority\nRUNNING None\nRUNNING None', 'PENDING (Priority), RUNNING'),
        ('', 'squeue does not show it'),
    ],
)
def test_state_of_a_new_job(shown, said, fake_squeue, capsys):
    fake_squeue(shown)
    launcher.tell_state('12')
    assert capsys.readouterr().out == f'  state  {said}\n'


@pytest.mark.parametrize(
    'reason',
    [
        *['PartitionConfig', 'PartitionNodeLimit', 'BadConstraints', 'InvalidQOS', 'AccountNotAllowed', 'QOSMinNode'],
        *['AssocMaxNodePerJobLimit', 'QOSMaxWallDurationPerJobLimit', 'QOSMaxGRESPerJob', 'QOSMaxCpuPerNode'],
    ],
)
def test_job_that_will_not_start(reason, fake_squeue):
    fake_squeue(f'RUNNING None\nPENDING {reason}')
    with pytest.raises(UserError, match=f'^job 12 will not start: {reason}; scancel 12$'):
        launcher.tell_state('12_1')


@pytest.fixture
def fake_squeue(tmp_path, monkeypatch):
    """Call it with what squeue shall print of job 12."""
    monkeypatch.setattr(launcher, 'LOOK_S', 0)
    monkeypatch.setenv('PATH', str(tmp_path), prepend=':')

    arguments = '--noheader --jobs 12 --format %T %r'

    def install(text: str) -> None:
        (tmp_path / 'shown').write_text(text)
        (tmp_path / 'squeue').write_text(f'#!/bin/sh\n[ "$*" = "{arguments}" ] && cat {tmp_path}/shown\n')
        (tmp_path / 'squeue').chmod(0o700)

    return install


def test_a_job_id_is_checked():
    with pytest.raises(UserError, match='no job id'):
        launcher.tell_state('12;id')


def test_request_to_be_queued_again_that_is_not_granted(monkeypatch, capsys):
    """The main has saved, and calls submitit's handler, which raises."""
    monkeypatch.setenv('SUBMITIT_EXECUTOR', 'local')
    monkeypatch.setenv('SUBMITIT_LOCAL_JOB_ID', '7')

    def main(args):
        raise UncompletedJobError('timed-out too many times')

    job = launcher.Job('pretrain', argparse.Namespace(), argparse.Namespace(local=True, max_requeues=3))
    with pytest.raises(SystemExit) as caught:
        job.run(main, argparse.Namespace(output_dir='runs/x'))
    assert caught.value.code == 75
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith('job 7 is not queued again: its --max_requeues 3 are used up; ')
    assert line.endswith(', submit it with --output_dir runs/x --resume auto')


@pytest.mark.parametrize('word', ['segment', 'detect'])
def test_a_job_is_loaded_where_the_project_cannot_be_imported(word, tmp_path, monkeypatch):
    [options, args] = launcher.parse([word, '--local', '--model', 'mirl_vit_tiny', '--steps', '10'])
    cloudpickle.register_pickle_by_value(launcher)  # as that of a program that runs is
    try:
        job = cloudpickle.dumps(launcher.Job(word, *args.values(), options))
    finally:
        cloudpickle.unregister_pickle_by_value(launcher)
    monkeypatch.delenv('PYTHONPATH', raising=False)
    load = 'import pickle, sys; assert callable(pickle.load(sys.stdin.buffer))'
    subprocess.run([sys.executable, '-c', load], input=job, cwd=tmp_path, check=True)


def test_job_folder_is_ours_alone(tmp_path):
    umask = os.umask(0o002)
    try:
        assert launcher.private_folder(tmp_path / 'jobs' / '%j', several=False) == tmp_path / 'jobs' / '%j'
        assert stat.S_IMODE((tmp_path / 'jobs').stat().st_mode) == 0o700
        assert launcher.private_folder(tmp_path / 'jobs', several=True) == tmp_path / 'jobs' / '%j'
        (tmp_path / 'jobs').chmod(0o770)
        with pytest.raises(UserError, match='can be written by others'):
            launcher.private_folder(tmp_path / 'jobs' / '%j', several=False)
        with pytest.raises(UserError, match='can be written by others'):
            launcher.private_folder(tmp_path / 'other' / '%j' / '..' / '..' / 'jobs', several=True)
        (tmp_path / 'jobs').chmod(0o700)
        tmp_path.chmod(0o777)
        with pytest.raises(UserError, match='others could replace'):
            launcher.private_folder(tmp_path / 'jobs' / '%j', several=False)
    finally:
        os.umask(umask)


def test_jobs_of_an_array_have_folders_of_their_own(tmp_path):
    recipes = []
    for name, epochs in (('a', 5), ('b', 6)):
        recipes.append(tmp_path / f'{name}.yaml')
        recipes[-1].write_text(f'model: mirl_vit_tiny\nwarmup_epochs: 0\nepochs: {epochs}\n')
    line = ['pretrain', '--array', *map(str, recipes), '--seeds', '1', '2', '--output-dir', 'runs/x']
    options, jobs = launcher.parse(line)
    assert (options.stage, options.timeout) == ('pretrain', 4320)
    assert list(jobs) == ['a-seed1', 'a-seed2', 'b-seed1', 'b-seed2']
    assert jobs['b-seed2'].output_dir == Path.cwd() / 'runs' / 'x' / 'b-seed2'
    assert (jobs['b-seed2'].epochs, jobs['b-seed2'].seed, jobs['b-seed2'].device) == (6, 2, 'cuda')
    _, jobs = launcher.parse(['pretrain', '--model', 'mirl_vit_tiny', '--seeds', '1', '2', '--cpus_per_task', '3'])
    assert jobs['seed1'].num_workers == 3
    assert jobs['seed1'].output_dir is None  # the job's folder


@pytest.mark.fault(39)
def test_a_requeued_job_resumes(tmp_path, monkeypatch):
    monkeypatch.delenv('SLURM_RESTART_COUNT', raising=False)
    args = argparse.Namespace(output_dir=None, resume='other.pth')
    job = launcher.Job('pretrain', args, argparse.Namespace(local=True, max_requeues=1))
    assert vars(job.arguments(tmp_path)) == {'output_dir': tmp_path, 'resume': 'other.pth'}
    monkeypatch.setenv('SUBMITIT_EXECUTOR', 'local')
    monkeypatch.setenv('SUBMITIT_LOCAL_JOB_ID', '7')
    monkeypatch.setenv('SUBMITIT_FOLDER', str(tmp_path))
    (tmp_path / '7_submitted.pkl.save_tmp').touch()
    again = job.__submitit_checkpoint__()
    assert again.function is job
    assert not list(tmp_path.iterdir())
    assert job.arguments(tmp_path).resume == 'other.pth'  # there is nothing to resume yet
    (tmp_path / 'checkpoint-last.pth').touch()
    assert job.arguments(tmp_path).resume == 'auto'
    assert args.resume == 'other.pth'

    requeued_by_slurm = launcher.Job('pretrain', args, argparse.Namespace(local=False, max_requeues=1))
    monkeypatch.setenv('SLURM_RESTART_COUNT', '1')
    assert requeued_by_slurm.arguments(tmp_path).resume == 'auto'


# --------------------------------------------------------------------------
# jobs that run here


@pytest.mark.faults  # submitit looks at its jobs every half minute
def test_local_job_is_requeued(images, tmp_path):
    """SIGUSR2 in the third step, as ahead of a time limit: submitit starts the job again, which resumes."""
    folder = tmp_path / 'job'
    process = start([*LOCAL, '1', '--job-dir', str(folder), *arguments(images, folder, *SHORT)])
    while not (logs := [log for log in folder.glob('*_0_log.out') if '[3/8]' in log.read_text()]):
        assert process.poll() is None
        time.sleep(0.02)
    [file] = logs
    job = int(file.name.partition('_')[0])
    os.kill(int(Path(f'/proc/{job}/task/{job}/children').read_text()), signal.SIGUSR2)
    _, err = process.communicate(timeout=180)
    assert (process.returncode, err) == (0, '')
    log = file.read_text()
    assert f'Requeued job {job} ' in log
    assert 'checkpoint-last.pth at epoch 0, step ' in log
    assert equal_states(load(folder), train('pretrain', images, tmp_path / 'whole', *SHORT))


@pytest.mark.faults
def test_local_segmentation(tmp_path):
    """Two ranks. Both leave their results to submitit, without which the launcher would call the job failed."""
    pairs = make_pairs(tmp_path / 'pairs')
    flags = arguments(pairs, tmp_path / 'run', '--steps', '2', '--eval_freq', '2', '--batch_size', '2', '--seeds', '1')
    line = [*LOCAL[:2], 'segment', '--local', '--ngpus', '2', '--job-dir', str(tmp_path / 'jobs'), *flags]
    done = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert 'segment seed1' in done.stdout
    assert len(list((tmp_path / 'jobs').rglob('*_result.pkl'))) == 2
    saved = load(tmp_path / 'run' / 'seed1')
    assert (saved['run']['stage'], saved['run']['effective_batch'], saved['run']['seed']) == ('segment', 4, 1)
