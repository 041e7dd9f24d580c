"""A main of the project, of which two ranks share one GPU: NCCL refuses that, gloo carries tensors of a GPU too."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

import main_pretrain
from util import dist
from util.errors import run_main

join = dist.torch_dist.init_process_group
dist.own_device = lambda device: torch.device(device)
dist.torch_dist.init_process_group = lambda backend, *args, **kwargs: join('gloo', *args, **kwargs)
run_main(lambda: main_pretrain.main(main_pretrain.get_args_parser().parse(stage='pretrain')))
