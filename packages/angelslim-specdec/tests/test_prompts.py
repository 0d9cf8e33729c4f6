"""Prompts that are padded to one of few lengths, so that graphs can read them."""

import pytest
import torch

from angelslim_specdec import prompts as module
from angelslim_specdec.prompts import Prompts, padded_length
from angelslim_specdec.target import Target

torch.manual_seed(0)


@pytest.fixture(scope="module")
def target():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=61, max_position_embeddings=4096
    )
    return Target(LlamaForCausalLM(config).eval())


class Calls:
    """A runner that counts what it is given, and what of it is called."""

    def __init__(self):
        self.made = self.called = 0

    def __call__(self, function):
        self.made += 1

        def run():
            self.called += 1
            function()

        return run


@pytest.mark.parametrize(("tokens", "padded"), [(1, 32), (32, 32), (33, 48), (48, 48), (49, 64), (97, 128), (129, 192), (200, 256), (1500, 1536), (1537, 2048)])
def test_lengths(tokens, padded):
    assert padded_length(tokens) == padded


def test_few_lengths_and_little_padding():
    found = [padded_length(n) for n in range(1, 2049)]
    assert len(set(found)) == 13 and found == sorted(found) and all(p >= n and (p <= 32 or p < 1.5 * n) for n, p in enumerate(found, 1))


def test_padded_prompts_say_what_unpadded_ones_do_and_leave_the_same_cache(target):
    """Of different lengths, into rows out of order, one after another, so that something is left behind by the one before."""
    runner, layers, capacity = Calls(), (0, 1), 80
    ours, plain = (target.new_cache(4, capacity, static=True) for _ in range(2))
    read = Prompts(target, ours, layers, capacity, runner)
    for number, (rows, lengths) in enumerate([([2, 0], [37, 5]), ([1, 3], [8, 40]), ([0, 2], [3, 1]), ([3], [64])]):
        rows, lengths = torch.tensor(rows), torch.tensor(lengths)
        prompts = torch.randint(1, 61, (len(rows), int(lengths.max())), generator=torch.Generator().manual_seed(number))
        found, wanted = read(prompts, lengths, rows), target.prefill(prompts, lengths, plain, layers, rows)
        torch.testing.assert_close(found.logits, wanted.logits)
        for row, length in enumerate(lengths.tolist()):
            torch.testing.assert_close(found.aux[row, :length], wanted.aux[row, :length])
            for layer in layers:
                for mine, theirs in zip(ours.seen(layer), plain.seen(layer), strict=True):
                    torch.testing.assert_close(mine[rows[row], :, :length], theirs[rows[row], :, :length])
        assert found.aux.shape == wanted.aux.shape and torch.equal(ours.lengths, plain.lengths)
    assert (runner.made, runner.called) == (3, 4), "two shapes of two rows and one of one"


@pytest.mark.parametrize(("batch", "tokens", "capacity"), [(1, 50, 60), (40, 60, 300), (1, 1700, 4000)])
def test_what_is_long_or_may_not_be_padded_is_read_as_it_is(target, batch, tokens, capacity, monkeypatch):
    """Padding may not reach positions that the model might not have."""
    monkeypatch.setattr(module, "MOST_WORK", 2 * 2047 * sum(p.numel() for p in target.model.parameters()))
    runner = Calls()
    read = Prompts(target, target.new_cache(batch, capacity, static=True), (), capacity, runner)
    assert read(torch.ones(batch, tokens, dtype=torch.int64), torch.full((batch,), tokens), torch.arange(batch)).logits.shape == (batch, 1, 61)
    assert not runner.made


@pytest.mark.gpu
@pytest.mark.parametrize("sampled", [False, True])
def test_as_graphs_on_a_gpu(sampled):
    from transformers import LlamaConfig, LlamaForCausalLM

    from angelslim_specdec.drafters.base import Warp
    from angelslim_specdec.engine import Engine

    torch.manual_seed(3)
    config = LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=61)
    target = Target(LlamaForCausalLM(config).eval().cuda())
    engine = Engine(target, None, 2, 120, warp=Warp(0.9 if sampled else 0.0))
    apart = Engine(target, None, 2, 120, warp=Warp(0.9 if sampled else 0.0), static=False)
    for number in range(7):  # called, called, captured, replayed
        lengths = torch.tensor([40 + number % 3, 5 + number])
        prompts = torch.randint(1, 61, (2, int(lengths.max())), generator=torch.Generator().manual_seed(number))
        assert engine.decode(prompts, lengths, 20).tokens == apart.decode(prompts, lengths, 20).tokens
