"""The picture in a row: a file, or what a data set has of one."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

from zokern.finetune.cells import Cells
from zokern.finetune.examples import Picture
from zokern.finetune.options import FinetuneError, Options


def read(cells: Cells, options: Options, beside: Path) -> Picture | None:
    """The picture in --image-column: a path that begins at `beside`, or what `datasets` has; None where there is none."""
    try:
        from PIL import Image
    except ImportError as error:
        raise FinetuneError(f"pictures need Pillow ({error}); install it with: pip install pillow") from None
    value = cells.raw(options.image_column, "--image-column")
    if isinstance(value, dict) and {"bytes", "path"} <= set(value):
        content, path = value["bytes"], str(value["path"] or cells.place)
    elif isinstance(value, str):
        content, path = None, str(beside / value) if value else ""
    else:
        raise FinetuneError(
            f"{cells.place}: column {options.image_column!r} has {str(value)[:60]!r}; a picture or the path of one is "
            "needed. Choose another column with --image-column"
        )
    if not path:
        return None
    try:
        raw = Path(path).read_bytes() if content is None else content
        with Image.open(io.BytesIO(raw)):
            return Picture(hashlib.sha256(raw).hexdigest(), path, content)
    except OSError as error:
        raise FinetuneError(f"{cells.place}: the picture {path!r} cannot be read ({error})") from error
