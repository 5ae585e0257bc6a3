"""zokern inside other people's frameworks, a file each: nothing is imported here, and each file imports its framework.

    zokern.integrations.accelerate.prepare(accelerator, optimizer)   a loop of one's own, with accumulate()
    zokern.integrations.lightning.ForwardOnly                        a mixin for LightningModules

What no integration can do yet is in limits.py.
"""
