"""Benchmarks: kernels and whole steps against their peers, timed in one run. `zokern bench` and benchmarks/ run them.

timing.py    candidates in turn, round after round; medians and spread
record.py    the machine's description; one JSON file per run
memory.py    peak bytes of a call; budget.py: limits of time and memory, and saving after every case

step.py      whole optimizer steps: step_cases.py what is timed, split.py forwards, passes and the rest, models.py the
             models, step_peers.py the published order of work in plain torch
scaling.py   passes for a parameter, from ten million parameters to a billion
commands_step.py, step_options.py, step_tables.py: the two commands
"""
