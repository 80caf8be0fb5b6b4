"""A run that was killed goes on, and ends where it would have ended."""

import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from enginewright.ground.errors import ToolchainError
from enginewright.passes.contract import Context
from enginewright.passes.recovery import checkpoints
from enginewright.passes.recovery.distill import Distill
from tests.conftest import ROOT

SCRIPT = """
import sys, torch
from enginewright.passes.contract import Context
from enginewright.passes.recovery.distill import Distill
from enginewright.models.diffusion.dit import TINY, DiT

torch.set_num_threads(1)
torch.manual_seed(0)
teacher, student = DiT(TINY), DiT(TINY)
with torch.no_grad():
    for parameter in (*teacher.parameters(), *student.parameters()):
        parameter += 0.05 * torch.randn_like(parameter)

def draw(count, seed):
    sources = [torch.Generator().manual_seed(seed + i) for i in range(count)]
    rest = {"t": torch.ones(1), "y": torch.zeros(1).long()}
    return [{"x": torch.randn(1, 4, 8, 8, generator=source), **rest} for source in sources]

step = Distill(steps=24, batch=1, rank=2, features=1, stop="angle", checkpoint=sys.argv[1], checkpoint_every=2)
say = lambda done, total, text: print(done, flush=True)
print("digest", step.plan(student.eval(), Context(original=teacher.eval(), draw=draw, say=say)).digest(), flush=True)
"""


def start(folder):
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process):
    """The steps that a run did, and the digest of its plan."""
    out, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    *steps, last = out.splitlines()
    return [int(step) for step in steps], last.removeprefix("digest ")


def test_a_killed_run_ends_where_an_unbroken_one_does(tmp_path) -> None:
    whole = start(tmp_path / "whole")
    broken = start(tmp_path / "broken")
    lines = [broken.stdout.readline() for _ in range(8)]
    time.sleep(time.time() % 0.05)  # somewhere within a step, or while a checkpoint is written
    broken.kill()
    broken.communicate()
    assert int(lines[-1]) == 7
    assert (tmp_path / "broken" / checkpoints.FILE).exists()

    steps, digest = finish(start(tmp_path / "broken"))
    all_steps, expected = finish(whole)
    assert all_steps == list(range(24))
    assert 6 <= steps[0] < 23
    assert steps[0] % 2 == 0
    assert digest == expected


@pytest.fixture
def run(dit):
    """A short run, by its folder and settings."""

    def go(folder, **settings):
        student = dit.copy()
        with torch.no_grad():
            student.final_layer.linear.weight += 0.1
        said = []
        context = Context(
            calibration=[dit.inputs], original=dit.model, say=lambda done, total, text: said.append((done, total, text))
        )
        step = Distill(**{"steps": 4, "batch": 1, "checkpoint": str(folder), "checkpoint_every": 2, **settings})
        return step.plan(student, context), said

    return go


def test_a_finished_run_is_not_run_again(run, tmp_path) -> None:
    plan, said = run(tmp_path / "c")
    assert [(done, total) for done, total, _ in said] == [(i, 4) for i in range(4)]
    assert all("loss " in text and "s to go" in text for _, _, text in said)
    again, silent = run(tmp_path / "c")
    assert silent == []
    assert again.digest() == plan.digest()
    assert again.digest() == run("")[0].digest()
    assert [path.name for path in (tmp_path / "c").iterdir()] == [checkpoints.FILE]


def test_a_checkpoint_of_another_run_is_refused(run, tmp_path) -> None:
    run(tmp_path)
    with pytest.raises(ToolchainError, match=r"is of another run: lr\n") as caught:
        run(tmp_path, lr=0.5)
    assert "folder of its own" in caught.value.help
    run(tmp_path, checkpoint_every=1)  # how often it is kept does not matter


def test_what_is_no_checkpoint_is_refused(run, tmp_path) -> None:
    (tmp_path / checkpoints.FILE).write_bytes(b"\x08\x00\x00\x00")
    with pytest.raises(ToolchainError, match="not a whole checkpoint"):
        run(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / checkpoints.FILE)
    with pytest.raises(ToolchainError, match="is of another run"):
        run(tmp_path)


def test_a_checkpoint_holds_weights_optimizer_and_random_state(run, tmp_path) -> None:
    run(tmp_path, train=("final_layer.linear",))
    assert set(load_file(tmp_path / checkpoints.FILE)) == {
        "random",
        *(f"weight.final_layer.linear.{leaf}" for leaf in ("weight", "bias")),
        *(f"optimizer.{i}.{key}" for i in (0, 1) for key in ("step", "exp_avg", "exp_avg_sq")),
    }
