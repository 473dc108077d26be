"""What is printed where an extra is missing installs it, and into the Python that printed it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from tinygpt.errors import extras

ROOT = Path(__file__).parents[1]
FOR_USERS = ("offline", "plots", "serve", "gguf", "web", "parquet", "zstd", "hub", "mpi")
OTHER_PIP = "#!/bin/sh\necho 'No matching distribution found' >&2\nexit 1\n"


def fake_wheel(folder: Path, requirement: str) -> None:
    """A wheel of no content that satisfies a requirement such as ``gguf>=0.19``."""
    name = re.split(r"[^\w.-]", requirement, maxsplit=1)[0].replace("-", "_")
    found = re.search(r"[=>]=([\d.]+)", requirement)
    version = found.group(1).rstrip(".") if found else "1"
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment that has pip and nothing else."""
    folder = tmp_path_factory.mktemp("fresh") / "an environment"
    venv.create(folder, with_pip=True)
    return folder


@pytest.fixture
def offline(tmp_path: Path) -> dict[str, str]:
    """Surroundings in which another pip is first on PATH, and no index can be asked."""
    wheels, others = tmp_path / "wheels", tmp_path / "others"
    wheels.mkdir()
    others.mkdir()
    for name in ("pip", "pip3", "python", "python3"):
        (others / name).write_text(OTHER_PIP)
        (others / name).chmod(0o755)
    return {
        "PATH": f"{others}:/usr/bin:/bin",
        "HOME": str(tmp_path),
        "PYTHONPATH": str(ROOT / "src"),
        "TINYGPT_CACHE": str(tmp_path / "cache"),
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(wheels),
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }


def test_the_printed_cures_install_into_the_python_that_printed_them(
    fresh: Path, offline: dict[str, str]
) -> None:
    """From a clone that was never installed, in which all packages are missing."""
    wanted = {requirement for name in FOR_USERS for requirement in extras.requirements(name)}
    for requirement in wanted:
        fake_wheel(Path(offline["PIP_FIND_LINKS"]), requirement)
    python = fresh / "bin" / "python"
    code = (
        "import sys; from tinygpt.errors.extras import cure; [print(cure(e)) for e in sys.argv[1:]]"
    )
    told = subprocess.run(
        [python, "-c", code, *FOR_USERS], env=offline, capture_output=True, text=True, check=True
    )
    cures = told.stdout.splitlines()
    assert len(cures) == len(FOR_USERS) and not any("tinygpt" in cure for cure in cures)
    done = subprocess.run(
        ["sh", "-ec", "\n".join(cures)], env=offline, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    listed = [python, "-m", "pip", "list", "--format=freeze"]
    installed = subprocess.run(listed, env=offline, capture_output=True, text=True, check=True)
    found = {line.partition("==")[0].replace("-", "_") for line in installed.stdout.splitlines()}
    assert {pair(requirement)[0] for requirement in wanted} <= found


def test_what_an_extra_consists_of_is_what_pyproject_says(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {name: extras.requirements(name) for name in extras.names()}
    core = extras.requirements(None)
    assert "ziglang>=0.17" in installed["offline"] and "tinygrad==0.14.*" in core

    def absent(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    from importlib import metadata

    monkeypatch.setattr(metadata, "distribution", absent)
    assert set(extras.names()) == set(installed)
    # the metadata have an order of their own, of the packages and of their bounds
    assert set(map(pair, extras.requirements(None))) == set(map(pair, core))
    for name in FOR_USERS:
        assert set(map(pair, extras.requirements(name))) == set(map(pair, installed[name]))


def pair(requirement: str) -> tuple[str, frozenset[str]]:
    name, bounds = re.fullmatch(r"([\w.-]+)(.*)", requirement).groups()  # type: ignore[union-attr]
    return name.replace("-", "_"), frozenset(bounds.split(","))


def test_an_environment_of_uv_is_served_by_uv(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "uv").write_text("#!/bin/sh\n")
    (tmp_path / "uv").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    told = extras.install_command("ziglang>=0.17")
    assert told == f"{tmp_path}/uv pip install --python {sys.executable} 'ziglang>=0.17'"


def test_without_any_metadata_there_is_still_something_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(extras, "_declared", lambda: {}["metadata"])
    assert "pyproject.toml" in extras.cure("plots")


def test_nothing_sends_anybody_to_an_index_for_tinygpt() -> None:
    """None has it, and whoever registered the name would be installed."""
    documents = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
    for path in [*(ROOT / "src").rglob("*.py"), *documents]:
        told = re.search(r"pip install[^\n]*\btinygpt", path.read_text(encoding="utf-8"))
        assert not told, (path, told)
        for line in re.findall(r"pip install .*'\.\[(.+?)\]'", path.read_text(encoding="utf-8")):
            assert set(line.split(",")) <= set(extras.names()), path


# The distribution ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an sdist, and with the wheel that is built from it."""
    pytest.importorskip("hatchling", reason="the build backend is not installed")
    folder = tmp_path_factory.mktemp("dist")
    source = folder / "source"
    unwanted = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*_cache", ".hypothesis")
    own_runs = {str(ROOT): {"runs"}}  # src/tinygpt/runs is ours
    shutil.copytree(
        ROOT, source, ignore=lambda at, names: unwanted(at, names) | own_runs.get(at, set())
    )
    build = [sys.executable, "-m", "hatchling", "build", "-d", str(folder), "-t"]
    subprocess.run([*build, "sdist"], cwd=source, check=True, capture_output=True, timeout=120)
    [archive] = folder.glob("*.tar.gz")
    shutil.unpack_archive(archive, folder / "unpacked", filter="data")
    [unpacked] = (folder / "unpacked").iterdir()
    subprocess.run([*build, "wheel"], cwd=unpacked, check=True, capture_output=True, timeout=120)
    return folder


def test_the_distribution_can_be_published(built: Path) -> None:
    pytest.importorskip("twine", reason="twine is not installed")
    files = [*built.glob("*.whl"), *built.glob("*.tar.gz")]
    assert len(files) == 2
    check = [sys.executable, "-m", "twine", "check", "--strict", *map(str, files)]
    done = subprocess.run(check, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_wheel_of_the_sdist_is_whole_and_starts(built: Path, fresh: Path) -> None:
    [wheel] = built.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    tracked = {str(p.relative_to(ROOT / "src")) for p in (ROOT / "src").rglob("*") if p.is_file()}
    assert {name for name in tracked if "__pycache__" not in name} <= names
    assert not [name for name in names if name.startswith(("tests", "scripts"))]

    install = [fresh / "bin" / "python", "-m", "pip", "install", "-qq", "--no-deps", "--no-index"]
    subprocess.run([*install, wheel], check=True, timeout=120)
    packages = Path(sysconfig.get_paths(vars={"base": str(fresh)})["purelib"])
    dependencies = {str(Path(p).resolve()) for p in sys.path if p.endswith("site-packages")}
    (packages / "others.pth").write_text("\n".join(sorted(dependencies)) + "\n")
    code = "import gpt, minimiggy, tinygpt; print(tinygpt.__file__); gpt.GPTConfig; minimiggy.GPT"
    where = subprocess.run(
        [fresh / "bin" / "python", "-Pc", code], capture_output=True, text=True, check=True
    )
    assert str(fresh.resolve()) in str(Path(where.stdout.strip()).resolve())
    for program in ("tinygpt", "minimiggy"):
        said = subprocess.run(
            [fresh / "bin" / program, "--version"], capture_output=True, text=True, check=True
        )
        assert re.search(r"\d+\.\d+", said.stdout)
