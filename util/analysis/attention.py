"""Where the heads of a network look: distance and mutual information of query and key, of stock and own networks."""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from itertools import count
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from util.analysis.features import exact
from util.errors import UserError
from util.nn.models import fuse_attention

CHUNK = 1 << 22  # weights that are reduced at once, in float64


class Looks(NamedTuple):
    """What the heads of a layer look at, image by image."""

    distance: Tensor  # [N, heads], float64, in pixels
    mutual_information: Tensor  # [N, heads], float64, 0 (every query looks alike) to 1
    uniform: float  # the distance, were all weights the same


def attention_statistics(
    model: nn.Module, batches: Iterable[Tensor | tuple[Tensor, ...]]
) -> dict[str, dict[str, Tensor | float]]:
    """{module: {'distance' [heads], 'mutual_information' [heads], 'uniform'}}, in the order of the forward.

    `batches`: imgs [N, 3, H, W] as the network takes them, or tuples that begin with them. Means over all images, in
    float64 on the CPU. Distances are in pixels: mean over a head's queries of sum over keys of weight times distance,
    among patch tokens, whose weights sum to 1 (Raghu et al., 2021; Park et al., 2023). `mutual_information` is that of
    query and key, over sqrt(log T x entropy of the keys), T tokens (Park et al., 2023). Attention in windows counts
    window by window. Evaluation mode, no autocast. Raises UserError for a network whose attention cannot be seen.
    """
    device = next(model.parameters()).device
    sums, uniform, images = {}, {}, 0
    for batch in batches:
        imgs = batch if isinstance(batch, Tensor) else batch[0]
        images += len(imgs)
        for name, looks in look(model, imgs.to(device, non_blocking=True)).items():
            sums[name] = sums.get(name, 0) + torch.stack([looks.distance.sum(0), looks.mutual_information.sum(0)])
            uniform[name] = looks.uniform
    means = {name: (total / images).cpu() for name, total in sums.items()}
    return {
        name: {'distance': mean[0], 'mutual_information': mean[1], 'uniform': uniform[name]}
        for name, mean in means.items()
    }


def look(model: nn.Module, imgs: Tensor) -> dict[str, Looks]:
    """`Looks` of each attention at these images, in the order of the forward, on their device.

    An attention is what calls `scaled_dot_product_attention` inside of a module that has `num_heads`, whose name it
    has. The call is answered as ever; its weights are computed beside it, one layer at a time, and reduced at once.
    Modes and hooks of the network are restored. Raises UserError as `attention_statistics`.
    """
    modules, observer, handles = attentions(model), Observer(model, imgs), []
    for name, module in modules.items():
        block = model.get_submodule(name.rpartition('.')[0])
        block = module if block is model or isinstance(block, nn.ModuleList) else block
        handles.append(block.register_forward_pre_hook(observer.enter_block))
        handles.append(module.register_forward_pre_hook(partial(observer.enter, name)))
        handles.append(module.register_forward_hook(observer.leave))
    try:
        with exact(model), fused(model), observer:
            model(imgs.to(next(model.parameters())))
    finally:
        for handle in handles:
            handle.remove()
    if not observer.found:
        kind = type(model).__name__
        if modules:
            raise UserError(f'{kind} has an attention of its own, not scaled_dot_product_attention: none to see')
        raise UserError(f'{kind} has no attention')
    return observer.found


def attentions(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that have heads, by their names; not the parts of one that know the heads too."""
    found = {name: module for name, module in model.named_modules() if name and hasattr(module, 'num_heads')}
    prefixes = tuple(f'{name}.' for name in found)
    return {name: module for name, module in found.items() if not name.startswith(prefixes)}


@contextlib.contextmanager
def fused(model: nn.Module) -> Iterator[None]:
    """Every attention of timm's calls `scaled_dot_product_attention`; afterwards each does as before."""
    before = {module: module.fused_attn for module in model.modules() if hasattr(module, 'fused_attn')}
    fuse_attention(model)
    try:
        yield
    finally:
        for module, value in before.items():
            module.fused_attn = value


class Observer(TorchFunctionMode):
    """Sees the calls of attention in a forward, and in which module of which block they are."""

    def __init__(self, model: nn.Module, imgs: Tensor):
        super().__init__()
        self.prefix = getattr(model, 'num_prefix_tokens', 0)
        self.images, self.pixels = len(imgs), imgs.shape[-1]
        self.module = self.first_side = None
        self.found: dict[str, Looks] = {}

    def enter_block(self, block: nn.Module, inputs: tuple) -> None:
        x = inputs[0]  # [N, L, D], [N, H, W, D] or [N, D, H, W]
        self.side = x.shape[2] if x.ndim == 4 else math.isqrt(x.shape[1] - self.prefix)
        self.first_side = self.first_side or self.side
        # windows of MaxViT's grid attention take cells from all over the map
        self.spread = getattr(block, 'partition_block', None) is False

    def enter(self, name: str, module: nn.Module, _: tuple) -> None:
        self.name, self.module = name, module

    def leave(self, *_) -> None:
        self.module = None

    def __torch_function__(self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and self.module is not None:
            self.see(*args, **kwargs)
        return func(*args, **kwargs)

    def see(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_, scale=None, **more):
        if more.get('is_causal') or more.get('enable_gqa'):
            raise UserError(f'{self.name}: attention that is causal, or shares keys among heads, is not known here')
        if query.shape[-2] == 1 < key.shape[-2]:  # one token, such as a class, gathers what the others are
            return
        logits = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
        if attn_mask is not None:
            logits = logits.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else logits + attn_mask
        heads, (queries, keys) = self.module.num_heads, logits.shape[-2:]
        windows, tokens = logits.shape[:-2].numel() // (heads * self.images), keys - self.prefix
        side = math.isqrt(tokens)
        padded = -(-self.side // side) * side  # what windows of this size cover the map with
        if queries != keys or side**2 != tokens or windows * tokens != padded**2:
            raise UserError(
                f'{self.name}: attention of {queries} queries to {keys} keys in {windows} windows: '
                f'distances are known among the patches of square maps and windows alone'
            )
        logits = logits.reshape(-1, heads, keys, keys)
        parts = [reduced(part, self.prefix) for part in logits.split(max(1, CHUNK // logits[0].numel()))]
        distance, information = torch.cat(parts, 1).unflatten(1, (self.images, windows)).mean(2)  # [N, heads] each
        pixels = stride(self.pixels, self.first_side, self.side) * (padded // side if self.spread else 1)
        self.found[self.name] = Looks(pixels * distance, information, pixels * distances(side).mean().item())


def stride(pixels: int, first_side: int, side: int) -> int:
    """Pixels between neighbours of a map: the first map's, and twice as many after each merging, which rounds up."""
    return round(pixels / first_side) * next(2**k for k in count() if -(-first_side // 2**k) <= side)


def reduced(logits: Tensor, prefix: int = 0) -> Tensor:
    """Logits [G, heads, T, T] -> [2, G, heads], float64: distance in cells, normalised mutual information."""
    weights = logits.double().softmax(-1)[..., prefix:, prefix:]  # in float64 no row of patches is all zeros
    tokens = weights.shape[-1]
    cells = distances(math.isqrt(tokens), weights.device)
    distance = (torch.einsum('ghqk,qk->ghq', weights, cells) / weights.sum(-1)).mean(-1)
    weights = weights + 1e-8  # as in the published code, which renormalises after it
    weights = weights / weights.sum(-1, keepdim=True)
    of_keys = torch.special.entr(weights.mean(-2)).sum(-1)
    information = of_keys - torch.special.entr(weights).sum(-1).mean(-1)
    limit = (math.log(tokens) * of_keys).sqrt()
    return torch.stack([distance, information / limit.clamp_min(1e-30)])  # a single token tells nothing: 0


@cache
def distances(side: int, device: torch.device | None = None) -> Tensor:
    """[T, T], float64: between the cells of a side x side grid, row by row, in cells."""
    places = torch.cartesian_prod(*2 * [torch.arange(side, dtype=torch.float64)])
    return torch.cdist(places, places, compute_mode='donot_use_mm_for_euclid_dist').to(device)
