"""A LoRA as llama.cpp's adapter file, which Ollama and others read as well.

llama.cpp computes `W x + (alpha / r) · B A x` with one alpha for all layers, and finds the layers by the names that its
own files give them. The queries and keys of Llama's kind have the rows of each head in another order there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_peft.methods.attachment import attachment_of
from lit_peft.methods.lora import LoRASettings
from lit_peft.nn.lora import LoRALinear
from lit_peft.util.errors import LitPeftError, closest

FILE = "adapter.gguf"
# llama.cpp's name of the architecture by transformers' model_type.
ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
}
# Those whose queries and keys are stored with the halves of each head interleaved.
_INTERLEAVED = ("llama",)


def write_gguf_lora(model: nn.Module, folder: Path) -> None:
    """Write the attached LoRA as `adapter.gguf`, with a `Modelfile` for Ollama, into an existing folder.

    Args:
        model: a causal LM of an architecture in `ARCHITECTURES`, with a LoRA on linear layers.
        folder: the folder.

    Raises:
        LitPeftError: the package `gguf` is missing, the architecture is not known, or something is trained that such a
            file cannot hold.
    """
    try:
        import gguf
    except ImportError:
        raise LitPeftError("Writing a GGUF file needs a package that is not installed: pip install gguf") from None
    attachment = attachment_of(model)
    settings, config = attachment.settings, _text_config(model)
    if not isinstance(settings, LoRASettings):
        raise LitPeftError(f"A GGUF adapter holds a LoRA, and {settings.method!r} is attached: use another format.")
    kind = ARCHITECTURES.get(config.model_type)
    if kind is None:
        raise LitPeftError(
            f"model_type={config.model_type!r} is not known to be written as GGUF here: the closest are "
            f"{closest(config.model_type, ARCHITECTURES)}. llama.cpp's own converter reads the folder in peft's format."
        )
    _check_contents(attachment)
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, kind.upper()), config.num_hidden_layers)
    writer: Any = gguf.GGUFWriter(str(folder / FILE), kind)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(settings.lora_alpha))
    if settings.alora_invocation_tokens is not None:
        writer.add_key_value(
            gguf.Keys.Adapter.ALORA_INVOCATION_TOKENS,
            list(settings.alora_invocation_tokens),
            gguf.GGUFValueType.ARRAY,
            gguf.GGUFValueType.UINT32,
        )
    for path, layer in attachment.adapted.items():
        name = names.get_name(f"{path}.weight", try_suffixes=(".weight",))
        if name is None:
            raise LitPeftError(f"{path} has no name in llama.cpp's files of {kind!r}: leave it out of target_modules.")
        a, b = _matrices(layer, settings)
        if kind in _INTERLEAVED:
            b = _interleaved(path.rpartition(".")[2], b, config)
        writer.add_tensor(f"{name}.lora_a", a.numpy())
        writer.add_tensor(f"{name}.lora_b", b.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    base = getattr(config, "name_or_path", "") or "unknown"
    (folder / "Modelfile").write_text(
        f"# The base as Ollama knows it, or a GGUF file of it; trained on: {base}\nFROM BASE\nADAPTER ./{FILE}\n",
        encoding="utf-8",
    )


def _text_config(model: Any) -> Any:
    return model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config


def _check_contents(attachment: Any) -> None:
    """Check that the file can hold everything that was trained.

    Raises:
        LitPeftError: names what it cannot.
    """
    settings = attachment.settings
    wrong = {
        "use_dora=True": settings.use_dora,
        "lora_bias=True": settings.lora_bias,
        f"bias={settings.bias!r}": settings.bias != "none",
        f"modules_to_save={list(settings.modules_to_save or ())}": bool(settings.modules_to_save),
        "trainable_token_indices": bool(settings.trainable_token_indices),
        f"init_lora_weights={settings.init_lora_weights!r}": settings.init_lora_weights in ("pissa", "olora"),
    }
    first = next((name for name, is_set in wrong.items() if is_set), None)
    other = next((path for path, layer in attachment.adapted.items() if not isinstance(layer, LoRALinear)), None)
    if first is not None or other is not None:
        what = first or f"the adapted {other}, which is no linear layer"
        raise LitPeftError(f"A GGUF adapter cannot hold {what}: use `lit-peft merge`, or another format.")


@torch.no_grad()
def _matrices(layer: Any, settings: LoRASettings) -> tuple[Tensor, Tensor]:
    """Return A and B in fp32, B scaled so that the file's one alpha gives this layer's update."""
    a, b = layer.lora_A.detach().float().cpu(), layer.lora_B.detach().float().cpu()
    factor = layer.scaling * layer.r / settings.lora_alpha
    return a.contiguous(), (b if factor == 1 else b * factor).contiguous()


def _interleaved(name: str, b: Tensor, config: Any) -> Tensor:
    """Return B with the rows of each head of a query or key in the order of llama.cpp; of another layer, unchanged."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name)
    if heads is None:
        return b
    return b.view(heads, 2, -1, b.shape[1]).transpose(1, 2).reshape(b.shape).contiguous()
