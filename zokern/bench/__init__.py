"""Benchmarks: kernels and whole steps against their peers, timed in one run. `zokern bench` and benchmarks/ run them.

cases.py      the kernel benchmarks as data          workload.py   their tensors and the calls that are timed
kernels.py    runs them, case by case                limits.py     bytes, operations, and the model of a GPU
peers.py      the passes in plain torch, from equations.py          shapes.py     tensors like an OPT model's
timing.py     candidates in turn, round after round; medians and spread
record.py     the machine's description; one JSON file per run
plots.py      pictures from the JSON, with plots_kernels.py and canvas.py; tables.py for the terminal
cli.py        the commands
"""
