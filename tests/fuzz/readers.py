"""What is fed with odd files: each reader of the product, with a right document to begin from."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from torch import nn

from tests.fuzz import mutations
from tests.graphs import mixed

Read = Callable[[Path, bytes], object]


@dataclass(frozen=True, kw_only=True)
class Reader:
    """One reader: the files that it is given, and what it does with the bytes of one.

    Args:
        files: a strategy of contents.
        read: (an empty folder, content) -> anything; may raise ``ToolchainError`` alone.
        weight: its share of the tries, against the others'.
    """

    files: st.SearchStrategy[Any]
    read: Read
    weight: int = 1


def at(name: str, read: Callable[[Path], object]) -> Read:
    """Read a file of this name."""

    def reading(folder: Path, content: bytes) -> object:
        (folder / name).write_bytes(content)
        return read(folder / name)

    return reading


def readers(artifact: Path, folder: Path) -> Mapping[str, Reader]:
    """Every reader by name.

    Args:
        artifact: a whole one, read only.
        folder: for files that are made once.
    """
    return {
        **json_readers(artifact),
        **tensor_readers(),
        **graph_readers(folder),
        **text_readers(),
    }


def json_readers(artifact: Path) -> dict[str, Reader]:
    """Readers of JSON and TOML files."""
    import tomllib

    from enginewright import artifact as folders
    from enginewright.passes.contract import Plan
    from enginewright.passes.heads.search_log import SearchLog
    from enginewright.passes.quantization.quantize_int8 import QuantizeInt8
    from enginewright.programs import FILE, read_program
    from enginewright.recipe import read as read_recipe
    from enginewright.reports import html, junit, markdown, record
    from enginewright.sources.contract import read_interface
    from enginewright.validation import regression

    def parsed(name: str) -> Any:
        return json.loads((artifact / name).read_text())

    report, manifest = parsed("report.json"), parsed("manifest.json")
    baseline = regression.baseline_from(report)
    baseline_json = baseline.model_dump(mode="json", by_alias=True, exclude_none=True)
    plan = parsed(next(path.relative_to(artifact).as_posix() for path in (artifact / "plans").glob("*.json")))
    plan["arrays"] = {}
    program = {
        "schema": 1,
        "networks": {
            "prepare": {"takes": ["y"], "gives": []},
            "whole": {"takes": None, "gives": ["r"]},
            "short": {"takes": ["x", "t", "p", "r"], "gives": []},
        },
        "ways": [
            {"calls": [{"network": "whole", "once": []}], "reads": [], "otherwise": 0},
            {
                "calls": [{"network": "prepare", "once": ["y"]}, {"network": "short", "once": []}],
                "reads": ["r"],
                "otherwise": 0,
            },
        ],
        "table": {"input": "t", "timesteps": [999.0, 0.0], "ways": [0, 1]},
        "states": [{"name": "r", "shape": [4, 8], "dtype": "float32"}],
        "shared": [],
        "hoisted": {},
    }

    def read_report(path: Path) -> None:
        found = record.read(path)
        html.render(found)
        markdown.render(found)
        junit.render(found)

    def check_report(path: Path) -> None:
        record.read(path)
        content = json.loads(path.read_text())
        regression.render_table(regression.check(baseline, content))
        regression.baseline_from(content)

    def check_baseline(path: Path) -> None:
        regression.render_table(regression.check(regression.read(path), report))

    def read_plan(path: Path) -> Plan:
        return Plan.read(path, QuantizeInt8().declared)

    def interface(path: Path) -> None:
        read_interface(folders.read_manifest(path.parent))

    def log_of(path: Path) -> object:
        return SearchLog(path, "search")

    content = {key: manifest[key] for key in manifest if key != "files"} | {"files": {"a": {"bytes": 1, "sha256": "x"}}}
    without_files = content | {"files": {}}
    return {
        "recipe": Reader(
            files=mutations.changed_toml(tomllib.loads((artifact / "recipe.toml").read_text())),
            read=at("recipe.toml", read_recipe),
            weight=3,
        ),
        "manifest": Reader(
            files=mutations.changed_json(content),
            read=at("manifest.json", lambda path: folders.read_manifest(path.parent)),
            weight=2,
        ),
        "interface": Reader(files=mutations.changed_json(without_files), read=at("manifest.json", interface), weight=3),
        "report": Reader(files=mutations.changed_json(report), read=at("report.json", read_report)),
        "checked report": Reader(files=mutations.changed_json(report), read=at("report.json", check_report)),
        "baseline": Reader(files=mutations.changed_json(baseline_json), read=at("baseline.json", check_baseline)),
        "plan": Reader(files=mutations.changed_json(plan), read=at("plan.json", read_plan), weight=2),
        "program": Reader(
            files=mutations.changed_json(program), read=at(FILE, lambda path: read_program(path.parent)), weight=4
        ),
        "search log": Reader(
            files=mutations.changed_json({"search": "search"}).map(lambda b: b + b'\n{"of": "a", "score": 1}\n'),
            read=at("log.jsonl", log_of),
        ),
    }


def tensor_readers() -> dict[str, Reader]:
    """Readers of safetensors files."""
    from safetensors.torch import save

    from enginewright.calibration import calls_in
    from enginewright.ground.signature import Dim, InputSpec
    from enginewright.passes.contract import Context
    from enginewright.passes.recovery import checkpoints
    from enginewright.passes.specialize.fold_adapters import FoldAdapters
    from enginewright.sources.filling import shards
    from enginewright.targets import stored

    specs = (
        InputSpec(name="x", shape=(Dim(name="batch", low=1, typical=2, high=8), 3)),
        InputSpec(name="n", shape=(4,), dtype="int64"),
    )
    calls = parts_of(save({"x": torch.ones(4, 3), "n": torch.arange(4)}))
    lora = parts_of(save({"0.lora_A.weight": torch.ones(2, 4), "0.lora_B.weight": torch.ones(3, 2)}))

    def adapter(path: Path) -> object:
        model = nn.Sequential(nn.Linear(4, 3))
        return FoldAdapters(file=str(path), alpha=2.0).plan(model, Context())

    weight = nn.Parameter(torch.ones(3))
    state = {"step": 1, "losses": [1.0], "cosines": [], "stopped": None}
    metadata = {"state": json.dumps(state), "settings": "{}"}
    kept = {
        "weight.w": torch.ones(3),
        "optimizer.0.step": torch.tensor(1.0),
        "optimizer.0.exp_avg": torch.ones(3),
        "optimizer.0.exp_avg_sq": torch.ones(3),
        "random": torch.get_rng_state(),
    }
    checkpoint = parts_of(save(kept, metadata=metadata))

    def load_checkpoint(path: Path) -> None:
        random = torch.get_rng_state()
        checkpoints.load(path.parent, {"w": weight}, torch.optim.AdamW([weight]), "{}")
        torch.set_rng_state(random)

    index = {"metadata": {}, "weight_map": {"a": "model-1.safetensors"}}
    return {
        "mapped weights": Reader(
            files=mutations.changed_safetensors(*calls), read=at("w.safetensors", stored.read), weight=6
        ),
        "calibration": Reader(
            files=mutations.changed_safetensors(*calls),
            read=at("c.safetensors", lambda path: calls_in(path, specs)),
            weight=4,
        ),
        "adapter": Reader(files=mutations.changed_safetensors(*lora), read=at("a.safetensors", adapter), weight=4),
        "checkpoint": Reader(
            files=mutations.changed_safetensors(*checkpoint), read=at(checkpoints.FILE, load_checkpoint), weight=2
        ),
        "shards": Reader(
            files=mutations.changed_json(index),
            read=at("model.safetensors.index.json", lambda path: shards(path.parent, "model")),
        ),
    }


def parts_of(file: bytes) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file, and its data."""
    length = int.from_bytes(file[:8], "little")
    return json.loads(file[8 : 8 + length]), file[8 + length :]


def graph_readers(folder: Path) -> dict[str, Reader]:
    """Readers of graphs and exported programs."""
    from enginewright.sources import onnx_source, pt2_source

    graph = mixed(folder / "mixed.onnx").read_bytes()
    program = folder / "net.pt2"
    torch.export.save(torch.export.export(nn.Sequential(nn.Linear(4, 3), nn.ReLU()), (torch.ones(2, 4),)), program)
    with zipfile.ZipFile(program) as archive:
        records = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    model = next(name for name in records if name.endswith("models/model.json"))
    configs = [name for name in records if name.endswith("_config.json")]

    def packed(name: str, content: bytes) -> bytes:
        file = BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            for each, bytes_ in {**records, name: content}.items():
                archive.writestr(each, bytes_)
        return file.getvalue()

    changed = st.sampled_from([model, *configs]).flatmap(
        lambda name: mutations.changed_json(json.loads(records[name])).map(lambda content: packed(name, content))
    )
    return {
        "onnx": Reader(
            files=mutations.changed_bytes(graph),
            read=at("m.onnx", lambda path: onnx_source.load(f"onnx:{path}")),
            weight=2,
        ),
        "pt2 records": Reader(files=changed, read=at("m.pt2", lambda path: pt2_source.load(f"pt2:{path}"))),
        "pt2 bytes": Reader(
            files=mutations.changed_bytes(program.read_bytes()),
            read=at("m.pt2", lambda path: pt2_source.load(f"pt2:{path}")),
        ),
    }


def text_readers() -> dict[str, Reader]:
    """Readers of what stands on a command line."""
    from enginewright import sources
    from enginewright.arguments import named, sizes_from
    from enginewright.ground.signature import Dim, InputSpec
    from enginewright.recipe import gate_names, make
    from enginewright.validation.gates import parse

    known = gate_names()
    specs = [InputSpec(name="x", shape=(Dim(name="batch", low=1, typical=2, high=8), 3))]
    odd = st.one_of(
        st.text(max_size=20),
        st.sampled_from(["\0", "x" * 5_000, "../..", "²", "٣", "1e999", "nan", "9" * 5_000, "[" * 5_000, "{}"]),
    )

    def model(folder: Path, content: str) -> object:
        del folder
        return sources.load(content)

    def a_pass(folder: Path, content: str) -> object:
        return make({"schema": 1, "model": "dit:tiny", "steps": [named("pass", content)], "targets": []}, folder=folder)

    prefixes = st.sampled_from(["dit:", "onnx:", "onnx:m.onnx?batch=", "pt2:", "py:", "py:net.py:", ""])
    return {
        "model string": Reader(files=st.tuples(prefixes, odd).map("".join), read=model, weight=2),
        "pass": Reader(
            files=st.tuples(st.sampled_from(["quantize_int8:", "prune_depth:share=", "distill:steps=", ""]), odd).map(
                "".join
            ),
            read=a_pass,
            weight=2,
        ),
        "gate": Reader(
            files=st.tuples(st.sampled_from(["fidelity.cosine >= ", "latency.ratio", ""]), odd).map("".join),
            read=lambda folder, content: parse(content, known=known),
            weight=2,
        ),
        "size": Reader(
            files=st.tuples(st.sampled_from(["batch=", "batch", ""]), odd).map("".join),
            read=lambda folder, content: sizes_from([content], specs),
        ),
    }
