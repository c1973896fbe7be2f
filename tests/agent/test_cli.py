"""The command line from outside: exit codes, one line of error, no torch in the agent's process."""

import subprocess
import sys
from pathlib import Path

import pytest

from flawline.agent.cli import main
from flawline.camera.registry import BACKENDS

CLI = [sys.executable, "-c", "from flawline.agent.cli import main; main()"]


def test_check_prints_a_configuration_that_checks_again(tmp_path: Path) -> None:
    first = subprocess.run([*CLI, "run", "--check"], capture_output=True, text=True, timeout=120)
    assert first.returncode == 0
    file = tmp_path / "effective.toml"
    file.write_text(first.stdout)
    second = subprocess.run(
        [*CLI, "run", "--check", "--config", str(file)], capture_output=True, text=True, timeout=120
    )
    assert second.stdout == first.stdout


@pytest.mark.parametrize(
    ("table", "named"),
    [
        ('backend = "folder"', "needs `path`"),
        ('backend = "folder"\npath = "nowhere"', "is not a folder"),
        ('backend = "folder"\npath = "pictures"\nserial = "1"', "does not use 'serial'"),
        ('backend = "simulated"\n[cameras.simulated]\nfamily = "nosuch"', "'nosuch'"),
        ('backend = "folder"\npath = "pictures"\n[recipes.default]\nmemory = "none.safetensors"', "none.safetensors"),
    ],
)
def test_a_check_refuses_what_a_start_would_refuse(
    table: str, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(b"not looked at")
    file = tmp_path / "line.toml"
    file.write_text(f'[[cameras]]\nname = "top"\n{table}\n')
    monkeypatch.setattr(sys, "argv", ["flawline", "run", "--check", "--config", str(file)])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    assert (ended.value.code, said.out) == (2, "")
    assert named in said.err
    assert said.err.count("\n") == 1


def test_a_check_tells_of_a_bundle_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder is refused; of a name it warns, for the service may have other bundles than who checks."""
    file = tmp_path / "line.toml"
    for bundle, code in (("nosuch", 0), ("nosuch/folder", 2), ("mine", 2), ("demo", 0)):
        file.write_text(f'[model]\nbundle = "{bundle}"\n')
        (tmp_path / "mine").mkdir(exist_ok=True)
        (tmp_path / "mine" / "bundle.toml").write_text("")  # beside the file, so it is a folder without a slash
        monkeypatch.setattr(sys, "argv", ["flawline", "run", "--check", "--config", str(file)])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        assert (ended.value.code or 0, bundle in said.err) == (code, bundle != "demo"), said.err
        assert (str(tmp_path / "mine") in said.err) == (bundle == "mine")


def test_a_check_goes_on_without_a_cameras_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(BACKENDS, "pylon", ("no_such_library", "Camera"))
    file = tmp_path / "line.toml"
    file.write_text('[[cameras]]\nname = "top"\nbackend = "pylon"\n')
    monkeypatch.setattr(sys, "argv", ["flawline", "run", "--check", "--config", str(file)])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    assert ended.value.code in (None, 0)
    assert 'backend = "pylon"' in said.out
    assert "flawline[pylon]" in said.err


def test_wrong_key_exits_2_with_one_line() -> None:
    done = subprocess.run(
        [*CLI, "run", "--check", "--set", "log.levle=info"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "did you mean 'level'" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["rnu"], "'rnu'"),
        (["run", "--frmaes", "3"], "--frmaes"),
        (["run", "--frames", "many"], "--frames"),
        (["subscribe", "--count", "0"], "--count"),
        (["inspect"], "PATH"),
        (["replay"], "--from-seq"),
        (["models", "info"], "'"),
        (["bench", "--precision", "fp8"], "--precision"),
        (["bench", "--device", "foo"], "'foo'"),
        (["bench", "--device", "cuda:x"], "'cuda:x'"),
        (["bench", "--device", "mps"], "'mps'"),
        (["bench", "--device", "cuda:99"], "'cuda:99'"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(
    arguments: list[str], named: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["flawline", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    assert (ended.value.code, said.out) == (2, "")
    assert said.err.count("\n") == 1, said.err
    assert said.err.startswith("flawline: ")
    assert named in said.err


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["run", "--help"]])
def test_what_was_asked_for_goes_to_stdout(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["flawline", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    assert (ended.value.code or 0, said.err) == (0, "")
    assert said.out.startswith(("flawline, version", "Usage: flawline "))


def test_a_reader_that_has_had_enough_sees_no_traceback() -> None:
    with subprocess.Popen([*CLI, "run", "--check"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == b""
        assert process.wait(120) == 1


def test_the_agents_modules_do_not_load_torch() -> None:
    code = "import sys; import flawline.agent.cli;sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
