"""One catalogue entry in full: what ``enginewright show`` prints."""

from __future__ import annotations

import inspect
from typing import Any

from pydantic import BaseModel

from toolchain import catalog
from toolchain.errors import unknown

SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def describe(text: str) -> dict[str, Any]:
    """Everything known about an entry of any kind, as JSON can hold it.

    Raises:
        ToolchainError: no kind has it.
    """
    name, _, size = text.partition(":")
    for kind in catalog.KINDS:
        found = catalog.entries(kind).get(name)
        if found is not None:
            return {"kind": kind, "name": text, "documentation": found.docstring, **details(kind, name, size)}
    known = [name for kind in catalog.KINDS for name in catalog.entries(kind)]
    raise unknown("entry", name, known)


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
        from validation.metrics import load_metrics

        metric = load_metrics()[name]
        return {"gate": f"{metric.kind}.{name}", "unit": metric.unit, "higher_is_better": metric.higher_is_better}
    return {"content": catalog.entry("recipes", name).path.read_text()}


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

    from passes.contract import macs
    from toolchain.sources.reference import WEIGHTS, sizes_of
    from validation.inputs import Dim

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
        "inputs": [
            {
                "name": s.name,
                "shape": [d.name if isinstance(d, Dim) else d for d in s.shape],
                "dtype": s.dtype,
                "range": None if s.low is None else [s.low, s.high],
                "dynamic": {d.name: [d.low, d.typical, d.high] for d in s.shape if isinstance(d, Dim)},
            }
            for s in specs
        ],
        "outputs": list(module.OUTPUTS),
        "published": [vars(figure) for figure in getattr(module, "FIGURES", {}).get(size, ())],
    }


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
    for key in ("gate", "unit", "higher_is_better"):
        if data.get(key) not in (None, ""):
            print(f"{key.replace('_', ' ')}: {data[key]}")
    if "content" in data:
        print(data["content"])


def tell_model(data: dict[str, Any]) -> None:
    """The part about a model's size."""
    print(f"sizes: {', '.join(data['sizes'])}")
    print(f"{data['size']}: {data['parameter_count']:,} parameters, {data['macs']:,} multiply-accumulates at batch 1")
    print(f"weights: {data['weights']}")
    for spec in data["inputs"]:
        shape = ", ".join(str(d) for d in spec["shape"])
        limits = f", {spec['range'][0]:g} to {spec['range'][1]:g}" if spec["range"] else ", standard normal"
        print(f"input {spec['name']} ({shape}) {spec['dtype']}{limits}")
    print(f"outputs: {', '.join(data['outputs'])}")
    for figure in data["published"]:
        print(f"published {figure['figure']}: {figure['value']} ({figure['source']})")
