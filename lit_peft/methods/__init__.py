"""The methods: the settings of each one, and the code that attaches it to a model."""
