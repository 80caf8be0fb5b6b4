import json
import re

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from enginewright.ground.errors import ToolchainError
from enginewright.passes.contract import Context
from enginewright.passes.specialize import fold_adapters
from enginewright.passes.specialize.fold_adapters import FoldAdapters

PATHS = ("blocks.0.attn.qkv", "blocks.1.mlp.fc1", "x_embedder.proj")


def factors(model, paths=PATHS, rank=3):
    """Random A and B for each layer."""
    found = {}
    for path in paths:
        weight = model.get_submodule(path).weight
        rest = [1] * (weight.ndim - 2)
        found[path] = torch.randn(rank, *weight.shape[1:]) / 4, torch.randn(weight.shape[0], rank, *rest) / 4
    return found


def beside(model, pairs, factor):
    """The model with each adapter run beside its layer."""
    for path, (down, up) in pairs.items():

        def add(layer, args, result, down=down, up=up):
            if isinstance(layer, nn.Conv2d):
                return result + factor * F.conv2d(F.conv2d(args[0], down, stride=layer.stride), up)
            return result + factor * F.linear(F.linear(args[0], down), up)

        model.get_submodule(path).register_forward_hook(add)
    return model


FORMS = {
    "peft": ("base_model.model.{}.lora_A.weight", "base_model.model.{}.lora_B.weight"),
    "peft_default": ("{}.lora_A.default.weight", "{}.lora_B.default.weight"),
    "diffusers": ("unet.{}.lora.down.weight", "unet.{}.lora.up.weight"),
    "down_up": ("{}.lora_down.weight", "{}.lora_up.weight"),
}


def written(folder, pairs, form="peft", more=None):
    down, up = FORMS[form]
    tensors = {down.format(path): pair[0] for path, pair in pairs.items()}
    tensors |= {up.format(path): pair[1] for path, pair in pairs.items()}
    save_file({**tensors, **(more or {})}, folder / "lora.safetensors")
    return Context(folder=folder)


@pytest.mark.parametrize("form", FORMS)
def test_a_folded_adapter_is_one_that_runs_beside(dit, tmp_path, form):
    pairs = factors(dit.model)
    before = dit.output(dit.model)
    step = FoldAdapters(file="lora.safetensors", scale=0.5, alpha=6)
    result = step.apply(dit.copy(), written(tmp_path, pairs, form))

    wanted = dit.output(beside(dit.copy(), pairs, 0.5 * 6 / 3))
    torch.testing.assert_close(dit.output(result.model), wanted, atol=1e-5, rtol=1e-5)
    assert (wanted - before).abs().max() > 1e-2
    assert set(result.changed) == set(PATHS)
    assert result.before == result.after
    assert result.plan.facts == {"fusable": True, "unmatched": []}


@pytest.mark.parametrize(("key", "parameter", "factor"), [(None, None, 1), (None, 12, 4), (6.0, None, 2), (6.0, 12, 2)])
def test_alpha_is_the_files_or_the_parameters_or_the_rank(dit, tmp_path, key, parameter, factor):
    pairs = factors(dit.model, PATHS[:1])
    more = {} if key is None else {f"{PATHS[0]}.alpha": torch.tensor(key)}
    context = written(tmp_path, pairs, more=more, form="down_up")
    plan = FoldAdapters(file="lora.safetensors", alpha=parameter).plan(dit.model, context)
    assert plan.choice == {PATHS[0]: {"rank": 3, "factor": factor}}


def test_what_is_intended_has_the_adapter_and_the_original_has_not(dit, tmp_path):
    step = FoldAdapters(file="lora.safetensors", alpha=3)
    before = dit.output(dit.model)
    plan = step.plan(dit.model, written(tmp_path, factors(dit.model)))
    intended = step.intended(dit.model, plan, Context())
    folded = dit.output(step.rewrite(dit.copy(), plan))
    torch.testing.assert_close(dit.output(intended), folded, atol=1e-5, rtol=1e-5)
    assert (folded - before).abs().max() > 1e-2
    assert torch.equal(dit.output(dit.model), before)


def test_a_mistake_in_the_fold_shows_against_what_is_intended(dit, tmp_path, monkeypatch):
    step = FoldAdapters(file="lora.safetensors", alpha=3)
    plan = step.plan(dit.model, written(tmp_path, factors(dit.model)))
    true = fold_adapters.product
    monkeypatch.setattr(fold_adapters, "product", lambda *given: 0.5 * true(*given))
    wrong = dit.output(step.rewrite(dit.copy(), plan))
    assert (dit.output(step.intended(dit.model, plan, Context())) - wrong).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("config", "factor"),
    [
        ({"r": 3, "lora_alpha": 12}, 4),
        ({"r": 3, "lora_alpha": 12, "peft_type": "LORA"}, 4),
        ({"r": 3, "lora_alpha": 12, "use_rslora": True}, 12 / 3**0.5),
        ({"r": 8, "lora_alpha": 12, "rank_pattern": {"attn.qkv": 3}, "alpha_pattern": {"qkv": 30}}, 10),
        ({"r": 3, "lora_alpha": 12, "alpha_pattern": {"proj": 30}}, 4),
    ],
)
def test_alpha_is_what_pefts_configuration_says(dit, tmp_path, config, factor):
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    context = written(tmp_path, factors(dit.model, PATHS[:1]))
    plan = FoldAdapters(file="lora.safetensors").plan(dit.model, context)
    assert plan.choice[PATHS[0]]["factor"] == pytest.approx(factor)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (None, "neither 'lora.safetensors' nor 'adapter_config.json' beside it says the adapter's alpha"),
        ({"r": 4, "lora_alpha": 8}, "says rank 4, the file has 3"),
        ({"r": 3, "lora_alpha": 8, "use_dora": True}, "DoRA scales each column"),
        ({"r": 3, "lora_alpha": 8, "peft_type": "LOHA"}, "is of 'LOHA'; only LoRA adapters are folded"),
        ({"r": 3, "lora_alpha": "x"}, "lora_alpha 'x', which is no number"),
    ],
)
def test_an_adapter_whose_strength_nobody_says_is_refused(dit, tmp_path, config, said):
    if config is not None:
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    context = written(tmp_path, factors(dit.model, PATHS[:1]))
    with pytest.raises(ToolchainError, match=re.escape(said)):
        FoldAdapters(file="lora.safetensors").plan(dit.model, context)


def test_keys_of_kohya_name_layers_without_dots(dit, tmp_path):
    pairs = factors(dit.model)
    more = {f"lora_unet_{path.replace('.', '_')}.alpha": torch.tensor(6.0) for path in pairs}
    context = written(
        tmp_path, {f"lora_unet_{p.replace('.', '_')}": pair for p, pair in pairs.items()}, "down_up", more
    )
    result = FoldAdapters(file="lora.safetensors").apply(dit.copy(), context)
    torch.testing.assert_close(
        dit.output(result.model), dit.output(beside(dit.copy(), pairs, 2.0)), atol=1e-5, rtol=1e-5
    )


def test_what_matches_nothing_is_listed(dit, tmp_path):
    pairs = factors(dit.model, PATHS[:1])
    more = {"blocks.9.attn.qkv.lora_A.weight": torch.zeros(1), "text.bias": torch.zeros(1)}
    context = written(tmp_path, pairs, more=more)
    with pytest.raises(ToolchainError, match="2 entries of 'lora.safetensors' match no layer") as caught:  # noqa: RUF043
        FoldAdapters(file="lora.safetensors", alpha=3).plan(dit.model, context)
    assert caught.value.help == "unmatched: blocks.9.attn.qkv (down only), text.bias"
    plan = FoldAdapters(file="lora.safetensors", alpha=3, partly=True).plan(dit.model, context)
    assert plan.facts["fusable"] is False
    assert plan.facts["unmatched"] == ["blocks.9.attn.qkv (down only)", "text.bias"]


def test_a_recipe_that_moves_takes_its_file_along():
    step = FoldAdapters(file="lora.safetensors").moved(lambda path: f"../{path}", str)
    assert step.file == "../lora.safetensors"
    assert FoldAdapters().moved(lambda path: f"../{path}", str).file == ""


# What a user can mend


def test_files_that_cannot_be_read_are_named(dit, tmp_path):
    with pytest.raises(ToolchainError, match="needs file"):
        FoldAdapters().plan(dit.model, Context())
    with pytest.raises(ToolchainError, match="there is no adapter file 'none'"):
        FoldAdapters(file="none").plan(dit.model, Context(folder=tmp_path))
    (tmp_path / "torn").write_bytes(b"abc")
    with pytest.raises(ToolchainError, match="'torn' is not a whole safetensors file"):
        FoldAdapters(file="torn").plan(dit.model, Context(folder=tmp_path))


def test_an_adapter_for_another_model_is_refused(dit, tmp_path):
    context = written(tmp_path, factors(dit.model))
    with pytest.raises(ToolchainError, match="adapts a layer of this model"):
        FoldAdapters(file="lora.safetensors").plan(nn.Linear(2, 2), context)


def test_factors_that_do_not_fit_are_quoted(dit, tmp_path):
    pairs = {PATHS[0]: (torch.zeros(3, 31), torch.zeros(96, 3))}
    with pytest.raises(ToolchainError, match=r"factors \(3, 31\) and \(96, 3\) do not make a weight of \(96, 32\)"):
        FoldAdapters(file="lora.safetensors", alpha=3).plan(dit.model, written(tmp_path, pairs))
