"""Other tools' samples become a pool's: each row once, with its scores, steps and metadata."""

from __future__ import annotations

import json
import math
import zipfile
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet as pq
import pytest

from quark.bounded_files import MAX_LINE_BYTES
from quark.errors import ConfigError
from quark.interchange.importing import FileImport, Refusal, import_samples
from quark.interchange.layouts import Layout
from quark.pool.native import NativePool
from quark.types import FinishReason
from tests.cli.commands import quark
from tests.hostile_text import HOSTILE
from tests.interchange import foreign_files
from tests.interchange.foreign_files import ids
from tests.tiny import VOCAB_SIZE, byte_tokenizer

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def take(path: Path, *files: Path, **options: Any) -> tuple[list[FileImport], list[Refusal]]:
    refusals: list[Refusal] = []
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = options.pop("template", TEMPLATE)
    results = import_samples(
        path,
        list(files),
        tokenizer=tokenizer,
        tokenizer_name="bytes",
        vocab_size=VOCAB_SIZE,
        on_refusal=refusals.append,
        **options,
    )
    return results, refusals


def rows_of(path: Path) -> list[dict[str, Any]]:
    with NativePool.open(path) as pool:
        return pool.scan().collect().to_dicts()


def counts(results: list[FileImport]) -> tuple[int, int, int]:
    return (
        sum(result.num_appended for result in results),
        sum(result.num_known for result in results),
        sum(result.num_refused for result in results),
    )


def test_trl_completions(tmp_path: Path) -> None:
    folder = foreign_files.trl(tmp_path)
    results, refusals = take(tmp_path / "pool", folder)
    assert (counts(results), refusals) == ((8, 0, 0), [])
    assert [result.layout for result in results] == [Layout.TRL] * 2
    rows = rows_of(tmp_path / "pool")
    assert [row["round"] for row in rows] == [1] * 4 + [2] * 4
    assert [row["reward"] for row in rows[:4]] == [1.5, 0.25, 1.0, 0.0]
    assert [row["accuracy_reward"] for row in rows[:4]] == [1.0, 0.0, 1.0, None]
    assert rows[0]["formatreward"] == 0.5
    assert rows[1]["advantage"] == pytest.approx(-0.7)
    assert rows[0]["completion_text"] == " two 1"
    assert rows[0]["completion_tokens"] == ids(" two 1")
    assert rows[2]["completion_text"] == rows[3]["completion_text"], "equal samples are all kept"
    assert len({row["prompt_id"] for row in rows}) == 2, "steps share their prompts"
    settings = json.loads(rows[0]["settings"])
    assert settings["imported"] == {
        "layout": "trl",
        "file": "completions_00001.parquet",
        "tokens": "recomputed",
    }
    assert settings["columns"] == {"parsed": ["two", "three", None, "blue"]}


def test_conversations_are_rendered_by_the_chat_template(tmp_path: Path) -> None:
    folder = foreign_files.trl(tmp_path, steps=1, conversational=True)
    take(tmp_path / "pool", folder)
    rows = rows_of(tmp_path / "pool")
    assert rows[0]["prompt_text"] == "<user>One and one is<assistant>"
    assert rows[0]["completion_text"] == " two 1"
    results, refusals = take(tmp_path / "other", folder, template=None)
    assert counts(results) == (0, 0, 4)
    assert "no chat template" in refusals[0].reason
    assert not (tmp_path / "other").exists(), "nothing came, so there is no pool"


def test_verl_rollouts(tmp_path: Path) -> None:
    results, _ = take(tmp_path / "pool", foreign_files.verl(tmp_path))
    assert counts(results) == (4, 0, 0)
    rows = rows_of(tmp_path / "pool")
    assert [(row["round"], row["reward"], row["acc"]) for row in rows] == [
        (7, 0.0, 0.0),
        (7, 1.0, 1.0),
        (7, 0.0, 0.0),
        (7, 1.0, 1.0),
    ]
    assert json.loads(rows[2]["prompt_metadata"]) == {"gts": "1"}
    assert len({row["prompt_id"] for row in rows}) == 2
    assert json.loads(rows[0]["settings"])["columns"]["uid"] == [
        "u0_0_0",
        "u0_0_1",
        "u1_0_0",
        "u1_0_1",
    ]


def test_open_instruct_shards_keep_their_token_ids(tmp_path: Path) -> None:
    results, refusals = take(tmp_path / "pool", foreign_files.open_instruct(tmp_path / "shards"))
    assert (counts(results), refusals) == ((4, 0, 0), [])
    rows = rows_of(tmp_path / "pool")
    assert rows[1]["completion_tokens"] == [*ids("Answer 1"), 256]
    assert rows[1]["completion_text"] == "Answer 1"
    assert rows[1]["logprob_sampled"] == -4.5
    assert [row["finish_reason"] for row in rows[:2]] == [FinishReason.LENGTH, FinishReason.STOP]
    assert [row["reward"] for row in rows] == [0.0, 0.5, 1.0, 1.5]
    assert json.loads(rows[0]["settings"])["imported"]["tokens"] == "given"
    assert json.loads(rows[0]["prompt_metadata"]) == {"dataset": "math", "ground_truth": [1, 2]}


@pytest.mark.parametrize("with_tokens", [True, False])
def test_prime_rl_traces(tmp_path: Path, with_tokens: bool) -> None:
    file = foreign_files.prime_rl(tmp_path, with_tokens=with_tokens)
    results, refusals = take(tmp_path / "pool", file)
    assert counts(results) == (3, 0, 1)
    assert str(refusals[0]) == f"{file}: row 3: column traces: the episode has none"
    rows = rows_of(tmp_path / "pool")
    assert {row["round"] for row in rows} == {5}, "the folder says the step"
    assert [row["completion_text"] for row in rows] == ["Hello", "right", "left"]
    assert [row["reward"] for row in rows] == [2.5, 0.5, 0.5], "weighted and added"
    assert [row["correct"] for row in rows] == [1.0, 0.0, 0.0]
    if with_tokens:
        assert rows[0]["prompt_tokens"] == ids("Hi<a>")
        assert rows[0]["completion_tokens"] == ids("Hello")
        assert rows[0]["logprob_sampled"] == -1.25


def test_lm_eval_samples(tmp_path: Path) -> None:
    file = foreign_files.lm_eval(tmp_path)
    results, refusals = take(tmp_path / "pool", file)
    assert counts(results) == (2, 0, 1)
    assert "row 3: column resps: it holds no generated text" in str(refusals[0])
    rows = rows_of(tmp_path / "pool")
    assert [(row["prompt_text"], row["completion_text"], row["reward"]) for row in rows] == [
        ("Q: q0\nA:", " 0", 1.0),
        ("Q: q1\nA:", " 7", 0.0),
    ]
    assert json.loads(rows[1]["prompt_metadata"]) == {"doc": {"question": "q1"}, "target": "1"}


def test_inspect_logs_are_read_by_their_own_package(tmp_path: Path) -> None:
    log = pytest.importorskip("inspect_ai.log", reason="the package inspect_ai is not installed")
    from inspect_ai.model import ModelOutput
    from inspect_ai.scorer import Score

    def sample(number: int, score: Any) -> Any:
        return log.EvalSample(
            id=number,
            epoch=1,
            input=f"q{number}",
            target="a",
            output=ModelOutput.from_content("mockllm/model", f"answer {number}"),
            scores={"match": Score(value=score)},
        )

    written = log.EvalLog(
        eval=log.EvalSpec(
            created="2026-11-29T00:00:00+00:00",
            task="t",
            dataset=log.EvalDataset(samples=3, sample_ids=[1, 2, 3]),
            model="mockllm/model",
            config=log.EvalConfig(),
        ),
        status="success",
        samples=[sample(1, "C"), sample(2, "I"), sample(3, {"a": 0.5, "b": "C"})],
    )
    for name in ("x.eval", "x.json"):
        log.write_eval_log(written, str(tmp_path / name))
    results, refusals = take(tmp_path / "pool", tmp_path / "x.eval", tmp_path / "x.json")
    assert (counts(results), refusals) == ((3, 3, 0), [])
    rows = rows_of(tmp_path / "pool")
    assert [row["reward"] for row in rows] == [1.0, 0.0, 0.5]
    assert rows[2]["match_b"] == 1.0
    assert rows[0]["prompt_text"] == "q1"


def test_an_inspect_log_that_decodes_to_too_much_is_not_opened(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.eval", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("samples/1.json", b" " * (1 << 27))
    results, refusals = take(tmp_path / "pool", tmp_path / "x.eval")
    assert counts(results) == (0, 0, 1)
    assert "134,217,728 bytes" in str(refusals[0])


@pytest.mark.parametrize("name", ["x.csv", "x.jsonl", "x.parquet"])
def test_prompts_and_completions_in_plain_columns(tmp_path: Path, name: str) -> None:
    frame = pl.DataFrame(
        {
            "prompt": ["a", "a", 'with "quotes",\nand a line'],
            "completion": ["b", "c", "d"],
            "stars": [1.0, 4.5, None],
            "helpful": [0.5, 1.0, 0.0],
            "annotator_id": [1, 2, 3],
            "source": ["web", "web", "book"],
        }
    )
    {
        "x.csv": frame.write_csv,
        "x.jsonl": frame.write_ndjson,
        "x.parquet": frame.write_parquet,
    }[name](tmp_path / name)
    results, _ = take(tmp_path / "pool", tmp_path / name, rewards=["stars"], of_prompt=["source"])
    assert counts(results) == (2, 0, 1), "a row without the reward that was asked for"
    rows = rows_of(tmp_path / "pool")
    assert [(row["reward"], row["stars"], row["helpful"]) for row in rows] == [
        (1.0, 1.0, 0.5),
        (4.5, 4.5, 1.0),
    ]
    assert json.loads(rows[0]["prompt_metadata"]) == {"source": "web"}
    results, _ = take(tmp_path / "all", tmp_path / name)
    assert counts(results) == (3, 0, 0)
    assert rows_of(tmp_path / "all")[2]["prompt_text"] == 'with "quotes",\nand a line'
    assert [row["reward"] for row in rows_of(tmp_path / "all")] == [None] * 3, "none was named"


def test_a_second_import_adds_nothing_and_a_grown_file_only_what_is_new(tmp_path: Path) -> None:
    pool = tmp_path / "pool"
    rows = [{"prompt": "p", "completion": f"c{n % 3}", "step": 1} for n in range(7)]
    file = foreign_files.json_lines(tmp_path / "x.jsonl", rows)
    assert counts(take(pool, file)[0]) == (7, 0, 0)
    assert counts(take(pool, file)[0]) == (0, 7, 0)
    copy = tmp_path / "copy.parquet"
    pl.DataFrame(rows).write_parquet(copy)
    assert counts(take(pool, copy)[0]) == (0, 7, 0), "the content counts, not the file"
    foreign_files.json_lines(file, [*rows, {"prompt": "p", "completion": "c0", "step": 1}])
    assert counts(take(pool, file)[0]) == (1, 7, 0)
    assert [row["completion_text"] for row in rows_of(pool)].count("c0") == 4


def test_samples_that_were_removed_do_not_come_back(tmp_path: Path) -> None:
    pool = tmp_path / "pool"
    folder = foreign_files.trl(tmp_path)
    take(pool, folder)
    with NativePool.open(pool, writable=True) as opened:
        opened.retain(max_samples=4)
    assert counts(take(pool, folder)[0]) == (0, 8, 0)


def test_a_dry_run_writes_nothing_and_says_the_same(tmp_path: Path) -> None:
    folder = foreign_files.trl(tmp_path)
    planned, _ = take(tmp_path / "pool", folder, is_dry_run=True)
    assert not (tmp_path / "pool").exists()
    done, _ = take(tmp_path / "pool", folder)
    assert planned == done
    assert done[0].scores == {
        "accuracy_reward": 3,
        "formatreward": 4,
        "advantage": 4,
        "reward": 4,
    }
    before = rows_of(tmp_path / "pool")
    again, _ = take(tmp_path / "pool", folder, is_dry_run=True)
    assert counts(again) == (0, 8, 0)
    assert rows_of(tmp_path / "pool") == before


BAD = {
    "not json": ('{"prompt": "p", ', "it is not JSON"),
    "a list": ("[1]", "it is not a JSON object"),
    "no completion": ('{"prompt": "p"}', "column completion: None is not a text"),
    "a number": ('{"prompt": 3, "completion": "c"}', "column prompt: 3 is not a text"),
    "half a character": (
        '{"prompt": "p", "completion": "\\ud800"}',
        "the completion holds half of a character",
    ),
    "empty": ('{"prompt": "", "completion": "c"}', "the prompt has no tokens"),
    "nothing said": ('{"prompt": "p", "completion": ""}', "the completion has no tokens"),
    "deep": (
        '{"prompt": "p", "completion": "c", "x": ' + "[" * 70 + "]" * 70 + "}",
        "it is nested more than 64 levels deep",
    ),
    "score": (
        '{"prompt": "p", "completion": "c", "score": "high"}',
        "column score: 'high' is not a number",
    ),
    "too large": (
        '{"prompt": "p", "completion": "c", "score": 1e300}',
        "does not fit into 32 bits",
    ),
    "step": ('{"prompt": "p", "completion": "c", "step": -1}', "column step: -1 is not a whole"),
    "ids": (
        '{"prompt_tokens": [1], "completion_tokens": [999]}',
        "the completion has the token 999, and the vocabulary has 257",
    ),
    "large metadata": (
        json.dumps({"prompt": "p", "completion": "c", "x": "y" * (1 << 20)}),
        "its other columns have more than",
    ),
    "turns": (
        json.dumps({"prompt": "p", "completion": [{"role": "assistant", "content": "a"}] * 2}),
        "column completion: it has 2 messages",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_row_that_cannot_be_taken_is_named_and_the_others_come(tmp_path: Path, case: str) -> None:
    line, reason = BAD[case]
    good = '{"prompt": "p", "completion": "c", "score": 1}\n'
    file = tmp_path / "x.jsonl"
    file.write_text(good + line + "\n" + good, encoding="utf-8")
    results, refusals = take(tmp_path / "pool", file)
    assert counts(results) == (2, 0, 1)
    [refusal] = refusals
    assert refusal.row == 2
    assert reason in refusal.reason
    assert len(str(refusal).splitlines()) == 1


def test_a_damaged_file_keeps_no_other_from_coming(tmp_path: Path) -> None:
    folder = foreign_files.trl(tmp_path)
    first = folder / "completions_00001.parquet"
    data = bytearray(first.read_bytes())
    data[len(data) // 2 : -200] = b"\xff" * len(data[len(data) // 2 : -200])
    first.write_bytes(data)
    results, [refusal] = take(tmp_path / "pool", folder)
    assert sum(result.num_appended for result in results) == 4
    assert refusal.row is None
    assert str(first) in str(refusal)


def test_a_line_that_is_too_long_ends_its_file(tmp_path: Path) -> None:
    file = tmp_path / "x.csv"
    file.write_text('prompt,completion\na,b\n"' + "x\n" * (MAX_LINE_BYTES // 2 + 9) + '",c\n')
    results, refusals = take(tmp_path / "pool", file)
    assert counts(results) == (1, 0, 1)
    assert "more than 16,777,216 bytes" in str(refusals[0])


def test_files_that_fit_nothing_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    good = foreign_files.verl(tmp_path)
    other = foreign_files.json_lines(tmp_path / "x.jsonl", [{"question": "q", "answer": "a"}])
    with pytest.raises(
        ConfigError, match=r"fits no known layout\. Its columns are 'question', 'ans"
    ):
        take(tmp_path / "pool", good, other)
    assert not (tmp_path / "pool").exists()
    with NativePool.create(tmp_path / "p", vocab_size=9, metadata={"model": "gpt2"}):
        pass
    with pytest.raises(ConfigError, match="made with the tokenizer of 'gpt2', not of 'bytes'"):
        take(tmp_path / "p", good)
    with pytest.raises(ConfigError, match="has no file that ends in"):
        take(tmp_path / "pool", (tmp_path / "empty").mkdir() or tmp_path / "empty")


def test_a_folder_is_not_left_through_a_link(tmp_path: Path) -> None:
    folder = foreign_files.trl(tmp_path / "theirs", steps=1)
    private = foreign_files.verl(tmp_path / "mine")
    (folder / "7.jsonl").symlink_to(private)
    results, _ = take(tmp_path / "pool", folder)
    assert [result.file.name for result in results] == ["completions_00001.parquet"]


def test_the_command(tmp_path: Path) -> None:
    folder = foreign_files.trl(tmp_path)
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps({"prompt": "p", "completion": HOSTILE[0]}) + "\n{\n")
    pool, tokenizer = tmp_path / "pool", ("--tokenizer", "embedded:reviews")
    refused = quark("pool", "import", pool, folder)
    assert refused.code == 2
    assert "--tokenizer" in refused.err
    shown = quark("pool", "import", pool, folder, *tokenizer, "--dry-run")
    assert shown.code == 0, shown.err
    assert "8 samples would come" in shown.out
    assert "example 1" in shown.out
    assert "One and one is" in shown.out
    assert not pool.exists()
    done = quark("pool", "import", pool, folder, bad, *tokenizer, "--json")
    assert done.code == 3
    assert (done.json["appended"], done.json["known"], done.json["refused"]) == (9, 0, 1)
    assert f"not taken: {bad}: row 2: it is not JSON" in done.err
    again = quark("pool", "import", pool, folder, *tokenizer)
    assert again.code == 0
    assert "0 samples came, 8 were there" in again.out
    assert all(c.isprintable() or c == "\n" for c in shown.out + done.err + again.out)
    ranked = quark("pool", "stats", pool, "--num-quantiles", "2", "--json").json
    assert sum(ranked["quantile_counts"]) == 8


def test_scores_of_a_table_that_trl_wrote(tmp_path: Path) -> None:
    """The mean of every reward function is that of the file."""
    folder = foreign_files.trl(tmp_path)
    take(tmp_path / "pool", folder)
    table = pq.read_table(folder).to_pandas()
    rows = pl.DataFrame(rows_of(tmp_path / "pool"))
    assert rows.height == len(table)
    assert math.isclose(rows["accuracy_reward"].mean(), table["accuracy_reward"].mean())
    assert math.isclose(rows["formatreward"].mean(), table["FormatReward"].mean())
