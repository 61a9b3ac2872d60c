"""How good a model is: loss and perplexity on text."""
