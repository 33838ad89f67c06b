"""Measure the pools of this package beside their peers.

Run ``python -m benchmarks`` from a checkout. Each benchmark measures all its pools in one run,
on the same stub (or the same PostgreSQL), with the same threads and the same holds, and takes
turns among them, so that a slow moment of the machine falls on everybody. Trust the ratios, not
the absolute figures.
"""
