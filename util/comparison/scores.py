"""The numbers of a comparison: what each method scores over its seeds, and which methods are told apart.

`results` is what results.json holds; of an unfinished comparison anything in it may be None or lack.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

ALL = 'all labels'
FEWEST = 3  # seeds of each of two that are told apart: with 2 chance alone would do it in one of 3 comparisons
LEARNT = 0.01  # of what is hidden, that a pretraining explains at least at its end


class Way(NamedTuple):
    """A way of judging: `name`, and the keys of its score in a point, or in a run of random weights."""

    name: str
    keys: tuple[str, ...]


class Verdict(NamedTuple):
    """What one way of judging says. Names of methods; each that has scores is in one list against random weights."""

    way: str
    best: list[str]  # of the highest mean, more than one if they are equal
    score: str  # its mean and spread
    told: list[str]  # below the best, told apart from it
    equal: list[str]  # below the best, not told apart from it
    above: list[str]  # above random weights
    unclear: list[str]  # not told apart from them
    below: list[str]
    unknown: list[str]  # itself or its random weights without a score


# --------------------------------------------------------------------------
# reading


def of(record: Any, *keys: str) -> Any:
    """What lies under these keys, one inside the other; None where one lacks."""
    for key in keys:
        record = record.get(key) if isinstance(record, dict) else None
    return record


def many(record: Any, *keys: str) -> list:
    """A list that may lack, without its Nones."""
    return [item for item in of(record, *keys) or [] if item is not None]


def name_of(method: dict) -> str:
    return str(of(method, 'name') or 'without a name')


def number(value: Any) -> float | None:
    """A finite number, or None."""
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def ways(results: dict) -> list[Way]:
    """Fine-tuning for each share of labels, the largest last; then the linear probe and k-NN."""
    shares = sorted(many(results, 'labels'))
    tuned = [Way(f'fine-tuned, {share_text(share)}', ('finetune', f'{share:g}')) for share in shares]
    return [*tuned, Way('linear probe', ('probe',)), Way('k-NN', ('knn',))]


def share_text(share: float) -> str:
    return ALL if share == 1 else f'{100 * share:g} % of labels'


def main_ways(results: dict) -> list[Way]:
    """Of fine-tuning, the largest share of labels alone."""
    return ways(results)[-3:]


def last_point(results: dict, method: dict, run: dict) -> dict:
    """The point at the end of the budget; empty where a run has not come so far."""
    points, epochs = many(run, 'points'), number(of(method, 'epochs'))
    if epochs is not None:
        points = [point for point in points if of(point, 'epochs') == epochs]
    elif len(points) < (number(of(results, 'points')) or 1):
        points = []
    return points[-1] if points else {}


def values(records: Iterable[Any], *keys: str) -> list[float]:
    """The numbers that are there."""
    return [value for record in records if (value := number(of(record, *keys))) is not None]


def random_of(results: dict, method: dict) -> list[dict]:
    """The runs of the same network with random weights."""
    return many(results, 'random', of(method, 'random'), 'runs')


def scored(results: dict, method: dict, way: Way) -> tuple[list[float], list[float]]:
    """Top-1 in % of each seed at the end of the budget, and of each seed of its random weights."""
    ends = [last_point(results, method, run) for run in many(method, 'runs')]
    return values(ends, *way.keys), values(random_of(results, method), *way.keys)


def mean(of_seeds: Sequence[float]) -> float | None:
    return statistics.fmean(of_seeds) if of_seeds else None


def spread(of_seeds: Sequence[float]) -> float:
    """Standard deviation over seeds (n - 1); 0 for a single one."""
    return statistics.stdev(of_seeds) if len(of_seeds) > 1 else 0.0


def gain(results: dict, method: dict, way: Way) -> float | None:
    """Points of top-1 above random weights."""
    own, random = scored(results, method, way)
    return mean(own) - mean(random) if own and random else None


# --------------------------------------------------------------------------
# verdicts


def order(a: Sequence[float], b: Sequence[float]) -> int:
    """1: every seed of `a` is above every seed of `b`; -1: below; 0: not told apart, as with too few seeds."""
    if min(len(a), len(b)) < FEWEST:
        return 0
    return (min(a) > max(b)) - (max(a) < min(b))


def verdicts(results: dict) -> list[Verdict]:
    """One for each way of judging."""
    return [verdict(results, way) for way in ways(results)]


def verdict(results: dict, way: Way) -> Verdict:
    both = {name_of(method): scored(results, method, way) for method in many(results, 'methods')}
    own = {name: scores for name, (scores, _) in both.items() if scores}
    best = [name for name in own if math.isclose(mean(own[name]), max(map(mean, own.values())))]
    to_best = {name: order(own[best[0]], scores) for name, scores in own.items() if name not in best}
    to_random = {name: order(*pair) if all(pair) else None for name, pair in both.items()}

    def having(orders: dict, which: int | None) -> list[str]:
        return [name for name, found in orders.items() if found == which]

    lists = (having(to_best, 1), having(to_best, 0), *(having(to_random, which) for which in (1, 0, -1, None)))
    return Verdict(way.name, best, text(own[best[0]]) if best else '-', *lists)


def standing(found: Verdict, name: str) -> str:
    """'best', 'equal' where it is not told apart from the best, or ''."""
    best = name in found.best and bool(found.told or found.equal)
    return 'best' if best else 'equal' if name in found.equal else ''


def overall(results: dict) -> str:
    """What holds over all ways of judging."""
    found, names = verdicts(results), [name_of(method) for method in many(results, 'methods')]
    if not all(verdict.best for verdict in found):
        return 'Scores are still missing.'
    beating = [name for name in names if all(name in verdict.above for verdict in found)]
    who = 'Every method beats' if beating == names else f'Only these beat ({", ".join(beating)})'
    who = who if beating else 'No method beats'
    known = of(results, 'random') and not any(verdict.unknown for verdict in found)
    words = f'{who} random weights by every way of judging.' if known else ''
    if len(names) == 1:
        return words
    first = [name for name in names if all(name in verdict.best for verdict in found)]
    apart = '' if any(verdict.equal or len(verdict.best) > 1 for verdict in found) else ', told apart from all others'
    lead = f'{first[0]} has the highest mean' if first else 'No method has the highest mean'
    return f'{lead} by every way of judging{apart if first else ""}. {words}'.strip()


def doubts(results: dict) -> list[str]:
    """What a reader must know before the numbers: what chance gives, and which methods have not learnt their task."""
    words, images, largest = [], number(of(results, 'data', 'val')), number(of(results, 'data', 'largest'))
    if images and largest:
        judged = min(images, number(of(results, 'judge_images')) or images)
        frozen = f', and {100 / judged:.2g} by linear probe and k-NN, which take {judged}' if judged < images else ''
        words.append(
            f'Always naming the largest class gives {largest:.1f} %. '
            f'One validation image is {100 / images:.2g} points{frozen}.'
        )
    ends = {name_of(method): mean(values(last_epochs(method), 'explained')) for method in many(results, 'methods')}
    if idle := [name for name, end in ends.items() if end is not None and end < LEARNT]:
        words.append(
            f'Pretraining explained next to nothing of what was hidden: {", ".join(idle)}. The budget is too small for '
            'this, or the learning rate is wrong; what follows says little about the method.'
        )
    return words


def last_epochs(method: dict) -> list[dict]:
    """Of each pretraining the last epoch's numbers."""
    return [curve[-1] for run in many(method, 'runs') if (curve := many(run, 'curve'))]


def sentences(results: dict) -> list[tuple[str, str]]:
    """(way of judging, what is to be said of it in words), for each."""
    return [(way.name, in_words(verdict(results, way), results, way)) for way in ways(results)]


def in_words(found: Verdict, results: dict, way: Way) -> str:
    if not found.best:
        return 'No score yet.'
    words, leaders = [], ' and '.join(found.best)
    if len(found.best) > 1:
        words.append(f'{leaders} have the same mean, the highest ({found.score} %).')
    elif found.told and not found.equal:
        words.append(f'{leaders} is best ({found.score} %), told apart from all others.')
    elif found.equal:
        words.append(f'{leaders} has the highest mean ({found.score} %), not told apart from {", ".join(found.equal)}.')
    random = {name: values(many(of_name, 'runs'), *way.keys) for name, of_name in (of(results, 'random') or {}).items()}
    best = max((name for name in random if random[name]), key=lambda name: mean(random[name]), default=None)
    highest = max(mean(scored(results, method, way)[0]) or 0 for method in many(results, 'methods'))
    if best is not None and mean(random[best]) > highest:
        words.append(f'Random weights are higher than all: those of {best}, {text(random[best])} %.')
    for lead, names in (
        ('Better than random weights', found.above),
        ('Not told apart from random weights', found.unclear),
        ('Worse than random weights', found.below),
        ('Not known yet against random weights', found.unknown if of(results, 'random') else []),
    ):
        every = len(names) == len(many(results, 'methods')) > 1
        words += [f'{lead}: {"every method" if every else ", ".join(names)}.'] if names else []
    return ' '.join(words)


def rule(results: dict) -> str:
    """What 'told apart' means here, and how often chance alone does it."""
    words = [
        f'Two are told apart if every seed of the one is above every seed of the other, and each has at least {FEWEST}.'
    ]
    seeds = len(many(results, 'seeds'))
    if seeds < FEWEST:
        return ' '.join([*words, f'There are {seeds} here: nothing can be told apart.'])
    odds, methods = math.comb(2 * seeds, seeds) // 2, many(results, 'methods')
    words.append(f'With {seeds} against {seeds} seeds that happens by chance in one of {odds} comparisons.')
    if of(results, 'random'):
        made = len(methods) * len(ways(results))
        words.append(
            f'Were all equal, about {made / odds:.0f} of the {made} comparisons with random weights here would be '
            'told apart.'
        )
    if len(methods) > 1:
        words.append('The best is chosen by the scores themselves: it is told apart by chance more often than that.')
    return ' '.join(words)


# --------------------------------------------------------------------------
# tables


def text(of_seeds: Sequence[float], seeds: int = 0) -> str:
    """'50.2 ± 0.4', with ' (2)' if that is not the number of seeds; '-' without any."""
    if not of_seeds:
        return '-'
    deviation = f' ± {spread(of_seeds):.1f}' if len(of_seeds) > 1 else ''
    return f'{mean(of_seeds) + 0.0:.1f}{deviation}' + (
        f' ({len(of_seeds)})' if seeds and len(of_seeds) != seeds else ''
    )


def epochs_text(method: dict) -> str:
    """What the budget gave, or what the runs have had."""
    ends = (point for run in many(method, 'runs') for point in many(run, 'points')[-1:])
    found = values([method], 'epochs') or values(ends, 'epochs')
    return '-' if not found else '-'.join(dict.fromkeys(f'{epochs:g}' for epochs in (min(found), max(found))))


Mark = Callable[[Verdict, str, str], str]  # (verdict, method, its score) -> the score, marked


def table(results: dict, marked: Mark = lambda found, name, score: score) -> list[list[str]]:
    """A header and a row for each method: epochs, and by each way of judging its score and that of random weights."""
    found, seeds, random = verdicts(results), len(many(results, 'seeds')), bool(of(results, 'random'))
    rows = [['method', 'epochs', *(title for way in ways(results) for title in [way.name, 'random'][: 1 + random])]]
    for method in many(results, 'methods'):
        row = [name_of(method), epochs_text(method)]
        for way, said in zip(ways(results), found, strict=True):
            own, of_random = (text(scores, seeds) for scores in scored(results, method, way))
            row += [marked(said, name_of(method), own), of_random][: 1 + random]
        rows.append(row)
    return rows


def markdown(results: dict) -> str:
    """The table, the best bold and what is not told apart from it with a star, and the verdicts."""

    def marked(found: Verdict, name: str, score: str) -> str:
        kind = standing(found, name)
        return f'**{score}**' if kind == 'best' else f'{score} \\*' if kind == 'equal' else score

    header, *rows = ([cell.replace('|', '\\|') for cell in row] for row in table(results, marked))
    lines = [f'| {" | ".join(row)} |' for row in (header, ['---'] + ['--:'] * (len(header) - 1), *rows)]
    said = [f'- **{way}**: {words}' for way, words in sentences(results)]
    note = 'Top-1 in %, mean ± standard deviation over seeds. Bold: the best; \\*: not told apart from it.'
    lead = ' '.join([*doubts(results), overall(results)])
    return '\n'.join([*lines, '', note, '', lead, '', *said, '', rule(results), ''])
