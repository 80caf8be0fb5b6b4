"""Models, graphs and engines at other sizes than the typical one: is the declared range true?"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import onnx

from enginewright.ground.errors import ToolchainError
from enginewright.ground.runner import Runner
from enginewright.ground.signature import Arrays, Dim
from enginewright.sources.contract import Model
from enginewright.targets import machine
from enginewright.targets.onnx_files import external_bytes
from enginewright.targets.onnxruntime_engine import unoptimized
from enginewright.targets.pytorch_engine import EagerRunner
from enginewright.validation import sizes
from enginewright.validation.fidelity import real_rows
from enginewright.validation.sizes import SizeOutcome, Sizes, text_of

LARGEST_GRAPH = 2 * 10**9
"""Bytes up to which a graph is always run on its own before engines are built from it."""

MEMORY_SHARE = 4
"""A larger graph is run where so many times its bytes are free: ONNX Runtime may hold its weights twice."""

NODE = re.compile(r"Name:'([^']+)'")
"""How ONNX Runtime names the node that failed."""

REPEATS, SHORT = 3, 0.1
"""Calls that an estimate is taken from, unless the first takes more seconds than the second number."""

SEED = 3_000
"""Added to the recipe's seed, so that these calls are no others."""

ROUNDING = 0.0025
"""Error that a few values which fell to the other step make of a graph in 8 bits, at whatever size it is run."""


def eager(model: Model, threads: int) -> EagerRunner:
    """A model's module as a runner whose errors name the model's dimensions."""
    dims = {spec.name: tuple(d.name if isinstance(d, Dim) else d for d in spec.shape) for spec in model.inputs}
    return EagerRunner(model.module, threads=threads, outputs=model.outputs, dims=dims)


def answerable(model: Model, original: Runner, calls: Sequence[Arrays]) -> list[Arrays]:
    """The calls that the original has a finite answer for, where masks were drawn; the owner's example is always one.

    A network may answer a row that sees nothing with NaN, and no engine can be held to that.
    """
    masks = any(spec.dtype == "bool" and spec.low is None for spec in model.inputs)
    if model.example is None or not masks:
        return list(calls)
    kept = [call for call in calls[1:] if all(sizes.finite(array) for array in original(call).values())]
    return [calls[0], *kept]


@dataclass
class SizedCall:
    """A call at some sizes and what the original answers; ``reason`` says why there is no such call."""

    sizes: Sizes
    inputs: Arrays = field(default_factory=dict)
    wanted: Arrays = field(default_factory=dict)
    reason: str = ""
    mask: str = ""
    """The input that marks real rows, as in ``Model``: nobody reads what padding gives."""


def sized_calls(model: Model, original: Runner, seed: int) -> Iterator[SizedCall]:
    """Calls at each combination of sizes, one at a time; what would be too large is not run.

    Raises:
        ToolchainError: the original refuses a size that its owner declared; says how to declare what it takes.
    """
    combinations = sizes.combinations(model.inputs)
    if not combinations:
        return
    call = model.at({}, seed)
    answer, seconds = timed(original, call)
    size = sum(array.nbytes for array in (*call.values(), *answer.values()))
    for chosen in combinations:
        if reason := sizes.too_large(model.inputs, chosen, seconds=seconds, size=size):
            yield SizedCall(chosen, reason=reason)
            continue
        inputs = model.at(chosen, seed)
        try:
            wanted = original(inputs)
        except ToolchainError as cause:
            if model.example is not None:
                raise refused(model, original, chosen, cause) from cause
            yield SizedCall(chosen, reason=f"the original itself refuses it: {cause.message}")
            continue
        if not all(sizes.finite(array) for array in wanted.values()):
            yield SizedCall(chosen, reason="the original's own answer is not finite")
            continue
        yield SizedCall(chosen, inputs, wanted, mask=model.mask)


def timed(runner: Runner, call: Arrays) -> tuple[Arrays, float]:
    """An answer and about what it takes in seconds; other work on the machine makes a short call seem long."""
    taken = []
    for _ in range(REPEATS):
        began = time.perf_counter(), time.process_time()
        answer = runner(call)
        taken.append(min(time.perf_counter() - began[0], time.process_time() - began[1]))
        if taken[-1] > SHORT:
            break
    return answer, min(taken)


def refused(model: Model, original: Runner, chosen: Sizes, cause: ToolchainError) -> ToolchainError:
    """The error for a model that does not take a size of its declared range, with a declaration that would be true."""
    dims = sizes.dims_of(model.inputs)
    typical = {name: d.typical for name, d in dims.items()}

    def fails(at: Sizes) -> bool:
        try:
            original(model.at(at, SEED))
        except ToolchainError:
            return True
        return False

    blamed = sizes.guilty(chosen, typical, fails)
    name, size = next(iter(blamed.items()))
    d = dims[name]
    said = next((line.strip() for line in str(cause.__cause__ or cause.message).splitlines() if line.strip()), "")
    return ToolchainError(
        f"the model is declared for {name} from {d.low} to {d.high}, but does not take {text_of(blamed)}: {said}",
        help=declaration(d, size, lambda n: not fails({**typical, name: n})),
    )


def declaration(d: Dim, size: int, takes: Callable[[int], bool]) -> str:
    """How to declare a dimension that does not take a size, as far as a few tries tell.

    Args:
        d: as it was declared.
        size: what the model does not take.
        takes: whether it takes a size.
    """
    steps = [n for n in range(1, d.typical + 1) if d.typical % n == 0 and n % d.multiple_of == 0]
    for step in steps:
        near = [n for n in (d.typical + step, d.typical - step) if d.low <= n <= d.high]
        if step == d.multiple_of or not near or size % step == 0 or not all(takes(n) for n in near):
            continue
        low = -(-d.low // step) * step
        return f"it seems to take multiples of {step}: declare ({d.name!r}, {low}, {d.high // step * step}, {step})"
    if size < d.typical:
        return f"declare {d.name} from the smallest size that the model takes, as ({d.name!r}, SMALLEST, {d.high})"
    if size > d.typical:
        return f"declare {d.name} to the largest size that the model takes, as ({d.name!r}, {d.low}, LARGEST)"
    return f"declare the sizes of {d.name} that the model takes, as (name, smallest, largest, multiple)"


Again = Callable[[Sizes], tuple[Arrays, Arrays]]
"""Sizes -> other inputs and what the original makes of them."""


def again_with(model: Model, original: Runner, seed: int) -> Again:
    """Other calls than those of ``sized_calls``."""

    def again(at: Sizes) -> tuple[Arrays, Arrays]:
        inputs = model.at(at, seed + 1)
        return inputs, original(inputs)

    return again


def at_one_size(runner: Runner, call: SizedCall, typical: float, again: Again) -> SizeOutcome:
    """What a runner does at some sizes; a mere error is tried a second time, on other inputs."""
    if call.reason:
        return SizeOutcome(sizes=call.sizes, verdict="not_measured", reason=call.reason)
    try:
        found = outcome_of(call, call.inputs, call.wanted, runner, typical)
        if found.verdict == "missed" and found.relative_l2 is not None:
            inputs, wanted = again(call.sizes)
            second = outcome_of(call, inputs, wanted, runner, typical)
            # A choice between near equals, such as a routing, may fall otherwise once; a wrong size fails each time.
            found = found if second.verdict == "missed" else second
    except ToolchainError as error:
        return SizeOutcome(sizes=call.sizes, verdict="missed", reason=error.message)
    return found


def outcome_of(call: SizedCall, inputs: Arrays, wanted: Arrays, runner: Runner, typical: float) -> SizeOutcome:
    """Hold a runner's answer against the original's, over real rows."""
    return sizes.outcome(call.sizes, *real_rows(wanted, runner(inputs), inputs.get(call.mask)), typical)


def faults_of(outcomes: Sequence[SizeOutcome]) -> list[str]:
    """One sentence for each combination of sizes that an engine failed at."""
    return [f"at {text_of(each.sizes)}: {each.reason}" for each in outcomes if each.verdict == "missed"]


def prove(path: Path, model: Model, calls: Sequence[SizedCall] | None, *, threads: int, seed: int) -> str:
    """Run an exported graph beside the module that it was exported from, at the ends of its ranges and between.

    Args:
        path: the graph.
        model: the module that was exported, and how graph and module are called.
        calls: what the module answers; None: it is asked.
        threads: of both.
        seed: of the inputs.

    Returns:
        Where it was run, in words; or why it was not. Empty where no dimension may change.

    Raises:
        ToolchainError: the graph fails, or computes something else, at a size that the module takes.
    """
    if not sizes.dims_of(model.inputs):
        return ""
    size = path.stat().st_size + external_bytes(path)
    if size > LARGEST_GRAPH and size * MEMORY_SHARE > (machine.free_memory() or 0):
        return "not run on its own, because it is larger than 2 GB and than a quarter of the memory that is free"
    original = eager(model, threads)
    typical_call = model.at({}, seed)
    try:
        runner = unoptimized(path, threads)
        answers = original(typical_call), runner(typical_call)
        typical = sizes.furthest(*real_rows(*answers, typical_call.get(model.mask)))
        if rounds_to_8_bits(path):
            typical = max(typical, ROUNDING)
    except ToolchainError as cause:
        return f"not run on its own: {cause.message}"
    again, done = again_with(model, original, seed), []
    for call in sized_calls(replace(model, example=None), original, seed) if calls is None else calls:
        found = at_one_size(runner, call, typical, again)
        if found.verdict == "missed":
            raise wrong_graph(path, model, runner, original, call, found, typical)
        done += [text_of(call.sizes)] if found.verdict == "met" else []
    return f"run in ONNX Runtime at {'; '.join(done)}" if done else ""


def rounds_to_8_bits(path: Path) -> bool:
    """Whether a graph rounds values: one between two steps may fall either way, as sums of float32 do."""
    graph = onnx.load(path, load_external_data=False).graph
    return any(node.op_type == "QuantizeLinear" for node in graph.node)


def wrong_graph(
    path: Path, model: Model, runner: Runner, original: Runner, call: SizedCall, found: SizeOutcome, typical: float
) -> ToolchainError:
    """The error for a graph that does not hold at some sizes; names the dimensions that are to blame."""
    usual = {name: d.typical for name, d in sizes.dims_of(model.inputs).items()}
    again = again_with(model, original, SEED)

    def fails(at: Sizes) -> bool:
        inputs = model.at(at, SEED)
        try:
            tried = SizedCall(at, inputs, original(inputs), mask=model.mask)
            return at_one_size(runner, tried, typical, again).verdict == "missed"
        except ToolchainError:
            return False

    blamed = text_of(sizes.guilty(call.sizes, usual, fails))
    node = NODE.search(found.reason)
    place = place_of(path, node[1]) if node else None
    if found.relative_l2 is None:
        what = f"the exported graph does not hold at {blamed}: {found.reason}"
    else:
        what = (
            f"at {blamed} the exported graph does not compute what the model does: relative error "
            f"{found.relative_l2:.2g}, at {text_of(usual)} {typical:.2g}"
        )
    return ToolchainError(
        what,
        where=place,
        help="something in the model holds for some sizes alone, such as a branch on a size or a size kept as a "
        "number; let it compute in the same way at every size, or declare the sizes at which it does",
    )


def place_of(path: Path, name: str) -> str:
    """The module that a graph's node came from, or the node's name where that is not known."""
    for node in onnx.load(path, load_external_data=False).graph.node:
        if node.name == name:
            module = next((entry.value for entry in node.metadata_props if entry.key == "module"), "")
            return f"{node.op_type} in layer {module}" if module else f"node {name} ({node.op_type})"
    return f"node {name}"
