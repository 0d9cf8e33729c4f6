"""A stranger's plugin: template copied, built into a wheel, installed elsewhere, run by the command line."""

import json
import os
import subprocess
import sys
import zipfile


def test_template_to_running_plugin(tiny, tmp_path):
    def angelslim(*arguments, **more):
        environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), **more}
        return subprocess.run(
            [sys.executable, "-m", "angelslim_core.cli.main", *map(str, arguments)], capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
        )

    assert angelslim("plugins", "new", "zebra").returncode == 0
    assert angelslim("plugins", "new", "quant").returncode == 2 and angelslim("plugins", "new", "zebra").returncode == 7
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path / "dist"), str(tmp_path / "angelslim-zebra")]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    listed = json.loads(angelslim("plugins", "list", "--json").stdout)["plugins"]
    assert [(p["dist"], p["official"]) for p in listed if p["id"] == "zebra"] == [("angelslim-zebra", False)]
    done = angelslim("run", "--model", tiny(), "--out", "out", "--plugins", "zebra", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["passes"][0]["id"] == "zebra.round_to_grid"
    provenance = json.loads((tmp_path / "out/angelslim/provenance.json").read_text())
    assert provenance["plugins"][0]["dist"] == "angelslim-zebra" and len(provenance["plugins"][0]["record_sha256"]) == 64
    assert angelslim("run", "--model", tiny(), "--out", "o2", "--use", "zebra.round_to_grid").returncode == 4  # not named
    assert angelslim("run", "--model", tiny(), "--out", "o2", "--plugins", "zebra", ANGELSLIM_BLOCK_PLUGINS="zebra").returncode == 4
    module = tmp_path / "site/angelslim_zebra/__init__.py"
    module.write_text(module.read_text().replace("ANGELSLIM_HOOKS = 1", "ANGELSLIM_HOOKS = 2"))
    refused = angelslim("run", "--model", tiny(), "--out", "o2", "--plugins", "zebra")
    assert refused.returncode == 4 and "hook version" in refused.stderr
