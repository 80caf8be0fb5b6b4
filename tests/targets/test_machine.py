from __future__ import annotations

from pathlib import Path

import pytest

from enginewright.targets import machine


@pytest.mark.parametrize(
    ("processor", "flags", "saturates"),
    [
        ("x86_64", {"avx2"}, True),
        ("x86_64", {"avx2", "avx_vnni"}, False),
        ("x86_64", {"avx512_vnni"}, False),
        ("x86_64", set(), True),
        ("aarch64", set(), False),
    ],
)
def test_8_bit_products_saturate_on_x86_without_vnni(
    monkeypatch: pytest.MonkeyPatch, processor: str, flags: set[str], saturates: bool
) -> None:
    monkeypatch.setattr(machine.platform, "machine", lambda: processor)
    monkeypatch.setattr(machine, "cpu_flags", lambda: frozenset(flags))
    assert machine.int8_saturates() is saturates


def test_installed_and_importable_are_two_answers(
    tmp_path: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_backend.py").write_text("raise RuntimeError('no driver')")  # type: ignore[operator]
    monkeypatch.syspath_prepend(str(tmp_path))
    assert machine.installed("broken_backend", extra="x").yes
    assert machine.importable("broken_backend") == (False, "RuntimeError: no driver")
    assert "enginewright[gpu]" in machine.installed("no_such_backend", extra="gpu").reason


def test_a_processor_is_told_from_another_of_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    one = "processor\t: 0\ncpu family\t: 25\nmodel\t\t: {model}\nmodel name\t: AMD EPYC\nstepping\t: 1\n"
    text = f"{one}\nprocessor\t: 1\n"
    found = set()
    for model, flags in ((17, {"avx2"}), (1, {"avx2"}), (1, {"avx2", "avx512f"})):
        monkeypatch.setattr(machine.Path, "read_text", lambda self, model=model: text.format(model=model))
        monkeypatch.setattr(machine, "cpu_flags", lambda flags=flags: frozenset(flags))
        assert machine.cpu_model() == "AMD EPYC"
        assert machine.cpu_id().startswith(f"family 25, model {model}, stepping 1, flags ")
        found.add(machine.cpu_id())
    assert len(found) == 3


V1 = {"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}
POD = "kubepods/pod1"


@pytest.mark.parametrize(
    ("files", "own", "cores"),
    [
        ({"cpu.max": "200000 100000\n"}, "0::/\n", 2.0),
        ({"cpu.max": "150000 100000\n"}, "0::/\n", 1.5),
        ({"cpu.max": "max 100000\n"}, "0::/\n", None),
        ({"cpu.max": "what"}, "0::/\n", None),
        (V1, "3:cpu,cpuacct:/\n0::/\n", 0.5),
        ({**V1, "cpu/cpu.cfs_quota_us": "-1\n"}, "1:cpu:/\n", None),
        ({**V1, "cpu/cpu.cfs_period_us": "0\n"}, "1:cpu:/\n", None),
        ({}, "0::/\n", None),
        ({"cpu.max": "200000 100000\n"}, None, 2.0),
        (V1, None, 0.5),
        ({f"{POD}/cpu.max": "300000 100000\n"}, f"0::/{POD}\n", 3.0),
        ({f"{POD}/cpu.max": "max 100000\n", "kubepods/cpu.max": "100000 100000\n"}, f"0::/{POD}\n", 1.0),
        ({f"{POD}/cpu.max": "100000 100000\n", "kubepods/cpu.max": "300000 100000\n"}, f"0::/{POD}\n", 1.0),
        ({"other/cpu.max": "100000 100000\n"}, f"0::/{POD}\n", None),
        ({"cpu.max": "200000 100000\n"}, "0::/../../outside\n", 2.0),
        ({f"cpu/{POD}/{name.rpartition('/')[2]}": text for name, text in V1.items()}, f"4:cpu,cpuacct:/{POD}\n", 0.5),
        ({name.replace("cpu/", "cpu,cpuacct/"): text for name, text in V1.items()}, "4:cpu,cpuacct:/\n", 0.5),
        ({name.replace("cpu/", "cpuset/"): text for name, text in V1.items()}, "4:cpuset:/\n", None),
        ({"unified/a/cpu.max": "400000 100000\n"}, "1:memory:/a\n0::/a\n", 4.0),
        ({"cpu.max": "200000 100000\n"}, "no such form", 2.0),
    ],
)
def test_the_quota_of_a_container_is_found_in_both_versions_of_control_groups(
    files: dict[str, str], own: str | None, cores: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in files.items():
        (tmp_path / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "groups" / name).write_text(text)
    if own is not None:
        (tmp_path / "own").write_text(own)
    monkeypatch.setattr(machine, "CGROUPS", tmp_path / "groups")
    monkeypatch.setattr(machine, "OWN_CGROUPS", tmp_path / "own")
    assert machine.core_quota() == cores


def test_free_memory_is_what_is_available_within_the_control_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "MEMORY", tmp_path / "meminfo")
    monkeypatch.setattr(machine, "CGROUPS", tmp_path)
    monkeypatch.setattr(machine, "OWN_CGROUPS", tmp_path / "own")
    assert machine.free_memory() is None
    (tmp_path / "meminfo").write_text("MemTotal: 8000 kB\nMemAvailable: 3000 kB\n")
    assert machine.free_memory() == 3000 * 1024
    (tmp_path / "own").write_text("0::/job\n")
    (tmp_path / "job").mkdir()
    for limit, wanted in (("max", 3000 * 1024), ("1000000", 400_000), ("500000", 0)):
        (tmp_path / "job" / "memory.max").write_text(f"{limit}\n")
        (tmp_path / "job" / "memory.current").write_text("600000\n")
        assert machine.free_memory() == wanted
