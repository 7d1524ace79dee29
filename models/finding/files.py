"""Small questions about files of a model, before any library reads them."""

from __future__ import annotations

import difflib
import os
import stat
from collections.abc import Iterable
from pathlib import Path

from minserve.errors import ModelLoadError

GGUF_MAGIC = b"GGUF"
# The first line of a pointer, and its largest size in bytes, by git-lfs' specification.
_POINTER_START, _POINTER_BYTES = b"version https://git-lfs.github.com/spec/", 1024


def kind_of(path: Path) -> str | None:
    """Return ``"file"``, ``"folder"``, or ``None`` where there is nothing of that name.

    Raises:
        ModelLoadError: if a folder on the way may not be searched.
    """
    try:
        mode = path.stat().st_mode
    except PermissionError as error:
        raise unreadable(path, error) from None
    except (OSError, ValueError):  # not there; or no name that a file can have
        return None
    return "folder" if stat.S_ISDIR(mode) else "file"


def file_names(folder: Path) -> set[str]:
    """Return the names of the files of a folder; links to files count.

    Raises:
        ModelLoadError: if it may not be listed.
    """
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.is_file()}
    except OSError as error:
        raise unreadable(folder, error) from None


def folder_names(folder: Path) -> set[str]:
    """Return the names of the folders in a folder; empty if it may not be listed."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.is_dir()}
    except OSError:
        return set()


def unreadable(path: Path, error: OSError) -> ModelLoadError:
    """Return the error of a file or folder that the system does not let this user read."""
    return ModelLoadError(
        f"{path}: cannot be read ({error.strerror or error}); give the user who runs minserve the "
        "right to read it and to search the folders above it"
    )


def starts_with(path: Path, start: bytes) -> bool:
    """Return whether a file begins with these bytes; false for a file that cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(len(start)) == start
    except OSError:
        return False


def is_gguf(path: Path) -> bool:
    """Return whether a file is GGUF by its first bytes, whatever its name."""
    return starts_with(path, GGUF_MAGIC)


def is_lfs_pointer(path: Path) -> bool:
    """Return whether git-lfs left its few lines in place of the file that is meant."""
    try:
        small = path.stat().st_size <= _POINTER_BYTES
    except OSError:
        return False
    return small and starts_with(path, _POINTER_START)


def refuse_pointers(paths: Iterable[Path]) -> None:
    """Check that files are themselves and not git-lfs' pointers to them.

    Raises:
        ModelLoadError: naming all pointers.
    """
    pointers = [path for path in paths if is_lfs_pointer(path)]
    if pointers:
        folder = pointers[0].absolute().parent
        names = listed([path.name for path in pointers])
        many = len(pointers) > 1
        raise ModelLoadError(
            f"{folder}: {names} {'are git-lfs pointers' if many else 'is a git-lfs pointer'} and "
            f"not the content itself; run 'git lfs install && git lfs pull' in that folder"
        )


def first_line(error: BaseException) -> str:
    """Return the line to quote of another library's error."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def listed(names: Iterable[str], most: int = 5) -> str:
    """Return the first names of many as text, with the number of those left out."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def similar_names(path: Path, others: Iterable[str] = ()) -> list[str]:
    """Return what may be meant by a path that does not exist: the closest names of that place.

    Args:
        others: names beside those of the folder in which the path would be.
    """
    folder = path.parent
    here = {} if kind_of(folder) != "folder" else {name: folder / name for name in _names(folder)}
    if not here and kind_of(folder) is None and folder != folder.parent:
        # The mistake may be in the name of a folder above; what follows it stays.
        found = similar_names(folder)
        return [str(Path(one) / path.name) for one in found if (Path(one) / path.name).exists()]
    close = difflib.get_close_matches(path.name, [*here, *others], n=3, cutoff=0.7)
    return [str(here.get(name, name)) for name in close]


def _names(folder: Path) -> list[str]:
    """Return the names in a folder; none where it may not be listed."""
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []
