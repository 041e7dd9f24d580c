"""Feature maps of networks of timm's, for dense tasks: what stands between a classifier's encoder and its new head."""

from collections.abc import Callable, Sequence
from functools import cache, partial

import torch.nn.functional as F
from timm.layers import LayerNorm2d
from timm.models.swin_transformer import (
    SwinTransformer,
    SwinTransformerBlock,
    SwinTransformerStage,
    window_partition,
    window_reverse,
)
from torch import Tensor, nn

from util.nn.swin import padded_windows


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
        _, rows, cols, dim = x.shape
        window, _ = self.window_size
        x = F.pad(x, (0, 0, 0, -cols % window, 0, -rows % window)).roll((-shift, -shift), dims=(1, 2))
        _, padded_rows, padded_cols, _ = x.shape
        x = self.attn(window_partition(x, self.window_size).view(-1, window * window, dim), mask)
        x = window_reverse(x.view(-1, window, window, dim), self.window_size, padded_rows, padded_cols)
        return x.roll((shift, shift), dims=(1, 2))[:, :rows, :cols]
