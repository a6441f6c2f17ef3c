"""How a frame runs fast: folded weights, half precision, static buffers, one graph on CUDA."""
