"""
Two real processes (gloo, CPU) against one with the same global batch: replicated and sharded, ragged, broken and slow.
What each process does is in `many_processes.py`.
"""

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import many_processes
import pytest
import torch
from conftest import child_environment, make_model
from many_processes import BEGIN, NUM_EPISODES, play
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification


GAE = {"advantage_estimator": "gae", "context": "window", "gamma": 0.9, "gae_lambda": 0.8}
SAVED = {"save_strategy": "steps", "save_steps": 1}
BEST = {
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_reward",
    "greater_is_better": False,
    "eval_strategy": "steps",
    "eval_steps": 1,
}
FIRST_HALF, SECOND_HALF = list(range(NUM_EPISODES // 2)), list(range(NUM_EPISODES // 2, NUM_EPISODES))

CASES = {
    "dapo": {"settings": {"loss_type": "dapo", "beta": 0.1}, "from_folder": True, "evaluate": True},
    "grpo": {
        "settings": {
            "loss_type": "grpo",
            "advantage_estimator": "gigpo",
            "context": "window",
            "filter_zero_variance_groups": "mask",
            "micro_batches": 2,
        },
        "flat": FIRST_HALF,
    },
    "dr_grpo": {
        "settings": {
            "loss_type": "dr_grpo",
            "advantage_estimator": "turn",
            "max_completion_length": 200,
            "entropy_reference": "turn_history",
            "filter_zero_variance_groups": "resample",
        },
        "flat": SECOND_HALF,
    },
    # TRL takes this one's mean over the tokens of a process: only with as many everywhere it is that of the batch.
    "bnpo": {"settings": {"loss_type": "bnpo"}, "even": True, "slow": [5]},
    "gae": {"settings": GAE | {"critic_warmup_steps": 1, "micro_batches": 2}},
    "a rank fails": {"settings": GAE, "broken": SECOND_HALF},
    "all fail": {"settings": {}, "broken": FIRST_HALF + SECOND_HALF},
}
# Of sharded weights; "resumed" goes on from the checkpoint that the case before it has written.
SHARDED_CASES = {
    "ragged": {"settings": {"loss_type": "dapo", "beta": 0.1}, "from_folder": True, "evaluate": True},
    "windows": {"settings": GAE | SAVED | {"micro_batches": 2, "gradient_checkpointing": True}},
    "resumed": {"settings": GAE | SAVED | {"micro_batches": 2, "gradient_checkpointing": True}, "resume": "windows"},
    "lora": {"settings": GAE | SAVED | {"learning_rate": 5.0, "critic_learning_rate": 5.0}, "lora": True},
    "lora resumed": {
        "settings": GAE | SAVED | {"learning_rate": 5.0, "critic_learning_rate": 5.0},
        "lora": True,
        "resume": "lora",
    },
    "best": {"settings": GAE | SAVED | BEST},
    "a rank fails": {"settings": GAE | {"critic_warmup_steps": 1}, "from_folder": True, "broken": SECOND_HALF},
}
# What is large and not tied accelerate shards in another way
GENERATES = {"settings": {}, "generates": True, "model": {"tied": False}}
BF16 = {"settings": {"bf16": True}}
OVERFLOW = {"settings": GAE | {"critic_warmup_steps": 1}, "overflow": 1}
# On the first process, for the checkpoints of these steps
NO_ROOM = SHARDED_CASES["windows"] | {"no_room": [2, 3]}
UNTRAINED = {"settings": {}, "train": False, "evaluate": True}
ACCELERATE = [
    "--num_processes=2",
    "--num_machines=1",
    "--mixed_precision=no",
    "--dynamo_backend=no",
    "--main_process_port=0",
]

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")


def launch(cases: dict, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """The cases, one after the other, on two processes."""
    make_model().save_pretrained(folder / BEGIN)
    script = str(Path(many_processes.__file__))
    # `--multi_gpu` starts one process for each of `num_processes`, with `--cpu` there would be one; devices are not its matter
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", *ACCELERATE, script]
    command += [json.dumps(cases), str(folder)]
    return subprocess.run(command, env=child_environment(**environment), capture_output=True, text=True, timeout=900)


def sharded(kind: str, folder: Path) -> dict:
    """The cases with weights that are sharded in one way."""
    cases = {}
    for name, case in SHARDED_CASES.items():
        case = case | {"kind": kind}
        if "resume" in case:
            case["resume"] = str(folder / f"{kind} {case['resume']}" / "checkpoint-2")
        cases[f"{kind} {name}"] = case
    return cases


def read(folder: Path, name: str, rank: int = 0) -> tuple[dict, dict]:
    """What a process says of a case, and all weights at its end."""
    return json.loads((folder / name / f"{rank}.json").read_text()), torch.load(folder / name / "weights.pt")


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """One process' results of a case, each played once."""
    folder, played = tmp_path_factory.mktemp("one"), set()
    make_model().save_pretrained(folder / BEGIN)

    def result(name: str, case: dict):
        if name not in played:
            (folder / name).mkdir()
            play({key: value for key, value in case.items() if key not in ("kind", "resume", "slow")}, folder / name)
            played.add(name)
        return read(folder, name)

    return result


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder with two processes' results, with all weights on each and with shards."""
    folder = tmp_path_factory.mktemp("two")
    more = {"fsdp2 bf16": BF16 | {"kind": "fsdp2"}, "fsdp2 overflow": OVERFLOW | {"kind": "fsdp2"}}
    more |= {
        "fsdp2 generates": GENERATES | {"kind": "fsdp2"},
        "no room": NO_ROOM,
        "fsdp2 no room": NO_ROOM | {"kind": "fsdp2"},
    }
    done = launch(CASES | sharded("fsdp2", folder) | more, folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def zero(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zero")
    cases = sharded("zero2", folder) | sharded("zero3", folder) | {"untrained": UNTRAINED | {"kind": "zero3"}}
    done = launch(cases, folder, ACCELERATE_USE_DEEPSPEED="true", DS_ACCELERATOR="cpu")
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def assert_equal(found: tuple[dict, dict], expected: tuple[dict, dict], but: tuple[str, ...] = ()) -> None:
    """Logs of training and evaluation, entropy history and all weights agree within what fp32 can."""
    but = (*but, "runtime", "per_second", "step_time", "time/", "memory/", "epoch")
    entries = {entry["step"]: entry for entry in expected[0]["logs"] if "loss" in entry}
    evaluations = [[e for e in logs if "eval_reward" in e] for logs in (found[0]["logs"], expected[0]["logs"])]
    pairs = [(entry, entries[entry["step"]]) for entry in found[0]["logs"] if "loss" in entry]
    assert (pairs or evaluations[0]) and len(evaluations[0]) == len(evaluations[1])
    for entry, other in pairs + list(zip(*evaluations, strict=True)):
        names = [name for name in sorted(entry.keys() | other.keys()) if not any(part in name for part in but)]
        differing = {
            name: (entry.get(name), other.get(name))
            for name in names
            if not _close(entry.get(name, math.nan), other.get(name, math.nan))
        }
        assert not differing
    torch.testing.assert_close(_numbers(found[0]["history"]), _numbers(expected[0]["history"]), rtol=1e-5, atol=1e-6)
    assert found[1].keys() == expected[1].keys()
    for model, weights in expected[1].items():
        for name, weight in weights.items():
            torch.testing.assert_close(found[1][model][name], weight, rtol=1e-4, atol=5e-6, msg=f"{model} {name}")


def _close(found: float | None, expected: float | None) -> bool:
    if found is None or expected is None:
        return found is expected
    return math.isclose(found, expected, rel_tol=1e-4, abs_tol=1e-5)


def _numbers(content) -> list[float]:
    """All numbers in a nested content."""
    if isinstance(content, dict):
        content = list(content.values())
    if isinstance(content, list):
        return [number for each in content for number in _numbers(each)]
    return [] if content is None else [float(content)]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_one(one, two, name):
    found = read(two, name)
    assert (found[0]["kind"], found[0]["world"]) == ("MULTI_CPU", 2)
    assert read(two, name, rank=1)[0]["history"] == found[0]["history"]
    assert_equal(found, one(name, CASES[name]))


def test_a_rank_whose_episodes_all_fail_costs_these_only(one, two):
    begin = make_model().state_dict()
    for name, share, is_trained in (("a rank fails", 0.5, True), ("all fail", 1.0, False)):
        state, weights = read(two, name)
        steps = [entry for entry in state["logs"] if "loss" in entry]
        assert [entry["episode/stop/failure"] for entry in steps] == [share] * 3
        assert not any(math.isnan(value) for entry in steps for value in entry.values() if value is not None)
        assert is_trained != all(torch.equal(weights["policy"][key], weight) for key, weight in begin.items())


@pytest.mark.parametrize("name", SHARDED_CASES)
def test_fsdp2_equals_one_process(one, two, name):
    assert_sharded_equals_one(one, two, "fsdp2", "FSDP", name)


def test_fsdp2_where_turns_go_through_generate(one, two):
    assert_equal(read(two, "fsdp2 generates"), one("generates", GENERATES))


def test_entropies_of_fsdp2_are_not_rounded_to_bf16(one, two):
    found, expected = (state["logs"][0]["epo/entropy"] for state, _ in (read(two, "fsdp2 bf16"), one("bf16", BF16)))
    assert found == pytest.approx(expected, rel=1e-4)  # bf16 is as far as 2e-3 away


def test_a_step_that_is_not_finite_is_left_out_by_all_of_fsdp2(one, two):
    found, expected = read(two, "fsdp2 overflow"), one("overflow", OVERFLOW)
    steps = [entry for entry in found[0]["logs"] if "loss" in entry]
    assert [entry["faults/nonfinite_steps"] for entry in steps] == [0, 1, 1]
    assert_equal(found, expected, but=("grad_norm",))


@pytest.mark.parametrize("name", ["no room", "fsdp2 no room"])
def test_a_checkpoint_without_room_is_left_out_by_all(one, two, name):
    # The second could be done without, the third, which is the last, could not.
    assert_equal(read(two, name), one("sharded windows", SHARDED_CASES["windows"]))
    for rank in range(2):
        error = read(two, name, rank)[0]["error"]
        assert "checkpoint-3 could not be written" in error
        assert f"The last whole one is {two / name / 'checkpoint-1'}" in error
    assert [path.name for path in (two / name).glob("checkpoint-*")] == ["checkpoint-1"]


def test_what_fsdp2_saves_is_whole(two):
    _, weights = read(two, "fsdp2 windows")
    checkpoint = two / "fsdp2 windows" / "checkpoint-3"
    models = {
        "policy": AutoModelForCausalLM.from_pretrained(checkpoint),
        "critic": AutoModelForTokenClassification.from_pretrained(checkpoint / "critic" / "model"),
    }
    for kind, model in models.items():
        for name, weight in model.state_dict().items():
            torch.testing.assert_close(weight, weights[kind][name], rtol=0, atol=0)


@needs_deepspeed
@pytest.mark.parametrize("name", SHARDED_CASES)
@pytest.mark.parametrize("kind", ["zero2", "zero3"])
def test_deepspeed_equals_one_process(one, zero, kind, name):
    assert_sharded_equals_one(one, zero, kind, "DEEPSPEED", name)


@needs_deepspeed
def test_zero3_evaluates_without_training(one, zero):
    assert_equal(read(zero, "untrained"), one("untrained", UNTRAINED), but=("model_preparation_time",))


def assert_sharded_equals_one(one, folder: Path, kind: str, distributed_type: str, name: str) -> None:
    case = SHARDED_CASES[name]
    found = read(folder, f"{kind} {name}")
    assert (found[0]["kind"], found[0]["world"]) == (distributed_type, 2)
    played = case.get("resume", name)
    assert_equal(found, one(f"sharded {played}", SHARDED_CASES[played]))
    if "resume" in case:
        assert len([entry for entry in found[0]["logs"] if "loss" in entry]) == 3  # two of them from the checkpoint
        for model, weights in read(folder, f"{kind} {played}")[1].items():
            assert all(torch.equal(found[1][model][name], weight) for name, weight in weights.items())


def test_ranks_wait_as_long_as_the_time_out_says(tmp_path):
    case = {"settings": {"ddp_timeout": 1}, "slow": [5]}
    done = launch({"impatient": case}, tmp_path)
    assert done.returncode != 0
    assert "imed out" in done.stderr
