"""A2MIM: architecture-agnostic masked image modeling (Li, Wu, Wu, Zang and Li, ICML 2023), and its baseline SimMIM.

Cells of 32 x 32 pixels are hidden, and the image is reconstructed by one convolution on the encoder's last map. What
makes it work for convolutions as well as for transformers is where and how the mask enters: hidden pixels take the
image's own mean colour, and a learned mask token joins the features deep inside the encoder, at `mask_layer`.

    image --fill--> [stem] --> [stages] --+--> [last stage] --map--> [1 x 1 convolution, pixel shuffle] --> prediction
                      mask token at hidden positions                                                            |
    loss = L1 (or focal L1) on hidden pixels + fft_weight * distance of the spectra of prediction and image <---'

SimMIM leaves the pixels as they are, replaces the features of hidden patches right after the stem, and has no spectrum.

Encoders are timm's, untouched: the token comes in through a hook on the module whose output it joins. So parameter
names are timm's, and an encoder trained here loads into the stock network with `strict=True`.

Shapes: N batch, S image side, n = S / 32 cells a side, T = n * n, C width of a map, e its stride. Mask: 1 = hidden.

Where the published code and the paper differ, this follows the code: the focal Fourier loss compares the spectra of the
batch's *means*, so it depends on the batch of each process; visible pixels enter it as a constant halfway between
prediction and image; CNNs train with a focal L1 and most of them without the Fourier term; SimMIM's ConvNeXt adds the
token to features that have seen the hidden pixels (`replace=True` mends that).
"""

import inspect
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from timm.models import group_parameters
from timm.models.beit import Beit
from timm.models.convnext import ConvNeXt
from timm.models.resnet import ResNet
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from util.nn.checks import check_choice, check_divides, check_heads, check_mask_ratio
from util.nn.losses import PIXEL_LOSSES, explained, pixel_loss
from util.nn.models import LayerNorm, as_timm, eval_mode, factory, norm_layer, sizes_of
from util.nn.patches import first_panels, left_out, patch_mask_to_pixels, random_plan
from util.nn.pyramid import GeneralizedRCNN, Indices, StageMaps, as_maps, detector_rules, encoder_of
from util.nn.sites import any_site, any_timm, find_site, stage_layers
from util.nn.spectrum import draw_spectrum, focal_frequency_loss, half_spectrum
from util.nn.upernet import Segmenter, segmenter_rules, split_options, swin_decays, with_heads
from util.nn.vit import SEGMENTER_VIT, quarters, vit_backbone, windowed_vit
from util.nn.windowed import WindowedViT


class CellPlan(NamedTuple):
    """Which cells each sample hides."""

    mask: Tensor  # [N, T] float32, 1 = hidden


class A2MIM(nn.Module):
    """Masked image modeling around any encoder (paper section 4; `a2mim.py` and `mim_head.py` of OpenMixup).

    Image: cells have `mask_patch_size` pixels a side. `mask_color='mean'` fills hidden ones with the image's mean
    colour; 'none' leaves their pixels (published as 'zero' and 'rand').

    Token: it joins at `mask_layer`, k. ViT: before block k - 1 (0: before the positions); ResNet: before stage k + 1;
    ConvNeXt: after the down-sampling of stage k; Swin: before stage k - 1 (0: as 1). It is added to hidden features.
    `mask_init` > 0 first damps these by a learned gamma of that initial value; `replace` drops them.

    Loss: `loss` is the mode of `pixel_loss`. The Fourier term, of weight `fft_weight`, is `focal_frequency_loss`, or
    with `fft_focal=False` the pixel loss of the spectral distance. Visible pixels of the prediction enter it with
    `fft_unmask_weight`.

    Variants: switches of the published code, for ablations. No published configuration changes them.
    - Token: `mask_token` is 'learnable', 'zero', 'randn' (both fixed), 'mean' (of the batch's features),
      'instance_mean' or 'none'; `detach` stops the gradients of hidden features.
    - Pixel loss: `alpha`, `gamma`, `activate` and `residual` shape the focal modes of `pixel_loss`; visible pixels
      weigh `unmask_weight`.
    - Fourier term: `fft_reweight` weighs the pixel loss of spectra by itself; `fft_unmask_replace` says what stands for
      visible pixels; the last four are options of `focal_frequency_loss`.

    Other keywords are the encoder's. Raises ValueError for options that do not fit together.
    """

    mask_scope = 'sample'

    def __init__(
        self,
        *,
        backbone: 'Backbone',
        img_size: int = 224,
        drop_path_rate: float = 0.0,
        # image
        mask_patch_size: int = 32,
        mask_ratio: float = 0.6,
        mask_color: str = 'mean',
        # token
        mask_layer: int | None = 0,
        mask_init: float = 0.0,
        replace: bool = False,
        token_std: float = 0.02,
        token_lr_scale: float = 1.0,
        # loss
        loss: str = 'l1',
        fft_weight: float = 0.0,
        fft_focal: bool = True,
        fft_unmask_weight: float = 0.0,
        # variants: token
        mask_token: str = 'learnable',
        detach: bool = False,
        # variants: pixel loss
        alpha: float = 0.2,
        gamma: float = 1.0,
        activate: str = 'sigmoid',
        residual: bool = False,
        unmask_weight: float = 0.0,
        # variants: Fourier term
        fft_reweight: bool = False,
        fft_unmask_replace: str = 'mixed',
        fft_alpha: float = 1.0,
        fft_ave_spectrum: bool = True,
        fft_log_matrix: bool = True,
        fft_batch_matrix: bool = True,
        **sizes,
    ):
        super().__init__()
        check_choice('mask_color', mask_color, ('mean', 'none'))
        check_choice('mask_token', mask_token, ('learnable', 'zero', 'randn', 'mean', 'instance_mean', 'none'))
        check_choice('loss', loss, PIXEL_LOSSES)
        check_choice('activate', activate, ('sigmoid', 'tanh'))
        check_choice('fft_unmask_replace', fft_unmask_replace, ('target', 'prediction', 'mean', 'mixed'))
        check_sizes(sizes)
        if mask_init and replace:
            raise ValueError(f'mask_init {mask_init} damps features that replace=True drops')
        check_divides(img_size, mask_patch_size, 'mask_patch_size')
        self.img_size, self.cell_size, self.cells = img_size, mask_patch_size, img_size // mask_patch_size
        self.num_hidden = math.ceil(self.cells**2 * mask_ratio)
        smaller = f'mask_patch_size={mask_patch_size // 2}'
        check_mask_ratio(mask_ratio, self.num_hidden, self.cells**2, 'cells of the mask', smaller)
        self.mask_color, self.replace, self.detach, self.token_mode = mask_color, replace, detach, mask_token
        self.token_lr_scale = token_lr_scale
        self.loss = dict(mode=loss, alpha=alpha, gamma=gamma, activate=activate, residual=residual)
        self.unmask_weight = unmask_weight
        self.fft_weight, self.fft_focal, self.fft_reweight = fft_weight, fft_focal, fft_reweight
        self.fft_unmask_weight, self.fft_unmask_replace = fft_unmask_weight, fft_unmask_replace
        self.focal = dict(alpha=fft_alpha, ave_spectrum=fft_ave_spectrum)
        self.focal |= dict(log_matrix=fft_log_matrix, batch_matrix=fft_batch_matrix)

        self.encoder = backbone.make(img_size=img_size, drop_path_rate=drop_path_rate, **sizes)
        self.features = backbone.features
        self.hook_into(backbone.site(self.encoder, mask_layer))
        self.mask_token = self.mask_gamma = None
        std = {'learnable': token_std, 'zero': 0.0, 'randn': 1.0}.get(mask_token)
        if std is not None:
            self.mask_token = nn.Parameter(std * torch.randn(self.site.width), requires_grad=mask_token == 'learnable')
        if mask_init:
            self.mask_gamma = nn.Parameter(torch.full((self.site.width,), mask_init))
        self.stride = img_size // self.end.side
        self.decoder = nn.Conv2d(self.end.width, 3 * self.stride**2, kernel_size=1)
        nn.init.trunc_normal_(self.decoder.weight, std=0.02)
        nn.init.zeros_(self.decoder.bias)

    def noise_shape(self, n: int) -> tuple[int, int]:
        """[n, T]: one number per cell of each sample, row by row."""
        return n, self.cells**2

    def plan_from_noise(self, noise: Tensor) -> CellPlan:
        """U[0, 1) CPU noise [n, T] -> CellPlan; the K = ceil(T * mask_ratio) *smallest* of a row are hidden."""
        hidden = noise.argsort(dim=1, stable=True)[:, : self.num_hidden]
        return CellPlan(torch.zeros_like(noise).scatter_(1, hidden, 1.0))

    def forward(self, imgs: Tensor, plan: CellPlan | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """imgs [N, 3, S, S], normalised -> scalar loss; `spatial_loss`, `explained`, unweighted `fourier_loss`."""
        plan = plan or random_plan(self, imgs)
        hidden = patch_mask_to_pixels(plan.mask, self.cell_size)
        x = self.forward_encoder(self.fill(imgs, hidden), plan.mask)
        pred = self.forward_decoder(x)
        return self.forward_loss(imgs, pred, hidden)

    # --------------------------------------------------------------------------
    # encoder

    def fill(self, imgs: Tensor, hidden: Tensor) -> Tensor:
        """imgs [N, 3, S, S], hidden pixels [N, 1, S, S] -> each image's own mean colour where it is hidden."""
        if self.mask_color == 'none':
            return imgs
        return torch.where(hidden > 0, imgs.mean(dim=(2, 3), keepdim=True), imgs)

    def forward_encoder(self, imgs: Tensor, mask: Tensor) -> Tensor:
        """Filled images [N, 3, S, S], hidden cells [N, T] -> the last map [N, C, S / e, S / e]."""
        with self.token_at(mask):
            return self.end.to_map(self.features(self.encoder, imgs))

    def hook_into(self, module: str) -> None:
        """Let the token join the encoder's features at the output of `module`. Raises ValueError where it cannot."""
        self.site, self.end, unused = find_site(self.encoder, self.features, module, self.img_size)
        if self.site.side % self.cells:
            raise ValueError(
                f'{self.cells} cells of {self.cell_size} pixels a side do not fit '
                f'the {self.site.side} positions a side after {module}'
            )
        for key in unused:
            self.encoder.get_parameter(key).requires_grad_(False)
        self.token_mask: Tensor | None = None  # set by `token_at` alone
        self.encoder.get_submodule(module).register_forward_hook(self.insert_token)

    @contextmanager
    def token_at(self, mask: Tensor) -> Iterator[None]:
        """A `with` in which the mask token joins the encoder's features at hidden cells [N, T]; outside it does not."""
        self.token_mask = mask
        try:
            yield
        finally:
            self.token_mask = None

    def insert_token(self, module: nn.Module, args: tuple, features: Tensor) -> Tensor:
        """The hook: features (1 - m) + (gamma * features + token) m, or with `replace` features (1 - m) + token m."""
        if self.token_mask is None or self.token_mode == 'none':
            return features
        mask = self.site.spread_mask(patch_mask_to_pixels(self.token_mask, self.site.side // self.cells))
        hidden = self.token_for(features)
        if not self.replace:
            kept = features.detach() if self.detach else features
            if self.mask_gamma is not None:
                kept = kept * self.site.spread_channels(self.mask_gamma)
            hidden = hidden + kept
        return (features * (1 - mask) + hidden * mask).to(features.dtype)

    def token_for(self, features: Tensor) -> Tensor:
        """The mask token, or the mean that stands in for it, to be broadcast over the features."""
        if self.mask_token is not None:
            return self.site.spread_channels(self.mask_token)
        mean = self.site.mean(features.detach())
        return mean.mean(dim=0, keepdim=True) if self.token_mode == 'mean' else mean

    # --------------------------------------------------------------------------
    # decoder and loss

    def forward_decoder(self, x: Tensor) -> Tensor:
        """[N, C, S / e, S / e] -> [N, 3, S, S], in the images' normalised space."""
        return F.pixel_shuffle(self.decoder(x), self.stride)

    def forward_loss(self, imgs: Tensor, pred: Tensor, hidden: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """imgs and pred [N, 3, S, S], hidden pixels [N, 1, S, S] -> the sum of both losses, and each. In float32."""
        with torch.autocast(imgs.device.type, enabled=False):
            imgs, pred = imgs.float(), pred.float()
            weight = hidden + (1 - hidden) * self.unmask_weight
            error = pred - imgs
            distance = error.abs()
            loss = pixel_loss(distance, **self.loss)
            loss = (loss * weight).sum() / (weight.sum() + 1e-5) / imgs.shape[1]  # 1e-5: the published code's
            squared = (distance.detach().square() * weight).sum() / weight.sum() / imgs.shape[1]
            colours, weight = imgs.movedim(1, -1), weight.movedim(1, -1)
            terms = {'spatial_loss': loss.detach(), 'explained': explained(squared, colours, weight)}
            if self.fft_weight:
                fourier = self.fourier_loss(imgs, error, hidden)
                terms['fourier_loss'] = fourier.detach()
                loss = loss + self.fft_weight * fourier
        return loss, terms

    def fourier_loss(self, imgs: Tensor, error: Tensor, hidden: Tensor) -> Tensor:
        """Distance of the spectra of the image and of the prediction, in which constants stand for visible pixels.

        error: prediction - image, [N, 3, S, S].
        """
        share = hidden + (1 - hidden) * self.fft_unmask_weight
        difference = error * share + self.visible_error(imgs, error) * (1 - share)
        if self.fft_focal:
            return focal_frequency_loss(difference, **self.focal)
        spectrum, counts = half_spectrum(difference)
        loss = pixel_loss(spectrum.abs(), **self.loss)
        if self.fft_reweight:
            loss = loss.detach() * loss
        return (loss * counts).mean()

    def visible_error(self, imgs: Tensor, error: Tensor) -> Tensor:
        """What stands for the prediction at visible pixels, minus the image: [N, 3, S, S] without a gradient."""
        if self.fft_unmask_replace == 'target':
            return torch.zeros_like(error)
        if self.fft_unmask_replace == 'mean':
            return imgs.mean(dim=(2, 3), keepdim=True) - imgs
        return error.detach() * (0.5 if self.fft_unmask_replace == 'mixed' else 1.0)  # halfway, or the prediction

    # --------------------------------------------------------------------------
    # pictures, export

    @torch.no_grad()
    def reconstruct(self, imgs: Tensor, plan: CellPlan) -> dict[str, Tensor]:
        """Panels [N, 3, S, S] in the input's normalised space: `first_panels`, the prediction, and spectra.

        Visible pixels are left out of the prediction, unless they have a loss. Spectra are log amplitudes averaged over
        colours, low frequencies in the middle, on the image's scale of grays.
        """
        hidden = patch_mask_to_pixels(plan.mask, self.cell_size)
        masked = self.fill(imgs, hidden)
        with eval_mode(self):
            pred = self.forward_decoder(self.forward_encoder(masked, plan.mask)).float()
        panels = first_panels(imgs, hidden, {'': pred}, masked if self.mask_color != 'none' else None)
        return {
            **panels,
            'prediction': left_out(pred, hidden + self.unmask_weight),
            'spectrum (composite)': draw_spectrum(panels['composite'], like=imgs),
            'spectrum (original)': draw_spectrum(imgs, like=imgs),
        }

    def encoder_state_dict(self) -> dict[str, Tensor]:
        """The encoder under timm's names; the ViT's `norm.*` serves the `global_pool='token'` classifier only."""
        return {k.removeprefix('encoder.'): v for k, v in self.state_dict().items() if k.startswith('encoder.')}


# --------------------------------------------------------------------------
# encoders


class Backbone(NamedTuple):
    """A family of encoders."""

    make: Callable[..., nn.Module]  # (img_size, num_classes, drop_path_rate, **sizes)
    site: Callable[[nn.Module, Any], str]  # (encoder, mask_layer) -> the module whose output the token joins
    maps: Callable[..., nn.Module]  # (img_size, drop_path_rate, **sizes) -> the encoder of dense tasks, of any image
    segmenter: dict[str, Any]  # how a segmenter's encoder and heads differ
    features: Callable[[nn.Module, Tensor], Tensor] = lambda encoder, imgs: encoder.forward_features(imgs)
    segmenter_maps: Callable[..., nn.Module] | None = None  # where a segmenter's encoder is another, of one image size


def check_sizes(sizes: dict) -> None:
    """Raise ValueError for options of timm's that are not the user's to set here."""
    ours = {'pretrained', 'pretrained_cfg', 'checkpoint_path', 'features_only', 'in_chans', 'num_classes'}
    if given := sorted(sizes.keys() & ours):
        raise ValueError(f'{given[0]} is set by this program')


def beit(*, img_size: int, num_classes: int = 0, drop_path_rate: float = 0.0, **sizes) -> Beit:
    """The method's ViT: with absolute *and* relative positions, a bias for q and v only, and LayerScale (BEiT's)."""
    check_heads(sizes['embed_dim'], sizes['num_heads'])
    check_divides(img_size, sizes.get('patch_size', 16), 'patch_size')
    options = dict(use_abs_pos_emb=True, use_rel_pos_bias=True, init_values=0.1)
    options |= dict(global_pool='avg' if num_classes else '', norm_layer=norm_layer)
    options |= dict(img_size=img_size, num_classes=num_classes, drop_path_rate=drop_path_rate)
    options |= sizes
    encoder = Beit(**options)
    for module in encoder.modules():  # timm shrinks the residual branches with depth, the published code does not
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
    if num_classes:
        nn.init.normal_(encoder.head.weight, std=0.01)
        nn.init.zeros_(encoder.head.bias)
    return as_timm(encoder, 'beit_base_patch16_224', **options)


def swin(*, img_size: int, num_classes: int = 0, drop_path_rate: float = 0.0, **sizes) -> SwinTransformer:
    """Swin v1; every LayerNorm has eps 1e-5."""
    check_divides(img_size, 32, "the last map's stride")
    if unknown := sizes.keys() - inspect.signature(SwinTransformer).parameters.keys():  # older timm's takes anything
        raise TypeError(f'swin() got an unexpected keyword argument {min(unknown)!r}')
    options = dict(img_size=img_size, num_classes=num_classes, drop_path_rate=drop_path_rate, norm_layer=LayerNorm)
    network = SwinTransformer(**{**options, **sizes})
    return as_timm(network, 'swin_tiny_patch4_window7_224', img_size=img_size, **sizes)


def resnet(*, num_classes: int = 0, **options) -> nn.Module:
    """timm's ResNet (v1.5) of this name, whose classifier starts close to zero."""
    encoder = any_timm(num_classes=num_classes, **options)
    if num_classes and isinstance(encoder, ResNet):
        nn.init.normal_(encoder.fc.weight, std=0.01)
        nn.init.zeros_(encoder.fc.bias)
    return encoder


def any_maps(*, out_indices: Indices | None = None, **options) -> nn.Module:
    """timm's network of this name as an encoder: by default all maps of stride 4 and more, or a ViT's last.

    A ConvNeXt's maps have norms of their own. `fixed_size` is the only image size that the network takes, or None.
    """
    return maps_of(any_timm(**options), out_indices)


def any_encoder(*, out_indices: Indices | None = None, **options) -> nn.Module:
    """The same, but a plain ViT, which has one map, is one of any image: a `WindowedViT` with its defaults."""
    network = any_timm(**options)
    plain = out_indices is None and isinstance(network, VisionTransformer | Beit)
    return WindowedViT(network) if plain else maps_of(network, out_indices)


def maps_of(network: nn.Module, out_indices: Indices | None) -> nn.Module:
    strides = [info['reduction'] for info in getattr(network, 'feature_info', [])]
    one_stride = len(set(strides)) == 1
    if one_stride and out_indices is None:
        out_indices = [len(strides) - 1]
    elif not one_stride and (out_indices is None or callable(out_indices)):
        out_indices = [i for i, stride in enumerate(strides) if stride >= 4]
    network.fixed_size = network.timm_recipe[1].get('img_size')
    return as_maps(network, out_indices, partial(LayerNorm2d, eps=1e-6) if isinstance(network, ConvNeXt) else None)


def swin_maps(*, img_size: int, **options) -> SwinTransformer:
    """timm's Swin as an encoder of four maps of any image; `img_size` means nothing."""
    encoder = StageMaps(swin(**{**options, 'img_size': 32, 'always_partition': True}))
    encoder.fixed_size = None
    return encoder


def resnet_maps(*, output_stride: int = 32, deep_stem: bool = False, **options) -> nn.Module:
    """timm's ResNet as an encoder of four maps. `deep_stem`: three 3 x 3 convolutions for the 7 x 7 one."""
    stem = dict(stem_width=32, stem_type='deep') if deep_stem else {}
    return any_maps(**{**options, 'output_stride': output_stride, **stem})


def convnext_maps(*, init_values: float | None = None, **options) -> nn.Module:
    """timm's ConvNeXt as an encoder of four maps. `init_values`: of LayerScale, by default timm's."""
    return any_maps(**options, **({} if init_values is None else {'ls_init_value': init_values}))


def vit_site(encoder: nn.Module, mask_layer: int) -> str:
    """0: the patches, without positions; k: before block k - 1."""
    if not 0 <= mask_layer < len(encoder.blocks):
        raise ValueError(f'mask_layer {mask_layer} of {len(encoder.blocks)} blocks')
    return ('patch_embed', 'pos_drop')[mask_layer] if mask_layer < 2 else f'blocks.{mask_layer - 2}'


def stage_site(modules: tuple[str, ...], encoder: nn.Module, mask_layer: int) -> str:
    """k: after the k-th of the modules."""
    if not 0 <= mask_layer < len(modules):
        raise ValueError(f'mask_layer {mask_layer} of {len(modules)}')
    return modules[mask_layer]


BEIT = dict(rel_pos_bias=True, init_values=0.1)
VIT = Backbone(
    beit,
    vit_site,
    partial(windowed_vit, **BEIT),
    SEGMENTER_VIT,
    segmenter_maps=partial(vit_backbone, **BEIT),
)
RESNET = Backbone(
    resnet,
    partial(stage_site, ('maxpool', 'layer1', 'layer2', 'layer3')),
    resnet_maps,
    dict(head='fcn'),
)
CONVNEXT = Backbone(  # its last map is normed, not pooled
    any_timm,
    partial(stage_site, tuple(f'stages.{stage}.downsample' for stage in range(4))),
    convnext_maps,
    dict(init_values=1.0),
    lambda encoder, imgs: encoder.head.norm(encoder.forward_features(imgs)),
)
SWIN = Backbone(
    swin,
    partial(stage_site, ('patch_embed', *(f'layers.{stage}.downsample' for stage in range(4)))),
    swin_maps,
    {},
)
ANY = Backbone(any_timm, any_site, any_encoder, dict(out_indices=quarters), segmenter_maps=any_maps)

# --------------------------------------------------------------------------
# sizes, and what the published configurations set around them

SWIN_192 = dict(backbone=SWIN, img_size=192, window_size=6)
ENCODERS: dict[str, dict] = {
    # for quick trials at 32 and 64 pixels; not in the paper
    'vit_tiny': dict(backbone=VIT, patch_size=8, embed_dim=96, depth=4, num_heads=3),
    'resnet_tiny': dict(
        backbone=RESNET, name='resnet18', layers=(1, 1, 1, 1), channels=(32, 64, 128, 256), output_stride=8
    ),
    'convnext_pico': dict(backbone=CONVNEXT, name='convnext_tiny', depths=(1, 1, 2, 1), dims=(32, 64, 96, 128)),
    'swin_pico': dict(backbone=SWIN, embed_dim=48, depths=(1, 1, 2, 1), num_heads=(2, 4, 4, 8), window_size=4),
    # the small ViT is wider and shallower than DeiT's
    'vit_small': dict(backbone=VIT, embed_dim=768, depth=8, num_heads=8, mlp_ratio=3),
    'vit_base': dict(backbone=VIT, embed_dim=768, depth=12, num_heads=12),
    'vit_large': dict(backbone=VIT, embed_dim=1024, depth=24, num_heads=16),
    **{name: dict(backbone=RESNET, name=name) for name in ('resnet50', 'resnet101', 'resnet152', 'resnet200')},
    **{name: dict(backbone=CONVNEXT, name=name) for name in ('convnext_tiny', 'convnext_small', 'convnext_base')},
    'swin_tiny': dict(SWIN_192, embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24)),
    'swin_base': dict(SWIN_192, embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32)),
    'timm': dict(backbone=ANY, name='resnet50'),
}

# what the published configurations set for all encoders of a family
A2MIM_VIT = dict(drop_path_rate=0.1)
A2MIM_CNN = dict(mask_init=1e-6, token_lr_scale=0.1, fft_unmask_weight=1e-3)
A2MIM_CONVNEXT = dict(A2MIM_CNN, token_std=0.0)  # the published code's initialiser does nothing
SIMMIM = dict(mask_color='none', replace=True)
SIMMIM_VIT = dict(SIMMIM, drop_path_rate=0.1)
SIMMIM_CONVNEXT = dict(mask_color='none', token_std=0.0)

# every `--model`; its name is the method's and, after the first '_', that of an encoder above
# fmt: off
MODELS: dict[str, dict] = {
    # for quick trials; not in the paper
    'a2mim_vit_tiny':       dict(A2MIM_VIT,      mask_layer=0, loss='l1',       fft_weight=0.1, mask_patch_size=8),
    'a2mim_resnet_tiny':    dict(A2MIM_CNN,      mask_layer=3, loss='focal_l1', fft_weight=0.5, mask_patch_size=8),
    'a2mim_convnext_pico':  dict(A2MIM_CONVNEXT, mask_layer=3, loss='focal_l1', fft_weight=0.0),
    'simmim_vit_tiny':      dict(SIMMIM_VIT, mask_patch_size=8),
    'simmim_swin_pico':     dict(SIMMIM, mask_patch_size=16),

    'a2mim_vit_small':      dict(A2MIM_VIT,      mask_layer=0, loss='l1',       fft_weight=0.1, fft_focal=True),
    'a2mim_vit_base':       dict(A2MIM_VIT,      mask_layer=0, loss='l1',       fft_weight=0.1, fft_focal=True),
    'a2mim_vit_large':      dict(A2MIM_VIT,      mask_layer=0, loss='l1',       fft_weight=0.1, fft_focal=True),
    'a2mim_resnet50':       dict(A2MIM_CNN,      mask_layer=3, loss='focal_l1', fft_weight=0.5, fft_focal=True),
    'a2mim_resnet101':      dict(A2MIM_CNN,      mask_layer=3, loss='focal_l1', fft_weight=0.1, fft_focal=False),
    'a2mim_resnet152':      dict(A2MIM_CNN,      mask_layer=3, loss='focal_l1', fft_weight=0.1, fft_focal=False),
    'a2mim_resnet200':      dict(A2MIM_CNN,      mask_layer=3, loss='focal_l1', fft_weight=0.0),
    'a2mim_convnext_tiny':  dict(A2MIM_CONVNEXT, mask_layer=3, loss='focal_l1', fft_weight=0.0),
    'a2mim_convnext_small': dict(A2MIM_CONVNEXT, mask_layer=3, loss='focal_l1', fft_weight=0.0),
    'a2mim_convnext_base':  dict(A2MIM_CONVNEXT, mask_layer=3, loss='focal_l1', fft_weight=0.0),
    # any network of timm's, by `name`: the token comes before its last stage
    'a2mim_timm':           dict(A2MIM_CNN,   mask_layer=None, loss='focal_l1', fft_weight=0.5, fft_focal=True),

    **dict.fromkeys(('simmim_vit_small', 'simmim_vit_base', 'simmim_vit_large'), SIMMIM_VIT),
    **dict.fromkeys(('simmim_resnet50', 'simmim_resnet101', 'simmim_resnet152', 'simmim_resnet200'), SIMMIM),
    **dict.fromkeys(('simmim_convnext_tiny', 'simmim_convnext_small', 'simmim_convnext_base'), SIMMIM_CONVNEXT),
    **dict.fromkeys(('simmim_swin_tiny', 'simmim_swin_base'), SIMMIM),
}
# fmt: on
__all__ = [*MODELS]


globals().update(
    {name: factory(A2MIM, name, **ENCODERS[name.partition('_')[2]], **options) for name, options in MODELS.items()}
)

# --------------------------------------------------------------------------
# classifier, optimiser rules


def create_classifier(
    name: str, /, num_classes: int = 1000, drop_path_rate: float = 0.0, img_size: int = 224, **kwargs
) -> nn.Module:
    """timm's network of a pretraining model's size: what it is fine-tuned as.

    Networks with a class token classify the average of their patch tokens (the published ViTs norm it, `fc_norm`), or
    with `global_pool='token'` the class token. Raises ValueError for a size that does not divide.
    """
    sizes_of(MODELS, name)
    check_sizes(kwargs)
    sizes = {**ENCODERS[name.partition('_')[2]], **kwargs}
    backbone, pool = sizes.pop('backbone'), sizes.pop('global_pool', None)
    sizes |= dict(img_size=img_size, num_classes=num_classes, drop_path_rate=drop_path_rate)
    if backbone is not VIT and pool in (None, 'token'):
        model = backbone.make(**sizes)
        if not getattr(model, 'num_prefix_tokens', 0):
            if pool == 'token':
                raise ValueError(f'{name} has no class token to classify')
            return model
    return backbone.make(**sizes, global_pool=pool or 'avg')


def create_backbone(name: str, /, drop_path_rate: float = 0.0, img_size: int = 224, **kwargs) -> nn.Module:
    """timm's network of this size without its head, as an encoder of any image.

    Keywords are the network's own; a ViT's are `windowed_vit`'s, and `output_stride` of a ResNet is 32 unless given.
    `img_size` is that of pretraining, which positions are made for.
    """
    sizes_of(MODELS, name)
    backbone = ENCODERS[name.partition('_')[2]]['backbone']
    return backbone.maps(**map_sizes(name, drop_path_rate, img_size, kwargs))


def map_sizes(name: str, drop_path_rate: float, img_size: int, sizes: dict) -> dict:
    """Keywords of the encoder of dense tasks: the table's, and what replaces them."""
    check_sizes(sizes)
    table = ENCODERS[name.partition('_')[2]]
    table = {key: value for key, value in table.items() if key not in ('backbone', 'output_stride')}
    return {**table, **sizes, 'img_size': img_size, 'drop_path_rate': drop_path_rate}


def create_segmenter(
    name: str, /, num_classes: int = 150, drop_path_rate: float = 0.0, img_size: int = 512, **kwargs
) -> Segmenter:
    """UPerNet on the encoder, or with `head='fcn'`, which is a ResNet's default, FCN at stride 8.

    Keywords are those of `create_backbone` and of `with_heads`. The published ViT with relative positions alone is
    `abs_pos_embed=False, init_values=0.1`. Raises ValueError for a size that does not divide.
    """
    sizes_of(MODELS, name)
    backbone = ENCODERS[name.partition('_')[2]]['backbone']
    heads, sizes = split_options({**backbone.segmenter, **kwargs})
    if backbone is RESNET and heads['head'] == 'fcn':
        sizes = {'output_stride': 8, **sizes}
    maps = backbone.segmenter_maps or backbone.maps
    encoder = maps(**map_sizes(name, drop_path_rate, img_size, sizes))
    return with_heads(encoder, num_classes, fixed_size=encoder.fixed_size, **heads)


# Encoder parameters without weight decay. The published patterns miss some norms, which decay: `downsample.1.weight` of
# ResNets; all LayerNorms of ConvNeXt in pretraining, and in fine-tuning those of its stem and down-sampling.
UNDECAYED = {
    Beit: 'bias|norm|gamma|pos_embed|cls_token',
    ResNet: r'bias|bn\d\.weight',
    ConvNeXt: 'bias|norm|gamma',
    SwinTransformer: 'bias|norm',
}


def param_rules(model: nn.Module, *, gamma_as_weight: bool | None = None) -> dict[str, tuple[int, float, bool]]:
    """{name: (layer_id, lr_scale, decays)} for every trainable parameter, as the published configurations group them.

    The mask token never decays. It learns at `token_lr_scale` times the rate, which is a tenth for A2MIM's CNNs.
    `mask_gamma` follows the token, or with `gamma_as_weight` all other weights: it decays, and learns at the full rate.
    This is the default for ResNets, because their 300-epoch configurations forget `mask_gamma`.
    """
    if isinstance(model, Segmenter):
        return segmenter_param_rules(model)
    if isinstance(model, GeneralizedRCNN):
        return detector_param_rules(model)
    pretraining = isinstance(model, A2MIM)
    encoder = model.encoder if pretraining else model
    if gamma_as_weight is None:
        gamma_as_weight = isinstance(encoder, ResNet)
    undecayed = UNDECAYED.get(type(encoder))
    if pretraining and isinstance(encoder, ConvNeXt):
        undecayed = 'bias|gamma'
    own_rule = encoder.no_weight_decay() if hasattr(encoder, 'no_weight_decay') else ()
    ids = layer_ids(encoder)
    last = max(ids.values()) + pretraining

    rules = {}
    for name, param in model.named_parameters():
        if not param.requires_grad:
            continue
        own = name.removeprefix('encoder.') if pretraining else name
        if name == 'mask_token' or (name == 'mask_gamma' and not gamma_as_weight):
            rules[name] = (last, model.token_lr_scale, False)
        elif name == 'mask_gamma':
            rules[name] = (last, 1.0, True)
        else:
            by_shape = param.ndim > 1 and 'bias' not in own and own not in own_rule
            decays = not re.search(undecayed, own) if undecayed else by_shape
            rules[name] = (ids.get(own, last), 1.0, decays)
    return rules


def segmenter_param_rules(model: Segmenter) -> dict[str, tuple[int, float, bool]]:
    """Of a segmenter: all of a ResNet's parameters decay, the heads' too; a ConvNeXt's new norms learn as the heads."""
    ids = {name: layer_id for name, layer_id in layer_ids(model.encoder).items() if not re.match(r'norm\d', name)}
    last = max(ids.values()) + 1
    if isinstance(model.encoder, ResNet):
        return segmenter_rules(model, lambda name: ids[name], last, decays=lambda name, param: True)
    if isinstance(model.encoder, SwinTransformer):
        return segmenter_rules(model, lambda name: ids.get(name, last), last, swin_decays)
    return segmenter_rules(model, lambda name: ids.get(name, last), last)


def detector_param_rules(model: GeneralizedRCNN) -> dict[str, tuple[int, float, bool]]:
    """Of a detector: a ConvNeXt's decays as its segmenter does, and so does a Swin's."""
    encoder = encoder_of(model)
    ids = {name: layer_id for name, layer_id in layer_ids(encoder).items() if not re.match(r'norm\d', name)}
    last = max(ids.values()) + 1
    decays = {ConvNeXt: lambda name, param: param.ndim > 1, SwinTransformer: swin_decays}
    decays = next((rule for kind, rule in decays.items() if isinstance(encoder, kind)), None)
    return detector_rules(model, lambda name: ids.get(name, last), last, decays)


def layer_ids(encoder: nn.Module) -> dict[str, int]:
    """{name: layer id} of an encoder: timm's, by stages where timm has none, and BEiT's rule for ConvNeXt.

    Beit's `norm` has none: it serves the class token's classifier and counts as a part of the head.
    """
    if isinstance(encoder, ConvNeXt):
        return {name: convnext_layer(name, encoder) for name, _ in encoder.named_parameters()}
    if isinstance(encoder, WindowedViT):
        names = [name for name, _ in encoder.named_parameters()]
        return {name: int(name.split('.')[1]) + 1 if name.startswith('blocks.') else 0 for name in names}
    if not hasattr(encoder, 'group_matcher'):
        return stage_layers(encoder)
    ids = group_parameters(encoder, encoder.group_matcher(), reverse=True)
    if isinstance(encoder, Beit):  # timm counts it with the last block
        ids = {name: layer_id for name, layer_id in ids.items() if not name.startswith('norm.')}
    return ids


def convnext_layer(name: str, encoder: ConvNeXt) -> int:
    """0: stem; 1, 2: the first stages; then the third's blocks by threes, and the last stage; the head."""
    last = 3 + math.ceil(len(encoder.stages[2].blocks) / 3)
    found = re.match(r'stages\.(\d)\.(?:downsample|blocks\.(\d+))', name)
    if not found:
        return 0 if name.startswith('stem') else last + 1
    stage, block = int(found[1]), int(found[2] or 0)
    return (1, 2, 3 + block // 3, last)[stage]
