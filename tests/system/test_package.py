"""The built package: all that belongs to it is in it, also by way of an sdist, and it runs from where it was put."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from needs import need

ROOT = Path(__file__).parents[2]


def build(kind: str, source: Path, out: Path) -> Path:
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(out)],
        cwd=source,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return built


@pytest.fixture(scope="module")
def tree() -> set[str]:
    """Every file of the project that the program needs, by its place in the package."""
    listed = subprocess.run(
        [
            "git",
            "ls-files",
            "--cached",
            "--others",
            "--exclude-standard",
            "agent",
            "camera",
            "config",
            "models",
            "systemd",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    files = {f"flawline/{name}" for name in listed.stdout.splitlines() if (ROOT / name).is_file()}
    if not files:
        pytest.skip("no git checkout: nothing to hold the package against")
    return files


def test_wheel_and_sdist_hold_everything_and_the_wheel_runs(tree: set[str], tmp_path: Path) -> None:
    wheel = build("wheel", ROOT, tmp_path / "direct")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == tree | {"flawline/__init__.py", "flawline/py.typed"}
    for needed in ("agent/page/index.html", "systemd/flawline@.service", "models/worker.py", "camera/ring.py"):
        assert f"flawline/{needed}" in names
    assert not {name.split("/")[0] for name in names} - {"flawline"}, "nothing may stand beside the package"

    sdist = build("sdist", ROOT, tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "source", filter="data")
    (source,) = (tmp_path / "source").iterdir()
    for told in ("docs/verdicts.md", "examples/plc_gateway.py", "CHANGELOG.md"):  # by the README
        assert (source / told).is_file()
    with zipfile.ZipFile(build("wheel", source, tmp_path / "from_sdist")) as archive:
        assert {name for name in archive.namelist() if ".dist-info/" not in name} == names

    target = tmp_path / "installed"
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", target, wheel],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    environment = {key: value for key, value in os.environ.items() if not key.startswith("FLAWLINE_")}
    command = [sys.executable, target / "bin/flawline"]
    environment["PYTHONPATH"] = str(target)
    version = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=280, env=environment)
    assert version.stdout.startswith("flawline, version 0."), version.stderr
    # It is the installed one that answers, with its own units.
    shown = subprocess.run(
        [*command, "service", "install", "--dry-run", "--prefix", str(tmp_path / "root")],
        capture_output=True,
        text=True,
        timeout=280,
        env=environment,
        cwd=tmp_path,
    )
    assert "WatchdogSec=" in shown.stdout, shown.stderr


def small_wheel(folder: Path, name: str, more: str = "") -> Path:
    """A wheel without dependencies, with one function `main` that says the versions."""
    source = folder / name
    (source / name).mkdir(parents=True)
    (source / name / "__init__.py").write_text(f"def main():\n    print('{name}, version 9')\n")
    (source / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["hatchling"]\nbuild-backend = "hatchling.build"\n'
        f'[project]\nname = "{name}"\nversion = "9"\n{more}'
    )
    return build("wheel", source, folder / "out" / name)


@pytest.mark.slow
@pytest.mark.parametrize("extras", ["", "[camera]"])
def test_a_folder_of_wheels_installs_without_a_network(tmp_path: Path, extras: str) -> None:
    """`make wheelhouse` and install.sh with small wheels of our own, in the place of what pip would fetch."""
    need(shutil.which("make"), "make")
    with_extra = (
        '[project.optional-dependencies]\ncamera = ["cameralib"]\n[project.scripts]\nflawline = "flawline:main"\n'
    )
    wheel, library = small_wheel(tmp_path, "flawline", with_extra), small_wheel(tmp_path, "cameralib")
    venv, house = tmp_path / "venv", tmp_path / "wheelhouse"
    (venv / "bin").mkdir(parents=True)
    python = venv / "bin/python"  # stands for `python -m pip wheel --quiet --wheel-dir HOUSE .EXTRAS`
    python.write_text(f'#!/bin/sh\n[ "$7" = ".{extras}" ] && cp {wheel} {library} "$6"\n')
    python.chmod(0o755)
    (venv / ".installed").touch()
    done = subprocess.run(
        ["make", "wheelhouse", f"VENV={venv}", f"WHEELHOUSE={house}", f"EXTRAS={extras}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "requirements.txt" in (house / "SHA256SUMS").read_text()
    wheel = house / wheel.name
    install = ["sh", str(house / "install.sh"), str(tmp_path / "opt")]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"PYTHON": sys.executable}
    done = subprocess.run(install, capture_output=True, text=True, timeout=280, env=environment)
    assert done.returncode == 0, done.stderr
    assert "flawline, version 9" in done.stdout
    there = {path.name for path in (tmp_path / "opt").glob("lib/python*/site-packages/*")}
    assert ("cameralib" in there) == bool(extras)
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(tmp_path / "new.whl", "w") as new:  # the same version number
        for info in old.infolist():
            new.writestr(info, old.read(info).replace(b"version 9", b"version 9, mended"))
    (tmp_path / "new.whl").replace(wheel)
    sums = subprocess.run(["sha256sum", wheel.name], cwd=house, capture_output=True, text=True, check=True).stdout
    (house / "SHA256SUMS").write_text(sums)
    done = subprocess.run(install, capture_output=True, text=True, timeout=280, env=environment)
    assert "flawline, version 9, mended" in done.stdout, done.stderr
    wheel.write_bytes(wheel.read_bytes() + b"x")
    done = subprocess.run(install, capture_output=True, text=True, timeout=280, env=environment)
    assert done.returncode != 0
    assert wheel.name in done.stderr + done.stdout


def test_every_target_of_the_makefile_has_its_variables() -> None:
    """`make soak` and `make wheelhouse` once stood in the documentation and did nothing but fail."""
    need(shutil.which("make"), "make")
    targets = ["run", "test", "format", "chaos", "soak", "wheelhouse", "clean"]
    done = subprocess.run(
        ["make", "--dry-run", "--warn-undefined-variables", *targets],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stderr.splitlines() if "undefined variable" in line] == []
