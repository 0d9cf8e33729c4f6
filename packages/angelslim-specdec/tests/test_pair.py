"""Checks of a real pair, on a small one: what is right passes, wrong builds and texts of another distribution do not."""

import pytest
import torch

from angelslim_specdec.exactness import mutants, pair
from angelslim_specdec.exactness.drafters import Table
from angelslim_specdec.exactness.mutants import replaced
from angelslim_specdec.exactness.pair import check_pair, check_sampled, near_ties
from angelslim_specdec.exactness.statistics import quantiles, uniformity
from angelslim_specdec.exactness.subject import PROMPTS, bigrams, small_target
from angelslim_specdec.target import recast
from angelslim_specdec.verification import draw


@pytest.fixture
def target():
    return small_target()


def test_quantiles_of_draws_are_uniform_and_of_others_are_not():
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.softmax(2 * torch.randn(4000, 300, generator=generator), -1) for _ in range(2))
    chances = torch.rand(4000, generator=generator, dtype=torch.float64)

    def p_values(of):
        places = quantiles(p, q, draw(of, torch.rand(4000, generator=generator)), chances)
        return [uniformity(order.view(-1, 8)) for order in places]

    assert min(p_values(p)) > 1e-3
    assert p_values(p**0.8)[0] < 1e-6, "too flat"
    likely, favoured, _ = p_values(0.9 * p + 0.1 * q)
    assert favoured < 1e-6 and favoured < likely, "what the draft proposes comes too often"


def test_quantiles_by_hand():
    p, q = torch.tensor([[0.2, 0.5, 0.3]] * 4), torch.tensor([[0.8, 0.0, 0.2]] * 4)
    chances = torch.tensor([0.0, 0.0, 0.0, 0.5], dtype=torch.float64)
    found = quantiles(p, q, torch.tensor([0, 1, 2, 2]), chances)
    want = torch.tensor([[0.8, 0.0, 0.5, 0.65], [0.0, 0.5, 0.2, 0.35], [0.0, 0.2, 0.7, 0.85]], dtype=torch.float64)
    torch.testing.assert_close(found, want, atol=1e-6, rtol=0)


def test_p_values_of_uniform_numbers_are_uniform_and_pairs_tell_what_single_numbers_do_not():
    generator = torch.Generator().manual_seed(0)
    values = torch.tensor([uniformity(torch.rand(100, 8, generator=generator, dtype=torch.float64)) for _ in range(200)])
    assert 0.04 < float((values < 0.1).double().mean()) < 0.16
    one = torch.rand(400, 4, 1, generator=generator, dtype=torch.float64)
    assert uniformity(torch.cat([one, one], 2).flatten(1)) < 1e-6


@pytest.mark.parametrize("name", ["resampled from p after a rejection", "residual not renormalised", "one draw for two decisions"])
def test_wrong_rules_are_improbable(target, name):
    table = bigrams(target)
    with replaced(*mutants.SAMPLED[name]):
        found = check_sampled(target, lambda: Table(table), PROMPTS[1:2], "ratio", 3, 384)
    assert found["p"] < 1e-6 and not found["ok"] and found["texts"] == 384 and found["tokens"] == 384 * 16


@pytest.mark.parametrize("columns", [None, torch.tensor([1, 3, 4, 6, 7, 9, 10, 11])], ids=["whole vocabulary", "part of it"])
def test_right_rules_are_probable_and_few_texts_tell_nothing(target, columns):
    table = bigrams(target) if columns is None else bigrams(target)[:, columns]
    for rule in ("ratio", "match"):
        assert check_sampled(target, lambda: Table(table, columns), PROMPTS, rule, 3, 128)["ok"]
    few = check_sampled(target, lambda: Table(table, columns), PROMPTS[:1], "ratio", 3, 1)
    assert few["p"] > 1e-4 and not few["ok"], "texts of another temperature would pass as well"


def test_a_pair_that_is_right(target):
    table = bigrams(target)
    found = check_pair(target, lambda: lambda: Table(table), PROMPTS, k=3, max_new_tokens=12, texts=128)
    assert found["ok"], found
    assert [c["name"] for c in found["equality"]] == [
        "greedy, one row", "greedy, batches of 4", "ratio rule, top-k 1, batches of 4", "match rule, top-k 1, batches of 4",
    ]  # fmt: skip
    assert all(c["equal"] == c["rows"] == 3 and not c["gaps"] for c in found["equality"]) and [c["name"] for c in found["sampled"]] == [
        "ratio rule",
        "match rule",
    ]
    near = found["near_ties"]
    assert (
        near["dtype"] == "bfloat16"
        and near["rows"] == 3
        and near["tokens"] == 36
        and near["tolerance"] == 0.1
        and 1e-3 < near["rounding"] < 2
        and 0 <= near["rate"] <= 1
    )
    assert target.dtype == torch.float32


def test_trees_are_verified_where_a_draft_grows_them(target):
    from angelslim_specdec.exactness.subject import ways

    way = next(w for w in ways(target) if w.name == "eagle3")
    assert [w.name for w in pair._verifications(way.make)][-2:] == ["sampled, tree, top-k 1", "greedy, tree"]
    plain = pair._texts(target, None, PROMPTS, 1, 10)
    for verification in pair._verifications(way.make):
        assert pair._equality(target, verification, PROMPTS, plain, 4, 3, 10)["equal"] == 3, verification.name


def test_trees_are_looked_at_for_near_ties_too(target):
    from angelslim_specdec.exactness.subject import ways

    way = next(w for w in ways(target) if w.name == "eagle3")
    near = near_ties(target, lambda: way.make, PROMPTS, k=3, max_new_tokens=12, dtype=torch.float32)
    assert near["ok"] and not near["tree_parted"] and not near["tree_gaps"] and near["tree_rate"] == 0
    with replaced(*mutants.GREEDY["bonus from the wrong row"]):
        near = near_ties(target, lambda: way.make, PROMPTS, k=3, max_new_tokens=12, dtype=torch.float32)
    assert not near["ok"] and near["tree_rate"] == near["tree_parted"] / 3


@pytest.mark.parametrize(("name", "seen"), [("bonus from the wrong row", "greedy"), ("first token accepted, whatever it is", "greedy")])
def test_a_pair_that_parts_for_no_reason(target, name, seen):
    table = bigrams(target)
    with replaced(*mutants.GREEDY[name]):
        near = near_ties(target, lambda: lambda: Table(table), PROMPTS, k=3, max_new_tokens=12)
    assert not near["ok"] and near["parted"] and near["rate"] == near["parted"] / 3 and max(g["gap"] or 0 for g in near["gaps"]) > near["rounding"]
    assert near["within_tolerance"] < near["parted"] and all(g["near_tie"] for g in near["control_gaps"]), "plain decoding is not wrong"


def test_near_ties_are_those_within_the_tolerance(target):
    plain = pair._texts(target, None, PROMPTS[:1], 1, 8)
    with torch.no_grad():
        logits = target.model(input_ids=torch.tensor([[*PROMPTS[0], *plain[0][:5]]])).logits[0, -1]
    second = int(logits.topk(2).indices[1])
    gap = float(logits.amax() - logits[second])
    other = [[*plain[0][:5], second, *plain[0][6:]]]
    for tolerance in (gap * 1.01, gap * 0.99):
        (found,) = pair._gaps(target, PROMPTS[:1], plain, other, tolerance)
        assert found["position"] == 5 and found["gap"] == pytest.approx(gap, abs=1e-5) and found["near_tie"] is (tolerance > gap)
    (shorter,) = pair._gaps(target, PROMPTS[:1], plain, [plain[0][:5]], 1e9)
    assert shorter["position"] == 5 and shorter["gap"] is None and not shorter["near_tie"], "an end that no stop token explains"


def test_recast_leaves_what_16_bits_would_round(target):
    kept = {name: b.clone() for name, b in target.model.named_buffers()}
    recast(target.model, torch.bfloat16)
    assert target.dtype == torch.bfloat16 and {p.dtype for p in target.model.parameters()} == {torch.bfloat16}
    assert kept and all(torch.equal(b, kept[name]) for name, b in target.model.named_buffers())
    recast(target.model, torch.float32)
    assert target.dtype == torch.float32
