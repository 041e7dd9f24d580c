"""The page of a comparison: its numbers by hand, what it says of them, and that it needs nothing but itself."""

import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from util.comparison import charts, report, scores

NASTY = 'c<b>&"d|e\'</script>'
SEEDS = {  # top-1 of fine-tuning, of three seeds
    'first': [50.0, 50.5, 51.0],
    'close': [49.0, 49.8, 50.5],
    'far': [40.0, 41.0, 42.0],
    NASTY: [30.0, 30.5, 31.0],
}

pytestmark = pytest.mark.xdist_group('report')  # one test process, so that `written` is made once


def run(seed: int, top1: float, **more) -> dict:
    """Half of the budget took one minute, and gave half of the score."""
    points = [
        {'epochs': 2 * n, 'flops': n * 2e12, 'minutes': n, 'knn': top1 / 4 * n, 'probe': 9.0, 'rank': 3.5}
        | {'finetune': {'0.1': top1 / 4 * n, '1': top1 / 2 * n}}
        for n in (1, 2)
    ]
    curve = [{'epoch': epoch, 'loss': 1 / epoch, 'explained': 0.1 * epoch} for epoch in (1, 2, 3, 4)]
    told = {'images_per_s': 100.0, 'memory': 2e9, 'minutes': 2.0, 'pictures': None, 'commands': [f'python {seed} < x']}
    return {'seed': seed, 'state': 'done', 'why': '', 'curve': curve, 'points': points} | told | more


def results(**seeds: list[float]) -> dict:
    """A finished comparison. Random weights: 41 to 43 by fine-tuning, 9 by the probe, 1 to 3 by k-NN."""
    random = [{'seed': s, 'state': 'done', 'finetune': {'0.1': 5.0 + s, '1': 41.0 + s}} for s in range(3)]
    random = [of_seed | {'knn': 1.0 + s, 'probe': 9.0, 'commands': []} for s, of_seed in enumerate(random)]
    methods = [
        {'name': name, 'model': 'net', 'options': {'depth': 2}, 'recipes': ['a.yaml'], 'parameters': 12345}
        | {'epochs': 4, 'flops': {'image': 1e8, 'pretrain': 4e12}, 'random': 'net'}
        | {'runs': [run(seed, top1) for seed, top1 in enumerate(of_method)]}
        for name, of_method in (seeds or SEEDS).items()
    ]
    about = {
        'data': {'what': '<i>', 'train': 10000, 'val': 500, 'classes': 3},
        'budget': {'kind': 'epochs', 'amount': 4},
    }
    about |= {'points': 2, 'labels': [0.1, 1.0], 'seeds': [0, 1, 2], 'finished': True, 'versions': {'torch': '2'}}
    return about | {'methods': methods, 'random': {'net': {'runs': random}}}


class Page(HTMLParser):
    """Its tags, its text, and what it links to; tags are closed in order."""

    def __init__(self, html: str):
        super().__init__()
        self.tags, self.text, self.links, self.open = [], '', [], []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ('src', 'href', 'xlink:href')]
        if tag not in ('meta', 'wbr', 'img'):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.links += [value for name, value in attributes if name in ('src', 'href', 'xlink:href')]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


# --------------------------------------------------------------------------
# verdicts


@pytest.mark.parametrize(
    ('a', 'b', 'expected'),
    [
        ([4, 5, 6], [1, 2, 3], 1),
        ([1, 2, 3], [4, 5, 6], -1),
        ([2, 3, 4], [1, 2, 3], 0),
        ([3, 4, 5], [1, 2, 3], 0),
        ([8, 9], [1, 2, 3], 0),
        ([], [], 0),
    ],
)
def test_told_apart(a, b, expected):
    """Ranges that touch are not, nor are two seeds."""
    assert scores.order(a, b) == expected


def test_verdict():
    tenth, tuned, probe, _ = scores.verdicts(results())
    assert tuned[:3] == ('fine-tuned, all labels', ['first'], '50.5 ± 0.5')
    assert (tuned.told, tuned.equal) == (['far', NASTY], ['close'])
    assert (tuned.above, tuned.unclear, tuned.below, tuned.unknown) == (['first', 'close'], ['far'], [NASTY], [])
    assert tenth.above == list(SEEDS)
    assert probe.unclear == list(SEEDS)
    said = dict(scores.sentences(results()))
    assert said['fine-tuned, all labels'] == (
        'first has the highest mean (50.5 ± 0.5 %), not told apart from close. Better than random weights: first, '
        f'close. Not told apart from random weights: far. Worse than random weights: {NASTY}.'
    )
    assert said['fine-tuned, 10 % of labels'].endswith('Better than random weights: every method.')


def test_what_must_be_known_first():
    """What chance gives, ties, methods that have learnt nothing, and random weights that nothing beats."""
    assert scores.doubts(results()) == []
    found = results(first=[50, 50.5, 51], second=[50.5, 50.5, 50.5])
    found['data'] |= {'val': 20, 'largest': 60.0}
    for of_seed in found['methods'][1]['runs']:
        of_seed['curve'][-1]['explained'] = 0.0
    chance, idle = scores.doubts(found)
    assert chance == 'Always naming the largest class gives 60.0 %. One validation image is 5 points.'
    assert 'of what was hidden: second. ' in idle
    found['judge_images'] = 10
    assert scores.doubts(found)[0].endswith('is 5 points, and 10 by linear probe and k-NN, which take 10.')
    said = dict(scores.sentences(found))
    assert said['k-NN'].startswith('first and second have the same mean, the highest (25.2 ± 0.2 %).')
    assert scores.overall(found).startswith('first has the highest mean by every way of judging. ')
    for of_seed in found['random']['net']['runs']:
        of_seed['knn'] = 70.0
    assert 'Random weights are higher than all: those of net, 70.0 ± 0.0 %.' in dict(scores.sentences(found))['k-NN']


def test_what_is_not_known_yet():
    """No verdict on random weights while some scores lack; a first epoch far below the mean does not flatten curves."""
    found = results()
    assert scores.overall(found).endswith('No method beats random weights by every way of judging.')
    del found['random']['net']['runs'][:]
    assert scores.overall(found) == 'first has the highest mean by every way of judging.'
    found['methods'][0]['runs'][0]['curve'][0]['explained'] = -4.0
    assert charts.curve(found['methods'][0], 'explained')[1][0] == pytest.approx((charts.FLOOR + 0.1 + 0.1) / 3)


def test_told_apart_from_all():
    found = results(first=[50, 50.5, 51], second=[40, 41, 42])
    assert dict(scores.sentences(found))['k-NN'].startswith('first is best (25.2 ± 0.2 %), told apart from all others.')


@pytest.mark.parametrize(('seeds', 'odds'), [(3, 10), (4, 35), (5, 126)])
def test_chance(seeds, odds):
    """All orders of 2n seeds are as likely: 2 of them in (2n over n) are told apart."""
    rule = scores.rule(results() | {'seeds': list(range(seeds))})
    assert f'one of {odds} comparisons. Were all equal, about {16 / odds:.0f} of the 16' in rule


def test_a_budget_that_was_not_reached():
    """Only scores at its end are compared."""
    found = results()
    found['methods'][0]['runs'][0]['points'].pop()
    assert scores.verdicts(found)[1].above == ['close']
    assert scores.table(found)[1][4] == '50.8 ± 0.4 (2)'


def test_table():
    header, first, *_ = scores.table(results())
    assert header[:5] == ['method', 'epochs', 'fine-tuned, 10 % of labels', 'random', 'fine-tuned, all labels']
    assert first[:6] == ['first', '4', '25.2 ± 0.2', '6.0 ± 1.0', '50.5 ± 0.5', '42.0 ± 1.0']
    assert first[6:] == ['9.0 ± 0.0', '9.0 ± 0.0', '25.2 ± 0.2', '2.0 ± 1.0']
    assert 'random' not in scores.table(results() | {'random': {}})[0]


def test_markdown():
    """Bold, starred, and with the cells that its header has, whatever is in a name."""
    lines = scores.markdown(results()).splitlines()
    assert '| **50.5 ± 0.5** |' in lines[2]
    assert '| 49.8 ± 0.8 \\* |' in lines[3]
    assert {line.replace('\\|', '').count('|') for line in lines[:6]} == {11}


# --------------------------------------------------------------------------
# the page


@pytest.fixture(scope='module')
def written(tmp_path_factory):
    """The folder of a page with everything in it."""
    folder, found = tmp_path_factory.mktemp('comparison'), results()
    Image.fromarray(np.zeros((50, 2000, 3), np.uint8)).save(folder / 'seen.png')
    found['methods'][1]['runs'][0]['pictures'] = 'lost.png'
    found['methods'][1]['runs'][1]['pictures'] = 'seen.png'
    report.write(found, folder)
    return folder


def test_page(written):
    """Whole, escaped, light, and without a link to anything outside."""
    html = (written / 'report.html').read_text()
    page = Page(html)
    assert len(html) < 500_000
    assert not {'script', 'link', 'i', 'iframe'} & {*page.tags}
    assert all(link.startswith(('data:image/webp;', '#')) for link in page.links)
    assert all(name in page.text for name in SEEDS)
    assert NASTY not in html
    assert (page.tags.count('svg'), page.tags.count('img')) == (19, 1)
    assert 'close, seed 1' in page.text
    assert 'python 0 < x' in page.text
    assert 'Runs that are not done' not in page.text
    with Image.open(written / 'figures/pictures-1.webp') as copy:
        assert copy.width == charts.PICTURE
    files = {path.name for path in (written / 'figures').iterdir()}
    assert {'comparison.png', 'gains.png', 'labels.svg', 'knn-flops.svg', 'loss-3.svg', 'explained.svg'} <= files


def test_cost_of_a_point():
    """4 TFLOPs and 2 minutes for 8.5 points; in brackets if not told apart; none gained costs nothing that is known."""
    found = results(first=[50, 50.5, 51], close=[42, 43, 44], less=[40, 41, 42])
    rows = report.costs(found, {}).split('<tr>')[2:]
    assert ['471 G</td><td>0.235' in rows[0], '(4 T)</td><td>(2)' in rows[1], '-</td><td>-' in rows[2]] == [True] * 3


def test_runs_that_are_not_done():
    """Of the same reason in one row, random weights among them."""
    found = results()
    for of_method in found['methods'][0]['runs'], found['random']['net']['runs']:
        for of_seed in of_method:
            of_seed |= {'state': 'failed', 'why': 'error: <b>'}
    page = Page(report.failures(found))
    assert page.text.count('error: <b>') == 2
    assert '0, 1, 2failed' in page.text
    assert 'random weights of net' in page.text


@pytest.mark.parametrize(
    'found',
    [
        {},
        {'methods': [{'name': 'x'}, {'runs': [None, {}, {'points': [None, {}], 'curve': [{}]}]}], 'random': None},
        results(alone=[float('nan')]) | {'labels': None, 'seeds': [0], 'random': {'net': None}, 'finished': False},
    ],
    ids=['nothing', 'nulls', 'alone'],
)
def test_unfinished(tmp_path, found):
    """Whatever is missing, and without a figure that would be empty."""
    report.write(found, tmp_path)
    page = Page((tmp_path / 'report.html').read_text())
    assert 'Not finished: ' in page.text
    assert 'nan' not in page.text
    assert scores.markdown(found)


def test_without_matplotlib(tmp_path, monkeypatch, capsys):
    def draw(*_):
        raise ImportError

    monkeypatch.setattr(charts, 'draw', draw)
    report.write(results(), tmp_path)
    assert 'no figures in the report: matplotlib is not installed' in capsys.readouterr().out
    assert 'svg' not in Page((tmp_path / 'report.html').read_text()).tags


def test_nine_methods_differ():
    """In colour or in mark."""
    from util.analysis import figures

    found = {(figures.COLOURS[place % 8], *figures.marker(place).values()) for place in range(16)}
    assert len(found) == 16
    named = report.markers({'methods': [{'name': str(place)} for place in range(16)]})
    assert len({*named.values()}) == 16


@pytest.mark.skipif(not shutil.which('chromium'), reason='chromium is not installed')
def test_chromium_draws_it(written, tmp_path):
    """At the width of a phone nothing is wider than the page, which tells the page around it."""
    told = '<script>page = document.documentElement;'
    told += 'parent.postMessage(page.scrollWidth - page.clientWidth + " px wider", "*")</script></body>'
    html = (written / 'report.html').read_text().replace('</body>', told)
    frame = '<script>onmessage = told => document.title = told.data</script><iframe width=390 src="told.html"></iframe>'
    for name, text in (('told.html', html), ('frame.html', frame)):
        (tmp_path / name).write_text(text)
    command = ['chromium', '--headless', '--no-sandbox', '--virtual-time-budget=5000', '--dump-dom']
    command += [f'--user-data-dir={tmp_path}', (tmp_path / 'frame.html').as_uri()]
    assert '<title>0 px wider</title>' in subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
