"""Run the client against fake servers; model/api/test_model_api.py uses a real one."""

from __future__ import annotations

import copy
import inspect
import json
import math
import pickle
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from support.fake_server import DENIED, PHOTOS, always, changing, client_of, embeddings, of_version
from support.servers import eventually
from support.tls import certificate

from npair.client import (
    IN_FLIGHT,
    PIXEL,
    AccessDeniedError,
    EmbeddingStream,
    InvalidPhotoError,
    InvalidRequestError,
    NpairClient,
    NpairError,
    RequestTooLargeError,
    ServerFaultError,
    UnavailableError,
    VersionGoneError,
)
from npair.serving.preprocess import Limits, Preprocessing, decode

NO_VERSIONS = 404, '{"error": "Request for unknown model: \'npair\' has no available versions"}'
NOT_FOUND = 400, '{"error": "Request for unknown model: \'npair\' version 0 is not found"}'


class TestBatches:
    def test_by_count_in_order(self) -> None:
        with client_of(batch_size=3) as (client, server):
            vectors = client.embed([b"x" * n for n in range(1, 9)]).vectors
        assert vectors[:, 0].tolist() == list(range(1, 9))
        assert sorted(map(len, server.batches)) == [2, 3, 3]

    def test_by_bytes_and_a_large_photo_alone(self) -> None:
        with client_of(batch_bytes=10) as (client, server):
            client.embed([b"x" * n for n in (4, 6, 1, 99, 5, 5, 1)])
        lengths = sorted([len(photo) for photo in batch] for batch in server.batches)
        assert lengths == [[1], [1], [4, 6], [5, 5], [99]]

    def test_paths_bytes_and_open_files(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jpg"
        path.write_bytes(b"12345")
        with client_of() as (client, _), path.open("rb") as file:
            vectors = client.embed([path, str(path), b"123", file]).vectors
            assert vectors[:, 0].tolist() == [5, 5, 3, 5]
            assert client.embed(path).vectors.shape == (1, 128)
            for content in (b"123", bytearray(b"123"), memoryview(b"123")):
                assert client.embed(content).vectors.shape == (1, 128)

    def test_reads_photos_as_it_goes(self) -> None:
        taken = 0

        def photos() -> Iterator[bytes]:
            nonlocal taken
            for _ in range(100):
                taken += 1
                yield b"x"

        with client_of(batch_size=4) as (client, _):
            next(iter(client.stream(photos())))
            assert taken <= 5

    def test_several_batches_at_a_time_in_order(self) -> None:
        """Keep the order if batches finish out of turn, and limit how many are in flight."""
        under_way, most, lock = 0, 0, threading.Lock()

        def answer(photos: PHOTOS, _: str) -> tuple[int, str]:
            nonlocal under_way, most
            with lock:
                under_way += 1
                most = max(most, under_way)
            time.sleep(0.3 if len(photos[0]) % 2 else 0.01)
            with lock:
                under_way -= 1
            return embeddings(photos)

        with client_of(answer, batch_size=1) as (client, _):
            vectors = client.embed([b"x" * n for n in range(1, 13)]).vectors
        assert vectors[:, 0].tolist() == list(range(1, 13))
        assert 1 < most <= IN_FLIGHT

    def test_nothing_is_left_of_many_calls(self) -> None:
        """Calls that embed batches in threads leave no thread or file behind."""

        def files() -> int:
            return len(list(Path("/proc/self/fd").iterdir()))

        with client_of(version="1", batch_size=1) as (client, _):
            client.embed([b"a", b"b", b"c"])
            before = files()
            for _ in range(20):
                client.embed([b"a", b"b", b"c"])
            eventually(lambda: files() < before + 10)

    def test_a_photo_that_is_too_large_for_a_proxy_is_named(self) -> None:
        def proxy(photos: PHOTOS, _: str) -> tuple[int, str]:
            return (413, "<html>") if sum(map(len, photos)) > 10 else embeddings(photos)

        with client_of(proxy, batch_bytes=10) as (client, _):
            results = list(client.stream([b"small", b"x" * 11, b"small"]))
            assert [result.vector is None for result in results] == [False, True, False]
            assert "too large for the server, or for a proxy before it" in str(results[1].reason)
        with client_of(proxy) as (client, _), pytest.raises(RequestTooLargeError):
            client.embed([b"small", b"small", b"small"])

    def test_a_fault_ends_the_stream(self) -> None:
        def answer(photos: PHOTOS, _: str) -> tuple[int, str]:
            return (500, '{"error": "boom"}') if photos == [b"bad"] else embeddings(photos)

        with client_of(answer, batch_size=1) as (client, server):
            with pytest.raises(ServerFaultError, match="boom"):
                client.embed([b"a", b"bad", *[b"c"] * 50])
            assert len(server.batches) <= 2 + IN_FLIGHT

    def test_later_batches_stay_with_the_first_version(self) -> None:
        """Pin later batches: a new version goes live after the first one."""
        answered: list[str] = []

        def answer(photos: PHOTOS, path: str) -> tuple[int, str]:
            pinned = re.search("/versions/([0-9]+)/", path)
            answered.append(pinned[1] if pinned else str(3 + len(answered)))
            return embeddings(photos, answered[-1])

        with client_of(answer, batch_size=1) as (client, _):
            assert client.embed([b"a", b"b", b"c"]).version == "3"
        assert answered == ["3", "3", "3"]


class TestVersionGone:
    def test_a_call_starts_over_whole(self) -> None:
        with client_of(changing(after=2), batch_size=1) as (client, server):
            vectors, version = client.embed([b"x" * n for n in range(1, 6)])
        assert version == "2"
        assert vectors[:, 0].tolist() == [1, 2, 3, 4, 5]
        assert len(server.batches) >= 2 + 5

    def test_a_pinned_call_does_not(self) -> None:
        reason = "version 1 of model npair is not served, but 2 is"
        gone = pytest.raises(VersionGoneError, match=reason)
        with client_of(changing(after=0), version="1") as (client, _), gone:
            client.embed([b"a"])

    @pytest.mark.parametrize("version", ["017", " 17", "+17", "17/../17", "17?x", "9" * 20, "one"])
    def test_nor_does_one_that_no_version_can_have(self, version: str) -> None:
        """Triton takes some of these for 17."""
        gone = pytest.raises(VersionGoneError, match=re.escape(f"version {version} of model npair"))
        with client_of(version=version) as (client, server), gone:
            client.embed([b"a"])
        assert server.batches == []


class TestConnections:
    """A FakeServer handles each connection in its own thread."""

    def test_are_kept(self) -> None:
        used: set[threading.Thread] = set()

        def answer(photos: PHOTOS, _: str) -> tuple[int, str]:
            used.add(threading.current_thread())
            time.sleep(0.01)
            return embeddings(photos)

        with client_of(answer, batch_size=1) as (client, server):
            for _ in range(5):
                client.embed([b"x"] * 20)
        assert len(server.batches) == 100
        assert len(used) <= 1 + IN_FLIGHT

    def test_a_new_one_before_a_call_is_repeated(self) -> None:
        """A draining server refuses every call on an open connection."""
        draining = set[threading.Thread]()

        def answer(photos: PHOTOS, _: str) -> tuple[int, str]:
            if not draining or threading.current_thread() in draining:
                draining.add(threading.current_thread())
                return NO_VERSIONS
            return embeddings(photos)

        with client_of(answer, retries=1) as (client, _):
            assert client.embed(b"x").version == "1"

    def test_one_that_the_server_has_closed_meanwhile(self) -> None:
        def answer(photos: PHOTOS, _: str) -> tuple[int, str]:
            threading.Timer(0.1, hang_up).start()
            return embeddings(photos)

        def hang_up() -> None:
            for connection in connections:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

        connections: list[socket.socket] = []
        with client_of(answer, retries=0) as (client, server):
            answer_one = server.process_request_thread

            def remember(connection: Any, address: Any) -> None:
                connections.append(connection)
                answer_one(connection, address)

            server.process_request_thread = remember  # type: ignore[method-assign, assignment]
            client.embed(b"x")
            time.sleep(0.3)
            assert client.embed(b"x").version == "1"

    def test_each_reaches_another_version(self) -> None:
        """Behind a balancer during an update, each call gets vectors of a single version."""
        numbers, versions = iter(range(10**6)), dict[threading.Thread, str]()

        def answer(photos: PHOTOS, path: str) -> tuple[int, str]:
            mine = versions.setdefault(threading.current_thread(), "12"[next(numbers) % 2])
            if path.endswith("/models/npair"):
                return 200, json.dumps({"name": "npair", "versions": [mine]})
            if "/versions/" in path and f"/versions/{mine}/" not in path:
                return NOT_FOUND
            return embeddings([b"x" * int(mine)] * len(photos), mine)

        with client_of(answer, batch_size=2) as (client, _), ThreadPoolExecutor(4) as pool:
            for vectors, version in pool.map(client.embed, [[b"x"] * 12] * 40):
                assert set(vectors[:, 0]) == {int(version)}

    def test_an_answer_of_another_version_than_was_asked_for(self) -> None:
        fault = pytest.raises(ServerFaultError, match="asked for version 1, got 2")
        with client_of(of_version("2"), version="1") as (client, _), fault:
            client.embed(b"x")

    def test_a_closed_client_says_so(self) -> None:
        with client_of() as (client, server):
            client.embed(b"x")
            client.close()
            client.close()
            with pytest.raises(RuntimeError, match="the client is closed"):
                client.embed(b"x")
        assert len(server.batches) == 1


class TestErrors:
    def test_bad_photos_are_named_by_their_place_in_the_call(self) -> None:
        def answer(photos: PHOTOS, _: str) -> tuple[int, str]:
            indices = [index for index, photo in enumerate(photos) if photo == b"bad"]
            bad = [f"IMAGE[{index}]: broken; very; IMAGE" for index in indices]
            return (400, json.dumps({"error": "; ".join(bad)})) if bad else embeddings(photos)

        with client_of(answer, batch_size=2) as (client, _):
            photos = [b"a", b"bad", b"bad", b"bad", b"c"]
            with pytest.raises(InvalidPhotoError, match="photo 1: broken") as caught:
                client.embed(photos)
            assert caught.value.reasons == dict.fromkeys((1, 2, 3), "broken; very; IMAGE")
            outcomes = [result.reason is None for result in client.stream(photos)]
            assert outcomes == [True, False, False, False, True]

    @pytest.mark.parametrize(
        ("status", "body", "expected"),
        [
            (500, '{"error": "out of memory"}', ServerFaultError),
            (404, '{"error": "unknown model"}', InvalidRequestError),
            (400, '{"error": "unexpected shape"}', InvalidRequestError),
            (413, "<html>Request Entity Too Large</html>", InvalidPhotoError),
            (401, '{"error": "a key is needed"}', AccessDeniedError),
            (403, "<html>Forbidden</html>", AccessDeniedError),
            (429, '{"error": "too many requests"}', UnavailableError),
            (503, '{"error": "busy"}', UnavailableError),
            (*NO_VERSIONS, UnavailableError),  # the server is stopping
            (500, '{"error": "Stub process \'npair_0_1\' is not healthy."}', UnavailableError),
            (502, "<html>Bad gateway</html>", UnavailableError),
            (200, '{"model_name": "npair", "model_version": "1", "outputs": []}', ServerFaultError),
        ],
    )
    def test_mapped(self, status: int, body: str, expected: type[NpairError]) -> None:
        with client_of(always(status, body), retries=1) as (client, server):
            with pytest.raises(expected):
                client.embed(b"photo")
            asked = 2 if expected is UnavailableError else 1
            assert len(server.batches) == asked, "only an unavailable server is asked again"

    def test_retries_until_the_server_is_there(self) -> None:
        answers = iter([(503, '{"error": "starting"}'), (503, '{"error": "starting"}')])
        with client_of(lambda photos, _: next(answers, embeddings(photos))) as (client, _):
            assert client.embed(b"photo").vectors.shape == (1, 128)

    @pytest.mark.parametrize(("seconds", "most"), [(0, 1), (1, 4)])
    def test_retries_for_no_longer_than_is_asked(self, seconds: float, most: int) -> None:
        """The time counts that a server takes to refuse."""

        def answer(*_: object) -> tuple[int, str]:
            time.sleep(0.4)
            return 503, '{"error": "starting"}'

        limits: dict[str, Any] = {"retries": 8, "retry_seconds": seconds}
        with client_of(answer, **limits) as (client, server), pytest.raises(UnavailableError):
            client.embed(b"photo")
        assert min(most, 2) <= len(server.batches) <= most

    def test_retries_for_the_configuration_too(self) -> None:
        answers = iter([(429, "<html>"), (503, '{"error": "starting"}')])
        with client_of(lambda *_: next(answers, (200, '{"parameters": {}}'))) as (client, _):
            assert client.thresholds() is None

    @pytest.mark.parametrize("version", ["", 8])
    def test_version_as_others_write_it(self, version: Any) -> None:
        with NpairClient("http://127.0.0.1:9", version=version) as client:
            assert client.version == (str(version) or None)

    @pytest.mark.parametrize(
        "arguments",
        [
            *({"url": url} for url in ("ftp://a", "localhost:8000", "http://a:x")),
            *(
                {"url": url}
                for url in ("http://a/b c", "http://a/\xe4", "http://a?b", "http://a#b")
            ),
            *({"url": url} for url in ("grpc://a", "grpc://a:1/b", "grpcs://a:1?b")),
            {"url": "http://user:secret@a:1"},
            *({"timeout": 0}, {"retries": -1}, {"batch_size": 0}, {"batch_bytes": 0}),
            *({"retry_seconds": seconds} for seconds in (-1, math.nan)),
            *({"timeout": seconds} for seconds in (-1, 1e7, 1e10, math.inf, math.nan)),
            *({name: math.nan} for name in ("retries", "batch_size", "batch_bytes")),
            *({"api_key": "two words"}, {"api_key": "clé"}),
            *({"ca": "/nowhere.pem"}, {"ca": __file__}, {"cert": (__file__, __file__)}),
        ],
    )
    def test_senseless_arguments(self, arguments: dict[str, object]) -> None:
        with pytest.raises(ValueError, match="must") as refused:
            NpairClient(**arguments)  # type: ignore[arg-type]
        assert "secret" not in str(refused.value)

    def test_wrong_photos(self, tmp_path: Path) -> None:
        with client_of() as (client, server):
            with pytest.raises(ValueError, match="no photo"):
                client.embed([])
            with pytest.raises(FileNotFoundError):
                client.embed([b"a", tmp_path / "missing.jpg"])
            with pytest.raises(TypeError, match="not int"):
                client.embed([7])  # type: ignore[list-item]
            with pytest.raises(LookupError):
                EmbeddingStream(client, []).version  # noqa: B018
            assert server.batches == []


def test_certificates_are_not_used_over_plain_http(tmp_path: Path) -> None:
    """Certificates may come from an environment shared with other URLs."""
    cert, _ = certificate(tmp_path)
    with client_of(ca=cert) as (client, _):
        assert client.embed(b"abc").vectors[0, 0] == 3


class TestApiKey:
    def test_goes_with_every_call_of_every_connection(self) -> None:
        with client_of(api_key="abc", batch_size=1) as (client, server):
            client.embed([b"x"] * 9)
            client.thresholds()
            client.ready()
            client.versions()
        assert server.authorizations == ["Bearer abc"] * 12

    def test_none_is_sent_where_none_is_given(self) -> None:
        with client_of() as (client, server):
            client.embed(b"x")
        assert server.authorizations == [None]

    def test_a_wrong_one_says_nothing_of_the_model(self) -> None:
        denied = pytest.raises(AccessDeniedError, match="a key is needed")
        with client_of(DENIED) as (client, _), denied:
            client.ready()


def tree(error: type[NpairError]) -> list[type[NpairError]]:
    return [error, *(below for one in error.__subclasses__() for below in tree(one))]


class TestPickle:
    @pytest.mark.parametrize("kind", tree(NpairError))
    @pytest.mark.parametrize(
        "again", [copy.copy, copy.deepcopy, lambda error: pickle.loads(pickle.dumps(error))]
    )
    def test_exceptions(
        self, kind: type[NpairError], again: Callable[[NpairError], NpairError]
    ) -> None:
        error = InvalidPhotoError({3: "broken"}) if kind is InvalidPhotoError else kind("a reason")
        made = again(error)
        assert (type(made), str(made), vars(made)) == (kind, str(error), vars(error))

    def test_a_client_is_its_arguments(self, tmp_path: Path) -> None:
        cert, key = certificate(tmp_path)
        limits: dict[str, Any] = {"timeout": 1.5, "retries": 7, "batch_size": 2, "batch_bytes": 9}
        limits["retry_seconds"] = 0.5
        files: dict[str, Any] = {"ca": cert, "cert": (cert, key)}
        given = {"model": "other", "version": "3", "api_key": "abc"} | limits | files
        with NpairClient("https://127.0.0.1:9", **given) as client:
            made = pickle.loads(pickle.dumps(client))
        given["url"] = "https://127.0.0.1:9"
        assert given.keys() == inspect.signature(NpairClient).parameters.keys()
        assert {name: getattr(made, name) for name in given} == given
        assert not made.ready(), "it is not closed"


def test_ready_asks_with_a_photo_that_decodes() -> None:
    white = Preprocessing(size=8, resample="BILINEAR", background=255)
    assert (decode(PIXEL, white, Limits(max_bytes=100, max_pixels=1)) == 255).all()
