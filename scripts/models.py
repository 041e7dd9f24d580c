"""Write the table of models in README.md, which `--model list` prints, as METHODS and the recipes have them.

Examples:
    python scripts/models.py          # new models and all recipes; what is known of the other models is kept
    python scripts/models.py --all    # every model is built anew, in shapes alone: minutes
"""

import argparse
import sys
from functools import cache
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import main_pretrain
from util.config import MODELS_BEGIN, README, TABLE_END
from util.recipes import count_recipes

HEAD = '| model | encoder | pretraining | input sizes | recipes |\n|---|---|---|---|---|\n'
UNITS = (8, 16, 32, 64, 224)  # what an image side may have to be a multiple of


@cache
def parameters(name: str, size: int, classifier: bool = False) -> str:
    """How many to train a model without storage has, or '' if it takes no images of this size."""
    method = main_pretrain.find_method(name)
    try:
        with torch.device('meta'):
            if classifier:
                model = method.create_classifier(name, num_classes=1, img_size=size)
            else:
                model = getattr(method, name)(img_size=size)
    except ValueError:
        return ''
    return f'{sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6:.1f} M'


def measures(name: str) -> list[str]:
    """Name, parameters of the encoder and of the pretraining model, and the sizes that it takes."""
    at = {unit: 224 - 224 % unit for unit in UNITS}
    unit = next(unit for unit in UNITS if parameters(name, at[unit]) and parameters(name, at[unit] + unit))
    first = next(size for size in range(unit, 8 * unit, unit) if parameters(name, size))
    sizes = f'multiples of {unit}' + f' from {first}' * (first > unit)
    return [f'`{name}`', parameters(name, at[unit], classifier=True), parameters(name, at[unit]), sizes]


def known(readme: str) -> dict[str, list[str]]:
    """What a README's table says of each model, less the recipes."""
    lines = readme.partition(MODELS_BEGIN)[2].partition(TABLE_END)[0].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip('|').split('|')][:-1] for line in lines]
    return {row[0].strip('`'): row for row in rows}


def renewed(readme: str, known: dict[str, list[str]]) -> str:
    """The text of README.md with the table as it should be; models that are not `known` are measured."""
    counts, names = count_recipes(), [name for method in main_pretrain.METHODS for name in method.__all__]
    rows = [[*(known.get(name) or measures(name)), str(counts.get(name, '-'))] for name in names]
    before, _, rest = readme.partition(MODELS_BEGIN)
    table = HEAD + ''.join(f'| {" | ".join(row)} |\n' for row in rows)
    return before + MODELS_BEGIN + table + TABLE_END + rest.partition(TABLE_END)[2]


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=(__doc__ or '').partition('\n')[0])
    parser.add_argument('--all', action='store_true', help='measure models that are in the table, too')
    text = README.read_text(encoding='utf-8')
    README.write_text(renewed(text, {} if parser.parse_args().all else known(text)), encoding='utf-8')
