"""Checkpoints of transformers: ``hf:FOLDER`` or ``hf:HUB_ID``.

What goes in follows from the architecture that ``config.json`` names: its ``forward`` and ``main_input_name`` say which
inputs there are, the configuration how large. Served: encoders of text, images and speech, classifiers on top of them,
CLIP-like pairs of towers, and the prefill step of causal language models (token ids in, logits out, no cache).

The module is built from its configuration and given tensors that stay in the checkpoint's files. Where transformers
converts the tensors of a checkpoint on loading, they are converted in memory, and the report says so.

Shapes: B batch, N tokens, C channels, H height, W width, T audio samples.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from toolchain.errors import ToolchainError, require, unknown
from toolchain.sources import short
from toolchain.sources.contract import Model, files_from, interface_of
from toolchain.sources.filling import fill, on_meta, read_all, shards, without_memory
from toolchain.sources.hub import folder_of
from toolchain.sources.sentences import tokenizer_of
from validation.inputs import Arrays, Dim, InputSpec, draw

CARRIED = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template.*",
)
NEEDED = ("*.json", "*.txt", "*.model", "*.jinja", "*.safetensors")
LONGEST = 512
"""Tokens, where a model sets no limit or a larger one."""
AUDIO = (1_600, 16_000, 480_000)
"""Samples at 16 kHz: a tenth of a second, a second, half a minute."""


def load(text: str, *, seed: int = 0, trust_remote_code: bool = False) -> Model:
    """Load a checkpoint of transformers.

    Raises:
        ToolchainError: no configuration, an unknown architecture, one that is not served, or weights that do not fit.
    """
    del seed
    transformers: Any = require("transformers", extra="transformers")
    folder = folder_of(text.partition(":")[2], NEEDED)
    config = configuration(folder, transformers, trust_remote_code)
    cls = architecture(folder, config, transformers, trust_remote_code)
    module, said = built(cls, config, folder)
    inputs = contract(cls, config, folder)
    example = {name: torch.from_numpy(array) for name, array in draw(inputs, seed=0).items()}
    two_towers = {"input_ids", "pixel_values"} <= example.keys()
    interface, outputs = interface_of(module, example, path="inner" if two_towers else "", config=config.to_dict())
    if two_towers:
        module = TwoTowers(module, outputs).eval()
    code = folder.glob("*.py") if trust_remote_code else ()
    return Model(
        name=short(text),
        module=module,
        inputs=inputs,
        outputs=outputs,
        weights=said,
        realistic=lambda count, seed: [drawn(inputs, seed * 1_000 + i) for i in range(count)],
        sized=lambda sizes, seed: drawn(inputs, seed, sizes),
        interface=interface,
        tokenize=tokenizer_of(folder, inputs, trust_remote_code=trust_remote_code),
        mask="attention_mask" if "attention_mask" in example else "",
        carried=tuple(sorted({path for pattern in CARRIED for path in folder.glob(pattern) if path.is_file()})),
        files=files_from(folder, [folder / "config.json", *shards(folder, "model"), *sorted(code)]),
    )


class TwoTowers(nn.Module):
    """A CLIP-like model without the outputs of each tower, which would come out a second time."""

    def __init__(self, inner: nn.Module, outputs: tuple[str, ...]) -> None:
        super().__init__()
        self.inner, self.outputs = inner, outputs

    def forward(
        self, input_ids: Tensor, pixel_values: Tensor, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Texts (B, N) and pictures (B', C, H, W) -> logits and embeddings."""
        mask = {} if attention_mask is None else {"attention_mask": attention_mask}
        result = self.inner(input_ids=input_ids, pixel_values=pixel_values, **mask)
        return tuple(result[name] for name in self.outputs)


def configuration(folder: Path, transformers: Any, trust_remote_code: bool) -> Any:
    """The checkpoint's configuration, set to return no cache and no attention maps."""
    if not (folder / "config.json").is_file():
        raise ToolchainError(
            f"{folder.name!r} has no config.json", where=str(folder), help="name the folder that save_pretrained wrote"
        )
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, OSError) as cause:
        first = str(cause).splitlines()[0] if str(cause) else type(cause).__name__
        raise ToolchainError(
            f"transformers cannot read this configuration: {first}",
            where=str(folder / "config.json"),
            help="code in the folder is run with --trust-remote-code only; a module of your own goes through py:",
        ) from cause
    config.use_cache = False
    return config


def architecture(folder: Path, config: Any, transformers: Any, trust_remote_code: bool) -> type[nn.Module]:
    """The class that the configuration names, or the plain model of its type."""
    names = getattr(config, "architectures", None) or []
    remote = getattr(config, "auto_map", None) or {}
    if remote and trust_remote_code:
        module: Any = require("transformers.dynamic_module_utils", extra="transformers")
        reference = next((remote[key] for key in remote if key.startswith("AutoModel")), None)
        if reference:
            return cast("type[nn.Module]", module.get_class_from_dynamic_module(reference, folder))
    if names:
        cls = getattr(transformers, names[0], None)
        if cls is None:
            known = [name for name in dir(transformers) if name.endswith(("Model", "ForCausalLM", "Classification"))]
            raise unknown("architecture of transformers", names[0], known, where=str(folder / "config.json"))
        return cast("type[nn.Module]", cls)
    mapping = transformers.MODEL_MAPPING
    if type(config) not in mapping:
        raise ToolchainError(
            f"the configuration names no architecture, and type {config.model_type!r} has no plain model",
            where=str(folder / "config.json"),
            help='add "architectures" to it',
        )
    return cast("type[nn.Module]", mapping[type(config)])


def built(cls: Any, config: Any, folder: Path) -> tuple[nn.Module, str]:
    """The module with its weights, and where those are from, in words."""
    attention = "sdpa" if getattr(cls, "_supports_sdpa", False) else "eager"
    files = shards(folder, "model")
    with without_memory():
        module: Any = cls._from_config(config, attn_implementation=attention)
    tensors = renamed(read_all(files), module)
    stored_type = most_common_type(tensors)
    absent = missing(module, tensors)
    if not absent:
        spare = set(tensors) - set(module.state_dict())
        fill(module, tensors, where=folder, spare=[name for name in spare if expendable(name, module)])
        module.tie_weights()
        said = f"from {folder.name}, {stored_type}"
    else:
        module, said = converted(cls, folder, attention, absent)
    if left := on_meta(module):
        raise ToolchainError(f"{len(left)} tensors have no values: {', '.join(left[:8])}", where=str(folder))
    module.config.use_cache = False
    return module.eval(), said


def most_common_type(tensors: Mapping[str, Tensor]) -> str:
    """The type that most weights are in."""
    counts: dict[torch.dtype, int] = {}
    for tensor in tensors.values():
        counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.numel()
    return str(max(counts, key=lambda dtype: counts[dtype])).removeprefix("torch.")


def renamed(tensors: Mapping[str, Tensor], module: Any) -> dict[str, Tensor]:
    """The names that the module has: with the base model's prefix or without, and new ones for layer norms."""
    wanted, prefix = module.state_dict().keys(), f"{module.base_model_prefix}."
    result = {}
    for name, tensor in tensors.items():
        plain = re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", name))
        choices = (name, plain, plain.removeprefix(prefix), prefix + plain)
        result[next((choice for choice in choices if choice in wanted), name)] = tensor
    return result


def missing(module: Any, tensors: Mapping[str, Tensor]) -> list[str]:
    """Tensors that the module has, the checkpoint lacks, and no tying will give."""
    tied = set(getattr(module, "all_tied_weights_keys", None) or {})
    return [name for name in module.state_dict() if name not in tensors and name not in tied]


def expendable(name: str, module: Any) -> bool:
    """Whether a checkpoint may hold a tensor that the module has no use for: heads, old buffers."""
    patterns = getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ()
    return (
        any(re.search(pattern, name) for pattern in patterns)
        or name.rpartition(".")[2] in ("position_ids", "inv_freq", "masked_bias")
        or not any(name.startswith(child + ".") for child, _ in module.named_children())
    )


def converted(cls: Any, folder: Path, attention: str, absent: list[str]) -> tuple[nn.Module, str]:
    """The module as transformers loads it, for checkpoints whose tensors it converts; refuses made-up weights."""
    module, report = cls.from_pretrained(
        folder, attn_implementation=attention, use_safetensors=True, local_files_only=True, output_loading_info=True
    )
    lacking, wrong = sorted(report["missing_keys"]), sorted(str(entry) for entry in report["mismatched_keys"])
    if lacking or wrong:
        listed = "; ".join([*(f"missing {name}" for name in lacking), *(f"mismatched {name}" for name in wrong)][:8])
        raise ToolchainError(
            f"{folder.name} does not fit the model ({len(lacking) + len(wrong)} tensors): {listed}",
            where=str(folder),
            help="check that configuration and weights belong together",
        )
    return module, f"from {folder.name}; {len(absent)} tensors converted by transformers, in memory"


def contract(cls: Any, config: Any, folder: Path) -> tuple[InputSpec, ...]:
    """The inputs of an architecture, from its ``forward`` and configuration."""
    known = inspect.signature(cls.forward).parameters
    main = cls.main_input_name
    if "decoder_input_ids" in known:
        raise ToolchainError(
            f"{cls.__name__} is an encoder and a decoder, which are two engines",
            where=str(folder),
            help=f"save its encoder alone ({cls.__name__}.get_encoder().save_pretrained) and export that",
        )
    specs: list[InputSpec] = []
    if "input_ids" in known and main != "input_values":
        specs += text_inputs(known, sub(config, "text_config"), two_towers="pixel_values" in known)
    if "pixel_values" in known:
        specs.append(image_input(sub(config, "vision_config"), two_towers=bool(specs)))
    if main == "input_values":
        batch, length = Dim(name="batch", low=1, typical=1, high=64), Dim(name="samples", **dims(AUDIO))
        specs.append(InputSpec(name=main, shape=(batch, length)))
    if not specs:
        raise ToolchainError(
            f"the inputs of {cls.__name__} ({main}) are not known here",
            where=str(folder),
            help="write a function that returns it with example inputs, and use py:FILE:FUNCTION",
        )
    order = [name for name in known if name in {spec.name for spec in specs}]
    return tuple(sorted(specs, key=lambda spec: order.index(spec.name)))


def dims(sizes: tuple[int, int, int]) -> dict[str, int]:
    """Smallest, typical and largest size as arguments of ``Dim``."""
    return dict(zip(("low", "typical", "high"), sizes, strict=True))


def sub(config: Any, name: str) -> Any:
    """A part of a configuration of two towers, or the whole where there is but one."""
    return getattr(config, name, None) or config


def text_inputs(known: Mapping[str, Any], config: Any, *, two_towers: bool) -> list[InputSpec]:
    """Token ids (B, N), their mask and, where the model has them, segment ids."""
    limit = min(getattr(config, "max_position_embeddings", None) or LONGEST, LONGEST)
    if "roberta" in config.model_type:
        limit -= 2  # its positions start behind the padding token's
    batch = Dim(name="texts" if two_towers else "batch", low=1, typical=2, high=64)
    length = Dim(name="sequence", low=1, typical=min(64, limit), high=limit)
    specs = [InputSpec(name="input_ids", shape=(batch, length), dtype="int64", low=0, high=config.vocab_size)]
    if "attention_mask" in known:
        specs.append(InputSpec(name="attention_mask", shape=(batch, length), dtype="int64", low=1, high=2))
    if "token_type_ids" in known and getattr(config, "type_vocab_size", 0) > 1:
        high = config.type_vocab_size
        specs.append(InputSpec(name="token_type_ids", shape=(batch, length), dtype="int64", low=0, high=high))
    return specs


def image_input(config: Any, *, two_towers: bool) -> InputSpec:
    """Normalised pictures (B, C, H, W), of the size that the configuration names, else 224."""
    size = getattr(config, "image_size", None) or 224
    height, width = size if isinstance(size, list | tuple) else (size, size)
    batch = Dim(name="images" if two_towers else "batch", low=1, typical=1, high=64)
    return InputSpec(name="pixel_values", shape=(batch, getattr(config, "num_channels", 3), height, width))


def drawn(inputs: tuple[InputSpec, ...], seed: int, sizes: Mapping[str, int] | None = None) -> Arrays:
    """Random inputs; of texts, each row but the first ends early, and its mask says so."""
    arrays = draw(inputs, seed=seed, sizes=sizes)
    if (mask := arrays.get("attention_mask")) is not None:
        rows, length = mask.shape
        ends = np.random.default_rng(seed).integers(max(1, length // 4), length + 1, rows)
        ends[0] = length
        arrays["attention_mask"] = (np.arange(length)[None] < ends[:, None]).astype(mask.dtype)
    return arrays
