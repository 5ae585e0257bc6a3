"""Our studies, whose figures the pages tell. Run them from the checkout's root: python -m benchmarks.drift.run --help

kernels/, steps/             pages of what `zokern bench` has stored
convergence/ ... replay/     a study each: run.py measures, page.py or run.py tells
machine_code/                what compiled kernels cost, counted without a GPU
gpu/, gpu_suite.sh           everything that needs a GPU, in one command
pages.py                     writes every figure of README.md and docs/ from results/
"""
