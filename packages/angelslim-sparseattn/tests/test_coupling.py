"""Models attend through `attach`, whatever their architecture, padding, cache or turn."""

import copy
import re
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from transformers import DynamicCache, StaticCache

import angelslim_sparseattn
from angelslim_core.adapters import builtin_layouts
from angelslim_core.errors import AngelslimError, ModelError, UsageError
from angelslim_core.kv_cache import tapped
from angelslim_core.loading import load_model
from angelslim_core.testing.models import NESTED, TINY
from angelslim_sparseattn import config as config_module
from angelslim_sparseattn import make_policy, select
from angelslim_sparseattn.config import SparseAttentionConfig, shape_of
from angelslim_sparseattn.coupling import attach, captured

# sliding window, MLA, MoE, multimodal RoPE and linear attention among them
ARCHITECTURES = ["llama", "qwen3", "gemma3_text", "deepseek_v3", "qwen3_moe", "glm4_moe", "hunyuan_v1_moe", "qwen3_vl", "qwen3_5", "gemma3"]
STEM = {"policy": "stem", "options": {"rate": 0.1, "n_init": 16, "n_local": 16}}
# reads no tokens but those that a row keeps, so that a prompt in parts is the prompt
SINK = {"policy": "a_shape", "options": {"n_init": 16, "n_local": 32}}
SMALL = {"block": 16, "min_len": 32, "dense_layers": ()}
LENGTH = 150


def small(**changes):
    return SparseAttentionConfig(**{**SMALL, **STEM, **changes})


@pytest.fixture(scope="module")
def model(tiny):
    """model(architecture): in fp32, one for all tests."""
    made = {}

    def make(architecture="qwen3"):
        if architecture not in made:
            made[architecture] = load_model(tiny(architecture, dtype="float32"), "cpu").model
        return made[architecture]

    return make


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def tokens(*shape, seed=0):
    return torch.randint(3, 250, shape, generator=torch.Generator().manual_seed(seed))


def off(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_models_run_unpatched(model, architecture):
    of, ids = model(architecture), tokens(2, LENGTH)
    dense = of(ids).logits
    written = of.generate(ids, max_new_tokens=4, do_sample=False)
    with attach(of, small(options={"rate": 1.0})) as attached:
        assert off(of(ids).logits, dense) < 1e-4
        assert of.generate(ids, max_new_tokens=4, do_sample=False).equal(written)
        rows = attached.stats()
    assert any(row["sparse"] == 2 and row["density"] == 1 for row in rows)
    assert all(row["calls"] == 5 and row["dense"] == {"few queries": 3} for row in rows if row["sparse"])
    assert all(row["dense"].get("sliding window") == 2 for row in rows if not row["sparse"])
    with attach(of, small()) as attached:
        assert 1e-3 < off(of(ids).logits, dense) < 1
        assert any(0.2 < row["density"] < 0.7 for row in attached.stats() if row["sparse"])
        assert of.generate(ids, max_new_tokens=4, do_sample=False).shape == written.shape
    assert of(ids).logits.equal(dense)


def test_what_was_chosen_for_another_model_is_refused(model):
    own = shape_of(model("qwen3").config.to_dict())
    assert {"num_hidden_layers", "num_attention_heads", "rope_theta"} <= own.keys()
    attach(model("qwen3"), small(chosen_for=own)).detach()
    for name in own:
        with pytest.raises(UsageError, match=f"chosen_for: {name} is"):
            attach(model("qwen3"), small(chosen_for={**own, name: own[name] * 2}))


def test_the_package_names_no_model():
    names = {*TINY, *NESTED, *(name for layout in builtin_layouts() for name in layout.model_types)}
    families = {re.match(r"[a-z]+", name)[0] for name in names} - {"seed"}  # seeds are also drawn from
    for path in Path(angelslim_sparseattn.__file__).parent.rglob("*"):
        if path.suffix in (".py", ".yaml"):
            assert not families & set(re.findall(r"[a-z]+", path.read_text().lower())), path


@pytest.mark.parametrize("architecture", ["qwen3", "deepseek_v3", "gemma3_text"])
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padding_is_as_if_it_were_not_there(model, architecture, side):
    of, lengths = model(architecture), (LENGTH, 101, 33, 20)
    ids = [tokens(1, n, seed=n) for n in lengths]
    batch, mask = torch.zeros(len(ids), LENGTH, dtype=torch.int64), torch.zeros(len(ids), LENGTH, dtype=torch.int64)
    spots = []
    for row, own in enumerate(ids):
        n = own.shape[1]
        first = {"left": LENGTH - n, "right": 0, "both": (LENGTH - n) // 2}[side]
        spots.append(slice(first, first + n))
        batch[row, spots[-1]], mask[row, spots[-1]] = own[0], 1
    for config in (small(), small(dense_layers=(1,))):
        with attach(of, config) as attached:
            found = of(batch, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
            assert attached.stats()[-1 if 1 not in config.dense_layers else 0]["sparse"] or architecture == "gemma3_text"
            for row, own in enumerate(ids):
                assert off(found[row, spots[row]], of(own).logits[0]) < 1e-5


def test_generation_from_a_padded_batch_is_that_of_its_prompts(model):
    of, ids = model(), [tokens(1, LENGTH), tokens(1, 90, seed=1)]
    batch = torch.cat([ids[0], torch.cat([torch.zeros(1, LENGTH - 90, dtype=torch.int64), ids[1]], 1)])
    mask = (batch != 0).long()
    with attach(of, small()):
        found = of.generate(batch, attention_mask=mask, max_new_tokens=6, do_sample=False)
        for row, own in enumerate(ids):
            assert found[row, LENGTH:].equal(of.generate(own, max_new_tokens=6, do_sample=False)[0, own.shape[1] :])


def test_the_kernel_takes_what_models_hand_it(model):
    """Views of [B, L, H, D], values of another width, padding, a second turn."""
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for architecture in ("qwen3", "deepseek_v3"):
        of, ids = copy.deepcopy(model(architecture)).to(device), tokens(2, 100).to(device)
        mask = torch.ones_like(ids)
        mask[1, :40] = 0
        found = []
        for executor in ("triton", "reference"):
            with attach(of, small(executor=executor)) as attached:
                cache = DynamicCache(config=of.config)
                first = of(ids[:, :70], attention_mask=mask[:, :70], past_key_values=cache).logits
                found.append(torch.cat([first, of(ids[:, 70:], attention_mask=mask, past_key_values=cache).logits], 1))
                assert attached.stats()[1]["sparse"] == 2
        assert off(found[0][0], found[1][0]) < 1e-3 and off(found[0][1, 40:], found[1][1, 40:]) < 1e-3


def test_sequences_below_min_len_attend_to_everything(model):
    of, ids = model(), tokens(2, LENGTH)
    mask = torch.ones_like(ids)
    mask[1, 60:] = 0
    dense = of(ids, attention_mask=mask).logits
    with attach(of, small(min_len=100)):
        found = of(ids, attention_mask=mask).logits
    assert off(found[1, :60], dense[1, :60]) < 1e-5 < off(found[0], dense[0])
    mask[0, 60:] = 0
    with attach(of, small(min_len=100)) as attached:
        found = of(ids, attention_mask=mask).logits
        assert attached.stats()[0]["dense"] == {"short": 1}
    assert off(found[:, :60], of(ids, attention_mask=mask).logits[:, :60]) < 1e-5


@pytest.mark.parametrize("architecture", ["qwen3", "deepseek_v3", "qwen3_5"])
@pytest.mark.parametrize("parts", [(96, 54), (100, 50), (64, 16, 70), (149, 1)])
def test_prompts_in_parts(model, architecture, parts):
    """A second turn, or a prompt prefilled in chunks: off > 0, its blocks on those of keys or across them."""
    of, ids = model(architecture), tokens(2, LENGTH)
    dense = of(ids).logits
    for config, at_most in ((small(options={"rate": 1.0}), 1e-5), (small(**SINK), 1.0)):
        with attach(of, config):
            whole, cache, found = of(ids).logits, DynamicCache(config=of.config), []
            for part in ids.split(parts, 1):
                found.append(of(part, past_key_values=cache, use_cache=True).logits)
        assert off(torch.cat(found, 1), dense) < at_most
        if all(n % 16 == 0 for n in parts[:-1]):  # else other blocks, which keep other keys
            assert off(torch.cat(found[:-1], 1), whole[:, : -parts[-1]]) < 1e-5
            assert off(found[-1], whole[:, -parts[-1] :]) < 1e-5 or parts[-1] < 16


def test_chunks_get_the_budgets_of_the_whole_prompt(model):
    of, ids = model(), tokens(2, LENGTH)
    config = small(options={"rate": 0.3, "n_init": 16, "n_local": 16, "lam": 0})  # the values' term would see fewer values
    with attach(of, config) as attached:
        whole = of(ids).logits
        attached.prompt_len = LENGTH
        cache = DynamicCache(config=of.config)
        found = [of(part, past_key_values=cache).logits for part in ids.split((80, 70), 1)]
        assert off(torch.cat(found, 1), whole) < 1e-5
        attached.prompt_len = None
        cache = DynamicCache(config=of.config)
        assert off(of(ids[:, :80], past_key_values=cache).logits, whole[:, :80]) > 1e-3
        attached.prompt_len = 80  # tokens beyond it are of a later turn
        assert of(ids[:, 80:], past_key_values=cache).logits.isfinite().all()
    with attach(of, small(**SINK)):
        wanted = of.generate(ids, max_new_tokens=4, do_sample=False)
        assert of.generate(ids, max_new_tokens=4, do_sample=False, prefill_chunk_size=48).equal(wanted)


def test_a_second_turn_after_a_padded_batch(model):
    of, first, second = model(), tokens(2, 80), tokens(2, 40, seed=1)
    mask = torch.ones(2, 120, dtype=torch.int64)
    mask[1, :30] = 0
    position = (mask.cumsum(1) - 1).clamp(min=0)
    for config in (small(**SINK), small(**SINK, dense_layers=(0,))):
        with attach(of, config) as attached:
            cache = DynamicCache(config=of.config)
            of(first, attention_mask=mask[:, :80], position_ids=position[:, :80], past_key_values=cache)
            found = of(second, attention_mask=mask, position_ids=position[:, 80:], past_key_values=cache).logits
            assert attached.stats()[1]["sparse"] == 2
            alone = DynamicCache(config=of.config)
            of(first[1:, 30:], past_key_values=alone)
            assert off(found[1], of(second[1:], past_key_values=alone).logits[0]) < 1e-5


@pytest.mark.parametrize("architecture", ["qwen3", "gemma3_text"])
def test_static_caches_are_longer_than_what_is_real(model, architecture):
    of, ids = model(architecture), tokens(2, LENGTH)
    with attach(of, small()) as attached:
        wanted = of.generate(ids, max_new_tokens=6, do_sample=False)
        cache = StaticCache(config=of.config, max_cache_len=256)
        assert off(of(ids, past_key_values=cache).logits, of(ids).logits) < 1e-5
        assert of(tokens(2, 40), past_key_values=cache).logits.isfinite().all()
        attached.reset()
        assert of.generate(ids, max_new_tokens=6, do_sample=False, cache_implementation="static", disable_compile=True).equal(wanted)
        assert attached.stats()[-1]["sparse"] == 1
        chunk = StaticCache(config=of.config, max_cache_len=256)
    with attach(of, small(options={"rate": 1.0})):
        parts = [of(part, past_key_values=chunk).logits for part in ids.split((90, 60), 1)]
    assert off(torch.cat(parts, 1), of(ids).logits) < 1e-5


def test_what_is_delegated_is_counted(model):
    of, ids = copy.deepcopy(model()), tokens(1, LENGTH)
    dense = of(ids).logits
    with attach(of, small(dense_layers=(0,))) as attached:
        of(ids)
        of(ids[:, :20])
        of(ids[:, :10])
        of(ids, attention_mask=torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool).tril())
        assert [row["dense"] for row in attached.stats()] == [
            {"dense layer": 1, "short": 1, "few queries": 1, "mask": 1},
            {"short": 1, "few queries": 1, "mask": 1},
        ]
        attached.reset()
        with torch.enable_grad():
            found = of(ids).logits
            found.sum().backward()
        of.train()
        assert of(ids).logits.allclose(dense, atol=1e-5) and found.allclose(dense, atol=1e-5)
        assert of.model.embed_tokens.weight.grad.norm() > 0
        assert attached.stats()[1]["dense"] == {"training": 2}
        packed = torch.cat([torch.arange(70), torch.arange(80)])[None]
        assert of.eval()(ids, position_ids=packed, use_cache=False).logits.isfinite().all()
        assert attached.stats()[1]["dense"] == {"training": 2, "mask": 1}
    with attach(of, small()) as attached:
        for layer in of.model.layers:
            layer.self_attn.is_causal = False
        of(ids)
        assert attached.stats()[0]["dense"] == {"not causal": 1}


def test_sinks_and_caps_go_to_the_models_own_attention(model):
    of, (q, k, v) = model(), torch.randn(3, 2, 4, 60, 16, generator=torch.Generator().manual_seed(0)).unbind(0)
    attention = of.model.layers[1].self_attn
    mask = torch.ones(2, 60, dtype=torch.bool)
    mask[1, :20] = False
    with attach(of, small()) as attached:
        k, v = k[:, :2], v[:, :2]
        capped = attached.attend(attention, q, k, v, None, softcap=50.0, scaling=0.25)[0]
        padded = attached.attend(attention, q, k, v, mask, s_aux=torch.zeros(4), scaling=0.25)[0]
        biased = attached.attend(attention, q, k, v, None, position_bias=torch.zeros(1, 4, 60, 60), scaling=0.25)[0]
        few = attached.attend(attention, q[:, :, :8], k[:, :, :8], v[:, :, :8], None, softcap=50.0, scaling=0.25)[0]
        assert attached.stats()[0]["dense"] == {"sinks or softcap": 3, "position bias": 1}
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, scale=0.25).transpose(1, 2)
    assert off(capped, wanted) < 1e-5 and off(biased, wanted) < 1e-5 and off(few, wanted[:, :8]) < 1e-5  # this model's own attention caps nothing
    assert off(padded[0], wanted[0]) < 1e-5 < off(padded[1, 20:], wanted[1, 20:])


def test_attention_weights_are_refused(model):
    with attach(model(), small()), pytest.raises((UsageError, ValueError), match="attention"):
        model()(tokens(1, LENGTH), output_attentions=True)


def test_attaching_and_detaching(model):
    of, ids = model(), tokens(1, LENGTH)
    attached = attach(of, small())
    with pytest.raises(UsageError, match="already"):
        attach(of, small())
    sparse = of(ids).logits
    attached.detach()
    attached.detach()
    assert off(of(ids).logits, sparse) > 1e-3
    for wrong in ({"layers": [2]}, {"layers": [1], "heads": [4]}):
        with pytest.raises(UsageError, match="of a model with"):
            attach(of, small(overrides=[{**wrong, **STEM}]))
    with pytest.raises(ModelError, match="a way of its own"):
        attach(load_model_without_attention(of), small())


def load_model_without_attention(of):
    other = copy.deepcopy(of)
    other.model.layers = torch.nn.ModuleList()
    return other


def test_a_vision_tower_stays_as_it_is(model):
    of = model("qwen3_vl")
    with attach(of, small()):
        assert of.config.vision_config._attn_implementation == "sdpa" != of.config.text_config._attn_implementation


def test_taps_stay_above(model):
    """What looks at, or rounds, keys and values before attention goes on doing so."""
    of, ids, seen = model(), tokens(1, LENGTH), []

    def tap(query, key, value, attend):
        seen.append(key.shape)
        return attend(query, key * 2, value)

    attention = of.model.layers[1].self_attn
    with attach(of, small()):
        plain = of(ids).logits
        with tapped(attention, tap):
            after = of(ids).logits
    with tapped(attention, tap), attach(of, small()):
        assert of(ids).logits.equal(after)
    assert seen == [(1, 2, LENGTH, 16)] * 2 and off(after, plain) > 1e-4


def test_captured_tensors_are_those_of_attention(model):
    of, ids = model(), tokens(2, LENGTH)
    found = captured(of, ids, [1])
    q, k, v, scale = found[1]
    assert q.shape == (2, 4, LENGTH, 16) and k.shape == v.shape == (2, 2, LENGTH, 16) and scale == 0.25 and list(found) == [1]
    with attach(of, small(dense_layers=(0,))) as attached:
        of(ids)
        index = select(q, k, v, make_policy("stem", **STEM["options"]), scale=scale, block=16)
        assert attached.stats()[1]["density"] == pytest.approx(index.density())
    with pytest.raises(UsageError, match=r"\[7\]"):
        captured(of, ids, [1, 7])


@pytest.mark.parametrize("policy", ["a_shape", "minference", "cosa", "vecattention", "flexprefill"])
def test_policies_by_layer_and_head(model, policy):
    """Heads of a hybrid keep what they keep where the whole layer follows their policy."""
    of, ids = model(), tokens(1, LENGTH)
    q, k, v, scale = captured(of, ids, [1])[1]
    quiet = {"delta": -1} if policy == "cosa" else {}
    config = small(overrides=[{"layers": [1], "heads": [0, 3], "policy": policy, "options": quiet}, {"layers": [1], "heads": [2], "policy": "dense"}])
    assert config.policy_of(0) == make_policy("stem", **STEM["options"], min_len=32, dense_layers=())
    found = select(q, k, v, config.policy_of(1), scale=scale, block=16)
    alone = select(q, k, v, make_policy(policy, **quiet), scale=scale, block=16)
    stem = select(q, k, v, make_policy("stem", **STEM["options"]), scale=scale, block=16)
    cells = found.to_bool()
    assert cells[:, [0, 3]].equal(alone.to_bool()[:, [0, 3]])
    assert cells[:, 1].equal(stem.to_bool()[:, 1]) and cells[:, 2].equal(torch.ones_like(cells[:, 2]).tril())
    if alone.tokens is not None:
        rows = cells.shape[2]
        for head in (0, 3):
            own = slice(*(int(alone.tokens.ptr[h * rows]) for h in (head, head + 1)))
            mine = slice(*(int(found.tokens.ptr[h * rows]) for h in (head, head + 1)))
            assert found.tokens.col[mine].equal(alone.tokens.col[own])
    with attach(of, config.model_copy(update={"dense_layers": (0,)})) as attached:
        of(ids)
        assert attached.stats()[1]["density"] == pytest.approx(found.density())


def test_a_layer_of_its_own(model):
    config = small(overrides=[{"layers": [1], **SINK}, {"layers": [1], "heads": [0], "policy": "dense"}])
    assert config.policy_of(1).rest == make_policy("a_shape", **SINK["options"], min_len=32, dense_layers=())
    assert small(overrides=[{"layers": [1], "policy": "dense"}]).policy_of(1) is None
    assert small(policy="dense", options={}).policy_of(0) is None and small(dense_layers=(0,)).policy_of(0) is None
    assert SparseAttentionConfig.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"policy": "nonsense", "options": {}}, "no policy"), ({"options": {"rat": 1}}, "stem.rat"), ({"options": {"min_len": 1}}, "min_len"),
        ({"block": 20}, "multiple of 16"), ({"min_len": -1}, "min_len"), ({"executor": "fast"}, "executor"), ({"extra": 1}, "extra"),
        ({"dense_layers": [-1]}, "dense_layers"), ({"policy": "dense"}, "no options"), ({"overrides": [{"layers": []}]}, "layers"),
        ({"overrides": [{"layers": [0], **STEM}, {"layers": [1, 0], **STEM}]}, "two overrides of layer 0"),
        ({"overrides": [{"layers": [0], "heads": [1, 1], **STEM}]}, "two overrides of layer 0, head 1"),
        ({"overrides": [{"layers": [0], **STEM}], "dense_layers": [0]}, "among dense_layers"),
        ({"overrides": [{"layers": [0], "heads": [1], "policy": "cosa"}]}, "delta"), ({"options": {"lam": float("inf")}}, "finite"),
        ({"policy": "cosa", "options": {"delta": float("nan")}}, "finite"), ({"options": {"stride": 3}}, "stem.stride: 3 does not divide the block of 16"),
        ({"chosen_for": {"rope_theta": float("inf")}}, "chosen_for"),
    ],
)  # fmt: skip
def test_configurations_that_make_no_sense(wrong, says):
    with pytest.raises(ValidationError, match=says):
        small(**wrong)


def test_deltas_that_skip_nothing_agree():
    heads = [{"layers": [0], "heads": [h], "policy": "cosa", "options": {"delta": d}} for h, d in enumerate((-1, -2, -0.5, 0))]
    assert len(small(overrides=heads).policy_of(0).parts) == 4
    with pytest.raises(ValidationError, match="delta"):
        small(overrides=[*heads, {"layers": [0], "heads": [4], "policy": "cosa"}])


@pytest.mark.parametrize("layers", [2, 1024])
def test_many_overrides_are_made_once_each(layers, monkeypatch):
    made = []
    monkeypatch.setattr(config_module, "make_policy", lambda *args, **options: made.append(args) or make_policy(*args, **options))
    overrides = [{"layers": list(range(layers)), "heads": [head], **STEM} for head in range(4096)]
    if layers == 1024:
        with pytest.raises(ValidationError, match="more than 32768"):
            small(overrides=overrides)
    else:
        small(overrides=overrides)
    assert len(made) == (4097 if layers == 2 else 0)


def test_heads_that_are_not_there():
    q, k, v = torch.randn(3, 1, 2, 64, 16).unbind(0)
    with pytest.raises(AngelslimError, match="head 5"):
        select(q, k, v, small(overrides=[{"layers": [0], "heads": [5], **STEM}]).policy_of(0), block=16)
