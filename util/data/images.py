"""One image file to 8-bit RGB, and what to do with a bad image: one that cannot be read.

The formats are those of `FORMATS`, by content, not by name. Of an animation the first frame is read. Palettes, gray and
CMYK become RGB and transparency is dropped, as Pillow does it. EXIF's rotation is ignored, TIFF's own orientation is
not: it is part of the format. Of 16 bits the upper 8 are kept, in gray as in colour.
"""

import argparse
import errno
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from util import console, resources
from util.data import decoders
from util.data.stores import Store, folder_of
from util.errors import StorageError, UserError, printable

FORMATS = ('JPEG', 'PNG', 'PPM', 'BMP', 'TIFF', 'WEBP')
BITS_PER_SAMPLE = 258  # a tag of TIFF
# errors of a file system that may be there again in a moment
TRANSIENT = {
    *(errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EBUSY, errno.ENODEV, errno.ENXIO),
    *(errno.ENOTCONN, errno.ECONNRESET, errno.ECONNABORTED, errno.ECONNREFUSED, errno.ESHUTDOWN),
    *(errno.ENFILE, errno.ENOMEM),
    *(errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH),
    getattr(errno, 'EREMOTEIO', errno.EIO),  # Linux alone has it
}
PAUSE_S = 0.5  # before the second attempt; doubles with each

Image.MAX_IMAGE_PIXELS = None  # Pillow only warns at it, and refuses at twice as many; `decode` has a limit of its own
ImageFile.LOAD_TRUNCATED_IMAGES = False  # or Pillow fills up half a file with gray, and says nothing


def decode(file: BinaryIO, max_pixels: float) -> Image.Image:
    """The image in RGB. Raises ValueError for other formats and too many pixels; for damage, what Pillow raises."""
    try:
        image = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        empty = not file.seek(0, os.SEEK_END)
        raise ValueError('the file is empty' if empty else f'not a file of {", ".join(FORMATS)}') from None
    with image:
        width, height = image.size  # from the header: nothing is decoded yet
        if width * height > max_pixels:
            raise ValueError(f'{width} x {height} pixels are more than --max_pixels {max_pixels}')
        image.load()
        return eight_bits(image).convert('RGB')


def eight_bits(image: Image.Image) -> Image.Image:
    """Deeper gray in 8 bits; Pillow's `convert` would clip it to white. Raises ValueError if its range is not known."""
    if image.mode.startswith('I;16') or (image.mode == 'I' and image.format in ('PNG', 'PPM')):
        depth = image.tag_v2[BITS_PER_SAMPLE][0] if image.format == 'TIFF' else 16  # TIFF has 12 too
        return Image.fromarray((np.asarray(image) >> (depth - 8)).astype(np.uint8))
    if image.mode in ('I', 'F'):
        numbers = {'I': 'signed or 32-bit integers', 'F': 'floating-point numbers'}[image.mode]
        raise ValueError(f'its pixels are {numbers}, whose black and white are not known')
    return image


def reason(error: Exception) -> str:
    """Why an image could not be read, in one line."""
    text = getattr(error, 'strerror', None) or str(error)
    if not text or not isinstance(error, OSError | ValueError):
        text = f'{type(error).__name__}: {text}'.removesuffix(': ')
    return printable(text)


class Reader(NamedTuple):
    """How image files are read, and what to do with bad ones.

    Without a `listing`, the first bad image ends the run. With one, bad images are skipped and listed there, each in a
    line `path TAB reason`, until they are more than `max_share` of all. That file is the only count, for every loader
    process of every rank, and for resumed runs.
    """

    max_pixels: float = math.inf
    retries: int = 5  # of reading from storage that does not answer
    root: Path | None = None  # of the data set: while it is missing or empty, the storage is gone, not a file
    listing: Path | None = None
    max_share: float | None = 0.0  # None: a thousandth, but at least 10 images, of a small data set half
    advice: str = ''

    @classmethod
    def of(cls, args: argparse.Namespace, listing: str = 'bad_images.txt') -> 'Reader':
        """As the arguments of a main say; `listing` is the name of the file in --output_dir."""
        skip = args.bad_images == 'skip'
        return cls(
            args.max_pixels,
            args.data_retries,
            folder_of(args.data_path),
            args.output_dir / listing if skip else None,
            args.max_bad_images,
            advice='; --bad_images skip skips such images',
        )

    def read(self, images: Store, index: int, decoder: str = decoders.PIL) -> Image.Image | decoders.Jpeg:
        """An image in RGB, or what is left to the decoder. Raises StorageError, and what `decode` raises."""
        return self.content(
            images, index, lambda file: decoders.read(decoder, file, self.max_pixels) or decode(file, self.max_pixels)
        )

    def content(self, files: Store, index: int, of: Callable[[BinaryIO], Any]) -> Any:
        """What a function makes of an open file. Raises StorageError if the storage stays away."""
        began = time.monotonic()
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(PAUSE_S * 2 ** (attempt - 1))
            try:
                with files.open(index) as file:
                    return of(file)
            except OSError as error:
                if not self.may_come_back(error):
                    raise
                last, why, name = error, reason(error), printable(files.name(index))
            if not attempt:
                console.say(f'waiting for {name}: {why}', error=True)
        if resources.starved(last):
            raise last
        waited = time.monotonic() - began
        raise StorageError(f'{name} is gone: {self.retries + 1} attempts over {waited:.1f} s; {why}')

    def may_come_back(self, error: OSError) -> bool:
        """Whether an error is the fault of the storage, not of the file."""
        if error.errno not in (errno.ENOENT, errno.ENOTDIR) or not self.root:
            return error.errno in TRANSIENT
        try:
            with os.scandir(self.root) as entries:
                return next(entries, None) is None  # a folder where a disk was mounted
        except OSError:
            return True

    def skip(self, path: str, why: str, images: int) -> None:
        """List a bad image, of so many in all. Raises UserError if none may be skipped, or if it is one too many."""
        name = printable(path)
        if not self.listing:
            raise UserError(f'cannot read the image {name}: {why}{self.advice}')
        try:
            if name not in self.skipped():
                self.listing.parent.mkdir(parents=True, exist_ok=True)
                with open(self.listing, 'ab', buffering=0) as file:
                    file.write(f'{name}\t{why}\n'.encode())  # in one write: other processes may write there too
            count = len(self.skipped())
        except OSError as error:
            raise StorageError(f'cannot write the list of bad images {self.listing}: {error.strerror}') from error
        if count > self.most(images):
            given = '' if self.max_share is None else f' {self.max_share:g}'
            limit = f'--max_bad_images{given or f" allows by default ({self.most(images)})"}'
            raise UserError(
                f'{count} of {images} images cannot be read, more than {limit}; '
                f'they are listed in {self.listing}; the last: {name}: {why}'
            )

    def most(self, images: int) -> int:
        """How many of so many images may be bad."""
        if self.max_share is None:
            return max(images // 1000, min(10, images // 2))
        return int(self.max_share * images)

    def skipped(self) -> set[str]:
        """The bad images on the list."""
        if not self.listing or not self.listing.exists():
            return set()
        return {line.partition('\t')[0] for line in self.listing.read_text('utf-8').splitlines()}

    def counted(self) -> dict[str, int]:
        """What a log shows: nothing where a bad image ends the run."""
        return {'bad_images': len(self.skipped())} if self.listing else {}

    def clear_list(self) -> None:
        """Delete the list of an earlier run: the images may have been mended since."""
        if self.listing:
            self.listing.unlink(missing_ok=True)
