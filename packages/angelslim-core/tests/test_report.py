"""The report: what it draws, and that records it did not expect do no harm."""

from types import SimpleNamespace

from angelslim_core import PluginHost, TensorPass, compress, hookimpl
from angelslim_core.report import write_report

HOSTILE = "<script>alert(1)</script> $x_{"


class Found(TensorPass):
    """Leaves weights as they are and finds a curve."""

    id = "toy.found"

    def apply(self, weights, context):
        return weights

    def findings(self):
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
    assert "<svg" in page and "spent 4.5" in page and "points" not in page
