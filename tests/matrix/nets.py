"""Networks of a user's own, as a Python file gives them: convolutions, tied weights, an encoder, a recurrent net."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from enginewright import ModelSpec


class Convolutions(nn.Module):
    """Two convolutions with batch norm, whose running statistics have moved."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.second, self.norm2 = nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32)
        self.fc1, self.fc2 = nn.Linear(32 * 8 * 8, 64), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, 3, 16, 16) -> (B, 10)."""
        x = torch.relu(self.norm(self.first(x)))
        x = torch.relu(self.norm2(self.second(x)))
        return self.fc2(torch.relu(self.fc1(x.flatten(1))))


def convolutions() -> tuple[nn.Module, dict[str, Tensor]]:
    """The network after three calls in training mode."""
    torch.manual_seed(0)
    module = Convolutions().train()
    with torch.no_grad():
        for _ in range(3):
            module(torch.randn(8, 3, 16, 16) * 2 + 1)
    return module.eval(), {"x": torch.randn(2, 3, 16, 16)}


class Tied(nn.Module):
    """An embedding tied to the head, a block that is called twice, and a weight with two names."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(60, 32)
        self.block = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
        self.again = self.block
        self.mix, self.other = nn.Linear(32, 32), nn.Linear(32, 32)
        self.head = nn.Linear(32, 60, bias=False)
        self.head.weight, self.other.weight = self.embed.weight, self.mix.weight

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, N) -> (B, N, 60)."""
        x = self.embed(ids)
        x = x + self.block(x)
        x = x + self.again(self.mix(x))
        return self.head(x + self.other(x))


def tied() -> tuple[nn.Module, dict[str, Tensor]]:
    """The network and one call."""
    torch.manual_seed(0)
    return Tied().eval(), {"ids": torch.randint(0, 60, (2, 12))}


class Encoder(nn.Module):
    """PyTorch's own transformer encoder, which has a fast path past its submodules."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, activation="gelu")
        self.read = nn.Linear(16, 32)
        self.encoder = nn.TransformerEncoder(layer, 3)
        self.out = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, 10, 16) -> (B, 5)."""
        return self.out(self.encoder(self.read(x)).mean(1))


def encoder() -> tuple[nn.Module, dict[str, Tensor]]:
    """The network and one call."""
    torch.manual_seed(0)
    return Encoder().eval(), {"x": torch.randn(2, 10, 16)}


class Recurrent(nn.Module):
    """Two bidirectional LSTM layers."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Linear(16, 32)
        self.lstm = nn.LSTM(32, 48, num_layers=2, batch_first=True, bidirectional=True)
        self.out = nn.Linear(96, 7)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, 9, 16) -> (B, 7)."""
        y, _ = self.lstm(self.read(x))
        return self.out(y[:, -1])


def recurrent() -> tuple[nn.Module, dict[str, Tensor]]:
    """The network and one call."""
    torch.manual_seed(0)
    return Recurrent().eval(), {"x": torch.randn(2, 9, 16)}


def flux() -> ModelSpec:
    """A small Flux, called on pictures of a few tokens: by its own configuration they would have thousands."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    module = FluxTransformer2DModel(
        in_channels=4,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    batch, image, text = ("batch", 1, 8), ("image", 4, 64), ("text", 2, 32)
    inputs = {
        "hidden_states": torch.randn(2, 16, 4),
        "encoder_hidden_states": torch.randn(2, 5, 12),
        "pooled_projections": torch.randn(2, 10),
        "timestep": torch.tensor([0.1, 0.7]),
        "img_ids": torch.stack([torch.zeros(16), torch.arange(16) // 4, torch.arange(16) % 4], dim=1),
        "txt_ids": torch.zeros(5, 3),
        "guidance": torch.tensor([3.5, 3.5]),
    }
    return ModelSpec(
        module=module.eval(),
        inputs=inputs,
        dynamic={
            "hidden_states": {0: batch, 1: image},
            "encoder_hidden_states": {0: batch, 1: text},
            "pooled_projections": {0: batch},
            "timestep": {0: batch},
            "img_ids": {0: image},
            "txt_ids": {0: text},
            "guidance": {0: batch},
        },
        ranges={"timestep": (0, 1), "img_ids": (0, 4), "guidance": (1, 6)},
    )
