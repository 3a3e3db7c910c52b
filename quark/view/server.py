"""Serves the page and its answers on this machine alone.

The address holds a random token, and a request without it gets nothing. A page of another origin gets nothing either: the
``Host`` has to be the one of this server, so that no name of somebody else's can point here, and an ``Origin`` has to be its
own. The page loads nothing but its own files, and shows every text as text.
"""

from __future__ import annotations

import hmac
import json
import secrets
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from urllib.parse import parse_qs, urlsplit

from quark.errors import QuarkError
from quark.printable import printable
from quark.types import Json
from quark.view.sources import Answers, Filter

HOST = "127.0.0.1"
_TIMEOUT_S = 30
_FILES = {
    "": ("page.html", "text/html; charset=utf-8"),
    "page.js": ("page.js", "text/javascript; charset=utf-8"),
    "page.css": ("page.css", "text/css; charset=utf-8"),
}
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


class ViewServer(ThreadingHTTPServer):
    """Answers on a random port of this machine until ``shutdown``.

    Args:
        answers: what the page asks.
        port: 0 takes any that is free.
    """

    daemon_threads = True

    def __init__(self, answers: Answers, *, port: int = 0) -> None:
        super().__init__((HOST, port), _Handler)
        self.answers = answers
        self.token = secrets.token_urlsafe(24)

    @property
    def origin(self) -> str:
        """Scheme, host and port."""
        return f"http://{HOST}:{self.server_port}"

    @property
    def url(self) -> str:
        """The address of the page, which only its user knows."""
        return f"{self.origin}/{self.token}/"


class _Handler(BaseHTTPRequestHandler):
    server: ViewServer
    timeout = _TIMEOUT_S
    server_version = "quark"
    sys_version = ""

    def do_GET(self) -> None:
        if not self._is_ours():
            self._send(404, b"", "text/plain")
            return
        parts = urlsplit(self.path)
        name = parts.path.split("/", 2)[2]
        if name in _FILES:
            file, kind = _FILES[name]
            self._send(200, (files("quark.view") / file).read_bytes(), kind)
            return
        query = {key: values[-1] for key, values in parse_qs(parts.query).items()}
        try:
            said = self._answer(name, query)
            status = 404 if said is None else 200
        except (ValueError, IndexError, KeyError, QuarkError, OSError) as error:
            said, status = {"error": printable(str(error))}, 400
        body = json.dumps(said, allow_nan=False).encode()
        self._send(status, body, "application/json")

    def _is_ours(self) -> bool:
        """Whether the request has the token, and comes from the page or from its address."""
        given = urlsplit(self.path).path.split("/")
        if len(given) < 3 or self.headers.get("Host") != self.server.origin.removeprefix("http://"):
            return False
        if self.headers.get("Origin", self.server.origin) != self.server.origin:
            return False
        return hmac.compare_digest(given[1].encode(), self.server.token.encode())

    def _answer(self, name: str, query: dict[str, str]) -> Json:
        answers = self.server.answers
        if name == "sources":
            return answers.sources()
        index = int(query.get("source", "0"))
        if index < 0:
            raise IndexError("there is no such source")
        match name:
            case "rounds":
                return answers.rounds(index)
            case "samples":
                return answers.samples(index, _filter_of(query))
            case "explain":
                return answers.explain(index, int(query["id"]))
        return None

    def _send(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        for header, value in (*_HEADERS.items(), ("Content-Type", kind)):
            self.send_header(header, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing: the address holds the token."""


def _filter_of(query: dict[str, str]) -> Filter:
    def whole(key: str) -> int | None:
        return int(query[key]) if query.get(key) else None

    order, offset = query.get("order", "newest"), whole("offset") or 0
    if order not in ("newest", "best", "worst") or offset < 0:
        raise ValueError("the order is newest, best or worst, and the offset at least 0")
    return Filter(
        text=query.get("text", ""),
        round=whole("round"),
        quantile=whole("quantile"),
        where=query.get("where", ""),
        order=order,
        offset=offset,
    )
