"""The command line: lean start, exit codes, one JSON document, errors of one line."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from angelslim_core.cli import main as cli
from angelslim_core.plugins import PluginHost


def call(capsys, *arguments):
    """(exit code, stdout, stderr) of the command, run in this process."""
    capsys.readouterr()
    try:
        code = cli._guarded(list(map(str, arguments)))
    except SystemExit as ended:
        code = ended.code
    captured = capsys.readouterr()
    return code or 0, captured.out, captured.err


def document(capsys, *arguments):
    code, out, _ = call(capsys, *arguments, "--json")
    found = json.loads(out)
    assert found["schema_version"] == 1
    return code, found


@pytest.mark.parametrize("arguments", [["--help"], ["plugins", "list"], ["--version"], ["run", "--help"]])
def test_lean_start(arguments):
    done = subprocess.run([sys.executable, "-X", "importtime", "-m", "angelslim_core.cli.main", *arguments], capture_output=True, text=True, check=True)
    imported = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert not imported & {"torch", "transformers", "pydantic", "angelslim_quant", "angelslim_specdec"}
    assert done.stdout


def test_unknown_commands_and_options(capsys):
    code, _, err = call(capsys, "rum")
    assert code == 2 and "Did you mean 'run'" in err
    assert call(capsys, "run", "--no-such")[0] == 2
    code, found = document(capsys, "run", "--no-such")
    assert code == 2 and found["error"]["code"] == "AS-USE-000"


def test_nothing_to_do(capsys, tiny, tmp_path):
    assert call(capsys, "run", "--model", tiny(), "--out", tmp_path / "o")[0] == 2
    assert call(capsys, "run", "--use", "quant.int8_dynamic")[0] == 2
    assert call(capsys, "run", "--model", tiny(), "--use", "quant.int8_dynamic")[0] == 2  # no --out
    assert call(capsys, "run", "--model", tiny(), "--out", tmp_path / "o", "--plugins", "mmprune")[0] == 3  # it has no media
    assert call(capsys, "run", "--model", tiny(), "--out", tmp_path / "o", "--plugins", "distill")[0] == 3  # it needs a teacher


def test_errors_are_one_line_and_a_hint(capsys, tiny, tmp_path):
    code, out, err = call(capsys, "run", "--model", tiny(), "--out", tmp_path / "o", "--use", "quant.int8_dinamic")
    first, second = err.strip().splitlines()
    assert code == 3 and not out and first.startswith("error[AS-RCP-060]") and "int8_dynamic" in second
    code, found = document(capsys, "run", "--model", tmp_path / "none", "--out", tmp_path / "o", "--use", "quant.int8_dynamic")
    assert code == 5 and found["error"].keys() == {"code", "where", "what", "hint"}


def test_progress_off_a_terminal_may_have_nothing_done_yet(capsys, monkeypatch):
    from angelslim_core.cli import common

    clock = iter([0, 11, 22])
    monkeypatch.delenv("ANGELSLIM_QUIET", raising=False)
    monkeypatch.setattr(common, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    with common.progress("working") as report:
        report(0, 4, "none yet")
        report(2, 4, "half")
    assert capsys.readouterr().err.splitlines() == ["working: 0/4, none yet", "working: 2/4, 22 s left, half"]


def test_a_bug_is_told_apart(capsys, monkeypatch):
    from angelslim_core import plugins

    def explode():
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(plugins, "installed", explode)
    code, out, err = call(capsys, "plugins", "list")
    assert code == 1 and "AS-BUG-000" in err and "Traceback" not in err and not out


def test_a_run_tells_the_most_memory_of_the_machine_and_of_a_gpu(capsys, monkeypatch, tiny, tmp_path):
    from angelslim_core import pipeline, stream

    monkeypatch.setattr(stream, "peaks", lambda: (3 * 10**9, 5 * 10**9))
    monkeypatch.setattr(pipeline, "peaks", lambda: (4 * 10**9, 2 * 10**9))
    asked = ("run", "--model", tiny(), "--plugins", "quant", "--out")
    found = document(capsys, *asked, tmp_path / "a")[1]
    assert (found["peak_ram_bytes"], found["peak_gpu_bytes"]) == (4 * 10**9, 5 * 10**9)
    assert "peak memory 4.0 GB and 5.0 GB of the GPU" in call(capsys, *asked, tmp_path / "b")[1]


def test_run_eval_inspect_validate_report_chat(capsys, tiny, tmp_path):
    out, text = tmp_path / "out", tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 30)
    code, found = document(capsys, "run", "--model", tiny(), "--out", out, "--plugins", "quant")
    assert code == 0 and found["passes"][0]["id"] == "quant.int8_dynamic" and found["fallbacks"] == 0 and found["resumed_layers"] == 0
    assert {"path", "passes", "bytes_before", "bytes_after", "warnings", "peak_ram_bytes", "peak_gpu_bytes", "seconds"} <= found.keys()
    code, found = document(capsys, "eval", out, "--base", tiny(), "--text", text, "--windows", 4, "--length", 32)
    assert code == 0 and 0 <= found["kl"] < 0.1 and found["tokens"] == 4 * 31
    code, found = document(capsys, "inspect", out)
    assert code == 0 and found["quantization"] == "compressed-tensors" and found["layers"] == 2
    assert found["safety"] == {"pickle": False, "remote_code": False, "python_files": []}
    code, found = document(capsys, "validate", out, "--base", tiny(), "--run")
    assert code == 0 and found["ok"] and len(found["linears"]) == 14 and found["sample"] is not None
    code, _, _ = call(capsys, "report", out, "-o", tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert code == 0 and "quant.int8_dynamic" in page and "<svg" in page and "<script" not in page and "default-src 'none'" in page
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org", "")
    code, answer, _ = call(capsys, "chat", out, "--prompt", "hi", "--max-new-tokens", 4)
    assert code == 0 and answer.endswith("\n")
    assert call(capsys, "run", "--model", tiny(), "--out", out, "--plugins", "quant")[0] == 7


def test_a_damaged_output_does_not_validate(capsys, tiny, tmp_path):
    out = tmp_path / "out"
    assert call(capsys, "run", "--model", tiny(), "--out", out, "--plugins", "quant")[0] == 0
    weights = out / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 0x40
    weights.write_bytes(data)
    code, found = document(capsys, "validate", out)
    assert code == 8 and not found["ok"] and "SHA256SUMS" in found["problems"][0]


def test_dry_run_writes_nothing(capsys, tiny, tmp_path):
    code, found = document(capsys, "run", "--model", tiny(), "--out", tmp_path / "o", "--use", "quant.fp8_block", "--dry-run")
    assert code == 0 and found["plan"][0]["tensors"] == 14 and not list(tmp_path.iterdir())
    assert set(found["engines"]) == {"vllm", "sglang", "transformers", "llama.cpp"} and not found["engines"]["vllm"]["ok"]
    assert found["problems"] == [] and found["bytes_after"] > 0 and found["peak_ram_bytes"] > 0
    code, text, _ = call(capsys, "run", "--model", tiny(), "--use", "quant.int8_dynamic", "--dry-run")
    assert code == 0 and "14 int8 dynamic" in text


def test_recipe_commands(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = call(capsys, "recipe", "schema")
    assert code == 0 and json.loads(out)["type"] == "object" and "quant.int4_rtn" in out
    assert call(capsys, "recipe", "init", "mine")[0] == 0
    assert call(capsys, "recipe", "check", "mine.yaml")[0] == 0
    assert call(capsys, "recipe", "init", "mine")[0] == 7
    assert call(capsys, "recipe", "init", "../mine")[0] == 2
    (tmp_path / "bad.yaml").write_text("version: 1\nmodel: {path: ./m}\nsteps:\n  - use: quant.int4_rtn\n    with:\n      bits: 99\n")
    code, _, err = call(capsys, "recipe", "check", "bad.yaml")
    assert code == 3 and "bad.yaml:6" in err
    code, found = document(capsys, "recipe", "list")
    assert {"int8", "int4"} <= {r["name"] for r in found["recipes"]}


def test_lists(capsys):
    code, found = document(capsys, "plugins", "list")
    assert code == 0 and {p["id"] for p in found["plugins"]} >= {"quant", "specdec"} and all(p["official"] for p in found["plugins"] if p["id"] == "quant")
    code, found = document(capsys, "passes", "list", "--plugins", "quant")
    assert {p["id"] for p in found["passes"]} >= {"quant.int8_dynamic"} and all(p["options"]["type"] == "object" for p in found["passes"])
    code, found = document(capsys, "kernels", "list")
    wanted = {"quant.round_columns", "quant.search_blocks", "quant.search_range", "quant.quantize_groups", "quant.quantize_fp8"}
    assert code == 0 and {k["op"] for k in found["kernels"]} >= wanted


def test_a_plugin_without_commands_says_so(capsys, monkeypatch):
    monkeypatch.setattr(PluginHost, "add_commands", lambda *_: False)
    code, _, err = call(capsys, "distill", "anything")
    assert code == 4 and "adds no commands" in err
