"""The command line: arguments here, work in ``commands``; nothing heavy is imported before arguments are checked."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

from enginewright import __version__
from enginewright.asking import LARGEST_SEED, Parser, dtype, listed, size, whole
from enginewright.catalog import KINDS
from enginewright.failing import check_text, ended
from enginewright.ground.errors import DONE, WRONG_USE

EXIT_CODES = """exit codes:
  0   done, and all gates met
  1   a gate was missed, an engine is faulty, or a figure regressed
  2   wrong use or bad input
  3   this machine could not build or measure something that was asked for
  70  a fault in enginewright itself
"""
MODEL_HELP = """where the model comes from: hf:FOLDER or hf:OWNER/NAME (transformers), diffusers:FOLDER,
py:FILE.py:FUNCTION, pt2:FILE.pt2, onnx:FILE.onnx, or a reference model such as dit:digits (see: list sources, list
models)"""

EXAMPLES = {
    "": (
        (
            "enginewright export hf:./my-bert --pass quantize_int8 --target onnxruntime -o out",
            "a checkpoint, in 8 bits",
        ),
        ("enginewright run dit-digits-int8 -o demo", "the demo that ships"),
    ),
    "list": (("enginewright list passes", "every pass, with one line about each"),),
    "show": (
        ("enginewright show quantize_int8", "parameters of a pass"),
        ("enginewright show hf:./my-bert", "inputs, outputs and size of a model"),
        ("enginewright show fidelity.cosine", "what a gate bounds"),
    ),
    "export": (
        (
            "enginewright export hf:./my-bert --pass quantize_int8 --calibration sentences.txt "
            "--target onnxruntime -o out",
            "a checkpoint of transformers in 8 bits, calibrated on sentences of yours",
        ),
        (
            "enginewright export py:net.py:build --pass prune_width:share=0.25 "
            "--pass quantize_int8:observer=mse,smooth=0.5 --target onnxruntime --gate 'fidelity.cosine >= 0.99' -o out",
            "two passes in this order, one bound",
        ),
    ),
    "run": (
        ("enginewright run out/recipe.toml -o again", "the same once more"),
        ("enginewright run dit-digits-int8 -o demo", "a recipe that ships (see: list recipes)"),
    ),
    "plan": (("enginewright plan hf:./my-bert --pass quantize_int8", "which layers would change, and which not"),),
    "bench": (
        ("enginewright bench out --size batch=8 --rounds 50", "an artifact's engines and their original"),
        ("enginewright bench out --against other", "two artifacts in turns"),
    ),
    "compare": (
        ("enginewright compare hf:./my-bert out --gate 'fidelity.cosine >= 0.99'", "an artifact with its model"),
        ("enginewright compare out#onnxruntime out#pytorch", "two engines of one artifact"),
    ),
    "check": (
        ("enginewright check out --baseline baseline.json --update", "keep today's figures"),
        (
            "enginewright check out --baseline baseline.json --junit check.xml",
            "hold a new artifact against them, in CI",
        ),
    ),
    "report": (("enginewright report out", "after an update of enginewright"),),
    "doctor": (("enginewright doctor", "before anything else"),),
}
"""What to type, by command; every one of them is parsed in the tests."""


def ending(command: str) -> str:
    """The end of a help text: examples and exit codes."""
    return f"examples:\n{listed(EXAMPLES[command])}\n\n{EXIT_CODES}"


def parser() -> Parser:
    """Every command and option."""
    root = Parser(
        prog="enginewright",
        description="Take a trained PyTorch network to validated production engines.",
        epilog=ending(""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    root.add_argument("--version", action="version", version=f"enginewright {__version__}")
    common = Parser(add_help=False)
    common.add_argument("--json", action="store_true", help="machine-readable answer on standard output")
    common.add_argument("--quiet", action="store_true", help="no progress")
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, summary: str) -> Parser:
        return commands.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            epilog=ending(name),
            parents=[common],
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    one = command("list", "what there is: models, sources, passes, targets, metrics, recipes")
    one.add_argument("kind", nargs="?", choices=KINDS, help=f"{', '.join(KINDS)}; left out: all of them")

    one = command("show", "one entry: what it does, parameters with defaults and ranges, source, published figures")
    one.add_argument("name", help="a name from any list, a gate, or a model: dit:XL/2, hf:FOLDER, …")
    one.add_argument("--trust-remote-code", action="store_true", help="run code that a checkpoint brings along")

    one = command("export", "take a model through passes to engines, validate them, and write an artifact folder")
    one.add_argument("model", help=MODEL_HELP)
    recipe_options(one)
    validation_options(one)
    trust_option(one)
    output_options(one)
    one.add_argument("--no-validate", action="store_true", help="build only: measure nothing")

    one = command("run", "do what a recipe says; export writes the recipe it ran")
    one.add_argument(
        "recipe", help="a TOML file, or the name of a recipe that ships (see: list recipes); code that it names is run"
    )
    trust_option(one)
    output_options(one)

    one = command("plan", "decide and estimate, change nothing")
    one.add_argument(
        "subject", metavar="MODEL", help=f"a recipe file (code that it names is run), or a model; {MODEL_HELP}"
    )
    recipe_options(one)
    trust_option(one)

    one = command("bench", "paired latency of engines and their original")
    one.add_argument("subject", help="an artifact folder, or a model")
    one.add_argument("--against", action="append", default=[], metavar="SUBJECT", help="time these in turns with it")
    one.add_argument(
        "--rounds", type=whole(3), default=30, metavar="N", help="timed calls (samples) of each runner; default: 30"
    )
    one.add_argument("--threads", type=whole(1), metavar="N", help="CPU threads; default: every core allowed")
    size_option(one)
    source_option(one)
    trust_option(one)

    one = command("compare", "fidelity of two artifacts, engines or models on the same inputs")
    one.add_argument("original", help="artifact folder (FOLDER#TARGET for one engine), model, or .onnx file")
    one.add_argument("candidate", help="the same; compared with the first")
    one.add_argument(
        "--calls",
        type=whole(1),
        metavar="N",
        help="calls to compare on; default: as the artifact was validated, else 8",
    )
    one.add_argument("--gate", action="append", default=[], metavar="BOUND", help="such as 'fidelity.cosine >= 0.999'")
    source_option(one)
    trust_option(one)

    one = command("check", "regression gate: an artifact's figures against a baseline file")
    one.add_argument("artifact", type=Path, help="artifact folder")
    one.add_argument("--baseline", type=Path, required=True, help="JSON file of figures and tolerances")
    one.add_argument("--update", action="store_true", help="write the baseline from this artifact, on purpose")
    one.add_argument("--junit", type=Path, help="also write the outcome as JUnit XML")
    one.add_argument(
        "--figure",
        action="append",
        default=[],
        metavar="NAME=NUMBER",
        help="a figure of your own to hold too, such as accuracy=0.913; 'wer=0.12,lower' where less is better",
    )

    one = command("report", "render report.html, report.md and junit.xml again from report.json")
    one.add_argument("artifact", type=Path, help="artifact folder")

    command("doctor", "what this machine can build and run, and why not")
    return root


def recipe_options(one: argparse.ArgumentParser) -> None:
    """Options that make up a recipe."""
    one.add_argument(
        "--pass",
        dest="steps",
        action="append",
        default=[],
        metavar="NAME[:key=value,…]",
        help="a pass and its settings, such as quantize_int8:observer=mse; again for the next (see: list passes)",
    )
    one.add_argument(
        "--target",
        dest="targets",
        action="append",
        default=[],
        metavar="NAME[:key=value,…]",
        help="an engine to build, such as onnxruntime, or tensorrt:optional=true where it may be missing; again for "
        "another (see: list targets)",
    )
    one.add_argument(
        "--gate",
        dest="gates",
        action="append",
        default=[],
        metavar="BOUND",
        help="a bound that must hold, such as 'fidelity.cosine >= 0.99', or for one target "
        "'onnxruntime: latency.ratio <= 0.8' (see: list metrics)",
    )
    one.add_argument(
        "--weights",
        action="append",
        default=[],
        metavar="FILE|copy|link",
        help="safetensors file for a reference model, not shipped or random weights; or what becomes of weights "
        "that are on disk: copy or link them into the artifact; default: copy up to 2 GB",
    )
    one.add_argument("--trust-remote-code", action="store_true", help="run code that a checkpoint brings along")
    one.add_argument(
        "--dtype", type=dtype, metavar="TYPE", help="compute in fp32, fp16 or bf16; default: as the weights are"
    )
    one.add_argument("--embed-weights", action="store_true", help="write all weights anew, in the type computed in")
    one.add_argument(
        "--calibration",
        metavar="FILE",
        help="inputs that passes look at: safetensors with an array per input, or .txt with a sentence a line; "
        "default: made from the model",
    )
    one.add_argument(
        "--calibration-calls", type=whole(1), metavar="N", help="calls of the model to calibrate on; default: 16"
    )
    one.add_argument(
        "--seed", type=whole(0, LARGEST_SEED), default=0, metavar="N", help="of every random choice; default: 0"
    )


def validation_options(one: argparse.ArgumentParser) -> None:
    """How engines are compared with the original, and timed."""
    one.add_argument("--calls", type=whole(1), metavar="N", help="calls that outputs are compared on; default: 8")
    one.add_argument(
        "--samples", type=whole(1), metavar="N", help="samples of whole sampling runs; default: the task's"
    )
    one.add_argument("--rounds", type=whole(3), metavar="N", help="timed calls of each engine; default: 30")
    one.add_argument("--threads", type=whole(1), metavar="N", help="CPU threads; default: every core allowed")
    one.add_argument(
        "--job",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="of a pipeline's whole job: steps=8, prompts=['a red bicycle'], skip=true; or an argument of its call, "
        "such as height=256",
    )
    size_option(one)


def size_option(one: argparse.ArgumentParser) -> None:
    """Sizes to time at."""
    one.add_argument(
        "--size",
        type=size,
        action="append",
        default=[],
        metavar="NAME=N",
        help="size of a dynamic dimension to time at, such as batch=8 (see: show MODEL); default: typical sizes",
    )


def source_option(one: argparse.ArgumentParser) -> None:
    """Where the source of an artifact is."""
    one.add_argument(
        "--source",
        action="append",
        type=Path,
        default=[],
        metavar="PATH",
        help="where the file or folder that an artifact was made from is now, if it was moved; must be the same",
    )


def trust_option(one: argparse.ArgumentParser) -> None:
    """Whether artifacts may run code."""
    one.add_argument(
        "--trust-code",
        action="store_true",
        help="run the Python code that an artifact's model is made by (a py: file, a checkpoint's own code), and its "
        "engines that are native code (aot_inductor)",
    )


def output_options(one: argparse.ArgumentParser) -> None:
    """Where the artifact goes, and how the outcome is told."""
    one.add_argument("-o", "--output", type=Path, default=Path("out"), metavar="DIR", help="default: out")
    one.add_argument(
        "--force", action="store_true", help="replace an artifact that is there, once the new one is whole"
    )
    one.add_argument("--markdown", action="store_true", help="tell the outcome in Markdown, for a pull request")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code, for every way that it may end."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    as_json = "--json" in given
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal without our marks is no reason to fail
    try:
        if not given:
            parser().print_help()
            return WRONG_USE
        check_text(given)
        chosen = parser().read(given)
        from enginewright import commands

        chosen.answers = sys.stdout
        # What a user's file or a library prints does not belong into a JSON document.
        with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
            return int(getattr(commands, f"{chosen.command}_command")(chosen))
    except KeyboardInterrupt:
        print("interrupted; nothing was left behind", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return DONE
    except Exception as error:  # whatever it is, it ends in a code and in words of its own
        return ended(error, as_json=as_json)
