"""Chats as text: a tokenizer's chat template, and which characters of its text are learned."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from lit_peft.util.type_checks import brief

Span = tuple[int, int]
# Fields of a message that say whether to learn it; the template does not get them.
LEARN_FIELDS = ("weight", "train", "training")
# transformers gives a message's reasoning to the template under all three names.
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PROBE = "PROBE"
_PROBE_CHAT = (("user", "QUESTION"), ("assistant", "ANSWER"), ("user", "NEXT"))
_TOOL = {"name": "probe", "description": "PROBE", "parameters": {"type": "object", "properties": {}}}


class RewrittenTurnError(Exception):
    """A chat template renders a turn so that its text cannot be found."""


@dataclass(frozen=True)
class Turn:
    """A turn in the text of the chat that ends with it.

    Attributes:
        text: the text of the chat up to the turn's end, without trailing white space and without what the template
            puts at the end of every chat.
        start: where the turn starts: after the generation prompt for one of the assistant.
        whole: `text` with what the template puts at the end of every chat.
        continues_prompt: whether an answer continues the whole generation prompt.
    """

    text: str
    start: int
    whole: str
    continues_prompt: bool = True


@dataclass(frozen=True)
class Rendered:
    """A text to learn from.

    Attributes:
        text: the text.
        spans: its characters to learn.
        turns: the indices of the messages that they belong to.
        continues_prompt: whether every answer continues the whole generation prompt.
    """

    text: str
    spans: list[Span]
    turns: list[int]
    continues_prompt: bool = True


class ChatRenderer:
    """Renders chats with a tokenizer's chat template.

    Args:
        tokenizer: a tokenizer with a chat template.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def _probe(self, *messages: dict[str, Any], **extra: Any) -> str:
        """Render messages; "" if the template refuses them."""
        try:
            return self.render(list(messages), **extra)
        except Exception:  # a template may raise anything
            return ""

    @cached_property
    def needs_parts(self) -> bool:
        """Whether the template reads content as a list of parts, and not as text."""
        parts = [{"type": "text", "text": _PROBE}]
        if _PROBE in self._probe({"role": "user", "content": _PROBE}):
            return False
        found = self._probe({"role": "user", "content": parts})
        return _PROBE in found and "'text'" not in found

    @cached_property
    def needs_json_arguments(self) -> bool:
        """Whether the template reads a tool call's arguments as JSON text, and not as an object."""
        chats = []
        for arguments in ({"a": _PROBE}, json.dumps({"a": _PROBE})):
            call = {"type": "function", "id": "probe0001", "function": {"name": "probe", "arguments": arguments}}
            user = {"role": "user", "content": "x"}
            chats.append(self.clean([user, {"role": "assistant", "content": "", "tool_calls": [call]}], as_given=True))
        tools = [{"type": "function", "function": _TOOL}]
        as_object, as_text = (self._probe(*chat, tools=tools).count(_PROBE) for chat in chats)
        return as_object < as_text

    def clean(self, messages: Sequence[dict[str, Any]], as_given: bool = False) -> list[dict[str, Any]]:
        """Return messages as the template gets them.

        Args:
            messages: the messages.
            as_given: leave the arguments of tool calls as they are.
        """
        out = []
        for message in messages:
            kept = {key: value for key, value in message.items() if value is not None and key not in LEARN_FIELDS}
            kept["content"] = self.clean_content(kept.get("content", ""))
            if not as_given and isinstance(kept.get("tool_calls"), list) and self.needs_json_arguments:
                kept["tool_calls"] = [_with_json_arguments(call) for call in kept["tool_calls"]]
            out.append(kept)
        return out

    def clean_content(self, content: Any) -> Any:
        """Return a message's content as the template reads it."""
        text = content_text(content)
        return [{"type": "text", "text": text}] if self.needs_parts else text

    def render(self, messages: list[dict[str, Any]], add_generation_prompt: bool = False, **extra: Any) -> str:
        """Render cleaned messages; see `apply_chat_template` of transformers."""
        text: str = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt, **extra
        )
        return text

    def examples(self, messages: list[dict[str, Any]], learned: Sequence[int], **extra: Any) -> list[Rendered]:
        """Render a chat so that each turn to learn looks as when the model generates it.

        A chat is one text, unless the template renders a turn differently once later ones follow (for example without
        its reasoning). Then such turns are learned from texts of their own, which end with them. If the template marks
        with `{% generation %}` what the assistant generates, the marks decide, in one text.

        Args:
            messages: cleaned messages.
            learned: indices of the turns to learn, in order.
            **extra: other arguments of the template.

        Raises:
            RewrittenTurnError: the text of a turn cannot be found.
        """
        if learned and self.has_marks(extra) and all(messages[index]["role"] == "assistant" for index in learned):
            return [self._marked(messages, learned, **extra)]
        turns = {index: self._with_end(messages, index, **extra) for index in learned}
        out: list[Rendered] = []
        while turns:
            text = turns[max(turns)].whole
            here = {index: turn for index, turn in turns.items() if self._is_part(turn, messages[index], text)}
            spans = [(turn.start, len(text if text == turn.whole else turn.text)) for turn in here.values()]
            out.append(Rendered(text, spans, list(here), all(turn.continues_prompt for turn in here.values())))
            turns = {index: turn for index, turn in turns.items() if index not in here}
        return out[::-1]

    def unlearned_spans(self, messages: list[dict[str, Any]], indices: Sequence[int], **extra: Any) -> list[Span]:
        """Return where these turns are in the text of the whole chat.

        Raises:
            RewrittenTurnError: the text of a turn cannot be found.
        """
        text, found = self.render(messages, **extra), []
        for index in indices:
            turn = self._turn(messages, index, **extra)
            if not text.startswith(turn.text):
                raise RewrittenTurnError(
                    "the chat template renders a turn that is not learned differently when later turns follow, so its "
                    f"text cannot be found; leave out data.train_on_inputs. The turn: "
                    f"{brief(messages[index]['content'])}"
                )
            found.append((turn.start, len(turn.text)))
        return found

    def has_marks(self, extra: dict[str, Any]) -> bool:
        """Tell whether the template marks what the assistant generates, given its other arguments."""
        return _MARK.search(self.tokenizer.get_chat_template(None, extra.get("tools"))) is not None

    def marks(self, messages: list[dict[str, Any]], **extra: Any) -> tuple[str, list[Span]]:
        """Render cleaned messages; return the text, and the characters that the template marks."""
        from transformers.utils.chat_template_utils import render_jinja_template

        template = self.tokenizer.get_chat_template(None, extra.get("tools"))
        arguments = {**self.tokenizer.special_tokens_map, **extra}
        # Annotated as text, but it returns the texts and, of each, the spans.
        found: Any = render_jinja_template(
            [messages], chat_template=template, return_assistant_tokens_mask=True, **arguments
        )
        return found[0][0], [(start, end) for start, end in found[1][0] if end > start]

    def _marked(self, messages: list[dict[str, Any]], learned: Sequence[int], **extra: Any) -> Rendered:
        last = learned[-1]
        text, spans = self.marks(messages[: last + 1], **extra)
        answers = [index for index, message in enumerate(messages[: last + 1]) if message["role"] == "assistant"]
        if answers == list(learned):
            return Rendered(text, self._to_ends(text, spans), list(learned))
        # The marks of a turn are those between the texts that end before it and before the next answer.
        counts = [len(self.marks(messages[:index], **extra)[1]) if index else 0 for index in answers] + [len(spans)]
        if counts != sorted(counts):
            raise RewrittenTurnError(
                "the chat template marks another number of answers when later turns follow, so those without a weight "
                "cannot be told from the others; give all answers of the chat a weight, or set data.learn"
            )
        kept = [
            span for at, index in enumerate(answers) if index in learned for span in spans[counts[at] : counts[at + 1]]
        ]
        return Rendered(text, self._to_ends(text, kept), list(learned))

    def _to_ends(self, text: str, spans: list[Span]) -> list[Span]:
        """Return marked spans with the end of turn that follows them; a model that does not learn it does not stop."""
        mark, out = self._end, []
        for start, end in spans:
            rest = text[end:].lstrip()
            is_outside = mark and rest.startswith(mark) and not text[start:end].rstrip().endswith(mark)
            out.append((start, len(text) - len(rest) + len(mark)) if is_outside else (start, end))
        return out

    @cached_property
    def _end(self) -> str:
        return self.end_of_turn() or ""

    def _turn(self, messages: list[dict[str, Any]], index: int, **extra: Any) -> Turn:
        """Return a turn in the text that ends with it.

        Raises:
            RewrittenTurnError: the template renders the earlier turns differently once this one follows.
        """
        is_answer = messages[index]["role"] == "assistant"
        whole = self.render(messages[: index + 1], **extra).rstrip()
        try:
            before = self.render(messages[:index], is_answer, **extra) if index else None
        except Exception:  # some templates refuse a chat without a user's turn
            before = None
        if before is None:
            is_first = index == 0 and not is_answer
            start = 0 if is_first else self._start_of_first(messages[index], whole, is_answer)
            return Turn(self._open(whole), start, whole)
        if not is_answer:
            before = before.removesuffix(self._closing)
        if whole.startswith(before):
            # Some templates add no generation prompt after a tool's result, but a header before the answer.
            head = self._head if is_answer and whole.startswith(self._head, len(before)) else ""
            return Turn(self._open(whole), len(before + head), whole)
        prompt = _common(self.tokenizer, before, self.render(messages[:index], **extra).removesuffix(self._closing))
        # The generation prompt may begin an answer in a way that this one does not continue, such as with reasoning.
        if is_answer and (start := _common(self.tokenizer, before, whole)) >= prompt:
            return Turn(self._open(whole), start, whole, continues_prompt=False)
        # The answer may change earlier turns (gpt-oss drops their reasoning); it is learned after what is there before.
        tail = _after_suffix(before, whole, least=len(before) - prompt + 1) if is_answer else None
        if tail is None:
            raise RewrittenTurnError(
                "the tokenizer's chat template renders a turn differently when later turns follow, so its text cannot "
                f"be found; set data.chat_template to one that only appends. The turn: "
                f"{brief(messages[index]['content'])}"
            )
        return Turn(self._open(before + tail), len(before), before + tail)

    def _with_end(self, messages: list[dict[str, Any]], index: int, **extra: Any) -> Turn:
        """Return a turn; if the template does not end it, with the token that begins the next one (as GLM's do)."""
        turn = self._turn(messages, index, **extra)
        if not self._borrowed_end or messages[index]["role"] != "assistant":
            return turn
        following = self._probe(*messages[: index + 2], **extra) if index + 1 < len(messages) else ""
        rest = following.removeprefix(turn.text) if following.startswith(turn.text) else ""
        end = self._first_special(rest) or self._borrowed_end
        return replace(turn, text=turn.text + end, whole=turn.text + end)

    @cached_property
    def _borrowed_end(self) -> str:
        """The token that begins a user's turn, if the template puts nothing after the assistant's text."""
        chat = self.clean([{"role": role, "content": text} for role, text in _PROBE_CHAT])
        found = self._probe(*chat)
        if self._probe(*chat[:-1]).rstrip().endswith(_PROBE_CHAT[1][1]) and _PROBE_CHAT[1][1] in found:
            return self._first_special(found.partition(_PROBE_CHAT[1][1])[2])
        return ""

    def _first_special(self, text: str) -> str:
        """Return the special token with which a text begins; "" if there is none."""
        text, skipped = text.lstrip(), {self.tokenizer.bos_token}
        found = [
            token for token in self.tokenizer.all_special_tokens if text.startswith(token) and token not in skipped
        ]
        return max(found, key=len, default="")

    def _open(self, whole: str) -> str:
        """Return the text of a chat without what the template puts at its end."""
        return whole.removesuffix(self._closing).rstrip()

    @cached_property
    def _head(self) -> str:
        """The generation prompt after a user's turn."""
        user = self._user()
        return self._probe(user, add_generation_prompt=True).removeprefix(self._probe(user))

    def _user(self) -> dict[str, Any]:
        return self.clean([{"role": "user", "content": "x"}])[0]

    def _start_of_first(self, message: dict[str, Any], text: str, is_answer: bool) -> int:
        """Return where a turn starts if the template cannot render the messages before it."""
        if is_answer:
            return text.find(self._head) + len(self._head) if self._head in text else 0
        content = message["content"]
        content = content_text(content).strip()
        return max(0, text.rfind(content))

    @cached_property
    def _closing(self) -> str:
        """What the template puts at the end of every chat, whoever spoke last: the end-of-text token, or nothing."""
        user = self._user()
        bare, prompt = self._probe(user).rstrip(), self._probe(user, add_generation_prompt=True)
        end = self.tokenizer.eos_token or ""
        is_closed = end and bare.endswith(end) and not prompt.startswith(bare)
        return end if is_closed and prompt.startswith(bare.removesuffix(end)) else ""

    def _is_part(self, turn: Turn, message: dict[str, Any], text: str) -> bool:
        """Tell whether a text contains a turn as the model generates it, with its end."""
        if text == turn.whole:
            return True
        content = message["content"]
        content = content_text(content).strip()
        ends = not self._closing or not content or not turn.text.endswith(content)
        return ends and text.startswith(turn.text)

    def end_of_turn(self) -> str | None:
        """Return what the template puts after the assistant's text; None if this cannot be found out."""
        chat = self.clean([{"role": role, "content": text} for role, text in _PROBE_CHAT[:2]])
        _, answer, tail = self._probe(*chat).rpartition(_PROBE_CHAT[1][1])
        return (tail.strip() or self._borrowed_end) if answer else None


def unused_fields(tokenizer: Any, names: Iterable[str]) -> list[str]:
    """Return the names that the source of a tokenizer's chat template does not contain."""
    template = tokenizer.chat_template
    source = "".join(template.values()) if isinstance(template, dict) else str(template)
    has_reasoning = any(name in source for name in REASONING_FIELDS)
    return [name for name in names if name not in source and not (name in REASONING_FIELDS and has_reasoning)]


def _common(tokenizer: Any, first: str, second: str) -> int:
    """Return the number of characters in the tokens with which both texts begin."""
    a, b = (
        tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        for text in (first, second)
    )
    end = 0
    for one, other, offset in zip(a["input_ids"], b["input_ids"], a["offset_mapping"], strict=False):
        if one != other:
            break
        end = offset[1]
    return end


def _after_suffix(before: str, whole: str, least: int) -> str | None:
    """Return what follows the longest end of `before` that `whole` contains; None if it is shorter than `least`."""
    low, high = 0, len(before)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if before[-middle:] in whole else (low, middle - 1)
    return whole.rpartition(before[-low:])[2] if low >= least else None


def content_text(content: Any) -> str:
    """Return the text of a message's content, which is a text or a list of parts."""
    return "".join(part.get("text", "") for part in content) if isinstance(content, list) else content


def left_out(message: dict[str, Any], text: str) -> list[str]:
    """Return which parts of a message a text lacks: its content, its reasoning, its tool calls."""
    found = "".join(text.split())
    content = content_text(message.get("content") or "")
    calls = message.get("tool_calls") or ()
    names = [call["function"].get("name", "") for call in calls if isinstance(call, dict) and "function" in call]
    reasoning = [str(message[name]) for name in REASONING_FIELDS if message.get(name)]
    parts = {"content": [content], "reasoning": reasoning[:1], "tool calls": names}
    return [part for part, texts in parts.items() if not all("".join(t.split()) in found for t in texts)]


def _with_json_arguments(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or isinstance(function.get("arguments"), str):
        return call
    return {**call, "function": {**function, "arguments": json.dumps(function.get("arguments"), ensure_ascii=False)}}
