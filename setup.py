"""Build from setup.cfg, where all metadata lives."""

from setuptools import setup

setup()
