"""Segmentation and detection on the GPU: the CPU's loss and gradients, bf16, compiled, and a run of each."""

import copy
import re

import pytest
import torch
from gpu.test_networks import difference, layout, without_drop_path, without_zeros
from gpu.test_runs import LAST
from gpu.test_steps import watched  # noqa: F401
from methods.test_detector import NECKS, target, tiny
from pairs import make_pairs
from segmented import without_dropout
from torch._dynamo.utils import counters
from torchvision.models.detection.image_list import ImageList
from training import PROGRAMS, arguments, train

from main_pretrain import find_method
from scripts import make_shapes
from util import dist
from util.data.datasets import to_device

SEGMENTERS = ['mirl_vit_tiny', 'localmim_swin_pico', 'mixmae_tiny', 'a2mim_resnet_tiny']
ALL = dict(rpn_samples=8192, roi_samples=1024)  # of all anchors and regions, so that none is drawn at random
SEGMENT = ['--model_kwargs', 'embed_dim=24', 'num_heads=2', 'channels=16', 'aux_channels=8']
DETECT = [
    *('--model', 'a2mim_resnet_tiny', '--input_size', 48, '--test_size', 48, '--max_size', 48, '--width', 16),
    *('--pretrain_size', 32, '--detector_kwargs', 'anchor_sizes=8,16,32,64,128', 'fc_width=16', 'conv_width=16'),
]
STAGES = {'segment': SEGMENT, 'detect': DETECT}
FIGURE = r'^\* (?:mIoU|box AP) +([\d.]+)'


def segmenter(name):
    torch.manual_seed(0)
    model = find_method(name).create_segmenter(name, 5, img_size=64, channels=16, aux_channels=8)
    return without_dropout(without_zeros(without_drop_path(model)))


def detector(neck):
    return without_drop_path(tiny(neck, **ALL))


def labelled():
    imgs, label = torch.randn(4, 3, 64, 64), torch.randint(0, 5, (4, 64, 64))
    return imgs, label.masked_fill(label == 4, 255)


def boxed():
    return torch.randn(2, 3, 96, 96), [target((8, 16, 40, 60), (50, 50, 90, 80)), target((20, 10, 70, 90))]


def step(model, batch, dtype=None):
    """Loss and gradients, on the CPU."""
    device = next(model.parameters()).device
    imgs, truth = to_device(batch, device)
    imgs = imgs.contiguous(memory_format=layout(model))
    model.zero_grad(set_to_none=True)
    with torch.autocast(device.type, dtype, enabled=dtype is not None):
        losses = model(imgs, truth)
    loss = sum(losses.values()) if isinstance(losses, dict) else losses[0]
    assert loss.dtype == torch.float32
    loss.backward()
    return loss.item(), {name: p.grad.float().cpu() for name, p in model.named_parameters() if p.grad is not None}


NETWORKS = dict.fromkeys(SEGMENTERS, (segmenter, labelled)) | dict.fromkeys(NECKS, (detector, boxed))


@pytest.mark.parametrize('name', NETWORKS)
def test_float32_equals_the_cpu_and_bf16_is_near(name, device, measured):
    """All have BatchNorms over few values or ReLUs, at whose kinks gradients jump."""
    make, inputs = NETWORKS[name]
    model, batch = make(name), inputs()
    loss, grads = step(model, batch)
    there = copy.deepcopy(model).to(device, memory_format=layout(model))
    ours, theirs = step(there, batch)
    assert grads.keys() == theirs.keys()
    half, _ = step(there, batch, torch.bfloat16)
    off = abs(ours - loss) / loss, difference(theirs, grads), abs(half - ours) / ours
    measured(f'{name}: off the CPU by {off[0]:.1e} in the loss, {off[1]:.1e} in gradients; bf16 by {off[2]:.1e}')
    assert off[0] < 1e-3
    assert off[1] < 3e-2
    assert off[2] < 0.05


@pytest.mark.parametrize('neck', NECKS)
def test_anchors_are_those_of_the_cpu(neck, device):
    """Also where maps are bf16."""
    found, sides = [], {'simple': [24, 12, 6, 3, 2], 'fpn': [24, 12, 6, 3, 2], 'c4': [6]}[neck]
    for where, dtype in (('cpu', torch.float32), (device, torch.float32), (device, torch.bfloat16)):
        model = tiny(neck).to(where)
        maps = [torch.zeros(1, 1, side, side, device=where, dtype=dtype) for side in sides]
        found += model.rpn.anchor_generator(ImageList(torch.zeros(1, 3, 96, 96, device=where), [(96, 96)]), maps)
    assert all(torch.equal(anchors.cpu(), found[0]) for anchors in found)


@pytest.mark.parametrize('name', ['mirl_vit_tiny', 'fpn'])
def test_compiles_to_one_graph(name, device, measured):
    """A segmenter whole, of a detector its backbone; losses are eager's."""
    make, inputs = NETWORKS[name]
    core, batch = make(name).to(device), inputs()
    counters.clear()
    compiled = dist.parallel(copy.deepcopy(core), device, True)
    losses = [step(model, batch)[0] for model in (core, compiled)]
    measured(f'{name}: compiled loss {losses[1]:.6f}, eager {losses[0]:.6f}')
    assert (counters['stats']['unique_graphs'], sum(counters['graph_break'].values())) == (1, 0)
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    shapes = tmp_path_factory.mktemp('shapes')
    make_shapes.coco(shapes, 48, 13, 5, seed=0)
    return {'segment': make_pairs(tmp_path_factory.mktemp('pairs')), 'detect': shapes}


@pytest.mark.parametrize('stage', STAGES)
def test_run(stage, folders, tmp_path, device, capsys):
    """Trained on the GPU in bf16; evaluated there and on the CPU in float32 with the same figure."""
    short = ['--steps', 6, '--eval_freq', 3, '--batch_size', 4, '--lr', 1e-3]
    train(stage, folders[stage], tmp_path / 'run', *STAGES[stage], *short, '--device', device)
    program, figures = PROGRAMS[stage], []
    for where in (device, 'cpu'):
        flags = ['--eval', '--resume', tmp_path / 'run' / LAST, '--device', where, '--amp_dtype', 'none']
        capsys.readouterr()
        words = arguments(folders[stage], tmp_path / 'none', *STAGES[stage], *flags)
        program.main(program.get_args_parser().parse(words, stage=stage))
        figures.append(float(re.search(FIGURE, capsys.readouterr().out, re.MULTILINE)[1]))
    assert figures[0] == pytest.approx(figures[1], abs=1)


def test_segmentation_never_waits(folders, tmp_path, device, watched):  # noqa: F811
    flags = [*SEGMENT, '--steps', 8, '--eval_freq', 8, '--batch_size', 4, '--lr', 1e-3, '--print_freq', 1000]
    train('segment', folders['segment'], tmp_path, *flags, '--device', device)
    assert len(watched) == 4
