"""The reference's log-probabilities of a data module's rows, computed once before a stage and kept in the cache.

A file for each split holds them, by the keys of the rows. Its name is a hash of the base, the rows and what else
changes the numbers, so a second run, a resumed one and `lit-peft test` read it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from lit_peft.data.record import examples_digest
from lit_peft.formats.base_record import base_record
from lit_peft.methods.attachment import attachment_of
from lit_peft.models.cache import cache_error, cache_root
from lit_peft.models.sources import resolve_base
from lit_peft.nn.evaluating import evaluating
from lit_peft.tasks.reference import reference_model
from lit_peft.training.building import load_bare_base
from lit_peft.training.lightning_internals import trainer_of
from lit_peft.training.run_record import say
from lit_peft.util.disk import whole_file

# Raised when the same key would give other numbers than before.
_VERSION = 1


def precompute_reference(module: Any, data: Any, splits: tuple[str, ...]) -> None:
    """Compute the reference's log-probabilities of the rows of some splits, or read them from the cache.

    Args:
        module: a `BaseLM` with its model and a Trainer, whose task has a `table` to fill.
        data: its data module.
        splits: the splits of the stage; those that the data does not have are left out.

    Raises:
        LitPeftError: the cache cannot be written.
    """
    if not (hasattr(data, "examples") and hasattr(data, "collator")):
        return  # the task says what is missing when the first batch comes
    for split in splits:
        if split not in data.rows:
            continue
        examples = data.examples(split)
        file = cache_root() / "reference" / f"{_name(module, data, examples)}.safetensors"
        # Other machines may have another cache, or none.
        tensors = module.trainer.strategy.broadcast(_read(file) if module.trainer.is_global_zero else None)
        known = tensors is not None
        if not known:
            tensors = _computed(module, data, split, examples)
            if module.trainer.is_global_zero:
                _write(file, tensors)
        module.task.table.add(**tensors)
        say(f"its log-probabilities of data.{split} are {'read from' if known else 'kept in'} {file}", "reference:")


def _name(module: Any, data: Any, examples: Any) -> str:
    """Return a hash of all that the numbers depend on."""
    base = base_record(module.model)
    parameter = next(p for p in module.model.parameters() if p.is_floating_point())
    numbers = (module.trainer.precision, str(parameter.dtype), module.hparams.quantization)
    weights = base["sample"]
    if attachment_of(module.model).irreversible:  # the model's weights are not the base's any more
        folder = Path(resolve_base(module.hparams.base).path)
        weights = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(folder.glob("*.*"))]
    key = (_VERSION, base["name"], base["revision"], base["shapes"], weights, numbers, data.max_length)
    content = json.dumps([*key, examples_digest(examples)], sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def _computed(module: Any, data: Any, split: str, examples: Any) -> dict[str, Tensor]:
    """Return the keys of all rows, their numbers of supervised tokens and the tokens' log-probabilities."""
    trainer, collate = trainer_of(module), data.collator(split)
    assert trainer is not None
    processes, rank = trainer.world_size, trainer.global_rank
    # Each process takes as many batches, as sharded models need; rows that come twice do no harm.
    batches = -(-len(examples) // (data.batch_size * processes))
    keys, counts, values = [], [], []
    silent = rank > 0 or trainer.progress_bar_callback is None
    with _reference_of(module) as model, trainer.precision_plugin.forward_context(), _loss_only(module, model):
        for number in tqdm(range(batches), desc=f"Reference, {split}", disable=silent):
            first = (number * processes + rank) * data.batch_size
            rows = [(first + place) % len(examples) for place in range(data.batch_size)]
            batch = collate([examples[row] for row in dict.fromkeys(rows)])
            batch = {name: value.to(module.device) for name, value in batch.items()}
            for key, labels, log_probs in module.task.reference_rows(model, batch):
                supervised = labels != -100
                keys.append(key.cpu())
                counts.append(supervised.sum(1).cpu())
                values.append(log_probs[supervised].float().cpu())
    own = {"keys": torch.cat(keys), "counts": torch.cat(counts), "values": torch.cat(values)}
    if processes == 1:
        return own
    every: list[Any] = [None] * processes
    torch.distributed.all_gather_object(every, own)
    return {name: torch.cat([part[name] for part in every]) for name in own}


def _loss_only(module: Any, model: Any) -> AbstractContextManager[None]:
    """Return a context in which no logits are kept, unless `supervised_loss` is off."""
    context: AbstractContextManager[None] = (
        module.task.loss_only(model) if module.hparams.supervised_loss else nullcontext()
    )
    return context


@contextmanager
def _reference_of(module: Any) -> Iterator[Any]:
    """Provide the reference: the model without its adapter or, if the method changes the base, the base loaded anew."""
    if not attachment_of(module.model).irreversible:
        with reference_model(module.model):
            yield module.model
        return
    say("the base is loaded once more, because the method trains the base itself", "reference:")
    model = load_bare_base(module)[0].to(module.device)
    with evaluating(model):
        yield model


def _write(file: Path, tensors: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    try:
        with whole_file(file) as temporary:
            save_file(tensors, temporary)
    except OSError as problem:
        raise cache_error("precompute_reference", problem) from problem


def _read(file: Path) -> dict[str, Tensor] | None:
    from safetensors.torch import load_file

    return load_file(file) if file.is_file() else None
