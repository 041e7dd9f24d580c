"""Memory, shared memory, open files, sockets and SLURM's node list: one line each, with advice that works."""

import argparse
import contextlib
import errno
import json
import multiprocessing
import os
import pickle
import re
import resource
import signal
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
from tensorboard.compat.tensorflow_stub.io.gfile import LocalFileSystem
from training import SHORT, arguments, load, server, train

import engine_finetune
import engine_pretrain
import main_finetune
from scripts import run_with_submitit as launcher
from scripts import visualize
from util import build, checkpoint, dist, optim, resources, signals
from util.data import augment, datasets
from util.errors import ResourceError, RunError, UserError
from util.run import Run
from util.weights import read_checkpoint

GPU = (
    'CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.15 GiB of which 1.21 GiB is free.'
    ' Including non-PyTorch memory, this process has 77.90 GiB memory in use.'
)


@pytest.mark.parametrize(
    ('error', 'what'),
    [
        (torch.OutOfMemoryError(GPU), 'GPU memory'),
        (RuntimeError('CUDA error: out of memory\nCUDA kernel errors might be ...'), 'GPU memory'),
        (RuntimeError('CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`'), 'GPU memory'),
        (RuntimeError('cuDNN error: CUDNN_STATUS_ALLOC_FAILED'), 'GPU memory'),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."), 'memory'),
        (RuntimeError('std::bad_alloc'), 'memory'),
        (RuntimeError("can't start new thread"), 'memory'),
        (RuntimeError('unable to mmap 9 bytes from file <a.safetensors>: Cannot allocate memory (12)'), 'memory'),
        (RuntimeError('unable to mmap 9 bytes from file </torch_1_2_3>: Cannot allocate memory (12)'), 'memory'),
        (MemoryError(), 'memory'),
        (OSError(errno.ENOMEM, 'Cannot allocate memory'), 'memory'),
        (RuntimeError('unable to write to file </torch_1_2_3>: No space left on device (28)'), 'shared memory'),
        (RuntimeError('unable to allocate shared memory(shm) for file </torch_1_2_3>: Success (0)'), 'shared memory'),
        (RuntimeError('unable to open shared memory object </torch_1> ...: Too many open files (24)'), 'open files'),
        (RuntimeError('received 0 items of ancdata'), 'open files'),
        (OSError(errno.EMFILE, 'Too many open files'), 'open files'),
        (OSError('Caught OSError in DataLoader worker process 0.\n[Errno 24] Too many open files'), 'open files'),
        (RuntimeError('mat1 and mat2 shapes cannot be multiplied'), ''),
        (OSError(errno.EAGAIN, 'Resource temporarily unavailable'), ''),
        (OSError('out of memory when reading image file'), ''),  # Pillow's, of a damaged file
    ],
    ids=str,
)
def test_what_exceptions_mean(error, what):
    assert resources.kind(error) == what


def test_a_gpu_says_how_much_there_is():
    said = str(resources.named(torch.OutOfMemoryError(GPU), argparse.Namespace(batch_size=1, eval=True)))
    assert said == 'out of GPU memory; 2.00 GiB more were asked for, 1.21 GiB of 79.15 GiB are free'


@pytest.mark.parametrize(
    ('flags', 'advice'),
    [
        ('--batch_size 128', '--batch_size 64 --accum_iter 2'),
        ('--batch_size 64 --accum_iter 3', '--batch_size 32 --accum_iter 6'),
        ('--batch_size 9', '--batch_size 3 --accum_iter 3'),
        ('--batch_size 7', '--batch_size 1 --accum_iter 7'),
        ('--batch_size 1', ''),
        ('--batch_size 6 --mixup 0.8', '--batch_size 2 --accum_iter 3'),
        ('--batch_size 2 --cutmix_minmax 0.2 0.8', ''),
        ('--batch_size 64 --effective_batch_size 256', '--batch_size 32'),
        ('--batch_size 64 --effective_batch_size 256 --accum_iter 4', '--batch_size 32 --accum_iter 8'),
    ],
)
def test_the_same_run_in_less_memory(flags, advice):
    """As advised, and followed."""
    parse = main_finetune.get_args_parser().parse
    args = parse(flags.split())
    said = resources.to_change('memory', 'a training step', args)
    found = re.match(r'the same batch of a step in less memory: (--[^;]+)', said)
    assert (found[1] if found else '') == advice
    assert said.endswith('--grad_checkpoint')
    assert not resources.to_change('memory', 'the evaluation', args).endswith('--grad_checkpoint')
    now = parse([*flags.split(), *advice.split(), '--grad_checkpoint'])
    assert now.batch_size * optim.accumulation(now) == args.batch_size * optim.accumulation(args)
    assert 'grad_checkpoint' not in resources.to_change('memory', 'a training step', now)


def too_much(*args, **kwargs):
    torch.empty(2**50)


def no_memory(*args, **kwargs):
    raise MemoryError


STAGES = {  # where it happens, in which run, what is said of it
    'step': (engine_pretrain, 'forward', 'pretrain', 'in a training step at --batch_size 8; 4503599.6 GB more'),
    'evaluation': (engine_finetune.F, 'cross_entropy', 'finetune', 'in the evaluation at --batch_size 8'),
    'model': (build, 'construct', 'pretrain', 'in making the model; .* a smaller --model'),
    'trial': (build, 'functional_call', 'pretrain', 'cannot take 2 images .* out of memory in trying the model'),
    'checkpoint': (torch, 'save', 'pretrain', 'in writing a checkpoint'),
    'image': (datasets.ImageFiles, 'augmented', 'pretrain', 'in a training step'),
}


@pytest.mark.fault(40)
@pytest.mark.parametrize('stage', STAGES)
def test_memory_of_a_run(stage, images, tmp_path, monkeypatch):
    """A real exception of torch's allocator, wherever it comes."""
    where, name, program, words = STAGES[stage]
    monkeypatch.setattr(where, name, no_memory if stage == 'trial' else too_much)  # fake tensors take none
    with pytest.raises(ResourceError, match=f'{"" if stage == "trial" else "out of memory "}{words}') as caught:
        train(program, images, tmp_path, *SHORT, '--epochs', '1', '--warmup_epochs', '0', '--print_freq', '100')
    status = json.loads((tmp_path / 'status.json').read_text())
    assert status['exit_code'] == caught.value.code == 5
    assert status['message'] == str(caught.value)
    assert '\n' not in status['message']
    assert ('--batch_size 4 --accum_iter 2' in status['message']) == ('--batch_size' in words or stage == 'image')


def test_memory_of_an_evaluation_and_of_pictures(images, tmp_path, monkeypatch):
    parser = main_finetune.get_args_parser()
    core = main_finetune.create_classifier(parser.parse(arguments(images, tmp_path)), 3)
    torch.save(core.state_dict(), tmp_path / 'a.pth')
    flags = ['--eval', '--batch_size', '10', '--resume', tmp_path / 'a.pth']
    with monkeypatch.context() as patch:
        patch.setattr(engine_finetune.F, 'cross_entropy', too_much)
        with pytest.raises(ResourceError, match=r'in the evaluation at --batch_size 10; .* batch: --batch_size 5$'):
            main_finetune.main(parser.parse(arguments(images, tmp_path / 'x', *flags), stage='finetune'))
    args = parser.parse(
        arguments(images, tmp_path / 'x', *flags[:1], '--batch_size', '5', *flags[3:]), stage='finetune'
    )
    main_finetune.main(args)  # as advised
    monkeypatch.setattr(visualize, 'load_published', too_much)
    flags = ['--model', 'mirl_vit_tiny', '--input_size', '32', '--checkpoint', f'{tmp_path}/a.pth', '--device', 'cpu']
    with pytest.raises(ResourceError, match=r'^out of memory; '):
        visualize.main(visualize.get_args_parser().parse([*flags, str(images)], stage='pretrain'))
    monkeypatch.setattr(visualize, 'load_published', lambda *args, **kwargs: '')
    monkeypatch.setattr(visualize.Pictures, '__init__', lambda *args: None)
    monkeypatch.setattr(visualize.Pictures, 'draw', make_draw())
    with pytest.raises(ResourceError, match=r'^out of memory in drawing pictures; .* a smaller --count$'):
        visualize.main(visualize.get_args_parser().parse([*flags, str(images)], stage='pretrain'))
    output = ['--output', f'{tmp_path}/none/a.png']
    with pytest.raises(UserError, match=f'there is no folder {tmp_path}/none$'):
        visualize.main(visualize.get_args_parser().parse([*flags, *output, str(images)], stage='pretrain'))


def make_draw():
    class Pictures:
        def draw(self, *args):
            too_much()

    Pictures.draw.__code__ = Pictures.draw.__code__.replace(co_qualname='Pictures.draw')
    return Pictures.draw


@contextlib.contextmanager
def little_memory(more: int = 2**20):
    """As under `ulimit -v`: so many bytes above what this process has."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open('/proc/self/statm') as file:
        own = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (own + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


LARGE = {'model': {'weight': torch.zeros(2**25)}}  # 128 MB: more than the C library keeps for itself
WRITERS = {
    'a.pth': lambda path: torch.save(LARGE, path),
    'old.pth': lambda path: torch.save(LARGE, path, _use_new_zipfile_serialization=False),
    'a.safetensors': lambda path: safetensors.torch.save_file(LARGE['model'], path),
    'a.pdparams': lambda path: path.write_bytes(pickle.dumps({'weight': np.zeros(2**25, np.float32)}, protocol=4)),
}


def read_with_little_memory(path: Path) -> tuple[str, int]:
    """How reading a checkpoint, or the newest of a folder, ends. In a new process: an old one has room left."""
    try:
        with little_memory():
            checkpoint.find_newest(path) if path.is_dir() else read_checkpoint(path)
    except RunError as error:
        return str(error), error.code
    return 'read', 0


@pytest.mark.fault(40)
def test_a_checkpoint_without_memory_is_not_damaged(tmp_path):
    paths = [tmp_path / name for name in WRITERS]
    for path in paths:
        WRITERS[path.name](path)
    folder = tmp_path / 'run'
    folder.mkdir()
    torch.save({'epoch': 0, 'step': 0}, folder / checkpoint.PREVIOUS)
    (folder / checkpoint.LAST).symlink_to(paths[0])
    with ProcessPoolExecutor(1, server()) as pool:
        ends = list(pool.map(read_with_little_memory, [*paths, folder]))
    for path, (line, code) in zip([*paths, folder / checkpoint.LAST], ends, strict=True):
        assert line.startswith(f'out of memory in reading {path}, of 134.2 MB')
        assert code == 5
    for path in paths:
        path.unlink()


# --------------------------------------------------------------------------
# loader processes


@pytest.fixture
def small_shm(monkeypatch):
    monkeypatch.setattr(resources, 'room_of_shm', lambda: (2**17, '/dev/shm has 0.1 MB of 0.1 MB free'))


@pytest.mark.fault(41)
@pytest.mark.parametrize('stage', ['pretrain', 'finetune'])
def test_shared_memory_is_counted_before_the_first_step(stage, images, tmp_path, small_shm, capsys):
    words = r'0\.1 MB of 0\.1 MB free; 2 loader processes need up to 0\.6 MB; --num_workers 0 needs none'
    with pytest.raises(ResourceError, match=words):
        train(stage, images, tmp_path / 'no', *SHORT, '--batch_size', '16', '--num_workers', '2')
    assert 'Epoch' not in capsys.readouterr().out


def test_how_much_shared_memory(small_shm, monkeypatch):
    args = argparse.Namespace(input_size=64, eval_size=96, eval=False, batch_size=4, num_workers=2)
    assert resources.batch_bytes(args) >= 4 * (3 * 96 * 96 + 8)
    assert resources.batch_bytes(argparse.Namespace(**vars(args) | {'eval_size': 32, 'eval': True})) < 4 * 3 * 64 * 64
    resources.check_shm(args, batches=1)  # no more than there are
    resources.check_shm(argparse.Namespace(num_workers=0), batches=100)
    monkeypatch.setattr(dist, 'local_ranks', lambda: 4)
    with pytest.raises(ResourceError, match='2 loader processes of each of 4 ranks need up to'):
        resources.check_shm(args, batches=1)


@pytest.mark.parametrize(
    ('variables', 'ranks'),
    [
        ('RANK=0 WORLD_SIZE=8 LOCAL_RANK=0 LOCAL_WORLD_SIZE=4', 4),
        ('SLURM_STEP_ID=0 SLURM_PROCID=0 SLURM_NTASKS=7 SLURM_LOCALID=0 SLURM_STEP_TASKS_PER_NODE=2(x3),1', 2),
        ('LOCAL_WORLD_SIZE=4', 1),
        ('', 1),
    ],
)
def test_ranks_of_this_machine(variables, ranks, monkeypatch):
    for variable in variables.split():
        monkeypatch.setenv(*variable.split('='))
    assert dist.local_ranks() == ranks


class Faulty(datasets.ImageFiles):
    """Image 13 does something in the process that reads it."""

    deed = None

    def image(self, index):
        if index == 13:
            self.deed()
        return super().image(index)


def full():
    raise RuntimeError('unable to write to file </torch_1_2_3>: No space left on device (28)')


def no_files():
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


@pytest.mark.fault(41)
@pytest.mark.parametrize(
    ('deed', 'words'),
    [
        (
            lambda: os.kill(os.getpid(), signal.SIGBUS),
            'killed by SIGBUS: out of shared memory; /dev/shm',
        ),
        (full, 'out of shared memory in a loader process; /dev/shm has .* need up to .* needs none'),
        (no_files, r'out of open files; ulimit -n is \d+; raise it .* fewer --num_workers'),
        (too_much, 'out of memory in a loader process; .* fewer --num_workers, such as 1$'),
    ],
)
def test_loader_processes_without(deed, words, images, monkeypatch):
    monkeypatch.setattr(Faulty, 'deed', staticmethod(deed))
    files = datasets.list_images(images / 'train')
    data = Faulty(files, None, augment.eval_transform(32, 1.0), 0)
    args = argparse.Namespace(num_workers=2, input_size=32, batch_size=4)
    read = resources.program(lambda args: list(datasets.loader(data, datasets.eval_batches(66, 4, 0, 1), 2, False, 20)))
    try:
        with pytest.raises(ResourceError, match=words):
            read(args)
    finally:
        signals.end_workers()


@pytest.mark.parametrize('number', [errno.EAGAIN, errno.ENOMEM, errno.ENOSPC, errno.EMFILE])
def test_loader_processes_that_cannot_start(number, images, monkeypatch):
    def fail():
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, 'fork', fail)
    data = datasets.ImageFiles(datasets.list_images(images / 'train'), None, augment.eval_transform(32, 1.0), 0)
    words = rf'^2 loader processes cannot be started: {os.strerror(number)}; \S.*; fewer --num_workers$'
    with pytest.raises(ResourceError, match=words):
        list(datasets.loader(data, [[(0, 0)]], 2, False))


def test_no_image_is_to_blame(images, monkeypatch):
    """But one that asks for absurd amounts, where there is memory."""
    data = datasets.ImageFiles(datasets.list_images(images / 'train'), None, None, 0)
    for error, raised in (
        (OSError(errno.EMFILE, 'Too many open files'), OSError),
        (RuntimeError("can't allocate memory"), RuntimeError),
        (MemoryError(), UserError),
    ):
        monkeypatch.setattr(data, 'transform', lambda image, error=error: (_ for _ in ()).throw(error))
        with pytest.raises(raised):
            data[0, 0]
    monkeypatch.setattr(resources, 'PROBE', 2**62)
    with pytest.raises(MemoryError):
        data[0, 0]


def test_open_files_are_raised():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
    try:
        resources.raise_open_files()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (min(hard, resources.MOST_FILES), hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.fault(41)
def test_folder_of_sockets(tmp_path, monkeypatch):
    config = multiprocessing.process.current_process()._config
    monkeypatch.setitem(config, 'tempdir', None)
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
    short = len(os.fsencode(tmp_path)) <= 70
    with contextlib.nullcontext() if short else pytest.raises(UserError, match='too long'):
        resources.check_sockets()
    for folder, words in ((tmp_path / ('x' * 80), 'TMPDIR=.* letters too long'), (tmp_path / 'none', 'set TMPDIR to')):
        if 'long' in words:
            folder.mkdir()
        monkeypatch.setitem(config, 'tempdir', None)
        monkeypatch.setattr(tempfile, 'tempdir', str(folder))
        with pytest.raises(UserError, match=f'{words}.*--num_workers 0'):
            resources.check_sockets()


# --------------------------------------------------------------------------
# SLURM


@pytest.mark.parametrize(
    ('nodes', 'host'),
    [
        ('node1', 'node1'),
        ('node[3-5,9]', 'node3'),
        ('a1,b[01-03]-ib', 'a1'),
        ('gpu[03-05,9]-ib,login1', 'gpu03-ib'),
        ('rack[2-3]node[08-11]', 'rack2node08'),
        ('node-1.cluster.org,b', 'node-1.cluster.org'),
        *[(nodes, '') for nodes in ('', '(null)', 'a[', 'a b', '[')],
    ],
)
def test_the_first_host_of_a_node_list(nodes, host, monkeypatch):
    monkeypatch.setenv('SLURM_JOB_NODELIST', nodes)
    monkeypatch.setenv('SLURM_JOB_ID', '20077')
    monkeypatch.delenv('SLURM_STEP_NODELIST', raising=False)
    if host:
        assert dist.slurm_url() == f'tcp://{host}:20077'
        monkeypatch.setenv('SLURM_JOB_ID', 'x')
    with pytest.raises(UserError, match='MASTER_ADDR and MASTER_PORT, where they meet, are not set'):
        dist.slurm_url()


def test_slurm_variables_that_are_missing(monkeypatch):
    for name, value in (('SLURM_STEP_ID', '0'), ('SLURM_PROCID', '1'), ('SLURM_LOCALID', '1')):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match='the launcher set SLURM_PROCID and SLURM_LOCALID, but not SLURM_NTASKS'):
        dist.place()


@pytest.mark.fault(38)
@pytest.mark.parametrize(
    'error',
    [
        FileNotFoundError(errno.ENOENT, 'No such file or directory', 'scontrol'),
        subprocess.CalledProcessError(1, 'scontrol'),
        subprocess.TimeoutExpired('scontrol', 60),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_request_to_be_queued_again_without_scontrol(error, monkeypatch, capsys):
    """The state is saved, and the run ends as stopped."""

    def requeue(*args):
        raise error

    done = []
    monkeypatch.setattr(signals, 'requeue_handler', lambda: requeue)
    monkeypatch.setattr(signals, 'ignore', lambda: None)
    run = SimpleNamespace(
        save=lambda *args, **kwargs: done.append('saved'),
        folder=SimpleNamespace(close=lambda *args: None),
        args=argparse.Namespace(output_dir='runs/x'),
        sampler=SimpleNamespace(unit='epoch'),
    )
    with pytest.raises(SystemExit) as caught:
        Run.stop(run, signals.REQUEUE, SimpleNamespace(number=0, steps=4), 1)
    assert caught.value.code == 75
    assert done == ['saved']
    line = capsys.readouterr().out.splitlines()[-1]
    assert re.match('the job was not queued again: .*scontrol.*submit it with --output_dir runs/x --resume auto$', line)


def test_more_cpus_than_there_are():
    words = 'pretrain --local --ngpus 2 --cpus_per_task 10 --model mirl_vit_tiny --device cpu'
    options, _ = launcher.parse(words.split())
    said = launcher.too_many_cpus('srun: error: More processors requested than permitted', options)
    assert '--ngpus 2 tasks of --cpus_per_task 10 take 20 CPUs' in said
    assert launcher.too_many_cpus('invalid partition specified', options) == ''


# --------------------------------------------------------------------------
# TensorBoard


@pytest.mark.fault(13)
@pytest.mark.filterwarnings('error::pytest.PytestUnhandledThreadExceptionWarning')
def test_events_on_a_full_disk(images, tmp_path, monkeypatch, capsys):
    """Said once; the run goes on to its end."""
    writes, write = [], LocalFileSystem._write

    def full(self, filename, *args):
        writes.append(filename)
        if len(writes) > 10:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, filename, *args)

    monkeypatch.setattr(LocalFileSystem, '_write', full)
    flags = [*SHORT, '--epochs', '1', '--warmup_epochs', '0', '--log_dir', tmp_path / 'events']
    train('pretrain', images, tmp_path / 'full', *flags)
    out, err = capsys.readouterr()
    said = f'TensorBoard events cannot be written to {tmp_path}/events: No space left on device; the run goes on'
    assert out.count(said) == 1
    assert 'Traceback' not in err
    assert len((tmp_path / 'full/log.txt').read_text().splitlines()) == 1
    assert load(tmp_path / 'full')['step'] == 8
