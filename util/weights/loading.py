"""Checkpoints of any origin into our models: the file, the tables of its formats, the weights."""

from collections.abc import Collection
from pathlib import Path

from torch import nn

from util.errors import CheckpointError
from util.weights import download
from util.weights.files import SAFETENSORS, TORCH, read_checkpoint, read_folder
from util.weights.intake import (
    Intake,
    OtherFormatError,
    Report,
    find_origin,
    is_detection,
    is_segmentation,
    load,
)
from util.weights.published import ANY_INTAKE, ENCODERS, INTAKES
from util.weights.published_detectors import NECKS, detector_intake, of_detector, windowed_intake
from util.weights.published_segmenters import encoder_intake, segmenter_intake, without_heads


def read_source(source: str | Path) -> dict:
    """What the checkpoint at a path or a URL, or the export in a folder, holds. Raises CheckpointError."""
    path = download.fetch(source)
    return read_folder(path) if path.is_dir() else read_checkpoint(path)


def file_of(source: str | Path) -> Path:
    """The local file that holds the weights of a path, a URL or an exported folder."""
    path = download.fetch(source)
    return next((path / name for name in (SAFETENSORS, TORCH) if (path / name).is_file()), path)


def load_published(
    model: nn.Module,
    source: str | Path | dict,
    *,
    ema: bool = False,
    label: str = 'state dict',
    flag: str = '--use_ema',
    new_decoder: bool = False,
    new_classes: bool = False,
) -> Report:
    """Fill a pretraining model, a classifier, an encoder, a segmenter or a detector from a published or own checkpoint.

    `source` is a path, a URL with its hash (`download.py`), or a state dict in the paper's own names: torch tensors in
    torch's layout, or numpy arrays in Paddle's. A class that no table lists takes our own checkpoints of it. Names may
    stand under a prefix. Positions for another image size or window are resized. `ema` asks for the averaged weights;
    `flag` is what the user knows it by; `label` is what a dict is called, such as the path that it was read from.
    With `new_decoder`, a pretraining model takes an encoder alone, too. A segmenter takes a segmentation file whole, a
    detector a detection file, and both any other into their encoder; with `new_classes` their own for other classes,
    too.
    Raises CheckpointError when the source is not for this model, naming the first five keys that differ with both
    shapes, or holds values that are not finite; the model is then unchanged.
    """
    label = label if isinstance(source, dict) else str(source).partition('#')[0]
    container = source if isinstance(source, dict) else read_source(source)
    try:
        if hasattr(model, 'decode_head'):
            report = load_segmenter(model, container, ema, flag, new_classes)
        elif hasattr(model, 'roi_heads'):
            report = load_detector(model, container, ema, flag, new_classes)
        else:
            report = load_other(model, container, ema, flag, new_decoder)
    except CheckpointError as error:
        origin = find_origin(container)
        raise type(error)(f'{label}: {error}' + (f'; it was written by {origin}' if origin else '')) from error
    report.source = label
    return report


def load_segmenter(model: nn.Module, container: dict, ema: bool, flag: str, new_classes: bool) -> Report:
    """All of a segmentation file, or of any other what is for the encoder: pyramid and heads stay as initialised."""
    if is_segmentation(container):
        return load(model, container, segmenter_intake(model, new_classes), ema, flag)
    intake = intake_of(type(model.encoder).__name__, model.encoder, container)
    report = load(model.encoder, container, intake, ema, flag)
    return encoder_alone(report, model, 'encoder.', ())


def load_detector(model: nn.Module, container: dict, ema: bool, flag: str, new_classes: bool) -> Report:
    """All of a detection file, or of any other what is for the encoder: neck and heads stay as initialised.

    The last stage of a ResNet with C4's head is in the head.
    """
    if is_detection(container):
        return load(model, container, detector_intake(model, new_classes), ema, flag)
    encoder = model.backbone.encoder
    own, last = encoder.state_dict(), 'roi_heads.layer4.'
    beside = {key.removeprefix('roi_heads.'): x for key, x in model.state_dict().items() if key.startswith(last)}
    intake = intake_of(type(encoder).__name__, encoder, container)
    report = load(encoder, container, intake, ema, flag, own | beside)
    return encoder_alone(report, model, 'backbone.encoder.', beside)


def encoder_alone(report: Report, model: nn.Module, prefix: str, beside: Collection[str]) -> Report:
    """The same report in the names of the whole model; what is `beside` the encoder is a detector's RoI head's."""
    for names in (report.loaded, report.resized, report.missing):
        names[:] = [('roi_heads.' if name in beside else prefix) + name for name in names]
    own = (prefix, *(f'roi_heads.{name}' for name in beside))
    report.missing += [name for name in model.state_dict() if not name.startswith(own)]
    report.format += ', encoder alone: the heads are new'
    return report


def load_other(model: nn.Module, container: dict, ema: bool, flag: str, new_decoder: bool) -> Report:
    """A pretraining model, a classifier or an encoder."""
    intake = intake_of(type(model).__name__, model, container)
    try:
        return load(model, container, intake, ema, flag)
    except CheckpointError as error:
        if not new_decoder or (intake and not isinstance(error, OtherFormatError)):
            raise
        return load_encoder(model, container, ema, flag)


def intake_of(name: str, network: nn.Module, container: dict) -> Intake | None:
    """Of a class by its name, for what a file holds."""
    if known := NECKS.get(name):
        return known
    if type(network).__name__ == 'WindowedViT':
        intake = windowed_intake(network)
    elif hasattr(network, 'widths'):  # of the maps that an encoder for dense tasks gives
        intake = encoder_intake(network)
    else:
        intake = INTAKES.get(name, ANY_INTAKE if type(network).__module__.startswith('timm.') else None)
    if intake and is_detection(container):
        return of_detector(intake)
    return without_heads(intake) if intake and is_segmentation(container) else intake


def load_encoder(model: nn.Module, container: dict, ema: bool, flag: str) -> Report:
    """The encoder alone; what else the model has stays as initialised."""
    network = getattr(model, 'encoder', model)
    intake = intake_of(ENCODERS.get(type(model).__name__, type(network).__name__), network, container)
    report = load(network, container, intake, ema, flag, model.encoder_state_dict())
    shared = {value.data_ptr() for value in model.encoder_state_dict().values()}
    report.missing += [name for name, value in model.state_dict().items() if value.data_ptr() not in shared]
    report.format += ', encoder alone: the decoder is new'
    return report
