"""Times whole optimizer steps on real shapes, ours and in the published order, split into forwards, passes and the rest.

    python benchmarks/bench_step.py --output benchmarks/results/step-cpu.json     # the CPU run of docs/steps.md

The same as `zokern bench step`: zokern/bench/commands_step.py has the options, `--help` tells of them.
"""

if __name__ == "__main__":
    import typer

    from zokern.bench.commands_step import step

    typer.run(step)
