"""A method that no paper has: visible patches pass through a few blocks, one linear layer predicts the hidden ones."""

from typing import NamedTuple

import torch
from timm.layers import PatchEmbed
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from util.nn.checks import check_divides
from util.nn.models import eval_mode, factory
from util.nn.patches import first_panels, patch_mask_to_pixels, patchify, random_plan, unpatchify

__all__ = ['fifth_tiny']


class FifthPlan(NamedTuple):
    """Which patches each sample hides."""

    mask: Tensor  # [N, L] float32, 1 = hidden


class Encoder(nn.Module):
    """Patches p pixels wide, blocks, a norm."""

    def __init__(self, *, img_size: int = 32, patch_size: int = 8, width: int = 24, depth: int = 2):
        super().__init__()
        check_divides(img_size, patch_size, 'patch_size')
        self.patch_size, self.num_patches = patch_size, (img_size // patch_size) ** 2
        self.patch_embed = PatchEmbed(img_size, patch_size, 3, width)
        self.blocks = nn.ModuleList(Block(width, num_heads=2, qkv_bias=True) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def encode(self, x: Tensor) -> Tensor:
        """Embedded patches [N, L, D] -> normed tokens [N, L, D]."""
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Fifth(Encoder):
    mask_scope = 'sample'

    def __init__(self, *, mask_ratio: float = 0.5, **encoder):
        super().__init__(**encoder)
        self.mask_ratio = mask_ratio
        self.mask_token = nn.Parameter(torch.zeros(self.norm.weight.shape[0]))
        self.pred = nn.Linear(len(self.mask_token), 3 * self.patch_size**2)

    def noise_shape(self, n: int) -> tuple[int, int]:
        return n, self.num_patches

    def plan_from_noise(self, noise: Tensor) -> FifthPlan:
        order = noise.argsort(dim=1, stable=True)
        return FifthPlan((order.argsort(dim=1) < int(self.num_patches * self.mask_ratio)).float())

    def predict(self, imgs: Tensor, plan: FifthPlan) -> Tensor:
        hidden = plan.mask.unsqueeze(-1)
        x = self.patch_embed(imgs)
        return self.pred(self.encode(x * (1 - hidden) + self.mask_token * hidden))

    def forward(self, imgs: Tensor, plan: FifthPlan | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        plan = plan or random_plan(self, imgs)
        error = (self.predict(imgs, plan).float() - patchify(imgs.float(), self.patch_size)).square().mean(dim=-1)
        loss = (error * plan.mask).sum() / plan.mask.sum()
        return loss, {'hidden_loss': loss.detach()}

    @torch.no_grad()
    def reconstruct(self, imgs: Tensor, plan: FifthPlan) -> dict[str, Tensor]:
        with eval_mode(self):
            prediction = unpatchify(self.predict(imgs, plan).float(), self.patch_size)
        return first_panels(imgs, patch_mask_to_pixels(plan.mask, self.patch_size), {'': prediction})

    def encoder_state_dict(self) -> dict[str, Tensor]:
        return {k: v for k, v in self.state_dict().items() if k.split('.')[0] in ('patch_embed', 'blocks', 'norm')}


class FifthClassifier(Encoder):
    def __init__(self, *, num_classes: int, **encoder):
        super().__init__(**encoder)
        self.head = nn.Linear(self.norm.weight.shape[0], num_classes)

    def forward(self, imgs: Tensor) -> Tensor:
        return self.head(self.encode(self.patch_embed(imgs)).mean(dim=1))


fifth_tiny = factory(Fifth, 'fifth_tiny', width=24)


def create_classifier(
    name: str, num_classes: int = 1000, drop_path_rate: float = 0.0, img_size: int = 32, **kwargs
) -> FifthClassifier:
    if drop_path_rate:
        raise ValueError(f'{name} has no drop path; --drop_path 0 goes without')
    if kwargs.pop('global_pool', 'avg') != 'avg':
        raise ValueError(f'{name} has no class token to classify')
    return FifthClassifier(num_classes=num_classes, img_size=img_size, **kwargs)


def param_rules(model: Encoder) -> dict[str, tuple[int, float, bool]]:
    last = len(model.blocks) + 1

    def layer_id(name: str) -> int:
        first, second, *_ = *name.split('.'), ''
        return {'patch_embed': 0, 'blocks': int(second or 0) + 1 if second.isdigit() else last}.get(first, last)

    return {name: (layer_id(name), 1.0, param.ndim > 1) for name, param in model.named_parameters()}
