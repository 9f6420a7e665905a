"""The model card: what it takes from a run, and that nothing in it can break it."""

import json
from functools import partial
from importlib.metadata import PackageNotFoundError

import pytest
from conftest import Corridor, make_model
from huggingface_hub import ModelCard, ModelCardData
from trl.trainer.utils import generate_model_card

from trl_epo import EPOConfig
from trl_epo.reports import RunFacts, complete_model_card
from trl_epo.saved import name_on_hub


TURN = {"text": "right", "action": "right", "observation": "You are at 1.", "reward": 0.0}
EPISODE = {
    "mode": "eval",
    "panel": "iid",
    "step": 4,
    "task": "door 3",
    "success": True,
    "return": 1.0,
    "first_observation": "You are at 0.",
    "turns": [TURN, {**TURN, "action": None, "reward": 1.0}],
}
PANEL = {"success_rate": 0.5, "success_low": 0.25, "success_high": 0.75, "return": 0.5, "turns": 3.0, "count": 12}


def entry(step: int, panel: str = "iid", **values) -> dict:
    name = f"eval_{panel}_episode/" if panel else "eval_episode/"
    return {"step": step, **{f"{name}{key}": value for key, value in {**PANEL, **values}.items()}}


def card(tmp_path, *, log=(), step=4, base=None, **facts) -> ModelCard:
    path = tmp_path / "README.md"
    generate_model_card(
        base_model=None,
        model_name="walker",
        hub_model_id=None,
        dataset_name=None,
        tags=["trl", "epo"],
        wandb_url=None,
        trackio_url=None,
        trainer_name="EPO",
    ).save(path)
    facts = {"factories": {None: Corridor}, "row": {"seed": 2}, **facts}
    args = EPOConfig(str(tmp_path), use_cpu=True, bf16=False)
    complete_model_card(path, RunFacts(args, list(log), step, list(log), base_model=base, **facts))
    return ModelCard.load(path)


def section(card: ModelCard, title: str) -> str:
    return card.text.split(f"\n## {title}\n", 1)[1].split("\n## ")[0]


def test_the_last_evaluation_of_each_set(tmp_path):
    log = [entry(2, success_rate=0.1), entry(4), entry(4, "ood", success_rate=0.0), entry(4, "")]
    text = section(card(tmp_path, log=log), "Evaluation")
    assert "after 4 optimizer steps" in text
    assert "| `iid` | 4 | 12 | 50.0% | 25.0% to 75.0% | 0.50 | 3.00 | 0.0% |" in text
    assert "| `ood` | 4 | 12 | 0.0% |" in text and "| - | 4 | 12 | 50.0% |" in text
    assert "10.0%" not in text


def test_success_that_the_environment_does_not_tell(tmp_path):
    told = {"eval_iid_episode/return": 0.25, "eval_iid_episode/count": 3, "eval_iid_episode/stop/failure": 0.5}
    text = section(card(tmp_path, log=[{"step": 1, **told}], step=1), "Evaluation")
    assert "| `iid` | 1 | 3 | - | - | 0.25 | - | 50.0% |" in text and "after 1 optimizer step." in text


def test_environments(tmp_path):
    factories = {"near": partial(Corridor, length=2), "far": lambda: Corridor(9)}
    text = section(card(tmp_path, factories=factories, num_rows=7), "Environment")
    assert "| environment `near` | `conftest.Corridor` |" in text and '| its arguments | `{"length": 2}` |' in text
    assert "| environment `far` | `test_model_card.test_environments.<locals>.<lambda>` |" in text
    assert "| rows trained on | 7 |" in text
    assert "rows trained on" not in section(card(tmp_path, row={"seed": None}, num_rows=2), "Environment")


def test_the_command_names_code_that_is_not_the_packages(tmp_path):
    settings = {"environment": "my:Env", "tasks": "trl_epo.envs.household:tasks", "action_parser": "my:parse"}
    (tmp_path / "trl_epo.json").write_text(json.dumps(settings))
    local, pushed = (card(tmp_path, repository=repository).text for repository in (None, "me/walker"))
    assert f"```bash\ntrl-epo play {tmp_path}\n```" in local
    assert "```bash\ntrl-epo play me/walker --environment my:Env --action_parser my:parse\n```" in pushed
    (tmp_path / "trl_epo.json").write_text("{")
    assert "play('me/walker', Corridor, " in card(tmp_path, repository="me/walker").text


def test_an_episode(tmp_path):
    text = section(card(tmp_path, example=EPISODE), "An episode")
    assert "Of evaluation `iid`, after 4 optimizer steps, task `door 3`: success after 2 turns, return 1." in text
    lines = ["You are at 0.", "", "> right", "You are at 1.", "", "> right"]
    assert "\n".join([*lines, "(no action was found in that) You are at 1.  [reward 1]"]) in text


def test_a_long_episode_is_bounded(tmp_path):
    turns = [{**TURN, "text": f"turn {number}", "observation": "wall " * 1000} for number in range(1000)]
    text = section(card(tmp_path, example={**EPISODE, "turns": turns}), "An episode")
    assert len(text) < 15_000
    assert "[… 988 turns left out …]" in text and "> turn 8\n" in text and "> turn 997\n" in text
    assert "> turn 9\n" not in text


def test_hostile_text_stays_in_its_place(tmp_path):
    evil = "```\n---\n## Training procedure\n### Framework versions\n- TRL: 0\n## Quick start\n\n```python\nx\n```\n\x1b[2J"
    episode = {**EPISODE, "task": "`|\n# heading", "first_observation": evil}
    plain, made = card(tmp_path), card(tmp_path, example=episode, row={"note": evil})
    assert made.data.to_dict() == plain.data.to_dict()
    assert f"````text\n{evil.replace(chr(27), chr(92) + 'x1b')}\n" in made.text
    assert made.text.count("### EPO\n") == 1 and "task `'/\\n# heading`" in made.text
    for kept in ("- trl-epo: ", "from trl_epo.play import play"):
        assert made.text.count(kept) == plain.text.count(kept) == 1
    assert made.text.index("### EPO\n") > made.text.index("````text")


def test_metadata(tmp_path):
    data = card(tmp_path, base="me/base", is_adapter=True).data
    assert (data.base_model, data.library_name, data.pipeline_tag) == ("me/base", "peft", "text-generation")
    assert "licence" not in data
    without = card(tmp_path, factories={})
    assert without.data.base_model is None and without.data.library_name == "transformers"
    assert "agent" not in without.data.tags and "## Environment" not in without.text
    assert "None" not in without.text and "time machine" in without.text


def test_a_card_that_is_no_yaml(tmp_path):
    make_model().save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("---\ntitle: a: b\n---\n")
    assert name_on_hub(str(tmp_path)) is None


def test_a_copy_that_was_not_installed(tmp_path, monkeypatch):
    def version(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr("trl_epo.reports.model_card.version", version)
    assert "\n- trl-epo\n- TRL:" in card(tmp_path).text


def test_a_long_row_is_not_shown(tmp_path):
    text = card(tmp_path, row={"seed": 3, "document": "x" * 10_000}).text
    assert "row={'seed': 3}" in text


@pytest.mark.parametrize("base, name", [("me/base", "me/base"), ("/gone/away", None), (None, None), ("gpt2", "gpt2")])
def test_what_a_folder_comes_from(tmp_path, base, name):
    assert name_on_hub(base) == name
    make_model().save_pretrained(tmp_path)
    assert name_on_hub(str(tmp_path)) is None
    ModelCard(f"---\n{ModelCardData(base_model=base)}\n---\n").save(tmp_path / "README.md")
    assert name_on_hub(str(tmp_path)) == name
