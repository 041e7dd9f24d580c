"""LocalMIM: masked image modeling with local multi-scale reconstruction (Wang et al., CVPR 2023).

Four layers of the encoder, shallow to deep, have a small decoder each, which rebuilds the hidden part of the image at
that layer's scale: fine targets for shallow layers, coarse ones for deep layers. The loss is their plain sum.

    visible tokens --stage 0--> --stage 1--> --stage 2--> --stage 3-->
                           |            |            |            |
                        norm_0       norm_1       norm_2       norm_3
                           |            |            |            |
                       decoder 0    decoder 1    decoder 2    decoder 3      (with mask tokens)
                           |            |            |            |
                        finest        fine        coarse      coarsest       HOG or pixels

    prediction grids at 224:   ViT 56, 28, 14, 7: convolutions on decoders' 14 x 14; Swin 28, 14, 7, 7, its stages' own

Shapes: N batch, L places of a grid, K visible patches (ViT) or mask units of 8 x 8 patches (Swin), V visible tokens, D
encoder width, E decoder width, p patch side. Mask: 1 = hidden.

This follows the published code, since the released weights fit only it. Its ViT has no pixel target; ours has the
Swin's. Its Swin has two slips, which `coords` of `LocalMIMSwin` keeps or mends.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d, PatchEmbed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from util.nn.checks import check_choice, check_divides, check_heads, check_mask_ratio
from util.nn.hog import draw_hog, hog
from util.nn.losses import explained
from util.nn.models import eval_mode, factories, sizes_of
from util.nn.patches import (
    MaskPlan,
    first_panels,
    gather_tokens,
    left_out,
    mask_plan,
    normalise_patches,
    patch_mask_to_pixels,
    patchify,
    pixel_scales,
    random_plan,
    unpatchify,
)
from util.nn.pos_embed import sincos_2d
from util.nn.pyramid import GeneralizedRCNN, detector_rules, encoder_of
from util.nn.swin import (
    SwinBackbone,
    SwinClassifier,
    Windows,
    group_slots,
    plain_and_shifted,
    stage_grids,
    swin_stages,
    unit_major,
)
from util.nn.upernet import Segmenter, segmenter_rules, split_options, swin_decays, with_heads
from util.nn.vit import SEGMENTER_VIT, norm_layer, quarters, vit_backbone, vit_classifier, windowed_vit
from util.nn.windowed import WindowedViT


class SwinPlan(NamedTuple):
    """The one mask of a batch: K of U units are visible, and so V_i tokens in stage i, unit after unit."""

    ids_keep: Tensor  # [1, K] int64, visible units, ascending
    mask: Tensor  # [1, U] float32, 1 = hidden
    places: Tensor  # [1, V_1 + V_2 + V_3] int64, raster places of the visible tokens in the grids of stages 1, 2, 3
    coords: Tensor  # [V_0 + V_1 + V_2 + V_3, 2] int64, (row, column) of the visible tokens as windows see it
    slots: Tensor  # [V_0 + V_1 + V_2 + V_3, 2] int64, their slots in the groups of the plain and the shifted windows


Plan = MaskPlan | SwinPlan


class LocalMIM(nn.Module):
    """What both backbones share: the step, targets, loss, pictures. What a backbone adds is listed below `__init__`.

    `target='hog'`: histograms of oriented gradients in cells of `cells` pixels, `hog_bins` per colour. With `hog_bias`
    a random constant is added to the gradients of each scale; it is never trained and is saved with the weights.
    `target='pixel'`: patches of `cells` pixels, normalised one by one if `norm_pix_loss`.
    """

    def __init__(self, *, cells: Sequence[int], target: str, hog_bins: int, hog_bias: bool, norm_pix_loss: bool):
        super().__init__()
        check_choice('target', target, ('hog', 'pixel'))
        if hog_bins < 1:
            raise ValueError(f'hog_bins {hog_bins} must be at least 1')
        self.cells, self.target, self.hog_bins, self.norm_pix_loss = tuple(cells), target, hog_bins, norm_pix_loss
        self.num_outputs = [3 * (hog_bins if target == 'hog' else cell**2) for cell in cells]
        if target == 'hog' and hog_bias:  # what a 3 x 3 convolution's bias starts from
            biases = [nn.Parameter(torch.empty(2).uniform_(-1 / 3, 1 / 3), requires_grad=False) for _ in cells]
            self.hog_bias = nn.ParameterList(biases)
        else:
            self.hog_bias = None

    def init_weights(self) -> None:
        """Linear and patch projection xavier-uniform, tokens and bias tables N(0, 0.02), LayerNorm 1 and 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        projection = self.patch_embed.proj.weight
        nn.init.xavier_uniform_(projection.view(len(projection), -1))
        for name, param in self.named_parameters():
            if name.endswith('_token'):
                nn.init.normal_(param, std=0.02)
            elif name.endswith('relative_position_bias_table'):
                nn.init.trunc_normal_(param, std=0.02)

    # --------------------------------------------------------------------------
    # what a backbone adds

    mask_scope: str  # 'sample' or 'batch': what a mask is drawn for
    mask_size: int  # side, in pixels, of what one number of the mask hides
    patch_embed: PatchEmbed
    decoders: nn.ModuleList  # four `LocalDecoder`s, finest first

    def noise_shape(self, n: int) -> tuple[int, int]:
        """Shape of the noise that decides the masks of n samples."""
        raise NotImplementedError

    def plan_from_noise(self, noise: Tensor) -> Plan:
        """U[0, 1) CPU noise of that shape -> what is visible."""
        raise NotImplementedError

    def visible_places(self, plan: Plan) -> list[Tensor]:
        """Raster places [N or 1, V_k] of the visible tokens that each decoder is given."""
        raise NotImplementedError

    def forward_encoder(self, imgs: Tensor, plan: Plan) -> list[Tensor]:
        """Four normed latents [N, C + V_k, D_k], shallow to deep, with C class tokens."""
        raise NotImplementedError

    # --------------------------------------------------------------------------
    # decoders, loss

    def forward(self, imgs: Tensor, plan: Plan | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """imgs [N, 3, H, W], normalised -> scalar loss; `local_loss` and `explained` of each scale, 0 the finest."""
        plan = plan or random_plan(self, imgs)
        latents = self.forward_encoder(imgs, plan)
        preds = self.forward_decoders(latents, plan)
        return self.forward_loss(imgs, preds, plan)

    def forward_decoders(self, latents: list[Tensor], plan: Plan) -> list[Tensor]:
        """Four predictions [N, L_k, P_k] in raster order, finest first."""
        stages = zip(self.decoders, latents, self.visible_places(plan), strict=True)
        return [decoder(latent, places) for decoder, latent, places in stages]

    @torch.no_grad()
    def forward_targets(self, imgs: Tensor) -> list[Tensor]:
        """Four targets [N, L_k, P_k] in raster order, finest first, for all places."""
        if self.target == 'hog':
            return hog(imgs, self.cells, self.hog_bins, self.hog_bias)
        targets = [patchify(imgs, cell) for cell in self.cells]
        return [normalise_patches(target) for target in targets] if self.norm_pix_loss else targets

    def loss_weights(self, mask: Tensor, length: int) -> Tensor:
        """Mask [N, L] -> the hidden share of each of `length` places, [N, length]."""
        side, mask_side = round(length**0.5), round(mask.shape[1] ** 0.5)
        # repeats where `length` is finer; averages where it is coarser, to 0, 1/4, 1/2, 3/4 or 1
        return F.adaptive_avg_pool2d(mask.unflatten(1, (1, mask_side, mask_side)), side).flatten(1)

    def forward_loss(self, imgs: Tensor, preds: list[Tensor], plan: Plan) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum over scales of the squared error, averaged by hidden share over batch and places. In float32."""
        losses, shares = [], []
        with torch.autocast(imgs.device.type, enabled=False):
            for pred, target in zip(preds, self.forward_targets(imgs.float()), strict=True):
                error = (pred.float() - target).square().mean(dim=-1)  # [N, L_k]
                weight = self.loss_weights(plan.mask, error.shape[1]).expand_as(error)
                losses.append((error * weight).sum() / weight.sum())
                shares.append(explained(losses[-1], target, weight.unsqueeze(-1)))
            loss = torch.stack(losses).sum()
        terms = {f'local_loss{k}': term.detach() for k, term in enumerate(losses)}
        return loss, terms | {f'explained{k}': share for k, share in enumerate(shares)}

    # --------------------------------------------------------------------------
    # pictures, export

    @torch.no_grad()
    def reconstruct(self, imgs: Tensor, plan: Plan) -> dict[str, Tensor]:
        """Panels [N, 3, H, W] in the input's normalised space: `first_panels` and each scale's, 0 the finest.

        The composite has the deepest scale whose cells are hidden whole. In finer ones, normalisation takes more of the
        image away. What is wholly visible is left out of predictions, since nothing is trained there.
        """
        with eval_mode(self):
            preds = self.forward_decoders(self.forward_encoder(imgs, plan), plan)
        scales = zip(preds, self.forward_targets(imgs), self.cells, strict=True)
        scales = [self.draw(imgs, pred.float(), target, plan.mask, cell) for pred, target, cell in scales]
        shown = max(k for k, cell in enumerate(self.cells) if cell <= self.mask_size)
        panels = first_panels(imgs, patch_mask_to_pixels(plan.mask, self.mask_size), scales[shown])
        for k, (pictures, pred, cell) in enumerate(zip(scales, preds, self.cells, strict=True)):
            hidden = patch_mask_to_pixels(self.loss_weights(plan.mask, pred.shape[1]), cell)
            panels |= {f'scale {k}{kind}': left_out(picture, hidden) for kind, picture in pictures.items()}
        return panels

    def draw(self, imgs: Tensor, pred: Tensor, target: Tensor, mask: Tensor, cell: int) -> dict[str, Tensor]:
        """One scale's prediction [N, L_k, P_k] as a picture, and what to compare it with: {name's end: [N, 3, H, W]}.

        HOG is drawn as strokes along the edges, from the images' darkest to their brightest value, and followed by the
        target. Pixels that were normalised per patch: see `pixel_scales`.
        """
        if self.target == 'hog':
            dark, bright = imgs.amin((0, 2, 3), keepdim=True), imgs.amax((0, 2, 3), keepdim=True)
            hidden = self.loss_weights(mask, pred.shape[1]).unsqueeze(-1) > 0  # strokes reach beyond their cells
            hists = {'': pred * hidden, ' (true edges)': target * hidden}
            return {kind: dark + (bright - dark) * draw_hog(h, self.hog_bins, cell) for kind, h in hists.items()}
        stats = pixel_scales(imgs, mask, cell, self.norm_pix_loss)
        return {kind: unpatchify(pred * std + mean, cell) for kind, (mean, std) in stats.items()}

    def encoder_state_dict(self) -> dict[str, Tensor]:
        """The encoder under the classifier's names."""
        return {k: v for k, v in self.state_dict().items() if k.split('.')[0] in ENCODER_NAMES}


ENCODER_NAMES = ('patch_embed', 'cls_token', 'pos_embed', 'blocks', 'layers')  # of a ViT, and of a Swin


class LocalMIMViT(LocalMIM):
    """LocalMIM with a ViT (published `MaskedAutoencoderViT`): per-sample masks of patches, a class token.

    Decoders read blocks 1, 3, depth - 3 and depth - 1, and work on the patch grid; their heads predict at 4, 2, 1 and
    1/2 times its side. Raises ValueError for sizes that do not divide, a depth below 7, and a mask ratio that hides
    nothing or everything.
    """

    mask_scope = 'sample'

    def __init__(
        self,
        *,
        img_size: int = 224,
        patch_size: int = 16,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        decoder_dim: int = 256,
        decoder_depth: int = 1,
        decoder_num_heads: int = 8,
        target: str = 'hog',
        hog_bins: int = 9,
        hog_bias: bool = False,
        norm_pix_loss: bool = True,
        mask_ratio: float = 0.75,
    ):
        if patch_size % 4:
            raise ValueError(f'patch_size {patch_size} is not a multiple of 4, so its finest cells are not whole')
        check_divides(img_size, 2 * patch_size, '2 x patch_size =')
        check_heads(embed_dim, num_heads)
        check_heads(decoder_dim, decoder_num_heads, 'decoder_dim')
        if depth < 7:
            raise ValueError(f'depth {depth} is below 7: blocks 1, 3, depth - 3, depth - 1 must be four')
        cells = [patch_size // 4, patch_size // 2, patch_size, 2 * patch_size]
        super().__init__(cells=cells, target=target, hog_bins=hog_bins, hog_bias=hog_bias, norm_pix_loss=norm_pix_loss)
        grid_size = img_size // patch_size
        self.mask_size = patch_size
        self.num_patches = grid_size**2
        self.num_keep = int(self.num_patches * (1 - mask_ratio))
        check_mask_ratio(mask_ratio, self.num_patches - self.num_keep, self.num_patches)
        self.local_layers = (1, 3, depth - 3, depth - 1)

        # encoder
        self.patch_embed = PatchEmbed(img_size, patch_size, 3, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.register_buffer('pos_embed', sincos_2d(embed_dim, grid_size))
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, qkv_bias=True, norm_layer=norm_layer) for _ in range(depth)
        )
        self.norms = nn.ModuleList(norm_layer(embed_dim) for _ in self.local_layers)

        # decoders, one per local layer
        pos_embed = sincos_2d(decoder_dim, grid_size)
        self.decoders = nn.ModuleList(
            LocalDecoder(embed_dim, decoder_dim, decoder_depth, decoder_num_heads, mlp_ratio, pos_embed, pred)
            for pred in conv_heads(decoder_dim, self.num_outputs)
        )
        self.init_weights()

    def noise_shape(self, n: int) -> tuple[int, int]:
        """[n, L]: one number per patch of each sample."""
        return n, self.num_patches

    def plan_from_noise(self, noise: Tensor) -> MaskPlan:
        """U[0, 1) CPU noise [n, L] -> MaskPlan; the K = int(L * (1 - mask_ratio)) smallest of a row stay visible."""
        return mask_plan(noise, self.num_keep)

    def visible_places(self, plan: MaskPlan) -> list[Tensor]:
        return [plan.ids_keep] * len(self.decoders)

    def forward_encoder(self, imgs: Tensor, plan: MaskPlan) -> list[Tensor]:
        """Four normed latents [N, 1 + K, D], shallow to deep."""
        x = self.patch_embed(imgs) + self.pos_embed[:, 1:]  # [N, L, D]
        x = gather_tokens(x, plan.ids_keep)  # [N, K, D]
        cls_token = self.cls_token + self.pos_embed[:, :1]
        x = torch.cat([cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        latents = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in self.local_layers:  # the stream itself goes on without the norm
                latents.append(self.norms[len(latents)](x))
        return latents


class LocalMIMSwin(LocalMIM):
    """LocalMIM with a Swin (published `MaskedAutoencoderSwin`) over the visible tokens alone; one mask for a batch.

    A mask unit is 8 x 8 patches, one token of the last stage; int(mask_ratio * U) + 1 of U units are hidden. Decoders
    read all four stages, after their merging, and predict on those grids.

    `coords='published'` keeps two slips that the published weights were trained with. After the first merging, tokens
    are windowed as if they lay elsewhere: they are counted unit by unit, their coordinates row by row. And merging
    concatenates neighbours row by row, where the classifier does column by column. `'correct'` mends both: the encoder
    of a fully visible image is then the plain Swin. Published weights are put into the other order when they are
    loaded; our own are taken as they are.

    Raises ValueError for sizes that do not divide and for a mask ratio that hides nothing or everything.
    """

    mask_scope = 'batch'

    def __init__(
        self,
        *,
        img_size: int = 224,
        patch_size: int = 4,
        embed_dim: int = 128,
        depths: Sequence[int] = (2, 2, 18, 2),
        num_heads: Sequence[int] = (4, 8, 16, 32),
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        coords: str = 'published',
        decoder_dim: int = 128,
        decoder_depth: int = 1,
        decoder_num_heads: int = 4,
        target: str = 'hog',
        hog_bins: int = 18,
        hog_bias: bool = True,
        norm_pix_loss: bool = True,
        mask_ratio: float = 0.75,
    ):
        check_choice('coords', coords, COORDS)
        grids = stage_grids(img_size, patch_size, window_size)
        decoder_dims = [decoder_dim // 2, decoder_dim, decoder_dim, decoder_dim]
        for dim in decoder_dims:
            check_heads(dim, decoder_num_heads, "a decoder's width")
        cells = [patch_size * size for size in (2, 4, 8, 8)]
        super().__init__(cells=cells, target=target, hog_bins=hog_bins, hog_bias=hog_bias, norm_pix_loss=norm_pix_loss)
        self.grids, self.coords = grids, coords
        self.mask_size = 8 * patch_size
        self.num_units = grids[-1].side ** 2
        self.num_keep = self.num_units - 1 - int(mask_ratio * self.num_units)
        check_mask_ratio(mask_ratio, self.num_units - self.num_keep, self.num_units, 'units')

        # encoder
        self.patch_embed = PatchEmbed(self.mask_size, patch_size, 3, embed_dim, norm_layer=norm_layer)  # one unit
        windows = [grid.window for grid in grids]
        self.layers = swin_stages(windows, embed_dim, depths, num_heads, mlp_ratio, by_column=coords == 'correct')
        widths = [embed_dim << stage for stage in (1, 2, 3, 3)]
        self.norms = nn.ModuleList(map(norm_layer, widths))

        # decoders, one per stage
        sides = [grids[stage].side for stage in (1, 2, 3, 3)]
        self.decoders = nn.ModuleList()
        for width, dim, side, num_outputs in zip(widths, decoder_dims, sides, self.num_outputs, strict=True):
            pos_embed, pred = sincos_2d(dim, side, cls_token=False), nn.Linear(dim, num_outputs)
            self.decoders.append(LocalDecoder(width, dim, decoder_depth, decoder_num_heads, mlp_ratio, pos_embed, pred))
        self.init_weights()

    @property
    def notice(self) -> str | None:
        """One line to print when training starts."""
        if self.coords == 'published':
            return (
                "coords='published': as in the published code, tokens of stages 1 and 2 are windowed by scrambled "
                "coordinates, and merging's order is not the classifier's; --model_kwargs coords=correct mends both"
            )

    def noise_shape(self, n: int) -> tuple[int, int]:
        """[1, U]: one number per unit, whatever the batch."""
        return 1, self.num_units

    def plan_from_noise(self, noise: Tensor) -> SwinPlan:
        """U[0, 1) CPU noise [1, U] (further rows are not used) -> SwinPlan; the K smallest stay visible."""
        order = noise[:1].argsort(dim=1, stable=True)
        return self.plan_of(order[:, : self.num_keep].sort(dim=1).values)

    def plan_of(self, ids_keep: Tensor) -> SwinPlan:
        """Visible units [1, K], ascending, on the CPU -> SwinPlan."""
        mask = torch.ones(1, self.num_units).scatter_(1, ids_keep, 0.0)
        places, coords, slots = [], [], []
        for side, window, shift in self.grids:
            by_unit = unit_major(side, self.grids[-1].side)  # [U, r * r]
            visible = by_unit[ids_keep[0]].flatten()
            places.append(visible)
            if self.coords == 'published' and side < self.grids[0].side:
                # the slip: numbers that count by unit are taken for places that count by row
                visible = torch.arange(side * side).view_as(by_unit)[ids_keep[0]].flatten()
            coords.append(torch.stack([visible // side, visible % side], dim=1))
            slots.append(torch.stack([group_slots(coords[-1], window, s) for s in (0, shift)], dim=1))
        return SwinPlan(ids_keep, mask, torch.cat(places[1:]).unsqueeze(0), torch.cat(coords), torch.cat(slots))

    def visible_places(self, plan: SwinPlan) -> list[Tensor]:
        """Raster places [1, V] of what each decoder is given; the last two grids are the same."""
        places = plan.places.split([plan.ids_keep.shape[1] * size for size in (16, 4, 1)], dim=1)
        return [*places, places[-1]]

    def stage_windows(self, plan: SwinPlan) -> list[list[Windows]]:
        """Of each stage, the plain and the shifted windows over the visible tokens."""
        lengths = [plan.ids_keep.shape[1] * size for size in (64, 16, 4, 1)]
        stages = zip(self.grids, plan.coords.split(lengths), plan.slots.split(lengths), strict=True)
        return [plain_and_shifted(coords, slots, grid) for grid, coords, slots in stages]

    def forward_encoder(self, imgs: Tensor, plan: SwinPlan) -> list[Tensor]:
        """Four normed latents [N, V, D] of doubling width, each stage's after its merging; the last two of one size."""
        n, num_keep = imgs.shape[0], plan.ids_keep.shape[1]
        units = gather_tokens(patchify(imgs, self.mask_size), plan.ids_keep.expand(n, -1))  # [N, K, .]
        units = units.reshape(-1, self.mask_size, self.mask_size, 3).permute(0, 3, 1, 2)
        x = self.patch_embed(units).reshape(n, num_keep * 64, -1)  # [N, V_0, D]
        latents = []
        for layer, norm, windows in zip(self.layers, self.norms, self.stage_windows(plan), strict=True):
            x = layer(x, windows, num_keep)
            latents.append(norm(x))  # the stream itself goes on without the norm
        return latents


COORDS = ('published', 'correct')

# --------------------------------------------------------------------------
# decoders


class LocalDecoder(nn.Module):
    """One scale's decoder: projected visible tokens, mask tokens elsewhere, blocks over the whole grid, `pred`."""

    def __init__(
        self, embed_dim: int, dim: int, depth: int, num_heads: int, mlp_ratio: float, pos_embed: Tensor, pred: nn.Module
    ):
        super().__init__()
        self.embed = nn.Linear(embed_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.register_buffer('pos_embed', pos_embed, persistent=False)
        self.blocks = nn.ModuleList(
            Block(dim, num_heads, mlp_ratio, qkv_bias=True, norm_layer=norm_layer) for _ in range(depth)
        )
        self.norm = norm_layer(dim)
        self.pred = pred

    def forward(self, latent: Tensor, places: Tensor) -> Tensor:
        """latent [N, C + V, D] with C class tokens, raster places [N or 1, V] of the others -> [N, predictions, .]."""
        num_cls = latent.shape[1] - places.shape[1]
        cls, visible = self.embed(latent).tensor_split([num_cls], dim=1)
        tokens = self.mask_token.to(visible.dtype).expand(len(visible), self.pos_embed.shape[1] - num_cls, -1)
        tokens = tokens.scatter(1, places.unsqueeze(-1).expand_as(visible), visible)  # [N, L, E]
        x = torch.cat([cls, tokens], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.pred(self.norm(x)[:, num_cls:])


class ConvHead(nn.Sequential):
    """Layers over the map of a square grid's tokens: [N, L, E] -> [N, L', out]."""

    def forward(self, x: Tensor) -> Tensor:
        side = round(x.shape[1] ** 0.5)
        x = x.transpose(1, 2).unflatten(2, (side, side))
        return super().forward(x).flatten(2).transpose(1, 2)


def conv_heads(dim: int, num_outputs: list[int]) -> list[ConvHead]:
    """Heads from the patch grid to 4, 2, 1 and 1/2 times its side."""
    half, quarter = dim // 2, dim // 4
    # at dim 256 the widths are the published 128 and 64
    return [
        ConvHead(
            nn.ConvTranspose2d(dim, half, 2, 2),
            LayerNorm2d(half, eps=1e-6),
            nn.GELU(),
            nn.ConvTranspose2d(half, quarter, 2, 2),
            nn.Conv2d(quarter, num_outputs[0], 1),
        ),
        ConvHead(nn.ConvTranspose2d(dim, half, 2, 2), nn.Conv2d(half, num_outputs[1], 1)),
        ConvHead(nn.Conv2d(dim, num_outputs[2], 1)),
        ConvHead(nn.AvgPool2d(2), nn.Conv2d(dim, num_outputs[3], 1)),
    ]


# --------------------------------------------------------------------------
# classifier, sizes


class LocalMIMSwinClassifier(SwinClassifier):
    """The plain Swin; keyword arguments are `SwinClassifier`'s, and `coords` that of the pretrained model.

    `coords` tells `load_published` what to do with a published pretraining checkpoint: take it as it is, which gave the
    published accuracies, or mend its order of merging.
    """

    def __init__(self, *, coords: str = 'published', **swin):
        check_choice('coords', coords, COORDS)
        super().__init__(**swin)
        self.coords = coords


def create_classifier(
    name: str, num_classes: int = 1000, drop_path_rate: float = 0.0, img_size: int = 224, **kwargs
) -> VisionTransformer | LocalMIMSwinClassifier:
    """What a pretraining model is fine-tuned as: timm's ViT, which norms the average patch token, or the Swin above.

    The head starts close to zero. Raises ValueError for a size that does not divide.
    """
    sizes = dict(img_size=img_size, num_classes=num_classes, drop_path_rate=drop_path_rate)
    options = {**sizes_of(ENCODERS, name), **sizes, **kwargs}
    if name in VIT_ENCODERS:
        return vit_classifier(**options)
    if options.pop('global_pool', 'avg') != 'avg':
        raise ValueError(f'{name} has no class token to classify')
    return LocalMIMSwinClassifier(**options)


def create_backbone(
    name: str, drop_path_rate: float = 0.0, img_size: int = 224, **kwargs
) -> WindowedViT | SwinBackbone:
    """The classifier without its head, as an encoder of any image.

    A ViT's keywords are `windowed_vit`'s; `img_size` is that of pretraining, which its position embedding is made for.
    A Swin's are `SwinBackbone`'s, for which `img_size` means nothing, and `coords`, as `LocalMIMSwinClassifier` has it.
    """
    options = {**sizes_of(ENCODERS, name), 'drop_path_rate': drop_path_rate, **kwargs}
    if name in VIT_ENCODERS:
        return windowed_vit(img_size=img_size, **options)
    coords = options.pop('coords', 'published')
    check_choice('coords', coords, COORDS)
    encoder = SwinBackbone(**options)
    encoder.coords = coords
    return encoder


def create_segmenter(
    name: str, num_classes: int = 150, drop_path_rate: float = 0.0, img_size: int = 512, **kwargs
) -> Segmenter:
    """UPerNet on the encoder; keywords are those of `create_backbone` and of `with_heads`.

    A ViT's maps are those of its local layers, and its coarsest one is an average. Raises ValueError for a size that
    does not divide.
    """
    if name not in VIT_ENCODERS:
        heads, sizes = split_options(kwargs)
        encoder = create_backbone(name, drop_path_rate, img_size, **sizes)
        for module in encoder.modules():
            if isinstance(module, nn.LayerNorm):  # the published segmenter's have one epsilon, the classifier's two
                module.eps = 1e-5
        return with_heads(encoder, num_classes, **heads)
    heads, sizes = split_options({**SEGMENTER_VIT, 'out_indices': local_layers, 'pool': 'avg', **kwargs})
    sizes |= dict(img_size=img_size, drop_path_rate=drop_path_rate)
    encoder = vit_backbone(**{**sizes_of(ENCODERS, name), **sizes})
    return with_heads(encoder, num_classes, fixed_size=img_size, **heads)


def local_layers(depth: int) -> Sequence[int]:
    """The blocks of a ViT whose outputs are decoded; quarters where it is too shallow for four of them."""
    return (1, 3, depth - 3, depth - 1) if depth >= 7 else quarters(depth)


VIT_ENCODERS = {
    'localmim_vit_tiny': dict(patch_size=8, embed_dim=96, depth=8, num_heads=3),  # for quick trials; not in the paper
    'localmim_vit_small': dict(embed_dim=384, depth=12, num_heads=6),
    'localmim_vit_base': dict(embed_dim=768, depth=12, num_heads=12),
    'localmim_vit_large': dict(embed_dim=1024, depth=24, num_heads=16),
}
SWIN_ENCODERS = {
    'localmim_swin_pico': dict(  # for quick trials; not in the paper
        patch_size=2, embed_dim=24, depths=(2, 2, 2, 2), num_heads=(2, 2, 4, 4), window_size=4
    ),
    'localmim_swin_tiny': dict(embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24), window_size=7),
    'localmim_swin_base': dict(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32), window_size=7),
    'localmim_swin_large': dict(embed_dim=192, depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48), window_size=14),
}
ENCODERS = VIT_ENCODERS | SWIN_ENCODERS  # of a pretraining model and of its classifier
PRETRAINING = {  # what else differs from the defaults of LocalMIMViT and LocalMIMSwin
    'localmim_vit_tiny': dict(decoder_dim=48, decoder_num_heads=3),
    'localmim_vit_large': dict(hog_bins=18, hog_bias=True),
    'localmim_swin_pico': dict(decoder_dim=48, decoder_num_heads=3, mask_ratio=0.5),
}

__all__ = [*ENCODERS]
globals().update(factories(LocalMIMViT, VIT_ENCODERS, PRETRAINING))
globals().update(factories(LocalMIMSwin, SWIN_ENCODERS, PRETRAINING))

# --------------------------------------------------------------------------
# optimiser rules


def param_rules(model: nn.Module) -> dict[str, tuple[int, float, bool]]:
    """{name: (layer_id, lr_scale, decays)} for every trainable parameter, as the published optimiser groups them.

    Layer ids: 0 = tokens, position and patch embedding; i + 1 = block i, counted over all stages, and merging with the
    block before it; depth + 1 = the rest. 1-D parameters are not decayed. Nor are, in pretraining, a Swin's mask tokens
    and bias tables, but a ViT's tokens are; in fine-tuning, a ViT's class token and position embedding, but a Swin's
    bias tables are.
    """
    encoder = encoder_of(model)
    if isinstance(encoder, LocalMIMSwin | LocalMIMSwinClassifier | SwinBackbone):
        depths = [len(layer.blocks) for layer in encoder.layers]
        undecayed = ('_token', 'relative_position_bias_table') if isinstance(model, LocalMIMSwin) else ()
    else:
        depths = [len(encoder.blocks)]
        undecayed = () if isinstance(model, LocalMIMViT) else ('cls_token', 'pos_embed')

    def layer_id(name: str) -> int:
        first, *rest = name.split('.')
        if first == 'blocks':
            return int(rest[0]) + 1
        if first == 'layers':
            stage = int(rest[0])
            return sum(depths[:stage]) + (int(rest[2]) + 1 if rest[1] == 'blocks' else depths[stage])
        return 0 if first in ENCODER_NAMES else sum(depths) + 1

    if isinstance(model, Segmenter | GeneralizedRCNN):
        rules = segmenter_rules if isinstance(model, Segmenter) else detector_rules
        rule = {'decays': swin_decays} if isinstance(encoder, SwinBackbone) else {}
        return rules(model, layer_id, sum(depths) + 1, **rule)
    return {
        name: (layer_id(name), 1.0, param.ndim > 1 and not name.endswith(undecayed))
        for name, param in model.named_parameters()
        if param.requires_grad
    }
