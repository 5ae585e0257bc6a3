"""Times the pass w + c z, rounded stochastically to 16-bit weights against a copy and against its peers.

python benchmarks/bench_stochastic.py           # stores benchmarks/results/kernels-stochastic-<device>.json
python benchmarks/bench_stochastic.py --help    # the options, and what the figures mean: those of `zokern bench kernels`
"""

from zokern.bench.cli import script

if __name__ == "__main__":
    script("stochastic")
