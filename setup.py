"""The one part that is compiled; all else is in pyproject.toml."""

from setuptools import setup

setup(cffi_modules=["jindiskd/jindisk/native_build.py:ffi"])
