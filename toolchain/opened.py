"""Things that can be run and compared: an artifact's engines, a model, a bare ONNX file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from enginewright import artifact, catalog, origin, sources
from enginewright.added import completing, intended_by_all
from enginewright.at_sizes import eager
from enginewright.ground.errors import ToolchainError, UnavailableError
from enginewright.ground.runner import Runner
from enginewright.ground.signature import InputSpec
from enginewright.passes.contract import Context, Pass, Plan
from enginewright.passes.kernel.surgery import share
from enginewright.pipeline import Run
from enginewright.programs import parts_for, place_of, runner_of
from enginewright.progress import Progress
from enginewright.recipe import read, threads_here
from enginewright.sources.contract import Model, read_interface
from enginewright.sources.mistaken import mistaken
from enginewright.sources.onnx_source import inputs_of
from enginewright.state import knowing_teachers
from enginewright.targets.onnx_files import check_onnx
from enginewright.trust import engine_untrusted, refuse_untrusted

MODELS = ("config.json", "model_index.json", "modules.json", "adapter_config.json")
"""Files of folders that hold a model, and no artifact."""


@dataclass(frozen=True, kw_only=True)
class Opened:
    """Runners by name, the inputs that they take, and the model behind them where it is known.

    ``original`` is the untouched PyTorch model of an artifact or a model string.
    """

    runners: Mapping[str, Runner]
    inputs: tuple[InputSpec, ...]
    model: Model | None = None
    original: Runner | None = None
    absent: Mapping[str, str]
    """Targets that do not run here, and why."""
    seed: int | None = None
    calls: int | None = None
    """Of the recipe, where there is one: what its outputs were compared on."""


@dataclass(kw_only=True)
class Reopened(Run):
    """An artifact's recipe; its model must be the very one that was exported.

    Args:
        manifest: the artifact's.
        places: where the source may be; None stands for where it was.
    """

    manifest: Mapping[str, Any]
    places: Sequence[Path | None] = (None,)

    @cached_property
    def model(self) -> Model:
        """The untouched original.

        Raises:
            ToolchainError: its source has moved or was changed, or is code and not trusted.
        """
        record = self.manifest.get("source")
        self.recipe = origin.located(self.recipe, record, self.places)
        refuse_untrusted(self.recipe, trusted=self.trust_code)
        model = super().model
        origin.check(model, record)
        return model


def reopen(folder: Path, places: Sequence[Path | None] = (None,), *, trust_code: bool = False) -> Reopened:
    """The run that an artifact came from; its model is loaded when it is first asked for.

    Raises:
        ToolchainError: the artifact is damaged.
    """
    manifest = artifact.read_manifest(folder)
    if parts := manifest.get("parts"):
        raise ToolchainError(
            f"{str(folder)!r} holds several networks",
            help=f"name one of them: {', '.join(str(folder / part) for part in parts)}; "
            "enginewright.load_pipeline gives all together",
        )
    recipe = read(folder / "recipe.toml")
    return Reopened(recipe, Progress(quiet=True), manifest=manifest, places=places, trust_code=trust_code)


def open_subject(
    text: str, *, threads: int | None = None, source: Sequence[Path] = (), trust_code: bool = False
) -> Opened:
    """Open ``FOLDER``, ``FOLDER#TARGET``, ``FILE.onnx`` or a model string.

    Args:
        text: what to open.
        threads: of its runners.
        source: where an artifact's source may be, if it was moved.
        trust_code: run the code that an artifact's model is made by; a model string names its own.

    Raises:
        ToolchainError: damaged, unknown, code that is not trusted, or nothing in it runs here.
    """
    threads = threads or threads_here()
    place, _, wanted = text.partition("#")
    artifact.heal_absent(Path(place))
    if Path(place).is_dir():
        if any((Path(place) / name).is_file() for name in MODELS) and (fault := mistaken(place)):
            raise fault
        run = reopen(Path(place), (*source, None), trust_code=trust_code)
        return open_artifact(run, Path(place), wanted, threads)
    if place.endswith(".onnx") and sources.gives(place) == "module":
        return open_onnx(Path(place), threads)
    model = sources.load(text)
    runner = eager(model, threads)
    return Opened(runners={model.name: runner}, inputs=model.inputs, model=model, original=runner, absent={})


def open_artifact(run: Run, folder: Path, wanted: str, threads: int) -> Opened:
    """An artifact's engines that run here, and its original."""
    specs, _, _ = read_interface(artifact.read_manifest(folder))
    runners, absent = engines_of(run, folder, wanted, threads)
    runners = {name: completing(runner, specs) for name, runner in runners.items()}
    known = knowing_teachers(run.recipe, trust_code=run.trust_code)
    model = intended_by_all(run.model, recorded(run, folder), known)
    original = eager(model, threads)
    head = run.recipe.head
    return Opened(
        runners=runners,
        inputs=model.inputs,
        model=model,
        original=original,
        absent=absent,
        seed=head.seed,
        calls=head.validation.calls,
    )


def recorded(run: Run, folder: Path) -> list[tuple[Pass, Plan]]:
    """An artifact's steps with the plans that they were carried out with."""
    return [
        (step, Plan.read(folder / "plans" / f"{number + 1:02d}-{step.name()}.json", step.declared))
        for number, step in enumerate(run.recipe.steps)
    ]


def engines_of(run: Run, folder: Path, wanted: str, threads: int) -> tuple[dict[str, Runner], dict[str, str]]:
    """An artifact's engines that run here (or the one wanted), and why others do not.

    Raises:
        ToolchainError: it has no such engine, none runs here, or the one wanted is code which is not trusted.
    """
    runners: dict[str, Runner] = {}
    absent: dict[str, str] = {}
    for step in run.recipe.targets:
        name = step.name
        places = [place_of(step, folder, part) for part in parts_for(step, folder)]
        able = step.target.availability()
        if wanted and name != wanted:
            continue
        if not all(place.is_dir() for place in places):
            absent[name] = "it was not built"
        elif not able.runnable.yes:
            absent[name] = able.why_not("runnable")
        elif error := engine_untrusted(step, trusted=run.trust_code):
            if wanted:
                raise error
            absent[name] = f"{error.message} ({error.help})"
        else:
            runners[name] = runner_of(step, folder, threads, lambda: replay(run, folder))
    if wanted and not runners and wanted not in absent:
        names = ", ".join(step.name for step in run.recipe.targets) or "no target"
        raise ToolchainError(f"{str(folder)!r} has no engine {wanted!r}; it has {names}")
    if not runners:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in absent.items()) or "it was exported without targets"
        raise UnavailableError(f"no engine of {str(folder)!r} runs here: {reasons}")
    return runners, absent


def replay(run: Run, folder: Path) -> nn.Module:
    """An artifact's optimized PyTorch module: the source, and each step's recorded plan carried out again."""
    module = share(run.model.module)
    for step, plan in recorded(run, folder):
        module = step.carry_out(module, plan, Context())
    return module.eval()


def open_onnx(path: Path, threads: int) -> Opened:
    """A bare ONNX file in ONNX Runtime; open sizes are guessed, integers are drawn from 0 and 1."""
    inputs = inputs_of(check_onnx(path), where=str(path))
    target: Any = catalog.target_class("onnxruntime")()
    return Opened(runners={path.name: target.open(path, threads)}, inputs=inputs, absent={})
