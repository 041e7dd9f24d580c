"""Checkpoint files of any origin: the one room that reads the files of others. This is its door.

`load_published` fills a model from a file, a URL or a state dict. `read_checkpoint` gives what a file holds.
"""

from util.weights import download
from util.weights.download import fetch
from util.weights.files import plain_field, read_checkpoint
from util.weights.intake import Origin, Report, check_finite, find_origin
from util.weights.published import load_published

__all__ = [
    'Origin',
    'Report',
    'check_finite',
    'download',
    'fetch',
    'find_origin',
    'load_published',
    'plain_field',
    'read_checkpoint',
]
