"""From an image to a uint8 crop, for pretraining, fine-tuning and evaluation; and what mixes the images of a batch."""

import argparse
import io
import math
import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import Mixup, auto_augment, create_transform
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import MaybePILToTensor
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import get_dimensions, resized_crop

from util.data import decoders
from util.data.datasets import mae_crop
from util.data.images import decode
from util.errors import UserError

BLANK = torch.zeros(1, 1, 1)  # expanded, an image without memory, of which crops can be drawn

# --------------------------------------------------------------------------
# transforms: PIL image -> uint8 tensor


class QuickCrop(transforms.RandomResizedCrop):
    """torchvision's, by the same draws in less than half the time: for a fast decoder, a twentieth of an image's."""

    @staticmethod
    def get_params(image: Any, scale: Sequence[float], ratio: Sequence[float]) -> tuple[int, int, int, int]:
        _, height, width = get_dimensions(image)
        for _ in range(10):
            area = height * width * torch.empty(1).uniform_(*scale).item()
            shape = torch.empty(1).uniform_(*logarithms(*ratio)).exp_().item()
            w, h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
            if 0 < w <= width and 0 < h <= height:
                return torch.randint(height - h + 1, (1,)).item(), torch.randint(width - w + 1, (1,)).item(), h, w
        h, w = min(height, round(width / ratio[0])), min(width, round(height * ratio[1]))  # the largest, in the middle
        return (height - h) // 2, (width - w) // 2, h, w


@cache
def logarithms(*numbers: float) -> list[float]:
    """In float32, as tensors have them."""
    return torch.tensor(numbers).log().tolist()


class Flip:
    """torchvision's horizontal flip, by the same draw, without its module around it."""

    def __init__(self, share: float):
        self.share = share

    def __call__(self, image: Image.Image | Tensor) -> Image.Image | Tensor:
        if torch.rand(1).item() >= self.share:
            return image
        return image.flip(-1) if isinstance(image, Tensor) else image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


class DecodedCrop:
    """A random crop, resized, drawn as torchvision's or timm's draws it; of a JPEG for a decoder, only that is decoded.

    That is resized by torch's antialiased kernel of 8 bits, which differs from Pillow's resizing by rounding (0.04 of
    255 in the mean). What is Pillow's, or what the decoder refuses, Pillow resizes: to the bit as without this class.
    """

    def __init__(self, crop: Callable, to_pil: bool):
        self.crop, self.to_pil = crop, to_pil

    def __call__(self, image: Image.Image | decoders.Jpeg) -> Image.Image | Tensor:
        """uint8 [3, H, W], in memory as [H, W, 3]; an image where `to_pil`, or where Pillow has made it."""
        crop = self.crop
        if not isinstance(image, decoders.Jpeg):
            return crop(image)
        box = crop.get_params(BLANK.expand(3, image.height, image.width), crop.scale, crop.ratio)
        pixels = image.region(box)
        if pixels is None:
            return resized_crop(decode(io.BytesIO(image.data), math.inf), *box, crop.size, crop.interpolation)
        batch = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)  # as channels_last, or the kernel copies it twice
        resized = F.interpolate(batch, crop.size, mode=crop.interpolation.value, antialias=True)[0]
        return Image.fromarray(resized.permute(1, 2, 0).numpy()) if self.to_pil else resized


class CropFirst(transforms.Compose):
    """Transforms, a random crop first, of images and of JPEGs that are left to a decoder; it gives uint8 [3, H, W].

    The next ones are given images where `to_pil`.
    """

    def __init__(self, steps: Sequence[Callable], decoder: str, to_pil: bool = False):
        super().__init__([DecodedCrop(steps[0], to_pil), *steps[1:]])
        self.decoder = decoder


def pretrain_transform(
    input_size: int,
    crop_scale: Sequence[float],
    hflip: float,
    interpolation: str = 'bicubic',
    decoder: str = decoders.PIL,
) -> Callable:
    """MAE's: a random crop of this share of the area, resized, and a flip."""
    crop = QuickCrop(input_size, scale=crop_scale, interpolation=InterpolationMode(interpolation))
    return CropFirst([crop, Flip(hflip), MaybePILToTensor()], decoder)


def posterize(image: Image.Image, bits_to_keep: int, **_) -> Image.Image:
    """Keep the highest bits of each channel, or none: RandAugment asks for 0 from magnitude 10 on."""
    mask = 0xFF00 >> bits_to_keep & 0xFF
    return image.point([value & mask for value in range(256)] * len(image.getbands()))


# timm's own goes through Pillow's, which from version 13 on refuses 0 bits and would end the run
auto_augment.NAME_TO_OP |= {name: posterize for name in auto_augment.NAME_TO_OP if name.startswith('Posterize')}


def finetune_transform(
    input_size: int,
    crop_scale: Sequence[float],
    hflip: float,
    color_jitter: float | None,
    aa: str,
    mean: Sequence[float],
    decoder: str = decoders.PIL,
) -> Callable:
    """timm's: random crop, flip, RandAugment (or colour jitter). Random erasing follows on the normalised batch.

    Raises UserError for a policy `aa` that timm does not know; 'none' is none.
    """
    try:
        if aa != 'none' and not all(re.fullmatch(r'[a-z]+\d[\d.]*|tweights|t3aw', part) for part in aa.split('-')[1:]):
            raise ValueError  # timm passes over what it does not understand
        transform = create_transform(
            input_size,
            is_training=True,
            scale=crop_scale,
            hflip=hflip,
            color_jitter=color_jitter,
            auto_augment=None if aa == 'none' else aa,
            interpolation='bicubic',
            mean=mean,
            normalize=False,
        )
        transform(Image.new('RGB', (input_size, input_size)))
    except (AssertionError, KeyError, ValueError) as error:
        raise UserError(f"--aa {aa}: not a policy of timm's, like rand-m9-mstd0.5-inc1, or 'none'") from error
    return CropFirst(transform.transforms, decoder, to_pil=True)


class ProbeCrop(transforms.RandomResizedCrop):
    """torchvision's, of MAE's crops."""

    @staticmethod
    def get_params(image: Any, scale: Sequence[float], ratio: Sequence[float]) -> tuple[int, int, int, int]:
        _, height, width = get_dimensions(image)
        return mae_crop(width, height, scale, ratio)


def probe_transform(
    input_size: int, crop_scale: Sequence[float], hflip: float, decoder: str = decoders.PIL
) -> Callable:
    """That of MAE's linear probe: a random crop, and a flip."""
    crop = ProbeCrop(input_size, crop_scale, interpolation=InterpolationMode.BICUBIC)
    return CropFirst([crop, Flip(hflip), MaybePILToTensor()], decoder)


def training_transform(args: argparse.Namespace) -> Callable:
    """What a labelled run's arguments ask for."""
    if args.probe:
        return probe_transform(args.input_size, args.crop_scale, args.hflip, args.decoder)
    mean, decoder = args.mean, args.decoder
    return finetune_transform(args.input_size, args.crop_scale, args.hflip, args.color_jitter, args.aa, mean, decoder)


class ResizeShorter(transforms.Resize):
    """Resize the shorter side, bicubic. Raises ValueError if that makes an image of more than `max_pixels`."""

    def __init__(self, size: int, max_pixels: float):
        super().__init__(size, InterpolationMode.BICUBIC)
        self.max_pixels = max_pixels

    def forward(self, image: Image.Image) -> Image.Image:
        longer = self.size * max(image.size) // min(image.size)
        if self.size * longer > self.max_pixels:
            sides = ' x '.join(map(str, image.size))
            raise ValueError(
                f'{sides} pixels, its shorter side resized to {self.size}, are more than --max_pixels {self.max_pixels}'
            )
        return super().forward(image)


def eval_transform(input_size: int, crop_pct: float, max_pixels: float = math.inf) -> Callable:
    """Resize the shorter side to input_size / crop_pct, rounded down, bicubic, and crop the centre."""
    return transforms.Compose(
        [
            ResizeShorter(int(input_size / crop_pct), max_pixels),
            transforms.CenterCrop(input_size),
            transforms.PILToTensor(),
        ]
    )


# --------------------------------------------------------------------------
# fine-tuning's batches and loss: timm's


def mixes(args: argparse.Namespace) -> bool:
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None


def batch_augmentation(args: argparse.Namespace, num_classes: int, device: torch.device) -> Callable:
    """Random erasing, then mixup or cutmix, of a normalised batch on the device: timm's."""
    erase = RandomErasing(args.reprob, mode=args.remode, max_count=args.recount, device=device)
    mix = None
    if mixes(args):
        mix = Mixup(
            mixup_alpha=args.mixup,
            cutmix_alpha=args.cutmix,
            cutmix_minmax=args.cutmix_minmax,
            prob=args.mixup_prob,
            switch_prob=args.mixup_switch_prob,
            mode=args.mixup_mode,
            label_smoothing=args.smoothing,
            num_classes=num_classes,
        )

    def augment(imgs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        imgs = erase(imgs)
        return mix(imgs, labels) if mix else (imgs, labels)

    return augment


def criterion(args: argparse.Namespace) -> nn.Module:
    """Cross-entropy: with soft targets under mixup (which smooths them itself), smoothed, or plain. Or binary ones."""
    if args.criterion == 'bce':
        return BinaryCrossEntropy(args.smoothing, sum_classes=True)
    if mixes(args):
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(args.smoothing) if args.smoothing else nn.CrossEntropyLoss()
