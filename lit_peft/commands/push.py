"""`lit-peft push`."""

from lit_peft.commands.hub import push as run

__all__ = ["run"]
