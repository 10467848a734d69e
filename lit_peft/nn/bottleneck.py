"""Bottleneck adapters: a small two-layer network after a frozen sublayer or parallel to it.

serial (Houlsby et al. 2019; Pfeiffer et al. 2021)        parallel (He et al. 2022)

      x ──────────────┐                                    x ──┬──────────────┐
      │               │                                        │              │
┌─────▼─────┐         │                                  ┌─────▼─────┐  ┌─────▼─────┐
│ attention │         │                                  │    FFN    │  │ down      │
│  or FFN   │         │                                  │  frozen   │  │ act       │
└─────┬─────┘         │                                  └─────┬─────┘  │ up   · s  │
      ├────────┐      │                                        │        └─────┬─────┘
┌─────▼─────┐  │      │                                        └──────(+)─────┘
│ down, act │  │      │                                                │
│ up    · s │  │      │                                     + x, LayerNorm, as in the base
└─────┬─────┘  │      │
     (+)───────┘      │
      └──────(+)──────┘   LayerNorm, as in the base
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_peft.nn.call_state import CallState
from lit_peft.nn.rows import repeats
from lit_peft.util.errors import LitPeftError, closest

InitBottleneck = Literal["mam_adapter", "bert", "houlsby"]
Scaling = float | Literal["learned", "channel"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "leakyrelu": F.leaky_relu,
    "linear": lambda x: x,
    "mish": F.mish,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
}
ACTIVATIONS["gelu_pytorch_tanh"] = ACTIVATIONS["gelu_new"]


class Bottleneck(nn.Module):
    """`A(h) = s · up(act(down(h)))`, the trained network of every bottleneck adapter.

    Houlsby et al. 2019 (arXiv:1902.00751), section 2.1, with the scale s of He et al. 2022 (arXiv:2110.04366).

    Args:
        in_features: size of the input.
        bottleneck_size: size between `down` and `up`.
        out_features: size of the output; `in_features` when None.
        non_linearity: the activation, a name in `ACTIVATIONS`.
        bias: whether `down` and `up` have biases.
        scaling: s: a number, `learned` (one trained number) or `channel` (one per output feature); both start at 1.
        dropout: dropout probability of the scaled output.
        init_weights: `mam_adapter` (`down` Kaiming-uniform, `up` zero: the output starts at zero), `bert` (both normal,
            standard deviation 0.02) or `houlsby` (both normal, 0.01, truncated at two standard deviations).
        use_gating: multiply the output by a gate in (0, 1), the mean over the sequence of `sigmoid(W h)`
            (UniPELT, arXiv:2110.07577). The mean is over all tokens of a call, padding included. Without a sequence
            dimension, each token has its own gate.
        ln_before: a new LayerNorm on the input.
        ln_after: a new LayerNorm on the output.
        adapter_residual_before_ln: add the residual before that LayerNorm rather than after it.
        device: device of the parameters.
        dtype: dtype of the parameters. The computation uses the input's dtype.

    Shapes:
        input (..., in_features), residual (..., out_features) → output (..., out_features)

    Raises:
        LitPeftError: a size is not positive, the dropout is not in [0, 1), or a name is unknown.
    """

    def __init__(
        self,
        in_features: int,
        bottleneck_size: int,
        out_features: int | None = None,
        *,
        non_linearity: str = "relu",
        bias: bool = True,
        scaling: Scaling = 1.0,
        dropout: float = 0.0,
        init_weights: InitBottleneck = "mam_adapter",
        use_gating: bool = False,
        ln_before: bool = False,
        ln_after: bool = False,
        adapter_residual_before_ln: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check(bottleneck_size=bottleneck_size, non_linearity=non_linearity, scaling=scaling, dropout=dropout)
        out_features = in_features if out_features is None else out_features
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.act, self.non_linearity, self.dropout = ACTIVATIONS[non_linearity.lower()], non_linearity, dropout
        self.adapter_residual_before_ln = adapter_residual_before_ln
        self.enabled = True
        # The indices of the batch's rows that the hooks change, and the number of rows; None for all rows.
        self.rows: tuple[Tensor, int] | None = None
        self.norm_before = nn.LayerNorm(in_features, **factory) if ln_before else None
        self.down = nn.Linear(in_features, bottleneck_size, bias=bias, **factory)
        self.up = nn.Linear(bottleneck_size, out_features, bias=bias, **factory)
        self.gate = nn.Linear(in_features, 1, **factory) if use_gating else None
        self.norm_after = nn.LayerNorm(out_features, **factory) if ln_after else None
        self.scaling: float | nn.Parameter
        if isinstance(scaling, str):
            self.scaling = nn.Parameter(torch.ones(1 if scaling == "learned" else out_features, **factory))
        else:
            self.scaling = float(scaling)
        self.reset_parameters(init_weights)

    def reset_parameters(self, init_weights: InitBottleneck) -> None:
        """Initialize `down`, `up` and the gate again.

        Raises:
            LitPeftError: the initialization is unknown.
        """
        check(init_weights=init_weights)
        if init_weights == "mam_adapter":
            nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
            nn.init.zeros_(self.up.weight)
        for layer in (self.down, self.up, self.gate):
            if layer is None:
                continue
            if init_weights == "houlsby" and layer is not self.gate:
                nn.init.trunc_normal_(layer.weight, std=0.01, a=-0.02, b=0.02)
            elif init_weights == "bert" or layer is self.gate:
                nn.init.normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(self, hidden: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return `A(hidden)`, or `A(hidden) + residual` in the residual's dtype if there is one."""
        x = hidden if self.norm_before is None else _norm(self.norm_before, hidden)
        out = _linear(self.up, self.act(_linear(self.down, x)))
        out = out * (self.scaling.to(out.dtype) if isinstance(self.scaling, Tensor) else self.scaling)
        if self.dropout:
            out = F.dropout(out, self.dropout, self.training)
        if self.gate is not None:
            gate = torch.sigmoid(_linear(self.gate, hidden))
            out = out * (gate.mean(dim=-2, keepdim=True) if gate.dim() > 2 else gate)
        if residual is not None and self.adapter_residual_before_ln:
            out = out.to(residual.dtype) + residual
        if self.norm_after is not None:
            out = _norm(self.norm_after, out)
        if residual is not None and not self.adapter_residual_before_ln:
            out = out.to(residual.dtype) + residual
        return out

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Forward pre-hook: replace the module's input x by `x + A(x)`."""
        return (self._on_rows(self, args[0], args[0]), *args[1:]) if self.enabled else None

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Forward hook: replace the module's output y by `y + A(y)`."""
        return self._on_rows(self, output, output) if self.enabled else None

    def beside(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Forward hook: replace the module's output y by `y + A(x)`, where x is its input."""
        return self._on_rows(lambda y, x: y + self(x).to(y.dtype), output, args[0]) if self.enabled else None

    def _on_rows(self, function: Callable[[Tensor, Tensor], Tensor], y: Tensor, x: Tensor) -> Tensor:
        """Return `function(y, x)` for this adapter's rows, and y for the others."""
        if self.rows is None:
            return function(y, x)
        rows, count = self.rows[0].to(y.device), repeats(y, self.rows[1])
        positions = (rows[:, None] * count + torch.arange(count, device=y.device)).flatten()
        return y.index_copy(0, positions, function(y[positions], x[positions]).to(y.dtype))

    def extra_repr(self) -> str:
        scaling = self.scaling if isinstance(self.scaling, float) else "learned"
        return f"non_linearity={self.non_linearity!r}, scaling={scaling}, dropout={self.dropout}"


class _SublayerCall(CallState):
    residual: Tensor | None = None
    more_output: Tensor | None = None
    result: Tensor | None = None


class SublayerAdapter(Bottleneck):
    """A bottleneck at a sublayer (attention or FFN) of a transformer layer, which works through forward hooks.

    Let y be the sublayer's output, x the residual that the layer adds to it, and LN the LayerNorm that follows in a
    post-LN layer. The layer computes `LN(y + x)`, or `y + x`. The adapter replaces y by y':

    - serial: `y' = A(y) + y`;
    - serial with `original_ln_before`: `y' = A(LN(y + x)) + y`, or `A(y + x) + y` without LN. Instead of y, `LN(y + x)`
      is added if `residual_before_ln` is False, and `y + x` if it is `"post_add"`;
    - parallel: `y' = y + A(x)`.

    Without `original_ln_after`, the result of the layer is y': its own residual and LN are skipped.

    Where the layer adds the outputs of two modules, y is their sum, and the module that runs last gets the change.

    Args:
        in_features: size of the hidden states.
        bottleneck_size: size between `down` and `up`.
        is_parallel: use the parallel form.
        original_ln_before: see above; serial only.
        original_ln_after: see above.
        residual_before_ln: see above.
        norm: the layer's LN after the residual; None in a pre-LN layer. It remains a part of the layer.
        factors: what the layer multiplies the outputs of these two modules by, that of the last one first.
        **settings: see `Bottleneck`.

    Shapes:
        y, x, y' (batch, sequence, in_features), or (tokens, in_features)
    """

    def __init__(
        self,
        in_features: int,
        bottleneck_size: int,
        *,
        is_parallel: bool = False,
        original_ln_before: bool = False,
        original_ln_after: bool = True,
        residual_before_ln: bool | Literal["post_add"] = True,
        norm: nn.Module | None = None,
        factors: tuple[float, ...] = (1.0, 1.0),
        **settings: Any,
    ) -> None:
        super().__init__(in_features, bottleneck_size, **settings)
        self.factors = factors
        self.is_parallel, self.original_ln_before = is_parallel, original_ln_before
        self.original_ln_after, self.residual_before_ln = original_ln_after, residual_before_ln
        self._call = _SublayerCall()
        # A module in a tuple is not registered as a submodule of this one.
        self.norm = (norm,)

    @property
    def needs_residual(self) -> bool:
        """Whether x is needed."""
        return self.is_parallel or self.original_ln_before or not self.original_ln_after

    def capture(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the module whose first input is x: store x."""
        self._call.residual = args[0] if args else kwargs["hidden_states"]

    def capture_more(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook of a module whose output is another part of x: add it."""
        residual = self._call.residual
        assert residual is not None
        self._call.residual = residual + (output if isinstance(output, Tensor) else output[0])

    def capture_output(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook of a module whose output is another part of y: store it."""
        self._call.more_output = output if isinstance(output, Tensor) else output[0]

    def adapt(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Forward hook of the module whose output is y: replace it by y'."""
        x, self._call.residual = self._call.residual, None
        more, self._call.more_output = self._call.more_output, None
        if not self.enabled:
            return None
        own = y = output if isinstance(output, Tensor) else output[0]
        if more is not None:
            y = y * self.factors[0] + more * self.factors[1]
        if x is not None and x.shape != y.shape:
            # A mixture of experts may return its tokens without a batch dimension.
            x = x.reshape(y.shape)
        adapted = (
            self._on_rows(lambda y, _: self._adapted(y, None), y, y)
            if x is None
            else self._on_rows(self._adapted, y, x)
        )
        if more is not None:
            adapted = own + (adapted - y) / self.factors[0]
        if isinstance(output, Tensor):
            return adapted
        # Some models return a list, and join it with others.
        return [adapted, *output[1:]] if isinstance(output, list) else (adapted, *output[1:])

    def pass_over(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Forward hook of LN: replace its output by y' if `original_ln_after` is False."""
        result, self._call.result = self._call.result, None
        # OPT's FFN has no batch dimension.
        return None if result is None else result.view_as(output)

    def _adapted(self, y: Tensor, x: Tensor | None) -> Tensor:
        (norm,) = self.norm
        if self.is_parallel:
            assert x is not None
            out = y + self(x).to(y.dtype)
        else:
            hidden = around = y
            if self.original_ln_before and x is not None:
                total = y + x
                hidden = total if norm is None else norm(total)
                if self.residual_before_ln is not True:
                    around = total if self.residual_before_ln == "post_add" else hidden
            out = self(hidden, around)
        if self.original_ln_after or x is None:
            return out
        if norm is None:
            return out - x
        self._call.result = out
        return y


def check(
    *,
    bottleneck_size: int | None = None,
    non_linearity: str | None = None,
    scaling: Scaling | None = None,
    dropout: float | None = None,
    init_weights: str | None = None,
) -> None:
    """Check the settings of a bottleneck that are given.

    Raises:
        LitPeftError: a setting is out of range or unknown; the message names it and the fix.
    """
    if bottleneck_size is not None and bottleneck_size < 1:
        raise LitPeftError(f"bottleneck_size={bottleneck_size}: give a positive integer, e.g. bottleneck_size=64.")
    if non_linearity is not None and non_linearity.lower() not in ACTIVATIONS:
        known = closest(non_linearity.lower(), ACTIVATIONS)
        raise LitPeftError(f"non_linearity={non_linearity!r} is not known: the closest are {known}.")
    if isinstance(scaling, str) and scaling not in ("learned", "channel"):
        raise LitPeftError(f"scaling={scaling!r} is not known: give a number, 'learned' or 'channel'.")
    if dropout is not None and not 0.0 <= dropout < 1.0:
        raise LitPeftError(f"dropout={dropout}: give a probability of at least 0 and below 1.")
    if init_weights is not None and init_weights not in get_args(InitBottleneck):
        known = closest(init_weights, get_args(InitBottleneck))
        raise LitPeftError(f"init_weights={init_weights!r} is not known: use {known}.")


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    # The weights are cast rather than x, because they are smaller.
    return F.linear(x, layer.weight.to(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype))


def _norm(layer: nn.LayerNorm, x: Tensor) -> Tensor:
    return F.layer_norm(x, layer.normalized_shape, layer.weight.to(x.dtype), layer.bias.to(x.dtype), layer.eps)
