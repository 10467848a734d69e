"""Several LoRAs that are active at the same time, so that the model computes with the sum of their updates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lit_peft.methods.adapter_dtype import cast_in_forward
from lit_peft.methods.attachment import Attachment, base_name
from lit_peft.methods.changes import ReplaceModule, TrainParameter, device_and_dtype
from lit_peft.methods.fast_path import fast_path_changes
from lit_peft.methods.lora import tied_layers
from lit_peft.methods.saving import SaveAdapter
from lit_peft.nn.expert_lora import ExpertLoRA, LoRAExperts
from lit_peft.nn.lora import LoRALayer
from lit_peft.nn.lora_attention import LoRAMultihead
from lit_peft.nn.lora_sum import LoRASum, ParameterLoRASum
from lit_peft.util.errors import LitPeftError


@dataclass
class Together(Attachment):
    """Several suspended LoRAs on a model at the same time. What they train is what each of them trains.

    Attributes:
        members: the adapters by name, in the order in which they were named.
    """

    members: dict[str, Attachment] = field(default_factory=dict)

    @classmethod
    def of(cls, members: Mapping[str, Attachment]) -> Together:
        """Return adapters as one attachment, which is not on the model yet.

        Raises:
            LitPeftError: an adapter cannot be active with others, see `check_together`.
        """
        check_together(members)
        first = next(iter(members.values()))
        return cls(first.model, first.settings, unfrozen=first.unfrozen, members=dict(members))

    def resume(self) -> None:
        for member in self.members.values():
            member.follow_base()
        if self.unfrozen and self.model.get_parameter(self.unfrozen[0]).requires_grad:
            self.freeze()
        self.changes, self.adapted, self.trained = [], {}, []
        layers = [item for member in self.members.values() for item in member.adapted.items()]
        for path in dict.fromkeys(path for path, layer in layers if not isinstance(layer, ExpertLoRA)):
            same = [layer for other, layer in layers if other == path and isinstance(layer, LoRALayer)]
            for layer in same:
                layer.resume()
            self.replace(path, LoRASum(same))
        self._add_parameter_sums()
        for change in fast_path_changes(self.model, self.adapted):
            self.make(change)
        for member in self.members.values():
            for change in member.changes:
                if isinstance(change, TrainParameter):
                    self.make(change)
                    self.trained.append(change.path)
        cast_in_forward(self)
        if hasattr(self.model, "save_pretrained"):
            self.set("", "save_pretrained", SaveAdapter(self.model))

    def _add_parameter_sums(self) -> None:
        """Put the sums in the place of parameters: of experts, and of the projections of attentions."""
        by_path: dict[str, list[ExpertLoRA]] = {}
        for member in self.members.values():
            for path, layer in member.adapted.items():
                if isinstance(layer, ExpertLoRA):
                    layer.resume()
                    by_path.setdefault(path, []).append(layer)
        kinds = {
            change.path: type(change.module)
            for member in self.members.values()
            for change in member.changes
            if isinstance(change, ReplaceModule) and isinstance(change.module, LoRAExperts | LoRAMultihead)
        }
        for owner, kind in kinds.items():
            own = {path: layers for path, layers in by_path.items() if path.rpartition(".")[0] == owner}
            sums = {path: ParameterLoRASum(layers) for path, layers in own.items()}
            base = self.model.get_submodule(owner)
            container = kind(base, {each.parameter_name: each for each in sums.values()})
            self.make(ReplaceModule(owner, container.train(base.training)))
            self.adapted.update(sums)

    def suspend(self) -> None:
        super().suspend()
        for member in self.members.values():
            member.last_seen = device_and_dtype(self.model)

    def revert(self) -> None:
        self.suspend()
        self.unfreeze()


def check_together(members: Mapping[str, Attachment]) -> None:
    """Refuse adapters that cannot be active at the same time.

    Args:
        members: the adapters by name.

    Raises:
        LitPeftError: names the first one that cannot, and why.
    """
    owner: dict[str, str] = {}
    for name, member in members.items():
        start = f"The adapter {name!r} ({member.settings.method}) cannot be active together with others"
        if member.settings.trainable_token_indices:
            raise LitPeftError(
                f"{start}, because it has rows of tokens of its own (trainable_token_indices): use it alone, or train "
                "it without them."
            )
        layers = member.adapted
        if not layers or not all(isinstance(layer, LoRALayer) for layer in layers.values()):
            raise LitPeftError(
                f"{start}: only LoRAs can, whose updates are added. Bottleneck adapters follow each other in a "
                "lit_peft.Stack; other adapters are used one at a time."
            )
        if getattr(member.settings, "alora_invocation_tokens", None):
            raise LitPeftError(f"{start}, because it has alora_invocation_tokens: use it alone.")
        if tied_layers(layers.values()):
            raise LitPeftError(
                f"{start}, because it was made with ensure_weight_tying=True: use it alone, or merge it first."
            )
        for layer in layers.values():
            assert isinstance(layer, LoRALayer)
            if type(layer).update is LoRALayer.update and not isinstance(layer, ExpertLoRA):
                raise LitPeftError(
                    f"{start}, because its layers of the class {type(layer).__name__} have no method `update`, which "
                    "returns what they add to the base layer's output: define it, or use the adapter alone."
                )
            if layer.lora_magnitude is not None or layer.moved:
                wrong = "use_dora=True" if layer.lora_magnitude is not None else "init_lora_weights='pissa' or 'olora'"
                raise LitPeftError(
                    f"{start}, because it was made with {wrong}, so that it is no update that can be added to others: "
                    "use it alone, or merge it first."
                )
        for path in member.trained_copies:
            other = owner.setdefault(base_name(path), name)
            if other != name:
                raise LitPeftError(
                    f"{start}: it trains {base_name(path)} in full (modules_to_save or bias), and so does {other!r}. "
                    "Use one of them alone."
                )
    for name, member in members.items():
        for path in member.trained_copies:
            clash = next((other for other, each in members.items() if each is not member and _adapts(each, path)), None)
            if clash is not None:
                raise LitPeftError(
                    f"The adapter {name!r} cannot be active together with {clash!r}: it trains {base_name(path)} in "
                    "full (modules_to_save or bias), and the other one has a LoRA there. Use one of them alone."
                )


def _adapts(attachment: Attachment, path: str) -> bool:
    """Whether an attachment has a layer in the place of the module that has the parameter at `path`."""
    return base_name(path).rpartition(".")[0] in attachment.adapted
