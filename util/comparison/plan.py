"""What a comparison runs: of each method and seed a pretraining, and what judges it at some points on its way.

A job's name is its folder below `runs/`. Which commands there are is a function of what was asked for, so that a second
call finds what the first has done.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from util.comparison.jobs import Job

PRETRAIN, FINETUNE, ANALYSE = 'main_pretrain.py', 'main_finetune.py', 'scripts/analyse.py'
NEIGHBOURS = 20  # that vote
FORWARD = 1 / 3  # of the FLOPs of a step: what a network takes without its backward
KNN = 'knn'  # and linear probe


class Method(NamedTuple):
    """A network, how it is pretrained and fine-tuned, and what that costs."""

    name: str
    model: str
    options: dict[str, str]  # given with the name
    recipes: list[str]
    pretrain: list[str]  # flags of main_pretrain.py
    finetune: list[str]  # flags of main_finetune.py
    network: list[str]  # flags that describe the network where there is no checkpoint
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
        return max(1, round(self.epochs / points))

    def points(self, count: int) -> list[int]:
        """The epochs after which a pretraining is judged: the last one, and those before it as evenly as can be."""
        every = self.save_freq(count)
        return [*[*range(every, self.epochs, every)][: count - 1], self.epochs]

    def saved(self, points: int) -> int:
        """How many numbered checkpoints a pretraining leaves."""
        return -(-self.epochs // self.save_freq(points))


class Comparison(NamedTuple):
    """What was asked for."""

    data: dict  # what: str; train, val, classes: numbers
    budget: dict  # kind: epochs, flops or minutes; amount
    points: int  # at which each pretraining is judged
    judge_images: int  # most of each split for k-NN and linear probe
    common: list[str]  # flags of all programs
    labelled: list[str]  # flags of those that read labels
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
                found |= {job.name: job for job in self.judged(method, seed, None)}
        return [*found.values()]

    def jobs_of(self, method: Method, seed: int) -> Iterator[Job]:
        """A pretraining, and what judges it."""
        name, every = f'{method.name}/seed-{seed}/pretrain', method.save_freq(self.points)
        flags = ['--epochs', method.epochs, '--warmup_epochs', f'{method.epochs / 10:g}', '--vis_freq', method.epochs]
        flags += ['--save_freq', every, '--keep_last', method.saved(self.points)]
        yield self.job(name, PRETRAIN, [*method.pretrain, *flags], seed, method.flops(method.epochs), method.epochs)
        for epochs in method.points(self.points):
            yield from self.judged(method, seed, epochs)

    def judged(self, method: Method, seed: int, epochs: int | None) -> Iterator[Job]:
        """k-NN and linear probe, and fine-tuning with each share of labels: after so many epochs, or random weights."""
        pretrained = f'{method.name}/seed-{seed}/pretrain'
        after = (pretrained,) if epochs else ()
        where = f'{method.name}/seed-{seed}/epoch-{epochs}' if epochs else f'random/{method.name}/seed-{seed}'
        file = self.runs / pretrained / f'checkpoint-{(epochs or 0) - 1}.pth'

        images = sum(min(self.data[split], self.judge_images) for split in ('train', 'val'))
        of = ['--checkpoint', f'network={file}'] if epochs else ['--checkpoint', 'random', *method.network]
        flags = [KNN, *of, '--crop_pct', method.crop_pct, '--images', self.judge_images, '--k', NEIGHBOURS]
        yield self.job(f'{where}/{KNN}', ANALYSE, flags, seed, FORWARD * method.finetune_flops * images, after=after)

        start = ['--finetune', file] if epochs else ['--layer_decay', 1]
        for share in self.labels:
            passes, batch = self.passes(method, share)
            seen = passes * round(share * self.data['train']) + FORWARD * self.data['val']
            flags = [*method.finetune, *start, '--epochs', passes, '--warmup_epochs', f'{passes / 10:g}']
            flags += [*batch_words(batch, method.micro), '--label_share', f'{share:g}', '--test_freq', passes]
            cost = method.finetune_flops * seen
            yield self.job(f'{where}/labels-{share:g}', FINETUNE, flags, seed, cost, passes, after)

    def passes(self, method: Method, share: float) -> tuple[int, int]:
        """Epochs and images of a step with a share of the labels: as many steps as with all of them."""
        labelled = max(self.data['classes'], round(share * self.data['train']))
        batch = fitting(method.batch, method.micro, labelled)
        steps = method.finetune_epochs * max(1, self.data['train'] // method.batch)
        return max(1, round(steps / (labelled // batch))), batch

    def job(
        self, name: str, program: str, flags: list, seed: int, cost: float, epochs: int = 0, after: tuple[str, ...] = ()
    ) -> Job:
        folder = self.runs / name
        words = [program, *flags, *self.common, *(self.labelled if program != PRETRAIN else ()), '--seed', seed]
        words += ['--output_dir', folder, *(['--resume', 'auto'] if epochs else ())]
        return Job(name, [str(word) for word in words], after, cost, epoch_share(folder, epochs) if epochs else None)


def fitting(batch: int, micro: int, images: int) -> int:
    """The images of a step, at most so many, as whole micro-steps."""
    most = min(batch, images)
    return most - most % micro if most > micro else most


def batch_words(batch: int, micro: int) -> list:
    """The flags for so many images in a step."""
    return ['--batch_size', batch] if batch <= micro else ['--batch_size', micro, '--effective_batch_size', batch]


def epoch_share(folder: Path, epochs: int) -> Callable[[], float]:
    return lambda: len(read_log(folder)) / epochs


def read_log(folder: Path) -> list[dict]:
    """The lines of a run's log.txt, one for each epoch that has ended; of epochs that were run again, the last."""
    try:
        lines = [json.loads(line) for line in (folder / 'log.txt').read_text(encoding='utf-8').splitlines()]
    except (OSError, ValueError):  # none yet, or a line that is being written
        return []
    return [*{line['epoch']: line for line in lines}.values()]
