"""Faults against real trainings: what happens to whom (faults), inside a rank (inside), one start (job), the verdict
on a trial (trials). `mlm-mpi chaos` is their command; nothing else of the program knows of them.
"""
