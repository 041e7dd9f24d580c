"""What the README says is there: its flags are the programs', its links lead somewhere, its Python runs."""

import re

import torch
from training import ROOT

from models_mirl import create_classifier
from scripts import export, flags, models
from util import config

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
    example, into_timm = re.findall(r'```python\n(.*?)```', README, re.S)
    names: dict = {}
    exec(example.replace('mirl_vit_base', 'mirl_vit_small'), names)
    assert names['features'].shape == (2, 197, 384)
    assert names['loss'].isfinite()
    assert 'mae_pretrain_vit_base.pth: ViT: 148 loaded, 4 missing' in capsys.readouterr().out

    argv = ['mae_pretrain_vit_base.pth', 'exported', '--model', 'mirl_vit_small', '--device', 'cpu']
    export.main(export.get_args_parser().parse(argv))
    capsys.readouterr()
    exec(into_timm, {})
    assert capsys.readouterr().out == 'torch.Size([2, 384])\n'


def test_the_table_of_models():
    """It names every model and counts its recipes; of some, what it says is measured again."""
    known = models.known(README)
    assert models.renewed(README, known) == README, 'to renew the table: python scripts/models.py'
    for name in ('mirl_vit_tiny', 'a2mim_vit_tiny', 'mixmae_tiny', 'localmim_swin_base'):
        assert models.measures(name) == known[name]
    printed = config.models_table().splitlines()
    assert printed[0].split() == ['model', 'encoder', 'pretraining', 'input', 'sizes', 'recipes']
    assert len(printed) == 1 + len(known)
