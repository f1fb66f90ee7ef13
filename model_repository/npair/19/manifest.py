"""``manifest.json``: the files of a version, how it was made and measured, and how to serve it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np
import numpy.typing as npt

NAME = "manifest.json"


class VersionError(RuntimeError):
    """A version folder that must not serve; the message names the part that is wrong."""


@dataclass(frozen=True)
class Preprocessing:
    """How photos become the network's input; without defaults, since training fixed the values.

    size: width and height of the input, in pixels.
    resample: Pillow's resampling filter: ``BOX``, ``BILINEAR``, ``BICUBIC`` or ``LANCZOS``.
    background: grey level (0 to 255) behind transparent pixels.
    """

    size: int
    resample: str
    background: int


@dataclass(frozen=True, kw_only=True)
class Engine:
    """A library that computes the network at one precision, and its measurements when published.

    graph: the file's name. milliseconds: per photo. recall_at_1: on val, by kind of label.
    golden_distances: the largest distance of a golden embedding from the reference, by CPU
    settings; "native" is the publishing machine.
    tolerance: the largest such distance at which the engine may serve.
    """

    library: str
    graph: str
    precision: str
    milliseconds: float | None = None
    recall_at_1: dict[str, float] | None = None
    golden_distances: dict[str, float] | None = None
    tolerance: float


@dataclass(frozen=True, kw_only=True)
class RefusedEngine:
    """An engine that the version must not use; ``reason`` says why, the rest is as in Engine."""

    library: str
    graph: str
    precision: str
    milliseconds: float | None = None
    recall_at_1: dict[str, float] | None = None
    golden_distances: dict[str, float] | None = None
    reason: str


@dataclass(frozen=True)
class Embedding:
    """The network's output: vectors of ``dimension`` numbers."""

    dimension: int


@dataclass
class Golden:
    """A few encoded photos and their fp32 reference embeddings, as paths inside the version folder.

    tolerance: the largest Euclidean distance that any of the version's engines may show.
    """

    photos: list[str]
    embeddings: str
    tolerance: float

    def read(self, folder: Path) -> tuple[list[bytes], npt.NDArray[np.float32]]:
        """Return the n encoded photos and their embeddings, float32 [n, D] of unit length."""
        vectors = np.load(folder / self.embeddings, allow_pickle=False)
        return [(folder / photo).read_bytes() for photo in self.photos], vectors


@dataclass(frozen=True)
class Accepted:
    """A regression that was published on purpose."""

    problem: str
    reason: str


@dataclass(kw_only=True)
class Comparison:
    """The version that was pinned at publication and this one, each pair as [pinned, this].

    version: the pinned one. recall_at_1: on val, by kind of label. milliseconds: per photo, from
    its bytes on. bytes: of the folder.
    """

    version: int
    recall_at_1: dict[str, list[float]]
    milliseconds: list[float]
    bytes: list[int]
    accepted_recall: Accepted | None = None
    accepted_cost: Accepted | None = None


@dataclass(kw_only=True)
class Manifest:
    """The content of ``manifest.json``. Optional fields that are None are not written.

    engines: by name, in order of preference. training: the run's config.json.
    files: SHA-256 of every other file, by its path in the folder.
    metrics: the evaluation on val, as ``scoring`` writes it, under "val".
    thresholds: cosine at a false accept rate, by its name; None if val has too few pairs.
    """

    schema: int
    model: str
    version: int
    created: str
    git_commit: str | None = None
    libraries: dict[str, str]
    engines: dict[str, Engine]
    engines_refused: dict[str, RefusedEngine]
    preprocessing: Preprocessing
    embedding: Embedding
    training: dict[str, Any]
    golden: Golden
    files: dict[str, str]
    engines_measured_on: str | None = None
    metrics: dict[str, Any] | None = None
    thresholds: dict[str, float | None] | None = None
    compared_with: Comparison | None = None

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read a version folder's manifest.

        Raises: VersionError if it is missing, is not JSON, or lacks a field or has one of a wrong
        type.
        """
        try:
            return cls.parse((folder / NAME).read_bytes())
        except (OSError, ValueError) as error:
            raise VersionError(f"{folder}: {NAME} cannot be read: {error}") from error

    @classmethod
    def parse(cls, content: bytes) -> Manifest:
        """Read the bytes of a manifest. Raises: ValueError that names the field that is wrong."""
        manifest: Manifest = _parse(cls, json.loads(content), "")
        return manifest

    def write(self, folder: Path) -> None:
        """Hash the folder's other files and write the manifest beside them."""
        self.files = {
            str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name != NAME
        }
        (folder / NAME).write_bytes(self.encode())

    def encode(self) -> bytes:
        """Return the bytes of manifest.json."""
        content = asdict(self, dict_factory=lambda items: {k: v for k, v in items if v is not None})
        return (json.dumps(content, indent=2) + "\n").encode()

    def check(self, folder: Path) -> None:
        """Compare the folder's files with their hashes.

        Raises: VersionError if a file is missing or its SHA-256 differs.
        """
        for name, expected in self.files.items():
            try:
                actual = hashlib.sha256((folder / name).read_bytes()).hexdigest()
            except OSError as error:
                raise VersionError(f"{folder}: {name} cannot be read: {error}") from error
            if actual != expected:
                raise VersionError(
                    f"{folder}: {name} has changed since it was published:"
                    f" SHA-256 {actual}, published {expected}"
                )

    def recall_at_1(self) -> dict[str, float]:
        """Return Recall@1 on val by kind of label, "fine" and "coarse"; empty without val."""
        val = (self.metrics or {}).get("val", {})
        kinds = [kind for kind in ("fine", "coarse") if kind in val]
        return {kind: val[kind]["recall_at_1"]["value"] for kind in kinds}


def _parse(kind: Any, value: Any, where: str) -> Any:
    """Build a value of a field's type from JSON. Fields that the type lacks are ignored.

    where: the field's dotted path. Raises: ValueError.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if NoneType in arguments:
        (kind,) = (argument for argument in arguments if argument is not NoneType)
        return None if value is None else _parse(kind, value, where)
    nested = is_dataclass(kind)
    types = {float: (int, float), Any: object}
    expected: Any = dict if nested else types.get(kind, origin or kind)
    if not isinstance(value, expected):
        raise ValueError(f"{where or 'the file'} has the wrong type, {type(value).__name__}")
    if nested:
        hints, parsed = get_type_hints(kind), {}
        for field in fields(kind):
            path = f"{where}.{field.name}".lstrip(".")
            if field.name in value:
                parsed[field.name] = _parse(hints[field.name], value[field.name], path)
            elif field.default is MISSING:
                raise ValueError(f"{path} is missing")
        return kind(**parsed)
    if origin is dict:
        return {key: _parse(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if origin is list:
        return [_parse(arguments[0], item, f"{where}[{n}]") for n, item in enumerate(value)]
    return value
