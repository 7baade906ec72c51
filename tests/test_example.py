"""The example of a patch in a package of its own: installed as anybody would, its tests pass."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_example_package_is_found_once_installed_and_obeys_the_laws(tmp_path: Path) -> None:
    source, site = shutil.copytree(ROOT / "examples" / "accelplug-example-patch", tmp_path / "source"), tmp_path / "site"
    offline = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", *offline, "--target", str(site), str(source)]
    subprocess.run(pip, check=True, cwd=tmp_path)
    tests = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(source / "tests")]
    paths = os.pathsep.join([str(site), str(ROOT)])
    done = subprocess.run(
        tests, cwd=tmp_path, env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{44 + 1} passed" in done.stdout
