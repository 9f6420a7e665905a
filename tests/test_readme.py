"""What the README shows does run."""

import re
from pathlib import Path


README = Path(__file__).parent.parent / "README.md"


def test_the_environment_of_the_readme_passes_its_check():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    (example,) = [block for block in blocks if "check_env(" in block]
    exec(example, {})


def test_the_two_commands_are_in_the_makefile():
    makefile = (README.parent / "Makefile").read_text()
    for command in ("demo", "test"):
        assert f"make {command}" in README.read_text()
        assert f"\n{command}:" in makefile
