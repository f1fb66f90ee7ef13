"""Write the report as one well-formed, escaped, self-contained file."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from npair.data.dataset import Photos
from npair.publishing.drawings import draw, encode
from npair.scoring.evaluate import EmbeddedSplit, Evaluation
from npair.scoring.report import write_report
from npair.scoring.retrieval import Labels, Vectors

VOID = {"meta", "img", "br", "link", "input"}
HOSTILE = (
    '<script>alert("1")</script>',
    "Äpfel & 'Birnen'",
    '"><img src=x onerror=y>',
    "{{ 7 * 7 }}",
)


class Page(HTMLParser):
    """Collect the tags and texts of a page; fail on tags that are not nested properly."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def photos(folder: Path, products: int, each: int) -> Photos:
    paths = []
    for product in range(products):
        for number in range(each):
            path = folder / f"{product}-{number}.jpg"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(encode(draw(product, number, 96), "JPEG"))
            paths.append(path)
    fine = np.repeat(np.arange(products), each)
    return Photos(tuple(paths), fine, fine // 2, HOSTILE, HOSTILE[:2])


def vectors(fine: Labels, seed: int, spread: float = 0.9) -> Vectors:
    drawn = np.eye(8)[fine] + spread * np.random.default_rng(seed).normal(size=(len(fine), 8))
    unit: Vectors = (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32)
    return unit


LOG: list[dict[str, Any]] = [
    {"epoch": epoch, "loss": 3.0 / epoch, "batch_recall": 1 - 1 / epoch, "seconds": 20.0}
    for epoch in range(1, 41)
]
SCORED = [
    row | {"val": {"fine": 0.5, "coarse": 0.6}} if row["epoch"] % 10 == 0 else row for row in LOG
]
RUN = {
    "train": {"seed": 0, "size": 96},
    "git_commit": "abc-dirty",
    "data": {"fingerprint": "f00d", "photos": 16, "classes": 4},
}


def page(
    tmp_path: Path, queries: Photos, gallery: Photos | None, spread: float = 0.9, **changes: Any
) -> tuple[str, Page, Evaluation]:
    query_vectors = vectors(queries.fine, 1, spread)
    gallery_vectors = query_vectors if gallery is None else vectors(gallery.fine, 2, spread)
    embedded = EmbeddedSplit(
        "Drawn & <i>reported</i>", queries, query_vectors, gallery or queries, gallery_vectors
    )
    evaluation = embedded.evaluate()
    path = tmp_path / "report.html"
    write_report(
        path,
        embedded,
        evaluation,
        **{"run": RUN, "log": SCORED, "findings": ["a <b>finding</b>"]} | changes,
    )
    html = path.read_text(encoding="utf-8")
    return html, Page(html), evaluation


def test_is_one_file_that_says_what_was_measured(tmp_path: Path) -> None:
    html, parsed, evaluation = page(
        tmp_path, photos(tmp_path / "q", 4, 2), photos(tmp_path / "g", 4, 4)
    )
    assert "http:" not in html
    assert "https:" not in html
    for tag, attributes in parsed.tags:
        assert tag not in {"script", "link", "iframe", "object"}
        for name in ("src", "href"):
            assert (attributes.get(name) or "#").startswith(("data:image/jpeg;base64,", "#"))
    assert len(html) < 1_000_000
    assert f"{100 * evaluation.fine.recall_at_1.value:.1f} %" in parsed.texts
    text = " ".join(parsed.texts)
    for expected in (
        "abc-dirty",
        "f00d",
        "Equal error rate",
        "MAP@R",
        "Progress over time",
        "Recall@1 on val photos",
        "gallery photos",
    ):
        assert expected in text


def test_names_are_escaped(tmp_path: Path) -> None:
    """A hostile name appears as text and never as a tag."""
    _, parsed, _ = page(tmp_path, photos(tmp_path / "q", 4, 2), photos(tmp_path / "g", 4, 4))
    for name in HOSTILE:
        assert name in parsed.texts
        assert f"Query: {name}" in {image["alt"] for image in parsed.all("img")}
    assert "a <b>finding</b>" in parsed.texts
    assert parsed.texts.count("Drawn & <i>reported</i>") == 2
    assert not [
        tag for tag, attributes in parsed.tags if tag == "script" or "onerror" in attributes
    ]


def test_a_name_may_not_be_utf_8(tmp_path: Path) -> None:
    names = (os.fsdecode(b"\xc4pfel"), *HOSTILE[1:])
    queries = replace(photos(tmp_path / "q", 4, 2), fine_names=names, coarse_names=names[:2])
    _, parsed, _ = page(tmp_path, queries, replace(queries))
    assert r"\udcc4pfel" in parsed.texts


def test_is_accessible(tmp_path: Path) -> None:
    _, parsed, _ = page(tmp_path, photos(tmp_path / "q", 4, 2), photos(tmp_path / "g", 4, 4))
    assert parsed.all("html") == [{"lang": "en"}]
    assert len(parsed.all("h1")) == 1
    assert all(image["alt"] for image in parsed.all("img"))
    assert all(
        drawing.get("aria-label") or drawing.get("aria-hidden") for drawing in parsed.all("svg")
    )
    targets = [anchor["href"] for anchor in parsed.all("a")]
    assert targets == [f"#{section['id']}" for section in parsed.all("section")]
    symbols = [text for text in parsed.texts if text in {"✓", "✗"}]
    assert {"✓", "✗"} == set(symbols)
    assert len(symbols) > 8


def test_photos_against_each_other(tmp_path: Path) -> None:
    """Without a gallery, a photo is not its own neighbour."""
    queries = photos(tmp_path / "q", 2, 3)
    _, parsed, evaluation = page(tmp_path, queries, None)
    assert evaluation.protocol == "self"
    assert not [text for text in parsed.texts if text.strip() == "1.000"]
    assert "no gallery is involved" in " ".join(parsed.texts)


def test_without_run_log_and_findings(tmp_path: Path) -> None:
    _, parsed, _ = page(
        tmp_path,
        photos(tmp_path / "q", 2, 2),
        photos(tmp_path / "g", 2, 2),
        run=None,
        log=[],
        findings=[],
    )
    assert "training" not in {section["id"] for section in parsed.all("section")}
    assert "No findings." in parsed.texts


@pytest.mark.parametrize("log", [LOG, LOG[:1], SCORED[9:10]])
def test_logs_of_any_length(log: list[dict[str, Any]], tmp_path: Path) -> None:
    _, parsed, _ = page(
        tmp_path, photos(tmp_path / "q", 2, 2), photos(tmp_path / "g", 2, 2), log=log
    )
    assert ("Recall@1 on val photos" in parsed.texts) == ("val" in log[-1])


def test_what_is_undefined_is_said_to_be(tmp_path: Path) -> None:
    """With one photo of each product, there is nothing to find and no pair to verify."""
    _, parsed, evaluation = page(tmp_path, photos(tmp_path / "q", 4, 1), None)
    assert evaluation.verification is None
    assert parsed.texts.count("not defined") == 2, "R-precision and MAP@R of products"
    assert "too few pairs to tell" not in parsed.texts
    assert "nan" not in " ".join(parsed.texts).split()


def test_without_coarse_labels_there_are_no_kinds(tmp_path: Path) -> None:
    def flat(folder: str) -> Photos:
        drawn = photos(tmp_path / folder, 4, 2)
        return replace(drawn, coarse=drawn.fine, coarse_names=drawn.fine_names)

    log = [row | {"val": {"fine": 0.5}} for row in LOG]
    _, parsed, evaluation = page(tmp_path, flat("q"), flat("g"), log=log)
    assert evaluation.coarse is None
    assert not re.search(r"\b[Kk]inds?\b|coarse", " ".join(parsed.texts))
    rows = [attributes for attributes in parsed.all("td") if "data-label" in attributes]
    assert {row["data-label"] for row in rows} == {"Product"}


def test_one_product_has_no_intervals(tmp_path: Path) -> None:
    _, parsed, _ = page(tmp_path, photos(tmp_path / "q", 1, 4), photos(tmp_path / "g", 2, 4))
    text = " ".join(parsed.texts)
    assert "4 photos of 1 product in 1 kind," in text
    assert not re.search(r"\d to \d", text)
    assert "NMI" not in text


def test_every_axis_is_labelled(tmp_path: Path) -> None:
    _, parsed, _ = page(tmp_path, photos(tmp_path / "q", 4, 2), photos(tmp_path / "g", 4, 4))
    charts = [drawing for drawing in parsed.all("svg") if drawing.get("class") == "chart"]
    axes = [text for text in parsed.all("text") if text.get("class") == "axis"]
    assert len(axes) == 2 * len(charts)
    assert "loss, log scale" in parsed.texts


def test_nothing_wrong(tmp_path: Path) -> None:
    _, parsed, _ = page(
        tmp_path, photos(tmp_path / "q", 4, 2), photos(tmp_path / "g", 4, 4), spread=0.01
    )
    assert "None: every nearest neighbour is right." in parsed.texts
    assert "✗" in parsed.texts, "the sixth neighbour of five"


def test_collapsed_embeddings_have_no_map(tmp_path: Path) -> None:
    queries = photos(tmp_path / "q", 2, 3)
    same = np.tile(np.eye(8, dtype=np.float32)[:1], (6, 1))
    embedded = EmbeddedSplit("", queries, same, queries, same)
    with pytest.warns(match="distinct clusters"):
        evaluation = embedded.evaluate()
    path = tmp_path / "report.html"
    write_report(path, embedded, evaluation, run=None, log=[], findings=[])
    assert not [
        section
        for section in Page(path.read_text(encoding="utf-8")).all("section")
        if section["id"] == "map"
    ]
