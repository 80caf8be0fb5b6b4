"""What ``show`` says about a model of each source: always the same fields, with no weight read."""

from __future__ import annotations

import json
import math
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from enginewright.ground.errors import ToolchainError
from enginewright.show import describe, tell
from tests import graphs
from tests.toolchain.sources import tiny_diffusers as tiny

FIELDS = {"name", "kind", "source", "documentation", "parameter_count", "macs", "macs_reason", "weights", "inputs"}
FIELDS |= {"outputs", "published", "left_out", "notes"}

NET = """
import torch
from torch import nn

def build():
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), (torch.zeros(2, 8),)

class Picks(nn.Module):
    def forward(self, x):
        return x[: int(x.sum().item()) + 1]

def picks():
    return Picks(), {"x": torch.zeros(2, 8)}
"""


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layers(x)
        return found


def shown(text: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """What is known, after checking its fields and that all of it can be said."""
    found = describe(text)
    assert found.keys() == FIELDS
    assert json.loads(json.dumps(found)) == found
    assert (found["macs"] is None) == bool(found["macs_reason"])
    for entry in found["inputs"]:
        assert entry.keys() == {"name", "shape", "dtype", "role", "range", "dynamic", "multiple_of"}
        assert {size for size in entry["shape"] if isinstance(size, str)} == entry["dynamic"].keys()
    tell(found)
    said = capsys.readouterr().out
    assert f"{found['parameter_count']:,} parameters" in said
    assert all(f"input {entry['name']} (" in said for entry in found["inputs"])
    return found


def test_a_users_module(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "net.py").write_text(NET)
    found = shown(f"py:{tmp_path / 'net.py'}:build", capsys)
    assert (found["parameter_count"], found["macs"]) == (8 * 16 + 16 + 16 * 4 + 4, 8 * 16 + 16 * 4)
    assert found["inputs"][0]["shape"] == ["batch", 8]
    assert (found["name"], found["source"]) == (f"py:{tmp_path / 'net.py'}:build", "py")


def test_macs_that_only_a_real_call_could_tell_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "net.py").write_text(NET)
    found = shown(f"py:{tmp_path / 'net.py'}:picks", capsys)
    assert found["macs"] is None
    assert "depend on what its tensors hold" in found["macs_reason"]


def test_an_exported_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program = torch.export.export(Net().eval(), (torch.zeros(1, 8),), strict=False)
    torch.export.save(program, tmp_path / "net.pt2")
    found = shown(f"pt2:{tmp_path / 'net.pt2'}", capsys)
    assert (found["parameter_count"], found["macs"]) == (8 * 16 + 16 + 16 * 4 + 4, 8 * 16 + 16 * 4)
    assert found["inputs"][0]["shape"] == [1, 8]


def test_a_graph_says_why_its_products_are_not_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = graphs.mixed(tmp_path / "net.onnx")
    found = shown(f"onnx:{path}", capsys)
    assert found["macs"] is None
    assert "ONNX graphs" in found["macs_reason"]
    assert found["parameter_count"] > 0


def test_a_checkpoint_of_transformers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64
    )
    model = transformers.BertModel(config)
    model.save_pretrained(tmp_path)
    found = shown(f"hf:{tmp_path}", capsys)
    assert found["parameter_count"] == sum(p.numel() for p in model.parameters())
    assert found["inputs"][0]["shape"] == ["batch", "sequence"]
    assert found["inputs"][0]["range"] == [0, 50]
    assert found["outputs"] == ["last_hidden_state", "pooler_output"]


def test_a_network_of_diffusers_and_a_pipeline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    diffusers = pytest.importorskip("diffusers")
    network: Any = tiny.dit()
    diffusers.DiTPipeline(
        transformer=network, vae=tiny.autoencoder(), scheduler=diffusers.DDIMScheduler()
    ).save_pretrained(tmp_path)
    found = shown(f"diffusers:{tmp_path}#transformer", capsys)
    assert found["parameter_count"] == sum(p.numel() for p in network.parameters())
    pipeline = describe(f"diffusers:{tmp_path}")
    wanted = [f"diffusers:{tmp_path}#{part}" for part in ("transformer", "vae_decoder", "vae_encoder")]
    assert pipeline["components"] == wanted
    tell(pipeline)
    assert wanted[0] in capsys.readouterr().out


def test_what_cannot_be_loaded_says_so(tmp_path: Path) -> None:
    with pytest.raises(ToolchainError, match=r"no ONNX file 'absent\.onnx'"):
        describe(f"onnx:{tmp_path / 'absent.onnx'}")
    with pytest.raises(ToolchainError, match="no local folder"):
        describe(f"hf:{tmp_path / 'absent'}")


def test_weights_stay_on_the_disk(tmp_path: Path) -> None:
    """A checkpoint of 2 GB in zeros that take no space is described in far less memory."""
    pytest.importorskip("diffusers")
    from enginewright.reports.benchmarks.large_models import write_sparse
    from enginewright.sources.filling import without_memory

    with without_memory():
        network: Any = tiny.pixart(
            num_attention_heads=32, attention_head_dim=72, cross_attention_dim=2304, num_layers=12
        )
    network.save_config(tmp_path)
    size = write_sparse(network.state_dict(), torch.float32, tmp_path / "diffusion_pytorch_model.safetensors")
    assert size > 2e9
    code = (
        f"import json, resource; from enginewright.show import describe; found = describe('diffusers:{tmp_path}'); "
        "print(json.dumps([found['parameter_count'], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024]))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    count, peak = json.loads(run.stdout.splitlines()[-1])
    assert count == sum(math.prod(p.shape) for p in network.parameters())
    here = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # a process begins at its parent's peak
    assert peak < max(1e9, here + 5e8)


def test_a_method_says_what_was_measured_and_its_model_where_that_stands(capsys: pytest.CaptureFixture[str]) -> None:
    found = describe("transformer-programs")
    assert found["kind"] == "methods"
    assert {line["row"] for line in found["measured"]} == {
        "counts",
        "faithful",
        "exported",
        "gained",
        "claim",
        "trained",
    }
    tell(found)
    said = capsys.readouterr().out
    assert "paper: arXiv:2306.01128" in said
    assert "trained, transformer_programs:sort: met" in said
    tell(describe("transformer_programs:sort"))
    assert "what was measured: reports/METHODS.md, transformer-programs" in capsys.readouterr().out


def test_a_pipeline_of_ours_names_its_parts(capsys: pytest.CaptureFixture[str]) -> None:
    tell(describe("vevo"))
    assert "tiny: hubert (vevo-hubert:tiny), content (vevo-tokenizers:tiny)" in capsys.readouterr().out
