"""Compare our segmenters with the summaries that mmsegmentation left in `tests/parity/segmentation`."""

import re

import fill
import numpy as np
import torch

from util.nn.upernet import UPerHead


def sizes(text: str) -> list[int]:
    """'images(3, 130, 98)' -> [3, 130, 98]"""
    return [int(number) for number in re.findall(r'\d+', text)]


def images(text: str) -> torch.Tensor:
    """'images(N, H, W)' or 'images(N, H, W, C)' -> float32 [N, C, H, W]"""
    n, h, w, *channels = sizes(text)
    return torch.from_numpy(fill.images(n, max(h, w), *channels)[:, :, :h, :w].copy())


def labels(text: str) -> torch.Tensor:
    """'labels(N, H, W, K)' -> int64 [N, H, W], a tenth of it 255"""
    n, h, w, num_classes = sizes(text)
    coarse = fill.uniform(f'segmentation/labels/{n}/{h}/{w}', (n, -(-h // 8), -(-w // 8)))
    label = np.kron(np.floor(coarse * num_classes), np.ones((8, 8)))[:, :h, :w]
    label[fill.uniform(f'segmentation/ignore/{n}/{h}/{w}', (n, h, w)) < 0.1] = 255
    return torch.from_numpy(label).long()


def without_dropout(model: torch.nn.Module) -> torch.nn.Module:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout2d):
            module.p = 0.0
    return model


def difference(ours: torch.Tensor, stats: dict) -> float:
    """Of the first and last eight values, mean and std, as a share of the largest value; or of the norms, if more."""
    x = ours.detach().double().numpy()
    assert list(x.shape) == stats['shape']
    flat = x.reshape(-1)
    pairs = [
        (flat[:8], stats['first8']),
        (flat[-8:], stats['last8']),
        (x.mean(), stats['mean']),
        (x.std(), stats['std']),
    ]
    largest = max(np.abs(np.subtract(a, b)).max() for a, b in pairs) / np.abs(x).max()
    return max(largest, abs(np.linalg.norm(flat) / stats['l2'] - 1))


def gradient_difference(model: torch.nn.Module, case: dict, ours_of: dict[str, list[str]]) -> float:
    """The largest relative difference of a gradient's norm. Those below 1e-6 of the norm of all count as zero.

    `ours_of`: our parameters that the reference's of this name is made of.
    """
    params, floor = dict(model.named_parameters()), 1e-6 * case['grad_l2_global']
    assert {name for names in ours_of.values() for name in names} >= params.keys()
    norms = {name: torch.stack([params[own].grad.norm() for own in ours_of[name]]).norm() for name in case['grad_l2']}
    return max(
        abs(norm - case['grad_l2'][name]).item() / max(case['grad_l2'][name], floor)
        for name, norm in norms.items()
        if max(norm, case['grad_l2'][name]) > floor
    )


def network_differences(
    model: torch.nn.Module, golden: dict, ours_of: dict[str, list[str]], modes: tuple[str, ...] = ('eval', 'train')
) -> dict[str, float]:
    """The largest difference of each kind. Losses and gradients are those of `modes`, in float64.

    The model holds the golden's weights; `ours_of` as in `gradient_difference`.
    """
    imgs, label = images(golden['input']), labels(golden['labels'])
    found, model = {}, without_dropout(model).eval()
    with torch.no_grad():
        maps = model.features(imgs)
        decode = model.decode_head(maps if isinstance(model.decode_head, UPerHead) else maps[-1])
        logits, loss = model(imgs), model(imgs, label)[0]
    found['features'] = max(map(difference, maps, golden['features']))
    heads = [(decode, 'decode_logits'), (model.auxiliary_head(maps[-2]), 'aux_logits'), (logits, 'logits')]
    found['logits'] = max(difference(x, golden[key]) for x, key in heads)
    found['float32 loss'] = abs(loss.item() / golden['eval']['loss_float32'] - 1)
    counts = logits.argmax(dim=1).flatten().bincount(minlength=logits.shape[1]).tolist()
    found['counts'] = max(abs(a - b) for a, b in zip(counts, golden['prediction_counts'], strict=True)) / label.numel()
    model = model.double()
    for mode in modes:
        case = golden[mode]
        loss, terms = model.train(mode == 'train')(imgs.double(), label)
        model.zero_grad()
        loss.backward()
        decode, aux = [value for key, value in case['terms'].items() if 'loss' in key]
        pairs = [(loss, case['loss']), (terms['decode'], decode), (terms['aux'], aux)]
        found[f'{mode} loss'] = max(abs(ours.item() / theirs - 1) for ours, theirs in pairs)
        found[f'{mode} gradients'] = gradient_difference(model, case, ours_of)
    if 'train' not in modes:
        return found
    state = model.state_dict()
    running = {name: state[ours_of[name][0]] for name in golden['train']['running_after']}
    found['running statistics'] = max(
        difference(x, golden['train']['running_after'][name]) for name, x in running.items()
    )
    return found


TOLERANCE = {'counts': 1e-4}


def assert_close(found: dict[str, float]) -> None:
    assert all(value <= TOLERANCE.get(key, 1e-5) for key, value in found.items()), found
