"""Benchmarks as values: cases that run on this machine, one at a time, and tables of what they measured.

`lowprec bench` and the scripts in benchmarks/ share them. On a CPU they are ratios of steps that are timed in turn; on
an accelerator they are device times of kernels beside XLA's, with the time that the device cannot go below.
"""
