"""One catalogue entry or model in full: what ``enginewright show`` prints."""

from __future__ import annotations

import importlib
import inspect
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from enginewright import catalog, sources
from enginewright.ground.errors import unknown
from enginewright.reports import sheets
from enginewright.sources.mistaken import READERS, mistaken

if TYPE_CHECKING:
    from torch import nn

    from enginewright.ground.signature import InputSpec

SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def describe(text: str, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """Everything known about an entry of any kind or a source's model, as JSON can hold it.

    Args:
        text: an entry's name, or a model string.
        trust_remote_code: run code that a checkpoint folder brings along.

    Raises:
        ToolchainError: no kind has it; or a source's model cannot be loaded.
    """
    name, colon, size = text.partition(":")
    if colon and name in sources.prefixes():
        return {"kind": "models", "name": text, **source_details(name, text, trust_remote_code)}
    for kind in catalog.KINDS:
        found = catalog.entries(kind).get(name)
        if found is not None:
            return {"kind": kind, "name": text, "documentation": found.docstring, **details(kind, name, size)}
    figures = dict(catalog.listing("metrics"))
    if name in figures:
        return figure_details(name, figures[name])
    if "/" in text or Path(text).exists() or Path(text).suffix in READERS:
        fault = mistaken(text)
        assert fault is not None
        raise fault
    known = [name for kind in catalog.KINDS for name in catalog.entries(kind)]
    raise unknown("entry", name, [*known, *figures])


def figure_details(name: str, summary: str) -> dict[str, Any]:
    """What a gate bounds, by the name that gates have for it."""
    metric = catalog.entries("metrics").get(name.partition(".")[2])
    if metric is not None:
        return {**describe(metric.name), "name": name}
    how = f"A gate on it: --gate '{name} <= 0.8'; on one target only: --gate 'onnxruntime: {name} <= 0.8'."
    return {"kind": "metrics", "name": name, "documentation": f"{summary}\n\n{how}", "gate": name}


def details(kind: str, name: str, size: str) -> dict[str, Any]:
    """What is particular to a kind."""
    if kind == "models":
        return model_details(name, size)
    if kind == "passes":
        return parameters(catalog.pass_class(name))
    if kind == "targets":
        cls = catalog.target_class(name)
        return {**parameters(cls), "formats": dict(cls.formats)}
    if kind == "metrics":
        from enginewright.validation.metrics import load_metrics

        metric = load_metrics()[name]
        return {"gate": f"{metric.kind}.{name}", "unit": metric.unit, "higher_is_better": metric.higher_is_better}
    if kind == "sources":
        return {}
    if kind == "methods":
        return method_details(name)
    if kind == "pipelines":
        found = catalog.load("pipelines", name).SIZES
        sizes = {key: dict(each.parts) for key, each in found.items()}
        return {"sizes": sizes, "methods": [each.name for each in sheets.read_all() if each.name == name]}
    return {"content": catalog.entry("recipes", name).path.read_text()}


def method_details(name: str) -> dict[str, Any]:
    """Where a published method stands here: its paper, models, recipes, and what was measured of it, where it was."""
    declared = tomllib.loads(catalog.entry("methods", name).path.read_text())
    sheet = next((each for each in sheets.read_all() if each.name == name), None)
    return {
        "paper": declared["paper"],
        "models": declared.get("models", []),
        "recipes": declared.get("recipes", []),
        "measured": sheet.model_dump(mode="json")["lines"] if sheet else [],
    }


def parameters(cls: type[BaseModel]) -> dict[str, Any]:
    """Parameters with type, default, range and description."""
    found = []
    for name, field in cls.model_fields.items():
        limits = {key: getattr(limit, key) for limit in field.metadata for key in SIGNS if hasattr(limit, key)}
        kind = field.annotation
        found.append(
            {
                "name": name,
                "type": kind.__name__ if inspect.isclass(kind) else str(kind).replace("typing.", ""),
                "default": "required" if field.is_required() else field.default,
                "range": " ".join(f"{SIGNS[key]} {value}" for key, value in limits.items()),
                "description": field.description or "",
            }
        )
    return {"about": inspect.getdoc(cls), "parameters": found}


def model_details(name: str, size: str) -> dict[str, Any]:
    """Sizes; and for one size its input contract, parameters and multiply-accumulates, counted on the meta device."""
    import torch

    from enginewright.passes.contract import macs
    from enginewright.sources.reference import WEIGHTS, outputs_of, sizes_of

    module = catalog.load("models", name)
    sizes = sizes_of(module)
    if not size and len(module.SHIPPED) == 1:
        size = next(iter(module.SHIPPED))
    if size not in sizes:
        raise unknown(f"size of {name}", size, sizes)
    specs = module.inputs(sizes[size])
    with torch.device("meta"):
        net = module.build(sizes[size]).eval()
        example = {s.name: torch.empty(s.sizes({"batch": 1}), dtype=getattr(torch, s.dtype)) for s in specs}
    return {
        "size": size,
        "sizes": list(sizes),
        "parameter_count": sum(p.numel() for p in net.parameters()),
        "macs": macs(net, example),
        "weights": "trained, shipped" if (WEIGHTS / f"{name}-{size}.safetensors").exists() else "random",
        "inputs": inputs_as_json(specs),
        "outputs": list(outputs_of(module, sizes[size])),
        "published": [vars(figure) for figure in getattr(module, "FIGURES", {}).get(size, ())],
        "methods": [sheet.name for sheet in sheets.read_all() if name in sheet.models],
    }


def source_details(prefix: str, text: str, trust_remote_code: bool) -> dict[str, Any]:
    """A source's model, its weights left where they lie; of a whole pipeline, the networks that it holds."""
    from enginewright.passes.contract import cost

    about = {
        "source": prefix,
        "documentation": inspect.getdoc(importlib.import_module(f"enginewright.sources.{prefix}_source")),
    }
    if parts := sources.parts_of(text):
        return {**about, "components": [f"{text}#{part}" for part in parts]}
    model = sources.load(text, trust_remote_code=trust_remote_code)
    macs, reason = countable_macs(model.module, model.inputs)
    return {
        **about,
        "parameter_count": cost(model.module, None).parameter_count,
        "macs": macs,
        "macs_reason": reason,
        "weights": model.weights,
        "inputs": inputs_as_json(model.inputs),
        "outputs": list(model.outputs),
        "left_out": [vars(each) for each in model.left_out],
        "notes": list(model.notes),
        "published": [],
    }


def countable_macs(module: nn.Module, specs: Sequence[InputSpec]) -> tuple[int | None, str | None]:
    """Multiply-accumulates at batch 1, or None and why they cannot be counted on shapes alone."""
    import torch

    from enginewright.passes.contract import macs_of_shapes
    from enginewright.passes.kernel.graph_module import GraphModule
    from enginewright.validation.inputs import draw

    if isinstance(module, GraphModule):
        return None, "multiply-accumulates of ONNX graphs are not counted"
    example = {name: torch.from_numpy(array) for name, array in draw(specs, seed=0, sizes={"batch": 1}).items()}
    found = macs_of_shapes(module, example)
    return found, "its shapes depend on what its tensors hold" if found is None else None


def inputs_as_json(specs: Sequence[InputSpec]) -> list[dict[str, Any]]:
    """An input contract."""
    from enginewright.ground.signature import Dim

    return [
        {
            "name": s.name,
            "shape": [d.name if isinstance(d, Dim) else d for d in s.shape],
            "dtype": s.dtype,
            "role": s.role,
            "range": None if s.low is None else [s.low, s.high],
            "dynamic": {d.name: [d.low, d.typical, d.high] for d in s.shape if isinstance(d, Dim)},
            "multiple_of": {d.name: d.multiple_of for d in s.shape if isinstance(d, Dim) and d.multiple_of > 1},
        }
        for s in specs
    ]


def tell(data: dict[str, Any]) -> None:
    """Print an entry for a reader."""
    print(f"{data['name']} ({data['kind']})\n\n{data['documentation']}\n")
    if data.get("about"):
        print(f"{data['about']}\n")
    for parameter in data.get("parameters", []):
        limits = f", {parameter['range']}" if parameter["range"] else ""
        print(f"  {parameter['name']}: {parameter['type']}{limits}, default {parameter['default']!r}")
        print(f"      {parameter['description']}")
    for name, answer in data.get("formats", {}).items():
        print(f"  {name}: {answer}")
    if data["kind"] == "models":
        tell_model(data)
    if data["kind"] == "methods":
        tell_method(data)
    for size, parts in (data["sizes"] if data["kind"] == "pipelines" else {}).items():
        print(f"{size}: {', '.join(f'{part} ({model})' for part, model in parts.items())}")
    if data.get("methods"):
        print(f"what was measured: reports/METHODS.md, {', '.join(data['methods'])}")
    for key in ("gate", "unit", "higher_is_better"):
        if data.get(key) not in (None, ""):
            print(f"{key.replace('_', ' ')}: {data[key]}")
    if "content" in data:
        print(data["content"])


def tell_model(data: dict[str, Any]) -> None:
    """The part about a model's size."""
    if "components" in data:
        print("a pipeline; each network becomes an artifact of its own:")
        print("\n".join(f"  {part}" for part in data["components"]))
        return
    if "sizes" in data:
        print(f"sizes: {', '.join(data['sizes'])}")
    label = f"{data['size']}: " if "size" in data else ""
    macs = f"{data['macs']:,} multiply-accumulates at batch 1" if data["macs"] is not None else data["macs_reason"]
    print(f"{label}{data['parameter_count']:,} parameters, {macs}")
    print(f"weights: {data['weights']}")
    for spec in data["inputs"]:
        print(f"input {spec['name']} ({', '.join(map(sized(spec), spec['shape']))}) {spec['dtype']}{limits_text(spec)}")
    print(f"outputs: {', '.join(data['outputs'])}")
    for entry in data.get("left_out", []):
        print(f"left out: {entry['name']} ({entry['reason']})")
    for note in data.get("notes", []):
        print(f"note: {note}")
    for figure in data["published"]:
        print(f"published {figure['figure']}: {figure['value']} ({figure['source']})")


def tell_method(data: dict[str, Any]) -> None:
    """The part about a method: what was measured, line by line."""
    print(f"paper: {data['paper']}")
    for key in ("models", "recipes"):
        if data[key]:
            print(f"{key}: {', '.join(data[key])}")
    if not data["measured"]:
        print("nothing of it was measured yet")
    for line in data["measured"]:
        said = "; ".join(filter(None, (line["measured"], line["why"])))
        print(f"  {line['row']}, {line['what']}: {line['verdict'].replace('_', ' ')}{f' ({said})' if said else ''}")


def sized(spec: dict[str, Any]) -> Callable[[int | str], str]:
    """From a size or a dimension's name to text, with the range that it may have."""

    def text(size: int | str) -> str:
        if not isinstance(size, str):
            return str(size)
        low, _, high = spec["dynamic"][size]
        step = spec["multiple_of"].get(size)
        return f"{size} {low} to {high}" + (f" by {step}" if step else "")

    return text


def limits_text(spec: dict[str, Any]) -> str:
    """What values an input takes; a whole number's upper limit is not among them."""
    if not spec["range"]:
        return "" if spec["dtype"] == "bool" else ", standard normal"
    low, high = spec["range"]
    return f", {low:g} to {high - 1 if 'int' in spec['dtype'] else high:g}"
