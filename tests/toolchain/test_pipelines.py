"""Networks of pipelines of diffusers, replaced by their engines by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import pytest
import torch

from enginewright import load, pipeline
from enginewright.ground.errors import ToolchainError
from enginewright.progress import Progress
from enginewright.recipe import make
from tests.toolchain.sources import tiny_diffusers as tiny

diffusers: Any = pytest.importorskip("diffusers")
Command = Callable[..., CompletedProcess[str]]


def pictures(pipe: Any, **call: Any) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return np.asarray(pipe(**call, num_inference_steps=3, generator=generator, output_type="np").images)


def test_a_unet_runs_inside_stable_diffusion(tmp_path: Path, enginewright: Command) -> None:
    torch.manual_seed(0)
    unet, vae = tiny.shaken(tiny.unet()), tiny.shaken(tiny.autoencoder())
    unet.save_pretrained(tmp_path / "unet")  # type: ignore[operator]
    pipe = diffusers.StableDiffusionPipeline(
        vae=vae,
        unet=unet,
        scheduler=diffusers.DDIMScheduler(),
        text_encoder=None,
        tokenizer=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    width = unet.config.cross_attention_dim  # type: ignore[union-attr]
    embeds = torch.randn(2, 1, 7, width, generator=torch.Generator().manual_seed(1))
    call = {"prompt_embeds": embeds[0], "negative_prompt_embeds": embeds[1], "guidance_scale": 3.0}
    wanted = pictures(pipe, **call)
    run = enginewright(
        "export", f"diffusers:{tmp_path / 'unet'}", "--target", "onnxruntime", "--no-validate", "--quiet"
    )
    assert run.returncode == 0, run.stderr
    pipe.unet = load(tmp_path / "out")
    np.testing.assert_allclose(pictures(pipe, **call), wanted, atol=1e-4)
    with pytest.raises(ToolchainError, match="input 'sample' has shape"):
        pipe.unet(torch.ones(1, 5, 8, 8), 1, embeds[0])


def noise(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def flux_pipeline() -> tuple[Any, dict[str, Any]]:
    """Guidance is an input of the network."""
    pipe = diffusers.FluxPipeline(
        transformer=tiny.shaken(tiny.flux()),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        **dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")),
    )
    embeds = {"prompt_embeds": noise(1, 5, 12, seed=1), "pooled_prompt_embeds": noise(1, 10, seed=2)}
    return pipe, {**embeds, "height": 256, "width": 320, "guidance_scale": 2.5}


def sd3_pipeline() -> tuple[Any, dict[str, Any]]:
    """Guidance doubles the batch; the picture is no square, so that the position table is cropped."""
    absent = ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=tiny.shaken(tiny.sd3()),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        **dict.fromkeys(absent),
    )
    embeds = {
        "prompt_embeds": noise(1, 7, 12, seed=1),
        "negative_prompt_embeds": noise(1, 7, 12, seed=2),
        "pooled_prompt_embeds": noise(1, 10, seed=3),
        "negative_pooled_prompt_embeds": noise(1, 10, seed=4),
    }
    return pipe, {**embeds, "height": 64, "width": 96, "guidance_scale": 3.0}


def pixart_pipeline() -> tuple[Any, dict[str, Any]]:
    """Prompts of different lengths, told apart by their masks."""
    pipe = diffusers.PixArtAlphaPipeline(
        transformer=tiny.shaken(tiny.pixart()),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
        **dict.fromkeys(("vae", "text_encoder", "tokenizer")),
    )
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]])
    embeds = {
        "prompt_embeds": noise(1, 6, 12, seed=1),
        "prompt_attention_mask": mask,
        "negative_prompt_embeds": noise(1, 6, 12, seed=2),
        "negative_prompt_attention_mask": mask.flip(1),
        "negative_prompt": None,
    }
    return pipe, {**embeds, "height": 64, "width": 64, "guidance_scale": 3.0, "use_resolution_binning": False}


def cogvideox_pipeline() -> tuple[Any, dict[str, Any]]:
    """Frames, and rotary tables that the pipeline makes for their size."""
    pipe = diffusers.CogVideoXPipeline(
        transformer=tiny.shaken(tiny.cogvideox(use_rotary_positional_embeddings=True)),
        scheduler=diffusers.CogVideoXDDIMScheduler(),
        **dict.fromkeys(("vae", "text_encoder", "tokenizer")),
    )
    embeds = {"prompt_embeds": noise(1, 5, 12, seed=1), "negative_prompt_embeds": noise(1, 5, 12, seed=2)}
    return pipe, {**embeds, "height": 48, "width": 64, "num_frames": 9, "guidance_scale": 3.0}


PIPELINES = {"flux": flux_pipeline, "sd3": sd3_pipeline, "pixart": pixart_pipeline, "cogvideox": cogvideox_pipeline}


@pytest.mark.parametrize("name", PIPELINES)
def test_a_transformer_runs_inside_its_pipeline(name: str, tmp_path: Path) -> None:
    pipe, call = PIPELINES[name]()
    pipe.set_progress_bar_config(disable=True)

    def latents(**changes: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        given = {**call, **changes, "num_inference_steps": 3, "output_type": "latent", "generator": generator}
        found: torch.Tensor = pipe(**given)[0]
        return found

    pipe.transformer.save_pretrained(tmp_path / "network")
    wanted, other = latents(), latents(guidance_scale=6.0)
    recipe = make(
        {
            "model": f"diffusers:{tmp_path / 'network'}",
            "targets": [{"target": "onnxruntime"}],
            "validation": {"skip": True},
        }
    )
    pipeline.export(recipe, tmp_path / "out", force=False, progress=Progress(quiet=True))
    pipe.transformer = load(tmp_path / "out")
    assert (latents() - wanted).norm() < 1e-4 * wanted.norm()  # latents of random networks can grow to a thousand
    assert (latents(guidance_scale=6.0) - other).norm() < 1e-4 * other.norm()
    assert (other - wanted).norm() > 1e-3 * wanted.norm()
