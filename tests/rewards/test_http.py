"""The HTTP reward against a real server on this machine, on good days and bad."""

import json
import socket
import threading
import time
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from pydantic import ValidationError

from quark.errors import RewardError
from quark.http_client import _retry_after_s
from quark.rewards.http import HttpConfig, HttpReward
from quark.rewards.scoring import score

KEY = "s3cret-key"


class Answers:
    """What a server says, one answer after the other; the last repeats."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.requests = []

    def next(self):
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


def lengths(request):
    return 200, {}, json.dumps({"scores": [len(text) for text in request["completions"]]})


@contextmanager
def serving(answers):
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            answers.requests.append((dict(self.headers), body))
            answer = answers.next()
            if answer == "hang up":
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
                return
            if answer == "sleep":
                time.sleep(1.0)
                answer = lengths
            status, headers, text = answer(body) if callable(answer) else answer
            data = text.encode()
            try:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
            except (BrokenPipeError, ConnectionResetError):
                pass  # the client gave up waiting

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/score"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def reward_on(*answers, retries=3, timeout_s=5.0, **config):
    said = Answers(*answers)
    with serving(said) as url:
        settings = HttpConfig(url=url, backoff_s=0.001, max_backoff_s=0.01, **config)
        reward = HttpReward(settings, retries=retries, timeout_s=timeout_s)
        try:
            yield reward, said
        finally:
            reward.close()


def call(reward):
    return reward(prompts=["a", "b"], completions=["xyz", "é"])


def test_texts_go_out_as_json_and_scores_come_back():
    with reward_on(lengths) as (reward, said):
        assert call(reward) == [3, 1]
        assert said.requests[0][1] == {"prompts": ["a", "b"], "completions": ["xyz", "é"]}
        assert "Authorization" not in said.requests[0][0]


def test_fields_of_the_rows_go_out_where_they_are_named():
    rows = [{"answer": "x", "secret": 1}, {"answer": ["y"]}]
    with reward_on(lengths, fields=("answer",)) as (reward, said):
        outcome = score(reward, ["a", "b"], ["x", "yz"], rows=rows)
        assert outcome.scores.tolist() == [1, 2]
        assert said.requests[0][1] == {
            "prompts": ["a", "b"],
            "completions": ["x", "yz"],
            "answer": ["x", ["y"]],
        }
        assert reward.provenance["fields"] == ["answer"]
        with pytest.raises(RewardError, match="asks for the field 'answer'"):
            score(reward, ["a"], ["x"])
        assert len(said.requests) == 1
    with pytest.raises(ValidationError, match="prompts is sent anyway"):
        HttpConfig(fields=("prompts",))


def test_null_is_not_scored():
    with reward_on((200, {}, '{"scores": [null, 2.5]}')) as (reward, _):
        outcome = score(reward, ["a", "b"], ["x", "y"])
        assert np.isnan(outcome.scores).tolist() == [True, False]
        assert outcome.num_failed == 1


@pytest.mark.parametrize("failure", [429, 500, 502, 503, 504, 408, "hang up"])
def test_overload_and_lost_connections_are_tried_again(failure):
    answer = failure if failure == "hang up" else (failure, {}, "busy")
    with reward_on(answer, answer, lengths) as (reward, said):
        assert call(reward) == [3, 1]
        assert len(said.requests) == 3


def test_a_server_that_is_too_slow_is_tried_again():
    with reward_on("sleep", lengths, timeout_s=0.2) as (reward, said):
        assert call(reward) == [3, 1]
        assert len(said.requests) == 2


def test_retries_end():
    with reward_on((503, {}, "down for repairs"), retries=2) as (reward, said):
        with pytest.raises(RewardError, match=r"no scores in 3 attempts; last: status 503: 'down"):
            call(reward)
        assert len(said.requests) == 3


@pytest.mark.parametrize("status", [301, 400, 401, 403, 404, 422])
def test_other_answers_are_errors_at_once(status):
    answer = (status, {"Location": "http://127.0.0.1:9/"}, "no such thing")
    with reward_on(answer) as (reward, said):
        with pytest.raises(RewardError, match=f"status {status}: 'no such thing'"):
            call(reward)
        assert len(said.requests) == 1


@pytest.mark.parametrize(
    "text", ["<html>", "[1, 2]", '{"score": [1, 2]}', '{"scores": 1}', '{"scores": {"0": 1}}']
)
def test_an_answer_without_scores_is_an_error(text):
    with reward_on((200, {}, text)) as (reward, said):
        with pytest.raises(RewardError, match="answered"):
            call(reward)
        assert len(said.requests) == 1


def test_too_few_scores_are_an_error():
    with (
        reward_on((200, {}, '{"scores": [1]}')) as (reward, _),
        pytest.raises(RewardError, match="1 score for 2"),
    ):
        score(reward, ["a", "b"], ["x", "y"])


def test_a_dead_server_is_not_scored_when_so_configured():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = HttpConfig(url=f"http://127.0.0.1:{port}", backoff_s=0.001)
    reward = HttpReward(config, retries=1, timeout_s=1.0)
    outcome = score(reward, ["a"], ["x"], on_error="nan")
    reward.close()
    assert outcome.num_failed == 1
    assert "2 attempts" in outcome.messages[0]


def test_the_key_is_sent_and_never_shown(monkeypatch):
    monkeypatch.setenv("QUARK_TEST_KEY", KEY)
    answer = (403, {}, f"who is {KEY}?")
    with reward_on(answer, api_key_env="QUARK_TEST_KEY") as (reward, said):
        with pytest.raises(RewardError) as info:
            call(reward)
        assert said.requests[0][0]["Authorization"] == f"Bearer {KEY}"
        assert KEY not in str(info.value)
        assert "[key]" in str(info.value)
        shown = repr(vars(reward)) + repr(vars(reward._client)) + str(reward.provenance)
        assert KEY not in repr(reward) + shown


def test_a_missing_key_is_named(monkeypatch):
    monkeypatch.delenv("QUARK_TEST_KEY", raising=False)
    with pytest.raises(RewardError, match="QUARK_TEST_KEY is not set"):
        HttpReward(HttpConfig(url="https://example.org", api_key_env="QUARK_TEST_KEY"))


def test_a_key_never_travels_unencrypted(monkeypatch):
    monkeypatch.setenv("QUARK_TEST_KEY", KEY)
    with pytest.raises(RewardError, match="only sent over https"):
        HttpReward(HttpConfig(url="http://example.org", api_key_env="QUARK_TEST_KEY"))


@pytest.mark.parametrize("url", ["ftp://example.org", "example.org", "https://me:pw@example.org"])
def test_unfit_addresses_are_refused(url):
    with pytest.raises(ValidationError):
        HttpConfig(url=url)
    with pytest.raises(RewardError, match=r"reward\.http\.url"):
        HttpReward(HttpConfig())


def test_retry_after_is_read_as_seconds_or_date():
    assert _retry_after_s("7") == 7.0
    assert _retry_after_s("-1") == 0.0
    assert 50 < _retry_after_s(formatdate(time.time() + 60, usegmt=True)) <= 60
    assert _retry_after_s(formatdate(time.time() - 60, usegmt=True)) == 0.0
    for nothing in (None, "soon", "nan", "inf"):
        assert _retry_after_s(nothing) is None


def test_the_wait_grows_is_jittered_and_honours_the_server_up_to_the_limit():
    reward = HttpReward(HttpConfig(url="http://localhost", backoff_s=1.0, max_backoff_s=6.0))
    waits = [{reward._client._wait_s(attempt, None) for _ in range(50)} for attempt in range(5)]
    reward.close()
    for drawn, longest in zip(waits, (1.0, 2.0, 4.0, 6.0, 6.0), strict=True):
        assert len(drawn) > 1
        assert longest / 2 <= min(drawn) <= max(drawn) <= longest
    assert reward._client._wait_s(0, 3.0) == 3.0
    assert reward._client._wait_s(0, 3600.0) == 6.0
