"""The data package: files to windows, windows to shards, shards to packs in one global order. No torch."""
