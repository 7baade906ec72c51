"""What a user gets: an import that costs nothing, and a wheel that holds everything and nothing else."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINKED = ("patches", "kernels", "recipes")


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_import_brings_neither_torch_nor_diffusers() -> None:
    heavy = run(
        "import sys, accelplug; print([m for m in ('torch', 'diffusers', 'transformers', 'triton') if m in sys.modules])"
    )
    assert heavy.strip() == "[]"


def test_listing_brings_no_torch() -> None:
    out = run(
        "import sys, accelplug; print(len(accelplug.list_patches()), len(accelplug.list_recipes()), 'torch' in sys.modules)"
    )
    patches, recipes, torch_there = out.split()
    assert int(patches) >= 3
    assert int(recipes) >= 20
    assert torch_there == "False"


def test_the_linked_folders_are_no_packages_of_their_own() -> None:
    for name in LINKED:
        assert not (ROOT / name / "__init__.py").exists(), f"{name}/__init__.py would shadow another package of that name"
        assert (ROOT / "accelplug" / name).is_symlink()
        assert (ROOT / "accelplug" / name).readlink() == Path("..") / name


@pytest.mark.parametrize(
    "arguments", [["-c", "import accelplug"], ["-m", "accelplug", "list"], ["-m", "accelplug", "doctor"]]
)
def test_a_clone_without_links_says_so_in_a_sentence(tmp_path: Path, arguments: list[str]) -> None:
    (tmp_path / "accelplug").mkdir()
    for path in (ROOT / "accelplug").glob("*.py"):
        shutil.copy2(path, tmp_path / "accelplug")
    for name in LINKED:
        (tmp_path / "accelplug" / name).write_text(f"../{name}")  # what git writes where links are off
    done = subprocess.run([sys.executable, *arguments], cwd=tmp_path, env={}, capture_output=True, text=True)
    assert done.returncode == 1
    assert arguments[0] == "-c" or len(done.stderr.splitlines()) == 1, "a command says it without a traceback"
    last = done.stderr.splitlines()[-1]
    assert "text files in place of the symbolic links kernels, patches, recipes" in last
    assert "git config core.symlinks true" in last


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel and the source distribution, built from a tree of its own: an earlier build leaves files beside a checkout."""
    tree, made = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    for name in subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, tree / name, follow_symlinks=False)
    build = [sys.executable, "-m", "build", "--wheel", "--sdist", "--no-isolation", "--outdir", str(made), str(tree)]
    subprocess.run(build, capture_output=True, text=True, check=True)
    return made


def test_an_index_would_take_the_package(built: Path) -> None:
    check = [sys.executable, "-m", "twine", "check", "--strict", *map(str, built.iterdir())]
    done = subprocess.run(check, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("PASSED") == 2


def test_the_wheel_holds_what_git_tracks(built: Path) -> None:
    tracked = subprocess.run(
        ["git", "ls-files", "accelplug", *LINKED], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    expected = {
        name if name.startswith("accelplug/") else f"accelplug/{name}"
        for name in tracked.split()
        if name not in {f"accelplug/{link}" for link in LINKED}
    }
    (wheel,) = built.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert {name.split("/")[0] for name in names} == {"accelplug"}
    assert names == expected
