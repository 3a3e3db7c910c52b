"""What `benches/` compares: every peer that is installed gives the samples that it was given."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benches"))

from pool.data import COMPLETION_WIDTH, PROMPT_WIDTH, Workload
from pool.peer import labels_by_argsort
from pool.peers import MODULES, load
from pool.targets import TARGETS, Results

ROUND_SIZE = 250


@pytest.mark.parametrize("name", [name for name in MODULES if name != "numpy-madvise"])
def test_a_peer_returns_its_samples_under_their_labels(name: str, tmp_path: Path) -> None:
    try:
        cls = load(name)
    except ImportError as error:
        pytest.skip(f"{name}: {error}")
    workload = Workload(2 * ROUND_SIZE)
    rounds = [workload.rows(number, ROUND_SIZE) for number in range(2)]
    rows = [row.tobytes() for part in rounds for row in part.matrix()]
    labels = labels_by_argsort(np.concatenate([part.rewards for part in rounds]))
    known = dict(zip(rows, labels.tolist(), strict=True))

    peer = cls.create(tmp_path / name, workload, 2 * ROUND_SIZE)
    for part in rounds:
        peer.append(peer.encode(part))
    for work in (*peer.quantizers().values(), *peer.labellers().values()):
        work()
    peer.prepare()
    if cls.is_durable:
        peer.close()
        peer = cls.open(tmp_path / name, workload)
    found = peer.batches(32)(1)
    if name == "quark":
        prompts, completions, drawn = found.prompt_tokens, found.completion_tokens, found.quantiles
        prompts = np.pad(prompts, ((0, 0), (PROMPT_WIDTH - prompts.shape[1], 0)))
        completions = np.pad(completions, ((0, 0), (0, COMPLETION_WIDTH - completions.shape[1])))
    else:
        prompts, completions, drawn = (np.asarray(part) for part in found)
    if name == "lists":
        drawn = 4 - drawn  # the published code counts from the best
    given = np.concatenate([prompts, completions], axis=1).astype(np.uint16)
    assert [known[row.tobytes()] for row in given] == drawn.tolist()
    assert prompts.dtype == completions.dtype == np.int64
    peer.close()


def test_a_target_is_judged_by_medians() -> None:
    times = {"append 25,000": {"quark": [1.0, 2.0, 9.0], "numpy": [2.8, 1.0, 4.0]}}
    results = Results({100_000: times}, {})
    target = next(t for t in TARGETS if t.what == "append 25,000: numpy / quark")
    value = target.figure(results, 100_000)
    assert value == pytest.approx(1.4)
    assert target.is_met(1.3)
    assert not target.is_met(1.2)
    assert target.figure(results, 1_000_000) is None
