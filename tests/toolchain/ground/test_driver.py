"""The one algorithm that runs programs."""

from __future__ import annotations

import numpy as np
import pytest

from enginewright.ground.driver import Driver, Memory, Values, in_groups
from enginewright.ground.errors import ToolchainError
from enginewright.ground.program import Call, Network, Program, StateTensor, Table, Way, by_timestep, in_turn, parted
from enginewright.ground.signature import InputSpec
from tests.devices import FakeDevice, FakeRunner

REUSE = Program(
    networks={"whole": Network(gives=("kept",)), "short": Network()},
    ways=(Way(calls=(Call(network="whole"),)), Way(calls=(Call(network="short"),), reads=("kept",))),
    table=Table(input="t", timesteps=(10.0, 5.0), ways=(0, 1)),
    states=(StateTensor(name="kept", shape=()),),
)
ONE = Program(networks={"": Network()}, ways=(Way(calls=(Call(network=""),)),))


def test_a_state_tensor_is_read_only_by_the_next_step_of_calls_of_the_same_shape() -> None:
    def whole(inputs: Values) -> Values:
        return {"y": inputs["x"], "kept": 2 * inputs["x"]}

    def short(inputs: Values) -> Values:
        return {"y": inputs["kept"]}

    both = Driver(program=REUSE, networks={"whole": whole, "short": short})

    def run(x: float, t: float, rows: int) -> list[float]:
        found = both({"x": np.full(rows, x), "t": np.full(rows, t)})
        assert found.keys() == {"y"}
        return list(found["y"])

    assert (run(1, 10, 2), run(7, 5, 2)) == ([1, 1], [2, 2])
    assert (run(3, 10, 2), run(7, 5, 1)) == ([3, 3], [7])
    assert (run(3, 10, 1), run(7, 5, 1)) == ([3], [6])


def test_two_calls_at_one_step_leave_nothing_and_a_new_run_starts_anew() -> None:
    memory = Memory()

    def held_at(step: int, given: str = "") -> Values:
        memory.move([step], "shapes")
        found = memory.states
        memory.keep({"kept": given} if given else {})
        return found

    assert held_at(0, "first") == {}
    assert [held_at(1), held_at(2)] == [{"kept": "first"}] * 2
    assert held_at(0) == {}
    assert held_at(1) == {}, "what another run left"
    assert [held_at(0, "one"), held_at(0, "other"), held_at(1)] == [{}, {}, {}], "guidance in two calls"
    memory.move([0, 1], "shapes")
    assert memory.step is None


def test_rows_go_where_the_table_sends_them_and_come_back_in_order() -> None:
    table = Table(input="t", timesteps=(10.0, 5.0, 0.0), ways=(0, 0, 1))
    seen: list[list[float]] = []

    def network(sign: int):  # type: ignore[no-untyped-def]
        def run(inputs: Values) -> Values:
            seen.append(inputs["t"].tolist())
            assert len(inputs["ids"]) == 7
            return {"y": sign * inputs["x"]}

        return run

    program = by_timestep(["0", "1"], table, shared=["ids"])
    both = Driver(program=program, networks={"0": network(1), "1": network(-1)})
    ids = np.zeros(7)
    found = both({"x": np.arange(4.0), "t": np.asarray([0.0, 9.0, 2.4, 2.6]), "ids": ids})
    assert found["y"].tolist() == [0, 1, -2, 3]
    assert seen == [[9.0, 2.6], [0.0, 2.4]]
    assert both({"x": np.ones(1), "t": np.zeros(()), "ids": ids})["y"].tolist() == [-1], "one timestep for all rows"


def test_what_is_done_once_runs_when_its_inputs_change_and_not_else() -> None:
    seen: list[list[float]] = []

    def prepare(inputs: Values) -> Values:
        assert inputs.keys() == {"c"}
        seen.append(inputs["c"].tolist())
        return {"k": 2 * inputs["c"]}

    def step(inputs: Values) -> Values:
        assert inputs.keys() == {"x", "k"}
        return {"y": inputs["x"] + inputs["k"]}

    program = parted(ONE, {"": (Network(takes=("c",)), Network(takes=("x", "k")))})
    both = Driver(program=program, networks={"prepare": prepare, "step": step})
    c = np.ones(2)
    for x in (1.0, 2.0):
        assert both({"x": np.full(2, x), "c": c})["y"].tolist() == [x + 2, x + 2]
    assert seen == [[1, 1]]
    assert both({"x": np.zeros(2), "c": np.ones(2)})["y"].tolist() == [2, 2]
    assert seen == [[1, 1]], "equal content is no change"
    c[0] = 5
    assert both({"x": np.zeros(2), "c": c})["y"].tolist() == [10, 2]
    assert seen == [[1, 1], [5, 1]], "written into in place"
    assert both({"x": np.zeros(1), "c": np.ones(1)})["y"].tolist() == [2]
    assert [len(seconds) for seconds in both.memory.seconds.values()] == [3]


def test_each_network_by_timestep_prepares_for_itself() -> None:
    table = Table(input="t", timesteps=(10.0, 0.0), ways=(0, 1))
    first, second = Network(takes=("c",)), Network(takes=("x", "k"))
    program = parted(by_timestep(["0", "1"], table), {"0": (first, second), "1": (first, second)})
    assert list(program.networks) == ["0-prepare", "0-step", "1-prepare", "1-step"]
    runs: list[str] = []

    def part(name: str):  # type: ignore[no-untyped-def]
        def run(inputs: Values) -> Values:
            runs.append(name)
            sign = 1 if name.startswith("0") else -1
            return {"k": sign * inputs["c"]} if name.endswith("prepare") else {"y": inputs["x"] + inputs["k"]}

        return run

    driver = Driver(program=program, networks={name: part(name) for name in program.networks})
    call = {"x": np.ones(1), "c": np.full(1, 3.0)}
    found = [driver({**call, "t": np.full(1, t)})["y"].tolist() for t in (10.0, 10.0, 0.0, 0.0)]
    assert found == [[4], [4], [-2], [-2]]
    assert runs == ["0-prepare", "0-step", "0-step", "1-prepare", "1-step", "1-step"]


def test_the_first_network_that_can_tell_says_where_values_stop_being_finite() -> None:
    class Telling:
        def __init__(self, said: str) -> None:
            self.said = said

        def __call__(self, inputs: Values) -> Values:
            return {"k": inputs["c"]} if "c" in inputs else {"y": inputs["k"]}

        def first_non_finite(self, inputs: Values) -> str:
            assert inputs
            return self.said

    program = parted(ONE, {"": (Network(takes=("c",)), Network(takes=("x", "k")))})
    call = {"x": np.ones(1), "c": np.ones(1)}
    for prepare, step, wanted in (("", "layer", "layer"), ("early", "late", "early"), ("", "", "")):
        both = Driver(program=program, networks={"prepare": Telling(prepare), "step": Telling(step)})
        assert both.first_non_finite(call) == wanted
    assert Driver(program=ONE, networks={"": lambda inputs: inputs}).first_non_finite(call) == ""


@pytest.mark.parametrize("rows", [1, 3])
def test_a_program_of_one_network_is_that_network(rows: int) -> None:
    found = Driver(program=ONE, networks={"": lambda inputs: {"y": inputs["x"]}})({"x": np.ones(rows)})
    assert found["y"].tolist() == [1.0] * rows


def test_each_network_gets_what_it_takes_and_no_more() -> None:
    seen: list[tuple[str, ...]] = []

    def first(inputs: Values) -> Values:
        seen.append(tuple(inputs))
        return {"w": 10 * inputs["z"]}

    def second(inputs: Values) -> Values:
        seen.append(tuple(inputs))
        return {"y": inputs["w"] + inputs["x"]}

    networks = {"first": Network(takes=("z",), outputs=("w",)), "second": Network(takes=("w", "x"))}
    run = Driver(
        program=in_turn(networks, [InputSpec(name="w", shape=(1,))]), networks={"first": first, "second": second}
    )
    assert run({"z": np.full(2, 3.0), "x": np.full(2, 4.0)})["y"].tolist() == [34, 34]
    assert seen == [("z",), ("w", "x")]


def counting() -> Driver:
    """A network that adds what it is given to a sum that it keeps, one for each row; sums start at 100."""

    def network(inputs: Values) -> Values:
        total = inputs["total"] + inputs["x"]
        return {"y": total, "total": total}

    program = Program(
        networks={"": Network(gives=("total",))},
        ways=(Way(calls=(Call(network=""),), reads=("total",)),),
        states=(StateTensor(name="total", shape=(), first=100.0),),
        shared=("position",),
        start="position",
    )
    return Driver(program=program, networks={"": network})


def call_at(position: int, *x: float) -> Values:
    return {"position": np.asarray(position), "x": np.asarray(x, np.float32)}


def test_a_sequence_starts_at_position_zero_and_goes_on_with_what_the_call_before_left() -> None:
    run = counting()
    found = [run(call_at(*call)) for call in ((0, 1, 2), (1, 10, 20), (5, 100, 200))]
    assert [each["y"].tolist() for each in found] == [[101, 102], [111, 122], [211, 322]]
    assert all(each.keys() == {"y"} for each in found)
    assert run(call_at(0, 7))["y"].tolist() == [107], "another starts anew, of as many rows as it has"
    assert run(call_at(1, 1))["y"].tolist() == [108]


def test_a_sequence_that_nobody_started_is_not_gone_on_with() -> None:
    run = counting()
    with pytest.raises(ToolchainError, match="sequence of 1 rows, and there is none before") as caught:
        run(call_at(3, 1))
    assert caught.value.help == "start one by a call with position = 0"
    run(call_at(0, 1, 2))
    with pytest.raises(ToolchainError, match="of 1 rows, and the one before has 2"):
        run(call_at(1, 1))


def test_what_is_done_once_is_timed_by_the_clock_of_its_device() -> None:
    gpu = FakeDevice()
    network = FakeRunner(gpu, 4.0)
    program = Program(networks={"": Network()}, ways=(Way(calls=(Call(network="", once=("x",)),)),))
    memory = Memory()
    Driver(program=program, networks={"": network}, memory=memory)({"x": np.ones(2)})
    assert memory.seconds == {"": [4.0]}


def growing(seen: list[Values]) -> Driver:
    """A network that gives new entries alone of what it keeps, which has room for five of two values each."""

    def network(inputs: Values) -> Values:
        seen.append({name: np.copy(value) for name, value in inputs.items()})
        return {"y": inputs["x"], "new": inputs["x"][:, None]}

    program = Program(
        networks={"": Network(gives=("kept",))},
        ways=(Way(calls=(Call(network=""),), reads=("kept",)),),
        states=(StateTensor(name="kept", shape=(1, 5, 2), first=-1.0, given_as="new", grows=2),),
        shared=("position",),
        start="position",
    )
    return Driver(program=program, networks={"": network})


def test_new_entries_are_written_where_the_call_stands_and_nothing_else_changes() -> None:
    seen: list[Values] = []
    run = growing(seen)
    first, second = np.ones((1, 3, 2), np.float32), np.full((1, 1, 2), 7, np.float32)
    run({"x": first, "position": np.asarray(0)})
    run({"x": second, "position": np.asarray(3)})
    run({"x": second, "position": np.asarray(4)})
    assert [each["kept"][0, 0, :, 0].tolist() for each in seen] == [[-1] * 5, [1, 1, 1, -1, -1], [1, 1, 1, 7, -1]]
    with pytest.raises(ToolchainError, match="would have 6 entries in 'kept', which has room for 5"):
        run({"x": second, "position": np.asarray(5)})
    run({"x": first, "position": np.asarray(0)})
    assert seen[-1]["kept"].tolist() == np.full((1, 1, 5, 2), -1.0).tolist(), "another sequence starts anew"


def test_rows_of_calls_that_follow_fill_a_group() -> None:
    calls = [{"x": np.array([2 * i, 2 * i + 1]), "ids": np.array([7])} for i in range(3)]
    grouped = in_groups(calls, ("ids",), 3, np.concatenate)
    assert [list(call["x"]) for call in grouped] == [[0, 1, 2, 3, 4, 5], [2, 3, 4, 5, 0, 1], [4, 5, 0, 1, 2, 3]]
    assert all(list(call["ids"]) == [7] for call in grouped)
    assert [list(call["x"]) for call in in_groups(calls, ("ids",), 2, np.concatenate)] == [[0, 1], [2, 3], [4, 5]]


def test_calls_of_other_sizes_do_not_fill_one() -> None:
    calls = [{"x": np.zeros((2, 4))}, {"x": np.ones((2, 5))}]
    assert [call["x"].shape for call in in_groups(calls, (), 4, np.concatenate)] == [(4, 4), (4, 5)]
