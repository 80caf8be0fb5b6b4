"""The wheel, installed outside the repository, does what the README documents."""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.test_readme import documented_commands, stand_in


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that the repository gains no build folder."""
    source = tmp_path_factory.mktemp("source")
    names = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in names.stdout.splitlines():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", out, source]
    subprocess.run(command, check=True, capture_output=True)
    return next(out.glob("enginewright-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command of a new environment with the wheel; the libraries are those of this one."""
    root = tmp_path_factory.mktemp("environment")
    venv.create(root, with_pip=False)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(root), "platbase": str(root)}))
    with zipfile.ZipFile(wheel) as file:
        file.extractall(packages)
    (packages / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    command = root / "bin" / "enginewright"
    command.write_text(f"#!{root}/bin/python\nimport sys\nfrom enginewright.cli import main\nsys.exit(main())\n")
    command.chmod(0o755)
    return command


def test_the_wheel_holds_weights_recipes_templates_and_no_tests(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for wanted in (
        "enginewright/models/weights/dit-digits.safetensors",
        "enginewright/recipes/dit-digits-int8.toml",
        "enginewright/reports/report.html.j2",
        "enginewright/targets/tensorrt_worker.py",
        "enginewright/models/weights/digits-reference.safetensors",
        "enginewright/models/weights/speech.wav",
        "enginewright/models/weights/glosses-test.txt",
        "enginewright/reports/methods/tnt.toml",
        "enginewright/reports/methods/tnt.json",
    ):
        assert wanted in names
    apart = ("reports/benchmarks/", "reports/results/", "reports/baselines/", "training/")
    assert not any(name.startswith(tuple(f"enginewright/{each}" for each in apart)) for name in names)
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"enginewright"}, "one name, and no other"
    folders = (ROOT / "toolchain" / "models" / "weights", ROOT / "toolchain" / "recipes")
    shipped = {path.name for folder in folders for path in folder.glob("*.safetensors")}
    assert {name.rpartition("/")[2] for name in names if name.endswith(".safetensors")} == shipped


def test_the_wheel_is_typed_and_says_what_it_is(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
        (place,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = file.read(place).decode()
    assert "enginewright/py.typed" in names
    assert "Classifier: Typing :: Typed" in metadata
    assert "Classifier: Programming Language :: Python :: 3.11" in metadata
    wanted = re.findall(r"Requires-Dist: (onnxruntime[\w-]*)(?: ?[<>=!~][^;]*)?(?:; extra == \"(\w+)\")?", metadata)
    assert sorted(wanted) == [("onnxruntime", "cpu"), ("onnxruntime-gpu", "gpu")], "each by choice, never both"


def test_no_module_that_runs_needs_what_the_wheel_leaves_out(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        for name in file.namelist():
            if name.endswith(".py"):
                text = file.read(name).decode()
                assert "enginewright.training" not in text, name
                assert "reports.benchmarks" not in text, name


def test_a_project_with_folders_of_our_rooms_names_keeps_them(installed: Path, tmp_path: Path) -> None:
    for room in ("toolchain", "passes", "targets", "validation", "reports"):
        (tmp_path / room).mkdir()
        (tmp_path / room / "__init__.py").write_text("OWN = True\n")
    code = (
        "import passes, reports, targets, toolchain, validation; import enginewright.passes.contract\n"
        "from enginewright.reports import words; from enginewright.validation import gates\n"
        "assert all(m.OWN for m in (passes, reports, targets, toolchain, validation))\n"
    )
    for call in (["-c", code], ["-m", "enginewright", "list", "passes"]):
        run = subprocess.run(
            [installed.parent / "python", *call], cwd=tmp_path, capture_output=True, text=True, check=False, env={}
        )
        assert run.returncode == 0, run.stderr


def test_every_documented_command_works_from_the_installed_wheel(installed: Path, tmp_path: Path) -> None:
    commands = documented_commands()
    assert len(commands) > 8
    used = {command[1] for command in commands}
    assert used >= {"export", "run", "bench", "compare", "check", "plan", "list", "show", "doctor"}
    stand_in(tmp_path)
    for command in commands:
        assert command[0] == "enginewright"
        draws = command[1:3] == ["export", "dit:digits"]
        fewer = ["--samples", "8"] if draws else []  # all else as documented; 200 take a minute each time
        run = subprocess.run(
            [installed, *command[1:], *fewer], cwd=tmp_path, capture_output=True, text=True, check=False, env={}
        )
        assert run.returncode == 0, f"{shlex.join(command)}\n{run.stdout}\n{run.stderr}"
    where = subprocess.run(
        [installed.parent / "python", "-c", "import enginewright; print(enginewright.__file__)"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        env={},
    )
    assert str(ROOT) not in where.stdout


def test_every_option_in_the_readme_is_one_that_exists() -> None:
    from enginewright.cli import parser

    text = (ROOT / "README.md").read_text()
    text = "\n".join(line for line in text.splitlines() if not line.startswith("pip "))
    known = {option for action in subparsers(parser()) for option in action._option_string_actions}
    for option in set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)):
        assert option in known, option


def subparsers(root: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    choices = [a.choices for a in root._actions if isinstance(a, argparse._SubParsersAction)]
    return [root, *(command for by_name in choices for command in by_name.values())]
