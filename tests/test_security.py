"""Every promise of SECURITY.md has tests, which exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOREIGN = "test_foreign_limits.py"
COSTS = f"{FOREIGN}::test_a_folder_costs_little_whatever_it_declares"
EXPORTS = f"{FOREIGN}::test_a_checkpoint_chooses_no_code"
# The start of each promise, and what tries it.
PROMISES = {
    "No code in them is executed: tensors come": ["test_formats.py::test_pickles_never_run"],
    "No file outside of the folder": ["test_formats.py::test_links_out_of_the_folder_are_not_followed"],
    "A file of settings has at most": [COSTS],
    "Keys that occur twice": ["test_expressions.py::test_repeated_keys_are_found_in_one_pass"],
    "A pickled file has at most": [COSTS],
    "Settings never make a model allocate": [COSTS, f"{FOREIGN}::test_a_layer_is_not_built_beyond_what_is_stored"],
    "The regular expressions of one setting": [
        "test_expressions.py::test_no_expression_of_a_foreign_folder_takes_long",
        "test_expressions.py::test_many_slow_expressions_share_the_time",
    ],
    "A model that refuses a folder": ["test_fuzz.py::test_mutated_files"],
    "Control characters": [f"{FOREIGN}::test_control_characters_are_never_printed"],
    "No code in them is executed, and nothing is loaded": [
        "test_commands.py::test_a_checkpoint_does_not_say_whom_to_trust",
        EXPORTS,
    ],
    "`export` prints the name of the base": [EXPORTS],
    "`export` takes the base": [EXPORTS],
    "Settings that are not taken": [EXPORTS],
    "A quantization that can load": [EXPORTS],
    "Shapes are compared": [f"{FOREIGN}::test_a_checkpoint_costs_little_whatever_it_declares"],
    "The settings have at most": [
        f"{FOREIGN}::test_a_checkpoint_costs_little_whatever_it_declares",
        f"{FOREIGN}::test_a_checkpoint_does_not_unpack_to_more_than_it_has",
    ],
    "Of a `config.yaml` beside": [f"{FOREIGN}::test_a_configuration_beside_a_checkpoint_is_not_expanded"],
    "The counts, lengths and sizes": [
        f"{FOREIGN}::test_the_header_of_a_gguf_file_is_believed_only_if_it_can_be_true",
    ],
    "A file that lacks weights": ["test_sources.py::test_gguf_files_that_cannot_be_converted"],
    "No code in them is executed.": ["test_fuzz.py::test_mutated_files"],
    # What must be trusted: that the promises stop there.
    "YAML configurations and command lines": ["test_fuzz.py::test_mutated_files"],
    "Base models": ["test_commands.py::test_code_that_a_base_brings_does_not_run"],
    "`attn_implementation` in your configuration": [EXPORTS],
    "`trainer.fit(ckpt_path=...)`": ["test_modules.py::test_the_base_class_loads_any_run"],
}


def test_every_promise_has_a_test() -> None:
    text = (ROOT / "SECURITY.md").read_text()
    promises = [" ".join(found.split()) for found in re.findall(r"^- ((?:.+\n)(?:  .+\n)*)", text, re.MULTILINE)]
    assert len(promises) == len(PROMISES)
    for promise in promises:
        assert sum(promise.startswith(start) for start in PROMISES) == 1, promise
    for names in PROMISES.values():
        for name in names:
            file, _, function = name.partition("::")
            assert f"\ndef {function}(" in (ROOT / "tests" / file).read_text(), name


def test_the_limits_are_those_of_the_code() -> None:
    from lit_peft.commands import export
    from lit_peft.formats import untrusted
    from lit_peft.util import expressions

    assert (untrusted.MAX_JSON, untrusted.MAX_HEADER, untrusted.MAX_TENSORS) == (4 * 2**20, 8 * 2**20, 30_000)
    assert untrusted.MAX_PICKLE == 2 * 2**20 and 4 * untrusted.SPARE_ELEMENTS == 16 * 2**20
    assert expressions.SECONDS == 0.5 and export.MAX_VALUES == 100_000
