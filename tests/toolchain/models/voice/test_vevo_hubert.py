"""HuBERT cut at the layer that Vevo reads."""

from __future__ import annotations

import pytest
import torch

from enginewright.models.voice.vevo import hubert

transformers = pytest.importorskip("transformers")


def test_eighteen_layers_of_the_large_network_have_the_counted_parameters() -> None:
    with torch.device("meta"):
        net = hubert.build(hubert.PUBLISHED["large-18"])
    assert sum(parameter.numel() for parameter in net.parameters()) == 239_859_328  # 239.86 M


def test_it_gives_the_hidden_state_of_the_whole_network_and_not_its_last() -> None:
    torch.manual_seed(0)
    settings = transformers.HubertConfig(num_hidden_layers=4, apply_spec_augment=False, **hubert.TINY.settings)
    whole = transformers.HubertModel(settings).eval()
    cut = hubert.build(hubert.TINY).eval()
    kept = {name: tensor for name, tensor in whole.state_dict().items() if name in cut.hubert.state_dict()}
    cut.hubert.load_state_dict(kept)
    wave = torch.randn(1, 4000)
    with torch.no_grad():
        found, states = cut(wave), whole(wave, output_hidden_states=True)
    assert torch.equal(found, states.hidden_states[2])
    shorter = hubert.build(hubert.Config(layers=2, settings=hubert.TINY.settings)).eval()
    shorter.hubert.encoder.layer_norm = whole.encoder.layer_norm
    shorter.hubert.load_state_dict(
        {**kept, **{f"encoder.layer_norm.{k}": v for k, v in whole.encoder.layer_norm.state_dict().items()}}
    )
    with torch.no_grad():
        assert (shorter(wave) - found).abs().max() > 0.1  # the norm behind the last layer must go


def test_it_has_a_frame_for_each_hop_after_the_first_window() -> None:
    net = hubert.build(hubert.TINY).eval()
    for frames in (2, 7):
        with torch.no_grad():
            assert net(torch.randn(2, hubert.WINDOW + (frames - 1) * hubert.HOP)).shape == (2, frames, 32)
