"""What the README says to type is right: names, options and folders, in the order that it stands there.

``test_wheel.py`` runs every line from the installed wheel, in a folder that ``stand_in`` made.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

import enginewright
from enginewright import catalog
from enginewright.arguments import recipe_from
from enginewright.cli import EXIT_CODES, parser
from enginewright.recipe import gate_names
from tests.conftest import ROOT

TEXT = (ROOT / "README.md").read_text()
WORDS = ["[PAD]", "[UNK]", "a", "cat", "sat", "on", "the", "mat"]


def documented_commands() -> list[list[str]]:
    """Every line of the README that begins with a prompt, in order."""
    blocks = re.findall(r"```console\n(.*?)```", TEXT, re.DOTALL)
    lines = [line.removeprefix("$ ") for block in blocks for line in block.splitlines() if line.startswith("$ ")]
    return [shlex.split(line) for line in lines]


def documented_files() -> dict[str, str]:
    """Python blocks whose first line names a file."""
    return dict(re.findall(r"```python\n# (\S+\.py)\n(.*?)```", TEXT, re.DOTALL))


def stand_in(folder: Path) -> None:
    """What a reader has who follows the README: the demo's artifact, the files it shows, a BERT and sentences."""
    import tokenizers
    import torch
    import transformers

    (folder / "out" / "demo").mkdir(parents=True)
    (folder / "out" / "demo" / "manifest.json").write_text("{}")
    for name, text in documented_files().items():
        (folder / name).write_text(text)
    (folder / "sentences.txt").write_text("a cat sat on the mat\nthe mat\non a cat\n")
    torch.manual_seed(0)
    config: Any = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64
    )
    transformers.BertModel(config).save_pretrained(folder / "my-bert")
    by_word = tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]")
    words: Any = tokenizers.Tokenizer(by_word)
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
    fast.save_pretrained(folder / "my-bert")


@pytest.mark.parametrize("command", documented_commands(), ids=shlex.join)
def test_every_command_is_one_that_the_command_line_takes(command: list[str]) -> None:
    assert command[0] == "enginewright"
    chosen = parser().read(command[1:])
    if chosen.command in ("export", "plan"):
        recipe = recipe_from(chosen, getattr(chosen, "model", None) or chosen.subject)
        assert len(recipe.steps) == len(chosen.steps)
        assert len(recipe.targets) == len(chosen.targets)
    for bound in getattr(chosen, "gate", ()):
        assert any(name in bound for name in gate_names())


def test_folders_do_not_collide_and_are_there_when_they_are_named() -> None:
    made = {"out/demo"}
    for command in documented_commands():
        chosen = parser().read(command[1:])
        for name in ("subject", "candidate", "artifact", "recipe", "original"):
            named = str(getattr(chosen, name, ""))
            if named.startswith("out/"):
                assert named.removesuffix("/recipe.toml") in made, f"{shlex.join(command)}: not there yet"
        if chosen.command in ("export", "run"):
            out = str(chosen.output)
            assert not any(Path(out) == Path(old) or Path(old).is_relative_to(out) for old in made), out
            made.add(out)


def test_the_first_command_for_a_model_of_ones_own_is_of_transformers() -> None:
    first = documented_commands()[0]
    assert first[1] == "export"
    assert first[2].startswith("hf:")
    assert TEXT.index("hf:") < TEXT.index("## ")


def test_links_lead_somewhere() -> None:
    heads = {
        re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in re.findall(r"^#+ (.*)$", TEXT, re.MULTILINE)
    }
    for text, link in re.findall(r"\[([^\]]*)\]\(([^)]+)\)", TEXT):
        if link.startswith("#"):
            assert link[1:] in heads, text
        else:
            assert (ROOT / link).exists(), link


def test_exit_codes_are_those_of_the_help() -> None:
    codes = re.findall(r"^  (\d+) ", EXIT_CODES, re.MULTILINE)
    assert codes == ["0", "1", "2", "3", "70"]
    listed = re.findall(r"^\| (\d+) \|", TEXT, re.MULTILINE)
    assert [code for code in listed if code in codes] == codes


def test_passes_and_extras_that_it_names_exist() -> None:
    import tomllib

    passes = catalog.entries("passes")
    named = {
        name.partition(":")[0] for name in re.findall(r"`([a-z]+(?:_[a-z0-9]+)+(?::[^`]*)?)`", TEXT) if name[0] != "_"
    }
    others = {*catalog.entries("targets"), *catalog.entries("models"), *catalog.entries("metrics")}
    others |= {*enginewright.__all__, "from_pretrained", "save_pretrained"}
    assert named - others <= set(passes), named - others - set(passes)
    assert [name for name in passes if f"`{name}" not in TEXT] == []
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for group in re.findall(r"enginewright\[([\w,-]+)\]|\.\[([\w,-]+)\]", TEXT):
        assert set("".join(group).split(",")) <= set(extras)
