"""Rows that hold several examples: their positions restart with each example, and they have no attention mask.

On a GPU, attention computes each example by itself, see `lit_peft.models.varlen_attention`. Elsewhere, and where that
is not possible, transformers keeps tokens from attending to other examples by a dense mask
(`masking_utils.find_packed_sequence_indices`), but only in models that pass their positions to the mask, and only
without a cache.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from lit_peft.methods.attachment import MethodSettings, attachment_or_none
from lit_peft.models.call_arguments import arguments
from lit_peft.models.transformers_internals import attention_implementation
from lit_peft.models.varlen_attention import NAME, boundaries, packed_rows, register, uses_varlen, way_for
from lit_peft.nn.evaluating import evaluating
from lit_peft.util.errors import LitPeftError, first_line

# What the collator adds for attention functions that take the examples' boundaries.
BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def is_packed(batch: dict[str, Any]) -> bool:
    """Return whether the rows of a batch are packed: it has positions and no mask."""
    return batch.get("position_ids") is not None and batch.get("attention_mask") is None


def run_packed(model: Any, batch: dict[str, Any]) -> Any:
    """Call a model on a packed batch."""
    with packed_rows(way_for(model) if uses_varlen(model) else None):
        return model(**packed_inputs(model, batch))


def packed_inputs(model: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments with which a model takes a packed batch: no cache, and a single row for flash attention.

    Raises:
        LitPeftError: the attached method has virtual tokens.
    """
    attachment = attachment_or_none(model)
    if attachment is not None:
        check_method(attachment.settings)
    ends = {name: batch[name] for name in BOUNDARIES if name in batch}
    batch = {name: value for name, value in batch.items() if name not in BOUNDARIES}
    is_flash = "flash" in (attention_implementation(model.config) or "")
    if (is_flash or uses_varlen(model)) and "kwargs" in arguments(model):
        batch.update(ends or boundaries(batch["position_ids"]))
    if is_flash:
        batch = {
            name: value.reshape(1, -1) if isinstance(value, Tensor) and name not in BOUNDARIES else value
            for name, value in batch.items()
        }
    return {**batch, "use_cache": False}


def check_method(settings: MethodSettings, setting: str = "data.packing") -> None:
    """Refuse a method that does not work on a row of several examples.

    Raises:
        LitPeftError: it has virtual tokens.
    """
    if not settings.packs:
        raise LitPeftError(
            f"{setting} is set, but the virtual tokens of {settings.method} come once in a row, not before each of "
            "its examples: leave it out, or use a method without virtual tokens, such as LoRA."
        )


def prepare_packing(model: Any, may_choose: bool = True) -> None:
    """Choose how a model computes packed rows, and test that it keeps their examples apart.

    On a GPU, a model with transformers' `sdpa` gets attention without a mask, if it computes the same.

    Args:
        model: a causal LM, with or without a method attached.
        may_choose: whether the attention function may be changed.

    Raises:
        LitPeftError: the model lets tokens see those of other examples.
    """
    if may_choose and model.device.type == "cuda" and attention_implementation(model.config) == "sdpa":
        way, problem = way_for(model), "this model needs one"
        if way is not None:
            try:
                register()
                model.set_attn_implementation(NAME)
                check_packing(model)
            except Exception as failure:  # compilers and kernels raise errors of many classes
                problem = first_line(failure)
            else:
                how = "torch's variable-length kernel" if way == "examples" else "flex attention"
                rank_zero_info(f"Packed rows: attention by {how}, without a mask; attn_implementation=sdpa has one.")
                return
            model.set_attn_implementation("sdpa")
        rank_zero_warn(f"Packed rows get a dense mask, and cost more time and memory: {problem}.")
    if uses_varlen(model) and way_for(model) is None:
        raise LitPeftError(
            f"model.attn_implementation is {NAME!r}, but {type(model).__name__} needs the mask or drops out attention "
            "weights: use 'sdpa'."
        )
    check_packing(model)


def check_packing(model: Any) -> None:
    """Test whether a model keeps packed examples apart: other tokens in the first must not change the second.

    Raises:
        LitPeftError: they do, or the second example is not what it is by itself.
    """
    embeddings = model.get_input_embeddings().weight
    ids = (torch.tensor([[1, 2, 3, 9, 10, 11], [6, 7, 8, 9, 10, 11]]) % len(embeddings)).to(embeddings.device)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]]).to(ids)
    with evaluating(model):
        rows = [run_packed(model, {"input_ids": row, "position_ids": positions}).logits for row in ids.split(1)]
        if uses_varlen(model):  # by itself, and by another attention function
            rows.append(torch.cat([rows[0][:, :3], model(input_ids=ids[:1, 3:], use_cache=False).logits], 1))
            _try_backward(model, {"input_ids": ids[:1], "position_ids": positions})
    one, *others = (row[:, 3:].float() for row in rows)
    # Masked tokens have no weight at all; what differs comes from the way experts are batched.
    exact = rows[0].dtype == torch.float32
    for other, tolerance in zip(others, (1e-4 if exact else 1e-2, 1e-3 if exact else 5e-2), strict=False):
        if not (one - other).abs().max() <= tolerance * one.abs().max():
            raise LitPeftError(
                f"data.packing is set, but {type(model).__name__} lets the tokens of one example see those of other "
                "examples in the row: leave packing out (group_by_length also saves padding), or use another base "
                "model."
            )


def _try_backward(model: Any, batch: dict[str, Any]) -> None:
    """Compute gradients that are not used: a kernel may have no backward pass for a model's sizes."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if trained:
        with torch.enable_grad():
            torch.autograd.grad(run_packed(model, batch).logits.float().sum(), trained, allow_unused=True)
