"""Checkpoint files of any origin: the one room that reads the files of others. This is its door.

`load_published` fills a model from a file, a URL or a state dict. `read_checkpoint` gives what a file holds,
`read_source` what a file, a URL or an exported folder does. `export` writes such a folder.
"""

from util.weights.exports import check_free, export, fold_probe, take_head_off
from util.weights.files import check_file, plain_field, read_checkpoint
from util.weights.intake import (
    Origin,
    OtherFormatError,
    Report,
    check_finite,
    class_names,
    find_origin,
    is_detection,
    is_paddle,
    is_segmentation,
)
from util.weights.loading import file_of, load_published, read_source

__all__ = [
    'Origin',
    'OtherFormatError',
    'Report',
    'check_file',
    'check_finite',
    'check_free',
    'class_names',
    'export',
    'file_of',
    'find_origin',
    'fold_probe',
    'is_detection',
    'is_paddle',
    'is_segmentation',
    'load_published',
    'plain_field',
    'read_checkpoint',
    'read_source',
    'take_head_off',
]
