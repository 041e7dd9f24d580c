"""Every promise and fault of docs/reliability.md has a test that is marked with its number, and the other way round."""

import ast
import re

import pytest
from training import ROOT

KINDS = {'promise': r'^\| (\d+) \| [^*]', 'fault': r'^\| (\d+) \| \*\*'}  # rows of the page: a fault's name is bold


def on_the_page(kind: str) -> set[int]:
    page = (ROOT / 'docs' / 'reliability.md').read_text()
    table = page.partition('## How a run ends')[0 if kind == 'promise' else 2]
    return {int(number) for number in re.findall(KINDS[kind], table, re.MULTILINE)}


def in_the_tests(kind: str) -> set[int]:
    """The numbers in `@pytest.mark.kind(...)` of all test functions, which no other holds."""
    trees = [ast.parse(file.read_text()) for file in (ROOT / 'tests').rglob('test_*.py')]
    tests = [node for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)]
    calls = [call for test in tests for call in test.decorator_list if isinstance(call, ast.Call)]
    return {number.value for call in calls if ast.unparse(call.func) == f'pytest.mark.{kind}' for number in call.args}


@pytest.mark.parametrize(('kind', 'count'), [('promise', 14), ('fault', 41)])
def test_the_page_and_the_tests_agree(kind, count):
    assert on_the_page(kind) == in_the_tests(kind) == set(range(1, count + 1))
