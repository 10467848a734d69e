"""Tensor parallelism: each process has a part of every matrix of a layer, and its part of the adapter on it.

    colwise (q, k, v, gate, up):  W [d_out, d_in] by rows, A whole, B by rows;   output in parts
    rowwise (o, down):            W [d_out, d_in] by columns, A by columns, B whole;   outputs are summed

The plan of transformers for the model (`base_model_tp_plan`) says which layer is which. Embeddings, norms, heads,
prompts and the adapters of whole sublayers are whole on every process. The heads of a prefix are split.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lit_peft.methods.attachment import attached_model, attachment_of
from lit_peft.nn.bottleneck import Bottleneck
from lit_peft.nn.ia3 import IA3Linear
from lit_peft.nn.lora import LoRALinear
from lit_peft.nn.prefix import Prefix
from lit_peft.nn.weight_update import WeightUpdate
from lit_peft.util.errors import LitPeftError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def split_matrices(model: Any, mesh: DeviceMesh) -> None:
    """Split the matrices of every layer over the processes of `mesh`.

    Args:
        model: a transformers model, bare or with a method attached.
        mesh: the processes, in one dimension.

    Raises:
        LitPeftError: transformers has no plan for the model, the heads cannot be divided evenly, or an adapter is on a
            matrix of which each process has a part.
    """
    plan, parts = _plan(model), mesh.size()
    config = model.config.get_text_config()
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        count = getattr(config, name, None)
        if count is not None and count % parts:
            raise LitPeftError(
                f"tensor_parallel_size={parts}: the model's {name}={count} cannot be divided evenly. Give a divisor of "
                "it."
            )
    _check_adapters(model, plan, parts)
    for path, module in list(model.named_modules()):
        style = next((style for pattern, style in plan.items() if pattern.fullmatch(path)), None)
        if style is not None:
            _split(path, module, mesh, style)
        elif isinstance(module, Prefix):
            _split_prefix(module, mesh)


def _check_adapters(model: Any, plan: dict[re.Pattern[str], str], parts: int) -> None:
    if attached_model(model) is None:
        return
    for path, layer in attachment_of(model).adapted.items():
        host = path.removesuffix(".adapter")
        if type(layer) is Bottleneck and any(pattern.fullmatch(host) for pattern in plan):
            raise LitPeftError(
                f"tensor_parallel_size={parts}: the adapter on {host} would see only a part of its features. Use "
                "placement='paper', which adapts whole sublayers, or tensor_parallel_size=1, which is FSDP2."
            )


def _plan(model: Any) -> dict[re.Pattern[str], str]:
    backbone = getattr(model, getattr(model, "base_model_prefix", ""), None)
    named = getattr(model.config.get_text_config(), "base_model_tp_plan", None) or {}
    styles = set(named.values())
    if not named or not styles <= {"colwise", "rowwise"}:
        raise LitPeftError(
            f"tensor_parallel_size: transformers has no plan for {type(model).__name__} that is supported here (its "
            f"styles: {', '.join(sorted(styles)) or 'none'}). Use tensor_parallel_size=1, which is FSDP2."
        )
    prefix = f"{model.base_model_prefix}." if isinstance(backbone, nn.Module) else ""
    return {re.compile(re.escape(prefix + name).replace(r"\*", r"\d+")): style for name, style in named.items()}


def _special(module: nn.Module) -> str | None:
    """What an update has that cannot be split; None if it has nothing such."""
    if not isinstance(module, LoRALinear):
        return None
    if module.lora_magnitude is not None:
        return "DoRA"
    if module.lora_bias is not None:
        return "lora_bias"
    return None if type(module) is LoRALinear else type(module).__name__


def _split(path: str, module: nn.Module, mesh: DeviceMesh, style: str) -> None:
    """Distribute the parameters of a linear layer, and convert its input and output."""
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    layer = module.base_layer if isinstance(module, LoRALinear | IA3Linear) else module
    plain = type(layer) is nn.Linear and type(layer.weight.data) is Tensor
    special = _special(module)
    if not plain or special is not None:
        kind = special or f"{type(layer).__name__}, {type(layer.weight.data).__name__}"
        raise LitPeftError(f"tensor_parallel_size: {path} ({kind}) cannot be split. Use tensor_parallel_size=1.")
    whole, rows, columns = Replicate(), Shard(0), Shard(1)
    weight, bias = (rows, rows) if style == "colwise" else (columns, whole)
    places: list[tuple[nn.Module, str, Any]] = [(layer, "weight", weight), (layer, "bias", bias)]
    if isinstance(module, WeightUpdate):
        dims = module.split_dims(by_rows=style == "colwise")
        places += [(module, name, whole if dim is None else Shard(dim)) for name, dim in dims.items()]
    for owner, name, placement in places:
        parameter = getattr(owner, name, None)
        if isinstance(parameter, nn.Parameter):
            part = distribute_tensor(parameter.detach(), mesh, [placement])
            setattr(owner, name, nn.Parameter(part, requires_grad=parameter.requires_grad))
    inside, outside = (whole, Shard(-1)) if style == "colwise" else (Shard(-1), whole)

    def enter(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (DTensor.from_local(args[0], mesh, [inside], run_check=False), *args[1:])

    def leave(module: nn.Module, args: Any, out: Any) -> Tensor:
        local: Tensor = out.redistribute(placements=[outside]).to_local()
        return local

    # Other adapters at the same place see plain tensors.
    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave, prepend=True)


def _split_prefix(prefix: Prefix, mesh: DeviceMesh) -> None:
    """Keep in each process the prefix keys and values of its own heads; the network that computes them stays whole."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    parts, rank = mesh.size(), mesh.get_local_rank()
    # The table has K and V of each layer in turn.
    own: list[int] = []
    column = 0
    for heads, *sizes in prefix.shapes:
        for size in (sizes[0], sizes[-1]):
            width = heads * size // parts
            own += range(column + rank * width, column + (rank + 1) * width)
            column += heads * size
    prefix.shapes = tuple((heads // parts, *sizes) for heads, *sizes in prefix.shapes)

    def leave(module: nn.Module, args: Any, table: Tensor) -> Tensor:
        # Each process has the gradient of its own columns: the backward pass adds them up.
        whole = DTensor.from_local(table, mesh, [Replicate()], run_check=False).to_local(grad_placements=[Partial()])
        return whole[:, torch.tensor(own, device=table.device)]

    prefix.register_forward_hook(leave)
