"""The sampler with a cache across turns against the plain forward over the whole transcript."""

import math
import random
from itertools import count

import pytest
import torch
from conftest import make_model, shapes_read
from huggingface_hub.errors import StrictDataclassClassValidationError
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from samplers import EOS, PAD, Greedy, in_buckets, reference_turn, refuse_caches, sampler
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    Gemma4TextConfig,
    GPT2Config,
    GPTNeoConfig,
    Lfm2Config,
    LlamaConfig,
    LogitsProcessorList,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from trl_epo.sampling import memory
from trl_epo.sampling.cached import forward_overhead, masked_attention, unfit_for_cached_sampler
from trl_epo.sampling.decoding import draw
from trl_epo.sampling.processors import make_logits_processors
from trl_epo.sampling.requests import RequestTurnSampler


class Never:
    """Sampling in which a token never comes."""

    def __init__(self, token):
        self.token = token

    def __call__(self, history, scores):
        return scores.index_fill(1, torch.tensor([self.token]), -float("inf"))


@pytest.fixture
def model():
    return make_model(vocab_size=50).eval()


def sample(sampler, new_ids, limit):
    """One turn of each episode: `new_ids` by episode -> its sample by episode."""
    for episode, ids in new_ids.items():
        sampler.add(episode, ids, limit)
    samples = {}
    while sampler.is_busy:
        samples.update(sampler.advance())
    return samples


class Playing:
    """Plays scripted observations and checks every turn against the plain forward."""

    def __init__(self, model, tokens=range(3, 50), seed=0, max_turn=8):
        self.model, self.tokens, self.max_turn = model, tokens, max_turn
        self.random = random.Random(seed)
        self.transcripts = {}
        self.limits = {}
        self.worst = 0.0

    def draw(self, lowest, highest):
        return self.random.choices(self.tokens, k=self.random.randint(lowest, highest))

    def ask(self, sampler, episode, new_ids):
        self.transcripts.setdefault(episode, []).extend(new_ids)
        self.limits[episode] = self.random.randint(1, self.max_turn)
        sampler.add(episode, new_ids, self.limits[episode])

    def check(self, episode, sample):
        expected_ids, expected_logprobs = reference_turn(self.model, self.transcripts[episode], self.limits[episode])
        assert sample.token_ids == expected_ids
        worst = max(abs(a - b) for a, b in zip(sample.logprobs, expected_logprobs, strict=True))
        self.worst = max(self.worst, worst)
        self.transcripts[episode] += expected_ids


def play(model, num_turns, prompts, max_concurrent, seed=0):
    """Episodes of these numbers of turns, each begun when there is room; asks for turns when the sampler wants them."""
    playing = Playing(model, seed=seed)
    greedy = sampler(model, LogitsProcessorList([Greedy()]))
    queue, left, waiting = list(range(len(num_turns))), dict(enumerate(num_turns)), []
    num_open = 0
    while queue or num_open:
        while greedy.wants_turns and (waiting or (queue and num_open < max_concurrent)):
            for episode in waiting:
                playing.ask(greedy, episode, playing.draw(1, 9))
            waiting = []
            while queue and num_open < max_concurrent:
                episode = queue.pop(0)
                playing.ask(greedy, episode, prompts[episode])
                num_open += 1
        for episode, turn in greedy.advance():
            playing.check(episode, turn)
            left[episode] -= 1
            if left[episode]:
                waiting.append(episode)
            else:
                greedy.drop(episode)
                num_open -= 1
    return playing.worst


def test_thirty_ragged_turns_equal_reading_the_transcript_again(model):
    rng = random.Random(1)
    prompts = [rng.choices(range(3, 50), k=k) for k in (7, 40, 11, 1, 5, 5)]
    assert play(model, [30, 12, 30, 1, 9, 21], prompts, max_concurrent=6) < 1e-4


@settings(max_examples=30)
@given(
    num_turns=st.lists(st.integers(1, 6), min_size=1, max_size=9),
    groups=st.integers(1, 4),
    max_concurrent=st.integers(1, 9),
    seed=st.integers(0, 99),
    buckets=st.booleans(),
)
def test_any_mixture_of_episodes_equals_reading_the_transcript_again(num_turns, groups, max_concurrent, seed, buckets):
    model = make_model(vocab_size=50).eval()
    rng = random.Random(seed)
    prompts = [rng.choices(range(3, 50), k=rng.randint(1, 20)) for _ in range(groups)]
    prompts = [prompts[episode * groups // len(num_turns)] for episode in range(len(num_turns))]
    with in_buckets(buckets):
        assert play(model, num_turns, prompts, max_concurrent, seed) < 1e-4


ARCHITECTURES = {
    "gemma3": lambda **sizes: Gemma3TextConfig(**sizes, head_dim=8, sliding_window=6),  # local and global layers
    "mistral": lambda **sizes: MistralConfig(**sizes, sliding_window=6),
    "qwen2": lambda **sizes: Qwen2Config(**sizes),
    "eager": lambda **sizes: LlamaConfig(**sizes, attn_implementation="eager"),
    "gpt2": lambda **sizes: GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4),  # learnt positions
    "gemma4": lambda **sizes: Gemma4TextConfig(  # head sizes by kind of layer
        **sizes, head_dim=8, global_head_dim=16, sliding_window=6, vocab_size_per_layer_input=50
    ),
}


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_other_architectures(kind, monkeypatch):
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 7}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": 2}
    model = AutoModelForCausalLM.from_config(ARCHITECTURES[kind](**sizes)).eval()
    assert unfit_for_cached_sampler(model, longest_context=128) is None
    rng = random.Random(1)
    prompts = [rng.choices(range(3, 50), k=k) for k in (7, 20, 3)]
    assert play(model, [6, 3, 5], prompts, max_concurrent=2) < 1e-4
    # the same in many small pieces
    monkeypatch.setattr(memory, "PIECE_BYTES", 1)
    monkeypatch.setattr(memory, "FEWEST_TOKENS", 3)
    assert play(model, [6, 3, 5], prompts, max_concurrent=2) < 1e-4
    # in buckets, as on a GPU
    with in_buckets():
        assert play(model, [6, 3, 5], prompts, max_concurrent=2) < 1e-4
    # and what the arithmetic says of the cache
    cached = sampler(model, LogitsProcessorList([Greedy()]))
    sample(cached, {0: [5, 6], 1: [7]}, limit=1)
    layers = [layer.keys[0, :, 0].nbytes + layer.values[0, :, 0].nbytes for layer in cached._cache.layers]
    assert cached._footprint.cached == len(layers) * max(layers)


def test_what_every_architecture_takes():
    names = [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if not name.startswith("musicgen")]
    assert len(names) > 100
    for name in names:
        try:
            config = CONFIG_MAPPING[name]().get_text_config()
        except StrictDataclassClassValidationError:  # no model by itself
            continue
        footprint = memory.Footprint.of(config, torch.bfloat16)
        assert min(footprint.cached, footprint.attended, footprint.read) > 0, name


def test_a_prompt_is_read_once_for_its_group(model):
    with shapes_read(model) as read:
        greedy = sampler(model, LogitsProcessorList([Greedy()]))
        prompt = list(range(3, 43))
        sample(greedy, dict.fromkeys(range(4), prompt), limit=1)
        assert read == [(1, 39), (4, 1)]
        # an episode that follows copies what a running one has read, or takes over what an ended one has
        greedy.drop(2)
        read.clear()
        sample(greedy, {4: prompt}, limit=1)
        assert read == [(1, 1)]
        for episode in (0, 1, 3, 4):
            greedy.drop(episode)
        sample(greedy, {5: prompt}, limit=1)
        assert read == [(1, 1), (1, 1)]


def test_ended_episodes_leave_the_cache(model):
    greedy = sampler(model, LogitsProcessorList([Greedy()]))
    sample(greedy, {episode: [5, 6, episode + 3] for episode in range(8)}, limit=2)
    assert greedy._cache.layers[0].keys.size(0) == 8
    for episode in range(5):
        greedy.drop(episode)
    sample(greedy, {5: [7], 6: [7], 7: [7]}, limit=2)
    assert greedy._cache.layers[0].keys.size(0) == 3


class TestOutOfMemory:
    def test_turns_go_on_fewer_at_a_time(self, model, monkeypatch, caplog):
        refused = refuse_caches(monkeypatch, max_cells=4 * 128)
        rng = random.Random(1)
        prompts = [rng.choices(range(3, 50), k=k) for k in (7, 40, 11, 1, 5, 5)]
        assert play(model, [12, 8, 9, 1, 16, 10], prompts, max_concurrent=6) < 1e-4
        assert len(refused) == len(caplog.messages) == 1
        assert "with 5 episodes" in caplog.text  # one has ended
        assert "at most 2 are in it" in caplog.text and "`max_concurrent_episodes=2`" in caplog.text

    def test_at_any_moment(self, model):
        expected, num_forwards, at_most = self.sampled(model)
        assert at_most == math.inf
        seen = []
        for number in range(1, num_forwards + 1):
            texts, more, at_most = self.sampled(model, refused=number)
            assert texts == expected
            assert (more > num_forwards) == (at_most < math.inf)
            seen.append(at_most)
        num_alone = seen.count(math.inf)  # at last fewer episodes are left, and then one
        assert num_alone < 4 < len(seen)
        assert seen == [2] * seen.count(2) + [1] * seen.count(1) + [math.inf] * num_alone

    @staticmethod
    def sampled(model, refused=0):
        """
        Two turns of four episodes, when that forward is refused memory unless it is for one episode; number of forwards; most
        episodes in the cache.
        """
        torch.manual_seed(0)
        cached = sampler(model, make_logits_processors())
        forwards = count(1)

        def refuse(*args):
            if next(forwards) == refused and len(cached._in_cache()) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

        texts = {i: [] for i in range(4)}
        for i in texts:
            cached.add(i, [i + 5, 3], 3 + i)
        with model.model.register_forward_pre_hook(refuse):
            while cached.is_busy:
                for i, turn in cached.advance():
                    texts[i].append(turn.token_ids)
                    if len(texts[i]) < 2:
                        cached.add(i, [7, 8], 3 + i)
                    else:
                        cached.drop(i)
        return texts, next(forwards) - 1, cached.max_episodes

    def test_not_even_one_episode_fits(self, model, monkeypatch):
        refuse_caches(monkeypatch, max_cells=0)
        greedy = sampler(model, LogitsProcessorList([Greedy()]))
        with pytest.raises(MemoryError, match="a single episode .* of 3 tokens: lower `max_completion_length`"):
            sample(greedy, {0: [5, 6, 7]}, limit=2)

    @pytest.mark.parametrize(
        "text",
        [
            "CUDA error: out of memory",
            "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
            "Triton Error [CUDA]: out of memory",
            "[enforce fail at alloc_cpu.cpp:121] data. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.",
        ],
    )
    def test_whoever_says_that_there_is_no_room(self, text):
        assert memory.is_out_of_memory(RuntimeError(text))
        assert not memory.is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))

    def test_another_error_is_one(self, model):
        with (
            model.model.register_forward_pre_hook(lambda *args: 1 // 0),
            pytest.raises(ZeroDivisionError),
        ):
            sample(sampler(model, make_logits_processors()), {0: [5], 1: [6]}, limit=2)

    @pytest.mark.parametrize(
        ("gib", "packs", "fitting"),
        [(0, True, 1), (3, True, 1), (17, True, 36), (17, False, 27), (17.5, True, 36), (17.9, True, 39)],
    )
    def test_how_many_episodes_fit(self, model, monkeypatch, gib, packs, fitting):
        # An episode of a million tokens takes 384 MB: keys and values · 2 layers · 2 heads · 8 · 4 bytes, and half as much as
        # the cache grows. Of 90 % of what is free, less 2 GiB to read in, the whole GiB count. Where attention repeats one
        # layer's keys and values for 4 query heads, it is 512 MB.
        monkeypatch.setattr(memory, "PACKS_QUERIES", packs)
        monkeypatch.setattr("trl_epo.sampling.cached.free_memory", lambda device: gib * 2**30 + 1000)
        state = torch.get_rng_state()
        cached = sampler(model, make_logits_processors(), longest_context=10**6, bytes_to_come=1000)
        drawn = torch.get_rng_state()
        assert cached.num_fitting() == fitting
        assert torch.equal(torch.get_rng_state(), drawn) and not torch.equal(state, drawn)
        assert sampler(model, make_logits_processors()).max_episodes == math.inf


def test_padding_is_not_read_when_lengths_differ_much(model):
    with shapes_read(model) as read:
        greedy = sampler(model, LogitsProcessorList([Greedy()]))
        sample(greedy, {0: [5] * 900, 1: [6] * 30, 2: [7] * 25}, limit=1)
        assert read == [(1, 899), (2, 29), (3, 1)]


def test_the_head_is_given_a_plain_matrix(model):
    # A slice of longer rows costs a CPU's head ten times as much in float32 and a hundred times in bfloat16.
    given = []
    hook = model.lm_head.register_forward_pre_hook(lambda head, inputs: given.append(inputs[0]))
    sample(sampler(model, LogitsProcessorList([Greedy()])), {0: [5] * 9, 1: [6] * 9, 2: [7] * 3}, limit=2)
    hook.remove()
    assert given
    for hidden in given:
        assert hidden.stride() == (hidden.shape[1] * hidden.shape[2], hidden.shape[2], 1)


@pytest.mark.filterwarnings("error:.*past_key_values:FutureWarning")
@pytest.mark.parametrize("adapter", [False, True])
def test_the_cache_goes_by_the_name_that_the_model_has_for_it(model, adapter):
    if adapter:
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    sample(sampler(model, LogitsProcessorList([Greedy()])), {0: [5] * 9}, limit=2)


def test_what_is_read_at_once_is_bounded(model, monkeypatch):
    greedy = sampler(model, LogitsProcessorList([Greedy()]))
    footprint = greedy._footprint
    # Two contexts of 41 tokens, and half as much for 10 tokens of each of them
    bound = 2 * 2 * 41 * footprint.attended
    monkeypatch.setattr(memory, "PIECE_BYTES", bound)
    monkeypatch.setattr(memory, "FEWEST_TOKENS", 1)
    with shapes_read(model) as read:
        sample(greedy, {0: [5], 1: [6], 2: [7]}, limit=1)
        read.clear()
        long = {0: [8] * 39, 1: [9] * 39, 2: [10] * 30}
        sample(greedy, long, limit=1)
    assert {rows for rows, _ in read} == {2, 1}
    assert sum(rows * tokens for rows, tokens in read) == 40 * 2 + 31  # with the token that each has sampled
    for rows, tokens in read:
        assert rows * (41 * footprint.attended + tokens * (footprint.read + 41 * footprint.pair)) <= bound
    assert len(read) < 40  # as many as fit, not one by one


def test_requests_that_take_as_much_memory_as_they_are_asked_for(model, monkeypatch):
    footprint = memory.Footprint(cached=10, attended=2, read=3, pair=1)
    # A request of 4 tokens and 6 new ones: 10 tokens kept, 4 read, 16 pairs
    monkeypatch.setattr(memory, "PIECE_BYTES", 2 * (10 * 10 + 4 * (2 + 3) + 16))
    assert footprint.requests([1, 4, 1, 3, 9], max_new_tokens=6) == [[4], [1, 3], [0, 2]]
    assert footprint.requests([4, 4], max_new_tokens=6) == [[0, 1]]
    asked = []

    def generate(prompts, max_new_tokens):
        asked.append(prompts)
        return [[prompt[0] + 10] for prompt in prompts], None

    requests = RequestTurnSampler(generate, footprint.requests)
    requests.add(0, [1, 1], 2)  # near the end of its context, which a call for more would overstep
    requests.add(1, [2], 6)
    requests.advance()
    assert asked == [[[1, 1]], [[2]]]
    asked.clear()
    for episode in (0, 1):
        requests.drop(episode)
    samples = sample(requests, {0: [1], 1: [2] * 4, 2: [3], 3: [4] * 9}, limit=6)
    assert asked == [[[4] * 9], [[1], [2] * 4], [[3]]]
    assert {episode: turn.token_ids for episode, turn in samples.items()} == {0: [11], 1: [12], 2: [13], 3: [14]}


def test_after_turns_were_added_the_others_have_missed_nothing(model):
    greedy = sampler(model, LogitsProcessorList([Never(EOS)]))
    greedy.add(0, [5, 6], 1)
    greedy.add(1, [5, 7], 50)
    assert [episode for episode, _ in greedy.advance()] == [0]
    while not greedy.wants_turns:
        greedy.advance()
    greedy.add(0, [8], 1)
    greedy.advance()
    assert not greedy.wants_turns


class TestDraw:
    def test_never_a_token_of_probability_zero(self):
        for number, token in ((0.0, 2), (1.0 - 1e-16, 3)):
            numbers = torch.tensor([[number]], dtype=torch.float64)
            assert draw(torch.tensor([[0.0, 0.0, 0.25, 0.75, 0.0]]), numbers).tolist() == [[token]]

    def test_rows_need_not_sum_to_one(self):
        drawn = draw(torch.tensor([[0.001, 0.003]]).expand(4000, 2), torch.arange(4000).div(4000)[:, None])
        assert float(drawn.float().mean()) == pytest.approx(0.75, abs=0.03)

    def test_a_model_that_diverged_is_an_error(self, model):
        with torch.no_grad():
            model.lm_head.weight.fill_(float("nan"))
        with pytest.raises(RuntimeError, match="logits are not finite"):
            sample(sampler(model, make_logits_processors()), {0: [5, 6]}, limit=2)


def test_a_late_turn_does_not_hold_up_the_others(model):
    greedy = sampler(model, LogitsProcessorList([Never(EOS)]))
    greedy.add(0, [5, 6], 3)
    greedy.add(1, [5, 7], 50)
    finished = []
    while not finished:
        finished = greedy.advance()
    assert finished[0][0] == 0  # episode 0 has its three tokens; 1 is at its third
    assert not greedy.wants_turns
    for _ in range(2):  # episode 0 has missed two tokens: two rows' worth
        assert greedy.advance() == [] or greedy.wants_turns
    assert greedy.wants_turns
    greedy.add(0, [8], 1)
    assert greedy.advance()[0][0] == 0


def test_samples_from_the_models_distribution(model):
    cached = sampler(model, make_logits_processors())
    torch.manual_seed(0)
    prompt = [5, 6, 7]
    samples = sample(cached, dict.fromkeys(range(4000), prompt), limit=1).values()
    with torch.no_grad():
        logprobs = model(torch.tensor([prompt])).logits[0, -1].log_softmax(dim=-1)
    counts = torch.bincount(torch.tensor([s.token_ids[0] for s in samples]), minlength=50)
    torch.testing.assert_close(counts / 4000, logprobs.exp(), atol=0.015, rtol=0.0)
    for s in list(samples)[:20]:
        assert s.logprobs[0] == pytest.approx(float(logprobs[s.token_ids[0]]), abs=1e-5)


def test_temperature_scales_the_logprobs(model):
    processors = make_logits_processors(temperature=0.5)
    drawn = sample(sampler(model, processors, temperature=0.5), {0: [5, 6, 7]}, limit=1)[0]
    with torch.no_grad():
        logprobs = (model(torch.tensor([[5, 6, 7]])).logits[0, -1] / 0.5).log_softmax(dim=-1)
    assert drawn.logprobs[0] == pytest.approx(float(logprobs[drawn.token_ids[0]]), abs=1e-5)


@pytest.mark.parametrize(
    ("kwargs", "allowed"),
    [({"top_k": 3}, 3), ({"top_p": 1e-6}, 1), ({"min_p": 1.0}, 1)],
)
def test_top_k_top_p_min_p_restrict_the_choice(model, kwargs, allowed):
    cached = sampler(model, make_logits_processors(**kwargs))
    seen = {s.token_ids[0] for s in sample(cached, dict.fromkeys(range(200), [5, 6, 7]), limit=1).values()}
    with torch.no_grad():
        best = model(torch.tensor([[5, 6, 7]])).logits[0, -1].topk(allowed).indices.tolist()
    assert seen <= set(best)


def test_repetition_penalty_sees_the_episodes_own_tokens_only(model):
    # A huge penalty forbids every token of the episode; padding must forbid nothing in the shorter one.
    prompts = [list(range(3, 48)), [4]]
    processors = make_logits_processors(repetition_penalty=1e6)
    cached = sampler(model, LogitsProcessorList([*processors, Greedy()]))
    cached.add(0, prompts[0], 1)
    short = sample(cached, {1: prompts[1]}, limit=6)
    long, short = short[0], short[1]
    assert long.token_ids[0] not in prompts[0]
    assert len(set(short.token_ids)) == len(short.token_ids)
    with torch.no_grad():
        logits = model(torch.tensor([[4]])).logits[0, -1]
    logits[4] = torch.where(logits[4] < 0, logits[4] * 1e6, logits[4] / 1e6)
    assert short.token_ids[0] == int(logits.argmax())


def test_same_seed_same_samples(model):
    def play():
        torch.manual_seed(3)
        cached = sampler(model, make_logits_processors())
        return [sample(cached, {0: [5, 6], 1: [7]}, limit=5), sample(cached, {1: [9, 9]}, limit=5)]

    assert play() == play()


@pytest.mark.parametrize("max_concurrent", [1, 3])
def test_what_an_episode_samples_does_not_depend_on_how_many_are_played_at_once(model, max_concurrent):
    def play(max_concurrent):
        torch.manual_seed(3)
        cached = sampler(model, make_logits_processors())
        texts = {}
        for first in range(0, 6, max_concurrent):
            together = range(first, min(first + max_concurrent, 6))
            turns = [sample(cached, {i: [i + 5, turn + 3] for i in together}, limit=4 + turn) for turn in range(3)]
            texts |= {i: [turn[i].token_ids for turn in turns] for i in together}
            for i in together:
                cached.drop(i)
        return texts

    assert play(max_concurrent) == play(6)
    assert len({str(text) for text in play(6).values()}) == 6


def test_an_episode_that_is_played_again_samples_anew(model):
    cached = sampler(model, make_logits_processors())
    texts = []
    for _ in range(2):
        texts.append(sample(cached, {0: [5, 6]}, limit=20)[0].token_ids)
        cached.drop(0)
    assert texts[0] != texts[1]


def test_temperature_may_be_a_whole_number(model):
    processors = make_logits_processors(temperature=2)
    assert len(sample(sampler(model, processors, temperature=2), {0: [5, 6]}, limit=2)[0].token_ids) <= 2


def test_other_generation_settings(model):
    allowed = {4, 7}
    processors = make_logits_processors(suppress_tokens=[t for t in range(50) if t not in allowed])
    seen = sample(sampler(model, processors), dict.fromkeys(range(20), [5]), limit=5)
    assert {token for drawn in seen.values() for token in drawn.token_ids} == allowed
    processors = make_logits_processors(no_repeat_ngram_size=1)
    ids = sample(sampler(model, processors), {0: [5, 6]}, limit=40)[0].token_ids
    assert len(set(ids) | {5, 6}) == len(ids) + 2


def test_unknown_generation_setting_is_refused():
    with pytest.raises(ValueError, match=r"cannot honour the generation settings \['num_beams'\]"):
        make_logits_processors(num_beams=4)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (LlamaConfig(), None),
        (Gemma2Config(attn_implementation="eager"), None),
        (LlamaConfig(attn_implementation="flex_attention"), None),
        (BloomConfig(), "position_ids"),
        (FalconConfig(alibi=True), "of its own"),
        (GPTNeoConfig(), "of its own"),
        (Lfm2Config(layer_types=["conv", "full_attention"], num_hidden_layers=2), "conv"),
    ],
)
def test_models_that_do_not_fit(config, reason):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    unfit = unfit_for_cached_sampler(model, longest_context=math.inf)
    assert (unfit is None) if reason is None else reason in unfit


class TestAnotherAttention:
    def test_flex_attention_is_put_aside_while_sampling(self, model):
        model.set_attn_implementation("flex_attention")
        with masked_attention(model):
            assert model.config._attn_implementation == "sdpa"
            assert play(model, [3, 2], [[5, 6, 7], [8]], max_concurrent=2) < 1e-4
        assert model.config._attn_implementation == "flex_attention"
        ids = torch.tensor([[5, 6, 7, 8]])
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            flex = model(ids).logits
        model.set_attn_implementation("sdpa")
        with torch.no_grad():
            torch.testing.assert_close(flex, model(ids).logits)

    def test_it_comes_back_after_an_error(self, model):
        model.set_attn_implementation("flex_attention")
        with pytest.raises(ZeroDivisionError), masked_attention(model):
            _ = 1 // 0
        assert model.config._attn_implementation == "flex_attention"

    def test_models_without_sdpa_are_eager_meanwhile(self):
        sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 6}
        config = Gemma2Config(**sizes, eos_token_id=2, attn_implementation="flex_attention")
        model = AutoModelForCausalLM.from_config(config).eval()
        with masked_attention(model):
            assert model.config._attn_implementation == "eager"
            assert play(model, [2, 1], [[5] * 9, [8]], max_concurrent=2) < 1e-4
        assert model.config._attn_implementation == "flex_attention"

    def test_one_that_cannot_be_changed(self, model, monkeypatch):
        model.set_attn_implementation("flex_attention")
        monkeypatch.setattr(type(model), "_can_set_attn_implementation", lambda *args: False)
        assert "'flex_attention' and cannot be changed" in unfit_for_cached_sampler(model, math.inf)


def test_how_many_lengths_share_a_forward(model, monkeypatch):
    lengths = [400] * 4 + [40] * 4
    for device, groups in ("cpu", [(4, 399), (4, 39)]), ("cuda", [(8, 399)]):
        cached = sampler(model, LogitsProcessorList([Greedy()]))
        cached._forward_overhead = forward_overhead(torch.device(device))
        with shapes_read(model) as read:
            sample(cached, {episode: [5 + episode] * length for episode, length in enumerate(lengths)}, limit=1)
        assert [shape for shape in read if shape[1] > 1] == groups


def rotating(rope_parameters, make_config=LlamaConfig, context_length=128, **kwargs):
    """A tiny model, of whose contexts 32 tokens are the original ones."""
    torch.manual_seed(0)
    config = make_config(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context_length,
        rope_parameters=rope_parameters,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=PAD,
        **kwargs,
    )
    return AutoModelForCausalLM.from_config(config).eval()


THETA = {"rope_theta": 100.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, **THETA}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.5, 3.0, 5.0, 9.0], **THETA}


class TestRotations:
    MOVING = {
        "longrope": lambda: rotating(LONGROPE, Phi3Config, original_max_position_embeddings=32),
        "dynamic": lambda: rotating(DYNAMIC, context_length=32),
        "by layer": lambda: rotating(
            {"full_attention": DYNAMIC, "sliding_attention": {"rope_type": "default", **THETA}},
            Gemma3TextConfig,
            context_length=32,
            head_dim=8,
            sliding_window=16,
            layer_types=["full_attention", "sliding_attention"],
        ),
    }

    @pytest.mark.parametrize("kind", MOVING)
    def test_those_that_depend_on_the_length_of_the_context(self, kind):
        model = self.MOVING[kind]()
        assert "more than 32 tokens" in unfit_for_cached_sampler(model, 33)
        assert unfit_for_cached_sampler(model, 32) is None
        # Up to there the cache is right: prompts of 16 tokens, and one turn more of at most 8 + 8
        assert self.play(model, prompt_length=16, num_turns=1) < 1e-4
        assert self.play(model, prompt_length=5, num_turns=2) < 1e-4
        with pytest.raises(AssertionError):  # and beyond it is not
            assert self.play(model, prompt_length=16, num_turns=8) < 1e-4

    @pytest.mark.parametrize(
        "rope_parameters",
        [
            {"rope_type": "linear", "factor": 4.0},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
            {
                "rope_type": "llama3",
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        ],
        ids=lambda parameters: parameters["rope_type"],
    )
    def test_those_that_do_not(self, rope_parameters):
        model = rotating(rope_parameters | THETA)
        assert unfit_for_cached_sampler(model, longest_context=128) is None
        assert self.play(model, prompt_length=16, num_turns=5) < 1e-4

    @staticmethod
    def play(model, prompt_length, num_turns):
        prompts = [list(range(3, 3 + prompt_length)), [7, 8, 9]]
        return play(model, [num_turns] * 2, prompts, max_concurrent=2)


def test_requests_of_one_limit_go_together():
    asked = []

    def generate(prompts, max_new_tokens):
        asked.append((prompts, max_new_tokens))
        return [[9] * max_new_tokens for _ in prompts], None

    requests = RequestTurnSampler(generate)
    for episode, room in enumerate([8, 3, 8, 1]):  # two near the end of their context, which has no room for 8 more
        requests.add(episode, [episode], room)
    assert [(episode, len(turn.token_ids)) for episode, turn in requests.advance()] == [(0, 8), (1, 3), (2, 8), (3, 1)]
    assert asked == [([[3]], 1), ([[1]], 3), ([[0], [2]], 8)]


@pytest.mark.parametrize("answer", [[[1], []], [[1]]])
def test_backend_that_loses_a_request(answer):
    requests = RequestTurnSampler(lambda prompts, limit: (answer, None))
    with pytest.raises(RuntimeError, match="answered 2 prompts"):
        sample(requests, {0: [1], 1: [2]}, limit=3)


def test_requests_carry_the_whole_transcript():
    asked = []

    def generate(prompts, max_new_tokens):
        asked.append((prompts, max_new_tokens))
        return [[10, 11, 12]] * len(prompts), None

    requests = RequestTurnSampler(generate)
    requests.add(0, [1], 3)
    requests.add(1, [2], 3)
    samples = dict(requests.advance())
    assert samples[0].token_ids == samples[1].token_ids == [10, 11, 12]
    requests.drop(0)
    sample(requests, {1: [5]}, limit=3)
    assert asked == [([[1], [2]], 3), ([[2, 10, 11, 12, 5]], 3)]
