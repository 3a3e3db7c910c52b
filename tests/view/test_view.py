"""The page over runs and pools: its answers fit what is asked, and nobody else gets any."""

from __future__ import annotations

import http.client
import json
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import pytest

import quark
from quark.errors import ConfigError
from quark.view.server import ViewServer
from quark.view.sources import PAGE_SIZE, Answers, Filter, sources_of
from tests.tiny import byte_tokenizer

HOSTILE = "<img src=x onerror=alert(1)></td><script>alert(2)</script>\x1b[31m\u202e"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three rounds of 40 samples with rising rewards, one of which is hostile and one is not scored."""
    path = tmp_path_factory.mktemp("view") / "pool"
    with quark.Pool.create(path, tokenizer=byte_tokenizer()) as made:
        for round in range(3):
            made.append(
                prompt=["say one"] * 40,
                completion=[f"r{round} c{row}" for row in range(39)] + [HOSTILE],
                reward=[round + row / 100 for row in range(39)] + [None if round else 9.0],
                round=round,
            )
    return path


@pytest.fixture(scope="module")
def answers(pool: Path) -> Answers:
    return Answers(sources_of([pool]))


@pytest.fixture(scope="module")
def server(answers: Answers) -> Iterator[ViewServer]:
    with ViewServer(answers) as serving:
        thread = threading.Thread(target=serving.serve_forever, args=(0.01,))
        thread.start()
        yield serving
        serving.shutdown()
        thread.join()


def get(
    server: ViewServer, path: str, **headers: str
) -> tuple[int, bytes, http.client.HTTPMessage]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    connection.request("GET", path, headers=headers)
    response = connection.getresponse()
    return response.status, response.read(), response.headers


def test_rounds_have_their_mean_and_interval(answers: Answers) -> None:
    first, second, third = answers.rounds(0)
    assert [row["round"] for row in (first, second, third)] == [0, 1, 2]
    assert (first["n"], second["n"]) == (40, 40)
    assert second["mean"] == pytest.approx(1.19, abs=1e-6)
    assert second["half"] == pytest.approx(1.96 * 0.114018 / 39**0.5, abs=1e-5)
    assert second["held_out"] is None


def ids(answers: Answers, **wanted: Any) -> list[int]:
    return [row["id"] for row in answers.samples(0, Filter(**wanted))["rows"]]


def test_samples_are_filtered_and_ordered(answers: Answers) -> None:
    assert ids(answers, order="best")[:3] == [39, 118, 117]
    assert ids(answers, order="worst")[:3] == [0, 1, 2]
    assert ids(answers, order="newest")[:2] == [119, 118]
    assert ids(answers, round=1, order="best")[0] == 78
    assert ids(answers, text="c7", order="worst") == [7, 47, 87]
    assert ids(answers, where="reward > 2.37") == [118, 39]
    lowest = answers.samples(0, Filter(quantile=0, order="worst"))
    assert {row["quantile"] for row in lowest["rows"]} == {0}
    assert lowest["total"] == 118 // 5
    whole = answers.samples(0, Filter(order="worst"))
    rest = answers.samples(0, Filter(order="worst", offset=100))
    assert (whole["total"], len(whole["rows"]), len(rest["rows"])) == (120, PAGE_SIZE, 20)
    assert [row["id"] for row in rest["rows"]][-2:] == [79, 119], "not scored comes last"
    assert rest["rows"][-1]["reward"] is None


def test_a_sample_is_explained(answers: Answers) -> None:
    found = answers.explain(0, 39)
    assert found["scores"][0]["rank"] == 1
    assert found["round"] == 0
    assert "\x1b" not in found["completion"]
    assert "\u202e" not in found["completion"]


def test_only_the_page_gets_answers(server: ViewServer) -> None:
    path = urlsplit(server.url).path
    for name in ("", "page.js", "page.css", "sources", "rounds?source=0"):
        status, body, headers = get(server, path + name)
        assert status == 200
        assert body
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert headers["Referrer-Policy"] == "no-referrer"
    guesses = ["/", "/sources", "//sources", "/x/sources", f"/{server.token[:-1]}/sources"]
    refused = [get(server, guess) for guess in guesses]
    refused.append(get(server, f"{path}sources", Host="evil.example"))
    refused.append(get(server, f"{path}sources", Origin="http://evil.example"))
    refused.append(get(server, f"{path}sources", Origin="null"))
    assert {(status, body) for status, body, _ in refused} == {(404, b"")}
    assert get(server, f"{path}sources", Origin=server.origin)[0] == 200
    assert get(server, f"{path}../server.py")[0] == 404


def test_a_wrong_question_is_answered_with_the_reason(server: ViewServer) -> None:
    path = urlsplit(server.url).path
    for question, reason in (
        ("rounds?source=7", "out of range"),
        ("rounds?source=-1", "no such source"),
        ("explain?source=0&id=999", "no sample 999"),
        ("samples?where=" + quote("read_csv('/etc/passwd') > 1"), "read_csv"),
        ("samples?order=random", "newest, best or worst"),
    ):
        status, body, _ = get(server, path + question)
        assert status == 400, question
        assert reason in json.loads(body)["error"]


def test_the_page_loads_nothing_from_elsewhere_and_sets_text_as_text() -> None:
    page, script, style = (
        (files("quark.view") / name).read_text() for name in ("page.html", "page.js", "page.css")
    )
    assert re.findall(r"https?:[^\"' ]+", page + style) == []
    assert re.findall(r"https?:[^\"' ]+", script) == ["http://www.w3.org/2000/svg"]
    for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert way not in script
    assert "<script>" not in page
    assert "style=" not in page


def test_a_place_without_runs_says_what_to_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no run and no pool in .*: name one, or a folder"):
        sources_of([tmp_path])


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_a_browser_shows_hostile_text_and_complains_of_nothing(server: ViewServer) -> None:
    # Helpers of the browser may write to its profile after it has ended.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        done = subprocess.run(
            [
                *(str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu"),
                *(f"--user-data-dir={profile}", "--no-first-run", "--enable-logging=stderr"),
                *("--window-size=1400,1000", "--virtual-time-budget=4000", "--dump-dom"),
                server.url,
            ],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    page = done.stdout
    assert "CONSOLE" not in done.stderr, done.stderr[-2000:]
    assert page.count("<circle") == 3
    assert page.count("<td>39</td>") == 1
    assert "&lt;script&gt;alert(2)&lt;/script&gt;" in page
    assert "<img" not in page
    assert "1 to 50 of 120" in page
