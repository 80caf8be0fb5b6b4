"""TensorRT: needs an NVIDIA GPU to build and to run."""

from __future__ import annotations

from typing import ClassVar

from enginewright.targets.tensorrt_builder import PolygraphyTarget


class TensorRt(PolygraphyTarget):
    """An engine for data-center GPUs, with one optimization profile over the model's declared shapes."""

    module: ClassVar[str] = "tensorrt"
    extra: ClassVar[str] = "tensorrt"
    builds_without_gpu: ClassVar[bool] = False
