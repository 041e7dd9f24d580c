"""Any network of timm's: how to make it, what its stages are, and after which module a mask token can join."""

import copy
import difflib
import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn.modules.batchnorm import _BatchNorm

from util.nn.models import as_timm

POSITIONS = {'NCHW': (2, 3), 'NHWC': (1, 2), 'NLC': (1,)}  # the axes that run over the image


class Site(NamedTuple):
    """How features lie in a tensor: C channels at side x side positions of the image, row by row."""

    layout: str  # 'NCHW', 'NHWC' or 'NLC'
    prefix: int  # leading tokens of 'NLC' that are no patches
    width: int  # C
    side: int

    def to_map(self, features: Tensor) -> Tensor:
        """-> [N, C, side, side]"""
        if self.layout == 'NLC':
            return features[:, self.prefix :].transpose(1, 2).unflatten(2, (self.side, self.side))
        return features.permute(0, 3, 1, 2) if self.layout == 'NHWC' else features

    def spread_mask(self, mask: Tensor) -> Tensor:
        """[N, 1, side, side] -> a factor for features; leading tokens are visible."""
        if self.layout == 'NLC':
            return F.pad(mask.flatten(2).transpose(1, 2), (0, 0, self.prefix, 0))
        return mask.permute(0, 2, 3, 1) if self.layout == 'NHWC' else mask

    def spread_channels(self, vector: Tensor) -> Tensor:
        """[C] -> the same at all positions, as a factor or term for features."""
        return vector.view(-1, 1, 1) if self.layout == 'NCHW' else vector

    def mean(self, features: Tensor) -> Tensor:
        """The mean over an image's positions, as a term for features."""
        patches = features[:, self.prefix :] if self.layout == 'NLC' else features
        return patches.mean(dim=POSITIONS[self.layout], keepdim=True)


def layout_of(shape: torch.Size, encoder: nn.Module, img_size: int) -> Site:
    """How features of one image lie, by their shape. Raises ValueError for what is no square map."""
    if len(shape) == 4:
        nchw, nhwc = shape[2] == shape[3], shape[1] == shape[2]
        if nchw and nhwc:  # as many channels as positions a side
            nhwc = getattr(encoder, 'output_fmt', 'NCHW') == 'NHWC'
        if nhwc:
            return Site('NHWC', 0, shape[3], shape[1])
        if nchw:
            return Site('NCHW', 0, shape[1], shape[2])
    if len(shape) == 3:
        for prefix in (0, getattr(encoder, 'num_prefix_tokens', 0)):
            side = math.isqrt(shape[1] - prefix)
            if side * side == shape[1] - prefix and img_size % max(side, 1) == 0:
                return Site('NLC', prefix, shape[2], side)
    raise ValueError(f'features of shape {list(shape)} are no square map')


def any_timm(*, name: str, img_size: int, num_classes: int = 0, drop_path_rate: float = 0.0, **sizes) -> nn.Module:
    """timm's network of this name. Raises ValueError for an unknown one, and for drop path where it has none."""
    if not timm.is_model(name):  # timm would take it for a folder, or for a host's
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise ValueError(f'timm has no model {name}' + f'; did you mean {" or ".join(close)}?' * bool(close))
    options = {'img_size': img_size, 'drop_path_rate': drop_path_rate}
    while True:
        try:
            network = timm.create_model(name, num_classes=num_classes, **options, **sizes)
            return as_timm(network, name, **options, **sizes)
        except TypeError as error:  # convolutions know no img_size, DenseNet and VGG no drop path
            refused = re.search('unexpected keyword.*(img_size|drop_path_rate)', str(error))
            if not refused or refused[1] not in options:
                raise
            if options.pop(refused[1]) and refused[1] == 'drop_path_rate':
                raise ValueError(f'{name} has no drop path; --drop_path 0 goes without') from error


def any_site(encoder: nn.Module, mask_layer: int | None) -> str:
    """The name of a module of timm's network: that of its feature map number `mask_layer`.

    None: before the last stage, or after the patch embedding where all maps have one stride. Raises ValueError.
    """
    features = getattr(encoder, 'feature_info', None)
    if not features:
        raise ValueError(f'{type(encoder).__name__} does not say what its stages are')
    if mask_layer is None:
        same_stride = len({info['reduction'] for info in features}) == 1
        return 'patch_embed' if same_stride else features[-2]['module']
    if not -len(features) <= mask_layer < len(features):
        raise ValueError(f'mask_layer {mask_layer}: {type(encoder).__name__} has {len(features)} feature maps')
    return features[mask_layer]['module']


def stage_layers(encoder: nn.Module) -> dict[str, int]:
    """{name: layer id} by the stages of `feature_info`; 0 before the first, and one for what follows the last."""
    stages = [info['module'] for info in encoder.feature_info]
    ids, layer_id = {}, 0
    for name, _ in encoder.named_parameters():  # in the order of the network
        inside = [i + 1 for i, stage in enumerate(stages) if name.startswith(f'{stage}.')]
        layer_id = inside[0] if inside else len(stages) + 1 if layer_id else 0
        ids[name] = layer_id
    return ids


@torch.enable_grad()
def find_site(encoder: nn.Module, features: Callable, name: str, img_size: int) -> tuple[Site, Site, list[str]]:
    """-> features after module `name`, the last map, and the names of parameters that the last map does not depend on.

    `features(encoder, imgs)` makes the last map; it is tried on a copy of the encoder without storage. Raises
    ValueError where the mask token cannot come after this module.
    """
    shapes = {id(p): nn.Parameter(torch.empty_like(p, device='meta')) for p in encoder.parameters()}
    shapes |= {id(b): torch.empty_like(b, device='meta') for b in encoder.buffers()}
    trial = copy.deepcopy(encoder, shapes).eval()
    try:
        module = trial.get_submodule(name)
    except AttributeError as error:
        raise ValueError(f'the encoder has no module {name} for the mask token to come after') from error
    if isinstance(module, _BatchNorm):  # several GPUs train with another module in its place
        raise ValueError(f'the mask token cannot come after {name}, a BatchNorm')
    imgs = torch.zeros(1, 3, img_size, img_size, device='meta', requires_grad=True)
    seen, node, last = features_at(module, imgs, partial(features, trial))
    if id(imgs) in leaves(last, without=node):
        raise ValueError(f'the mask token cannot come after {name}: the image goes round it')
    site, end = layout_of(seen.shape, encoder, img_size), layout_of(last.shape, encoder, img_size)

    strides = [info['reduction'] for info in getattr(encoder, 'feature_info', [])]
    if len(set(strides)) > 1 and site.layout == 'NLC':
        raise ValueError(f'the tokens after {name} may be in another order than the image; no mask can be laid on them')
    if img_size % site.side or img_size % end.side:
        raise ValueError(f'img_size {img_size} is not a multiple of its {site.side} and {end.side} positions a side')
    if strides and img_size // end.side != strides[-1]:
        raise ValueError(f'the last map has stride {img_size // end.side}, the last features {strides[-1]}')
    used = leaves(last)
    return site, end, [key for key, param in trial.named_parameters() if id(param) not in used]


def leaves(output: Tensor, without: Node | None = None) -> set[int]:
    """The ids of the leaves that a gradient of `output` reaches; `without`: but for what it reaches by this node."""
    found, visited, nodes = set(), {None, without}, [output.grad_fn]
    while nodes:
        node = nodes.pop()
        if node not in visited:
            visited.add(node)
            found.add(id(getattr(node, 'variable', None)))
            nodes += [node for node, _ in node.next_functions]
    return found


def features_at(module: nn.Module, imgs: Tensor, last_map: Callable) -> tuple[Tensor, Node, Tensor]:
    """A module's output, the node of the graph that it passes, and `last_map(imgs)`.

    Raises ValueError where these are no single tensors.
    """
    seen = []

    def record(module: nn.Module, args: tuple, output: Any) -> Any:
        # a copy passes a node that nothing else does: the output may be the input, or be written to later
        output = output.clone() if isinstance(output, Tensor) else output
        seen.append((output, getattr(output, 'grad_fn', None)))
        return output

    try:
        with module.register_forward_hook(record):
            last = last_map(imgs)
    except Exception as error:  # whatever a network raises that cannot take such images
        reason = str(error) or type(error).__name__
        raise ValueError(f'the encoder cannot take images of this size: {reason}') from error
    if len(seen) != 1:
        raise ValueError(f'the mask token cannot come after a module that runs {len(seen)} times in a forward')
    [(output, node)] = seen
    if not isinstance(output, Tensor) or not isinstance(last, Tensor):
        raise ValueError('the mask token cannot be used where features are a list or tuple of maps')
    return output, node, last
