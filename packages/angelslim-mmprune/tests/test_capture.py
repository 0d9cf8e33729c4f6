"""What strategies are shown of attention is what the model itself computes: its own weights, by eager attention, and slow sums of them."""

import sys
from collections.abc import Sequence
from typing import ClassVar

import pytest
import torch

from angelslim_core.errors import PlanError, UsageError
from angelslim_mmprune import plan_from_features, statistics
from angelslim_mmprune.capture import window_order
from angelslim_mmprune.coupling import attach
from angelslim_mmprune.models import towers
from angelslim_mmprune.plan import Grid, Need, Plan, Pool
from angelslim_mmprune.strategies.base import Modality, Stage, Strategy
from angelslim_mmprune.strategies.fastv import FastV
from angelslim_mmprune.testing import prompt, tiny_model

ROWS = {
    "llava": [[4, ("image",), 3, ("image",), 5], [9, ("image",), 2]],
    "qwen2_5_vl": [[4, (1, 6, 5), 3, (2, 2, 3), 4], [9, (1, 3, 3), 4]],
    "qwen3_vl": [[4, (1, 6, 4), 3, (2, 2, 3), 4], [9, (1, 3, 3), 4]],
    "qwen2_audio": [[4, (39,), 2, (30,), 5], [3, (47,), 1]],
}


class Spy(Strategy):
    """Keeps the first tokens and what it was shown."""

    name: ClassVar[str] = "spy"
    modalities: ClassVar[frozenset[Modality]] = frozenset({"vision", "audio"})
    asks: tuple[Need, ...]
    layers: tuple[int | None, ...] = (None,)
    shown: ClassVar[list[Pool]] = []

    @property
    def stages(self) -> tuple[Stage, ...]:
        return tuple(Stage(layer, 1 / (i + 2)) for i, layer in enumerate(self.layers))

    @property
    def needs(self) -> tuple[Need, ...]:
        return self.asks

    @property
    def text_needs(self) -> tuple[Need, ...]:
        return tuple(need for need in self.asks if need.source == "llm")

    def plan(self, pool: Pool, keep: Sequence[int]) -> Plan:
        self.shown.append(pool)
        return Plan.of([torch.arange(k) for k in keep])


@pytest.mark.parametrize(("name", "features"), [("llava", 1), ("qwen2_5_vl", 3), ("qwen3_vl", 3), ("qwen2_audio", 2)])
def test_the_layer_whose_output_the_projector_gets(name, features):
    """By default that is looked at: the last but one of LLaVA's 3 layers, the last of others."""
    parts = towers(tiny_model(name))
    assert parts.layer_of(Need("encoder", "features", "received"), "") == features
    needs = [Need("encoder", layer, "received") for layer in ("features", features, 0)]
    model = tiny_model(name)
    with attach(model, Spy(keep_ratio=0.5, asks=tuple(needs))), torch.no_grad():
        Spy.shown.clear()
        model(**prompt(name, ROWS[name][:1]))
    own, given, other = (Spy.shown[0].statistics[need] for need in needs)
    assert torch.equal(own, given) and not torch.equal(own, other)


class Exact(Spy):
    """Tells of the precision at hand."""

    precise: ClassVar[list[bool]] = []

    def plan(self, pool: Pool, keep: Sequence[int]) -> Plan:
        self.precise.append(not torch.is_autocast_enabled("cpu"))
        return super().plan(pool, keep)


@pytest.mark.parametrize("name", ["llava", "qwen2_audio"])
def test_statistics_and_plans_are_fp32_under_autocast(name, monkeypatch):
    seen = []
    for function in ("of_pieces", "of_llm"):
        real = getattr(statistics, function)
        monkeypatch.setattr(statistics, function, lambda *args, real=real: seen.append(not torch.is_autocast_enabled("cpu")) or real(*args))
    Exact.precise.clear()
    model, needs = tiny_model(name), (Need("encoder", 0, "received"), Need("llm", 0, "last_row"))
    with attach(model, Exact(keep_ratio=0.5, asks=needs, layers=(1,))), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(**prompt(name, ROWS[name]))
    with torch.autocast("cpu", torch.bfloat16):
        plan_from_features(torch.randn(8, 4), (1, 2, 4), Exact(keep_ratio=0.5, asks=()))
    assert len(seen) == 2 and all(seen) and len(Exact.precise) == 2 and all(Exact.precise)


@pytest.mark.parametrize(("states", "layer"), [(-2, 1), (-1, 2), (3, 2), (1, 0), (0, 0), ([1, -2], 1)])
def test_the_layer_that_llava_takes_features_of(states, layer):
    model = tiny_model("llava")
    model.config.vision_feature_layer = states
    assert towers(model).layer_of(Need("encoder", "features", "received"), "") == layer


@pytest.mark.parametrize(("name", "layer"), [("llava", 8), ("qwen2_5_vl", 15), ("qwen3_vl", 13)])
def test_the_layer_of_objects(name, layer):
    parts = towers(tiny_model(name))
    deep = parts._replace(encoder_attention=parts.encoder_attention * 10)
    assert deep.layer_of(Need("encoder", "objects", "received"), "") == layer
    with pytest.raises(UsageError, match=r"hiprune\.encoder: layer") as error:
        parts.layer_of(Need("encoder", "objects", "received"), "hiprune.encoder")
    assert error.value.hint.startswith("name one from 0 to")


@pytest.fixture
def weights(monkeypatch):
    """Weights and keys of eager attention, by the module that computed them: [(weights, keys)] of each of its calls."""
    seen = {}

    def watch(file):
        compute = file.eager_attention_forward

        def eager(module, query, key, value, attention_mask, **kwargs):
            out, found = compute(module, query, key, value, attention_mask, **kwargs)
            seen.setdefault(module, []).append((found.detach().double(), key.detach().double()))
            return out, found

        monkeypatch.setattr(file, "eager_attention_forward", eager)

    def of(model):
        for file in {sys.modules[type(module).__module__] for module in model.modules()}:
            if hasattr(file, "eager_attention_forward"):
                watch(file)
        return seen

    return of


def shown(model, inputs, spy):
    """[tokens(, d)] by need of all pools in order."""
    Spy.shown.clear()
    with attach(model, spy), torch.no_grad():
        model(**inputs)
    return {need: torch.cat([pool.statistics[need][i, :n] for pool in Spy.shown for i, n in enumerate(pool.counts)]) for need in spy.asks}


def encoder_layers(model, name):
    root = model.model
    return {"llava": lambda: root.vision_tower.encoder.layers, "qwen2_audio": lambda: root.audio_tower.layers}.get(name, lambda: root.visual.blocks)()


def slow(name, statistic, calls, inputs):
    """[tokens(, d)], by loops over units."""
    values = []
    if name == "llava":
        for w, k in zip(*(torch.cat(of) for of in zip(*calls, strict=True)), strict=True):
            row = w[:, 0, 1:] / w[:, 0, 1:].sum(1, keepdim=True)
            values += list(row.mean(0)) if statistic == "importance" else list(k[:, 1:].mean(0))
        return torch.stack(values)
    if name == "qwen2_audio":
        frames = [(int(n) - 1) // 2 + 1 for n in inputs["feature_attention_mask"].sum(1)]
        for w, n in zip(calls[0][0], frames, strict=True):
            tokens = n // 2
            of = w.mean(0) if statistic == "pooled_diagonal" else w.amax(0)
            pooled = torch.stack([torch.stack([of[2 * a : 2 * a + 2, 2 * b : 2 * b + 2].mean(0).sum() for b in range(tokens)]) for a in range(tokens)])
            values += list(pooled.diagonal() if statistic == "pooled_diagonal" else pooled.mean(0))
        return torch.stack(values)
    for w, k in calls:
        received = w[0].mean(0).sum(0)
        for at in range(0, w.shape[-1], 4):
            values.append(received[at : at + 4].sum() if statistic != "keys" else k[0, :, at : at + 4].mean((0, 1)))
    return torch.stack(values)


@pytest.mark.parametrize("generates", [False, True], ids=["forward", "generate"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("name", "statistics", "layer"),
    [("llava", ("importance", "keys"), -2), ("qwen2_5_vl", ("received", "importance", "keys"), 0), ("qwen2_5_vl", ("received", "keys"), 1),
     ("qwen3_vl", ("received", "keys"), -1), ("qwen2_audio", ("pooled_diagonal", "pooled_max"), 1)],
)  # fmt: skip
def test_encoder_statistics(name, statistics, layer, attention, generates, weights):
    inputs = prompt(name, ROWS[name])
    # media of a kind follow each other in the encoder; in a prompt the kinds are mixed
    eager = tiny_model(name, "eager")
    calls = weights(eager)
    with torch.no_grad():
        eager(**inputs)
    calls = calls[encoder_layers(eager, name)[layer].self_attn if name in ("llava", "qwen2_audio") else encoder_layers(eager, name)[layer].attn]
    model = tiny_model(name, attention)
    spy = Spy(asks=tuple(Need("encoder", layer, statistic) for statistic in statistics), budget_scope="image")
    if generates:
        Spy.shown.clear()
        with attach(model, spy):
            model.generate(**inputs, max_new_tokens=2, do_sample=False)
        found = {need: torch.cat([pool.statistics[need][i, :n] for pool in Spy.shown for i, n in enumerate(pool.counts)]) for need in spy.asks}
    else:
        found = shown(model, inputs, spy)
    for need in spy.asks:
        wanted = slow(name, need.statistic, calls, inputs)
        if name == "qwen2_5_vl":
            wanted = torch.cat([unwindowed(wanted[:39], inputs["image_grid_thw"]), unwindowed(wanted[39:], inputs["video_grid_thw"])])
        if name.endswith("vl"):  # image, image, video -> image, video, image
            n = 30 if name == "qwen2_5_vl" else 24
            wanted = torch.cat([wanted[:n], wanted[n + 9 :], wanted[n : n + 9]])
        torch.testing.assert_close(found[need].double(), wanted, atol=1e-5, rtol=1e-4)


def unwindowed(values, grids):
    from transformers.vision_utils import get_vision_window_index

    order, _ = get_vision_window_index(grids, spatial_merge_size=2, window_size=16, patch_size=4)
    return values[torch.as_tensor(order).argsort()]


@pytest.mark.parametrize("grids", [[(1, 6, 4)], [(2, 3, 5), (1, 1, 1), (3, 4, 4)], [(1, 7, 2), (2, 2, 9)]])
@pytest.mark.parametrize("side", [1, 2, 3])
def test_the_order_of_windows(grids, side):
    from transformers.vision_utils import get_vision_window_index

    wanted, _ = get_vision_window_index(torch.tensor([(t, 2 * h, 2 * w) for t, h, w in grids]), spatial_merge_size=2, window_size=side * 8, patch_size=4)
    assert window_order([Grid(*grid) for grid in grids], side).tolist() == torch.as_tensor(wanted).tolist()


@pytest.mark.parametrize("name", list(ROWS))
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_language_model_statistics_behind_a_stage(name, attention, weights):
    """Of the second of two stages, in a padded batch: of what the first left, for media and text."""
    inputs, asks = prompt(name, ROWS[name]), tuple(Need("llm", 2, statistic) for statistic in ("last_row", "raw_keys", "hidden"))
    spy = Spy(asks=asks, layers=(1, 2))
    model = tiny_model(name, attention)
    eager = tiny_model(name, "eager")
    calls, hidden = weights(eager), []
    layer = eager.model.language_model.layers[2].self_attn
    hook = layer.register_forward_pre_hook(lambda m, a, k: hidden.append(a[0] if a else k["hidden_states"]), with_kwargs=True)
    with attach(eager, Spy(asks=(), layers=(1, 2))), torch.no_grad():
        eager(**inputs)
    hook.remove()
    (w, k), (states,) = calls[layer][0], hidden
    Spy.shown.clear()
    with attach(model, spy) as coupling, torch.no_grad():
        model(**inputs)
    pool, stage = Spy.shown[-1], coupling.last[1]
    for row, kept in enumerate(coupling.last[0].kept):
        places = [w.shape[-1] - len(kept) + kept.tolist().index(column) for column in stage.pools[row].positions.tolist()]
        text = [w.shape[-1] - len(kept) + i for i, column in enumerate(kept.tolist()) if w.shape[-1] - len(kept) + i not in places]
        for need, wanted in zip(asks, (w[row, :, -1].mean(0), k[row].transpose(0, 1).flatten(1), states[row].double()), strict=True):
            torch.testing.assert_close(pool.statistics[need][row, : pool.counts[row]].double(), wanted[places], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(pool.text_statistics[need][row, : pool.text_counts[row]].double(), wanted[text], atol=1e-5, rtol=1e-4)
        columns = [column for column in kept.tolist() if column not in coupling.last[0].pools[row].positions]
        before = sum(column < coupling.last[0].pools[row].positions.max() for column in columns)
        assert pool.text_counts[row] == len(text) and pool.text_before[row] == before


@pytest.mark.parametrize("name", list(ROWS))
def test_only_the_layers_that_are_needed_are_tapped(name, monkeypatch):
    from angelslim_mmprune import capture

    tapped, original = [], capture.tapped
    monkeypatch.setattr(capture, "tapped", lambda attention, function: tapped.append(attention) or original(attention, function))
    model, inputs = tiny_model(name), prompt(name, ROWS[name])
    before = [module.config._attn_implementation for module in model.modules() if hasattr(module, "config")]
    statistic = "pooled_max" if name == "qwen2_audio" else "keys"
    with attach(model, Spy(asks=(Need("encoder", -2, statistic), Need("llm", 1, "last_row")), layers=(1,))), torch.no_grad():
        model(**inputs)
        block = encoder_layers(model, name)[-2]
        wanted = {block.self_attn if hasattr(block, "self_attn") else block.attn, model.model.language_model.layers[1].self_attn}
        assert set(tapped) == wanted
        tapped.clear()
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
        assert set(tapped) == wanted and len(tapped) <= 3, "once a prompt, and once a kind of media"
    tapped.clear()
    with attach(model, Spy(asks=(), layers=(1,))), torch.no_grad():
        model(**inputs)
    assert not tapped
    assert before == [module.config._attn_implementation for module in model.modules() if hasattr(module, "config")]


def test_statistics_follow_tokens_that_others_dropped():
    """Two strategies behind one layer: the second is shown what the layer said of what the first left."""
    model, inputs, spy = tiny_model("llava"), prompt("llava", ROWS["llava"]), Spy(asks=(Need("llm", 1, "raw_keys"),), layers=(1,))
    everything = shown(model, inputs, spy)[spy.asks[0]]
    Spy.shown.clear()
    with attach(model, [FastV(keep_ratio=0.7, layer=1), spy]) as coupling, torch.no_grad():
        model(**inputs)
    positions = torch.cat([pool.kept + first for pool, first in zip(coupling.last[0].pools, (0, 32), strict=True)])
    pool = Spy.shown[-1]
    again = torch.cat([pool.statistics[spy.asks[0]][i, :n] for i, n in enumerate(pool.counts)])
    torch.testing.assert_close(again, everything[positions])


def test_beams_are_shown_what_their_prompt_is():
    model, inputs, spy = tiny_model("llava"), prompt("llava", ROWS["llava"]), Spy(asks=(Need("encoder", 0, "importance"),), budget_scope="image")
    alone = shown(model, inputs, spy)[spy.asks[0]].split(16)
    Spy.shown.clear()
    with attach(model, spy), torch.no_grad():
        model.generate(**inputs, max_new_tokens=2, num_beams=2, do_sample=False)
    for values, number in zip(Spy.shown[-1].statistics[spy.asks[0]], (0, 1, 0, 1, 2, 2), strict=True):
        torch.testing.assert_close(values, alone[number])


def test_needs_that_cannot_be_met():
    model, inputs = tiny_model("llava"), prompt("llava", ROWS["llava"])
    with pytest.raises(UsageError, match="layer 3 of 3"):
        attach(model, Spy(asks=(Need("encoder", 3, "importance"),)))
    with pytest.raises(PlanError, match="is not there"):
        attach(model, Spy(asks=(Need("llm", 2, "last_row"),), layers=(1,)))
    with pytest.raises(PlanError, match="is not there"):
        attach(model, Spy(asks=(Need("llm", 0, "last_row"),)))
    encoded = model.model.get_image_features(inputs.pop("pixel_values"))
    with attach(model, Spy(asks=(Need("encoder", -1, "importance"),))), pytest.raises(UsageError):
        model(**inputs, mm_encoder_outputs={"image": encoded})
