import json
import re
import warnings

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from enginewright.ground.errors import ToolchainError
from enginewright.passes.contract import Context
from enginewright.passes.kernel import plain
from enginewright.passes.specialize import fold_adapters
from enginewright.passes.specialize.adapter_files import FoldedAdapter
from enginewright.passes.specialize.fold_adapters import AdapterFacts, FoldAdapters
from tests.passes.specialize.adapters import FORMS, PATHS, factors, flux, unet, written


def beside(model, pairs, factor):
    """The model with each adapter run beside its layer."""
    for path, (down, up) in pairs.items():

        def add(layer, args, result, down=down, up=up):
            if isinstance(layer, nn.Conv2d):
                return result + factor * F.conv2d(F.conv2d(args[0], down, stride=layer.stride), up)
            return result + factor * F.linear(F.linear(args[0], down), up)

        model.get_submodule(path).register_forward_hook(add)
    return model


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
    words = "'lora.safetensors' is fusable: it went into the weights of 3 layers; graph and cost are the base's"
    assert result.plan.facts == AdapterFacts(fusable=True, unmatched=(), notes=(words,))


@pytest.mark.parametrize(("key", "parameter", "factor"), [(None, None, 1), (None, 12, 4), (6.0, None, 2), (6.0, 12, 2)])
def test_alpha_is_the_files_or_the_parameters_or_the_rank(dit, tmp_path, key, parameter, factor):
    pairs = factors(dit.model, PATHS[:1])
    more = {} if key is None else {f"{PATHS[0]}.alpha": torch.tensor(key)}
    context = written(tmp_path, pairs, more=more, form="down_up")
    plan = FoldAdapters(file="lora.safetensors", alpha=parameter).plan(dit.model, context)
    assert plan.choice == {PATHS[0]: FoldedAdapter(rank=3, factor=factor)}


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
    true = fold_adapters.folded
    monkeypatch.setattr(
        fold_adapters, "folded", lambda layer, *given: {"weight": (true(layer, *given)["weight"] + layer.weight) / 2}
    )
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
    assert plan.choice[PATHS[0]].factor == pytest.approx(factor)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (None, "neither 'lora.safetensors' nor 'adapter_config.json' beside it says the adapter's alpha"),
        ({"r": 4, "lora_alpha": 8}, "says rank 4, the file has 3"),
        ({"r": 3, "lora_alpha": 8, "use_dora": True}, "says use_dora, and 'lora.safetensors' has no magnitudes"),
        ({"r": 3, "lora_alpha": 8, "peft_type": "LOHA"}, "is of 'LOHA', the file holds a lora"),
        ({"r": 3, "peft_type": "IA3"}, "is of 'IA3'; LoRA, LoHa and LoKr adapters are folded"),
        ({"r": 3, "lora_alpha": 8, "init_lora_weights": "pissa_niter_4"}, "weights that this start had changed"),
        ({"r": 3, "lora_alpha": 8, "rank_pattern": {"(": 3}}, "a pattern that is no regular expression"),
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
    assert plan.facts.fusable is False
    assert plan.facts.unmatched == ("blocks.9.attn.qkv (down only)", "text.bias")
    assert plan.facts.notes == ("'lora.safetensors' is fusable in part: 1 layers; 2 of its entries are left out",)


def test_a_recipe_that_moves_takes_its_file_along():
    step = FoldAdapters(file="lora.safetensors").moved(lambda path: f"../{path}", str)
    assert step.file == "../lora.safetensors"
    assert FoldAdapters().moved(lambda path: f"../{path}", str).file == ""


# What peft and diffusers compute


def random_adapter(model, config, seed=0):
    """peft's own model with an adapter of random tensors, as after training."""
    adapted = peft.get_peft_model(model, config).eval()
    noise = torch.Generator().manual_seed(seed)
    for name, tensor in adapted.named_parameters():
        if ".lora_magnitude_vector." in name:
            tensor.data *= 1 + torch.rand(tensor.shape, generator=noise)
        elif any(part in name for part in (".lora_", ".hada_", ".lokr_")):
            tensor.data = torch.randn(tensor.shape, generator=noise) / 5
    return adapted


LAYERS = ["qkv", "fc1", "x_embedder.proj"]
CONFIGS = {
    "plain": peft.LoraConfig(r=3, lora_alpha=5, target_modules=LAYERS),
    "rslora": peft.LoraConfig(r=3, lora_alpha=5, use_rslora=True, target_modules=LAYERS),
    "patterns": peft.LoraConfig(
        r=3,
        lora_alpha=5,
        rank_pattern={"blocks.0.attn.qkv": 5, "proj": 2},
        alpha_pattern={r"blocks\.\d\.mlp.fc1": 9},
        target_modules=LAYERS,
    ),
    "dora": peft.LoraConfig(r=3, lora_alpha=5, use_dora=True, target_modules=LAYERS),
    "bias": peft.LoraConfig(r=3, lora_alpha=5, lora_bias=True, target_modules=LAYERS),
    "embedding": peft.LoraConfig(r=3, lora_alpha=5, target_modules=["qkv", "embedding_table"]),
    "loha": peft.LoHaConfig(r=3, alpha=5, target_modules=LAYERS),
    "loha_effective": peft.LoHaConfig(r=3, alpha=5, use_effective_conv2d=True, target_modules=LAYERS),
    "lokr": peft.LoKrConfig(r=2, alpha=5, decompose_factor=4, target_modules=LAYERS),
    "lokr_whole": peft.LoKrConfig(r=64, alpha=5, target_modules=LAYERS),
    "lokr_both": peft.LoKrConfig(r=1, alpha=5, decompose_both=True, decompose_factor=8, target_modules=LAYERS),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_fold_is_what_peft_computes_unfolded(dit, tmp_path, name):
    oracle = random_adapter(dit.copy(), CONFIGS[name])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a bias has one axis
        oracle.save_pretrained(tmp_path)
    trained = [each.requires_grad for each in dit.model.parameters()]
    wanted = dit.output(oracle)
    assert (wanted - dit.output(dit.model)).abs().max() > 1e-2

    step = FoldAdapters(file="adapter_model.safetensors")
    plan = step.plan(dit.model, Context(folder=tmp_path))
    intended = step.intended(dit.model, plan, Context())
    torch.testing.assert_close(dit.output(intended), wanted, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(dit.output(step.rewrite(dit.copy(), plan)), wanted, atol=2e-5, rtol=2e-5)
    assert [each.requires_grad for each in dit.model.parameters()] == trained


def test_planning_draws_no_random_numbers(dit, tmp_path):
    context = written(tmp_path, factors(dit.model))
    torch.manual_seed(5)
    wanted = torch.rand(1)
    torch.manual_seed(5)
    step = FoldAdapters(file="lora.safetensors", alpha=3)
    step.rewrite(dit.copy(), step.plan(dit.model, context))
    assert torch.equal(torch.rand(1), wanted)


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=40, n_positions=12)).eval()


@pytest.mark.parametrize("turn", [False, True])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("head", ["lm_head", "wte"])
def test_turned_and_tied_layers_are_adapted_one_by_one(tmp_path, turn, dora, head):
    config = peft.LoraConfig(
        r=3, lora_alpha=5, use_dora=dora, fan_in_fan_out=True, target_modules=["c_attn", "c_fc", head]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that fan_in_fan_out is not for the head, and that it is tied
        oracle = random_adapter(gpt2(), config)
        oracle.save_pretrained(tmp_path, save_embedding_layers=False)
    ids = torch.arange(10)[None] * 3
    model = plain.plain(gpt2()) if turn else gpt2()
    step = FoldAdapters(file="adapter_model.safetensors")
    plan = step.plan(model, Context(folder=tmp_path))
    with torch.no_grad():
        wanted = oracle(ids).logits
        assert (model(ids).logits - wanted).abs().max() > 1e-2
        intended = step.intended(model, plan, Context())(ids).logits
        folded = step.rewrite(model, plan)(ids).logits
    torch.testing.assert_close(intended, wanted, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(folded, wanted, atol=2e-5, rtol=2e-5)


def kohya(model, paths, name_of, alpha, *, dora=False):
    """A file of kohya's scripts for these layers, and the same adapter by peft's names."""
    tensors, same = {}, {}
    for path, (down, up) in factors(model, paths).items():
        name = name_of(path)
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
        same |= {f"{path}.lora_A.weight": down, f"{path}.lora_B.weight": up}
        if dora:
            tensors[f"{name}.dora_scale"] = 1 + torch.rand(up.shape[0], 1)
            same[f"{path}.lora_magnitude_vector"] = tensors[f"{name}.dora_scale"].flatten()
    return tensors, same


def run_by_peft(model, same, alpha, *, dora=False):
    """The model with these tensors, run by peft unfolded."""
    targets = sorted({key.rpartition(".lora_")[0] for key in same})
    config = peft.LoraConfig(r=3, lora_alpha=alpha, use_dora=dora, target_modules=targets)
    adapted = peft.inject_adapter_in_model(config, model).eval()
    assert not peft.set_peft_model_state_dict(adapted, same).unexpected_keys
    return adapted


def test_keys_of_kohya_for_the_original_flux_are_renamed_by_diffusers(tmp_path):
    def given(names):  # name -> (layers of diffusers, in the order that the original holds them in one)
        tensors, same = {}, {}
        for name, paths in names.items():
            layers = [flux().get_submodule(path) for path in paths]
            down = torch.randn(3, layers[0].in_features) / 4
            ups = [torch.randn(layer.out_features, 3) / 4 for layer in layers]
            tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": torch.cat(ups)}
            tensors[f"{name}.alpha"] = torch.tensor(6.0)
            for path, up in zip(paths, ups, strict=True):
                same |= {f"{path}.lora_A.weight": down, f"{path}.lora_B.weight": up}
        return tensors, same

    block, single = "transformer_blocks.0", "single_transformer_blocks.0"
    tensors, same = given(
        {
            "lora_unet_double_blocks_0_img_attn_proj": [f"{block}.attn.to_out.0"],
            "lora_unet_double_blocks_0_txt_mlp_0": [f"{block}.ff_context.net.0.proj"],
            "lora_unet_double_blocks_0_img_attn_qkv": [f"{block}.attn.to_{part}" for part in "qkv"],
            "lora_unet_single_blocks_0_linear2": [f"{single}.proj_out"],
        }
    )
    save_file(tensors, tmp_path / "lora.safetensors")
    oracle = run_by_peft(flux(), same, 6.0)
    call = {
        "hidden_states": torch.randn(1, 6, 4),
        "encoder_hidden_states": torch.randn(1, 5, 16),
        "pooled_projections": torch.randn(1, 16),
        "timestep": torch.tensor([0.4]),
        "img_ids": torch.randn(6, 3),
        "txt_ids": torch.zeros(5, 3),
    }
    step = FoldAdapters(file="lora.safetensors")
    result = step.apply(flux(), Context(folder=tmp_path))
    assert len(result.changed) == 6
    with torch.no_grad():
        wanted = oracle(**call)[0]
        assert (flux()(**call)[0] - wanted).abs().max() > 1e-3
        torch.testing.assert_close(result.model(**call)[0], wanted, atol=2e-5, rtol=2e-5)

    foreign = "lora_unet_double_blocks_0_img_other"
    more = {f"{foreign}.lora_down.weight": torch.ones(3, 8), f"{foreign}.lora_up.weight": torch.ones(8, 3)}
    save_file(tensors | more, tmp_path / "lora.safetensors")
    with pytest.raises(ToolchainError, match="1 entries of 'lora.safetensors' match no layer"):  # noqa: RUF043
        step.plan(flux(), Context(folder=tmp_path))


ATTENTION = "attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("original", [False, True])
def test_keys_of_kohya_for_a_unet_name_its_layers_or_the_originals(tmp_path, original, dora):
    paths = [f"down_blocks.0.{ATTENTION}", f"up_blocks.1.{ATTENTION}", f"up_blocks.1.{ATTENTION[:-4]}to_out.0"]
    originals = {"down_blocks_0_attentions_0": "input_blocks_1_1", "up_blocks_1_attentions_0": "output_blocks_3_1"}

    def name_of(path):
        flat = path.replace(".", "_")
        for name, old in originals.items() if original else ():
            flat = flat.replace(name, old)
        return f"lora_unet_{flat}"

    tensors, same = kohya(unet(), paths, name_of, 2.0, dora=dora)
    save_file(tensors, tmp_path / "lora.safetensors")
    oracle = run_by_peft(unet(), same, 2.0, dora=dora)
    result = FoldAdapters(file="lora.safetensors").apply(unet(), Context(folder=tmp_path))
    call = torch.randn(1, 4, 8, 8), torch.tensor([7]), torch.randn(1, 3, 8)
    with torch.no_grad():
        wanted = oracle(*call)[0]
        assert (unet()(*call)[0] - wanted).abs().max() > 1e-4
        torch.testing.assert_close(result.model(*call)[0], wanted, atol=2e-5, rtol=2e-5)


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
    with pytest.raises(ToolchainError, match=r"down \(3, 31\), up \(96, 3\) do not fit a Linear .* of \(96, 32\)"):
        FoldAdapters(file="lora.safetensors", alpha=3).plan(dit.model, written(tmp_path, pairs))
