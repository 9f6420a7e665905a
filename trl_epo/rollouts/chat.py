"""From messages to token ids, such that no message can forge chat structure."""

import json
import logging
import re
import secrets
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from ..text import shown, without_surrogates


logger = logging.getLogger(__name__)

# What opens a thought, and what closes it: Qwen, DeepSeek and most others; Magistral; Gemma; gpt-oss, whose answer has a header
THOUGHTS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<|channel>thought", "<channel|>"),
    ("<|channel|>analysis", "<|channel|>final<|message|>"),
)
_MARKS = {"<think>", "</think>", "[THINK]", "[/THINK]", "<|channel>", "<channel|>", "<|channel|>", "<|message|>"}
_MARK = re.compile("(" + "|".join(map(re.escape, sorted(_MARKS))) + ")")
_HARMONY = "<|channel|>"  # gpt-oss always thinks, and its template ends an answer as it ends a thought


def after_thoughts(text: str) -> str | None:
    """What stands after the last thought, all of a text without any; `None` if one is not closed."""
    end = max((text.rindex(close) + len(close) for _, close in THOUGHTS if close in text), default=0)
    rest = text[end:]
    return None if any(opening in rest for opening, _ in THOUGHTS) else rest


_ROLE = re.compile(r"[A-Za-z0-9_-]+")  # the template writes it among its own text


class ChatEncoder:
    """
    Encodes the messages of an episode turn by turn.

    The chat template is rendered around placeholders; then the contents are put in as plain text. A special token
    counts as one only where the template wrote it: inside a content, `<|im_end|>` is ten characters like any other.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): A fast tokenizer with a chat template.
        eos_token_ids (`list[int]`): Tokens that end the assistant's turn.
        chat_template (`str`, *optional*): Used instead of the tokenizer's own.
        chat_template_kwargs (`dict`, *optional*): Passed to the template.

    Attributes:
        opens_thought (`bool`): Whether the assistant's header ends within a thought (`<think>`), which the model goes on
            with.
        thinks (`bool`): Whether the template lets the model think before it answers: it has opened a thought, has a switch
            `enable_thinking` which is not off, or is gpt-oss's.

    Raises:
        ValueError: If the tokenizer has no fast backend or no chat template, or if the template drops or repeats a
            message.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        eos_token_ids: list[int],
        chat_template: str | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ):
        if not tokenizer.is_fast:
            raise ValueError(
                f"{type(tokenizer).__name__} is not a fast tokenizer, but text episodes need one to keep special "
                "tokens in observations plain. Load it with `AutoTokenizer.from_pretrained(...)`."
            )
        if chat_template is None and tokenizer.chat_template is None:
            raise ValueError(
                "The tokenizer has no chat template, but text episodes are chats: set `tokenizer.chat_template`, or "
                "give a model that has one (an instruct model, or `trl.clone_chat_template`)."
            )
        self.tokenizer = tokenizer
        self.eos_token_ids = set(eos_token_ids)
        self.chat_template = chat_template
        self.chat_template_kwargs = chat_template_kwargs or {}

        # Runs of white space that some vocabularies add are ordinary text.
        added = {t.content: i for i, t in tokenizer.added_tokens_decoder.items() if not _is_space(t.content)}
        self._added_ids = added
        longest_first = sorted(added, key=len, reverse=True)
        self._added_pattern = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if added else None
        # Those that take the white space before or after them, whoever wrote it.
        self._lstrip = {t.content for t in tokenizer.added_tokens_decoder.values() if t.lstrip}
        self._rstrip = {t.content for t in tokenizer.added_tokens_decoder.values() if t.rstrip}
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        self._plain_tokenizer = Tokenizer.from_str(json.dumps(_plain_state(state, set(added.values()))))

        # "{assistant} {between} {user} {generation prompt}": what stands around an observation never changes.
        rendered = self._render([("user", 0), ("assistant", 1), ("user", 2)])
        after_action = rendered[rendered.index(1) + 1 :]
        position = after_action.index(2)
        self._before_observation: str = "".join(map(str, after_action[:position]))
        self._after_observation: str = "".join(map(str, after_action[position + 1 :]))
        self.opens_thought: bool = after_thoughts(self._after_observation) is None
        quiet = self._render([("user", 0)], enable_thinking=False)
        self.thinks: bool = self.opens_thought or self._render([("user", 0)]) != quiet or _HARMONY in added
        tags = [(i, t) for i, t in tokenizer.added_tokens_decoder.items() if t.content in _MARKS]
        self._special_tags = {i for i, tag in tags if tag.special}
        # Whatever the vocabulary makes of text (its token for unknown text may be the end of a turn), it is none of these.
        template = "".join(part for part in rendered if isinstance(part, str))
        written = self._added_pattern.findall(template) if self._added_pattern else []
        self._structure = {added[token] for token in written} | (self.eos_token_ids & set(added.values()))
        # Not every one stands at the beginning, and what stands there may be the next turn's header.
        before = self._added_pattern.findall(self._before_observation) if self._added_pattern else []
        self._ends_of_turn = {added[token] for token in before} & self.eos_token_ids
        written_ends = [added[token] for token in before if added[token] in self.eos_token_ids]
        self._end_of_turn: int = next(iter(written_ends), tokenizer.eos_token_id)
        if before and not self._ends_of_turn and _HARMONY not in added:
            logger.warning(
                "The chat template ends a turn with %r, but the model's turns end with %s: it may talk on. Base models do: take an "
                "instruct model, or set the tokenizer's `eos_token`.",
                before[0],
                " or ".join(repr(tokenizer.decode([token])) for token in sorted(self.eos_token_ids)),
            )
        # What the template writes of an answer before its text, if the assistant's header does not end with it
        header = "".join(map(str, rendered[rendered.index(0) + 1 : rendered.index(1)]))
        self._before_action: str = (
            header.removeprefix(self._after_observation) if header.startswith(self._after_observation) else ""
        )

    def encode_prompt(self, messages: list[dict[str, str]]) -> list[int]:
        """
        Token ids of `messages` followed by the assistant's header.

        Raises:
            ValueError: If a content is not a text, or a role not a plain word.
        """
        for message in messages:
            if not isinstance(message.get("role"), str) or not _ROLE.fullmatch(message["role"]):
                raise ValueError(
                    f"A prompt message has the role {shown(message.get('role'))}, but a role is a word of letters, "
                    'digits, "_" and "-", such as "user" or "system".'
                )
            if not isinstance(message.get("content"), str):
                raise ValueError(
                    f"A prompt message has the content {shown(message.get('content'))}, but text episodes need a string."
                )
        rendered = self._render([(message["role"], index) for index, message in enumerate(messages)])
        pieces: list[tuple[str, bool]] = []  # (text, written by the template)
        for part in rendered:
            pieces.append((messages[part]["content"], False) if isinstance(part, int) else (part, True))
        return self._encode(pieces)

    def instruct(self, instructions: str) -> list[dict[str, str]]:
        """
        The messages that tell the model its instructions: a system message or, where the template rejects or drops that
        role, a user message, which goes on with the first observation.
        """
        try:
            self._render([("system", 0), ("user", 1)])
        except Exception:  # the template's own, of whatever kind
            return [{"role": "user", "content": instructions}]
        return [{"role": "system", "content": instructions}]

    def encode_observation(self, observation: str, last_action_token: int) -> list[int]:
        """
        Token ids that stand between an action and the next one: the end of the assistant's turn, of which what was
        sampled is left out, the observation as a user message, and the assistant's header.
        """
        ids = self._encode([(self._before_observation, True), (observation, False), (self._after_observation, True)])
        return ids[ids.index(last_action_token) + 1 :] if last_action_token in self._ends_of_turn else ids

    def encode_action(self, text: str) -> list[int]:
        """
        Token ids of what the assistant says, as a model samples them that ends its turn as the template does. No special
        token is read from `text` but those that tell a thought from what follows it.
        """
        parts = _MARK.split(text)
        pieces = [(part, part in _MARKS) for part in parts if part]
        if len(parts) == 1:
            pieces.insert(0, (self._before_action, True))
        return [*self._encode(pieces), self._end_of_turn]

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of a turn, without special tokens other than those that tell a thought from what follows it."""
        text, start = "", 0
        for end, token in enumerate(token_ids):
            if token in self._special_tags:
                text += self.tokenizer.decode(token_ids[start:end], skip_special_tokens=True)
                text += self.tokenizer.decode([token])
                start = end + 1
        return text + self.tokenizer.decode(token_ids[start:], skip_special_tokens=True)

    def _render(self, roles: list[tuple[str, int]], **kwargs) -> list[str | int]:
        """The template's own text, with each message's content replaced by its number; `kwargs` go to the template."""
        markers = {index: f"EPO{index}CONTENT{index}EPO" for _, index in roles}
        text = self.tokenizer.apply_chat_template(
            [{"role": role, "content": markers[index]} for role, index in roles],
            chat_template=self.chat_template,
            add_generation_prompt=True,
            tokenize=False,
            **{**self.chat_template_kwargs, **kwargs},
        )
        for role, index in roles:
            if text.count(markers[index]) != 1:
                raise ValueError(
                    f"The chat template shows message {index} (role {role!r}) {text.count(markers[index])} times "
                    "instead of once. Use a template that renders every message once, or leave that role out."
                )
        pattern = "(" + "|".join(markers.values()) + ")"
        numbers = {marker: index for index, marker in markers.items()}
        return [numbers.get(part, part) for part in re.split(pattern, text) if part]

    def _encode(self, pieces: list[tuple[str, bool]]) -> list[int]:
        tokens: list[str] = []
        stretches = [""]  # text between two special tokens is tokenised as a whole, whoever wrote it
        for text, from_template in pieces:
            is_token = self._added_ids if from_template else ()
            for part in self._added_pattern.split(text) if is_token else [text]:
                if part in is_token:
                    tokens.append(part)
                    stretches.append("")
                else:
                    stretches[-1] += part
        ids: list[int] = []
        for before, text, after in zip([None, *tokens], stretches, [*tokens, None], strict=True):
            text = text.lstrip() if before in self._rstrip else text
            text = text.rstrip() if after in self._lstrip else text
            if text:
                plain_ids = self._plain_tokenizer.encode(without_surrogates(text), add_special_tokens=False).ids
                ids += [i for i in plain_ids if i not in self._structure]
            if after is not None:
                ids.append(self._added_ids[after])
        return ids


def _is_space(token: str) -> bool:
    return not token.strip("▁").strip()  # "▁" stands for a space in the vocabularies of SentencePiece


def _plain_state(state: dict[str, Any], added_ids: set[int]) -> dict[str, Any]:
    """
    The `tokenizer.json` of a tokenizer to which these tokens are text like any other: no text becomes one of them,
    also where the vocabulary itself holds them. (The token for unknown text is left alone.)
    """
    model = state["model"]
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):  # a unigram model, where the place is the id: names that no text can guess
        secret = secrets.token_hex(16)
        for i in added_ids - {model["unk_id"]}:
            if i < len(vocabulary):
                vocabulary[i][0] = f"{secret}{i}"
    else:
        removed = {text for text, i in vocabulary.items() if i in added_ids and text != model.get("unk_token")}
        model["vocab"] = {text: i for text, i in vocabulary.items() if text not in removed}
        if removed and "merges" in model:
            pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
            skip = len(model.get("continuing_subword_prefix") or "")
            model["merges"] = [[a, b] for a, b in pairs if removed.isdisjoint((a, b, a + b[skip:]))]
    # No stretch of text is the first word of all: a special token comes before it.
    splitter = state["pre_tokenizer"] or {}
    for part in (splitter, *splitter.get("pretokenizers", ())):
        if part.get("prepend_scheme") == "first":
            part["prepend_scheme"] = "never"
    spaces = [token for token in state["added_tokens"] if _is_space(token["content"])]
    return state | {"added_tokens": spaces, "post_processor": None, "truncation": None, "padding": None}
