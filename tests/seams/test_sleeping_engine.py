"""vLLM's sleep mode, which needs a GPU: here what is called, in which order."""

from types import SimpleNamespace

import pytest
import torch

from trl_epo.seams.vllm import engine_turns


@pytest.mark.parametrize("fails", [False, True])
def test_the_engine_is_awake_for_a_rollout_and_sleeps_afterwards(fails):
    calls = []
    engine = SimpleNamespace(abort_request=lambda request_ids: calls.append("abort"))
    llm = SimpleNamespace(
        wake_up=lambda tags: calls.append(tags),
        sleep=lambda level: calls.append(level),
        llm_engine=engine,
        request_counter=iter(range(9)),
    )
    generation = SimpleNamespace(llm=llm, enable_sleep_mode=True, _llm_weights_sleeping=False)
    before = torch.get_rng_state()
    try:
        with engine_turns(generation, torch.device("cpu")):
            drawn_by_sampler = torch.get_rng_state()
            torch.rand(3)  # as vLLM's CPU sampler does, in each step
            calls.append("play")
            if fails:
                raise OSError
    except OSError:
        assert fails
    assert calls == [["kv_cache"], "play", "abort", 2]
    assert generation._llm_weights_sleeping  # so that the next rollout brings the weights again
    assert torch.equal(torch.get_rng_state(), drawn_by_sampler)
    assert not torch.equal(before, drawn_by_sampler)
