"""Spoken strings of digits, made from single recordings with pauses, noise and other loudness: the same for the same seed and number.

    python benchmarks/mmprune_data_audio.py prepare FSDD.tar.xz FOLDER

`prepare` leaves takes.npz: every recording of the archive (8 kHz, 16 bits, `digit_speaker_take.wav`), one after the other.
A clip is some numbers made by numpy (which takes, where, how fast); waveforms and log-mel features come from torch, on the device that reads them.

Test clips are of takes 0 to 4 of the speakers that training hears, or of one speaker whom it never hears. Features are Whisper's, as
Qwen2-Audio's processor makes them: 16 kHz, 25 ms windows each 10 ms, 128 bins; recordings are of 8 kHz, so the upper bins hold noise alone.
Shapes: B clips, S digits at most, N samples at 8 kHz, M frames of 10 ms.
"""

from __future__ import annotations

import argparse
import io
import tarfile
import wave
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

Part = Literal["train", "takes", "speaker"]
Numbers = np.ndarray[Any, np.dtype[Any]]

RATE, SECONDS, MOST_DIGITS, BINS = 8000, 10, 8, 128
SAMPLES = RATE * SECONDS
FRAMES = 100 * SECONDS
HELD_TAKES, HELD_SPEAKER = 5, "theo"
SLOT = 5  # first sample, samples, take, speed, gain


@dataclass(frozen=True)
class Takes:
    """Recordings.

    Args:
        samples: int16, all of them.
        starts: [R + 1]: where each begins.
        digits: [R].
        speakers: [R], names.
        takes: [R], number of the take.
    """

    samples: Numbers
    starts: Numbers
    digits: Numbers
    speakers: Numbers
    takes: Numbers

    @classmethod
    def load(cls, folder: Path) -> Takes:
        with np.load(folder / "takes.npz") as stored:
            return cls(*(stored[name] for name in ("samples", "starts", "digits", "speakers", "takes")))

    def of(self, part: Part, speaker: str = HELD_SPEAKER) -> dict[str, Numbers]:
        """Numbers of a part's recordings, by speaker."""
        heard, kept = self.speakers != speaker, self.takes >= HELD_TAKES
        mask = {"train": heard & kept, "takes": heard & ~kept, "speaker": ~heard}[part]
        return {str(name): np.flatnonzero(mask & (self.speakers == name)) for name in np.unique(self.speakers[mask])}


class Clip(NamedTuple):
    """
    Args:
        slots: [S, SLOT], FP32; unused ones are of 0 samples.
        length: samples at 8 kHz.
        digits: what is said.
        noise: amplitude of the noise, relative to the loudest speech.
        tilt: dB an octave, of a filter; 0 for test clips.
    """

    slots: Numbers
    length: int
    digits: str
    noise: float
    tilt: float


class Clips:
    """Clips of one part; those for training are played faster and slower, and filtered, others are as they were recorded.

    Args:
        speaker: whom training never hears.
    """

    def __init__(self, takes: Takes, part: Part, *, speaker: str = HELD_SPEAKER, seed: int = 0) -> None:
        self.takes, self.part, self.seed, self.changed = takes, part, seed, part == "train"
        self.by_speaker = list(takes.of(part, speaker).values())

    def clip(self, number: int) -> Clip:
        """One speaker's digits; what does not fit into ten seconds is not said."""
        rng = np.random.default_rng([self.seed, ("train", "takes", "speaker").index(self.part), number])
        pool = self.by_speaker[int(rng.integers(len(self.by_speaker)))]
        chosen = rng.choice(pool, int(rng.integers(3, MOST_DIGITS + 1)))
        slots, said, at = np.zeros((MOST_DIGITS, SLOT), np.float32), [], int(rng.uniform(0.05, 0.4) * RATE)
        tempo = rng.uniform(0.8, 1.25) if self.changed else 1.0  # of the speaker; each digit varies around it
        for slot, take in enumerate(chosen):
            speed = tempo * rng.uniform(0.95, 1.05) if self.changed else 1.0
            size = int((self.takes.starts[take + 1] - self.takes.starts[take] - 1) / speed)
            if at + size > SAMPLES - RATE // 10:
                break
            slots[slot] = [at, size, take, speed, 10 ** rng.uniform(-0.3, 0)]
            said.append(str(int(self.takes.digits[take])))
            pause = rng.uniform(0.04, 0.25) if rng.random() < 0.7 else rng.uniform(0.25, 0.9)
            at += size + int(pause * RATE)
        length = min(SAMPLES, at + int(rng.uniform(0, 0.3) * RATE))
        return Clip(slots, length, "".join(said), 10 ** rng.uniform(-3, -1.3), rng.uniform(-3, 3) if self.changed else 0.0)


class Sound:
    """Waveforms and features of clips, on a device."""

    def __init__(self, takes: Takes, device: torch.device | str) -> None:
        self.samples = torch.from_numpy(takes.samples).to(device).float() / 32768
        self.starts = torch.from_numpy(takes.starts).to(device)
        # each recording at the same loudness
        peaks = np.array([np.abs(takes.samples[a:b].astype(np.float32)).max() for a, b in zip(takes.starts[:-1], takes.starts[1:])])
        self.gains = torch.from_numpy(32768 * 0.5 / np.maximum(peaks, 1)).float().to(device)
        self.noise = torch.randn(8 * SAMPLES, generator=torch.Generator().manual_seed(0)).to(device)
        self.window = torch.hann_window(400).to(device)
        self.mels = torch.from_numpy(mel_filters()).float().to(device)

    def waves(self, slots: Tensor, lengths: Tensor, noise: Tensor) -> Tensor:
        """[B, N], FP32, 0 behind a clip's end.

        Args:
            slots: [B, S, SLOT].
            lengths: [B], samples.
            noise: [B, 2]: amplitude, and where in the noise to begin, 0 to 1.
        """
        device = self.samples.device
        slots, lengths, noise = (x.to(device, non_blocking=True) for x in (slots, lengths, noise))
        time = torch.arange(SAMPLES, device=device)
        offset = (noise[:, 1:] * 7 * SAMPLES).long()
        out = self.noise[offset + time] * noise[:, :1] * 0.5
        for slot in slots.unbind(1):
            first, size, take, speed, gain = (x[:, None] for x in slot.unbind(1))
            take = take.long()
            since = time - first
            inside = (since >= 0) & (since < size)
            at = since.clamp(min=0) * speed
            whole = at.floor()
            index = (self.starts[take] + whole.long()).clamp(max=len(self.samples) - 2)
            low, high = self.samples[index], self.samples[index + 1]
            out = out + inside * gain * self.gains[take] * (low + (high - low) * (at - whole))
        return out * (time < lengths[:, None])

    def features(self, waves: Tensor, tilt: Tensor | None = None) -> Tensor:
        """[B, BINS, M], FP32, of waves at 8 kHz; what `WhisperFeatureExtractor` makes of them at 16 kHz.

        Args:
            tilt: [B], dB an octave, around 1 kHz.
        """
        fine = doubled(waves)
        spectrum = torch.stft(fine, 400, 160, window=self.window, return_complex=True)[..., :-1].abs() ** 2
        mel = self.mels.T @ spectrum
        if tilt is not None:
            octaves = torch.log2(torch.linspace(0.1, 8, BINS, device=mel.device))
            mel = mel * 10 ** (tilt.to(mel.device)[:, None] * octaves / 10)[..., None]
        log = mel.clamp(min=1e-10).log10()
        log = torch.maximum(log, log.amax((1, 2), keepdim=True) - 8)
        return (log + 4) / 4


def doubled(waves: Tensor) -> Tensor:
    """[B, 2 N]: as many samples again between those of [B, N], by an ideal low-pass filter."""
    n = waves.shape[1]
    spectrum = torch.fft.rfft(waves)
    spectrum[:, -1] *= 0.5 if n % 2 == 0 else 1.0
    return torch.fft.irfft(torch.nn.functional.pad(spectrum, (0, n + 1 - spectrum.shape[1])), n=2 * n) * 2


def mel_filters() -> Numbers:
    """[201, BINS]: Slaney's triangles from 0 to 8 kHz, as Whisper's."""
    from transformers.audio_utils import mel_filter_bank

    found: Numbers = mel_filter_bank(201, BINS, 0.0, 8000.0, 16000, norm="slaney", mel_scale="slaney")
    return found


def masked(features: Tensor, spans: Tensor) -> Tensor:
    """Features [B, BINS, M] with two spans of bins and two of frames at their clip's mean. spans: [B, 4, 2], first and size, shares of all."""
    for number, (dim, size) in enumerate(((1, BINS), (1, BINS), (2, features.shape[2]), (2, features.shape[2]))):
        first, length = (spans[:, number, i].to(features.device)[:, None] * size for i in (0, 1))
        steps = torch.arange(size, device=features.device)
        hidden = (steps >= first) & (steps < first + length)
        features = torch.where(hidden.unsqueeze(3 - dim), features.mean((1, 2), keepdim=True), features)
    return features


def frames(length: int) -> int:
    """Of features, of a clip of so many samples at 8 kHz."""
    return -(-length // (RATE // 100))


def tokens(length: int) -> int:
    """Of a clip of so many samples at 8 kHz, as Qwen2-Audio counts them."""
    return ((frames(length) - 1) // 2 + 1 - 2) // 2 + 1


class Batches:
    """Training batches by number, alike in every process."""

    def __init__(self, clips: Clips, size: int) -> None:
        self.clips, self.size = clips, size

    def __call__(self, number: int) -> dict[str, Numbers]:
        """slots, lengths, noise, tilt, spans; said [B, S]: digits, -1 behind the last."""
        rng = np.random.default_rng([self.clips.seed, 9, number])
        return stacked([self.clips.clip(number * self.size + i) for i in range(self.size)], rng)


def stacked(clips: Sequence[Clip], rng: np.random.Generator) -> dict[str, Numbers]:
    """Clips side by side, with the places of their noise and what training hides of them."""
    said = np.array([[*map(int, clip.digits), *[-1] * (MOST_DIGITS - len(clip.digits))] for clip in clips])
    spans = rng.random((len(clips), 4, 2)) * [[0.9, 0.12], [0.9, 0.12], [1, 0.02], [1, 0.02]]
    return {
        "slots": np.stack([clip.slots for clip in clips]), "lengths": np.array([clip.length for clip in clips]), "said": said,
        "noise": np.stack([[clip.noise, rng.random()] for clip in clips]).astype(np.float32),
        "tilt": np.array([clip.tilt for clip in clips], np.float32), "spans": spans.astype(np.float32),
    }  # fmt: skip


def errors(reference: str, found: str) -> int:
    """Words (digits here) that were put in, left out or mistaken, at least."""
    row = list(range(len(found) + 1))
    for i, wanted in enumerate(reference, 1):
        before, row[0] = row[0], i
        for j, got in enumerate(found, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (wanted != got))
    return row[-1]


def prepare(archive: Path, folder: Path) -> None:
    """Write takes.npz."""
    found = []
    with tarfile.open(archive) as stored:
        for member in stored:
            file = stored.extractfile(member) if member.name.endswith(".wav") else None
            if file is None:
                continue
            with wave.open(io.BytesIO(file.read())) as sound:
                if (sound.getframerate(), sound.getsampwidth(), sound.getnchannels()) != (RATE, 2, 1):
                    raise SystemExit(f"{member.name} is not of 8 kHz, 16 bits, one channel")
                samples = np.frombuffer(sound.readframes(sound.getnframes()), "<i2")
            digit, speaker, take = Path(member.name).stem.split("_")
            found.append((speaker, int(digit), int(take), samples))
    found.sort(key=lambda item: item[:3])
    starts = np.cumsum([0, *(len(item[3]) for item in found)])
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        folder / "takes.npz", samples=np.concatenate([item[3] for item in found]), starts=starts, digits=np.array([item[1] for item in found]),
        speakers=np.array([item[0] for item in found]), takes=np.array([item[2] for item in found]),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["prepare"])
    parser.add_argument("archive", type=Path)
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    prepare(given.archive, given.folder)


if __name__ == "__main__":
    main()
