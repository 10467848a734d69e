"""A mkdocs hook: every notebook becomes a page, as it was executed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files


def on_files(files: Files, config: Any) -> Files:
    """Add a Markdown page beside each notebook, which stays to be downloaded."""
    for file in [file for file in files if file.src_uri.endswith(".ipynb")]:
        source = Path(config["docs_dir"], file.src_uri).read_text(encoding="utf-8")
        page = file.src_uri.removesuffix(".ipynb") + ".md"
        files.append(File.generated(config, page, content=markdown(json.loads(source), Path(file.src_uri).name)))
    return files


def markdown(notebook: dict[str, Any], name: str) -> str:
    """The notebook's cells with their outputs; a link to the file stands below its title."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(_fenced(source, "python"))
        parts += [text for output in cell["outputs"] if (text := _output(output))]
    parts[0] = re.sub(r"\A(# .*\n)", rf"\1\n[The notebook]({name})\n", parts[0])
    return "\n\n".join(parts) + "\n"


def _output(output: dict[str, Any]) -> str:
    data = output.get("data", {})
    if "image/png" in data:
        return f"![result](data:image/png;base64,{''.join(data['image/png']).strip()})"
    text = "".join(output.get("text", data.get("text/plain", "")))
    return _fenced(text.rstrip(), "text") if text.strip() else ""


def _fenced(text: str, language: str) -> str:
    return f"```{language}\n{text}\n```"
