"""Times the pass w + sum_k c_k z_k with 1, 2, 4 and 16 seeds against a copy and against its peers.

python benchmarks/bench_axpy.py           # stores benchmarks/results/kernels-axpy-<device>.json
python benchmarks/bench_axpy.py --help    # the options, and what the figures mean: those of `zokern bench kernels`
"""

from zokern.bench.cli import script

if __name__ == "__main__":
    script("axpy")
