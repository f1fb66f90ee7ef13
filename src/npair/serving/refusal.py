"""Why a photo is refused, in words for whoever sent it."""

from __future__ import annotations

REASONS = ("empty", "too_many_bytes", "too_many_pixels", "too_many_scans", "not_an_image", "damaged")


class PhotoError(ValueError):
    """A photo that cannot be embedded; the message says why and what to do.

    reason: the same in one word, of REASONS, for whatever counts.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
