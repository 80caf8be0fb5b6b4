"""A made-up report that holds a bit of everything, hostile text included."""

from __future__ import annotations

import base64

import numpy as np

from enginewright.reports.pictures import png
from enginewright.reports.record import (
    BeforeAfter,
    Curve,
    Fidelity,
    Gate,
    Latency,
    ModelRecord,
    Quality,
    Report,
    Samples,
    Skip,
    Step,
    TargetRecord,
    TokenMap,
)

HOSTILE_PATH = 'blocks.0.<script src="http://evil.example/x.js">alert("1")</script>'
HOSTILE_NAME = "a|b\nc & <b>d</b>"
NO_DRIVER = "not runnable: no NVIDIA driver (libcuda.so.1)"


def example_report() -> Report:
    """Two targets, one measured and one that does not run here; a gate each met, missed and not measured."""
    return Report(
        model=ModelRecord(
            name="dit:digits", weights="trained, shipped", parameter_count=2847200, macs=91888128, bytes=11389312
        ),
        verdict="missed",
        steps=[_prune(), _quantize()],
        targets=[_onnxruntime(), _tensorrt_rtx()],
        gates=[
            Gate(
                name="fidelity.cosine", target="onnxruntime", bound=">= 0.998", verdict="met", value=0.9993780684933933
            ),
            Gate(
                name="quality.frechet_ratio",
                target="onnxruntime",
                bound="<= 3",
                verdict="missed",
                value=3.004660816980438,
                reason="quality.frechet_ratio is 3.004660817, asked for <= 3",
            ),
            Gate(name="latency.ratio", target="tensorrt_rtx", bound="<= 1", verdict="not_measured", reason=NO_DRIVER),
        ],
        samples=[
            Samples(
                target="onnxruntime",
                original_png=_png(30),
                candidate_png=_png(34),
                caption="the first 20 of 200 samples, from the same noise",
            )
        ],
        validation={"inputs": "met on sampling runs", "seed": 0, "calls": 8, "rounds": 24, "warm_up": 3, "batch": {}},
        environment={
            "cpu": "AMD EPYC",
            "cores": 2,
            "instructions": ["avx2", "avx512f"],
            "int8_saturates": False,
            "gpu": "none: no NVIDIA driver (libcuda.so.1)",
            "load": None,
        },
        versions={"torch": "2.13.0+cpu", "onnx": "1.23.2", "onnxruntime": "1.32.0"},
        seconds=173.257,
    )


def _prune() -> Step:
    return Step(
        name="prune_heads",
        parameters={"keep": 4},
        plan_digest="0badc0de" * 8,
        changed=[f"blocks.{number}.attn" for number in range(6)],
        skipped=[],
        parameter_count=BeforeAfter(before=2847200, after=2509424),
        macs=BeforeAfter(before=91888128, after=80312448),
        bytes=BeforeAfter(before=11389312, after=10038208),
        seconds=0.314,
    )


def _quantize() -> Step:
    only_linear = "only linear layers are quantized"
    return Step(
        name="quantize_int8",
        parameters={"observer": "max", "exclude": [], "note": HOSTILE_NAME},
        plan_digest="1b544549" * 8,
        changed=[HOSTILE_PATH, *(f"blocks.{number}.mlp.fc1" for number in range(6))],
        skipped=[
            Skip(path="x_embedder.proj", reason=only_linear),
            Skip(path=HOSTILE_PATH, reason=HOSTILE_NAME),
            Skip(path="y_embedder.embedding_table", reason=only_linear),
        ],
        parameter_count=BeforeAfter(before=2509424, after=2509424),
        macs=BeforeAfter(before=80312448, after=None),
        bytes=BeforeAfter(before=10038208, after=2641120),
        seconds=4.021,
        notes=[HOSTILE_NAME],
        curve=Curve(
            x="bytes of the layers, as a share of what they were",
            y="predicted relative L2 error",
            points=[(0.26, 0.04), (0.5, 0.01), (0.75, 0.004), (1.0, 0.0)],
            chosen=(0.5, 0.011),
        ),
        maps=[TokenMap(left=[[0, 1], [2, 2]], borders=2), TokenMap(left=[[2, 2], [0, 0]], borders=2)],
    )


def _onnxruntime() -> TargetRecord:
    return TargetRecord(
        name="onnxruntime",
        parameters={"provider": "cpu", "int8": "dynamic"},
        installed=True,
        importable=True,
        buildable=True,
        runnable=True,
        built=True,
        bytes=3045805,
        seconds=0.766,
        notes=["dynamic 8-bit products: the dynamic form took 0.95 of the static form's time"],
        fidelity=[
            Fidelity(
                output="noise", max_abs=0.16351, mean_abs=0.027988, relative_l2=0.036322, cosine=0.99937, snr_db=28.7965
            ),
            Fidelity(
                output="variance", max_abs=3.1e-7, mean_abs=4.2e-8, relative_l2=2.5e-7, cosine=0.9999969, snr_db=None
            ),
        ],
        quality=[
            Quality(name="frechet_distance", value=8.049063, original=7.46133, higher_is_better=False),
            Quality(name="frechet_ratio", value=3.004660816980438, original=2.785264, higher_is_better=False),
            Quality(name="judged_as_asked", value=0.935, original=0.92, higher_is_better=True),
            Quality(
                name="psnr_db", value=None, unit="dB", higher_is_better=True, reason="not finite: the samples are equal"
            ),
        ],
        latency=_latency(),
    )


def _latency() -> Latency:
    """Times that wander a little, each with one call that was disturbed."""
    ours = [(6.2 + 0.9 * ((7 * n) % 11) / 11) / 1e3 for n in range(23)] + [11.4 / 1e3]
    theirs = [(9.8 + 1.6 * ((5 * n) % 13) / 13) / 1e3 for n in range(23)] + [14.9 / 1e3]
    return Latency(
        samples_s=ours,
        original_samples_s=theirs,
        median_s=0.00669,
        p90_s=0.007018,
        p99_s=0.010393,
        original_median_s=0.01054,
        spread=0.0734,
        ratio=0.6347,
        ratio_low=0.6121,
        ratio_high=0.6622,
        warm_up=3,
        threads=2,
        shapes={"x": [2, 1, 28, 28], "t": [2]},
        warnings=["1 of 24 samples of the engine are outliers; something else ran beside it"],
    )


def _tensorrt_rtx() -> TargetRecord:
    return TargetRecord(
        name="tensorrt_rtx",
        parameters={"build_seconds": 3600},
        installed=True,
        importable=True,
        buildable=True,
        runnable=False,
        built=True,
        reason=NO_DRIVER,
        bytes=7799797,
        seconds=1.996,
        notes=["[W] ModelImporter.cpp:1071: Make sure input y has Int64 binding."],
    )


def _png(phase: int, width: int = 140, height: int = 28) -> str:
    """Grey rings as a PNG file in base64."""
    y, x = np.indices((height, width))
    rings = ((x % 28 - 14) ** 2 + (y - 14) ** 2 + phase) % 256
    return base64.b64encode(png(rings.astype(np.uint8)[..., None])).decode()
