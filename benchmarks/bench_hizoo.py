"""Times HiZOO's passes, with its curvature in float32 and in bfloat16 against a copy and against its peers.

python benchmarks/bench_hizoo.py           # stores benchmarks/results/kernels-hizoo-<device>.json
python benchmarks/bench_hizoo.py --help    # the options, and what the figures mean: those of `zokern bench kernels`
"""

from zokern.bench.cli import script

if __name__ == "__main__":
    script("hizoo")
