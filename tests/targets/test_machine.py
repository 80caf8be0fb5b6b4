from __future__ import annotations

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
