"""Times several passes in one sweep against a sweep each: an update with the next perturbation, a replay of 8 updates.

python benchmarks/bench_chain.py           # stores benchmarks/results/kernels-chain-<device>.json
python benchmarks/bench_chain.py --help    # the options, and what the figures mean: those of `zokern bench kernels`
"""

from zokern.bench.cli import script

if __name__ == "__main__":
    script("chain")
