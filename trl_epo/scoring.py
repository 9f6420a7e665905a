"""Log-probabilities and entropies of action tokens: the only ones that carry loss, and the only ones computed."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .batching import length_groups


GROUP_OVERHEAD = 256  # a forward of its own costs about as much as this many padded tokens in a shared one


class Scores(NamedTuple):
    """
    What a model says about tokens.

    Args:
        logprobs (`Tensor`): (B, T), in nats; 0 at tokens that were not to be scored.
        entropies (`Tensor` or `None`): (B, T), in nats; 0 at tokens that were not to be scored.
        aux_loss (`Tensor` or `None`): The load-balancing loss (mixture of experts).
    """

    logprobs: Tensor
    entropies: Tensor | None
    aux_loss: Tensor | None


def score_tokens(
    forward: Callable,
    backbone: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    scored: Tensor,
    max_rows: int | None = None,
    split: bool = True,
    aux_loss: bool = False,
) -> Scores:
    """
    Score chosen tokens of a padded batch. Padding is not computed: rows are cut to their own tokens, and rows of like
    length share a forward. The language-model head sees the chosen tokens only.

    Args:
        forward (`Callable`): A model with TRL's fused head: `forward(input_ids=, shift_labels=, fused_lm_head=True)`.
        backbone (`nn.Module`): The part of it that makes the hidden states.
        input_ids (`Tensor`): (B, L), padded on any side.
        attention_mask (`Tensor`): (B, L), 0 at padding.
        scored (`Tensor`): (B, T), T <= L, 1 at the tokens to score among the last T. A row's first token has no score.
        max_rows (`int`, *optional*): No forward takes more padded tokens than this many of the longest row.
        split (`bool`): Whether rows may be spread over several forwards.
        aux_loss (`bool`): Whether to compute the load-balancing loss.
    """
    num_rows, num_scored = scored.shape
    is_token = attention_mask.bool()
    order = (~is_token).to(torch.uint8).argsort(dim=1, stable=True)  # a row's own tokens first
    packed_ids = input_ids.gather(1, order)
    places = is_token.cumsum(dim=1)[:, -num_scored:] - 1  # of the last T tokens in `packed_ids`
    chosen = scored.bool() & is_token[:, -num_scored:] & (places > 0)

    # A token's score comes from the hidden state before it, so what follows the last chosen token is not needed either;
    # but the load-balancing loss is one over all tokens.
    lengths = is_token.sum(dim=1) if aux_loss else (places * chosen).amax(dim=1)
    row_lengths = lengths.tolist()
    needed = [row for row in range(num_rows) if row_lengths[row]] or [0]
    max_tokens = max_rows * max(row_lengths) if max_rows else math.inf
    groups = [range(len(needed))]
    if split and not aux_loss:
        groups = length_groups([row_lengths[row] for row in needed], GROUP_OVERHEAD, max_tokens)
    found: list[tuple[Tensor, Tensor]] = []
    values: list[tuple[Tensor, Tensor | None]] = []
    for group in groups:
        rows = torch.tensor([needed[index] for index in group], device=input_ids.device)
        width = max(1, *(row_lengths[needed[index]] for index in group))
        row, column = chosen[rows].nonzero(as_tuple=True)
        before = row * width + places[rows][row, column] - 1
        targets = input_ids[rows, -num_scored:][row, column]
        if not len(before):  # something must be scored, so that the result is connected to the weights
            before, targets = before.new_zeros(1), targets.new_zeros(1)
        # The mask would say what is so anyway: padding comes last, where no token looks.
        extras = {"attention_mask": _ones(lengths[rows], width), "output_router_logits": True} if aux_loss else {}
        with _keep_only(backbone, before):
            outputs = forward(
                input_ids=packed_ids[rows, :width], shift_labels=targets[None], fused_lm_head=True, **extras
            )
        found.append((rows[row], column))
        values.append((outputs.log_probs[0], outputs.entropy))
    where = tuple(torch.cat(part) for part in zip(*found, strict=True))

    def spread(parts: list[Tensor]) -> Tensor:
        together = torch.cat(parts)
        if not len(where[0]):
            return together.new_zeros(num_rows, num_scored) + 0.0 * together.sum()
        return together.new_zeros(num_rows, num_scored).index_put(where, together)

    logprobs, entropies = zip(*values, strict=True)
    return Scores(
        logprobs=spread(list(logprobs)),
        entropies=None if entropies[0] is None else spread([entropy[0] for entropy in entropies]),
        aux_loss=outputs.aux_loss if aux_loss else None,
    )


def _ones(lengths: Tensor, width: int) -> Tensor:
    """(B, width), 1 at the first tokens of each row."""
    return (torch.arange(width, device=lengths.device) < lengths[:, None]).long()


def _keep_only(backbone: nn.Module, positions: Tensor):
    """While this context lasts, hidden states (B, L, H) of `backbone` become (1, N, H): those at `positions` of B·L."""

    def keep(module, args, output):
        output.last_hidden_state = output.last_hidden_state.flatten(0, 1)[positions][None]
        return output

    return backbone.register_forward_hook(keep)
