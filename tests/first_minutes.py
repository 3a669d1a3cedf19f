"""docs/first_five_minutes.md: what the README's first commands print, in an environment made anew.

    python -m tests.first_minutes    # writes it, and the picture; pip fetches torch, transformers

In: the commands of the README's section. Out: each with its stdout and how long it took.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILE = ROOT / "docs" / "first_five_minutes.md"
PICTURE = "qwen3.svg"
SECTION = "## First five minutes"
VENV = ". venv/bin/activate"
HEAD = """# First five minutes

What the README's commands print in a fresh checkout, one after the other, without a GPU. Written by
`python -m tests.first_minutes`, which leaves out stderr and shortens the names of folders.
"""
# What the reader should see in the output of a command that starts so.
NOTES = {
    "pip": "The newest torch that fxfuse allows, and transformers.",
    "fxfuse doctor": "The loops are right; the other providers are for GPUs.",
    "python examples": "One op has the norms of q and k, the rotation and both cache writes.",
    "fxfuse draw": f"![attention before and after]({PICTURE})",
    "fxfuse explain": """A refusal: what was found at which line of the model, what was wanted, and
what to do. Norm and rotation in front of it are fused all the same.""",
}


def commands() -> list[str]:
    """The commands of the README's section, without their comments."""
    text = (ROOT / "README.md").read_text().partition(SECTION)[2].partition("\n## ")[0]
    lines = re.findall(r"^    (.+)$", text.partition("A tour")[0], re.MULTILINE)
    return [line.partition("  #")[0].strip() for line in lines]


def transcript(checkout: Path) -> Iterator[str]:
    """Each command with its output, run in a checkout."""
    own = ("PYTHON", "TORCH", "TRANSFORMERS", "HF_", "OMP_")
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(own)}
    temporary = checkout.parent / "tmp"
    temporary.mkdir()
    for command in commands():
        line = command if VENV in command else f"{VENV} && {command}"
        started = time.perf_counter()
        done = subprocess.run(
            ["bash", "-c", line],
            cwd=checkout,
            env=inherited | {"TMPDIR": str(temporary)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        yield shown(command, done.stdout, time.perf_counter() - started, checkout)


def shown(command: str, output: str, seconds: float, checkout: Path) -> str:
    """One step of the transcript."""
    if command.startswith("pip"):
        output = "\n".join(x for x in output.splitlines() if x.startswith("Successfully"))
        output = " ".join(re.findall(r"(?:fxfuse|torch|triton|transformers)-[\d.]+\d", output))
        output = f"Successfully installed ... {output}"
    for path, name in ((checkout, "~/fxfuse"), (checkout.parent / "tmp", "/tmp")):
        output = output.replace(str(path), name)
    output = re.sub(r"torchinductor_\w+", "torchinductor_me", output)
    note = next((text for start, text in NOTES.items() if command.startswith(start)), "")
    told = f"$ {command}    # {seconds:.0f} s\n{output}".rstrip()
    return f"\n```text\n{told}\n```\n" + (f"\n{note}\n" if note else "")


def write() -> None:
    with tempfile.TemporaryDirectory() as folder:
        checkout = Path(folder) / "fxfuse"
        subprocess.run(["git", "clone", "--quiet", ROOT, checkout], check=True)
        FILE.write_text(HEAD + "".join(transcript(checkout)))
        shutil.copy(checkout / PICTURE, FILE.parent / PICTURE)


if __name__ == "__main__":
    write()
