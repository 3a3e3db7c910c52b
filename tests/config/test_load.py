from __future__ import annotations

import tomllib
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from quark.config.load import json_schema, load_config, preset_names, to_toml
from quark.config.schema import RunConfig
from quark.errors import ConfigError


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "my.toml"
    path.write_text(text)
    return path


def test_later_sources_win_and_every_value_says_where_it_is_from(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        'preset = "demo"\n[optimizer]\nlearning_rate = 2e-3\nbatch_size = 65\n',
    )
    loaded = load_config(path, ["optimizer.batch_size=13"])
    assert loaded.config.optimizer.batch_size == 13
    assert loaded.config.optimizer.learning_rate == 2e-3
    assert (
        loaded.config.sampling.max_new_tokens == load_config("demo").config.sampling.max_new_tokens
    )
    assert loaded.origins["optimizer.batch_size"] == "--set"
    assert loaded.origins["optimizer.learning_rate"] == f"file {path}"
    assert loaded.origins["sampling.max_new_tokens"] == "preset demo"
    assert loaded.origins["optimizer.weight_decay"] == "default"
    assert loaded.name == "my"


@pytest.mark.parametrize("name", preset_names())
@pytest.mark.parametrize("comments", [False, True])
def test_presets_load_and_round_trip(tmp_path: Path, name: str, comments: bool) -> None:
    config = load_config(name).config
    path = write(tmp_path, to_toml(config, comments=comments))
    assert load_config(path).config == config


def test_the_defaults_round_trip_and_every_key_has_its_comment(tmp_path: Path) -> None:
    config = load_config(None).config
    text = to_toml(config, comments=True)
    assert load_config(write(tmp_path, text)).config == config
    keys = [line for line in text.splitlines() if " =" in line]
    comments = [line for line in text.splitlines() if line.startswith("# ")]
    assert len(comments) >= len(keys)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "[optimizer]\nlearning_rat = 1e-3\n",
            ["optimizer.learning_rat", "did you mean optimizer.learning_rate", "my.toml, line 2"],
        ),
        (
            "\n\n[optimiser]\nlearning_rate = 1e-3\n",
            ["optimiser", "did you mean optimizer", "my.toml, line 3"],
        ),
        ("kl_coef = 0.1\n", ["kl_coef", "did you mean objective.kl_coef", "my.toml, line 1"]),
        (
            "[objective]\nreduction = 'sum'\n",
            ["objective.reduction", "'sum'", "my.toml, line 2", "sequence_sum"],
        ),
        ("[run]\nnum_rounds = 0\n", ["run.num_rounds", "0", "must be at least 1"]),
        ("[reward]\nname = 'sentimnt'\n", ["reward.name", "did you mean 'sentiment'"]),
        ("[reward.regex]\npattern = '('\n", ["reward.regex.pattern", "not a regular expression"]),
        ("[run\n", ["my.toml", "line 1"]),
        ("preset = 'dmeo'\n", ["dmeo", "did you mean demo"]),
        (
            "[optimizer]\nbatch_size = 8\nmicro_batch_size = 9\n",
            ["optimizer.micro_batch_size (9)", "optimizer.batch_size (8)"],
        ),
    ],
)
def test_a_wrong_file_names_key_value_place_and_way_out(
    tmp_path: Path, text: str, words: list[str]
) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(write(tmp_path, text))
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    "override",
    [
        "optimizer.learning_rate=inf",
        "sampling.temperature=inf",
        "objective.kl_target=nan",
        "optimizer.betas=[0.9, 1.0]",
        "optimizer.batch_size=4294967296",
        "pool.num_quantiles=32768",
        "pool.extra_scores=['reward']",
        "evaluation.judges=['sentimnt']",
    ],
)
def test_a_number_or_name_that_would_end_a_run_later_is_refused(override: str) -> None:
    with pytest.raises(ConfigError, match=override.partition("=")[0]):
        load_config(None, [override])


@pytest.mark.parametrize(
    "text",
    [
        "a = " + "[" * 5000,
        "a" + ".a" * 5000 + " = 1",
        "[run" + ".a" * 3000 + "]",
        f"a = {'9' * 5000}",
    ],
    ids=["lists", "keys", "tables", "digits"],
)
def test_what_python_itself_cannot_take_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"not valid TOML|nested too deeply"):
        load_config(write(tmp_path, text))


def test_all_mistakes_are_named_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, "[run]\nseeds = 1\n[pool]\nquantiles = 4\n")
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert "run.seeds" in str(error.value)
    assert "pool.quantiles" in str(error.value)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.name=embedded:reviews", "embedded:reviews"),
        ('model.name="a b"', "a b"),
        ("model.name = ./models/x", "./models/x"),
        ("model.name=none-such", "none-such"),
    ],
)
def test_set_takes_toml_values_and_bare_strings(override: str, expected: str) -> None:
    assert load_config(None, [override]).config.model.name == expected


def test_set_understands_numbers_lists_booleans_and_none() -> None:
    config = load_config(
        "demo",
        [
            "optimizer.learning_rate=1e-4",
            'evaluation.judges=["vader", "diversity"]',
            "pool.store_text=false",
            "prompts.limit=none",
        ],
    ).config
    assert config.optimizer.learning_rate == 1e-4
    assert config.evaluation.judges == ("vader", "diversity")
    assert config.pool.store_text is False
    assert config.prompts.limit is None


@pytest.mark.parametrize("override", ["optimizer", "=3", "a..b=3", "optimizer.lr=1e-3", "run=3"])
def test_a_wrong_set_is_refused(override: str) -> None:
    with pytest.raises(ConfigError):
        load_config("demo", [override])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("pool.age_half_life=2", "pool.sampling=shuffle"), 'needs pool.sampling = "stratified"'),
        (("pool.max_uses=2", "pool.sampling=iid"), "cannot be kept"),
        (("pool.min_score=nan",), "pool.min_score"),
    ],
)
def test_rules_of_drawing_that_contradict_each_other_are_refused(
    overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config("demo-paper", overrides)


def test_a_wrong_key_in_set_says_that_it_was_there() -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.lr \(--set\)"):
        load_config("demo", ["optimizer.lr=1e-3"])


def test_an_unknown_source_names_the_nearest_preset() -> None:
    with pytest.raises(ConfigError, match="did you mean demo"):
        load_config("dem")
    with pytest.raises(ConfigError, match=r"no configuration file nowhere\.toml"):
        load_config("nowhere.toml")


def test_a_byte_order_mark_and_windows_line_ends_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "windows.toml"
    path.write_bytes(b"\xef\xbb\xbf[run]\r\nseed = 5\r\n")
    assert load_config(path).config.run.seed == 5


def test_what_can_be_unset_is_unset_by_default() -> None:
    """TOML has no null: a value that could be unset only by saying so would not survive a round trip."""

    def check(section: type[BaseModel]) -> None:
        for key, field in section.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                check(field.annotation)
            elif type(None) in get_args(field.annotation):
                assert field.default is None, key

    check(RunConfig)


def test_the_schema_knows_every_section_and_the_presets() -> None:
    schema = json_schema()
    properties = schema["properties"]
    assert isinstance(properties, dict)
    assert {"run", "model", "pool", "objective", "preset"} <= properties.keys()
    assert "learning_rate" in str(schema)
    assert "Peak learning rate" in str(schema)


def test_the_official_preset_has_the_published_quirks() -> None:
    config = load_config("official-code").config
    assert config.objective.kl_direction == "kl_policy_to_reference"
    assert config.objective.entropy_coef == 0.06
    assert config.objective.reduction == "token_mean"
    assert config.objective.lm_softmax == "enlarged"
    assert config.pool.sampling == "shuffle"
    assert config.pool.remainder == "lowest"
    assert config.pool.ties == "older_first"
    assert (config.sampling.top_k, config.sampling.min_new_tokens) == (50, 3)
    assert (config.optimizer.warmup_steps, config.optimizer.schedule) == (500, "linear")
    assert config.optimizer.eps == 1e-5
    assert config.optimizer.max_grad_norm == 0.0


def test_the_paper_preset_is_equation_one() -> None:
    config = load_config("paper").config
    assert config.objective.kl_direction == "kl_reference_to_policy"
    assert config.objective.entropy_coef == 0.0
    assert config.objective.reduction == "sequence_sum"
    assert config.sampling.top_k == 0
    assert config.pool.num_quantiles == 5


@given(text=st.text(max_size=60))
def test_any_text_as_a_value_round_trips(text: str) -> None:
    config = load_config(None).config
    changed = config.model_copy(update={"model": config.model.model_copy(update={"name": text})})
    assert tomllib.loads(to_toml(changed, comments=False))["model"]["name"] == text


@pytest.mark.parametrize("override", ["reward.on_error=nan", 'reward.on_error="nan"'])
def test_nan_is_a_word_where_a_word_is_wanted(override: str) -> None:
    assert load_config(None, [override]).config.reward.on_error == "nan"
