"""The files in `examples/accelerate_configs`, as accelerate itself reads them."""

from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env


FOLDER = Path(__file__).parents[2] / "examples" / "accelerate_configs"
EXPECTED = {
    "fsdp2": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"},
    "multi_gpu": {},
    "zero2": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
    "zero3": {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
        "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
    },
}


def environment(path: Path) -> dict[str, str]:
    """What `accelerate launch` tells the processes."""
    parser = launch_command_parser()
    options = {action.dest for action in parser._actions}
    for section in yaml.safe_load(path.read_text()).values():
        # accelerate refuses an unknown key at the top by itself, in a section it does not notice
        if isinstance(section, dict) and (unknown := section.keys() - options):
            raise ValueError(f"accelerate does not know {sorted(unknown)}.")
    args, _, _ = _validate_launch_command(parser.parse_args(["--config_file", str(path), "train.py"]))
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ""
        return prepare_deepspeed_cmd_env(args)[1]
    return prepare_multi_gpu_env(args)


def test_each_file_is_checked():
    assert {path.stem for path in FOLDER.iterdir()} == EXPECTED.keys()


@pytest.mark.parametrize("name", EXPECTED)
def test_accelerate_takes_it(name, monkeypatch):
    told = environment(FOLDER / f"{name}.yaml")
    assert EXPECTED[name].items() <= told.items()
    assert told["ACCELERATE_MIXED_PRECISION"] == "bf16"
    for key, value in told.items():
        monkeypatch.setenv(key, value)
    if name == "fsdp2":
        plugin = FullyShardedDataParallelPlugin()
        assert (plugin.fsdp_version, plugin.reshard_after_forward) == (2, True)


@pytest.mark.parametrize(("old", "new"), [("fsdp_version", "fsdp_versoin"), ("machine_rank", "machine_rnak")])
def test_a_wrong_key_is_found(tmp_path, old, new):
    path = tmp_path / "wrong.yaml"
    path.write_text((FOLDER / "fsdp2.yaml").read_text().replace(old, new))
    with pytest.raises(ValueError, match=new):
        environment(path)
