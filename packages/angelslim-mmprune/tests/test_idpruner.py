"""The two strategies that a learned scorer drives."""

import pytest
import torch

from angelslim_core.errors import ModelError, NumericError, UsageError
from angelslim_mmprune.marginal_relevance import mmr
from angelslim_mmprune.plan import Need, Pool
from angelslim_mmprune.scorer import Scorer, load_scorer, save_scorer
from angelslim_mmprune.strategies import make_strategy


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    save_scorer(Scorer(12, 6, init_scale=1.0), tmp_path / "scorer")
    return tmp_path / "scorer"


def pool(seed=1):
    torch.manual_seed(seed)
    x = torch.randn(3, 30, 12) * 0.3
    x[1, 17:], x[2, 5:] = torch.nan, torch.nan
    return Pool(x, (30, 17, 5))


def kept(plan):
    return [row[row >= 0].tolist() for row in plan.keep]


def test_idpruner_scores_and_chooses_in_each_pool_alone(folder):
    tokens, keep = pool(), [8, 4, 2]
    plan = make_strategy("idpruner", scorer=folder).plan(tokens, keep)
    assert [len(row) for row in kept(plan)] == keep and plan.groups is None
    scorer = load_scorer(folder)
    for p in range(3):
        one = tokens.one(p)
        scores = scorer(one.features, one.valid)
        assert kept(plan)[p] == mmr(one.features, scores, keep[p])[0].tolist() == kept(make_strategy("idpruner", scorer=folder).plan(one, [keep[p]]))[0]


def test_lam_1_is_vision_selector_with_raw_and_soft_scores(folder):
    tokens, keep = pool(), [9, 5, 3]
    wanted = kept(make_strategy("vision_selector", scorer=folder).plan(tokens, keep))
    scores = load_scorer(folder)(tokens.features, tokens.valid)
    assert wanted == [sorted(scores[p, :n].topk(k).indices.tolist()) for p, (n, k) in enumerate(zip(tokens.counts, keep, strict=True))]
    for options in ({}, {"parallel_k": 3}, {"imp": "soft_topk"}, {"imp": "soft_topk", "soft_share": 0.5}):
        assert kept(make_strategy("idpruner", scorer=folder, lam=1, **options).plan(tokens, keep)) == wanted, options
    soft, raw = (kept(make_strategy("idpruner", scorer=folder, imp=imp).plan(pool(3), [9, 5, 3])) for imp in ("soft_topk", "raw"))
    assert soft != raw  # below 1 they differ, as they bend the scale


def test_padding_is_not_chosen_before_negative_scores(tmp_path):
    scorer = Scorer(12, 6, init_scale=0.1)
    scorer.load_state_dict({**scorer.state_dict(), "k_proj.bias": torch.ones(6), "q_proj.bias": torch.full((6,), -100.0)})
    save_scorer(scorer, tmp_path / "low")
    for name in ("vision_selector", "idpruner"):
        plan = make_strategy(name, scorer=tmp_path / "low").plan(pool(), [9, 5, 3])
        assert all(max(row) < n for row, n in zip(kept(plan), (30, 17, 5), strict=True))


def test_attention_needs_no_scorer_and_is_read_from_the_layer_asked_for():
    tokens = pool()
    strategy = make_strategy("idpruner", importance="attention", layer=-2)
    assert strategy.needs == (Need("encoder", -2, "importance"),)
    received = torch.rand(3, 30)
    given = Pool(tokens.features, tokens.counts, statistics={strategy.needs[0]: received})
    assert kept(strategy.plan(given, [8, 4, 2])) == [
        mmr(tokens.one(p).features, received[p : p + 1, :n], k)[0].tolist() for p, (n, k) in enumerate(((30, 8), (17, 4), (5, 2)))
    ]


def test_needs_nothing_of_the_encoder_with_a_scorer(folder):
    assert make_strategy("idpruner", scorer=folder).needs == make_strategy("vision_selector", scorer=folder).needs == ()


def test_what_is_refused(folder):
    for name, options in (
        ("idpruner", {}), ("vision_selector", {}), ("idpruner", {"importance": "attention", "scorer": folder}), ("idpruner", {"scorer": folder, "lam": 1.5}),
        ("idpruner", {"scorer": folder, "parallel_k": 0}), ("idpruner", {"scorer": folder, "imp": "soft"}),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=name):
            make_strategy(name, **options)
    for name in ("idpruner", "vision_selector"):
        with pytest.raises(ModelError, match="12"):
            make_strategy(name, scorer=folder).plan(Pool(torch.randn(1, 6, 10), (6,)), [2])
        with pytest.raises(ModelError):
            make_strategy(name, scorer=folder / "nowhere").plan(pool(), [2, 2, 2])
        bad = pool()
        bad.features[1, 3, 3] = torch.nan
        with pytest.raises(NumericError):
            make_strategy(name, scorer=folder).plan(bad, [2, 2, 2])


def test_a_layer_that_nothing_reads(tmp_path):
    with pytest.raises(UsageError, match="importance=attention only"):
        make_strategy("idpruner", scorer=tmp_path, layer=-2)
