"""The figures of a comparison: what its numbers say, as files."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from util.comparison import scores
from util.comparison.scores import many, mean, name_of, number, of, scored, spread, values

MOST = 120  # points of a curve
FLOOR = -0.2  # of `explained` in a figure: first epochs lie far below
PICTURE = 1000  # pixels: the widest of a method's pictures
AXES = {'epochs': 'epochs', 'flops': 'FLOPs', 'minutes': 'minutes'}  # what a point has cost: its name
UNITS = ((1e18, 'E'), (1e15, 'P'), (1e12, 'T'), (1e9, 'G'), (1e6, 'M'), (1e3, 'k'))


class Group(NamedTuple):
    """Figures that belong together: a headline, what they show, and (what a file shows, its path)."""

    title: str
    caption: str
    files: list[tuple[str, Path]]
    key: bool = True  # whether they need a key of the methods' marks


def unit(value: float) -> tuple[float, str]:
    """(factor, its letter), for numbers up to this one."""
    return next((found for found in UNITS if abs(value) >= found[0]), (1, ''))


def draw(results: dict, folder: Path) -> list[Group]:
    """Write all figures into `folder`, which exists; nothing without scores and curves. Needs matplotlib.

    Each panel is an SVG of its own; comparison.png and gains.png are whole ones for documents.
    """
    groups = [judged(results, folder), gained(results, folder), labelled(results, folder), learnt(results, folder)]
    return [group for group in groups if group.files]


def by_method(results: dict, found: Callable[[dict], tuple]) -> dict[str, tuple]:
    return {name_of(method): found(method) for method in many(results, 'methods')}


def filled(lines: dict[str, tuple]) -> bool:
    """Whether any method has a point."""
    return any(line[0] for line in lines.values())


# --------------------------------------------------------------------------
# scores


def judged(results: dict, folder: Path) -> Group:
    """Top-1 over what a point has cost, a panel for each way of judging and each kind of cost."""
    from util.analysis import figures

    rows, files = [], []
    points = [p for method in many(results, 'methods') for run in many(method, 'runs') for p in many(run, 'points')]
    factor, letter = unit(max(values(points, 'flops'), default=1))
    for way in scores.main_ways(results):
        rows.append([])
        for cost, label in AXES.items():
            by = factor if cost == 'flops' else 1
            lines = by_method(
                results, lambda method, way=way, cost=cost, by=by: over(results, method, way.keys, cost, by)
            )
            panel = figures.Panel(letter + label if cost == 'flops' else label, f'{way.name}, top-1 (%)', lines)
            if filled(lines):
                rows[-1].append(panel)
                files.append((f'{way.name} over {label}', folder / f'{way.keys[0]}-{cost}.svg'))
                figures.small_multiples(files[-1][1], '', [[panel]], key=False)
    rows = [row for row in rows if row]
    if rows:
        figures.small_multiples(folder / 'comparison.png', '', rows)
    caption = 'A line begins at 0 with random weights of the same network. Mean over seeds; bars: standard deviation.'
    return Group('Accuracy over what pretraining cost', caption, files)


def over(results: dict, method: dict, keys: Sequence[str], cost: str, by: float) -> tuple[list, list, list]:
    """(costs, means, spreads) of the points of a method; at cost 0 its random weights."""
    x, y, errors = [], [], []
    of_random = values(scores.random_of(results, method), *keys)
    runs = [many(run, 'points') for run in many(method, 'runs')]
    for place in range(max(map(len, runs), default=0)):
        points = [points[place] for points in runs if len(points) > place]
        points = [point for point in points if None not in (number(of(point, cost)), number(of(point, *keys)))]
        if points:
            x.append(mean(values(points, cost)) / by)
            y.append(mean(values(points, *keys)))
            errors.append(spread(values(points, *keys)))
    if x and of_random:
        x, y, errors = [0, *x], [mean(of_random), *y], [spread(of_random), *errors]
    return x, y, errors


def gained(results: dict, folder: Path) -> Group:
    """What each method gains over random weights, a panel for each way of judging."""
    from util.analysis import figures

    def differences(method: dict, way: scores.Way) -> tuple[list, list]:
        own, random = scored(results, method, way)
        middle = mean(random) or 0
        return ([x - middle for x in own], [x - middle for x in random]) if own and random else ([], [])

    panels, files = {}, []
    for way in scores.ways(results):
        rows = by_method(results, lambda method, way=way: differences(method, way))
        if filled(rows):
            title = f'{way.name}: gain (points)'
            files.append((title, folder / f'gain-{"-".join(way.keys)}.svg'))
            figures.gains(files[-1][1], '', {title: rows})
            panels[title] = rows
    if panels:
        figures.gains(folder / 'gains.png', '', panels)
    caption = (
        'Points of top-1 above the mean of random weights, at the end of the budget. Strokes: seeds; mark: their '
        'mean; grey: the range of random weights. If all strokes lie right of the grey, the two are told apart.'
    )
    return Group('Gain over random weights', caption, files, key=False)


def labelled(results: dict, folder: Path) -> Group:
    """Fine-tuned top-1 over the share of labels, if there are several."""
    from util.analysis import figures

    shares = {100 * float(way.keys[1]): way for way in scores.ways(results) if way.keys[0] == 'finetune'}

    def line(method: dict, whose: int) -> tuple[list, list, list]:
        found = {x: scored(results, method, way)[whose] for x, way in shares.items()}
        found = {x: of_seeds for x, of_seeds in found.items() if of_seeds}
        return list(found), [*map(mean, found.values())], [*map(spread, found.values())]

    lines, base = (by_method(results, lambda method, whose=whose: line(method, whose)) for whose in (0, 1))
    files = []
    if len(shares) > 1 and filled(lines):
        files = [('fine-tuned over the share of labels', folder / 'labels.svg')]
        panel = figures.Panel(
            'share of labels (%)', 'fine-tuned, top-1 (%)', lines, base=base, ticks={x: f'{x:g}' for x in shares}
        )
        figures.small_multiples(files[0][1], '', [[panel]], key=False)
    caption = (
        'At the end of the budget. Bars: standard deviation; thin lines: random weights of the network of that colour.'
    )
    return Group('Accuracy over the share of labels', caption, files)


# --------------------------------------------------------------------------
# curves


def learnt(results: dict, folder: Path) -> Group:
    """`explained` of all methods in one panel, the loss of each in one of its own."""
    from util.analysis import figures

    explained, losses = (
        by_method(results, lambda method, what=what: curve(method, what)) for what in ('explained', 'loss')
    )
    files = []
    if filled(explained):
        files = [('explained over epochs', folder / 'explained.svg')]
        panel = figures.Panel('epoch', 'explained', explained, bars=False)
        figures.small_multiples(files[0][1], '', [[panel]], key=False)
    for place, (name, line) in enumerate(losses.items()):
        if line[0]:
            files.append((f'loss of {name}', folder / f'loss-{place}.svg'))
            alone = {other: line if other == name else ([], [], []) for other in losses}
            figures.small_multiples(
                files[-1][1], '', [[figures.Panel('epoch', f'loss of {name}', alone, bars=False)]], key=False
            )
    caption = (
        'Mean over seeds; bands: standard deviation. Explained: the share of the spread of its target that a method '
        f'predicts, 1 for perfect, 0 for no better than a constant, drawn from {FLOOR} on. Targets differ between '
        'methods, and losses too: a lower loss, or more explained, than that of another method says nothing about '
        'which is better.'
    )
    return Group('How pretraining went', caption, files)


def curve(method: dict, what: str) -> tuple[list, list, list]:
    """(epochs, means, spreads) over seeds, at most so many."""
    by_epoch: dict[float, list[float]] = {}
    for run in many(method, 'runs'):
        for row in many(run, 'curve'):
            if None not in (number(of(row, 'epoch')), number(of(row, what))):
                value = max(row[what], FLOOR) if what == 'explained' else row[what]
                by_epoch.setdefault(row['epoch'], []).append(value)
    epochs = sorted(by_epoch)[:: -(-len(by_epoch) // MOST) or 1]
    return epochs, [mean(by_epoch[epoch]) for epoch in epochs], [spread(by_epoch[epoch]) for epoch in epochs]


# --------------------------------------------------------------------------
# pictures


def pictures(results: dict, folder: Path) -> list[tuple[str, Path]]:
    """(method and seed, a light copy in folder/figures) of the first picture of each method that can be read."""
    found = []
    for place, method in enumerate(many(results, 'methods')):
        for run in many(method, 'runs'):
            source, path = of(run, 'pictures'), folder / 'figures' / f'pictures-{place}.webp'
            if source and light(folder / source, path):
                found.append((f'{name_of(method)}, seed {of(run, "seed")}', path))
                break
    return found


def light(source: Path, path: Path) -> bool:
    """Write a copy of a picture that takes little space; False if there is none to read."""
    try:
        with Image.open(source) as image:
            image.thumbnail((PICTURE, 4 * PICTURE))
            image.convert('RGB').save(path, quality=80, method=6)
    except OSError:
        return False
    return True
