"""One process of a run of several: the real command line, with a mishap at a chosen optimizer step.

    python -m tests.training.trainer_process '{"arguments": [...], "mishap": "raise", "rank": 1, "step": 5}'

Prints nothing of its own; a run that ends well leaves the hash of this process's weights in ``weights``, and in
``held`` the bytes of tensors that it held between the steps of its last round.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, distributed

from quark.cli.app import run
from quark.pool.base import PoolBatch
from quark.training.events import TrainingResult
from quark.training.loop.learner import Learner, Step
from quark.training.loop.trainer import Trainer
from quark.training.position import Position
from quark.training.processes.shards import full_tensor, local_shard


def arrange(plan: dict[str, Any]) -> None:
    """Let this process's learner meet the mishap, and its trainer tell its weights."""
    step, run_loop = Learner.step, Trainer.run
    is_struck = plan.get("rank") == int(os.environ["RANK"])

    def stepping(self: Learner, samples: PoolBatch, position: Position) -> Step:
        if is_struck and position.step == plan["step"]:
            befall(self, plan["mishap"])
        taken = step(self, samples, position)
        Path(plan["held"]).with_suffix(f".{os.environ['RANK']}").write_text(str(bytes_held()))
        return taken

    def running(self: Trainer) -> TrainingResult:
        result = run_loop(self)
        digest = hashlib.sha256()
        for parameter in self._learning.policy.model.parameters():
            everything = full_tensor(parameter.detach()).contiguous()
            digest.update(everything.view(-1).view(torch.uint8).numpy().tobytes())
        path = Path(plan["weights"]).with_suffix(f".{os.environ['RANK']}")
        path.write_text(digest.hexdigest())
        return result

    Learner.step = stepping  # type: ignore[method-assign]
    Trainer.run = running  # type: ignore[method-assign]


def bytes_held() -> int:
    """Of all tensors that are alive in this process."""
    tensors = [local_shard(one) for one in gc.get_objects() if issubclass(type(one), Tensor)]
    storages = [one.untyped_storage() for one in tensors if one.device.type == "cpu"]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def befall(learner: Learner, mishap: str) -> None:
    match mishap:
        case "raise":
            raise ValueError("a defect in this process alone")
        case "die":
            os._exit(9)
        case "signal":
            os.kill(os.getpid(), signal.SIGTERM)
        case "flip":
            with torch.no_grad():
                local_shard(next(iter(learner._policy.model.parameters()))).view(-1)[0] += 1e-3
        case "out of memory":
            backward = learner._backward

            def hungry(part: Any, *sizes: int) -> Any:
                if part.num_sequences > 1:
                    torch.empty(1 << 60)
                return backward(part, *sizes)

            learner._backward = hungry  # type: ignore[method-assign]


def main(plan: dict[str, Any]) -> NoReturn:
    """Run the command of ``plan`` with its mishap, and end as the command does."""
    arrange(plan)
    code = run(plan["arguments"])
    # Their threads could abort the process while it ends.
    assert not distributed.is_initialized(), "the connections to the others outlive the run"
    sys.exit(code)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
