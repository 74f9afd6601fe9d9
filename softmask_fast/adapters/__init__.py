"""Word maps, soft masks and losses for the models of other libraries."""
