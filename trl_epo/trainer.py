"""`EPOTrainer`: GRPO with EPO's entropy term (arXiv 2509.22576) and multi-turn rollouts in text environments."""

import logging
import os
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from trl.trainer.utils import get_config_model_id

from . import threads_spin
from .batches import action_mask
from .config import EPOConfig
from .credit import CreditAssigner, Critic, TrainCritic, make_critic
from .entropy import EntropyHistory, EntropyTerm, Moment, turn_ids_from_mask
from .reporting import ReportingTrainer
from .reports import PAPER
from .rollouts import (
    ActionParser,
    ChatEncoder,
    EnvironmentPool,
    EpisodePlayer,
    FirstRow,
    PromptBuilder,
    TooManyFailures,
    check_first_row,
    check_num_rows,
    check_other_arguments,
    check_prompt_column,
    check_reward_is_given,
    check_text_episode_arguments,
    episode_return,
    episode_reward_weights,
    make_environment_pool,
    placeholder_dataset,
    set_defaults,
    set_turn_length,
)
from .runs import sole_run
from .seams import replaced


logger = logging.getLogger(__name__)

HISTORY_FILE = "entropy_history.json"
# The model in there is not directly below the checkpoint, where transformers takes every folder with an adapter for one
# of the policy's.
CRITIC_FOLDER = "critic"


class EPOTrainer(ReportingTrainer):
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
            (`list` of [`~trl_epo.Episode`]); `EPOConfig.reward_weights` weights them. Every column of the dataset but `prompt`, `seed` and
            `environment` goes to the environment as `reset(options=…)`; `seed` is the reset seed, if there is
            such a column; `prompt`, if any, comes before the first observation, else the environment's
            `instructions`.
        environment_factory (`Callable` or `dict[str, Callable]`, *optional*):
            Makes an environment. A `gymnasium.Env` whose observations and actions are text plays text episodes; any
            other is TRL's tool environment. With a dictionary each dataset row names its own in `environment`.
        action_parser (`Callable[[str], str | None]`, *optional*):
            Finds the action in the model's text; `None` is an invalid action. Defaults to
            [`~trl_epo.rollouts.rollout.parse_action`] or, where the default prompt of a window asks for the tags, to
            [`~trl_epo.rollouts.rollout.parse_tagged_action`].
        prompt_builder (`Callable[[TurnView], str | list[dict]]`, *optional*):
            Makes a turn's prompt where a window is asked for (`EPOConfig.context`, `context_overflow`), as a user
            message or as all messages. Defaults to [`~trl_epo.rollouts.contexts.build_prompt`] and, where a transcript
            overflows, to [`~trl_epo.rollouts.contexts.describe_turn`].

    Raises:
        TypeError: If `args` is not an [`EPOConfig`], or an environment is given in place of what makes it.
        ValueError: If there is neither a reward nor an environment, the environment does not keep to the contract, or the
            tokenizer has no chat template.
    """

    _tag_names = ["trl", "epo"]
    _name = "EPO"
    _paper = PAPER

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
        self._critic: Critic | None = None

        check_reward_is_given(reward_funcs, environment_factory)
        environments = make_environment_pool(environment_factory, args.env_timeout)
        if environments is not None:
            weakref.finalize(self, environments.close)  # also if what follows raises
            check_text_episode_arguments(args, tools, rollout_func, prompt_builder)
            if train_dataset is None:
                train_dataset = placeholder_dataset(args, environments)
            first_row = check_first_row(environments, train_dataset, args.max_observation_length)
        else:
            check_other_arguments(args, prompt_builder)
            check_prompt_column(train_dataset)
        set_defaults(args, plays_text=environments is not None)
        own_reward = environments is not None and not reward_funcs
        reward_weights = args.reward_weights
        if environments is not None:
            num_reward_funcs = len(reward_funcs or []) if isinstance(reward_funcs, list | None) else 1
            reward_weights = episode_reward_weights(reward_weights, num_reward_funcs)
        if own_reward:
            reward_funcs = [episode_return]
        # Of text episodes TRL learns the weights below, with the return's
        with replaced(args, "reward_weights", reward_weights if environments is None else None):
            super().__init__(
                model=model,
                reward_funcs=list(reward_funcs) if isinstance(reward_funcs, list) else reward_funcs,
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
                environment_factory=None if environments is not None else environment_factory,
            )
        if threads_spin and self.accelerator.device.type == "cpu" and torch.get_num_threads() > 1:
            logger.warning(
                "PyTorch was imported before trl_epo, so that its threads take long to give up their cores: where another program "
                "is busy too, training is many times slower. Begin the script, or the notebook after a restart, with `import trl_epo`."
            )
        self.entropy_term = EntropyTerm(args, self.accelerator)
        if not args.use_adaptive_entropy:
            self.disable_own_entropy_bonus()
        if environments is not None:
            if not own_reward:
                self.add_reward_func(episode_return, episode_return.__name__)
            self.reward_weights = torch.tensor(reward_weights, dtype=torch.float32)
            self._prepare_text_episodes(environments, first_row, action_parser, prompt_builder)

    def _prepare_text_episodes(
        self,
        environments: EnvironmentPool,
        first_row: FirstRow,
        action_parser: ActionParser | None,
        prompt_builder: PromptBuilder | None,
    ) -> None:
        args = self.args
        self.use_played_episodes()
        chat = ChatEncoder(self._tokenizer, self.eos_token_ids, self.chat_template, self.chat_template_kwargs)
        set_turn_length(args, chat.thinks)
        context_length = self.context_length
        if args.max_completion_length is None:
            self.max_completion_length = context_length or args.max_turns * 2 * args.max_turn_length
        player = EpisodePlayer(
            args,
            self.accelerator,
            environments,
            chat,
            max_length=self.max_completion_length,
            context_length=context_length,
            num_generations_eval=self.num_generations_eval,
            action_parser=action_parser,
            prompt_builder=prompt_builder,
        )
        player.check_prompts(first_row)
        self.report_episodes(player, self._tokenizer)
        if args.advantage_estimator == "gae":
            policy = self.accelerator.unwrap_model(self.model)
            self._critic = Critic(
                make_critic(policy, args.critic_model, len(self._tokenizer), args.trust_remote_code),
                args,
                self.accelerator,
            )
            self.add_callback(TrainCritic(self._critic))
        return_weight = self.reward_weights[-1].item()
        self._credit = CreditAssigner(args, self.accelerator, self._critic, return_weight)

    def train(self, *args, **kwargs):
        check_num_rows(self.args, self.train_dataset)
        self.entropy_term.history = EntropyHistory()  # a resumed run loads its own
        with sole_run(self.args.output_dir) if self.is_world_process_zero() else nullcontext():
            return super().train(*args, **kwargs)

    @property
    def entropy_history(self) -> EntropyHistory:
        """The entropies of the RL steps so far."""
        return self.entropy_term.history

    # An RL step k (Algorithm 1): collect trajectories

    def prepare_rows(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        mode, before = self.mode, self.entropy_history.state_dict()
        if mode == "train":
            self.entropy_history.begin_step()
        if self._player is None:
            return rows
        step, rl_step = self.state.global_step, self.entropy_history.step
        try:
            with (
                self.times.rollout(self._player.environments),
                self.turn_sampler(self._player.longest_context) as sampler,
            ):
                sampler = self.times.counted(sampler)
                self._batch = self._player.play(rows, mode, sampler, step, rl_step, self._credit.flat_episodes)
        except TooManyFailures as error:
            self.entropy_history.load_state_dict(before)
            folder = self.save_last_checkpoint()
            raise RuntimeError(
                f"{error} When the environment is mended, go on from {folder} with `resume_from_checkpoint=True`."
            ) from error
        self.set_played_batch(self._batch)
        if mode == "eval":
            self.report_panel_batch(rl_step + 1)
        penalty = self.args.invalid_action_penalty
        return [
            {**row, "prompt": episode.prompt, "episodes": episode, "invalid_action_penalty": penalty}
            for row, episode in zip(rows, self._batch.episodes, strict=True)
        ]

    # Advantages

    def extend_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        if self._player is None:
            batch["turn_ids"] = turn_ids_from_mask(action_mask(batch))
        else:
            batch["turn_ids"] = self.padded(self._batch.turn_ids, -1)
            if self.loss_context_ids is not None:
                batch["context_ids"] = self.loss_context_ids
            if self.mode == "train":
                self._assign_credit(batch)
                self.report_batch(batch, self.entropy_history)
        num_episodes = action_mask(batch).bool().any(dim=1).sum()
        batch["num_episodes_in_batch"] = self.accelerator.gather(num_episodes).sum()
        return batch

    def _assign_credit(self, batch: dict[str, Any]) -> None:
        metrics = {}
        if self.args.filter_zero_variance_groups:
            metrics = self._credit.mask_flat_groups(batch, self.episode_rewards)
            metrics["groups/resampled"] = self._batch.num_resampled
        metrics |= self._credit.assign(batch, self._batch.episodes, self.episode_rewards)
        self.add_metrics(metrics)

    # L_MT − λ·(L_H − β_k·L_smooth), and H̄_k for the history

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        moment = self._moment
        value_loss = None
        if self._critic is not None and moment.train:  # first: its activations are gone when the policy's come
            alone = self.entropy_history.step < self.args.critic_warmup_steps
            value_loss, of_critic = self._credit.train_critic(inputs, moment.micro_batches, alone)
            self.add_metrics(of_critic)
        with self.capture_entropies() as captured:
            policy_loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if len(captured) != 1:
            raise RuntimeError(
                f"TRL computed token entropies {len(captured)} times in one loss instead of once. This version of TRL "
                "does not fit trl_epo; `pip install trl-epo` installs one that does."
            )
        metrics: dict[str, Any] = {}
        loss = policy_loss
        if self.entropy_term.acts:
            added, metrics = self.entropy_term.loss(captured[0], inputs, moment, policy_loss.detach())
            loss = policy_loss + added
        metrics |= self.entropy_term.observe(captured[0].detach(), inputs, moment)
        self.add_metrics({f"epo/{name}": value for name, value in metrics.items()})
        if value_loss is not None:
            loss = (0.0 * loss if alone else loss) + value_loss
        return loss

    @property
    def _moment(self) -> Moment:
        """Where in the run a loss is being computed."""
        return Moment(
            train=self.mode == "train",
            max_steps=self.state.max_steps,
            micro_batches=self.current_gradient_accumulation_steps if self.mode == "train" else 1,
            first_pass=self.optimizer_micro_step < self.args.steps_per_generation,
            step_ends=self.accelerator.sync_gradients,
        )

    def note_scores(self, batch: dict[str, Any], logprobs: Tensor, entropies: Tensor) -> None:
        moment = self._moment
        if self._player is not None and moment.train and moment.first_pass:
            self.report_scores(batch, logprobs, entropies, self.entropy_term.reference(batch, moment))

    def shape_advantages(self, advantages: Tensor, entropies: Tensor) -> Tensor:
        return self.entropy_term.shape_advantages(advantages, entropies)

    def create_scheduler(self, num_training_steps, optimizer=None):
        if self._critic is not None:
            self._critic.prepare(num_training_steps)
        return super().create_scheduler(num_training_steps, optimizer)

    # Checkpoints

    def save_extras(self, checkpoint: str) -> None:
        if self._critic is not None:  # first, since all processes save it together
            self._critic.save(os.path.join(checkpoint, CRITIC_FOLDER))
        if self.args.should_save:
            self.entropy_history.save(os.path.join(checkpoint, HISTORY_FILE))

    def load_best_extras(self, checkpoint: str) -> None:
        if self._critic is not None:
            self._critic.load_weights(os.path.join(checkpoint, CRITIC_FOLDER))

    def load_extras(self, checkpoint: str) -> None:
        if self._critic is not None:
            self._critic.load(os.path.join(checkpoint, CRITIC_FOLDER))
        self.entropy_history.load(os.path.join(checkpoint, HISTORY_FILE))
