"""FastNAS: pruning of vision networks, traced with torch.fx onto the slice table."""
