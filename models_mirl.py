"""MIRL: masked image residual learning for deeper vision transformers (Huang, Fu and Bors, NeurIPS 2023).

A ViT is cut into S segments, and every segment has a decoder of its own. Decoder k (shallow, k < S/2) and decoder
S-1-k (deep) are a pair: their predictions are *added* before the loss, so the deep half of the network learns what the
shallow half leaves over, the residual of the masked image.

    image --patch_embed--> [norm_low] --blocks--> [norm_0] --blocks--> [norm_1] ... --blocks--> [norm_S-1]
                               |                      |                    |                        |
                           memory_embed           decoder 0            decoder 1               decoder S-1
                               '----- memory ----------^--- + embed_0 -----^--- + embed_1 ... ------^

Shapes: N batch, L patches, K kept, V = K + 1 (with the class token), D encoder width, E decoder width, p patch side,
P = p*p*3. Mask: 1 = hidden. Tokens stay in the plan's shuffled order (class token, kept, hidden) all the way through;
attention does not see the order, and the hidden patches, the only ones with a loss, are then simply the last L - K.

Where the published code and the paper's figure differ, this follows the code, since the released weights fit only it:
a decoder cross-attends to the embeddings of every shallower segment and of the stem; targets are always normalised per
patch; the prediction heads are weight-normalised over the *outputs* of each input feature, with the gain fixed to 1.
The published small models have 12 heads of 32. The number of segments of the published ViT-B and ViT-B-24 is not
documented; 4 is what the paper's figure shows.
"""

import torch
import torch.nn.functional as F
from timm.layers import Mlp, PatchEmbed
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from util.nn.checks import check_divides, check_heads, check_mask_ratio
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
from util.nn.upernet import Segmenter, segmenter_rules, split_options, with_heads
from util.nn.vit import SEGMENTER_VIT, norm_layer, vit_backbone, vit_classifier, windowed_vit
from util.nn.windowed import WindowedViT


class MIRL(nn.Module):
    """Masked image residual learning (paper section 3; `models_mirl.MIRLViT` in the published code).

    `num_segments` must be even and cuts the blocks into equal segments; `out_indices` (the last block of every segment
    but the deepest) replaces it for uneven ones. `norm_pix_loss=False` regresses raw pixels; no published model does.
    Raises ValueError for sizes that do not divide and for a mask ratio that hides nothing or everything.
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
        num_segments: int = 4,
        out_indices: tuple[int, ...] | None = None,
        decoder_dim: int = 512,
        decoder_depth: int = 2,
        decoder_num_heads: int = 16,
        weight_norm_pred: bool = True,
        norm_pix_loss: bool = True,
        mask_ratio: float = 0.75,
    ):
        super().__init__()
        check_divides(img_size, patch_size, 'patch_size')
        check_heads(embed_dim, num_heads)
        check_heads(decoder_dim, decoder_num_heads, 'decoder_dim')
        grid_size = img_size // patch_size
        self.patch_size, self.norm_pix_loss = patch_size, norm_pix_loss
        self.num_patches = grid_size**2
        self.num_keep = int(self.num_patches * (1 - mask_ratio))
        check_mask_ratio(mask_ratio, self.num_patches - self.num_keep, self.num_patches)
        self.out_indices = segment_ends(depth, num_segments, out_indices)

        # encoder
        self.patch_embed = PatchEmbed(img_size, patch_size, 3, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.register_buffer('pos_embed', sincos_2d(embed_dim, grid_size))
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, qkv_bias=True, norm_layer=norm_layer) for _ in range(depth)
        )
        self.norm_low = norm_layer(embed_dim)
        self.norms = nn.ModuleList(norm_layer(embed_dim) for _ in self.out_indices)

        # decoders, one per segment
        self.memory_embed = nn.Linear(embed_dim, decoder_dim)
        self.register_buffer('decoder_pos_embed', sincos_2d(decoder_dim, grid_size), persistent=False)
        self.decoders = nn.ModuleList(
            SegmentDecoder(
                embed_dim, decoder_dim, decoder_depth, decoder_num_heads, mlp_ratio, 3 * patch_size**2, weight_norm_pred
            )
            for _ in self.out_indices
        )
        self.init_weights()

    def init_weights(self) -> None:
        """Linear and patch projection xavier-uniform with zero bias, tokens N(0, 0.02), LayerNorm 1 and 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                # of a weight-normalised head the direction is drawn; its gain stays 1
                normed = hasattr(module, 'parametrizations')
                nn.init.xavier_uniform_(module.parametrizations.weight.original1 if normed else module.weight)
                nn.init.zeros_(module.bias)
        projection = self.patch_embed.proj
        nn.init.xavier_uniform_(projection.weight.view(projection.out_channels, -1))
        nn.init.zeros_(projection.bias)
        for token in (self.cls_token, *(decoder.mask_token for decoder in self.decoders)):
            nn.init.normal_(token, std=0.02)

    # --------------------------------------------------------------------------
    # masking

    def noise_shape(self, n: int) -> tuple[int, int]:
        """[n, L]: one number per patch of each sample."""
        return n, self.num_patches

    def plan_from_noise(self, noise: Tensor) -> MaskPlan:
        """U[0, 1) CPU noise [n, L] -> MaskPlan; the K = int(L * (1 - mask_ratio)) smallest of a row stay visible."""
        return mask_plan(noise, self.num_keep)

    # --------------------------------------------------------------------------
    # encoder, decoders, loss

    def forward_encoder(self, imgs: Tensor, plan: MaskPlan) -> tuple[Tensor, list[Tensor]]:
        """Normed tokens [N, V, D] of the stem, and of each of the S segments."""
        x = self.patch_embed(imgs) + self.pos_embed[:, 1:]  # [N, L, D]
        x = gather_tokens(x, plan.ids_keep)  # [N, K, D]
        cls_token = self.cls_token + self.pos_embed[:, :1]
        x = torch.cat([cls_token.expand(x.shape[0], -1, -1), x], dim=1)  # [N, V, D]
        low, features, start = self.norm_low(x), [], 0
        for end, norm in zip(self.out_indices, self.norms, strict=True):
            for block in self.blocks[start : end + 1]:
                x = block(x)
            features.append(norm(x))  # the stream itself goes on without the norm
            start = end + 1
        return low, features

    def forward_decoders(self, low: Tensor, features: list[Tensor], plan: MaskPlan, num_pred: int) -> list[Tensor]:
        """S predictions [N, num_pred, P] for the last `num_pred` patches of the plan's order (kept, then hidden)."""
        ids = torch.cat([plan.ids_keep, plan.ids_hidden], dim=1)
        patch_pos_embed = gather_tokens(self.decoder_pos_embed[:, 1:], ids)
        cls_pos_embed = self.decoder_pos_embed[:, :1].expand(ids.shape[0], -1, -1)
        pos_embed = torch.cat([cls_pos_embed, patch_pos_embed], dim=1)  # [N, 1 + L, E]

        memory, preds = self.memory_embed(low), []  # memory: [N, V, E], growing by V tokens per segment
        for decoder, tokens in zip(self.decoders, features, strict=True):
            embedded = decoder.embed(tokens)
            preds.append(decoder(embedded, memory, pos_embed, num_pred))
            memory = torch.cat([embedded, memory], dim=1)
        return preds

    def forward_loss(self, imgs: Tensor, preds: list[Tensor], plan: MaskPlan) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean squared error over hidden patches of each pair's sum, averaged over the S / 2 pairs. In float32."""
        with torch.autocast(imgs.device.type, enabled=False):
            target = gather_tokens(patchify(imgs.float(), self.patch_size), plan.ids_hidden)  # [N, L - K, P]
            if self.norm_pix_loss:
                target = normalise_patches(target)
            losses = [(main.float() + residual.float() - target).square().mean() for main, residual in pairs(preds)]
            loss = torch.stack(losses).mean()
            shares = explained(torch.stack(losses), target)
        terms = {f'reconstr_loss{i}': term.detach() for i, term in enumerate(losses)}
        return loss, terms | {f'explained{i}': share for i, share in enumerate(shares)}

    def forward(self, imgs: Tensor, plan: MaskPlan | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """imgs [N, 3, H, W], normalised -> scalar loss; each pair's `reconstr_loss` and `explained`, 0: outermost."""
        plan = plan or random_plan(self, imgs)
        low, features = self.forward_encoder(imgs, plan)
        preds = self.forward_decoders(low, features, plan, num_pred=plan.ids_hidden.shape[1])
        return self.forward_loss(imgs, preds, plan)

    # --------------------------------------------------------------------------
    # pictures, export

    @torch.no_grad()
    def reconstruct(self, imgs: Tensor, plan: MaskPlan) -> dict[str, Tensor]:
        """Panels [N, 3, H, W] in the input's normalised space: `first_panels`, and each pair's sum and two parts.

        The composite has the sum of pair 0, whose residual comes from the deepest segment. Predictions are normalised
        per patch; see `pixel_scales` for how they become pixels. The pairs are drawn with the oracle's mean and
        deviation, as in the paper; the mean is added to both parts, so a residual is detail on a mid-tone. Visible
        patches are left out of them, since nothing is trained there.
        """
        with eval_mode(self):
            preds = self.forward_decoders(*self.forward_encoder(imgs, plan), plan, num_pred=self.num_patches)

        restore = torch.cat([plan.ids_keep, plan.ids_hidden], dim=1).argsort(dim=1)
        scales = pixel_scales(imgs, plan.mask, self.patch_size, self.norm_pix_loss)

        def picture(pred: Tensor, kind: str) -> Tensor:
            mean, std = scales[kind]
            return unpatchify(gather_tokens(pred.float(), restore) * std + mean, self.patch_size)

        hidden = patch_mask_to_pixels(plan.mask, self.patch_size)
        panels = first_panels(imgs, hidden, {kind: picture(sum(pairs(preds)[0]), kind) for kind in scales})
        oracle = list(scales)[-1]
        for i, (main, residual) in enumerate(pairs(preds)):
            parts = {f'prediction {i}{oracle}': main + residual, f'main part {i}': main, f'residual part {i}': residual}
            panels |= {name: left_out(picture(part, oracle), hidden) for name, part in parts.items()}
        return panels

    def encoder_state_dict(self) -> dict[str, Tensor]:
        """The encoder under the classifier's (timm's) names; `norm.*` serves the `global_pool='token'` one only."""
        state = {k: v for k, v in self.state_dict().items() if k.split('.')[0] in ENCODER_NAMES}
        return state | {f'norm.{k}': v for k, v in self.norms[-1].state_dict().items()}


ENCODER_NAMES = ('cls_token', 'pos_embed', 'patch_embed', 'blocks')


# --------------------------------------------------------------------------
# segments and their decoders


def segment_ends(depth: int, num_segments: int, out_indices: tuple[int, ...] | None = None) -> tuple[int, ...]:
    """The last block of each segment, the deepest included. Raises ValueError for an odd number or an empty segment."""
    if out_indices is None:
        out_indices = tuple(round(depth * k / num_segments) - 1 for k in range(1, num_segments))
    ends = (*out_indices, depth - 1)
    if len(ends) % 2 or sorted(set(ends)) != list(ends) or ends[0] < 0:
        raise ValueError(
            f'{len(ends)} segments ending at blocks {ends} of {depth}: '
            f'segments must be even in number and each at least one block deep'
        )
    return ends


def pairs(preds: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """(main, residual) predictions: first with last, second with second-last, ..."""
    half = len(preds) // 2
    return list(zip(preds[:half], preds[::-1][:half], strict=True))


class CrossAttention(nn.Module):
    """Multi-head attention of tokens x [N, T, E] to a memory [N, M, E]."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [N, heads, T, E / heads]
        k, v = (x.transpose(1, 2) for x in self.kv(memory).unflatten(-1, (2, self.num_heads, -1)).unbind(2))
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).flatten(2))


class DecoderBlock(nn.Module):
    """Pre-norm block: self-attention, cross-attention to the memory, MLP."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = Attention(dim, num_heads, qkv_bias=True)
        self.norm2 = norm_layer(dim)
        self.norm3 = norm_layer(dim)
        self.cross_attn = CrossAttention(dim, num_heads)
        self.norm4 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        x = x + self.cross_attn(self.norm2(x), self.norm3(memory))
        return x + self.mlp(self.norm4(x))


class SegmentDecoder(nn.Module):
    """One segment's decoder: projected visible tokens, mask tokens, cross-attention to the shallower segments."""

    def __init__(
        self,
        embed_dim: int,
        dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float,
        num_outputs: int,
        weight_norm_pred: bool,
    ):
        super().__init__()
        self.embed = nn.Linear(embed_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.blocks = nn.ModuleList(DecoderBlock(dim, num_heads, mlp_ratio) for _ in range(depth))
        self.norm = norm_layer(dim)
        self.pred = nn.Linear(dim, num_outputs)
        if weight_norm_pred:  # dim=1: a unit vector per *input* feature; torch's default would be per output
            weight_norm(self.pred, dim=1)
            self.pred.parametrizations.weight.original0.requires_grad_(False).fill_(1.0)

    def forward(self, embedded: Tensor, memory: Tensor, pos_embed: Tensor, num_pred: int) -> Tensor:
        """embedded [N, V, E], memory [N, M, E], pos_embed [N, 1 + L, E] -> the last `num_pred` patches' [N, ., P]."""
        num_hidden = pos_embed.shape[1] - embedded.shape[1]
        mask_tokens = self.mask_token.expand(embedded.shape[0], num_hidden, -1)
        x = torch.cat([embedded, mask_tokens.to(embedded.dtype)], dim=1) + pos_embed
        for block in self.blocks:
            x = block(x, memory)
        return self.pred(self.norm(x[:, -num_pred:]))


# --------------------------------------------------------------------------
# classifier, sizes


def create_classifier(
    name: str, num_classes: int = 1000, drop_path_rate: float = 0.0, img_size: int = 224, **kwargs
) -> VisionTransformer:
    """timm's ViT of a pretraining model's size: what it is fine-tuned as.

    `global_pool='avg'` (the paper's) averages the patch tokens and then norms them (`fc_norm`); `'token'` takes the
    normed class token. Raises ValueError for a size that does not divide.
    """
    sizes = dict(img_size=img_size, num_classes=num_classes, drop_path_rate=drop_path_rate)
    return vit_classifier(**{**sizes_of(ENCODERS, name), **sizes, **kwargs})


def create_backbone(name: str, drop_path_rate: float = 0.0, img_size: int = 224, **kwargs) -> WindowedViT:
    """The classifier without its head, as an encoder of any image; keywords are `windowed_vit`'s.

    `img_size` is that of pretraining, which the position embedding is made for.
    """
    sizes = dict(img_size=img_size, drop_path_rate=drop_path_rate)
    return windowed_vit(**{**sizes_of(ENCODERS, name), **sizes, **kwargs})


def create_segmenter(
    name: str, num_classes: int = 150, drop_path_rate: float = 0.0, img_size: int = 512, **kwargs
) -> Segmenter:
    """UPerNet on the ViT, by MAE's protocol; keywords are `vit_backbone`'s and `with_heads`'.

    Raises ValueError for a size that does not divide.
    """
    heads, sizes = split_options(kwargs)
    sizes = dict(img_size=img_size, drop_path_rate=drop_path_rate, **{**SEGMENTER_VIT, **sizes})
    encoder = vit_backbone(**{**sizes_of(ENCODERS, name), **sizes})
    return with_heads(encoder, num_classes, fixed_size=img_size, **heads)


ENCODERS = {  # of a pretraining model and of its classifier
    'mirl_vit_tiny': dict(patch_size=8, embed_dim=96, depth=4, num_heads=3),  # for quick trials; not in the paper
    'mirl_vit_small': dict(embed_dim=384, depth=12, num_heads=12),
    'mirl_vit_small_depth54': dict(embed_dim=384, depth=54, num_heads=12),
    'mirl_vit_base': dict(embed_dim=768, depth=12, num_heads=12),
    'mirl_vit_base_depth24': dict(embed_dim=768, depth=24, num_heads=12),
    'mirl_vit_base_depth48': dict(embed_dim=768, depth=48, num_heads=12),
}
SMALL_DECODER = dict(decoder_dim=384, decoder_depth=1, decoder_num_heads=12)
PRETRAINING = {  # what else differs from MIRL's defaults
    'mirl_vit_tiny': dict(num_segments=2, decoder_dim=48, decoder_depth=1, decoder_num_heads=3, mask_ratio=0.5),
    'mirl_vit_small': SMALL_DECODER,
    'mirl_vit_small_depth54': dict(SMALL_DECODER, num_segments=6),
    'mirl_vit_base_depth48': dict(num_segments=6),
}

__all__ = [*ENCODERS]
globals().update(factories(MIRL, ENCODERS, PRETRAINING))

# --------------------------------------------------------------------------
# optimiser rules


def param_rules(model: nn.Module) -> dict[str, tuple[int, float, bool]]:
    """{name: (layer_id, lr_scale, decays)} for every trainable parameter, as the published optimiser groups them.

    Layer ids: 0 = tokens, position and patch embedding; i + 1 = block i; depth + 1 = the rest. 1-D parameters are not
    decayed; class and mask tokens are in pretraining, and the classifier's class token and position embedding are not.
    """
    last = len(encoder_of(model).blocks) + 1
    undecayed = () if isinstance(model, MIRL) else ('cls_token', 'pos_embed')

    def layer_id(name: str) -> int:
        first, *rest = name.split('.')
        if first == 'blocks':
            return int(rest[0]) + 1
        return 0 if first in ENCODER_NAMES else last

    if isinstance(model, Segmenter):
        return segmenter_rules(model, layer_id, last)
    if isinstance(model, GeneralizedRCNN):
        return detector_rules(model, layer_id, last)
    return {
        name: (layer_id(name), 1.0, param.ndim > 1 and name not in undecayed)
        for name, param in model.named_parameters()
        if param.requires_grad
    }
