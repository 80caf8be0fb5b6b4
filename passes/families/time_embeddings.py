"""Where networks embed their timestep: DiT's own name for it and those of ``diffusers``, known by structure.

Checked against diffusers 0.42: UNets (``time_embedding``), SD3, Flux, PixArt and DiT (``timestep_embedder``).
"""

from __future__ import annotations

from torch import nn

from enginewright.passes.traits import TimeEmbedding

NAMES = ("t_embedder", "time_embedding", "time_embedder", "timestep_embedder")


def embedding(module: nn.Module) -> TimeEmbedding | None:
    """A child of one of the names that is two linear layers, whose last has as many outputs as inputs."""
    for name in NAMES:
        linears = [part for part in getattr(module, name, nn.Module()).modules() if isinstance(part, nn.Linear)]
        if len(linears) == 2 and linears[0].out_features == linears[1].in_features == linears[1].out_features:
            return TimeEmbedding(name=name, width=linears[1].out_features)
    return None


RECOGNISERS = {TimeEmbedding: (embedding,)}
