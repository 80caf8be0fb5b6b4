"""What the command line says before it loads anything: help, values out of range, and slips."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from enginewright import cli
from enginewright.arguments import check_names, named, recipe_from
from enginewright.asking import Parser
from enginewright.ground.errors import ToolchainError

Out = pytest.CaptureFixture[str]


def test_alone_it_prints_its_help(capsys: Out) -> None:
    assert cli.main([]) == 2
    assert "examples:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["exprot", "dit"], "did you mean 'export'"),
        (["list", "pases"], "did you mean 'passes'"),
        (["export", "dit", "--pas", "x", "--tagret", "y"], "did you mean '--target'"),
        (["export", "dit", "extra"], "'extra' is one argument too many"),
        (["export"], "the following arguments are required: model"),
        (["bench", "out", "--rounds", "0"], "0 is out of range; it must be 3 or more"),
        (["bench", "out", "--rounds", "1"], "1 is out of range; it must be 3 or more"),
        (["bench", "out", "--rounds", "many"], "'many' is no whole number"),
        (["bench", "out", "--threads", "-1"], "-1 is out of range; it must be 1 or more"),
        (["bench", "out", "--size", "batch=²"], "'batch=²' is not NAME=N"),
        (["bench", "out", "--size", "batch"], "'batch' is not NAME=N"),
        (["bench", "out", "--size", "batch=" + "9" * 5000], "is not NAME=N"),
        (["export", "dit", "--seed", str(2**70)], "it must be from 0 to 9223372036854775807"),
        (["export", "dit", "--seed", "9" * 5000], "is no whole number"),
        (["export", "dit", "--seed", "²"], "'²' is no whole number"),
        (["export", "dit", "--dtype", "fp8"], "there is no dtype 'fp8'"),
        (["compare", "a", "b", "--calls", "0"], "0 is out of range; it must be 1 or more"),
        (["export", "a\0b"], "NUL character"),
        (["export", "dit:tiny", "--pass", "quantize_int8:observr=mse"], "did you mean 'observer'"),
        (["export", "dit:tiny", "--pass", "quantize_int8:observer=mes"], "did you mean 'mse'"),
        (["export", "dit:tiny", "--pass", "int8"], "did you mean 'quantize_graph_int8' or 'quantize_int8'"),
        (["export", "dit:tiny", "--target", "onnxruntime:providr=cpu"], "did you mean 'provider'"),
        (["export", "dit:tiny", "--gate", "latency < 0.8"], "did you mean 'latency.ratio'"),
        (["show", "int8"], "'quantize_int8'"),
        (["run", "."], "'.' is a folder, and a recipe is a TOML file"),
        (["run", "hf:there"], "write: enginewright export hf:there"),
    ],
)
def test_a_slip_ends_in_2_with_a_way_out(arguments: list[str], said: str, capsys: Out) -> None:
    assert cli.main([*arguments, "--json"]) == 2
    told = capsys.readouterr()
    assert said in told.err
    assert "Traceback" not in told.err
    assert len(told.err) < 2500
    faults = json.loads(told.out)["errors"]
    assert any(said in str(fault["message"]) + str(fault["help"]) for fault in faults)


@pytest.mark.parametrize(
    ("step", "said", "tip"),
    [
        ({"pass": "prune_depth", "method": "list", "blocks": "model.layers.0"}, "must be a list", "['model.layers.0']"),
        ({"pass": "prune_heads", "share": "half"}, "must be a number", ""),
        ({"pass": "prune_heads", "share": 1.5}, "must be less than 1", ""),
        ({"pass": "distill", "steps": 2.5}, "must be a whole number", ""),
        ({"pass": "quantize_int8", "exclude": 3}, "must be a list", ""),
        ({"pass": "distill", "autocast": "perhaps"}, "must be true or false", ""),
        ({"pass": "distill", "teachers": [3]}, "must be a table", ""),
    ],
)
def test_settings_are_refused_in_plain_words(step: dict[str, object], said: str, tip: str) -> None:
    from enginewright.recipe import make

    with pytest.raises(ToolchainError) as caught:
        make({"model": "dit:tiny", "steps": [step]})
    assert said in str(caught.value)
    assert tip in str(caught.value)
    assert "Input should" not in str(caught.value)
    assert "valid" not in str(caught.value)


def test_nested_tables_of_a_recipe_are_known_by_name() -> None:
    from enginewright.recipe import make

    with pytest.raises(ToolchainError, match="did you mean 'rounds'"):
        make({"model": "dit:tiny", "validation": {"ronds": 5}})
    with pytest.raises(ToolchainError, match="did you mean 'schema'"):
        make({"model": "dit:tiny", "shema": 1})


@pytest.mark.parametrize("command", [name for name in cli.EXAMPLES if name])
def test_every_example_of_a_help_text_is_one_that_works(command: str, capsys: Out) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([command, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "examples:" in text
    for line, _ in cli.EXAMPLES[command]:
        assert line in text
        chosen = cli.parser().read(shlex.split(line)[1:])
        if command in ("export", "plan"):
            check_names(
                {
                    "model": getattr(chosen, "model", None) or chosen.subject,
                    "steps": [named("pass", step) for step in chosen.steps],
                    "targets": [named("target", target) for target in chosen.targets],
                }
            )


def test_every_option_says_what_it_takes_and_what_it_is_by_default() -> None:
    for name, one in cli.parser().commands().items():
        for action in one._actions:
            assert action.help, f"{name} {action.option_strings or action.dest}"
    options = {name: action for action in commands("export")._actions for name in action.option_strings}
    for name in ("--rounds", "--calls", "--seed", "--threads", "--size", "--calibration", "--dtype", "--output"):
        assert "default" in str(options[name].help), name


def commands(name: str) -> Parser:
    return cli.parser().commands()[name]


def test_what_a_recipe_says_can_be_said_on_the_command_line() -> None:
    line = "export dit:tiny --rounds 5 --calls 2 --samples 50 --threads 1 --size batch=4 --size width=8 --dtype BF16"
    recipe = recipe_from(cli.parser().read([*line.split(), "--calibration-calls", "3"]))
    settings = recipe.head.validation
    assert (settings.rounds, settings.calls, settings.samples, settings.threads) == (5, 2, 50, 1)
    assert settings.batch == {"batch": 4, "width": 8}
    assert recipe.head.export.dtype == "bfloat16"
    assert recipe.head.calibration.calls == 3


def test_short_names_of_types_stand_in_recipes_too() -> None:
    from enginewright.recipe import make

    assert make({"model": "dit:tiny", "export": {"dtype": "fp16"}}).head.export.dtype == "float16"
    with pytest.raises(ToolchainError, match="it is one of float32, float16, bfloat16"):
        make({"model": "dit:tiny", "export": {"dtype": "fp8"}})


def test_passes_that_exclude_each_other_are_not_sent_in_a_circle() -> None:
    from enginewright.recipe import make

    steps = [{"pass": "quantize_int8"}, {"pass": "search_precision"}]
    for order in (steps, steps[::-1]):
        with pytest.raises(ToolchainError, match="exclude each other"):
            make({"model": "dit:tiny", "steps": order})


def test_lists_hold_sources_and_what_gates_want(capsys: Out) -> None:
    from enginewright.recipe import gate_names

    assert cli.main(["list", "metrics", "--json"]) == 0
    assert [entry["name"] for entry in json.loads(capsys.readouterr().out)] == gate_names()
    assert cli.main(["list", "sources"]) == 0
    assert {"hf", "py", "onnx"} <= {line.split()[0] for line in capsys.readouterr().out.splitlines()}
    assert cli.main(["list", "--json"]) == 0
    kinds = {entry["kind"] for entry in json.loads(capsys.readouterr().out)}
    assert kinds == {"models", "pipelines", "methods", "sources", "passes", "targets", "metrics", "recipes"}


@pytest.mark.parametrize("name", ["latency.ratio", "latency.ratio_high", "fidelity.cosine", "cosine", "hf"])
def test_what_lists_name_can_be_shown(name: str, capsys: Out) -> None:
    assert cli.main(["show", name, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == name
    assert cli.main(["show", name]) == 0


def test_what_a_users_file_prints_stays_out_of_the_answer(tmp_path: Path, capsys: Out) -> None:
    (tmp_path / "net.py").write_text(
        "import torch\nprint('hello from the file')\n"
        "def build():\n    return torch.nn.Linear(2, 2), (torch.zeros(1, 2),)\n"
    )
    assert cli.main(["show", f"py:{tmp_path / 'net.py'}:build", "--json"]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["parameter_count"] == 6
    assert "hello" in told.err


def test_every_answer_is_one_document(artifact: Path, tmp_path: Path, capsys: Out) -> None:
    baseline = tmp_path / "new" / "baseline.json"
    for line in (
        f"check {artifact} --baseline {baseline} --update",
        f"check {artifact} --baseline {baseline} --junit {tmp_path}/other/check.xml",
        "plan dit:tiny --pass prune_heads",
        "doctor",
    ):
        assert cli.main([*line.split(), "--json", "--quiet"]) == 0
        json.loads(capsys.readouterr().out)
    assert (tmp_path / "other" / "check.xml").is_file()


def test_a_baseline_that_is_not_there_and_a_folder_for_a_file_are_noticed(
    artifact: Path, tmp_path: Path, capsys: Out, monkeypatch: pytest.MonkeyPatch
) -> None:
    from enginewright import artifact as artifacts

    def too_late(folder: Path) -> Callable[[], None]:
        raise AssertionError("work began")

    monkeypatch.setattr(artifacts, "read_manifest", too_late)
    assert cli.main(["check", str(artifact), "--baseline", str(tmp_path / "gone.json")]) == 2
    assert "gone.json" in capsys.readouterr().err
    assert cli.main(["check", str(artifact), "--baseline", "b.json", "--junit", str(tmp_path)]) == 2
    assert "is a folder, and a file is wanted" in capsys.readouterr().err
