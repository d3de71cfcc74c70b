"""From text or chat messages to the tokens that reinforcement learning sees.

For a policy, prompt and completion are tokenized apart, as they are when it samples: no token spans the border between them, and a
completion ends with the end-of-sequence token. A reward model reads both as one text.
"""

# pyright: reportUnknownMemberType=false
# (transformers types its methods partially.)

from typing import TYPE_CHECKING, Any, cast

from async_rlhf.errors import ConfigError
from async_rlhf.stages.rows import BadRowError, Message, Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PairEncoder:
    """Tokenizes a prompt and its completion."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", system: str, max_length: int) -> None:
        """
        Args:
            system: a system message put before chat prompts that have none; empty: none.
            max_length: tokens of prompt and completion together; a longer pair is refused, never cut.
        """
        assert tokenizer.eos_token_id is not None, "check_model_folder refuses a tokenizer without an end-of-sequence token"
        self._tokenizer: Any = tokenizer
        self._eos_id = cast(int, tokenizer.eos_token_id)
        self._system = system
        self._max_length = max_length

    def encode(self, prompt: Text, completion: Text) -> tuple[list[int], list[int]]:
        """Ids of the prompt, and of the completion with its end.

        Raises:
            BadRowError: the pair is too long, or the completion is no single answer. ConfigError: there is no chat template.
        """
        if isinstance(prompt, str) and isinstance(completion, str):
            prompt_ids: list[int] = self._tokenizer(prompt)["input_ids"]
            completion_ids: list[int] = self._tokenizer(completion, add_special_tokens=False)["input_ids"]
        else:
            prompt_ids, completion_ids = self._encode_chat(prompt, completion)
        if not completion_ids:
            raise BadRowError("whose completion has no tokens", "")
        if completion_ids[-1] != self._eos_id:
            completion_ids.append(self._eos_id)
        self._check_length(len(prompt_ids) + len(completion_ids))
        return prompt_ids, completion_ids

    def encode_whole(self, prompt: Text, completion: Text) -> list[int]:
        """Ids of both in one text, as a reward model reads them: plain text with its end, chat messages as the template writes them.

        Raises:
            See encode.
        """
        if isinstance(prompt, str) and isinstance(completion, str):
            ids: list[int] = self._tokenizer(prompt + completion)["input_ids"]
            if ids[-1:] != [self._eos_id]:
                ids.append(self._eos_id)
        else:
            ids = self._apply([*self._messages(prompt), *_answer(completion)], add_generation_prompt=False)
        self._check_length(len(ids))
        return ids

    def _check_length(self, num_tokens: int) -> None:
        if num_tokens > self._max_length:
            raise BadRowError(f"longer than max_length {self._max_length}", f"{num_tokens} tokens")

    def _encode_chat(self, prompt: Text, completion: Text) -> tuple[list[int], list[int]]:
        messages = self._messages(prompt)
        before = self._apply(messages, add_generation_prompt=True)
        whole = self._apply([*messages, *_answer(completion)], add_generation_prompt=False)
        if whole[: len(before)] != before:
            raise BadRowError("whose prompt the chat template writes otherwise once it is answered", "")
        written = whole[len(before) :]
        # What a template writes behind the end of the answer, a policy never samples.
        return before, written[: written.index(self._eos_id) + 1] if self._eos_id in written else written

    def _messages(self, prompt: Text) -> list[Message]:
        if self._tokenizer.chat_template is None:
            raise ConfigError("chat messages need a tokenizer with a chat template; save one with the model, or give plain text")
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if self._system and messages[0]["role"] != "system":
            return [{"role": "system", "content": self._system}, *messages]
        return messages

    def _apply(self, messages: list[Message], *, add_generation_prompt: bool) -> list[int]:
        return self._tokenizer.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, tokenize=True, return_dict=False)


def _answer(completion: Text) -> list[Message]:
    answer = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
    if [message["role"] for message in answer] != ["assistant"]:
        raise BadRowError("whose completion is not one message of the assistant", f"{len(answer)} messages")
    return answer
