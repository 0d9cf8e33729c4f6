"""The report: what it draws, and that records it did not expect do no harm."""

import json
import shutil
from types import SimpleNamespace

import pytest

from angelslim_core import PluginHost, TensorPass, compress, hookimpl
from angelslim_core.errors import ModelError
from angelslim_core.report import write_report

HOSTILE = "<script>alert(1)</script> $x_{"


class Found(TensorPass):
    """Leaves weights as they are and finds a curve."""

    id = "toy.found"

    def apply(self, weights, context):
        return weights

    def findings(self, linears):
        return {"spent": 4.5, "curves": [{"title": HOSTILE, "x": "bits", "y": "KL", "points": [[2, 1.0], [4, 0.1]], "mark": [4, 0.1]}]}


@hookimpl
def angelslim_register_passes():
    return [Found]


def page_of(folders, tmp_path, **options):
    write_report(folders, tmp_path / "r.html", **options)
    page = (tmp_path / "r.html").read_text()
    assert "<script" not in page and "default-src 'none'" in page
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org", "")
    return page


def test_curves_that_a_pass_found_are_drawn(tiny, tmp_path):
    host = PluginHost()
    host.register_module("toy", SimpleNamespace(__name__="toy", ANGELSLIM_HOOKS=1, angelslim_register_passes=angelslim_register_passes))
    compress(tiny(), ["toy.found"], tmp_path / "out", plugins=["toy"], host=host)
    page = page_of([tmp_path / "out"], tmp_path)
    assert "<svg" in page and "spent 4.5" in page and "[2, 1.0]" not in page


@pytest.fixture(scope="module")
def mixture(tiny, tmp_path_factory):
    """A calibrated model with experts; read it only."""
    folder = tmp_path_factory.mktemp("mixture")
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 40)
    recipe = {
        "steps": [{"use": "quant.fp8_static", "targets": ["layers[0:1]"]}, {"use": "quant.gptq", "with": {"group_size": 32}, "targets": ["layers[1:]"]}],
        "calibration": {"data": str(folder / "text.txt"), "samples": 4, "tokens": 24},
    }
    compress(tiny("qwen3_moe"), out=folder / "out", recipe=recipe)
    return folder / "out"


def test_everything_recorded_is_drawn(mixture, tiny, tmp_path):
    page = page_of([mixture], tmp_path)
    for title in ("Error", "Bits", "Scales", "Weights", "Inputs", "Outliers of inputs", "Experts", "Linears with the largest error"):
        assert f"<h3>{title}</h3>" in page, title
    assert page.count("<svg") == 7 and "bits a weight</th>" in page and ">q+k+v<" in page and ">expert_down<" in page
    assert page == page_of([mixture], tmp_path)
    compress(tiny(), ["quant.int8_dynamic"], tmp_path / "int8")
    page = page_of([tmp_path / "int8", mixture], tmp_path)
    assert page.count("<svg") == 1 + 4 + 7 and page.count("<h3>Experts</h3>") == 1


def test_folders_of_older_runs_lack_most(mixture, tmp_path):
    old = shutil.copytree(mixture, tmp_path / "old")
    (old / "angelslim/analysis.json").unlink()
    page = page_of([old], tmp_path)
    assert page.count("<svg") == 1 and "<h3>Error</h3>" in page and "gate_proj" in page and "bits a weight</th>" not in page


def test_hostile_records_do_no_harm(mixture, tmp_path):
    folder = shutil.copytree(mixture, tmp_path / "hostile")
    path = folder / "angelslim/analysis.json"
    analysis = json.loads(path.read_text())
    entry = next(iter(analysis["linears"].values()))
    analysis["linears"][HOSTILE] = {**entry, "role": HOSTILE, "sqnr_db": -5.0}
    path.write_text(json.dumps(analysis))
    assert "&lt;script&gt;" in page_of([folder], tmp_path)
    for change in (
        {"linears": [1]},
        {"linears": {"x": {**entry, "layer": 10**9}}},
        {"histograms": {"q": {"0": {"first": -(10**9), "counts": [1]}}}},
        {"inputs": {"0": {"q": {}}}},
        {"experts": {"0": "many"}},
    ):
        path.write_text(json.dumps({**analysis, **change}))
        with pytest.raises(ModelError):
            write_report([folder], tmp_path / "r.html")
