"""A model whose loss is the same bits on every machine: its forward is arithmetic of integers, in any order."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

UNIT = 1 << 10  # a weight is seen as a multiple of 1/1024: eps of the runs is far above
EXAMPLES = 2


def whole(p: Tensor, example: int) -> Tensor:
    """sum (p - target)^2 in units of 2^-20, int64: exact, so that no order of summation matters."""
    seen = (p.to(torch.float64) * UNIT).round().to(torch.int64)
    return ((seen - target(p.shape, p.device, example)) ** 2).sum()


@functools.cache
def target(shape: torch.Size, device: torch.device, example: int) -> Tensor:
    return ((torch.arange(shape.numel(), device=device) * 389 + 97 * example) % 1021 - 510).view(shape)


class Block(nn.Module):
    def __init__(self, size: int, number: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(start((size, size), number))
        self.bias = nn.Parameter(start((size,), number + 1))

    def forward(self, total: Tensor, example: int) -> Tensor:
        return total + whole(self.weight, example) * 3 // 2 + whole(self.bias, example)


def start(shape: tuple[int, ...], number: int) -> Tensor:
    numel = torch.Size(shape).numel()
    return (((torch.arange(numel) * 211 + 53 * number) % 509 - 254) / 512.0).view(shape)


class Whole(nn.Module):
    """Three blocks, what lies outside them, a tied parameter, a frozen one and one without elements."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.embedding = nn.Parameter(start((9, 5), 3))
        self.blocks = nn.ModuleList(Block(size, i) for i, size in enumerate((11, 11, 11)))
        self.frozen = nn.Parameter(start((4,), 7), requires_grad=False)
        self.empty = nn.Parameter(torch.zeros(0))
        self.head = self.embedding
        self.to(dtype)

    def forward(self, example: int) -> Tensor:
        total = whole(self.embedding, example) + whole(self.frozen, example)
        for block in self.blocks:
            total = block(total, example)
        return (total + whole(self.head, example)).to(torch.float64) / (UNIT * UNIT)
