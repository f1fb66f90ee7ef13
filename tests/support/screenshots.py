"""Take the pictures of docs/web.md from a running ``npair web``: python -m support.screenshots."""

from __future__ import annotations

import argparse
import io
from pathlib import Path

from PIL import Image

from support.browser import browsing
from support.models import ROOT

LOOKS = {"search-desk.jpg": (1280, "light", 1), "search-phone.jpg": (390, "dark", 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url", help="of npair web")
    parser.add_argument("photo", type=Path, help="to search by")
    arguments = parser.parse_args()
    with browsing() as browser:
        for name, (width, scheme, scale) in LOOKS.items():
            browser.look(width, scheme, scale=scale)
            browser.get(arguments.url)
            browser.until("#about", "photos")
            browser.choose(arguments.photo.resolve())
            browser.until("#groups", "cosine")
            browser.loaded()
            picture = Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB")
            picture.save(ROOT / "docs" / name, quality=80, optimize=True, progressive=True)


if __name__ == "__main__":
    main()
