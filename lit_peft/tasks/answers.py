"""Answers of LLM-Adapters' benchmarks: their kinds, and how to find them in generated text.

The scripts of AGI-Edgerunners/LLM-Adapters (`evaluate.py`, `commonsense_evaluate.py`) find answers in another way;
`docs/reasoning.md` lists the differences, their errors, and each reference output in their files that does not state
its gold answer. The rules here:

- Number: the one after the last "answer is" (after the last "=" of that sentence); without these words, the last one.
  A comma is part of a number only between groups of three digits; a minus after a digit or a word is not a sign.
- Letter (AQuA): a single letter after the last "answer is"; without these words, the last one in parentheses, or the
  first word of the text.
- Choice: the first one after the last "answer is"; without these words, the only choice in the text; a text with
  several choices has no answer.
- Text after a new "###" heading or an end-of-text token is not part of the answer.
"""

from __future__ import annotations

import re
from typing import Any

from lit_peft.util.errors import LitPeftError, closest

MATH = ("gsm8k", "aqua", "svamp", "mawps", "addsub", "multiarith", "singleeq")

# Pattern of each kind of answer. All gold answers of a benchmark are of one kind; `math_data.json` mixes two.
_CHOICES = {
    "truth": r"\b(true|false)\b",
    "solution": r"\b(solution) ?([12])\b",
    "ending": r"\b(ending) ?([1-4])\b",
    "option": r"\b(option) ?([12])\b",
    "answer": r"\b(answer) ?([1-5])\b",
}
_KINDS = {
    **dict.fromkeys(MATH, "number"),
    "aqua": "letter",
    "boolq": "truth",
    "piqa": "solution",
    "siqa": "answer",
    "hellaswag": "ending",
    "winogrande": "option",
    **dict.fromkeys(("arc-e", "arc-c", "openbookqa"), "answer"),
}
# Other names, from the papers, the folders of LLM-Adapters and common use.
_ALIASES = {
    "social_i_qa": "siqa",
    "socialiqa": "siqa",
    "arc-easy": "arc-e",
    "arc-challenge": "arc-c",
    "obqa": "openbookqa",
}

TOLERANCE = 1e-3
"""Two numbers with at most this difference are the same answer, as in LLM-Adapters."""

# "The answer is", "Answer:", "the correct option is", and GSM8K's own "####".
_STATEMENT = re.compile(
    r"\banswers?(?:\s+(?:to|for)\s[^.:?!\n]{0,60}?)?(?:\s+(?:is|are|would be|will be)\b|\W{0,3}[:=])[:\s]*"
    r"|\bcorrect (?:option|choice) is[:\s]*|####\s*",
    re.IGNORECASE,
)
_END = re.compile(r"\n\s*###(?!#)|<\|?(?:end\w*|im_\w+|/s|eot_id)\|?>|</s>")
# Sign, dollar, sign, the whole part of "1 1/2", digits ("1,200.5"; "$1 200"), and the denominator.
_NUMBER = re.compile(
    r"(?<![\d.])([-−]\s?)?\$?\s?([-−])?(?:(\d+) (?=\d+/\d))?"
    r"((?<=\$)\d{1,3}(?: \d{3})+(?!\d)|\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
    r"(?:\s?/\s?(\d+(?:\.\d+)?))?"
)
_LETTER = re.compile(r"\(([A-E])\)|(?<![A-Za-z'])([A-E])(?![A-Za-z'])")


def find_benchmark(name: str) -> str:
    """Return the usual name of a benchmark from any of its names, in any case.

    Raises:
        LitPeftError: there is no such benchmark.
    """
    key = name.lower()
    key = _ALIASES.get(key, _ALIASES.get(key.replace("_", "-"), key))
    if key not in _KINDS:
        raise LitPeftError(f"data.benchmark {name!r} is not known: the closest are {closest(key, _KINDS)}.")
    return key


def kind_of_benchmark(benchmark: str) -> str:
    """Return a benchmark's kind of answer: `number`, `letter`, `truth`, `solution`, `ending`, `option` or `answer`."""
    return _KINDS[benchmark]


def kind_of(gold: Any) -> str | None:
    """Return the kind of a gold answer, recognized by its form; None if it has no known form."""
    text = gold_text(gold)
    if re.fullmatch(r"\(?[A-E]\)?", text):
        return "letter"
    for kind, pattern in _CHOICES.items():
        if re.fullmatch(pattern, text, re.IGNORECASE):
            return kind
    return "number" if _NUMBER.fullmatch(text) else None


def gold_text(gold: Any) -> str:
    """Return a gold answer as text: the last entry of a list, the part after "####" of a solution in GSM8K's form."""
    while isinstance(gold, list) and gold:
        gold = gold[-1]
    return "" if gold is None else str(gold).rpartition("####")[2].strip()


def extract_answer(text: str, kind: str) -> str | None:
    """Find the answer in a generated text.

    Args:
        text: the generated text, without the prompt.
        kind: the kind of answer, see `kind_of_benchmark`.

    Returns:
        The answer in a normal form: "12.5", "B", "true", "answer2"; None if the text has no answer.
    """
    text = _END.split(text, maxsplit=1)[0]
    statements = list(_STATEMENT.finditer(text))
    statement = text[statements[-1].end() :] if statements else ""
    if kind == "number":
        sentence = re.split(r"[.!?](?:\s|$)|\n", statement, maxsplit=1)[0].rpartition("=")[2]
        found = _numbers(sentence)[:1] or _numbers(statement)[:1] or _numbers(text)[-1:]
        return found[0] if found else None
    if kind == "letter":
        letters = [match[1] or match[2] for match in _LETTER.finditer(statement)]
        if not letters:
            # "B", "(B)", "B. 12" and "B: 12"; but "A: …" is only the label of an answer.
            whole = re.fullmatch(r"\s*\(?(?!A:\s*\S)([A-E])[).:]?(?:\s.*)?", text, re.DOTALL)
            last = re.findall(r"\(([A-E])\)", text)
            letters = last[-1:] or ([whole[1]] if whole else [])
        return letters[0] if letters else None
    choices = _choices(statement, kind)
    if not choices:
        choices = list(dict.fromkeys(_choices(text, kind)))
        choices = choices if len(choices) == 1 else []
    return choices[0] if choices else None


def same_answer(answer: str | None, gold: Any, kind: str) -> bool:
    """Return whether an extracted answer equals the gold answer; numbers may differ by `TOLERANCE`."""
    if answer is None:
        return False
    text = gold_text(gold)
    if kind == "number":
        numbers = _numbers(text)
        return bool(numbers) and abs(float(answer) - float(numbers[0])) <= TOLERANCE
    if kind == "letter":
        return answer == text.strip("()")
    return answer in _choices(text, kind)


def _choices(text: str, kind: str) -> list[str]:
    return ["".join(filter(None, match.groups())).lower() for match in re.finditer(_CHOICES[kind], text, re.IGNORECASE)]


def _numbers(text: str) -> list[str]:
    found = []
    for match in _NUMBER.finditer(text):
        before, after, whole, digits, denominator = match.groups()
        value = float(re.sub("[, ]", "", digits))
        if denominator is not None and float(denominator) != 0:
            value /= float(denominator)
        value += float(whole or 0)
        # In "5-3" and "a-3" the minus is a hyphen or an operator, not a sign.
        signed = (before and not re.search(r"[\w)]\s?$", text[: match.start()])) or after
        found.append(repr(-value if signed else value).removesuffix(".0"))
    return found
