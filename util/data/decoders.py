"""Libraries that decode JPEGs faster than Pillow: `--decoder`. A crop is drawn first, then its region is decoded.

They are asked for colour JPEGs alone. All else is Pillow's, and so is what they refuse: a file that is
truncated or damaged is the same bad image under each. (But nvimgcodec reads no further than a region: it may use an
image that is damaged elsewhere.) What they decode is Pillow's to the bit, as all use libjpeg-turbo; what differs is how
it is resized, in `augment.DecodedCrop`.
"""

import contextlib
import importlib
import os
from collections.abc import Callable, Iterator
from functools import cache
from types import ModuleType
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from util.errors import UserError, closest

PIL, AUTO = 'pil', 'auto'
BEGIN, END = b'\xff\xd8\xff', b'\xff\xd9'  # the first and last bytes of a whole JPEG
NO_GPU = -99999  # nvImageCodec's number of the CPU as a device

Region = tuple[int, int, int, int]  # top, left, height, width, in pixels


class Decoder(NamedTuple):
    package: str  # of pip
    module: str
    size: Callable[[bytes], tuple[int, int, bool]]  # from the header: height, width, and whether it has colours
    region: Callable[[bytes, Region], np.ndarray]  # uint8 [height, width, 3]


class Jpeg(NamedTuple):
    """A colour JPEG that is left to a decoder; nothing but its header has been decoded yet."""

    decoder: str
    data: bytes
    height: int
    width: int

    def region(self, region: Region) -> np.ndarray | None:
        """uint8 [height, width, 3]; None if the decoder refuses."""
        with contextlib.suppress(*REFUSES):
            return DECODERS[self.decoder].region(self.data, region)
        return None


REFUSES = ValueError, RuntimeError  # what the libraries raise of a file


def read(decoder: str, file: BinaryIO, max_pixels: float) -> Jpeg | None:
    """What is to be left to the decoder. None for what is Pillow's, larger images too; the file is as it was then."""
    if decoder != PIL and file.read(len(BEGIN)) == BEGIN:
        file.seek(0)
        data = file.read()
        with contextlib.suppress(*REFUSES):
            height, width, colours = DECODERS[decoder].size(data)
            if colours and height * width <= max_pixels:
                return Jpeg(decoder, data, height, width)
    file.seek(0)
    return None


# --------------------------------------------------------------------------
# the libraries


def size_by_nvimgcodec(data: bytes) -> tuple[int, int, bool]:
    codec, *_ = nvimgcodec_of(os.getpid())
    stream = codec.CodeStream(data)
    return stream.height, stream.width, stream.num_channels == 3


def by_nvimgcodec(data: bytes, region: Region) -> np.ndarray:
    """By nvImageCodec on the CPU, which decodes the region alone, and would not see that a file is truncated below."""
    if not data.endswith(END):
        raise ValueError('truncated')
    codec, decoder, params = nvimgcodec_of(os.getpid())
    top, left, height, width = region
    part = codec.Region(top, left, top + height, left + width)
    image = decoder.decode(codec.CodeStream(data).get_sub_code_stream(region=part), params=params)
    if image is None:
        raise ValueError('refused')
    return np.asarray(image)


@cache
def nvimgcodec_of(process: int) -> tuple[ModuleType, Any, Any]:
    """The library, and a decoder of this process's own: none survives a fork. EXIF's rotation is ignored."""
    codec = library(DECODERS['nvimgcodec'].module)
    decoder = codec.Decoder(device_id=NO_GPU, max_num_cpu_threads=1, backends=[codec.Backend(codec.CPU_ONLY)])
    srgb = codec.ColorSpec.SRGB
    return codec, decoder, codec.DecodeParams(apply_exif_orientation=False, allow_any_depth=False, color_spec=srgb)


def size_by_simplejpeg(data: bytes) -> tuple[int, int, bool]:
    height, width, colours, _ = library('simplejpeg').decode_jpeg_header(data)
    return height, width, colours in ('YCbCr', 'RGB')


def by_simplejpeg(data: bytes, region: Region) -> np.ndarray:
    """By simplejpeg, which decodes all of the image, strictly: damage is refused."""
    top, left, height, width = region
    return library('simplejpeg').decode_jpeg(data)[top : top + height, left : left + width]


DECODERS = {  # the fastest first; without an entry of Pillow's, whose transforms need none
    'nvimgcodec': Decoder('nvidia-nvimgcodec-cu12', 'nvidia.nvimgcodec', size_by_nvimgcodec, by_nvimgcodec),
    'simplejpeg': Decoder('simplejpeg', 'simplejpeg', size_by_simplejpeg, by_simplejpeg),
    PIL: None,
}


# --------------------------------------------------------------------------
# which of them are there


@cache
def library(module: str) -> ModuleType:
    """The library, imported once. Raises whatever a broken one raises."""
    os.environ.setdefault('PYNVIMGCODEC_VERBOSITY', '0')  # it would tell of each image that it refuses
    with silent():
        return importlib.import_module(module)


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Lose what libraries in C print on standard error: nvImageCodec names those of CUDA that it would like to have."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def missing(name: str) -> str:
    """Why a decoder cannot be used here, and what would help; '' if it can."""
    if not DECODERS[name]:
        return ''
    try:
        library(DECODERS[name].module)
    except Exception as error:  # a broken library raises of every kind
        absent = isinstance(error, ModuleNotFoundError)
        why = 'is not installed' if absent else f'cannot be used: {type(error).__name__}: {error}'.splitlines()[0]
        return f'{name} {why}: pip install {DECODERS[name].package}'
    return ''


def installed() -> list[str]:
    """The names of those that can be used here, the fastest first."""
    return [name for name in DECODERS if not missing(name)]


def resolved(name: str) -> str:
    """The name of a decoder that can be used here, for `auto` of the fastest. Raises UserError for one that cannot."""
    if name == AUTO:
        return next(name for name in DECODERS if not missing(name))
    if name not in DECODERS:
        raise UserError(f'unknown --decoder {name}{closest(name, DECODERS)}; known: {", ".join(DECODERS)}')
    if why := missing(name):
        raise UserError(f'--decoder {why}')
    return name


def version(name: str) -> dict[str, str]:
    """{library: version} of a decoder; nothing of Pillow."""
    return {DECODERS[name].module: library(DECODERS[name].module).__version__} if DECODERS.get(name) else {}
