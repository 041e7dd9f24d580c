"""What every network asks about its sizes; each function raises ValueError with the numbers."""

import math
from collections.abc import Sequence


def check_divides(img_size: int, divisor: int, what: str) -> None:
    """`what` names the divisor: 'patch_size', '8 x patch_size ='."""
    if img_size < divisor or img_size % divisor:
        raise ValueError(f'img_size {img_size} is not a multiple of {what} {divisor}')


def check_heads(width: int, num_heads: int, what: str = 'embed_dim') -> None:
    if width % num_heads:
        raise ValueError(f'{what} {width} is not a multiple of its {num_heads} heads')


def check_windows(img_size: int, sides: Sequence[int], windows: Sequence[int]) -> None:
    """Of each stage, the number of tokens and the window's size, both along a side."""
    for stage, (side, window) in enumerate(zip(sides, windows, strict=True)):
        if side % window:
            raise ValueError(
                f'window_size {window} does not divide the {side} x {side} tokens of stage {stage} '
                f'at img_size {img_size}'
            )


def check_mask_ratio(mask_ratio: float, num_hidden: int, total: int, what: str = 'patches', smaller: str = '') -> None:
    """Raise ValueError for a ratio that hides none or all of them. `smaller` is the option that makes more of them."""
    if not 0 < num_hidden < total and 0 < mask_ratio < 1 and total < 4 and smaller:
        raise ValueError(
            f'{total} of the {what} in an image of this size: too few to hide some; try --model_kwargs {smaller}'
        )
    if not 0 < num_hidden < total:
        raise ValueError(
            f'mask_ratio {mask_ratio} hides {num_hidden} of {total} {what}; at least one must be hidden and one visible'
        )


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f'{name} {value!r} is not one of {", ".join(choices)}')


def check_numbers(least: float, most: float, whole: bool = True, **numbers: object) -> None:
    """Of each by its name: a number, or a sequence of them. torch would stop in the first step or evaluation."""
    kinds = (int,) if whole else (int, float)
    for name, value in numbers.items():
        values = value if isinstance(value, (list, tuple)) else [value]
        if not all(type(number) in kinds and least <= number <= most for number in values):
            what, up_to = 'whole numbers' if whole else 'numbers', f' to {most:g}' if most < math.inf else ''
            raise ValueError(f'{name} {value!r} should be {what} from {least:g}{up_to}')
