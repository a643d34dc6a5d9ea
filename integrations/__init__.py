"""What plugs a policy into other programs, each in a folder of its own, and into pipelines (`attaching.py`)."""
