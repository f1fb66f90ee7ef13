"""Embed a list of photos too long for one machine: Ray Data around a version's own code."""

from __future__ import annotations


class BulkError(RuntimeError):
    """A list, an output or a node that cannot be used; the message says what to do."""
