"""``quark doctor --model``."""

from __future__ import annotations

from scripts.model_families import small_model
from tests.cli.commands import quark
from tests.tiny import save_tiny


def test_the_doctor_tries_a_model(tmp_path):
    folder = save_tiny(tmp_path / "m", small_model("rwkv"))
    outcome = quark("doctor", "--model", folder, "--json")
    assert outcome.code == 0, outcome.err
    found = {f["name"]: f for f in outcome.json["findings"] if f["group"] == "model"}
    assert found["padding"]["state"] == "slower"
    assert "nats with padding on the left" in found["padding"]["detail"]
    assert found["steering"]["state"] == "ok"


def test_the_doctor_names_the_model_that_is_not_there(tmp_path):
    outcome = quark("doctor", "--model", tmp_path / "nowhere")
    assert outcome.code != 0
    assert "nowhere" in outcome.err
