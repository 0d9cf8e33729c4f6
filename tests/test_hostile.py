"""Hostile model folders and recipes: an exit code and two lines, nothing written, no code run, no network touched."""

import json
import os
import pickle
import re
import shutil
import signal
import socket
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from angelslim_core import compress, load
from angelslim_core.cli import main as cli
from angelslim_core.errors import ModelError
from angelslim_core.io.checkpoint import Checkpoint, read_header
from angelslim_core.testing.models import split_shards

TENSOR, LAYER = "quant.int8_dynamic", "quant.fp8_static"
NAME = "model.layers.1.mlp.up_proj.weight"
FUZZ = settings(deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Any attempt to reach a host fails the test, also where the code would swallow the error."""
    tried = []

    def refuse(*args, **kwargs):
        tried.append(args)
        raise OSError("the network is blocked")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield
    assert not tried


@pytest.fixture
def canary(tmp_path_factory, monkeypatch):
    """A file that only the code of a hostile folder would make."""
    path = tmp_path_factory.mktemp("canary") / "sang"
    monkeypatch.setenv("CANARY", str(path))
    yield path
    assert not path.exists()


@pytest.fixture
def run(capsys, tmp_path, monkeypatch, canary):
    """run(model, use or recipe text, *arguments): (exit code, stderr) of `angelslim run`, checked for what holds always."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 20)

    def call(model, what, *arguments):
        before = _tree(tmp_path)
        if "\n" in what:
            recipe = tmp_path / "r.yaml"
            recipe.write_text(what.replace("TEXT", str(text)))
            chosen = [recipe]
        else:
            chosen = ["--use", what]
            if what == LAYER and not any("calibration.data" in str(a) for a in arguments):
                chosen += ["--set", f"calibration.data={text}"]
            if what == LAYER:
                chosen += ["--set", "calibration.samples=2", "--set", "calibration.tokens=16"]
        capsys.readouterr()
        code = cli._guarded([str(a) for a in ("run", *chosen, "--model", model, "--out", folder / "out", *arguments)])
        err = capsys.readouterr().err
        assert "Traceback" not in err and "AS-BUG" not in err
        new = {p for p in _tree(tmp_path) - before if p.parts[0] != "r.yaml" and p.parts[:2] != ("here", "out")}
        assert not new, f"written beside the output: {new}"
        if code:
            assert not (folder / "out").exists()
            lines = [line for line in err.splitlines() if not line.startswith(("[transformers]", "hint: "))]
            assert len(lines) == 1 and re.match(r"error\[AS-[A-Z]{3}-\d{3}\] ", lines[0]), err
        return code, err

    call.folder, call.out = folder, folder / "out"
    return call


def _tree(folder):
    return {p.relative_to(folder) for p in folder.rglob("*")}


def configured(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def raw_config(folder, addition):
    """Text put into the object of config.json as it stands."""
    path = folder / "config.json"
    path.write_bytes(path.read_bytes().rstrip().removesuffix(b"}") + b"," + addition + b"}")


def reheaded(path, change, data=b""):
    """Rewrite a weight file's header by change(header) -> header or bytes, and append data."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = change(json.loads(content[8 : 8 + length]))
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :] + data)


def appended(name, dtype, shape, nbytes):
    """A change that announces one more tensor behind the others."""

    def change(header):
        end = max(entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__")
        return {**header, name: {"dtype": dtype, "shape": shape, "data_offsets": [end, end + nbytes]}}

    return change


def moved(delta):
    """A change that shifts one tensor's bytes: they overlap a neighbour's, or leave a hole."""

    def change(header):
        header[NAME]["data_offsets"] = [offset + delta for offset in header[NAME]["data_offsets"]]
        return header

    return change


def twice(header):
    return json.dumps(header).encode()[:-1] + b"," + json.dumps({NAME: header[NAME]}).encode()[1:]


def retyped(**entry):
    return lambda header: {**header, NAME: {**header[NAME], **entry}}


HEADERS = {
    "overlap": (moved(-2), b""),
    "hole": (moved(2), b""),
    "duplicate key": (twice, b""),
    "length beyond the file": (lambda h: b"{" + b" " * (1 << 20), b""),
    "bytes nobody announced": (lambda h: h, b"x"),
    "negative shape": (retyped(shape=[-128, -64]), b""),
    "shape of another size": (retyped(shape=[128, 65]), b""),
    "number of 5000 digits": (lambda h: json.dumps(h).replace('"shape": [', '"shape": [' + "9" * 5000 + ", ", 1).encode(), b""),
    "nothing of 2^70": (appended("x", "F32", [0, 1 << 70], 0), b""),
    "a thousand dimensions": (appended("x", "F32", [1] * 1000, 4), b"aaaa"),
    "unknown dtype": (retyped(dtype="F17"), b""),
    "half a surrogate pair in a name": (appended("\ud800", "U8", [1], 1), b"a"),
    "metadata of numbers": (lambda h: {**h, "__metadata__": {"format": 5}}, b""),
    "metadata that are none": (lambda h: {**h, "__metadata__": 5}, b""),
    "nested deep": (lambda h: b'{"a":' * 10_000 + b"1" + b"}" * 10_000, b""),
    "quotes without an end": (lambda h: b'{"' + b'\\"' * (1 << 20), b""),
    "backslashes": (lambda h: b'"\\' * (1 << 20), b""),
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers(tiny_copy, run, case):
    model = tiny_copy()
    change, data = HEADERS[case]
    reheaded(model / "model.safetensors", change, data)
    assert run(model, TENSOR)[0] == 5


@pytest.mark.parametrize("size", [0, 7, 8, 100, -1, -4000])
def test_truncated(tiny_copy, run, size):
    model = tiny_copy()
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    assert run(model, TENSOR)[0] == 5


def test_huge_length(tiny_copy, run):
    model = tiny_copy()
    path = model / "model.safetensors"
    path.write_bytes(struct.pack("<Q", (1 << 64) - 1) + path.read_bytes()[8:])
    assert run(model, TENSOR)[0] == 5


def test_lfs_pointer(tiny_copy, run):
    model = tiny_copy()
    (model / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 270000000\n")
    code, err = run(model, TENSOR)
    assert code == 5 and "git lfs pull" in err


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Bytes of a small valid file."""
    import torch

    path = tmp_path_factory.mktemp("small") / "a.safetensors"
    save_file({"a": torch.arange(6).view(2, 3), "b": torch.ones(5, dtype=torch.bfloat16)}, path, metadata={"format": "pt"})
    return path.read_bytes()


def edits(limit):
    place = st.integers(0, limit)
    return st.one_of(
        st.tuples(st.just("cut"), place, st.just(b"")),
        st.tuples(st.just("flip"), place, st.integers(0, 7)),
        st.tuples(st.just("put"), place, st.binary(max_size=4) | st.sampled_from([b"1", b"9" * 20, b",", b'"a"', b"-", b"[", b"}", b"\\"])),
        st.tuples(st.just("set"), place, st.binary(min_size=1, max_size=3) | st.sampled_from([b"0", b"1", b"6", b"]"])),
        st.tuples(st.just("length"), place | st.integers(0, (1 << 64) - 1), st.just(b"")),
    )


def edited(data, changes):
    for kind, place, what in changes:
        at = place % max(len(data), 1)
        if kind == "cut":
            data = data[:at]
        elif kind == "flip" and data:
            data = data[:at] + bytes([data[at] ^ 1 << what]) + data[at + 1 :]
        elif kind == "put":
            data = data[:at] + what + data[at:]
        elif kind == "set":
            data = data[:at] + what + data[at + len(what) :]
        elif kind == "length":
            data = struct.pack("<Q", place) + data[8:]
    return data


@settings(FUZZ, max_examples=400)
@given(changes=st.lists(edits(260), min_size=1, max_size=3), repair=st.booleans())
def test_a_header_we_accept_the_library_accepts(tmp_path, small, changes, repair):
    data = edited(small, changes)
    if repair:  # the length of the header, so that its text is what is tried
        data = struct.pack("<Q", max(0, len(data) - len(small) + struct.unpack("<Q", small[:8])[0])) + data[8:]
    path = tmp_path / "fuzzed.safetensors"
    path.write_bytes(data)
    try:
        infos = read_header(path)
    except ModelError as error:
        assert error.exit_code == 5 and "\n" not in error.what
        return
    with safe_open(path, "pt") as library:
        assert set(library.keys()) == set(infos)
        for name, info in infos.items():
            assert tuple(library.get_slice(name).get_shape()) == info.shape
            assert data[info.offset : info.offset + info.nbytes] == Checkpoint(path.parent, {}, infos).read(name).view(-1).view(_u8()).numpy().tobytes()


def _u8():
    import torch

    return torch.uint8


@settings(FUZZ, max_examples=40)
@given(changes=st.lists(st.tuples(st.just("flip"), st.integers(0, 1 << 20), st.integers(0, 7)), min_size=1, max_size=3))
def test_flipped_bits_anywhere_in_a_model(tiny, tmp_path_factory, changes):
    work = tmp_path_factory.mktemp("flipped")
    (work / "model").mkdir()
    for name in ("config.json", "model.safetensors"):
        (work / "model" / name).write_bytes((tiny() / name).read_bytes())
    path = work / "model/model.safetensors"
    path.write_bytes(edited(path.read_bytes(), changes))
    code = cli._guarded(["--quiet", "run", "--model", str(work / "model"), "--out", str(work / "out"), "--use", TENSOR, "--json"])
    assert code in (0, 5, 8)
    assert {p.name for p in work.iterdir()} == ({"model", "out"} if code == 0 else {"model"})


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(-3, 300) | st.floats() | st.text(max_size=8) | st.sampled_from(["silu", "x/evil", 1 << 40, -1e300]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=2),
    max_leaves=4,
)


@settings(FUZZ, max_examples=60)
@given(data=st.data())
def test_any_value_anywhere_in_a_config(tiny, tmp_path_factory, data):
    work = tmp_path_factory.mktemp("config")
    config = json.loads((tiny() / "config.json").read_text())
    extra = ["quantization_config", "text_config", "rope_scaling", "layer_types", "sliding_window", "torch_dtype", "auto_map", "attn_implementation"]
    for key in data.draw(st.lists(st.sampled_from(sorted({*config, *extra})), min_size=1, max_size=2)):
        config[key] = data.draw(VALUES)
    (work / "model").mkdir()
    for path in tiny().iterdir():
        os.link(path, work / "model" / path.name)
    (work / "model/config.json").unlink()
    (work / "model/config.json").write_text(json.dumps(config))
    (work / "text.txt").write_text("the quick brown fox " * 10)
    settled = ["--set", f"calibration.data={work / 'text.txt'}", "--set", "calibration.samples=1", "--set", "calibration.tokens=8"]
    code = cli._guarded(["--quiet", "run", "--model", str(work / "model"), "--out", str(work / "out"), "--use", LAYER, *settled, "--json"])
    assert code in (0, 5, 8)
    assert {p.name for p in work.iterdir()} - {"out"} == {"model", "text.txt"} and (work / "out").exists() == (code == 0)


# shards --------------------------------------------------------------------------------------------------------------


def index(folder, change):
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": change(json.loads(path.read_text())["weight_map"])}))


def outside(folder):
    """The weights, moved out of the folder."""
    names = load_file(folder / "model.safetensors")
    target = folder.parent / "outside.safetensors"
    (folder / "model.safetensors").rename(target)
    return dict.fromkeys(names, "w.safetensors"), target


def missing_shard(folder):
    split_shards(folder, 2)
    (folder / "model-00002-of-00002.safetensors").unlink()


def shard_without_end(folder):
    split_shards(folder, 2)
    path = folder / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-2])


def two_shards_one_tensor(folder):
    split_shards(folder, 2)
    first, second = (load_file(folder / f"model-0000{i}-of-00002.safetensors") for i in (1, 2))
    save_file({**second, **dict([next(iter(first.items()))])}, folder / "model-00002-of-00002.safetensors")


def two_files_one_name(folder):
    split_shards(folder, 2)
    index(folder, lambda m: {**m, NAME: sorted(set(m.values()) - {m[NAME]})[0]})


def unnamed_tensor(folder):
    split_shards(folder, 2)
    index(folder, lambda m: {n: f for n, f in m.items() if n != NAME})


def escaping(name):
    def make(folder):
        names, target = outside(folder)
        text = json.dumps({"weight_map": dict.fromkeys(names, name.replace("OUTSIDE", str(target)))})
        (folder / "model.safetensors.index.json").write_text(text)

    return make


def linked(folder):
    names, target = outside(folder)
    (folder / "w.safetensors").symlink_to(target)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def linked_without_index(folder):
    (folder / "model.safetensors").symlink_to(outside(folder)[1])


def linked_in_a_circle(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("model.safetensors")


def pipe_for_weights(folder):
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")


def index_of_pickles(folder):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {NAME: "pytorch_model.bin"}}))
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))


def pickle_only(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))


def duplicate_in_index(folder):
    split_shards(folder, 2)
    path = folder / "model.safetensors.index.json"
    path.write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors", "a": "model-00002-of-00002.safetensors"}}')


class Evil:
    def __reduce__(self):
        return os.system, ('touch "$CANARY"',)


FOLDERS = {
    f.__name__: f
    for f in (missing_shard, shard_without_end, two_shards_one_tensor, two_files_one_name, unnamed_tensor, linked, linked_without_index, linked_in_a_circle,
              pipe_for_weights, index_of_pickles, pickle_only, duplicate_in_index)
}  # fmt: skip
FOLDERS |= {
    f"index names {n[:24]}": escaping(n)
    for n in ("../outside.safetensors", "OUTSIDE", "a/../../outside.safetensors", "a\0.safetensors", "x" * 300 + ".safetensors")
}


@pytest.mark.parametrize("case", FOLDERS)
def test_folders(tiny_copy, run, case):
    model = tiny_copy()
    FOLDERS[case](model)
    assert run(model, TENSOR)[0] == 5


def test_hub_cache_links_are_followed(tiny_copy, run, tmp_path):
    model = tiny_copy()
    cache = tmp_path / "models--a--b"
    (cache / "snapshots").mkdir(parents=True)
    (cache / "blobs").mkdir()
    snapshot = model.rename(cache / "snapshots/1234")
    for path in list(snapshot.iterdir()):
        path.rename(cache / "blobs" / path.name)
        path.symlink_to(Path("../../blobs") / path.name)
    assert run(snapshot, LAYER)[0] == 0


@pytest.mark.parametrize("name", ["LICENSE", "tokenizer.json", "chat_template.jinja", "config.json"])
def test_no_file_outside_is_copied(tiny_copy, run, tmp_path, name):
    model = tiny_copy()
    secret = tmp_path / "secret"
    secret.write_bytes((model / name).read_bytes() if (model / name).exists() else b"password")
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(secret)
    assert run(model, TENSOR)[0] == 5


def test_tensor_names_are_no_paths(tiny_copy, run, tmp_path):
    model = tiny_copy()
    for number, name in enumerate(("../../../climbed", "/absolute", "a\0b", "", "line\nbreak: <script>")):
        reheaded(model / "model.safetensors", appended(name, "U8", [1], 1), bytes([number]))
    code, _ = run(model, TENSOR)
    assert code == 0 and not (tmp_path.parent / "climbed").exists() and "../../../climbed" in load_file(run.out / "model.safetensors")


# code ----------------------------------------------------------------------------------------------------------------

CODE = "import os\nopen(os.environ['CANARY'], 'w').close()\nclass X: pass\n"


def test_pickle_and_code_beside_good_weights_are_ignored(tiny_copy, run, tmp_path, canary):
    model = tiny_copy()
    files = {"pytorch_model.bin": pickle.dumps(Evil()), "training_args.pt": pickle.dumps(Evil()), "tokenizer.pkl": pickle.dumps(Evil())}
    files |= dict.fromkeys(["modeling_evil.py", "tokenizer.py", "tokenizer_fast.so", "__init__.py"], CODE.encode())
    for name, content in files.items():
        (model / name).write_bytes(content)
    custom = {"AutoConfig": "modeling_evil.X", "AutoModelForCausalLM": "modeling_evil.X", "AutoTokenizer": ["modeling_evil.X", None]}
    configured(model, auto_map=custom)
    text = tmp_path / "text.txt"
    result = compress(model, out=run.out, recipe={"steps": [{"use": LAYER}], "calibration": {"data": str(text), "samples": 2, "tokens": 16}})
    for name in files:
        assert any(name in line for line in result.warnings), name
        assert not (run.out / name).exists()
    assert "auto_map" not in (run.out / "config.json").read_text()
    loaded, tokenizer = load(run.out)
    assert type(loaded).__module__.startswith("transformers.") and tokenizer is not None and not canary.exists()


def test_a_tokenizer_of_custom_code_is_refused(tiny_copy, run):
    model = tiny_copy()
    (model / "evil.py").write_text(CODE)
    (model / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "X", "auto_map": {"AutoTokenizer": ["evil.X", "evil.X"]}}))
    assert run(model, LAYER)[0] == 5
    assert run(model, TENSOR)[0] == 0  # reads no text


def test_kernels_and_weights_a_config_names_are_ignored(tiny_copy, run):
    model = tiny_copy()
    hub = "evil-kernels/attention"
    keys = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal", "experts_implementation", "_experts_implementation")
    configured(model, **dict.fromkeys(keys, hub), transformers_weights="../elsewhere.safetensors")
    assert run(model, LAYER)[0] == 0
    assert load(run.out)[0] is not None
    assert "evil" not in (run.out / "config.json").read_text() and "elsewhere" not in (run.out / "config.json").read_text()


@pytest.mark.parametrize(
    "template",
    ["{{ cycler.__init__.__globals__.os.system('touch $CANARY') }}", "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ 'a' * 2000000000000 }}", "{% for"],
)
def test_chat_templates(tiny_copy, run, tmp_path, template):
    model = tiny_copy()
    (model / "chat_template.jinja").write_text(template)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"messages": [{"role": "user", "content": "hi"}]}) + "\n")
    assert run(model, LAYER, "--set", f"calibration.data={rows}")[0] == 5


# config.json ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use", [TENSOR, LAYER])
@pytest.mark.parametrize("layers", [-1, 0, 1 << 40, 99_999, 3, True, None, "2", 2.0, [2]], ids=str)
def test_layer_counts(tiny_copy, run, layers, use):
    model = tiny_copy()
    configured(model, num_hidden_layers=layers)
    code, err = run(model, use)
    assert code == 5 and ("num_hidden_layers" in err or "layer 2" in err)


@pytest.mark.parametrize(
    ("key", "value"),
    [("hidden_size", 1 << 40), ("hidden_size", -1), ("hidden_size", 128), ("vocab_size", 1 << 40), ("vocab_size", -5), ("vocab_size", 255), ("head_dim", 0),
     ("head_dim", 1 << 30), ("intermediate_size", 1 << 40), ("intermediate_size", 64), ("num_attention_heads", 0), ("num_key_value_heads", 1 << 30),
     ("pad_token_id", 1 << 30), ("hidden_act", "os.system"), ("rope_parameters", {"rope_type": "evil"}), ("text_config", [1]), ("layer_types", ["x"])],
)  # fmt: skip
def test_values_that_do_not_fit_the_weights(tiny_copy, run, key, value):
    model = tiny_copy()
    configured(model, **{key: value})
    assert run(model, LAYER)[0] == 5


@pytest.mark.parametrize("key", ["num_local_experts", "n_routed_experts", "moe_intermediate_size"])
def test_expert_counts(tiny_copy, run, key):
    architecture = "deepseek_v3" if key == "n_routed_experts" else "qwen3_moe"
    model = tiny_copy(architecture)
    configured(model, **{key: 1 << 30})
    assert run(model, LAYER)[0] == 5


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"null", b"{", b"\xff\xfe{}", b'{"a": "' + b"x" * (11 << 20) + b'"}', b'{"a":' * 5000 + b"1" + b"}" * 5000, b"[" * 200_000,
     b'{"model_type": "llama", "model_type": "llama"}', b'"\\' * (1 << 20), b'{"' + b'\\"' * (1 << 20)],
    ids=lambda c: f"{c[:8]!r}",
)  # fmt: skip
def test_config_is_no_reasonable_json(tiny_copy, run, content):
    model = tiny_copy()
    (model / "config.json").write_bytes(content)
    assert run(model, TENSOR)[0] == 5


@pytest.mark.parametrize(
    "addition", [b'"x": NaN', b'"x": -Infinity', b'"x": 1e999', b'"x": ' + b"9" * 5000, b'"x": "\\ud800"', b'"\\uDFFF": 1'], ids=lambda a: f"{a[:12]!r}"
)
def test_config_that_could_not_be_written_again(tiny_copy, run, addition):
    model = tiny_copy()
    raw_config(model, addition)
    assert run(model, TENSOR)[0] == 5


# numbers and dtypes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use", [TENSOR, LAYER])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_weights_that_are_not_finite(tiny_copy, run, value, use):
    model = tiny_copy()
    tensors = load_file(model / "model.safetensors")
    tensors[NAME].view(-1)[-1] = float(value)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    code, err = run(model, use)
    assert code == 8 and "mlp.up_proj" in err


@pytest.mark.parametrize("change", ["declared", "undeclared", "gptq", "unhashable", "no object"])
def test_already_quantized(tiny, tiny_copy, run, tmp_path, change):
    model = tmp_path / "quantized"
    if change in ("declared", "undeclared"):
        compress(tiny(), [TENSOR], model)
    else:
        model = tiny_copy()
    said = {"undeclared": None, "gptq": {"quant_method": "gptq"}, "unhashable": {"quant_method": ["gptq"]}, "no object": 5}
    if change in said:
        configured(model, quantization_config=said[change])
    code, err = run(model, TENSOR)
    assert code == 5 and "quantiz" in err


def test_weights_that_shrink_while_they_are_read(tiny_copy, run):
    model = tiny_copy()
    path = model / "model.safetensors"
    with pytest.raises(ModelError, match="changed"):
        compress(model, [TENSOR], run.out, progress=lambda *_: os.truncate(path, 20_000))
    assert not list(run.folder.iterdir())


def test_text_needs_a_tokenizer(tiny, run):
    code, err = run(tiny(tokenizer=False), LAYER)
    assert code == 5 and "tokenizer" in err


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"[" * 100_000, b'{"model": 5}'], ids=repr)
def test_tokenizers_that_are_damaged(tiny_copy, run, content):
    model = tiny_copy()
    (model / "tokenizer.json").write_bytes(content)
    assert run(model, LAYER)[0] == 5


# recipes -------------------------------------------------------------------------------------------------------------

STEP = "steps: [{use: quant.int8_dynamic%s}]\n"
STATIC = "steps: [{use: quant.fp8_static}]\ncalibration: {data: %s, samples: %s, tokens: %s}\n"
RECIPES = {
    "tag": "steps: !!python/object/apply:os.system ['touch $CANARY']\n",
    "aliases": "a: &a [x, x]\nb: &b [*a, *a]\nsteps: [*b, *b]\n",
    "merge": STEP % "" + "<<: {seed: 1}\n",
    "duplicate key": STEP % "" + STEP % "",
    "nested deep": STEP % f", with: {{targets: {'[' * 50_000}",
    "larger than a megabyte": STEP % "" + "#" * (1 << 20),
    "two documents": STEP % "" + "---\n" + STEP % "",
    "nul": STEP % "" + "x: \0\n",
    "many steps": "steps: [" + "{use: quant.int8_dynamic}, " * 30_000 + "]\n",
    "ranges of ranges": STEP % f", targets: ['{'layers[0:1].' * 60_000}mlp']",
    "digits in a range": STEP % f", targets: ['layers[{'9' * 5000}:1]']",
    "expression that backtracks": STEP % ", targets: ['re:(.*)*(.*)*(.*)*(m|m?o?)+x']",
    "expression of parentheses": STEP % f", targets: ['re:{'(' * 900}']",
    "expression that repeats": STEP % ", targets: ['re:(?:(?:a{1,60000}){1,60000}){1,60000}']",
    "shard size of 400 digits": STEP % "" + f"export: {{max_shard: '{'9' * 400}TB'}}\n",
    "memory of 5000 digits": STEP % "" + f"runtime: {{max_ram: '{'9' * 5000}'}}\n",
    "shards of nothing": STEP % "" + "export: {max_shard: 0B}\n",
    "seed beyond 64 bits": STEP % "" + "runtime: {seed: 99999999999999999999}\n",
    "calibration for ever": STATIC % ("TEXT", 10**18, 16),
    "samples for ever": STATIC % ("TEXT", 2, 10**18),
    "samples of its own for ever": STATIC % ("self", 10**18, 10**18),
    "calibration from a device": STATIC % ("/dev/zero", 2, 16),
    "calibration from a name too long": STATIC % ("x" * 5000, 2, 16),
    "calibration from a URL": STATIC % ("https://example.com/c.jsonl", 2, 16),
    "model from a URL": STEP % "" + "model: {path: 'https://example.com/m'}\n",
    "extends a list": STEP % "" + "extends: [int8]\n",
    "extends a path": STEP % "" + "extends: ../../etc/passwd\n",
    "remote code": STEP % "" + "trust_remote_code: true\n",
    "remote code of the model": STEP % "" + "model: {trust_remote_code: true}\n",
    "interpolated": STEP % "" + "export: {max_shard: '${HOME}'}\n",
    "an attribute as a pass": "steps: [{use: quant.__class__.mro}]\n",
    "no steps": "steps: null\n",
    "nothing": "\n",
}


@pytest.mark.parametrize("case", RECIPES)
def test_recipes(tiny, run, case):
    signal.setitimer(signal.ITIMER_PROF, 30)  # ends the process; it counts our own seconds, so a busy machine is no bomb
    try:
        code, err = run(tiny(), RECIPES[case])
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    assert code == 3 and len(err) < 2000


@pytest.mark.parametrize("use", ["acme.round_to_grid", "os.system", "subprocess.run"])
def test_recipes_load_official_plugins_only(tiny, run, use):
    assert run(tiny(), f"steps: [{{use: {use}}}]\n")[0] == 4


@pytest.fixture(scope="module")
def artifact(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("artifact") / "out"
    compress(tiny(), [TENSOR], out)
    return out


GROUP = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}}


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("ledger.json", []), ("ledger.json", {"a": 1, "b": {"fate": 5}}), ("metrics.json", {"passes": 5}), ("metrics.json", {"passes": [1], "bytes_before": "a"}),
        ("plan.json", {"engines": 5}), ("provenance.json", {"plugins": {"a": 1}, "versions": [1]}), ("runtime.json", {"policies": 5}),
        ("runtime.json", {"policies": [5]}), ("runtime.json", {"policies": [{"pass": "os.system"}]}), ("SHA256SUMS", b"\xff\xfe"),
        ("SHA256SUMS", b"ab  ../../etc/passwd\nno\ncd  a\x00b\n"), ("config", 5), ("config", {"config_groups": [1]}), ("config", {"config_groups": {"a": [1]}}),
        ("config", {"config_groups": {"a": {**GROUP, "targets": 5}}}), ("config", {"config_groups": {"a": {**GROUP, "targets": ["re:("]}}}),
        ("config", {"config_groups": {"a": GROUP}, "ignore": 5}), ("config", {"config_groups": {"a": GROUP}, "ignore": [[1]]}),
    ],
    ids=repr,
)  # fmt: skip
def test_an_artifact_of_a_stranger(artifact, tmp_path, file, content):
    folder = shutil.copytree(artifact, tmp_path / "out")
    if file == "config":
        configured(folder, quantization_config={"quant_method": "compressed-tensors", **content} if isinstance(content, dict) else content)
    else:
        (folder / "angelslim" / file).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    loads = [["inspect"], ["chat", "--prompt", "a", "--max-new-tokens", "2"]]
    for command, *more in (["validate"], *(loads if file in ("config", "runtime.json") else [["report", "-o", str(tmp_path / "r.html")]])):
        try:
            code = cli._guarded([command, str(folder), *more])
        except SystemExit as ended:
            code = ended.code
        assert code in (0, 5, 8), command
