"""The Nemotron-H model: built on meta, patched, adapted, filled. Knows neither Ray nor the data side."""
