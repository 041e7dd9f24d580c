"""Write scikit-learn's 1,797 scanned digits as an ImageNet-like folder of PNGs: train/ and val/, one folder per class.

Example:
    python scripts/make_digits.py runs/digits --size 32
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits


def main(folder: Path, size: int, val_share: int = 5) -> None:
    """Every `val_share`-th digit of a class goes to val/; 8 x 8 scans are enlarged bicubically to `size`."""
    digits = load_digits()
    seen = np.zeros(10, int)
    for number, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        split = 'val' if seen[label] % val_share == 0 else 'train'
        seen[label] += 1
        where = folder / split / str(label)
        where.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray((pixels * (255 / 16)).round().astype(np.uint8))
        image.resize((size, size), Image.Resampling.BICUBIC).convert('RGB').save(where / f'{number:04d}.png')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=(__doc__ or '').partition('\n')[0])
    parser.add_argument('folder', type=Path)
    parser.add_argument('--size', type=int, default=32)
    main(**vars(parser.parse_args()))
