"""Write the tables of flags in README.md as the programs declare them: python scripts/flags.py"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import main_finetune
import main_pretrain
from scripts import finetune_segmentation
from util import config

README = Path(__file__).resolve().parent.parent / 'README.md'
BEGIN, END = '<!-- flags: main_pretrain, main_finetune -->\n', '<!-- end -->'
OF_SEGMENTATION = '<!-- flags: scripts/finetune_segmentation -->\n'


def row(flag: str, either: dict[str, argparse.Action], parsers: list[config.Parser]) -> str:
    """`| flag | default of each parser | purpose |`; a dash where a parser does not take it."""
    names = [name for name in either[flag].option_strings if not name.startswith('--no_')]
    defaults = [config.purpose_and_default(p.flags[flag])[1] if flag in p.flags else '-' for p in parsers]
    purpose, _ = config.purpose_and_default(either[flag])
    return f'| {", ".join(f"`{name}`" for name in names)} | {" | ".join(defaults)} | {purpose} |\n'


def table() -> str:
    """All flags by their headings, with the defaults of pretraining and fine-tuning."""
    parsers = [main_pretrain.get_args_parser(), main_finetune.get_args_parser()]
    either = parsers[1].flags | parsers[0].flags
    shown = {action.option_strings[0]: action for action in either.values() if action.help != argparse.SUPPRESS}
    text = '| flag | pretraining | fine-tuning | purpose |\n|---|---|---|---|\n'
    text += row('--config', either, parsers)
    for heading in config.HEADINGS:
        text += f'| **{heading}** | | | |\n'
        text += ''.join(row(flag, either, parsers) for flag, action in shown.items() if action.heading == heading)
    return text


def segmentation_table() -> str:
    """Flags of segmentation by their headings, but those that are fine-tuning's, default and purpose too."""
    ours, theirs = finetune_segmentation.get_args_parser(), main_finetune.get_args_parser().flags
    told = config.purpose_and_default
    own = {
        action.option_strings[0]: action
        for flag, action in ours.flags.items()
        if action.help != argparse.SUPPRESS and (flag not in theirs or told(theirs[flag]) != told(action))
    }
    text = '| flag | default | purpose |\n|---|---|---|\n'
    for heading in config.HEADINGS:
        rows = ''.join(row(flag, own, [ours]) for flag, action in own.items() if action.heading == heading)
        text += f'| **{heading}** | | |\n{rows}' if rows else ''
    return text


def renewed(readme: str) -> str:
    """The text of README.md with the tables as they should be."""
    for begin, lines in ((BEGIN, table()), (OF_SEGMENTATION, segmentation_table())):
        before, _, rest = readme.partition(begin)
        readme = before + begin + lines + END + rest.partition(END)[2]
    return readme


if __name__ == '__main__':
    README.write_text(renewed(README.read_text(encoding='utf-8')), encoding='utf-8')
