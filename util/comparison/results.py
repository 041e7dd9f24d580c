"""What the runs of a comparison have found, as plain data that the report is made of."""

import json
import shlex
import statistics
from pathlib import Path

from util.comparison.jobs import Outcome
from util.comparison.plan import KNN, Comparison, Method, read_log


def collected(comparison: Comparison, outcomes: dict[str, Outcome]) -> dict:
    """Of every method and seed the curve of its pretraining, its scores at each point, its cost and its commands."""
    random_of = comparison.random_of()
    return {
        'data': comparison.data,
        'budget': comparison.budget,
        'points': comparison.points,
        'judge_images': comparison.judge_images,
        'labels': comparison.labels,
        'seeds': comparison.seeds,
        'finetune_epochs': max((method.finetune_epochs for method in comparison.methods), default=0),
        'cpu_h': sum(outcome.cpu_s for outcome in outcomes.values()) / 3600,
        'finished': all(job.name in outcomes and outcomes[job.name].state == 'done' for job in comparison.jobs()),
        'methods': [
            {
                'name': method.name,
                'model': method.model,
                'options': method.options,
                'recipes': method.recipes,
                'parameters': method.parameters,
                'epochs': method.epochs,
                'flops': {
                    'image': method.image_flops,
                    'pretrain': method.flops(method.epochs),
                    'finetune_image': method.finetune_flops,
                },
                'random': random_of[method.name].name if comparison.random else None,
                'runs': [run(comparison, method, seed, outcomes) for seed in comparison.seeds],
            }
            for method in comparison.methods
        ],
        'random': {
            method.name: {'runs': [random_run(comparison, method, seed, outcomes) for seed in comparison.seeds]}
            for method in random_of.values()
        },
    }


def run(comparison: Comparison, method: Method, seed: int, outcomes: dict[str, Outcome]) -> dict:
    """A pretraining of one seed."""
    jobs = [*comparison.jobs_of(method, seed)]
    name = jobs[0].name
    log, folder = read_log(comparison.runs / name), comparison.runs / name
    speeds = [line['images_per_s'] for line in log if line.get('images_per_s')]
    speed = statistics.median(speeds) if speeds else None  # a resumed epoch knows its second part alone
    of_gpu = max((line.get('max_mem_mib', 0) for line in log), default=0) * 2**20
    judged = frozen(folder.parent)
    points = [
        {
            'epochs': epochs,
            'flops': method.flops(epochs),
            'minutes': minutes(method, epochs, speed) if len(log) >= epochs else None,
            **judged.get(str(epochs), {}),
            'finetune': finetuned(comparison, folder.parent / f'epoch-{epochs}'),
        }
        for epochs in method.points(comparison.points)
    ]
    pictures = sorted(folder.glob('pictures-*.png'), key=lambda path: int(path.stem.rpartition('-')[2]))
    return {
        'seed': seed,
        **state(jobs, outcomes),
        'curve': [curve_point(line) for line in log],
        'images_per_s': speed,
        'memory': of_gpu or (outcomes[name].peak_bytes if name in outcomes else None),
        'minutes': minutes(method, len(log), speed),
        'points': points,
        'pictures': str(pictures[-1].relative_to(comparison.runs.parent)) if pictures else None,
        'commands': [shlex.join(['python', *job.command, *job.how]) for job in jobs],
    }


def minutes(method: Method, epochs: int, speed: float | None) -> float | None:
    """Of so many epochs of pretraining, at so many images a second."""
    return epochs * method.epoch_images / speed / 60 if speed else None


def random_run(comparison: Comparison, method: Method, seed: int, outcomes: dict[str, Outcome]) -> dict:
    """A network with random weights."""
    jobs = [*comparison.random_jobs(method, seed)]
    folder = (comparison.runs / jobs[0].name).parent
    return {
        'seed': seed,
        **state(jobs, outcomes),
        **next(iter(frozen(folder).values()), {}),
        'finetune': finetuned(comparison, folder),
        'minutes': sum(outcomes[job.name].seconds for job in jobs if job.name in outcomes) / 60,
        'commands': [shlex.join(['python', *job.command, *job.how]) for job in jobs],
    }


def state(jobs: list, outcomes: dict[str, Outcome]) -> dict:
    """Of some jobs together: done if all are, else what the first one of the others is."""
    found = [outcomes.get(job.name, Outcome('waiting')) for job in jobs]
    worst = next((outcome for outcome in found if outcome.state == 'failed'), None)
    worst = worst or next((outcome for outcome in found if outcome.state != 'done'), Outcome('done'))
    return {'state': worst.state, 'why': worst.why}


def frozen(folder: Path) -> dict[str, dict]:
    """Of each network in a study of neighbours its top-1 in percent, by k-NN and linear probe, and its rank."""
    try:
        found = json.loads((folder / KNN / f'{KNN}.json').read_bytes())['checkpoints']
    except (OSError, ValueError):  # not there yet
        return {}
    last = {network['name']: network['layers'][-1] for network in found}
    return {
        name: {
            'knn': next(iter(layer['knn'].values()))['top1'],
            'probe': layer['probe']['top1'],
            'rank': layer['rankme'],
        }
        for name, layer in last.items()
    }


def finetuned(comparison: Comparison, folder: Path) -> dict[str, float]:
    """Top-1 in percent for each share of labels: the last epoch's, so that no image of validation chose it.

    Of averaged weights, where a recipe keeps them.
    """
    logs = {f'{share:g}': read_log(folder / f'labels-{share:g}') for share in comparison.labels}
    ended = {share: log[-1] for share, log in logs.items() if log and 'test_acc1' in log[-1]}
    return {share: line.get('test_ema_acc1', line['test_acc1']) for share, line in ended.items()}


def curve_point(line: dict) -> dict:
    """An epoch of a pretraining, counted from 1; where several parts of it explain something, the first."""
    explained = next((value for key, value in line.items() if key.startswith('train_explained')), None)
    return {'epoch': line['epoch'] + 1, 'loss': line.get('train_loss'), 'explained': explained}
