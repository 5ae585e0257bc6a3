"""More than one process: who holds which part of the batch and of the directions, and how ranks tell each other numbers.

The engine is torch.distributed. places.py finds out who takes part, exchange.py gathers a few numbers from all of them.
Optimizers use it by zokern/optim/ranks.py.
"""
