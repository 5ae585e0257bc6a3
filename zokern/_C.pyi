"""The compiled module (csrc/bindings.cpp). Addresses are ints; 0 means none."""

from typing import TypedDict

max_stages: int
max_chain_seeds: int
cuda_architectures: str  # only in builds with CUDA
cuda_toolkit: str  # only in builds with CUDA

class Pass:
    def __init__(
        self,
        table: tuple[int, int, int],
        flags: tuple[bool, bool, bool, bool],
        seeds: int,
        num_seeds: int,
        seeds_on_host: bool,
        coefs: int,
        scalars: int,
        rounding_seed: int,
        rounding_on_host: bool,
        enabled: int,
    ) -> None: ...

class Chain:
    def __init__(
        self,
        *,
        tensors: int,
        chunks: int,
        num_chunks: int,
        enabled: int,
        rademacher: bool,
        fork: bool,
        keep_second: bool,
        stages: list[tuple[int, ...]],
    ) -> None: ...

class _Rule(TypedDict):
    name: str
    direct: bool
    coefs: int  # how many
    scalars: int
    states: int
    written: int
    squares: int  # which of the coefs is V's, or -1
    perturbation: str
    half_state: bool  # may states be bfloat16?

def rules() -> list[_Rule]: ...
def cpu_instruction_sets() -> list[str]: ...
def cpu_run(pass_: Pass, rule: int, dtype: int, state_dtype: int, threads: int, instruction_set: str) -> None: ...
def cpu_run_chain(
    chain: Chain, rule: int, dtype: int, state_dtype: int, threads: int, instruction_set: str
) -> None: ...
def cpu_normal_checksum(first: int, last: int, threads: int, instruction_set: str) -> int: ...
def cuda_run(pass_: Pass, rule: int, dtype: int, state_dtype: int, device: int, stream: int) -> None: ...
def cuda_run_chain(chain: Chain, rule: int, dtype: int, state_dtype: int, device: int, stream: int) -> None: ...
def cuda_normal_checksum(first: int, last: int, sum: int, device: int, stream: int) -> None: ...
