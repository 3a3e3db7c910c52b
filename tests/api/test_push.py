"""The card of a model, and its way to the Hub, for which a server on this machine stands in."""

from __future__ import annotations

import base64
import json
import re
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import quark
from quark.api.pushing import Upload
from quark.errors import ConfigError, ModelError
from quark.pool.native import NativePool
from tests.cli.commands import quark as command


class Hub(ThreadingHTTPServer):
    """The part of the Hub's interface that an upload uses."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[str] = []
        self.created: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.status = 200


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self._body()
        self.server.asked.append(self.path)
        if self.server.status != 200:
            return self._answer({"error": "no"}, self.server.status)
        if self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            return self._answer({"url": f"{self._address()}/me/model"})
        if "/preupload/" in self.path:
            files = json.loads(body)["files"]
            said = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in files
            ]
            return self._answer({"files": said})
        if "/commit/" in self.path:
            for line in body.splitlines():
                row = json.loads(line)
                if row["key"] == "file":
                    value = row["value"]
                    self.server.files[value["path"]] = base64.b64decode(value["content"])
            commit = f"{self._address()}/me/model/commit/abc"
            return self._answer(
                {"success": True, "commitOid": "abc", "commitUrl": commit, "hookOutput": ""}
            )
        return self._answer({})

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        self._answer({"id": "me/model", "siblings": []}, self.server.status)

    def log_message(self, *_: Any) -> None:
        pass

    def _address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, value: dict[str, Any], status: int = 200) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", address)
    # The whole suite may run offline: this Hub is on this machine.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_made_up")
    yield server
    server.shutdown()
    server.server_close()


def test_nothing_is_sent_before_the_user_agrees(finished: quark.Run, hub: Hub) -> None:
    shown: list[Upload] = []

    def refuse(upload: Upload) -> bool:
        shown.append(upload)
        return False

    assert finished.push("me/model", confirm=refuse) is None
    assert hub.asked == []
    names = [name for name, _ in shown[0].files]
    assert {"README.md", "model.safetensors", "config.json", "quark_reward_tokens.json"} <= {*names}
    assert shown[0].num_bytes > 10_000
    outcome = command("push", finished.path, "me/model")
    assert outcome.code == 2
    assert "--yes" in outcome.err
    assert "model.safetensors" in outcome.err
    assert hub.asked == []


def test_the_model_and_its_card_arrive(finished: quark.Run, hub: Hub) -> None:
    outcome = command("push", finished.path, "me/model", "--yes", "--license", "mit", "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["commit"].endswith("/commit/abc")
    created = hub.created[0]  # older versions of the library say it in another field
    assert created.get("visibility") == "private" or created.get("private") is True
    saved = finished.path / "model" / "model.safetensors"
    assert hub.files["model.safetensors"] == saved.read_bytes()
    card = hub.files["README.md"].decode()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "\nlicense: mit\n" in card
    assert "± " in card
    assert "## How to prompt" in card


def test_a_checkpoint_that_needs_the_original_model_asks_for_it(
    stopped: quark.Run, hub: Hub, tmp_path: Path
) -> None:
    run = quark.Run(shutil.copytree(stopped.path, tmp_path / "moved"))
    model = str(run.config.model.name)
    asked = command("push", run.path, "me/model", "--yes")
    assert (asked.code, f"--allow {model}" in asked.err) == (2, True)
    with pytest.raises(ConfigError, match="--allow"):
        run.push("me/model", confirm=lambda upload: True)
    with pytest.raises(ConfigError, match="--allow"):
        run.export(tmp_path / "exported", checkpoint="last")
    assert hub.asked == []
    assert not (tmp_path / "exported").exists()
    (tmp_path / "state").mkdir()
    with pytest.MonkeyPatch.context() as patch:  # what is allowed here is remembered there
        patch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
        assert run.push("me/model", confirm=lambda upload: True, allow=[model])
    assert "model.safetensors" in hub.files
    assert (run.export(tmp_path / "exported", allow=[model]) / "model.safetensors").is_file()
    hub.files.clear()
    assert command("push", run.path, "me/model", "--yes", "--allow", model).code == 0
    assert "model.safetensors" in hub.files


def test_a_pool_of_a_larger_vocabulary_is_not_resumed(stopped: quark.Run, tmp_path: Path) -> None:
    run = quark.Run(shutil.copytree(stopped.path, tmp_path / "run"))
    with NativePool.open(run.path / "pool") as pool:
        settings = pool.settings
    shutil.rmtree(run.path / "pool")
    NativePool.create(
        run.path / "pool",
        vocab_size=settings.vocab_size + 1,
        store_text=settings.store_text,
        tie_seed=settings.tie_seed,
        metadata=settings.metadata,
    ).close()
    refused = command("train", run.path, "--quiet", "--allow", str(run.config.model.name))
    assert refused.code in (3, 4)
    assert f"holds tokens of a vocabulary of {settings.vocab_size + 1}" in refused.err
    assert "bring back the model that wrote them" in " ".join(refused.err.split())


def test_a_refusal_of_the_hub_says_why(finished: quark.Run, hub: Hub) -> None:
    hub.status = 401
    with pytest.raises(ModelError, match=r"refused me/model: .*log"):
        finished.push("me/model", confirm=lambda upload: True)
    with pytest.raises(ConfigError, match="write OWNER/NAME"):
        finished.push("model", confirm=lambda upload: True)
    with pytest.raises(ConfigError, match="license: 'My Own'"):
        finished.push("me/model", confirm=lambda upload: True, license="My Own")


def test_the_report_has_its_figures_as_markdown(finished: quark.Run) -> None:
    text = (finished.path / "report.md").read_text()
    assert f"# {finished.path.name}" in text
    assert "| reward | length |" in text
    assert re.search(r"\| mean reward \| \d\.\d{3} ± \d\.\d{3} \| \d", text)
    page = (finished.path / "report.html").read_text()
    for title in ("Before and after", "Gradient norm by step", "Time by phase", "Length of comp"):
        assert title in page
    card = (finished.path / "model" / "README.md").read_text()
    assert "on the reward `length`" in card
    assert "license:" not in card


def test_a_demo_card_takes_the_license_of_the_embedded_model() -> None:
    from quark.api.cards import license_of

    assert license_of("embedded:reviews") == "cc-by-4.0"
    assert license_of("owner/model") is None
    assert license_of(str(Path(__file__).parent)) is None
