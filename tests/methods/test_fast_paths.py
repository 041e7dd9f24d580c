"""What is faster on a GPU computes the same: fused attention; and how kernels are counted."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.autograd import DeviceType
from training import draw_plan

import models_a2mim
from scripts import benchmark
from util.nn.models import fuse_attention


def test_fused_attention_of_timms_swin():
    """Plain and shifted windows, loss and gradients of the bias tables too."""
    torch.manual_seed(0)
    model, imgs = models_a2mim.simmim_swin_pico(img_size=64, depths=(2, 2, 2, 1)), torch.randn(2, 3, 64, 64)
    for name, param in model.named_parameters():
        if 'bias_table' in name:
            nn.init.normal_(param)
    found = []
    for fused in (False, True):
        attention = [module for module in model.modules() if hasattr(module, 'fused_attn')]
        assert any(module.fused_attn for module in attention) is fused
        model.zero_grad()
        loss, _ = model(imgs, draw_plan(model, 2, 0))
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
        fuse_attention(model)
    assert len(found[0]) == len(found[1]) > 50
    for plain, other in zip(*found, strict=True):
        assert (plain - other).norm() <= 1e-4 * plain.norm()


def test_kernels_are_counted(monkeypatch):
    def event(name, us, device=DeviceType.CUDA, annotation=False):
        span = SimpleNamespace(elapsed_us=lambda: us)
        return SimpleNamespace(name=name, time_range=span, device_type=device, is_user_annotation=annotation)

    events = [event('gemm', 30), event('gemm', 10), event('copy', 5), event('launch', 90, DeviceType.CPU)]
    events += [event('step', 80, annotation=True)]

    class Profile:
        def __init__(self, activities):
            pass

        def __enter__(self):
            return SimpleNamespace(events=lambda: events)

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(benchmark, 'profile', Profile)
    monkeypatch.setattr(torch.cuda, 'synchronize', lambda device: None)
    found = benchmark.kernels(lambda: None, torch.device('cuda'))
    assert {name: count for name, (_, count) in found.items()} == {'gemm': 2, 'copy': 1}
    assert found['gemm'][0] == pytest.approx(40e-6)
