"""The page that scripts/reliability.py prints from what tests have recorded."""

import importlib.util
import json
import sys

import pytest
from training import ROOT

from util.errors import UserError

spec = importlib.util.spec_from_file_location('reliability', ROOT / 'scripts' / 'reliability.py')
reliability = importlib.util.module_from_spec(spec)
spec.loader.exec_module(reliability)


def fault(case: str, line: str) -> dict:
    return {'fault': {'number': 20, 'case': case, 'line': line, 'code': 75, 'left': 'all'}, 'test': 'b', 'passed': True}


def page(tmp_path, monkeypatch, capsys, *files: list[dict]) -> str:
    paths = [tmp_path / f'{i}.jsonl' for i in range(len(files))]
    for path, records in zip(paths, files, strict=True):
        path.write_text(''.join(json.dumps(record) + '\n' for record in records))
    monkeypatch.setattr(sys, 'argv', ['reliability.py', *map(str, paths)])
    reliability.main()
    return capsys.readouterr().out


def test_page(tmp_path, monkeypatch, capsys):
    old, new = ({'promise': {'number': 1, 'figure': f'{n} | 0'}, 'test': 'a', 'passed': True} for n in (7, 8))
    line = 'main_pretrain.py: error: /tmp/pytest-of-me/pytest-3/popen-gw0/test_x0/run stopped'
    text = page(tmp_path, monkeypatch, capsys, [old], [new, fault('SIGTERM', line), fault('SIGINT', line)])
    rows = [row for row in text.splitlines() if row.startswith('| ')]
    assert next(row for row in rows if row.startswith('| 1 | A resumed')).endswith(r'| 8 \| 0 |')  # the latest
    assert sum('**not measured**' in row for row in rows) == 13
    assert '| 20 | **a request to stop, anywhere**: SIGTERM; SIGINT | `run stopped` | 75 | all |' in rows
    assert sum('**not tried**' in row for row in rows) == 38


def test_no_page_of_failures(tmp_path, monkeypatch, capsys):
    with pytest.raises(UserError, match='b has failed: no figures without it'):
        page(tmp_path, monkeypatch, capsys, [fault('SIGTERM', 'stopped') | {'passed': False}])
