"""`trl-epo train --dry-run`."""

import resource
import sys
import tempfile
import time

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy
from trl import ModelConfig

from ..config import EPOConfig
from ..rollouts import Episode
from ..text import printable
from ..trainer import EPOTrainer
from .settings import ScriptArguments
from .train import make_train_trainer


class _OneBatch(TrainerCallback):
    """Ends training when a generation batch is used up, and takes the time."""

    def __init__(self, num_steps: int):
        self.num_steps = num_steps  # optimizer steps
        self.total_steps = 0  # of the whole run
        self.seconds = 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self._start, self.total_steps = time.perf_counter(), state.max_steps

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds = time.perf_counter() - self._start
        control.should_training_stop |= state.global_step >= self.num_steps


def dry_run(script: ScriptArguments, args: EPOConfig, model_args: ModelConfig) -> None:
    """
    Play one generation batch, train on it, and print an episode, figures, and what the run would take. All that is written
    goes to a temporary folder; an existing run in `output_dir` is neither read nor touched.
    """
    output_dir = args.output_dir
    with tempfile.TemporaryDirectory(prefix="trl-epo-dry-run-") as folder:
        args.output_dir, args.resume_from_checkpoint = folder, None
        args.report_to, args.push_to_hub, args.log_completions = [], False, False
        args.save_strategy, args.load_best_model_at_end = SaveStrategy.NO, False
        args.logging_strategy, args.logging_steps = IntervalStrategy.STEPS, 1
        args.max_failed_fraction = 1.0  # many failures are told, and stop nothing
        trainer = make_train_trainer(script, args, model_args)  # with the panels, which may be wrong too
        args.eval_strategy, args.eval_on_start = IntervalStrategy.NO, False
        one_batch = _OneBatch(-(-args.steps_per_generation * args.num_iterations // args.gradient_accumulation_steps))
        trainer.add_callback(one_batch)
        trainer.train()
        if trainer.is_world_process_zero():
            print(_report(trainer, one_batch, output_dir))
        trainer.accelerator.end_training()


def _report(trainer: EPOTrainer, one_batch: _OneBatch, output_dir: str) -> str:
    batch = trainer._batch
    played = [episode for episode in batch.episodes if episode.turns and not episode.failed]
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    lengths = [sum(episode.context_lengths) for episode in played] or [0]
    num_steps, total = one_batch.num_steps, one_batch.total_steps
    whole = one_batch.seconds * total / num_steps
    steps = "an optimizer step" if num_steps == 1 else f"{num_steps} optimizer steps"
    lines = [_transcript(played[0]) if played else "All episodes of this process failed; why is in the log above.", ""]
    lines += [
        f"{len(batch.summaries)} episodes, {sum(summary.num_turns for summary in batch.summaries)} actions",
        f"invalid actions    {_percent(logged[0], 'episode/invalid_actions')}",
        f"success            {_percent(logged[0], 'episode/success_rate')}",
        f"equal rewards      {_percent(logged[0], 'frac_reward_zero_std')} of the groups, which teach nothing",
        f"cut turns          {_percent(logged[0], 'episode/cut_turns')}, in a thought {_percent(logged[0], 'episode/cut_thoughts')}",
        f"ended by           {_stop_reasons(logged[0])}",
        f"entropy            {float(logged[0]['entropy']):.3f} nats",
        f"tokens an episode  {sum(lengths) / len(lengths):.0f} on average, {max(lengths)} at most",
        f"loss               {float(logged[0]['loss']):.4g}",
        f"peak memory        {_peak_memory(trainer.args)}",
        f"time               {one_batch.seconds:.1f} s for this batch and {steps} on it",
        f"the whole run      about {_duration(whole)} for {total} optimizer steps, without evaluations and checkpoints",
        "",
        f"Nothing was written to {output_dir}.",
    ]
    return "\n".join(lines)


def _transcript(episode: Episode) -> str:
    ended = f"success: {episode.success}, return: {episode.episode_return:g}, ended: {episode.stop_reason.value}"
    lines = [f"An episode of {len(episode.turns)} turns ({ended})"]
    lines += [f"\n[{message['role']}]\n{message['content']}" for message in episode.prompt]
    for turn in episode.turns:
        mark = " (invalid)" if turn.invalid else ""
        cut = " (cut by the limit on tokens)" if turn.cut else ""
        lines += [f"\n[assistant]{mark}{cut}\n{turn.text}", f"\n[user]\n{turn.observation}"]
    return printable("\n".join(lines))


def _percent(logged: dict[str, float], name: str) -> str:
    return f"{float(logged[name]):.1%}" if name in logged else "not told by the environment"


def _stop_reasons(logged: dict[str, float]) -> str:
    shares = {
        name.removeprefix("episode/stop/"): float(value) for name, value in logged.items() if "episode/stop/" in name
    }
    return ", ".join(f"{reason} {share:.1%}" for reason, share in shares.items() if share) or "nothing"


def _peak_memory(args: EPOConfig) -> str:
    if args.device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB of the GPU, of this process"
    unit = 1 if sys.platform == "darwin" else 1024
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.2f} GiB, of this process"


def _duration(seconds: float) -> str:
    """
    >>> _duration(40), _duration(600), _duration(100_000)
    ('40 s', '10 min', '27.8 h')
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
