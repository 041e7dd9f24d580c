"""Interactions and occlusion: the numbers of the published code, every distinct cell set once, resumed at any image."""

import hashlib

import numpy as np
import pytest
import torch
from fill import images as filled_images
from fill import weight
from golden import golden
from timm.models.resnet import BasicBlock, ResNet
from timm.models.vision_transformer import VisionTransformer

from util.analysis import interactions, occlusion

FLOATS = pytest.mark.parametrize('dtype', [torch.float64, torch.float32], ids=['double', 'single'])
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


@pytest.fixture(scope='module', params=['vit', 'resnet'])
def published(request):
    """A network's golden, its images, and the pairs and contexts of each image and ratio."""
    known = golden(f'analysis/interactions_{request.param}.json')
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


@FLOATS
def test_interactions_as_published(published, dtype):
    known, imgs, samples = published
    network = network_of(known, dtype)
    for reward in interactions.REWARDS:
        if f'interactions_{reward}' not in known or (dtype == torch.float64 and reward != 'log_odds'):
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
        print(f'{known["network"]} {dtype} {reward}: I {off:.1e} absolute, J {of_J:.1e} relative')
        assert off < (1e-11 if dtype == torch.float64 else 5e-6)
        assert of_J < (1e-9 if dtype == torch.float64 else 1e-4)


@FLOATS
def test_occlusion_as_published(dtype):
    """With the cells that the published code draws for a batch."""
    known = golden('analysis/occlusion.json')
    network, imgs = network_of(known, dtype), torch.from_numpy(filled_images(4, 224)).to(dtype)
    ratios, n = [of_ratio['ratio'] for of_ratio in known['ratios']], (224 // known['cell']) ** 2
    draw = np.random.RandomState(known['seed'])
    orders = torch.from_numpy(np.stack([draw.permutation(n) for _ in range(2)]).repeat(2, 0))
    logits = occlusion.occluded(network, imgs, occlusion.kept_cells(orders, ratios))
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    for of_ratio, of_images in zip(known['ratios'], logits.double(), strict=True):
        assert of_images.argmax(1).tolist() == of_ratio['predicted']
        assert abs(of_images.norm() - of_ratio['logits_l2']) < tolerance
        off = (of_images[0] - torch.tensor(of_ratio['logits_image_0'], dtype=torch.float64)).abs().max()
        print(dtype, of_ratio['ratio'], off.item())
        assert off < tolerance
