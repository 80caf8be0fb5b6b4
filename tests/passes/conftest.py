"""Small models with random weights whose attention layers the passes are tried on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from enginewright.models.diffusion.dit import TINY, DiT


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model, one batch of inputs, and the paths of its attention layers: 4 heads of 8 features each."""

    model: nn.Module
    inputs: dict[str, Tensor]
    paths: tuple[str, ...]

    def copy(self) -> nn.Module:
        return copy.deepcopy(self.model)

    def output(self, model: nn.Module) -> Tensor:
        """The first output of a model for this subject's inputs."""
        with torch.no_grad():
            result = model(**self.inputs)
        return result if isinstance(result, Tensor) else result[0]


def randomise(model: nn.Module) -> nn.Module:
    """Give every matrix and bias values, gates and last layers that start at zero included; evaluation mode."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name.lower() or "linear" in name.lower():
                width = parameter.shape[-1] if parameter.ndim > 1 else 16
                parameter.copy_(torch.randn(parameter.shape) / width**0.5)
    return model.eval()


def reference_dit() -> Subject:
    inputs = {"x": torch.randn(2, 4, 8, 8), "t": torch.tensor([3, 700]), "y": torch.tensor([0, 3])}
    return Subject(model=randomise(DiT(TINY)), inputs=inputs, paths=("blocks.0.attn", "blocks.1.attn"))


def diffusers_dit(processor: str) -> Subject:
    from diffusers import DiTTransformer2DModel
    from diffusers.models import attention_processor

    model = DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, num_layers=2, sample_size=8, num_embeds_ada_norm=4
    )
    for block in model.transformer_blocks:
        block.attn1.set_processor(getattr(attention_processor, processor)())
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([3, 700]),
        "class_labels": torch.tensor([0, 3]),
    }
    paths = ("transformer_blocks.0.attn1", "transformer_blocks.1.attn1")
    return Subject(model=randomise(model), inputs=inputs, paths=paths)


def vit(implementation: str) -> Subject:
    from transformers import ViTConfig, ViTModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = ViTConfig(image_size=8, patch_size=2, attn_implementation=implementation, **sizes)
    inputs = {"pixel_values": torch.randn(2, 3, 8, 8)}
    return Subject(model=randomise(ViTModel(config)), inputs=inputs, paths=("layers.0.attention", "layers.1.attention"))


def bert(implementation: str) -> Subject:
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = BertConfig(vocab_size=40, attn_implementation=implementation, **sizes)
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 5:] = 0
    inputs = {"input_ids": torch.randint(0, 40, (2, 7)), "attention_mask": mask}
    paths = ("encoder.layer.0.attention", "encoder.layer.1.attention")
    return Subject(model=randomise(BertModel(config)), inputs=inputs, paths=paths)


SUBJECTS: dict[str, Callable[[], Subject]] = {
    "reference_dit": reference_dit,
    "diffusers_dit_sdpa": lambda: diffusers_dit("AttnProcessor2_0"),
    "diffusers_dit_eager": lambda: diffusers_dit("AttnProcessor"),
    "vit_sdpa": lambda: vit("sdpa"),
    "vit_eager": lambda: vit("eager"),
    "bert_sdpa": lambda: bert("sdpa"),
    "bert_eager": lambda: bert("eager"),
}


@pytest.fixture(autouse=True)
def calm() -> Iterator[None]:
    """The same random numbers for every test, and one thread: these models are too small for more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=SUBJECTS)
def subject(request: pytest.FixtureRequest, calm: None) -> Subject:
    """Each small model in turn."""
    return SUBJECTS[request.param]()


@pytest.fixture
def dit(calm: None) -> Subject:
    """The reference DiT alone."""
    return reference_dit()
