"""SD3 and Flux on fewer image tokens: text stays whole, and merged tokens keep the positions of those they go into."""

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import nn

from enginewright.passes.contract import Context
from enginewright.passes.tokens.matching import cell_corners, match, rows
from enginewright.passes.tokens.merge_tokens import MergeTokens
from enginewright.passes.tokens.merge_unmerge_tokens import MergeUnmergeTokens
from enginewright.passes.tokens.prune_tokens import PruneTokens
from enginewright.passes.tokens.running import Step, TokenRun
from enginewright.passes.traits import TokenStack, layers_of
from enginewright.targets.contract import Graph, ShapeRange
from enginewright.targets.onnx_export import export_onnx
from enginewright.targets.onnxruntime_engine import OnnxRuntime
from tests.passes.conftest import Subject, randomise
from tests.passes.joint import HEADS, JOINT

BOTH = pytest.mark.parametrize("name", JOINT)
TEXT = 5


def stacks(model):
    return [stack for _, stack in layers_of(model, TokenStack)]


def flux_of(blocks, ids):
    """A Flux of so many double and single blocks, and inputs whose tokens stand at these places."""
    model = FluxTransformer2DModel(
        in_channels=4, num_layers=blocks, num_single_layers=blocks, axes_dims_rope=(2, 2, 4), **HEADS
    )
    inputs = {
        "hidden_states": torch.randn(2, len(ids), 4),
        "encoder_hidden_states": torch.randn(2, TEXT, 12),
        "pooled_projections": torch.randn(2, 10),
        "timestep": torch.tensor([0.1, 0.7]),
        "img_ids": ids,
        "txt_ids": torch.zeros(TEXT, 3),
    }
    return Subject(model=randomise(model), inputs=inputs, paths=())


# Taken apart


@BOTH
def test_blocks_taken_apart_are_the_blocks(name):
    subject = JOINT[name]()
    model = subject.copy()
    for stack in stacks(model):
        stack.replace_blocks(
            TokenRun([Step(block, stack.block, proportional=True) for block in stack.blocks], restore=True)
        )

    assert not stacks(model), "a run is not taken apart again"
    torch.testing.assert_close(subject.output(model), subject.output(subject.model), atol=1e-5, rtol=0)
    assert sum(t.numel() for t in model.parameters()) == sum(t.numel() for t in subject.model.parameters())


@BOTH
def test_a_block_with_a_part_that_is_not_known_is_not_taken_apart(name):
    model = JOINT[name]().model
    for stack in stacks(model):
        stack.blocks[0].attn.extra = nn.Linear(8, 8)
    plan = MergeTokens().plan(model, Context())
    assert plan.skipped == {"": f"no family knows how the blocks of a {type(model).__name__} run on fewer tokens"}


@BOTH
@pytest.mark.parametrize("step", [MergeTokens(r=0), MergeUnmergeTokens(ratio=0)])
def test_nothing_asked_for_changes_nothing(name, step):
    subject = JOINT[name]()
    result = step.apply(subject.copy(), Context(example=subject.inputs))
    assert result.changed == ()
    assert len(result.plan.skipped) == {"sd3": 3, "flux": 4}[name]
    assert torch.equal(subject.output(result.model), subject.output(subject.model))


@BOTH
def test_image_tokens_alone_are_counted(name):
    subject = JOINT[name]()
    facts = MergeTokens(r=2).plan(subject.model, Context(example=subject.inputs)).facts
    assert set(facts.tokens.values()) == {{"sd3": 16, "flux": 9}[name]}


# Merging within a block


def merged_attention(block, text, image, condition, tables):
    """Attention of one sample's merged image, by the library's own layer; the place of each token is the receiver's."""
    count = image.shape[1]
    matching = match(image, int(0.5 * count), leading=0, into=cell_corners(count, leading=0))
    merge, back = (lambda y: matching.merge(y, None, "onehot")[0]), matching.rows_of()
    more = {}
    if tables is not None:
        place = torch.cat([torch.arange(TEXT), TEXT + matching.stay[0]])
        more["image_rotary_emb"] = tuple(table[place] for table in tables)
    if hasattr(block, "norm1"):
        y, text_y = block.norm1(image, emb=condition)[0], block.norm1_context(text, emb=condition)[0]
        image_y, text_y = block.attn(hidden_states=merge(y), encoder_hidden_states=text_y, **more)
        return text_y, rows(image_y, back)
    y = block.norm(torch.cat([text, image], dim=1), emb=condition)[0]
    y = block.attn(hidden_states=torch.cat([y[:, :TEXT], merge(y[:, TEXT:])], dim=1), **more)
    return y[:, :TEXT], rows(y[:, TEXT:], back)


def by_hand(block, text, image, condition, tables):
    """A whole block whose attention works on merged tokens, in the library's own parts."""
    text_y, image_y = merged_attention(block, text, image, condition, tables)
    if hasattr(block, "norm"):
        x = torch.cat([text, image], dim=1)
        y, gate = block.norm(x, emb=condition)
        hidden = block.act_mlp(block.proj_mlp(y))
        x = x + gate[:, None] * block.proj_out(torch.cat([torch.cat([text_y, image_y], dim=1), hidden], dim=2))
        return x[:, :TEXT], x[:, TEXT:]
    out = []
    for x, y, norm, second, ff in (
        (text, text_y, block.norm1_context, block.norm2_context, block.ff_context),
        (image, image_y, block.norm1, block.norm2, block.ff),
    ):
        _, gate, shift, scale, gate_ff = (part if part.ndim == 3 else part[:, None] for part in norm(x, emb=condition))
        middle = x + gate * y
        out.append(middle + gate_ff * ff(second(middle) * (1 + scale) + shift))
    return tuple(out)


@pytest.mark.parametrize(
    ("name", "number", "position"), [("sd3", 0, 1), ("flux", 0, 0), ("flux", 1, 1)], ids=["sd3", "double", "single"]
)
def test_attention_on_merged_tokens_is_the_librarys_with_the_receivers_places(name, number, position):
    subject = JOINT[name]()
    block = stacks(subject.model)[number].blocks[position]
    model = MergeUnmergeTokens(ratio=0.5).apply(subject.copy(), Context()).model
    run = [module for module in model.modules() if isinstance(module, TokenRun)][number]
    run.steps = run.steps[position : position + 1]
    text, image, condition = torch.randn(2, TEXT, 32), torch.randn(2, 16, 32), torch.randn(2, 32)
    tables = None if name == "sd3" else (torch.randn(TEXT + 16, 8), torch.randn(TEXT + 16, 8))
    more = {} if tables is None else {"image_rotary_emb": tables}
    with torch.no_grad():
        found = run(hidden_states=image, encoder_hidden_states=text, temb=condition, **more)
        whole = block(hidden_states=image, encoder_hidden_states=text, temb=condition, **more)
        for i in range(2):
            alone = slice(i, i + 1)
            wanted = by_hand(block, text[alone], image[alone], condition[alone], tables)
            for part in (0, 1):
                torch.testing.assert_close(found[part][alone], wanted[part], atol=1e-5, rtol=1e-5)
    assert (found[1] - whole[1]).abs().max() > 1e-2


@pytest.mark.parametrize(("name", "number"), [("sd3", 0), ("flux", 0), ("flux", 1)], ids=["sd3", "double", "single"])
def test_a_feed_forward_on_equal_tokens_comes_back_exactly(name, number):
    """Each cell of 2 x 2 holds one token four times, all at one place."""
    subject = JOINT[name]()
    block = stacks(subject.model)[number].blocks[0]
    cells = torch.arange(4).view(2, 2).repeat_interleave(2, dim=0).repeat_interleave(2, dim=1).flatten()  # (16,)
    inputs = {
        "hidden_states": torch.randn(2, 4, 32)[:, cells],
        "encoder_hidden_states": torch.randn(2, TEXT, 32),
        "temb": torch.randn(2, 32),
    }
    if name == "flux":
        places = torch.cat([torch.arange(TEXT), TEXT + cells])
        inputs["image_rotary_emb"] = (torch.randn(TEXT + 4, 8)[places], torch.randn(TEXT + 4, 8)[places])
    model = MergeUnmergeTokens(ratio=0.75, over="feed_forward").apply(subject.copy(), Context()).model
    run = [module for module in model.modules() if isinstance(module, TokenRun)][number]
    run.steps = run.steps[:1]
    with torch.no_grad():
        found, wanted = run(**inputs), block(**inputs)
        inputs["hidden_states"][:, 1] += torch.randn(32)
        moved, whole = run(**inputs), block(**inputs)
    for part in (0, 1):
        torch.testing.assert_close(found[part], wanted[part], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(moved[0], whole[0], atol=1e-5, rtol=1e-5)
    assert (moved[1] - whole[1]).abs().max() > 1e-3


# Merging for good


def groups_of(size):
    """16 places in rows of equal ones."""
    place = torch.arange(16) // size
    return torch.stack([torch.zeros(16), place, place * 2.0], dim=1)


def test_equal_tokens_at_one_place_merge_without_a_trace_over_several_blocks():
    """Groups of four: pairs in the first block, the rest in the second, so that the third sees every place once."""
    subject = flux_of(3, groups_of(4))
    subject.inputs["hidden_states"] = torch.randn(2, 4, 4).repeat_interleave(4, dim=1)
    before = subject.output(subject.model)
    outputs = {}
    for weighs in (True, False):
        step = MergeTokens(r=8, proportional=weighs, exclude=("*.2",))
        result = step.apply(subject.copy(), Context(example=subject.inputs))
        assert [entry.merge for entry in result.plan.choice.values()] == [8, 4] * 2
        outputs[weighs] = subject.output(result.model)
    torch.testing.assert_close(outputs[True], before, atol=2e-5, rtol=1e-5)
    assert (outputs[False] - before).abs().max() > 1e-2


def test_equal_tokens_of_sd3_merge_without_a_trace():
    subject = JOINT["sd3"]()
    stack = stacks(subject.model)[0]
    image = torch.randn(2, 8, 32).repeat_interleave(2, dim=1)
    inputs = {"encoder_hidden_states": torch.randn(2, TEXT, 32), "temb": torch.randn(2, 32)}
    x = image
    with torch.no_grad():
        text = inputs["encoder_hidden_states"]
        for block in stack.blocks:
            text, x = block(hidden_states=x, encoder_hidden_states=text, temb=inputs["temb"])
        for weighs in (True, False):
            model = MergeTokens(r=8, proportional=weighs, exclude=("*.1", "*.2")).apply(subject.copy(), Context()).model
            (run,) = model.transformer_blocks
            found = run(hidden_states=image, **inputs)[1]
            same = torch.allclose(found, x, atol=2e-5, rtol=1e-5)
            assert same is weighs


@BOTH
def test_text_is_never_merged(name):
    subject = JOINT[name]()
    model = MergeTokens(r=3).apply(subject.copy(), Context(example=subject.inputs)).model
    seen = []
    for run in (module for module in model.modules() if isinstance(module, TokenRun)):
        run.steps[-1].register_forward_hook(lambda _, given, __: seen.append(given[0]))
    subject.output(model)
    own = torch.arange(TEXT).expand(2, -1)
    for tokens in seen:
        assert torch.equal(tokens.size[:, :TEXT], torch.ones(2, TEXT))
        assert torch.equal(tokens.place[:, :TEXT], own)
        assert torch.equal(tokens.at[:, :TEXT], own)
        assert tokens.x.shape[1] < tokens.place.shape[1]
        assert (tokens.place[:, TEXT:] >= TEXT).all()
    assert len(seen) == len(stacks(subject.model))


@BOTH
def test_products_are_saved(name):
    subject = JOINT[name]()
    context = Context(example=subject.inputs)
    for step in (MergeTokens(r=3), MergeUnmergeTokens()):
        result = step.apply(subject.copy(), context)
        assert result.after.macs < 0.97 * result.before.macs


@BOTH
def test_dropping_says_why_it_leaves_them_alone(name):
    subject = JOINT[name]()
    plan = PruneTokens().plan(subject.model, Context(example=subject.inputs))
    assert not plan.choice
    assert len(plan.skipped) == {"sd3": 3, "flux": 4}[name]
    assert all("attend to text too" in reason for reason in plan.skipped.values())


# Engines


def sizes(name, tensor, *, batch, text):
    """An input's shape for so many samples and so many tokens of text."""
    shape = list(tensor.shape)
    if name not in ("img_ids", "txt_ids"):
        shape[0] = batch
    if name in ("encoder_hidden_states", "txt_ids"):
        shape[-2] = text
    return tuple(shape)


def dynamic(name, *, text):
    """Dimensions of an input that vary: the batch, and the tokens of text."""
    found = {} if name in ("img_ids", "txt_ids") else {0: ("batch", 1, 8)}
    if text and name in ("encoder_hidden_states", "txt_ids"):
        found[len(found)] = ("text", 2, 64)
    return found


class Alone(nn.Module):
    """One block of a run, called by position."""

    def __init__(self, model, number):
        super().__init__()
        self.run = [module for module in model.modules() if isinstance(module, TokenRun)][number]
        self.run.steps = self.run.steps[-1:]

    def forward(self, x, text, c, cos, sin):
        return self.run(hidden_states=x, encoder_hidden_states=text, temb=c, image_rotary_emb=(cos, sin))[1]


@pytest.mark.parametrize(
    ("name", "number", "step"),
    [("sd3", 0, MergeTokens(r=2)), ("flux", 0, MergeUnmergeTokens()), ("flux", 1, MergeTokens(r=2))],
    ids=["sd3", "double", "single"],
)
def test_a_block_runs_in_onnx_runtime_at_every_batch(name, number, step, tmp_path):
    alone = Alone(step.apply(JOINT[name]().model, Context()).model, number).eval()
    example = {
        "x": torch.randn(2, 16, 32),
        "text": torch.randn(2, TEXT, 32),
        "c": torch.randn(2, 32),
        "cos": torch.randn(TEXT + 16, 8),
        "sin": torch.randn(TEXT + 16, 8),
    }
    varying = {key: {0: ("batch", 1, 8)} if key in ("x", "text", "c") else {} for key in example}
    path = tmp_path / "model.onnx"
    export_onnx(alone, example, dynamic=varying, outputs=["y"], path=path)
    engine = OnnxRuntime().open(path, 1)
    call = {key: torch.cat([tensor, tensor.flip(1)]) if varying[key] else tensor for key, tensor in example.items()}
    with torch.no_grad():
        wanted = alone(**call)
    (found,) = engine({key: tensor.numpy() for key, tensor in call.items()}).values()
    torch.testing.assert_close(torch.from_numpy(found), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("step", [MergeTokens(r=2), MergeUnmergeTokens(over="both")], ids=["merge", "unmerge"])
@BOTH
def test_engines_agree_at_every_batch_and_text(name, step, tmp_path):
    subject = JOINT[name]()
    model, path = step.apply(subject.copy(), Context()).model.eval(), tmp_path / "model.onnx"
    varying = {key: dynamic(key, text=True) for key in subject.inputs}
    export_onnx(model, subject.inputs, dynamic=varying, outputs=["y"], path=path)
    engine = OnnxRuntime().open(path, 1)
    for batch, text in ((2, TEXT), (3, 9)):
        call = {key: torch.rand(sizes(key, tensor, batch=batch, text=text)) for key, tensor in subject.inputs.items()}
        with torch.no_grad():
            wanted = model(**call)[0]
        (found,) = engine({key: tensor.numpy() for key, tensor in call.items()}).values()
        torch.testing.assert_close(torch.from_numpy(found), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@BOTH
def test_tensorrt_rtx_takes_the_graphs(name, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    from enginewright.targets.tensorrt_rtx_engine import TensorRtRtx

    subject = JOINT[name]()
    model, path = MergeTokens(r=2).apply(subject.copy(), Context()).model.eval(), tmp_path / "model.onnx"
    varying = {key: dynamic(key, text=False) for key in subject.inputs}
    export_onnx(model, subject.inputs, dynamic=varying, outputs=["y"], path=path)
    ranges = {
        key: ShapeRange(*(sizes(key, tensor, batch=batch, text=TEXT) for batch in (1, 2, 8)))
        for key, tensor in subject.inputs.items()
    }
    (tmp_path / "engine").mkdir()
    TensorRtRtx().build(Graph(path=path, ranges=ranges), tmp_path / "engine")
    assert (tmp_path / "engine" / "engine.plan").stat().st_size > 1000
