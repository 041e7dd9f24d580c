"""Checkpoint files of any origin: the one room that reads the files of others."""

from util.weights.published import load_published

__all__ = ['load_published']
