"""The correctness gate: an estimator is held to its facts before it is measured.

`gate.check` runs everything and returns a card; `worlds` are the small models it happens on, `expectations` and `targets` the two
sides of an exact comparison, `identities` what holds draw by draw, `trials` the statistical tests, `faults` the mistakes planted
to see that they are found, `diagnosis` the name of one that was.
"""
