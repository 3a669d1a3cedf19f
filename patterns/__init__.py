"""What a graph computes: values, their transfer functions, decoded records and the plan to fuse
them.
"""
