"""The whole run: source, steps, ONNX, engines, validation, gates, report, in an artifact folder."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from enginewright import (
    __version__,
    artifact,
    at_sizes,
    doubts,
    environment,
    origin,
    preflight,
    shipping,
    sources,
)
from enginewright.added import completing, in_rows, with_inputs
from enginewright.ground.errors import (
    CANNOT,
    DONE,
    MISSED,
    FaultsError,
    InternalError,
    ToolchainError,
    raise_faults,
    unknown,
)
from enginewright.ground.program import PREPARE, SOLE, STEP, Program
from enginewright.ground.runner import Runner
from enginewright.ground.signature import Dim
from enginewright.hints import Hints
from enginewright.measure import judge_gates, measure, refuse_unsteady
from enginewright.passes.contract import Inputs, Pass, Plan, Result, cost
from enginewright.passes.kernel.graph_module import GraphModule
from enginewright.passes.networks import networks_of, program_of
from enginewright.programs import (
    called_as,
    graph_of,
    inputs_of_network,
    notes_of,
    part_in_two,
    parts_for,
    place_of,
    runner_of,
    write_program,
)
from enginewright.progress import Progress
from enginewright.recipe import Recipe, TargetStep
from enginewright.reports import deploying, record, rendering, summary, words
from enginewright.sources.contract import Model, write_interface
from enginewright.state import State, example_of, first_state
from enginewright.targets.contract import Built, Graph, LayerHint, ShapeRange
from enginewright.targets.element_types import DTYPES
from enginewright.targets.onnx_export import export_onnx, save
from enginewright.targets.python_program_engine import source_of
from enginewright.targets.weights import settle_weights
from enginewright.tracing import axes_of, program_on_demand, sizes_of
from enginewright.validation.fidelity import non_finite
from enginewright.validation.inputs import completed


@dataclass
class Run:
    """One recipe on its way."""

    recipe: Recipe
    progress: Progress
    results: list[tuple[Pass, Result, float]] = field(default_factory=list)
    resolved: dict[str, dict[str, Any]] = field(default_factory=dict)
    shipped: dict[str, list[deploying.Engine]] = field(default_factory=dict)
    trust_code: bool = False
    """Whether artifacts that the recipe names, such as a teacher's, may run the code of their models."""
    links: bool = False
    """Whether the artifact's weights are links to files that lie elsewhere."""
    notes: list[str] = field(default_factory=list)
    """Sentences about the artifact for the report."""
    proofs: dict[str, str] = field(default_factory=dict)
    """For each graph, at which sizes it was run before engines were built from it, in words."""
    hints: Hints = field(default_factory=Hints)
    """What the plans say about layers."""
    program: Program = SOLE
    """What was exported."""
    part_hints: dict[str, dict[str, LayerHint]] = field(default_factory=dict)
    """Hints under the paths of each exported network, by its name."""
    programs: dict[str, Callable[[], ExportedProgram]] = field(default_factory=dict)
    """What gives each exported network as an exported program, by its name, while targets are built."""
    state: State | None = None
    """Where the run is; None before the first step."""

    @cached_property
    def model(self) -> Model:
        """The untouched original."""
        head = self.recipe.head
        weights = self.recipe.path(head.weights) if head.weights else None
        return sources.load(
            self.recipe.model, weights=weights, seed=head.seed, trust_remote_code=head.trust_remote_code
        )

    @property
    def intended(self) -> Model:
        """What engines are compared with: the original, as the steps mean to change it."""
        return self.state.intended if self.state else self.model

    @property
    def untouched(self) -> Model | None:
        """The original, called with as many rows as engines are; None where it is what they are compared with."""
        if not self.state or not self.state.intents:
            return None
        return in_rows(self.model, math.lcm(*(step.rows_together(result.plan) for step, result, _ in self.results)))

    @property
    def exported(self) -> Model:
        """The same with the inputs that steps added, as engines are called."""
        new = [each for step, result, _ in self.results for each in step.new_inputs(result.plan)]
        return with_inputs(self.intended, [each for each in new if each.range is None])  # it takes the others itself

    @property
    def threads(self) -> int:
        """Threads of every CPU runner."""
        return self.recipe.threads

    def example(self, model: Model | None = None, **sizes: int) -> Inputs:
        """One call of a model, by default the original; dynamic dimensions at the sizes given, else typical."""
        return example_of(model or self.model, self.recipe.head.seed, **sizes)

    def optimize(self, scratch: Path | None = None) -> nn.Module:
        """Run the steps on a copy that shares the original's weights; returns the optimized module.

        Args:
            scratch: a folder for new weights on their way; None keeps them in memory.
        """
        state = self.state = first_state(
            self.recipe, self.model, progress=self.progress, trust_code=self.trust_code, scratch=scratch
        )
        for number, step in enumerate(self.recipe.steps):
            before = ", ".join(s.name() for s in self.recipe.steps[:number]) or "none"
            with self.progress.stage(f"step {number + 1}: {step.name()}"):
                began = time.perf_counter()
                with placed(f"step {number + 1} ({step.name()}); steps before it: {before}"):
                    state, result = state.then(step, self.recipe)
                self.state = state
                self.hints.after(len(self.results), state.module, result.plan)
                self.results.append((step, result, time.perf_counter() - began))
            self.progress.line(f"  {outcome_of(result)}")
        return state.module.eval()

    @cached_property
    def sized(self) -> list[at_sizes.SizedCall]:
        """Calls at other than typical sizes with the original's answers; after the steps were run.

        Raises:
            ToolchainError: the original refuses a size that its owner declared.
        """
        intended = self.intended
        runner = at_sizes.eager(intended, self.threads)
        return list(at_sizes.sized_calls(intended, runner, self.recipe.head.seed + at_sizes.SEED))


@contextmanager
def placed(where: str) -> Iterator[None]:
    """Say of every fault which step it is of; what no pass foresaw is our own fault, and keeps its traceback."""
    try:
        yield
    except ToolchainError as error:
        kind = ToolchainError if isinstance(error, FaultsError) else type(error)
        raise kind(error.message, where=error.where or where, help=error.help) from error
    except (InternalError, MemoryError, OSError):  # a full disk is nobody's bug
        raise
    except Exception as error:
        raise InternalError(f"{type(error).__name__}: {error}", where=where) from error


def outcome_of(result: Result) -> str:
    """One line on what a step did."""
    skipped = result.plan.skipped
    if not result.changed and set(skipped) == {""}:
        return f"changed nothing: {skipped['']}"
    return f"changed {len(result.changed)}, left alone {len(skipped)}"


def export(
    recipe: Recipe, out: Path, *, force: bool, progress: Progress, trust_code: bool = False, lies: Path | None = None
) -> tuple[record.Report, int]:
    """Run a recipe of one network into ``out``; returns the report and the exit code.

    Args:
        recipe: what to do.
        out: the folder to write.
        force: replace an artifact of ours that is there.
        progress: told of each stage.
        trust_code: whether artifacts that the recipe names may run the code of their models.
        lies: where the folder will lie in the end, if that is elsewhere.
    """
    began = time.perf_counter()
    run = Run(recipe, progress, trust_code=trust_code)
    preflight.check_files(recipe)
    for note in (*recipe.notes, *preflight.check_targets(recipe)):
        progress.line(note)
    with artifact.staging(out, force=force) as folder:
        with progress.stage(f"load {recipe.head.model}"):
            model = run.model
            refuse_sizes(model, recipe.head.validation.batch)
            if not recipe.head.validation.skip:  # without validation it is not run: its weights may not fit into memory
                refuse_non_finite(model, run.example(), run.threads)
                refuse_random(model, run.example(), run.threads)
        scratch = folder / ".scratch"
        scratch.mkdir()
        module = run.optimize(scratch)
        scratch.rmdir()
        write_plans(run, folder)
        if not recipe.head.validation.skip:
            with progress.stage("run the original at other sizes"):
                _ = run.sized  # a size that it refuses is a fault of the declaration, found before anything is built
        with progress.stage("export to ONNX"):
            write_networks(run, module, folder)
            run.links, linked = settle_weights(folder, recipe.head.export.weights)
            if linked:
                run.notes.append(linked)
                progress.line(linked)
        targets = [build(run, step, folder) for step in recipe.targets]
        run.programs.clear()
        targets, pictures, how = validate(run, module, folder, targets)
        report = make_report(run, targets, pictures, how, time.perf_counter() - began)
        write_artifact(run, report, folder, lies or artifact.place_of(out))
    return report, exit_code(report)


def write_networks(run: Run, module: nn.Module, folder: Path) -> None:
    """The program of the optimized model, and a graph for each of its networks."""
    program = program_of(module)
    for name, network in networks_of(module).items():
        hints = run.hints.of(network, module)
        names = [program.part_of(name, part) for part in (PREPARE, STEP)] if name in program.hoisted else [name]
        run.part_hints |= dict.fromkeys(names, hints)
        called = called_as(program, name, run.exported)
        # What the untouched model of one network answers at other sizes is known.
        calls = run.sized if program == SOLE and not run.results and not run.recipe.head.validation.skip else None
        write_graph(run, called, network, graph_of(folder, name), calls)
        if not isinstance(network, GraphModule):
            run.programs[name] = program_on_demand(
                called, network, partial(run.example, called, **sizes_of(called)), dtype=run.recipe.head.export.dtype
            )
    run.program = part_in_two(program, folder)
    write_program(run.program, folder)


def refuse_sizes(model: Model, sizes: Mapping[str, int]) -> None:
    """Sizes to time at must be those of dimensions that the model has, and such that it takes."""
    known = {d.name: d for spec in model.inputs for d in spec.shape if isinstance(d, Dim)}
    faults = [unknown("dynamic dimension", name, known, where="validation.batch") for name in sizes.keys() - known]
    said = [known[name].fault_of(size) for name, size in sizes.items() if name in known]
    raise_faults([*faults, *(ToolchainError(fault, where="validation.batch") for fault in said if fault)])


def refuse_non_finite(model: Model, example: Inputs, threads: int) -> None:
    """An original whose own output is not finite cannot be a reference."""
    runner = at_sizes.eager(model, threads)
    arrays = {name: tensor.numpy() for name, tensor in example.items()}
    arrays = at_sizes.answerable(model, runner, [model.example or arrays, arrays])[-1]
    if faults := non_finite([runner(arrays)]):
        layer = runner.first_non_finite(arrays)
        raise ToolchainError(f"the original model cannot be a reference: {faults[0]}", where=f"first in layer {layer}")


def refuse_random(model: Model, example: Inputs, threads: int) -> None:
    """An original that answers one call in two ways cannot be a reference: no engine could ever agree with it."""
    runner = at_sizes.eager(model, threads)
    arrays = {name: tensor.numpy() for name, tensor in example.items()}
    refuse_unsteady(runner, arrays)


def write_plans(run: Run, folder: Path) -> None:
    """``plans/NN-name.json`` for each step."""
    (folder / "plans").mkdir()
    for number, (step, result, _) in enumerate(run.results):
        result.plan.write(
            folder / "plans" / f"{number + 1:02d}-{step.name()}.json", by=step.declared, version=__version__
        )


def write_graph(
    run: Run, model: Model, module: nn.Module, path: Path, calls: Sequence[at_sizes.SizedCall] | None = None
) -> None:
    """``model.onnx``, called as ``model`` is, with its weights beside it; proven on calls as ``at_sizes.prove`` is."""
    if isinstance(module, GraphModule):
        save(module.graph.clone(), path, embed=run.recipe.head.export.embed_weights)
        return
    settings = run.recipe.head.export
    export_onnx(
        module,
        run.example(model, **sizes_of(model)),
        dynamic=axes_of(model),
        outputs=model.outputs,
        path=path,
        embed=settings.embed_weights,
        dtype=DTYPES[settings.dtype] if settings.dtype else None,
    )
    if not run.recipe.head.validation.skip:
        seed = run.recipe.head.seed + at_sizes.SEED
        proof = at_sizes.prove(path, replace(model, module=module), calls, threads=run.threads, seed=seed)
        run.proofs |= {path.stem: proof} if proof else {}


def build(run: Run, step: TargetStep, folder: Path) -> record.TargetRecord:
    """Build one target where this machine can; a reason where it cannot."""
    target, name = step.target, step.name
    able = target.availability()
    found = record.TargetRecord(
        name=name,
        kind=target.name(),
        parameters=target.model_dump(mode="json"),
        installed=able.installed.yes,
        importable=able.importable.yes,
        buildable=able.buildable.yes,
        runnable=able.runnable.yes,
        optional=step.optional,
        reason=able.why_not("buildable") or able.why_not("runnable"),
        built=False,
    )
    if not able.buildable.yes:
        run.progress.line(f"{name} cannot be built here: {found.reason}")
        return found
    parts = parts_for(step, folder)
    engines = [place_of(step, folder, part) for part in parts]
    with run.progress.stage(f"build {name}"):
        began = time.perf_counter()
        try:
            built = [build_one(run, step, part, folder) for part in parts]
        except ToolchainError as error:
            found.reason = error.message
            for engine in engines:
                shutil.rmtree(engine, ignore_errors=True)
            run.progress.line(f"{name} was not built: {error.message}")
            return found
    run.resolved[name] = dict(built[0].resolved)
    shipped = shipping.engines_of(
        step, run.program, parts, run.exported.inputs, folder, [each.left_out for each in built]
    )
    run.shipped[name] = shipped
    files = {path: size for engine in shipped for path, size in engine.files.items()}
    beside_fp32 = [each.fp32_ratio for each in built if each.fp32_ratio is not None]
    return found.model_copy(
        update={
            "built": True,
            "parameters": {**found.parameters, **built[0].resolved},
            "seconds": round(time.perf_counter() - began, 3),
            "bytes": sum(files.values()) or None,
            "files": files,
            "folders": deploying.placed(shipped),
            "fp32_ratio": max(beside_fp32, default=None),
            "notes": list(dict.fromkeys(note for each in built for note in each.notes)),
        }
    )


def build_one(run: Run, step: TargetStep, part: str, folder: Path) -> Built:
    """Build one engine from one graph into a new folder."""
    engine = place_of(step, folder, part)
    engine.mkdir(parents=True)
    model = run.exported
    ranges: dict[str, ShapeRange] = {}
    examples = [completed(call, model.inputs) for call in model.batches(1, run.recipe.head.seed + 1)]
    if not step.target.runs_module:
        ranges, examples = inputs_of_network(run.program, part, folder, model, examples)
    graph = Graph(
        path=graph_of(folder, part),
        outputs=model.outputs,
        ranges=ranges,
        examples=examples,
        hints=run.part_hints.get(part, {}),
        threads=run.threads,
        say=run.progress.say,
        links=run.links,
        untouched=not run.results and isinstance(run.model.module, GraphModule),
        source=source_of(run.state.module) if run.state else None,
        program=run.programs.get(part),
    )
    return step.target.build(graph, engine)


def validate(
    run: Run, module: nn.Module, folder: Path, targets: list[record.TargetRecord]
) -> tuple[list[record.TargetRecord], list[record.Samples], dict[str, Any]]:
    """Compare every engine that runs here with the original; the records filled in, pictures, and how it was done."""
    settings, seed = run.recipe.head.validation, run.recipe.head.seed
    if settings.skip:
        return targets, [], {"skipped": "validation was not asked for"}
    runners: dict[str, Runner] = {}
    for step, found in zip(run.recipe.targets, targets, strict=True):
        if found.built and found.runnable:
            runner = runner_of(step, folder, run.threads, lambda: module)
            runners[found.name] = completing(runner, run.exported.inputs)
    if not runners:
        graph = {"graph": proven(run)} if run.proofs else {}
        return targets, [], {"skipped": "no target that runs on this machine", **graph}
    intended = run.intended
    half, why_not = doubts.in_half(run.recipe, module, intended.outputs)
    measured, pictures = measure(
        intended,
        at_sizes.eager(intended, run.threads),
        runners,
        settings,
        seed=seed,
        threads=run.threads,
        progress=run.progress,
        sized=run.sized,
        untouched=run.untouched,
        half=half,
    )
    how: dict[str, Any] = {
        "inputs": kind_of_inputs(intended),
        "reference": said_of_reference(run.state.intents if run.state else ()),
        "seed": seed,
        **settings.model_dump(exclude_none=True, exclude={"skip"}),
        "threads": run.threads,
        **({"graph": proven(run)} if run.proofs else {}),
    }
    for found in targets:
        own = measured.get(found.name, {})
        told = notes_of(runners[found.name]) if found.name in runners else []
        told += [f"half precision was not tried in PyTorch: {why_not}"] if why_not else []
        found.notes = [*found.notes, *told, *own.pop("notes", [])]
        found.doubt = doubts.of_guessed_ranges(run.recipe, run.model, found)
    return [t.model_copy(update=measured.get(t.name, {})) for t in targets], pictures, how


def proven(run: Run) -> str:
    """What was done to prove the graphs before engines were built from them."""
    if len(run.proofs) == 1:
        return next(iter(run.proofs.values()))
    return "; ".join(f"{name} {proof}" for name, proof in run.proofs.items())


def said_of_reference(steps: Sequence[str]) -> str:
    """What engines were compared with, in words: some steps mean to compute something else than the original."""
    return f"the original as {words.listing(list(dict.fromkeys(steps)))} rewrote it" if steps else summary.UNTOUCHED


def kind_of_inputs(model: Model) -> str:
    """What outputs were compared on, in words."""
    if model.task is not None and model.realistic:
        return "met on sampling runs"
    kind = "made by the model's source" if model.realistic else "random, within the input contract"
    own = "the model's own example; then " if model.example is not None else ""
    doubt = f"; the ranges of {', '.join(model.guessed)} were guessed" if model.guessed else ""
    return f"{own}{kind}{doubt}"


def make_report(
    run: Run, targets: list[record.TargetRecord], pictures: list[record.Samples], how: dict[str, Any], seconds: float
) -> record.Report:
    """The record of the run."""
    first = run.results[0][1].before if run.results else cost(run.model.module, run.example(batch=1))
    gates = judge_gates(run.recipe.gates, targets)
    return record.Report(
        model=record.ModelRecord(
            name=run.model.name,
            weights=run.model.weights,
            parameter_count=first.parameter_count,
            macs=first.macs,
            bytes=first.bytes,
            inputs_left_out=[record.LeftOut(**vars(each)) for each in run.model.left_out],
            notes=list(run.model.notes),
        ),
        verdict=verdict(gates, targets),
        steps=[step_record(*entry, run.hints.notes.get(number, [])) for number, entry in enumerate(run.results)],
        targets=targets,
        gates=gates,
        samples=pictures,
        validation=how,
        environment=environment.describe(),
        versions=environment.versions(),
        seconds=round(seconds, 3),
        notes=list(run.notes),
    )


def step_record(step: Pass, result: Result, seconds: float, notes: Sequence[str] = ()) -> record.Step:
    """What one step did; ``notes`` are what its plan could not know."""
    before, after, facts = result.before, result.after, result.plan.facts.as_json()
    return record.Step(
        name=step.name(),
        parameters=step.model_dump(mode="json"),
        plan_digest=result.plan.digest(),
        changed=list(result.changed),
        skipped=[record.Skip(path=path, reason=reason) for path, reason in result.plan.skipped.items()],
        parameter_count=record.BeforeAfter(before=before.parameter_count, after=after.parameter_count),
        macs=record.BeforeAfter(before=before.macs, after=after.macs),
        bytes=record.BeforeAfter(before=before.bytes, after=after.bytes),
        seconds=round(seconds, 3),
        notes=[*facts.get("notes", []), *notes],
        curve=facts.get("curve"),
        maps=facts.get("maps", []),
    )


def verdict(gates: list[record.Gate], targets: list[record.TargetRecord]) -> record.Verdict:
    """Missed as soon as one gate is, or an engine is faulty; met only when something was asked, all of it was met, and
    no target that must be there was left unmeasured.
    """
    found = {gate.verdict for gate in gates}
    if "missed" in found or any(target.faults for target in targets):
        return "missed"
    if not gates or "not_measured" in found or unmeasured(targets):
        return "not_measured"
    return "inconclusive" if "inconclusive" in found else "met"


def unmeasured(targets: list[record.TargetRecord]) -> list[str]:
    """Targets that are not optional and that no output was compared of."""
    return [target.name for target in targets if not target.optional and not target.fidelity and not target.faults]


def exit_code(report: record.Report) -> int:
    """1: a gate missed or an engine faulty; 3: a wanted target not built, or a gate not met; else 0."""
    if report.verdict == "missed":
        return MISSED
    unbuilt = any(not target.built and not target.optional for target in report.targets)
    return CANNOT if unbuilt or (report.gates and report.verdict != "met") else DONE


def write_artifact(run: Run, report: record.Report, folder: Path, out: Path) -> None:
    """Everything but the graph, the plans and the engines: recipe, README, report and manifest.

    Args:
        run: what was done.
        report: its record.
        folder: where to write.
        out: where that will lie in the end, which is where the paths of its recipe start.
    """
    recipe = run.recipe.with_weights("link" if run.links else "copy").moved(out)
    (folder / "recipe.toml").write_text(recipe.as_toml(run.resolved))
    (folder / "README.md").write_text(deploying.render(report, run.shipped, run.program))
    record.write(report, folder / "report.json")
    rendering.write_all(report, folder)
    for path in run.model.carried:
        (folder / "source").mkdir(exist_ok=True)
        shutil.copyfile(path, folder / "source" / path.name)
    artifact.write_manifest(
        folder,
        {
            "version": __version__,
            "model": report.model.model_dump(),
            "plans": {
                f"plans/{number + 1:02d}-{step.name()}.json": result.plan.digest()
                for number, (step, result, _) in enumerate(run.results)
            },
            "source": origin.recorded(run.recipe, run.model),
            "interface": write_interface(run.exported),
            "versions": report.versions,
        },
    )


@dataclass
class Decision:
    """What ``plan`` found for one step, without carrying anything further than memory."""

    step: record.Step
    plan: Plan


def decide(recipe: Recipe, progress: Progress, *, trust_code: bool = False) -> list[Decision]:
    """Plan every step; each is carried out in memory, because the next one plans on its result. Writes nothing."""
    run = Run(recipe, progress, trust_code=trust_code)
    preflight.check_files(recipe)
    run.optimize()
    return [Decision(step_record(*entry), entry[1].plan) for entry in run.results]
