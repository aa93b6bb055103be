"""The configuration: what keys mean (schema), what fits together (checks), how it is read (load)."""
