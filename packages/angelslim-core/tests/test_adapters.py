"""Every architecture's table against a checkpoint that transformers saved."""

import json
from collections import Counter

import pytest

from angelslim_core.adapters import builtin_layouts, find_layout
from angelslim_core.adapters.base import select
from angelslim_core.errors import ModelError, PlanError, PluginError
from angelslim_core.source import describe_source, open_source
from angelslim_core.testing.models import NESTED, TINY, add_mtp, stack_experts

ATTENTION = dict.fromkeys("qkvo", 2)
DENSE = {**ATTENTION, "gate": 2, "up": 2, "down": 2, "head": 1}
HYBRID = {**dict.fromkeys("qkvo", 1), "linear_in": 3, "linear_out": 3, "head": 1}
EXPERTS = {"expert_gate": 16, "expert_up": 16, "expert_down": 16, "shared_gate": 4, "shared_up": 4, "shared_down": 4}
LATENT = {"q_a": 2, "q_b": 2, "kv_a": 2, "kv_b": 2, "o": 2}
SPARSE = {
    "gate": 1,
    "up": 1,
    "down": 1,
    "expert_gate": 4,
    "expert_up": 4,
    "expert_down": 4,
    "shared_gate": 1,
    "shared_up": 1,
    "shared_down": 1,
    "other": 1,
    "head": 1,
}
EXPECTED = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "seed_oss", "hunyuan_v1_dense"), DENSE),
    "gemma3_text": {role: n for role, n in DENSE.items() if role != "head"},  # tied
    "qwen3_moe": {**ATTENTION, "expert_gate": 8, "expert_up": 8, "expert_down": 8, "other": 2, "head": 1},
    "qwen3_next": {**HYBRID, **EXPERTS, "other": 11},
    "qwen3_5_text": {**HYBRID, "linear_in_z": 3, "gate": 4, "up": 4, "down": 4, "other": 6},
    "qwen3_5_moe_text": {**HYBRID, **EXPERTS, "linear_in_z": 3, "other": 14},
    "deepseek_v3": {**LATENT, **SPARSE},
    "kimi_k2": {**LATENT, **SPARSE},
    "glm4_moe": {**ATTENTION, **SPARSE},
    "hunyuan_v1_moe": {
        **ATTENTION,
        "expert_gate": 8,
        "expert_up": 8,
        "expert_down": 8,
        "shared_gate": 2,
        "shared_up": 2,
        "shared_down": 2,
        "other": 2,
        "head": 1,
    },
}


def described(folder):
    return describe_source(open_source(folder), builtin_layouts())


@pytest.mark.parametrize("architecture", TINY)
def test_roles(tiny, architecture):
    found = described(tiny(architecture))
    assert Counter(s.role for s in found.sites) == EXPECTED[architecture]
    assert {s.layer for s in found.sites} - {None} == set(range(found.num_layers))
    sets = Counter(s.fused for s in found.sites if s.fused)
    assert sets and set(sets.values()) <= {2, 3}


@pytest.mark.parametrize("architecture", NESTED)
def test_nested_language_models_have_the_roles_of_plain_ones(tiny, architecture):
    plain, nested = described(tiny(NESTED[architecture][0])), described(tiny(architecture))
    count = lambda found: Counter((s.role, s.layer) for s in found.sites if s.layer is not None or s.role == "head")  # noqa: E731
    assert count(nested) == count(plain) and (nested.block != plain.block) == (architecture != "qwen2_5_vl")
    assert {s.role for s in nested.sites if s.layer is None} <= {"head", "other"}


@pytest.mark.parametrize("architecture", ["qwen3_moe", "qwen3_next", "qwen3_5_moe_text", "deepseek_v3", "glm4_moe", "hunyuan_v1_moe"])
def test_stacked_experts_are_the_same_linears(tiny, tiny_copy, architecture):
    folder = tiny_copy(architecture)
    stack_experts(folder)
    separate, stacked = described(tiny(architecture)), described(folder)
    key = lambda s: (s.name, s.role, s.shape, s.expert, s.fused)  # noqa: E731
    assert sorted(map(key, separate.sites)) == sorted(map(key, stacked.sites))
    one, other = open_source(tiny(architecture)), open_source(folder)
    by_name = {s.name: s for s in separate.sites}
    for site in stacked.sites:
        assert other.read(site.tensor, site.part).equal(one.read(by_name[site.name].tensor))


@pytest.mark.parametrize("architecture", ["llava", "qwen2_audio"])
def test_sizes_that_published_configs_leave_unsaid(tiny, architecture):
    source = open_source(tiny(architecture))
    text = source.checkpoint.config["text_config"]
    assert source.config is source.checkpoint.config
    for key in ("num_hidden_layers", "hidden_size", "num_attention_heads"):
        del text[key]
    assert {**source.config["text_config"], **text} == source.config["text_config"]
    assert (source.config["text_config"]["num_hidden_layers"], source.config["text_config"]["hidden_size"]) == (32, 4096) and "hidden_size" not in text
    with pytest.raises(ModelError, match="32 layers, but layer 2"):
        describe_source(source, builtin_layouts())


def test_mtp_layers_are_set_apart(tiny_copy):
    folder = tiny_copy("deepseek_v3")
    before = described(folder)
    add_mtp(folder)
    after = described(folder)
    assert [s.name for s in after.sites] == [s.name for s in before.sites]
    assert any(n.endswith("eh_proj.weight") for n in after.mtp_tensors) and len(after.mtp_tensors) > 10


def test_unknown_architecture_names_the_file_to_add(tiny_copy):
    folder = tiny_copy()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "lama"}))
    with pytest.raises(ModelError) as caught:
        described(folder)
    assert "adapters/lama.py" in caught.value.hint and "llama" in caught.value.hint


def test_unknown_weight_is_no_secret(tiny):
    source = open_source(tiny())
    source.shapes["model.layers.1.mlp.extra_proj.weight"] = (4, 4)
    source.dtypes["model.layers.1.mlp.extra_proj.weight"] = "BF16"
    with pytest.raises(ModelError, match="extra_proj"):
        describe_source(source, builtin_layouts())
    source.shapes["model.layers.1.mlp.extra_proj.weight"] = (2, 4, 4)
    with pytest.raises(ModelError, match="extra_proj"):
        describe_source(source, builtin_layouts())


@pytest.mark.parametrize("missing", ["model.layers.1.self_attn.k_proj.weight", "model.layers.1."])
def test_missing_parts(tiny, missing):
    source = open_source(tiny())
    for name in [n for n in source.shapes if n.startswith(missing)]:
        del source.shapes[name]
    with pytest.raises(ModelError, match=r"layer 1|q, v"):
        describe_source(source, builtin_layouts())


@pytest.mark.parametrize("count", [-1, 0, True, "2", 10**9, None])
def test_impossible_layer_count(tiny, count):
    source = open_source(tiny())
    source.checkpoint.config["num_hidden_layers"] = count
    with pytest.raises(ModelError, match="num_hidden_layers"):
        describe_source(source, builtin_layouts())


@pytest.mark.parametrize(
    ("architecture", "key", "value", "says"),
    [
        ("llama", "hidden_size", 10**9, "hidden_size 1000000000"),
        ("llama", "hidden_size", "a", "hidden_size 'a'"),
        ("gemma3", "hidden_size", 32, "hidden_size 32"),
        ("llama", "vocab_size", 255, "vocab_size 255"),
        ("llama", "num_hidden_layers", 1, "says 1 layers"),
    ],
)
def test_config_of_another_model(tiny, architecture, key, value, says):
    source = open_source(tiny(architecture))
    (source.config.get("text_config") or source.config)[key] = value
    with pytest.raises(ModelError, match=says):
        describe_source(source, builtin_layouts())


@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "model.layers.1.mlp.gate_proj.weight"])
def test_a_shape_that_does_not_fit_its_neighbours(tiny, name):
    source = open_source(tiny())
    source.shapes[name] = tuple(n - 28 if n == 128 else n for n in source.shapes[name])
    with pytest.raises(ModelError, match="does not fit"):
        describe_source(source, builtin_layouts())


def test_two_tables_for_one_architecture():
    with pytest.raises(PluginError, match="two adapters"):
        find_layout({"model_type": "llama"}, [*builtin_layouts(), *builtin_layouts()])


def names(sites, *selectors, **options):
    return [s.name.removeprefix("model.layers.") for s in select(sites, selectors, "here", **options)]


def test_selectors(tiny):
    sites = described(tiny()).sites
    assert names(sites, "q") == ["0.self_attn.q_proj", "1.self_attn.q_proj"]
    assert len(names(sites, "attention")) == 8 and len(names(sites, "mlp")) == 6
    assert names(sites, "layers[1:].q") == ["1.self_attn.q_proj"]
    assert len(names(sites, "layers[0:1]")) == 7
    assert names(sites, "model.layers.0.mlp.up_proj") == ["0.mlp.up_proj"]
    assert names(sites, r"re:.*\.0\..*up_proj") == ["0.mlp.up_proj"]
    assert names(sites, "lm_head") == ["lm_head"]
    # a full match, never a substring
    with pytest.raises(PlanError, match="matches no linear"):
        names(sites, "re:up_proj")
    assert names(sites, "nothing", optional=True) == []


def test_catastrophic_pattern_times_out(tiny, monkeypatch):
    import regex

    def slow(pattern, name, timeout):
        assert timeout == 1.0
        raise TimeoutError("regex timed out")

    monkeypatch.setattr(regex, "fullmatch", slow)
    with pytest.raises(PlanError, match="regular expression"):
        names(described(tiny()).sites, "re:.*")
    monkeypatch.undo()
    with pytest.raises(PlanError, match="regular expression"):
        names(described(tiny()).sites, "re:(")
