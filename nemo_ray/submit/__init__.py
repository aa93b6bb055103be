"""`nemo-ray submit`: a run or a sweep as a job of a Ray cluster."""
