"""TensorRT for RTX: builds ahead of time on a machine without a GPU; running needs one."""

from __future__ import annotations

from typing import ClassVar

from enginewright.targets.tensorrt_builder import PolygraphyTarget


class TensorRtRtx(PolygraphyTarget):
    """An engine for RTX GPUs, with one optimization profile over the model's declared shapes."""

    module: ClassVar[str] = "tensorrt_rtx"
    extra: ClassVar[str] = "tensorrt-rtx"
    builds_without_gpu: ClassVar[bool] = True
