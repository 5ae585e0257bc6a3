"""Moved to zokern.contract.reference."""

from zokern._moved import moved

moved(__name__, "zokern.contract.reference")
