"""A real Chromium without a window, and what a test does and reads in it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

from support.servers import eventually

PROGRAMS = ("chromium", "chromedriver")
QUIET = ("background-networking", "component-update", "default-apps", "sync")
LOADED = """
const images = [...document.images].filter((image) => image.checkVisibility());
return images.every((image) => image.complete && image.naturalWidth > 0);
"""


class Browser(webdriver.Chrome):
    """Debian's Chromium, and Debian's driver, so that nothing is downloaded."""

    def __init__(self) -> None:
        missing = [name for name in PROGRAMS if shutil.which(name) is None]
        if missing:
            refuse = pytest.fail if "CI" in os.environ else pytest.skip
            refuse(
                f"these tests need {' and '.join(missing)}:"
                " apt-get install --no-install-recommends chromium chromium-driver"
            )
        options = webdriver.ChromeOptions()
        options.binary_location = str(shutil.which("chromium"))
        # Chromium's sandbox refuses root, which containers run tests as.
        flags = ("headless=new", "no-sandbox", "disable-dev-shm-usage", "hide-scrollbars")
        for flag in (*flags, *(f"disable-{name}" for name in QUIET)):
            options.add_argument(f"--{flag}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        super().__init__(options, Service(shutil.which("chromedriver")))

    def look(
        self, width: int, scheme: str = "light", *, still: bool = True, scale: int = 1
    ) -> None:
        """Become a desk's screen or a phone's, light or dark, with or without motion.

        scale: of a picture of it, in pixels.
        """
        phone = width < 720
        height = 844 if phone else 900
        screen = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": phone}
        self.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        self.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": phone})
        features = {
            "prefers-color-scheme": scheme,
            "prefers-reduced-motion": "reduce" if still else "no-preference",
        }
        media = [{"name": name, "value": value} for name, value in features.items()]
        self.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})

    def one(self, selector: str) -> WebElement:
        return self.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[WebElement]:
        return self.find_elements(By.CSS_SELECTOR, selector)

    def texts(self, selector: str) -> list[str]:
        return [element.text for element in self.all(selector)]

    def until(self, selector: str, text: str) -> None:
        """Wait until an element shows a text."""
        try:
            eventually(
                lambda: text in self.run(f"return document.querySelector('{selector}').innerText")
            )
        except AssertionError:
            shown = self.one("body").text
            pytest.fail(f"{selector} does not show {text!r}; the page shows:\n{shown}")

    def run(self, code: str, *arguments: object) -> Any:
        return self.execute_script(code, *arguments)

    def choose(self, path: Path) -> None:
        """Choose a file in the dialog behind "Choose a photo"."""
        self.one("#file").send_keys(str(path))

    def drop(self, path: Path) -> None:
        """Drag a file from the desktop onto the page."""
        data = {"items": [], "files": [str(path)], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            event = {"type": kind, "x": 300, "y": 300, "data": data}
            self.execute_cdp_cmd("Input.dispatchDragEvent", event)

    def loaded(self) -> None:
        """Wait until all pictures are there."""
        eventually(lambda: self.run(LOADED))

    def events(self) -> list[dict[str, Any]]:
        """Return what the network did since the last call."""
        entries: list[dict[str, Any]] = self.get_log("performance")  # type: ignore[no-untyped-call]
        return [json.loads(entry["message"])["message"] for entry in entries]

    def complaints(self) -> list[str]:
        """Return what the console says since the last call."""
        entries: list[dict[str, Any]] = self.get_log("browser")  # type: ignore[no-untyped-call]
        return [entry["message"] for entry in entries]


def requested(events: list[dict[str, Any]]) -> list[str]:
    """Return the URLs that a page asked the network for."""
    requests = (e["params"] for e in events if e["method"] == "Network.requestWillBeSent")
    urls = [request["request"]["url"] for request in requests]
    return [url for url in urls if urlsplit(url).scheme not in ("blob", "data")]


@contextmanager
def browsing() -> Iterator[Browser]:
    browser = Browser()
    try:
        yield browser
    finally:
        browser.quit()
