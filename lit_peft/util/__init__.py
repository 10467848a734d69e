"""What every room uses: errors, disk, memory, lazy imports, checks of types. Imports nothing of lit_peft above it."""
