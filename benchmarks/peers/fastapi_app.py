"""uvicorn fastapi_app:app; the body is the photo."""

import os
from contextlib import asynccontextmanager

import network
from anyio import to_thread
from fastapi import FastAPI, Request

model = network.load()


@asynccontextmanager
async def lifespan(_: FastAPI):
    to_thread.current_default_thread_limiter().total_tokens = int(os.environ["CONCURRENCY"])
    yield


app = FastAPI(lifespan=lifespan)


@app.post("/embed")
async def embed(request: Request) -> list[float]:
    return await to_thread.run_sync(work, await request.body())


def work(photo: bytes) -> list[float]:
    return model.embed([model.decode(photo)])[0].tolist()
