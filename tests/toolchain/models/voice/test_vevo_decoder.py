from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from enginewright.ground.signature import Array, Arrays
from enginewright.models.blocks.decoding import greedy
from enginewright.models.voice.vevo import decoder
from enginewright.targets.pytorch_engine import EagerRunner

CONFIG = decoder.TINY


def loud(config: decoder.Config = CONFIG) -> decoder.Decoder:
    """A decoder whose weights are large enough for every part of a layer to matter."""
    torch.manual_seed(0)
    net = decoder.Decoder(config).eval()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.3 if "norm" in name else 0.12)
    return net.requires_grad_(False)


@pytest.mark.parametrize(
    ("size", "count", "millions", "vocabulary"),
    [("conversion", 481_494_528, 481.5, 1056 + 8192 + 20), ("tts", 743_303_040, 743.3, 9236)],
)
def test_a_published_size_has_the_counted_parameters_and_vocabulary(
    size: str, count: int, millions: float, vocabulary: int
) -> None:
    with torch.device("meta"):
        net = decoder.Decoder(decoder.PUBLISHED[size])
    assert sum(parameter.numel() for parameter in net.parameters()) == count
    assert round(count / 1e6, 1) == millions
    assert net.lm_head.out_features == vocabulary


def test_the_same_weights_give_the_logits_of_transformers_llama() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=CONFIG.vocabulary,
            hidden_size=CONFIG.width,
            intermediate_size=CONFIG.hidden,
            num_hidden_layers=CONFIG.depth,
            num_attention_heads=CONFIG.heads,
        )
    ).eval()
    ours = loud()
    state = {name if name.startswith("lm_head") else f"model.{name}": w for name, w in ours.state_dict().items()}
    theirs.load_state_dict(state, strict=True)
    ids = torch.randint(0, CONFIG.vocabulary, (3, 40))
    with torch.no_grad():
        wanted = theirs(ids).logits
    assert wanted.std() > 0.5
    torch.testing.assert_close(ours(ids), wanted, rtol=1e-4, atol=1e-4)


def test_no_token_sees_a_later_one_and_order_matters() -> None:
    net = loud()
    ids = torch.arange(20)[None] % CONFIG.vocabulary
    other = ids.clone()
    other[0, 12:] = 3
    assert torch.equal(net(ids)[:, :12], net(other)[:, :12])
    swapped = ids[:, [1, 0, *range(2, 20)]]
    assert (net(ids)[0, -1] - net(swapped)[0, -1]).abs().max() > 0.05


Cache = tuple[Tensor, Tensor]


def read(net: decoder.Decoder, ids: Tensor, cache: Cache, position: Tensor) -> tuple[Tensor, Cache]:
    """One step, and the cache with what it gave."""
    logits, *new = net.step(ids, *cache, position)
    slots = (position.reshape(-1, 1) + torch.arange(ids.shape[1]))[:, None, None, :, None]
    keys, values = (old.scatter(3, slots.expand(add.shape), add) for old, add in zip(cache, new, strict=True))
    return logits, (keys, values)


def test_token_by_token_gives_the_logits_of_the_whole() -> None:
    net = loud()
    ids = torch.randint(0, CONFIG.vocabulary, (2, 24), generator=torch.Generator().manual_seed(1))
    whole = net(ids)
    logits, cache = read(net, ids[:, :10], net.empty_cache(batch=2, length=32), torch.tensor(0))
    found = [logits]
    for position in range(10, 24):
        logits, cache = read(net, ids[:, position : position + 1], cache, torch.tensor(position))
        found.append(logits)
    torch.testing.assert_close(torch.stack(found, dim=1), whole[:, 9:], rtol=1e-4, atol=1e-4)


def greedy_whole(net: decoder.Decoder, ids: Tensor, count: int) -> Tensor:
    """``count`` greedy tokens, each from the whole sequence before it."""
    start = ids.shape[1]
    for _ in range(count):
        ids = torch.cat([ids, net(ids)[:, -1].argmax(-1, keepdim=True)], dim=1)
    return ids[:, start:]


def greedy_cached(net: decoder.Decoder, ids: Tensor, count: int) -> Tensor:
    """``count`` greedy tokens with the cache."""
    logits, cache = read(net, ids, net.empty_cache(batch=len(ids), length=CONFIG.longest), torch.tensor(0))
    found = [logits.argmax(-1, keepdim=True)]
    for position in range(ids.shape[1], ids.shape[1] + count - 1):
        logits, cache = read(net, found[-1], cache, torch.tensor(position))
        found.append(logits.argmax(-1, keepdim=True))
    return torch.cat(found, dim=1)


def test_thirty_greedy_tokens_are_those_of_the_whole_form() -> None:
    net = loud()
    ids = torch.randint(0, CONFIG.vocabulary, (2, 12), generator=torch.Generator().manual_seed(2))
    found = greedy_cached(net, ids, 30)
    assert len(set(found[0].tolist())) > 5  # not one token for ever
    assert torch.equal(found, greedy_whole(net, ids, 30))


def test_sequences_of_a_batch_may_stand_at_different_positions() -> None:
    net = loud()
    ids = torch.randint(0, CONFIG.vocabulary, (2, 15), generator=torch.Generator().manual_seed(3))
    _, cache = read(net, ids, net.empty_cache(batch=2, length=20), torch.tensor(0))  # the first is 9 long, and padded
    at = torch.tensor([8, 14])
    logits, _ = read(net, ids.gather(1, at[:, None]), cache, at)
    torch.testing.assert_close(logits[0], net(ids[:1, :9])[0, -1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits[1], net(ids[1:])[0, -1], rtol=1e-4, atol=1e-4)


def test_a_step_leaves_its_cache_alone_and_reads_nothing_beyond_the_position() -> None:
    net = loud()
    ids = torch.tensor([[4, 9, 2]])
    keys, values = (cache.normal_() for cache in net.empty_cache(batch=1, length=12))
    before = keys.clone(), values.clone()
    logits, new_keys, new_values = net.step(ids, keys, values, torch.tensor(5))
    assert torch.equal(keys, before[0])
    assert torch.equal(values, before[1])
    assert new_keys.shape == new_values.shape == (1, CONFIG.depth, CONFIG.heads, 3, CONFIG.width // CONFIG.heads)

    beyond, within = keys.clone(), keys.clone()
    beyond[..., 5:, :] += 5
    within[..., 4, :] += 5
    assert torch.equal(net.step(ids, beyond, values, torch.tensor(5))[0], logits)
    assert (net.step(ids, within, values, torch.tensor(5))[0] - logits).abs().max() > 0.01


def test_a_prompt_puts_marks_around_shifted_content_and_before_the_style() -> None:
    config = decoder.PUBLISHED["conversion"]
    content = config.texts + torch.tensor([[0, 31]])
    found = decoder.sequence(config, content, torch.tensor([[7, 8191]]))
    assert found.tolist() == [[9249, 8192 + 1024, 8192 + 1024 + 31, 9250, 9251, 7, 8191]]
    assert (config.padding, config.end_output) == (9248, 9252)
    assert decoder.PUBLISHED["tts"].end_output == 9220


def test_repeats_are_left_out_but_a_code_may_come_again() -> None:
    assert decoder.without_repeats(torch.tensor([5, 5, 5, 1, 5, 2, 2])).tolist() == [5, 1, 5, 2]


def test_the_program_that_becomes_an_engine_generates_what_the_whole_form_does() -> None:
    program = decoder.build(CONFIG).eval()
    net = program.networks["model"].decoder
    net.load_state_dict(loud().state_dict())
    runner = EagerRunner(program, threads=1, outputs=decoder.OUTPUTS)
    ids = torch.randint(0, CONFIG.vocabulary, (2, 12), generator=torch.Generator().manual_seed(2))
    found = greedy(runner, ids.numpy(), 30)
    assert found.tolist() == greedy_whole(net, ids, 30).tolist()


def test_the_calls_of_a_sequence_go_on_from_one_another() -> None:
    calls = decoder.realistic(decoder.build(CONFIG), "tiny", CONFIG)(4, 0)
    assert [(call["ids"].shape, int(call["position"])) for call in calls] == [
        ((1, 19), 0),
        ((1, 1), 19),
        ((1, 1), 20),
        ((1, 1), 21),
    ]


def test_prompts_are_marks_content_and_style_and_come_again_with_their_seed() -> None:
    seen: list[Array] = []

    def runner(inputs: Arrays) -> Arrays:
        seen.append(inputs["ids"])
        return {"logits": np.eye(CONFIG.vocabulary, dtype=np.float32)[[7]]}

    task = decoder.task("tiny", CONFIG)
    assert task.sample(runner, 2, 5).tolist() == [[7] * 16] * 2
    assert task.calls is not None
    assert task.calls(2) == len(seen) == 32
    first = seen[0][0].tolist()
    assert (first[0], first[9], first[10]) == (CONFIG.begin_input, CONFIG.end_input, CONFIG.begin_output)
    assert all(CONFIG.outputs + CONFIG.texts <= code < CONFIG.padding for code in first[1:9])
    assert all(code < CONFIG.outputs for code in first[11:])
    assert not np.array_equal(seen[0], seen[16])
    again = [ids for ids in seen if ids.shape[1] > 1]
    seen.clear()
    task.sample(runner, 2, 5)
    assert all(np.array_equal(a, b) for a, b in zip(again, [i for i in seen if i.shape[1] > 1], strict=True))
