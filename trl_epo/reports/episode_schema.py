"""
The columns of kept episodes: `episodes/` in a run's folder, parquet files that `datasets.load_dataset` reads.

One row is one episode. `VERSION` changes with every change of the columns or of what they mean.
"""

import pyarrow as pa


VERSION = 1

TURN = pa.struct(
    [
        # What the model read before the action: all that came since its last action or, where `starts_context`, a whole
        # new prompt. As text with the chat template's special tokens, as the model saw it.
        pa.field("prompt", pa.string()),
        pa.field("starts_context", pa.bool_()),  # whether nothing of the turns before was in the context
        pa.field("text", pa.string()),  # what the model wrote, without special tokens
        pa.field("action", pa.string()),  # what went to the environment; null: no action was found in the text
        pa.field("valid", pa.bool_()),  # neither unparsable nor refused by the environment
        pa.field("cut", pa.bool_()),  # whether the token limit ended the text
        pa.field("observation", pa.string()),  # what the environment answered
        pa.field("reward", pa.float64()),  # of the environment for this action
        pa.field("advantage", pa.float64()),  # mean over the turn's tokens; null in evaluation
        pa.field("token_ids", pa.list_(pa.int32())),  # the sampled tokens, special ones included
        pa.field("tokens", pa.list_(pa.string())),  # the same as pieces of text
        pa.field("logprobs", pa.list_(pa.float32())),  # of each token, in nats; null where unknown
        pa.field("entropies", pa.list_(pa.float32())),  # of the distribution at each, in nats; null where unknown
    ]
)

FAILURE = pa.struct(
    [
        pa.field("kind", pa.string()),  # `FailureKind`
        pa.field("turn", pa.int32()),  # how many turns had been played
        pa.field("cause", pa.string()),
    ]
)

SCHEMA = pa.schema(
    [
        pa.field("version", pa.int32()),
        pa.field("mode", pa.string()),  # "train" or "eval"
        pa.field("panel", pa.string()),  # name of the evaluation set; null: it has none, or training
        pa.field("step", pa.int64()),  # optimizer steps made when it was played
        pa.field("rl_step", pa.int64()),  # k: batches of fresh episodes before this one
        pa.field("row", pa.int64()),  # its place in the generation batch or in the panel
        pa.field("group", pa.int64()),  # episodes of one group began alike; in a panel: the dataset's row
        pa.field("environment", pa.string()),  # which of several; null if there is one
        pa.field("task", pa.string()),
        pa.field("seed", pa.int64()),  # of `reset`
        pa.field("options", pa.string()),  # of `reset`, as JSON
        pa.field("temperature", pa.float64()),
        pa.field("success", pa.bool_()),  # null: the environment does not say
        pa.field("return", pa.float64()),  # undiscounted sum of the rewards
        pa.field("stop_reason", pa.string()),  # `StopReason`
        pa.field("num_turns", pa.int32()),
        pa.field("num_invalid", pa.int32()),  # turns that were not valid
        pa.field("first_observation", pa.string()),
        pa.field("turns", pa.list_(TURN)),
        pa.field("failures", pa.list_(FAILURE)),  # the attempts to play it that failed
        pa.field("entropy_reference", pa.float64()),  # what the corridor was around, in nats; null: there was none yet
        pa.field("corridor_low", pa.float64()),  # in nats
        pa.field("corridor_high", pa.float64()),
    ],
    metadata={"trl_epo.episodes": str(VERSION)},
)
