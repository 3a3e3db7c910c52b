"""One training step against the published code's, plain fine-tuning and the floor: `python benches/bench_step.py`.

Steps (see `training_step.py`), all with the published code's terms on the same random batch:

- `ours`: what `quark train` does with a batch; `paper` is the same with the paper's terms, `cached` with the
  reference's hidden states kept (`reference.cache`), `recomputed` with gradient checkpointing;
- `published`: the published code's arithmetic, in the precision asked for (theirs was float32);
- `fine_tuning`: forward and backward of the policy alone with the library's loss: no reference, no divergence.

The floor is the matrix products that nobody can leave out (p0 forward, the policy forward and backward, both
heads on the completion tokens alone) over the rate of such products, measured in the same process.

On a CPU, time is the processor time of one thread, so that a busy machine changes it little; on CUDA it is the clock,
synchronized. Peak memory is what a step takes beyond the weights (gradients included), in a process of its own.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from training_step import SHAPES, STEPS, Shape, Workload, make_workload
from transformers.pytorch_utils import Conv1D

from quark.config.schema import OptimizerSection
from quark.training.loop.optimization import make_optimizer

DTYPES = {"float32": None, "bfloat16": torch.bfloat16}
PEAK_TFLOPS = {
    "H200": {"bfloat16": 989.0, "float32": 67.0},
    "H100": {"bfloat16": 989.0, "float32": 67.0},
    "A100": {"bfloat16": 312.0, "float32": 19.5},
}
"""Dense matrix products, as the manufacturer gives them."""


def workload(case: dict[str, Any], step: str) -> Workload:
    """The models and the batch that ``step`` runs on."""
    shape = SHAPES[case["shape"]]
    if case.get("vocabulary"):
        shape = shape.with_vocabulary(case["vocabulary"])
    device = torch.device(case["device"])
    return make_workload(
        shape,
        step=step,
        size=case["batch"],
        prompt=case["prompt"],
        completion=case["completion"],
        device=device,
        autocast=DTYPES[case["precision"]],
    )


def clock(device: torch.device) -> float:
    """Processor seconds of this process, or seconds once the device is done."""
    if device.type != "cpu":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def seconds(work: Callable[[], object], device: torch.device) -> float:
    begin = clock(device)
    work()
    return clock(device) - begin


def measure_time(case: dict[str, Any], steps: list[str], repetitions: int) -> dict[str, Any]:
    """Best time of each step, the steps taking turns; of the optimizer; and the rate of products."""
    device = torch.device(case["device"])
    if device.type == "cpu":
        torch.set_num_threads(1)
    loads = {step: workload(case, step) for step in steps}
    times: dict[str, list[float]] = {step: [] for step in steps}
    for _ in range(repetitions):
        for step, load in loads.items():
            load.clear()
            elapsed = seconds(load.run, device)
            load.clear()
            times[step].append(elapsed)
    any_load = loads[steps[0]]
    rate = product_rate(any_load, case, device)
    optimizer = make_optimizer(any_load.policy.model, OptimizerSection())
    any_load.run()
    optimizer.step()  # makes its moments
    update = min(seconds(optimizer.step, device) for _ in range(3))
    floor = floor_flops(any_load)
    return {
        "seconds": {step: min(found) for step, found in times.items()},
        "optimizer": update,
        "floor": floor / rate,
        "flops": floor,
        "rate": rate,
    }


def product_rate(load: Workload, case: dict[str, Any], device: torch.device) -> float:
    """FLOP/s of the policy's widest product within a layer, in the dtype of the case."""
    shape = SHAPES[case["shape"]]
    rows = load.batch.policy_inputs().input_ids.numel()
    dtype = DTYPES[case["precision"]] or torch.float32
    inner = shape.inner or 4 * shape.width
    left = torch.randn(rows, shape.width, device=device).to(dtype)
    right = torch.randn(shape.width, inner, device=device).to(dtype)
    flops = 2 * rows * shape.width * inner
    count = max(1, int(2e10 / flops))

    def products() -> None:
        for _ in range(count):
            left @ right

    return count * flops / min(seconds(products, device) for _ in range(5))


def floor_flops(load: Workload) -> float:
    """Of the products without which there is no step; attention's are left out."""
    model = load.policy.model
    head = model.get_output_embeddings().weight.numel()
    body = sum(m.weight.numel() for m in model.modules() if type(m) in (nn.Linear, Conv1D)) - head
    policy, reference = (
        inputs.input_ids.numel()
        for inputs in (load.batch.policy_inputs(), load.batch.reference_inputs())
    )
    return 2.0 * body * (3 * policy + reference) + 2.0 * head * 4 * load.batch.num_tokens


def measure_memory(case: dict[str, Any], step: str) -> dict[str, Any]:
    """Bytes that one step takes beyond the weights, at its peak."""
    device = torch.device(case["device"])
    # The libraries' own buffers and threads come first, on a batch of one.
    small = workload(case | {"batch": 1, "completion": 2}, step)
    load = workload(case, step)
    small.policy, small.reference = load.policy, load.reference
    small.run()
    load.clear()
    del small
    gc.collect()
    if device.type != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        load.run()
        return {"bytes": torch.cuda.max_memory_allocated(device) - before}
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    before = status_bytes("VmRSS")
    load.run()
    return {"bytes": status_bytes("VmHWM") - before}


def status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return 1024 * int(line.split()[1])
    raise KeyError(key)


def available_bytes() -> int:
    """Memory that another process could take."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    raise KeyError("MemAvailable")


def in_child(task: dict[str, Any]) -> dict[str, Any]:
    """What a fresh process measures; an ``error`` where it could not."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).resolve()), "--child", json.dumps(task)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["killed"])[-1]
        return {"error": f"exit {done.returncode}: {last[:200]}"}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def published_bytes(shape: Shape, batch: int, prompt: int, completion: int) -> float:
    """About what the published step takes, so that a machine without it is spared: float32 logits of both
    models, nine tensors over the completions, and hidden states."""
    logits = 4.0 * batch * shape.vocabulary
    hidden = 100.0 * 1024 * shape.width / 768 * shape.layers * batch * (prompt + completion)
    return logits * (2 * (prompt + completion + 1) + 10 * completion) + hidden


def report(
    case: dict[str, Any], timing: dict[str, Any], memory: dict[str, Any], peak: float
) -> None:
    name = f"{case['shape']}, {case['precision']}, B = {case['batch']}, {case['prompt']} + {case['completion']} tokens"
    print(f"\n{name}")
    if "error" in timing:
        print(f"  time not measured: {timing['error']}")
    else:
        found = timing["seconds"]
        ours = found["ours"]
        for step, value in found.items():
            print(f"  {step:12} {value:9.3f} s   ours / it {ours / value:5.2f}")
        print(f"  {'optimizer':12} {timing['optimizer']:9.3f} s")
        print(
            f"  {'floor':12} {timing['floor']:9.3f} s   reached {timing['floor'] / ours:.0%}"
            f"   (products at {timing['rate'] / 1e9:,.0f} GFLOP/s)"
        )
        if peak:
            print(
                f"  of the peak of {peak:,.0f} TFLOP/s: {timing['flops'] / ours / peak / 1e12:.0%}"
            )
    taken = {step: result["bytes"] for step, result in memory.items() if "bytes" in result}
    for step, result in memory.items():
        if "error" in result:
            print(f"  {step:12} memory not measured: {result['error']}")
        else:
            ratio = (
                f"   ours / it {taken['ours'] / result['bytes']:5.2f}" if "ours" in taken else ""
            )
            print(f"  {step:12} {result['bytes'] / 2**20:9,.0f} MiB beyond the weights{ratio}")
    sys.stdout.flush()


def main() -> int:
    """Measure the cases asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--shape", nargs="+", choices=SHAPES, default=["gpt2-small", "smollm2-135m"]
    )
    parser.add_argument("--completion", nargs="+", type=int, default=[20, 128])
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--precision", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--no-time", action="store_true")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument(
        "--peak-tflops", type=float, help="of the device in this precision (default: known devices)"
    )
    parser.add_argument("--output", type=Path, help="JSON lines are appended to this file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        task = json.loads(arguments.child)
        if task["what"] == "time":
            result = measure_time(task["case"], task["steps"], task["repetitions"])
        else:
            result = measure_memory(task["case"], task["step"])
        print(json.dumps(result))
        return 0
    device = torch.device(arguments.device)
    model = platform.machine() if device.type == "cpu" else torch.cuda.get_device_name(device)
    print(
        f"{datetime.now():%Y-%m-%d %H:%M}, {model}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}; reference: live"
    )
    for shape in arguments.shape:
        for completion in arguments.completion:
            for precision in arguments.precision:
                case = {
                    "shape": shape,
                    "completion": completion,
                    "precision": precision,
                    "prompt": arguments.prompt,
                    "batch": arguments.batch,
                    "device": arguments.device,
                }
                timing: dict[str, Any] = {"error": "not asked for"}
                needed = published_bytes(
                    SHAPES[shape], arguments.batch, arguments.prompt, completion
                )
                steps = list(arguments.steps)
                left_out = device.type == "cpu" and needed > available_bytes()
                if left_out and "published" in steps:
                    steps.remove("published")
                    print(f"\npublished: left out, it needs about {needed / 2**30:.0f} GiB")
                if not arguments.no_time:
                    timing = in_child(
                        {
                            "what": "time",
                            "case": case,
                            "steps": steps,
                            "repetitions": arguments.repetitions,
                        }
                    )
                memory: dict[str, Any] = {}
                if not arguments.no_memory:
                    memory = {
                        step: in_child({"what": "memory", "case": case, "step": step})
                        for step in steps
                    }
                peak = arguments.peak_tflops or next(
                    (table[precision] for key, table in PEAK_TFLOPS.items() if key in model), 0.0
                )
                report(case, timing, memory, peak)
                if arguments.output:
                    with arguments.output.open("a", encoding="utf-8") as file:
                        file.write(
                            json.dumps({"case": case, "time": timing, "memory": memory}) + "\n"
                        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
