"""What a pipeline of diffusers does with its networks: pictures from texts or classes, run by diffusers itself."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from enginewright.ground.errors import ToolchainError, require
from enginewright.ground.reading import read_json
from enginewright.ground.runner import Runner
from enginewright.ground.signature import Arrays
from enginewright.sources.jobs import Job

INDEX = "model_index.json"
PROMPTS = ("a photograph of a red bicycle against a white wall", "a watercolour of a harbour at dawn")
CLASSES = (1, 7)
"""What is drawn where nobody says what; classes by their numbers."""

UNUSED = ("vae_encoder",)
"""Parts of a folder that drawing from noise does not call."""


def job(folder: Path, parts: Sequence[str], *, prompts: Sequence[str], steps: int, arguments: Mapping[str, Any]) -> Job:
    """The job of a pipeline's folder.

    Args:
        folder: has its ``model_index.json``.
        parts: names of its networks.
        prompts: texts to draw, a run each; none: two of ours.
        steps: of the sampler.
        arguments: more of them for the pipeline's call.

    Raises:
        ToolchainError: diffusers cannot load it, or it draws from something else than texts or classes.
    """
    pipe = loaded(folder)
    known = inspect.signature(type(pipe).__call__).parameters
    if strange := [name for name in arguments if name not in known]:
        raise ToolchainError(
            f"{type(pipe).__name__} takes no {strange[0]!r}",
            where="job.arguments",
            help=f"it takes: {', '.join(name for name in known if name != 'self')}",
        )
    needed = [
        name
        for name, parameter in known.items()
        if parameter.default is parameter.empty
        and parameter.kind is not parameter.VAR_KEYWORD
        and name not in ("self", "class_labels", *arguments)
    ]
    if needed or not {"prompt", "class_labels"} & known.keys():
        what = ", ".join(needed) or "neither a prompt nor class labels"
        raise ToolchainError(f"{type(pipe).__name__} asks for {what}, which nothing here makes", where="job.arguments")
    key = "prompt" if "prompt" in known else "class_labels"
    if prompts and key != "prompt":
        raise ToolchainError(
            f"{type(pipe).__name__} draws classes and reads no texts",
            where="job.prompts",
            help="arguments = { class_labels = [1] }",
        )
    drawn: Sequence[Any] = (prompts or PROMPTS) if key == "prompt" else [[number] for number in CLASSES]

    def run(pipe: Any) -> Runner:
        def draw(inputs: Arrays) -> Arrays:
            given = {key: drawn[int(inputs["number"][0])], **arguments, "num_inference_steps": steps}
            generator = torch.Generator().manual_seed(int(inputs["seed"][0]))
            try:
                found = pipe(**given, generator=generator, output_type="np", return_dict=False)
            except ToolchainError:
                raise
            except Exception as cause:  # whatever a pipeline raises
                said = f"{type(cause).__name__}: {cause}".splitlines()[0]
                raise ToolchainError(f"{type(pipe).__name__} does not run: {said}") from cause
            return {"pictures": np.asarray(found[0], np.float32)}

        return draw

    calls = tuple({"number": np.array([i]), "seed": np.array([i])} for i in range(len(drawn)))
    return Job(
        parts=tuple(part for part in parts if part not in UNUSED),
        calls=calls,
        assemble=lambda networks: with_networks(pipe, networks),
        run=run,
        notes=(f"{type(pipe).__name__} of diffusers, {steps} steps, from {key} {', '.join(map(str, drawn))}",),
    )


def loaded(folder: Path) -> Any:
    """The pipeline of a folder, on the CPU in float32 and with nothing that hides pictures; none of its code is run.

    Raises:
        ToolchainError: diffusers cannot load it, with its reason.
    """
    diffusers = require("diffusers", extra="diffusers")
    named = read_json(folder / INDEX, what=INDEX)
    off: dict[str, Any] = {
        name: None for name in ("safety_checker", "feature_extractor", "image_encoder") if named.get(name)
    }
    off |= {"requires_safety_checker": False} if "safety_checker" in off else {}
    diffusers.utils.logging.disable_progress_bar()
    try:
        pipe = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True, use_safetensors=True, **off)
    except Exception as cause:  # whatever diffusers and transformers raise
        said = f"{type(cause).__name__}: {cause}".splitlines()[0]
        raise ToolchainError(f"diffusers cannot load the pipeline: {said}", where=str(folder)) from cause
    finally:
        diffusers.utils.logging.enable_progress_bar()
    pipe.set_progress_bar_config(disable=True)
    for network in pipe.components.values():
        if isinstance(network, nn.Module):
            nn.Module.to(network, torch.float32)  # diffusers' own warns of layers that it keeps so anyway
    return pipe


def with_networks(pipe: Any, networks: Mapping[str, Any]) -> Any:
    """A copy of a pipeline with other networks in the place of some; what is left is shared."""
    found = copy.copy(pipe)
    for name, network in networks.items():
        if name in ("vae_decoder", "vae_encoder"):
            found.vae = copy.copy(found.vae)
            found.vae.__dict__["decode" if name == "vae_decoder" else "encode"] = network
        else:
            setattr(found, name, network)
    return found
