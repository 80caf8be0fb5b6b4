"""What recovered students are held against: the middle of the seeds, figure by figure."""

from enginewright.reports.benchmarks.recovery import FEWER, medians


def row(what, seed, error, distance):
    return {"what": what, "seed": seed, "recovered": {"relative_l2": error, "frechet_ratio": distance}}


def test_the_middle_of_the_seeds_is_taken_figure_by_figure():
    rows = [row("a", 0, 0.1, 9.0), row("b", 0, 0.5, 1.0), row("a", 1, 0.3, 3.0), row("a", 2, 0.20004, 4.0)]
    assert medians(rows) == {
        "a": {"relative_l2": 0.2, "frechet_ratio": 4.0},
        "b": {"relative_l2": 0.5, "frechet_ratio": 1.0},
    }


def test_experts_and_the_narrower_layer_have_as_many_units_active():
    for name, step in FEWER.items():
        active = float(name.partition(" ")[0])
        given = step.model_dump()
        if name.endswith("width"):
            assert 1 - given["share"] == active
        else:
            assert given["shared"] + (1 - given["shared"]) * given["top_k"] / given["experts"] == active
