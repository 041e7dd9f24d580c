"""MixMAE: mixed and masked autoencoders for hierarchical vision transformers (Liu et al., CVPR 2023; code: MixMIM).

Instead of mask tokens, the hidden cells of an image show another image. One mask over the grid of cells (32 x 32
pixels) serves the whole batch, and image i is mixed with image N-1-i. The encoder is a Swin-like pyramid with large
windows that do not shift; tokens of the two images never attend to each other. Both images are then reconstructed.

    image i      --.                                                 .- i's cells, else mask tokens --> decoder --.
                    mix --> patch_embed --> stages --> decoder_embed                                              loss
    image N-1-i  --'                                                 '- the partner's cells, else     --> decoder --'
                                                                        mask tokens

Shapes: N batch, L cells, R x R tokens of a stage, w window side, W windows of an image, T = w*w tokens of a window,
C width of the first stage, D width of the last, E decoder width, P = 3 * cell * cell pixels of a cell.
Mask: 1 = hidden, that is: this cell comes from the partner image. Each cell of image i is hidden in one of two mixed
images, its own (mask 1) or its partner's (mask 0), and is scored there alone, so that every pixel counts once.

What is released does not mix. The mask is shared, attention between the two images is cut exactly, and all else works
on single tokens or inside a cell, so no number of one image ever meets one of the other. Pairing every image with
itself (`pairing='self'`) gives the same loss and gradients, up to rounding. The objective is: encode the intact image
in two complementary groups of cells that do not see each other, then predict each from the other. The paper's
embeddings that tell the two images apart are not in the released code, nor here.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, PatchEmbed, resample_abs_pos_embed
from timm.models.swin_transformer import PatchMerging, get_relative_position_index
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from util.nn.checks import check_choice, check_divides, check_heads, check_mask_ratio, check_windows
from util.nn.losses import explained
from util.nn.models import LayerNorm, eval_mode, factories, sizes_of
from util.nn.patches import (
    first_panels,
    normalise_patches,
    patch_mask_to_pixels,
    patchify,
    pixel_scales,
    random_plan,
    unpatchify,
)
from util.nn.pos_embed import sincos_2d
from util.nn.pyramid import GeneralizedRCNN, detector_rules, encoder_of
from util.nn.upernet import Segmenter, segmenter_rules, split_options, swin_decays, with_heads


class MixPlan(NamedTuple):
    """Which of the L cells of every image in the batch show the partner instead."""

    mask: Tensor  # [1, L] float32, 1 = hidden


class MixMIMEncoder(nn.Module):
    """The hierarchical encoder: of mixed images under their mask in pretraining, of images (no mask) afterwards.

    `window_size` gives a side per stage, at most the stage's own; the default is the published one at 224 and 384
    pixels, and elsewhere what divides each stage and is nearest to 14. Raises ValueError for sizes that do not divide.
    """

    def __init__(
        self,
        *,
        img_size: int = 224,
        patch_size: int = 4,
        embed_dim: int = 128,
        depths: tuple[int, ...] = (2, 2, 18, 2),
        num_heads: tuple[int, ...] = (4, 8, 16, 32),
        window_size: tuple[int, ...] | None = None,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        stages, blocks = len(depths), sum(depths)
        self.cell_size = patch_size * 2 ** (stages - 1)
        check_divides(img_size, self.cell_size, f'{2 ** (stages - 1)} x patch_size =')
        sides = [img_size // patch_size // 2**s for s in range(stages)]
        dims = [embed_dim * 2**s for s in range(stages)]
        windows = window_size or default_windows(sides)
        if not stages == len(num_heads) == len(windows):
            raise ValueError(f'depths {depths}, num_heads {num_heads}, window_size {window_size}: lengths differ')
        windows = [min(window, side) for window, side in zip(windows, sides, strict=True)]
        check_windows(img_size, sides, windows)
        for dim, heads in zip(dims, num_heads, strict=True):
            check_heads(dim, heads, "a stage's width")
        self.depths, self.num_features, self.num_cells = tuple(depths), dims[-1], sides[-1] ** 2
        self.last_layer = blocks + 1  # where layer decay starts; the published head is one below

        self.patch_embed = PatchEmbed(img_size, patch_size, 3, embed_dim, norm_layer=LayerNorm, output_fmt='NHWC')
        self.register_buffer('absolute_pos_embed', sincos_2d(embed_dim, sides[0], cls_token=False))
        rates = iter([drop_path_rate * i / max(1, blocks - 1) for i in range(blocks)])
        self.layers = nn.ModuleList()
        for s, depth in enumerate(depths):
            drop_path = [next(rates) for _ in range(depth)]
            self.layers.append(Stage(dims[s], num_heads[s], windows[s], mlp_ratio, drop_path, last=s == stages - 1))
        self.norm = LayerNorm(self.num_features)

    def init_weights(self) -> None:
        """Linear xavier-uniform with zero bias, bias tables truncated N(0, 0.02); the patch projection is torch's."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, WindowAttention):
                nn.init.trunc_normal_(module.relative_position_bias_table, std=0.02)

    def forward_features(self, imgs: Tensor, mask: Tensor | None = None) -> Tensor:
        """imgs [N, 3, H, W] -> normed tokens [N, L, D]; under a mask [1, L], cells see those of equal mask only."""
        return self.norm(self.forward_stages(imgs, mask)[-1]).flatten(1, 2)

    def forward_stages(self, imgs: Tensor, mask: Tensor | None = None) -> list[Tensor]:
        """imgs [N, 3, H, W] -> each stage's tokens [N, rows, columns, .] before its merging."""
        x, stages = self.patch_embed(imgs), []  # [N, R, R, C]
        table = resample_abs_pos_embed(self.absolute_pos_embed, x.shape[1:3], num_prefix_tokens=0, antialias=False)
        x = x + table.view(1, *x.shape[1:])
        for stage in self.layers:
            window_mask = None if mask is None else separating_mask(mask, x.shape[1], stage.window_size)
            for block in stage.blocks:
                x = block(x, window_mask)
            stages.append(x)
            x = stage.downsample(x)
        return stages


class MixMAE(MixMIMEncoder):
    """Mixed and masked autoencoder (paper section 3; `models_mixmim.MixMIM` in the published code).

    Of the L cells, int(L * ratio) are hidden; with `range_mask_ratio` > 0 the ratio is drawn for each batch from
    [mask_ratio, mask_ratio + range_mask_ratio). `pairing` says what the partner of image i is: image N-1-i (`'flip'`,
    the published one) or image i itself (`'self'`, which mixes nothing). Further keyword arguments are
    `MixMIMEncoder`'s. Raises ValueError for a ratio that hides nothing or everything, and another `pairing`.
    """

    mask_scope = 'batch'

    def __init__(
        self,
        *,
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        mlp_ratio: float = 4.0,
        norm_pix_loss: bool = True,
        mask_ratio: float = 0.5,
        range_mask_ratio: float = 0.0,
        pairing: str = 'flip',
        **encoder,
    ):
        check_choice('pairing', pairing, ('flip', 'self'))
        super().__init__(mlp_ratio=mlp_ratio, **encoder)
        check_heads(decoder_dim, decoder_num_heads, 'decoder_dim')
        if range_mask_ratio < 0:
            raise ValueError(f'range_mask_ratio {range_mask_ratio} is negative')
        smaller = f'patch_size={encoder.get("patch_size", 4) // 2}'
        for ratio in (mask_ratio, mask_ratio + range_mask_ratio):
            num_hidden, what = int(self.num_cells * ratio), f'cells of {self.cell_size} pixels a side'
            check_mask_ratio(ratio, num_hidden, self.num_cells, what, smaller)
        self.norm_pix_loss, self.mask_ratio, self.range_mask_ratio = norm_pix_loss, mask_ratio, range_mask_ratio
        self.pairing = pairing

        self.decoder_embed = nn.Linear(self.num_features, decoder_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
        grid_size = round(self.num_cells**0.5)
        self.register_buffer('decoder_pos_embed', sincos_2d(decoder_dim, grid_size, cls_token=False))
        self.decoder_blocks = nn.ModuleList(
            Block(decoder_dim, decoder_num_heads, mlp_ratio, qkv_bias=True, norm_layer=LayerNorm)
            for _ in range(decoder_depth)
        )
        self.decoder_norm = LayerNorm(decoder_dim)
        self.decoder_pred = nn.Linear(decoder_dim, 3 * self.cell_size**2)
        self.init_weights()
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    # --------------------------------------------------------------------------
    # masking

    def noise_shape(self, n: int) -> tuple[int, int]:
        """[1, L] for any n: one number per cell, and with `range_mask_ratio` a last one for the ratio, [1, L + 1]."""
        return 1, self.num_cells + (self.range_mask_ratio > 0)

    def plan_from_noise(self, noise: Tensor) -> MixPlan:
        """U[0, 1) CPU noise [1, L] or [1, L + 1] -> MixPlan; the int(L * ratio) cells of the smallest are hidden."""
        noise = noise.flatten()
        drawn = float(noise[-1]) if self.range_mask_ratio > 0 else 0.0
        num_hidden = int(self.num_cells * (self.mask_ratio + drawn * self.range_mask_ratio))
        hidden = noise[: self.num_cells].argsort(stable=True)[:num_hidden]
        return MixPlan(torch.zeros(1, self.num_cells).index_fill(1, hidden, 1.0))

    # --------------------------------------------------------------------------
    # mixing, decoder, loss

    def partners(self, x: Tensor) -> Tensor:
        """Of each image in x [N, ...] its partner's: image N-1-i's, or with `pairing='self'` its own."""
        return x.flip(0) if self.pairing == 'flip' else x

    def mix(self, imgs: Tensor, mask: Tensor) -> Tensor:
        """Image i with its partner's cells in place of its hidden ones; the middle one of an odd N stays whole."""
        return torch.where(patch_mask_to_pixels(mask, self.cell_size).bool(), self.partners(imgs), imgs)

    def forward_decoder(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Features [N, L, D] of mixed images -> un-mixed and decoded: image i's and its partner's, [N, L, E] each."""
        x = self.decoder_embed(x)
        hidden, mask_token = mask.bool().unsqueeze(-1), self.mask_token.to(x.dtype)
        own, partner = torch.where(hidden, mask_token, x), torch.where(hidden, x, mask_token)
        x = torch.cat([own, partner]) + self.decoder_pos_embed  # [2N, L, E]
        for block in self.decoder_blocks:
            x = block(x)
        return x.chunk(2)

    def assemble(self, own: Tensor, partner: Tensor, mask: Tensor) -> Tensor:
        """What two passes decoded, [N, L, E] each -> of each image all cells, each from the pass that had it hidden."""
        return torch.where(mask.bool().unsqueeze(-1), own, self.partners(partner))

    def forward_pred(self, x: Tensor) -> Tensor:
        """Decoded cells [N, L, E] -> their pixels [N, L, P]."""
        return self.decoder_pred(self.decoder_norm(x))

    def target(self, imgs: Tensor) -> Tensor:
        """Cells' pixels [N, L, P] in (row, column, channel) order, normalised per cell if `norm_pix_loss`."""
        target = patchify(imgs.float(), self.cell_size)
        return normalise_patches(target) if self.norm_pix_loss else target

    def forward_loss(self, imgs: Tensor, pred: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean squared error over all cells; and that of those hidden in the own, and in the partner's mixed image."""
        with torch.autocast(imgs.device.type, enabled=False):
            target = self.target(imgs)
            errors = (pred.float() - target).square().mean(dim=-1)  # [N, L]
            loss = errors.mean()
            per_cell = errors.detach().mean(dim=0, keepdim=True)
            terms = {
                'own_loss': (per_cell * mask).sum() / mask.sum(),
                'partner_loss': (per_cell * (1 - mask)).sum() / (1 - mask).sum(),
                'explained': explained(loss, target),
            }
            return loss, terms

    def forward(self, imgs: Tensor, plan: MixPlan | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """imgs [N, 3, H, W], normalised -> scalar loss, its two parts, and `explained`."""
        plan = plan or random_plan(self, imgs)
        x = self.forward_features(self.mix(imgs, plan.mask), plan.mask)  # [N, L, D]
        own, partner = self.forward_decoder(x, plan.mask)
        pred = self.forward_pred(self.assemble(own, partner, plan.mask))  # half of what was decoded: what is scored
        return self.forward_loss(imgs, pred, plan.mask)

    # --------------------------------------------------------------------------
    # pictures, export

    @torch.no_grad()
    def reconstruct(self, imgs: Tensor, plan: MixPlan) -> dict[str, Tensor]:
        """Panels [N, 3, H, W] in the input's normalised space: `first_panels` of the image and of its partner.

        A composite is the image un-mixed. `mixed` is what the network saw: what is hidden of one image shows the other.
        Predictions are normalised per cell; see `pixel_scales` for how they become pixels.
        """
        mixed = self.mix(imgs, plan.mask)
        with eval_mode(self):
            decoded = self.forward_decoder(self.forward_features(mixed, plan.mask), plan.mask)
            preds = [self.forward_pred(x).float() for x in decoded]

        images = []
        for original, pred, mask in zip((imgs, self.partners(imgs)), preds, (plan.mask, 1 - plan.mask), strict=True):
            scales = pixel_scales(original, mask, self.cell_size, self.norm_pix_loss)
            pictures = {kind: unpatchify(pred * std + mean, self.cell_size) for kind, (mean, std) in scales.items()}
            images.append(first_panels(original, patch_mask_to_pixels(mask, self.cell_size), pictures))
        own, others = images
        partner = {f'{name} of partner': panel for name, panel in others.items() if name.startswith('composite')}
        return {**own, 'mixed': mixed, 'partner': others['original'], **partner}

    def encoder_state_dict(self) -> dict[str, Tensor]:
        """The encoder under the classifier's names, which are its own."""
        return {k: v for k, v in self.state_dict().items() if k.split('.')[0] in ENCODER_NAMES}


ENCODER_NAMES = ('patch_embed', 'absolute_pos_embed', 'layers', 'norm')


# --------------------------------------------------------------------------
# parts of the encoder


def default_windows(sides: list[int]) -> list[int]:
    """The published windows, or per stage the divisor nearest to 14: 14, 14, 14, 7 at 224 pixels."""
    if sides == [96, 48, 24, 12]:  # 384 pixels
        return [16, 16, 24, 12]
    divisors = ([d for d in range(1, side + 1) if side % d == 0] for side in sides)
    return [min(ds, key=lambda d: abs(math.log(d / 14))) for ds in divisors]


def separating_mask(mask: Tensor, side: int, window_size: int) -> Tensor:
    """Cells' mask [1, L] -> [W, T, T] for a stage of side x side tokens: 0 between equals, -inf between others."""
    windows, cell = side // window_size, side // round(mask.shape[1] ** 0.5)
    tokens = patch_mask_to_pixels(mask, cell).view(windows, window_size, windows, window_size)
    tokens = tokens.transpose(1, 2).reshape(windows**2, window_size**2)
    differs = tokens.unsqueeze(1) != tokens.unsqueeze(2)
    return torch.zeros_like(differs, dtype=torch.float32).masked_fill(differs, -torch.inf)


class Stage(nn.Module):
    """Blocks at one resolution, then 2 x 2 tokens merged into one of twice the width (not after the last stage)."""

    def __init__(
        self, dim: int, num_heads: int, window_size: int, mlp_ratio: float, drop_path: list[float], last: bool
    ):
        super().__init__()
        self.window_size = window_size
        self.blocks = nn.ModuleList(WindowBlock(dim, num_heads, window_size, mlp_ratio, rate) for rate in drop_path)
        self.downsample = nn.Identity() if last else PatchMerging(dim, norm_layer=LayerNorm)


class WindowBlock(nn.Module):
    """Pre-norm block: attention inside windows, MLP."""

    def __init__(self, dim: int, num_heads: int, window_size: int, mlp_ratio: float, drop_path: float):
        super().__init__()
        self.norm1 = LayerNorm(dim)
        self.attn = WindowAttention(dim, num_heads, window_size)
        self.norm2 = LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), mask))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class WindowAttention(nn.Module):
    """Multi-head attention inside windows of w x w tokens, with Swin's relative position bias."""

    def __init__(self, dim: int, num_heads: int, window_size: int):
        super().__init__()
        self.num_heads, self.window_size = num_heads, window_size
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window_size - 1) ** 2, num_heads))
        index = get_relative_position_index(window_size, window_size)  # [T, T]: each pair's row in the table
        self.register_buffer('relative_position_index', index.flatten(), persistent=False)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def relative_position_bias(self) -> Tensor:
        """[heads, T, T]: what is added to the logit of token i's query and token j's key."""
        size = self.window_size**2
        return self.relative_position_bias_table.t().index_select(1, self.relative_position_index).view(-1, size, size)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x [N, rows, columns, D] -> the same; mask [W, T, T] is added to the logits of an image's windows (0 or -inf).

        A map that windows do not divide is zero-padded below and on the right; padding is not masked.
        """
        n, rows, cols, dim = x.shape
        heads, w = self.num_heads, self.window_size
        if rows % w or cols % w:
            x = F.pad(x, (0, 0, 0, -cols % w, 0, -rows % w))
        high, wide = x.shape[1] // w, x.shape[2] // w  # in windows
        bias = self.relative_position_bias()
        if mask is not None:
            bias = (bias + mask.unsqueeze(1)).flatten(0, 1)  # [W * heads, T, T]: it broadcasts over the batch
        # unbound before they are permuted, so that their gradients are put together where they belong
        qkv = self.qkv(x).view(n, high, w, wide, w, 3, heads, -1).unbind(5)
        # [N, W * heads, T, D / heads] under a mask, else [N * W, heads, T, D / heads]
        q, k, v = (x.permute(0, 1, 3, 5, 2, 4, 6).reshape(-1, bias.shape[0], w * w, dim // heads) for x in qkv)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype).unsqueeze(0))
        x = x.reshape(n, high, wide, heads, w, w, -1).permute(0, 1, 4, 2, 5, 3, 6)
        return self.proj(x.reshape(n, high * w, wide * w, dim)[:, :rows, :cols])


# --------------------------------------------------------------------------
# classifier, dense tasks, sizes


class MixMIMClassifier(MixMIMEncoder):
    """What a MixMAE is fine-tuned as: the encoder without masks, the mean of its normed tokens, a linear head.

    Further keyword arguments are `MixMIMEncoder`'s.
    """

    def __init__(self, *, num_classes: int = 1000, **encoder):
        super().__init__(**encoder)
        self.head = nn.Linear(self.num_features, num_classes)
        self.init_weights()

    def forward(self, imgs: Tensor) -> Tensor:
        """imgs [N, 3, H, W], normalised -> logits [N, classes]."""
        return self.head(self.forward_features(imgs).mean(dim=1))


def create_classifier(
    name: str, num_classes: int = 1000, drop_path_rate: float = 0.0, img_size: int = 224, **kwargs
) -> MixMIMClassifier:
    """The classifier of a pretraining model's size; its windows follow `img_size` unless given.

    The head, as in the published fine-tuning, starts close to zero. Raises ValueError for sizes that do not divide.
    """
    if kwargs.pop('global_pool', 'avg') != 'avg':
        raise ValueError(f'{name} has no class token to classify')
    sizes = dict(img_size=img_size, num_classes=num_classes, drop_path_rate=drop_path_rate)
    model = MixMIMClassifier(**{**sizes_of(ENCODERS, name), **sizes, **kwargs})
    nn.init.trunc_normal_(model.head.weight, std=2e-5)
    return model


class MixMIMBackbone(MixMIMEncoder):
    """The encoder of dense tasks, of any image: each stage's map before its merging, normed by a new norm.

    `img_size` is that of pretraining, which windows and positions are made for. Windows pad other maps, positions are
    stretched bicubically to the image's grid; image and merging are zero-padded where they must be.
    """

    def __init__(self, **encoder):
        super().__init__(**encoder)
        self.patch_embed.strict_img_size, self.patch_embed.dynamic_img_pad = False, True
        del self.norm  # it belongs to the classifier
        stages = range(len(self.depths))
        self.strides = [self.cell_size >> stage for stage in reversed(stages)]
        self.widths = [self.num_features >> stage for stage in reversed(stages)]
        for stage, width in enumerate(self.widths):
            self.add_module(f'norm{stage}', nn.LayerNorm(width))
        self.init_weights()

    def forward(self, imgs: Tensor) -> list[Tensor]:
        """imgs [N, 3, H, W], normalised -> a stage's map [N, D, H / s, W / s] of width D and stride s, rounded up."""
        stages = enumerate(self.forward_stages(imgs))
        return [getattr(self, f'norm{i}')(x).permute(0, 3, 1, 2).contiguous() for i, x in stages]


def create_backbone(name: str, drop_path_rate: float = 0.0, img_size: int = 224, **kwargs) -> MixMIMBackbone:
    """The classifier without its head, as an encoder of any image; its windows follow `img_size` unless given."""
    sizes = dict(img_size=img_size, drop_path_rate=drop_path_rate)
    return MixMIMBackbone(**{**sizes_of(ENCODERS, name), **sizes, **kwargs})


def create_segmenter(
    name: str, num_classes: int = 150, drop_path_rate: float = 0.0, img_size: int = 512, **kwargs
) -> Segmenter:
    """UPerNet on the encoder, as on a Swin; keywords are `MixMIMEncoder`'s and `with_heads`'.

    The paper's settings are not published. Raises ValueError for sizes that do not divide.
    """
    heads, sizes = split_options(kwargs)
    encoder = create_backbone(name, drop_path_rate, img_size, **sizes)
    return with_heads(encoder, num_classes, fixed_size=img_size, **heads)


ENCODERS = {  # of a pretraining model and of its classifier
    # for quick trials, not in the paper: cells of 8 pixels, so 16 of them at 32 x 32; any multiple of 32 will do
    'mixmae_tiny': dict(patch_size=2, embed_dim=32, depths=(1, 2, 1), num_heads=(2, 4, 8), window_size=(8, 8, 4)),
    'mixmae_base': dict(embed_dim=128, num_heads=(4, 8, 16, 32)),
    'mixmae_large': dict(embed_dim=192, num_heads=(6, 12, 24, 48)),
    'mixmae_huge': dict(embed_dim=352, num_heads=(11, 22, 44, 88)),
}
PRETRAINING = {  # what else differs from MixMAE's defaults
    'mixmae_tiny': dict(decoder_dim=64, decoder_depth=1, decoder_num_heads=4),
}

__all__ = [*ENCODERS]
globals().update(factories(MixMAE, ENCODERS, PRETRAINING))

# --------------------------------------------------------------------------
# optimiser rules


def param_rules(
    model: MixMIMEncoder | Segmenter | GeneralizedRCNN, *, head_layer: str = 'published'
) -> dict[str, tuple[int, float, bool]]:
    """{name: (layer_id, lr_scale, decays)} for every trainable parameter, as the published optimiser groups them.

    Layer ids: 0 = patch embedding; i + 1 = block i; a patch merging has that of the block after it. The rest, the head
    included, has the last block's id, one below the top (`model.last_layer`), and so learns at layer_decay times the
    rate; `head_layer='own'` puts the head at the top, at the full rate. 1-D parameters are not decayed; mask token and
    bias tables are. The heads of a segmenter or a detector and the norms of its maps are at the top, and it decays as
    a Swin does. Raises ValueError for another `head_layer`.
    """
    check_choice('head_layer', head_layer, ('published', 'own'))
    dense, encoder = isinstance(model, Segmenter | GeneralizedRCNN), encoder_of(model)

    def layer_id(name: str) -> int:
        match name.split('.'):
            case ['patch_embed', *_]:
                return 0
            case ['layers', stage, 'blocks', block, *_]:
                return sum(encoder.depths[: int(stage)]) + int(block) + 1
            case ['layers', stage, 'downsample', *_]:
                return sum(encoder.depths[: int(stage) + 1]) + 1
            case ['head', _] if head_layer == 'own':
                return encoder.last_layer
        return encoder.last_layer if dense else encoder.last_layer - 1

    if dense:
        rules = segmenter_rules if isinstance(model, Segmenter) else detector_rules
        return rules(model, layer_id, encoder.last_layer, swin_decays)
    return {
        name: (layer_id(name), 1.0, param.ndim > 1) for name, param in model.named_parameters() if param.requires_grad
    }
