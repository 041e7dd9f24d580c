"""docs/demo.ipynb runs, and what is kept in it shows no fault and nothing of the machine that it ran on."""

import json
import re
import sys

import pytest
from training import ROOT

from scripts import make_digits

FILE = ROOT / 'docs' / 'demo.ipynb'
CELLS = [cell for cell in json.loads(FILE.read_text(encoding='utf-8'))['cells'] if cell['cell_type'] == 'code']


@pytest.mark.timeout(120)
def test_it_runs(tmp_path, monkeypatch, capsys):
    """In docs/, in one process and without Jupyter; one epoch of every tenth digit."""
    digits = make_digits.load_digits()
    digits.images, digits.target = digits.images[::10], digits.target[::10]
    monkeypatch.setattr(make_digits, 'load_digits', lambda: digits)
    monkeypatch.chdir(FILE.parent)
    monkeypatch.setattr(sys, 'path', [*sys.path])
    monkeypatch.setattr('tempfile.tempdir', str(tmp_path))
    names: dict = {}
    for number, cell in enumerate(CELLS):
        source = re.sub(r'^EPOCHS = \d+', 'EPOCHS = 1', ''.join(cell['source']), flags=re.M)
        exec(compile(source, f'{FILE.name}, code cell {number}', 'exec'), names)
    assert names['EPOCHS'] == 1
    assert names['difference'] < 1e-6
    assert {
        name: set(panels) >= {'masked', 'composite'} for name, panels in names['pictures'].items()
    } == dict.fromkeys(names['MODELS'], True)
    assert 'largest difference of features' in capsys.readouterr().out


def test_what_is_kept():
    """Every cell was run, in order; there are pictures and tables, no error or warning, no path of a machine."""
    assert FILE.stat().st_size < 400_000
    assert [cell['execution_count'] for cell in CELLS] == list(range(1, len(CELLS) + 1))
    outputs = [output for cell in CELLS for output in cell['outputs']]
    assert sum('image/png' in output.get('data', {}) for output in outputs) >= 4
    text = [''.join(output.get('text') or output['data']['text/plain']) for output in outputs]
    assert any('20-NN' in part for part in text)
    assert all(output['output_type'] in ('stream', 'execute_result') for output in outputs)
    assert all(output.get('name') != 'stderr' for output in outputs)
    assert not [part for part in text if re.search(r'(^|[\s\'"=(])[/~]\w|\w:\\', part)]
