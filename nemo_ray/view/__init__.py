"""Looking at runs from outside: `nemo-ray status` and `nemo-ray report`."""
