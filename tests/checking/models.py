"""Engines that run a model in another way than calling it, and models with layers that hold no parameters."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.models import seeded


class Norms(nn.Module):
    """Two norms that are equal, as fresh ones are, between linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(16, 16), nn.LayerNorm(16)
        self.second, self.norm2 = nn.Linear(16, 16), nn.LayerNorm(16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        return self.head(torch.relu(self.norm2(self.second(x))))


def norms(dtype: torch.dtype = torch.float32) -> Norms:
    return seeded(Norms, dtype, spread=0.0)


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.linspace(-1, 1, 64).reshape(4, 16).sin().to(dtype)


def engine(name: str, model: nn.Module, x: Tensor) -> Callable[[Tensor], Any]:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch.jit's deprecation
        if name == "trace":
            return torch.jit.trace(model, x)
        if name == "freeze":
            return torch.jit.freeze(torch.jit.trace(model, x))
        if name == "export":
            return torch.export.export(model, (x,)).module()
        if name == "deepcopy":
            return copy.deepcopy(model)
        if name == "averaged":
            return torch.optim.swa_utils.AveragedModel(model)
        parameters = dict(model.named_parameters())
        if name == "older tensors":
            parameters = {name: p.detach().clone() for name, p in parameters.items()}
        return lambda x: torch.func.functional_call(model, parameters, (x,))


class Int8Linear(nn.Module):
    """As libraries have them: an integer weight with a scale, both buffers, and a bias that can be trained."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = nn.Parameter(linear.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight * self.scale, self.bias)


class Packed(nn.Linear):
    """Computes with a copy that it packed when it was made, as an engine's layer does; its parameters stay."""

    def pack(self) -> Packed:
        self.packed = self.weight.detach().clone().half()
        return self

    def forward(self, x: Tensor) -> Tensor:
        assert self.weight.t().shape[0] == x.shape[-1]  # a view, of which nothing is read
        return nn.functional.linear(x, self.packed.float(), self.bias)
