"""The commands of `lit-peft` that do not train: one module each, with `run(arguments)`."""
