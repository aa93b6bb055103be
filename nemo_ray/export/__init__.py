"""From an adapter to what others load: a merged checkpoint, or an adapter with a key for each expert."""
