"""One file a question the page answers with a plot."""
