"""The learned scorer: its formula, its files, the soft choice and the training through a model."""

import gc
import json
import weakref
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file

from angelslim_core.errors import ModelError, NumericError, OutputError, UsageError
from angelslim_mmprune.scorer import Scorer, load_scorer, save_scorer, soft_topk
from angelslim_mmprune.scorer_training import ScorerOptions, train_scorer


def strong(width=12, hidden=5, seed=0):
    """A scorer whose scores are far apart."""
    torch.manual_seed(seed)
    return Scorer(width, hidden, init_scale=1.0).requires_grad_(False)


def test_scores_are_mean_products_of_queries_and_keys():
    scorer = strong()
    torch.nn.init.normal_(scorer.q_proj.bias)
    torch.nn.init.normal_(scorer.k_proj.bias)
    x, counts = torch.randn(2, 9, 12), [9, 4]
    valid = torch.arange(9) < torch.tensor(counts)[:, None]
    x[1, 4:] = torch.nan
    found = scorer(x, valid)
    double = strong().double()
    double.load_state_dict(scorer.state_dict())
    for b, count in enumerate(counts):
        part = x[b, :count].double()
        wanted = (double.q_proj(part) @ double.k_proj(part).T / 5**0.5).mean(1)
        assert torch.allclose(found[b, :count].double(), wanted, atol=1e-4)
        assert not found[b, count:].any()


def test_a_scorer_begins_small_and_survives_its_folder(tmp_path):
    torch.manual_seed(0)
    scorer = Scorer(64, 32)
    assert 0.8e-4 < float(scorer.q_proj.weight.std()) < 1.2e-4 and not scorer.k_proj.bias.any()
    save_scorer(scorer, tmp_path / "s")
    back = load_scorer(tmp_path / "s")
    assert all(torch.equal(a, b) for a, b in zip(scorer.state_dict().values(), back.state_dict().values(), strict=True))
    assert json.loads((tmp_path / "s" / "config.json").read_text())["hidden_dim"] == 32 and not back.q_proj.weight.requires_grad
    with pytest.raises(OutputError):
        save_scorer(scorer, tmp_path / "s")
    save_scorer(Scorer(8, 4), tmp_path / "s", replace=True)
    assert load_scorer(tmp_path / "s").in_features == 8


@pytest.mark.parametrize("prefix", ["module.", "visual.importance_scorer.", "_orig_mod.", "module._orig_mod.visual.importance_scorer."])
def test_published_names(tmp_path, prefix):
    scorer = strong()
    save_scorer(scorer, tmp_path / "s")
    file = tmp_path / "s" / "model.safetensors"
    state = {prefix + name: t.bfloat16() for name, t in load_file(file).items()}
    save_file({**state, prefix + "norm.weight": torch.ones(12)}, file)
    (tmp_path / "s" / "scorer.py").write_text("raise SystemExit(1)")
    assert torch.equal(load_scorer(tmp_path / "s").k_proj.weight, scorer.k_proj.weight.bfloat16())


def test_folders_that_hold_no_scorer(tmp_path):
    def folder(name, change=lambda state: state, **config):
        save_scorer(strong(), tmp_path / name)
        path = tmp_path / name
        save_file(change(load_file(path / "model.safetensors")), path / "model.safetensors")
        (path / "config.json").write_text(json.dumps({**json.loads((path / "config.json").read_text()), **config}))
        return path

    nan = lambda s: {**s, "q_proj.bias": torch.full((5,), torch.nan)}  # noqa: E731
    wrong = [
        folder("a", hidden_dim=6), folder("b", in_features="12"), folder("c", in_features=True), folder("d", init_scale="x"), folder("e", in_features=10**12),
        folder("f", lambda s: {k: v for k, v in s.items() if k != "q_proj.bias"}), folder("g", lambda s: {**s, "more": torch.ones(1)}), folder("h", nan),
        folder("i", lambda s: {**s, "module.q_proj.bias": torch.ones(5)}), folder("j", lambda s: {**s, "q_proj.bias": torch.ones(5, dtype=torch.int32)}),
        tmp_path / "nowhere",
    ]  # fmt: skip
    for path in wrong:
        with pytest.raises(ModelError):
            load_scorer(path)


def test_soft_topk_of_a_staircase():
    """Fixture T of the design note."""
    s, valid = torch.arange(4.0)[None], torch.ones(1, 4, dtype=torch.bool)
    p = soft_topk(s, torch.tensor([2.0]), valid)
    assert torch.allclose(p, torch.tensor([[0.182426, 0.377541, 0.622459, 0.817574]]), atol=1e-5)
    p = soft_topk(s, torch.tensor([0.8]), valid)
    assert torch.allclose(p.logit() - s, torch.full((1, 4), -3.237474), atol=1e-4)


def test_soft_topk_adds_up_and_differentiates():
    torch.manual_seed(0)
    s = torch.randn(3, 7, dtype=torch.float64) * 3
    valid = torch.arange(7) < torch.tensor([7, 4, 1])[:, None]
    k = torch.tensor([2.0, 1.5, 0.3])
    p = soft_topk(s, k, valid)
    assert torch.allclose(p.sum(1), k.double()) and not p[~valid].any()
    s.requires_grad_(True)
    assert torch.autograd.gradcheck(lambda s: soft_topk(s, k, valid), (s,))
    weight = torch.randn(3, 7, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((soft_topk(s, k, valid) * weight).sum(), s)
    step = 1e-5 * torch.eye(7, dtype=torch.float64)
    with torch.no_grad():
        for i in range(7):
            up, down = ((soft_topk(s + sign * step[i], k, valid) * weight).sum(1) for sign in (1, -1))
            assert torch.allclose((up - down) / 2e-5, gradient[:, i], atol=1e-7)
    assert not gradient[~valid].any()


def test_soft_topk_of_more_than_there_are_and_of_saturated_scores():
    valid = torch.ones(1, 5, dtype=torch.bool)
    s = torch.tensor([[-500.0, -500, 500, 500, -500]], requires_grad=True)
    p = soft_topk(s, torch.tensor([2.0]), valid)
    p.sum().backward()
    assert torch.allclose(p, torch.tensor([[0.0, 0, 1, 1, 0]]), atol=1e-3) and bool(s.grad.isfinite().all())
    assert float(soft_topk(torch.zeros(1, 5), torch.tensor([9.0]), valid).detach().sum()) == pytest.approx(5, abs=1e-3)


def tiny_llava():
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    vision = CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4, projection_dim=16)
    text = LlamaConfig(
        hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, vocab_size=50, max_position_embeddings=64
    )
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=49, vision_feature_layer=-2))


def tiny_qwen():
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "depth": 2, "num_heads": 2, "out_hidden_size": 24, "patch_size": 4, "spatial_merge_size": 2,
        "window_size": 16, "fullatt_block_indexes": [1], "temporal_patch_size": 2,
    }  # fmt: skip
    text = {
        "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 50,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 2, 2]}, "max_position_embeddings": 64,
    }  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(vision_config=vision, text_config=text, image_token_id=49, video_token_id=48, vision_start_token_id=47, vision_end_token_id=46)
    )


def llava_batch():
    torch.manual_seed(1)
    ids = torch.cat([torch.full((2, 16), 49), torch.randint(0, 40, (2, 6))], 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(2, 3, 16, 16), "labels": ids.masked_fill(ids == 49, -100)}


def qwen_batch():
    torch.manual_seed(1)
    ids = torch.tensor([[1, 47, *[49] * 8, 46, 3, 9, 4, 8]])
    return {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(32, 2 * 3 * 16), "image_grid_thw": torch.tensor([[1, 4, 8]]),
        "mm_token_type_ids": (ids == 49).long(), "labels": ids.masked_fill(ids >= 46, -100),
    }  # fmt: skip


@pytest.mark.parametrize(("model", "batch"), [(tiny_llava, llava_batch), (tiny_qwen, qwen_batch)], ids=["llava", "qwen2_5_vl"])
def test_training_changes_the_scorer_alone_and_lowers_its_loss(model, batch):
    model, batch = model().train(), batch()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    torch.manual_seed(7)
    start = Scorer(24, 12, init_scale=10.0)
    first = {name: p.clone() for name, p in start.state_dict().items()}
    found = train_scorer(model, [batch], ScorerOptions(steps=25, lr=0.5, first_weight=0.5, last_weight=0.5), scorer=start)
    loss = [a + 0.5 * b for a, b in zip(found.task, found.distance, strict=True)]
    assert len(loss) == 25 and loss[-1] < loss[0] - 0.05, loss
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items()) and model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not torch.equal(found.scorer.q_proj.weight, first["q_proj.weight"]) and not torch.equal(found.scorer.k_proj.weight, first["k_proj.weight"])
    task = train_scorer(model, [batch], ScorerOptions(steps=12, lr=0.1, first_weight=0, last_weight=0), scorer=Scorer(24, 12, init_scale=10.0)).task
    assert task[-1] < task[0]  # which none but the gradient through the language model can do
    with torch.no_grad():  # no hook is left behind
        assert torch.equal(model.eval()(**batch).logits, model(**batch).logits)


def test_training_multiplies_media_alone_by_the_soft_choice():
    model, batch = tiny_llava().eval(), llava_batch()
    scorer = Scorer(24, 12, init_scale=0.3)
    seen = []
    hook = model.get_decoder().register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs["inputs_embeds"].detach()), with_kwargs=True)
    with torch.no_grad():
        model(**batch)
    hook.remove()
    # this hook comes after that of the training
    model.get_decoder().layers[0].register_forward_pre_hook(lambda m, args: seen.append(args[0].detach()))
    start = Scorer(24, 12)
    start.load_state_dict(scorer.state_dict())
    found = train_scorer(model, [batch], ScorerOptions(steps=1), scorer=scorer)
    x = seen[0][:, :16]
    valid = torch.ones(2, 16, dtype=torch.bool)
    soft = soft_topk(start(x, valid), torch.full((2,), 3.2), valid).detach()
    assert torch.allclose(seen[1][:, :16], x * soft[..., None], atol=1e-6) and torch.equal(seen[1][:, 16:], seen[0][:, 16:])
    hard = torch.zeros(2, 16).scatter(1, start(x, valid).topk(3).indices, 1)
    assert found.distance[0] == pytest.approx(float(torch.nn.functional.binary_cross_entropy(soft, hard)), rel=1e-5)


def test_training_refuses_what_makes_no_sense():
    model, batch = tiny_llava(), llava_batch()
    options = ScorerOptions(steps=2)
    wrong = ([], [{k: v for k, v in batch.items() if k != "labels"}], [{**batch, "input_ids": torch.ones_like(batch["input_ids"])}])
    for batches in wrong:
        with pytest.raises(UsageError):
            train_scorer(model, batches, options)
    scorer = Scorer(24, 12)
    kept = scorer.q_proj.weight.clone()
    with pytest.raises(NumericError):
        train_scorer(model, [{**batch, "pixel_values": torch.full((2, 3, 16, 16), torch.nan)}], options, scorer=scorer)
    assert torch.equal(scorer.q_proj.weight, kept) and all(p.requires_grad for p in model.parameters())
    model.config = model.config.text_config
    with pytest.raises(ModelError):
        train_scorer(model, [batch], options)


def test_batches_are_not_held():
    """Of a loader of many batches no more than one or two are in memory; it is read again, which an iterator cannot be."""

    class Loader:
        made: ClassVar[list] = []

        def __iter__(self):
            for _ in range(3):
                batch = llava_batch()
                self.made.append(weakref.ref(batch["pixel_values"]))
                yield batch
                del batch
                gc.collect()
                assert sum(of() is not None for of in self.made) <= 2

    train_scorer(tiny_llava(), Loader(), ScorerOptions(steps=7))
    assert len(Loader.made) == 7
    with pytest.raises(UsageError, match="none left"):
        train_scorer(tiny_llava(), iter([llava_batch()]), ScorerOptions(steps=2))
