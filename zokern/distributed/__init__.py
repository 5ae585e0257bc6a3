"""More than one process: who holds which part of the batch, of the directions and of the weights, and how ranks tell each
other numbers.

The engine is torch.distributed. places.py finds out who takes part, exchange.py gathers a few numbers from all of them;
optimizers use it by zokern/optim/ranks.py. shards.py makes the tensors that are sharded as the weights are.
"""
