"""Counts that papers state of networks which are not ours: parameters, heads and multiply-accumulates.

Networks of diffusers and transformers are made from their configurations on the meta device: nothing is downloaded and
no weight takes memory. What a method adds, removes or leaves idle is counted on the network that its pass made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from enginewright.ground.errors import require
from enginewright.models.adapters import disenbooth, splitflux
from enginewright.models.blocks.low_rank import products
from enginewright.models.diffusion import dit
from enginewright.passes import contract
from enginewright.passes.kernel.surgery import share
from enginewright.passes.moe.dense_to_moe import DenseToMoe
from enginewright.passes.pruning.elements import carry_out, elements_of
from enginewright.passes.recovery.styles import add_styles, time_embeddings
from enginewright.passes.tokens.merge_tokens import MergeTokens
from enginewright.passes.traits import BlockStack, FeedForward, HeadedAttention, layers_of

SD3_MEDIUM = {
    "sample_size": 128,
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 192,
}
VIT = {
    "Ti": {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768},
    "S": {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536},
    "B": {},
    "L": {"hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096, "num_hidden_layers": 24},
}
"""What these vision transformers for 224 px do not share with the defaults of transformers; DeiT's are the same."""
SIT_PROJECTOR, TEACHER = 2048, 768
"""Width of HASTE's projector, and features of its teacher."""


def diffusers() -> Any:
    """The package."""
    return require("diffusers", extra="diffusers")


def transformers() -> Any:
    """The package."""
    return require("transformers", extra="transformers")


def flux() -> nn.Module:
    """FLUX.1-dev's transformer."""
    return diffusers().FluxTransformer2DModel(guidance_embeds=True)


def bert(**changed: Any) -> Any:
    """BERT-base's configuration."""
    return transformers().BertConfig(**changed)


def vit(size: str) -> nn.Module:
    """A vision transformer with patches of 16 and a thousand classes."""
    return transformers().ViTForImageClassification(transformers().ViTConfig(num_labels=1000, **VIT[size]))


def sit(size: str) -> nn.Module:
    """SiT: the DiT of that size, whose last layer gives a velocity alone and no variance."""
    network = dit.build(dit.PUBLISHED[size])
    last = network.final_layer.linear
    network.final_layer.linear = nn.Linear(last.in_features, last.out_features // 2)
    return network


def with_projector(network: nn.Module) -> nn.Module:
    """A SiT in training: beside it what takes its features to the teacher's."""
    last: Any = network.get_submodule("final_layer.linear")
    sizes = (last.in_features, SIT_PROJECTOR, SIT_PROJECTOR, TEACHER)
    projector = nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(sizes)))
    return nn.ModuleList([network, projector])


def with_styles(network: nn.Module, styles: int) -> nn.Module:
    """A denoiser that takes a style, as ``merge_models`` makes it."""
    return add_styles(network, time_embeddings(network), styles)


def unet() -> nn.Module:
    """The U-Net of Stable Diffusion 1.5."""
    return diffusers().UNet2DConditionModel(sample_size=64, cross_attention_dim=768)


NETWORKS: Mapping[str, Callable[[], nn.Module]] = {
    "FLUX.1-dev": flux,
    "SD3-medium": lambda: diffusers().SD3Transformer2DModel(**SD3_MEDIUM),
    "SD1.5": unet,
    "SD1.5, 8 styles": lambda: with_styles(unet(), 8),
    "SiT-B/2": lambda: sit("B/2"),
    "SiT-XL/2": lambda: sit("XL/2"),
    "SiT-B/2 in training": lambda: with_projector(sit("B/2")),
    "SiT-XL/2 in training": lambda: with_projector(sit("XL/2")),
    "BERT-base": lambda: transformers().BertModel(bert()),
    "BERT-base, cased, two classes": lambda: transformers().BertForSequenceClassification(bert(vocab_size=28_996)),
    "DistilBERT": lambda: transformers().DistilBertModel(transformers().DistilBertConfig()),
    "GPT-2": lambda: transformers().GPT2Model(transformers().GPT2Config()),
    "ViT-Ti/16": lambda: vit("Ti"),
    "ViT-S/16": lambda: vit("S"),
    "ViT-B/16": lambda: vit("B"),
    "ViT-L/16": lambda: vit("L"),
}


def made(of: str) -> nn.Module:
    """A network by its name, without values.

    Raises:
        ToolchainError: the package that has it is missing.
    """
    with torch.device("meta"):
        return NETWORKS[of]().eval()


def parameter_count(network: nn.Module) -> int:
    """All of a network's parameters, those that are fixed too."""
    return sum(parameter.numel() for parameter in network.parameters())


def parameters(of: str) -> float:
    """Parameters of a network."""
    return parameter_count(made(of))


def splitflux_adapters(of: str) -> float:
    """Parameters of SplitFlux's adapters (``dev``), or of the plain ones that it compares itself with."""
    config = splitflux.PUBLISHED["dev"]
    if of != "dev":  # rank 64 beside every single block
        config = replace(config, content=range(0), boundary=range(0), style=range(config.single), residual_rank=0)
    with torch.device("meta"):
        return sum(map(parameter_count, products(splitflux.build(config))))


def disenbooth_parts(of: str) -> float:
    """Parameters of what DisenBooth adds to Stable Diffusion 2.1: the ``unet``'s adapters, or the ``image`` adapter."""
    with torch.device("meta"):
        model = disenbooth.build(disenbooth.PUBLISHED["sd2.1"])
    return sum(map(parameter_count, products(model) if of == "unet" else [model.irrelevant]))


def heads(of: str) -> float:
    """Attention heads of all layers that a pass could choose from."""
    each: list[int] = [layer.heads for _, layer in layers_of(made(of), HeadedAttention)]
    return sum(each)


def feed_forward_parameters(network: nn.Module) -> Iterator[tuple[int, int, int]]:
    """Of each feed-forward: its hidden units, the weights that each of them has, and the biases that none has."""
    for _, layer in layers_of(network, FeedForward):
        each = sum(layer.stacks * (linear.in_features + (linear.bias is not None)) for linear in layer.inputs)
        own_bias = layer.output.bias is not None and layer.first_column == 0
        yield layer.hidden, each + layer.output.out_features, layer.output.out_features if own_bias else 0


def feed_forward_share(of: str) -> float:
    """The share of a network's parameters that is in feed-forwards."""
    network = made(of)
    parts = feed_forward_parameters(network)
    return sum(hidden * each + bias for hidden, each, bias in parts) / parameter_count(network)


def active_units(hidden: int) -> int:
    """Hidden units that a token uses after ``dense_to_moe`` as it is by default: Dense2MoE's 1S12E2A."""
    step = DenseToMoe()
    shared, expert = step.sizes(hidden)
    return shared + step.top_k * expert


def active_feed_forward_share(of: str) -> float:
    """The share of the feed-forwards' hidden units that a token uses in a mixture of experts."""
    hidden = [units for units, _, _ in feed_forward_parameters(made(of))]
    return sum(map(active_units, hidden)) / sum(hidden)


def active_parameters(of: str) -> float:
    """Parameters that a token uses in a mixture of experts, routers apart."""
    return active_parameters_in(made(of))


def active_parameters_in(network: nn.Module) -> int:
    """The same of a network, or of one of its blocks."""
    idle = ((hidden - active_units(hidden)) * each for hidden, each, _ in feed_forward_parameters(network))
    return parameter_count(network) - sum(idle)


class Classifier(nn.Module):
    """A vision transformer's answer alone: picture (B, 3, 224, 224) -> logits (B, classes)."""

    def __init__(self, size: str) -> None:
        super().__init__()
        self.net = made(f"ViT-{size}/16")

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Its first output."""
        return self.net(pixel_values=pixel_values).logits


PICTURE = {"pixel_values": torch.empty(1, 3, 224, 224, device="meta")}


def macs(of: str) -> float:
    """Multiply-accumulates of a vision transformer (``S``) for one picture; of products, convolutions and attention."""
    return contract.macs(Classifier(of), PICTURE)


def merged_macs(of: str) -> float:
    """The same after ``merge_tokens`` with so many tokens (``S, 13``), without what the matching itself multiplies."""
    size, r = of.split(", ")
    classifier = Classifier(size)
    step = MergeTokens(r=int(r), restore=False, form="scatter")
    result = step.apply(share(classifier), contract.Context(example=PICTURE))
    config: Any = classifier.net.config
    ((_, tokens),) = result.plan.facts["tokens"].items()
    matching = 0
    for entry in result.plan.choice.values():
        receive = tokens // 2
        matching += (tokens - 1 - receive) * receive * config.hidden_size // config.num_attention_heads
        tokens -= entry.merge
    assert result.after.macs is not None
    return result.after.macs - matching


def tokens_left(of: str) -> float:
    """Tokens that reach the end of such a vision transformer (``S, 13``)."""
    size, r = of.split(", ")
    plan = MergeTokens(r=int(r), restore=False).plan(Classifier(size), contract.Context(example=PICTURE))
    ((_, tokens),) = plan.facts["tokens"].items()
    return tokens - sum(entry.merge for entry in plan.choice.values())


def removed(of: str) -> float:
    """Parameters of BERT-base that go with a part of its last layer: ``attention``, ``ffn``, ``head`` or ``group``."""
    network = made("BERT-base")
    kind = {"head": "attention", "group": "ffn"}.get(of, of)
    element = next(each for each in elements_of(network) if each.kind == kind)
    change = {"whole": True} if kind == of else {"removed": tuple(element.parts(256)[0])}
    before = parameter_count(network)
    return before - parameter_count(carry_out(network, {element.key: element.untouched().model_copy(update=change)}))


def active_parameters_of_blocks(of: str) -> float:
    """What ``active_parameters`` counts where some blocks alone run: a network, and how many of each of its stacks."""
    name, *running = of.split(", ")
    network = made(name)
    stacks = [stack.blocks for _, stack in layers_of(network, BlockStack)]
    idle = sum(
        (len(blocks) - int(count)) * active_parameters_in(blocks[0])
        for blocks, count in zip(stacks, running, strict=True)
    )
    return active_parameters_in(network) - idle


def saved_by_blocks(of: str) -> float:
    """The share of all parameters that is then idle."""
    return 1 - active_parameters_of_blocks(of) / parameters(of.partition(", ")[0])


def storage_saved(of: str) -> float:
    """How many times the merged U-Net of Stable Diffusion 1.5 goes into so many U-Nets that it was made of."""
    with torch.device("meta"):
        merged = with_styles(unet(), int(of))
    return int(of) * parameters("SD1.5") / parameter_count(merged)


def parameters_saved(of: str) -> float:
    """The share of parameters that the second of two networks (``BERT-base, DistilBERT``) does without."""
    whole, small = of.split(", ")
    return 1 - parameters(small) / parameters(whole)
