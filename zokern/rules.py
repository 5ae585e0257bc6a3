"""Moved to zokern.contract.rules."""

from zokern._moved import moved

moved(__name__, "zokern.contract.rules")
