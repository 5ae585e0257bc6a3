"""A pass as data: what it is told (spec.py), which memory it goes over (table.py), what a step ends with (update.py).

Who does it is not known here: zokern/backends does passes, zokern/sweep.py has them done.
"""
