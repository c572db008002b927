"""What the statistics and the checks promise, measured by simulation: `tox run -e checks`, `power`, `coverage`."""
