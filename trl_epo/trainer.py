"""`EPOTrainer`: GRPO with EPO's entropy term (arXiv 2509.22576) and multi-turn rollouts in text environments."""

import json
import logging
import math
import os
import random
import sys
import textwrap
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object, set_seed
from torch import Tensor
from transformers.trainer_utils import has_length
from trl import GRPOConfig
from trl.trainer.utils import get_config_model_id

from ._fault_seams import replaced
from ._trl_seams import SeamedGRPOTrainer
from .argument_checks import check_other_arguments, check_text_episode_arguments, episode_reward_weights
from .batching import action_mask
from .chat import ChatEncoder
from .config import EPOConfig
from .contexts import ContextRules, PromptBuilder, build_prompt, describe_turn
from .credit import CreditAssigner
from .critic import Critic, TrainCritic, make_critic
from .entropy_term import EntropyTerm, Moment
from .environment_pool import make_environment_pool
from .episode import Episode, StopReason, episode_row
from .evaluation import evaluation_metrics, failed_share
from .failures import FailureLog
from .generation import TurnSampler
from .history import EntropyHistory
from .metrics import EpisodeSummary, episode_metrics
from .model_card import complete_model_card
from .objective import turn_ids_from_mask
from .rollout import ActionParser, EpisodeStart, Limits, parse_action, parse_tagged_action, play_episodes
from .rows import FirstRow, check_first_row, environment_options, placeholder_dataset
from .run_state import summaries_as_json, summaries_from_json


logger = logging.getLogger(__name__)

HISTORY_FILE = "entropy_history.json"
FAILURES_FILE = os.path.join("episodes", "failures.jsonl")
# The model in there is not directly below the checkpoint, where transformers takes every folder with an adapter for one
# of the policy's.
CRITIC_FOLDER = "critic"
MAX_RESAMPLES = 3  # of a group whose returns are all equal
DEFAULT_COMPLETION_LENGTH = 512  # TRL's default, in tokens
DEFAULT_SAMPLING_MODE = GRPOConfig.vllm_importance_sampling_mode
EPISODE_SAMPLING_MODE = "token_truncate"
# In the place of a row that accelerate repeats, to fill up the last batch of an evaluation.
UNPLAYED = Episode([{"role": "user", "content": ""}], (), (), StopReason.FAILURE)


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
            its own, besides `reward_funcs`, which are then optional and get the keyword argument `episodes`
            (`list` of [`~trl_epo.episode.Episode`]); `EPOConfig.reward_weights` weights them. Every column of the dataset but `prompt`, `seed` and
            `environment` goes to the environment as `reset(options=…)`; `seed` is the reset seed, if there is
            such a column; `prompt`, if any, comes before the first observation.
        environment_factory (`Callable` or `dict[str, Callable]`, *optional*):
            Makes an environment. A `gymnasium.Env` whose observations and actions are text plays text episodes; any
            other is TRL's tool environment. With a dictionary each dataset row names its own in `environment`.
        action_parser (`Callable[[str], str | None]`, *optional*):
            Finds the action in the model's text; `None` is an invalid action. Defaults to
            [`~trl_epo.rollout.parse_action`] or, where the default prompt of a window asks for the tags, to
            [`~trl_epo.rollout.parse_tagged_action`].
        prompt_builder (`Callable[[TurnView], str | list[dict]]`, *optional*):
            Makes a turn's prompt where a window is asked for (`EPOConfig.context`, `context_overflow`), as a user
            message or as all messages. Defaults to [`~trl_epo.contexts.build_prompt`] and, where a transcript
            overflows, to [`~trl_epo.contexts.describe_turn`].

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
        action_parser: ActionParser | None = None,
        prompt_builder: PromptBuilder | None = None,
    ):
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = EPOConfig(f"{name.split('/')[-1]}-EPO")
        if not isinstance(args, EPOConfig):
            raise TypeError(f"`args` is a {type(args).__name__}, but must be an `EPOConfig` (from trl_epo).")
        asks_for_tags = args.context == "window" and prompt_builder is None
        self._action_parser = action_parser or (parse_tagged_action if asks_for_tags else parse_action)
        self._prompt_builder = prompt_builder or (build_prompt if args.context == "window" else describe_turn)
        self._summaries: dict[str, list[EpisodeSummary]] = {"train": [], "eval": []}
        self._num_eval_rows = 0
        self._eval_panel_size = 0  # in episodes
        self._eval_prefix = "eval"
        self._episode_limits: Limits | None = None
        self._episodes: list[Episode] = []  # of the generation batch
        self._num_resampled = 0  # groups that were played again for it
        self._critic: Critic | None = None

        self._environments = make_environment_pool(environment_factory, args.env_timeout)
        if self._environments is not None:
            weakref.finalize(self, self._environments.close)  # also if what follows raises
            check_text_episode_arguments(args, tools, rollout_func, prompt_builder)
            if train_dataset is None:
                train_dataset = placeholder_dataset(args, self._environments)
            first_row = check_first_row(self._environments, train_dataset, args.max_observation_length)
        else:
            check_other_arguments(args, prompt_builder)
        own_reward = self._environments is not None and not reward_funcs
        reward_weights = args.reward_weights
        if self._environments is not None:
            num_reward_funcs = len(reward_funcs or []) if isinstance(reward_funcs, list | None) else 1
            reward_weights = episode_reward_weights(reward_weights, num_reward_funcs)
        if args.vllm_importance_sampling_mode is None:
            text = self._environments is not None
            args.vllm_importance_sampling_mode = EPISODE_SAMPLING_MODE if text else DEFAULT_SAMPLING_MODE
        if args.max_completion_length is None and self._environments is None:
            args.max_completion_length = DEFAULT_COMPLETION_LENGTH

        # Of text episodes TRL learns the weights below, with the return's
        with replaced(args, "reward_weights", reward_weights if self._environments is None else None):
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
        self.entropy_term = EntropyTerm(args, self.accelerator)
        if not args.use_adaptive_entropy:
            self.disable_own_entropy_bonus()
        if self._environments is not None:
            if not own_reward:
                self.add_reward_func(episode_return, episode_return.__name__)
            self.reward_weights = torch.tensor(reward_weights, dtype=torch.float32)
            self._prepare_text_episodes(first_row)

    def train(self, *args, **kwargs):
        self.entropy_term.history = EntropyHistory()  # a resumed run loads its own
        self._summaries["train"].clear()
        if self._environments is not None:
            self._failures.begin("train")
        self._num_resampled = 0
        return super().train(*args, **kwargs)

    @property
    def entropy_history(self) -> EntropyHistory:
        """The entropies of the RL steps so far."""
        return self.entropy_term.history

    # Rollouts: Algorithm 1, "collect trajectories"

    def _prepare_text_episodes(self, first_row: FirstRow) -> None:
        if self.learns_prompts:
            raise ValueError(
                "Text episodes cannot be played with a prompt-learning adapter (prompt tuning, prefix tuning): it puts "
                "virtual tokens before every turn. Use LoRA or another adapter of the weights."
            )
        self.use_played_episodes()
        self._chat = ChatEncoder(self._tokenizer, self.eos_token_ids, self.chat_template, self.chat_template_kwargs)
        context_length = self.model_context_length
        if self.args.use_vllm:
            self.prepare_vllm()
            bounds = (context_length, self.args.vllm_max_model_length, self.vllm_context_length)
            context_length = min(bound for bound in bounds if bound is not None)
        if self.args.max_completion_length is None:
            self.max_completion_length = context_length or self.args.max_turns * 2 * self.args.max_turn_length
        self._episode_limits = Limits(
            max_turns=self.args.max_turns,
            max_turn_length=self.args.max_turn_length,
            max_concurrent_episodes=self.args.max_concurrent_episodes or math.inf,
            patience=self.args.environment_patience,
            max_retries=self.args.env_max_retries,
            max_observation_length=self.args.max_observation_length,
        )
        self._failures = FailureLog(Path(self.args.output_dir, FAILURES_FILE), self.is_world_process_zero())
        self._context_rules = ContextRules(
            self._chat,
            max_length=self.max_completion_length,
            context_length=context_length,
            max_turn_length=self.args.max_turn_length,
            window=self.args.context == "window",
            overflow_to_window=self.args.context_overflow == "window",
            context_turns=self.args.context_turns,
            prompt_builder=self._prompt_builder,
        )
        self._context_rules.check_builder(*first_row)
        if self.args.advantage_estimator == "gae":
            policy = self.accelerator.unwrap_model(self.model)
            model = make_critic(policy, self.args.critic_model, len(self._tokenizer))
            self._critic = Critic(model, self.args, self.accelerator)
            self.add_callback(TrainCritic(self._critic))
        return_weight = self.reward_weights[-1].item()
        self._credit = CreditAssigner(self.args, self.accelerator, self._critic, return_weight)

    def prepare_rows(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        before = self.entropy_history.state_dict()
        if self.mode == "train":
            self.entropy_history.begin_step()
        if self._environments is None:
            return rows
        groups = self._group_numbers(len(rows))
        resamples = MAX_RESAMPLES * (self.mode == "train" and self.args.filter_zero_variance_groups == "resample")
        starts = [
            [self._episode_start(row, group, attempt) for row, group in zip(rows, groups, strict=False)]
            for attempt in range(1 + resamples)
        ]
        with self.turn_sampler() as sampler:  # the model is in evaluation mode in here
            episodes = self._play(starts[0], sampler)
            for others in starts[1:]:
                flat, num_groups = self._credit.flat_episodes(episodes)
                self._num_resampled += num_groups
                for i, episode in zip(flat, self._play([others[i] for i in flat], sampler), strict=True):
                    episodes[i] = episode
        summaries = [EpisodeSummary.of(episode, group) for episode, group in zip(episodes, groups, strict=True)]
        summaries = gather_object(summaries)  # of all processes
        failures = self._failures.share(self.mode, step=self.state.global_step, rl_step=self.entropy_history.step)
        self._check_failed_fraction(summaries, failures, before)
        self._summaries[self.mode] += summaries
        episodes += [UNPLAYED] * (len(rows) - len(groups))
        self._episodes = episodes
        pad_id = self._tokenizer.pad_token_id
        training_rows = [episode_row(episode, pad_id) for episode in episodes]
        if self.args.mask_truncated_completions:
            training_rows = [
                row.masked() if episode.cut_off else row for row, episode in zip(training_rows, episodes, strict=True)
            ]
        logprobs = [row.logprobs for row in training_rows]
        windowed = self.args.context == "window" or self.args.context_overflow == "window"
        self.set_played_batch(
            # A failed episode keeps its place in the batch, but not its prompt, which may be what failed.
            prompt_ids=[[pad_id] if episode.failed else list(episode.prompt_ids) for episode in episodes],
            completion_ids=[row.completion_ids for row in training_rows],
            logprobs=None if None in logprobs else logprobs,
            action_mask=[row.action_mask for row in training_rows],
            completions=[episode.completion for episode in episodes],
            failed=[episode.failed for episode in episodes],
            context_ids=[row.context_ids for row in training_rows] if windowed else None,
        )
        self._turn_ids = [row.turn_ids for row in training_rows]
        penalty = self.args.invalid_action_penalty
        return [
            {**row, "prompt": episode.prompt, "episodes": episode, "invalid_action_penalty": penalty}
            for row, episode in zip(rows, episodes, strict=True)
        ]

    def _play(self, starts: list[EpisodeStart], sampler: TurnSampler) -> list[Episode]:
        episodes = play_episodes(
            starts=starts,
            pool=self._environments,
            rules=self._context_rules,
            sampler=sampler,
            limits=self._episode_limits,
            action_parser=self._action_parser,
        )
        self._failures.note(episodes)
        return episodes

    def _check_failed_fraction(
        self, summaries: list[EpisodeSummary], failures: list[dict[str, Any]], history: dict[str, Any]
    ) -> None:
        """Stop, with a checkpoint, if too many of a generation batch failed; `history` is that of before the batch."""
        num_failed = sum(summary.stop_reason is StopReason.FAILURE for summary in summaries)
        if self.mode == "eval" or num_failed <= self.args.max_failed_fraction * len(summaries):
            return
        self.entropy_history.load_state_dict(history)
        folder = self.save_last_checkpoint()
        first = failures[0]
        raise RuntimeError(
            f"{num_failed} of {len(summaries)} episodes failed, more than `max_failed_fraction="
            f"{self.args.max_failed_fraction}` allows. The first: {first['kind']} after {first['num_turns']} turns: "
            f"{first['cause']}\nAll of them, with tracebacks: {self._failures.path}. When the environment is mended, go on "
            f"from {folder} with `resume_from_checkpoint=True`."
        )

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

    def _episode_start(self, row: dict[str, Any], group: int, attempt: int) -> EpisodeStart:
        """Where the episode of a dataset row begins; the copies of a row, on whatever process, share one seed."""
        seed = row.get("seed")
        if seed is None:
            # Training: a new seed each RL step. Evaluation: the same panel each time.
            train = self.mode == "train"
            seed = derived_seed(self.args.seed, train, self.entropy_history.step if train else 0, group, attempt)
        name = row.get("environment") if self._environments.named else None
        return EpisodeStart(row.get("prompt") or [], seed, environment_options(row), name)

    def evaluation_loop(self, dataloader, *args, metric_key_prefix: str = "eval", **kwargs):
        self._eval_prefix = metric_key_prefix
        randomness = nullcontext()
        if self._environments is not None:
            self._begin_panel(dataloader.dataset)
            randomness = own_randomness(self.args.seed, self.accelerator.device)
        with self.sampling_at(self.args.eval_temperature), randomness:
            return super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)

    def _begin_panel(self, rows) -> None:
        batch_size = self.args.eval_batch_size * self.accelerator.num_processes
        if batch_size % self.num_generations_eval:
            raise ValueError(
                f"An evaluation batch of {batch_size} episodes (`per_device_eval_batch_size` times the processes) "
                f"cannot hold whole groups of {self.num_generations_eval}. Set `num_generations_eval` to a divisor "
                "of it."
            )
        self._num_eval_rows = 0
        self._eval_panel_size = len(rows) * self.num_generations_eval if has_length(rows) else sys.maxsize
        # What an evaluation that was interrupted, or `predict`, has left
        self._summaries["eval"].clear()
        self._failures.begin("eval")
        self.clear_eval_metrics()

    # Credit assignment

    def extend_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        if self._environments is None:
            batch["turn_ids"] = turn_ids_from_mask(action_mask(batch))
        else:
            batch["turn_ids"] = self.padded(self._turn_ids, -1)
            if self.loss_context_ids is not None:
                batch["context_ids"] = self.loss_context_ids
            if self.mode == "train":
                self._assign_credit(batch)
        num_episodes = action_mask(batch).bool().any(dim=1).sum()
        batch["num_episodes_in_batch"] = self.accelerator.gather(num_episodes).sum()
        return batch

    def _assign_credit(self, batch: dict[str, Any]) -> None:
        metrics = {}
        if self.args.filter_zero_variance_groups:
            metrics = self._credit.mask_flat_groups(batch, self.episode_rewards)
            metrics["groups/resampled"] = self._num_resampled
            self._num_resampled = 0
        metrics |= self._credit.assign(batch, self._episodes, self.episode_rewards)
        self.add_metrics(metrics)

    def create_scheduler(self, num_training_steps, optimizer=None):
        if self._critic is not None:
            self._critic.prepare(num_training_steps)
        return super().create_scheduler(num_training_steps, optimizer)

    # Objective: Algorithm 1, "L_MT, L_H, H̄_W, L_smooth, β_k"

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        with self.capture_entropies() as captured:
            policy_loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if len(captured) != 1:
            raise RuntimeError(
                f"TRL computed token entropies {len(captured)} times in one loss instead of once. This version of TRL "
                "does not fit trl_epo; install the version that setup.py names."
            )
        moment = Moment(
            train=self.mode == "train",
            max_steps=self.state.max_steps,
            micro_batches=self.current_gradient_accumulation_steps if self.mode == "train" else 1,
            first_pass=self.optimizer_micro_step < self.args.steps_per_generation,
            step_ends=self.accelerator.sync_gradients,
        )
        metrics, loss = {}, policy_loss
        if self.entropy_term.acts:
            added, metrics = self.entropy_term.loss(captured[0], inputs, moment, policy_loss.detach())
            loss = policy_loss + added
        metrics |= self.entropy_term.observe(captured[0].detach(), inputs, moment)
        self.add_metrics({f"epo/{name}": value for name, value in metrics.items()})
        if self._critic is not None and self.mode == "train":
            self._critic.trains_alone = self.entropy_history.step < self.args.critic_warmup_steps
            if self._critic.trains_alone:
                loss = 0.0 * loss
            value_loss, metrics = self._credit.critic_loss(inputs, self.current_gradient_accumulation_steps)
            self.add_metrics(metrics)
            self._critic.backward(value_loss)
            loss = loss + value_loss.detach()
        return loss

    def shape_advantages(self, advantages: Tensor, entropies: Tensor) -> Tensor:
        return self.entropy_term.shape_advantages(advantages, entropies)

    # Logs and checkpoints

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        metrics_of = episode_metrics if self.mode == "train" else evaluation_metrics
        for name, value in metrics_of(self._summaries[self.mode]).items():
            self.set_metric(name, value)
        if self._environments is not None:
            for name, value in self._failures.metrics(self.mode).items():
                self.set_metric(name, value)
        self._summaries[self.mode].clear()
        if self.mode == "eval":
            if self._environments is not None:
                self.clear_eval_metrics("completions/")  # TRL counts the rows that fill up the last batch too
            self.label_eval_metrics(self._eval_prefix.removeprefix("eval").lstrip("_"))
        super().log(logs, start_time)

    def extend_model_card(self, path: Path) -> None:
        complete_model_card(path, self.args, self.state.log_history)

    def pending_figures(self) -> dict[str, Any]:
        figures = {"episodes": summaries_as_json(self._summaries["train"])}
        if self._environments is not None:
            figures["failures"] = self._failures.counts["train"]
        return figures

    def restore_pending_figures(self, figures: dict[str, Any]) -> None:
        self._summaries["train"] = summaries_from_json(figures["episodes"])
        if self._environments is not None:
            self._failures.counts["train"] = Counter(figures["failures"])

    def save_extras(self, checkpoint: str) -> None:
        if self._critic is not None:  # first, since all processes save it together
            self._critic.save(os.path.join(checkpoint, CRITIC_FOLDER))
        if self.args.should_save:
            with open(os.path.join(checkpoint, HISTORY_FILE), "w") as file:
                json.dump(self.entropy_history.state_dict(), file)

    def may_be_best(self, metrics: dict[str, float]) -> bool:
        name = self.args.metric_for_best_model
        share = failed_share(metrics, f"eval_{name.removeprefix('eval_')}") if name else 0.0
        if share < 1.0 and share <= self.args.max_failed_fraction:
            return True
        logger.warning(
            f"{share:.0%} of the evaluation's episodes failed, more than `max_failed_fraction={self.args.max_failed_fraction}` "
            "allows, or all: what it says does not make this checkpoint the best one."
        )
        return False

    def load_best_extras(self, checkpoint: str) -> None:
        if self._critic is not None:
            self._critic.load_weights(os.path.join(checkpoint, CRITIC_FOLDER))

    def load_extras(self, checkpoint: str) -> None:
        if self._critic is not None:
            self._critic.load(os.path.join(checkpoint, CRITIC_FOLDER))
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


def episode_return(episodes: list[Episode], invalid_action_penalty: list[float], **kwargs) -> list[float]:
    """The reward of a text episode: its return, less `invalid_action_penalty` for each invalid action."""
    return [
        math.fsum(episode.penalised_rewards(penalty))
        for episode, penalty in zip(episodes, invalid_action_penalty, strict=True)
    ]


def derived_seed(seed: int, train: bool, step: int, group: int, attempt: int = 0) -> int:
    """A seed of 32 bits for a group's episodes, well mixed and the same on every machine."""
    parts = [seed, train, step, group, attempt] if attempt else [seed, train, step, group]
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


@contextmanager
def own_randomness(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers from this seed, different ones on each process, in here; afterwards all goes on as before."""
    devices = range(0 if device.type == "cpu" else torch.get_device_module(device).device_count())
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices, device_type=device.type):
            set_seed(seed, device_specific=True)
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def _copied(reward_funcs):
    return list(reward_funcs) if isinstance(reward_funcs, list) else reward_funcs
