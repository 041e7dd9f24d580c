"""Semantic segmentation on any encoder: UPerNet (Xiao et al., ECCV 2018) or FCN heads, as mmsegmentation has them.

    image --encoder--> [ViT: pyramid] --> maps at strides 4, 8, 16, 32 --> UPerHead --> logits at stride 4
                                                         '--> FCNHead --> auxiliary logits, in training
    UPerHead:   map 0 -- lateral --(+)-- conv -------.
                map 1 -- lateral --(+)-- conv --up---|
                map 2 -- lateral --(+)-- conv --up---|--> cat, conv --> classes
                map 3 -- pyramid pooling ------- up--'       each (+) adds the sum of the coarser map, enlarged

Shapes: N batch, K classes, C a head's width, H x W image, h x w a map. Parameter names are mmsegmentation's, so the
heads of its files need no renaming. Enlarging is bilinear, without antialiasing.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from util.nn.checks import check_choice

IGNORED = 255  # the label that counts for nothing


def resize(x: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """Map [N, C, h, w] -> [N, C, *size], bilinear between the centres of pixels."""
    return F.interpolate(x, size=size, mode='bilinear', align_corners=False)


class ConvModule(nn.Module):
    """Convolution of side `kernel`, which keeps the map's size, BatchNorm, ReLU."""

    def __init__(self, in_channels: int, channels: int, kernel: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, kernel, padding=kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        nn.init.kaiming_normal_(self.conv.weight, mode='fan_out', nonlinearity='relu')

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Head(nn.Module):
    """What ends both heads: whole channels drop out, then each place is classified."""

    def __init__(self, channels: int, num_classes: int):
        super().__init__()
        self.dropout = nn.Dropout2d(0.1)
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)
        nn.init.normal_(self.conv_seg.weight, std=0.01)
        nn.init.zeros_(self.conv_seg.bias)

    def classify(self, x: Tensor) -> Tensor:
        return self.conv_seg(self.dropout(x))


class UPerHead(Head):
    """Pyramid pooling of the last map, then a feature pyramid over all maps, whose levels are fused at the first."""

    def __init__(self, dims: list[int], channels: int, num_classes: int, pool_scales: tuple[int, ...] = (1, 2, 3, 6)):
        super().__init__(channels, num_classes)
        *others, last = dims
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(scale), ConvModule(last, channels, 1)) for scale in pool_scales
        )
        self.bottleneck = ConvModule(last + len(pool_scales) * channels, channels, 3)
        self.lateral_convs = nn.ModuleList(ConvModule(dim, channels, 1) for dim in others)
        self.fpn_convs = nn.ModuleList(ConvModule(channels, channels, 3) for _ in others)
        self.fpn_bottleneck = ConvModule(len(dims) * channels, channels, 3)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Maps [N, D_i, h_i, w_i], fine to coarse -> logits [N, K, h_0, w_0]."""
        *others, last = maps
        pooled = [resize(module(last), last.shape[-2:]) for module in self.psp_modules]
        levels = [lateral(x) for lateral, x in zip(self.lateral_convs, others, strict=True)]
        levels.append(self.bottleneck(torch.cat([last, *pooled], dim=1)))
        for i in reversed(range(len(others))):  # the sum already made flows on
            levels[i] = levels[i] + resize(levels[i + 1], levels[i].shape[-2:])
        outs = [conv(x) for conv, x in zip(self.fpn_convs, levels[:-1], strict=True)] + levels[-1:]
        outs = [resize(x, outs[0].shape[-2:]) for x in outs]
        return self.classify(self.fpn_bottleneck(torch.cat(outs, dim=1)))


class FCNHead(Head):
    """3 x 3 convolutions on one map; with `concat` another one on their result beside their input."""

    def __init__(self, dim: int, channels: int, num_classes: int, convs: int = 1, concat: bool = False):
        super().__init__(channels, num_classes)
        self.convs = nn.Sequential(*(ConvModule(channels if i else dim, channels, 3) for i in range(convs)))
        self.conv_cat = ConvModule(dim + channels, channels, 3) if concat else None

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, D, h, w] -> logits [N, K, h, w]."""
        out = self.convs(x)
        if self.conv_cat is not None:
            out = self.conv_cat(torch.cat([x, out], dim=1))
        return self.classify(out)


class FeaturePyramid(nn.Module):
    """Four maps of one stride -> four maps at 4, 2, 1 and 1/2 times their side. `pool` is that of the last."""

    def __init__(self, dim: int, pool: str = 'max'):
        super().__init__()
        check_choice('pool', pool, ('max', 'avg'))

        def twice() -> nn.Module:
            return nn.ConvTranspose2d(dim, dim, kernel_size=2, stride=2)

        self.up4 = nn.Sequential(twice(), nn.BatchNorm2d(dim), nn.GELU(), twice())
        self.up2 = nn.Sequential(twice())
        self.pool = nn.MaxPool2d(2) if pool == 'max' else nn.AvgPool2d(2)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        first, second, third, fourth = maps
        return [self.up4(first), self.up2(second), third, self.pool(fourth)]


class Segmenter(nn.Module):
    """An encoder whose `forward(imgs)` gives maps, and the heads on them; it knows no method.

    A `UPerHead` takes all maps, an `FCNHead` the last; the auxiliary head takes the last but one. `fixed_size` is the
    crop of a network that takes no other size. `loss_mean='all'`: the sum over counted pixels divided by the number of
    all pixels, the ignored included, as published recipes were tuned; 'counted': by that of the counted ones.
    """

    def __init__(
        self,
        encoder: nn.Module,
        pyramid: nn.Module | None,
        decode_head: UPerHead | FCNHead,
        auxiliary_head: FCNHead,
        fixed_size: int | None = None,
        loss_mean: str = 'all',
    ):
        super().__init__()
        check_choice('loss_mean', loss_mean, ('all', 'counted'))
        self.encoder, self.pyramid = encoder, pyramid
        self.decode_head, self.auxiliary_head = decode_head, auxiliary_head
        self.fixed_size, self.loss_mean = fixed_size, loss_mean

    def features(self, imgs: Tensor) -> list[Tensor]:
        """imgs [N, 3, H, W], normalised -> maps [N, D_i, h_i, w_i], fine to coarse."""
        maps = self.encoder(imgs)
        return maps if self.pyramid is None else self.pyramid(maps)

    def forward(self, imgs: Tensor, labels: Tensor | None = None) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """imgs [N, 3, H, W], normalised -> logits [N, K, H, W].

        With labels [N, H, W] int64, 255 ignored: scalar loss, and what it is the sum of, `decode` and `aux`, detached.
        """
        maps = self.features(imgs)
        logits = self.decode_head(maps if isinstance(self.decode_head, UPerHead) else maps[-1])
        if labels is None:
            return resize(logits, imgs.shape[-2:])
        decode = self.loss_of(logits, labels)
        aux = 0.4 * self.loss_of(self.auxiliary_head(maps[-2]), labels)
        return decode + aux, {'decode': decode.detach(), 'aux': aux.detach()}

    def loss_of(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Logits [N, K, h, w], labels [N, H, W] -> mean cross-entropy at the labels' size. In float32."""
        with torch.autocast(logits.device.type, enabled=False):
            logits = logits if logits.dtype == torch.float64 else logits.float()
            logits = resize(logits, labels.shape[-2:])
            losses = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction='none')
            if self.loss_mean == 'all':
                return losses.mean()
            return losses.sum() / (labels != IGNORED).sum().clamp(min=1)


# --------------------------------------------------------------------------
# what every method's `create_segmenter` and `param_rules` are made of


def with_heads(
    encoder: nn.Module,
    num_classes: int,
    *,
    fixed_size: int | None = None,
    head: str = 'uper',
    channels: int | None = None,
    aux_channels: int | None = None,
    pool: str | None = None,
    loss_mean: str = 'all',
) -> Segmenter:
    """A segmenter on an encoder with `widths` and `strides`; maps of one stride get a pyramid.

    `channels` of the decode head: by default a ViT's width, else 512, or the last map's width if that is less; the
    auxiliary head's: 256, or its map's width. Raises ValueError for what does not fit.
    """
    check_choice('head', head, ('uper', 'fcn'))
    if not 0 < num_classes <= IGNORED:
        raise ValueError(f'num_classes {num_classes} must be from 1 to {IGNORED}, which is the label that is ignored')
    widths = list(encoder.widths)
    if len(widths) < 2:
        raise ValueError(f'{len(widths)} map of the encoder: heads need two or more; give more out_indices')
    one_stride = len(set(encoder.strides)) == 1
    pyramid = None
    if one_stride:
        if len(widths) != 4:
            raise ValueError(f'{len(widths)} maps of one stride: the pyramid needs four, so give four out_indices')
        if fixed_size and fixed_size < 2 * encoder.strides[0]:
            raise ValueError(f'img_size {fixed_size} has fewer than 2 x 2 patches, and the coarsest map none')
        pyramid = FeaturePyramid(widths[0], pool or 'max')
    elif pool:
        raise ValueError(f'pool {pool!r}: only the maps of a ViT, which have one stride, are pooled')
    channels = channels or (widths[-1] if one_stride else min(512, widths[-1]))
    aux_channels = aux_channels or min(256, widths[-2])
    if head == 'uper':
        decode_head = UPerHead(widths, channels, num_classes)
    else:
        decode_head = FCNHead(widths[-1], channels, num_classes, convs=2, concat=True)
    auxiliary_head = FCNHead(widths[-2], aux_channels, num_classes)
    if head == 'fcn':  # with the last two maps taken alone, nothing trains what only others go through
        norms = [getattr(encoder, f'norm{i}', None) for i in range(len(widths) - 2)]
        for module in (pyramid.up4, pyramid.up2) if pyramid else filter(None, norms):
            module.requires_grad_(False)
    return Segmenter(encoder, pyramid, decode_head, auxiliary_head, fixed_size, loss_mean)


MAP_OPTIONS = (  # of encoders for maps
    *('out_indices', 'rel_pos_bias', 'init_values', 'abs_pos_embed', 'deep_stem'),
    *('global_blocks', 'rel_pos', 'rel_pos_size'),
)
HEAD_OPTIONS = ('head', 'channels', 'aux_channels', 'pool', 'loss_mean')


def split_options(options: dict) -> tuple[dict, dict]:
    """A segmenter's options -> those of its heads, and those of its encoder."""
    heads = {key: value for key, value in options.items() if key in HEAD_OPTIONS}
    return heads, {key: value for key, value in options.items() if key not in HEAD_OPTIONS}


def segmenter_rules(
    segmenter: Segmenter,
    layer_id: Callable[[str], int],
    last: int,
    decays: Callable[[str, nn.Parameter], bool] = lambda name, param: param.ndim > 1,
) -> dict[str, tuple[int, float, bool]]:
    """{name: (layer_id, lr_scale, decays)} for every trainable parameter, as mmsegmentation's optimisers group them.

    `layer_id` takes the encoder's own names; pyramid and heads are in layer `last`. By default all but 1-D parameters
    decay, class token, positions and bias tables included: the published exemption looks for names that do not occur.
    """
    return {
        name: (
            layer_id(name.removeprefix('encoder.')) if name.startswith('encoder.') else last,
            1.0,
            decays(name, param),
        )
        for name, param in segmenter.named_parameters()
        if param.requires_grad
    }


def swin_decays(name: str, param: nn.Parameter) -> bool:
    """Which parameters of a Swin's segmenter decay: biases do, and the heads' BatchNorms, whose name is `bn`."""
    return not any(word in name for word in ('norm', 'relative_position_bias_table', 'absolute_pos_embed'))
