"""What MAE-style ViTs share: the epsilon of their norms, and the classifier that they are fine-tuned as."""

from functools import partial

from timm.models.vision_transformer import VisionTransformer
from torch import nn

from util.nn.checks import check_divides
from util.nn.models import as_timm

norm_layer = partial(nn.LayerNorm, eps=1e-6)  # torch's own default is 1e-5


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
