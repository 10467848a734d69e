"""`lit-peft merge`: writes a transformers folder of a base with a LoRA merged into it."""

from __future__ import annotations

import contextlib
import re

from lit_peft.commands.options import Options, load_base_from_options
from lit_peft.util.errors import LitPeftError


def run(arguments: list[str]) -> None:
    """Merge an adapter into its base and save the result, which appears complete or not at all.

    Raises:
        LitPeftError: the input is wrong, or the adapter cannot be merged.
    """
    parser = Options("lit-peft merge", description="Merge a LoRA into its base: a plain transformers folder.")
    parser.takes_base()
    parser.add_argument("--adapter", required=True, help="the adapter's folder")
    parser.add_argument("--output", required=True, help="the new folder")
    parser.add_argument("--max_shard_size", default="5GB", help="maximum size of a weights file")
    parser.add_argument(
        "--pooling", choices=["mean", "last", "cls"], help="of task embedding: write what sentence-transformers needs"
    )
    parser.add_argument("--normalize", choices=["true", "false"], help="the same; true if unset")
    options = parser.parse_args(arguments)
    if options.pooling is not None:
        if options.task not in (None, "embedding"):
            raise LitPeftError(f"--pooling is for task embedding, and --task is {options.task}: leave one of them out.")
        options.task = "embedding"
    elif options.normalize is not None:
        raise LitPeftError("--normalize has no effect without --pooling: leave it out.")
    size = re.fullmatch(r"(\d+(?:\.\d+)?)(?:KB|MB|GB|TB)", options.max_shard_size, re.IGNORECASE)
    if size is None or not float(size[1]):
        raise LitPeftError(f"--max_shard_size {options.max_shard_size}: give a size above 0, e.g. 500MB or 5GB.")

    from lit_peft.formats.folder import load_adapter, new_folder
    from lit_peft.formats.sentence_transformers import write_modules
    from lit_peft.methods.lora import merge
    from lit_peft.models.processing import copy_processor
    from lit_peft.models.tokenization import adapter_tokenizer

    with new_folder(options.output) as folder:
        model = load_base_from_options(options)
        merge(load_adapter(model, options.adapter, check_base=not options.force))
        model.save_pretrained(folder, max_shard_size=options.max_shard_size)
        # A base without a tokenizer can be merged, too.
        with contextlib.suppress(LitPeftError):
            adapter_tokenizer([options.adapter], options.base, "--base", options.revision).save_pretrained(folder)
        copy_processor(options.base, folder, options.revision)
        if options.pooling is not None:
            write_modules(folder, model.config.hidden_size, options.pooling, options.normalize != "false")
    print(f"merged: {options.output}")
