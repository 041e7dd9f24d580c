"""Recipes: YAML files of flags, found by path or by name. They are trusted, as scripts are."""

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from util.errors import UserError, closest, program

RECIPES = Path(__file__).resolve().parent.parent / 'scripts' / 'recipes'


class RecipeLoader(getattr(yaml, 'CSafeLoader', yaml.SafeLoader)):  # many times faster where it is in C
    """YAML of plain data, in which no key is given twice."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := next((key for key in keys if keys.count(key) > 1), ''):
            raise yaml.constructor.ConstructorError(None, None, f'{twice} is given twice', node.start_mark)
        return super().construct_mapping(node, deep)


def find_recipe(path: Path) -> Path:
    """The file at a path, or the one in scripts/recipes of that bare name. Raises UserError with the closest names."""
    if path.exists() and not path.is_dir():
        return path
    ours = {file.stem: file for file in sorted(RECIPES.glob('*.yaml'))}
    stem = path.name.removesuffix('.yaml')
    if stem in ours and path.parent == Path('.'):
        return ours[stem]
    raise UserError(f'there is no recipe {path}{closest(stem, ours) or f"; those in {RECIPES} go by their names"}')


def read_recipe(path: Path, stage: str = '') -> dict:
    """The flags of a recipe file, less its `recipe` entry of provenance. Raises UserError for what is not a recipe."""
    about, flags = load_recipe(path)
    if stage and about and about.get('stage') != stage:
        raise UserError(f'{path} is a recipe for {program(about.get("stage"))}, not for {program(stage)}')
    return flags


def recipe_value(args: argparse.Namespace, name: str) -> Any:
    """What the recipe of --config has for a flag, as it is written; None without one."""
    config = getattr(args, 'config', None)
    flags = read_recipe(find_recipe(Path(config))) if config else {}
    return {str(key).replace('-', '_'): value for key, value in flags.items()}.get(name)


def of_recipe(args: argparse.Namespace, name: str) -> str:
    """' of the recipe NAME' if that is where a value comes from, as far as one can see, or else ''."""
    value = recipe_value(args, name)
    return f' of the recipe {Path(args.config).stem}' if value is not None and value == getattr(args, name) else ''


def load_recipe(path: Path) -> tuple[dict, dict]:
    """The `recipe` entry of a file, and the rest."""
    try:
        content = yaml.load(path.read_text(encoding='utf-8-sig'), Loader=RecipeLoader)
    except OSError as error:
        raise UserError(f'cannot read the recipe {path}: {error.strerror}') from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date that is none, no UTF-8, ...
        raise UserError(f'{path} cannot be read as a recipe: {error}') from error
    if not isinstance(content, dict) or not isinstance(content.get('recipe', {}), dict):
        raise UserError(f'{path} is not a recipe: it should hold flag: value lines, and recipe: its stage, source, ...')
    about = content.pop('recipe', {})
    if nested := [key for key, value in about.items() if isinstance(value, list | dict)]:
        raise UserError(f'{path}: recipe: {nested[0]} should be text or a number, got {about[nested[0]]!r}')
    return about, content


def count_recipes() -> Counter[str]:
    """How many recipes there are for each model."""
    return Counter(load_recipe(path)[1].get('model') for path in RECIPES.glob('*.yaml'))


def recipes_for(model: str, stage: str) -> list[str]:
    """Paths of the recipes of a model, relative to the repository. Their names begin with its name."""
    found = []
    for path in sorted(RECIPES.glob('*.yaml')):
        if not path.stem.startswith(f'{model}_'):  # reading all of them takes a while
            continue
        about, flags = load_recipe(path)
        if flags.get('model') == model and about.get('stage') == stage:
            found.append(str(path.relative_to(RECIPES.parent.parent)))
    return found
