"""CoNLL files: one word per line, with columns beside it, and an empty line between sentences."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_peft.data.file_errors import file_error
from lit_peft.data.files import content_digest, resolve_file, tables_root
from lit_peft.util.errors import LitPeftError

if TYPE_CHECKING:
    from datasets import Dataset

# Characters of a line; a word and its columns are much shorter.
_LONGEST_LINE = 2**20
SUFFIXES = (".conll", ".bio", ".iob", ".iob2", ".txt", ".tsv")


def read_conll(
    value: str,
    field: str,
    tokens_column: str = "tokens",
    tags_column: str | None = "tags",
    token_position: int = 0,
    tag_position: int = -1,
) -> Dataset:
    """Read a CoNLL file.

    Columns are separated by tabs if a line has one, else by white space. `-DOCSTART-` lines are skipped.

    Args:
        value: a path, or `"pkg:DISTRIBUTION/path"`.
        field: the setting's name, for error messages ("data.train").
        tokens_column: name of the column of words.
        tags_column: name of the column of tags; None: read words only.
        token_position: index of the column with the word.
        tag_position: index of the column with the tag; negative: from the right.

    Returns:
        A table with a list of words, and a list of as many tags, in each row.

    Raises:
        LitPeftError: the file is missing or empty, not UTF-8, or a line has too few columns.
    """
    import datasets

    path = resolve_file(value, field, SUFFIXES)
    texts = datasets.Sequence(datasets.Value("string"))
    settings = {
        "path": str(path.resolve()),
        "content": content_digest(path),
        "columns": {tokens_column: token_position, **({tags_column: tag_position} if tags_column else {})},
        "where": f"{field} {value!r}",
    }
    try:
        table = datasets.Dataset.from_generator(
            _sentences,
            features=datasets.Features(dict.fromkeys(settings["columns"], texts)),
            gen_kwargs=settings,
            cache_dir=str(tables_root()),
        )
    except Exception as exc:
        raise file_error(path, field, value, "text", exc) from exc
    return table


def _sentences(path: str, content: str, columns: dict[str, int], where: str) -> Iterator[dict[str, Any]]:
    rows: dict[str, list[str]] = {name: [] for name in columns}
    any_row = False
    with Path(path).open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, start=1):
            if len(line) > _LONGEST_LINE:
                raise LitPeftError(
                    f"{where}: line {number} has {len(line):,} characters, and a line is one word with its columns: is "
                    "this a CoNLL file?"
                )
            cells = line.rstrip("\n").split("\t") if "\t" in line.strip() else line.split()
            if not line.strip() or cells[0] == "-DOCSTART-":
                if any(rows.values()):
                    any_row = True
                    yield rows
                    rows = {name: [] for name in columns}
                continue
            for name, position in columns.items():
                if not -len(cells) <= position < len(cells) or (len(columns) > 1 and len(cells) < 2):
                    raise LitPeftError(
                        f"{where}: line {number} ({line.strip()[:40]!r}) has {len(cells)} column(s), too few for "
                        "data.token_position and data.tag_position: give a word and its tag on each line."
                    )
                rows[name].append(cells[position].strip())
    if any(rows.values()):
        yield rows
    elif not any_row:
        raise LitPeftError(f"{where} has no rows; give a file with at least one sentence.")
