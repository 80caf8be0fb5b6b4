"""A whole pipeline of diffusers through the command line, and its networks replaced by their engines."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import pytest
import torch

import toolchain
from tests.toolchain.sources import tiny_diffusers as tiny
from toolchain.errors import ToolchainError

diffusers: Any = pytest.importorskip("diffusers")
Command = Callable[..., CompletedProcess[str]]


def pictures(pipe: Any, **call: Any) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return np.asarray(pipe(**call, num_inference_steps=3, generator=generator, output_type="np").images)


@pytest.fixture(scope="module")
def dit_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline") / "dit"
    torch.manual_seed(0)
    diffusers.DiTPipeline(
        transformer=tiny.shaken(tiny.dit()), vae=tiny.shaken(tiny.autoencoder()), scheduler=diffusers.DDIMScheduler()
    ).save_pretrained(folder)
    return folder


def test_a_pipeline_becomes_an_artifact_for_each_network_and_runs_on_them(
    dit_pipeline: Path, tmp_path: Path, enginewright: Command
) -> None:
    run = enginewright(
        "export", f"diffusers:{dit_pipeline}", "--target", "onnxruntime", "--no-validate", "--json", "--quiet"
    )
    assert run.returncode == 0, run.stderr
    out = tmp_path / "out"
    assert sorted(json.loads(run.stdout)) == sorted(path.name for path in out.iterdir())
    assert {path.name for path in out.iterdir()} == {"transformer", "vae_decoder", "vae_encoder"}
    pipe = diffusers.DiTPipeline.from_pretrained(dit_pipeline)
    wanted = pictures(pipe, class_labels=[1, 7], guidance_scale=1.0)

    pipe.transformer = toolchain.load(out / "transformer")
    np.testing.assert_allclose(pictures(pipe, class_labels=[1, 7], guidance_scale=1.0), wanted, atol=1e-4)
    pipe.vae.decode = toolchain.load(out / "vae_decoder")
    np.testing.assert_allclose(pictures(pipe, class_labels=[1, 7], guidance_scale=1.0), wanted, atol=1e-4)
    assert np.abs(pictures(pipe, class_labels=[2, 3], guidance_scale=1.0) - wanted).max() > 1e-2

    again = enginewright("export", f"diffusers:{dit_pipeline}", "--no-validate")
    assert again.returncode == 2
    assert "the output folder 'transformer' exists" in again.stderr


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
    pipe.unet = toolchain.load(tmp_path / "out")
    np.testing.assert_allclose(pictures(pipe, **call), wanted, atol=1e-4)
    with pytest.raises(ToolchainError, match="input 'sample' has shape"):
        pipe.unet(torch.ones(1, 5, 8, 8), 1, embeds[0])
