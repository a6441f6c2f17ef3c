"""Triton kernels of dmv_fast, installed as ``dmv_fast.kernels``."""
