"""The README's example runs as it stands, and stays short."""

import os
import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def example() -> str:
    blocks = re.findall(r"^```python\n(.*?)^```$", README.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    assert blocks, "the README has no ```python block"
    return blocks[0]


def test_the_example_is_at_most_fifteen_lines():
    lines = [line for line in example().splitlines() if line.strip()]
    assert len(lines) <= 15


def test_the_example_runs(tmp_path):
    # Away from the checkout, as a reader of an installed package would run it.
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", example()], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_every_command_is_in_the_table():
    from popax.cli.main import COMMANDS

    text = README.read_text(encoding="utf-8")
    assert [name for name in COMMANDS if f"| `popax {name}` |" not in text] == []
