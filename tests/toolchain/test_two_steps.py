"""One step after another: each learns from, is judged by, and reaches what the steps before it left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import enginewright
from enginewright import pipeline
from enginewright.ground.errors import INTERNAL, InternalError, ToolchainError
from enginewright.passes.networks import Networks, networks_of
from enginewright.passes.pruning.prune_heads import PruneHeads
from enginewright.pipeline import Run
from enginewright.progress import Progress
from enginewright.recipe import Recipe, make, read
from enginewright.targets.pytorch_engine import flat

QUIET = Progress(quiet=True)
Steps = list[dict[str, Any]]


def step(name: str, **settings: Any) -> dict[str, Any]:
    return {"pass": name, **settings}


def recipe(*steps: dict[str, Any], folder: Path = Path(), targets: tuple[str, ...] = ()) -> Recipe:
    content = {
        "model": "dit:tiny",
        "steps": list(steps),
        "targets": [{"target": name} for name in targets],
        "calibration": {"calls": 3},
        "validation": {"skip": True, "threads": 1},
    }
    return make(content, folder=folder)


def done(*steps: dict[str, Any], folder: Path = Path()) -> tuple[Run, nn.Module]:
    run = Run(recipe(*steps, folder=folder), QUIET)
    return run, run.optimize()


def call_of(run: Run, *, t: float | None = None, rows: int = 3) -> dict[str, Tensor]:
    """A call as the engines of a run are called, whatever was added steered by full strength."""
    call = run.example(run.exported, batch=rows)
    if t is not None:
        call["t"] = torch.full_like(call["t"], t)
    return {name: torch.ones_like(value) if name.startswith("pag_") else value for name, value in call.items()}


def first(module: nn.Module, call: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return flat(module(**call))[0]


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


# A model that is several networks: engines are made of these one by one

SLICE = step("slice_width_by_timestep", buckets=2, steps=6, importance="activation", share=0.7)
WHOLE_HEADS = {**SLICE, "exclude": ["*.attn"]}
WRAPPED: dict[str, Steps] = {
    "guidance, baked in": [SLICE, step("merge_guidance", none=4, fixed=True, scale=7.0)],
    "guidance, as an input": [SLICE, step("merge_guidance", none=4)],
    "guidance before": [step("merge_guidance", none=4), SLICE],
    "guidance in every bucket": [step("mixture_of_blocks"), step("merge_guidance", none=4, scale=7.0, fixed=True)],
    "perturbed heads": [WHOLE_HEADS, step("perturb_heads", u=1.0)],
    "perturbed heads of one network": [
        WHOLE_HEADS,
        step("perturb_heads", heads={"networks.0.*": [0]}, guidance=True),
    ],
    "perturbed heads, guided": [WHOLE_HEADS, step("perturb_heads", u=1.0, guidance=True, w=3.0)],
    "a class": [SLICE, step("fix_inputs", inputs={"y": 2})],
    "half precision": [SLICE, step("convert_dtype")],
    "half precision of reused blocks": [step("reuse_blocks", steps=6), step("convert_dtype")],
}


@pytest.mark.parametrize("case", WRAPPED)
def test_what_a_step_does_to_the_whole_reaches_each_network_that_is_exported(case: str) -> None:
    run, module = done(*WRAPPED[case])
    assert isinstance(module, Networks)
    for name, network in networks_of(module).items():
        call = call_of(run, t=module.program.time_of(name))
        wanted = first(module, call)
        own = flat(network(**call))
        assert all(tensor.dtype == torch.float32 for tensor in own), "as the interface says"
        if "reused" not in case:  # there the module walks, and its second network takes what the first left
            assert torch.equal(own[0], wanted)
    mixed = call_of(run)
    mixed["t"] = torch.tensor([700.0, 10.0, 990.0])
    rows = [first(module, {name: value[i : i + 1] for name, value in mixed.items()}) for i in range(3)]
    torch.testing.assert_close(first(module, mixed), torch.cat(rows), atol=2e-3 if "half" in case else 1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("case", WRAPPED)
def test_engines_do_what_the_module_does_after_a_step_on_the_whole(case: str, tmp_path: Path) -> None:
    steps = WRAPPED[case]
    run, module = done(*steps)
    pipeline.export(recipe(*steps, targets=("onnxruntime",)), tmp_path / "out", force=False, progress=QUIET)
    engine = enginewright.load(tmp_path / "out", threads=1)
    call = call_of(run, t=700.0)
    found = engine(**call)
    found = found if isinstance(found, Tensor) else found[0]
    assert found.dtype == torch.float32
    assert apart(found, first(module, call)) < (5e-3 if "half" in case else 1e-5)
    _, before = done(*steps[:1])
    if not case.startswith(("a class", "half", "guidance before")):
        plain = {name: value for name, value in call.items() if name in ("x", "t", "y")}
        assert apart(found, first(before, plain)) > 1e-3, "the last step is in the engine"


def test_the_input_that_chooses_the_network_cannot_be_bound() -> None:
    with pytest.raises(ToolchainError, match="t chooses the network, of which there are 2"):
        done(SLICE, step("fix_inputs", inputs={"t": 500.0}))


def test_guided_rows_and_their_bound_condition() -> None:
    run, module = done(step("merge_guidance", none=4, scale=3.0), step("fix_inputs", inputs={"y": 2}))
    for rows in (1, 3):
        call = run.example(run.intended, batch=rows)
        torch.testing.assert_close(first(module, call), first(run.intended.module, call), atol=1e-5, rtol=0)
    assert "with the condition and without" in run.results[1][1].plan.skipped["y_embedder"]


# What steps learn from and are judged by

TRAIN = step("distill", steps=6, batch=2, lr=3e-4)
FIXED = step("fix_inputs", inputs={"y": 2})
MEANT: dict[str, Steps] = {
    "an adapter": [step("fold_adapters", file="lora.safetensors", alpha=2.0)],
    "guidance": [step("merge_guidance", none=4)],
    "an earlier state": [step("cut_after", layer=1)],
    "a perturbation": [step("perturb_heads", u=1.0)],
    "fixed inputs": [FIXED],
    "merged models": [step("merge_models", teachers=["a.safetensors", "b.safetensors"], steps=1, batch=1)],
}


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """An adapter, and two checkpoints of ``dit:tiny``."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"lora_A": (2, 32), "lora_B": (32, 2)}
    halves = {
        f"blocks.0.attn.proj.{half}.weight": torch.randn(size, generator=generator) for half, size in sizes.items()
    }
    save_file(halves, tmp_path / "lora.safetensors")
    for seed, name in enumerate("ab"):
        weights = Run(make({"model": "dit:tiny", "seed": seed}), QUIET).model.module.named_parameters()
        save_file({key: value.detach().clone() for key, value in weights}, tmp_path / f"{name}.safetensors")
    return tmp_path


@pytest.mark.parametrize("case", MEANT)
def test_distilling_does_not_train_away_what_a_step_means_to_change(case: str, files: Path) -> None:
    run, module = done(*MEANT[case], TRAIN, folder=files)
    _, untrained = done(*MEANT[case], folder=files)
    error = run.results[-1][1].plan.facts.relative_error
    if case != "merged models":  # which come near what they intend, and do not reach it
        assert error["before"] < 1e-6, "it learns from what the step before means to give"
    call = run.example(run.intended, batch=3)
    wanted, before = first(run.intended.module, call), first(untrained, call)
    assert apart(first(module, call), wanted) <= max(apart(before, wanted), 1e-6)
    plain = run.example(batch=3) | call
    if case == "fixed inputs":
        plain["y"] = torch.full_like(plain["y"], 2)
    else:
        assert apart(wanted, first(run.model.module, plain)) > 1e-3, "the step means to change something"


@pytest.mark.parametrize(
    "judged",
    [
        step("approximate_by_accuracy", score="fidelity", tolerance=0.5),
        step("prune_depth", method="greedy", share=0.5),
        step("select_heads", mode="prune"),
        step("distill", steps=1, batch=1, teachers=[{"model": "dit:tiny", "output": 1.0}]),
    ],
    ids=lambda one: one["pass"],
)
def test_a_step_after_fixed_inputs_judges_by_calls_without_them(judged: dict[str, Any]) -> None:
    run, module = done(FIXED, judged)
    call = run.example(run.intended, batch=2)
    assert set(call) == {"x", "t"}
    assert first(module, call).shape == (2, 8, 8, 8)


def test_an_earlier_state_is_compared_with_the_originals_own_though_blocks_are_gone() -> None:
    run, module = done(step("prune_depth", share=0.5), step("cut_after", layer=-1))
    assert len(module.blocks) == 1  # type: ignore[arg-type]
    assert len(run.intended.module.blocks) == 2  # type: ignore[arg-type]


def test_what_a_run_is_compared_with_is_made_once(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from enginewright.passes.specialize.fold_adapters import FoldAdapters

    made: list[int] = []
    original = FoldAdapters.intended
    monkeypatch.setattr(FoldAdapters, "intended", lambda *given: made.append(1) or original(*given))
    run, _ = done(step("fold_adapters", file="lora.safetensors", alpha=2.0), step("prune_heads"), folder=files)
    assert run.intended is run.intended
    assert run.exported.module is run.intended.module
    assert made == [1]


def test_training_that_does_harm_is_undone_and_said() -> None:
    run, module = done(step("prune_heads", share=0.5), step("distill", steps=2, batch=1, lr=1.0, warm_up=0))
    _, before = done(step("prune_heads", share=0.5))
    plan = run.results[1][1].plan
    assert plan.choice == {}
    assert plan.facts.notes[0].startswith("training made it worse")
    call = run.example(batch=2)
    assert torch.equal(first(module, call), first(before, call))


def test_routers_of_tokens_are_trained_by_distilling() -> None:
    train = step("distill", steps=2, batch=2, lr=1e-4, data="calibration")
    run, _ = done(step("skip_spatial_tokens", ratio=0.75), train)
    assert any(path.endswith("router.products") for path in run.results[1][1].plan.choice)


# What goes wrong


def test_a_fault_of_ours_names_the_step_and_keeps_its_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise KeyError("heads")

    monkeypatch.setattr(PruneHeads, "plan", broken)
    asked = recipe(step("prune_width"), step("prune_heads"))
    for work in (lambda: pipeline.decide(asked, QUIET), lambda: Run(asked, QUIET).optimize()):
        with pytest.raises(InternalError) as caught:
            work()
        text = str(caught.value)
        assert "KeyError: 'heads'" in text
        assert "step 2 (prune_heads); steps before it: prune_width" in text
        assert "a bug of ours" in text
        assert isinstance(caught.value.__cause__, KeyError)
        assert caught.value.__cause__.__traceback__ is not None
        assert caught.value.exit_code == INTERNAL == 70
    assert not isinstance(caught.value, ToolchainError), "no user can mend it"


def test_steps_that_exclude_each_other_say_so_and_no_advice_goes_in_a_circle() -> None:
    for pair in (("quantize_int8", "search_precision"), ("search_precision", "quantize_int8")):
        with pytest.raises(ToolchainError, match="they exclude each other") as caught:
            recipe(*map(step, pair))
        assert "change their order" not in str(caught.value)


def test_a_wrong_order_names_what_is_lost_and_the_order_that_goes() -> None:
    with pytest.raises(ToolchainError) as caught:
        recipe(step("quantize_int8"), step("prune_heads"))
    assert (
        "prune_heads cannot come after quantize_int8, which leaves quantized weights: it needs weights in floats"
        in str(caught.value)
    )
    assert "change their order: prune_heads, quantize_int8" in str(caught.value)
    with pytest.raises(
        ToolchainError, match="distill cannot come after reuse_blocks, which leaves a state between calls"
    ):
        recipe(step("reuse_blocks"), step("distill"))
    with pytest.raises(ToolchainError, match="a recipe can hold it once"):
        recipe(step("quantize_int8"), step("quantize_int8"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (step("approximate_by_accuracy"), "needs a score, or losses"),
        (step("approximate_by_accuracy", score="fidelity"), "can leave nothing out"),
        (step("select_heads"), "needs a score of what guidance is to raise; none is given"),
        (step("select_heads", score="fidelity"), "fidelity is best where a perturbation does least"),
    ],
)
def test_a_search_without_a_score_is_refused_before_any_work(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ToolchainError, match=message) as caught:
        recipe(settings)
    assert "def FUNCTION(module) -> float" in str(caught.value)


def test_blocks_behind_another_pass_are_said_to_be_out_of_reach() -> None:
    for earlier in (step("merge_tokens", r=2), step("reuse_blocks", steps=4)):
        run, _ = done(earlier, step("prune_depth"))
        plan = run.results[1][1].plan
        assert plan.choice == {}
        assert any("before" in reason for reason in plan.skipped.values())


# A recipe in another folder

SCORED = "def score(module):\n    return -float(sum(p.numel() for p in module.parameters()))\n"
LOSSES = "import torch\ndef losses(module):\n    return torch.zeros(2) + sum(p.numel() for p in module.parameters())\n"
HOLDING_PATHS: dict[str, Steps] = {
    "prune_depth": [step("prune_depth", method="greedy", score="mine/score.py:score")],
    "approximate_by_accuracy": [step("approximate_by_accuracy", score="mine/score.py:score", gate=0)],
    "approximate_by_accuracy, losses": [step("approximate_by_accuracy", losses="mine/score.py:losses", gate=0)],
    "select_heads": [step("select_heads", mode="prune", score="mine/score.py:score", log="mine/log.jsonl")],
    "fold_adapters": [step("fold_adapters", file="lora.safetensors", alpha=2.0)],
    "adapters_as_inputs": [step("adapters_as_inputs", files=["lora.safetensors"], alpha=2.0)],
    "distill": [step("prune_heads", share=0.5), {**TRAIN, "checkpoint": "mine/kept", "data": "calibration"}],
    "prune_tokens": [
        step("prune_tokens", method="policy", borders=[1], counts=[8], weights="mine/interpreters.safetensors")
    ],
    "merge_models": [step("merge_models", teachers=["a.safetensors", "b.safetensors"], steps=1, batch=1)],
}


def interpreters() -> dict[str, Tensor]:
    """What ``prune_tokens`` fits, as another run may have trained it."""
    recorded = done(step("prune_tokens", method="policy", borders=[1], counts=[8]))[0].results[0][1].plan.arrays
    return {name: array + 0.1 for name, array in recorded.items()}


@pytest.mark.parametrize("case", HOLDING_PATHS)
def test_a_recipe_written_elsewhere_does_the_same_again(
    case: str, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (files / "mine").mkdir()
    (files / "mine" / "score.py").write_text(SCORED + LOSSES)
    save_file(interpreters(), files / "mine" / "interpreters.safetensors")
    elsewhere = files / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    asked = recipe(*HOLDING_PATHS[case], folder=files)
    before = pipeline.decide(asked, QUIET)
    out = files / "deep" / "out"
    out.mkdir(parents=True)
    (out / "recipe.toml").write_text(asked.moved(out).as_toml())
    again = pipeline.decide(read(out / "recipe.toml"), QUIET)
    assert [one.plan.choice for one in again] == [one.plan.choice for one in before]
    assert [dict(one.plan.skipped) for one in again] == [dict(one.plan.skipped) for one in before]
    assert not list(elsewhere.iterdir()), "nothing is written where the command was typed"


def test_every_parameter_that_holds_a_path_is_in_that_test() -> None:
    from enginewright import catalog

    words = ("file", "folder", "model string", "log")
    found = {
        name
        for name in catalog.entries("passes")
        for field in catalog.pass_class(name).model_fields.values()
        if any(word in (field.description or "").lower().replace(",", " ").split() for word in words)
        or ".py" in (field.description or "")
    }
    assert found <= {case.partition(",")[0] for case in HOLDING_PATHS}
