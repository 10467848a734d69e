"""Answers of LLM-Adapters' benchmarks: which there are, and how they are read out of generated text.

Their scripts (`evaluate.py`, `commonsense_evaluate.py` of AGI-Edgerunners/LLM-Adapters) find answers otherwise. The
differences, and where theirs are wrong:

- Letter (AQuA): theirs is the first capital A to E anywhere, so "Because …", "Each …" and the "A:" that opens an answer
  count. Here: a letter that stands by itself, after the last "answer is"; without the phrase, the last in parentheses.
- Number: theirs is the last number of the text after all commas are dropped, so "4,5" is 45, and what a model adds
  after its answer counts instead of it ("The answer is 4. He had 7 before."). Here: the number after the last
  "answer is" (after the last "=" of that sentence); without the phrase, the last number; a comma is part of a number
  only between groups of three digits; a minus after a digit is no sign; "3/4" is 0.75.
- No number: theirs fails on an index, or counts infinity. Here: no answer, which is wrong.
- Choice: theirs is the first `answerN`, `solutionN`, `endingN`, `optionN`, `true` or `false`, in lower case. Here: the
  first after the last "answer is"; without the phrase, the one choice that the text names; a text that names several
  has no answer. Upper and lower case are the same, and "answer 1" is "answer1"; "answer12" is not.
- Text after a new "###" heading or an end-of-text is not part of the answer; theirs reads on.
- Gold: the older of theirs takes `answer[-1]`, the last character of a text. Here: the whole text, or a list's end.
"""

from __future__ import annotations

import re
from typing import Any

from lit_peft.errors import LitPeftError, closest

MATH = ("gsm8k", "aqua", "svamp", "mawps", "addsub", "multiarith", "singleeq")
COMMONSENSE = ("boolq", "piqa", "siqa", "hellaswag", "winogrande", "arc-e", "arc-c", "openbookqa")

# Kind of answer -> what one looks like. A benchmark's gold answers are all of one kind; `math_data.json` mixes two.
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
# How the papers, the folders of LLM-Adapters and people call them.
_ALIASES = {
    "social_i_qa": "siqa",
    "socialiqa": "siqa",
    "arc-easy": "arc-e",
    "arc-challenge": "arc-c",
    "obqa": "openbookqa",
}

TOLERANCE = 1e-3
"""Two numbers this close are the same answer, as in LLM-Adapters."""

_STATEMENT = re.compile(r"\banswer(?: is|:)[:\s]*", re.IGNORECASE)
_END = re.compile(r"\n\s*###|<\|?(?:end\w*|im_\w+|/s|eot_id)\|?>|</s>")
_NUMBER = re.compile(
    r"(?<![\d.])(-\s?)?\$?\s?(-)?((?:\d{1,3}(?:,\d{3})+(?![\d]))(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)(?:\s?/\s?(\d+(?:\.\d+)?))?"
)
_LETTER = re.compile(r"\(([A-E])\)|(?<![A-Za-z'])([A-E])(?![A-Za-z'])")


def find_benchmark(name: str) -> str:
    """Return the benchmark's own name, whatever the case, and whichever of its names was used.

    Raises:
        LitPeftError: there is none.
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
    """Return the kind of a gold answer by its form; None if it has none of them."""
    text = gold_text(gold)
    if re.fullmatch(r"\(?[A-E]\)?", text):
        return "letter"
    for kind, pattern in _CHOICES.items():
        if re.fullmatch(pattern, text, re.IGNORECASE):
            return kind
    return "number" if _NUMBER.fullmatch(text) else None


def gold_text(gold: Any) -> str:
    """Return a gold answer as text; of a list, as some of the files have it, the last entry."""
    while isinstance(gold, list) and gold:
        gold = gold[-1]
    return "" if gold is None else str(gold).strip()


def extract_answer(text: str, kind: str) -> str | None:
    """Read the answer out of a generated text.

    Args:
        text: what the model wrote, without the prompt.
        kind: the kind of answer, see `kind_of_benchmark`.

    Returns:
        The answer in one form: "12.5", "B", "true", "answer2"; None if the text gives none.
    """
    text = _END.split(text, maxsplit=1)[0]
    statements = list(_STATEMENT.finditer(text))
    said = text[statements[-1].end() :] if statements else ""
    if kind == "number":
        sentence = re.split(r"[.!?](?:\s|$)|\n", said, maxsplit=1)[0].rpartition("=")[2]
        found = _numbers(sentence)[:1] or _numbers(said)[:1] or _numbers(text)[-1:]
        return found[0] if found else None
    if kind == "letter":
        letters = [match[1] or match[2] for match in _LETTER.finditer(said)]
        if not letters:
            whole = re.fullmatch(r"\s*\(?([A-E])[).:]?(?:\s.*)?", text, re.DOTALL)
            last = re.findall(r"\(([A-E])\)", text)
            letters = last[-1:] or ([whole[1]] if whole else [])
        return letters[0] if letters else None
    choices = _choices(said, kind)
    if not choices:
        choices = list(dict.fromkeys(_choices(text, kind)))
        choices = choices if len(choices) == 1 else []
    return choices[0] if choices else None


def same_answer(answer: str | None, gold: Any, kind: str) -> bool:
    """Tell whether an extracted answer is the gold one; numbers may differ by `TOLERANCE`."""
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
        before, after, digits, below = match.groups()
        value = float(digits.replace(",", ""))
        if below is not None and float(below) != 0:
            value /= float(below)
        # "5-3" and "a-3": a hyphen or the operator, not a sign.
        signed = (before and not re.search(r"[\w)]\s?$", text[: match.start()])) or after
        found.append(repr(-value if signed else value).removesuffix(".0"))
    return found
