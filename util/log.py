"""Running averages that never make the host wait, progress lines, `log.txt` and TensorBoard."""

import contextlib
import itertools
import json
import math
import re
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from util import console, digests, dist

FIRST = ('explained', 'knn', 'loss', 'lr', 'rank', 'test')  # what a curve's name begins with that is looked at first


def info(text: str) -> None:
    """Print on rank 0."""
    if dist.is_main():
        console.say(text)


def counted(number: int, noun: str) -> str:
    """'1 step', '2 steps'"""
    return f'{number} {noun}' + 's' * (number != 1)


def clock(seconds: float) -> str:
    """'1:02:03'"""
    seconds = int(seconds)
    return f'{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}'


def health(values: dict[str, float | None]) -> str:
    """What is wrong with a pretraining, and what that may come from, or that nothing is.

    `values`: `explained...` and `rank`, where there are any; the share of time `waiting_for_data`, and of all steps so
    far those `skipped`.
    """
    explained = {name: value for name, value in values.items() if name.startswith('explained')}
    waiting, skipped, rank = (values.get(name) for name in ('waiting_for_data', 'skipped', 'rank'))
    dead = [f'{name} is {share:.3f}' for name, share in explained.items() if not share > 0.01]
    wrong = [f'{", ".join(dead)}: no better a prediction than a constant'] if dead else []
    if rank is not None and not rank > 2:
        wrong.append(f'rank is {rank:.2f}: all images have nearly the same features')
    if waiting and waiting > 0.25:
        wrong.append(f'{waiting:.0%} of the time was spent waiting for data: more --num_workers, or smaller files')
    if skipped and skipped > 0.05:
        wrong.append(
            f'{skipped:.0%} of all steps were skipped, as their loss or gradient was not finite: a smaller --lr'
        )
    parts = [f'{name} {share:.3f}' for name, share in explained.items()]
    parts += [f'rank {rank:.1f}'] if rank is not None else []
    return (
        '; '.join(wrong)
        or f'nothing is wrong: {", ".join([*parts, f"{waiting or 0:.0%} of the time waiting for data"])}'
    )


class MetricLogger:
    """Averages over an epoch and over the steps since the last line.

    `update` only keeps references to device tensors; `read` fetches them all in one transfer, when a line is printed.
    Averages are over what is finite: skipped steps are counted on their own.
    """

    def __init__(
        self, header: str, first_step: int, steps: int, images_per_step: int, print_freq: int, device: torch.device
    ):
        self.header, self.first_step, self.steps = header, first_step, steps
        self.images_per_step, self.print_freq, self.device = images_per_step, print_freq, device
        self.pending: dict[str, list[Tensor]] = defaultdict(list)
        self.total: dict[str, float] = defaultdict(float)  # over the epoch, across resumes
        self.count: dict[str, int] = defaultdict(int)
        self.window: dict[str, list[float]] = defaultdict(list)  # since the last line
        self.latest: dict[str, float] = {}  # averages of the last line
        self.began = self.last_line = time.perf_counter()
        self.last_step = first_step
        self.waited = self.waited_before = 0.0  # seconds spent waiting for data since the last line, and before it

    def update(self, **values: Tensor) -> None:
        for name, value in values.items():
            self.pending[name].append(value.detach())

    def timed(self, batches: Iterable) -> Iterator:
        """The batches; the time spent in waiting for them is reported as the share of `data`."""
        data = iter(batches)
        while True:
            began = time.perf_counter()
            batch = next(data, None)
            self.waited += time.perf_counter() - began
            if batch is None:
                return
            yield batch

    def due(self, step: int) -> bool:
        """Whether a line follows optimiser step `step` (counted from 0)."""
        return (step + 1) % self.print_freq == 0 or step + 1 == self.steps

    def read(self) -> None:
        """Fetch what is pending, in one transfer. Syncs with the device."""
        if not self.pending:
            return
        values = iter(torch.cat([torch.stack(tensors).double() for tensors in self.pending.values()]).tolist())
        for name, tensors in self.pending.items():
            for value in itertools.islice(values, len(tensors)):
                self.window[name].append(value)
                finite = math.isfinite(value)
                self.total[name] += value if finite else 0.0
                self.count[name] += finite
        self.pending.clear()

    def observed(self, step: int, steps_ago: int) -> dict[str, list[float]]:
        """The values of one step: `steps_ago` before the last of the `step` steps made. Syncs with the device.

        The step must lie after the last printed line. Every step gives a name equally many values.
        """
        self.read()
        steps = step - self.last_step
        first = steps - 1 - steps_ago
        each = {name: len(values) // steps for name, values in self.window.items()}
        return {name: values[first * each[name] :][: each[name]] for name, values in self.window.items()}

    def line(self, step: int, lr: float, run_eta_s: float = 0.0, **counts: int) -> dict[str, float]:
        """Print the progress after optimiser step `step`; returns the averages since the last line, and the counts.

        `run_eta_s`: seconds to the end of the run. Counts, of the whole run, are printed once they are above zero.
        """
        self.read()
        self.latest = averages = {name: self._mean(values) for name, values in self.window.items()}
        self.window.clear()
        now = time.perf_counter()
        done = step + 1 - self.last_step
        per_step = (now - self.last_line) / done
        averages['images_per_s'] = self.images_per_step / per_step
        parts = [
            f'{self.header} [{step + 1:>{len(str(self.steps))}}/{self.steps}]',
            f'eta: {clock((self.steps - step - 1) * (now - self.began) / (step + 1 - self.first_step))}',
            f'run eta: {clock(run_eta_s)}',
            f'lr: {lr:.3g}',
            *(f'{name}: {self._format(value)}' for name, value in averages.items() if name != 'images_per_s'),
            f'images/s: {averages["images_per_s"]:.0f}',
            f'data: {100 * self.waited / (now - self.last_line):.0f}%',
            *(f'{name}: {count}' for name, count in counts.items() if count),
        ]
        if self.device.type == 'cuda':
            parts.append(f'max mem: {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB')
        if dist.is_main():
            console.say('  '.join(parts), fleeting=step + 1 < self.steps)  # a terminal shows the last one for good
        self.last_line, self.last_step = now, step + 1
        self.waited, self.waited_before = 0.0, self.waited_before + self.waited
        return averages | counts

    def timing(self) -> dict[str, float]:
        """Of the epoch in this process: seconds until now; images/s, share of waiting and memory of its training."""
        steps, training_s = self.last_step - self.first_step, self.last_line - self.began
        timing = {'time': round(time.perf_counter() - self.began, 3)}
        if steps:
            timing['images_per_s'] = round(steps * self.images_per_step / training_s, 1)
            timing['waiting_for_data'] = round(self.waited_before / training_s, 3)
        if self.device.type == 'cuda':
            timing['max_mem_mib'] = round(torch.cuda.max_memory_allocated() / 2**20)
        return timing

    def sums(self) -> dict[str, list[float]]:
        """{name: [total, count]} of the epoch over all ranks; every rank must call it."""
        self.read()
        names = sorted(self.total)
        table = torch.tensor([[self.total[n], self.count[n]] for n in names], dtype=torch.float64, device=self.device)
        return dict(zip(names, dist.all_reduce_sum(table).tolist(), strict=True))

    def averages(self) -> dict[str, float]:
        """The epoch's averages over all ranks; every rank must call it."""
        return {name: total / count if count else math.nan for name, (total, count) in self.sums().items()}

    def load_sums(self, sums: dict[str, list[float]]) -> None:
        """Continue from the `sums` of a checkpoint: those of all ranks, so rank 0 takes them, the others start at 0."""
        for name, (total, count) in sums.items():
            self.total[name], self.count[name] = (total, count) if dist.is_main() else (0.0, 0)

    @staticmethod
    def _mean(values: list[float]) -> float:
        finite = [value for value in values if math.isfinite(value)]
        return sum(finite) / len(finite) if finite else math.nan

    @staticmethod
    def _format(value: float) -> str:
        return f'{value:.4f}' if 1e-3 <= abs(value) < 1e5 else f'{value:.3g}'


class RunLog:
    """What rank 0 leaves to read: `log.txt`, one JSON object per epoch, and TensorBoard events.

    A resumed run repeats steps that were logged before the kill. So lines of `first_epoch` or later are dropped from
    `log.txt`, and events after `first_step_1000x`.
    """

    def __init__(self, output_dir: Path, log_dir: Path, first_epoch: int = 0, first_step_1000x: int = 0):
        self.file = self.writer = None
        if dist.is_main():
            from torch.utils.tensorboard import SummaryWriter  # takes seconds to import

            self.file, self.log_dir = output_dir / 'log.txt', log_dir
            threading.excepthook = report_but_for_events
            with self.writing_events():
                self.writer = SummaryWriter(str(log_dir), purge_step=first_step_1000x + 1)
            if self.file.is_file():
                lines = self.file.read_text(encoding='utf-8').splitlines(keepends=True)
                whole = [(line, re.search(r'"epoch": (\d+)\}$', line)) for line in lines]  # no match: torn by a kill
                kept = [line for line, match in whole if match and int(match[1]) < first_epoch]
                digests.replace(self.file, ''.join(kept).encode())

    @contextlib.contextmanager
    def writing_events(self) -> Iterator[None]:
        """Where events cannot be written, say so once: the run goes on without them."""
        try:
            yield
        except OSError as error:
            self.writer = None
            why = error.strerror or error
            info(
                f'WARNING: TensorBoard events cannot be written to {self.log_dir}: {why}; the run goes on without them'
            )

    def event(self, kind: str, *values, **options) -> None:
        """Have TensorBoard's writer, if there is one, do something by its name."""
        if self.writer is not None:
            with self.writing_events():
                getattr(self.writer, kind)(*values, **options)

    def scalars(self, epoch_1000x: int, **values: float) -> None:
        """TensorBoard scalars on MAE's axis: a thousandth of an epoch, whatever the batch size.

        `FIRST` have cards of their own; cards are sorted, so what else there is comes behind them.
        """
        for name, value in values.items():
            card = name if name.startswith(FIRST) else f'train/{name}'
            self.event('add_scalar', card, value, epoch_1000x)

    def arguments(self, args: dict, epoch_1000x: int) -> None:
        """The arguments of the run as a table, among TensorBoard's texts."""
        rows = ''.join(f'| {name} | {str(value).replace("|", chr(92) + "|")} |\n' for name, value in args.items())
        table = f'| argument | value |\n|---|---|\n{rows}'.encode(errors='backslashreplace').decode()
        self.event('add_text', 'arguments', table, epoch_1000x)

    def image(self, name: str, picture: np.ndarray, epoch_1000x: int) -> None:
        """A [H, W, 3] uint8 picture."""
        self.event('add_image', name, picture, epoch_1000x, dataformats='HWC')

    def flush(self) -> None:
        """Bring the events to the disk: a checkpoint must not be ahead of them."""
        self.event('flush')

    def epoch(self, **values) -> None:
        """A line of `log.txt`; not-a-number and infinity are written as null, which JSON has."""
        if self.file is not None:
            clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
            with open(self.file, 'a', encoding='utf-8') as file:
                file.write(json.dumps(clean) + '\n')
            self.flush()


def report_but_for_events(args: threading.ExceptHookArgs) -> None:
    """Python's report of an exception in a thread. TensorBoard's raises it again where `RunLog` meets it."""
    if not type(args.thread).__module__.startswith('tensorboard.'):
        threading.__excepthook__(args)
