"""Token generation: sampling, the decode loop, and CUDA graph capture of the decode step."""
