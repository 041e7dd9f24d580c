"""What MAE-style ViTs share: the networks that they are fine-tuned as."""

from collections.abc import Sequence

from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from util.nn.checks import check_divides, check_heads
from util.nn.models import as_timm, norm_layer
from util.nn.pyramid import Indices, as_maps
from util.nn.windowed import WindowedViT


def vit_classifier(*, img_size: int, patch_size: int = 16, **options) -> VisionTransformer:
    """timm's ViT as MAE fine-tunes it: by default with `global_pool='avg'`, and with a head that starts close to zero.

    Raises ValueError for a size that does not divide.
    """
    check_divides(img_size, patch_size, 'patch_size')
    fixed = dict(global_pool='avg', norm_layer=norm_layer, weight_init='jax')
    options = dict(img_size=img_size, patch_size=patch_size) | fixed | options
    model = VisionTransformer(**options)
    nn.init.trunc_normal_(model.head.weight, std=2e-5)
    return as_timm(model, 'vit_base_patch16_224', **options)


def quarters(depth: int) -> list[int]:
    """The blocks whose maps a segmenter takes: BEiT's choice at depths 12 and 24, elsewhere the ends of quarters.

    Raises ValueError for fewer than four blocks.
    """
    if depth < 4:
        raise ValueError(f'depth {depth} is below 4: a segmenter takes the maps of four blocks')
    known = {12: [3, 5, 7, 11], 24: [7, 11, 15, 23]}
    return known.get(depth) or [round(depth * k / 4) - 1 for k in range(1, 5)]


def vit_backbone(
    *,
    img_size: int,
    embed_dim: int,
    depth: int,
    num_heads: int,
    patch_size: int = 16,
    out_indices: Indices | None = None,
    rel_pos_bias: bool = False,
    init_values: float | None = None,
    abs_pos_embed: bool = True,
    **options,
) -> Beit | VisionTransformer:
    """timm's ViT, without head and last norm, as an encoder that gives the map of each block of `out_indices`.

    By default that is the last block. With `rel_pos_bias` (a table per block, which starts at zero), LayerScale of
    `init_values` or without absolute positions it is BEiT's ViT, which has biases for q and v only; one for k would
    change nothing. Without absolute positions the tables start from N(0, 0.02). Raises ValueError for sizes that do
    not divide.
    """
    check_divides(img_size, patch_size, 'patch_size')
    check_heads(embed_dim, num_heads)
    options |= dict(img_size=img_size, patch_size=patch_size, embed_dim=embed_dim, depth=depth, num_heads=num_heads)
    options |= dict(num_classes=0, norm_layer=norm_layer)
    if rel_pos_bias or init_values or not abs_pos_embed:
        options |= dict(use_rel_pos_bias=rel_pos_bias, init_values=init_values, use_abs_pos_emb=abs_pos_embed)
        network = Beit(**options)
        for block in network.blocks if rel_pos_bias and not abs_pos_embed else ():
            nn.init.normal_(block.attn.relative_position_bias_table, std=0.02)
    else:
        network = VisionTransformer(**options)
    network.fixed_size = img_size
    return as_maps(network, [depth - 1] if out_indices is None else out_indices)


# how a segmenter's ViT differs from a classifier's
SEGMENTER_VIT = dict(out_indices=quarters, rel_pos_bias=True, init_values=1.0)


def windowed_vit(
    *,
    window_size: int = 14,
    global_blocks: Sequence[int] | None = None,
    rel_pos: bool = True,
    rel_pos_size: int = 1024,
    **options,
) -> WindowedViT:
    """`vit_backbone` of these options as ViTDet's encoder; `rel_pos_size` is `WindowedViT`'s img_size."""
    return WindowedViT(vit_backbone(**options), window_size, global_blocks, rel_pos, rel_pos_size)
