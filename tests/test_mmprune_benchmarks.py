"""The multimodal benchmarks' data, training loop and files, at sizes of a few seconds."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import mmprune_data_audio as audio
import mmprune_data_vision as vision
import mmprune_evaluation as evaluation
import mmprune_training as training

VOCABULARY = ["ĠCAT", *(f"Ġ{a}{b}{c}" for a in "bcd" for b in "aeo" for c in "nrt")]


@pytest.fixture(scope="module")
def glyphs():
    rng = np.random.default_rng(0)
    letters = np.zeros((2, 26, vision.HEIGHT, vision.WIDTH), np.uint8)
    letters[:, :, 6:26, 10:30] = 255
    return vision.Glyphs(rng.integers(8, 17, (60, 8, 8)).astype(np.uint8), (np.arange(60) % 10).astype(np.uint8), letters, np.full((2, 26), 22, np.uint8))


@pytest.fixture(scope="module")
def takes():
    rng = np.random.default_rng(0)
    rows = [(s, d, t) for s in ("ann", "bob", "theo") for d in range(10) for t in range(7)]
    starts = np.cumsum([0, *rng.integers(1200, 3000, len(rows))])
    samples = (3000 * np.sin(np.arange(starts[-1]) / 3) + rng.normal(0, 300, starts[-1])).astype(np.int16)
    speakers, digits, numbers = (np.array(x) for x in zip(*rows))
    return audio.Takes(samples, starts, digits, speakers, numbers)


def encode(text):
    return [ord(c) for c in text]


encode.end = 2


def test_scenes_come_again_and_tests_show_other_things(glyphs):
    train, test = (vision.Scenes(glyphs, VOCABULARY, part) for part in ("train", "test"))
    assert not set(train.words) & set(test.words) and len(train.words) > len(test.words) > 0
    assert all(not set(a) & set(b) for a, b in zip(train.scans, test.scans))
    assert np.array_equal(train.scene(5).slots, vision.Scenes(glyphs, VOCABULARY, "train").scene(5).slots)
    assert not np.array_equal(train.scene(5).slots, train.scene(6).slots)


@pytest.mark.parametrize("number", range(6))
def test_patches_are_labelled_where_things_are(glyphs, number):
    scene = vision.Scenes(glyphs, VOCABULARY, "test").scene(number)
    things = [s for s in scene.slots[vision.BEHIND : vision.BEHIND + vision.THINGS] if s[8] > 0]
    for texture, x, y, *_, red, green, blue, _ in things:
        kind = int(glyphs.digits[int(texture)]) + 1 if texture < 60 else 11 + (int(texture) - 60) % 26
        row, column = int(y // vision.PATCH), int(x // vision.PATCH)
        around = (slice(max(0, row - 1), row + 2), slice(max(0, column - 1), column + 2))
        assert kind in scene.kind[around]
        tint = int(np.abs(vision.TINTS - [red, green, blue]).sum(1).argmin())
        assert 1 + tint in scene.colour[around]
    asked = {q.text: q.answer for q in scene.questions}
    assert asked["How many digits are there?"] == str(sum(s[0] < 60 for s in things))
    spelt = {answer.replace(" ", "") for text, answer in asked.items() if "word is" in text}
    assert spelt <= set(vision.words(VOCABULARY, "test"))


def test_things_are_painted_where_they_are(glyphs):
    scene = vision.Scenes(glyphs, VOCABULARY, "train").scene(3, clutter=0)
    pixels = vision.Painter(glyphs, "cpu").paint(torch.from_numpy(scene.slots)[None], torch.from_numpy(scene.ground)[None])[0] * 0.25 + 0.3
    assert pixels.shape == (3, vision.SIDE, vision.SIDE)
    letters = [s for s in scene.slots if s[8] > 0 and s[0] >= 60]
    assert letters
    for _, x, y, *_, red, green, blue, _ in letters:
        assert torch.allclose(pixels[:, int(y), int(x)], torch.tensor([red, green, blue]), atol=0.02)
    empty = np.argwhere(scene.kind == 0)
    row, column = next((r, c) for r, c in empty if (scene.kind[max(0, r - 2) : r + 3, max(0, c - 2) : c + 3] == 0).all())
    centre = pixels[:, row * vision.PATCH + 7, column * vision.PATCH + 7]
    assert torch.allclose(centre, torch.from_numpy(scene.ground[:3]), atol=1e-5)


def test_answers_are_what_is_learned(glyphs):
    made = vision.Batches(vision.Scenes(glyphs, VOCABULARY, "train"), encode, size=3, turns=2, length=120)(0)
    for ids, labels in zip(made["ids"], made["labels"]):
        said = "".join(chr(i) for i in labels[labels != -100])
        assert said.count(chr(2)) == 2
        assert np.array_equal(ids[labels != -100], labels[labels != -100])
        assert chr(ids[np.flatnonzero(labels != -100)[0] - 1]) == "\n"


def test_clips_hold_out_a_speaker_and_takes(takes):
    parts = {part: takes.of(part) for part in ("train", "takes", "speaker")}
    assert set(parts["train"]) == set(parts["takes"]) == {"ann", "bob"} and set(parts["speaker"]) == {"theo"}
    chosen = [{int(i) for of in part.values() for i in of} for part in parts.values()]
    assert sum(map(len, chosen)) == len(takes.digits) == len(set.union(*chosen))


def test_a_clip_holds_its_takes(takes):
    clip = audio.Clips(takes, "speaker").clip(4)
    at, size, take, speed, gain = clip.slots[0]
    assert speed == 1 and clip.digits[0] == str(takes.digits[int(take)])
    sound = audio.Sound(takes, "cpu")
    wave = sound.waves(torch.from_numpy(clip.slots)[None], torch.tensor([clip.length]), torch.zeros(1, 2))[0]
    first = takes.starts[int(take)]
    wanted = takes.samples[first : first + int(size)] / 32768 * float(sound.gains[int(take)]) * gain
    assert np.allclose(wave[int(at) : int(at) + int(size)], wanted, atol=1e-5)
    assert not wave[clip.length :].any()


def test_features_are_whispers(takes):
    from transformers import WhisperFeatureExtractor

    made = audio.Batches(audio.Clips(takes, "train"), 2)(0)
    sound = audio.Sound(takes, "cpu")
    waves = sound.waves(*(torch.from_numpy(made[name]) for name in ("slots", "lengths", "noise")))
    extractor = WhisperFeatureExtractor(feature_size=audio.BINS, chunk_length=audio.SECONDS)
    wanted = extractor(list(audio.doubled(waves).numpy()), sampling_rate=16000, return_tensors="pt")["input_features"]
    assert torch.allclose(sound.features(waves), wanted, atol=1e-4)
    assert torch.allclose(audio.doubled(waves)[:, ::2], waves, atol=1e-5)


@pytest.mark.parametrize(
    ("reference", "found", "wrong"), [("12345", "1245", 1), ("12", "1234", 2), ("", "12", 2), ("123", "321", 2), ("777", "", 3), ("9", "9", 0)]
)
def test_word_errors(reference, found, wrong):
    assert audio.errors(reference, found) == wrong


def test_training_goes_on_where_it_stopped(tmp_path):
    asked = []

    def make(number):
        asked.append(number)
        return {"x": np.full((1, 2), number, np.float32)}

    module = nn.Linear(2, 1).bfloat16()
    stop = [3]

    def loss(batch):
        if len(asked) > stop[0]:
            raise KeyboardInterrupt
        return module(batch["x"].bfloat16()).float().pow(2).mean(), {}

    phases = (training.Phase("only", 1.0, "all", {"weight": 0.1}, loss),)
    arguments = {"folder": tmp_path, "every": 1e9, "save_every": 0.0}
    before = module.bias.clone()
    with pytest.raises(KeyboardInterrupt):
        training.train(module, phases, training.Feed({"all": make}, 0), seconds=1e9, **arguments)
    stored = torch.load(tmp_path / "state.pt", weights_only=True)
    assert stored["number"] == 3 and asked == [0, 1, 2, 3]
    assert torch.equal(stored["optimizer"]["high"][0].bfloat16(), module.weight) and torch.equal(module.bias, before)
    asked.clear()
    stop[0] = 10**9
    training.train(module, phases, training.Feed({"all": make}, 0), seconds=stored["spent"] + 0.05, **arguments)
    assert asked[0] == 3
    assert json.loads((tmp_path / "training.json").read_text())["only"]["batches"] == 3 + len(asked)
    assert (tmp_path / "weights.pt").exists() and not (tmp_path / "state.pt").exists()


def test_the_results_file_grows_and_keeps_what_it_has(tmp_path):
    class Model:
        device, dtype = torch.device("cpu"), torch.float32
        config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(num_hidden_layers=2, eos_token_id=0))

        def generate(self, **_):
            return None

    asked = []

    def ask():
        asked.append(1)
        return {"accuracy": 0.5}

    out = tmp_path / "found.json"
    for _ in range(2):
        with pytest.raises(SystemExit):
            evaluation.evaluate(Model(), evaluation.cells_of({}, ["no such"], [0.5]), ask, dict, out, seconds=1e9, head={"score": "accuracy"})
    rows = json.loads(out.read_text())["rows"]
    assert [row["label"] for row in rows] == ["all tokens", "no such"] and "error" in rows[1]
    assert len(asked) == 1


def test_tokens_by_layer():
    stage = SimpleNamespace(layer=1)
    pool = SimpleNamespace(row=0, positions=range(8), kept=range(2))
    found = evaluation.tokens_by_layer([SimpleNamespace(stage=stage, pools=[pool])], 4)
    assert found == {"media_tokens": 8, "kept_tokens": 2, "tokens_a_layer": 5.0}
