"""What MIRL promises beyond the contract: what is hidden stays hidden, and the fast form equals the plain one."""

import pytest
import torch
from training import draw_plan, shapes

import models_mirl
from util.nn.patches import gather_tokens, patch_mask_to_pixels, patch_stats, patchify, unpatchify


@pytest.fixture
def model():
    torch.manual_seed(0)
    return models_mirl.mirl_vit_tiny(img_size=64, num_segments=4, mask_ratio=0.75)


@pytest.fixture
def inputs(model):
    return torch.randn(3, 3, 64, 64), draw_plan(model, 3, 1)


def test_hidden_pixels_reach_no_visible_token(model, inputs):
    imgs, plan = inputs
    hidden = patch_mask_to_pixels(plan.mask, 8)
    others = imgs + 10 * torch.randn_like(imgs) * hidden
    for a, b in zip(model.forward_encoder(imgs, plan)[1], model.forward_encoder(others, plan)[1], strict=True):
        assert torch.equal(a, b)
    # and what is visible does reach them
    others = imgs + torch.randn_like(imgs) * (1 - hidden)
    assert not torch.equal(model.forward_encoder(imgs, plan)[1][0], model.forward_encoder(others, plan)[1][0])


def test_mask_polarity(model):
    """1 = hidden: int(L (1 - ratio)) patches of the smallest noise stay, and no other pixel is shown."""
    noise = torch.linspace(0, 0.99, 64).expand(2, -1).flip(1)
    plan = model.plan_from_noise(noise)
    assert plan.mask.sum(dim=1).tolist() == [48, 48]
    assert plan.mask[0, -16:].sum() == 0
    assert sorted(plan.ids_keep[0].tolist()) == list(range(48, 64))
    imgs = torch.ones(2, 3, 64, 64)
    masked = model.reconstruct(imgs, plan)['masked']
    assert torch.equal(masked, unpatchify(1 - plan.mask.unsqueeze(-1).expand(-1, -1, 192), 8))


def test_loss_on_hidden_patches_equals_the_plain_form(model, inputs):
    """The loss head runs on hidden patches only; the paper's form predicts all and masks the error."""
    imgs, plan = inputs
    loss, terms = model(imgs, plan)
    low, features = model.forward_encoder(imgs, plan)
    restore = torch.cat([plan.ids_keep, plan.ids_hidden], dim=1).argsort(dim=1)
    preds = [gather_tokens(pred, restore) for pred in model.forward_decoders(low, features, plan, model.num_patches)]
    patches = patchify(imgs, 8)
    mean, std = patch_stats(patches)
    losses = []
    for main, residual in models_mirl.pairs(preds):
        error = (main + residual - (patches - mean) / std).square().mean(dim=-1)
        losses.append((error * plan.mask).sum() / plan.mask.sum())
    assert torch.allclose(loss, torch.stack(losses).mean(), rtol=1e-6)
    parts = torch.stack([term for name, term in terms.items() if name.startswith('reconstr')])
    assert torch.allclose(parts, torch.stack(losses), rtol=1e-6)


def test_a_decoder_sees_shallower_segments_only(model, inputs):
    """Decoder k's memory is the stem and segments 0 .. k - 1."""
    imgs, plan = inputs
    low, features = model.forward_encoder(imgs, plan)
    preds = model.forward_decoders(low, features, plan, 48)
    for changed in range(4):
        others = [f + 1.0 * (k == changed) * torch.randn_like(f) for k, f in enumerate(features)]
        changes = zip(preds, model.forward_decoders(low, others, plan, 48), strict=True)
        differs = [not torch.equal(a, b) for a, b in changes]
        assert differs == [k >= changed for k in range(4)]


def test_heads_are_unit_per_input_feature(model):
    norms = model.decoders[0].pred.weight.norm(dim=0)
    assert norms.shape == (48,)
    assert torch.allclose(norms, torch.ones(48), atol=1e-6)


@pytest.mark.parametrize(
    ('name', 'trainable', 'classifier'),
    [
        ('mirl_vit_small', None, 22_050_664),
        ('mirl_vit_small_depth54', 113_142_144, 96_578_152),
        ('mirl_vit_base', None, 86_567_656),
        ('mirl_vit_base_depth24', None, 171_622_120),
        ('mirl_vit_base_depth48', 396_409_856, 341_731_048),
    ],
)
def test_published_sizes(name, trainable, classifier):
    with shapes():
        model = getattr(models_mirl, name)()
        network = models_mirl.create_classifier(name)
    if trainable:
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trainable
    assert sum(p.numel() for p in network.parameters()) == classifier
    assert model.blocks[0].attn.num_heads == network.blocks[0].attn.num_heads == 12


def test_six_segments_of_a_base():
    with torch.device('meta'):
        model = models_mirl.mirl_vit_base(num_segments=6)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 141_246_464


@pytest.mark.parametrize(
    ('depth', 'segments', 'ends'),
    [(54, 6, (8, 17, 26, 35, 44, 53)), (48, 6, (7, 15, 23, 31, 39, 47)), (24, 4, (5, 11, 17, 23)), (4, 2, (1, 3))],
)
def test_segments(depth, segments, ends):
    assert models_mirl.segment_ends(depth, segments) == ends


@pytest.mark.parametrize(
    ('options', 'words'),
    [
        (dict(mask_ratio=1.0), 'mask_ratio 1.0 hides 16 of 16 patches'),
        (dict(mask_ratio=0.0), 'mask_ratio 0.0 hides 0 of 16 patches'),
        (dict(img_size=60), '60 is not a multiple of patch_size 8'),
        (dict(num_segments=3), '3 segments'),
        (dict(num_segments=8), '8 segments'),
        (dict(num_heads=5), '96 is not a multiple of its 5 heads'),
    ],
)
def test_refuses(options, words):
    with pytest.raises(ValueError, match=words):
        models_mirl.mirl_vit_tiny(**{'img_size': 32, **options})


def test_patchify_round_trip_and_order():
    imgs = torch.arange(2 * 3 * 8 * 8.0).reshape(2, 3, 8, 8)
    patches = patchify(imgs, 4)
    assert torch.equal(unpatchify(patches, 4), imgs)
    assert torch.equal(patches[0, 1, :6], imgs[0, :, 0, 4:6].T.reshape(-1))  # row, column, channel
