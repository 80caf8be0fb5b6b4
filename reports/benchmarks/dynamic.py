"""What dynamic networks save: whole sampling runs of a DiT-B/2, changed by a pass and not, in turns.

    python -m enginewright.reports.benchmarks.dynamic [--samples N] [--part NAME] [--output FILE]

Parts: ``dit_b2`` (slice_width_by_timestep), ``dit_b2_reuse`` (reuse_blocks), ``dit_b2_skip`` (skip_spatial_tokens).
Weights are random: time and multiply-accumulates do not depend on them, quality is not measured here. A run is one
picture through every timestep of a short schedule in ONNX Runtime. Writes ``reports/results/dynamic.json``, which
keeps the parts that were not measured again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from enginewright.environment import describe, versions
from enginewright.ground.driver import Driver
from enginewright.ground.runner import Runner
from enginewright.ground.signature import Arrays
from enginewright.models.diffusion.dit import PUBLISHED, DiT
from enginewright.passes.contract import Context, Pass, Result
from enginewright.passes.dynamic.reuse_blocks import ReuseBlocks
from enginewright.passes.dynamic.slice_width_by_timestep import SliceWidthByTimestep
from enginewright.passes.kernel.schedule import even
from enginewright.passes.kernel.surgery import share
from enginewright.passes.networks import networks_of, program_of
from enginewright.passes.tokens.skip_spatial_tokens import SkipSpatialTokens
from enginewright.targets.onnx_export import export_onnx
from enginewright.targets.onnxruntime_engine import OnnxRuntime
from enginewright.validation.latency import summarise, time_interleaved

RESULTS = Path(__file__).resolve().parent.parent / "results" / "dynamic.json"
THREADS = 2
STEPS = 6
SHARE = 0.5
BOUND = 1 / 1.7


def randomised(model: nn.Module) -> nn.Module:
    """Every matrix with values, those that start at zero too: else no layer would depend on the timestep."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    return model.eval()


def call(t: float, seed: int) -> dict[str, Tensor]:
    """One picture of noise at a timestep."""
    noise = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(seed))
    return {"x": noise, "t": torch.tensor([t]), "y": torch.tensor([seed % 1000])}


def engine(model: nn.Module, folder: Path) -> Runner:
    """The model in ONNX Runtime, switching where it is several networks."""
    folder.mkdir()
    runners = {}
    program = program_of(model)
    for name, network in networks_of(model).items():
        path, inputs = folder / f"model{name}.onnx", call(999.0, 0)
        inputs |= {state.name: torch.zeros(1, *state.shape) for state in program.read_by(name)}
        export_onnx(network, inputs, dynamic={}, outputs=["out", *program.networks[name].gives], path=path)
        runners[name] = OnnxRuntime().open(path, THREADS)
    return Driver(program=program, networks=runners)


def whole_run(runner: Runner, timesteps: Sequence[float]) -> Runner:
    """A runner that makes a call at every timestep."""

    def run(inputs: Arrays) -> Arrays:
        for t in timesteps:
            out = runner({**inputs, "t": np.asarray([t], np.float32)})
        return out

    return run


def applied(step: Pass, model: nn.Module) -> Result:
    """A pass on a model that shares the original's weights, calibrated on noise."""
    calibration = [call(t, seed) for seed, t in enumerate(even(STEPS), 1)]
    return step.apply(share(model), Context(example=call(999.0, 0), calibration=calibration))


def measured(folder: Path, samples: int, model: nn.Module, result: Result) -> dict[str, Any]:
    """Time, size and error of the changed networks beside the whole one."""
    folder.mkdir()
    changed = result.model.eval()
    runners = {"full": engine(model, folder / "full"), "cut": engine(changed, folder / "cut")}
    timesteps = even(STEPS)
    error = 0.0
    for t in timesteps:
        inputs = call(t, 7)
        with torch.no_grad():
            wanted = changed(**inputs)
        found = torch.from_numpy(runners["cut"]({name: value.numpy() for name, value in inputs.items()})["out"])
        error = max(error, float((found - wanted).norm() / wanted.norm()))
    runs = {name: whole_run(runner, timesteps) for name, runner in runners.items()}
    noise = {name: value.numpy() for name, value in call(999.0, 8).items()}
    taken = time_interleaved(runs, noise, warm_up=1, samples=samples, seed=0)
    timed = summarise(taken["full"], taken["cut"], seed=0)
    keys = ("ratio", "ratio_low", "ratio_high", "median_s", "original_median_s", "spread", "warnings")
    return {
        "steps": STEPS,
        "threads": THREADS,
        "batch": 1,
        **{key: getattr(timed, key) for key in keys},
        "samples_s": {name: list(values) for name, values in taken.items()},
        "macs": result.before.macs,
        "cut_macs": result.after.macs,
        "bytes": result.before.bytes,
        "cut_bytes": result.after.bytes,
        "largest_relative_l2_from_pytorch": error,
    }


def sliced(folder: Path, samples: int, model: nn.Module) -> dict[str, Any]:
    """Networks by timestep."""
    step = SliceWidthByTimestep(share=SHARE, steps=STEPS, importance="activation", groups=12, rows=1)
    result = applied(step, model)
    facts = {
        name: value
        for name, value in result.plan.facts.as_json().items()
        if name.startswith("share") or name == "table"
    }
    return {"share": SHARE, "bound_ratio": round(BOUND, 4), **measured(folder, samples, model, result), **facts}


def reusing(folder: Path, samples: int, model: nn.Module) -> dict[str, Any]:
    """Half of the blocks left out at two steps of three."""
    result = applied(ReuseBlocks(interval=3, steps=STEPS, rows=1), model)
    facts = {"table": list(result.plan.facts.table), "blocks": result.plan.choice["blocks"].blocks}
    return {"interval": 3, **measured(folder, samples, model, result), **facts}


def skipping(folder: Path, samples: int, model: nn.Module) -> dict[str, Any]:
    """Feed-forwards on half of the tokens."""
    result = applied(SkipSpatialTokens(ratio=SHARE), model)
    return {"skipped_ratio": SHARE, **measured(folder, samples, model, result)}


PARTS: dict[str, Callable[[Path, int, nn.Module], dict[str, Any]]] = {
    "dit_b2": sliced,
    "dit_b2_reuse": reusing,
    "dit_b2_skip": skipping,
}


def main() -> None:
    """Measure, write and show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=8, help="timed runs of each")
    parser.add_argument("--part", choices=PARTS, action="append", help="what to measure; default: all")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where to write")
    chosen = parser.parse_args()
    model = randomised(DiT(PUBLISHED["B/2"]))
    found = json.loads(chosen.output.read_text()) if chosen.output.exists() else {}
    for name in chosen.part or PARTS:
        with tempfile.TemporaryDirectory() as temporary:
            part = PARTS[name](Path(temporary) / name, chosen.samples, model)
        found[name] = {"environment": describe(), "versions": versions(), **part}
    chosen.output.parent.mkdir(exist_ok=True)
    chosen.output.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
