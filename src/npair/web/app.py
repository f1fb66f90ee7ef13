"""The routes of the service."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, FastAPI, Header, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel, BeforeValidator, Field
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.responses import FileResponse, HTMLResponse, JSONResponse
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

from npair.client import NpairError
from npair.gallery.location import GalleryError
from npair.web.embeddings import Embedder, Embeddings, EmbeddingsRequest, Model, Models
from npair.web.guard import SECURITY, SMALL, Guard
from npair.web.refusals import Refusal, RefusedError, answer, refused_of
from npair.web.search import MAX_K, MAX_PHOTO, Info, Neighbours, Search

STATIC = Path(__file__).parent / "static"
LIMITS = {"/search": MAX_PHOTO + SMALL, "/v1/embeddings": 64 << 20}  # bytes of a body
BODIES = 128 << 20  # bytes of all bodies that are in memory at the same time

BINARY = {"schema": {"type": "string", "format": "binary"}}
SEARCH_BODY: dict[str, Any] = {
    "description": "One photo, or no body and the parameter `photo`.",
    "content": {
        **dict.fromkeys(("image/jpeg", "image/png", "image/webp"), BINARY),
        "multipart/form-data": {
            "schema": {"type": "object", "properties": {"photo": BINARY["schema"]}}
        },
    },
}
EMBEDDINGS_BODY: dict[str, Any] = {
    "required": True,
    "content": {"application/json": {"schema": EmbeddingsRequest.model_json_schema()}},
}
JPEG: dict[int | str, dict[str, Any]] = {200: {"content": {"image/jpeg": {}}}}

# Swagger UI, but no code in the page, which the Content-Security-Policy forbids.
DOCS = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>npair web</title>
<link rel="stylesheet" href="docs/swagger-ui.css"></head>
<body><div id="docs"></div>
<script src="docs/swagger-ui-bundle.js"></script>
<script src="docs/start.js"></script></body></html>
"""
START = 'SwaggerUIBundle({url: "openapi.json", dom_id: "#docs"});\n'
DOCS_POLICY = SECURITY["Content-Security-Policy"].replace(
    "style-src 'self'", "style-src 'self' 'unsafe-inline'"
)
ASSETS = Literal["swagger-ui.css", "swagger-ui-bundle.js"]

bearer = HTTPBearer(auto_error=False, description="NPAIR_WEB_KEY of the service, if it has one")
Credentials = Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]
Cosine = Annotated[float, Field(ge=-1, le=1, allow_inf_nan=False)]
Threshold = Annotated[
    Cosine | None,
    BeforeValidator(lambda given: given or None),  # forms send empty fields
    Query(description="the cosine of the same product; the version's own if left out"),
]


class Health(BaseModel):
    status: Literal["ok"] = "ok"
    model: str
    version: str


def create_app(search: Search, *, hosts: frozenset[str], key: str) -> ASGIApp:
    """Build the service, which closes the search when it ends.

    hosts: see Guard. key: what callers must send as a bearer token; if empty, everyone may call.
    """

    @asynccontextmanager
    async def closing(_: FastAPI) -> AsyncIterator[None]:
        yield
        search.close()

    def check_key(credentials: Credentials) -> None:
        given = credentials.credentials if credentials else ""
        if not secrets.compare_digest(given.encode(), key.encode()):
            message = "send the service's key: Authorization: Bearer KEY"
            raise RefusedError(401, message, param="Authorization", code="invalid_api_key")

    async def refused(_: Request, error: Exception) -> JSONResponse:
        if not isinstance(error, RefusedError):
            error = refused_of(error, search.folder)
        return answer(error)

    app = FastAPI(
        title="npair",
        version=version("npair"),
        description="Search a gallery by a photo, and embed photos as OpenAI's clients do.",
        docs_url=None,
        redoc_url=None,
        lifespan=closing,
        responses={"default": {"model": Refusal, "description": "Refused"}},
    )
    dependencies = [Depends(check_key)] if key else []
    app.include_router(_api(search, Embedder(search.client)), dependencies=dependencies)
    app.include_router(_public(search))
    app.mount("/static", StaticFiles(directory=STATIC, check_dir=False))
    for error in (RefusedError, NpairError, GalleryError, PermissionError):
        app.add_exception_handler(error, refused)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(Exception, _bug)
    return Guard(app, hosts, LIMITS)


def _api(search: Search, embedder: Embedder) -> APIRouter:
    """The routes that need the key. Blocking work runs in threads."""
    api = APIRouter()
    room = _Room()

    @api.get("/info")
    def info() -> Info:
        return search.info()

    @api.post("/search", openapi_extra={"requestBody": SEARCH_BODY})
    async def neighbours(
        request: Request,
        k: Annotated[int, Query(ge=1, le=MAX_K)] = 12,
        threshold: Threshold = None,
        photo: Annotated[str | None, Query(description="a gallery's photo to search by")] = None,
    ) -> Neighbours:
        """Find the photos that are most similar to a photo."""
        with room.taken(request):
            sent = await _photo(request)
            if bool(sent) == (photo is not None):
                message = "send one photo as the body, or name one of the gallery with ?photo=ID"
                raise RefusedError(400, message, param="photo", code="no_photo")
            if photo is not None:
                return await run_in_threadpool(search.by_id, photo, k, threshold)
            return await run_in_threadpool(search.by_photo, sent, k, threshold)

    @api.get("/photos/{id}", response_class=Response, responses=JPEG)
    async def thumbnail(
        id: str,  # noqa: A002
        if_none_match: Annotated[str | None, Header()] = None,
    ) -> Response:
        """A small copy of a photo of the gallery."""
        jpeg, etag = await search.thumbnail(id)
        headers = {"ETag": etag, "Cache-Control": "private, max-age=600"}
        if if_none_match == etag:
            return Response(status_code=304, headers=headers)
        return Response(jpeg, media_type="image/jpeg", headers=headers)

    @api.post("/v1/embeddings", openapi_extra={"requestBody": EMBEDDINGS_BODY})
    async def embeddings(request: Request) -> Embeddings:
        """Embed photos, as OpenAI's clients send them."""
        with room.taken(request):
            return await run_in_threadpool(embedder.embed, await request.body())

    @api.get("/v1/models")
    def models() -> Models:
        return embedder.models()

    @api.get("/v1/models/{name}")
    def model(name: str) -> Model:
        return embedder.model(name)

    return api


def _public(search: Search) -> APIRouter:
    """The routes that tell nothing of the photos."""
    public = APIRouter()

    @public.get("/healthz")
    def health() -> Health:
        """Whether a search would succeed."""
        return Health(model=search.client.model, version=search.check())

    @public.get("/", include_in_schema=False)
    def page() -> FileResponse:
        return FileResponse(STATIC / "index.html")

    @public.get("/docs", include_in_schema=False)
    def docs() -> HTMLResponse:
        return HTMLResponse(DOCS, headers={"Content-Security-Policy": DOCS_POLICY})

    @public.get("/docs/start.js", include_in_schema=False)
    def start() -> Response:
        return Response(START, media_type="text/javascript")

    @public.get("/docs/{name}", include_in_schema=False)
    def asset(name: ASSETS) -> FileResponse:
        return FileResponse(str(files("fastapi_offline") / "static" / name))

    return public


class _Room:
    """Memory for bodies: a request takes its length, or in chunks the most that is allowed."""

    def __init__(self) -> None:
        self.left = BODIES

    @contextmanager
    def taken(self, request: Request) -> Iterator[None]:
        """Raises: RefusedError if too little is left."""
        size = int(request.headers.get("content-length", 0))
        if "transfer-encoding" in request.headers:
            size = LIMITS[request.scope["path"]]
        if size > self.left:
            raise RefusedError(503, "too many requests at once; try again", code="busy")
        self.left -= size
        try:
            yield
        finally:
            self.left += size


class _InMemory(MultiPartParser):
    spool_max_size = MAX_PHOTO + SMALL  # no photo of a stranger is written to disk


async def _photo(request: Request) -> bytes:
    """Read the photo that is the body, or the field ``photo`` of a form."""
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        photo = await request.body()
    else:
        try:
            parser = _InMemory(request.headers, request.stream(), max_files=1, max_fields=1)
            form = await parser.parse()
            field = form.get("photo")
            photo = await field.read() if isinstance(field, UploadFile) else b""
            await form.close()
        except (MultiPartException, KeyError) as error:
            message = "the form cannot be read; send one file in the field photo"
            raise RefusedError(400, message, param="photo", code="invalid_form") from error
    if len(photo) > MAX_PHOTO:
        message = f"the photo has {len(photo)} bytes, more than the limit of {MAX_PHOTO}"
        raise RefusedError(413, message, param="photo", code="too_large")
    return photo


async def _http_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return answer(RefusedError(error.status_code, error.detail))


async def _invalid(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    name = str(first["loc"][-1])
    return answer(RefusedError(400, f"{name}: {first['msg']}", param=name, code="invalid_value"))


async def _bug(*_: object) -> JSONResponse:
    """Tell strangers nothing; uvicorn logs the traceback."""
    return answer(RefusedError(500, "a fault of this service; its log says more"))
