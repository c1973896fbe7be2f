"""The command line from outside: exit codes, one line of error, no torch in the agent's process."""

import subprocess
import sys
from pathlib import Path

CLI = [sys.executable, "-c", "from flawline.agent.cli import main; main()"]


def test_check_prints_a_configuration_that_checks_again(tmp_path: Path) -> None:
    first = subprocess.run([*CLI, "run", "--check"], capture_output=True, text=True, timeout=60)
    assert first.returncode == 0
    file = tmp_path / "effective.toml"
    file.write_text(first.stdout)
    second = subprocess.run([*CLI, "run", "--check", "--config", str(file)], capture_output=True, text=True, timeout=60)
    assert second.stdout == first.stdout


def test_wrong_key_exits_2_with_one_line() -> None:
    done = subprocess.run(
        [*CLI, "run", "--check", "--set", "log.levle=info"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "did you mean 'level'" in done.stderr


def test_the_agents_modules_do_not_load_torch() -> None:
    code = "import sys; import flawline.agent.cli;sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
