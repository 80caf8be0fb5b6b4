"""What a target is: it builds an engine from a graph, or an exported program, loads it, and answers for itself here.

A target is one file ``targets/<name>_engine.py`` with one subclass of ``Target``; the name is the part before
``_engine`` (so that no file bears a library's name).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError
from torch import nn

from enginewright.ground.errors import invalid, raise_faults
from enginewright.ground.runner import Runner
from enginewright.ground.signature import Arrays

if TYPE_CHECKING:
    from torch.export import ExportedProgram


class Answer(NamedTuple):
    """Yes or no, and why not."""

    yes: bool
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Availability:
    """The four answers of a target on this machine."""

    installed: Answer
    importable: Answer
    buildable: Answer
    runnable: Answer

    def why_not(self, wanted: str) -> str:
        """The first reason that stands in the way of ``buildable`` or ``runnable``; empty when nothing does."""
        for name in ("installed", "importable", wanted):
            answer: Answer = getattr(self, name)
            if not answer.yes:
                return f"not {name}: {answer.reason}"
        return ""


class ShapeRange(NamedTuple):
    """Smallest, typical and largest shape of an input."""

    low: tuple[int, ...]
    typical: tuple[int, ...]
    high: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class LayerHint:
    """What passes found out about a layer that says how a target may compute it.

    Args:
        precision: numbers that a pass gave its weights, such as ``int8``; empty: none did.
        pattern: where its zeros lie: ``2:4``; empty: anywhere.
        reduced_range: whether its 8-bit weights need 7 bits on a CPU whose 8-bit product saturates.
        rows: whether each row of its input wants a scale of its own.
        output_scale: of its output in 8 bits, where that may be rounded.
    """

    precision: str = ""
    pattern: str = ""
    reduced_range: bool = False
    rows: bool = False
    output_scale: float | None = None

    @staticmethod
    def of(decision: Mapping[str, Any]) -> LayerHint:
        """What a plan's decision on a layer says to targets."""
        return LayerHint(**{each.name: decision[each.name] for each in fields(LayerHint) if each.name in decision})


@dataclass(frozen=True, kw_only=True)
class Graph:
    """What a target builds from.

    Args:
        path: the ONNX file, its weights beside it.
        outputs: names of what the model gives.
        ranges: shapes that each input may take.
        examples: inputs like those it will see, for targets that choose by measuring.
        hints: what passes found out about layers, by module path.
        threads: threads that a CPU engine may use.
        say: called with a line of progress.
        links: whether its weights stay links to files that lie elsewhere, and the engine's own graphs may link them
            too; or else an engine's folder holds its own copy of what it reads, and nothing with two names.
        untouched: the graph is the source's own and no step changed it, so nothing but what was asked for is rewritten.
        source: writes the network as Python source that needs no package; None where it cannot be.
        program: gives the network as an exported program, traced when a target first asks; None where there is no
            module behind the graph.
    """

    path: Path
    ranges: Mapping[str, ShapeRange]
    outputs: Sequence[str] = ()
    examples: Sequence[Arrays] = ()
    hints: Mapping[str, LayerHint] = field(default_factory=dict)
    threads: int = 1
    say: Callable[[str], None] = lambda text: None
    untouched: bool = False
    links: bool = False
    source: Callable[[], str] | None = None
    program: Callable[[], ExportedProgram] | None = None


@dataclass(frozen=True, kw_only=True)
class Built:
    """What a build left behind.

    Args:
        resolved: parameters that were ``auto`` and what they became.
        notes: sentences for the report.
        fp32_ratio: its time over that of the same graph in fp32, where both were timed.
        reads: files outside its folder that the engine reads, such as the artifact's own graph and its weights.
        left_out: an optimizer of the runtime that fails on the graph.
    """

    resolved: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    fp32_ratio: float | None = None
    reads: tuple[Path, ...] = ()
    left_out: str = ""


class Target(BaseModel, ABC):
    """One kind of engine. Parameters are pydantic fields with defaults, ranges and descriptions."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    formats: ClassVar[Mapping[str, str]]
    """How number formats that passes write are computed: ``native``, ``emulated`` (accepted, and computed in wider
    numbers), or ``refused: `` and the reason."""

    runs_module: ClassVar[bool] = False
    """Whether it runs the optimized PyTorch module and not the graph."""

    runs_code: ClassVar[bool] = False
    """Whether loading an engine runs code that lies in it: an artifact's is then loaded only where it is trusted."""

    def __init__(self, **parameters: Any) -> None:
        """Raises ``ToolchainError`` for an unknown parameter or one out of its range."""
        try:
            super().__init__(**parameters)
        except ValidationError as error:
            raise_faults(invalid(error, what=self.name(), model=type(self)))

    @classmethod
    def name(cls) -> str:
        """The file's name without ``_engine``."""
        return cls.__module__.rpartition(".")[2].removesuffix("_engine")

    @abstractmethod
    def availability(self) -> Availability:
        """Installed, importable, able to build here, able to run here; never raises."""

    @abstractmethod
    def build(self, graph: Graph, folder: Path) -> Built:
        """Write the engine into ``folder``, which exists and is empty.

        Raises:
            ToolchainError: the graph cannot be built, with the backend's own reason.
        """

    @abstractmethod
    def load(self, folder: Path, *, threads: int, module: Callable[[], nn.Module]) -> Runner:
        """Ready the engine that ``build`` left in ``folder``.

        Args:
            folder: what ``build`` wrote.
            threads: threads that a CPU engine may use.
            module: gives the optimized PyTorch module, for a target that runs that.
        """
