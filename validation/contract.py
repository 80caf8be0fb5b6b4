"""What validation asks of others: something to run, and a whole job to run it on where a model has one.

A metric is one file under ``validation/metrics`` with one subclass of ``OutputMetric``, of ``SampleMetric`` or of
``SequenceMetric``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from enginewright.ground.runner import Runner
from enginewright.ground.signature import Array


@dataclass(frozen=True, kw_only=True)
class Workload(ABC):
    """A whole job on a model, made of many calls.

    Args:
        sample: (runner, n, seed) -> n results, one a row; the same seed starts from the same noise or prompts.
        samples: how many unless the recipe says otherwise.
        calls: n -> calls of the runner that they take, for an estimate of the time; None: not known.
    """

    sample: Callable[[Runner, int, int], Array]
    samples: int
    calls: Callable[[int], int] | None = None

    @abstractmethod
    def drawn(self, results: Array) -> Any:
        """Results as the metrics of this kind of job take them."""


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """Samples of one runner, read by the judge: pictures (n, C, H, W), classes (n,), features (n, d)."""

    pictures: Array
    classes: Array
    features: Array


@dataclass(frozen=True, kw_only=True)
class SamplingTask(Workload):
    """A sampling run that draws pictures (n, C, H, W) in [-1, 1], and a judge of them. Shapes: n samples, d features.

    Args:
        asked: n -> the class asked of each sample, (n,).
        read: pictures -> the class that the judge reads in each, (n,), and its features, (n, d).
        real: features of real pictures held out from training, (m, d): what samples are compared with.
        real_again: features of other real pictures, (k, d), as many of each class: the floor of the distance.
        floor: fewest samples at which the Frechet distance means anything.
    """

    asked: Callable[[int], Array]
    read: Callable[[Array], tuple[Array, Array]]
    real: Array
    real_again: Array
    floor: int

    def drawn(self, results: Array) -> Drawn:
        """Pictures (n, C, H, W), judged."""
        classes, features = self.read(results)
        return Drawn(pictures=results, classes=classes, features=features)


@dataclass(frozen=True, kw_only=True)
class DecodingTask(Workload):
    """A run that continues n sequences by L tokens each, every one the likeliest; results are their ids, (n, L)."""

    def drawn(self, results: Array) -> Array:
        """The ids as they are."""
        return results


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


class WorkloadMetric(Metric):
    """Compares whole jobs, of one kind."""

    kind = "quality"
    workload: ClassVar[type[Workload]]

    @abstractmethod
    def measure(self, task: Any, original: Any, candidate: Any) -> float:
        """What each drew, as ``drawn`` gives it.

        Raises ``ToolchainError`` with a reason when it cannot be measured on these samples.
        """


class SampleMetric(WorkloadMetric):
    """Compares whole sampling runs."""

    workload = SamplingTask

    @abstractmethod
    def measure(self, task: SamplingTask, original: Drawn, candidate: Drawn) -> float:
        """Raises ``ToolchainError`` with a reason when it cannot be measured on these samples."""


class SequenceMetric(WorkloadMetric):
    """Compares sequences that were continued token by token."""

    workload = DecodingTask

    @abstractmethod
    def measure(self, task: DecodingTask, original: Array, candidate: Array) -> float:
        """Ids (n, L) of both."""
