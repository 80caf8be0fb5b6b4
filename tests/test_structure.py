"""The house rules that no tool checks: which room may import which, and that help stays light."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.conftest import ROOT

ROOMS = ("passes", "targets", "validation", "reports")


BENCHMARKS = ROOT / "reports" / "benchmarks"
"""Scripts, which stand on top of everything: they may import any room, and no room imports them."""


GROUND = "enginewright.ground"
"""What every room may import of the toolchain: it stands on nothing else of ours."""


def imports_of(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_do_not_import_one_another(room: str) -> None:
    files = [path for path in (ROOT / room).rglob("*.py") if path.parent != BENCHMARKS]
    assert files
    for path in files:
        for name in imports_of(path):
            if name.partition(".")[0] == "enginewright":
                assert name.startswith((f"enginewright.{room}", GROUND)), f"{path.relative_to(ROOT)} imports {name}"


COMMON = {"contract", "families", "kernel", "networks", "traits"}
"""What every family of passes may stand on."""


FAMILIES = sorted({path.parent.name for path in (ROOT / "passes").glob("*/*.py")} - COMMON)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_family_of_passes_imports_another(family: str) -> None:
    for path in (ROOT / "passes" / family).rglob("*.py"):
        for name in imports_of(path):
            if name.startswith("enginewright.passes."):
                assert name.split(".")[2] in {family, *COMMON}, f"{path.name} imports {name}"


def test_nothing_but_a_benchmark_imports_one() -> None:
    for room in (*ROOMS, "toolchain"):
        for path in (ROOT / room).rglob("*.py"):
            if path.parent.name != "benchmarks":
                assert not any(name.startswith("enginewright.reports.benchmarks") for name in imports_of(path)), path


def test_the_ground_stands_on_no_room_and_loads_no_torch() -> None:
    files = sorted((ROOT / "toolchain" / "ground").glob("*.py"))
    assert len(files) > 4
    for path in files:
        for name in imports_of(path):
            assert not name.startswith("enginewright") or name.startswith(GROUND), f"{path.name} imports {name}"
    modules = [f"{GROUND}.{path.stem}" for path in files if path.stem != "__init__"]
    code = f"import sys, {', '.join(modules)}; print(sorted({{'torch', 'onnx', 'pydantic'}} & sys.modules.keys()))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "arguments", [["--help"], ["list", "passes"], ["export", "--help"], ["export", "dit", "--pass", "nope"]]
)
def test_light_commands_import_no_backend(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        "from enginewright.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'onnx', 'onnxruntime', 'numpy', 'pydantic', 'rich', 'transformers', 'polygraphy'}\n"
        "print('LOADED', sorted(heavy & sys.modules.keys()))\n"
    )
    run = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "LOADED []"


def test_every_pass_target_metric_and_model_has_a_test_of_its_own() -> None:
    from enginewright import catalog

    tests = {path.name for path in (ROOT / "tests").rglob("test_*.py")}
    for kind in ("passes", "targets", "metrics", "models"):
        for entry in catalog.entries(kind).values():
            wanted = f"test_{entry.name.replace('-', '_')}.py", f"test_{entry.path.stem}.py"
            assert tests.intersection(wanted), f"{entry.path.relative_to(ROOT)} has no test"


def test_every_folder_is_packaged_under_one_name() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    left_out = {"toolchain/training", "reports/benchmarks", "reports/results", "reports/baselines", "reports/methods"}
    folders = {
        path.parent.relative_to(ROOT).as_posix()
        for room in (*ROOMS, "toolchain")
        for path in (ROOT / room).rglob("*.*")
        if path.suffix in (".py", ".toml", ".json", ".safetensors", ".wav", ".j2")
    }
    wanted = {
        ".".join(("enginewright", *folder.split("/"))).replace("enginewright.toolchain", "enginewright")
        for folder in folders - left_out
    }
    assert sorted(wanted) == project["packages"], "the list of packages in pyproject.toml"
    assert project["package-dir"] == {"enginewright": "toolchain"} | {f"enginewright.{room}": room for room in ROOMS}


def test_nothing_of_ours_is_imported_under_another_name() -> None:
    for path in ROOT.glob("**/*.py"):
        if ".venv" in path.parts or "build" in path.parts:
            continue
        for name in imports_of(path):
            assert name.partition(".")[0] not in ("toolchain", *ROOMS), f"{path.relative_to(ROOT)} imports {name}"


MODULES = {
    "nvidia-modelopt": "modelopt",
    "onnxruntime-gpu": "onnxruntime",
    "tensorrt-rtx-cu13": "tensorrt_rtx",
    "pillow": "PIL",
}
"""What is imported, where it is not called as its distribution is."""


def libraries_of(path: Path) -> set[str]:
    """Top names of what a file imports: by a statement, ``require``, ``import_module`` or a target's ``module``."""
    found = {name.partition(".")[0] for name in imports_of(path)}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("require", "import_module"):
                found.add(str(node.args[0].value).partition(".")[0])
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == "module":
            found |= {node.value.value} if isinstance(node.value, ast.Constant) else set()
    return found


def test_every_dependency_and_every_extra_is_imported() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    files = [path for room in (*ROOMS, "toolchain") for path in (ROOT / room).rglob("*.py")]
    imported = set().union(*map(libraries_of, files))
    extras = {name: needs for name, needs in project["optional-dependencies"].items() if name != "dev"}
    for extra, needs in {"": project["dependencies"], **extras}.items():
        for need in needs:
            name = re.split(r"[<>=\[]", need)[0]
            module = MODULES.get(name, name.replace("-", "_"))
            assert module in imported, f"{extra or 'dependencies'}: nothing imports {name}"
