"""Benchmarks: kernels and whole steps against their peers, timed in one run. `zokern bench` and benchmarks/ run them.

cli.py, commands_step.py          the commands; options.py: their checks
cases.py, limits.py, shapes.py    the kernel benchmarks as data; bytes and operations of a pass; tensors like an OPT model's
workload.py, kernels.py           a case's tensors and the calls that are timed; runs them, case by case
peers.py                          the passes in plain torch
model.py, prediction.py           what a pass should take, from its machine code; the row of a benchmark's kernel
step_cases.py, step.py            whole steps: what is timed; cases that take turns
split.py, models.py               forwards, passes and the rest of a step; the models
step_peers.py                     the published order of work in plain torch
scaling.py                        passes for a parameter, from ten million parameters to a billion
timing.py, budget.py              candidates in turn, medians and spread; limits of time and memory, peak bytes of a call
record.py, commit.py              one JSON file per run, with the machine's description; of which source
plots.py, tables.py               pictures and tables from the JSON
"""

ABOUT = "Time the kernels and whole steps on this machine, against a copy and against what PyTorch users write."
