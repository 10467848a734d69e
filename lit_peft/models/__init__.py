"""What is known of base models: where they come from, how they are built, loaded, quantized and tokenized."""
