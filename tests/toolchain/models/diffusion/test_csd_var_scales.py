from __future__ import annotations

import math

import pytest
import torch

from enginewright.models.diffusion.csd_var import scales


def test_guidance_grows_from_nothing_at_the_first_scale_to_all_at_the_last() -> None:
    one, none = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    assert torch.equal(scales.guided(one, none, 0, scales=10), one)
    torch.testing.assert_close(scales.guided(one, none, 9, scales=10), 7 * one - 6 * none)
    torch.testing.assert_close(scales.guided(one, none, 3, scales=10), 3 * one - 2 * none)


def test_codes_that_are_not_likely_are_not_drawn() -> None:
    logits = torch.tensor([[[0.4, 0.3, 0.2, 0.1]]]).log()
    assert scales.keep_likely(logits, top_k=3, top_p=1.0).isfinite().tolist() == [[[True, True, True, False]]]
    assert scales.keep_likely(logits, top_k=4, top_p=0.65).isfinite().tolist() == [[[True, True, False, False]]]
    assert scales.keep_likely(logits, top_k=4, top_p=0.01).isfinite().tolist() == [[[True, False, False, False]]]


def test_style_and_content_have_scales_of_their_own_in_the_loss() -> None:
    sides = scales.SCALES_512
    ids = torch.zeros(1, 2240, dtype=torch.long)
    logits = torch.zeros(1, 2240, 2)
    logits[0, :14, 0] = 3  # the first three scales are told well
    style, content = math.log(1 + math.exp(-3)), math.log(2)
    found = {
        (of_style, split): float(scales.tuning_loss(logits, ids, sides, of_style=of_style, split=split))
        for of_style in (True, False)
        for split in scales.STYLE_SCALES
    }
    assert found[True, "released-tuning"] == pytest.approx(style + 0.1 * content, rel=1e-5)
    assert found[False, "released-tuning"] == pytest.approx(content, rel=1e-5)
    assert found[True, "paper"] == pytest.approx((14 * style + 1024 * content) / 1038 + 0.1 * content, rel=1e-5)
    assert found[True, "released-drawing"] == pytest.approx((14 * style + 16 * content) / 30 + 0.1 * content, rel=1e-5)
