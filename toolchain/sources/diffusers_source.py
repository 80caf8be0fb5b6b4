"""Networks that diffusers saved: ``diffusers:FOLDER#COMPONENT`` of a pipeline, or ``diffusers:FOLDER`` of one network.

A pipeline's folder has ``model_index.json``, a network's has ``config.json``. FOLDER may be ``owner/name`` on the hub.
An autoencoder is two networks, ``#vae_decoder`` and ``#vae_encoder``. Weights are safetensors and stay where they lie;
no code that a folder brings along is run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from enginewright.ground.errors import ToolchainError, require, unknown
from enginewright.ground.reading import expanded, read_json
from enginewright.sources import short_name
from enginewright.sources.autoencoders import DECODERS, ENCODERS
from enginewright.sources.contract import Model, files_from
from enginewright.sources.denoisers import DENOISERS
from enginewright.sources.diffusers_jobs import job as pipeline_job
from enginewright.sources.filling import fill, on_meta, read_all, shards, without_memory
from enginewright.sources.flat import Config, Family, example_of, interface
from enginewright.sources.hub import folder_of
from enginewright.sources.jobs import Job
from enginewright.sources.sentences import tokenizer_of
from enginewright.sources.text_encoders import TEXT_ENCODERS, renamed

PREFIX = "diffusers:"
INDEX, CONFIG = "model_index.json", "config.json"

ENGINES = ("transformer", "unet", "text_encoder", "text_encoder_2", "text_encoder_3")
"""Components of a pipeline that become one engine each."""

HALVES = {"vae_decoder": DECODERS, "vae_encoder": ENCODERS}
"""Of an autoencoder."""

LEGACY = {"ada_norm_zero": "DiTTransformer2DModel", "ada_norm_single": "PixArtTransformer2DModel"}
"""What a ``Transformer2DModel`` is called today, by its ``norm_type``."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One network of a folder.

    Args:
        folder: where it lies in the folder that was asked for; empty for that one itself.
        library: ``diffusers`` or ``transformers``.
        cls: its class there, as far as it is known without its own configuration.
        families: classes that can be loaded as this part.
    """

    folder: str = ""
    library: str = "diffusers"
    cls: str = ""
    families: Mapping[str, Family]

    def patterns(self) -> list[str]:
        """Files to fetch: configuration and weights, but none of other precisions."""
        at, stem = f"{self.folder}/" if self.folder else "", self.stem
        also = [f"{self.tokenizer}/*"] if self.tokenizer else []
        return [f"{at}*.json", f"{at}{stem}.safetensors", f"{at}{stem}-*.safetensors", *also]

    @property
    def tokenizer(self) -> str:
        """Where the tokenizer of a text encoder lies; empty for others."""
        return self.folder.replace("text_encoder", "tokenizer") if self.folder.startswith("text_encoder") else ""

    @property
    def stem(self) -> str:
        """What the files of weights begin with."""
        return "model" if self.library == "transformers" else "diffusion_pytorch_model"


def load(text: str, *, seed: int = 0, trust_remote_code: bool = False) -> Model:
    """Load one network, its weights mapped.

    Args:
        text: ``diffusers:FOLDER`` or ``diffusers:FOLDER#COMPONENT``.
        seed: not used; nothing here is random.
        trust_remote_code: not used; a folder's own code is never run.

    Raises:
        ToolchainError: no such folder or component; a whole pipeline; a class that is not covered; weights that do not
            fit, or are missing.
    """
    del seed, trust_remote_code
    place, name = split(text)
    part = choose(text, name, parts_of(folder_of(place, [INDEX, CONFIG])))
    whole = folder_of(place, part.patterns())
    folder = whole / part.folder
    config = settings_in(folder / CONFIG)
    cls = class_name(config, part, folder)
    if cls not in part.families:
        raise uncovered(cls, part, folder)
    network = build(cls, config, part, folder)
    family = part.families[cls]
    settings: Config = network.config.to_dict() if part.library == "transformers" else dict(network.config)
    inputs = family.inputs(settings)
    flat = family.flat(network).eval()
    words = whole / part.tokenizer if part.tokenizer and (whole / part.tokenizer).is_dir() else None
    how, outputs, absent = interface(flat, example_of(inputs), settings)
    return Model(
        name=short_name(text),
        module=flat,
        inputs=inputs,
        outputs=outputs,
        weights=f"those of {cls} in {short_name(PREFIX + place).removeprefix(PREFIX)}",
        interface=how,
        tokenize=tokenizer_of(words, inputs) if words else None,
        carried=tuple(sorted(path for path in words.iterdir() if path.is_file())) if words else (),
        files=files_from(whole, [folder / CONFIG, *shards(folder, part.stem)]),
        left_out=absent,
    )


def components(text: str) -> list[str]:
    """Model strings of all networks in a folder that become engines: one for a network, several for a pipeline.

    Raises:
        ToolchainError: no such folder, or nothing of diffusers in it.
    """
    place, name = split(text)
    found = parts_of(folder_of(place, [INDEX, CONFIG]))
    if name:
        choose(text, name, found)
        return [text]
    return [f"{PREFIX}{place}#{part}" if part else text for part in found]


def job(text: str, **settings: Any) -> Job:
    """The whole job of a pipeline's folder; settings are those of ``diffusers_jobs.job``.

    Raises:
        ToolchainError: it cannot be run here, and why.
    """
    place, _ = split(text)
    parts = parts_of(folder_of(place, [INDEX, CONFIG]))
    wanted = [pattern for part in parts.values() for pattern in part.patterns()]
    return pipeline_job(folder_of(place, [INDEX, "scheduler/*", *wanted]), list(parts), **settings)


def split(text: str) -> tuple[str, str]:
    """``diffusers:FOLDER#COMPONENT`` -> folder, and component or nothing."""
    place = text.removeprefix(PREFIX)
    if expanded(place).is_dir():  # a folder's own name may hold a '#'
        return place, ""
    place, _, name = place.rpartition("#") if "#" in place else (place, "", "")
    return place, name


def parts_of(folder: Path) -> dict[str, Part]:
    """The networks of a folder by component; a single one has the empty name.

    Raises:
        ToolchainError: neither a pipeline's folder nor a network's.
    """
    if (folder / INDEX).is_file():
        index = settings_in(folder / INDEX)
        named = {
            name: entry for name, entry in index.items() if isinstance(entry, list) and len(entry) == 2 and entry[1]
        }
        parts = {name: part_of(name, *named[name]) for name in ENGINES if name in named}
        if "vae" in named:
            library, cls = named["vae"]
            halves = halves_of(str(cls)) if library == "diffusers" else HALVES
            parts |= {
                half: Part(folder="vae", library=str(library), cls=str(cls), families=families)
                for half, families in halves.items()
            }
        return parts
    if not (folder / CONFIG).is_file():
        raise ToolchainError(
            f"there is neither {INDEX} nor {CONFIG} in {folder.name!r}",
            where=str(folder),
            help="give the folder that save_pretrained of diffusers wrote",
        )
    cls = str(settings_in(folder / CONFIG).get("_class_name", ""))
    if cls.startswith("Autoencoder"):
        return {half: Part(cls=cls, families=families) for half, families in halves_of(cls).items()}
    return {"": Part(cls=cls, families=DENOISERS)}


def part_of(name: str, library: object, cls: object) -> Part:
    """A component that is one engine, from its entry in ``model_index.json``."""
    families = TEXT_ENCODERS if name.startswith("text_encoder") else DENOISERS
    return Part(folder=name, library=str(library), cls=str(cls), families=families)


def halves_of(cls: str) -> dict[str, dict[str, Family]]:
    """What an autoencoder can be loaded as; both halves for one that is not known, so that loading says so."""
    return {half: families for half, families in HALVES.items() if cls in families} or HALVES


def choose(text: str, name: str, parts: Mapping[str, Part]) -> Part:
    """The part that is asked for.

    Raises:
        ToolchainError: there is no such part, or several and none was named.
    """
    if name in parts:
        return parts[name]
    here = ", ".join(part for part in parts if part) or "none"
    if not name:
        raise ToolchainError(
            f"{text!r} holds several networks, and one is exported at a time",
            help=f"add one of them after a '#': {here}",
        )
    if Path(name).name != name:
        raise ToolchainError(f"the component {name!r} points outside its folder; refused", where=text)
    error = unknown("component", name, [part for part in parts if part], where=text)
    raise ToolchainError(error.message, where=text, help=f"{error.help}; components here: {here}")


def class_name(config: Config, part: Part, folder: Path) -> str:
    """The class of a network; its own configuration knows better than the pipeline's."""
    if part.library == "transformers":
        return part.cls
    if part.library != "diffusers":
        raise ToolchainError(
            f"{part.folder!r} is of a class {part.cls!r} that comes with code of its own ({part.library})",
            where=str(folder),
            help="write a model file that builds it, and use py:",
        )
    name = str(config.get("_class_name", ""))
    if not name:
        raise ToolchainError(
            f"{CONFIG} in {folder.name!r} names no class of diffusers (_class_name)",
            where=str(folder / CONFIG),
            help="a folder that transformers saved is loaded with hf:",
        )
    return LEGACY.get(str(config.get("norm_type")), name) if name == "Transformer2DModel" else name


def uncovered(cls: str, part: Part, folder: Path) -> ToolchainError:
    """The error for a class that no family covers."""
    by_hand = "for any other, write a model file that builds it and names its inputs, and use py:FILE:FUNCTION"
    if hasattr(require(part.library, extra=part.library), cls):  # rightly spelt: another name is another network
        message, tip = (
            f"{cls} of {part.library} is not supported here",
            f"supported: {', '.join(sorted(part.families))}",
        )
    else:
        error = unknown(f"supported network of {part.library}", cls, part.families)
        message, tip = error.message, str(error.help)
    return ToolchainError(message, where=str(folder), help=f"{tip}; {by_hand}")


def build(cls: str, config: Config, part: Part, folder: Path) -> Any:
    """The network in eval mode, each parameter a place in a file."""
    library = require(part.library, extra=part.library)
    if "quantization_config" in config:
        method = config["quantization_config"].get("quant_method")
        raise ToolchainError(
            f"the weights in {folder.name!r} are quantized already ({method})",
            where=str(folder / CONFIG),
            help="give the folder of the original weights, and quantize with a pass",
        )
    kind = getattr(library, cls)
    try:
        with without_memory():
            if part.library == "transformers":
                network = kind(kind.config_class.from_dict(dict(config)))
            else:
                network = kind.from_config(dict(config))
    except (ValueError, TypeError, KeyError, NotImplementedError) as cause:
        raise ToolchainError(f"{CONFIG} describes no {cls}: {cause}", where=str(folder / CONFIG)) from cause
    fill(network, as_named_today(read_all(shards(folder, part.stem)), network, part), where=folder)
    assert not on_meta(network)
    return network.eval()


def as_named_today(tensors: dict[str, Tensor], network: nn.Module, part: Part) -> dict[str, Tensor]:
    """The tensors of a file under the names that this version of its library uses."""
    if part.library == "transformers":
        return renamed(tensors, network)
    network._fix_state_dict_keys_on_load(tensors)  # type: ignore[operator]  # as from_pretrained does
    return tensors


def settings_in(path: Path) -> dict[str, Any]:
    """A JSON object from a file."""
    try:
        found = read_json(path, what="it", absent=f"there is no {path.name} in {path.parent.name!r}")
    except ToolchainError as fault:
        if not path.exists():
            raise
        raise ToolchainError(f"{path.name} cannot be read: {fault.message}", where=fault.where) from fault
    if not isinstance(found, dict):
        raise ToolchainError(f"{path.name} holds no settings", where=str(path))
    return found
