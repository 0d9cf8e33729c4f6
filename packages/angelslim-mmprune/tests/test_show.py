"""Pictures of kept tokens, and files that are no pictures."""

import json
import re
import wave

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from angelslim_core.cli.main import cli
from angelslim_core.errors import AngelslimError, ModelError, UsageError
from angelslim_mmprune import files
from angelslim_mmprune.files import read_image, read_sound, resampled
from angelslim_mmprune.pictures import over_image, over_waveform
from angelslim_mmprune.plan import Grid


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("files") / "a.png"
    Image.effect_mandelbrot((90, 60), (-2, -1.5, 1, 1.5), 30).save(path)
    return path


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    path = tmp_path_factory.mktemp("files") / "a.wav"
    tone = (torch.arange(8000) * 0.3).sin().mul(9000).short()
    with wave.open(str(path), "wb") as file:
        file.setparams((2, 2, 8000, 0, "NONE", ""))
        file.writeframes(tone[:, None].repeat(1, 2).numpy().tobytes())
    return path


@pytest.fixture
def prepared(tiny_copy):
    """prepared(architecture): a tiny model with what prepares its media."""

    def make(architecture):
        import transformers

        folder = tiny_copy(architecture)
        if architecture == "llava":
            transformers.CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(folder)
        elif architecture == "qwen2_audio":
            made = transformers.WhisperFeatureExtractor(feature_size=16, chunk_length=1, sampling_rate=3200, hop_length=80, n_fft=200)
            made.save_pretrained(folder)
        else:
            transformers.Qwen2VLImageProcessorPil(min_pixels=28 * 28 * 4, max_pixels=28 * 28 * 12).save_pretrained(folder)
        return folder

    return make


def show(model, out, *arguments):
    return CliRunner().invoke(cli, ["mmprune", "show", "--model", str(model), "--out", str(out), "--device", "cpu", *map(str, arguments)])


@pytest.mark.parametrize("architecture", ["llava", "qwen2_5_vl", "qwen3_vl"])
def test_an_image(prepared, picture, tmp_path, architecture):
    done = show(prepared(architecture), tmp_path / "o", "--image", picture, "--strategy", "random:keep_ratio=.5", "--json")
    assert done.exit_code == 0, (done.output, done.exception)
    found = json.loads(done.stdout)
    (stage,) = found["stages"]
    assert stage["before"] == found["tokens"] == 2 * stage["after"]
    drawn = torch.randperm(found["tokens"], generator=torch.Generator().manual_seed(0))[: stage["after"]]
    assert stage["kept"] == drawn.sort().values.tolist()
    page = (tmp_path / "o/show.html").read_text()
    assert page.count("<svg") == 1 and page.count("<image") == 1 and "<script" not in page and f"{stage['after']} of {found['tokens']} tokens" in page


def test_a_sound(prepared, sound, tmp_path):
    done = show(prepared("qwen2_audio"), tmp_path / "o", "--audio", sound, "--strategy", "random:keep_tokens=4", "--prompt", "<b>what</b>")
    assert done.exit_code == 0, (done.output, done.exception)
    assert "before the language model: 4 of 10" in done.stdout
    page = (tmp_path / "o/show.html").read_text()
    assert page.count("<svg") == 1 and "<b>" not in page and json.loads((tmp_path / "o/show.json").read_text())["prompt"] == "<b>what</b>"


def test_dropped_tokens_are_covered():
    import base64
    import io

    kept = torch.tensor([True, False, False, True, True, False])
    text = over_image(torch.full((20, 30, 3), 255, dtype=torch.uint8), Grid(1, 2, 3), kept)
    (drawn,) = [Image.open(io.BytesIO(base64.b64decode(m))).convert("L") for m in re.findall(r"data:image/png;base64,\s*([^\"]+)", text)]
    assert "scale(1 -1)" in text  # the page turns it over
    drawn = drawn.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    grey = [drawn.getpixel((int((c + 0.5) * drawn.width / 3), int((r + 0.5) * drawn.height / 2))) for r in range(2) for c in range(3)]
    assert [g > 200 for g in grey] == kept.tolist() and all(g < 100 for g in grey if g <= 200)


def test_spans_are_those_of_groups():
    kept = torch.tensor([True, False, True, False])
    spans = lambda groups: re.findall(r"fill: (#\w+); opacity: 0.8", over_waveform(torch.zeros(100), 100, 0.25, kept, groups))  # noqa: E731
    one, two = "#9ec5e8", "#f3c69a"
    assert (spans(None), spans(torch.tensor([0, 0, 1, -1])), spans(torch.tensor([0, 0, 1, 1]))) == ([one, two], [one, one, two], [one, one, two, two])


def test_sounds_are_read_and_resampled(sound):
    samples, rate = read_sound(sound)
    assert rate == 8000 and samples.shape == (8000,) and 0.2 < float(samples.abs().max()) < 0.3
    for wanted in (16000, 4000):
        other = resampled(samples, rate, wanted)
        assert len(other) == wanted
        expected = (torch.arange(wanted) * 0.3 * 8000 / wanted).sin() * float(samples.abs().max())
        assert float((other - expected)[50:-50].abs().mean()) < 0.03


@pytest.mark.parametrize("content", [b"", b"GIF89a", b"\x89PNG\r\n\x1a\n" + b"\0" * 40, b"<svg/>", b"RIFF\0\0\0\0WAVE"])
def test_files_that_are_neither(tmp_path, content):
    path = tmp_path / "f"
    path.write_bytes(content)
    for read in (read_image, read_sound):
        with pytest.raises(UsageError) as caught:
            read(path)
        assert "\n" not in str(caught.value)
    for read in (read_image, read_sound):
        with pytest.raises(UsageError, match="is no file"):
            read(tmp_path)


def test_sizes_are_looked_at_first(picture, sound, monkeypatch, tmp_path):
    monkeypatch.setattr(files, "MOST_PIXELS", 90 * 60 - 1)
    with pytest.raises(UsageError, match="90 x 60 pixels"):
        read_image(picture)
    monkeypatch.setattr(files, "MOST_BYTES", 100)
    for read, path in ((read_image, picture), (read_sound, sound)):
        with pytest.raises(UsageError, match="bytes"):
            read(path)
    with wave.open(str(tmp_path / "b.wav"), "wb") as file:
        file.setparams((1, 1, 8000, 0, "NONE", ""))
        file.writeframes(b"\x80" * 20)
    with pytest.raises(UsageError, match="of 8 bits"):
        read_sound(tmp_path / "b.wav")


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ([], UsageError, "--image or --audio"), (["--image", "IMAGE", "--audio", "SOUND"], UsageError, "not both"), (["--audio", "SOUND"], UsageError, "takes none"),
        (["--image", "SOUND"], UsageError, "no image"), (["--image", "IMAGE", "--strategy", "random,random:seed=1"], UsageError, "one strategy"),
        (["--image", "IMAGE", "--strategy", "nothing"], UsageError, "no strategy"), (["--image", "IMAGE"], ModelError, "prepares media"),
    ],
    ids=str,
)  # fmt: skip
def test_show_refuses(tiny, tmp_path, picture, sound, arguments, error, says):
    given = [{"IMAGE": picture, "SOUND": sound}.get(a, a) for a in arguments]
    done = show(tiny("llava"), tmp_path / "o", *([] if "--strategy" in given else ["--strategy", "random"]), *given)
    assert isinstance(done.exception, AngelslimError) and isinstance(done.exception, error) and re.search(says, str(done.exception))
    assert not (tmp_path / "o").exists()


def test_an_image_that_the_model_does_not_take(prepared, tmp_path):
    """Qwen's own code refuses a strip."""
    Image.new("RGB", (3000, 3)).save(tmp_path / "strip.png")
    done = show(prepared("qwen2_5_vl"), tmp_path / "o", "--image", tmp_path / "strip.png", "--strategy", "random")
    assert isinstance(done.exception, UsageError) and "is not taken by" in str(done.exception)
    assert not (tmp_path / "o").exists()


def test_models_that_prepare_sounds_at_no_rate(prepared, sound, tmp_path):
    model = prepared("qwen2_audio")
    settings = json.loads((model / "preprocessor_config.json").read_text())
    for changed in ({"sampling_rate": 10**12}, {"sampling_rate": 0}, {"sampling_rate": "a"}):
        (model / "preprocessor_config.json").write_text(json.dumps({**settings, **changed}))
        assert isinstance(show(model, tmp_path / "o", "--audio", sound, "--strategy", "samp").exception, ModelError)
    assert not (tmp_path / "o").exists()


def test_a_long_sound_is_cut_before_it_is_resampled(prepared, tmp_path, monkeypatch):
    with wave.open(str(tmp_path / "long.wav"), "wb") as file:
        file.setparams((1, 2, 1600, 0, "NONE", ""))
        file.writeframes(b"\0\1" * 160_000)
    lengths = []

    def spied(samples, *rates):
        lengths.append(len(samples))
        return resampled(samples, *rates)

    monkeypatch.setattr("angelslim_mmprune.show.resampled", spied)
    done = show(prepared("qwen2_audio"), tmp_path / "o", "--audio", tmp_path / "long.wav", "--strategy", "samp")
    assert done.exit_code == 0 and lengths == [1600]


def test_what_prepares_other_media(prepared, picture, tmp_path):
    import transformers

    model = prepared("qwen2_5_vl")
    transformers.CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(model)
    done = show(model, tmp_path / "o", "--image", picture, "--strategy", "random")
    assert isinstance(done.exception, ModelError) and "prepares no image_grid_thw" in str(done.exception)
