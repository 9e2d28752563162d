"""What a terminal shows while something works: bars of tools, the live view of a run.

Standard library; drawn with `rich` where it is installed, plain lines elsewhere.
"""
