"""One target twice in a recipe: every command and every page tells the two engines apart."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from enginewright import pipeline
from enginewright.cli import main
from enginewright.progress import Progress
from enginewright.recipe import make
from enginewright.reports import html, junit, markdown, record, terminal

NAMES = ["static_form", "dynamic_form"]
NET = """
import torch
from torch import nn
from enginewright import ModelSpec

def build():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    return ModelSpec(module=net, inputs={"input": torch.zeros(3, 64)}, ranges={"input": (-1, 1)}, outputs=["output"])
"""


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two 8-bit forms of a small network in ONNX Runtime."""
    folder = tmp_path_factory.mktemp("twice")
    (folder / "net.py").write_text(NET)
    content = {
        "model": "py:net.py:build",
        "gates": [f"{NAMES[0]}: fidelity.cosine >= 0.9", f"{NAMES[1]}: fidelity.cosine >= 1.5"],
        "steps": [{"pass": "quantize_int8", "smallest": 0}],
        "targets": [
            {"target": "onnxruntime", "name": name, "int8": form}
            for name, form in zip(NAMES, ("static", "dynamic"), strict=True)
        ],
        "validation": {"rounds": 30, "calls": 2},
    }
    recipe = make(content, folder=folder)
    pipeline.export(recipe, folder / "out", force=False, progress=Progress(quiet=True))
    return folder / "out"


@pytest.fixture(scope="module")
def report(out: Path) -> record.Report:
    return record.read(out / "report.json")


def test_each_has_its_own_engine_figures_and_gate(out: Path, report: record.Report) -> None:
    assert [(target.name, target.kind, target.parameters["int8"]) for target in report.targets] == [
        ("static_form", "onnxruntime", "static"),
        ("dynamic_form", "onnxruntime", "dynamic"),
    ]
    assert [(gate.target, gate.verdict) for gate in report.gates] == [
        ("static_form", "met"),
        ("dynamic_form", "missed"),
    ]
    errors = [target.fidelity[0].relative_l2 for target in report.targets]
    assert errors[0] != errors[1]
    files = [set(target.files) for target in report.targets]
    assert not files[0] & files[1]


def test_bench_times_each_under_its_name(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--rounds", "3", "--trust-code", "--json", "--quiet"]
    assert main(["bench", str(out), *arguments]) == 0
    assert list(json.loads(capsys.readouterr().out)["runners"]) == NAMES
    assert main(["bench", f"{out}#dynamic_form", *arguments]) == 0
    assert list(json.loads(capsys.readouterr().out)["runners"]) == ["dynamic_form"]


def test_compare_tells_one_from_the_other(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gate = ["--gate", "static_form: fidelity.cosine >= 0.9", "--json", "--quiet"]
    assert main(["compare", f"{out}#dynamic_form", f"{out}#static_form", "--trust-code", *gate]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["original"], [each["name"] for each in found["runners"]]) == ("dynamic_form", ["static_form"])
    assert found["runners"][0]["fidelity"][0]["relative_l2"] > 0
    assert main(["compare", f"{out}#static_form", str(out), "--trust-code", "--json", "--quiet"]) == 0
    both = {each["name"]: each["fidelity"][0]["relative_l2"] for each in json.loads(capsys.readouterr().out)["runners"]}
    assert both["static_form"] == 0 < both["dynamic_form"]


def test_check_holds_each_against_its_own_figures(
    out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    baseline = tmp_path / "baseline.json"
    assert main(["check", str(out), "--baseline", str(baseline), "--update"]) == 0
    content = json.loads(baseline.read_text())
    key = "dynamic_form/fidelity.relative_l2/output"
    assert key in content["figures"]
    assert key.replace("dynamic", "static") in content["figures"]
    content["figures"][key]["value"] = 1e-9
    content["figures"][key]["tolerance"] = {"absolute": 1e-9}
    baseline.write_text(json.dumps(content))
    capsys.readouterr()
    assert main(["check", str(out), "--baseline", str(baseline)]) == 1
    table = capsys.readouterr().out
    (line,) = [line for line in table.splitlines() if "regressed" in line and "/" in line]
    assert key in line


def test_every_page_names_both(out: Path, report: record.Report) -> None:
    page = re.sub(r"<[^>]*>", " ", html.render(report))
    lines = " ".join(block.text for block in terminal.blocks(report) if isinstance(block, terminal.Line))
    pages = [
        page,
        markdown.render(report).replace("\\", ""),
        junit.render(report),
        lines,
        (out / "README.md").read_text(),
    ]
    for text in pages:
        for name in NAMES:
            assert name in text
    assert re.search(r"dynamic_form\s+\(onnxruntime\)", page)
    sections = dict(re.findall(r"## (\w+_form)\n(.*?)(?=\n## |\Z)", pages[-1], re.DOTALL))
    for target in report.targets:
        listed = set(re.findall(r"\| `(.*?)` \|", sections[target.name]))
        assert listed == set(target.files)
