"""What the documentation shows: its Python runs or at least names what is there, and so do commands, paths, settings and links."""

import ast
import inspect
import io
import json
import re
import runpy
import shutil
import sys
import tomllib
from contextlib import redirect_stdout, suppress
from dataclasses import fields
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest
from test_api import public_names
from transformers import Trainer
from trl import GRPOConfig, ModelConfig, SFTConfig

from trl_epo import EPOConfig, check_env, cli
from trl_epo.cli.play import PlayArguments
from trl_epo.cli.settings import ScriptArguments
from trl_epo.cli.warm_up import WarmUpArguments
from trl_epo.runs import CheckpointError, PushError


ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.rglob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
SITE = tomllib.loads((ROOT / "zensical.toml").read_text())["project"]
FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))

# Of other programs
OTHER_FLAGS = {
    "cpu",
    "multi_gpu",
    "num_processes",
    "config_file",
    "num_machines",
    "machine_rank",
    "main_process_ip",
}  # accelerate
OTHER_FLAGS |= {"shutdown-timeout", "signal", "no-deps", "no-build-isolation"}  # torchrun, SLURM, pip
OTHER_FLAGS |= {"help-all"}
OTHER_SETTINGS = {"max_concurrent_envs"}
OTHER_NAMES = {"trl_epo.json", "trl_epo.episodes", "test_runtime", "eval_kl", "reward_std", "project_urls"}


def fences(page, *languages):
    return [text for _, language, text in FENCE.findall(page.read_text()) if language in languages]


def prose(page):
    return FENCE.sub("", page.read_text())


def code(page):
    """All that a page shows as code: blocks, indented ones too, and spans."""
    text = prose(page)
    spans = re.findall(r"(?<!`)`([^`\n]+)`", text)
    return [*fences(page, "", "bash", "python", "yaml", "text"), *re.findall(r"^    .*$", text, re.MULTILINE), *spans]


def headings(page):
    """The anchors of a page."""
    titles = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}


@by_page
def test_links(page):
    """On GitHub and PyPI as in the site, whose strict build looks at links between its pages only."""
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(SITE["repo_url"]):
            path = re.sub(r"^/(?:blob|raw|tree)/main/", "", target.removeprefix(SITE["repo_url"]))
            assert path in ("", target) or (ROOT / path.partition("#")[0]).exists(), target
        elif not target.startswith("https://"):
            assert page != ROOT / "README.md", f"{target} leads nowhere on PyPI"
            path, _, anchor = target.partition("#")
            linked = (page.parent / path).resolve() if path else page
            assert linked.exists(), target
            assert DOCS not in page.parents or DOCS in linked.parents, f"{target} is not in the site"
            assert not anchor or anchor in headings(linked), target


def test_every_page_is_in_the_navigation():
    def files(entry):
        if isinstance(entry, str):
            return [entry]
        return [file for value in (entry.values() if isinstance(entry, dict) else entry) for file in files(value)]

    assert sorted(files(SITE["nav"])) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))


def test_every_public_name_has_its_place_in_the_api_pages():
    shown = set(
        re.findall(r"^::: ([\w.]+)$", "\n".join(page.read_text() for page in (DOCS / "api").glob("*.md")), re.M)
    )
    for module, name in public_names():
        thing = getattr(import_module(module), name)
        if not isinstance(thing, str):
            assert f"{thing.__module__}.{name}" in shown, f"{module}.{name}"


def test_figures_of_the_readme_are_those_of_the_results():
    after = re.search(r"goes from\s+([\d.]+ %) to ([\d.]+ %)", (ROOT / "README.md").read_text()).groups()
    [row] = re.findall(r"^\| held-out success, new houses .*$", (DOCS / "results.md").read_text(), re.MULTILINE)
    assert tuple(re.findall(r"[\d.]+ %", row)) == after


@cache
def flags_of(script):
    """The flags that a command of `trl-epo`, or a script of this repository, says it has."""
    out = io.StringIO()
    argv, path = sys.argv, list(sys.path)
    try:
        with redirect_stdout(out), suppress(SystemExit):
            if script.endswith(".py"):
                sys.argv = [script, "--help"]
                sys.path.insert(0, str((ROOT / script).parent))
                runpy.run_path(str(ROOT / script), run_name="__main__")
            else:
                cli.main([script, "--help" if script == "view" else "--help-all"])
    finally:
        sys.argv, sys.path[:] = argv, path
    return {flag.replace("-", "_") for flag in ("--help-all", *re.findall(r"--[\w-]+", out.getvalue()))}


def commands(page):
    """What is called, and with which flags, in each command of a page."""
    for block in code(page):
        block = re.sub(r"\\\n\s*", " ", block)
        for name, value in re.findall(r'^(\w+)="(.*)"$', block, re.MULTILINE):
            block = block.replace(f"${name}", value)
        for line in block.splitlines():
            line = re.sub(r"\s#.*|: error: .*", "", line)
            for called, rest in re.findall(r"(?:trl-epo|-m trl_epo|python) ([\w/.-]+)(.*)", line):
                if called in cli.COMMANDS or called.endswith(".py"):
                    yield called, [flag.replace("-", "_") for flag in re.findall(r"(?<=\s)--[\w-]+", rest)]


@by_page
def test_flags_of_commands(page):
    for called, flags in commands(page):
        if called == "examples/openenv_server.py":
            pytest.importorskip("openenv", reason='needs pip install "trl-epo[openenv]"')
        assert set(flags) <= flags_of(called), called


def settings():
    """Names that a config file, a flag or a call may set."""
    kinds = (EPOConfig, GRPOConfig, SFTConfig, ModelConfig, ScriptArguments, PlayArguments, WarmUpArguments)
    names = {field.name for kind in kinds for field in fields(kind)}
    for module, name in public_names():
        thing = getattr(import_module(module), name)
        if callable(thing) and thing not in (CheckpointError, PushError):
            names |= set(inspect.signature(thing).parameters)
    return names | set(inspect.signature(Trainer.evaluate).parameters)


@cache
def words():
    """All names in this repository's code."""
    files = [path for folder in ("trl_epo", "examples", "tests") for path in (ROOT / folder).rglob("*.py")]
    files += [*(ROOT / "examples").rglob("*.yaml"), ROOT / "zensical.toml"]
    files.remove(Path(__file__))
    return {word for path in files for word in re.findall(r"\w+", path.read_text())} | settings()


@by_page
def test_flags_and_settings_by_themselves(page):
    known = settings()
    for block in fences(page, "yaml"):
        assert set(re.findall(r"^(\w+):", block, re.MULTILINE)) <= known
    for span in re.findall(r"(?<!`)`([^`\n]+)`", prose(page)):
        if re.fullmatch(r"[a-z]\w*=[^=\s].*", span):
            assert span.partition("=")[0] in known | OTHER_SETTINGS, span
        for flag in re.findall(r"(?:^|\s)--([A-Za-z][\w-]*)", span):
            assert flag in OTHER_FLAGS or flag.replace("-", "_") in words(), span


@by_page
def test_names_and_paths(page):
    text = "\n".join(code(page))
    for path in re.findall(r"(?<![\w/.~-])(?:examples|docs|tests|trl_epo)/[\w./*-]*[\w*/]", text):
        assert list(ROOT.glob(path)), path
    for name in set(re.findall(r"\btrl_epo(?:\.\w+)+", text)) - OTHER_NAMES:
        module, _, attribute = name.rpartition(".")
        try:
            import_module(name)
        except ModuleNotFoundError:
            assert hasattr(import_module(module), attribute), name
    for span in re.findall(r"(?<!`)`([a-z]\w*_\w+)`", prose(page)):
        assert span in words() | OTHER_NAMES, span


@by_page
def test_python_names_what_is_there(page):
    """Every block parses, imports what exists, and calls what is public with arguments that it has."""
    public = {name: getattr(import_module(module), name) for module, name in sorted(public_names())}
    for block in fences(page, "python"):
        imported = {}
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("trl_epo"):
                for alias in node.names:
                    imported[alias.name] = getattr(import_module(node.module), alias.name)
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                called = {**public, **imported}.get(node.func.id)
                given = {keyword.arg for keyword in node.keywords}
                if node.func.id == "warm_up":
                    given -= {field.name for field in fields(SFTConfig)}
                # Several modules have `tasks`: without its import it is not clear which is meant
                if callable(called) and (node.func.id in imported or node.func.id != "tasks"):
                    assert given <= set(inspect.signature(called).parameters), ast.unparse(node)


def block_with(page, text):
    [block] = [block for block in fences(DOCS / page, "python") if text in block]
    return block


def run(block, swaps, **names):
    """Run a block with some of its texts swapped; what it has defined."""
    for old, new in swaps.items():
        assert block.count(old), old
        block = block.replace(old, new)
    exec(block, names)
    return names


FEW_STEPS = "max_steps=2, report_to='none', use_cpu=True, bf16=False, disable_tqdm=True, logging_steps=1"


@pytest.fixture(scope="module")
def agent(tmp_path_factory, model_folder):
    """The agent of docs/your_environment.md, in two steps: its folder, what the block has defined, what it has printed."""
    folder = tmp_path_factory.mktemp("agent")
    swaps = {
        "HuggingFaceTB/SmolLM2-135M-Instruct": model_folder,
        "runs/guess": str(folder),
        "max_steps=30": FEW_STEPS + ", per_device_train_batch_size=8",
        "range(400)": "range(40)",
        "range(1000, 1100)": "range(1000, 1004)",
    }
    out = io.StringIO()
    with redirect_stdout(out):
        names = run(block_with("your_environment.md", "class Guess"), swaps)
    return folder, names, out.getvalue()


def test_one_script_makes_an_agent(agent):
    folder, names, out = agent
    assert re.search(r"success: \d+% → \d+%", out)
    assert names["trainer"].state.global_step == 2
    assert (folder / "adapter_model.safetensors").exists()


def test_what_is_no_gymnasium_env(agent):
    class Foreign:
        """Talks as an environment does."""

        def __init__(self):
            self.env = agent[1]["Guess"]()
            self.reset, self.step = self.env.reset, self.env.step

    wrapped = run(block_with("your_environment.md", "class Wrapped"), {}, make=Foreign)["Wrapped"]
    check_env(wrapped())


def test_a_script_for_grpo(tmp_path, model_folder, agent):
    swaps = {
        "HuggingFaceTB/SmolLM2-135M-Instruct": model_folder,
        "runs/short": str(tmp_path),
        "max_steps=20": FEW_STEPS,
    }
    swaps |= {"max_completion_length=32": "max_completion_length=8, save_strategy='no'"}
    names = run(block_with("from_grpo_trainer.md", "prompts = ["), swaps)
    assert names["trainer"].state.global_step == 2
    del swaps["runs/short"], swaps["max_completion_length=32"]
    swaps |= {"runs/guess-from-grpo": str(tmp_path / "episodes"), "max_steps=20": f"{FEW_STEPS}, save_strategy='no'"}
    known = {name: names[name] for name in ("EPOConfig", "EPOTrainer", "LoraConfig", "short")}
    names = run(
        block_with("from_grpo_trainer.md", "environment_factory=Guess"), swaps, Guess=agent[1]["Guess"], **known
    )
    logged = [entry for entry in names["trainer"].state.log_history if "episode/turns" in entry]
    assert len(logged) == 2 and all("rewards/short/mean" in entry for entry in logged)


def test_a_prompt_of_ones_own(tmp_path, agent, model_folder):
    swaps = {"EPOTrainer(..., ": f"EPOTrainer({model_folder!r}, environment_factory=Guess, "}
    swaps |= {"EPOConfig(context": f"EPOConfig({str(tmp_path)!r}, {FEW_STEPS}, context"}
    names = run(block_with("credit.md", "prompt_builder=my_prompt"), swaps, Guess=agent[1]["Guess"])
    assert names["trainer"].args.context == "window"


def test_settings_of_models_that_think():
    run(block_with("environments.md", "enable_thinking"), {}, EPOConfig=EPOConfig)


def test_text_to_an_openenv_action():
    to_action = run(block_with("openenv.md", "def to_action"), {})["to_action"]
    assert to_action("2 3") == {"row": 2, "column": 3}


def test_kept_episodes_are_read(agent, capsys):
    folder = agent[0]
    run(block_with("episodes.md", "load_dataset"), {"runs/mine": str(folder)})
    assert "Guess my number from 1 to 20." in capsys.readouterr().out
    run(block_with("episodes.md", "import pandas"), {"runs/mine": str(folder)})


def test_curves_and_pages_of_runs(agent, tmp_path, monkeypatch):
    folder, names, _ = agent
    monkeypatch.chdir(tmp_path)
    run(block_with("metrics.md", "plot_training("), {}, trainer=names["trainer"])
    for name in ("a", "b"):
        shutil.copytree(folder, tmp_path / "runs" / name)
    run(block_with("viewer.md", "write_viewer("), {})
    assert (tmp_path / "run.png").exists() and (tmp_path / "compare.html").exists()


def test_success_over_seeds(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed in (1, 2, 3):
        history = [{"step": step, "eval_iid_episode/success_rate": 0.1 * seed} for step in (5, 10, 15)]
        (tmp_path / "runs" / f"seed{seed}").mkdir(parents=True)
        (tmp_path / "runs" / f"seed{seed}" / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    names = run(block_with("metrics.md", "mean_success("), {})
    assert names["best"] == pytest.approx(names["converged"]) == pytest.approx(0.2)
