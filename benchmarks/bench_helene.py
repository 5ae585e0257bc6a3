"""Times HELENE's update against a copy and against its peers.

python benchmarks/bench_helene.py           # stores benchmarks/results/kernels-helene-<device>.json
python benchmarks/bench_helene.py --help    # the options, and what the figures mean: those of `zokern bench kernels`
"""

from zokern.bench.cli import script

if __name__ == "__main__":
    script("helene")
