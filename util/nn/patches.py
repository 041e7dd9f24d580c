"""Patches and masks: pure tensor functions without state.

Masks are 1 = hidden, 0 = visible, everywhere in this project.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn


class MaskPlan(NamedTuple):
    """Which of L patches each sample shows; N samples, K of them kept."""

    ids_keep: Tensor  # [N, K] int64, visible patches in the order in which the encoder sees them
    ids_hidden: Tensor  # [N, L - K] int64, hidden patches in the order in which the decoder appends them
    mask: Tensor  # [N, L] float32, 1 = hidden


def mask_plan(noise: Tensor, num_keep: int) -> MaskPlan:
    """Keep the `num_keep` patches with the smallest noise [N, L], in ascending order of it (MAE's random masking)."""
    order = noise.argsort(dim=1, stable=True)
    # contiguous, since only such tensors travel to a GPU without the host waiting
    ids_keep, ids_hidden = order[:, :num_keep].contiguous(), order[:, num_keep:].contiguous()
    mask = torch.ones_like(noise).scatter_(1, ids_keep, 0.0)
    return MaskPlan(ids_keep, ids_hidden, mask)


def random_plan(model: nn.Module, imgs: Tensor) -> NamedTuple:
    """A plan for images [N, 3, H, W] that come without one, from torch's own generator, on the images' device."""
    plan = model.plan_from_noise(torch.rand(model.noise_shape(len(imgs))))
    return type(plan)(*(tensor.to(imgs.device) for tensor in plan))


def gather_tokens(tokens: Tensor, ids: Tensor) -> Tensor:
    """tokens [N, L, D] (or [1, L, D]), ids [N, K] -> [N, K, D]."""
    tokens = tokens.expand(ids.shape[0], -1, -1)
    return tokens.gather(1, ids.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def patchify(imgs: Tensor, patch_size: int) -> Tensor:
    """[N, C, H, W] -> [N, L, p*p*C]; inside a patch the order is (row, column, channel)."""
    n, c, h, w = imgs.shape
    p = patch_size
    x = imgs.reshape(n, c, h // p, p, w // p, p)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(n, (h // p) * (w // p), p * p * c)


def unpatchify(patches: Tensor, patch_size: int, channels: int = 3) -> Tensor:
    """[N, L, p*p*C] of a square image -> [N, C, H, W]: the inverse of `patchify`."""
    n, length, _ = patches.shape
    p, side = patch_size, round(length**0.5)
    x = patches.reshape(n, side, side, p, p, channels)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(n, channels, side * p, side * p)


def patch_stats(patches: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Mean and sqrt(unbiased variance + eps) of each patch: two [N, L, 1] (MAE's `norm_pix_loss`)."""
    var, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return mean, (var + eps).sqrt()


def normalise_patches(patches: Tensor) -> Tensor:
    """Patches [N, L, D], each less its mean and divided by its deviation: the target of `norm_pix_loss`."""
    mean, std = patch_stats(patches)
    return (patches - mean) / std


def visible_mean(values: Tensor, visible: Tensor) -> Tensor:
    """[N, L, 1], averaged over patches by their visible share [N or 1, L, 1]: [N, 1, 1]."""
    return (values * visible).sum(dim=1, keepdim=True) / visible.sum(dim=1, keepdim=True)


def pixel_scales(imgs: Tensor, mask: Tensor, patch_size: int, normalised: bool) -> dict[str, tuple]:
    """The mean and deviation with which predicted patches become pixels: {what a panel's name ends with: the two}.

    imgs [N, 3, H, W], hidden cells [N or 1, L] of any size. Predictions of `normalised` patches lack mean and
    deviation. The honest way comes first: the average of visible patches, two [N, 1, 1]. Then the oracle: each patch's
    own, two [N, L', 1], which give the answer's brightness and contrast away.
    """
    if not normalised:
        return {'': (0.0, 1.0)}
    cell = imgs.shape[-1] // round(mask.shape[1] ** 0.5)
    size = min(patch_size, cell)  # larger patches than cells may be visible in part only
    visible = 1 - patch_mask_to_pixels(mask, cell // size).flatten(1).unsqueeze(-1)
    honest = tuple(visible_mean(stat, visible) for stat in patch_stats(patchify(imgs.float(), size)))
    return {'': honest, ' (oracle)': patch_stats(patchify(imgs.float(), patch_size))}


def first_panels(
    imgs: Tensor, hidden: Tensor, predictions: dict[str, Tensor], masked: Tensor | None = None
) -> dict[str, Tensor]:
    """What every method shows first, [N, 3, H, W] each: `composite`, `masked`, `original`, and further composites.

    A composite is the image where it was visible, a prediction where `hidden` [N or 1, 1, H, W] is not 0. `predictions`
    is {what its composite's name ends with: [N, 3, H, W]}, '' first; `masked` what the network saw, if not plain gray
    in place of what is hidden.
    """
    composites = {f'composite{kind}': torch.where(hidden > 0, pred.float(), imgs) for kind, pred in predictions.items()}
    masked = left_out(imgs, hidden == 0) if masked is None else masked
    return {'composite': composites['composite'], 'masked': masked, 'original': imgs} | composites


def left_out(picture: Tensor, shown: Tensor) -> Tensor:
    """[N, 3, H, W] where `shown` [N or 1, 1, H, W] is not 0, elsewhere the normalisation's mean: a plain gray."""
    return torch.where(shown > 0, picture, 0.0)


def patch_mask_to_pixels(mask: Tensor, patch_size: int) -> Tensor:
    """[N, L] of a square grid -> [N, 1, H, W]."""
    n, length = mask.shape
    side = round(length**0.5)
    mask = mask.reshape(n, 1, side, side)
    return mask.repeat_interleave(patch_size, dim=2).repeat_interleave(patch_size, dim=3)
