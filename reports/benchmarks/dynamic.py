"""What networks by timestep save: whole sampling runs of a DiT-B/2, cut by slice_width_by_timestep and not, in turns.

    python -m reports.benchmarks.dynamic [--samples N]

Weights are random: time and multiply-accumulates do not depend on them, quality is not measured here. A run is one
picture through every timestep of a short schedule in ONNX Runtime. Writes ``reports/results/dynamic.json``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from passes.contract import Context, macs
from passes.dynamic.slice_width_by_timestep import SliceWidthByTimestep
from passes.surgery import share
from targets.contract import Arrays, Runner
from targets.onnx_export import export_onnx
from targets.onnxruntime_engine import OnnxRuntime
from toolchain.environment import describe, versions
from toolchain.models.diffusion.dit import PUBLISHED, DiT
from toolchain.switching import Switching, parts_of, table_of
from validation.latency import summarise, time_interleaved

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
    runners = []
    for name, part in parts_of(model).items():
        path = folder / f"model{name}.onnx"
        export_onnx(part, call(999.0, 0), dynamic={}, outputs=["out"], path=path)
        runners.append(OnnxRuntime().open(path, THREADS))
    table = table_of(model)
    return Switching(runners, table) if table else runners[0]


def whole_run(runner: Runner, timesteps: Sequence[float]) -> Runner:
    """A runner that makes a call at every timestep."""

    def run(inputs: Arrays) -> Arrays:
        for t in timesteps:
            out = runner({**inputs, "t": np.asarray([t], np.float32)})
        return out

    return run


def measured(folder: Path, samples: int) -> dict[str, Any]:
    """Time, size and error of the cut networks beside the whole one."""
    model = randomised(DiT(PUBLISHED["B/2"]))
    step = SliceWidthByTimestep(share=SHARE, steps=STEPS, importance="activation", groups=12, rows=1)
    context = Context(example=call(999.0, 0), calibration=[call(float(t), i) for i, t in enumerate(step.schedule(), 1)])
    result = step.apply(share(model), context)
    cut = result.model.eval()
    runners = {"full": engine(model, folder / "full"), "cut": engine(cut, folder / "cut")}
    timesteps = result.plan.facts["timesteps"]
    error = 0.0
    for t in timesteps:
        inputs = call(t, 7)
        with torch.no_grad():
            wanted = cut(**inputs)
        found = torch.from_numpy(runners["cut"]({name: value.numpy() for name, value in inputs.items()})["out"])
        error = max(error, float((found - wanted).norm() / wanted.norm()))
    runs = {name: whole_run(runner, timesteps) for name, runner in runners.items()}
    noise = {name: value.numpy() for name, value in call(999.0, 8).items()}
    taken = time_interleaved(runs, noise, warm_up=1, samples=samples, seed=0)
    timed = summarise(taken["full"], taken["cut"], seed=0)
    keys = ("ratio", "ratio_low", "ratio_high", "median_s", "original_median_s", "spread", "warnings")
    facts = {name: value for name, value in result.plan.facts.items() if name.startswith("share") or name == "table"}
    return {
        "share": SHARE,
        "steps": STEPS,
        "threads": THREADS,
        "batch": 1,
        "bound_ratio": round(BOUND, 4),
        **{key: getattr(timed, key) for key in keys},
        "samples_s": {name: list(values) for name, values in taken.items()},
        **facts,
        "macs": macs(model, call(999.0, 0)),
        "cut_macs": result.after.macs,
        "bytes": result.before.bytes,
        "cut_bytes": result.after.bytes,
        "largest_relative_l2_from_pytorch": error,
    }


def main() -> None:
    """Measure, write and show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=8, help="timed runs of each")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        found = {"environment": describe(), "versions": versions(), "dit_b2": measured(Path(temporary), chosen.samples)}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
