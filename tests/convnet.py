"""A method file in small: a ResNet with BatchNorm, for what the machinery does with networks that convolve."""

from timm.models.resnet import BasicBlock, ResNet
from torch import nn

__all__ = ['tiny_resnet']  # noqa: F822, a name for --model; it is fine-tuned only


def create_classifier(
    name: str, num_classes: int = 1000, drop_path_rate: float = 0.0, img_size: int = 224, **kwargs
) -> ResNet:
    return ResNet(BasicBlock, (1, 1, 1, 1), num_classes, channels=(8, 16, 16, 32), drop_path_rate=drop_path_rate)


def param_rules(model: nn.Module, *, decay_norms: bool = False) -> dict[str, tuple[int, float, bool]]:
    return {name: (0, 1.0, decay_norms or param.ndim > 1) for name, param in model.named_parameters()}
