"""Models as lists of layers: maths only, no files, no environment, no logging (floor 2)."""
