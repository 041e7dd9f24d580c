"""Which sample and which mask comes when, and what the loader makes of an image."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision import transforms

import models_mirl
from util import rng
from util.data import augment, datasets
from util.data.datasets import EpochBatches, eval_batches
from util.data.stores import Files
from util.errors import UserError


def places(num_samples, batch_size, accum_iter, world_size, epoch=0, step=0, seed=3):
    """{rank: [[index, ...] of each micro-batch]}"""
    found = {}
    for rank in range(world_size):
        batches = EpochBatches(num_samples, batch_size, accum_iter, rank, world_size, seed)
        batches.start(epoch, step)
        found[rank] = [[index for _, index in batch] for batch in batches]
        assert len(found[rank]) == len(batches)
    return found


def global_batches(found, accum_iter):
    """The global batches in place order, from what each rank was given."""
    ranks = list(found.values())
    steps = len(ranks[0]) // accum_iter
    return [
        [i for micro in range(accum_iter) for rank in ranks for i in rank[step * accum_iter + micro]]
        for step in range(steps)
    ]


def test_every_sample_once_and_the_same_order_for_any_split():
    whole = global_batches(places(103, 24, 1, 1), 1)
    assert len(whole) == 4  # 7 are left out
    flat = [i for batch in whole for i in batch]
    assert len(set(flat)) == len(flat) == 96
    for batch_size, accum_iter, world_size in ((12, 2, 1), (12, 1, 2), (4, 3, 2), (2, 3, 4)):
        assert global_batches(places(103, batch_size, accum_iter, world_size), accum_iter) == whole
    assert global_batches(places(103, 24, 1, 1, step=3), 1) == whole[3:]
    assert global_batches(places(103, 24, 1, 1, epoch=1), 1) != whole
    assert global_batches(places(103, 24, 1, 1, seed=4), 1) != whole


def test_rounds():
    """Rounds follow each other as passes do, whatever their length: items name the pass, each of which has an order."""

    def items(steps, numbers, copies=1, first=0):
        found = []
        batches = EpochBatches(103, 8, 3, 0, 1, 3, copies, steps)
        for number in numbers:
            batches.start(number, first)
            found += list(batches)
            assert len(found) % len(batches) == 0
        return found

    passes = items(None, range(3))  # of 4 steps
    assert [batch[0][0] for batch in passes[::12]] == [0, 1, 2]
    assert [index for _, index in passes[12]] == places(103, 8, 3, 1, epoch=1)[0][0]
    assert items(3, range(4)) == items(12, [0]) == items(1, range(12)) == passes
    assert items(6, [1], first=4) == passes[3 * (6 + 4) :]
    assert items(3, range(4), copies=2) == items(None, range(3), copies=2)


def test_repeated_augmentation():
    """Each image three times in a row, for any split; copies on different ranks; an epoch of equal length."""

    def items(batch_size, accum_iter, world_size, rank=0, copies=3, step=0):
        batches = EpochBatches(103, batch_size, accum_iter, rank, world_size, 3, copies)
        batches.start(1, step)
        return list(batches)

    assert items(24, 1, 1, copies=1) == [[(1, i) for i in batch] for batch in places(103, 24, 1, 1, epoch=1)[0]]
    whole = items(24, 1, 1)
    assert len(whole) == 4  # 7 places are left out, as without copies
    flat = [item for batch in whole for item in batch]
    order = [i for batch in places(103, 24, 1, 1, epoch=1)[0] for i in batch]
    assert flat == [(1, i, copy) for i in order[:32] for copy in range(3)]
    assert items(24, 1, 1, step=2) == whole[2:]
    for batch_size, accum_iter, world_size in ((12, 2, 1), (12, 1, 2), (4, 2, 3), (2, 3, 4)):
        ranks = [items(batch_size, accum_iter, world_size, rank) for rank in range(world_size)]
        for step in range(4):
            micros = range(step * accum_iter, (step + 1) * accum_iter)
            together = [item for micro in micros for rank in ranks for item in rank[micro]]
            assert sorted(together) == sorted(whole[step])
        if world_size >= 3:
            assert all(len({index for _, index, _ in batch}) == batch_size for rank in ranks for batch in rank)


def test_evaluation_counts_every_image_once():
    for world_size in (1, 2, 3, 5):
        shares = [eval_batches(23, 4, rank, world_size) for rank in range(world_size)]
        assert sorted(i for share in shares for batch in share for _, i in batch) == list(range(23))


@pytest.mark.parametrize('count', [0, 1, 7, 8, 9, 196, 1003])
def test_skipping_equals_drawing(count):
    drawn = rng.generator(1, 2, 3)
    if count:
        drawn.random(count, dtype=np.float32)
    skipped = rng.generator(1, 2, 3)
    rng.skip_float32(skipped, count)
    assert np.array_equal(drawn.random(50, dtype=np.float32), skipped.random(50, dtype=np.float32))


def test_masks_belong_to_samples_not_to_ranks():
    with torch.device('meta'):
        model = models_mirl.mirl_vit_tiny(img_size=40)  # 25 patches: rows that begin inside a block of 8

    def masks(batch_size, accum_iter, world_size, step=5):
        rows = []
        for micro in range(accum_iter):
            for rank in range(world_size):
                noise = rng.mask_noise(model, 0, step, micro, rank, batch_size, world_size)
                rows.append(model.plan_from_noise(noise).mask)
        return torch.cat(rows)

    whole = masks(12, 1, 1)
    for split in ((6, 2, 1), (6, 1, 2), (3, 2, 2), (1, 4, 3)):
        assert torch.equal(masks(*split), whole)
    assert not torch.equal(masks(12, 1, 1, step=6), whole)
    assert len(whole.unique(dim=0)) == 12


def test_batches_are_what_pil_gives(images):
    """uint8 of PIL's bicubic crop; normalised on the device to what ToTensor and Normalize give."""
    files = datasets.list_images(images / 'train')
    dataset = datasets.ImageFiles(files, None, augment.pretrain_transform(32, (0.2, 1.0), 0.5), seed=7)
    ours = torch.stack([dataset[2, i][0] for i in range(len(files))])
    assert ours.dtype == torch.uint8
    crop = transforms.RandomResizedCrop(32, (0.2, 1.0), interpolation=transforms.InterpolationMode.BICUBIC)
    flip = transforms.RandomHorizontalFlip(0.5)
    normalise = datasets.Normalisation.of((0.5, 0.4, 0.3), (0.2, 0.3, 0.4), torch.device('cpu'))
    for index, file in enumerate(files):
        rng.seed_all(7, rng.SAMPLE, 2, index)
        picture = flip(crop(Image.open(file).convert('RGB')))
        assert np.array_equal(np.asarray(picture), ours[index].permute(1, 2, 0).numpy())
        plain = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))])
        assert torch.allclose(normalise(ours)[index], plain(picture), atol=1e-6)


def test_an_augmentation_depends_on_seed_epoch_and_index_only(images):
    files, labels, *_ = datasets.labelled_files(images, 'train')
    transform = augment.finetune_transform(32, (0.08, 1.0), 0.5, None, 'rand-m9-mstd0.5-inc1', (0.5, 0.5, 0.5))
    dataset = datasets.ImageFiles(files, labels, transform, seed=1)
    first = dataset[3, 5][0]
    dataset[0, 1]
    torch.manual_seed(99)
    assert torch.equal(dataset[3, 5][0], first)
    assert not torch.equal(dataset[4, 5][0], first)
    copies = [dataset[3, 5, copy] for copy in (0, 1, 1)]
    assert [label for _, label in copies] == [labels[5]] * 3
    assert not torch.equal(copies[0][0], copies[1][0])
    assert torch.equal(copies[1][0], copies[2][0])


@pytest.mark.parametrize('bits', range(9))
def test_posterize_is_pillows_and_takes_no_bits_too(bits):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8))
    expected = ImageOps.posterize(image, bits) if bits else Image.new('RGB', (9, 9))
    assert np.array_equal(np.asarray(augment.posterize(image, bits)), np.asarray(expected))
    assert augment.auto_augment.NAME_TO_OP['PosterizeIncreasing'] is augment.posterize


@pytest.mark.parametrize(('side', 'crop_pct', 'resized'), [(224, 0.875, 256), (224, 0.949, 236), (224, 0.95, 235)])
def test_evaluation_crops_the_centre(side, crop_pct, resized):
    """Rounded down, as in MAE and timm: 236 -> 224 is 0.949."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 350, 3), dtype=np.uint8))
    small = image.resize((350 * resized // 300, resized), Image.Resampling.BICUBIC)
    left, top = (round((length - side) / 2) for length in small.size)
    expected = np.asarray(small.crop((left, top, left + side, top + side)))
    assert np.array_equal(augment.eval_transform(side, crop_pct)(image).permute(1, 2, 0).numpy(), expected)


def test_a_flat_folder_serves_pretraining(tmp_path):
    for name in ('b.png', 'a.JPG', 'c.txt'):
        Image.new('RGB', (8, 8)).save(tmp_path / name, format='PNG')
    assert [path.rsplit('/', 1)[1] for path in datasets.list_images(tmp_path)] == ['a.JPG', 'b.png']


def test_a_broken_image_is_named(tmp_path):
    (tmp_path / 'bad.png').write_bytes(b'not an image')
    dataset = datasets.ImageFiles(Files([str(tmp_path / 'bad.png')]), None, None, 0)
    with pytest.raises(UserError, match=r'bad\.png'):
        dataset[0, 0]
