"""Log-probabilities and entropies of action tokens: the only ones that carry loss, and the only ones computed."""

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
        aux_loss (`Tensor` or `None`): The mean of the groups' load-balancing losses (mixture of experts).
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
    lengths = is_token.sum(dim=1)
    order = (~is_token).to(torch.uint8).argsort(dim=1, stable=True)  # a row's own tokens first
    packed_ids = input_ids.gather(1, order)
    places = is_token.cumsum(dim=1) - 1  # where each token is in `packed_ids`
    chosen = scored.bool() & is_token[:, -num_scored:] & (places[:, -num_scored:] > 0)

    row_lengths = lengths.tolist()
    max_tokens = max_rows * max(row_lengths) if max_rows else float("inf")
    groups = length_groups(row_lengths, GROUP_OVERHEAD, max_tokens) if split else [list(range(num_rows))]
    has_chosen = chosen.any(dim=1).tolist()
    groups = [group for group in groups if any(has_chosen[row] for row in group)] or groups[-1:]
    found: list[tuple[Tensor, Tensor]] = []
    values: list[tuple[Tensor, Tensor | None, Tensor | None]] = []
    for group in groups:
        rows = torch.tensor(group, device=input_ids.device)
        width = max(row_lengths[row] for row in group)
        row, column = chosen[rows].nonzero(as_tuple=True)
        before = row * width + places[rows][row, column + input_ids.size(1) - num_scored] - 1
        targets = input_ids[rows][row, column + input_ids.size(1) - num_scored]
        if not len(before):  # something must be scored, so that the result is connected to the weights
            before, targets = before.new_zeros(1), targets.new_zeros(1)
        # The mask would say what is so anyway: padding comes last, where no token looks.
        extras = {"attention_mask": _ones(lengths[rows], width), "output_router_logits": True} if aux_loss else {}
        with _keep_only(backbone, before):
            outputs = forward(
                input_ids=packed_ids[rows, :width], shift_labels=targets[None], fused_lm_head=True, **extras
            )
        found.append((rows[row], column))
        values.append((outputs.log_probs[0], outputs.entropy, outputs.aux_loss))
    where = tuple(torch.cat(part) for part in zip(*found, strict=True))

    def spread(parts: list[Tensor]) -> Tensor:
        together = torch.cat(parts)
        if not len(where[0]):
            return together.new_zeros(num_rows, num_scored) + 0.0 * together.sum()
        return together.new_zeros(num_rows, num_scored).index_put(where, together)

    logprobs, entropies, aux_losses = zip(*values, strict=True)
    return Scores(
        logprobs=spread(list(logprobs)),
        entropies=None if entropies[0] is None else spread([entropy[0] for entropy in entropies]),
        aux_loss=torch.stack(aux_losses).mean() if aux_loss else None,
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
