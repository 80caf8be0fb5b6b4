from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from enginewright.models.diffusion.csd_var import decoder
from enginewright.targets.onnx_export import export_onnx
from tests.toolchain.models.diffusion.csd_var_networks import loud, numel


def test_the_decoder_has_the_parameters_of_the_release_and_draws_512_pixels() -> None:
    with torch.device("meta"):
        net = decoder.Decoder(decoder.PUBLISHED["512"])
        assert net(torch.zeros(1, 32, 32, 32)).shape == (1, 3, 512, 512)
    assert numel(net) == 64_653_923 + 9_248


def test_every_layer_of_the_decoder_speaks() -> None:
    net = loud(decoder.Decoder(decoder.TINY))
    x = torch.randn(2, 8, 5, 5)
    before = net.decoder(net.post_quant_conv(x))
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d):
            weight = module.weight.clone()
            module.weight.mul_(-1)
            assert (net.decoder(net.post_quant_conv(x)) - before).abs().mean() > 0.01, name
            module.weight.copy_(weight)
    assert net(100 * x).abs().max() <= 1


def test_attention_is_of_all_cells_by_one_head() -> None:
    layer = loud(decoder.CellAttention(8, 4))
    x = torch.randn(2, 8, 3, 4)
    q, k, v = (layer.qkv(layer.norm(x)).flatten(2)[:, 8 * i : 8 * i + 8] for i in range(3))  # each (B, C, cells)
    weights = torch.einsum("bcq,bck->bqk", q, k).div(8**0.5).softmax(-1)
    wanted = x + layer.proj_out(torch.einsum("bqk,bck->bcq", weights, v).unflatten(2, (3, 4)))
    torch.testing.assert_close(layer(x), wanted)


@pytest.mark.slow
def test_the_graph_gives_what_pytorch_gives_at_two_sizes(tmp_path: Path) -> None:
    import onnxruntime

    net, path = loud(decoder.Decoder(decoder.TINY)), tmp_path / "model.onnx"
    dynamic = {"map": {0: ("batch", 1, 8), 2: ("side", 2, 10), 3: ("side", 2, 10)}}
    export_onnx(net, {"map": torch.randn(2, 8, 5, 5)}, dynamic=dynamic, outputs=decoder.OUTPUTS, path=path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for rows, side in ((1, 2), (3, 7)):
        map = torch.randn(rows, 8, side, side)
        [found] = session.run(None, {"map": map.numpy()})
        np.testing.assert_allclose(found, net(map).numpy(), rtol=1e-4, atol=1e-5)
