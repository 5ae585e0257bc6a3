"""Bytes that a way of training takes beside the weights, from a model's shape.

N tokens; widths h (stream), i (MLP), k (keys); b bytes a number. All but `working` is exact, and the tests count it.
"""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.memory.shapes import Shape

RANK = 8  # of LoRA
FLOAT = 4  # bytes of float32: norms, losses and optimizers compute in it


def working(shape: Shape, rows: int, length: int, item: int) -> int:
    """What a forward holds for a moment, where nothing is kept: three of the MLP's width, two of the stream's, and the
    logits of the last token of each row, twice. An estimate."""
    passing = rows * length * (3 * shape.inner + 2 * shape.hidden) * item
    return passing + 2 * rows * shape.vocabulary * item


def activations(shape: Shape, rows: int, length: int, item: int, *, lora: bool) -> int:
    """What the forward keeps for the backward, in transformers' Llama with SDPA.

    A layer, all of its parameters trained: the stream before each norm, in float32, 2 h; normalised and scaled, 4 h;
    queries and attention's output, 2 h; keys and values, 2 k; gate, its SiLU, up and their product, 4 i; one number a head
    and two a token in float32. With frozen weights a product with them keeps nothing of its input: of these, normalised,
    scaled and the product are not kept, but LoRA's input is, in float32 (once, or where it has to be cast for queries and
    for values, twice), and what is between its two matrices, 2 r.
    """
    n, h, k, i = rows * length, shape.hidden, shape.keys, shape.inner
    layer = 2 * h * FLOAT + 2 * h * item + 2 * k * item + (shape.heads + 2) * FLOAT
    if lora:
        inputs = 1 if item == FLOAT else 2
        layer += inputs * h * FLOAT + 2 * RANK * FLOAT + 3 * i * item
    else:
        layer += 4 * h * item + 4 * i * item
    angles = 2 * length * shape.head * item
    scores = (
        2 * rows * FLOAT + 8 * rows + FLOAT
    )  # log-probabilities of two words, targets, the sum of the losses' weights
    kept = shape.layers * n * layer + angles + scores
    if lora:
        return kept
    # The last norm, what the head reads (of the last tokens, but a view keeps all of it), and the tokens' numbers.
    return kept + n * (h * FLOAT + 2 * h * item + FLOAT) + 8 * n


def in_place(shape: Shape, rows: int, length: int, item: int) -> int:
    """A forward, and nothing else."""
    return working(shape, rows, length, item)


def shadow(shape: Shape, rows: int, length: int, item: int) -> int:
    """The weights once more."""
    return working(shape, rows, length, item) + shape.parameters * item


def stream(shape: Shape, rows: int, length: int, item: int) -> int:
    """One layer, and what lies outside the layers."""
    return working(shape, rows, length, item) + (shape.block + shape.outside) * item


def low_rank(shape: Shape, rows: int, length: int, item: int) -> int:
    """The two factors of each matrix, in the weights' dtype and in float32, and copies of the norms."""
    types = FLOAT if item == FLOAT else FLOAT + item
    return working(shape, rows, length, item) + shape.sides * types + shape.norms * item


def lora_adam(shape: Shape, rows: int, length: int, item: int) -> int:
    """The adapter, its gradient and two moments in float32; activations."""
    kept = activations(shape, rows, length, item, lora=True)
    return working(shape, rows, length, item) + kept + 4 * shape.adapter(RANK) * FLOAT


def full_adam(shape: Shape, rows: int, length: int, item: int, *, moment: int = FLOAT, master: int = 0) -> int:
    """Two moments; and the larger of two peaks. When the backward begins: activations, and the head's gradient. When the
    step is done: all gradients, and twice the largest tensor, for the root of its second moment. moment, master: bytes a
    number of a moment, and of weights kept in float32 beside."""
    head = shape.vocabulary * shape.hidden * item
    begins = activations(shape, rows, length, item, lora=False) + working(shape, rows, length, item) + head
    ends = shape.parameters * item + 2 * shape.largest * moment
    return shape.parameters * (2 * moment + master) + max(begins, ends)


def adam_bfloat16(shape: Shape, rows: int, length: int, item: int) -> int:
    """Moments in the weights' dtype, nothing in float32: the least that Adam takes."""
    return full_adam(shape, rows, length, item, moment=item)


def adam_mixed(shape: Shape, rows: int, length: int, item: int) -> int:
    """As is usual with 16-bit weights: moments, and weights once more, in float32."""
    return full_adam(shape, rows, length, item, master=FLOAT)


Formula = Callable[[Shape, int, int, int], int]
MEASURED: dict[str, Formula] = {
    "inference": working,
    "inplace": in_place,
    "forward": low_rank,
    "stream": stream,
    "shadow": shadow,
    "LoRA, Adam": lora_adam,
    "Adam": adam_bfloat16,  # all in one dtype: in float32 that is Adam as it is
}
COMPUTED: dict[str, Formula] = {
    **{name: formula for name, formula in MEASURED.items() if name != "Adam"},
    "Adam, all bfloat16": adam_bfloat16,
    "Adam, mixed": adam_mixed,
}
