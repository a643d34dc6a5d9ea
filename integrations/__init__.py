"""Policies in other programs, each in a folder of its own, and attached to pipelines (`attaching.py`)."""
