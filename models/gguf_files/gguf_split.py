"""The parts of a split GGUF model, as llama.cpp's gguf-split names them."""

from __future__ import annotations

import re
from pathlib import Path

from minserve.errors import ModelLoadError

# https://github.com/ggml-org/llama.cpp/tree/master/tools/gguf-split: parts count from 1.
_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


def gguf_parts(path: Path) -> list[Path]:
    """Return the files of the model that a GGUF file belongs to, in order.

    A file whose name is not that of a part (``name-00001-of-00003.gguf``) is alone. The parts are
    in one folder.

    Raises:
        ModelLoadError: naming it, if a part is missing.
    """
    match = _PART.fullmatch(path.name)
    if match is None:
        return [path]
    number, count = int(match["number"]), int(match["count"])
    if not 1 <= number <= count:
        raise ModelLoadError(f"{path}: by its name it is part {number} of {count}, which cannot be")
    parts = []
    for i in range(1, count + 1):
        part = path.with_name(f"{match['stem']}-{i:05d}-of-{count:05d}.gguf")
        if not part.is_file():
            raise ModelLoadError(
                f"{part}: this part of a model split into {count} files is missing; "
                "put all its parts into one folder"
            )
        parts.append(part)
    return parts
