"""What IA-RED2's trained interpreters keep of ``vit:digits``: accuracy on 1,000 digits, and multiply-accumulates.

    python -m enginewright.reports.benchmarks.ia_red2

Two forms. Dynamic: each picture keeps the tokens that score above 0.5, so that its cost is its own; the mean is given.
Static: every picture keeps the same number at each border, which is what is exported (recipe ``ia-red2``). Pictures are
those that neither the network nor the interpreters were trained on; but the recipe's counts, and the schedule of the
interpreters' training, were chosen by what was lost on them, of a dozen that were tried. No times. Writes
``reports/results/ia_red2.json``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from enginewright import catalog, recipe, sources
from enginewright.models.blocks.digits import held_out
from enginewright.passes.contract import Context, Plan, macs
from enginewright.passes.kernel.surgery import share
from enginewright.passes.tokens.dropping import KeptCount
from enginewright.passes.tokens.policy import hide_tokens
from enginewright.passes.tokens.prune_tokens import PruneTokens

RESULTS = Path(__file__).resolve().parent.parent / "results" / "ia_red2.json"
SHOWN = 5
"""Digits whose keep-maps are written down."""


def step_of_recipe() -> tuple[PruneTokens, Path]:
    """The pass as the recipe ``ia-red2`` has it, and the folder that its paths start from."""
    found = recipe.read(catalog.entry("recipes", "ia-red2").path)
    step = found.steps[0]
    assert isinstance(step, PruneTokens)
    return step, found.folder


def classes_read(model: nn.Module, pictures: Tensor) -> Tensor:
    """Classes (n,) of pictures (n, 1, 28, 28)."""
    with torch.no_grad():
        return torch.cat([model(part).argmax(dim=1) for part in pictures.split(250)])


def dynamic(net: nn.Module, plan: Plan, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Classes (n,), and which tokens of each picture pass each border (n, borders, N), where each keeps its own."""
    model = share(net)
    steps = hide_tokens(model, plan)
    classes, kept = [], []
    for part in pictures.split(250):
        classes.append(classes_read(model, part))
        kept.append(torch.stack([step.kept for step in steps], dim=1))
    return torch.cat(classes), torch.cat(kept)


def cost(net: nn.Module, plan: Plan, counts: tuple[int, ...], picture: Tensor) -> int:
    """Multiply-accumulates of one picture that keeps so many tokens at each border, scores included."""
    kept = {path: KeptCount(count=count) for path, count in zip(plan.choice, counts, strict=True)}
    model = PruneTokens(method="policy").rewrite(share(net), Plan(choice=kept, arrays=plan.arrays))
    return macs(model, {"image": picture})


def measured() -> dict[str, Any]:
    """Both forms beside the untouched network."""
    model = sources.load("vit:digits")
    net = model.module
    pixels, labels = held_out()
    pictures, classes = torch.from_numpy(pixels), torch.from_numpy(labels)
    step, folder = step_of_recipe()
    plan = step.plan(net, Context(example={"image": pictures[:1]}, folder=folder))

    def accuracy(answers: Tensor) -> float:
        return round(float((answers == classes).double().mean()), 4)

    whole = macs(net, {"image": pictures[:1]})
    before = accuracy(classes_read(net, pictures))
    answers, kept = dynamic(net, plan, pictures)
    counts = kept.sum(dim=2)  # (n, borders)
    kinds, times = counts.unique(dim=0, return_counts=True)
    costs = [cost(net, plan, tuple(each), pictures[:1]) for each in kinds.clamp(min=1).tolist()]
    mean = sum(each * int(n) for each, n in zip(costs, times, strict=True)) / len(pictures)
    static = step.rewrite(share(net), plan)
    fixed = macs(static, {"image": pictures[:1]})

    def form(accuracy_after: float, macs_after: float) -> dict[str, Any]:
        return {
            "accuracy": accuracy_after,
            "lost_points": round(100 * (before - accuracy_after), 2),
            "macs": round(macs_after),
            "times_fewer": round(whole / macs_after, 3),
        }

    return {
        "model": "vit:digits",
        "pictures": len(pictures),
        "original": {"accuracy": before, "macs": whole},
        "dynamic": form(accuracy(answers), mean)
        | {
            "kept_mean": [round(float(each), 2) for each in counts.double().mean(dim=0)],
            "kept_least": counts.amin(dim=0).tolist(),
            "kept_most": counts.amax(dim=0).tolist(),
        },
        "static": form(accuracy(classes_read(static, pictures)), fixed) | {"kept": list(step.counts or ())},
        "maps": [
            {"class": int(classes[number]), "left": kept[number].sum(dim=0).unflatten(0, (7, 7)).tolist()}
            for number in range(SHOWN)
        ],
    }


def main() -> None:
    """Measure and write it down."""
    found = measured()
    RESULTS.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps({key: value for key, value in found.items() if key != "maps"}, indent=2))


if __name__ == "__main__":
    main()
