"""A small Qwen2-Audio that writes down spoken digits: trained here, then heard with fewer and fewer audio tokens.

    python benchmarks/mmprune_data_audio.py prepare FSDD.tar.xz DATA            # once, elsewhere
    python benchmarks/mmprune_audio.py train --lm SMOLLM2 --data DATA --work WORK --seconds 300
    python benchmarks/mmprune_audio.py evaluate --lm SMOLLM2 --data DATA --work WORK --out benchmarks/results/mmprune_audio.json
    python benchmarks/mmprune_audio.py plot --out benchmarks/results/mmprune_audio.json

The model is transformers' Qwen2AudioForConditionalGeneration: an encoder from scratch (25 tokens a second, ten seconds at most) and
SmolLM2-135M. Training first teaches the encoder alone by CTC, then everything to transcribe; both go on together.
`wer` is of a speaker whom training never heard, `wer_takes` of recordings it never heard of the other speakers.
A command that is cut off goes on where it was when it is given again; `evaluate` writes its file after every cell.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mmprune_data_audio as data
import numpy as np
import torch
from mmprune_evaluation import Measured, available, cells_of, evaluate, plot
from mmprune_training import Feed, Phase, answer_loss, compile_layers, train, with_language_model
from torch import Tensor, nn

AUDIO = 3  # <repo_name>, which the language model's tokenizer has and no text here uses
ENCODER = {"d_model": 256, "encoder_layers": 6, "encoder_attention_heads": 4, "encoder_ffn_dim": 1024}
TINY = {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 64}
QUESTION = "Which digits are spoken?\n"
BLANK = 10
PLACES = data.FRAMES // 2  # of the encoder
STRATEGIES: dict[str, dict[str, Any]] = {
    "samp": {}, "samp 0.75": {"threshold": 0.75},
    "random": {"seed": 0}, "random 1": {"seed": 1}, "random 2": {"seed": 2},
    "atome": {}, "fastadasp": {}, "segmentwise": {}, "cdpruner": {}, "vispruner_audio": {}, "visionzip_audio": {}, "divprune": {}, "fastv": {},
}  # fmt: skip
RATIOS = (0.5, 0.6, 0.4, 0.7, 0.25, 0.1)


def build(lm: str, device: str, dtype: torch.dtype, encoder: dict[str, int]) -> Any:
    """The model, with the language model's weights and an encoder by lot."""
    from transformers import AutoConfig, Qwen2AudioConfig, Qwen2AudioEncoderConfig, Qwen2AudioForConditionalGeneration

    audio = Qwen2AudioEncoderConfig(**encoder, num_mel_bins=data.BINS, max_source_positions=PLACES, dropout=0.1)
    torch.manual_seed(0)
    config = Qwen2AudioConfig(audio_config=audio, text_config=AutoConfig.from_pretrained(lm), audio_token_index=AUDIO)
    model = Qwen2AudioForConditionalGeneration(config)
    with torch.no_grad():
        model.model.audio_tower.embed_positions.weight.copy_(waves_of_places(PLACES, encoder["d_model"]))
    return with_language_model(model, lm, dtype).to(device)


def waves_of_places(places: int, width: int) -> Tensor:
    """[places, width]: Whisper's sines and cosines."""
    turns = torch.arange(places)[:, None] * torch.exp(-np.log(10000) / (width // 2 - 1) * torch.arange(width // 2))
    return torch.cat([turns.sin(), turns.cos()], 1)


class Student(nn.Module):
    """The model, and the linear head of its encoder's CTC."""

    def __init__(self, model: Any, sound: data.Sound) -> None:
        super().__init__()
        self.model, self.sound = model, sound
        self.head = nn.Linear(model.config.audio_config.d_model, BLANK + 1).to(model.device, model.dtype)

    def hear(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Of changed clips: features [B, T, width], the CTC loss, and how many tokens each has."""
        features = self.sound.features(self.sound.waves(batch["slots"], batch["lengths"], batch["noise"]), batch["tilt"])
        features = data.masked(features, batch["spans"]).to(self.model.dtype)
        counts = torch.tensor([data.tokens(int(n)) for n in batch["lengths"]])
        frames = torch.tensor([(data.frames(int(n)) - 1) // 2 + 1 for n in batch["lengths"]]).to(features.device, non_blocking=True)
        mask = (torch.arange(PLACES, device=features.device) < frames[:, None])[:, None, None].expand(-1, 1, PLACES, -1)
        out = self.model.model.audio_tower(features, attention_mask=mask).last_hidden_state
        chances = self.head(out).float().log_softmax(-1).transpose(0, 1)
        said = batch["said"]
        loss = nn.functional.ctc_loss(chances, said.clamp(min=0).to(out.device), counts, (said >= 0).sum(1), blank=BLANK, zero_infinity=True)
        return out, loss, counts

    def listening(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        _, loss, _ = self.hear(batch)
        return loss, {}

    def answering(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        out, heard, counts = self.hear(batch)
        ids, labels = self.rows(batch["said"], counts)
        text = self.model.get_input_embeddings()(ids.to(out.device, non_blocking=True))
        audio = self.model.model.multi_modal_projector(out)
        here = torch.arange(audio.shape[1], device=out.device) < counts.to(out.device)[:, None]
        embeds = torch.cat([torch.where(here[..., None], audio, text[:, : audio.shape[1]]), text[:, audio.shape[1] :]], 1)
        loss, right = answer_loss(self.model, embeds, labels)
        return loss + 0.3 * heard, {"right": right, "answers": loss, "ctc": heard}

    def rows(self, said: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Ids and labels [B, L]: audio tokens, the question, the digits; padded on the right to one length."""
        question, digits, end = self.words
        length = PLACES // 2 + len(question) + data.MOST_DIGITS + 1
        ids, labels = torch.full((len(said), length), end), torch.full((len(said), length), -100)
        for row, (count, spoken) in enumerate(zip(counts.tolist(), said.tolist())):
            answer = [*(digits[d] for d in spoken if d >= 0), end]
            both = [AUDIO] * count + question + answer
            ids[row, : len(both)] = torch.tensor(both)
            labels[row, len(both) - len(answer) : len(both)] = torch.tensor(answer)
        return ids, labels

    words: tuple[list[int], list[int], int]  # ids of the question, of the ten digits, and of the end


@dataclass(frozen=True)
class Kit:
    """What every command opens."""

    given: argparse.Namespace
    tokenizer: Any
    takes: data.Takes

    @classmethod
    def open(cls, given: argparse.Namespace) -> Kit:
        from transformers import AutoTokenizer

        return cls(given, AutoTokenizer.from_pretrained(given.lm), data.Takes.load(given.data))

    def clips(self, part: data.Part) -> data.Clips:
        return data.Clips(self.takes, part, speaker=self.given.speaker, seed=self.given.seed)

    def student(self) -> Student:
        dtype = torch.bfloat16 if self.given.device == "cuda" else torch.float32
        model = build(self.given.lm, self.given.device, dtype, TINY if self.given.tiny else ENCODER)
        student = Student(model, data.Sound(self.takes, self.given.device))
        ids = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (QUESTION, "0123456789")]
        student.words = (ids[0], ids[1], int(self.tokenizer.eos_token_id))
        assert len(ids[1]) == 10, "the tokenizer joins digits"
        return student

    def trained(self) -> Student:
        student = self.student()
        student.load_state_dict(torch.load(self.given.work / "weights.pt", weights_only=True, map_location="cpu"))
        return student.eval()


def run_training(kit: Kit) -> None:
    given = kit.given
    clips = kit.clips("train")
    feed = Feed({"listening": data.Batches(clips, 2 * given.batch), "answering": data.Batches(clips, given.batch)}, given.workers, given.device == "cuda")
    student = kit.student()
    if given.compile:
        compile_layers(student.model)
    tower, rest = "model.model.audio_tower", "model.model."
    lm = {rest: 2e-4, "model.lm_head": 2e-4, f"{rest}multi_modal_projector": 1e-3}
    phases = (
        Phase("listening", 0.4, "listening", {tower: 8e-4, "head": 1e-3}, student.listening, decays=False),
        Phase("answering", 0.6, "answering", {tower: 4e-4, "head": 5e-4, **lm}, student.answering),
    )
    try:
        train(student, phases, feed, seconds=given.seconds, folder=given.work, every=given.every)
    finally:
        feed.close()


class Exam:
    """Held-out clips, transcribed in batches."""

    def __init__(self, kit: Kit) -> None:
        self.kit, self.student = kit, kit.trained()
        self.sets = {"wer": self._clips("speaker"), "wer_takes": self._clips("takes")}

    def _clips(self, part: data.Part) -> tuple[list[data.Clip], dict[str, np.ndarray[Any, Any]]]:
        clips = self.kit.clips(part)
        found = [clips.clip(number) for number in range(self.kit.given.items)]
        return found, data.stacked(found, np.random.default_rng([self.kit.given.seed, 11]))

    def inputs(self, name: str, first: int, last: int) -> dict[str, Tensor]:
        """Arguments of `generate`, padded on the left."""
        device, sound = self.kit.given.device, self.student.sound
        slots, lengths, noise = (torch.from_numpy(self.sets[name][1][key][first:last]) for key in ("slots", "lengths", "noise"))
        features = sound.features(sound.waves(slots, lengths, noise)).to(self.student.model.dtype)
        question, _, end = self.student.words
        prompts = [[AUDIO] * data.tokens(int(n)) + question for n in lengths]
        longest = max(len(p) for p in prompts)
        ids = torch.tensor([[end] * (longest - len(p)) + p for p in prompts], device=device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
        heard = torch.tensor([data.frames(int(n)) for n in lengths])
        frames = (torch.arange(data.FRAMES) < heard[:, None]).long().to(device)
        return {"input_ids": ids, "attention_mask": mask, "input_features": features, "feature_attention_mask": frames}

    def ask(self) -> Measured:
        """Word error rates."""
        found: Measured = {}
        for name, (clips, _) in self.sets.items():
            wrong = said = 0
            for first in range(0, len(clips), self.kit.given.eval_batch):
                some = clips[first : first + self.kit.given.eval_batch]
                inputs = self.inputs(name, first, first + len(some))
                end = self.student.words[2]
                out = self.student.model.generate(**inputs, max_new_tokens=data.MOST_DIGITS + 4, do_sample=False, eos_token_id=end, pad_token_id=end)
                texts = self.kit.tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
                wrong += sum(data.errors(clip.digits, "".join(filter(str.isdigit, text))) for clip, text in zip(some, texts))
                said += sum(len(clip.digits) for clip in some)
            found[name] = wrong / said
            found[f"{name}_digits"] = said
        return found

    def one(self) -> dict[str, Tensor]:
        longest = max(range(len(self.sets["wer"][0])), key=lambda i: self.sets["wer"][0][i].length)
        return self.inputs("wer", longest, longest + 1)


def run_evaluation(kit: Kit) -> None:
    given = kit.given
    exam = Exam(kit)
    cells = cells_of(STRATEGIES, given.strategies or available(STRATEGIES, "audio"), given.ratios)
    head = {"training": json.loads((given.work / "training.json").read_text()), "score": "wer", "speaker": given.speaker, "clips": given.items}
    evaluate(exam.student.model, cells, exam.ask, exam.one, given.out, seconds=given.seconds, head=head)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["train", "evaluate", "plot"])
    parser.add_argument("--lm", help="folder of SmolLM2-135M")
    parser.add_argument("--data", type=Path, help="what prepare left")
    parser.add_argument("--work", type=Path, help="for weights")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/mmprune_audio.json"))
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--seconds", type=float, default=300.0, help="of training, or after which evaluate begins no cell")
    parser.add_argument("--batch", type=int, default=64, help="clips; twice as many while the encoder trains alone")
    parser.add_argument("--eval-batch", type=int, default=128)
    parser.add_argument("--items", type=int, default=384, help="clips of each held-out part")
    parser.add_argument("--speaker", default=data.HELD_SPEAKER, help="whom training never hears")
    parser.add_argument("--workers", type=int, default=6, help="processes that make batches, of each phase")
    parser.add_argument("--every", type=float, default=10.0, help="seconds between lines of progress")
    parser.add_argument("--strategies", nargs="+")
    parser.add_argument("--ratios", nargs="+", type=float, default=RATIOS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="torch.compile on the language model's layers")
    parser.add_argument("--tiny", action="store_true", help="an encoder that only shows that all runs")
    given = parser.parse_args()
    if given.what == "plot":
        plot(given.out, "wer")
        return
    missing = [name for name in ("lm", "data", "work") if getattr(given, name) is None]
    if missing:
        parser.error(f"give --{', --'.join(missing)}")
    kit = Kit.open(given)
    {"train": run_training, "evaluate": run_evaluation}[given.what](kit)


if __name__ == "__main__":
    main()
