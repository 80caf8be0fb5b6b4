"""Programs as data: written, read, checked, parted."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from enginewright.ground.errors import ToolchainError
from enginewright.ground.program import (
    SOLE,
    Call,
    Network,
    Program,
    StateTensor,
    Table,
    Way,
    by_timestep,
    in_turn,
    parted,
)
from enginewright.ground.signature import Dim, InputSpec

TABLE = Table(input="t", timesteps=(10.0, 5.0, 0.0), ways=(0, 1, 1))
REUSE = Program(
    networks={"whole": Network(gives=("kept",)), "short": Network(takes=("x", "t", "kept"))},
    ways=(Way(calls=(Call(network="whole"),)), Way(calls=(Call(network="short"),), reads=("kept",))),
    table=TABLE,
    states=(StateTensor(name="kept", shape=(3,), dtype="float16"),),
    shared=("ids",),
)

BATCH = Dim(name="batch", low=1, typical=2, high=4)
IN_TURN = in_turn(
    {"first": Network(takes=("z",), outputs=("w",)), "second": Network(takes=("w", "x"))},
    [InputSpec(name="w", shape=(BATCH, 3), role="condition")],
)
SEQUENCE = Program(
    networks={"decoder": Network(gives=("keys",))},
    ways=(Way(calls=(Call(network="decoder"),), reads=("keys",)),),
    states=(StateTensor(name="keys", shape=(2, 5), first=1.5, given_as="new"),),
    shared=("position",),
    start="position",
)


@pytest.mark.parametrize("program", [SOLE, REUSE, by_timestep(["0", "1"], TABLE), IN_TURN, SEQUENCE])
def test_a_program_is_read_as_it_was_written(program: Program) -> None:
    assert Program.from_json(json.loads(json.dumps(program.as_json())), where="here") == program


FAULTS: dict[str, Callable[[dict[str, Any]], object]] = {
    "schema": lambda content: content.update(schema=9),
    "a network on no way": lambda content: content["networks"].update(other={"takes": None, "gives": []}),
    "a name that leaves the folder": lambda content: content["networks"].update({"../x": content["networks"]["whole"]}),
    "a way through nothing": lambda content: content["ways"][0].update(calls=[]),
    "a way that is not there": lambda content: content["table"].update(ways=[0, 1, 2]),
    "a state that nobody keeps": lambda content: content.update(states=[]),
    "a way without another": lambda content: content["ways"][1].update(otherwise=1),
    "no timesteps": lambda content: content["table"].update(timesteps=[], ways=[]),
    "a timestep that is no number": lambda content: content["table"].update(timesteps=[0, "1", 2]),
    "several ways and no table": lambda content: content.update(table=None),
    "a shape that is no shape": lambda content: content["states"][0].update(shape=[-1]),
    "names that are none": lambda content: content["networks"]["short"].update(takes="xt"),
    "steps of two kinds": lambda content: content.update(start="position"),
    "a first value that is none": lambda content: content["states"][0].update(first="zero"),
    "entries of no sequence": lambda content: content["states"][0].update(grows=1),
    "an inner value that none gives": lambda content: content.update(
        inner=[{"name": "kept", "shape": [1], "dtype": "float32"}]
    ),
    "not a table": lambda content: content.update(networks=[]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_program_whose_parts_do_not_fit_is_refused(fault: str) -> None:
    content = copy.deepcopy(json.loads(json.dumps(REUSE.as_json())))
    FAULTS[fault](content)
    with pytest.raises(ToolchainError, match="cannot be read") as caught:
        Program.from_json(content, where="program.json")
    assert caught.value.where == "program.json"


def test_the_nearest_timestep_of_the_schedule_is_taken() -> None:
    assert TABLE.steps_of(np.asarray([11.0, 7.6, 7.4, -3.0])) == [0, 0, 1, 2]
    assert TABLE.steps_of(np.asarray(4)) == [1]


def test_networks_that_are_parted_keep_their_state_tensors_and_ways() -> None:
    halves = {"short": (Network(takes=("c",)), Network(takes=("x", "t", "kept", "k")))}
    found = parted(REUSE, halves)
    assert list(found.networks) == ["whole", "short-prepare", "short-step"]
    assert found.ways[1] == Way(
        calls=(Call(network="short-prepare", once=("c",)), Call(network="short-step")), reads=("kept",)
    )
    assert [state.name for state in found.read_by("short-step")] == ["kept"]
    assert found.read_by("short-prepare") == found.read_by("whole") == ()
    assert list(parted(SOLE, {"": halves["short"]}).networks) == ["prepare", "step"]


def test_a_network_runs_at_the_first_timestep_whose_way_has_it() -> None:
    assert [REUSE.time_of(name) for name in ("whole", "short")] == [10.0, 5.0]
    assert SOLE.time_of("") is None


def test_programs_written_before_networks_passed_values_on_are_read() -> None:
    content = json.loads(json.dumps(REUSE.as_json()))
    for name in ("inner", "start"):
        del content[name]
    for network in content["networks"].values():
        del network["outputs"]
    for name in ("first", "given_as", "grows"):
        del content["states"][0][name]
    assert Program.from_json(content, where="here") == REUSE


def test_a_parted_network_still_gives_what_others_take() -> None:
    found = parted(IN_TURN, {"first": (Network(takes=("c",)), Network(takes=("z", "k")))})
    assert found.networks["first-step"] == Network(takes=("z", "k"), outputs=("w",))
    assert found.inner == IN_TURN.inner
