"""docs/results.md has the numbers that were measured, and the recipes what was chosen by them."""

import json
import re

import pytest
from recipes import resolve
from training import ROOT

from scripts.compare import SHORT
from util.comparison import scores

PAGE = (ROOT / 'docs/results.md').read_text(encoding='utf-8')
RESULTS = ROOT / 'docs/results'
RATES = ('1e-3', '2.5e-3', '6e-3')


def numbers(name: str) -> dict:
    return json.loads((RESULTS / f'{name}.json').read_text(encoding='utf-8'))


def test_comparison():
    """The table and the sentences are those that the command wrote."""
    found = numbers('comparison')
    assert found['finished']
    assert [method['name'] for method in found['methods']] == [*SHORT]
    assert scores.markdown(found).strip() in PAGE
    for hours in (f'{found["wall_h"]:.1f} hours', f'{found["cpu_h"]:.1f} hours of CPU time'):
        assert hours in PAGE


QUESTIONS = (  # in words, of which file, and the two that are compared
    ("LocalMIM's Swin: both slips mended against published", 'coordinates', 1, 0),
    ('MixMAE: paired with itself against mixed', 'pairing', 1, 0),
    ('MIRL, 4 segments: 24 blocks against 12', 'depth', 1, 0),
    ('MIRL, 2 segments: 24 blocks against 12', 'depth', 3, 2),
    ('MIRL, 12 blocks: 4 segments against 2', 'depth', 0, 2),
    ('MIRL, 24 blocks: 4 segments against 2', 'depth', 1, 3),
)


def pairs(name: str, one: int, other: int) -> list[tuple[list[float], list[float]]]:
    """By each way of judging the seeds' top-1 of two methods of a file."""
    found = numbers(name)
    arms = [found['methods'][i] for i in (one, other)]
    return [tuple(scores.scored(found, arm, way)[0] for arm in arms) for way in scores.ways(found)]


@pytest.mark.parametrize(('words', 'name', 'one', 'other'), QUESTIONS)
def test_differences(words, name, one, other):
    """Of two means, bold where each seed of the one is above each of the other."""
    cells = []
    for a, b in pairs(name, one, other):
        points = f'{round(scores.mean(a) - scores.mean(b), 1) + 0.0:+.1f}'
        cells.append(f'**{points}**' if scores.order(a, b) else points)
    assert f'| {words} | {" | ".join(cells)} |' in PAGE


@pytest.mark.parametrize('name', ['coordinates', 'pairing', 'depth'])
def test_questions(name):
    """The tables are those that the command wrote."""
    found = numbers(name)
    assert found['finished']
    assert found['seeds'] == [0, 1, 2]
    assert scores.markdown(found).partition('\n\n')[0] in PAGE


def test_merging_order_and_pairing():
    """What the page says of them in words."""
    for top1 in numbers('coordinates')['merging_order_mended'].values():
        assert f'{scores.text(top1)} %' in PAGE
    largest = max(abs(x - y) for a, b in pairs('pairing', 1, 0) for x, y in zip(a, b, strict=True))
    assert f'no score of any seed differs by more than {largest:.2f} points' in re.sub(r'\s+', ' ', PAGE)


def test_more_epochs():
    """Of the runs that had ended, by each way of judging; and the range of random weights."""
    runs, random = numbers('epochs')['methods'][0]['runs'], numbers('comparison')['random']['simmim_vit']['runs']
    points = [run['points'][-1] for run in runs if run['state'] == 'done']
    ended = [point['finetune']['0.2'] for point in points]
    for words, way in (('fine-tunes to {} %', ended), ('linear probe ({})', 'probe'), ('k-NN ({})', 'knn')):
        top1 = way if way is ended else [point[way] for point in points]
        assert words.format(' and '.join(f'{number:.1f}' for number in top1)) in PAGE
    tuned = [run['finetune']['0.2'] for run in random]
    assert f'above all random weights ({min(tuned):.1f} to {max(tuned):.1f} %)' in PAGE
    assert min(ended) > max(tuned)


def test_rates():
    """The best mean of k-NN and probe, where it is more than half a point above that of the middle rate."""
    found = numbers('rates')
    runs = {method['name']: method['runs'][0] for method in found['methods']}
    for name, model in SHORT.items():
        trials = [runs[f'{name}-{rate}'] for rate in RATES]
        judged = [[trial['points'][-1][way] for trial in trials] for way in ('knn', 'probe')]
        explained = [trial['curve'][-1]['explained'] for trial in trials]
        cells = [*(f'{top1:.1f}' for way in judged for top1 in way), *(f'{share:.3f}' for share in explained)]
        assert f'| {name} | {" | ".join(cells)} |' in PAGE
        means = [sum(both) / 2 for both in zip(*judged, strict=True)]
        best = RATES[means.index(max(means))] if max(means) > means[1] + 0.5 else RATES[1]
        args = resolve(f'{model}_cifar10_pretrain')
        assert args.blr * args.batch_size / 256 == float(best)
    assert f'took {found["cpu_h"]:.2f} hours of CPU time' in re.sub(r'\s+', ' ', PAGE)
