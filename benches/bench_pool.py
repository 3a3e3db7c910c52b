"""The sample pool against what a user could take instead: `python benches/bench_pool.py` or `make bench`.

In one run, at each pool size: a durable append of 25,000 samples, the ranking after it, all labels,
stratified minibatches, opening (warm and evicted from the page cache), bytes on disk, memory; for quark and
every peer that is installed (`pip install '.[bench]'` in a checkout brings them), interleaved; with the machine's
limits beside. Then each target with what was measured. Above 20 million samples tokens are left at one each,
and the peers are those that do the work on rewards well. Absolute times depend on the machine and its
neighbours; the ratios hold.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from pool import fresh, report
from pool.data import FULL_SIZE, ROUND
from pool.limits import Limits
from pool.peers import MODULES, load
from pool.targets import Results
from pool.tasks import FRESH_ONLY, Times, measure, say

REWARD_PEERS = ("quark", "numpy", "polars", "duckdb")


def main() -> int:
    """Measure, print, write."""
    arguments = parsed()
    if arguments.draw:
        results = report.read_json(arguments.draw)
        report.print_growth(results)
        arguments.out.mkdir(parents=True, exist_ok=True)
        report.draw(arguments.out / "pool.svg", results)
        print(f"\nWritten: {arguments.out / 'pool.svg'}")
        return 0
    asked = arguments.peers or list(MODULES)
    installed = ["quark", *available([name for name in asked if name != "quark"])]
    repetitions = 3 if arguments.quick else arguments.repetitions
    sizes = [100_000] if arguments.quick else arguments.sizes
    by_size: dict[int, Times] = {}
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.scratch, prefix="bench-pool-") as temporary:
        folder = Path(temporary)
        say("limits of the machine")
        limits = Limits(folder, is_quick=arguments.quick)
        results = Results(by_size, limits.rates())
        report.print_limits(results.limits)
        for size in sizes:
            names = at_size(installed, size, was_asked=arguments.peers is not None)
            by_size[size] = measure(
                size, names, folder / str(size), limits, repetitions=repetitions
            )
            # At once: the next size may take long, or more disk than there is.
            report.print_size(results, size)
            report.write_json(arguments.out / "pool.json", results)
    report.print_targets(results)
    report.draw(arguments.out / "pool.svg", results)
    print(f"\nWritten: {arguments.out / 'pool.json'}, {arguments.out / 'pool.svg'}")
    return 0


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])

    def list_of_sizes(text: str) -> list[int]:
        sizes = [int(float(part)) for part in text.split(",")]
        if min(sizes) < ROUND or any(size % ROUND for size in sizes):
            raise argparse.ArgumentTypeError(f"sizes are multiples of {ROUND:,}")
        return sizes

    def list_of_peers(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in MODULES:
                raise argparse.ArgumentTypeError(
                    f"no peer {name!r}: there are {', '.join(MODULES)}"
                )
        return names

    parser.add_argument(
        "--sizes",
        type=list_of_sizes,
        default=[100_000, 1_000_000, 10_000_000],
        help="samples in the pool, as 1e5,1e6,1e7; 1e8 takes 25 GB of disk",
    )
    parser.add_argument(
        "--peers", type=list_of_peers, help=f"some of {','.join(MODULES)} (default: all)"
    )
    parser.add_argument("--repetitions", type=int, default=5, help="the median counts (default: 5)")
    parser.add_argument(
        "--quick", action="store_true", help="one size, three repetitions: to see that it runs"
    )
    parser.add_argument(
        "--draw",
        type=Path,
        nargs="+",
        metavar="JSON",
        help="measure nothing; draw what several runs measured as one, and print how quark's costs grow",
    )
    parser.add_argument(
        "--scratch", type=Path, default=Path(), help="where the pools are made and removed again"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/bench"), help="where pool.json and pool.svg go"
    )
    return parser.parse_args()


def available(names: list[str]) -> list[str]:
    """Those whose library loads; says what the others need."""
    found = []
    for name in names:
        try:
            load(name)
        except ImportError as error:
            print(f"skipped: {name} ({error}); pip install '.[bench]'")
        else:
            found.append(name)
    return found


def at_size(names: list[str], size: int, *, was_asked: bool) -> list[str]:
    """Those that are measured at a size."""
    if size > FULL_SIZE:
        chosen = [name for name in names if name in REWARD_PEERS]
    else:
        chosen = [name for name in names if was_asked or size <= load(name).largest]
    for name in names:
        if name not in chosen:
            print(f"left out at {size:,}: {name} (too slow or too large there)")
    return [name for name in chosen if FRESH_ONLY.get(name, name) in chosen]


if __name__ == "__main__":
    sys.exit(fresh.main(sys.argv[2:]) if sys.argv[1:2] == ["fresh"] else main())
