"""Matrices in few bits: blocks of neighboring numbers as codes, with a scale for each block."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_peft.nn.quantized import pack_nibbles

# Dettmers et al. 2023 (QLoRA, arXiv:2305.14314), appendix E: quantiles of a normal distribution.
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
# Sign, two bits of exponent and one of mantissa, divided by the largest: 12.
_POSITIVE_FP4 = (0.0625 / 12, 2 / 12, 3 / 12, 4 / 12, 6 / 12, 8 / 12, 1.0)
_FP4 = (*(-value for value in reversed(_POSITIVE_FP4)), 0.0, *_POSITIVE_FP4)
_TABLES = {"nf4": _NF4, "fp4": _FP4, "int4": tuple(range(-8, 8))}
KINDS = ("int8", "int4", "nf4", "nf4-dq", "fp4", "fp4-dq", "fp8")
_E4M3 = torch.float8_e4m3fn
_TABLE_BLOCK, _INT4_BLOCK, SCALE_BLOCK = 64, 32, 256


def quantized(matrix: Tensor, kind: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the codes of a matrix, and its scales by name.

    Args:
        matrix: shape (outputs, inputs).
        kind: one of `KINDS`.
    """
    name, _, doubled = kind.partition("-")
    inputs = matrix.shape[1]
    block = {"int8": inputs, "fp8": inputs, "int4": _INT4_BLOCK if inputs % _INT4_BLOCK == 0 else inputs}.get(
        name, _TABLE_BLOCK
    )
    flat = matrix.float().flatten()
    blocks = F.pad(flat, (0, -len(flat) % block)).view(-1, block)
    largest = blocks.abs().amax(1)
    scale = (largest / {"int8": 127.5, "int4": 7.5, "fp8": torch.finfo(_E4M3).max}.get(name, 1.0)).clamp(min=1e-12)
    scales = {"scale": scale}
    if doubled:
        scales, scale = _short_scales(scale)
    numbers = blocks / scale[:, None]
    if name == "fp8":
        return numbers.to(_E4M3).view(torch.uint8).flatten(), scales
    if name in ("nf4", "fp4"):
        table = _table(name, matrix.device)
        codes = torch.bucketize(numbers, (table[1:] + table[:-1]) / 2) - 8
        return pack_nibbles(codes.flatten()), scales
    bits = int(name.removeprefix("int"))
    codes = numbers.round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return pack_nibbles(codes.flatten()) if bits == 4 else codes.to(torch.int8).flatten(), scales


@lru_cache
def _table(name: str, device: torch.device) -> Tensor:
    """Return the number of each code: 256 for fp8, 16 for the others, in order."""
    if name == "fp8":
        return torch.arange(256, dtype=torch.uint8, device=device).view(_E4M3).float()
    return torch.tensor(_TABLES[name], device=device, dtype=torch.float32)


@lru_cache
def _pairs(name: str, device: torch.device) -> Tensor:
    """Return the two numbers that each byte stands for, as one integer of 64 bits: found at once, in a single step."""
    table, byte = F.pad(_table(name, device), (0, 16 - len(_TABLES[name]))), torch.arange(256, device=device)
    return torch.stack([table[byte & 15], table[byte >> 4]], dim=1).view(torch.int64).flatten()


def _short_scales(scale: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Return scales in 8 bits, with a step for each 256 of them and their mean, and the scales that these stand for."""
    mean = scale.mean()
    blocks = F.pad(scale - mean, (0, -len(scale) % SCALE_BLOCK)).view(-1, SCALE_BLOCK)
    step = (blocks.abs().amax(1) / 127).clamp(min=1e-12)
    codes = (blocks / step[:, None]).round().to(torch.int8)
    short = (codes.float() * step[:, None]).flatten()[: len(scale)] + mean
    return {"scale": codes.flatten()[: len(scale)], "step": step, "mean": mean[None]}, short


def decoded(codes: Tensor, kind: str, numel: int, count: int) -> Tensor:
    """Return the numbers of codes before they are scaled, shape (count of blocks, block)."""
    name = kind.partition("-")[0]
    if name == "int8":
        return codes.float().view(count, -1)
    if name == "fp8":
        return _table(name, codes.device).index_select(0, codes.int()).view(count, -1)
    width = numel if name == "int4" else numel + -numel % _TABLE_BLOCK
    numbers = _pairs(name, codes.device).index_select(0, codes.int()).view(torch.float32)
    return numbers[:width].view(count, -1)
