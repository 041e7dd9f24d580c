"""A fifth method is one file and its name in `METHODS`: here is one, in a copy of the project."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from training import ROOT, environment

HERE = Path(__file__).parent / 'fifth'


@pytest.mark.faults  # a pytest in a pytest
def test_a_fifth_method(tmp_path, measured):
    """Through the contract and the laws of the rooms, pretraining, resume, fine-tuning, `--eval` and pictures."""
    for folder in ('util', 'scripts', 'tests'):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns('__pycache__', '*.json'))
    for file in (*ROOT.glob('*.py'), ROOT / 'pyproject.toml'):
        shutil.copy(file, tmp_path)
    shutil.copy(HERE / 'models_fifth.py', tmp_path)
    shutil.copy(HERE / 'fifth_run.py', tmp_path / 'tests')
    main = tmp_path / 'main_pretrain.py'
    text, added = re.subn(r'^METHODS = \(', 'METHODS = (models_fifth, ', main.read_text(), flags=re.MULTILINE)
    assert added == 1
    main.write_text(text.replace('import models_a2mim\n', 'import models_a2mim\nimport models_fifth\n'))

    tests = ['tests/fifth_run.py', 'tests/methods/test_contract.py', 'tests/house/test_layout.py']
    line = [
        sys.executable,
        '-m',
        'pytest',
        '-p',
        'no:cacheprovider',
        *tests,
        '-k',
        'fifth or every_method or top_level',
    ]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=330, env=environment())
    assert done.returncode == 0, done.stdout
    passed = int(re.search(r'(\d+) passed', done.stdout)[1])
    assert passed >= 15  # of the contract 10, of the layout 3, of the runs 3
    lines = len((HERE / 'models_fifth.py').read_text().splitlines())
    measured(f'a fifth method: a file of {lines} lines, 2 changed in main_pretrain.py; {passed} tests passed')
