"""What the README says is there: its flags are the programs', its links lead somewhere, its Python runs."""

import re

import torch
from training import ROOT

from models_mirl import create_classifier
from scripts import flags

README = (ROOT / 'README.md').read_text(encoding='utf-8')


def test_the_table_of_flags():
    assert flags.renewed(README) == README, 'flags have changed; to renew the table: python scripts/flags.py'


def test_links():
    """To files, and to headings as GitHub names them."""
    headings = {re.sub(r'[^\w -]', '', line.lower()).replace(' ', '-') for line in re.findall('^#+ (.*)', README, re.M)}
    links = [link for link in re.findall(r'\]\(([^)]+)\)', README) if '://' not in link]
    assert len(links) > 10
    assert not [link for link in links if link[1:] not in headings and not (ROOT / link).is_file()]


def test_python(tmp_path, monkeypatch, capsys):
    """The example, of a smaller size, with an encoder in MAE's names for the file that it loads."""
    monkeypatch.chdir(tmp_path)
    state = create_classifier('mirl_vit_small', num_classes=1).state_dict()
    torch.save(
        {'model': {key: value for key, value in state.items() if not key.startswith(('head', 'fc_norm'))}},
        'mae_pretrain_vit_base.pth',
    )
    [example] = re.findall(r'```python\n(.*?)```', README, re.S)
    names: dict = {}
    exec(example.replace('mirl_vit_base', 'mirl_vit_small'), names)
    assert names['features'].shape == (2, 197, 384)
    assert names['loss'].isfinite()
    assert 'mae_pretrain_vit_base.pth: ViT: 148 loaded, 4 missing' in capsys.readouterr().out
