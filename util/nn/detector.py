"""Detection and instance segmentation on any encoder: Mask R-CNN (He et al., ICCV 2017) of torchvision's parts.

    images --encoder, pyramid--> maps --RPN--> proposals --RoIAlign--> box head --> class, box
                                                        '--RoIAlign--> mask head --> mask of each class
    neck 'simple': one map of a plain ViT, and ViTDet's pyramid on it (Li et al., ECCV 2022)
         'fpn':    the maps of a hierarchical network, and a feature pyramid (Lin et al., CVPR 2017)
         'c4':     layer3 of a ResNet alone; each region goes through its layer4, and no pyramid is made

What differs from torchvision's Mask R-CNN is what the published recipes have: each subclass says it. Boxes are x0, y0,
x1, y1 in pixels; class 0 is the background. Maps may come in low precision: whatever follows a head is float32.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d, freeze_batch_norm_2d
from timm.models.resnet import ResNet
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import MultiScaleRoIAlign, roi_align

from util.nn.checks import check_choice
from util.nn.pyramid import FPN, SimpleFeaturePyramid

Sizes = Sequence[tuple[int, int]]  # height and width of each image


def full(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


# --------------------------------------------------------------------------
# proposals


class Anchors(AnchorGenerator):
    """torchvision's, but strides are given, corners are not rounded, and bfloat16 maps do not round them either."""

    def __init__(self, sizes: Sequence[Sequence[float]], ratios: Sequence[float], strides: Sequence[int]):
        super().__init__(tuple(sizes), (tuple(ratios),) * len(sizes))
        self.strides = [(stride, stride) for stride in strides]

    def generate_anchors(self, scales: Sequence[float], aspect_ratios: Sequence[float], *_) -> Tensor:
        """Sides and ratios (height / width) of a level -> anchors [sides x ratios, 4] around 0, side by side."""
        sides = [(side / math.sqrt(ratio), side * math.sqrt(ratio)) for side in scales for ratio in aspect_ratios]
        return torch.tensor([(-w / 2, -h / 2, w / 2, h / 2) for w, h in sides])

    def forward(self, images: ImageList, maps: list[Tensor]) -> list[Tensor]:
        """Maps [N, C, h, w] of each level -> for every image the same float32 [A, 4], level by level."""
        self.set_cell_anchors(torch.float32, maps[0].device)
        anchors = torch.cat(self.grid_anchors([x.shape[-2:] for x in maps], self.strides))
        return [anchors] * len(images.image_sizes)


class ProposalHead(RPNHead):
    """torchvision's, but logits and deltas are float32."""

    def forward(self, maps: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        logits, deltas = super().forward(maps)
        return [full(x) for x in logits], [full(x) for x in deltas]


class ProposalNetwork(RegionProposalNetwork):
    """torchvision's, but the box loss is L1, and both losses are divided by the number of anchors asked for."""

    def compute_loss(
        self, objectness: Tensor, deltas: Tensor, labels: list[Tensor], targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        positive, negative = (torch.cat(chosen) > 0 for chosen in self.fg_bg_sampler(labels))
        sampled, count = positive | negative, self.fg_bg_sampler.batch_size_per_image * len(labels)
        objectness_loss = F.binary_cross_entropy_with_logits(
            objectness.flatten()[sampled], torch.cat(labels)[sampled], reduction='sum'
        )
        box_loss = F.l1_loss(deltas[positive], torch.cat(targets)[positive], reduction='sum')
        return objectness_loss / count, box_loss / count


# --------------------------------------------------------------------------
# regions


class RegionPool(MultiScaleRoIAlign):
    """torchvision's, but aligned by half a pixel and with as many samples as a bin has pixels; strides are given."""

    def __init__(self, names: Sequence[str], strides: Sequence[int], side: int):
        super().__init__(list(names), side, sampling_ratio=0)
        self.strides = list(strides)

    def levels(self, boxes: Tensor) -> Tensor:
        """Boxes [R, 4] -> the place of each one's level among the maps: 224 pixels belong to stride 16."""
        sides = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
        first, last = (int(math.log2(self.strides[i])) for i in (0, -1))
        level = (self.canonical_level + torch.log2(sides / self.canonical_scale + 1e-8)).floor()
        return level.clamp(first, last).long() - first

    def forward(self, maps: dict[str, Tensor], boxes: list[Tensor], sizes: Sizes | None = None) -> Tensor:
        """Maps [N, C, h, w] by name, boxes [R_i, 4] of each image -> [sum of R_i, C, side, side]."""
        align = partial(roi_align, output_size=self.output_size, sampling_ratio=0, aligned=True)
        image = torch.cat([torch.full_like(b[:, :1], i) for i, b in enumerate(boxes)])
        rois = torch.cat([image, torch.cat(boxes)], dim=1)
        maps = [maps[name] for name in self.featmap_names]
        if len(maps) == 1:
            return align(maps[0], rois, spatial_scale=1 / self.strides[0])
        pooled = rois.new_zeros(len(rois), maps[0].shape[1], *self.output_size)
        levels = self.levels(rois[:, 1:])
        for level, (x, stride) in enumerate(zip(maps, self.strides, strict=True)):
            here = torch.where(levels == level)[0]
            pooled[here] = align(x, rois[here], spatial_scale=1 / stride)
        return pooled


def box_losses(scores: Tensor, deltas: Tensor, labels: list[Tensor], targets: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of classes; L1 of the boxes of objects, divided by the number of all regions.

    Scores [R, K + 1], deltas [R, 4 (K + 1)], labels [R_i] and wanted deltas [R_i, 4] of each image. torchvision's box
    loss is smooth.
    """
    labels, targets = torch.cat(labels), torch.cat(targets)
    rows = torch.where(labels > 0)[0]
    chosen = deltas.view(len(labels), -1, 4)[rows, labels[rows]]
    return F.cross_entropy(scores, labels), F.l1_loss(chosen, targets[rows], reduction='sum') / max(1, len(labels))


def mask_targets(masks: Tensor, boxes: Tensor, objects: Tensor, side: int) -> Tensor:
    """What is in each box of its object's mask, 0 or 1, [R, side, side]; torchvision's are shares of a pixel.

    Masks [n, H, W], boxes [R, 4], and which of the n objects each box is of, [R].
    """
    rois = torch.cat([objects[:, None].to(boxes), boxes], dim=1)
    pooled = roi_align(masks[:, None].to(boxes), rois, side, sampling_ratio=0, aligned=True)
    return (pooled[:, 0] >= 0.5).to(boxes.dtype)


def mask_loss(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """Mean binary cross-entropy of each region's own class: logits [R, K + 1, s, s], labels [R], targets [R, s, s]."""
    rows = torch.arange(len(labels), device=labels.device)
    return F.binary_cross_entropy_with_logits(logits[rows, labels], targets)


class RegionHeads(RoIHeads):
    """torchvision's, but with the losses above, in float32, and small masks as they come from the network."""

    def has_mask(self) -> bool:
        return self.mask_predictor is not None

    def region_features(self, maps: dict[str, Tensor], boxes: list[Tensor], sizes: Sizes) -> Tensor:
        """What classes and boxes are told from."""
        return self.box_roi_pool(maps, boxes, sizes)

    def mask_features(
        self, maps: dict[str, Tensor], boxes: list[Tensor], sizes: Sizes, features: Tensor | None
    ) -> Tensor:
        """What masks are made from; `features` of these boxes are those of `region_features`, where they are known."""
        return self.mask_head(self.mask_roi_pool(maps, boxes, sizes))

    def forward(
        self, maps: dict[str, Tensor], proposals: list[Tensor], sizes: Sizes, targets: list[dict] | None = None
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Detections of each image in eval mode, losses in train mode; the other is empty."""
        maps = {name: full(maps[name]) for name in self.box_roi_pool.featmap_names}
        if self.training:
            proposals, objects, labels, wanted = self.select_training_samples(proposals, targets)
        features = self.region_features(maps, proposals, sizes)
        scores, deltas = (full(x) for x in self.box_predictor(self.box_head(features)))
        if not self.training:
            found = zip(*self.postprocess_detections(scores, deltas, proposals, sizes), strict=True)
            detections = [dict(boxes=boxes, labels=labels, scores=scores) for boxes, scores, labels in found]
            return self.with_masks(maps, detections, sizes) if self.has_mask() else detections, {}
        losses = dict(zip(('loss_classifier', 'loss_box_reg'), box_losses(scores, deltas, labels, wanted), strict=True))
        if self.has_mask():
            masks = [target['masks'] for target in targets]
            losses['loss_mask'] = self.loss_of_masks(maps, sizes, features, proposals, objects, labels, masks)
        return [], losses

    def loss_of_masks(
        self,
        maps: dict[str, Tensor],
        sizes: Sizes,
        features: Tensor,
        proposals: list[Tensor],
        objects: list[Tensor],
        labels: list[Tensor],
        masks: list[Tensor],
    ) -> Tensor:
        """Of the regions that are an object's. Where none is, one region counts for nothing, so that BatchNorm has
        values and every parameter a gradient."""
        rows = [torch.where(label > 0)[0] for label in labels]
        nothing = not any(map(len, rows))
        if nothing:
            rows = [torch.arange(len(label), device=label.device)[: i == 0] for i, label in enumerate(labels)]
        boxes = [proposal[row] for proposal, row in zip(proposals, rows, strict=True)]
        starts = [sum(map(len, labels[:i])) for i in range(len(labels))]
        rows_of_all = torch.cat([row + start for row, start in zip(rows, starts, strict=True)])
        logits = full(self.mask_predictor(self.mask_features(maps, boxes, sizes, features[rows_of_all])))
        if nothing:
            return 0 * logits.abs().sum()
        targets = [
            mask_targets(mask, box, of_image[row], logits.shape[-1])
            for mask, box, of_image, row in zip(masks, boxes, objects, rows, strict=True)
        ]
        return mask_loss(logits, torch.cat(labels)[rows_of_all], torch.cat(targets))

    def with_masks(self, maps: dict[str, Tensor], detections: list[dict[str, Tensor]], sizes: Sizes) -> list[dict]:
        """Add to each image's detections the probabilities [n, s, s] of their masks; `paste_masks` enlarges them."""
        boxes, labels = ([found[key] for found in detections] for key in ('boxes', 'labels'))
        logits = full(self.mask_predictor(self.mask_features(maps, boxes, sizes, None)))
        chosen = logits[torch.arange(len(logits), device=logits.device), torch.cat(labels)].sigmoid()
        for found, masks in zip(detections, chosen.split([len(label) for label in labels]), strict=True):
            found['masks'] = masks
        return detections


class C4Heads(RegionHeads):
    """Boxes and masks from the same features: layer4 of the encoder, run once, and a norm of its own."""

    def __init__(self, layer4: nn.Module, norm: nn.Module, **options):
        super().__init__(box_head=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), **options)
        self.layer4, self.norm = layer4, norm

    def region_features(self, maps: dict[str, Tensor], boxes: list[Tensor], sizes: Sizes) -> Tensor:
        return self.norm(self.layer4(self.box_roi_pool(maps, boxes, sizes)))

    def mask_features(
        self, maps: dict[str, Tensor], boxes: list[Tensor], sizes: Sizes, features: Tensor | None
    ) -> Tensor:
        return self.region_features(maps, boxes, sizes) if features is None else features


@torch.no_grad()
def paste_masks(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Masks on the image: probabilities [n, s, s], boxes [n, 4], (H, W) -> bool [n, H, W].

    Whether the probability at a pixel's centre, bilinear, is one half or more.
    """
    height, width = size
    pasted = torch.zeros(len(masks), height, width, dtype=torch.bool, device=masks.device)
    at_once = max(1, 2**22 // (height * width))  # so that 50 MB are enough
    for start in range(0, len(masks), at_once):
        some = slice(start, start + at_once)
        x0, y0, x1, y1 = boxes[some, :, None].float().unbind(1)
        x = (torch.arange(width, device=masks.device) + 0.5 - x0) / (x1 - x0) * 2 - 1
        y = (torch.arange(height, device=masks.device) + 0.5 - y0) / (y1 - y0) * 2 - 1
        grid = torch.stack(torch.broadcast_tensors(x[:, None], y[:, :, None]), dim=-1)
        pasted[some] = F.grid_sample(masks[some, None].float(), grid, align_corners=False)[:, 0] >= 0.5
    return pasted


# --------------------------------------------------------------------------
# the whole


def batch_images(
    imgs: Sequence[Tensor], normalise: Callable[[Tensor], Tensor] = full, size_divisible: int = 32
) -> tuple[Tensor, Sizes]:
    """Images [3, h, w] -> one batch [N, 3, H, W], zero at right and below after `normalise`; and each one's size.

    Normalised as one batch, on the images' device. `size_divisible`: what H and W are multiples of.
    """
    sizes = [tuple(img.shape[-2:]) for img in imgs]
    height, width = (-(-max(sides) // size_divisible) * size_divisible for sides in zip(*sizes, strict=True))
    batch = normalise(torch.stack([F.pad(img, (0, width - img.shape[2], 0, height - img.shape[1])) for img in imgs]))
    for img, (h, w) in zip(batch, sizes, strict=True):
        img[:, h:], img[:, :, w:] = 0, 0
    return batch, sizes


class Detector(GeneralizedRCNN):
    """torchvision's, but images come resized, normalised and in one batch, and boxes stay in its pixels.

    `size_divisible`: what the sides of a batch are multiples of.
    """

    def __init__(self, backbone: nn.Module, rpn: nn.Module, roi_heads: nn.Module, size_divisible: int = 32):
        super().__init__(backbone, rpn, roi_heads, transform=None)
        self.size_divisible = size_divisible

    def forward(
        self, imgs: Tensor | Sequence[Tensor], extra: Sequence | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """imgs [N, 3, H, W], padded by `batch_images` (or images [3, h, w], which are padded here).

        In train mode `extra` is the targets, dicts of boxes [n, 4] float32, labels [n] int64 from 1 and masks
        [n, h, w] uint8 or bool, with `size`, the image's, if it is padded -> losses, float32 scalars by name. In eval
        mode it is the images' sizes, if any is padded -> for each image a dict of boxes [n, 4], labels [n], scores [n],
        best first, and masks [n, s, s]: probabilities, for `paste_masks`.
        """
        if isinstance(imgs, Tensor):
            sizes = [tuple(imgs.shape[-2:])] * len(imgs)
        else:
            imgs, sizes = batch_images(imgs, size_divisible=self.size_divisible)
        if self.training:
            sizes = [target.get('size', size) for target, size in zip(extra, sizes, strict=True)]
        elif extra is not None:
            sizes = extra
        images = ImageList(imgs, [tuple(int(side) for side in size) for size in sizes])
        maps = self.backbone(imgs)
        targets = extra if self.training else None
        proposals, losses = self.rpn(images, maps, targets)
        detections, region_losses = self.roi_heads(maps, proposals, images.image_sizes, targets)
        return {**losses, **region_losses} if self.training else detections


class Neck(nn.Module):
    """An encoder's last map alone; or, with a pyramid, the maps that it makes of it."""

    def __init__(self, encoder: nn.Module, pyramid: nn.Module | None = None):
        super().__init__()
        self.encoder, self.pyramid = encoder, pyramid

    def forward(self, imgs: Tensor) -> dict[str, Tensor]:
        last = self.encoder(imgs)[-1]
        return {'0': last} if self.pyramid is None else self.pyramid(last)


def take_layer4(encoder: nn.Module) -> nn.Module:
    """A ResNet's last stage, which is no longer in it: its only map is then the stage before."""
    if not isinstance(encoder, ResNet) or len(encoder.widths) < 2:
        raise ValueError("neck 'c4' takes layer3 and layer4 of a ResNet, which this encoder has not")
    layer4, encoder.layer4 = encoder.layer4, nn.Sequential()
    for attribute in ('map_indices', 'widths', 'strides'):
        setattr(encoder, attribute, getattr(encoder, attribute)[-2:-1])
    return layer4


def with_neck(encoder: nn.Module, neck: str, width: int, norm: str | None) -> tuple[nn.Module, list[int], int]:
    """The network that gives a detector its maps by name, their strides, and how many channels each has."""
    if neck == 'c4':
        return Neck(encoder), list(encoder.strides), encoder.widths[-1]
    if neck == 'simple':
        pyramid = SimpleFeaturePyramid(encoder.widths[0], width, stride=encoder.strides[0])
        return Neck(encoder, pyramid), [4, 8, 16, 32, 64], width
    return FPN(encoder, width, norm), [*encoder.strides, 2 * encoder.strides[-1]], width


def box_layers(kind: str, channels: int, conv_width: int, fc_width: int, norm: Callable | None) -> nn.Module:
    """The layers between the pooled map of a region, 7 x 7, and the predictor."""
    if kind == '2fc':
        layers = TwoMLPHead(channels * 49, fc_width)
    else:
        layers = FastRCNNConvFCHead((channels, 7, 7), [conv_width] * 4, [fc_width], norm)
    for layer in layers.modules():
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_uniform_(layer.weight, a=1)
            nn.init.zeros_(layer.bias)
    return layers


def box_predictor(dim: int, num_classes: int) -> FastRCNNPredictor:
    predictor = FastRCNNPredictor(dim, num_classes + 1)
    for layer, std in ((predictor.cls_score, 0.01), (predictor.bbox_pred, 0.001)):
        nn.init.normal_(layer.weight, std=std)
        nn.init.zeros_(layer.bias)
    return predictor


def mask_predictor(dim: int, conv_width: int, num_classes: int) -> MaskRCNNPredictor:
    predictor = MaskRCNNPredictor(dim, conv_width, num_classes + 1)
    nn.init.normal_(predictor.mask_fcn_logits.weight, std=0.001)
    for layer in (predictor.conv5_mask, predictor.mask_fcn_logits):
        nn.init.zeros_(layer.bias)
    return predictor


NORMS = {None: None, 'frozen': None, 'ln': partial(LayerNorm2d, eps=1e-6), 'bn': nn.BatchNorm2d}


def check_options(encoder: nn.Module, num_classes: int, neck: str, box_head: str, norm: str | None) -> None:
    check_choice('neck', neck, ('simple', 'fpn', 'c4'))
    check_choice('box_head', box_head, ('2fc', '4conv1fc'))
    if norm not in NORMS:
        check_choice('norm', norm, tuple(filter(None, NORMS)))
    maps = {'simple': 1, 'fpn': 4}.get(neck)
    if maps and len(encoder.strides) != maps:
        raise ValueError(f'neck {neck!r} takes {maps} map(s) of the encoder, which has {len(encoder.strides)}')
    if num_classes < 1:
        raise ValueError(f'num_classes {num_classes} must be at least 1; the background is not counted')


def create_detector(
    backbone: nn.Module,
    num_classes: int,
    *,
    neck: str | None = None,
    box_head: str = '2fc',
    norm: str | None = None,
    rpn_depth: int = 1,
    width: int = 256,
    anchor_sizes: Sequence[float] = (32, 64, 128, 256, 512),
    rpn_samples: int = 256,
    proposals: Sequence[int] | None = None,
    roi_samples: int = 512,
    fc_width: int = 1024,
    conv_width: int = 256,
    mask_convs: int = 4,
    masks: bool = True,
    size_divisible: int = 32,
    score_threshold: float = 0.05,
    nms: float = 0.5,
    detections: int = 100,
) -> Detector:
    """A detector of `num_classes` classes, the background not counted, on an encoder that some `create_backbone` made.

    `neck` is 'simple', 'fpn' or 'c4', by default what fits the maps. `box_head` '2fc' has two linear layers,
    '4conv1fc' four convolutions and one; 'c4' has neither. `norm` of the heads and of a feature pyramid: 'ln' over
    channels, 'bn', None; 'frozen' is None, and the encoder's BatchNorms stay as they are loaded. `proposals` are how
    many are kept before and after non-maximum suppression, in training and then in test: by default 2000, 1000, 1000,
    1000, with 'c4' 12000, 2000, 6000, 1000. The encoder becomes part of the detector. Raises ValueError for what does
    not fit.
    """
    neck = neck or ('simple' if len(backbone.strides) == 1 else 'fpn')
    check_options(backbone, num_classes, neck, box_head, norm)
    if norm == 'frozen':
        backbone = freeze_batch_norm_2d(backbone)
    new_norm, dim = NORMS[norm], backbone.widths[-1]
    layer4 = take_layer4(backbone) if neck == 'c4' else None
    network, strides, channels = with_neck(backbone, neck, width, norm)
    anchors = Anchors([anchor_sizes] if layer4 else [[size] for size in anchor_sizes], (0.5, 1, 2), strides)
    kept = proposals or ((12000, 2000, 6000, 1000) if layer4 else (2000, 1000, 1000, 1000))
    if len(kept) != 4 or len(anchors.sizes) != len(strides):
        raise ValueError(
            f'proposals {list(kept)} must be four numbers, and anchor_sizes {list(anchor_sizes)} one for each stride '
            f'of {strides}'
        )
    before, after = (dict(training=kept[i], testing=kept[i + 2]) for i in (0, 1))
    rpn = ProposalNetwork(
        *(anchors, ProposalHead(channels, anchors.num_anchors_per_location()[0], rpn_depth)),
        *(0.7, 0.3, rpn_samples, 0.5, before, after, 0.7),
    )
    options = dict(fg_iou_thresh=0.5, bg_iou_thresh=0.5, batch_size_per_image=roi_samples, positive_fraction=0.25)
    options |= dict(bbox_reg_weights=None, score_thresh=score_threshold, nms_thresh=nms, detections_per_img=detections)
    if layer4:
        options |= dict(box_roi_pool=RegionPool(['0'], strides, 14), box_predictor=box_predictor(dim, num_classes))
        options |= dict(mask_predictor=mask_predictor(dim, conv_width, num_classes) if masks else None)
        extra_norm = nn.Identity() if norm == 'frozen' else (new_norm or nn.BatchNorm2d)(dim)
        return Detector(network, rpn, C4Heads(layer4, extra_norm, **options), size_divisible)
    names, strides = ['0', '1', '2', '3'], strides[:4]
    options |= dict(box_roi_pool=RegionPool(names, strides, 7))
    options |= dict(box_head=box_layers(box_head, channels, conv_width, fc_width, new_norm))
    options |= dict(box_predictor=box_predictor(fc_width, num_classes))
    if masks:
        options |= dict(mask_roi_pool=RegionPool(names, strides, 14))
        options |= dict(mask_head=MaskRCNNHeads(channels, [conv_width] * mask_convs, 1, new_norm))
        options |= dict(mask_predictor=mask_predictor(conv_width, conv_width, num_classes))
    return Detector(network, rpn, RegionHeads(**options), size_divisible)
