"""What is measured while it pretrains: k-NN and rank, which change nothing; and the line after the warm-up."""

import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from training import SHORT, arguments, equal_states, load, train

import main_finetune
import main_pretrain
from util import build, neighbours
from util.analysis.features import extract
from util.analysis.probes import knn_scores
from util.analysis.similarity import rankme
from util.data import named
from util.data.datasets import Normalisation, Split
from util.data.stores import Files, Pixels
from util.errors import UserError
from util.log import health
from util.weights import load_published

FLAGS = [*SHORT, '--epochs', '3', '--save_freq', '1', '--batch_size', '16', '--model_kwargs', 'decoder_dim=24']
KNN = ['--knn_freq', '2', '--knn_images', '48', '15']
SCORES = ('knn_top1', 'rank', 'rank_share')

pytestmark = pytest.mark.xdist_group('neighbours')  # one test process, so that `measured_run` is made once


def scores(folder) -> dict[int, list[float]]:
    """{epoch: what was measured after it}"""
    lines = [json.loads(line) for line in (folder / 'log.txt').read_text().splitlines()]
    return {line['epoch']: [line[name] for name in SCORES] for line in lines if 'knn_top1' in line}


@pytest.fixture(scope='module')
def measured_run(images, tmp_path_factory):
    """A folder with a run that measured; BatchNorm has running statistics that could be changed."""
    folder = tmp_path_factory.mktemp('measured')
    train('pretrain', images, folder, *FLAGS[:-2], *KNN, '--model', 'a2mim_resnet_tiny')
    return folder


def test_measuring_changes_nothing(measured_run, images, tmp_path):
    """Every two epochs and after the last, and the run is the same to the bit."""
    without = train('pretrain', images, tmp_path, *FLAGS[:-2], '--model', 'a2mim_resnet_tiny')
    assert equal_states(without, load(measured_run))
    assert list(scores(measured_run)) == [1, 2]
    assert scores(tmp_path) == {}


def test_a_resumed_run_measures_the_same(measured_run, images, tmp_path):
    """By an older program too, whose averages lack what is explained: they begin where it resumed."""
    flags = [*FLAGS[:-2], *KNN, '--model', 'a2mim_resnet_tiny', '--resume']
    saved = load(measured_run, 'checkpoint-0.pth')
    saved |= {'epoch': 1, 'step': 2}  # in mid-epoch
    del saved['logger']['explained']
    torch.save(saved, tmp_path / 'old.pth')
    train('pretrain', images, tmp_path / 'old', *flags, tmp_path / 'old.pth')
    lines = [json.loads(line) for line in (tmp_path / 'old' / 'log.txt').read_text().splitlines()]
    assert [math.isfinite(line['train_explained']) for line in lines] == [True, True]

    train('pretrain', images, tmp_path / 'new', *flags, measured_run / 'checkpoint-0.pth')
    assert scores(tmp_path / 'new') == scores(measured_run)


def test_a_request_in_a_measure_costs_no_epoch(images, tmp_path, monkeypatch):
    monkeypatch.setattr(neighbours.Neighbours, 'measure', lambda self, core: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train('pretrain', images, tmp_path, *FLAGS, *KNN)
    saved = load(tmp_path)
    assert (saved['epoch'], saved['step'], saved['closed']) == (1, 4, False)


def test_it_is_the_classifier_that_is_measured(images, tmp_path, capsys):
    """The same numbers as by the way of fine-tuning: its images, its loading, its network."""
    trained = train('pretrain', images, tmp_path, *FLAGS, *KNN)
    argv = arguments(images, tmp_path, '--crop_pct', '0.875', '--batch_size', '16')
    args = main_finetune.get_args_parser().parse(argv, stage='finetune')
    network = main_finetune.create_classifier(args, 3)
    load_published(network, trained)
    found = {}
    for name, split in neighbours.labelled_images(
        main_pretrain.get_args_parser().parse([*argv[:-4], *KNN], stage='pretrain')
    ).items():
        batches = build.val_loader(args, split.images, split.labels, torch.device('cpu'))
        normalise = Normalisation.of(args.mean, args.std, torch.device('cpu'))
        found[name] = extract(network, batches, normalise=normalise)
    (known, labels), (unknown, truth) = found['knn_train'], found['knn_val']
    votes = knn_scores(known, labels, unknown, [20], 0.07, 3)[20]
    top1, rank, share = scores(tmp_path)[2]
    assert top1 == pytest.approx(100 * (votes.argmax(1) == truth).double().mean().item())
    assert rank == pytest.approx(rankme(known), rel=1e-6)
    assert share == rank / known.shape[1]
    assert f'20-NN top-1 {top1:.1f}% of 15 images by 48 others; effective rank {rank:.1f} of 96; took ' in (
        told := capsys.readouterr().out
    )
    assert told.count('after the warm-up: ') == 1


def test_evenly_from_all_classes():
    labels = np.random.default_rng(0).permutation([0] * 50 + [1] * 3 + [2] * 40)
    split = Split(Files(f'{i}.png' for i in range(93)), labels, list('abc'), [])
    chosen = named.some(split, 0, 23)
    assert np.bincount(chosen.labels).tolist() == [10, 3, 10]
    names = list(chosen.images)
    assert names == sorted(names, key=lambda name: int(name[:-4]))
    assert [labels[int(name[:-4])] for name in names] == chosen.labels.tolist()
    assert list(named.some(split, 0, 23).images) == names != list(named.some(split, 1, 23).images)
    assert list(named.some(split, 0, 1000).images) == list(split.images)
    assert np.bincount(named.some(split, 0, per_class=5).labels).tolist() == [5, 3, 5]
    assert np.bincount(named.some(split, 0, 9, per_class=5).labels).tolist() == [3, 3, 3]
    pixels = Split(Pixels(np.arange(93).reshape(93, 1, 1, 1)), labels, list('abc'), [])
    assert [f'{i}.png' for i in named.some(pixels, 0, 23).images.images.ravel()] == names


def folder_of(root, *places):
    for i, place in enumerate(places):
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(root / place)
    return root


@pytest.mark.parametrize(
    ('places', 'words'),
    [
        (['1.png', '2.png'], 'has 2 images, but no class folders in it: each image must be in a folder of its class'),
        (['train/1.png', 'train/2.png'], 'train has 2 images, but no class folders in it'),
        (['train/a/1.png', 'train/a/2.png'], "has a single class, 'a': there is nothing to tell it from"),
        (['train/a/1.png', 'train/b/2.png', 'val/c/3.png'], 'the classes of val/ in .* and of train/ differ'),
        (['train/a/1.png', 'train/b/2.png', 'val/3.png'], 'or move val/ away, and part of train/ validates$'),
    ],
)
def test_images_without_labels(places, words, tmp_path):
    """One line before training, which names the flag."""
    argv = arguments(folder_of(tmp_path / 'data', *places), tmp_path / 'out', *FLAGS, '--knn_freq', '1')
    args = main_pretrain.get_args_parser().parse(argv, stage='pretrain')
    with pytest.raises(
        UserError, match=f'^--knn_freq needs labelled images, in --data_path or --knn_data PATH: .*{words}'
    ):
        neighbours.labelled_images(args)


def test_other_images_or_part_of_them(images, tmp_path):
    """Those of --knn_data; where there is no val/, some of every class are compared with the others."""
    shutil.copytree(images / 'train', tmp_path / 'classes')
    argv = arguments(tmp_path / 'nothing', tmp_path / 'out', *FLAGS, '--knn_data', tmp_path / 'classes')
    parse = main_pretrain.get_args_parser().parse
    with pytest.raises(UserError, match=r'--knn_data .*classes is for --knn_freq N, which is not given'):
        neighbours.labelled_images(parse(argv, stage='pretrain'))
    found = neighbours.labelled_images(parse([*argv, '--knn_freq', '1'], stage='pretrain'))
    known, unknown = found['knn_train'], found['knn_val']
    assert np.bincount(unknown.labels).tolist() == [4, 4, 4]  # a sixth of 22
    assert not {*known.images} & {*unknown.images}
    assert len(known.images) + len(unknown.images) == 66


@pytest.mark.parametrize(
    ('values', 'words'),
    [
        ({'explained0': 0.2, 'rank': 9.0}, 'nothing is wrong: explained0 0.200, rank 9.0, 0% of the time waiting .*'),
        ({'explained0': 0.2, 'explained1': -0.5}, 'explained1 is -0.500: no better a prediction than a constant'),
        ({'explained': math.nan}, 'explained is nan: .*'),
        ({'rank': 1.2}, 'rank is 1.20: all images have nearly the same features'),
        ({'waiting_for_data': 0.6, 'skipped': 0.2}, '60% of .*--num_workers.*; 20% of all steps were skipped.*'),
    ],
)  # fmt: skip
def test_health(values, words):
    assert re.fullmatch(words, health(values))
