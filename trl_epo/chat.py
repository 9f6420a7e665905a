"""From messages to token ids, such that no message can forge chat structure."""

import json
import re
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase


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
        added = {t.content: i for i, t in tokenizer.added_tokens_decoder.items() if t.content.strip()}
        self._added_ids = added
        self._forbidden = frozenset(added.values())  # what plain text must never become
        longest_first = sorted(added, key=len, reverse=True)
        self._added_pattern = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if added else None
        # The same tokenizer, ignorant of the added tokens.
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        spaces = [token for token in state["added_tokens"] if not token["content"].strip()]
        state.update(added_tokens=spaces, post_processor=None, truncation=None, padding=None)
        self._plain_tokenizer = Tokenizer.from_str(json.dumps(state))

        # "{assistant} {between} {user} {generation prompt}": what stands around an observation never changes.
        rendered = self._render([("user", 0), ("assistant", 1), ("user", 2)])
        after_action = rendered[rendered.index(1) + 1 :]
        position = after_action.index(2)
        self._before_observation: str = "".join(after_action[:position])
        self._after_observation: str = "".join(after_action[position + 1 :])
        self._end_of_turn = self._first_added_token(self._before_observation)

    def encode_prompt(self, messages: list[dict[str, str]]) -> list[int]:
        """Token ids of `messages` followed by the assistant's header."""
        for message in messages:
            if not isinstance(message.get("content"), str):
                raise ValueError(
                    f"A prompt message has the content {message.get('content')!r}, but text episodes need a string."
                )
        rendered = self._render([(message["role"], index) for index, message in enumerate(messages)])
        pieces: list[tuple[str, bool]] = []  # (text, written by the template)
        for part in rendered:
            pieces.append((messages[part]["content"], False) if isinstance(part, int) else (part, True))
        return self._encode(pieces)

    def encode_observation(self, observation: str, last_action_token: int) -> list[int]:
        """
        Token ids that stand between an action and the next one: the end of the assistant's turn unless it was
        sampled, the observation as a user message, and the assistant's header.
        """
        before = self._before_observation
        if last_action_token in self.eos_token_ids and self._end_of_turn is not None:
            before = before[len(self._end_of_turn) :]
        return self._encode([(before, True), (observation, False), (self._after_observation, True)])

    def _render(self, roles: list[tuple[str, int]]) -> list[str | int]:
        """The template's own text, with each message's content replaced by its number."""
        markers = {index: f"EPO{index}CONTENT{index}EPO" for _, index in roles}
        text = self.tokenizer.apply_chat_template(
            [{"role": role, "content": markers[index]} for role, index in roles],
            chat_template=self.chat_template,
            add_generation_prompt=True,
            tokenize=False,
            **self.chat_template_kwargs,
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

    def _first_added_token(self, text: str) -> str | None:
        """The added token at the beginning of `text`, with the white space before it."""
        match = self._added_pattern.match(text.lstrip()) if self._added_pattern else None
        return text[: len(text) - len(text.lstrip())] + match.group() if match else None

    def _encode(self, pieces: list[tuple[str, bool]]) -> list[int]:
        ids: list[int] = []
        plain = ""  # text between two special tokens is tokenised as a whole, whoever wrote it
        for text, from_template in pieces:
            if not from_template or self._added_pattern is None:
                plain += text
                continue
            for part in self._added_pattern.split(text):
                if part in self._added_ids:
                    ids += self._encode_plain(plain)
                    ids.append(self._added_ids[part])
                    plain = ""
                else:
                    plain += part
        return ids + self._encode_plain(plain)

    def _encode_plain(self, text: str) -> list[int]:
        text = text.encode("utf-8", "replace").decode("utf-8")  # lone surrogates cannot be tokenised
        ids = self._plain_tokenizer.encode(text, add_special_tokens=False).ids if text else []
        if self._forbidden.intersection(ids):  # a vocabulary that holds its special tokens as words
            characters = (self._plain_tokenizer.encode(character).ids for character in text)
            ids = [i for character_ids in characters for i in character_ids if i not in self._forbidden]
        return ids
