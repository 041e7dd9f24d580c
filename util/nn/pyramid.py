"""Feature maps of networks of timm's, for dense tasks: what stands between a classifier's encoder and its new head."""

from collections.abc import Callable, Sequence
from functools import cache

from torch import Tensor, nn


class Maps:
    """Comes before a class of timm's: the network's forward gives some of its feature maps."""

    def forward(self, imgs: Tensor) -> list[Tensor]:
        """imgs [N, 3, H, W] -> maps [N, C_i, h_i, w_i]; each normed if the network has `norm0` and so on."""
        maps = self.forward_intermediates(imgs, indices=self.map_indices, norm=False, intermediates_only=True)
        return [getattr(self, f'norm{i}')(x) for i, x in enumerate(maps)] if self.own_norms else maps


@cache
def maps_class(network_class: type[nn.Module]) -> type[nn.Module]:
    return type(network_class.__name__, (Maps, network_class), {})


def as_maps(network: nn.Module, indices: Sequence[int], norm: Callable[[int], nn.Module] | None = None) -> nn.Module:
    """The network itself, without what follows its last map, as an encoder: `forward(imgs)` gives maps `indices`.

    Parameter names stay timm's; `norm` of a width makes each map a norm, `norm0` and so on. `widths` and `strides`
    tell what the maps are. Raises ValueError for a network that gives no maps, or not these.
    """
    kind = type(network)
    if not hasattr(network, 'forward_intermediates'):
        raise ValueError(f'{kind.__name__} gives no feature maps: timm has no forward_intermediates of it')
    count = len(network.feature_info)
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
