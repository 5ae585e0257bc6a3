"""The settings that all methods have."""

from __future__ import annotations

from dataclasses import InitVar
from typing import Any

from torch import Tensor, nn

from zokern import _checks, backends, directions
from zokern import placement as placements
from zokern.contract.streams import ROUNDINGS
from zokern.distributed.kinds import GroupKind, ParallelKind
from zokern.kinds import Choice, Flag, FlagOr, Instance, Integer, Kind, Number
from zokern.layers import RandomBlocks
from zokern.optim.parameters import RATES
from zokern.settings import Settings, setting

# Of the methods that average: declared once, and not common to all.
NUM_SAMPLES: Any = setting(
    default=1,
    kind=Integer(1, 1 << 20),
    help="Directions (samples) averaged in a step, n: all go into one update. Published: 1.",
)
SCALES = Choice(("paper", "released"))  # whose lr: the paper's formula, or its published code where that differs
RELEASED_LR = (
    "if lr is that of the released code, whose steps have no 1/eps, give "
    'scale="released", and it means here what it does there'
)


class Common(Settings):
    """What lr, eps and weight_decay are given stands for parameter groups that have none of their own."""

    params: InitVar[object] = setting(
        kind=Kind(),
        help="An nn.Module (recommended: its trainable parameters, with names and ids that survive freezing), or "
        "what torch's optimizers take: tensors, (name, tensor) pairs, or groups with their own lr, eps, "
        "weight_decay.",
        kw_only=False, kept=False, flags=None,
    )  # fmt: skip
    lr: InitVar[float | Tensor] = setting(
        kind=RATES["lr"],
        help="Learning rate. Published for MeZO: 1e-6 or 1e-7 (all of billions of parameters), 1e-4 (LoRA). Smaller models "
        "want more: docs/choose.md.",
        kw_only=False, kept=False,
    )  # fmt: skip
    eps: InitVar[float] = setting(
        default=1e-3,
        kind=RATES["eps"],
        help="Radius of the perturbation: losses are taken at weights + eps z and weights - eps z, z of variance 1. "
        "Published: 1e-3 (LoRA 1e-2, prefix tuning 1e-1).",
        kept=False,
    )
    weight_decay: InitVar[float] = setting(
        default=0.0,
        kind=RATES["weight_decay"],
        help="Decoupled, as in AdamW: each step takes lr times this share off the weights. Published: 0.",
        kept=False,
    )
    distribution: InitVar[str | directions.Direction] = setting(
        default="normal",
        kind=Choice(directions.SPELT, directions.parse),
        help="Of the directions: independent normals, signs +1 and -1 (rademacher), or matrices of low rank: lowrank:1 of "
        "rank 1, lowrank:4 of rank 4. In Python also an object, as zokern.LowRank(1).",
        kept=False,
    )
    seed: int = setting(
        default=0,
        kind=Integer(0, _checks.MAX_SEED),
        help="Of the run: direction k of step t has the seed derive_seed(seed, t, k).",
    )
    rounding: str = setting(
        default="auto",
        kind=Choice(("auto", *ROUNDINGS)),
        help="Of updated weights. auto is stochastic for 16-bit weights, where nearest would lose small updates.",
    )
    wanted_placement: InitVar[object] = setting(
        default="auto",
        kind=Choice(placements.PLACEMENTS, placements.read),
        alias="placement",
        help="Where the perturbed weights live during a forward: in the weights' own memory (inplace), in a copy "
        "(shadow), which keeps 16-bit weights exact, in a copy of one block at a time (stream), or nowhere: directions of "
        "low rank are added in the products (forward). auto is inplace for float32, and exact for 16-bit weights.",
        kept=False,
    )
    pipelined: bool = setting(
        default=False,
        kind=Flag(),
        help="For shadow and stream: the pass that updates the weights also writes the next step's first "
        "perturbation, as far as there is room for it: same bits, a sweep over memory less. Between steps, "
        "change weights by operations that autograd sees (not through .data), or the copy would be of what they"
        " were.",
        flags=("--pipelined",),
    )
    prefetch: bool = setting(
        default=False,
        kind=Flag(),
        help="For stream: the next block's copy is written on a side stream of the GPU while the block before runs: same "
        "bits, for the memory of one block more. On a CPU it is written at once, and nothing is gained.",
        changed="place_anew",
        flags=("--prefetch",),
    )
    fold_every: int = setting(
        default=1,
        kind=Integer(0, 1 << 20),
        help="For forward, and updates without states: those of so many steps stay thin terms of the forwards, and one "
        "pass adds them to the weights. Until then p.data lacks them (state_dict() has them, and opt.folded() shows them). "
        "0 never folds by itself.",
    )
    maximize: bool | None = setting(
        default=False,
        kind=Flag(),
        help="Climb, as in torch.optim: the closure returns a reward. metrics['loss'] is what it returns.",
        flags=None,
    )
    paired_randomness: bool | str = setting(
        default="auto",
        kind=FlagOr("auto"),
        help="Whether all forwards of a step draw the same numbers from torch's generators: the i-th micro-batch of each "
        "starts from the same states. auto does so while a module of the model is in training mode with active dropout, "
        "and warns where the first forward draws otherwise; True also pairs that, as sampled rewards.",
        flags=None,
    )
    layers: RandomBlocks | None = setting(
        default=None,
        kind=Instance(RandomBlocks),
        help="RandomBlocks(num_dropped) leaves out that many transformer blocks in each step (LeZO).",
        flags=None,
    )
    wanted_backend: InitVar[str] = setting(
        default="auto",
        kind=Choice(("auto", *backends.BACKENDS)),
        alias="backend",
        help="What runs the passes over the weights.",
        kept=False,
    )
    wanted_module: InitVar[nn.Module | None] = setting(
        default=None,
        kind=Instance(nn.Module),
        alias="module",
        help="With groups or named parameters: the nn.Module that they belong to, so that they have its names and ids, and "
        "every placement and `layers` work. Only what is listed is trained.",
        kept=False, flags=None,
    )  # fmt: skip
    process_group: object = setting(
        default="auto",
        kind=GroupKind(),
        help="The ranks that train one model, and tell each other their losses. auto: those of a DistributedDataParallel "
        "wrapper, or of the mesh of sharded parameters; with several ranks and neither, an error asks for it. None is for "
        "runs that do not know each other.",
        changed="keep_ranks",
        flags=None,
    )
    parallel: str | tuple[str, ...] | None = setting(
        default=None,
        kind=ParallelKind(),
        help="What the ranks share out. data: each has its own part of the batch. directions: all have the same batch, and "
        "each evaluates some of a round's probes; the bits are those of one process that evaluates all. Given without a "
        "group, it means all ranks of the job.",
        changed="keep_ranks",
    )
    exchange_timeout: float = setting(
        default=50.0,
        kind=Number(0.1, 1e6),
        help="Seconds that a rank whose losses are ready waits for the others', or ten times as long as its own took.",
    )
    compare_every: int = setting(
        default=0,
        kind=Integer(0, 1 << 40),
        help="Steps after which ranks compare hashes of their weights again; 0: before the first step alone.",
    )
