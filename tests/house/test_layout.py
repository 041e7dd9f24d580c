"""The rooms and their laws by the imports: scripts -> mains -> engines -> util, models -> util.nn; no way back."""

import ast
import sys
from functools import cache
from pathlib import Path

import pytest

from main_pretrain import METHODS

ROOT = Path(__file__).parents[2]
MAINS, ENGINES = {'main_pretrain', 'main_finetune'}, {'engine_pretrain', 'engine_finetune'}
MODELS = {module.__name__ for module in METHODS}
FILES = sorted([*ROOT.glob('*.py'), *ROOT.glob('util/**/*.py'), *ROOT.glob('scripts/*.py')])
OURS = {*MAINS, *ENGINES, *MODELS, 'util', 'scripts', 'tests'}
ALONE = {  # who alone may import what
    'torch.distributed': {'util/dist.py', 'util/dist_faults.py'},
    'pickle': {'util/weights/unpickle.py', 'util/weights/files.py'},
    'pickletools': {'util/weights/unpickle.py'},
    'zipfile': {'util/weights/files.py'},
    'safetensors': {'util/weights/files.py'},
    'yaml': {'util/recipes.py'},
    'matplotlib': {'util/analysis/figures.py'},
    'pycocotools': {'util/data/coco.py'},
}


def name_of(path: Path) -> str:
    """'util/nn/swin.py' is util.nn.swin, a room's door 'util/weights/__init__.py' is util.weights."""
    return '.'.join(path.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__')


MODULES = {name_of(path): path for path in FILES}


@cache
def nodes(path: Path) -> list[ast.AST]:
    return [*ast.walk(ast.parse(path.read_text()))]


@cache
def imports(path: Path) -> frozenset[str]:
    """Dotted names of the modules that a file imports, wherever in the file, for typing too."""
    found = set()
    for node in nodes(path):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                full = f'{node.module}.{alias.name}'
                found.add(full if full in MODULES else node.module)
    return frozenset(found)


def inside(module: str, *rooms: str) -> bool:
    return any(module == room or module.startswith(f'{room}.') for room in rooms)


def of(*rooms: str) -> list:
    """The files of these rooms, as parameters of a test."""
    return [
        pytest.param(path, id=str(path.relative_to(ROOT))) for name, path in MODULES.items() if inside(name, *rooms)
    ]


def test_the_top_level():
    """The four programs and engines, and a file for each method of `METHODS`, which is the only list of them."""
    assert {path.stem for path in ROOT.glob('*.py')} == MAINS | ENGINES | MODELS


@pytest.mark.parametrize('path', of('util'))
def test_util_imports_nothing_above_it(path):
    assert not [module for module in imports(path) if inside(module, *OURS - {'util'})]


@pytest.mark.parametrize('path', of(*ENGINES))
def test_engines_import_no_model(path):
    assert not [module for module in imports(path) if inside(module, *OURS - {'util'})]
    assert not [module for module in imports(path) if inside(module, 'util.nn', 'util.weights', 'util.config')]


@pytest.mark.parametrize('path', of(*MODELS))
def test_models_enter_util_nn_alone(path):
    """And no other method's file."""
    assert not [module for module in imports(path) if inside(module, *OURS) and not inside(module, 'util.nn')]


@pytest.mark.parametrize('path', of('util.nn'))
def test_util_nn_needs_no_other_room(path):
    libraries = {*sys.stdlib_module_names, 'torch', 'torchvision', 'timm', 'numpy'}
    foreign = [module for module in imports(path) if module.partition('.')[0] not in libraries]
    assert all(inside(module, 'util.nn') for module in foreign)


@pytest.mark.parametrize('path', of('util.data'))
def test_util_data_knows_no_model(path):
    assert not [module for module in imports(path) if inside(module, 'util.nn', 'util.weights', 'util.training')]


@pytest.mark.parametrize('path', of('util.analysis'))
def test_util_analysis_knows_no_method_and_no_run(path):
    rooms = ('util.analysis', 'util.nn', 'util.dist', 'util.errors')
    assert all(inside(module, *rooms) for module in imports(path) if inside(module, *OURS))


@pytest.mark.parametrize('path', FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_util_studies_is_for_analyse_alone(path):
    """And no study needs another."""
    rooms = [module for module in imports(path) if inside(module, 'util.studies')]
    own = inside(name_of(path), 'util.studies')
    assert set(rooms) <= {'util.studies.common'} if own else not rooms or path.name == 'analyse.py'


@pytest.mark.parametrize('path', FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_util_comparison_is_for_compare_alone(path):
    """And what runs programs knows nothing of methods and reports."""
    rooms = [module for module in imports(path) if inside(module, 'util.comparison')]
    inner = inside(name_of(path), 'util.comparison') and path.name != 'jobs.py'
    assert not rooms or inner or path.name == 'compare.py'


@pytest.mark.parametrize('path', FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_util_weights_has_one_door(path):
    if not inside(name_of(path), 'util.weights'):
        assert not [module for module in imports(path) if module.startswith('util.weights.')]


@pytest.mark.parametrize('path', of('util.weights'))
def test_util_weights_knows_no_run(path):
    rooms = ('util.weights', 'util.nn', 'util.digests', 'util.errors', 'util.log', 'util.resources')
    assert all(inside(module, *rooms) for module in imports(path) if inside(module, 'util'))


@pytest.mark.parametrize('path', FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_who_alone_imports(path):
    for library, allowed in ALONE.items():
        if str(path.relative_to(ROOT)) not in allowed:
            assert not [module for module in imports(path) if inside(module, library)]


@pytest.mark.parametrize('path', FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_console_alone_prints(path):
    """`say`, which never ends a run."""
    calls = [node.func.id for node in nodes(path) if is_call(node)]
    assert path.name == 'console.py' or 'print' not in calls


def is_call(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name)


def test_no_circle():
    """Not even for typing: files that import each other, each once all that it imports has been taken away."""
    left = {name: {m for m in imports(path) if m in MODULES and m != name} for name, path in MODULES.items()}
    while free := [name for name, needs in left.items() if not needs & left.keys()]:
        for name in free:
            del left[name]
    assert left == {}


@pytest.mark.parametrize('path', [*of(*ENGINES), *of('util')])
def test_published_alone_names_methods(path):
    """What is not a comment or a docstring names no method."""
    if path.name.startswith('published'):
        return
    documented = [n for n in nodes(path) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)]
    docstrings = {id(n.body[0].value) for n in documented if ast.get_docstring(n) is not None}
    words = [n.id for n in nodes(path) if isinstance(n, ast.Name)]
    words += [n.value for n in nodes(path) if isinstance(n, ast.Constant) and id(n) not in docstrings]
    text = ' '.join(word for word in words if isinstance(word, str)).lower()
    methods = {name.partition('_')[0] for module in METHODS for name in module.__all__} | {'mixmim'}
    assert not [method for method in methods if method in text]
