"""Files for other programs: one module for each runtime or framework that a model is written for.

There is none yet. A module here takes an `AsrModel`, writes a folder, and checks what it wrote against the model; it
may use the packages from `search` down.
"""
