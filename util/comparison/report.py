"""The page of a comparison: one light HTML file that needs no network, no script and no other file."""

import base64
import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from util import digests
from util.comparison import charts, scores
from util.comparison.jobs import spoken
from util.comparison.scores import many, mean, name_of, number, of, scored, values
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
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 15rem), 1fr)); gap: .4rem 1.2rem;
  margin: 0 }
dt { color: var(--soft); font-size: .8rem }
dd { margin: 0 }
.verdict { background: var(--box); border-radius: .5rem; padding: .6rem 1rem; margin: 1rem 0 }
.verdict h2 { margin-top: .2rem }
.wide { overflow-x: auto; margin: .6rem 0 }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; overflow-wrap: normal }
th, td { padding: .35rem .7rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top;
  white-space: nowrap }
th { font-weight: 600; vertical-align: bottom }
th:first-child, td:first-child, .texts * { text-align: left; white-space: normal }
th:first-child, td:first-child { position: sticky; left: 0; background: var(--back); min-width: 9rem;
  max-width: 20rem; overflow-wrap: anywhere }
.texts td:last-child { min-width: 14rem; overflow-wrap: anywhere }
td small { display: block }
.best { background: var(--best); font-weight: 700 }
.equal { background: var(--best) }
.best small, .equal small { font-weight: 400 }
.figures { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)) }
.figures.one { grid-template-columns: minmax(0, 28rem) }
figure { margin: 0; break-inside: avoid }
figure img, figure svg { display: block; width: 100%; height: auto; background: #fff; border-radius: .3rem }
.key { display: flex; flex-wrap: wrap; gap: .1rem 1.1rem; list-style: none; padding: 0; max-width: none }
.mark { font-family: 'DejaVu Sans', 'Segoe UI Symbol', 'Arial Unicode MS', sans-serif; background: #fff;
  border-radius: .2rem; padding: 0 .2rem }
pre { overflow-x: auto; background: var(--box); padding: .6rem; border-radius: .3rem; font-size: .78rem;
  margin: .4rem 0 }
summary { cursor: pointer; font-weight: 600 }
@media (max-width: 40rem) { th, td { padding: .3rem .4rem; font-size: .8rem } }
@media print { body { max-width: none; font-size: 11px } .wide { overflow: visible } }
"""
SIGNS = {'o': '●○', 's': '■□', '^': '▲△', 'D': '◆◇', 'v': '▼▽', '<': '◀◁', '>': '▶▷', 'P': '✚✛'}  # full, hollow
LIGHTER = (  # what a page need not have of a drawing: what stands before and about it, names of groups, far digits
    (r'^.*?(?=<svg )|<metadata>.*?</metadata>|<!--.*?-->', ''),
    (r'<g id="[^"]*">', '<g>'),
    (r'font-family: [^;"]*', 'font-family: DejaVu Sans, Verdana, sans-serif'),
    (r' (?:d|x|y)="[^"]*"', lambda found: re.sub(r'(\.\d)\d+', r'\1', found[0])),
    (r'\s*\n\s*', ' '),
)
LIMITS = (
    'Whether the order stays the same with larger networks, longer budgets or longer fine-tuning.',
    'The best that a method can reach: learning rates and masks are those of a recipe, tuned with a small budget.',
    'Other data: a method that wins here may lose on other images, other sizes or another task.',
    'How much other images would change: a seed decides weights, masks, the order of images and which have labels.',
    'Exact times: minutes, images/s and memory are of this machine, where several runs may have shared it.',
)


def write(results: dict, folder: Path) -> None:
    """Write report.html, figures/, which it shows, and results.md, a table for documents, into the folder.

    Paths of pictures are relative to it.
    """
    figures = folder / 'figures'
    figures.mkdir(parents=True, exist_ok=True)
    try:
        groups = charts.draw(results, figures)
    except ImportError:
        info('no figures in the report: matplotlib is not installed; pip install matplotlib, then call again')
        groups = []
    digests.replace(folder / 'report.html', page(results, groups, charts.pictures(results, folder)).encode())
    digests.replace(folder / 'results.md', scores.markdown(results).encode())


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
        how_judged(results),
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


def grid(header: Sequence[str], rows: Iterable[Sequence[str]], kind: str = '') -> str:
    """A table that scrolls in its own box; cells are whole <td>."""
    head = ''.join(f'<th>{escape(name)}</th>' for name in header)
    lines = '\n'.join(f'<tr>{"".join(row)}</tr>' for row in rows)
    return f'<div class="wide {kind}"><table><thead><tr>{head}</tr></thead>\n<tbody>{lines}</tbody></table></div>'


def cell(text: str, *below: str, kind: str = '') -> str:
    """What stands in it, and smaller lines below; all are escaped."""
    lines = ''.join(f'<small>{escape(line)}</small>' for line in below)
    return f'<td{f" class={kind}" if kind else ""}>{escape(text)}{lines}</td>'


def image(path: Path, alt: str) -> str:
    """The file itself, inside the page: a drawing as SVG, in which texts can be found, or a picture."""
    if path.suffix == '.svg':
        drawing = path.read_text(encoding='utf-8')
        for pattern, instead in LIGHTER:
            drawing = re.sub(pattern, instead, drawing, flags=re.DOTALL)
        return drawing.replace('<svg ', f'<svg role="img" aria-label="{escape(alt)}" ', 1)
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{escape(alt)}" src="data:image/webp;base64,{data}">'


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
    name = re.sub(r'([,:_/])', r'\1<wbr>', escape(name_of(method)))
    below = f'<small>{escape(below)}</small>' if below else ''
    return f'<td>{marks.get(name_of(method), "")} <b>{name}</b>{below}</td>'


def amount(value: object, form: str = '.3g') -> str:
    found = number(value)
    return '-' if found is None else format(found, form)


def some(value: object, noun: str) -> str:
    return f'{amount(value, "g")} {noun}{"" if value == 1 else "es" if noun.endswith("s") else "s"}'


def engineering(value: object, of_what: str = '') -> str:
    """'4.1 T' and what it is of, or '-'."""
    found = number(value)
    if found is None:
        return '-'
    factor, letter = charts.unit(found)
    return f'{found / factor:.3g} {letter}{of_what}'.strip()


def hours(value: object) -> str:
    found = number(value)
    return spoken(3600 * found) if found else '-'


# --------------------------------------------------------------------------
# what is said


def facts(results: dict) -> str:
    data, machine, kind = of(results, 'data'), of(results, 'machine'), of(results, 'budget', 'kind')
    size = of(data, 'input_size')
    budget = of(results, 'budget', 'amount')
    seeds = ', '.join(map(str, many(results, 'seeds')))
    given = engineering(budget, 'FLOPs') if kind == 'flops' else f'{amount(budget, "g")} {kind or ""}'
    gpu = of(machine, 'gpu')
    where = [of(machine, 'processor'), gpu or 'no GPU', some(of(machine, 'cores'), 'core')]
    where += [f'{some(of(machine, "jobs"), "run")} at once, {some(of(machine, "threads"), "thread")} each']
    told = {
        'Data': f'{amount(of(data, "train"), ",")} training and {amount(of(data, "val"), ",")} validation images, '
        f'{some(of(data, "classes"), "class")}' + (f', {size} by {size} pixels' if size else ''),
        'Budget of each pretraining': f'{given}; judged at {some(of(results, "points"), "point")}',
        'Seeds': seeds or '-',
        'Machine': '; '.join(str(part) for part in where if part),
        'Time': f'{hours(of(results, "wall_h"))}, {hours(of(results, "cpu_h"))} of CPU',
        'State': 'finished' if of(results, 'finished') else 'not finished',
        'Last call': of(results, 'time') or 'no date',
    }
    return '<dl>' + ''.join(f'<div><dt>{k}</dt><dd>{escape(v)}</dd></div>' for k, v in told.items()) + '</dl>'


def verdict_box(results: dict) -> str:
    runs = [run for method in many(results, 'methods') for run in many(method, 'runs')]
    done = sum(of(run, 'state') == 'done' for run in runs)
    lead = '' if of(results, 'finished') else f'<p><b>Not finished: {done} of {counted(len(runs), "run")} done.</b></p>'
    said = ''.join(f'<li><b>{escape(way)}</b>: {escape(words)}</li>' for way, words in scores.sentences(results))
    note = f'<p class="soft">{escape(scores.rule(results))}</p>'
    lead += ''.join(f'<p>{escape(text)}</p>' for text in (*scores.doubts(results), scores.overall(results)))
    lead += f'<ul>{said}</ul>'
    return f'<section class="verdict"><h2>Verdict</h2>{lead}{note}</section>'


def failures(results: dict) -> str:
    """A row for the runs of a method that are not done for the same reason; nothing if all are."""
    runs = {name: many(random, 'runs') for name, random in random_weights(results).items()}
    seeds: dict[tuple, list[str]] = {}
    for name, of_name in ({name_of(m): many(m, 'runs') for m in many(results, 'methods')} | runs).items():
        for run in of_name:
            if of(run, 'state') != 'done':
                why = (name, str(of(run, 'state') or '-'), str(of(run, 'why') or ''))
                seeds.setdefault(why, []).append(amount(of(run, 'seed'), 'g'))
    rows = [map(cell, (name, ', '.join(of_why), state, why)) for (name, state, why), of_why in seeds.items()]
    return section('Runs that are not done', grid(['method', 'seeds', 'state', 'why'], rows, 'texts')) if rows else ''


def random_weights(results: dict) -> dict[str, dict]:
    """{a name for people: the runs of a network with random weights}"""
    return {f'random weights of {key}': random for key, random in (of(results, 'random') or {}).items()}


# --------------------------------------------------------------------------
# tables


def accuracy(results: dict, marks: dict[str, str]) -> str:
    """Each method by each way of judging, random weights below."""
    found, seeds, rows = scores.verdicts(results), len(many(results, 'seeds')), []
    for method in many(results, 'methods'):
        options = [f'{key}={value}' for key, value in (of(method, 'options') or {}).items()]
        about = ', '.join([str(of(method, 'model') or ''), *options])
        row = [name_cell(method, marks, about), cell(scores.epochs_text(method))]
        for way, said in zip(scores.ways(results), found, strict=True):
            kind = scores.standing(said, name_of(method))
            row.append(score_cell(*scored(results, method, way), seeds, kind, scores.gain(results, method, way)))
        rows.append(row)
    note = (
        '<p class="soft">Top-1 in % of the validation images, mean ± standard deviation over seeds; in brackets how '
        'many, where some lack. Below: random weights of the same network, and the points gained over them. Bold: the '
        'highest mean; on the same ground: not told apart from it (≈).</p>'
    )
    header = ['method', 'epochs', *(way.name for way in scores.ways(results))]
    return section('Accuracy at the end of the budget', note, grid(header, rows))


def score_cell(own: Sequence[float], random: Sequence[float], seeds: int, kind: str, gained: float | None) -> str:
    below = [f'random {scores.text(random, seeds)}'] if random else []
    apart = '' if scores.order(own, random) else ', not told apart'
    below += [] if gained is None else [f'{round(gained, 1) + 0.0:+.1f}{apart}']
    return cell(f'{scores.text(own, seeds)}{" ≈" if kind == "equal" else ""}', *below, kind=kind)


def costs(results: dict, marks: dict[str, str]) -> str:
    """What each method took, and what a point of accuracy cost."""
    header = ['method', 'parameters', 'FLOPs an image', 'pretraining', 'minutes', 'images/s', 'memory', 'rank']
    header += ['FLOPs a point', 'minutes a point']
    rows, way = [], scores.main_ways(results)[0]
    for method in many(results, 'methods'):
        runs = many(method, 'runs')
        ends = [scores.last_point(results, method, run) for run in runs]
        minutes = mean(values(ends, 'minutes'))
        row = [name_cell(method, marks)]
        row += [cell(engineering(of(method, 'parameters'))), cell(engineering(of(method, 'flops', 'image')))]
        row += [cell(engineering(of(method, 'flops', 'pretrain'), 'FLOPs')), cell(amount(minutes))]
        row += [cell(amount(mean(values(runs, 'images_per_s')))), cell(engineering(mean(values(runs, 'memory')), 'B'))]
        row += [cell(amount(mean(values(ends, 'rank'))))]
        row += [cell(a_point(results, method, way, cost)) for cost in (of(method, 'flops', 'pretrain'), minutes)]
        rows.append(row)
    spent = values(many(results, 'methods'), 'flops', 'pretrain')
    unequal = max(spent, default=0) > 1.2 * min(spent, default=0)
    hint = ' The pretrainings are not equal work: --budget flops would be.' if unequal else ''
    note = (
        f'<p class="soft">Means over seeds. Parameters: of the network that is fine-tuned. FLOPs an image, minutes, '
        f'images/s and memory: of pretraining. Rank: RankMe, the effective rank of the features. A point: of top-1 '
        f'gained over random weights, {escape(way.name)}; in brackets where the two are not told '
        f'apart, - where none is gained.{hint}</p>'
    )
    return section('Cost', note, grid(header, rows))


def a_point(results: dict, method: dict, way: scores.Way, cost: float | None) -> str:
    gained = scores.gain(results, method, way)
    if number(cost) is None or gained is None or gained <= 0:
        return '-'
    each = engineering(cost / gained)
    return each if scores.order(*scored(results, method, way)) > 0 else f'({each})'


# --------------------------------------------------------------------------
# figures


def figures(group: charts.Group, marks: dict[str, str]) -> str:
    key = ''.join(f'<li>{mark} {escape(name)}</li>' for name, mark in marks.items() if group.key)
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


def how_judged(results: dict) -> str:
    epochs = of(results, 'finetune_epochs')
    tuned = f', {some(epochs, "epoch")}' if epochs else ''
    ways = (
        f"Fine-tuned: the whole network is trained on labels by the method's recipe{tuned}. A smaller share of labels "
        'trains as many steps as all labels do.',
        'Random weights: the same network without pretraining, by the same recipe, but with one learning rate for all '
        'layers (--layer_decay 1), as a smaller one for early layers assumes that they are trained already.',
        'Linear probe: a logistic regression on frozen features, without augmentation.',
        'k-NN: the 20 nearest training images vote, by the same frozen features.',
    )
    shared = of(results, 'data', 'val_share')
    ways += ('Pretraining saw the validation images, too, without labels: --val_share.',) if shared else ()
    return section('How it was judged', items(ways))


def commands(results: dict) -> str:
    """The versions, and every command, folded."""
    told = [f'{name} {value}' for name, value in (of(results, 'versions') or {}).items() if value]
    parts = [f'<p>{escape(", ".join(told))}</p>'] if told else []
    if of(results, 'command'):
        parts.append(f'<pre>{escape(results["command"])}</pre>')
    methods = {name_of(method): method for method in many(results, 'methods')}
    for name, method in (methods | random_weights(results)).items():
        lines = [str(command) for run in many(method, 'runs') for command in many(run, 'commands')]
        lines += [f'# recipes: {", ".join(map(str, many(method, "recipes")))}'] if many(method, 'recipes') else []
        if lines:
            title = f'commands of {escape(name)}'
            parts.append(f'<details><summary>{title}</summary><pre>{escape(chr(10).join(lines))}</pre></details>')
    return section('Versions and commands', *parts) if parts else ''
