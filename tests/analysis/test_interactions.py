"""Interactions and occlusion: the numbers of the published code, every distinct cell set once, resumed at any image."""

import hashlib
import json
import re
from argparse import Namespace

import numpy as np
import pytest
import torch
from fill import images as filled_images
from fill import weight
from golden import golden
from timm.models.resnet import BasicBlock, ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from training import train

from scripts import analyse
from util.analysis import interactions, occlusion
from util.data import named
from util.errors import UserError, run_main
from util.studies import interactions as study
from util.studies.occlusion import hidden_first

STOCK = {
    'timm VisionTransformer': VisionTransformer,
    'timm ResNet(BasicBlock)': lambda **kwargs: ResNet(BasicBlock, **kwargs),
}


def network_of(known: dict, dtype=torch.float64):
    network = STOCK[known['network']](**known['kwargs'])
    for key, tensor in network.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.from_numpy(weight(key, tensor.shape)) * (2 if tensor.ndim > 1 else 1))
    return network.to(dtype).eval()


def sha256(array) -> str:
    return hashlib.sha256(np.asarray(array, '<i8').tobytes()).hexdigest()


def test_samples_as_published():
    known = golden('analysis/interactions_samplers.json')
    grid, seed = known['grid'], known['seed']
    for image in known['images']:
        k = image['image']
        pairs = interactions.sample_pairs(grid, known['pairs'], known['radius'], 1000 * k + seed)
        assert sha256(pairs) == image['pairs_sha256']
        for of_order in (image['contexts'][number] for number in (0, 1, -1)):
            m = interactions.order_of(of_order['ratio'], grid)
            contexts = interactions.sample_contexts(pairs, grid, m, known['contexts'], 1000 * k + m + 1 + seed)
            assert (m, sha256(contexts)) == (of_order['order'], of_order['sha256'])


def test_seeds_as_published():
    """Of the study's samples, by the place of the image, and for each order anew."""
    known = golden('analysis/interactions_samplers.json')
    grid, ratios = known['grid'], [0, 0.05, 0.5, 1]
    args = Namespace(**{name: known[name] for name in ('seed', 'pairs', 'contexts', 'radius')}, orders=ratios)
    for image in known['images']:
        pairs = interactions.sample_pairs(grid, known['pairs'], known['radius'], image['pair_seed'])
        expected = [of for of in image['contexts'] if of['ratio'] in ratios]
        for of_order, (order, *found) in zip(expected, study.samples(args, grid, image['image']), strict=True):
            assert order == of_order['order']
            contexts = interactions.sample_contexts(pairs, grid, order, known['contexts'], of_order['seed'])
            theirs = interactions.distinct_sets(pairs, contexts, grid)
            assert all(np.array_equal(x, y) for x, y in zip(found, theirs, strict=True))


def published(kind):
    """A network's golden, its images, and the pairs and contexts of each image and ratio."""
    known = golden(f'analysis/interactions_{kind}.json')
    imgs = torch.from_numpy(filled_images(2, known['kwargs'].get('img_size', 64)))
    grid, seed, samples = known['grid'], known['seed'], []
    for k in range(2):
        pairs = interactions.sample_pairs(grid, known['pairs_per_image'], known['radius'], 1000 * k + seed)
        orders = [interactions.order_of(ratio, grid) for ratio in known['ratios']]
        assert orders == known['orders']
        count = known['contexts_per_pair']
        samples.append(
            [(pairs, interactions.sample_contexts(pairs, grid, m, count, 1000 * k + m + 1 + seed)) for m in orders]
        )
        assert [sha256(contexts) for _, contexts in samples[-1]] == known['contexts_sha256'][k]
    return known, imgs, samples


@pytest.mark.parametrize(
    ('kind', 'dtype'), [('vit', torch.float64), ('vit', torch.float32), ('resnet', torch.float32)], ids=str
)
def test_interactions_as_published(kind, dtype):
    known, imgs, samples = published(kind)
    network = network_of(known, dtype)
    for reward in interactions.REWARDS:
        if f'interactions_{reward}' not in known:
            continue
        found = torch.stack(
            [
                torch.stack(
                    [
                        interactions.interactions(
                            network, img.to(dtype), label, *of_image[r], known['grid'], reward, batch_size=50
                        )
                        for img, label, of_image in zip(imgs, known['labels'], samples, strict=True)
                    ]
                )
                for r in range(len(known['ratios']))
            ]
        )
        assert found.dtype == torch.float64
        theirs = torch.tensor(known[f'interactions_{reward}'], dtype=torch.float64)
        J = torch.tensor(known[f'strength_{reward}'], dtype=torch.float64)
        off, of_J = (found - theirs).abs().max(), (interactions.strength(found) / J - 1).abs().max()
        assert off < (1e-11 if dtype == torch.float64 else 5e-6)
        assert of_J < (1e-9 if dtype == torch.float64 else 1e-4)


def test_occlusion_as_published():
    """With the cells that the published code draws for a batch."""
    known = golden('analysis/occlusion.json')
    network, imgs = network_of(known, torch.float32), torch.from_numpy(filled_images(4, 224))
    ratios, n = [of_ratio['ratio'] for of_ratio in known['ratios']], (224 // known['cell']) ** 2
    draw = np.random.RandomState(known['seed'])
    orders = torch.from_numpy(np.stack([draw.permutation(n) for _ in range(2)]).repeat(2, 0))
    logits = occlusion.occluded(network, imgs, occlusion.kept_cells(orders, ratios))
    for of_ratio, of_images in zip(known['ratios'], logits.double(), strict=True):
        assert of_images.argmax(1).tolist() == of_ratio['predicted']
        assert abs(of_images.norm() - of_ratio['logits_l2']) < 1e-5
        off = (of_images[0] - torch.tensor(of_ratio['logits_image_0'], dtype=torch.float64)).abs().max()
        assert off < 1e-5


def test_occlusion_evaluates():
    """A network in training mode, which it is in afterwards."""
    network = network_of(golden('analysis/occlusion.json'), torch.float32)
    imgs, keep = torch.from_numpy(filled_images(4, 64)), torch.rand(2, 4, 16) > 0.5
    plain = occlusion.occluded(network, imgs, keep)
    assert torch.equal(occlusion.occluded(network.train(), imgs, keep), plain)
    assert all(module.training for module in network.modules())


class Counting(nn.Module):
    """A linear network of the pixels' sum in each quarter, which counts its forwards and remembers how it was run."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)))
        self.images, self.precision = 0, set()

    def forward(self, imgs):
        self.images += len(imgs)
        out = imgs.mean(1).unflatten(2, (2, -1)).unflatten(1, (2, -1)).mean((2, 4)).flatten(1) @ self.weight
        tf32 = torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32
        self.precision.add((out.dtype, self.training, torch.is_grad_enabled(), tf32))
        return out


def test_only_different_sets_are_forwarded():
    """Of an image at the defaults 110,250 instead of 130,000: without others, and with all, those of a pair coincide.

    In evaluation mode and plain float32, of a network in training mode and under autocast too.
    """
    pairs, model, img = interactions.sample_pairs(14, 50, 2, 0), Counting(), torch.randn(3, 28, 28)
    for ratio in (0, 0.05, 0.5, 1):
        m = interactions.order_of(ratio, 14)
        contexts = interactions.sample_contexts(pairs, 14, m, 50, m + 1)
        with torch.autocast('cpu', torch.bfloat16):
            found = interactions.interactions(model, img, 2, pairs, contexts, 14)
        assert model.precision == {(torch.float32, False, False, False)}
        players = len(np.unique(pairs))
        assert model.images == {0: 1 + players + 50, 1: 1 + players + 50}.get(ratio, 10_000)
        assert model.images in (10_000, *range(110, 141))
        model.images = 0
        if ratio in (0, 1):  # as it is defined
            for (i, j), of_pair in zip(pairs[:5], found, strict=False):
                others = [cell not in (i, j) and bool(ratio) for cell in range(196)]
                v = {}
                for with_i in (True, False):
                    for with_j in (True, False):
                        keep = torch.tensor(others)
                        keep[i], keep[j] = with_i, with_j
                        shown = img * keep.view(14, 14).repeat_interleave(2, 0).repeat_interleave(2, 1)
                        z = model(shown[None]).double()[0]
                        v[with_i, with_j] = z[2] - z[:2].logsumexp(0)
                I = v[True, True] - v[True, False] - v[False, True] + v[False, False]  # noqa: E741
                assert abs(of_pair - I) < 1e-6
            model.images, model.precision = 0, set()
    assert model.training


def test_cells_of_odd_sizes():
    """The grid need not divide the side; one image serves many sets."""
    imgs = torch.randn(2, 3, 31, 45)
    keep = torch.rand(2, 49) < 0.5
    rows, columns = ([p * 7 // side for p in range(side)] for side in (31, 45))
    of_pixels = keep.view(2, 7, 7)[:, rows][:, :, columns].unsqueeze(1)
    assert torch.equal(interactions.hide(imgs, keep), imgs.masked_fill(~of_pixels, 0))
    assert torch.equal(interactions.hide(imgs[0], keep)[1], interactions.hide(imgs[:1], keep[1:])[0])


def test_what_cannot_be_studied():
    pairs = interactions.sample_pairs(2, 6, 1, 0)  # all that there are
    assert len({frozenset(pair) for pair in pairs.tolist()}) == 6
    with pytest.raises(UserError, match='a grid of 2 x 2 cells has 6 pairs within radius 1, not 7'):
        interactions.sample_pairs(2, 7, 1, 0)
    contexts = interactions.sample_contexts(pairs, 2, 1, 1, 0)
    with pytest.raises(UserError, match='in float32, not in bfloat16'):
        interactions.interactions(Counting().bfloat16(), torch.randn(3, 4, 4), 0, pairs, contexts, 2)


def test_errors_over_images():
    """To first order what leaving out each image in turn gives; J is 1 on average."""
    found = torch.randn(5, 400, 7, generator=torch.Generator().manual_seed(0)).exp() * torch.rand(5, 400, 1)
    others = torch.stack([interactions.strength(found[:, torch.arange(400) != k]) for k in range(400)])
    jackknife = others.std(0, correction=0) * 399**0.5
    assert torch.allclose(interactions.strength_error(found), jackknife, rtol=0.02)
    assert abs(interactions.strength(found).mean() - 1) < 1e-12
    assert interactions.strength_error(found[:, :1]) is None


def test_classes_of_a_head(capsys):
    of = named.outputs_of
    assert of(['b', 'a'], ['a', 'x', 'b'], 3, 'net').tolist() == [2, 0]
    assert of(['n01440764', 'n01558993', 'n15075141'], None, 1000, 'net').tolist() == [0, 15, 999]
    assert of(['cat', 'dog'], None, 2, 'net').tolist() == [0, 1]
    assert 'net: the names of its classes are not known' in capsys.readouterr().out
    for classes, known, outputs, words in (
        (['a', 'Cat'], ['a', 'cat'], 2, r"the head of net has other classes: the data alone has 'Cat' \(the head has"),
        (['cat', 'dog'], None, 1000, 'net has a head for 1000 classes whose names it does not tell, the data have 2'),
        (['n01440764', 'dog'], None, 1000, 'net has a head for 1000 classes'),
    ):
        with pytest.raises(UserError, match=words):
            of(classes, known, outputs, 'net')


def test_first_image_of_each_class():
    split = named.Split(named.Files([f'{i}.png' for i in range(12)]), np.arange(12) % 4, list('abcd'), [])
    assert [*named.some(split, 0, 6, first=True).images] == [f'{i}.png' for i in range(6)]
    few = [[*named.some(split, seed, 2, first=True, draw_classes=True).images] for seed in range(4)]
    assert all(set(files) < {'0.png', '1.png', '2.png', '3.png'} for files in few)
    assert len(set(map(tuple, few))) > 1, 'which classes is drawn'


# --------------------------------------------------------------------------
# the program


@pytest.fixture(scope='module')
def tuned(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp('tuned')
    options = ['--model_kwargs', 'depth=1', 'embed_dim=32', 'num_heads=2']
    train('finetune', images, folder, '--batch_size', '22', '--epochs', '1', '--warmup_epochs', '0', *options)
    return folder / 'checkpoint-last.pth'


def analysed(what, images, output, *more) -> dict:
    flags = ['--data_path', images, '--output_dir', output, '--num_workers', '0', '--device', 'cpu', *more]
    analyse.main(analyse.parsed([what, *map(str, flags)]))
    return json.loads((output / f'{what}.json').read_text())


FEW = ['--grid', '4', '--pairs', '3', '--contexts', '2', '--images', '5', '--orders', '0', '0.05', '0.5', '1']


def test_interactions_are_resumed(images, tuned, tmp_path, monkeypatch):
    """Killed at any image: those before it are not computed again, and the results are the same bytes."""
    checkpoints = ['--checkpoint', tuned, 'random']
    result = analysed('interactions', images, tmp_path / 'whole', *checkpoints, *FEW)
    first = result['checkpoints'][0]
    kept = np.load(tmp_path / 'whole/interactions-tuned0-checkpoint-last.npz')
    values = torch.from_numpy(kept['interactions'])
    assert values.shape == (4, 5, 3)
    assert torch.equal(values[0], values[1]), 'of the same order'
    assert len(set(kept['files'])) == 5
    assert np.allclose(first['strength'], interactions.strength(values), rtol=1e-5)
    assert np.allclose(first['absolute_of_images'], values.abs().mean(2).T, rtol=1e-5)
    assert (first['grid'], first['orders'], first['images']) == (4, [0, 0, 7, 14], 5)
    assert first['forwards'] == kept['forwards'].sum() < 5 * 3 * 24

    monkeypatch.setattr(study, 'draw', lambda result, path: None)
    computed, of_image, killed = [], study.of_image, []

    def until_killed(*args):
        computed.append(args[-1])
        if len(computed) == 4 and not killed:
            killed.append(True)
            raise KeyboardInterrupt
        return of_image(*args)

    monkeypatch.setattr(study, 'of_image', until_killed)
    with pytest.raises(KeyboardInterrupt):
        analysed('interactions', images, tmp_path / 'killed', *checkpoints, *FEW)
    analysed('interactions', images, tmp_path / 'killed', *checkpoints, *FEW)
    assert computed == [0, 1, 2, 3, 3, 4, 0, 1, 2, 3, 4]
    for file in ('interactions.json', 'interactions-random.npz', 'interactions-tuned0-checkpoint-last.npz'):
        assert (tmp_path / 'killed' / file).read_bytes() == (tmp_path / 'whole' / file).read_bytes()

    computed.clear()
    analysed('interactions', images, tmp_path / 'killed', *checkpoints, *FEW, '--seed', '1')
    assert len(computed) == 10, 'rows of other arguments are not taken'
    computed.clear()
    correct = analysed('interactions', images, tmp_path / 'killed', *checkpoints, *FEW, '--seed', '1', '--only_correct')
    assert not computed
    assert [of['images'] < 5 for of in correct['checkpoints']] == [False, True]
    (tmp_path / 'killed/interactions-random.npz').write_bytes(b'PK\x03\x04')
    with pytest.raises(UserError, match=r'interactions-random\.npz is damaged, or not of this program: move it away'):
        analysed('interactions', images, tmp_path / 'killed', *checkpoints, *FEW)


def test_occlusion_does_not_depend_on_batches(images, tuned, tmp_path):
    flags = ['--checkpoint', f'ours={tuned}', '--ratios', '0', '0.5', '1', '--grid', '4', '--batch_size']
    found = [analysed('occlusion', images, tmp_path / size, *flags, size) for size in ('1', '31')]
    assert found[0]['checkpoints'] == found[1]['checkpoints']
    [ours] = found[0]['checkpoints']
    assert abs(ours['top1'][2] - 100 / 3) < 1e-3, 'nothing is seen: the same answer to all'
    orders = torch.stack([hidden_first(4, 0, k) for k in range(2)])
    half, all_hidden = occlusion.kept_cells(orders, [0.5, 1])
    assert half.sum(1).tolist() == [8, 8]
    assert not torch.equal(*half)
    assert not all_hidden.any()


@pytest.mark.parametrize(
    ('flags', 'words'),
    [
        (['interactions', '--checkpoint', 'a={pretrained}'], 'interactions needs a classifier: a has no trained head'),
        (['occlusion', '--checkpoint', 'a={pretrained}'], 'occlusion needs a classifier: a has no trained head'),
        (['interactions', '--checkpoint', 'a={tuned}', '--grid', '33'], '--grid 33: the images of a have 32 rows'),
        (['interactions', '--checkpoint', 'a={tuned}', '--grid', '2'], 'has 6 pairs within radius 2, not 50'),
        (['interactions', '--checkpoint', 'a={tuned}', '--seed', '4294967295'], '--seed 4294967295: the generators'),
        (['occlusion', '--checkpoint', 'a={tuned}', '--data_path', '{others}'], "the data alone has 'other0'"),
    ],
)
def test_mistakes(images, tuned, tmp_path, capsys, flags, words):
    """One line, exit code 2."""
    state = torch.load(tuned, weights_only=True)
    state['model'] = {name: x for name, x in state['model'].items() if not name.startswith('head.')}
    torch.save(state, tmp_path / 'pretrained.pth')
    for split in ('train', 'val'):
        for number in range(3):
            (tmp_path / 'others' / split).mkdir(parents=True, exist_ok=True)
            (tmp_path / 'others' / split / f'other{number}').symlink_to(images / split / f'class{number}')
    paths = dict(pretrained=tmp_path / 'pretrained.pth', tuned=tuned, others=tmp_path / 'others')
    what, *flags = [flag.format(**paths) for flag in flags]
    with pytest.raises(SystemExit) as end:
        run_main(lambda: analysed(what, images, tmp_path, *flags))
    assert end.value.code == 2
    line = capsys.readouterr().err
    assert line.count('\n') == 1
    assert re.search(words, line), line
