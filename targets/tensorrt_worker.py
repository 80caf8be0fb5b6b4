"""Build one TensorRT engine in a process of its own, through polygraphy.

A process apart, because polygraphy chooses between TensorRT and TensorRT-RTX once, at import, and because a builder
that runs out of memory must not take the export with it. Run as a script, with a JSON request on standard input:
``{"rtx": bool, "onnx": path, "engine": path, "ranges": {input: [low, typical, high]}, "sparse": bool}``. The last line
on standard output is ``{"ok": true}`` or ``{"ok": false, "reason": text}``; everything before it is the builder's log.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any


def build(request: dict[str, Any]) -> None:
    """Parse, build, write; raises whatever the backend raises."""
    from polygraphy.backend import trt
    from polygraphy.logger import G_LOGGER

    G_LOGGER.module_severity = G_LOGGER.VERBOSE if os.environ.get("ENGINEWRIGHT_VERBOSE") else G_LOGGER.WARNING
    profile = trt.Profile()
    for name, (low, typical, high) in request["ranges"].items():
        profile.add(name, min=tuple(low), opt=tuple(typical), max=tuple(high))
    if request["rtx"]:
        from polygraphy.backend.tensorrt_rtx import CreateConfigRTX as CreateConfig
    else:
        CreateConfig = trt.CreateConfig  # noqa: N806
    options = {"sparse_weights": True} if request["sparse"] else {}
    network = trt.NetworkFromOnnxPath(request["onnx"], strongly_typed=True)
    engine = trt.EngineBytesFromNetwork(network, config=CreateConfig(profiles=[profile], **options))()
    with open(request["engine"], "wb") as file:  # noqa: PTH123
        file.write(engine)


def main() -> int:
    """Read the request, build, answer."""
    request = json.load(sys.stdin)
    if request["rtx"]:
        os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1"
    try:
        build(request)
    except BaseException as cause:
        print(json.dumps({"ok": False, "reason": f"{type(cause).__name__}: {cause}"}), flush=True)
        return 1
    print(json.dumps({"ok": True}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
