"""The "zokern" entry of a state_dict once more, as text in its first parameter group.

torch.distributed.checkpoint's functions keep `state` and `param_groups` of an optimizer's state_dict and nothing else;
some of them look into each group for the names that the optimizer's own groups have, so these have this one, at None.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

KEY = "zokern"
LARGEST = 1 << 26  # bytes, unpacked: a million parameters


def packed(own: Mapping[str, Any]) -> str:
    """Numbers keep their bits. Compressed, because a flattened state_dict has it once for each parameter."""
    return base64.b64encode(zlib.compress(json.dumps(own, default=_plain).encode(), 9)).decode()


def entry(given: Mapping[str, Any]) -> Any:
    """The entry itself, or else what the first group carries; None where there is neither.

    Raises:
        ValueError: if what it carries is not what `packed` gave.
    """
    if KEY in given:
        return given[KEY]
    groups = given.get("param_groups")
    first = groups[0] if isinstance(groups, Sequence) and groups else None
    text = first.get(KEY) if isinstance(first, Mapping) else None
    if text is None:
        return None
    try:
        unpacker = zlib.decompressobj()
        plain = unpacker.decompress(base64.b64decode(text, validate=True), LARGEST)
        if not unpacker.eof or unpacker.unused_data:
            raise ValueError("it is cut off or too large")
        return json.loads(plain, object_hook=_tensor)
    except (TypeError, ValueError, RuntimeError, AttributeError, OverflowError, zlib.error) as error:
        raise ValueError(f"state_dict: {KEY!r} of param_groups[0] cannot be read ({error}); load it whole") from None


def leave_out(groups: Sequence[dict[str, Any]]) -> None:
    """An optimizer's own groups have the name, and nothing under it."""
    for group in groups:
        group[KEY] = None


def _plain(value: Any) -> Any:
    if not isinstance(value, Tensor):
        raise TypeError(f"history has a {type(value).__name__}; it must be plain values and tensors")
    return {"dtype": str(value.dtype).removeprefix("torch."), "values": value.tolist()}


def _tensor(found: dict[str, Any]) -> Any:
    if found.keys() != {"dtype", "values"}:
        return found
    return torch.tensor(found["values"], dtype=getattr(torch, found["dtype"]), device="cpu")
