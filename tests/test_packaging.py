"""What a user installs is the tree: wheel, sdist, editable install, bare checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from tests.blocked import without

ROOT = Path(__file__).resolve().parents[1]

FUSE_A_TOY = """
import torch, fxfuse

class Toy(torch.nn.Module):
    def forward(self, q, k, cos, sin):
        return self.rotate(q, cos, sin) @ self.rotate(k, cos, sin).transpose(-1, -2)

    def rotate(self, x, cos, sin):
        half = x.shape[-1] // 2
        return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin

q, k, cos, sin = (torch.randn(shape) for shape in [(1, 4, 6, 8), (1, 4, 6, 8), (6, 8), (6, 8)])
report = fxfuse.explain(Toy(), q, k, cos, sin, compiler="eager")
assert len(report.fused) == 1, report
print(fxfuse.__file__)
"""

IMPORT_WITHOUT_TRITON = """
from fxfuse import *
import fxfuse
print(fxfuse.__file__)
"""


def run(*command: str | Path, cwd: Path, **env: str) -> str:
    """The output of a command in a clean environment; its errors, if it fails, are the test's."""
    inherited = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=inherited | env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def sources() -> Counter[str]:
    """Every module of the tree under the name it must be installed as."""
    folders = {"fxfuse": "fxfuse", "patterns": "fxfuse/patterns", "lowering": "fxfuse/lowering"}
    return Counter(
        f"{installed}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, installed in folders.items()
        for parent, _, names in os.walk(ROOT / folder, followlinks=False)
        for path in (Path(parent) / name for name in names)
        if path.suffix == ".py"
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one sdist and one wheel, built from a copy of what the tree would commit."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    for name in ["fxfuse", "patterns", "lowering", "pyproject.toml", "README.md", "LICENSE"]:
        run("cp", "-a", ROOT / name, tree, cwd=tree)
    for kind in ["--sdist", "--wheel"]:
        run(sys.executable, "-m", "build", "--no-isolation", kind, "-o", out, tree, cwd=tree)
    return out


@pytest.fixture
def new_environment(tmp_path: Path) -> Path:
    """The Python of a new virtual environment, which sees this one's packages by a .pth file."""
    venv.create(tmp_path / "venv", symlinks=True)
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    # zz: after the environment's own packages, so that a fxfuse installed here comes first.
    (site / "zz_borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return tmp_path / "venv" / "bin" / "python"


def install(python: Path, what: Path | str, *options: str) -> None:
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index"]
    run(*pip, "--ignore-installed", "--no-build-isolation", *options, what, cwd=python.parent)


def test_the_wheel_holds_the_tree(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
    assert Counter(name for name in names if name.endswith(".py")) == sources()
    assert {name.split("/")[0] for name in names} == {"fxfuse"}


def test_the_sdist_builds_the_same_wheel(built: Path, tmp_path: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.iterdir()
    build = [sys.executable, "-m", "build", "--no-isolation", "--wheel"]
    run(*build, "-o", tmp_path / "out", unpacked, cwd=tmp_path)
    (wheel,), (direct,) = (tmp_path / "out").glob("*.whl"), built.glob("*.whl")
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(direct) as other:
        assert sorted(one.namelist()) == sorted(other.namelist())


def test_an_installed_wheel_fuses(built: Path, new_environment: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    install(new_environment, wheel)
    where = run(new_environment, "-c", FUSE_A_TOY, cwd=tmp_path).strip()
    assert where.startswith(str(tmp_path / "venv"))
    ask = "import torch._dynamo as d; print(d.list_backends())"
    assert "'fxfuse'" in run(new_environment, "-c", ask, cwd=tmp_path)


def test_an_editable_install_imports_the_tree(new_environment: Path, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ["fxfuse", "patterns", "lowering", "pyproject.toml", "README.md", "LICENSE"]:
        run("cp", "-a", ROOT / name, tree, cwd=tree)
    install(new_environment, tree, "--editable")
    code = "import fxfuse.patterns, fxfuse.lowering; print(fxfuse.patterns.__file__)"
    where = Path(run(new_environment, "-c", code, cwd=tmp_path).strip())
    assert where.resolve().is_relative_to(tree / "patterns")


def test_a_bare_checkout_imports(tmp_path: Path) -> None:
    code = "import fxfuse, fxfuse.patterns, fxfuse.lowering; print(fxfuse.__file__)"
    where = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert Path(where.strip()) == ROOT / "fxfuse" / "__init__.py"


def test_it_imports_without_triton(tmp_path: Path) -> None:
    where = run(
        sys.executable,
        "-c",
        without("triton") + IMPORT_WITHOUT_TRITON,
        cwd=tmp_path,
        PYTHONPATH=str(ROOT),
    )
    assert Path(where.strip()) == ROOT / "fxfuse" / "__init__.py"
