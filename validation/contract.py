"""What validation asks of others: something to run, and for generative models a whole job to run it on.

A metric is one file under ``validation/metrics`` with one subclass of ``OutputMetric`` or ``SampleMetric``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

from enginewright.ground.runner import Runner
from enginewright.ground.signature import Array


@dataclass(frozen=True, kw_only=True)
class SamplingTask:
    """A whole sampling run of a generative model, and a judge of what it draws. Shapes: n samples, d features.

    Args:
        sample: (runner, n, seed) -> pictures (n, C, H, W) in [-1, 1]; the same seed starts from the same noise.
        asked: n -> the class asked of each sample, (n,).
        read: pictures -> the class that the judge reads in each, (n,), and its features, (n, d).
        real: features of real pictures held out from training, (m, d): what samples are compared with.
        real_again: features of other real pictures, (k, d), as many of each class: the floor of the distance.
        samples: how many to draw unless the recipe says otherwise.
        floor: fewest samples at which the Frechet distance means anything.
        calls: n -> calls of the runner that drawing them takes, for an estimate of the time; None: not known.
    """

    sample: Callable[[Runner, int, int], Array]
    asked: Callable[[int], Array]
    read: Callable[[Array], tuple[Array, Array]]
    real: Array
    real_again: Array
    samples: int
    floor: int
    calls: Callable[[int], int] | None = None


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """Samples of one runner, read by the judge: pictures (n, C, H, W), classes (n,), features (n, d)."""

    pictures: Array
    classes: Array
    features: Array


class Metric(ABC):
    """A number with a direction and a unit. The file's name is the metric's name."""

    higher_is_better: ClassVar[bool]
    unit: ClassVar[str] = ""
    relative_tolerance: ClassVar[float | None] = 0.25
    """How much worse a figure may be than a baseline's, as a share of it."""
    absolute_tolerance: ClassVar[float | None] = None
    """How much worse it may be, in its own unit; beside a relative one the larger counts."""
    kept: ClassVar[bool] = True
    """Whether a baseline keeps it; not where another figure says the same."""
    compares: ClassVar[bool] = False
    """Whether it is of a candidate beside the original, so that the original's own says nothing."""
    kind: ClassVar[Literal["fidelity", "quality"]]


class OutputMetric(Metric):
    """Compares one output of an engine with the original's."""

    kind = "fidelity"
    absolute_tolerance = 1e-5  # the order of float32 additions changes with threads and CPU; quantization is far above

    @abstractmethod
    def measure(self, original: Array, candidate: Array) -> float:
        """Both of one shape; computed in float64. Infinite where the definition says so."""


class SampleMetric(Metric):
    """Compares whole sampling runs."""

    kind = "quality"

    @abstractmethod
    def measure(self, task: SamplingTask, original: Drawn, candidate: Drawn) -> float:
        """Raises ``ToolchainError`` with a reason when it cannot be measured on these samples."""
