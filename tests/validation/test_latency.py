import gc

import numpy as np
import pytest

from enginewright.ground.errors import ToolchainError
from enginewright.validation import latency
from enginewright.validation.latency import Samples, count_outliers, summarise, time_in_turns, time_interleaved
from tests.devices import FakeDevice, FakeRunner

INPUTS = {"x": np.ones(2, np.float32)}
NAMES = ("original", "engine", "other")


def timed(*, names=NAMES, warm_up=0, samples=7, seed=0, block=3):
    """The calls in their order, and the samples."""
    calls = []

    def runner(name):
        return lambda inputs: calls.append(name) or inputs

    taken = time_interleaved(
        {name: runner(name) for name in names},
        INPUTS,
        warm_up=warm_up,
        samples=samples,
        seed=seed,
        block=block,
        settle_s=0,
    )
    return calls, taken


def turns(calls):
    """Runs of equal names: (name, calls)."""
    starts = [i for i in range(len(calls)) if i == 0 or calls[i] != calls[i - 1]]
    return [(calls[a], b - a) for a, b in zip(starts, [*starts[1:], len(calls)], strict=True)]


class TestTimeInterleaved:
    def test_every_runner_gets_as_many_samples_as_asked(self):
        _, taken = timed(samples=7)
        assert {name: len(samples) for name, samples in taken.items()} == dict.fromkeys(NAMES, 7)
        assert all(second >= 0 for samples in taken.values() for second in samples)

    def test_each_switch_costs_one_uncounted_call(self):
        calls, _ = timed(names=("original", "engine"), samples=60)
        assert {length for _, length in turns(calls)} == {1 + 3, 1 + 3 + 3}  # two turns where no switch lay between

    def test_all_take_a_turn_in_every_round(self):
        calls, _ = timed(samples=30, block=1)
        seen = dict.fromkeys(NAMES, 0)
        for name, length in turns(calls):
            seen[name] += length - 1  # less the uncounted one
            assert max(seen.values()) - min(seen.values()) <= 2

    def test_the_seed_shuffles_the_turns(self):
        orders = {seed: [name for name, _ in turns(timed(samples=30, seed=seed)[0])] for seed in (1, 2)}
        assert orders[1] != orders[2]
        assert orders[1] == [name for name, _ in turns(timed(samples=30, seed=1)[0])]
        assert len(set(zip(orders[1], orders[1][1:], strict=False))) == 6  # everyone follows everyone

    def test_warm_up_comes_first_and_is_not_counted(self):
        calls, taken = timed(warm_up=4, samples=2)
        assert calls[:12] == ["original"] * 4 + ["engine"] * 4 + ["other"] * 4
        assert len(taken["engine"]) == 2

    def test_samples_are_whole_calls_and_uncounted_calls_are_left_out(self, monkeypatch):
        """A clock that moves only inside a call: 5 s in the engine, 2 s in the original, 100 s after a switch."""
        now, last = [0.0], [""]
        monkeypatch.setattr("enginewright.validation.latency.time.perf_counter", lambda: now[0])

        def runner(name, seconds):
            def call(inputs):
                now[0] += seconds if last[0] == name else 100.0
                last[0] = name
                return inputs

            return call

        taken = time_interleaved(
            {"original": runner("original", 2.0), "engine": runner("engine", 5.0)}, INPUTS, warm_up=1, samples=8, seed=0
        )
        assert taken == {"original": [2.0] * 8, "engine": [5.0] * 8}

    def test_quick_runners_settle_for_the_asked_time(self, monkeypatch):
        now, calls = [0.0], []
        monkeypatch.setattr("enginewright.validation.latency.time.perf_counter", lambda: now[0])

        def call(inputs):
            now[0] += 0.01
            calls.append(now[0])
            return inputs

        time_interleaved({"only": call}, INPUTS, warm_up=0, samples=3, seed=0, settle_s=0.095)
        assert len(calls) == 10 + 3

    def test_no_garbage_is_collected_meanwhile_and_the_switch_is_put_back(self):
        seen = []

        def runner(inputs):
            seen.append(gc.isenabled())
            if len(seen) == 5:
                raise RuntimeError("engine died")
            return inputs

        assert gc.isenabled()
        with pytest.raises(RuntimeError, match="engine died"):
            time_interleaved({"engine": runner}, INPUTS, warm_up=0, samples=9, seed=0, settle_s=0)
        assert not any(seen)
        assert gc.isenabled()

    def test_progress_is_told(self):
        told = []
        runners = {"engine": lambda inputs: inputs}
        time_interleaved(runners, INPUTS, warm_up=1, samples=4, seed=0, say=told.append, settle_s=0)
        assert told == ["warming up engine", "timing round 1 of 2", "timing round 2 of 2"]

    @pytest.mark.parametrize(
        ("faulty", "message"),
        [({"samples": 0}, "samples is 0"), ({"warm_up": -1}, "warm_up is -1"), ({"block": 0}, "block is 0")],
    )
    def test_counts_that_time_nothing_are_refused(self, faulty, message):
        with pytest.raises(ToolchainError, match=message):
            timed(**faulty)

    def test_nothing_to_time_is_refused(self):
        with pytest.raises(ToolchainError, match="0 runners"):
            timed(names=())


class TestSummarise:
    def test_by_hand(self):
        original = [float(second) for second in range(1, 31)]
        summary = summarise(original, [second / 2 for second in original], seed=0)
        assert summary.median_s == 7.75
        assert summary.original_median_s == 15.5
        assert summary.p90_s == pytest.approx(13.55)
        assert summary.p99_s == pytest.approx(14.855)
        assert summary.spread == pytest.approx(14.5 / 15.5)
        assert (summary.ratio, summary.ratio_low, summary.ratio_high) == (0.5, 0.5, 0.5)

    def test_steady_and_faster_leaves_no_doubt(self):
        rng = np.random.default_rng(0)
        original, candidate = rng.normal(1, 0.01, 30), rng.normal(0.7, 0.01, 30)
        summary = summarise(original, candidate, seed=0)
        assert summary.ratio_low < 0.7 < summary.ratio_high < 0.75
        assert summary.warnings == []

    def test_equal_speed_is_said(self):
        original, candidate = np.random.default_rng(0).normal(1, 0.02, (2, 30))
        (warning,) = summarise(original, candidate, seed=0).warnings
        assert "no measurable difference" in warning

    def test_noise_on_either_side_is_said(self):
        rng = np.random.default_rng(0)
        steady, noisy = rng.normal(1, 0.01, 30), rng.uniform(3, 7, 30)
        (warning,) = summarise(noisy, steady, seed=0).warnings
        assert "the spread of the original" in warning
        assert "unsafe" in warning
        (warning,) = summarise(steady, noisy, seed=0).warnings
        assert "the spread of the engine" in warning

    def test_few_samples_are_said(self):
        (warning,) = summarise([2.0] * 9, [1.0] * 9, seed=0).warnings
        assert "9 samples in 3 rounds are too few" in warning
        (warning,) = summarise([2.0] * 12, [1.0] * 12, seed=0, block=6).warnings
        assert "12 samples in 2 rounds are too few" in warning
        (warning,) = summarise([2.0] * 20, [1.0] * 20, seed=0).unsafe
        assert "20 samples in 7 rounds are too few" in warning
        assert summarise([2.0] * 24, [1.0] * 24, seed=0).warnings == []

    def test_outliers_are_counted(self):
        steady = np.random.default_rng(0).normal(1, 0.01, 30)
        candidate = steady / 2
        candidate[[3, 20]] = 40.0
        summary = summarise(steady, candidate, seed=0)
        assert summary.warnings == ["2 of 30 samples of the engine are outliers; something else ran beside it"]
        assert summary.median_s == pytest.approx(0.5, rel=0.02)

    def test_what_makes_a_ratio_unsafe_is_told_from_what_is_only_worth_knowing(self):
        rng = np.random.default_rng(0)
        steady, noisy = rng.normal(1, 0.01, 30), rng.uniform(3, 7, 30)
        assert summarise(steady, noisy, seed=0).unsafe == summarise(steady, noisy, seed=0).warnings
        spiky = steady / 2
        spiky[3] = 40.0
        doubtful = summarise(steady, spiky, seed=0)
        assert (doubtful.unsafe, len(doubtful.warnings)) == ([], 1)
        same = summarise(steady, rng.normal(1, 0.01, 30), seed=0)
        assert (same.unsafe, len(same.warnings)) == ([], 1)

    def test_the_originals_own_median_has_an_interval(self):
        original = np.random.default_rng(0).normal(2, 0.02, 30)
        summary = summarise(original, original / 2, seed=0)
        assert 1.95 < summary.original_low_s < summary.original_median_s < summary.original_high_s < 2.05

    def test_unpaired_samples_are_our_bug(self):
        with pytest.raises(ValueError, match="3 of the original, 2 of the candidate"):
            summarise([1.0] * 3, [1.0] * 2, seed=0)


def samples(walls, interrupted):
    """Steady calls of one runner, each interrupted so often."""
    walls = [float(wall) for wall in walls]
    return Samples(wall_s=walls, cpu_s=walls, interrupted=[interrupted] * len(walls))


class TestContention:
    """The trap: a runtime that stalls at a barrier is punished in every call, evenly, so its spread is small."""

    def test_a_runner_that_others_interrupt_in_every_call_has_no_safe_ratio_however_steady(self):
        rng = np.random.default_rng(0)
        stalled, quick = samples(rng.normal(0.0152, 0.0001, 30), 4), samples(rng.normal(7e-5, 1e-6, 30), 0)
        for original, engine, who in ((stalled, quick, "the original"), (quick, stalled, "the engine")):
            (reason,) = summarise(original, engine, seed=0).unsafe
            assert f"other programs interrupted {who} in 30 of 30 calls, 4 times" in reason
        assert summarise(stalled.wall_s, quick.wall_s, seed=0).unsafe == []

    @pytest.mark.parametrize(("wall", "times", "unsafe"), [(2.0, 10, False), (0.1, 4, True), (1e-5, 1, True)])
    def test_interruptions_are_weighed_against_the_time_of_a_call(self, wall, times, unsafe):
        walls = np.random.default_rng(0).normal(wall, wall / 100, 30)
        assert bool(summarise(samples(walls, times), samples(walls / 2, 0), seed=0).unsafe) == unsafe

    def test_a_rare_interruption_does_no_harm(self):
        walls = np.random.default_rng(0).normal(0.01, 0.0001, 30)
        some = Samples(wall_s=list(walls), cpu_s=list(walls), interrupted=[1] * 10 + [0] * 20)
        assert summarise(some, samples(walls / 2, 0), seed=0).unsafe == []

    def test_a_system_that_does_not_count_them_is_no_fault(self, monkeypatch):
        monkeypatch.setattr(latency, "_interruptions", lambda: None)
        taken = time_in_turns({"a": lambda inputs: inputs}, INPUTS, warm_up=0, samples=24, seed=0, settle_s=0)["a"]
        assert (len(taken.wall_s), len(taken.cpu_s), taken.interrupted) == (24, 24, [])
        assert latency._contention("a", taken) == []

    def test_they_are_counted_call_by_call(self, monkeypatch):
        count = [0]

        def call(inputs):
            count[0] += 3
            return inputs

        monkeypatch.setattr(latency, "_interruptions", lambda: count[0])
        taken = time_in_turns({"a": call}, INPUTS, warm_up=1, samples=5, seed=0, settle_s=0)["a"]
        assert taken.interrupted == [3] * 5


def test_outliers_of_a_known_cloud():
    """Median 3, median absolute deviation 1: the fence stands at 14.826 from the median."""
    assert count_outliers(np.array([1.0, 2.0, 3.0, 4.0, 5.0])) == 0
    assert count_outliers(np.array([1.0, 2.0, 3.0, 4.0, 17.8])) == 0
    assert count_outliers(np.array([1.0, 2.0, 3.0, 4.0, 17.9])) == 1


class TestDevices:
    """A launch returns at once; the work behind it takes 2 s and 5 s."""

    def test_a_time_is_that_of_the_work_and_not_of_its_launch(self):
        device = FakeDevice()
        runners = {"original": FakeRunner(device, 2.0), "engine": FakeRunner(device, 5.0)}
        taken = time_interleaved(runners, INPUTS, warm_up=2, samples=7, seed=0)
        assert taken == {"original": [2.0] * 7, "engine": [5.0] * 7}

    def test_inputs_are_placed_once_and_every_call_finds_them_there(self):
        device = FakeDevice()
        runner = FakeRunner(device, 2.0)
        time_interleaved({"engine": runner}, INPUTS, warm_up=2, samples=7, seed=0)
        assert device.placed == 1
        assert set(runner.taken) == {"device"}

    def test_a_runner_that_cannot_take_inputs_there_takes_arrays_and_is_timed_by_its_clock_all_the_same(self):
        device = FakeDevice()
        runner = FakeRunner(device, 2.0)
        runner.to_device = None
        taken = time_interleaved({"engine": runner}, INPUTS, warm_up=1, samples=3, seed=0, settle_s=0)
        assert taken == {"engine": [2.0] * 3}
        assert set(runner.taken) == {"host"}

    def test_settling_waits_for_the_device_and_fills_no_queue(self):
        device = FakeDevice()
        runner = FakeRunner(device, 0.01)
        time_interleaved({"engine": runner}, INPUTS, warm_up=0, samples=3, seed=0, settle_s=0.095)
        assert len(runner.taken) == 10 + 3

    def test_warm_up_is_done_before_another_runner_starts(self):
        device, other = FakeDevice(), FakeDevice("cuda:1")
        queued = []
        runner = FakeRunner(other, 1.0, lambda array: queued.append(device.queued) or array)
        runners = {"first": FakeRunner(device, 1.0), "second": runner}
        time_interleaved(runners, INPUTS, warm_up=3, samples=3, seed=0, settle_s=0)
        assert set(queued) == {0.0}

    def test_the_host_keeps_its_own_clock(self, monkeypatch):
        device, now = FakeDevice(), [0.0]
        monkeypatch.setattr("enginewright.validation.latency.time.perf_counter", lambda: now[0])

        def slow(inputs):
            now[0] += 3.0
            return inputs

        taken = time_interleaved(
            {"host": slow, "device": FakeRunner(device, 2.0)}, INPUTS, warm_up=1, samples=6, seed=0
        )
        assert taken == {"host": [3.0] * 6, "device": [2.0] * 6}
