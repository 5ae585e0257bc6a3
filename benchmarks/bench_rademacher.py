"""Times the pass w + c z with random signs for z against a copy and against its peers.

python benchmarks/bench_rademacher.py           # stores benchmarks/results/kernels-rademacher-<device>.json
python benchmarks/bench_rademacher.py --help    # the options, and what the figures mean: those of `zokern bench kernels`
"""

from zokern.bench.cli import script

if __name__ == "__main__":
    script("rademacher")
