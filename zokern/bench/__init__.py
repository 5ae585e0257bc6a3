"""Benchmarks: kernels and whole steps against their peers, timed in one run. `zokern bench` and benchmarks/ run them.

timing.py    candidates in turn, round after round; medians and spread
record.py    the machine's description; one JSON file per run
model.py     what a pass should take, from its machine code
"""
