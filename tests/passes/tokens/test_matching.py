import pytest
import torch

from enginewright.passes.tokens.matching import ascending, cell_corners, clipped, inverse, match, rows


def official(metric, r, *, class_token=False, distill_token=False):
    """Bipartite soft matching and the weighted mean as the authors of ToMe wrote them, with sorting everywhere."""
    protected = int(class_token) + int(distill_token)
    r = min(r, (metric.shape[1] - protected) // 2)
    metric = metric / metric.norm(dim=-1, keepdim=True)
    scores = metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)
    if class_token:
        scores[:, 0, :] = -torch.inf
    if distill_token:
        scores[:, :, 0] = -torch.inf
    node_max, node_idx = scores.max(dim=-1)
    edge = node_max.argsort(dim=-1, descending=True)[..., None]
    unmerged, source = edge[:, r:].sort(dim=1)[0], edge[:, :r]
    target = node_idx[..., None].gather(1, source)

    def merge(x):
        first, second = x[:, ::2], x[:, 1::2]
        width = x.shape[-1]
        stay = first.gather(1, unmerged.expand(-1, -1, width))
        second = second.scatter_add(1, target.expand(-1, -1, width), first.gather(1, source.expand(-1, -1, width)))
        if distill_token:
            return torch.cat([stay[:, :1], second[:, :1], stay[:, 1:], second[:, 1:]], dim=1)
        return torch.cat([stay, second], dim=1)

    def weighted(x, size):
        return merge(x * size) / merge(size), merge(size)

    return weighted


@pytest.mark.parametrize("form", ["onehot", "scatter"])
@pytest.mark.parametrize("leading", [0, 1, 2])
@pytest.mark.parametrize(("tokens", "r"), [(12, 3), (13, 1), (13, 100), (14, 5), (5, 1)])
def test_two_merges_in_a_row_are_the_authors(form, leading, tokens, r):
    x, size = torch.randn(3, tokens, 8), torch.ones(3, tokens, 1)
    ours, ours_size = x, None
    for _ in range(2):
        if not clipped(r, ours.shape[1], leading):
            break
        metric = torch.randn(3, ours.shape[1], 4)
        reference = official(metric, r, class_token=leading > 0, distill_token=leading > 1)
        x, size = reference(x, size)
        matching = match(metric, clipped(r, ours.shape[1], leading), leading=leading)
        ours, ours_size = matching.merge(ours, ours_size, form)
        torch.testing.assert_close(ours, x, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(ours_size, size[..., 0])
    assert ours_size.sum(dim=1).tolist() == [tokens] * 3


def test_the_forms_agree_to_1e_6():
    x, size = torch.randn(2, 40, 16), torch.randint(1, 5, (2, 40)).float()
    matching = match(torch.randn(2, 40, 8), 15, leading=1)
    torch.testing.assert_close(
        matching.merge(x, size, "onehot")[0], matching.merge(x, size, "scatter")[0], atol=1e-6, rtol=0
    )


def test_rows_of_the_merge_matrix_sum_to_1_and_leading_tokens_stay_in_front():
    matching = match(torch.randn(2, 20, 8), 8, leading=2)
    matrix, size = matching.merge(torch.eye(20).expand(2, -1, -1), torch.rand(2, 20) + 0.5, "onehot")
    torch.testing.assert_close(matrix.sum(dim=-1), torch.ones(2, 12))
    torch.testing.assert_close(matrix[:, :2, :2], torch.eye(2).expand(2, -1, -1))
    assert size.shape == (2, 12)
    assert ((matrix > 0).sum(dim=(1, 2)) == 20).all(), "every token is in exactly one row"
    torch.testing.assert_close(matrix.argmax(dim=1)[:, :2], torch.tensor([[0, 1]]).expand(2, -1))


def test_the_row_of_each_token_is_where_it_went():
    matching = match(torch.randn(2, 11, 8), 4, leading=1)
    matrix, _ = matching.merge(torch.eye(11).expand(2, -1, -1), None, "onehot")
    assert torch.equal(matching.rows_of(), (matrix > 0).float().argmax(dim=1))


def test_the_most_alike_go_and_others_stay():
    metric = torch.eye(8)[None].clone()
    metric[0, 4] = metric[0, 7]  # an even token like an odd one
    matching = match(metric, 1, leading=0)
    assert matching.go.tolist() == [[4]]
    assert matching.stay[0, matching.into[0, 0]].item() == 7
    assert matching.stay.tolist() == [[0, 2, 6, 1, 3, 5, 7]]


def test_half_precision_scores_are_compared_in_full():
    metric = torch.randn(1, 30, 64)
    metric = metric.half()
    assert torch.equal(match(metric, 6, leading=1).go, match(metric.float(), 6, leading=1).go)


def test_small_helpers():
    x = torch.arange(24.0).view(2, 4, 3)
    index = torch.tensor([[3, 0], [1, 1]])
    assert torch.equal(rows(x, index), torch.stack([x[0, [3, 0]], x[1, [1, 1]]]))
    assert ascending(torch.tensor([[5, 1, 3]])).tolist() == [[1, 3, 5]]
    assert inverse(torch.tensor([[2, 0, 1]])).tolist() == [[1, 2, 0]]
    assert cell_corners(17, leading=1) == [1, 3, 9, 11]
    assert cell_corners(25, leading=0) == [0, 2, 10, 12]  # the last row and column are no cell's
    assert cell_corners(1, leading=0) == []
    assert [clipped(4, n, 1) for n in (20, 8, 3, 2, 1)] == [4, 3, 1, 0, 0]
