"""Every pass keeps the contract, whatever it does."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import onnx_ir as ir
import pytest
import torch
from pydantic import Field
from safetensors.torch import save_file

from enginewright import catalog, sources
from enginewright.ground.errors import ToolchainError
from enginewright.passes.contract import WORDS, AnyFacts, Context, Decision, Pass, Plan, as_json, cost, macs, without
from enginewright.passes.kernel.graph_module import GraphModule
from enginewright.passes.networks import networks_of
from enginewright.targets.pytorch_engine import flat
from enginewright.validation.inputs import draw
from tests.graphs import mixed

PARAMETERS: dict[str, dict[str, Any]] = {
    "adapters_as_inputs": {"layers": ("blocks.0.attn.proj",), "rank": 2},
    "distill": {"steps": 2},
    "approximate_by_accuracy": {"score": "smallness"},
    "select_heads": {"score": "smallness"},
    "fix_inputs": {"inputs": {"t": 500.0}},
    "fold_adapters": {"file": "adapter.safetensors", "alpha": 2.0},
    "fold_own_adapters": {"branch": "content"},
    "merge_models": {"teachers": ("1", "2"), "steps": 1, "batch": 1},
    "hoist_constants": {"constant": ["y"]},
    "merge_guidance": {"condition": "y", "none": 4, "scale": 3.0},
}
"""What passes are tried with where no default could fit every model, or would take too long."""

MODELS = {"fold_own_adapters": "splitflux:tiny"}
"""Passes that find nothing in ``dit:tiny``, and where they do."""

EXPORTED_OTHERWISE = {"hoist_constants"}
"""Passes that change what is exported, and nothing of what the module computes."""


OF_MODULES = [name for name in catalog.entries("passes") if catalog.pass_class(name).works_on == "module"]


def example_of(name: str) -> Pass:
    return catalog.pass_class(name)(**PARAMETERS.get(name, {}))


def model_and_context(step: type[Pass], folder: Path) -> tuple[torch.nn.Module, Context]:
    text = MODELS.get(step.name(), "dit:tiny") if step.works_on == "module" else f"onnx:{mixed(folder / 'm.onnx')}"
    model = sources.load(text)
    calls = [{k: torch.from_numpy(v) for k, v in draw(model.inputs, seed=i).items()} for i in range(2)]
    other = text if step.works_on == "module" else "dit:tiny"
    original = sources.load(other, seed=1).module  # of other weights, so that there is something to learn
    factors = {"lora_A": torch.ones(2, 32), "lora_B": torch.ones(32, 2)}
    adapter = {f"blocks.0.attn.proj.{half}.weight": tensor for half, tensor in factors.items()}
    save_file(adapter, folder / "adapter.safetensors")
    return model.module, Context(
        calibration=calls,
        example=calls[0],
        original=original,
        score_of=lambda text: smallness,
        teacher_of=lambda text: sources.load("dit:tiny", seed=int(text)).module,
        folder=folder,
    )


def smallness(module: torch.nn.Module) -> float:
    """A score that lets go of everything."""
    return -float(sum(parameter.numel() for parameter in module.parameters()))


def content(module: torch.nn.Module) -> object:
    """All that a pass could have changed: tensors, training mode, gradients; or the graph's bytes."""
    if isinstance(module, GraphModule):
        return ir.to_proto(module.graph).SerializeToString()
    tensors = {name: value.tolist() for name, value in module.state_dict().items()}
    return tensors, module.training, [(p.requires_grad, p.grad is None) for p in module.parameters()]


def places(module: torch.nn.Module) -> set[str]:
    """What a plan may name: module paths, or node names."""
    if isinstance(module, GraphModule):
        return {node.name or "" for node in module.graph.graph.all_nodes()}
    return {path for path, _ in module.named_modules()}


def last_of(module: torch.nn.Module) -> torch.nn.Module:
    """Of networks by timestep the last: the first may be the whole one."""
    return list(networks_of(module).values())[-1]


def call_after(step: Pass, plan: Plan, context: Context) -> dict[str, torch.Tensor]:
    """A call of the rewritten model: without the inputs that the pass took, and with those that it added.

    These are 2: at strength 1 a guided network gives what it gave unguided, but for rounding, which is a machine's own.
    """
    rows = len(next(iter(context.calibration[0].values())))
    new = {
        each.name: torch.full(each.shape if each.shared else (rows, *each.shape), 2.0) for each in step.new_inputs(plan)
    }
    return {**without(context, step.removed_inputs(plan)).calibration[0], **new}


@pytest.mark.parametrize("name", catalog.entries("passes"))
def test_every_pass_declares_what_it_decides_and_its_plans_keep_to_that(name: str, tmp_path: Path) -> None:
    step = example_of(name)
    assert step.decisions, "no kind of decision is declared"
    for kind in step.decisions:
        assert kind.__doc__
        assert all(field.description for field in kind.model_fields.values()), kind.__name__
        assert all(kind.arrays.values()), "each array says what it is"
    module, context = model_and_context(type(step), tmp_path)
    plan = step.planned(module, context)
    assert all(isinstance(decision, step.decisions) for decision in plan.choice.values())

    plan.write(tmp_path / "plan.json", by=step.declared)
    again = Plan.read(tmp_path / "plan.json", step.declared)
    assert (again.choice, again.skipped, again.digest()) == (dict(plan.choice), dict(plan.skipped), plan.digest())
    assert {path: type(decision) for path, decision in again.choice.items()} == {
        path: type(decision) for path, decision in plan.choice.items()
    }

    assert step.facts is not AnyFacts, "no kind of facts is declared"
    assert type(plan.facts) is type(again.facts) is step.facts
    assert all(field.description for field in step.facts.model_fields.values())
    stranger = {**plan.facts.as_json(), "notes": 5}
    with pytest.raises(ToolchainError, match=f"the facts of {name}") as caught:
        Plan.from_json(json.dumps({**json.loads(plan.as_json()), "facts": stranger}), plan.arrays, by=step.declared)
    assert caught.value.where == "facts.notes"

    path, decision = next(iter(plan.choice.items()))
    spoiled = replace(plan, choice={path: {**as_json(decision), "made_up": 1}})
    with pytest.raises(ToolchainError, match=f"a decision of {name} has no setting 'made_up'") as caught:
        step.declared.checked(replace(spoiled, arrays={}))
    assert caught.value.where == f"choice.{path}.made_up".replace("..", ".")
    if plan.arrays:
        with pytest.raises(ToolchainError, match=r"the plan lacks the array '|the adapter's tensors are not those"):
            step.carry_out(copy.deepcopy(module), replace(plan, arrays={}), Context())
    strange = replace(plan, arrays={**plan.arrays, f"{path}.made_up": torch.ones(1)})
    with pytest.raises(ToolchainError, match=rf"no decision of {name} declares the plan's array '.*made_up'"):
        step.declared.checked(strange)


@pytest.mark.parametrize("name", catalog.entries("passes"))
def test_plan_changes_nothing_and_rewrite_does_what_the_plan_says(name: str, tmp_path: Path) -> None:
    step = example_of(name)
    module, context = model_and_context(type(step), tmp_path)
    before = content(module)
    plan = step.plan(module, context)
    assert content(module) == before

    assert step.plan(module, context).digest() == plan.digest(), "planning twice gives two plans"
    assert plan.choice, "a pass that has nothing to do on the small model has no contract test"
    assert set(plan.choice) <= places(module)
    assert set(plan.skipped) <= places(module)
    assert not set(plan.choice) & set(plan.skipped)
    assert all(len(reason) > 5 for reason in plan.skipped.values())
    json.loads(plan.as_json())

    one = last_of(step.rewrite(copy.deepcopy(module), plan))
    read = Plan.from_json(plan.as_json(), plan.arrays, by=step.declared)
    two = last_of(step.rewrite(copy.deepcopy(module), read))
    call = context.calibration[0]
    after = call_after(step, plan, context)
    with torch.no_grad():
        calls = ((module, call), (one, after), (two, after))
        outputs = [flat(net(**inputs))[0] for net, inputs in calls]
    assert torch.equal(outputs[1], outputs[2])
    assert torch.equal(outputs[0], outputs[1]) == (name in EXPORTED_OTHERWISE), "the rewrite changed nothing"


@pytest.mark.parametrize("name", OF_MODULES)
def test_a_rewritten_model_is_pickled_and_copied_whole(name: str, tmp_path: Path) -> None:
    step = example_of(name)
    module, context = model_and_context(type(step), tmp_path)
    plan = step.plan(module, context)
    rewritten = step.rewrite(module, plan)
    torch.save(rewritten, tmp_path / "saved.pt")  # not pickle alone, which cannot write 8-bit floats
    others = [copy.deepcopy(rewritten), torch.load(tmp_path / "saved.pt", weights_only=False)]
    call = call_after(step, plan, context)
    with torch.no_grad():
        wanted = flat(rewritten(**call))[0]
        for parameter in rewritten.parameters():
            parameter.zero_()  # a copy that still asked its first would be seen
        for other in others:
            assert torch.equal(flat(other(**call))[0], wanted)
            assert [path for path, _ in other.named_modules()] == [path for path, _ in rewritten.named_modules()]


TRAINED = {"merge_models"}
"""Passes that come near what they intend, and do not reach it."""


@pytest.mark.parametrize("name", catalog.entries("passes"))
def test_a_changed_interface_gives_what_is_intended(name: str, tmp_path: Path) -> None:
    step = example_of(name)
    module, context = model_and_context(type(step), tmp_path)
    plan = step.plan(module, context)
    if step.new_inputs(plan) or step.removed_inputs(plan):
        held = content(module)
        intended, rewritten = step.intended(module, plan, context), step.rewrite(copy.deepcopy(module), plan)
        kept = without(context, step.removed_inputs(plan)).calibration[0]
        with torch.no_grad():
            before, after = (flat(net(**kept))[0] for net in (intended, rewritten))
        assert torch.allclose(after, before, atol=1e-5, rtol=1e-5) == (name not in TRAINED)
        assert content(module) == held


@pytest.mark.parametrize("name", catalog.entries("passes"))
def test_a_rewrite_never_writes_into_the_tensors_it_was_handed(name: str, tmp_path: Path) -> None:
    step = example_of(name)
    module, context = model_and_context(type(step), tmp_path)
    if isinstance(module, GraphModule):
        before = content(module)
        step.apply(module, context)
        assert content(module) == before
        return
    held = [(t, t.clone()) for t in (*module.parameters(), *module.buffers())]
    step.apply(module, context)
    assert all(torch.equal(tensor, copy) for tensor, copy in held)


@pytest.mark.parametrize("name", catalog.entries("passes"))
def test_layer_by_layer_is_the_same_as_all_at_once_where_a_pass_says_so(name: str, tmp_path: Path) -> None:
    step = example_of(name)
    module, context = model_and_context(type(step), tmp_path)
    if step.works_on == "graph" or not step.by_layer:
        return
    seen: list[torch.nn.Module] = []
    done = step.apply(copy.deepcopy(module), replace(context, offload=seen.append))
    at_once = step.rewrite(copy.deepcopy(module), done.plan)
    assert content(done.model) == content(at_once)
    assert seen == [done.model.get_submodule(path) for path in done.changed]


@pytest.mark.parametrize("name", catalog.entries("passes"))
def test_a_pass_refuses_what_it_does_not_work_on(name: str, tmp_path: Path) -> None:
    step = example_of(name)
    kinds = {"module": torch.nn.Linear(2, 2), "graph": sources.load(f"onnx:{mixed(tmp_path / 'm.onnx')}").module}
    del kinds[step.works_on]
    for other in kinds.values():
        with pytest.raises(ToolchainError, match=f"{name} works on {WORDS[step.works_on]}"):
            step.apply(other, Context(calibration=[{}]))


class Undeclared(Pass):
    """A pass of another package, written before passes declared decisions."""

    def plan(self, model: torch.nn.Module, context: Context) -> Plan:
        return Plan(choice={"first": {"by": 0.5}, "second": "drop"}, arrays={"anything": torch.ones(1)})

    def rewrite(self, model: torch.nn.Module, plan: Plan) -> torch.nn.Module:
        for path, entry in plan.choice.items():
            layer = model.get_submodule(path)
            by = entry["by"] if isinstance(entry, dict) else 0.0
            layer.bias = torch.nn.Parameter(layer.bias.detach() * by)
        return model


def test_a_pass_that_declares_nothing_works_as_it_did(tmp_path: Path) -> None:
    model = torch.nn.Sequential()
    model.add_module("first", torch.nn.Linear(2, 2))
    model.add_module("second", torch.nn.Linear(2, 2))
    step, again = Undeclared(), copy.deepcopy(model)
    bias = model.first.bias.detach().clone()
    result = step.apply(model, Context())
    result.plan.write(tmp_path / "plan.json", by=step.declared)
    read = Plan.read(tmp_path / "plan.json", step.declared)
    assert read.digest() == result.plan.digest()
    again = step.carry_out(again, read, Context())
    for net in (result.model, again):
        assert torch.equal(net.first.bias, bias * 0.5)
        assert not net.second.bias.any()


class Careless(Undeclared):
    """A pass that does not keep to what it declares."""

    class Halved(Decision):
        """What a bias is multiplied by."""

        by: float = Field(description="a factor")

    decisions: ClassVar[tuple[type[Decision], ...]] = (Halved,)


def test_a_plan_is_held_against_what_is_declared_before_it_is_carried_out() -> None:
    model = torch.nn.Sequential()
    model.add_module("first", torch.nn.Linear(2, 2))
    bias = model.first.bias
    with pytest.raises(ToolchainError, match="is 'drop'; it must be a table") as caught:
        Careless().apply(model, Context())
    assert caught.value.where == "choice.second"
    assert model.first.bias is bias, "nothing was carried out"


def test_cost_counts_by_hand() -> None:
    net = torch.nn.Linear(8, 4)
    found = cost(net, {"input": torch.zeros(3, 8)})
    assert (found.parameter_count, found.macs, found.bytes) == (36, 96, 144)


def test_a_mask_held_as_a_buffer_is_no_parameter() -> None:
    class Masked(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.line = torch.nn.Linear(4, 4)
            self.register_buffer("bias", torch.ones(1, 1, 64, 64, dtype=torch.bool).tril())
            self.register_buffer("bytes", torch.zeros(64, 64, dtype=torch.uint8))

    assert cost(Masked(), None).parameter_count == 20


def test_attention_is_counted_too() -> None:
    class Attention(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.scaled_dot_product_attention(x, x, x)

    assert macs(Attention(), {"x": torch.zeros(1, 2, 5, 4)}) == 2 * 2 * 5 * 5 * 4


class Convolutions(torch.nn.Module):
    """Nothing that most passes look for."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.LSTM(4, 4), torch.nn.Conv1d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x)[0].transpose(1, 2))


@pytest.mark.parametrize("name", catalog.entries("passes"))
def test_a_pass_that_changes_nothing_says_what_it_looked_for(name: str) -> None:
    settings = PARAMETERS.get(name, {}) | ({"condition": "x"} if name == "merge_guidance" else {})
    step = catalog.pass_class(name)(**settings)
    if step.works_on == "graph":
        return
    model, call = Convolutions().eval(), {"x": torch.ones(2, 3, 4)}
    context = Context(calibration=[call], example=call, original=model, score_of=lambda text: smallness)
    try:
        result = step.apply(model, context)
    except ToolchainError:
        return  # refused in words
    assert result.changed or result.plan.skipped, "neither changed nor left alone"
    assert all(len(reason) > 5 for reason in result.plan.skipped.values())
