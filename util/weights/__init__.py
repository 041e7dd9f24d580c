"""Checkpoint files of any origin: the one room that reads the files of others. This is its door.

`load_published` fills a model from a file, a URL or a state dict. `read_checkpoint` gives what a file holds,
`read_source` what a file or a URL does.
"""

from util.weights.files import check_file, plain_field, read_checkpoint
from util.weights.intake import Origin, check_finite, find_origin
from util.weights.published import load_published, read_source

__all__ = [
    'Origin',
    'check_file',
    'check_finite',
    'find_origin',
    'load_published',
    'plain_field',
    'read_checkpoint',
    'read_source',
]
