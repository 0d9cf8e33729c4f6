"""A small LLaVA that reads scanned digits and rendered words among clutter: trained here, then asked with fewer and fewer image tokens.

    python benchmarks/mmprune_data_vision.py prepare DATA                       # once, elsewhere
    python benchmarks/mmprune_vision.py train --lm SMOLLM2 --data DATA --work WORK --seconds 360
    python benchmarks/mmprune_vision.py scorer --lm SMOLLM2 --data DATA --work WORK --steps 300
    python benchmarks/mmprune_vision.py evaluate --lm SMOLLM2 --data DATA --work WORK --out benchmarks/results/mmprune_vision.json
    python benchmarks/mmprune_vision.py plot --out benchmarks/results/mmprune_vision.json

The model is transformers' LlavaForConditionalGeneration: a CLIP vision tower from scratch (336 px, patches of 14: 576 tokens) and
SmolLM2-135M. Training first teaches the tower alone what each patch shows, then everything to answer questions; both go on together.
A command that is cut off goes on where it was when it is given again; `evaluate` writes its file after every cell.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mmprune_data_vision as data
import torch
from mmprune_evaluation import Measured, available, cells_of, evaluate, plot
from mmprune_training import Feed, Phase, answer_loss, compile_layers, train, with_language_model
from torch import Tensor, nn

IMAGE = 3  # <repo_name>, which the language model's tokenizer has and no text here uses
TOWER = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 6}
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 2}
# strategies beside the baseline, and options that a tower of eight layers needs or that are worth comparing
STRATEGIES: dict[str, dict[str, Any]] = {
    "idpruner": {"scorer": "WORK/scorer"},
    "idpruner attention": {"importance": "attention", "layer": -2},
    "vision_selector": {"scorer": "WORK/scorer"},
    "random": {"seed": 0}, "random 1": {"seed": 1}, "random 2": {"seed": 2},
    "divprune": {}, "scope": {}, "vispruner": {}, "hiprune": {"object_layer": 3}, "visionzip": {}, "fastv": {}, "dart": {}, "pyramiddrop": {},
    "prunesid": {}, "id_selection": {},
}  # fmt: skip
RATIOS = (0.25, 0.1, 0.5)
MOST_NEW = 8


def build(lm: str, device: str, dtype: torch.dtype, tower: dict[str, int]) -> Any:
    """The model, with the language model's weights and a tower by lot."""
    from transformers import AutoConfig, CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    text = AutoConfig.from_pretrained(lm)
    vision = CLIPVisionConfig(**tower, image_size=data.SIDE, patch_size=data.PATCH)
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, image_seq_length=data.GRID**2, tie_word_embeddings=True)
    return with_language_model(LlavaForConditionalGeneration(config), lm, dtype).to(device)


class Student(nn.Module):
    """The model, and linear heads that the tower is taught by."""

    def __init__(self, model: Any, painter: data.Painter) -> None:
        super().__init__()
        self.model, self.painter = model, painter
        width = model.config.vision_config.hidden_size
        sizes = {"kind": data.KINDS, "colour": data.TINTED, "place": data.PLACED, "seen": data.SEEN}
        heads = {name: nn.Linear(width, size) for name, size in sizes.items()}
        self.heads = nn.ModuleDict(heads).to(model.device, model.dtype)

    def look(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Features of patches [B, 576, width], the loss of what they should show, and numbers."""
        pixels = self.painter.paint(batch["slots"], batch["ground"]).to(self.model.dtype)
        tower = self.model.model.vision_tower
        out = tower(pixels, output_hidden_states=True)
        patches = out.hidden_states[self.model.config.vision_feature_layer][:, 1:]
        wanted = {name: batch[name].to(pixels.device, non_blocking=True).flatten(1) for name in self.heads}
        losses, numbers = [], {}
        for name in ("kind", "colour", "place"):
            logits, truth = self.heads[name](patches).float().flatten(0, 1), wanted[name].flatten().long()
            weight = torch.where(truth > 0, 1.0, 0.15) if name != "place" else torch.where(truth > 0, 1.0, 0.05)
            each = nn.functional.cross_entropy(logits, truth, reduction="none")
            losses.append((each * weight).sum() / weight.sum())
            shown = truth > 0
            numbers[name] = ((logits.argmax(-1) == truth) & shown).sum() / shown.sum()
        # the class token, which nothing else teaches, and whose attention pruners read
        seen = nn.functional.binary_cross_entropy_with_logits(self.heads["seen"](out.pooler_output).float(), wanted["seen"].float())
        return patches, sum(losses) + 2 * seen, numbers | {"seen": seen}

    def looking(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        _, loss, numbers = self.look(batch)
        return loss, numbers

    def answering(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        patches, shown, numbers = self.look(batch)
        image = self.model.model.multi_modal_projector(patches)
        text = self.model.get_input_embeddings()(batch["ids"].to(image.device, non_blocking=True))
        labels = torch.cat([torch.full((len(image), image.shape[1]), -100), batch["labels"]], 1)
        loss, right = answer_loss(self.model, torch.cat([image, text], 1), labels)
        return loss + 0.2 * shown, {"right": right, "answers": loss, **numbers}


@dataclass(frozen=True)
class Kit:
    """What every command opens."""

    given: argparse.Namespace
    tokenizer: Any
    glyphs: data.Glyphs

    @classmethod
    def open(cls, given: argparse.Namespace) -> Kit:
        from transformers import AutoTokenizer

        return cls(given, AutoTokenizer.from_pretrained(given.lm), data.Glyphs.load(given.data))

    def scenes(self, part: data.Part) -> data.Scenes:
        return data.Scenes(self.glyphs, list(self.tokenizer.get_vocab()), part, seed=self.given.seed)

    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.given.device == "cuda" else torch.float32

    def student(self) -> Student:
        model = build(self.given.lm, self.given.device, self.dtype(), TINY if self.given.tiny else TOWER)
        return Student(model, data.Painter(self.glyphs, self.given.device))

    def trained(self) -> Student:
        student = self.student()
        student.load_state_dict(torch.load(self.given.work / "weights.pt", weights_only=True, map_location="cpu"))
        return student.eval()

    def prompt(self, question: str) -> list[int]:
        found: list[int] = [IMAGE] * data.GRID**2 + self.tokenizer(question + "\n", add_special_tokens=False)["input_ids"]
        return found


def run_training(kit: Kit) -> None:
    given, encode = kit.given, data.TextIds(kit.tokenizer)
    scenes = kit.scenes("train")
    makers = {
        "looking": data.Batches(scenes, encode, size=2 * given.batch, seed=1, turns=0),
        # the second phase begins where the first one's curriculum ended
        "answering": data.Batches(scenes, encode, size=given.batch, seed=2, ramp=1),
    }
    feed = Feed(makers, given.workers, given.device == "cuda")
    student = kit.student()
    if given.compile:
        compile_layers(student.model)
    tower, rest = "model.model.vision_tower", "model.model."
    phases = (
        Phase("looking", 0.25, "looking", {tower: 6e-4, "heads": 1e-3}, student.looking, decays=False),
        Phase("answering", 0.75, "answering", {tower: 3e-4, "heads": 5e-4, rest: 2.5e-4, f"{rest}multi_modal_projector": 1e-3}, student.answering),
    )
    try:
        train(student, phases, feed, seconds=given.seconds, folder=given.work, every=given.every)
    finally:
        feed.close()


def run_scorer(kit: Kit) -> None:
    """Train the scorer of VisionSelector and IDPruner on the trained, frozen model."""
    from angelslim_mmprune.scorer import save_scorer
    from angelslim_mmprune.scorer_training import ScorerOptions, train_scorer

    given = kit.given
    maker = data.Batches(kit.scenes("train"), data.TextIds(kit.tokenizer), size=given.batch, turns=2, length=40, ramp=1, seed=3)
    feed = Feed({"all": maker}, given.workers, given.device == "cuda")
    student = kit.trained()

    def batches() -> Iterator[dict[str, Tensor]]:
        for batch in itertools.islice(feed.batches("all", 0), given.steps):
            ids = torch.cat([torch.full((given.batch, data.GRID**2), IMAGE), batch["ids"]], 1).to(given.device)
            labels = torch.cat([torch.full((given.batch, data.GRID**2), -100), batch["labels"]], 1).to(given.device)
            pixels = student.painter.paint(batch["slots"], batch["ground"]).to(student.model.dtype)
            yield {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels, "labels": labels}

    start = time.perf_counter()
    trained = train_scorer(student.model, batches(), ScorerOptions(steps=given.steps, lr=given.scorer_lr))
    save_scorer(trained.scorer, given.work / "scorer", replace=True)
    feed.close()
    tenth = max(1, given.steps // 10)
    for name, values in (("answers", trained.task), ("distance to a hard choice", trained.distance)):
        print(f"{name}: {statistics.fmean(values[:tenth]):.3f} at first, {statistics.fmean(values[-tenth:]):.3f} at last", flush=True)
    print(f"scorer: {given.steps} steps, {time.perf_counter() - start:.0f} s", flush=True)


class Exam:
    """Held-out questions, asked in batches."""

    def __init__(self, kit: Kit) -> None:
        self.kit, self.student = kit, kit.trained()
        self.items = data.test_items(kit.scenes("test"), kit.given.items)

    def inputs(self, items: list[tuple[data.Scene, data.Question]]) -> dict[str, Tensor]:
        """Arguments of `generate`, padded on the left."""
        device = self.kit.given.device
        prompts = [self.kit.prompt(question.text) for _, question in items]
        longest = max(len(p) for p in prompts)
        end = int(self.kit.tokenizer.eos_token_id)
        ids = torch.tensor([[end] * (longest - len(p)) + p for p in prompts], device=device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
        slots, ground = (torch.stack([torch.from_numpy(getattr(scene, name)) for scene, _ in items]) for name in ("slots", "ground"))
        pixels = self.student.painter.paint(slots, ground).to(self.student.model.dtype)
        return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}

    def ask(self) -> Measured:
        """Accuracy over all questions and by kind of question."""
        right: dict[str, list[bool]] = {}
        size, end = self.kit.given.eval_batch, int(self.kit.tokenizer.eos_token_id)
        for first in range(0, len(self.items), size):
            items = self.items[first : first + size]
            inputs = self.inputs(items)
            out = self.student.model.generate(**inputs, max_new_tokens=MOST_NEW, do_sample=False, eos_token_id=end, pad_token_id=end)
            said = self.kit.tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            for (_, question), answer in zip(items, said):
                right.setdefault(question.kind, []).append(answer.strip() == question.answer)
        everything = [x for values in right.values() for x in values]
        return {"accuracy": sum(everything) / len(everything), "items": len(everything), "by_kind": {k: sum(v) / len(v) for k, v in right.items()}}

    def one(self) -> dict[str, Tensor]:
        return self.inputs(self.items[1:2])


def run_evaluation(kit: Kit) -> None:
    given = kit.given
    exam = Exam(kit)
    # a scorer's folder is named when it is known
    options = {label: {k: v.replace("WORK", str(given.work)) if k == "scorer" else v for k, v in of.items()} for label, of in STRATEGIES.items()}
    cells = cells_of(options, given.strategies or available(STRATEGIES, "vision"), given.ratios)
    head = {
        "training": json.loads((given.work / "training.json").read_text()),
        "score": "accuracy",
        "tower": exam.student.model.config.vision_config.num_hidden_layers,
        "image_tokens": data.GRID**2,
    }
    evaluate(exam.student.model, cells, exam.ask, exam.one, given.out, seconds=given.seconds, head=head)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["train", "scorer", "evaluate", "plot"])
    parser.add_argument("--lm", help="folder of SmolLM2-135M")
    parser.add_argument("--data", type=Path, help="what prepare left")
    parser.add_argument("--work", type=Path, help="for weights; a scorer is at WORK/scorer")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/mmprune_vision.json"))
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--seconds", type=float, default=360.0, help="of training, or after which evaluate begins no cell")
    parser.add_argument("--steps", type=int, default=300, help="of the scorer's training")
    parser.add_argument("--scorer-lr", type=float, default=5e-4, help="ten times the published one, for fewer steps")
    parser.add_argument("--batch", type=int, default=32, help="scenes; twice as many while the tower trains alone")
    parser.add_argument("--eval-batch", type=int, default=256)
    parser.add_argument("--items", type=int, default=1020, help="held-out questions")
    parser.add_argument("--workers", type=int, default=6, help="processes that make batches, of each phase")
    parser.add_argument("--every", type=float, default=10.0, help="seconds between lines of progress")
    parser.add_argument("--strategies", nargs="+")
    parser.add_argument("--ratios", nargs="+", type=float, default=RATIOS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="torch.compile on the language model's layers")
    parser.add_argument("--tiny", action="store_true", help="a tower that only shows that all runs")
    given = parser.parse_args()
    if given.what == "plot":
        plot(given.out, "accuracy")
        return
    missing = [name for name in ("lm", "data", "work") if getattr(given, name) is None]
    if missing:
        parser.error(f"give --{', --'.join(missing)}")
    kit = Kit.open(given)
    {"train": run_training, "scorer": run_scorer, "evaluate": run_evaluation}[given.what](kit)


if __name__ == "__main__":
    main()
