"""Exported programs: read without running anything, exported again with their dynamic sizes, and what is refused."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim as D

from enginewright import pipeline, sources
from enginewright.ground.errors import ToolchainError
from enginewright.ground.signature import Dim
from enginewright.opened import open_subject
from enginewright.progress import Progress
from enginewright.recipe import make
from enginewright.targets.onnx_export import export_onnx
from enginewright.validation.fidelity import compare
from enginewright.validation.inputs import draw

BATCH = D("b", min=1, max=16)


class Block(nn.Module):
    """Tokens (B, N, 32) and a shift -> logits (B, 8): shapes are read, a layer is used twice, one weight is shared."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 32)
        self.body = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Dropout(0.3), nn.Linear(64, 32))
        self.twice = nn.Linear(32, 32, bias=False)
        self.both = nn.Linear(32, 32, bias=False)
        self.norm = nn.LayerNorm(32)

    def forward(self, x: Tensor, *, ids: Tensor, scale: Tensor | None = None) -> Tensor:
        x = self.norm(x + self.embed(ids))
        x = self.twice(self.twice(x + self.body(x))).reshape(x.shape[0], -1, 32)
        x = x if scale is None else x * scale
        x = x + self.both(x) @ self.both.weight
        return x.mean(1) @ self.embed.weight.T + nn.functional.linear(x[:, 0], self.embed.weight)


def save(folder: Path, module: nn.Module, args: tuple[Any, ...], kwargs: Any = None, dynamic: Any = None) -> Path:
    program = torch.export.export(module, args, kwargs, dynamic_shapes=dynamic)
    torch.export.save(program, folder / "m.pt2")
    return folder / "m.pt2"


def saved_block(folder: Path) -> tuple[Path, nn.Module]:
    torch.manual_seed(0)
    module, tokens = Block().eval(), D("tokens", min=2, max=20)
    args, kwargs = (
        (torch.randn(3, 6, 32),),
        {"scale": torch.ones(3, 1, 1), "ids": torch.tensor([[0, 5, 1, 2, 3, 4]] * 3)},
    )
    dynamic = {"x": {0: BATCH, 1: tokens}, "ids": {0: BATCH, 1: tokens}, "scale": {0: BATCH}}
    return save(folder, module, args, kwargs, dynamic), module


def fault(path: Path) -> str:
    with pytest.raises(ToolchainError) as caught:
        sources.load(f"pt2:{path}")
    return str(caught.value)


def test_inputs_sizes_and_ranges_are_the_programs(tmp_path: Path) -> None:
    path, _ = saved_block(tmp_path)
    model = sources.load(f"pt2:{path}")
    batch, tokens = Dim(name="batch", low=1, typical=3, high=16), Dim(name="x_1", low=2, typical=6, high=20)
    assert {spec.name: spec.shape for spec in model.inputs} == {
        "x": (batch, tokens, 32),
        "ids": (batch, tokens),
        "scale": (batch, 1, 1),
    }
    ids = next(spec for spec in model.inputs if spec.name == "ids")
    assert (ids.dtype, ids.low, ids.high) == ("int64", 0, 6)
    assert model.outputs == ("output",)
    assert (model.name, model.weights) == ("pt2:m.pt2", "from m.pt2")


class Fours(nn.Module):
    """Four frames make a token; a number and a None come beside it."""

    def forward(self, frames: Tensor) -> tuple[Tensor, None, int]:
        batch, time, width = frames.shape
        return frames.reshape(batch, time // 4, 4 * width), None, 3


def test_sizes_in_multiples_and_answers_beside_tensors_are_read(tmp_path: Path) -> None:
    dynamic = {"frames": {0: BATCH, 1: 4 * D("quarter", min=2, max=16)}}
    model = sources.load(f"pt2:{save(tmp_path, Fours(), (torch.randn(2, 12, 3),), dynamic=dynamic)}")
    (frames,) = model.inputs
    assert frames.shape[1] == Dim(name="frames_1", low=8, typical=12, high=64, multiple_of=4)
    assert model.outputs == ("output_0",)
    assert model.example is not None
    assert model.example["frames"].shape == (2, 12, 3)


def test_linear_layers_are_layers_again_and_nothing_changes(tmp_path: Path) -> None:
    path, original = saved_block(tmp_path)
    model = sources.load(f"pt2:{path}")
    layers = {name for name, module in model.module.named_modules() if isinstance(module, nn.Linear)}
    assert layers == {"body.0", "body.3", "twice"}  # not embed and both, whose weights others read too
    for seed in (0, 1):
        inputs = {k: torch.from_numpy(v) for k, v in draw(model.inputs, seed=seed, sizes={"batch": 2 + seed}).items()}
        torch.testing.assert_close(model.module(**inputs), original(**inputs))
    assert model.module.state_dict().keys() == original.state_dict().keys()


def test_the_graph_agrees_with_torch_at_two_batch_sizes(tmp_path: Path) -> None:
    path, original = saved_block(tmp_path)
    model = sources.load(f"pt2:{path}")
    dynamic = {
        spec.name: {i: (d.name, d.low, d.high) for i, d in enumerate(spec.shape) if isinstance(d, Dim)}
        for spec in model.inputs
    }
    example = {name: torch.from_numpy(array) for name, array in draw(model.inputs, seed=0).items()}
    export_onnx(model.module, example, dynamic=dynamic, outputs=model.outputs, path=tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    for sizes in ({"batch": 1, "x_1": 2}, {"batch": 5, "x_1": 9}):
        inputs = draw(model.inputs, seed=1, sizes=sizes)
        with torch.no_grad():
            wanted = original(**{name: torch.from_numpy(array) for name, array in inputs.items()}).numpy()
        np.testing.assert_allclose(session.run(None, inputs)[0], wanted, atol=1e-4)


def test_a_program_goes_all_the_way_and_opens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved_block(tmp_path)
    content = {
        "model": "pt2:m.pt2",
        "steps": [{"pass": "quantize_int8"}],
        "targets": [{"target": "onnxruntime"}],
        "validation": {"rounds": 3, "calls": 2},
    }
    out = tmp_path / "out"
    report, _ = pipeline.export(make(content, folder=tmp_path), out, force=False, progress=Progress(quiet=True))
    assert report.steps[0].changed == ["body.0", "body.3", "twice"]
    (tmp_path / "third").mkdir()
    monkeypatch.chdir(tmp_path / "third")
    opened = open_subject("../out")
    assert opened.original is not None
    engine, calls = opened.runners["onnxruntime"], [draw(opened.inputs, seed=n, sizes={"batch": n}) for n in (2, 7)]
    (found,) = compare([opened.original(call) for call in calls], [engine(call) for call in calls])
    assert 0.99 < found.worst["cosine"] < 1


class Several(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"sum": x + y, "difference": x - y}


def test_a_dict_keeps_its_keys_and_open_ranges_get_bounds(tmp_path: Path) -> None:
    n = D("n")
    path = save(tmp_path, Several(), (torch.ones(4, 3), torch.ones(4, 3)), dynamic={"x": {0: n}, "y": {0: n}})
    model = sources.load(f"pt2:{path}")
    assert model.outputs == ("sum", "difference")
    assert model.interface is not None
    assert model.interface.returns == "dict"
    assert model.inputs[1].shape == (Dim(name="batch", low=1, typical=4, high=64), 3)
    total, difference = model.module(x=torch.ones(2, 3), y=torch.ones(2, 3))
    assert (total.sum(), difference.sum()) == (12, 0)


class Sum(nn.Module):
    def forward(self, *parts: Tensor) -> Tensor:
        return torch.stack(parts).sum(0)


def test_arguments_by_place_alone_get_names(tmp_path: Path) -> None:
    model = sources.load(f"pt2:{save(tmp_path, Sum(), (torch.ones(2), torch.ones(2)))}")
    names = [spec.name for spec in model.inputs]
    assert len(set(names)) == 2
    assert model.module(**{name: torch.ones(2) for name in names}).tolist() == [2, 2]


class Constant(nn.Module):
    def forward(self, x: Tensor, times: int) -> Tensor:
        return x * times


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.count: Tensor
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return x + self.count


class Cache(Counts):
    def forward(self, x: Tensor) -> Tensor:
        self.count[0:1] = x[0, 0]
        return x + self.count


class Number(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        return x * 2, x.shape[0]


class Bound(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x[1:] + y


def test_programs_that_no_engine_can_stand_in_for_are_refused(tmp_path: Path) -> None:
    x = torch.ones(4, 3)
    assert "input 'times' of the program is the constant 3" in fault(save(tmp_path, Constant(), (x, 3)))
    assert "changes its own 'count'" in fault(save(tmp_path, Counts(), (x,)))
    assert "changes its own 'count'" in fault(save(tmp_path, Cache(), (x,)))
    assert "changes its own 'input'" in fault(save(tmp_path, nn.ReLU(inplace=True), (x,)))
    assert sources.load(f"pt2:{save(tmp_path, nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True)).eval(), (x,))}")
    assert "returns 'sym_size" in fault(save(tmp_path, Number(), (x,), dynamic={"x": {0: BATCH}}))
    said = fault(save(tmp_path, nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)), (x,)))
    assert "exported in training mode: aten.dropout" in said
    assert "call module.eval()" in said
    said = fault(save(tmp_path, nn.BatchNorm1d(3), (x,)))
    assert "exported in training mode: aten.batch_norm" in said
    n = D("n", min=2, max=9)
    assert "bound to another size" in fault(save(tmp_path, Bound(), (x, x[1:]), dynamic={"x": {0: n + 1}, "y": {0: n}}))


def test_not_there_not_whole_or_of_another_kind(tmp_path: Path) -> None:
    assert "there is no exported program 'gone.pt2'" in fault(tmp_path / "gone.pt2")
    assert "there is no exported program" in fault(tmp_path)
    (tmp_path / "text.pt2").write_text("hello")
    assert "text.pt2 is no whole exported program" in fault(tmp_path / "text.pt2")
    path, _ = saved_block(tmp_path)
    (tmp_path / "cut.pt2").write_bytes(path.read_bytes()[:-500])
    assert "cut.pt2 is no whole exported program" in fault(tmp_path / "cut.pt2")
    torch.save({"a": torch.ones(3)}, tmp_path / "state.pt2")
    assert "state.pt2 is no whole exported program" in fault(tmp_path / "state.pt2")


class Touch:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


def altered(folder: Path, change: Callable[[dict[str, bytes]], None]) -> Path:
    """A sound archive with other content."""
    path = save(folder, nn.Linear(3, 2), (torch.ones(4, 3),), dynamic={"input": {0: BATCH}})
    with zipfile.ZipFile(path) as file:
        records = {name: file.read(name) for name in file.namelist()}
    change(records)
    with zipfile.ZipFile(folder / "altered.pt2", "w") as file:
        for name, content in records.items():
            file.writestr(name, content)
    return folder / "altered.pt2"


def test_an_archive_put_together_again_is_sound(tmp_path: Path) -> None:
    assert sources.load(f"pt2:{altered(tmp_path, lambda records: None)}")


def as_pickle(name: str) -> Callable[[dict[str, bytes], Path], None]:
    def change(records: dict[str, bytes], mark: Path) -> None:
        buffer = io.BytesIO()
        torch.save(Touch(mark), buffer)
        config = json.loads(records[f"m/data/{name}_config.json"])
        if "weights" in name:
            config["config"]["weight"]["use_pickle"] = True
            records["m/data/weights/weight_0"] = buffer.getvalue()
        else:
            entry = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
            config["config"]["thing"] = entry
            records["m/data/constants/opaque_obj_0"] = pickle.dumps(Touch(mark))
        records[f"m/data/{name}_config.json"] = json.dumps(config).encode()

    return change


def saved_into(name: str) -> Callable[[dict[str, bytes], Path], None]:
    def change(records: dict[str, bytes], mark: Path) -> None:
        buffer = io.BytesIO()
        torch.save(Touch(mark), buffer)
        records[name] = buffer.getvalue()

    return change


def in_graph(old: str, new: str) -> Callable[[dict[str, bytes], Path], None]:
    def change(records: dict[str, bytes], mark: Path) -> None:
        content = records["m/models/model.json"].decode()
        assert old in content
        records["m/models/model.json"] = content.replace(old, new.replace("MARK", str(mark))).encode()

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (as_pickle("weights/model_weights"), "keeps 'weight' as a pickle"),
        (as_pickle("constants/model_constants"), "keeps 'thing' as a pickle"),
        (saved_into("m/data/weights/model.pt"), "keeps its tensors in a pickle"),
        (saved_into("m/data/sample_inputs/model.pt"), "has example inputs that are no plain tensors"),
        (saved_into("serialized_state_dict.pt"), "has the layout of torch 2.7 or older"),
        (saved_into("m/data/aotinductor/model/x.so"), "holds compiled code"),
        (saved_into("m/models/other.json"), "where one program named 'model' is wanted"),
        (in_graph("Symbol(", "__import__('os').mkdir('MARK') or Symbol("), "has a expr_str that no exporter writes"),
        (in_graph("torch.ops.aten.linear.default", "torch.hub.load"), "has a target that no exporter writes"),
        (in_graph("torch.ops.aten.linear.default", "torch.ops.aten.from_file.default"), "has a target that no"),
        (in_graph("torch.ops.aten.linear.default", "torch.ops.load_library.__call__"), "has a target that no"),
        (in_graph("torch.ops.aten.linear.default", "_operator.methodcaller"), "has a target that no exporter writes"),
        (in_graph('"linear"', "\"linear = __import__('os').mkdir('MARK')\""), "has a name that no exporter writes"),
        (in_graph("builtins.tuple", "collections.defaultdict"), "takes other than tensors in tuples"),
        (in_graph('"type": "cpu"', '"type": "cuda"'), "was exported on 'cuda'"),
        (in_graph('"major": 8', '"major": 99'), "cannot read altered.pt2, written by torch"),
        (in_graph('{"graph_module"', '["graph_module"'), "is damaged"),
    ],
)
def test_what_would_have_to_be_run_is_refused(
    tmp_path: Path, change: Callable[[dict[str, bytes], Path], None], said: str
) -> None:
    mark = tmp_path / "was_run"
    assert said in fault(altered(tmp_path, lambda records: change(records, mark)))
    assert not mark.exists()


def test_the_loader_of_torch_would_have_run_it(tmp_path: Path) -> None:
    """What is refused above is no empty worry: without the check, this torch runs it."""
    mark = tmp_path / "was_run"
    path = altered(tmp_path, lambda records: as_pickle("constants/model_constants")(records, mark))
    torch.export.load(path)
    assert mark.is_dir()
