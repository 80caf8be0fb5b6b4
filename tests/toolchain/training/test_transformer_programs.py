"""What trains the shipped programs: that a learner is the authors' network, and ends in the program it is said to."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from enginewright.models.blocks.sequences import TASKS
from enginewright.models.language.transformer_programs import PUBLISHED, STEP, TINY, Config
from enginewright.training import transformer_programs as training
from enginewright.training.transformer_programs import Learner, program_from

IDS = torch.tensor([[1, 2, 3, 5, 4, 2], [1, 5, 5, 2, 0, 0], [1, 4, 3, 0, 0, 0]])
MODE = (  # logits of the 13 tokens that are no padding, choices being modes
    *(-4.22077, 3.39636, 0.39610, -0.05254, 2.12324, 1.90787, -1.27730, 0.49402, 3.00215, -3.11007, 1.89287, 1.71132),
    *(-3.26212, 1.75639, 1.72541, -4.16647, 3.61658, 1.41834, -2.19440, 0.46375, 1.88204, 0.75465, 0.60659, -1.62997),
    *(2.07531, -0.43151, 0.60465, -1.03942, 0.24671, 0.87758, -1.34354, 2.46497, -1.07305, -0.15326, 0.88299, -0.69452),
    *(0.17003, 0.14629, 1.55882),
)
MEAN = (  # the same where choices are softmax weights at temperature 0.5
    *(-2.22719, 3.22451, -0.49247, -1.50546, 1.62023, 0.69429, -2.45914, 2.42868, -0.28702, -1.17829, 1.79135),
    *(-0.22827, -1.60927, 1.65803, 0.60661, -3.38703, 3.35038, 0.30670, -0.38822, 1.59738, -0.59939, 0.37702),
    *(0.56762, -1.31212, 0.01138, 0.94820, -1.13905, -1.80576, 1.78754, 0.12852, -0.70312, 2.12956, -0.96636),
    *(0.08743, 0.72558, -0.75600, -1.43489, 1.85559, -0.68095),
)


def numbered(config: Config) -> Learner:
    """The learner with weights that follow from their number alone, on any machine."""
    learner = Learner(config).double().requires_grad_(False)
    for index, weight in enumerate(learner.parameters()):
        count = torch.arange(weight.numel(), dtype=torch.float64)
        weight.copy_(torch.sin(1.7 * count + 0.01 * count**2 + index).view(weight.shape))
    return learner


@pytest.mark.parametrize(
    ("size", "count"),
    [
        ("reverse", 10_027),
        ("histogram", 2_969),
        ("double-histogram", 8_718),
        ("sort", 17_497),
        ("most-frequent", 17_939),
        ("dyck-1", 20_961),
        ("dyck-2", 30_795),
    ],
)
def test_a_learner_has_as_many_weights_as_the_authors_network(size: str, count: int) -> None:
    assert sum(p.numel() for p in Learner(PUBLISHED[size]).parameters()) == count


def test_the_same_weights_give_the_logits_of_the_authors_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recorded in float64 from princeton-nlp/TransformerPrograms at 59970de; no count reaches the most."""
    learner = numbered(replace(TINY, most=1000))
    found = learner(IDS, 0)[IDS != 0].flatten()
    torch.testing.assert_close(found, torch.tensor(MODE).double(), rtol=0, atol=1e-5)
    monkeypatch.setattr(training, "choose", lambda logits, temperature: (logits / temperature).softmax(-1))
    found = learner(IDS, 0.5)[IDS != 0].flatten()
    torch.testing.assert_close(found, torch.tensor(MEAN).double(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", ["histogram", "sort", "dyck-2"])
@torch.no_grad()
def test_a_program_gives_the_logits_of_its_learner_but_for_rounded_scores(size: str) -> None:
    torch.manual_seed(0)
    config = PUBLISHED[size]
    learner = Learner(config).double()
    ids = torch.from_numpy(TASKS[size].sequences(300, seed=0)[0])
    real = ids != 0
    program = program_from(learner)
    wanted, found = learner(ids, 0)[real], program(ids)[real]
    bound = (config.variables(config.layers) + config.counts(config.layers) * 4) * STEP / 2
    assert (found - wanted).abs().max() < bound < wanted.std()
    assert all((weight / STEP == (weight / STEP).round()).all() for weight in program.parameters())


def test_choices_are_one_hot_at_temperature_0_and_nearly_so_at_the_coldest() -> None:
    torch.manual_seed(0)
    logits = torch.randn(1000, 5)
    mode = training.choose(logits, 0)
    assert torch.equal(mode.argmax(1), logits.argmax(1))
    assert torch.equal(mode.sum(1), torch.ones(1000))
    cold, warm = (training.choose(logits, t).amax(1).mean() for t in (training.COLDEST, training.HOTTEST))
    assert cold > 0.99 > 0.6 > warm
    picked = training.choose(logits.new_tensor([1.0, 0.0]).expand(20_000, 2), training.COLDEST).mean(0)
    torch.testing.assert_close(picked, logits.new_tensor([1.0, 0.0]).softmax(0), rtol=0, atol=0.02)


def test_a_few_updates_lower_the_loss_of_a_learner() -> None:
    ids, labels = TASKS["histogram"].sequences(1000, seed=0)
    config = PUBLISHED["histogram"]
    untrained, trained = (
        training.accuracy(
            program_from(training.train(config, ids, labels, seed=1, epochs=epochs, batch=100, rate=0.05)), ids, labels
        )
        for epochs in (1, 10)
    )
    assert trained > untrained + 0.1
