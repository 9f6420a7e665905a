"""Log-probabilities and entropies of action tokens: the only ones that carry loss, and the only ones computed."""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .batching import length_groups


# Kinds of distributed training in which each process has all weights.
REPLICATED = tuple(kind for kind in DistributedType if kind.value.startswith("MULTI_"))

# `(ids, positions, targets) -> tuple of (n,)`: values of n tokens. `ids` (rows, columns) are contexts, `positions` the
# places of the tokens before the n tokens in rows·columns, `targets` the n tokens.
Run = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]

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


class Contexts(NamedTuple):
    """
    The contexts of a batch of episodes as rows of their own: R contexts, the longest of W tokens.

    Args:
        ids (`Tensor`): (R, W), a context's tokens first, then padding.
        lengths (`Tensor`): (R,), in tokens.
        row (`Tensor`): (N,), the context of each of the N chosen tokens.
        column (`Tensor`): (N,), its place in there, at least 1.
        where (`tuple[Tensor, Tensor]`): (N,) each, its place in the batch, (B, T).
        shape (`tuple[int, int]`): (B, T).
    """

    ids: Tensor
    lengths: Tensor
    row: Tensor
    column: Tensor
    where: tuple[Tensor, Tensor]
    shape: tuple[int, int]


def lay_out_contexts(
    input_ids: Tensor, attention_mask: Tensor, chosen: Tensor, context_ids: Tensor | None
) -> Contexts:
    """
    Take the contexts of each episode apart.

    Args:
        input_ids (`Tensor`): (B, L), padded on any side.
        attention_mask (`Tensor`): (B, L), 0 at padding.
        chosen (`Tensor`): (B, T), T <= L, 1 at the tokens of interest among the last T. A context's first token has no
            token before it and is left out.
        context_ids (`Tensor`, *optional*): (B, T), the context of each of the last T tokens, never falling; the tokens
            before them belong to context 0. `None`: each episode is one context.
    """
    num_episodes, length = input_ids.shape
    is_token = attention_mask.bool()
    context = torch.zeros_like(input_ids)
    if context_ids is not None:
        context[:, length - context_ids.size(1) :] = context_ids
    context = context.masked_fill(~is_token, 0)
    num_contexts = int(context.max()) + 1
    key = context + num_contexts * torch.arange(num_episodes, device=input_ids.device)[:, None]
    sizes = torch.zeros(num_episodes * num_contexts, dtype=torch.long, device=input_ids.device)
    sizes = sizes.scatter_add(0, key.flatten(), is_token.flatten().long())  # by (episode, context)
    before = sizes.view(num_episodes, num_contexts).cumsum(dim=1).flatten() - sizes  # tokens of earlier contexts
    column = is_token.cumsum(dim=1) - 1 - before[key]  # (B, L)
    row = ((sizes > 0).cumsum(dim=0) - 1)[key]  # (B, L)
    lengths = sizes[sizes > 0]
    ids = input_ids.new_zeros(len(lengths), int(lengths.max()) if len(lengths) else 0)
    ids[row[is_token], column[is_token]] = input_ids[is_token]
    last = slice(length - chosen.size(1), length)
    where = (chosen.bool() & is_token[:, last] & (column[:, last] > 0)).nonzero(as_tuple=True)
    return Contexts(ids, lengths, row[:, last][where], column[:, last][where], where, tuple(chosen.shape))


def in_forwards(
    run: Run,
    contexts: Contexts,
    max_rows: int | None = None,
    whole: bool = False,
    recompute: Run | None = None,
    equal_number: Callable[[int], int] | None = None,
) -> list[Tensor]:
    """
    Compute values of the chosen tokens. Padding is not computed: contexts of like length share a forward, and what
    follows a context's last chosen token is cut off.

    Args:
        run (`Run`): Computes values of some of the tokens.
        contexts ([`Contexts`]): The batch.
        max_rows (`int`, *optional*): No forward takes more padded tokens than this many of the longest context.
        whole (`bool`): Whether all contexts are computed in one forward, to their ends.
        recompute (`Run`, *optional*): Used instead of `run` for all forwards but the last, and once more for each in
            the backward pass, so that no two have their activations in memory at once.
        equal_number (`Callable[[int], int]`, *optional*): The largest number of forwards over all processes, given that
            of this one: with sharded weights every process must call the model equally often.

    Returns:
        `list[Tensor]`: (B, T) each, 0 at tokens that were not chosen; connected with the weights in any case.
    """
    if whole:
        widths = contexts.lengths.tolist()
        groups = [list(range(len(widths)))]
    else:
        needed = torch.zeros_like(contexts.lengths)
        needed = needed.scatter_reduce(0, contexts.row, contexts.column, "amax")  # a score comes from the token before
        widths = needed.tolist()
        rows = [row for row, width in enumerate(widths) if width]
        max_tokens = max_rows * max(widths) if max_rows and rows else math.inf
        groups = length_groups([widths[row] for row in rows], GROUP_OVERHEAD, max_tokens)
        groups = [[rows[index] for index in group] for group in groups]
    num_forwards = max(1, equal_number(len(groups)) if equal_number else len(groups))
    groups += [[]] * (num_forwards - len(groups))

    members: list[Tensor] = []
    values: list[tuple[Tensor, ...]] = []
    for number, group in enumerate(groups, start=1):
        if group:
            place = torch.full_like(contexts.lengths, -1)
            place[group] = torch.arange(len(group), device=place.device)
            chosen = (place[contexts.row] >= 0).nonzero().flatten()
            row, column = contexts.row[chosen], contexts.column[chosen]
            width = max(widths[row] for row in group)
            ids, positions = contexts.ids[group, :width], place[row] * width + column - 1
            targets = contexts.ids[row, column]
        else:  # nothing to compute, but the result is connected with the weights
            chosen = contexts.row[:0]
            ids = contexts.ids.new_zeros(1, 1)
        if not len(chosen):
            positions = targets = ids.new_zeros(1)
        members.append(chosen)
        if recompute and number < len(groups) and torch.is_grad_enabled():
            values.append(checkpoint(recompute, ids, positions, targets, use_reentrant=False))
        else:
            values.append(run(ids, positions, targets))
    filled = [index for index, chosen in enumerate(members) if len(chosen)]
    results = []
    for parts in zip(*values, strict=True):
        result = parts[0].new_zeros(contexts.shape)
        if filled:
            where = torch.cat([members[index] for index in filled])
            places = tuple(axis[where] for axis in contexts.where)
            result = result.index_put(places, torch.cat([parts[index] for index in filled]))
        for index in set(range(len(parts))) - set(filled):
            result = result + 0.0 * parts[index].sum()
        results.append(result)
    return results


def equal_number_of_forwards(accelerator: Accelerator, model: nn.Module) -> Callable[[int], int] | None:
    """What [`in_forwards`] needs to call such a model equally often on every process; `None` if that does not matter."""
    if accelerator.distributed_type in (DistributedType.NO, *REPLICATED) and not getattr(
        model, "broadcast_buffers", False
    ):
        return None

    def largest(number: int) -> int:
        return int(accelerator.gather(torch.tensor([number], device=accelerator.device)).max())

    return largest


def score_tokens(
    forward: Callable,
    backbone: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    scored: Tensor,
    context_ids: Tensor | None = None,
    max_rows: int | None = None,
    aux_loss: bool = False,
    recompute: Callable | None = None,
    equal_number: Callable[[int], int] | None = None,
) -> Scores:
    """
    Score chosen tokens of a batch of episodes; the language-model head sees no others.

    Args:
        forward (`Callable`): A model with TRL's fused head: `forward(input_ids=, shift_labels=, fused_lm_head=True)`.
        backbone (`nn.Module`): The part of it that makes the hidden states.
        input_ids (`Tensor`): (B, L), padded on any side.
        attention_mask (`Tensor`): (B, L), 0 at padding.
        scored (`Tensor`): (B, T), T <= L, 1 at the tokens to score among the last T. A context's first has no score.
        context_ids (`Tensor`, *optional*): (B, T), see [`lay_out_contexts`].
        max_rows (`int`, *optional*): No forward takes more padded tokens than this many of the longest context.
        aux_loss (`bool`): Whether to compute the load-balancing loss, which is one over all tokens.
        recompute (`Callable`, *optional*): The model to call instead of `forward` where the backward pass computes a
            forward again, see [`in_forwards`]; `None`: all activations are kept.
        equal_number (`Callable`, *optional*): See [`in_forwards`].
    """
    contexts = lay_out_contexts(input_ids, attention_mask, scored, context_ids)
    aux_losses = []

    def run(model: Callable, ids: Tensor, positions: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        # Without a mask: padding comes last, where no token looks.
        extras = {}
        if aux_loss:
            extras = {"attention_mask": _ones(contexts.lengths, ids.size(1)), "output_router_logits": True}
        with keep_only(backbone, positions):
            outputs = model(input_ids=ids, shift_labels=targets[None], fused_lm_head=True, **extras)
        if aux_loss:
            aux_losses.append(outputs.aux_loss)
        return tuple(scores[0] for scores in (outputs.log_probs, outputs.entropy) if scores is not None)

    logprobs, *entropies = in_forwards(
        partial(run, forward),
        contexts,
        max_rows=max_rows,
        whole=aux_loss,
        recompute=partial(run, recompute) if recompute else None,
        equal_number=equal_number,
    )
    return Scores(logprobs, entropies[0] if entropies else None, aux_losses[0] if aux_loss else None)


def _ones(lengths: Tensor, width: int) -> Tensor:
    """(B, width), 1 at the first tokens of each row."""
    return (torch.arange(width, device=lengths.device) < lengths[:, None]).long()


def keep_only(backbone: nn.Module, positions: Tensor):
    """While this lasts, the hidden states (B, L, H) of `backbone` become (1, N, H): those at `positions` of B·L."""

    def keep(module, args, output):
        output.last_hidden_state = output.last_hidden_state.flatten(0, 1)[positions][None]
        return output

    return backbone.register_forward_hook(keep)
