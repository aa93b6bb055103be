"""`nemo-ray doctor`: what of this machine, or of a cluster, would be in a run's way, and the remedy."""
