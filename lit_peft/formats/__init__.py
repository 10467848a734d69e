"""Adapter folders in the formats of peft and AdapterHub."""
