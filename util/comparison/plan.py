"""What a comparison runs: of each method and seed a pretraining, and what judges it at some points on its way.

A job's name is its folder below `runs/`. Which commands there are is a function of what was asked for, so that a second
call finds what the first has done.
"""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from util.comparison.jobs import Job

PRETRAIN, FINETUNE, ANALYSE = 'main_pretrain.py', 'main_finetune.py', 'scripts/analyse.py'
KNN, PRETRAINED, RANDOM = 'knn', 'pretrain', 'random'
NEIGHBOURS = 20  # that vote
FORWARD = 1 / 3  # of the FLOPs of a step: what a network takes without its backward


class Method(NamedTuple):
    """A network, how it is pretrained and fine-tuned, and what that costs."""

    name: str
    model: str
    options: dict[str, str]  # given with the name
    recipes: list[str]
    pretrain: list[str]  # flags of main_pretrain.py
    finetune: list[str]  # flags of main_finetune.py
    network: list[str]  # flags that describe the pretrained network where there is no checkpoint
    crop_pct: float
    parameters: int  # of the network that is fine-tuned
    image_flops: float  # of pretraining, forward and backward
    finetune_flops: float  # of fine-tuning, forward and backward
    epoch_images: int  # that an epoch of pretraining sees
    epochs: int  # of pretraining, which the budget gives
    finetune_epochs: int  # with all labels
    batch: int  # images of a step of fine-tuning
    micro: int  # of these at a time

    def flops(self, epochs: int) -> float:
        """Of so many epochs of pretraining."""
        return self.image_flops * self.epoch_images * epochs

    def save_freq(self, points: int) -> int:
        return math.ceil(self.epochs / points)

    def points(self, count: int) -> list[int]:
        """The epochs after which a pretraining is judged: at most so many, equally spaced but for the last one."""
        every = self.save_freq(count)
        return [*range(every, self.epochs, every), self.epochs]


class Comparison(NamedTuple):
    """What was asked for."""

    data: dict  # what: str; train, val, classes: numbers
    budget: dict  # kind: epochs, flops or minutes; amount
    points: int  # at which each pretraining is judged
    finetune_points: int  # the last of these, where it is fine-tuned, too
    judge_images: int  # most of each split for k-NN and linear probe
    common: list[str]  # flags of all programs
    labelled: list[str]  # flags of those that read labels
    how: list[str]  # flags of all programs that decide no number
    labels: list[float]  # shares of the labels to fine-tune with
    seeds: list[int]
    random: bool  # whether random weights are judged, too
    methods: list[Method]
    runs: Path  # the folder of all runs

    def random_of(self) -> dict[str, Method]:
        """Of each method the first one with the same network and fine-tuning: its random weights serve all of them."""
        first: dict[tuple, Method] = {}
        return {
            method.name: first.setdefault((*method.network, *method.finetune), method)
            for method in self.methods
            if self.random
        }

    def jobs(self) -> list[Job]:
        """Everything, one seed of all methods before the next."""
        found: dict[str, Job] = {}
        for seed in self.seeds:
            for method in self.methods:
                found |= {job.name: job for job in self.jobs_of(method, seed)}
            for method in self.random_of().values():
                found |= {job.name: job for job in self.random_jobs(method, seed)}
        return [*found.values()]

    def jobs_of(self, method: Method, seed: int) -> Iterator[Job]:
        """A pretraining, and what judges it at each point."""
        name, points = f'{method.name}/seed-{seed}/{PRETRAINED}', method.points(self.points)
        flags = [*warm_up(method.epochs), *method.pretrain, '--epochs', method.epochs, '--vis_freq', method.epochs]
        flags += ['--save_freq', method.save_freq(self.points), '--keep_last', len(points)]
        yield self.job(name, PRETRAIN, flags, seed, method.flops(method.epochs), method.epochs)
        files = {epochs: self.runs / name / f'checkpoint-{epochs - 1}.pth' for epochs in points}
        networks = ['--checkpoint', *(f'{epochs}={file}' for epochs, file in files.items())]
        yield self.knn(f'{method.name}/seed-{seed}', method, seed, networks, len(points), (name,))
        for epochs in points[-self.finetune_points :]:
            where, start = f'{method.name}/seed-{seed}/epoch-{epochs}', ['--finetune', files[epochs]]
            yield from self.finetuned(where, method, seed, start, (name,))

    def random_jobs(self, method: Method, seed: int) -> Iterator[Job]:
        """What judges the same network with random weights."""
        where = f'{RANDOM}/{method.name}/seed-{seed}'
        yield self.knn(where, method, seed, ['--checkpoint', RANDOM, *method.network], 1)
        # a rate that falls from layer to layer is for layers that have learnt something
        yield from self.finetuned(where, method, seed, ['--layer_decay', 1])

    def knn(
        self, where: str, method: Method, seed: int, networks: list, count: int, after: tuple[str, ...] = ()
    ) -> Job:
        """k-NN and linear probe of some networks."""
        images = sum(min(self.data[split], self.judge_images) for split in ('train', 'val'))
        flags = [KNN, *networks, '--crop_pct', method.crop_pct, '--images', self.judge_images, '--k', NEIGHBOURS]
        cost = FORWARD * method.finetune_flops * images * count
        return self.job(f'{where}/{KNN}', ANALYSE, flags, seed, cost, after=after)

    def finetuned(
        self, where: str, method: Method, seed: int, start: list, after: tuple[str, ...] = ()
    ) -> Iterator[Job]:
        """Fine-tuning with each share of the labels; of its checkpoints the last one is kept."""
        for share in self.labels:
            epochs, batch = self.passes(method, share)
            flags = [*warm_up(epochs), *method.finetune, *start, '--epochs', epochs, '--test_freq', epochs]
            flags += ['--label_share', f'{share:g}', '--save_freq', epochs, '--keep_last', 1]
            flags += step_words(batch, method.micro) if batch < method.batch else []
            cost = method.finetune_flops * (epochs * share * self.data['train'] + FORWARD * self.data['val'])
            yield self.job(f'{where}/labels-{share:g}', FINETUNE, flags, seed, cost, epochs, after)

    def passes(self, method: Method, share: float) -> tuple[int, int]:
        """Epochs and images of a step with a share of the labels: as many steps as with all of them."""
        labelled = max(self.data['classes'], round(share * self.data['train']))
        batch = step_images(method.batch, method.micro, labelled)
        steps = method.finetune_epochs * max(1, self.data['train'] // method.batch)
        return max(1, round(steps / (labelled // batch))), batch

    def job(
        self, name: str, program: str, flags: list, seed: int, cost: float, epochs: int = 0, after: tuple[str, ...] = ()
    ) -> Job:
        folder = self.runs / name
        words = [program, *flags, *self.common, *(self.labelled if program != PRETRAIN else ()), '--seed', seed]
        words += ['--output_dir', folder, *(['--resume', 'auto'] if epochs else ())]
        share = epoch_share(folder, epochs) if epochs else None
        return Job(name, [str(word) for word in words], after, cost, share, tuple(self.how))


def warm_up(epochs: int) -> list:
    """A tenth; what stands behind it in a command goes before."""
    return ['--warmup_epochs', f'{epochs / 10:g}']


def step_images(batch: int, micro: int, images: int) -> int:
    """Of a step, if there are so many images: at most `batch`, whole micro-steps, an even number, as mixup needs."""
    most = min(batch, images)
    most -= most % 2 if most > 1 else 0
    return most - most % min(micro, most)


def step_words(batch: int, micro: int) -> list[str]:
    """The flags for so many images in a step, whatever a recipe accumulates."""
    return ['--batch_size', str(min(batch, micro)), '--accum_iter', '1', '--effective_batch_size', str(batch)]


def epoch_share(folder: Path, epochs: int) -> Callable[[], float]:
    return lambda: len(read_log(folder)) / epochs


def read_log(folder: Path) -> list[dict]:
    """The lines of a run's log.txt, one for each epoch that has ended; of epochs that were run again, the last."""
    try:
        lines = [json.loads(line) for line in (folder / 'log.txt').read_text(encoding='utf-8').splitlines()]
    except (OSError, ValueError):  # none yet, or a line that is being written
        return []
    return [*{line['epoch']: line for line in lines}.values()]
