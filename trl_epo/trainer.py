"""`EPOTrainer`: GRPO with EPO's entropy term (arXiv 2509.22576) and multi-turn rollouts in text environments."""

import json
import logging
import math
import os
import sys
import textwrap
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers.trainer_utils import has_length
from trl.trainer.utils import get_config_model_id, pad

from ._trl_seams import SeamedGRPOTrainer
from .chat import ChatEncoder
from .config import EPOConfig
from .environment_pool import make_environment_pool
from .episode import Episode, StopReason, episode_row
from .evaluation import evaluation_metrics
from .generation import make_logits_processors
from .history import EntropyHistory
from .metrics import EpisodeSummary, episode_metrics
from .model_card import complete_model_card
from .objective import (
    phase_weight,
    smoothing_penalty,
    token_mean,
    turn_ids_from_mask,
    turn_mean,
)
from .rollout import ActionParser, EpisodeStart, Limits, parse_action, play_episodes
from .rows import check_first_row, environment_options, placeholder_dataset


logger = logging.getLogger(__name__)

HISTORY_FILE = "entropy_history.json"
DEFAULT_COMPLETION_LENGTH = 512  # TRL's default, in tokens
# In the place of a row that accelerate repeats, to fill up the last batch of an evaluation.
UNPLAYED = Episode([{"role": "user", "content": ""}], (), (), StopReason.FAILURE, failure="not played: a repeated row")


class EPOTrainer(SeamedGRPOTrainer):
    """
    Trainer for Entropy-regularized Policy Optimization (EPO), a drop-in replacement for [`~trl.GRPOTrainer`].

    It takes the arguments of `GRPOTrainer` and adds to its loss EPO's term
    −λ·(L_H − β_k·L_smooth) (Eq. 6 of arXiv 2509.22576), see [`EPOConfig`]. Without an environment a completion counts
    as one turn; with TRL's tools or tool environments TRL's own loop runs and a turn is an unbroken run of model
    tokens. With a text environment it plays multi-turn episodes itself:

    ```python
    from trl_epo import EPOConfig, EPOTrainer
    from trl_epo.envs.household import Household, tasks

    trainer = EPOTrainer(
        model="Qwen/Qwen2.5-0.5B-Instruct",
        args=EPOConfig(max_turns=20, max_turn_length=32),
        train_dataset=tasks("train", 1000),
        environment_factory=Household,
    )
    trainer.train()
    ```

    Args:
        model, reward_funcs, args, train_dataset, eval_dataset, …:
            As for [`~trl.GRPOTrainer`], with an [`EPOConfig`]. For text episodes the episode's return is a reward of
            its own, besides `reward_funcs` (weight 1), which are then optional and get the keyword argument
            `episodes` (`list` of [`~trl_epo.episode.Episode`]). Every column of the dataset but `prompt`, `seed` and
            `environment` goes to the environment as `reset(options=…)`; `seed` is the reset seed, if there is
            such a column; `prompt`, if any, comes before the first observation.
        environment_factory (`Callable` or `dict[str, Callable]`, *optional*):
            Makes an environment. A `gymnasium.Env` whose observations and actions are text plays text episodes; any
            other is TRL's tool environment. With a dictionary each dataset row names its own in `environment`.
        action_parser (`Callable[[str], str | None]`, *optional*):
            Finds the action in the model's text; `None` is an invalid action. Defaults to
            [`~trl_epo.rollout.parse_action`].

    Raises:
        TypeError: If `args` is not an [`EPOConfig`].
        ValueError: If the environment does not keep to the contract, or the tokenizer has no chat template.
    """

    _tag_names = ["trl", "epo"]
    _name = "EPO"
    _paper = {
        "title": "EPO: Entropy-regularized Policy Optimization for LLM Agents Reinforcement Learning",
        "id": "2509.22576",
        "citation": textwrap.dedent("""\
            @article{xu2025epo,
                title        = {{EPO: Entropy-regularized Policy Optimization for LLM Agents Reinforcement Learning}},
                author       = {Wujiang Xu and others},
                year         = 2025,
                eprint       = {arXiv:2509.22576},
            }"""),
    }

    def __init__(
        self,
        model,
        reward_funcs=None,
        args: EPOConfig | None = None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        reward_processing_classes=None,
        callbacks=None,
        optimizers=(None, None),
        quantization_config=None,
        peft_config=None,
        tools=None,
        rollout_func=None,
        environment_factory: Callable | dict[str, Callable] | None = None,
        action_parser: ActionParser = parse_action,
    ):
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = EPOConfig(f"{name.split('/')[-1]}-EPO")
        if not isinstance(args, EPOConfig):
            raise TypeError(f"`args` is a {type(args).__name__}, but must be an `EPOConfig` (from trl_epo).")
        self.entropy_history = EntropyHistory()
        self._action_parser = action_parser
        self._summaries: dict[str, list[EpisodeSummary]] = {"train": [], "eval": []}
        self._num_eval_rows = 0
        self._eval_panel_size = 0  # in episodes
        self._eval_prefix = "eval"
        self._episode_limits: Limits | None = None

        self._environments = make_environment_pool(environment_factory)
        if self._environments is not None:
            weakref.finalize(self, self._environments.close)  # also if what follows raises
            if rollout_func is not None:
                raise ValueError("Give either `rollout_func` or a text environment: the latter has its own rollouts.")
            if tools:
                raise ValueError(
                    "`tools` cannot be used with a text environment, whose actions are plain text. Make the "
                    "environment a TRL tool environment (methods instead of `step`), or leave `tools` out."
                )
            generation_kwargs = args.generation_kwargs or {}
            if not (args.use_vllm or args.use_transformers_continuous_batching):
                make_logits_processors(**generation_kwargs)  # raises if it cannot honour them
            elif clash := {"n", "logprobs", "max_tokens", "max_new_tokens"} & generation_kwargs.keys():
                raise ValueError(
                    f"`generation_kwargs` sets {sorted(clash)}, which a text episode sets for each of its turns. Leave "
                    "them out; `max_turn_length` limits a turn."
                )
            if args.loss_type == "dr_grpo" and args.max_completion_length is None:
                raise ValueError(
                    "`loss_type='dr_grpo'` divides by `max_completion_length`, which is not set: give the longest "
                    "episode in tokens, observations included."
                )
            if (
                args.use_vllm
                and args.world_size > 1
                and (args.vllm_mode == "server" or args.vllm_tensor_parallel_size > 1)
            ):
                raise ValueError(
                    "Text episodes on several processes cannot share a vLLM engine: TRL wants equally many requests from "
                    "each, but episodes end at different turns. Use `vllm_mode='colocate'` with "
                    "`vllm_tensor_parallel_size=1`."
                )
            if not args.ds3_gather_for_generation and not args.use_vllm and args.world_size > 1:
                raise ValueError(
                    "`ds3_gather_for_generation=False` makes every process call the model equally often, but text "
                    "episodes end at different turns. Leave it `True`, or use vLLM."
                )
            if train_dataset is None:
                train_dataset = placeholder_dataset(args, self._environments)
            check_first_row(self._environments, train_dataset)
        own_reward = self._environments is not None and not reward_funcs
        if args.max_completion_length is None and self._environments is None:
            args.max_completion_length = DEFAULT_COMPLETION_LENGTH

        super().__init__(
            model=model,
            reward_funcs=[episode_return] if own_reward else _copied(reward_funcs),
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            reward_processing_classes=reward_processing_classes,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
            tools=tools,
            rollout_func=rollout_func,
            environment_factory=None if self._environments is not None else environment_factory,
        )
        if not args.use_adaptive_entropy:
            self.disable_own_entropy_bonus()
        if self._environments is not None:
            self._prepare_text_episodes(own_reward)

    def train(self, *args, **kwargs):
        self.entropy_history = EntropyHistory()  # a resumed run loads its own
        return super().train(*args, **kwargs)

    # Rollouts: Algorithm 1, "collect trajectories"

    def _prepare_text_episodes(self, own_reward: bool) -> None:
        if self.learns_prompts:
            raise ValueError(
                "Text episodes cannot be played with a prompt-learning adapter (prompt tuning, prefix tuning): it puts "
                "virtual tokens before every turn. Use LoRA or another adapter of the weights."
            )
        if not own_reward:
            self.add_reward_func(episode_return, episode_return.__name__)
        self.use_played_episodes()
        self._chat = ChatEncoder(self._tokenizer, self.eos_token_ids, self.chat_template, self.chat_template_kwargs)
        context_length = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if self.args.use_vllm:
            self.prepare_vllm()
            bounds = (context_length, self.args.vllm_max_model_length, self.vllm_context_length)
            context_length = min(bound for bound in bounds if bound is not None)
        if self.args.max_completion_length is None:
            self.max_completion_length = context_length or self.args.max_turns * 2 * self.args.max_turn_length
        self._episode_limits = Limits(
            max_turns=self.args.max_turns,
            max_turn_length=self.args.max_turn_length,
            max_episode_length=self.max_completion_length,
            context_length=context_length,
            max_concurrent_episodes=self.args.max_concurrent_episodes or math.inf,
            patience=self.args.environment_patience,
        )

    def prepare_rows(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if self.mode == "train":
            self.entropy_history.begin_step()
        if self._environments is None:
            return rows
        groups = self._group_numbers(len(rows))
        starts = [self._episode_start(row, group) for row, group in zip(rows, groups, strict=False)]
        with self.turn_sampler() as sampler:  # the model is in evaluation mode in here
            episodes = play_episodes(
                starts=starts,
                pool=self._environments,
                chat=self._chat,
                sampler=sampler,
                limits=self._episode_limits,
                action_parser=self._action_parser,
            )
        summaries = [EpisodeSummary.of(episode, group) for episode, group in zip(episodes, groups, strict=True)]
        self._summaries[self.mode] += gather_object(summaries)
        episodes += [UNPLAYED] * (len(rows) - len(starts))
        pad_id = self._tokenizer.pad_token_id
        training_rows = [episode_row(episode, pad_id) for episode in episodes]
        logprobs = [row.logprobs for row in training_rows]
        self.set_played_batch(
            # A failed episode keeps its place in the batch, but not its prompt, which may be what failed.
            prompt_ids=[[pad_id] if episode.failed else list(episode.prompt_ids) for episode in episodes],
            completion_ids=[row.completion_ids for row in training_rows],
            logprobs=None if None in logprobs else logprobs,
            action_mask=[row.action_mask for row in training_rows],
            completions=[episode.completion for episode in episodes],
            failed=[episode.failed for episode in episodes],
        )
        self._turn_ids = [row.turn_ids for row in training_rows]
        penalty = self.args.invalid_action_penalty
        return [
            {**row, "prompt": episode.prompt, "episodes": episode, "invalid_action_penalty": penalty}
            for row, episode in zip(rows, episodes, strict=True)
        ]

    def _group_numbers(self, num_rows: int) -> list[int]:
        """
        Which group of the generation batch, or which row of the panel, each of this process's dataset rows belongs to.
        Those with which accelerate fills up the last batch of an evaluation come last and get no number.
        """
        if self.mode == "train":
            first = self.accelerator.process_index * num_rows
            return [index // self.num_generations for index in range(first, first + num_rows)]
        first = self._num_eval_rows + self.accelerator.process_index * num_rows
        self._num_eval_rows += num_rows * self.accelerator.num_processes
        last = min(first + num_rows, self._eval_panel_size)
        return [index // self.num_generations_eval for index in range(first, last)]

    def _episode_start(self, row: dict[str, Any], group: int) -> EpisodeStart:
        """Where the episode of a dataset row begins; the copies of a row, on whatever process, share one seed."""
        seed = row.get("seed")
        if seed is None:
            # Training: a new seed each RL step. Evaluation: the same panel each time.
            train = self.mode == "train"
            seed = derived_seed(self.args.seed, train, self.entropy_history.step if train else 0, group)
        name = row.get("environment") if self._environments.named else None
        return EpisodeStart(row.get("prompt") or [], seed, environment_options(row), name)

    def evaluation_loop(self, dataloader, *args, metric_key_prefix: str = "eval", **kwargs):
        self._eval_prefix = metric_key_prefix
        if self._environments is not None:
            batch_size = self.args.eval_batch_size * self.accelerator.num_processes
            if batch_size % self.num_generations_eval:
                raise ValueError(
                    f"An evaluation batch of {batch_size} episodes (`per_device_eval_batch_size` times the processes) "
                    f"cannot hold whole groups of {self.num_generations_eval}. Set `num_generations_eval` to a divisor "
                    "of it."
                )
            self._num_eval_rows = 0
            self._summaries["eval"].clear()  # of an evaluation that was interrupted
            rows = dataloader.dataset
            self._eval_panel_size = len(rows) * self.num_generations_eval if has_length(rows) else sys.maxsize
        with self.sampling_at(self.args.eval_temperature):
            return super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)

    def extend_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        mask = action_mask(batch)
        if self._environments is None:
            batch["turn_ids"] = turn_ids_from_mask(mask)
        else:
            turn_ids = [torch.tensor(ids, device=mask.device) for ids in self._turn_ids]
            batch["turn_ids"] = pad(turn_ids, padding_value=-1, pad_to_multiple_of=self.pad_to_multiple_of)
        num_episodes = mask.bool().any(dim=1).sum()
        batch["num_episodes_in_batch"] = self.accelerator.gather(num_episodes).sum()
        return batch

    # Objective: Algorithm 1, "L_MT, L_H, H̄_W, L_smooth, β_k"

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        with self.capture_entropies() as captured:
            policy_loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if len(captured) != 1:
            raise RuntimeError(
                f"TRL computed token entropies {len(captured)} times in one loss instead of once. This version of TRL "
                "does not fit trl_epo; install the version that setup.py names."
            )
        self._note_entropies(captured[0].detach(), action_mask(inputs), inputs["turn_ids"])
        if not self.args.entropy_coef:
            return policy_loss
        return policy_loss + self._entropy_loss(captured[0], inputs, policy_loss.detach())

    def _entropy_loss(self, entropies: Tensor, inputs: dict[str, Any], policy_loss: Tensor) -> Tensor:
        """−λ·(L_H − β_k·L_smooth), scaled like the policy loss for gradient accumulation."""
        args, history = self.args, self.entropy_history
        train = self.mode == "train"
        mask, turn_ids = action_mask(inputs), inputs["turn_ids"]
        # Sums are divided by the whole batch's counts, so that its split into micro-batches does not matter.
        accumulation = self.current_gradient_accumulation_steps if train else 1
        share = accumulation / args.steps_per_generation if train else 1.0
        share /= self.accelerator.num_processes
        if args.entropy_aggregation == "turn":
            num_episodes = inputs["num_episodes_in_batch"].clamp(min=1) * share

            def aggregate(values):
                return turn_mean(values, mask, turn_ids, num_episodes)
        else:
            num_tokens = inputs["num_items_in_batch"].clamp(min=1) * share

            def aggregate(values):
                return token_mean(values, mask, num_tokens)

        bonus = aggregate(entropies)  # L_H
        smoothing = torch.zeros_like(bonus)  # L_smooth: 0 at k = 0
        phase = self._phase_weight()
        reference = history.reference
        if args.entropy_smoothing != "none" and reference is not None:
            penalty = smoothing_penalty(
                entropies, reference, args.entropy_corridor_low, args.entropy_corridor_high, args.entropy_smoothing
            )
            smoothing = args.entropy_smoothing_coef * aggregate(penalty)
        # A micro-batch holds its share of each part; logged are the parts of a whole optimizer step.
        parts = torch.stack([policy_loss.to(bonus), bonus.detach(), smoothing.detach()])
        parts = self.accelerator.reduce(parts, reduction="mean") * accumulation
        for name, value in zip(("policy_loss", "entropy_bonus", "smoothing_loss"), parts.tolist(), strict=True):
            self.add_metric(f"epo/{name}", value)
        self.add_metric("epo/phase_weight", phase)
        return -args.entropy_coef * (bonus - phase * smoothing)

    def _phase_weight(self) -> float:
        """β_k of the current RL step."""
        if self.args.entropy_smoothing_schedule == "constant":
            return 1.0
        micro_steps = self.state.max_steps * self.args.gradient_accumulation_steps
        total_steps = math.ceil(micro_steps / (self.args.steps_per_generation * self.num_iterations))
        return phase_weight(max(self.entropy_history.step, 0), max(total_steps, 1), self.args.entropy_smoothing_decay)

    def _note_entropies(self, entropies: Tensor, mask: Tensor, turn_ids: Tensor) -> None:
        """Log the entropies of action tokens and, in training, enter them into the current RL step's history."""
        reference = self.entropy_history.reference
        dtype = torch.float32 if entropies.device.type == "mps" else torch.float64  # MPS has no float64
        action = mask.bool()
        num_turns = turn_ids.max(dim=1, keepdim=True).values + 1  # (B, 1)
        late = action & (2 * turn_ids >= num_turns) & (num_turns > 1)
        early = action & ~late
        outside = [torch.zeros_like(action)] * 2
        if reference is not None:
            outside = [
                action & (entropies < self.args.entropy_corridor_low * reference),
                action & (entropies > self.args.entropy_corridor_high * reference),
            ]
        values = torch.where(action, entropies, 0.0).to(dtype)
        sums = [(values * group).sum() for group in (action, early, late)]
        counts = [group.sum().to(dtype) for group in (action, early, late, *outside)]
        totals = self.accelerator.reduce(torch.stack([*sums, *counts]), reduction="sum").tolist()
        total, early_sum, late_sum, count, early_count, late_count, below, above = totals
        if self.mode == "train" and self.optimizer_micro_step < self.args.steps_per_generation:
            # The first pass over the batch: each of its action tokens enters the history once.
            self.entropy_history.observe(total, int(count))
        for name, numerator, denominator in (
            ("entropy", total, count),
            ("entropy_early_turns", early_sum, early_count),
            ("entropy_late_turns", late_sum, late_count),
        ):
            if denominator:
                self.add_metric(f"epo/{name}", numerator / denominator)
        if reference is not None and count:
            self.add_metric("epo/entropy_reference", reference)
            self.add_metric("epo/corridor_low", self.args.entropy_corridor_low * reference)
            self.add_metric("epo/corridor_high", self.args.entropy_corridor_high * reference)
            self.add_metric("epo/below_corridor", below / count)
            self.add_metric("epo/above_corridor", above / count)

    # Logs and checkpoints

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        metrics_of = episode_metrics if self.mode == "train" else evaluation_metrics
        for name, value in metrics_of(self._summaries[self.mode]).items():
            self.set_metric(name, value)
        self._summaries[self.mode].clear()
        if self.mode == "eval":
            self.label_eval_metrics(self._eval_prefix.removeprefix("eval").lstrip("_"))
        super().log(logs, start_time)

    def create_model_card(self, model_name=None, dataset_name=None, tags=None) -> None:
        super().create_model_card(model_name, dataset_name, tags)
        if self.is_world_process_zero():
            complete_model_card(Path(self.args.output_dir) / "README.md", self.args, self.state.log_history)

    def save_extras(self, checkpoint: str) -> None:
        with open(os.path.join(checkpoint, HISTORY_FILE), "w") as file:
            json.dump(self.entropy_history.state_dict(), file)

    def load_extras(self, checkpoint: str) -> None:
        path = os.path.join(checkpoint, HISTORY_FILE)
        if not os.path.exists(path):
            logger.warning(
                "%s has no %s: it was not written by EPOTrainer. The entropy history starts anew.",
                checkpoint,
                HISTORY_FILE,
            )
            return
        with open(path) as file:
            self.entropy_history.load_state_dict(json.load(file))


def action_mask(batch: dict[str, Any]) -> Tensor:
    """The tokens that carry loss, (B, T): those of the completion that the model sampled."""
    mask = batch["completion_mask"]
    return mask * batch["tool_mask"] if "tool_mask" in batch else mask


def episode_return(episodes: list[Episode], invalid_action_penalty: list[float], **kwargs) -> list[float]:
    """The reward of a text episode: its return, less `invalid_action_penalty` for each invalid action."""
    return [
        episode.episode_return - penalty * episode.num_invalid_actions
        for episode, penalty in zip(episodes, invalid_action_penalty, strict=True)
    ]


def derived_seed(seed: int, train: bool, step: int, group: int) -> int:
    """A seed of 32 bits for a group's episodes, well mixed and the same on every machine."""
    return int(np.random.SeedSequence([seed, train, step, group]).generate_state(1)[0])


def _copied(reward_funcs):
    return list(reward_funcs) if isinstance(reward_funcs, list) else reward_funcs
