"""Odd files and texts end in one clear error or are read: never a traceback, a hang, or memory without a bound."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from enginewright.ground.errors import ToolchainError
from tests.fuzz.readers import Reader, readers

TRIES, MANY = 2_000, 200_000
"""Inputs of all readers together, in the default suite and in the slow one."""

NAMES = (
    "recipe",
    "manifest",
    "interface",
    "report",
    "checked report",
    "baseline",
    "plan",
    "program",
    "search log",
    "mapped weights",
    "calibration",
    "adapter",
    "checkpoint",
    "shards",
    "onnx",
    "pt2 records",
    "pt2 bytes",
    "model string",
    "pass",
    "gate",
    "size",
)


@pytest.fixture(scope="module")
def every(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Reader]:
    found = readers(artifact, tmp_path_factory.mktemp("fuzz"))
    assert tuple(found) == NAMES
    return found


def attack(reader: Reader, share: float) -> None:
    """Feed a reader; fails with the smallest input that it does not answer in words."""
    count = max(10, round(share * reader.weight))

    @settings(
        max_examples=count,
        database=None,
        derandomize=True,
        deadline=None,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    @given(content=reader.files)
    def answers(content: bytes) -> None:
        folder = Path(tempfile.mkdtemp())
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                reader.read(folder, content)
        except ToolchainError as error:
            str(error).encode()
        except Exception as cause:
            pytest.fail(f"{type(cause).__name__}: {str(cause)[:200]} on {content[:300]!r}")
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    answers()


@pytest.mark.parametrize("name", NAMES)
def test_odd_input_is_answered_in_words(every: Mapping[str, Reader], name: str) -> None:
    attack(every[name], TRIES / sum(reader.weight for reader in every.values()))


@pytest.mark.slow
@pytest.mark.timeout(3_600)
@pytest.mark.parametrize("name", NAMES)
def test_much_odd_input_is_answered_in_words(every: Mapping[str, Reader], name: str) -> None:
    attack(every[name], MANY / sum(reader.weight for reader in every.values()))
