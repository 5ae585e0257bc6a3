"""Hostile journals: made by hand and by chance for the tests, and by coverage for `make fuzz` (python -m tests.fuzz).

A journal that is only changed fails at its first checksum. So an input is taken apart into its records, changed, and put
together with checksums that are right (records.py); what is run on each is in targets.py.
What a run of the fuzzer has found stays for the tests and for later runs (keep.py, kept.py).
"""
