"""Floor 0: the configuration of a run, from environment and command line to one frozen value.

Standard library only: a wrong setting fails on the login node before anything is started.
Start reading at schema.py (every option) and resolve.py (how it gets its value).
"""
