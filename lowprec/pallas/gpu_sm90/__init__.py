"""Kernels for Hopper, in Mosaic GPU: TMA, warp-specialized pipelines, wgmma."""
