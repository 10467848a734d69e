"""New tokens: a larger vocabulary, and training of some rows of the embeddings only.

The rows are those that `trainable_token_indices` names, as in peft. A row that the base does not have is added: its
values start from the mean of the base's rows. Where embeddings and head share a weight, they share the trained rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lit_peft.methods.attachment import Attachment, base_name
from lit_peft.methods.changes import AddModule, follow, owner_of
from lit_peft.nn.quantized import is_quantized
from lit_peft.nn.token_rows import TokenRows
from lit_peft.util.errors import LitPeftError, closest

NAME = "token_rows"
# A folder may name rows this far behind the base's last one; a larger number is a mistake, or an attack on the memory.
_MOST_NEW = 100_000


@dataclass
class ResizeVocabulary:
    """Gives the embeddings and the head `size` rows; the new ones are the mean of the others. A `Change`.

    Attributes:
        size: the number of rows.
        originals: the parameters and buffers that were replaced, by path.
        vocab_size: the configuration's own value.
    """

    size: int
    originals: dict[str, Tensor] = field(default_factory=dict)
    vocab_size: int | None = None

    def apply(self, model: nn.Module) -> None:
        self.originals = {path: tensor for path, tensor in _vocabulary_tensors(model)}
        longer: dict[int, Tensor] = {}
        for path, tensor in self.originals.items():
            if id(tensor) not in longer:
                longer[id(tensor)] = _longer(tensor, self.size)
            _put(model, path, longer[id(tensor)])
        config = _text_config(model)
        self.vocab_size = getattr(config, "vocab_size", None)
        _set_sizes(model, list(self.originals), self.size)

    def undo(self, model: nn.Module) -> None:
        moved: set[int] = set()
        old_size = self.size
        for path, original in self.originals.items():
            owner, name = owner_of(model, path)
            longer: Tensor = getattr(owner, name)
            if id(original) not in moved and (original.device, original.dtype) != (longer.device, longer.dtype):
                follow(original, (original.device, original.dtype), (longer.device, longer.dtype))
            moved.add(id(original))
            old_size = original.shape[-1] if original.dim() == 2 and original.shape[0] == 1 else original.shape[0]
            _put(model, path, original)
        _set_sizes(model, list(self.originals), old_size, self.vocab_size)


def _longer(tensor: Tensor, size: int) -> Tensor:
    """Return a weight or bias with more rows, as transformers resizes it: they are the mean of its rows."""
    with torch.no_grad():
        if tensor.dim() == 2 and tensor.shape[0] == 1:  # BART's buffer of shape (1, vocabulary)
            longer = torch.cat([tensor, tensor.new_zeros((1, size - tensor.shape[1]))], dim=1)
        else:
            mean = tensor.float().mean(0, keepdim=True).to(tensor.dtype)
            longer = torch.cat([tensor, mean.expand(size - len(tensor), *tensor.shape[1:])])
    return nn.Parameter(longer, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else longer


def _put(model: nn.Module, path: str, tensor: Tensor) -> None:
    owner, name = owner_of(model, path)
    setattr(owner, name, tensor)


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _set_sizes(model: nn.Module, paths: Sequence[str], size: int, vocab_size: int | None = None) -> None:
    for path in paths:
        owner: Any = owner_of(model, path)[0]
        for name in ("num_embeddings", "out_features"):
            if hasattr(owner, name):
                setattr(owner, name, size)
    config = _text_config(model)
    if getattr(config, "vocab_size", None) is not None:
        config.vocab_size = vocab_size or size


def _embeddings(model: Any) -> nn.Module:
    found = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    if not isinstance(found, nn.Embedding):
        raise LitPeftError(
            f"trainable_token_indices: {type(model).__name__} has no plain table of embeddings (the method may have "
            "replaced it): leave trainable_token_indices and add_tokens out."
        )
    return found


def _head(model: Any) -> nn.Module | None:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return head if isinstance(head, nn.Module) else None


def _vocabulary_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Return the tensors that have a row for each token, under all of their names."""
    embeddings: Any = _embeddings(model)
    head: Any = _head(model)
    if head is not None and is_quantized(head):
        raise LitPeftError(
            "add_tokens: the head of this model is quantized, so it cannot get rows for new tokens: load the base "
            "without quantizing the head."
        )
    wanted = {id(embeddings.weight)}
    if head is not None:
        wanted |= {id(head.weight), id(getattr(head, "bias", None))}
    found: list[tuple[str, Tensor]] = [
        (name, parameter)
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if id(parameter) in wanted
    ]
    # BART adds this buffer to its scores.
    found += [(name, buffer) for name, buffer in model.named_buffers() if name.endswith("final_logits_bias")]
    return found


def train_tokens(attachment: Attachment, wanted: Sequence[int] | Mapping[str, Sequence[int]]) -> None:
    """Train some rows of the embeddings, and of a head that shares their weight.

    Args:
        attachment: makes and records the changes.
        wanted: the rows of the input embeddings; or the rows of each module by its name, for a head of its own.

    Raises:
        LitPeftError: a row or module is not there, or is trained already.
    """
    model = attachment.model
    largest = max(row for rows in (wanted.values() if isinstance(wanted, Mapping) else [wanted]) for row in rows)
    size = len(_weight(_embeddings(model)))
    if largest >= size + _MOST_NEW:
        raise LitPeftError(
            f"trainable_token_indices names the row {largest}, but the base has only {size}: give the rows of its own "
            "tokens, or of new ones that follow them."
        )
    if largest >= size:
        attachment.make(ResizeVocabulary(largest + 1))
    places = _places(model, wanted)
    own = {id(p) for module in attachment.adapted.values() for p in module.parameters()}
    for path, rows in places.items():
        module = model.get_submodule(path)
        weight = _weight(module)
        if weight.requires_grad or id(weight) in own or path in attachment.adapted:
            raise LitPeftError(
                f"trainable_token_indices trains rows of {path}, which target_modules or modules_to_save change too: "
                "name it in one of them only."
            )
        trained = TokenRows(weight[torch.tensor(list(rows), device=weight.device)], rows)
        attachment.add(f"{path}.{NAME}", trained)
        # `named_modules` gives each module once, whatever its names.
        for other_path, other in list(model.named_modules()):
            if getattr(other, "weight", None) is weight and isinstance(other, nn.Embedding | nn.Linear):
                if other is not module:
                    attachment.make(AddModule(f"{other_path}.{NAME}", trained))
                attachment.forward_hook(
                    other_path, trained.embed if isinstance(other, nn.Embedding) else trained.project
                )


def _weight(module: Any) -> Tensor:
    weight: Tensor = module.weight
    return weight


def _places(model: nn.Module, wanted: Sequence[int] | Mapping[str, Sequence[int]]) -> dict[str, Sequence[int]]:
    """Return the rows of each module by its path; modules that share a weight have one entry."""
    named = dict(model.named_modules())
    embeddings = _embeddings(model)
    if not isinstance(wanted, Mapping):
        return {next(path for path, module in named.items() if module is embeddings): wanted}
    found: dict[str, Sequence[int]] = {}
    weights: dict[int, Sequence[int]] = {}
    for name, rows in wanted.items():
        paths = [path for path in named if path == name or path.endswith(f".{name}")]
        weight = getattr(named[paths[0]], "weight", None) if paths else None
        if not isinstance(weight, Tensor) or weight.dim() != 2 or max(rows) >= len(weight):
            raise LitPeftError(
                f"trainable_token_indices names {name!r}, which is not a module of {type(model).__name__} with these "
                f"rows: the closest are {closest(name, [path.rpartition('.')[2] for path in named if path])}."
            )
        if list(weights.setdefault(id(weight), rows)) != list(rows):
            raise LitPeftError(
                f"trainable_token_indices gives {name!r} other rows than the module that shares its weight: give both "
                "the same."
            )
        if weights[id(weight)] is rows:
            found[paths[0]] = rows
    return found


def check_indices(wanted: Any) -> None:
    """Check the value of `trainable_token_indices`.

    Raises:
        LitPeftError: it is not lists of different numbers from 0.
    """
    for rows in wanted.values() if isinstance(wanted, Mapping) else [wanted]:
        valid = isinstance(rows, (list, tuple)) and all(type(row) is int and 0 <= row < 2**31 for row in rows)
        if not valid or not rows or len(set(rows)) < len(rows):
            raise LitPeftError(
                "trainable_token_indices must be a list of different token ids, or such lists by the names of "
                "modules, e.g. {embed_tokens: [32000], lm_head: [32000]}."
            )


def token_rows(attachment: Attachment) -> dict[str, TokenRows]:
    """Return the trained rows by the path of the module that they belong to."""
    return {
        path.removesuffix(f".{NAME}"): module
        for path, module in attachment.adapted.items()
        if isinstance(module, TokenRows)
    }


def resized_parameters(attachment: Attachment) -> list[str]:
    """Return the names of the base parameters that have more rows than in the base."""
    changes = (change for change in attachment.changes if isinstance(change, ResizeVocabulary))
    return sorted({base_name(path) for change in changes for path in change.originals})


def start_from_mean(model: nn.Module, attachment: Attachment, indices: Sequence[int]) -> None:
    """Let the rows of new tokens start from the mean of the base's rows, also where the base has spare rows."""
    for path, rows in token_rows(attachment).items():
        if rows.weight.is_meta:
            continue
        places = [at for at, index in enumerate(rows.indices.tolist()) if index in set(indices)]
        weight = _weight(model.get_submodule(path))
        used = torch.ones(len(weight), dtype=torch.bool, device=weight.device)
        used[rows.indices] = False
        with torch.no_grad():
            rows.weight[places] = weight[used].float().mean(0).to(rows.weight.dtype)


def merged_rows(attachment: Attachment) -> tuple[int | None, dict[str, TokenRows]]:
    """Return what `write_rows` needs after the method has left the model."""
    sizes = [change.size for change in attachment.changes if isinstance(change, ResizeVocabulary)]
    return (sizes[0] if sizes else None), token_rows(attachment)


def write_rows(model: nn.Module, size: int | None, rows: Mapping[str, TokenRows]) -> None:
    """Write trained rows into a bare model for good."""
    if size is not None:
        ResizeVocabulary(size).apply(model)
    with torch.no_grad():
        for path, trained in rows.items():
            weight = _weight(model.get_submodule(path))
            weight[trained.indices.to(weight.device)] = trained.weight.to(weight)


def new_token_settings(model: nn.Module, ids: Sequence[int]) -> list[int] | dict[str, list[int]]:
    """Return the `trainable_token_indices` for new tokens: embeddings, and a head with its own weight."""
    embeddings, head = _embeddings(model), _head(model)
    if head is None or getattr(head, "weight", None) is _weight(embeddings):
        return list(ids)
    paths = {id(module): path for path, module in model.named_modules()}
    return {paths[id(module)]: list(ids) for module in (embeddings, head)}
