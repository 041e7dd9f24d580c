"""What a network makes of images: one vector for each, before its head or after every block, by hooks."""

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from util import dist
from util.analysis.similarity import Gram
from util.errors import UserError
from util.nn.grad_checkpoint import blocks

FEATURES = ('pooled', 'cls')
LAYERS = ('last', 'all')


def extract(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    layers: str = 'last',
    feature: str = 'pooled',
    normalise: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor | dict[str, Tensor], Tensor]:
    """Features [N, D] and labels [N] of the images of a loader, on the CPU, in the precision of the network.

    `layers`: 'last', or 'all', which gives {name: [N, D]} in the order of depth. The rest is as `stream` has it.
    """
    found, labels = defaultdict(list), []
    for batch, of_batch in stream(model, loader, layers, feature, normalise):
        labels.append(of_batch.cpu())
        for name, vectors in batch.items():
            found[name].append(vectors.cpu())
    features = {name: torch.cat(vectors) for name, vectors in found.items()}
    return features if layers == 'all' else features[feature], torch.cat(labels)


@torch.no_grad()
def stream(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    layers: str = 'last',
    feature: str = 'pooled',
    normalise: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """For each batch, {name: [N, D]} in the order of depth, and the labels [N]; on the device of the network.

    `loader`: batches (imgs [N, 3, H, W], labels [N], ...), as the network takes them, or as `normalise` does.
    `feature`: 'pooled', which is what the head is given, and of a block the mean of its patch tokens or map; or 'cls',
    the class token. `layers`: 'last', which has one name, that of the feature; with 'all', the names of the blocks
    come before it. Evaluation mode, no autocast; each module's mode is restored, the hooks are removed.
    Raises UserError for a network that has no class token, or whose blocks give something else.
    """
    if feature == 'cls' and getattr(model, 'cls_token', None) is None:
        raise UserError(f'a {type(model).__name__} has no class token: --feature pooled')
    device = next(model.parameters()).device
    modules = block_names(model) if layers == 'all' else {}
    with evaluating(model), captured(modules, lambda name, x: vector(model, name, x, feature)) as of_blocks:
        for imgs, labels, *_ in loader:
            imgs = imgs.to(device, non_blocking=True)
            with torch.autocast(device.type, enabled=False):
                last = before_head(model, normalise(imgs) if normalise else imgs, feature)
            yield {name: of_blocks[name] for name in modules} | {feature: last}, labels


def before_head(model: nn.Module, imgs: Tensor, feature: str) -> Tensor:
    """What the head is given, or the class token after the last norm that it has before the head: [N, D]."""
    if feature == 'cls':
        return model.forward_features(imgs)[:, 0]
    if hasattr(model, 'forward_head'):
        return model.forward_head(model.forward_features(imgs), pre_logits=True).flatten(1)
    given = []
    handle = model.head.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    try:
        model(imgs)
    finally:
        handle.remove()
    return given[0]


class Kept(NamedTuple):
    """The features of a data set, on the CPU in float16, by the names of the layers; and the Gram matrices of each."""

    features: dict[str, Tensor]  # [N, D]
    read: Tensor  # [N], bool: an image that could not be read has the label -1
    grams: dict[str, Gram]


def keep(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    rows: Iterable[list[int]],
    count: int,
    img_size: int,
    **how,
) -> Kept:
    """The features of `count` images, of which this rank's loader gives some: those of `rows`, batch by batch.

    `how` is what `stream` takes. Grams are of features before rounding. Every rank must call it, and gets all features.
    Raises UserError where one is not finite, or too large for float16.
    """
    device, sizes = next(model.parameters()).device, widths(model, img_size, how['layers'], how['feature'])
    features = {name: torch.zeros(count, width, dtype=torch.float16) for name, width in sizes.items()}
    grams = {name: Gram(width, device) for name, width in sizes.items()}
    read = torch.zeros(count, dtype=torch.long, device=device)
    for places, (vectors, labels) in zip(rows, stream(model, loader, **how), strict=True):
        good = labels.to(device) >= 0
        read[places] = good.long()
        for name, of_batch in vectors.items():
            features[name][places] = of_batch.half().cpu()
            grams[name].update(of_batch[good])
    dist.barrier()  # hosts notice a lost rank, before any of them waits for a GPU
    for name, table in features.items():
        features[name] = dist.all_reduce_sum(table.to(device)).cpu()
        if not features[name].isfinite().all():
            raise UserError(f'features of {name} are not finite, or beyond 65,504, the largest number of float16')
    return Kept(
        features, dist.all_reduce_sum(read).bool().cpu(), {name: gram.over_ranks() for name, gram in grams.items()}
    )


def widths(model: nn.Module, img_size: int, layers: str, feature: str) -> dict[str, int]:
    """{name: D} of what `stream` gives."""
    blank = torch.zeros(1, 3, img_size, img_size, dtype=next(model.parameters()).dtype)
    [(vectors, _)] = stream(model, [(blank, torch.zeros(1))], layers, feature)
    return {name: vector.shape[1] for name, vector in vectors.items()}


# --------------------------------------------------------------------------
# hooks and layouts


def block_names(model: nn.Module) -> dict[str, nn.Module]:
    """The residual blocks of a network by their names, such as blocks.0 or layer1.0, in the order of depth."""
    kinds = {type(block) for block in blocks(model)} - {nn.Sequential, nn.ModuleList}  # of down-sampling, of buffers
    found = {name: module for name, module in model.named_modules() if type(module) in kinds}
    prefixes = tuple(f'{name}.' for name in found)
    return {name: module for name, module in found.items() if not name.startswith(prefixes)}


def vector(model: nn.Module, name: str, output: Tensor, feature: str) -> Tensor:
    """What stands for an image in the output of a block: the mean of its patch tokens, or the class token; [N, D]."""
    if not isinstance(output, Tensor) or output.ndim not in (3, 4):
        raise UserError(f'{name} of a {type(model).__name__} gives neither tokens nor a map: --layers last')
    return output[:, 0] if feature == 'cls' else patches(model, output).mean(1)


def patches(model: nn.Module, output: Tensor) -> Tensor:
    """Patch tokens [N, L, D] of tokens behind class token or registers, or of a map: [N, C, H, W], or [N, H, W, C]."""
    if output.ndim == 3:
        return output[:, getattr(model, 'num_prefix_tokens', 0) :]
    return (output if channels_last(model) else output.permute(0, 2, 3, 1)).flatten(1, 2)


def channels_last(model: nn.Module) -> bool:
    """Whether the maps of a network are [N, H, W, C], as those of window transformers are."""
    layout = getattr(model, 'output_fmt', None) or getattr(getattr(model, 'patch_embed', None), 'output_fmt', 'NCHW')
    return layout == 'NHWC'


@contextlib.contextmanager
def captured(modules: dict[str, nn.Module], reduce: Callable[[str, Tensor], Tensor]) -> Iterator[dict[str, Tensor]]:
    """While it is open, `reduce(name, output)` of these modules in the last forward, by their names."""
    found = {}

    def hook(name: str) -> Callable:
        return lambda module, inputs, output: found.update({name: reduce(name, output)})

    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def exact(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, in the precision of the weights: no autocast, no TF32."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    device = next(model.parameters()).device
    try:
        with evaluating(model), torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards each module has its own again."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
