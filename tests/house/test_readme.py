"""What the README says of the flags is what the programs declare."""

from training import ROOT

from scripts import flags


def test_the_table_of_flags():
    readme = (ROOT / 'README.md').read_text(encoding='utf-8')
    assert readme == flags.renewed(readme), 'flags have changed; to renew the table: python scripts/flags.py'
