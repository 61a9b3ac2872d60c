"""What a run shows and leaves: console tables, model card, plan."""
