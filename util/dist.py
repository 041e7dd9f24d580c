"""The one door to `torch.distributed`: one process, torchrun, or SLURM; gloo on CPU, NCCL on GPU.

What only gloo's faults need stands apart, in util/dist_faults.py.
"""

import contextlib
import inspect
import os
import re
import threading
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as torch_dist
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from util import console, dist_faults
from util.errors import LostError, RunError, UserError, printable

HOST_GROUP = None  # a gloo group beside NCCL's, for what the hosts decide together; None: the default group
# how much longer NCCL waits than the hosts, which can say which rank was lost: its watchdog ends a process silently
WATCHDOG_S = 30
MEETING_S = 1  # about how often the hosts meet in training
# words in the plain RuntimeError that torch raises when a collective fails
LOST = re.compile('gloo/|Gloo|NCCL|ProcessGroup|TCPStore|pair closure|[Cc]onnection (closed|reset) by peer')


class Place(NamedTuple):
    """This process among all of them."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0


def place() -> Place:
    """Read torchrun's, SLURM's or Open MPI's environment; one process where there is none of them."""
    env = os.environ
    for needed, names in (
        ('RANK', ('RANK', 'WORLD_SIZE', 'LOCAL_RANK')),
        ('SLURM_STEP_ID', ('SLURM_PROCID', 'SLURM_NTASKS', 'SLURM_LOCALID')),
        ('OMPI_COMM_WORLD_RANK', ('OMPI_COMM_WORLD_RANK', 'OMPI_COMM_WORLD_SIZE', 'OMPI_COMM_WORLD_LOCAL_RANK')),
    ):
        given = [name for name in names if name in env]
        if needed in env and 1 < len(given) < len(names):
            [missing] = set(names) - set(given)
            raise UserError(f'the launcher set {" and ".join(given)}, but not {missing}')
        if needed in env and given == [*names]:
            try:
                return Place(*(int(env[name]) for name in names))
            except ValueError as error:
                found = ', '.join(f'{name}={env[name]}' for name in names)
                raise UserError(f'the launcher set {found}, which are not numbers') from error
    return Place()


def share_of_cores(cores: int) -> int:
    """The cores of this process, which may use `cores` of the machine beside the launcher's other processes there."""
    of_job = os.environ.get('SLURM_CPUS_ON_NODE', '') if place().world_size > 1 else ''
    if of_job.isdecimal():  # SLURM may have bound the process to its own already
        return min(cores, int(of_job) // local_ranks())
    return cores // local_ranks()


def local_ranks() -> int:
    """How many processes the launcher started on this machine, as far as it says."""
    for name in ('LOCAL_WORLD_SIZE', 'SLURM_STEP_TASKS_PER_NODE', 'OMPI_COMM_WORLD_LOCAL_SIZE'):
        if place().world_size > 1 and name in os.environ:  # SLURM's is a list such as 2(x3),1
            return max([1, *map(int, re.findall(r'(?<![x\d])\d+', os.environ[name]))])
    return 1


def init(device: str, dist_url: str = 'env://', timeout_s: float = 600) -> torch.device:
    """Join the process group if there are several processes, and return this process's device."""
    global HOST_GROUP
    here, timeout = place(), timedelta(seconds=timeout_s)
    if 'TORCHELASTIC_RUN_ID' in os.environ:  # torchrun
        restarts = int(os.environ.get('TORCHELASTIC_MAX_RESTARTS', '0'))
        if restarts and here.rank == 0 and os.environ.get('TORCH_DISABLE_SHARE_RDZV_TCP_STORE') != '1':
            console.say(
                'torchrun --max-restarts can fail without TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment'
            )
    own = own_device(device)
    if own.type == 'cuda':
        torch.cuda.set_device(own)
    if here.world_size > 1:
        if 'MASTER_ADDR' not in os.environ and dist_url == 'env://':
            dist_url = slurm_url()
        if dist_url == 'env://' and not os.environ.get('MASTER_PORT', '').isdecimal():
            raise UserError('several processes, but MASTER_PORT, where they meet, is not set to a number')
        backend = 'nccl' if own.type == 'cuda' else 'gloo'
        patience = timeout + timedelta(seconds=WATCHDOG_S if backend == 'nccl' else 0)
        try:
            torch_dist.init_process_group(backend, dist_url, patience, world_size=here.world_size, rank=here.rank)
        except RuntimeError as error:
            raise no_meeting(error, dist_url, here) from error
        HOST_GROUP = torch_dist.new_group(timeout=timeout, backend='gloo') if backend == 'nccl' else None
    return own


def no_meeting(error: RuntimeError, dist_url: str, here: Place) -> RunError:
    """What to say when the processes do not find each other."""
    if dist_url == 'env://':
        dist_url = f'{os.environ["MASTER_ADDR"]}:{os.environ["MASTER_PORT"]}'
    why = str(error).partition('\n')[0]
    if 'EADDRINUSE' in str(error) or 'already in use' in str(error):
        return UserError(f'the port of {dist_url}, where the processes meet, is in use: take another (MASTER_PORT)')
    if 'No rendezvous handler' in why:
        return UserError(f'--dist_url {dist_url} is no meeting place: env://, tcp://HOST:PORT or file:///PATH')
    return LostError(f'rank {here.rank} of {here.world_size} did not find the others at {dist_url}: {why}')


def is_lost(error: BaseException) -> bool:
    """Whether an exception says that a collective has failed: then the fault is another process's."""
    told = isinstance(error, torch_dist.DistError) or (isinstance(error, RuntimeError) and LOST.search(str(error)))
    return active() and bool(told)


def own_device(device: str) -> torch.device:
    """This process's device: of several GPUs that of its local rank, of one GPU that one.

    Raises UserError if `device` is not the name of a device, or if there is no such device.
    """
    try:
        named = torch.device(device)
    except RuntimeError as error:
        raise UserError(f'--device {device}: not a device; cuda, cuda:N or cpu') from error
    if named.type not in ('cuda', 'cpu'):
        apple = "; Apple's GPUs are not supported: --device cpu" * (named.type == 'mps')
        raise UserError(f'--device {device}: cuda, cuda:N or cpu{apple}')
    if named.type == 'cpu':
        return named
    count, here = torch.cuda.device_count(), place()
    if not count:
        raise UserError(f'--device {device}: no GPU is visible; use --device cpu')
    index = here.local_rank if here.world_size > 1 or named.index is None else named.index
    if 'SLURM_STEP_ID' in os.environ and count == 1:  # each task was given a GPU of its own
        index = 0
    if index >= count:
        error = UserError(
            f'--device {device}: process {here.local_rank} would take GPU {index}, but {count} are visible'
        )
        error.rank = here.rank  # the first ranks have a GPU
        raise error
    return torch.device('cuda', index)


def slurm_url() -> str:
    """The rendezvous of a plain `srun`: the job's first node, and a port from 20000 on that follows from its id."""
    nodes = os.environ.get('SLURM_STEP_NODELIST') or os.environ.get('SLURM_JOB_NODELIST', '')
    job, host = os.environ.get('SLURM_JOB_ID', ''), first_host(nodes)
    if not host or not job.isdecimal():
        known = (
            f' (SLURM_JOB_NODELIST={printable(nodes, 80)}, SLURM_JOB_ID={printable(job, 80)})' if nodes or job else ''
        )
        raise UserError(f'several processes, but MASTER_ADDR and MASTER_PORT, where they meet, are not set{known}')
    return f'tcp://{host}:{20000 + int(job) % 20000}'


def first_host(nodes: str) -> str:
    """The first of a node list of SLURM, such as `gpu[03-05,9]-ib,login1`: gpu03-ib; '' if it is not one."""
    first = re.match(r'([\w.-]|\[\d[\w,-]*\])+(?=,|$)', nodes)
    return re.sub(r'\[(\d+)[^]]*\]', r'\1', first[0]) if first else ''


def active() -> bool:
    return torch_dist.is_available() and torch_dist.is_initialized()


def rank() -> int:
    """This process's rank; before the processes have met, the one that it will have."""
    return torch_dist.get_rank() if active() else place().rank


def world_size() -> int:
    return torch_dist.get_world_size() if active() else 1


def is_main() -> bool:
    return rank() == 0


def barrier() -> None:
    """Wait until every process is here, but not for the work of a GPU."""
    if active():
        torch_dist.barrier(HOST_GROUP)


def cleanup() -> None:
    if active():
        torch_dist.destroy_process_group()


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum over ranks, in place."""
    if active():
        torch_dist.all_reduce(tensor)
    return tensor


def largest(number: int) -> int:
    """The largest over the ranks of a number on the host. No GPU is waited for, so hosts stay ahead of them."""
    return largest_each(number)[0]


def largest_each(*numbers: int) -> list[int]:
    """`largest` of several numbers at once."""
    if not active():
        return [*numbers]
    tensor = torch.tensor(numbers)
    torch_dist.all_reduce(tensor, torch_dist.ReduceOp.MAX, HOST_GROUP)
    return tensor.tolist()


class Meetings:
    """After which steps the hosts exchange something: about once a second, and after every step that takes longer.

    All must come to the same ones, so steps are counted: at each meeting the ranks agree on how many there are to the
    next, by the slowest one's time for a step. That is twice as many as before at most, whatever a step seemed to take.
    One process meets itself after every step.
    """

    def __init__(self):
        self.every = self.left = 1
        self.last = time.monotonic()

    def due(self) -> bool:
        """Whether there is one now; to be called once after each step. Ranks may meet earlier."""
        self.left -= 1
        return self.left <= 0

    def largest(self, number: int) -> int:
        """Meet: the largest over the ranks of a number on the host."""
        seconds = (time.monotonic() - self.last) / (self.every - self.left)
        number, step_us = largest_each(number, int(1e6 * seconds) + 1)
        self.every = self.left = max(1, min(2 * self.every, int(1e6 * MEETING_S / step_us))) if active() else 1
        self.last = time.monotonic()
        return number


def watch(notice: Callable[[Exception], None]) -> None:
    """Beside NCCL, have a thread call `notice` when a rank has ended or does not answer.

    A GPU waits for what a lost rank was to send, and soon its host for room in the GPU's queue: it meets nobody.
    """
    if HOST_GROUP is not None:
        threading.Thread(target=greet, args=(notice,), daemon=True).start()


def greet(notice: Callable[[Exception], None]) -> None:
    """Greet the next rank and await the greeting of the one before, once a second."""
    here, ours, theirs = rank(), torch.zeros(1), torch.zeros(1)
    try:
        while True:
            time.sleep(MEETING_S)
            greeting = torch_dist.isend(ours, (here + 1) % world_size(), HOST_GROUP, tag=1)
            torch_dist.recv(theirs, (here - 1) % world_size(), HOST_GROUP, tag=1)
            greeting.wait()
    except (RuntimeError, ValueError) as error:  # the second where the group is no more
        notice(error)


def gather(thing: Any) -> list:
    """A list of what each rank gives, small plain data; on all ranks."""
    if not active():
        return [thing]
    things = [None] * world_size()
    torch_dist.all_gather_object(things, thing, HOST_GROUP)
    return things


def gather_to_main(thing: Any) -> list:
    """A list of what each rank gives, plain data of any size, on rank 0; an empty one on the others."""
    if not active():
        return [thing]
    things = [None] * world_size() if is_main() else None
    torch_dist.gather_object(thing, things, group=HOST_GROUP)
    return things or []


def from_main(make: Callable[[], Any], told: Callable[[Any], Any] = lambda made: made) -> Any:
    """What `make` gives, which rank 0 alone calls; on the others what `told` makes of it, small plain data.

    A RunError that rank 0 raises is raised on all ranks. Every rank must call it.
    """
    made = error = None
    if is_main():
        try:
            made = make()
        except RunError as raised:
            error = raised
            error.common = True
    if active():
        said = gather(error or told(made) if is_main() else None)[0]
        error = error or (said if isinstance(said, RunError) else None)
        made = made if is_main() else said
    if error:
        raise error
    return made


def share(tensors: Iterable[Tensor]) -> None:
    """Give every rank what these tensors of rank 0 hold, in place."""
    if active():
        for tensor in tensors:
            torch_dist.broadcast(tensor, 0, HOST_GROUP if tensor.device.type == 'cpu' else None)


def wait_for_main_to_end() -> None:
    """Return when rank 0's process has ended. Rank 0 must not wait for this one."""
    with contextlib.suppress(RuntimeError):  # its end breaks the connections that the barrier stands on
        barrier()


def parallel(
    core: nn.Module, device: torch.device, compiled: bool = False, mode: str = 'default', bf16_gradients: bool = False
) -> nn.Module:
    """`core`, compiled if asked, in DistributedDataParallel if there are several processes.

    `mode` is torch.compile's. `bf16_gradients`: what processes exchange of them is rounded to bfloat16, sums included.
    """
    model = core
    if compiled and hasattr(core, 'compiled_part'):  # in place; for the first few sizes of images
        core.compiled_part.compile(dynamic=False, mode=mode)
    elif compiled:
        model = torch.compile(core, fullgraph=True, mode=mode)
    if active():
        # training uses a batch's own statistics; `share_running_statistics` shares the others when they are used
        new_name = 'forward_sync_buffers' in inspect.signature(DistributedDataParallel).parameters
        # DDP reorders its buckets after a process's first step, and so the rounding of sums of more than two numbers: a
        # resumed run would not repeat to the bit. This setting keeps the order; torch's warning about it is expected.
        to_the_bit = device.type == 'cpu' or torch.are_deterministic_algorithms_enabled()
        model = DistributedDataParallel(
            model,
            device_ids=[device.index] if device.type == 'cuda' else None,
            gradient_as_bucket_view=True,
            find_unused_parameters=to_the_bit and world_size() > 2,
            **{'forward_sync_buffers' if new_name else 'broadcast_buffers': False},
        )
        if bf16_gradients:
            from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

            model.register_comm_hook(None, bf16_compress_hook)
        if device.type == 'cpu':
            dist_faults.outlive(model)
    return model


def has_batchnorm(core: nn.Module) -> bool:
    return any(isinstance(module, _BatchNorm) for module in core.modules())


def share_running_statistics(core: nn.Module) -> None:
    """Give every rank rank 0's running statistics, the saved ones; without SyncBatchNorm each rank has its own."""
    if active() and has_batchnorm(core):
        for buffer in core.buffers():
            torch_dist.broadcast(buffer, 0)


def will_synchronise(core: nn.Module, device: str) -> bool:
    """Whether `sync_batchnorm` will change this model, once the processes have met."""
    return place().world_size > 1 and torch.device(device).type == 'cuda' and has_batchnorm(core)


def sync_batchnorm(core: nn.Module, device: torch.device) -> nn.Module:
    """SyncBatchNorm for BatchNorm where several GPUs train; on CPU torch has none, and BatchNorm stays per process."""
    if active() and device.type == 'cuda':
        return convert_sync_batchnorm(core)  # timm's, since torch's would drop the activation of BatchNormAct2d
    return core


def no_sync(model: nn.Module, last: bool) -> contextlib.AbstractContextManager:
    """Skip the gradient reduction of all but the last micro-step."""
    return contextlib.nullcontext() if last or not hasattr(model, 'no_sync') else model.no_sync()
