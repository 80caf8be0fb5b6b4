"""Passes that change how a model is called, on programs whose networks pass values on, share them, or keep a state.

What a call of several networks must give is put together here from calls of the untouched program alone.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from enginewright.added import with_inputs
from enginewright.ground.driver import Driver, Memory
from enginewright.ground.errors import ToolchainError
from enginewright.ground.program import Call, Network, Program, StateTensor, Way, in_turn
from enginewright.ground.signature import Dim, InputSpec, Signature
from enginewright.models.blocks.transformer import Block, SelfAttention
from enginewright.passes.contract import Context, Pass, Plan, Result
from enginewright.passes.heads.perturb_heads import PerturbHeads
from enginewright.passes.kernel.rows import repeated_rows
from enginewright.passes.kernel.surgery import share
from enginewright.passes.kernel.twofold import twofold
from enginewright.passes.networks import Networks, networks_of, program_of
from enginewright.passes.specialize.binding import bind
from enginewright.passes.specialize.bound_networks import constant_networks, held_by
from enginewright.passes.specialize.fix_inputs import ConstantNetwork, FixInputs
from enginewright.passes.specialize.merge_guidance import MergeGuidance
from enginewright.programs import called_as, graph_of
from enginewright.sources.contract import Model
from enginewright.targets.onnx_export import export_onnx
from enginewright.tracing import axes_of, sizes_of
from enginewright.validation.inputs import draw
from tests.matrix.test_passes_on_models import raw

W = 16
BATCH = Dim(name="batch", low=1, typical=2, high=8)
INPUTS = (
    InputSpec(name="x", shape=(BATCH, 5, W)),
    InputSpec(name="text", shape=(BATCH, 4, W)),
    InputSpec(name="y", shape=(BATCH,), dtype="int64", low=0, high=5),
    InputSpec(name="places", shape=(5,), dtype="int64", low=0, high=5),
)
POSITION = InputSpec(name="position", shape=(), dtype="int64", low=0, high=9, default=0)


class Reader(nn.Module):
    """Text and a class, made into what the drawing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.classes, self.attn = nn.Embedding(5, W), SelfAttention(W, 4)

    def forward(self, text: Tensor, y: Tensor) -> Tensor:
        """text (B, 4, W), y (B,) -> (B, 4, W)."""
        text = text + self.classes(y)[:, None]
        return text + self.attn(text)


class Codes(nn.Module):
    """A code for each place, the same for every row."""

    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.Embedding(5, W)

    def forward(self, places: Tensor) -> Tensor:
        """places (5,) -> (5, W)."""
        return self.codes(places)


class Drawing(nn.Module):
    """Tokens that look at the text, and may remember the call before."""

    def __init__(self) -> None:
        super().__init__()
        self.seen, self.remembered, self.out = nn.Linear(W, W), nn.Linear(W, W), nn.Linear(W, 3)
        self.blocks = nn.ModuleList([Block(W, 4, 2)])

    def forward(self, x: Tensor, h: Tensor, code: Tensor, memory: Tensor | None = None) -> Any:
        """x (B, 5, W), h (B, 4, W), code (5, W), memory (B, W) -> (B, 5, 3), and what is remembered."""
        x = x + code + self.seen(h.tanh()).mean(1, keepdim=True)
        if memory is not None:
            x = x + self.remembered(memory)[:, None]
        for block in self.blocks:
            x = block(x)
        return self.out(x) if memory is None else (self.out(x), 2 * x.mean(1).tanh())


def program(*, keeps: bool) -> Program:
    """Reader and codes, then the drawing, which may keep a state from call to call."""
    memory = ("memory",) if keeps else ()
    networks = {
        "reader": Network(takes=("text", "y"), outputs=("h",)),
        "codes": Network(takes=("places",), outputs=("code",)),
        "drawing": Network(takes=("x", "h", "code", *memory), gives=memory),
    }
    return Program(
        networks=networks,
        ways=(Way(calls=tuple(Call(network=name) for name in networks), reads=memory),),
        states=(StateTensor(name="memory", shape=(W,), given_as="new_memory"),) if keeps else (),
        shared=("places", "position") if keeps else ("places",),
        inner=(InputSpec(name="h", shape=(BATCH, 4, W)), InputSpec(name="code", shape=(5, W))),
        start="position" if keeps else "",
    )


def subject(*, keeps: bool = False) -> Model:
    """The program with random weights."""
    torch.manual_seed(0)
    module = Networks({"reader": Reader(), "codes": Codes(), "drawing": Drawing()}, program(keeps=keeps)).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(2)  # so that attention looks somewhere
    inputs = (*INPUTS, POSITION) if keeps else INPUTS
    return Model(name="in turn", module=module, inputs=inputs, outputs=("y_",), weights="random")


def calls_of(model: Model, rows: int, **fixed: float) -> list[dict[str, Tensor]]:
    """One call, or three that go on from one another where the model keeps a state; some inputs fixed."""
    found = []
    for number in range(3 if program_of(model.module).start else 1):
        arrays = draw(model.inputs, seed=rows + 10 * number, sizes={"batch": rows})
        call = {name: torch.from_numpy(array) for name, array in arrays.items()}
        call |= {name: torch.full_like(call[name], value) for name, value in fixed.items()}
        found.append({**call, "position": torch.tensor(number)} if "position" in call else call)
    return found


def answers(module: nn.Module, calls: Sequence[dict[str, Tensor]]) -> Tensor:
    """What a sequence of calls gives."""
    with torch.no_grad():
        return torch.stack([module(**call) for call in calls])


def applied(step: Pass, model: Model) -> tuple[Result, nn.Module]:
    """The outcome of a step, whose plan read back gives the same model; and what it intends."""
    calls = calls_of(model, 2)[:1]
    context = Context(calibration=calls, example=calls[0], original=model.module, signature=Signature(model.inputs))
    result = step.apply(share(model.module), context)
    plan = Plan.from_json(result.plan.as_json(), result.plan.arrays, by=step.declared)
    again = step.carry_out(share(model.module), plan, Context())
    gone = step.removed_inputs(plan)
    for rows in (1, 3):
        calls = [{name: v for name, v in call.items() if name not in gone} for call in calls_of(model, rows)]
        assert torch.equal(answers(again, calls), answers(result.model, calls)), "the plan gives another model"
    return result, step.intended(model.module, plan, context)


def engines(model: Model, step: Pass, result: Result, folder: Path) -> Driver:
    """The program's graphs in ONNX Runtime, exported with an open batch."""
    gone, module = step.removed_inputs(result.plan), result.model
    kept = Model(
        name=model.name,
        module=module,
        inputs=tuple(spec for spec in model.inputs if spec.name not in gone),
        outputs=model.outputs,
        weights="",
    )
    whole, found = with_inputs(kept, step.new_inputs(result.plan)), {}
    for name, network in networks_of(module).items():
        called, path = called_as(program_of(module), name, whole), graph_of(folder, name)
        arrays = draw(called.inputs, seed=1, sizes=sizes_of(called))
        example = {key: torch.from_numpy(array) for key, array in arrays.items()}
        export_onnx(network, example, dynamic=axes_of(called), outputs=called.outputs, path=path)
        found[name] = lambda given, path=path, outputs=called.outputs: dict(zip(outputs, raw(path, given), strict=True))
    return Driver(program=program_of(module), networks=found, memory=Memory())


def same_as_engines(model: Model, step: Pass, result: Result, folder: Path, calls: list[list[dict[str, Any]]]) -> None:
    """Graphs give what the modules do, whole sequences of them."""
    driver = engines(model, step, result, folder)
    for sequence in calls:
        assert len(sequence) == (3 if program_of(model.module).start else 1)
        for call, wanted in zip(sequence, answers(result.model, sequence), strict=True):
            [found] = driver({name: tensor.numpy() for name, tensor in call.items()}).values()
            torch.testing.assert_close(torch.from_numpy(found), wanted, atol=1e-5, rtol=1e-4)


KEEPS = pytest.mark.parametrize("keeps", [False, True], ids=["values passed on", "a state"])

# Guidance: the condition reaches the drawing by what the reader gives


@KEEPS
def test_guidance_is_two_runs_of_the_whole_program_each_with_its_state(keeps: bool, tmp_path: Path) -> None:
    model, step = subject(keeps=keeps), MergeGuidance(condition="y", none=4, scale=3.0)
    result, intended = applied(step, model)
    tried = []
    for rows in (1, 3):
        calls = calls_of(model, rows)
        without = [{**call, "y": torch.full_like(call["y"], 4)} for call in calls]
        given, none = answers(copy.deepcopy(model.module), calls), answers(copy.deepcopy(model.module), without)
        torch.testing.assert_close(answers(intended, calls), none + 3 * (given - none), atol=1e-5, rtol=1e-4)
        w = torch.linspace(0.5, 4, rows)
        tried.append([{**call, "guidance_scale": w} for call in calls])
        wanted = none + w.view(-1, 1, 1) * (given - none)
        torch.testing.assert_close(answers(result.model, tried[-1]), wanted, atol=1e-5, rtol=1e-4)
        assert (wanted - given)[-1].abs().max() > 1e-2
    parts = networks_of(result.model)
    assert [repeated_rows(parts[name]) for name in ("reader", "codes", "drawing")] == [2, 1, 2], "codes are of no row"
    passed = {spec.name: spec.shape for spec in program_of(result.model).inner}
    assert passed == {"h": (BATCH, 2, 4, W), "code": (5, W)}
    if keeps:
        same_as_engines(model, step, result, tmp_path, tried)


def test_what_the_condition_does_not_reach_runs_once() -> None:
    model = subject()
    step = MergeGuidance(condition="x", none=0.0, fixed=True)
    result, intended = applied(step, model)
    parts = networks_of(result.model)
    assert [repeated_rows(parts[name]) for name in ("reader", "codes", "drawing")] == [1, 1, 2]
    calls = calls_of(model, 3)
    torch.testing.assert_close(answers(result.model, calls), answers(intended, calls), atol=1e-5, rtol=1e-4)


# Inputs at fixed values: each network holds what it takes

BOUND: dict[str, tuple[dict[str, Any], list[str]]] = {
    "of one network": ({"y": 2}, ["reader", "codes", "drawing"]),
    "all of one": ({"text": 0.5, "y": 2}, ["codes", "drawing"]),
    "without rows": ({"places": 3}, ["reader", "drawing"]),
    "of several": ({"text": [0.5] * W, "y": 2, "places": 1}, ["drawing"]),
}


@KEEPS
@pytest.mark.parametrize("case", BOUND)
def test_a_bound_input_is_that_input_given_with_every_call(case: str, keeps: bool, tmp_path: Path) -> None:
    values, left = BOUND[case]
    model, step = subject(keeps=keeps), FixInputs(inputs=values)
    result, intended = applied(step, model)
    assert list(networks_of(result.model)) == list(program_of(result.model).networks) == left
    taken = {each for own in program_of(result.model).networks.values() for each in own.takes or ()}
    assert not taken & values.keys()
    assert ("h" in taken, "code" in taken) == ("reader" in left, "codes" in left)
    tried = []
    for rows in (1, 3):
        calls = calls_of(model, rows)
        for call in calls:
            call |= {name: torch.tensor(v, dtype=call[name].dtype).expand_as(call[name]) for name, v in values.items()}
        wanted = answers(copy.deepcopy(model.module), calls)
        tried.append([{name: value for name, value in call.items() if name not in values} for call in calls])
        torch.testing.assert_close(answers(intended, tried[-1]), wanted, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(answers(result.model, tried[-1]), wanted, atol=1e-5, rtol=1e-4)
    if case == "all of one" and keeps:
        same_as_engines(model, step, result, tmp_path, tried)


def test_a_network_that_is_left_out_takes_its_weights_along() -> None:
    model = subject()
    result, _ = applied(FixInputs(inputs={"text": 0.5, "y": 2}), model)
    parts = networks_of(model.module)
    gone = sum(each.numel() for part in (parts["reader"], parts["drawing"].seen) for each in part.parameters())
    assert result.before.parameter_count - result.after.parameter_count == gone
    assert result.plan.choice["networks.reader"] == ConstantNetwork(gives=("h",))
    assert result.plan.arrays["networks.reader.h"].shape == (4, W)
    assert "networks.reader.classes" not in result.plan.choice
    assert "networks.drawing.seen" in result.plan.choice, "it reads nothing but what the reader gave"


def test_guided_rows_are_bound_in_the_networks_that_run_them() -> None:
    model = subject()
    guided, intended = applied(MergeGuidance(condition="y", none=4, scale=3.0, fixed=True), model)
    then = Model(name="", module=guided.model, inputs=model.inputs, outputs=("y_",), weights="")
    for values, left in BOUND.values():
        result, _ = applied(FixInputs(inputs=values), then)
        assert list(networks_of(result.model)) == left
        calls = calls_of(model, 3)
        for call in calls:
            call |= {name: torch.tensor(v, dtype=call[name].dtype).expand_as(call[name]) for name, v in values.items()}
        kept = [{name: value for name, value in call.items() if name not in values} for call in calls]
        torch.testing.assert_close(answers(result.model, kept), answers(intended, calls), atol=1e-5, rtol=1e-4)


def test_what_would_leave_no_rows_is_refused() -> None:
    with pytest.raises(ToolchainError, match="places would be left, which all rows of a call share"):
        applied(FixInputs(inputs={"x": 0.0, "text": 0.0, "y": 1}), subject())
    model = subject()
    x = bind("x", 0.0, calls_of(model, 2)[0], ["x"])
    given = {"x": torch.zeros(2, 5, W), "code": torch.zeros(5, W)}
    with pytest.raises(ToolchainError, match="network drawing takes x and nothing else that has a row for each sample"):
        held_by("drawing", Network(takes=("x", "code")), given, {"x": x}, {}, ("code",))
    with pytest.raises(ToolchainError, match="network drawing takes x, h, code alone: bound, it would give the result"):
        constant_networks(model.module, calls_of(model, 2)[0])
    kept = subject(keeps=True)
    with pytest.raises(ToolchainError, match="position says where in its sequence a call goes on"):
        applied(FixInputs(inputs={"position": 0}), kept)


# Perturbed heads: the plain and the perturbed program run side by side

HEADS: dict[str, dict[str, tuple[int, ...]]] = {
    "of both": {"*": ()},
    "of the first": {"networks.reader.*": (1, 2)},
    "of the last": {"networks.drawing.*": (0,)},
}


@KEEPS
@pytest.mark.parametrize("case", HEADS)
def test_guidance_away_from_perturbed_heads_is_two_runs_of_the_program(case: str, keeps: bool, tmp_path: Path) -> None:
    model, heads = subject(keeps=keeps), HEADS[case]
    spoiled, _ = applied(PerturbHeads(heads=heads, u=0.7), model)
    step = PerturbHeads(heads=heads, guidance=True)
    result, _ = applied(step, model)
    [u, w] = step.new_inputs(result.plan)
    tried = []
    for rows in (1, 3):
        calls = calls_of(model, rows)
        plain, worse = answers(copy.deepcopy(model.module), calls), answers(copy.deepcopy(spoiled.model), calls)
        assert (plain - worse).abs().max() > 1e-2
        weight = torch.linspace(0.5, 4, rows)
        added = {u.name: torch.full((rows, *u.shape), 0.7), w.name: weight}
        tried.append([{**call, **added} for call in calls])
        wanted = plain + weight.view(-1, 1, 1) * (plain - worse)
        torch.testing.assert_close(answers(result.model, tried[-1]), wanted, atol=1e-5, rtol=1e-4)
    once = {"of the last": ("reader", "codes")}.get(case, ("codes",))
    assert all(program_of(result.model).networks[name] == program(keeps=keeps).networks[name] for name in once)
    if case == "of both" and keeps:
        same_as_engines(model, step, result, tmp_path, tried)


@KEEPS
def test_baked_guidance_of_guided_rows_is_four_runs(keeps: bool) -> None:
    model = subject(keeps=keeps)
    guided, twice = applied(MergeGuidance(condition="y", none=4, scale=3.0), model)
    assert guided.changed == ("",)
    then = Model(name="", module=guided.model, inputs=model.inputs, outputs=("y_",), weights="")
    result, _ = applied(PerturbHeads(u=0.7, guidance=True, w=2.0), then)
    spoiled, _ = applied(PerturbHeads(u=0.7), model)
    guided_and_spoiled = MergeGuidance(condition="y", none=4, scale=3.0).intended(spoiled.model, guided.plan, Context())
    for rows in (1, 3):
        calls = calls_of(model, rows)
        plain, worse = answers(twice, calls), answers(guided_and_spoiled, calls)
        torch.testing.assert_close(answers(result.model, calls), plain + 2 * (plain - worse), atol=1e-4, rtol=1e-4)


# What has no meaning


def test_two_ways_of_a_row_are_refused_where_they_cannot_differ_or_cannot_be_put_together() -> None:
    before = program(keeps=False)
    with pytest.raises(ToolchainError, match="'code', which all rows share, so that it cannot differ for a row"):
        twofold(before, ["codes"], what="the condition places")
    idle = in_turn({"first": Network(takes=("x",), outputs=("a",)), "last": Network(takes=("z",))}, [])
    with pytest.raises(ToolchainError, match="the condition x never reaches the result: last would give it unchanged"):
        twofold(idle, ["first"], what="the condition x")
    both = Program(
        networks={"one": Network(takes=("x",), outputs=("a",)), "two": Network(takes=("a",))},
        ways=(Way(calls=(Call(network="one"), Call(network="two"))), Way(calls=(Call(network="one"),))),
    )
    with pytest.raises(ToolchainError, match=r"network one gives the result, .* and also 'a' to others"):
        twofold(both, ["one"], what="the condition x")
