"""What LocalMIM promises beyond the contract: fast targets, sparse windows, the two kinds of `coords`, loading."""

import math
import time
from functools import partial

import fill
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden import filled_state
from test_localmim_parity import published_names
from timm.models.swin_transformer import SwinTransformer
from torch import nn
from training import draw_plan, shapes

import models_localmim
from scripts.benchmark import plain_hog
from util.errors import CheckpointError
from util.nn.hog import draw_hog, hog
from util.nn.patches import patch_mask_to_pixels
from util.nn.swin import grid_windows, group_shape, group_slots, make_windows, window_ids
from util.weights import load_published

TINY_SWIN = dict(embed_dim=8, depths=(2, 2, 2, 2), num_heads=(2, 2, 4, 4), decoder_dim=16)


def make(name: str, **options):
    torch.manual_seed(0)
    return getattr(models_localmim, name)(**{'img_size': 64, **options})


def inputs(model, seed: int = 1, n: int = 3):
    torch.manual_seed(seed)
    return torch.randn(n, 3, 64, 64), draw_plan(model, n, seed)


BOTH = pytest.mark.parametrize('name', ['localmim_vit_tiny', 'localmim_swin_pico'])


# --------------------------------------------------------------------------
# masks


@BOTH
def test_hidden_pixels_reach_no_visible_token(name):
    model = make(name)
    imgs, plan = inputs(model)
    hidden = patch_mask_to_pixels(plan.mask, model.mask_size)
    others = imgs + 10 * torch.randn_like(imgs) * hidden
    for a, b in zip(model.forward_encoder(imgs, plan), model.forward_encoder(others, plan), strict=True):
        assert torch.equal(a, b)
    # and what is visible does reach them
    others = imgs + torch.randn_like(imgs) * (1 - hidden)
    assert not torch.equal(model.forward_encoder(imgs, plan)[0], model.forward_encoder(others, plan)[0])


def test_mask_of_the_vit():
    """1 = hidden; int(L (1 - ratio)) patches of the smallest noise stay, in each sample for itself."""
    model = make('localmim_vit_tiny')
    plan = model.plan_from_noise(torch.stack([torch.linspace(0, 0.99, 64), torch.linspace(0.99, 0, 64)]))
    assert plan.mask.sum(dim=1).tolist() == [48, 48]
    assert plan.mask[0, :16].sum() == plan.mask[1, -16:].sum() == 0


def test_mask_of_the_swin():
    """1 = hidden; int(ratio U) + 1 of U units, the published off by one, are hidden in all samples alike."""
    model = make('localmim_swin_tiny', img_size=224)
    plan = model.plan_from_noise(torch.linspace(0, 0.99, 49).unsqueeze(0))
    assert plan.mask.tolist() == [[0.0] * 12 + [1.0] * 37]
    # of more rows the first counts
    same = model.plan_from_noise(torch.stack([torch.linspace(0, 0.99, 49), torch.rand(49)]))
    assert all(map(torch.equal, plan, same))
    visible = torch.zeros(1, 3, 224, 224)
    visible[..., :32, :] = 1  # units 0 .. 6
    visible[..., 32:64, : 5 * 32] = 1  # units 7 .. 11
    assert torch.equal(1 - patch_mask_to_pixels(plan.mask, model.mask_size), visible[:, :1])


@BOTH
def test_weights_are_hidden_shares(name):
    """Repeated where a grid is finer than the mask, averaged over 2 x 2 patches, not rounded, where it is coarser."""
    model = make(name)
    _, plan = inputs(model, n=8)
    n, length = plan.mask.shape
    side = round(length**0.5)
    mask = plan.mask.view(n, side, side)
    for factor in (4, 2, 1):
        repeated = mask.repeat_interleave(factor, 1).repeat_interleave(factor, 2).flatten(1)
        assert torch.equal(model.loss_weights(plan.mask, length * factor**2), repeated)
    averaged = model.loss_weights(plan.mask, length // 4)
    assert torch.equal(averaged, mask.view(n, side // 2, 2, side // 2, 2).mean(dim=(2, 4)).flatten(1))
    assert set(averaged.unique().tolist()) <= {0, 0.25, 0.5, 0.75, 1}
    assert averaged.frac().any()


@pytest.mark.parametrize('target', ['hog', 'pixel'])
@BOTH
def test_loss_is_the_plain_sum(name, target):
    model = make(name, target=target)
    imgs, plan = inputs(model)
    loss, terms = model(imgs, plan)
    preds = model.forward_decoders(model.forward_encoder(imgs, plan), plan)
    losses = []
    for pred, wanted in zip(preds, model.forward_targets(imgs), strict=True):
        total = weight_sum = 0.0
        for i in range(len(imgs)):
            mask = plan.mask[i % len(plan.mask)].view(1, 1, *[round(plan.mask.shape[1] ** 0.5)] * 2)
            weight = F.interpolate(mask, [round(pred.shape[1] ** 0.5)] * 2, mode='area').flatten()
            total += (weight * (pred[i] - wanted[i]).square().mean(dim=1)).sum()
            weight_sum += weight.sum()
        losses.append(total / weight_sum)
    assert torch.allclose(loss, sum(losses), rtol=1e-6)
    terms = [terms[f'local_loss{k}'] for k in range(len(losses))]
    assert torch.allclose(torch.stack(terms), torch.stack(losses), rtol=1e-6)


# --------------------------------------------------------------------------
# targets


def near_an_edge(imgs, bins, bias=None):
    """Pixels [N, C, H, W] whose angle lies within 1e-5 of where a bin ends."""
    kernel = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]], dtype=torch.float64)
    padded = F.pad(imgs.double().flatten(0, 1).unsqueeze(1), (1, 1, 1, 1), mode='reflect')
    gradient = F.conv2d(padded, torch.stack([kernel, kernel.T]).unsqueeze(1), bias)
    place = torch.atan2(gradient[:, 0], gradient[:, 1]) / math.pi * bins
    return ((place - place.round()).abs() * math.pi / bins < 1e-5).view_as(imgs)


@pytest.mark.parametrize('biased', [False, True])
@pytest.mark.parametrize('cells', [(4, 8, 16, 32), (8, 16, 32, 32)])
def test_hog_equals_the_plain_form(cells, biased, measured):
    imgs, bins = torch.from_numpy(fill.images(2, 224)), 18 if biased else 9
    torch.manual_seed(0)
    biases = [torch.rand(2) - 0.5 for _ in cells] if biased else None
    fast, plain = hog(imgs, cells, bins, biases), plain_hog(imgs, cells, bins, biases)
    largest, excepted, changed = 0.0, 0, 0
    for k, cell in enumerate(cells):
        edge = near_an_edge(imgs, bins, biases[k].double() if biased else None)
        excepted += edge.sum().item() if biased or k == 0 else 0
        sure = F.max_pool2d(edge.float(), cell).flatten(2).transpose(1, 2).repeat_interleave(bins, 2) == 0
        difference = (fast[k] - plain[k]).abs()
        largest = max(largest, (difference * sure).max().item())
        changed += (difference > 1e-6).sum().item()
    if biased and cells[2] == cells[3]:
        assert not torch.allclose(fast[2], fast[3], atol=0.01)  # equal cells, but each its own bias
    measured(
        f'hog, cells {cells}, {"a bias" if biased else "no bias"}: largest difference {largest:.1e}, '
        f'{excepted} pixels within 1e-5 of the edge of a bin left out, which change {changed} values'
    )
    assert largest < 1e-6
    assert excepted < 0.01 * imgs.numel()  # most at the border, where reflection makes one component zero


def test_hog_is_faster_than_its_plain_form(measured):
    """As a ratio of CPU times, both arms in turn: 20 and 10 on an idle machine, so that 3 is lost by a mistake only."""
    imgs, cells, seconds = torch.from_numpy(fill.images(2, 224)).repeat(2, 1, 1, 1), (4, 8, 16, 32), []
    biases = [torch.rand(2) for _ in cells]
    ours, plain = partial(hog, imgs, cells), partial(plain_hog, imgs, cells)
    arms = [(ours, 9, None), (plain, 9, None), (ours, 18, biases), (plain, 18, biases)]
    for _ in range(4):
        seconds.append([])
        for function, bins, bias in arms:
            began = time.process_time()
            function(bins, bias)
            seconds[-1].append(time.process_time() - began)
    free, free_plain, biased, biased_plain = np.median(seconds[1:], axis=0)
    measured(
        f'hog, {len(imgs)} images, CPU time: {free_plain / free:.1f} times as fast as the plain form, '
        f'{biased_plain / biased:.1f} times with a bias'
    )
    assert min(free_plain / free, biased_plain / biased) > 3


def test_targets_and_loss_are_float32_under_autocast():
    model, seen = make('localmim_vit_tiny'), []
    imgs, plan = inputs(model)
    targets = model.forward_targets(imgs)
    preds = [torch.randn_like(target).bfloat16() for target in targets]
    loss, _ = model.forward_loss(imgs, [pred.float() for pred in preds], plan)
    model.forward_targets = lambda x: seen.append((x.dtype, torch.is_autocast_enabled('cpu'))) or targets
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(model.forward_loss(imgs.double(), preds, plan)[0], loss)
    assert seen == [(torch.float32, False)]


def test_hog_bias_is_kept_and_never_trained():
    model = make('localmim_swin_pico')
    biases = [value for key, value in model.state_dict().items() if key.startswith('hog_bias')]
    assert len(torch.stack(biases).unique()) == 8
    assert torch.stack(biases).abs().max() < 1 / 3
    assert not any(key.startswith('hog_bias') for key in models_localmim.param_rules(model))
    for name in ('localmim_vit_base', 'localmim_vit_large', 'localmim_swin_base', 'localmim_swin_large'):
        with torch.device('meta'):
            model = getattr(models_localmim, name)()
            assert getattr(models_localmim, name)(target='pixel').hog_bias is None
        assert (model.hog_bins, model.hog_bias is None) == ((9, True) if name == 'localmim_vit_base' else (18, False))


@pytest.mark.parametrize('degrees', [0, 15, 55, 90, 135, 175])
def test_strokes_run_along_edges(degrees):
    """The stroke of the strongest orientation in a picture of stripes runs as they do."""
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing='ij')
    along = math.radians(degrees)  # anticlockwise from the right; y points down
    stripes = torch.sin(0.3 * (x * math.sin(along) + y * math.cos(along))).expand(1, 3, -1, -1)
    hist = hog(stripes, [64], 18)[0]
    strongest = F.one_hot(hist.view(3, 18).argmax(dim=1), 18).float().view(1, 1, 54)
    for cell in (1, 4, 16):
        tokens = torch.zeros(1, (64 // cell) ** 2, 54)
        tokens[0, 32 // cell * (64 // cell + 1)] = strongest
        picture = draw_hog(tokens, 18, cell)
        assert picture.shape == stripes.shape
        assert 0 <= picture.min() <= picture.max() <= 1
        light = picture[0, 0] / picture[0, 0].sum()
        dx, dy = x - (light * x).sum(), y - (light * y).sum()
        found = math.degrees(0.5 * math.atan2(-2 * (light * dx * dy).sum(), (light * (dx * dx - dy * dy)).sum()))
        assert abs((found - degrees + 90) % 180 - 90) < 6  # half a bin, and pixels


# --------------------------------------------------------------------------
# windows


def one_group(model, plan):
    """The plain form: all visible tokens of a stage in one attention, masked to windows."""
    lengths = [plan.ids_keep.shape[1] * size for size in (64, 16, 4, 1)]
    return [
        [make_windows(coords, None, 1, len(coords), window, s) for s in (0, shift)]
        for coords, (_, window, shift) in zip(plan.coords.split(lengths), model.grids, strict=True)
    ]


@pytest.mark.parametrize('coords', ['published', 'correct'])
@pytest.mark.parametrize('size', [dict(img_size=224), dict(img_size=224, window_size=14), dict(window_size=6)])
def test_groups_equal_one_masked_attention(coords, size, measured):
    model = make('LocalMIMSwin', **{'img_size': 192, **TINY_SWIN, 'coords': coords, **size}).double()
    for param in model.parameters():  # zero bias tables would hide a wrong index
        nn.init.normal_(param, std=0.2) if param.ndim == 2 else None
    imgs = torch.randn(2, 3, model.grids[0].side * 4, model.grids[0].side * 4, dtype=torch.float64)
    plan = draw_plan(model, 2, 0)
    assert model.stage_windows(plan)[0][0].slots is not None

    results = []
    for windows in (model.stage_windows(plan), one_group(model, plan)):
        model.stage_windows = lambda _, windows=windows: windows
        loss, _ = model(imgs, plan)
        model.zero_grad()
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    largest = max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(*results, strict=True))
    measured(f'windows in groups, {size}, {coords}: loss and gradients within {largest:.1e} of one masked attention')
    assert largest < 1e-10


@pytest.mark.parametrize('coords', ['published', 'correct'])
@pytest.mark.parametrize('window', [7, 14])
def test_every_mask_fits_the_groups(window, coords, measured):
    """Shapes depend on nothing but sizes; every token has a slot of its own, and windows are not torn apart."""
    model = make('LocalMIMSwin', **TINY_SWIN, img_size=224, window_size=window, coords=coords)
    shapes, milliseconds = set(), []
    for seed in range(100):
        noise = torch.from_numpy(np.random.default_rng(seed).random((1, 49), dtype='float32'))
        began = time.process_time()
        plan = model.plan_from_noise(noise)
        milliseconds.append(1e3 * (time.process_time() - began))
        shapes.add(tuple(tensor.shape for tensor in plan))
        lengths = [768, 192, 48, 12]
        for xy, slots, grid in zip(plan.coords.split(lengths), plan.slots.split(lengths), model.grids, strict=True):
            groups, size = group_shape(len(xy), grid.window)
            assert len(xy.unique(dim=0)) == len(xy)
            for column, shift in enumerate((0, grid.shift)):
                assert len(slots[:, column].unique()) == len(xy)
                assert slots[:, column].max() < groups * size
                ids = window_ids(xy, grid.window, shift) @ torch.tensor([1000, 1])
                pairs = torch.stack([ids, slots[:, column] // size], dim=1).unique(dim=0)
                assert len(pairs) == len(ids.unique())
    assert len(shapes) == 1
    measured(f'plan of a Swin at 224, window {window}, {coords}: {np.median(milliseconds):.2f} ms of CPU time')


def test_groups_suffice_in_the_worst_case():
    """Windows of just over half a group's size: no two fit into one."""
    full = torch.cartesian_prod(torch.arange(84), torch.arange(84))
    place = (full % 7) @ torch.tensor([7, 1])
    coords = full[place < 25]  # 144 windows of 25
    groups, size = group_shape(len(coords), 7)
    assert groups == 144
    assert len((group_slots(coords, 7, 0) // size).unique()) == 144


def test_published_coordinates_are_those_of_the_spec():
    """Behind the first merging few tokens lie where they are; from the third on all do."""
    published = make('LocalMIMSwin', **TINY_SWIN, img_size=224)
    noise = torch.from_numpy(fill.uniform('localmim', (2, 49)))
    correct = make('LocalMIMSwin', **TINY_SWIN, img_size=224, coords='correct')
    lengths, pairs = [768, 192, 48, 12], []
    stages = [model.plan_from_noise(noise).coords.split(lengths) for model in (published, correct)]
    shares = [(a == b).all(dim=1).float().mean().item() for a, b in zip(*stages, strict=True)]
    assert shares == pytest.approx([1, 1 / 6, 1 / 6, 1])
    for a, b in list(zip(*stages, strict=True))[1:3]:
        same = [(make_windows(xy, None, 1, len(xy), 7, 0).mask == 0) for xy in (a, b)]
        pairs.append((same[1].sum().item(), (same[0] & same[1]).sum().item()))
    assert pairs == [(3844, 1332), (616, 326)]


@pytest.mark.parametrize(
    ('coords', 'options'),
    [
        ('correct', dict(img_size=224)),
        ('correct', dict(img_size=224, window_size=14)),
        ('correct', dict(img_size=192, window_size=6)),
        ('published', dict(img_size=224)),
    ],
)
def test_correct_on_a_whole_image_is_the_plain_swin(coords, options, measured):
    sizes = {k: v for k, v in TINY_SWIN.items() if k != 'decoder_dim'}
    model = make('LocalMIMSwin', **TINY_SWIN, coords=coords, **options)
    for name, param in model.named_parameters():
        nn.init.normal_(param, std=0.5) if name.endswith('bias_table') else None
    swin = models_localmim.LocalMIMSwinClassifier(**sizes, **options)
    for name, module in swin.named_modules():
        if name.endswith('norm2'):
            module.eps = 1e-6
    assert not swin.load_state_dict(model.encoder_state_dict(), strict=False).unexpected_keys
    imgs = torch.from_numpy(fill.images(1, options['img_size']))
    everything = model.plan_of(torch.arange(model.num_units).unsqueeze(0))
    units_at_last = model.forward_encoder(imgs, everything)[3]  # in raster order: a unit is one token
    difference = (units_at_last - model.norms[3](swin.forward_features(imgs))).abs().max().item()
    measured(f'all units visible, {options}, {coords}: {difference:.1e} from the plain Swin')
    assert difference < 1e-5 if coords == 'correct' else difference > 0.1


@pytest.mark.parametrize('window', [7, 14])
def test_swin_classifier_is_timms_but_for_the_pooling(window, measured):
    sizes = dict(img_size=224, patch_size=4, embed_dim=24, depths=(2, 2, 2, 2), num_heads=(2, 2, 4, 4))
    ours = models_localmim.LocalMIMSwinClassifier(**sizes, window_size=window, num_classes=5)
    ours.load_state_dict(filled_state([[name, value.shape] for name, value in ours.state_dict().items()]))
    norm = partial(nn.LayerNorm, eps=1e-6)
    theirs = SwinTransformer(**sizes, window_size=window, num_classes=5, norm_layer=norm, strict_img_size=False)
    theirs.load_state_dict(ours.timm_state_dict())
    for name, module in theirs.named_modules():
        if name.endswith('norm2'):
            module.eps = 1e-5
    imgs = torch.from_numpy(fill.images(2, 224))
    features = theirs.eval().forward_features(imgs).flatten(1, 2)
    difference = (ours.eval().norm(ours.forward_features(imgs)) - features).abs().max().item()
    measured(f'Swin classifier, window {window}: features {difference:.1e} from timm')
    assert difference < 1e-5
    # the order of norm and mean is what differs
    assert not torch.allclose(ours(imgs), theirs(imgs), atol=1e-4)


def test_grid_windows_wrap_around_like_the_cyclic_shift():
    windows = grid_windows(8, 8, 4, 2)
    rolled = torch.arange(64).view(8, 8).roll((-2, -2), (0, 1)).view(2, 4, 2, 4).transpose(1, 2).flatten()
    assert torch.equal(windows.slots.argsort(), rolled)
    assert windows.mask.shape == (4, 16, 16)
    assert (windows.mask[0] == 0).all()
    assert (windows.mask[3] == 0).sum() == 4 * 4 * 4  # the corner: four quarters that do not see each other


# --------------------------------------------------------------------------
# compilation


@pytest.mark.faults
def test_compiles_once_for_all_plans():
    """With other options than test_contract.py, which compiles every architecture for three plans."""
    model, traces = make('localmim_swin_pico', coords='correct', target='pixel'), []

    def backend(graph, example_inputs):
        traces.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=backend)
    for seed in range(20):
        imgs, plan = inputs(model, seed)
        assert compiled(imgs, plan)[0].isfinite()
    assert len(traces) == 1


# --------------------------------------------------------------------------
# sizes, rules


@pytest.mark.parametrize(
    ('name', 'options', 'trainable', 'classifier'),
    [
        ('localmim_vit_base', {}, 89_916_140, 86_567_656),
        ('localmim_vit_large', {}, 307_651_480, 304_326_632),
        ('localmim_swin_base', {}, 87_761_872, 87_768_224),
        ('localmim_swin_base', dict(target='pixel'), 88_641_592, 87_768_224),
        ('localmim_swin_large', {}, 196_450_028, 196_794_556),
    ],
)
def test_published_sizes(name, options, trainable, classifier):
    with shapes():
        model = getattr(models_localmim, name)(**options)
        network = models_localmim.create_classifier(name)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trainable
    assert sum(p.numel() for p in network.parameters()) == classifier


def test_encoder_sizes():
    """Of the published `encoder.*`, its four norms included."""
    for name, size in (('localmim_swin_base', 86_746_808), ('localmim_swin_large', 195_262_932)):
        with torch.device('meta'):
            model = getattr(models_localmim, name)()
        assert sum(p.numel() for m in (model.patch_embed, model.layers, model.norms) for p in m.parameters()) == size


@pytest.mark.parametrize(
    ('name', 'options'),
    [
        ('localmim_vit_tiny', dict(img_size=16)),
        ('localmim_vit_tiny', dict(img_size=96)),
        ('localmim_vit_tiny', dict(img_size=64, patch_size=4)),
        ('localmim_swin_pico', dict(img_size=32)),
        ('localmim_swin_pico', dict(img_size=128, mask_ratio=0.75)),
        ('localmim_swin_pico', dict(img_size=96, window_size=3)),
        ('localmim_swin_pico', dict(img_size=96, window_size=6)),
    ],
)
def test_other_sizes(name, options):
    model = make(name, **options)
    imgs = torch.randn(2, 3, options['img_size'], options['img_size'])
    plan = draw_plan(model, 2, 0)
    loss, _ = model(imgs, plan)
    assert loss.isfinite()
    assert all(panel.shape == imgs.shape for panel in model.reconstruct(imgs, plan).values())
    same = {k: v for k, v in options.items() if k != 'mask_ratio'}
    classifier = models_localmim.create_classifier(name, num_classes=3, **same)
    report = load_published(classifier, model.state_dict())
    assert report.format == 'our LocalMIM pretraining'
    assert classifier(imgs).shape == (2, 3)


@pytest.mark.parametrize(
    ('name', 'options', 'words'),
    [
        ('localmim_vit_tiny', dict(mask_ratio=1.0), 'mask_ratio 1.0 hides 64 of 64 patches'),
        ('localmim_vit_tiny', dict(mask_ratio=0.0), 'mask_ratio 0.0 hides 0 of 64 patches'),
        ('localmim_vit_tiny', dict(img_size=60), '60 is not a multiple of 2 x patch_size = 16'),
        ('localmim_vit_tiny', dict(img_size=72), '72 is not a multiple of 2 x patch_size = 16'),
        ('localmim_vit_tiny', dict(patch_size=14), 'patch_size 14 is not a multiple of 4'),
        ('localmim_vit_tiny', dict(depth=6), 'depth 6'),
        ('localmim_vit_tiny', dict(num_heads=5), '96 is not a multiple of its 5 heads'),
        ('localmim_vit_tiny', dict(target='fft'), "target 'fft' is not one of hog, pixel"),
        ('localmim_vit_tiny', dict(hog_bins=0), 'hog_bins 0'),
        ('localmim_swin_pico', dict(mask_ratio=1.0), 'mask_ratio 1.0 hides 17 of 16 units'),
        ('localmim_swin_pico', dict(mask_ratio=0.95), 'mask_ratio 0.95 hides 16 of 16 units'),
        ('localmim_swin_pico', dict(img_size=72), '72 is not a multiple of 8 x patch_size = 16'),
        ('localmim_swin_pico', dict(window_size=3), 'window_size 3 does not divide the 32 x 32 tokens of stage 0'),
        ('localmim_swin_pico', dict(num_heads=(5, 2, 4, 4)), "a stage's width 24 is not a multiple of its 5 heads"),
        ('localmim_swin_pico', dict(coords='wrong'), "coords 'wrong' is not one of published, correct"),
        (
            'localmim_swin_base',
            dict(img_size=256),
            'window_size 7 does not divide the 64 x 64 tokens of stage 0 at img_size 256',
        ),
        ('localmim_swin_base', dict(img_size=32, window_size=8), 'mask_ratio 0.75 hides 1 of 1 units'),
    ],
)
def test_refuses(name, options, words):
    with pytest.raises(ValueError, match=words):
        make(name, **options)


def test_swin_says_what_its_coordinates_are():
    assert "coords='published'" in make('localmim_swin_pico').notice
    assert make('localmim_swin_pico', coords='correct').notice is None


def test_rules():
    def kinds(model):
        rules = models_localmim.param_rules(model)
        assert all(scale == 1 for _, scale, _ in rules.values())
        return {name: (layer, decays) for name, (layer, _, decays) in rules.items()}

    rules = kinds(make('localmim_vit_tiny'))
    assert rules['cls_token'] == (0, True)
    assert rules['decoders.1.mask_token'] == (9, True)
    assert rules['blocks.3.attn.qkv.weight'] == (4, True)
    assert rules['blocks.3.attn.qkv.bias'] == (4, False)
    rules = kinds(models_localmim.create_classifier('localmim_vit_tiny', img_size=64))
    assert rules['cls_token'] == rules['pos_embed'] == (0, False)
    assert rules['blocks.7.mlp.fc1.weight'] == (8, True)
    assert rules['head.weight'] == (9, True)
    assert rules['fc_norm.weight'] == (9, False)

    table, merging = 'layers.2.blocks.1.attn.relative_position_bias_table', 'layers.1.downsample.reduction.weight'
    rules = kinds(make('localmim_swin_pico'))
    assert rules[table] == (6, False)
    assert rules['decoders.1.mask_token'] == (9, False)
    rules = kinds(models_localmim.create_classifier('localmim_swin_pico', img_size=64))
    assert rules['patch_embed.norm.weight'] == (0, False)
    assert rules[table] == (6, True)
    assert rules[merging] == (4, True)
    assert rules['norm.weight'] == (9, False)
    assert rules['head.weight'] == (9, True)


# --------------------------------------------------------------------------
# published files


@pytest.mark.parametrize(
    ('name', 'options'),
    [
        ('localmim_vit_tiny', {}),
        ('localmim_vit_tiny', dict(hog_bias=True)),
        ('localmim_swin_pico', {}),
        ('localmim_swin_pico', dict(target='pixel')),
    ],
)
def test_published_pretraining_file(name, options):
    model = make(name, **options)
    file = {'model': published_names(model), 'epoch': 1599}
    again = getattr(models_localmim, name)(img_size=64, **options)
    report = load_published(again, file)
    assert report.format == 'published LocalMIM pretraining'
    assert not report.missing + report.resized
    assert len(report.loaded) + len(report.ignored) == len(file['model'])
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key

    classifier = models_localmim.create_classifier(name, num_classes=5, img_size=64)
    report = load_published(classifier, file)
    assert {key.split('.')[0] for key in report.missing} <= {'head', 'fc_norm', 'norm'}
    for key, value in model.encoder_state_dict().items():
        assert torch.equal(classifier.state_dict()[key], value), key

    for target in (again, classifier):
        with pytest.raises(CheckpointError, match='surprise'):
            load_published(target, file['model'] | {'surprise.weight': torch.zeros(1)})
    with pytest.raises(CheckpointError, match='another architecture'):
        load_published(again, {k: v for k, v in file['model'].items() if 'blocks.0.mlp.fc2.bias' not in k})
    other = 'localmim_vit_tiny' if 'swin' in name else 'localmim_swin_pico'
    with pytest.raises(CheckpointError, match=r'not a checkpoint for this model|another architecture'):
        load_published(make(other), file)


@pytest.mark.parametrize('kind', ['pretraining', 'classifier'])
def test_correct_coordinates_take_published_weights_in_the_other_order(kind):
    source = make('localmim_swin_pico')
    if kind == 'pretraining':
        model = make('localmim_swin_pico', coords='correct')
    else:
        model = models_localmim.create_classifier('localmim_swin_pico', img_size=64, coords='correct')
    load_published(model, published_names(source))
    loaded = model.state_dict()
    for key, value in source.encoder_state_dict().items():
        if '.downsample.' in key:
            assert not torch.equal(loaded[key], value) or 'norm' in key
            parts = value.chunk(4, dim=-1)
            value = torch.cat([parts[0], parts[2], parts[1], parts[3]], dim=-1)
        assert torch.equal(loaded[key], value), key
    # so that merging gives the same as it did
    tokens = torch.randn(2, 64, 24)
    merged = source.layers[0].downsample(tokens, 4)
    assert torch.allclose(model.layers[0].downsample(tokens, 4), merged, atol=1e-6)


@pytest.mark.parametrize('coords', ['published', 'correct'])
def test_fine_tuned_swin_is_taken_as_it_is(coords):
    source = models_localmim.create_classifier('localmim_swin_pico', num_classes=5, img_size=64)
    state = source.state_dict() | {
        'layers.0.blocks.1.attn_mask': torch.zeros(64, 16, 16),
        'layers.0.blocks.1.attn.relative_position_index': torch.zeros(16, 16, dtype=torch.int64),
    }
    model = models_localmim.create_classifier('localmim_swin_pico', num_classes=5, img_size=64, coords=coords)
    assert not load_published(model, {'model': state}).missing
    for key, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
