"""Rows that read one another, beside each method's own form: masks, two runs, index selection, two attentions."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from enginewright.ground.errors import FaultsError, ToolchainError
from enginewright.ground.signature import Dim, InputSpec, Signature
from enginewright.passes.attention.couple_streams import CoupleStreams
from enginewright.passes.contract import Context
from enginewright.passes.specialize.merge_guidance import MergeGuidance
from tests.passes.conftest import Subject, randomise, reference_dit, vit
from tests.passes.joint import flux, sd3
from tests.toolchain.sources import tiny_diffusers

SHARED = ("img_ids", "txt_ids")
TEXT = 5
"""Tokens of text in the joint networks."""


def unet() -> Subject:
    """A U-Net whose blocks attend to themselves and to text, 8 x 8 and 4 x 4 tokens."""
    inputs = {
        "sample": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([3, 700]),
        "encoder_hidden_states": torch.randn(2, TEXT, 12),
    }
    return Subject(model=randomise(tiny_diffusers.unet()), inputs=inputs, paths=())


MODELS = {"dit": reference_dit, "unet": unet, "sd3": sd3, "flux": flux}


@pytest.fixture(params=MODELS)
def subject(request, calm):
    return sharp(MODELS[request.param]())


def sharp(subject):
    """Attention that tells tokens apart: norms and projections of queries and keys scaled up."""
    with torch.no_grad():
        for name, parameter in subject.model.named_parameters():
            if ".norm_" in name and name.endswith(("q.weight", "k.weight")):
                parameter.mul_(2.5)
            elif name.endswith((".to_q.weight", ".to_k.weight")):
                parameter.mul_(2)
            elif name.endswith(".qkv.weight"):
                parameter[: 2 * len(parameter) // 3].mul_(2)
    return subject


def rows_of(subject, count, *, seed=1):
    """The same inputs with other rows, so many; all at one timestep."""
    noise = torch.Generator().manual_seed(seed)
    found = {}
    for name, value in subject.inputs.items():
        if name in SHARED:
            found[name] = value
        elif name in ("t", "timestep"):
            found[name] = value[1:].expand(count)
        elif value.is_floating_point() and name != "guidance":
            found[name] = torch.randn(count, *value.shape[1:], generator=noise)
        else:
            found[name] = value[torch.arange(count) % len(value)]
    return found


def output(net, inputs, **more):
    with torch.no_grad():
        result = net(**inputs, **more)
    return result if isinstance(result, torch.Tensor) else result[0]


def coupled(subject, **settings):
    return CoupleStreams(**settings).apply(copy.deepcopy(subject.model), Context()).model


def alone(subject, inputs):
    """What each row gives in a call of its own."""
    rows = len(next(iter(inputs.values())))
    each = [
        {name: value if name in SHARED else value[row : row + 1] for name, value in inputs.items()}
        for row in range(rows)
    ]
    return torch.cat([output(subject.model, one) for one in each])


def near(got, wanted, tolerance=2e-5):
    torch.testing.assert_close(got, wanted, atol=tolerance, rtol=tolerance)


def gap(a, b):
    return float((a - b).abs().max() / b.abs().max())


SETTINGS = {
    "alignedgen": {"streams": 3, "adain": True, "key_scale": 1.1},
    "freecus": {"key_scale": 1.1, "text_key_scale": 1.1},
    "attenst": {"mode": "replace", "streams": 3, "source": 1, "content": 0, "share": 0.75, "temperature": 1.5},
    "diffstyler": {"mode": "blend", "streams": 3},
    "stylesculptor": {"mode": "channel_split", "streams": 4, "content": 0, "source": 2, "scores": 3, "keep": 20},
}
TAKES = {"alignedgen": (1, 2), "freecus": (1,), "attenst": (2,), "diffstyler": (1, 2), "stylesculptor": (1,)}


@pytest.fixture(params=SETTINGS)
def method(request):
    return request.param


def skips(method, subject):
    """Channels are not split where text attends along."""
    return method == "stylesculptor" and "transformer_blocks" in dict(subject.model.named_children())


# What holds of all methods


def test_rows_that_give_are_as_alone_and_rows_that_take_are_not(subject, method):
    settings = SETTINGS[method]
    inputs = rows_of(subject, settings.get("streams", 2))
    plain = alone(subject, inputs)

    got = output(coupled(subject, **settings), inputs)

    for row in range(len(plain)):
        if row in TAKES[method] and not skips(method, subject):
            assert gap(got[row], plain[row]) > 2e-3, row
        else:
            near(got[row], plain[row])


def test_a_shut_gate_leaves_each_row_as_alone_and_an_open_one_couples_it(subject, method):
    if skips(method, subject):
        return
    settings = SETTINGS[method]
    streams = settings.get("streams", 2)
    inputs = rows_of(subject, streams)
    net = coupled(subject, **settings, gate=True)
    wanted = output(coupled(subject, **settings), inputs)

    near(output(net, inputs, couple_gate=torch.zeros(streams)), alone(subject, inputs))
    near(output(net, inputs, couple_gate=torch.ones(streams)), wanted)
    near(output(net, inputs), wanted)
    each = torch.zeros(streams)
    each[TAKES[method][0]] = 1
    got = output(net, inputs, couple_gate=each)
    near(got[TAKES[method][0]], wanted[TAKES[method][0]])
    for row in TAKES[method][1:]:
        near(got[row], alone(subject, inputs)[row])


def test_groups_of_rows_do_not_touch_one_another(subject, method):
    settings = SETTINGS[method]
    streams = settings.get("streams", 2)
    inputs = rows_of(subject, 2 * streams)
    net = coupled(subject, **settings)
    halves = [
        {name: value if name in SHARED else value[part] for name, value in inputs.items()}
        for part in (slice(streams), slice(streams, None))
    ]

    near(output(net, inputs), torch.cat([output(net, half) for half in halves]))


def test_one_layer_alone_is_coupled(calm):
    subject = sharp(reference_dit())
    result = CoupleStreams(layers=("blocks.1",)).apply(copy.deepcopy(subject.model), Context())
    assert result.changed == ("blocks.1",)
    assert result.plan.skipped == {"blocks.0": "it is not among the blocks to couple"}


# AlignedGen


def masked(q, k, v, *, adain=False, scale=1.0, text_last=0):
    """The authors' form: every row gets row 0's tokens behind its own, and row 0 does not see them."""
    n = q.shape[2] - text_last

    def restyled(x):
        image = x[:, :, :n]
        deviation = (image.var(dim=2, keepdim=True, unbiased=True) + 1e-5) ** 0.5
        mean = image.mean(dim=2, keepdim=True)
        return torch.cat([(image - mean) / deviation * deviation[:1] + mean[:1], x[:, :, n:]], dim=2)

    if adain:
        q, k = restyled(q), restyled(k)
    factor = torch.full((len(q), 1, 1, 1), scale)
    factor[0] = 1
    new_k, new_v = k[:1, :, :n].expand(len(q), -1, -1, -1) * factor, v[:1, :, :n].expand(len(q), -1, -1, -1)
    mask = torch.zeros(len(q), 1, q.shape[2], q.shape[2] + n)
    mask[0, :, :, q.shape[2] :] = -float("inf")
    return ATTENTION(q, torch.cat([k, new_k], 2), torch.cat([v, new_v], 2), attn_mask=mask)


ATTENTION = F.scaled_dot_product_attention


def with_attention(monkeypatch, other, tokens=None):
    """Put another attention in the place of a network's own over its tokens; attention to text stays."""

    def attend(q, k, v, attn_mask=None, **_):
        own = q.shape[2] == k.shape[2] and (tokens is None or q.shape[2] in tokens)
        return other(q, k, v) if own else ATTENTION(q, k, v, attn_mask=attn_mask)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)


@pytest.mark.parametrize(("build", "text"), [(reference_dit, 0), (unet, 0), (sd3, TEXT)])
def test_appended_tokens_are_the_authors_masked_form(build, text, calm, monkeypatch):
    subject = sharp(build())
    inputs = rows_of(subject, 3)
    got = output(coupled(subject, **SETTINGS["alignedgen"]), inputs)

    tokens = (16 + TEXT,) if text else None  # SD3's second attention, over the image alone, stays
    with_attention(monkeypatch, lambda q, k, v: masked(q, k, v, adain=True, scale=1.1, text_last=text), tokens)
    near(got, output(subject.model, inputs))


class Aligned:
    """AlignedGen's order of operations in Flux: norm, AdaIN, positions (shifted for what is appended), scale, mask."""

    def __init__(self, model, ids, shift, scale):
        further = ids + torch.tensor([0.0, *shift])
        self.further = model.pos_embed(further)
        self.scale = scale

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None):
        from diffusers.models.embeddings import apply_rotary_emb as turn

        def heads(x):
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        q, k, v = (heads(part(hidden_states)) for part in (attn.to_q, attn.to_k, attn.to_v))
        q, k = attn.norm_q(q), attn.norm_k(k)
        if encoder_hidden_states is not None:
            t = [heads(p(encoder_hidden_states)) for p in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)]
            t[:2] = attn.norm_added_q(t[0]), attn.norm_added_k(t[1])
        else:
            t, (q, k, v) = [x[:, :, :TEXT] for x in (q, k, v)], (x[:, :, TEXT:] for x in (q, k, v))

        def restyled(x):
            deviation, mean = (x.var(dim=2, keepdim=True) + 1e-5).sqrt(), x.mean(dim=2, keepdim=True)
            return (x - mean) / deviation * deviation[:1] + mean[:1]

        q, k = restyled(q), restyled(k)
        new_k = turn(k, self.further)[:1].repeat(len(k), 1, 1, 1)
        new_k[1:] *= self.scale
        q, own = (turn(torch.cat([a, b], 2), image_rotary_emb) for a, b in ((t[0], q), (t[1], k)))
        keys = torch.cat([own, new_k], 2)
        values = torch.cat([t[2], v, v[:1].repeat(len(v), 1, 1, 1)], 2)
        mask = torch.zeros(len(q), 1, 1, keys.shape[2])
        mask[0, ..., q.shape[2] :] = -float("inf")
        y = ATTENTION(q, keys, values, attn_mask=mask).transpose(1, 2).flatten(2)
        if encoder_hidden_states is None:
            return y
        return attn.to_out[0](y[:, TEXT:]), attn.to_add_out(y[:, :TEXT])


def test_flux_is_coupled_as_the_authors_do_it(calm):
    subject = sharp(flux())
    inputs = rows_of(subject, 3)
    shift = (0, 3)
    net = coupled(subject, **SETTINGS["alignedgen"], shift=shift, layers=("single_*", "*.1"))

    by_hand = copy.deepcopy(subject.model)
    other = Aligned(by_hand, inputs["img_ids"], shift, 1.1)
    for block in (by_hand.transformer_blocks[1], *by_hand.single_transformer_blocks):
        block.attn.processor = other

    near(output(net, inputs), output(by_hand, inputs))


def test_a_shift_of_nothing_and_of_the_width_differ(calm):
    subject = sharp(flux())
    inputs = rows_of(subject, 2)
    near_by, further, down = (output(coupled(subject, shift=shift), inputs) for shift in ((0, 0), (0, 3), (3, 0)))
    near(further[0], near_by[0])
    assert gap(further[1], near_by[1]) > 1e-2
    assert gap(down[1], further[1]) > 1e-2


def test_the_factor_of_keys_is_an_input(calm):
    subject = sharp(reference_dit())
    inputs = rows_of(subject, 2)
    net = coupled(subject, key_scale="input")
    for scale in (1.0, 0.3, 2.0):
        wanted = output(coupled(subject, key_scale=scale), inputs)
        near(output(net, inputs, couple_scale=torch.full((2,), scale)), wanted)
    assert gap(output(coupled(subject, key_scale=2.0), inputs), output(coupled(subject), inputs)) > 1e-2


# FreeCus


VITAL = ("transformer_blocks.0", "single_transformer_blocks.1")


class Stored:
    """FreeCus' two runs: keys and values of one are kept, and some of them stand before the other's."""

    def __init__(self, scale, seen=None):
        self.scale, self.seen, self.kept = scale, seen, None

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None):
        from diffusers.models.embeddings import apply_rotary_emb as turn

        def heads(x):
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        q, k, v = (heads(part(hidden_states)) for part in (attn.to_q, attn.to_k, attn.to_v))
        q, k = attn.norm_q(q), attn.norm_k(k)
        if encoder_hidden_states is not None:
            t = [heads(p(encoder_hidden_states)) for p in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)]
            t[:2] = attn.norm_added_q(t[0]), attn.norm_added_k(t[1])
            q, k, v = (torch.cat(pair, 2) for pair in zip(t, (q, k, v), strict=True))
        q, k = turn(q, image_rotary_emb), turn(k, image_rotary_emb)
        if self.kept is None:
            self.kept = self.scale * k[:, :, TEXT:][:, :, self.seen], v[:, :, TEXT:][:, :, self.seen]
        else:
            k = torch.cat([self.scale * k[:, :, :TEXT], k[:, :, TEXT:]], 2)
            k, v = torch.cat([self.kept[0], k], 2), torch.cat([self.kept[1], v], 2)
        y = ATTENTION(q, k, v).transpose(1, 2).flatten(2)
        if encoder_hidden_states is None:
            return y
        return attn.to_out[0](y[:, TEXT:]), attn.to_add_out(y[:, :TEXT])


def test_a_biased_row_is_two_runs_with_selected_tokens(calm):
    subject = sharp(flux())
    inputs = rows_of(subject, 2)
    seen = torch.tensor([0, 3, 4, 7])
    bias = torch.full((2, 9), -1e4)
    bias[:, seen] = 0
    net = coupled(subject, layers=VITAL, foreground=9, **SETTINGS["freecus"])
    got = output(net, inputs, couple_bias=bias)

    two = copy.deepcopy(subject.model)
    for path in VITAL:
        two.get_submodule(path).attn.processor = Stored(1.1, seen)
    one, other = (
        {name: value if name in SHARED else value[row : row + 1] for name, value in inputs.items()} for row in (0, 1)
    )
    wanted = torch.cat([output(two, one), output(two, other)])

    near(got, wanted)
    assert gap(wanted[1], alone(subject, inputs)[1]) > 1e-2
    assert gap(output(net, inputs)[1], wanted[1]) > 1e-2  # every token is seen where no bias is given


def test_an_empty_foreground_leaves_every_row_as_alone(calm):
    subject = sharp(flux())
    inputs = rows_of(subject, 2)
    net = coupled(subject, foreground=9)
    near(output(net, inputs, couple_bias=torch.full((2, 9), -1e4)), alone(subject, inputs))


def test_keys_of_text_are_scaled(calm):
    subject = sharp(flux())
    inputs = rows_of(subject, 2)
    more = output(coupled(subject, text_key_scale=1.5), inputs)
    plain = output(coupled(subject), inputs)
    near(more[0], plain[0])
    assert gap(more[1], plain[1]) > 1e-2


# AttenST


def replaced(temperature, share=0.75):
    def attend(q, k, v):
        """Three rows: content, style, output."""
        query = torch.cat([q[:2], temperature * (share * q[:1] + (1 - share) * q[2:])])
        return ATTENTION(query, torch.cat([k[:2], k[1:2]]), torch.cat([v[:2], v[1:2]]))

    return attend


@pytest.mark.parametrize("build", [reference_dit, unet])
def test_keys_and_values_come_from_the_style_and_queries_mostly_from_the_content(build, calm, monkeypatch):
    subject = sharp(build())
    inputs = rows_of(subject, 3)
    got = {t: output(coupled(subject, **{**SETTINGS["attenst"], "temperature": t}), inputs) for t in (1.5, 2.25)}
    for temperature, found in got.items():
        with monkeypatch.context() as patch:
            with_attention(patch, replaced(temperature))
            near(found, output(subject.model, inputs))
    assert gap(got[1.5][2], got[2.25][2]) > 1e-2


def test_no_share_of_the_content_is_the_style_alone(calm, monkeypatch):
    subject = sharp(unet())
    inputs = rows_of(subject, 3)
    settings = {**SETTINGS["attenst"], "share": 0.0, "temperature": 1.0}
    got = output(coupled(subject, **settings), inputs)
    with monkeypatch.context() as patch:
        with_attention(patch, replaced(1.0, share=0.0))
        near(got, output(subject.model, inputs))
    same = {name: value if name in SHARED else value[:1].expand(3, *value.shape[1:]) for name, value in inputs.items()}
    near(output(coupled(subject, **settings), same), alone(subject, same))  # style = content: its own keys and values


# DiffStyler


def blended(rate):
    def attend(q, k, v):
        """Three rows, of which the first gives queries and keys."""
        q, k = (torch.cat([x[:1], rate * x[:1] + (1 - rate) * x[1:]]) for x in (q, k))
        return ATTENTION(q, k, v)

    return attend


@pytest.mark.parametrize("build", [reference_dit, unet])
@pytest.mark.parametrize("rate", [0.0, 0.4, 1.0])
def test_a_rate_blends_queries_and_keys(build, rate, calm, monkeypatch):
    subject = sharp(build())
    inputs = rows_of(subject, 3)
    by_input = output(coupled(subject, **SETTINGS["diffstyler"]), inputs, couple_rate=torch.full((3,), rate))
    baked = output(coupled(subject, **SETTINGS["diffstyler"], share=rate), inputs)
    near(baked, by_input)
    if rate == 0:
        near(baked, alone(subject, inputs))
    with monkeypatch.context() as patch:
        with_attention(patch, blended(rate))
        near(baked, output(subject.model, inputs))


def test_at_a_rate_of_one_softmax_is_computed_once(calm, monkeypatch):
    subject = sharp(reference_dit())
    inputs = rows_of(subject, 3)
    maps = []

    def counted(q, k, v, attn_mask=None, **_):
        maps.append(q.shape[0])
        return ATTENTION(q, k, v, attn_mask=attn_mask)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    output(coupled(subject, **SETTINGS["diffstyler"], share=1.0), inputs)
    assert maps == [1, 1]
    maps.clear()
    output(coupled(subject, **SETTINGS["diffstyler"]), inputs, couple_rate=torch.ones(3))
    assert sum(maps) == 6


def test_features_become_those_of_the_source(calm):
    subject = sharp(unet())
    inputs = rows_of(subject, 3)
    path = "mid_block.resnets.0.conv2"
    net = coupled(subject, **SETTINGS["diffstyler"], layers=("up_blocks.*",), features=(path,))
    module = subject.model.get_submodule(path)

    got = net.get_submodule(path)(x := torch.randn(6, module.in_channels, 4, 4))
    near(got, module(x)[[0, 0, 0, 3, 3, 3]])

    off = {"couple_rate": torch.zeros(3), "couple_features": torch.zeros(3)}
    near(output(net, inputs, **off), alone(subject, inputs))
    on = output(net, inputs, couple_rate=torch.zeros(3), couple_features=torch.ones(3))
    assert gap(on[1], alone(subject, inputs)[1]) > 1e-2
    half = output(net, inputs, couple_rate=torch.zeros(3), couple_features=torch.tensor([0.0, 0.0, 1.0]))
    near(half[1], alone(subject, inputs)[1])
    near(half[2], on[2])


# StyleSculptor


def split(keep):
    def attend(q, k, v):
        """Content, output, style, edges: the authors' two attentions, over values with channels at zero."""
        results = [ATTENTION(*(x[row : row + 1] for x in (q, k, v))) for row in (0, 2, 3)]
        edges = results[2].transpose(1, 2).flatten(2)[0]  # (N, channels)
        loud = torch.zeros(edges.shape[1])
        loud[edges.var(dim=0).topk(keep).indices] = 1
        loud = loud.view(1, q.shape[1], 1, -1)
        style = ATTENTION(q[1:2], k[2:3], v[2:3] * (1 - loud))
        content = ATTENTION(q[:1], k[:1], v[:1] * loud)
        return torch.cat([results[0], style + content, *results[1:]])

    return attend


@pytest.mark.parametrize("keep", [0, 1, 13, 32])
def test_loud_channels_come_from_the_content_and_others_from_the_style(keep, calm, monkeypatch):
    subject = sharp(reference_dit())
    inputs = rows_of(subject, 4)
    got = output(coupled(subject, **{**SETTINGS["stylesculptor"], "keep": keep}), inputs)
    with_attention(monkeypatch, split(keep))
    near(got, output(subject.model, inputs))


def test_all_channels_make_the_output_the_content(calm):
    subject = sharp(reference_dit())
    inputs = rows_of(subject, 4)
    for name, value in inputs.items():
        inputs[name] = value[[0, 0, 2, 3]]  # content and output start from the same noise, and from one condition
    got = output(coupled(subject, **{**SETTINGS["stylesculptor"], "keep": 32}), inputs)
    near(got[1], got[0])
    near(got, alone(subject, inputs))
    less = output(coupled(subject, **{**SETTINGS["stylesculptor"], "keep": 31}), inputs)
    assert gap(less[1], less[0]) > 1e-3


# What is refused, left alone and stated


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"source": 2}, "source is 2; 2 streams are rows 0 to 1"),
        ({"rows": (0, 5)}, r"rows\[1\] is 5; 2 streams are rows 0 to 1"),
        ({"mode": "blend", "adain": True}, "adain says nothing to mode = 'blend'"),
        ({"keep": 3}, "keep says nothing to mode = 'append'"),
        ({"key_scale": 0.0}, "key_scale is 0.0; it must be above 0"),
        ({"mode": "channel_split"}, "mode = 'channel_split' needs content"),
        ({"mode": "replace", "share": 0.5}, "share needs content"),
        ({"mode": "replace", "content": 1}, "every stream gives"),
        ({"features": ("x",), "rows": (0, 1)}, "rows has 0, whose features the others take"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, said, calm):
    with pytest.raises((ToolchainError, FaultsError), match=said):
        coupled(reference_dit(), **settings)


def test_a_pattern_that_matches_nothing_is_refused(calm):
    with pytest.raises(ToolchainError, match="layers 'nope' matches no block"):
        coupled(reference_dit(), layers=("nope",))
    with pytest.raises(ToolchainError, match="features 'nope' matches no module"):
        coupled(reference_dit(), features=("nope",))


def test_blocks_are_left_alone_with_a_reason(calm):
    plans = {
        "rotary": CoupleStreams(shift=(0, 4)).plan(reference_dit().model, Context()),
        "one kind": CoupleStreams(**SETTINGS["stylesculptor"]).plan(sd3().model, Context()),
        "around": CoupleStreams().plan(coupled(reference_dit()), Context()),
    }
    for word, plan in plans.items():
        assert not plan.choice
        assert plan.skipped
        assert all(word in reason for reason in plan.skipped.values()), word


def test_tokens_that_the_bias_is_not_for_are_left_alone(calm):
    subject = unet()
    plan = CoupleStreams(foreground=64).plan(subject.model, Context(example=subject.inputs))
    assert {path.partition(".")[0] for path in plan.choice} == {"down_blocks", "up_blocks"}
    assert list(plan.skipped.values()) == ["it runs on 16 tokens, and the bias is for 64"]


def test_a_layer_that_computes_otherwise_is_left_alone(calm):
    subject = reference_dit()

    class Odd(type(subject.model.blocks[0])):
        def forward(self, x, c):
            return super().forward(x, c) + 1

    subject.model.blocks[1].__class__ = Odd
    plan = CoupleStreams().plan(subject.model, Context(example=subject.inputs))
    assert list(plan.choice) == ["blocks.0"]
    assert "does not compute like one" in plan.skipped["blocks.1"]


def test_rows_of_merged_guidance_are_groups_of_their_own(calm):
    subject = sharp(reference_dit())
    inputs = rows_of(subject, 2)
    guided = MergeGuidance(condition="y", none=4, scale=3.0, fixed=True, channels=4)
    model = guided.apply(copy.deepcopy(subject.model), Context(example=inputs, calibration=[inputs])).model
    net = CoupleStreams(gate=True).apply(model, Context(example=inputs)).model
    one = coupled(subject)
    with_class, without = output(one, inputs), output(one, {**inputs, "y": torch.full((2,), 4)})
    wanted = without[:, :4] + 3 * (with_class[:, :4] - without[:, :4])

    near(output(net, inputs)[:, :4], wanted, 1e-4)
    near(output(net, inputs, couple_gate=torch.tensor([0.0, 1.0]))[:, :4], wanted, 1e-4)


def test_costs_are_of_calls_that_have_all_rows(calm):
    subject = reference_dit()
    batch = Dim(name="batch", low=1, typical=2, high=64)
    signature = Signature(
        (
            InputSpec(name="x", shape=(batch, 4, 8, 8)),
            InputSpec(name="t", shape=(batch,)),
            InputSpec(name="y", shape=(batch,)),
        )
    )
    one = {name: value[:1] for name, value in subject.inputs.items()}
    step = CoupleStreams(streams=3)
    result = step.apply(subject.model, Context(example=one, signature=signature))
    tokens, width, layers = 16, 32, 2
    more = 2 * 2 * tokens * tokens * width * layers  # two rows, each with the source's tokens, in two products
    assert result.after.macs - result.before.macs == more
    assert step.rows_together(result.plan) == 3


def test_a_row_that_takes_nothing_is_not_computed_beside_what_it_does_not_see(calm):
    """Less is multiplied than with the authors' mask, in which the source's row is as long as the others'."""
    subject = reference_dit()
    inputs = rows_of(subject, 2)
    result = CoupleStreams().apply(subject.model, Context(example=inputs))
    assert result.after.macs - result.before.macs == 2 * 16 * 16 * 32 * 2


def test_vision_transformers_are_known_too(calm):
    subject = vit("sdpa")
    inputs = rows_of(subject, 2)
    got = output(coupled(subject), inputs)
    plain = output(subject.model, inputs)
    near(got[0], plain[0])
    assert gap(got[1], plain[1]) > 1e-3


class Nothing(nn.Module):
    """No block at all."""

    def forward(self, x):
        return x


def test_a_model_without_blocks_is_left_as_it_is():
    result = CoupleStreams().apply(Nothing(), Context())
    assert result.changed == ()
    assert "blocks whose attention can be taken apart" in result.plan.skipped[""]
    assert CoupleStreams().rows_together(result.plan) == 1
