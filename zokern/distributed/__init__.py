"""More than one process: who holds which part of the batch, of the directions and of the weights, and how ranks tell each
other numbers.

The engine is torch.distributed. finding.py finds out who takes part (on meshes: meshes.py), exchange.py gathers a few
numbers from all of them, pieces.py more than a few. Optimizers use it by zokern/optim/ranks.py. shards.py has what ranks
find together that share a tensor out.
"""
