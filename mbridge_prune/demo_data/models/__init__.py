"""Real models, one file each, converted once to a Hugging Face folder."""
