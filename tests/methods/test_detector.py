"""Detectors: the parts that differ from torchvision's, by detectron2's numbers, and what each neck promises."""

import hashlib

import fill
import numpy as np
import pytest
import torch
from golden import golden
from torch import nn
from torchvision.models.detection.image_list import ImageList

import models_a2mim
import models_mirl
from util import dist
from util.data.datasets import Normalisation
from util.data.segmentation import MEAN, STD
from util.nn import detector
from util.nn.detector import batch_images, create_detector, paste_masks

CASE = golden('detection/detector_parts.json')
HEIGHT, WIDTH = CASE['image']
CLASSES = CASE['num_classes']
TINY = dict(width=16, fc_width=32, conv_width=16, mask_convs=1, anchor_sizes=(8, 16, 32, 64, 128))
FEW = dict(proposals=(100, 50, 100, 50), rpn_samples=32, roi_samples=16)
NECKS = {
    'simple': dict(box_head='4conv1fc', norm='ln', rpn_depth=2),
    'fpn': dict(norm='bn', box_head='4conv1fc'),
    'c4': {},
}


class Stages(nn.Module):
    """An encoder of four maps of strides 4 to 32, with BatchNorm."""

    def __init__(self):
        super().__init__()
        self.widths, self.strides = [8, 8, 16, 16], [4, 8, 16, 32]
        self.stem = nn.Conv2d(3, 8, 4, stride=4)
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(before, after, 3, stride, 1), nn.BatchNorm2d(after), nn.ReLU())
            for before, after, stride in ((8, 8, 1), (8, 8, 2), (8, 16, 2), (16, 16, 2))
        )

    def forward(self, imgs: torch.Tensor) -> list[torch.Tensor]:
        x, maps = self.stem(imgs), []
        for stage in self.stages:
            maps.append(x := stage(x))
        return maps


def encoder(neck: str) -> nn.Module:
    if neck == 'simple':
        return models_mirl.create_backbone('mirl_vit_base', embed_dim=32, depth=4, num_heads=2, rel_pos_size=128)
    return Stages() if neck == 'fpn' else models_a2mim.create_backbone('a2mim_resnet_tiny', channels=(8, 8, 16, 16))


def tiny(neck: str, **options) -> detector.Detector:
    torch.manual_seed(0)
    return create_detector(encoder(neck), 3, neck=neck, **{**TINY, **FEW, **NECKS[neck], **options})


def target(*boxes: tuple[float, float, float, float], size: tuple[int, int] = (96, 96)) -> dict:
    masks = torch.zeros(len(boxes), *size, dtype=torch.uint8)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
        mask[y0:y1, x0:x1] = 1
    labels = 1 + torch.arange(len(boxes)) % 3
    return dict(boxes=torch.tensor(boxes).float().reshape(-1, 4), labels=labels, masks=masks, size=size)


# --------------------------------------------------------------------------
# parts


def uniform(name: str, *shape: int) -> torch.Tensor:
    return torch.from_numpy(fill.uniform(f'parts/{name}', shape))


def boxes(name: str, count: int, share: float = 0.9) -> torch.Tensor:
    """float32 [count, 4] in the case's image, in eighths of a pixel."""
    a, b, c, d = uniform(name, count, 4).double().T
    width, height = 2 + c**2 * share * WIDTH, 2 + d**2 * share * HEIGHT
    x, y = a * (WIDTH - width), b * (HEIGHT - height)
    return ((torch.stack([x, y, x + width, y + height], 1) * 8).round() / 8).float()


def difference(ours: torch.Tensor, summary: dict) -> float:
    """The largest one of mean, std, probe, first and last values, in units of std; and of the l2 norm, relative."""
    x = ours.double()
    assert list(x.shape) == summary['shape']
    probe = (x * (torch.from_numpy(fill.uniform('probe', tuple(x.shape))).double() - 0.5)).sum()
    pairs = [(x.mean(), 'mean'), (x.std(correction=0), 'std'), (probe, 'probe')]
    pairs += [(x.flatten()[:8], 'first'), (x.flatten()[-8:], 'last')]
    std = summary['std']
    largest = max(float((value - torch.tensor(summary[name])).abs().max()) / std for value, name in pairs)
    return max(largest, abs(float(x.norm()) / summary['l2'] - 1))


@pytest.fixture(scope='module')
def parts() -> detector.Detector:
    sizes = CASE['anchors']['sizes']
    found = CASE['inference']['detections_per_image']
    kept = [CASE['proposals'][key] for key in ('pre_nms_topk', 'post_nms_topk')]
    options = dict(TINY, anchor_sizes=sizes, detections=found, proposals=kept * 2)
    return create_detector(Stages(), CLASSES, **options).eval()


def anchors_of(model: detector.Detector, grids: list, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    maps = [torch.zeros(2, 1, *grid, dtype=dtype) for grid in grids]
    one, other = model.rpn.anchor_generator(ImageList(torch.zeros(2, 3, 8, 8), [(8, 8)] * 2), maps)
    assert one is other
    return one


def test_anchors(parts):
    grids = CASE['anchors']['grids']
    levels = anchors_of(parts, grids).split([3 * rows * cols for rows, cols in grids])
    for ours, theirs in zip(levels, CASE['anchors']['levels'], strict=True):
        assert len(ours) == theirs['count']
        assert torch.equal(ours[:3], torch.tensor(theirs['first3']))
        assert torch.equal(ours[-3:], torch.tensor(theirs['last3']))
        assert np.allclose(ours.double().sum(0), theirs['sum'], rtol=1e-9)


def test_anchors_of_a_photograph(parts):
    """800 x 1216, whose 13 rows of stride 64 are more than fit: centres are multiples of the stride all the same."""
    grids = [(200, 304), (100, 152), (50, 76), (25, 38), (13, 19)]
    ours, start = anchors_of(parts, grids), 0
    for (rows, cols), size, stride in zip(grids, (32, 64, 128, 256, 512), (4, 8, 16, 32, 64), strict=True):
        level = ours[start : (start := start + 3 * rows * cols)].double().view(rows, cols, 3, 4)
        centres, sides = (level[..., :2] + level[..., 2:]) / 2, level[..., 2:] - level[..., :2]
        wanted = torch.cartesian_prod(torch.arange(cols), torch.arange(rows)).view(cols, rows, 1, 2).transpose(0, 1)
        assert (centres - stride * wanted).abs().max() < 1e-4
        ratios = torch.tensor([0.5, 1, 2], dtype=torch.float64)
        assert ((sides[..., 1] / sides[..., 0]) / ratios - 1).abs().max() < 1e-5
        assert (sides.prod(-1) / size**2 - 1).abs().max() < 1e-5
    assert start == len(ours)
    assert torch.equal(anchors_of(parts, grids, torch.bfloat16), ours)


def test_pooling(parts):
    maps = {str(i): 2 * uniform(f'p{i + 2}', 2, 6, *grid) - 1 for i, grid in enumerate(CASE['anchors']['grids'][:4])}
    rois, heads = [boxes('rois0', 24), boxes('rois1', 24)], parts.roi_heads
    assert heads.box_roi_pool.levels(torch.cat(rois)).tolist() == CASE['pooling']['levels']
    for pool, side in ((heads.box_roi_pool, '7'), (heads.mask_roi_pool, '14')):
        ours = pool(maps, rois, [(HEIGHT, WIDTH)] * 2)
        assert difference(ours, CASE['pooling']['outputs'][side]) < 1e-5


def test_proposals(parts):
    logits = (6 * uniform('logit', 120) - 3)[None, :, None]
    [ours], [scores] = parts.rpn.filter_proposals(boxes('prop', 120)[None], logits, [(HEIGHT, WIDTH)], [60, 60])
    assert torch.equal(ours, torch.tensor(CASE['proposals']['boxes']))
    assert (scores.logit() - torch.tensor(CASE['proposals']['logits'])).abs().max() < 1e-4


def predictions() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and deltas of 24 regions, with the background's column where torchvision has it."""
    scores, deltas = 4 * uniform('scores', 24, 6) - 2, uniform('deltas', 24, 20) - 0.5
    return scores.roll(1, dims=1), nn.functional.pad(deltas, (4, 0))


def test_box_losses(parts):
    case, classes = CASE['box_losses'], torch.tensor(CASE['box_losses']['classes'])
    [targets] = parts.roi_heads.box_coder.encode([boxes('gt', 24)], [boxes('rois0', 24)])
    assert difference(targets, case['targets']) < 1e-5
    losses = detector.fastrcnn_loss(*predictions(), [(classes + 1) % (CLASSES + 1)], [targets])
    assert [float(loss) for loss in losses] == pytest.approx([case['loss_cls'], case['loss_box_reg']], rel=1e-5)


def test_losses_of_proposals(parts):
    """L1 and cross-entropy, both divided by the number asked for: 256 of each image, though there are only ten."""
    logits, deltas = torch.arange(20.0)[:, None] / 10, torch.arange(80.0).view(20, 4) / 80
    labels, targets = torch.tensor([1.0, 0, -1, 0, 0] * 2), torch.ones(10, 4)
    objectness, box = parts.rpn.compute_loss(logits, deltas, [labels, labels], [targets, targets])
    both, near = torch.cat([labels, labels]), 1 - deltas
    wanted = nn.functional.binary_cross_entropy_with_logits(logits[both >= 0, 0], both[both >= 0], reduction='sum')
    assert float(objectness) == pytest.approx(float(wanted) / 512)
    assert float(box) == pytest.approx(float(near[both == 1].sum()) / 512)


def test_inference(parts):
    scores, deltas = predictions()
    found = parts.roi_heads.postprocess_detections(3 * scores, deltas, [boxes('rois0', 24)], [(HEIGHT, WIDTH)])
    ours, probabilities, labels = (item for [item] in found)
    assert (labels - 1).tolist() == CASE['inference']['classes']
    assert (ours - torch.tensor(CASE['inference']['boxes'])).abs().max() < 1e-3
    assert (probabilities - torch.tensor(CASE['inference']['scores'])).abs().max() < 1e-6


def test_masks():
    case, of, labels = CASE['masks'], torch.arange(5), 1 + torch.arange(5) % CLASSES
    where = boxes('mask_boxes', 5, share=0.7)
    blocks = torch.from_numpy(np.kron(uniform('gt_masks', 5, 28, 44) > 0.45, np.ones((8, 8)))).bool()
    logits = nn.functional.pad(6 * uniform('mask_logits', 5, 5, 28, 28) - 3, (0, 0, 0, 0, 1, 0))
    targets = detector.project_masks_on_boxes(blocks, where, of, 28)
    assert targets.sum((1, 2)).tolist() == case['targets_area']
    loss = detector.maskrcnn_loss(logits, [where], [blocks], [labels], [of])
    assert float(loss) == pytest.approx(case['loss'], rel=1e-5)
    pasted = paste_masks(logits[of, labels].sigmoid(), where, (HEIGHT, WIDTH))
    assert pasted.sum((1, 2)).tolist() == case['pasted_area']
    assert hashlib.sha256(pasted.numpy().tobytes()).hexdigest() == case['pasted_sha256']


def test_masks_are_pasted_in_parts():
    """Those of a large image one after the other; and a box without area, or none, makes no trouble."""
    masks, size = torch.rand(3, 14, 14), (1500, 1501)
    where = torch.tensor([[3.5, 7.25, 900, 1400], [-20, 1000, 1600, 1100.5], [50, 60, 50, 60]])
    pasted = paste_masks(masks, where, size)
    assert torch.equal(pasted[1:2], paste_masks(masks[1:2], where[1:2], size))
    assert pasted.flatten(1).any(1).tolist() == [True, True, False]
    assert paste_masks(masks[:0], where[:0], size).shape == (0, *size)


# --------------------------------------------------------------------------
# the whole


@pytest.mark.parametrize('neck', NECKS)
def test_every_parameter_learns(neck):
    """Also from images without objects, and in bfloat16; else several processes would wait for each other."""
    model, regions = tiny(neck), []
    model.roi_heads.mask_predictor.register_forward_pre_hook(lambda module, args: regions.append(len(args[0])))
    imgs, some = torch.randn(2, 3, 96, 96), target((8, 16, 40, 60), (50, 50, 90, 80))
    for targets in ([some, target()], [target(), target()]):
        model.zero_grad()
        with torch.autocast('cpu', torch.bfloat16):
            losses = model(imgs, targets)
        sum(losses.values()).backward()
        assert {loss.dtype for loss in losses.values()} == {torch.float32}
        assert losses.keys() == {
            f'loss_{name}' for name in ('objectness', 'rpn_box_reg', 'classifier', 'box_reg', 'mask')
        }
        assert not [name for name, param in model.named_parameters() if param.grad is None]
        values = torch.cat([x.flatten().float() for x in (*model.state_dict().values(), *losses.values())])
        assert values.isfinite().all()
    assert losses['loss_mask'] == losses['loss_box_reg'] == losses['loss_rpn_box_reg'] == 0
    assert regions[1] == 1  # or SyncBatchNorm would have no value anywhere


@pytest.mark.parametrize('neck', NECKS)
def test_detections(neck):
    """In pixels of the batch and within each image; of an image beside a larger one the same as alone."""
    model = tiny(neck, size_divisible=64, score_threshold=0.0, detections=7).eval()
    imgs = [torch.randn(3, 60, 50), torch.randn(3, 64, 120)]
    batch, sizes = batch_images(imgs, size_divisible=64)
    assert (batch.shape, sizes) == ((2, 3, 64, 128), [(60, 50), (64, 120)])
    with torch.no_grad():
        found, again = model(batch, sizes), model(imgs)
        wide, _ = batch_images([imgs[0], torch.zeros(3, 64, 128)], size_divisible=64)
        [alone] = model(wide[:1], sizes[:1])
    side = 14 if neck == 'c4' else 28
    for one, (height, width) in zip(found, sizes, strict=True):
        assert [tuple(one[key].shape) for key in ('boxes', 'labels', 'scores', 'masks')] == [
            *((7, 4), (7,), (7,), (7, side, side))
        ]
        assert (one['boxes'] >= 0).all()
        assert (one['boxes'] <= torch.tensor([width, height, width, height])).all()
        assert set(one['labels'].tolist()) <= {1, 2, 3}
        assert (one['scores'].diff() <= 0).all()
    for one, same in ((found[0], again[0]), (found[1], again[1]), (found[0], alone)):
        assert all(torch.allclose(one[key].float(), same[key].float(), atol=1e-4) for key in one)


def test_low_precision_ends_at_the_heads():
    """Maps in bfloat16: proposals, boxes and scores are float32, and not rounded to what bfloat16 can hold."""
    model = tiny('fpn', norm=None, score_threshold=0.0).eval()
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        maps = model.backbone(torch.randn(1, 3, 96, 96))
        assert {x.dtype for x in maps.values()} == {torch.bfloat16}
        [found] = model(torch.randn(1, 3, 96, 96))
    assert {x.dtype for name, x in found.items() if name != 'labels'} == {torch.float32}
    assert not torch.equal(found['boxes'], found['boxes'].bfloat16().float())


@pytest.mark.parametrize('neck', NECKS)
def test_nothing_is_found(neck):
    """Above the threshold; nor with weights that are not finite, whose loss tells."""
    model, imgs, side = tiny(neck, score_threshold=0.999), torch.randn(2, 3, 96, 96), 14 if neck == 'c4' else 28
    empty = dict(boxes=(0, 4), labels=(0,), scores=(0,), masks=(0, side, side))
    assert [{key: value.shape for key, value in found.items()} for found in model.eval()(imgs)] == [empty] * 2
    with torch.no_grad():
        model.rpn.head.bbox_pred.bias.fill_(torch.nan)
        model.rpn.head.cls_logits.bias.fill_(torch.nan)
    for targets in ([target((8, 16, 40, 60)), target()], [target(), target()]):
        assert sum(model.train()(imgs, targets).values()).isnan()
    assert [{key: value.shape for key, value in found.items()} for found in model.eval()(imgs)] == [empty] * 2


def test_only_boxes():
    model = tiny('fpn', masks=False)
    targets = [{key: value for key, value in target((8, 16, 40, 60)).items() if key != 'masks'}]
    assert 'loss_mask' not in model(torch.randn(1, 3, 96, 96), targets)
    assert 'masks' not in model.eval()(torch.randn(1, 3, 96, 96))[0]


def test_layer4_of_c4_runs_once():
    model = tiny('c4')
    layer4, *_ = (module for name, module in model.named_modules() if name == 'roi_heads.layer4')
    batchnorms = [module for module in [*layer4.modules(), model.roi_heads.norm] if isinstance(module, nn.BatchNorm2d)]
    model(torch.randn(1, 3, 96, 96), [target((8, 16, 40, 60))])
    assert {int(module.num_batches_tracked) for module in batchnorms} == {1}
    assert not [name for name, _ in model.backbone.named_parameters() if 'layer4' in name]
    anchors = model.rpn.anchor_generator
    assert (anchors.num_anchors_per_location(), anchors.strides) == ([15], [(16, 16)])


@pytest.mark.parametrize('neck', ['fpn', 'c4'])
def test_sizes_of_anchors(neck):
    """By default 8 times the strides, of a pyramid's levels or in 'c4' of those that it would have."""
    for scale, sizes in ((8, [32, 64, 128, 256, 512]), (2, [8, 16, 32, 64, 128])):
        model = tiny(neck, anchor_sizes=None, anchor_scale=scale)
        assert [size for level in model.rpn.anchor_generator.sizes for size in level] == sizes


@pytest.mark.parametrize('neck', ['fpn', 'c4'])
def test_frozen_norms(neck):
    model = tiny(neck, norm='frozen')
    running = {name: value.clone() for name, value in model.named_buffers()}
    assert [name for name in running if name.endswith('running_mean')]
    model(torch.randn(2, 3, 96, 96), [target((8, 16, 40, 60))] * 2)
    assert all(torch.equal(value, running[name]) for name, value in model.named_buffers())
    assert not dist.has_batchnorm(model)


def test_batches_are_padded_after_normalising():
    imgs = [torch.randint(0, 256, (3, 30, 70), dtype=torch.uint8), torch.full((3, 40, 20), 9, dtype=torch.uint8)]
    normalise = Normalisation.of(MEAN, STD, torch.device('cpu'), torch.channels_last)
    batch, sizes = batch_images(imgs, normalise, 32)
    assert (batch.shape, sizes) == ((2, 3, 64, 96), [(30, 70), (40, 20)])
    assert batch.is_contiguous(memory_format=torch.channels_last)
    for padded, img, (height, width) in zip(batch, imgs, sizes, strict=True):
        assert torch.equal(padded[:, :height, :width], normalise(img[None])[0])
        assert padded.count_nonzero() == padded[:, :height, :width].count_nonzero()


def test_initial_weights():
    heads = tiny('fpn', fc_width=256, conv_width=64).roi_heads
    stds = [part.weight.detach().std() for part in (heads.box_predictor.cls_score, heads.box_predictor.bbox_pred)]
    stds += [heads.mask_predictor.mask_fcn_logits.weight.detach().std()]
    assert [float(std) for std in stds] == pytest.approx([0.01, 0.001, 0.001], rel=0.15)
    fc = heads.box_head[-2].weight.detach()
    assert float(fc.abs().max()) == pytest.approx((3 / fc.shape[1]) ** 0.5, rel=1e-3)
    assert not any(param.any() for name, param in heads.named_parameters() if name.endswith('bias'))


def test_the_backbone_alone_is_compiled(monkeypatch):
    model, called = tiny('fpn'), []
    names = list(model.state_dict())
    monkeypatch.setattr(torch, 'compile', lambda function, **options: lambda *args: called.append(1) or function(*args))
    model = dist.parallel(model, torch.device('cpu'), compiled=True)
    model(torch.randn(1, 3, 96, 96), [target()])
    model.eval()(torch.randn(1, 3, 64, 96))
    assert called == [1]
    assert list(model.state_dict()) == names


@pytest.mark.parametrize(
    ('neck', 'options', 'line'),
    [
        ('fpn', dict(box_head='3fc'), "box_head '3fc' is not one of 2fc, 4conv1fc"),
        ('fpn', dict(norm='gn'), "norm 'gn' is not one of ln, bn, frozen"),
        (
            'fpn',
            dict(anchor_sizes=(8, 16)),
            'anchor_sizes .8, 16. must be one for each map, of strides .4, 8, 16, 32, 64',
        ),
        ('fpn', dict(proposals=(100, 50)), 'proposals .100, 50. must be four'),
        ('fpn', dict(proposals='abcd'), "proposals 'abcd' should be whole numbers from 1"),
        ('fpn', dict(detections=2.5), 'detections 2.5 should be whole numbers from 1'),
        ('fpn', dict(nms='high'), "nms 'high' should be numbers from 0 to 1"),
        ('fpn', dict(anchor_sizes=(-8, 16, 32, 64, 128)), 'anchor_sizes .* should be numbers from 1'),
        ('c4', dict(box_head='4conv1fc'), "box_head '4conv1fc' is not for neck 'c4'"),
        ('fpn', dict(neck='simple'), "neck 'simple'"),
        ('fpn', dict(neck='c4'), "neck 'c4'"),
        ('simple', dict(neck='fpn'), "neck 'fpn' is for several maps, not for the one of a ViT; try 'simple'"),
    ],
)
def test_options_that_do_not_fit(neck, options, line):
    with pytest.raises(ValueError, match=line):
        create_detector(encoder(neck), 3, **{**dict(neck=neck), **TINY, **options})


def test_it_learns_to_detect():
    """Two squares in noise, by heart."""
    torch.manual_seed(1)
    imgs, where = 0.1 * torch.randn(2, 3, 64, 64), [(8, 12, 32, 36), (36, 30, 60, 56)]
    for img, (x0, y0, x1, y1) in zip(imgs, where, strict=True):
        img[:, y0:y1, x0:x1] += 1
    targets = [target(box, size=(64, 64)) for box in where]
    model = tiny('fpn', norm=None, box_head='2fc')
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(40):
        optimizer.zero_grad()
        sum(model(imgs, targets).values()).backward()
        optimizer.step()
    for found, box in zip(model.eval()(imgs), targets, strict=True):
        assert (found['boxes'][0] - box['boxes'][0]).abs().max() < 8
        mask = paste_masks(found['masks'][:1], found['boxes'][:1], (64, 64))
        assert (mask & box['masks'].bool()).sum() / (mask | box['masks'].bool()).sum() > 0.5
