"""The integer model as fast as the machine allows: in C, PyTorch and Triton, equal to the oracle bit for bit."""
