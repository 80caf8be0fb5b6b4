"""The command line: arguments here, work in ``commands``; nothing heavy is imported before arguments are checked."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from toolchain import __version__
from toolchain.catalog import KINDS
from toolchain.errors import DONE, FaultsError, ToolchainError

EXIT_CODES = """exit codes:
  0  done, and all gates met
  1  a gate was missed, an engine is faulty, or a figure regressed
  2  wrong use or bad input
  3  this machine could not build or measure something that was asked for
"""
MODEL_HELP = "a model, such as dit:digits (see: enginewright list models)"


def parser() -> argparse.ArgumentParser:
    """Every command and option."""
    root = argparse.ArgumentParser(
        prog="enginewright",
        description="Take a trained PyTorch network to validated production engines.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    root.add_argument("--version", action="version", version=f"enginewright {__version__}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="machine-readable answer on standard output")
    common.add_argument("--quiet", action="store_true", help="no progress")
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, summary: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            epilog=EXIT_CODES,
            parents=[common],
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    one = command("list", "what there is: models, passes, targets, metrics, recipes")
    one.add_argument("kind", choices=KINDS)

    one = command("show", "one entry: what it does, parameters with defaults and ranges, source, published figures")
    one.add_argument("name", help="a name from any list, or a model: dit:XL/2, hf:FOLDER, onnx:FILE.onnx, …")
    one.add_argument("--trust-remote-code", action="store_true", help="run code that a checkpoint brings along")

    one = command("export", "take a model through passes to engines, validate them, and write an artifact folder")
    one.add_argument("model", help=MODEL_HELP)
    recipe_options(one)
    trust_option(one)
    output_options(one)
    one.add_argument("--no-validate", action="store_true", help="build only")

    one = command("run", "do what a recipe says; export writes the recipe it ran")
    one.add_argument("recipe", help="a TOML file, or the name of a recipe that ships; code that it names is run")
    trust_option(one)
    output_options(one)

    one = command("plan", "decide and estimate, change nothing")
    one.add_argument("subject", help="a model or a recipe file; code that it names is run")
    recipe_options(one)
    trust_option(one)

    one = command("bench", "paired latency of engines and their original")
    one.add_argument("subject", help="an artifact folder, or a model")
    one.add_argument("--against", action="append", default=[], metavar="SUBJECT", help="time these in turns with it")
    one.add_argument("--rounds", type=int, default=30, help="timed calls (samples) of each runner")
    one.add_argument("--threads", type=int, help="CPU threads; default: every core allowed")
    one.add_argument("--size", action="append", default=[], metavar="NAME=N", help="size of a dynamic dimension")
    source_option(one)
    trust_option(one)

    one = command("compare", "fidelity of two artifacts, engines or models on the same inputs")
    one.add_argument("original", help="artifact folder (FOLDER#TARGET for one engine), model, or .onnx file")
    one.add_argument("candidate", help="the same; compared with the first")
    one.add_argument("--calls", type=int, help="calls to compare on; default: as the artifact was validated, else 8")
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
    one.add_argument("--pass", dest="steps", action="append", default=[], metavar="NAME[:key=value,…]")
    one.add_argument("--target", dest="targets", action="append", default=[], metavar="NAME[:key=value,…]")
    one.add_argument(
        "--gate", dest="gates", action="append", default=[], metavar="BOUND", help="'latency.ratio <= 0.8'"
    )
    one.add_argument(
        "--weights",
        action="append",
        default=[],
        metavar="FILE|copy|link",
        help="safetensors file, in place of shipped or random weights; or what becomes of weights that are on disk: "
        "copy or link them into the artifact (default: copy up to 2 GB)",
    )
    one.add_argument("--trust-remote-code", action="store_true", help="run code that a checkpoint brings along")
    one.add_argument("--dtype", help="compute in float32, float16 or bfloat16; default: as the weights are")
    one.add_argument("--embed-weights", action="store_true", help="write all weights anew, in the type computed in")
    one.add_argument("--calibration", help="safetensors file with an array per input, or .txt with a sentence a line")
    one.add_argument("--seed", type=int, default=0)


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
        help="run the Python code that an artifact's model is made by (a py: file, a checkpoint's own code)",
    )


def output_options(one: argparse.ArgumentParser) -> None:
    """Where the artifact goes."""
    one.add_argument("-o", "--output", type=Path, default=Path("out"), metavar="DIR", help="default: out")
    one.add_argument(
        "--force", action="store_true", help="replace an artifact that is there, once the new one is whole"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    chosen = parser().parse_args(arguments)
    try:
        from toolchain import commands

        return int(getattr(commands, f"{chosen.command}_command")(chosen))
    except ToolchainError as error:
        if chosen.json:
            faults = error.faults if isinstance(error, FaultsError) else (error,)
            told = [{"message": f.message, "where": f.where, "help": f.help} for f in faults]
            print(json.dumps({"errors": told}, indent=2))
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; nothing was left behind", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return DONE
