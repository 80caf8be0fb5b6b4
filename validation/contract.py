"""What validation asks of others: something to run, and a whole job to run it on where a model has one.

A metric is one file under ``validation/metrics`` with one subclass of ``OutputMetric`` or of a ``WorkloadMetric``, such
as ``SampleMetric``, ``SequenceMetric`` or ``SoundMetric``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from enginewright.ground import spectra
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

    job: ClassVar[str]
    """One word for what is done, such as ``sampling``."""

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

    job = "sampling"

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
class ClassifyingTask(Workload):
    """A run that tells the classes of n inputs; results are the classes told and the true ones, (n, 2)."""

    job = "classifying"

    def drawn(self, results: Array) -> Array:
        """The classes as they are."""
        return results


@dataclass(frozen=True, kw_only=True)
class DecodingTask(Workload):
    """A run that continues n sequences by L tokens each, every one the likeliest; results are their ids, (n, L)."""

    job = "decoding"

    def drawn(self, results: Array) -> Array:
        """The ids as they are."""
        return results


@dataclass(frozen=True, kw_only=True)
class SpectraTask(Workload):
    """A run whose n results are spectra of sounds: natural logarithms of mel magnitudes, (n, M, T).

    Args:
        rate: samples a second of the sounds; the highest band ends at half of it.
    """

    job = "spectra"

    rate: int

    def drawn(self, results: Array) -> Array:
        """The results as they are."""
        return results

    def log_mel(self, drawn: Array) -> Array:
        """What the results sound like: (n, M, T) again."""
        return drawn


@dataclass(frozen=True, kw_only=True)
class SoundTask(SpectraTask):
    """A run whose n results are sounds, (n, S), with full scale 1; spectra are of 40 ms, one for each 10 ms."""

    job = "sound"

    @property
    def hop(self) -> int:
        """Samples of 10 ms."""
        return self.rate // 100

    @property
    def window(self) -> int:
        """Samples of 40 ms."""
        return 4 * self.hop

    def log_mel(self, drawn: Array) -> Array:
        """What ``log_mel_of_sounds`` gives: (n, 80, T), in float64."""
        return spectra.log_mel_of_sounds(drawn, rate=self.rate)


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


class ClassMetric(WorkloadMetric):
    """Compares classes that were told with the true ones."""

    workload = ClassifyingTask

    @abstractmethod
    def measure(self, task: ClassifyingTask, original: Array, candidate: Array) -> float:
        """Classes told and true ones (n, 2), of both."""


class SequenceMetric(WorkloadMetric):
    """Compares sequences that were continued token by token."""

    workload = DecodingTask

    @abstractmethod
    def measure(self, task: DecodingTask, original: Array, candidate: Array) -> float:
        """Ids (n, L) of both."""


class SoundMetric(WorkloadMetric):
    """Compares sounds with those that the original makes of the same inputs."""

    workload = SoundTask
    compares = True

    @abstractmethod
    def measure(self, task: SoundTask, original: Array, candidate: Array) -> float:
        """Sounds (n, S) of both; NaN where the candidate's are not finite.

        Raises ``ToolchainError`` where they cannot be compared one by one.
        """
