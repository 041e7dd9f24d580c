"""Networks are judged by their features: the published numbers, every kind of network, ranks, and mistakes."""

import json
import math
import re
import sys

import fill
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden import golden
from torch import nn
from training import free_port, start, train

from main_pretrain import find_method
from scripts import analyse, export
from util.analysis import features, probes, similarity
from util.errors import UserError, run_main

DOUBLE_AND_SINGLE = pytest.mark.parametrize('dtype', [torch.float64, torch.float32])


def filled(name: str, *shape: int) -> torch.Tensor:
    return torch.from_numpy(fill.weight(name, shape)).double()


def clusters(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Training and test vectors of the goldens, each with its labels."""
    centres, found = filled('knn/s/centres', 12, 16), []
    for name, labels, count in (('train', 'labels', 240), ('test', 'test_labels', 100)):
        y = torch.from_numpy((12 * fill.uniform(f'knn/s/{labels}', (count,))).astype(int))
        found += [(centres[y] + filled(f'knn/s/{name}', count, 16)).to(dtype), y]
    return tuple(found)


# --------------------------------------------------------------------------
# the functions


@DOUBLE_AND_SINGLE
def test_neighbours_as_published(dtype):
    """DINO's accuracies, DINOv2's classes and probabilities; its probabilities are of the largest k's votes."""
    published = golden('analysis/neighbours.json')
    train, y, test, y_test = clusters(dtype)
    scores = probes.knn_scores(train, y, test, list(map(int, published['k'])), published['temperature'], 12)
    assert scores[200].dtype == dtype
    for k, theirs in published['k'].items():
        ours = scores[int(k)]
        assert ours.argmax(1).tolist() == theirs['dinov2_pred']
        assert probes.hits(ours, y_test, 1).sum() == theirs['dino_top1']
        chances = ours / scores[200].sum(1, keepdim=True)
        assert torch.allclose(chances[:2].double(), torch.tensor(theirs['dinov2_probas_first2']).double(), atol=3e-7)


def test_neighbours_in_blocks(monkeypatch):
    """16-bit features in blocks of queries and of references: as one dense product, for any k, with absent classes."""
    numbers = torch.Generator().manual_seed(0)
    train, test = (torch.randn(n, 9, generator=numbers).half() for n in (50, 31))
    y = 2 * torch.randint(3, (50,), generator=numbers)  # classes 0, 2, 4 of 7
    dense = F.normalize(test.float(), dim=1) @ F.normalize(train.float(), dim=1).T
    monkeypatch.setattr(probes, 'QUERIES', 8)
    monkeypatch.setattr(probes, 'REFERENCES', 13)
    scores = probes.knn_scores(train, y, test, (1, 20, 99), 0.07, 7)
    for k, ours in scores.items():
        best, order = dense.sort(1, descending=True)
        votes = ((best - best[:, :1]) / 0.07).exp().unsqueeze(2) * F.one_hot(y[order], 7)
        assert torch.allclose(ours, votes[:, :k].sum(1), atol=1e-5)
    assert not probes.hits(scores[20], torch.full((31,), 1), 7).any(), 'a class without a vote'


@DOUBLE_AND_SINGLE
def test_probes_as_scikit_learn(dtype):
    train, y, test, y_test = clusters(dtype)
    train, test = probes.standardised(train, test)
    for theirs in golden('analysis/quick_probe.json')['results']:
        for fit, first in ((probes.logistic, 'logits_differences_first'), (probes.ridge, 'scores_first')):
            weight, bias = fit(train, y, 12, theirs['lam'])
            assert weight.dtype == bias.dtype == dtype
            logits, of_fit = (test @ weight.T + bias).double(), theirs[fit.__name__]
            assert abs(weight.norm() / of_fit['weight_l2'] - 1) < 1e-6
            assert 100 * (logits.argmax(1) == y_test).double().mean() == of_fit['acc']
            centred = logits[0] - logits[0].mean() if fit is probes.logistic else logits[0]
            assert torch.allclose(centred, torch.tensor(of_fit[first]).double(), atol=1e-4)


@pytest.mark.parametrize('kind', ['logistic', 'ridge'])
def test_lambda_is_chosen_where_it_was_not_fitted(kind):
    """Noise in many dimensions: the least penalty fits it, and a larger one is right more often elsewhere."""
    numbers = torch.Generator().manual_seed(0)
    y = torch.arange(120) % 2
    X = torch.randn(120, 100, generator=numbers)
    X[:, 0] += 2 * y
    held_back = torch.arange(120) % 3 == 0
    lam, weight, bias = probes.tuned(kind, X, y, 2, held_back)
    right = {}
    for tried, w, b in probes.fits(kind, X[~held_back], y[~held_back], 2, probes.LAMBDAS):
        right[tried] = ((X @ w.T + b).argmax(1) == y)[held_back].sum().item()
    assert lam == max(right, key=right.get) > 1e-6
    again, *_ = (fit[1:] for fit in probes.fits(kind, X, y, 2, [lam]))
    assert torch.equal(weight, again[0])
    assert torch.equal(bias, again[1])


@DOUBLE_AND_SINGLE
def test_rank_as_published(dtype):
    for case in golden('analysis/rank.json')['cases']:
        tag, (n, d) = case['tag'], case['shape']
        scales = torch.diag(0.5 ** torch.arange(6).double())
        Z = 100 * filled(f'rank/{tag}/u', n, 6) @ scales @ filled(f'rank/{tag}/v', 6, d)
        Z = (Z + 0.05 * filled(f'rank/{tag}/n', n, d) + 0.02).to(dtype)
        gram = similarity.Gram(d)
        for batch in Z.split(7):
            gram.update(batch)
        for eps, name in ((1e-7, 'rankme_eps1e-7'), (0, 'effective_rank_no_eps')):
            assert math.isclose(similarity.rankme(Z, eps), case[name], rel_tol=1e-7)
            assert math.isclose(gram.rankme(eps), case[name], rel_tol=1e-7)


KINDS = {  # the blocks of each kind of network, and their widths
    'mirl_vit_tiny': {f'blocks.{i}': 96 for i in range(4)},
    'a2mim_vit_tiny': {f'blocks.{i}': 96 for i in range(4)},
    'a2mim_resnet_tiny': {f'layer{i}.0': 16 * 2**i for i in range(1, 5)},
    'mixmae_tiny': {
        'layers.0.blocks.0': 32,
        'layers.1.blocks.0': 64,
        'layers.1.blocks.1': 64,
        'layers.2.blocks.0': 128,
    },
    'localmim_swin_pico': {f'layers.{i}.blocks.{j}': 24 * 2**i for i in range(4) for j in range(2)},
    'simmim_swin_pico': {f'layers.{i}.blocks.{j}': 48 * 2**i for i, j in ((0, 0), (1, 0), (2, 0), (2, 1), (3, 0))},
    'a2mim_convnext_pico': {
        **{'stages.0.blocks.0': 32, 'stages.1.blocks.0': 64},
        **{'stages.2.blocks.0': 96, 'stages.2.blocks.1': 96, 'stages.3.blocks.0': 128},
    },
}


@pytest.mark.parametrize('name', KINDS)
def test_layers_of_every_kind_of_network(name):
    """Their names and widths; the last is what gives the logits; nothing is left behind in the network."""
    torch.manual_seed(0)
    size = 64 if name.endswith('pico') else 32
    network = find_method(name).create_classifier(name, num_classes=3, img_size=size)
    network.train()
    network.head_drop = nn.Dropout().eval()  # a part with a mode of its own
    modes = [module.training for module in network.modules()]
    imgs, labels = torch.randn(5, 3, size, size), torch.arange(5)
    found, same = features.extract(network, zip(imgs.split(3), labels.split(3), strict=True), layers='all')
    assert {name: x.shape for name, x in found.items()} == {
        layer: (5, width) for layer, width in {**KINDS[name], 'pooled': [*KINDS[name].values()][-1]}.items()
    }
    assert torch.equal(same, labels)
    assert modes == [module.training for module in network.modules()]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
    head = network.get_classifier() if hasattr(network, 'get_classifier') else network.head
    with torch.no_grad():
        assert torch.allclose(head(found['pooled']), network.eval()(imgs), atol=1e-5)
    outputs = []
    network.get_submodule([*KINDS[name]][1]).register_forward_hook(
        lambda module, inputs, output: outputs.append(output)
    )
    network(imgs)
    [x] = outputs
    x = x[:, getattr(network, 'num_prefix_tokens', 0) :] if x.ndim == 3 else x
    places = [axis for axis in range(1, x.ndim) if axis != (1 if 'res' in name or 'conv' in name else x.ndim - 1)]
    assert torch.allclose(found[[*KINDS[name]][1]], x.mean(places), atol=1e-5)


def test_class_token():
    network = find_method('mirl_vit_tiny').create_classifier('mirl_vit_tiny', img_size=32, global_pool='token').eval()
    imgs = torch.randn(2, 3, 32, 32)
    found, _ = features.extract(network, [(imgs, torch.zeros(2))], feature='cls')
    with torch.no_grad():
        assert torch.equal(found, network.forward_features(imgs)[:, 0])
    convnet = find_method('a2mim_resnet_tiny').create_classifier('a2mim_resnet_tiny')
    with pytest.raises(UserError, match='a ResNet has no class token: --feature pooled'):
        features.extract(convnet, [(imgs, torch.zeros(2))], feature='cls')


# --------------------------------------------------------------------------
# the program


@pytest.fixture(scope='module')
def trained(images, tmp_path_factory):
    """A checkpoint whose model has an option of its decoder, and one of its encoder."""
    folder = tmp_path_factory.mktemp('trained')
    short = ['--batch_size', '32', '--epochs', '1', '--warmup_epochs', '0', '--mean', '0.4', '0.5', '0.6']
    train('pretrain', images, folder, *short, '--model_kwargs', 'decoder_dim=24', 'depth=3')
    return folder / 'checkpoint-last.pth'


def line_of(images, output, *more) -> list[str]:
    flags = ['--data_path', images, '--output_dir', output, '--num_workers', '0', '--device', 'cpu', *more]
    return ['knn', *map(str, flags)]


def analysed(images, output, *more) -> dict:
    analyse.main(analyse.parsed(line_of(images, output, *more)))
    return json.loads((output / 'knn.json').read_text())


def test_networks_are_judged(images, trained, tmp_path, capsys, monkeypatch):
    """What the tables and the files say is what the kept features give; two ranks write the same bytes."""
    flags = ['--checkpoint', f'ours={trained}', 'random', '--layers', 'all', '--k', '5', '200', '--batch_size', '10']
    flags += ['--probe', 'ridge', '--save_features', '--max_per_class', '20']
    result = analysed(images, tmp_path, *flags)
    said = capsys.readouterr().out
    ours, random = result['checkpoints']
    assert (ours['mean'], ours['input_size'], ours['model_kwargs']) == ([0.4, 0.5, 0.6], 32, {'depth': 3})
    assert ours['sha256'] == (trained.parent / 'checkpoint-last.pth.sha256').read_text().split()[0]
    assert (random['sha256'], random['mean'], random['model_kwargs']) == (None, ours['mean'], ours['model_kwargs'])
    assert [layer['layer'] for layer in ours['layers']] == ['blocks.0', 'blocks.1', 'blocks.2', 'pooled']
    assert [layer['depth'] for layer in ours['layers']] == [0, 0.333333, 0.666667, 1]
    assert result['images'] == {'train': 60, 'val': 15}
    assert 'network  layer' in said
    assert '--k 200: of 60 training images all vote' in said
    assert 'ours: 75 images x 384 features of 4 layers x 2 bytes: 0.1 MB a rank' in said
    assert (tmp_path / 'knn.png').stat().st_size > 10_000

    kept = np.load(tmp_path / 'features-ours.npz')
    assert all(f'class{label}/' in file for file, label in zip(kept['val/files'], kept['val/labels'], strict=True))
    for layer in ours['layers']:
        X, y, X_val, y_val = (
            torch.from_numpy(kept[f'{split}/{what}'])
            for split in ('train', 'val')
            for what in (layer['layer'], 'labels')
        )
        for k, score in probes.knn_scores(X, y, X_val, (5, 60), 0.07, 3).items():
            right = (score.argmax(1) == y_val).double().mean().item()
            assert math.isclose(layer['knn'][str(k)]['top1'], 100 * right, rel_tol=1e-5)
        assert math.isclose(layer['rankme'], similarity.rankme(X), rel_tol=0.02)  # of features before rounding
        X, X_val = probes.standardised(X, X_val)
        weight, bias = probes.ridge(X, y, 3, layer['probe']['lambda'])
        right = ((X_val @ weight.T + bias).argmax(1) == y_val).double().mean().item()
        assert math.isclose(layer['probe']['top1'], 100 * right, rel_tol=1e-5)

    ranks = {'WORLD_SIZE': '2', 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(free_port())}
    flags += ['--dist_timeout', '120']
    other = start(
        [sys.executable, analyse.__file__, *line_of(images, tmp_path / 'two', *flags)],
        RANK='1',
        LOCAL_RANK='1',
        **ranks,
    )
    for name, value in {**ranks, 'RANK': '0', 'LOCAL_RANK': '0', 'GLOO_SOCKET_IFNAME': 'lo'}.items():
        monkeypatch.setenv(name, value)
    analysed(images, tmp_path / 'two', *flags)
    _, said = other.communicate(60)
    assert other.returncode == 0, said
    for file in ('knn.json', 'features-ours.npz', 'features-random.npz'):
        assert (tmp_path / 'two' / file).read_bytes() == (tmp_path / file).read_bytes()


def test_fine_tuned_networks(images, trained, tmp_path):
    """With their heads. The encoder of a linear probe was frozen: its features are the pretrained ones."""
    short = ['--batch_size', '32', '--epochs', '1', '--model_kwargs', 'depth=3', '--finetune', trained]
    train('finetune', images, tmp_path / 'a', '--probe', 'linear', *short)
    train('finetune', images, tmp_path / 'b', *short)
    files = [f'a={trained}', *(f'{name}={tmp_path / folder / "checkpoint-last.pth"}' for name, folder in ('ba', 'cb'))]
    ours, probe, tuned = analysed(images, tmp_path / 'out', '--probe', 'ridge', '--checkpoint', *files)['checkpoints']
    assert ours['layers'] == probe['layers'] != tuned['layers']
    assert 'missing' not in probe['weights'] + tuned['weights']
    export.main(export.get_args_parser().parse([files[2][2:], str(tmp_path / 'exported')], stage='finetune'))
    given = analysed(images, tmp_path / 'out', '--probe', 'ridge', '--checkpoint', tmp_path / 'exported')
    assert given['checkpoints'][0]['layers'] == tuned['layers']


def test_drawn_again_and_without_matplotlib(images, tmp_path, capsys, monkeypatch):
    """Results of several files come into one table; numbers are written where none can be drawn."""
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    monkeypatch.delitem(sys.modules, 'util.analysis.figures', raising=False)
    monkeypatch.delattr('util.analysis.figures', raising=False)
    few = [
        '--model',
        'mirl_vit_tiny',
        '--input_size',
        '32',
        '--checkpoint',
        'random',
        '--probe',
        'none',
        '--images',
        '9',
    ]
    analysed(images, tmp_path / 'a', *few)
    assert 'no figure: matplotlib is not installed' in capsys.readouterr().out
    monkeypatch.undo()
    analysed(images, tmp_path / 'b', *few, '--seed', '1')
    files = [str(tmp_path / folder / 'knn.json') for folder in 'ab']
    analyse.main(analyse.parsed(['knn', '--from_json', *files, '--output_dir', str(tmp_path / 'c')]))
    assert [file.name for file in (tmp_path / 'c').iterdir()] == ['knn.png']
    said = capsys.readouterr().out
    assert 'random (a)' in said
    assert 'random (b)' in said


@pytest.mark.parametrize(
    ('flags', 'words'),
    [
        (
            ['--checkpoint', 'random'],
            r'--checkpoint random: of which network\? give --model NAME, or random,model=NAME',
        ),
        (['--checkpoint', 'random,model=mirl_vit_tin'], 'unknown --model mirl_vit_tin; did you mean mirl_vit_tiny'),
        (['--checkpoint', 'a=nowhere.pth'], r'nowhere\.pth'),
        (['--checkpoint', '{trained},depht=2'], r'mirl_vit_tiny has no option depht; did you mean depth'),
        (['--checkpoint', '{trained},input_size=x'], r'input_size must be a whole number, got x'),
        (
            ['--checkpoint', '{trained}', '{trained}'],
            r'there are two named trained\d+/checkpoint-last; --checkpoint NAME=',
        ),
        (['--checkpoint', 'a='], r"--checkpoint must be a path, got ''"),
        ([], '--checkpoint takes 1 to 8 checkpoints, got 0'),
        (['--checkpoint', '{trained}', '--feature', 'cls', '--model', 'a2mim_resnet_tiny'], 'has no class token'),
        (['--checkpoint', '{trained}', '--data_path', '{images}/train/class0'], r'no (such|images|folder)'),
        (['--checkpoint', '{trained}', '--epochs', '2'], r'--epochs: it belongs to main_finetune\.py'),
        (['--from_json', '{images}'], r'--from_json .*: Is a directory'),
        (['--from_json', analyse.__file__], 'not a file that this program wrote'),
    ],
)
def test_mistakes(images, trained, tmp_path, capsys, flags, words):
    """One line, exit code 2."""
    flags = [flag.format(trained=trained, images=images) for flag in flags]
    with pytest.raises(SystemExit) as end:
        run_main(lambda: analysed(images, tmp_path, *flags))
    assert end.value.code == 2
    line = capsys.readouterr().err
    assert line.count('\n') == 1
    assert re.search(words, line), line


def test_one_class_is_nothing_to_judge(images, tmp_path):
    one = tmp_path / 'one'
    for split in ('train', 'val'):
        (one / split).mkdir(parents=True)
        (one / split / 'class0').symlink_to(images / split / 'class0')
    with pytest.raises(UserError, match="a single class, 'class0': there is nothing to tell it from"):
        analysed(one, tmp_path / 'out', '--model', 'mirl_vit_tiny', '--checkpoint', 'random')
