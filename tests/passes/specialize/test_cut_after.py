import pytest
import torch
from torch import nn

from enginewright.ground.errors import ToolchainError
from enginewright.passes.contract import Context
from enginewright.passes.specialize.cut_after import CutAfter
from tests.engines import built, exported, in_onnxruntime
from tests.passes.conftest import SUBJECTS


def cut(subject, **parameters):
    return CutAfter(**parameters).apply(subject.copy(), Context(calibration=[subject.inputs], example=subject.inputs))


@pytest.mark.parametrize("name", ["vit_sdpa", "bert_sdpa"])
@pytest.mark.parametrize("layer", [1, 2, -1, -2])
def test_a_cut_encoder_gives_the_hidden_state_that_was_asked_for(name, layer):
    subject = SUBJECTS[name]()
    with torch.no_grad():
        states = subject.model(**subject.inputs, output_hidden_states=True).hidden_states
    result = cut(subject, layer=layer)
    torch.testing.assert_close(subject.output(result.model), states[layer], atol=1e-5, rtol=0)
    assert not torch.allclose(states[1], states[2], atol=1e-2)


def test_a_final_norm_can_stay():
    subject = SUBJECTS["vit_sdpa"]()
    with torch.no_grad():
        state = subject.model(**subject.inputs, output_hidden_states=True).hidden_states[1]
        wanted = subject.model.layernorm(state)
    torch.testing.assert_close(
        subject.output(cut(subject, layer=1, final_norm="keep").model), wanted, atol=1e-5, rtol=0
    )


def test_the_blocks_are_gone():
    subject = SUBJECTS["bert_sdpa"]()
    result = cut(subject, layer=1)
    block = sum(p.numel() for p in subject.model.encoder.layer[1].parameters())
    assert result.changed == ("encoder.layer",)
    assert result.before.parameter_count - result.after.parameter_count == block
    assert result.before.bytes - result.after.bytes == 4 * block


def test_nothing_to_cut_says_so(dit):
    result = cut(dit, layer=2, final_norm="keep")
    assert result.changed == ()
    assert result.plan.skipped == {"blocks": "state 2 is what its last block gives"}


def test_a_cut_model_exports_runs_and_builds(tmp_path):
    subject = SUBJECTS["vit_sdpa"]()
    model = cut(subject, layer=1).model
    path = exported(model, subject.inputs, tmp_path, outputs=("last_hidden_state", "pooler_output"))
    torch.testing.assert_close(in_onnxruntime(path, subject.inputs), subject.output(model), atol=1e-5, rtol=0)
    assert list(built(path, subject.inputs).iterdir())


# What a user can mend


@pytest.mark.parametrize("layer", [0, 3, -4])
def test_a_layer_that_is_not_there_is_quoted(dit, layer):
    with pytest.raises(ToolchainError, match=rf"layer is {layer}; the stack has blocks 1 to 2"):
        CutAfter(layer=layer).plan(dit.model, Context(calibration=[dit.inputs]))


def test_a_stack_must_be_told(dit):
    two = nn.ModuleDict({"a": dit.copy(), "b": dit.copy()})
    with pytest.raises(ToolchainError, match=r"There are 2: a.blocks, b.blocks"):
        CutAfter().plan(two, Context())
    with pytest.raises(ToolchainError, match=r"no stack of blocks named 'c\.blocks'"):
        CutAfter(stack="c.blocks").plan(two, Context())
    with pytest.raises(ToolchainError, match="There are 0: none that a family knows"):
        CutAfter().plan(nn.Linear(2, 2), Context())


def test_the_norm_needs_a_call(dit):
    with pytest.raises(ToolchainError, match="follows one call of the model and got none"):
        CutAfter().plan(dit.model, Context())


def test_a_plan_for_another_stack_is_refused(dit):
    step = CutAfter(layer=1)
    plan = step.plan(dit.model, Context(calibration=[dit.inputs]))
    once = step.rewrite(dit.copy(), plan)
    with pytest.raises(ToolchainError, match="for a stack of 2 blocks; this one has 1"):
        step.rewrite(once, plan)


def test_what_is_intended_is_the_original_cut(dit):
    step = CutAfter(layer=1, final_norm="keep")
    plan = step.plan(dit.model, Context())
    reference = step.intended(dit.model, plan, Context())
    assert (len(reference.blocks), len(dit.model.blocks)) == (1, 2)
    assert torch.equal(dit.output(reference), dit.output(step.rewrite(dit.copy(), plan)))
