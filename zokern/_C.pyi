"""The compiled module (csrc/bindings.cpp). Addresses are ints; 0 means none."""

cuda_architectures: str  # only in builds with CUDA
cuda_toolkit: str  # only in builds with CUDA

class Pass:
    def __init__(
        self,
        *,
        tensors: int,
        chunks: int,
        num_chunks: int,
        coefs: int,
        decays: int,
        seeds: int,
        seed: int,
        num_seeds: int,
        rounding_seed: int,
        known_rounding_seed: int,
        enabled: int,
    ) -> None: ...

def cpu_instruction_sets() -> list[str]: ...
def cpu_add_noise(
    pass_: Pass, dtype: int, distribution: int, rounding: int, threads: int, instruction_set: str
) -> None: ...
def cpu_normal_checksum(first: int, last: int, threads: int, instruction_set: str) -> int: ...
def cuda_add_noise(pass_: Pass, dtype: int, distribution: int, rounding: int, device: int, stream: int) -> None: ...
def cuda_normal_checksum(first: int, last: int, sum: int, device: int, stream: int) -> None: ...
