"""The text encoders of diffusers' pipelines, which are networks of transformers.

Shapes: B batch, N tokens, D width, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from enginewright.ground.signature import Dim, InputSpec
from enginewright.sources.flat import BATCH, Config, Family, Flat


class FlatCLIP(Flat):
    """CLIP's text encoder, with and without projection."""

    further = ("hidden_states",)

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        """(B, N) -> the outputs of the network in its order, then all hidden states, (L + 1, B, N, D).

        Pipelines ask for one hidden state or another by its place from the end; one tensor answers as the tuple does.
        """
        found = self.inner(input_ids=input_ids, output_hidden_states=True)
        states = torch.stack(found.hidden_states)
        tensors = [value for value in found.values() if isinstance(value, Tensor)]
        return tuple(tensor.float() for tensor in (*tensors, states))


class FlatT5(Flat):
    """T5's encoder."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, N), (B, N) -> (B, N, D)."""
        return self.ask(input_ids=input_ids, attention_mask=attention_mask)


def clip_inputs(config: Config) -> tuple[InputSpec, ...]:
    """The length is fixed: pipelines pad every prompt to as many tokens as there are positions."""
    shape = (BATCH, config["max_position_embeddings"])
    return (InputSpec(name="input_ids", shape=shape, dtype="int64", low=0, high=config["vocab_size"]),)


def t5_inputs(config: Config) -> tuple[InputSpec, ...]:
    """Any length; pipelines pad to between 77 and 512 tokens."""
    shape = (BATCH, Dim(name="text", low=1, typical=256, high=512))
    return (
        InputSpec(name="input_ids", shape=shape, dtype="int64", low=0, high=config["vocab_size"]),
        InputSpec(name="attention_mask", shape=shape, dtype="int64", low=0, high=2),
    )


def renamed(tensors: Mapping[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """Names as this version of transformers has them.

    CLIP's text model was once one level deeper, and files of that time hold position numbers that are computed now.
    """
    deeper = any(name.startswith("text_model.") for name in module.state_dict())
    found = {}
    for name, tensor in tensors.items():
        bare = name.removeprefix("text_model.")
        if not name.endswith(".position_ids"):
            found[name if deeper else bare] = tensor
    return found


TEXT_ENCODERS = {
    "CLIPTextModel": Family(flat=FlatCLIP, inputs=clip_inputs),
    "CLIPTextModelWithProjection": Family(flat=FlatCLIP, inputs=clip_inputs),
    "T5EncoderModel": Family(flat=FlatT5, inputs=t5_inputs),
}
"""By class name in transformers."""
