"""Feature maps of networks of timm's, for dense tasks: what stands between a classifier's encoder and its new head."""

import re
from collections.abc import Callable, Sequence
from functools import cache, partial

from timm.layers import LayerNorm2d
from timm.models.resnet import ResNet
from timm.models.swin_transformer import (
    SwinTransformer,
    SwinTransformerBlock,
    SwinTransformerStage,
)
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

from util.nn.checks import check_choice
from util.nn.swin import padded_windows
from util.nn.windowed import WindowedViT as WindowedViT
from util.nn.windowed import in_windows


class Maps:
    """Comes before a class of timm's: the network's forward gives some of its feature maps."""

    def forward(self, imgs: Tensor) -> list[Tensor]:
        """imgs [N, 3, H, W] -> maps [N, C_i, h_i, w_i]; each normed if the network has `norm0` and so on."""
        maps = self.forward_intermediates(imgs, indices=self.map_indices, norm=False, intermediates_only=True)
        return [getattr(self, f'norm{i}')(x) for i, x in enumerate(maps)] if self.own_norms else maps


@cache
def maps_class(network_class: type[nn.Module]) -> type[nn.Module]:
    return type(network_class.__name__, (Maps, network_class), {})


Indices = Sequence[int] | Callable[[int], Sequence[int]]  # of maps, or how they follow from how many there are


def as_maps(network: nn.Module, indices: Indices, norm: Callable[[int], nn.Module] | None = None) -> nn.Module:
    """The network itself, without what follows its last map, as an encoder: `forward(imgs)` gives maps `indices`.

    Parameter names stay timm's; `norm` of a width makes each map a norm, `norm0` and so on. `widths` and `strides`
    tell what the maps are. Raises ValueError for a network that gives no maps, or not these.
    """
    kind = type(network)
    if not hasattr(network, 'forward_intermediates'):
        raise ValueError(f'{kind.__name__} gives no feature maps: timm has no forward_intermediates of it')
    count = len(network.feature_info)
    indices = indices(count) if callable(indices) else indices
    if not indices or list(indices) != sorted(set(indices)) or not 0 <= indices[0] <= indices[-1] < count:
        raise ValueError(f'out_indices {list(indices)} must rise and be from 0 to {count - 1}')
    infos = [network.feature_info[i] for i in indices]
    network.prune_intermediate_layers(list(indices), prune_norm=True, prune_head=True)
    if isinstance(getattr(getattr(network, 'head', None), 'norm', None), nn.Module):
        network.head.norm = nn.Identity()  # timm before 1.0.31 leaves it there, and no map passes it
    network.map_indices, network.own_norms = list(indices), norm is not None
    network.widths, network.strides = [info['num_chs'] for info in infos], [info['reduction'] for info in infos]
    if norm:
        for i, width in enumerate(network.widths):
            network.add_module(f'norm{i}', norm(width))
    network.__class__ = maps_class(kind)
    return network


def StageMaps(network: SwinTransformer) -> SwinTransformer:
    """timm's Swin itself as an encoder: maps of all its stages and of any image, each normed by `norm0` and so on.

    Blocks pad their map to whole windows and then roll it, as every dense Swin does. timm's roll it first, so that
    padding lies between opposite edges, and clamp windows to the image that the network was made for: make it with
    `always_partition=True`. The new norms have an epsilon of 1e-5. Raises ValueError for windows that are not square.
    """
    if any(len(set(stage.blocks[0].window_size)) > 1 for stage in network.layers):
        raise ValueError('a Swin with windows that are not square gives no maps here')
    as_maps(network, range(len(network.layers)), partial(LayerNorm2d, eps=1e-5))
    network.patch_embed.strict_img_size, network.patch_embed.dynamic_img_pad = False, True
    for stage in network.layers:
        stage.__class__ = PaddedStage
        for block in stage.blocks:
            block.__class__, block.attn_mask = PaddedBlock, None
    return network


class PaddedStage(SwinTransformerStage):
    """timm's, which tells its blocks where to shift to and makes their mask once."""

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, h, w, C] -> [N, h / 2, w / 2, 2 C], rounded up; in the first stage [N, h, w, C]."""
        x = self.downsample(x)
        window, _ = self.blocks[0].window_size
        shifted = padded_windows(*x.shape[1:3], window, window // 2, x.device)
        for i, block in enumerate(self.blocks):
            x = block(x, window // 2, shifted.mask) if i % 2 else block(x, 0, None)
        return x


class PaddedBlock(SwinTransformerBlock):
    """timm's, but padding comes after the norm and before the shift."""

    def forward(self, x: Tensor, shift: int, mask: Tensor | None) -> Tensor:
        """Map [N, h, w, C], mask [G, S, S] of the padded map's G windows -> the same map."""
        x = x + self.drop_path1(self.attend(self.norm1(x), shift, mask))
        return x + self.drop_path2(self.mlp(self.norm2(x)))

    def attend(self, x: Tensor, shift: int, mask: Tensor | None) -> Tensor:
        window, _ = self.window_size
        return in_windows(lambda x: self.attn(x.flatten(1, 2), mask).view_as(x), x, window, shift)


# --------------------------------------------------------------------------
# a detector's pyramids; level i has stride 2^i times that of the first, and is called 'i', the last 'pool'

NORMS = {'ln': partial(LayerNorm2d, eps=1e-6), 'bn': nn.BatchNorm2d}  # over channels; of a width


class SimpleFeaturePyramid(nn.Module):
    """Levels of strides 4, 8, 16 and 32 from one map of a ViT (ViTDet), and one of 64.

    Each level is that map, enlarged by transposed convolutions or max-pooled, after a 1 x 1 and a 3 x 3 convolution,
    both normed over channels. Initial weights are torch's. Raises ValueError for another stride than 4, 8, 16 or 32.
    """

    def __init__(self, in_channels: int, out_channels: int = 256, stride: int = 16):
        super().__init__()
        if stride not in (4, 8, 16, 32):
            raise ValueError(f'a map of stride {stride}: the pyramid is made from one of stride 4, 8, 16 or 32')
        self.out_channels, self.strides = out_channels, [4, 8, 16, 32, 64]
        self.levels = nn.ModuleList(pyramid_level(in_channels, out_channels, stride / s) for s in self.strides[:-1])

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """[N, D, h, w] -> {'0': ..., '3', 'pool'} [N, C, ., .], fine to coarse."""
        maps = {str(i): level(x) for i, level in enumerate(self.levels)}
        return maps | {'pool': maps['3'][..., ::2, ::2]}


def pyramid_level(dim: int, channels: int, factor: float) -> nn.Sequential:
    """Map [N, dim, h, w] -> [N, channels, factor * h, factor * w]. Parts are `scale`, `lateral` and `output`."""
    scale = nn.Sequential()
    while factor > 1:
        if len(scale):
            scale.extend([NORMS['ln'](dim), nn.GELU()])
        scale.append(nn.ConvTranspose2d(dim, dim // 2, kernel_size=2, stride=2))
        dim, factor = dim // 2, factor / 2
    if factor < 1:
        scale.append(nn.MaxPool2d(round(1 / factor)))
    level = nn.Sequential()
    level.add_module('scale', scale)
    for name, in_channels, kernel in (('lateral', dim, 1), ('output', channels, 3)):
        conv = nn.Conv2d(in_channels, channels, kernel, padding=kernel // 2, bias=False)
        level.add_module(name, nn.Sequential(conv, NORMS['ln'](channels)))
    return level


class ViTPyramid(nn.Module):
    """An encoder of one map, and the simple feature pyramid on it."""

    def __init__(self, encoder: nn.Module, out_channels: int = 256):
        super().__init__()
        self.encoder = encoder
        self.pyramid = SimpleFeaturePyramid(encoder.widths[-1], out_channels, encoder.strides[-1])
        self.out_channels, self.strides = out_channels, self.pyramid.strides

    def forward(self, imgs: Tensor) -> dict[str, Tensor]:
        """imgs [N, 3, H, W] -> {'0': ..., '3', 'pool'}."""
        return self.pyramid(self.encoder(imgs)[-1])


class FPN(nn.Module):
    """An encoder of several maps, and torchvision's feature pyramid on them, with one level more.

    `norm` after its convolutions: None, 'ln' over channels, or 'bn'. Raises ValueError for maps whose strides do not
    double.
    """

    def __init__(self, backbone: nn.Module, out_channels: int = 256, norm: str | None = None):
        super().__init__()
        first, strides = backbone.strides[0], list(backbone.strides)
        if len(strides) < 2 or strides != [first << i for i in range(len(strides))]:
            raise ValueError(
                f'maps of strides {strides}: a feature pyramid takes two or more, each twice the one before'
            )
        if norm is not None:
            check_choice('norm', norm, tuple(NORMS))
        self.encoder = backbone
        self.fpn = FeaturePyramidNetwork(backbone.widths, out_channels, LastLevelMaxPool(), NORMS.get(norm))
        self.out_channels, self.strides = out_channels, [*strides, 2 * strides[-1]]

    def forward(self, imgs: Tensor) -> dict[str, Tensor]:
        """imgs [N, 3, H, W] -> {'0': ..., 'pool'} [N, C, ., .], fine to coarse."""
        return self.fpn({str(i): x for i, x in enumerate(self.encoder(imgs))})


class C4(nn.Module):
    """A ResNet's third stage as the only map; the last stage, `layer4`, works on each proposal instead.

    Raises ValueError for another network, and for one whose third map is not of stride 16.
    """

    def __init__(self, encoder: nn.Module):
        super().__init__()
        if not isinstance(encoder, ResNet) or list(encoder.strides[-2:]) != [16, 32]:
            raise ValueError(
                f"neck 'c4' is of a ResNet with maps of strides 16 and 32, not of {type(encoder).__name__}"
            )
        self.encoder, self.out_channels, self.strides = encoder, encoder.widths[-2], [16]
        encoder.prune_intermediate_layers([3])
        encoder.map_indices, encoder.widths, encoder.strides = [3], encoder.widths[-2:-1], [16]

    def forward(self, imgs: Tensor) -> dict[str, Tensor]:
        """imgs [N, 3, H, W] -> {'0': [N, C, H / 16, W / 16]}."""
        return {'0': self.encoder(imgs)[-1]}


def with_neck(encoder: nn.Module, neck: str, width: int = 256, norm: str | None = None) -> ViTPyramid | FPN | C4:
    """A detector's backbone: the encoder, which stays in it as `encoder`, and what makes levels of its maps.

    It has `out_channels`, and `strides` of the levels. For 'c4', take `encoder.layer4` before. Raises ValueError for
    what does not fit.
    """
    check_choice('neck', neck, ('simple', 'fpn', 'c4'))
    if size := getattr(encoder, 'fixed_size', None):
        raise ValueError(f'{type(encoder).__name__} takes images of {size} x {size} only, a detector any')
    if neck == 'simple':
        if len(encoder.widths) > 1:
            raise ValueError(f"neck 'simple' is for the one map of a ViT, not for {len(encoder.widths)}; try 'fpn'")
        return ViTPyramid(encoder, width)
    if neck == 'fpn' and len(encoder.widths) == 1:
        raise ValueError("neck 'fpn' is for several maps, not for the one of a ViT; try 'simple'")
    return FPN(encoder, width, norm) if neck == 'fpn' else C4(encoder)


# --------------------------------------------------------------------------
# what every method's `param_rules` is made of


def encoder_of(model: nn.Module) -> nn.Module:
    """The encoder in a segmenter or a detector; else the model itself."""
    return getattr(getattr(model, 'backbone', model), 'encoder', model)


def detector_rules(
    detector: GeneralizedRCNN,
    layer_id: Callable[[str], int],
    last: int,
    decays: Callable[[str, nn.Parameter], bool] | None = None,
) -> dict[str, tuple[int, float, bool]]:
    """{name: (layer_id, lr_scale, decays)} for every trainable parameter, as ViTDet's optimiser groups them.

    `layer_id` takes the encoder's own names; all else is in layer `last`. By default all decays, biases, tables of
    relative positions and a pyramid's and heads' norms over channels too, but for `pos_embed` and torch's own norms.
    """
    spared = {
        f'{prefix}.{name}'
        for prefix, module in detector.named_modules()
        if isinstance(module, _BatchNorm | nn.GroupNorm | nn.LayerNorm) and not isinstance(module, LayerNorm2d)
        for name, _ in module.named_parameters()
    }
    decays = decays or (lambda name, param: name not in spared and not name.endswith('.pos_embed'))
    rules = {}
    for name, param in detector.named_parameters():
        encoder = re.match(r'backbone\.encoder\.|roi_heads\.(?=layer4\.)', name)  # a ResNet's last stage may be a head
        if param.requires_grad:
            rules[name] = (layer_id(name[encoder.end() :]) if encoder else last, 1.0, decays(name, param))
    return rules
