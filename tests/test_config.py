import copy
import dataclasses
import pickle

import pytest
import torch
from trl import GRPOConfig, TrlParser

from trl_epo import EPOConfig
from trl_epo.config import only_emulates_bf16


def config(tmp_path, **kwargs):
    return EPOConfig(str(tmp_path), **kwargs)


def test_defaults_are_the_papers(tmp_path):
    args = config(tmp_path)
    assert args.entropy_coef == 0.001
    assert (args.entropy_smoothing, args.entropy_smoothing_coef) == ("hinge", 0.1)
    assert (args.entropy_corridor_low, args.entropy_corridor_high) == (0.0, 2.0)
    assert (args.entropy_smoothing_schedule, args.entropy_smoothing_decay) == ("exponential", 3.0)
    assert args.entropy_aggregation == "turn"
    assert args.ddp_timeout == 7200
    assert (args.max_turns, args.invalid_action_penalty) == (30, 0.0)


@pytest.mark.parametrize(
    ("estimator", "gamma", "expected"),
    [("gigpo", None, 0.95), ("gigpo", 1.0, 1.0), ("turn", None, 1.0), ("gae", None, 1.0), ("gae", 0.9, 0.9)],
)
def test_the_discount_is_that_of_the_estimators_paper(tmp_path, estimator, gamma, expected):
    assert config(tmp_path, advantage_estimator=estimator, gamma=gamma).gamma == expected
    given = {} if gamma is None else {"gamma": gamma}
    assert config(tmp_path, advantage_estimator=estimator, **given).gamma == expected


def test_works_without_an_accelerator():
    import torch

    assert EPOConfig().use_cpu == (not torch.accelerator.is_available())


def test_every_new_field_is_documented():
    inherited = {field.name: field for field in dataclasses.fields(GRPOConfig)}
    for field in dataclasses.fields(EPOConfig):
        if field.name not in inherited or field.default != inherited[field.name].default:
            assert f"{field.name} (`" in EPOConfig.__doc__, field.name
            assert field.metadata["help"], field.name


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"ddp_timeout": 0}, "`ddp_timeout` is 0.*above 0"),
        ({"entropy_smoothing": "square"}, "'square'.*one of 'hinge', 'indicator', 'none'"),
        ({"entropy_smoothing_schedule": "linear"}, "'linear'.*'exponential', 'constant'"),
        ({"entropy_aggregation": "episode"}, "'episode'.*'turn', 'token'"),
        ({"entropy_coef": -0.1}, "entropy_coef.*-0.1.*at least 0"),
        ({"entropy_coef": float("nan")}, "entropy_coef.*nan.*finite"),
        ({"entropy_smoothing_coef": -1.0}, "entropy_smoothing_coef.*-1.0"),
        ({"entropy_smoothing_decay": float("inf")}, "entropy_smoothing_decay.*inf.*finite"),
        ({"entropy_corridor_low": -0.5}, "entropy_corridor_low.*-0.5"),
        ({"entropy_corridor_low": 1.5, "entropy_corridor_high": 0.5}, "1.5.*above.*0.5.*low <= high"),
        ({"entropy_turn_decay": -0.5}, "entropy_turn_decay.*-0.5.*at least 0"),
        ({"entropy_turn_decay": 1.5}, "entropy_turn_decay.*1.5.*at most 1"),
        ({"entropy_turn_decay": 0.5, "entropy_aggregation": "token"}, "entropy_turn_decay=0.5.*'token'.*'turn'"),
        ({"entropy_advantage_coef": -0.4}, "entropy_advantage_coef.*-0.4"),
        ({"entropy_advantage_limit": 1.0}, "entropy_advantage_limit.*1.0.*above 1"),
        ({"entropy_reference": "median"}, "'median'.*'history', 'turn_history', 'linear'"),
        ({"entropy_reference_end": -0.2}, "entropy_reference_end.*-0.2"),
        ({"entropy_corridor_coef": -1.0}, "entropy_corridor_coef.*-1.0"),
        ({"entropy_corridor_coef": 0.1}, "entropy_corridor_coef=0.1.*entropy_coef=0.001.*Set `entropy_coef=0.0`"),
        (
            {"entropy_corridor_coef": 0.1, "entropy_coef": 0.0, "use_adaptive_entropy": True},
            "entropy_corridor_coef=0.1.*use_adaptive_entropy=True.*`use_adaptive_entropy=False`",
        ),
        (
            {"entropy_corridor_coef": 0.1, "entropy_coef": 0.0, "entropy_reference": "turn_history"},
            "'turn_history'.*entropy_corridor_coef=0.1.*'history' or 'linear'",
        ),
        ({"use_adaptive_entropy": True}, "use_adaptive_entropy.*entropy_coef=0.0"),
        (
            {"gradient_checkpointing_kwargs": {"every_n_layers": 2}},
            r"gradient_checkpointing_kwargs.*\['every_n_layers'\].*Leave them out",
        ),
        ({"max_turns": 0}, "max_turns.*0.*at least 1"),
        ({"max_turns": 2.5}, "max_turns.*2.5.*whole number"),
        ({"max_concurrent_episodes": 0}, "max_concurrent_episodes.*0.*at least 1"),
        ({"max_nonfinite_steps": 0}, "max_nonfinite_steps.*0.*at least 1"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size.*0.*at least 1"),
        ({"max_nonfinite_steps": 2.5}, "max_nonfinite_steps.*2.5.*whole number"),
        ({"environment_patience": -1.0}, "environment_patience.*-1.0.*at least 0"),
        ({"env_timeout": 0.0}, "env_timeout.*0.0.*above 0"),
        ({"env_timeout": float("nan")}, "env_timeout.*nan"),
        ({"env_max_retries": -1}, "env_max_retries.*-1.*at least 0"),
        ({"env_max_retries": 0.5}, "env_max_retries.*0.5.*whole"),
        ({"max_failed_fraction": 1.5}, "max_failed_fraction.*1.5.*0.0.*1.0"),
        ({"max_failed_fraction": float("nan")}, "max_failed_fraction.*nan"),
        ({"environment_patience": float("nan")}, "environment_patience.*nan"),
        ({"max_observation_length": 0}, "max_observation_length.*0.*at least 1 character"),
        ({"max_observation_length": 1e6}, "max_observation_length.*1000000.0.*whole number"),
        ({"max_turn_length": -3}, "max_turn_length.*-3"),
        ({"max_completion_length": 0}, "max_completion_length.*0.*at least 1"),
        ({"invalid_action_penalty": -0.1}, "invalid_action_penalty.*-0.1"),
    ],
)
def test_bad_values_are_named_with_the_remedy(tmp_path, kwargs, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **kwargs)


@pytest.mark.parametrize("kind", [EPOConfig, dataclasses.make_dataclass("OwnConfig", [], bases=(EPOConfig,))])
def test_an_unknown_field_gets_the_nearest_name(tmp_path, kind):
    with pytest.raises(TypeError, match=f"{kind.__name__} has no field 'entropie_coef'. Did you mean 'entropy_coef'?"):
        kind(str(tmp_path), entropie_coef=0.1)
    with pytest.raises(TypeError, match=f"{kind.__name__} has no field 'zzz'.$"):
        kind(str(tmp_path), zzz=0.1)


class OwnConfig(EPOConfig):
    def __init__(self, folder, scale=1.0, **kwargs):
        super().__init__(folder, entropy_coef=0.001 * scale, **kwargs)


def test_a_config_stays_a_dataclass_that_is_copied_and_pickled(tmp_path):
    args = config(tmp_path, entropy_coef=0.02, max_turns=3)
    for other in (pickle.loads(pickle.dumps(args)), copy.copy(args), copy.deepcopy(args)):
        assert type(other) is EPOConfig
        assert (other.entropy_coef, other.max_turns, other.output_dir) == (0.02, 3, str(tmp_path))
    assert OwnConfig(str(tmp_path), scale=2.0, max_turns=3).entropy_coef == 0.002  # arguments of its own are no fields


def test_large_smoothing_coef_is_allowed(tmp_path):
    assert config(tmp_path, entropy_smoothing_coef=2.0).entropy_smoothing_coef == 2.0


def test_trls_adaptive_entropy_without_epos_terms(tmp_path):
    assert config(tmp_path, use_adaptive_entropy=True, entropy_coef=0.0).use_adaptive_entropy


def test_trainers_own_checkpoint_on_sigterm_is_not_needed(tmp_path):
    # It would save before the optimizer step, end without an exit code, and leave the other processes alone.
    assert not config(tmp_path, enable_jit_checkpoint=True).enable_jit_checkpoint


def test_command_line(tmp_path):
    parser = TrlParser(EPOConfig)
    flags = ["--output_dir", str(tmp_path), "--entropy_corridor_high", "1.5", "--max_turns", "12"]
    (args,) = parser.parse_args_and_config(flags)
    assert (args.entropy_corridor_high, args.max_turns) == (1.5, 12)


def test_config_file(tmp_path):
    path = tmp_path / "epo.yaml"
    path.write_text(f"output_dir: {tmp_path}\nentropy_smoothing: indicator\nentropy_coef: 0.01\n")
    (args,) = TrlParser(EPOConfig).parse_args_and_config(["--config", str(path)])
    assert (args.entropy_smoothing, args.entropy_coef) == ("indicator", 0.01)


def test_a_cap_that_climbs_with_what_it_caps_is_pointed_out(tmp_path, caplog):
    corridor = {"entropy_coef": 0.0, "entropy_corridor_coef": 0.1, "entropy_corridor_high": 1.01}
    config(tmp_path, **{**corridor, "entropy_corridor_high": 1.0})
    config(tmp_path, **corridor, entropy_reference="linear")
    assert "above 1" not in caplog.text
    config(tmp_path, **corridor)
    assert "`entropy_corridor_high=1.01` is above 1" in caplog.text


def test_a_gpu_that_only_emulates_bfloat16(tmp_path, monkeypatch, caplog):
    """The answers are those of a T4, which cannot exist here."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    with monkeypatch.context() as context:
        context.setattr(torch.cuda, "is_available", lambda: True)
        assert only_emulates_bf16()
    assert not only_emulates_bf16()
    config(tmp_path, bf16=True)
    assert "fp16=True" not in caplog.text
    monkeypatch.setattr("trl_epo.config.only_emulates_bf16", lambda: True)
    config(tmp_path, bf16=True)
    assert "fp16=True" in caplog.text
