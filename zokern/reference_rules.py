"""Moved to zokern.contract.reference_rules."""

from zokern._moved import moved

moved(__name__, "zokern.contract.reference_rules")
