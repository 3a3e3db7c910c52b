from __future__ import annotations

import dataclasses
import json
import re
import shutil
import socket
from contextlib import nullcontext
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest

from quark.errors import RunDirectoryError
from quark.pool.native import NativePool
from quark.pool.writer_lock import LOCK_FILE, has_writer
from quark.report import charts
from quark.report.load import PoolView, QuantileView, load_run
from quark.report.overview import runs_in
from quark.report.render import render_report, write_report
from quark.run_directory import RunDirectory
from tests.hostile_text import HOSTILE
from tests.planted import PLANTS, SECRET, Plant, recorded
from tests.report.run_on_disk import metrics_rows, write_lines, write_run


class Skeleton(HTMLParser):
    """Tags with attributes, and the text between them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, tuple[tuple[str, str | None], ...]]] = []
        self.ends: list[str] = []
        self.text: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, tuple(attrs)))

    def handle_endtag(self, tag: str) -> None:
        self.ends.append(tag)

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    @property
    def shape(self) -> list[tuple[str, tuple[str, ...]]]:
        return [(tag, tuple(name for name, _ in attrs)) for tag, attrs in self.tags]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("report") / "demo")


@pytest.fixture(scope="module")
def page(run: Path) -> str:
    return write_report(run).read_text(encoding="utf-8")


def test_the_page_shows_every_section(page: str) -> None:
    text = " ".join(Skeleton(page).text)
    for expected in (
        "0.50 → 0.90",
        "alert: harmless",
        "The same prompt, before and after",
        "Mean reward by round",
        "the control curve",
        "KL divergence by step",
        "Losses by step",
        "Diversity",
        "Perplexity",
        "cuts between quantiles",
        "Quantile 4, best",
        "Quantile 0, worst",
        "run.seed",
        "1 samples are not scored",
        "finished",
    ):
        assert expected in text


def test_a_fall_of_the_reward_is_not_painted_as_a_gain(
    run: Path, page: str, tmp_path: Path
) -> None:
    assert page.count('class="card gain"') == 1
    assert 'class="card loss"' not in page
    fallen = tmp_path / "fallen"
    shutil.copytree(run, fallen)
    log = fallen / "metrics.jsonl"
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    assert rows[-1]["event"] == "end"
    rows[-1]["reward_after"] = rows[-1]["reward_before"] - 0.1
    log.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    page = write_report(fallen).read_text(encoding="utf-8")
    assert page.count('class="card loss"') == 1
    assert 'class="card gain"' not in page


def test_the_page_is_well_formed_and_self_contained(page: str) -> None:
    skeleton = Skeleton(page)
    tags = [tag for tag, _ in skeleton.tags]
    assert not {"script", "link", "iframe", "object", "embed", "form", "base", "img"} & set(tags)
    assert "http://" not in page
    assert "https://" not in page
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)
    attributes = [(name, value or "") for _, attrs in skeleton.tags for name, value in attrs]
    assert not [
        name for name, _ in attributes if name.startswith("on") or name in ("src", "srcset")
    ]
    targets = [value for name, value in attributes if name in ("href", "xlink:href")]
    assert targets
    assert all(":" not in value and not value.startswith("/") for value in targets)
    ids = [value for name, value in attributes if name == "id"]
    assert len(ids) == len(set(ids))
    policy = next(value for name, value in attributes if value.startswith("default-src"))
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:")


def test_every_chart_has_a_title_for_those_who_cannot_see_it(page: str) -> None:
    skeleton = Skeleton(page)
    drawings = [dict(attrs) for tag, attrs in skeleton.tags if tag == "svg"]
    titles = {dict(attrs).get("id") for tag, attrs in skeleton.tags if tag == "title"}
    assert len(drawings) == 7
    assert all(drawing["role"] == "img" for drawing in drawings)
    assert {drawing["aria-labelledby"] for drawing in drawings} <= titles


def test_links_lead_to_files_of_the_run(page: str, run: Path) -> None:
    links = [dict(attrs)["href"] for tag, attrs in Skeleton(page).tags if tag == "a"]
    assert {unquote(str(link)).rstrip("/") for link in links} == {
        "model",
        "pool",
        "config.toml",
        "metrics.jsonl",
    }
    assert all((run / unquote(str(link))).exists() for link in links)


def test_links_are_relative_to_where_the_page_is(run: Path, tmp_path: Path) -> None:
    output = tmp_path / "elsewhere" / "page.html"
    output.parent.mkdir()
    page = write_report(run, output).read_text(encoding="utf-8")
    links = [str(dict(attrs)["href"]) for tag, attrs in Skeleton(page).tags if tag == "a"]
    assert all((output.parent / unquote(link)).exists() for link in links)


def test_the_same_run_gives_the_same_page(page: str, run: Path) -> None:
    assert render_report(load_run(run), relative_to=run) == page


TEXTS_PER_PAGE = 29


@pytest.mark.parametrize("start", range(0, len(HOSTILE), TEXTS_PER_PAGE))
def test_hostile_text_changes_no_tag_of_the_page(start: int, tmp_path: Path) -> None:
    texts = [text[:5000] for text in HOSTILE[start : start + TEXTS_PER_PAGE]]
    pages = []
    for name, chosen in (("hostile", texts), ("harmless", ["harmless"] * len(texts))):
        path = write_run(tmp_path / name, *chosen)
        pages.append(render_report(load_run(path), relative_to=path))
    hostile, harmless = map(Skeleton, pages)
    assert hostile.shape == harmless.shape
    assert hostile.ends == harmless.ends
    assert all(character.isprintable() or character == "\n" for character in pages[0])


def test_what_the_tokens_say_is_drawn_where_it_was_measured(run: Path, tmp_path: Path) -> None:
    assert charts.information_by_step(load_run(run)) is None
    path = write_run(tmp_path / "run")
    rows = metrics_rows("harmless")
    for row in rows:
        if row["event"] == "step":
            row["information"] = 0.01 * row["step"]
        if row["event"] == "round":
            row["information_held_out"], row["information_error_held_out"] = 0.1, 0.02
            # The first round's new samples are not measured.
            fresh = None if row["round"] == 0 else 0.05
            row["information_fresh"], row["information_error_fresh"] = fresh, None
    write_lines(RunDirectory(path).metrics, rows)
    chart = charts.information_by_step(load_run(path))
    assert chart is not None
    for label in ("chance", "learned from", "new samples", "held out"):
        assert label in chart.svg
    assert chart.note in render_report(load_run(path), relative_to=tmp_path)


def test_a_run_that_is_going_on_can_be_shown(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", ended=False)
    metrics = RunDirectory(path).metrics
    metrics.write_text(metrics.read_text(encoding="utf-8") + '{"event": "st', encoding="utf-8")
    page = write_report(path).read_text(encoding="utf-8")
    assert "stopped without a word" in page
    assert "1 incomplete lines" in page
    assert "0.50 → 0.80" in page  # from the evaluations, as there is no last word


@pytest.mark.parametrize(
    ("last_row", "is_written", "says"),
    [
        (
            None,
            True,
            "running: a process has its pool open; the last row of its log is of 2026-11-29",
        ),
        (None, False, "stopped without a word, as a killed process does; the last row of its log"),
        (
            {"kind": "interrupted", "reason": "asked to stop"},
            False,
            "interrupted in round 2 after 11 steps, can be",
        ),
        (
            {"kind": "failed", "reason": "OSError: <b>full</b>"},
            False,
            "failed in round 2 after 11 steps: OSError: &lt;b",
        ),
        (
            {"kind": "failed", "reason": "OSError: full"},
            True,
            "running: a process has its pool open",
        ),
    ],
)
def test_the_page_says_how_a_run_ended_as_well_as_it_can_be_known(
    tmp_path: Path, last_row: dict[str, str] | None, is_written: bool, says: str
) -> None:
    path = write_run(tmp_path / "run", ended=False)
    row = {"event": "step", "step": 11, "round": 2, "unix_time": 1795960000.0}
    if last_row is not None:
        row |= {"event": "stop"} | last_row
    with RunDirectory(path).metrics.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    writer = (
        NativePool.open(RunDirectory(path).pool, writable=True) if is_written else nullcontext()
    )
    with writer:
        assert says in write_report(path).read_text(encoding="utf-8")


def test_looking_for_a_writer_keeps_none_away(tmp_path: Path) -> None:
    pool = RunDirectory(write_run(tmp_path / "run")).pool
    assert has_writer(pool) is False
    with NativePool.open(pool, writable=True):
        assert has_writer(pool) is True
    NativePool.open(pool, writable=True).close()
    assert has_writer(tmp_path / "no pool") is False


@pytest.mark.parametrize("plant", PLANTS)
def test_what_is_planted_for_the_lock_of_a_pool_is_not_opened(tmp_path: Path, plant: Plant) -> None:
    path = write_run(tmp_path / "run")
    lock = RunDirectory(path).pool / LOCK_FILE
    plant(lock)
    with recorded() as reached:
        assert has_writer(lock.parent) is None
        assert [run.state for run in runs_in(path)] == ["finished"]
        write_report(path)
    assert not {SECRET, Path("/dev/zero")} & set(reached.files)


def test_a_run_without_pool_metrics_or_config_can_be_shown(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", with_pool=False)
    RunDirectory(path).metrics.unlink()
    RunDirectory(path).config.unlink()
    page = write_report(path).read_text(encoding="utf-8")
    assert "there is no pool yet" in page
    assert "No round has finished yet" in page


def test_a_damaged_pool_is_named_and_the_rest_is_shown(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run")
    for file in RunDirectory(path).pool.rglob("*"):
        if file.is_file():
            file.write_bytes(b"\x00" * file.stat().st_size)
    page = write_report(path).read_text(encoding="utf-8")
    assert "Mean reward by round" in page
    assert "Samples by quantile" not in page


@pytest.mark.parametrize("rule", ["min_score = 0.5", 'where = "reward >= 0.5"'])
def test_the_pool_is_ranked_as_the_run_ranks_it(tmp_path: Path, rule: str) -> None:
    path = write_run(tmp_path / "run")
    RunDirectory(path).config.write_text(f"[pool]\n{rule}\n", encoding="utf-8")
    pool = load_run(path).pool
    assert pool is not None
    is_inside = pool.rewards >= 0.5
    np.testing.assert_array_equal(pool.labels >= 0, is_inside)
    assert pool.num_outside == (~is_inside).sum() - pool.num_unscored > 0
    assert f"{pool.num_outside} samples are not ranked" in write_report(path).read_text("utf-8")


@pytest.mark.parametrize(
    "rule", ["min_score = nan", 'last_rounds = "x"', 'ties = "no"', "where = 5"]
)
def test_a_run_without_a_ranking_is_shown_without_its_pool(tmp_path: Path, rule: str) -> None:
    path = write_run(tmp_path / "run")
    RunDirectory(path).config.write_text(f"[pool]\n{rule}\n", encoding="utf-8")
    assert "does not say how it is ranked" in write_report(path).read_text("utf-8")


def test_rows_repeated_after_a_resume_count_once(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", with_pool=False)
    rows = metrics_rows("a")
    again = [row | {"loss": 9.0} for row in rows if row["event"] == "step" and row["step"] >= 8]
    write_lines(RunDirectory(path).metrics, [*rows, *again])
    data = load_run(path)
    assert [row["step"] for row in data.steps] == list(range(12))
    assert [row["loss"] for row in data.steps[8:]] == [9.0] * 4


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{",
        "null",
        "[" * 100_000,
        "\ud800".encode("utf-8", "surrogatepass").decode("latin-1"),
    ],
)
def test_a_damaged_identity_is_an_error_that_names_the_file(tmp_path: Path, content: str) -> None:
    path = write_run(tmp_path / "run", with_pool=False)
    RunDirectory(path).identity.write_text(content, encoding="utf-8")
    with pytest.raises(RunDirectoryError, match=r"run\.json"):
        load_run(path)


def test_a_folder_that_is_no_run_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match="is not a run directory"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    "line", ["NaN", "[1]", '{"event": "step", "step": "x", "loss": []}', '{"event": "round", "quantile_counts": {}}',
             '{"event": "control_curve", "reward_mean": ["a", null, true]}', '{"event": "end", "before_after": [1, {}]}',
             '{"event": "step", "step": 1e999, "loss": -1e999}', "[" * 100_000,
             '{"event": "step", "step": 9, "loss": 1e308}', '{"event": "round", "round": 9, "reward_mean": 1%s}' % ("0" * 400),
             '{"event": "control_curve", "step": 9, "reward_mean": [1%s]}' % ("0" * 400)]
)  # fmt: skip
def test_strange_metrics_lines_do_no_harm(tmp_path: Path, line: str) -> None:
    path = write_run(tmp_path / "run", with_pool=False, ended=False)
    metrics = RunDirectory(path).metrics
    metrics.write_text(metrics.read_text(encoding="utf-8") + line + "\n", encoding="utf-8")
    assert "Mean reward by round" in write_report(path).read_text(encoding="utf-8")


def test_writing_the_page_opens_no_connection(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    write_report(run)


@pytest.mark.parametrize(
    "rewards",
    [[0.5] * 10, [float("nan")] * 10, [float("inf"), -1.0, 2.0], [-1e30, 1e30], [1e-30, 2e-30]],
)
def test_the_histogram_copes_with_any_rewards(rewards: list[float]) -> None:
    values = np.array(rewards, np.float32)
    labels = np.where(np.isnan(values), -1, np.arange(len(values)) % 2).astype(np.int16)
    quantiles = tuple(
        QuantileView(index=k, num_samples=1, lower_bound=float(values[k]), mean=0.0, samples=())
        for k in (0, 1)
    )
    chart = charts.reward_histogram(PoolView(rewards=values, labels=labels, quantiles=quantiles))
    assert (chart is None) == (not np.isfinite(values).any())


def test_quantile_colors_run_from_red_to_teal() -> None:
    assert charts.quantile_color(0, 5) == "#d1495b"
    assert charts.quantile_color(4, 5) == "#1f9e89"
    assert charts.quantile_color(0, 1).startswith("#")


def test_few_steps_and_a_single_token_are_labelled_as_such(run: Path) -> None:
    data = load_run(run)
    assert len(data.steps) >= 3
    data = dataclasses.replace(
        data, steps=data.steps[:3], control_curves=({"step": 3, "reward_mean": [0.4]},)
    )
    steps, tokens = charts.kl_by_step(data), charts.control_curve(data)
    assert steps is not None
    assert tokens is not None
    assert not {"0.25", "1.25", "1.75"} & set(re.findall(r">([^<>]+)</text>", steps.svg))
    assert "quantile asked for</text>" in tokens.svg
