"""`python -m lit_peft`, the same as `lit-peft`."""

from lit_peft.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
