"""What an encoder's features are worth while it pretrains: nearest neighbours and effective rank, on fixed images."""

import argparse
import math
import time

import numpy as np
import torch
from torch import Tensor, nn

from util import build, dist
from util.analysis.features import stream, widths
from util.analysis.probes import TEMPERATURE, knn_scores
from util.analysis.similarity import rankme
from util.data import named
from util.data.datasets import Normalisation, Split
from util.errors import UserError
from util.log import info

K = 20  # neighbours that vote
CROP_PCT = 0.875  # DINO's: the image is resized to its size over this, then cropped


def labelled_images(args: argparse.Namespace) -> dict[str, Split]:
    """What `Neighbours` compares: 'knn_train' and 'knn_val', or nothing without --knn_freq. Drawn from the seed.

    Without a `val/`, part of every class is taken for it. Raises UserError for images without labels.
    """
    if not args.knn_freq:
        if args.knn_data:
            raise UserError(f'--knn_data {args.knn_data} is for --knn_freq N, which is not given')
        return {}
    path, sizes = args.knn_data or args.data_path, args.knn_images
    no_val = args.dataset in named.FOLDERS and not named.has_val(path)
    share = sizes[1] / sum(sizes) if no_val else None
    options = dict(dataset=args.dataset, data_path=path, download=False, seed=args.seed, val_share=share)
    try:
        splits = named.labelled_splits(
            argparse.Namespace(**options, nb_classes=None, eval_logits='all'), ('train', 'val')
        )
    except UserError as error:
        reason = str(error).replace('--val_share 0.1 takes a tenth of train/', 'part of train/ validates')
        raise UserError(f'--knn_freq needs labelled images, in --data_path or --knn_data PATH: {reason}') from error
    train, val = (named.some(split, args.seed, size) for split, size in zip(splits, sizes, strict=True))
    counts = f'{len(train.images)} training and {len(val.images)} validation images of {len(train.classes)} classes'
    note = f'--knn_freq: {counts} in {path}' + ', where part of each class validates' * no_val
    return {'knn_train': train._replace(notes=[note]), 'knn_val': val._replace(notes=[])}


class Neighbours:
    """Top-1 of a k-NN classifier (DINO's) on the encoder's pooled features, and the RankMe of those of training images.

    `network` is the classifier that the pretraining model becomes. Its head is not used; its encoder is given the
    model's own weights, without a copy. The ranks share the images; each has the same result, for any number of ranks.
    """

    def __init__(self, network: nn.Module, images: dict[str, Split], args: argparse.Namespace, device: torch.device):
        train, val = images['knn_train'], images['knn_val']
        self.network, self.device, self.side = network.to(device), device, args.input_size
        self.classes = len(train.classes)
        labels = np.concatenate([train.labels, val.labels])
        self.labels = torch.from_numpy(labels)
        self.train = torch.arange(len(self.labels)) < len(train.images)
        options = argparse.Namespace(**vars(args) | {'eval_size': None, 'crop_pct': CROP_PCT})
        self.batches = build.val_loader(options, train.images + val.images, labels, device)
        self.normalise = Normalisation.of(args.mean, args.std, device)
        self.began, self.seconds = time.perf_counter(), 0.0

    def measure(self, core: nn.Module) -> dict[str, float]:
        """`knn_top1` in percent; `rank`, and `rank_share`, that of the features' number. Every rank must call it."""
        began = time.perf_counter()
        self.network.load_state_dict(core.encoder_state_dict(), strict=False, assign=True)
        dist.share_running_statistics(self.network)
        features, read = self.features()
        train, val = read & self.train, read & ~self.train
        scores = dict.fromkeys(('knn_top1', 'rank', 'rank_share'), math.nan)
        if train.any() and val.any() and features.isfinite().all():
            votes = knn_scores(features[train], self.labels[train], features[val], [K], TEMPERATURE, self.classes)[K]
            rank = rankme(features[train])
            right = (votes.argmax(1) == self.labels[val]).double().mean().item()
            scores = {'knn_top1': 100 * right, 'rank': rank, 'rank_share': rank / features.shape[1]}
        now = time.perf_counter()
        self.seconds += now - began
        info(
            f'{K}-NN top-1 {scores["knn_top1"]:.1f}% of {val.sum()} images by {train.sum()} others; effective rank '
            f'{scores["rank"]:.1f} of {features.shape[1]}; took {now - began:.1f} s; '
            f'all measures together: {100 * self.seconds / (now - self.began):.0f}% of the time so far'
        )
        return scores

    def features(self) -> tuple[Tensor, Tensor]:
        """[N, D] of all images on the CPU, and which of them could be read, bool [N]; the same on every rank."""
        width = widths(self.network, self.side, 'last', 'pooled')['pooled']
        found = torch.zeros(len(self.labels), width + 1, device=self.device)
        for batch, (vectors, labels) in zip(
            self.batches.batch_sampler, stream(self.network, self.batches, normalise=self.normalise), strict=True
        ):
            places = [index for _, index in batch]
            found[places, :-1] = vectors['pooled']
            found[places, -1] = (labels >= 0).to(found)
        dist.barrier()  # hosts notice a lost rank, before any of them waits for a GPU
        found = dist.all_reduce_sum(found).cpu()
        return found[:, :-1], found[:, -1] > 0
