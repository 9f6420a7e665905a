"""Kept episodes: what the files say, which episodes they hold, and that no interruption shows in them."""

import json
import logging
import re
import shutil
import signal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import Corridor, make_model
from datasets import Dataset
from faulty_runs import SETTINGS, When, kept, limit_files, make_trainer
from hypothesis import given
from hypothesis import strategies as st

from trl_epo import EPOConfig, EPOTrainer
from trl_epo.reports.episode_files import EpisodeFiles, panel_file, training_file
from trl_epo.reports.episode_schema import SCHEMA
from trl_epo.reports.kept_episodes import choose
from trl_epo.rollouts import StopReason


ROWS = Dataset.from_dict({"length": [2, 3, 4]})
PANELS = {"iid": ROWS, "ood": Dataset.from_dict({"length": [9]})}


class Noting(EPOTrainer):
    """Notes what is played, by mode and panel."""

    def __init__(self, *args, **kwargs):
        self.played = []
        super().__init__(*args, **kwargs)

    def prepare_rows(self, rows):
        prepared = super().prepare_rows(rows)
        panel = self._panel if self.mode == "eval" else ""
        self.played += [(self.mode, panel, self._batch.episodes[: len(self._batch.places)])]
        return prepared


class Rewarding(Corridor):
    """Rewards every step by its text."""

    def step(self, action):
        observation, reward, *others = super().step(action)
        return observation, reward + 0.01 * len(action), *others


class HalfFlat(Corridor):
    """Rewards as above in every second group."""

    def reset(self, *, seed=None, options=None):
        self.is_flat = seed % 2
        return super().reset(seed=seed, options=options)

    def step(self, action):
        observation, _, *others = super().step(action)
        return observation, (1 - self.is_flat) * len(action), *others


class Odd(Corridor):
    """Some of its resets fail, and its texts cannot be encoded."""

    def reset(self, *, seed=None, options=None):
        observation, info = super().reset(seed=seed, options=options)
        if self.place == 1:
            raise OSError("no \ud800 place")
        return observation + " \ud83d", info


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose weights stay what they are, and its trainer."""
    folder = tmp_path_factory.mktemp("run")
    trainer = make_trainer(
        folder, dataset=PANELS, trainer_class=Noting, learning_rate=0.0, per_device_eval_batch_size=4,
        num_generations_eval=2, eval_strategy="steps", eval_steps=4, max_steps=8, temperature=0.7, eval_temperature=0.5,
        gradient_accumulation_steps=1, num_iterations=1, entropy_corridor_high=1.5,
    )  # fmt: skip
    trainer.train()
    return folder, trainer


def read(path: Path) -> list[dict]:
    return pq.read_table(path).to_pylist()


def scores(prompts: list[str], turns: list[dict], temperature: float, tokenizer) -> tuple[list[float], list[float]]:
    """Log-probs and entropies of an episode's sampled tokens, by a plain forward over it, at each turn anew."""
    model, ids, logprobs, entropies = make_model(), [], [], []
    for prompt, turn in zip(prompts, turns, strict=True):
        ids += tokenizer.encode(prompt, add_special_tokens=False)
        with torch.no_grad():
            logits = model(torch.tensor([ids + turn["token_ids"]])).logits[0, len(ids) - 1 : -1] / temperature
        distribution = torch.distributions.Categorical(logits=logits)
        logprobs += distribution.log_prob(torch.tensor(turn["token_ids"])).tolist()
        entropies += distribution.entropy().tolist()
        ids += turn["token_ids"]
    return logprobs, entropies


def together(row: dict, name: str) -> list:
    return [value for turn in row["turns"] for value in turn[name]]


class TestColumns:
    def test_files_of_a_run(self, run):
        folder, _ = run
        names = [path.relative_to(folder / "episodes").as_posix() for path in folder.rglob("*.parquet")]
        steps = [f"eval/{panel}/step-{step:06d}.parquet" for panel in PANELS for step in (4, 8)]
        assert sorted(names) == sorted([*steps, *(f"train/step-{step:06d}.parquet" for step in range(4))])
        for path in folder.rglob("*.parquet"):
            assert pq.read_schema(path).equals(SCHEMA)
            assert pq.read_schema(path).metadata[b"trl_epo.episodes"] == b"1"

    @pytest.mark.parametrize("part", ["train", "iid", "ood"])
    def test_episodes_are_those_that_were_played(self, run, tokenizer, part):
        folder, trainer = run
        mode, panel = ("train", "") if part == "train" else ("eval", part)
        played = [batch for m, p, batch in trainer.played if (m, p) == (mode, panel)]
        if mode == "eval":
            played = [sum(played[: len(played) // 2], []), sum(played[len(played) // 2 :], [])]
        paths = sorted(folder.rglob(f"{part}/*.parquet"))
        assert len(paths) == len(played) > 0
        for k, (path, episodes) in enumerate(zip(paths, played, strict=True)):
            rows = read(path)
            assert [row["row"] for row in rows] == list(range(len(episodes)))
            size = 4 if mode == "train" else 2
            for row, episode in zip(rows, episodes, strict=True):
                assert row["mode"] == mode and row["panel"] == (panel or None) and row["version"] == 1
                assert row["step"] == (2 * k if mode == "train" else 4 * (k + 1))
                assert row["rl_step"] == (k if mode == "train" else 2 * (k + 1))
                assert row["group"] == row["row"] // size
                assert row["temperature"] == (0.7 if mode == "train" else 0.5)
                assert (row["seed"], row["task"], row["environment"]) == (episode.seed, episode.task, None)
                assert json.loads(row["options"]) == episode.options
                assert (row["success"], row["return"]) == (episode.success, episode.episode_return)
                assert (row["stop_reason"], row["num_turns"]) == (episode.stop_reason.value, len(episode.turns))
                assert row["first_observation"] == episode.first_observation and row["failures"] == []
                for turn, ours in zip(episode.turns, row["turns"], strict=True):
                    assert ours["text"] == turn.text and ours["action"] == turn.action
                    assert ours["valid"] is not turn.invalid
                    assert (ours["observation"], ours["reward"]) == (turn.observation, turn.reward)
                    assert ours["token_ids"] == list(turn.action_ids)
                    assert ours["cut"] is (turn.action_ids[-1] != tokenizer.eos_token_id)
                    assert len(ours["tokens"]) == len(turn.action_ids)
                prompts = [episode.prompt_ids, *(turn.observation_ids for turn in episode.turns[1:])]
                assert [turn["prompt"] for turn in row["turns"]] == [tokenizer.decode(ids) for ids in prompts]
                assert row["turns"][-1]["observation"].startswith("You are at ")  # the last one too

    @pytest.mark.parametrize("part", ["train", "iid"])
    def test_scores_are_the_models(self, run, tokenizer, part):
        for path in sorted(run[0].rglob(f"{part}/*.parquet")):
            for row in read(path)[:3]:
                prompts = [turn["prompt"] for turn in row["turns"]]
                logprobs, entropies = scores(prompts, row["turns"], row["temperature"], tokenizer)
                assert together(row, "logprobs") == pytest.approx(logprobs, abs=1e-4)
                assert together(row, "entropies") == pytest.approx(entropies, abs=1e-4)

    def test_advantages_and_corridor(self, run):
        folder, trainer = run
        means = trainer.entropy_history.means
        for k, path in enumerate(sorted((folder / "episodes/train").iterdir())):
            rows = read(path)
            for group in (rows[:4], rows[4:]):  # the mean of a group is its baseline
                assert sum(row["turns"][0]["advantage"] for row in group) == pytest.approx(0, abs=1e-5)
                returns = torch.tensor([row["return"] for row in group])
                expected = (returns - returns.mean()) / (returns.std() + 1e-4)
                for row, advantage in zip(group, expected.tolist(), strict=True):
                    assert all(turn["advantage"] == pytest.approx(advantage, abs=1e-5) for turn in row["turns"])
            reference = sum(means[:k]) / k if k else None
            for row in rows:
                assert row["entropy_reference"] == (reference if k == 0 else pytest.approx(reference))
                assert row["corridor_high"] == (None if k == 0 else pytest.approx(1.5 * reference))
                assert row["corridor_low"] == (None if k == 0 else 0.0)
        for path in folder.rglob("eval/*/*.parquet"):
            for row in read(path):
                assert row["entropy_reference"] is None
                assert {turn["advantage"] for turn in row["turns"]} == {None}

    def test_advantages_and_references_of_turns(self, tmp_path):
        trainer = make_trainer(
            tmp_path, factory=Rewarding, advantage_estimator="turn", gamma=0.5, entropy_reference="turn_history",
            entropy_corridor_high=2.0, max_steps=8, seed=2,
        )  # fmt: skip
        trainer.train()
        rows = read(tmp_path / "episodes" / training_file(1))
        assert any(len({turn["advantage"] for turn in row["turns"]}) > 1 for row in rows)
        assert len({row["entropy_reference"] for row in rows}) > 1
        assert all(row["corridor_high"] == pytest.approx(2 * row["entropy_reference"]) for row in rows)

    def test_windows(self, tmp_path):
        trainer = make_trainer(tmp_path, context="window", max_turns=3, max_steps=2)
        trainer.train()
        rows = read(tmp_path / "episodes" / training_file(0))
        later = [turn for row in rows for turn in row["turns"][1:]]
        assert later and all(turn["starts_context"] for turn in later)
        assert all(turn["prompt"].startswith("<|im_start|>user") and turn["entropies"] for turn in later)

    def test_scores_that_are_not_known(self, tmp_path, monkeypatch):
        monkeypatch.setattr("trl_epo.seams.sampling.unfit_for_cached_sampler", lambda model, longest_context: "a test")
        trainer = make_trainer(tmp_path, dataset=ROWS, max_steps=4, per_device_eval_batch_size=4)
        trainer.train()
        trainer.evaluate()
        for turn in (turn for row in read(tmp_path / "episodes" / training_file(0)) for turn in row["turns"]):
            assert len(turn["logprobs"]) == len(turn["entropies"]) == len(turn["tokens"])
        for turn in (turn for row in read(tmp_path / "episodes" / panel_file(None, 4)) for turn in row["turns"]):
            assert turn["logprobs"] is turn["entropies"] is None

    def test_groups_that_are_left_out_of_the_loss(self, tmp_path, tokenizer):
        rows = Dataset.from_dict({"seed": [2, 3]})
        trainer = EPOTrainer(
            make_model(),
            args=EPOConfig(str(tmp_path), **{**SETTINGS, "max_steps": 4, "filter_zero_variance_groups": "mask"}),
            train_dataset=rows,
            processing_class=tokenizer,
            environment_factory=HalfFlat,
        )
        trainer.train()
        rows = read(tmp_path / "episodes" / training_file(0))
        flat = [len({row["return"] for row in rows if row["group"] == each["group"]}) == 1 for each in rows]
        assert any(flat) and not all(flat)
        for row, is_flat in zip(rows, flat, strict=True):
            for turn in row["turns"]:
                assert (turn["entropies"] is None) is is_flat and len(turn["logprobs"]) == len(turn["tokens"])

    def test_failures_and_texts_that_cannot_be_encoded(self, tmp_path):
        rows = Dataset.from_dict({"length": [2, 3]})
        trainer = make_trainer(tmp_path, factory=Odd, max_failed_fraction=1.0, dataset=rows, max_steps=4, seed=1)
        trainer.evaluate()
        trainer.train()
        for path in tmp_path.rglob("*.parquet"):
            rows = read(path)
            failed = [row for row in rows if row["stop_reason"] == "failure"]
            assert rows and (failed or "train" in str(path))
            for row in failed:
                assert [failure["kind"] for failure in row["failures"]] == ["crash", "crash"]
                assert "OSError: no \ufffd place" in row["failures"][0]["cause"] and row["turns"] == []
            for row in rows:
                assert row in failed or row["first_observation"].endswith("\ufffd")
                assert "length" in json.loads(row["options"]) or "train" in str(path)

    def test_options_that_are_no_json(self, tmp_path):
        circle = []
        circle.append(circle)
        trainer = make_trainer(tmp_path, max_steps=1)
        keeper, rows = trainer._keeper, []
        trainer.train()
        episode = trainer._batch.episodes[0]
        for options in ({"circle": circle}, {("a",): 1}, {"x": float("nan"), "y": {1, 2}}, {"z": "\ud800"}):
            object.__setattr__(episode, "options", options)
            rows += keeper._tables([keeper._told(episode, row=0, group=0, mode="eval")])
        texts = pa.concat_tables(rows)["options"].to_pylist()
        assert "cannot be written as JSON" in texts[0] and "cannot be written as JSON" in texts[1]
        assert json.loads(texts[2])["y"] == "{1, 2}" and json.loads(texts[3])["z"] == "\ufffd"

    def test_each_episode_once(self, run):
        # A process that has no state of its own in a checkpoint takes the first one's.
        keeper, table = run[1]._keeper, pq.read_table(run[0] / "episodes" / training_file(0))
        assert keeper._one_table([table.slice(2), table.slice(0, 4)]).equals(table)

    def test_snippets_of_the_docs(self, run, tmp_path, monkeypatch):
        folder, _ = run
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
        shutil.copytree(folder, "runs/mine")
        text = (Path(__file__).parents[2] / "docs" / "episodes.md").read_text()
        snippets = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        assert len(snippets) == 2
        names = {}
        for snippet in snippets:
            exec(snippet, names)
        assert len(names["episodes"]) == 4 * 8
        assert set(names["success"].index.get_level_values("panel")) == set(PANELS)

    def test_every_column_is_in_the_docs(self):
        text = (Path(__file__).parents[2] / "docs" / "episodes.md").read_text()
        for field in SCHEMA:
            fields = [field.name]
            if pa.types.is_list(field.type):
                fields += [f.name for f in field.type.value_type]
            assert all(f"`{name}`" in text for name in fields), fields


OUTCOMES = st.lists(st.tuples(st.sampled_from([True, False, None]), st.sampled_from(list(StopReason))), max_size=40)


class TestChoice:
    @given(OUTCOMES, st.integers(1, 20))
    def test_all_kinds_are_among_them(self, outcomes, number):
        chosen = choose(outcomes, number)
        assert len(set(chosen)) == len(chosen) == min(number, len(outcomes))
        assert chosen == sorted(chosen) == choose(list(outcomes), number)
        kinds = {outcomes[index] for index in chosen}
        assert len(kinds) == min(number, len(set(outcomes)))

    def test_at_most_as_many_as_asked_for(self, tmp_path):
        trainer = make_trainer(tmp_path, dataset=ROWS, keep_episodes=3, max_steps=4, per_device_eval_batch_size=4)
        trainer.train()
        trainer.evaluate()
        rows = read(tmp_path / "episodes" / training_file(0))
        assert len(rows) == 3
        assert all(together(row, "entropies") for row in rows)
        assert len(read(tmp_path / "episodes" / panel_file(None, 4))) == 12

    def test_none(self, tmp_path):
        trainer = make_trainer(tmp_path, dataset=ROWS, keep_episodes=0, max_steps=4, per_device_eval_batch_size=4)
        trainer.train()
        trainer.evaluate()
        assert not list(tmp_path.rglob("*.parquet"))

    @pytest.mark.parametrize("name", ["keep_episodes", "keep_episodes_megabytes"])
    def test_settings_are_checked(self, tmp_path, name):
        with pytest.raises(ValueError, match=rf"`{name}` is -1, but must be"):
            make_trainer(tmp_path, **{name: -1})


class TestResume:
    KWARGS = {
        "max_steps": 7, "dataset": ROWS, "eval_strategy": "steps", "eval_steps": 3, "per_device_eval_batch_size": 4,
        "gradient_accumulation_steps": 1, "steps_per_generation": 3, "num_iterations": 1,
    }  # fmt: skip

    @pytest.fixture(scope="class")
    def whole(self, tmp_path_factory):
        folder = tmp_path_factory.mktemp("whole")
        make_trainer(folder, **self.KWARGS).train()
        return kept(folder)

    @pytest.mark.parametrize("stop", [1, 2, 3, 4, 5, 6])
    def test_after_a_sigterm_at_any_step(self, tmp_path, whole, stop):
        terminates = When("on_step_end", stop, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(SystemExit):
            make_trainer(tmp_path, terminates, **self.KWARGS).train()
        make_trainer(tmp_path, **self.KWARGS).train(resume_from_checkpoint=True)
        ours = kept(tmp_path)
        if stop in (3, 6):  # the last checkpoint comes before the evaluation of its step, which is not made again
            assert ours == {name: rows for name, rows in whole.items() if name != panel_file(None, stop)}
        else:
            assert ours == whole
        assert sorted(whole) == [
            *(panel_file(None, step) for step in (3, 6, 7)),
            *(training_file(k) for k in range(3)),
        ]

    def test_from_an_earlier_checkpoint_with_files_of_later_steps(self, tmp_path, whole):
        kwargs = {**self.KWARGS, "save_strategy": "steps", "save_steps": 1}
        make_trainer(tmp_path, **kwargs).train()
        assert kept(tmp_path) == whole
        later = [training_file(1), training_file(2), panel_file(None, 6), panel_file(None, 7)]
        for name in later:  # as if those steps had been other ones
            (tmp_path / "episodes" / name).write_bytes((tmp_path / "episodes" / training_file(0)).read_bytes())
        (tmp_path / "episodes" / training_file(9)).write_bytes(b"")
        trainer = make_trainer(tmp_path, **kwargs)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert kept(tmp_path) == whole

    def test_with_other_batches(self, tmp_path):
        # What is left of the batch is kept as far as it is known.
        terminates = When("on_step_end", 1, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(SystemExit):
            make_trainer(tmp_path, terminates, **self.KWARGS).train()
        make_trainer(tmp_path, **{**self.KWARGS, "steps_per_generation": 2}).train(resume_from_checkpoint=True)
        rows = read(tmp_path / "episodes" / training_file(0))
        known = [all(turn["entropies"] is not None for turn in row["turns"]) for row in rows]
        assert len(rows) == 12 and sum(known) == 4
        assert all(together(row, "logprobs") for row in rows)

    def test_a_new_run_in_the_same_folder(self, tmp_path, whole, caplog):
        trainer = make_trainer(tmp_path, **{**self.KWARGS, "seed": 3})
        trainer.train()
        other = kept(tmp_path)
        assert other != whole
        (tmp_path / "episodes" / training_file(9)).write_bytes(b"")
        trainer = make_trainer(tmp_path, **self.KWARGS)
        trainer.evaluate()  # of the weights that it begins with
        first = kept(tmp_path, panel_file(None, 0))
        assert training_file(9) in {
            path.relative_to(tmp_path / "episodes").as_posix() for path in tmp_path.rglob("*.parquet")
        }
        with caplog.at_level(logging.WARNING):
            trainer.train()
        assert "files of kept episodes" in caplog.text and "are deleted" in caplog.text
        assert kept(tmp_path) == {**whole, **first}

    def test_the_same_trainer_trains_again(self, tmp_path, whole):
        trainer = make_trainer(tmp_path, **self.KWARGS)
        trainer.train()
        trainer.train()
        assert sorted(kept(tmp_path)) == sorted(whole)

    def test_an_evaluation_takes_the_place_of_an_earlier_one(self, tmp_path):
        trainer = make_trainer(tmp_path, dataset=ROWS, per_device_eval_batch_size=4)
        trainer.evaluate()
        trainer.evaluate(ROWS.select([1]))
        trainer.evaluate(ROWS.select([0, 1]), metric_key_prefix="test")
        sizes = {name: len(rows) for name, rows in kept(tmp_path).items()}
        assert sizes == {panel_file(None, 0): 4, panel_file("test", 0): 8}


def table(size: int) -> pa.Table:
    return pa.table({"bytes": [bytes(torch.randint(256, (size,), dtype=torch.uint8).tolist())]})


class TestDisk:
    def test_bound(self, tmp_path, caplog):
        files = EpisodeFiles(tmp_path / "one", 10**6)
        files.write(training_file(0), table(4000))
        bound = 14 * sum(files.sizes.values())
        files = EpisodeFiles(tmp_path, bound)
        shutil.rmtree(files.folder / "one")
        for step in range(40):
            if files.wants(step):
                files.write(training_file(step), table(4000))
            if step % 4 == 0:
                files.write(panel_file("iid", step), table(2000))
            present = {path.relative_to(tmp_path).as_posix(): path.stat().st_size for path in tmp_path.rglob("*.*")}
            assert present == files.sizes and sum(present.values()) <= bound
            assert panel_file("iid", 0) in present and panel_file("iid", step // 4 * 4) in present
        training = sorted(name for name in files.sizes if name.startswith("train/"))
        assert training == [training_file(step) for step in range(0, 40, files.stride)] and files.stride == 8
        assert sum("keep_episodes_megabytes" in message for message in caplog.messages) == 1

    def test_evaluations_of_the_first_and_the_last_weights_stay(self, tmp_path):
        files = EpisodeFiles(tmp_path, 100)
        for step in range(20):
            files.write(panel_file("iid", step), table(4000))
        assert sorted(files.sizes) == [panel_file("iid", 0), panel_file("iid", 19)]

    def test_a_resumed_run_deletes_the_same(self, tmp_path):
        kwargs = {**TestResume.KWARGS, "max_steps": 14, "steps_per_generation": 1, "keep_episodes_megabytes": 0.08}
        make_trainer(tmp_path / "whole", **kwargs).train()
        whole = kept(tmp_path / "whole")
        assert training_file(0) in whole and training_file(1) not in whole
        terminates = When("on_step_end", 8, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(SystemExit):
            make_trainer(tmp_path / "stopped", terminates, **kwargs).train()
        make_trainer(tmp_path / "stopped", **kwargs).train(resume_from_checkpoint=True)
        assert kept(tmp_path / "stopped") == whole

    def test_panels_never_share_a_file_or_leave_the_folder(self):
        names = ["a", "a/b", "a_b", "a%2Fb", "..", ".", "../x", "%2E.", "ä", "", None, "a b", "/", "\\"]
        paths = {panel_file(name, 1) for name in names}
        assert len(paths) == len(names) - 1  # the last two but one have no name
        for path in paths:
            assert path.count("/") <= 2 and not {".", ".."} & set(path.split("/"))

    def test_a_full_disk(self, tmp_path, caplog):
        files = EpisodeFiles(tmp_path, 10**6)
        files.write(training_file(0), table(3000))
        limit_files(1000)
        try:
            for step in (1, 2):
                files.write(training_file(step), table(3000))
        finally:
            limit_files()
        assert len(caplog.messages) == 1 and "Episodes could not be kept" in caplog.text
        assert [path.name for path in (tmp_path / "train").iterdir()] == ["step-000000.parquet"]  # none is left half
        files.write(training_file(2), table(3000))
        assert sorted(files.sizes) == [training_file(0), training_file(2)]

    def test_a_run_goes_on_without(self, tmp_path, caplog):
        (tmp_path / "episodes").write_text("no folder")
        trainer = make_trainer(tmp_path, dataset=ROWS, per_device_eval_batch_size=4, max_steps=2)
        trainer.train()
        trainer.evaluate()
        assert trainer.state.global_step == 2
        assert "Episodes could not be kept" in caplog.text
