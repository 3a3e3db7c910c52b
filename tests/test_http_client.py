"""The HTTP client against servers that answer with too much, too slowly, or with something else than they say."""

from __future__ import annotations

import gzip
import json
import socket
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest

from quark.errors import RewardError
from quark.http_client import MAX_ANSWER_BYTES, HttpSettings, JsonClient

Talk = Callable[[socket.socket], None]
"""What a server says on a connection, after it has read the request."""

OK = b"HTTP/1.1 200 OK\r\n"
TIMEOUT_S = 0.5


@contextmanager
def client_of(talk: Talk, *, retries: int = 0) -> Iterator[JsonClient]:
    """A client of a server that lets ``talk`` answer each request."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return  # the test is over
                with connection, suppress(OSError):  # the client has hung up
                    # The whole request: closing with unread bytes resets the connection.
                    received = b""
                    while not received.endswith(b"{}"):
                        received += connection.recv(65536)
                    talk(connection)

        thread = threading.Thread(target=serve)
        thread.start()
        client = JsonClient(
            HttpSettings(
                url=f"http://127.0.0.1:{listener.getsockname()[1]}/",
                backoff_s=0.001,
                max_backoff_s=0.001,
            ),
            error=RewardError,
            wanted="scores",
            retries=retries,
            timeout_s=TIMEOUT_S,
        )
        try:
            yield client
        finally:
            client.close()
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def compressed(body: bytes, *, named: str = "gzip") -> Talk:
    data = gzip.compress(body)
    head = f"Content-Encoding: {named}\r\nContent-Length: {len(data)}\r\n\r\n".encode()
    return lambda connection: connection.sendall(OK + head + data)


def test_a_compressed_answer_is_read() -> None:
    with client_of(compressed(json.dumps({"scores": [0.5] * 9999}).encode())) as client:
        assert client.json(client.post({})) == {"scores": [0.5] * 9999}


def test_an_answer_at_the_limit_is_read_and_one_beyond_it_is_not() -> None:
    with client_of(compressed(b" " * (MAX_ANSWER_BYTES - 1) + b"1")) as client:
        assert client.json(client.post({})) == 1
    with (
        client_of(compressed(b" " * MAX_ANSWER_BYTES + b"1")) as client,
        pytest.raises(RewardError, match="answered with more than 16777216 bytes"),
    ):
        client.post({})


def test_an_answer_that_decompresses_to_a_gigabyte_takes_bounded_memory() -> None:
    parts = gzip.compress(b"\0" * (1 << 20)) * 1024
    bomb = gzip.compress(b"\0" * (1 << 27))
    assert len(bomb) < 1 << 18
    for data in (bomb, parts):
        head = f"Content-Encoding: gzip\r\nContent-Length: {len(data)}\r\n\r\n".encode()

        def talk(connection: socket.socket, answer: bytes = OK + head + data) -> None:
            connection.sendall(answer)

        with client_of(talk) as client:
            tracemalloc.start()
            try:
                with pytest.raises(
                    RewardError, match=r"more than 16777216|something else than JSON"
                ):
                    client.json(client.post({}))
                _, peak = tracemalloc.get_traced_memory()
            finally:
                tracemalloc.stop()
        assert peak < 4 * MAX_ANSWER_BYTES


@pytest.mark.parametrize("named", ["br", "zstd", "deflate", "gzip, gzip"])
def test_an_answer_compressed_in_another_way_than_asked_for_is_refused(named: str) -> None:
    with (
        client_of(compressed(b"{}", named=named)) as client,
        pytest.raises(RewardError, match=f"Content-Encoding is '{named}', not gzip"),
    ):
        client.post({})


@pytest.mark.parametrize(
    "data", [b"not gzip", gzip.compress(b"{}" * 99)[:-12]], ids=["no gzip", "cut short"]
)
def test_a_damaged_compressed_answer_is_an_error(data: bytes) -> None:
    head = f"Content-Encoding: gzip\r\nContent-Length: {len(data)}\r\n\r\n".encode()
    with (
        client_of(lambda connection: connection.sendall(OK + head + data)) as client,
        pytest.raises(RewardError, match="the answer cannot be decompressed"),
    ):
        client.post({})


def test_an_answer_without_an_end_is_an_error() -> None:
    def talk(connection: socket.socket) -> None:
        connection.sendall(OK + b"Transfer-Encoding: chunked\r\n\r\n")
        while True:
            connection.sendall(b"10000\r\n" + b"1" * 0x10000 + b"\r\n")

    with client_of(talk) as client, pytest.raises(RewardError, match=r"more than|no scores"):
        client.post({})


def slowly(head: bytes, part: bytes) -> Talk:
    def talk(connection: socket.socket) -> None:
        connection.sendall(head)
        while True:
            time.sleep(0.05)
            connection.sendall(part)

    return talk


@pytest.mark.parametrize(
    "talk",
    [
        slowly(OK + b"Content-Length: 100000\r\n\r\n", b" "),
        slowly(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
        slowly(OK + b"X: ", b"x"),
        slowly(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        lambda connection: time.sleep(2 * TIMEOUT_S),
    ],
    ids=["body", "chunks", "headers", "interim answers", "silence"],
)
def test_a_server_that_drips_is_given_up_at_the_deadline(talk: Talk) -> None:
    with client_of(talk) as client:
        started = time.monotonic()
        with pytest.raises(RewardError, match=r"no scores in 1 attempt; last: ReadTimeout"):
            client.post({})
        assert time.monotonic() - started < 4 * TIMEOUT_S


def test_a_flood_of_interim_answers_ends_at_the_deadline() -> None:
    def talk(connection: socket.socket) -> None:
        while True:
            connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n" * 1000)

    with client_of(talk) as client:
        started = time.monotonic()
        with pytest.raises(RewardError, match=r"no whole answer within 0\.5 s"):
            client.post({})
        assert time.monotonic() - started < 4 * TIMEOUT_S


def test_a_server_that_is_slow_once_is_asked_again() -> None:
    talks = iter([slowly(OK + b"X: ", b"x"), compressed(b"7")])
    with client_of(lambda connection: next(talks)(connection), retries=1) as client:
        assert client.json(client.post({})) == 7


def test_headers_without_an_end_are_an_error() -> None:
    def talk(connection: socket.socket) -> None:
        connection.sendall(OK + b"X: ")
        while True:
            connection.sendall(b"x" * 65536)

    with client_of(talk) as client, pytest.raises(RewardError, match="RemoteProtocolError"):
        client.post({})


@pytest.mark.parametrize("body", [b"[" * 100_000, b'{"a":' * 100_000, b"1" * 100_000])
def test_an_answer_that_is_nested_too_deeply_or_too_long_a_number_is_an_error(body: bytes) -> None:
    with (
        client_of(compressed(body)) as client,
        pytest.raises(RewardError, match="something else than JSON"),
    ):
        client.json(client.post({}))
