"""Inputs with a row for each sample, and inputs that all samples share."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from enginewright.ground.driver import Driver
from enginewright.ground.program import Table, by_timestep
from enginewright.ground.signature import Dim, InputSpec, rows_of, shared_by_rows
from enginewright.passes.contract import Context
from enginewright.passes.kernel.rows import one_call, shared_inputs, some_rows, two_of_each
from enginewright.passes.networks import Networks
from enginewright.passes.recovery.feeding import joined
from enginewright.passes.specialize.merge_guidance import MergeGuidance
from tests.passes.joint import flux, sharing

BATCH, TOKENS = Dim(name="batch", low=1, typical=2, high=8), Dim(name="tokens", low=1, typical=2, high=8)
IDS = ("img_ids", "txt_ids")


def test_the_contract_says_which_inputs_have_rows_though_sizes_are_equal() -> None:
    specs = (
        InputSpec(name="ids", shape=(TOKENS, 3)),
        InputSpec(name="x", shape=(BATCH, TOKENS, 4)),
        InputSpec(name="scale", shape=()),
    )
    assert rows_of(specs) == BATCH
    assert shared_by_rows(specs) == ("ids", "scale")
    assert shared_by_rows((InputSpec(name="x", shape=(2, 3)), InputSpec(name="table", shape=(7, 3)))) == ("table",)
    assert shared_by_rows((InputSpec(name="x", shape=(Dim(name="n", low=1, typical=2, high=3), 3)),)) == ()


def test_without_a_contract_an_input_of_other_length_is_shared_and_one_that_is_known_to_be() -> None:
    call = {"x": torch.zeros(2, 3), "ids": torch.zeros(5, 3), "table": torch.zeros(2, 2), "scale": torch.tensor(1.0)}
    assert shared_inputs(Context(), call, like="x") == ("ids", "scale")
    assert shared_inputs(Context(signature=sharing("table")), call, like="x") == ("ids", "table", "scale")


def test_rows_are_picked_joined_and_doubled_and_what_is_shared_stays() -> None:
    call = {"x": torch.arange(3), "ids": torch.arange(3)}
    assert {k: v.tolist() for k, v in some_rows(call, [2, 0], ("ids",)).items()} == {"x": [2, 0], "ids": [0, 1, 2]}
    assert {k: len(v) for k, v in one_call([call, call], ("ids",)).items()} == {"x": 6, "ids": 3}
    assert two_of_each(call, ("ids",))["x"].tolist() == [0, 1, 2, 0, 1, 2]
    assert two_of_each(call, ("ids",))["ids"] is call["ids"]


def test_training_joins_calls_whose_shared_inputs_are_equal() -> None:
    one = {"x": torch.zeros(3, 2), "ids": torch.zeros(3, 1)}
    other = {"x": torch.ones(3, 2), "ids": torch.ones(3, 1)}
    (both, third) = joined([one, one, other], ("ids",))
    assert (len(both["x"]), len(both["ids"]), len(third["x"])) == (6, 3, 3)


class Positioned(nn.Module):
    def __init__(self, sign: float) -> None:
        super().__init__()
        self.sign = sign

    def forward(self, x: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        assert len(ids) == 2
        return self.sign * x + ids.sum()


def test_networks_by_timestep_get_the_whole_of_what_rows_share_as_modules_and_as_engines() -> None:
    call = {"x": torch.arange(2.0), "t": torch.tensor([0.0, 9.0]), "ids": torch.tensor([[1.0], [2.0]])}
    program = by_timestep(["0", "1"], Table(input="t", timesteps=(0, 9), ways=(0, 1)), shared=("ids",))
    assert Networks({"0": Positioned(1), "1": Positioned(-1)}, program)(**call).tolist() == [3, 2]

    def runner(sign: float):  # type: ignore[no-untyped-def]
        return lambda arrays: {"y": sign * arrays["x"] + arrays["ids"].sum()}

    both = Driver(program=program, networks={"0": runner(1), "1": runner(-1)})
    found = both({name: value.numpy() for name, value in call.items()})
    assert np.array_equal(found["y"], [3, 2])


def test_flux_is_guided_in_one_call_and_its_position_ids_are_not_doubled() -> None:
    subject = flux()
    condition = "encoder_hidden_states"
    none = torch.zeros(5, 12).tolist()
    context = Context(calibration=[subject.inputs], example=subject.inputs, signature=sharing(*IDS))
    model = MergeGuidance(none=none, scale=3.0).apply(subject.copy(), context).model
    plain = {**subject.inputs, condition: torch.zeros_like(subject.inputs[condition])}
    with torch.no_grad():
        with_it, without = (subject.model(**call)[0] for call in (subject.inputs, plain))
        torch.testing.assert_close(subject.output(model), without + 3 * (with_it - without), atol=1e-4, rtol=1e-4)
        two = {name: value[:2] if name == "img_ids" else value for name, value in subject.inputs.items()}
        two["hidden_states"] = two["hidden_states"][:, :2]  # as many tokens as rows
        assert model(**two)[0].shape == two["hidden_states"].shape
