"""main_pretrain.py with one fault, for tests: `FAULT=exit:0:2` ends every rank right after the checkpoint of epoch 0,
step 2; `FAULT=nan:1:3` makes the loss of rank 1 not a number in optimiser step 3 of epoch 0."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import main_pretrain
from util import dist
from util.errors import run_main
from util.run import Run

kind, first, second = os.environ['FAULT'].split(':')


def save_and_exit(self, name, epoch, step, logger, save=Run.save):
    save(self, name, epoch, step, logger)
    if (epoch, step) == (int(first), int(second)):
        os._exit(9)


def forward_with_nan(self, imgs, plan=None, forward=main_pretrain.models_mirl.MIRL.forward):
    loss, terms = forward(self, imgs, plan)
    self.calls = getattr(self, 'calls', -1) + 1
    bad = dist.rank() == int(first) and self.calls == int(second)
    return loss * (float('nan') if bad else 1.0), terms


if kind == 'exit':
    Run.save = save_and_exit
else:
    main_pretrain.models_mirl.MIRL.forward = forward_with_nan
run_main(lambda: main_pretrain.main(main_pretrain.get_args_parser().parse(stage='pretrain')))
