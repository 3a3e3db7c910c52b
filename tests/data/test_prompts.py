from __future__ import annotations

import html
import json
import os
import re
import subprocess
import sys
import threading
from datetime import date
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from quark.data.prompt_rows import MAX_PROMPT_BYTES
from quark.data.prompts import PromptConfig, PromptSet, load_prompts
from quark.errors import DataError
from tests.shared_data import shared_data
from tests.tiny import byte_tokenizer


def load(path: Path | str, seed: int = 0, **settings: object) -> PromptSet:
    config = PromptConfig.model_validate({"source": str(path), **settings})
    return load_prompts(config, byte_tokenizer(), seed=seed)


def write(tmp_path: Path, content: bytes | str, name: str = "prompts.jsonl") -> Path:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def lines(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def texts(prompts: object) -> list[str]:
    return [prompt.text for prompt in prompts]  # type: ignore[attr-defined]


def test_the_split_field_decides(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        lines(
            {"prompt": "a", "split": "train"},
            {"prompt": "b", "split": "eval"},
            {"prompt": "c", "split": "train"},
        ),
    )
    prompts = load(path)
    assert texts(prompts.train) == ["a", "c"]
    assert texts(prompts.evaluation) == ["b"]


def test_other_splits_are_neither_learnt_from_nor_evaluated_on(tmp_path: Path) -> None:
    splits = ["train", "validation", "test", "", "test", "dev"]
    rows = [{"prompt": f"p{i}", "split": split} for i, split in enumerate(splits)]
    prompts = load(write(tmp_path, lines(*rows, {"prompt": "p6"})))
    assert texts(prompts.train) == ["p0", "p3", "p6"]
    assert texts(prompts.evaluation) == ["p1"]
    assert [note.split(" left out")[0] for note in prompts.notes] == [
        "2 prompts with split = 'test'",
        "1 prompt with split = 'dev'",
    ]
    with pytest.raises(DataError, match=r"0 prompts to train.*split = 'test' left out"):
        load(write(tmp_path, lines(rows[2], rows[4])))


def test_an_evaluation_file_decides(tmp_path: Path) -> None:
    path = write(tmp_path, lines({"prompt": "a"}, {"prompt": "b", "split": "eval"}))
    other = write(tmp_path, lines({"prompt": "held out"}), "held.jsonl")
    prompts = load(path, evaluation_source=str(other))
    assert texts(prompts.train) == ["a"]
    assert texts(prompts.evaluation) == ["held out"]


def test_without_either_a_seeded_part_is_held_out(tmp_path: Path) -> None:
    path = write(tmp_path, "".join(f"p{i}\n" for i in range(100)), "many.txt")
    first, again, other = (load(path, seed=seed, num_evaluation=10) for seed in (1, 1, 2))
    assert first == again
    assert texts(first.evaluation) != texts(other.evaluation)
    assert len(first.evaluation) == 10
    assert sorted(texts(first.train) + texts(first.evaluation)) == sorted(
        f"p{i}" for i in range(100)
    )


def test_the_layout_of_real_toxicity_prompts_is_understood(tmp_path: Path) -> None:
    row = {
        "filename": "x",
        "prompt": {"text": "hello", "toxicity": 0.1},
        "continuation": {"text": "!"},
    }
    other = row | {"prompt": {"text": "bye", "toxicity": 0.2}, "split": "eval"}
    prompts = load(write(tmp_path, lines(row, other)))
    assert (texts(prompts.train), texts(prompts.evaluation)) == (["hello"], ["bye"])


def test_where_keeps_rows_by_a_number_in_them(tmp_path: Path) -> None:
    rows = [{"prompt": {"text": f"p{i}", "toxicity": i / 10}} for i in range(10)]
    path = write(tmp_path, lines(*rows, {"prompt": {"text": "none", "toxicity": None}}))
    held = write(tmp_path, lines({"prompt": {"text": "held", "toxicity": 0.9}}), "held.jsonl")
    prompts = load(path, where="prompt.toxicity >= 0.7", evaluation_source=str(held))
    assert texts(prompts.train) == ["p7", "p8", "p9"]
    prompts = load(path, where="prompt.toxicity<0.2", num_evaluation=1)
    assert sorted(texts(prompts.train + prompts.evaluation)) == ["p0", "p1"]
    with pytest.raises(DataError, match=r"no row fits prompts.where = 'prompt.insult > 0'"):
        load(path, where="prompt.insult > 0")
    with pytest.raises(DataError, match="lines of text have no numbers"):
        load(write(tmp_path, "a\nb\n", "a.txt"), where="toxicity > 0")
    for where in ("toxicity is high", "toxicity > .", "> 1", "a > 1 > 0", "a > 1e", "a > --"):
        with pytest.raises(ValueError, match="a comparison and a number"):
            PromptConfig(where=where)


def test_the_shared_prompt_file_loads() -> None:
    prompts = load(shared_data("realtoxicityprompts_4k.jsonl"), max_tokens=2000)
    assert len(prompts.train) > 1000
    assert all(prompt.text.strip() for prompt in prompts.train)


def test_the_embedded_prompts_load() -> None:
    prompts = load("embedded:reviews")
    assert (len(prompts.train), len(prompts.evaluation)) == (711, 128)
    assert prompts.notes == ()


def test_the_embedded_prompts_are_plain_words() -> None:
    prompts = load("embedded:reviews")
    everything = texts(prompts.train + prompts.evaluation)
    assert [text for text in everything if not re.fullmatch(r"[a-z' -]*[a-z]", text)] == []
    assert [text for text in everything if html.unescape(text) != text] == []


@pytest.mark.parametrize("seed", range(5))
def test_a_prompt_is_never_on_both_sides(tmp_path: Path, seed: int) -> None:
    """Also where only case or spaces differ."""
    words = [f"word {i:02}" for i in range(20)]
    rows = [variant for word in words for variant in (word, word.title(), f" {word}  ")]
    prompts = load(
        write(tmp_path, lines(*({"prompt": row} for row in rows))),
        seed,
        num_evaluation=8,
    )
    trained, held_out = (
        {text.split()[-1] for text in texts(part)} for part in (prompts.train, prompts.evaluation)
    )
    assert len(prompts.evaluation) == len(held_out) == 8
    assert trained.isdisjoint(held_out)
    assert len(trained) == 12
    assert len(prompts.train) == 12 * 3
    assert any(note.startswith("16 prompts are not trained on") for note in prompts.notes)


def test_prompts_that_differ_before_the_cut_alone_are_one(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"{i} and the same end", "split": split}
        for i, split in enumerate(["train", "eval"])
    ]
    path = write(tmp_path, lines(*rows, {"prompt": "another", "split": "train"}))
    assert texts(load(path, max_tokens=8).train) == ["another"]
    assert texts(load(path).train) == ["0 and the same end", "another"]


@pytest.mark.parametrize("is_one_file", [False, True])
def test_what_an_evaluation_file_holds_is_not_trained_on(tmp_path: Path, is_one_file: bool) -> None:
    path = write(tmp_path, lines(*({"prompt": f"p{i}"} for i in range(10))))
    other = write(tmp_path, lines(*({"prompt": f"P{i}"} for i in range(4))), "other.jsonl")
    source = path if is_one_file else other
    prompts = load(path, evaluation_source=str(source), num_evaluation=4)
    assert len(prompts.evaluation) == 4
    assert texts(prompts.train) == [f"p{i}" for i in range(4, 10)]
    assert [note.split(":")[0] for note in prompts.notes] == ["4 prompts are not trained on"]
    with pytest.raises(
        DataError, match=r"0 prompts to train and 10.*an evaluation_source with others"
    ):
        load(path, evaluation_source=str(path))


def test_few_prompts_say_how_many_are_held_out(tmp_path: Path) -> None:
    path = write(tmp_path, lines(*({"prompt": f"p{i}"} for i in range(120))))
    few = load(path)
    assert (len(few.train), len(few.evaluation)) == (60, 60)
    (note,) = few.notes
    assert note.startswith("60 of 120 different prompts are held out")
    assert load(path, num_evaluation=60).notes == load(path, num_evaluation=9).notes == ()


def test_parquet_and_another_field(tmp_path: Path) -> None:
    path = tmp_path / "prompts.parquet"
    pl.DataFrame({"question": ["a", "b", "c", "d"], "n": [1, 2, 3, 4]}).write_parquet(path)
    prompts = load(path, field="question", num_evaluation=1)
    assert sorted(texts(prompts.train) + texts(prompts.evaluation)) == ["a", "b", "c", "d"]
    assert {p.metadata["n"] for p in prompts.train} <= {1, 2, 3, 4}


def test_numbers_beside_a_prompt_that_are_not_finite_are_missing(tmp_path: Path) -> None:
    rows = '{"prompt": "a", "x": NaN}\n{"prompt": "b", "x": 1e400}\n{"prompt": "c", "x": 0.5}\n'
    prompts = load(write(tmp_path, rows))
    found = {p.text: p.metadata["x"] for p in (*prompts.train, *prompts.evaluation)}
    assert found == {"a": None, "b": None, "c": 0.5}


def test_the_name_of_a_parquet_file_is_no_pattern(tmp_path: Path) -> None:
    for name in ("a[1].parquet", "a1.parquet"):
        rows = {"prompt": [name, "held out"], "split": ["train", "eval"]}
        pl.DataFrame(rows).write_parquet(tmp_path / name)
    assert texts(load(tmp_path / "a[1].parquet").train) == ["a[1].parquet"]


def test_duplicates_marks_and_windows_line_ends_are_fine(tmp_path: Path) -> None:
    path = write(
        tmp_path, b"\xef\xbb\xbf" + b'{"prompt": "a"}\r\n{"prompt": "a"}\r\n\r\n{"prompt": "b"}\r\n'
    )
    prompts = load(path, num_evaluation=1, seed=3)
    assert (texts(prompts.train), texts(prompts.evaluation)) == (["a", "a"], ["b"])


def test_long_prompts_lose_their_beginning_and_are_counted(tmp_path: Path) -> None:
    path = write(tmp_path, "a\nb\nabcdefgh\n", "long.txt")
    prompts = load(path, max_tokens=3, num_evaluation=1, seed=4)
    everything = texts(prompts.train) + texts(prompts.evaluation)
    assert sorted(everything) == ["a", "b", "fgh"]
    assert any("1 prompt" in note for note in prompts.notes)


def test_long_prompts_may_be_left_out_or_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "a\nb\nc\nabcdefgh\n", "long.txt")
    prompts = load(path, max_tokens=3, num_evaluation=1, over_long="skip")
    assert "abcdefgh" not in texts(prompts.train) + texts(prompts.evaluation)
    assert any("1 prompt" in note for note in prompts.notes)
    with pytest.raises(DataError, match=r"long\.txt:4.*8 tokens"):
        load(path, max_tokens=3, over_long="fail")


@pytest.mark.parametrize("place", [0, 2, 4])
@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (b"not json", "JSON"),
        (b'"a string"', "str"),
        (b"[1]", "list"),
        (b'{"text": "x"}', "no field 'prompt'"),
        (b'{"prompt": 3}', "not a text"),
        (b'{"prompt": null}', "not a text"),
        (b'{"prompt": {"txt": "x"}}', "not a text"),
        (b'{"prompt": ""}', "empty"),
        (b'{"prompt": "  "}', "empty"),
        (b'{"prompt": "a\\u0000b"}', "NUL"),
        (b'{"prompt": "\\ud800"}', "surrogate"),
        (b'{"prompt": "a", "prompt": "b"}', "twice"),
        (b'{"prompt": "a", "note": "\\ud800"}', "'note' is .* leave it out"),
        (b'{"prompt": "\xff"}', "UTF-8"),
        (b"[" * 100_000, "nested more than 64 levels"),
        (b'{"prompt": "a", "n": ' + b"9" * 5000 + b"}", "too many digits"),
    ],
)
def test_a_bad_row_is_named_by_file_line_and_reason(
    tmp_path: Path, place: int, bad: bytes, reason: str
) -> None:
    rows = [b'{"prompt": "fine"}'] * 4
    rows.insert(place, bad)
    path = write(tmp_path, b"\n".join(rows))
    with pytest.raises(DataError, match=rf"prompts\.jsonl:{place + 1}.*{reason}"):
        load(path)


def test_a_line_without_end_is_not_read_into_memory(tmp_path: Path) -> None:
    path = tmp_path / "huge.txt"
    with path.open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(DataError, match=r"huge\.txt: line 1 has more than 16,777,216 bytes"):
        load(path)


@pytest.mark.parametrize("name", ["long.txt", "long.jsonl", "long.parquet"])
def test_a_prompt_that_no_tokenizer_should_take_is_named(tmp_path: Path, name: str) -> None:
    # Of three bytes a character: the bound is one of bytes.
    path, fits, long = (
        tmp_path / name,
        "€" * (MAX_PROMPT_BYTES // 3),
        "€" * (MAX_PROMPT_BYTES // 3 + 1),
    )
    if name.endswith(".parquet"):
        pl.DataFrame({"prompt": ["a", long]}).write_parquet(path)
    elif name.endswith(".jsonl"):
        write(tmp_path, lines({"prompt": "a"}, {"prompt": long}), name)
    else:
        write(tmp_path, f"a\n{long}\n", name)
    place = r"row 2" if name.endswith(".parquet") else "2"
    with pytest.raises(DataError, match=rf"{name}:\s?{place}: the prompt has 1,048,578 bytes"):
        load(path)
    assert len(load(write(tmp_path, f"{fits}\nb\n", "fits.txt")).train) == 1


def test_a_parquet_file_that_decodes_to_gigabytes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.parquet"
    part = pa.table({"prompt": ["x" * 2**19] * 40})
    with pq.ParquetWriter(path, part.schema, compression="zstd", use_dictionary=False) as writer:
        for _ in range(60):
            writer.write_table(part)
    assert path.stat().st_size < 1 << 20
    with pytest.raises(DataError, match=r"bomb\.parquet has .* bytes and decodes to"):
        load(path)


def test_missing_empty_and_strange_sources_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load(tmp_path / "nowhere.jsonl")
    with pytest.raises(DataError, match="0 prompts"):
        load(write(tmp_path, ""))
    with pytest.raises(DataError, match="not a file"):
        load(tmp_path)
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(DataError, match="not a file"):
        load(tmp_path / "pipe.jsonl")
    with pytest.raises(DataError, match="csv"):
        load(write(tmp_path, "a,b", "prompts.csv"))
    with pytest.raises(DataError, match="Parquet"):
        load(write(tmp_path, "no", "prompts.parquet"))


def test_metadata_is_what_a_pool_can_keep(tmp_path: Path) -> None:
    path = tmp_path / "prompts.parquet"
    pl.DataFrame({"prompt": ["a", "b"], "n": [float("nan"), 1.0]}).write_parquet(path)
    prompts = load(path)
    assert {p.metadata["n"] for p in prompts.train + prompts.evaluation} == {None, 1.0}
    for number, value in enumerate(("9" * 400, r'"\ud800"')):
        unfit = write(tmp_path, f'{{"prompt": "a", "n": {value}}}\n', f"{number}.jsonl")
        with pytest.raises(DataError, match=r"jsonl:1: 'n' is .* leave it out"):
            load(unfit)


def test_lists_and_objects_of_a_row_are_kept_and_dates_are_not(tmp_path: Path) -> None:
    path = tmp_path / "prompts.parquet"
    columns = {
        "prompt": ["a", "b"],
        "answers": [["x", "y"], None],
        "truth": [{"style": "rule", "score": float("inf")}] * 2,
        "day": [date(2026, 1, 2)] * 2,
    }
    pl.DataFrame(columns).write_parquet(path)
    prompts = load(path)
    found = {p.text: dict(p.metadata) for p in prompts.train + prompts.evaluation}
    truth = {"style": "rule", "score": None}
    assert found == {
        "a": {"answers": ["x", "y"], "truth": truth},
        "b": {"answers": None, "truth": truth},
    }


def test_fields_that_a_pool_does_not_store_are_refused_at_once(tmp_path: Path) -> None:
    row = {"prompt": "a", "small": "x", "large": ["y" * 1000] * 1100}
    path = write(tmp_path, json.dumps({"prompt": "b"}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(DataError, match=r"jsonl:2: .* the most is 1,048,576.* largest is 'large'"):
        load(path)


def test_answers_of_a_csv_file_stay_as_they_are_written(tmp_path: Path) -> None:
    path = write(tmp_path, "prompt,answer\na,007\nb,1.50\nc,12\nd,0.5\n", "prompts.csv")
    prompts = load(path)
    found = {p.text: p.metadata["answer"] for p in prompts.train + prompts.evaluation}
    assert found == {"a": "007", "b": "1.50", "c": 12, "d": 0.5}
    assert len(load(path, where="answer >= 1.5", num_evaluation=1).train) == 2


def test_prompts_of_a_csv_file(tmp_path: Path) -> None:
    text = (
        "\ufeffprompt,split,toxicity,source\r\n"
        "7,train,0.5,web\r\n"
        '"with ""quotes"",\nand a line",train,0.9,\r\n'
        "c,eval,0.7,book\r\n"
    )
    path = write(tmp_path, text, "prompts.csv")
    prompts = load(path)
    assert texts(prompts.train) == ["7", 'with "quotes",\nand a line']
    assert texts(prompts.evaluation) == ["c"]
    assert dict(prompts.train[0].metadata) == {"toxicity": 0.5, "source": "web"}
    assert texts(load(path, where="toxicity >= 0.6").train) == [prompts.train[1].text]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "the first line does not name the columns"),
        ("prompt,prompt\na,b\n", "names a column twice"),
        ("prompt,x\na\n", "row 1: it has 1 values, and the header has 2 columns"),
        ('prompt\n"a\n', "is not CSV"),
        ("text\na\n", "row 1: no field 'prompt'"),
        ("prompt,x\n,1\n", "row 1: 'prompt' is None, not a text"),
    ],
)
def test_a_bad_csv_file_is_named_with_its_row(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(DataError, match=re.escape(reason)):
        load(write(tmp_path, text, "prompts.csv"))


class Hub(BaseHTTPRequestHandler):
    """The part of the Hub that serves one file of one data set."""

    content = b"prompt,split\na,train\nb,train\nc,eval\n"
    commit = "c" * 40

    def do_HEAD(self) -> None:
        self.answer(with_content=False)

    def do_GET(self) -> None:
        self.answer(with_content=True)

    def answer(self, *, with_content: bool) -> None:
        content = self.content
        if self.path.startswith("/api/datasets/org/data"):
            tree = [{"type": "file", "path": "x/train.csv", "size": 1, "oid": "a"}]
            info = {
                "id": "org/data",
                "sha": self.commit,
                "siblings": [{"rfilename": "x/train.csv"}],
            }
            content = json.dumps(tree if "/tree/" in self.path else info).encode()
        elif self.path != "/datasets/org/data/resolve/main/x/train.csv":
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", '"e"')
        self.send_header("X-Repo-Commit", self.commit)
        self.end_headers()
        if with_content:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


def test_prompts_of_a_data_set_on_the_hub(tmp_path: Path) -> None:
    server = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    code = (
        "import sys\nfrom quark.data.hub_files import hub_file\nfrom quark.errors import DataError\n"
        "for source in sys.argv[1:]:\n"
        "    try:\n        print(hub_file(source).read_text().split()[1])\n"
        "    except DataError as error:\n        print(error)\n"
    )
    sources = [f"hf://datasets/org/data{rest}" for rest in ("/x/train.csv", "/none.csv", "", "//x")]
    done = subprocess.run(
        [sys.executable, "-c", code, *sources],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ
        | {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HOME": str(tmp_path),
            "HF_HUB_OFFLINE": "0",
        },
    )
    assert done.returncode == 0, done.stderr
    server.shutdown()
    server.server_close()
    read, missing, unnamed, wrong = done.stdout.splitlines()
    assert read == "a,train"
    assert missing.startswith("hf://datasets/org/data/none.csv cannot be read from the Hub: ")
    assert unnamed == "hf://datasets/org/data: name a file of it. It has x/train.csv"
    assert "cannot be read" in wrong or "write a file of a data set" in wrong


def test_the_head_of_long_rows_is_kept_and_short_and_blank_rows_are_left_out(
    tmp_path: Path,
) -> None:
    """WikiText: blank rows and headings between paragraphs, of which the first tokens are the prompt."""
    path = write(
        tmp_path,
        lines(*({"text": t} for t in ("", " = Title = ", "abcdefghij" * 2, "x" * 30, " "))),
    )
    prompts = load(path, field="text", min_tokens=12, max_tokens=6, over_long="head")
    assert sorted(texts(prompts.train) + texts(prompts.evaluation)) == ["abcdef", "xxxxxx"]
    assert "1 prompt left out: under 12 tokens" in prompts.notes
    assert "1 prompt cut to the first 6 tokens" in prompts.notes
    with pytest.raises(DataError, match=r"prompts\.jsonl:1: an empty prompt"):
        load(path, field="text")


def test_blank_rows_of_parquet_are_left_out_as_in_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "wiki.parquet"
    pl.DataFrame({"text": ["", "one paragraph", "another one", " = T = "]}).write_parquet(path)
    prompts = load(path, field="text", min_tokens=8)
    assert sorted(texts(prompts.train) + texts(prompts.evaluation)) == [
        "another one",
        "one paragraph",
    ]


def test_writing_prompts_lose_their_tag(tmp_path: Path) -> None:
    content = "[ WP ] You wake up .\n[WP] A king\n[ EU ] Two suns\nNo tag [ WP ]\n"
    prompts = load(write(tmp_path, content, "test.wp_source"))
    found = sorted(texts(prompts.train) + texts(prompts.evaluation))
    assert found == ["A king\n", "No tag [ WP ]\n", "Two suns\n", "You wake up .\n"] or found == [
        "A king",
        "No tag [ WP ]",
        "Two suns",
        "You wake up .",
    ]


def test_the_published_fields_of_realtoxicityprompts_and_dexperts(tmp_path: Path) -> None:
    rows = (
        {
            "filename": "a.txt",
            "begin": 0,
            "challenging": False,
            "prompt": {"text": "Kind words", "toxicity": 0.1},
            "continuation": {"text": " follow", "toxicity": None},
        },
        {"prompt": {"text": "Rude words", "toxicity": 0.9}, "continuation": {"text": " too"}},
        {"prompt": {"text": "Ruder words", "toxicity": 0.95}, "continuation": {"text": " too"}},
    )
    path = write(tmp_path, lines(*rows))
    prompts = load(path, where="prompt.toxicity >= 0.5")
    assert sorted(texts(prompts.train) + texts(prompts.evaluation)) == ["Rude words", "Ruder words"]
    neutral = ({"prompt": {"text": t}, "num_positive": n} for t, n in (("a b", 12), ("c d", 13)))
    prompts = load(
        write(tmp_path, lines(*neutral), "neutral_prompts.jsonl"), where="num_positive >= 12"
    )
    assert len(prompts.train) == len(prompts.evaluation) == 1


def test_a_file_of_the_hub_is_taken_from_its_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    dataset = tmp_path / "datasets--some--prompts"
    commit = "0" * 40
    (dataset / "refs").mkdir(parents=True)
    (dataset / "refs" / "main").write_text(commit)
    folder = dataset / "snapshots" / commit / "data"
    folder.mkdir(parents=True)
    write(folder, lines({"prompt": "a"}, {"prompt": "b"}))
    prompts = load("hf://datasets/some/prompts/data/prompts.jsonl")
    assert sorted(texts(prompts.train) + texts(prompts.evaluation)) == ["a", "b"]
    with pytest.raises(DataError, match=r"hf://datasets/some/prompts/other\.jsonl cannot be read"):
        load("hf://datasets/some/prompts/other.jsonl")
    with pytest.raises(DataError, match="write a file of a data set on the Hub"):
        load("hf://prompts.jsonl")
    with pytest.raises(DataError, match="write a file of a data set on the Hub"):
        load("hf://datasets/some/prompts/../../../../prompts.jsonl")
