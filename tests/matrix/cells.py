"""What is tried in each cell of the matrix: a pass with one of its settings on one small model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from enginewright import catalog
from enginewright.passes.contract import Pass
from enginewright.sources.contract import Model

CONDITIONS = ("y", "class_labels", "encoder_hidden_states", "attention_mask", "input_ids", "z", "x", "pixel_values")
TIMES = ("t", "timestep")
SCORE = "score.py:closeness"

SETTINGS: Mapping[str, tuple[Mapping[str, Any], ...]] = {
    "adapters_as_inputs": (
        {"files": ["{adapter}"], "alpha": 2.0, "inputs": "strength"},
        {"files": ["{adapter}"], "alpha": 2.0, "rank": 3},
        {"layers": ["*"], "rank": 2},
    ),
    "approximate_by_accuracy": ({"score": SCORE, "tolerance": 0.05}, {"score": SCORE, "tolerance": 10.0}),
    "convert_dtype": ({}, {"dtype": "bfloat16"}),
    "couple_streams": (
        {},
        {"mode": "blend", "share": 1.0},
        {"mode": "channel_split", "streams": 4, "content": 0, "source": 2, "scores": 3, "keep": 9},
        {"streams": 3, "adain": True, "gate": True, "key_scale": "input"},
    ),
    "cut_after": ({}, {"layer": -1, "final_norm": "keep"}),
    "dense_to_moe": ({}, {"experts": 4, "top_k": 1}, {"form": "nonzero"}, {"form": "masked", "gate": "one"}),
    "distill": (
        {"steps": 2, "batch": 2},
        {"steps": 2, "batch": 2, "features": 1.0},
        {"steps": 2, "batch": 2, "rank": 2},
    ),
    "factorize": ({}, {"smallest": 0}),
    "fix_inputs": ({"inputs": {"{condition}": 1}},),
    "fold_adapters": ({"file": "{adapter}", "alpha": 2.0},),
    "hoist_constants": ({"constant": ["{condition}"]},),
    "merge_guidance": ({"condition": "{condition}", "none": 0}, {"condition": "{condition}", "none": 0, "fixed": True}),
    "merge_models": ({"teachers": ["{model}", "{model}"], "steps": 1, "batch": 1},),
    "merge_tokens": ({}, {"r": 2}),
    "merge_unmerge_tokens": ({}, {"ratio": 0.5, "over": "both"}),
    "mixture_of_blocks": ({"timestep": "{time}"}, {"timestep": "{time}", "keep": 1, "buckets": 2}),
    "perturb_heads": ({}, {"u": 0.5}, {"u": 0.5, "guidance": True, "w": 2.0}),
    "prune_depth": ({}, {"share": 0.5}),
    "prune_heads": ({}, {"share": 0.25}),
    "prune_tokens": ({}, {"keep": 0.5, "method": "policy"}, {"keep": 0.6, "fuse": True}),
    "prune_width": ({}, {"share": 0.25}, {"importance": "random"}),
    "quantize_fp8": ({}, {"smallest": 0}),
    "quantize_graph_int8": ({},),
    "quantize_int8": ({}, {"smallest": 0, "smooth": 0.5}),
    "quantize_svd": ({"rank": 4}, {"rank": 4, "smallest": 0}),
    "quantize_weights": (
        {},
        {"algorithm": "awq"},
        {"algorithm": "gptq"},
        {"format": "nvfp4"},
        {"format": "int8", "smallest": 0},
    ),
    "reuse_blocks": ({"input": "{time}"}, {"input": "{time}", "interval": 3}),
    "search_precision": ({}, {"budget": 0.6}),
    "select_heads": (
        {"score": SCORE, "candidates": 2},
        {"score": SCORE, "candidates": 2, "mode": "prune"},
    ),
    "skip_spatial_tokens": ({}, {"ratio": 0.5}),
    "slice_width_by_timestep": ({"input": "{time}", "steps": 6}, {"input": "{time}", "steps": 6, "buckets": 2}),
    "sparsify_2_4": ({}, {"smallest": 0}),
}
"""Settings of each pass. ``{condition}``, ``{time}``, ``{model}`` and ``{adapter}`` stand for the model's own."""


def settings_of(name: str) -> tuple[Mapping[str, Any], ...]:
    """The settings that a pass is tried with, only those parameters that it has."""
    fields = catalog.pass_class(name).model_fields
    tried = [{k: v for k, v in each.items() if k in fields} for each in SETTINGS.get(name, ({},))]
    return tuple({repr(each): each for each in tried}.values())


def filled(value: Any, words: Mapping[str, str]) -> Any:
    """A setting with the model's own names in it."""
    if isinstance(value, str):
        return value.format(**words) if value.startswith("{") else value
    if isinstance(value, Mapping):
        return {filled(k, words): filled(v, words) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [filled(v, words) for v in value]
    return value


def step_for(name: str, settings: Mapping[str, Any], model: Model, text: str, folder: Path) -> Pass:
    """The pass, made for a model.

    Raises:
        ToolchainError: the pass refuses these settings.
    """
    inputs = [spec.name for spec in model.inputs]
    words = {
        "condition": next((each for each in CONDITIONS if each in inputs), inputs[-1]),
        "time": next((each for each in TIMES if each in inputs), "timestep"),
        "model": text,
        "adapter": str(adapter(model.module, folder)) if name in ("adapters_as_inputs", "fold_adapters") else "",
    }
    return catalog.pass_class(name)(**filled(settings, words))


def adapter(module: nn.Module, folder: Path) -> Path:
    """A LoRA file for every linear layer of a model, up to eight of them."""
    noise = torch.Generator().manual_seed(3)
    tensors = {}
    linears = [(path, each) for path, each in module.named_modules() if type(each) is nn.Linear][:8]
    for path, layer in linears:
        tensors[f"{path}.lora_A.weight"] = torch.randn(2, layer.in_features, generator=noise) * 0.1
        tensors[f"{path}.lora_B.weight"] = torch.randn(layer.out_features, 2, generator=noise) * 0.1
    path = folder / "adapter.safetensors"
    save_file(tensors or {"none.lora_A.weight": torch.zeros(1, 1)}, path)
    return path
