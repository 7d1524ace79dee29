"""Limits of the control groups (cgroups) around this process: processor time and memory.

A container's limits, such as those of `docker run --cpus --memory` or of Kubernetes, are
files of cgroup v1 or v2, or of both side by side. The process's own group and every group
above it count: the tightest limit is the one that holds. Files: Linux'
`Documentation/admin-guide/cgroup-v2.rst` and `cgroup-v1/memory.rst`; mounts: proc(5).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

# v1 writes "no limit" as the largest number of bytes that is a multiple of the page size.
V1_NO_LIMIT = 2**62
# Of memory.stat, by version: file pages that are in memory, and those that processes have
# mapped, such as their programs. v1's counts without `total_` leave out the groups below.
V2_CACHE, V2_MAPPED = ("inactive_file", "active_file"), "file_mapped"
V1_CACHE, V1_MAPPED = ("total_inactive_file", "total_active_file"), "total_mapped_file"
# A v2 hierarchy has no controllers' names in its mount options or in /proc/self/cgroup.
V2 = ""


class MemoryLimit(NamedTuple):
    """Bytes of a group: all that it may use, and what is left of them. Page cache that can be
    dropped at no cost counts as left.
    """

    limit: int
    free: int


@dataclass(frozen=True, slots=True)
class CgroupLimits:
    """What the groups allow, ``None`` where nothing is limited.

    Attributes:
        cpus: processor time, in processors: 1.5 is 150 ms in every 100 ms.
        memory: of the group with the least left.
    """

    cpus: float | None = None
    memory: MemoryLimit | None = None


def read_limits(root: Path = Path("/")) -> CgroupLimits:
    """The limits of this process's groups, of none where the system has no cgroups.

    Args:
        root: the folder that holds ``proc`` and the mounted groups.
    """
    groups = list(_groups(root))
    cpus = [found for group in groups if (found := _cpus(group)) is not None]
    memory = [limit for group in groups if (limit := _memory(group)) is not None]
    return CgroupLimits(
        min(cpus, default=None), min(memory, key=lambda one: one.free, default=None)
    )


def _groups(root: Path) -> Iterator[Path]:
    """Folders of the process's own groups and of all groups above them that can be seen."""
    mounts = list(_mounts(root))
    for controller, path in _own_paths(root).items():
        found = [
            (mount, _inside(path, mount.top)) for mount in mounts if mount.controller == controller
        ]
        # Mounts that do not show the group show others' groups, unless there are only such.
        shown = [(mount, inside) for mount, inside in found if inside is not None]
        for mount, inside in shown or [(mount, PurePosixPath()) for mount, _ in found]:
            for part in (inside, *inside.parents):
                yield mount.folder / part


def _inside(path: str, top: str) -> PurePosixPath | None:
    """A group's path below a mount that shows the groups from ``top`` on; ``None`` where the
    group is not below it.

    In a container either path may be told as seen from another place (``/``, ``/../..``),
    while the files of its group are those at the mount itself.
    """
    try:
        inside = PurePosixPath(path).relative_to(top)
    except ValueError:
        return None
    return PurePosixPath() if ".." in inside.parts else inside


def _own_paths(root: Path) -> dict[str, str]:
    """The process's group by controller: ``cpu``, ``memory`` and `V2`."""
    own = {}
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            if controller in ("cpu", "memory", V2):
                own[controller] = path
    return own


class _Mount(NamedTuple):
    """Where groups of a controller can be seen.

    Attributes:
        top: path of the group that is mounted there.
        folder: of that group's files.
    """

    controller: str
    top: str
    folder: Path


def _mounts(root: Path) -> Iterator[_Mount]:
    for line in (_read(root / "proc/self/mountinfo") or "").splitlines():
        mount, _, kind = line.partition(" - ")
        if len(mount.split()) < 5 or len(kind.split()) < 2:
            continue  # not as proc(5) has it
        top, point = (_unescape(word) for word in mount.split()[3:5])
        filesystem, *_, options = kind.split()
        if filesystem == "cgroup2":
            controllers = {V2}
        elif filesystem == "cgroup":
            controllers = {"cpu", "memory"} & set(options.split(","))
        else:
            continue
        for controller in controllers:
            yield _Mount(controller, top, root / point.lstrip("/"))


def _unescape(word: str) -> str:
    """Undo mountinfo's octal codes of spaces and the like."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), word)


def _cpus(group: Path) -> float | None:
    quota, period = _read(group / "cpu.cfs_quota_us"), _read(group / "cpu.cfs_period_us")
    if (both := _read(group / "cpu.max")) is not None:
        quota, _, period = both.partition(" ")
    # "max" and -1 are no limit.
    if quota is None or period is None or not (quota.isdecimal() and period.isdecimal()):
        return None
    return int(quota) / int(period) if int(period) else None


def _memory(group: Path) -> MemoryLimit | None:
    # Above `memory.high` nothing is killed, but all is slowed down until it is below again.
    limits = [_number(group / name) for name in ("memory.max", "memory.high")]
    used, cache, mapped = _number(group / "memory.current"), V2_CACHE, V2_MAPPED
    if used is None:
        limits = [_number(group / "memory.limit_in_bytes")]
        used, cache, mapped = _number(group / "memory.usage_in_bytes"), V1_CACHE, V1_MAPPED
    limit = min((one for one in limits if one is not None), default=V1_NO_LIMIT)
    if used is None or limit >= V1_NO_LIMIT:
        return None
    stat = dict(line.split() for line in (_read(group / "memory.stat") or "").splitlines())
    # Active pages too: a file of weights that is read again, by a second start, becomes active.
    droppable = sum(int(stat.get(name, 0)) for name in cache) - int(stat.get(mapped, 0))
    return MemoryLimit(limit, max(0, limit - used + min(max(0, droppable), used)))


def _number(file: Path) -> int | None:
    """The bytes that a file tells, ``None`` where it is missing or tells none (``max``)."""
    text = _read(file)
    return int(text) if text is not None and text.isdecimal() else None


def _read(file: Path) -> str | None:
    try:
        # Names of mounts need not be UTF-8.
        return file.read_text(errors="surrogateescape").strip()
    except OSError:
        return None
