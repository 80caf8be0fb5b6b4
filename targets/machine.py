"""What this machine's processors can do, as far as targets care."""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import importlib.util
import platform
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from enginewright.targets.contract import Answer

CGROUPS, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
"""Where Linux shows control groups, and where it says which ones this process is in."""

MEMORY = Path("/proc/meminfo")
"""Where Linux says how much memory is free."""


def cpu_id() -> str:
    """What tells processors of one name apart: family, model, stepping, and a digest of all their flags."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    pairs = (line.partition(":")[::2] for line in text.partition("\n\n")[0].splitlines())
    fields = {key.strip(): value.strip() for key, value in pairs}
    names = ("cpu family", "model", "stepping", "CPU implementer", "CPU part", "CPU variant", "CPU revision")
    digest = hashlib.sha256(" ".join(sorted(cpu_flags())).encode()).hexdigest()[:12]
    known = [f"{name.removeprefix('cpu ')} {fields[name]}" for name in names if name in fields]
    return ", ".join([*known, f"flags {digest}"])


@cache
def cpu_flags() -> frozenset[str]:
    """Instruction set flags as Linux names them; empty where they cannot be read."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    for line in text.splitlines():
        if line.startswith(("flags", "Features")):
            return frozenset(line.partition(":")[2].split())
    return frozenset()


def cpu_model() -> str:
    """The processor's name."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name"))
    return next(names, platform.machine())


def int8_saturates() -> bool:
    """Whether 8-bit products add pairs in 16 bits here and saturate: x86 without VNNI or AMX.

    Unknown flags on x86 count as saturating, which costs a little accuracy and no error.
    """
    if platform.machine().lower() not in ("x86_64", "amd64", "i686"):
        return False
    return not cpu_flags() & {"avx512_vnni", "avx_vnni", "avx_vnni_int8", "amx_int8"}


def core_quota() -> float | None:
    """How many cores the quota of this process is worth, such as a container's; None where there is none.

    The least counts of the control groups that it is in, each of which lies in others that may have less.
    """
    found = [quota for group in control_groups() if (quota := quota_of(group)) is not None]
    return min(found, default=None)


def control_groups() -> Iterator[Path]:
    """Folders of the groups that share processors out to this process, the outermost first, of both versions.

    A container sees its own group as the outermost, whatever path it is told.
    """
    yield from (CGROUPS, CGROUPS / "cpu")
    try:
        lines = OWN_CGROUPS.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers and "cpu" not in controllers.split(","):
            continue
        names = [] if ".." in path else [name for name in path.split("/") if name]
        for root in (CGROUPS / "cpu", CGROUPS / controllers) if controllers else (CGROUPS, CGROUPS / "unified"):
            yield from (root.joinpath(*names[:depth]) for depth in range(len(names) + 1))


def quota_of(group: Path) -> float | None:
    """How many cores the quota of one control group is worth; None where there is none, or nothing says so."""
    try:
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        found = float(quota) / float(period)
    except (OSError, ValueError, ZeroDivisionError):  # "max" is no number
        return None
    return found if found > 0 else None


def free_memory() -> int | None:
    """Bytes that this process may still take: what Linux calls available, and no more than its control groups leave it.

    None where nothing says so.
    """
    try:
        lines = MEMORY.read_text().splitlines()
        found = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")]
    except (OSError, ValueError, IndexError):
        return None
    left = [room for group in control_groups() if (room := room_of(group)) is not None]
    return max(0, min(found + left)) if found else None


def room_of(group: Path) -> int | None:
    """Bytes that one control group of version 2 may still take; None where it has no limit, or nothing says so."""
    try:
        return int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
    except (OSError, ValueError):  # "max" is no number
        return None


@cache
def gpu() -> Answer:
    """Whether an NVIDIA driver answers and has a device."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return Answer(False, "no NVIDIA driver (libcuda.so.1)")
    if code := driver.cuInit(0):
        return Answer(False, f"the NVIDIA driver does not start (error {code})")
    count = ctypes.c_int(0)
    driver.cuDeviceGetCount(ctypes.byref(count))
    return Answer(True) if count.value else Answer(False, "the NVIDIA driver sees no GPU")


def gpu_name() -> str:
    """The first NVIDIA GPU's name and memory; empty where there is none."""
    if not gpu().yes:
        return ""
    driver = ctypes.CDLL("libcuda.so.1")
    device, name, size = ctypes.c_int(0), ctypes.create_string_buffer(256), ctypes.c_size_t(0)
    if driver.cuDeviceGet(ctypes.byref(device), 0) or driver.cuDeviceGetName(name, len(name), device):
        return "an NVIDIA GPU that does not say its name"
    driver.cuDeviceTotalMem_v2(ctypes.byref(size), device)
    return f"{name.value.decode(errors='replace')}, {size.value / 2**30:.0f} GiB"


def installed(module: str, *, extra: str) -> Answer:
    """Whether a module could be found, without importing it."""
    if importlib.util.find_spec(module):
        return Answer(True)
    return Answer(False, f"{module} is not there; pip install 'enginewright[{extra}]'")


def importable(module: str) -> Answer:
    """Whether a module imports."""
    try:
        importlib.import_module(module)
    except Exception as cause:  # any failure of someone else's import is the answer, not our error
        return Answer(False, f"{type(cause).__name__}: {cause}".splitlines()[0])
    return Answer(True)
