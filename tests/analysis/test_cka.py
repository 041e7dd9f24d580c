"""Layers are compared by CKA over batches of images: the published numbers, the formula, networks, and mistakes."""

import argparse
import json
import re
import shutil

import fill
import pytest
import timm.models
import torch
from golden import golden
from torch import Tensor, nn

from scripts import analyse
from util import rng
from util.analysis import similarity
from util.analysis.features import block_names, captured, evaluating
from util.analysis.similarity import MinibatchCKA
from util.errors import UserError, run_main
from util.studies import cka
from util.studies.common import batches

DOUBLE_AND_SINGLE = pytest.mark.parametrize('dtype', [torch.float64, torch.float32])


def filled(name: str, *shape: int) -> Tensor:
    return 10 * torch.from_numpy(fill.weight(f'cka/s/{name}', shape)).double()


def of_layers(n: int, widths: list[int]) -> list[Tensor]:
    """Features of the goldens, of one network."""
    base = filled('base', n, 10)
    mixed = [torch.tanh(base @ filled(f'mix{i}', 10, width)) for i, width in enumerate(widths)]
    return [x + 0.3 * (i + 1) * filled(f'noise{i}', *x.shape) + 0.5 for i, x in enumerate(mixed)]


def of_batches(list_a: list[Tensor], list_b: list[Tensor], batch: int) -> Tensor:
    ours = MinibatchCKA()
    for first in range(0, len(list_a[0]), batch):
        ours.update(*([x[first : first + batch] for x in features] for features in (list_a, list_b)))
    return ours.result()


@DOUBLE_AND_SINGLE
def test_layers_as_published(dtype):
    """The TensorFlow original's numbers, within a network and between two."""
    published = golden('analysis/cka_layers.json')
    a = of_layers(published['n'], published['widths_a'])
    b = [torch.sin(1.5 * y + 0.2) for y in of_layers(published['n'], published['widths_b'])]
    for features, sums in ((a, published['a_sums']), (b, published['b_sums'])):
        assert [x.sum().item() for x in features] == pytest.approx(sums)
    a, b = ([x.to(dtype) for x in features] for features in (a, b))
    for other, theirs in ((a, published['within_a']), (b, published['a_against_b'])):
        ours = of_batches(a, other, published['batch'])
        assert ours.dtype == torch.float64
        difference = (ours - torch.tensor(theirs, dtype=torch.float64)).abs().max().item()
        assert difference < {torch.float64: 1e-11, torch.float32: 1e-6}[dtype]


def stock(name: str, kwargs: dict, dtype: torch.dtype) -> nn.Module:
    make = {
        'timm VisionTransformer': timm.models.VisionTransformer,
        'timm ResNet(BasicBlock)': lambda **options: timm.models.ResNet(timm.models.resnet.BasicBlock, **options),
    }
    network = make[name](**kwargs).to(dtype)
    state = network.state_dict()
    for key, value in state.items():
        if value.is_floating_point():
            value.copy_(torch.from_numpy(fill.weight(key, value.shape)).double() * (2 if value.ndim >= 2 else 1))
    return network


@DOUBLE_AND_SINGLE
@torch.no_grad()
def test_networks_as_published(dtype):
    """PyTorch-Model-Compare's numbers, for a ViT and a ResNet: all tokens and channels."""
    published = golden('analysis/cka_networks.json')
    images = torch.from_numpy(fill.images(32, 64)).to(dtype)
    features = []
    for which in 'ab':
        network = stock(published[which]['network'], published[which]['kwargs'], dtype)
        modules = {name: network.get_submodule(name) for name in published[f'modules_{which}']}
        with evaluating(network), captured(modules, lambda name, output: output) as found:
            network(images)
        features.append([found[name] for name in modules])
    ours = of_batches(*features, published['batch'])
    difference = (ours - torch.tensor(published['cka'], dtype=torch.float64)).abs().max().item()
    assert difference < {torch.float64: 1e-11, torch.float32: 1e-5}[dtype]


def hsic(K: Tensor, L: Tensor) -> Tensor:
    """The unbiased estimate as it is written (Song et al. 2012, eq. 5)."""
    n, K, L = len(K), K - K.diag().diag(), L - L.diag().diag()
    both = K @ L
    last = K.sum() * L.sum() / ((n - 1) * (n - 2)) - 2 * both.sum() / (n - 2)
    return (both.trace() + last) / (n * (n - 3))


def test_as_the_formula(monkeypatch):
    """Pair by pair, in as few as 4 images, and wide features in parts."""
    numbers = torch.Generator().manual_seed(0)
    for n in (4, 9):
        a, b = ([torch.randn(3, n, *shape, generator=numbers) + 1 for shape in ((5,), (2, 3, 4))] for _ in 'ab')
        ours = MinibatchCKA()
        for batch in range(3):
            ours.update([x[batch] for x in a], [x[batch] for x in b])
        grams = [[x.flatten(2).double() @ x.flatten(2).double().mT for x in features] for features in (a, b)]

        def total(x: Tensor, y: Tensor) -> Tensor:
            return sum(hsic(K, L) for K, L in zip(x, y, strict=True))

        theirs = [[total(x, y) / (total(x, x) * total(y, y)).sqrt() for y in grams[1]] for x in grams[0]]
        assert torch.allclose(ours.result(), torch.tensor(theirs, dtype=torch.float64), rtol=1e-10)
    whole = similarity.centred_gram(a[1][0])
    monkeypatch.setattr(similarity, 'COLUMNS', 7)
    assert torch.allclose(similarity.centred_gram(a[1][0]), whole, rtol=1e-12)


def test_batches_that_do_not_fit():
    x = torch.rand(6, 2)
    with pytest.raises(UserError, match='CKA needs 4 images or more in a batch, got 3'):
        MinibatchCKA().update([x[:3]], [x[:3]])
    with pytest.raises(UserError, match=r'the same images, equally many in each, got \[5, 6\]'):
        MinibatchCKA().update([x], [x[:5]])
    ours = MinibatchCKA()
    ours.update([x], [x])
    with pytest.raises(UserError, match=r'got \[5, 6\]'):
        ours.update([x[:5]], [x[:5]])


# --------------------------------------------------------------------------
# the study

VIT, RESNET = 'random,model=mirl_vit_tiny,input_size=32', 'random,model=a2mim_resnet_tiny,input_size=40'


def line_of(images, output, *more) -> list[str]:
    flags = ['--data_path', images, '--output_dir', output, '--num_workers', '0', '--device', 'cpu']
    return ['cka', *map(str, flags), '--checkpoint', VIT, f'b={RESNET}', f'c={VIT},depth=2', *more]


def analysed(images, output, *more) -> dict:
    analyse.main(analyse.parsed(line_of(images, output, *more)))
    return json.loads((output / 'cka.json').read_text())


def test_networks_are_compared(images, tmp_path, capsys):
    """Of any two, also of other kinds and sizes of image: as `MinibatchCKA` of their blocks, on the same images."""
    result = analysed(images, tmp_path, '--batch_size', '7')
    said = capsys.readouterr().out
    assert 'batches of 7 images: 2; 1 image of an incomplete one are left out' in said
    assert re.search(r'^b +4 +0\.\d{3} +0\.\d{3} +-$', said, re.MULTILINE)
    assert (tmp_path / 'cka.png').stat().st_size > 10_000
    args = analyse.parsed(line_of(images, tmp_path))
    job = analyse.ready(argparse.Namespace(**vars(args) | analyse.FIXED))
    order = rng.generator(0, rng.ORDER).permutation(15)
    features = {}
    for network in job.networks:
        blocks = block_names(network.core)
        with torch.no_grad(), captured(blocks, lambda name, output: output) as found:
            [(imgs, _, places)] = batches(job, network)
            assert places == list(range(15))
            network.core(imgs)
        features[network.name] = [found[name][order][:14] for name in blocks]
    names = list(features)
    assert [of['layers'] for of in result['checkpoints']] == [list(block_names(of.core)) for of in job.networks]
    whose = [(0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2)]
    assert [(pair['rows'], pair['columns']) for pair in result['pairs']] == [(names[i], names[j]) for i, j in whose]
    for pair in result['pairs']:
        of_pair = [features[pair[side]] for side in ('rows', 'columns')]
        whole = of_batches(*of_pair, 7)
        parts = torch.stack([of_batches(*([x[i : i + 7] for x in of] for of in of_pair), 7) for i in (0, 7)])
        assert torch.allclose(torch.tensor(pair['cka']).double(), whole, atol=1e-5)
        assert torch.allclose(torch.tensor(pair['deviation_over_batches']).double(), parts.std(0), atol=1e-5)
    with pytest.raises(UserError, match='--from_json: cka compares the networks of one file; give one'):
        analyse.main(analyse.parsed(['cka', '--from_json', *[str(tmp_path / 'cka.json')] * 2]))


def test_batches_of_images_that_cannot_be_read(images, tmp_path, capsys):
    """They are left out, and nothing else changes: the last place of the order is in the second batch."""
    broken = tmp_path / 'broken'
    shutil.copytree(images / 'val', broken / 'val')
    files = sorted((broken / 'val').rglob('*.*'))
    files[rng.generator(0, rng.ORDER).permutation(15)[13]].write_bytes(b'no image')
    result = analysed(broken, tmp_path / 'out', '--batch_size', '7', '--bad_images', 'skip', '--max_bad_images', '0.5')
    assert 'batches left out, since they hold images that cannot be read: 1 of 2' in capsys.readouterr().out
    assert (result['images'], result['batches']) == (7, 1)
    assert 'deviation_over_batches' not in result['pairs'][0]


@pytest.mark.parametrize('square', [0.0, float('nan'), float('inf')])
def test_blocks_that_cannot_be_compared(square):
    with pytest.raises(UserError, match=r'features of blocks\.1 of a are not finite, or the same for every image'):
        cka.check(torch.tensor([1.0, square]).diag(), {'a': ['blocks.0', 'blocks.1']})


@pytest.mark.parametrize(
    ('flags', 'words'),
    [
        (['--batch_size', '3'], '--batch_size 3, 15 images: CKA needs batches of 4 or more'),
        (['--images', '3'], '--batch_size 256, 3 images: CKA needs batches of 4 or more'),
        ([], '15 images make no batch of --batch_size 256; --batch_size 15 takes them all'),
    ],
)
def test_mistakes(images, tmp_path, capsys, flags, words):
    """One line, exit code 2."""
    with pytest.raises(SystemExit) as end:
        run_main(lambda: analysed(images, tmp_path, *flags))
    assert end.value.code == 2
    line = capsys.readouterr().err
    assert line.count('\n') == 1
    assert words in line
