"""Photos that arrive as text, from clients that can send only JSON.

Only serving accepts text: in a data set, a file of text is a mistake to report.
"""

from __future__ import annotations

import base64
import re

from .preprocess import Limits, is_photo
from .refusal import PhotoError, no_photo

# The first bytes of JPEG and PNG are outside the alphabet; WebP is recognised by its signature.
BEGINS_LIKE_BASE64 = re.compile(rb"\s*[A-Za-z0-9+/_-]{16}")
DATA = re.compile(rb"\s*data:([^,]{0,1000}),", re.IGNORECASE)
OTHER = re.compile(rb"[^A-Za-z0-9+/]")
# What a URI may escape of base64. Python's decoder of any escape would take 180 bytes for each.
ESCAPES = {form % code: bytes([code]) for code in b"+/=\r\n " for form in (b"%%%02X", b"%%%02x")}


def photo_of(sent: bytes, limits: Limits) -> bytes:
    """Decode a photo sent as base64 text or as a ``data:`` URI; return anything else unchanged.

    The text may be standard or URL-safe, padded or not, and broken into lines.
    Raises: PhotoError if the text is too long for a photo within ``limits``, turns out not to be
    base64, or does not hold a photo.
    """
    uri = DATA.match(sent[:1100])
    if is_photo(sent) or not (uri or BEGINS_LIKE_BASE64.match(sent)):
        return sent
    if len(sent) > limits.max_bytes * 3 // 2 + 1100:  # 4/3, and line breaks
        raise PhotoError(
            "too_many_bytes",
            f"base64 text of {len(sent)} bytes, more than a photo within the limit of"
            f" {limits.max_bytes} has; send a smaller file",
        )
    if uri and not uri[1].lower().rstrip().endswith(b";base64"):
        raise PhotoError(
            "not_an_image",
            "a data: URI that is not base64; send data:image/jpeg;base64, and then the photo's"
            " base64",
        )
    text = sent[uri.end() :] if uri else sent
    for escape, character in ESCAPES.items() if uri else ():
        text = text.replace(escape, character)
    text = text.translate(bytes.maketrans(b"-_", b"+/"), b" \t\r\n").rstrip(b"=")
    if other := OTHER.search(text):
        raise PhotoError(
            "not_an_image",
            f"looks like base64, but character {other.start() + 1} of it is no part of that;"
            " send a JPEG, PNG or WebP",
        )
    if len(text) % 4 == 1:
        raise PhotoError(
            "not_an_image",
            "looks like base64, but is not whole: a character is missing or too many;"
            " send all of it",
        )
    photo = base64.b64decode(text + b"=" * (-len(text) % 4))
    if photo and not is_photo(photo):
        message = f"looks like base64, but what it stands for is {no_photo(photo)}"
        raise PhotoError("not_an_image", message)
    return photo
