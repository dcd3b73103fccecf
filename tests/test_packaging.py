"""Wheel and sdist hold everything, build from each other, and work away from the checkout."""

import importlib.metadata
import importlib.util
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PARTS = ("popax", "kernels", "configs", "pyproject.toml", "README.md", "LICENSE")
OUTSIDE = {"PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu", "HOME": "/nonexistent"}


def run(*command, cwd, **options) -> str:
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def build(source: Path, out: Path, *flags: str) -> None:
    major = int(importlib.metadata.version("setuptools").split(".")[0]) if _has("setuptools") else 0
    isolation = ("--no-isolation",) if major >= 77 else ()
    run(sys.executable, "-m", "build", *isolation, "--outdir", out, *flags, source, cwd=out.parent)


def _has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def expected_files() -> set[str]:
    """What must be in a distribution, as paths inside it."""
    code = {path for part in ("popax", "kernels", "configs") for path in (ROOT / part).rglob("*.py")}
    data = set((ROOT / "configs").rglob("*.gin")) | set((ROOT / "kernels").rglob("*.json"))
    names = {path.relative_to(ROOT).as_posix() for path in code | data}
    return {name if name.startswith("popax/") else f"popax/{name}" for name in names}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(files of the sdist, files of the wheel made from the sdist, files of the wheel made directly, that wheel)."""
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("packaging")
    source = folder / "source"
    source.mkdir()
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, source / part, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / part, source / part)
    build(source, folder / "both")  # a wheel from the sdist
    shutil.rmtree(source / "popax.egg-info", ignore_errors=True)
    build(source, folder / "direct", "--wheel")
    (sdist,) = (folder / "both").glob("*.tar.gz")
    (from_sdist,) = (folder / "both").glob("*.whl")
    (direct,) = (folder / "direct").glob("*.whl")
    with tarfile.open(sdist) as archive:
        in_sdist = {member.name.partition("/")[2]: member for member in archive.getmembers()}
    return in_sdist, _names(from_sdist), _names(direct), direct


def _names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.mark.slow
def test_sdist_and_wheel_hold_code_configs_and_tables(built):
    in_sdist, from_sdist, direct, _ = built
    expected = expected_files()
    assert {"popax/__init__.py", "popax/configs/__init__.py"} <= expected
    assert any(name.startswith("popax/kernels/") for name in expected)
    assert expected - set(in_sdist) == set()
    assert not any(member.issym() or member.islnk() for member in in_sdist.values())
    assert expected - direct == set()
    assert from_sdist == direct
    assert any(name.endswith("dist-info/licenses/LICENSE") for name in direct)
    assert {name.split("/")[0].split("-")[0] for name in direct} == {"popax"}


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """The bin folder of a fresh environment: the wheel is installed, its dependencies are borrowed from this one."""
    folder = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "env", cwd=folder)
    python = folder / "env" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", built[3], cwd=folder)
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    # A .pth entry is not itself searched for .pth files: the checkout's editable install stays out.
    borrowed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (Path(site) / "borrowed.pth").write_text("\n".join(sorted(borrowed)) + "\n")
    return python.parent


@pytest.mark.slow
def test_the_wheel_works_away_from_the_checkout(installed, tmp_path):
    kernels = sorted(path.name for path in (ROOT / "kernels").iterdir() if (path / "__init__.py").exists())
    code = "import popax, popax.configs, " + ", ".join(f"popax.kernels.{name}" for name in kernels)
    where = run(installed / "python", "-c", code + "; print(popax.__file__)", cwd=tmp_path, env=OUTSIDE).strip()
    assert where.startswith(str(installed.parent))
    shown = run(installed / "popax", "--help", cwd=tmp_path, env=OUTSIDE)
    assert "train" in shown
    assert "extract" in shown


@pytest.mark.slow
def test_the_wheel_finds_its_own_configs(installed, tmp_path):
    names = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("*.gin"))
    code = "import sys; from popax.cli.gin_door import find_gin_file; print([find_gin_file(n) for n in sys.argv[1:]])"
    found = run(installed / "python", "-c", code, *names, cwd=tmp_path, env=OUTSIDE)
    assert found.count(str(installed.parent)) == len(names)


@pytest.mark.parity
def test_transformers_imports_from_the_checkouts_root():
    """A top-level `kernels` package there would shadow the one that transformers looks for."""
    pytest.importorskip("transformers")
    code = (
        "import sys; assert sys.path[0] == ''; import transformers; from transformers import LlamaForCausalLM; print(1)"
    )
    assert run(sys.executable, "-c", code, cwd=ROOT).strip() == "1"
