"""Recipes as their programs resolve them: what the tests of each method's recipes share."""

import argparse
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import nn
from training import MAINS, shapes

import main_finetune
import main_pretrain
from scripts import finetune_detection, finetune_segmentation
from util import optim
from util.recipes import RECIPES, load_recipe

OWN, ADE20K, COCO = '_cifar10_', '_ade20k_', '_coco_'
PROGRAMS = MAINS | {'segment': finetune_segmentation, 'detect': finetune_detection}
# what decides nothing of a network, and differs in recipes that share one
SCHEDULE = 'config given epochs warmup_epochs lr blr min_lr batch_size effective_batch_size lr_sched lr_decay_epochs'
NETWORKS: dict[str, nn.Module] = {}


def stage_of(name: str) -> str:
    for part, stage in {ADE20K: 'segment', COCO: 'detect', '_pretrain': 'pretrain'}.items():
        if part in name:
            return stage
    return 'finetune'


def published(*methods: str) -> set[str]:
    """Names of the recipes of these methods for ImageNet, but for linear probes; those for CIFAR-10 are our own."""
    names = {path.stem for path in RECIPES.glob('*.yaml') if path.stem.startswith(methods)}
    others = (OWN, ADE20K, COCO, '_linprobe')
    return {name for name in names if not any(part in name for part in others)}


def resolve(name: str, *flags: str) -> argparse.Namespace:
    """The arguments of a recipe, as the program that it is for takes them."""
    stage = stage_of(name)
    return PROGRAMS[stage].get_args_parser().parse(['--config', name, *flags], stage=stage)


def resolved_values(name: str) -> dict:
    """The arguments, with the learning rate that they come to and the accuracy that the recipe states."""
    args = resolve(name)
    about, _ = load_recipe(RECIPES / f'{name}.yaml')
    lr, _ = optim.scaled_lr(args, optim.accumulation(args))
    return vars(args) | {'lr': lr, 'accuracy': about['accuracy']}


def network(name: str) -> nn.Module:
    """A recipe's pretraining model or classifier of 1000 classes, without storage; shared: do not change it."""
    args = resolve(name)
    key = repr(sorted((flag, value) for flag, value in vars(args).items() if flag not in SCHEDULE.split()))
    if key not in NETWORKS:
        with shapes():
            if stage_of(name) == 'pretrain':
                NETWORKS[key] = main_pretrain.create_model(args).to('meta')  # sin-cos tables are made on the CPU
            else:
                NETWORKS[key] = main_finetune.create_classifier(args, 1000)
    return NETWORKS[key]


def learning_rates(args: argparse.Namespace) -> Callable[[float], dict[float, float]]:
    """epoch -> {lr_scale: what an optimiser's group of that scale is given}, for scales 1 and 0.5."""
    lr, _ = optim.scaled_lr(args, optim.accumulation(args))
    layer = nn.Linear(2, 2)
    groups = optim.param_groups(layer, {'weight': (0, 1.0, True), 'bias': (0, 0.5, True)}, args.weight_decay)
    optimizer = optim.GuardedOptimizer(layer, optim.adamw(groups, lr, args.betas), torch.device('cpu'), False, None)

    schedule = optim.schedule(args, lr)

    def at(epoch: float) -> dict[float, float]:
        optimizer.set_lr(schedule(epoch))
        return {group['lr_scale']: group['lr'] for group in optimizer.inner.param_groups}

    return at


def launch_on(world_size: int, monkeypatch) -> None:
    """From here on, as if so many processes had been launched."""
    monkeypatch.setattr(optim.dist, 'place', lambda: SimpleNamespace(rank=0, local_rank=0, world_size=world_size))
