"""Decoders: the same crops under each, nearly Pillow's pixels, Pillow for what they refuse, and a run keeps its own."""

import io
import json
import random
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torchvision import transforms
from torchvision.datasets.folder import default_loader
from training import MAINS, load, train

from util import checkpoint, rng
from util.data import augment, decoders
from util.data.datasets import ImageFiles, mae_crop
from util.data.images import Reader
from util.data.stores import Files
from util.errors import CheckpointError, UserError

FAST = decoders.installed()[:-1]
BICUBIC = transforms.InterpolationMode.BICUBIC
SCALE, RATIO = (0.2, 1.0), (3 / 4, 4 / 3)
FEW = ['--batch_size', '8', '--warmup_epochs', '0', '--lr', '1e-3']


def scene(seed: int, width: int = 470, height: int = 400) -> Image.Image:
    """Light, edges and grain, about as photographs have them."""
    numbers = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    light = np.asarray(Image.fromarray(numbers.integers(0, 256, (9, 9, 3), dtype=np.uint8)).resize((width, height)))
    stripes = 50 * np.sign(np.sin(x * numbers.uniform(0.02, 0.1) + y * 0.05))[..., None]
    return Image.fromarray(np.clip(light + stripes + numbers.normal(0, 8, light.shape), 0, 255).astype(np.uint8))


def jpeg(image: Image.Image, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, 'JPEG', **{'quality': 90, **options})
    return file.getvalue()


@pytest.fixture(scope='module')
def photos(tmp_path_factory) -> list[str]:
    """8 JPEGs of three subsamplings."""
    folder = tmp_path_factory.mktemp('photos')
    for number in range(8):
        (folder / f'{number}.jpg').write_bytes(jpeg(scene(number), subsampling=number % 3))
    return sorted(map(str, folder.iterdir()))


def pretrain(decoder: str, interpolation: str = 'bicubic'):
    return augment.pretrain_transform(224, SCALE, 0.5, interpolation, decoder)


def finetune(decoder: str, aa: str = 'rand-m9-mstd0.5-inc1'):
    return augment.finetune_transform(224, (0.08, 1.0), 0.5, None, aa, (0.5, 0.5, 0.5), decoder)


def probe(decoder: str):
    return augment.probe_transform(224, SCALE, 0.5, decoder)


class MaeProbe(transforms.RandomResizedCrop):
    @staticmethod
    def get_params(image, scale, ratio):
        return mae_crop(*image.size, scale, ratio)


def batch(files: list[str], transform, **options) -> torch.Tensor:
    dataset = ImageFiles(Files(files), None, transform, 3, **options)
    return torch.stack([dataset[1, index][0] for index in range(len(files))])


def plain(crop) -> transforms.Compose:
    return transforms.Compose([crop, transforms.RandomHorizontalFlip(), transforms.PILToTensor()])


TIMM = dict(is_training=True, color_jitter=None, auto_augment='rand-m9-mstd0.5-inc1', interpolation='bicubic')
TWINS = {
    pretrain: plain(transforms.RandomResizedCrop(224, SCALE, interpolation=BICUBIC)),
    finetune: create_transform(224, **TIMM, mean=(0.5, 0.5, 0.5), normalize=False),
    probe: plain(MaeProbe(224, SCALE, interpolation=BICUBIC)),
}


@pytest.mark.parametrize('transform', TWINS, ids=lambda transform: transform.__name__)
def test_pil_gives_the_bytes_of_maes_own_loader(transform, photos):
    ours = batch(photos, transform('pil'))
    for index, path in enumerate(photos):
        image = default_loader(path)
        rng.seed_all(3, rng.SAMPLE, 1, index)
        assert torch.equal(ours[index], TWINS[transform](image))


@pytest.mark.parametrize('scale', [SCALE, (0.95, 1.0)])
def test_crops_are_drawn_as_torchvisions(scale):
    """Those that fall back to the middle, too; and nothing more is drawn."""
    sizes = random.Random(0)
    for seed in range(200):
        shape = (3, *(sizes.choice([(400, 470), (9, 700), (700, 9), (sizes.randint(1, 99), sizes.randint(1, 99))])))
        drawn = []
        for crop in (transforms.RandomResizedCrop, augment.QuickCrop):
            torch.manual_seed(seed)
            drawn.append((*crop.get_params(augment.BLANK.expand(shape), scale, RATIO), torch.rand(1).item()))
        assert drawn[0] == drawn[1]


@pytest.mark.parametrize('decoder', FAST)
@pytest.mark.parametrize(
    'transform',
    [pretrain, lambda decoder: pretrain(decoder, 'bilinear'), lambda decoder: finetune(decoder, 'none'), probe],
    ids=['bicubic', 'bilinear', 'finetune', 'probe'],
)
def test_pixels_differ_from_pillows_by_rounding(decoder, transform, photos, measured):
    """So crops and flips are the same."""
    ours, pillows = batch(photos, transform(decoder)), batch(photos, transform('pil'))
    assert ours.dtype == torch.uint8
    means = (ours.float() - pillows.float()).abs().mean((1, 2, 3))
    assert 0 < means.mean() < 0.05, means
    assert means.max() < 0.1


@pytest.mark.parametrize('decoder', FAST)
def test_what_is_drawn_after_the_crop_is_the_same(decoder, photos):
    """RandAugment may enlarge a difference of one, but another operation would be plain to see."""
    ours, pillows = (batch(photos, finetune(name)).float() for name in (decoder, 'pil'))
    assert (ours - pillows).abs().mean((1, 2, 3)).median() < 1


@pytest.mark.parametrize('decoder', FAST)
def test_decoded_pixels_are_pillows(decoder):
    image, exif = scene(0, 301, 203), Image.Exif()
    exif[0x0112] = 6  # to be turned, which is ignored
    kinds = [dict(subsampling=kind, progressive=kind == 2) for kind in ('4:4:4', '4:2:2', '4:2:0', '4:1:1')]
    for options in [*kinds, {'exif': exif}, {'keep_rgb': True}, {'restart_marker_blocks': 3}]:
        data = jpeg(image, **options)
        opened, decoded = decoders.read(decoder, io.BytesIO(data), 1e9), np.asarray(Image.open(io.BytesIO(data)))
        assert (opened.width, opened.height) == image.size
        for top, left, height, width in ((0, 0, 203, 301), (33, 51, 77, 99), (202, 300, 1, 1), (0, 17, 203, 5)):
            part = decoded[top : top + height, left : left + width]
            assert np.array_equal(opened.region((top, left, height, width)), part), options


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, 'PNG')
    return file.getvalue()


WHOLE = jpeg(scene(1, 90, 80))
FOR_PILLOW = {
    'gray': jpeg(scene(1, 90, 80).convert('L')),
    'CMYK': jpeg(scene(1, 90, 80).convert('CMYK')),
    'a PNG named .jpg': png(scene(1, 90, 80)),
    'an early end': WHOLE[:-900] + decoders.END,
    'a byte lost': WHOLE[:-700] + WHOLE[-699:],
}
BAD = {
    'truncated': WHOLE[:-700],
    'truncated by a byte': WHOLE[:-1],
    'progressive, truncated': jpeg(scene(1, 90, 80), progressive=True)[:-700],
    'cut in its header': WHOLE[:100],
    'text': b'It is not here\n',
    '12 bits': WHOLE.replace(b'\xff\xc0\0\x11\x08', b'\xff\xc0\0\x11\x0c'),
    'too many pixels': jpeg(scene(1, 101, 100)),
}


@pytest.mark.parametrize('decoder', FAST)
@pytest.mark.parametrize('kind', FOR_PILLOW)
def test_what_a_decoder_refuses_is_pillows(kind, decoder, tmp_path):
    if decoder == 'nvimgcodec' and FOR_PILLOW[kind].startswith(WHOLE[:500]):
        pytest.skip('it reads no further than a region, and takes more than Pillow does')
    path = tmp_path / 'image.jpg'
    path.write_bytes(FOR_PILLOW[kind])
    for transform in (pretrain, finetune):
        ours, pillows = (batch([str(path)], transform(name)) for name in (decoder, 'pil'))
        assert torch.equal(ours, pillows)


@pytest.mark.parametrize('decoder', FAST)
@pytest.mark.parametrize('kind', BAD)
def test_a_bad_image_has_the_same_line(kind, decoder, tmp_path):
    path = tmp_path / 'image.jpg'
    path.write_bytes(BAD[kind])
    lines = []
    for name in (decoder, 'pil'):
        for transform in (pretrain, finetune):
            with pytest.raises(UserError) as error:
                batch([str(path)], transform(name), reader=Reader(max_pixels=100 * 100))
            lines.append(str(error.value))
    assert len(set(lines)) == 1, lines
    assert lines[0].startswith(f'cannot read the image {path}: ')


@pytest.mark.parametrize('decoder', FAST)
def test_a_truncated_image_is_refused_whatever_the_crop(decoder):
    """Its top could be decoded."""
    opened = decoders.read(decoder, io.BytesIO(jpeg(scene(0))[:-900]), 1e9)
    assert opened.region((0, 0, 16, 16)) is None


def test_no_faster_decoder_is_asked_for_what_does_not_train(photos):
    reader = Reader()
    assert isinstance(ImageFiles(Files(photos), None, pretrain('simplejpeg'), 0, reader).image(0), decoders.Jpeg)
    for transform in (pretrain('pil'), augment.eval_transform(224, 0.875), None):
        assert isinstance(ImageFiles(Files(photos), None, transform, 0, reader).image(0), Image.Image)


# --------------------------------------------------------------------------
# which decoder a run has


@pytest.fixture
def lacking(monkeypatch):
    """lacking(module, ...): from now on these cannot be imported."""

    def lose(*modules: str) -> None:
        def library(module: str, there=decoders.library):
            if module in modules:
                raise ModuleNotFoundError(f'No module named {module!r}')
            return there(module)

        monkeypatch.setattr(decoders, 'library', library)

    return lose


def test_auto_is_the_fastest_that_is_installed(lacking):
    def parsed(*flags):
        return MAINS['pretrain'].get_args_parser().parse([*flags])

    lacking('nvidia.nvimgcodec')
    assert parsed().decoder == parsed('--decoder', 'auto').decoder == 'simplejpeg'
    assert 'decoder' not in parsed('--decoder', 'auto').given
    assert 'decoder' in parsed('--decoder', 'pil').given
    line = '^--decoder nvimgcodec is not installed: pip install nvidia-nvimgcodec-cu12$'
    with pytest.raises(UserError, match=line):
        parsed('--decoder', 'nvimgcodec')
    lacking('nvidia.nvimgcodec', 'simplejpeg')
    assert parsed().decoder == 'pil'


def test_a_resumed_run_keeps_its_decoder(photos, tmp_path, lacking, capsys):
    data, run = Path(photos[0]).parent, tmp_path / 'run'

    def go(epochs: int, *flags) -> str:
        saved = train('pretrain', data, run, *FEW, '--epochs', epochs, *flags)
        then, resumed = saved['args']['decoder'], json.loads((run / 'args.json').read_text())['decoder']
        assert then == resumed == saved['run']['decoder'] != 'auto'
        return then

    assert go(1, '--decoder', 'pil') == 'pil'
    assert go(2, '--resume', 'auto') == 'pil'  # and not the fastest
    assert f'taken from {run}/checkpoint-last.pth: --decoder pil\n' in capsys.readouterr().out
    with pytest.raises(CheckpointError, match='with other settings: decoder: pil then, simplejpeg now'):
        go(3, '--resume', 'auto', '--decoder', 'simplejpeg')
    old = load(run)
    del old['run']['decoder'], old['args']['decoder']
    checkpoint.save(run / checkpoint.LAST, old)  # as it was before there was a choice
    with pytest.raises(CheckpointError, match='decoder: pil then, simplejpeg now'):
        go(3, '--resume', 'auto', '--decoder', 'simplejpeg')
    assert go(3, '--resume', 'auto') == 'pil'
    old = load(run)
    old['run']['decoder'] = 'simplejpeg'
    checkpoint.save(run / checkpoint.LAST, old)
    lacking('nvidia.nvimgcodec', 'simplejpeg')
    missing = 'with a decoder that is missing here: --decoder simplejpeg is not installed: pip install simplejpeg$'
    with pytest.raises(UserError, match=missing):
        go(4, '--resume', 'auto')


# --------------------------------------------------------------------------
# speed


@pytest.mark.parametrize('decoder', FAST)
def test_a_core_loads_more_images_than_maes_loader_does(decoder, photos, measured):
    """CPU time of MAE's loader and transform over ours: median of rounds. The floor allows for a busy machine."""
    mean, std = ([0.5] * 3, [0.3] * 3)
    steps = [transforms.ToTensor(), transforms.Normalize(mean, std)]
    mae = transforms.Compose([*TWINS[pretrain].transforms[:2], *steps])
    ours = ImageFiles(Files(photos), None, pretrain(decoder), 0)
    arms = {'mae': lambda index: mae(default_loader(photos[index])), 'ours': lambda index: ours[0, index]}
    for arm in arms.values():
        arm(0)
    ratios = []
    for turn in range(7):
        seconds = {}
        for name in random.Random(turn).sample(list(arms), 2):
            began = time.process_time()
            for index in range(len(photos)):
                arms[name](index)
            seconds[name] = time.process_time() - began
        ratios.append(seconds['mae'] / seconds['ours'])
    ratio = sorted(ratios)[len(ratios) // 2]
    measured(f"{decoder}: {ratio:.2f} x the images of MAE's loader a core, {min(ratios):.2f} to {max(ratios):.2f}")
    assert ratio > 1.5, ratios
