"""Tokenizers of several families of chat templates."""

from pathlib import Path

import trl
from conftest import make_tokenizer


# The chat structure of four families: their template as TRL ships it, and the special tokens it writes.
FAMILIES = {
    "qwen2_5": ("<|im_end|>", ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]),
    "qwen3": ("<|im_end|>", ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>", "</think>"]),
    "llama3": ("<|eot_id|>", ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]),
    "gemma": ("<end_of_turn>", ["<bos>", "<start_of_turn>", "<end_of_turn>"]),
}


TEMPLATES = Path(trl.__file__).parent / "chat_templates"


def family_tokenizer(family):
    eos, special = FAMILIES[family]
    tokenizer = make_tokenizer((TEMPLATES / f"{family}.jinja").read_text())
    tokenizer.add_special_tokens({"additional_special_tokens": special, "eos_token": eos})
    if "<bos>" in special:
        tokenizer.bos_token = "<bos>"
    if "<|begin_of_text|>" in special:
        tokenizer.bos_token = "<|begin_of_text|>"
    return tokenizer
