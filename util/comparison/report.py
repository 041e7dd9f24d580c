"""The page of a comparison: one light HTML file that needs no network, no script and no other file."""

import base64
import mimetypes
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from util import digests
from util.comparison import charts
from util.comparison.scores import (
    ALL, Way, epochs_text, gain, last_point, main_ways, many, mean, name_of, number, of, order, random_of,
    rule, scored, sentences, spread, values, verdicts, ways,
)  # fmt: skip
from util.log import counted, info

CSS = """
:root { color-scheme: light dark; --text: #1b1f24; --soft: #5b6570; --line: #d8dde3; --back: #fff; --box: #f5f7f9;
  --best: #e3f1e7 }
@media (prefers-color-scheme: dark) { :root { --text: #e6e9ec; --soft: #9aa5b1; --line: #3a424b; --back: #15191d;
  --box: #1e242a; --best: #1f3a2a } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1.2rem 1rem 3rem; max-width: 78rem; color: var(--text); background: var(--back);
  font: 16px/1.5 system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .6rem }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .4rem }
p, ul { margin: .4rem 0; max-width: 52rem }
ul { padding-left: 1.2rem }
small, .soft { color: var(--soft); font-size: .85em }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 15rem), 1fr)); gap: .4rem 1.2rem; margin: 0 }
dt { color: var(--soft); font-size: .8rem }
dd { margin: 0 }
.verdict { background: var(--box); border-radius: .5rem; padding: .6rem 1rem; margin: 1rem 0 }
.verdict h2 { margin-top: .2rem }
.wide { overflow-x: auto; margin: .6rem 0 }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; overflow-wrap: normal }
th, td { padding: .35rem .7rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top;
  white-space: nowrap }
th { font-weight: 600; vertical-align: bottom }
th:first-child, td:first-child, td.text { text-align: left; white-space: normal }
th:first-child, td:first-child { position: sticky; left: 0; background: var(--back); min-width: 8.5rem;
  max-width: 20rem; overflow-wrap: anywhere }
td.text { min-width: 16rem; overflow-wrap: anywhere }
td small { display: block }
.best { background: var(--best); font-weight: 700 }
.equal { background: var(--best) }
.best small, .equal small { font-weight: 400 }
.figures { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)) }
.figures.one { grid-template-columns: minmax(0, 36rem) }
figure { margin: 0; break-inside: avoid }
figure img { display: block; width: 100%; background: #fff; border-radius: .3rem }
.key { display: flex; flex-wrap: wrap; gap: .1rem 1.1rem; list-style: none; padding: 0; max-width: none }
.mark { font-family: 'DejaVu Sans', 'Segoe UI Symbol', 'Arial Unicode MS', sans-serif; background: #fff;
  border-radius: .2rem; padding: 0 .2rem }
pre { overflow-x: auto; background: var(--box); padding: .6rem; border-radius: .3rem; font-size: .78rem; margin: .4rem 0 }
summary { cursor: pointer; font-weight: 600 }
@media print { body { max-width: none; font-size: 11px } .wide { overflow: visible } th:first-child { position: static } }
"""
SIGNS = {'o': '●○', 's': '■□', '^': '▲△', 'D': '◆◇', 'v': '▼▽', '<': '◀◁', '>': '▶▷', 'P': '✚✛'}  # full, hollow
LIMITS = (
    'Networks are small and budgets are short: with more of either the order may change, and large networks gain most.',
    'Learning rates and other hyperparameters were tuned with small budgets, or are those of a recipe; none of them '
    'is the best that a method can reach.',
    'It is one data set. A method that wins here may lose on other pictures, other sizes or another task.',
    'Seeds change the weights, masks and order of images, not the split: how much another split would change is not '
    'in the spread.',
    'Times and memory are of this machine, where several runs may have shared it.',
)


def write(results: dict, folder: Path) -> None:
    """Write folder/report.html, and folder/figures, which it shows; paths of pictures are relative to `folder`."""
    figures = folder / 'figures'
    figures.mkdir(parents=True, exist_ok=True)
    try:
        groups = charts.draw(results, figures)
    except ImportError:
        info('no figures in the report: matplotlib is not installed; pip install matplotlib, then call again')
        groups = []
    digests.replace(folder / 'report.html', page(results, groups, charts.pictures(results, folder)).encode())


def page(results: dict, groups: Sequence[charts.Group], pictures: Sequence[tuple[str, Path]]) -> str:
    """The whole HTML, with the files of the figures inside."""
    title = f'Pretraining compared on {of(results, "data", "what") or "a data set"}'
    marks = markers(results) if groups else {}
    body = [
        f'<h1>{escape(title)}</h1>',
        facts(results),
        verdict_box(results),
        failures(results),
        accuracy(results, marks),
        costs(results, marks),
        *(figures(group, marks) for group in groups),
        reconstructions(pictures),
        method_of_judging(results),
        section('What this page does not show', items(LIMITS)),
        commands(results),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{escape(title)}</title><style>{CSS}</style></head>\n<body>\n' + '\n'.join(body) + '\n</body></html>\n'
    )


# --------------------------------------------------------------------------
# pieces of HTML


def section(title: str, *parts: str) -> str:
    return '\n'.join([f'<section><h2>{escape(title)}</h2>', *parts, '</section>'])


def items(texts: Iterable[str]) -> str:
    return f'<ul>{"".join(f"<li>{escape(text)}</li>" for text in texts)}</ul>'


def grid(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table that scrolls in its own box; cells are whole <td>."""
    head = ''.join(f'<th>{escape(name)}</th>' for name in header)
    lines = '\n'.join(f'<tr>{"".join(row)}</tr>' for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>{lines}</tbody></table></div>'


def cell(text: str, below: str = '', kind: str = '') -> str:
    """What stands in it, and smaller below; both are escaped."""
    below = f'<small>{escape(below)}</small>' if below else ''
    return f'<td{f" class={kind}" if kind else ""}>{escape(text)}{below}</td>'


def image(path: Path, alt: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    kind = mimetypes.types_map.get(path.suffix, 'image/webp')
    return f'<img alt="{escape(alt)}" src="data:{kind};base64,{data}">'


def markers(results: dict) -> dict[str, str]:
    """{method: the HTML of its mark in the figures}"""
    from util.analysis import figures

    marks = {}
    for place, method in enumerate(many(results, 'methods')):
        sign = SIGNS[figures.marker(place)['marker']][place >= 8]
        colour = figures.COLOURS[place % 8]
        marks[name_of(method)] = f'<span class="mark" style="color:{colour}">{sign}\ufe0e</span>'
    return marks


def name_cell(method: dict, marks: dict[str, str], below: str = '') -> str:
    name = f'{marks.get(name_of(method), "")} <b>{escape(name_of(method))}</b>'
    return f'<td>{name}{f"<small>{escape(below)}</small>" if below else ""}</td>'


def amount(value: object, form: str = '.3g') -> str:
    found = number(value)
    return '-' if found is None else format(found, form)


def engineering(value: object, of_what: str = '') -> str:
    """'4.1 T' and what it is of, or '-'."""
    found = number(value)
    if found is None:
        return '-'
    factor, letter = charts.unit(found)
    return f'{found / factor:.3g} {letter}{of_what}'.strip()


# --------------------------------------------------------------------------
# what is said


def facts(results: dict) -> str:
    data, machine, kind = of(results, 'data'), of(results, 'machine'), of(results, 'budget', 'kind')
    size = of(data, 'input_size')
    budget = of(results, 'budget', 'amount')
    seeds = ', '.join(map(str, many(results, 'seeds')))
    given = engineering(budget, 'FLOPs') if kind == 'flops' else f'{amount(budget, "g")} {kind or ""}'
    gpu = of(machine, 'gpu')
    where = [of(machine, 'processor'), gpu or 'no GPU', f'{amount(of(machine, "cores"), "g")} cores']
    where += [f'{amount(of(machine, "jobs"), "g")} runs at once, {amount(of(machine, "threads"), "g")} threads each']
    told = {
        'Data': f'{amount(of(data, "train"), ",")} training and {amount(of(data, "val"), ",")} validation images, '
        f'{amount(of(data, "classes"), "g")} classes' + (f', {size} x {size} pixels' if size else ''),
        'Budget of each pretraining': f'{given}; judged at {counted(number(of(results, "points")) or 1, "point")}',
        'Seeds': seeds or '-',
        'Machine': '; '.join(str(part) for part in where if part),
        'Time': f'{amount(of(results, "wall_h"))} hours, {amount(of(results, "cpu_h"))} of CPU',
        'State': f'{"finished" if of(results, "finished") else "not finished"}, {of(results, "time") or "no date"}',
    }
    return '<dl>' + ''.join(f'<div><dt>{k}</dt><dd>{escape(v)}</dd></div>' for k, v in told.items()) + '</dl>'


def verdict_box(results: dict) -> str:
    runs = [run for method in many(results, 'methods') for run in many(method, 'runs')]
    done = sum(of(run, 'state') == 'done' for run in runs)
    lead = '' if of(results, 'finished') else f'<p><b>Not finished: {done} of {counted(len(runs), "run")} done.</b></p>'
    said = ''.join(f'<li><b>{escape(way)}</b>: {escape(words)}</li>' for way, words in sentences(results))
    note = f'<p class="soft">{escape(rule(results))}</p>'
    return f'<section class="verdict"><h2>Verdict</h2>{lead}<p>{escape(overall(results))}</p><ul>{said}</ul>{note}</section>'


def overall(results: dict) -> str:
    """One sentence over all ways of judging."""
    found = [verdict for verdict in verdicts(results) if verdict.best]
    if not found:
        return 'There is no score yet.'
    best = {verdict.best for verdict in found}
    several = any(verdict.told or verdict.equal for verdict in found)
    beating = [name_of(method) for method in many(results, 'methods') if all(name_of(method) in v.above for v in found)]
    words = [
        f'{", ".join(beating)} {"beats" if len(beating) == 1 else "beat"} random weights by every way of judging.'
        if beating
        else 'No method beats random weights by every way of judging.'
    ]
    if several and len(best) == 1 and not any(verdict.equal for verdict in found):
        words.insert(0, f'{best.pop()} is best by every way of judging.')
    elif several and len(best) == 1:
        words.insert(0, f'{best.pop()} has the highest mean by every way of judging, but not told apart by each.')
    elif several:
        words.insert(0, 'No method is best by every way of judging.')
    return ' '.join(words)


def failures(results: dict) -> str:
    """A row for each run that is not done; nothing if all are."""
    found = [(name_of(m), run) for m in many(results, 'methods') for run in many(m, 'runs')]
    for name, random in (of(results, 'random') or {}).items():
        found += [(f'random weights of {name}', run) for run in many(random, 'runs')]
    rows = [
        [cell(name), cell(str(of(run, 'seed'))), cell(str(of(run, 'state'))), cell(of(run, 'why') or '', kind='text')]
        for name, run in found
        if of(run, 'state') != 'done'
    ]
    return section('Runs that are not done', grid(['method', 'seed', 'state', 'why'], rows)) if rows else ''


# --------------------------------------------------------------------------
# tables


def accuracy(results: dict, marks: dict[str, str]) -> str:
    """Each method by each way of judging, random weights below."""
    found, rows = verdicts(results), []
    for method in many(results, 'methods'):
        options = [f'{key}={value}' for key, value in (of(method, 'options') or {}).items()]
        about = ', '.join([str(of(method, 'model') or ''), *options])
        row = [name_cell(method, marks, about), cell(epochs_text(method))]
        for way, said in zip(ways(results), found, strict=True):
            kind = 'best' if name_of(method) == said.best else 'equal' if name_of(method) in said.equal else ''
            row.append(score_cell(*scored(results, method, way), kind, gain(results, method, way)))
        rows.append(row)
    note = (
        '<p class="soft">Top-1 in % of the validation images, mean ± standard deviation over (seeds). Below: random '
        'weights of the same network, and the points gained over them. Bold: the highest mean; on the same ground: '
        'not told apart from it (≈).</p>'
    )
    header = ['method', 'epochs', *(way.name for way in ways(results))]
    return section('Accuracy at the end of the budget', note, grid(header, rows))


def score_cell(own: Sequence[float], random: Sequence[float], kind: str, gained: float | None) -> str:
    text = f'{spread_text(own)}{" ≈" if kind == "equal" else ""}'
    below = f'random {spread_text(random)}' if random else 'random: -'
    html = cell(text, below, kind)
    return html if gained is None else html.replace('</td>', f'<small>{gained:+.1f}</small></td>')


def spread_text(of_seeds: Sequence[float]) -> str:
    if not of_seeds:
        return '-'
    return f'{mean(of_seeds):.1f}{f" ± {spread(of_seeds):.1f}" if len(of_seeds) > 1 else ""} ({len(of_seeds)})'


def costs(results: dict, marks: dict[str, str]) -> str:
    """What each method took, and what a point of accuracy cost."""
    header = ['method', 'parameters', 'FLOPs an image', 'pretraining', 'minutes', 'images/s', 'memory', 'rank']
    header += ['FLOPs a point', 'minutes a point']
    rows, way = [], main_ways(results)[0]
    for method in many(results, 'methods'):
        runs = many(method, 'runs')
        minutes = mean(values(runs, 'minutes'))
        ends = [last_point(results, method, run) for run in runs]
        recipes = ', '.join(map(str, many(method, 'recipes')))
        row = [name_cell(method, marks, f'{recipes}' if recipes else '')]
        row += [cell(engineering(of(method, 'parameters'))), cell(engineering(of(method, 'flops', 'image')))]
        row += [cell(engineering(of(method, 'flops', 'pretrain'), 'FLOPs')), cell(amount(minutes))]
        row += [cell(amount(mean(values(runs, 'images_per_s')))), cell(engineering(mean(values(runs, 'memory')), 'B'))]
        row += [cell(amount(mean(values(ends, 'rank'))))]
        row += [cell(a_point(results, method, way, cost)) for cost in (of(method, 'flops', 'pretrain'), minutes)]
        rows.append(row)
    note = (
        f'<p class="soft">Means over seeds. Parameters: of the network that is fine-tuned. FLOPs an image, minutes, '
        f'images/s and memory: of pretraining. Rank: the effective rank of the features. A point: of top-1 gained over '
        f'random weights, {escape(way.name)}; in brackets where the two are not told apart, - where none is gained.</p>'
    )
    return section('Cost', note, grid(header, rows))


def a_point(results: dict, method: dict, way: Way, cost: float | None) -> str:
    gained = gain(results, method, way)
    if number(cost) is None or gained is None or gained <= 0:
        return '-'
    each = engineering(cost / gained)
    return each if order(*scored(results, method, way)) > 0 else f'({each})'


# --------------------------------------------------------------------------
# figures


def figures(group: charts.Group, marks: dict[str, str]) -> str:
    key = ''.join(f'<li>{mark} {escape(name)}</li>' for name, mark in marks.items())
    shown = ''.join(f'<figure>{image(path, alt)}</figure>' for alt, path in group.files)
    one = ' one' if len(group.files) == 1 else ''
    note = f'<p class="soft">{escape(group.caption)}</p>'
    return section(group.title, note, f'<ul class="key">{key}</ul>', f'<div class="figures{one}">{shown}</div>')


def reconstructions(pictures: Sequence[tuple[str, Path]]) -> str:
    shown = ''.join(f'<figure><b>{escape(name)}</b>{image(path, name)}</figure>' for name, path in pictures)
    note = '<p class="soft">The same images, as each method fills in what was hidden from it.</p>'
    return section('Reconstructions', note, f'<div class="figures">{shown}</div>') if pictures else ''


# --------------------------------------------------------------------------
# how it was made


def method_of_judging(results: dict) -> str:
    epochs = of(results, 'finetune_epochs')
    tuned = f', {counted(epochs, "epoch")}' if number(epochs) is not None else ''
    return section(
        'How it was judged',
        items(
            [
                f'Fine-tuned: the whole network is trained on labels by the recipe of the method{tuned}. A smaller share of '
                'labels trains as many steps as all labels do.',
                'Random weights: the same network without pretraining, by the same recipe, but with one learning rate for '
                'all layers (--layer_decay 1), since a smaller one for early layers assumes that they are trained already.',
                'Linear probe: a logistic regression on frozen features, without augmentation.',
                'k-NN: the 20 nearest training images vote, by the same frozen features.',
            ]
        ),
    )


def commands(results: dict) -> str:
    """The versions, and every command, folded."""
    told = [f'{name} {value}' for name, value in (of(results, 'versions') or {}).items() if value]
    parts = [f'<p>{escape(", ".join(told))}</p>'] if told else []
    if of(results, 'command'):
        parts.append(f'<pre>{escape(results["command"])}</pre>')
    of_all = {name_of(method): many(method, 'runs') for method in many(results, 'methods')}
    for name, random in (of(results, 'random') or {}).items():
        of_all[f'random weights of {name}'] = many(random, 'runs')
    for name, runs in of_all.items():
        lines = [str(command) for run in runs for command in many(run, 'commands')]
        if lines:
            title = f'{escape(name)}: {counted(len(lines), "command")}'
            parts.append(f'<details><summary>{title}</summary><pre>{escape(chr(10).join(lines))}</pre></details>')
    return section('Versions and commands', *parts) if parts else ''
