"""main_pretrain.py with one fault, for tests: `FAULT=exit:0:2` ends every rank right after the checkpoint of epoch 0,
step 2; `FAULT=nan:1:3-5` makes the loss of rank 1 not a number in optimiser steps 3 to 5 of the run, counted from 0.
Ranks that go on after that print what they have for weights at the end of each epoch. `FAULT=raise:1:3` is a bug on
rank 1 in step 3, `FAULT=stop:1:3` a request to it to stop. `FAULT=gpu:1:3` ends rank 1 in step 3, where the others wait
without end, as hosts do whose GPUs wait for a lost rank. `FAULT=wait:1:3` has rank 1 say so in step 3, and wait until
it is asked to stop. Whatever the fault, ranks but the first cannot read a checkpoint."""

import hashlib
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import engine_pretrain
import main_pretrain
import util.run
from util import digests, dist, signals
from util.errors import run_main
from util.run import Run

kind, first, second = os.environ['FAULT'].split(':')


def save_and_exit(self, name, epoch, step, closed=True, save=Run.save, **more):
    save(self, name, epoch, step, closed, **more)
    if (epoch.number, step) == (int(first), int(second)):
        os._exit(9)


def forward_with_nan(training, batch, global_step, micro, forward=engine_pretrain.forward):
    loss, terms = forward(training, batch, global_step, micro)
    from_step, _, to_step = second.partition('-')
    bad = dist.rank() == int(first) and int(from_step) <= global_step <= int(to_step or from_step)
    return loss * (float('nan') if bad else 1.0), terms


def forward_with_bug(training, batch, global_step, micro, forward=engine_pretrain.forward):
    if (dist.rank(), global_step) == (int(first), int(second)):
        raise IndexError('of rank 1 alone')
    return forward(training, batch, global_step, micro)


def forward_with_request(training, batch, global_step, micro, forward=engine_pretrain.forward):
    if (dist.rank(), global_step) == (int(first), int(second)):
        signal.raise_signal(signal.SIGTERM)
    return forward(training, batch, global_step, micro)


def forward_that_waits(training, batch, global_step, micro, forward=engine_pretrain.forward):
    if (dist.rank(), global_step) == (int(first), int(second)):
        print('waiting', flush=True)
        while not signals.requested():
            time.sleep(0.01)
    return forward(training, batch, global_step, micro)


def forward_on_gpu(training, batch, global_step, micro, forward=engine_pretrain.forward):
    if global_step == int(second):
        if dist.rank() == int(first):
            os._exit(9)
        time.sleep(1000)
    return forward(training, batch, global_step, micro)


def init_as_on_gpus(*args, init=dist.init):
    device = init(*args)
    dist.HOST_GROUP = torch.distributed.group.WORLD
    return device


def after_epoch(self, *args, after_epoch=Run.after_epoch, **values):
    after_epoch(self, *args, **values)
    weights = b''.join(value.numpy().tobytes() for value in self.training.core.state_dict().values())
    print(f'rank {dist.rank()}: weights {hashlib.sha256(weights).hexdigest()}', flush=True)


if dist.place().rank:
    digests.Summed = digests.sum_of = None
if kind == 'exit':
    Run.save = save_and_exit
elif kind == 'raise':
    engine_pretrain.forward = forward_with_bug
elif kind == 'stop':
    engine_pretrain.forward = forward_with_request
elif kind == 'wait':
    engine_pretrain.forward = forward_that_waits
elif kind == 'gpu':
    engine_pretrain.forward, dist.init = forward_on_gpu, init_as_on_gpus
    dist.MEETING_S = util.run.TURN_S = 0.2
else:
    engine_pretrain.forward = forward_with_nan
    Run.after_epoch = after_epoch
run_main(lambda: main_pretrain.main(main_pretrain.get_args_parser().parse(stage='pretrain')))
