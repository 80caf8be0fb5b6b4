"""How runs end that nobody foresaw: never in 1, which says that a gate was missed."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest

from enginewright import cli, commands
from enginewright.ground.errors import FaultsError, InternalError, ToolchainError, UnavailableError
from enginewright.progress import Progress

Out = pytest.CaptureFixture[str]


@pytest.fixture
def raising(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make ``doctor`` raise something."""

    def arrange(error: BaseException) -> None:
        def fail(chosen: Any) -> int:
            with Progress(quiet=True).stage("step 2: quantize_int8"):
                raise error

        monkeypatch.setattr(commands, "doctor_command", fail)

    return arrange


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("unheard of"), "unheard of"),
        (AssertionError(), "AssertionError"),
        (RecursionError("maximum recursion depth exceeded"), "nested too deeply"),
        (MemoryError(), "memory ran out"),
        (KeyError("blocks.0"), "blocks.0"),
        (OSError("4096 requested and 0 written"), "4096 requested"),
        (InternalError("two tensors were lost", where="step 2 (prune_heads)"), "step 2 (prune_heads)"),
    ],
)
def test_a_fault_of_ours_ends_in_70_and_says_so(error: Exception, said: str, raising: Any, capsys: Out) -> None:
    raising(error)
    assert cli.main(["doctor"]) == 70
    told = capsys.readouterr().err
    assert "this is a bug in enginewright, not in your input" in told
    assert said in told
    assert "please report it" in told
    assert "Traceback" in told
    assert "step 2" in told


def test_as_json_it_brings_the_whole_traceback(raising: Any, capsys: Out) -> None:
    raising(ValueError("unheard of"))
    assert cli.main(["doctor", "--json"]) == 70
    (fault,) = json.loads(capsys.readouterr().out)["errors"]
    assert "unheard of" in fault["message"]
    assert fault["where"] == "while: step 2: quantize_int8"
    assert "test_failing.py" in fault["traceback"]


def test_the_traceback_is_short_unless_it_is_asked_for(
    raising: Any, capsys: Out, monkeypatch: pytest.MonkeyPatch
) -> None:
    def deep(depth: int) -> None:
        if depth:
            deep(depth - 1)
        raise ValueError("at the bottom")

    def fail(chosen: Any) -> int:
        deep(30)
        return 0

    monkeypatch.setattr(commands, "doctor_command", fail)
    assert cli.main(["doctor"]) == 70
    short = capsys.readouterr().err
    monkeypatch.setenv("ENGINEWRIGHT_DEBUG", "1")
    assert cli.main(["doctor"]) == 70
    whole = capsys.readouterr().err
    assert short.count("deep(depth - 1)") < 6 < whole.count("\n") / 2
    assert "cli.py" in whole
    assert "cli.py" not in short


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (IsADirectoryError(errno.EISDIR, "Is a directory", "out"), "'out' cannot be used: it is a folder"),
        (OSError(errno.EROFS, "Read-only file system", "out"), "can only be read from"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "x" * 5000), "the name is too long"),
        (PermissionError(errno.EACCES, "Permission denied", "out"), "permission denied"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "file/x"), "a part of the path is a file"),
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (ValueError("open: embedded null character in path"), "NUL character"),
        (ToolchainError("keep is 0"), "keep is 0"),
    ],
)
def test_what_the_system_says_of_a_path_ends_in_2_in_words(
    error: Exception, said: str, raising: Any, capsys: Out
) -> None:
    raising(error)
    assert cli.main(["doctor", "--json"]) == 2
    told = capsys.readouterr()
    assert said in told.err
    assert "Traceback" not in told.err
    assert len(told.err) < 400
    assert said in json.loads(told.out)["errors"][0]["message"]


def test_several_reasons_of_one_kind_keep_their_code() -> None:
    assert FaultsError([UnavailableError("a"), UnavailableError("b")]).exit_code == 3
    assert FaultsError([UnavailableError("a"), ToolchainError("b")]).exit_code == 2


def test_an_output_folder_inside_a_file_is_refused_before_any_work(tmp_path: Path, capsys: Out) -> None:
    (tmp_path / "file").write_text("")
    assert cli.main(["export", "dit:tiny", "-o", str(tmp_path / "file" / "x")]) == 2
    told = capsys.readouterr().err
    assert "a part of its path is no folder" in told
    assert "load" not in told
    assert cli.main(["export", "dit:tiny", "-o", str(tmp_path / ("y" * 300))]) == 2
    assert "too long" in capsys.readouterr().err


def test_a_reader_that_has_gone_does_not_change_how_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    import subprocess
    import sys

    from tests.conftest import ROOT

    code = (
        "import sys, time; from argparse import Namespace; from enginewright.commands import answer; "
        "answer(Namespace(json=False), {}, lambda: print('x' * 100000)); sys.exit(7)"
    )
    command = f'{sys.executable} -c "{code}" | true; exit ${{PIPESTATUS[0]}}'
    run = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (7, "")
