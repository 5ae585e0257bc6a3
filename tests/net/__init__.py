"""A net under all refactoring: runs of every kind, stored once with their journals, states and hashes, and done again.

`python -m tests.net` makes the data anew. That is for cases that are new: what is stored stays, or the noise contract,
the stored bits or the journals of users' runs have changed.
"""
