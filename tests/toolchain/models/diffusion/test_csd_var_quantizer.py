from __future__ import annotations

import dataclasses
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from enginewright.models.diffusion.csd_var import quantizer, scales
from enginewright.targets.onnx_export import export_onnx
from tests.toolchain.models.diffusion.csd_var_networks import loud, numel


def test_the_quantizer_has_the_parameters_of_the_release() -> None:
    net = quantizer.Quantizer(quantizer.PUBLISHED["512"])
    assert numel(net) == 168_064 == 4096 * 32 + 4 * (32 * 32 * 9 + 32)
    assert quantizer.shared_of_scales(quantizer.PUBLISHED["512"]) == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]


def scale_by_scale(net: quantizer.Quantizer, ids: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    config = net.config
    map, features = torch.zeros(2, config.channels, config.side, config.side), []
    for scale, own in enumerate(ids):
        given = quantizer.call_of(config, own.numpy(), scale, map.numpy())
        map, read = net(**{name: torch.from_numpy(np.asarray(array)) for name, array in given.items()})
        features.append(read)
    return map, features


@pytest.mark.parametrize("config", [quantizer.TINY, dataclasses.replace(quantizer.PUBLISHED["512"], codes=64)])
def test_constant_matrices_do_what_resampling_does(config: quantizer.Config) -> None:
    net = loud(quantizer.Quantizer(config))
    assert isinstance(net, quantizer.Quantizer)
    ids = [torch.randint(config.codes, (2, side**2)) for side in config.scales]
    found, features = scale_by_scale(net, ids)
    map, last = torch.zeros_like(found), len(config.scales) - 1
    for scale, (side, own) in enumerate(zip(config.scales, ids, strict=True)):
        h = net.embedding(own).mT.unflatten(-1, (side, side))
        h = F.interpolate(h, size=config.side, mode="bicubic") if scale < last else h
        map = map + 0.5 * (h + net.qresi_ls[quantizer.shared_of_scales(config)[scale]](h))
        if scale < last:
            read = F.interpolate(map, size=config.scales[scale + 1], mode="area").flatten(2).mT
            torch.testing.assert_close(features[scale], read, rtol=1e-4, atol=1e-5)
    assert found.std() > 0.1
    torch.testing.assert_close(found, map, rtol=1e-4, atol=1e-5)


def test_all_of_a_map_is_read_and_written_at_every_scale() -> None:
    config = quantizer.PUBLISHED["512"]
    up, down = quantizer.resampling(config)
    places = scales.starts(config.scales)
    torch.testing.assert_close(down.sum(1), torch.ones(2240))
    for begin, end in pairwise(places):
        torch.testing.assert_close(up[begin:end].sum(0), torch.ones(1024))
    assert torch.equal(up[-1024:], torch.eye(1024))


def test_scales_have_convolutions_of_their_own() -> None:
    net = loud(quantizer.Quantizer(quantizer.TINY))
    assert isinstance(net, quantizer.Quantizer)
    ids = [torch.randint(64, (2, side**2)) for side in net.config.scales]
    before, _ = scale_by_scale(net, ids)
    for conv in net.qresi_ls:
        weight = conv.weight.clone()
        conv.weight.mul_(-1)
        assert (scale_by_scale(net, ids)[0] - before).abs().mean() > 0.05
        conv.weight.copy_(weight)


def test_the_graph_gives_what_pytorch_gives_at_two_scales_and_batches(tmp_path: Path) -> None:
    import onnxruntime

    config = quantizer.TINY
    net, path, calls = loud(quantizer.Quantizer(config)), tmp_path / "model.onnx", []
    for rows, scale in ((2, 2), (1, 1), (3, 4)):
        ids = torch.randint(config.codes, (rows, config.scales[scale] ** 2))
        map = torch.randn(rows, config.channels, config.side, config.side)
        given = quantizer.call_of(config, ids.numpy(), scale, map.numpy())
        calls.append({name: torch.from_numpy(np.asarray(array)) for name, array in given.items()})
    batch, tokens, following = ("batch", 1, 8), ("tokens", 1, 25), ("following", 1, 25)
    dynamic = {"ids": {0: batch, 1: tokens}, "following": {0: following}, "map": {0: batch}}
    export_onnx(net, calls[0], dynamic=dynamic, outputs=quantizer.OUTPUTS, path=path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for call in calls[1:]:
        found = session.run(None, {name: tensor.numpy() for name, tensor in call.items()})
        for one, wanted in zip(found, net(**call), strict=True):
            np.testing.assert_allclose(one, wanted.numpy(), rtol=1e-4, atol=1e-5)
