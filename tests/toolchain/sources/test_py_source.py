"""A user's own file: what it may return, what it may import, and what is said when something is wrong."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

import enginewright
from enginewright import pipeline, sources
from enginewright.ground.errors import ToolchainError
from enginewright.ground.signature import Dim
from enginewright.opened import open_subject
from enginewright.progress import Progress
from enginewright.recipe import make
from enginewright.sources.contract import Model
from enginewright.targets.onnx_export import export_onnx
from enginewright.validation.fidelity import compare
from enginewright.validation.inputs import draw
from tests.conftest import ROOT

MLP = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.drop = nn.Linear(32, 64), nn.Linear(64, 32), nn.Dropout(0.5)

    def forward(self, x, scale=None):
        y = self.b(self.drop(torch.relu(self.a(x))))
        return y if scale is None else y * scale
"""
PLAIN = MLP + "\ndef build():\n    return Net(), {'x': torch.randn(4, 32)}\n"


def load(folder: Path, text: str, name: str = "build", seed: int = 0) -> Model:
    (folder / "net.py").write_text(text)
    return sources.load(f"py:{folder / 'net.py'}:{name}", seed=seed)


def fault(folder: Path, text: str, name: str = "build") -> str:
    with pytest.raises(ToolchainError) as caught:
        load(folder, text, name)
    return str(caught.value)


def returning(what: str) -> str:
    return MLP + f"\ndef build():\n    return {what}\n"


def test_without_a_spec_the_batch_is_dynamic_and_all_else_fixed(tmp_path: Path) -> None:
    model = load(tmp_path, returning("Net(), {'x': torch.randn(4, 32), 'scale': torch.ones(4, 1)}"))
    batch = Dim(name="batch", low=1, typical=4, high=64)
    assert [spec.shape for spec in model.inputs] == [(batch, 32), (batch, 1)]
    assert model.outputs == ("output",)
    assert not model.module.training
    assert model.name == "py:net.py:build"
    unequal = load(tmp_path, returning("Net(), {'x': torch.randn(4, 32), 'scale': torch.ones(1, 1)}"))
    assert [spec.shape for spec in unequal.inputs] == [(4, 32), (1, 1)]


def test_a_tuple_of_examples_follows_the_order_of_forward(tmp_path: Path) -> None:
    model = load(tmp_path, returning("Net(), (torch.randn(4, 32), torch.ones(4, 1))"))
    assert [spec.name for spec in model.inputs] == ["x", "scale"]


def test_integers_stay_within_the_example_and_keep_their_type(tmp_path: Path) -> None:
    text = """
import torch
def build():
    return torch.nn.Embedding(7, 3), {"input": torch.tensor([[2, 5], [0, 1]], dtype=torch.int32)}
"""
    model = load(tmp_path, text)
    drawn = np.concatenate([draw(model.inputs, seed=seed)["input"].ravel() for seed in range(50)])
    assert drawn.dtype == np.int32
    assert set(drawn.tolist()) == {0, 1, 2, 3, 4, 5}


def test_the_seed_decides_random_weights(tmp_path: Path) -> None:
    a, b, c = (load(tmp_path, PLAIN, seed=seed).module.a.weight for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


SPEC = """
def realistic(count, seed):
    g = torch.Generator().manual_seed(seed)
    return [{"x": torch.rand(2, 6, 32, generator=g) + 5} for _ in range(count)]

FIELDS = dict(
    module=Net(), inputs={"x": torch.randn(3, 6, 32)}, dynamic={"x": {1: ("tokens", 2, 9)}}, outputs=["y"],
    ranges={"x": (-1, 1)}, realistic=realistic,
)
"""


@pytest.mark.parametrize("form", ["ModelSpec(**FIELDS)", "FIELDS"])
def test_a_spec_says_axes_outputs_ranges_and_realistic_inputs(tmp_path: Path, form: str) -> None:
    text = f"from enginewright import ModelSpec\n{MLP}{SPEC}\ndef build():\n    return {form}\n"
    model = load(tmp_path, text)
    assert model.inputs[0].shape == (3, Dim(name="tokens", low=2, typical=6, high=9), 32)
    assert model.outputs == ("y",)
    assert (model.inputs[0].low, model.inputs[0].high) == (-1, 1)
    with pytest.raises(ToolchainError, match=r"realistic gave 'x' as float32 \(2, 6, 32\)"):  # 2 where 3 is fixed
        model.batches(2, 0)


def test_realistic_inputs_are_the_users(tmp_path: Path) -> None:
    model = load(
        tmp_path, MLP + SPEC + "\ndef build():\n    return {**FIELDS, 'inputs': {'x': torch.ones(2, 6, 32)}}\n"
    )
    first, second = model.batches(2, 0)
    assert first["x"].min() >= 5
    assert not np.array_equal(first["x"], second["x"])


def test_neighbours_are_found_relatively_and_nothing_else_moves(tmp_path: Path) -> None:
    (tmp_path / "helper.py").write_text("from .deeper import WIDTH\n")
    (tmp_path / "deeper.py").write_text(
        "from dataclasses import dataclass\n@dataclass\nclass C:\n    w: 'int' = 32\nWIDTH = C().w\n"
    )
    path_before = list(sys.path)
    text = PLAIN.replace("def build():", "from . import helper\nfrom .helper import WIDTH\ndef build():")
    model = load(tmp_path, text.replace("32)}", "WIDTH)}"))
    assert model.inputs[0].shape[1] == 32
    assert sys.path == path_before
    assert "helper" not in sys.modules


def test_the_private_package_goes_with_the_module(tmp_path: Path) -> None:
    def private() -> set[str]:
        return {name for name in sys.modules if name.startswith("_enginewright_user_")}

    gc.collect()
    before = private()
    model = load(tmp_path, PLAIN)
    assert len(private() - before) == 2
    del model
    gc.collect()
    assert private() <= before
    fault(tmp_path, "1 / 0")
    assert private() <= before


def test_an_import_inside_forward_finds_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "helper.py").write_text("def double(x):\n    return 2 * x\n")
    text = """
import torch
class Net(torch.nn.Module):
    def forward(self, x):
        if x.shape[0] > 4:
            from .helper import double
            return double(x)
        return x
def build():
    return Net(), (torch.ones(2, 3),)
"""
    model = load(tmp_path, text)
    assert model.module(torch.ones(5, 3)).sum() == 30


def test_a_neighbour_imported_absolutely_is_told_apart_from_a_missing_library(tmp_path: Path) -> None:
    (tmp_path / "helper_of_mine.py").write_text("")
    said = fault(tmp_path, "import helper_of_mine\n" + PLAIN)
    assert "write 'from . import helper_of_mine'" in said
    assert "net.py, line 1" in said
    assert "write 'from" not in fault(tmp_path, "import not_there_at_all\n" + PLAIN)


@pytest.mark.parametrize("ours", ["enginewright"])
def test_a_neighbour_with_our_name_is_never_silently_ours(tmp_path: Path, ours: str) -> None:
    (tmp_path / f"{ours}.py").write_text("")
    said = fault(tmp_path, f"import torch\nfrom {ours} import thing\n" + PLAIN)
    assert f"imports {ours!r}" in said
    assert f"write 'from . import {ours}'" in said
    assert "net.py, line 2" in said
    assert load(tmp_path, f"from . import {ours}\n" + PLAIN)


def test_a_neighbour_of_a_neighbour_is_never_silently_ours(tmp_path: Path) -> None:
    (tmp_path / "helper.py").write_text("import enginewright\n")
    (tmp_path / "enginewright").mkdir()
    (tmp_path / "enginewright" / "mine.py").write_text("")
    assert "helper.py imports 'enginewright'" in fault(tmp_path, "from .helper import x\n" + PLAIN)


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python as it is started outside this repository, whose folders are packages too."""
    monkeypatch.setattr(sys, "path", [each for each in sys.path if Path(each or ".").resolve() != ROOT])


@pytest.mark.usefixtures("elsewhere")
def test_folders_that_are_called_as_ours_are_are_the_users_own(tmp_path: Path) -> None:
    for name in ("toolchain", "passes", "targets", "validation", "reports"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("ONE = 1\n")
    assert load(tmp_path, "from .validation import ONE\nfrom . import passes, reports, targets, toolchain\n" + PLAIN)
    assert "write 'from . import validation'" in fault(tmp_path, "import validation\n" + PLAIN)


@pytest.mark.usefixtures("elsewhere")
def test_the_name_that_the_package_had_before_is_told(tmp_path: Path) -> None:
    assert "write 'from enginewright import ModelSpec'" in fault(tmp_path, "from toolchain import ModelSpec\n" + PLAIN)


def test_no_such_file_or_function(tmp_path: Path) -> None:
    with pytest.raises(ToolchainError, match=r"there is no Python file 'gone.py'"):
        sources.load(f"py:{tmp_path / 'gone.py'}:build")
    with pytest.raises(ToolchainError, match=r"'py:net.py' is not py:FILE.py:FUNCTION"):
        sources.load("py:net.py")
    assert "did you mean 'build'?" in fault(tmp_path, PLAIN, name="biuld")


def test_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ToolchainError, match="--weights is for reference models"):
        sources.load("py:net.py:build", weights=tmp_path)


def test_not_python_names_file_and_line(tmp_path: Path) -> None:
    said = fault(tmp_path, "x = 1\ndef build(:\n")
    assert "net.py is not Python: " in said
    assert "net.py, line 2" in said
    (tmp_path / "helper.py").write_text("\n\nx = = 1\n")
    said = fault(tmp_path, "from . import helper\n" + PLAIN)
    assert "helper.py is not Python" in said
    assert "helper.py, line 3" in said


def test_what_the_user_raises_is_placed_at_the_users_last_line(tmp_path: Path) -> None:
    said = fault(
        tmp_path, "import json\n\ndef build():\n    return inner()\n\ndef inner():\n    return json.loads('{')\n"
    )
    assert "build() failed: JSONDecodeError: " in said
    assert f"{tmp_path / 'net.py'}, line 7, in inner" in said
    assert "running net.py failed: SystemExit: 3" in fault(tmp_path, "import sys\nsys.exit(3)\n")


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("None", "the function returned nothing"),
        ("Net()", "the function returned a Net"),
        ("Net(), (torch.ones(1),), 3", "the function returned a tuple of 3"),
        ("(torch.randn(4, 32), Net())", "the module is a Tensor, no torch.nn.Module"),
        ("{'module': Net(), 'input': {}}", "did you mean 'inputs'?"),
        ("{'module': Net()}", "the dict has only ['module']; it needs 'module' and 'inputs'"),
        ("Net(), torch.ones(4, 32)", "the example inputs are a Tensor; they must be a dict or a tuple"),
        ("Net(), {'x': [1, 2]}", "example input 'x' is a list, no tensor"),
        ("Net(), {'x': torch.ones(4, 32, dtype=torch.bfloat16)}", "'x' is torch.bfloat16, which numpy lacks"),
        ("Net(), {'x': torch.ones(4, 32, device='meta')}", "example input 'x' is on meta"),
        ("Net(), {'x': torch.ones(0, 32)}", "example input 'x' is empty, (0, 32)"),
        ("Net(), {}", "do not fit: missing a required argument: 'x'"),
        ("Net(), {'y': torch.ones(4, 32)}", "missing a required argument: 'x'"),
        ("Net(), {'x': torch.ones(4, 32), 'z': torch.ones(1)}", "got an unexpected keyword argument 'z'"),
        ("Net(), (torch.ones(4, 32),) * 3", "forward takes (x, scale=None)"),
        ("Net(), {'x': torch.ones(4, 31)}", "the module's call on its example inputs failed: RuntimeError: mat1"),
        ("dict(module=Net(), inputs={'x': torch.ones(4, 32)}, outputs=['a', 'b'])", "the module returned 1"),
        ("dict(module=Net(), inputs={'x': torch.ones(4, 32)}, ranges={'y': (0, 1)})", "ranges names 'y', which is no"),
        ("dict(module=Net(), inputs={'x': torch.ones(4, 32)}, dynamic={'x': {2: ('a', 1, 2)}})", "shape is (4, 32)"),
        (
            "dict(module=Net(), inputs={'x': torch.ones(4, 32)}, dynamic={'x': {0: 'a'}})",
            "must be (name, smallest, lar",
        ),
        ("dict(module=Net(), inputs={'x': torch.ones(4, 32)}, dynamic={'x': {0: ('a', 5, 9)}})", "the example has 4"),
    ],
)
def test_what_is_wrong_with_what_came_is_said(tmp_path: Path, what: str, said: str) -> None:
    assert said in fault(tmp_path, returning(what))


def test_a_function_that_needs_arguments_is_refused(tmp_path: Path) -> None:
    assert "build needs arguments: width" in fault(tmp_path, "def build(width, depth=2): pass\n")


def test_importing_the_spec_loads_no_torch() -> None:
    assert enginewright.ModelSpec.__module__ == "enginewright.spec"


def test_the_graph_agrees_at_two_batch_sizes(tmp_path: Path) -> None:
    model = load(tmp_path, PLAIN)
    example = {"x": torch.randn(4, 32)}
    export_onnx(
        model.module, example, dynamic={"x": {0: ("batch", 1, 64)}}, outputs=model.outputs, path=tmp_path / "m.onnx"
    )
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    for size in (1, 7):
        x = torch.randn(size, 32)
        with torch.no_grad():
            wanted = model.module(x).numpy()
        np.testing.assert_allclose(session.run(None, {"x": x.numpy()})[0], wanted, atol=1e-4)


def test_a_users_model_goes_all_the_way_and_opens_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "helper.py").write_text("WIDTH = 32\n")
    (tmp_path / "mine" / "net.py").write_text("from .helper import WIDTH\n" + PLAIN)
    content = {
        "model": "py:net.py:build",
        "steps": [{"pass": "quantize_int8"}],
        "targets": [{"target": "onnxruntime"}],
        "validation": {"rounds": 3, "calls": 2},
    }
    out = tmp_path / "elsewhere" / "out"
    pipeline.export(make(content, folder=tmp_path / "mine"), out, force=False, progress=Progress(quiet=True))
    assert 'model = "py:../../mine/net.py:build"' in (out / "recipe.toml").read_text()
    assert str(tmp_path) not in "".join(path.read_text() for path in (out / "recipe.toml", out / "report.json"))

    (tmp_path / "third").mkdir()
    monkeypatch.chdir(tmp_path / "third")
    opened = open_subject("../elsewhere/out", trust_code=True)
    assert opened.original is not None
    engine, calls = opened.runners["onnxruntime"], [draw(opened.inputs, seed=n, sizes={"batch": n}) for n in (2, 7)]
    (found,) = compare([opened.original(call) for call in calls], [engine(call) for call in calls])
    assert 0.99 < found.worst["cosine"] < 1


def test_a_dataclass_answers_by_its_fields_and_what_is_no_tensor_is_left_out(tmp_path: Path) -> None:
    text = """
import dataclasses
import torch
from torch import nn

@dataclasses.dataclass
class Answer:
    states: torch.Tensor
    note: str
    loss: float
    absent: None
    pooled: torch.Tensor

class Net(nn.Module):
    def forward(self, x):
        return Answer(x * 2, "note", 0.5, None, x.mean(1))

def build():
    return Net(), {"x": torch.randn(4, 32)}
"""
    model = load(tmp_path, text)
    assert model.outputs == ("states", "pooled")
    assert model.interface is not None
    assert (model.interface.returns, model.interface.keys) == ("dict", ("states", "pooled"))
    mixed = load(tmp_path, text.replace('Answer(x * 2, "note", 0.5, None, x.mean(1))', "x * 2, None, 0.5"))
    assert mixed.outputs == ("output_0",)


def test_a_cache_in_the_answer_is_named_with_what_to_do(tmp_path: Path) -> None:
    text = """
import torch
from torch import nn

class KeysAndValues:
    pass

class Net(nn.Module):
    def forward(self, x):
        return {"logits": x, "past_key_values": KeysAndValues()}

def build():
    return Net(), {"x": torch.randn(4, 32)}
"""
    said = fault(tmp_path, text)
    assert "the module returned a KeysAndValues, which no engine can give back" in said
    assert "use_cache=False" in said


def test_the_example_is_the_first_call_of_a_validation_and_both_ends_of_integers_are_met(tmp_path: Path) -> None:
    text = """
import torch
from torch import nn

class Net(nn.Module):
    def forward(self, ids, keep):
        return ids * keep

def build():
    return Net(), {"ids": torch.tensor([[3, 4], [5, 9]]), "keep": torch.ones(2, 2, dtype=torch.bool)}
"""
    model = load(tmp_path, text)
    first, second, hidden = model.held_out(2, seed=0)
    assert first["ids"].tolist() == [[3, 4], [5, 9]]
    assert (second["ids"].min(), second["ids"].max()) == (0, 9)
    assert second["keep"].any()
    assert not second["keep"].all()
    assert hidden["keep"][-1].tolist() == [False, False]
    assert all(spec.guessed for spec in model.inputs)


def test_a_fourth_number_is_what_sizes_are_multiples_of(tmp_path: Path) -> None:
    head = MLP.replace("import torch\n", "import torch\nfrom enginewright import ModelSpec\n", 1)

    def spec(entry: str) -> str:
        what = f"ModelSpec(module=Net(), inputs=dict(x=torch.randn(4, 32)), dynamic={entry})"
        return f"{head}\ndef build():\n    return {what}\n"

    model = load(tmp_path, spec("{'x': {0: ('rows', 2, 64, 2)}}"))
    assert model.inputs[0].shape == (Dim(name="rows", low=2, typical=4, high=64, multiple_of=2), 32)
    assert "comes in multiples of 3; the example has 4" in fault(tmp_path, spec("{'x': {0: ('rows', 3, 64, 3)}}"))
    assert "or (name, smallest, largest, multiple)" in fault(tmp_path, spec("{'x': {0: ('rows', 3)}}"))
