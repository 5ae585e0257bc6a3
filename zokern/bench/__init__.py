"""Benchmarks: kernels and whole steps against their peers, timed in one run. `zokern bench` and benchmarks/ run them.

cases.py      the kernel benchmarks as data          workload.py   their tensors and the calls that are timed
kernels.py    runs them, case by case                limits.py     bytes and operations of a pass
peers.py      the passes in plain torch, from equations.py          shapes.py     tensors like an OPT model's
model.py      what a pass should take, from its machine code          prediction.py   the row of a benchmark's kernel
timing.py     candidates in turn, round after round; medians and spread
record.py     the machine's description; one JSON file per run          commit.py     of which source
plots.py      pictures from the JSON, with plots_kernels.py and canvas.py; tables.py for the terminal
cli.py        the commands

memory.py     peak bytes of a call; budget.py: limits of time and memory, and saving after every case
step.py       whole optimizer steps: step_cases.py what is timed, split.py forwards, passes and the rest, models.py the
              models, step_peers.py the published order of work in plain torch, step_graphed.py a step in one CUDA graph
scaling.py    passes for a parameter, from ten million parameters to a billion
commands_step.py, step_options.py, step_tables.py: the two commands
"""

ABOUT = "Time the kernels and whole steps on this machine, against a copy and against what PyTorch users write."
