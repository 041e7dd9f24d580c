"""Swin on all tokens of a grid or on some of them, in any order: `Windows` tells who attends to whom.

Names are those of the original Swin, where merging ends a stage. A shifted window is a plain one of a grid that is cut
elsewhere. It does not wrap around the border, where windows are simply smaller; that equals the masked cyclic shift.

Windows of which only some tokens are there are packed into groups of one window's size, the emptier ones together, and
attention within a group is masked to windows. How many groups are filled depends on the tokens; how many there are, and
so every shape, does not.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, PatchEmbed
from torch import Tensor, nn

from util.nn.checks import check_divides, check_heads, check_windows
from util.nn.models import LayerNorm, as_timm, norm_layer

# --------------------------------------------------------------------------
# windows


class Windows(NamedTuple):
    """L tokens in G groups of S slots; slots may stay empty."""

    bias_index: Tensor  # [G or 1, S, S] int64, which of the (2 * window - 1)^2 relative positions a pair has
    mask: Tensor | None  # [G, S, S] float32, 0 within a window, -inf elsewhere; None: a group is a window
    slots: Tensor | None  # [L] int64, the slot of each token; None: one group of all tokens, in their order
    padded: int = 0  # G * S where empty slots are the padding of a map: zeros, which are attended to as tokens are


def grid_coords(rows: int, cols: int, device: torch.device | None = None) -> Tensor:
    """(row, column) of all tokens of a grid in raster order, [rows * cols, 2]."""
    return torch.cartesian_prod(torch.arange(rows, device=device), torch.arange(cols, device=device))


def unit_major(side: int, units: int) -> Tensor:
    """Raster places of all tokens of a grid, mask unit by mask unit: [units * units, r * r], r = side / units."""
    r = side // units
    return torch.arange(side * side).view(units, r, units, r).transpose(1, 2).reshape(-1, r * r)


def window_ids(coords: Tensor, window: int, shift: int) -> Tensor:
    """(row, column) of tokens [..., 2] -> that of their windows [..., 2]."""
    return (coords + (window - shift) % window) // window


def group_shape(num_tokens: int, window: int) -> tuple[int, int]:
    """(G, S) that any `num_tokens` tokens of a grid fit into.

    A few tokens make one group. Otherwise a group is a window's size, and first fit leaves no two groups that would fit
    into one: any two hold more than S, so all G hold at least G * (S + 1) / 2 tokens.
    """
    size = window * window
    return (1, num_tokens) if num_tokens <= 2 * size else (2 * num_tokens // (size + 1), size)


def group_slots(coords: Tensor, window: int, shift: int) -> Tensor:
    """Slots [L] of tokens at distinct (row, column) [L, 2]: fullest windows first, into the first group with room."""
    groups, size = group_shape(len(coords), window)
    if groups == 1:
        return torch.arange(len(coords))
    row, col = window_ids(coords, window, shift).numpy().T
    members = row * (col.max() + 1) + col
    counts = np.bincount(members)
    filled, starts, before, group = [0] * groups, np.zeros_like(counts), 0, 0
    for i in (-counts).argsort(kind='stable')[: np.count_nonzero(counts)].tolist():
        count = int(counts[i])
        group = group if count == before else 0  # where a window of this size found no room, the next finds none
        while filled[group] + count > size:
            group += 1
        starts[i] = group * size + filled[group]
        filled[group] += count
        before = count
    order = members.argsort(kind='stable')  # tokens, window after window
    slots = np.empty_like(order)
    slots[order] = np.arange(len(order)) + (starts - (counts.cumsum() - counts))[members[order]]
    return torch.from_numpy(slots)


def make_windows(coords: Tensor, slots: Tensor | None, groups: int, size: int, window: int, shift: int) -> Windows:
    """Tokens at (row, column) [L, 2], in slots [L] of G groups of S -> Windows. Arithmetic only, on any device."""
    if groups == 1:
        slots = None
    else:  # empty slots lie outside of the grid, in a window of their own, and attend to each other
        coords = coords.new_full((groups * size, 2), -window).index_copy(0, slots, coords)
    coords = coords.view(groups, size, 2)
    ids = window_ids(coords, window, shift)
    same = (ids.unsqueeze(2) == ids.unsqueeze(1)).all(dim=-1)  # [G, S, S]
    row, col = (coords.unsqueeze(2) - coords.unsqueeze(1) + window - 1).unbind(-1)
    # tokens of different windows may be further apart than the table reaches
    bias_index = torch.where(same, row * (2 * window - 1) + col, 0)
    mask = torch.zeros(same.shape, device=same.device).masked_fill(~same, -torch.inf)
    return Windows(bias_index, mask, slots)


def cyclic_slots(coords: Tensor, rows: int, cols: int, window: int, shift: int) -> Tensor:
    """Slots [L] of all tokens of a grid, whose sides the window divides: it is shifted cyclically, then cut."""
    row, col = coords.unbind(-1)
    row, col = (row - shift) % rows, (col - shift) % cols
    return (row // window * (cols // window) + col // window) * window**2 + row % window * window + col % window


def one_window(window: int, device: torch.device | None = None) -> Windows:
    """All tokens of a window."""
    return make_windows(grid_coords(window, window, device), None, 1, window * window, window, 0)


def grid_windows(rows: int, cols: int, window: int, shift: int) -> Windows:
    """All tokens of a grid, whose sides the window divides: a group is a window of the cyclically shifted grid."""
    coords, size = grid_coords(rows, cols), window * window
    slots = cyclic_slots(coords, rows, cols, window, shift)
    windows = make_windows(coords, slots, rows * cols // size, size, window, shift)
    # a pair's slots tell its relative position, in all groups alike
    return windows._replace(bias_index=one_window(window).bias_index)


def padded_windows(rows: int, cols: int, window: int, shift: int, device: torch.device) -> Windows:
    """All tokens of a map of any size, which is padded below and on the right, and then shifted cyclically.

    A map that is a single window is shifted too. Between windows the mask is -100, as every dense Swin has it.
    """
    rows_padded, cols_padded = rows + -rows % window, cols + -cols % window
    coords, mask = grid_coords(rows_padded, cols_padded, device), None
    slots = cyclic_slots(coords, rows_padded, cols_padded, window, shift)
    if shift:
        ids = torch.empty_like(coords).index_copy(0, slots, window_ids(coords, window, shift))
        ids = ids.view(-1, window * window, 2)
        apart = (ids.unsqueeze(2) != ids.unsqueeze(1)).any(dim=-1)
        mask = torch.zeros(apart.shape, device=device).masked_fill(apart, -100)
    present = slots.view(rows_padded, cols_padded)[:rows, :cols].flatten()
    return Windows(one_window(window, device).bias_index, mask, present, len(slots))


# --------------------------------------------------------------------------
# layers


class WindowAttention(nn.Module):
    """Multi-head attention within windows, with a learned bias per relative position."""

    def __init__(self, dim: int, window_size: int, num_heads: int):
        super().__init__()
        check_heads(dim, num_heads, "a stage's width")
        self.num_heads = num_heads
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window_size - 1) ** 2, num_heads))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, windows: Windows) -> Tensor:
        """Tokens x [N, L, D] in any order -> the same; computed in the windows' G groups of S slots."""
        (n, _, dim), size = x.shape, windows.bias_index.shape[-1]
        qkv = self.qkv(x)
        if windows.padded:
            empty = self.qkv.bias.to(qkv.dtype).expand(n, windows.padded, -1)
            qkv = empty.index_copy(1, windows.slots, qkv)
        elif windows.slots is not None:
            qkv = qkv.new_zeros(n, windows.mask.shape[0] * size, 3 * dim).index_copy(1, windows.slots, qkv)
        # unbound before they are permuted, so that their gradients are put together where they belong
        qkv = qkv.view(n, -1, size, 3, self.num_heads, dim // self.num_heads).unbind(3)
        qkv = [x.transpose(2, 3) for x in qkv]  # each [N, G, heads, S, D / heads]
        bias = self.relative_position_bias_table[windows.bias_index].permute(0, 3, 1, 2)  # [G or 1, heads, S, S]
        if windows.mask is None:
            q, k, v = (x.flatten(0, 1) for x in qkv)  # each [N * G, heads, S, D / heads]
        else:
            q, k, v = (x.flatten(1, 2) for x in qkv)  # each [N, G * heads, S, D / heads]: so that N shares the mask
            bias = (bias + windows.mask.unsqueeze(1)).flatten(0, 1).unsqueeze(0)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        x = x.reshape(n, -1, self.num_heads, size, dim // self.num_heads).transpose(2, 3).reshape(n, -1, dim)
        if windows.slots is not None:
            x = x.index_select(1, windows.slots)
        return self.proj(x)


class SwinBlock(nn.Module):
    """Pre-norm block: window attention, MLP."""

    def __init__(
        self, dim: int, window_size: int, num_heads: int, mlp_ratio: float, drop_path: float, norm2_eps: float
    ):
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = WindowAttention(dim, window_size, num_heads)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = LayerNorm(dim, eps=norm2_eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, windows: Windows) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), windows))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchMerging(nn.Module):
    """Each 2 x 2 neighbours become one token of twice the width.

    `by_column`: the upper left, lower left, upper right, lower right, as every Swin has it; else row by row, which the
    published pretraining does.
    """

    def __init__(self, dim: int, by_column: bool):
        super().__init__()
        self.by_column = by_column
        self.norm = norm_layer(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor, units: int) -> Tensor:
        """x [N, units * r * r, D], each unit an r x r raster -> [N, units * r/2 * r/2, 2 D]."""
        n, length, dim = x.shape
        half = round((length // units) ** 0.5) // 2
        return self.merge(x.view(n, units, half, 2, half, 2, dim))

    def forward_map(self, x: Tensor) -> Tensor:
        """A map [N, h, w, D], zero-padded to even sides -> [N, h / 2, w / 2, 2 D], rounded up."""
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        n, rows, cols, dim = x.shape
        x = self.merge(x.view(n, 1, rows // 2, 2, cols // 2, 2, dim))
        return x.view(n, rows // 2, cols // 2, -1)

    def merge(self, x: Tensor) -> Tensor:
        """x [N, unit, row, child row, column, child column, D] -> [N, L, 2 D]."""
        x = x.permute(0, 1, 2, 4, 5, 3, 6) if self.by_column else x.permute(0, 1, 2, 4, 3, 5, 6)
        return self.reduction(self.norm(x.reshape(len(x), -1, 4 * x.shape[-1])))


class SwinStage(nn.Module):
    """Blocks of one width, with windows shifted in every second one, and the merging after them."""

    def __init__(self, blocks: list[SwinBlock], downsample: PatchMerging | None):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample

    def forward(self, x: Tensor, windows: Sequence[Windows], units: int = 1) -> Tensor:
        """x [N, L, D], windows unshifted and shifted -> [N, L / 4, 2 D]; in the last stage [N, L, D]."""
        x = self.forward_blocks(x, windows)
        return x if self.downsample is None else self.downsample(x, units)

    def forward_blocks(self, x: Tensor, windows: Sequence[Windows]) -> Tensor:
        """x [N, L, D], windows unshifted and shifted -> the same, before the merging."""
        for i, block in enumerate(self.blocks):
            x = block(x, windows[i % 2])
        return x


# --------------------------------------------------------------------------
# stages, classifier, dense network


class Grid(NamedTuple):
    """The tokens of one stage, and the windows over them."""

    side: int
    window: int  # its side
    shift: int  # of every second block


def stage_grids(img_size: int, patch_size: int, window_size: int) -> list[Grid]:
    """Of the four stages. Raises ValueError where something does not divide."""
    check_divides(img_size, 8 * patch_size, '8 x patch_size =')
    sides = [img_size // patch_size >> stage for stage in range(4)]
    # a window no smaller than the grid is the grid, and is not shifted
    grids = [
        Grid(side, window_size, shift=window_size // 2) if window_size < side else Grid(side, side, shift=0)
        for side in sides
    ]
    check_windows(img_size, sides, [grid.window for grid in grids])
    return grids


def swin_stages(
    windows: Sequence[int],
    embed_dim: int,
    depths: Sequence[int],
    num_heads: Sequence[int],
    mlp_ratio: float,
    *,
    by_column: bool = True,
    drop_path_rate: float = 0.0,
    norm2_eps: float = 1e-6,
) -> nn.ModuleList:
    """Four stages of doubling width, with windows of these sides; drop path grows linearly over all blocks."""
    rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device='cpu').tolist())
    stages = []
    for i, (window, depth, heads) in enumerate(zip(windows, depths, num_heads, strict=True)):
        dim = embed_dim << i
        blocks = [SwinBlock(dim, window, heads, mlp_ratio, next(rates), norm2_eps) for _ in range(depth)]
        stages.append(SwinStage(blocks, PatchMerging(dim, by_column) if i < 3 else None))
    return nn.ModuleList(stages)


def plain_and_shifted(coords: Tensor, slots: Tensor, grid: Grid) -> list[Windows]:
    """Both windows of a stage over tokens at (row, column) [L, 2]; slots [L, 2], of `group_slots` for each."""
    groups = group_shape(len(coords), grid.window)
    return [make_windows(coords, slots[:, i], *groups, grid.window, shift) for i, shift in enumerate((0, grid.shift))]


class GridWindows(nn.Module):
    """`Windows` over a whole grid, as buffers that follow the model and are not saved."""

    def __init__(self, side: int, window: int, shift: int):
        super().__init__()
        windows = grid_windows(side, side, window, shift)
        self.padded = windows.padded
        for name in ('bias_index', 'mask', 'slots'):
            self.register_buffer(name, getattr(windows, name), persistent=False)


def init_swin(network: nn.Module) -> None:
    """Linear weights and bias tables N(0, 0.02), zero bias."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, WindowAttention):
            nn.init.trunc_normal_(module.relative_position_bias_table, std=0.02)


class SwinClassifier(nn.Module):
    """A plain Swin, but its tokens are averaged *before* the last norm; the original norms them first.

    `norm2` has an epsilon of 1e-5, every other norm 1e-6. Raises ValueError for sizes that do not divide.
    """

    def __init__(
        self,
        *,
        img_size: int = 224,
        num_classes: int = 1000,
        drop_path_rate: float = 0.0,
        patch_size: int = 4,
        embed_dim: int = 128,
        depths: Sequence[int] = (2, 2, 18, 2),
        num_heads: Sequence[int] = (4, 8, 16, 32),
        window_size: int = 7,
        mlp_ratio: float = 4.0,
    ):
        super().__init__()
        grids = stage_grids(img_size, patch_size, window_size)
        self.patch_embed = PatchEmbed(img_size, patch_size, 3, embed_dim, norm_layer=norm_layer)
        rates = dict(drop_path_rate=drop_path_rate, norm2_eps=1e-5)
        self.layers = swin_stages([grid.window for grid in grids], embed_dim, depths, num_heads, mlp_ratio, **rates)
        self.windows = nn.ModuleList(
            nn.ModuleList(GridWindows(side, window, s) for s in (0, shift)) for side, window, shift in grids
        )
        self.norm = norm_layer(8 * embed_dim)
        self.head = nn.Linear(8 * embed_dim, num_classes)
        init_swin(self)
        nn.init.trunc_normal_(self.head.weight, std=2e-5)
        sizes = dict(img_size=img_size, patch_size=patch_size, window_size=window_size, mlp_ratio=mlp_ratio)
        as_timm(self, 'swin_tiny_patch4_window7_224', **sizes, embed_dim=embed_dim, depths=depths, num_heads=num_heads)

    def forward_features(self, imgs: Tensor) -> Tensor:
        """imgs [N, 3, H, W] -> tokens [N, L, D] of the last stage, in raster order and not normed."""
        x = self.patch_embed(imgs)
        for layer, windows in zip(self.layers, self.windows, strict=True):
            x = layer(x, windows)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens [N, L, D] -> logits [N, classes], or what the head would be given, [N, D]."""
        x = self.norm(x.mean(dim=1))
        return x if pre_logits else self.head(x)

    def forward(self, imgs: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(imgs))

    def timm_state_dict(self) -> dict[str, Tensor]:
        """The weights under the names of timm's `SwinTransformer`, where merging begins a stage.

        timm norms the tokens before it averages them, and has one epsilon: the features are the same, logits are not.
        """

        def rename(name: str) -> str:
            first, _, rest = name.partition('.')
            if '.downsample.' in name:
                stage, _, rest = rest.partition('.')
                return f'layers.{int(stage) + 1}.{rest}'
            return f'head.fc.{rest}' if first == 'head' else name

        return {rename(name): value for name, value in self.state_dict().items()}


class SwinBackbone(nn.Module):
    """The Swin of detection and segmentation: four maps of any image, under the classifier's names.

    The image is zero-padded to whole patches, each block's map to whole windows *after* its norm and *before* it is
    rolled, and an odd map before its merging. Padding is not masked. Each stage's map has a norm of its own, `norm0` to
    `norm3`, and is taken before the merging. These and `norm2` have an epsilon of 1e-5, every other norm 1e-6.
    """

    def __init__(
        self,
        *,
        drop_path_rate: float = 0.0,
        patch_size: int = 4,
        embed_dim: int = 128,
        depths: Sequence[int] = (2, 2, 18, 2),
        num_heads: Sequence[int] = (4, 8, 16, 32),
        window_size: int = 7,
        mlp_ratio: float = 4.0,
    ):
        super().__init__()
        self.window_size = window_size
        self.strides = [patch_size << stage for stage in range(4)]
        self.widths = [embed_dim << stage for stage in range(4)]
        self.patch_embed = PatchEmbed(
            None, patch_size, 3, embed_dim, norm_layer=norm_layer, output_fmt='NHWC', dynamic_img_pad=True
        )
        rates = dict(drop_path_rate=drop_path_rate, norm2_eps=1e-5)
        self.layers = swin_stages([window_size] * 4, embed_dim, depths, num_heads, mlp_ratio, **rates)
        for stage, width in enumerate(self.widths):
            self.add_module(f'norm{stage}', nn.LayerNorm(width))
        init_swin(self)

    def forward(self, imgs: Tensor) -> list[Tensor]:
        """imgs [N, 3, H, W] -> four maps [N, D, H / s, W / s] of doubling width D and stride s, rounded up."""
        x, maps = self.patch_embed(imgs), []  # [N, h, w, D]
        for layer, norm in zip(self.layers, (self.norm0, self.norm1, self.norm2, self.norm3), strict=True):
            rows, cols = x.shape[1:3]
            windows = [  # made once for all blocks
                padded_windows(rows, cols, self.window_size, shift, x.device) for shift in (0, self.window_size // 2)
            ]
            x = layer.forward_blocks(x.flatten(1, 2), windows).unflatten(1, (rows, cols))
            maps.append(norm(x).permute(0, 3, 1, 2).contiguous())
            if layer.downsample is not None:
                x = layer.downsample.forward_map(x)
        return maps
