"""Scoring of action tokens only, against TRL's scoring of every token; and how rows are grouped."""

import itertools

import pytest
import torch
from conftest import PATIENT_RUN, Corridor, make_model, shapes_read
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MixtralConfig, MixtralForCausalLM
from trl import GRPOTrainer
from trl.trainer import utils as trl_utils
from trl.trainer.utils import add_fused_lm_head

from trl_epo import EPOConfig, EPOTrainer
from trl_epo.batches.batching import length_groups
from trl_epo.batches.scoring import score_tokens
from trl_epo.seams import trl as _trl_seams


@pytest.fixture(scope="module")
def fused_model():
    model = make_model(vocab_size=50)
    add_fused_lm_head(model, temperature=0.7, outputs=("log_probs", "entropy"))
    return model


def batch(prompt_lengths, completion_lengths, seed=0):
    """Prompts padded on the left, completions on the right, as TRL does; ids, attention, completion width."""
    generator = torch.Generator().manual_seed(seed)
    longest_prompt, longest = max(prompt_lengths), max(completion_lengths)
    ids = torch.randint(3, 50, (len(prompt_lengths), longest_prompt + longest), generator=generator)
    place = torch.arange(ids.size(1))
    begin = longest_prompt - torch.tensor(prompt_lengths)[:, None]
    end = longest_prompt + torch.tensor(completion_lengths)[:, None]
    attention = ((place >= begin) & (place < end)).long()
    return ids * attention, attention, longest


def full_scores(model, ids, attention, width):
    """TRL's way: the whole padded batch, the head at every token."""
    labels = ids.masked_fill(attention == 0, -100)
    labels[:, :-width] = -100
    outputs = model(input_ids=ids, attention_mask=attention, labels=labels, fused_lm_head=True)
    return outputs.log_probs[:, -width:], outputs.entropy[:, -width:]


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@settings(max_examples=25)
@given(st.data())
def test_equals_scoring_every_token(fused_model, data):
    num_rows = data.draw(st.integers(1, 5))
    lengths = st.lists(st.integers(1, 40), min_size=num_rows, max_size=num_rows)
    ids, attention, width = batch(data.draw(lengths), data.draw(lengths), seed=data.draw(st.integers(0, 99)))
    scored = attention[:, -width:] * (torch.rand(num_rows, width) < data.draw(st.sampled_from([0.0, 0.2, 1.0])))
    weight = torch.randn(2, num_rows, width)
    logprobs, entropies = (values * scored for values in full_scores(fused_model, ids, attention, width))
    expected = gradients(fused_model, (logprobs * weight[0] + entropies * weight[1]).sum())
    options = {
        "max_rows": st.sampled_from([None, 1, 2]),
        "recompute": st.sampled_from([None, fused_model]),
        "equal_number": st.sampled_from([None, lambda number: number + 2]),
    }
    for _ in range(2):
        drawn = {name: data.draw(values) for name, values in options.items()}
        scores = score_tokens(fused_model, fused_model.base_model, ids, attention, scored, **drawn)
        torch.testing.assert_close(scores.logprobs, logprobs, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(scores.entropies, entropies, atol=1e-5, rtol=1e-5)
        actual = gradients(fused_model, (scores.logprobs * weight[0] + scores.entropies * weight[1]).sum())
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


@settings(max_examples=25)
@given(st.data())
def test_contexts_are_scored_as_rows_of_their_own(fused_model, data):
    """Episodes of several contexts against each context alone, read in full."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    sizes = st.lists(st.integers(1, 12), min_size=1, max_size=4)
    episodes = [
        [torch.randint(3, 50, (size + 1,), generator=generator) for size in data.draw(sizes)] for _ in range(3)
    ]
    longest_prompt = 4
    rows, attention, context_ids, expected = [], [], [], []
    width = max(sum(map(len, contexts)) for contexts in episodes)
    for contexts in episodes:
        prompt = data.draw(st.integers(1, min(longest_prompt, len(contexts[0]))))  # of the first context
        tokens = torch.cat(contexts)
        left, right = longest_prompt - prompt, width - (len(tokens) - prompt)
        pad = torch.nn.functional.pad
        rows.append(pad(tokens, (left, right)))
        attention.append(pad(torch.ones_like(tokens), (left, right)))
        numbers = torch.cat([torch.full((len(context),), i) for i, context in enumerate(contexts)])
        context_ids.append(pad(numbers[prompt:], (0, right)))
        scores = torch.zeros(2, len(tokens))
        start = 0
        for context in contexts:
            if len(context) > 1:
                output = fused_model(input_ids=context[None], labels=context[None], fused_lm_head=True)
                found = torch.stack([output.log_probs[0], output.entropy[0]])[:, -(len(context) - 1) :]
                scores = scores.index_put(
                    (torch.arange(2)[:, None], torch.arange(start + 1, start + len(context))[None]), found
                )
            start += len(context)
        expected.append(pad(scores[:, prompt:], (0, right)))
    ids, attention, context_ids = torch.stack(rows), torch.stack(attention), torch.stack(context_ids)
    scored = (torch.rand(3, width, generator=generator) < 0.5).long()
    expected = torch.stack(expected, dim=1) * scored
    weight = torch.randn(2, 3, width, generator=generator)
    reference = gradients(fused_model, (expected * weight).sum() + 0.0 * fused_model.model.norm.weight.sum())
    scores = score_tokens(
        fused_model,
        fused_model.base_model,
        ids,
        attention,
        scored,
        context_ids=context_ids,
        max_rows=data.draw(st.sampled_from([None, 1, 2])),
        recompute=data.draw(st.sampled_from([None, fused_model])),
    )
    torch.testing.assert_close(torch.stack([scores.logprobs, scores.entropies]), expected, atol=1e-5, rtol=1e-5)
    actual = gradients(fused_model, (torch.stack([scores.logprobs, scores.entropies]) * weight).sum())
    torch.testing.assert_close(actual, reference, atol=1e-4, rtol=1e-4)


def test_recomputed_forwards_keep_no_activations(fused_model):
    """All forwards but the last are made twice with a gradient; what they kept for it would be one more logit each."""
    ids, attention, width = batch([5] * 6, [60] * 6)
    kept = {}
    for recompute in (None, fused_model):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: saved.append(t.numel()) or t, lambda t: t
        ):
            score_tokens(
                fused_model, fused_model.base_model, ids, attention, attention[:, -width:], max_rows=1,
                recompute=recompute,
            )  # fmt: skip
        kept[recompute is not None] = sum(saved)
    assert kept[True] < kept[False] / 4


def test_computes_neither_padding_nor_the_head_elsewhere(fused_model):
    ids, attention, width = batch([10, 400, 10, 12], [20, 600, 30, 8])
    scored = torch.zeros(4, width, dtype=torch.long)
    scored[:, 5] = 1
    with shapes_read(fused_model) as seen:
        scores = score_tokens(fused_model, fused_model.base_model, ids, attention, scored)
    assert seen == [(1, 405), (3, 17)]  # up to the token before the scored one
    assert (scores.logprobs != 0).sum() == 4


def test_rows_without_a_scored_token_are_not_computed(fused_model):
    ids, attention, width = batch([5, 900], [5, 5])
    scored = torch.zeros(2, width, dtype=torch.long)
    scored[0, 2] = 1
    with shapes_read(fused_model) as seen:
        score_tokens(fused_model, fused_model.base_model, ids, attention, scored)
    assert seen == [(1, 7)]


def test_nothing_to_score_gives_zeros_that_reach_every_weight(fused_model):
    ids, attention, width = batch([5, 3], [5, 5])
    scores = score_tokens(fused_model, fused_model.base_model, ids, attention, torch.zeros(2, width))
    assert not scores.logprobs.any()
    assert not gradients(fused_model, scores.logprobs.sum() + scores.entropies.sum()).any()
    assert all(parameter.grad is not None for parameter in fused_model.parameters())


def test_neither_padding_nor_a_first_token_has_a_score(fused_model):
    ids, attention, _ = batch([3, 1], [4, 6])
    scored = torch.ones(2, 9, dtype=torch.long)  # the whole width
    scores = score_tokens(fused_model, fused_model.base_model, ids, attention, scored)
    assert (scores.logprobs != 0).sum(dim=1).tolist() == [6, 6]  # seven tokens each


def test_forwards_are_bounded(fused_model):
    ids, attention, width = batch([5] * 6, [6] * 6)
    with shapes_read(fused_model) as seen:
        score_tokens(fused_model, fused_model.base_model, ids, attention, attention[:, -width:], max_rows=2)
    assert seen == [(2, 10)] * 3


def test_load_balancing_loss_is_trls(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MixtralConfig(
        vocab_size=50, num_key_value_heads=2, num_local_experts=4, output_router_logits=True, **sizes
    )
    model = MixtralForCausalLM(config)
    add_fused_lm_head(model, temperature=0.7, outputs=("log_probs", "entropy"))
    ids, attention, width = batch([10, 400, 10, 12], [20, 600, 30, 8])
    scored = attention[:, -width:] * (torch.rand(4, width) < 0.2)
    labels = ids.masked_fill(attention == 0, -100)
    extras = {"attention_mask": attention, "output_router_logits": True, "fused_lm_head": True}
    expected = model(input_ids=ids, labels=labels, **extras)
    scores = score_tokens(model, model.base_model, ids, attention, scored, max_rows=1, aux_loss=True)
    torch.testing.assert_close(scores.aux_loss, expected.aux_loss, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scores.logprobs, expected.log_probs[:, -width:] * scored, atol=1e-5, rtol=1e-5)


class FullTrainer(EPOTrainer):
    """Scores every token, with TRL's own code."""

    _get_per_token_logps_and_entropies = GRPOTrainer._get_per_token_logps_and_entropies

    def extend_batch(self, batch):
        self.seen = batch
        return super().extend_batch(batch)

    def compute_loss(self, *args, **kwargs):
        # What `_get_per_token_logps_and_entropies` of the package does for EPO's term
        score = GRPOTrainer._get_per_token_logps_and_entropies

        def noting(*args, **kwargs):
            outputs = score(self, *args, **kwargs)
            self._captured_entropies.append(outputs[1])
            return outputs

        self._get_per_token_logps_and_entropies = noting
        try:
            return super().compute_loss(*args, **kwargs)
        finally:
            del self._get_per_token_logps_and_entropies


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "cispo"])
def test_training_equals_trls_full_scoring(tmp_path, tokenizer, monkeypatch, loss_type):
    """With a reference model, old log-probs of their own, EPO's terms, several tiles, episodes of unlike lengths."""
    monkeypatch.setattr(_trl_seams, "CPU_HEAD_TILE", 64)
    usual_tile, tiles = trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE, []
    head = trl_utils._ChunkedLogProbFunction

    class RecordedHead:
        @staticmethod
        def apply(*args):
            tiles[-1].add(args[5])
            return head.apply(*args)

    monkeypatch.setattr(trl_utils, "_ChunkedLogProbFunction", RecordedHead)
    make_model().save_pretrained(tmp_path / "model")  # the reference model is loaded from where the policy is
    trained = []
    for kind in (FullTrainer, EPOTrainer):
        tiles.append(set())
        trainer = kind(
            str(tmp_path / "model"),
            args=EPOConfig(
                str(tmp_path),
                loss_type=loss_type,
                per_device_train_batch_size=4,
                num_generations=4,
                steps_per_generation=2,
                gradient_accumulation_steps=1,
                num_iterations=2,
                beta=0.1,
                entropy_coef=0.5,
                entropy_corridor_high=1.0,
                max_turn_length=12,
                max_turns=12,
                max_steps=6,
                optim="sgd",
                learning_rate=10.0,
                report_to="none",
                seed=3,
                **PATIENT_RUN,
            ),
            train_dataset=Dataset.from_dict({"length": [1, 30, 2, 40]}),
            processing_class=tokenizer,
            environment_factory=lambda: Corridor(turns=12),
        )
        before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        kl = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
        moved = max(float((a - b).abs().max()) for a, b in zip(before, trainer.model.parameters(), strict=True))
        trained.append((losses, kl, list(trainer.model.parameters()), moved))
    assert tiles == [{usual_tile}, {64}]
    assert usual_tile == trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE
    (full_losses, full_kl, full, moved), (losses, kl, ours, _) = trained
    assert losses == pytest.approx(full_losses, abs=1e-5)
    assert kl == pytest.approx(full_kl, abs=1e-5)
    assert moved > 1e-2
    for a, b in zip(full, ours, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


class TestLengthGroups:
    @given(st.lists(st.integers(1, 50), min_size=1, max_size=7), st.integers(0, 60))
    def test_no_other_grouping_of_neighbours_is_cheaper(self, lengths, overhead):
        def cost(groups):
            return sum(overhead + max(lengths[row] for row in group) * len(group) for group in groups)

        groups = length_groups(lengths, overhead)
        assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
        order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
        for cuts in itertools.product([False, True], repeat=len(lengths) - 1):
            other = [[order[0]]]
            for row, cut in zip(order[1:], cuts, strict=True):
                other.append([row]) if cut else other[-1].append(row)
            assert cost(groups) <= cost(other)

    @given(st.lists(st.integers(1, 50), min_size=1, max_size=9), st.integers(1, 100))
    def test_bound(self, lengths, max_tokens):
        for group in length_groups(lengths, 1000, max_tokens):
            assert len(group) == 1 or max(lengths[row] for row in group) * len(group) <= max_tokens

    def test_nothing(self):
        assert length_groups([], 10) == []
