"""docs/first_five_minutes.md is what the README's commands print."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.first_minutes import FILE, HEAD, NOTES, PICTURE, ROOT, VENV, commands, shown

STEPS = re.findall(r"```text\n\$ (.+?)    # \d+ s\n(.*?)```", FILE.read_text(), re.DOTALL)
TOOL = "fxfuse "


@pytest.mark.null
def test_the_readmes_commands_are_the_documents() -> None:
    assert [command for command, _ in STEPS] == commands()
    assert VENV in commands()[0] and len(commands()) == 6


@pytest.mark.null
def test_it_leads_to_a_fused_model_a_picture_and_a_refusal() -> None:
    generated, drawn, explained = (output for _, output in STEPS[-3:])
    assert "rms_norm + rope + store(k,v)" in generated and "every token is eager's" in generated
    assert drawn.startswith(PICTURE) and (FILE.parent / PICTURE).read_text().startswith("<svg")
    assert all(part in explained for part in ("refused", "wanted: ", "to do: "))


@pytest.mark.null
def test_it_names_no_folder_of_the_machine_that_wrote_it() -> None:
    text = FILE.read_text() + (FILE.parent / PICTURE).read_text()
    for path in (str(ROOT), str(Path.home()) + "/"):
        assert path not in text
    text = FILE.read_text()
    assert text.startswith(HEAD) and all(note in text for note in NOTES.values())


def without_numbers(text: str) -> list[str]:
    """Lines without times, versions and what the installed libraries number."""
    lines = [re.sub(r"[\d.]+", "0", line).rstrip() for line in text.strip().splitlines()]
    return [line for line in lines if not line.startswith("  ms:")]


@pytest.mark.cpu
@pytest.mark.long
@pytest.mark.parametrize("step", [s for s in STEPS if "02_" in s[0] or s[0].startswith("fxfuse e")])
def test_the_commands_still_print_it(step: tuple[str, str]) -> None:
    command, output = step
    program = command.replace("fxfuse ", "-m fxfuse ", 1).removeprefix("python ").split()
    done = subprocess.run([sys.executable, *program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    assert without_numbers(done.stdout) == without_numbers(output)


@pytest.mark.null
def test_a_step_hides_the_names_of_folders(tmp_path: Path) -> None:
    text = shown("fxfuse doctor", f"{tmp_path}/venv, /x/torchinductor_root", 2.4, tmp_path)
    assert "$ fxfuse doctor    # 2 s\n~/fxfuse/venv, /x/torchinductor_me\n```" in text
