"""Errors of the runtime and the lab. Every message is one sentence: what was wrong, the value, what would be right."""

from __future__ import annotations


class KataLabError(Exception):
    """Base of all errors that this package raises on purpose."""


class ImageError(KataLabError):
    """A guest image that cannot be built, fetched or read."""
