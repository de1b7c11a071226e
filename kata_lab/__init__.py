"""Kata Lab: a secure-container runtime, and the lab in which to see and measure it."""

__version__ = "0.1.0"
