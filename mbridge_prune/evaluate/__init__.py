"""How good a model is: loss, divergence from another model, MMLU; under any parallel layout."""
