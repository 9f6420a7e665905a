"""
A stranger takes a model from the Hub by its name alone: a process pushes, another one with an empty cache reads the card,
runs what it says and plays. The Hub is one on the loopback address.
"""

import faulthandler
import json
import re
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch
from conftest import Corridor, make_model, make_tokenizer
from datasets import Dataset
from faulty_runs import SETTINGS, say
from hub_server import Hub, Repository
from huggingface_hub import ModelCard
from peft import LoraConfig
from safetensors.torch import load_file

from trl_epo import EPOConfig, EPOTrainer, cli


BASE = "someone/base"
SMALL = {**SETTINGS, "max_steps": 1, "push_to_hub": True, "hub_private_repo": True}


def flags(**settings) -> list[str]:
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


def push(folder: Path) -> None:
    """A full model and an adapter from the command line, and an adapter in Python; the weights are left in files."""
    household = {
        **SMALL,
        "environment": "household",
        "environment_kwargs": '{"rooms": 2}',
        "tasks_kwargs": '{"rooms": 2}',
        "train_size": 4,
        "eval_size": 3,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "model_name_or_path": BASE,
    }
    cli.main(["train", *flags(**household, output_dir=folder / "full")])
    lora = {"use_peft": True, "lora_r": 2, "lora_target_modules": "all-linear"}
    cli.main(["train", *flags(**household | lora, output_dir=folder / "lora")])

    # Its tokenizer is not that of the base model
    tokenizer = make_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant\n", "assistant\nI say ")
    trainer = EPOTrainer(
        BASE,
        args=EPOConfig(str(folder / "python"), **SMALL),
        train_dataset=Dataset.from_dict({"length": [3, 3], "seed": [2, 3]}),
        processing_class=tokenizer,
        environment_factory=Corridor,
        peft_config=LoraConfig(r=2, target_modules=["q_proj"]),
    )
    trainer.train()
    trainer.push_to_hub(dataset_name="someone/rows")


def blocks(card: str, kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", card, re.DOTALL)


def output_of(run, *arguments) -> str:
    """What a call prints; of one that ends the process also its exit status."""
    out = StringIO()
    with redirect_stdout(out), redirect_stderr(out):
        try:
            run(*arguments)
        except SystemExit as end:
            out.write(f"exit {end.code}")
    return out.getvalue()


def use(folder: Path) -> None:
    """Do what the cards say, and what they do not say."""
    told = {}
    for name in ("full", "lora", "python"):
        ModelCard.load(f"someone/{name}").validate()
        text = ModelCard.load(f"someone/{name}").text
        loaded: dict = {}
        exec(next(block for block in blocks(text, "python") if "tokenizer =" in block), loaded)
        torch.save(loaded["model"].state_dict(), folder / f"{name}.pt")
        told[name] = {"template": loaded["tokenizer"].chat_template}
        if commands := blocks(text, "bash"):
            told[name]["played"] = output_of(cli.main, commands[0].split()[1:])
        else:
            told[name]["played"] = output_of(exec, blocks(text, "python")[0], {})
    told["evaluated"] = output_of(
        cli.main,
        [
            "evaluate",
            *flags(
                **{**SETTINGS, "environment": "household", "model_name_or_path": "someone/lora", "eval_size": 1},
                output_dir=folder / "evaluated",
            ),
        ],
    )
    for name in ("evil", "crafty", "sly"):
        told[name] = output_of(cli.main, ["play", f"someone/{name}", *flags(use_cpu=True)])
    told["nowhere"] = output_of(cli.main, ["play", "someone/nowhere"])
    say(json.dumps(told))


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    make_model(context_length=4096).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    with Hub() as hub:
        hub.repositories[BASE] = Repository(BASE)
        hub.repositories[BASE].commit("by hand", files)
        for name, settings in (
            ("evil", {"environment": "os:system", "environment_kwargs": {"command": f"touch {folder}/owned"}}),
            # What this package's modules have imported is not this package's
            (
                "crafty",
                {
                    "environment": "trl_epo.envs.process:os.system",
                    "environment_kwargs": {"command": f"touch {folder}/owned"},
                    "tasks": "trl_epo.envs.process:os.system",
                },
            ),
            ("sly", {"environment": "household", "trust_remote_code": True, "env": {"HF_TOKEN": "x"}}),
        ):
            hub.repositories[f"someone/{name}"] = Repository(f"someone/{name}")
            hub.repositories[f"someone/{name}"].commit(
                "by hand", {**files, "trl_epo.json": json.dumps(settings).encode()}
            )
        yield hub


@pytest.fixture(scope="module")
def pushed(hub, tmp_path_factory):
    """Where the models were trained."""
    folder = tmp_path_factory.mktemp("push")
    hub.call(__file__, "push", folder)
    assert hub.unknown == []
    return folder


@pytest.fixture(scope="module")
def used(hub, pushed, tmp_path_factory):
    """What a stranger has seen, and where."""
    folder = tmp_path_factory.mktemp("use")
    return json.loads(hub.call(__file__, "use", folder).stdout.splitlines()[-1]), folder


def card(hub, name: str) -> ModelCard:
    return ModelCard(hub.files(f"someone/{name}")["README.md"].decode())


def test_front_matter(hub, pushed):
    assert card(hub, "full").data.to_dict() == {
        "base_model": BASE,
        "library_name": "transformers",
        "model_name": "full",
        "pipeline_tag": "text-generation",
        "tags": card(hub, "full").data.tags,
    }
    assert set(card(hub, "full").data.tags) == {"generated_from_trainer", "trl", "epo", "agent"}
    assert card(hub, "lora").data.library_name == card(hub, "python").data.library_name == "peft"
    assert card(hub, "python").data.base_model == BASE
    assert card(hub, "python").data.datasets == "someone/rows"


def test_sections(hub, pushed):
    for name in ("full", "lora"):
        text = card(hub, name).text
        assert f"a fine-tuned version of [{BASE}]" in text
        assert "| environment | `household` |" in text and '| its arguments | `{"rooms": 2}` |' in text
        assert "| rows trained on | 4 |" in text
        for panel in ("iid", "ood"):
            assert re.search(
                rf"\| `{panel}` \| 1 \| 12 \| 0\.0% \| 0\.0% to 56\.\d% \| 0\.00 \| 2\.00 \| 0\.0% \|", text
            )
        assert "Your task:" in text.split("## An episode")[1]
        assert "- trl-epo: " in text and ("- PEFT: " in text) == (name == "lora")
        assert "| λ | `entropy_coef` | 0.5 |" in text
    assert "| environment | `conftest.Corridor` |" in card(hub, "python").text
    assert "No evaluation of them was logged." in card(hub, "python").text
    assert "You are at" in card(hub, "python").text.split("## An episode")[1]


def test_the_weights_are_those_that_were_trained(hub, pushed, used):
    _, folder = used
    for name, file in (("full", "model"), ("lora", "adapter_model"), ("python", "adapter_model")):
        trained = load_file(pushed / name / f"{file}.safetensors")
        loaded = torch.load(folder / f"{name}.pt")
        for key, weight in trained.items():
            key = re.sub(r"(lora_[AB])\.weight", r"\1.default.weight", key)
            assert torch.equal(loaded[key], weight), key


def test_it_plays(used):
    told, _ = used
    for name in ("full", "lora"):
        assert "Your task:" in told[name]["played"]
    assert "The door is at 3." in told["python"]["played"]
    for name in ("full", "lora", "python"):
        assert re.search(r"uccess after \d turns? \(", told[name]["played"]), told[name]["played"]
    assert re.search(r"iid +4 ", told["evaluated"]), told["evaluated"]


def test_the_tokenizer_is_the_adapters_own(used):
    told, _ = used
    assert "I say" in told["python"]["template"]


def test_a_strangers_settings_run_no_code_and_change_nothing_else(hub, used, tmp_path_factory):
    told, _ = used
    assert "names code to run on this machine (--environment)" in told["evil"] and "exit 2" in told["evil"]
    assert "--environment os:system" in told["evil"]
    assert (
        "names code to run on this machine (--environment, --tasks)" in told["crafty"] and "exit 2" in told["crafty"]
    )
    assert not list(tmp_path_factory.getbasetemp().rglob("owned"))
    assert "holds 'env', 'trust_remote_code', which is not for it to say" in told["sly"] and "exit 2" in told["sly"]
    assert "in 'someone/nowhere': no such folder is here" in told["nowhere"]


if __name__ == "__main__":
    faulthandler.dump_traceback_later(600, exit=True)  # rather than hang
    globals()[sys.argv[1]](Path(sys.argv[2]))
