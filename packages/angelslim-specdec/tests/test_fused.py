"""Modules of a target in fewer launches: only those that compute the same, and then the same text."""

from functools import partial

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention

from angelslim_specdec import Engine, Target
from angelslim_specdec.fused import Fused
from angelslim_specdec.kernels import layer

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def triton(monkeypatch):
    for name in ("NORM", "GATED", "TURNED", "TURN_AND_STORE"):
        monkeypatch.setattr(layer, name, partial(getattr(layer, name), executor="triton"))


def load(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().to(DEVICE)


def counts(norms=0, mlps=0, attentions=0, left_alone=0):
    return {"norms": norms, "mlps": mlps, "attentions": attentions, "left_alone": left_alone}


FOUND = {
    "llama": counts(5, 2, 2), "qwen2": counts(5, 2, 2), "qwen3": counts(9, 2, 2), "qwen3_moe": counts(9, 0, 2),
    "gemma3_text": counts(13, 0, 2, left_alone=2),  # its activation is another one
    "hunyuan_v1_dense": counts(9, 2, 0, left_alone=2),  # turns heads before their norms
    "glm4_moe": counts(9, 2, 0, left_alone=2),  # turns half of a head
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("architecture", FOUND)
def test_what_computes_the_same_is_replaced(tiny, architecture, dtype, triton):
    model = load(tiny(architecture, dtype="float32"), dtype)
    assert Fused(model).counts == FOUND[architecture]


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3_text", "glm4_moe"])
def test_says_the_same(tiny, architecture, static, triton):
    model, said = load(tiny(architecture, dtype="float32")), []
    ids = torch.randint(3, 256, (2, 25), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    for fused in (False, True):
        target = Target(model, fused=fused)
        cache = target.new_cache(2, 48, static=static)
        prompt = target.prefill(ids, torch.tensor([25, 9], device=DEVICE), cache, (0,))
        chain = target.forward(ids[:, :4], cache, (0, 1))
        cache.commit(torch.tensor([3, 1], device=DEVICE))
        parents = torch.tensor([[-1, -1, 0, 1]], device=DEVICE).expand(2, 4)
        tree = target.forward(ids[:, :5], cache, (1,), parents)
        said.append([x for step in (prompt, chain, tree) for x in (step.logits, step.final)] + [chain.aux[:, :1], *target.features(ids, (1,))])
        assert not any("forward" in vars(m) for m in model.modules()) and bool(target.fused) == fused
    for found, wanted in zip(*said, strict=True):
        torch.testing.assert_close(found, wanted, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("drafter", [None, "ngram"])
def test_decodes_the_models_own_text(tiny, drafter, triton):
    from angelslim_specdec.registry import drafters

    model = load(tiny("qwen3", dtype="float32"))
    ids = torch.randint(3, 256, (2, 5), generator=torch.Generator().manual_seed(1)).repeat(1, 3)
    wanted = model.generate(ids.to(DEVICE), attention_mask=torch.ones_like(ids).to(DEVICE), max_new_tokens=12, do_sample=False, eos_token_id=None)
    engine = Engine(Target(model, fused=True), drafter and drafters()[drafter](), 2, 30, k=3, static=True)
    assert engine.decode(ids, torch.tensor([15, 15]), 12).tokens == wanted[:, 15:].tolist()


def test_by_default_only_on_gpus(tiny):
    assert bool(Target(load(tiny("llama", dtype="float32"))).fused) == (DEVICE == "cuda")


class OddRMSNorm(nn.Module):
    """Looks like one."""

    def __init__(self, how):
        super().__init__()
        self.weight, self.eps, self.how = nn.Parameter(torch.randn(48)), 1e-3, how

    def forward(self, x):
        x = x - 0.01 if self.how == "moved" else x
        eps = {"other eps": 2e-3}.get(self.how, self.eps)
        out = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * self.weight
        if self.how == "fails":
            raise RuntimeError("not for you")
        return out.clamp(max=3.0) if self.how == "clamped" else out


class OddMLP(nn.Module):
    """Looks like a gated one."""

    def __init__(self, how):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(48, 64), nn.Linear(48, 64), nn.Linear(64, 48)
        self.how, self.act_fn = how, nn.GELU() if how == "gelu" else nn.SiLU()

    def forward(self, x):
        gate, up = self.gate_proj(x), self.up_proj(x)
        gate, up = (up, gate) if self.how == "swapped" else (gate, up)
        return self.down_proj(self.act_fn(gate) * up) * (1.0001 if self.how == "scaled" else 1.0)


@pytest.mark.parametrize("how", ["right", "moved", "other eps", "clamped", "fails"])
def test_other_norms_are_left_alone(how, triton):
    made = Fused(nn.Sequential(OddRMSNorm(how)).eval().to(DEVICE)).counts
    assert made == (counts(norms=1) if how == "right" else counts(left_alone=1))


@pytest.mark.parametrize("how", ["right", "gelu", "swapped", "scaled"])
def test_other_mlps_are_left_alone(how, triton):
    made = Fused(nn.Sequential(OddMLP(how)).eval().to(DEVICE)).counts
    assert made == (counts(mlps=1) if how == "right" else counts(left_alone=1))


class Gated(LlamaAttention):
    """Does something to what attention found."""

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, cache=None, **options):
        out, weights = super().forward(hidden_states, position_embeddings, attention_mask, cache=cache, **options)
        return 2 * out, weights


@pytest.mark.parametrize("how", ["right", "interleaved", "scaled query", "gated", "value turned", "replaced"])
def test_other_attention_is_left_alone(tiny, how, triton, monkeypatch):
    import transformers.models.llama.modeling_llama as modelling

    model = load(tiny("llama", dtype="float32"))
    own = modelling.apply_rotary_pos_emb
    if how == "interleaved":
        monkeypatch.setattr(modelling, "apply_rotary_pos_emb", lambda q, k, cos, sin: own(q.flip(-1), k.flip(-1), cos, sin))
    if how == "scaled query":
        monkeypatch.setattr(modelling, "apply_rotary_pos_emb", lambda q, k, cos, sin: (own(q, k, cos, sin)[0] * 1.01, own(q, k, cos, sin)[1]))
    for attention in (block.self_attn for block in model.model.layers):
        forward = type(attention).forward
        if how == "gated":
            attention.__class__ = Gated
        if how == "value turned":
            monkeypatch.setattr(attention.v_proj, "forward", lambda x, own=attention.k_proj: torch.rand(1).item() * own(x))
        if how == "replaced":
            attention.forward = partial(forward, attention)
    assert Fused(model).counts["attentions"] == (2 if how == "right" else 0)
