"""Write the table of flags in README.md as the mains declare them: python scripts/flags.py"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import main_finetune
import main_pretrain
from scripts import finetune_detection, finetune_segmentation
from util import config

README = Path(__file__).resolve().parent.parent / 'README.md'
PROGRAMS = {  # by the heads of their columns
    'pretraining': main_pretrain,
    'fine-tuning': main_finetune,
    'segmentation': finetune_segmentation,
    'detection': finetune_detection,
}
BEGIN, END = '<!-- flags -->\n', '<!-- end -->'


def row(flag: str, either: dict[str, argparse.Action], parsers: list[config.Parser]) -> str:
    """`| flag | default of each parser | purpose |`; a dash where a parser does not take it."""
    takers = [p.flags[flag] for p in parsers if flag in p.flags]
    names = dict.fromkeys(name for action in takers for name in action.option_strings if not name.startswith('--no_'))
    defaults = [config.purpose_and_default(p.flags[flag])[1] if flag in p.flags else '-' for p in parsers]
    purpose, _ = config.purpose_and_default(either[flag])
    return f'| {", ".join(f"`{name}`" for name in names)} | {" | ".join(defaults)} | {purpose} |\n'


def table() -> str:
    """All flags by their headings, with the defaults of each program."""
    parsers = [program.get_args_parser() for program in PROGRAMS.values()]
    either = {flag: action for parser in reversed(parsers) for flag, action in parser.flags.items()}
    shown = {action.dest: action for action in either.values() if action.help != argparse.SUPPRESS}
    text = f'| flag | {" | ".join(PROGRAMS)} | purpose |\n|---|{"---|" * len(PROGRAMS)}---|\n'
    text += row('--config', either, parsers)
    for heading in config.HEADINGS:
        text += f'| **{heading}** |{" |" * len(PROGRAMS)} |\n'
        actions = [action for action in shown.values() if action.heading == heading]
        text += ''.join(row(action.option_strings[0], either, parsers) for action in actions)
    return text


def renewed(readme: str) -> str:
    """The text of README.md with the table as it should be."""
    before, _, rest = readme.partition(BEGIN)
    return before + BEGIN + table() + END + rest.partition(END)[2]


if __name__ == '__main__':
    README.write_text(renewed(README.read_text(encoding='utf-8')), encoding='utf-8')
