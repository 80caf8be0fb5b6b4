"""Counts that papers state of networks which are not ours: parameters, heads and multiply-accumulates.

Networks of diffusers and transformers are made from their configurations on the meta device: nothing is downloaded and
no weight takes memory. What a method adds, removes or leaves idle is counted on the network that its pass made.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from enginewright.ground.errors import require
from enginewright.models.adapters import disenbooth, splitflux
from enginewright.models.blocks.low_rank import products
from enginewright.models.diffusion import dit, li_dit
from enginewright.passes import contract
from enginewright.passes.attention.couple_streams import CoupleStreams
from enginewright.passes.attention.coupling import CoupledBlock
from enginewright.passes.kernel.surgery import share
from enginewright.passes.moe.dense_to_moe import DenseToMoe
from enginewright.passes.pruning.elements import carry_out, elements_of
from enginewright.passes.recovery.styles import add_styles, time_embeddings
from enginewright.passes.tokens.merge_tokens import MergeTokens
from enginewright.passes.traits import BlockStack, FeedForward, HeadedAttention, layers_of
from enginewright.reports.benchmarks.large_models import SDXL

IC_LORA = {
    "all": r"(single_)?transformer_blocks\..*",
    "attention": r"(single_)?transformer_blocks\..*\.(to_(q|k|v|out\.0|add_out)|add_(q|k|v)_proj)",
}
"""Paths of the linear layers of Flux that In-Context LoRA may adapt; its files do not say which of the two."""
IC_LORA_RANK = 16
VIT = {
    "Ti": {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768},
    "S": {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536},
    "B": {},
    "L": {"hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096, "num_hidden_layers": 24},
}
"""What these vision transformers for 224 px do not share with the defaults of transformers; DeiT's are the same."""
SD21 = {
    "sample_size": 64,
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}
"""What Stable Diffusion 2.1-base does not share with the defaults of diffusers."""
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


def sd3(depth: int, **changed: Any) -> nn.Module:
    """Stable Diffusion 3's denoiser of a depth, which sets its width (64 times as much) and its heads."""
    sizes = {"num_layers": depth, "num_attention_heads": depth, "caption_projection_dim": 64 * depth}
    return diffusers().SD3Transformer2DModel(**{"sample_size": 128, "pos_embed_max_size": 192, **sizes, **changed})


def sd35_medium() -> nn.Module:
    """Stable Diffusion 3.5 medium's, whose first 13 blocks have a second attention, over the image alone."""
    return sd3(24, qk_norm="rms_norm", dual_attention_layers=tuple(range(13)), pos_embed_max_size=384)


def unet() -> nn.Module:
    """The U-Net of Stable Diffusion 1.5."""
    return diffusers().UNet2DConditionModel(sample_size=64, cross_attention_dim=768)


NETWORKS: Mapping[str, Callable[[], nn.Module]] = {
    "FLUX.1-dev": flux,
    "SD3-medium": lambda: sd3(24),
    "SD3, d=15": lambda: sd3(15),
    "SD3, d=18": lambda: sd3(18),
    "SD3, d=21": lambda: sd3(21),
    "SD3, d=30": lambda: sd3(30),
    "SD3.5-medium": sd35_medium,
    "SD3.5-large": lambda: sd3(38, qk_norm="rms_norm"),
    "LI-DiT-1B": lambda: li_dit.DiT(li_dit.PUBLISHED["1B"]),
    "LI-DiT-10B": lambda: li_dit.DiT(li_dit.PUBLISHED["10B"]),
    "SD1.5": unet,
    "SD2.1-base": lambda: diffusers().UNet2DConditionModel(**SD21),
    "SDXL": lambda: diffusers().UNet2DConditionModel(**SDXL),
    "DiT-XL/2": lambda: dit.build(dit.PUBLISHED["XL/2"]),
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


def block_matrices(of: str) -> float:
    """Elements of the matrices in a network's ``blocks``: no biases, no norms."""
    blocks = made(of).get_submodule("blocks")
    return sum(parameter.numel() for parameter in blocks.parameters() if parameter.dim() == 2)


def modulation_parameters(of: str) -> float:
    """Parameters of Stable Diffusion 3's denoiser that see the timestep and the pooled text alone."""
    paths = re.compile(r"time_text_embed|.*norm\w*\.linear")
    return sum(parameter_count(module) for path, module in made(of).named_modules() if paths.fullmatch(path))


def adapter_parameters(of: str) -> float:
    """Parameters of In-Context LoRA's adapters of FLUX.1-dev: of ``all`` linears of its blocks, or ``attention``'s."""
    adapted = linears("FLUX.1-dev", IC_LORA[of])
    return sum(IC_LORA_RANK * (layer.in_features + layer.out_features) for layer in adapted)


def adapted_layers(of: str) -> float:
    """How many layers that are."""
    return len(linears("FLUX.1-dev", IC_LORA[of]))


def linears(of: str, path: str) -> list[nn.Linear]:
    """The linear layers of a network whose whole path a pattern describes."""
    return [
        module
        for name, module in made(of).named_modules()
        if isinstance(module, nn.Linear) and re.fullmatch(path, name)
    ]


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


def teraflops(of: str) -> float:
    """10^12 floating-point operations, two for each product and sum, of one call of a denoiser of Stable Diffusion 3.

    Args:
        of: the network, the side of its latent, and how many text tokens it reads: ``SD3-medium, 32, 154``.
    """
    name, side, text = of.rsplit(", ", 2)
    call = {"hidden_states": (16, int(side), int(side)), "encoder_hidden_states": (int(text), 4096)}
    shapes = {**call, "pooled_projections": (2048,), "timestep": ()}
    with torch.device("meta"):
        found = contract.macs_of_shapes(made(name), {each: torch.zeros(1, *shape) for each, shape in shapes.items()})
    assert found is not None
    return 2 * found / 1e12


def merged_macs(of: str) -> float:
    """The same after ``merge_tokens`` with so many tokens (``S, 13``), without what the matching itself multiplies."""
    size, r = of.split(", ")
    classifier = Classifier(size)
    step = MergeTokens(r=int(r), restore=False, form="scatter")
    result = step.apply(share(classifier), contract.Context(example=PICTURE))
    config: Any = classifier.net.config
    ((_, tokens),) = result.plan.facts.tokens.items()
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
    ((_, tokens),) = plan.facts.tokens.items()
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


def flux_call(rows: int, tokens: int) -> contract.Inputs:
    """A call of FLUX.1-dev, without values."""
    return {
        "hidden_states": torch.empty(rows, tokens, 64),
        "encoder_hidden_states": torch.empty(rows, 512, 4096),
        "pooled_projections": torch.empty(rows, 768),
        "timestep": torch.empty(rows),
        "img_ids": torch.empty(tokens, 3),
        "txt_ids": torch.empty(512, 3),
        "guidance": torch.empty(rows),
    }


def unet_call(rows: int, width: int) -> contract.Inputs:
    """A call of a U-Net at 512 px that reads texts of this width, without values."""
    return {
        "sample": torch.empty(rows, 4, 64, 64),
        "timestep": torch.empty(rows),
        "encoder_hidden_states": torch.empty(rows, 77, width),
    }


def dit_call(rows: int) -> contract.Inputs:
    """A call of DiT at 256 px, without values."""
    return {"x": torch.empty(rows, 4, 32, 32), "t": torch.empty(rows), "y": torch.empty(rows, dtype=torch.int64)}


class Alone(nn.Module):
    """SDXL's U-Net with its sizes and pooled text given: its mapping of further inputs is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.net = NETWORKS["SDXL"]()

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        """(B, 4, h, w), (B,), (B, N, 2048) -> (B, 4, h, w)."""
        rows = len(sample)
        more = {"text_embeds": sample.new_empty(rows, 1280), "time_ids": sample.new_empty(rows, 6)}
        return self.net(sample, timestep, encoder_hidden_states, added_cond_kwargs=more).sample


VITAL = (0, 1, 2, 17, 18, 25, 28, 53, 54, 56)
"""FreeCus' layers of FLUX.1-dev: 19 double blocks, then the single ones."""
COUPLED: Mapping[str, tuple[Callable[[], nn.Module], Callable[[], contract.Inputs], dict[str, Any]]] = {
    "alignedgen": (
        NETWORKS["FLUX.1-dev"],
        lambda: flux_call(2, 4096),
        {"layers": ("single_*",), "adain": True, "key_scale": 1.1, "shift": (0, 64)},
    ),
    "freecus": (
        NETWORKS["FLUX.1-dev"],
        lambda: flux_call(2, 1024),
        {
            "layers": tuple(
                f"transformer_blocks.{i}" if i < 19 else f"single_transformer_blocks.{i - 19}" for i in VITAL
            ),
            "key_scale": 1.1,
            "text_key_scale": 1.1,
            "foreground": 1024,
        },
    ),
    "attenst": (
        Alone,
        lambda: unet_call(3, 2048),
        {
            "mode": "replace",
            "layers": ("net.up_blocks.1.attentions.[12].*",),
            "streams": 3,
            "content": 0,
            "source": 1,
            "share": 0.75,
            "temperature": 1.5,
        },
    ),
    "diffstyler": (
        NETWORKS["SD2.1-base"],
        lambda: unet_call(3, 1024),
        {
            "mode": "blend",
            "layers": ("up_blocks.1.attentions.[12].*", "up_blocks.[23].*"),
            "streams": 3,
            "share": 1.0,
            "features": ("up_blocks.1.resnets.1.conv2",),
        },
    ),
    "stylesculptor": (
        NETWORKS["DiT-XL/2"],
        lambda: dit_call(4),
        {"mode": "channel_split", "streams": 4, "content": 0, "source": 2, "scores": 3, "keep": 1000},
    ),
}
"""Methods that couple rows, at the sizes that they are released for: network, call and settings."""


def coupled(of: str) -> contract.Result:
    """What coupling does to the network of a method."""
    build, call, settings = COUPLED[of]
    with torch.device("meta"):
        network, example = build().eval(), call()
    return CoupleStreams(**settings).apply(network, contract.Context(example=example))


def coupled_blocks(of: str) -> float:
    """Blocks that a method couples."""
    return sum(isinstance(each, CoupledBlock) for each in coupled(of).plan.choice.values())


def coupled_macs(of: str) -> float:
    """Multiply-accumulates that a method's coupling adds to a call of all of its rows; below 0 what it saves."""
    result = coupled(of)
    assert result.before.macs is not None
    assert result.after.macs is not None
    return result.after.macs - result.before.macs


def coupled_ratio(of: str) -> float:
    """Multiply-accumulates of a call of all rows of a method over those of as many rows alone."""
    result = coupled(of)
    assert result.before.macs is not None
    assert result.after.macs is not None
    return result.after.macs / result.before.macs
