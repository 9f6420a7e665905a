"""The command line, run as users run it; and the configuration files of the examples."""

import doctest
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import is_bitsandbytes_available
from trl import get_peft_config

from trl_epo import EPOConfig, cli
from trl_epo.cli.evaluate import panel_results, table
from trl_epo.cli.mistakes import UsageError
from trl_epo.cli.named import config_file
from trl_epo.cli.settings import ScriptArguments, parse, save_play_settings
from trl_epo.cli.train import make_trainer
from trl_epo.credit.critic import make_critic
from trl_epo.credit.critic_checkpoint import load_model
from trl_epo.envs.household import Household
from trl_epo.play import play
from trl_epo.reports.evaluation import evaluation_metrics
from trl_epo.reports.metrics import EpisodeSummary
from trl_epo.rollouts.episode import StopReason


ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "examples" / "configs"
ACCELERATE_CONFIGS = ROOT / "examples" / "accelerate_configs"
SMALL = CONFIGS / "household-small.yaml"
FEW_STEPS = (
    *("--max_steps", "2", "--eval_steps", "1", "--eval_size", "6", "--max_turn_length", "4", "--max_turns", "3"),
    *("--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1", "--save_steps", "1"),
)

# Name, file and flags of each row of the tables in docs/paper.md that names a file.
ROWS_OF_THE_PAPER = re.findall(
    r"^\| ([^|]+) \| `(examples/configs/[^`]+)` \| (?:`([^`]+)`)?",
    (ROOT / "docs" / "paper.md").read_text(),
    re.MULTILINE,
)

OWN = """
from datasets import Dataset
from trl_epo.envs import TextEnv

class Door(TextEnv):
    def __init__(self, word="open"):
        self.word = word
    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return f"Say {self.word}.", {}
    def step(self, action):
        done = self.word in action
        return "Hm.", float(done), done, False, {"success": done}

def doors(split, rows=5):
    return Dataset.from_dict({"number": list(range(rows))})

class Shop(Door):
    def reset(self, *, seed=None, options=None):
        if options["closed"]:
            raise OSError("closed")
        return super().reset(seed=seed)

def shops(split):
    return Dataset.from_dict({"closed": [False, split == "ood"]})
"""


def run(*command, cwd, launcher=()):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    full = [sys.executable, *launcher, "-m", "trl_epo", *map(str, command)]
    return subprocess.run(full, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, model_folder):
    folder = tmp_path_factory.mktemp("run")
    flags = ("--config", SMALL, "--model_name_or_path", model_folder, "--output_dir", folder, *FEW_STEPS)
    done = run("train", *flags, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"


OWN_MODEL = """
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, LlamaPreTrainedModel

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

class OwnForTokenClassification(LlamaPreTrainedModel):
    config_class = OwnConfig
    def __init__(self, config):
        super().__init__(config)
        self.model = LlamaModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()
"""


def save_adapter(folder, model_folder, **kwargs):
    """An adapter of the model, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, **kwargs)
    config = LoraConfig(
        r=2, lora_alpha=8, lora_dropout=0.0, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    get_peft_model(model, config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(folder)
    return folder


def refused(*arguments, command="train"):
    with pytest.raises(UsageError) as error:
        parse(command, arguments)
    return str(error.value)


class TestParsing:
    def test_flags_win_over_the_file(self, tmp_path, model_folder):
        config = tmp_path / "config.yaml"
        config.write_text("environment: household\nlearning_rate: 5e-6\nmax_steps: 7\ntasks_kwargs: {rooms: 2}\n")
        flags = ["--config", str(config), "--model_name_or_path", model_folder, "--max_steps", "3"]
        script, args, model_args = parse("train", flags)
        assert (args.learning_rate, args.max_steps) == (5e-6, 3)
        assert script.tasks_kwargs == {"rooms": 2}
        assert model_args.model_name_or_path == model_folder
        script, _, _ = parse("train", [*flags, "--tasks_kwargs", '{"rooms": 3}', "--eval_splits", "iid"])
        assert (script.tasks_kwargs, script.eval_splits) == ({"rooms": 3}, ["iid"])

    def test_unknown_settings_get_the_nearest_name(self, tmp_path):
        config = tmp_path / "config.yaml"
        config.write_text("environment: household\nmodel_name_or_path: m\nentropie_coef: 0.1\n")
        wrong = refused("--config", str(config))
        assert wrong == f"There is no setting 'entropie_coef', which is in {config}. Did you mean 'entropy_coef'?"
        flags = ("--environment", "household", "--model_name_or_path", "m")
        wrong = refused(*flags, "--entropie-coef=0.1")
        assert wrong == "There is no option --entropie-coef. Did you mean '--entropy_coef'?"
        assert "no option --max_step. Did you mean '--max_steps'?" in refused(
            *flags, "--max_step", "3"
        )  # no abbreviation
        assert "no option --enviroment. Did you mean '--environment'?" in refused("--enviroment", "household")
        assert "no option --zzz. See trl-epo train --help" in refused(*flags, "--zzz")
        assert "'household' belongs to no option" in refused("household", *flags)
        assert "no option --noise." in refused(*flags, "--noise", "0.1")  # one of another command

    def test_config_files_that_cannot_be_read(self, tmp_path):
        config = tmp_path / "config.yaml"
        for text, message in (
            ("environment: [household", "cannot be read: while parsing"),
            ("household", "holds 'household' and no settings"),
            ("max_steps: 2.5", "`max_steps` is 2.5 in .* must be a whole number"),
            ("learning_rate: [1]", r"`learning_rate` is \[1\] in .* must be a number"),
            ("max_steps: seven", "max_steps.*invalid int value: 'seven'"),
            ("env: [1]", "`env` is"),
        ):
            config.write_text(text)
            assert re.search(message, refused("--config", str(config))), text
        assert "`--config` needs a file" in refused("--config")
        assert "given 2 times" in refused("--config", "a", "--config=b")

    def test_configs_by_name(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert config_file("household-small").samefile(SMALL)
        assert config_file("household-small.yaml").samefile(SMALL)
        script, _, _ = parse("train", ["--config=household-small", "--model_name_or_path", "m"])
        assert script.environment == "household"
        (tmp_path / "household-small").write_text("environment: textarena\nmodel_name_or_path: m\n")
        assert parse("train", ["--config", "household-small"])[0].environment == "textarena"  # a path that exists wins
        wrong = refused("--config", "houshold-small")
        assert f"no such file in {tmp_path}" in wrong and "Did you mean 'household-small'?" in wrong
        assert all(path.stem in wrong for path in CONFIGS.glob("*.yaml"))
        assert "no such file" in refused("--config", "nowhere/household-small.yaml")

    def test_impossible_settings(self, tmp_path):
        flags = ("--environment", "household", "--model_name_or_path", "m")
        assert "`environment` is not set: give one of household, " in refused()
        assert "'houshold' belongs to no option" in refused("houshold")
        assert "`model_name_or_path` is not set" in refused("--environment", "household")
        assert "'kitchen'" in refused("--environment", "kitchen")
        assert "Did you mean 'household'?" in refused("--environment", "houshold")
        assert "`tasks_kwargs` is '{rooms: 2}', which is not JSON" in refused(*flags, "--tasks_kwargs", "{rooms: 2}")
        assert "`environment_kwargs` is [1]" in refused(*flags, "--environment_kwargs", "[1]")
        assert "nowhere.yaml" in refused("--config", str(tmp_path / "nowhere.yaml"))
        assert "`entropy_coef` is -1.0" in refused(*flags, "--entropy_coef", "-1")

    def test_a_split_by_itself(self, tmp_path):
        config = tmp_path / "config.yaml"
        config.write_text("environment: household\nmodel_name_or_path: m\neval_splits: ood\n")
        assert parse("train", ["--config", str(config)])[0].eval_splits == ["ood"]

    def test_table(self):
        assert doctest.testmod(cli).failed == 0
        lines = table({"iid": {"count": 0}, "ood": {"pass@2": 0.5, "pass@16": 0.75}}).splitlines()
        assert lines[0].endswith("pass@2   pass@16")
        assert lines[2].endswith("50.0%     75.0%")

    def test_failed_episodes_show(self):
        summaries = [
            EpisodeSummary(None, row < 2, 0.0, 1, 0, 0, StopReason.TERMINATED if row < 7 else StopReason.FAILURE, row)
            for row in range(10)
        ]
        metrics = {f"eval_iid_{name}": float(value) for name, value in evaluation_metrics(summaries).items()}
        results = {"iid": panel_results(metrics, "iid"), "ood": {"count": 4, "stop/failure": 0.0}}
        assert "iid: 3 of 10 episodes failed" in table(results).splitlines()[-1]
        assert "failed" not in table({"ood": results["ood"]})
        assert table({"ood": {"count": 4, "stop/failure": 1.0}}).splitlines()[1].split() == ["ood", "4", *"-----"]


class TestRows:
    def test_household_is_asked_for_a_number(self):
        script = ScriptArguments("household", tasks_kwargs={"rooms": 2}, tasks_seed=3)
        rows = script.rows("iid", 5)
        assert (len(rows), set(rows["rooms"]), set(rows["split"])) == (5, {2}, {"iid"})
        assert rows["seed"] != ScriptArguments("household", tasks_kwargs={"rooms": 2}).rows("iid", 5)["seed"]
        with pytest.raises(ValueError, match="have no end: set `train_size` and `eval_size`"):
            script.rows("train", None)

    def test_scienceworld_rows_are_drawn_from_all_tasks(self):
        script = ScriptArguments("scienceworld")
        assert len(script.rows("iid", None)) == len(script.rows("iid", 10**6)) > 500
        some = script.rows("iid", 64)
        assert len(set(some["task"])) > 5
        assert some.to_list() == script.rows("iid", 64).to_list()
        assert some.to_list() != ScriptArguments("scienceworld", tasks_seed=1).rows("iid", 64).to_list()

    def test_ones_own(self, tmp_path, monkeypatch):
        (tmp_path / "doors_of_mine.py").write_text(OWN)
        monkeypatch.syspath_prepend(tmp_path)
        script = ScriptArguments(
            "doors_of_mine:Door", {"word": "please"}, "doors_of_mine:doors", '{"rows": 3}', eval_size=2
        )
        assert script.environment_factory()().word == "please"
        assert len(script.rows("train", None)) == 3
        assert {name: len(rows) for name, rows in script.panels().items()} == {"iid": 2, "ood": 2}
        with pytest.raises(ValueError, match="`tasks` is not set"):
            ScriptArguments("doors_of_mine:Door").panels()
        with pytest.raises(ValueError, match="`environment` is 'doors_of_mine:Window'.*Window"):
            ScriptArguments("doors_of_mine:Window").environment_factory()
        with pytest.raises(
            ValueError, match="`tasks` is 'no_such_module:doors', but there is no module 'no_such_module'"
        ):
            ScriptArguments("doors_of_mine:Door", tasks="no_such_module:doors").rows("train", None)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"train_size": 5}, "`train_size` is 5, but `tasks` is not set"),
            ({"eval_size": 5}, "`eval_size` is 5, but `tasks` is not set"),
            ({"tasks_kwargs": {"rooms": 2}}, "`tasks_kwargs` is {'rooms': 2}, but `tasks` is not set"),
        ],
    )
    def test_sizes_of_no_rows(self, settings, message):
        ScriptArguments("household", **settings)
        with pytest.raises(ValueError, match=message):
            ScriptArguments("doors_of_mine:Door", **settings)


class TestCommands:
    def test_train(self, trained, model_folder):
        for name in ("model.safetensors", "tokenizer.json", "README.md", "trainer_state.json"):
            assert (trained / name).exists()
        before, after = load_file(Path(model_folder, "model.safetensors")), load_file(trained / "model.safetensors")
        assert any(not (before[name] == after[name]).all() for name in before)
        history = json.loads((trained / "trainer_state.json").read_text())["log_history"]
        evaluated = [entry["step"] for entry in history if "eval_iid_episode/success_rate" in entry]
        assert evaluated == [1, 2]
        assert all(entry["eval_ood_episode/count"] == 6 for entry in history if "eval_ood_episode/count" in entry)

    @pytest.mark.parametrize("processes", [1, 2])
    def test_evaluate_a_checkpoint(self, trained, tmp_path, processes):
        launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2") if processes == 2 else ()
        results = tmp_path / "results" / "after.json"
        done = run(
            *("evaluate", "--config", SMALL, "--model_name_or_path", trained / "checkpoint-2", *FEW_STEPS),
            *("--output_dir", tmp_path, "--results", results, "--num_generations_eval", "2", "--eval_size", "3"),
            cwd=tmp_path,
            launcher=launcher,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        written = json.loads(results.read_text())
        assert written["model"] == str(trained / "checkpoint-2")
        assert (written["temperature"], written["episodes_per_row"]) == (0.4, 2)
        assert list(written["panels"]) == ["iid", "ood"]
        for name, panel in written["panels"].items():
            assert panel["count"] == 6 and isinstance(panel["count"], int)
            assert panel["success_low"] <= panel["success_rate"] <= panel["success_high"]
            assert {"pass@1", "pass@2", "turns", "return"} <= set(panel)
            assert sum(line.startswith(name) for line in done.stdout.splitlines()) == 1
        assert str(results) in done.stdout

    def test_resume(self, trained, model_folder):
        flags = ("--config", SMALL, "--model_name_or_path", model_folder, "--output_dir", trained, *FEW_STEPS)
        (trained / "checkpoint-9").mkdir()  # cut before it had any file
        done = run("train", *flags, "--resume", "--max_steps", "3", "--eval_strategy", "no", cwd=trained)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "checkpoint-9 is passed over" in done.stderr
        assert f"--resume: training goes on from {trained / 'checkpoint-2'}." in done.stderr
        history = json.loads((trained / "trainer_state.json").read_text())["log_history"]
        assert [entry["step"] for entry in history if "epo/entropy" in entry] == [1, 2, 3]

    def test_adapter_and_an_environment_of_ones_own(self, tmp_path, model_folder, monkeypatch):
        monkeypatch.syspath_prepend(tmp_path)
        (tmp_path / "doors_of_mine.py").write_text(OWN)
        config = tmp_path / "config.yaml"
        config.write_text(
            "environment: doors_of_mine:Door\nenvironment_kwargs: {word: please}\ntasks: doors_of_mine:doors\n"
            "use_peft: true\nlora_r: 2\nmax_steps: 1\nlearning_rate: 0.1\nmax_turns: 2\nmax_turn_length: 4\n"
            "per_device_train_batch_size: 4\ngradient_accumulation_steps: 1\nnum_generations: 4\nbf16: false\n"
        )
        flags = ("--config", config, "--output_dir", tmp_path / "run")
        done = run("train", *flags, "--model_name_or_path", model_folder, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        assert (tmp_path / "run" / "adapter_model.safetensors").exists()
        flags = (*flags, "--model_name_or_path", tmp_path / "run")
        trainer = make_trainer(*parse("evaluate", list(map(str, flags))), train_dataset=None)
        saved = load_file(tmp_path / "run" / "adapter_model.safetensors")
        name = next(name for name in saved if "lora_B" in name)
        loaded = trainer.model.get_parameter(name.replace(".weight", ".default.weight"))
        assert loaded.abs().sum() > 0
        assert torch.equal(loaded, saved[name])
        done = run("evaluate", *flags, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        panels = json.loads((tmp_path / "run" / "evaluation.json").read_text())["panels"]
        assert panels["iid"]["count"] == 20  # 5 rows, as many episodes each as in training

    @pytest.mark.parametrize("bits", [4, 8])
    @pytest.mark.parametrize("kind", ["model", "adapter"])
    def test_weights_are_quantized_if_asked_for(self, tmp_path, model_folder, capsys, kind, bits):
        folder = model_folder if kind == "model" else save_adapter(tmp_path / "adapter", model_folder)
        flags = ("--config", str(SMALL), "--output_dir", str(tmp_path), "--model_name_or_path", str(folder))
        flags = (*flags, f"--load_in_{bits}bit", "--max_steps", "1", "--train_size", "8", "--eval_strategy", "no")
        if not is_bitsandbytes_available():
            with pytest.raises(SystemExit):
                cli.main(["train", *flags])
            assert f"`load_in_{bits}bit` needs bitsandbytes" in capsys.readouterr().err
            return
        script, args, model_args = parse("train", flags)
        args.num_generations = args.per_device_train_batch_size
        peft = LoraConfig(r=2, target_modules=["q_proj"]) if kind == "model" else None
        trainer = make_trainer(script, args, model_args, script.rows("train", 8), peft_config=peft)
        assert getattr(trainer.model, f"is_loaded_in_{bits}bit")
        assert trainer.model.get_parameter(Q_PROJ).dtype == (torch.uint8 if bits == 4 else torch.int8)

    def test_an_adapter_is_quantized_as_in_its_training(self, tmp_path, model_folder, monkeypatch):
        """What its base would be loaded with, as bitsandbytes may not be there."""
        given = ["--config", str(SMALL), "--model_name_or_path", model_folder, "--output_dir", str(tmp_path / "run")]
        save_play_settings(*parse("train", [*given, "--use_peft", "--load_in_4bit", "--bnb_4bit_quant_type", "fp4"]))
        run = save_adapter(tmp_path / "run", model_folder)
        checkpoint = save_adapter(tmp_path / "run" / "checkpoint-3", model_folder)
        loaded = []

        def load(folder, quantization_config=None, **kwargs):
            loaded.append((Path(folder), quantization_config))
            raise InterruptedError

        monkeypatch.setattr("trl_epo.cli.train.is_bitsandbytes_available", lambda: True)
        monkeypatch.setattr("trl_epo.saved.AutoPeftModelForCausalLM.from_pretrained", load)

        def quantized(folder, command, *more):
            named = ["--config", str(SMALL), "--output_dir", str(tmp_path), "--model_name_or_path", str(folder)]
            with pytest.raises(InterruptedError):
                cli.main(["play", str(folder)] if command == "play" else [command, *named, *more])
            assert loaded[-1][0] == folder
            return loaded[-1][1]

        for folder in (run, checkpoint):
            for command in ("train", "warm-up", "evaluate", "play"):
                config = quantized(folder, command)
                assert (config.load_in_4bit, config.bnb_4bit_quant_type) == (True, "fp4")
        assert quantized(run, "evaluate", "--load_in_4bit", "false") is None
        assert quantized(run, "evaluate", "--load_in_8bit").load_in_8bit
        (tmp_path / "run" / "trl_epo.json").unlink()
        assert quantized(run, "evaluate") is None

    def test_code_of_the_models_own(self, tmp_path, model_folder):
        """In the folder, as the base of an adapter, and of a critic."""
        folder = tmp_path / "own"
        shutil.copytree(model_folder, folder)
        (folder / "own.py").write_text(OWN_MODEL)
        config = json.loads((folder / "config.json").read_text())
        maps = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
        maps["AutoModelForTokenClassification"] = "own.OwnForTokenClassification"
        config |= {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": maps}
        (folder / "config.json").write_text(json.dumps(config))
        adapter = save_adapter(tmp_path / "adapter", folder, trust_remote_code=True)
        models = []
        for path in (folder, adapter):
            flags = ["--config", str(SMALL), "--output_dir", str(tmp_path), "--model_name_or_path", str(path)]
            flags += ["--trust_remote_code", "--bf16", "false", "--eval_strategy", "no"]
            script, args, model_args = parse("train", flags)
            trainer = make_trainer(script, args, model_args, script.rows("train", 8))
            model = trainer.accelerator.unwrap_model(trainer.model)
            models.append(model.get_base_model() if path == adapter else model)
            assert type(models[-1]).__name__ == "OwnForCausalLM"
        for critic_model in (None, str(folder)):
            critic = make_critic(models[0], critic_model, trust_remote_code=True)
            assert type(critic).__name__ == "OwnForTokenClassification"
            critic.save_pretrained(tmp_path / "critic")
            load_model(trainer.accelerator, critic, tmp_path / "critic", trust_remote_code=True)
        few = {"max_turns": 1, "max_turn_length": 2, "bf16": False}
        episode = play(adapter, Household, args=EPOConfig(trust_remote_code=True, **few), show=list)
        assert len(episode.turns) == 1

    def test_evaluation_needs_no_reference_model(self, tmp_path, model_folder):
        flags = ["--config", str(SMALL), "--output_dir", str(tmp_path), "--model_name_or_path", model_folder]
        flags += ["--bf16", "false", "--max_turns", "1", "--max_turn_length", "2", "--eval_size", "2"]
        cli.main(["evaluate", *flags, "--beta", "0.1", "--sync_ref_model"])
        assert (tmp_path / "evaluation.json").exists()

    def test_lora_flags_that_cannot_act_are_told(self, tmp_path, model_folder, caplog):
        folder = save_adapter(tmp_path / "adapter", model_folder)
        flags = [
            "--config",
            str(SMALL),
            "--output_dir",
            str(tmp_path),
            "--model_name_or_path",
            str(folder),
            "--use_peft",
        ]

        def told(*more):
            caplog.clear()
            script, args, model_args = parse("train", [*flags, "--bf16", "false", "--eval_strategy", "no", *more])
            make_trainer(script, args, model_args, script.rows("train", 8), peft_config=get_peft_config(model_args))
            return "".join(record.getMessage() for record in caplog.records if record.name == "trl_epo.cli.train")

        same = (
            "--lora_r",
            "2",
            "--lora_alpha",
            "8",
            "--lora_dropout",
            "0",
            "--lora_target_modules",
            "v_proj",
            "q_proj",
        )
        assert told(*same) == ""
        assert f"{folder} holds an adapter, which stays as it is: `lora_r` is 2, not 5" in told(*same, "--lora_r", "5")
        assert "`lora_target_modules` is ['q_proj', 'v_proj'], not ['k_proj'" in told(
            *same[:-3], "--lora_target_modules", "k_proj", "q_proj"
        )

    def test_too_many_episodes_that_fail(self, tmp_path, model_folder, monkeypatch, capsys):
        monkeypatch.syspath_prepend(tmp_path)
        (tmp_path / "shops_of_mine.py").write_text(OWN)
        flags = (
            *("--environment", "shops_of_mine:Shop", "--tasks", "shops_of_mine:shops", "--output_dir", str(tmp_path)),
            *("--model_name_or_path", model_folder, "--max_turns", "1", "--max_turn_length", "4", "--bf16", "false"),
        )
        cli.main(["evaluate", *flags])  # half of them, as many as may
        with pytest.raises(SystemExit, match="more episodes of ood failed .*failures.jsonl") as stop:
            cli.main(["evaluate", *flags, "--max_failed_fraction", "0.4"])
        assert stop.value.code != 0
        assert "ood: 8 of 16 episodes failed" in capsys.readouterr().out
        panels = json.loads((tmp_path / "evaluation.json").read_text())["panels"]
        assert [panels[name]["stop/failure"] for name in ("iid", "ood")] == [0.0, 0.5]

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (("--eval_size", "0"), "`eval_size` is 0, but must be at least 1"),
            (("--eval_splits", "val"), "split 'val' .*'train', 'iid', 'ood'"),
            (("--tasks_kwargs", '{"roms": 2}'), "takes .*rooms.*unexpected keyword argument 'roms'"),
            (("--tasks", "math:pi"), "`tasks` is 'math:pi', but that is a float"),
            (("--environment", "no_module:a"), "`environment` is 'no_module:a', but there is no module 'no_module'"),
            (("--environment", "math:sqrt"), "called with {} it raises TypeError"),
            (("--environment", "builtins:dict"), "called with {} it gives a dict.*`gymnasium.Env`"),
            (("--environment_kwargs", '{"roms": 2}'), "called with {'roms': 2} it raises TypeError"),
            (("--results", "/proc/nowhere/a.json"), "`results` is '/proc/nowhere/a.json', but its folder"),
            (("--results", "."), "`results` is '.', but no file"),
            (
                ("--model_name_or_path", "no/model/here"),
                "`model_name_or_path` is 'no/model/here', but there is no model",
            ),
        ],
    )
    def test_mistakes_end_in_one_line(self, capsys, tmp_path, model_folder, flags, message):
        flags = ("--tasks", "trl_epo.envs.household:tasks", "--output_dir", str(tmp_path), *flags)
        with pytest.raises(SystemExit) as stop:
            cli.main(
                ["evaluate", "--config", str(SMALL), "--model_name_or_path", model_folder, "--bf16", "false", *flags]
            )
        assert stop.value.code == 2
        assert re.search(message, capsys.readouterr().err.splitlines()[-1])

    def test_nothing_to_evaluate_on(self, capsys, tmp_path):
        config = tmp_path / "config.yaml"
        config.write_text("environment: household\neval_splits: []\nmodel_name_or_path: m\nbf16: false\n")
        with pytest.raises(SystemExit):
            cli.main(["evaluate", "--config", str(config), "--output_dir", str(tmp_path)])
        assert "`eval_splits` is empty" in capsys.readouterr().err

    @pytest.mark.parametrize(("arguments", "code"), [([], 2), (["--help"], 0)])
    def test_no_command(self, capsys, arguments, code):
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        assert stop.value.code == code
        out, err = capsys.readouterr()
        assert "trl-epo evaluate " in (err if code else out)
        assert (out if code else err) == ""

    def test_what_train_leaves_is_played(self, trained, capsys):
        for folder in (trained, trained / "checkpoint-2"):
            cli.main(["play", str(folder)])
            assert "after 3 turns (max_turns)" in capsys.readouterr().out
        assert f"trl-epo play {trained}" in (trained / "README.md").read_text()

    @pytest.mark.jvm
    def test_scienceworld_small(self, tmp_path, model_folder):
        flags = ("--config", CONFIGS / "scienceworld-small.yaml", "--model_name_or_path", model_folder)
        short = ("--max_steps", "1", "--max_turns", "2", "--eval_size", "2", "--eval_steps", "1")
        done = run("train", *flags, *short, "--output_dir", tmp_path, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
        assert any(entry.get("eval_ood_episode/count") == 2 for entry in history)


class TestConfigs:
    @pytest.mark.parametrize("name", sorted(path.name for path in CONFIGS.glob("*-*.yaml")))
    def test_every_file_loads(self, name):
        script, args, _ = parse("train", ["--config", str(CONFIGS / name), "--model_name_or_path", "m"])
        assert script.environment in name
        assert args.eval_temperature == 0.4
        assert args.per_device_eval_batch_size % 8 == 0  # docs/paper.md: --num_generations_eval 8 for pass@k

    @pytest.mark.parametrize("environment", ["openenv", "textarena"])
    def test_rows_by_seed(self, environment):
        flags = ["--config", str(CONFIGS / f"{environment}-small.yaml"), "--model_name_or_path", "m"]
        script, *_ = parse("train", flags)
        assert len(script.rows(script.train_split, script.train_size)) == 2000
        assert {len(rows) for rows in script.panels().values()} == {64}

    def test_the_papers_batch(self):
        for path in (*CONFIGS.glob("*-7b-*.yaml"), *CONFIGS.glob("*-3b-*.yaml")):
            _, args, _ = parse("train", ["--config", str(path)])
            num_gpus = yaml.safe_load((ACCELERATE_CONFIGS / "zero2.yaml").read_text())["num_processes"]
            assert args.per_device_train_batch_size * args.gradient_accumulation_steps * num_gpus == 16 * 8
            assert args.num_generations == 8

    @pytest.mark.parametrize(
        "path", [*CONFIGS.glob("*-7b-*.yaml"), *CONFIGS.glob("*-3b-*.yaml")], ids=lambda p: p.stem
    )
    def test_the_papers_numbers(self, path):
        """Its Tables 2 and 3."""
        script, args, model_args = parse("train", ["--config", str(path)])
        science, ppo = script.environment == "scienceworld", path.stem.endswith("ppo")
        assert model_args.model_name_or_path == f"Qwen/Qwen2.5-{'7B' if science else '3B'}-Instruct"
        assert args.advantage_estimator == ("gae" if ppo else "grpo")
        assert args.learning_rate == (3e-6 if science and ppo else 5e-6)
        assert (args.max_turns, args.max_steps) == ((30, 125) if science else (50, 150))
        assert (args.max_turn_length, args.vllm_max_model_length) == (512, 2048 + 512)
        assert (args.entropy_coef, args.entropy_smoothing_coef) == (0.001, 0.05 if science else 0.1)
        corridor = (args.entropy_corridor_low, args.entropy_corridor_high)
        assert (*corridor, args.entropy_smoothing_decay) == (0.0, 2.0, 3.0)
        assert (args.entropy_smoothing, args.entropy_smoothing_schedule) == ("hinge", "exponential")
        assert (args.entropy_aggregation, args.entropy_reference) == ("turn", "history")
        assert (args.beta, args.invalid_action_penalty, args.gamma) == (0.01, 0.1, 1.0)
        assert (args.lr_scheduler_type, args.get_warmup_steps(100)) == ("cosine_with_min_lr", 10)
        assert (args.eval_steps, args.eval_temperature, script.eval_splits) == (5, 0.4, ["iid", "ood"])
        assert args.context == "window"

    @pytest.mark.parametrize("row", ROWS_OF_THE_PAPER, ids=lambda row: row[0])
    def test_every_row_of_the_docs_is_a_command(self, row):
        _, file, flags = row
        _, args, _ = parse("train", ["--config", str(ROOT / file), *flags.split()])
        assert args.lr_scheduler_kwargs == {"min_lr_rate": 0.2}
