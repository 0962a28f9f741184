"""Facts that are tables, each row with its source; loaded once, when first imported."""
