"""Whole trainings on a CUDA GPU: twice the same, and the same when resumed."""

import pytest
import torch
from faulty_runs import make_trainer, same, weights


pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.parametrize("precision", [{}, {"bf16": True}, {"fp16": True}])
@pytest.mark.parametrize("estimator", ["grpo", "gae"])
def test_twice_the_same_and_resumed(tmp_path, estimator, precision):
    settings = {"use_cpu": False, "save_strategy": "steps", "save_steps": 3, "advantage_estimator": estimator}
    settings |= precision
    once, twice, resumed = (make_trainer(tmp_path / name, **settings) for name in ("once", "twice", "resumed"))
    before = weights(once)
    once.train()
    assert next(once.model.parameters()).device.type == "cuda"
    assert not torch.equal(weights(once), before)
    twice.train()
    assert same(once, twice)
    resumed.train(resume_from_checkpoint=str(tmp_path / "once" / "checkpoint-3"))
    assert same(once, resumed)
