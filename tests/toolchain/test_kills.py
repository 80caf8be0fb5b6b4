"""Kills at random moments and disks of random sizes: nothing that was there is lost, and nothing is left.

Each run is a child forked from a process that has imported and tried everything, so that it is as quick as the work.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from enginewright import artifact
from enginewright.cli import main
from enginewright.ground.errors import ToolchainError
from tests.conftest import ROOT
from tests.disks import disk, may_mount

pytestmark = pytest.mark.slow

TOYS, EXPORTS, WRITERS = 200, 40, 60
"""Kills: of the replacement alone, of whole exports, and of what writes single files; 300 in all."""

DISKS = 20

NET = """
import torch
from torch import nn

def build():
    torch.manual_seed(SEED)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)), {"input": torch.zeros(4, 64)}
"""


def child(work: Callable[[], object]) -> int:
    """Run in a forked process; its number."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            found = work()
            code = found if isinstance(found, int) else 0
        except ToolchainError:
            code = 2
        finally:
            os._exit(code)
    return pid


def ended(pid: int) -> int:
    """How a child ended: its exit code, or minus the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class Moments:
    """Random moments in the time that a run takes, which is learned: other work on the machine changes it."""

    def __init__(self, seconds: float, seed: int | str) -> None:
        self.seconds, self.chance = seconds, random.Random(seed)

    def draw(self) -> float:
        """Seconds after the start."""
        return self.chance.uniform(0, 1.1 * self.seconds)

    def learn(self, code: int) -> bool:
        """Whether a run that ended so was killed; one that came through was quicker than thought."""
        assert code in (0, -signal.SIGKILL)
        self.seconds *= 1.02 if code else 0.9
        return code != 0

    def kill(self, work: Callable[[], object]) -> bool:
        """Kill a child at such a moment; whether it was still at work."""
        pid = child(work)
        time.sleep(self.draw())
        os.kill(pid, signal.SIGKILL)
        return self.learn(ended(pid))


def taken(work: Callable[[], object]) -> float:
    """Seconds that a child takes."""
    began = time.perf_counter()
    assert ended(child(work)) == 0
    return time.perf_counter() - began


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def toy(out: Path, text: str) -> None:
    """An export whose work is done at once: most of its time goes into the replacement."""
    with artifact.staging(out, force=True) as folder:
        for number in range(4):
            (folder / f"{number}").write_text(text)
        artifact.write_manifest(folder, {})


def test_kills_around_the_replacement_of_an_artifact_lose_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    toy(out, "0")
    moments = Moments(taken(lambda: toy(out, "0")), 0)
    killed, last = 0, "0"
    while killed < TOYS:
        text = f"{killed + 1}"
        killed += moments.kill(lambda: toy(out, text))  # noqa: B023
        artifact.read_manifest(out)
        found = {(out / f"{number}").read_text() for number in range(4)}
        assert found in ({last}, {text})
        (last,) = found
        if killed % 20 == 0:
            toy(out, last)
            assert names(tmp_path) == ["out"]
    toy(out, last)
    assert names(tmp_path) == ["out"]
    print(f"{killed} kills")


FORKER = """
import json, os, signal, sys, time, traceback
from pathlib import Path
import onnxruntime, onnxscript, torch, torch.onnx
import enginewright.sources.py_source
from enginewright.targets import onnxruntime_engine
from enginewright import pipeline
from enginewright.ground.errors import ToolchainError
from enginewright.progress import Progress
from enginewright.recipe import make

def export(folder, out, seed):
    content = {
        "model": f"py:net{seed}.py:build",
        "targets": [{"target": "onnxruntime"}],
        "validation": {"skip": True, "threads": 1},
    }
    return pipeline.export(make(content, folder=Path(folder)), Path(out), force=True, progress=Progress(quiet=True))[1]

for line in sys.stdin:
    asked = json.loads(line)
    began = time.perf_counter()
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            code = export(*asked["export"])
        except ToolchainError as error:
            print(error, file=sys.stderr)
            code = error.exit_code
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    if asked["kill_after"] is not None:
        time.sleep(asked["kill_after"])
        os.kill(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    print(json.dumps([code, time.perf_counter() - began]), flush=True)
"""


class Forker:
    """A process that has imported everything and run nothing, so that children start at once and hold no locks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for seed in (0, 1):
            (folder / f"net{seed}.py").write_text(NET.replace("SEED", str(seed)))
        self.process = subprocess.Popen(
            [sys.executable, "-c", FORKER],
            env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def export(self, out: Path, seed: int, kill_after: float | None = None) -> tuple[int, float]:
        """Export in a child, killed at some time; how it ended, and its seconds."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        asked = {"export": [str(self.folder), str(out), seed], "kill_after": kill_after}
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        code, seconds = json.loads(self.process.stdout.readline())
        return code, seconds


@pytest.fixture
def forker(tmp_path: Path) -> Iterator[Forker]:
    found = Forker(tmp_path)
    with found.process:
        yield found
    assert found.process.returncode == 0


def test_kills_of_whole_exports_lose_nothing(forker: Forker, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    out = tmp_path / "here" / "out"
    code, seconds = forker.export(out, 0)
    assert code == 0
    moments, killed = Moments(seconds, 1), 0
    for number in range(10 * EXPORTS):
        if killed == EXPORTS:
            break
        before = (out / "recipe.toml").read_text()
        killed += moments.learn(forker.export(out, number % 2, moments.draw())[0])
        manifest = artifact.read_manifest(out)
        now = (out / "recipe.toml").read_text()
        assert now == before or f"net{number % 2}.py" in now
        assert {"model.onnx", "recipe.toml"} <= manifest["files"].keys()
    assert killed == EXPORTS
    assert forker.export(out, 0)[0] == 0
    assert names(tmp_path / "here") == ["out"]
    print(f"{killed} kills")


@pytest.mark.parametrize("command", ["report", "check"])
def test_kills_of_what_writes_single_files_lose_nothing(artifact_copy: Path, command: str) -> None:
    folder = artifact_copy.parent
    baseline = folder / "b.json"
    rendered = ("report.html", "report.md", "junit.xml")
    arguments = ["report", str(artifact_copy)]
    if command == "check":
        arguments = ["check", str(artifact_copy), "--baseline", str(baseline), "--update"]
    work = lambda: main([*arguments, "--quiet"])  # noqa: E731
    assert ended(child(work)) == 0
    moments = Moments(taken(work), command)
    whole = {name: (artifact_copy / name).read_bytes() for name in rendered}
    figures = json.loads(baseline.read_text()) if command == "check" else None
    killed = 0
    while killed < WRITERS // 2:
        killed += moments.kill(work)
        assert {name: (artifact_copy / name).read_bytes() for name in rendered} == whole
        assert figures is None or json.loads(baseline.read_text()) == figures
    assert ended(child(work)) == 0
    assert names(folder) == (["b.json", "out"] if command == "check" else ["out"])
    assert not [name for name in names(artifact_copy) if ".partial-" in name]
    print(f"{killed} kills")


@pytest.fixture
def artifact_copy(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    shutil.copytree(request.getfixturevalue("artifact"), tmp_path / "out")
    return tmp_path / "out"


def test_disks_of_random_sizes_keep_the_old_artifact_and_say_that_they_are_full(forker: Forker, tmp_path: Path) -> None:
    if not may_mount():
        pytest.skip("mounting needs root")
    chance = random.Random(2)
    (tmp_path / "here").mkdir()
    assert forker.export(tmp_path / "here" / "old", 0)[0] == 0
    # In pages of 4096 bytes, as a file system has them; a folder counts as one.
    sizes = [path.stat().st_size for path in (tmp_path / "here" / "old").rglob("*")]
    size = sum(4096 * (1 + size // 4096) for size in sizes)
    outcomes: list[int] = []
    while outcomes.count(2) < DISKS:
        number = len(outcomes)
        room = int(1.1 * size + chance.uniform(0, 1.0) * size) // 4096 * 4
        with disk(tmp_path / f"disk{number}", f"{room}k") as place:
            out = place / "out"
            shutil.copytree(tmp_path / "here" / "old", out)
            before = (out / "manifest.json").read_bytes()
            code, _ = forker.export(out, 1)
            outcomes.append(code)
            assert code in (0, 2), "a traceback, or a full disk that was taken for something else"
            artifact.read_manifest(out)
            assert ((out / "manifest.json").read_bytes() == before) == (code == 2)
            assert names(place) == ["out"]
            assert ended(child(lambda: main(["report", str(out), "--quiet"]))) in (0, 2)  # noqa: B023
            artifact.read_manifest(out)
            assert names(place) == ["out"]
        assert number < 10 * DISKS
    print(f"{outcomes.count(2)} of {len(outcomes)} were full")
