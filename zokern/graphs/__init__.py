"""A step as a CUDA graph (step.py), and where its numbers come from (live.py)."""

from zokern.graphs.step import GraphedStep

__all__ = ["GraphedStep"]
