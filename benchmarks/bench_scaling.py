"""Times a step's passes for a parameter, from ten million parameters to a billion, with the memory.

    python benchmarks/bench_scaling.py --output benchmarks/results/scaling-cpu.json     # the CPU run of docs/steps.md

The same as `zokern bench scaling`: zokern/bench/commands_step.py has the options, `--help` tells of them.
"""

if __name__ == "__main__":
    import typer

    from zokern.bench.commands_step import scaling

    typer.run(scaling)
