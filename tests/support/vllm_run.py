"""Runs with a real vLLM in colocate mode, which have processes of their own: vLLM takes over process group and threads."""

import json
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from conftest import child_environment, make_model, make_tokenizer
from datasets import Dataset

from trl_epo import EPOConfig, EPOTrainer
from trl_epo.rollouts.rollout import parse_action


def save_model(folder: str | Path, context_length: int = 1024) -> None:
    # Heads of 32, the smallest that vLLM has a kernel for
    make_model(hidden_size=128, context_length=context_length).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def settings(folder: str | Path, **more: Any) -> EPOConfig:
    """The settings of a short run in float32, as no test can tell right from wrong by bfloat16's rounding."""
    return EPOConfig(
        str(folder),
        **{
            "logging_steps": 1,
            "learning_rate": 1e-2,
            "save_strategy": "no",
            "bf16": False,
            "gradient_checkpointing": False,
            "disable_tqdm": True,
            "report_to": [],
            "model_init_kwargs": {"dtype": "float32"},
            "use_vllm": True,
            "vllm_mode": "colocate",
            "vllm_gpu_memory_utilization": 0.1,
            **more,
        },
    )


class ComparingTrainer(EPOTrainer):
    """Compares what vLLM says of the tokens it has sampled with the policy, now and as it was before the last step."""

    former: dict[str, torch.Tensor] | None = None

    def __init__(self, *args, **kwargs):
        self.comparisons = []  # by RL step
        super().__init__(*args, **kwargs)

    def prepare_rows(self, rows):
        rows = super().prepare_rows(rows)
        if self.model.training:
            self.comparisons.append(self.compared())
            self.former = {name: weight.detach().clone() for name, weight in self.model.state_dict().items()}
        return rows

    def compared(self):
        differences = {"now": self.difference(self._batch.episodes)}
        if self.former is not None:
            present = {name: weight.detach().clone() for name, weight in self.model.state_dict().items()}
            self.model.load_state_dict(self.former)
            differences["former"] = self.difference(self._batch.episodes)
            self.model.load_state_dict(present)
        return differences

    @torch.no_grad()
    def difference(self, episodes):
        """Mean and largest absolute difference of the log-probabilities of action tokens, in nats."""
        differences = []
        for episode in episodes:
            ids, sampled = list(episode.prompt_ids), {}
            for number, turn in enumerate(episode.turns):
                ids += turn.observation_ids if number else ()
                sampled.update(enumerate(turn.logprobs, len(ids)))
                ids += turn.action_ids
            scores = self.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
            differences += [abs(scores[place - 1, ids[place]] - logprob) for place, logprob in sampled.items()]
        differences = torch.stack(differences)
        return [differences.mean().item(), differences.max().item()]


def count_rights(completions, episodes, **kwargs) -> list[float]:
    """A reward that differs between the episodes of a group, so that the weights change."""
    return [float(sum("r" in turn.text for turn in episode.turns)) for episode in episodes]


def comparing_trainer(folder: str | Path, rows: list[dict], environment_factory: Any, **more: Any) -> ComparingTrainer:
    """On the saved model: two short-spoken episodes of each row, in the order of the rows."""
    return ComparingTrainer(
        f"{folder}/model",
        reward_funcs=count_rights,
        args=settings(folder, num_generations=2, max_turn_length=8, shuffle_dataset=False, **more),
        train_dataset=Dataset.from_list(rows),
        environment_factory=environment_factory,
        action_parser=parse_action,
    )


def weights_as_they_are() -> AbstractContextManager:
    """vLLM for CPU packs linear weights into a form that TRL's weight sync cannot write to; this leaves them."""

    def plain_gemm(layer, remove_weight):
        layer.cpu_linear = torch.nn.functional.linear

    return mock.patch("vllm.model_executor.layers.utils.dispatch_cpu_unquantized_gemm", plain_gemm)


def run_alone(script: str, folder: Path, *arguments: str, processes: int = 1) -> Any:
    """What a script has left in `record.json` of the folder."""
    environment = child_environment(VLLM_CPU_KVCACHE_SPACE="1")
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *(launcher if processes > 1 else ()), script, str(folder), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "record.json").read_text())
