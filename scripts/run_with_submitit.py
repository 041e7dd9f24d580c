"""Run a training program as SLURM jobs that save, requeue and resume by themselves, or locally.

Examples:
    python scripts/run_with_submitit.py pretrain --nodes 2 --ngpus 8 --config NAME --data_path /data/imagenet
    python scripts/run_with_submitit.py finetune --seeds 0 1 2 --finetune runs/NAME/checkpoint-last.pth --data_path ...
    python scripts/run_with_submitit.py segment --nodes 1 --ngpus 8 --config NAME --finetune PATH --data_path /data/ade
    python scripts/run_with_submitit.py pretrain --local --ngpus 2 --config NAME --data_path ...

The word names the program: main_pretrain.py, main_finetune.py or, with segment and detect,
scripts/finetune_segmentation.py and scripts/finetune_detection.py. Every flag that is not listed here goes to it, whose
parser checks it before anything is submitted.
"""

import argparse
import atexit
import contextlib
import copy
import importlib
import io
import itertools
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import submitit
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import main_finetune
import main_pretrain
from scripts import finetune_detection, finetune_segmentation
from util import config, console, optim, signals
from util.config import AT_LEAST_0, AT_LEAST_1
from util.dry_run import figure
from util.errors import STOPPED, UserError, closest, run_main
from util.recipes import find_recipe

REPOSITORY = Path(__file__).resolve().parent.parent
MAINS = {
    'pretrain': main_pretrain,
    'finetune': main_finetune,
    'segment': finetune_segmentation,
    'detect': finetune_detection,
}
NAME = r'[A-Za-z0-9._-]{1,100}'
JOB_ID = r'\d+(_\d+)?'
LOOK_S = 5  # how long a new job is watched while it is pending; SLURM needs a moment to find its reason
# SLURM's reasons for pending that no waiting ends, other than e.g. Resources, Priority or AssocMaxJobsLimit
WILL_NOT_START = (
    r'Partition(Config|NodeLimit|TimeLimit)|BadConstraints|MaxMemPerLimit|JobHeldAdmin|Invalid(Account|QOS)|'
    r'(Account|QOS)NotAllowed|(Assoc|QOS)Max\w+Per(Job|Node)(Limit)?|QOSMin\w+'
)
FREE_TEXT = ('partition', 'account', 'qos', 'constraint', 'comment')


def get_args_parser() -> config.Parser:
    parser = config.Parser(
        'Run a main as SLURM jobs that save, requeue and resume by themselves, or here (--local). '
        'All flags of the main are accepted too: main_pretrain.py --help, main_finetune.py --help, '
        'scripts/finetune_segmentation.py --help, scripts/finetune_detection.py --help.'
    )
    parser.add_argument('stage', choices=MAINS, help='which main')
    add = partial(parser.add_argument, heading='Jobs')
    add('--nodes', type=AT_LEAST_1, default=1, help='machines of a job')
    add('--ngpus', type=AT_LEAST_1, help='GPUs, and tasks, of each machine; default: 8; --local: its own, or 1')
    add(
        '--job_dir',
        type=config.path,
        default=Path('jobs/%j'),
        help='pickles, logs, and without --output_dir checkpoints; %j: job id',
    )
    add('--array', nargs='+', type=config.path, default=[], metavar='RECIPE', help='a job for each recipe')
    add('--seeds', nargs='+', type=AT_LEAST_0, default=[], metavar='SEED', help='a job for each seed')
    add('--local', action=config.Switch, help='run here, without SLURM, one job after the other')

    add = partial(parser.add_argument, heading='Time')
    add(
        '--timeout',
        type=AT_LEAST_1,
        default=4320,
        help='minutes until a job is queued again; --local: at most six times',
    )
    add(
        '--signal_delay_s',
        type=AT_LEAST_1,
        default=120,
        help='seconds before that to save in: longer than an evaluation',
    )
    add('--max_requeues', type=AT_LEAST_0, default=1000, help='time limits after which a job is queued again')

    add = partial(parser.add_argument, heading='SLURM')
    add('--partition', help="SLURM's; default: the site's")
    add('--account', help="SLURM's")
    add('--qos', help="SLURM's")
    add('--constraint', help='features that machines must have')
    add('--mem_gb', type=config.number(float, above=0), help="memory of each machine; default: the site's")
    add('--cpus_per_task', type=AT_LEAST_1, help='CPUs of each task; default: one for each of its --num_workers')
    add('--comment', help='a line for the queue')
    add('--name', help='job name; default: the stage')
    return parser


class Job:
    """What a job runs. It is pickled by value and called elsewhere, where the project cannot be imported yet.

    So its methods import the project's modules, and name no global that is one of them or holds one.
    """

    def __init__(self, stage: str, args: argparse.Namespace, options: argparse.Namespace):
        from util.errors import program

        self.stage, self.program, self.args = stage, program(stage), args
        self.local, self.max_requeues = options.local, options.max_requeues
        self.repository, self.folder = str(REPOSITORY), os.getcwd()
        self.umask = os.umask(0o077)
        os.umask(self.umask)
        self.gpus = os.environ.get('CUDA_VISIBLE_DEVICES')
        self.port = free_port()
        self.requeued = False

    def __call__(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):  # submitit ignores SIGTERM; there is nothing to save yet
            signal.signal(number, signal.SIG_DFL)
        os.umask(self.umask)
        os.chdir(self.folder)
        sys.path.insert(0, self.repository)
        sys.argv[:] = [self.program]
        self.set_environment(submitit.JobEnvironment())
        main = importlib.import_module(self.program.removesuffix('.py').replace('/', '.'))
        from util.errors import AT_THE_END, run_main

        paths = submitit.JobEnvironment().paths
        remove_unfinished(paths.result_pickle)
        args = self.arguments(paths.folder)
        run_main(lambda: self.run(main.main, args), returns=True)
        # done; while Python shuts down they would kill and count as failure
        for number in (signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)
        for function in AT_THE_END:  # when submitit has written the result
            atexit.register(function, 0)

    def run(self, main: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
        """Run a main. It ends as stopped, and says how to resume, where its request to be queued again is not granted.

        Then it has saved, and the exception comes out of submitit's handler of SIGUSR2.
        """
        from util import console

        try:
            main(args)
            return
        except submitit.core.utils.UncompletedJobError:
            why = f'is not queued again: its --max_requeues {self.max_requeues} are used up; to resume'
        except subprocess.SubprocessError:  # of a job that is back in the queue already, by its administrator
            why = 'was not queued again by scontrol, as it says above; if nobody else has done it'
        resume = f'submit it with --output_dir {args.output_dir} --resume auto'
        console.say(f'job {submitit.JobEnvironment().job_id} {why}, {resume}')
        raise SystemExit(STOPPED)

    def set_environment(self, job: submitit.JobEnvironment) -> None:
        """Ranks come from SLURM, or locally from here; never from the shell that submitted the job."""
        from util import signals

        for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT'):
            os.environ.pop(name, None)
        os.environ.setdefault('OMP_NUM_THREADS', '1')  # as torchrun does
        if self.local:
            signals.end_with_launcher(int(job.job_id))
            os.environ |= {'RANK': str(job.global_rank), 'WORLD_SIZE': str(job.num_tasks)}
            os.environ |= {'LOCAL_RANK': str(job.local_rank)}
            os.environ |= {'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(self.port)}
            if self.gpus is not None:  # submitit would count from GPU 0
                os.environ['CUDA_VISIBLE_DEVICES'] = self.gpus

    def arguments(self, job_folder: Path) -> argparse.Namespace:
        """The main's arguments: with the job's folder if no other was given, and with its checkpoint if requeued."""
        from util import checkpoint

        args = copy.copy(self.args)
        args.output_dir = args.output_dir or job_folder
        again = self.requeued or int(os.environ.get('SLURM_RESTART_COUNT', '0'))
        if again and not getattr(args, 'eval', False) and checkpoint.any_in(args.output_dir):
            args.resume = 'auto'
        return args

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """submitit's hook ahead of a requeue. The training state is on the disk by now."""
        remove_unfinished(submitit.JobEnvironment().paths.submitted_pickle)
        self.requeued = True
        return submitit.helpers.DelayedSubmission(self)

    __submitit_checkpoint__ = checkpoint


def remove_unfinished(pickle: Path) -> None:
    """Remove what a kill has left of the writing of a pickle: submitit would stumble over it."""
    pickle.with_name(f'{pickle.name}.save_tmp').unlink(missing_ok=True)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(('127.0.0.1', 0))
        return sock.getsockname()[1]


# --------------------------------------------------------------------------
# from the command line to jobs


def parse(argv: list[str]) -> tuple[argparse.Namespace, dict[str, argparse.Namespace]]:
    """The launcher's own options, and {label: arguments of the main} of each job. Raises UserError for any mistake."""
    parser = get_args_parser()
    options, rest = parser.parse_known_args([config.underscored(word) for word in argv])
    options.ngpus = options.ngpus or (max(1, torch.cuda.device_count()) if options.local else 8)
    check_options(options)
    main_parser = MAINS[options.stage].get_args_parser()
    known = parser.flags | main_parser.flags
    for word in rest:
        if word.startswith('--') and word.partition('=')[0] not in known:
            raise UserError(f'unknown argument {word}{closest(word, known)}')
    jobs = {}
    for label, flags in variants(options, rest).items():
        main_parser = MAINS[options.stage].get_args_parser()
        main_parser.set_defaults(output_dir=None)  # the job's folder
        cores = config.usable_cores() // options.ngpus if options.local else options.cpus_per_task
        main_parser.set_defaults(num_workers=config.default_workers(config.MOST_WORKERS if cores is None else cores))
        if not options.local:
            main_parser.set_defaults(device='cuda')  # a machine that submits jobs need not have one
        jobs[label] = checked(options, main_parser.parse(flags, stage=options.stage), label)
    return options, jobs


def check_options(options: argparse.Namespace) -> None:
    """Raise UserError for what SLURM should not be asked."""
    if options.name is not None and not re.fullmatch(NAME, options.name):
        raise UserError(f'--name is made of letters, digits, and . _ - (100 at most), got {options.name!r}')
    for name in FREE_TEXT:
        text = getattr(options, name)
        if text is not None and not (text and text.isprintable()):
            raise UserError(f'--{name} must be one line of printable characters, got {text!r}')
    if options.timeout * 60 <= options.signal_delay_s:
        raise UserError(f'--timeout {options.timeout} min is not longer than --signal_delay_s {options.signal_delay_s}')
    if options.local and options.nodes > 1:
        raise UserError(f'--local is this machine alone: --nodes 1, not {options.nodes}')
    if re.search(r'%(?!j)', str(options.job_dir)):
        raise UserError(f'--job_dir {options.job_dir}: %j, the job id, is all that can be filled in')
    if not str(options.job_dir).isprintable():
        raise UserError(f'--job_dir must be one line of printable characters, got {str(options.job_dir)!r}')


def variants(options: argparse.Namespace, flags: list[str]) -> dict[str, list[str]]:
    """{label: flags} of each job of --array x --seeds; one job has no label."""
    given = {word.partition('=')[0] for word in flags}
    for own, other in (('array', '--config'), ('seeds', '--seed')):
        if getattr(options, own) and other in given:
            raise UserError(f'--{own} sets {other} of each job; give only one of the two')
    recipes = [(recipe.stem, ['--config', str(recipe)]) for recipe in options.array] or [('', [])]
    seeds = [(f'seed{seed}', ['--seed', str(seed)]) for seed in options.seeds] or [('', [])]
    pairs = list(itertools.product(recipes, seeds))
    jobs = {'-'.join(filter(None, (a, b))): [*flags, *first, *second] for (a, first), (b, second) in pairs}
    for label in jobs:
        if label and (label.startswith('.') or not re.fullmatch(NAME, label)):
            raise UserError(
                f'{label!r} of --array: the names of recipes, of letters, digits, and . _ -, become folders'
            )
    if len(jobs) < len(pairs):
        raise UserError('two of the jobs would have one name; --array and --seeds take each once')
    return jobs


def checked(options: argparse.Namespace, args: argparse.Namespace, label: str) -> argparse.Namespace:
    """The arguments, with absolute paths and folders of the job's own, after the checks that it would make first."""
    if args.model or not getattr(args, 'eval', False):  # the checkpoint may know it
        main_pretrain.find_method(args.model)
    if args.device not in ('cuda', 'cpu'):
        raise UserError(f'--device {args.device}: a job has its own GPUs; cuda or cpu')
    if options.stage == 'finetune' and not args.eval:
        main_finetune.check_probe(args)
    tasks = options.nodes * options.ngpus
    with submitit.helpers.environment_variables(RANK=0, WORLD_SIZE=tasks, LOCAL_RANK=0):  # as the job will find it
        config.check_common_args(argparse.Namespace(**{**vars(args), 'device': 'cpu'}))  # its GPUs are not here
        if not getattr(args, 'eval', False):
            config.check_schedule(args)
        optim.accumulation(args)
    given = vars(args) | ({'config': find_recipe(args.config)} if args.config else {})  # which may be a bare name
    paths = {key: value.absolute() for key, value in given.items() if isinstance(value, Path)}
    apart = {key: paths[key] / label for key in ('output_dir', 'log_dir') if key in paths}
    return argparse.Namespace(**{**vars(args), **paths, **apart})


# --------------------------------------------------------------------------
# from jobs to SLURM, or to this machine


def private_folder(job_dir: Path, several: bool) -> Path:
    """The absolute job folder, `%j` still in it; its part that exists from now on is ours alone to write in.

    Pickles in it are executed. Raises UserError where others could replace them.
    """
    folder = job_dir.resolve()
    if several and '%j' not in str(folder):
        folder /= '%j'
    root = submitit.core.utils.JobPaths.get_first_id_independent_folder(folder)
    os.umask(0o077)
    try:
        root.mkdir(parents=True, exist_ok=True)
        mode, above = root.stat().st_mode, root.parent.stat().st_mode
    except OSError as error:
        raise UserError(f'cannot make the job folder {root}: {error.strerror}') from error
    if mode & 0o022:
        raise UserError(f'--job_dir: {root} can be written by others ({stat.filemode(mode)}); chmod go-w it')
    if above & 0o022 and not above & stat.S_ISVTX:
        raise UserError(f'--job_dir: others could replace {root}, since they can write to the folder above it')
    return folder


def slurm_executor(folder: Path, options: argparse.Namespace, gpus: int, cpus: int) -> submitit.AutoExecutor:
    executor = submitit.AutoExecutor(folder, cluster='slurm', slurm_max_num_timeout=options.max_requeues)
    executor.update_parameters(
        name=options.name or options.stage,
        nodes=options.nodes,
        tasks_per_node=options.ngpus,
        gpus_per_node=gpus or None,
        cpus_per_task=cpus,
        mem_gb=options.mem_gb,
        timeout_min=options.timeout,
        stderr_to_stdout=True,
        slurm_signal_delay_s=options.signal_delay_s,
        # a rank that dies ends the others; since 22.05 srun no longer takes the CPUs over from sbatch
        slurm_srun_args=['--kill-on-bad-exit=1', f'--cpus-per-task={cpus}'],
        slurm_additional_parameters={'requeue': True},
        **{f'slurm_{name}': getattr(options, name) for name in FREE_TEXT},
    )
    return executor


def submit(executor: submitit.AutoExecutor, jobs: dict[str, Job], options: argparse.Namespace) -> None:
    """Queue the jobs, several as a SLURM array, and say where they are. Raises UserError with sbatch's own words."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # submitit prints what it also raises
            if len(jobs) == 1:
                queued = [executor.submit(job) for job in jobs.values()]
            else:
                with executor.batch():
                    queued = [executor.submit(job) for job in jobs.values()]
    except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
        raise UserError(f'SLURM refused: {error}{too_many_cpus(str(error), options)}') from error
    for label, job in zip(jobs, queued, strict=True):
        announce(label, job, jobs[label])
    tell_state(queued[0].job_id)


def too_many_cpus(error: str, options: argparse.Namespace) -> str:
    """What to change where SLURM's words are about CPUs, whose number nobody may have asked for."""
    if not re.search('processors|CPU count|node configuration', error):
        return ''
    tasks, cpus = options.ngpus, options.cpus_per_task
    return (
        f'; --ngpus {tasks} tasks of --cpus_per_task {cpus} take {tasks * cpus} CPUs of a machine: take fewer, '
        f'such as --cpus_per_task 2 with --num_workers 1'
    )


def announce(label: str, queued: submitit.Job, job: Job) -> None:
    """Three lines: id, folder of the checkpoints, log of rank 0."""
    console.say(f'job {queued.job_id}: {" ".join(filter(None, (job.stage, label)))}')
    console.say(f'  folder {job.args.output_dir or queued.paths.folder}')
    console.say(f'  log    {queued.paths.stdout}')


def tell_state(job_id: str) -> None:
    """Say whether a job, or the jobs of an array, have started. Raises UserError where waiting will not help.

    Sites without EnforcePartLimits accept requests that they cannot meet.
    """
    if not re.fullmatch(JOB_ID, job_id):
        raise UserError(f'{job_id!r} is no job id of SLURM: its state cannot be asked for')
    number, end = job_id.partition('_')[0], time.monotonic() + LOOK_S
    states = queue_states(number)
    while any(state == 'PENDING' for state, _ in states) and time.monotonic() < end:
        time.sleep(0.5)
        states = queue_states(number)
    for _, reason in states:
        if re.fullmatch(WILL_NOT_START, reason):
            raise UserError(f'job {number} will not start: {reason}; scancel {number}')
    told = ', '.join(sorted({f'{state} ({reason})' if state == 'PENDING' else state for state, reason in states}))
    console.say(f'  state  {told or "squeue does not show it"}')


def queue_states(number: str) -> list[tuple[str, str]]:
    """What squeue has of a job: (state, reason), several of an array; nothing if it does not answer."""
    command = ['squeue', '--noheader', '--jobs', number, '--format', '%T %r']
    try:
        shown = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [(state, reason) for state, _, reason in (line.partition(' ') for line in shown.splitlines())]


def run_here(folder: Path, options: argparse.Namespace, jobs: dict[str, Job], gpus: int) -> None:
    """Run the jobs one after the other; exits with 1 after the first that fails, with 75 if asked to stop."""
    for label, job in jobs.items():
        name = '-'.join(filter(None, ('local', time.strftime('%Y%m%d-%H%M%S'), str(os.getpid()), label)))
        executor = submitit.LocalExecutor(str(folder).replace('%j', name), max_num_timeout=options.max_requeues)
        executor.update_parameters(
            tasks_per_node=options.ngpus,
            gpus_per_node=gpus,
            timeout_min=options.timeout,
            signal_delay_s=options.signal_delay_s,
            stderr_to_stdout=True,
        )
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: a Ctrl-C must not make submitit kill its tasks
        started = executor.submit(job)
        stops = pass_on_stops(int(started.job_id))
        announce(label, started, job)
        follow(started)
        started.wait()
        if any(started.task(rank).exception() for rank in range(options.ngpus)):
            console.say(f'job {started.job_id} did not finish; its log {started.paths.stdout} says why', error=True)
            raise SystemExit(STOPPED if stops else 1)


def follow(job: submitit.Job) -> None:
    """Print what rank 0 writes to its log, as it comes, until the job ends."""
    log, shown, done = job.paths.stdout, 0, False
    while not done:
        done = job.done()
        if log.exists():
            with open(log, encoding='utf-8', errors='replace') as file:
                file.seek(shown)
                text = file.read()
                shown = file.tell()
            if text:
                console.say(text.removesuffix('\n'))
        if not done:
            time.sleep(0.5)


def pass_on_stops(controller: int) -> list[int]:
    """From now on requests to stop are noted in the returned list, and stop the job; submitit tells the tasks."""
    stops: list[int] = []

    def pass_on(number: int, frame) -> None:
        stops.append(number)
        with contextlib.suppress(ProcessLookupError):
            os.kill(controller, signal.SIGTERM)

    for number in set(signals.ASKING) - set(signals.IGNORED):
        signal.signal(number, pass_on)
    return stops


def try_here(options: argparse.Namespace, jobs: dict[str, argparse.Namespace]) -> None:
    """--dry_run: say what would be submitted, and try each job on one device of this machine. Nothing is written."""
    tasks = options.nodes * options.ngpus
    for label, args in jobs.items():
        with submitit.helpers.environment_variables(RANK=0, WORLD_SIZE=tasks, LOCAL_RANK=0):
            accum_iter = optim.accumulation(args)
            _, arithmetic = optim.scaled_lr(args, accum_iter)
        folder = args.output_dir or options.job_dir
        wishes = [f'{name} {value}' for name in FREE_TEXT if (value := getattr(options, name)) is not None]
        console.say(
            f'not submitted: {" ".join(filter(None, (options.stage, label)))} on {options.nodes} x {options.ngpus} '
            f'{args.device}, {", ".join([*wishes, f"{options.timeout} min a time"])}, up to '
            f'{options.max_requeues} times again; folder {folder}\n{arithmetic}\ntried here, as one rank:'
        )
        device = args.device if torch.cuda.is_available() else 'cpu'
        images = args.batch_size * accum_iter * tasks
        here = {'device': device, 'effective_batch_size': images, 'accum_iter': 1, 'output_dir': folder}
        estimate = MAINS[options.stage].main(argparse.Namespace(**vars(args) | here | {'world_size': None}))
        if estimate and device == args.device:
            hours, most = estimate.hours(tasks), options.timeout * (options.max_requeues + 1) / 60
            more = 'WARNING: more than' if hours > most else 'within'
            console.say(f'the job: {figure(hours)} h on {tasks} ranks as fast as here, {more} its {figure(most)} h')
        elif estimate:
            console.say(f'the job: its hours are not known, since there is no {args.device} here')


def main(argv: list[str]) -> None:
    """Check everything, then submit or run."""
    options, arguments = parse(argv)
    if any(args.dry_run for args in arguments.values()):
        return try_here(options, arguments)
    if not options.local and not (shutil.which('sbatch') and shutil.which('srun')):
        raise UserError('no sbatch on PATH: this machine cannot submit SLURM jobs; --local runs without SLURM')
    devices = {args.device for args in arguments.values()}
    if len(devices) > 1:
        raise UserError('jobs of one --array ask for the same: all --device cuda or all cpu')
    gpus = options.ngpus if devices == {'cuda'} else 0
    jobs = {label: Job(options.stage, args, options) for label, args in arguments.items()}
    folder = private_folder(options.job_dir, several=len(jobs) > 1)
    if options.local:
        run_here(folder, options, jobs, gpus)
    else:
        cpus = options.cpus_per_task = options.cpus_per_task or max(1, *(a.num_workers for a in arguments.values()))
        submit(slurm_executor(folder, options, gpus, cpus), jobs, options)


if __name__ == '__main__':
    run_main(lambda: main(sys.argv[1:]))
