"""What may never change: the noise and its streams, the rules' tables and arithmetic, as NumPy that other code is held to.

Journals and seeds of all versions mean what these files say (docs/noise.md). Nothing here imports the rest of zokern.
"""
