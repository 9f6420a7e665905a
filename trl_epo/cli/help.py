"""What `--help` of the commands says: the options that most runs need. `--help-all` shows the rest, in the groups below."""

import argparse
import re

from ..envs.names import ENVIRONMENTS


Lines = tuple[tuple[str, str], ...]

_MODEL: Lines = (
    ("--model_name_or_path MODEL", "a model's folder, also one with an adapter, or its name on the Hub"),
    ("--output_dir FOLDER", "where the run's files go"),
)
_ENVIRONMENT: Lines = (
    ("--config FILE", "settings from a YAML file, or one that comes with trl-epo, such as household-small"),
    ("--environment NAME", f"{', '.join(ENVIRONMENTS)} or module:name"),
    ("--environment_kwargs JSON", "its keyword arguments"),
    ("--tasks MODULE:NAME", "function that gives the rows of a split; by default the environment's own"),
    ("--tasks_kwargs JSON", "its keyword arguments"),
)
_CODE: Lines = (
    ("--prompt_builder MODULE:NAME", "makes a turn's prompt where the context is a window"),
    ("--action_parser MODULE:NAME", "finds the action in what the model says"),
)
_TURNS: Lines = (
    ("--max_turns N", "longest episode, in turns"),
    ("--max_turn_length N", "longest action, in tokens, thoughts included"),
    ("--context KIND", "what the model sees: transcript (all turns so far) or window"),
)
_PANELS: Lines = (
    ("--eval_splits SPLIT ...", "the splits that are evaluated, such as iid ood"),
    ("--eval_size N", "rows of each of them"),
    ("--eval_temperature T", "sampling temperature of evaluations"),
)
_ADAPTER: Lines = (
    ("--use_peft", "train a LoRA adapter, not all weights"),
    ("--lora_r R", "its rank"),
    ("--load_in_4bit", "quantize the weights below it (needs bitsandbytes)"),
)

# Command -> (what it does, its arguments, its sections)
COMMANDS: dict[str, tuple[str, str, dict[str, Lines]]] = {
    "warm-up": (
        "Imitate an expert, so that training has something to begin with.",
        "[--config FILE] [--OPTION VALUE ...]",
        {
            "Model and environment": (*_MODEL, *_ENVIRONMENT, *_CODE),
            "Whom to imitate": (
                ("--noise SHARE", "share of the environment's expert's actions that are mistakes"),
                ("--from RUN", "a run's kept episodes, not the expert"),
                ("--chats FILE", "chats, one a line, as JSON"),
                ("--teacher URL", "a model behind a chat endpoint, up to /v1"),
                ("--teacher_model NAME", "its name there"),
                ("--success", "only episodes that succeed"),
                ("--train_size N", "how many rows are shown"),
            ),
            "How long": (
                ("--warm_up_epochs N", "passes over the episodes"),
                ("--warm_up_learning_rate LR", "learning rate of the imitation"),
                ("--warm_up_batch_size N", "episodes per optimizer step"),
                ("--until_success SHARE", "stop when the evaluation sets are solved this often"),
                ("--check_every N", "optimizer steps between two looks at that"),
            ),
            "Episodes and adapter": (*_TURNS, *_ADAPTER),
        },
    ),
    "train": (
        "Train a model in an environment with EPO.",
        "[--config FILE] [--OPTION VALUE ...]",
        {
            "Model and environment": (
                *_MODEL,
                *_ENVIRONMENT,
                ("--train_size N", "rows to train on"),
                ("--reward_funcs MODULE:NAME ...", "rewards besides the episode's return"),
                *_CODE,
            ),
            "Episodes": (*_TURNS, ("--num_generations N", "episodes of a group, which share their start")),
            "EPO": (
                ("--entropy_coef LAMBDA", "weight of the entropy term; 0 is GRPO"),
                ("--entropy_smoothing_coef ALPHA", "weight of the smoothing within it"),
                ("--entropy_corridor_high KAPPA", "upper bound of the entropy, in multiples of its mean so far"),
                ("--advantage_estimator NAME", "grpo, gae (PPO), gigpo or turn"),
            ),
            "Optimisation": (
                ("--learning_rate LR", ""),
                ("--max_steps N", "optimizer steps"),
                ("--per_device_train_batch_size N", "episodes that are trained on at once"),
                ("--gradient_accumulation_steps N", "such batches per optimizer step"),
                ("--beta BETA", "weight of the KL penalty to the model at the start"),
                *_ADAPTER,
                ("--use_vllm", "sample with vLLM"),
            ),
            "Evaluation and saving": (
                ("--eval_steps N", "optimizer steps between evaluations"),
                ("--eval_size N", "rows of each evaluation set"),
                ("--save_steps N", "optimizer steps between checkpoints"),
                ("--report_to NAME", "wandb, trackio, tensorboard or none"),
                ("--resume", "go on from the newest whole checkpoint in the output folder"),
                ("--dry-run", "play one batch, train on it, show it, write nothing"),
            ),
        },
    ),
    "evaluate": (
        "Play the evaluation sets with a model, print a table and write it as JSON.",
        "[--config FILE] [--OPTION VALUE ...]",
        {
            "Model and environment": (
                *_MODEL,
                *_ENVIRONMENT,
                ("--reward_funcs MODULE:NAME ...", "rewards besides the episode's return"),
                *_CODE,
            ),
            "What is played": (
                *_PANELS,
                ("--num_generations_eval N", "episodes of each row"),
                *_TURNS,
                ("--seed N", "of sampling"),
            ),
            "What comes out": (
                ("--results FILE", "the JSON file; by default evaluation.json in the output folder"),
                ("--max_failed_fraction SHARE", "exit status 1 if more of a set's episodes fail"),
            ),
            "How": (
                ("--per_device_eval_batch_size N", "episodes at once"),
                ("--load_in_4bit", "quantize the weights (an adapter is loaded as it was trained)"),
                ("--use_vllm", "sample with vLLM"),
            ),
        },
    ),
    "play": (
        "Let a model play one episode in the terminal, or play it yourself.",
        "[RUN] [--OPTION VALUE ...]",
        {
            "RUN is the folder of a run or of one of its checkpoints. Else": (_MODEL[0], *_ENVIRONMENT, *_CODE),
            "Which episode": (
                ("--split SPLIT", "by default the first of the evaluation splits"),
                ("--row N", "which row of it"),
                ("--seed N", "of sampling"),
                ("--temperature T", "of sampling; by default that of evaluations"),
                ("--human", "you type the actions; no model is needed"),
            ),
            "Episodes": _TURNS,
        },
    ),
}

# Groups of --help-all: the first whose pattern matches an option's whole name takes it.
GROUPS = {
    "Command": r"environment|environment_kwargs|tasks\w*|train_split|eval_splits|train_size|eval_size|reward_funcs"
    r"|prompt_builder|action_parser|resume|dry_run|results|split|row|human",
    "Whom to imitate, and how long": r"noise|learn_\w+|chats|from_run|teacher\w*|success|until_success|check_every|warm_up_\w+",
    "EPO": r"entropy_\w+|use_adaptive_entropy",
    "Advantages and the critic": r"advantage_\w+|gamma|gae_\w+|gigpo_\w+|critic_\w+|filter_zero\w+|scale_rewards"
    r"|reward_weights|multi_objective\w+|invalid_action_penalty|num_generations",
    "Rollouts": r"max_turn\w*|context\w*|env_\w+|environment_patience|max_concurrent_episodes|max_failed_fraction"
    r"|max_observation_length|max_completion_length|max_tool\w+|chat_template\w*|temperature|top_[pk]|min_p"
    r"|repetition_penalty|generation\w*|cache_implementation|\w+_for_generation|use_transformers\w*|transformers_\w+"
    r"|shuffle_dataset|steps_per_generation|remove_unused_columns|pad_to_\w+",
    "vLLM": r"(use_)?vllm\w*",
    "Loss": r"beta|epsilon\w*|delta|num_iterations|loss_type|importance_\w+|mask_truncated\w*|top_entropy\w*"
    r"|sync_ref_model|ref_model\w*|\w*liger\w*|off_policy\w*|sapo\w*|vespo\w*|use_bias_correction\w*|disable_dropout"
    r"|cast_lm\w*|router_aux\w*|label_\w+|average_tokens\w*|log_multimodal|max_nonfinite_steps",
    "Optimisation": r"learning_rate|lr_\w+|max_steps|num_train_epochs|per_device_train\w*|gradient_\w+|max_grad_norm"
    r"|optim\w*|adam\w*|weight_decay|warmup\w*|bf16|fp16|tf32|seed|data_seed|full_determinism|length_column\w*"
    r"|train_sampling\w*|neftune\w*|auto_find_batch_size|activation_\w+",
    "Model": r"model_\w+|dtype|attn_\w+|trust_remote_code",
    "PEFT": r"use_(peft|rslora|dora)|lora_\w+",
    "Quantization": r"load_in_\w+|\w*bnb\w*",
    "Evaluation": r"\w*eval\w*|metric_for_best\w*|greater_is_better|include_\w+|prediction_loss\w*|load_best\w*|do_predict",
    "Saving and logging": r"output_dir|save\w*|keep_\w+|log\w*|report_to|run_name|project|trackio\w*|disable_tqdm|push\w*"
    r"|hub\w*|resume_from\w*|restore\w*|skip_memory\w*|num_completions\w*|do_train|ignore_data_skip|enable_jit\w*",
    "Processes and devices": r"ddp\w*|fsdp\w*|deepspeed|accelerator_\w+|parallelism\w*|local_rank|use_cpu|dataloader\w*"
    r"|torch\w*|use_cache|debug",
}
OTHERS = "Others"


def command_help(command: str) -> str:
    """The help of a command, on one screen."""
    what, arguments, sections = COMMANDS[command]
    lines = [f"trl-epo {command} {arguments}", what]
    for title, options in sections.items():
        lines += [f"{title}:", *(f"  {option:<32} {text}".rstrip() for option, text in options)]
    more = "Each is a key of the config file too. All, in groups: --help-all. Where an error comes from: --traceback."
    return "\n".join([*lines, more])


def group_of(option: str) -> str:
    """The title of the group that an option belongs to."""
    return next((title for title, names in GROUPS.items() if re.fullmatch(names, option)), OTHERS)


class FullHelp(argparse.ArgumentDefaultsHelpFormatter):
    """One spelling of each option."""

    def _format_action_invocation(self, action):
        name = next(option for option in action.option_strings if "-" not in option[2:])
        return name if action.nargs == 0 else f"{name} {self._format_args(action, action.dest.upper())}"


def all_options(parser: argparse.ArgumentParser) -> str:
    """The help of all options of a parser, in groups."""
    formatter = FullHelp(parser.prog, max_help_position=32, width=119)
    formatter.add_usage(parser.usage, parser._actions, [])
    for title in (*GROUPS, OTHERS):
        actions = [action for action in parser._actions if group_of(action.dest) == title]
        if actions:
            formatter.start_section(title)
            formatter.add_arguments(actions)
            formatter.end_section()
    return formatter.format_help().rstrip()
