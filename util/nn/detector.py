"""Detection and instance segmentation on any encoder: Mask R-CNN (He et al., ICCV 2017) of torchvision's parts.

    images --encoder, pyramid--> maps --RPN--> proposals --RoIAlign--> box head --> class, box
                                                        '--RoIAlign--> mask head --> mask of each class
    neck 'simple': one map of a plain ViT, and ViTDet's pyramid on it (Li et al., ECCV 2022)
         'fpn':    the maps of a hierarchical network, and a feature pyramid (Lin et al., CVPR 2017)
         'c4':     layer3 of a ResNet alone; each region goes through its layer4, and no pyramid is made

What differs from torchvision's Mask R-CNN is what the published recipes have: each subclass says it. Boxes are x0, y0,
x1, y1 in pixels; class 0 is the background. Maps may come in low precision: whatever follows a head is float32.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import freeze_batch_norm_2d
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import MultiScaleRoIAlign, roi_align

from util.nn.checks import check_choice, check_numbers
from util.nn.pyramid import NORMS, with_neck

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
        chosen, count = self.fg_bg_sampler(labels), self.fg_bg_sampler.batch_size_per_image * len(labels)
        positive, negative = (torch.where(torch.cat(mask))[0] for mask in chosen)
        sampled = torch.cat([positive, negative])
        objectness_loss = F.binary_cross_entropy_with_logits(
            objectness.flatten()[sampled], torch.cat(labels)[sampled], reduction='sum'
        )
        box_loss = F.l1_loss(deltas[positive], torch.cat(targets)[positive], reduction='sum')
        return objectness_loss / count, box_loss / count


# --------------------------------------------------------------------------
# regions


class RegionPool(MultiScaleRoIAlign):
    """torchvision's, but aligned by half a pixel and with as many samples as a bin has pixels; strides are given."""

    def __init__(self, strides: Sequence[int], side: int):
        super().__init__([str(i) for i in range(len(strides))], side, sampling_ratio=0)
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


def fastrcnn_loss(
    class_logits: Tensor, box_regression: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of all regions; L1 of the boxes of objects over the number of all regions.

    Logits [R, K + 1], deltas [R, 4 (K + 1)], labels [R_i] and wanted deltas [R_i, 4] of each image. torchvision's box
    loss is smooth.
    """
    labels, targets = torch.cat(labels), torch.cat(regression_targets)
    rows = torch.where(labels > 0)[0]
    deltas = box_regression.view(*class_logits.shape, 4)[rows, labels[rows]]
    classifier_loss = F.cross_entropy(class_logits, labels, reduction='sum')
    box_loss = F.l1_loss(deltas, targets[rows], reduction='sum')
    return classifier_loss / max(1, len(labels)), box_loss / max(1, len(labels))


def project_masks_on_boxes(masks: Tensor, boxes: Tensor, objects: Tensor, side: int) -> Tensor:
    """What each box has of its object's mask, 0 or 1, [R, side, side]. torchvision's are shares of a pixel.

    Masks [n, H, W], boxes [R, 4], and which of the n objects each box is of, [R].
    """
    rois = torch.cat([objects[:, None].to(boxes), boxes], dim=1)
    pooled = roi_align(masks[:, None].to(boxes), rois, side, sampling_ratio=0, aligned=True)
    return (pooled[:, 0] >= 0.5).to(boxes.dtype)


def maskrcnn_loss(
    mask_logits: Tensor,
    proposals: list[Tensor],
    gt_masks: list[Tensor],
    gt_labels: list[Tensor],
    mask_matched_idxs: list[Tensor],
) -> Tensor:
    """Mean binary cross-entropy of the mask of each region's own class.

    Logits [R, K + 1, s, s]; of each image the regions [R_i, 4], masks [n, H, W] and labels [n] of its objects, and
    which object each region is of, [R_i].
    """
    targets = map(partial(project_masks_on_boxes, side=mask_logits.shape[-1]), gt_masks, proposals, mask_matched_idxs)
    labels = torch.cat([label[objects] for label, objects in zip(gt_labels, mask_matched_idxs, strict=True)])
    rows = torch.arange(len(labels), device=labels.device)
    return F.binary_cross_entropy_with_logits(mask_logits[rows, labels], torch.cat(list(targets)))


class RegionHeads(RoIHeads):
    """torchvision's, but with the losses above, in float32, and small masks as they come from the network."""

    def has_mask(self) -> bool:
        return self.mask_predictor is not None

    def region_features(self, maps: dict[str, Tensor], boxes: list[Tensor], sizes: Sizes) -> Tensor:
        """What classes and boxes are told from."""
        return self.box_roi_pool(maps, boxes, sizes)

    def mask_features(
        self, maps: dict[str, Tensor], boxes: list[Tensor], sizes: Sizes, known: list[Tensor] | None = None
    ) -> Tensor:
        """What masks are made from; `known` are these boxes' features, of each image, where there are some already."""
        return self.mask_head(self.mask_roi_pool(maps, boxes, sizes))

    def forward(
        self, maps: dict[str, Tensor], proposals: list[Tensor], sizes: Sizes, targets: list[dict] | None = None
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Detections of each image in eval mode, losses in train mode; the other is empty."""
        maps = {name: full(x) for name, x in maps.items()}
        if self.training:
            proposals, objects, labels, wanted = self.select_training_samples(proposals, targets)
        features = self.region_features(maps, proposals, sizes)
        scores, deltas = (full(x) for x in self.box_predictor(self.box_head(features)))
        if not self.training:
            found = zip(*self.postprocess_detections(scores, deltas, proposals, sizes), strict=True)
            detections = [dict(boxes=boxes, labels=labels, scores=scores) for boxes, scores, labels in found]
            return self.with_masks(maps, detections, sizes) if self.has_mask() else detections, {}
        losses = {}
        losses['loss_classifier'], losses['loss_box_reg'] = fastrcnn_loss(scores, deltas, labels, wanted)
        if self.has_mask():
            losses['loss_mask'] = self.loss_of_masks(maps, proposals, sizes, features, objects, labels, targets)
        return [], losses

    def loss_of_masks(
        self,
        maps: dict[str, Tensor],
        proposals: list[Tensor],
        sizes: Sizes,
        features: Tensor,
        objects: list[Tensor],
        labels: list[Tensor],
        targets: list[dict],
    ) -> Tensor:
        """Of the regions that are an object's.

        Where no region is, the first one goes through the head and counts for nothing: SyncBatchNorm needs values
        somewhere, and every parameter a gradient.
        """
        rows = [torch.where(label > 0)[0] for label in labels]
        if nothing := not any(map(len, rows)):
            rows[0] = torch.arange(len(labels[0]), device=labels[0].device)[:1]
        boxes, known, objects = (
            [part[row] for part, row in zip(parts, rows, strict=True)]
            for parts in (proposals, features.split([len(label) for label in labels]), objects)
        )
        logits = full(self.mask_predictor(self.mask_features(maps, boxes, sizes, known)))
        if nothing:
            return 0 * logits.abs().sum()
        masks, classes = ([target[key] for target in targets] for key in ('masks', 'labels'))
        return maskrcnn_loss(logits, boxes, masks, classes, objects)

    def with_masks(self, maps: dict[str, Tensor], detections: list[dict[str, Tensor]], sizes: Sizes) -> list[dict]:
        """Add to each image's detections the probabilities [n, s, s] of their masks; `paste_masks` enlarges them."""
        boxes, labels = ([found[key] for found in detections] for key in ('boxes', 'labels'))
        logits = full(self.mask_predictor(self.mask_features(maps, boxes, sizes)))
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
        self, maps: dict[str, Tensor], boxes: list[Tensor], sizes: Sizes, known: list[Tensor] | None = None
    ) -> Tensor:
        return torch.cat(known) if known else self.region_features(maps, boxes, sizes)


@torch.no_grad()
def paste_masks(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Masks on the image: probabilities [n, s, s], boxes [n, 4], (H, W) -> bool [n, H, W].

    Whether the probability at a pixel's centre, bilinear, is one half or more.
    """
    height, width = size
    pasted = torch.zeros(len(masks), height, width, dtype=torch.bool, device=masks.device)
    at_once = max(1, 2**22 // (height * width))  # so that 100 MB are enough
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

    @property
    def compiled_part(self) -> nn.Module:
        """What --compile compiles, for training: behind it shapes depend on what is in the images."""
        return self.backbone

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
        maps = self.backbone(imgs) if self.training else self.backbone.forward(imgs)  # never compiled for all sizes
        targets = extra if self.training else None
        proposals, losses = self.rpn(images, maps, targets)
        detections, region_losses = self.roi_heads(maps, proposals, images.image_sizes, targets)
        return {**losses, **region_losses} if self.training else detections


def box_layers(kind: str, channels: int, conv_width: int, fc_width: int, norm: Callable | None) -> nn.Module:
    """The layers between the pooled map of a region, 7 x 7, and the predictor."""
    if kind == '2fc':
        return TwoMLPHead(channels * 49, fc_width)
    return FastRCNNConvFCHead((channels, 7, 7), [conv_width] * 4, [fc_width], norm)


def initialise(heads: RegionHeads) -> None:
    """The published initial weights of what torchvision starts otherwise: predictors start near zero."""
    parts = [heads.box_head, heads.box_predictor, heads.mask_predictor]
    for name, layer in itertools.chain(*(part.named_modules() for part in parts if part is not None)):
        if std := {'cls_score': 0.01, 'bbox_pred': 0.001, 'mask_fcn_logits': 0.001}.get(name):
            nn.init.normal_(layer.weight, std=std)
        elif isinstance(layer, nn.Linear):
            nn.init.kaiming_uniform_(layer.weight, a=1)
        if getattr(layer, 'bias', None) is not None:
            nn.init.zeros_(layer.bias)


def create_detector(
    backbone: nn.Module,
    num_classes: int,
    *,
    neck: str | None = None,
    box_head: str = '2fc',
    norm: str | None = None,
    rpn_depth: int = 1,
    width: int = 256,
    anchor_sizes: Sequence[float] | None = None,
    anchor_scale: float = 8,
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
    1000, with 'c4' 12000, 2000, 6000, 1000. `anchor_sizes` in pixels, one for each map, are by default
    `anchor_scale` times its stride, so 32 to 512; with 'c4' all five are on the one map. The encoder becomes part
    of the detector. Raises ValueError for what does not fit.
    """
    neck = neck or ('simple' if len(backbone.strides) == 1 else 'fpn')
    check_choice('box_head', box_head, ('2fc', '4conv1fc'))
    if norm is not None:
        check_choice('norm', norm, (*NORMS, 'frozen'))
    if num_classes < 1:
        raise ValueError(f'num_classes {num_classes} must be at least 1; the background is not counted')
    if neck == 'c4' and box_head != '2fc':
        raise ValueError(f"box_head {box_head!r} is not for neck 'c4', whose box head is the last stage")
    check_numbers(1, math.inf, width=width, rpn_depth=rpn_depth, rpn_samples=rpn_samples, roi_samples=roi_samples)
    check_numbers(1, math.inf, fc_width=fc_width, conv_width=conv_width, mask_convs=mask_convs, detections=detections)
    check_numbers(1, math.inf, size_divisible=size_divisible, **({'proposals': proposals} if proposals else {}))
    check_numbers(0, 1, whole=False, score_threshold=score_threshold, nms=nms)
    new_norm, last, top = NORMS.get(norm), getattr(backbone, 'layer4', None), backbone.widths[-1]
    if norm == 'frozen':
        backbone = freeze_batch_norm_2d(backbone)
    network = with_neck(backbone, neck, width, None if norm == 'frozen' else norm)
    c4, strides, channels = neck == 'c4', network.strides, network.out_channels
    anchor_sizes = anchor_sizes or [anchor_scale * stride for stride in ((4, 8, 16, 32, 64) if c4 else strides)]
    check_numbers(1, math.inf, whole=False, anchor_sizes=anchor_sizes)
    anchors = Anchors([anchor_sizes] if c4 else [[size] for size in anchor_sizes], (0.5, 1, 2), strides)
    if len(anchors.sizes) != len(strides):
        raise ValueError(f'anchor_sizes {list(anchor_sizes)} must be one for each map, of strides {strides}')
    kept = proposals or ((12000, 2000, 6000, 1000) if c4 else (2000, 1000, 1000, 1000))
    if not isinstance(kept, (list, tuple)) or len(kept) != 4:
        raise ValueError(f'proposals {kept} must be four: before and after, in training and then in test')
    before, after = (dict(training=kept[i], testing=kept[i + 2]) for i in (0, 1))
    rpn = ProposalNetwork(
        *(anchors, ProposalHead(channels, anchors.num_anchors_per_location()[0], rpn_depth)),
        *(0.7, 0.3, rpn_samples, 0.5, before, after, 0.7),
    )
    options = dict(fg_iou_thresh=0.5, bg_iou_thresh=0.5, batch_size_per_image=roi_samples, positive_fraction=0.25)
    options |= dict(bbox_reg_weights=None, score_thresh=score_threshold, nms_thresh=nms, detections_per_img=detections)
    dim, mask_dim = (top, top) if c4 else (fc_width, conv_width)
    options |= dict(box_predictor=FastRCNNPredictor(dim, num_classes + 1))
    options |= dict(mask_predictor=MaskRCNNPredictor(mask_dim, conv_width, num_classes + 1) if masks else None)
    if c4:
        extra_norm = nn.Identity() if norm == 'frozen' else (new_norm or nn.BatchNorm2d)(top)
        heads = C4Heads(last, extra_norm, box_roi_pool=RegionPool(strides, 14), **options)
    else:
        heads = RegionHeads(
            RegionPool(strides[:-1], 7),
            box_layers(box_head, channels, conv_width, fc_width, new_norm),
            mask_roi_pool=RegionPool(strides[:-1], 14) if masks else None,
            mask_head=MaskRCNNHeads(channels, [conv_width] * mask_convs, 1, new_norm) if masks else None,
            **options,
        )
    initialise(heads)
    return Detector(network, rpn, heads, size_divisible)
