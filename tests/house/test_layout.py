"""The rooms and who may enter: arrows point main -> engine -> util and main -> models -> util, never back."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOP = {'main_pretrain', 'main_finetune', 'engine_pretrain', 'engine_finetune'}
METHODS = {path.stem for path in ROOT.glob('models_*.py')}
TENSOR_HELPERS = {'util.nn.hog', 'util.nn.patches', 'util.nn.pos_embed', 'util.nn.swin', 'util.nn.windows'}
FILES = [*ROOT.glob('*.py'), *ROOT.glob('util/*.py'), *ROOT.glob('scripts/*.py')]


def imports(path: Path) -> set[str]:
    """Dotted names of the modules that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f'{node.module}.{alias.name}' if node.module == 'util' else node.module for alias in node.names}
    return found


def roots(modules: set[str]) -> set[str]:
    return {module.split('.')[0] for module in modules}


def test_top_level_is_as_fixed():
    allowed = TOP | {'models_mirl', 'models_localmim', 'models_mixmae', 'models_a2mim'}
    assert {path.stem for path in ROOT.glob('*.py')} <= allowed


@pytest.mark.parametrize('path', FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports(path):
    found = imports(path)
    if path.parent.name == 'util':
        assert not roots(found) & (TOP | METHODS | {'scripts', 'tests'})
    elif path.stem.startswith('models_'):
        assert not roots(found) & (TOP | METHODS | {'scripts'})
        assert {module for module in found if module.startswith('util')} <= TENSOR_HELPERS
    elif path.stem.startswith('engine_'):
        assert not roots(found) & (TOP | METHODS | {'scripts'})
    if path.name not in ('dist.py', 'dist_faults.py'):
        assert not any(module.startswith('torch.distributed') for module in found)


@pytest.mark.parametrize('path', [*ROOT.glob('engine_*.py'), *ROOT.glob('util/*.py')], ids=lambda path: path.name)
def test_only_published_names_methods(path):
    methods = {'mirl', 'localmim', 'mixmae', 'mixmim', 'a2mim', 'simmim'}
    names = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
    strings = {n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)}
    words = ' '.join([*names, *(s for s in strings if isinstance(s, str))]).lower()
    if path.name != 'published.py':
        assert not [method for method in methods if method in words]
