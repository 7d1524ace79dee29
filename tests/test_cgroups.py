"""What limits are found in trees of files as containers and hosts have them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from minserve.cgroups import CgroupLimits, MemoryLimit, read_limits

V2 = "cgroup2 cgroup2 rw"
V1_CPU = "cgroup cgroup rw,cpu,cpuacct"
V1_MEMORY = "cgroup cgroup rw,memory"
V1_NO_LIMIT = 9223372036854771712
MIB = 2**20


def limits_of(
    root: Path, own: list[str], mounts: list[tuple[str, str, str]], files: Mapping[str, object]
) -> CgroupLimits:
    """What is found where a process has these groups, mounts (top, folder, kind) and files."""
    proc = root / "proc/self"
    proc.mkdir(parents=True)
    (proc / "cgroup").write_text("".join(f"{line}\n" for line in own))
    (proc / "mountinfo").write_text(
        "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n"
        + "".join(f"31 22 0:28 {top} {folder} rw,nosuid - {kind}\n" for top, folder, kind in mounts)
    )
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{content}\n")
    return read_limits(root)


def v2_memory(
    folder: str, limit: object, used: int, cache: int = 0, active: int = 0, mapped: int = 0
) -> dict[str, object]:
    return {
        f"{folder}/memory.max": limit,
        f"{folder}/memory.high": "max",
        f"{folder}/memory.current": used,
        f"{folder}/memory.stat": f"anon 5\nfile 7\nfile_mapped {mapped}\n"
        f"inactive_file {cache}\nactive_file {active}",
    }


def v1_memory(folder: str, limit: int, used: int, cache: int = 0) -> dict[str, object]:
    return {
        f"{folder}/memory.limit_in_bytes": limit,
        f"{folder}/memory.usage_in_bytes": used,
        # Without `total_` it is of this group alone, not of those in it.
        f"{folder}/memory.stat": f"inactive_file 1\nactive_file 1\nmapped_file 9\n"
        f"total_mapped_file 30\ntotal_inactive_file {cache}\ntotal_active_file 30",
    }


def v1_cpu(folder: str, quota: int, period: int = 100_000) -> dict[str, object]:
    return {f"{folder}/cpu.cfs_quota_us": quota, f"{folder}/cpu.cfs_period_us": period}


def test_a_system_without_cgroups_limits_nothing(tmp_path: Path) -> None:
    assert read_limits(tmp_path) == CgroupLimits()


def test_v2_in_a_container_with_a_namespace_of_its_own(tmp_path: Path) -> None:
    files = {"sys/fs/cgroup/cpu.max": "150000 100000"}
    files |= v2_memory("sys/fs/cgroup", 1000 * MIB, 400 * MIB, 100 * MIB)
    found = limits_of(tmp_path, ["0::/"], [("/", "/sys/fs/cgroup", V2)], files)
    assert found == CgroupLimits(1.5, MemoryLimit(1000 * MIB, 700 * MIB))


def test_max_is_no_limit(tmp_path: Path) -> None:
    files = {"sys/fs/cgroup/cpu.max": "max 100000", **v2_memory("sys/fs/cgroup", "max", 5)}
    found = limits_of(tmp_path, ["0::/"], [("/", "/sys/fs/cgroup", V2)], files)
    assert found == CgroupLimits()


def test_what_slows_down_counts_like_what_kills(tmp_path: Path) -> None:
    files = v2_memory("sys/fs/cgroup", 1000, 300) | {"sys/fs/cgroup/memory.high": 800}
    found = limits_of(tmp_path, ["0::/"], [("/", "/sys/fs/cgroup", V2)], files)
    assert found.memory == MemoryLimit(800, 500)


@pytest.mark.parametrize("tightest", ["", "/kubepods", "/kubepods/pod", "/kubepods/pod/one"])
def test_the_tightest_of_a_group_and_those_above_it_holds(tmp_path: Path, tightest: str) -> None:
    files: dict[str, object] = {}
    for group in ("", "/kubepods", "/kubepods/pod", "/kubepods/pod/one"):
        folder, tight = f"sys/fs/cgroup{group}", group == tightest
        files[f"{folder}/cpu.max"] = f"{70_000 if tight else 400_000} 100000"
        files |= v2_memory(folder, 900 if tight else 5000, 600)
    # Neighbours do not count.
    files["sys/fs/cgroup/kubepods/pod/two/cpu.max"] = "10000 100000"
    own = ["0::/kubepods/pod/one"]
    found = limits_of(tmp_path, own, [("/", "/sys/fs/cgroup", V2)], files)
    assert found == CgroupLimits(0.7, MemoryLimit(900, 300))


def test_what_neighbours_use_of_a_wide_limit_can_leave_less_than_a_tight_one(
    tmp_path: Path,
) -> None:
    files = v2_memory("sys/fs/cgroup/pod", 5000, 4900)
    files |= v2_memory("sys/fs/cgroup/pod/one", 1000, 100)
    own = ["0::/pod/one"]
    found = limits_of(tmp_path, own, [("/", "/sys/fs/cgroup", V2)], files)
    assert found.memory == MemoryLimit(5000, 100)


def test_cached_files_count_as_free_but_not_what_is_mapped(tmp_path: Path) -> None:
    mounts = [("/", "/cg", V2)]
    files = v2_memory("cg", 1000, 700, cache=100, active=200, mapped=50)
    found = limits_of(tmp_path / "one", ["0::/"], mounts, files)
    assert found.memory == MemoryLimit(1000, 550)
    files = v2_memory("cg", 1000, 700, cache=10, active=20, mapped=50)
    found = limits_of(tmp_path / "two", ["0::/"], mounts, files)
    assert found.memory == MemoryLimit(1000, 300)


def test_a_full_group_leaves_nothing_and_not_less(tmp_path: Path) -> None:
    files = v2_memory("sys/fs/cgroup", 1000, 1200)
    found = limits_of(tmp_path, ["0::/"], [("/", "/sys/fs/cgroup", V2)], files)
    assert found.memory == MemoryLimit(1000, 0)


def test_v1_in_a_container_that_sees_only_its_own_group(tmp_path: Path) -> None:
    # Docker without a cgroup namespace: the path is the host's, the files are at the mount.
    top = "/docker/5f3a"
    own = [f"4:memory:{top}", f"3:cpu,cpuacct:{top}", f"1:name=systemd:{top}"]
    mounts = [
        (top, "/sys/fs/cgroup/cpu,cpuacct", V1_CPU),
        (top, "/sys/fs/cgroup/memory", V1_MEMORY),
        (top, "/sys/fs/cgroup/systemd", "cgroup cgroup rw,name=systemd"),
    ]
    files = v1_cpu("sys/fs/cgroup/cpu,cpuacct", 50_000)
    files |= v1_memory("sys/fs/cgroup/memory", 1000, 600, 200)
    found = limits_of(tmp_path, own, mounts, files)
    assert found == CgroupLimits(0.5, MemoryLimit(1000, 600))


def test_v1_on_a_host_counts_nested_groups_and_no_limits(tmp_path: Path) -> None:
    own = ["4:memory:/a/b", "3:cpu,cpuacct:/a/b"]
    mounts = [("/", "/cg/cpu", V1_CPU), ("/", "/cg/memory", V1_MEMORY)]
    files = v1_cpu("cg/cpu/a/b", -1) | v1_cpu("cg/cpu/a", 300_000, 200_000) | v1_cpu("cg/cpu", -1)
    for folder in ("cg/memory/a/b", "cg/memory/a", "cg/memory"):
        files |= v1_memory(folder, V1_NO_LIMIT, 77)
    assert limits_of(tmp_path, own, mounts, files) == CgroupLimits(1.5, None)


def test_v1_beside_an_empty_v2(tmp_path: Path) -> None:
    own = ["4:memory:/work", "1:cpu:/", "0::/"]
    mounts = [
        ("/", "/sys/fs/cgroup/cpu", "cgroup cgroup rw,cpu"),
        ("/", "/sys/fs/cgroup/memory", V1_MEMORY),
        ("/", "/sys/fs/cgroup/unified", V2),
    ]
    files = {"sys/fs/cgroup/unified/cgroup.controllers": ""} | v1_cpu("sys/fs/cgroup/cpu", 200_000)
    files |= v1_memory("sys/fs/cgroup/memory/work", 500, 100)
    found = limits_of(tmp_path, own, mounts, files)
    assert found == CgroupLimits(2.0, MemoryLimit(500, 400))


def test_controllers_divided_between_v1_and_v2(tmp_path: Path) -> None:
    own = ["3:cpu,cpuacct:/a", "0::/a"]
    mounts = [("/", "/cg/cpu", V1_CPU), ("/", "/cg/unified", V2)]
    files = v1_cpu("cg/cpu/a", 120_000) | v2_memory("cg/unified/a", 500, 100)
    found = limits_of(tmp_path, own, mounts, files)
    assert found == CgroupLimits(1.2, MemoryLimit(500, 400))


@pytest.mark.parametrize(
    ("own", "top"),
    [
        ("/", "/"),
        ("/../..", "/"),  # moved out of the namespace's group after it was made
        ("/", "/../.."),  # mounted before the namespace was made
        ("/", "/docker/5f3a"),
        ("/kubepods/pod/one", "/"),  # /proc of the host, groups of the container
        ("/../other", "/.."),
    ],
)
def test_files_at_the_mount_are_found_however_the_group_is_called(
    tmp_path: Path, own: str, top: str
) -> None:
    files = {"sys/fs/cgroup/cpu.max": "200000 100000"}
    found = limits_of(tmp_path, [f"0::{own}"], [(top, "/sys/fs/cgroup", V2)], files)
    assert found.cpus == 2.0


def test_a_mount_of_another_containers_group_does_not_count(tmp_path: Path) -> None:
    mounts = [("/docker/two", "/mnt/two", V2), ("/docker/one", "/sys/fs/cgroup", V2)]
    files = {"mnt/two/cpu.max": "10000 100000", "sys/fs/cgroup/cpu.max": "200000 100000"}
    assert limits_of(tmp_path, ["0::/docker/one"], mounts, files).cpus == 2.0


def test_paths_with_colons_and_spaces(tmp_path: Path) -> None:
    files = {"mnt/c g/a:b/cpu.max": "200000 100000"}
    found = limits_of(tmp_path, ["0::/a:b"], [("/", r"/mnt/c\040g", V2)], files)
    assert found.cpus == 2.0


def test_missing_files_limit_nothing(tmp_path: Path) -> None:
    files = {"cg/memory.max": 1000, "cg/memory/memory.limit_in_bytes": 1000}
    files["cg/cpu/cpu.cfs_quota_us"] = 50_000
    own = ["4:memory:/", "3:cpu,cpuacct:/", "0::/"]
    mounts = [("/", "/cg", V2), ("/", "/cg/cpu", V1_CPU), ("/", "/cg/memory", V1_MEMORY)]
    assert limits_of(tmp_path, own, mounts, files) == CgroupLimits()


def test_without_statistics_no_page_cache_counts_as_free(tmp_path: Path) -> None:
    files = {"cg/memory.max": 1000, "cg/memory.current": 600}
    found = limits_of(tmp_path, ["0::/"], [("/", "/cg", V2)], files)
    assert found.memory == MemoryLimit(1000, 400)
