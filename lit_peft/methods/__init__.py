"""The methods: settings, and how each attaches to a model."""
