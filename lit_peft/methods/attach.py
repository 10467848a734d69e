"""Attach a method to a model and detach it again, bit for bit."""

from __future__ import annotations

from lit_peft.methods.adapter_dtype import set_trained_dtype, use_base_dtype
from lit_peft.methods.attachment import (
    Attachment,
    MethodSettings,
    Model,
    attachment_of,
    attachment_or_none,
    set_attachment,
)
from lit_peft.methods.fast_path import fast_path_changes
from lit_peft.methods.saving import SaveAdapter
from lit_peft.methods.threads import exclusive
from lit_peft.methods.tokens import check_indices, train_tokens
from lit_peft.methods.trained_modules import train_modules
from lit_peft.util.errors import LitPeftError


@exclusive
def attach(model: Model, settings: MethodSettings, autocast_adapter_dtype: bool = True) -> Model:
    """Freeze a model and attach a method to it, in place.

    Args:
        model: a transformers model, or any `nn.Module` that has the modules named in the settings.
        settings: the method's settings, e.g. `LoRASettings(r=8)`.
        autocast_adapter_dtype: whether the trained parameters are float32 on a half-precision model, too, because small
            updates vanish in bfloat16. Otherwise they have the dtype of the frozen ones.

    Returns:
        The same model. Only the method's parameters require gradients.

    Raises:
        LitPeftError: a method is already attached, or the settings do not fit the model. The model is left unchanged.
    """
    attached = attachment_or_none(model)
    if attached is not None:
        raise LitPeftError(
            f"This {type(model).__name__} already has {attached.settings.method!r} attached: call "
            "lit_peft.detach(model) first, or use lit_peft.add_adapter. Trained weights are never replaced silently."
        )
    attachment = Attachment(model, settings)
    attachment.freeze()
    try:
        settings.attach_to(model, attachment)
        for change in fast_path_changes(model, attachment.adapted):
            attachment.make(change)
        if settings.modules_to_save:
            train_modules(attachment, settings.modules_to_save)
        if settings.trainable_token_indices:
            check_indices(settings.trainable_token_indices)
            train_tokens(attachment, settings.trainable_token_indices)
        set_trained_dtype(attachment)
        if not autocast_adapter_dtype:
            use_base_dtype(attachment)
        if attachment.adapted and hasattr(model, "save_pretrained"):
            attachment.set("", "save_pretrained", SaveAdapter(model))
    except BaseException:
        attachment.irreversible = None  # nothing has been trained yet
        attachment.revert()
        raise
    set_attachment(model, attachment)
    return model


@exclusive
def detach(model: Model) -> Model:
    """Remove the method and restore the base model, bit for bit.

    Args:
        model: a model with a method attached.

    Returns:
        The same model.

    Raises:
        LitPeftError: no method is attached, or the method trains the base itself.
    """
    attachment_of(model).revert()
    set_attachment(model, None)
    return model
