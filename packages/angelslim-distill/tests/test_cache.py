"""Distributions on disk: those the teacher gives, refused where they are of something else, and written shard by shard."""

import json
import math
import os
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from angelslim_core.errors import ModelError, NumericError, RecipeError, StoppedError, UsageError
from angelslim_core.loading import load_model
from angelslim_distill import kd_loss
from angelslim_distill.cache.capture import keeping, top_k_of
from angelslim_distill.cache.manifest import Manifest
from angelslim_distill.cache.reading import open_cache
from angelslim_distill.cache.vllm import from_prompt_logprobs
from angelslim_distill.cache.writing import write_cache
from angelslim_distill.fingerprints import model_fingerprint, sample_key, template_hash, vocabulary_hash
from angelslim_distill.targets import Batch, Hidden

SIZES, K = [9, 17, 30, 21, 12, 5, 8], 16


def batch_of(rows):
    """Right-padded rows that predict their next tokens; the last position of each has no label."""
    width = max(map(len, rows))
    ids, labels, mask = (torch.zeros(len(rows), width, dtype=torch.int64) for _ in range(3))
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
        labels[i, : len(row) - 1] = torch.tensor(row[1:])
        labels[i, len(row) - 1 :] = -100
    return Batch(ids, mask.bool(), labels, labels >= 0, [sample_key(row) for row in rows])


@pytest.fixture(scope="module")
def samples():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 250, (n,), generator=generator).tolist() for n in SIZES]


@pytest.fixture(scope="module")
def loaded(tiny):
    return load_model(tiny(dtype="float32"), "cpu")


@pytest.fixture(scope="module")
def teacher(loaded):
    model = loaded.model

    @torch.no_grad()
    def hidden(batch):
        states = model.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask.long()).last_hidden_state
        return Hidden(states * 4, model.lm_head.weight)  # a random model's logits are nearly all alike

    return hidden


@pytest.fixture(scope="module")
def manifest(tiny, loaded):
    def made(**changes):
        known = {
            "teacher": "tiny", "fingerprint": model_fingerprint(tiny(dtype="float32")), "vocabulary": vocabulary_hash(loaded.tokenizer),
            "template": template_hash(loaded.tokenizer), "vocab_size": 256, "top_k": K, "temperature": 1.0, "dtype": "F32", "data": "d", "reading": "r", "length": 32,
        }  # fmt: skip
        return Manifest(**{**known, **changes})

    return made


def numbered(samples):
    return lambda n: batch_of(samples[2 * n : 2 * n + 2])


@pytest.fixture(scope="module")
def folder(samples, teacher, manifest, tmp_path_factory):
    out = tmp_path_factory.mktemp("cache") / "c"
    write_cache(numbered(samples), 4, keeping(teacher, K), manifest(), out, batches_a_shard=2)
    return out


def bucket(found, logits, batch):
    """Forward KL over the kept tokens and one class for all others, written out."""
    logq = logits.log_softmax(-1).gather(-1, found.ids)
    rest_p, rest_q = (1 - logs.exp().sum(-1) for logs in (found.logp, logq))
    kl = (found.logp.exp() * (found.logp - logq)).sum(-1) + rest_p * (rest_p / rest_q).log()
    return kl[batch.counted].mean()


def test_what_is_read_is_what_the_teacher_gives_in_any_order_and_batch(samples, teacher, folder, loaded):
    cache = open_cache(folder, loaded.tokenizer, 256)
    assert len(cache) == 7 and len(cache.manifest.shards) == 2 and cache.manifest.positions == sum(SIZES)
    assert all(sample_key(row) in cache for row in samples) and sample_key([1]) not in cache
    for rows in ([samples[2], samples[0], samples[5]], [samples[6]]):
        batch = batch_of(rows)
        online, offline = top_k_of(teacher(batch), batch.labels, K), cache(batch)
        for name in ("ids", "logp", "label_logp"):
            here = batch.attention_mask
            torch.testing.assert_close(getattr(offline, name)[here], getattr(online, name)[here], rtol=1e-5, atol=1e-5)
        assert bool(offline.logp.isfinite().all()) and int(offline.ids.max()) < 256


def test_position_t_is_the_distribution_of_token_t_plus_1(samples, folder, loaded, teacher):
    batch = batch_of([samples[2]])
    found = open_cache(folder, loaded.tokenizer, 256)(batch)
    hidden = teacher(batch)
    every = (hidden.states @ hidden.weight.T).log_softmax(-1)[0]
    want = torch.stack([every[t, samples[2][t + 1]] for t in range(29)])
    torch.testing.assert_close(found.label_logp[0, :29], want)
    assert not torch.allclose(found.label_logp[0, 1:29], want[:-1], atol=0.1)


@pytest.mark.parametrize(("dtype", "most"), [("F32", 1e-6), ("F16", 1e-3), ("BF16", 1e-2)])
def test_the_offline_loss_is_the_online_one_as_far_as_log_probabilities_are_rounded(dtype, most, samples, teacher, manifest, loaded, tmp_path):
    write_cache(numbered(samples), 4, keeping(teacher, K), manifest(dtype=dtype), tmp_path / "c")
    batch = batch_of(samples[:4])
    logits = torch.randn(4, 30, 256, generator=torch.Generator().manual_seed(1))
    online = bucket(top_k_of(teacher(batch), batch.labels, K), logits, batch)
    offline = bucket(open_cache(tmp_path / "c", loaded.tokenizer, 256)(batch), logits, batch)
    assert abs(float(online - offline)) < most * float(online)


def test_the_loss_of_another_temperature_is_the_online_one(samples, teacher, manifest, folder, loaded, tmp_path):
    batch = batch_of(samples[:4])
    logits = torch.randn(4, 30, 256, generator=torch.Generator().manual_seed(1))
    hidden = teacher(batch)
    theirs = hidden.states @ hidden.weight.T
    given = {"kind": "cakld", "temperature": 2.0, "labels": batch.labels.clamp(min=0), "top_k_mode": "renorm"}
    online = kd_loss(logits, theirs, batch.counted, top_k=K, **given)
    offline = kd_loss(logits, open_cache(folder, loaded.tokenizer, 256)(batch), batch.counted, **given)
    torch.testing.assert_close(offline, online)
    write_cache(numbered(samples), 4, keeping(teacher, K), manifest(temperature=2.0), tmp_path / "c")
    with pytest.raises(ModelError, match="another temperature"):
        open_cache(tmp_path / "c", loaded.tokenizer, 256)


def test_fewer_tokens_than_are_kept_are_the_most_likely_ones(samples, folder, loaded):
    batch = batch_of(samples[:2])
    whole, part = (open_cache(folder, loaded.tokenizer, 256, top_k=k)(batch) for k in (None, 3))
    assert torch.equal(part.ids, whole.ids[..., :3]) and torch.equal(part.logp[batch.attention_mask], whole.logp[..., :3][batch.attention_mask])


def test_logits_honour_cap_and_scale():
    states, weight = torch.randn(1, 3, 4), torch.randn(7, 4)
    found = top_k_of(Hidden(states, weight, torch.ones(7), softcap=2.0, scale=0.5), torch.tensor([[1, 2, -100]]), 7)
    logits = 2 * ((states @ weight.T + 1) * 0.5 / 2).tanh()
    torch.testing.assert_close(found.logp, logits.log_softmax(-1).sort(-1, descending=True).values)
    assert float(found.label_logp[0, 2]) == 0
    with pytest.raises(UsageError, match="8 tokens"):
        top_k_of(Hidden(states, weight), torch.zeros(1, 3, dtype=torch.int64), 8)
    with pytest.raises(NumericError, match="not finite"):
        top_k_of(Hidden(states * math.inf, weight), torch.zeros(1, 3, dtype=torch.int64), 2)


def test_a_killed_writer_goes_on_and_leaves_nothing_half_done(samples, teacher, manifest, folder, tmp_path):
    out, asked = tmp_path / "c", []

    def counting(batch, last=99):
        asked.append(batch.samples)
        if len(asked) == last:
            (out.parent / ".c.angelslim/stage/cache-00001.safetensors").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        return keeping(teacher, K)(batch)

    pid = os.fork()
    if pid == 0:
        write_cache(numbered(samples), 4, lambda batch: counting(batch, 3), manifest(), out, batches_a_shard=2)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL and not out.exists()
    with pytest.raises(RecipeError, match="top_k"):  # of something else
        write_cache(numbered(samples), 4, keeping(teacher, 3), manifest(top_k=3), out, batches_a_shard=2)
    write_cache(numbered(samples), 4, counting, manifest(), out, batches_a_shard=2)
    assert len(asked) == 2  # of the second file only
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in folder.iterdir())
    assert all(path.read_bytes() == (out / path.name).read_bytes() for path in folder.iterdir())


def test_a_writer_that_is_asked_to_stop_keeps_what_is_finished(samples, teacher, manifest, folder, tmp_path):
    with pytest.raises(StoppedError, match="1 of 2 files"):
        write_cache(numbered(samples), 4, keeping(teacher, K), manifest(), tmp_path / "c", batches_a_shard=2, stop_requested=lambda: True)
    write_cache(numbered(samples), 4, keeping(teacher, K), manifest(), tmp_path / "c", batches_a_shard=2)
    assert (tmp_path / "c/manifest.json").read_bytes() == (folder / "manifest.json").read_bytes()


def test_a_sample_that_occurs_again_is_asked_and_written_once(samples, teacher, manifest, loaded, tmp_path):
    asked = []

    def counting(batch):
        asked.append(len(batch.samples))
        return keeping(teacher, K)(batch)

    again = [samples[0], samples[1], samples[1], samples[2], samples[0], samples[1]]
    made = write_cache(numbered(again), 3, counting, manifest(), tmp_path / "c", batches_a_shard=1)
    assert made.rows == 3 and asked == [2, 2] and len(made.shards) == 2
    assert len(open_cache(tmp_path / "c", loaded.tokenizer, 256)) == 3
    with pytest.raises(RecipeError, match="no sample"):
        write_cache(numbered([]), 0, counting, manifest(), tmp_path / "none")


class Other:
    """A tokenizer with one more token, or another template."""

    def __init__(self, inner, **changes):
        self._inner, self.__dict__ = inner, {**self.__dict__, **changes, "_inner": inner}

    def __getattr__(self, name):
        return getattr(self._inner, name)

    def get_vocab(self):
        return {**self._inner.get_vocab(), **({"more": 999} if "more" in self.__dict__ else {})}


def test_a_cache_of_something_else_is_refused(folder, loaded, tiny):
    tokenizer = loaded.tokenizer
    refused = [
        ("tokenizer", {"tokenizer": Other(tokenizer, more=True)}),
        ("chat template", {"tokenizer": Other(tokenizer, chat_template="{{ 'other' }}")}),
        ("teacher", {"teacher": tiny(dtype="float32", tie_word_embeddings=True)}),
    ]
    for name, changes in refused:
        with pytest.raises(ModelError, match=f"another {name}"):
            open_cache(**{"folder": folder, "tokenizer": tokenizer, "vocab_size": 256, **changes})
    with pytest.raises(ModelError, match="over 256 tokens, and the student's head has 255"):
        open_cache(folder, tokenizer, 255)
    with pytest.raises(ModelError, match="keeps 16 tokens a position, and 17 are wanted"):
        open_cache(folder, tokenizer, 256, top_k=17)
    assert open_cache(folder, tokenizer, 256, teacher=tiny(dtype="float32"))


def test_the_fingerprint_of_a_model_does_not_see_its_files_but_its_weights(tiny, tiny_copy, tmp_path):
    model = tiny_copy(dtype="float32")
    assert model_fingerprint(model) == model_fingerprint(tiny(dtype="float32"))
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][-1, -1] += 1
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    assert model_fingerprint(model) != model_fingerprint(tiny(dtype="float32"))


def test_samples_that_are_not_in_it_are_refused(samples, folder, loaded):
    cache = open_cache(folder, loaded.tokenizer, 256)
    batch = batch_of(samples[:1])
    with pytest.raises(ModelError, match="holds no sample"):
        cache(batch_of([samples[0][:-1]]))  # cut elsewhere
    with pytest.raises(ModelError, match="holds no sample"):
        cache(Batch(batch.input_ids, batch.attention_mask, batch.labels, batch.counted, ["no key"]))
    with pytest.raises(ModelError, match="other tokens"):
        cache(Batch(batch.input_ids, batch.attention_mask, batch.labels.roll(1), batch.counted, batch.samples))
    with pytest.raises(ModelError, match="other tokens"):
        cache(Batch(batch.input_ids.roll(1), batch.attention_mask, batch.labels, batch.counted, batch.samples))


def edit(folder, **changes):
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def rewrite(folder, change):
    """Change the tensors of the first file, and its size in the manifest with them."""
    path = folder / "cache-00000.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    shards = json.loads((folder / "manifest.json").read_text())["shards"]
    edit(folder, shards=[{**shards[0], "nbytes": path.stat().st_size}, *shards[1:]])


def put(name, where, value):
    return lambda tensors: tensors[name].__setitem__(where, value)


OPENED = {
    "absent": (lambda f: (f / "manifest.json").unlink(), "cannot be read"),
    "version": (lambda f: edit(f, version=2), "format version 2"),
    "field": (lambda f: edit(f, more=1), "more"),
    "type": (lambda f: edit(f, top_k="x"), "top_k"),
    "hash": (lambda f: edit(f, fingerprint="../x"), "fingerprint"),
    "path": (lambda f: edit(f, shards=[{"file": "../../etc/passwd", "nbytes": 1, "rows": 1, "positions": 1}]), "shards.0.file"),
    "rows": (lambda f: edit(f, rows=99), "manifest says 99"),
    "no shard": (lambda f: edit(f, shards=[], rows=0), "holds 0 samples"),
    "fewer tokens": (lambda f: edit(f, top_k=8), "does not hold the tensors"),
    "dtype": (lambda f: edit(f, dtype="BF16"), "does not hold the tensors"),
    "missing": (lambda f: (f / "cache-00001.safetensors").unlink(), "has 0 bytes"),
    "truncated": (lambda f: (f / "cache-00001.safetensors").write_bytes((f / "cache-00001.safetensors").read_bytes()[:-7]), "bytes where the manifest says"),
    "length": (lambda f: edit(f, length=20), "other lengths"),
    "lengths": (lambda f: rewrite(f, put("lengths", 0, -5)), "other lengths"),
    "twice": (lambda f: rewrite(f, lambda t: t["keys"].__setitem__(1, t["keys"][0])), "occurs twice"),
    "header": (lambda f: rewrite(f, lambda t: t.pop("labels")), "does not hold the tensors"),
    "shape": (lambda f: rewrite(f, lambda t: t.__setitem__("logp", t["logp"][:, :-1].contiguous())), "does not hold the tensors"),
}


@pytest.mark.parametrize("case", OPENED)
def test_a_broken_cache_is_refused_when_it_is_opened(case, folder, loaded, tmp_path):
    spoil, what = OPENED[case]
    copy = shutil.copytree(folder, tmp_path / "c")
    spoil(copy)
    with pytest.raises(ModelError, match=what):
        open_cache(copy, loaded.tokenizer, 256)


def test_a_link_out_of_the_folder_is_refused(folder, loaded, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "c")
    (copy / "cache-00000.safetensors").rename(tmp_path / "elsewhere")
    (copy / "cache-00000.safetensors").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match="outside"):
        open_cache(copy, loaded.tokenizer, 256)


READ = {
    "id above": put("ids", (3, 2), 256),
    "id below": put("ids", (3, 2), -1),
    "id twice": lambda t: t["ids"].__setitem__((3, 2), int(t["ids"][3, 1])),
    "nan": put("logp", (3, 2), math.nan),
    "infinite": put("logp", (3, 15), -math.inf),
    "rising": put("logp", (3, 15), -0.01),
    "too much": put("logp", (3, slice(None)), -0.1),
    "label": put("label_logp", 3, 0.5),
    "label nan": put("label_logp", 3, math.nan),
}


@pytest.mark.parametrize("case", READ)
def test_numbers_that_are_no_distribution_are_refused_when_they_are_read(case, samples, folder, loaded, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "c")
    rewrite(copy, READ[case])
    cache = open_cache(copy, loaded.tokenizer, 256)
    assert cache(batch_of(samples[1:2])).ids.shape == (1, 17, K)  # other samples are as good as ever
    with pytest.raises(ModelError, match="no distribution"):
        cache(batch_of(samples[:1]))


def test_prompt_logprobs_of_vllm_are_shifted_by_one():
    ids = [5, 7, 2]
    engine = [
        None,
        {9: SimpleNamespace(logprob=-0.2), 4: SimpleNamespace(logprob=-2.0), 7: SimpleNamespace(logprob=-6.0)},
        {2: SimpleNamespace(logprob=-0.1), 9: SimpleNamespace(logprob=-3.0)},
    ]
    server = [None, *({str(i): {"logprob": v.logprob, "rank": 1} for i, v in entry.items()} for entry in engine[1:])]
    plain = [None, *({i: v.logprob for i, v in entry.items()} for entry in engine[1:])]
    for rows in (engine, server, plain):
        found = from_prompt_logprobs(ids, rows, 2)
        assert found.ids[0, :2].tolist() == [[9, 4], [2, 9]] and found.ids.shape == (1, 3, 2)
        torch.testing.assert_close(found.logp[0, :2], torch.tensor([[-0.2, -2.0], [-0.1, -3.0]]))
        torch.testing.assert_close(found.label_logp[0], torch.tensor([-6.0, -0.1, 0.0]))
    for wrong in (plain[1:], plain[:2], [{5: -1.0}, *plain[1:]], [None, {9: -0.2, 4: -2.0}, plain[2]], [None, None, plain[2]]):
        with pytest.raises(UsageError):
            from_prompt_logprobs(ids, wrong, 2)
    with pytest.raises(UsageError, match="3 others"):
        from_prompt_logprobs(ids, plain, 3)


def test_rows_of_vllm_make_a_cache(manifest, loaded, tmp_path):
    batch = batch_of([[5, 7, 2]])
    rows = [None, {9: -0.2, 4: -2.0, 7: -6.0}, {2: -0.1, 9: -3.0}]
    write_cache(lambda n: batch, 1, lambda b: from_prompt_logprobs(b.input_ids[0].tolist(), rows, 2), manifest(top_k=2), tmp_path / "c")
    found = open_cache(tmp_path / "c", loaded.tokenizer, 256)(batch)
    assert found.ids[0, :2].tolist() == [[9, 4], [2, 9]]
