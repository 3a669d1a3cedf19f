"""Every rotary model of transformers and diffusers, tiny, eager against compiled.

command.py is the command line; run.py starts processes, measure.py puts a unit through
scenarios.py, residue.py and rotations.py count without asking fxfuse, summary.py and coverage.py
tell.
"""
