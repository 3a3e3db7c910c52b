"""What is to be run on a GPU, in one go: `python benches/gpu_suite.py`.

First the numbers must be right: the chunked loss and its gradient against the naive ones on the device, in float32 and
under bfloat16. Only then speed and memory: `bench_step.py` on GPT-2-large and on a Llama of 1.5 billion random weights,
and `bench_memory.py`. Ends with 1 where a check fails.

`--device cpu --shape tiny` runs all of it anywhere.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quark.models.causal import CompletionRows
from quark.models.logprobs import LossWeights, weighted_loss

HERE = Path(__file__).resolve().parent
TERMS = {
    "paper": (
        LossWeights(lm=1e-3, kl_reference_to_policy=5e-5, kl_policy_to_reference=0.0, entropy=0.0),
        False,
    ),
    "published code": (
        LossWeights(lm=1e-3, kl_reference_to_policy=0.0, kl_policy_to_reference=5e-5, entropy=6e-5),
        True,
    ),
}
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
"""On differences relative to the size of what is compared, by the dtype that products run in."""


@dataclass(frozen=True)
class Outcome:
    """A loss and its gradients."""

    loss: Tensor
    rows: Tensor
    weight: Tensor

    def distance(self, other: Outcome) -> float:
        """The largest of the three differences, each relative to the other's norm."""
        pairs = ((self.loss, other.loss), (self.rows, other.rows), (self.weight, other.weight))
        return max(float((a.float() - b).norm() / b.norm()) for a, b in pairs)


def check(
    device: torch.device, dtype: torch.dtype, *, vocabulary: int, rows: int, width: int
) -> bool:
    """Compare chunked and naive losses; the naive one in float32, its products not rounded to TF32."""
    torch.manual_seed(0)
    extra = 5
    policy = nn.Linear(width, vocabulary + extra, bias=False, device=device)
    reference = nn.Linear(width, vocabulary, bias=False, device=device)
    hidden = torch.randn(rows, width, device=device, requires_grad=True)
    reference_hidden = torch.randn(rows, width, device=device)
    targets = torch.randint(0, vocabulary, (rows,), device=device)
    is_right = True
    for name, (weights, all_columns) in TERMS.items():
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            loss, _ = weighted_loss(
                CompletionRows(rows=hidden, head=policy, parameters=tuple(policy.parameters())),
                CompletionRows(rows=reference_hidden, head=reference, parameters=()),
                targets,
                weights,
                base_vocab_size=vocabulary,
                lm_uses_all_columns=all_columns,
                chunk_elements=vocabulary * max(1, rows // 3),
            )
        ours = Outcome(loss.detach(), *torch.autograd.grad(loss, [hidden, policy.weight]))
        expected = naive(
            policy(hidden), reference(reference_hidden), targets, weights, vocabulary, all_columns
        )
        theirs = Outcome(expected.detach(), *torch.autograd.grad(expected, [hidden, policy.weight]))
        distance = ours.distance(theirs)
        is_near = distance <= BOUNDS[dtype]
        is_right &= is_near
        print(
            f"{'right' if is_near else 'WRONG'}: {name}'s terms, {dtype}, V = {vocabulary:,}: "
            f"relative difference {distance:.1e} (at most {BOUNDS[dtype]:.0e})",
            flush=True,
        )
    return is_right


def naive(
    logits: Tensor,
    reference_logits: Tensor,
    targets: Tensor,
    weights: LossWeights,
    vocabulary: int,
    all_columns: bool,
) -> Tensor:
    log_p = F.log_softmax(logits[:, :vocabulary], dim=-1)
    log_q = F.log_softmax(reference_logits.detach(), dim=-1)
    log_lm = F.log_softmax(logits, dim=-1) if all_columns else log_p
    return (
        -weights.lm * log_lm.gather(1, targets.unsqueeze(1)).sum()
        + weights.kl_reference_to_policy * (log_q.exp() * (log_q - log_p)).sum()
        + weights.kl_policy_to_reference * (log_p.exp() * (log_p - log_q)).sum()
        + weights.entropy * (log_p.exp() * log_p).sum()
    )


def main() -> int:
    """Check, then measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", nargs="+", default=["gpt2-large", "llama-1.5b"])
    parser.add_argument("--peak-tflops", type=float)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here: try --device cpu --shape tiny")
        return 1
    is_tiny = arguments.shape == ["tiny"]
    sizes = {"vocabulary": 500, "rows": 64, "width": 32}
    if not is_tiny:
        sizes = {"vocabulary": 50_257, "rows": 640, "width": 1280}
    print("# Correctness", flush=True)
    checks = [check(device, dtype, **sizes) for dtype in BOUNDS]
    if not all(checks):
        return 1
    common = ["--device", arguments.device]
    batch = ["--batch", "4", "--steps", "ours", "--precision", "bfloat16"] if is_tiny else []
    peak = ["--peak-tflops", str(arguments.peak_tflops)] if arguments.peak_tflops else []
    lengths = ["8"] if is_tiny else ["20", "128"]
    runs = [
        [
            "bench_step.py",
            *common,
            "--shape",
            *arguments.shape,
            "--completion",
            *lengths,
            *batch,
            *peak,
        ],
        [
            "bench_memory.py",
            *common,
            *(["--shape", "tiny", "--lengths", "8", "--vocabularies", "500"] if is_tiny else []),
        ],
    ]
    for script, *options in runs:
        print(f"\n# {script}", flush=True)
        done = subprocess.run([sys.executable, str(HERE / script), *options], check=False)
        if done.returncode != 0:
            return done.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
