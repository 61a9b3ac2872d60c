"""Auto pruning: a budget in, the best architecture out, with the evidence."""
