"""Adapter folders of other libraries."""
