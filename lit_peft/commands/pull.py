"""`lit-peft pull`."""

from lit_peft.commands.hub import pull as run

__all__ = ["run"]
