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

Shapes: N batch, S image side, n = S / 32 cells a side, C width of a map, e its stride. Mask: 1 = hidden.

Where the published code and the paper differ, this follows the code: the focal Fourier loss compares the spectra of the
batch's *means*, so it depends on the batch of each process; visible pixels enter it as a constant halfway between
prediction and image; CNNs train with a focal L1 and most of them without the Fourier term; SimMIM's ConvNeXt adds the
token to features that have seen the hidden pixels (`replace=True` mends that).
"""

import copy
import difflib
import inspect
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from timm.models import group_parameters
from timm.models.beit import Beit
from timm.models.convnext import ConvNeXt
from timm.models.resnet import ResNet
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from util.nn.patches import patch_mask_to_pixels, random_plan

LAYER_NORM_EPS = 1e-6


class CellPlan(NamedTuple):
    """Which cells each sample hides."""

    mask: Tensor  # [N, T] float32, T = n * n, 1 = hidden


# --------------------------------------------------------------------------
# losses


def pixel_loss(distance: Tensor, mode: str, alpha: float, gamma: float, activate: str, residual: bool) -> Tensor:
    """Elementwise loss of |prediction - target| (any shape). `alpha` to `residual` shape the two focal modes.

    Source: `regression_loss.py` of OpenMixup; the focal ones weigh each element by its own, undetached, distance.
    """
    power = 2 if mode in ('mse', 'focal_mse') else 1
    if mode in ('l1', 'mse'):
        return distance**power
    if mode in ('focal_l1', 'focal_mse'):
        focus = (alpha * distance).tanh() if activate == 'tanh' else 2 * (alpha * distance).sigmoid() - 1
        return distance**power * (focus**gamma + residual)
    if mode == 'huber':
        return torch.where(distance < 1, 0.5 * distance**2, distance - 0.5)
    if mode == 'charbonnier':
        return (distance**2 + 1e-12).sqrt()
    # balanced L1 (Libra R-CNN), with alpha 0.5, gamma 1.5, beta 1
    b = math.e**3 - 1
    near = 0.5 / b * (b * distance + 1) * (b * distance).log1p() - 0.5 * distance
    return torch.where(distance < 1, near, 1.5 * distance + 1.5 / b - 0.5)


PIXEL_LOSSES = ('l1', 'mse', 'huber', 'charbonnier', 'balanced_l1', 'focal_l1', 'focal_mse')


def half_spectrum(difference: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal 2-D spectrum of real maps [..., H, W] and weights of its columns, of mean 1.

    Spectra of real maps are symmetric: [..., H, W // 2 + 1] complex is enough, and what is weighted by [W // 2 + 1] has
    the whole spectrum's mean.
    """
    width = difference.shape[-1]
    spectrum = torch.fft.rfft2(difference, norm='ortho')
    counts = torch.full((spectrum.shape[-1],), 2.0, device=difference.device)
    counts[0] = 1.0
    if width % 2 == 0:
        counts[-1] = 1.0
    return spectrum, counts / width * spectrum.shape[-1]


def focal_frequency_loss(
    difference: Tensor,
    alpha: float = 1.0,
    ave_spectrum: bool = True,
    log_matrix: bool = True,
    batch_matrix: bool = True,
) -> Tensor:
    """Squared spectral distance, weighted by itself (Jiang et al., ICCV 2021). difference [N, C, H, W] -> scalar.

    The Fourier transform is linear, so the difference of two batch-averaged spectra (`ave_spectrum`) is the spectrum of
    the averaged difference: one image is transformed, not 2 N. `batch_matrix` scales all weights by their common
    maximum, else each channel of each spectrum by its own (which the published code cannot run).
    """
    if ave_spectrum:
        difference = difference.mean(dim=0, keepdim=True)
    spectrum, counts = half_spectrum(difference)
    squares = spectrum.real**2 + spectrum.imag**2
    weights = squares.detach() ** (alpha / 2)
    if log_matrix:
        weights = weights.log1p()
    weights = weights / weights.amax(dim=None if batch_matrix else (-2, -1), keepdim=True)
    weights = weights.nan_to_num(0.0).clamp(0.0, 1.0)  # equal images: 0 / 0
    return (weights * squares * counts).mean()


# --------------------------------------------------------------------------
# the place of the mask token


class Site(NamedTuple):
    """Where the mask token joins the features, and what the encoder makes of an image in the end."""

    layout: str  # of the features at the site: 'NCHW', 'NHWC' or 'NLC'
    prefix: int  # leading tokens of 'NLC' that are no patches
    width: int  # channels there
    side: int  # positions a side there
    end: tuple[str, int, int, int]  # the same four of the last map
    unused: list[str]  # parameters that the last map does not depend on


def layout_of(shape: torch.Size, encoder: nn.Module, img_size: int) -> tuple[str, int, int, int]:
    """(layout, prefix tokens, width, side) of features of one image. Raises ValueError for what is no square map."""
    if len(shape) == 4:
        nchw, nhwc = shape[2] == shape[3], shape[1] == shape[2]
        if nchw and nhwc:  # as many channels as positions a side
            nhwc = getattr(encoder, 'output_fmt', 'NCHW') == 'NHWC'
        if nhwc:
            return 'NHWC', 0, shape[3], shape[1]
        if nchw:
            return 'NCHW', 0, shape[1], shape[2]
    if len(shape) == 3:
        for prefix in (0, getattr(encoder, 'num_prefix_tokens', 0)):
            side = math.isqrt(shape[1] - prefix)
            if side * side == shape[1] - prefix and img_size % max(side, 1) == 0:
                return 'NLC', prefix, shape[2], side
    raise ValueError(f'features of shape {list(shape)} are no square map')


def find_site(encoder: nn.Module, features: Callable, name: str, img_size: int) -> Site:
    """What an image becomes at the output of module `name` and at the end, tried on a copy without storage.

    Raises ValueError for a place that the mask token cannot have.
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
    seen, last = features_at(module, imgs, lambda imgs: features(trial, imgs))
    last.sum().backward()
    _, rest = features_at(module, imgs, lambda imgs: features(trial, imgs), cut=True)
    if rest.requires_grad and torch.autograd.grad(rest.sum(), imgs, allow_unused=True)[0] is not None:
        raise ValueError(f'the mask token cannot come after {name}: the image goes round it')
    here, end = layout_of(seen.shape, encoder, img_size), layout_of(last.shape, encoder, img_size)

    strides = [info['reduction'] for info in getattr(encoder, 'feature_info', [])]
    if len(set(strides)) > 1 and here[0] == 'NLC':
        raise ValueError(f'the tokens after {name} may be in another order than the image; no mask can be laid on them')
    if img_size % here[3] or img_size % end[3]:
        raise ValueError(f'img_size {img_size} is not a multiple of its {here[3]} and {end[3]} positions a side')
    if strides and img_size // end[3] != strides[-1]:
        raise ValueError(f'the last map has stride {img_size // end[3]}, the last features {strides[-1]}')
    return Site(*here, end, [key for key, param in trial.named_parameters() if param.grad is None])


def features_at(module: nn.Module, imgs: Tensor, features: Callable, cut: bool = False) -> tuple[Tensor, Tensor]:
    """A module's output and the last map; `cut` keeps gradients from passing the module. Raises ValueError."""
    seen = []
    handle = module.register_forward_hook(lambda module, args, x: seen.append(x) or (x.detach() if cut else None))
    try:
        last = features(imgs)
    except Exception as error:  # whatever a network raises that cannot take such images
        raise ValueError(
            f'the encoder cannot take images of this size: {str(error) or type(error).__name__}'
        ) from error
    finally:
        handle.remove()
    if len(seen) != 1:
        raise ValueError(f'the mask token cannot come after a module that runs {len(seen)} times in a forward')
    if not isinstance(seen[0], Tensor) or not isinstance(last, Tensor):
        raise ValueError('the mask token cannot be used where features are a list or tuple of maps')
    return seen[0], last


# --------------------------------------------------------------------------
# encoders


class Backbone(NamedTuple):
    """A family of encoders: how to make one, and the name of the module whose output mask layer k's token joins."""

    make: Callable[..., nn.Module]  # (img_size, num_classes, drop_path_rate, **sizes)
    site: Callable[[nn.Module, Any], str]
    features: Callable[[nn.Module, Tensor], Tensor] = lambda encoder, imgs: encoder.forward_features(imgs)


def beit(*, img_size: int, num_classes: int = 0, drop_path_rate: float = 0.0, **sizes) -> Beit:
    """The method's ViT: with absolute *and* relative positions, a bias for q and v only, and LayerScale (BEiT's)."""
    if sizes['embed_dim'] % sizes['num_heads']:
        raise ValueError(f'embed_dim {sizes["embed_dim"]} is not a multiple of its {sizes["num_heads"]} heads')
    if img_size % sizes.get('patch_size', 16):
        raise ValueError(f'img_size {img_size} is not a multiple of patch_size {sizes.get("patch_size", 16)}')
    encoder = Beit(
        img_size=img_size,
        num_classes=num_classes,
        drop_path_rate=drop_path_rate,
        norm_layer=lambda dim, **kwargs: nn.LayerNorm(dim, eps=LAYER_NORM_EPS, **kwargs),
        **{
            'global_pool': 'avg' if num_classes else '',
            'use_abs_pos_emb': True,
            'use_rel_pos_bias': True,
            'init_values': 0.1,
            **sizes,
        },
    )
    for module in encoder.modules():  # timm shrinks the residual branches with depth, the published code does not
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
    if num_classes:
        nn.init.normal_(encoder.head.weight, std=0.01)
        nn.init.zeros_(encoder.head.bias)
    return encoder


def swin(*, img_size: int, num_classes: int = 0, drop_path_rate: float = 0.0, **sizes) -> SwinTransformer:
    """Swin v1; every LayerNorm has eps 1e-5."""
    if img_size % 32:
        raise ValueError(f'img_size {img_size} is not a multiple of 32')
    if unknown := sizes.keys() - inspect.signature(SwinTransformer).parameters.keys():  # older timm's takes anything
        raise TypeError(f'swin() got an unexpected keyword argument {min(unknown)!r}')
    return SwinTransformer(img_size=img_size, num_classes=num_classes, drop_path_rate=drop_path_rate, **sizes)


def check_name(name: str) -> None:
    """Raise ValueError for what is no network of timm's, which would take it for a folder, or for a host's."""
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise ValueError(f'timm has no model {name}' + f'; did you mean {" or ".join(close)}?' * bool(close))


def cnn(*, name: str, img_size: int, num_classes: int = 0, drop_path_rate: float = 0.0, **sizes) -> nn.Module:
    """timm's ResNet (v1.5) or ConvNeXt of this name, at any image size."""
    check_name(name)
    encoder = timm.create_model(name, num_classes=num_classes, drop_path_rate=drop_path_rate, **sizes)
    if num_classes and isinstance(encoder, ResNet):
        nn.init.normal_(encoder.fc.weight, std=0.01)
        nn.init.zeros_(encoder.fc.bias)
    return encoder


def any_timm(*, name: str, img_size: int, num_classes: int = 0, drop_path_rate: float = 0.0, **sizes) -> nn.Module:
    """timm's network of this name. Raises ValueError for an unknown one, and for drop path where it has none."""
    check_name(name)
    options = {'img_size': img_size, 'drop_path_rate': drop_path_rate}
    while True:
        try:
            return timm.create_model(name, num_classes=num_classes, **options, **sizes)
        except TypeError as error:  # convolutions know no img_size, DenseNet and VGG no drop path
            refused = re.search('unexpected keyword.*(img_size|drop_path_rate)', str(error))
            if not refused or refused[1] not in options:
                raise
            if options.pop(refused[1]) and refused[1] == 'drop_path_rate':
                raise ValueError(f'{name} has no drop path; --drop_path 0 goes without') from error


def any_site(encoder: nn.Module, mask_layer: int | None) -> str:
    """Before the last stage, or after the patch embedding where there are no stages; else feature `mask_layer`."""
    features = getattr(encoder, 'feature_info', None)
    if not features:
        raise ValueError(f'{type(encoder).__name__} does not say what its stages are')
    if mask_layer is None:
        same_stride = len({info['reduction'] for info in features}) == 1
        return 'patch_embed' if same_stride else features[-2]['module']
    if not -len(features) <= mask_layer < len(features):
        raise ValueError(f'mask_layer {mask_layer}: {type(encoder).__name__} has {len(features)} feature maps')
    return features[mask_layer]['module']


def vit_site(encoder: nn.Module, mask_layer: int) -> str:
    """0: the patches, without positions; k: before block k - 1."""
    if not 0 <= mask_layer < len(encoder.blocks):
        raise ValueError(f'mask_layer {mask_layer} of {len(encoder.blocks)} blocks')
    return ('patch_embed', 'pos_drop')[mask_layer] if mask_layer < 2 else f'blocks.{mask_layer - 2}'


def stage_site(*places: str) -> Callable[[nn.Module, int], str]:
    def site(encoder: nn.Module, mask_layer: int) -> str:
        if not 0 <= mask_layer < len(places):
            raise ValueError(f'mask_layer {mask_layer} of {len(places)}')
        return places[mask_layer]

    return site


VIT = Backbone(beit, vit_site)
RESNET = Backbone(cnn, stage_site('maxpool', 'layer1', 'layer2', 'layer3'))
CONVNEXT = Backbone(  # its last map is normed, not pooled
    cnn,
    stage_site(*(f'stages.{stage}.downsample' for stage in range(4))),
    lambda encoder, imgs: encoder.head.norm(encoder.forward_features(imgs)),
)
SWIN = Backbone(swin, stage_site('patch_embed', *(f'layers.{stage}.downsample' for stage in range(4))))
ANY = Backbone(any_timm, any_site)

# --------------------------------------------------------------------------
# the model


class A2MIM(nn.Module):
    """Masked image modeling around any encoder (paper section 4; `a2mim.py`, `mim_head.py` of OpenMixup).

    `mask_layer` counts the places of a family. ViT: before block k - 1 (0: before the positions); ResNet: before stage
    k + 1; ConvNeXt: after the down-sampling of stage k; Swin: before stage k - 1 (0: as 1).
    `mask_init` > 0 damps hidden features by a learned gamma of that initial value; `replace` drops them. The
    `mask_token` is 'learnable', or for ablations 'zero', 'randn' (both fixed), 'mean' (of the batch's features),
    'instance_mean', or 'none'. `mask_color='none'` leaves the pixels (published as 'zero' and 'rand').
    Visible pixels weigh `unmask_weight` in the pixel loss, and `fft_unmask_weight` in the Fourier one, where
    `fft_unmask_replace` stands for the rest of them; `fft_alpha` to `fft_batch_matrix` are `focal_frequency_loss`'s.
    Other keywords are the encoder's. Raises ValueError for what cannot be.
    """

    mask_scope = 'sample'

    def __init__(
        self,
        *,
        backbone: Backbone,
        img_size: int = 224,
        mask_patch_size: int = 32,
        mask_ratio: float = 0.6,
        mask_color: str = 'mean',
        mask_layer: int | None = 0,
        mask_token: str = 'learnable',
        mask_init: float = 0.0,
        replace: bool = False,
        detach: bool = False,
        token_std: float = 0.02,
        token_lr_scale: float = 1.0,
        loss: str = 'l1',
        alpha: float = 0.2,
        gamma: float = 1.0,
        activate: str = 'sigmoid',
        residual: bool = False,
        unmask_weight: float = 0.0,
        fft_weight: float = 0.0,
        fft_focal: bool = True,
        fft_reweight: bool = False,
        fft_unmask_weight: float = 0.0,
        fft_unmask_replace: str = 'mixed',
        fft_alpha: float = 1.0,
        fft_ave_spectrum: bool = True,
        fft_log_matrix: bool = True,
        fft_batch_matrix: bool = True,
        drop_path_rate: float = 0.0,
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
        if img_size % mask_patch_size:
            raise ValueError(f'img_size {img_size} is not a multiple of the {mask_patch_size} pixels of a hidden cell')
        self.img_size, self.cells = img_size, img_size // mask_patch_size
        self.num_hidden = math.ceil(self.cells**2 * mask_ratio)
        if not 0 < self.num_hidden < self.cells**2:
            raise ValueError(
                f'mask_ratio {mask_ratio} hides {self.num_hidden} of {self.cells**2} cells; '
                f'at least one must be hidden and one shown'
            )
        self.mask_color, self.replace, self.detach, self.token_mode = mask_color, replace, detach, mask_token
        self.token_lr_scale = token_lr_scale
        self.loss = dict(mode=loss, alpha=alpha, gamma=gamma, activate=activate, residual=residual)
        self.unmask_weight, self.fft_weight, self.fft_focal = unmask_weight, fft_weight, fft_focal
        self.fft_reweight, self.fft_unmask_weight = fft_reweight, fft_unmask_weight
        self.fft_unmask_replace = fft_unmask_replace
        self.focal = dict(
            alpha=fft_alpha,
            ave_spectrum=fft_ave_spectrum,
            log_matrix=fft_log_matrix,
            batch_matrix=fft_batch_matrix,
        )

        self.encoder = backbone.make(img_size=img_size, drop_path_rate=drop_path_rate, **sizes)
        self.features = backbone.features
        site_name = backbone.site(self.encoder, mask_layer)
        self.site = find_site(self.encoder, self.features, site_name, img_size)
        if self.site.side % self.cells:
            raise ValueError(
                f'{self.cells} cells of {mask_patch_size} pixels a side do not fit '
                f'the {self.site.side} positions a side after {site_name}'
            )
        for key in self.site.unused:
            self.encoder.get_parameter(key).requires_grad_(False)
        self.encoder.get_submodule(site_name).register_forward_hook(self.insert_token)
        self.token_mask: Tensor | None = None  # what the hook uses, during forward_encoder only

        self.mask_token = self.mask_gamma = None
        if mask_token in ('learnable', 'zero', 'randn'):
            std = {'learnable': token_std, 'zero': 0.0, 'randn': 1.0}[mask_token]
            learned = mask_token == 'learnable'
            self.mask_token = nn.Parameter(std * torch.randn(self.site.width), requires_grad=learned)
        if mask_init:
            self.mask_gamma = nn.Parameter(torch.full((self.site.width,), mask_init))
        _, _, width, end_side = self.site.end
        self.stride = img_size // end_side
        self.decoder = nn.Conv2d(width, 3 * self.stride**2, kernel_size=1)
        nn.init.trunc_normal_(self.decoder.weight, std=0.02)
        nn.init.zeros_(self.decoder.bias)

    # --------------------------------------------------------------------------
    # masking

    def noise_shape(self, n: int) -> tuple[int, int]:
        """[n, T]: one number per cell of each sample, row by row."""
        return n, self.cells**2

    def plan_from_noise(self, noise: Tensor) -> CellPlan:
        """U[0, 1) CPU noise [n, T] -> CellPlan; the K = ceil(T * mask_ratio) *smallest* of a row are hidden."""
        hidden = noise.argsort(dim=1, stable=True)[:, : self.num_hidden]
        return CellPlan(torch.zeros_like(noise).scatter_(1, hidden, 1.0))

    def fill(self, imgs: Tensor, hidden: Tensor) -> Tensor:
        """imgs [N, 3, S, S], hidden pixels [N, 1, S, S] -> each image's own mean colour where it is hidden."""
        if self.mask_color == 'none':
            return imgs
        return torch.where(hidden > 0, imgs.mean(dim=(2, 3), keepdim=True), imgs)

    # --------------------------------------------------------------------------
    # encoder, decoder, loss

    def insert_token(self, module: nn.Module, args: tuple, features: Tensor) -> Tensor:
        """The hook: the mask token joins the hidden positions of the features, whatever their layout."""
        if self.token_mask is None or self.token_mode == 'none':
            return features
        mask = patch_mask_to_pixels(self.token_mask, self.site.side // self.cells)  # [N, 1, h, w]
        if self.site.layout == 'NHWC':
            mask = mask.permute(0, 2, 3, 1)
        elif self.site.layout == 'NLC':  # a class token is visible
            mask = F.pad(mask.flatten(2).transpose(1, 2), (0, 0, self.site.prefix, 0))
        hidden = self.token_for(features)
        if not self.replace:
            kept = features.detach() if self.detach else features
            hidden = hidden + (kept if self.mask_gamma is None else kept * self.as_channels(self.mask_gamma))
        return (features * (1 - mask) + hidden * mask).to(features.dtype)

    def as_channels(self, vector: Tensor) -> Tensor:
        """[C], to be broadcast over features in the site's layout."""
        return vector.view(-1, 1, 1) if self.site.layout == 'NCHW' else vector

    def token_for(self, features: Tensor) -> Tensor:
        """The mask token, or the mean that stands in for it, to be broadcast over the features."""
        if self.mask_token is not None:
            return self.as_channels(self.mask_token)
        patches = features.detach()[:, self.site.prefix :] if self.site.layout == 'NLC' else features.detach()
        positions = {'NCHW': (2, 3), 'NHWC': (1, 2), 'NLC': (1,)}[self.site.layout]
        mean = patches.mean(dim=positions, keepdim=True)
        return mean.mean(dim=0, keepdim=True) if self.token_mode == 'mean' else mean

    def forward_encoder(self, imgs: Tensor, mask: Tensor) -> Tensor:
        """Filled images [N, 3, S, S], hidden cells [N, T] -> the last map [N, C, S / e, S / e]."""
        self.token_mask = mask
        x = self.features(self.encoder, imgs)
        self.token_mask = None
        layout, prefix, _, side = self.site.end
        if layout == 'NLC':
            return x[:, prefix:].transpose(1, 2).unflatten(2, (side, side))
        return x.permute(0, 3, 1, 2) if layout == 'NHWC' else x

    def forward_decoder(self, x: Tensor) -> Tensor:
        """[N, C, S / e, S / e] -> [N, 3, S, S], in the images' normalised space."""
        return F.pixel_shuffle(self.decoder(x), self.stride)

    def forward_loss(self, imgs: Tensor, pred: Tensor, hidden: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """imgs and pred [N, 3, S, S], hidden pixels [N, 1, S, S] -> the sum of both losses, and each. In float32."""
        with torch.autocast(imgs.device.type, enabled=False):
            imgs, pred = imgs.float(), pred.float()
            weight = hidden + (1 - hidden) * self.unmask_weight
            loss = pixel_loss((pred - imgs).abs(), **self.loss)
            loss = (loss * weight).sum() / (weight.sum() + 1e-5) / imgs.shape[1]
            terms = {'spatial_loss': loss.detach()}
            if self.fft_weight:
                fourier = self.fourier_loss(imgs, pred, hidden)
                terms['fourier_loss'] = fourier.detach()
                loss = loss + self.fft_weight * fourier
        return loss, terms

    def fourier_loss(self, imgs: Tensor, pred: Tensor, hidden: Tensor) -> Tensor:
        """Distance of the spectra of the image and of the prediction, in which constants stand for visible pixels."""
        error = pred - imgs
        constant = {  # what stands for a visible pixel, less the image
            'target': lambda: torch.zeros_like(error),
            'prediction': lambda: error.detach(),
            'mean': lambda: imgs.mean(dim=(2, 3), keepdim=True) - imgs,
            'mixed': lambda: 0.5 * error.detach(),
        }[self.fft_unmask_replace]()
        share = hidden + (1 - hidden) * self.fft_unmask_weight
        difference = error * share + constant * (1 - share)
        if self.fft_focal:
            return focal_frequency_loss(difference, **self.focal)
        spectrum, counts = half_spectrum(difference)
        loss = pixel_loss(spectrum.abs(), **self.loss)
        if self.fft_reweight:
            loss = loss.detach() * loss
        return (loss * counts).mean()

    def forward(self, imgs: Tensor, plan: CellPlan | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """imgs [N, 3, S, S], normalised -> scalar loss; `spatial_loss` and, before its weight, `fourier_loss`."""
        if plan is None:
            plan = random_plan(self, imgs)
        hidden = patch_mask_to_pixels(plan.mask, self.img_size // self.cells)
        x = self.forward_encoder(self.fill(imgs, hidden), plan.mask)
        return self.forward_loss(imgs, self.forward_decoder(x), hidden)

    # --------------------------------------------------------------------------
    # pictures, export

    @torch.no_grad()
    def reconstruct(self, imgs: Tensor, plan: CellPlan) -> dict[str, Tensor]:
        """Panels [N, 3, S, S] in the input's normalised space.

        `prediction` means something at hidden pixels only; `composite` has it there, and the image elsewhere. Spectra
        are log amplitudes averaged over colours, low frequencies in the middle, on the image's scale of grays.
        """
        was_training = self.training
        self.eval()
        hidden = patch_mask_to_pixels(plan.mask, self.img_size // self.cells)
        masked = self.fill(imgs, hidden)
        pred = self.forward_decoder(self.forward_encoder(masked, plan.mask)).float()
        self.train(was_training)
        composite = torch.where(hidden > 0, pred, imgs)
        low, high = log_amplitude(imgs).aminmax(dim=1, keepdim=True)

        def spectrum(x: Tensor) -> Tensor:  # normalised colours are about -2 to 2
            gray = (log_amplitude(x) - low) / (high - low) * 4 - 2
            return gray.view(-1, 1, *x.shape[2:]).expand_as(x)

        return {
            'original': imgs,
            'masked': masked if self.mask_color != 'none' else imgs * (1 - hidden),
            'prediction': pred,
            'composite': composite,
            'spectrum (original)': spectrum(imgs),
            'spectrum (prediction)': spectrum(pred),
            'spectrum (composite)': spectrum(composite),
        }

    def encoder_state_dict(self) -> dict[str, Tensor]:
        """The encoder under timm's names; the ViT's `norm.*` serves the `global_pool='token'` classifier only."""
        return {k.removeprefix('encoder.'): v for k, v in self.state_dict().items() if k.startswith('encoder.')}


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f'{name} {value!r} is not one of {", ".join(choices)}')


def check_sizes(sizes: dict) -> None:
    """Raise ValueError for options of timm's that are not the user's to set here."""
    if ours := sorted(
        sizes.keys() & {'pretrained', 'pretrained_cfg', 'checkpoint_path', 'features_only', 'in_chans', 'num_classes'}
    ):
        raise ValueError(f'{ours[0]} is set by this program')


def log_amplitude(imgs: Tensor) -> Tensor:
    """[N, 3, S, S] -> [N, S * S], averaged over colours, the zero frequency in the middle."""
    amplitude = torch.fft.fftshift(torch.fft.fft2(imgs.float(), norm='ortho').abs(), dim=(2, 3))
    return (amplitude + 1e-6).log().mean(dim=1).flatten(1)


# --------------------------------------------------------------------------
# sizes

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
    'swin_tiny': dict(
        backbone=SWIN, embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24), window_size=6, img_size=192
    ),
    'swin_base': dict(
        backbone=SWIN, embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32), window_size=6, img_size=192
    ),
    'timm': dict(backbone=ANY, name='resnet50'),
}
# what the published configurations set for each family
A2MIM_VIT = dict(drop_path_rate=0.1, fft_weight=0.1)
A2MIM_CNN = dict(mask_layer=3, mask_init=1e-6, token_lr_scale=0.1, loss='focal_l1', fft_unmask_weight=1e-3)
A2MIM_CONVNEXT = dict(A2MIM_CNN, token_std=0.0)  # zero, since the initialiser that it is given to does nothing
SIMMIM = dict(mask_color='none', replace=True)
SIMMIM_CONVNEXT = dict(mask_color='none', token_std=0.0)


def named(name: str, **defaults) -> Callable[..., A2MIM]:
    """The function behind one `--model`: a method's defaults around the encoder that the name ends with."""

    def make(**kwargs) -> A2MIM:
        return A2MIM(**{**ENCODERS[name.partition('_')[2]], **defaults, **kwargs})

    make.__name__ = make.__qualname__ = name
    return make


a2mim_vit_tiny = named('a2mim_vit_tiny', **A2MIM_VIT, mask_patch_size=8)
a2mim_resnet_tiny = named('a2mim_resnet_tiny', **A2MIM_CNN, fft_weight=0.5, mask_patch_size=8)
a2mim_convnext_pico = named('a2mim_convnext_pico', **A2MIM_CONVNEXT)
simmim_swin_pico = named('simmim_swin_pico', **SIMMIM, mask_patch_size=16)

a2mim_vit_small = named('a2mim_vit_small', **A2MIM_VIT)
a2mim_vit_base = named('a2mim_vit_base', **A2MIM_VIT)
a2mim_vit_large = named('a2mim_vit_large', **A2MIM_VIT)
a2mim_resnet50 = named('a2mim_resnet50', **A2MIM_CNN, fft_weight=0.5)
a2mim_resnet101 = named('a2mim_resnet101', **A2MIM_CNN, fft_weight=0.1, fft_focal=False)
a2mim_resnet152 = named('a2mim_resnet152', **A2MIM_CNN, fft_weight=0.1, fft_focal=False)
a2mim_resnet200 = named('a2mim_resnet200', **A2MIM_CNN)
a2mim_convnext_tiny = named('a2mim_convnext_tiny', **A2MIM_CONVNEXT)
a2mim_convnext_small = named('a2mim_convnext_small', **A2MIM_CONVNEXT)
a2mim_convnext_base = named('a2mim_convnext_base', **A2MIM_CONVNEXT)
# any network of timm's, by `name`: the mask token comes before its last stage, with the ResNet-50's options
a2mim_timm = named('a2mim_timm', **{**A2MIM_CNN, 'mask_layer': None}, fft_weight=0.5)

simmim_vit_small = named('simmim_vit_small', **SIMMIM, drop_path_rate=0.1)
simmim_vit_base = named('simmim_vit_base', **SIMMIM, drop_path_rate=0.1)
simmim_vit_large = named('simmim_vit_large', **SIMMIM, drop_path_rate=0.1)
simmim_resnet50 = named('simmim_resnet50', **SIMMIM)
simmim_resnet101 = named('simmim_resnet101', **SIMMIM)
simmim_resnet152 = named('simmim_resnet152', **SIMMIM)
simmim_resnet200 = named('simmim_resnet200', **SIMMIM)
simmim_convnext_tiny = named('simmim_convnext_tiny', **SIMMIM_CONVNEXT)
simmim_convnext_small = named('simmim_convnext_small', **SIMMIM_CONVNEXT)
simmim_convnext_base = named('simmim_convnext_base', **SIMMIM_CONVNEXT)
simmim_swin_tiny = named('simmim_swin_tiny', **SIMMIM)
simmim_swin_base = named('simmim_swin_base', **SIMMIM)

__all__ = [name for name in globals() if re.match('(a2mim|simmim)_', name)]


# --------------------------------------------------------------------------
# classifier, optimiser rules


def create_classifier(
    name: str, /, num_classes: int = 1000, drop_path_rate: float = 0.0, img_size: int = 224, **kwargs
) -> nn.Module:
    """timm's network of a pretraining model's size: what it is fine-tuned as.

    Networks with a class token average their patch tokens (the published ViTs then norm the average, `fc_norm`), or
    with `global_pool='token'` classify the class token. Raises ValueError for a size that does not divide.
    """
    check_sizes(kwargs)
    sizes = {**ENCODERS[name.partition('_')[2]], **kwargs, 'img_size': img_size}
    backbone = sizes.pop('backbone')
    sizes |= dict(num_classes=num_classes, drop_path_rate=drop_path_rate)
    pool = sizes.pop('global_pool', None)
    if backbone is VIT or pool not in (None, 'token'):
        return backbone.make(**sizes, global_pool=pool or 'avg')
    model = backbone.make(**sizes)
    if getattr(model, 'num_prefix_tokens', 0):
        return backbone.make(**sizes, global_pool=pool or 'avg')
    if pool == 'token':
        raise ValueError(f'{name} has no class token to classify')
    return model


# encoder parameters without weight decay; downsample.1.weight of ResNets (a BatchNorm's) is not among them, nor are
# the LayerNorms of ConvNeXt in pretraining, and its stem's and down-sampling ones in fine-tuning
UNDECAYED = {
    Beit: 'bias|norm|gamma|pos_embed|cls_token',
    ResNet: r'bias|bn\d\.weight',
    ConvNeXt: 'bias|norm|gamma',
    SwinTransformer: 'bias|norm',
}


def param_rules(model: nn.Module, *, gamma_as_weight: bool | None = None) -> dict[str, tuple[int, float, bool]]:
    """{name: (layer_id, lr_scale, decays)} for every trainable parameter, as the published configurations group them.

    Mask tokens are never decayed, and those of A2MIM's CNNs learn at a tenth of the rate. So does `mask_gamma`, but
    that the 300-epoch configurations of ResNets forget it: `gamma_as_weight`, by default true for ResNets, decays it at
    the full rate. Layer ids are timm's, by stages where it has none; ConvNeXt's third stage goes by groups of three
    blocks (BEiT's rule).
    """
    encoder = model.encoder if isinstance(model, A2MIM) else model
    if gamma_as_weight is None:
        gamma_as_weight = isinstance(encoder, ResNet)
    undecayed = UNDECAYED.get(type(encoder))
    if isinstance(encoder, ConvNeXt) and isinstance(model, A2MIM):
        undecayed = 'bias|gamma'
    if isinstance(encoder, ConvNeXt):
        layer_ids = {name: convnext_layer(name, encoder) for name, _ in encoder.named_parameters()}
    elif hasattr(encoder, 'group_matcher'):
        layer_ids = group_parameters(encoder, encoder.group_matcher(), reverse=True)
    else:
        layer_ids = stage_layers(encoder)
    last = max(layer_ids.values()) + isinstance(model, A2MIM)
    if isinstance(encoder, Beit):  # of the class token's classifier; timm has it with the last block
        layer_ids |= {'norm.weight': last, 'norm.bias': last}
    own_rule = encoder.no_weight_decay() if hasattr(encoder, 'no_weight_decay') else ()

    rules = {}
    for name, param in model.named_parameters():
        own = name.removeprefix('encoder.') if isinstance(model, A2MIM) else name
        if not param.requires_grad:
            continue
        if name == 'mask_token' or (name == 'mask_gamma' and not gamma_as_weight):
            rules[name] = (last, model.token_lr_scale, False)
        elif name == 'mask_gamma':
            rules[name] = (last, 1.0, True)
        else:
            by_shape = param.ndim > 1 and 'bias' not in own and own not in own_rule
            decays = not re.search(undecayed, own) if undecayed else by_shape
            rules[name] = (layer_ids.get(own, last), 1.0, decays)
    return rules


def stage_layers(encoder: nn.Module) -> dict[str, int]:
    """{name: layer id} by the stages of `feature_info`; 0 before the first, and one for what follows the last."""
    stages = [info['module'] for info in encoder.feature_info]
    layer_ids, layer_id = {}, 0
    for name, _ in encoder.named_parameters():  # in the order of the network
        inside = [i + 1 for i, stage in enumerate(stages) if name.startswith(f'{stage}.')]
        layer_id = inside[0] if inside else len(stages) + 1 if layer_id else 0
        layer_ids[name] = layer_id
    return layer_ids


def convnext_layer(name: str, encoder: ConvNeXt) -> int:
    """0: stem; 1, 2: the first stages; then the third's blocks by threes, and the last stage; the head."""
    last = 3 + math.ceil(len(encoder.stages[2].blocks) / 3)
    place = re.match(r'stages\.(\d)\.(?:downsample|blocks\.(\d+))', name)
    if not place:
        return 0 if name.startswith('stem') else last + 1
    stage, block = int(place[1]), int(place[2] or 0)
    return (1, 2, 3 + block // 3, last)[stage]
