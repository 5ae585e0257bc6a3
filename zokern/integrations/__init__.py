"""zokern inside other people's frameworks, a file each: nothing is imported here, and each file imports its framework.

    zokern.integrations.accelerate.prepare(accelerator, optimizer)   a loop of one's own, with accumulate()
    zokern.integrations.lightning.ForwardOnly                        a mixin for LightningModules
    zokern.integrations.peft.save_adapter(optimizer, directory)      a fine-tune that was never folded, as a LoRA adapter

What no integration can do yet is in limits.py.
"""
