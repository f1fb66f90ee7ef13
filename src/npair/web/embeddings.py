"""OpenAI's embeddings API for photos: POST /v1/embeddings and GET /v1/models."""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, Field, ValidationError, field_validator

from npair.client import InvalidPhotoError, NpairClient, VersionGoneError
from npair.web.refusals import RefusedError
from npair.web.search import MAX_PHOTO

MAX_PHOTOS = 64
NO_PHOTO = "is neither base64 nor a data: URI of a photo; npair embeds photos, not text"
NO_URL = "is a URL; npair fetches none: send the photo itself, as base64 or a data: URI"
NO_TOKENS = (
    "the input is tokens of text; npair embeds photos. For LangChain, set"
    " check_embedding_ctx_length=False"
)


class EmbeddingsRequest(BaseModel):
    """OpenAI's request, with infinity's ``modality``. Other fields are ignored."""

    model: str = Field(description="npair, or npair:VERSION to pin a version")
    input: str | list[str] = Field(
        description=f"one photo, or up to {MAX_PHOTOS}: base64 or data: URIs"
    )
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(
        None, description="the vectors' own dimension; 0, which infinity's client sends, is that"
    )
    modality: Literal["image"] = "image"

    @field_validator("input", mode="before")
    @classmethod
    def _photos(cls, given: Any) -> Any:
        photos = given if isinstance(given, list) else [given]
        if any(isinstance(photo, int | list) for photo in photos):
            raise ValueError(NO_TOKENS)
        if not 0 < len(photos) <= MAX_PHOTOS:
            raise ValueError(f"send 1 to {MAX_PHOTOS} photos at once, not {len(photos)}")
        return given


class Embedding(BaseModel):
    """One photo's vector. embedding: numbers, or base64 of little-endian float32."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class Usage(BaseModel):
    """Photos, since npair has no tokens."""

    prompt_tokens: int
    total_tokens: int


class Embeddings(BaseModel):
    """Unit vectors in the order of the photos. model: with the version that made them."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: Usage


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "npair"


class Models(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


@dataclass(frozen=True)
class Embedder:
    """Embeds through a server. Calls raise RefusedError and NpairErrors."""

    client: NpairClient

    def models(self) -> Models:
        name = self.client.model
        versions = sorted(self.client.versions(), key=int)
        names = [name, *(f"{name}:{version}" for version in versions)] if versions else []
        return Models(data=[Model(id=name) for name in names])

    def model(self, name: str) -> Model:
        for model in self.models().data:
            if model.id == name:
                return model
        raise self._unknown(name)

    def embed(self, body: bytes) -> Embeddings:
        request = _parsed(body)
        photos = [request.input] if isinstance(request.input, str) else request.input
        decoded = [_decoded(photo, index) for index, photo in enumerate(photos)]
        name, pinned, version = request.model.partition(":")
        if name != self.client.model:
            raise self._unknown(request.model)
        with self.client.copy() as client:
            client.version = version if pinned else None
            try:
                vectors, version = client.embed(decoded)
            except InvalidPhotoError as error:
                index, reason = next(iter(error.reasons.items()))
                message = f"input[{index}]: {reason}"
                raise RefusedError(400, message, param="input", code="invalid_photo") from error
            except VersionGoneError as error:
                raise self._unknown(request.model) from error
        dimension = vectors.shape[1]
        if request.dimensions not in (None, 0, dimension):
            message = f"the vectors have {dimension} dimensions, and cannot be shortened"
            raise RefusedError(400, message, param="dimensions", code="invalid_value")
        return Embeddings(
            data=[
                Embedding(index=index, embedding=_encoded(vector, request.encoding_format))
                for index, vector in enumerate(vectors)
            ],
            model=f"{name}:{version}",
            usage=Usage(prompt_tokens=len(photos), total_tokens=len(photos)),
        )

    def _unknown(self, name: str) -> RefusedError:
        served = ", ".join(model.id for model in self.models().data) or "none"
        message = f"there is no model {name[:100]!r}; served: {served}"
        return RefusedError(404, message, param="model", code="model_not_found")


def _parsed(body: bytes) -> EmbeddingsRequest:
    try:
        return EmbeddingsRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = str(first["loc"][0]) if first["loc"] else None
        message = first["msg"].removeprefix("Value error, ")
        raise RefusedError(400, message, param=where, code="invalid_value") from None


def _decoded(text: str, index: int) -> bytes:
    """Return the bytes of a photo in base64 or a data: URI."""
    param = {"param": "input", "code": "invalid_photo"}
    if re.match(r"\s*https?:", text, re.IGNORECASE):
        raise RefusedError(400, f"input[{index}] {NO_URL}", **param)
    head, comma, data = text.partition(",")
    if comma and not re.fullmatch(r"\s*data:[^,]*;base64", head, re.IGNORECASE):
        raise RefusedError(400, f"input[{index}] {NO_PHOTO}", **param)
    try:  # encoders break lines, and LlamaIndex turns these breaks into blanks
        photo = base64.b64decode("".join((data if comma else head).split()), validate=True)
    except (ValueError, binascii.Error):
        raise RefusedError(400, f"input[{index}] {NO_PHOTO}", **param) from None
    if len(photo) > MAX_PHOTO:
        message = f"input[{index}] has {len(photo)} bytes, more than the limit of {MAX_PHOTO}"
        raise RefusedError(413, message, param="input", code="too_large")
    return photo


def _encoded(vector: np.ndarray[Any, np.dtype[np.float32]], encoding: str) -> list[float] | str:
    if encoding == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return [float(number) for number in vector]
