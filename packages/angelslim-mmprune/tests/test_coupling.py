"""Pruned models against unpruned ones whose dropped keys are masked; nothing is pruned where nothing may be; what was hooked is let go."""

from collections.abc import Sequence
from copy import deepcopy
from functools import partial
from inspect import signature
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from torch import nn

from angelslim_core.errors import ModelError, PlanError, UsageError
from angelslim_mmprune.coupling import attach
from angelslim_mmprune.plan import Plan, Pool
from angelslim_mmprune.strategies.base import Modality, Stage, Strategy
from angelslim_mmprune.strategies.random import Random
from angelslim_mmprune.testing import CONFIGS, prompt, tiny_model

# rows of text lengths and media: one, and two of different length
ONE = {
    "llava": [[4, ("image",), 3, ("image",), 5]],
    "qwen2_5_vl": [[4, (1, 6, 4), 3, (2, 2, 3), 4]],
    "qwen3_vl": [[4, (1, 6, 4), 3, (2, 2, 3), 4]],
    "qwen2_audio": [[4, (39,), 2, (30,), 5]],
}
TWO = {
    "llava": [[4, ("image",), 3, ("image",), 5], [9, ("image",), 2]],
    "qwen2_5_vl": [[4, (1, 6, 4), 3, (2, 2, 3), 4], [9, (1, 3, 3), 4]],
    "qwen3_vl": [[4, (1, 6, 4), 3, (2, 2, 3), 4], [9, (1, 3, 3), 4]],
    "qwen2_audio": [[4, (39,), 2, (30,), 5], [3, (47,), 1]],
}
MODELS = pytest.mark.parametrize("name", CONFIGS)


class Staged(Random):
    """By lot, at several stages."""

    layers: tuple[int | None, ...] = (None,)
    shares: tuple[float | None, ...] = (None,)

    @property
    def stages(self) -> tuple[Stage, ...]:
        return tuple(Stage(layer, share) for layer, share in zip(self.layers, self.shares, strict=True))


class Pairs(Strategy):
    """The first tokens stay, and each takes in every K-th behind it, by weights that differ."""

    name: ClassVar[str] = "pairs"
    modalities: ClassVar[frozenset[Modality]] = frozenset({"vision", "audio"})
    merges: ClassVar[bool] = True

    def plan(self, pool: Pool, keep: Sequence[int]) -> Plan:
        kept = Plan.of([torch.arange(k) for k in keep])
        groups, weights = torch.full(pool.features.shape[:2], -1), torch.zeros(pool.features.shape[:2])
        for i, (n, k) in enumerate(zip(pool.counts, keep, strict=True)):
            groups[i, :n] = torch.arange(n) % k
            raw = 1 + torch.arange(n) % 3
            weights[i, :n] = raw / torch.zeros(k).index_add(0, groups[i, :n], raw.float())[groups[i, :n]]
        return Plan(kept.keep, groups, weights)


class Norms(Strategy):
    """The longest tokens: depends on what they are, so that swapping media swaps what stays."""

    name: ClassVar[str] = "norms"
    modalities: ClassVar[frozenset[Modality]] = frozenset({"vision", "audio"})

    def plan(self, pool: Pool, keep: Sequence[int]) -> Plan:
        return Plan.of([pool.features[i, :n].norm(dim=-1).topk(k).indices for i, (n, k) in enumerate(zip(pool.counts, keep, strict=True))])


def generated(model, inputs, tokens=6):
    """Numbers [B, tokens] and logits [B, tokens, V]."""
    with torch.no_grad():
        found = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, output_logits=True, return_dict_in_generate=True)
    return found.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(found.logits, 1)


def replace(mask, module, args, kwargs):
    return args, kwargs | {"attention_mask": mask}


def masked(model, inputs, applied, new):
    """Logits [B, L + new, V] of the unpruned model, with nothing cached and keys masked from the layers on from which they are dropped."""
    ids = torch.cat([inputs["input_ids"], new], 1)
    real = torch.cat([inputs["attention_mask"], torch.ones_like(new)], 1).bool()
    batch, length = ids.shape
    causal = torch.ones(length, length, dtype=torch.bool).tril() & real[:, None]

    def mask_of(layer):
        seen = causal.clone()
        for stage in applied:
            if stage.stage.layer is None or layer > stage.stage.layer:
                for row, kept in enumerate(stage.kept):
                    left = torch.zeros(inputs["input_ids"].shape[1], dtype=torch.bool)
                    left[kept] = True
                    seen[row, :, : len(left)] &= left
        seen |= torch.eye(length, dtype=torch.bool)
        return torch.zeros(batch, 1, length, length).masked_fill(~seen[:, None], torch.finfo(torch.float32).min)

    def merge(module, args, kwargs):
        for stage in applied:
            for pool in stage.pools:
                if pool.groups is not None:
                    kwargs = dict(kwargs, inputs_embeds=mean(kwargs["inputs_embeds"], pool))
                    visual, features = kwargs.get("visual_pos_masks"), kwargs.get("deepstack_visual_embeds")
                    if features is not None:
                        full = [torch.zeros_like(kwargs["inputs_embeds"]).masked_scatter(visual[..., None], part) for part in features]
                        kwargs["deepstack_visual_embeds"] = [mean(part, pool)[visual] for part in full]
        return args, kwargs

    def mean(x, pool):
        out = x.clone()
        for number, kept in enumerate(pool.kept):
            members = (pool.groups == number).nonzero()[:, 0]
            weights = (1 + members % 3).double()
            out[pool.row, pool.positions[kept]] = ((x[pool.row, pool.positions[members]].double() * weights[:, None]).sum(0) / weights.sum()).float()
        return out

    root = model.model
    hooks = [root.language_model.register_forward_pre_hook(merge, with_kwargs=True)]
    for number, layer in enumerate(root.language_model.layers):
        hooks.append(layer.register_forward_pre_hook(partial(replace, mask_of(number)), with_kwargs=True))
    extended = dict(inputs, input_ids=ids, attention_mask=real.long())
    if "mm_token_type_ids" in inputs:
        extended["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(new, dtype=torch.int32)], 1)
    with torch.no_grad():
        logits = model(**extended, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return logits


def check(model, inputs, strategies, tokens=6):
    """Prefill at kept positions, and decoding, equal the oracle's."""
    with attach(model, strategies) as coupling, torch.no_grad():
        prefill = model(**inputs).logits
        numbers, logits = generated(model, inputs, tokens)
        applied = list(coupling.last)
    wanted = masked(model, inputs, applied, numbers)
    length = inputs["input_ids"].shape[1]
    for row, kept in enumerate(applied[-1].kept):
        assert kept.diff().min() > 0 and len(kept) == applied[-1].after[row]
        torch.testing.assert_close(prefill[row, -len(kept) :], wanted[row, kept], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(logits, wanted[:, length - 1 : -1], atol=1e-5, rtol=1e-4)
    return applied


@MODELS
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("strategy", [Random(keep_ratio=1.0), Pairs(keep_ratio=1.0), Staged(keep_ratio=1.0, layers=(2,))], ids=["prune", "merge", "layer"])
def test_all_kept_is_the_unpruned_model(name, attention, strategy):
    model, inputs = tiny_model(name, attention), prompt(name, TWO[name])
    with torch.no_grad():
        before, ids = model(**inputs).logits, generated(model, inputs, 32)
    with attach(model, strategy) as coupling, torch.no_grad():
        assert torch.equal(model(**inputs).logits, before)
        again = generated(model, inputs, 32)
        assert all(torch.equal(a, b) for a, b in zip(ids, again, strict=True))
        assert coupling.last[0].before == coupling.last[0].after == tuple(inputs["attention_mask"].sum(1).tolist())


@MODELS
@pytest.mark.parametrize("rows", [ONE, TWO], ids=["one", "ragged"])
@pytest.mark.parametrize(
    "strategies",
    [[Random(keep_ratio=0.4)], [Pairs(keep_ratio=0.4)], [Staged(keep_ratio=0.4, layers=(1,))],
     [Staged(layers=(None, 1, 2), shares=(0.7, 0.5, 0.2))], [Pairs(keep_ratio=0.8, budget_scope="image"), Staged(keep_ratio=0.3, layers=(2,))]],
    ids=["prune", "merge", "layer", "pyramid", "chain"],
)  # fmt: skip
def test_pruning_is_masking_at_the_same_positions(name, rows, strategies):
    model, inputs = tiny_model(name), prompt(name, rows[name])
    applied = check(model, inputs, strategies)
    assert applied[-1].after < applied[0].before
    text = sum(part if isinstance(part, int) else 0 for part in rows[name][0])
    assert all(len(stage.kept[0]) >= text for stage in applied)


@MODELS
def test_eager_attention_is_pruned_as_well(name):
    check(tiny_model(name, "eager"), prompt(name, TWO[name]), [Staged(layers=(None, 1), shares=(0.7, 0.3))])


@MODELS
@pytest.mark.parametrize("layers", [(None,), (1,)], ids=["before", "behind"])
def test_a_batch_is_its_rows(name, layers):
    model = tiny_model(name)
    strategy = Staged(keep_ratio=0.5, layers=layers)
    with attach(model, strategy):
        numbers, logits = generated(model, prompt(name, TWO[name]))
        both = prompt(name, TWO[name])
        for row in range(2):
            alone = one_row(name, both, row)
            single, own = generated(model, alone)
            torch.testing.assert_close(own[0], logits[row], atol=1e-5, rtol=1e-4)
            assert torch.equal(single[0], numbers[row])


def one_row(name, inputs, row):
    """A row of a prompt as a prompt of its own, without padding."""
    real = inputs["attention_mask"][row].bool()
    found = {key: inputs[key][row : row + 1, real] for key in ("input_ids", "attention_mask", "mm_token_type_ids") if key in inputs}
    media = [part for parts in TWO[name] for part in parts if not isinstance(part, int)]
    owner = [i for i, parts in enumerate(TWO[name]) for part in parts if not isinstance(part, int)]
    if name in ("llava", "qwen2_audio"):
        own = torch.tensor([i == row for i in owner])
        return found | {
            key: value[own] for key, value in inputs.items() if key not in found and len(value) == len(own) and key not in ("input_ids", "attention_mask")
        }
    for suffix, grid, video in (("", "image_grid_thw", False), ("_videos", "video_grid_thw", True)):
        of_kind = [i for i, size in zip(owner, media, strict=True) if (size[0] > 1) == video]
        if row in of_kind:
            own = torch.tensor([i == row for i in of_kind])
            sizes = inputs[grid].prod(1)
            found |= {f"pixel_values{suffix}": inputs[f"pixel_values{suffix}"][own.repeat_interleave(sizes)], grid: inputs[grid][own]}
    return found


@MODELS
def test_decoding_goes_on_where_the_unpruned_model_does(name):
    """The positions of new tokens follow the last of all, and not the number of those that are left."""
    model, inputs = tiny_model(name), prompt(name, TWO[name])
    seen = []
    rotary = model.model.language_model.rotary_emb
    hook = rotary.register_forward_pre_hook(lambda m, a, k: seen.append(k["position_ids"] if "position_ids" in k else a[1]), with_kwargs=True)
    generated(model, inputs, 4)
    unpruned, seen[:] = list(seen), []
    with attach(model, Random(keep_ratio=0.3)) as coupling:
        generated(model, inputs, 4)
    hook.remove()
    for before, after in zip(unpruned[1:], seen[1:], strict=True):
        last = before if before.ndim == 3 else before[None]
        assert torch.equal(last[-1].expand(2, -1), (after if after.ndim == 3 else after[None])[-1])
    first, short = (of if of.ndim == 3 else of[None].expand(3, -1, -1) for of in (unpruned[0], seen[0]))
    for row, kept in enumerate(coupling.last[0].kept):
        assert torch.equal(first[-3:, min(row, first.shape[1] - 1), kept], short[-3:, row, -len(kept) :])


@MODELS
def test_swapped_media_swap_what_stays(name):
    model = tiny_model(name)
    size = {"llava": ("image",), "qwen2_audio": (39,)}.get(name, (1, 4, 4))
    inputs = prompt(name, [[4, size, 3, size, 4]])
    key = "input_features" if name == "qwen2_audio" else "pixel_values"
    half = len(inputs[key]) // 2
    swapped = dict(inputs, **{key: torch.cat([inputs[key][half:], inputs[key][:half]])})
    with attach(model, Norms(keep_ratio=0.5, budget_scope="image")) as coupling, torch.no_grad():
        model(**inputs)
        first = [pool.kept.tolist() for pool in coupling.last[0].pools]
        model(**swapped)
        assert [pool.kept.tolist() for pool in coupling.last[0].pools] == first[::-1] and first[0] != first[1]


def test_budgets_of_prompt_image_and_frame():
    model, inputs = tiny_model("qwen3_vl"), prompt("qwen3_vl", [[4, (1, 6, 4), 3, (2, 2, 3), 4]])
    for options, counts in [
        ({"keep_ratio": 0.25}, [9]), ({"keep_ratio": 0.25, "budget_scope": "image"}, [6, 3]), ({"keep_ratio": 0.25, "budget_scope": "frame"}, [6, 2, 1]),
        ({"keep_tokens": 4, "budget_scope": "frame"}, [4, 4, 4]), ({"keep_tokens": 4}, [4]),
    ]:  # fmt: skip
        with attach(model, Random(**options)) as coupling, torch.no_grad():
            model(**inputs)
        pools = coupling.last[0].pools
        assert [len(pool.kept) for pool in pools] == counts
        assert [grid for pool in pools for grid in pool.grids] == ([(1, 6, 4), (1, 2, 3), (1, 2, 3)] if "frame" in options.values() else [(1, 6, 4), (2, 2, 3)])
        assert coupling.last[0].after[0] == coupling.last[0].before[0] - 36 + sum(counts)


@MODELS
def test_a_later_turn_goes_on_from_a_pruned_cache(name):
    """By generation with the whole text again, which transformers cuts by the tokens of the cache."""
    from transformers import DynamicCache

    model, inputs = tiny_model(name), prompt(name, ONE[name])
    more = torch.tensor([[7, 9, 11]])
    caches = {"cache" if "cache" in signature(model.forward).parameters else "past_key_values": DynamicCache()}
    with attach(model, Staged(layers=(None, 2), shares=(0.6, 0.3))) as coupling:
        with torch.no_grad():
            first = model.generate(**inputs, **caches, max_new_tokens=4, do_sample=False)
        applied = list(coupling.last)
        text = torch.cat([first, more], 1)
        again = {"input_ids": text, "attention_mask": torch.ones_like(text)}
        if "mm_token_type_ids" in inputs:
            again["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros(1, 7, dtype=torch.int32)], 1)
        numbers, logits = generated(model, again | caches, 4)
    length = inputs["input_ids"].shape[1]
    wanted = masked(model, inputs, applied, torch.cat([text[:, length:], numbers], 1))
    torch.testing.assert_close(logits, wanted[:, text.shape[1] - 1 : -1], atol=1e-5, rtol=1e-4)


def test_text_alone_is_left_alone():
    model, inputs = tiny_model("llava"), prompt("llava", [[9], [4]])
    with torch.no_grad():
        before = model(**inputs).logits
    with attach(model, Random(keep_ratio=0.1)) as coupling, torch.no_grad():
        assert torch.equal(model(**inputs).logits, before) and coupling.last == []


@MODELS
def test_removal_leaves_the_model_as_it_was(name):
    model, inputs = tiny_model(name), prompt(name, ONE[name])
    modules = {key: (module, type(module), module.forward.__func__) for key, module in model.named_modules()}
    implementations = {key: module.config._attn_implementation for key, module in model.named_modules() if hasattr(module, "config")}
    with torch.no_grad():
        before = model(**inputs).logits
    hooks = {key: (len(module._forward_hooks), len(module._forward_pre_hooks)) for key, module in model.named_modules()}
    coupling = attach(model, Random(keep_ratio=0.3))
    handle = model.model.language_model.layers[2].mlp.register_forward_pre_hook(fails)
    with torch.no_grad(), pytest.raises(RuntimeError, match="on purpose"):
        model(**inputs)
    handle.remove()
    with torch.no_grad():
        assert model(**inputs).logits.shape[1] < before.shape[1]
    coupling.remove()
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, before)
    assert all(modules[key] == (module, type(module), module.forward.__func__) for key, module in model.named_modules())
    assert hooks == {key: (len(module._forward_hooks), len(module._forward_pre_hooks)) for key, module in model.named_modules()}
    assert implementations == {key: module.config._attn_implementation for key, module in model.named_modules() if hasattr(module, "config")}


def fails(module: nn.Module, args: object) -> None:
    raise RuntimeError("on purpose")


def test_what_cannot_be():
    llava, qwen3 = tiny_model("llava"), tiny_model("qwen3_vl")
    with pytest.raises(ModelError, match="no media are known"):
        attach(llava.model.language_model, Random())
    with pytest.raises(PlanError, match="the least is 1"):
        attach(qwen3, Staged(layers=(0,)))
    with pytest.raises(UsageError, match="layer 4 of 4"):
        attach(llava, Staged(layers=(4,)))
    with pytest.raises(PlanError, match="nothing comes behind"):
        attach(llava, Staged(layers=(3,)))

    class Late(Pairs):
        @property
        def stages(self):
            return (Stage(1),)

    with pytest.raises(PlanError, match="merges"):
        attach(llava, Late())

    class Heard(Random):
        modalities: ClassVar[frozenset[Modality]] = frozenset({"audio"})

    with pytest.raises(PlanError, match="chooses among audio"):
        attach(llava, Heard())
    inputs = prompt("llava", ONE["llava"])
    with attach(llava, Random(keep_tokens=33)), pytest.raises(UsageError, match="33 of 32"):
        llava(**inputs)
    with attach(llava, Random()):
        with pytest.raises(UsageError, match="32 placeholders for 1 x image of 16"):
            llava(**dict(inputs, pixel_values=inputs["pixel_values"][:1]))
        with pytest.raises(UsageError, match="and the pass no image"):
            llava(input_ids=inputs["input_ids"])
    qwen = prompt("qwen3_vl", ONE["qwen3_vl"])
    with attach(qwen3, Random()), pytest.raises(UsageError, match="placeholders"):
        qwen3(**dict(qwen, image_grid_thw=torch.tensor([[1, 12, 6]])))
    rows = prompt("qwen3_vl", [[2, (1, 2, 2), 2], [2, (1, 3, 3), 2]])
    with attach(qwen3, Random()), pytest.raises(UsageError, match="in two prompts"):
        qwen3(**dict(rows, image_grid_thw=rows["image_grid_thw"].flip(0)))


def test_a_cache_that_is_no_longer_what_pruning_left():
    from transformers import DynamicCache

    model, inputs, cache = tiny_model("llava"), prompt("llava", ONE["llava"]), DynamicCache()
    with attach(model, Random()), torch.no_grad():
        model(**inputs, past_key_values=cache)
        cache.crop(-5)
        with pytest.raises(UsageError, match="where pruning left"):
            model(input_ids=torch.tensor([[5]]), past_key_values=cache)


@pytest.mark.parametrize("layers", [(None,), (None, 2)], ids=["before", "both"])
def test_a_new_image_after_a_pruned_prompt(layers):
    """Each prompt's tokens are pruned once, and the new one's positions follow all of the old one's."""
    from transformers import DynamicCache

    model, cache = tiny_model("llava"), DynamicCache()
    first, second = prompt("llava", ONE["llava"]), prompt("llava", [[3, ("image",), 2]], seed=1)
    with attach(model, Staged(layers=layers, shares=(0.6, 0.3)[: len(layers)])) as coupling, torch.no_grad():
        model(**first, past_key_values=cache)
        one = list(coupling.last)
        logits = model(input_ids=second["input_ids"], pixel_values=second["pixel_values"], past_key_values=cache).logits
        two = list(coupling.last)
        last = model(input_ids=torch.tensor([[7]]), past_key_values=cache).logits
    width = first["input_ids"].shape[1]
    both = {key: torch.cat([first[key], second[key]], 0 if key == "pixel_values" else 1) for key in first}
    applied = [SimpleNamespace(stage=a.stage, kept=(torch.cat([a.kept[0], b.kept[0] + width]),), pools=()) for a, b in zip(one, two, strict=True)]
    wanted = masked(model, both, applied, torch.tensor([[7]]))
    torch.testing.assert_close(logits[0], wanted[0, two[-1].kept[0] + width], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(last[0, -1], wanted[0, -1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
def test_beams_of_a_prompt_are_pruned_alike(name):
    """Generation repeats what the encoder made for each beam."""
    model, inputs = tiny_model(name), prompt(name, TWO[name])
    with attach(model, Norms(keep_ratio=0.4, budget_scope="image")) as coupling, torch.no_grad():
        model(**inputs)
        alone = [pool.kept.tolist() for pool in coupling.last[0].pools]
        model.generate(**inputs, max_new_tokens=4, num_beams=2, do_sample=False)
        assert [pool.kept.tolist() for pool in coupling.last[0].pools] == [*alone[:2], *alone[:2], alone[2], alone[2]]
        assert [pool.row for pool in coupling.last[0].pools] == [0, 0, 1, 1, 2, 3]


@MODELS
def test_a_copy_of_a_pruned_cache(name):
    """It goes on at the same positions as the cache that it is a copy of: one prefix may serve many questions."""
    model, inputs = tiny_model(name), prompt(name, ONE[name])
    more = torch.randint(3, 48, (1, 5), generator=torch.Generator().manual_seed(1))
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(more)], 1)
    with attach(model, Random(keep_ratio=0.4)), torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        copy = deepcopy(cache)
        said = model(input_ids=more, past_key_values=cache, attention_mask=mask).logits
        assert torch.equal(model(input_ids=more, past_key_values=copy, attention_mask=mask).logits, said)


def test_a_cache_of_another_strategy():
    model, inputs = tiny_model("llava"), prompt("llava", ONE["llava"])
    with attach(model, Random(keep_ratio=0.4)), torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
    with attach(model, Staged(keep_ratio=0.4, layers=(1,))), pytest.raises(UsageError, match="behind other layers"):
        model(input_ids=torch.tensor([[5]]), past_key_values=cache)


def test_a_model_that_drops_tokens_already():
    model = tiny_model("llava")
    with attach(model, Random(keep_ratio=0.4)), pytest.raises(UsageError, match="already"):
        attach(model, Random(keep_ratio=0.5))
    attach(model, Random(keep_ratio=0.5)).remove()


def test_an_encoder_without_a_class_token():
    """LLaVA takes SigLIP too, of which `default` leaves out a patch: no grid."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    siglip = {**CONFIGS["llava"]["vision_config"], "model_type": "siglip_vision_model"}
    del siglip["projection_dim"]
    model = LlavaForConditionalGeneration(LlavaConfig(**{**CONFIGS["llava"], "vision_config": siglip}))
    with pytest.raises(ModelError, match="SiglipVisionConfig"):
        attach(model, Random(keep_ratio=0.5))
