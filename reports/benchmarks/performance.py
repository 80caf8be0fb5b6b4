"""The performance that the main job promises, measured through the command line.

    python -m enginewright.reports.benchmarks.performance [--skip-xl]

Writes ``reports/results/performance.json``. Times are wall seconds of whole commands; latencies are ratios of engines
and original taken in turns in one process, with a 95 % interval. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent.parent / "results" / "performance.json"


def enginewright(*arguments: str) -> tuple[float, str]:
    """Run the command line; wall seconds and standard output. A failure (exit code 2) ends the benchmark."""
    command = [sys.executable, "-m", "enginewright", *arguments]
    start = time.perf_counter()
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    seconds = time.perf_counter() - start
    if run.returncode == 2:
        sys.exit(f"enginewright {' '.join(arguments)} failed")
    return seconds, run.stdout


def startup(runs: int = 7) -> dict[str, float]:
    """Median seconds of commands that load no torch."""
    commands = {"--help": ["--help"], "list": ["list", "passes"]}
    return {
        name: round(statistics.median(enginewright(*arguments)[0] for _ in range(runs)), 3)
        for name, arguments in commands.items()
    }


def main_job(folder: Path) -> dict[str, Any]:
    """The whole export of ``dit:digits`` in 8 bits with both targets and validation."""
    targets = ["--target", "onnxruntime", "--target", "tensorrt_rtx"]
    arguments = ["export", "dit:digits", "--pass", "quantize_int8", *targets, "--quiet", "--json"]
    seconds, text = enginewright(*arguments, "-o", str(folder / "digits"))
    report = json.loads(text)
    ort = report["targets"][0]
    return {"seconds": round(seconds, 1), "bound_seconds": 90, **latency(ort["latency"]), "fidelity": ort["fidelity"]}


def dit_s2(folder: Path) -> dict[str, Any]:
    """Latency and error of ``dit:S/2`` at batch 2: 8 bits and fp32 in ONNX Runtime beside PyTorch eager."""
    common = ["--target", "onnxruntime", "--no-validate", "--quiet", "--json"]
    enginewright("export", "dit:S/2", *common, "-o", str(folder / "fp32"))
    _, text = enginewright("export", "dit:S/2", "--pass", "quantize_int8", *common, "-o", str(folder / "int8"))
    notes = json.loads(text)["targets"][0]["notes"]
    arguments = ["bench", str(folder / "int8"), "--against", str(folder / "fp32"), "--rounds", "30"]
    _, text = enginewright(*arguments, "--threads", "2", "--quiet", "--json")
    timed = {("fp32" if "fp32" in name else "int8"): latency(t) for name, t in json.loads(text)["runners"].items()}
    _, text = enginewright("compare", "dit:S/2", str(folder / "int8"), "--quiet", "--json")
    error = json.loads(text)["runners"][0]["fidelity"][0]["relative_l2"]
    return {**timed, "int8_relative_l2": error, "notes": notes, "bound_ratio": 0.58, "bound_relative_l2": 0.03}


def xl_memory(folder: Path) -> dict[str, Any]:
    """Peak memory of exporting ``dit:XL/2``, over its weights' bytes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    seconds, _ = enginewright("export", "dit:XL/2", "--no-validate", "--quiet", "-o", str(folder / "xl"))
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    weights = 675_129_632 * 4
    if peak == before * 1024:
        sys.exit("an earlier command had the higher peak; the figure would be wrong")
    ratio = round(peak / weights, 3)
    return {"peak_bytes": peak, "weight_bytes": weights, "ratio": ratio, "bound": 1.6, "seconds": round(seconds, 1)}


def latency(timed: dict[str, Any]) -> dict[str, Any]:
    """The part of a latency record that is quoted."""
    keys = ("ratio", "ratio_low", "ratio_high", "median_s", "original_median_s", "spread", "warnings")
    return {key: timed[key] for key in keys}


def main() -> None:
    """Measure everything and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--skip-xl", action="store_true", help="leave out the export that needs 5 GB of memory")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        _, text = enginewright("doctor", "--json")
        machine = json.loads(text)
        found: dict[str, Any] = {"environment": machine["environment"], "versions": machine["versions"]}
        found["startup_seconds"] = startup()
        found["export_dit_digits"] = main_job(folder)
        found["dit_s2_batch_2"] = dit_s2(folder)
        if not chosen.skip_xl:
            found["export_dit_xl2"] = xl_memory(folder)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
