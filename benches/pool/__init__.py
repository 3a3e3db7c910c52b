"""The pool's benchmark suite: `python benches/bench_pool.py`."""
