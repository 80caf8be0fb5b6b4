"""Checkpoints of transformers: ``hf:FOLDER`` or ``hf:HUB_ID``, then ``#encoder``, then ``?NAME=SIZE,...``.

What goes in follows from the ``forward`` of the architecture that ``config.json`` names, the configuration and, for
pictures, the preprocessor's settings; arguments that are no inputs are named with a reason. Served: encoders of text,
images, films and speech, classifiers and detectors on top of them, CLIP-like pairs of towers, the encoder of an
encoder-decoder (``#encoder``), sentence-transformers folders with their pooling, and the prefill step of causal
language models (token ids in, logits out, no cache).

Sizes are guessed, or given behind a question mark: ``hf:FOLDER?sequence=16..128..2048,batch=1`` or ``?size=512``. A
dimension takes one size, or smallest..largest, or smallest..typical..largest; ``size`` is height and width.

The module is built from its configuration and given tensors that stay in the checkpoint's files. Where transformers
converts the tensors of a checkpoint on loading, they are converted in memory, and the report says so.

Shapes: B batch, N tokens, C channels, H height, W width, T audio samples.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from enginewright.ground.errors import FaultsError, ToolchainError, require, unknown
from enginewright.ground.reading import expanded
from enginewright.ground.signature import Arrays, Dim, InputSpec
from enginewright.sources import short_name
from enginewright.sources.arguments import left_out, reason_for
from enginewright.sources.contract import BY_HAND, Interface, Model, answer, files_from, interface_from, reason_of
from enginewright.sources.filling import fill, on_meta, read_all, shards, without_memory
from enginewright.sources.hf_inputs import Facts, Reading, contract, preprocessor_of, readings
from enginewright.sources.hub import folder_of
from enginewright.sources.plain_calls import plain_call
from enginewright.sources.pooling import read_modules
from enginewright.sources.sentences import tokenizer_of
from enginewright.sources.sizes import Limits, limits_from
from enginewright.validation.inputs import draw

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
PREPROCESSORS = ("processor_config.json", "preprocessor_config.json")
"""Files that say how large pictures are."""
TRIED = {"batch": 2, "texts": 3, "images": 2, "sounds": 2}
"""Sizes of the call that shows what a network answers: unlike numbers tell whether texts and pictures are paired."""


def load(text: str, *, seed: int = 0, trust_remote_code: bool = False) -> Model:
    """Load a checkpoint of transformers.

    Args:
        text: ``hf:FOLDER``, then ``#encoder`` for that part of an encoder-decoder, then ``?NAME=SIZE,...``.
        seed: not used; nothing here is random.
        trust_remote_code: run code that the folder brings along.

    Raises:
        ToolchainError: no configuration, an unknown architecture, one that is not served, weights that do not fit, or
            a size that the model does not take.
    """
    del seed
    transformers: Any = require("transformers", extra="transformers")
    place, part, asked = split(text)
    root = folder_of(place, NEEDED)
    sentence = read_modules(root)
    folder = root / sentence.encoder if sentence else root
    config = configuration(folder, transformers, trust_remote_code)
    if sentence:
        cls, options = plain_model(config, transformers), {"add_pooling_layer": False}
    else:
        cls, options = architecture(folder, config, transformers, trust_remote_code), {}
    refuse_decoders(cls, part, place, folder)
    module, said = built(cls, config, folder, options if "add_pooling_layer" in arguments_of(cls.__init__) else {})
    if part:
        module = encoder_of(module, part, where=str(folder))
    facts = Facts(
        module=module,
        config=module.config,
        preprocessor=preprocessor_of(folder),
        asked=asked,
        tokens=sentence.longest if sentence else None,
        where=text,
    )
    inputs, reading, result = answered(facts)
    names = tuple(spec.name for spec in inputs)
    interface, outputs = interface_from(module, result, config=module.config.to_dict())
    kept, dropped = tensors_of(result)
    always = always_of(facts)
    notes = [*notes_of(facts, inputs, reading), *(sentence.notes if sentence else ())]
    if dropped:
        notes.append(f"of its answer are left out, because they are no tensors: {', '.join(dropped)}")
    if dropped or always:
        keys = tuple(f"output_{key}" if isinstance(key, int) else key for key in kept)
        interface, outputs = replace(interface, module="inner", keys=keys), keys
        module = plain_call(module, names, kept, always)
    if sentence and sentence.steps:
        module = sentence.around(module)
        outputs = ("sentence_embedding", "last_hidden_state")
        interface = Interface(arguments=names, returns="dict", keys=outputs)
    code = root.glob("*.py") if trust_remote_code else ()
    read = [folder / "config.json", *shards(folder, "model"), *(sentence.files if sentence else ()), *sorted(code)]
    settings = [folder / name for name in PREPROCESSORS if facts.preprocessor and (folder / name).is_file()]
    return Model(
        name=short_name(text),
        module=module,
        inputs=inputs,
        outputs=outputs,
        weights=said,
        realistic=lambda count, seed: [drawn(inputs, seed * 1_000 + i) for i in range(count)],
        sized=lambda sizes, seed: drawn(inputs, seed, sizes),
        interface=interface,
        tokenize=tokenizer_of(folder, inputs, trust_remote_code=trust_remote_code),
        mask="attention_mask" if "attention_mask" in names else "",
        carried=tuple(sorted({path for pattern in CARRIED for path in folder.glob(pattern) if path.is_file()})),
        files=files_from(root, [*read, *settings]),
        left_out=left_out(facts.module, names, why_left_out(facts)),
        notes=tuple(notes),
    )


def split(text: str) -> tuple[str, str, dict[str, Limits]]:
    """``hf:FOLDER#PART?NAME=SIZE`` -> folder, part or nothing, and the sizes that are asked for."""
    place = text.partition(":")[2]
    if expanded(place).is_dir():  # a folder's own name may hold such signs
        return place, "", {}
    place, _, asked = place.partition("?")
    if not expanded(place).is_dir():
        place, _, part = place.partition("#")
        return place, part, limits_from(asked, text)
    return place, "", limits_from(asked, text)


def refuse_decoders(cls: Any, part: str, place: str, folder: Path) -> None:
    """Raise for an encoder-decoder of which no part is named: each of its calls is many of the decoder."""
    if not part and "decoder_input_ids" in arguments_of(cls.forward):
        raise ToolchainError(
            f"{cls.__name__} is an encoder and a decoder, which are two engines",
            where=str(folder),
            help=f"export its encoder with 'hf:{place}#encoder'; the decoder goes through py:",
        )


def encoder_of(module: Any, part: str, *, where: str) -> Any:
    """The encoder of an encoder-decoder.

    Raises:
        ToolchainError: another part was asked for, or there is none.
    """
    if part != "encoder":
        raise unknown("part of a transformers checkpoint", part, ["encoder"], where=where)
    encoder = module.get_encoder() if "decoder_input_ids" in arguments_of(module.forward) else module
    if encoder is module:
        raise ToolchainError(f"{type(module).__name__} has no encoder apart", where=where, help=BY_HAND)
    return encoder.eval()


def arguments_of(function: Any) -> Mapping[str, inspect.Parameter]:
    """The arguments of a function."""
    return inspect.signature(function).parameters


def answered(facts: Facts) -> tuple[tuple[InputSpec, ...], Reading, Any]:
    """The inputs of the first reading of a configuration that the network answers, and its answer, on shapes alone.

    Raises:
        ToolchainError: it answers none.
    """
    errors: dict[bool, ToolchainError] = {}  # the first of towers apart, and of towers together
    for reading in readings(facts):
        try:
            inputs = contract(facts, reading)
            example = {k: torch.from_numpy(v) for k, v in draw(inputs, seed=0, sizes=TRIED).items()}
            return inputs, reading, answer(facts.module, {**example, **always_of(facts)})
        except ToolchainError as error:
            errors.setdefault(reading.towers, error)
    first = errors[min(errors)]
    if isinstance(first, FaultsError):
        raise first
    raise ToolchainError(first.message, where=first.where or facts.where, help=first.help or BY_HAND)


def always_of(facts: Facts) -> dict[str, Any]:
    """Arguments that every call has: position tables fit pictures of another size when told to."""
    resized = {"size", "height", "width"} & facts.asked.keys()
    return {"interpolate_pos_encoding": True} if resized and "interpolate_pos_encoding" in facts.known else {}


def tensors_of(result: Any) -> tuple[list[str | int], list[str]]:
    """Keys or places of the tensors in an answer, and names of what else it holds."""
    if isinstance(result, Tensor):
        return [], []
    pairs = list(result.items() if isinstance(result, Mapping) else enumerate(result))
    kept = [key for key, value in pairs if isinstance(value, Tensor)]
    return kept, [str(key) for key, value in pairs if not isinstance(value, Tensor) and value is not None]


def notes_of(facts: Facts, inputs: tuple[InputSpec, ...], reading: Reading) -> list[str]:
    """What was chosen that the user can choose otherwise."""
    said = []
    dims = {d.name: d for spec in inputs for d in spec.shape if isinstance(d, Dim)}
    limit, length = facts.trained_positions, dims.get("sequence")
    if length and "sequence" not in facts.asked and limit and length.high < limit:
        why = f"the folder cuts sentences there, the model has {limit}" if facts.tokens else f"the model has {limit}"
        said.append(f"texts have up to {length.high} tokens ({why}); '?sequence=1..64..{limit}' asks for more")
    if length and limit and length.high > limit:
        said.append(f"texts have up to {length.high} tokens, as asked; the model was made for {limit}")
    if any(spec.name.startswith("pixel_values") for spec in inputs) and not always_asked(facts):
        height, width = reading.picture
        said.append(
            f"pictures are {height} x {width}, {facts.says_who(reading.picture)}; '?size=N' asks for another size"
        )
    return said


def why_left_out(facts: Facts) -> Callable[[str], str]:
    """From an argument's name to why it is no input."""

    def reason(name: str) -> str:
        if name == "attention_mask" and "input_ids" not in facts.known:
            norm = facts.get("feat_extract_norm")
            return "the model was made without one" + (f" (feat_extract_norm is {norm!r})" if norm else "")
        return reason_for(name)

    return reason


def always_asked(facts: Facts) -> bool:
    """Whether the user named a size for pictures."""
    return bool({"size", "height", "width"} & facts.asked.keys())


def configuration(folder: Path, transformers: Any, trust_remote_code: bool) -> Any:
    """The checkpoint's configuration, set to return no cache and no attention maps."""
    if not (folder / "config.json").is_file():
        raise ToolchainError(
            f"{folder.name!r} has no config.json", where=str(folder), help="name the folder that save_pretrained wrote"
        )
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as cause:  # configurations check themselves, each in its own way
        raise ToolchainError(
            f"transformers cannot read this configuration: {reason_of(cause)}",
            where=str(folder / "config.json"),
            help="code in the folder is run with --trust-remote-code only; a module of your own goes through py:",
        ) from cause
    for each in (config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", {}))):
        if hasattr(each, "use_cache"):
            each.use_cache = False
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
        cls = getattr(transformers, names[0], None) or beside(config, names[0])
        if not hasattr(cls, "_from_config"):
            known = [name for name in dir(transformers) if re.search(r"(Model|For[A-Z]\w+)$", name)]
            near = difflib.get_close_matches(names[0], known, n=3, cutoff=0)
            raise unknown("architecture of transformers", names[0], near, where=str(folder / "config.json"))
        return cast("type[nn.Module]", cls)
    return plain_model(config, transformers, where=str(folder / "config.json"))


def beside(config: Any, name: str) -> Any:
    """A class that transformers defines for a model's own use, such as an encoder's; None where there is none."""
    file = type(config).__module__.replace(".configuration_", ".modeling_")
    if not file.startswith("transformers.models."):
        return None
    try:
        return getattr(importlib.import_module(file), name, None)
    except ImportError:
        return None


def plain_model(config: Any, transformers: Any, *, where: str = "") -> type[nn.Module]:
    """The model of a type without a head; of encoder-decoders that have one of its own, the encoder."""
    if alone := getattr(transformers, f"{type(config).__name__.removesuffix('Config')}EncoderModel", None):
        return cast("type[nn.Module]", alone)
    mapping = transformers.MODEL_MAPPING
    if type(config) not in mapping:
        raise ToolchainError(
            f"the configuration names no architecture, and type {config.model_type!r} has no plain model",
            where=where,
            help='add "architectures" to it',
        )
    return cast("type[nn.Module]", mapping[type(config)])


def built(cls: Any, config: Any, folder: Path, options: Mapping[str, Any]) -> tuple[Any, str]:
    """The module with its weights, and where those are from, in words.

    Raises:
        ToolchainError: it cannot be built here, or the weights do not fit.
    """
    files = shards(folder, "model")
    options = {**options, "experts_implementation": "batched_mm"}  # the only one that has no loop over what was chosen
    try:
        module: Any = constructed(cls, config, options)
    except Exception as cause:  # whatever a model's own code raises
        raise ToolchainError(
            f"{cls.__name__} cannot be built from this configuration: {reason_of(cause)}",
            where=str(folder / "config.json"),
        ) from cause
    tensors = renamed(read_all(files), module)
    stored_type = most_common_type(tensors)
    absent = missing(module, tensors)
    if not absent:
        spare = set(tensors) - set(module.state_dict())
        fill(module, tensors, where=folder, spare=[name for name in spare if expendable(name, module)])
        module.tie_weights()
        said = f"from {folder.name}, {stored_type}"
    else:
        module, said = converted(cls, folder, options, absent)
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


def constructed(cls: Any, config: Any, options: Mapping[str, Any]) -> Any:
    """The module without memory, its parts with the fused form of attention where they have one, else the plain one."""
    config._attn_implementation = None  # each part chooses
    with without_memory():
        return cls._from_config(config, **options)


def converted(cls: Any, folder: Path, options: Mapping[str, Any], absent: list[str]) -> tuple[nn.Module, str]:
    """The module as transformers loads it, for checkpoints whose tensors it converts; refuses made-up weights."""
    try:
        module, report = cls.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, output_loading_info=True, **options
        )
    except Exception as cause:  # whatever a model's own code raises
        raise ToolchainError(
            f"transformers cannot load {folder.name} as {cls.__name__}: {reason_of(cause)}",
            where=str(folder),
            help="check that configuration and weights belong together",
        ) from cause
    lacking, wrong = sorted(report["missing_keys"]), sorted(str(entry) for entry in report["mismatched_keys"])
    if lacking or wrong:
        listed = "; ".join([*(f"missing {name}" for name in lacking), *(f"mismatched {name}" for name in wrong)][:8])
        raise ToolchainError(
            f"{folder.name} does not fit the model ({len(lacking) + len(wrong)} tensors): {listed}",
            where=str(folder),
            help="check that configuration and weights belong together",
        )
    return module, f"from {folder.name}; {len(absent)} tensors converted by transformers, in memory"


def drawn(inputs: tuple[InputSpec, ...], seed: int, sizes: Mapping[str, int] | None = None) -> Arrays:
    """Random inputs; of texts and pictures, each row but the first ends early, and its mask says so."""
    arrays = draw(inputs, seed=seed, sizes=sizes)
    if (mask := arrays.get("pixel_mask")) is not None:
        rng = np.random.default_rng(seed)
        for row in mask[1:]:
            row[rng.integers(row.shape[0] // 2, row.shape[0]) :] = 0
            row[:, rng.integers(row.shape[1] // 2, row.shape[1]) :] = 0
    if (mask := arrays.get("attention_mask")) is not None:
        rows, length = mask.shape
        ends = np.random.default_rng(seed).integers(max(1, length // 4), length + 1, rows)
        ends[0] = length
        arrays["attention_mask"] = (np.arange(length)[None] < ends[:, None]).astype(mask.dtype)
    return arrays
