"""Scenes of scanned digits and rendered words among clutter, with questions about them: the same for the same seed and number.

    python benchmarks/mmprune_data_vision.py prepare FOLDER      # once, where scikit-learn, pillow and matplotlib are

`prepare` leaves glyphs.npz (some 100 KB): the 1797 scans of scikit-learn's `load_digits` and capital letters of four of matplotlib's fonts.
A scene is a few hundred numbers, made by numpy on the processor; the pixels come from torch, on the device that reads them.

Test scenes show other scans (every fifth of a digit) and other words (one in seven) than training scenes.
Shapes: B scenes, S slots (things drawn, back to front), G patches a side, T tokens of text.
"""

from __future__ import annotations

import argparse
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

Part = Literal["train", "test"]
Numbers = np.ndarray[Any, np.dtype[Any]]

SIDE, PATCH, CELLS = 336, 14, 3
GRID = SIDE // PATCH
HEIGHT, WIDTH = 32, 40  # of a texture
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
PLACES = ("top left", "top middle", "top right", "middle left", "center", "middle right", "bottom left", "bottom middle", "bottom right")
COLOURS = {
    "red": (1.0, 0.15, 0.12), "green": (0.15, 0.9, 0.2), "blue": (0.3, 0.45, 1.0), "yellow": (1.0, 0.95, 0.1),
    "purple": (0.8, 0.3, 1.0), "cyan": (0.1, 0.95, 0.95), "white": (1.0, 1.0, 1.0),
}  # fmt: skip
TINTS = np.array(list(COLOURS.values()), np.float32)
FONTS = ("DejaVuSans-Bold.ttf", "DejaVuSansMono-Bold.ttf", "DejaVuSerif-Bold.ttf", "DejaVuSans.ttf")
# slots: shapes behind, digits and letters, lines in front; the first two numbers of each are where it begins and ends
MOST_DIGITS, MOST_WORDS, LONGEST = 4, 3, 5
BEHIND, THINGS, FRONT = 8, MOST_DIGITS + MOST_WORDS * LONGEST, 3
SLOTS = BEHIND + THINGS + FRONT
SLOT = 9  # texture, x, y, scale, angle, red, green, blue, opacity
# what every patch is taught: nothing, a digit, a letter; its colour; its place in a word
KINDS, TINTED, PLACED, SEEN = 1 + 10 + 26, 1 + len(COLOURS), 1 + LONGEST, 10 + 26 + (MOST_DIGITS + 1) + (MOST_WORDS + 1)


@dataclass(frozen=True)
class Glyphs:
    """
    Args:
        scans: [1797, 8, 8], uint8, 0 to 16.
        digits: [1797], which digit each scan is.
        letters: [fonts, 26, HEIGHT, WIDTH], uint8.
        widths: [fonts, 26], pixels that a letter takes in a word.
    """

    scans: Numbers
    digits: Numbers
    letters: Numbers
    widths: Numbers

    @classmethod
    def load(cls, folder: Path) -> Glyphs:
        with np.load(folder / "glyphs.npz") as stored:
            return cls(*(stored[name] for name in ("scans", "digits", "letters", "widths")))

    @cached_property
    def rank(self) -> Numbers:
        """[1797]: the how-manieth of its digit each scan is."""
        return np.array([int((self.digits[:i] == d).sum()) for i, d in enumerate(self.digits)])

    def scans_of(self, part: Part) -> list[Numbers]:
        """Numbers of the scans of each digit."""
        held = self.rank % 5 == 0
        return [np.flatnonzero((self.digits == d) & (held if part == "test" else ~held)) for d in range(10)]

    def textures(self) -> Tensor:
        """[scans + letters + shapes, HEIGHT, WIDTH], FP32, 0 to 1: all that is drawn."""
        scans = torch.nn.functional.interpolate(torch.from_numpy(self.scans).float()[:, None] / 16, size=HEIGHT, mode="bicubic", align_corners=False)
        scans = torch.nn.functional.pad(scans[:, 0].clamp(0, 1), ((WIDTH - HEIGHT) // 2,) * 2)
        letters = torch.from_numpy(self.letters).float().flatten(0, 1) / 255
        return torch.cat([scans, letters, shapes()])

    def letter(self, font: int, letter: int) -> int:
        """Texture of a letter."""
        return len(self.scans) + 26 * font + letter

    def shape(self, number: int) -> int:
        """Texture of a shape; the last is a line."""
        return len(self.scans) + 26 * len(self.letters) + number


def shapes() -> Tensor:
    """[6, HEIGHT, WIDTH]: disc, ring, box, frame, triangle, line."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, HEIGHT), torch.linspace(-1.25, 1.25, WIDTH), indexing="ij")
    radius, square = (x**2 + y**2).sqrt(), torch.maximum(x.abs(), y.abs())
    triangle = (y.abs() < 0.8) & (x.abs() < (y + 0.8) / 2)
    found = [radius < 0.9, (radius < 0.9) & (radius > 0.65), square < 0.8, (square < 0.85) & (square > 0.65), triangle]
    return torch.stack([*found, y.abs() < 0.05]).float()


def words(vocabulary: Sequence[str], part: Part) -> list[str]:
    """Capital words of three to five letters among a tokenizer's pieces (which mark a word's beginning by a letter of its own)."""
    found = sorted({piece[1:] for piece in vocabulary if 4 <= len(piece) <= LONGEST + 1 and piece[0] == "Ġ" and piece[1:].isascii() and piece[1:].isalpha()})
    chosen = [word.upper() for word in found if word.islower()]
    return [word for word in chosen if (zlib.crc32(word.encode()) % 7 == 0) == (part == "test")]


class Question(NamedTuple):
    kind: str
    text: str
    answer: str


@dataclass(frozen=True)
class Scene:
    """
    Args:
        slots: [S, SLOT].
        ground: [3 + 108 + 3]: colour, a 3 x 6 x 6 field of light, amplitude of noise and where in the noise to look.
        kind, colour, place: [G, G], uint8: what each patch shows.
        seen: [SEEN], uint8: digits, letters and how many digits and words there are.
        questions: all that can be asked.
    """

    slots: Numbers
    ground: Numbers
    kind: Numbers
    colour: Numbers
    place: Numbers
    seen: Numbers
    questions: list[Question]


class Scenes:
    """Scenes of one part of the data.

    Args:
        invented: share of the words that are letters by lot.
    """

    def __init__(self, glyphs: Glyphs, vocabulary: Sequence[str], part: Part, *, seed: int = 0, invented: float = 0.4) -> None:
        self.glyphs, self.part, self.seed = glyphs, part, seed
        self.invented = invented if part == "train" else 0.0
        self.scans, self.words = glyphs.scans_of(part), words(vocabulary, part)

    def scene(self, number: int, clutter: float = 1.0) -> Scene:
        """
        Args:
            clutter: 0, a plain ground, to 1.
        """
        rng = np.random.default_rng([self.seed, int(self.part == "test"), number])
        slots = np.zeros((SLOTS, SLOT), np.float32)
        kind, colour, place = (np.zeros((GRID, GRID), np.uint8) for _ in range(3))
        digits, count = int(rng.integers(1, MOST_DIGITS + 1)), int(rng.integers(1, MOST_WORDS + 1))
        cells = rng.permutation(CELLS * CELLS)[: digits + count]
        tints = rng.permutation(len(COLOURS))[: digits + count]
        seen = np.zeros(SEEN, np.uint8)
        seen[[36 + digits, 41 + count]] = 1
        asked, at = [Question("digits", "How many digits are there?", str(digits)), Question("words", "How many words are there?", str(count))], BEHIND
        for n, (cell, tint) in enumerate(zip(cells, tints)):
            middle = (np.array([cell % CELLS, cell // CELLS]) + 0.5) * SIDE / CELLS + rng.uniform(-9, 9, 2)
            where, name = PLACES[cell], list(COLOURS)[tint]
            if n < digits:
                digit = int(rng.integers(10))
                size = rng.uniform(42, 60)
                slots[at] = [rng.choice(self.scans[digit]), *middle, size / HEIGHT, rng.uniform(-0.15, 0.15), *TINTS[tint], 1]
                _mark(kind, colour, place, middle, (size * 0.75, size * 0.9), 1 + digit, tint, 0)
                seen[digit] = 1
                asked.append(Question("digit at", f"Which digit is in the {where}?", str(digit)))
                asked.append(Question("digit by colour", f"Which digit is {name}?", str(digit)))
                at += 1
            else:
                word = self._word(rng)
                at = self._write(slots, at, rng, word, middle, tint, (kind, colour, place))
                seen[[10 + LETTERS.index(c) for c in word]] = 1
                spelt = " ".join(word)
                asked.append(Question("word at", f"Which word is in the {where}?", spelt))
                asked.append(Question("word by colour", f"What word is written in {name}?", spelt))
        self._litter(slots, rng, clutter)
        ground = np.concatenate([rng.uniform(0, 0.3, 3), clutter * rng.uniform(-0.2, 0.2, 108), [clutter * rng.uniform(0.02, 0.12)], rng.integers(0, 176, 2)])
        return Scene(slots, ground.astype(np.float32), kind, colour, place, seen, asked)

    def _word(self, rng: np.random.Generator) -> str:
        if rng.random() < self.invented:
            return "".join(LETTERS[i] for i in rng.integers(0, 26, int(rng.integers(3, LONGEST + 1))))
        return self.words[int(rng.integers(len(self.words)))]

    def _write(self, slots: Numbers, at: int, rng: np.random.Generator, word: str, middle: Numbers, tint: int, marks: tuple[Numbers, Numbers, Numbers]) -> int:
        """Letters side by side, turned together; the slot behind them."""
        font, angle = int(rng.integers(len(self.glyphs.letters))), rng.uniform(-0.08, 0.08)
        letters = [LETTERS.index(c) for c in word]
        widths = self.glyphs.widths[font, letters].astype(float)
        scale = min(rng.uniform(1.0, 1.4), 102 / widths.sum())
        offsets = (np.cumsum(widths) - widths / 2 - widths.sum() / 2) * scale
        for number, (letter, offset, width) in enumerate(zip(letters, offsets, widths)):
            centre = middle + offset * np.array([np.cos(angle), np.sin(angle)])
            slots[at] = [self.glyphs.letter(font, letter), *centre, scale, angle, *TINTS[tint], 1]
            _mark(*marks, centre, (width * scale, scale * HEIGHT * 0.85), 11 + letter, tint, 1 + number)
            at += 1
        return at

    def _litter(self, slots: Numbers, rng: np.random.Generator, clutter: float) -> None:
        """Shapes behind and lines in front, of colours by lot."""
        for slot in range(BEHIND):
            if rng.random() < clutter:
                shape = self.glyphs.shape(int(rng.integers(5)))
                slots[slot] = [shape, *rng.uniform(0, SIDE, 2), rng.uniform(0.6, 2.6), rng.uniform(0, 6.3), *rng.uniform(0, 0.8, 3), rng.uniform(0.2, 0.6)]
        for slot in range(SLOTS - FRONT, SLOTS):
            if rng.random() < clutter:
                line = self.glyphs.shape(5)
                slots[slot] = [line, *rng.uniform(0, SIDE, 2), rng.uniform(1, 2.4), rng.uniform(0, 6.3), *rng.uniform(0, 1, 3), rng.uniform(0.5, 0.9)]


def _mark(kind: Numbers, colour: Numbers, place: Numbers, centre: Numbers, size: tuple[float, float], what: int, tint: int, index: int) -> None:
    """Label the patches whose middle lies in a box, or the one patch in which a small box's middle lies."""
    (x0, x1), (y0, y1) = (_span(c, s) for c, s in zip(centre, size))
    kind[y0:y1, x0:x1], colour[y0:y1, x0:x1], place[y0:y1, x0:x1] = what, 1 + tint, index


def _span(centre: float, size: float) -> tuple[int, int]:
    low, high = (int(np.ceil((centre + side * size / 2) / PATCH - 0.5)) for side in (-1, 1))
    middle = min(GRID - 1, max(0, int(centre // PATCH)))
    return (max(0, low), min(GRID, high)) if high > low else (middle, middle + 1)


class Painter:
    """Pixels of scenes, on a device."""

    def __init__(self, glyphs: Glyphs, device: torch.device | str) -> None:
        self.textures = glyphs.textures().to(device)
        self.noise = torch.randn(SIDE + 176, SIDE + 176, 3, generator=torch.Generator().manual_seed(0)).to(device)

    def paint(self, slots: Tensor, ground: Tensor) -> Tensor:
        """[B, 3, SIDE, SIDE], FP32, roughly of mean 0 and spread 1.

        Args:
            slots: [B, S, SLOT].
            ground: [B, 114].
        """
        device, margin = self.textures.device, 64
        slots, ground = (x.to(device, non_blocking=True) for x in (slots, ground))
        light = torch.nn.functional.interpolate(ground[:, 3:111].view(-1, 3, 6, 6), size=SIDE, mode="bilinear", align_corners=False).permute(0, 2, 3, 1)
        at = ground[:, 112:].long()[:, None] + torch.arange(SIDE, device=device)[None, :, None]  # [B, SIDE, 2]
        inner = ground[:, None, None, :3] + light + ground[:, 111, None, None, None] * self.noise[at[:, :, None, 0], at[:, None, :, 1]]
        canvas = torch.nn.functional.pad(inner, (0, 0, margin, margin, margin, margin))
        for number in range(slots.shape[1]):
            window = 80 if BEHIND <= number < BEHIND + THINGS else 128
            self._draw(canvas, slots[:, number], margin, window)
        inner = canvas[:, margin : margin + SIDE, margin : margin + SIDE]
        return (inner.clamp(0, 1).permute(0, 3, 1, 2) - 0.3) / 0.25

    def _draw(self, canvas: Tensor, slot: Tensor, margin: int, window: int) -> None:
        """One slot of every scene, in place. canvas [B, side, side, 3], slot [B, SLOT]."""
        centre = slot[:, 1:3]
        corner = (centre - window / 2).round().clamp(-margin, SIDE + margin - window)
        steps = torch.arange(window, device=canvas.device)
        pixels = corner[:, None] + steps[:, None]  # [B, window, 2]: x and y
        rows, columns = (pixels[:, :, i].long() + margin for i in (1, 0))
        d = pixels + 0.5 - centre[:, None]
        dx, dy = d[:, None, :, 0], d[:, :, None, 1]
        cos, sin = slot[:, 4].cos()[:, None, None], slot[:, 4].sin()[:, None, None]
        scale = slot[:, 3].clamp(min=1e-3)[:, None, None]
        u, v = (cos * dx + sin * dy) / scale / (WIDTH / 2), (cos * dy - sin * dx) / scale / (HEIGHT / 2)
        mask = torch.nn.functional.grid_sample(self.textures[slot[:, 0].long()][:, None], torch.stack([u, v], -1), align_corners=False)[:, 0]
        mask = (mask * slot[:, 8, None, None])[..., None]
        index = (torch.arange(len(slot), device=canvas.device)[:, None, None], rows[:, :, None], columns[:, None, :])
        under = canvas[index]
        canvas[index] = under + mask * (slot[:, None, None, 5:8] - under)


class Batches:
    """Training batches by number, of `turns` questions about each scene, one after the other; alike in every process.

    Args:
        encode: ids of questions and answers, all that there are, by text.
        length: tokens of text of a row.
        ramp: batches over which clutter grows from none to all of it.
    """

    def __init__(self, scenes: Scenes, encode: TextIds, *, size: int, turns: int = 6, length: int = 96, ramp: int = 600, seed: int = 0) -> None:
        self.scenes, self.encode, self.size, self.turns, self.length, self.ramp, self.seed = scenes, encode, size, turns, length, ramp, seed

    def __call__(self, number: int) -> dict[str, Numbers]:
        """slots, ground, kind, colour, place, seen of B scenes; ids [B, T]; labels [B, T], -100 where nothing is to be said."""
        rng = np.random.default_rng([self.seed, 2, number])
        clutter = min(1.0, number / self.ramp)
        scenes = [self.scenes.scene(number * self.size + i, clutter * rng.uniform(0.5, 1)) for i in range(self.size)]
        ids = np.full((self.size, self.length), self.encode.end, np.int64)
        labels = np.full((self.size, self.length), -100, np.int64)
        for row, scene in enumerate(scenes):
            at = 0
            for chosen in rng.permutation(len(scene.questions))[: self.turns]:
                question, answer = (self.encode(text) for text in (scene.questions[chosen].text + "\n", scene.questions[chosen].answer))
                both = [*question, *answer, self.encode.end]
                if at + len(both) > self.length:
                    break
                ids[row, at : at + len(both)] = both
                labels[row, at + len(question) : at + len(both)] = both[len(question) :]
                at += len(both)
        stacked = {name: np.stack([getattr(scene, name) for scene in scenes]) for name in ("slots", "ground", "kind", "colour", "place", "seen")}
        return {**stacked, "ids": ids, "labels": labels}


class TextIds:
    """Ids of texts, remembered; an answer's letters each have the id that a letter behind a space has.

    Args:
        tokenizer: of the language model.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.end = int(tokenizer.eos_token_id)
        self._tokenizer, self._known = tokenizer, dict[str, list[int]]()

    def __call__(self, text: str) -> list[int]:
        if text not in self._known:
            shown = f" {text}" if text[0] in LETTERS and text[1:2] == " " else text
            self._known[text] = self._tokenizer(shown, add_special_tokens=False)["input_ids"]
        return self._known[text]


def test_items(scenes: Scenes, count: int) -> list[tuple[Scene, Question]]:
    """Scenes of full clutter with a question each, kinds of questions in turn."""
    kinds = ("digit at", "word by colour", "digit by colour", "word at", "digits", "words")
    found = []
    for number in range(count):
        scene = scenes.scene(number)
        able = [q for q in scene.questions if q.kind == kinds[number % len(kinds)]]
        found.append((scene, able[number // len(kinds) % len(able)]))
    return found


def prepare(folder: Path) -> None:
    """Write glyphs.npz."""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont
    from sklearn.datasets import load_digits

    found = load_digits()
    letters = np.zeros((len(FONTS), 26, HEIGHT, WIDTH), np.uint8)
    widths = np.zeros((len(FONTS), 26), np.uint8)
    for number, name in enumerate(FONTS):
        font = ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), 30)
        for i, letter in enumerate(LETTERS):
            image = Image.new("L", (WIDTH, HEIGHT))
            ImageDraw.Draw(image).text((WIDTH / 2, HEIGHT / 2), letter, 255, font, anchor="mm")
            letters[number, i] = np.asarray(image)
            widths[number, i] = min(WIDTH, max(14, round(font.getlength(letter))))
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(folder / "glyphs.npz", scans=found.images.astype(np.uint8), digits=found.target.astype(np.uint8), letters=letters, widths=widths)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["prepare"])
    parser.add_argument("folder", type=Path)
    prepare(parser.parse_args().folder)


if __name__ == "__main__":
    main()
