"""A network of ours as a folder: what timm opens, or plain torch weights. `files.read_folder` reads both back.

A folder holds `model.safetensors` (for timm) or `model.pth` (torch), its SHA-256, `config.json` and `README.md`.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

from util import digests
from util.errors import CheckpointError, StorageError, UserError, listed
from util.weights.files import CONFIG, ORIGIN, SAFETENSORS, TORCH, write_weights

CARD = 'README.md'
WRITTEN = {CONFIG, CARD, *(f'{name}{end}' for name in (SAFETENSORS, TORCH) for end in ('', '.sha256'))}
LARGEST_DIFFERENCE = 1e-4  # of features, relative to the largest; another network's are as different as they are large


def take_head_off(network: nn.Module) -> None:
    """From now on the network gives what its last layer was given, [N, D]."""
    if hasattr(network, 'reset_classifier'):
        network.reset_classifier(0)
    else:
        network.head = nn.Identity()


PROBE = ('0.running_mean', '0.running_var', '1.weight', '1.bias')  # of `util.nn.linear_probe.ProbeHead`


def fold_probe(container: dict, eps: float = 1e-6) -> dict:
    """A checkpoint in which a linear probe's head, BatchNorm and Linear, is the one Linear that computes the same."""

    def folded(state: dict) -> dict:
        for head in [str(key).removesuffix(PROBE[0]) for key in state if str(key).endswith(f'.{PROBE[0]}')]:
            if all(isinstance(state.get(head + part), Tensor) for part in PROBE):
                mean, var, weight, bias = (state[head + part].double() for part in PROBE)
                weight = weight / (var + eps).sqrt()
                state = {key: x for key, x in state.items() if not str(key).startswith((f'{head}0.', f'{head}1.'))}
                state |= {f'{head}weight': weight.float(), f'{head}bias': (bias - weight @ mean).float()}
        return state

    args = container.get('args')
    if not isinstance(args, dict) or args.get('probe') != 'linear':
        return container
    return container | {key: folded(container[key]) for key in ('model', 'ema') if isinstance(container.get(key), dict)}


def export(
    network: nn.Module,
    folder: Path,
    *,
    for_timm: bool,
    num_classes: int,
    images: dict[str, Any],
    origin: dict,
    card: Callable[[float | None], str],
) -> float | None:
    """Write a network into a folder, whole or not at all; an earlier export there is replaced.

    `for_timm`: such that `timm.create_model('local-dir:FOLDER', pretrained=True)` makes it. The network needs a
    `timm_recipe` then. timm opens it before it takes its place: the `difference` is returned, and given to `card`,
    whose text becomes the README. `images`: input_size in pixels, mean, std and crop_pct. `origin`: what `find_origin`
    is to find when the folder is read (args, classes, run), and which `weights` they are, 'model' or 'encoder'.

    Raises UserError for a place that is taken, CheckpointError if timm's network computes other features, and
    StorageError for a disk that cannot take it.
    """
    config, found = {ORIGIN: origin}, None
    if for_timm:
        labels = {'label_names': origin['classes']} if num_classes and origin.get('classes') else {}
        config = timm_config(network, num_classes, **images) | labels | config
    with new_folder(folder) as part:
        weights = part / (SAFETENSORS if for_timm else TORCH)
        write_weights(weights, timm_state(network) if for_timm else network.state_dict())
        digests.write_sums(weights, [digests.sum_of(weights)])
        digests.replace(part / CONFIG, (json.dumps(config, indent=2) + '\n').encode())
        if for_timm:
            found = difference(network, part, images['input_size'])
            if not found <= LARGEST_DIFFERENCE:
                raise CheckpointError(
                    f"timm's {config['architecture']} computes other features from these weights (by {found:.1e} of "
                    f'their size): --format torch writes them as they are'
                )
        digests.replace(part / CARD, card(found).encode())
    return found


def timm_config(network: nn.Module, num_classes: int, input_size: int, **images: Any) -> dict:
    """What `local-dir:` reads of a network with a `timm_recipe`."""
    architecture, options = network.timm_recipe
    defaults = timm.get_pretrained_cfg(architecture).to_dict()
    names = {name: defaults.get(name) for name in ('fixed_input_size', 'first_conv', 'classifier')}
    images |= dict(input_size=[3, input_size, input_size], interpolation='bicubic', crop_mode='center')
    return {
        'architecture': architecture,
        'num_classes': num_classes,
        'model_args': options,
        'pretrained_cfg': images | names | {'num_classes': num_classes},
    }


def timm_state(network: nn.Module) -> dict[str, Tensor]:
    """The weights as timm takes them.

    A Swin without a head goes with each merging at the end of a stage, as originally: timm before 1.0.31 takes every
    headless file for such a one, and later ones tell them apart. LocalMIM's has these names itself.
    """
    state = network.state_dict()
    if not isinstance(network, SwinTransformer) or network.num_classes:
        return state
    moved = {
        f'layers.{stage}.downsample.': f'layers.{stage - 1}.downsample.' for stage in range(1, len(network.layers))
    }
    return {moved.get(name[:20], name[:20]) + name[20:]: value for name, value in state.items()}


@torch.no_grad()
def difference(network: nn.Module, folder: Path, input_size: int) -> float:
    """The largest one between what the network and timm's from the folder give for two images, relative to its size.

    Of features before the pooling, and of answers. LocalMIM's Swin norms the mean of its tokens, timm's averages normed
    tokens: of these alone.
    """
    imgs = torch.randn(2, 3, input_size, input_size, generator=torch.Generator().manual_seed(0))
    network, theirs = network.eval(), timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    if hasattr(network, 'timm_state_dict'):
        pairs = [(network.norm(network.forward_features(imgs)), theirs.forward_features(imgs).flatten(1, 2))]
    else:
        pairs = [(network.forward_features(imgs), theirs.forward_features(imgs)), (network(imgs), theirs(imgs))]
    return max(((ours - other).abs().max() / ours.abs().max()).item() for ours, other in pairs)


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write to that takes its place at the end of the `with` block, also that of an earlier export.

    Raises UserError for a place that is taken by anything else, StorageError for a disk that cannot take it.
    """
    check_free(folder)
    part, old = (folder.with_name(f'.{folder.name}.{os.getpid()}.{end}') for end in ('tmp', 'old'))
    try:
        part.mkdir(parents=True)
        yield part
        digests.flush_folder(part)
        if folder.exists():
            folder.rename(old)
        part.rename(folder)
        digests.flush_folder(folder.parent)
    except OSError as error:
        raise StorageError(f'cannot write {folder}: {error.strerror or error}') from error
    finally:
        if old.exists() and not folder.exists():  # stopped between the two
            old.rename(folder)
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def check_free(folder: Path) -> None:
    """Raise UserError for a path that an export cannot take."""
    if file := next((parent for parent in folder.parents if parent.is_file()), None):
        raise UserError(f'cannot write {folder}: {file} is a file, not a folder')
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise UserError(f'cannot write {folder}: an export is a folder, and a file or a link has this name')
    inside = sorted(file.name for file in folder.iterdir()) if folder.is_dir() else []
    config = folder / CONFIG
    exported = config.is_file() and ORIGIN in config.read_text(errors='replace')
    others = [name for name in inside if name not in WRITTEN or not exported]
    if others:
        raise UserError(f'{folder} holds files that no export wrote ({listed(others)}): give another folder')
