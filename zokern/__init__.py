"""zokern: fused kernels and a drop-in optimizer for zeroth-order fine-tuning, with forward passes only."""

from zokern._checks import ZokernWarning
from zokern._version import __version__
from zokern.noise import noise
from zokern.ops import add_noise_

__all__ = ["ZokernWarning", "__version__", "add_noise_", "noise"]
