"""The search page of ``npair web`` in a real Chromium, before real servers and a drawn gallery."""

from __future__ import annotations

import base64
import io
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image
from selenium.webdriver import ActionChains
from selenium.webdriver.common.keys import Keys
from support.browser import Browser, browsing, requested
from support.models import SHIPPED
from support.photos import PNG, table
from support.servers import eventually, free_ports, running
from support.web import call, serving

from npair.client import NpairClient
from npair.gallery.build import build
from npair.gallery.gallery import Gallery
from npair.publishing.drawings import draw
from npair.web.search import MAX_K

PRODUCT = 3
KEY = "k" * 32
LOOKS = [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")]
# Relative luminance and contrast as WCAG 2.2 defines them, of all text that is shown.
CONTRASTS = """
const linear = (c) => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4;
const light = ([r, g, b]) =>
  .2126 * linear(r / 255) + .7152 * linear(g / 255) + .0722 * linear(b / 255);
const parts = (colour) => colour.match(/[\\d.]+/g).map(Number);
const ground = (element) => {
  for (let at = element; at; at = at.parentElement) {
    const colour = parts(getComputedStyle(at).backgroundColor);
    if (colour.length === 3 || colour[3] > 0) return colour;
  }
};
return [...document.querySelectorAll("body *")]
  .filter((e) => e.checkVisibility())
  .filter((e) => [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()))
  .map((e) => [light(parts(getComputedStyle(e).color)), light(ground(e)), e.textContent.trim()])
  .map(([a, b, text]) => [(Math.max(a, b) + .05) / (Math.min(a, b) + .05), text]);
"""


CARDS = """
return [...document.querySelectorAll("#groups a[href]")].map((link) => [
  new URL(link.href).searchParams.get("photo"),
  link.querySelector(".label").innerText,
  link.querySelector(".cosine span:last-child").innerText,
]);
"""


@contextmanager
def process(index: Path, triton: str, port: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run ``npair web`` as a process of its own, to be stopped and killed."""
    command = f"{sys.executable} -m npair web --index {index} --url {triton}".split()
    with subprocess.Popen([*command, "--port", port], stderr=subprocess.PIPE) as web:
        try:
            assert web.stderr is not None
            assert b"http://" in web.stderr.readline()
            yield web
        finally:
            web.send_signal(signal.SIGCONT)
            web.terminate()


def neighbours(url: str, photo: Path | str, k: int = 12) -> list[dict[str, Any]]:
    """Ask the service without a browser; photo: a file, or a photo of the gallery by id."""
    body = photo.read_bytes() if isinstance(photo, Path) else b""
    query = "" if isinstance(photo, Path) else f"&photo={photo}"
    return list(call(url, f"/search?k={k}{query}", body, method="POST").json["neighbours"])


@pytest.fixture(scope="module")
def triton() -> Iterator[str]:
    with running() as (_, urls):
        yield urls["http"]


@pytest.fixture(scope="module")
def index(triton: str, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gallery")
    photos = sorted(dataset.glob("*/*/*.jpg"))
    rows = [f"{photo},{photo.parent.name},1.20,A3\n" for photo in photos]
    catalogue = table(folder, "path,label,price,shelf\n" + "".join(rows))
    with NpairClient(triton) as client:
        build(catalogue, folder / "index", client)
    return folder / "index"


@pytest.fixture(scope="module")
def url(index: Path, triton: str) -> Iterator[str]:
    with serving(index, triton) as url:
        yield url


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browsing() as browser:
        yield browser


@pytest.fixture
def page(chromium: Browser, url: str) -> Iterator[Browser]:
    """A browser at the start, which must ask no other host and find no fault in the page."""
    chromium.look(1280)
    chromium.get(url)
    chromium.until("#about", "photos")
    chromium.events(), chromium.complaints()
    yield chromium
    chromium.execute_cdp_cmd("Storage.clearDataForOrigin", {"origin": url, "storageTypes": "all"})
    chromium.run("sessionStorage.clear()")
    assert chromium.complaints() == []
    assert [one for one in requested(chromium.events()) if not one.startswith(url)] == []


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A photo of a product that the gallery has others of."""
    return saved(tmp_path / "photo.png")


def saved(path: Path, **options: Any) -> Path:
    draw(PRODUCT, 77).save(path, **options)
    return path


def as_sent(image: Image.Image, folder: Path) -> Path:
    """Write the JPEG that the browser should make of a picture."""
    image.save(folder / "sent.jpg", quality=92)
    return folder / "sent.jpg"


def shows(page: Browser, expected: list[dict[str, Any]], within: float = 0.0) -> None:
    """Wait until the page shows these neighbours, or others with cosines as close as ``within``."""
    wanted = [(hit["id"], hit["label"]) for hit in expected]
    cosines = pytest.approx([hit["cosine"] for hit in expected], abs=within + 6e-4)
    cards: list[list[str]] = []

    def there() -> bool:
        cards[:] = page.run(CARDS)
        same = within or wanted == [(identifier, label) for identifier, label, _ in cards]
        return bool(same) and [float(cosine) for *_, cosine in cards] == cosines

    try:
        eventually(there)
    except AssertionError:
        pytest.fail(f"the page shows {cards}, not {wanted} with {cosines}")
    page.loaded()


class TestSearch:
    def test_choose(self, page: Browser, url: str, photo: Path) -> None:
        page.choose(photo)
        page.until("#caption", "photo.png")
        shows(page, neighbours(url, photo))

    def test_drop(self, page: Browser, url: str, photo: Path) -> None:
        page.drop(photo)
        shows(page, neighbours(url, photo))
        assert not page.one("#dragged").is_displayed()

    def test_paste(self, page: Browser, url: str, photo: Path) -> None:
        permissions = ["clipboardReadWrite", "clipboardSanitizedWrite"]
        page.execute_cdp_cmd(
            "Browser.grantPermissions", {"permissions": permissions, "origin": url}
        )
        page.execute_async_script(
            "const [photo, done] = arguments;"
            "const bytes = Uint8Array.from(atob(photo), (each) => each.charCodeAt());"
            "const blob = new Blob([bytes], { type: 'image/png' });"
            "navigator.clipboard.write([new ClipboardItem({ 'image/png': blob })]).then(done);",
            base64.b64encode(photo.read_bytes()).decode(),
        )
        ActionChains(page).key_down(Keys.CONTROL).send_keys("v").key_up(Keys.CONTROL).perform()
        page.until("#caption", "Pasted picture")
        shows(page, neighbours(url, photo))

    def test_what_is_no_file(self, page: Browser) -> None:
        page.run(
            "const data = new DataTransfer(); data.setData('text/plain', 'words');"
            "document.body.dispatchEvent("
            "new ClipboardEvent('paste', { clipboardData: data, bubbles: true }));"
        )
        page.until("#trouble", "That is no picture file.")

    def test_same_product_by_the_threshold(self, page: Browser, url: str, photo: Path) -> None:
        page.choose(photo)
        expected = neighbours(url, photo)
        shows(page, expected)
        same = [hit["label"] for hit in expected if hit["same_product"]]
        assert 0 < len(same) < 12, "the drawings must be on both sides of the threshold"
        assert page.texts("#groups h2") == ["Same product", "Similar, below the threshold"]
        assert page.texts(".same .label") == same
        assert set(page.texts(".columns")) == {"price 1.20 \N{MIDDLE DOT} shelf A3"}
        assert page.one("#title").text == same[0]
        assert f"{len(same)} photo" in page.one("#detail").text
        assert page.one("#about").text == f"Version {SHIPPED.name} · 36 photos"

    def test_more(self, page: Browser, url: str, photo: Path) -> None:
        page.choose(photo)
        shows(page, neighbours(url, photo))
        page.one("#more").click()
        shows(page, neighbours(url, photo, k=24))
        page.one("#more").click()
        shows(page, neighbours(url, photo, k=48))
        assert not page.one("#more").is_displayed(), "there are 36"

    def test_no_more_than_the_api_gives(
        self, chromium: Browser, index: Path, triton: str, photo: Path, tmp_path: Path
    ) -> None:
        table = Gallery(shutil.copytree(index, tmp_path / "index")).table
        table.add(pa.concat_tables([table.to_arrow()] * 2))
        chromium.look(1280)
        with serving(tmp_path / "index", triton) as url:
            chromium.get(url)
            chromium.choose(photo)
            for k in (12, 24, 48, 96, MAX_K):
                eventually(lambda k=k: len(chromium.run(CARDS)) == k)  # type: ignore[misc]
                assert chromium.one("#more").is_displayed() == (k < MAX_K)
                if k < MAX_K:
                    chromium.one("#more").click()

    def test_by_neighbour_and_back(self, page: Browser, url: str, photo: Path) -> None:
        page.look(1280, still=False)
        page.choose(photo)
        first = neighbours(url, photo)
        shows(page, first)
        page.all("#groups a")[3].click()
        second = neighbours(url, first[3]["id"])
        page.until("#note", "From the gallery")
        shows(page, second)
        assert page.current_url.endswith(f"?photo={first[3]['id']}")
        page.all("#groups a")[1].click()
        page.until("#note", "From the gallery")
        shows(page, neighbours(url, second[1]["id"]))
        page.back()
        shows(page, second)
        page.back()
        shows(page, first)
        assert page.one("#caption").text == "photo.png"
        page.back()
        page.until("h1", "Search by photo")
        page.forward()
        shows(page, first)

    def test_a_link_to_a_neighbour(self, page: Browser, url: str, photo: Path) -> None:
        identifier = neighbours(url, photo)[0]["id"]
        page.get(f"{url}/?photo={identifier}")
        shows(page, neighbours(url, identifier))
        page.get(f"{url}/?photo={'0' * 64}")
        page.until("#title", "The search failed")
        page.complaints()  # Chromium itself reports the 404

    def test_by_a_photo_that_has_copies_alone(
        self, chromium: Browser, index: Path, triton: str, tmp_path: Path
    ) -> None:
        """The gallery is not called empty."""
        table = Gallery(shutil.copytree(index, tmp_path / "index")).table
        identifier = table.search().select(["sha256"]).to_list()[0]["sha256"]
        table.delete(f"sha256 != '{identifier}'")
        chromium.look(1280)
        with serving(tmp_path / "index", triton) as url:
            chromium.get(f"{url}/?photo={identifier}")
            chromium.until("#title", "No other photo")

    def test_keyboard_alone(self, page: Browser, url: str, photo: Path) -> None:
        def press(key: str) -> None:
            ActionChains(page).send_keys(key).perform()

        def focused() -> str:
            assert page.run(
                "const style = getComputedStyle(document.activeElement);"
                "return style.outlineStyle === 'solid' && parseFloat(style.outlineWidth) >= 2"
            ), "focus must be visible"
            return page.switch_to.active_element.text

        reached = []
        for _ in range(3):
            press(Keys.TAB)
            reached.append(focused())
        assert reached == ["npair", "API", "Choose a photo"]
        page.choose(photo)  # what Enter opens is the system's
        first = neighbours(url, photo)
        shows(page, first)
        assert page.switch_to.active_element == page.one("#title"), "reading goes on at the answer"
        assert first[0]["label"] in str(page.one("#status").get_attribute("textContent"))
        press(Keys.TAB)
        assert focused().startswith(first[0]["label"])
        press(Keys.ENTER)
        page.until("#note", "From the gallery")
        shows(page, neighbours(url, first[0]["id"]))


class TestReencoding:
    """Compare with what Pillow makes of the same picture; its encoder is another one."""

    @pytest.mark.parametrize("name", ["photo.gif", "photo.avif", "photo.bmp", "photo.png.jpg"])
    def test_formats(self, page: Browser, url: str, tmp_path: Path, name: str) -> None:
        """A GIF named .jpg is a GIF all the same."""
        path = saved(tmp_path / name, format="GIF" if name.endswith("jpg") else None)
        page.choose(path)
        with Image.open(path) as image:
            shows(page, neighbours(url, as_sent(image.convert("RGB"), tmp_path)), within=0.02)
        assert "Sent as JPEG" in page.one("#note").text

    def test_too_many_bytes_of_a_photo_that_lies_on_its_side(
        self, page: Browser, url: str, tmp_path: Path
    ) -> None:
        turned, exif = tmp_path / "turned.jpg", Image.Exif()
        exif[0x0112] = 6  # to be turned by 90 degrees clockwise
        draw(PRODUCT, 77).rotate(90).save(turned, quality=95, exif=exif)
        with turned.open("ab") as file:
            file.write(bytes(20_000_000))
        page.choose(turned)
        shows(page, neighbours(url, as_sent(draw(PRODUCT, 77), tmp_path)), within=0.02)

    def test_too_many_pixels(self, page: Browser, url: str, tmp_path: Path) -> None:
        small, large = draw(PRODUCT, 77), tmp_path / "large.png"
        small.resize((8100, 8100), Image.Resampling.BICUBIC).save(large, compress_level=1)
        page.choose(large)
        page.until("#note", "Scaled from 8100 \N{MULTIPLICATION SIGN} 8100 to 2048")
        scaled = small.resize((2048, 2048), Image.Resampling.BICUBIC)
        shows(page, neighbours(url, as_sent(scaled, tmp_path)), within=0.02)

    def test_transparency_becomes_white(self, page: Browser, url: str, tmp_path: Path) -> None:
        opaque = draw(PRODUCT, 77)
        half = (
            Image.linear_gradient("L").resize(opaque.size).point(lambda value: 255 * (value > 120))
        )
        clear = opaque.convert("RGBA")
        clear.putalpha(half)
        clear.save(tmp_path / "clear.avif", quality=100, subsampling="4:4:4")
        page.choose(tmp_path / "clear.avif")
        white = Image.composite(opaque, Image.new("RGB", opaque.size, "white"), half)
        shows(page, neighbours(url, as_sent(white, tmp_path)), within=0.04)

    @pytest.mark.parametrize(
        ("name", "content", "words"),
        [
            ("empty.jpg", b"", "empty.jpg is empty"),
            ("text.jpg", b"text" * 99, "cannot open text.jpg. Save it as a JPEG"),
            (
                "photo.heic",
                b"\0\0\0\x18ftypheic" + bytes(99),
                "cannot open photo.heic, a HEIC file",
            ),
            ("half.tif", b"II*\0" + bytes(99), "cannot open half.tif, a TIFF file"),
            ("half.png", PNG[:60], "truncated or damaged"),  # the server's words
        ],
    )
    def test_bad_files(
        self, page: Browser, tmp_path: Path, name: str, content: bytes, words: str
    ) -> None:
        path = tmp_path / name
        path.write_bytes(content)
        page.choose(path)
        page.until("#title", "This photo cannot be searched")
        page.until("#detail", words)
        assert page.one("#act").text == "Choose another photo"
        page.complaints()  # Chromium itself reports the 400


class TestFaults:
    def test_slow_then_gone_then_back(
        self, chromium: Browser, index: Path, triton: str, photo: Path, tmp_path: Path
    ) -> None:
        other, port = tmp_path / "other.png", free_ports()["HTTP_PORT"]
        draw(PRODUCT + 1, 77).save(other)
        url = f"http://127.0.0.1:{port}"
        chromium.look(1280)
        with process(index, triton, port) as web:
            chromium.get(url)
            chromium.until("#about", "photos")
            web.send_signal(signal.SIGSTOP)
            chromium.choose(photo)
            chromium.until("#title", "Searching")
            chromium.until("#detail", "The server takes its time.")
            assert chromium.one("#results").get_attribute("aria-busy") == "true"
            chromium.one("#act").click()
            chromium.until("#title", "Cancelled")
            chromium.one("#act").click()
            chromium.until("#title", "Searching")
            chromium.choose(other)
            chromium.until("#caption", "other.png")
            web.send_signal(signal.SIGCONT)
            shows(chromium, neighbours(url, other))  # and not those of the older search
            assert chromium.one("#results").get_attribute("aria-busy") == "false"
            assert chromium.complaints() == []
        chromium.choose(photo)
        chromium.until("#title", "The search does not answer")
        with process(index, triton, port):
            chromium.one("#act").click()
            shows(chromium, neighbours(url, photo))
        chromium.complaints()  # Chromium itself reports the refused connection

    def test_triton_is_away(self, chromium: Browser, index: Path, photo: Path) -> None:
        chromium.look(1280)
        with serving(index, f"http://127.0.0.1:{free_ports()['HTTP_PORT']}") as url:
            chromium.get(url)
            chromium.choose(photo)
            chromium.until("#title", "The search failed")
            chromium.until("#detail", "server")
            assert chromium.one("#act").text == "Try again"
        chromium.complaints()

    def test_key(self, chromium: Browser, index: Path, triton: str, photo: Path) -> None:
        chromium.look(1280)
        with serving(index, triton, key=KEY) as url:
            chromium.get(url)
            eventually(lambda: chromium.one("#door").is_displayed())
            for wrong in ("\u043a\u043b\u044e\u0447", "two words", "wrong"):
                chromium.one("#key").clear()
                chromium.one("#key").send_keys(wrong + Keys.ENTER)
                chromium.until("#door-note", "That key was refused.")
                assert chromium.run("return sessionStorage.length") == (wrong == "wrong")
            chromium.one("#key").clear()
            chromium.one("#key").send_keys(KEY + Keys.ENTER)
            chromium.until("#about", "photos")
            chromium.choose(photo)
            chromium.until("#groups", "Same product")
            chromium.loaded()
            sources = chromium.run("return [...document.images].map((image) => image.src)")
            assert all(source.startswith("blob:") for source in sources)
            assert chromium.run("return localStorage.length") == 0
            assert KEY not in chromium.current_url
            chromium.refresh()
            chromium.until("#about", "photos")
            chromium.run("sessionStorage.clear()")
            chromium.refresh()
            eventually(lambda: chromium.one("#door").is_displayed())
            chromium.one("#leave").click()
            chromium.until("#trouble", "Without it")
        policy = [line for line in chromium.complaints() if "Content Security" in line]
        assert policy == []

    def test_a_version_without_thresholds(
        self, chromium: Browser, dataset: Path, photo: Path, tmp_path: Path
    ) -> None:
        model = Path(shutil.copytree(SHIPPED.parent, tmp_path / "models/npair"))
        config = (model / "config.pbtxt").read_text()
        lines = [line for line in config.splitlines() if "threshold" not in line]
        (model / "config.pbtxt").write_text("\n".join(lines))
        chromium.look(1280)
        with running(MODEL_REPOSITORY=str(model.parent)) as (_, urls):
            with NpairClient(urls["http"]) as client:
                build(dataset, tmp_path / "index", client)
            with serving(tmp_path / "index", urls["http"]) as url:
                chromium.get(url)
                chromium.choose(photo)
                chromium.until("#detail", "no threshold")
                assert chromium.texts("#groups h2") == ["Nearest photos"]


@pytest.mark.parametrize(("width", "scheme"), LOOKS)
def test_looks(page: Browser, url: str, photo: Path, width: int, scheme: str) -> None:
    page.look(width, scheme)
    page.get(url)
    page.until("#about", "photos")
    take = page.one("#zone .camera")
    assert take.is_displayed() == (width == 390), "where there is a camera at hand"
    check_look(page, width, scheme)
    page.choose(photo)
    shows(page, neighbours(url, photo))
    check_look(page, width, scheme)
    image = io.BytesIO(page.get_screenshot_as_png())
    assert Image.open(image).width == width


def check_look(page: Browser, width: int, scheme: str) -> None:
    """Check that nothing sticks out, that text can be read and buttons can be hit."""
    assert page.run("return document.documentElement.scrollWidth") == width
    found = page.run(CONTRASTS)
    assert len(found) > 4
    assert [(ratio, text) for ratio, text in found if ratio < 4.5] == []
    ground = page.run("return getComputedStyle(document.body).backgroundColor")
    assert (int(ground[4:].split(",")[0]) < 128) == (scheme == "dark")
    heights = [button.rect["height"] for button in page.all("button") if button.is_displayed()]
    assert min(heights) >= 44
