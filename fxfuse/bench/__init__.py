"""fxfuse bench: recipes of attention preludes, timed beside what else can run them.

In come cases (recipes.py: shapes and chains), out come rows (rows.py) on the terminal, as JSON and
as a plot. Correctness against float64 comes first, and nothing wrong is timed.
"""
