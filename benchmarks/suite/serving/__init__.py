"""Serving by vLLM: plain Llama beside cache plans, at equal KV memory."""
