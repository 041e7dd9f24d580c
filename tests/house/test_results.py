"""docs/results.md has the numbers that were measured, and the recipes what was chosen by them."""

import json
import re

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
