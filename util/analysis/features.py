"""What a network makes of images, by hooks: a vector for each, before its head or after every block; or its maps."""

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
    come before it. As `exact` has it; each module's mode is restored, the hooks are removed.
    Raises UserError for a network that has no class token, or whose blocks give something else.
    """
    if feature == 'cls' and getattr(model, 'cls_token', None) is None:
        raise UserError(f'a {type(model).__name__} has no class token: --feature pooled')
    device = next(model.parameters()).device
    modules = block_names(model) if layers == 'all' else {}
    with captured(modules, lambda name, x: vector(model, name, x, feature)) as of_blocks:
        for imgs, labels, *_ in loader:
            imgs = imgs.to(device, non_blocking=True)
            with exact(model):
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
# maps at all depths


def collect(
    model: nn.Module, imgs: Tensor, halves: bool = True, reduce: Callable[[Tensor], Tensor] = lambda maps: maps
) -> dict[str, Tensor]:
    """{point: map [N, C, h, w]} of images [N, 3, H, W], as the network takes them, in the order of depth.

    Points: `embed`, what the first block of a ViT is given, and of tokens always the patches alone; `patch_embed` of a
    window transformer, as the module of that name gives it; `stem` of a convolutional network, with its max-pool. Then
    the states of the residual stream: blocks.0.attn after attention, blocks.0.mlp after the MLP; one, blocks.0, without
    `halves`, and where a block has no halves, or norms what they add instead of what they are given (SwinV2). Mergings
    are points of their own, such as layers.1.downsample. `reduce` is applied to each map at once; what it gives is kept
    in place of the map. As `exact` has it; modes are restored, hooks removed. Raises UserError for a network whose
    blocks give no maps.
    """
    found = {}

    def keep(point: str, output: Tensor) -> None:
        found[point] = reduce(as_map(model, point, output, imgs.shape))

    with exact(model), residual_stream(model, halves, keep):
        model(imgs.to(next(model.parameters())))
    return found


@contextlib.contextmanager
def residual_stream(model: nn.Module, halves: bool, keep: Callable[[str, Tensor], None]) -> Iterator[None]:
    """While it is open, one forward calls `keep(point, output)` at the points of `collect`."""
    modules, halved, past_mlp = block_names(model), set(), set()
    if not modules:
        raise UserError(f'a {type(model).__name__} has no residual blocks that are known here')

    def before(module: nn.Module, act: Callable, *of: str) -> None:
        hooks.enter_context(module.register_forward_pre_hook(lambda module, inputs: act(*of, inputs[0])))

    def after(module: nn.Module, act: Callable, *of: str) -> None:
        hooks.enter_context(module.register_forward_hook(lambda module, inputs, output: act(*of, output)))

    def before_norm2(name: str, state: Tensor) -> None:
        """It is given the state after attention, LayerScale and all; unless it norms what the MLP adds."""
        if name not in past_mlp:
            halved.add(name)
            keep(f'{name}.attn', state)

    def after_block(name: str, state: Tensor) -> None:
        keep(f'{name}.mlp' if name in halved else name, state)

    [first, *_] = modules
    with contextlib.ExitStack() as hooks:
        if first.startswith('blocks.') or not hasattr(model, 'patch_embed'):
            before(modules[first], keep, 'embed' if hasattr(model, 'patch_embed') else 'stem')
        else:
            after(model.patch_embed, keep, 'patch_embed')
        for name, module in model.named_modules():
            if name.startswith('layers.') and name.endswith('.downsample') and not isinstance(module, nn.Identity):
                after(module, keep, name)
            if name in modules:
                after(module, after_block, name)
                if halves and has_halves(module):
                    before(module.norm2, before_norm2, name)
                    before(module.mlp, lambda name, _: past_mlp.add(name), name)
        yield


def has_halves(block: nn.Module) -> bool:
    """Whether a block is attention, then an MLP that has a norm of its own."""
    return all(hasattr(block, part) for part in ('attn', 'norm2', 'mlp'))


def as_map(model: nn.Module, point: str, output: Tensor, of_images: torch.Size) -> Tensor:
    """Tokens [N, L, D], or a map of either layout -> [N, C, h, w]; of tokens, h : w is that of the images."""
    if isinstance(output, Tensor) and output.ndim == 4:
        return output.permute(0, 3, 1, 2) if channels_last(model, output.shape) else output
    if isinstance(output, Tensor) and output.ndim == 3:
        tokens = patches(model, output)
        length, (height, width) = tokens.shape[1], of_images[2:]
        rows = round((length * height / width) ** 0.5)
        if rows and length % rows == 0:
            return tokens.transpose(1, 2).unflatten(2, (rows, length // rows))
    given = list(output.shape) if isinstance(output, Tensor) else f'a {type(output).__name__}'
    raise UserError(f'{point} of a {type(model).__name__} gives {given}: neither a map, nor tokens of one')


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
    return (output if channels_last(model, output.shape) else output.permute(0, 2, 3, 1)).flatten(1, 2)


def channels_last(model: nn.Module, shape: torch.Size) -> bool:
    """Whether a map of this shape is [N, H, W, C]: where only one reading is square, that; else as the network says."""
    if (shape[1] == shape[2]) != (shape[2] == shape[3]):
        return shape[1] == shape[2]
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
