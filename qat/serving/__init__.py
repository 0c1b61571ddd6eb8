"""How a server holds quantized tensors, and the operators that device kernels register on."""
