"""Engines in the place of the modules that they were made from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import enginewright
from enginewright import pipeline, sources
from enginewright.ground.errors import ToolchainError, UnavailableError
from enginewright.ground.signature import Dim, InputSpec
from enginewright.loaded import Engine
from enginewright.opened import open_subject
from enginewright.progress import Progress
from enginewright.recipe import make
from enginewright.sources.contract import Interface


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A tiny BERT of random weights, and the folder that it was saved to and exported from."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=40,
    )
    model = transformers.BertModel(config).eval()
    model.save_pretrained(folder / "checkpoint")
    export(folder / "checkpoint", folder / "out", [])
    return model, folder


def export(checkpoint: Path, out: Path, steps: list[dict[str, Any]], **more: Any) -> None:
    recipe = make(
        {
            "model": f"hf:{checkpoint}",
            "steps": steps,
            "targets": [{"target": "onnxruntime"}, {"target": "pytorch"}],
            "validation": {"skip": True},
            **more,
        }
    )
    pipeline.export(recipe, out, force=False, progress=Progress(quiet=True))


IDS = torch.tensor([[1, 5, 9, 4], [3, 3, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])


def test_an_engine_answers_as_the_module_does(bert: tuple[Any, Path]) -> None:
    model, folder = bert
    engine = enginewright.load(folder / "out")
    with torch.no_grad():
        wanted = model(IDS, attention_mask=MASK)
    found = engine(IDS, attention_mask=MASK)
    assert type(found) is type(wanted)
    torch.testing.assert_close(found.last_hidden_state, wanted.last_hidden_state, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.pooler_output, wanted.pooler_output, atol=1e-5, rtol=1e-4)
    positional = engine(IDS, MASK, return_dict=False)
    assert isinstance(positional, tuple)
    assert torch.equal(positional[0], found[0])


def test_what_a_caller_leaves_out_is_what_the_module_makes_of_it(bert: tuple[Any, Path]) -> None:
    model, folder = bert
    engine = enginewright.load(folder / "out")
    with torch.no_grad():
        wanted = model(IDS).last_hidden_state
    torch.testing.assert_close(engine(IDS).last_hidden_state, wanted, atol=1e-5, rtol=1e-4)
    assert (engine(IDS, MASK).last_hidden_state - wanted).abs().max() > 1e-2


def test_arrays_give_arrays(bert: tuple[Any, Path]) -> None:
    engine = enginewright.load(bert[1] / "out")
    found = engine(input_ids=IDS.numpy(), attention_mask=MASK.numpy())[0]
    assert isinstance(found, np.ndarray)
    assert np.array_equal(found, engine(IDS, MASK)[0].numpy())


def test_attributes_of_the_module_are_there_without_its_weights(bert: tuple[Any, Path]) -> None:
    engine = enginewright.load(bert[1] / "out")
    assert engine.config.hidden_size == 32
    assert engine.embeddings.word_embeddings.weight.device.type == "meta"
    with pytest.raises(AttributeError, match="nonsense"):
        engine.nonsense  # noqa: B018


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "input 'input_ids' is missing"),
        ({"input_ids": IDS[0]}, r"input 'input_ids' has shape \(4,\); the engine takes \(batch, sequence\)"),
        (
            {"input_ids": IDS, "attention_mask": MASK[:1]},
            r"input 'attention_mask' has shape \(1, 4\); the engine takes \(batch = 2, sequence = 4\)",
        ),
        ({"input_ids": IDS, "inputs_embeds": torch.ones(1)}, "no input 'inputs_embeds'; it was exported with"),
        ({"input_ids": IDS, "output_attentions": True}, "cannot be called with output_attentions=True"),
    ],
)
def test_a_wrong_call_says_what_is_wrong(bert: tuple[Any, Path], arguments: dict[str, Any], message: str) -> None:
    engine = enginewright.load(bert[1] / "out")
    with pytest.raises(ToolchainError, match=message):
        engine(**arguments)


def test_a_module_without_a_library_gives_plain_tensors(artifact: Path) -> None:
    engine = enginewright.load(artifact)
    call = open_subject(str(artifact)).model.batches(1, 5)[0]  # type: ignore[union-attr]
    found = engine(torch.from_numpy(call["x"]), torch.from_numpy(call["t"]), torch.from_numpy(call["y"]))
    assert isinstance(found, torch.Tensor)
    wanted = sources.load("dit:tiny").module(**{name: torch.from_numpy(array) for name, array in call.items()})
    assert 0 < (found - wanted).norm() / wanted.norm() < 0.2
    one_for_all = engine(call["x"], 7, call["y"])
    assert np.array_equal(one_for_all, engine(call["x"], np.full(len(call["x"]), 7.0), call["y"]))
    with pytest.raises(AttributeError):
        engine.config  # noqa: B018


def test_a_named_target_and_one_that_does_not_run(artifact: Path) -> None:
    assert enginewright.load(artifact, "onnxruntime").outputs == ("prediction_and_variance",)
    with pytest.raises(UnavailableError, match="tensorrt: "):
        enginewright.load(artifact, "tensorrt")
    with pytest.raises(ToolchainError, match="has no engine 'nope'"):
        enginewright.load(artifact, "nope")


def test_a_loaded_module_is_the_optimized_one_and_can_be_trained(bert: tuple[Any, Path], tmp_path: Path) -> None:
    export(bert[1] / "checkpoint", tmp_path / "out", [{"pass": "prune_heads", "share": 0.5}])
    module = enginewright.load_module(tmp_path / "out")
    assert sum(p.numel() for p in module.parameters()) < sum(p.numel() for p in bert[0].parameters())
    engine = enginewright.load(tmp_path / "out")
    torch.testing.assert_close(module(IDS, MASK)[0], engine(IDS, MASK)[0], atol=1e-5, rtol=1e-4)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    before = module(IDS, MASK)[0].detach()
    module(IDS, MASK)[0].square().mean().backward()
    optimizer.step()
    assert not torch.equal(module(IDS, MASK)[0], before)


def test_networks_by_timestep_are_loaded_together(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    from tests.toolchain.sources import tiny_diffusers

    tiny_diffusers.shaken(tiny_diffusers.dit()).save_pretrained(tmp_path / "checkpoint")
    settings = {"timesteps": [900, 600, 300, 0], "buckets": 2, "groups": 2, "input": "timestep"}
    recipe = make(
        {
            "model": f"diffusers:{tmp_path / 'checkpoint'}",
            "steps": [{"pass": "slice_width_by_timestep", **settings}],
            "targets": [{"target": "onnxruntime"}],
            "validation": {"skip": True},
        }
    )
    pipeline.export(recipe, tmp_path / "out", force=False, progress=Progress(quiet=True))
    [call] = sources.load(f"diffusers:{tmp_path / 'checkpoint'}").batches(1, 0)
    call["timestep"] = torch.full_like(torch.as_tensor(call["timestep"]), 600).numpy()
    wanted = open_subject(str(tmp_path / "out")).runners["onnxruntime"](call)
    given = enginewright.load_module(tmp_path / "out")(
        **{name: torch.from_numpy(array) for name, array in call.items()}
    )
    [got] = given if isinstance(given, tuple) else [given]
    torch.testing.assert_close(got.detach(), torch.from_numpy(next(iter(wanted.values()))), atol=1e-5, rtol=1e-4)


def test_an_engine_outlives_its_source_but_a_module_needs_it(bert: tuple[Any, Path], tmp_path: Path) -> None:
    bert[0].save_pretrained(tmp_path / "checkpoint")
    export(tmp_path / "checkpoint", tmp_path / "out", [])
    (tmp_path / "checkpoint").rename(tmp_path / "moved")
    torch.testing.assert_close(enginewright.load(tmp_path / "out")(IDS)[0], bert[0](IDS)[0], atol=1e-5, rtol=1e-4)
    with pytest.raises(ToolchainError, match="checkpoint"):
        enginewright.load_module(tmp_path / "out")


def test_a_source_that_is_written_again_is_noticed(bert: tuple[Any, Path], tmp_path: Path) -> None:
    bert[0].save_pretrained(tmp_path / "checkpoint")
    export(tmp_path / "checkpoint", tmp_path / "out", [], export={"weights": "link"})
    export(tmp_path / "checkpoint", tmp_path / "copied", [])
    weights = tmp_path / "checkpoint" / "model.safetensors"
    with weights.open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"\x00\x00\x80\x3f")
    with pytest.raises(ToolchainError, match=r"weights/model\.safetensors was changed"):
        enginewright.load(tmp_path / "out")
    torch.testing.assert_close(enginewright.load(tmp_path / "copied")(IDS)[0], bert[0](IDS)[0], atol=1e-5, rtol=1e-4)


def test_embedded_weights_stand_alone(bert: tuple[Any, Path], tmp_path: Path) -> None:
    export(bert[1] / "checkpoint", tmp_path / "out", [], export={"embed_weights": True})
    assert not (tmp_path / "out" / "weights").exists()
    torch.testing.assert_close(enginewright.load(tmp_path / "out")(IDS)[0], bert[0](IDS)[0], atol=1e-5, rtol=1e-4)


def test_mappings_and_sequences_are_spread_and_what_always_comes_may_be_asked_for() -> None:
    def runner(inputs: dict[str, Any]) -> dict[str, Any]:
        return {"out": sum(inputs.values()), "all": np.stack(list(inputs.values()))}

    batch = Dim(name="batch", low=1, typical=2, high=4)
    names = ("x", "ids", "rope_0", "rope_1")
    inputs = tuple(InputSpec(name=name, shape=(batch,)) for name in names)
    interface = Interface(arguments=("x", "added", "rope"), returns="dict", keys=("sum", "hidden_states"))
    engine = Engine(runner, inputs, ("out", "all"), interface)
    one = torch.ones(3)
    found = engine(one, {"ids": 2 * one}, (3 * one, 4 * one), output_hidden_states=True)
    assert found["sum"].tolist() == [10.0, 10.0, 10.0]
    assert found["hidden_states"].shape == (4, 3)


def test_a_size_between_the_steps_of_a_dimension_is_refused_by_name() -> None:
    height = Dim(name="height", low=4, typical=8, high=16, multiple_of=4)
    interface = Interface(arguments=("x",), returns="tensor", keys=("y",))
    engine = Engine(lambda inputs: {"y": inputs["x"]}, (InputSpec(name="x", shape=(2, height)),), ("y",), interface)
    assert engine(torch.ones(2, 12)).shape == (2, 12)
    with pytest.raises(ToolchainError, match="height is 10; the model takes multiples of 4 from 4 to 16"):
        engine(torch.ones(2, 10))


class There:
    """An engine on a device that is not there: the meta device stands for it."""

    device, clock = "meta", None

    def __init__(self) -> None:
        self.taken: dict[str, Any] = {}

    def to_device(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {name: torch.from_numpy(array).to("meta") for name, array in inputs.items()}

    def __call__(self, inputs: dict[str, Any]) -> dict[str, Any]:
        self.taken = inputs
        return {"y": 2 * inputs["x"]}


def test_tensors_on_the_engines_device_stay_there_and_the_rest_joins_them() -> None:
    batch = Dim(name="batch", low=1, typical=2, high=4)
    specs = (
        InputSpec(name="x", shape=(batch, 3)),
        InputSpec(name="t", shape=(batch,)),
        InputSpec(name="strength", shape=(batch,), default=0.5),
    )
    runner = There()
    engine = Engine(runner, specs, ("y",), Interface(arguments=("x", "t"), returns="tensor"))
    assert engine.device == torch.device("meta")
    found = engine(torch.ones(2, 3, dtype=torch.float16, device="meta"), torch.tensor(7.0, device="meta"))
    assert (found.device.type, found.shape) == ("meta", (2, 3))
    assert {name: (value.device.type, value.dtype, tuple(value.shape)) for name, value in runner.taken.items()} == {
        "x": ("meta", torch.float32, (2, 3)),
        "t": ("meta", torch.float32, (2,)),
        "strength": ("meta", torch.float32, (2,)),
    }
    with pytest.raises(ToolchainError, match=r"'x' has shape \(2, 4\); the engine takes \(batch = 2, 3\)"):
        engine(torch.ones(2, 4, device="meta"), 7.0)
    here = engine(np.ones((2, 3), np.float32), 7.0)
    assert isinstance(here, np.ndarray)
    assert all(isinstance(value, np.ndarray) for value in runner.taken.values())
